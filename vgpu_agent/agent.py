"""The wiring: builds the parts, opens the one task group, starts them in order.

Order of the start: the web side, so that probes are answered while the driver takes its time; the
cards, until the first list is known; the session with the kubelet. The end is the other way round
by nature: everything is cancelled, and each part cleans up after itself.
"""

import logging
from dataclasses import dataclass

import anyio
from anyio.abc import TaskStatus

from vgpu_agent import __version__
from vgpu_agent.gpu.driver import GpuDriver
from vgpu_agent.gpu.memory import FaultMemory
from vgpu_agent.gpu.probe import HealthWatch
from vgpu_agent.gpu.simulated import SimulatedDriver, simulated_gpus
from vgpu_agent.kubelet.plugin import DevicePlugin, ListEncoder
from vgpu_agent.kubelet.session import KubeletSession
from vgpu_agent.model.state import Latest, NodeState
from vgpu_agent.observe.metrics import Metrics
from vgpu_agent.observe.status import Status
from vgpu_agent.observe.web import Web, listen
from vgpu_agent.settings import Address, GpuDriverKind, Settings

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

    return NvmlDriver(min_compute_capability=None)


async def run_agent(
    settings: Settings,
    driver: GpuDriver,
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
    state = NodeState(settings.replicas)
    metrics = Metrics(version=__version__, resource_name=settings.resource_name)
    web = Web(
        listener=listen(settings.metrics_address),
        state=state,
        metrics=metrics,
        status=Status(__version__, settings.resource_name, settings.health_checks),
    )
    memory = FaultMemory(settings.state_directory)
    health = HealthWatch(driver, state, settings.health_policy(), memory)
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
    async with driver, anyio.create_task_group() as tasks:
        await tasks.start(web.run)
        log.info("metrics at http://%s/metrics", web.address)
        if watch_health:
            await tasks.start(health.run)
        else:
            await health.look()
        tasks.start_soon(session.run)
        if release_requests is not None:
            tasks.start_soon(_release_on_request, health, release_requests)
        task_status.started(Running(state, web.address))


async def _release_on_request(health: HealthWatch, requests: Latest[int]) -> None:
    async for _ in requests.follow(requests.version):
        health.release()
