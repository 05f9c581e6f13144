"""The node of a run: the real agent, a fake driver, a kubelet; and whether all views are right."""

import json
import random
import re
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tests.agent_process import Agent
from tests.fake_nvml import FakeGpu, FakeNvml
from tests.faults.model import REPLICAS, Model
from tests.kubelet.podresources_peer import PodResourcesPeer, encoded
from tests.kubelet.rig import RESOURCE
from tests.kubelet_peer import KubeletPeer

UUIDS = [f"GPU-a000000{n}-1111-2222-3333-00000000000{n}" for n in range(4)]
SETTINGS = {
    "VGPU_GPU_DRIVER": "nvml",
    "VGPU_SHARING": "time-slicing",
    "VGPU_RESOURCE_NAME": RESOURCE,
    "VGPU_REPLICAS": str(REPLICAS),
    "VGPU_HEALTH_INTERVAL": "1",
    "VGPU_RECOVERY_SECONDS": "1",
    "VGPU_DRIVER_WAIT": "10",
    "VGPU_PODRESOURCES_INTERVAL": "1",
    "MALLOC_ARENA_MAX": "2",  # as in the image
}
# The only things of the process that are not as they are on a node: a wall clock that jumps, the
# driver's folder, and that relapses do not make it wait for longer and longer.
CHANGES = """
import time
from pathlib import Path
real, offset = time.time, Path({offset!r})
time.time = lambda: real() + float(offset.read_text())
import vgpu_agent.gpu.nvml as nvml, vgpu_agent.model.health as health
nvml.NvmlDriver.__init__.__kwdefaults__.update(proc_root=Path({proc!r}), reopen_seconds=1)
health.RELAPSE_WINDOW = -1.0
"""
START = 30.0
"""Seconds until the first list."""

LOG_LINE = re.compile(r"\d{4}-\d\d-\d\dT|vgpu-agent: ")
"""How what the agent writes begins, one line for each thing: no traceback, no text of a peer."""

SAMPLE = re.compile(r"^(\w+)(?:{(.*)})? (\S+)$", re.MULTILINE)


class FaultError(AssertionError):
    """Something is not as the model says."""


def number_of(uuid: str) -> str:
    return f"GPU {UUIDS.index(uuid)}"


def odd_lines(lines: list[str]) -> list[str]:
    """What is no log line, from the line before the first of it on."""
    odd = next((n for n, line in enumerate(lines) if not LOG_LINE.match(line)), None)
    return [] if odd is None else lines[max(0, odd - 1) : odd + 25]


