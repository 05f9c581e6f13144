"""Cards and the vGPUs made of them.

All values are frozen. A vGPU is not an object of its own anywhere: it is the pair of its card and
its number, and its ID says which.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

MAX_DEVICE_ID = 63
"""Longest device ID that the kubelet takes (device plugin API, `Device.ID`)."""


class Reason(StrEnum):
    """Why a card is unhealthy: a closed set, used in logs, metrics and status alike."""

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


@dataclass(frozen=True, slots=True)
class Fault:
    """One reason for which a card is unhealthy.

    `since` is in seconds since the epoch. `until_reset`: passed probes alone do not clear it.
    `advice` says what an operator can do.
    """

    reason: Reason
    since: float
    detail: str
    until_reset: bool = False
    advice: str = ""


@dataclass(frozen=True, slots=True)
class Gpu:
    """A physical card, as its driver describes it. Memory is in bytes.

    `reserved_bytes` is what the driver keeps for itself (`nvmlMemory_v2_t.reserved`).
    `numa_node` is None where the platform names none (sysfs says -1).
    """

    uuid: str
    index: int
    model: str
    memory_bytes: int
    pci_bus_id: str
    reserved_bytes: int = 0
    numa_node: int | None = None
    compute_capability: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Excluded:
    """A card that is left out, and why in words that an operator can act on."""

    gpu: Gpu
    reason: str
    detail: str


@dataclass(frozen=True, slots=True)
class Card:
    """A card that is advertised: so many vGPUs, and the faults that it has now.

    `vgpu_bytes` is the memory of a vGPU where cards are divided by size, None where by count.
    `server_bytes` is what the MPS server was measured to have of the card, where that counts.
    `notes` are what an operator should know of a card that stays healthy. `recovery_wait` is for
    how many seconds its probes have to pass before it is proven good.
    """

    gpu: Gpu
    replicas: int
    faults: tuple[Fault, ...] = ()
    vgpu_bytes: int | None = None
    server_bytes: int | None = None
    notes: tuple[str, ...] = ()
    recovery_wait: float = 0.0

    @property
    def healthy(self) -> bool:
        """Whether the card's vGPUs may be given to pods."""
        return not self.faults

    @property
    def device_ids(self) -> Iterator[str]:
        """The IDs of the card's vGPUs, in order."""
        return (device_id(self.gpu.uuid, n) for n in range(self.replicas))

    @property
    def advice(self) -> str:
        """What an operator can do about the faults."""
        return "; ".join(dict.fromkeys(fault.advice for fault in self.faults if fault.advice))

    @property
    def fault_text(self) -> str:
        """The faults in words, for messages."""
        return "; ".join(f"{fault.reason}: {fault.detail}" for fault in self.faults)


def device_id(uuid: str, replica: int) -> str:
    """The ID of vGPU number `replica` of a card: the form that GPU exporters already split."""
    return f"{uuid}::{replica}"


def split_device_id(text: str) -> tuple[str, int] | None:
    """The card's UUID and the vGPU's number, or None where `text` is no ID of ours."""
    if len(text) > MAX_DEVICE_ID:
        return None
    uuid, separator, number = text.rpartition("::")
    # str(int()) refuses "01" and "+1", which would make two spellings of one vGPU.
    if not (uuid and separator and number.isascii() and number.isdigit()):
        return None
    replica = int(number)
    return (uuid, replica) if str(replica) == number else None


@dataclass(frozen=True, slots=True)
class Inventory:
    """The advertised cards, in the order of their index."""

    cards: tuple[Card, ...] = ()

    def find(self, uuid: str) -> Card | None:
        """The card of that UUID."""
        return next((card for card in self.cards if card.gpu.uuid == uuid), None)

    def card_of(self, vgpu: str) -> Card | None:
        """The card that a vGPU belongs to, or None where no such vGPU is advertised."""
        parts = split_device_id(vgpu)
        if parts is None:
            return None
        card = self.find(parts[0])
        return card if card is not None and parts[1] < card.replicas else None

    @property
    def device_ids(self) -> Iterator[str]:
        """The IDs of all vGPUs."""
        return (vgpu for card in self.cards for vgpu in card.device_ids)
