"""Worker threads and the lanes that share them. No driver is needed for that."""

import threading
import time

import anyio
import anyio.lowlevel
import pytest

from vgpu_agent.gpu.nvml import lanes as lanes_
from vgpu_agent.gpu.nvml.lanes import KEPT, NO_THREAD, PATIENCE, QUEUED, Crew, Lane, Workers


@pytest.fixture
def workers():
    """Threads, of which none is left at the end."""
    before = threading.active_count()
    made = Workers()
    yield made
    made.end()
    until = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < until:
        time.sleep(0.001)
    assert threading.active_count() == before


def crew_of(workers: Workers, count: int) -> list[Lane]:
    crew = Crew(workers)
    return [Lane(workers, crew) for _ in range(count)]


async def all_at_once(*calls):
    async with anyio.create_task_group() as tasks:
        for call in calls:
            tasks.start_soon(call)


async def test_lanes_whose_calls_are_quick_share_one_thread(workers):
    names = []

    async def ask(lane):
        names.append(await lane.run(threading.get_ident, 1))

    lanes = crew_of(workers, 16)
    for _ in range(3):
        await all_at_once(*((lambda lane=lane: ask(lane)) for lane in lanes))
    assert len(names) == 48
    assert len(set(names)) == 1


@pytest.mark.parametrize("hung", [1, 3])
async def test_a_call_that_hangs_has_its_own_thread_and_holds_up_the_others_for_a_moment(
    workers, hung
):
    released = threading.Event()
    *hanging, healthy = crew_of(workers, hung + 1)
    began = time.monotonic()
    async with anyio.create_task_group() as tasks:

        async def hangs(lane):
            with pytest.raises(TimeoutError):
                await lane.run(released.wait, 0.5)

        for lane in hanging:
            tasks.start_soon(hangs, lane)
        await anyio.lowlevel.checkpoint()
        assert await healthy.run(lambda: 7, 0.5) == 7
        assert PATIENCE <= time.monotonic() - began < 0.4
    # The hung thread is still there, and no other is made for its lane.
    before = threading.active_count()
    with pytest.raises(TimeoutError):
        await hanging[0].run(lambda: 8, 0)
    assert threading.active_count() == before
    released.set()
    assert await hanging[0].run(lambda: 9, 5) == 9


async def test_many_slow_calls_in_one_are_none_that_hangs(workers):
    (lane,) = crew_of(workers, 1)

    def slow():
        for step in range(4):
            lane.beat(f"step {step}")
            time.sleep(0.1)
        return lane.doing

    assert await lane.run(slow, 0.3) == "step 3"


async def test_what_a_call_raises_is_raised_where_it_was_asked(workers):
    (lane,) = crew_of(workers, 1)
    with pytest.raises(LookupError, match="gone"):
        await lane.run(lambda: (_ for _ in ()).throw(LookupError("gone")), 1)
    assert await lane.run(lambda: 1, 1) == 1


async def test_a_caller_that_leaves_leaves_the_thread_to_its_call_and_the_turn_to_others(workers):
    released = threading.Event()
    left, other = crew_of(workers, 2)
    with anyio.move_on_after(0.01):
        await left.run(released.wait)
    assert await other.run(lambda: 1, 1) == 1
    with pytest.raises(TimeoutError):
        await left.run(lambda: 2, 0.05)
    released.set()
    assert await left.run(lambda: 3, 5) == 3


async def test_few_idle_threads_are_kept_and_none_after_the_end_until_the_next_call(workers):
    lanes = [Lane(workers) for _ in range(KEPT + 4)]
    before = threading.active_count()
    barrier = threading.Barrier(len(lanes))
    await all_at_once(*((lambda lane=lane: lane.run(barrier.wait, 5)) for lane in lanes))

    async def becomes(count):
        with anyio.fail_after(5):
            while threading.active_count() != before + count:  # noqa: ASYNC110 - threads tell nobody
                await anyio.sleep(0.001)

    await becomes(KEPT)
    workers.end()
    await becomes(0)
    assert await lanes[0].run(lambda: 1, 1) == 1
    await becomes(1)


def no_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)


@pytest.mark.parametrize("crew", [True, False])
async def test_a_call_waits_for_a_thread_as_long_as_it_may_take(workers, monkeypatch, crew):
    lane = Lane(workers, Crew(workers) if crew else None)
    monkeypatch.setattr(lanes_, "PAUSE", 0.01)
    calls = []
    with monkeypatch.context() as patched:
        no_threads(patched)
        with pytest.raises(TimeoutError):
            await lane.run(lambda: calls.append(1), 0.05)
        assert lane.doing == NO_THREAD
    assert await lane.run(lambda: 7, 1) == 7
    assert calls == []  # nobody waits for it any more
    with monkeypatch.context() as patched:
        no_threads(patched)
        assert await lane.run(lambda: 8, 1) == 8  # by a thread that is kept


async def test_without_threads_a_call_that_hangs_holds_up_the_others_of_its_crew_for_a_time(
    workers, monkeypatch
):
    monkeypatch.setattr(lanes_, "QUEUE_SECONDS", 0.1)
    released, (hanging, healthy) = threading.Event(), crew_of(workers, 2)
    with pytest.raises(TimeoutError):
        await hanging.run(released.wait, 0)
    with monkeypatch.context() as patched:
        no_threads(patched)
        with pytest.raises(TimeoutError):
            await healthy.run(lambda: 7, 0)
        assert healthy.doing is QUEUED
        with pytest.raises(TimeoutError):
            await healthy.run(lambda: 8, 0)
    assert await healthy.run(lambda: 9, 5) == 9
    released.set()
    assert await hanging.run(lambda: 10, 5) == 10
