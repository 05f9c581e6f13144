"""The page at / in a real browser, on a Web whose state the tests change."""

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from itertools import product

import pytest
from playwright.async_api import Browser, Locator, Page, expect

from tests import screenshot
from tests.screenshot import ShownNode
from vgpu_agent.address import Address
from vgpu_agent.gpu.simulated import simulated_gpus
from vgpu_agent.model.devices import Fault, Reason
from vgpu_agent.model.holders import Assignment, Holder
from vgpu_agent.model.node import Node
from vgpu_agent.model.snapshot import Driver, RegistrationResult

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("chromium")]

RESNET = Holder("vision", "resnet-0", "server")
LLAMA = Holder("language", "llama-0", "vllm")
FAULT = Fault(Reason.LOST, 1_700_000_000.0, "fell off the bus")
PATIENCE = 20_000
"""Milliseconds in which the page has to show what it is to show."""

CONTRASTS = """() => {
  const parse = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const light = (colour) => {
    const [r, g, b] = parse(colour).map((c) => c / 255)
      .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (node) => {
    const colour = getComputedStyle(node).backgroundColor;
    return parse(colour)[3] === 0 ? behind(node.parentElement) : colour;
  };
  return [...document.body.querySelectorAll("*")]
    .filter((node) => node.checkVisibility() && !node.closest(".sr, script, template"))
    .filter((node) => [...node.childNodes].some((c) => c.nodeType === 3 && c.data.trim()))
    .map((node) => {
      const [a, b] = [light(getComputedStyle(node).color), light(behind(node))];
      return [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), node.textContent];
    });
}"""
"""The contrast of every text on the page with what is behind it."""


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    """One loop for all, since the browser lives as long."""
    return "asyncio"


@pytest.fixture(scope="module")
async def browser() -> AsyncIterator[Browser]:
    if screenshot.chromium() is None:
        pytest.skip("chromium is not installed (Debian: package chromium)")
    async with screenshot.browsing() as browser:
        yield browser


@pytest.fixture
def node() -> ShownNode:
    """Two GPUs of ten vGPUs each that nobody holds."""
    node = ShownNode()
    node.start()
    return node


@dataclass
class Tab:
    """An open page, what it complained of, and what it asked for."""

    page: Page
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def gpu(self, index: int) -> Locator:
        return self.page.get_by_role("region", name=f"GPU {index} ·")

    def slots(self, index: int) -> Locator:
        return self.gpu(index).locator(".slots > li")

    async def refreshed(self, times: int = 1) -> None:
        """Until that many more reports were asked for and answered."""
        for _ in range(times):
            async with self.page.expect_response("**/status.json", timeout=PATIENCE) as told:
                pass
            await (await told.value).finished()


@asynccontextmanager
async def visiting(
    browser: Browser, address: Address, *, own_clock: bool = False, **options: object
) -> AsyncIterator[Tab]:
    """The page in a fresh context; it may complain of nothing and ask nobody else."""
    expect.set_options(timeout=PATIENCE)
    context = await browser.new_context(**options)
    try:
        page = await context.new_page()
        tab = Tab(page)
        if own_clock:
            await page.clock.install()
        page.on("console", lambda message: tab.complaints.append(message.text))
        page.on("pageerror", lambda error: tab.complaints.append(str(error)))
        page.on("request", lambda request: tab.requests.append(request.url))
        await page.goto(f"http://{address}/")
        yield tab
        assert tab.complaints == []
        assert {url.rpartition("/")[0] for url in tab.requests} == {f"http://{address}"}
    finally:
        await context.close()


@asynccontextmanager
async def showing(browser: Browser, node: Node, **options: object) -> AsyncIterator[Tab]:
    async with (
        screenshot.site(node) as address,
        visiting(browser, address, **options) as tab,
    ):
        yield tab


# What it shows


