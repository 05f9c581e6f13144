"""GPUs that exist in memory, with faults on demand: the driver of `make run` and of trials."""

import asyncio
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum

import anyio

from vgpu_agent.errors import DriverError
from vgpu_agent.gpu.driver import CALL_LIMIT, GpuDriver
from vgpu_agent.model.devices import Gpu
from vgpu_agent.model.facts import GpuEvent, Reading, Scan, XidEvent
from vgpu_agent.model.holders import GpuProcess
from vgpu_agent.model.limits import MemoryLimit

DRIVER_VERSION = "simulated"
_EVENT_WAIT = 1.0
_NO_LIMIT = MemoryLimit(hard_bytes=None, soft_bytes=0, used_bytes=0)


XID_OFF_THE_BUS = 79
"""The XID that a driver reports of a GPU that has fallen off the bus."""


class SimulatedFault(StrEnum):
    """What can be done to a simulated GPU; `HEAL` is a reset, after which it is well."""

    XID = "xid"
    LOSE = "lose"
    ECC = "ecc"
    HANG = "hang"
    HEAL = "heal"


@dataclass(frozen=True, slots=True)
class _SimulatedGpu:
    """A GPU: `epoch` grows each time it is enumerated again, which makes older handles void."""

    gpu: Gpu
    epoch: int = 0
    on_the_bus: bool = True
    reading: Reading = Reading(memory_used_bytes=0, uncorrectable_ecc=0)
    hangs: bool = False
    processes: tuple[GpuProcess, ...] = ()
    limits: Mapping[str, MemoryLimit] = field(default_factory=dict)


def simulated_gpus(
    count: int, model: str, memory_bytes: int, numa_nodes: Sequence[int | None]
) -> tuple[Gpu, ...]:
    """So many GPUs of one model, on the NUMA nodes in turn. The UUIDs are the same every time."""
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


