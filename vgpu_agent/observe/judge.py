"""What the state of the node means, as checks, each with what to do.

The agent puts them into its report: `status`, `doctor` and the page show the same ones.
"""

from collections.abc import Iterator

from vgpu_agent.model import advice
from vgpu_agent.model.advice import Remedy
from vgpu_agent.model.devices import Reason
from vgpu_agent.model.limits import Mode
from vgpu_agent.model.names import number_of
from vgpu_agent.model.place import Advice, Place
from vgpu_agent.model.rules import MIB, MemoryLimits
from vgpu_agent.model.snapshot import Rules
from vgpu_agent.observe.mps import MpsReport
from vgpu_agent.observe.report import (
    AllocationReport,
    Check,
    ExcludedReport,
    FaultReport,
    GpuReport,
    KubeletReport,
    Report,
    Verdict,
    utc,
)

OK, WARN, FAIL = Verdict.OK, Verdict.WARN, Verdict.FAIL

NONE = Advice("")


def checks(report: Report, rules: Rules) -> Iterator[Check]:
    """All that a running agent says. The first cause first."""
    look = [*of_look(report, rules)]
    yield from (each for each in look if each.gpu is None)
    yield from _agent(report, rules.place)
    yield from (each for each in look if each.gpu is not None)


def of_look(report: Report, rules: Rules) -> Iterator[Check]:
    """What a look at driver, GPUs and MPS found, whoever looked."""
    yield from _driver(report, rules.place)
    yield from _mps(report, rules.place)
    yield from _limits(report, rules)
    yield from _overview(report, rules.place)
    if report.gone:
        detail = f"listed since the boot of the node, and no longer: {', '.join(report.gone)}"
        yield check("gone", WARN, detail, advice.gone(rules.place))
    every: list[GpuReport | ExcludedReport] = [*report.gpus, *report.excluded]
    for each in sorted(every, key=lambda each: each.index):
        if isinstance(each, ExcludedReport):
            yield _excluded(each, rules.place)
        else:
            yield from _gpu(each, report, rules)
    shared = {gpu.uuid for gpu in report.gpus}
    for uuid, reason in report.cordoned.items():
        if uuid not in shared:
            detail = f"{uuid} is cordoned, and gives no vGPUs: {reason or 'no reason given'}"
            yield check("cordoned", WARN, detail, advice.cordoned(uuid, rules.place))


def check(
    name: str, verdict: Verdict, detail: str, what: Advice = NONE, gpu: str | None = None
) -> Check:
    """A check with its advice, where it is not ok."""
    if verdict is OK:
        what = NONE
    return Check(name, verdict, detail, what.what, what.steps, gpu)


# The node


def _driver(report: Report, place: Place) -> Iterator[Check]:
    driver = report.driver
    if driver.released_until is not None:
        detail = f"all GPUs are released for a reset until {utc(driver.released_until)}"
        yield check("driver", WARN, detail, advice.released(place))
    elif driver.error is not None:
        yield check("driver", FAIL, driver.error, advice.driver_down(place))
    else:
        yield check("driver", OK, f"version {driver.version}")
    if not report.health_checks:
        detail = "off: pods are put on broken GPUs"
        yield check("health checks", WARN, detail, advice.CHECKS_OFF)


def _mps(report: Report, place: Place) -> Iterator[Check]:
    mps = report.mps
    if mps is None:
        yield check("sharing", OK, "by time-slicing, without MPS")
        return
    yield _mps_daemons(mps, place)
    if mps.unwatched is not None:
        yield check("mps watch", WARN, mps.unwatched, advice.mps(place))
    if mps.replacement is not None:
        yield check("mps settings", WARN, mps.replacement, advice.mps_replacement(place))
    for gpu in report.gpus:
        daemon = mps.daemons[gpu.uuid]
        name = f"GPU {gpu.index} mps"
        if daemon.busy is not None:
            yield check(name, WARN, daemon.busy, advice.mps_busy(place), gpu.uuid)
        if daemon.failing is not None:
            yield check(name, FAIL, daemon.failing, advice.mps(place), gpu.uuid)
    if mps.waiting_clients:
        detail = f"{mps.waiting_clients} clients of another user wait until all of the first end"
        yield check("mps clients", WARN, detail, advice.MPS_ONE_USER)
    if mps.split_containers:
        detail = f"{mps.split_containers} containers hold vGPUs of several GPUs and cannot start"
        yield check("mps containers", FAIL, detail, advice.MPS_SPLIT)


def _limits(report: Report, rules: Rules) -> Iterator[Check]:
    """Memory limits by the driver."""
    limits, name = report.memory_limits, "memory limits"
    what = advice.for_gpu(Remedy.LIMITS, "", rules.place, rules.sharing)
    if limits.mode is Mode.DRIVER:
        detail = "set by the driver for every container that holds vGPUs"
        some = limits.error and f"not on every GPU: {limits.error}"
        yield check(name, WARN if some else OK, some or detail, what)
    elif limits.mode is Mode.HOOK:
        detail = "by the driver, where the node's container toolkit sets them"
        some = f"; not on every GPU: {limits.error}" if limits.error else ""
        yield check(name, OK, f"{detail}{some}")
    elif limits.mode is Mode.NONE:
        wanted = rules.sharing.memory_limits is MemoryLimits.DRIVER
        yield check(name, FAIL if wanted else OK, f"not by the driver: {limits.error}", what)


def _mps_daemons(mps: MpsReport, place: Place) -> Check:
    if mps.problem is not None:
        return check("mps", FAIL, f"no vGPU can be given: {mps.problem}", advice.mps(place))
    clients = sum(mps.clients.values())
    serving = sum(daemon.problem is None for daemon in mps.daemons.values())
    served = f"{serving} of {len(mps.daemons)} GPUs are served"
    detail = f"{served}, with {number_of(clients, 'client')}"
    if serving == len(mps.daemons):
        return check("mps", OK, detail)
    return check("mps", FAIL, detail, advice.mps(place))


