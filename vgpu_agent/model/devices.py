"""GPUs and the vGPUs made of them.

All values are frozen. A vGPU is not an object of its own anywhere: it is the pair of its GPU and
its number, and its ID says which.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum

from vgpu_agent.model.rules import MAX_REPLICAS, MPS_CONTEXTS

MAX_DEVICE_ID = 63
"""Longest device ID that the kubelet takes (device plugin API, `Device.ID`)."""

_UUID = re.compile(rf"[A-Za-z0-9-]{{1,{MAX_DEVICE_ID - len(f'::{MAX_REPLICAS - 1}')}}}")


class Reason(StrEnum):
    """Why a GPU is unhealthy: a closed set, used in logs, metrics and the report alike."""

    XID = "xid"
    RECOVERY_ACTION = "recovery-action"
    PROBE = "probe"
    TIMEOUT = "timeout"
    ECC = "ecc"
    REMAP = "remap"
    LOST = "lost"
    MPS = "mps"
    MPS_FAULT = "mps-fault"
    COMPUTE_MODE = "compute-mode"
    LIMITS = "limits"
    CORDONED = "cordoned"


class Effect(StrEnum):
    """What a fact does to a GPU, and so how a fault ends. The later, the stricter."""

    NOTE = "noted"
    COUNT = "counted"
    UNTIL_BACK = "unhealthy until it is back"
    UNTIL_UNCORDONED = "unhealthy until uncordoned"
    UNTIL_GOOD = "unhealthy until proven good"
    UNTIL_RESET = "unhealthy until reset"
    UNTIL_REBOOT = "unhealthy until the node is rebooted"

    @property
    def ends(self) -> str:
        """What ends a fault that has it."""
        return {
            Effect.UNTIL_BACK: "when it is back",
            Effect.UNTIL_UNCORDONED: "when it is uncordoned",
            Effect.UNTIL_GOOD: "after passed probes",
            Effect.UNTIL_RESET: "by a reset",
            Effect.UNTIL_REBOOT: "by a reboot of the node",
        }.get(self, "at once")


@dataclass(frozen=True, slots=True)
class Fault:
    """One reason for which a GPU is unhealthy.

    `since` is in seconds since the epoch. What to do about it is in `policy`.
    """

    reason: Reason
    since: float
    detail: str
    effect: Effect = Effect.UNTIL_GOOD

    @property
    def until_reset(self) -> bool:
        """Whether passed probes alone do not end it: a reset (or a reboot, which is one) does."""
        return self.effect in (Effect.UNTIL_RESET, Effect.UNTIL_REBOOT)


@dataclass(frozen=True, slots=True)
class Gpu:
    """A physical GPU, as its driver describes it. Memory is in bytes.

    `memory_bytes` is None of a GPU that has none of its own, and shares the host's.
    `reserved_bytes` is what the driver keeps for itself (`nvmlMemory_v2_t.reserved`).
    `numa_node` is None where the platform names none (sysfs says -1). `mps_contexts` are the CUDA
    contexts that MPS can serve on it.
    """

    uuid: str
    index: int
    model: str
    memory_bytes: int | None
    pci_bus_id: str
    reserved_bytes: int = 0
    numa_node: int | None = None
    compute_capability: tuple[int, int] | None = None
    mig: bool = False
    mps_contexts: int = MPS_CONTEXTS


@dataclass(frozen=True, slots=True)
class Excluded:
    """A GPU that is not shared, and why in words that an operator can act on."""

    gpu: Gpu
    reason: str
    detail: str


@dataclass(frozen=True, slots=True)
class SharedGpu:
    """A GPU that is advertised: so many vGPUs, and the faults that it has now.

    `usable_bytes` of its memory are shared out, None where that is not known; `vgpu_bytes` is the
    memory of a vGPU where GPUs are divided by size, None where by count. `notes` are what an
    operator should know of a GPU that stays healthy. `recovery_wait`: for how many seconds its
    probes have to pass before it is proven good.
    """

    gpu: Gpu
    replicas: int
    faults: tuple[Fault, ...] = ()
    usable_bytes: int | None = None
    vgpu_bytes: int | None = None
    notes: tuple[str, ...] = ()
    recovery_wait: float = 0.0

    @property
    def healthy(self) -> bool:
        """Whether the GPU's vGPUs may be given to pods."""
        return not self.faults

    @property
    def device_ids(self) -> Iterator[str]:
        """The IDs of the GPU's vGPUs, in order."""
        return (device_id(self.gpu.uuid, n) for n in range(self.replicas))

    @property
    def fault_text(self) -> str:
        """The faults in words, for messages."""
        return "; ".join(f"{fault.reason}: {fault.detail}" for fault in self.faults)

    def share_bytes(self, vgpus: int) -> int | None:
        """What so many of its vGPUs are worth, in bytes; rounded down, so that shares fit.

        None where its memory is not known.
        """
        if self.vgpu_bytes is not None:
            return self.vgpu_bytes * vgpus
        return None if self.usable_bytes is None else self.usable_bytes * vgpus // self.replicas


