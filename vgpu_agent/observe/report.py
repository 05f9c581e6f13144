"""What the agent says of its node, as values: the one schema of /status.json.

The running agent makes a `Report` from a snapshot and writes it as JSON; `status`, `doctor` and the
page read it. Memory is in bytes, times are ISO 8601 in UTC. docs/status.md is made from the
classes.
"""

import json
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

from vgpu_agent.model.devices import SharedGpu
from vgpu_agent.model.holders import Part, Used
from vgpu_agent.model.snapshot import Rules, Snapshot
from vgpu_agent.observe.mps import MpsReport, mps_report
from vgpu_agent.store import decoded

FORMAT = 1
"""Grows when a field goes away or means something else; new fields may come at any time."""


@dataclass(frozen=True, slots=True)
class DriverReport:
    """The source of GPUs: its version, once it answered; `error` is null while it answers.

    `released_until`: NVML is closed until then, so that GPUs can be reset; null where it is not.
    """

    up: bool
    version: str | None
    error: str | None
    released_until: str | None


@dataclass(frozen=True, slots=True)
class KubeletReport:
    """The session with the kubelet. `connected`: it is registered with and follows the list.

    `streams` counts its open streams of the list. `error` says why the last registration failed or
    ended; null while it holds.
    """

    connected: bool
    registered: bool
    streams: int
    error: str | None


@dataclass(frozen=True, slots=True)
class PodResourcesReport:
    """Whether the kubelet says who holds what, and why not."""

    up: bool
    error: str | None


@dataclass(frozen=True, slots=True)
class Counts:
    """The vGPUs of the node, or of a GPU: `total` is `free` + `held` + `unhealthy`.

    `free` can be given to a pod, if the report is `schedulable`; `held` are held by a container,
    `held_unhealthy` of them on an unhealthy GPU; `unhealthy` are neither. Without knowing who holds
    what `free`, `held` and `held_unhealthy` are null, and `unhealthy` are all of an unhealthy GPU.
    """

    total: int
    free: int | None
    held: int | None
    unhealthy: int
    held_unhealthy: int | None


@dataclass(frozen=True, slots=True)
class FaultReport:
    """A reason for which a GPU is unhealthy, in words too, and what to do about it.

    `until_reset`: passed probes alone do not end it.
    """

    reason: str
    since: str
    detail: str
    until_reset: bool
    advice: str


@dataclass(frozen=True, slots=True)
class GpuReport:
    """An advertised GPU: `healthy` where it has no `faults`. `notes` are worth knowing anyway.

    `memory_used_bytes` and `unattributed_processes` (of no container that holds its vGPUs) are null
    where they are not known; `numa_node` where the platform names none. `vgpu_bytes` is what one
    vGPU is worth. For `recovery_wait_seconds` its probes must pass before it is proven good.
    """

    uuid: str
    index: int
    model: str
    memory_bytes: int | None
    memory_used_bytes: int | None
    pci_bus_id: str
    numa_node: int | None
    healthy: bool
    vgpus: Counts
    vgpu_bytes: int | None
    faults: tuple[FaultReport, ...]
    notes: tuple[str, ...]
    recovery_wait_seconds: float
    unattributed_processes: int | None


@dataclass(frozen=True, slots=True)
class ExcludedReport:
    """A GPU that is not shared, and why."""

    uuid: str
    index: int
    model: str
    reason: str
    detail: str


@dataclass(frozen=True, slots=True)
class AllocationReport:
    """What a container holds and uses of a GPU: the `numbers` of its vGPUs.

    `memory_share_bytes` is what they are worth, null where some of them are no longer advertised;
    `memory_limited`: a process of the container is held to it. `memory_used_bytes` and `processes`
    are null where processes are not looked at.
    """

    namespace: str
    pod: str
    container: str
    gpu_uuid: str
    gpu_index: int
    numbers: tuple[int, ...]
    memory_share_bytes: int | None
    memory_limited: bool
    memory_used_bytes: int | None
    processes: int | None


@dataclass(frozen=True, slots=True)
class Report:
    """The node. `schedulable`: the kubelet can give the free vGPUs to pods now.

    `resource` is the name of the vGPUs in Kubernetes. `health_checks` and `process_metrics`:
    whether GPUs are probed, and processes looked at; `names_pods`: whether this document names
    pods. `problems` are troubles of the agent itself that have no place elsewhere. `cordoned` has
    the reason, which may be empty, of every GPU that is cordoned, listed or not, by its UUID.

    `largest_free`: the most vGPUs of one GPU that a container can be given, if `schedulable`.
    `orphaned`: the vGPUs that are held and no longer advertised. These two and `allocations` are
    null where it is unknown who holds what; `allocations` also where `names_pods` is false.
    """

    format: int
    version: str
    host: str
    time: str
    resource: str
    schedulable: bool
    vgpus: Counts
    largest_free: int | None
    driver: DriverReport
    kubelet: KubeletReport
    mps: MpsReport | None
    podresources: PodResourcesReport
    health_checks: bool
    process_metrics: bool
    names_pods: bool
    problems: tuple[str, ...]
    gpus: tuple[GpuReport, ...]
    excluded: tuple[ExcludedReport, ...]
    cordoned: dict[str, str]
    allocations: tuple[AllocationReport, ...] | None
    orphaned: tuple[str, ...] | None


@dataclass(frozen=True, slots=True)
class Identity:
    """Who reports. Without `names_pods` it is not said which containers hold what."""

    version: str
    host: str
    resource: str
    names_pods: bool = True


