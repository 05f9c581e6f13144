"""Real GPUs, by NVML. The only package that imports pynvml.

Every NVML call can block, for long where a GPU is failing, so none is made on the event loop.
Calls go through lanes, each of which one thread at most is in: one for NVML as a whole, one for
waiting for events, and for each GPU one for what is asked of it and one for lists of processes and
of memory limits, so that a GPU that hangs holds up no other, and a long list no probe. GPUs that
answer at once are asked one after the other, by one thread.
"""

import logging
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import anyio
import pynvml

from vgpu_agent.errors import DriverError, DriverHangsError
from vgpu_agent.gpu.driver import CALL_LIMIT, GpuDriver
from vgpu_agent.gpu.nvml import calls
from vgpu_agent.gpu.nvml.events import SLICE_SECONDS
from vgpu_agent.gpu.nvml.lanes import NO_THREAD, Crew, Lane, Workers, run_all
from vgpu_agent.gpu.nvml.session import CLOSE_SECONDS, Looked, Session
from vgpu_agent.model.facts import ComputeMode, GpuEvent, Reading, Scan
from vgpu_agent.model.holders import GpuProcess
from vgpu_agent.model.limits import MemoryLimit

log = logging.getLogger(__name__)

NO_EVENTS_SECONDS = 1.0
"""Seconds to sleep where no GPU has events to wait for."""

WAIT_LIMIT = SLICE_SECONDS + 2 * CALL_LIMIT
"""Seconds; a wait for events that takes longer hangs. The loop looks as often whether it does."""


