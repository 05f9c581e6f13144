"""The rendered manifests, run: processes with the arguments and environment of each container.

They are in no container: the paths of the host are used, which are the same in one, as is tested
with what is rendered.
"""

import os
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.agent_process import REPOSITORY
from tests.chart import helm
from tests.chart.helm import CI, Object, containers, environment, of_kind, pod
from tests.fake_nvml import FakeGpu, FakeNvml
from tests.kubelet_peer import KubeletPeer
from tests.mps import node as nodes
from tests.mps.fixtures import eventually

pytestmark = pytest.mark.slow

UUIDS = [f"GPU-a000000{n}-1111-2222-3333-00000000000{n}" for n in range(2)]
GPUS = [
    FakeGpu(uuid, bus=f"00000000:{n + 1:02X}:00.0", memory=24576, reserved=512)
    for n, uuid in enumerate(UUIDS)
]


@pytest.fixture
def port() -> int:
    with socket.socket() as chosen:
        chosen.bind(("", 0))
        return int(chosen.getsockname()[1])


def rendered(name: str, kubelet_dir: Path, port: int, **values: Any) -> dict[str, Object]:
    """The DaemonSets of a file of ci/, for a node that is a temporary directory."""
    here = {
        "kubeletDir": str(kubelet_dir),
        "stateDirectory": str(kubelet_dir / "state"),
        "cordonDirectory": str(kubelet_dir / "cordoned"),
        "metrics": {"port": port},
    }
    return of_kind(helm.render(here | values, CI[name]), "DaemonSet")


@contextmanager
def started(container: Object, log: Path, **others: str) -> Iterator[subprocess.Popen[bytes]]:
    """A container's process, with its environment and PATH and no more; ended with SIGTERM."""
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "vgpu_agent", *container["args"]],
            env={"PATH": os.environ["PATH"], **environment(container), **others},
            cwd=REPOSITORY,
            stdout=file,
            stderr=file,
        )
    try:
        yield process
        process.terminate()
        process.wait(10)
    finally:
        process.kill()
        process.wait()
        sys.stderr.write(log.read_text())  # shown where the test failed


