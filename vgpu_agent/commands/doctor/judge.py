"""What a report means for the node, as checks: never ok where the report says otherwise."""

from collections.abc import Iterator

from vgpu_agent.commands.doctor.checks import Check, Verdict
from vgpu_agent.observe.report import GpuReport, KubeletReport, MpsReport, Report

OK, WARN, FAIL = Verdict.OK, Verdict.WARN, Verdict.FAIL

MIB = 2**20

_AGENT_LOG = "see the agent's log, and docs/runbook.md"


def checks_of(report: Report) -> list[Check]:
    """All that a running agent reports."""
    return [*checks_of_look(report), *_agent(report)]


def checks_of_look(report: Report) -> list[Check]:
    """What a look at driver, GPUs and MPS found, whoever looked. The first cause first."""
    return [*_driver(report), *_mps(report.mps), *_gpus(report)]


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
        return
    if mps.problem is not None or not mps.limits_in_effect:
        detail = f"no vGPU can be given: {mps.problem or 'its limits are not in effect'}"
        advice = "see the logs of the containers `daemon` and `watch` in the MPS pod of this node"
        yield Check("mps", FAIL, detail, advice)
    else:
        clients = sum(mps.clients.values())
        yield Check("mps", OK, f"its limits are in effect, and it has {clients} clients")
    if mps.replacement is not None:
        advice = "drain the node's GPU pods, then delete its MPS pod"
        yield Check("mps settings", WARN, mps.replacement, advice)
    if mps.waiting_clients:
        detail = f"{mps.waiting_clients} clients of another user wait until all of the first end"
        advice = "run the containers of a GPU as one user: MPS serves one at a time"
        yield Check("mps clients", WARN, detail, advice)


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
    # In the order of nvidia-smi.
    found = [(gpu.index, list(_gpu(gpu))) for gpu in report.gpus]
    for each in report.excluded:
        detail = f"{each.model} {each.uuid} is excluded ({each.reason}): {each.detail}"
        verdict = OK if each.reason == "replicas" else WARN
        advice = "do that, or leave it to others"  # the detail says what
        found.append((each.index, [Check(f"GPU {each.index}", verdict, detail, advice)]))
    for _, checks in sorted(found, key=lambda each: each[0]):
        yield from checks


def _gpu(gpu: GpuReport) -> Iterator[Check]:
    name = f"GPU {gpu.index}"
    size = gpu.vgpu_bytes // MIB
    detail = f"{gpu.model} {gpu.uuid}, {gpu.memory_bytes // MIB} MiB"
    detail += f"; {gpu.vgpus.total} vGPUs of {size} MiB"
    if not gpu.healthy:
        yield Check(name, FAIL, f"{detail}; unhealthy, no vGPU can be given", "see below")
    elif size < 1:
        advice = "lower VGPU_REPLICAS or VGPU_MEMORY_RESERVED"
        yield Check(name, FAIL, f"{detail}: too little for any container", advice)
    else:
        yield Check(name, OK, f"{detail}; healthy")
    for fault in gpu.faults:
        until = " (until a reset)" if fault.until_reset else ""
        words = f"{fault.reason} since {fault.since}: {fault.detail}{until}"
        yield Check(f"{name} health", FAIL, words, fault.advice or _AGENT_LOG)
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
        yield Check("podresources", OK, "the kubelet says who holds which vGPU")
    else:
        detail = f"the kubelet does not say who holds which vGPU: {pods.error}"
        advice = "mount the kubelet's pod-resources directory, or set VGPU_KUBELET_DIR"
        yield Check("podresources", WARN, detail, advice)
    if report.orphaned:
        detail = f"held, but no longer advertised: {', '.join(report.orphaned)}"
        advice = "delete the pods that hold them, or set VGPU_REPLICAS back"
        yield Check("orphaned", WARN, detail, advice)
    for problem in report.problems:
        yield Check("agent", WARN, problem, _AGENT_LOG)


def _kubelet(kubelet: KubeletReport) -> Check:
    if kubelet.error is not None:
        state = "connected, after" if kubelet.connected else "not registered:"
        verdict = WARN if kubelet.connected else FAIL
        return Check("kubelet", verdict, f"{state} {kubelet.error}", _AGENT_LOG)
    if not kubelet.connected:
        why = "it does not follow the list" if kubelet.registered else "not registered yet"
        return Check("kubelet", FAIL, why, f"wait a few seconds; then {_AGENT_LOG}")
    return Check("kubelet", OK, "registered, and it follows the list")
