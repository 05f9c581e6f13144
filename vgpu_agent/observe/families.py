"""The families of metrics, made from one snapshot of the node.

Names, units and types follow the Prometheus conventions; docs/metrics.md is made from `PARTS`.
Families are made at each scrape, so no series outlives the GPU that it speaks of. A counter whose
labels are known beforehand begins at 0: `increase` sees no step from nothing.
"""

from collections.abc import Callable, Iterator
from itertools import product

from prometheus_client.core import Metric

from vgpu_agent.model.devices import Gpu, Reason, device_id
from vgpu_agent.model.share import max_vgpus
from vgpu_agent.model.snapshot import RegistrationResult, Snapshot
from vgpu_agent.observe import usage
from vgpu_agent.observe.family import (
    CONTAINER,
    GPU,
    Samples,
    Source,
    family,
    of_container,
    of_gpu,
    one,
)
from vgpu_agent.observe.mps import METRICS as MPS_METRICS
from vgpu_agent.observe.mps import mps_report


def _node(of: Source, s: Snapshot) -> Iterator[Metric]:
    yield family("vgpu_build_info", "Version of the agent.", ("version",), [((of.version,), 1)])
    yield one("vgpu_nvml_up", "Whether the GPU driver answers.", s.driver.up)
    yield one(
        "vgpu_nvml_released",
        "Whether NVML is closed on purpose, for a reset; `vgpu_nvml_up` is 0 meanwhile.",
        s.driver.released_until is not None,
    )
    yield family(
        "vgpu_registrations_total",
        "Attempts to register with the kubelet, by result.",
        ("result",),
        (((result.value,), s.registrations.get(result, 0)) for result in RegistrationResult),
    )
    yield one(
        "vgpu_list_and_watch_updates_total", "Device lists sent to the kubelet.", s.lists_sent
    )
    yield one(
        "vgpu_kubelet_connected",
        "Whether the kubelet is registered with and follows the device list.",
        s.kubelet.connected,
    )
    yield one(
        "vgpu_podresources_up",
        "Whether the kubelet said who holds which vGPU when it was last asked.",
        s.holders.up,
    )


def _numa(gpu: Gpu) -> str:
    return "" if gpu.numa_node is None else str(gpu.numa_node)


def _gpus(of: Source, s: Snapshot) -> Iterator[Metric]:
    gpus, version = s.inventory.gpus, s.driver.version or ""

    def index(uuid: str | None) -> str:
        shared = s.inventory.find(uuid or "")
        return "" if shared is None else str(shared.gpu.index)

    def memory() -> Samples:
        for gpu in (shared.gpu for shared in gpus):
            if gpu.memory_bytes is not None:
                yield (*of_gpu(gpu), "total"), gpu.memory_bytes
                yield (*of_gpu(gpu), "reserved"), gpu.reserved_bytes
            if (used := s.memory_used.get(gpu.uuid)) is not None:
                yield (*of_gpu(gpu), "used"), used

    uuids = [shared.gpu.uuid for shared in gpus]
    none_yet = dict.fromkeys(product(uuids, ("healthy", "unhealthy"), Reason), 0)
    described = len((s.gpus.keys() & s.present) - {each.gpu.uuid for each in s.undescribed})
    counted = described + len(s.undescribed)
    yield one("vgpu_gpus_counted", "How many GPUs the driver counts.", counted)
    yield one("vgpu_gpus_described", "How many GPUs of those say what they are.", described)
    yield family(
        "vgpu_gpu_info",
        "What a GPU is.",
        (*GPU, "model", "driver_version", "numa_node"),
        (
            ((*of_gpu(gpu), gpu.model, version, _numa(gpu)), 1)
            for gpu in (shared.gpu for shared in gpus)
        ),
    )
    yield family(
        "vgpu_gpu_healthy",
        "Whether the vGPUs of a GPU may be given to pods.",
        GPU,
        ((of_gpu(shared.gpu), shared.healthy) for shared in gpus),
    )
    yield family(
        "vgpu_gpu_unhealthy_reason",
        "1 for each reason for which a GPU is unhealthy now, 0 for the others.",
        (*GPU, "reason"),
        (
            (
                (*of_gpu(shared.gpu), reason.value),
                reason in {fault.reason for fault in shared.faults},
            )
            for shared in gpus
            for reason in Reason
        ),
    )
    yield family(
        "vgpu_gpu_unread",
        "1 for what NVML does not say of a GPU now, though it should; `events` are its XIDs.",
        (*GPU, "what"),
        (
            ((*of_gpu(shared.gpu), what.replace(" ", "-")), 1)
            for shared in gpus
            for what in s.missing.get(shared.gpu.uuid, ())
        ),
    )
    yield family(
        "vgpu_gpu_recovery_wait_seconds",
        "For how long the probes of a GPU must pass before it is healthy; grows with relapses.",
        GPU,
        ((of_gpu(shared.gpu), shared.recovery_wait) for shared in gpus),
    )
    yield family(
        "vgpu_gpu_memory_bytes",
        "Memory of a GPU: all of it, what the driver reserves of it, and what is in use.",
        (*GPU, "kind"),
        memory(),
    )
    yield family(
        "vgpu_gpu_excluded",
        "GPUs of the node that are not shared.",
        (*GPU, "reason"),
        (((*of_gpu(each.gpu), each.reason), 1) for each in s.excluded),
    )
    yield family(
        "vgpu_devices",
        "Advertised vGPUs, by GPU and health.",
        ("resource", *GPU, "health"),
        (
            (
                (of.resource, *of_gpu(shared.gpu), words),
                shared.replicas * (shared.healthy is healthy),
            )
            for shared in gpus
            for words, healthy in (("healthy", True), ("unhealthy", False))
        ),
    )
    yield family(
        "vgpu_xid_errors_total",
        "XIDs that the driver reported. gpu_uuid is empty where it could not name the GPU.",
        (*GPU, "xid"),
        (((uuid or "", index(uuid), str(xid)), count) for (uuid, xid), count in s.xids.items()),
    )
    yield family(
        "vgpu_health_transitions_total",
        "GPUs that became healthy or unhealthy, and the reason that did it or ended.",
        (*GPU, "to", "reason"),
        (
            ((uuid, index(uuid), to, reason.value), count)
            for (uuid, to, reason), count in {**none_yet, **s.transitions}.items()
        ),
    )


