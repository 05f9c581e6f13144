"""The wiring: builds the parts, opens the one task group, starts them in order.

Order of the start: the web side, so that probes are answered while the driver takes its time; the
MPS daemon, where there is one; the cards, until the first list is known; the session with the
kubelet. The end is the other way round by nature: everything is cancelled, and each part cleans up
after itself.
"""

import logging
import socket
from dataclasses import dataclass

import anyio
from anyio.abc import TaskStatus

from vgpu_agent import __version__
from vgpu_agent.gpu.driver import GpuDriver
from vgpu_agent.gpu.memory import FaultMemory
from vgpu_agent.gpu.probe import HealthWatch
from vgpu_agent.gpu.simulated import SimulatedDriver, simulated_gpus
from vgpu_agent.kubelet.plugin import DevicePlugin, ListEncoder
from vgpu_agent.kubelet.podresources import PodResourcesWatch
from vgpu_agent.kubelet.session import KubeletSession
from vgpu_agent.model.container import DeviceList
from vgpu_agent.model.share import Divided, divide
from vgpu_agent.model.state import Latest, NodeState
from vgpu_agent.mps.daemon import Daemon, RealDaemon, SimulatedDaemon
from vgpu_agent.mps.guard import MpsGuard
from vgpu_agent.observe.metrics import Metrics
from vgpu_agent.observe.status import Status
from vgpu_agent.observe.web import Web, listen
from vgpu_agent.settings import Address, GpuDriverKind, Settings, SharingKind

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Running:
    """A started agent, as those who started it see it."""

    state: NodeState
    metrics_address: Address


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
    # Imported where it is used: simulated cards need no NVML, nor its memory.
    from vgpu_agent.gpu.nvml import NvmlDriver

    # Volta is the first with limits for each client and an address space of its own.
    volta = (7, 0) if settings.sharing is SharingKind.MPS else None
    return NvmlDriver(min_compute_capability=volta)


def only_named(driver: GpuDriver, settings: Settings) -> GpuDriver:
    """The driver without the cards that the host's CDI specs do not name, where CDI is used."""
    if settings.device_list not in (DeviceList.CDI, DeviceList.CDI_ENVVAR):
        return driver
    from vgpu_agent.gpu.cdi import NamedByCdi  # imported where it is used

    return NamedByCdi(driver, settings.cdi_kind)


def make_daemon(settings: Settings, driver: GpuDriver) -> Daemon | None:
    """The MPS daemon that the settings name; None where cards are not shared by MPS."""
    if settings.sharing is not SharingKind.MPS:
        return None
    if isinstance(driver, SimulatedDriver):
        divided = {gpu.uuid: divide(gpu, settings.division()) for gpu in driver.gpus}
        told = {uuid: each.replicas for uuid, each in divided.items() if isinstance(each, Divided)}
        return SimulatedDaemon(told, settings.mps_limits)
    from vgpu_agent.mps.control import Control  # as above

    pipe, logs = settings.mps_directory / "pipe", settings.mps_directory / "log"
    return RealDaemon(Control(pipe, logs), settings.mps_directory)


async def run_agent(
    settings: Settings,
    driver: GpuDriver,
    daemon: Daemon | None,
    *,
    watch_health: bool = True,
    release_requests: Latest[int] | None = None,
    task_status: TaskStatus[Running] = anyio.TASK_STATUS_IGNORED,
) -> None:
    """Runs the agent until cancelled. Raises ListenError where it cannot serve its metrics.

    Without `watch_health` the cards are looked at once and never again, which is for tests that
    want to see that this is noticed. Every new value of `release_requests` makes the agent let go
    of the cards for a while.
    """
    state = NodeState(settings.division())
    metrics = Metrics(
        version=__version__,
        resource_name=settings.resource_name,
        sharing=settings.sharing_rules(),
        max_clients=settings.division().max_clients or 0,
    )
    web = Web(
        listener=listen(settings.metrics_address),
        state=state,
        metrics=metrics,
        status=Status(
            version=__version__,
            resource_name=settings.resource_name,
            health_checks=settings.health_checks,
            sharing=settings.sharing_rules(),
            host=socket.gethostname(),
            names_pods=settings.status_page,
        ),
        page=settings.status_page,
    )
    memory = FaultMemory(settings.state_directory)
    health = HealthWatch(only_named(driver, settings), state, settings.health_policy(), memory)
    encoder = ListEncoder()
    session = KubeletSession(
        directory=settings.plugin_directory,
        endpoint=settings.endpoint,
        resource_name=settings.resource_name,
        state=state,
        make_plugin=lambda: DevicePlugin(
            state=state,
            sharing=settings.sharing_rules(),
            placement=settings.placement,
            encoder=encoder,
            observer=metrics,
        ),
    )
    podresources = PodResourcesWatch(
        directory=settings.kubelet_dir,
        resource_name=settings.resource_name,
        state=state,
        interval=settings.podresources_interval,
    )
    async with driver, anyio.create_task_group() as tasks:
        await tasks.start(web.run)
        log.info("metrics at http://%s/metrics", web.address)
        if daemon is not None:
            guard = MpsGuard(daemon, state, settings.division(), settings.mps_limits)
            await tasks.start(guard.run)
        if watch_health:
            await tasks.start(health.run)
        else:
            await health.look()
        tasks.start_soon(podresources.run)
        tasks.start_soon(session.run)
        if settings.process_metrics:
            from vgpu_agent.usage.watch import UsageWatch  # imported where it is used

            tasks.start_soon(UsageWatch(driver, state).run)
        if release_requests is not None:
            tasks.start_soon(_release_on_request, health, release_requests)
        task_status.started(Running(state, web.address))


async def _release_on_request(health: HealthWatch, requests: Latest[int]) -> None:
    async for _ in requests.follow(requests.version):
        health.release()
