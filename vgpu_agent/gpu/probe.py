"""The tasks that watch the cards: driver events as they come, and a probe of every card.

They ask the driver, let `health` judge, and tell the node's state. What became of it is logged
here, once for each change.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import anyio
import anyio.to_thread
from anyio.abc import TaskStatus

from vgpu_agent.errors import DriverError, DriverLibraryError
from vgpu_agent.gpu.driver import GpuDriver, GpuEvent, Reading, Scan, XidEvent
from vgpu_agent.gpu.health import (
    PROVABLE,
    RELAPSE_WINDOW,
    Counters,
    Effect,
    Fact,
    Finding,
    HealthPolicy,
    judge_reading,
    judge_xid,
    recovery_wait,
)
from vgpu_agent.gpu.memory import FaultMemory, Remembered
from vgpu_agent.model.devices import Card, Fault, Reason
from vgpu_agent.model.state import NodeState

log = logging.getLogger(__name__)

XID_RECOVERY_ACTION_CHANGED = 154

CALL_LIMIT = 3.0
"""Seconds after which a call to the driver counts as hung."""


@dataclass(frozen=True, slots=True)
class WatchTiming:
    """The pauses of the watch, in seconds.

    `driver_retry` lies between two looks for a driver that cannot be asked, or that has no card;
    `event_pause` between two looks that events ask for, however many come. A call to the driver
    counts as hung after `call_limit`. `release` is how long all cards are let go of, so that they
    can be reset, and `release_pause` lies between two releases that nobody asked for.
    """

    driver_retry: float = 30.0
    call_limit: float = CALL_LIMIT
    event_pause: float = 0.1
    release: float = 60.0
    release_pause: float = 60.0


@dataclass
class _Track:
    """What the watch remembers of a card between two looks. Times are monotonic."""

    last_bad: float = 0.0
    absent_since: float | None = None
    returned: bool = False
    counters: Counters = Counters()
    ecc_baseline: int | None = None
    falls: deque[float] = field(default_factory=deque)

    def relapses(self, now: float) -> int:
        """How often the card became unhealthy within the window, the first time not counted."""
        while self.falls and now - self.falls[0] > RELAPSE_WINDOW:
            self.falls.popleft()
        return max(0, len(self.falls) - 1)


@dataclass
class HealthWatch:
    """Watches the cards of one driver and owns what has to be remembered for that.

    `clock` is monotonic, `wall_clock` tells the time that people see. `memory` keeps, over a
    restart of the agent, which cards wait for a reset.
    """

    driver: GpuDriver
    state: NodeState
    policy: HealthPolicy
    memory: FaultMemory
    clock: Callable[[], float] = time.monotonic
    wall_clock: Callable[[], float] = time.time
    timing: WatchTiming = WatchTiming()
    _tracks: dict[str, _Track] = field(default_factory=dict)
    _recalled: dict[str, tuple[Remembered, ...]] = field(default_factory=dict)
    _seen_away: set[str] = field(default_factory=set)
    _saved: tuple[Remembered, ...] = ()
    _no_library_since: float | None = None
    _saving: anyio.Lock = field(default_factory=anyio.Lock)
    _wake: anyio.Event = field(default_factory=anyio.Event)
    _asked: anyio.Event = field(default_factory=anyio.Event)
    _early: dict[str, Fault] = field(default_factory=dict)
    _looking: bool = False
    _handles_void: bool = True
    _release_asked: bool = False
    _next_release: float = 0.0

    async def run(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Runs until cancelled; started when the cards were looked at and probed once.

        Raises DriverLibraryError where waiting longer for the driver's library is of no use.
        """
        if not self.policy.enabled:
            log.warning(
                "VGPU_HEALTH_CHECKS=off: no fault of any card will be noticed; pods will be put on"
                " broken cards"
            )
        await self.recall()
        await self.look()
        task_status.started()
        async with anyio.create_task_group() as tasks:
            if self.policy.enabled:
                tasks.start_soon(self._follow_events)
            while True:
                await self._until_next_look()
                if self._release_due():
                    await self._release()
                await self.look()

    async def recall(self) -> None:
        """Reads which cards waited for a reset when the agent ended."""
        recalled = await anyio.to_thread.run_sync(self.memory.load)
        self._saved = recalled
        for each in recalled:
            self._recalled[each.uuid] = (*self._recalled.get(each.uuid, ()), each)

    def release(self) -> None:
        """Asks for all cards to be let go of for a while, so that they can be reset."""
        self._release_asked = True
        self._asked.set()
        self._wake.set()

    async def _until_next_look(self) -> None:
        """Waits for the next turn, or for an event that asks for one."""
        wait, pause = self.policy.interval, self.timing.event_pause
        if not self._tracks:
            wait = max(wait, self.timing.driver_retry)
        if self._no_library_since is not None:
            left = self._no_library_since + self.policy.driver_wait - self.clock()
            wait = min(wait, max(left, pause))
        await anyio.sleep(pause)
        with anyio.move_on_after(wait - pause):
            await self._wake.wait()
        self._wake = anyio.Event()

    # Looks

    async def look(self) -> None:
        """Probes every card by its old handle, then looks at all cards with fresh ones.

        A card that is lost to its handle and there again was initialised anew, as by a reset.
        Everything is asked first and told then, without a pause in between: one update.
        """
        readings: dict[str, Reading | None] = {}
        scan: Scan | None = None
        problem: DriverError | None = None
        if self.policy.enabled:
            readings = await self._probe(tuple(self._tracks))
        if self._handles_void:
            # Lost by a handle that is void anyway says nothing of the card: asked again below.
            readings = {u: r for u, r in readings.items() if r is None or not r.lost}
        if None not in readings.values():
            # A look at all cards would hang where one of them hangs.
            self._looking = True
            scan, problem = await self._scan()
            self._handles_void = scan is None
        if scan is not None and self.policy.enabled:
            unread = [gpu.uuid for gpu in scan.gpus if gpu.uuid not in readings]
            readings |= await self._probe(unread)
        self._tell(scan, problem, readings)
        self._looking = False
        self._early.clear()
        await self._remember()

    async def _probe(self, uuids: Sequence[str]) -> dict[str, Reading | None]:
        """A reading of each card, all at once; None where the call hangs."""
        readings: dict[str, Reading | None] = dict.fromkeys(uuids)

        async def probe(uuid: str) -> None:
            with anyio.move_on_after(self.timing.call_limit):
                readings[uuid] = await self.driver.probe(uuid)

        async with anyio.create_task_group() as tasks:
            for uuid in uuids:
                tasks.start_soon(probe, uuid)
        return readings

    async def _scan(self) -> tuple[Scan | None, DriverError | None]:
        try:
            with anyio.move_on_after(self.timing.call_limit):
                return await self.driver.scan(), None
        except DriverError as error:
            return None, error
        if self._tracks:
            return None, None  # the probes decide
        return None, DriverError(f"the driver does not answer within {self.timing.call_limit:g} s")

    def _tell(
        self,
        scan: Scan | None,
        problem: DriverError | None,
        readings: Mapping[str, Reading | None],
    ) -> None:
        if problem is not None:
            self._driver_failed(problem)
        elif scan is not None:
            self._no_library_since = None
            self._tell_cards(scan)
        for uuid, reading in readings.items():
            if reading is None:
                detail = f"the driver did not answer within {self.timing.call_limit:g} s"
                self._mark([uuid], Finding(Fact.PROBE_TIMEOUT, detail))
        self.state.memory_used(
            {
                uuid: reading.memory_used_bytes
                for uuid, reading in readings.items()
                if reading is not None and reading.memory_used_bytes is not None
            }
        )
        if scan is not None and self.policy.enabled:
            present = {gpu.uuid for gpu in scan.gpus}
            for uuid in list(self._tracks):
                if uuid not in present:
                    self._absent(uuid)
                else:
                    self._present(uuid, readings.get(uuid))
        elif scan is None:
            for uuid, reading in readings.items():
                if reading is not None and not reading.lost and problem is None:
                    self._present(uuid, reading)

    def _driver_failed(self, problem: DriverError) -> None:
        now = self.clock()
        if isinstance(problem, DriverLibraryError):
            if self._no_library_since is None:
                self._no_library_since = now
            if now - self._no_library_since >= self.policy.driver_wait:
                raise problem
        else:
            self._no_library_since = None
        if self.state.driver_failed(str(problem)):
            log.error("no GPU can be used: %s", problem)
        self._mark(None, Finding(Fact.PROBE_FAILED, str(problem)))

    def _tell_cards(self, scan: Scan) -> None:
        before = self.state.snapshot
        self.state.driver_answered(scan.driver_version, scan.gpus, scan.excluded)
        if not before.driver.up:
            log.info("driver %s answers; it sees %d cards", scan.driver_version, len(scan.gpus))
        after = self.state.snapshot
        for card in after.inventory.cards:
            uuid = card.gpu.uuid
            if uuid in self._tracks:
                continue
            self._tracks[uuid] = _Track(returned=uuid in self._seen_away)
            self._seen_away.discard(uuid)
            log.info("%s: %d vGPUs of it", _named(card), card.replicas)
            for note in card.notes:
                log.warning("%s: %s", _named(card), note)
            self.state.card_noted(uuid, (), self.policy.recovery)
            for each in self._recalled.pop(uuid, ()) if self.policy.enabled else ():
                self._tracks[uuid].counters = each.counters
                self._add([uuid], each.fault)
            if uuid in self._early:
                self._add([uuid], self._early.pop(uuid))
        for left in after.excluded:
            if left not in before.excluded:
                log.warning("GPU %s left out: %s", left.gpu.uuid, left.detail)
            self._set_aside(left.gpu.uuid, before.inventory.find(left.gpu.uuid))
        # Whoever waits for a reset and is not there at all is being reset.
        self._seen_away.update(self._recalled.keys() - {left.gpu.uuid for left in after.excluded})

    def _set_aside(self, uuid: str, card: Card | None) -> None:
        """A card is left out from now on: what it waits for is remembered until it is back."""
        track = self._tracks.pop(uuid, None)
        if track is not None and card is not None:
            waiting = tuple(
                Remembered(uuid, fault, track.counters)
                for fault in card.faults
                if fault.until_reset
            )
            if waiting:
                self._recalled[uuid] = waiting

    def _absent(self, uuid: str) -> None:
        track = self._tracks[uuid]
        if track.absent_since is None:
            track.absent_since = self.clock()
        if self.clock() - track.absent_since >= self.policy.lost_for:
            card = self.state.snapshot.inventory.find(uuid)
            del self._tracks[uuid]
            self.state.card_forgotten(uuid)
            if card is not None:
                minutes = self.policy.lost_for / 60
                log.warning("%s: lost for %.0f minutes, no longer listed", _named(card), minutes)
            return
        self._mark([uuid], Finding(Fact.LOST, "the driver does not see it"))

    def _present(self, uuid: str, reading: Reading | None) -> None:
        """Judges a card that is there by what its probe read."""
        track, card = self._tracks[uuid], self.state.snapshot.inventory.find(uuid)
        if reading is None or card is None:
            return
        if track.absent_since is not None:
            track.absent_since, track.returned = None, True
        counters = Counters(reading.energy_millijoules, reading.uncorrectable_ecc)
        anew = reading.lost or track.returned or track.counters.fell(counters)
        if anew:
            track.ecc_baseline = None
        if track.ecc_baseline is None:
            track.ecc_baseline = counters.ecc
        track.returned = False
        track.counters = counters if anew else track.counters.updated(counters)
        # Lost by its old handle, and there: its new handle is probed next time.
        findings = (
            ()
            if reading.lost
            else judge_reading(
                reading, ecc_baseline=track.ecc_baseline, shared_by_mps=self.policy.shared_by_mps
            )
        )
        for each in findings:
            self._mark([uuid], each)
        self._note(card, findings)
        reasons = {each.rule.reason for each in findings} - {None}
        cured = [fault for fault in card.faults if fault.reason not in reasons]
        for_reset = {fault.reason for fault in cured if fault.until_reset}
        if anew:
            self._clear(card, for_reset, "initialised anew")
        elif Reason.RECOVERY_ACTION in for_reset and reading.recovery_action == 0:
            # The driver asked for an action and no longer does: its word, also on an XID.
            self._clear(card, for_reset, "the driver asks for nothing any more")
        if not reading.lost and not reasons and self._proven(track):
            proven = {each.reason for each in cured} - for_reset
            self._clear(card, proven & PROVABLE, "proven good")

    def _proven(self, track: _Track) -> bool:
        return self.clock() - track.last_bad >= self._recovery_wait(track)

    def _recovery_wait(self, track: _Track) -> float:
        return recovery_wait(self.policy.recovery, track.relapses(self.clock()))

    def _note(self, card: Card, findings: Sequence[Finding]) -> None:
        notes = tuple(each.detail for each in findings if each.rule.effect is Effect.TELL)
        wait = self._recovery_wait(self._tracks[card.gpu.uuid])
        if self.state.card_noted(card.gpu.uuid, notes, wait):
            for note in set(notes) - set(card.notes):
                log.warning("%s: %s", _named(card), note)

    # Events

    async def _follow_events(self) -> None:
        while True:
            try:
                await self.take_events()
            except DriverError:
                # The next look tells; asking again at once would only spin.
                await anyio.sleep(self.policy.interval)

    async def take_events(self) -> None:
        """Waits for the driver's next events, and tells them. Raises DriverError."""
        for event in await self.driver.next_events():
            self._event(event)
        await self._remember()

    def _event(self, event: GpuEvent) -> None:
        """Marks at once, and asks for a look, which reads the driver's own word."""
        if not isinstance(event, XidEvent):
            self._wake.set()
            return
        self.state.xid_seen(event.uuid, event.xid)
        finding = judge_xid(event.xid, self.policy.xids)
        where = "a card that the driver cannot tell" if event.uuid is None else f"GPU {event.uuid}"
        if finding.rule.effect is Effect.COUNT:
            log.info("%s: %s, counted", where, finding.detail)
        else:
            self._mark(None if event.uuid is None else [event.uuid], finding)
        if finding.rule.effect is not Effect.COUNT or event.xid == XID_RECOVERY_ACTION_CHANGED:
            self._wake.set()

    # Release

    def _release_due(self) -> bool:
        """Whether it was asked for, or every card of the driver waits for its reset."""
        cards = self.state.snapshot.inventory.cards
        all_wait = all(any(fault.until_reset for fault in card.faults) for card in cards)
        return self._release_asked or (
            bool(cards) and all_wait and self.clock() >= self._next_release
        )

    async def _release(self) -> None:
        """Lets go of NVML for a while: the driver refuses a reset while a client is there."""
        self._asked = anyio.Event()
        asked, self._release_asked = self._release_asked, False
        released = await self.driver.release()
        self._handles_void = True  # closed by us, which says nothing of a reset
        if released:
            seconds = self.timing.release
            self.state.driver_released(self.wall_clock() + seconds)
            log.warning("all GPUs are let go of for %.0f s: they can be reset now", seconds)
            with anyio.move_on_after(seconds):
                await self._asked.wait()  # a request meanwhile gets a full time of its own
            self._asked = anyio.Event()
        self._next_release = self.clock() + self.timing.release_pause
        if released and asked:
            # Whoever asked has reset what had to be reset, and is believed.
            for track in self._tracks.values():
                track.returned = True

    # Changes

    def _mark(self, uuids: Collection[str] | None, finding: Finding) -> None:
        """Tells a finding about those cards, or about all where `uuids` is None."""
        fault = finding.fault(self.wall_clock())
        if fault is not None:
            self._add(uuids, fault)

    def _add(self, uuids: Collection[str] | None, fault: Fault) -> None:
        now = self.clock()
        healthy = {card.gpu.uuid for card in self.state.snapshot.inventory.cards if card.healthy}
        for uuid in uuids or ():
            if uuid not in self._tracks and self._looking:
                self._early[uuid] = fault  # of a card that this look may be about to list
        for uuid, track in self._tracks.items():
            if uuids is None or uuid in uuids:
                track.last_bad = now
        changed = self.state.fault_found(uuids, fault)
        for card in self.state.snapshot.inventory.cards:
            if card.gpu.uuid not in changed:
                continue
            if card.gpu.uuid in healthy and card.gpu.uuid in self._tracks:
                self._tracks[card.gpu.uuid].falls.append(now)
            log.warning(
                "%s: its %d vGPUs are unhealthy: %s. What to do: %s",
                _named(card),
                card.replicas,
                card.fault_text,
                fault.advice,
            )

    def _clear(self, card: Card, reasons: Collection[Reason], why: str) -> None:
        if not self.state.faults_cleared(card.gpu.uuid, reasons):
            return
        left = self.state.snapshot.inventory.find(card.gpu.uuid)
        if left is None or left.healthy:
            log.info("%s: its %d vGPUs are healthy again: %s", _named(card), card.replicas, why)
        else:
            log.info("%s: %s; still unhealthy: %s", _named(card), why, left.fault_text)

    async def _remember(self) -> None:
        """Writes which cards wait for a reset, where that has changed."""
        async with self._saving:
            waiting = [
                Remembered(card.gpu.uuid, fault, self._tracks[card.gpu.uuid].counters)
                for card in self.state.snapshot.inventory.cards
                for fault in card.faults
                if fault.until_reset and card.gpu.uuid in self._tracks
            ]
            # A card that has not been seen yet keeps what is remembered of it.
            waiting += [each for recalled in self._recalled.values() for each in recalled]
            if [each.key for each in waiting] != [each.key for each in self._saved]:
                self._saved = tuple(waiting)
                await anyio.to_thread.run_sync(self.memory.save, self._saved)


def _named(card: Card) -> str:
    return f"GPU {card.gpu.index} ({card.gpu.model}, {card.gpu.uuid})"
