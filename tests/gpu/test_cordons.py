"""What must outlive agent and boot: which GPUs are out of service."""

import errno
import json
from collections.abc import Iterator
from contextlib import asynccontextmanager
from dataclasses import asdict
from unittest.mock import Mock

import anyio
import pytest

from tests.gpu.watched import Watched
from tests.test_store import NOT_JSON, NOT_REGULAR, damage
from vgpu_agent import store
from vgpu_agent.errors import StoreError
from vgpu_agent.gpu.cordons import MAX_REASON, Cordons, is_reason, load
from vgpu_agent.gpu.simulated import SimulatedDriver, simulated_gpus
from vgpu_agent.model.facts import Cordon
from vgpu_agent.model.node import MAX_UNLISTED
from vgpu_agent.model.rules import HealthRules, SharingRules

GPUS = simulated_gpus(2, "GPU", 2**34, (0,))
ONE, TWO = (gpu.uuid for gpu in GPUS)
CORDON = Cordon(1_700_000_000.0, "fan")


@pytest.fixture
def directory(kubelet_dir):
    return kubelet_dir / "state" / "cordoned"


@asynccontextmanager
async def agent(directory, **options) -> Iterator[tuple[Watched, Cordons]]:
    """A node that has looked at its GPUs, and at the directory again and again."""
    node = Watched(SimulatedDriver(GPUS), **options)
    cordons = Cordons(directory, node.node, interval=0.01)
    async with anyio.create_task_group() as tasks:
        await tasks.start(cordons.run)
        await node.look()
        yield node, cordons
        tasks.cancel_scope.cancel()


@pytest.mark.parametrize(
    "options",
    [{}, {"health": HealthRules(health_checks=False)}, {"sharing": SharingRules(mps=True)}],
    ids=["health", "no health checks", "no MPS daemon"],
)
async def test_a_cordon_outlives_the_agent_until_it_is_taken_back(directory, options):
    async with agent(directory, **options) as (node, cordons):
        before = node.reasons(ONE)
        await cordons.put(ONE, CORDON)
        assert node.reasons(ONE) == f"{before} cordoned".strip()
        assert node.reasons(TWO) == before
    async with agent(directory, **options) as (node, cordons):
        assert node.snapshot.cordons == {ONE: CORDON}
        assert node.reasons(ONE) == f"{before} cordoned".strip()
        await cordons.remove(ONE)
        assert node.reasons(ONE) == before
    assert load(directory) == {}


async def test_the_end_of_a_fault_is_no_end_of_a_cordon_and_the_other_way_round(directory):
    async with agent(directory, health=HealthRules(recovery_seconds=5)) as (node, cordons):
        await cordons.put(ONE, CORDON)
        await node.xid(ONE, 74)
        await node.look()
        assert node.reasons(ONE) == "xid cordoned"
        await node.prove(15)
        assert node.reasons(ONE) == "cordoned"
        await node.xid(ONE, 74)
        await cordons.remove(ONE)
        assert node.reasons(ONE) == "xid"
        assert node.healthy == [1]


async def test_a_lost_gpu_can_be_cordoned_and_comes_back_cordoned(directory):
    async with agent(directory, health=HealthRules(lost_card_seconds=10)) as (node, cordons):
        node.driver.fall_off(ONE)
        await node.look()
        await node.look(after=20)
        assert node.snapshot.inventory.find(ONE) is None
        await cordons.put(ONE, CORDON)
        node.driver.enumerate_again(ONE)
        await node.look(after=5)
        await node.prove(70)
        assert node.reasons(ONE) == "cordoned"


