"""The real process under MPS: a fake driver, a fake daemon as real processes, a grpcio kubelet."""

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
from tests.mps.fixtures import FakeMps, fake_mps

__all__ = ["fake_mps"]

pytestmark = pytest.mark.slow

UUIDS = [f"GPU-a000000{n}-1111-2222-3333-00000000000{n}" for n in range(2)]
GPUS = [
    FakeGpu(uuid, bus=f"00000000:{n + 1:02X}:00.0", memory=24576, reserved=512)
    for n, uuid in enumerate(UUIDS)
]
USABLE = 24576 - 512 - 512  # MiB: less the driver's and the MPS server's


@dataclass
class Node:
    kubelet: KubeletPeer
    agent: Agent
    mps: FakeMps
    variables: dict[str, str]

    def healthy(self) -> int:
        return sum(device.health == "Healthy" for device in self.kubelet.devices)

    def wait_healthy(self, count: int) -> float:
        """Seconds until the kubelet has so many healthy vGPUs."""
        began = time.monotonic()
        self.kubelet.wait_list(
            lambda devices: sum(device.health == "Healthy" for device in devices) == count
        )
        return time.monotonic() - began

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


@pytest.fixture
def variables(fake_nvml: FakeNvml, fake_mps: FakeMps) -> dict[str, str]:
    fake_nvml.set_gpus(*GPUS)
    return {
        "VGPU_GPU_DRIVER": "nvml",
        "VGPU_SHARING": "mps",
        "VGPU_MPS_DIRECTORY": str(fake_mps.directories.root),
        "VGPU_MPS_SHM_DIRECTORY": str(fake_mps.directories.shm),
        "VGPU_HEALTH_INTERVAL": "1",
        "PATH": fake_mps.path,
        **fake_nvml.environment(),
    }


@pytest.fixture
def node(kubelet_dir: Path, fake_mps: FakeMps, variables: dict[str, str]) -> Iterator[Node]:
    """A node on which nothing of MPS runs yet."""
    done = execute("mps", "prepare", **variables)
    assert done.returncode == 0, done.stderr
    with KubeletPeer(kubelet_dir) as kubelet, running(kubelet_dir, **variables) as agent:
        kubelet.wait_list(1)
        yield Node(kubelet, agent, fake_mps, variables)


def test_vgpus_are_healthy_only_while_the_daemon_holds_its_limits(node: Node) -> None:
    assert node.healthy() == 0
    assert len(node.kubelet.devices) == 20
    daemon = node.mps.start()
    node.agent.wait_line("nobody has applied the limits yet")
    assert node.healthy() == 0
    with pytest.raises(grpc.RpcError, match="mps: nobody has applied the limits yet"):
        node.kubelet.pre_start([f"{UUIDS[0]}::0"])

    with node.watcher() as watcher:
        assert node.wait_healthy(20) < 4
        node.kubelet.pre_start([f"{UUIDS[0]}::0"])

        daemon.kill()
        daemon.wait()
        assert node.wait_healthy(0) < 5
        for _ in range(3):
            with pytest.raises(grpc.RpcError, match="mps"):
                node.kubelet.pre_start([f"{UUIDS[0]}::0"])

        daemon = node.mps.start()
        assert node.wait_healthy(20) < 4

        # A watcher that dies changes nothing while the same daemon answers.
        watcher.send_signal(signal.SIGKILL)
        watcher.wait()
        time.sleep(3.5)
        assert node.healthy() == 20
    daemon.kill()
    daemon.wait()
    node.wait_healthy(0)
    # A new daemon needs a new state, and nobody writes one.
    node.mps.start()
    node.agent.wait_line("the daemon is a new one")
    assert node.healthy() == 0