async def test_it_shows_the_node_and_every_vgpu_of_every_gpu(browser, node):
    async with showing(browser, node) as tab:
        page = tab.page
        await expect(page).to_have_title("gpu-node-1: vGPUs")
        await expect(page.get_by_role("heading", level=1)).to_have_text("gpu-node-1")
        await expect(page.locator("#node")).to_contain_text("k8s.amazonaws.com/vgpu")
        await expect(page.locator("#node")).to_contain_text("1.2.3")
        await expect(page.locator("#node")).to_contain_text("pod kube-system/vgpu-agent-x7k2p")
        await expect(page.locator("#node")).to_contain_text(re.compile(r"as of \d\d:\d\d:\d\d UTC"))
        words = "This node accepts vGPU pods: 20 of 20 free, largest block 10 (GPU 0)"
        await expect(page.locator("#verdict")).to_have_text(words)
        await expect(page.locator("#state > li")).to_have_text(
            [
                re.compile("driver.*550.90.07"),
                re.compile("mps.*2 of 2 GPUs are served"),
                re.compile("GPUs.*2 of 2 GPUs are shared"),
                re.compile("kubelet.*registered"),
                re.compile("podresources.*who holds"),
            ]
        )
        await expect(page.locator("#sum")).to_have_text("20 vGPUs on 2 GPUs: 20 free · 0 held")
        await expect(page.locator("#todo")).to_be_hidden()
        for index, gpu in enumerate(node.gpus):
            await expect(tab.slots(index)).to_have_text(
                [re.compile(rf"vGPU {n}\s+free") for n in range(10)]
            )
            await expect(tab.gpu(index).locator(".uuid")).to_be_hidden()
            await tab.gpu(index).locator("summary").press("Enter")
            await expect(tab.gpu(index).get_by_text(gpu.uuid)).to_be_visible()
            await expect(tab.gpu(index)).to_contain_text(f"NUMA node {index}")
            await expect(tab.gpu(index)).to_contain_text("24.0\u00a0GiB")
            await expect(tab.gpu(index)).to_contain_text("healthy")


async def test_it_shows_use_and_share_and_who_is_over_it(browser):
    node = ShownNode()
    node.busy()
    async with showing(browser, node) as tab:
        rows = tab.gpu(0).locator("tbody tr")
        await expect(rows).to_have_count(4)
        await expect(rows.nth(1)).to_have_text(
            re.compile(
                r"B\s+detector-0\s*vision / triton\s+3 of 10 \(2.4\)\s*7\.0.GiB\s*6\.4.GiB\s*$"
            )
        )
        await expect(tab.gpu(0).get_by_text("over share")).to_have_count(1)
        await expect(rows.nth(2)).to_contain_text("2.9\u00a0GiB ▲ over share")
        await expect(tab.gpu(0).locator(".memory")).to_contain_text("17.1\u00a0GiB used of")


async def test_a_gpu_that_fails_says_why_and_heals(browser, node):
    node.hold((0, RESNET, range(2)))
    async with showing(browser, node) as tab:
        await expect(tab.gpu(0).locator(".health")).to_have_text("✓ healthy")
        node.fail(0, FAULT)
        await expect(tab.gpu(0).locator(".health")).to_have_text("✕ unhealthy")
        await expect(tab.gpu(0).locator(".findings")).to_have_text(
            "unhealthy: lost since 2023-11-14 22:13:20 UTC: fell off the bus (ends after passed"
            " probes)"
        )
        await expect(tab.page.locator("#todo")).to_contain_text("GPU 0: drain the node and reboot")
        await expect(tab.page.locator("#todo code.command").last).to_have_text(
            "kubectl uncordon gpu-node-1"
        )
        await expect(tab.slots(0).first).to_have_text(re.compile("resnet-0, unhealthy"))
        await expect(tab.slots(0).last).to_have_text(re.compile("unhealthy"))
        await expect(tab.slots(1).last).to_have_text(re.compile("free"))
        await expect(tab.page.locator("#news")).to_contain_text("GPU 0 is unhealthy: lost")
        await expect(tab.page.locator("#sum")).to_have_text(
            "20 vGPUs on 2 GPUs: 10 free · 2 held (2 of them on unhealthy GPUs) · 8 unhealthy"
        )
        node.heal(0)
        await expect(tab.gpu(0).locator(".health")).to_have_text("✓ healthy")
        await expect(tab.gpu(0).locator(".findings > li")).to_have_count(0)
        await expect(tab.page.locator("#todo")).to_be_hidden()
        await expect(tab.page.locator("#news")).to_contain_text("GPU 0 is healthy again")


