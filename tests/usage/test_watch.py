"""The watch over a simulated driver, with a /proc and a folder of links made by the test."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import anyio
import pytest

from vgpu_agent.gpu.simulated import SimulatedDriver, simulated_gpus
from vgpu_agent.model.facts import Scan
from vgpu_agent.model.health import Moment
from vgpu_agent.model.holders import GpuProcess, Holder, Usage, Used
from vgpu_agent.model.node import Node as NodeModel
from vgpu_agent.model.rules import SharingRules
from vgpu_agent.model.snapshot import Driver, Rules, Snapshot
from vgpu_agent.observe import changes
from vgpu_agent.usage.watch import UsageWatch

GIB = 1 << 30
GPUS = simulated_gpus(2, "A GPU", 24 * GIB, (0,))
A, B = (gpu.uuid for gpu in GPUS)
RULES = Rules(SharingRules(mps=False))

UID = "55c6c714-b240-4dec-9a45-57b61696ab6e"
TRAIN, SERVE, MPS = (
    Holder("ml", "train-0", "main"),
    Holder("web", "serve.x", "c-1"),
    Holder("kube-system", "vgpu-mps-x7", "daemon"),
)


class Node:
    """A node's processes and containers, and a watch that looks at them."""

    def __init__(self, root: Path) -> None:
        self.driver = SimulatedDriver(GPUS)

        def published(before: Snapshot, after: Snapshot) -> None:
            changes.write(changes.changes(before, after, RULES))

        self.model = NodeModel(RULES, clock=lambda: Moment(1.0, 1000.0), published=published)
        self.watch = UsageWatch(
            self.driver, self.model, call_limit=5, proc=root / "proc", links=root / "links"
        )
        self.links.mkdir()
        self.process(1, "0::/init.scope\n")
        self.process("self", "0::/\n")

    @property
    def links(self) -> Path:
        return self.watch.links

    @property
    def usage(self) -> Usage | None:
        """Without what is said of it."""
        found = self.model.snapshot.usage
        return None if found is None else replace(found, problem=None)

    @property
    def problem(self) -> str | None:
        found = self.model.snapshot.usage
        return None if found is None else found.problem

    def process(self, pid: int | str, cgroup: str) -> None:
        (self.watch.proc / str(pid)).mkdir(parents=True, exist_ok=True)
        (self.watch.proc / str(pid) / "cgroup").write_text(cgroup)

    def contain(self, holder: Holder, container_id: str, *pids: int) -> None:
        """Runs those processes in a container of that name."""
        name = f"{holder.pod}_{holder.namespace}_{holder.container}-{container_id}.log"
        (self.links / name).symlink_to("/nowhere")
        for pid in pids:
            self.process(pid, f"0::/../../pod{UID}/{container_id}\n")

    async def scan(self) -> None:
        scan = await self.driver.scan()
        self.look(Driver(scan.driver_version, None), scan)

    def look(self, driver: Driver, scan: Scan | None) -> None:
        """The driver was looked at so."""
        self.model.driver_looked(driver, scan, {})

    def end(self, pid: int) -> None:
        (self.watch.proc / str(pid) / "cgroup").unlink()


