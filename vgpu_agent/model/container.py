"""What a container that holds some vGPUs is started with: a pure function of request and node.

The same request gives the same answer whatever was allocated before, so an agent that restarts
has lost nothing. The rules are those of the device plugin API (`ContainerAllocateResponse`), of
NVIDIA's container runtime (`NVIDIA_VISIBLE_DEVICES`) and of CUDA MPS (`CUDA_MPS_*`).
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from vgpu_agent.errors import InvalidRequestError, UnavailableDeviceError
from vgpu_agent.model.devices import Inventory, Reason, SharedGpu, pci_order, split_device_id
from vgpu_agent.model.limits import LimitsLook
from vgpu_agent.model.rules import MIB, SHARED, DeviceList, MpsLimits, SharingRules
from vgpu_agent.model.share import fraction, thread_percentage

MIN_FRACTION = 0.1
"""Of what CUDA shows: less would be of no use, however much a context takes."""

DEVICES_DIRECTORY = "/var/run/nvidia-container-devices"
"""Where the NVIDIA container runtime looks for mounts that name GPUs."""


@dataclass(frozen=True, slots=True)
class Mount:
    """A host directory that the container gets."""

    host_path: str
    container_path: str
    read_only: bool = False


@dataclass(frozen=True, slots=True)
class Grant:
    """What a container gets."""

    environment: Mapping[str, str]
    mounts: tuple[Mount, ...]
    cdi_devices: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Part:
    """The container's part of one GPU."""

    shared: SharedGpu
    vgpus: int

    @property
    def share(self) -> str:
        return f"{self.vgpus}/{self.shared.replicas}"

    @property
    def memory(self) -> int | None:
        return self.shared.share_bytes(self.vgpus)


def grant(
    inventory: Inventory,
    device_ids: Sequence[str],
    rules: SharingRules,
    limits: LimitsLook | None = None,
) -> Grant:
    """What a container that holds these vGPUs gets.

    `limits` is what is known of the driver's memory limits, None where they are off. Raises
    InvalidRequestError and UnavailableDeviceError, see `check_devices`.
    """
    counts = Counter(shared.gpu.uuid for shared in check_devices(inventory, device_ids))
    parts = [
        _Part(shared, counts[shared.gpu.uuid])
        for shared in sorted(inventory.gpus, key=lambda shared: pci_order(shared.gpu.pci_bus_id))
        if shared.gpu.uuid in counts
    ]
    if rules.one_each and len(device_ids) > 1:
        raise InvalidRequestError(
            f"{len(device_ids)} vGPUs for one container, but with VGPU_MPS_LIMITS=server the daemon"
            " grants every client the limits of one: ask for 1, or set VGPU_MPS_LIMITS=client"
        )
    environment = {
        # In PCI order, and CUDA must count so too, or its ordinals would not be ours.
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "VGPU_SHARE": ",".join(part.share for part in parts),
    }
    environment |= _memory_environment(parts, rules, limits)
    uuids = [part.shared.gpu.uuid for part in parts]
    visible, mounts = _visible_devices(uuids, rules.device_list)
    environment["NVIDIA_VISIBLE_DEVICES"] = visible
    if rules.mps:
        # A process can be a client of one daemon: with several, `check_start` refuses.
        name = rules.daemon_of(uuids[0])
        pipe = f"{rules.mps_directory}/{name}/pipe"
        environment |= {"CUDA_MPS_PIPE_DIRECTORY": pipe, **_mps_limits(rules, parts)}
        mounts.append(Mount(pipe, pipe))
        if rules.mps_shm_directory is not None:
            # One for all daemons, which live in one container.
            shared = f"{rules.mps_shm_directory}/{SHARED}"
            mounts.append(Mount(shared, "/dev/shm"))  # noqa: S108 - in the container
    names = [f"{rules.cdi_kind}={uuid}" for uuid in uuids] if rules.device_list.by_cdi else []
    return Grant(MappingProxyType(environment), tuple(mounts), tuple(names))


def _memory_environment(
    parts: Sequence[_Part], rules: SharingRules, limits: LimitsLook | None
) -> dict[str, str]:
    """On several GPUs the smallest, which is what one number can promise; none where not known."""
    known = [(p.memory, p.shared.gpu.memory_bytes) for p in parts]
    shares = [
        (memory, total) for memory, total in known if memory is not None and total is not None
    ]
    if len(shares) < len(parts):
        return {}
    memory = min(memory for memory, _ in shares)
    of_whole = min(fraction(*share) for share in shares)
    by_driver: dict[str, str] = {}
    uuids = [part.shared.gpu.uuid for part in parts]
    if limits is not None and limits.hook is None and limits.why_not(uuids) is None:
        mib = memory // MIB
        by_driver = {  # both, or the hook does nothing
            "NVIDIA_GPU_MEMORY_REQUEST": str(mib if rules.memory_guarantee else 0),
            "NVIDIA_GPU_MEMORY_LIMIT": str(mib),
        }
        # A limit of MPS leaves the whole GPU as what CUDA shows (NVIDIA's measurement).
        if limits.certain and not rules.limits_memory:
            of_whole = max(MIN_FRACTION, fraction(memory - rules.context_bytes, memory))
    return {
        "VGPU_MEMORY_BYTES": str(memory),
        "VGPU_MEMORY_FRACTION": f"{of_whole:.4f}",
        **by_driver,
    }


