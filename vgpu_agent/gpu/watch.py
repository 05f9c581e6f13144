"""The tasks that watch the GPUs: driver events as they come, and a probe of every GPU.

They ask the driver and hand what it answers to the node, as values; what it means is decided there.
"""

import logging
import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import anyio
from anyio.abc import TaskStatus

from vgpu_agent.errors import DriverError, DriverHangsError
from vgpu_agent.gpu.driver import CALL_LIMIT, GpuDriver
from vgpu_agent.model.devices import Effect, Excluded, Gpu
from vgpu_agent.model.facts import GpuEvent, Reading, Scan, XidEvent
from vgpu_agent.model.health import HealthEvent, Probed, ResetDone
from vgpu_agent.model.node import Node
from vgpu_agent.model.policy import XID_RECOVERY_ACTION_CHANGED, judge_xid
from vgpu_agent.model.snapshot import Driver
from vgpu_agent.threads import in_thread

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Intervals:
    """Seconds. `call_limit`: a call to the driver that takes longer counts as hung.

    `first_look`: a GPU that has not answered by then is not waited for at the start.
    `driver_retry`: between two looks for a driver that cannot be asked, or that has no GPU.
    `event_pause`: between two looks that events ask for, however many come; `list_first`: from an
    event to its look, for the list to go out.
    `release`: for which NVML is closed, so that GPUs can be reset; `release_pause`: between two
    releases that nobody asked for.
    """

    call_limit: float = CALL_LIMIT
    first_look: float = 1.0
    driver_retry: float = 30.0
    event_pause: float = 0.1
    list_first: float = 0.02
    release: float = 60.0
    release_pause: float = 60.0


def _late(gpu: Gpu) -> Excluded:
    return Excluded(gpu, "timeout", "it has not answered its first probe yet")


