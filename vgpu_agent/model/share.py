"""What k of the n vGPUs of a card are worth. Integer arithmetic, always rounded down.

Rounding down is what keeps the shares of one card together within the card.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from fractions import Fraction
from types import MappingProxyType

from vgpu_agent.model.devices import Excluded, Gpu

MIB = 2**20


SMALL_VGPU = 2**30
"""A vGPU with less usable memory than this, in bytes, is warned about."""


class MpsLimits(StrEnum):
    """Where the limits of a container's MPS clients are put.

    `client`: into the container's environment, where a pod's author can lift them. `server`: as
    the daemon's defaults, which no client can exceed; then a container has one vGPU. `none`.
    """

    CLIENT = "client"
    SERVER = "server"
    NONE = "none"


@dataclass(frozen=True, slots=True)
class Share:
    """k of n vGPUs of one card, 1 <= k <= n."""

    vgpus: int
    of: int

    def __post_init__(self) -> None:
        if not 1 <= self.vgpus <= self.of:
            raise ValueError(f"a share is 1 to {self.of} of {self.of} vGPUs, not {self.vgpus}")

    def __str__(self) -> str:
        return f"{self.vgpus}/{self.of}"

    def memory_bytes(self, usable: int) -> int:
        """The share of `usable` bytes."""
        return usable * self.vgpus // self.of

    def thread_percentage(self, factor: Fraction = Fraction(1)) -> int:
        """The share of the card's threads times `factor`, in percent from 1 (MPS takes no 0)."""
        return max(1, min(100, int(100 * self.vgpus * factor / self.of)))


def fraction(memory: int, total: int) -> float:
    """A part of a card's whole memory, rounded down to 1/10000; 0 of a card without memory.

    Serving frameworks take their memory limit as a fraction of all memory that CUDA shows.
    """
    return memory * 10_000 // total / 10_000 if total else 0.0


def usable_bytes(total: int, driver_reserved: int, held_back: int) -> int:
    """What of a card's memory can be shared out: never negative.

    `held_back` is what is kept for the MPS server (setting VGPU_MEMORY_RESERVED).
    """
    return max(0, total - driver_reserved - held_back)


@dataclass(frozen=True, slots=True)
class Division:
    """How cards are divided into vGPUs.

    By count (`replicas`), or by size where `device_memory` bytes are set. `by_gpu` overrides the
    count for single cards, by index, UUID or model name: 1 is a whole card, 0 leaves the card to
    others. `max_clients` is the bound of MPS on a card, None without MPS. `held_back` bytes of each
    card are kept out; where `measured`, what the MPS server is measured to have is, once known.
    """

    replicas: int
    device_memory: int | None = None
    by_gpu: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    max_clients: int | None = None
    held_back: int = 0
    measured: bool = False


@dataclass(frozen=True, slots=True)
class Divided:
    """What a card is divided into. `vgpu_bytes` is None where it is divided by count.

    `note` says what an operator should know of it.
    """

    replicas: int
    vgpu_bytes: int | None = None
    note: str | None = None


def divide(gpu: Gpu, division: Division) -> Divided | Excluded:
    """The vGPUs of a card, or why it has none."""
    override = next(
        (
            division.by_gpu[name]
            for name in (gpu.uuid, str(gpu.index), gpu.model)
            if name in division.by_gpu
        ),
        None,
    )
    if override == 0:
        return Excluded(gpu, "replicas", "VGPU_REPLICAS_BY_GPU leaves this card to others")
    if override is None and division.device_memory is not None:
        return _by_size(gpu, division.device_memory, division)
    replicas = division.replicas if override is None else override
    usable = usable_bytes(gpu.memory_bytes, gpu.reserved_bytes, division.held_back)
    return Divided(replicas, note=_small(usable // replicas, division))


def _small(vgpu: int, division: Division) -> str | None:
    """Under MPS every process has a CUDA context of some hundred MiB out of its share."""
    if division.max_clients is None or vgpu >= SMALL_VGPU:
        return None
    return f"a vGPU of it has only {vgpu // MIB} MiB, of which a CUDA context takes hundreds"


def _by_size(gpu: Gpu, size: int, division: Division) -> Divided | Excluded:
    usable = usable_bytes(gpu.memory_bytes, gpu.reserved_bytes, division.held_back)
    fit = usable // size
    if fit == 0:
        return Excluded(
            gpu,
            "memory",
            f"{usable // MIB} MiB of the card are usable, less than one vGPU of"
            f" VGPU_DEVICE_MEMORY ({size // MIB} MiB)",
        )
    if division.max_clients is not None and fit > division.max_clients:
        note = f"{fit} vGPUs of that size fit; MPS serves {division.max_clients} clients of a card"
        return Divided(division.max_clients, size, note)
    return Divided(fit, size, _small(size, division))
