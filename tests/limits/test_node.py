"""Agent, enforcer, kubelet and containers of a node together, each a real process.

The GPUs are a stand-in's, and the hook of the container toolkit is.
"""

import json
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.agent_process import REPOSITORY, Agent, environment, running
from tests.fake_nvml import FakeGpu, FakeNvml, Limit
from tests.kubelet.podresources_peer import PodResourcesPeer, a_pod, checkpoint, encoded, entry
from tests.kubelet.rig import RESOURCE
from tests.kubelet_peer import KubeletPeer
from tests.limits.containers import Container, Machine, Runtime

pytestmark = pytest.mark.slow

MIB = 2**20
GPUS = [
    FakeGpu(f"GPU-a000000{n}-1111-2222-3333-00000000000{n}", memory=memory, bus=f"0000:0{n}:00.0")
    for n, memory in ((1, 81920), (2, 40960))
]
ONE, TWO = (gpu.uuid for gpu in GPUS)
UID = "55c6c714-b240-4dec-9a45-57b61696ab6e"
REQUEST, LIMIT = "NVIDIA_GPU_MEMORY_REQUEST", "NVIDIA_GPU_MEMORY_LIMIT"
NEW, OLD = "615.71", "580.65.06"


@dataclass
class Node:
    """A node with one agent. `variables` are the settings of agent and enforcer."""

    machine: Machine
    kubelet: KubeletPeer
    resources: PodResourcesPeer
    agent: Agent
    nvml: FakeNvml
    variables: Mapping[str, str]
    links: Path
    runtime: Runtime
    pods: list[tuple[str, tuple[str, ...]]] = field(default_factory=list)

    @property
    def status(self) -> dict[str, Any]:
        status: dict[str, Any] = json.loads(self.agent.get("/status.json")[1])
        return status

    def wait(self, holds: Callable[[dict[str, Any]], Any], seconds: float = 10) -> dict[str, Any]:
        """The status, once it is so."""
        end = time.monotonic() + seconds
        while not holds(status := self.status):
            del status["checks"]
            assert time.monotonic() < end, f"{json.dumps(status, indent=1)}\n{self.agent.text}"
            time.sleep(0.02)
        return status

    def allocate(self, name: str, *vgpus: str) -> dict[str, str]:
        """A pod gets vGPUs, as the kubelet notes it; the environment of its container."""
        (answer,) = self.kubelet.allocate(list(vgpus)).container_responses
        self.pods.append((name, vgpus))
        self.resources.answer = encoded(*(a_pod(name, *ids) for name, ids in self.pods))
        self.resources.checkpoint.write_text(
            checkpoint(*(entry(uid(number), *ids) for number, (_, ids) in enumerate(self.pods)))
        )
        return dict(answer.envs)

    def start(self, environment: Mapping[str, str]) -> Container:
        """The container of the pod that was last given vGPUs."""
        number = len(self.pods) - 1
        name, vgpus = self.pods[number]
        gpus = sorted({vgpu.partition("::")[0] for vgpu in vgpus})
        path = f"/kubepods/burstable/pod{uid(number)}/{{id}}"
        container = self.runtime.start(path, environment, gpus)
        (self.links / f"{name}_default_main-{container.id}.log").symlink_to("nowhere")
        return container

    def limits(self, container: Container) -> dict[str, Limit]:
        path = f"/sys/fs/cgroup{container.cgroup}"
        return {uuid: each for (uuid, at), each in self.nvml.limits().items() if at == path}

    def wait_limits(self, container: Container, limits: Mapping[str, int]) -> float:
        """The seconds until these are in effect, in MiB."""
        start = time.monotonic()
        want = {uuid: Limit(0, mib * MIB) for uuid, mib in limits.items()}
        while (found := self.limits(container)) != want:
            assert time.monotonic() - start < 10, f"{found} instead of {want}\n{self.agent.text}"
            time.sleep(0.01)
        return time.monotonic() - start


def uid(number: int) -> str:
    return f"{UID[:-1]}{number}"


