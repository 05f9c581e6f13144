"""Makes the picture of the page for the documents: `python -m tests.screenshot`.

With a directory: pictures of every case in it, to look at.
"""

import shutil
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import anyio

from tests.model.strategies import a_look
from vgpu_agent import __version__
from vgpu_agent.address import Address
from vgpu_agent.gpu.simulated import simulated_gpus
from vgpu_agent.model.devices import Effect, Fault, Gpu, Reason, device_id
from vgpu_agent.model.facts import Reading, Scan
from vgpu_agent.model.health import ActiveFault, GpuHealth, Moment, Probed
from vgpu_agent.model.holders import Assignment, Holder, Usage, Used
from vgpu_agent.model.node import Node
from vgpu_agent.model.place import Place
from vgpu_agent.model.rules import HealthRules, SharingRules
from vgpu_agent.model.snapshot import Driver, RegistrationResult, Rules, Snapshot
from vgpu_agent.observe.listen import address_of, listen
from vgpu_agent.observe.metrics import Metrics
from vgpu_agent.observe.report import to_json
from vgpu_agent.observe.reporting import make_report
from vgpu_agent.observe.web import Web

if TYPE_CHECKING:
    from playwright.async_api import Browser

GIB = 2**30
PLACE = Place("gpu-node-1", "kube-system", "vgpu-agent-x7k2p")
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
            Rules(
                SharingRules(replicas=vgpus),
                HealthRules(health_checks=health_checks),
                place=PLACE,
            ),
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
        )
        self._set_health(index, GpuHealth(active=(ActiveFault(fault, time.monotonic()),)))

    def heal(self, index: int) -> None:
        """The GPU of that index is well."""
        self._set_health(index, GpuHealth())

    def _set_health(self, index: int, health: GpuHealth) -> None:
        known = self.snapshot
        self.recalled(known.first_seen, {**known.health, self.gpus[index].uuid: health})


def _well(node: ShownNode) -> None:
    node.start()
    node.hold(*(pod[:3] for pod in PODS))


def _off_the_bus(node: ShownNode) -> None:
    _well(node)
    detail = "XID 79 (GPU has fallen off the bus)"
    for index in range(2):
        node.fail(index, Fault(Reason.XID, time.time() - 600, detail, Effect.UNTIL_REBOOT))


def _no_kubelet(node: ShownNode) -> None:
    _well(node)
    path = "/var/lib/kubelet/device-plugins/kubelet.sock"
    node.registration_ended(f"no kubelet at {path}: nobody listens on it", away=True)


def _rival(node: ShownNode) -> None:
    _well(node)
    rival = "at nvidia-aws-vgpu.sock (process 4242, vgpu-device-plu)"
    error = f"another agent seems to serve k8s.amazonaws.com/vgpu on this node, {rival}"
    node.registration_ended(error, rival=rival)


def _no_driver(node: ShownNode) -> None:
    node.driver_looked(Driver(None, "NVML does not start: libnvidia-ml.so.1 is not here"), None, {})
    node.daemon()
    node.registration_tried(RegistrationResult.REGISTERED)
    node.stream_opened()
    node.set_assignments(())


def _no_mps(node: ShownNode) -> None:
    _well(node)
    node.daemon("the daemon does not answer")


CASES: dict[str, Callable[[ShownNode], None]] = {
    "well": _well,
    "busy": ShownNode.busy,
    "xid-79": _off_the_bus,
    "no-kubelet": _no_kubelet,
    "rival": _rival,
    "no-driver": _no_driver,
    "no-mps": _no_mps,
}
"""A node where all is well, the one of the documents' picture, and five faults of a whole node."""


@asynccontextmanager
async def site(
    node: Node, address: Address = LOOPBACK, version: str = "1.2.3"
) -> AsyncIterator[Address]:
    """Serves that node; where it does."""
    resource = "k8s.amazonaws.com/vgpu"

    def report(snapshot: Snapshot) -> bytes:
        return to_json(replace(make_report(snapshot, node.rules, time.time()), version=version))

    metrics = Metrics(version, resource, node.rules)
    listener = listen(address)
    web = Web(listener=listener, node=node, metrics=metrics, report=report)
    async with anyio.create_task_group() as tasks:
        await tasks.start(web.run)
        yield address_of(listener)
        tasks.cancel_scope.cancel()


async def picture(browser: "Browser", case: str, path: Path, width: int, scheme: str) -> None:
    """Makes a picture of the page in that case, as wide as that, `light` or `dark`."""
    node = ShownNode()
    CASES[case](node)
    async with site(node, version=__version__) as address:
        page = await browser.new_page(viewport={"width": width, "height": 700}, color_scheme=scheme)
        await page.goto(f"http://{address}/")
        await page.locator("#report").wait_for()
        await page.screenshot(path=path, full_page=True)
        await page.close()


async def main(*directory: str) -> None:
    """Makes the picture of the documents or, in a directory, one of every case to look at."""
    async with browsing() as browser:
        if not directory:
            await picture(browser, "busy", PICTURE, 1200, "light")
        for where, case in product(map(Path, directory), CASES):
            for scheme, width in product(("light", "dark"), (1280, 390)):
                path = where / f"{case}-{scheme}-{width}.png"
                await picture(browser, case, path, width, scheme)


if __name__ == "__main__":
    anyio.run(main, *sys.argv[1:])
