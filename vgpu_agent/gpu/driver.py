"""The seam between the agent and a source of GPUs: what every driver answers, as values.

Nothing here says what a fact means (that is `health`) or what follows from it (that is `probe`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from types import TracebackType
from typing import Protocol, Self

from vgpu_agent.model.devices import Excluded, Gpu
from vgpu_agent.model.holders import GpuProcess


class RecoveryAction(IntEnum):
    """What the driver says a card needs (NVML field `GET_GPU_RECOVERY_ACTION`, 230)."""

    NONE = 0
    GPU_RESET = 1
    NODE_REBOOT = 2
    DRAIN_P2P = 3
    DRAIN_AND_RESET = 4
    IMEX_DOMAIN_RESET = 5
    BUS_RESET = 6
    SYSTEM_REBOOT = 7


class ComputeMode(IntEnum):
    """Who may open a CUDA context on a card (`nvmlComputeMode_t`)."""

    DEFAULT = 0
    EXCLUSIVE_THREAD = 1
    PROHIBITED = 2
    EXCLUSIVE_PROCESS = 3


@dataclass(frozen=True, slots=True)
class Scan:
    """All cards that the driver sees now. A card that is lost is not among them."""

    driver_version: str
    gpus: tuple[Gpu, ...]
    excluded: tuple[Excluded, ...] = ()


@dataclass(frozen=True, slots=True)
class Reading:
    """What one probe of a card read. None: the card or the driver does not offer it.

    `error` is the driver's word for a call that failed; `lost` says that the card is gone from
    its handle. `uncorrectable_ecc` and `energy_millijoules` count since the driver initialised the
    card. `recovery_action` is a number, since drivers may know more of them than we do.
    """

    lost: bool = False
    error: str | None = None
    uncorrectable_ecc: int | None = None
    remap_failed: bool | None = None
    remap_pending: bool | None = None
    recovery_action: int | None = None
    compute_mode: ComputeMode | None = None
    memory_used_bytes: int | None = None
    energy_millijoules: int | None = None


@dataclass(frozen=True, slots=True)
class XidEvent:
    """The driver reported an XID. `uuid` is None where it could not tell the card."""

    uuid: str | None
    xid: int


@dataclass(frozen=True, slots=True)
class RecoveryActionChanged:
    """The driver changed its mind about what a card needs: read it again."""

    uuid: str | None


GpuEvent = XidEvent | RecoveryActionChanged


class GpuDriver(Protocol):
    """A source of GPUs. Entering opens nothing yet; leaving gives everything back.

    No method blocks the event loop. `scan` and `next_events` raise DriverError where the driver
    cannot be asked at all; a fault of one card is a Reading, not an error.
    """

    async def __aenter__(self) -> Self:
        """Makes the driver ready to be asked."""
        ...

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Gives everything back."""
        ...

    async def scan(self) -> Scan:
        """Looks at all cards, with fresh handles."""
        ...

    async def probe(self, uuid: str) -> Reading:
        """Asks one card how it is, by the handle of the last scan."""
        ...

    async def processes(self, uuid: str) -> Sequence[GpuProcess] | None:
        """The processes with a context on a card, MPS clients included, PIDs as the host has them.

        None where the card or its driver does not tell them now.
        """
        ...

    async def next_events(self) -> Sequence[GpuEvent]:
        """Waits at most a second for events; none is a normal answer."""
        ...

    async def release(self) -> bool:
        """Lets go of all cards for a reset, until the next scan; whether it could."""
        ...
