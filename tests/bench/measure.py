"""The measurements: each takes a node and gives figures by the names of `table.ROWS`."""

import os
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles

from tests.bench.plugins import Node, Size, Subject, running
from tests.kubelet.podresources_peer import a_pod, encoded
from tests.kubelet_peer import KubeletPeer

Figures = dict[str, float]

PODS = 110


@dataclass(frozen=True)
class Effort:
    """How long to measure: rounds of calls, restarts, seconds of idling, scrapes."""

    rounds: int = 5
    calls: int = 200
    restarts: int = 5
    drops: int = 2
    idle: float = 40.0
    scrapes: int = 40


SHORT = Effort(rounds=2, calls=60, restarts=2, drops=1, idle=12.0, scrapes=10)


def ms(seconds: float) -> float:
    return seconds * 1000


def seconds(call: Callable[[], object]) -> float:
    """How long it takes."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def p99(values: Iterable[float]) -> float:
    return quantiles(values, n=100)[98]


def threads(pid: int) -> list[Path]:
    return list(Path(f"/proc/{pid}/task").iterdir())


def cpu(pid: int) -> dict[str, float]:
    """Seconds of CPU of each living thread; exact, where /proc/PID/stat counts ticks."""
    return {
        each.name: int((each / "schedstat").read_text().split()[0]) / 1e9 for each in threads(pid)
    }


def spent(before: dict[str, float], after: dict[str, float]) -> float:
    """Seconds of CPU in between, but for threads that ended meanwhile."""
    return sum(now - before.get(name, 0.0) for name, now in after.items())


def memory(pid: int) -> tuple[float, float]:
    """RSS and PSS in MiB."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    fields = dict(line.split(":", 1) for line in lines)
    rss, pss = (int(fields[name].split()[0]) / 1024 for name in ("Rss", "Pss"))
    return rss, pss


def measured(subjects: Sequence[Subject], size: Size, effort: Effort) -> dict[str, Figures]:
    """The figures of each. Calls take turns: all have the same neighbours on the machine."""
    found: dict[str, Figures] = {}
    with ExitStack() as stack:
        nodes: dict[str, Node] = {}
        for subject in subjects:
            node = stack.enter_context(running(subject, size))
            registered = node.kubelet.registrations[0].time
            found[subject.name] = {
                "start": ms(registered - node.started),
                "first_list": ms(node.kubelet.lists[0].time - registered),
            }
            nodes[subject.name] = node
        time.sleep(2)
        for name, figures in calls(nodes, effort).items():
            found[name] |= figures
        for subject in subjects:
            node = nodes[subject.name]
            if subject.has_gpus:
                found[subject.name] |= at_rest(node, effort)
                found[subject.name] |= registrations(node, effort)
                if subject.is_agent:
                    found[subject.name] |= scrapes(node, effort)
                found[subject.name] |= faults(node)  # at last: nothing heals them
            found[subject.name]["stop"] = node.stop()
    return found


