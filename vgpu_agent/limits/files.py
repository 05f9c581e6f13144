"""The two files between the agent and the container that enforces limits.

Each is written by one of them and read by the other, in VGPU_STATE_DIRECTORY.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from vgpu_agent import store
from vgpu_agent.errors import StoreError
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

    def read(path: Path) -> T | None:
        found = store.read_as(kind, path, MAX_BYTES)
        if found is not None and found.format != FORMAT:
            raise StoreError(f"{path} is of another version of the agent")
        return found

    return store.Said(directory / f"limits-{kind.__name__.lower()}", read)