def _visible_devices(uuids: Sequence[str], device_list: DeviceList) -> tuple[str, list[Mount]]:
    """The value of NVIDIA_VISIBLE_DEVICES, and the mounts that name the GPUs."""
    match device_list:
        case DeviceList.VOLUME_MOUNTS:
            mounts = [Mount("/dev/null", f"{DEVICES_DIRECTORY}/{uuid}") for uuid in uuids]
            return DEVICES_DIRECTORY, mounts
        case DeviceList.CDI:
            # Images often say "all", which the NVIDIA runtime would add to what CDI names.
            return "void", []
        case _:
            return ",".join(uuids), []


def _mps_limits(rules: SharingRules, parts: Sequence[_Part]) -> dict[str, str]:
    """The limits that CUDA puts on a client by its environment."""
    if rules.mps_limits is not MpsLimits.CLIENT:
        return {}
    environment = {
        "CUDA_MPS_PINNED_DEVICE_MEM_LIMIT": ",".join(
            f"{ordinal}={part.memory // MIB}M"
            for ordinal, part in enumerate(parts)
            if part.memory is not None  # with limits no other GPU is shared
        )
    }
    # MPS knows one number for each client: of several GPUs the smallest share is given.
    percentages = [
        thread_percentage(part.vgpus, part.shared.replicas, rules.mps_threads) for part in parts
    ]
    if None not in percentages:
        environment["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"] = str(min(filter(None, percentages)))
    return environment


def check_start(inventory: Inventory, device_ids: Sequence[str], rules: SharingRules) -> None:
    """Whether a container that was given these vGPUs may start (again) now.

    A vGPU that is no longer made (fewer replicas than before) is still the container's: only its
    GPU counts. A cordon keeps new pods away, and no container of a pod that is there. Raises
    InvalidRequestError for an ID of no GPU's form, and UnavailableDeviceError where the GPU is gone
    or unhealthy, or where the vGPUs are of several MPS daemons.
    """
    _refuse_empty(device_ids)
    uuids = set()
    for vgpu in device_ids:
        parts = split_device_id(vgpu)
        if parts is None:
            raise InvalidRequestError(f"device {vgpu!r} is not of the form <GPU UUID>::<number>")
        shared = inventory.find(parts[0])
        if shared is None:
            raise UnavailableDeviceError(f"device {vgpu!r}: its GPU is not on this node")
        faults = tuple(each for each in shared.faults if each.reason is not Reason.CORDONED)
        _refuse_unhealthy(vgpu, replace(shared, faults=faults))
        uuids.add(parts[0])
    daemons = {rules.daemon_of(uuid) for uuid in uuids}
    if rules.mps and len(daemons) > 1:
        raise UnavailableDeviceError(
            f"the kubelet gave vGPUs of {len(daemons)} GPUs, each with its own MPS daemon, and a"
            " process can use one: delete the pod, for another one that asks for no more vGPUs than"
            " one GPU has free (`vgpu-agent status`: largest block), or set VGPU_MPS_DAEMONS=node"
        )


def check_devices(inventory: Inventory, device_ids: Sequence[str]) -> list[SharedGpu]:
    """The GPU of each vGPU, where all of them can be given to a container now.

    Raises InvalidRequestError for an empty request, an unknown ID or the same ID twice, and
    UnavailableDeviceError for an unhealthy vGPU; the message names the ID and the reason.
    """
    _refuse_empty(device_ids)
    repeated = [vgpu for vgpu, count in Counter(device_ids).items() if count > 1]
    if repeated:
        raise InvalidRequestError(f"device {repeated[0]!r} is requested more than once")
    gpus = []
    for vgpu in device_ids:
        shared = inventory.gpu_of(vgpu)
        if shared is None:
            raise InvalidRequestError(
                f"device {vgpu!r} is not one of the {sum(1 for _ in inventory.device_ids)}"
                " vGPUs of this node"
            )
        _refuse_unhealthy(vgpu, shared)
        gpus.append(shared)
    return gpus


def _refuse_empty(device_ids: Sequence[str]) -> None:
    if not device_ids:
        raise InvalidRequestError("the request names no device")


def _refuse_unhealthy(vgpu: str, shared: SharedGpu) -> None:
    if not shared.healthy:
        raise UnavailableDeviceError(f"device {vgpu!r} is unhealthy: {shared.fault_text}")
