"""What the enforcer of memory limits costs: `python -m tests.limits.measure [PODS [SECONDS]]`.

The enforcer is a real process on real cgroups; GPUs and NVML are a stand-in's. Needs root and cc.
"""

import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from tests.agent_process import REPOSITORY, environment
from tests.fake_nvml import FakeGpu, FakeNvml, build
from tests.limits.containers import Machine, machine
from vgpu_agent.limits.watch import Wanted, said
from vgpu_agent.model.rules import MIB

RESOURCE = "k8s.amazonaws.com/vgpu"
GPUS = [FakeGpu(f"GPU-{n}", memory=81920, bus=f"0000:0{n}:00.0") for n in range(4)]
REPLICAS = 48
SETTLED = 10.0


LOOK = """
import sys, time
from pathlib import Path
import anyio
from vgpu_agent.gpu.nvml import NvmlDriver
from vgpu_agent.limits.watch import Wanted, said
from vgpu_agent.limits.look import Looker
from vgpu_agent.limits.tree import Finder

async def main():
    directory = Path(sys.argv[1])
    checkpoint = directory / "device-plugins" / "kubelet_internal_checkpoint"
    shares = said(Wanted, directory / "state").read().shares
    async with NvmlDriver() as driver:
        await driver.scan()
        looker = Looker(driver, Finder(checkpoint, sys.argv[2]))
        for _ in range(2):
            start = time.perf_counter()
            found = await looker.look(shares)
            print(len(found.containers), (time.perf_counter() - start) * 1000)

anyio.run(main)
"""


class Pods:
    """The pods of a node, as the kubelet notes them; each has one vGPU."""

    def __init__(self, on: Machine, directory: Path) -> None:
        self._cgroups = on.cgroups / on.top / "kubepods" / "burstable"
        self.links = directory / "links"
        self._checkpoint = directory / "device-plugins" / "kubelet_internal_checkpoint"
        self._entries: list[dict[str, object]] = []
        for each in (self.links, self._checkpoint.parent):
            each.mkdir()

    def give(self) -> int:
        """A new pod is given its vGPU; its number."""
        number = len(self._entries)
        vgpu = f"GPU-{number % len(GPUS)}::{number // len(GPUS) % REPLICAS}"
        self._entries.append(
            {
                "PodUID": f"{number:08x}-0000-4000-8000-000000000000",
                "ContainerName": "main",
                "ResourceName": RESOURCE,
                "DeviceIDs": {"0": [vgpu]},
                "AllocResp": "A" * 300,
            }
        )
        new = self._checkpoint.with_suffix(".new")
        new.write_text(json.dumps({"Data": {"PodDeviceEntries": self._entries}}))
        new.rename(self._checkpoint)
        return number

    def start(self, number: int) -> None:
        """Its container starts."""
        uid = self._entries[number]["PodUID"]
        (self._cgroups / f"pod{uid}" / f"{number:064x}").mkdir(parents=True)
        (self.links / f"pod-{number}_shop_main-{number:064x}.log").symlink_to("nowhere")


def cpu(pid: int) -> float:
    """Seconds that all threads of a process have run."""
    tasks = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(each.read_text().split()[0]) for each in tasks) / 1e9


def kib(pid: int, file: str, name: str) -> int:
    lines = Path(f"/proc/{pid}/{file}").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def seconds_until(holds: Callable[[], bool]) -> float:
    start = time.monotonic()
    while not holds():
        if time.monotonic() - start > 30:
            sys.exit("not within 30 s")
        time.sleep(0.002)
    return time.monotonic() - start


def measure(on: Machine, directory: Path, count: int, seconds: float) -> dict[str, float]:
    """What it costs with so many pods, idle for so many seconds."""
    nvml = FakeNvml(build(directory), directory / "nvml")
    nvml.set_gpus(*GPUS)
    nvml.set_driver("615.71")
    pods = Pods(on, directory)
    logs = "mount -t tmpfs tmpfs /var/log && mkdir /var/log/containers && mount --bind"
    shell = f"{logs} {pods.links} /var/log/containers"
    subprocess.run(on.command("sh", "-ec", shell), check=True)
    state = directory / "state"
    share = 81408 * MIB // REPLICAS // MIB * MIB
    shares = {gpu.uuid: tuple(share * n for n in range(1, REPLICAS + 1)) for gpu in GPUS}
    said(Wanted, state).say(asdict(Wanted(shares)), None)
    for _ in range(count):
        pods.start(pods.give())
    variables = {
        "VGPU_MEMORY_LIMITS": "driver",
        "VGPU_STATE_DIRECTORY": str(state),
        "VGPU_KUBELET_DIR": str(directory),
        **nvml.environment(),
    }
    inside = f"cd {REPOSITORY} && exec {shlex.quote(sys.executable)} -m vgpu_agent limits enforce"
    with subprocess.Popen(
        on.command("sh", "-c", inside), env=environment(**variables), stderr=subprocess.DEVNULL
    ) as enforcer:
        try:
            first = seconds_until(lambda: len(nvml.limits()) == count)
            time.sleep(SETTLED)
            began, before = time.monotonic(), cpu(enforcer.pid)
            time.sleep(seconds)
            used = (cpu(enforcer.pid) - before) * 60 / (time.monotonic() - began)
            code = ("cd", str(REPOSITORY), "&&", "exec", sys.executable, "-c", shlex.quote(LOOK))
            shell = " ".join((*code, str(directory), RESOURCE))
            looked = subprocess.run(
                on.command("sh", "-c", shell),
                env=environment(**variables),
                capture_output=True,
                text=True,
                check=True,
            )
            looks = [float(line.split()[1]) for line in looked.stdout.splitlines()]
            worst = 0.0
            for _ in range(10):
                number = pods.give()
                time.sleep(0.7)
                pods.start(number)
                done = number + 1
                worst = max(worst, seconds_until(lambda wanted=done: len(nvml.limits()) == wanted))
            return {
                "pods": count,
                "process start to all limits, s": round(first, 3),
                "first look at all, ms": round(looks[0], 1),
                "next look, ms": round(looks[1], 1),
                "idle CPU, ms a minute": round(used * 1000),
                "RSS, MiB": round(kib(enforcer.pid, "status", "VmRSS") / 1024, 1),
                "PSS, MiB": round(kib(enforcer.pid, "smaps_rollup", "Pss:") / 1024, 1),
                "threads": kib(enforcer.pid, "status", "Threads"),
                "container start to its limit, worst of 10, s": round(worst, 3),
                "load of the machine": round(os.getloadavg()[0], 1),
            }
        finally:
            enforcer.terminate()


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 110
    seconds = float(sys.argv[2]) if len(sys.argv) > 2 else 60
    with tempfile.TemporaryDirectory(prefix="vgpu-") as directory, machine() as on:
        print(json.dumps(measure(on, Path(directory), count, seconds), indent=1))


if __name__ == "__main__":
    main()
