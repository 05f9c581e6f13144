"""The node's cgroup v2 tree: where the containers of pods are, and what it lacks for limits.

The driver takes the path of a cgroup. It has one of two backends: with `dmem` a limit can only be
set on a cgroup that has the kernel's `dmem.*` files, which those have whose parents all enable that
controller for their children; with `misc` on any. Nothing here writes `dmem.*` files: what they say
is the driver's own affair.
"""

import os
import shlex
from collections import deque
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from vgpu_agent import store
from vgpu_agent.errors import StoreError
from vgpu_agent.usage.containers import in_pod, parts, pod_uid

ROOT = Path("/sys/fs/cgroup")

MAX_DEPTH = 8
"""Levels below the root at which containers of pods may be: in kind, from the machine, it is 7."""
MAX_CGROUPS = 10_000
"""Most cgroups that are looked at at a time: a full node has 1,000."""

CRUN = "container"
"""What crun calls the cgroup that it makes in a container's own, for the container's processes."""

KUBELETS = "kubepods"
"""What the kubelet calls the cgroup of all pods; those below repeat it with the systemd driver."""

CONTROLLER = "dmem"
VALUE = "memoryLimitsEnableController"
"""The chart's value with which the agent enables the controller itself."""


@dataclass(frozen=True, slots=True)
class Leaf:
    """The cgroup that has a container's processes. `pod_uid` is as in the kubelet's checkpoint."""

    pod_uid: str
    path: str


@dataclass(slots=True)
class _Cgroup:
    """A directory of the tree.

    `pod` is the UID where it is a pod's, `container` pod and ID where it is a container's. The
    search does not go on below what is `closed`. What is `kubelets` comes first.
    """

    path: str
    pod: str | None = None
    container: tuple[str, str] | None = None
    closed: bool = False
    kubelets: bool = False


