from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.model.strategies import a_gpu, a_shared_gpu, tried
from vgpu_agent.model.devices import Excluded, Gpu
from vgpu_agent.model.rules import MIB, MPS_SERVER_MARGIN, MpsLimits, SharingRules, Threads
from vgpu_agent.model.share import Divided, divide, fraction, thread_percentage

memory = st.integers(0, 2**40)


@st.composite
def partitions(draw, most=200):
    """The vGPUs of one GPU in parts, each of which is some container's."""
    n = draw(st.integers(1, most))
    cuts = draw(st.sets(st.integers(1, n - 1))) if n > 1 else set()
    return [(end - start, n) for start, end in pairwise([0, *sorted(cuts), n])]


@given(partitions(), memory, st.integers(0, 2**34))
@tried(100)
def test_all_parts_of_a_gpu_are_what_is_usable_less_a_byte_for_each_at_most(parts, total, reserved):
    """And their fractions stay within the usable fraction."""
    shared = a_shared_gpu(a_gpu(0, memory_bytes=total, reserved_bytes=reserved), parts[0][1])
    shares = [shared.share_bytes(vgpus) for vgpus, _ in parts]
    assert 0 <= shared.usable_bytes - sum(shares) < len(parts)
    ten_thousandths = [round(fraction(share, total) * 10_000) for share in shares]
    assert sum(ten_thousandths) * total <= shared.usable_bytes * 10_000


@given(partitions(most=400))
@tried(100)
def test_percentages_exceed_100_only_by_parts_that_are_worth_less_than_one_percent(parts):
    floored = [part for part in parts if 100 * part[0] >= part[1]]
    slivers = len(parts) - len(floored)
    assert sum(thread_percentage(*part, Threads.SHARE) for part in floored) <= 100
    assert sum(thread_percentage(*part, Threads.SHARE) for part in parts) <= 100 + slivers


@pytest.mark.parametrize(
    ("vgpus", "of", "percentage"),
    [
        (1, 1, 100),
        (1, 10, 10),
        (2, 10, 20),
        (10, 10, 100),
        (1, 3, 33),
        (2, 3, 66),
        (1, 48, 2),
        (47, 48, 97),
        (1, 60, 1),
        (1, 100, 1),
        (1, 101, 1),
        (199, 9999, 1),
    ],
)
def test_threads_are_the_share_in_percent_rounded_down_and_at_least_one(vgpus, of, percentage):
    assert thread_percentage(vgpus, of, Threads.SHARE) == percentage
    assert thread_percentage(vgpus, of, Threads.NONE) is None


@given(st.integers(2, 300), memory, memory)
@example(n=10, usable=99, total=100)
@tried(60)
def test_one_vgpu_more_is_never_worth_less_and_all_are_all(n, usable, total):
    shared = replace(a_shared_gpu(a_gpu(0, memory_bytes=total), n), usable_bytes=min(usable, total))
    for k in range(1, n):
        assert shared.share_bytes(k) <= shared.share_bytes(k + 1)
        less, more = (thread_percentage(vgpus, n, Threads.SHARE) for vgpus in (k, k + 1))
        assert less <= more
    assert shared.share_bytes(n) == shared.usable_bytes
    assert thread_percentage(n, n, Threads.SHARE) == 100


