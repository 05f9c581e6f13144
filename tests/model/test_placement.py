from collections import Counter
from itertools import chain, combinations, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.model.strategies import Request, a_gpu, ids, racing_requests, requests, tried
from vgpu_agent.model.devices import Inventory, SharedGpu
from vgpu_agent.model.placement import Placement, Preference, prefer

SPREAD, PACK = Placement.SPREAD, Placement.PACK

placements = st.sampled_from(Placement)


def ask(request: Request, placement: Placement) -> Preference:
    return prefer(
        request.inventory, request.available, request.must_include, request.size, placement
    )


def uuids_of(inventory: Inventory, vgpus) -> Counter[str]:
    return Counter(inventory.gpu_of(vgpu).gpu.uuid for vgpu in vgpus)


def known(request: Request) -> list[str]:
    """What must be included and exists, healthy or not."""
    return [i for i in dict.fromkeys(request.must_include) if request.inventory.gpu_of(i)]


def free_of(request: Request) -> dict[str, int]:
    """How many vGPUs of each GPU may be added to those that must be included."""
    candidates = set(request.available) - set(request.must_include)
    return {
        shared.gpu.uuid: sum(vgpu in candidates for vgpu in shared.device_ids)
        if shared.healthy
        else 0
        for shared in request.inventory.gpus
    }


def wanted_beside_must(request: Request) -> int:
    return max(0, min(request.size - len(known(request)), sum(free_of(request).values())))


# The GPUs


def best_gpus(request: Request, placement: Placement) -> set[str]:
    """The order of wishes of the module's docstring, tried on every set of GPUs."""
    free = free_of(request)
    wanted = wanted_beside_must(request)
    gpus = {shared.gpu.uuid: shared.gpu for shared in request.inventory.gpus}
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
@given(request=requests(most=6, replicas=4) | requests(most=6, replicas=12))
@tried(200)
def test_no_other_set_of_gpus_is_better(placement, request):
    answer = ask(request, placement)
    assert set(uuids_of(request.inventory, answer.device_ids)) == best_gpus(request, placement)


# The parts of the GPUs


def all_splits(request: Request, used: list[str]):
    """Every way to take what is wanted from these GPUs, as a number for each."""
    free = free_of(request)
    wanted = wanted_beside_must(request)
    ways = product(*(range(min(free[uuid], wanted) + 1) for uuid in used))
    return [way for way in ways if sum(way) == wanted]


@given(requests(most=4, replicas=5), placements)
@tried(160)
def test_spread_takes_even_parts_and_pack_leaves_the_largest_rest_on_one_gpu(request, placement):
    parts = uuids_of(request.inventory, ask(request, placement).device_ids)
    taken = uuids_of(request.inventory, known(request))
    free = free_of(request)

    def merit(way):
        """The sizes of the parts, or of the rests: of two splits the one with more is better."""
        if placement is SPREAD:
            return sorted(taken[uuid] + n for uuid, n in zip(parts, way, strict=True))
        rests = (free[uuid] - n for uuid, n in zip(parts, way, strict=True))
        return sorted(rests, reverse=True)

    found = [parts[uuid] - taken[uuid] for uuid in parts]
    assert merit(found) == max(map(merit, all_splits(request, list(parts))))


@given(requests(healthy=True), placements)
@tried(60)
def test_the_lowest_free_numbers_of_a_gpu_are_taken_in_order(request, placement):
    answer = ask(request, placement)
    chosen = [vgpu for vgpu in answer.device_ids if vgpu not in request.must_include]
    parts = uuids_of(request.inventory, chosen)
    candidates = set(request.available) - set(request.must_include)
    assert chosen == [
        vgpu
        for shared in request.inventory.gpus
        for vgpu in [vgpu for vgpu in shared.device_ids if vgpu in candidates][
            : parts[shared.gpu.uuid]
        ]
    ]


# What the answer is made of


@given(racing_requests(), placements)
@tried(150)
def test_the_answer_is_must_then_what_is_available_and_healthy_and_names_the_rest(
    request, placement
):
    answer = ask(request, placement)
    must, gpu_of = known(request), request.inventory.gpu_of
    # As long as asked or as there is, and never shorter than must.
    at_most = len(must) + sum(free_of(request).values())
    assert len(answer.device_ids) == max(len(must), min(request.size, at_most))
    assert len(set(answer.device_ids)) == len(answer.device_ids)
    assert list(answer.device_ids[: len(must)]) == must
    added = set(answer.device_ids) - set(must)
    assert added <= set(request.available)
    assert all(gpu_of(vgpu).healthy for vgpu in added)
    # Exactly the unknown and the unhealthy are passed over.
    unknown = {vgpu for vgpu in [*request.available, *request.must_include] if not gpu_of(vgpu)}
    unhealthy = {
        vgpu
        for vgpu in set(request.available) - unknown - set(request.must_include)
        if not gpu_of(vgpu).healthy
    }
    assert set(answer.passed_over) == unknown | unhealthy


