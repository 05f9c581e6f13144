"""Unix sockets by their path: who listens there, and one of our own that is never a stranger's."""

import errno
import os
import socket
import stat
from pathlib import Path
from typing import NamedTuple

MAX_PATH = 107
"""Longest path of a unix socket in bytes (`sockaddr_un.sun_path` less the final zero)."""


class Identity(NamedTuple):
    """Which socket a path is. An inode alone is not enough: file systems use them again at once."""

    device: int
    inode: int
    ctime_ns: int

    @classmethod
    def of(cls, found: os.stat_result) -> "Identity":
        """From what `stat` says."""
        return cls(found.st_dev, found.st_ino, found.st_ctime_ns)


def refusal(path: Path) -> str | None:
    """None where a process accepts connections there, else why not; a stale socket refuses them."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        try:
            code = probe.connect_ex(str(path))
        except OSError as error:  # a path too long for an address is no code
            return str(error)
    # EAGAIN: its queue is full; EPROTOTYPE: it is of another kind. Both live.
    return None if code in (0, errno.EAGAIN, errno.EPROTOTYPE) else os.strerror(code)


def obstacle(path: Path) -> str | None:
    """Why a socket cannot be bound there, in words; None where it can, a stale one being removed.

    Never removes anything but a stale socket. Raises OSError where it cannot look, or remove.
    """
    try:
        found = path.lstat()
    except FileNotFoundError:
        return None
    if not stat.S_ISSOCK(found.st_mode):
        kind = "a directory" if stat.S_ISDIR(found.st_mode) else "a file that is no socket"
        return f"{path} is {kind}; remove it"
    why = refusal(path)
    if why is None:
        return f"another process serves {path}"
    if why != os.strerror(errno.ECONNREFUSED):
        return f"whether {path} is served is unknown: {why}"
    path.unlink(missing_ok=True)
    return None


def bind(path: Path) -> socket.socket:
    """A socket at that path that only its owner can connect to, and nobody before; not listening.

    Raises OSError.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        listener.bind(str(path))
        path.chmod(0o600)
    except BaseException:
        listener.close()
        raise
    return listener