@dataclass
class Hierarchy:
    """The cgroup tree that is mounted at `root`. Its methods block; one call at a time.

    They raise nothing but where they say so: what vanishes while it is looked at is not there.
    """

    root: Path = ROOT

    def problem(self) -> str | None:
        """Why no limit can be set on this node, and what to do; None where one can."""
        if not _exists(f"{self.root}/cgroup.controllers"):
            return self._no_v2()
        if not self._is_hosts() and not self.leaves():
            return (
                f"the cgroup tree at {self.root} is a container's own and has no pods: mount the "
                f"node's {ROOT} there"
            )
        return None

    def leaves(self) -> Mapping[str, Leaf]:
        """The containers of all pods, by their ID.

        What the kubelet made comes first, and the first of an ID counts: users may make cgroups of
        any name, and as many as they like, below those that they were given.
        """
        found: dict[str, Leaf] = {}
        for cgroup in self._search():
            if cgroup.container is not None and Path(cgroup.path).is_dir():
                pod, container_id = cgroup.container
                found.setdefault(container_id, Leaf(pod, _path(cgroup.path)))
        return found

    def needs_files(self) -> bool | None:
        """Whether the driver can only limit cgroups that have `dmem.*` files; None: not known.

        With the kernel's controller, `dmem.capacity` of the root lists the driver's GPUs.
        """
        if not self._is_hosts():
            return None
        capacity = _read(f"{self.root}/{CONTROLLER}.capacity").splitlines()
        return any(line.startswith("nvidia/") for line in capacity)

    def lacks(self, leaf: Leaf) -> str | None:
        """Which cgroups above have to enable the controller first, and how.

        None where all do, and where the driver does not need it or that is not known.
        """
        if _has_files(leaf) or not self.needs_files() or not _is_there(leaf):
            return None
        missing = self._missing(leaf)
        if not missing:
            return None
        commands = " && ".join(
            f"echo +{CONTROLLER} > {shlex.quote(f'{path}/cgroup.subtree_control')}"
            for path in missing
        )
        return (
            f"{leaf.path} has no {CONTROLLER} files, since {missing[0]} does not enable that "
            f"controller for its children: set {VALUE} in the chart, or run as root on the node: "
            f"{commands}"
        )

    def enable(self, leaf: Leaf) -> None:
        """Enables the controller from the root down to the container's parent. Raises OSError."""
        for path in self._missing(leaf):
            control = f"{path}/cgroup.subtree_control"
            try:
                flags = os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC
                with store.closing(os.open(control, flags)) as descriptor:
                    os.write(descriptor, f"+{CONTROLLER}".encode())
            except OSError as error:
                raise OSError(error.errno, error.strerror, control) from error

    def hook(self, leaves: Collection[Leaf]) -> str | None:
        """Why the container toolkit's hook may keep containers from starting; None: it cannot.

        Where the driver needs the files, a new container has them if all `leaves` that run have,
        of which the caller's own is one. A single one without is enough to doubt: runtimes differ.
        """
        if (problem := self.problem()) is not None:
            return problem
        if (needs_files := self.needs_files()) is False:
            return None
        without = next((leaf for leaf in leaves if not _has_files(leaf) and _is_there(leaf)), None)
        if leaves and without is None:
            return None
        words = (
            f"no container of a pod is in {self.root}"
            if without is None
            else f"{without.path} has no {CONTROLLER} files, and new containers may have none"
        )
        if needs_files:
            return words
        return f"{words}; whether the driver needs them shows in the node's root cgroup only"

    def ended(self, leaf: Leaf) -> bool:
        """Whether the container has no process any more."""
        events = _read(f"{leaf.path}/cgroup.events").splitlines()
        return "populated 0" in events or not _is_there(leaf)

    # What the tree is

    def _no_v2(self) -> str:
        version = "cgroup v1"
        if _exists(f"{self.root}/unified/cgroup.controllers"):
            version += f", and v2 only beside it at {self.root}/unified"
        elif not any(
            _exists(f"{self.root}/{name}/cgroup.procs") for name in _subdirectories(str(self.root))
        ):
            return f"no cgroup tree is mounted at {self.root}: mount the node's {ROOT} there"
        return (
            f"this node has {version}; the driver limits memory by cgroup v2 at {ROOT}: boot the "
            "node with systemd.unified_cgroup_hierarchy=1"
        )

    def _is_hosts(self) -> bool:
        """Whether the root is the node's: every other cgroup has events."""
        return not _exists(f"{self.root}/cgroup.events")

    def _missing(self, leaf: Leaf) -> list[str]:
        """The cgroups above that do not enable the controller, from the root down."""
        above = [self.root / each for each in Path(leaf.path).relative_to(self.root).parents]
        return [
            str(path)
            for path in reversed(above)
            if CONTROLLER not in _read(f"{path}/cgroup.subtree_control").split()
        ]

    # The search

    def _search(self) -> Iterator[_Cgroup]:
        """All cgroups down to those of containers, level by level, the kubelet's first."""
        first: deque[tuple[int, _Cgroup]] = deque()
        others = deque([(0, _Cgroup(str(self.root)))])
        room = MAX_CGROUPS
        while first or others:
            depth, cgroup = (first or others).popleft()
            yield cgroup
            if cgroup.closed or depth == MAX_DEPTH:
                continue
            for name in islice(_subdirectories(cgroup.path), room):
                room -= 1
                child = _named(name, cgroup)
                (first if child.kubelets else others).append((depth + 1, child))


def _named(name: str, above: _Cgroup) -> _Cgroup:
    """What a cgroup is, by its name and the one above."""
    cgroup, own = _Cgroup(f"{above.path}/{name}"), parts(name)
    if above.pod is None:
        cgroup.pod = pod_uid(own.pop(0)) if own else None
    pod = above.pod or cgroup.pod
    cgroup.kubelets = above.kubelets or KUBELETS in name
    cgroup.closed = above.pod is not None or (pod is not None and own != [])
    if cgroup.closed and pod is not None and len(own) == 1:
        container_id = in_pod(own[0])
        cgroup.container = None if container_id is None else (pod, container_id)
    return cgroup


def _path(container: str) -> str:
    """Of the cgroup that has the container's processes: where that is crun's, it is by itself."""
    alone = list(islice(_subdirectories(container), 2)) == [CRUN]
    return f"{container}/{CRUN}" if alone and not _read(f"{container}/cgroup.procs") else container


def _has_files(leaf: Leaf) -> bool:
    return _exists(f"{leaf.path}/{CONTROLLER}.max")


def _is_there(leaf: Leaf) -> bool:
    return Path(leaf.path).is_dir() and not Path(leaf.path).is_symlink()


# Files and directories


def _subdirectories(path: str) -> Iterator[str]:
    with suppress(OSError), os.scandir(path) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield entry.name


def _exists(path: str) -> bool:
    return os.access(path, os.F_OK)


def _read(path: str) -> str:
    with suppress(StoreError):
        return (store.read_bytes(Path(path)) or b"").decode(errors="replace")
    return ""
