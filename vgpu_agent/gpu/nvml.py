"""Real cards, by NVML. The only module that imports pynvml.

Every NVML call can block, for long where a card is failing, so none is made on the event loop.
Calls go through lanes of one worker thread each: one for looking at all cards, one for waiting for
events, and for each card one for probes and one for lists of processes, so that a card that hangs
holds up no other, and a long list no probe.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import NewType, Self, TypeVar

import anyio
import pynvml
from anyio import to_thread

from vgpu_agent.errors import DriverError, DriverLibraryError
from vgpu_agent.gpu.driver import (
    ComputeMode,
    GpuEvent,
    Reading,
    RecoveryActionChanged,
    Scan,
    XidEvent,
)
from vgpu_agent.model.devices import Excluded, Gpu
from vgpu_agent.model.holders import GpuProcess

_log = logging.getLogger(__name__)

T = TypeVar("T")

_Handle = NewType("_Handle", object)
"""An opaque `nvmlDevice_t`."""

_EventSet = NewType("_EventSet", object)
"""An opaque `nvmlEventSet_t`."""

# A thread that waits cannot be interrupted, so it waits in slices: a cancelled wait is over, thread
# and all, within one of them.
_SLICE_SECONDS = 0.5
_SLICES = 2

_EVENTS_AT_ONCE = 64

_CLOSE_SECONDS = 1.0

# Older releases of pynvml lack these two names; the numbers are NVML's.
_RECOVERY_ACTION_FIELD: int = getattr(pynvml, "NVML_FI_DEV_GET_GPU_RECOVERY_ACTION", 230)
_RECOVERY_ACTION_EVENT: int = getattr(pynvml, "nvmlEventTypeGpuRecoveryAction", 0x8000)
_XID_EVENT: int = pynvml.nvmlEventTypeXidCriticalError

_GONE = frozenset({pynvml.NVML_ERROR_GPU_IS_LOST, pynvml.NVML_ERROR_UNINITIALIZED})
_NO_MEMORY_V2 = frozenset(
    {
        pynvml.NVML_ERROR_NOT_SUPPORTED,
        pynvml.NVML_ERROR_FUNCTION_NOT_FOUND,
        pynvml.NVML_ERROR_ARGUMENT_VERSION_MISMATCH,
    }
)

_NO_SUCH_LIST = frozenset({pynvml.NVML_ERROR_NOT_SUPPORTED, pynvml.NVML_ERROR_FUNCTION_NOT_FOUND})

# What a container was given at its creation does not change any more.
_LIBRARY_ERRORS = frozenset(
    {pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH}
)

_INIT_HELP = {
    pynvml.NVML_ERROR_LIBRARY_NOT_FOUND: (
        "libnvidia-ml.so.1 is not here: install the NVIDIA driver on the node, and run this"
        " container with the NVIDIA runtime, which brings the driver's libraries in"
    ),
    pynvml.NVML_ERROR_DRIVER_NOT_LOADED: (
        "the NVIDIA driver is not loaded: install it on the node or load its kernel module"
        " (nvidia-smi on the node must work)"
    ),
    pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH: (
        "libnvidia-ml.so.1 and the loaded driver are of different versions: the driver was"
        " changed under a running system; restart this pod, and the node if that is not enough"
    ),
    pynvml.NVML_ERROR_NO_PERMISSION: (
        "the NVIDIA device files may not be opened: run this container with the NVIDIA runtime"
        " or as privileged, and look at the permissions of /dev/nvidia*"
    ),
}


class NvmlDriver:
    """The cards of this machine. See `GpuDriver` for what the methods promise.

    NVML is opened by `scan` and closed on leaving, after which it may be entered again. Cards
    below `min_compute_capability` and cards in MIG mode are excluded. `numa_root` is sysfs's folder
    of PCI devices, `proc_root` the driver's own list of its cards. NVML lists the cards of its
    start for ever: a session that is older than `reopen_seconds` is opened anew where the driver's
    list has another length.
    """

    def __init__(
        self,
        *,
        min_compute_capability: tuple[int, int] | None,
        numa_root: Path = Path("/sys/bus/pci/devices"),
        proc_root: Path = Path("/proc/driver/nvidia/gpus"),
        reopen_seconds: float = 30,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._calls = _Lane()
        self._waits = _Lane()
        self._probes: dict[str, _Lane] = {}
        self._lists: dict[str, _Lane] = {}
        self._session = _Session(
            describe=partial(
                _describe, min_compute_capability=min_compute_capability, numa_root=numa_root
            ),
            proc_root=proc_root,
            reopen_seconds=reopen_seconds,
            monotonic=monotonic,
        )

    async def __aenter__(self) -> Self:
        """Opens nothing yet."""
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Closes NVML, within a second: a driver that hangs does not hold up the end."""
        with anyio.CancelScope(shield=True):
            await self.release()

    async def scan(self) -> Scan:
        """Looks at all cards, with fresh handles; opens NVML if need be.

        Raises DriverError if NVML cannot be opened or does not list its cards.
        """
        return await self._calls.run(self._session.scan)

    async def probe(self, uuid: str) -> Reading:
        """Asks one card how it is. A card that the last scan did not see is lost."""
        lane = self._probes.setdefault(uuid, _Lane())
        return await lane.run(partial(self._session.probe, uuid))

    async def processes(self, uuid: str) -> Sequence[GpuProcess] | None:
        """Compute processes and MPS clients of a card; None where it is not there or does not say.

        NVML lists a client of MPS in the one list, the other or both, by the driver's version. It
        does not open NVML: while that is let go of nothing is told.
        """
        lane = self._lists.setdefault(uuid, _Lane())
        return await lane.run(partial(self._session.processes, uuid))

    async def next_events(self) -> Sequence[GpuEvent]:
        """Waits at most a second for events of the cards of the last scan.

        Where there is nothing to wait for (NVML is not open, no card has events, the wait fails),
        that second is slept.
        """
        for _ in range(_SLICES):
            waited = await self._waits.run(self._session.wait)
            if events := self._session.take_events():
                return events
            if not waited:
                await anyio.sleep(_SLICE_SECONDS)
        return ()

    async def release(self) -> bool:
        """Closes NVML until the next scan; False where a call that hangs keeps it open."""
        with anyio.move_on_after(_CLOSE_SECONDS):
            await self._calls.run(self._session.close)
        if not self._session.is_open:
            return True
        _log.warning("NVML was left open: a call to the driver does not return")
        return False


