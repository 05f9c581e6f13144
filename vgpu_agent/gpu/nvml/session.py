"""NVML while it is open, as the worker threads see it. Everything here blocks."""

from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pynvml

from vgpu_agent.errors import DriverError
from vgpu_agent.gpu.nvml import calls
from vgpu_agent.gpu.nvml.calls import (
    GONE,
    RECOVERY_ACTION_EVENT,
    XID_EVENT,
    EventSet,
    Handle,
    optional,
)
from vgpu_agent.gpu.nvml.lanes import Gate
from vgpu_agent.model.devices import Excluded, Gpu
from vgpu_agent.model.facts import GpuEvent, Reading, RecoveryActionChanged, Scan, XidEvent
from vgpu_agent.model.holders import GpuProcess

# A thread that waits cannot be interrupted, so it waits in slices: a cancelled wait is over, thread
# and all, within one of them.
SLICE_SECONDS = 0.5

_EVENTS_AT_ONCE = 64

CLOSE_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Found:
    """A GPU of the last scan and its handle, and why it is not known what it is, if it is not."""

    handle: Handle
    gpu: Gpu
    problem: Excluded | None = None


class Session:
    """NVML while it is open, as the worker threads see it. All methods block.

    The threads own it, not the loop, so that a call whose caller has left still ends in order.
    `scan` and `close` run in one lane, `wait` in another, `probe` and `processes` in one of each
    GPU. What they share is only replaced as a whole, and `close` is alone: NVML crashes if it is
    shut down, or an event set freed, under a thread that is inside.
    """

    def __init__(
        self,
        *,
        describe: Callable[[int, Handle, str], Gpu],
        proc_root: Path,
        reopen_seconds: float,
        monotonic: Callable[[], float],
    ) -> None:
        self._describe = describe
        self._proc_root = proc_root
        self._reopen_seconds = reopen_seconds
        self._monotonic = monotonic
        self._gate = Gate()
        self._opened_at: float | None = None
        self._listed_when_opened = 0
        self._found: dict[str, Found] = {}
        self._known: dict[str, Gpu] = {}
        self._event_set: EventSet | None = None
        self._registered: dict[bytes, str] = {}
        # Kept here, not returned by `wait`: what a thread finds whose caller has left is not lost.
        self._events: deque[GpuEvent] = deque()

    @property
    def is_open(self) -> bool:
        """Whether NVML is open."""
        return self._opened_at is not None

    # Asking

    def scan(self) -> Scan:
        """Looks at all GPUs, with fresh handles; opens NVML if need be. Raises DriverError."""
        if self._opened_at is not None and self._is_outdated(self._opened_at):
            self.close()
        if self._opened_at is None:
            calls.open_nvml()
            self._opened_at = self._monotonic()
            self._listed_when_opened = self._listed()
        try:
            driver_version: str = pynvml.nvmlSystemGetDriverVersion()
            count: int = pynvml.nvmlDeviceGetCount()
        except pynvml.NVMLError as error:
            self.close()
            raise DriverError(f"NVML does not list its GPUs: {error}") from error
        looked = [self._look(index) for index in range(count)]
        found = [each for each in looked if isinstance(each, Found)]
        often = Counter(each.gpu.uuid for each in found)
        self._found = {each.gpu.uuid: each for each in found if often[each.gpu.uuid] == 1}
        problems = [each for each in looked if isinstance(each, Excluded)]
        problems += [each.problem for each in self._found.values() if each.problem is not None]
        problems += [
            Excluded(each.gpu, "duplicate", f"{often[each.gpu.uuid]} GPUs have this UUID")
            for each in found
            if often[each.gpu.uuid] > 1
        ]
        self._known |= {uuid: each.gpu for uuid, each in self._found.items() if not each.problem}
        if not self._found:
            # NVML lists the GPUs that it saw when it was opened: the next scan opens it again.
            self.close()
        return Scan(
            driver_version,
            tuple(each.gpu for each in self._found.values() if each.problem is None),
            tuple(problems),
        )

    def _is_outdated(self, opened_at: float) -> bool:
        """Whether GPUs came or went since NVML was opened; one that is lost stays in the list."""
        if self._monotonic() - opened_at < self._reopen_seconds:
            return False
        return self._listed() != self._listed_when_opened

    def _listed(self) -> int:
        """How many GPUs the driver's own list has; not every platform has that list."""
        try:
            return len(list(self._proc_root.iterdir()))
        except OSError:
            return 0

    def _look(self, index: int) -> Found | Excluded | None:
        """The GPU of that index, or why nothing is known of it; None where a known one is lost."""
        try:
            handle = Handle(pynvml.nvmlDeviceGetHandleByIndex(index))
            uuid = calls.text(pynvml.nvmlDeviceGetUUID, handle)
        except pynvml.NVMLError as error:
            if not any(gpu.index == index for gpu in self._known.values()):
                return calls.unreadable(index, "", error)
            # An odd error is not a GPU that went away: what was known of the place stays.
            before = (each for each in self._found.values() if each.gpu.index == index)
            return None if error.value in GONE else next(before, None)
        try:
            return Found(handle, self._describe(index, handle, uuid))
        except Exception as error:  # noqa: BLE001 - whatever one GPU answers concerns no other
            if isinstance(error, pynvml.NVMLError) and error.value in GONE and uuid in self._known:
                return None
            # One failing call makes no GPU vanish that was known: its probe says what is wrong.
            if uuid in self._known:
                return Found(handle, self._known[uuid])
            unreadable = calls.unreadable(index, uuid, error)
            return Found(handle, unreadable.gpu, unreadable)

    def probe(self, uuid: str) -> Reading:
        """Asks a GPU of the last scan how it is; another one is lost."""
        with self._gate.shared():
            return self._probe(uuid)

    def _probe(self, uuid: str) -> Reading:
        found = self._found.get(uuid)
        if found is None:
            return Reading(lost=True)
        handle = found.handle
        try:
            used = calls.memory(handle)[2]
        except pynvml.NVMLError as error:
            # A handle from before a reset is an invalid argument.
            if error.value in GONE or error.value == pynvml.NVML_ERROR_INVALID_ARGUMENT:
                return Reading(lost=True)
            return Reading(error=f"nvmlDeviceGetMemoryInfo: {error}")
        try:
            rows = optional(calls.remapped_rows, handle)
            return Reading(
                uncorrectable_ecc=optional(calls.uncorrectable_ecc, handle),
                remap_failed=None if rows is None else rows[3] != 0,
                remap_pending=None if rows is None else rows[2] != 0,
                recovery_action=optional(calls.recovery_action, handle),
                compute_mode=optional(calls.compute_mode, handle),
                memory_used_bytes=used,
                energy_millijoules=optional(calls.energy, handle),
            )
        except pynvml.NVMLError:
            return Reading(lost=True)

    def processes(self, uuid: str) -> tuple[GpuProcess, ...] | None:
        """The processes on a GPU of the last scan; None where it does not say."""
        with self._gate.shared():
            found = self._found.get(uuid)
            if found is None:
                return None
            try:
                listed = calls.running(found.handle, "Compute") + calls.mps_clients(found.handle)
            except pynvml.NVMLError:
                return None  # half of the truth would look like all of it
        memory: dict[int, int | None] = {}
        for pid, used in listed:
            before = memory.get(pid)
            memory[pid] = used if before is None else max(before, used or 0)
        return tuple(GpuProcess(pid, memory[pid]) for pid in sorted(memory))

    def close(self) -> None:
        """Closes NVML; it stays open under a call that hangs."""
        with self._gate.alone(CLOSE_SECONDS) as alone:
            if not alone or self._opened_at is None:
                return  # under a call that hangs it stays open
            self._found, self._opened_at = {}, None
            self._drop_event_set()
            with suppress(pynvml.NVMLError):
                pynvml.nvmlShutdown()

    # Waiting

    def wait(self) -> bool:
        """Collects what happens within a slice; False, at once, if there is nothing to wait for."""
        with self._gate.shared():
            return self._wait()

    def _wait(self) -> bool:
        found = [each for each in self._found.values() if each.problem is None]
        gpus = {calls.pointer(shared.handle): shared.gpu.uuid for shared in found}
        if gpus != self._registered:
            # What the old set still holds would be lost with it.
            self._collect(seconds=0)
            self._drop_event_set()
            with suppress(pynvml.NVMLError):  # else it is tried again with the next slice
                self._make_event_set([shared.handle for shared in found])
                self._registered = gpus
        self._collect(seconds=SLICE_SECONDS)
        return self._event_set is not None

    def take_events(self) -> tuple[GpuEvent, ...]:
        """The events that were collected, each once. Called on the loop; does not block."""
        return tuple(self._events.popleft() for _ in range(len(self._events)))

    def _make_event_set(self, handles: Sequence[Handle]) -> None:
        """Registers for the events that each GPU has; no set where none has any."""
        event_set = self._event_set = EventSet(pynvml.nvmlEventSetCreate())
        some = False
        for handle in handles:
            # A GPU without events, or lost since the scan, is left to its probe.
            with suppress(pynvml.NVMLError):
                types: int = pynvml.nvmlDeviceGetSupportedEventTypes(handle)
                if types := types & (XID_EVENT | RECOVERY_ACTION_EVENT):
                    pynvml.nvmlDeviceRegisterEvents(handle, types, event_set)
                    some = True
        if not some:
            self._drop_event_set()

    def _collect(self, *, seconds: float) -> None:
        """Takes what the event set has, waiting so long if it is nothing."""
        try:
            while self._event_set is not None and len(self._events) < _EVENTS_AT_ONCE:
                timeout = 0 if self._events else round(seconds * 1000)
                data = pynvml.nvmlEventSetWait_v2(self._event_set, timeout)
                uuid = self._uuid_of(Handle(data.device))
                if data.eventType == XID_EVENT:
                    self._events.append(XidEvent(uuid, int(data.eventData)))
                elif data.eventType == RECOVERY_ACTION_EVENT:
                    self._events.append(RecoveryActionChanged(uuid))
        except pynvml.NVMLError as error:
            if error.value != pynvml.NVML_ERROR_TIMEOUT:
                self._drop_event_set()  # a set with a lost GPU in it may never work again

    def _uuid_of(self, device: Handle) -> str | None:
        """The GPU of an event. A GPU that falls off the bus is known only by its handle."""
        known = self._registered.get(calls.pointer(device))
        if known is not None:
            return known
        try:
            uuid: str = pynvml.nvmlDeviceGetUUID(device)
        except pynvml.NVMLError:
            return None
        return uuid

    def _drop_event_set(self) -> None:
        if self._event_set is not None:
            with suppress(pynvml.NVMLError):
                pynvml.nvmlEventSetFree(self._event_set)
        self._event_set = None
        self._registered = {}
