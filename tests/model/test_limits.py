from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.model.strategies import a_gpu, a_shared_gpu, inventories, tried
from vgpu_agent.model.holders import Holder, Used
from vgpu_agent.model.limits import (
    NOT_APPLIED,
    Limited,
    LimitsLook,
    Memory,
    MemoryLimit,
    MemorySource,
    Mode,
    differs,
    in_effect,
    is_held_to,
    memory_of,
    shares,
    wanted,
)
from vgpu_agent.model.policy import limits_findings
from vgpu_agent.model.rules import GIB, MIB, MemoryLimits, SharingRules

HOLDER = Holder("shop", "llama-0", "main")


# What a container should have


@given(inventories(fewest=1), st.data())
@tried(60)
def test_a_limit_is_the_share_in_whole_mib_and_all_limits_fit_into_the_gpu(inventory, data):
    of = shares(inventory.gpus)
    owners = data.draw(st.lists(st.integers(0, 3), min_size=1))
    taken: dict[int, list[str]] = {}
    for owner, vgpu in zip(owners, inventory.device_ids, strict=False):
        taken.setdefault(owner, []).append(vgpu)
    limits = [wanted(vgpus, of) for vgpus in taken.values()]
    for shared in inventory.gpus:
        uuid = shared.gpu.uuid
        given = [each[uuid] for each in limits if uuid in each]
        assert all(limit % MIB == 0 for limit in given)
        assert sum(given) <= shared.usable_bytes
    for vgpus, limit in zip(taken.values(), limits, strict=True):
        for uuid, bytes_ in limit.items():
            count = sum(each.startswith(f"{uuid}::") for each in vgpus)
            assert bytes_ <= inventory.find(uuid).share_bytes(count) < bytes_ + MIB


L4 = a_shared_gpu(a_gpu(0, uuid="GPU-a", memory_bytes=10 * GIB), 10)
OF = shares([L4])


@pytest.mark.parametrize(
    ("vgpus", "limits"),
    [
        (["GPU-a::0", "GPU-a::9"], {"GPU-a": 2 * GIB}),
        (["GPU-a::10"], {}),  # it was divided anew since
        (["GPU-a::0", "GPU-a::99"], {}),
        (["GPU-b::0"], {}),  # not known
        (["GPU-a::0", "GPU-b::0"], {"GPU-a": GIB}),
        (["nonsense", "::", "GPU-a::-1"], {}),
        ([], {}),
    ],
)
def test_a_share_that_is_not_known_is_no_limit(vgpus, limits):
    assert wanted(vgpus, OF) == limits


def test_a_gpu_whose_memory_is_not_known_has_no_shares():
    assert shares([replace(L4, usable_bytes=None)]) == {}


