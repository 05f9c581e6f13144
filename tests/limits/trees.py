"""Made-up cgroup trees: directories with the files of cgroup v2 that we read.

Real directories of cgroups are in `test_cgroups_real.py`; no kernel of a test machine has to have
the dmem controller.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tests.usage.test_cgroups import BURSTABLE, GUARANTEED, ID, OTHER

SCOPE = f"{BURSTABLE}/cri-containerd-{ID}.scope"
OTHER_SCOPE = f"{GUARANTEED}/cri-containerd-{OTHER}.scope"
CAPACITY = "drm/0000:00:02.0/vram0 8589934592\nnvidia/0000:3b:00.0/vidmem 85520809984\n"
"""`dmem.capacity` of a node whose driver uses the kernel's controller."""


@dataclass(frozen=True)
class Tree:
    """The tree of a node at `root`, or of a container (`hosts` false), with no cgroup yet."""

    root: Path
    hosts: bool = True
    capacity: str | None = None

    def __post_init__(self) -> None:
        self.root.mkdir(exist_ok=True)
        self._files(self.root, is_root=self.hosts)
        if self.capacity is not None:
            (self.root / "dmem.capacity").write_text(self.capacity)

    def add(self, path: str, *, populated: bool = True) -> Path:
        """Makes a cgroup and those above it; it has dmem files if all above enable them."""
        at = self.root
        for name in path.strip("/").split("/"):
            above, at = at, at / name
            if not at.exists():
                at.mkdir()
                self._files(at)
                if "dmem" in (above / "cgroup.subtree_control").read_text().split():
                    (at / "dmem.max").write_text("")
        (at / "cgroup.events").write_text(f"populated {populated:d}\nfrozen 0\n")
        (at / "cgroup.procs").write_text("1\n" if populated else "")
        return at

    def remove(self, path: str) -> None:
        """Removes a cgroup without children, as rmdir does: its files go with it."""
        at = self.root / path.strip("/")
        for file in at.iterdir():
            file.unlink()
        at.rmdir()

    def enable(self, *paths: str) -> None:
        """Makes those cgroups enable the controller; what is there below gets its files."""
        for path in paths:
            at = self.root / path.strip("/")
            (at / "cgroup.subtree_control").write_text("cpu memory dmem pids\n")
            for child in _directories(at):
                (child / "dmem.max").write_text("")

    def _files(self, at: Path, *, is_root: bool = False) -> None:
        (at / "cgroup.controllers").write_text("cpu memory pids\n")
        (at / "cgroup.subtree_control").write_text("cpu memory pids\n")
        (at / "cgroup.procs").write_text("")
        if not is_root:
            (at / "cgroup.events").write_text("populated 0\nfrozen 0\n")


def _directories(at: Path) -> Iterable[Path]:
    return [each for each in at.iterdir() if each.is_dir() and not each.is_symlink()]


def above(path: str) -> list[str]:
    """The cgroups above one, from the root down."""
    names = path.strip("/").split("/")
    return ["/" + "/".join(names[:number]) for number in range(len(names))]
