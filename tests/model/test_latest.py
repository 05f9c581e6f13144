from itertools import pairwise

import anyio
import pytest
from anyio.lowlevel import checkpoint
from hypothesis import given
from hypothesis import strategies as st

from tests.model.strategies import tried
from vgpu_agent.model.latest import Latest


class Watcher:
    """Follows a value to its end, so many turns of the event loop behind."""

    def __init__(self, latest: Latest[int], turns: int = 0) -> None:
        self.latest = latest
        self.turns = turns
        self.versions: list[int] = []
        self.values: list[int] = []
        self.ended = False
        self.scope = anyio.CancelScope()

    async def follow(self) -> None:
        with self.scope:
            version = 0
            while (newer := await self.latest.newer_than(version)) is not None:
                assert newer > version  # here, or a wrong version would be asked for for ever
                version = newer
                self.versions.append(version)
                self.values.append(self.latest.value)
                await turn(self.turns)
            self.ended = True


async def turn(times: int) -> None:
    for _ in range(times):
        await checkpoint()


SETTLED = 30
"""Turns of the event loop after which the slowest watcher has caught up."""

watchers = st.lists(st.integers(0, 8), min_size=1, max_size=4)
steps = st.lists(
    st.just("publish") | st.integers(0, 3).map(lambda n: ("pause", n)) | st.just("cancel"),
    max_size=12,
)


async def published(latest: Latest[int], watching: list[Watcher], script) -> None:
    """Plays the script: each value is its own version."""
    cancelled = iter(watching)
    for step in script:
        if step == "publish":
            latest.publish(latest.value + 1)
        elif step == "cancel":
            if (watcher := next(cancelled, None)) is not None:
                watcher.scope.cancel()
        else:
            await turn(step[1])


async def played(slowness: list[int], script, *, pause_before_close: int) -> list[Watcher]:
    latest = Latest(0)
    watching = [Watcher(latest, turns) for turns in slowness]
    with anyio.fail_after(10):
        async with anyio.create_task_group() as tasks:
            for watcher in watching:
                tasks.start_soon(watcher.follow)
            await published(latest, watching, script)
            await turn(pause_before_close)
            latest.close()
    return watching


@given(watchers, steps)
@tried(70)
async def test_a_watcher_sees_ever_newer_values_and_if_it_survives_the_final_one_and_the_end(
    slowness, script
):
    final = script.count("publish")
    for watcher in await played(slowness, script, pause_before_close=SETTLED):
        assert all(earlier < later for earlier, later in pairwise(watcher.versions))
        assert watcher.values == watcher.versions
        if not watcher.scope.cancel_called:
            assert watcher.ended
            assert watcher.values[-1:] == ([final] if final else [])


@given(watchers, steps)
@tried(50)
async def test_the_end_reaches_every_watcher_without_a_pause_after_the_last_value(slowness, script):
    final = script.count("publish") + 1
    for watcher in await played(slowness, [*script, "publish"], pause_before_close=0):
        assert watcher.ended or watcher.scope.cancel_called
        assert watcher.latest.value == final


async def test_a_fast_watcher_sees_every_value_and_a_slow_one_skips_to_the_newest():
    fast, slow = await played([0, 6], ["publish", ("pause", 2)] * 9, pause_before_close=SETTLED)
    assert fast.values == list(range(1, 10))
    assert slow.values[-1] == 9
    assert len(slow.values) < 9


async def test_the_first_value_can_be_waited_for_too():
    with anyio.fail_after(1):
        assert await Latest("a").newer_than(-1) == 0


@pytest.mark.parametrize("version", [-1, 0, 1])
async def test_a_watcher_that_comes_after_the_end_is_told_so_and_can_read_the_last_value(version):
    latest = Latest("a")
    latest.publish("b")
    latest.close()
    latest.close()  # it can be told twice
    with anyio.fail_after(1):
        assert await latest.newer_than(version) is None
    assert latest.value == "b"


async def test_nothing_that_is_published_after_the_end_is_told():
    latest = Latest(0)
    latest.publish(1)
    latest.close()
    latest.publish(2)
    with anyio.fail_after(1):
        assert await latest.newer_than(1) is None


async def test_an_iteration_begins_with_the_current_value_and_skips_to_the_newest():
    latest = Latest("a")
    values = latest.follow()
    with anyio.fail_after(1):
        assert await anext(values) == "a"
        latest.publish("b")
        latest.publish("c")
        assert await anext(values) == "c"


async def test_an_iteration_can_begin_after_a_version():
    latest = Latest("not ready")
    values = latest.follow(version=0)
    with anyio.move_on_after(0.02) as waited:
        await anext(values)
    assert waited.cancelled_caught
    latest.publish("ready")
    with anyio.fail_after(1):
        assert await anext(values) == "ready"


async def test_an_iteration_ends_with_the_value_it_follows():
    latest = Latest(0)
    seen = []

    async def follow():
        async for value in latest.follow():
            assert value not in seen
            seen.append(value)
        seen.append("end")

    with anyio.fail_after(1):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(follow)
            await turn(2)
            latest.publish(1)
            await turn(2)
            latest.close()
    assert seen == [0, 1, "end"]
