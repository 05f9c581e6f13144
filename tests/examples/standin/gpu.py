"""The GPU of the stand-ins: what CUDA shows, by a clock that `sleep` moves, and what is taken.

SHOWN is a list of `SECOND:BYTES` with commas: the total from that second on. CLOCK and TAKEN are
files: seconds, and the bytes that a server takes.
"""

import os
from pathlib import Path

CLOCK, TAKEN = Path(os.environ["CLOCK"]), Path(os.environ["TAKEN"])


def total() -> int:
    """What CUDA shows now."""
    steps = [each.split(":") for each in os.environ["SHOWN"].split(",")]
    return [int(size) for second, size in steps if float(second) <= float(CLOCK.read_text())][-1]


def take(size: float) -> None:
    """A server takes so many bytes of what it sees now."""
    TAKEN.write_text(str(int(size)))