async def test_a_pod_comes_and_goes_without_a_reload(browser, node):
    async with showing(browser, node) as tab:
        await expect(tab.slots(0)).to_have_count(10)
        await tab.page.evaluate("window.sameDocument = true")
        node.hold((0, LLAMA, range(3, 8)), (1, RESNET, range(1)))
        await expect(tab.slots(0).nth(3)).to_have_text(re.compile(r"vGPU 3\s+A\s+llama-0"))
        await expect(tab.slots(0).nth(2)).to_have_text(re.compile("free"))
        await expect(tab.slots(1).first).to_have_text(re.compile(r"vGPU 0\s+B\s+resnet-0"))
        row = tab.gpu(0).get_by_role("row", name="llama-0")
        await expect(row).to_contain_text("language / vllm")
        await expect(row).to_contain_text("5 of 10 (3\u20137)")
        await expect(tab.page.locator("#news")).to_contain_text("pod language/llama-0 came")
        node.hold((1, RESNET, range(1)))
        await expect(tab.slots(0).nth(3)).to_have_text(re.compile("free"))
        await expect(tab.gpu(0)).to_contain_text("No pod holds a vGPU of this GPU.")
        await expect(tab.page.locator("#news")).to_contain_text("pod language/llama-0 went")
        # It keeps its letter when others go.
        await expect(tab.slots(1).first).to_have_text(re.compile(r"B\s+resnet-0"))
        assert await tab.page.evaluate("window.sameDocument") is True


async def test_unknown_holders_are_not_shown_as_free(browser, node):
    node.hold((0, RESNET, range(2)))
    async with showing(browser, node) as tab:
        await expect(tab.slots(0).first).to_have_text(re.compile("resnet-0"))
        node.assignments_failed("connection refused", forget=False)
        line = tab.page.locator("#state > li", has_text="podresources")
        await expect(line).to_contain_text(
            "who holds which vGPU, what is shown is older: connection"
        )
        await expect(tab.slots(0).first).to_have_text(re.compile("resnet-0"))
        node.assignments_failed("connection refused", forget=True)
        await expect(tab.slots(0)).to_have_text([re.compile("unknown")] * 10)
        await expect(tab.page.get_by_text("free")).to_have_count(0)
        await expect(tab.page.locator("#sum")).to_contain_text("who holds them is unknown")


async def test_a_node_without_a_driver_and_gpus_says_so(browser):
    node = ShownNode()
    node.driver_looked(Driver(None, "no NVIDIA driver library"), None, {})
    async with showing(browser, node) as tab:
        await expect(tab.page.locator("#none")).to_have_text("No GPU is shared.")
        await expect(tab.page.locator("#verdict")).to_have_text(
            "No new vGPU pods: kubelet not connected yet; the NVIDIA driver does not answer yet"
        )
        await expect(tab.page.locator("#state")).to_contain_text("driver no NVIDIA driver library")
        await expect(tab.page.locator("#state")).to_contain_text("not registered: starting")
        node.start()
        await expect(tab.slots(1)).to_have_count(10)
        await expect(tab.page.locator("#none")).to_be_hidden()


async def test_what_is_wrong_with_the_node_is_shown(browser):
    node = ShownNode(health_checks=False)
    node.start()
    old = replace(
        simulated_gpus(3, "NVIDIA P4", screenshot.GIB, (0,))[2], compute_capability=(6, 1)
    )
    node.look(old)
    node.set_assignments((Assignment(RESNET, ("GPU-gone::3",)),), "the checkpoint is damaged")
    node.daemon("its limits are others")
    node.driver_released(1_700_000_000.0)
    async with showing(browser, node) as tab:
        page = tab.page
        await expect(page.get_by_role("region", name="Excluded GPUs")).to_contain_text(
            "compute-capability: compute capability 6.1 is below 7.0"
        )
        for words in (
            "held, but no longer advertised: GPU-gone::3",
            "the checkpoint is damaged",
            "its limits are others",
            "released for a reset until 2023-11-14 22:13:20 UTC",
            "health checks off",
        ):
            await expect(page.locator("#state")).to_contain_text(words)


