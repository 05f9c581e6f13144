"""Directories that others can write to: made, replaced and removed, whatever they left in them.

Clients may be root, though without capabilities, and so own what is root's: in a directory that is
mounted into their containers they change modes, make files of any kind, links and thousands of
directories in each other, also while we work. So every step starts from the descriptor of a parent
that no client sees, names one entry, and follows no link.
"""

import logging
import os
import random
import secrets
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from vgpu_agent.errors import MpsSetupError
from vgpu_agent.store import closing

log = logging.getLogger(__name__)

ASIDE = ".old-"
"""Stands in the name of a directory that was replaced, between its old name and some letters."""

_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC

_PENDING = 10_000
"""Directories that wait for being emptied; more are found again later."""


@contextmanager
def made(shown: Path, mode: int, parent: int | None = None) -> Iterator[int]:
    """A descriptor of a directory of ours with that mode, which is made where it is missing.

    It is looked for by its name in `parent`, otherwise by its path. Raises MpsSetupError.
    """
    name = shown if parent is None else shown.name
    try:
        if parent is None:
            shown.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            os.mkdir(name, 0o700, dir_fd=parent)
        descriptor = os.open(name, _FLAGS, dir_fd=parent)
    except OSError as error:
        raise MpsSetupError(
            f"{shown} cannot be made a directory ({error.strerror}): remove what is there and is no"
            " directory, and mount its parent from the host, with room and writable, into this"
            " container"
        ) from error
    try:
        _finish(descriptor, shown, mode)
        yield descriptor
    finally:
        os.close(descriptor)


def renew(
    shown: Path, mode: int, parent: int, *, ours: Sequence[str] = (), fresh: bool = False
) -> None:
    """A directory for clients in `parent`, with that mode and nothing in it. Raises MpsSetupError.

    One that is as it should be once the files `ours` are removed is kept, for the containers that
    have it, unless it is to be `fresh`. Any other is renamed, which neither its owner nor its mode
    can prevent, and a new one takes its place.
    """
    name = shown.name
    if fresh or not _in_order(name, mode, parent, ours):
        try:
            aside = f"{name}{ASIDE}{secrets.token_hex(8)}"
            os.rename(name, aside, src_dir_fd=parent, dst_dir_fd=parent)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise MpsSetupError(
                f"{shown} cannot be replaced ({error.strerror}): see that its file system is"
                " writable, and that nothing is mounted there"
            ) from error
    remove_replaced(shown, parent)
    with made(shown, mode, parent):
        pass


