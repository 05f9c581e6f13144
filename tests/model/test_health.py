"""`advance` by example, and as a property: whatever the edges report, it answers consistently."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.model.strategies import tried
from vgpu_agent.model.devices import Effect, Reason
from vgpu_agent.model.facts import ComputeMode, Reading
from vgpu_agent.model.health import (
    RELAPSE_WINDOW,
    Away,
    Counters,
    GpuHealth,
    HealthEvent,
    Moment,
    Probed,
    ResetDone,
    Unwatched,
    XidSeen,
    advance,
    recovery_wait,
)
from vgpu_agent.model.rules import HealthRules, SharingRules

RULES = HealthRules(
    lost_card_seconds=600, ignored_xids=frozenset({48}), critical_xids=frozenset({31})
)
GOOD, FAILING = Probed(Reading()), Probed(Reading(error="Unknown Error"))
LOST, HUNG = Probed(Reading(lost=True)), Probed(Reading(hung=True, error="3 s"))
BACK = Probed(Reading(), new_handle=True)
ACTION, NO_ACTION = Probed(Reading(recovery_action=1)), Probed(Reading(recovery_action=0))
REMAP = Probed(Reading(remap_failed=True))
APPLICATION, UNPROVEN, RESET, REBOOT = XidSeen(13), XidSeen(74), XidSeen(95), XidSeen(79)


def ecc(errors: int, *, energy: int | None = None, new_handle: bool = False) -> Probed:
    return Probed(Reading(uncorrectable_ecc=errors, energy_millijoules=energy), new_handle)


def energy(millijoules: int) -> Probed:
    return ecc(0, energy=millijoules)


def after(*events: tuple[float, HealthEvent]) -> GpuHealth:
    """What is known after these events; people's clock is 1000 s ahead."""
    health = GpuHealth()
    for at, event in events:
        health = advance(health, event, Moment(at, 1000 + at), RULES, sharing=SharingRules())
    return health


def reasons(*events: tuple[float, HealthEvent]) -> str:
    return " ".join(sorted(fault.reason for fault in after(*events).faults))


def passed(start: float, seconds: float) -> list[tuple[float, HealthEvent]]:
    """Good probes for so long, every 5 s."""
    return [(start + n * 5, GOOD) for n in range(int(seconds / 5) + 1)]


@pytest.mark.parametrize(
    ("events", "left"),
    [
        ([], ""),
        ([(0, GOOD)], ""),
        ([(0, GOOD), (1, APPLICATION)], ""),
        ([(0, GOOD), (1, UNPROVEN)], "xid"),
        ([(0, XidSeen(48))], ""),  # as the settings say, and not the catalogue
        ([(0, XidSeen(31))], "xid"),
        (
            [(0, FAILING), (5, HUNG), (10, ACTION), (15, REMAP)],
            "probe recovery-action remap timeout",
        ),
        ([(0, ecc(3)), (5, ecc(3))], ""),
        ([(0, ecc(3)), (5, ecc(4))], "ecc"),
        ([(0, ecc(3)), (5, ecc(4)), *passed(10, 900)], "ecc"),
        # Time that proves.
        ([(1, UNPROVEN), *passed(5, 59)], "xid"),
        ([(1, UNPROVEN), *passed(5, 60)], ""),
        ([(1, UNPROVEN), *passed(5, 55), (61, UNPROVEN), *passed(62, 59)], "xid"),
        ([(1, UNPROVEN), *passed(5, 55), (61, FAILING), *passed(62, 55)], "probe xid"),
        ([(1, UNPROVEN), *passed(5, 55), (61, FAILING), *passed(62, 60)], ""),
        ([(1, UNPROVEN), (5, GOOD), (1000, GOOD)], "xid"),  # no probe ran meanwhile
        ([(1, RESET), *passed(5, 900)], "xid"),
        ([(1, REBOOT), *passed(5, 900)], "xid"),
        # The driver's word.
        ([(1, RESET), (5, ACTION), (10, NO_ACTION)], ""),
        ([(1, UNPROVEN), (5, ACTION), (10, NO_ACTION)], "xid"),
        ([(1, RESET), (5, NO_ACTION)], "xid"),  # it never asked
        ([(1, RESET), (5, ACTION), (10, GOOD)], "recovery-action xid"),  # it no longer says
        (
            [(1, REMAP), (5, ACTION), (10, Probed(Reading(remap_failed=True, recovery_action=0)))],
            "remap",
        ),
        # Away and back.
        ([(0, GOOD), (5, Away())], "lost"),
        ([(0, GOOD), (5, LOST)], "lost"),
        ([(1, RESET), (5, Away()), (10, GOOD)], "lost"),
        ([(1, RESET), (5, LOST), (10, GOOD), *passed(15, 60)], ""),
        ([(1, REBOOT), (5, GOOD), (10, BACK)], ""),
        ([(1, UNPROVEN), (5, GOOD), (10, BACK)], "xid"),
        ([(1, RESET), (5, Away()), (10, FAILING), (15, GOOD)], "lost probe"),
        ([(1, RESET), (5, GOOD), (10, replace(FAILING, new_handle=True)), (15, GOOD)], "probe"),
        # Counters that began again, seen twice.
        ([(0, energy(900)), (1, RESET), (5, energy(901)), (10, energy(3))], "xid"),
        ([(0, energy(900)), (1, RESET), (5, energy(901)), (10, energy(3)), (15, energy(4))], ""),
        ([(0, energy(900)), (1, RESET), (5, energy(3)), (10, energy(902))], "xid"),
        ([(0, energy(900)), (1, RESET), (5, energy(3)), (10, energy(902)), (15, energy(5))], "xid"),
        ([(0, energy(900)), (1, RESET), (5, energy(800)), (10, energy(800))], "xid"),
        # The operator's word.
        ([(1, RESET), (5, ResetDone()), (10, GOOD)], ""),
        ([(1, RESET), (5, ResetDone()), (10, FAILING), (15, GOOD)], "probe"),
        ([(1, UNPROVEN), (5, ResetDone()), (10, GOOD)], "xid"),
    ],
)
def test_faults_begin_and_end_by_the_rules(events, left):
    assert reasons(*events) == left


