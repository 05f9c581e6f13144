"""Processes of this machine, as far as MPS asks for them, from /proc (proc(5)).

In a container they are those of its PID namespace: the MPS pod has `hostPID: true`.
"""

import os
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")


@dataclass(frozen=True, slots=True)
class Process:
    """A process that runs. `started` is in seconds since the boot, rounded down to a clock tick.

    A PID alone names another process once it was used again; the pair does not.
    """

    pid: int
    started: float


def find(pid: int) -> Process | None:
    """The process of that PID; None where there is none, or one that has ended (a zombie)."""
    try:
        # The name, in brackets, may hold anything, brackets too.
        fields = (PROC / str(pid) / "stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    if fields[0] in {"Z", "X"}:
        return None
    return Process(pid, int(fields[19]) / os.sysconf("SC_CLK_TCK"))


def find_named(name: str) -> Iterator[Process]:
    """Processes of that program, by the file that runs or by the name it was started under."""
    for directory in PROC.iterdir():
        if not directory.name.isdecimal():
            continue
        names = set()
        with suppress(OSError):
            names.add((directory / "exe").readlink().name)
        with suppress(OSError):
            first = (directory / "cmdline").read_bytes().partition(b"\0")[0]
            names.add(Path(os.fsdecode(first)).name)
        process = find(int(directory.name)) if name in names else None
        if process is not None:
            yield process


def variable_of(process: Process, name: str) -> str | None:
    """A variable of the environment that a process was started with.

    None where it has none, or where we may not look (that takes root, or its own user).
    """
    try:
        environment = (PROC / str(process.pid) / "environ").read_bytes()
    except OSError:
        return None
    for entry in environment.split(b"\0"):
        key, _, value = entry.partition(b"=")
        if key == name.encode():
            return os.fsdecode(value)
    return None


def now() -> float:
    """Seconds since the boot, on the clock of `Process.started`."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
