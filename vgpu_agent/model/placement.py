"""Which of the free vGPUs a container is best given (GetPreferredAllocation, KEP-1882).

The order of what is wanted, most important first:

1. vGPUs that must be included are; then as many as are asked for, or as there are.
2. The fewest GPUs: one bigger slice instead of slivers of several.
3. `spread` takes the GPUs with the most free vGPUs. `pack` takes those with the least free vGPUs
   that still fit: the emptiest GPU it touches is as full as possible, then the next one, so that
   untouched GPUs stay whole.
4. The fewest NUMA nodes, then the lowest GPU indices.

On several GPUs `spread` gives even parts, since MPS knows one thread percentage per client and
the smallest share decides it; `pack` fills the fullest GPUs and leaves the largest rest whole.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from vgpu_agent.model.devices import Gpu, Inventory, device_id
from vgpu_agent.model.rules import Placement


@dataclass(frozen=True, slots=True)
class Preference:
    """The answer, and the IDs of the request that were passed over as unknown or unhealthy."""

    device_ids: tuple[str, ...]
    passed_over: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Slot:
    """A GPU and the numbers of its free vGPUs, in order."""

    gpu: Gpu
    free: tuple[int, ...]

    @property
    def key(self) -> tuple[int, str]:
        """The order of GPUs. Two can share an index while one of them is lost."""
        return self.gpu.index, self.gpu.uuid


def prefer(
    inventory: Inventory,
    available: Iterable[str],
    must_include: Iterable[str],
    size: int,
    placement: Placement,
) -> Preference:
    """Chooses `size` of the available vGPUs; fewer where there are not as many.

    IDs that are unknown or unhealthy are normal in a race with the device list: they are passed
    over (Allocate judges), except that whatever must be included and exists is.
    """
    named = dict.fromkeys(must_include)
    must = {v: shared.gpu.uuid for v in named if (shared := inventory.gpu_of(v)) is not None}
    wanted_ids = set(available).difference(named)
    # Once over all vGPUs there are: what is asked for needs no taking apart.
    free = {
        shared.gpu.uuid: [n for n, vgpu in enumerate(shared.device_ids) if vgpu in wanted_ids]
        for shared in inventory.gpus
        if shared.healthy
    }
    held = Counter(must.values())
    slots = [
        _Slot(shared.gpu, tuple(free.get(shared.gpu.uuid, ())))
        for shared in inventory.gpus
        if free.get(shared.gpu.uuid) or shared.gpu.uuid in held
    ]
    wanted = max(0, min(size - len(must), sum(len(slot.free) for slot in slots)))
    had = [slot for slot in slots if slot.gpu.uuid in held]
    others = [slot for slot in slots if slot.gpu.uuid not in held]
    chosen = had + _more_gpus(had, others, wanted, placement)
    if placement is Placement.PACK:
        counts = _fill_fullest(chosen, wanted)
    else:
        counts = _split_evenly(chosen, held, wanted)
    picked = tuple(
        device_id(slot.gpu.uuid, number)
        for slot in sorted(chosen, key=lambda slot: slot.key)
        for number in slot.free[: counts[slot.gpu.uuid]]
    )
    known = {device_id(uuid, number) for uuid, numbers in free.items() for number in numbers}
    passed_over = (named.keys() - must.keys()) | (wanted_ids - known)
    return Preference((*must, *picked), tuple(sorted(passed_over)))


def _more_gpus(
    had: Sequence[_Slot], others: Sequence[_Slot], wanted: int, placement: Placement
) -> list[_Slot]:
    """The GPUs to use beside those that the container has anyway."""
    wanted -= sum(len(slot.free) for slot in had)
    by_free = sorted((len(slot.free) for slot in others), reverse=True)
    count = 0
    while sum(by_free[:count]) < wanted:
        count += 1
    profile = (
        Counter(by_free[:count])
        if placement is Placement.SPREAD
        else _fullest_profile(by_free, count, wanted)
    )
    return _nearest(had, others, profile)


def _fullest_profile(by_free: Iterable[int], count: int, wanted: int) -> Counter[int]:
    """How many vGPUs are free on each of the `count` GPUs that `pack` takes.

    Largest first, each as small as it can be while the rest still fits on the GPUs that are no
    emptier than it.
    """
    profile: Counter[int] = Counter()
    pool = sorted(by_free)
    while count:
        for position in range(count - 1, len(pool)):
            if sum(pool[position - count + 1 : position + 1]) >= wanted:
                break
        profile[pool[position]] += 1
        wanted -= pool[position]
        pool = pool[:position]
        count -= 1
    return profile


def _nearest(had: Sequence[_Slot], others: Sequence[_Slot], profile: Counter[int]) -> list[_Slot]:
    """GPUs that match `profile` on the fewest NUMA nodes, then of the lowest indices.

    GPUs of no known node count as of one node of their own.
    """
    near = {slot.gpu.numa_node for slot in had}
    far = sorted(
        {slot.gpu.numa_node for slot in others} - near, key=lambda node: (node is None, node)
    )
    ordered = sorted(others, key=lambda slot: slot.key)
    for more_nodes in range(len(far) + 1):
        found = [
            picked
            for nodes in combinations(far, more_nodes)
            if (picked := _match(ordered, near.union(nodes), profile)) is not None
        ]
        if found:
            return min(found, key=lambda slots: [slot.key for slot in slots])
    raise AssertionError("all GPUs together match the profile that was made of them")


def _match(
    ordered: Iterable[_Slot], nodes: Collection[int | None], profile: Counter[int]
) -> list[_Slot] | None:
    """The first GPUs on those nodes that match `profile`, or None where they do not."""
    left = profile.copy()
    picked = []
    for slot in ordered:
        if slot.gpu.numa_node in nodes and left[len(slot.free)] > 0:
            left[len(slot.free)] -= 1
            picked.append(slot)
    return picked if left.total() == 0 else None


def _split_evenly(chosen: Sequence[_Slot], held: Mapping[str, int], wanted: int) -> dict[str, int]:
    """One by one to the GPU of which the container has least; then the one with most free."""
    counts = dict.fromkeys((slot.gpu.uuid for slot in chosen), 0)
    for _ in range(wanted):
        slot = min(
            (slot for slot in chosen if counts[slot.gpu.uuid] < len(slot.free)),
            key=lambda s: (counts[s.gpu.uuid] + held.get(s.gpu.uuid, 0), -len(s.free), s.key),
        )
        counts[slot.gpu.uuid] += 1
    return counts


def _fill_fullest(chosen: Iterable[_Slot], wanted: int) -> dict[str, int]:
    """The fullest GPU first, so that the largest rest stays on one GPU."""
    counts = {}
    for slot in sorted(chosen, key=lambda slot: (len(slot.free), slot.key)):
        counts[slot.gpu.uuid] = min(len(slot.free), wanted)
        wanted -= counts[slot.gpu.uuid]
    return counts
