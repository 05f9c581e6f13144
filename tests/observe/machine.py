"""A node that is broken on purpose, and what a Prometheus scrapes of its agent, minute by minute.

Watch, node, health and metrics are the program's own, over simulated GPUs and MPS daemons. Time is
made: a minute is one look at the GPUs.
"""

from dataclasses import dataclass, replace

from tests.gpu.watched import Watched
from tests.kubelet.rig import GIB, RESOURCE
from vgpu_agent.errors import DriverError
from vgpu_agent.gpu.simulated import SimulatedDriver, simulated_gpus
from vgpu_agent.model.devices import device_id
from vgpu_agent.model.facts import Reading
from vgpu_agent.model.holders import Assignment, Holder, Usage, Used
from vgpu_agent.model.limits import LimitsLook
from vgpu_agent.model.node import Node
from vgpu_agent.model.rules import HealthRules, MpsLimits, SharingRules
from vgpu_agent.model.snapshot import RegistrationResult, Rules
from vgpu_agent.mps.daemon import SimulatedDaemons
from vgpu_agent.observe.metrics import Metrics

REPLICAS = 4
SHARING = SharingRules(mps=True, replicas=REPLICAS, mps_limits=MpsLimits.CLIENT)
HEALTH = HealthRules(lost_card_seconds=900)
"""A lost GPU leaves the list after 15 minutes, so that a scenario lasts no day."""

POD = "vgpu-agent-x7k2p"
BACK_OFF = 4
"""Minutes until the kubelet starts a container again that ended several times."""

FORGET = 5
"""Minutes after which an agent no longer believes what the kubelet said last."""


@dataclass(frozen=True)
class Page:
    """What a scrape finds: the agent's pod, and its metrics, or None where it does not answer."""

    pod: str
    text: str | None


async def nothing() -> None:
    """Happens where nothing does."""


class Machine:
    """The node with its agent; everything is well until a fault is made.

    `before_look` and `after_look` are what goes on happening, each minute. `session` is how the
    kubelet treats the agent. `away`: for so many minutes its container is not there.
    """

    def __init__(self, gpus: int = 2) -> None:
        described = simulated_gpus(gpus, "NVIDIA L4", 24 * GIB, [0])
        self.driver = SimulatedDriver(described)
        self.uuids = [gpu.uuid for gpu in described]
        for uuid in self.uuids:
            self.driver.show(uuid, Reading(uncorrectable_ecc=0, memory_used_bytes=GIB))
        self.daemons = SimulatedDaemons(dict.fromkeys(self.uuids, REPLICAS), SHARING)
        self.mps_unwatched: str | None = None
        self.limits = LimitsLook("the driver is too old")
        self.before_look = self.after_look = nothing
        self.session = self.follow_the_list
        self.held = {
            Holder("shop", f"server-{number}", "main"): [device_id(uuid, 0)]
            for number, uuid in enumerate(self.uuids)
        }
        self.memory: dict[tuple[str, Holder], Used] = {}
        self.pod = POD
        self.away = 0.0
        self.now = 0.0
        self._silent = 0
        self._begin()

    def _begin(self) -> None:
        self.watched = Watched(self.driver, sharing=SHARING, health=HEALTH)
        self.metrics = Metrics("1.2.3", RESOURCE, Rules(SHARING, HEALTH, RESOURCE))

    @property
    def node(self) -> Node:
        return self.watched.node

    def replace_pod(self, name: str) -> None:
        """The agent's pod is deleted, and another one is there after a minute."""
        self.pod, self.away = name, 1

    async def xid(self, index: int, xid: int, *, falls_off: bool = False) -> None:
        self.driver.xid(self.uuids[index], xid, falls_off_the_bus=falls_off)
        await self.watched.watch.take_events()

    async def minute(self) -> Page:
        """What is scraped a minute later."""
        self.now += 60
        await self.before_look()
        if self.away:
            self.away -= 1
            if not self.away:  # a new process, with what the one before kept of this boot
                kept = self.watched.snapshot
                self._begin()
                self.node.recalled(kept.first_seen, kept.health)
            return Page(self.pod, None)
        try:
            await self._look()
        except DriverError:  # the process ends, and its container is started again later
            self.away = BACK_OFF
            return Page(self.pod, None)
        await self.after_look()
        return Page(self.pod, self.metrics.render(self.watched.snapshot)[0].decode())

    async def _look(self) -> None:
        self.watched.now = self.now
        await self.watched.watch.look()
        self.node.set_mps(replace(await self.daemons.look(), unwatched=self.mps_unwatched))
        self.node.set_limits(self.limits)
        self.session()
        self.node.set_usage(Usage(dict(self.memory), {}))

    # How the kubelet treats the agent

    def says_who_holds_what(self) -> None:
        self._silent = 0
        held = self.held.items()
        self.node.set_assignments(tuple(Assignment(holder, tuple(ids)) for holder, ids in held))

    def follow_the_list(self) -> None:
        known = self.watched.snapshot.kubelet
        if not known.registered:
            self.node.registration_tried(RegistrationResult.REGISTERED)
        if not known.streams:
            self.node.stream_opened()
        self.says_who_holds_what()

    def end_the_stream(self, why: str) -> None:
        if self.watched.snapshot.kubelet.streams:
            self.node.stream_ended()
        self.node.registration_ended(why)

    def be_away(self) -> None:
        self.end_the_stream("no kubelet")
        self._silent += 1
        self.node.assignments_failed("no kubelet", forget=self._silent >= FORGET)