@pytest.mark.parametrize(
    ("part", "total", "expected"),
    [
        (300, 1000, 0.3),
        (666, 1000, 0.666),
        (2 * 10**9 // 3, 10**9, 0.6666),
        (7, 7, 1.0),
        (0, 0, 0.0),
    ],
)
def test_the_fraction_is_of_the_whole_gpu_and_rounded_down_to_four_places(part, total, expected):
    assert fraction(part, total) == expected


# How a GPU is divided

GIB = 2**30
NAMES = ["GPU-a", "3", "NVIDIA L4"]
GPU = Gpu("GPU-a", 3, "NVIDIA L4", 24 * GIB, "0000:01:00.0", compute_capability=(8, 9))
PLAIN = SharingRules(mps=False)
ALL = 24 * GIB


SIXTY = Divided(
    60, ALL, note="a vGPU of it has only 409 MiB, of which a CUDA context takes hundreds"
)


def test_mps_of_cuda_13_1_serves_more_clients():
    newer = replace(GPU, mps_contexts=60)
    assert divide(newer, SharingRules(replicas=60, memory_reserved=0)) == SIXTY


def by(replicas_by_gpu, **rules) -> SharingRules:
    return replace(PLAIN, replicas_by_gpu=replicas_by_gpu, **rules)


@pytest.mark.parametrize(
    ("rules", "divided"),
    [
        (PLAIN, Divided(10, ALL)),
        (replace(PLAIN, memory_reserved=GIB), Divided(10, 23 * GIB)),
        (SharingRules(), Divided(10, ALL - MPS_SERVER_MARGIN)),
        (SharingRules(memory_reserved=GIB), Divided(10, 23 * GIB)),
        (replace(PLAIN, device_memory=8 * GIB), Divided(3, ALL, 8 * GIB)),
        (replace(PLAIN, device_memory=8 * GIB, memory_reserved=1), Divided(2, ALL - 1, 8 * GIB)),
        (replace(PLAIN, device_memory=ALL), Divided(1, ALL, ALL)),
        (
            SharingRules(device_memory=GIB // 4, memory_reserved=0),
            Divided(48, ALL, GIB // 4, "96 vGPUs of that size fit; MPS serves 48 clients of a GPU"),
        ),
        (
            SharingRules(device_memory=2 * GIB, memory_reserved=0, mps_max_clients=5),
            Divided(5, ALL, 2 * GIB, "12 vGPUs of that size fit; MPS serves 5 clients of a GPU"),
        ),
        (
            SharingRules(replicas=60, memory_reserved=0),
            Divided(48, ALL, note="48 vGPUs instead of 60: MPS serves 48 clients of a GPU"),
        ),
        (SharingRules(replicas=60, memory_reserved=0, mps_max_clients=60), SIXTY),
        (replace(PLAIN, replicas=60), Divided(60, ALL)),
        *((by({name: 4, "other": 7}), Divided(4, ALL)) for name in NAMES),
        *((by({name: 1}, device_memory=GIB), Divided(1, ALL)) for name in NAMES),
        (by({"NVIDIA L4": 2, "3": 3, "GPU-a": 4}), Divided(4, ALL)),
        (by({"NVIDIA L4": 2, "3": 3}), Divided(3, ALL)),
    ],
)
def test_a_gpu_is_divided_by_count_or_by_size_unless_it_is_named(rules, divided):
    """By UUID, which is more than the index, and that more than the model."""
    assert divide(GPU, rules) == divided


@pytest.mark.parametrize(("mps", "noted"), [(True, True), (False, False)])
def test_a_small_vgpu_is_noted_where_every_process_has_a_context_in_it(mps, noted):
    rules = SharingRules(mps=mps, replicas=48, memory_reserved=0)
    note = f"a vGPU of it has only {24 * 1024 // 48} MiB, of which a CUDA context takes hundreds"
    assert divide(GPU, rules).note == (note if noted else None)
    assert divide(GPU, replace(rules, replicas=24)).note is None


def test_settings_name_a_gpu_by_the_index_that_it_had_first():
    rules = by({"3": 2, "5": 7})
    assert divide(GPU, rules, index=5).replicas == 7
    assert divide(GPU, rules, index=-1).replicas == 10


OLD = replace(GPU, compute_capability=(6, 1))
SHARED = replace(GPU, memory_bytes=None)  # memory of the host's


@pytest.mark.parametrize(
    ("gpu", "rules", "cdi_names", "reason", "words"),
    [
        (replace(GPU, mig=True), PLAIN, None, "mig", ["nvidia-smi -i 3 -mig 0"]),
        (OLD, SharingRules(), None, "compute-capability", ["6.1 is below 7.0", "time-slicing"]),
        (GPU, PLAIN, (), "cdi", ["nvidia.com/gpu=GPU-a", "nvidia-ctk cdi generate"]),
        (GPU, by({"3": 0}), None, "replicas", ["leaves this GPU to others"]),
        (GPU, replace(PLAIN, device_memory=25 * GIB), None, "memory", ["24576 MiB", "25600 MiB"]),
        (
            GPU,
            replace(PLAIN, memory_reserved=25 * GIB),
            None,
            "memory",
            ["0 bytes", "MEMORY_RESERVED"],
        ),
        (replace(GPU, memory_bytes=0), PLAIN, None, "memory", ["0 bytes"]),
        (replace(GPU, memory_bytes=10 * MIB - 1), PLAIN, None, "memory", ["1 MiB for each of 10"]),
        (SHARED, replace(PLAIN, device_memory=GIB), None, "memory", ["VGPU_DEVICE_MEMORY"]),
        *(
            (SHARED, SharingRules(mps_limits=limits), None, "memory", [f"VGPU_MPS_LIMITS={limits}"])
            for limits in (MpsLimits.CLIENT, MpsLimits.SERVER)
        ),
    ],
)
def test_a_gpu_that_is_not_shared_is_excluded_with_what_to_do(gpu, rules, cdi_names, reason, words):
    excluded = divide(gpu, rules, cdi_names=cdi_names)
    assert isinstance(excluded, Excluded)
    assert (excluded.gpu, excluded.reason) == (gpu, reason)
    assert all(each in excluded.detail for each in words)


def test_what_only_some_ways_of_sharing_require_excludes_nothing_elsewhere():
    assert divide(OLD, PLAIN) == Divided(10, ALL)
    assert divide(replace(GPU, compute_capability=None), SharingRules()).replicas == 10
    assert divide(GPU, PLAIN, cdi_names=["0", "GPU-a"]) == Divided(10, ALL)
    assert divide(replace(GPU, memory_bytes=10 * MIB), PLAIN) == Divided(10, 10 * MIB)
    for rules in (PLAIN, by({"3": 1}, device_memory=GIB), SharingRules(mps_limits=MpsLimits.NONE)):
        assert divide(SHARED, rules) == Divided(1 if rules.device_memory else 10, None)


@given(st.integers(1, 2**38), st.integers(1, 2**36), st.integers(0, 2**34), st.booleans())
def test_vgpus_of_a_size_never_add_up_to_more_than_is_usable(total, size, reserved, mps):
    gpu = replace(GPU, memory_bytes=total)
    divided = divide(gpu, SharingRules(mps=mps, device_memory=size, memory_reserved=reserved))
    if isinstance(divided, Divided):
        assert divided.replicas * size <= divided.usable_bytes <= max(0, total - reserved)
        assert divided.replicas >= 1
    else:
        assert max(0, total - reserved) // MIB <= size // MIB
