"""What a report means for the node, as checks: never ok where the report says otherwise.

`status` shows them, and `doctor` adds what no report can know.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from vgpu_agent.model.devices import Reason
from vgpu_agent.model.rules import MIB
from vgpu_agent.observe.mps import MpsReport
from vgpu_agent.observe.report import ExcludedReport, FaultReport, GpuReport, KubeletReport, Report


class Verdict(StrEnum):
    """What a check came to. `FAIL`: some vGPUs, or all, cannot be given until that ends.

    What an operator wants so is no failure.
    """

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


OK, WARN, FAIL = Verdict.OK, Verdict.WARN, Verdict.FAIL


@dataclass(frozen=True, slots=True)
class Check:
    """What was looked at, what was found, and what to do about it where that is not ok."""

    name: str
    verdict: Verdict
    detail: str
    advice: str = ""


_AGENT_LOG = "see the agent's log, and docs/runbook.md"


def of_report(report: Report) -> list[Check]:
    """All that a running agent reports."""
    return [*of_look(report), *_agent(report)]


def of_look(report: Report) -> list[Check]:
    """What a look at driver, GPUs and MPS found, whoever looked. The first cause first."""
    return [*_driver(report), *_mps(report.mps), *_gpus(report)]


def of_node(report: Report) -> list[Check]:
    """What a running agent reports of all but the GPUs."""
    return [*_driver(report), *_mps(report.mps), *_agent(report)]


def findings(report: Report) -> Iterator[Check]:
    """What is wrong with GPUs, or worth knowing, and which are excluded; as nvidia-smi orders."""
    for each in _by_index(report):
        yield from _findings(each)
    yield from _cordoned_elsewhere(report)


def _by_index(report: Report) -> list[GpuReport | ExcludedReport]:
    every: list[GpuReport | ExcludedReport] = [*report.gpus, *report.excluded]
    return sorted(every, key=lambda each: each.index)


def _driver(report: Report) -> Iterator[Check]:
    driver = report.driver
    if driver.released_until is not None:
        detail = f"all GPUs are released for a reset until {driver.released_until}"
        yield Check("driver", WARN, detail, "reset them now, or wait")
    elif driver.error is not None:
        advice = (
            "no vGPU can be given until `nvidia-smi` works on the node and in this container; a"
            " driver that hangs needs a reboot"
        )
        yield Check("driver", FAIL, driver.error, advice)
    else:
        yield Check("driver", OK, f"version {driver.version}")
    if not report.health_checks:
        advice = "set VGPU_HEALTH_CHECKS=on"
        yield Check("health checks", WARN, "off: pods are put on broken GPUs", advice)


def _mps(mps: MpsReport | None) -> Iterator[Check]:
    if mps is None:
        yield Check("sharing", OK, "by time-slicing, without MPS")
        return
    if mps.problem is not None:
        yield Check("mps", FAIL, f"no vGPU can be given: {mps.problem}", _MPS_LOGS)
    else:
        clients = sum(mps.clients.values())
        serving = sum(daemon.problem is None for daemon in mps.daemons.values())
        detail = f"{serving} of {len(mps.daemons)} GPUs are served, with {clients} clients"
        yield Check("mps", OK, detail)
    if mps.unwatched is not None:
        yield Check("mps watch", WARN, mps.unwatched, _MPS_LOGS)
    if mps.replacement is not None:
        advice = (
            "drain the GPU, then run `vgpu-agent mps restart GPU`, by its UUID, in the MPS pod; for"
            " other limits drain the node's GPU pods, then delete its MPS pod"
        )
        yield Check("mps settings", WARN, mps.replacement, advice)
    for uuid, daemon in mps.daemons.items():
        if daemon.problem is not None and mps.problem is None:
            yield Check(
                "mps daemon", FAIL, f"no vGPU of {uuid} can be given: {daemon.problem}", _MPS_LOGS
            )
        if daemon.busy is not None:
            yield Check("mps busy", WARN, f"{uuid}: {daemon.busy}", "end that process")
        if daemon.failing is not None:
            yield Check("mps servers", FAIL, f"{uuid}: {daemon.failing}", _MPS_LOGS)
    if mps.waiting_clients:
        detail = f"{mps.waiting_clients} clients of another user wait until all of the first end"
        advice = "run the containers of a GPU as one user: MPS serves one at a time"
        yield Check("mps clients", WARN, detail, advice)
    if mps.split_containers:
        detail = f"{mps.split_containers} containers hold vGPUs of several GPUs and cannot start"
        advice = "delete their pods, for ones that ask for fewer, or set VGPU_MPS_DAEMONS=node"
        yield Check("mps containers", FAIL, detail, advice)


_MPS_LOGS = "see the logs of the containers `daemon` and `watch` in the MPS pod of this node"


def _gpus(report: Report) -> Iterator[Check]:
    shared, excluded = len(report.gpus), len(report.excluded)
    detail = f"{shared} of {shared + excluded} GPUs are shared, as {report.vgpus.total} vGPUs"
    if shared:
        yield Check("GPUs", OK, detail)
    elif excluded:
        yield Check("GPUs", FAIL, detail, "see below why each GPU is excluded")
    elif report.driver.up:
        advice = "see `nvidia-smi -L` on the node; a node without GPUs needs no agent"
        yield Check("GPUs", FAIL, "the driver lists no GPU", advice)
    for each in _by_index(report):
        if isinstance(each, GpuReport):
            yield _overview(each)
        yield from _findings(each)
    yield from _cordoned_elsewhere(report)


def _cordoned_elsewhere(report: Report) -> Iterator[Check]:
    """Cordons of GPUs that give no vGPUs anyway."""
    shared = {gpu.uuid for gpu in report.gpus}
    for uuid, reason in report.cordoned.items():
        if uuid not in shared:
            detail = f"{uuid} is cordoned, and gives no vGPUs: {reason or 'no reason given'}"
            advice = f"where it is gone for good: `vgpu-agent uncordon {uuid}`"
            yield Check("cordoned", WARN, detail, advice)


def _overview(gpu: GpuReport) -> Check:
    detail = f"{gpu.model} {gpu.uuid}, {_memory(gpu.memory_bytes)}"
    detail += f"; {gpu.vgpus.total} vGPUs of {_memory(gpu.vgpu_bytes)}"
    if gpu.healthy:
        return Check(f"GPU {gpu.index}", OK, f"{detail}; healthy")
    verdict = max((_verdict(fault) for fault in gpu.faults), key=list(Verdict).index, default=FAIL)
    return Check(f"GPU {gpu.index}", verdict, f"{detail}; no vGPU can be given", "see below")


def _verdict(fault: FaultReport) -> Verdict:
    """A cordon is meant: nothing is wrong with the GPU."""
    return WARN if fault.reason == Reason.CORDONED else FAIL


def _memory(count: int | None) -> str:
    return "memory not known" if count is None else f"{count // MIB} MiB"


def _findings(gpu: GpuReport | ExcludedReport) -> Iterator[Check]:
    name = f"GPU {gpu.index}"
    if isinstance(gpu, ExcludedReport):
        detail = f"{gpu.model} {gpu.uuid} is excluded ({gpu.reason}): {gpu.detail}"
        # The detail says what to do; of a GPU that says nothing it is not known what it would be.
        if gpu.reason in ("error", "timeout"):
            yield Check(name, FAIL, detail, "where it stays so the node needs a reboot")
            return
        verdict = OK if gpu.reason == "replicas" else WARN
        yield Check(name, verdict, detail, "do that, or leave it to others")
        return
    for fault in gpu.faults:
        until = " (until a reset)" if fault.until_reset else ""
        words = f"{fault.reason} since {fault.since}: {fault.detail}{until}"
        yield Check(f"{name} health", _verdict(fault), words, fault.advice or _AGENT_LOG)
    for note in gpu.notes:
        yield Check(f"{name} note", WARN, note, "see docs/health.md and docs/settings.md")
    if gpu.unattributed_processes:
        detail = f"{gpu.unattributed_processes} processes of no pod that holds its vGPUs"
        yield Check(f"{name} processes", WARN, detail, "find them with `nvidia-smi` on the node")


def _agent(report: Report) -> Iterator[Check]:
    """What only a running agent knows."""
    yield _kubelet(report.kubelet)
    pods = report.podresources
    if pods.up:
        usage = "" if report.process_metrics else "; usage: off (VGPU_PROCESS_METRICS)"
        yield Check("podresources", OK, f"the kubelet says who holds which vGPU{usage}")
    else:
        old = "" if report.orphaned is None else ", what is shown is older"
        why = pods.error or "for an unknown reason"
        detail = f"the kubelet does not say who holds which vGPU{old}: {why}"
        advice = "mount the kubelet's pod-resources directory, or set VGPU_KUBELET_DIR"
        yield Check("podresources", WARN, detail, advice)
    if report.orphaned:
        detail = f"held, but no longer advertised: {', '.join(report.orphaned)}"
        advice = "delete the pods that hold them, or set VGPU_REPLICAS back"
        yield Check("orphaned", WARN, detail, advice)
    for problem in report.problems:
        yield Check("agent", WARN, problem, _AGENT_LOG)


def _kubelet(kubelet: KubeletReport) -> Check:
    if kubelet.connected and kubelet.error is None:
        return Check("kubelet", OK, "registered, and it follows the list")
    if kubelet.connected:
        return Check("kubelet", WARN, f"connected, after {kubelet.error}", _AGENT_LOG)
    state = "it does not follow the list" if kubelet.registered else "not registered"
    advice = f"wait a few seconds; then {_AGENT_LOG}"
    return Check("kubelet", FAIL, f"{state}: {kubelet.error or 'starting'}", advice)