@contextmanager
def enforcing(node: Node) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [node.variables["PYTHON"], "-m", "vgpu_agent", "limits", "enforce"],
        env=environment(**node.variables),
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


@contextmanager
def node_of(
    runtime: Runtime, kubelet_dir: Path, nvml: FakeNvml, driver: str, **settings: str
) -> Iterator[Node]:
    nvml.set_gpus(*GPUS)
    nvml.set_driver(driver)
    links = kubelet_dir / "links"
    links.mkdir()
    # The machine's names of containers are the test's.
    logs = "mount -t tmpfs tmpfs /var/log && mkdir /var/log/containers && mount --bind"
    shell = f"{logs} {links} /var/log/containers"
    subprocess.run(runtime.machine.command("sh", "-ec", shell), check=True)
    python = kubelet_dir / "python"
    inside = f'cd {REPOSITORY} && exec {shlex.quote(sys.executable)} "$@"'
    command = shlex.join(runtime.machine.command("sh", "-c", inside, "python"))
    python.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
    python.chmod(0o755)
    variables = {
        "VGPU_GPU_DRIVER": "nvml",
        "VGPU_SHARING": "time-slicing",
        "VGPU_KUBELET_DIR": str(kubelet_dir),
        "VGPU_STATE_DIRECTORY": str(kubelet_dir / "state"),
        "VGPU_RESOURCE_NAME": RESOURCE,
        "VGPU_PODRESOURCES_INTERVAL": "1",
        "PYTHON": str(python),
        **nvml.environment(),
        **settings,
    }
    with ExitStack() as stack:
        resources = PodResourcesPeer(kubelet_dir)
        resources.start()
        stack.callback(resources.stop)
        kubelet = stack.enter_context(KubeletPeer(kubelet_dir))
        agent = stack.enter_context(running(kubelet_dir, str(python), **variables))
        kubelet.wait_list(1)
        yield Node(runtime.machine, kubelet, resources, agent, nvml, variables, links, runtime)


def shared(vgpus: int, gpu: FakeGpu = GPUS[0]) -> int:
    """MiB of so many of ten vGPUs."""
    return (gpu.memory - gpu.reserved) * vgpus // 10


@pytest.mark.parametrize(
    "changes",
    [
        {},  # the hook sets it
        {LIMIT: "60000"},  # the pod's own variable wins
        {LIMIT: "1", REQUEST: "1"},
        {REQUEST: "", LIMIT: ""},  # no hook, which is no variable to it
    ],
    ids=["hook", "own limit", "less", "no hook"],
)
def test_a_container_is_held_to_its_share_within_a_second(
    v2_runtime: Runtime, kubelet_dir, fake_nvml, changes
):
    driver = {"VGPU_MEMORY_LIMITS": "driver"}
    with (
        node_of(v2_runtime, kubelet_dir, fake_nvml, NEW, **driver) as node,
        enforcing(node) as enforcer,
    ):
        node.wait(lambda status: status["acceptance"]["accepts"])
        given = node.allocate("llama-0", f"{ONE}::0", f"{ONE}::5")
        assert given[LIMIT] == str(shared(2))
        assert given[REQUEST] == "0"
        changed = {name: value for name, value in (given | changes).items() if value}
        container = node.start(changed)
        assert node.wait_limits(container, {ONE: shared(2)}) < 1
        node.nvml.use(ONE, f"/proc/{node.machine.pid}/root/sys/fs/cgroup{container.cgroup}", 5)
        status = node.wait(lambda status: (status["allocations"] or [{}])[0].get("memory_source"))
        (held,) = status["allocations"]
        assert held["memory_share_bytes"] // MIB == shared(2)
        assert held["memory_limit_bytes"] == shared(2) * MIB
        assert held["memory_limit_problem"] is None
        assert held["memory_limited"]
        assert status["memory_limits"] == {"mode": "driver", "error": None, "missing": 0}
        # It is started again, and another one beside it.
        v2_runtime.end(container.id)
        assert node.wait_limits(node.start(changed), {ONE: shared(2)}) < 1
        both = node.allocate("bert-0", f"{ONE}::7", f"{TWO}::1")
        assert both[LIMIT] == str(shared(1, GPUS[1]))  # the hook knows one value
        assert node.wait_limits(node.start(both), {ONE: shared(1), TWO: shared(1, GPUS[1])}) < 1
        enforcer.terminate()
        assert enforcer.wait(5) == 0
        assert node.agent.end()[0] == 0


