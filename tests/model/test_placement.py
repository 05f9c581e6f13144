import os
import subprocess
import sys
from collections import Counter
from itertools import chain, combinations, product
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import vgpu_agent
from tests.model.strategies import Request, a_gpu, ids, racing_requests, requests, tried
from vgpu_agent.model.devices import Card, Fault, Inventory, Reason
from vgpu_agent.model.placement import Placement, Preference, prefer

SPREAD, PACK = Placement.SPREAD, Placement.PACK

placements = st.sampled_from(Placement)


def ask(request: Request, placement: Placement) -> Preference:
    return prefer(
        request.inventory, request.available, request.must_include, request.size, placement
    )


def uuids_of(inventory: Inventory, vgpus) -> Counter[str]:
    return Counter(inventory.card_of(vgpu).gpu.uuid for vgpu in vgpus)


def known(request: Request) -> list[str]:
    """What must be included and exists, healthy or not."""
    return [i for i in dict.fromkeys(request.must_include) if request.inventory.card_of(i)]


def free_of(request: Request) -> dict[str, int]:
    """How many vGPUs of each card may be added to those that must be included."""
    candidates = set(request.available) - set(request.must_include)
    return {
        card.gpu.uuid: sum(vgpu in candidates for vgpu in card.device_ids) if card.healthy else 0
        for card in request.inventory.cards
    }


def wanted_beside_must(request: Request) -> int:
    return max(0, min(request.size - len(known(request)), sum(free_of(request).values())))


# The cards


def best_cards(request: Request, placement: Placement) -> set[str]:
    """The order of wishes of the module's docstring, tried on every set of cards."""
    free = free_of(request)
    wanted = wanted_beside_must(request)
    gpus = {card.gpu.uuid: card.gpu for card in request.inventory.cards}
    base = set(uuids_of(request.inventory, known(request)))
    others = [uuid for uuid in gpus if uuid not in base]

    def wish(added):
        profile = sorted((free[uuid] for uuid in added), reverse=True)
        return (
            len(added),
            profile if placement is PACK else [-count for count in profile],
            len({gpus[uuid].numa_node for uuid in base.union(added)}),
            sorted(gpus[uuid].index for uuid in added),
        )

    every_set = chain.from_iterable(combinations(others, n) for n in range(len(others) + 1))
    fitting = [added for added in every_set if sum(free[u] for u in base.union(added)) >= wanted]
    return base.union(min(fitting, key=wish))


@pytest.mark.parametrize("placement", Placement)
@given(request=requests(most=6, replicas=4))
@tried(150)
def test_no_other_set_of_cards_is_better(placement, request):
    answer = ask(request, placement)
    assert set(uuids_of(request.inventory, answer.device_ids)) == best_cards(request, placement)


@pytest.mark.parametrize("placement", Placement)
@given(request=requests(most=6, replicas=12))
@tried(60)
def test_no_other_set_of_larger_cards_is_better(placement, request):
    answer = ask(request, placement)
    assert set(uuids_of(request.inventory, answer.device_ids)) == best_cards(request, placement)


# The parts of the cards


def all_splits(request: Request, used: list[str]):
    """Every way to take what is wanted from these cards, as a number for each."""
    free = free_of(request)
    wanted = wanted_beside_must(request)
    ways = product(*(range(min(free[uuid], wanted) + 1) for uuid in used))
    return [way for way in ways if sum(way) == wanted]


@given(requests(most=4, replicas=5))
@tried(80)
def test_spread_takes_parts_as_even_as_they_can_be(request):
    parts = uuids_of(request.inventory, ask(request, SPREAD).device_ids)
    taken = uuids_of(request.inventory, known(request))
    used = list(parts)
    evenest = max(
        sorted(taken[uuid] + n for uuid, n in zip(used, way, strict=True))
        for way in all_splits(request, used)
    )
    assert sorted(parts.values()) == evenest


@given(requests(most=4, replicas=5))
@tried(80)
def test_pack_leaves_the_largest_rest_on_one_card(request):
    answer = ask(request, PACK)
    parts = uuids_of(request.inventory, answer.device_ids)
    taken = uuids_of(request.inventory, known(request))
    free = free_of(request)
    used = list(parts)
    largest = max(
        sorted((free[uuid] - n for uuid, n in zip(used, way, strict=True)), reverse=True)
        for way in all_splits(request, used)
    )
    rests = [free[uuid] - (parts[uuid] - taken[uuid]) for uuid in used]
    assert sorted(rests, reverse=True) == largest


@given(requests(healthy=True), placements)
@tried(60)
def test_the_lowest_free_numbers_of_a_card_are_taken_in_order(request, placement):
    answer = ask(request, placement)
    chosen = [vgpu for vgpu in answer.device_ids if vgpu not in request.must_include]
    parts = uuids_of(request.inventory, chosen)
    candidates = set(request.available) - set(request.must_include)
    assert chosen == [
        vgpu
        for card in request.inventory.cards
        for vgpu in [vgpu for vgpu in card.device_ids if vgpu in candidates][: parts[card.gpu.uuid]]
    ]


