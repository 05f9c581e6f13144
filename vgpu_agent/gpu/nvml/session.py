"""NVML while it is open, as the worker threads see it. Everything here blocks."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import pynvml

from vgpu_agent.errors import DriverError
from vgpu_agent.gpu.nvml import calls, limits
from vgpu_agent.gpu.nvml.calls import GONE, Asked, Beat, Handle
from vgpu_agent.gpu.nvml.events import SLICE_SECONDS, Events
from vgpu_agent.gpu.nvml.lanes import Gate
from vgpu_agent.model.devices import Excluded, Gpu
from vgpu_agent.model.facts import EVENTS, Reading, Scan
from vgpu_agent.model.holders import GpuProcess
from vgpu_agent.model.limits import MemoryLimit

T = TypeVar("T")

UNKNOWN = "the driver does not know the GPU now"
DOUBLED = "several GPUs have this UUID"

CLOSE_SECONDS = 1.0
"""A wait for events is out after a slice."""

LEAVE_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class Found:
    """A GPU of the last scan and its handle, and why it is not known what it is, if it is not.

    `returned`: the handle of the scan before was lost.
    """

    handle: Handle
    gpu: Gpu
    problem: Excluded | None = None
    returned: bool = False


def _is_gone(error: Exception) -> bool:
    return isinstance(error, pynvml.NVMLError) and error.value in GONE


STALE = GONE | {pynvml.NVML_ERROR_INVALID_ARGUMENT}
"""What a handle of before a reset answers."""


def _is_lost(gpu: Asked) -> bool:
    try:
        gpu.must(calls.memory)
    except Exception as error:  # noqa: BLE001 - another one says nothing of the handle
        return isinstance(error, pynvml.NVMLError) and error.value in STALE
    return False


Looked = Found | Excluded


class Session:
    """NVML while it is open, as the worker threads see it. All methods block.

    The threads own it, not the loop, so that a call whose caller has left still ends in order.
    `open` and `close` run in one lane, `wait` in another, `look`, `probe` and `register` in one of
    each GPU, `processes`, `memory_limits` and `limit_memory` in another. What they share is
    replaced as a whole or by single steps, and `close` is alone: NVML crashes if it is shut down,
    or an event set freed, under a thread that is inside.
    """

    def __init__(
        self,
        *,
        describe: Callable[[int, str, Asked], Gpu],
        proc_root: Path,
        reopen_seconds: float,
        wait_seconds: float,
        monotonic: Callable[[], float],
    ) -> None:
        self._describe = describe
        self._proc_root = proc_root
        self._reopen_seconds = reopen_seconds
        self._slices = math.ceil(wait_seconds / SLICE_SECONDS)
        self._monotonic = monotonic
        self._gate = Gate()
        self._opened_at: float | None = None
        self._listed_when_opened: int | None = None
        self._found: dict[str, Found] = {}
        self._known: dict[str, Gpu] = {}
        self._doubled: frozenset[str] = frozenset()
        self.events = Events(monotonic)

    @property
    def is_open(self) -> bool:
        """Whether NVML is open."""
        return self._opened_at is not None

    # Asking

    def open(self) -> tuple[str, int]:
        """The driver's version and how many GPUs it counts; opens NVML if need be.

        Raises DriverError.
        """
        if self._opened_at is not None and self._is_outdated(self._opened_at):
            self.close()
        if self._opened_at is None:
            calls.open_nvml()
            self._opened_at = self._monotonic()
            self._listed_when_opened = calls.listed(self._proc_root)
        try:
            return calls.driver_version(), calls.count()
        except Exception as error:
            self.close()
            raise DriverError(f"NVML does not list its GPUs: {error}") from error

    def _is_outdated(self, opened_at: float) -> bool:
        """Whether GPUs came or went since NVML was opened; one that is lost stays in the list."""
        if self._monotonic() - opened_at < self._reopen_seconds:
            return False
        listed = calls.listed(self._proc_root)
        if self._listed_when_opened is None:
            self._listed_when_opened = listed
        return listed is not None and listed != self._listed_when_opened

    def look(self, index: int, beat: Beat) -> Looked:
        """The GPU of that index, or why nothing is known of it, or that a known one is lost."""
        with self._gate.shared():
            return self._look(index, beat)

    def _look(self, index: int, beat: Beat) -> Looked:
        # Asked here, and not only by probes, so that no initialization of it falls in between.
        before = self._place(index)
        returned = before is not None and _is_lost(Asked(before.handle, beat))
        try:
            beat("handle")
            handle = Handle(pynvml.nvmlDeviceGetHandleByIndex(index))
            uuid = Asked(handle, beat).must(calls.uuid)
        except Exception as error:  # noqa: BLE001 - whatever one GPU answers concerns no other
            known = [gpu for gpu in self._known.values() if gpu.index == index]
            if not known:
                return calls.unreadable(index, "", error)
            # An odd error is not a GPU that went away: what was known of the place stays.
            stays = before is not None and not _is_gone(error)
            return before if before is not None and stays else calls.lost(known[-1], error)
        try:
            gpu = self._describe(index, uuid, Asked(handle, beat))
            return Found(handle, gpu, returned=returned)
        except Exception as error:  # noqa: BLE001 - whatever one GPU answers concerns no other
            if _is_gone(error) and uuid in self._known:
                return calls.lost(self._known[uuid], error)
            # One failing call makes no GPU vanish that was known: its probe says what is wrong.
            if uuid in self._known:
                return Found(handle, self._known[uuid], returned=returned)
            unreadable = calls.unreadable(index, uuid, error)
            return Found(handle, unreadable.gpu, unreadable)

    def _place(self, index: int) -> Found | None:
        """What the last scan found at that index."""
        found = (each for each in self._found.values() if each.gpu.index == index)
        return next((replace(each, returned=False) for each in found), None)

    def index_of(self, uuid: str) -> int | None:
        """The index of a GPU of the last scan."""
        found = self._found.get(uuid)
        return None if found is None else found.gpu.index

    def scanned(self, version: str, looked: Mapping[int, Looked], hung: Mapping[int, str]) -> Scan:
        """Takes what was found at each index as the last scan; called on the loop.

        `hung` says of an index what it did not answer: a GPU that is known there stays.
        """
        found = [each for each in looked.values() if isinstance(each, Found)]
        uuids = {each.gpu.uuid for each in found}
        problems, lost, silent = list[Excluded](), list[Excluded](), dict[str, str]()
        for index, each in looked.items():
            if isinstance(each, Excluded) and each.reason == calls.LOST and each.gpu.uuid in uuids:
                # It has another index now: which one is lost here is not known.
                problems.append(calls.nameless(index, each.detail))
            elif isinstance(each, Excluded):
                (lost if each.reason == calls.LOST else problems).append(each)
        for index, doing in hung.items():
            place = self._place(index)
            if place is not None:
                found.append(place)
                silent[place.gpu.uuid] = doing
            elif not any(gpu.index == index for gpu in self._known.values()):
                problems.append(calls.silent(index, doing))
        found.sort(key=lambda each: each.gpu.index)
        often = Counter(each.gpu.uuid for each in found)
        self._found = {each.gpu.uuid: each for each in found if often[each.gpu.uuid] == 1}
        self._doubled = frozenset(uuid for uuid, times in often.items() if times > 1)
        problems += [each.problem for each in self._found.values() if each.problem is not None]
        problems += [
            Excluded(each.gpu, "duplicate", DOUBLED)
            for each in found
            if each.gpu.uuid in self._doubled
        ]
        described = {uuid: each.gpu for uuid, each in self._found.items() if not each.problem}
        before = {uuid: gpu for uuid, gpu in self._known.items() if uuid not in described}
        self._known = before | described  # the newest comes last
        gpus = tuple(each.gpu for each in self._found.values() if each.problem is None)
        returned = frozenset(each.gpu.uuid for each in self._found.values() if each.returned)
        return Scan(version, gpus, tuple(problems), silent, returned, tuple(lost))

    def absent(self, uuid: str) -> Reading:
        """Of a GPU that the last scan did not find as one of its own."""
        return Reading(error=DOUBLED) if uuid in self._doubled else Reading(lost=True)

    def probe(self, uuid: str, beat: Beat = lambda _: None) -> Reading:
        """Asks a GPU of the last scan how it is; another one is lost."""
        with self._gate.shared():
            found = self._found.get(uuid)
            if found is None:
                return self.absent(uuid)
            try:
                return self._probe(Asked(found.handle, beat), uuid)
            except Exception as error:  # noqa: BLE001 - an answer that cannot be is a fault of its GPU
                if _is_gone(error):
                    return Reading(lost=True)
                return Reading(error=f"{type(error).__name__}: {error}")

    def _probe(self, gpu: Asked, uuid: str) -> Reading:
        try:
            used = gpu.must(calls.memory)[2]
            if used is None:
                gpu.must(calls.uuid)  # which every GPU answers
        except pynvml.NVMLError as error:
            if error.value in STALE:
                return Reading(lost=True)
            return Reading(error=f"nvmlDeviceGetMemoryInfo: {error}")
        self.events.answers(uuid)
        missing = {}
        if (why := self.events.missing(uuid)) is not None:
            missing[EVENTS] = why

        def ask(question: Callable[[Handle], T]) -> T | None:
            try:
                return gpu.may(question)
            except pynvml.NVMLError as error:
                if error.value in GONE:
                    raise
                missing[calls.subject(question)] = str(error)
                return None

        rows = ask(calls.remapped_rows)
        return Reading(
            uncorrectable_ecc=ask(calls.ecc_errors),
            remap_failed=None if rows is None else rows[3] != 0,
            remap_pending=None if rows is None else rows[2] != 0,
            recovery_action=ask(calls.recovery_action),
            compute_mode=ask(calls.compute_mode),
            memory_used_bytes=used,
            energy_millijoules=ask(calls.energy),
            missing=missing,
        )

    def processes(self, uuid: str) -> tuple[GpuProcess, ...] | None:
        """The processes on a GPU of the last scan; None where it does not say."""
        with self._gate.shared():
            found = self._found.get(uuid)
            if found is None:
                return None
            try:
                listed = calls.running(found.handle, "Compute") + calls.mps_clients(found.handle)
            except Exception:  # noqa: BLE001 - whatever one GPU answers concerns no other
                return None  # half of the truth would look like all of it
        memory: dict[int, int | None] = {}
        for pid, used in listed:
            before = memory.get(pid)
            memory[pid] = used if before is None else max(before, used or 0)
        return tuple(GpuProcess(pid, memory[pid]) for pid in sorted(memory))

    def memory_limits(
        self, uuid: str, cgroups: Sequence[str], beat: Beat
    ) -> dict[str, MemoryLimit | str]:
        """By path, what the driver has on a GPU of the last scan; empty for a lost one."""
        answers: dict[str, MemoryLimit | str] = {}
        for cgroup in cgroups:  # each lets NVML be closed before it
            with self._gate.shared():
                found = self._found.get(uuid)
                if found is None:
                    return {}
                beat("memory limits")
                try:
                    answers[cgroup] = limits.memory_limit(found.handle, cgroup)
                except pynvml.NVMLError:
                    return {}
        return answers

    def limit_memory(
        self, uuid: str, cgroup: str, hard: int | None, soft: int, beat: Beat
    ) -> str | None:
        """Sets the limits of a cgroup on a GPU of the last scan; why not, where it was not."""
        with self._gate.shared():
            found = self._found.get(uuid)
            if found is None:
                return UNKNOWN
            beat("memory limits")
            try:
                return limits.limit_memory(found.handle, cgroup, hard, soft)
            except pynvml.NVMLError as error:
                return f"{UNKNOWN} ({error})"

    # Waiting

    def wait(self, beat: Beat) -> tuple[str, ...]:
        """Waits until there are events or GPUs to be registered, which it names, or for a while.

        Between two slices NVML can be closed. See `Events.wait`.
        """
        for _ in range(self._slices):
            with self._gate.shared():
                beat("the wait for events")
                found = (each for each in self._found.values() if each.problem is None)
                due = self.events.wait({each.gpu.uuid: each.handle for each in found})
            if due or self.events.arrived or not self.events.registered:
                return due
        return ()

    def register(self, uuid: str, beat: Beat) -> None:
        """Asks for the events of a GPU of the last scan."""
        with self._gate.shared():
            found = self._found.get(uuid)
            if found is not None:
                self.events.register(uuid, found.handle, beat)

    def leave(self) -> None:
        """Closes NVML where nobody is inside, and ends the wait for events within a slice.

        A wait under which NVML stays open is no harm: the kernel takes back what a process had.
        """
        self._found = {}
        self.close(LEAVE_SECONDS)

    def close(self, patience: float = CLOSE_SECONDS) -> None:
        """Closes NVML; it stays open under a call that hangs."""
        with self._gate.alone(patience) as alone:
            if not alone or self._opened_at is None:
                return  # under a call that hangs it stays open
            self._found = {}
            self.events.close()
            with suppress(pynvml.NVMLError):
                pynvml.nvmlShutdown()
            self._opened_at = None
