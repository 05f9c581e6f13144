"""Makes the picture of the page for the documents: `python -m tests.screenshot`."""

import shutil
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import MappingProxyType

import anyio
from playwright.async_api import Browser, async_playwright

from vgpu_agent.gpu.simulated import simulated_gpus
from vgpu_agent.model.container import MpsSharing, Sharing
from vgpu_agent.model.devices import Fault, Reason, device_id
from vgpu_agent.model.holders import Assignment, Holder, Usage, Used
from vgpu_agent.model.share import Division
from vgpu_agent.model.state import Mps, NodeState, RegistrationResult
from vgpu_agent.observe.metrics import Metrics
from vgpu_agent.observe.status import Status
from vgpu_agent.observe.web import Web, listen
from vgpu_agent.settings import Address

GIB = 2**30
MPS = Sharing(MpsSharing(pipe_directory="/mps/pipe", shm_directory=None), GIB // 2)
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
"""Index of the card, who, which vGPUs, GiB in use."""


def chromium() -> str | None:
    """Debian's browser, where it is installed."""
    return shutil.which("chromium")


@asynccontextmanager
async def browsing() -> AsyncIterator[Browser]:
    """A browser without a window. It runs as root and in small containers too."""
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(
            executable_path=chromium(), args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        try:
            yield browser
        finally:
            with anyio.CancelScope(shield=True):
                await browser.close()


def node(state: NodeState, *, cards: int = 2) -> None:
    """A node where all is well: cards, a driver, MPS and a kubelet that follows."""
    gpus = simulated_gpus(cards, "NVIDIA L4", 24 * GIB, (0, 1))
    state.driver_answered("550.90.07", gpus)
    state.mps_seen(Mps(wanted=True, up=True, limits_in_force=True), (), {})
    state.registration_tried(RegistrationResult.REGISTERED)
    state.stream_opened()
    state.holders_told(())


def hold(state: NodeState, *holders: tuple[int, Holder, range]) -> None:
    """Says that these and no others hold vGPUs of the cards of that index."""
    cards = state.snapshot.inventory.cards
    state.holders_told(
        tuple(
            Assignment(holder, tuple(device_id(cards[index].gpu.uuid, n) for n in numbers))
            for index, holder, numbers in holders
        )
    )


def busy(state: NodeState) -> None:
    """The node of the picture: pods on both cards, one over its share, one card with a fault."""
    node(state)
    hold(state, *(pod[:3] for pod in PODS))
    uuids = [card.gpu.uuid for card in state.snapshot.inventory.cards]
    used = {
        (uuids[index], holder): Used(1, int(gib * GIB)) for index, holder, _numbers, gib in PODS
    }
    state.usage_told(Usage(MappingProxyType(used), MappingProxyType(dict.fromkeys(uuids, 0))))
    state.memory_used(
        {
            uuid: int(sum(pod[3] for pod in PODS if pod[0] == index) * GIB) + GIB // 2
            for index, uuid in enumerate(uuids)
        }
    )
    fault = Fault(
        Reason.ECC,
        time.time() - 600,
        "2 uncorrectable memory errors",
        until_reset=True,
        advice="drain the card's pods, let go of it (`vgpu-agent release`), reset it",
    )
    state.fault_found([uuids[1]], fault)


@asynccontextmanager
async def site(
    state: NodeState, address: Address = LOOPBACK, *, health_checks: bool = True
) -> AsyncIterator[Address]:
    """Serves that state; where it does."""
    resource = "k8s.amazonaws.com/vgpu"
    web = Web(
        listener=listen(address),
        state=state,
        metrics=Metrics(version="1.2.3", resource_name=resource, sharing=MPS),
        status=Status("1.2.3", resource, health_checks, sharing=MPS, host="gpu-node-1"),
    )
    async with anyio.create_task_group() as tasks:
        await tasks.start(web.run)
        yield web.address
        tasks.cancel_scope.cancel()


async def main(picture: Path = PICTURE, **options: str) -> None:
    """Makes the picture. `options` are those of the browser's page, such as its color_scheme."""
    state = NodeState(Division(10))
    busy(state)
    async with site(state) as address, browsing() as browser:
        page = await browser.new_page(viewport={"width": 1200, "height": 700}, **options)
        await page.goto(f"http://{address}/")
        await page.get_by_text("whisper-1").first.wait_for()
        await page.screenshot(path=picture, full_page=True)


if __name__ == "__main__":
    anyio.run(main)
