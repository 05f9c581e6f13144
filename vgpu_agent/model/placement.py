"""Which of the free vGPUs a container is best given (GetPreferredAllocation, KEP-1882).

The order of what is wanted, most important first:

1. vGPUs that must be included are; then as many as are asked for, or as there are.
2. The fewest cards: one bigger slice instead of slivers of several.
3. `spread` takes the cards with the most free vGPUs. `pack` takes those with the least free vGPUs
   that still fit: the emptiest card it touches is as full as possible, then the next one, so that
   untouched cards stay whole.
4. The fewest NUMA nodes, then the lowest card indices.

On several cards `spread` gives even parts, since MPS knows one thread percentage per client and
the smallest share decides it; `pack` fills the fullest cards and leaves the largest rest whole.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import combinations

from vgpu_agent.model.devices import Inventory, split_device_id


class Placement(StrEnum):
    """How containers are put on cards."""

    SPREAD = "spread"
    PACK = "pack"


@dataclass(frozen=True, slots=True)
class Preference:
    """The answer, and the IDs of the request that were passed over as unknown or unhealthy."""

    device_ids: tuple[str, ...]
    passed_over: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Slot:
    """A card as placement sees it: its place and its free vGPUs, lowest number first."""

    index: int
    numa_node: int | None
    free: tuple[str, ...]


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
    cards = {card.gpu.uuid: card for card in inventory.cards}
    must = [vgpu for vgpu in dict.fromkeys(must_include) if inventory.card_of(vgpu) is not None]
    free: dict[str, list[str]] = {}
    passed_over = [vgpu for vgpu in must_include if inventory.card_of(vgpu) is None]
    for vgpu in set(available) - set(must):
        card = inventory.card_of(vgpu)
        if card is None or not card.healthy:
            passed_over.append(vgpu)
        else:
            free.setdefault(card.gpu.uuid, []).append(vgpu)
    slots = {
        uuid: _Slot(
            cards[uuid].gpu.index, cards[uuid].gpu.numa_node, tuple(sorted(ids, key=_number))
        )
        for uuid, ids in free.items()
    }
    held = Counter(vgpu.rpartition("::")[0] for vgpu in must)
    for uuid in held:
        gpu = cards[uuid].gpu
        slots.setdefault(uuid, _Slot(gpu.index, gpu.numa_node, ()))
    wanted = max(0, min(size - len(must), sum(len(slot.free) for slot in slots.values())))
    base = [slots[uuid] for uuid in held]
    others = [slot for uuid, slot in slots.items() if uuid not in held]
    chosen = base + _choose_cards(base, others, wanted, placement)
    taken = {slots[uuid].index: count for uuid, count in held.items()}
    picked = _split(chosen, taken, wanted, placement)
    return Preference(tuple(must) + picked, tuple(sorted(passed_over)))


def _number(vgpu: str) -> int:
    parts = split_device_id(vgpu)
    return parts[1] if parts else -1


def _choose_cards(
    base: Sequence[_Slot], others: Sequence[_Slot], wanted: int, placement: Placement
) -> list[_Slot]:
    """The cards to use beside those of `base`, which the container has anyway."""
    wanted -= sum(len(slot.free) for slot in base)
    by_free = sorted((len(slot.free) for slot in others), reverse=True)
    count = 0
    while sum(by_free[:count]) < wanted:
        count += 1
    if count == 0:
        return []
    profile = (
        Counter(by_free[:count])
        if placement is Placement.SPREAD
        else _fullest_profile(by_free, count, wanted)
    )
    return _nearest(base, others, profile)


def _fullest_profile(by_free: Sequence[int], count: int, wanted: int) -> Counter[int]:
    """How many vGPUs are free on each of the `count` cards that `pack` takes.

    Largest first, each as small as it can be while the rest still fits on the cards that are no
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


def _nearest(base: Sequence[_Slot], others: Sequence[_Slot], profile: Counter[int]) -> list[_Slot]:
    """Cards that match `profile` on the fewest NUMA nodes, then of the lowest indices."""
    near = {slot.numa_node for slot in base}
    far = sorted({slot.numa_node for slot in others} - near, key=lambda node: (node is None, node))
    ordered = sorted(others, key=lambda slot: slot.index)
    for extra in range(len(far) + 1):
        found = [
            picked
            for nodes in combinations(far, extra)
            if (picked := _match(ordered, near.union(nodes), profile)) is not None
        ]
        if found:
            return min(found, key=lambda slots: [slot.index for slot in slots])
    raise AssertionError("all cards together match the profile that was made of them")


def _match(
    ordered: Iterable[_Slot], nodes: Collection[int | None], profile: Counter[int]
) -> list[_Slot] | None:
    left = profile.copy()
    picked = []
    for slot in ordered:
        if slot.numa_node in nodes and left[len(slot.free)] > 0:
            left[len(slot.free)] -= 1
            picked.append(slot)
    return picked if left.total() == 0 else None


def _split(
    chosen: Sequence[_Slot], taken: dict[int, int], wanted: int, placement: Placement
) -> tuple[str, ...]:
    """How many vGPUs of each chosen card, as the IDs themselves."""
    counts = {slot.index: 0 for slot in chosen}
    ordered = sorted(chosen, key=lambda slot: (len(slot.free), slot.index))
    if placement is Placement.PACK:
        for slot in ordered:
            counts[slot.index] = min(len(slot.free), wanted - sum(counts.values()))
    else:
        for _ in range(wanted):
            roomy = [slot for slot in chosen if counts[slot.index] < len(slot.free)]
            slot = min(
                roomy,
                key=lambda s: (counts[s.index] + taken.get(s.index, 0), -len(s.free), s.index),
            )
            counts[slot.index] += 1
    by_index = sorted(chosen, key=lambda slot: slot.index)
    return tuple(vgpu for slot in by_index for vgpu in slot.free[: counts[slot.index]])
