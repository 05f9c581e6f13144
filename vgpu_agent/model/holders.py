"""Who holds which vGPUs, and how much of their GPUs they use.

The kubelet's word (PodResources v1 and its checkpoint) comes in as values; what follows from it is
worked out here by plain functions.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from vgpu_agent.model.devices import Inventory, SharedGpu, by_gpu, split_device_id
from vgpu_agent.model.rules import SharingRules

NO_NAMESPACE = "unknown"
"""Stands for the namespace of a container whose pod only the checkpoint knows, by its UID. Not
empty: Prometheus would put the agent's own namespace there."""


@dataclass(frozen=True, slots=True, order=True)
class Holder:
    """A container, by its names in Kubernetes."""

    namespace: str
    pod: str
    container: str


@dataclass(frozen=True, slots=True)
class Assignment:
    """A container and the IDs of the vGPUs that it holds, in order."""

    holder: Holder
    device_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Recorded:
    """An entry of the kubelet's checkpoint: a container of a pod, and its vGPUs."""

    pod_uid: str
    container: str
    device_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Holders:
    """What the kubelet said of who holds our vGPUs.

    `assignments` is None where it is unknown: never said, or too long ago. `error` says why the
    kubelet did not answer the last time, `checkpoint_error` why its checkpoint is of no use.
    """

    error: str | None = "not asked yet"
    assignments: tuple[Assignment, ...] | None = None
    checkpoint_error: str | None = None

    @property
    def up(self) -> bool:
        """Whether the kubelet answered when it was last asked."""
        return self.error is None


Pod = tuple[str, str]
"""Namespace and name."""


def pods_on(uuid: str, assignments: Iterable[Assignment]) -> tuple[Pod, ...]:
    """The pods that hold a vGPU of a GPU, advertised or not, in order."""
    holders = [each.holder for each in assignments if uuid in by_gpu(each.device_ids)]
    return tuple(sorted({(holder.namespace, holder.pod) for holder in holders}))


@dataclass(frozen=True, slots=True)
class Checked:
    """Who holds what, after the cross-check. With a checkpoint no vGPU has two holders.

    `named` are the recorded pods that the list has named, now or before, by UID. `settled`: it
    names every recorded pod now; where not, the next list may know more.
    """

    assignments: tuple[Assignment, ...]
    named: Mapping[str, Pod]
    settled: bool = True


def cross_check(
    listed: Iterable[Assignment],
    recorded: Sequence[Recorded] | None,
    named: Mapping[str, Pod] = MappingProxyType({}),
) -> Checked:
    """The list of PodResources, set right by the checkpoint, which was read after it.

    A vGPU that the checkpoint no longer has is free: older kubelets list pods that have ended. One
    that only the checkpoint has is held by an init container, which List leaves out; a pod of which
    List shows nothing is named by its UID. But kubelets write the checkpoint when something is
    given, not when a pod ends: a pod that was `named` before and no longer is has ended. One vGPU
    in two entries was given on, to the pod that is new, or else to the later entry. Without a
    checkpoint the list alone decides.
    """
    listed = tuple(listed)
    if recorded is None:
        return Checked(_merged((v, each.holder) for each in listed for v in each.device_ids), named)
    shown: defaultdict[Pod, dict[str, Holder]] = defaultdict(dict)
    for each in listed:
        pod = each.holder.namespace, each.holder.pod
        shown[pod].update(dict.fromkeys(each.device_ids, each.holder))
    held: defaultdict[str, set[str]] = defaultdict(set)
    for entry in recorded:
        held[entry.pod_uid].update(entry.device_ids)
    names = _names({uid: vgpus for uid, vgpus in held.items() if vgpus}, shown, named)
    kept = set().union(*held.values())
    holders = {v: each.holder for each in listed for v in each.device_ids if v in kept}
    for entry in sorted(recorded, key=lambda entry: entry.pod_uid not in named):
        pod_name = names.get(entry.pod_uid)
        if pod_name is None and entry.pod_uid in named:
            continue
        holder = Holder(*(pod_name or (NO_NAMESPACE, entry.pod_uid)), entry.container)
        listed_as = shown[pod_name] if pod_name else {}
        holders |= {vgpu: listed_as.get(vgpu, holder) for vgpu in entry.device_ids}
    known = {uid: pod for uid, pod in named.items() if held.get(uid)}
    settled = all(uid in names for uid, vgpus in held.items() if vgpus)
    return Checked(_merged(holders.items()), known | names, settled)


def _names(
    held: Mapping[str, set[str]],
    shown: Mapping[Pod, Mapping[str, Holder]],
    named: Mapping[str, Pod],
) -> dict[str, Pod]:
    """The listed pod that each recorded one is, by UID: the one it was, or else one with its vGPUs.

    A name that was another pod's is not taken: the list is older than the checkpoint then.
    """
    names = {uid: named[uid] for uid in held if uid in named and shown.get(named[uid])}
    pods_of: defaultdict[str, list[Pod]] = defaultdict(list)
    for pod, holds in shown.items():
        for vgpu in holds:
            pods_of[vgpu].append(pod)
    taken = set(named.values())
    for uid, vgpus in held.items():
        if uid not in named:
            found = Counter(pod for vgpu in vgpus for pod in pods_of[vgpu] if pod not in taken)
            if found:
                names[uid] = max(found, key=lambda pod: (found[pod], pod))
                taken.add(names[uid])
    return names


