"""What eight faults look like to people: `python -m tests.shown` writes it into the runbook.

Each is made to happen to the real process, on fake GPUs and beside a kubelet of grpcio. What page,
`status`, `doctor` and log say is taken from them, and the alerts from promtool, which is shown the
metrics of before and after for an hour. Times, paths and PIDs are replaced by ones that stay.
"""

import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import indent

import anyio
import yaml

from tests.agent_process import Agent, execute, running
from tests.fake_nvml import FakeGpu, FakeNvml, build
from tests.kubelet.podresources_peer import Pod, PodResourcesPeer, encoded
from tests.kubelet_peer import KubeletPeer
from tests.mps.fixtures import FakeMps, eventually, made
from tests.observe.machine import Page
from tests.observe.rules import ALERTS, RUNBOOK
from tests.observe.test_alerts_by_fault import scraped
from tests.screenshot import browsing

UUIDS = [f"GPU-a000000{n}-1111-2222-3333-00000000000{n}" for n in range(2)]
GPUS = [FakeGpu(uuid, bus=f"00000000:{n + 1:02X}:00.0") for n, uuid in enumerate(UUIDS)]
NODE, POD = "gpu-node-1", "vgpu-agent-x7k2p"
RESOURCE = "k8s.amazonaws.com/vgpu"
PODS = tuple(
    Pod(name, {"main": {RESOURCE: [f"{UUIDS[0]}::{n}" for n in vgpus]}})
    for name, vgpus in (("llama-0", range(3)), ("resnet-0", range(3, 4)))
)
DRIVER_NOT_LOADED, UNKNOWN = 9, 999
EXCLUSIVE_PROCESS = 3
BEGIN, END, NEWLINE = "<!-- faults -->", "<!-- /faults -->", "\n"

CONTAINER = "6f5c" * 16
"""The ID of the container whose process is over its share."""

PROCESSES = """
from functools import partial
from pathlib import Path
from vgpu_agent.usage import watch
root = Path({!r})
watch.UsageWatch = partial(watch.UsageWatch, proc=root / "proc", links=root / "links")
"""
"""A /proc and the kubelet's links of containers that are the test's."""

WATCH = """
import sys
from vgpu_agent.__main__ import main
sys.argv[1:] = ["mps", "watch"]
main()
"""


@dataclass
class Shown:
    """One node with an agent; `variables` are its settings, `well` its metrics without a fault."""

    root: Path
    stack: ExitStack
    nvml: FakeNvml
    kubelet: KubeletPeer
    variables: dict[str, str] = field(default_factory=dict)
    well: str = ""

    def start(self, changes: str = "", **variables: str) -> Agent:
        """An agent of these settings, once all is well."""
        self.variables |= variables
        agent = self.stack.enter_context(
            running(self.root / "kubelet", changes=changes, **self.variables)
        )
        self.kubelet.wait(self._healthy, "that all is well", 20)
        agent.wait_line("the kubelet says who holds which vGPU")
        self.well = agent.get("/metrics")[1]
        return agent

    def _healthy(self) -> bool:
        devices = self.kubelet.devices
        return len(devices) == 20 and all(each.health == "Healthy" for each in devices)

    def ask(self, *command: str) -> str:
        """What a command says beside the agent."""
        variables = {
            "VGPU_KUBELET_DIR": str(self.root / "kubelet"),
            "VGPU_STATE_DIRECTORY": str(self.root / "kubelet/state"),
            "VGPU_METRICS_ADDRESS": "127.0.0.1:0",
        }
        return execute(*command, **(variables | self.variables)).stdout


# What happens


def an_xid(shown: Shown) -> Agent:
    agent = shown.start()
    shown.nvml.xid(UUIDS[0], 79)
    return agent


def memory_errors(shown: Shown) -> Agent:
    agent = shown.start()
    shown.nvml.update(UUIDS[0], ecc=2)
    return agent


def a_lost_gpu(shown: Shown) -> Agent:
    agent = shown.start()
    shown.nvml.update(UUIDS[0], lost=True)
    return agent


def no_kubelet(shown: Shown) -> Agent:
    agent = shown.start()
    # A stale socket would be one line more for a moment.
    shown.kubelet.socket.unlink()
    shown.kubelet.stop()
    return agent