@pytest.fixture
async def node(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Node:
    caplog.set_level("INFO")
    node = Node(tmp_path)
    await node.scan()
    caplog.clear()
    return node


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


def usage_lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [line for line in warnings(caplog) if "docs/usage.md" in line]


async def eventually(check: Callable[[], object]) -> None:
    with anyio.fail_after(20):
        while not check():  # noqa: ASYNC110 - what is waited for tells nobody
            await anyio.sleep(0.01)


async def test_what_each_container_uses_of_each_gpu_is_attributed_to_it(node):
    node.contain(TRAIN, "a" * 64, 10, 11)
    node.contain(TRAIN, "e" * 64, 12)  # it was restarted: a new ID, the same name
    node.contain(SERVE, "b" * 64, 20)
    node.contain(MPS, "d" * 64, 50)  # its server is a process of its own pod
    node.process(30, "0::/system.slice/docker-" + "c" * 64 + ".scope\n")
    node.process(31, f"0::/kubepods/pod{UID}/{'f' * 64}\n")  # a container without a link
    running = (10, 11, 12, 20, 30, 31, 40, 50)
    node.driver.run_processes(A, [GpuProcess(pid, pid * GIB) for pid in running])
    node.driver.run_processes(B, [GpuProcess(20, None), GpuProcess(50, GIB)])
    await node.watch.look()
    on_b = {(B, SERVE): Used(1, None), (B, MPS): Used(1, GIB)}
    assert node.usage == Usage(
        {
            (A, TRAIN): Used(3, 33 * GIB),
            (A, SERVE): Used(1, 20 * GIB),
            (A, MPS): Used(1, 50 * GIB),
            **on_b,
        },
        {A: 3, B: 0},
    )
    # What has ended is gone, and of a lost GPU nothing is known.
    node.driver.run_processes(A, [GpuProcess(40, 1)])
    await node.watch.look()
    assert node.usage == Usage(on_b, {A: 1, B: 0})
    node.driver.fall_off(A)
    await node.watch.look()
    assert node.usage == Usage(on_b, {B: 0})


class Recording(SimulatedDriver):
    """Remembers which GPUs were asked; those that are `silent` do not answer."""

    def __init__(self) -> None:
        super().__init__(GPUS)
        self.asked: list[str] = []
        self.silent: set[str] = set()

    async def processes(self, uuid: str) -> Sequence[GpuProcess] | None:
        self.asked.append(uuid)
        if uuid in self.silent:
            await anyio.sleep_forever()
        return await super().processes(uuid)


async def test_a_gpu_that_does_not_answer_has_no_usage_and_holds_up_no_other(node):
    node.watch.driver = driver = Recording()
    node.watch.call_limit = 0.2
    node.contain(TRAIN, "a" * 64, 10)
    driver.run_processes(B, [GpuProcess(10, GIB)])
    driver.silent = {A}
    with anyio.fail_after(20):
        await node.watch.look()
    assert node.usage == Usage({(B, TRAIN): Used(1, GIB)}, {B: 0})
    driver.silent = {A, B}
    await node.watch.look()
    assert node.usage == Usage()


async def test_only_advertised_gpus_are_asked(node):
    node.watch.driver = driver = Recording()
    node.look(Driver("1", None), Scan("1", (replace(GPUS[0], mig=True), GPUS[1])))
    await node.watch.look()
    assert driver.asked == [B]


async def test_a_driver_that_was_released_is_left_alone_until_it_answers_again(node, caplog):
    node.watch.driver = driver = Recording()
    driver.run_processes(A, [GpuProcess(99, GIB)])
    node.process(99, "0::/init.scope\n")
    await node.watch.look()
    assert node.usage == Usage({}, {A: 1, B: 0})
    driver.asked.clear()
    node.model.driver_released(until=1060.0)
    for _ in range(3):
        await node.watch.look()
    assert driver.asked == []
    assert node.usage == Usage()
    node.look(Driver(None, "no driver"), None)
    await node.watch.look()
    assert driver.asked == []
    assert usage_lines(caplog) == []
    await node.scan()
    await node.watch.look()
    assert node.usage == Usage({}, {A: 1, B: 0})


async def test_a_release_ends_no_problem(node, caplog):
    node.driver.run_processes(A, [GpuProcess(10, GIB)])
    for _ in range(2):
        await node.watch.look()
    assert "hostPID: true" in (node.problem or "")
    node.model.driver_released(until=1060.0)
    await node.watch.look()
    assert "hostPID: true" in (node.problem or "")
    assert "attributed to containers again" not in caplog.text


# What is missing


async def test_says_once_that_no_process_of_the_node_is_seen(node, caplog):
    node.driver.run_processes(A, [GpuProcess(10, GIB), GpuProcess(11, GIB)])
    for _ in range(4):
        await node.watch.look()
        assert node.usage == Usage({}, {A: 2, B: 0})
    (line,) = warnings(caplog)
    assert "hostPID: true" in line
    node.process(10, f"0::/kubepods/pod{UID}/{'a' * 64}\n")
    for _ in range(3):
        await node.watch.look()
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
    node.end(10)
    for _ in range(3):
        await node.watch.look()
    assert len(warnings(caplog)) == 2


async def test_a_process_that_ends_between_two_reads_is_no_reason_to_say_so(node, caplog):
    for pid in range(10, 15):
        node.driver.run_processes(A, [GpuProcess(pid, GIB)])
        await node.watch.look()
        node.process(pid, f"0::/kubepods/pod{UID}/{'a' * 64}\n")
        await node.watch.look()
    assert caplog.records == []


@pytest.mark.parametrize("hidden", [False, True])
async def test_in_a_pid_namespace_of_its_own_it_says_so_though_the_driver_lists_nothing(
    node, caplog, hidden
):
    # Drivers leave out processes of other namespaces, so there is none that could be missed.
    node.process(1, "0::/\n")
    if hidden:
        node.end(1)
    for _ in range(3):
        await node.watch.look()
    assert node.usage == Usage({}, {A: 0, B: 0})
    (line,) = warnings(caplog)
    assert "hostPID: true" in line


async def test_says_once_that_the_links_are_missing_while_there_are_processes(node, caplog):
    node.links.rmdir()
    for _ in range(3):
        await node.watch.look()
    assert warnings(caplog) == []
    node.process(10, f"0::/kubepods/pod{UID}/{'a' * 64}\n")
    node.driver.run_processes(A, [GpuProcess(10, GIB)])
    for _ in range(3):
        await node.watch.look()
        assert node.usage == Usage({}, {A: 1, B: 0})
    (line,) = warnings(caplog)
    assert str(node.links) in line
    assert "/var/log/containers" in line
    # Without any process there is nothing to judge by: no news.
    node.driver.run_processes(A, [])
    for _ in range(3):
        await node.watch.look()
    assert len(caplog.records) == 1


# The task


async def test_looks_again_and_again_with_no_file_read_on_the_loop(node, monkeypatch):
    readers = set()
    read = Path.read_bytes

    def read_bytes(path: Path) -> bytes:
        readers.add(threading.current_thread())
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    node.watch.interval = 0.01
    node.contain(TRAIN, "a" * 64, 10)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(node.watch.run)
        await eventually(lambda: node.usage == Usage({}, {A: 0, B: 0}))
        node.driver.run_processes(A, [GpuProcess(10, GIB)])
        await eventually(lambda: node.usage == Usage({(A, TRAIN): Used(1, GIB)}, {A: 0, B: 0}))
        tasks.cancel_scope.cancel()
    assert readers
    assert threading.current_thread() not in readers


async def test_the_same_usage_is_no_news(node):
    await node.watch.look()
    version = node.model.latest.version
    await node.watch.look()
    assert node.model.latest.version == version
