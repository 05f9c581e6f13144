import errno
import json
import tempfile
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.gpu.watched import Watched
from tests.test_store import NOT_JSON, NOT_REGULAR, damage
from vgpu_agent import store
from vgpu_agent.errors import StoreError
from vgpu_agent.gpu import memory
from vgpu_agent.gpu.memory import FILE, Keeper, Kept
from vgpu_agent.gpu.simulated import SimulatedDriver, simulated_gpus
from vgpu_agent.model.facts import Reading
from vgpu_agent.model.rules import HealthRules
from vgpu_agent.observe.report import to_json
from vgpu_agent.observe.reporting import make_report

GPUS = simulated_gpus(2, "GPU", 2**34, (0,))
ONE, TWO = (gpu.uuid for gpu in GPUS)
UNPROVEN, RESET, REBOOT = 74, 95, 79


class Machine:
    """A node with a state directory, on which one agent runs after the other."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory / "state"
        self.boot = directory / "boot_id"
        self.boot.write_text("first\n")
        self.driver = SimulatedDriver(GPUS)

    @property
    def file(self) -> Path:
        return self.directory / FILE

    @asynccontextmanager
    async def agent(self, **health: object):
        """An agent that has recalled, looked and keeps what it knows, until it is killed."""
        await self.driver.release()
        node = Watched(self.driver, health=HealthRules(**health))
        keeper = Keeper(self.directory, node.node, self.boot, retries=(0.01, 0.02))
        await keeper.recall()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(keeper.run)
            await node.look()
            yield node
            tasks.cancel_scope.cancel()

    async def kept(self, holds) -> None:
        """Waits until what is in the file is so."""
        with anyio.fail_after(5):
            while not holds(self.load()):  # noqa: ASYNC110 - a file tells nobody
                await anyio.sleep(0.005)

    def load(self) -> Kept:
        """What the file holds; nothing where it is damaged."""
        with suppress(StoreError):
            if (found := memory.load(self.directory, store.boot_id(self.boot))) is not None:
                return found
        return Kept("", {}, {}, {})


@pytest.fixture
def machine(tmp_path) -> Machine:
    return Machine(tmp_path)


@pytest.mark.parametrize("xid", [RESET, REBOOT])
async def test_a_gpu_that_waits_for_its_reset_still_does_after_a_restart(machine, xid):
    async with machine.agent() as node:
        await node.xid(ONE, xid)
        await node.xid(TWO, UNPROVEN)
        await machine.kept(lambda kept: list(kept.faults) == [ONE])
        before = node.snapshot.inventory.gpus[0].faults
    for _ in range(2):
        async with machine.agent() as node:
            assert node.snapshot.inventory.gpus[0].faults == before  # with its time and words
            await node.prove(600)
            assert (node.reasons(ONE), node.healthy) == ("xid", [1])
    machine.boot.write_text("second\n")  # a reboot is a reset
    async with machine.agent() as node:
        assert node.healthy == [0, 1]


@pytest.mark.parametrize("how", ["counter", "away", "operator"])
async def test_a_reset_while_no_agent_ran_is_seen_by_the_next(machine, how):
    machine.driver.show(ONE, Reading(energy_millijoules=900))
    async with machine.agent() as node:
        await node.xid(ONE, RESET)
        await machine.kept(lambda kept: kept.faults)
    machine.driver.enumerate_again(ONE)
    machine.driver.show(ONE, Reading(energy_millijoules=3 if how == "counter" else 900))
    if how == "away":
        machine.driver.fall_off(ONE)
    async with machine.agent() as node:
        if how == "away":
            machine.driver.enumerate_again(ONE)
        if how == "operator":
            node.watch.reset_done()
        await node.look(after=5)
        assert "xid" not in node.reasons(ONE) if how == "away" else node.healthy == [0, 1]
        await machine.kept(lambda kept: not kept.faults)


async def test_a_gpu_keeps_its_division_and_the_index_that_names_it_for_the_boot(machine):
    """Fault 5, over a restart of the agent."""
    async with machine.agent() as node:
        await machine.kept(lambda kept: len(kept.first_seen) == 2)
        first = node.snapshot.first_seen
    machine.driver = SimulatedDriver(simulated_gpus(2, "GPU", 2**33, (0,)))
    async with machine.agent() as node:
        assert node.snapshot.first_seen == first
        assert {shared.usable_bytes for shared in node.snapshot.inventory.gpus} == {2**34}


async def test_a_write_that_fails_is_tried_again_until_it_is_done(machine):
    """Fault 3: it counted as saved before it was, and was never tried again."""
    machine.directory.write_text("no directory")
    async with machine.agent() as node:
        await node.xid(ONE, RESET)
        await node.until(lambda: node.snapshot.store_error is not None)
        assert str(machine.file) in node.snapshot.store_error
        await anyio.sleep(0.1)
        machine.directory.unlink()
        await machine.kept(lambda kept: ONE in kept.faults)
        await node.until(lambda: node.snapshot.store_error is None)
        said = [line for line in node.logged() if "state" in line]
        assert [line.partition(" ")[0] for line in said] == ["WARNING", "INFO"]
    async with machine.agent() as node:
        assert node.healthy == [1]


async def test_a_change_that_comes_while_a_write_fails_is_written_as_it_is_then(machine):
    """Fault 3's neighbours: the newest is written, and what needs no writing is no problem."""
    async with machine.agent() as node:
        await machine.kept(lambda kept: len(kept.first_seen) == 2)
        aside = machine.directory.rename(machine.directory.with_name("aside"))
        machine.directory.write_text("no directory")
        await node.xid(ONE, RESET)
        await node.until(lambda: node.snapshot.store_error is not None)
        await node.xid(TWO, RESET)
        machine.driver.enumerate_again(ONE)
        await node.look(after=5)
        machine.directory.unlink()
        await machine.kept(lambda kept: list(kept.faults) == [TWO])
        await node.until(lambda: node.snapshot.store_error is None)
        machine.directory.rename(machine.directory.with_name("again"))
        machine.directory.write_text("no directory")
        await node.xid(ONE, RESET)
        await node.until(lambda: node.snapshot.store_error is not None)
        machine.driver.enumerate_again(ONE)
        await node.look(after=5)
        await node.until(lambda: node.snapshot.store_error is None)
        assert aside.is_dir()