class _Gate:
    """Lets many threads in together, or one alone; whoever wants to be alone goes first."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._inside = 0
        self._wanted = False

    @contextmanager
    def shared(self) -> Iterator[None]:
        with self._condition:
            self._condition.wait_for(lambda: not self._wanted)
            self._inside += 1
        try:
            yield
        finally:
            with self._condition:
                self._inside -= 1
                self._condition.notify_all()

    @contextmanager
    def alone(self, timeout: float) -> Iterator[bool]:
        """Waits so many seconds until all are out; whether they are. One thread at a time."""
        with self._condition:
            self._wanted = True
            try:
                yield self._condition.wait_for(lambda: self._inside == 0, timeout)
            finally:
                self._wanted = False
                self._condition.notify_all()


class _Lane:
    """Blocking calls, one at a time, each in a worker thread.

    A caller can leave at any time, but the thread stays until its call returns. The next caller
    waits for that on the loop: a driver that hangs costs one thread, not one for each call.
    `busy` is held by the thread while it is inside.
    """

    def __init__(self) -> None:
        self.busy = threading.Lock()
        self._turn = anyio.Lock()
        self._limiter = anyio.CapacityLimiter(1)

    async def run(self, call: Callable[[], T]) -> T:
        async with self._turn:
            while self.busy.locked():  # noqa: ASYNC110 - a thread that was left tells nobody
                await anyio.sleep(0.02)
            return await to_thread.run_sync(
                self._hold, call, abandon_on_cancel=True, limiter=self._limiter
            )

    def _hold(self, call: Callable[[], T]) -> T:
        with self.busy:
            return call()


@dataclass(frozen=True, slots=True)
class _Found:
    """A card of the last scan and its handle."""

    handle: _Handle
    card: Gpu | Excluded

    @property
    def gpu(self) -> Gpu:
        return self.card.gpu if isinstance(self.card, Excluded) else self.card

    @property
    def excluded(self) -> Excluded | None:
        return self.card if isinstance(self.card, Excluded) else None


class _Session:
    """NVML while it is open, as the worker threads see it. All methods block.

    The threads own it, not the loop, so that a call whose caller has left still ends in order.
    `scan` and `close` run in one lane, `wait` in another, `probe` and `processes` in one of each
    card. What they share is only replaced as a whole, and `close` is alone: NVML crashes if it is
    shut down, or an event set freed, under a thread that is inside.
    """

    def __init__(
        self,
        *,
        describe: Callable[[int, _Handle, str], Gpu | Excluded],
        proc_root: Path,
        reopen_seconds: float,
        monotonic: Callable[[], float],
    ) -> None:
        self._describe = describe
        self._proc_root = proc_root
        self._reopen_seconds = reopen_seconds
        self._monotonic = monotonic
        self._gate = _Gate()
        self._opened_at: float | None = None
        self._found: dict[str, _Found] = {}
        self._event_set: _EventSet | None = None
        self._registered: dict[bytes, str] = {}
        # Kept here, not returned by `wait`: what a thread finds whose caller has left is not lost.
        self._events: deque[GpuEvent] = deque()

    @property
    def is_open(self) -> bool:
        return self._opened_at is not None

    # Asking

    def scan(self) -> Scan:
        known = self._found
        if self._opened_at is not None and self._is_outdated(self._opened_at):
            self.close()
        if self._opened_at is None:
            _open()
            self._opened_at = self._monotonic()
        try:
            driver_version: str = pynvml.nvmlSystemGetDriverVersion()
            count: int = pynvml.nvmlDeviceGetCount()
        except pynvml.NVMLError as error:
            self.close()
            raise DriverError(f"NVML does not list its cards: {error}") from error
        cards = (self._look(index, known) for index in range(count))
        found = {card.gpu.uuid: card for card in cards if card is not None}
        self._found = found
        if not found:
            # NVML lists the cards that it saw when it was opened: the next scan opens it anew.
            self.close()
        return Scan(
            driver_version,
            tuple(card.gpu for card in found.values() if card.excluded is None),
            tuple(card.excluded for card in found.values() if card.excluded is not None),
        )

    def _is_outdated(self, opened_at: float) -> bool:
        if self._monotonic() - opened_at < self._reopen_seconds:
            return False
        try:
            return len(list(self._proc_root.iterdir())) != len(self._found)
        except OSError:
            return False  # not every platform has that list

    def _look(self, index: int, known: Mapping[str, _Found]) -> _Found | None:
        """The card of that index, or None where it is lost or says nothing of itself."""
        try:
            handle = _Handle(pynvml.nvmlDeviceGetHandleByIndex(index))
            uuid: str = pynvml.nvmlDeviceGetUUID(handle)
        except pynvml.NVMLError as error:
            if error.value in _GONE:
                return None
            # An odd error is not a card that went away: what was known of the place stays.
            return next((found for found in known.values() if found.gpu.index == index), None)
        try:
            return _Found(handle, self._describe(index, handle, uuid))
        except pynvml.NVMLError as error:
            if error.value in _GONE:
                return None
            # One failing call makes no card vanish that was known: its probe tells what is wrong.
            card = known[uuid].card if uuid in known else _unreadable(index, uuid, error)
            return _Found(handle, card)

    def probe(self, uuid: str) -> Reading:
        with self._gate.shared():
            return self._probe(uuid)

    def _probe(self, uuid: str) -> Reading:
        found = self._found.get(uuid)
        if found is None:
            return Reading(lost=True)
        handle = found.handle
        try:
            used = _memory(handle)[2]
        except pynvml.NVMLError as error:
            # A handle from before a reset is an invalid argument.
            if error.value in _GONE or error.value == pynvml.NVML_ERROR_INVALID_ARGUMENT:
                return Reading(lost=True)
            return Reading(error=f"nvmlDeviceGetMemoryInfo: {error}")
        try:
            rows = _optional(_remapped_rows, handle)
            return Reading(
                uncorrectable_ecc=_optional(_uncorrectable_ecc, handle),
                remap_failed=None if rows is None else rows[3] != 0,
                remap_pending=None if rows is None else rows[2] != 0,
                recovery_action=_optional(_recovery_action, handle),
                compute_mode=_optional(_compute_mode, handle),
                memory_used_bytes=used,
                energy_millijoules=_optional(_energy, handle),
            )
        except pynvml.NVMLError:
            return Reading(lost=True)

    def processes(self, uuid: str) -> tuple[GpuProcess, ...] | None:
        with self._gate.shared():
            found = self._found.get(uuid)
            if found is None:
                return None
            try:
                told = _running(found.handle, "Compute") + _mps_clients(found.handle)
            except pynvml.NVMLError:
                return None  # half of the truth would look like all of it
        memory: dict[int, int | None] = {}
        for pid, used in told:
            before = memory.get(pid)
            memory[pid] = used if before is None else max(before, used or 0)
        return tuple(GpuProcess(pid, memory[pid]) for pid in sorted(memory))

    def close(self) -> None:
        with self._gate.alone(_CLOSE_SECONDS) as alone:
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
        found = [card for card in self._found.values() if card.excluded is None]
        cards = {_pointer(card.handle): card.gpu.uuid for card in found}
        if cards != self._registered:
            # What the old set still holds would be lost with it.
            self._collect(seconds=0)
            self._drop_event_set()
            with suppress(pynvml.NVMLError):  # else it is tried again with the next slice
                self._make_event_set([card.handle for card in found])
                self._registered = cards
        self._collect(seconds=_SLICE_SECONDS)
        return self._event_set is not None

    def take_events(self) -> tuple[GpuEvent, ...]:
        """The events that were collected, each once. Called on the loop; does not block."""
        return tuple(self._events.popleft() for _ in range(len(self._events)))

    def _make_event_set(self, handles: Sequence[_Handle]) -> None:
        """Registers for the events that each card has; no set where none has any."""
        event_set = self._event_set = _EventSet(pynvml.nvmlEventSetCreate())
        some = False
        for handle in handles:
            # A card without events, or lost since the scan, is left to its probe.
            with suppress(pynvml.NVMLError):
                types: int = pynvml.nvmlDeviceGetSupportedEventTypes(handle)
                if types := types & (_XID_EVENT | _RECOVERY_ACTION_EVENT):
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
                uuid = self._uuid_of(_Handle(data.device))
                if data.eventType == _XID_EVENT:
                    self._events.append(XidEvent(uuid, int(data.eventData)))
                elif data.eventType == _RECOVERY_ACTION_EVENT:
                    self._events.append(RecoveryActionChanged(uuid))
        except pynvml.NVMLError as error:
            if error.value != pynvml.NVML_ERROR_TIMEOUT:
                self._drop_event_set()  # a set with a lost card in it may never work again

    def _uuid_of(self, device: _Handle) -> str | None:
        """The card of an event. A card that falls off the bus is known only by its handle."""
        known = self._registered.get(_pointer(device))
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


# Single questions. Each raises pynvml.NVMLError.


def _open() -> None:
    """Opens NVML; raises DriverError with what is missing and what to do."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        help_ = _INIT_HELP.get(error.value, "nvidia-smi and the kernel log on the node tell more")
        kind = DriverLibraryError if error.value in _LIBRARY_ERRORS else DriverError
        raise kind(f"NVML does not start ({error}): {help_}") from error


