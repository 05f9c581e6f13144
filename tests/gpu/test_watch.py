from collections.abc import Sequence
from dataclasses import replace
from math import inf

import anyio
import pytest

from tests.gpu.watched import WALL, Watched
from vgpu_agent.errors import DriverError, DriverHangsError, DriverLibraryError
from vgpu_agent.gpu.simulated import SimulatedDriver, simulated_gpus
from vgpu_agent.model.devices import Effect, Excluded, Fault, Gpu, Reason
from vgpu_agent.model.facts import GpuEvent, Reading, Scan
from vgpu_agent.model.policy import judge_xid
from vgpu_agent.model.rules import HealthRules

GPUS = simulated_gpus(2, "NVIDIA Simulated 24GB", 24 * 2**30, (0, 1))
ONE, TWO = (gpu.uuid for gpu in GPUS)
APPLICATION, UNPROVEN, RESET, REBOOT, UNKNOWN = 13, 74, 95, 79, 999


@pytest.fixture
def driver() -> "Moody":
    return Moody(GPUS)


@pytest.fixture
async def node(driver) -> Watched:
    """Its two GPUs were looked at once."""
    node = Watched(driver)
    await node.look()
    node.lines.clear()
    return node


class Moody(SimulatedDriver):
    """Also fails to say its events, or hangs in its look at all GPUs."""

    events_error: str | None = None
    scan_hangs = False
    returned: frozenset[str] = frozenset()
    undescribed: tuple[Excluded, ...] = ()
    lost: tuple[Excluded, ...] = ()
    scans = waits = 0

    async def scan(self, limit: float = 3, patience: float = inf) -> Scan:
        self.scans += 1
        if self.scan_hangs:
            await self.release()  # the session is being opened again
            raise DriverHangsError(f"NVML did not answer within {limit:g} s")
        found = await super().scan(limit, patience)
        lost = [each.gpu.uuid for each in self.lost]
        return replace(
            found,
            gpus=tuple(gpu for gpu in found.gpus if gpu.uuid not in lost),
            returned=self.returned,
            undescribed=self.undescribed,
            lost=self.lost,
        )

    async def next_events(self) -> Sequence[GpuEvent]:
        self.waits += 1
        if self.events_error is not None:
            raise DriverError(self.events_error)
        return await super().next_events()

    def show_counter(self, uuid: str, energy: int) -> None:
        self.show(uuid, Reading(energy_millijoules=energy))


# The first look


async def test_the_first_look_finds_the_gpus_and_says_so(driver):
    driver.fail_probes(TWO, "Unknown Error")
    node = Watched(driver)
    await node.look()
    assert (node.healthy, node.snapshot.driver.version) == ([0], "simulated")
    assert [line.partition(". Next: ")[0] for line in node.logged()] == [
        "INFO driver simulated answers",
        "INFO advertising 10 vGPUs",
        "INFO advertising 10 vGPUs",
        "WARNING 10 vGPUs are unhealthy: probe: Unknown Error",
    ]
    assert len(node.published) == 1  # never Healthy in between
    for _ in range(20):
        await node.look(after=5)
    assert node.logged() == []


async def test_a_machine_without_gpus_is_a_state_and_no_error():
    node = Watched(SimulatedDriver(()))
    await node.look()
    await node.xid(None, RESET)
    assert (node.snapshot.driver.up, node.snapshot.inventory.gpus) == (True, ())
    assert node.snapshot.xids == {(None, RESET): 1}
    assert node.logged() == ["INFO driver simulated answers"]


# XIDs


