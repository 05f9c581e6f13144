"""The real process under MPS: a fake driver, control daemons real and fake, a grpcio kubelet."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest

from tests.agent_process import REPOSITORY, Agent, environment, execute, running
from tests.fake_nvml import FakeGpu, FakeNvml
from tests.kubelet_peer import KubeletPeer
from tests.mps.fixtures import SOME, FakeMps, Mps, any_mps, fake_mps
from vgpu_agent.mps import state

__all__ = ["any_mps", "fake_mps"]

pytestmark = pytest.mark.slow

UUIDS = [f"GPU-a000000{n}-1111-2222-3333-00000000000{n}" for n in range(2)]
GPUS = [
    FakeGpu(uuid, bus=f"00000000:{n + 1:02X}:00.0", memory=24576, reserved=512)
    for n, uuid in enumerate(UUIDS)
]
USABLE = 24576 - 512 - 512  # MiB: less the driver's and the MPS server's


ONE, OTHER = UUIDS


@dataclass
class Node:
    """`mps` is the daemon of the first GPU."""

    kubelet: KubeletPeer
    agent: Agent
    mps: Mps
    variables: dict[str, str]

    def healthy(self, uuid: str = "") -> int:
        return sum(
            device.health == "Healthy" and device.id.startswith(uuid)
            for device in self.kubelet.devices
        )

    def wait_healthy(self, count: int, timeout: float = 10) -> float:
        """Seconds until the kubelet has so many healthy vGPUs."""
        began = time.monotonic()
        self.kubelet.wait(lambda: self.healthy() == count, f"{count} healthy vGPUs", timeout)
        return time.monotonic() - began

    @contextmanager
    def serving(self) -> Iterator[subprocess.Popen[str]]:
        """With a daemon for each GPU and a watcher, and every vGPU is healthy."""
        for mps in (self.mps, self.mps.of(OTHER)):
            mps.start()
        with self.watcher() as watcher:
            self.wait_healthy(20)
            yield watcher

    @contextmanager
    def watcher(self) -> Iterator[subprocess.Popen[str]]:
        process = subprocess.Popen(
            [sys.executable, "-m", "vgpu_agent", "mps", "watch"],
            env=environment(**self.variables),
            cwd=REPOSITORY,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        try:
            yield process
        finally:
            process.kill()
            process.wait()


@contextmanager
def node_of(kubelet_dir: Path, fake_nvml: FakeNvml, mps: Mps) -> Iterator[Node]:
    """A node on which nothing of MPS runs yet, but for its directories."""
    fake_nvml.set_gpus(*GPUS)
    variables = {
        "VGPU_GPU_DRIVER": "nvml",
        "VGPU_SHARING": "mps",
        "VGPU_MPS_DIRECTORY": str(mps.directories.root),
        "VGPU_MPS_SHM_DIRECTORY": str(mps.directories.shm),
        "VGPU_HEALTH_INTERVAL": "1",
        "PATH": mps.path,
        **fake_nvml.environment(),
    }
    done = execute("mps", "prepare", **variables)
    assert done.returncode == 0, done.stderr
    with KubeletPeer(kubelet_dir) as kubelet, running(kubelet_dir, **variables) as agent:
        kubelet.wait_list(1)
        yield Node(kubelet, agent, mps.of(ONE), variables)


@pytest.fixture
def node(kubelet_dir: Path, fake_nvml: FakeNvml, fake_mps: FakeMps) -> Iterator[Node]:
    with node_of(kubelet_dir, fake_nvml, fake_mps) as made:
        yield made


@pytest.fixture
def any_node(kubelet_dir: Path, fake_nvml: FakeNvml, any_mps: Mps) -> Iterator[Node]:
    with node_of(kubelet_dir, fake_nvml, any_mps) as made:
        yield made


def test_a_gpus_vgpus_are_healthy_only_while_its_daemon_holds_its_limits(any_node: Node) -> None:
    node, other = any_node, any_node.mps.of(OTHER)
    assert node.healthy() == 0
    assert len(node.kubelet.devices) == 20
    daemon = node.mps.start()
    other.start()
    node.agent.wait_line("nobody has applied the limits yet")
    assert node.healthy() == 0
    with pytest.raises(grpc.RpcError, match="mps: nobody has applied the limits yet"):
        node.kubelet.pre_start([f"{ONE}::0"])

    with node.watcher() as watcher:
        assert node.wait_healthy(20) < 4
        node.kubelet.pre_start([f"{ONE}::0"])

        daemon.kill()
        daemon.wait()
        assert node.wait_healthy(10) < 5
        assert node.healthy(OTHER) == 10
        with pytest.raises(grpc.RpcError, match="mps"):
            node.kubelet.pre_start([f"{ONE}::0"])
        node.kubelet.pre_start([f"{OTHER}::0"])

        daemon = node.mps.start()
        assert node.wait_healthy(20) < 4

        # A watcher that dies changes nothing while the same daemon lives.
        watcher.send_signal(signal.SIGKILL)
        watcher.wait()
        time.sleep(2)
        assert node.healthy() == 20
    daemon.kill()
    daemon.wait()
    node.wait_healthy(10)
    # A new daemon needs its limits, and nobody applies any.
    node.mps.start()
    time.sleep(1.5)
    with pytest.raises(grpc.RpcError, match="the daemon is a new one, and its limits are not"):
        node.kubelet.pre_start([f"{ONE}::0"])
    assert node.healthy() == 10


@pytest.mark.parametrize("any_mps", SOME[-1:], indirect=True)  # it takes 14 s
def test_a_tenant_who_holds_a_connection_makes_no_vgpu_unhealthy(any_node: Node) -> None:
    node = any_node
    with node.serving():
        node.mps.start_server()  # where one runs, looks are frequent
        time.sleep(1)
        lists = len(node.kubelet.lists)
        with node.mps.held():
            node.agent.wait_line(f"is busy.* uuid={ONE}")
            assert (
                f'vgpu_mps_busy{{gpu_index="0",gpu_uuid="{ONE}"}} 1.0'
                in node.agent.get("/metrics")[1]
            )
            time.sleep(5)
        assert len(node.kubelet.lists) == lists
        assert node.healthy() == 20


def test_a_daemon_that_hangs_is_down_and_a_fault_of_its_server_is_over_when_it_is_active(
    node: Node,
) -> None:
    with node.serving():
        node.mps.start_server()  # where one runs, looks are frequent
        time.sleep(1)
        node.mps.behave(hang=True)
        node.wait_healthy(10, timeout=14)
        node.mps.behave()
        node.wait_healthy(20)
        node.mps.behave(status="FAULT")
        node.wait_healthy(10)
        gpus = json.loads(node.agent.get("/status.json")[1])["gpus"]
        assert [[fault["reason"] for fault in gpu["faults"]] for gpu in gpus] == [["mps-fault"], []]
        node.mps.behave()
        node.wait_healthy(20)


def test_allocate_tells_consistent_shares_of_what_is_usable(
    node: Node, fake_nvml: FakeNvml
) -> None:
    """Also to the pods of the AWS plugin: they mount /tmp/nvidia-mps, and set no variable."""

    def limit(ids: list[str]) -> str:
        (container,) = node.kubelet.allocate(ids).container_responses
        return container.envs["CUDA_MPS_PINNED_DEVICE_MEM_LIMIT"]

    with node.serving():
        for count, percentage in ((1, 10), (2, 20), (10, 100)):
            answer = node.kubelet.allocate([f"{ONE}::{n}" for n in range(count)])
            (container,) = answer.container_responses
            envs = dict(container.envs)
            assert envs["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"] == str(percentage)
            assert envs["CUDA_MPS_PINNED_DEVICE_MEM_LIMIT"] == f"0={USABLE * count // 10}M"
            assert envs["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
            pipe, shm = str(node.mps.pipe), str(node.mps.directories.shared)
            assert envs["CUDA_MPS_PIPE_DIRECTORY"] == pipe  # what is mounted
            assert not pipe.startswith("/tmp/nvidia-mps")  # where pods have a mount of their own
            mounts = [(mount.host_path, mount.container_path) for mount in container.mounts]
            assert sorted(mounts) == sorted([(pipe, pipe), (shm, "/dev/shm")])
        # What no process can use is answered, and held back where the kubelet tries again.
        both = [f"{ONE}::0", f"{OTHER}::0"]
        assert node.kubelet.allocate(both).container_responses
        for _ in range(2):
            with pytest.raises(
                grpc.RpcError, match="vGPUs of 2 GPUs, each with its own MPS daemon"
            ):
                node.kubelet.pre_start(both)
        # A server that has more than is kept for it is reported; no answer changes.
        server = node.mps.start_server()
        fake_nvml.update(ONE, compute=((server, 1024),))
        node.agent.wait_line(f"the MPS server has 1024 MiB of it.* uuid={ONE}")
        assert [limit([f"{uuid}::0"]) for uuid in UUIDS] == [f"0={USABLE // 10}M"] * 2


def test_restarts_of_the_agent_and_the_watcher_leave_daemon_server_and_clients_alone(
    kubelet_dir: Path, node: Node
) -> None:
    daemon = node.mps.start()
    with node.watcher() as watcher:
        node.wait_healthy(10)
        server = node.mps.start_server()
        client = subprocess.Popen(
            ["sleep", "60"], env=environment(CUDA_MPS_PIPE_DIRECTORY=str(node.mps.pipe))
        )
        try:
            watcher.kill()
            watcher.wait()
            node.agent.end(signal.SIGKILL)
            assert execute("mps", "prepare", **node.variables).returncode == 0
            with running(kubelet_dir, **node.variables):
                count = len(node.kubelet.lists)
                node.kubelet.wait(lambda: len(node.kubelet.lists) > count, "a list again")
                node.wait_healthy(10)
            assert (daemon.poll(), client.poll()) == (None, None)
            os.kill(server, 0)
            assert node.mps.server_pids() == [server]
        finally:
            client.kill()
            client.wait()


def test_another_number_of_vgpus_concerns_one_gpu_and_waits_for_its_server(
    kubelet_dir: Path, any_node: Node
) -> None:
    node = any_node
    with node.serving():
        servers = [mps.start_server() for mps in (node.mps, node.mps.of(OTHER))]
        time.sleep(1)  # for the watcher to see them
        node.agent.end()
        changed = {**node.variables, "VGPU_REPLICAS_BY_GPU": json.dumps({ONE: 4})}
        with running(kubelet_dir, **changed) as agent:
            agent.wait_line("GPU 0 has 10 vGPUs instead of 4 until its MPS daemon is restarted$")
            node.wait_healthy(20)
            assert "vgpu_mps_replacement_needed 1.0" in agent.get("/metrics")[1]
            time.sleep(6)  # two looks of the watcher
            assert node.healthy() == 20
            os.kill(servers[0], signal.SIGKILL)
            node.wait_healthy(14)
            assert node.healthy(OTHER) == 10
            assert "vgpu_mps_replacement_needed 0.0" in agent.get("/metrics")[1]
            assert node.mps.of(OTHER).server_pids() == servers[1:]


def test_beside_a_pod_of_the_release_before_no_vgpu_is_given_and_what_it_made_stays(
    node: Node,
) -> None:
    """Its file, and the directories that containers were given then: docs/upgrade.md."""
    root = node.mps.directories.root
    old = {"format": 2, "generation": "1", "limits": "client", "gpus": []}
    node.mps.directories.state.write_text(json.dumps(old))
    (root / "pipe").mkdir()
    node.agent.wait_line("is of another version of the agent: drain the node and delete its MPS")
    assert node.healthy() == 0
    with pytest.raises(grpc.RpcError, match="another version"):
        node.kubelet.pre_start([f"{ONE}::0"])
    # Its pod is replaced.
    assert execute("mps", "prepare", **node.variables).returncode == 0
    with node.serving():
        assert state.read(node.mps.directories.state) is not None
        assert (root / "pipe").is_dir()