@pytest.mark.parametrize(
    ("happened", "level", "words"),
    [
        ({}, "ok", "This node accepts vGPU pods: 18 of 20 free"),
        ({"full": True}, "", "No new vGPU pods: all 20 vGPUs are held"),
        ({"unknown": True}, "", "20 of 20 healthy, who holds them is unknown"),
        ({"away": True}, "bad", "No new vGPU pods: kubelet not connected since"),
        ({"ill": True}, "bad", "No new vGPU pods: all 2 GPUs are unhealthy (lost)"),
        ({"ill": True, "released": True}, "warn", "released for a reset until"),
    ],
)
async def test_the_verdict_comes_first_in_its_colour(browser, node, happened, level, words):
    node.hold((0, RESNET, range(2)))
    if "full" in happened:
        node.hold((0, RESNET, range(10)), (1, LLAMA, range(10)))
    if "unknown" in happened:
        node.assignments_failed("gone", forget=True)
    if "away" in happened:
        node.registration_ended("no kubelet", away=True)
    for index in range(2) if "ill" in happened else ():
        node.fail(index, FAULT)
    if "released" in happened:
        node.driver_released(2e9)
    async with showing(browser, node) as tab:
        await expect(tab.page.locator("#verdict")).to_contain_text(words)
        assert await tab.page.locator("#verdict").get_attribute("class") == level
        first = tab.page.locator("main > :first-child")
        await expect(first).to_have_id("verdict")


async def test_an_advice_stands_there_once_with_commands_to_paste(browser, node):
    for index in range(2):
        node.fail(index, FAULT)
    node.registration_ended("no kubelet", away=True)
    async with showing(browser, node) as tab:
        advice = tab.page.locator("#todo > ul > li")
        await expect(advice).to_have_text(
            [
                re.compile(r"^\s*kubelet: if this lasts"),
                re.compile(r"^\s*GPU 0, GPU 1: drain the n"),
            ]
        )
        command = advice.last.locator("code").last
        await expect(command).to_have_text("kubectl uncordon gpu-node-1")
        # A click takes all of it.
        await command.click()
        assert await tab.page.evaluate("String(getSelection())") == "kubectl uncordon gpu-node-1"
        # Many commands are folded away, and stay as they were put.
        node.fail(0)
        await expect(advice.locator("summary")).to_have_text(
            ["3 commands", "10 commands", "4 commands"]
        )
        await expect(advice.nth(1).locator("code").last).to_be_hidden()
        await advice.nth(1).locator("summary").click()
        await tab.refreshed()
        await expect(advice.nth(1).locator("code").last).to_be_visible()


@pytest.mark.parametrize(
    ("width", "vgpus", "columns"), [(1280, 10, 5), (360, 10, 5), (1280, 48, 10)]
)
async def test_vgpus_stand_in_rows_of_five_or_ten(browser, width, vgpus, columns):
    node = ShownNode(vgpus)
    node.start()
    async with showing(browser, node, viewport={"width": width, "height": 800}) as tab:
        await expect(tab.slots(0)).to_have_count(vgpus)
        tops = await tab.slots(0).evaluate_all("nodes => nodes.map((node) => node.offsetTop)")
        assert tops.count(min(tops)) == columns


GREEN = "rgb(17, 99, 41)"


async def test_what_cannot_be_scheduled_is_not_green(browser, node):
    async def greens(tab: Tab, index: int) -> set[str]:
        """What is green of a GPU, as people see it: border and text of slots, health, edge."""
        look = """(gpu, green) => [gpu, ...gpu.querySelectorAll(".slots li, .health")]
          .filter((node) => Object.values(["color", "borderColor", "borderLeftColor"])
            .some((name) => getComputedStyle(node)[name].includes(green)))
          .map((node) => node.className.trim())"""
        return set(await tab.gpu(index).evaluate(look, GREEN))

    node.hold((0, RESNET, range(2)))
    async with showing(browser, node, color_scheme="light") as tab:
        verdict = tab.page.locator("#verdict")
        await expect(verdict).to_contain_text("18 of 20 free, largest block 10")
        assert await greens(tab, 0) == {"gpu schedulable", "free", "health ok"}
        node.registration_ended("no kubelet", away=True)
        await expect(verdict).to_contain_text("No new vGPU pods")
        assert await greens(tab, 0) == set()
        await expect(tab.slots(0).last).to_have_text(re.compile("free"))
        node.registration_tried(RegistrationResult.REGISTERED)
        await expect(verdict).to_contain_text("largest block")
        node.fail(0)
        await expect(tab.gpu(0).locator(".health")).to_have_text("✕ unhealthy")
        assert await greens(tab, 0) == set()
        assert await greens(tab, 1) == {"gpu schedulable", "free", "health ok"}