@pytest.mark.parametrize(
    ("uuid", "xid", "healthy"),
    [
        (ONE, APPLICATION, [0, 1]),
        (None, APPLICATION, [0, 1]),
        (ONE, UNPROVEN, [1]),
        (ONE, RESET, [1]),
        (TWO, REBOOT, [0]),
        (ONE, UNKNOWN, [1]),
        (None, RESET, []),
        ("GPU-of-somebody-else", RESET, [0, 1]),
    ],
)
async def test_an_xid_is_counted_and_marks_the_gpus_that_it_concerns(node, uuid, xid, healthy):
    node.now = 7
    await node.xid(uuid, xid)
    finding = judge_xid(xid, node.rules.health)
    assert (node.healthy, node.snapshot.xids) == (healthy, {(uuid, xid): 1})
    marked = [shared for shared in node.snapshot.inventory.gpus if not shared.healthy]
    for shared in marked:
        rule = finding.rule
        fault = Fault(Reason.XID, WALL + 7, finding.detail, rule.effect)
        assert shared.faults == (fault,)
    if finding.rule.effect is Effect.COUNT:
        which = "of an unknown GPU, " if uuid is None else ""
        assert node.logged() == [f"INFO {finding.detail}: {which}counted"]
    else:
        said = f"WARNING 10 vGPUs are unhealthy: xid: {finding.detail}. Next: "
        said += f"{finding.rule.remedy.words}: kubectl "
        assert [line[: len(said)] for line in node.logged()] == [said] * len(marked)
    await node.xid(uuid, xid)
    assert node.snapshot.xids == {(uuid, xid): 2}
    assert not marked or node.logged() == []  # the same again is no news


# Resets and returns


async def test_a_gpu_that_falls_off_and_returns_has_to_be_proven_good(node, driver):
    vgpus = list(node.snapshot.inventory.device_ids)
    driver.xid(ONE, REBOOT, falls_off_the_bus=True)
    await node.watch.take_events()
    await node.look(after=5)
    assert node.reasons(ONE) == "xid lost"
    await node.prove(300)
    driver.enumerate_again(ONE)
    await node.look(after=5)
    assert node.reasons(ONE) == "lost"
    await node.prove(55)
    assert node.healthy == [1]
    await node.prove(5)
    assert node.healthy == [0, 1]
    assert list(node.snapshot.inventory.device_ids) == vgpus
    assert [line.partition("unhealthy: ")[2].partition(":")[0] for line in node.logged()] == [
        "xid",
        "xid",
        "lost",
        "",
    ]


async def test_a_reset_between_two_looks_is_seen_by_the_lost_handle(node, driver):
    await node.xid(ONE, RESET)
    await node.look(after=5)
    driver.enumerate_again(ONE)
    await node.look(after=5)
    assert node.healthy == [0, 1]


@pytest.mark.parametrize(
    ("reading", "reasons"),
    [
        (Reading(remap_failed=True), "remap"),
        (Reading(recovery_action=1), "recovery-action"),
        (Reading(error="still bad"), "xid probe"),
    ],
)
async def test_what_still_stands_after_a_reset_is_read_before_anything_ends(
    node, driver, reading, reasons
):
    """Fault 13: what a reset ends was ended before the new handle was probed."""
    await node.xid(ONE, RESET)
    driver.show(ONE, reading)
    await node.look(after=5)
    driver.enumerate_again(ONE)
    driver.show(ONE, reading)
    node.published.clear()
    await node.look(after=5)
    assert node.reasons(ONE) == reasons
    assert all(not after.inventory.gpus[0].healthy for _, after in node.published)


async def test_an_xid_that_arrives_after_the_return_and_before_the_look_survives(node, driver):
    """Fault 14: the look that noticed the return wiped it as older than that."""
    await node.look(after=5)
    driver.enumerate_again(ONE)
    node.now += 1
    await node.xid(ONE, RESET)
    await node.look(after=4)
    await node.prove(300)
    assert node.reasons(ONE) == "xid"
    # Away, back, and an XID again before the look that sees it.
    driver.fall_off(ONE)
    await node.look(after=5)
    driver.enumerate_again(ONE)
    node.now += 1
    await node.xid(ONE, RESET)
    await node.look(after=4)
    assert node.reasons(ONE) == "xid lost"


# Releases


async def release(node: Watched, *, seconds: float, then=lambda: None) -> None:
    """NVML is closed for so long, by the tasks of the agent; `then` happens meanwhile."""
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(node.watch._release)
        await node.until(lambda: node.snapshot.driver.released_until is not None)
        then()
        end = node.watch._release_until
        await node.until(lambda: node.snapshot.driver.released_until == WALL + end)
        node.now += seconds
        node.watch._release_changed.set()
    await node.look()