def make_report(snapshot: Snapshot, rules: Rules, identity: Identity, now: float) -> Report:
    """The report of a snapshot; `now` is in seconds since the epoch."""
    driver, kubelet, gpus = snapshot.driver, snapshot.kubelet, snapshot.inventory.gpus
    known = snapshot.assignments is not None
    problems = (
        snapshot.store_error,
        snapshot.cordon_error,
        snapshot.holders.checkpoint_error,
        None if snapshot.usage is None else snapshot.usage.problem,
    )
    held = _held(snapshot) if known else None
    until = None if driver.released_until is None else _time(driver.released_until)
    mps = snapshot.mps
    applied = None if mps is None else mps.look.limits
    limited = rules.sharing.with_applied_limits(applied).limits_memory
    return Report(
        format=FORMAT,
        version=identity.version,
        host=identity.host,
        time=_time(now),
        resource=identity.resource,
        schedulable=kubelet.connected,
        vgpus=_counts(gpus, held),
        largest_free=snapshot.largest_free if known else None,
        driver=DriverReport(driver.up, driver.version, driver.error, until),
        kubelet=KubeletReport(
            kubelet.connected, kubelet.registered, kubelet.streams, kubelet.error
        ),
        mps=None if mps is None else mps_report(mps, snapshot, rules.sharing),
        podresources=PodResourcesReport(snapshot.holders.up, snapshot.holders.error),
        health_checks=rules.health.health_checks,
        process_metrics=snapshot.usage is not None,
        names_pods=identity.names_pods,
        problems=tuple(filter(None, problems)),
        gpus=tuple(_gpu(shared, held, snapshot) for shared in gpus),
        excluded=tuple(
            ExcludedReport(e.gpu.uuid, e.gpu.index, e.gpu.model, e.reason, e.detail)
            for e in snapshot.excluded
        ),
        cordoned={uuid: each.reason for uuid, each in sorted(snapshot.cordons.items())},
        allocations=tuple(_allocation(part, snapshot, limited=limited) for part in snapshot.parts)
        if known and identity.names_pods
        else None,
        orphaned=snapshot.orphans if known else None,
    )


def _held(snapshot: Snapshot) -> Counter[str]:
    """How many vGPUs of each GPU are held: several containers of a pod may hold the same one."""
    advertised = {(p.shared.gpu.uuid, number) for p in snapshot.parts for number in p.numbers}
    return Counter(uuid for uuid, _ in advertised)


def _counts(gpus: Collection[SharedGpu], held: Counter[str] | None) -> Counts:
    """The vGPUs of these GPUs together."""
    healthy = sum(shared.replicas for shared in gpus if shared.healthy)
    unhealthy = sum(shared.replicas for shared in gpus) - healthy
    if held is None:
        return Counts(healthy + unhealthy, None, None, unhealthy, None)
    of_healthy = sum(held[shared.gpu.uuid] for shared in gpus if shared.healthy)
    of_unhealthy = sum(held[shared.gpu.uuid] for shared in gpus) - of_healthy
    return Counts(
        total=healthy + unhealthy,
        free=healthy - of_healthy,
        held=of_healthy + of_unhealthy,
        unhealthy=unhealthy - of_unhealthy,
        held_unhealthy=of_unhealthy,
    )


def _gpu(shared: SharedGpu, held: Counter[str] | None, snapshot: Snapshot) -> GpuReport:
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
        vgpus=_counts((shared,), held),
        vgpu_bytes=shared.share_bytes(1),
        faults=tuple(
            FaultReport(f.reason, _time(f.since), f.detail, f.until_reset, f.advice)
            for f in shared.faults
        ),
        notes=shared.notes,
        recovery_wait_seconds=shared.recovery_wait,
        unattributed_processes=None if usage is None else usage.unattributed.get(gpu.uuid),
    )


def _allocation(part: Part, snapshot: Snapshot, *, limited: bool) -> AllocationReport:
    gpu, holder, usage = part.shared.gpu, part.holder, snapshot.usage
    used = None if usage is None else usage.containers.get((gpu.uuid, holder), Used(0, 0))
    return AllocationReport(
        namespace=holder.namespace,
        pod=holder.pod,
        container=holder.container,
        gpu_uuid=gpu.uuid,
        gpu_index=gpu.index,
        numbers=part.numbers,
        memory_share_bytes=part.shared.share_bytes(len(part.numbers)) if part.whole else None,
        memory_limited=limited,
        memory_used_bytes=None if used is None else used.memory_bytes,
        processes=None if used is None else used.processes,
    )


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


# As JSON


def to_json(report: Report) -> bytes:
    """The report as it is served."""
    return json.dumps(asdict(report), indent=2).encode() + b"\n"


def from_json(text: bytes) -> Report:
    """Reads what `to_json` wrote. Raises ValueError with the reason.

    Fields that are not known here are passed over. All text is fit for a terminal.
    """
    try:
        data: object = json.loads(text)
    except RecursionError as error:
        raise ValueError("not JSON that anybody means") from error
    if not isinstance(data, Mapping) or "format" not in data:
        raise ValueError("not a report of a vgpu-agent")
    if data["format"] != FORMAT:
        found = repr(data["format"])[:20]
        raise ValueError(f"a report of format {found}; this version reads format {FORMAT}")
    try:
        report: Report = decoded(Report, data, "report", visible)
    except OverflowError as error:
        raise ValueError("a number is too large") from error
    return report


def visible(text: str) -> str:
    """The text with everything that is no plain character written out: pods name themselves."""
    return "".join(
        each if each.isprintable() else each.encode("unicode_escape").decode() for each in text
    )