# What the answer is made of


@given(racing_requests(), placements)
@tried(80)
def test_the_answer_is_as_long_as_asked_or_as_there_is_and_never_shorter_than_must(
    request, placement
):
    answer = ask(request, placement)
    must = known(request)
    at_most = len(must) + sum(free_of(request).values())
    assert len(answer.device_ids) == max(len(must), min(request.size, at_most))


@given(racing_requests(), placements)
@tried(50)
def test_the_answer_starts_with_what_must_be_included_and_repeats_nothing(request, placement):
    answer = ask(request, placement)
    must = known(request)
    assert list(answer.device_ids[: len(must)]) == must
    assert len(set(answer.device_ids)) == len(answer.device_ids)


@given(racing_requests(), placements)
@tried(50)
def test_what_is_added_to_must_is_available_and_healthy(request, placement):
    answer = ask(request, placement)
    added = set(answer.device_ids) - set(known(request))
    assert added <= set(request.available)
    assert all(request.inventory.card_of(vgpu).healthy for vgpu in added)


@given(racing_requests(), placements)
@tried(50)
def test_exactly_the_unknown_and_the_unhealthy_are_passed_over(request, placement):
    answer = ask(request, placement)
    card_of = request.inventory.card_of
    unknown = {vgpu for vgpu in [*request.available, *request.must_include] if not card_of(vgpu)}
    unhealthy = {
        vgpu
        for vgpu in set(request.available) - unknown - set(request.must_include)
        if not card_of(vgpu).healthy
    }
    assert set(answer.passed_over) == unknown | unhealthy


TWO_CARDS = Inventory((Card(a_gpu(0), 2), Card(a_gpu(1), 2)))


def test_an_unknown_id_that_must_be_included_is_named_once():
    answer = prefer(TWO_CARDS, ["gpu-9::0", "gpu-0::0"], ["gpu-9::0", "gpu-9::0"], 1, SPREAD)
    assert answer == Preference(("gpu-0::0",), ("gpu-9::0",))


def test_what_must_be_included_may_be_any_iterable():
    answer = prefer(TWO_CARDS, iter(["gpu-1::1"]), iter(["gpu-9::0", "gpu-0::1"]), 2, SPREAD)
    assert answer == Preference(("gpu-0::1", "gpu-1::1"), ("gpu-9::0",))


def test_an_unhealthy_vgpu_is_passed_over_unless_it_must_be_included():
    ill = Card(a_gpu(0), 2, (Fault(Reason.XID, 0.0, "XID 79"),))
    inventory = Inventory((ill, Card(a_gpu(1), 2)))
    available = ids("gpu-0", 0, 1) + ids("gpu-1", 0)
    assert prefer(inventory, available, [], 3, SPREAD) == Preference(
        ("gpu-1::0",), ("gpu-0::0", "gpu-0::1")
    )
    assert prefer(inventory, available, ["gpu-0::1"], 2, SPREAD) == Preference(
        ("gpu-0::1", "gpu-1::0"), ("gpu-0::0",)
    )


@pytest.mark.parametrize("placement", Placement)
@pytest.mark.parametrize("size", [0, -1, -(2**31)])
def test_a_size_of_nothing_is_answered_with_what_must_be_included(placement, size):
    available = list(TWO_CARDS.device_ids)
    assert prefer(TWO_CARDS, available, [], size, placement).device_ids == ()
    assert prefer(TWO_CARDS, available, ["gpu-1::1"], size, placement).device_ids == ("gpu-1::1",)


@pytest.mark.parametrize("placement", Placement)
@pytest.mark.parametrize("size", [-1, 0, 1, 2])
def test_a_size_below_what_must_be_included_adds_nothing(placement, size):
    assert cards_taken([8, 5], size, placement, must=[3]) == [3, 0]


@pytest.mark.parametrize("placement", Placement)
def test_a_size_beyond_everything_is_answered_with_everything(placement):
    everything = tuple(TWO_CARDS.device_ids)
    assert prefer(TWO_CARDS, everything, [], 2**31 - 1, placement) == Preference(everything, ())


@pytest.mark.parametrize("placement", Placement)
def test_a_node_without_cards_passes_everything_over(placement):
    answer = prefer(Inventory(), ["gpu-0::0"], ["gpu-1::0"], 2, placement)
    assert answer == Preference((), ("gpu-0::0", "gpu-1::0"))


# Same question, same answer


@given(requests(), placements, st.data())
@tried(50)
def test_the_order_in_which_things_are_named_does_not_matter(request, placement, data):
    answer = ask(request, placement)
    shuffled = Request(
        Inventory(tuple(data.draw(st.permutations(request.inventory.cards)))),
        data.draw(st.permutations(request.available)),
        data.draw(st.permutations(request.must_include)),
        request.size,
    )
    again = ask(shuffled, placement)
    must = len(request.must_include)
    assert set(again.device_ids[:must]) == set(answer.device_ids[:must])
    assert again.device_ids[must:] == answer.device_ids[must:]
    assert again.passed_over == answer.passed_over