async def test_names_of_pods_are_text_and_nothing_else(browser, node):
    hostile = "<img src=x onerror=document.title='taken'>"
    node.hold((0, Holder(hostile, hostile, hostile), range(1)))
    node.fail(0, Fault(Reason.PROBE, 0.0, hostile))
    async with showing(browser, node) as tab:
        await expect(tab.slots(0).first).to_contain_text(hostile)
        await expect(tab.gpu(0).locator(".pod")).to_have_text(hostile)
        await expect(tab.gpu(0).locator(".findings")).to_contain_text(hostile)
        await expect(tab.page.locator("img")).to_have_count(0)
        await expect(tab.page).to_have_title("gpu-node-1: vGPUs")


async def test_its_policy_lets_no_other_script_run_and_no_other_address_be_asked(browser, node):
    async with showing(browser, node) as tab:
        refused = await tab.page.evaluate(
            """async () => {
              const script = document.createElement("script");
              script.textContent = "window.ran = true";
              document.body.append(script);
              const asked = await fetch("http://127.0.0.1:1/").then(() => true, () => false);
              return [window.ran === undefined, asked];
            }"""
        )
        assert refused == [True, False]
        await expect(tab.slots(0)).to_have_count(10)
        for directive in ("script-src", "Refused to connect"):
            assert any(directive in each for each in tab.complaints)
        assert all("Content Security Policy" in each for each in tab.complaints)
        tab.complaints.clear()


# How it keeps up


async def test_what_did_not_change_is_left_alone(browser, node):
    node.hold((0, RESNET, range(2)))
    async with showing(browser, node) as tab:
        page = tab.page
        await expect(tab.slots(0)).to_have_count(10)
        await page.evaluate(
            """() => {
              window.changed = new Set();
              new MutationObserver((records) => records.forEach((record) => {
                const node = record.target;
                window.changed.add((node.nodeType === 3 ? node.parentElement : node).id);
              })).observe(document.body, { subtree: true, childList: true, characterData: true });
              getSelection().selectAllChildren(document.querySelector(".pod"));
            }"""
        )
        await page.get_by_role("link", name="/metrics").focus()
        await tab.refreshed(2)
        assert set(await page.evaluate("[...window.changed]")) <= {"node"}
        node.hold((0, LLAMA, range(9, 10)), (0, RESNET, range(2)))
        await expect(tab.slots(0).last).to_have_text(re.compile("llama-0"))
        assert await page.evaluate("String(getSelection())") == "resnet-0"
        await expect(page.get_by_role("link", name="/metrics")).to_be_focused()


async def test_an_agent_that_is_away_is_told_and_found_again(browser, node):
    async with screenshot.site(node) as address:
        context = await browser.new_context()
        page = await context.new_page()
        await page.goto(f"http://{address}/")
        await expect(page.locator(".slots > li")).to_have_count(20)
    trouble = page.locator("#trouble")
    await expect(trouble).to_contain_text("The agent is not answering since", timeout=PATIENCE)
    await expect(page.locator(".slots > li")).to_have_count(20)
    node.hold((0, RESNET, range(1)))
    async with screenshot.site(node, address):
        await expect(trouble).to_be_empty(timeout=PATIENCE)
        await expect(page.get_by_role("row", name="resnet-0")).to_be_visible()
        await context.close()


async def test_it_asks_nothing_while_nobody_looks_or_it_is_paused(browser, node):
    async with showing(browser, node, own_clock=True) as tab:
        page = tab.page
        await expect(tab.slots(0)).to_have_count(10)

        async def is_quiet() -> bool:
            before = len(tab.requests)
            await page.clock.run_for(60_000)
            return len(tab.requests) == before

        async def hide(hidden: str) -> None:
            await page.evaluate(
                f"""Object.defineProperty(
                  document, "hidden", {{ value: {hidden}, configurable: true }}
                );
                document.dispatchEvent(new Event("visibilitychange"))"""
            )

        pause = page.get_by_role("button", name="Pause updates")
        await tab.refreshed()
        await hide("true")
        assert await is_quiet()
        await hide("false")
        await tab.refreshed()
        await pause.press("Space")
        await expect(pause).to_have_attribute("aria-pressed", "true")
        assert await is_quiet()
        await pause.press("Space")
        await tab.refreshed()


# For everyone