def _merged(holders: Iterable[tuple[str, Holder]]) -> tuple[Assignment, ...]:
    vgpus: defaultdict[Holder, set[str]] = defaultdict(set)
    for vgpu, holder in holders:
        vgpus[holder].add(vgpu)
    return tuple(
        Assignment(holder, tuple(sorted(device_ids, key=_order)))
        for holder, device_ids in sorted(vgpus.items())
    )


def _order(vgpu: str) -> tuple[str, int]:
    return split_device_id(vgpu) or (vgpu, 0)


@dataclass(frozen=True, slots=True)
class Part:
    """What a container holds of one GPU: the numbers of its vGPUs.

    `whole` says that all its vGPUs of the GPU are still made, so that its share is known.
    """

    shared: SharedGpu
    holder: Holder
    numbers: tuple[int, ...]
    whole: bool = True


def parts(inventory: Inventory, assignments: Iterable[Assignment]) -> tuple[Part, ...]:
    """What each container holds of each advertised GPU, by GPU and container."""
    found = []
    for each in assignments:
        numbers = by_gpu(each.device_ids)
        for shared in inventory.gpus:
            held = numbers.get(shared.gpu.uuid, ())
            made = tuple(n for n in held if n < shared.replicas)
            if made:
                found.append(Part(shared, each.holder, made, whole=len(made) == len(held)))
    found.sort(key=lambda part: (part.shared.gpu.index, part.shared.gpu.uuid, part.holder))
    return tuple(found)


def split_containers(found: Iterable[Part], sharing: SharingRules) -> frozenset[Holder]:
    """The containers that hold vGPUs of several MPS daemons, and so cannot start."""
    held: defaultdict[Holder, set[str]] = defaultdict(set)
    for part in found if sharing.mps else ():
        held[part.holder].add(sharing.daemon_of(part.shared.gpu.uuid))
    return frozenset(holder for holder, daemons in held.items() if len(daemons) > 1)


def orphaned(inventory: Inventory, assignments: Iterable[Assignment]) -> tuple[str, ...]:
    """The vGPUs that are held though the node no longer has them.

    Fewer are made of the GPU than before, or it is gone or excluded.
    """
    held = {vgpu for each in assignments for vgpu in each.device_ids}
    return tuple(sorted((v for v in held if inventory.gpu_of(v) is None), key=_order))


def largest_free(inventory: Inventory, assignments: Iterable[Assignment]) -> int:
    """How many vGPUs the largest request may ask for that still fits on one healthy GPU."""
    held = {vgpu for each in assignments for vgpu in each.device_ids}
    taken = Counter(shared.gpu.uuid for v in held if (shared := inventory.gpu_of(v)) is not None)
    return max(
        (shared.replicas - taken[shared.gpu.uuid] for shared in inventory.gpus if shared.healthy),
        default=0,
    )


@dataclass(frozen=True, slots=True)
class GpuProcess:
    """A process with a context on a GPU; its memory of the GPU in bytes, where that is known."""

    pid: int
    memory_bytes: int | None


@dataclass(frozen=True, slots=True)
class Used:
    """What the processes of a container use of a GPU together.

    Memory in bytes, of those whose memory the driver reports; None where it reports none.
    """

    processes: int
    memory_bytes: int | None


@dataclass(frozen=True, slots=True)
class Usage:
    """Who uses what of the GPUs: by UUID and container, as far as processes could be attributed.

    `unattributed` counts, by UUID, processes that belong to no container that is known. `problem`
    says why no process can be attributed to its container, and what to do.
    """

    containers: Mapping[tuple[str, Holder], Used] = field(default_factory=dict)
    unattributed: Mapping[str, int] = field(default_factory=dict)
    problem: str | None = None


def attribute(
    processes: Mapping[str, Iterable[GpuProcess]], containers: Mapping[int, Holder]
) -> Usage:
    """Adds up the processes of each GPU, by UUID, for the container that each PID runs in."""
    used: dict[tuple[str, Holder], Used] = {}
    unattributed = dict.fromkeys(processes, 0)
    for uuid, running in processes.items():
        for process in running:
            holder = containers.get(process.pid)
            if holder is None:
                unattributed[uuid] += 1
                continue
            before = used.get((uuid, holder), Used(0, None))
            memory = before.memory_bytes
            if process.memory_bytes is not None:
                memory = (memory or 0) + process.memory_bytes
            used[uuid, holder] = Used(before.processes + 1, memory)
    return Usage(used, unattributed)
