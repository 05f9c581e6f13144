import pytest

from tests import policy_table
from vgpu_agent.model.devices import Effect, Fault, Reason
from vgpu_agent.model.facts import ComputeMode, Reading
from vgpu_agent.model.policy import Fact, Finding, judge_reading, judge_xid
from vgpu_agent.model.rules import HealthRules, SharingRules
from vgpu_agent.model.xids import CATALOGUE

RULES = HealthRules()

# The policy once more, in the words of the catalogue: every bucket that it has.
EFFECTS = {
    "IGNORE": Effect.COUNT,
    "RESTART_APP": Effect.COUNT,
    "WORKFLOW_XID_45": Effect.COUNT,
    "XID_154": Effect.COUNT,
    "RESET_GPU": Effect.UNTIL_RESET,
    "RESTART_BM": Effect.UNTIL_REBOOT,
    "RESTART_VM": Effect.UNTIL_REBOOT,
    "WORKFLOW_XID_48": Effect.UNTIL_RESET,
    "CHECK_MECHANICALS": Effect.UNTIL_GOOD,
    "CHECK_UVM": Effect.UNTIL_GOOD,
    "CONTACT_SUPPORT": Effect.UNTIL_GOOD,
    "UPDATE_SWFW": Effect.UNTIL_GOOD,
    "WORKFLOW_NVLINK_ERR": Effect.UNTIL_GOOD,
    "WORKFLOW_NVLINK5_ERR": Effect.UNTIL_GOOD,
    "": Effect.UNTIL_GOOD,
}


def test_every_xid_of_the_catalogue_has_the_effect_of_its_bucket():
    assert {row.bucket for row in CATALOGUE.values()} == set(EFFECTS)
    for xid, row in CATALOGUE.items():
        finding = judge_xid(xid, RULES)
        assert finding.rule.effect is EFFECTS[row.bucket], xid
        assert finding.detail == f"XID {xid} ({row.event})"
        counted = finding.rule.effect is Effect.COUNT
        assert finding.rule.reason is (None if counted else Reason.XID)


def test_the_catalogue_is_whole_and_cannot_be_changed():
    assert len(CATALOGUE) == 109
    assert all(row.event for row in CATALOGUE.values())
    with pytest.raises(TypeError):
        CATALOGUE[13] = CATALOGUE[79]


ASKED = Fact.RECOVERY_ACTION


@pytest.mark.parametrize("xid", [0, 1, 12, 14, 999, 2**63, -1])
def test_an_xid_that_the_catalogue_does_not_know_marks_until_proven_good(xid):
    unproven = Finding(Fact.XID_UNPROVEN, f"XID {xid} (not in the catalogue)")
    assert judge_xid(xid, RULES) == unproven


@pytest.mark.parametrize(
    ("xid", "ignored", "critical", "effect"),
    [
        (13, (), (), Effect.COUNT),  # an application's own fault
        (48, (), (), Effect.UNTIL_RESET),  # double bit ECC error
        (79, (), (), Effect.UNTIL_REBOOT),  # off the bus
        (79, (79,), (), Effect.COUNT),
        (74, (74,), (), Effect.COUNT),
        (999, (999,), (), Effect.COUNT),
        (31, (), (31,), Effect.UNTIL_GOOD),
        (79, (), (79,), Effect.UNTIL_REBOOT),
        (31, (13,), (43,), Effect.COUNT),
    ],
)
def test_an_operator_knows_better_than_the_catalogue(xid, ignored, critical, effect):
    rules = HealthRules(ignored_xids=frozenset(ignored), critical_xids=frozenset(critical))
    assert judge_xid(xid, rules).rule.effect is effect


EXCLUSIVE = Reading(compute_mode=ComputeMode.EXCLUSIVE_PROCESS)
PROHIBITED = Reading(compute_mode=ComputeMode.PROHIBITED)


@pytest.mark.parametrize(
    ("reading", "facts"),
    [
        (Reading(), []),
        (Reading(memory_used_bytes=5, uncorrectable_ecc=0, remap_failed=False), []),
        (Reading(recovery_action=0, compute_mode=ComputeMode.DEFAULT), []),
        (Reading(error="nvmlDeviceGetMemoryInfo: Unknown Error"), [Fact.PROBE_FAILED]),
        (Reading(error=""), [Fact.PROBE_FAILED]),
        (Reading(lost=True, error="gone", uncorrectable_ecc=9), [Fact.LOST]),
        (Reading(hung=True, error="3 s"), [Fact.PROBE_TIMEOUT]),
        (Reading(remap_pending=True), [Fact.REMAP_PENDING]),
        (Reading(remap_failed=True, remap_pending=True), [Fact.REMAP_FAILED, Fact.REMAP_PENDING]),
        (Reading(uncorrectable_ecc=1), [Fact.ECC]),
        (PROHIBITED, [Fact.COMPUTE_MODE]),
        (EXCLUSIVE, [Fact.COMPUTE_MODE]),
        *(
            (Reading(recovery_action=n), [Fact.RECOVERY_REBOOT if n in (2, 7) else ASKED])
            for n in range(1, 9)
        ),
    ],
)
def test_a_reading_shows_what_is_wrong_and_nothing_else(reading, facts):
    assert [
        each.fact
        for each in judge_reading(reading, ecc_baseline=0, sharing=SharingRules(mps=False))
    ] == facts


@pytest.mark.parametrize(
    ("reading", "baseline", "mps", "details"),
    [
        (Reading(uncorrectable_ecc=5), 5, True, []),
        (Reading(uncorrectable_ecc=4), 5, True, []),
        (Reading(uncorrectable_ecc=6), 5, True, ["1 uncorrectable memory errors since the start"]),
        (Reading(uncorrectable_ecc=6), None, True, []),
        (EXCLUSIVE, 0, True, []),  # as MPS needs it
        (PROHIBITED, 0, True, ["its compute mode is PROHIBITED"]),
        (Reading(recovery_action=42), 0, True, ["the driver asks for action 42"]),
    ],
)
def test_what_a_reading_means_depends_on_the_start_and_on_mps(reading, baseline, mps, details):
    found = judge_reading(reading, ecc_baseline=baseline, sharing=SharingRules(mps=mps))
    assert [each.detail for each in found] == details


def test_there_is_a_fact_for_every_reason_and_a_reason_exactly_where_a_gpu_is_marked():
    rules = [fact.value for fact in Fact]
    assert {rule.reason for rule in rules} - {None} == set(Reason)
    for rule in rules:
        assert (rule.reason is None) is (rule.effect in (Effect.NOTE, Effect.COUNT))
        assert rule.remedy
        assert rule.what in policy_table.markdown_table()


def test_a_finding_becomes_a_fault_with_its_time_its_effect():
    expected = Fault(Reason.ECC, 7.0, "2 errors", Effect.UNTIL_RESET)
    assert Finding(Fact.ECC, "2 errors").fault(7.0) == expected
    assert Finding(Fact.REMAP_PENDING, "one").fault(7.0) is None
