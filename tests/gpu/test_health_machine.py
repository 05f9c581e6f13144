"""Random faults, heals, resets and restarts: the kubelet's list is always what a simple model says.

The model is written from the documented rules, not from the code: a card has reasons that only a
reset clears and reasons that time clears; its vGPUs are healthy together or not at all.
"""

import asyncio
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from vgpu_agent.gpu.driver import Reading
from vgpu_agent.gpu.health import HealthPolicy
from vgpu_agent.gpu.memory import FaultMemory
from vgpu_agent.gpu.probe import HealthWatch
from vgpu_agent.gpu.simulated import SimulatedDriver, simulated_gpus
from vgpu_agent.kubelet._proto.v1beta1 import Empty, ListAndWatchResponse
from vgpu_agent.kubelet.plugin import DevicePlugin, ListEncoder
from vgpu_agent.model.container import Sharing
from vgpu_agent.model.placement import Placement
from vgpu_agent.model.share import Division
from vgpu_agent.model.state import NodeState

CARDS, REPLICAS = 3, 4
RECOVERY = 60.0
GPUS = simulated_gpus(CARDS, "card", 2**34, (0, 1))
UUIDS = [gpu.uuid for gpu in GPUS]

APPLICATION, UNPROVEN, RESET = 31, 74, 62
cards = st.sampled_from(UUIDS)


@dataclass
class ModelCard:
    """What must be true of a card by the rules."""

    listed: bool = True
    on_bus: bool = True
    away: bool = False  # seen to be away, and not back since
    initialised: bool = False  # by a reset, since the last look
    error: str | None = None
    action: int | None = None
    ecc: int = 0
    ecc_at_start: int = 0
    energy: int = 1000
    remap_failed: bool = False
    until_reset: set[str] = field(default_factory=set)
    until_good: set[str] = field(default_factory=set)
    bad_at: float = 0.0
    falls: list[float] = field(default_factory=list)

    @property
    def healthy(self) -> bool:
        return not self.until_reset and not self.until_good

    def reading(self) -> Reading:
        if self.error is not None:
            return Reading(error=self.error)
        return Reading(
            uncorrectable_ecc=self.ecc,
            remap_failed=self.remap_failed,
            recovery_action=self.action,
            energy_millijoules=self.energy,
        )

    def bad(self, reason: str, now: float, *, reset: bool) -> None:
        if self.healthy:
            self.falls.append(now)
        (self.until_reset if reset else self.until_good).add(reason)
        if reason in self.until_reset:
            self.until_good.discard(reason)  # of one reason the stricter holds
        self.bad_at = now

    def looked_at(self, now: float) -> None:
        if not self.on_bus:
            self.away = True
            if self.listed:
                self.bad("lost", now, reset=False)
            return
        self.listed = True
        found = self.found()
        if self.away or self.initialised:
            self.until_reset &= found
            self.ecc_at_start = self.ecc
            found = self.found()
            self.until_reset &= found
        self.away = self.initialised = False
        if "recovery-action" in self.until_reset and self.action == 0 and self.error is None:
            self.until_reset &= found
        for reason in found:
            self.bad(reason, now, reset=reason != "probe")
        recent = [fall for fall in self.falls if now - fall <= 3600]
        wait = min(RECOVERY * 2.0 ** max(0, len(recent) - 1 - 2), 3600.0)
        if not found and now - self.bad_at >= wait:
            self.until_good.clear()

    def found(self) -> set[str]:
        if self.error is not None:
            return {"probe"}
        return {
            reason
            for reason, holds in (
                ("recovery-action", self.action not in (None, 0)),
                ("ecc", self.ecc > self.ecc_at_start),
                ("remap", self.remap_failed),
            )
            if holds
        }


