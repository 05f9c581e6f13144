"""The sections of the report. Each makes nodes of its own and needs no other section."""

import os
import signal
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pynvml

from tests.on_gpu.client import MIB
from tests.on_gpu.node import Client, Node, having, kill, node
from tests.on_gpu.record import Record

MPS = {"VGPU_SHARING": "mps", "VGPU_MPS_THREADS": "share"}
FREE = {**MPS, "VGPU_MPS_THREADS": "none"}
SLICED = {"VGPU_SHARING": "time-slicing"}

NAMESPACES = (("mount",), ("mount", "ipc"), ("mount", "ipc", "pid"))


def outcome(answer: dict[str, Any]) -> str:
    return answer.get("error") or "works"


def used_mib() -> int:
    handle = pynvml.nvmlDeviceGetHandleByIndex(0)
    return pynvml.nvmlDeviceGetMemoryInfo(handle, version=pynvml.nvmlMemory_v2).used // MIB


# (a)


def unknowns(record: Record, _: float) -> None:
    before = used_mib()
    with node(record, **MPS) as it:
        for settle in (_reach, _context_memory, _invisible_gpu, _ordinals, _reach_of_a_fault):
            try:
                settle(record, it)
            except Exception as error:  # noqa: BLE001 - one unknown must not hide the others
                record.say(f"{settle.__name__[1:]}: not settled, {type(error).__name__}: {error}")
        (container,) = it.containers(1)
        with it.clients(container) as (client,):
            client.ask("info")
            record.say(f"memory used: {before} MiB without MPS, {used_mib()} MiB with one client")
            _lists(record, it, client)
        time.sleep(2)
        record.say(f"memory used by an idle server: {used_mib() - before} MiB")


def _reach(record: Record, it: Node) -> None:
    (container,) = it.containers(1)
    without_shm = tuple(each for each in container.mounts if each.container_path != "/dev/shm")
    read_only = tuple(replace(each, read_only=True) for each in container.mounts)
    cases = {
        "as allocated": (container, False),
        "with a /dev/shm of its own": (replace(container, mounts=without_shm), True),
        "with the pipe directory read-only": (replace(container, mounts=read_only), False),
    }
    rows = []
    for name, (case, own_shm) in cases.items():
        for namespaces in NAMESPACES:
            with it.clients(case, namespaces=namespaces, own_shm=own_shm) as (client,):
                answer = client.ask("work", seconds=0.5, start_at=0)
                # Without MPS it would work as well: only a client of the daemon counts.
                seen = it.control("get_device_client_list")
                rows.append((name, "+".join(namespaces), outcome(answer), seen))
    record.table(("mounts", "namespaces of its own", "client", "clients of the daemon"), rows)


def _context_memory(record: Record, it: Node) -> None:
    (container,) = it.containers(1)
    limit = int(container.environment["VGPU_MEMORY_BYTES"]) // MIB
    with it.clients(container) as (client,):
        filled = client.ask("fill", step_mib=4, most_mib=2 * limit)
    record.say(f"limit {limit} MiB: {filled}; the difference is what counts beside allocations")


def _invisible_gpu(record: Record, it: Node) -> None:
    (container,) = it.containers(1)
    for text in ("0=1G", "0=1G,1=1G", "1=1G,0=1G"):
        changed = having(
            container,
            CUDA_MPS_PINNED_DEVICE_MEM_LIMIT=text,
            CUDA_VISIBLE_DEVICES=container.environment["NVIDIA_VISIBLE_DEVICES"],
        )
        with it.clients(changed) as (client,):
            filled = client.ask("fill", step_mib=16, most_mib=2048)
        record.say(f"one GPU visible, limit {text}: {filled}")


def _ordinals(record: Record, it: Node) -> None:
    (container,) = it.containers(1)
    for order in ("PCI_BUS_ID", "FASTEST_FIRST"):
        with it.clients(having(container, CUDA_DEVICE_ORDER=order)) as (client,):
            record.say(f"CUDA_DEVICE_ORDER={order}: {client.ask('info')}")
    if pynvml.nvmlDeviceGetCount() < 2:
        record.say("one GPU only: which GPU an ordinal of the limit means is not settled")


def _reach_of_a_fault(record: Record, it: Node) -> None:
    if pynvml.nvmlDeviceGetCount() < 2:
        record.say("one GPU only: whether a fault reaches clients of another is not settled")
        return
    (container,) = it.containers(1)
    one, two = (having(container, CUDA_VISIBLE_DEVICES=str(n)) for n in (0, 1))
    with it.clients(one, two) as (bad, other):
        other.ask("info")
        record.say(f"illegal access on GPU 0: {bad.ask('illegal')}")
        record.say(f"the client of GPU 1 then: {outcome(_light(other))}")
    it.wait_health(healthy=True, timeout=60)