def is_uuid(text: str) -> bool:
    """Whether it can be the UUID of a GPU: vGPUs, files and environments are named by it."""
    return _UUID.fullmatch(text) is not None


def pci_order(bus_id: str) -> tuple[int, ...]:
    """Sorts bus IDs as CUDA does with CUDA_DEVICE_ORDER=PCI_BUS_ID: by numbers, not as text.

    A domain may have 32 bits (`03F8CFDD:00:00.0`). What is no bus ID comes last.
    """
    try:
        return tuple(int(part, 16) for part in bus_id.replace(".", ":").split(":"))
    except ValueError:
        return (2**32,)


def device_id(uuid: str, replica: int) -> str:
    """The ID of vGPU number `replica` of a GPU: the form that GPU exporters already split."""
    return f"{uuid}::{replica}"


def split_device_id(text: str) -> tuple[str, int] | None:
    """The GPU's UUID and the vGPU's number, or None where `text` is no ID of ours."""
    if len(text) > MAX_DEVICE_ID:
        return None
    uuid, separator, number = text.rpartition("::")
    # str(int()) refuses "01" and "+1", which would make two spellings of one vGPU.
    if not (uuid and separator and number.isascii() and number.isdigit()):
        return None
    replica = int(number)
    return (uuid, replica) if str(replica) == number else None


def by_gpu(device_ids: Iterable[str]) -> dict[str, list[int]]:
    """The numbers of these vGPUs by the UUID of their GPU; other IDs are left out."""
    found: dict[str, list[int]] = {}
    for vgpu in device_ids:
        if (split := split_device_id(vgpu)) is not None:
            found.setdefault(split[0], []).append(split[1])
    return found


@dataclass(frozen=True, slots=True)
class Inventory:
    """The advertised GPUs, in the order of their index."""

    gpus: tuple[SharedGpu, ...] = ()

    def find(self, uuid: str) -> SharedGpu | None:
        """The GPU of that UUID."""
        return next((shared for shared in self.gpus if shared.gpu.uuid == uuid), None)

    def gpu_of(self, vgpu: str) -> SharedGpu | None:
        """The GPU that a vGPU belongs to, or None where no such vGPU is advertised."""
        parts = split_device_id(vgpu)
        if parts is None:
            return None
        shared = self.find(parts[0])
        return shared if shared is not None and parts[1] < shared.replicas else None

    @property
    def device_ids(self) -> Iterator[str]:
        """The IDs of all vGPUs."""
        return (vgpu for shared in self.gpus for vgpu in shared.device_ids)


def flips(before: Inventory, after: Inventory) -> Iterator[tuple[SharedGpu, Reason]]:
    """The GPUs that became healthy or unhealthy, and the reason that did it, or ended."""
    for shared in after.gpus:
        known = before.find(shared.gpu.uuid)
        if known is not None and known.healthy != shared.healthy:
            yield shared, (known.faults or shared.faults)[0].reason