def _in_order(name: str, mode: int, parent: int, ours: Sequence[str]) -> bool:
    """Whether a directory is ours, has that mode and no more rights, and is now empty."""
    try:
        with closing(os.open(name, _FLAGS, dir_fd=parent)) as descriptor:
            for each in ours:
                with suppress(FileNotFoundError):
                    os.unlink(each, dir_fd=descriptor)
            found = os.fstat(descriptor)
            expected = (os.geteuid(), os.getegid(), mode)
            # Access control lists would be inherited by the daemon's sockets.
            attributes = {each for each in os.listxattr(descriptor) if each != _LABEL}
            with os.scandir(descriptor) as entries:
                empty = next(entries, None) is None
    except OSError:
        return False
    right = (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == expected
    return right and empty and not attributes


def remove_replaced(shown: Path, parent: int, seconds: float = 3.0) -> None:
    """Removes what was in the place of a directory before, as far as that goes in that time.

    The rest is for the next time. It does not pile up: only containers that have such a directory
    can keep it from being removed, and each has one.
    """
    left, until = 0, time.monotonic() + seconds
    try:
        names = [each for each in os.listdir(parent) if each.startswith(f"{shown.name}{ASIDE}")]
    except OSError:
        return
    random.shuffle(names)  # one that takes all the time is not always the first
    for name in names:
        left += remove(name, parent, until)
    if left:
        log.warning(
            "%d entries of directories that %s has replaced cannot be removed now; that is tried"
            " again at the next start",
            left,
            shown,
        )


def remove(name: str, parent: int, until: float) -> int:
    """Removes an entry of `parent` with all that is in it; how much of it is left, roughly.

    Ends at that time of the monotonic clock. Enters no other file system, passes over what cannot
    be removed, and keeps two descriptors and some names, however deep and wide the tree is.
    """
    if _removed(os.unlink, name, parent):
        return 0
    device = os.fstat(parent).st_dev
    top = _enter(name, parent, device)
    if top is None:
        return 1
    removed, left = 1, 1
    try:
        with closing(top):
            while removed and left and time.monotonic() < until:
                removed, left = _sweep(top, device, until)
    except OSError:
        left = 1
    if not left and _removed(os.rmdir, name, parent):
        return 0
    return max(left, 1)


def _sweep(top: int, device: int, until: float) -> tuple[int, int]:
    """Removes what is in a directory, once: how much could be removed, and how much not."""
    removed = left = 0
    with os.scandir(top) as entries:
        for entry in entries:
            pending = [entry.name]
            while pending:
                if time.monotonic() > until:
                    return removed, left + len(pending)
                name = pending.pop()
                if _removed(os.unlink, name, top) or _empty(name, top, device, pending, until):
                    removed += 1
                else:
                    left += 1
    return removed, left


def _empty(name: str, top: int, device: int, pending: list[str], until: float) -> bool:
    """Whether a directory in `top` could be removed.

    Directories in it are moved up into `top` first, and are pending there: depth costs nothing.
    """
    descriptor = _enter(name, top, device)
    if descriptor is None:
        return False
    try:
        with closing(descriptor), os.scandir(descriptor) as entries:
            for entry in entries:
                if time.monotonic() > until:
                    return False
                if not _removed(os.unlink, entry.name, descriptor) and len(pending) < _PENDING:
                    moved = secrets.token_hex(8)
                    with suppress(OSError):
                        os.rename(entry.name, moved, src_dir_fd=descriptor, dst_dir_fd=top)
                        pending.append(moved)
    except OSError:
        return False
    return _removed(os.rmdir, name, top)


def _enter(name: str, parent: int, device: int) -> int | None:
    """A descriptor of a directory on that device that can be read and emptied, if we may."""
    flags = os.O_PATH | _FLAGS
    with suppress(OSError), closing(os.open(name, flags, dir_fd=parent)) as found:
        what = os.fstat(found)
        if what.st_dev == device:
            if stat.S_IMODE(what.st_mode) & 0o700 != 0o700:
                with suppress(OSError):
                    Path(f"/proc/self/fd/{found}").chmod(0o700)  # not by its name
            return os.open(".", _FLAGS, dir_fd=found)
    return None


def _removed(how: Callable[..., None], name: str, parent: int) -> bool:
    """Whether it is not there any more."""
    try:
        how(name, dir_fd=parent)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True


# Owner, mode and label

_LABEL = "security.selinux"
_CONTAINER_FILE = "container_file_t"


def _finish(descriptor: int, shown: Path, mode: int) -> None:
    """Gives a directory of ours its mode and its label. Raises MpsSetupError."""
    found = os.fstat(descriptor)
    if found.st_uid != os.geteuid():
        raise MpsSetupError(
            f"{shown} belongs to user {found.st_uid}, who could replace what is in it: remove it,"
            " or choose another directory"
        )
    try:
        if found.st_gid != os.getegid():
            os.fchown(descriptor, -1, os.getegid())
        if stat.S_IMODE(found.st_mode) != mode:
            os.fchmod(descriptor, mode)
    except OSError as error:
        raise MpsSetupError(
            f"group and mode {mode:o} of {shown} cannot be set ({error.strerror}): run this"
            " container as root, and mount the directory writable"
        ) from error
    _label(descriptor, shown)


def _label(descriptor: int, shown: Path) -> None:
    """Lets containers use a directory where the node has SELinux; without it there is no label."""
    try:
        label = os.getxattr(descriptor, _LABEL)
    except OSError:
        return
    # user:role:type:level, where the level may hold colons and the end a zero byte
    parts = label.rstrip(b"\0").decode(errors="replace").split(":", 3)
    if len(parts) < 3 or parts[2] == _CONTAINER_FILE:
        return
    parts[2] = _CONTAINER_FILE
    try:
        os.setxattr(descriptor, _LABEL, ":".join(parts).encode() + b"\0")
    except OSError as error:
        log.warning(
            "%s cannot be given the SELinux type %s (%s): containers may be refused; on the node,"
            " run `chcon -t %s %s`",
            shown,
            _CONTAINER_FILE,
            error.strerror,
            _CONTAINER_FILE,
            shown,
        )
