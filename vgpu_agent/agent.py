"""The wiring: builds the parts, opens the one task group, starts them in order.

Order of the start: the socket of the web side; the MPS daemon, where there is one; the GPUs, until
the first list is known; the session with the kubelet; then what the kubelet does not wait for, see
`beside`. Where the first list takes longer than LOADED_AFTER, because the driver takes its time or
there is no kubelet, that comes before it, so that probes are answered. The end is the other way
round by nature: everything is cancelled, and each part cleans up after itself.
"""

import asyncio
import gc
import logging
import socket
import sys
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import anyio
import anyio.to_thread
from anyio.abc import TaskStatus

from vgpu_agent.address import Address
from vgpu_agent.drivers import make_driver
from vgpu_agent.endless import endless
from vgpu_agent.errors import is_shortage
from vgpu_agent.gpu.cordons import Cordons
from vgpu_agent.gpu.driver import GpuDriver
from vgpu_agent.gpu.memory import Keeper
from vgpu_agent.gpu.simulated import SimulatedDriver
from vgpu_agent.gpu.watch import GpuWatch
from vgpu_agent.kubelet.codec import ListEncoder
from vgpu_agent.kubelet.plugin import DevicePlugin
from vgpu_agent.kubelet.session import KubeletSession
from vgpu_agent.model.health import Moment
from vgpu_agent.model.node import Node
from vgpu_agent.model.place import Place
from vgpu_agent.model.rules import MemoryLimits
from vgpu_agent.model.share import Divided, divide
from vgpu_agent.model.snapshot import Rules, Snapshot
from vgpu_agent.mps.daemon import Daemons, MpsGuard, RealDaemons, SimulatedDaemons
from vgpu_agent.mps.directories import Directories
from vgpu_agent.observe import changes
from vgpu_agent.observe.listen import address_of, listen_when_possible
from vgpu_agent.observe.logs import Repeats
from vgpu_agent.observe.timings import CallTimings
from vgpu_agent.running import until_ended
from vgpu_agent.settings import GpuDriverKind, Settings

if TYPE_CHECKING:
    from vgpu_agent.beside import Beside

log = logging.getLogger(__name__)

GIL_SWITCH_INTERVAL = 0.0005
"""Seconds for which a thread that renders or decodes may keep the event loop waiting. By default it
is 5 ms, several times in each call of the kubelet."""

LOADED_AFTER = 0.25
"""Seconds after which the web side is loaded at the latest: a probe waits a second."""


def make_daemons(settings: Settings, driver: GpuDriver) -> Daemons | None:
    """The MPS daemons that the settings name; None where GPUs are not shared by MPS."""
    rules = settings.sharing_rules()
    if not rules.mps:
        return None
    if isinstance(driver, SimulatedDriver):
        divided = {gpu.uuid: divide(gpu, rules) for gpu in driver.gpus}
        known = {uuid: each.replicas for uuid, each in divided.items() if isinstance(each, Divided)}
        return SimulatedDaemons(known, rules)
    return RealDaemons(Directories(settings.mps_directory), rules)


def make_place(settings: Settings) -> Place:
    """Where this agent runs, as far as that is known."""
    place = Place(settings.node_name or socket.gethostname())
    given = {"namespace": settings.pod_namespace, "pod": settings.pod_name}
    return replace(place, **{name: text for name, text in given.items() if text})


def make_rules(settings: Settings) -> Rules:
    """What the model's decisions depend on."""
    return Rules(
        settings.sharing_rules(),
        settings.health_rules(),
        settings.resource_name,
        make_place(settings),
    )


def make_node(settings: Settings) -> Node:
    """A node that knows nothing yet, and whose changes are logged."""
    rules = make_rules(settings)
    repeats = Repeats(changes.log)

    def published(before: Snapshot, after: Snapshot) -> None:
        # The list of the kubelet goes out first: it takes two turns of the loop.
        loop = asyncio.get_running_loop()
        loop.call_soon(loop.call_soon, write, before, after)

    def write(before: Snapshot, after: Snapshot) -> None:
        changes.write(changes.changes(before, after, rules), repeats)

    return Node(rules, clock=lambda: Moment(time.monotonic(), time.time()), published=published)


def make_watch(settings: Settings, driver: GpuDriver, node: Node) -> GpuWatch:
    """What watches the GPUs of the driver."""
    if not node.rules.sharing.device_list.by_cdi:
        return GpuWatch(driver, node)
    from vgpu_agent.gpu.cdi import CdiSpecs  # as above

    return GpuWatch(driver, node, cdi_names=CdiSpecs(settings.cdi_kind).names)


