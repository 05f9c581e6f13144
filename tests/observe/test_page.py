"""The page at / in a real browser, on a Web whose state the tests change."""

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest
from playwright.async_api import Browser, Locator, Page, expect

from tests import screenshot
from vgpu_agent.gpu.simulated import simulated_gpus
from vgpu_agent.model.devices import Card, Excluded, Fault, Reason
from vgpu_agent.model.holders import Assignment, Holder
from vgpu_agent.model.share import Division
from vgpu_agent.model.state import Mps, NodeState
from vgpu_agent.settings import Address

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("chromium")]

RESNET = Holder("vision", "resnet-0", "server")
LLAMA = Holder("language", "llama-0", "vllm")
FAULT = Fault(Reason.LOST, 1_700_000_000.0, "fell off the bus", advice="look at the kernel log")
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
def state() -> NodeState:
    """Two cards of ten vGPUs each that nobody holds."""
    state = NodeState(Division(10))
    screenshot.node(state)
    return state


@dataclass
class Tab:
    """An open page, what it complained of, and what it asked for."""

    page: Page
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def card(self, index: int) -> Locator:
        return self.page.get_by_role("region", name=f"GPU {index} ·")

    def slots(self, index: int) -> Locator:
        return self.card(index).locator(".slots > li")

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
async def showing(
    browser: Browser, state: NodeState, *, health_checks: bool = True, **options: object
) -> AsyncIterator[Tab]:
    async with (
        screenshot.site(state, health_checks=health_checks) as address,
        visiting(browser, address, **options) as tab,
    ):
        yield tab


def cards(state: NodeState) -> tuple[Card, ...]:
    return state.snapshot.inventory.cards


# What it shows


async def test_it_shows_the_node_and_every_vgpu_of_every_card(browser, state):
    async with showing(browser, state) as tab:
        page = tab.page
        await expect(page).to_have_title("gpu-node-1: vGPUs")
        await expect(page.get_by_role("heading", level=1)).to_have_text("gpu-node-1")
        await expect(page.locator("#node")).to_contain_text("k8s.amazonaws.com/vgpu")
        await expect(page.locator("#node")).to_contain_text("1.2.3")
        await expect(page.locator("#state > li")).to_have_text(
            [
                re.compile("Kubelet.*registered"),
                re.compile("Driver.*550.90.07"),
                re.compile("MPS.*up, limits in force"),
                re.compile("PodResources.*told by the kubelet"),
            ]
        )
        await expect(page.locator("#sum")).to_have_text(
            "20 vGPUs on 2 cards · 0 held · 20 free · the largest request that fits: 10"
        )
        for index, card in enumerate(cards(state)):
            await expect(tab.slots(index)).to_have_text(
                [re.compile(rf"vGPU {n}\s+free") for n in range(10)]
            )
            await expect(tab.card(index).locator(".uuid")).to_have_text(card.gpu.uuid)
            await expect(tab.card(index)).to_contain_text(f"NUMA node {index}")
            await expect(tab.card(index)).to_contain_text("24.0\u00a0GiB")
            await expect(tab.card(index)).to_contain_text("healthy")


async def test_it_shows_use_and_share_and_who_is_over_it(browser):
    state = NodeState(Division(10))
    screenshot.busy(state)
    async with showing(browser, state) as tab:
        rows = tab.card(0).locator("tbody tr")
        await expect(rows).to_have_count(4)
        await expect(rows.nth(1)).to_have_text(
            re.compile(
                r"B\s+detector-0\s*vision / triton\s+3 of 10 \(2.4\)\s*7\.0.GiB\s*6\.4.GiB\s*$"
            )
        )
        await expect(tab.card(0).get_by_text("over share")).to_have_count(1)
        await expect(rows.nth(2)).to_contain_text("2.9\u00a0GiB ▲ over share")
        await expect(tab.card(0).locator(".memory")).to_contain_text("17.1\u00a0GiB used of")