@pytest.mark.parametrize("event", [GOOD, ecc(0), energy(5), NO_ACTION])
def test_a_release_without_a_reset_ends_nothing(event):
    """Fault 1: released and opened again, a GPU with XID 95 was Healthy."""
    start = [(0, energy(4)), (1, RESET), (5, energy(4)), (10, Unwatched())]
    assert reasons(*start, (70, event), (75, event)) == "xid"
    assert reasons(*start, (40, Unwatched()), (130, event), (135, event)) == "xid"  # made longer


def test_released_time_proves_nothing():
    """Fault 2: 60 s without a probe, then one that passed: Healthy."""
    start = [(1, UNPROVEN), (5, GOOD), (10, Unwatched())]
    assert reasons(*start, (70, GOOD)) == "xid"
    assert reasons(*start, *passed(70, 59)) == "xid"
    assert reasons(*start, *passed(70, 60)) == ""
    # Nor does time in which it was away, or in which the agent's machine slept.
    assert reasons((1, UNPROVEN), (5, GOOD), (6, Away()), (70, GOOD)) == "lost xid"
    assert reasons((1, UNPROVEN), (5, GOOD), (70, GOOD)) == "xid"


@pytest.mark.parametrize("probe", [REMAP, ACTION, FAILING], ids=["remap", "action", "error"])
@pytest.mark.parametrize(
    "returned", [[BACK], [Away(), GOOD], [ResetDone(), GOOD]], ids=["handle", "away", "said"]
)
def test_a_fault_that_still_stands_after_a_reset_is_not_ended_in_between(probe, returned):
    """Fault 13: cleared before the new handle was probed, it was Healthy for 5 s."""
    *before, last = returned
    back = replace(probe, new_handle=last.new_handle)
    history = [(n * 5.0, event) for n, event in enumerate([probe, *before, back], 1)]
    assert all(after(*history[:n]).faults for n in range(1, len(history) + 1))
    fine = [(n * 5.0, event) for n, event in enumerate([probe, *before, last], 1)]
    assert not {"remap", "recovery-action"} & set(reasons(*fine).split())


@pytest.mark.parametrize(
    ("returned", "back_at"),
    [
        ([(5, GOOD), (20, BACK)], 5),
        ([(5, GOOD), (10, Away()), (20, GOOD)], 10),
        ([(5, GOOD), (10, ResetDone()), (20, GOOD)], 10),
        ([(5, energy(900)), (20, energy(3)), (25, energy(4))], 5),
        ([(5, energy(900)), (10, Unwatched()), (20, energy(3)), (25, energy(4))], 10),
    ],
)
def test_facts_that_are_newer_than_a_return_survive_it(returned, back_at):
    """Fault 14: an XID after the return, before the look that saw it, was wiped."""
    for at, left in ((back_at - 1, False), (back_at + 1, True)):
        history = sorted([*returned, (at, RESET)], key=lambda each: each[0])
        assert (Reason.XID in {f.reason for f in after(*history).faults}) is left


def test_counters_that_began_again_are_a_reset_once():
    """A second one is seen again, and so are memory errors after the first."""
    once = [(0, ecc(8, energy=900)), (5, ecc(0, energy=3)), (10, ecc(0, energy=4))]
    assert reasons(*once, (12, RESET), *[(15 + n, ecc(0, energy=5 + n)) for n in range(9)]) == "xid"
    assert reasons(*once, (15, ecc(1, energy=5))) == "ecc"
    assert after(*once).counters == Counters(4, 0)


def test_a_gpu_that_did_not_answer_before_its_release_is_reset_by_it():
    """Its counters are of long ago, but the driver refuses a reset while we are there."""
    history = [(0, energy(900)), (1, RESET), *[(n, FAILING) for n in range(5, 30, 5)]]
    history += [(30, Unwatched()), (90, energy(3)), (95, energy(4))]
    assert reasons(*history) == "probe"


