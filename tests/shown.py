"""What eight faults look like to people: `python -m tests.shown` writes it into the runbook.

Each is made to happen to the real process, on fake GPUs and beside a kubelet of grpcio. What page,
`status`, `doctor` and log say is taken from them, and the alerts from promtool, which is shown the
metrics of before and after for an hour. Times, paths and PIDs are replaced by ones that stay.
"""

import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path

import anyio
import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.agent_process import Agent, execute, running
from tests.fake_nvml import FakeGpu, FakeNvml, build
from tests.kubelet.podresources_peer import Pod, PodResourcesPeer, encoded
from tests.kubelet_peer import KubeletPeer
from tests.mps.fixtures import FakeMps, made
from tests.observe.rules import ALERTS
from tests.screenshot import browsing

UUIDS = [f"GPU-a000000{n}-1111-2222-3333-00000000000{n}" for n in range(2)]
GPUS = [FakeGpu(uuid, bus=f"00000000:{n + 1:02X}:00.0") for n, uuid in enumerate(UUIDS)]
NODE = "gpu-node-1"
RESOURCE = "k8s.amazonaws.com/vgpu"
PODS = tuple(
    Pod(name, {"main": {RESOURCE: [f"{UUIDS[0]}::{n}" for n in vgpus]}})
    for name, vgpus in (("llama-0", range(3)), ("resnet-0", range(3, 4)))
)
DRIVER_NOT_LOADED = 9

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

    def ask(self, command: str) -> str:
        """What a command says beside the agent."""
        variables = {
            "VGPU_KUBELET_DIR": str(self.root / "kubelet"),
            "VGPU_STATE_DIRECTORY": str(self.root / "kubelet/state"),
        }
        return execute(command, **(variables | self.variables)).stdout


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
    shown.kubelet.stop()
    return agent


def no_daemon(shown: Shown) -> Agent:
    mps = shown.stack.enter_context(made(FakeMps))
    daemons = [mps.of(uuid) for uuid in UUIDS]
    for each in daemons:
        each.start()
    mps.run(WATCH, **shown.variables | {"VGPU_SHARING": "mps"})
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
    return shown.start()


def no_driver(shown: Shown) -> Agent:
    agent = shown.start()
    shown.nvml.init_error(DRIVER_NOT_LOADED)
    shown.nvml.set_gpus()
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


@dataclass
class Seen:
    """What people see of a fault: lines of text."""

    page: str
    status: str
    doctor: str
    log: str
    alerts: str


def see(fault: Fault) -> Seen:
    """Makes it happen, and looks everywhere."""
    with tempfile.TemporaryDirectory(prefix="v") as directory, _node(Path(directory)) as shown:
        agent = fault.cause(shown)
        began = len(agent.lines)
        until = time.monotonic() + 40
        while not re.search(fault.line, f"{agent.text}\n{agent.get('/metrics')[1]}", re.MULTILINE):
            assert time.monotonic() < until, agent.text
            time.sleep(0.2)
        time.sleep(4)  # for what comes with it
        log = [line for line in agent.lines[began:] if re.search("Z (WARNING|ERROR) ", line)]
        doctor = [line for line in shown.ask("doctor").splitlines() if not line.startswith("ok")]
        page = anyio.run(_read_page, agent.port)
        alerts = _fired(shown.well, agent.get("/metrics")[1], shown.root / "alerts.yaml")
        seen = Seen(page, shown.ask("status"), "\n".join(doctor), "\n".join(log), alerts)
        return Seen(
            **{each.name: _steady(getattr(seen, each.name), shown) for each in fields(seen)}
        )


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
            **nvml.environment(),
        }
        yield Shown(root, stack, nvml, kubelet, variables)


async def _read_page(port: int) -> str:
    """The text of the page, as a reader sees it."""
    async with browsing() as browser:
        page = await browser.new_page()
        await page.goto(f"http://127.0.0.1:{port}/")
        await page.get_by_text("GPU 0").first.wait_for()
        return await page.inner_text("body")


def _steady(text: str, shown: Shown) -> str:
    """With times, paths and PIDs that are the same in every run."""
    text = text.replace(str(shown.root / "kubelet"), "/var/lib/kubelet")
    text = re.sub(r"(?m)^\S+Z (WARNING|ERROR) +", "", text)
    return re.sub(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(\.\d+)?Z?", "2026-01-01 12:00:00", text)


# Alerts


def _fired(before: str, after: str, file: Path) -> str:
    """The alerts of a node with these metrics for ten minutes, and then these for an hour."""
    known, series = dict(_samples(before)), []
    for name, value in _samples(after).items():
        was = known.pop(name, None)
        series.append((name, f"{'_' if was is None else was}x10 {value}x60"))
    series += [(name, f"{value}x10") for name, value in known.items()]
    case = {
        "interval": "1m",
        "input_series": [{"series": name, "values": values} for name, values in series],
        "promql_expr_test": [
            {"expr": 'ALERTS{alertstate="firing"}', "eval_time": f"{minute}m", "exp_samples": []}
            for minute in range(11, 70)
        ],
    }
    rules = {"rule_files": [str(ALERTS)], "evaluation_interval": "1m", "tests": [case]}
    file.write_text(yaml.safe_dump(rules))
    done = subprocess.run(
        ["promtool", "test", "rules", str(file)], capture_output=True, text=True, check=False
    )
    first: dict[str, int] = {}
    said = done.stdout + done.stderr
    for minutes, got in re.findall(r"time: (\d+)m,.*?got: *(.*?)(?=\n *expr|\Z)", said, re.DOTALL):
        for labels in re.findall(r"\{(.*?)\} 1E\+00", got):
            first.setdefault(labels, int(minutes) - 10)
    return "\n".join(f"{minutes} min: {labels}" for labels, minutes in first.items()) or said


def _samples(text: str) -> Mapping[str, float]:
    """The value of each series, by its name and labels, and those that a scrape attaches."""
    found = {'up{job="vgpu-agent",instance="gpu-node-1"}': 1.0}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = {**sample.labels, "job": "vgpu-agent", "instance": NODE, "node": NODE}
            words = ",".join(f"{name}={_quoted(value)}" for name, value in labels.items())
            found[f"{sample.name}{{{words}}}"] = sample.value
    return found


def _quoted(value: str) -> str:
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'


if __name__ == "__main__":
    import sys

    for each in FAULTS:
        if len(sys.argv) > 1 and sys.argv[1] not in each.cause.__name__:
            continue
        print("=====", each.title)
        found = see(each)
        for name in fields(found):
            print("--", name.name)
            print(getattr(found, name.name), flush=True)
