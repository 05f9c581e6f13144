"""One MPS daemon, from its directories to its end; the settings and NVML are not needed for it.

`supervise.sh` runs this for every daemon, as a program:

    serve.py start DIRECTORY NAME GPUS [OPTION...]   becomes the daemon, once all is ready for it
    serve.py end DIRECTORY NAME                      ends it in order

`start` also takes --fresh, for a pipe directory that no running container has. Whatever the daemon
before has left is ended or removed. A daemon begins a session, in which its servers stay: that, and
when it began, is what they are known by, in a file that no client sees.
"""

import logging
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

import anyio

from vgpu_agent import store
from vgpu_agent.errors import MpsError, MpsSetupError, StoreError
from vgpu_agent.mps import processes, trees
from vgpu_agent.mps.control import Control
from vgpu_agent.mps.directories import PIPE_MODE, DaemonDirectories, Directories
from vgpu_agent.mps.processes import Process
from vgpu_agent.mps.programs import CONTROL, SERVER, cannot_run

log = logging.getLogger(__name__)

SOCKETS = ("control", "control_lock", "control_privileged", "log", f"{CONTROL}.pid")
"""What a daemon makes in its pipe directory (seen of 535, 550 and 555)."""

QUIT_SECONDS = 20
"""How long clients may go on when a daemon ends in order."""

BUSY_SECONDS = 5.0
"""How long others may hold the daemon's one control connection before it is ended without."""

KILL_SECONDS = 2.0
"""What processes have after SIGTERM, and again after SIGKILL."""


# Starting


def start(
    directories: DaemonDirectories, gpus: str, options: Sequence[str] = (), *, fresh: bool = False
) -> NoReturn:
    """Makes this process the daemon, which sees only these GPUs. Raises MpsError and StoreError."""
    binary = shutil.which(CONTROL)
    if binary is None:
        raise MpsSetupError(cannot_run(CONTROL, "it is not there"))
    with (
        trees.made(directories.root.parent, 0o755) as parent,
        trees.made(directories.root, 0o755, parent) as root,
    ):
        left = kill(lambda: members(directories))
        if left:
            raise MpsSetupError(
                f"{_named(left)} of the MPS daemon {directories.name} cannot be killed: a call to"
                " the driver hangs; drain and reboot the node"
            )
        trees.renew(directories.pipe, PIPE_MODE, root, ours=SOCKETS, fresh=fresh)
        with trees.made(directories.log, 0o700, root) as logs:
            output = os.open(
                directories.control_log.name,
                # Of a pipe nobody would read: an error then, and no wait.
                os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK,
                0o600,
                dir_fd=logs,
            )
    # Its servers are distinguished from those of others by its session, also when it is gone.
    os.setsid()
    _write(directories, processes.find(os.getpid()))
    default_signals()
    for standard in (1, 2):
        os.dup2(output, standard)
    os.execve(binary, [CONTROL, "-f", *options], _environment(directories, gpus))  # noqa: S606


def _environment(directories: DaemonDirectories, gpus: str) -> Mapping[str, str]:
    """Limits name GPUs by their ordinals among these, in the order of the bus."""
    order = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": gpus}
    return {**os.environ, **directories.environment(), **order}


def default_signals() -> None:
    """Undoes what Python and shells ignore, which exec would hand on."""
    for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)


# Which processes a daemon is


@dataclass(frozen=True, slots=True)
class _Written:
    """The process of a daemon, in which boot of the node."""

    boot_id: str
    pid: int
    started: float


def _write(directories: DaemonDirectories, process: Process | None) -> None:
    if process is not None:
        found = _Written(store.boot_id(), process.pid, process.started)
        store.write(directories.process, asdict(found), mode=0o600)


def daemon_process(directories: DaemonDirectories) -> Process | None:
    """The process of the daemon that was started last, whether it lives or not."""
    try:
        found, boot_id = store.read_as(_Written, directories.process), store.boot_id()
    except StoreError as error:
        log.warning("%s: servers of a daemon before are not known", error)
        return None
    if found is None or found.boot_id != boot_id:
        return None
    return Process(found.pid, found.started)


def members(directories: DaemonDirectories) -> list[Process]:
    """What lives of that daemon: itself, and its servers.

    A dead daemon's PID is given to no other process while a server is in its session. So where
    there is one with that PID, it is the daemon, or all of its session are gone.
    """
    daemon = daemon_process(directories)
    if daemon is None:
        return []
    found = processes.find(daemon.pid)
    if found not in (None, daemon):
        return []
    servers = [
        each
        for each in processes.find_named(SERVER)
        if each.started >= daemon.started and processes.session_of(each) == daemon.pid
    ]
    return servers if found is None else [daemon, *servers]


def lives(directories: DaemonDirectories) -> bool:
    """Whether the daemon that was started last does."""
    daemon = daemon_process(directories)
    return daemon is not None and processes.find(daemon.pid) == daemon


# Ending


def end(directories: DaemonDirectories, binary: str = CONTROL) -> list[Process]:
    """Ends a daemon and its servers, in order where it can be asked; what could not be ended.

    Takes at most 35 seconds.
    """
    until = time.monotonic() + BUSY_SECONDS
    while lives(directories) and time.monotonic() < until:
        _quit(directories, binary)
        _wait(lambda: not lives(directories), 0.5)
    left = members(directories)
    if left:
        log.warning("%s: %s did not end in order", directories.name, _named(left))
    return kill(lambda: members(directories))


def _quit(directories: DaemonDirectories, binary: str) -> None:
    """Asks the daemon to end. What is said is of no use: a busy daemon may say nothing too."""
    control = Control(directories, binary=binary, timeout=QUIT_SECONDS + 2)
    with suppress(MpsError):
        anyio.run(control.ask, f"quit -t {QUIT_SECONDS}")


def kill(find: Callable[[], list[Process]]) -> list[Process]:
    """SIGTERM for what is found, SIGKILL for what is still found after a while; what is left."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        for process in find():
            log.warning("%s is ended by %s", _named([process]), number.name)
            try:
                processes.send(process, number)
            except PermissionError:
                log.warning("%s may not be ended by this container", _named([process]))
        if _wait(lambda: not find(), KILL_SECONDS):
            return []
    return find()


def _named(found: Sequence[Process]) -> str:
    return f"process {', '.join(str(each.pid) for each in found)}"


def _wait(check: Callable[[], bool], seconds: float) -> bool:
    """Whether it came true in that time."""
    until = time.monotonic() + seconds
    while not check():
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True


def main(what: str, directory: str, name: str, *rest: str) -> None:
    """See the head of this module."""
    logging.basicConfig(level="INFO", format=f"MPS daemon {name}: %(message)s")
    directories = Directories(Path(directory)).daemon(name)
    try:
        if what == "start":
            gpus, *options = [each for each in rest if each != "--fresh"]
            start(directories, gpus, options, fresh="--fresh" in rest)
        elif end(directories):
            sys.exit(1)
    except (MpsError, StoreError, OSError) as error:
        log.error("%s", error)  # noqa: TRY400 - no traceback of what is expected
        sys.exit(1)


if __name__ == "__main__":
    main(*sys.argv[1:])