@pytest.mark.parametrize("twice", [False, True], ids=["once", "again meanwhile"])
@pytest.mark.parametrize("counter", [None, 5])
async def test_a_release_without_a_reset_ends_nothing(node, driver, twice, counter):
    """Fault 1: a second request ended the first early, and XID 95 was over without a reset."""
    driver.show(ONE, Reading(energy_millijoules=counter))
    await node.look()
    await node.xid(ONE, RESET)
    node.watch.release(60)

    def meanwhile() -> None:
        until = node.snapshot.driver.released_until
        node.now += 30
        if twice:
            node.watch.release(60)
            node.watch.release(1)  # never shorter
        assert until == WALL + 60

    await release(node, seconds=30 + 30 * twice, then=meanwhile)
    assert node.now == (90 if twice else 60)
    assert node.reasons(ONE) == "xid"
    await node.prove(900)
    assert node.reasons(ONE) == "xid"
    said = [line.partition(": ")[0] for line in node.logged()]
    assert said[1:2] == ["WARNING released all GPUs; reset them now"]
    assert ("INFO the release is longer" in said) is twice
    assert not any("healthy again" in line for line in said)


async def test_a_reset_between_the_probe_and_the_scan_of_a_look_is_seen(node, driver):
    await node.xid(ONE, RESET)
    await node.look(after=5)
    driver.returned = frozenset({ONE})
    await node.look(after=5)
    assert node.healthy == [0, 1]


async def test_a_release_lasts_as_long_as_asked_for_after_a_look_that_takes_longer(node):
    node.watch.release(2)
    node.now += 6
    await release(node, seconds=2)
    assert node.snapshot.driver.up
    assert any("released all GPUs" in line for line in node.logged())


async def test_released_time_proves_nothing(node):
    """Fault 2: XID 74, 60 s of release without a probe, then one: Healthy."""
    await node.xid(ONE, UNPROVEN)
    await node.look(after=5)
    node.watch.release(60)
    await release(node, seconds=60)
    assert node.reasons(ONE) == "xid"
    await node.prove(55)
    assert node.reasons(ONE) == "xid"
    await node.prove(5)
    assert node.healthy == [0, 1]


@pytest.mark.parametrize("proof", ["counter", "driver", "operator"])
async def test_a_reset_during_a_release_is_proven_otherwise(node, driver, proof):
    driver.show(ONE, Reading(energy_millijoules=900, recovery_action=1))
    await node.look()
    await node.xid(ONE, RESET)
    driver.fail_probes(ONE, "GPU requires reset")  # and so it answers nothing any more
    await node.look(after=5)
    node.watch.release(60)
    after = Reading(
        energy_millijoules=3 if proof == "counter" else 901,
        recovery_action=0 if proof == "driver" else None,
    )

    def reset() -> None:
        driver.enumerate_again(ONE)
        driver.show(ONE, after)

    await release(node, seconds=60, then=reset)
    if proof == "operator":
        node.watch.reset_done()
    await node.look(after=5)
    assert node.reasons(ONE) == "probe"


async def test_nvml_is_released_by_itself_where_every_gpu_waits_for_a_reset(node):
    assert not node.watch._release_due()
    await node.xid(ONE, RESET)
    assert not node.watch._release_due()
    await node.xid(TWO, RESET)
    assert node.watch._release_due()
    await release(node, seconds=60)
    assert not node.watch._release_due()
    node.now += 60
    assert node.watch._release_due()


# A driver that hangs, or cannot be asked


async def test_a_gpu_that_hangs_marks_itself_alone(driver):
    node = Watched(driver, call_limit=0.02)
    await node.look()
    driver.hang(ONE, hangs=True)
    await node.look(after=5)
    assert (node.healthy, node.reasons(ONE)) == ([1], "timeout")
    assert node.snapshot.driver.up
    driver.hang(TWO, hangs=True)
    await node.look(after=5)
    assert (node.healthy, node.snapshot.driver.up) == ([], False)
    for uuid in (ONE, TWO):
        driver.hang(uuid, hangs=False)
    await node.look(after=5)
    await node.prove(60)
    assert (node.healthy, node.snapshot.driver.up) == ([0, 1], True)