TWO_GPUS = Inventory((SharedGpu(a_gpu(0), 2), SharedGpu(a_gpu(1), 2)))


def test_an_unknown_id_that_must_be_included_is_named_once():
    answer = prefer(TWO_GPUS, ["gpu-9::0", "gpu-0::0"], ["gpu-9::0", "gpu-9::0"], 1, SPREAD)
    assert answer == Preference(("gpu-0::0",), ("gpu-9::0",))


def test_what_must_be_included_may_be_any_iterable():
    answer = prefer(TWO_GPUS, iter(["gpu-1::1"]), iter(["gpu-9::0", "gpu-0::1"]), 2, SPREAD)
    assert answer == Preference(("gpu-0::1", "gpu-1::1"), ("gpu-9::0",))


# Same question, same answer


@given(requests(), placements, st.data())
@tried(50)
def test_the_order_in_which_things_are_named_does_not_matter(request, placement, data):
    answer = ask(request, placement)
    shuffled = Request(
        Inventory(tuple(data.draw(st.permutations(request.inventory.gpus)))),
        data.draw(st.permutations(request.available)),
        data.draw(st.permutations(request.must_include)),
        request.size,
    )
    again = ask(shuffled, placement)
    must = len(request.must_include)
    assert set(again.device_ids[:must]) == set(answer.device_ids[:must])
    assert again.device_ids[must:] == answer.device_ids[must:]
    assert again.passed_over == answer.passed_over


# The rules by example: so many vGPUs are available on each GPU


def gpus_taken(free, size, placement, *, numa=None, must=()):
    """How many vGPUs are taken of each GPU, where so many are available and must be included."""
    gpus = [
        SharedGpu(a_gpu(n, numa_node=numa[n] if numa else None), max(10, count))
        for n, count in enumerate(free)
    ]
    inventory = Inventory(tuple(gpus))
    available = [vgpu for n, count in enumerate(free) for vgpu in ids(f"gpu-{n}", *range(count))]
    included = [vgpu for n, count in enumerate(must) for vgpu in ids(f"gpu-{n}", *range(count))]
    answer = prefer(inventory, available, included, size, placement)
    parts = uuids_of(inventory, answer.device_ids)
    return [parts[shared.gpu.uuid] for shared in gpus]


BOTH = tuple(Placement)


@pytest.mark.parametrize(
    ("placements", "free", "size", "more", "taken"),
    [
        pytest.param([SPREAD], [3, 8, 5], 2, {}, [0, 2, 0], id="spread: the most free"),
        pytest.param([PACK], [8, 1, 3, 5], 2, {}, [0, 0, 2, 0], id="pack: the least that fits"),
        pytest.param(BOTH, [2, 2, 4], 4, {}, [0, 0, 4], id="one GPU rather than several"),
        pytest.param(BOTH, [2, 4, 4], 3, {}, [0, 3, 0], id="the lowest index of like GPUs"),
        pytest.param(
            BOTH, [10, 3, 2], 3, {"must": [0, 1]}, [0, 3, 0], id="the GPU of must is used up"
        ),
        pytest.param(BOTH, [8, 5], 2, {"must": [3]}, [3, 0], id="not even room for must"),
        pytest.param([SPREAD], [10, 9, 1], 12, {}, [6, 6, 0], id="spread: even parts"),
        pytest.param([SPREAD], [5, 10], 6, {"must": [2]}, [3, 3], id="spread: must counts as part"),
        pytest.param([SPREAD], [9, 10], 11, {}, [5, 6], id="spread: the odd one of the most free"),
        pytest.param([PACK], [9, 4, 10], 12, {}, [8, 4, 0], id="pack: one large rest"),
        pytest.param([PACK], [10, 5, 6, 10], 11, {}, [0, 5, 6, 0], id="pack: GPUs stay whole"),
        pytest.param(
            BOTH, [4, 4, 4], 8, {"numa": [0, 1, 1]}, [0, 4, 4], id="NUMA node before index"
        ),
        pytest.param(
            [SPREAD], [9, 10, 10], 12, {"numa": [0, 0, 1]}, [0, 6, 6], id="free before NUMA node"
        ),
    ],
)
def test_the_rules_by_example(placements, free, size, more, taken):
    for placement in placements:
        assert gpus_taken(free, size, placement, **more) == taken


@pytest.mark.parametrize("placement", Placement)
@pytest.mark.parametrize("size", [2, 3, 4])
def test_gpus_that_share_an_index_are_told_apart(placement, size):
    """A GPU that took the place of a lost one: the lost one stays listed with its old index."""
    inventory = Inventory((SharedGpu(a_gpu(0, uuid="old"), 2), SharedGpu(a_gpu(0, uuid="new"), 2)))
    answer = prefer(inventory, inventory.device_ids, [], size, placement)
    assert len(set(answer.device_ids)) == size