def probed(container: Object, probe: str) -> int:
    """The answer to the kubelet's probe; 0 for none."""
    get = container[probe]["httpGet"]
    (port,) = [each for each in container["ports"] if each["name"] == get["port"]]
    url = f"http://127.0.0.1:{port['containerPort']}{get['path']}"
    try:
        with urllib.request.urlopen(url, timeout=5) as reply:
            return int(reply.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code
    except OSError:
        return 0


def healthy(kubelet: KubeletPeer) -> int:
    return len(kubelet.allocatable)


def test_a_cluster_without_gpus_gets_vgpus_and_gives_them(
    kubelet_dir: Path, tmp_path: Path, port: int
) -> None:
    (workload,) = rendered("simulated", kubelet_dir, port).values()
    (agent,) = containers(workload).values()
    log = tmp_path / "agent"
    with KubeletPeer(kubelet_dir) as kubelet, started(agent, log) as process:
        kubelet.wait_list(lambda devices: len(devices) == 40, timeout=20)
        assert kubelet.registrations[0].request.resource_name == "k8s.amazonaws.com/vgpu"
        assert healthy(kubelet) == 40
        (container,) = kubelet.allocate(kubelet.allocatable[:1]).container_responses
        assert container.envs["VGPU_SHARE"] == "1/10"
        eventually(lambda: probed(agent, "readinessProbe") == 200)
        assert probed(agent, "livenessProbe") == 200
        process.terminate()
        seconds = pod(workload)["terminationGracePeriodSeconds"]
        assert process.wait(seconds) == 0, log.read_text()
        # What it leaves is in its mounts.
        assert {each.name for each in kubelet_dir.iterdir()} <= {"device-plugins", "state"}
        kubelet.wait_stream_ends(1)


def helm_test(port: int, seconds: str) -> subprocess.CompletedProcess[str]:
    """The command of the pod of `helm test`, in which this machine is the agents' Service."""
    (pod_,) = of_kind(helm.render({"metrics": {"port": port}}, CI["simulated"]), "Pod").values()
    python, *arguments, limit, agent = pod_["spec"]["containers"][0]["command"]
    assert (python, limit) == ("python", "60")
    assert agent == f"try-r-vgpu-agent:{port}"
    return subprocess.run(
        [sys.executable, *arguments, seconds, f"127.0.0.1:{port}"],
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_helm_test_passes_once_an_agent_is_ready(
    kubelet_dir: Path, tmp_path: Path, port: int
) -> None:
    done = helm_test(port, "0")
    assert done.returncode == 1
    assert "no agent is ready: 127.0.0.1: ConnectionRefusedError" in done.stdout
    (workload,) = rendered("simulated", kubelet_dir, port).values()
    (agent,) = containers(workload).values()
    with started(agent, tmp_path / "agent"):
        eventually(lambda: probed(agent, "livenessProbe") == 200)
        done = helm_test(port, "0")
        assert done.returncode == 1
        assert "127.0.0.1: 503 not registered: " in done.stdout
        with KubeletPeer(kubelet_dir) as kubelet:
            kubelet.wait_list(1, timeout=20)
            done = helm_test(port, "20")
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == f"127.0.0.1:{port}: ready: 127.0.0.1: 200 ready\n"


def test_gpus_are_shared_in_turns(
    kubelet_dir: Path, tmp_path: Path, port: int, fake_nvml: FakeNvml
) -> None:
    fake_nvml.set_gpus(*GPUS)
    (workload,) = rendered("time-slicing", kubelet_dir, port).values()
    (agent,) = containers(workload).values()
    with (
        KubeletPeer(kubelet_dir) as kubelet,
        started(agent, tmp_path / "agent", **fake_nvml.environment()),
    ):
        kubelet.wait_list(lambda devices: len(devices) == 128, timeout=20)
        (container,) = kubelet.allocate([f"{UUIDS[1]}::63"]).container_responses
        assert container.envs["NVIDIA_VISIBLE_DEVICES"] == UUIDS[1]
        assert not [name for name in container.envs if "MPS" in name]


def test_the_mps_pod_and_the_agent_agree_and_it_leaves_nothing(
    kubelet_dir: Path, tmp_path: Path, port: int, fake_nvml: FakeNvml
) -> None:
    fake_nvml.set_gpus(*GPUS)
    with nodes.made() as node, KubeletPeer(kubelet_dir) as kubelet:
        directories = node.directories
        mps = {"directory": str(directories.root), "shmDirectory": str(directories.shm)}
        workloads = rendered("default", kubelet_dir, port, mps=mps)
        (agent,) = containers(workloads["r-vgpu-agent"]).values()
        steps = containers(workloads["r-vgpu-agent-mps"])
        others = {**fake_nvml.environment(), "PATH": node.programs.path}
        with started(agent, tmp_path / "agent", **others):
            kubelet.wait_list(lambda devices: len(devices) == 20, timeout=20)
            assert healthy(kubelet) == 0
            prepared = subprocess.run(
                [sys.executable, "-m", "vgpu_agent", *steps["prepare"]["args"]],
                env={**environment(steps["prepare"]), **others},
                cwd=REPOSITORY,
                capture_output=True,
                text=True,
                timeout=30,
                check=False,
            )
            assert prepared.returncode == 0, prepared.stderr
            with (
                started(steps["restore"], tmp_path / "restore", **others) as restore,
                started(steps["daemon"], tmp_path / "daemon", **others) as daemon,
                started(steps["watch"], tmp_path / "watch", **others) as watch,
            ):
                kubelet.wait_list(
                    lambda devices: all(each.health == "Healthy" for each in devices), timeout=30
                )
                (container,) = kubelet.allocate([f"{UUIDS[0]}::0"]).container_responses
                pipe = str(node.pipe(UUIDS[0]))
                assert container.envs["CUDA_MPS_PIPE_DIRECTORY"] == pipe
                mounts = {each.container_path: each.host_path for each in container.mounts}
                assert mounts == {pipe: pipe, "/dev/shm": str(directories.shared)}
                assert all(Path(host).is_dir() for host in mounts.values())
                # As the kubelet ends a pod: all at once.
                for process in (restore, daemon, watch):
                    process.terminate()
                seconds = pod(workloads["r-vgpu-agent-mps"])["terminationGracePeriodSeconds"]
                assert restore.wait(seconds) == daemon.wait(1) == watch.wait(1) == 0
            kubelet.wait_list(
                lambda devices: not any(each.health == "Healthy" for each in devices), timeout=30
            )
        assert fake_nvml.log.read_text().splitlines() == [
            *(f"compute_mode {uuid} 3" for uuid in UUIDS),
            *(f"compute_mode {uuid} 0" for uuid in UUIDS),
        ]
        assert not directories.root.exists()
        assert not directories.shm.exists()
