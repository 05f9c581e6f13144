"""`vgpu-agent mps daemon`: becomes a shell that keeps the daemons of a node running."""

import logging
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from vgpu_agent.mps import processes, trees
from vgpu_agent.mps.directories import Directories
from vgpu_agent.mps.processes import Process
from vgpu_agent.mps.programs import SERVER, hold
from vgpu_agent.mps.serve import default_signals, kill, members

log = logging.getLogger(__name__)

SCRIPT = Path(__file__).with_suffix(".sh")

_FORMER = ("pipe", "log")
"""Directories of version 0.2. Clients could write to them: no record in them is ours."""

_LOCK = 9
"""The descriptor of the lock, by which the script knows it."""


def supervise(
    directories: Directories, daemons: Mapping[str, str], options: Sequence[str] = ()
) -> NoReturn:
    """Becomes the script, with the GPUs of each daemon by its name. Raises MpsSetupError.

    What is left of daemons before, also of those that are not to be started again, is ended.
    """
    with trees.made(directories.root, 0o755):
        pass
    os.dup2(hold(directories.daemons), _LOCK, inheritable=True)
    _end_former(directories)
    default_signals()
    with suppress(PermissionError):  # of a session's leader, which has a group of its own
        os.setpgid(0, 0)
    words = [sys.executable, str(directories.root), " ".join(options)]
    pairs = [word for pair in daemons.items() for word in pair]
    os.execv("/bin/sh", ["/bin/sh", str(SCRIPT), *words, *pairs])  # noqa: S606 - it is ours


def _end_former(directories: Directories) -> None:
    """Ends what daemons before have left, which holds GPUs and which no client can reach.

    A server that is none of theirs as far as can be seen is only logged.
    """
    names = [path.name for path in directories.root.iterdir() if path.is_dir()]
    former = [directories.daemon(name) for name in names if name not in _FORMER]
    kill(lambda: [each for daemon in former for each in members(daemon)])
    kill(lambda: [each for each in processes.find_named(SERVER) if _is_ours(each, directories)])
    for server in processes.find_named(SERVER):
        if processes.variable_of(server, "CUDA_MPS_PIPE_DIRECTORY") is None:
            log.warning(
                "MPS server %d does not show whose it is: if no other MPS daemon of this node has"
                " started it, it holds its GPUs; end it on the node with `kill %d`",
                server.pid,
                server.pid,
            )


def _is_ours(server: Process, directories: Directories) -> bool:
    pipe = processes.variable_of(server, "CUDA_MPS_PIPE_DIRECTORY")
    return pipe is not None and Path(pipe).is_relative_to(directories.root)