# Damaged files

FAULT = {
    "reason": "xid",
    "since": 1.7e9,
    "detail": "XID 95",
    "effect": "unhealthy until reset",
    "advice": "reset it",
}
SEEN = {"index": 0, "memory_bytes": 2**34, "reserved_bytes": 0}
WHOLE = {
    "boot_id": "first",
    "first_seen": {ONE: SEEN},
    "faults": {ONE: [FAULT]},
    "counters": {ONE: {"energy": 900, "ecc": None}},
}
INFINITE, NOT_A_NUMBER = float("inf"), float("nan")


def fault(**changes: object) -> dict[str, object]:
    return {**WHOLE, "faults": {ONE: [{**FAULT, **changes}]}}


def seen(**changes: object) -> dict[str, object]:
    return {**WHOLE, "first_seen": {ONE: {**SEEN, **changes}}}


WRONG = [
    {"boot_id": "first"},
    {**WHOLE, "faults": []},
    {**WHOLE, "faults": {ONE: FAULT}},
    {**WHOLE, "faults": {ONE: [None]}},
    {**WHOLE, "faults": {ONE: 7}},
    {**WHOLE, "first_seen": None},
    {**WHOLE, "first_seen": {ONE: 7}},
    {**WHOLE, "counters": {ONE: {"energy": "x", "ecc": 0}}},
    {**WHOLE, "counters": {ONE: {"energy": INFINITE, "ecc": 0}}},
    *(fault(reason=each) for each in ("unheard of", None, [], 7)),
    *(fault(effect=each) for each in ("forgiven", None, {})),
    fault(detail=["deep", [{}]]),
    *(fault(since=each) for each in ("today", None, INFINITE, NOT_A_NUMBER, 1e300, -1, [])),
    *(seen(index=each) for each in ("first", INFINITE, NOT_A_NUMBER, [])),
    *(seen(memory_bytes=each) for each in (INFINITE, "16Gi", {})),
]