@pytest.mark.parametrize("released", [False, True])
async def test_a_look_that_hangs_ends_nothing_and_does_not_go_unseen(driver, released):
    """While no GPU has a handle their probes say nothing either."""
    node = Watched(driver, call_limit=0.02)
    await node.look()
    await node.xid(ONE, RESET)
    driver.scan_hangs = True
    if released:
        node.watch.release(60)
        await release(node, seconds=60)
    else:
        await node.look(after=5)
        assert (node.healthy, node.snapshot.driver.up) == ([1], False)  # the handles answer
        await node.look(after=5)
    assert (node.reasons(ONE), node.reasons(TWO)) == ("xid timeout", "timeout")
    assert node.snapshot.driver.error == "NVML did not answer within 0.02 s"
    assert "INFO driver simulated answers" not in node.logged()[2:]
    driver.scan_hangs = False
    await node.look(after=5)
    await node.prove(60)
    assert (node.reasons(ONE), node.healthy) == ("xid", [1])


async def test_a_driver_that_cannot_be_asked_makes_every_gpu_unhealthy(node, driver):
    driver.fail(DriverError("NVML does not list its GPUs"))
    for _ in range(5):
        await node.look(after=5)
    assert (node.reasons(ONE), node.reasons(TWO), node.snapshot.driver.up) == (
        "probe",
        "probe",
        False,
    )
    assert [line.partition(": ")[0] for line in node.logged()] == [
        "ERROR no GPU can be used",
        *["WARNING 10 vGPUs are unhealthy"] * 2,
    ]
    driver.fail(None)
    await node.look(after=5)
    assert (node.snapshot.driver.up, node.healthy) == (True, [])
    await node.prove(60)
    assert node.healthy == [0, 1]


async def test_an_excluded_gpu_is_not_listed_and_is_listed_again_with_its_faults(node, driver):
    """Fault 15: an exclusion moved its faults."""
    names = {ONE, TWO}
    node = Watched(driver, cdi_names=lambda: frozenset(names))
    await node.look()
    await node.xid(ONE, RESET)
    names.remove(ONE)
    node.lines.clear()
    for _ in range(3):
        await node.look(after=5)
    assert [each.reason for each in node.snapshot.excluded] == ["cdi"]
    assert [line.partition(": ")[0] for line in node.logged()] == ["WARNING GPU excluded"]
    names.add(ONE)
    await node.prove(300)
    assert (node.reasons(ONE), node.snapshot.excluded) == ("xid", ())
    driver.insert(replace(GPUS[0], mig=True))
    await node.look(after=5)
    driver.insert(GPUS[0])
    await node.look(after=5)
    assert node.reasons(ONE) == "xid"


# The tasks


async def test_events_are_taken_at_once_and_looked_after(driver):
    node = Watched(driver, health=HealthRules(health_interval=3600))
    driver.fail_probes(TWO, "Unknown Error")
    async with anyio.create_task_group() as tasks:
        await tasks.start(node.watch.run)
        assert node.healthy == [0]
        driver.fail_probes(TWO, None)
        driver.show(ONE, Reading(recovery_action=2))
        driver.xid(ONE, RESET)
        await node.until(lambda: node.reasons(ONE) == "xid recovery-action")
        tasks.cancel_scope.cancel()


@pytest.mark.parametrize("scan_error", [None, "no GPUs"])
async def test_events_that_cannot_be_had_are_asked_for_again(driver, scan_error):
    driver.events_error = "no events"
    driver.fail(scan_error and DriverError(scan_error))
    node = Watched(driver, health=HealthRules(health_interval=0.02), driver_retry=0.02)
    async with anyio.create_task_group() as tasks:
        await tasks.start(node.watch.run)
        while driver.waits < 5 or driver.scans < 3:  # noqa: ASYNC110 - counters
            await anyio.sleep(0.01)
        errors = [line for line in node.logged() if line.startswith("ERROR")]
        said = [] if scan_error is None else ["ERROR no GPU can be used: no GPUs"]
        assert [line.partition(". Next: ")[0] for line in errors] == said
        driver.events_error = None
        driver.fail(None)
        await node.until(lambda: node.snapshot.driver.up)
        driver.xid(ONE, RESET)
        await node.until(lambda: node.reasons(ONE) == "xid")
        tasks.cancel_scope.cancel()


async def test_a_driver_that_does_not_answer_is_looked_for_less_often(driver):
    driver.fail(DriverError("no driver is loaded"))
    node = Watched(driver, health=HealthRules(health_interval=0.01), driver_retry=3600)
    async with anyio.create_task_group() as tasks:
        await tasks.start(node.watch.run)
        await anyio.sleep(0.1)
        assert driver.scans == 1
        tasks.cancel_scope.cancel()