def no_daemon(shown: Shown) -> Agent:
    mps = shown.stack.enter_context(made(FakeMps))
    daemons = [mps.of(uuid) for uuid in UUIDS]
    for each in daemons:
        each.start()
    for uuid in UUIDS:
        shown.nvml.update(uuid, compute_mode=EXCLUSIVE_PROCESS)
    mps.run(WATCH, **shown.variables | {"VGPU_SHARING": "mps"})
    eventually(mps.directories.state.exists)
    agent = shown.start(
        VGPU_SHARING="mps",
        VGPU_MPS_DIRECTORY=str(mps.directories.root),
        VGPU_MPS_SHM_DIRECTORY=str(mps.directories.shm),
    )
    daemons[0].kill()
    return agent


def a_rival(shown: Shown) -> Agent:
    other = {**shown.variables, "VGPU_STATE_DIRECTORY": str(shown.root / "other")}
    first = shown.stack.enter_context(running(shown.root / "kubelet", **other))
    first.wait_line("registered with the kubelet")
    agent = shown.start()
    # The agent itself is never well.
    shown.well = first.get("/metrics")[1]
    return agent


def no_driver(shown: Shown) -> Agent:
    agent = shown.start()
    shown.nvml.init_error(DRIVER_NOT_LOADED)
    for uuid in UUIDS:
        shown.nvml.update(uuid, error=UNKNOWN)
    return agent


def over_share(shown: Shown) -> Agent:
    process = shown.stack.enter_context(subprocess.Popen(["sleep", "600"]))
    shown.stack.callback(process.kill)
    cgroup = shown.root / f"proc/{process.pid}/cgroup"
    cgroup.parent.mkdir(parents=True)
    cgroup.write_text(f"0::/../pod55c6c714-b240-4dec-9a45-57b61696ab6e/{CONTAINER}\n")
    links = shown.root / "links"
    links.mkdir()
    (links / f"llama-0_default_main-{CONTAINER}.log").symlink_to("/nowhere")
    agent = shown.start(PROCESSES.format(str(shown.root)), VGPU_PROCESS_METRICS="on")
    shown.nvml.update(UUIDS[0], compute=((process.pid, 9000),), used=9000)
    return agent


@dataclass(frozen=True)
class Fault:
    """`cause` makes it happen. It is there once the agent's log or metrics have that line."""

    title: str
    cause: Callable[[Shown], Agent]
    line: str


FAULTS = (
    Fault("XID 79: a GPU has fallen off the bus", an_xid, "unhealthy: xid: XID 79"),
    Fault("Memory errors (ECC)", memory_errors, "unhealthy: ecc: "),
    Fault("A GPU is lost", a_lost_gpu, "unhealthy: lost: "),
    Fault("The kubelet is away", no_kubelet, "waiting for it"),
    Fault("The MPS daemon of a GPU is dead", no_daemon, "unhealthy: mps: no MPS daemon serves"),
    Fault("Another agent serves the resource", a_rival, "another process serves"),
    Fault("No driver", no_driver, "driver is not loaded"),
    Fault(
        "A container is over its share", over_share, r"^vgpu_container_memory_used_bytes\{.*e\+09$"
    ),
)


def see(fault: Fault) -> str:
    """Makes it happen, and looks everywhere: what is to be in the runbook."""
    with tempfile.TemporaryDirectory(prefix="v") as directory, _node(Path(directory)) as shown:
        agent = fault.cause(shown)
        until = time.monotonic() + 40
        while not re.search(fault.line, f"{agent.text}\n{agent.get('/metrics')[1]}", re.MULTILINE):
            assert time.monotonic() < until, agent.text
            time.sleep(0.2)
        time.sleep(4)  # for what comes with it
        seen = {
            "page": anyio.run(_read_page, agent.port),
            "status": _in_short(shown.ask("status", "--wide")),
            "doctor": _lines(shown.ask("doctor"), "^(warn|fail) "),
            "log": _lines(agent.text, "Z (WARNING|ERROR) "),
            "alerts": _fired(shown.well, agent.get("/metrics")[1], shown.root / "alerts.yaml"),
        }
        parts = []
        for name, text in seen.items():
            parts.append(f"{name}\n{indent(_steady(text, shown) or 'nothing', '  ')}")
    return f"### {fault.title}\n\n```text\n{NEWLINE.join(parts)}\n```\n"


def _lines(text: str, pattern: str) -> str:
    return "\n".join(line for line in text.splitlines() if re.search(pattern, line))


def _in_short(status: str) -> str:
    """The verdict, and what to do; without the tables."""
    verdict, *others = status.split("\n\n")
    return "\n".join([verdict, *(each for each in others if "\n  -> " in each)])


