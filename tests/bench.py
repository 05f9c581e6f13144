"""Prints what the agent costs and how fast it is: `make bench`. Nothing here is a test.

The agent is the real process with simulated GPUs; the kubelet is the grpcio one of the tests.
The machine is noisy: compare figures of one run.
"""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median, quantiles

from tests.fake_nvml import FakeGpu, FakeNvml, build
from tests.kubelet.podresources_peer import PodResourcesPeer, a_pod, encoded
from tests.kubelet.rig import RESOURCE
from tests.kubelet_peer import KubeletPeer

IDLE = 30.0
GPUS, REPLICAS = 4, 10


def ms(seconds: float) -> str:
    return f"{seconds * 1000:8.2f} ms"


def seconds(call: Callable[[], object]) -> float:
    """How long it takes."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def p99(values: Iterable[float]) -> float:
    return quantiles(values, n=100)[98]


def memory(pid: int) -> tuple[float, float]:
    """RSS and PSS in MiB."""
    fields = dict(
        line.split(":", 1)
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    )
    return tuple(int(fields[name].split()[0]) / 1024 for name in ("Rss", "Pss"))


def cpu(pid: int) -> float:
    """Seconds of CPU so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def node() -> Iterator[tuple[KubeletPeer, Path]]:
    """A kubelet in a directory of its own."""
    with (
        tempfile.TemporaryDirectory(prefix="vgpu-") as directory,
        KubeletPeer(directory) as kubelet,
    ):
        yield kubelet, Path(directory)


@contextmanager
def agent(directory: Path, gpus: int, replicas: int, **variables: str) -> Iterator[int]:
    """The agent on that node, with simulated GPUs unless the variables say otherwise; its PID."""
    environment = os.environ | {
        "VGPU_GPU_DRIVER": "simulated",
        "VGPU_SIMULATED_GPUS": str(gpus),
        "VGPU_REPLICAS": str(replicas),
        "VGPU_KUBELET_DIR": str(directory),
        "VGPU_STATE_DIRECTORY": f"{directory}/state",
        "VGPU_METRICS_ADDRESS": "127.0.0.1:0",
        "VGPU_LOG_LEVEL": "error",
        **variables,
    }
    process = subprocess.Popen([sys.executable, "-m", "vgpu_agent", "run"], env=environment)
    try:
        yield process.pid
    finally:
        process.terminate()
        print(f"exit code {process.wait()}")


def main() -> None:
    with node() as (kubelet, directory):
        started = time.monotonic()
        with agent(directory, GPUS, REPLICAS) as pid:
            kubelet.wait_list(1)
            print(f"{GPUS} GPUs x {REPLICAS}, Python {sys.version.split()[0]}")
            first = kubelet.registrations[0].time
            print(f"process start to Register      {ms(first - started)}")
            print(f"Register to first list         {ms(kubelet.lists[0].time - first)}")
            measure_calls(kubelet)
            measure_registrations(kubelet)
            time.sleep(2)
            before, since = cpu(pid), time.monotonic()
            time.sleep(IDLE)
            spent = (cpu(pid) - before) / (time.monotonic() - since) * 60
            print(f"idle CPU in a minute           {ms(spent)}  (over {IDLE:.0f} s)")
            rss, pss = memory(pid)
            print(f"RSS / PSS                      {rss:.1f} / {pss:.1f} MiB")
    measure_scrapes(16, 48, 110)
    if shutil.which("cc"):
        measure_faults(4, 10)
        measure_faults(16, 48)


def measure_faults(gpus: int, replicas: int) -> None:
    """From an XID in the driver to the list at the kubelet, by NVML; needs a C compiler."""
    with node() as (kubelet, directory):
        nvml = FakeNvml(build(directory), directory / "nvml")
        uuids = [f"GPU-a0000000-1111-2222-3333-{n:012d}" for n in range(gpus)]
        nvml.set_gpus(
            *(FakeGpu(uuid, bus=f"00000000:{n + 1:02X}:00.0") for n, uuid in enumerate(uuids))
        )
        real = {"VGPU_GPU_DRIVER": "nvml", "VGPU_SHARING": "time-slicing", **nvml.environment()}
        with agent(directory, gpus, replicas, **real):
            kubelet.wait_list(1)
            times = []
            for n, uuid in enumerate(uuids):
                time.sleep(0.5)
                began = time.monotonic()
                nvml.xid(uuid, 79)
                kubelet.wait_list(n + 2)
                times.append(kubelet.lists[n + 1].time - began)
            print(
                f"XID to list at {gpus * replicas:4} vGPUs      {ms(median(times))}"
                f"  (median of {gpus}; the fake driver looks every millisecond)"
            )


