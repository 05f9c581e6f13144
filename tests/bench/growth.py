"""How the cost grows with the node, and with time: `make bench ARGS=--growth` and `--week`."""

import random
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from statistics import median

import grpc

from tests.bench.measure import cpu, give_to_pods, memory, ms, seconds, spent, text_of
from tests.bench.plugins import AGENT, PYTHON, Node, Size, Subject, running
from tests.kubelet.podresources_peer import a_pod, encoded
from tests.kubelet_peer import Device
from tests.wire import dp
from vgpu_agent import control

Point = dict[str, float]

SIZES = (Size(1, 10), Size(4, 10), Size(4, 48), Size(16, 48), Size(16, 200), Size(16, 1024))
"""The last one is the most that a node can have: 16,384 vGPUs."""

SIMULATED = {"VGPU_GPU_DRIVER": "simulated"}


def of_size(size: Size) -> Point:
    """GPUs and vGPUs: start, list, calls, memory, and a scrape with 110 pods."""
    with running(AGENT, size, **SIMULATED, VGPU_SIMULATED_GPUS=str(size.gpus)) as node:
        kubelet, url = node.kubelet, f"{node.url}/metrics"
        kubelet.wait_list(lambda devices: len(devices) == size.gpus * size.replicas)
        ids = [device.id for device in kubelet.devices]
        registered = kubelet.registrations[0].time
        time.sleep(1)
        point = {
            "vGPUs": len(ids),
            "start, ms": ms(registered - node.started),
            "list, ms": ms(kubelet.lists[0].time - registered),
            "list, KiB": len(dp_list(kubelet.devices)) / 1024,
            "Allocate, ms": ms(middle(lambda: kubelet.allocate(ids[:1]), 100)),
            "GetPreferredAllocation, ms": ms(middle(lambda: kubelet.preferred(ids, [], 3), 10)),
        }
        give_to_pods(node, 110)
        lines = text_of(url).splitlines()
        point["series"] = sum(not line.startswith("#") for line in lines)
        point["scrape, ms"] = ms(middle(lambda: text_of(url), 5))
        point["RSS, MiB"] = memory(node.process.pid)[0]
        return point


def dp_list(devices: list[Device]) -> bytes:
    """The list as it is sent."""
    listed = dp.ListAndWatchResponse()
    for each in devices:
        listed.devices.add(ID=each.id, health=each.health).topology.nodes.add(ID=0)
    return bytes(listed.SerializeToString())


def by_pods() -> Iterator[tuple[str, Point]]:
    """Pods of a node of 16 x 48: a scrape, and CPU for each time that the kubelet is asked."""
    size = Size(16, 48)
    with running(
        AGENT,
        size,
        **SIMULATED,
        VGPU_SIMULATED_GPUS=str(size.gpus),
        VGPU_PODRESOURCES_INTERVAL="1",
    ) as node:
        node.kubelet.wait_list(lambda devices: len(devices) == size.gpus * size.replicas)
        for pods in (1, 10, 50, 110, 250, 500):
            give_to_pods(node, pods)
            asked, before = node.pods.calls, cpu(node.process.pid)
            time.sleep(8)
            took = spent(before, cpu(node.process.pid))
            yield (
                str(pods),
                {
                    "scrape, ms": ms(middle(lambda: text_of(f"{node.url}/metrics"), 5)),
                    "CPU of a List, ms": ms(took) / max(1, node.pods.calls - asked),
                },
            )


def by_scrapes() -> Iterator[tuple[str, Point]]:
    """How often 16 x 48 vGPUs with 110 pods are scraped: CPU, and how many are answered."""
    size = Size(16, 48)
    with running(AGENT, size, **SIMULATED, VGPU_SIMULATED_GPUS=str(size.gpus)) as node:
        node.kubelet.wait_list(lambda devices: len(devices) == size.gpus * size.replicas)
        give_to_pods(node, 110)
        for rate in (1, 5, 10, 20, 40):
            yield str(rate), paced(node, rate, lambda: text_of(f"{node.url}/metrics"))


def by_events() -> Iterator[tuple[str, Point]]:
    """XIDs in a second that one GPU of 16 x 48 reports, all of applications: CPU."""
    with running(AGENT, Size(16, 48)) as node:
        time.sleep(3)
        for rate in (1, 10, 50, 100, 200):
            yield str(rate), paced(node, rate, lambda: node.nvml.xid(node.uuids[0], 13))