class Node(RuleBasedStateMachine):
    """An agent without its timers: every look, event and second is a step of the machine."""

    @initialize()
    def start(self) -> None:
        self.directory = tempfile.TemporaryDirectory()
        boot_id = Path(self.directory.name, "boot_id")
        boot_id.write_text("this boot\n")
        self.memory = FaultMemory(Path(self.directory.name), boot_id)
        self.now = 1000.0
        self.model = {uuid: ModelCard() for uuid in UUIDS}
        self.loop = asyncio.new_event_loop()
        self.tasks: list[asyncio.Task[None]] = []
        self.run(self.boot())

    async def boot(self) -> None:
        self.driver = SimulatedDriver(GPUS)
        for uuid, card in self.model.items():
            self.driver.show(uuid, card.reading())
            if not card.on_bus:
                self.driver.fall_off(uuid)
        await self.start_agent()

    async def start_agent(self) -> None:
        self.state = NodeState(Division(REPLICAS))
        policy = HealthPolicy(recovery=RECOVERY)
        self.watch = HealthWatch(
            self.driver, self.state, policy, self.memory, lambda: self.now, lambda: self.now
        )
        await self.watch.recall()
        await self.watch.look()
        await self.watch.look()
        await self.connect()

    async def connect(self) -> None:
        """A kubelet registers: a new plugin and a new stream."""
        self.plugin = DevicePlugin(
            state=self.state,
            sharing=Sharing(None),
            placement=Placement.SPREAD,
            encoder=ListEncoder(),
            observer=_Nobody(),
        )
        self.tasks = [
            self.loop.create_task(self.plugin.run()),
            self.loop.create_task(self.follow()),
        ]

    async def follow(self) -> None:
        self.list: dict[str, str] | None = None
        async for encoded in self.plugin.list_and_watch(Empty()):
            message = ListAndWatchResponse().parse(encoded.SerializeToString())
            self.list = {device.id: device.health for device in message.devices}

    async def disconnect(self) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)

    def run(self, what: object) -> None:
        self.loop.run_until_complete(what)  # type: ignore[arg-type]

    def settle(self) -> None:
        """Two looks, as the prober takes them: the second one by fresh handles."""
        for uuid, card in self.model.items():
            if card.on_bus:
                card.energy += 10
                self.driver.show(uuid, card.reading())
        self.run(self.watch.look())
        self.run(self.watch.look())
        for card in self.model.values():
            card.looked_at(self.now)

    # What happens to cards

    @rule(uuid=st.one_of(cards, st.none()), xid=st.sampled_from([APPLICATION, UNPROVEN, RESET]))
    def xid(self, uuid: str | None, xid: int) -> None:
        self.driver.xid(uuid, xid)
        self.run(self.watch.take_events())
        for each, card in self.model.items():
            if uuid in (None, each) and card.listed and xid != APPLICATION:
                card.bad("xid", self.now, reset=xid == RESET)

    @rule(uuid=cards, error=st.sampled_from([None, "GPU requires reset"]))
    def probe_error(self, uuid: str, error: str | None) -> None:
        self.model[uuid].error = error
        self.settle()

    @rule(uuid=cards, action=st.sampled_from([None, 0, 1, 2]))
    def recovery_action(self, uuid: str, action: int | None) -> None:
        self.model[uuid].action = action
        self.settle()

    @rule(uuid=cards)
    def memory_error(self, uuid: str) -> None:
        self.model[uuid].ecc += 1
        self.settle()

    @rule(uuid=cards)
    def remap_failure(self, uuid: str) -> None:
        self.model[uuid].remap_failed = True
        self.settle()

    @rule(uuid=cards)
    def falls_off_the_bus(self, uuid: str) -> None:
        self.model[uuid].on_bus = False
        self.driver.fall_off(uuid)
        self.settle()

    @rule(uuid=cards)
    def reset(self, uuid: str) -> None:
        self.reset_card(uuid)
        self.settle()

    def reset_card(self, uuid: str) -> None:
        card = self.model[uuid]
        card.on_bus = card.initialised = True
        card.error, card.remap_failed, card.ecc, card.energy = None, False, 0, 0
        card.action = None if card.action is None else 0
        self.driver.enumerate_again(uuid)

    # What happens around them

    @rule(seconds=st.sampled_from([1.0, 30.0, 61.0, 500.0, 4000.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        for card in self.model.values():
            card.listed = card.listed and (card.on_bus or self.now - card.bad_at < 3600)
            if not card.listed:
                card.until_good.clear()
                card.until_reset.clear()
                card.falls.clear()
        self.settle()

    @rule()
    def watcher_is_cancelled(self) -> None:
        self.tasks[1].cancel()
        self.tasks[1] = self.loop.create_task(self.follow())

    @rule()
    def kubelet_restarts(self) -> None:
        self.plugin.end_streams()
        self.run(self.disconnect())
        self.run(self.connect())

    @rule(uuid=st.one_of(st.none(), cards))
    def agent_restarts(self, uuid: str | None) -> None:
        """With a card reset while the agent was not there."""
        self.run(self.disconnect())
        if uuid is not None:
            self.reset_card(uuid)
        for each, card in self.model.items():
            self.driver.show(each, card.reading())
            card.listed = card.on_bus
            card.until_good.clear()
            card.falls.clear()
            card.ecc_at_start = card.ecc
            if card.until_reset:
                card.falls.append(self.now)
        self.run(self.driver.release())
        self.run(self.start_agent())
        for card in self.model.values():
            card.looked_at(self.now)
        self.settle()

    @invariant()
    def the_kubelet_has_what_the_model_says(self) -> None:
        if not hasattr(self, "tasks"):
            return
        expected = {
            f"{uuid}::{n}": "Healthy" if card.healthy else "Unhealthy"
            for uuid, card in self.model.items()
            if card.listed
            for n in range(REPLICAS)
        }

        async def arrived() -> None:
            async with asyncio.timeout(2):
                while self.list != expected:  # noqa: ASYNC110 - polled on purpose
                    await asyncio.sleep(0.001)

        try:
            self.run(arrived())
        except TimeoutError:
            faults = {c.gpu.uuid: c.fault_text for c in self.state.snapshot.inventory.cards}
            raise AssertionError(f"{self.list} is not {expected}; faults: {faults}") from None

    def teardown(self) -> None:
        if hasattr(self, "loop"):
            self.run(self.disconnect())
            self.run(self.loop.shutdown_asyncgens())
            self.loop.close()
            self.directory.cleanup()


class _Nobody:
    def observe_rpc(self, method: str, code: str, seconds: float) -> None:
        """Nobody asks."""


TestNode = pytest.mark.slow(Node.TestCase)
TestNode.settings = settings(
    max_examples=40,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
