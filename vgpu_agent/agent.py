"""The wiring: builds the parts, opens the one task group, starts them in order.

Order of the start: the web side, so that probes are answered while the driver takes its time; the
MPS daemon, where there is one; the GPUs, until the first list is known; the session with the
kubelet. The end is the other way round by nature: everything is cancelled, and each part cleans up
after itself.
"""

import logging
import math
import socket
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial

import anyio
from anyio.abc import TaskStatus

from vgpu_agent import __version__, control
from vgpu_agent.address import Address
from vgpu_agent.gpu.cordons import Cordons
from vgpu_agent.gpu.driver import GpuDriver
from vgpu_agent.gpu.memory import Keeper
from vgpu_agent.gpu.simulated import SimulatedDriver, simulated_gpus
from vgpu_agent.gpu.watch import GpuWatch
from vgpu_agent.kubelet.checkpoint import CHECKPOINT
from vgpu_agent.kubelet.codec import ListEncoder
from vgpu_agent.kubelet.plugin import DevicePlugin
from vgpu_agent.kubelet.podresources import SOCKET, PodResourcesWatch
from vgpu_agent.kubelet.session import KubeletSession
from vgpu_agent.limits.look import Looker
from vgpu_agent.limits.watch import Enforced, LimitsWatch, OwnLook, Paced, Source
from vgpu_agent.model.health import Moment
from vgpu_agent.model.node import Node
from vgpu_agent.model.place import Place
from vgpu_agent.model.rules import MemoryLimits
from vgpu_agent.model.share import Divided, divide
from vgpu_agent.model.snapshot import Rules, Snapshot
from vgpu_agent.mps.daemon import Daemons, MpsGuard, RealDaemons, SimulatedDaemons
from vgpu_agent.mps.directories import Directories
from vgpu_agent.observe import changes
from vgpu_agent.observe.logs import Repeats
from vgpu_agent.observe.metrics import Metrics
from vgpu_agent.observe.report import to_json
from vgpu_agent.observe.reporting import make_report
from vgpu_agent.observe.server import listen_when_possible
from vgpu_agent.observe.web import Web
from vgpu_agent.requests import Requests
from vgpu_agent.settings import GpuDriverKind, Settings

log = logging.getLogger(__name__)


def make_driver(settings: Settings) -> GpuDriver:
    """The source of GPUs that the settings name."""
    if settings.gpu_driver is GpuDriverKind.SIMULATED:
        return SimulatedDriver(
            simulated_gpus(
                settings.simulated_gpus,
                settings.simulated_model,
                settings.simulated_memory,
                settings.simulated_numa_nodes,
            )
        )
    # Imported where it is used: simulated GPUs need no NVML, nor its memory.
    from vgpu_agent.gpu.nvml import NvmlDriver

    return NvmlDriver()


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
        changes.write(changes.changes(before, after, rules), repeats)

    return Node(rules, clock=lambda: Moment(time.monotonic(), time.time()), published=published)


def make_watch(settings: Settings, driver: GpuDriver, node: Node) -> GpuWatch:
    """What watches the GPUs of the driver."""
    if not node.rules.sharing.device_list.by_cdi:
        return GpuWatch(driver, node)
    from vgpu_agent.gpu.cdi import CdiSpecs  # as above

    return GpuWatch(driver, node, cdi_names=CdiSpecs(settings.cdi_kind).names)


async def endless(run: Callable[..., Awaitable[object]], *args: object, **status: object) -> None:
    """Runs a part of the agent, none of which ends by itself.

    Raises RuntimeError where it does, also where it was cancelled by somebody who did not cancel
    the agent: libraries cancel tasks, and a task group takes that for a good end.
    """
    ended: BaseException | None = None
    try:
        await run(*args, **status)
    except anyio.get_cancelled_exc_class() as cancelled:
        if anyio.current_effective_deadline() == -math.inf:
            raise
        ended = cancelled
    raise RuntimeError(f"{run.__qualname__} ended, though nobody asked it to") from ended


def make_looker(settings: Settings, driver: GpuDriver, *, enforce: bool = False) -> Looker:
    """What looks at the driver's memory limits, and with `enforce` sets them."""
    return Looker(
        driver,
        settings.plugin_directory / CHECKPOINT,
        settings.resource_name,
        guarantee=settings.memory_guarantee,
        enforce=enforce,
        enable=settings.memory_limits_enable_controller,
    )


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
        metrics = Metrics(__version__, settings.resource_name, node.rules)
        web = Web(
            listener=listener or await listen_when_possible(settings.metrics_address),
            node=node,
            metrics=metrics,
            report=partial(self.report, names_pods=settings.status_page),
            page=settings.status_page,
            hosts=settings.status_hosts,
        )
        self.metrics_address = web.address
        keeper = Keeper(settings.state_directory, node)
        cordons = Cordons(settings.cordon_directory, node)
        requests = Requests(
            node=node,
            watch=self.watch,
            cordons=cordons,
            driver=self._driver,
            report=lambda: self.report(node.snapshot),
        )
        encoder = ListEncoder()
        session = KubeletSession(
            directory=settings.plugin_directory,
            endpoint=settings.endpoint,
            resource_name=settings.resource_name,
            node=node,
            make_plugin=lambda: DevicePlugin(node=node, encoder=encoder, observer=metrics),
        )
        podresources = PodResourcesWatch(
            socket=settings.kubelet_dir / SOCKET,
            checkpoint=settings.plugin_directory / CHECKPOINT,
            resource_name=settings.resource_name,
            node=node,
            interval=settings.podresources_interval,
        )
        async with self._driver, anyio.create_task_group() as tasks:
            tasks.start_soon(self._note_end)
            await tasks.start(endless, web.run)
            log.info("metrics at http://%s/metrics", web.address)
            tasks.start_soon(endless, control.serve, settings.state_directory, requests.answer)
            if self._daemons is not None:
                await tasks.start(endless, MpsGuard(self._daemons, node).run)
            await keeper.recall()
            await tasks.start(endless, cordons.run)
            tasks.start_soon(endless, keeper.run)
            if watch_gpus:
                await tasks.start(endless, self.watch.run)
            else:
                await self.watch.look()
            if (limits := self._limits()) is not None:
                await tasks.start(endless, limits.run)
            tasks.start_soon(endless, podresources.run)
            tasks.start_soon(endless, session.run)
            if settings.process_metrics:
                from vgpu_agent.usage.watch import UsageWatch  # as above

                tasks.start_soon(endless, UsageWatch(self._driver, node).run)
            task_status.started()

    def _limits(self) -> LimitsWatch | None:
        """Who looks at the driver's memory limits; None where they are off."""
        settings = self._settings
        if settings.memory_limits is MemoryLimits.OFF:
            return None
        if settings.memory_limits is MemoryLimits.DRIVER:
            source: Source = Enforced(settings.state_directory)
        else:
            source = OwnLook(Paced(make_looker(settings, self._driver)))
        if not settings.device_list.by_cdi:
            return LimitsWatch(source, self.node)
        from vgpu_agent.gpu.cdi import CdiSpecs  # as above

        return LimitsWatch(source, self.node, CdiSpecs(settings.cdi_kind).limits_memory)

    async def _note_end(self) -> None:
        try:
            await anyio.sleep_forever()
        finally:
            self.ending.set()

    def report(self, snapshot: Snapshot, *, names_pods: bool = True) -> bytes:
        """The report of a snapshot, as JSON."""
        return to_json(make_report(snapshot, self.node.rules, time.time(), names_pods=names_pods))