def _looks_at_limits(settings: Settings) -> bool:
    """Whether memory limits by the driver are of interest: of simulated GPUs where they must be."""
    simulated = settings.gpu_driver is GpuDriverKind.SIMULATED
    limits = settings.memory_limits
    return limits is MemoryLimits.DRIVER or (limits is MemoryLimits.AUTO and not simulated)


class Agent:
    """The running agent: its parts, made from the settings, and what it can be asked."""

    def __init__(self, settings: Settings, driver: GpuDriver, daemons: Daemons | None) -> None:
        self._settings = settings
        self._driver = driver
        self._daemons = daemons
        self.node = make_node(settings)
        self.watch = make_watch(settings, driver, self.node)
        self.metrics_address: Address | None = None
        self.ending = anyio.Event()
        """Set when its parts are cancelled, whether by its owner or because one ended."""

    async def run(
        self,
        *,
        watch_gpus: bool = True,
        listener: socket.socket | None = None,
        task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED,
    ) -> None:
        """Runs until cancelled. Raises ListenError where it cannot serve its metrics.

        They are served at `listener`, or else at one for the address of the settings.
        Without `watch_gpus` the GPUs are looked at once and never again, which is for tests that
        want to see that this is noticed.
        """
        settings, node = self._settings, self.node
        listener = listener or await listen_when_possible(settings.metrics_address)
        with listener:
            self.metrics_address = address_of(listener)
            log.info("metrics at http://%s/metrics", self.metrics_address)
            keeper = Keeper(settings.state_directory, node)
            cordons = Cordons(settings.cordon_directory, node)
            encoder, calls = ListEncoder(), CallTimings()
            session = KubeletSession(
                directory=settings.plugin_directory,
                endpoint=settings.endpoint,
                resource_name=settings.resource_name,
                node=node,
                make_plugin=lambda: DevicePlugin(node=node, encoder=encoder, observer=calls),
            )
            async with self._driver, anyio.create_task_group() as tasks:
                tasks.start_soon(self._note_end)
                tasks.start_soon(endless, self._run_beside, listener, cordons, calls)
                if self._daemons is not None:
                    await tasks.start(endless, MpsGuard(self._daemons, node).run)
                await keeper.recall()
                await tasks.start(endless, cordons.run)
                tasks.start_soon(endless, keeper.run)
                if watch_gpus:
                    await tasks.start(endless, self.watch.run)
                else:
                    await self.watch.look()
                if _looks_at_limits(settings):
                    from vgpu_agent.limiting import make_limits_watch  # as above

                    limits = make_limits_watch(settings, self._driver, node)
                    await tasks.start(endless, limits.run)
                tasks.start_soon(endless, session.run)
                task_status.started()

    async def _run_beside(
        self, listener: socket.socket, cordons: Cordons, calls: CallTimings
    ) -> None:
        """Runs what the kubelet does not wait for, once the first list is sent, or soon anyway.

        It is loaded in a thread, which takes turns with the loop.
        """
        with anyio.move_on_after(LOADED_AFTER):
            await self.node.latest.until(lambda now: now.lists_sent)
        beside = await _loaded_when_possible()
        gc.freeze()  # What is imported stays, and need not be looked at again.
        parts = beside(self._settings, self.node, self._driver, self.watch, cordons, calls)
        await parts.run(listener)

    async def _note_end(self) -> None:
        try:
            await anyio.sleep_forever()
        finally:
            self.ending.set()

    def report(self, snapshot: Snapshot) -> bytes:
        """The report of a snapshot, as JSON."""
        from vgpu_agent.beside import report  # as above

        return report(snapshot, self.node.rules)


async def _loaded_when_possible() -> type["Beside"]:
    """What `_load_beside` loads, once the machine has the files and threads for it."""
    repeats = Repeats(log)
    while True:
        try:
            return await anyio.to_thread.run_sync(_load_beside)
        except (OSError, RuntimeError) as error:
            if not is_shortage(error):
                raise
            repeats.log(logging.WARNING, f"the web side cannot be loaded: {error}; tried again")
        await anyio.sleep(1)


def _load_beside() -> type["Beside"]:
    from vgpu_agent.beside import Beside  # as above

    return Beside


async def run(settings: Settings) -> None:
    """`vgpu-agent run`: until SIGTERM or SIGINT. SIGUSR1 is `vgpu-agent release`."""
    sys.setswitchinterval(GIL_SWITCH_INTERVAL)
    # What is imported stays, and need not be looked at again: garbage is found while it is little.
    gc.freeze()
    driver = make_driver(settings)
    agent = Agent(settings, driver, make_daemons(settings, driver))
    await until_ended(agent.run, agent.ending, agent.watch.release)