async def recalled(machine: Machine) -> Watched:
    async with machine.agent() as node:
        report = make_report(node.snapshot, node.rules, 0.0)
        assert to_json(report)
        await machine.kept(lambda kept: len(kept.first_seen) == 2)  # and it is whole again
    return node


@pytest.mark.parametrize("number", range(len(WRONG)))
async def test_a_file_of_wrong_types_is_no_memory_and_said_so(machine, caplog, number):
    machine.directory.mkdir()
    machine.file.write_text(json.dumps(WRONG[number]))
    node = await recalled(machine)
    assert node.healthy == [0, 1]
    assert "are unknown" in caplog.text
    assert str(machine.file) in caplog.text


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)
faults = st.fixed_dictionaries(
    {name: json_values | st.just(value) for name, value in FAULT.items()}
)
files = st.fixed_dictionaries(
    {
        "boot_id": st.just("first"),
        "first_seen": json_values
        | st.dictionaries(
            st.just(ONE),
            st.fixed_dictionaries(
                {
                    "index": json_values | st.integers(0, 9),
                    "memory_bytes": json_values | st.just(2**34),
                    "reserved_bytes": json_values | st.just(0),
                }
            ),
        ),
        "faults": json_values | st.dictionaries(st.just(ONE), st.lists(faults | json_values)),
        "counters": json_values
        | st.dictionaries(
            st.just(ONE), st.fixed_dictionaries({"energy": json_values, "ecc": json_values})
        ),
    }
)


@pytest.mark.slow
@given(files)
@settings(max_examples=150, deadline=None)
def test_whatever_the_file_holds_the_next_agent_starts(content):
    with tempfile.TemporaryDirectory() as directory:
        machine = Machine(Path(directory))
        machine.directory.mkdir()
        machine.file.write_text(json.dumps(content))
        node = anyio.run(recalled, machine)
        assert len(node.snapshot.inventory.gpus) == 2


@pytest.mark.parametrize("how", NOT_JSON + [each for each in NOT_REGULAR if each != "directory"])
async def test_a_damaged_file_is_no_memory_and_is_replaced(machine, caplog, how):
    machine.directory.mkdir()
    damage(machine.file, how)
    assert (await recalled(machine)).healthy == [0, 1]
    assert "are unknown" in caplog.text


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENFILE])
@pytest.mark.parametrize("unread", ["the boot", "the file"])
async def test_a_file_that_cannot_be_read_for_want_of_descriptors_is_waited_for(
    machine, caplog, monkeypatch, unread, code
):
    machine.directory.mkdir()
    machine.file.write_text(json.dumps(WHOLE))
    left = [3]

    def short(real):
        def call(*arguments, **named):
            left[0] -= 1
            if left[0] >= 0:
                raise OSError(code, "Too many open files")
            return real(*arguments, **named)

        return call

    if unread == "the boot":
        monkeypatch.setattr(Path, "read_text", short(Path.read_text))
    else:
        monkeypatch.setattr(store, "open_regular", short(store.open_regular))
    assert (await recalled(machine)).healthy == [1]
    assert [each.getMessage().count("tried again") for each in caplog.records] == [1]


@pytest.mark.parametrize(
    "strange",
    [WHOLE, {**WHOLE, "more": 1}, {**WHOLE, "counters": {}}],
)
async def test_what_can_be_understood_is_recalled(machine, caplog, strange):
    machine.directory.mkdir()
    machine.file.write_text(json.dumps(strange))
    assert (await recalled(machine)).healthy == [1]
    assert caplog.text == ""


async def test_without_health_checks_faults_are_not_recalled(machine):
    machine.directory.mkdir()
    machine.file.write_text(json.dumps(WHOLE))
    async with machine.agent(health_checks=False) as node:
        assert node.healthy == [0, 1]
        assert node.snapshot.first_seen[ONE].index == 0


def test_retries_slow_down():
    assert list(memory.RETRIES) == sorted(memory.RETRIES)