def _holders(of: Source, s: Snapshot) -> Iterator[Metric]:
    if s.assignments is None:
        return
    held = [(part, n) for part in s.parts for n in part.numbers]
    numbers = {(part.shared.gpu.uuid, n) for part, n in held}
    shares = [
        ((*of_gpu(part.shared.gpu), *of_container(part.holder)), memory)
        for part in s.parts
        if part.whole and (memory := part.shared.share_bytes(len(part.numbers))) is not None
    ]
    yield family(
        "vgpu_device_allocated",
        "Whether a container holds the vGPU.",
        ("resource", *GPU, "device_id"),
        (
            ((of.resource, *of_gpu(gpu), device_id(gpu.uuid, n)), (gpu.uuid, n) in numbers)
            for gpu, replicas in ((shared.gpu, shared.replicas) for shared in s.inventory.gpus)
            for n in range(replicas)
        ),
    )
    yield family(
        "vgpu_allocation_info",
        "Which container holds the vGPU.",
        ("resource", *GPU, "device_id", *CONTAINER),
        (
            ((of.resource, *of_gpu(gpu), device_id(gpu.uuid, n), *of_container(holder)), 1)
            for gpu, n, holder in ((part.shared.gpu, n, part.holder) for part, n in held)
        ),
    )
    yield family(
        "vgpu_allocation_memory_share_bytes",
        "Memory of the GPU that the vGPUs of the container are worth together.",
        (*GPU, *CONTAINER),
        shares,
    )
    limited = s.mps and of.rules.sharing.with_applied_limits(s.mps.look.limits).limits_memory
    yield family(
        "vgpu_allocation_process_memory_limit_bytes",
        "Memory of the GPU that MPS lets each process of the container have, where it limits it.",
        (*GPU, *CONTAINER),
        shares if limited else (),
    )
    yield family(
        "vgpu_orphaned_allocations",
        "How many vGPUs containers hold though the node no longer has them.",
        ("resource",),
        [((of.resource,), len(s.orphans))],
    )
    yield family(
        "vgpu_largest_free_share",
        "How many vGPUs the largest request may ask for that still fits on one GPU.",
        ("resource",),
        [((of.resource,), s.largest_free)],
    )


def _mps(of: Source, s: Snapshot) -> Iterator[Metric]:
    if s.mps is None:
        return
    report = mps_report(s.mps, s, of.rules.sharing)
    daemons = [(of_gpu(gpu.gpu), report.daemons[gpu.gpu.uuid]) for gpu in s.inventory.gpus]
    for name, what, value in MPS_METRICS:
        yield family(name, what, GPU, ((labels, value(each)) for labels, each in daemons))
    yield one(
        "vgpu_mps_replacement_needed",
        "Whether MPS daemons serve other settings than the agent's, until they are restarted.",
        report.replacement is not None,
    )
    yield one(
        "vgpu_mps_watch_up",
        "Whether `mps watch` is heard of; if not, the daemons are shown as it saw them last.",
        report.unwatched is None,
    )
    yield one(
        "vgpu_mps_split_containers",
        "Containers that cannot start: they were given vGPUs of several MPS daemons.",
        report.split_containers,
    )
    yield one(
        "vgpu_mps_max_clients",
        "Most MPS client contexts of a GPU.",
        min((max_vgpus(gpu.gpu, of.rules.sharing) for gpu in s.inventory.gpus), default=0),
    )


PARTS: tuple[tuple[Callable[[Source, Snapshot], Iterator[Metric]], str], ...] = (
    (_node, ""),
    (_gpus, ""),
    (_holders, "while it is known who holds what"),
    (usage.limits, ""),
    (usage.memory, "with `VGPU_PROCESS_METRICS=on`, or where the driver limits memory"),
    (usage.usage, "with `VGPU_PROCESS_METRICS=on`"),
    (_mps, "under MPS"),
)
"""What makes the metrics, and when they are there: of what is unknown there is no series."""
