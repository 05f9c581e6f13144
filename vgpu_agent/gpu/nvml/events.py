"""The driver's events: for which GPUs they are asked for, and what has come. Everything blocks."""

import math
from collections import deque
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace

import pynvml

from vgpu_agent.gpu.nvml import calls
from vgpu_agent.gpu.nvml.calls import RECOVERY_ACTION_EVENT, XID_EVENT, Beat, EventSet, Handle
from vgpu_agent.model.facts import GpuEvent, RecoveryActionChanged, XidEvent

# A thread that waits cannot be interrupted, so it waits in slices: NVML can be closed between two.
# Each costs some 0.15 ms of CPU. A GPU that came back has no events until the slice is over.
SLICE_SECONDS = 0.5

WAIT_RETRY_MIN = 0.15
WAIT_RETRY_MAX = 1.0
"""Seconds that waiting for events is put off: there are none of any GPU meanwhile."""

RETRY_MAX = 60.0
"""Seconds; most that the registration of a GPU is put off."""

_FIRST_RETRY = 1.0
_AT_ONCE = 64


@dataclass(frozen=True, slots=True)
class _Retry:
    """What failed, when it is tried again (monotonic), and for how many seconds it was put off.

    `behind`: another call to the GPU does not return, so it could not be asked for.
    """

    why: str
    at: float
    pause: float
    behind: bool = False


class Events:
    """One set of events, at which GPUs are registered one by one.

    `wait` runs in a lane of its own, and `register` in that of its GPU, never while the set is
    waited for unless it hangs. The caller sees to it that NVML stays open meanwhile.
    """

    def __init__(self, monotonic: Callable[[], float]) -> None:
        self._monotonic = monotonic
        self._set: EventSet | None = None
        self._registered: dict[bytes, str] = {}
        self._registering: set[str] = set()
        self._retries: dict[str, _Retry] = {}
        self._wait_retry: _Retry | None = None
        # Kept here, not returned by `wait`: what a thread finds whose caller has left is not lost.
        self._arrived: deque[GpuEvent] = deque()

    @property
    def arrived(self) -> bool:
        """Whether there is something to take."""
        return bool(self._arrived)

    @property
    def registered(self) -> bool:
        """Whether there is something to wait for."""
        return bool(self._registered)

    def missing(self, uuid: str) -> str | None:
        """Why the driver reports no events of a GPU; None where it does."""
        retry = self._wait_retry or self._retries.get(uuid)
        return None if retry is None else retry.why

    def take(self) -> tuple[GpuEvent, ...]:
        """The events that were collected, each once. Called on the loop; does not block."""
        return tuple(self._arrived.popleft() for _ in range(len(self._arrived)))

    def wait(self, handles: Mapping[str, Handle]) -> tuple[str, ...]:
        """Collects what happens within a slice, unless GPUs are to be registered first: those."""
        gpus = {calls.pointer(handle): uuid for uuid, handle in handles.items()}
        if not self._registered.items() <= gpus.items():
            # What the old set still holds would be lost with it.
            self._collect(seconds=0)
            self._drop_set()
        due = self._due(handles.keys() - self._registered.values())
        if not due:
            self._collect(seconds=SLICE_SECONDS)
        return due

    def _due(self, missing: Collection[str]) -> tuple[str, ...]:
        now = self._monotonic()
        due = tuple(u for u in missing if u not in self._retries or self._retries[u].at <= now)
        if due and self._set is None:
            if self._wait_retry is not None and now < self._wait_retry.at:
                return ()
            try:
                self._set = EventSet(pynvml.nvmlEventSetCreate())
            except pynvml.NVMLError as error:
                self.wait_failed(f"no set of events can be made: {error}")
                return ()
        return due

    def register(self, uuid: str, handle: Handle, beat: Beat) -> None:
        """Asks for the events that a GPU has; what fails is tried again, ever less often."""
        event_set = self._set
        if event_set is None:
            return
        self._registering.add(uuid)
        try:
            beat("event types")
            types: int = pynvml.nvmlDeviceGetSupportedEventTypes(handle)
            types &= XID_EVENT | RECOVERY_ACTION_EVENT
            if types:
                beat("registration of events")
                pynvml.nvmlDeviceRegisterEvents(handle, types, event_set)
        except pynvml.NVMLError as error:
            self.not_registered(uuid, str(error), final=error.value in calls.NOT_OFFERED)
            return
        finally:
            self._registering.discard(uuid)
        if types and event_set is self._set:
            self._registered[calls.pointer(handle)] = uuid
        if types & XID_EVENT:
            self._retries.pop(uuid, None)
        else:
            self.not_registered(uuid, "it has none", final=True)

    def not_registered(self, uuid: str, why: str, *, final: bool = False) -> None:
        """A GPU has no events for now; `final`: it never will have."""
        first = math.inf if final else _FIRST_RETRY
        self._retries[uuid] = self._retry(self._retries.get(uuid), why, first, RETRY_MAX)

    def hangs(self, uuid: str, doing: str) -> None:
        """A GPU cannot be asked for its events, as `doing` does not return."""
        self.not_registered(uuid, f"the driver does not answer: {doing}")
        self._retries[uuid] = replace(self._retries[uuid], behind=True)

    def answers(self, uuid: str) -> None:
        """A GPU answers its probe: what another call held up is tried at once."""
        retry = self._retries.get(uuid)
        if retry is not None and retry.behind:
            self._retries[uuid] = _Retry(retry.why, self._monotonic(), 0)

    def wait_failed(self, why: str) -> None:
        """There are no events of any GPU for now."""
        self._wait_retry = self._retry(self._wait_retry, why, WAIT_RETRY_MIN, WAIT_RETRY_MAX)

    def _retry(self, before: _Retry | None, why: str, first: float, most: float) -> _Retry:
        pause = first if before is None else max(first, min(2 * before.pause, most))
        return _Retry(why, self._monotonic() + pause, pause)

    def _collect(self, *, seconds: float) -> None:
        """Takes what the event set has, waiting so long if it is nothing."""
        try:
            while self._registered and len(self._arrived) < _AT_ONCE:
                timeout = 0 if self._arrived else round(seconds * 1000)
                data = pynvml.nvmlEventSetWait_v2(self._set, timeout)
                self._wait_retry = None
                uuid = self._uuid_of(Handle(data.device))
                if data.eventType == XID_EVENT:
                    self._arrived.append(XidEvent(uuid, int(data.eventData)))
                elif data.eventType == RECOVERY_ACTION_EVENT:
                    self._arrived.append(RecoveryActionChanged(uuid))
        except pynvml.NVMLError as error:
            if error.value == pynvml.NVML_ERROR_TIMEOUT:
                self._wait_retry = None
                return
            self._drop_set()  # a set with a lost GPU in it may never work again
            self.wait_failed(f"the wait for events fails: {error}")

    def _uuid_of(self, device: Handle) -> str | None:
        """The GPU of an event. A GPU that falls off the bus is known only by its handle."""
        known = self._registered.get(calls.pointer(device))
        if known is not None:
            return known
        try:
            return calls.uuid(device)
        except pynvml.NVMLError:
            return None

    def _drop_set(self) -> None:
        # Under a registration that hangs its memory stays.
        if self._set is not None and not self._registering:
            with suppress(pynvml.NVMLError):
                pynvml.nvmlEventSetFree(self._set)
        self._set = None
        self._registered = {}

    def close(self) -> None:
        """Gives the set back, before NVML is closed."""
        self._drop_set()
        self._retries.clear()