async def test_a_card_that_fails_says_why_and_heals(browser, state):
    screenshot.hold(state, (0, RESNET, range(2)))
    uuid = cards(state)[0].gpu.uuid
    async with showing(browser, state) as tab:
        await expect(tab.card(0).locator(".health")).to_have_text("✓ healthy")
        state.fault_found([uuid], FAULT)
        await expect(tab.card(0).locator(".health")).to_have_text("✕ unhealthy")
        await expect(tab.card(0).locator(".faults")).to_contain_text(
            "lost: fell off the bus, since"
        )
        await expect(tab.card(0).locator(".faults")).to_contain_text("look at the kernel log")
        await expect(tab.slots(0).first).to_have_text(re.compile("resnet-0, unhealthy"))
        await expect(tab.slots(0).last).to_have_text(re.compile("unhealthy"))
        await expect(tab.slots(1).last).to_have_text(re.compile("free"))
        await expect(tab.page.locator("#news")).to_contain_text("GPU 0 is unhealthy: lost")
        await expect(tab.page.locator("#sum")).to_contain_text("10 on unhealthy cards")
        state.faults_cleared(uuid, [Reason.LOST])
        await expect(tab.card(0).locator(".health")).to_have_text("✓ healthy")
        await expect(tab.card(0).locator(".faults > li")).to_have_count(0)
        await expect(tab.page.locator("#news")).to_contain_text("GPU 0 is healthy again")


async def test_a_pod_comes_and_goes_without_a_reload(browser, state):
    async with showing(browser, state) as tab:
        await expect(tab.slots(0)).to_have_count(10)
        await tab.page.evaluate("window.sameDocument = true")
        screenshot.hold(state, (0, LLAMA, range(3, 8)), (1, RESNET, range(1)))
        await expect(tab.slots(0).nth(3)).to_have_text(re.compile(r"vGPU 3\s+A\s+llama-0"))
        await expect(tab.slots(0).nth(2)).to_have_text(re.compile("free"))
        await expect(tab.slots(1).first).to_have_text(re.compile(r"vGPU 0\s+B\s+resnet-0"))
        row = tab.card(0).get_by_role("row", name="llama-0")
        await expect(row).to_contain_text("language / vllm")
        await expect(row).to_contain_text("5 of 10 (3\u20137)")
        await expect(tab.page.locator("#news")).to_contain_text("pod language/llama-0 came")
        screenshot.hold(state, (1, RESNET, range(1)))
        await expect(tab.slots(0).nth(3)).to_have_text(re.compile("free"))
        await expect(tab.card(0)).to_contain_text("No pod holds a vGPU of this card.")
        await expect(tab.page.locator("#news")).to_contain_text("pod language/llama-0 went")
        # It keeps its letter when others go.
        await expect(tab.slots(1).first).to_have_text(re.compile(r"B\s+resnet-0"))
        assert await tab.page.evaluate("window.sameDocument") is True


async def test_unknown_holders_are_not_shown_as_free(browser, state):
    screenshot.hold(state, (0, RESNET, range(2)))
    async with showing(browser, state) as tab:
        await expect(tab.slots(0).first).to_have_text(re.compile("resnet-0"))
        state.holders_failed("connection refused", forget=False)
        line = tab.page.locator("#state > li", has_text="PodResources")
        await expect(line).to_contain_text("not told by the kubelet: connection refused")
        await expect(tab.slots(0).first).to_have_text(re.compile("resnet-0"))
        state.holders_failed("connection refused", forget=True)
        await expect(tab.slots(0)).to_have_text([re.compile("unknown")] * 10)
        await expect(tab.page.get_by_text("free")).to_have_count(0)
        await expect(tab.page.locator("#sum")).to_contain_text("who holds them is not known")


