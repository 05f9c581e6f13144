"""Unix sockets by their path: who listens there, and one of our own that is never a stranger's."""

import errno
import os
import socket
import stat
import struct
from pathlib import Path
from typing import NamedTuple

MAX_PATH = 107
"""Longest path of a unix socket in bytes (`sockaddr_un.sun_path` less the final zero)."""

MAX_NAMED = 5
"""So many listeners are named."""


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
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
            code = probe.connect_ex(str(path))
    except OSError as error:  # no descriptor, or a path too long for an address, is no code
        return error.strerror or str(error)
    # EAGAIN: its queue is full; EPROTOTYPE: it is of another kind. Both live.
    return None if code in (0, errno.EAGAIN, errno.EPROTOTYPE) else os.strerror(code)


def listener_pid(path: Path) -> int | None:
    """The process that listens on a unix socket; None where it cannot be seen from here.

    Does not wait: of one whose queue is full it is not seen.
    """
    credentials = struct.Struct("3i")
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
            probe.connect(str(path))
            raw = probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, credentials.size)
    except OSError:
        return None
    pid: int = credentials.unpack(raw)[0]
    return pid or None  # 0: of another PID namespace


def listener(path: Path, proc: Path = Path("/proc")) -> str:
    """Who listens there, for people: the socket's name, and the process where it can be seen."""
    pid = listener_pid(path)
    if pid is None:
        return path.name
    try:
        program = (proc / str(pid) / "comm").read_text(errors="replace").strip()
    except OSError:
        program = ""
    return f"{path.name} (process {pid}{f', {program}' if program else ''})"


def listeners(directory: Path, *but: str) -> tuple[str, ...]:
    """Who listens on the sockets of a directory, but for those names: the newest socket first."""
    found = []
    try:
        for path in directory.iterdir():
            status = path.lstat()
            if path.name not in but and stat.S_ISSOCK(status.st_mode) and refusal(path) is None:
                found.append((-status.st_ctime_ns, path))
    except OSError:
        return ()
    return tuple(listener(path) for _, path in sorted(found)[:MAX_NAMED])


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
