"""What is in effect at the MPS daemon: a small file that the MPS pod writes and the agent reads.

`vgpu-agent mps watch` writes it after it has read the daemon's limits back; the agent serves what
it says. It speaks of one daemon, known by the identity of its control socket: a new daemon needs a
new file, while a watcher that has died changes nothing.
"""

from dataclasses import asdict
from pathlib import Path

from vgpu_agent import store
from vgpu_agent.errors import StoreError
from vgpu_agent.model.facts import Applied

FORMAT = 2


def generation_of(pipe_directory: Path) -> str | None:
    """Which daemon serves that directory, by its control socket; None where there is none.

    Every daemon makes a new socket, and both pods see the same file. An inode alone is not
    enough: file systems use them again at once.
    """
    try:
        found = (pipe_directory / "control").stat()
    except OSError:
        return None
    return f"{found.st_dev}:{found.st_ino}:{found.st_ctime_ns}"


def write(path: Path, applied: Applied) -> None:
    """Replaces the file as a whole. Raises StoreError."""
    store.write(path, {"format": FORMAT, **asdict(applied)})


def read(path: Path) -> Applied | None:
    """The file, or None where there is none. Raises StoreError where it makes no sense."""
    found = store.read(path)
    if found is None:
        return None
    if found.get("format") != FORMAT:
        raise StoreError(f"{path} is of another version of the agent")
    try:
        applied: Applied = store.decoded(Applied, found, "it")
    except (ValueError, OverflowError) as error:
        raise StoreError(f"{path} is damaged: {error}") from error
    if any(each.replicas < 1 for each in applied.gpus):
        raise StoreError(f"{path} is damaged: it has a GPU of no vGPUs")
    return applied