async def test_a_node_without_a_driver_and_cards_says_so(browser):
    state = NodeState(Division(10))
    state.driver_failed("no NVIDIA driver library")
    async with showing(browser, state) as tab:
        await expect(tab.page.locator("#none")).to_have_text(
            "No card is offered: no NVIDIA driver library."
        )
        await expect(tab.page.locator("#state")).to_contain_text("down: no NVIDIA driver library")
        await expect(tab.page.locator("#state")).to_contain_text("not registered yet")
        screenshot.node(state)
        await expect(tab.slots(1)).to_have_count(10)
        await expect(tab.page.locator("#none")).to_be_hidden()


async def test_what_is_wrong_with_the_node_is_told(browser, state):
    left = simulated_gpus(3, "NVIDIA K80", screenshot.GIB, (0,))[2]
    state.driver_answered(
        "550.90.07",
        [card.gpu for card in cards(state)],
        [Excluded(left, "too-old", "MPS needs compute capability 7.0")],
    )
    state.holders_told((Assignment(RESNET, ("GPU-gone::3",)),))
    state.mps_seen(Mps(wanted=True, up=True, problem="its limits are others"), (), {})
    state.driver_released(1_700_000_000.0)
    async with showing(browser, state, health_checks=False) as tab:
        page = tab.page
        await expect(page.get_by_role("region", name="Cards that are left out")).to_contain_text(
            "too-old: MPS needs compute capability 7.0"
        )
        await expect(page.get_by_role("region", name="Held, but no longer made")).to_contain_text(
            "GPU-gone::3"
        )
        for words in ("its limits are others", "let go of for a reset until", "Health checks"):
            await expect(page.locator("#state")).to_contain_text(words)


async def test_names_of_pods_are_text_and_nothing_else(browser, state):
    hostile = "<img src=x onerror=document.title='taken'>"
    screenshot.hold(state, (0, Holder(hostile, hostile, hostile), range(1)))
    state.fault_found([cards(state)[0].gpu.uuid], Fault(Reason.PROBE, 0.0, hostile))
    async with showing(browser, state) as tab:
        await expect(tab.slots(0).first).to_contain_text(hostile)
        await expect(tab.card(0).locator(".pod")).to_have_text(hostile)
        await expect(tab.card(0).locator(".faults")).to_contain_text(hostile)
        await expect(tab.page.locator("img")).to_have_count(0)
        await expect(tab.page).to_have_title("gpu-node-1: vGPUs")


async def test_its_policy_lets_no_other_script_run_and_no_other_address_be_asked(browser, state):
    async with showing(browser, state) as tab:
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


async def test_what_did_not_change_is_left_alone(browser, state):
    screenshot.hold(state, (0, RESNET, range(2)))
    async with showing(browser, state) as tab:
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
        screenshot.hold(state, (0, LLAMA, range(9, 10)), (0, RESNET, range(2)))
        await expect(tab.slots(0).last).to_have_text(re.compile("llama-0"))
        assert await page.evaluate("String(getSelection())") == "resnet-0"
        await expect(page.get_by_role("link", name="/metrics")).to_be_focused()


async def test_an_agent_that_is_away_is_told_and_found_again(browser, state):
    async with screenshot.site(state) as address:
        context = await browser.new_context()
        page = await context.new_page()
        await page.goto(f"http://{address}/")
        await expect(page.locator(".slots > li")).to_have_count(20)
    trouble = page.locator("#trouble")
    await expect(trouble).to_contain_text("The agent is not answering since", timeout=PATIENCE)
    await expect(page.locator(".slots > li")).to_have_count(20)
    screenshot.hold(state, (0, RESNET, range(1)))
    async with screenshot.site(state, address):
        await expect(trouble).to_be_empty(timeout=PATIENCE)
        await expect(page.get_by_role("row", name="resnet-0")).to_be_visible()
        await context.close()


async def test_it_asks_nothing_while_nobody_looks_or_it_is_paused(browser, state):
    async with showing(browser, state, own_clock=True) as tab:
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


