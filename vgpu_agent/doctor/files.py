"""Small questions about files and sockets."""

import errno
import os
import socket
import stat
import struct
from pathlib import Path


def described(path: Path, found: os.stat_result, label: str | None) -> str:
    """A directory in words: owner, mode, whether this process may write there, its label."""
    words = [
        f"owner {found.st_uid}:{found.st_gid}",
        f"mode {stat.S_IMODE(found.st_mode):04o}",
        "writable" if writable(path) else "not writable from here",
    ]
    if label is not None:
        words.append(f"SELinux {label}")
    return f"{path} ({', '.join(words)})"


def writable(path: Path) -> bool:
    """Whether this process can make files in a directory."""
    return os.access(path, os.W_OK | os.X_OK)


def selinux_label(path: Path) -> str | None:
    """The label of a file; None where it has none."""
    try:
        return os.getxattr(path, "security.selinux").rstrip(b"\0").decode()
    except (OSError, UnicodeDecodeError):
        return None


def connects(path: Path) -> str | None:
    """None where a process listens on a unix socket, else why not."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        try:
            code = probe.connect_ex(str(path))
        except OSError as error:  # a path too long for an address is no code
            return str(error)
    # EAGAIN: its queue is full; EPROTOTYPE: it is of another kind. Both live.
    return None if code in (0, errno.EAGAIN, errno.EPROTOTYPE) else os.strerror(code)


def listener_pid(path: Path) -> int | None:
    """The process that listens on a unix socket; None where it cannot be told from here."""
    credentials = struct.Struct("3i")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1)
        try:
            probe.connect(str(path))
            raw = probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, credentials.size)
        except OSError:
            return None
    pid: int = credentials.unpack(raw)[0]
    return pid or None  # 0: of another PID namespace