def _describe(
    index: int,
    handle: _Handle,
    uuid: str,
    *,
    min_compute_capability: tuple[int, int] | None,
    numa_root: Path,
) -> Gpu | Excluded:
    total, reserved, _ = _memory(handle)
    name: str = pynvml.nvmlDeviceGetName(handle)
    bus_id = _bus_id(pynvml.nvmlDeviceGetPciInfo(handle).busId)
    capability = _optional(_compute_capability, handle)
    gpu = Gpu(
        uuid=uuid,
        index=index,
        model=name,
        memory_bytes=total,
        pci_bus_id=bus_id,
        reserved_bytes=reserved,
        numa_node=_numa_node(numa_root / bus_id / "numa_node"),
        compute_capability=capability,
    )
    if _optional(_in_mig_mode, handle):
        detail = (
            "the card is in MIG mode, and only whole cards are shared: turn it off with"
            f" `nvidia-smi -i {index} -mig 0`, or leave the card to another device plugin"
        )
        return Excluded(gpu, "mig", detail)
    if min_compute_capability and capability and capability < min_compute_capability:
        detail = (
            f"compute capability {_dotted(capability)} is below {_dotted(min_compute_capability)},"
            " which this way of sharing needs: set VGPU_SHARING=time-slicing to share this card"
        )
        return Excluded(gpu, "compute-capability", detail)
    return gpu


