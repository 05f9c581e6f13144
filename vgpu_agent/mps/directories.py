"""Where MPS lives on a node: what all daemons share, and what each has of its own."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from vgpu_agent.model.rules import SHARED

PIPE_MODE = 0o755
"""Of a pipe directory: clients of every user pass through it."""


class _Named:
    """A path of that name in `root`."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, of: "DaemonDirectories | Directories", _: object = None) -> Path:
        return of.root / self._name


@dataclass(frozen=True, slots=True)
class DaemonDirectories:
    """The directories of one daemon: `root`, root's alone to write to, is never shown to clients.

    Clients reach the daemon through `pipe`, where its sockets are; they have it writable, and
    nothing of ours is in it. `log` names the processes of all tenants, so it is root's; in
    `control_log` is what the daemon says. `process` says which process it is. `lock` is held
    (`flock`) by whoever asks the daemon: it takes one connection at a time.
    """

    name: str
    root: Path

    pipe = _Named("pipe")
    log = _Named("log")
    control_log = _Named("log/control.log")
    process = _Named("process")
    lock = _Named("lock")

    @property
    def asking(self) -> Path:
        """Where its sockets have a second name, for whoever asks it (`programs.to_ask`).

        Its own is no longer than that of `pipe`, which settings leave room for.
        """
        return self.root / "ask"

    def environment(self, pipe: Path | None = None) -> Mapping[str, str]:
        """The variables by which programs of MPS find this daemon."""
        return {
            "CUDA_MPS_PIPE_DIRECTORY": str(pipe or self.pipe),
            "CUDA_MPS_LOG_DIRECTORY": str(self.log),
        }


@dataclass(frozen=True, slots=True)
class Directories:
    """The directories and files of MPS on a node; `shm` holds what clients share.

    `state` is what `mps watch` saw of the daemons, `division` how the agent divides their GPUs.
    `compute_modes` are those that were found before ours. `watch`, `daemons` and `restore` are held
    (`flock`) by the process of that name.
    """

    root: Path
    shm: Path | None = None

    state = _Named("state")
    division = _Named("division")
    compute_modes = _Named("compute-modes")
    watch = _Named("watch")
    daemons = _Named("daemons")
    restore = _Named("restore")

    def daemon(self, name: str) -> DaemonDirectories:
        """Those of the daemon of that name (`SharingRules.daemon_of`)."""
        return DaemonDirectories(name, self.root / name)

    @property
    def shared(self) -> Path | None:
        """What containers have as their /dev/shm, and daemons too."""
        return self.shm and self.shm / SHARED