def _lists(record: Record, it: Node, client: Client) -> None:
    handle = pynvml.nvmlDeviceGetHandleByIndex(0)
    record.say(f"client {client.process.pid}, servers {it.servers()}")
    for name in ("Compute", "MPSCompute", "Graphics"):
        try:
            found = getattr(pynvml, f"nvmlDeviceGet{name}RunningProcesses_v3")(handle)
            listed: object = [(each.pid, (each.usedGpuMemory or 0) // MIB) for each in found]
        except pynvml.NVMLError as error:
            listed = str(error)
        record.say(f"{name} processes (pid, MiB): {listed}")


def _light(client: Client) -> dict[str, Any]:
    return client.ask("work", seconds=0.5, start_at=0)


# (b)


def memory(record: Record, _: float) -> None:
    with node(record, **MPS) as it, it.clients(*it.containers(3)) as clients:
        greedy, *neighbours = clients
        share = int(it.containers(1)[0].environment["VGPU_MEMORY_BYTES"]) // MIB
        for each in clients:
            each.ask("info")
        record.say(f"share {share} MiB; greedy: {greedy.ask('fill', step_mib=16, most_mib=9**9)}")
        for each in neighbours:
            answer = each.ask("fill", step_mib=16, most_mib=share // 2)
            record.say(f"neighbour takes half its share: {answer}, then {outcome(_light(each))}")
        record.say(f"greedy after its refusal: {outcome(_light(greedy))}")


# (c)


def throughput(record: Record, seconds: float) -> None:
    rows = []
    ways = {"mps, threads share": MPS, "mps, threads none": FREE, "time-slicing": SLICED}
    for name, variables in ways.items():
        with node(record, **variables) as it:
            for count in (1, 5, 10):
                with it.clients(*it.containers(count)) as clients:
                    rows.append((name, count, *_load(record, clients, seconds)))
    head = ("sharing", "clients", "steps/s", "p50 ms", "p99 ms", "load", "failed")
    record.table(head, rows)


def _load(record: Record, clients: list[Client], seconds: float) -> tuple[object, ...]:
    for each in clients:
        each.ask("info", timeout=60)
    start_at = time.time() + 10  # a library takes its time to load
    for each in clients:
        each.send("work", seconds=seconds, start_at=start_at)
    answers = [each.answer(timeout=seconds + 60) for each in clients]
    record.event("load", answers=answers)
    good = [each for each in answers if "error" not in each]
    latencies = [one for each in good for one in each["latencies"]]
    if len(latencies) < 2:
        return ("-", "-", "-", "-", len(answers) - len(good))
    rate = sum(len(each["latencies"]) / each["seconds"] for each in good)
    cuts = statistics.quantiles(latencies, n=100, method="inclusive")
    return (
        f"{rate:.0f}", f"{cuts[49]:.2f}", f"{cuts[98]:.2f}", good[0]["library"],
        len(answers) - len(good),
    )  # fmt: skip


# (d)


def faults(record: Record, _: float) -> None:
    with node(record, **MPS) as it:
        with it.clients(*it.containers(3)) as (victim, *others):
            for each in (victim, *others):
                each.send("work", seconds=3, start_at=0)
            time.sleep(1.5)
            kill(victim.process.pid)
            found = [outcome(each.answer()) for each in others]
            record.say(f"a client killed under load: its neighbours {found}")
        with it.clients(*it.containers(3)) as (bad, *others):
            for each in others:
                each.ask("info")
                each.send("work", seconds=3, start_at=0)
            time.sleep(1.5)
            begun = time.monotonic()
            record.say(f"illegal access: {bad.ask('illegal')}")
            for _ in range(10):
                record.event(
                    "status", all=[it.control(f"get_server_status {p}") for p in it.servers()]
                )
                time.sleep(0.2)
            record.say(
                f"neighbours of the illegal access: {[outcome(each.answer()) for each in others]}"
            )
        _reported(record, it, begun, "illegal access")
        with it.clients(*it.containers(1)) as (client,):
            client.send("work", seconds=3, start_at=0)
            time.sleep(1.5)
            begun = kill(it.daemon.pid)
            it.daemon.wait()
            took = it.wait_health(healthy=False) - begun
            record.say(f"daemon killed: all vGPUs unhealthy after {took:.2f} s")
            record.say(f"its client under load: {outcome(client.answer())}")
        begun = time.monotonic()
        it.start_daemon()
        took = it.wait_health(healthy=True, timeout=60) - begun
        record.say(f"daemon started again: all vGPUs healthy after {took:.2f} s")


def _reported(record: Record, it: Node, begun: float, what: str) -> None:
    """What the kubelet heard since then, until all is well again."""
    time.sleep(6)
    it.wait_health(healthy=True, timeout=60)
    since = [each for each in it.kubelet.lists if each.time > begun]
    record.say(f"{what}: {[f'{each.time - begun:.2f} s: {each}' for each in since] or 'nothing'}")


# (e)

COMMANDS = (
    "get_server_list",
    "get_default_active_thread_percentage",
    "get_default_device_pinned_mem_limit 0",
    "get_default_device_pinned_mem_limit 63",
    "set_default_device_pinned_mem_limit 0 1G",
    "get_default_device_pinned_mem_limit 0",
    "set_default_active_thread_percentage 50",
    "get_default_active_thread_percentage",
    "set_default_active_thread_percentage 0",
    "get_device_client_list",
    "ps",
    "get_server_status 1",
    "no_such_command",
)


def transcripts(record: Record, _: float) -> None:
    with node(record, **MPS) as it:
        rows = [("no client", command, it.control(command)) for command in COMMANDS]
        with it.clients(*it.containers(2)) as clients:
            for each in clients:
                each.ask("info")
            of_servers = [
                f"{name} {pid}"
                for pid in it.servers()
                for name in ("get_server_status", "get_client_list", "get_device_client_list")
            ]
            commands = [*of_servers, "get_device_client_list", "ps"]
            rows += [("two clients", command, it.control(command)) for command in commands]
        os.kill(it.daemon.pid, signal.SIGSTOP)
        rows.append(("daemon stopped", "get_server_list", it.control("get_server_list")))
        os.kill(it.daemon.pid, signal.SIGCONT)
        kill(it.daemon.pid)
        it.daemon.wait()
        rows.append(("daemon killed", "get_server_list", it.control("get_server_list")))
        record.table(("state", "command", "answer"), rows)


SECTIONS: dict[str, tuple[str, Callable[[Record, float], None]]] = {
    "a": ("what was unknown", unknowns),
    "b": ("a client beyond its memory", memory),
    "c": ("throughput and latency", throughput),
    "d": ("ends and faults", faults),
    "e": ("transcripts of the control program", transcripts),
}