@pytest.mark.parametrize(
    ("hard", "soft", "kept", "holds"),
    [
        (GIB, 0, 0, True),
        (GIB + MIB, 0, 0, True),  # rounded
        (GIB - MIB, 0, 0, True),
        (GIB + 2 * MIB, 0, 0, False),
        (GIB // 2, 0, 0, False),
        (None, 0, 0, False),
        (GIB, GIB, 0, False),  # what was kept for another setting
        (GIB, 0, GIB, False),
        (GIB, GIB, GIB, True),
    ],
)
def test_limits_are_in_effect(hard, soft, kept, holds):
    assert in_effect(MemoryLimit(hard, soft, 0), GIB, kept) is holds


# What a look comes to


def limited(problem: str | None = None, **has: MemoryLimit) -> Limited:
    return Limited(HOLDER, has, dict.fromkeys(has, 5), problem)


@pytest.mark.parametrize(
    ("look", "mode", "why"),
    [
        (LimitsLook(), Mode.HOOK, None),
        (LimitsLook(enforced=True), Mode.DRIVER, None),
        (LimitsLook(enforced=True, hook="no"), Mode.DRIVER, None),
        (LimitsLook(hook="not known"), Mode.NONE, "not known"),
        (LimitsLook("too old"), Mode.NONE, "too old"),
        (LimitsLook("too old", enforced=True), Mode.NONE, "too old"),
        (LimitsLook(applied=False), Mode.NONE, NOT_APPLIED),
    ],
)
def test_how_limits_come_about(look, mode, why):
    assert (look.mode, look.why_none) == (mode, why)


@pytest.mark.parametrize(
    ("look", "uuids", "why"),
    [
        (LimitsLook(), ["GPU-a"], None),
        (LimitsLook(gpus={"GPU-b": "MIG"}), ["GPU-a"], None),
        (LimitsLook(gpus={"GPU-b": "MIG"}), ["GPU-a", "GPU-b"], "MIG"),
        (LimitsLook("v1", {"GPU-b": "MIG"}), ["GPU-b"], "v1"),
    ],
)
def test_why_a_container_has_no_limit_by_the_driver(look, uuids, why):
    assert look.why_not(uuids) == why


@pytest.mark.parametrize(
    ("limit", "used", "memory"),
    [
        (MemoryLimit(GIB, 0, 7), Used(1, 9), Memory(7, MemorySource.DRIVER, 5, GIB)),
        (MemoryLimit(None, 0, 0), None, Memory(0, MemorySource.DRIVER, 5, None)),
        (None, Used(1, 9), Memory(9, MemorySource.PROCESSES)),
        (None, Used(1, None), Memory()),
        (None, None, Memory()),
    ],
)
def test_the_driver_knows_a_containers_memory_best(limit, used, memory):
    has = None if limit is None else limited(**{"GPU-a": limit})
    assert memory_of("GPU-a", has, used) == memory
    assert memory_of("GPU-b", has, used).source is not MemorySource.DRIVER


@pytest.mark.parametrize(
    ("wants", "look", "faults"),
    [
        (MemoryLimits.DRIVER, LimitsLook("v1"), {"GPU-a": "v1", "GPU-b": "v1"}),
        (MemoryLimits.DRIVER, LimitsLook(gpus={"GPU-a": "MIG"}), {"GPU-a": "MIG"}),
        (MemoryLimits.DRIVER, LimitsLook(containers=(limited("late"),)), {}),
        (MemoryLimits.DRIVER, LimitsLook(hook="not known", enforced=True), {}),
        (MemoryLimits.AUTO, LimitsLook("v1"), {}),
        (MemoryLimits.OFF, LimitsLook("v1"), {}),
    ],
)
def test_a_gpu_without_limits_is_unhealthy_where_they_are_wanted(wants, look, faults):
    gpus = {name: a_gpu(n, uuid=name) for n, name in enumerate(("GPU-a", "GPU-b"))}
    found = limits_findings(look, gpus, SharingRules(memory_limits=wants))
    assert {uuid: each.detail for uuid, each in found.items()} == faults


def test_a_gpu_without_memory_of_its_own_cannot_have_limits():
    gpu = replace(a_gpu(0, uuid="GPU-a"), memory_bytes=None)
    rules = SharingRules(memory_limits=MemoryLimits.DRIVER)
    assert "how much memory" in limits_findings(LimitsLook(), {"GPU-a": gpu}, rules)["GPU-a"].detail


def test_a_container_with_two_cgroups_is_missing_once():
    wrong = [Limited(HOLDER, problem=why) for why in ("old", "new")]
    other = replace(wrong[0], holder=Holder("shop", "llama-1", "main"))
    assert LimitsLook(containers=(*wrong, other)).missing == (wrong[1], other)


@pytest.mark.parametrize(
    ("hard", "soft", "enforced", "words"),
    [
        (None, 0, True, "has no limit for it instead of 1024 MiB: somebody else"),
        (2 * GIB, 0, False, "has 2048 MiB for it instead of 1024 MiB: the pod sets NVIDIA_GPU_M"),
        (GIB, 512 * MIB, False, "keeps 512 MiB for it instead of 0 MiB: the pod sets NVIDIA_GPU_M"),
        (2 * GIB, GIB, True, "has 2048 MiB for it instead of 1024 MiB"),
    ],
)
def test_what_differs_is_named(hard, soft, enforced, words):
    found = differs(MemoryLimit(hard, soft, 0), GIB, 0, enforced=enforced)
    assert found.startswith(f"the driver {words}")
    assert ("REQUEST" in found) == (not enforced and "keeps" in found)


@pytest.mark.parametrize(
    ("limit", "share", "held"),
    [
        (None, GIB, False),
        (GIB, GIB, True),
        (GIB + MIB, GIB, True),  # as the driver may round it
        (80 * GIB, GIB, False),  # the pod's own
        (GIB, None, True),
    ],
)
def test_a_limit_above_the_share_holds_nobody_to_it(limit, share, held):
    assert is_held_to(limit, share) is held