async def test_a_screen_reader_finds_headings_lists_and_tables(browser, node):
    node.hold((0, RESNET, range(2)))
    async with showing(browser, node) as tab:
        page = tab.page
        await expect(page.get_by_role("banner")).to_have_count(1)
        await expect(page.get_by_role("main")).to_have_count(1)
        await expect(page.get_by_role("contentinfo")).to_have_count(1)
        await expect(page.get_by_role("heading", level=2)).to_have_text(
            ["State of the node", "GPU 0 · NVIDIA L4", "GPU 1 · NVIDIA L4"]
        )
        table = tab.gpu(0).get_by_role("table", name="Who holds vGPUs of GPU 0")
        # Use is not measured here, and has no column.
        await expect(table.get_by_role("columnheader")).to_have_text(["Pod", "vGPUs", "Share"])
        await expect(table.get_by_role("rowheader")).to_contain_text("resnet-0")
        await expect(tab.gpu(0).get_by_role("listitem")).to_have_count(10)
        await expect(page.get_by_role("status")).to_have_count(2)


async def test_everything_is_reached_by_keyboard(browser, node):
    async with showing(browser, node) as tab:
        await expect(tab.slots(0)).to_have_count(10)
        reached = []
        for _ in range(5):
            await tab.page.keyboard.press("Tab")
            focused = tab.page.locator(":focus-visible")
            reached.append(await focused.text_content())
            outline = await focused.evaluate("node => getComputedStyle(node).outlineStyle")
            assert outline == "solid"
        uuids = [f"GPU-0000000{index}…" for index in range(2)]
        assert reached == ["Pause updates", *uuids, "/status.json", "/metrics"]


@pytest.mark.parametrize("vgpus", [10, 48])
async def test_a_phone_shows_it_without_scrolling_sideways(browser, vgpus):
    node = ShownNode(vgpus)
    node.busy()
    long = Holder("n" * 63, "pod-" + "x" * 240, "c" * 63)
    holders = [pod[:3] for pod in screenshot.PODS]
    node.hold((0, long, range(9, 10)), *holders)
    async with showing(browser, node, viewport={"width": 360, "height": 740}) as tab:
        await expect(tab.slots(1)).to_have_count(vgpus)
        width = await tab.page.evaluate("document.documentElement.scrollWidth")
        assert width == 360


@pytest.mark.parametrize("case", screenshot.CASES)
async def test_every_case_is_readable_on_desk_and_phone(browser, case):
    node = ShownNode()
    screenshot.CASES[case](node)
    async with screenshot.site(node) as address:
        for scheme, width in product(("light", "dark"), (1280, 390)):
            viewport = {"width": width, "height": 800}
            async with visiting(browser, address, viewport=viewport, color_scheme=scheme) as tab:
                await expect(tab.page.locator("#verdict")).to_contain_text("vGPU pods: ")
                await tab.page.evaluate(
                    "document.querySelectorAll('details').forEach((each) => { each.open = true; })"
                )
                assert await tab.page.evaluate("document.documentElement.scrollWidth") == width
                contrasts = await tab.page.evaluate(CONTRASTS)
                assert [each for each in contrasts if each[0] < 4.5] == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_every_text_is_readable_in_both_colour_schemes(browser, scheme):
    node = ShownNode()
    node.busy()
    many = [(0, Holder("n", f"p{n}", "c"), range(n, n + 1)) for n in range(10)]
    node.hold(*many, (1, RESNET, range(2)))
    async with showing(browser, node, color_scheme=scheme) as tab:
        await expect(tab.slots(1)).to_have_count(10)
        behind = await tab.page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert behind == {"light": "rgb(243, 244, 246)", "dark": "rgb(13, 17, 23)"}[scheme]
        contrasts = await tab.page.evaluate(CONTRASTS)
        assert len(contrasts) > 60
        assert [each for each in contrasts if each[0] < 4.5] == []


async def test_nothing_moves_for_those_who_do_not_want_it(browser, node):
    node.memory = {gpu.uuid: screenshot.GIB for gpu in node.gpus}
    node.look()
    for motion, seconds in (("reduce", "0s"), ("no-preference", "0.4s")):
        async with showing(browser, node, reduced_motion=motion) as tab:
            await expect(tab.slots(1)).to_have_count(10)
            bar = tab.gpu(0).locator(".bar i")
            assert await bar.evaluate("n => getComputedStyle(n).transitionDuration") == seconds


async def test_without_javascript_it_points_to_the_data(browser, node):
    async with showing(browser, node, java_script_enabled=False) as tab:
        link = tab.page.locator("noscript a")
        await expect(link).to_have_attribute("href", "status.json")
        await expect(link).to_be_visible()
