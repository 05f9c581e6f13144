"""The families of metrics of what containers use, and of the driver's limits for them."""

from collections.abc import Callable, Iterator

from prometheus_client.core import Metric

from vgpu_agent.model.limits import LimitsLook, Memory, Mode
from vgpu_agent.model.snapshot import Snapshot
from vgpu_agent.observe.family import CONTAINER, GPU, Samples, Source, family, of_container, of_gpu


def limits(of: Source, s: Snapshot) -> Iterator[Metric]:  # noqa: ARG001
    """How memory limits by the driver come about, and who has none."""
    look = s.limits or LimitsLook()
    now = Mode.OFF if s.limits is None else look.mode
    yield family(
        "vgpu_memory_limits_mode",
        "1 for how memory limits by the driver come about on the node now, 0 for the others.",
        ("mode",),
        (((mode.value,), mode is now) for mode in Mode),
    )
    yield family(
        "vgpu_container_memory_limit_missing",
        "1 for each container whose memory limits by the driver are not in effect.",
        CONTAINER,
        ((of_container(each.holder), 1) for each in look.missing),
    )


def memory(of: Source, s: Snapshot) -> Iterator[Metric]:  # noqa: ARG001
    """The memory of containers, by whomever it is known."""
    known = [
        ((*of_gpu(shared.gpu), *of_container(holder)), memory)
        for uuid, holder in sorted(
            {*(s.usage.containers if s.usage else ())}
            | {(uuid, each.holder) for each in s.limited.values() for uuid in each.limits}
        )
        if (shared := s.inventory.find(uuid)) is not None
        and (memory := s.memory_of(uuid, holder)).source is not None
    ]

    def of_all(value: Callable[[Memory], int | None]) -> Samples:
        return ((who, count) for who, each in known if (count := value(each)) is not None)

    yield family(
        "vgpu_container_memory_used_bytes",
        "Memory of the GPU that the container has: by the driver, or its processes together.",
        (*GPU, *CONTAINER),
        of_all(lambda each: each.used_bytes),
    )
    yield family(
        "vgpu_container_memory_source_info",
        "Who says how much memory the container has: the driver by its cgroup, or its processes.",
        (*GPU, *CONTAINER, "source"),
        (((*who, each.source), 1) for who, each in known if each.source is not None),
    )
    yield family(
        "vgpu_container_memory_peak_bytes",
        "The most memory of the GPU that the container was seen to have since its start.",
        (*GPU, *CONTAINER),
        of_all(lambda each: each.peak_bytes),
    )
    yield family(
        "vgpu_container_memory_limit_bytes",
        "Memory of the GPU that the driver lets the container have, where it limits it.",
        (*GPU, *CONTAINER),
        of_all(lambda each: each.limit_bytes),
    )


def usage(of: Source, s: Snapshot) -> Iterator[Metric]:  # noqa: ARG001
    """Processes on the GPUs."""
    usage, find = s.usage, s.inventory.find
    if usage is None:
        return
    yield family(
        "vgpu_container_processes",
        "Processes of the container with a context on the GPU.",
        (*GPU, *CONTAINER),
        (
            ((*of_gpu(shared.gpu), *of_container(holder)), used.processes)
            for (uuid, holder), used in usage.containers.items()
            if (shared := find(uuid)) is not None
        ),
    )
    yield family(
        "vgpu_unattributed_processes",
        "Processes on the GPU that belong to no container that is known.",
        GPU,
        (
            (of_gpu(shared.gpu), usage.unattributed[shared.gpu.uuid])
            for shared in s.inventory.gpus
            if shared.gpu.uuid in usage.unattributed
        ),
    )
