"""`vgpu-agent mps prepare`: the node before an MPS daemon.

It runs to its end before the daemon starts, as often as need be, and changes only what is not yet
right.
"""

import logging
import os
import shutil
import signal
import stat
from collections.abc import Iterable
from pathlib import Path

import anyio

from vgpu_agent.errors import MpsDownError, MpsError, MpsSetupError
from vgpu_agent.mps import processes
from vgpu_agent.mps.control import Control
from vgpu_agent.mps.processes import Process

log = logging.getLogger(__name__)

SERVER = "nvidia-cuda-mps-server"

OURS = ".vgpu-agent"
"""Marks a directory of shared memory as made by us, so that it may be emptied."""


async def prepare(control: Control, *, end_seconds: float = 5) -> None:
    """Makes the node ready for a daemon. Raises MpsSetupError.

    What a daemon that is gone has left is removed: its servers, which hold the GPUs and which no
    client can reach, have `end_seconds` to end; what was said of it; and its shared memory, which
    only then no client has. While a daemon answers, or may only be slow, all that is left alone.
    """
    directories = control.directories
    if directories.shm is not None:
        _refuse_foreign(directories.shm)
    for directory, mode in directories.modes().items():
        _make(directory, mode)
    if directories.shm is not None:
        (directories.shm / OURS).touch(mode=0o600)
    try:
        await control.servers()
    except MpsDownError:
        await _end(_orphans(directories.pipe), end_seconds)
        _remove(directories.state)
        if directories.shm is not None:
            _empty(directories.shm)
    except MpsError as error:
        log.warning("the MPS daemon cannot be asked; what is there of it is left alone: %s", error)


# Directories


def _make(directory: Path, mode: int) -> None:
    """A directory of ours with that mode, also where it was there before."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        # By its descriptor, not followed: what a name means could change in between.
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError as error:
        raise MpsSetupError(
            f"{directory} cannot be made a directory ({error.strerror}): remove what is there, and"
            " mount its parent from the host, writable, into this container"
        ) from error
    try:
        found = os.fstat(descriptor)
        if (found.st_uid, found.st_gid) != (os.geteuid(), os.getegid()):
            os.fchown(descriptor, os.geteuid(), os.getegid())
        if stat.S_IMODE(found.st_mode) != mode:
            os.fchmod(descriptor, mode)
        _label(descriptor, directory)
    except OSError as error:
        raise MpsSetupError(
            f"owner and mode {mode:o} of {directory} cannot be set ({error.strerror}): run this"
            " container as root"
        ) from error
    finally:
        os.close(descriptor)


_LABEL = "security.selinux"
_CONTAINER_FILE = "container_file_t"


def _label(descriptor: int, directory: Path) -> None:
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
            directory,
            _CONTAINER_FILE,
            error.strerror,
            _CONTAINER_FILE,
            directory,
        )


def _refuse_foreign(shm: Path) -> None:
    """Shared memory is emptied when no client is left: never what somebody else put there."""
    try:
        names = {path.name for path in shm.iterdir()}
    except OSError:
        return  # not there yet, or no directory, which is reported where it is made
    if names and OURS not in names:
        raise MpsSetupError(
            f"{shm} holds files and was not made by vgpu-agent: it would be opened to every"
            " container and emptied; set VGPU_MPS_SHM_DIRECTORY to a directory of its own"
        )


def _empty(directory: Path) -> None:
    """Removes what is in a directory that every pod may write to; what cannot be is logged."""
    try:
        with os.scandir(directory) as entries:
            for entry in entries:
                if entry.name == OURS:
                    continue
                if entry.is_dir(follow_symlinks=False):
                    shutil.rmtree(entry.path)
                else:
                    Path(entry.path).unlink(missing_ok=True)
    except OSError as error:
        log.warning("%s cannot be emptied: %s", directory, error)


def _remove(file: Path) -> None:
    try:
        file.unlink(missing_ok=True)
    except OSError as error:
        raise MpsSetupError(f"{file} cannot be removed ({error.strerror})") from error


# Orphans


def _orphans(pipe_directory: Path) -> list[Process]:
    """The servers of a daemon of that directory, which is gone.

    Servers of any other daemon are left alone, and one that does not show whose it is, which takes
    capabilities.
    """
    found = []
    for server in processes.find_named(SERVER):
        pipe = processes.variable_of(server, "CUDA_MPS_PIPE_DIRECTORY")
        if pipe is None:
            log.warning(
                "MPS server %d does not show whose it is: if it is left from a daemon of ours, it"
                " holds the GPUs. Install the chart with mps.endOrphans=true, or end it on the"
                " node",
                server.pid,
            )
        elif Path(pipe) == pipe_directory:
            log.warning("MPS server %d has lost its daemon and is ended", server.pid)
            found.append(server)
    return found


async def _end(servers: Iterable[Process], seconds: float) -> None:
    """SIGTERM, and SIGKILL for what is still there after that time."""
    for number, patience in ((signal.SIGTERM, seconds), (signal.SIGKILL, 2.0)):
        servers = [server for server in servers if _signal(server, number)]
        with anyio.move_on_after(patience):
            while any(processes.find(server.pid) == server for server in servers):  # noqa: ASYNC110
                await anyio.sleep(0.05)
            return
    left = ", ".join(str(server.pid) for server in servers)
    raise MpsSetupError(
        f"MPS server {left} has lost its daemon and cannot be killed: a call to the driver hangs;"
        " drain and reboot the node"
    )


def _signal(server: Process, number: signal.Signals) -> bool:
    """Whether the server was still there."""
    if processes.find(server.pid) != server:
        return False
    try:
        os.kill(server.pid, number)
    except ProcessLookupError:
        return False
    except PermissionError as error:
        raise MpsSetupError(
            f"MPS server {server.pid} has lost its daemon and may not be ended: run this container"
            " as root"
        ) from error
    return True
