import pytest

from vgpu_agent.gpu.driver import ComputeMode, Reading
from vgpu_agent.gpu.health import (
    POLICY,
    Counters,
    Effect,
    Fact,
    Finding,
    XidOverrides,
    judge_reading,
    judge_xid,
    recovery_wait,
)
from vgpu_agent.gpu.xids import CATALOGUE
from vgpu_agent.model.devices import Fault, Reason

# The policy once more, in the words of the catalogue: every bucket that it has.
EFFECTS = {
    "IGNORE": Effect.COUNT,
    "RESTART_APP": Effect.COUNT,
    "WORKFLOW_XID_45": Effect.COUNT,
    "XID_154": Effect.COUNT,
    "RESET_GPU": Effect.UNTIL_RESET,
    "RESTART_BM": Effect.UNTIL_RESET,
    "RESTART_VM": Effect.UNTIL_RESET,
    "WORKFLOW_XID_48": Effect.UNTIL_RESET,
    "CHECK_MECHANICALS": Effect.UNTIL_GOOD,
    "CHECK_UVM": Effect.UNTIL_GOOD,
    "CONTACT_SUPPORT": Effect.UNTIL_GOOD,
    "UPDATE_SWFW": Effect.UNTIL_GOOD,
    "WORKFLOW_NVLINK_ERR": Effect.UNTIL_GOOD,
    "WORKFLOW_NVLINK5_ERR": Effect.UNTIL_GOOD,
    "": Effect.UNTIL_GOOD,
}


@pytest.mark.parametrize("xid", CATALOGUE)
def test_an_xid_has_the_effect_of_its_bucket(xid):
    row = CATALOGUE[xid]
    finding = judge_xid(xid)
    assert finding.rule.effect is EFFECTS[row.bucket]
    assert finding.detail == f"XID {xid} ({row.event})"
    reason = None if EFFECTS[row.bucket] is Effect.COUNT else Reason.XID
    assert finding.rule.reason is reason


def test_every_bucket_of_the_table_is_one_of_the_catalogue():
    assert {row.bucket for row in CATALOGUE.values()} == set(EFFECTS)


@pytest.mark.parametrize(
    ("xid", "effect"),
    [
        (13, Effect.COUNT),  # an application's own fault
        (31, Effect.COUNT),
        (43, Effect.COUNT),
        (45, Effect.COUNT),
        (48, Effect.UNTIL_RESET),  # double bit ECC error
        (63, Effect.COUNT),
        (64, Effect.UNTIL_RESET),
        (74, Effect.UNTIL_GOOD),
        (79, Effect.UNTIL_RESET),  # off the bus
        (94, Effect.COUNT),
        (95, Effect.UNTIL_RESET),
        (119, Effect.UNTIL_RESET),
        (154, Effect.COUNT),
    ],
)
def test_the_xids_that_operators_know_have_the_effect_that_they_expect(xid, effect):
    assert judge_xid(xid).rule.effect is effect


@pytest.mark.parametrize("xid", [0, 1, 12, 14, 999, 2**63, -1])
def test_an_xid_that_the_catalogue_does_not_know_marks_until_proven_good(xid):
    finding = judge_xid(xid)
    assert finding == Finding(Fact.XID_UNPROVEN, f"XID {xid} (not in the catalogue)")
    assert finding.rule.effect is Effect.UNTIL_GOOD


def test_the_catalogue_is_whole_and_cannot_be_changed():
    assert len(CATALOGUE) == 109
    assert all(row.event for row in CATALOGUE.values())
    with pytest.raises(TypeError):
        CATALOGUE[13] = CATALOGUE[79]


@pytest.mark.parametrize(
    ("xid", "overrides", "effect"),
    [
        (79, XidOverrides(ignored=frozenset({79})), Effect.COUNT),
        (74, XidOverrides(ignored=frozenset({74})), Effect.COUNT),
        (999, XidOverrides(ignored=frozenset({999})), Effect.COUNT),
        (31, XidOverrides(critical=frozenset({31})), Effect.UNTIL_GOOD),
        (79, XidOverrides(critical=frozenset({79})), Effect.UNTIL_RESET),
        (31, XidOverrides(ignored=frozenset({13}), critical=frozenset({43})), Effect.COUNT),
    ],
)
def test_an_operator_knows_better_than_the_catalogue(xid, overrides, effect):
    assert judge_xid(xid, overrides).rule.effect is effect


def judge(reading, *, ecc_baseline=0, shared_by_mps=False):
    return [
        finding.fact
        for finding in judge_reading(
            reading, ecc_baseline=ecc_baseline, shared_by_mps=shared_by_mps
        )
    ]


