"""The two files between the agent and the container that enforces limits.

Each is written by one of them and read by the other, in VGPU_STATE_DIRECTORY. Everything here
blocks.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Generic, TypeVar

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


class Said(Generic[T]):
    """One of the files, read when it is another one."""

    def __init__(self, kind: type[T], directory: Path) -> None:
        self._kind: type[T] = kind
        self.path = path_of(kind, directory)
        self._read: tuple[object, T | None] = None, None

    @property
    def is_new(self) -> bool:
        """Whether another one is there than was read last."""
        return store.identity(self.path) != self._read[0]

    @property
    def last(self) -> T | None:
        """What was read last."""
        return self._read[1]

    def read(self) -> T | None:
        """What it says; None where there is none. Raises StoreError."""
        which = store.identity(self.path)
        if which != self._read[0]:
            found = store.read_as(self._kind, self.path, MAX_BYTES)
            if found is not None and found.format != FORMAT:
                raise StoreError(f"{self.path} is of another version of the agent")
            self._read = which, found
        return self._read[1]


def path_of(kind: type[Wanted | Seen], directory: Path) -> Path:
    """Where it is."""
    return directory / f"limits-{kind.__name__.lower()}"


def write(directory: Path, said: Wanted | Seen) -> None:
    """Replaces the file. Raises StoreError."""
    store.write(path_of(type(said), directory), asdict(said))