def paced(node: Node, rate: float, call: Callable[[], object], within: float = 5.0) -> Point:
    """CPU of the agent, and how often it was called, where it was called so often in a second."""
    before, began, done = cpu(node.process.pid), time.monotonic(), 0
    while (now := time.monotonic() - began) < within:
        if now * rate < done:
            time.sleep(done / rate - now)
        call()
        done += 1
    took = time.monotonic() - began
    used = spent(before, cpu(node.process.pid))
    return {"CPU, % of a core": 100 * used / took, "done in a second": done / took}


def plot(axis: str, name: str, points: list[tuple[str, Point]]) -> str:
    """A chart of one figure, as Mermaid draws it."""
    labels = ", ".join(f'"{label}"' for label, _ in points)
    values = ", ".join(f"{point[name]:.4g}" for _, point in points)
    lines = [f'x-axis "{axis}" [{labels}]', f'y-axis "{name}"', f"line [{values}]"]
    return "\n    ".join(["```mermaid\nxychart-beta", *lines]) + "\n```"


def middle(call: Callable[[], object], times: int) -> float:
    return median(seconds(call) for _ in range(times))


WEEK = {"allocations": 10_000, "pod changes": 2_000, "faults": 500, "kubelet restarts": 50}

GROWN = "grown, MiB"

FAILING = "3"
"""One GPU has all the faults: it is taken back ever later, and the others go on being given."""

QUICK = """
from functools import partial
from vgpu_agent import beside
from vgpu_agent.kubelet.podresources import AskTiming, PodResourcesWatch
beside.PodResourcesWatch = partial(PodResourcesWatch, timing=AskTiming(quiet=0.005, burst=0.02))
from vgpu_agent.__main__ import main
main()
"""


def week(share: float = 1.0) -> Point:
    """What 10,000 allocations, 2,000 pod changes, 500 faults and 50 kubelets leave behind, in MiB.

    Everything that happens in a week, as fast as it goes, and once more: the first week is what the
    second is compared with, for an allocator takes its time to settle. The agent is the real
    process; it asks the kubelet sooner after an allocation than it does by default.
    """
    subject = Subject(AGENT.name, f"{PYTHON} -c '{QUICK}' run", True)
    size = Size(4, 10)
    with running(
        subject,
        size,
        **SIMULATED,
        VGPU_SIMULATED_GPUS=str(size.gpus),
        VGPU_HEALTH_INTERVAL="1",
        VGPU_RECOVERY_SECONDS="1",
    ) as node:
        events = [name for name, count in WEEK.items() for _ in range(round(count * share))]
        time.sleep(2)  # the control socket comes after the first list
        ids = [device.id for device in node.kubelet.devices]
        state, chance, after = Path(node.kubelet.kubelet_dir) / "state", random.Random(7), []
        for _ in range(2):
            chance.shuffle(events)
            for number, event in enumerate(events):
                happens(node, event, number, ids, state)
            settle(state)
            after.append(memory(node.process.pid)[0])
    return {
        "events of a week": len(events),
        "RSS after the first, MiB": after[0],
        "RSS after the second, MiB": after[1],
        GROWN: after[1] - after[0],
    }


def happens(node: Node, event: str, number: int, ids: list[str], state: Path) -> None:
    match event:
        case "allocations":
            healthy = node.kubelet.allocatable or ids
            with suppress(grpc.RpcError):  # a GPU may be unhealthy just now
                node.kubelet.allocate([healthy[number % len(healthy)]])
        case "pod changes":
            held = ids[number % len(ids)]
            node.pods.answer = encoded(a_pod(f"pod-{number}", held))
            if number % 20 == 0:
                text_of(f"{node.url}/metrics")
                text_of(f"{node.url}/status.json")
        case "faults":
            control.call(state, "simulate", fault="xid", gpu=FAILING, xid=62)
            control.call(state, "simulate", fault="heal", gpu=FAILING, xid=None)
        case "kubelet restarts":
            count = len(node.kubelet.registrations)
            node.kubelet.restart()
            node.kubelet.wait_registrations(count + 1, timeout=30)
            node.kubelet.wait_list(lambda devices: len(devices) == len(ids))


def settle(state: Path) -> None:
    """Nothing is under way."""
    control.call(state, "simulate", fault="heal", gpu=FAILING, xid=None)
    time.sleep(3)


def markdown(head: str, points: list[tuple[str, Point]]) -> str:
    """A table of points."""
    names = list(points[0][1])
    lines = [f"| {head} | {' | '.join(names)} |", f"|---{'|---' * len(names)}|"]
    for name, point in points:
        cells = [f"{point[each]:.{0 if point[each] >= 100 else 2}f}" for each in names]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)