@pytest.mark.parametrize(
    ("reading", "facts"),
    [
        (Reading(), []),
        (Reading(memory_used_bytes=5, uncorrectable_ecc=0, remap_failed=False), []),
        (Reading(recovery_action=0, compute_mode=ComputeMode.DEFAULT), []),
        (Reading(error="nvmlDeviceGetMemoryInfo: Unknown Error"), [Fact.PROBE_FAILED]),
        (Reading(error=""), [Fact.PROBE_FAILED]),
        (Reading(lost=True, error="gone", uncorrectable_ecc=9), [Fact.LOST]),
        (Reading(remap_pending=True), [Fact.REMAP_PENDING]),
        (Reading(remap_failed=True, remap_pending=True), [Fact.REMAP_FAILED, Fact.REMAP_PENDING]),
        (Reading(uncorrectable_ecc=1), [Fact.ECC]),
        (Reading(compute_mode=ComputeMode.PROHIBITED), [Fact.COMPUTE_MODE]),
        (Reading(compute_mode=ComputeMode.EXCLUSIVE_PROCESS), [Fact.COMPUTE_MODE]),
        *((Reading(recovery_action=action), [Fact.RECOVERY_ACTION]) for action in range(1, 9)),
    ],
)
def test_a_reading_shows_what_is_wrong_and_nothing_else(reading, facts):
    assert judge(reading) == facts


def test_errors_count_from_those_at_the_start_and_not_where_none_were_read():
    assert judge(Reading(uncorrectable_ecc=5), ecc_baseline=5) == []
    assert judge(Reading(uncorrectable_ecc=4), ecc_baseline=5) == []
    assert judge(Reading(uncorrectable_ecc=6), ecc_baseline=5) == [Fact.ECC]
    assert judge(Reading(uncorrectable_ecc=6), ecc_baseline=None) == []


def test_the_exclusive_mode_is_what_mps_wants():
    exclusive = Reading(compute_mode=ComputeMode.EXCLUSIVE_PROCESS)
    assert judge(exclusive, shared_by_mps=True) == []
    prohibited = Reading(compute_mode=ComputeMode.PROHIBITED)
    assert judge(prohibited, shared_by_mps=True) == [Fact.COMPUTE_MODE]


def test_an_action_that_is_not_known_is_told_by_its_number():
    (finding,) = judge_reading(Reading(recovery_action=42), ecc_baseline=None, shared_by_mps=False)
    assert finding.detail == "the driver asks for action 42"


def test_there_is_one_rule_for_every_fact_and_a_reason_exactly_where_a_card_is_marked():
    assert set(POLICY) == set(Fact)
    for rule in POLICY.values():
        marked = rule.effect not in (Effect.TELL, Effect.COUNT)
        assert (rule.reason is not None) is marked
        assert rule.advice


def test_every_reason_that_a_card_can_have_is_one_of_the_policy():
    assert {rule.reason for rule in POLICY.values()} - {None} == set(Reason)


def test_a_finding_becomes_a_fault_with_its_time_its_stay_and_its_advice():
    fault = Finding(Fact.ECC, "2 errors").fault(7.0)
    advice = POLICY[Fact.ECC].advice
    assert fault == Fault(Reason.ECC, 7.0, "2 errors", until_reset=True, advice=advice)
    assert Finding(Fact.REMAP_PENDING, "one").fault(7.0) is None


@pytest.mark.parametrize(
    ("before", "after", "fell"),
    [
        (Counters(100, 2), Counters(101, 2), False),
        (Counters(100, 2), Counters(99, 2), True),
        (Counters(100, 2), Counters(None, 1), True),
        (Counters(100, 2), Counters(None, None), False),
        (Counters(None, None), Counters(0, 0), False),
    ],
)
def test_a_count_that_only_grows_has_fallen_where_the_card_was_initialised_anew(
    before, after, fell
):
    assert before.fell(after) is fell


def test_what_a_probe_could_not_read_stays_as_it_was():
    assert Counters(100, 2).updated(Counters(None, 3)) == Counters(100, 3)


def test_the_wait_doubles_from_the_third_relapse_on_up_to_an_hour():
    waits = [recovery_wait(60, relapses) for relapses in range(10)]
    assert waits == [60, 60, 60, 120, 240, 480, 960, 1920, 3600, 3600]
    assert recovery_wait(7200, 9) == 7200  # a setting above the bound is kept
    assert recovery_wait(1, 10**9) == 3600