class NvmlDriver(GpuDriver):
    """The GPUs of this machine. See `GpuDriver` for what the methods promise.

    NVML is opened by `scan` and closed on leaving, after which it may be entered again. `numa_root`
    is sysfs's folder of PCI devices, `proc_root` the driver's own list of its GPUs. NVML lists the
    GPUs of its start for ever: a session that is older than `reopen_seconds` is opened again where
    the driver's list has another length. After `wait_seconds` a wait for events ends without any.
    """

    def __init__(
        self,
        *,
        numa_root: Path = Path("/sys/bus/pci/devices"),
        proc_root: Path = Path("/proc/driver/nvidia/gpus"),
        reopen_seconds: float = 30,
        wait_seconds: float = 60,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._workers, self._waiters = Workers(), Workers(daemon=True)
        self._crew, self._listers = Crew(self._workers), Crew(self._workers)
        self._calls = Lane(self._workers)
        self._waits = Lane(self._waiters)
        self._gpus: dict[int, Lane] = {}
        self._lists: dict[str, Lane] = {}
        self._session = Session(
            describe=partial(calls.describe, numa_root=numa_root),
            proc_root=proc_root,
            reopen_seconds=reopen_seconds,
            wait_seconds=wait_seconds,
            monotonic=monotonic,
        )

    async def __aexit__(self, *_: object) -> None:
        with anyio.move_on_after(CLOSE_SECONDS, shield=True):
            await self._calls.run(self._session.leave)
        self._workers.end()
        self._waiters.end()

    async def scan(self, limit: float = CALL_LIMIT, patience: float = math.inf) -> Scan:
        """Opens NVML if need be.

        Raises DriverError if it cannot be opened or lists no GPUs, and where that hangs.
        """
        try:
            version, count = await self._calls.run(self._session.open, limit)
        except TimeoutError as error:
            why = f": {NO_THREAD}" if self._calls.doing is NO_THREAD else ""
            raise DriverHangsError(f"NVML did not answer within {limit:g} s{why}") from error
        lanes = {index: self._lane(index) for index in range(count)}
        asked = {
            lane: partial(self._session.look, index, lane.beat) for index, lane in lanes.items()
        }
        found = await run_all(asked, limit, patience)
        looked: dict[int, Looked] = {}
        silent: dict[int, str] = {}
        for index, lane in lanes.items():
            if lane not in found or isinstance(each := found[lane], TimeoutError):
                silent[index] = lane.doing
            else:
                looked[index] = each
        scan = self._session.scanned(version, looked, silent)
        if not (scan.gpus or scan.undescribed):
            # NVML lists the GPUs that it saw when it was opened: the next scan opens it again.
            with suppress(TimeoutError):  # the next scan waits for it, and says so
                await self._calls.run(self._session.close, limit)
        return scan

    async def probe(
        self, uuids: Collection[str], limit: float = CALL_LIMIT, patience: float = math.inf
    ) -> dict[str, Reading]:
        """See `GpuDriver`."""
        indices = {uuid: self._session.index_of(uuid) for uuid in uuids}
        lanes = {uuid: self._lane(i) for uuid, i in indices.items() if i is not None}
        probe = self._session.probe
        asked = {lane: partial(probe, uuid, lane.beat) for uuid, lane in lanes.items()}
        found = await run_all(asked, limit, patience)
        readings = {uuid: self._session.absent(uuid) for uuid in indices.keys() - lanes.keys()}
        for uuid, lane in lanes.items():
            if lane in found:
                each = found[lane]
                if isinstance(each, TimeoutError):
                    each = Reading.silent(lane.doing, limit)
                readings[uuid] = each
        return readings

    def _lane(self, index: int) -> Lane:
        return self._gpus.setdefault(index, Lane(self._workers, self._crew))

    async def processes(self, uuid: str) -> Sequence[GpuProcess] | None:
        """NVML lists a client of MPS in the one list, the other or both, by the driver's version.

        Does not open NVML: while that is released there is no answer.
        """
        return await self._list_lane(uuid).run(partial(self._session.processes, uuid))

    async def memory_limits(
        self, uuid: str, cgroups: Sequence[str]
    ) -> Mapping[str, MemoryLimit | str]:
        """See `GpuDriver`. Does not open NVML."""
        lane = self._list_lane(uuid)
        look = partial(self._session.memory_limits, uuid, cgroups, lane.beat)
        try:
            return await lane.run(look, CALL_LIMIT)
        except TimeoutError:
            return {}

    async def limit_memory(self, uuid: str, cgroup: str, hard: int | None, soft: int) -> str | None:
        """See `GpuDriver`. Does not open NVML."""
        lane = self._list_lane(uuid)
        limit = partial(self._session.limit_memory, uuid, cgroup, hard, soft, lane.beat)
        try:
            return await lane.run(limit, CALL_LIMIT)
        except TimeoutError:
            return f"the GPU does not answer within {CALL_LIMIT:g} s ({lane.doing})"

    def _list_lane(self, uuid: str) -> Lane:
        return self._lists.setdefault(uuid, Lane(self._workers, self._listers))

    async def next_events(self) -> Sequence[GpuEvent]:
        """Where there is nothing to wait for (no GPU has events, the wait fails) it sleeps."""
        for _ in range(2):  # also when GPUs were to be registered first
            due: tuple[str, ...] = ()
            try:
                wait = partial(self._session.wait, self._waits.beat)
                due = await self._waits.run(wait, WAIT_LIMIT)
            except TimeoutError:
                self._session.events.wait_failed("the wait for events does not return")
            if events := self._session.events.take():
                return events
            if not due:
                break
            async with anyio.create_task_group() as tasks:
                for uuid in due:
                    tasks.start_soon(self._register, uuid)
        if not self._session.events.registered:
            await anyio.sleep(NO_EVENTS_SECONDS)
        return ()

    async def _register(self, uuid: str) -> None:
        index = self._session.index_of(uuid)
        if index is None:
            return
        lane = self._lane(index)
        try:
            await lane.run(partial(self._session.register, uuid, lane.beat), CALL_LIMIT)
        except TimeoutError:
            self._session.events.hangs(uuid, lane.doing)

    async def release(self) -> bool:
        """Closes NVML until the next scan; False where a call that hangs keeps it open."""
        with anyio.move_on_after(CLOSE_SECONDS):
            await self._calls.run(self._session.close)
        if not self._session.is_open:
            return True
        log.warning("NVML was left open: a call to the driver does not return")
        return False


# Single questions that open NVML for themselves. They block.


@contextmanager
def _opened(what: str) -> Iterator[None]:
    """NVML, open for a moment. Raises DriverError that says what could not be done."""
    calls.open_nvml()
    try:
        yield
    except pynvml.NVMLError as error:
        help_ = "see nvidia-smi and the node's kernel log"
        if error.value == pynvml.NVML_ERROR_NO_PERMISSION:
            help_ = "run this container as root with the capability SYS_ADMIN"
        raise DriverError(f"{what} ({error}): {help_}") from error
    finally:
        with suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()


def set_compute_mode(uuid: str, mode: ComputeMode) -> bool:
    """Sets who may open a CUDA context on a GPU; False where the GPU has no such setting.

    The driver asks for root, which in a container is CAP_SYS_ADMIN as well, and forgets the mode
    with the next boot. Raises DriverError with what to do.
    """
    with _opened(f"compute mode of {uuid} cannot be set"):
        try:
            handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
            pynvml.nvmlDeviceSetComputeMode(handle, int(mode))
        except pynvml.NVMLError_NotSupported:
            return False
    return True


def process_memory(uuid: str) -> dict[int, int]:
    """Bytes of a GPU that each process has, by its PID on the host; those that NVML reports.

    Raises DriverError.
    """
    with _opened(f"processes on {uuid} cannot be listed"):
        found = calls.running(pynvml.nvmlDeviceGetHandleByUUID(uuid), "Compute")
    return {pid: memory for pid, memory in found if memory is not None}