class SimulatedDriver(GpuDriver):
    """A GpuDriver whose GPUs fail and recover on demand."""

    def __init__(self, gpus: Sequence[Gpu]) -> None:
        self._gpus = {gpu.uuid: _SimulatedGpu(gpu) for gpu in gpus}
        self._handles: dict[str, int] = {}
        self._events: list[GpuEvent] = []
        self._arrived = asyncio.Event()
        self._changed = asyncio.Event()
        self._error: DriverError | None = None
        self._no_limits: str | None = "simulated GPUs have no memory limits"

    @property
    def gpus(self) -> tuple[Gpu, ...]:
        """All GPUs, also those that are away."""
        return tuple(shared.gpu for shared in self._gpus.values())

    async def scan(self, limit: float = CALL_LIMIT, patience: float = math.inf) -> Scan:  # noqa: ARG002
        """All GPUs on the bus, with fresh handles."""
        if self._error is not None:
            raise self._error
        present = [shared for shared in self._gpus.values() if shared.on_the_bus]
        self._handles = {shared.gpu.uuid: shared.epoch for shared in present}
        return Scan(DRIVER_VERSION, tuple(shared.gpu for shared in present))

    async def probe(
        self, uuids: Collection[str], limit: float = CALL_LIMIT, patience: float = math.inf
    ) -> dict[str, Reading]:
        """A GPU is lost where it fell off the bus or was enumerated again since the last scan."""

        def hang() -> set[str]:
            return {uuid for uuid in uuids if uuid in self._gpus and self._gpus[uuid].hangs}

        if hung := hang():
            with anyio.move_on_after(min(limit, patience)):
                while hung := hang():
                    await self._changed.wait()
        readings = {uuid: self._reading(uuid) for uuid in uuids if uuid not in hung}
        if limit <= patience:
            readings |= dict.fromkeys(hung, Reading.silent("probe", limit))
        return readings

    def _reading(self, uuid: str) -> Reading:
        shared = self._gpus.get(uuid)
        if shared is None or not shared.on_the_bus or self._handles.get(uuid) != shared.epoch:
            return Reading(lost=True)
        return shared.reading

    async def processes(self, uuid: str) -> Sequence[GpuProcess] | None:
        """What `run_processes` said, of a GPU that is there."""
        shared = self._gpus.get(uuid)
        return shared.processes if shared is not None and shared.on_the_bus else None

    async def memory_limits(
        self, uuid: str, cgroups: Sequence[str]
    ) -> Mapping[str, MemoryLimit | str]:
        """What was set with `limit_memory`, of a GPU that answers; see `can_limit_memory`."""
        shared = self._answering(uuid)
        if shared is None:
            return {}
        why = self._no_limits
        return {path: why or shared.limits.get(path, _NO_LIMIT) for path in cgroups}

    async def limit_memory(self, uuid: str, cgroup: str, hard: int | None, soft: int) -> str | None:
        """Takes every path, as no cgroup is looked at."""
        shared = self._answering(uuid)
        if shared is None:
            return "the driver does not know the GPU now"
        if self._no_limits is None:
            limit = replace(shared.limits.get(cgroup, _NO_LIMIT), hard_bytes=hard, soft_bytes=soft)
            self._change(uuid, limits={**shared.limits, cgroup: limit})
        return self._no_limits

    def _answering(self, uuid: str) -> _SimulatedGpu | None:
        """The GPU, where it is as the last scan found it."""
        shared = self._gpus.get(uuid)
        if shared is None or shared.hangs or not shared.on_the_bus:
            return None
        return shared if self._handles.get(uuid) == shared.epoch else None

    async def next_events(self) -> Sequence[GpuEvent]:
        """The events since the last call, or those of the next second."""
        with anyio.move_on_after(_EVENT_WAIT):
            await self._arrived.wait()
        self._arrived.clear()
        events, self._events = self._events, []
        return events

    async def release(self) -> bool:
        """Every handle is void until the next scan."""
        self._handles = {}
        return True

    # Faults on demand

    def rehearse(self, fault: SimulatedFault, uuid: str, xid: int = 0) -> None:
        """What the driver says from now on of a GPU that has this fault."""
        match fault:
            case SimulatedFault.XID:
                self.xid(uuid, xid, falls_off_the_bus=xid == XID_OFF_THE_BUS)
            case SimulatedFault.LOSE:
                self.fall_off(uuid)
            case SimulatedFault.ECC:
                reading = self._gpus[uuid].reading
                self.show(
                    uuid, replace(reading, uncorrectable_ecc=(reading.uncorrectable_ecc or 0) + 1)
                )
            case SimulatedFault.HANG:
                self.hang(uuid, hangs=True)
            case SimulatedFault.HEAL:
                self.enumerate_again(uuid)

    def xid(self, uuid: str | None, xid: int, *, falls_off_the_bus: bool = False) -> None:
        """The GPU reports an XID; with `falls_off_the_bus` it is gone until it is enumerated."""
        if uuid is not None and falls_off_the_bus:
            self.fall_off(uuid)
        self._events.append(XidEvent(uuid, xid))
        self._arrived.set()

    def enumerate_again(self, uuid: str) -> None:
        """The GPU comes back as after a reset: it is well, and every older handle is void."""
        again = _SimulatedGpu(self._gpus[uuid].gpu, self._gpus[uuid].epoch + 1)
        self._replace(uuid, again)

    def is_well(self, uuid: str) -> bool:
        """Whether no fault was made on demand that a probe finds, since it was last enumerated."""
        shared = self._gpus[uuid]
        faulty = shared.reading.uncorrectable_ecc or shared.reading.error
        return shared.on_the_bus and not shared.hangs and not faulty

    def show(self, uuid: str, reading: Reading) -> None:
        """Every probe of the GPU reads this from now on."""
        self._change(uuid, reading=reading)

    def use_memory(self, uuid: str, count: int) -> None:
        """So many bytes of the GPU are in use from now on."""
        self.show(uuid, replace(self._gpus[uuid].reading, memory_used_bytes=count))

    def run_processes(self, uuid: str, processes: Sequence[GpuProcess]) -> None:
        """These processes, and no others, have a context on the GPU from now on."""
        self._change(uuid, processes=tuple(processes))

    def can_limit_memory(self, why: str | None = None) -> None:
        """Memory can be limited from now on, or not, where `why` says so."""
        self._no_limits = why

    def use_in(self, uuid: str, cgroup: str, count: int) -> None:
        """So many bytes of the GPU are in use by the processes of a cgroup from now on."""
        shared = self._gpus[uuid]
        limit = replace(shared.limits.get(cgroup, _NO_LIMIT), used_bytes=count)
        self._change(uuid, limits={**shared.limits, cgroup: limit})

    def fail_probes(self, uuid: str, error: str | None) -> None:
        """Every probe of the GPU fails with `error` from now on, or passes again where None."""
        self.show(uuid, replace(self._gpus[uuid].reading, error=error))

    def hang(self, uuid: str, *, hangs: bool) -> None:
        """Calls that ask this GPU do not return for as long as it hangs."""
        self._change(uuid, hangs=hangs)

    def fail(self, error: DriverError | None) -> None:
        """The driver cannot be asked at all, or can again where None."""
        self._error = error

    def fall_off(self, uuid: str) -> None:
        """The GPU is gone from the bus."""
        self._change(uuid, on_the_bus=False)

    def insert(self, gpu: Gpu) -> None:
        """A GPU is put in."""
        self._gpus[gpu.uuid] = _SimulatedGpu(gpu)

    def _change(self, uuid: str, **changes: object) -> None:
        self._replace(uuid, replace(self._gpus[uuid], **changes))  # type: ignore[arg-type]

    def _replace(self, uuid: str, shared: _SimulatedGpu) -> None:
        self._gpus[uuid] = shared
        self._changed.set()
        self._changed = asyncio.Event()