def _unreadable(index: int, uuid: str, error: Exception) -> Excluded:
    """A card that has never said what it is: told, but of no use."""
    detail = f"NVML does not describe the card ({error}): see nvidia-smi and the node's kernel log"
    gpu = Gpu(uuid=uuid, index=index, model="unknown", memory_bytes=0, pci_bus_id="unknown")
    return Excluded(gpu, "error", detail)


def _memory(handle: _Handle) -> tuple[int, int, int]:
    """Total, reserved and used bytes. The first version of the call counts reserved as used."""
    try:
        info = pynvml.nvmlDeviceGetMemoryInfo(handle, version=pynvml.nvmlMemory_v2)
        return int(info.total), int(info.reserved), int(info.used)
    except pynvml.NVMLError as error:
        if error.value not in _NO_MEMORY_V2:
            raise
    info = pynvml.nvmlDeviceGetMemoryInfo(handle)
    return int(info.total), 0, int(info.used)


def _compute_capability(handle: _Handle) -> tuple[int, int]:
    major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
    return int(major), int(minor)


def _in_mig_mode(handle: _Handle) -> bool:
    return bool(pynvml.nvmlDeviceGetMigMode(handle)[0] == pynvml.NVML_DEVICE_MIG_ENABLE)


def _uncorrectable_ecc(handle: _Handle) -> int:
    return int(
        pynvml.nvmlDeviceGetTotalEccErrors(
            handle, pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, pynvml.NVML_VOLATILE_ECC
        )
    )


