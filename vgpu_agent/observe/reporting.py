"""Makes the report of a snapshot."""

from dataclasses import replace

from vgpu_agent import __version__
from vgpu_agent.model.acceptance import Counts, acceptance, counts, gpu_counts
from vgpu_agent.model.devices import SharedGpu
from vgpu_agent.model.holders import Part, Used
from vgpu_agent.model.limits import LimitsLook, Mode, is_held_to
from vgpu_agent.model.names import gone_gpus
from vgpu_agent.model.policy import remedy
from vgpu_agent.model.snapshot import Rules, Snapshot
from vgpu_agent.observe import judge
from vgpu_agent.observe.mps import mps_report
from vgpu_agent.observe.report import (
    FORMAT,
    AllocationReport,
    DriverReport,
    ExcludedReport,
    FaultReport,
    GpuReport,
    KubeletReport,
    LimitsReport,
    PodResourcesReport,
    Report,
    iso,
)


def make_report(snapshot: Snapshot, rules: Rules, now: float, *, names_pods: bool = True) -> Report:
    """The report of a snapshot; `now` is in seconds since the epoch.

    Without `names_pods` it is not said which containers hold what.
    """
    driver, kubelet, gpus = snapshot.driver, snapshot.kubelet, snapshot.inventory.gpus
    known = snapshot.assignments is not None
    mps = snapshot.mps
    applied = None if mps is None else mps.look.limits
    limited = rules.sharing.with_applied_limits(applied).limits_memory
    place, of_gpus = rules.place, gpu_counts(snapshot)
    problems = (
        snapshot.store_error,
        snapshot.cordon_error,
        snapshot.holders.checkpoint_error,
        None if snapshot.usage is None else snapshot.usage.problem,
    )
    report = Report(
        format=FORMAT,
        version=__version__,
        node=place.node,
        namespace=place.namespace if place.in_pod else None,
        pod=place.pod if place.in_pod else None,
        time=iso(now),
        resource=rules.resource,
        acceptance=acceptance(snapshot, rules.resource, now),
        vgpus=counts(snapshot),
        largest_free=snapshot.largest_free if known else None,
        driver=DriverReport(
            driver.up,
            driver.version,
            driver.error,
            _time(driver.released_until),
            _time(driver.since),
        ),
        kubelet=KubeletReport(
            kubelet.connected,
            kubelet.registered,
            kubelet.streams,
            kubelet.error,
            kubelet.rival,
            _time(kubelet.since),
        ),
        mps=None if mps is None else mps_report(mps, snapshot, rules.sharing),
        memory_limits=_limits(snapshot.limits),
        podresources=PodResourcesReport(snapshot.holders.up, snapshot.holders.error),
        health_checks=rules.health.health_checks,
        process_metrics=snapshot.usage is not None,
        names_pods=names_pods,
        problems=tuple(filter(None, problems)),
        gpus=tuple(_gpu(shared, of_gpus[shared.gpu.uuid], snapshot) for shared in gpus),
        excluded=tuple(
            ExcludedReport(e.gpu.uuid, e.gpu.index, e.gpu.model, e.reason, e.detail)
            for e in snapshot.excluded
        ),
        cordoned={uuid: each.reason for uuid, each in sorted(snapshot.cordons.items())},
        gone=gone_gpus(snapshot),
        allocations=tuple(_allocation(part, snapshot, limited=limited) for part in snapshot.parts)
        if known and names_pods
        else None,
        orphaned=snapshot.orphans if known else None,
        checks=(),
    )
    return replace(report, checks=tuple(judge.checks(report, rules)))


def _limits(look: LimitsLook | None) -> LimitsReport:
    if look is None:
        return LimitsReport(Mode.OFF, None, 0)
    why = look.why_none or next(iter(look.gpus.values()), None)
    return LimitsReport(look.mode, why, len(look.missing))


def _gpu(shared: SharedGpu, vgpus: Counts, snapshot: Snapshot) -> GpuReport:
    gpu, usage = shared.gpu, snapshot.usage
    return GpuReport(
        uuid=gpu.uuid,
        index=gpu.index,
        model=gpu.model,
        memory_bytes=gpu.memory_bytes,
        memory_used_bytes=snapshot.memory_used.get(gpu.uuid),
        pci_bus_id=gpu.pci_bus_id,
        numa_node=gpu.numa_node,
        healthy=shared.healthy,
        accepts=snapshot.kubelet.connected and shared.healthy and bool(vgpus.free),
        vgpus=vgpus,
        vgpu_bytes=shared.share_bytes(1),
        faults=tuple(
            FaultReport(f.reason, iso(f.since), f.detail, f.effect.ends) for f in shared.faults
        ),
        remedy=None if shared.healthy else remedy(shared.faults),
        notes=shared.notes,
        recovery_wait_seconds=shared.recovery_wait,
        unattributed_processes=None if usage is None else usage.unattributed.get(gpu.uuid),
    )


def _allocation(part: Part, snapshot: Snapshot, *, limited: bool) -> AllocationReport:
    gpu, holder, usage = part.shared.gpu, part.holder, snapshot.usage
    used = None if usage is None else usage.containers.get((gpu.uuid, holder), Used(0, 0))
    memory, limits = snapshot.memory_of(gpu.uuid, holder), snapshot.limited.get(holder)
    problem = None if limits is None else limits.problem
    share = part.shared.share_bytes(len(part.numbers)) if part.whole else None
    return AllocationReport(
        namespace=holder.namespace,
        pod=holder.pod,
        container=holder.container,
        gpu_uuid=gpu.uuid,
        gpu_index=gpu.index,
        numbers=part.numbers,
        memory_share_bytes=share,
        memory_limited=limited or (problem is None and is_held_to(memory.limit_bytes, share)),
        memory_used_bytes=memory.used_bytes,
        memory_source=memory.source,
        memory_peak_bytes=memory.peak_bytes,
        memory_limit_bytes=memory.limit_bytes,
        memory_limit_problem=problem,
        processes=None if used is None else used.processes,
    )


def _time(seconds: float | None) -> str | None:
    return None if seconds is None else iso(seconds)
