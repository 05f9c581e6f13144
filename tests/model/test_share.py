from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.model.strategies import tried
from vgpu_agent.model.devices import Excluded, Gpu
from vgpu_agent.model.share import Divided, Division, Share, divide, fraction, usable_bytes

memory = st.integers(0, 2**40)


@st.composite
def partitions(draw, most=200):
    """The vGPUs of one card in parts, each of which is some container's."""
    n = draw(st.integers(1, most))
    cuts = draw(st.sets(st.integers(1, n - 1))) if n > 1 else set()
    return [Share(end - start, n) for start, end in pairwise([0, *sorted(cuts), n])]


@given(partitions(), memory)
@tried(100)
def test_all_parts_of_a_card_are_what_is_usable_less_a_byte_for_each_at_most(parts, usable):
    assert 0 <= usable - sum(part.memory_bytes(usable) for part in parts) < len(parts)


@given(partitions(), memory, st.integers(0, 2**34))
@tried(100)
def test_fractions_of_all_parts_of_a_card_stay_within_the_usable_fraction(parts, total, reserved):
    usable = usable_bytes(total, reserved, 0)
    ten_thousandths = [round(fraction(part.memory_bytes(usable), total) * 10_000) for part in parts]
    assert sum(ten_thousandths) * total <= usable * 10_000


@given(partitions(most=400))
@tried(100)
def test_percentages_exceed_100_only_by_parts_that_are_worth_less_than_one_percent(parts):
    floored = [part for part in parts if 100 * part.vgpus >= part.of]
    slivers = len(parts) - len(floored)
    assert sum(part.thread_percentage() for part in floored) <= 100
    assert sum(part.thread_percentage() for part in parts) <= 100 + slivers


def test_the_minimum_of_one_percent_breaks_the_sum_from_101_vgpus_on():
    assert sum(Share(1, 100).thread_percentage() for _ in range(100)) == 100
    assert sum(Share(1, 101).thread_percentage() for _ in range(101)) == 101


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
        (1, 9999, 1),
        (199, 9999, 1),
    ],
)
def test_threads_are_the_share_in_percent_rounded_down_and_at_least_one(vgpus, of, percentage):
    assert Share(vgpus, of).thread_percentage() == percentage


@given(st.integers(2, 300), memory, memory)
@example(n=10, usable=99, total=100)
@tried(60)
def test_one_vgpu_more_is_never_worth_less(n, usable, total):
    usable = min(usable, total)
    for fewer, more in pairwise(Share(k, n) for k in range(1, n + 1)):
        assert fewer.memory_bytes(usable) <= more.memory_bytes(usable)
        assert fraction(fewer.memory_bytes(usable), total) <= fraction(
            more.memory_bytes(usable), total
        )
        assert fewer.thread_percentage() <= more.thread_percentage()


@given(st.integers(1, 10_000), memory)
@tried(60)
def test_all_vgpus_of_a_card_are_all_that_is_usable(n, usable):
    whole = Share(n, n)
    assert whole.memory_bytes(usable) == usable
    assert fraction(whole.memory_bytes(usable), usable) == (1.0 if usable else 0.0)
    assert whole.thread_percentage() == 100


def test_the_fraction_is_of_the_whole_card_and_rounded_down_to_four_places():
    assert fraction(Share(1, 3).memory_bytes(900), 1000) == 0.3
    assert fraction(Share(2, 3).memory_bytes(1000), 1000) == 0.666
    assert fraction(Share(2, 3).memory_bytes(10**9), 10**9) == 0.6666


def test_a_card_that_shows_no_memory_has_fraction_zero():
    assert fraction(Share(1, 2).memory_bytes(0), 0) == 0.0


def test_a_share_is_written_as_vgpus_of_vgpus():
    assert str(Share(2, 10)) == "2/10"


@pytest.mark.parametrize(("vgpus", "of"), [(0, 1), (-1, 10), (11, 10), (0, 0), (1, 0), (1, -1)])
def test_what_is_no_part_of_a_card_is_refused(vgpus, of):
    with pytest.raises(ValueError, match=f"of {of} vGPUs, not {vgpus}$"):
        Share(vgpus, of)


@given(memory, memory, memory)
@tried(60)
def test_usable_memory_is_what_neither_driver_nor_server_keep_and_never_negative(
    total, reserved, held_back
):
    usable = usable_bytes(total, reserved, held_back)
    assert usable >= 0
    assert usable + reserved + held_back == max(total, reserved + held_back)


# How a card is divided

GIB = 2**30
NAMES = ["GPU-a", "3", "NVIDIA L4"]
CARD = Gpu("GPU-a", 3, "NVIDIA L4", 24 * GIB, "0000:01:00.0")


@pytest.mark.parametrize(
    ("division", "divided"),
    [
        (Division(10), Divided(10)),
        (Division(10, device_memory=8 * GIB), Divided(3, 8 * GIB)),
        (Division(10, device_memory=8 * GIB, held_back=1), Divided(2, 8 * GIB)),
        (Division(10, device_memory=24 * GIB), Divided(1, 24 * GIB)),
        (
            Division(10, device_memory=GIB // 4, max_clients=48),
            Divided(48, GIB // 4, "96 vGPUs of that size fit; MPS serves 48 clients of a card"),
        ),
        *((Division(10, by_gpu={name: 4, "other": 7}), Divided(4)) for name in NAMES),
        *((Division(10, by_gpu={name: 1}, device_memory=GIB), Divided(1)) for name in NAMES),
        (Division(10, by_gpu={"NVIDIA L4": 2, "3": 3, "GPU-a": 4}), Divided(4)),
        (Division(10, by_gpu={"NVIDIA L4": 2, "3": 3}), Divided(3)),
    ],
)
def test_a_card_is_divided_by_count_or_by_size_unless_it_is_named(division, divided):
    """By UUID, which is more than the index, and that more than the model."""
    assert divide(CARD, division) == divided


def test_a_card_smaller_than_one_vgpu_is_left_out_with_both_sizes():
    left = divide(CARD, Division(10, device_memory=25 * GIB))
    assert isinstance(left, Excluded)
    assert left.reason == "memory"
    assert "24576 MiB" in left.detail
    assert "25600 MiB" in left.detail


def test_a_card_with_no_vgpus_is_left_to_others():
    left = divide(CARD, Division(10, by_gpu={"3": 0}))
    assert isinstance(left, Excluded)
    assert left.reason == "replicas"


@given(st.integers(1, 2**38), st.integers(1, 2**36), st.integers(0, 2**34))
def test_vgpus_of_a_size_never_add_up_to_more_than_is_usable(total, size, held_back):
    gpu = Gpu("GPU-a", 0, "card", total, "0000:01:00.0")
    divided = divide(gpu, Division(10, device_memory=size, held_back=held_back))
    if isinstance(divided, Divided):
        assert divided.replicas * size <= usable_bytes(total, 0, held_back)
        assert divided.replicas >= 1