class Rig:
    """The node of one run. `held`: vGPUs that pods hold.

    Everything may take `patience` times as long as promised: for machines that do other things.
    """

    def __init__(self, seed: int, library: Path, stack: ExitStack, patience: float) -> None:
        self.patience = patience
        self.random = random.Random(seed)
        self.directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vgpu-")))
        self.offset = self.directory / "offset"
        self.offset.write_text("0")
        self.nvml = FakeNvml(library, self.directory / "nvml")
        gpus = [FakeGpu(u, bus=f"00000000:{n:02X}:00.0", action=0) for n, u in enumerate(UUIDS, 1)]
        self.nvml.set_gpus(*gpus)
        self.model = Model(gpus)
        self.kubelet = stack.enter_context(KubeletPeer(self.directory))
        self.pods = PodResourcesPeer(self.directory, encoded())
        self.pods.start()
        stack.callback(self.pods.stop)
        self.held: set[str] = set()
        self.pods_up = True
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.lines: list[tuple[float, int]] = []
        self.most_lines = self.lines_before = 0
        self.agent: Agent | None = None
        stack.callback(lambda: self.agent and self.agent.close())
        self.begin()

    # The agent

    def start_agent(self) -> None:
        """As the kubelet does with a container that ended."""
        if self.agent is not None:
            self.agent.close()
            self.lines_before += len(self.agent.lines)
            for gpu in self.model.gpus:
                gpu.agent_restarted()
            self.model.reopened()
        self.nvml._events.clear()
        self.nvml._write()
        values = SETTINGS | dict(self.nvml.environment())
        changes = CHANGES.format(offset=str(self.offset), proc=str(self.nvml.proc_root))
        self.agent = Agent(sys.executable, self.directory, values, changes)

    def ended(self) -> str | None:
        code = self.agent.process.poll()
        return None if code is None else f"the agent ended with {code}"

    def usage(self) -> tuple[int, int, int]:
        """KiB of RSS, descriptors, threads."""
        proc = Path("/proc") / str(self.agent.process.pid)
        words = dict(line.split(":", 1) for line in (proc / "status").read_text().splitlines())
        descriptors = len(list((proc / "fd").iterdir()))
        return int(words["VmRSS"].split()[0]), descriptors, int(words["Threads"])

    # Whether all is right

    def begin(self) -> None:
        """From now on time counts."""
        self.began = time.monotonic()

    def settle(
        self,
        name: str,
        seconds: float,
        was: Mapping[str, str] | None,
        *,
        since: int = 0,
        took: float | None = None,
    ) -> None:
        """Until all views are right; `took`, if it is known already, is when the list was.

        What was right before, in `was`, and is right after, is never wrong from list `since` on.
        """
        wanted = self.model.devices()
        self.wait_list(lambda devices: devices == wanted, name, seconds)
        took = time.monotonic() - self.began if took is None else took
        for listing in self.kubelet.lists[since:] if was else []:
            seen = {device.id: device.health for device in listing.devices}
            for each, health in wanted.items():
                if was.get(each) == health != seen.get(each):
                    raise FaultError(f"{name}: {each} was {seen.get(each)} for a while")
        self.wait(self.views_differ, name, max(2.0, self.began + seconds - time.monotonic()))
        now = time.monotonic()
        # Who holds what is not in the list.
        self.seconds[name].append(now - self.began if "pod" in name else took)
        self.lines.append((now, self.lines_before + len(self.agent.lines)))
        recent = [count for at, count in self.lines if now - at <= 60]
        self.most_lines = max(self.most_lines, recent[-1] - recent[0])

    def wait_list(self, right: Callable[[dict[str, str]], bool], name: str, seconds: float) -> None:
        def seen() -> dict[str, str]:
            return {device.id: device.health for device in self.kubelet.devices}

        try:
            left = self.began + seconds * self.patience - time.monotonic()
            self.kubelet.wait(lambda: right(seen()), name, max(left, 0.01))
        except AssertionError:
            wanted, found = self.model.devices(), seen()
            wrong = [
                f"{each} {found.get(each)}, in the end {wanted.get(each)} is right"
                for each in sorted(wanted.keys() | found.keys())
                if wanted.get(each) != found.get(each)
            ]
            what = self.ended() or "; ".join(wrong) or "it was never wrong"
            raise FaultError(f"{name}: after {seconds:g} s: {what}") from None

    def wait(self, problem: Callable[[], str | None], name: str, seconds: float) -> None:
        """Until there is no such problem."""
        until = time.monotonic() + seconds * self.patience
        while (found := problem()) is not None:
            if time.monotonic() > until:
                raise FaultError(f"{name}: {found}")
            time.sleep(0.05)

    def views_differ(self) -> str | None:
        """What report or metrics say that is not so; None where they are right."""
        if (ended := self.ended()) is not None:
            return ended
        try:
            report: dict[str, Any] = json.loads(self.agent.get("/status.json")[1])
            metrics = self.agent.get("/metrics")[1]
        except (OSError, ValueError) as error:
            return f"the web side does not answer: {error}"
        healths = {gpu.facts.uuid: gpu.healthy for gpu in self.model.gpus if gpu.listed}
        devices = self.model.devices().keys()
        told = report["allocations"]
        # Without the kubelet's word what it said last is believed for a while, by one agent.
        known = told is not None or self.pods_up
        held = self.held & devices if known else set()
        views = {
            "GPUs": ({g["uuid"]: g["healthy"] for g in report["gpus"]}, healths),
            "vGPUs": (report["vgpus"]["total"], REPLICAS * len(healths)),
            "kubelet": (report["kubelet"]["connected"], True),
            "pod resources": (report["podresources"]["up"], self.pods_up),
            "largest free": (report["largest_free"], self.largest_free() if known else None),
            "holders": ({f"{a['gpu_uuid']}::{n}" for a in told or () for n in a["numbers"]}, held),
            "podresources_up": (samples(metrics, "podresources_up"), {None: self.pods_up}),
            "kubelet_connected": (samples(metrics, "kubelet_connected"), {None: 1}),
            "nvml_up": (samples(metrics, "nvml_up"), {None: report["driver"]["up"]}),
            "gpu_healthy": (samples(metrics, "gpu_healthy", "gpu_uuid"), healths),
            "device_allocated": (
                samples(metrics, "device_allocated", "device_id"),
                {each: each in held for each in devices if known},
            ),
        }
        wrong = [f"{n}: {seen} instead of {right}" for n, (seen, right) in views.items() if seen != right]  # fmt: skip # noqa: E501
        return "; ".join(wrong) or None

    def largest_free(self) -> int:
        free = {gpu.facts.uuid: REPLICAS for gpu in self.model.gpus if gpu.healthy}
        for each in self.held:
            if (uuid := each.partition("::")[0]) in free:
                free[uuid] -= 1
        return max(free.values(), default=0)


def samples(metrics: str, name: str, label: str | None = None) -> dict[str | None, float]:
    """The values of a metric, by one of its labels or, where it has none, by None."""
    found = {}
    for each, labels, value in SAMPLE.findall(metrics):
        if each == f"vgpu_{name}":
            by = re.search(f'{label}="([^"]*)"', labels)
            found[by and by[1]] = float(value)
    return found