def _overview(report: Report, place: Place) -> Iterator[Check]:
    shared, excluded = len(report.gpus), len(report.excluded)
    vgpus = number_of(report.vgpus.total, "vGPU")
    detail = f"{shared} of {shared + excluded} GPUs are shared, as {vgpus}"
    if shared:
        yield check("GPUs", OK, detail)
    elif excluded:
        yield check("GPUs", FAIL, detail, advice.ALL_EXCLUDED)
    elif report.driver.up:
        what = advice.gone(place) if report.gone else advice.no_gpu(place)
        yield check("GPUs", FAIL, "the driver lists no GPU", what)


def _agent(report: Report, place: Place) -> Iterator[Check]:
    """What only a running agent knows."""
    yield _kubelet(report.kubelet, place)
    pods = report.podresources
    if pods.up:
        usage = "" if report.process_metrics else "; usage: off (`VGPU_PROCESS_METRICS`)"
        yield check("podresources", OK, f"the kubelet says who holds which vGPU{usage}")
    else:
        old = "" if report.orphaned is None else ", what is shown is older"
        why = pods.error or "for an unknown reason"
        detail = f"the kubelet does not say who holds which vGPU{old}: {why}"
        away = not report.kubelet.connected and report.kubelet.rival is None
        what = advice.AS_FOR_KUBELET if away else advice.podresources(place)
        yield check("podresources", WARN, detail, what)
    if report.orphaned:
        detail = f"held, but no longer advertised: {', '.join(report.orphaned)}"
        yield check("orphaned", WARN, detail, advice.orphaned(report.orphaned, place))
    for problem in report.problems:
        yield check("agent", WARN, problem, advice.agent_log(place))


def _kubelet(kubelet: KubeletReport, place: Place) -> Check:
    if kubelet.connected and kubelet.error is None:
        return check("kubelet", OK, "registered, and it follows the list")
    if kubelet.connected:
        detail = f"connected, after {kubelet.error}"
        return check("kubelet", WARN, detail, advice.agent_log(place))
    state = "it does not follow the list" if kubelet.registered else "not registered"
    what = advice.rival(place) if kubelet.rival else advice.kubelet_away(place)
    return check("kubelet", FAIL, f"{state}: {kubelet.error or 'starting'}", what)


# GPUs


def _gpu(gpu: GpuReport, report: Report, rules: Rules) -> Iterator[Check]:
    """One check says how it is, with one advice, whatever is wrong with it; then what is odd."""
    name, place = f"GPU {gpu.index}", rules.place
    if gpu.healthy:
        vgpus = number_of(gpu.vgpus.total, "vGPU")
        size = f"{_memory(gpu.memory_bytes)}; {vgpus} of {_memory(gpu.vgpu_bytes)}"
        detail = f"{gpu.model} {gpu.uuid}, {size}; healthy"
        yield check(name, OK, detail, gpu=gpu.uuid)
    else:
        what = advice.for_gpu(gpu.remedy or Remedy.LOOK, gpu.uuid, place, rules.sharing)
        if not report.driver.up:
            what = advice.AS_FOR_DRIVER
        detail = f"unhealthy: {'; '.join(map(_fault, gpu.faults))}"
        # A cordon is meant: nothing is wrong with the GPU.
        meant = all(fault.reason == Reason.CORDONED for fault in gpu.faults)
        yield check(name, WARN if meant else FAIL, detail, what, gpu.uuid)
    for note in gpu.notes:
        yield check(f"{name} note", WARN, note, advice.NOTES, gpu.uuid)
    if gpu.unattributed_processes:
        detail = f"{gpu.unattributed_processes} processes of no pod that holds its vGPUs"
        yield check(f"{name} processes", WARN, detail, advice.processes(place), gpu.uuid)
    for each in report.allocations or ():
        if each.gpu_uuid == gpu.uuid and each.is_over_share:
            used, share = _memory(each.memory_used_bytes), _memory(each.memory_share_bytes)
            detail = f"{_who(each)}, uses {used} of its share of {share}"
            yield check(f"{name} share", WARN, detail, advice.OVER_SHARE, gpu.uuid)
        if each.gpu_uuid == gpu.uuid and each.memory_limit_problem is not None:
            detail = f"{_who(each)}, runs without its limit: {each.memory_limit_problem}"
            enforced = report.memory_limits.mode is Mode.DRIVER
            what = advice.no_limits(place, enforced=enforced)
            yield check(f"{name} memory limit", WARN, detail, what, gpu.uuid)


def _who(allocation: AllocationReport) -> str:
    return f"{allocation.namespace}/{allocation.pod}, container {allocation.container}"


def _fault(fault: FaultReport) -> str:
    return f"{fault.reason} since {utc(fault.since)}: {fault.detail} (ends {fault.ends})"


def _memory(count: int | None) -> str:
    return "memory not known" if count is None else f"{count // MIB} MiB"


def _excluded(gpu: ExcludedReport, place: Place) -> Check:
    name = f"GPU {gpu.index}"
    detail = f"{gpu.model} {gpu.uuid} is excluded ({gpu.reason}): {gpu.detail}"
    # The detail says what to do; of a GPU that says nothing it is not known what it would be.
    if gpu.reason in ("error", "timeout", "lost"):
        return check(name, FAIL, detail, advice.silent_gpu(place), gpu.uuid)
    verdict = OK if gpu.reason == "replicas" else WARN
    return check(name, verdict, detail, advice.EXCLUDED, gpu.uuid)
