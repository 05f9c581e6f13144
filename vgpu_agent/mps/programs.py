"""NVIDIA's programs of MPS, and the locks by which ours keep out of each other's way."""

import fcntl
import os
import stat
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from vgpu_agent.errors import MpsSetupError
from vgpu_agent.model.advice import NVIDIA_RUNTIME
from vgpu_agent.mps.directories import DaemonDirectories

CONTROL = "nvidia-cuda-mps-control"
"""The control daemon, and what asks one."""

SERVER = "nvidia-cuda-mps-server"


def cannot_run(program: str, why: object) -> str:
    """Says so, and what to do."""
    return (
        f"{program} cannot be run ({why}): the NVIDIA driver brings it; install the driver on the"
        f" node, and for it to come into this container {NVIDIA_RUNTIME} (outside of the chart also"
        " set NVIDIA_DRIVER_CAPABILITIES=compute,utility)"
    )


def to_ask(directories: DaemonDirectories) -> Mapping[str, str]:
    """The environment in which the control program asks this daemon and no other.

    In place of a socket clients may put a link to that of another daemon, which would then be given
    limits or ended. So the sockets get names where no client is; what is no socket gets none, and
    the program says that there is no daemon. Raises OSError.
    """
    directories.asking.mkdir(mode=0o700, exist_ok=True)
    for name in ("control", "control_privileged"):
        asked = directories.asking / name
        asked.unlink(missing_ok=True)
        with suppress(FileNotFoundError, PermissionError):
            os.link(directories.pipe / name, asked, follow_symlinks=False)
            if not stat.S_ISSOCK(asked.lstat().st_mode):
                asked.unlink()
    return {**os.environ, **directories.environment(directories.asking)}


def open_lock(lock: Path) -> int:
    """A descriptor of a file to lock, which is made where it is missing. Raises OSError."""
    return os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


def locked(descriptor: int) -> bool:
    """Whether the file could be locked, until the descriptor is closed."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def hold(lock: Path) -> int:
    """A descriptor that has the lock, until it is closed. Raises MpsSetupError."""
    try:
        descriptor = open_lock(lock)
    except OSError as error:
        raise MpsSetupError(
            f"{lock} cannot be opened ({error.strerror}): `vgpu-agent mps prepare` makes its"
            " directory; mount it from the host, writable, and run this container as root"
        ) from error
    if not locked(descriptor):
        os.close(descriptor)
        raise MpsSetupError(
            f"another process holds {lock}: a node has one MPS pod; remove the second one, or wait"
            " for the old one to end"
        )
    return descriptor