def test_a_reason_keeps_its_time_and_only_becomes_stricter():
    health = after((1, UNPROVEN), (2, RESET), (3, UNPROVEN), (4, REBOOT))
    (fault,) = health.faults
    assert (fault.since, fault.effect) == (1001, Effect.UNTIL_REBOOT)
    assert fault.detail == "XID 79 (GPU has fallen off the bus)"
    assert health.active[0].newest == 4
    assert health.falls == (1,)


def test_a_gpu_that_is_lost_for_long_expires_and_is_itself_again_when_it_is_back():
    lost = after((0, GOOD), (1, RESET), (10, Away()), (609, Away()))
    assert not lost.expired
    gone = advance(lost, Away(), Moment(610, 0), RULES, sharing=SharingRules())
    assert gone.expired
    assert gone.waits_for_reset
    back = advance(gone, GOOD, Moment(611, 0), RULES, sharing=SharingRules())
    assert (back.expired, back.waits_for_reset, back.away_since) == (False, False, None)


def test_the_wait_doubles_from_the_third_relapse_on_up_to_an_hour():
    waits = [recovery_wait(60, relapses) for relapses in range(10)]
    assert waits == [60, 60, 60, 120, 240, 480, 960, 1920, 3600, 3600]
    assert recovery_wait(7200, 9) == 7200  # a setting above the bound is kept
    assert recovery_wait(1, 10**9) == 3600
    history: list[tuple[float, HealthEvent]] = []
    for n, wait in enumerate((60, 60, 60, 120, 240)):
        history += [(n * 300, UNPROVEN), *passed(n * 300 + 5, wait)]
    assert (reasons(*history[:-1]), reasons(*history)) == ("xid", "")
    assert after(*history).recovery_wait == 240
    later = [*history, (RELAPSE_WINDOW + 900, GOOD)]
    assert after(*later).recovery_wait == 60


def test_counters_know_what_they_could_not_read():
    assert Counters(100, 2).updated(Counters(None, 3)) == Counters(100, 3)
    for before, later, began in (
        (Counters(100, 2), Counters(101, 2), False),
        (Counters(100, 2), Counters(51, 1), False),  # a little is no restart
        (Counters(100, 2), Counters(49, 2), True),
        (Counters(100, 2), Counters(None, 0), True),
        (Counters(100, 2), Counters(), False),
        (Counters(), Counters(0, 0), False),
    ):
        assert before.started_over(later) is began


# Whatever the edges report

numbers = st.none() | st.integers(0, 20) | st.integers(0, 2**63)
readings = st.builds(
    Reading,
    lost=st.booleans(),
    error=st.none() | st.just("no"),
    hung=st.booleans(),
    uncorrectable_ecc=numbers,
    remap_failed=st.none() | st.booleans(),
    remap_pending=st.none() | st.booleans(),
    recovery_action=st.none() | st.integers(-1, 9),
    compute_mode=st.none() | st.sampled_from(ComputeMode),
    energy_millijoules=numbers,
) | st.builds(Reading, energy_millijoules=st.integers(0, 20), recovery_action=st.integers(0, 1))
events = st.one_of(
    st.builds(XidSeen, st.sampled_from([13, 74, 95, 79, 999]) | st.integers()),
    st.builds(Probed, readings, st.booleans()),
    st.sampled_from([Away(), Unwatched(), ResetDone(), GOOD, GOOD]),
)
clocks = st.tuples(st.sampled_from([0, 0.1, 5, 5, 60, 4000]), st.floats(-1e6, 1e9))


@given(st.lists(st.tuples(events, clocks), max_size=40), st.booleans())
@tried(300)
def test_whatever_happens_what_is_known_is_consistent(happened, mps):
    health, now = GpuHealth(), 100.0
    for event, (seconds, wall) in happened:
        now += seconds
        before, health = (
            health,
            advance(health, event, Moment(now, wall), RULES, sharing=SharingRules(mps=mps)),
        )
        names = [fault.reason for fault in health.faults]
        assert len(names) == len(set(names))
        assert all(fault.detail for fault in health.faults)
        assert all(each.newest <= now for each in health.active)
        assert health.falls == tuple(sorted(health.falls))
        assert len(health.falls) <= len(happened)
        assert RULES.recovery_seconds <= health.recovery_wait <= 3600
        known = {each.fault.reason: each for each in before.active}
        for each in health.active:
            if (old := known.get(each.fault.reason)) is not None:
                assert each.fault.since == old.fault.since
                assert list(Effect).index(each.fault.effect) >= list(Effect).index(old.fault.effect)
                assert each.newest >= old.newest
        ended = known.keys() - set(names)
        if ended:  # only what was read of a GPU that answers ends a fault
            assert isinstance(event, Probed)
            assert event.reading.answered
        if isinstance(event, Probed | Away) and not (
            isinstance(event, Probed) and event.reading.answered
        ):
            assert health.faults
        if isinstance(event, Probed) and event.reading.answered:
            assert (health.seen, health.away_since, health.back_after) == (now, None, None)
            assert not health.expired
        assert health.good_seconds == 0 or health.active
