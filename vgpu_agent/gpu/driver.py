"""The seam between the agent and a source of GPUs: what every driver can be asked."""

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import Self

import anyio

from vgpu_agent.model.facts import GpuEvent, Reading, Scan
from vgpu_agent.model.holders import GpuProcess
from vgpu_agent.model.limits import MemoryLimit

CALL_LIMIT = 3.0
"""Seconds; a call to the driver that takes longer hangs."""


class GpuDriver(ABC):
    """A source of GPUs. Entering opens nothing yet; leaving gives everything back.

    No method blocks the event loop. `scan` and `next_events` raise DriverError where the driver
    cannot be asked at all; a fault of one GPU is a Reading, not an error.
    """

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        with anyio.CancelScope(shield=True):
            await self.release()

    @abstractmethod
    async def scan(self, limit: float = CALL_LIMIT, patience: float = math.inf) -> Scan:
        """Looks at all GPUs, with fresh handles.

        A call that takes more than `limit` seconds hangs. What was not found within `patience`
        seconds is not waited for.
        """

    @abstractmethod
    async def probe(
        self, uuids: Collection[str], limit: float = CALL_LIMIT, patience: float = math.inf
    ) -> dict[str, Reading]:
        """Asks GPUs how they are, by the handles of the last scan; without one a GPU is lost.

        Times as of `scan`; one that is not waited for any longer is left out.
        """

    @abstractmethod
    async def processes(self, uuid: str) -> Sequence[GpuProcess] | None:
        """The processes with a context on a GPU, MPS clients included, PIDs as the host has them.

        None where the GPU or its driver does not report them now.
        """

    @abstractmethod
    async def memory_limits(
        self, uuid: str, cgroups: Sequence[str]
    ) -> Mapping[str, MemoryLimit | str]:
        """What the driver has for cgroups on a GPU, by their full paths; needs no privilege.

        A text says why there is no answer for that path. Empty where the GPU is not known now or
        does not answer in time.
        """

    @abstractmethod
    async def limit_memory(self, uuid: str, cgroup: str, hard: int | None, soft: int) -> str | None:
        """Sets the limits of a cgroup on a GPU, in bytes; `hard` None is no limit.

        All processes in it together can take no more than `hard`, and are kept `soft`. Answers why
        it was not set, None where it was. The driver asks for root with SYS_ADMIN.
        """

    @abstractmethod
    async def next_events(self) -> Sequence[GpuEvent]:
        """Waits for events, for a while; none is a normal answer."""

    @abstractmethod
    async def release(self) -> bool:
        """Closes the driver for a reset, until the next scan; whether it could, within a second."""
