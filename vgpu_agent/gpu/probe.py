"""The tasks that watch the cards: driver events as they come, and a probe of every card.

They ask the driver, let `health` judge, and tell the node's state. What became of it is logged
here, once for each change.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import anyio
from anyio.abc import TaskStatus

from vgpu_agent.errors import DriverError
from vgpu_agent.gpu.driver import GpuDriver, GpuEvent, Reading, Scan, XidEvent
from vgpu_agent.gpu.health import Effect, judge_reading, judge_xid
from vgpu_agent.model.devices import Card, Fault, Reason
from vgpu_agent.model.state import NodeState

log = logging.getLogger(__name__)

DRIVER_RETRY = 30.0
"""Seconds between two looks for a driver that cannot be asked, or that has no card."""


@dataclass
class HealthWatch:
    """Watches the cards of one driver. Owns the recovery clocks and which cards were away.

    `interval` seconds lie between two probes; `recovery` seconds of passed probes prove a card
    good. `clock` is monotonic, `wall_clock` tells the time that people see.
    """

    driver: GpuDriver
    state: NodeState
    interval: float
    recovery: float
    clock: Callable[[], float] = time.monotonic
    wall_clock: Callable[[], float] = time.time
    _last_bad: dict[str, float] = field(default_factory=dict)
    _absent: set[str] = field(default_factory=set)

    async def run(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Runs until cancelled; started when the cards were looked at and probed once."""
        await self.look()
        task_status.started()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._follow_events)
            while True:
                snapshot = self.state.snapshot
                idle = not snapshot.driver.up or not snapshot.inventory.cards
                await anyio.sleep(max(self.interval, DRIVER_RETRY) if idle else self.interval)
                await self.look()

    # Probes

    async def look(self) -> None:
        """Probes every card by its old handle, then looks at all cards with fresh ones.

        A card that is lost to its handle and there again was enumerated anew, as by a reset.
        """
        known = {card.gpu.uuid for card in self.state.snapshot.inventory.cards}
        readings = {uuid: await self.driver.probe(uuid) for uuid in known}
        try:
            scan = await self.driver.scan()
        except DriverError as error:
            self._driver_failed(str(error))
            return
        self._tell_cards(scan)
        for gpu in scan.gpus:
            if gpu.uuid not in readings:
                readings[gpu.uuid] = await self.driver.probe(gpu.uuid)
        present = {gpu.uuid for gpu in scan.gpus}
        for uuid, reading in readings.items():
            there = uuid in present
            self._judge(uuid, reading, there=there, returned=there and uuid in self._absent)
        self._absent = known.difference(present)

    def _driver_failed(self, error: str) -> None:
        if self.state.driver_failed(error):
            log.error("no GPU can be used: %s", error)
        self._mark(None, Fault(Reason.PROBE, self.wall_clock(), error))

    def _tell_cards(self, scan: Scan) -> None:
        before = self.state.snapshot
        if not self.state.driver_answered(scan.driver_version, scan.gpus, scan.excluded):
            return
        if not before.driver.up:
            log.info("driver %s answers; it sees %d cards", scan.driver_version, len(scan.gpus))
        for card in self.state.snapshot.inventory.cards:
            if before.inventory.find(card.gpu.uuid) is None:
                log.info("%s: %d vGPUs of it", _named(card), card.replicas)
        for excluded in scan.excluded:
            if excluded not in before.excluded:
                log.warning("GPU %s left out: %s", excluded.gpu.uuid, excluded.detail)

    def _judge(self, uuid: str, reading: Reading, *, there: bool, returned: bool) -> None:
        card = self.state.snapshot.inventory.find(uuid)
        if card is None:
            return  # neither seen before nor now
        if not there:
            self._mark(uuid, Fault(Reason.LOST, self.wall_clock(), "the driver does not see it"))
            return
        if reading.lost or returned:
            # Whatever only a reset can heal is healed; its new handle is probed next time.
            reset = {fault.reason for fault in card.faults if fault.until_reset}
            self._clear(card, reset, "enumerated again")
            return
        fault = judge_reading(reading, self.wall_clock())
        if fault is not None:
            self._mark(uuid, fault)
            return
        if self.clock() - self._last_bad.get(uuid, self.clock()) >= self.recovery:
            self._clear(
                card,
                {fault.reason for fault in card.faults if not fault.until_reset},
                "proven good",
            )

    # Events

    async def _follow_events(self) -> None:
        while True:
            try:
                events = await self.driver.next_events()
            except DriverError as error:
                self._driver_failed(str(error))
                await anyio.sleep(self.interval)
                continue
            for event in events:
                self._event(event)

    def _event(self, event: GpuEvent) -> None:
        if not isinstance(event, XidEvent):
            return
        self.state.xid_seen(event.uuid, event.xid)
        verdict = judge_xid(event.xid)
        if verdict.effect is Effect.COUNT:
            log.info("GPU %s: %s, counted", event.uuid or "unknown", verdict.detail)
            return
        until_reset = verdict.effect is Effect.UNTIL_RESET
        self._mark(event.uuid, Fault(Reason.XID, self.wall_clock(), verdict.detail, until_reset))

    # Changes

    def _mark(self, uuid: str | None, fault: Fault) -> None:
        """Marks one card, or all where `uuid` is None."""
        for card in self.state.snapshot.inventory.cards:
            if uuid in (None, card.gpu.uuid):
                self._last_bad[card.gpu.uuid] = self.clock()
        changed = self.state.fault_found(None if uuid is None else {uuid}, fault)
        for card in self.state.snapshot.inventory.cards:
            if card.gpu.uuid in changed:
                count, why = card.replicas, card.fault_text
                log.warning("%s: its %d vGPUs are unhealthy: %s", _named(card), count, why)

    def _clear(self, card: Card, reasons: set[Reason], why: str) -> None:
        if not self.state.faults_cleared(card.gpu.uuid, reasons):
            return
        if all(fault.reason in reasons for fault in card.faults):
            log.info("%s: its %d vGPUs are healthy again: %s", _named(card), card.replicas, why)


def _named(card: Card) -> str:
    return f"GPU {card.gpu.index} ({card.gpu.model}, {card.gpu.uuid})"