def _energy(handle: _Handle) -> int:
    """Millijoules since the driver initialised the card."""
    return int(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle))


def _compute_mode(handle: _Handle) -> ComputeMode | None:
    mode = int(pynvml.nvmlDeviceGetComputeMode(handle))
    return ComputeMode(mode) if mode in tuple(ComputeMode) else None


def _remapped_rows(handle: _Handle) -> tuple[int, int, int, int]:
    """Correctable, uncorrectable, whether one is pending, whether one has failed."""
    correctable, uncorrectable, pending, failed = pynvml.nvmlDeviceGetRemappedRows(handle)
    return int(correctable), int(uncorrectable), int(pending), int(failed)


def _recovery_action(handle: _Handle) -> int | None:
    (field,) = pynvml.nvmlDeviceGetFieldValues(handle, [_RECOVERY_ACTION_FIELD])
    # Each field has a result of its own: an older driver does not know this one.
    return int(field.value.uiVal) if field.nvmlReturn == pynvml.NVML_SUCCESS else None


def _running(handle: _Handle, kind: str) -> list[tuple[int, int | None]]:
    """PIDs on a card and the bytes that each has, None where that is not told."""
    # By the name with its version: pynvml turns a missing function of the plain name into an
    # exception that is no NVMLError. Neither every driver nor every pynvml has both.
    for version in ("v3", "v2"):
        ask = getattr(pynvml, f"nvmlDeviceGet{kind}RunningProcesses_{version}", None)
        try:
            if ask is not None:
                return [(int(each.pid), each.usedGpuMemory) for each in ask(handle)]
        except pynvml.NVMLError as error:
            if error.value != pynvml.NVML_ERROR_FUNCTION_NOT_FOUND:
                raise
    raise pynvml.NVMLError(pynvml.NVML_ERROR_FUNCTION_NOT_FOUND)


