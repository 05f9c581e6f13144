"""The node before the MPS daemons and after them, as far as none of them is concerned alone.

`vgpu-agent mps prepare` runs to its end before they start, as often as need be. `mps restore` runs
when they have ended for good.
"""

import logging
import os
import signal
import stat
import time
from contextlib import suppress
from pathlib import Path

from vgpu_agent.errors import MpsSetupError
from vgpu_agent.mps import trees
from vgpu_agent.mps.directories import Directories
from vgpu_agent.mps.programs import hold

log = logging.getLogger(__name__)

END_SECONDS = 45.0
"""How long `restore` waits for the daemons to end: they take up to 35 seconds."""

REMOVE_SECONDS = 5.0
"""How long what clients have left may take to remove."""


def prepare(directories: Directories) -> None:
    """Makes the directories that all daemons share. Raises MpsSetupError.

    The shared memory is emptied, or replaced: with the daemons all their clients have ended. What
    was in the way is not looked into before it is renamed.
    """
    with trees.made(directories.root, 0o755):
        os.close(hold(directories.restore))
    _warn_of_closed_parents(directories.root)
    if directories.shm is not None and directories.shared is not None:
        with trees.made(directories.shm, 0o755) as parent:
            trees.renew(directories.shared, 0o1777, parent)


def _warn_of_closed_parents(directory: Path) -> None:
    """Servers run as their clients' users, and need their way to the pipe directory."""
    for parent in directory.parents:
        with suppress(OSError):
            if not stat.S_IMODE(parent.stat().st_mode) & stat.S_IXOTH:
                log.warning(
                    "%s keeps other users out, so MPS serves only root's processes: run"
                    " `chmod o+x %s` on the node, or set VGPU_MPS_DIRECTORY to another directory",
                    parent,
                    parent,
                )


def wait_for_end(directories: Directories) -> None:
    """Returns after SIGTERM, which must be blocked, once no daemon of this node runs.

    Meanwhile no other MPS pod of this node is prepared. Raises MpsSetupError.
    """
    hold(directories.restore)  # until this process ends
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
    until = time.monotonic() + END_SECONDS
    for lock in (directories.daemons, directories.watch):
        while True:
            try:
                hold(lock)
                break
            except MpsSetupError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.2)


def remove(directories: Directories) -> None:
    """Removes all that daemons and clients had; what cannot be removed is logged.

    What others have put there stays, and so does a directory that is mounted here: it is empty.
    """
    until = time.monotonic() + REMOVE_SECONDS
    left = _remove_from(directories.shm, until, directories.shared)
    root = directories.root
    with suppress(OSError):
        daemons = [path for path in root.iterdir() if path.is_dir() and _is_daemon(path)]
        left += _remove_from(root, until, *daemons)
    files = [directories.state, directories.division, directories.compute_modes]
    locks = [directories.watch, directories.daemons, directories.restore]
    left += _remove_from(root, until, *files, *locks)
    if left:
        log.warning("%d entries in %s and %s could not be removed", left, root, directories.shm)


def _is_daemon(directory: Path) -> bool:
    return any(path.name.partition(trees.ASIDE)[0] == "pipe" for path in directory.iterdir())


def _remove_from(parent: Path | None, until: float, *paths: Path | None) -> int:
    """Removes these, what they have replaced and what half-written files left, then `parent`."""
    if parent is None or not parent.is_dir() or parent.is_symlink():
        return 0
    left = 0
    with trees.made(parent, 0o755) as descriptor:
        for name in os.listdir(descriptor):  # noqa: PTH208 - of this directory, whatever its path
            owner = name.partition(trees.ASIDE)[0].removeprefix(".").removesuffix(".new")
            if any(path is not None and owner == path.name for path in paths):
                left += trees.remove(name, descriptor, until)
    with suppress(OSError):
        parent.rmdir()
    return left
