"""Makes the picture of the page for the documents: `python -m tests.screenshot`."""

import shutil
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import anyio

from tests.model.strategies import a_look
from vgpu_agent.address import Address
from vgpu_agent.gpu.simulated import simulated_gpus
from vgpu_agent.model.devices import Effect, Fault, Gpu, Reason, device_id
from vgpu_agent.model.facts import Reading, Scan
from vgpu_agent.model.health import ActiveFault, GpuHealth, Moment, Probed
from vgpu_agent.model.holders import Assignment, Holder, Usage, Used
from vgpu_agent.model.node import Node
from vgpu_agent.model.rules import HealthRules, SharingRules
from vgpu_agent.model.snapshot import Driver, RegistrationResult, Rules, Snapshot
from vgpu_agent.observe.metrics import Metrics
from vgpu_agent.observe.report import Identity, make_report, to_json
from vgpu_agent.observe.server import listen
from vgpu_agent.observe.web import Web

if TYPE_CHECKING:
    from playwright.async_api import Browser

GIB = 2**30
LOOPBACK = Address("127.0.0.1", 0)
PICTURE = Path(__file__).parents[1] / "docs/page.png"

PODS = (
    (0, Holder("vision", "resnet-7d4b9", "server"), range(2), 3.1),
    (0, Holder("vision", "detector-0", "triton"), range(2, 5), 6.4),
    (0, Holder("language", "embed-5c8f", "server"), range(5, 6), 2.9),
    (0, Holder("speech", "whisper-1", "asr"), range(7, 9), 4.2),
    (1, Holder("language", "llama-0", "vllm"), range(5), 11.2),
    (1, Holder("vision", "detector-1", "triton"), range(6, 8), 3.9),
)
"""Index of the GPU, who, which vGPUs, GiB in use."""


def chromium() -> str | None:
    """Debian's browser, where it is installed."""
    return shutil.which("chromium")


@asynccontextmanager
async def browsing() -> AsyncIterator["Browser"]:
    """A browser without a window. It runs as root and in small containers too."""
    from playwright.async_api import async_playwright  # takes long, and others want the node only

    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(
            executable_path=chromium(), args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        try:
            yield browser
        finally:
            with anyio.CancelScope(shield=True):
                await browser.close()


class ShownNode(Node):
    """A node where all is well, and what can happen to its GPUs."""

    def __init__(self, vgpus: int = 10, *, health_checks: bool = True) -> None:
        super().__init__(
            Rules(SharingRules(replicas=vgpus), HealthRules(health_checks=health_checks)),
            clock=lambda: Moment(time.monotonic(), time.time()),
        )
        self.gpus = simulated_gpus(2, "NVIDIA L4", 24 * GIB, (0, 1))
        self.memory: dict[str, int] = {}

    def start(self) -> None:
        """Its GPUs, a driver, MPS and a kubelet that follows the list."""
        self.look()
        self.daemon()
        self.registration_tried(RegistrationResult.REGISTERED)
        self.stream_opened()
        self.set_assignments(())

    def look(self, *others: Gpu) -> None:
        """The driver shows its GPUs, which are well, and `others`."""
        self.driver_looked(
            Driver("550.90.07", None),
            Scan("550.90.07", (*self.gpus, *others)),
            {
                gpu.uuid: (Probed(Reading(memory_used_bytes=self.memory.get(gpu.uuid))),)
                for gpu in self.gpus
            },
        )

    def daemon(self, problem: str | None = None) -> None:
        """MPS serves these GPUs, or has this problem."""
        replicas = dict.fromkeys((gpu.uuid for gpu in self.gpus), self.rules.sharing.replicas)
        self.set_mps(a_look(problem=problem, **replicas))

    def hold(self, *holders: tuple[int, Holder, range]) -> None:
        """These and no others hold vGPUs of the GPUs of that index."""
        self.set_assignments(
            tuple(
                Assignment(holder, tuple(device_id(self.gpus[index].uuid, n) for n in numbers))
                for index, holder, numbers in holders
            )
        )

    def busy(self) -> None:
        """As in the picture: pods on both GPUs, one over its share, one GPU with a fault."""
        self.start()
        self.hold(*(pod[:3] for pod in PODS))
        uuids = [gpu.uuid for gpu in self.gpus]
        used = {
            (uuids[index], holder): Used(1, int(gib * GIB)) for index, holder, _numbers, gib in PODS
        }
        self.set_usage(Usage(MappingProxyType(used), MappingProxyType(dict.fromkeys(uuids, 0))))
        self.memory = {
            uuid: int(sum(pod[3] for pod in PODS if pod[0] == index) * GIB) + GIB // 2
            for index, uuid in enumerate(uuids)
        }
        self.look()
        self.fail(1)

    def fail(self, index: int, fault: Fault | None = None) -> None:
        """The GPU of that index has this fault, or one that waits for a reset; until `heal`."""
        fault = fault or Fault(
            Reason.ECC,
            time.time() - 600,
            "2 uncorrectable memory errors",
            Effect.UNTIL_RESET,
            "drain the GPU's pods, release it (`vgpu-agent release`), reset it",
        )
        self._set_health(index, GpuHealth(active=(ActiveFault(fault, time.monotonic()),)))

    def heal(self, index: int) -> None:
        """The GPU of that index is well."""
        self._set_health(index, GpuHealth())

    def _set_health(self, index: int, health: GpuHealth) -> None:
        known = self.snapshot
        self.recalled(known.first_seen, {**known.health, self.gpus[index].uuid: health})


@asynccontextmanager
async def site(node: Node, address: Address = LOOPBACK) -> AsyncIterator[Address]:
    """Serves that node; where it does."""
    resource = "k8s.amazonaws.com/vgpu"

    def report(snapshot: Snapshot) -> bytes:
        identity = Identity("1.2.3", "gpu-node-1", resource)
        return to_json(make_report(snapshot, node.rules, identity, time.time()))

    metrics = Metrics("1.2.3", resource, node.rules)
    web = Web(listener=listen(address), node=node, metrics=metrics, report=report)
    async with anyio.create_task_group() as tasks:
        await tasks.start(web.run)
        yield web.address
        tasks.cancel_scope.cancel()


async def main(picture: Path = PICTURE, **options: str) -> None:
    """Makes the picture. `options` are those of the browser's page, such as its color_scheme."""
    node = ShownNode()
    node.busy()
    async with site(node) as address, browsing() as browser:
        page = await browser.new_page(viewport={"width": 1200, "height": 700}, **options)
        await page.goto(f"http://{address}/")
        await page.get_by_text("whisper-1").first.wait_for()
        await page.screenshot(path=picture, full_page=True)


if __name__ == "__main__":
    anyio.run(main)
