"""What is known of the MPS daemons: a small file that `mps watch` writes and the agent reads.

It speaks of daemons by their directories; each is known by the identity of its control socket: a
new daemon needs new words, while a watcher that has died changes nothing.
"""

import fcntl
import os
import stat
import struct
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import get_type_hints

from vgpu_agent import store
from vgpu_agent.errors import StoreError
from vgpu_agent.model.facts import DaemonLook
from vgpu_agent.model.rules import DIVISION, MAX_REPLICAS, MpsLimits, SharingRules
from vgpu_agent.mps.directories import PIPE_MODE
from vgpu_agent.mps.log import Seen

FORMAT = 3


@dataclass(frozen=True, slots=True)
class Watched:
    """A daemon as `mps watch` knows it: for the agent, and for the watcher after this one.

    `set_to` are the defaults that were set, in words, and `set_at` when, in seconds since the boot:
    servers from then on have them.
    """

    look: DaemonLook = DaemonLook()
    set_to: str = ""
    set_at: float = 0.0
    log: Seen = Seen()


@dataclass(frozen=True, slots=True)
class State:
    """All daemons of the node by name, what they were set up for, and by which version.

    `beat` says when it was written, in seconds since the boot.
    """

    version: str
    limits: MpsLimits
    beat: float
    daemons: Mapping[str, Watched] = field(default_factory=dict)


def as_data(state: State) -> Mapping[str, object]:
    """As it is written."""
    return {"format": FORMAT, **asdict(state)}


def read(path: Path) -> State | None:
    """The file, or None where there is none. Raises StoreError where it makes no sense."""
    hint = ": drain the node and delete its MPS pod"
    state = store.read_as(State, path, form=FORMAT, hint=hint)
    looks = () if state is None else (each.look for each in state.daemons.values())
    for gpu in (gpu for look in looks for gpu in look.gpus):
        if not 1 <= gpu.replicas <= MAX_REPLICAS:
            raise StoreError(f"{path} is damaged: it has a GPU of {gpu.replicas} vGPUs")
    return state


def division(rules: SharingRules) -> Mapping[str, object]:
    """How the agent divides the GPUs, as it is written."""
    said = {name: getattr(rules, name) for name in DIVISION}
    return {**said, "replicas_by_gpu": dict(rules.replicas_by_gpu)}  # JSON knows no other mapping


def with_division(path: Path, rules: SharingRules) -> SharingRules:
    """These rules, with GPUs divided as the agent says, once it has. Raises StoreError."""
    found = store.read(path)
    if found is None:
        return rules
    hints = get_type_hints(SharingRules)
    try:
        said = {name: store.decoded(hints[name], found[name], name) for name in DIVISION}
    except (ValueError, KeyError) as error:
        raise StoreError(f"{path} is of another version, or damaged: {error}") from error
    return replace(rules, **said)


def generation_of(pipe_directory: Path) -> str | None:
    """Which daemon serves that directory, by its control socket; None where there is none.

    Every daemon makes a new socket, and both pods see the same file. An inode alone is not
    enough: file systems use them again at once. A daemon holds a lock (`fcntl`) as long as it
    lives, which every container sees, whatever its PIDs: a socket without it is left behind.
    """
    try:
        _open_to_all(pipe_directory)
        found = (pipe_directory / "control").stat(follow_symlinks=False)
    except OSError:
        return None
    if _free(pipe_directory / "control_lock"):
        return None
    # Not when it was changed last: it gets other names (`programs.to_ask`).
    return f"{found.st_dev}:{found.st_ino}:{found.st_mtime_ns}"


def absence(pipe_directory: Path) -> str:
    """Says that no daemon is seen there, and what is to be done where one lives all the same."""
    lock = pipe_directory / "control_lock"
    try:
        owner = pipe_directory.stat().st_uid
        if owner != os.geteuid():
            why = f"which a client has given to user {owner}"
        elif lock.exists() and not _free(lock):
            why = "where a client has removed the socket of the one that lives"
        else:
            why = ""
    except OSError:
        why = ""
    restart = f"run `vgpu-agent mps restart {pipe_directory.parent.name}` in the MPS pod"
    return f"no MPS daemon serves {pipe_directory}" + (f", {why}: {restart}" if why else "")


def _open_to_all(directory: Path) -> None:
    """Sets the mode of a pipe directory back, which clients of its owner's UID can change.

    As the owner: who has no capability could not look into it otherwise. Its name is in a
    directory that no client sees. Raises OSError.
    """
    if stat.S_IMODE(directory.stat().st_mode) != PIPE_MODE:
        with suppress(OSError):
            directory.chmod(PIPE_MODE)


_FLOCK = "hhqqi4x"
"""`struct flock`: type, whence, start, length, PID."""


def _free(lock: Path) -> bool:
    """Whether nobody holds that lock; not where there is none to look at."""
    with suppress(OSError):
        descriptor = store.open_regular(lock, os.O_RDONLY | os.O_NOFOLLOW)
        if descriptor is not None:
            with store.closing(descriptor):
                ask = struct.pack(_FLOCK, fcntl.F_RDLCK, os.SEEK_SET, 0, 0, 0)
                answer = fcntl.fcntl(descriptor, fcntl.F_GETLK, ask)
            return bool(struct.unpack(_FLOCK, answer)[0] == fcntl.F_UNLCK)
    return False
