"""The metrics of the agent: a table of them, each a function of one snapshot of the node.

Names, units and types follow the Prometheus conventions. docs/metrics.md is made from the table.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum

from vgpu_agent.model.devices import Gpu, Reason, device_id
from vgpu_agent.model.holders import Holder, Used
from vgpu_agent.model.snapshot import Mps, RegistrationResult, Rules, Snapshot


class Only(StrEnum):
    """When a metric is there: where something is unknown there is no series, unknown is not 0."""

    HOLDERS = "while it is known who holds what"
    MPS = "under MPS"
    USAGE = "with `VGPU_PROCESS_METRICS=on`"

    def holds(self, snapshot: Snapshot) -> bool:
        """Whether metrics of that kind are there now."""
        known = {
            Only.HOLDERS: snapshot.assignments,
            Only.MPS: snapshot.mps,
            Only.USAGE: snapshot.usage,
        }
        return known[self] is not None


@dataclass(frozen=True, slots=True)
class View:
    """What metrics are made from."""

    version: str
    resource: str
    rules: Rules
    snapshot: Snapshot


Labels = tuple[str, ...]
Samples = Iterable[tuple[Labels, float]]
Sampler = Callable[[View], Samples]


@dataclass(frozen=True, slots=True)
class Entry:
    """A metric of the table."""

    name: str
    text: str
    labels: Labels
    only: tuple[Only, ...]
    samples: Sampler

    @property
    def kind(self) -> str:
        """Its type in Prometheus."""
        return "counter" if self.name.endswith("_total") else "gauge"


RPC_DURATION = (
    "vgpu_rpc_duration_seconds",
    "Duration of the kubelet's unary calls, by method and gRPC status code.",
    ("method", "code"),
)
"""Name, text and labels of the one histogram, which lasts from scrape to scrape."""

TABLE: list[Entry] = []
"""All metrics, in the order in which they are exposed; the functions below enter themselves."""


def metric(name: str, *labels: str, only: tuple[Only, ...] = ()) -> Callable[[Sampler], Sampler]:
    """Enters a metric into the table: the decorated function makes its samples.

    Its docstring is what Prometheus and docs/metrics.md say of the metric.
    """

    def enter(samples: Sampler) -> Sampler:
        TABLE.append(Entry(name, samples.__doc__ or "", labels, only, samples))
        return samples

    return enter


def _one(name: str, text: str, value: Callable[[Snapshot], float], *only: Only) -> None:
    """Enters a metric with one series."""
    TABLE.append(Entry(name, text, (), only, lambda view: [((), value(view.snapshot))]))


def _mps(name: str, text: str, value: Callable[[Mps], float]) -> None:
    """Enters a metric with one series, of the MPS daemon."""
    _one(name, text, lambda s: 0 if s.mps is None else value(s.mps), Only.MPS)


_G = ("gpu_uuid", "gpu_index")
_C = ("namespace", "pod", "container")


def _g(gpu: Gpu) -> Labels:
    return gpu.uuid, str(gpu.index)


def _c(holder: Holder) -> Labels:
    return holder.namespace, holder.pod, holder.container


def _index(view: View, uuid: str | None) -> str:
    shared = view.snapshot.inventory.find(uuid or "")
    return "" if shared is None else str(shared.gpu.index)


@metric("vgpu_build_info", "version")
def _build_info(view: View) -> Samples:
    """Version of the agent."""
    yield (view.version,), 1


_one("vgpu_nvml_up", "Whether the GPU driver answers.", lambda s: s.driver.up)


# GPUs


@metric("vgpu_gpu_info", *_G, "model", "driver_version", "numa_node")
def _gpu_info(view: View) -> Samples:
    """What a GPU is."""
    for shared in view.snapshot.inventory.gpus:
        gpu = shared.gpu
        numa = "" if gpu.numa_node is None else str(gpu.numa_node)
        yield (*_g(gpu), gpu.model, view.snapshot.driver.version or "", numa), 1


@metric("vgpu_gpu_healthy", *_G)
def _gpu_healthy(view: View) -> Samples:
    """Whether the vGPUs of a GPU may be given to pods."""
    return ((_g(shared.gpu), shared.healthy) for shared in view.snapshot.inventory.gpus)


@metric("vgpu_gpu_unhealthy_reason", *_G, "reason")
def _unhealthy_reason(view: View) -> Samples:
    """1 for each reason for which a GPU is unhealthy now, 0 for the others."""
    for shared in view.snapshot.inventory.gpus:
        found = {fault.reason for fault in shared.faults}
        for reason in Reason:
            yield (*_g(shared.gpu), reason.value), reason in found


@metric("vgpu_gpu_recovery_wait_seconds", *_G)
def _recovery_wait(view: View) -> Samples:
    """For how long the probes of a GPU must pass before it is healthy; grows with relapses."""
    return ((_g(shared.gpu), shared.recovery_wait) for shared in view.snapshot.inventory.gpus)


@metric("vgpu_gpu_memory_bytes", *_G, "kind")
def _memory(view: View) -> Samples:
    """Memory of a GPU: all of it, what the driver reserves of it, and what is in use."""
    for shared in view.snapshot.inventory.gpus:
        gpu = shared.gpu
        yield (*_g(gpu), "total"), gpu.memory_bytes
        yield (*_g(gpu), "reserved"), gpu.reserved_bytes
        used = view.snapshot.memory_used.get(gpu.uuid)
        if used is not None:
            yield (*_g(gpu), "used"), used


@metric("vgpu_gpu_excluded", *_G, "reason")
def _excluded(view: View) -> Samples:
    """GPUs of the node that are not shared."""
    return (((*_g(each.gpu), each.reason), 1) for each in view.snapshot.excluded)


@metric("vgpu_devices", "resource", *_G, "health")
def _devices(view: View) -> Samples:
    """Advertised vGPUs, by GPU and health."""
    for shared in view.snapshot.inventory.gpus:
        for health in ("healthy", "unhealthy"):
            count = shared.replicas if shared.healthy == (health == "healthy") else 0
            yield (view.resource, *_g(shared.gpu), health), count


@metric("vgpu_xid_errors_total", *_G, "xid")
def _xids(view: View) -> Samples:
    """XIDs that the driver reported. gpu_uuid is empty where it could not name the GPU."""
    for (uuid, xid), count in view.snapshot.xids.items():
        yield (uuid or "", _index(view, uuid), str(xid)), count


@metric("vgpu_health_transitions_total", *_G, "to", "reason")
def _transitions(view: View) -> Samples:
    """GPUs that became healthy or unhealthy, and the reason that did it or ended."""
    for (uuid, to, reason), count in view.snapshot.transitions.items():
        yield (uuid, _index(view, uuid), to, reason.value), count


# The kubelet


@metric("vgpu_registrations_total", "result")
def _registrations(view: View) -> Samples:
    """Attempts to register with the kubelet, by result."""
    for result in RegistrationResult:
        yield (result.value,), view.snapshot.registrations.get(result, 0)


_one(
    "vgpu_list_and_watch_updates_total",
    "Device lists sent to the kubelet.",
    lambda s: s.lists_sent,
)
_one(
    "vgpu_kubelet_connected",
    "Whether the kubelet is registered with and follows the device list.",
    lambda s: s.kubelet.connected,
)
_one(
    "vgpu_podresources_up",
    "Whether the kubelet said who holds which vGPU when it was last asked.",
    lambda s: s.holders.up,
)


# Containers


@metric("vgpu_device_allocated", "resource", *_G, "device_id", only=(Only.HOLDERS,))
def _allocated(view: View) -> Samples:
    """Whether a container holds the vGPU."""
    snapshot = view.snapshot
    held = {(part.shared.gpu.uuid, n) for part in snapshot.parts for n in part.numbers}
    for shared in snapshot.inventory.gpus:
        for n in range(shared.replicas):
            uuid = shared.gpu.uuid
            yield (view.resource, *_g(shared.gpu), device_id(uuid, n)), (uuid, n) in held


@metric("vgpu_allocation_info", "resource", *_G, "device_id", *_C, only=(Only.HOLDERS,))
def _allocation_info(view: View) -> Samples:
    """Which container holds the vGPU."""
    for part in view.snapshot.parts:
        for n in part.numbers:
            vgpu = device_id(part.shared.gpu.uuid, n)
            yield (view.resource, *_g(part.shared.gpu), vgpu, *_c(part.holder)), 1


@metric("vgpu_allocation_memory_share_bytes", *_G, *_C, only=(Only.HOLDERS,))
def _shares(view: View) -> Samples:
    """Memory of the GPU that the vGPUs of the container are worth together."""
    for part in view.snapshot.parts:
        if part.whole:
            share = part.shared.share_bytes(len(part.numbers))
            yield (*_g(part.shared.gpu), *_c(part.holder)), share


@metric("vgpu_allocation_memory_limit_bytes_per_process", *_G, *_C, only=(Only.MPS, Only.HOLDERS))
def _limits(view: View) -> Samples:
    """Memory of the GPU that MPS lets each process of the container have."""
    mps = view.snapshot.mps
    applied = view.rules.sharing.with_applied_limits(None if mps is None else mps.limits)
    return _shares(view) if applied.limits_memory else ()


@metric("vgpu_orphaned_allocations", "resource", only=(Only.HOLDERS,))
def _orphaned(view: View) -> Samples:
    """How many vGPUs containers hold though the node no longer has them."""
    yield (view.resource,), len(view.snapshot.orphans)


@metric("vgpu_largest_free_share", "resource", only=(Only.HOLDERS,))
def _largest_free(view: View) -> Samples:
    """How many vGPUs the largest request may ask for that still fits on one GPU."""
    yield (view.resource,), view.snapshot.largest_free


def _used(view: View, value: Callable[[Used], float | None]) -> Samples:
    usage = view.snapshot.usage
    for (uuid, holder), used in usage.containers.items() if usage else ():
        shared, count = view.snapshot.inventory.find(uuid), value(used)
        if shared is not None and count is not None:
            yield (*_g(shared.gpu), *_c(holder)), count


@metric("vgpu_container_memory_used_bytes", *_G, *_C, only=(Only.USAGE,))
def _container_memory(view: View) -> Samples:
    """Memory of the GPU that the processes of the container have together."""
    return _used(view, lambda used: used.memory_bytes)


@metric("vgpu_container_processes", *_G, *_C, only=(Only.USAGE,))
def _container_processes(view: View) -> Samples:
    """Processes of the container with a context on the GPU."""
    return _used(view, lambda used: used.processes)


@metric("vgpu_unattributed_processes", *_G, only=(Only.USAGE,))
def _unattributed(view: View) -> Samples:
    """Processes on the GPU that belong to no container that is known."""
    usage = view.snapshot.usage
    for shared in view.snapshot.inventory.gpus if usage else ():
        if usage and shared.gpu.uuid in usage.unattributed:
            yield _g(shared.gpu), usage.unattributed[shared.gpu.uuid]


# MPS

_mps("vgpu_mps_up", "Whether the MPS daemon answers.", lambda mps: mps.up)
_mps(
    "vgpu_mps_limits_in_force",
    "Whether the MPS daemon's limits were read back as this node needs them.",
    lambda mps: mps.limits_in_effect,
)
_mps(
    "vgpu_mps_replacement_needed",
    "Whether the MPS pod serves other settings than the agent's and must be replaced.",
    lambda mps: mps.replacement is not None,
)
_mps(
    "vgpu_mps_waiting_clients",
    "MPS clients of another user that wait for their turn.",
    lambda mps: mps.waiting,
)


@metric("vgpu_mps_max_clients", only=(Only.MPS,))
def _mps_max_clients(view: View) -> Samples:
    """Most MPS client contexts of a GPU."""
    yield (), view.rules.sharing.max_clients or 0


@metric("vgpu_mps_clients", *_G, only=(Only.MPS,))
def _mps_clients(view: View) -> Samples:
    """MPS clients of a GPU."""
    mps = view.snapshot.mps
    for shared in view.snapshot.inventory.gpus if mps else ():
        yield _g(shared.gpu), mps.clients.get(shared.gpu.uuid, 0) if mps else 0