@pytest.mark.parametrize("what", [*NOT_JSON, *NOT_REGULAR])
async def test_a_damaged_file_loses_the_reason_and_not_the_cordon(directory, what):
    async with agent(directory) as (_, cordons):
        await cordons.put(ONE, CORDON)
    (directory / f"{ONE}.json").unlink()
    damage(directory / f"{ONE}.json", what)
    async with agent(directory) as (node, cordons):
        (fault,) = node.snapshot.inventory.find(ONE).faults
        assert fault.reason == "cordoned"
        assert fault.detail.startswith("why is not known: ")
        assert f"{ONE}.json" in fault.detail
        warnings = [line for line in node.logged() if "why is not known" in line]
        assert len(warnings) == 1
        await cordons.put(ONE, CORDON)
        assert load(directory) == {ONE: CORDON}
        await cordons.remove(ONE)
        assert node.healthy == [0, 1]


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"since": "now", "reason": ""},
        {"since": 1e300, "reason": ""},
        {"since": -1, "reason": ""},
        {"since": float("nan"), "reason": ""},
        {"since": 1, "reason": "a\nb"},
        {"since": 1, "reason": "x" * (MAX_REASON + 1)},
        {"since": 1, "reason": None},
    ],
)
def test_what_a_cordon_cannot_say_is_damage(directory, data):
    directory.mkdir(parents=True)
    (directory / f"{ONE}.json").write_text(json.dumps(data))
    (cordon,) = load(directory).values()
    assert cordon.since > 1e9
    assert f"{ONE}.json is damaged: " in cordon.reason


def test_only_files_of_gpus_are_cordons(directory):
    assert load(directory) == {}  # it is made when it is needed
    directory.mkdir(parents=True)
    for name in (f"{ONE}.json", f".{TWO}.json.new", TWO, "a b.json", f"{'x' * 81}.json"):
        (directory / name).write_text(json.dumps(asdict(CORDON)))
    assert load(directory) == {ONE: CORDON}


@pytest.mark.parametrize("what", ["a file", "too many", "no descriptors"])
async def test_a_directory_that_cannot_be_read_changes_nothing_and_is_said(
    directory, monkeypatch, what
):
    async with agent(directory) as (node, cordons):
        await cordons.put(ONE, CORDON)
        if what == "a file":
            directory.rename(directory.with_name("elsewhere"))
            directory.write_text("")
        elif what == "no descriptors":
            short = Mock(side_effect=OSError(errno.EMFILE, "Too many open files"))
            monkeypatch.setattr(store, "open_regular", short)
        else:
            for number in range(MAX_UNLISTED):
                (directory / f"{number}.json").touch()
        await node.until(lambda: node.snapshot.cordon_error is not None)
        assert str(directory) in node.snapshot.cordon_error
        assert node.reasons(ONE) == "cordoned"
        assert node.healthy == [1]
        assert any("look at VGPU_CORDON_DIRECTORY" in line for line in node.logged())
        if what == "a file":
            directory.unlink()
            directory.with_name("elsewhere").rename(directory)
        elif what == "no descriptors":
            monkeypatch.undo()
        else:
            for number in range(MAX_UNLISTED):
                (directory / f"{number}.json").unlink()
        await node.until(lambda: node.snapshot.cordon_error is None)
        assert node.snapshot.cordons == {ONE: CORDON}
        assert "INFO the cordons are read again" in node.logged()


@pytest.mark.parametrize("uuid", [ONE, "", "../x", "a/b", "a b", "x" * 81])
async def test_what_cannot_be_kept_is_not_cordoned(directory, uuid):
    async with agent(directory) as (node, cordons):
        directory.parent.mkdir(exist_ok=True)
        directory.write_text("")  # where the directory should be
        with pytest.raises(StoreError):
            await cordons.put(uuid, CORDON)
        assert node.snapshot.cordons == {}
        assert node.healthy == [0, 1]


async def test_a_cordon_that_cannot_be_taken_back_stays(directory, monkeypatch):
    async with agent(directory) as (node, cordons):
        await cordons.put(ONE, CORDON)

        def refused(*_: object, **__: object) -> None:
            raise OSError(30, "Read-only file system")

        monkeypatch.setattr("pathlib.Path.unlink", refused)
        with pytest.raises(StoreError, match=r"cannot remove .*: Read-only file system"):
            await cordons.remove(ONE)
        assert node.reasons(ONE) == "cordoned"


@pytest.mark.parametrize(
    ("text", "fits"),
    [("", True), ("fan: 7 °C", True), ("a\tb", False), ("\x1b[2J", False), ("x" * 201, False)],
)
def test_a_reason_is_a_line_that_can_be_shown(text, fits):
    assert is_reason(text) == fits
