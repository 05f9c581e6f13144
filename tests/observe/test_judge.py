"""What the state of a node means: the checks that every view shows."""

from dataclasses import replace

import pytest

from tests.test_doctor import expect
from tests.test_status import DAEMON, FAULT, MPS, RULES, UUIDS, gpu, report, shown
from vgpu_agent.commands.doctor.checks import render_text, worst
from vgpu_agent.model.acceptance import Counts
from vgpu_agent.model.advice import Remedy
from vgpu_agent.model.limits import Mode
from vgpu_agent.model.rules import MemoryLimits, SharingRules
from vgpu_agent.observe import judge
from vgpu_agent.observe.judge import FAIL, OK, WARN
from vgpu_agent.observe.mps import MpsReport
from vgpu_agent.observe.report import (
    Check,
    DriverReport,
    ExcludedReport,
    KubeletReport,
    LimitsReport,
    PodResourcesReport,
)

NODE_LIMITS = [
    (Mode.OFF, None, None, ""),
    (Mode.NONE, "too old", OK, "not by the driver: too old"),
    (Mode.HOOK, None, OK, "container toolkit sets"),
    (Mode.HOOK, "MIG", OK, "toolkit sets them; not on every GPU: MIG"),
    (Mode.DRIVER, None, OK, "for every container"),
    (Mode.DRIVER, "MIG", WARN, "not on every GPU: MIG"),
]


def daemons(**changes: object) -> MpsReport:
    """All is well but for the MPS daemon of a GPU."""
    return replace(MPS, daemons={**MPS.daemons, UUIDS[0]: replace(DAEMON, **changes)})


def judged(**changes: object) -> list[Check]:
    return list(judge.checks(report(**changes), RULES))


def test_a_report_where_all_is_well_is_all_ok():
    found = judged()
    assert worst(found) is OK, render_text(found)
    names = ["driver", "mps", "GPUs", "kubelet", "podresources", "GPU 0", "GPU 1"]
    assert [each.name for each in found] == names
    assert "NVIDIA A10G GPU-2b6f0a3e-1c2d-4e5f-8a9b-0c1d2e3f4a5b, 24576 MiB" in found[5].detail
    assert "10 vGPUs of 2048 MiB; healthy" in found[5].detail
    assert [each.gpu for each in found] == [None] * 5 + list(UUIDS)


ILL = gpu(0, healthy=False, faults=(FAULT,), remedy=Remedy.REBOOT, vgpus=Counts(10, 0, 4, 6, 4))
OUT = KubeletReport(False, False, 0, None, None, None)
NO_PODS = PodResourcesReport(False, "no dir")
MIG = ExcludedReport("GPU-m", 2, "L4", "mig", "MIG is on: turn it off")


