"""The node: each input is replaced as a whole, and what follows is published as one change."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from tests.model.strategies import a_gpu, a_look
from vgpu_agent.model.devices import Effect, Excluded, Gpu, Reason
from vgpu_agent.model.facts import (
    MpsLook,
    Reading,
    RecoveryActionChanged,
    Scan,
    XidEvent,
)
from vgpu_agent.model.health import HealthEvent, Moment, Probed, ResetDone
from vgpu_agent.model.holders import Assignment, Holder, Holders, Usage
from vgpu_agent.model.names import gone_gpus
from vgpu_agent.model.node import MAX_UNLISTED, Node
from vgpu_agent.model.rules import HealthRules, SharingRules
from vgpu_agent.model.snapshot import (
    Driver,
    FirstSeen,
    Kubelet,
    RegistrationResult,
    Rules,
    Snapshot,
)

REGISTERED = RegistrationResult.REGISTERED
APPLICATION, UNPROVEN, RESET = 13, 74, 95
ONE, TWO = a_gpu(0), a_gpu(1)
GOOD = Probed(Reading())
WELL = a_look(**{ONE.uuid: 2, TWO.uuid: 2})


class Clocked(Node):
    """A node that is given the time, and keeps what it published."""

    def __init__(self, *, mps: bool = False, **health: object) -> None:
        self.now = 0.0
        self.changes: list[tuple[Snapshot, Snapshot]] = []
        super().__init__(
            Rules(SharingRules(mps=mps, replicas=2), HealthRules(**health)),
            clock=lambda: Moment(self.now, 1000 + self.now),
            published=lambda before, after: self.changes.append((before, after)),
        )

    def looked(self, *gpus: Gpu, events: dict[str, HealthEvent] | None = None) -> None:
        happened = {gpu.uuid: (GOOD,) for gpu in gpus}
        happened |= {uuid: (event,) for uuid, event in (events or {}).items()}
        self.driver_looked(Driver("1", None), Scan("1", gpus), happened)

    def xid(self, *xids: tuple[str | None, int]) -> None:
        self.driver_events([XidEvent(uuid, xid) for uuid, xid in xids])

    @property
    def healthy(self) -> list[str]:
        return [shared.gpu.uuid for shared in self.snapshot.inventory.gpus if shared.healthy]

    @property
    def listed(self) -> list[str]:
        return [shared.gpu.uuid for shared in self.snapshot.inventory.gpus]


@pytest.fixture
def node() -> Clocked:
    node = Clocked()
    node.looked(ONE, TWO)
    node.changes.clear()
    return node


# One change


@pytest.mark.parametrize(
    ("events", "healthy", "counted"),
    [
        ([(ONE.uuid, APPLICATION)], ["gpu-0", "gpu-1"], 1),
        ([(ONE.uuid, UNPROVEN)], ["gpu-1"], 1),
        ([(ONE.uuid, RESET)], ["gpu-1"], 1),
        ([(None, UNPROVEN)], [], 1),
        ([(ONE.uuid, RESET), (TWO.uuid, RESET)], [], 2),
        ([(ONE.uuid, UNPROVEN)] * 1000, ["gpu-1"], 1000),
        ([("GPU-of-somebody-else", RESET)], ["gpu-0", "gpu-1"], 1),
    ],
)
def test_events_are_counted_judged_and_published_at_once(node, events, healthy, counted):
    """Fault 10: an XID was counted, marked and logged in two publishes."""
    node.xid(*events)
    assert len(node.changes) == 1
    (before, after), *_ = node.changes
    assert (before.xids, sum(after.xids.values())) == ({}, counted)
    assert node.healthy == healthy
    assert after is node.snapshot is node.latest.value
    unhealthy = {"gpu-0", "gpu-1"} - set(healthy)
    assert after.transitions == {(uuid, "unhealthy", Reason.XID): 1 for uuid in unhealthy}
    # What an older snapshot says does not change.
    assert all(shared.healthy for shared in before.inventory.gpus)
    with pytest.raises(TypeError):
        after.xids["gpu-0", 79] = 0


def test_a_look_with_losses_returns_and_new_faults_is_one_change(node):
    node.looked(TWO, events={TWO.uuid: Probed(Reading(error="no"))})
    assert len(node.changes) == 1
    assert node.healthy == []
    lost = {(ONE.uuid, "unhealthy", Reason.LOST): 1, (TWO.uuid, "unhealthy", Reason.PROBE): 1}
    assert node.snapshot.transitions == lost
    for node.now in range(5, 70, 5):
        node.looked(ONE, TWO)
    assert node.healthy == ["gpu-0", "gpu-1"]
    back = {(ONE.uuid, "healthy", Reason.LOST): 1, (TWO.uuid, "healthy", Reason.PROBE): 1}
    assert node.snapshot.transitions == lost | back


@pytest.mark.parametrize(
    "again",
    [
        lambda node: node.looked(TWO, ONE),
        lambda node: node.driver_events([RecoveryActionChanged("gpu-0")]),
        lambda node: node.driver_events([]),
        lambda node: node.set_store_error(None),
        lambda node: node.gpus_happened([], ResetDone()),
        lambda node: node.registration_ended(None),
    ],
)
def test_what_is_no_news_is_not_published(node, again: Callable[[Clocked], None]):
    again(node)
    assert node.changes == []


# GPUs


def test_a_lost_gpu_stays_listed_with_its_vgpus_and_leaves_after_its_time():
    node = Clocked(lost_card_seconds=60.0)
    node.looked(ONE, TWO)
    for node.now in (5, 64):
        node.looked(TWO)
        assert (node.listed, node.healthy) == (["gpu-0", "gpu-1"], ["gpu-1"])
        assert gone_gpus(node.snapshot) == ()
    node.now = 65
    node.looked(TWO)
    assert node.listed == ["gpu-1"]
    assert node.snapshot.health.keys() == {"gpu-1"}
    assert gone_gpus(node.snapshot) == ("gpu-0",)
    node.driver_looked(Driver("1", "hangs"), None, {})
    assert gone_gpus(node.snapshot) == ()
    # One that does not say which it is may be the other.
    nameless = Excluded(replace(ONE, uuid=""), "error", "dead")
    node.driver_looked(Driver("1", None), Scan("1", (TWO,), (nameless,)), {})
    assert gone_gpus(node.snapshot) == ()
    node.looked(ONE, TWO)
    assert node.healthy == ["gpu-0", "gpu-1"]  # it is a new one
    assert gone_gpus(node.snapshot) == ()


@pytest.mark.parametrize("away", ["lost for long", "excluded", "not listed yet"])
def test_a_gpu_that_is_not_listed_keeps_its_faults(away):
    """Fault 15: they moved between three containers at an absence or an exclusion."""
    node = Clocked(lost_card_seconds=60.0)
    node.looked(*([TWO] if away == "not listed yet" else [ONE, TWO]))
    node.xid((ONE.uuid, RESET))
    if away == "excluded":
        node.looked(replace(ONE, mig=True), TWO)
        assert [each.reason for each in node.snapshot.excluded] == ["mig"]
    elif away == "lost for long":
        node.looked(TWO)
        node.now = 100
        node.looked(TWO)
    assert node.listed == ["gpu-1"]
    assert node.snapshot.health[ONE.uuid].waits_for_reset
    node.now += 5
    node.looked(ONE, TWO)
    (shared, _) = node.snapshot.inventory.gpus
    # What was away for long was initialized again; it has to be proven good.
    expected = Reason.LOST if away == "lost for long" else Reason.XID
    assert [fault.reason for fault in shared.faults] == [expected]


def test_a_gpu_that_takes_the_index_of_another_is_not_named_by_it(node):
    node.looked(TWO, a_gpu(0, uuid="new"))
    seen = {uuid: each.index for uuid, each in node.snapshot.first_seen.items()}
    assert seen == {"gpu-0": 0, "gpu-1": 1, "new": None}


def test_unlisted_gpus_have_a_bound_and_are_forgotten():
    node = Clocked(lost_card_seconds=60.0)
    node.looked(ONE, TWO)
    node.xid(*((f"GPU-{n}", UNPROVEN) for n in range(2 * MAX_UNLISTED)))
    assert len(node.snapshot.health) == MAX_UNLISTED
    assert node.healthy == ["gpu-0", "gpu-1"]
    node.looked(ONE, TWO)
    node.now = 100
    node.looked(ONE, TWO)
    assert node.snapshot.health.keys() == {"gpu-0", "gpu-1"}


def test_without_health_checks_a_gpu_that_is_gone_is_no_fault():
    node = Clocked(health_checks=False)
    node.driver_looked(Driver("1", None), Scan("1", (ONE,)), {})
    node.driver_looked(Driver("1", None), Scan("1", ()), {})
    assert node.healthy == ["gpu-0"]


def test_a_gpu_that_did_not_say_its_memory_when_it_was_first_seen_is_divided_when_it_does():
    node = Clocked(mps=True)
    silent = replace(ONE, memory_bytes=None)
    node.looked(silent)
    assert node.listed == []
    seen = node.snapshot.first_seen
    node.looked(silent)
    assert node.snapshot.first_seen is seen
    for gpu in (ONE, silent, ONE):  # from now on it is what it said
        node.looked(gpu)
        assert node.listed == ["gpu-0"]
        assert node.snapshot.first_seen[ONE.uuid].memory_bytes == ONE.memory_bytes


def test_a_release_says_until_when_and_keeps_what_is_known(node):
    node.xid((ONE.uuid, RESET))
    node.driver_released(1060.0)
    assert node.snapshot.driver == Driver("1", "released for a reset", 1060.0, since=1000.0)
    assert (node.listed, node.healthy) == (["gpu-0", "gpu-1"], ["gpu-1"])


def test_what_the_agent_before_kept_is_known_before_the_first_look(node):
    node.xid((ONE.uuid, RESET))
    after = Clocked()
    after.recalled({ONE.uuid: FirstSeen(7, 2**30, 0)}, {ONE.uuid: node.snapshot.health[ONE.uuid]})
    assert after.listed == []
    after.looked(ONE, TWO)
    assert after.healthy == ["gpu-1"]
    assert after.snapshot.first_seen[ONE.uuid].index == 7
    assert after.snapshot.transitions == {}  # it was never healthy here


@pytest.mark.parametrize(
    ("undescribed", "healthy"),
    [
        ("", ["gpu-1"]),  # it was there, and did not say which it is
        ("gpu-9", ["gpu-0", "gpu-1"]),  # it was away, and is initialized again
    ],
)
def test_a_gpu_that_says_nothing_at_the_start_still_waits_for_its_reset(node, undescribed, healthy):
    node.xid((ONE.uuid, RESET))
    after = Clocked(recovery_seconds=1)
    after.recalled({}, {ONE.uuid: node.snapshot.health[ONE.uuid]})
    silent = Excluded(replace(ONE, uuid=undescribed), "timeout", "index 0 does not answer")
    after.driver_looked(Driver("1", None), Scan("1", (TWO,), (silent,)), {TWO.uuid: (GOOD,)})
    for after.now in (1, 2, 3):
        after.looked(ONE, TWO)
    assert after.healthy == healthy


# The MPS daemon


def test_a_fault_of_the_mps_daemon_that_goes_on_keeps_its_time_and_ends_at_once():
    node = Clocked(mps=True)
    node.looked(ONE, TWO)
    for node.now, look in ((5, MpsLook("gone")), (9, MpsLook("no answer"))):
        node.set_mps(look)
    (fault,) = node.snapshot.inventory.gpus[0].faults
    assert (fault.reason, fault.since, fault.detail) == (Reason.MPS, 1005, "no answer")
    assert fault.effect is Effect.UNTIL_BACK
    for node.now in range(10, 200, 5):
        node.looked(ONE, TWO)  # passed probes prove nothing of the daemon
    assert node.healthy == []
    faulty = replace(WELL.daemons[ONE.uuid], fault="status FAULT")
    node.set_mps(replace(WELL, daemons={**WELL.daemons, ONE.uuid: faulty}))
    (fault,) = node.snapshot.inventory.gpus[0].faults
    assert (fault.reason, fault.detail) == (Reason.MPS_FAULT, "status FAULT")
    assert node.healthy == ["gpu-1"]
    node.set_mps(WELL)
    assert node.healthy == ["gpu-0", "gpu-1"]


# The kubelet


def test_every_attempt_to_register_is_counted_by_its_result(node):
    for result in RegistrationResult:
        node.registration_tried(REGISTERED)
        node.registration_tried(result, "why")
        registered, away = result is REGISTERED, result is RegistrationResult.UNREACHABLE
        assert node.snapshot.kubelet == Kubelet(registered=registered, error="why", away=away)
    others = [each for each in RegistrationResult if each is not REGISTERED]
    counted = {REGISTERED: len(RegistrationResult) + 1, **dict.fromkeys(others, 1)}
    assert node.snapshot.registrations == counted
    node.registration_ended("the stream ended")
    assert node.snapshot.kubelet == Kubelet(error="the stream ended")


def test_a_kubelet_is_connected_while_it_is_registered_with_and_follows(node):
    node.stream_opened()
    node.stream_opened()
    assert not node.snapshot.kubelet.connected
    node.registration_tried(REGISTERED)
    assert node.snapshot.kubelet.connected
    node.registration_ended("why")
    assert node.snapshot.kubelet.streams == 2
    node.registration_tried(REGISTERED)
    node.stream_ended()
    node.stream_ended()
    assert not node.snapshot.kubelet.connected
    node.list_sent()
    node.allocated()
    assert (node.snapshot.lists_sent, node.snapshot.allocates) == (1, 1)


def test_since_when_kubelet_and_driver_are_as_they_are_is_known_from_the_first_change_on(node):
    def since() -> tuple[float | None, float | None]:
        return node.snapshot.kubelet.since, node.snapshot.driver.since

    fresh = Clocked()
    assert (fresh.snapshot.kubelet.since, fresh.snapshot.driver.since) == (None, None)
    fresh.registration_ended("no kubelet", away=True)
    fresh.driver_looked(Driver(None, "no library"), None, {})
    assert (fresh.snapshot.kubelet.since, fresh.snapshot.driver.since) == (None, None)
    assert since() == (None, 1000.0)  # it answered at the first look
    node.now = 5
    node.registration_tried(RegistrationResult.REGISTERED)
    assert since() == (None, 1000.0)  # without a stream it is not connected
    node.now = 6
    node.stream_opened()
    node.now = 7
    node.stream_opened()
    node.looked(ONE)
    assert since() == (1006.0, 1000.0)
    node.now = 8
    node.registration_ended("gone")
    node.driver_looked(Driver("1", "hangs"), None, {})
    node.now = 9
    node.registration_ended("still gone", rival="at x.sock")
    node.driver_released(2000.0)
    assert since() == (1008.0, 1008.0)
    assert node.snapshot.kubelet.rival == "at x.sock"
    node.registration_tried(RegistrationResult.REGISTERED)
    assert node.snapshot.kubelet.rival is None


def test_who_holds_what_is_believed_until_it_is_too_old(node):
    held = (Assignment(Holder("ns", "pod", "main"), ("gpu-0::0", "gone::1")),)
    node.set_assignments(held, "no checkpoint")
    assert node.snapshot.holders == Holders(None, held, "no checkpoint")
    assert node.snapshot.orphans == ("gone::1",)
    assert [part.numbers for part in node.snapshot.parts] == [(0,)]
    assert node.snapshot.largest_free == 2
    node.assignments_failed("away", forget=False)
    assert node.snapshot.holders == Holders("away", held, "no checkpoint")
    node.assignments_failed("away", forget=True)
    assert (node.snapshot.assignments, node.snapshot.parts) == (None, ())
    node.set_usage(Usage(problem="no cgroups"))
    assert node.snapshot.usage == Usage(problem="no cgroups")
