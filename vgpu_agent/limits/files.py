"""The two files between the agent and the container that enforces limits.

Each is written by one of them and read by the other, in VGPU_STATE_DIRECTORY.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from vgpu_agent import store
from vgpu_agent.model.limits import LimitsLook

FORMAT = 1

MAX_BYTES = 16 * 2**20
"""Most bytes of a file: 1,000 containers, each with a long reason on 8 GPUs, take some 3 MiB."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the agent says: how GPUs are divided (`Shares`).

    `released_until`: NVML is to be closed until then, in seconds since the epoch; 0 where not.
    """

    shares: Mapping[str, tuple[int, ...]]
    released_until: float = 0.0
    format: int = FORMAT


@dataclass(frozen=True, slots=True)
class Seen:
    """What the enforcing container says. `beat`: when, in seconds since the boot."""

    beat: float
    look: LimitsLook
    format: int = FORMAT


T = TypeVar("T", Wanted, Seen)


def said(kind: type[T], directory: Path) -> store.Said[T]:
    """One of the files."""
    read = partial(store.read_as, kind, limit=MAX_BYTES, form=FORMAT)
    return store.Said(directory / f"limits-{kind.__name__.lower()}", read)