async def test_a_library_that_stays_away_ends_the_watch_after_its_time(driver):
    node = Watched(driver, health=HealthRules(driver_wait=30))
    driver.fail(DriverLibraryError("libnvidia-ml.so.1 is not here"))
    await node.look()
    driver.fail(None)
    await node.look(after=29)
    driver.fail(DriverLibraryError("libnvidia-ml.so.1 is not here"))
    await node.look(after=1)
    await node.look(after=29)
    with pytest.raises(DriverLibraryError):
        await node.look(after=1)


@pytest.mark.parametrize("reading", [Reading(error="Unknown Error"), Reading(lost=True)])
async def test_when_no_gpu_answers_nvml_is_opened_again_and_then_the_watch_ends(driver, reading):
    node = Watched(driver, health=HealthRules(driver_wait=90))
    await node.look()
    released = []
    release = driver.release

    async def recording():
        released.append(node.now)
        return await release()

    driver.release = recording
    driver.show(ONE, reading)
    await node.look(after=5)
    assert released == []  # the other GPU answers
    driver.show(TWO, reading)
    for _ in range(8):
        await node.look(after=11)
    assert len(released) == 3  # not at every look
    with pytest.raises(DriverError, match="no GPU has answered for 90 s"):
        await node.look(after=15)
    driver.show(TWO, Reading())
    await node.look(after=100)  # one is enough


async def test_a_node_without_gpus_is_no_reason_to_end():
    node = Watched(SimulatedDriver(()), health=HealthRules(driver_wait=90))
    for _ in range(4):
        await node.look(after=60)


async def test_a_gpu_that_is_lost_for_longer_than_it_is_listed_is_one_that_does_not_answer(driver):
    node = Watched(driver, health=HealthRules(driver_wait=90, lost_card_seconds=20))
    await node.look()
    known = node.snapshot.gpus.values()
    driver.lost = tuple(Excluded(gpu, "lost", f"index {gpu.index} is lost") for gpu in known)
    for uuid in (ONE, TWO):
        driver.show(uuid, Reading(lost=True))
    await node.look(after=5)
    assert ([len(node.snapshot.gpus)], node.snapshot.excluded) == ([2], ())
    for _ in range(4):
        await node.look(after=21)
    assert not node.snapshot.gpus
    assert [each.detail for each in node.snapshot.excluded] == [
        "index 0 is lost",
        "index 1 is lost",
    ]
    with pytest.raises(DriverError, match="no GPU has answered for 90 s"):
        await node.look(after=21)


async def test_what_is_late_at_the_start_is_looked_at_at_once_and_then_no_more_often(driver):
    silent = Excluded(Gpu("", 2, "unknown", None, "unknown"), "timeout", "it does not answer")
    driver.undescribed = (silent,)
    node = Watched(driver, health=HealthRules(health_interval=3600))
    async with anyio.create_task_group() as tasks:
        await tasks.start(node.watch.run)
        assert [each.reason for each in node.snapshot.excluded] == ["timeout"]
        assert node.healthy == [0, 1]
        while driver.scans < 2:  # noqa: ASYNC110 - a counter
            await anyio.sleep(0.01)
        await anyio.sleep(0.2)
        assert driver.scans == 2
        tasks.cancel_scope.cancel()


async def test_an_unexpected_error_of_the_driver_ends_the_watch(driver):
    async def bug() -> Sequence[GpuEvent]:
        raise LookupError("a bug")

    driver.next_events = bug
    with pytest.raises(ExceptionGroup) as caught:
        await Watched(driver).watch.run()
    assert caught.group_contains(LookupError)


async def test_without_health_checks_nothing_is_probed_and_nothing_marked(driver):
    driver.fail_probes(ONE, "Unknown Error")
    node = Watched(driver, health=HealthRules(health_checks=False, health_interval=0.01))
    async with anyio.create_task_group() as tasks:
        await tasks.start(node.watch.run)
        driver.xid(ONE, RESET)
        driver.fall_off(TWO)
        while driver.scans < 3:  # noqa: ASYNC110 - a counter
            await anyio.sleep(0.01)
        assert (node.healthy, driver.waits, node.snapshot.xids) == ([0, 1], 0, {})
        tasks.cancel_scope.cancel()