SCRAPER = """
import sys, time, urllib.request
for _ in range(60):
    urllib.request.urlopen(sys.argv[1], timeout=10).read()
    time.sleep(0.05)
"""


def measure_scrapes(gpus: int, replicas: int, pods: int) -> None:
    """What a scrape costs with so many pods, and what an Allocate that comes meanwhile waits."""
    variables = {
        "VGPU_RESOURCE_NAME": RESOURCE,
        "VGPU_METRICS_ADDRESS": f"127.0.0.1:{free_port()}",
        "VGPU_PODRESOURCES_INTERVAL": "1",
    }
    url = f"http://{variables['VGPU_METRICS_ADDRESS']}/metrics"
    with node() as (kubelet, directory):
        holders = PodResourcesPeer(directory)
        holders.start()
        with agent(directory, gpus, replicas, **variables):
            kubelet.wait_list(lambda devices: len(devices) == gpus * replicas)
            ids = [device.id for device in kubelet.devices]
            each = len(ids) // pods
            answer = encoded(
                *(a_pod(f"pod-{n}", *ids[n * each : (n + 1) * each]) for n in range(pods))
            )
            print(f"{gpus} GPUs x {replicas}, {pods} pods with {each} vGPUs each")

            def allocate(until: Callable[[], bool]) -> list[float]:
                times = []
                while not until():
                    times.append(seconds(lambda: kubelet.allocate(ids[:1])))
                    time.sleep(0.002)
                return times

            while f'pod="pod-{pods - 1}"' not in text_of(url):
                holders.answer = answer
                time.sleep(0.2)
            scrapes = median(seconds(lambda: text_of(url)) for _ in range(20))
            print(f"scrape                         {ms(scrapes)}")

            count = iter(range(500))
            quiet = allocate(lambda: next(count, None) is None)
            # A process of its own: a thread here would hold up the calls that are measured.
            scraper = subprocess.Popen([sys.executable, "-c", SCRAPER, url])
            busy = allocate(lambda: scraper.poll() is not None)
            asked = holders.calls
            decoding = allocate(lambda: holders.calls >= asked + 15)
            for name, times in (
                ("alone", quiet),
                ("during scrapes", busy),
                ("with List every second or two", decoding),
            ):
                print(
                    f"Allocate {name + ', p50 / p99 / max':42} {ms(median(times))}"
                    f" / {ms(p99(times))} / {ms(max(times))}  ({len(times)} calls)"
                )
        holders.stop()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def text_of(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as reply:
        return reply.read().decode()


def measure_calls(kubelet: KubeletPeer) -> None:
    ids = [device.id for device in kubelet.devices]
    for name, call in (
        ("Allocate", lambda: kubelet.allocate(ids[:1])),
        ("GetPreferredAllocation", lambda: kubelet.preferred(ids, [], 3)),
    ):
        times = [seconds(call) for _ in range(500)]
        print(f"{name + ' p50 / p99':30} {ms(median(times))} / {ms(p99(times))}")


def measure_registrations(kubelet: KubeletPeer) -> None:
    """Pauses between two rounds: short-lived streams in a row look like a rival agent."""
    restarts, drops = [], []
    for _ in range(7):
        count = len(kubelet.registrations)
        kubelet.stop(clean=False)
        time.sleep(0.3)
        kubelet.start()
        began = time.monotonic()
        kubelet.wait_registrations(count + 1)
        restarts.append(kubelet.registrations[-1].time - began)
        kubelet.wait_list(lambda devices: len(devices) == GPUS * REPLICAS)
    print(f"new kubelet.sock to Register   {ms(median(restarts))}  (median of {len(restarts)})")
    for _ in range(3):
        time.sleep(5.5)
        count = len(kubelet.registrations)
        began = time.monotonic()
        kubelet.drop_stream()
        kubelet.wait_registrations(count + 1)
        drops.append(kubelet.registrations[-1].time - began)
        kubelet.wait_list(lambda devices: len(devices) == GPUS * REPLICAS)
    print(f"dropped stream to Register     {ms(median(drops))}  (median of {len(drops)})")


if __name__ == "__main__":
    main()
