"""What the kubelet does not wait for: the web side, the control socket, who holds what.

Half of the time and memory that the agent takes to load is theirs, so they are loaded while the
kubelet works with the first list, see `Agent`.
"""

import socket
import time
from dataclasses import dataclass
from functools import partial

import anyio

from vgpu_agent import __version__, control
from vgpu_agent.endless import endless
from vgpu_agent.gpu.cordons import Cordons
from vgpu_agent.gpu.driver import GpuDriver
from vgpu_agent.gpu.watch import GpuWatch
from vgpu_agent.kubelet.checkpoint import CHECKPOINT
from vgpu_agent.kubelet.podresources import SOCKET, PodResourcesWatch
from vgpu_agent.model.node import Node
from vgpu_agent.model.snapshot import Rules, Snapshot
from vgpu_agent.observe.metrics import Metrics
from vgpu_agent.observe.report import to_json
from vgpu_agent.observe.reporting import make_report
from vgpu_agent.observe.timings import CallTimings
from vgpu_agent.observe.web import Web
from vgpu_agent.requests import Requests
from vgpu_agent.settings import Settings


def report(snapshot: Snapshot, rules: Rules, *, names_pods: bool = True) -> bytes:
    """The report of a snapshot, as JSON."""
    return to_json(make_report(snapshot, rules, time.time(), names_pods=names_pods))


@dataclass(frozen=True)
class Beside:
    """The parts, for an agent that runs with these."""

    settings: Settings
    node: Node
    driver: GpuDriver
    watch: GpuWatch
    cordons: Cordons
    calls: CallTimings

    async def run(self, listener: socket.socket) -> None:
        """Runs until cancelled. The web side answers at `listener`."""
        settings, node = self.settings, self.node
        web = Web(
            listener=listener,
            node=node,
            metrics=Metrics(__version__, settings.resource_name, node.rules, self.calls),
            report=partial(report, rules=node.rules, names_pods=settings.status_page),
            page=settings.status_page,
            hosts=settings.status_hosts,
        )
        requests = Requests(
            node=node,
            watch=self.watch,
            cordons=self.cordons,
            driver=self.driver,
            report=lambda: report(node.snapshot, node.rules),
        )
        podresources = PodResourcesWatch(
            socket=settings.kubelet_dir / SOCKET,
            checkpoint=settings.plugin_directory / CHECKPOINT,
            resource_name=settings.resource_name,
            node=node,
            interval=settings.podresources_interval,
        )
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(endless, web.run)
            tasks.start_soon(endless, control.serve, settings.state_directory, requests.answer)
            tasks.start_soon(endless, podresources.run)
            if settings.process_metrics:
                from vgpu_agent.usage.watch import UsageWatch  # few nodes need it

                tasks.start_soon(endless, UsageWatch(self.driver, node).run)
