"""What is measured: the agent, a floor, or any other device plugin, as a process on a node."""

import os
import select
import shlex
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.fake_nvml import FakeGpu, FakeNvml, build
from tests.kubelet.podresources_peer import PodResourcesPeer
from tests.kubelet_peer import KubeletPeer


@dataclass(frozen=True)
class Size:
    """GPUs of a node, and vGPUs of each."""

    gpus: int
    replicas: int

    @property
    def name(self) -> str:
        return f"{self.gpus} x {self.replicas}"


@dataclass(frozen=True)
class Subject:
    """Something to measure. `{directory}` in its command is the kubelet's directory of plugins."""

    name: str
    command: str
    is_agent: bool = False
    has_gpus: bool = True

    def arguments(self, directory: Path) -> list[str]:
        return [each.format(directory=directory) for each in shlex.split(self.command)]


PYTHON = shlex.quote(sys.executable)
AGENT = Subject("vgpu-agent", f"{PYTHON} -m vgpu_agent run", is_agent=True)
FLOORS = tuple(
    Subject(f"bare {each}", f"{PYTHON} -m tests.bench.floors {each} {{directory}}", has_gpus=False)
    for each in ("grpclib", "grpcio")
)


@dataclass
class Node:
    """A kubelet, a driver and a plugin between them."""

    size: Size
    kubelet: KubeletPeer
    nvml: FakeNvml
    pods: PodResourcesPeer
    port: int
    process: subprocess.Popen[bytes]
    started: float
    uuids: list[str] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def stop(self) -> float:
        """Ends the plugin; how many seconds that took."""
        ended = os.pidfd_open(self.process.pid)  # Popen looks every 50 ms
        began = time.monotonic()
        self.process.terminate()
        select.select([ended], [], [], 30)
        took = time.monotonic() - began
        os.close(ended)
        self.process.wait(1)
        return took


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@contextmanager
def running(subject: Subject, size: Size, **variables: str) -> Iterator[Node]:
    """The plugin, which has registered and sent its first list."""
    with tempfile.TemporaryDirectory(prefix="vgpu-") as name, KubeletPeer(name) as kubelet:
        directory = Path(name)
        nvml = FakeNvml(build(directory), directory / "nvml")
        uuids = [f"GPU-a0000000-1111-2222-3333-{n:012d}" for n in range(size.gpus)]
        nvml.set_gpus(
            *(FakeGpu(uuid, bus=f"00000000:{n + 1:02X}:00.0") for n, uuid in enumerate(uuids))
        )
        pods = PodResourcesPeer(directory)
        pods.start()
        port = free_port()
        environment = {
            **os.environ,
            **nvml.environment(),
            "MALLOC_ARENA_MAX": "2",  # as in the image
            **(_of_the_agent(directory, size, port) if subject.is_agent else {}),
            **variables,
        }
        started = time.monotonic()
        plugins = kubelet.directory
        process = subprocess.Popen(subject.arguments(plugins), env=environment)
        try:
            kubelet.wait_list(1, timeout=30)
            yield Node(size, kubelet, nvml, pods, port, process, started, uuids)
        finally:
            process.terminate()
            process.wait(30)
            pods.stop()


def _of_the_agent(directory: Path, size: Size, port: int) -> Mapping[str, str]:
    return {
        "VGPU_SHARING": "time-slicing",
        "VGPU_REPLICAS": str(size.replicas),
        "VGPU_KUBELET_DIR": str(directory),
        "VGPU_STATE_DIRECTORY": str(directory / "state"),
        "VGPU_CORDON_DIRECTORY": str(directory / "cordoned"),
        "VGPU_METRICS_ADDRESS": f"127.0.0.1:{port}",
        "VGPU_RESOURCE_NAME": "example.com/vgpu",
        "VGPU_LOG_LEVEL": "error",
    }