@dataclass
class GpuWatch:
    """Watches the GPUs of one driver for a node.

    `cdi_names` reads what the host's CDI specs name, in a worker thread; None where that does not
    matter. `clock` is monotonic, `wall_clock` is the time that people see.
    """

    driver: GpuDriver
    node: Node
    cdi_names: Callable[[], frozenset[str]] | None = None
    intervals: Intervals = Intervals()
    clock: Callable[[], float] = time.monotonic
    wall_clock: Callable[[], float] = time.time
    _wake: anyio.Event = field(default_factory=anyio.Event)
    _release_changed: anyio.Event = field(default_factory=anyio.Event)
    _release_until: float | None = None
    _release_asked: float = 0.0
    _next_release: float = 0.0
    _handles_void: bool = True
    _useless_since: float | None = None
    _reopen_at: float = 0.0

    async def run(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Runs until cancelled; started when the GPUs were looked at and probed once.

        Raises DriverError where waiting longer for a GPU that can be used is of no use.
        """
        if not self.node.rules.health.health_checks:
            log.warning(
                "VGPU_HEALTH_CHECKS=off: no fault of any GPU will be noticed; pods will be put on"
                " broken GPUs"
            )
        await self.look(patience=self.intervals.first_look)
        task_status.started()
        async with anyio.create_task_group() as tasks:
            if self.node.rules.health.health_checks:
                tasks.start_soon(self._follow_events)
            while True:
                await self._until_next_look()
                if self._release_until is not None or self._release_due():
                    await self._release()
                await self.look()

    def release(self, seconds: float | None = None) -> None:
        """Asks for NVML to be closed, so that GPUs can be reset: for so long, from now on."""
        now = self.clock()
        if self._release_until is None:
            self._release_asked = now
        until = now + (self.intervals.release if seconds is None else seconds)
        self._release_until = max(until, self._release_until or until)
        self._release_changed.set()
        self._wake.set()

    def reset_done(self, uuid: str | None = None) -> None:
        """The operator says that a GPU was reset, or all that wait for it: ends a release.

        The probe that follows ends what a reset ends, and what still stands stays.
        """
        waiting = [u for u, health in self.node.snapshot.health.items() if health.waits_for_reset]
        self.node.gpus_happened(waiting if uuid is None else [uuid], ResetDone())
        self._release_until = None
        self._release_changed.set()
        self._wake.set()

    async def _until_next_look(self) -> None:
        """Waits for the next turn, or for an event that asks for one."""
        rules, intervals = self.node.rules.health, self.intervals
        wait = rules.health_interval
        if not self.node.snapshot.gpus:
            wait = max(wait, intervals.driver_retry)
        if self._useless_since is not None:
            left = self._useless_since + rules.driver_wait - self.clock()
            wait = min(wait, max(left, intervals.event_pause))
        soonest = anyio.current_time() + intervals.event_pause
        with anyio.move_on_after(wait):
            await self._wake.wait()
            await anyio.sleep(max(intervals.list_first, soonest - anyio.current_time()))
        self._wake = anyio.Event()

    # Looks

    async def look(self, patience: float = math.inf) -> None:
        """Probes every GPU by its old handle, then looks at all GPUs with fresh ones.

        A GPU that is lost to its handle and there again is probed by its new one: what a reset ends
        is ended by what is read after it. All of it becomes one change of the node. For what has
        not answered after `patience` seconds the next look waits, which is at once.
        """
        checks = self.node.rules.health.health_checks
        limit, readings = self.intervals.call_limit, dict[str, Reading]()
        if checks:
            readings = await self.driver.probe(self.node.snapshot.present, limit)
        if self._handles_void:
            # Lost by a handle that is void anyway says nothing of the GPU: asked again below.
            readings = {uuid: each for uuid, each in readings.items() if not each.lost}
        scan: Scan | None = None
        problem: DriverError | None = None
        names: frozenset[str] | None = None
        try:
            scan = await self.driver.scan(limit, patience)
        except DriverError as error:
            problem = error
        self._handles_void = scan is None
        lost = {uuid for uuid, each in readings.items() if each.lost}
        if scan is not None:
            lost |= scan.returned
        if scan is not None and checks:
            there = {gpu.uuid for gpu in scan.gpus}
            there -= readings.keys() - lost
            readings |= await self.driver.probe(there, limit, patience)
            late = [gpu for gpu in scan.gpus if gpu.uuid not in readings]
            scan = replace(
                scan,
                gpus=tuple(gpu for gpu in scan.gpus if gpu not in late),
                undescribed=(*scan.undescribed, *map(_late, late)),
            )
        if self.cdi_names is not None:
            names = await in_thread(self.cdi_names)
        self.node.driver_looked(
            self._driver(scan, problem, readings),
            scan,
            self._events(scan, problem, readings, lost) if checks else {},
            cdi_names=names,
        )
        if patience < math.inf and scan is not None:
            if any(each.reason == "timeout" for each in scan.undescribed):
                self._wake.set()
        else:
            await self._judge_driver(scan, problem, readings)

    def _events(
        self,
        scan: Scan | None,
        problem: DriverError | None,
        readings: Mapping[str, Reading],
        lost: Collection[str],
    ) -> Mapping[str, Sequence[HealthEvent]]:
        """What was read of each GPU, and then what else was found: neither hides the other."""
        events: dict[str, list[HealthEvent]] = {
            uuid: [Probed(reading, new_handle=uuid in lost and not reading.lost)]
            for uuid, reading in readings.items()
        }
        found = {} if scan is None else scan.silent
        also = {
            uuid: Reading.silent(what, self.intervals.call_limit) for uuid, what in found.items()
        }
        if isinstance(problem, DriverHangsError):
            # Nothing is known of a GPU that has no handle; the others answer by theirs.
            unread = self.node.snapshot.present - readings.keys()
            also = dict.fromkeys(unread, Reading(hung=True, error=str(problem)))
        elif problem is not None:
            also = dict.fromkeys(self.node.snapshot.gpus, Reading(error=str(problem)))
        for uuid, reading in also.items():
            events.setdefault(uuid, []).append(Probed(reading))
        return events

    def _driver(
        self, scan: Scan | None, problem: DriverError | None, readings: Mapping[str, Reading]
    ) -> Driver:
        if scan is not None:
            # Where any GPU answers, the probes say what is wrong.
            hangs = readings and all(each.hung for each in readings.values())
            why = next(iter(readings.values())).error if hangs else None
            return Driver(scan.driver_version, why)
        return Driver(self.node.snapshot.driver.version, str(problem))

    async def _judge_driver(
        self, scan: Scan | None, problem: DriverError | None, readings: Mapping[str, Reading]
    ) -> None:
        """Where no GPU is of use NVML is opened again, and in the end so is the container.

        A container is given the driver's library and device files when it is created. Raises
        DriverError after `driver_wait` seconds without one GPU that answers; a node that has none
        is no reason.
        """
        rules, now = self.node.rules.health, self.clock()
        answers = any(each.answered for each in readings.values())
        if problem is not None and not isinstance(problem, DriverHangsError):
            answers = False  # by handles that are void now
        if scan is not None and not (scan.undescribed or scan.lost or self.node.snapshot.gpus):
            answers = True  # there is none to answer
        if answers or (scan is not None and not rules.health_checks):
            self._useless_since = None
            return
        if self._useless_since is None:
            self._useless_since = self._reopen_at = now
        if now - self._useless_since >= rules.driver_wait:
            raise problem or DriverError(
                f"no GPU has answered for {rules.driver_wait:g} s; ending, since a new container is"
                " given fresh device files. See nvidia-smi and the node's kernel log"
            )
        if scan is not None and now >= self._reopen_at:
            self._reopen_at = now + self.intervals.driver_retry
            self._handles_void = await self.driver.release() or self._handles_void

    # Events

    async def _follow_events(self) -> None:
        while True:
            try:
                await self.take_events()
            except DriverError:
                # The next look says why; asking again at once would only spin.
                await anyio.sleep(self.node.rules.health.health_interval)

    async def take_events(self) -> None:
        """Waits for the driver's next events, and hands them to the node. Raises DriverError.

        An event that may mean something for a GPU asks for a look, which reads the driver's word.
        """
        events = await self.driver.next_events()
        self.node.driver_events(events)
        if any(map(self._asks_for_a_look, events)):
            self._wake.set()

    def _asks_for_a_look(self, event: GpuEvent) -> bool:
        if not isinstance(event, XidEvent) or event.xid == XID_RECOVERY_ACTION_CHANGED:
            return True
        return judge_xid(event.xid, self.node.rules.health).rule.effect is not Effect.COUNT

    # Release

    def _release_due(self) -> bool:
        """Whether every GPU of the driver waits for its reset, and the last time is long ago."""
        gpus = self.node.snapshot.inventory.gpus
        all_wait = all(any(fault.until_reset for fault in shared.faults) for shared in gpus)
        if not (gpus and all_wait and self.clock() >= self._next_release):
            return False
        self._release_asked = self.clock()
        self._release_until = self._release_asked + self.intervals.release
        return True

    async def _release(self) -> None:
        """Closes NVML for a while: the driver refuses a reset while a client is there.

        That proves nothing: the driver, a counter or the operator says that a GPU was reset. A
        request that comes meanwhile makes it longer.
        """
        released = await self.driver.release()
        self._handles_void = True  # closed by us, which says nothing of a reset
        if self._release_until is not None:
            # A look that was under way is no part of it.
            self._release_until += self.clock() - self._release_asked
        while released and (until := self._release_until) is not None and until > self.clock():
            left = until - self.clock()
            self.node.driver_released(self.wall_clock() + left)
            self._release_changed = anyio.Event()
            with anyio.move_on_after(left):
                await self._release_changed.wait()
        self._release_until = self._useless_since = None
        self._next_release = self.clock() + self.intervals.release_pause