async def test_a_screen_reader_finds_headings_lists_and_tables(browser, state):
    screenshot.hold(state, (0, RESNET, range(2)))
    async with showing(browser, state) as tab:
        page = tab.page
        await expect(page.get_by_role("banner")).to_have_count(1)
        await expect(page.get_by_role("main")).to_have_count(1)
        await expect(page.get_by_role("contentinfo")).to_have_count(1)
        await expect(page.get_by_role("heading", level=2)).to_have_text(
            ["State of the node", "GPU 0 · NVIDIA L4", "GPU 1 · NVIDIA L4"]
        )
        table = tab.card(0).get_by_role("table", name="Who holds vGPUs of GPU 0")
        # Use is not measured here, and has no column.
        await expect(table.get_by_role("columnheader")).to_have_text(["Pod", "vGPUs", "Share"])
        await expect(table.get_by_role("rowheader")).to_contain_text("resnet-0")
        await expect(tab.card(0).get_by_role("listitem")).to_have_count(10)
        await expect(page.get_by_role("status")).to_have_count(2)


async def test_everything_is_reached_by_keyboard(browser, state):
    async with showing(browser, state) as tab:
        await expect(tab.slots(0)).to_have_count(10)
        reached = []
        for _ in range(3):
            await tab.page.keyboard.press("Tab")
            focused = tab.page.locator(":focus-visible")
            reached.append(await focused.text_content())
            outline = await focused.evaluate("node => getComputedStyle(node).outlineStyle")
            assert outline == "solid"
        assert reached == ["Pause updates", "/status.json", "/metrics"]


@pytest.mark.parametrize("vgpus", [10, 48])
async def test_a_phone_shows_it_without_scrolling_sideways(browser, vgpus):
    state = NodeState(Division(vgpus))
    screenshot.busy(state)
    long = Holder("n" * 63, "pod-" + "x" * 240, "c" * 63)
    holders = [pod[:3] for pod in screenshot.PODS]
    screenshot.hold(state, (0, long, range(9, 10)), *holders)
    async with showing(browser, state, viewport={"width": 360, "height": 740}) as tab:
        await expect(tab.slots(1)).to_have_count(vgpus)
        width = await tab.page.evaluate("document.documentElement.scrollWidth")
        assert width == 360


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_every_text_is_readable_in_both_colour_schemes(browser, scheme):
    state = NodeState(Division(10))
    screenshot.busy(state)
    many = [(0, Holder("n", f"p{n}", "c"), range(n, n + 1)) for n in range(10)]
    screenshot.hold(state, *many, (1, RESNET, range(2)))
    async with showing(browser, state, color_scheme=scheme) as tab:
        await expect(tab.slots(1)).to_have_count(10)
        behind = await tab.page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert behind == {"light": "rgb(243, 244, 246)", "dark": "rgb(13, 17, 23)"}[scheme]
        contrasts = await tab.page.evaluate(CONTRASTS)
        assert len(contrasts) > 60
        assert [each for each in contrasts if each[0] < 4.5] == []


async def test_nothing_moves_for_those_who_do_not_want_it(browser, state):
    state.memory_used({card.gpu.uuid: screenshot.GIB for card in cards(state)})
    for motion, seconds in (("reduce", "0s"), ("no-preference", "0.4s")):
        async with showing(browser, state, reduced_motion=motion) as tab:
            await expect(tab.slots(1)).to_have_count(10)
            bar = tab.card(0).locator(".bar i")
            assert await bar.evaluate("n => getComputedStyle(n).transitionDuration") == seconds


async def test_without_javascript_it_points_to_the_data(browser, state):
    async with showing(browser, state, java_script_enabled=False) as tab:
        link = tab.page.locator("noscript a")
        await expect(link).to_have_attribute("href", "status.json")
        await expect(link).to_be_visible()
