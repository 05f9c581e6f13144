"""Which containers hold vGPUs, and where their cgroups are.

The kubelet's checkpoint says who holds which vGPUs, by pod UID and container name; the links in
/var/log/containers name containers by their IDs, and cgroups are named by ID and pod UID. A cgroup
that these three do not name together is never touched. Everything here blocks.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

from vgpu_agent import store
from vgpu_agent.errors import KubeletError
from vgpu_agent.kubelet.checkpoint import read_checkpoint
from vgpu_agent.limits.cgroups import Hierarchy, Leaf
from vgpu_agent.model.holders import Holder, Recorded
from vgpu_agent.model.limits import Limited
from vgpu_agent.usage.containers import LINKS, holders_by_id, nameless

SCRATCH = 3
"""Containers whose cgroups show whether a GPU can limit memory: any of them may end meanwhile."""


@dataclass(frozen=True, slots=True)
class Held:
    """A container that holds vGPUs, and its cgroup. `lacks` says why no limit can be set on it."""

    recorded: Recorded
    holder: Holder
    leaf: Leaf
    lacks: str | None = None


@dataclass(frozen=True, slots=True)
class Tree:
    """What is there: why no limits can be set at all, why the hook may fail, and all containers.

    `lost` are those whose cgroup cannot be told from others of their pod. `passing`: the problem
    is of this moment.
    """

    problem: str | None
    hook: str | None
    held: tuple[Held, ...]
    scratch: tuple[str, ...]
    lost: tuple[Limited, ...] = ()
    passing: bool = False


def matched(
    recorded: Sequence[Recorded], leaves: Mapping[str, Leaf], names: Mapping[str, Holder]
) -> Iterator[Held]:
    """The recorded containers that run. One that was started again has two cgroups for a moment."""
    entries = {(each.pod_uid, each.container): each for each in recorded}
    for container, leaf in leaves.items():
        holder = names.get(container)
        entry = None if holder is None else entries.get((leaf.pod_uid, holder.container))
        if holder is not None and entry is not None:
            yield Held(entry, holder, leaf)


_TOO_LONG = (
    "names of pod, namespace and container are so long together that the kubelet's link to its log"
    " has no container ID: which cgroup it has is not known; give it shorter names"
)


@dataclass
class Finder:
    """Finds the containers that hold vGPUs of `resource_name`.

    `enable`: the cgroup controller that limits need is turned on for them. `living`: those without
    a process are left out.
    """

    checkpoint: Path
    resource_name: str
    hierarchy: Hierarchy = field(default_factory=Hierarchy)
    links: Path = LINKS
    enable: bool = False
    living: bool = False

    def signs(self) -> object:
        """Is another value when a container may have been given vGPUs, or started."""
        return store.identity(self.checkpoint), store.identity(self.links)

    def find(self) -> Tree:
        """What is there now."""
        problem = self.hierarchy.problem()
        if problem is not None:
            return Tree(problem, problem, (), ())
        try:
            recorded = read_checkpoint(self.checkpoint, self.resource_name) or []
            leaves = self.hierarchy.leaves()
            names = holders_by_id(self.links) if recorded else {}
            lost = self._lost(recorded, leaves, names) if recorded else ()
        except (KubeletError, OSError) as error:
            words = f"which containers hold vGPUs cannot be seen: {error}"
            return Tree(words, words, (), (), passing=True)
        held = list(matched(recorded, leaves, names))
        if self.living:  # what has ended is given no guarantee again
            ended = self.ended([each.leaf for each in held])
            held = [each for each in held if each.leaf.path not in ended]
        if self.hierarchy.needs_files():
            held = [replace(each, lacks=self._lacks(each.leaf)) for each in held]
        scratch = [leaf.path for leaf in islice(leaves.values(), SCRATCH)]
        scratch = scratch or [str(self.hierarchy.root)]
        hook = self.hierarchy.hook(leaves.values())
        return Tree(None, hook, tuple(held), tuple(scratch), lost)

    def _lost(
        self, recorded: Sequence[Recorded], leaves: Mapping[str, Leaf], names: Mapping[str, Holder]
    ) -> tuple[Limited, ...]:
        """A tenant may choose names so long that the kubelet's link has no ID. Raises OSError."""
        unnamed = {leaf.pod_uid for each, leaf in leaves.items() if each not in names}
        cut = nameless(self.links)
        return tuple(
            Limited(holder, problem=_TOO_LONG)
            for each in recorded
            if each.pod_uid in unnamed and (holder := cut.get((each.pod_uid, each.container)))
        )

    def ended(self, leaves: Sequence[Leaf]) -> set[str]:
        """The paths of those that have no process any more."""
        return {leaf.path for leaf in leaves if self.hierarchy.ended(leaf)}

    def _lacks(self, leaf: Leaf) -> str | None:
        lacks = self.hierarchy.lacks(leaf)
        if lacks is None or not self.enable:
            return lacks
        try:
            self.hierarchy.enable(leaf)
        except OSError as error:
            return f"{lacks}; it could not be turned on here: {error}"
        return self.hierarchy.lacks(leaf)
