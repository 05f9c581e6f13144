"""Where MPS lives on a node: what all daemons share, and what each has of its own."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from vgpu_agent.model.rules import SHARED

PIPE_MODE = 0o755
"""Of a pipe directory: clients of every user pass through it."""


@dataclass(frozen=True, slots=True)
class DaemonDirectories:
    """The directories of one daemon: `root`, root's alone to write to, is never shown to clients.

    Clients reach the daemon through `pipe`. Its output and its servers' logs are in `log`, and
    `process` says which process it is.
    """

    name: str
    root: Path

    @property
    def pipe(self) -> Path:
        """Where its sockets are. Clients have it writable: nothing of ours is in it."""
        return self.root / "pipe"

    @property
    def log(self) -> Path:
        """Names the processes of all tenants, so it is root's."""
        return self.root / "log"

    @property
    def control_log(self) -> Path:
        """What the daemon says; `-f` makes it write to its standard output."""
        return self.log / "control.log"

    @property
    def process(self) -> Path:
        """See above."""
        return self.root / "process"

    @property
    def lock(self) -> Path:
        """Is held (`flock`) by whoever asks the daemon: it takes one connection at a time."""
        return self.root / "lock"

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

    def daemon(self, name: str) -> DaemonDirectories:
        """Those of the daemon of that name (`SharingRules.daemon_of`)."""
        return DaemonDirectories(name, self.root / name)

    @property
    def shared(self) -> Path | None:
        """What containers have as their /dev/shm, and daemons too."""
        return self.shm and self.shm / SHARED

    @property
    def state(self) -> Path:
        """See above."""
        return self.root / "state"

    @property
    def division(self) -> Path:
        """See above."""
        return self.root / "division"

    @property
    def watch(self) -> Path:
        """See above."""
        return self.root / "watch"

    @property
    def daemons(self) -> Path:
        """See above."""
        return self.root / "daemons"

    @property
    def restore(self) -> Path:
        """See above."""
        return self.root / "restore"

    @property
    def compute_modes(self) -> Path:
        """See above."""
        return self.root / "compute-modes"