@contextmanager
def _node(root: Path) -> Iterator[Shown]:
    """Two GPUs; pods hold some vGPUs of the first."""
    (root / "kubelet/device-plugins").mkdir(parents=True)
    (root / "nvml").mkdir()
    nvml = FakeNvml(build(root), root / "nvml")
    nvml.set_gpus(*GPUS)
    pods = PodResourcesPeer(root / "kubelet", encoded(*PODS))
    with ExitStack() as stack:
        pods.start()
        stack.callback(pods.stop)
        kubelet = stack.enter_context(KubeletPeer(root / "kubelet"))
        variables = {
            "VGPU_GPU_DRIVER": "nvml",
            "VGPU_SHARING": "time-slicing",
            "VGPU_NODE_NAME": NODE,
            "VGPU_POD_NAME": POD,
            "VGPU_POD_NAMESPACE": "vgpu",
            **nvml.environment(),
        }
        yield Shown(root, stack, nvml, kubelet, variables)


async def _read_page(port: int) -> str:
    """The text of the page, as a reader sees it."""
    async with browsing() as browser:
        page = await browser.new_page()
        await page.goto(f"http://127.0.0.1:{port}/")
        await page.locator("#gpus > section").first.wait_for()
        found = page.locator("#verdict, #state .trouble, #gpus .findings li")
        texts = [" ".join(text.split()) for text in await found.all_inner_texts()]
        return "\n".join(text.lstrip("✕▲ ") for text in texts)


def _steady(text: str, shown: Shown) -> str:
    """With times, paths and PIDs that are the same in every run."""
    text = text.replace(str(shown.root / "kubelet"), "/var/lib/kubelet")
    if "VGPU_MPS_DIRECTORY" in shown.variables:
        text = text.replace(shown.variables["VGPU_MPS_DIRECTORY"], "/run/vgpu-agent/mps")
    for pattern, words in (
        (r"(?m)^\S+Z (WARNING|ERROR) +", r"\1 "),
        (r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC", "2026-01-01 12:00:00 UTC"),
        (r"(?<!:)\d\d:\d\d UTC", "12:00 UTC"),
        (r"process \d+, \w+", "process 4711, vgpu-agent"),
        (r"(?m) +$", ""),
    ):
        text = re.sub(pattern, words, text)
    return text


def _fired(before: str, after: str, file: Path) -> str:
    """The alerts of a node with these metrics for ten minutes, and then these for an hour."""
    known, found = ({**scraped(Page(POD, text))} for text in (before, after))
    series = {name: f"{value!r}x10" for name, value in known.items() if name not in found}
    for name, value in found.items():
        series[name] = f"{known.get(name, '_')}x10 {value!r}x60"
    minutes = range(11, 70)
    asked = {"expr": 'ALERTS{alertstate="firing"}', "exp_samples": []}
    case = {
        "interval": "1m",
        "input_series": [{"series": name, "values": text} for name, text in series.items()],
        "promql_expr_test": [{**asked, "eval_time": f"{minute}m"} for minute in minutes],
    }
    rules = {"rule_files": [str(ALERTS)], "evaluation_interval": "1m", "tests": [case]}
    file.write_text(yaml.safe_dump(rules))
    # Nothing is expected, so it says what it got.
    command = ["promtool", "test", "rules", str(file)]
    said = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    alerts: dict[str, str] = {}
    each = re.compile(r"time: (\d+)m,.*?got: *(.*?)(?=\n *expr|\Z)", re.DOTALL)
    for minute, got in each.findall(said.stderr):
        for name, severity in re.findall(r'alertname="(\w+)".*?severity="(\w+)"', got):
            alerts.setdefault(name, f"{name} ({severity}), after {int(minute) - 10} min")
    return "\n".join(alerts.values())


def documented(text: str) -> dict[str, str]:
    """What the runbook has of each fault, by its title."""
    part = text.partition(BEGIN)[2].partition(END)[0]
    found = [each.rstrip() for each in part.split("### ")[1:]]
    return {each.partition("\n")[0]: f"### {each}\n" for each in found}


def main() -> None:
    """Writes all of them into the runbook."""
    text = RUNBOOK.read_text("utf-8")
    seen = NEWLINE.join(map(see, FAULTS))
    before, after = text.partition(BEGIN)[0], text.partition(END)[2]
    RUNBOOK.write_text(f"{before}{BEGIN}\n\n{seen}\n{END}{after}", "utf-8")


if __name__ == "__main__":
    main()