def _mps_clients(handle: _Handle) -> list[tuple[int, int | None]]:
    """As `_running`, of clients of MPS; none where a card or driver has no such list."""
    try:
        return _running(handle, "MPSCompute")
    except pynvml.NVMLError as error:
        if error.value in _NO_SUCH_LIST:
            return []
        raise


def _optional(ask: Callable[[_Handle], T], handle: _Handle) -> T | None:
    """The answer to a question that not every card or driver answers; that is no fault.

    Raises NVMLError only where the card is gone; other faults show in the calls that every card
    answers.
    """
    try:
        return ask(handle)
    except pynvml.NVMLError as error:
        if error.value in _GONE:
            raise
        return None


def _pointer(handle: _Handle) -> bytes:
    """The value of a handle, which tells it from another: its ctypes object is new every time."""
    value: bytes = bytes(handle)  # type: ignore[call-overload]  # a ctypes pointer is a buffer
    return value


def _bus_id(text: str) -> str:
    """A PCI bus ID as sysfs writes it; NVML's has eight digits of domain and capitals."""
    domain, _, rest = text.lower().partition(":")
    return f"{int(domain, 16):04x}:{rest}"


def _numa_node(path: Path) -> int | None:
    """The node in a sysfs file; -1 there means none."""
    try:
        node = int(path.read_text())
    except (OSError, ValueError):
        return None
    return node if node >= 0 else None


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


# The one setting that is ever changed


def set_compute_mode(uuid: str, mode: ComputeMode) -> bool:
    """Sets who may open a CUDA context on a card; False where the card has no such setting.

    Blocks. Opens NVML for itself. Raises DriverError with what to do. The driver asks for root,
    which in a container is CAP_SYS_ADMIN as well, and forgets the mode with the next boot.
    """
    _open()
    try:
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        pynvml.nvmlDeviceSetComputeMode(handle, int(mode))
    except pynvml.NVMLError as error:
        if error.value == pynvml.NVML_ERROR_NOT_SUPPORTED:
            return False
        help_ = "see nvidia-smi and the node's kernel log"
        if error.value == pynvml.NVML_ERROR_NO_PERMISSION:
            help_ = "run this container as root with the capability SYS_ADMIN"
        raise DriverError(f"compute mode of {uuid} cannot be set ({error}): {help_}") from error
    finally:
        with suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()
    return True


def process_memory(uuid: str) -> dict[int, int]:
    """Bytes of a card that each process has, by its PID on the host; those that NVML tells.

    Blocks. Opens NVML for itself. Raises DriverError.
    """
    _open()
    try:
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        found = _running(handle, "Compute")
    except pynvml.NVMLError as error:
        raise DriverError(f"processes on {uuid} cannot be listed ({error})") from error
    finally:
        with suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()
    return {pid: memory for pid, memory in found if memory is not None}
