"""Where MPS lives on a node."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Directories:
    """The directories and files of MPS. `shm` is None where containers keep their own /dev/shm."""

    root: Path
    shm: Path | None = None

    @property
    def pipe(self) -> Path:
        """What clients reach the daemon through (`CUDA_MPS_PIPE_DIRECTORY`)."""
        return self.root / "pipe"

    @property
    def log(self) -> Path:
        """Logs of the daemon and its servers (`CUDA_MPS_LOG_DIRECTORY`)."""
        return self.root / "log"

    @property
    def state(self) -> Path:
        """What `mps watch` says of the limits; see `applied`."""
        return self.root / "state"

    @property
    def compute_modes(self) -> Path:
        """The compute modes that were found before ours."""
        return self.root / "compute-modes"

    @property
    def watch(self) -> Path:
        """Locked by the one `mps watch`."""
        return self.root / "watch"

    @property
    def watch_memory(self) -> Path:
        """What the last `mps watch` applied, and when."""
        return self.root / "watch.json"

    def modes(self) -> Mapping[Path, int]:
        """Each directory and its mode.

        A client runs as the user of its container, and so does the MPS server that is started for
        it; both connect to sockets in `pipe` by name and make no file there: they need to enter it,
        and nobody but root may put another socket in. Logs name the processes of all tenants, so
        they are root's. The shared memory directory is a /dev/shm, with its mode.
        """
        modes = {self.root: 0o755, self.pipe: 0o755, self.log: 0o700}
        return modes if self.shm is None else modes | {self.shm: 0o1777}

    def environment(self) -> Mapping[str, str]:
        """The variables by which programs of MPS find the daemon of these directories."""
        return {
            "CUDA_MPS_PIPE_DIRECTORY": str(self.pipe),
            "CUDA_MPS_LOG_DIRECTORY": str(self.log),
        }
