"""The two files between agent and enforcer, and what both make of them."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, replace
from pathlib import Path

import anyio
import pytest

from tests.limits.test_look import GIB, SHARES, A, B, Machine
from vgpu_agent.errors import DriverError, StoreError
from vgpu_agent.limits import watch
from vgpu_agent.limits.watch import STALE, Enforced, Enforcer, Paced, Seen, Wanted, said
from vgpu_agent.model.devices import Inventory
from vgpu_agent.model.holders import Holder
from vgpu_agent.model.limits import Limited, LimitsLook, MemoryLimit, Mode
from vgpu_agent.model.snapshot import Driver, Snapshot
from vgpu_agent.store import Said, since_boot

UP = Snapshot(driver=Driver("615.71", None), inventory=Inventory((A, B)))
RELEASED = replace(UP, driver=Driver("615.71", "released", released_until=2.0**33))


def write(directory: Path, word: Wanted | Seen) -> None:
    said(type(word), directory).say(asdict(word), word)


def path_of(kind: type[Wanted | Seen], directory: Path) -> Path:
    return directory / f"limits-{kind.__name__.lower()}"


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


@asynccontextmanager
async def enforcing(machine: Machine) -> AsyncIterator[Enforcer]:
    enforcer = Enforcer(machine.looker(enforce=True), machine.root, poll=0.02)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(enforcer.run)
        yield enforcer
        tasks.cancel_scope.cancel()


async def test_nothing_is_said_of_an_enforcer_that_starts_with_the_agent(machine):
    assert await Enforced(machine.root, patience=60).look(UP) is None


async def becomes(source: Enforced, snapshot: Snapshot, holds) -> LimitsLook:
    found = None
    with anyio.move_on_after(5):
        while True:
            found = await source.look(snapshot)
            if holds(found):
                return found
            await anyio.sleep(0.02)
    raise AssertionError(f"not so within 5 s: {found}")


async def test_the_agent_says_what_is_wanted_and_the_enforcer_what_is(machine):
    path = machine.start(1)
    machine.give(1, "GPU-0::1")
    source = Enforced(machine.root, patience=0)
    assert "`limits`" in (await source.look(UP)).error
    async with enforcing(machine):
        look = await becomes(source, UP, lambda look: look.containers)
        assert look.mode is Mode.DRIVER
        assert look.containers[0].limits == {"GPU-0": MemoryLimit(GIB, 0, 0)}
        # A container that starts while it runs.
        machine.start(2)
        machine.give(2, "GPU-1::7")
        await becomes(source, UP, lambda look: len(look.containers) == 2)
        # Fewer vGPUs of each GPU than before: each is worth more.
        halved = replace(UP, inventory=Inventory((replace(A, replicas=5), B)))
        await becomes(
            source,
            halved,
            lambda look: look.containers[0].limits.get("GPU-0") == MemoryLimit(2 * GIB, 0, 0),
        )
        assert machine.driver.limits["GPU-0", path].hard_bytes == 2 * GIB


async def test_an_enforcer_that_is_not_heard_of_is_gone(machine, monkeypatch):
    source = Enforced(machine.root, patience=0)
    await source.look(UP)
    async with enforcing(machine):
        await becomes(source, UP, lambda look: look.mode is Mode.DRIVER)
    assert (await source.look(UP)).mode is Mode.DRIVER  # for a moment nobody minds
    now = since_boot()
    monkeypatch.setattr(watch, "since_boot", lambda: now + STALE + 1)
    assert "not heard of" in (await source.look(UP)).error
    # And one that is back is there again.
    async with enforcing(machine):
        await becomes(source, UP, lambda look: look.mode is Mode.DRIVER)


async def test_nvml_is_closed_while_gpus_are_released(machine, monkeypatch):
    calls = []

    async def scan(**_: float) -> None:
        calls.append("scan")

    async def release() -> bool:
        calls.append("release")
        return True

    monkeypatch.setattr(machine.driver, "scan", scan)
    monkeypatch.setattr(machine.driver, "release", release)
    source = Enforced(machine.root, patience=0)
    await source.look(UP)
    async with enforcing(machine):
        await becomes(source, UP, lambda look: look.mode is Mode.DRIVER)
        await source.look(RELEASED)
        await anyio.sleep(0.2)
        assert calls == ["scan", "release"]
        # What was seen stays true; the agent says itself that GPUs are released.
        assert (await source.look(RELEASED)).mode is Mode.DRIVER
        await source.look(UP)
        await anyio.sleep(0.5)
    assert calls[:3] == ["scan", "release", "scan"]


async def test_nvml_is_closed_also_when_a_gpu_does_not_answer(machine, monkeypatch):
    """It is the one that is to be reset."""
    released = anyio.Event()

    async def release() -> bool:
        released.set()
        return True

    monkeypatch.setattr(machine.driver, "release", release)
    machine.driver.word = {"GPU-1": "MIG"}
    source = Enforced(machine.root, patience=0)
    await source.look(UP)
    machine.start(1)
    machine.give(1, "GPU-1::1")  # which has no limit: every poll looks, and would scan again
    async with enforcing(machine):
        await becomes(source, UP, lambda look: look.gpus)
        await source.look(RELEASED)
        with anyio.fail_after(5):
            await released.wait()


async def test_an_enforcer_that_starts_while_gpus_are_released_says_so(machine):
    source = Enforced(machine.root, patience=0)
    await source.look(RELEASED)
    async with enforcing(machine):
        await becomes(source, RELEASED, lambda look: "NVML is released" in (look.error or ""))
        await becomes(source, UP, lambda look: look.mode is Mode.DRIVER)


@pytest.mark.parametrize("beat", [STALE + 1, -1.0, -1e6])
async def test_what_was_said_long_ago_or_before_the_boot_is_not_believed(machine, beat):
    write(machine.root, Seen(since_boot() - beat, LimitsLook(enforced=True)))
    assert "not heard of" in (await Enforced(machine.root, patience=0).look(UP)).error


@pytest.mark.parametrize("text", ['{"format": 2}', '{"format": 1, "beat": 5.0, "look": {}}', "{"])
async def test_what_another_version_left_is_no_fault_while_this_one_starts(machine, text):
    path_of(Seen, machine.root).write_text(text)
    source = Enforced(machine.root, patience=60)
    assert await source.look(UP) is None
    async with enforcing(machine):
        await becomes(source, UP, lambda look: look is not None and look.error is None)


async def test_an_error_that_cannot_be_written_is_logged_once(machine, monkeypatch, caplog):
    def full(*_: object) -> None:
        raise StoreError("cannot write limits-seen: No space left on device")

    async with enforcing(machine):
        monkeypatch.setattr(Said, "say", full)
        caplog.clear()
        machine.checkpoint.write_text("garbage")
        await anyio.sleep(0.3)
    assert len(caplog.records) <= 2


async def test_a_driver_that_does_not_start_is_said(machine, monkeypatch):
    async def scan(**_: float) -> None:
        raise DriverError("no library")

    monkeypatch.setattr(machine.driver, "scan", scan)
    source = Enforced(machine.root, patience=0)
    await source.look(UP)
    async with enforcing(machine):
        await becomes(source, UP, lambda look: look.error == "no library")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 1}', '{"format": 2}'])
async def test_a_damaged_file_is_said_and_written_again(machine, text):
    source = Enforced(machine.root, patience=0)
    await source.look(UP)
    path_of(Seen, machine.root).write_text(text)
    assert (await source.look(UP)).error.startswith(str(machine.root / "limits-seen"))
    path_of(Wanted, machine.root).write_text(text)
    async with enforcing(machine):
        await becomes(source, UP, lambda look: look.mode is Mode.DRIVER)


def test_another_version_of_a_file_is_not_read(tmp_path):
    write(tmp_path, replace(Wanted(SHARES), format=99))
    with pytest.raises(StoreError, match="another version"):
        said(Wanted, tmp_path).read()


def test_what_is_written_is_read(tmp_path):
    limited = Limited(
        Holder("shop", "pod-1", "main"),
        {"GPU-0": MemoryLimit(None, 0, 5)},
        {"GPU-0": 9},
        "no",
    )
    for word in (
        Wanted({"GPU-0": (1, 2)}, 5.0),
        Seen(7.0, LimitsLook(gpus={"GPU-1": "MIG"}, hook="x", containers=(limited,))),
    ):
        write(tmp_path, word)
        assert said(type(word), tmp_path).read() == word


def test_a_word_of_many_containers_is_read_too(tmp_path):
    uuids = [f"GPU-{n:08x}-5151-4d4d-8000-{n:012x}" for n in range(8)]
    many = tuple(
        Limited(
            Holder("shop", f"pod-{n}", "main"),
            dict.fromkeys(uuids, MemoryLimit(GIB, 0, 5)),
            dict.fromkeys(uuids, 9),
            "no dmem files " * 70,
        )
        for n in range(1000)
    )
    word = Seen(7.0, LimitsLook(containers=many))
    write(tmp_path, word)
    assert path_of(Seen, tmp_path).stat().st_size > 2 * 2**20
    assert said(Seen, tmp_path).read() == word


async def test_the_agents_own_look_is_repeated_where_something_changed(machine):
    machine.start(1)
    machine.give(1, "GPU-0::1")
    look = Paced(machine.looker()).own_look
    # Nothing waits for a driver that is away.
    assert (await look(RELEASED)).error == "released"
    assert await look(replace(RELEASED, limits=LimitsLook())) is None
    first = await look(UP)
    assert len(first.containers) == 1
    machine.now += 6  # it has no limit
    assert await look(UP) is not None
    machine.now += 6  # which is old by now
    assert await look(UP) is None
    await anyio.sleep(0.01)  # time stamps of files are coarse
    machine.start(2)
    assert await look(UP) is not None
    machine.now += 20
    assert await look(UP) is not None


async def test_a_node_that_cannot_have_limits_is_looked_at_rarely(machine):
    machine.driver.word = dict.fromkeys(SHARES, "too old")
    look = Paced(machine.looker()).own_look
    assert (await look(UP)).error == "too old"
    machine.driver.word = {}
    machine.start(1)
    looks = []
    for _ in range(6):
        machine.now += 12
        looks.append(await look(UP))
    assert [each is not None for each in looks] == [False, False, False, False, True, True]


async def test_a_node_of_one_gpu_that_does_not_answer_for_a_moment_is_soon_looked_at(machine):
    """That is not what the driver cannot do: of this word all its vGPUs are unhealthy."""
    answers = machine.driver.memory_limits

    async def silent(*_: object) -> dict[str, MemoryLimit]:
        return {}

    machine.driver.memory_limits = silent
    paced, of = Paced(machine.looker(enforce=True)), {"GPU-0": SHARES["GPU-0"]}
    assert "NVML does not answer" in (await paced.look(of)).error
    machine.driver.memory_limits = answers
    assert await paced.look(of) is None
    machine.now += 10
    assert (await paced.look(of)).error is None
    machine.now += 12
    assert await paced.look(of) is None


async def test_a_checkpoint_that_cannot_be_read_is_looked_at_when_it_is_another(machine):
    paced = Paced(machine.looker())
    machine.checkpoint.write_text("garbage")
    assert "is no checkpoint" in (await paced.look(SHARES)).error
    machine.write()
    assert (await paced.look(SHARES)).error is None


async def test_after_a_sign_it_is_looked_twice(machine):
    """A container whose link comes in the same tick of the clock leaves no sign."""
    looker = machine.looker(enforce=True)
    looker.finder.signs = lambda: "the same"
    paced = Paced(looker)
    machine.give(1, "GPU-0::1")
    assert (await paced.look(SHARES)).containers == ()
    machine.start(1)
    assert await paced.look(SHARES) is None
    machine.now += 1
    assert len((await paced.look(SHARES)).containers) == 1
    machine.now += 1
    assert await paced.look(SHARES) is None


async def test_a_word_that_is_written_while_the_agent_looks_is_believed(machine, monkeypatch):
    source = Enforced(machine.root, patience=0)
    say = source._wanted.say

    def slowly(*word: object) -> None:
        say(*word)
        write(machine.root, Seen(since_boot(), LimitsLook(enforced=True)))

    monkeypatch.setattr(source._wanted, "say", slowly)
    assert (await source.look(UP)).error is None
