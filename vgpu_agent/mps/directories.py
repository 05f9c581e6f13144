"""Where MPS lives on a node."""

from collections.abc import Mapping
from pathlib import Path


class Directories:
    """The directories and files of MPS. `shm` is None where containers keep their own /dev/shm.

    Clients reach the daemon through `pipe`; `log` has the logs of the daemon and its servers.
    `state` is what `mps watch` says of the limits, `compute_modes` what was found before ours.
    `watch` is locked by the one `mps watch`, `watch_memory` what the last one applied, and when.
    """

    def __init__(self, root: Path, shm: Path | None = None) -> None:
        self.root = root
        self.shm = shm
        self.pipe = root / "pipe"
        self.log = root / "log"
        self.state = root / "state"
        self.compute_modes = root / "compute-modes"
        self.watch = root / "watch"
        self.watch_memory = root / "watch.json"

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