def calls(nodes: dict[str, Node], effort: Effort) -> dict[str, Figures]:
    """Allocate one by one and by 16 callers at once, and GetPreferredAllocation."""
    allocate: dict[str, list[float]] = {name: [] for name in nodes}
    prefer: dict[str, list[float]] = {name: [] for name in nodes}
    rates: dict[str, list[float]] = {name: [] for name in nodes}
    for _ in range(effort.rounds):
        for name, node in nodes.items():
            kubelet, ids = node.kubelet, [device.id for device in node.kubelet.devices]
            one = ids[:1]
            allocate[name] += [
                seconds(lambda k=kubelet, i=one: k.allocate(i)) for _ in range(effort.calls)
            ]
            prefer[name] += [
                seconds(lambda k=kubelet, i=ids: k.preferred(i, [], 3))
                for _ in range(effort.calls // 4)
            ]
            rates[name].append(rate(kubelet, one, effort.calls // 2))
    return {
        name: {
            "allocate_p50": ms(median(allocate[name])),
            "allocate_p99": ms(p99(allocate[name])),
            "allocate_rate": median(rates[name]),
            "prefer_p50": ms(median(prefer[name])),
        }
        for name in nodes
    }


def rate(kubelet: KubeletPeer, ids: list[str], each: int, callers: int = 16) -> float:
    """Calls in a second."""

    def call() -> None:
        for _ in range(each):
            kubelet.allocate(ids)

    crowd = [threading.Thread(target=call) for _ in range(callers)]

    def run() -> None:
        for caller in crowd:
            caller.start()
        for caller in crowd:
            caller.join()

    return callers * each / seconds(run)


def at_rest(node: Node, effort: Effort) -> Figures:
    """Memory, threads, and CPU in a minute, GPUs being probed."""
    pid = node.process.pid
    time.sleep(4)
    before, since = cpu(pid), time.monotonic()
    time.sleep(effort.idle)
    idle = spent(before, cpu(pid)) / (time.monotonic() - since) * 60
    rss, pss = memory(pid)
    return {"idle": ms(idle), "rss": rss, "pss": pss, "threads": len(threads(pid))}


def registrations(node: Node, effort: Effort) -> Figures:
    """From a new kubelet, and from the end of a stream, to Register.

    With pauses: short-lived streams in a row look like a rival.
    """
    kubelet, total = node.kubelet, node.size.gpus * node.size.replicas
    restarts, drops = [], []
    for _ in range(effort.restarts):
        count = len(kubelet.registrations)
        kubelet.stop(clean=False)
        time.sleep(0.3)
        kubelet.start()
        began = time.monotonic()
        kubelet.wait_registrations(count + 1)
        restarts.append(kubelet.registrations[-1].time - began)
        kubelet.wait_list(lambda devices: len(devices) == total)
    for _ in range(effort.drops):
        time.sleep(5.5)
        count = len(kubelet.registrations)
        began = time.monotonic()
        kubelet.drop_stream()
        try:
            kubelet.wait_registrations(count + 1, timeout=5)
        except AssertionError:
            return {"kubelet_restart": ms(median(restarts))}  # it never comes back
        drops.append(kubelet.registrations[-1].time - began)
        kubelet.wait_list(lambda devices: len(devices) == total)
    return {"kubelet_restart": ms(median(restarts)), "dropped_stream": ms(median(drops))}


def faults(node: Node) -> Figures:
    """From an XID in the driver to the list at the kubelet."""
    kubelet, times = node.kubelet, []
    for uuid in node.uuids[: min(4, len(node.uuids))]:
        time.sleep(0.5)
        count = len(kubelet.lists)
        began = node.nvml.xid(uuid, 79)
        kubelet.wait_list(count + 1)
        times.append(kubelet.lists[count].time - began)
    return {"xid": ms(median(times))}


ACCEPT = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5"

SCRAPER = """
import sys, time, urllib.request
asked = urllib.request.Request(sys.argv[1], headers={"Accept": sys.argv[3]})
for _ in range(int(sys.argv[2])):
    urllib.request.urlopen(asked, timeout=10).read()
    time.sleep(0.05)
"""


def text_of(url: str) -> str:
    """As Prometheus asks."""
    asked = urllib.request.Request(url, headers={"Accept": ACCEPT})
    with urllib.request.urlopen(asked, timeout=10) as reply:
        return str(reply.read().decode())


def give_to_pods(node: Node, pods: int) -> None:
    """Tells the agent of pods that hold its vGPUs, and waits until it says so."""
    ids = [device.id for device in node.kubelet.devices]
    pods = min(pods, len(ids))
    each = len(ids) // pods
    node.pods.answer = encoded(
        *(a_pod(f"pod-{n}", *ids[n * each : (n + 1) * each]) for n in range(pods))
    )
    node.kubelet.allocate(node.kubelet.allocatable[:1])  # an occasion to ask
    until = time.monotonic() + 30
    while f'pod="pod-{pods - 1}"' not in text_of(f"{node.url}/metrics"):
        if time.monotonic() > until:
            raise AssertionError("the agent does not say who holds what")
        time.sleep(0.2)


def scrapes(node: Node, effort: Effort) -> Figures:
    """What a scrape takes with 110 pods, and for how long the loop lets a call wait meanwhile.

    The wait is what the slowest hundredth of calls during scrapes takes more than the median at
    rest. A process of its own scrapes: a thread here would hold up the calls that are measured.
    """
    give_to_pods(node, PODS)
    url = f"{node.url}/metrics"
    took = median(seconds(lambda: text_of(url)) for _ in range(effort.scrapes))
    kubelet = node.kubelet
    quiet = median(seconds(kubelet.options) for _ in range(100))
    scraper = subprocess.Popen(
        [sys.executable, "-c", SCRAPER, url, str(effort.scrapes), ACCEPT], env=dict(os.environ)
    )
    busy = []
    while scraper.poll() is None:
        busy.append(seconds(kubelet.options))
        time.sleep(0.002)
    return {"scrape": ms(took), "loop_lag_p99": ms(p99(busy) - quiet)}