@pytest.mark.parametrize(
    ("changes", "name", "verdict", "words"),
    [
        (
            {"driver": DriverReport(False, None, "no library", None, None)},
            "driver",
            FAIL,
            "no library",
        ),
        (
            {"driver": DriverReport(False, "5", "released", "2026-03-04T05:07:00+00:00", None)},
            "driver",
            WARN,
            "released for a reset until 2026-03-04 05:07:00 UTC",
        ),
        ({"health_checks": False}, "health checks", WARN, "VGPU_HEALTH_CHECKS=on"),
        ({"gpus": ()}, "GPUs", FAIL, "lists no GPU"),
        ({"gpus": (), "gone": ("GPU-x",)}, "GPUs", FAIL, "no GPU drain the node and reboot it"),
        ({"gone": ("GPU-x",)}, "gone", WARN, "GPU-x drain the node and reboot it, unless"),
        ({"gpus": (), "excluded": (MIG,)}, "GPUs", FAIL, "0 of 1 GPUs are shared"),
        ({"excluded": (MIG,)}, "GPUs", OK, "2 of 3 GPUs are shared"),
        ({"excluded": (MIG,)}, "GPU 2", WARN, "is excluded (mig): MIG is on: turn it off"),
        ({"excluded": (replace(MIG, reason="replicas"),)}, "GPU 2", OK, "is excluded (replicas)"),
        (
            {"gpus": (ILL,)},
            "GPU 0",
            FAIL,
            "fallen off the bus (ends by a reboot of the node) drain the node and reboot it",
        ),
        ({"gpus": (gpu(0, notes=("a row waits",)),)}, "GPU 0 note", WARN, "a row waits"),
        ({"gpus": (gpu(0, memory_bytes=None, vgpu_bytes=None),)}, "GPU 0", OK, "memory not known"),
        ({"gpus": (gpu(0, unattributed_processes=2),)}, "GPU 0 processes", WARN, "2 processes"),
        ({"kubelet": replace(OUT, error="gone")}, "kubelet", FAIL, "registered: gone"),
        ({"kubelet": OUT}, "kubelet", FAIL, "not registered: starting"),
        ({"kubelet": replace(OUT, rival="x")}, "kubelet", FAIL, "remove one of the two"),
        ({"kubelet": replace(OUT, registered=True)}, "kubelet", FAIL, "follow the list"),
        ({"kubelet": replace(OUT, connected=True, error="odd")}, "kubelet", WARN, "odd"),
        (
            {"podresources": NO_PODS},
            "podresources",
            WARN,
            "older: no dir mount the kubelet's pod-resources directory",
        ),
        ({"podresources": NO_PODS, "kubelet": OUT}, "podresources", WARN, "as for the kubelet"),
        ({"process_metrics": False}, "podresources", OK, "usage: off (`VGPU_PROCESS_METRICS`)"),
        ({"mps": None}, "sharing", OK, "by time-slicing"),
        ({"orphaned": ("GPU-x::3",)}, "orphaned", WARN, "vgpu-agent drain-list GPU-x"),
        ({"problems": ("cannot write /x",)}, "agent", WARN, "cannot write /x"),
        ({"mps": MPS}, "mps", OK, "with 3 clients"),
        ({"mps": replace(MPS, problem="nobody")}, "mps", FAIL, "given: nobody"),
        ({"mps": daemons(problem="not in effect")}, "mps", FAIL, "1 of 2 GPUs are served"),
        ({"mps": daemons(busy="held by 7")}, "GPU 0 mps", WARN, "held by 7"),
        ({"mps": daemons(failing="again")}, "GPU 0 mps", FAIL, "again"),
        ({"mps": replace(MPS, unwatched="nobody looks")}, "mps watch", WARN, "nobody looks"),
        ({"mps": replace(MPS, split_containers=2)}, "mps containers", FAIL, "2 containers"),
        ({"mps": replace(MPS, replacement="5 instead of 10")}, "mps settings", WARN, "5 instead"),
        ({"mps": replace(MPS, waiting_clients=2)}, "mps clients", WARN, "as one user"),
    ],
)
def test_what_a_report_says_is_what_is_said(changes, name, verdict, words):
    found = judged(**changes)
    expect(found, name, verdict, words)
    # `status` shows the same; a GPU that is well has its row.
    page = shown(report(**changes), wide=True)
    well = {each.uuid for each in report(**changes).gpus if each.healthy}
    for each in found:
        if not (each.verdict is OK and each.gpu in well):
            assert each.detail in page
            assert each.verdict is OK or each.advice in page


@pytest.mark.parametrize(("mode", "error", "verdict", "words"), NODE_LIMITS)
def test_how_memory_is_limited_is_said(mode, error, verdict, words):
    found = judged(memory_limits=LimitsReport(mode, error, 0))
    if verdict is None:
        assert not any(each.name == "memory limits" for each in found)
    else:
        expect(found, "memory limits", verdict, words)


def test_a_node_that_must_limit_memory_and_cannot_fails():
    rules = replace(RULES, sharing=SharingRules(memory_limits=MemoryLimits.DRIVER))
    limits = LimitsReport(Mode.NONE, "cgroup v1", 0)
    found = list(judge.checks(report(memory_limits=limits), rules))
    expect(found, "memory limits", FAIL, "cgroup v1 make the node able to do it")


def test_a_container_without_its_limit_is_named():
    (held, *_) = report().allocations
    found = judged(allocations=(replace(held, memory_limit_problem="refused"),))
    who = f"{held.namespace}/{held.pod}, container {held.container}"
    expect(found, "GPU 0 memory limit", WARN, f"{who}, runs without its limit: refused")


def test_gpus_and_excluded_ones_are_in_the_order_of_their_index():
    found = judged(gpus=(gpu(1),), excluded=(replace(MIG, index=0),))
    names = [each.name for each in found]
    assert names.index("GPU 0") < names.index("GPU 1")


def test_of_a_single_look_nothing_is_said_that_only_an_agent_knows():
    found = judge.of_look(report(kubelet=OUT), RULES)
    assert not {"kubelet", "podresources"} & {each.name for each in found}