LIKE_CARDS = """
from vgpu_agent.model.devices import Card, Gpu, Inventory
from vgpu_agent.model.placement import Placement, prefer

gpus = [Gpu(f"gpu-{n}", n, "Model", 2**34, str(n), numa_node=n % 2) for n in range(6)]
inventory = Inventory(tuple(Card(gpu, 4) for gpu in gpus))
for placement in Placement:
    for size in range(25):
        print(prefer(inventory, inventory.device_ids, ["gpu-3::1", "x", "y"], size, placement))
"""


@pytest.mark.slow
def test_the_answer_does_not_depend_on_the_hash_seed():
    repository = str(Path(vgpu_agent.__file__).parent.parent)
    answers = [
        subprocess.run(
            [sys.executable, "-c", LIKE_CARDS],
            env={**os.environ, "PYTHONPATH": repository, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert answers[0].count("\n") == 50
    assert answers[0] == answers[1]


# The rules by example: so many vGPUs are available on each card


def cards_taken(free, size, placement, *, numa=None, must=()):
    """How many vGPUs are taken of each card, where so many are available and must be included."""
    cards = [
        Card(a_gpu(n, numa_node=numa[n] if numa else None), max(10, count))
        for n, count in enumerate(free)
    ]
    inventory = Inventory(tuple(cards))
    available = [vgpu for n, count in enumerate(free) for vgpu in ids(f"gpu-{n}", *range(count))]
    included = [vgpu for n, count in enumerate(must) for vgpu in ids(f"gpu-{n}", *range(count))]
    answer = prefer(inventory, available, included, size, placement)
    parts = uuids_of(inventory, answer.device_ids)
    return [parts[card.gpu.uuid] for card in cards]


def test_spread_takes_the_card_with_the_most_free():
    assert cards_taken([3, 8, 5], 2, SPREAD) == [0, 2, 0]


def test_pack_takes_the_card_with_the_least_free_that_fits():
    assert cards_taken([8, 1, 3, 5], 2, PACK) == [0, 0, 2, 0]


@pytest.mark.parametrize("placement", Placement)
def test_one_card_that_fits_is_better_than_several(placement):
    assert cards_taken([2, 2, 4], 4, placement) == [0, 0, 4]


@pytest.mark.parametrize("placement", Placement)
def test_of_like_cards_the_lowest_index_is_taken(placement):
    assert cards_taken([2, 4, 4], 3, placement) == [0, 3, 0]


@pytest.mark.parametrize("placement", Placement)
def test_the_card_of_what_must_be_included_is_used_up_first(placement):
    assert cards_taken([10, 3, 2], 3, placement, must=[0, 1]) == [0, 3, 0]


def test_spread_gives_even_parts_of_several_cards():
    assert cards_taken([10, 9, 1], 12, SPREAD) == [6, 6, 0]


def test_spread_counts_what_must_be_included_as_part():
    assert cards_taken([5, 10], 6, SPREAD, must=[2]) == [3, 3]
    assert cards_taken([4, 10], 5, SPREAD, must=[3, 1]) == [3, 2]
    assert cards_taken([1, 10], 4, SPREAD, must=[1]) == [1, 3]


def test_spread_takes_the_odd_one_of_the_card_with_the_most_free():
    assert cards_taken([9, 10], 11, SPREAD) == [5, 6]
    assert cards_taken([10, 10], 11, SPREAD) == [6, 5]


def test_pack_empties_the_fullest_card_and_leaves_one_large_rest():
    assert cards_taken([9, 4, 10], 12, PACK) == [8, 4, 0]


def test_pack_leaves_cards_whole_that_it_need_not_touch():
    assert cards_taken([10, 5, 6, 10], 11, PACK) == [0, 5, 6, 0]


@pytest.mark.parametrize("placement", Placement)
def test_like_cards_of_one_numa_node_are_better_than_lower_indices(placement):
    assert cards_taken([4, 4, 4], 8, placement, numa=[0, 1, 1]) == [0, 4, 4]


@pytest.mark.parametrize("placement", Placement)
def test_a_card_beside_what_must_be_included_is_of_its_numa_node(placement):
    assert cards_taken([4, 4, 4], 6, placement, numa=[0, 1, 1], must=[0, 0, 1])[0] == 0


def test_free_vgpus_decide_before_numa_nodes():
    assert cards_taken([9, 10, 10], 12, SPREAD, numa=[0, 0, 1]) == [0, 6, 6]


@pytest.mark.parametrize("placement", Placement)
@pytest.mark.parametrize("size", [2, 3, 4])
def test_cards_that_share_an_index_are_told_apart(placement, size):
    """A card that took the place of a lost one: the lost one stays listed with its old index."""
    inventory = Inventory((Card(a_gpu(0, uuid="old"), 2), Card(a_gpu(0, uuid="new"), 2)))
    answer = prefer(inventory, inventory.device_ids, [], size, placement)
    assert len(set(answer.device_ids)) == size
