"""Cards that exist in memory, with faults on demand: the driver of `make run` and of trials."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Self

import anyio

from vgpu_agent.gpu.driver import GpuEvent, Reading, Scan, XidEvent
from vgpu_agent.model.devices import Gpu

DRIVER_VERSION = "simulated"
_EVENT_WAIT = 1.0


@dataclass(frozen=True, slots=True)
class _SimulatedCard:
    """A card: `epoch` grows each time it is enumerated anew, which makes older handles void."""

    gpu: Gpu
    epoch: int = 0
    on_the_bus: bool = True
    error: str | None = None


def simulated_gpus(
    count: int, model: str, memory_bytes: int, numa_nodes: Sequence[int | None]
) -> tuple[Gpu, ...]:
    """So many cards of one model, on the NUMA nodes in turn. The UUIDs are the same every time."""
    return tuple(
        Gpu(
            uuid=f"GPU-{index:08x}-5151-4d4d-8000-{index:012x}",
            index=index,
            model=model,
            memory_bytes=memory_bytes,
            pci_bus_id=f"0000:{index + 1:02x}:00.0",
            numa_node=numa_nodes[index % len(numa_nodes)],
            compute_capability=(9, 0),
        )
        for index in range(count)
    )


class SimulatedDriver:
    """A GpuDriver whose cards fail and heal when told to."""

    def __init__(self, gpus: Sequence[Gpu]) -> None:
        self._cards = {gpu.uuid: _SimulatedCard(gpu) for gpu in gpus}
        self._handles: dict[str, int] = {}
        self._events: list[GpuEvent] = []
        self._arrived = asyncio.Event()

    async def __aenter__(self) -> Self:
        """Nothing to open."""
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Nothing to give back."""

    async def scan(self) -> Scan:
        """All cards on the bus, with fresh handles."""
        present = [card for card in self._cards.values() if card.on_the_bus]
        self._handles = {card.gpu.uuid: card.epoch for card in present}
        return Scan(DRIVER_VERSION, tuple(card.gpu for card in present))

    async def probe(self, uuid: str) -> Reading:
        """A card is lost where it fell off the bus or was enumerated anew since the last scan."""
        card = self._cards.get(uuid)
        if card is None or not card.on_the_bus or self._handles.get(uuid) != card.epoch:
            return Reading(lost=True)
        return Reading(error=card.error, memory_used_bytes=0)

    async def next_events(self) -> Sequence[GpuEvent]:
        """The events since the last call, or those of the next second."""
        with anyio.move_on_after(_EVENT_WAIT):
            await self._arrived.wait()
        self._arrived.clear()
        events, self._events = self._events, []
        return events

    # Faults on demand

    def xid(self, uuid: str | None, xid: int, *, falls_off_the_bus: bool = False) -> None:
        """The card reports an XID; with `falls_off_the_bus` it is gone until it is enumerated."""
        if uuid is not None and falls_off_the_bus:
            self._change(uuid, on_the_bus=False)
        self._events.append(XidEvent(uuid, xid))
        self._arrived.set()

    def enumerate_again(self, uuid: str) -> None:
        """The card comes back as after a reset: it is well, and every older handle is void."""
        card = self._cards[uuid]
        self._cards[uuid] = _SimulatedCard(card.gpu, card.epoch + 1)

    def fail_probes(self, uuid: str, error: str | None) -> None:
        """Every probe of the card fails with `error` from now on, or passes again where None."""
        self._change(uuid, error=error)

    def _change(self, uuid: str, **changes: bool | str | None) -> None:
        self._cards[uuid] = replace(self._cards[uuid], **changes)  # type: ignore[arg-type]
