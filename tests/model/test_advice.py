"""What to do: commands that can be pasted."""

import re
import shlex
from dataclasses import fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.model.strategies import fault_sets, tried
from vgpu_agent.arguments import parse
from vgpu_agent.model import advice
from vgpu_agent.model.advice import Remedy, for_gpu
from vgpu_agent.model.devices import Effect, Fault, Reason
from vgpu_agent.model.place import Advice, Place, Step, in_a_line
from vgpu_agent.model.policy import Fact, Finding, remedy
from vgpu_agent.model.rules import MpsDaemons, SharingRules

PLACE = Place("node-7", "gpus", "agent-x")
UUID = "GPU-2b6f0a3e-1c2d-4e5f-8a9b-0c1d2e3f4a5b"
SHARING = (SharingRules(), SharingRules(mps=True), SharingRules(mps_daemons=MpsDaemons.NODE))
NODE_ADVICE = (
    advice.agent_log,
    advice.driver_down,
    advice.released,
    advice.no_gpu,
    advice.silent_gpu,
    advice.gone,
    advice.kubelet_away,
    advice.rival,
    advice.podresources,
    advice.processes,
    advice.mps,
    advice.mps_replacement,
    advice.mps_busy,
)
EVERY = [
    *(for_gpu(each, UUID, PLACE, sharing) for each in Remedy for sharing in SHARING),
    *(make(PLACE) for make in NODE_ADVICE),
    advice.cordoned(UUID, PLACE),
    advice.orphaned((f"{UUID}::3", f"{UUID}::4"), PLACE),
    *(advice.no_limits(PLACE, enforced=each) for each in (True, False)),
    *(each for each in vars(advice).values() if isinstance(each, Advice)),
]


@pytest.mark.parametrize("found", EVERY, ids=lambda found: found.what[:30])
def test_every_command_can_be_pasted(found):
    assert found.what
    for step in found.steps:
        assert step.words
        words = shlex.split(step.command)
        assert words[0] in ("kubectl", "fuser", "systemctl", "nvidia-smi")
        # Nothing is left to fill in: of a release only which of the GPUs.
        blanks = re.findall(r"\b[A-Z]{3,}\b|<\w+>", step.command.replace(UUID, ""))
        assert set(blanks) <= {"NVRM", "DEFAULT", "ROW_REMAPPER", "INDEX"}
        # Folded at spaces: within quotes that would change it.
        assert "'" not in step.command
        assert '"' not in step.command
        assert "\n" not in step.words + step.command


def test_only_a_release_leaves_the_index_to_fill_in():
    with_index = {each.what for each in EVERY for s in each.steps if "INDEX" in s.command}
    assert with_index == {advice.released(PLACE).what}


def test_without_names_it_is_as_in_the_runbook():
    assert Place().agent == "kubectl -n NAMESPACE exec POD -c agent --"
    assert [place.in_pod for place in (Place(), Place("n"), PLACE)] == [False, False, True]


def test_a_line_of_the_log_has_how_it_begins():
    one, two = (Advice("do", (Step("a", "first"), Step("b", "second"))[:n]) for n in (1, 2))
    assert in_a_line(Advice("do"), PLACE) == "do"
    assert in_a_line(one, PLACE) == "do: first"
    more = "; all commands: kubectl -n gpus exec agent-x -c agent -- vgpu-agent status"
    assert in_a_line(two, PLACE) == f"do: first{more}"


@tried(200)
@given(faults=fault_sets)
def test_a_gpu_has_one_remedy_and_it_is_that_of_its_worst_fault(faults):
    found = remedy(faults)
    alone = [remedy([fault]) for fault in faults]
    assert found in (alone or [Remedy.NOTHING])
    order = list(Remedy)
    assert all(order.index(each) <= order.index(found) for each in alone)


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        # It fell off the bus, the driver asks for something, its memory failed: a reboot is all.
        ((Fact.XID_REBOOT, Fact.LOST, Fact.ECC, Fact.RECOVERY_ACTION), Remedy.REBOOT),
        ((Fact.ECC, Fact.PROBE_TIMEOUT, Fact.MPS_DOWN), Remedy.RESET),
        ((Fact.REMAP_FAILED, Fact.RECOVERY_REBOOT), Remedy.REPLACE),
        ((Fact.XID_UNPROVEN,), Remedy.WAIT),
    ],
)
def test_one_gpu_has_one_advice(facts, expected):
    made = [Finding(fact, "x").fault(0.0) for fact in facts]
    assert remedy(made) is expected
    text = str(for_gpu(remedy(made), UUID, PLACE, SharingRules(mps=True)))
    if expected is Remedy.REBOOT:
        assert "gpu-reset" not in text
        assert "systemctl reboot" in text


def test_every_fact_that_marks_a_gpu_has_a_remedy_of_its_own_kind():
    for fact in (each for each in Fact if each.value.reason is not None):
        assert remedy([Finding(fact, "x").fault(0.0)]) is fact.value.remedy
    # What no rule makes, such as a fault that another version kept, is looked at.
    assert remedy([Fault(Reason.MPS, 0.0, "x", Effect.UNTIL_REBOOT)]) is Remedy.LOOK


def test_each_advice_of_the_node_is_checked_here():
    made = {name for name, each in vars(advice).items() if getattr(each, "__annotations__", {}).get("return") is Advice}  # fmt: skip # noqa: E501
    assert made - {"for_gpu", "cordoned", "orphaned", "no_limits"} == {
        each.__name__ for each in NODE_ADVICE
    }


names = st.from_regex(r"[a-z0-9]([-a-z0-9.]{0,60}[a-z0-9])?", fullmatch=True)


@tried(60)
@given(names=st.tuples(*(names for _ in fields(Place))), remedy=st.sampled_from(Remedy))
def test_names_of_kubernetes_need_no_quotes(names, remedy):
    for step in for_gpu(remedy, UUID, Place(*names), SharingRules(mps=True)).steps:
        assert all(name in shlex.join([name]) for name in names)
        assert shlex.split(step.command)


def test_commands_of_the_agent_are_commands_of_this_version():
    for found in EVERY:
        for step in found.steps:
            command = step.command.partition(" vgpu-agent ")[2].split()
            if command:
                assert parse(command)