def test_a_container_of_no_vgpus_is_never_touched(v2_runtime: Runtime, kubelet_dir, fake_nvml):
    driver = {"VGPU_MEMORY_LIMITS": "driver"}
    with node_of(v2_runtime, kubelet_dir, fake_nvml, NEW, **driver) as node, enforcing(node):
        node.wait(lambda status: status["acceptance"]["accepts"])
        node.allocate("llama-0", f"{ONE}::0")
        container = node.start({})
        other = v2_runtime.start(f"/kubepods/burstable/pod{uid(0)}/{{id}}", {}, [ONE])
        (node.links / f"llama-0_default_sidecar-{other.id}.log").symlink_to("nowhere")
        node.wait_limits(container, {ONE: shared(1)})
        time.sleep(1)
        assert node.limits(other) == {}


@pytest.mark.parametrize(("driver", "words"), [(OLD, "too old"), (NEW, "cgroup v1")])
def test_a_node_that_cannot_limit_starts_the_same_pods_and_says_so(
    request, kubelet_dir, fake_nvml, driver, words
):
    runtime = request.getfixturevalue("v2_runtime" if driver == OLD else "v1_runtime")
    with node_of(runtime, kubelet_dir, fake_nvml, driver) as node:
        given = node.allocate("llama-0", f"{ONE}::0")
        assert LIMIT not in given
        node.start(given)
        status = node.wait(lambda status: status["allocations"])
        assert status["memory_limits"]["mode"] == "none"
        assert words in status["memory_limits"]["error"]
        assert status["acceptance"]["accepts"]
        assert 'vgpu_memory_limits_mode{mode="none"} 1.0' in node.agent.get("/metrics")[1]


@pytest.mark.parametrize(("driver", "words"), [(OLD, "too old"), (NEW, "cgroup v1")])
def test_where_limits_are_wanted_a_node_that_cannot_gives_no_vgpu(
    request, kubelet_dir, fake_nvml, driver, words
):
    runtime = request.getfixturevalue("v2_runtime" if driver == OLD else "v1_runtime")
    wanted = {"VGPU_MEMORY_LIMITS": "driver"}
    with node_of(runtime, kubelet_dir, fake_nvml, driver, **wanted) as node, enforcing(node):
        status = node.wait(lambda status: words in str(status["memory_limits"]["error"]))
        assert not status["acceptance"]["accepts"]
        assert {fault["reason"] for gpu in status["gpus"] for fault in gpu["faults"]} == {"limits"}
        assert all(words in gpu["faults"][0]["detail"] for gpu in status["gpus"])


def test_without_an_enforcer_limits_that_the_hook_set_are_read_back(
    v2_runtime: Runtime, kubelet_dir, fake_nvml
):
    with node_of(v2_runtime, kubelet_dir, fake_nvml, NEW) as node:
        assert node.status["memory_limits"] == {"mode": "hook", "error": None, "missing": 0}
        node.start(node.allocate("llama-0", f"{ONE}::0"))
        node.wait(lambda status: (status["allocations"] or [{}])[0].get("memory_limit_bytes"))
        node.start(node.allocate("thief-0", f"{ONE}::1") | {LIMIT: "70000"})
        status = node.wait(lambda status: status["memory_limits"]["missing"], 15)
        assert [each["pod"] for each in status["allocations"] if each["memory_limit_problem"]] == [
            "thief-0"
        ]
        missing = (
            'vgpu_container_memory_limit_missing{container="main",namespace="default",'
            'pod="thief-0"} 1.0'
        )
        assert missing in node.agent.get("/metrics")[1]
        node.agent.wait_line("runs without its memory limit.*70000 MiB")