def test_a_daemon_that_hangs_is_down_and_a_fault_of_its_server_is_over_when_it_is_active(
    node: Node,
) -> None:
    node.mps.start()
    with node.watcher():
        node.wait_healthy(20)
        node.mps.behave(hang=True)
        assert node.wait_healthy(0) < 6.5
        node.mps.behave()
        node.wait_healthy(20)
        node.mps.start_server()
        node.mps.behave(status="FAULT")
        node.wait_healthy(0)
        gpus = json.loads(node.agent.get("/status.json")[1])["gpus"]
        assert {fault["reason"] for shared in gpus for fault in shared["faults"]} == {"mps-fault"}
        node.mps.behave()
        node.wait_healthy(20)


def test_allocate_tells_consistent_shares_of_what_is_usable(
    node: Node, fake_nvml: FakeNvml
) -> None:
    """Also to the pods of the AWS plugin: they mount /tmp/nvidia-mps, and set no variable."""

    def limit(ids: list[str]) -> str:
        (container,) = node.kubelet.allocate(ids).container_responses
        return container.envs["CUDA_MPS_PINNED_DEVICE_MEM_LIMIT"]

    node.mps.start()
    with node.watcher():
        node.wait_healthy(20)
        for count, percentage in ((1, 10), (2, 20), (10, 100)):
            answer = node.kubelet.allocate([f"{UUIDS[0]}::{n}" for n in range(count)])
            (container,) = answer.container_responses
            envs = dict(container.envs)
            assert envs["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"] == str(percentage)
            assert envs["CUDA_MPS_PINNED_DEVICE_MEM_LIMIT"] == f"0={USABLE * count // 10}M"
            assert envs["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
            pipe, shm = str(node.mps.directories.pipe), str(node.mps.directories.shm)
            assert envs["CUDA_MPS_PIPE_DIRECTORY"] == pipe  # what is mounted
            assert not pipe.startswith("/tmp/nvidia-mps")  # where pods have a mount of their own
            mounts = [(mount.host_path, mount.container_path) for mount in container.mounts]
            assert sorted(mounts) == sorted([(pipe, pipe), (shm, "/dev/shm")])
        # A server that has more than is kept for it is reported; no answer changes.
        server = node.mps.start_server()
        fake_nvml.update(UUIDS[0], compute=((server, 1024),))
        node.agent.wait_line(f"the MPS server has 1024 MiB of it.* uuid={UUIDS[0]}")
        assert [limit([f"{uuid}::0"]) for uuid in UUIDS] == [f"0={USABLE // 10}M"] * 2


def test_restarts_of_the_agent_and_the_watcher_leave_daemon_server_and_clients_alone(
    kubelet_dir: Path, node: Node
) -> None:
    daemon = node.mps.start()
    with node.watcher() as watcher:
        node.wait_healthy(20)
        server = node.mps.start_server()
        client = subprocess.Popen(
            ["sleep", "60"],
            env=environment(CUDA_MPS_PIPE_DIRECTORY=str(node.mps.directories.pipe)),
        )
        try:
            watcher.kill()
            watcher.wait()
            node.agent.end(signal.SIGKILL)
            assert execute("mps", "prepare", **node.variables).returncode == 0
            with running(kubelet_dir, **node.variables):
                count = len(node.kubelet.lists)
                node.kubelet.wait(lambda: len(node.kubelet.lists) > count, "a list again")
                node.wait_healthy(20)
            assert (daemon.poll(), client.poll()) == (None, None)
            os.kill(server, 0)
            assert node.mps.server_pids() == [server]
        finally:
            client.kill()
            client.wait()


def test_changed_settings_wait_for_the_pod_and_say_so(kubelet_dir: Path, node: Node) -> None:
    node.mps.start()
    with node.watcher():
        node.wait_healthy(20)
        node.agent.end()
        changed = {**node.variables, "VGPU_REPLICAS": "4"}
        with running(kubelet_dir, **changed) as agent:
            agent.wait_line("GPU 0 has 10 vGPUs instead of 4")
            node.wait_healthy(20)
            assert "vgpu_mps_replacement_needed 1.0" in agent.get("/metrics")[1]
