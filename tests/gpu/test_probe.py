import logging
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import anyio
import pytest

from vgpu_agent.errors import DriverError
from vgpu_agent.gpu.driver import (
    GpuDriver,
    GpuEvent,
    Reading,
    RecoveryActionChanged,
    Scan,
)
from vgpu_agent.gpu.health import Fact, Finding, HealthPolicy, judge_xid
from vgpu_agent.gpu.memory import FaultMemory, Remembered
from vgpu_agent.gpu.probe import HealthWatch, WatchTiming
from vgpu_agent.gpu.simulated import SimulatedDriver, simulated_gpus
from vgpu_agent.model.devices import Card, Excluded, Fault, Gpu, Reason
from vgpu_agent.model.share import Division
from vgpu_agent.model.state import Latest, Mps, NodeState

GIB = 1 << 30
CARDS = simulated_gpus(2, "NVIDIA Simulated 24GB", 24 * GIB, (0, 1))
ONE, TWO = (card.uuid for card in CARDS)
NAMED_ONE = f"GPU 0 (NVIDIA Simulated 24GB, {ONE})"
NAMED_TWO = f"GPU 1 (NVIDIA Simulated 24GB, {TWO})"
RECOVERY = 60.0
NOW = 1_700_000_000.0

COUNTED, UNTIL_GOOD, UNTIL_RESET, UNKNOWN = 13, 74, 46, 999
UNTIL_GOOD_TEXT = "XID 74 (NVLINK Error)"
UNTIL_RESET_TEXT = "XID 46 (GPU stopped processing)"


class Forgetful(FaultMemory):
    """No file: these tests are of one life of the agent."""

    def load(self) -> tuple[Remembered, ...]:
        return ()

    def save(self, remembered: Sequence[Remembered]) -> None:
        """Forgets."""


class Node:
    """A watch over a driver, with a clock that is told the time."""

    def __init__(self, driver: GpuDriver, *, interval: float = 5.0, **timing: float) -> None:
        self.now = 0.0
        self.state = NodeState(Division(10))
        self.watch = HealthWatch(
            driver,
            self.state,
            HealthPolicy(interval=interval, recovery=RECOVERY),
            Forgetful(Path("/nowhere")),
            clock=lambda: self.now,
            wall_clock=lambda: NOW + self.now,
            timing=WatchTiming(**{"event_pause": 0.01, **timing}),
        )

    async def look(self, after: float = 0.0) -> None:
        self.now += after
        await self.watch.look()

    def card(self, uuid: str) -> Card:
        card = self.state.snapshot.inventory.find(uuid)
        assert card is not None
        return card

    def reasons(self, uuid: str) -> list[Reason]:
        return [fault.reason for fault in self.card(uuid).faults]

    @property
    def healthy(self) -> list[str]:
        cards = self.state.snapshot.inventory.cards
        return [card.gpu.uuid for card in cards if card.healthy]

    async def until(self, holds, within: float = 5.0) -> None:
        with anyio.fail_after(within):
            async for _ in self.state.latest.follow():
                if holds():
                    return


@pytest.fixture(autouse=True)
def all_lines(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "vgpu_agent")


@pytest.fixture
def driver() -> SimulatedDriver:
    return SimulatedDriver(CARDS)


