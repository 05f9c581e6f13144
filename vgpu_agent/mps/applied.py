"""What the MPS daemon was told, as a small file that the MPS pod writes and the agent reads.

`vgpu-agent mps watch` writes it after it has read the daemon's limits back; the agent serves what
it says. It speaks of one daemon, told by the identity of its control socket: a new daemon needs a
new file, while a watcher that has died changes nothing.
"""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from vgpu_agent.errors import AppliedStateError
from vgpu_agent.model.share import MpsLimits

FORMAT = 1


@dataclass(frozen=True, slots=True)
class AppliedCard:
    """A card as the daemon knows it. `ordinal` is its CUDA number there.

    `memory_limit_bytes` is the daemon's default limit of pinned memory for one client; None is no
    limit. `server_bytes` is what the daemon's server has of the card itself, None until one ran.
    """

    uuid: str
    ordinal: int
    replicas: int
    memory_limit_bytes: int | None
    server_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Applied:
    """What holds for one daemon.

    `generation` names the daemon. `thread_percentage` is its default for one client, None for 100.
    `problem` says why the limits are not in force; None: they were read back right, and every
    running server is younger than they are. `version` is that of the writer.
    """

    generation: str
    limits: MpsLimits
    thread_percentage: int | None
    cards: tuple[AppliedCard, ...]
    problem: str | None
    version: str


def generation_of(pipe_directory: Path) -> str | None:
    """Which daemon serves that directory, by its control socket; None where there is none.

    The socket is made anew by every daemon, and both pods see the same file. An inode alone is not
    enough: file systems use them again at once.
    """
    try:
        found = (pipe_directory / "control").stat()
    except OSError:
        return None
    return f"{found.st_dev}:{found.st_ino}:{found.st_ctime_ns}"


def write(path: Path, applied: Applied) -> None:
    """Replaces the file as a whole. Raises OSError."""
    new = path.with_name(f".{path.name}.new")
    with new.open("w") as file:
        json.dump({"format": FORMAT, **asdict(applied)}, file)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)


def read(path: Path) -> Applied | None:
    """The file, or None where there is none. Raises AppliedStateError where it makes no sense."""
    try:
        data = json.loads(path.read_text())
        if data.pop("format") != FORMAT:
            raise AppliedStateError(f"{path} is of another version of the agent")
        cards = tuple(AppliedCard(**card) for card in data.pop("cards"))
        return Applied(**{**data, "limits": MpsLimits(data["limits"]), "cards": cards})
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise AppliedStateError(f"{path} cannot be read: {error!r}") from error