@pytest.fixture
async def node(driver: SimulatedDriver, caplog: pytest.LogCaptureFixture) -> Node:
    """A node whose two cards were looked at once."""
    node = Node(driver)
    await node.look()
    caplog.clear()
    return node


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What was logged since the last call, without the advice."""
    told = [
        f"{record.levelname} {record.getMessage()}".partition(". What to do:")[0]
        for record in caplog.records
    ]
    caplog.clear()
    return told


async def told(node: Node) -> None:
    """Brings the events of the driver to the node, as its task does."""
    await node.watch.take_events()


# The first look


async def test_the_first_look_finds_the_cards_and_says_so(driver, caplog):
    node = Node(driver)
    await node.look()
    assert node.healthy == [ONE, TWO]
    assert node.state.snapshot.driver.version == "simulated"
    assert lines(caplog) == [
        "INFO driver simulated answers; it sees 2 cards",
        f"INFO {NAMED_ONE}: 10 vGPUs of it",
        f"INFO {NAMED_TWO}: 10 vGPUs of it",
    ]


async def test_looks_that_find_nothing_new_publish_and_log_nothing(node, caplog):
    version = node.state.latest.version
    for _ in range(20):
        await node.look(after=5)
    assert node.state.latest.version == version
    assert lines(caplog) == []


async def test_a_machine_without_cards_is_a_state_and_no_error(caplog):
    node = Node(SimulatedDriver(()))
    for _ in range(3):
        await node.look(after=30)
    assert node.state.snapshot.driver.up
    assert node.state.snapshot.inventory.cards == ()
    assert lines(caplog) == ["INFO driver simulated answers; it sees 0 cards"]


# XIDs


async def test_an_xid_of_an_application_is_counted_and_changes_no_card(node, driver, caplog):
    driver.xid(ONE, COUNTED)
    await told(node)
    assert node.healthy == [ONE, TWO]
    assert node.state.snapshot.xids == {(ONE, COUNTED): 1}
    assert lines(caplog) == [f"INFO GPU {ONE}: XID 13 (Graphics Engine Exception), counted"]


@pytest.mark.parametrize(
    ("xid", "detail", "until_reset"),
    [
        (UNTIL_GOOD, UNTIL_GOOD_TEXT, False),
        (UNTIL_RESET, UNTIL_RESET_TEXT, True),
        (UNKNOWN, "XID 999 (not in the catalogue)", False),
    ],
)
async def test_an_xid_of_the_card_marks_it_and_only_it(
    node, driver, caplog, xid, detail, until_reset
):
    node.now = 7
    driver.xid(ONE, xid)
    await told(node)
    (fault,) = node.card(ONE).faults
    advice = judge_xid(xid).rule.advice
    assert fault == Fault(Reason.XID, NOW + 7, detail, until_reset, advice)
    assert node.healthy == [TWO]
    assert node.state.snapshot.xids == {(ONE, xid): 1}
    assert lines(caplog) == [f"WARNING {NAMED_ONE}: its 10 vGPUs are unhealthy: xid: {detail}"]


async def test_an_xid_whose_card_is_not_known_marks_every_card(node, driver, caplog):
    driver.xid(None, UNTIL_GOOD)
    await told(node)
    assert node.healthy == []
    assert node.state.snapshot.xids == {(None, UNTIL_GOOD): 1}
    assert lines(caplog) == [
        f"WARNING {name}: its 10 vGPUs are unhealthy: xid: {UNTIL_GOOD_TEXT}"
        for name in (NAMED_ONE, NAMED_TWO)
    ]


async def test_all_cards_become_unhealthy_in_one_update(node, driver):
    driver.xid(None, UNTIL_GOOD)
    before = node.state.latest.version
    seen = []
    publish = node.state.latest.publish

    def watched(snapshot) -> None:
        seen.append([card.healthy for card in snapshot.inventory.cards])
        publish(snapshot)

    node.state.latest.publish = watched
    await told(node)
    assert seen == [[True, True], [False, False]]  # the count, then the cards
    assert node.state.latest.version == before + 2


@pytest.mark.parametrize(
    ("gpus", "uuid"),
    [((), None), ((), "GPU-of-somebody-else"), (CARDS, "GPU-of-somebody-else")],
    ids=["unknown, of no cards", "of no cards", "of other cards"],
)
async def test_an_xid_of_no_card_that_is_listed_is_counted(gpus, uuid, caplog):
    driver = SimulatedDriver(gpus)
    node = Node(driver)
    await node.look()
    lines(caplog)
    driver.xid(uuid, UNTIL_RESET)
    await told(node)
    assert node.healthy == [gpu.uuid for gpu in gpus]
    assert node.state.snapshot.xids == {(uuid, UNTIL_RESET): 1}
    assert lines(caplog) == []


async def test_the_same_xid_again_is_counted_and_not_told_again(node, driver, caplog):
    for _ in range(1000):
        driver.xid(ONE, UNTIL_GOOD)
    await told(node)
    assert node.state.snapshot.xids == {(ONE, UNTIL_GOOD): 1000}
    assert len(lines(caplog)) == 1


async def test_a_worse_xid_is_told_and_a_milder_one_changes_nothing(node, driver, caplog):
    driver.xid(ONE, UNTIL_GOOD)
    driver.xid(ONE, UNTIL_RESET)
    driver.xid(ONE, UNTIL_GOOD)
    await told(node)
    (fault,) = node.card(ONE).faults
    assert fault.until_reset
    assert [line.rpartition("xid: ")[2] for line in lines(caplog)] == [
        UNTIL_GOOD_TEXT,
        UNTIL_RESET_TEXT,
    ]


async def test_a_change_of_the_recovery_action_is_no_xid(node, caplog):
    node.watch._event(RecoveryActionChanged(ONE))
    assert node.healthy == [ONE, TWO]
    assert node.state.snapshot.xids == {}
    assert lines(caplog) == []


# Recovery


async def test_a_card_is_healthy_again_after_so_many_seconds_of_passed_probes(node, driver, caplog):
    driver.xid(ONE, UNTIL_GOOD)
    await told(node)
    lines(caplog)
    await node.look(after=RECOVERY - 1)
    assert node.healthy == [TWO]
    assert lines(caplog) == []
    await node.look(after=1)
    assert node.healthy == [ONE, TWO]
    assert lines(caplog) == [f"INFO {NAMED_ONE}: its 10 vGPUs are healthy again: proven good"]
    assert node.state.snapshot.transitions == {
        (ONE, "unhealthy", Reason.XID): 1,
        (ONE, "healthy", Reason.XID): 1,
    }


async def test_each_new_fault_starts_the_wait_anew(node, driver):
    for _ in range(3):
        driver.xid(ONE, UNTIL_GOOD)
        await told(node)
        await node.look(after=RECOVERY - 1)
        assert node.healthy == [TWO]
    await node.look(after=1)
    assert node.healthy == [ONE, TWO]


async def test_only_a_reset_clears_what_only_a_reset_heals_and_at_once(node, driver, caplog):
    driver.xid(ONE, UNTIL_RESET)
    await told(node)
    lines(caplog)
    for _ in range(10):
        await node.look(after=RECOVERY)
    assert node.reasons(ONE) == [Reason.XID]
    driver.enumerate_again(ONE)
    await node.look(after=5)
    assert node.healthy == [ONE, TWO]
    assert lines(caplog) == [f"INFO {NAMED_ONE}: its 10 vGPUs are healthy again: initialised anew"]


async def test_a_reset_does_not_prove_a_card_good(node, driver):
    driver.xid(ONE, UNTIL_GOOD)
    await told(node)
    driver.enumerate_again(ONE)
    await node.look(after=5)
    assert node.reasons(ONE) == [Reason.XID]
    await node.look(after=RECOVERY)
    assert node.healthy == [ONE, TWO]


# Off the bus and back


async def test_a_card_that_falls_off_the_bus_stays_listed_and_is_lost(node, driver, caplog):
    driver.xid(ONE, UNTIL_RESET, falls_off_the_bus=True)
    await node.look()
    assert node.reasons(ONE) == [Reason.LOST]
    assert node.healthy == [TWO]
    assert lines(caplog) == [
        f"WARNING {NAMED_ONE}: its 10 vGPUs are unhealthy: lost: the driver does not see it"
    ]


async def test_a_lost_card_is_told_once_however_long_it_is_away(node, driver, caplog):
    driver.xid(ONE, 79, falls_off_the_bus=True)
    await told(node)
    for _ in range(20):
        await node.look(after=RECOVERY)
    assert node.reasons(ONE) == [Reason.XID, Reason.LOST]
    assert [line.partition("unhealthy: ")[2] for line in lines(caplog)] == [
        "xid: XID 79 (GPU has fallen off the bus)",
        "xid: XID 79 (GPU has fallen off the bus); lost: the driver does not see it",
    ]


async def test_a_card_that_comes_back_is_reset_and_has_to_be_proven_good(node, driver, caplog):
    driver.xid(ONE, 79, falls_off_the_bus=True)
    await told(node)
    await node.look(after=5)
    ids = list(node.state.snapshot.inventory.device_ids)
    lines(caplog)
    driver.enumerate_again(ONE)
    await node.look(after=5)
    # The reset is seen, and what only it heals is healed.
    assert node.reasons(ONE) == [Reason.LOST]
    (line,) = lines(caplog)
    assert "initialised anew; still unhealthy: lost: " in line
    await node.look(after=RECOVERY - 6)
    assert node.reasons(ONE) == [Reason.LOST]
    await node.look(after=1)
    assert node.healthy == [ONE, TWO]
    assert lines(caplog) == [f"INFO {NAMED_ONE}: its 10 vGPUs are healthy again: proven good"]
    assert list(node.state.snapshot.inventory.device_ids) == ids


async def test_a_card_that_comes_back_between_two_looks_was_reset_all_the_same(node, driver):
    driver.xid(ONE, 79, falls_off_the_bus=True)
    await told(node)
    driver.enumerate_again(ONE)
    await node.look(after=5)
    assert node.healthy == [ONE, TWO]


async def test_seconds_away_do_not_prove_a_card_good(node, driver):
    driver.xid(ONE, 79, falls_off_the_bus=True)
    for _ in range(10):
        await node.look(after=RECOVERY)
    driver.enumerate_again(ONE)
    await node.look(after=1)
    await node.look(after=1)
    assert node.reasons(ONE) == [Reason.LOST]


async def test_a_card_that_flaps_is_not_healthy_in_between(node, driver):
    for _ in range(3):
        driver.xid(ONE, 79, falls_off_the_bus=True)
        await node.look(after=5)
        driver.enumerate_again(ONE)
        await node.look(after=5)
        await node.look(after=RECOVERY - 11)
        assert node.healthy == [TWO]


async def test_a_card_that_fails_its_first_probe_after_a_reset_stays_unhealthy(node, driver):
    driver.xid(ONE, UNTIL_GOOD)
    await told(node)
    driver.enumerate_again(ONE)
    driver.fail_probes(ONE, "still bad")
    await node.look(after=5)
    await node.look(after=5)
    assert node.reasons(ONE) == [Reason.XID, Reason.PROBE]


async def test_a_card_that_appears_later_is_listed_and_told(caplog):
    driver = SimulatedDriver(CARDS)
    driver.xid(TWO, 79, falls_off_the_bus=True)
    node = Node(driver)
    await node.look()
    assert [card.gpu.uuid for card in node.state.snapshot.inventory.cards] == [ONE]
    lines(caplog)
    driver.enumerate_again(TWO)
    await node.look()
    assert node.healthy == [ONE, TWO]
    assert lines(caplog) == [f"INFO {NAMED_TWO}: 10 vGPUs of it"]


# Probes that fail


async def test_a_failed_probe_marks_its_card_alone_and_passed_ones_heal_it(node, driver, caplog):
    for attempt in range(5):  # told once, though its words change
        driver.fail_probes(ONE, f"attempt {attempt}")
        await node.look(after=5)
    assert node.reasons(ONE) == [Reason.PROBE]
    assert node.healthy == [TWO]
    assert lines(caplog) == [f"WARNING {NAMED_ONE}: its 10 vGPUs are unhealthy: probe: attempt 0"]
    driver.fail_probes(ONE, None)
    await node.look(after=RECOVERY - 1)
    assert node.healthy == [TWO]
    await node.look(after=1)
    assert node.healthy == [ONE, TWO]
    assert lines(caplog) == [f"INFO {NAMED_ONE}: its 10 vGPUs are healthy again: proven good"]


async def test_one_failed_probe_starts_the_wait_anew(node, driver):
    driver.xid(ONE, UNTIL_GOOD)
    await told(node)
    await node.look(after=RECOVERY - 1)
    driver.fail_probes(ONE, "Unknown Error")
    await node.look()
    driver.fail_probes(ONE, None)
    await node.look(after=RECOVERY - 1)
    assert node.healthy == [TWO]
    await node.look(after=1)
    assert node.healthy == [ONE, TWO]


# A driver that cannot be asked


class MoodyDriver:
    """Simulated cards behind a driver whose calls fail while they are told to."""

    def __init__(self, gpus: Sequence[Gpu] = CARDS, excluded: Sequence[Excluded] = ()) -> None:
        self.cards = SimulatedDriver(gpus)
        self.excluded = tuple(excluded)
        self.scan_error: str | None = None
        self.events_error: str | None = None
        self.looks = Latest(0)
        self.waits = Latest(0)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        pass

    async def scan(self) -> Scan:
        self.looks.publish(self.looks.value + 1)
        if self.scan_error is not None:
            raise DriverError(self.scan_error)
        found = await self.cards.scan()
        return Scan(found.driver_version, found.gpus, self.excluded)

    async def probe(self, uuid: str) -> Reading:
        return await self.cards.probe(uuid)

    async def next_events(self) -> Sequence[GpuEvent]:
        self.waits.publish(self.waits.value + 1)
        if self.events_error is not None:
            raise DriverError(self.events_error)
        return await self.cards.next_events()


async def at_least(count: Latest[int], number: int) -> None:
    with anyio.fail_after(5):
        async for value in count.follow():
            if value >= number:
                return


async def test_a_driver_that_fails_at_first_is_told_once_and_found_when_it_works(caplog):
    driver = MoodyDriver()
    driver.scan_error = "no driver is loaded"
    node = Node(driver)
    for _ in range(3):
        await node.look(after=30)
    assert not node.state.snapshot.driver.up
    assert node.state.snapshot.driver.error == "no driver is loaded"
    assert lines(caplog) == ["ERROR no GPU can be used: no driver is loaded"]
    driver.scan_error = None
    await node.look(after=30)
    assert node.healthy == [ONE, TWO]
    assert lines(caplog)[0] == "INFO driver simulated answers; it sees 2 cards"


async def test_a_driver_that_stops_answering_makes_every_card_unhealthy(caplog):
    driver = MoodyDriver()
    node = Node(driver)
    await node.look()
    lines(caplog)
    driver.scan_error = "NVML does not list its cards"
    for _ in range(5):
        await node.look(after=5)
    assert [node.reasons(uuid) for uuid in (ONE, TWO)] == [[Reason.PROBE], [Reason.PROBE]]
    assert lines(caplog) == [
        "ERROR no GPU can be used: NVML does not list its cards",
        f"WARNING {NAMED_ONE}: its 10 vGPUs are unhealthy: probe: NVML does not list its cards",
        f"WARNING {NAMED_TWO}: its 10 vGPUs are unhealthy: probe: NVML does not list its cards",
    ]
    driver.scan_error = None
    await node.look(after=5)
    assert node.state.snapshot.driver.up
    assert node.healthy == []
    await node.look(after=RECOVERY)
    assert node.healthy == [ONE, TWO]


async def test_a_card_that_is_left_out_is_told_once_and_not_listed(caplog):
    left_out = Excluded(CARDS[1], "mig", "MIG mode is on")
    driver = MoodyDriver(CARDS[:1], [left_out])
    node = Node(driver)
    for _ in range(3):
        await node.look(after=5)
    assert node.state.snapshot.excluded == (left_out,)
    assert node.healthy == [ONE]
    assert [line for line in lines(caplog) if line.startswith("WARNING")] == [
        f"WARNING GPU {TWO} left out: MIG mode is on"
    ]


# The tasks


async def test_it_is_started_when_the_cards_were_looked_at_and_probed(driver):
    driver.fail_probes(ONE, "Unknown Error")
    node = Node(driver)
    async with anyio.create_task_group() as tasks:
        await tasks.start(node.watch.run)
        assert node.healthy == [TWO]
        tasks.cancel_scope.cancel()


async def test_events_are_acted_on_without_waiting_for_a_probe(driver):
    node = Node(driver, interval=3600)
    async with anyio.create_task_group() as tasks:
        await tasks.start(node.watch.run)
        driver.xid(ONE, UNTIL_RESET)
        await node.until(lambda: node.healthy == [TWO])
        driver.xid(None, UNTIL_RESET)
        await node.until(lambda: node.healthy == [])
        tasks.cancel_scope.cancel()


async def test_cards_are_probed_over_and_over(driver):
    node = Node(driver, interval=0.01)
    async with anyio.create_task_group() as tasks:
        await tasks.start(node.watch.run)
        driver.fail_probes(ONE, "Unknown Error")
        await node.until(lambda: node.healthy == [TWO])
        driver.fail_probes(ONE, None)
        node.now += RECOVERY
        # The last failed probe may have been after that.
        await anyio.sleep(0.05)
        node.now += RECOVERY
        await node.until(lambda: node.healthy == [ONE, TWO])
        tasks.cancel_scope.cancel()


async def test_a_driver_that_does_not_answer_is_looked_for_less_often():
    driver = MoodyDriver()
    driver.scan_error = "no driver is loaded"
    node = Node(driver, interval=0.01, driver_retry=3600)
    async with anyio.create_task_group() as tasks:
        await tasks.start(node.watch.run)
        await anyio.sleep(0.1)
        assert driver.looks.value == 1
        tasks.cancel_scope.cancel()


@pytest.mark.parametrize("gpus", [(), CARDS])
async def test_a_driver_that_fails_at_the_start_is_found_without_a_restart(gpus):
    driver = MoodyDriver(gpus)
    driver.scan_error = "no driver is loaded"
    node = Node(driver, interval=0.01, driver_retry=0.01)
    async with anyio.create_task_group() as tasks:
        await tasks.start(node.watch.run)
        await at_least(driver.looks, 3)
        driver.scan_error = None
        await node.until(lambda: node.state.snapshot.driver.up)
        assert node.healthy == [card.uuid for card in gpus]
        tasks.cancel_scope.cancel()


async def test_events_that_cannot_be_had_are_asked_for_again(caplog):
    driver = MoodyDriver()
    node = Node(driver, interval=0.01)
    async with anyio.create_task_group() as tasks:
        driver.events_error = "no events"
        driver.scan_error = "no events"
        await tasks.start(node.watch.run)
        await at_least(driver.waits, 5)
        driver.scan_error = driver.events_error = None
        await node.look()
        driver.cards.xid(ONE, UNTIL_RESET)
        await node.until(lambda: node.reasons(ONE) == [Reason.XID])
        tasks.cancel_scope.cancel()
    assert [line for line in lines(caplog) if line.startswith("ERROR")] == [
        "ERROR no GPU can be used: no events"
    ]


@pytest.mark.parametrize("scan_error", [None, "no cards"], ids=["the cards can", "nor the cards"])
async def test_events_that_cannot_be_had_are_not_told_for_ever(caplog, scan_error):
    driver = MoodyDriver()
    driver.scan_error, driver.events_error = scan_error, "no events"
    node = Node(driver, interval=0.01, driver_retry=0.01)
    async with anyio.create_task_group() as tasks:
        await tasks.start(node.watch.run)
        await at_least(driver.looks, 10)
        tasks.cancel_scope.cancel()
    told = [line for line in lines(caplog) if not line.startswith("INFO")]
    assert told == ([] if scan_error is None else [f"ERROR no GPU can be used: {scan_error}"])


async def test_an_unexpected_error_of_the_driver_ends_the_watch():
    class BrokenDriver(MoodyDriver):
        async def next_events(self) -> Sequence[GpuEvent]:
            raise LookupError("a bug")

    node = Node(BrokenDriver())
    with pytest.raises(ExceptionGroup) as caught:
        await node.watch.run()
    assert caught.group_contains(LookupError)


async def test_passed_probes_prove_nothing_about_the_mps_daemon(node):
    down = Finding(Fact.MPS_DOWN, "it is gone").fault(NOW)
    fault = Finding(Fact.MPS_FAULT, "of its server").fault(NOW)
    node.state.mps_seen(Mps(wanted=True), [down, fault], {})
    for _ in range(3):
        await node.look(after=RECOVERY)
    assert node.reasons(ONE) == [Reason.MPS, Reason.MPS_FAULT]


async def test_a_card_that_is_left_out_for_a_while_still_waits_for_its_reset(node, driver):
    driver.xid(ONE, UNTIL_RESET)
    await told(node)
    (gpu,) = [gpu for gpu in CARDS if gpu.uuid == ONE]
    scan = driver.scan

    async def without_one() -> Scan:
        whole = await scan()
        gpus = tuple(each for each in whole.gpus if each.uuid != ONE)
        return Scan(whole.driver_version, gpus, (Excluded(gpu, "cdi", "not named"),))

    driver.scan = without_one
    await node.look(after=5)
    assert node.healthy == [TWO]
    driver.scan = scan
    await node.look(after=5)
    await node.look(after=RECOVERY)
    assert node.reasons(ONE) == [Reason.XID]


async def test_a_scan_that_takes_too_long_heals_nothing(driver):
    node = Node(driver, call_limit=0.05)
    await node.look()
    driver.xid(ONE, UNTIL_RESET)
    await told(node)
    scan = driver.scan

    async def slow() -> Scan:
        await driver.release()  # the session is being opened anew
        await anyio.sleep(1)
        raise AssertionError("nobody waits so long")

    driver.scan = slow
    await node.look(after=5)
    await node.look(after=5)
    driver.scan = scan
    await node.look(after=5)
    await node.look(after=5)
    assert node.reasons(ONE) == [Reason.XID]
    assert node.healthy == [TWO]
