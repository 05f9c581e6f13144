"""A node on this machine: a daemon in a private directory, the real agent, a kubelet, containers.

A container is a process in namespaces of its own, with the environment and the mounts that
Allocate returned. There is no container runtime: all GPUs of the machine are visible in it.
"""

import json
import os
import queue
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import anyio

from tests.agent_process import REPOSITORY, Agent, environment, execute, running
from tests.kubelet_peer import KubeletPeer
from tests.on_gpu.record import Record
from vgpu_agent.agent import make_driver, make_node
from vgpu_agent.model.container import Grant, Mount, grant
from vgpu_agent.model.devices import Inventory
from vgpu_agent.model.snapshot import Driver
from vgpu_agent.mps.control import BINARY
from vgpu_agent.mps.directories import Directories
from vgpu_agent.settings import EmbeddedSettings

CLIENT = (sys.executable, "-m", "tests.on_gpu.client")

FLAGS = {
    "mount": ("--mount",),
    "ipc": ("--ipc",),
    # Whoever ends the parent ends the client too.
    "pid": ("--pid", "--fork", "--kill-child", "--mount-proc"),
}


def having(container: Grant, **variables: str) -> Grant:
    return replace(container, environment={**container.environment, **variables})


class Client:
    """A CUDA process; see `client` for what it can be asked."""

    def __init__(self, container: Grant, namespaces: Sequence[str], own_shm: bool) -> None:
        lines = ["set -e"]
        for mount in container.mounts:
            host, inside = shlex.quote(mount.host_path), shlex.quote(mount.container_path)
            lines.append(f"mount --bind {host} {inside}")
            if mount.read_only:
                lines.append(f"mount -o remount,bind,ro {inside}")
        if own_shm:
            lines.append("mount -t tmpfs tmpfs /dev/shm")
        flags = [flag for name in namespaces for flag in FLAGS[name]]
        script = "\n".join([*lines, 'exec "$@"'])
        self.process = subprocess.Popen(
            ["unshare", *flags, "sh", "-c", script, "sh", *CLIENT],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=REPOSITORY,
            env=environment() | dict(container.environment),
        )
        self._answers: queue.Queue[dict[str, Any]] = queue.Queue()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        for line in self.process.stdout:
            self._answers.put(json.loads(line))
        self._answers.put({"error": f"the process ended with {self.process.wait()}"})

    def send(self, do: str, **values: Any) -> None:
        with suppress(BrokenPipeError):  # the reader says how it ended
            self.process.stdin.write(json.dumps({"do": do, **values}) + "\n")
            self.process.stdin.flush()

    def answer(self, timeout: float = 30) -> dict[str, Any]:
        try:
            return self._answers.get(timeout=timeout)
        except queue.Empty:
            return {"error": f"no answer within {timeout:g} s"}

    def ask(self, do: str, timeout: float = 30, **values: Any) -> dict[str, Any]:
        self.send(do, **values)
        return self.answer(timeout)

    def close(self) -> None:
        self.process.kill()
        self._reader.join()
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.stdout.close()


class Node:
    """`agent` and `kubelet` are there once `start_agent` was called; `stack` ends all of it."""

    agent: Agent
    kubelet: KubeletPeer
    daemon: subprocess.Popen[bytes]

    def __init__(self, root: Path, record: Record, stack: ExitStack, **variables: str) -> None:
        self.root, self.record, self.stack = root, record, stack
        self.mps = Directories(root / "mps", root / "shm")
        self.variables = {
            "VGPU_GPU_DRIVER": "nvml",
            "VGPU_MPS_COMPUTE_MODE": "keep",
            "VGPU_MPS_DIRECTORY": str(self.mps.root),
            "VGPU_MPS_SHM_DIRECTORY": str(self.mps.shm),
            "VGPU_HEALTH_INTERVAL": "1",
            **variables,
        }
        names = {name.removeprefix("VGPU_").lower(): each for name, each in self.variables.items()}
        self.settings = EmbeddedSettings.model_validate(names)
        self.inventory: Inventory | None = None

    # MPS

    def start_mps(self) -> None:
        """As the MPS pod does: prepare, the daemon itself, watch."""
        prepared = execute("mps", "prepare", **self.variables)
        self.record.event("prepare", exit=prepared.returncode, stderr=prepared.stderr)
        if prepared.returncode != 0:
            self.record.say(f"`mps prepare` ended with {prepared.returncode}: see the transcript")
        for path in self.mps.modes():
            path.mkdir(parents=True, exist_ok=True)
        self.start_daemon()
        watch = subprocess.Popen(
            [sys.executable, "-m", "vgpu_agent", "mps", "watch"],
            env=environment(**self.variables),
            stderr=self.stack.enter_context((self.root / "watch.log").open("w")),
        )
        self.stack.callback(watch.wait)
        self.stack.callback(watch.terminate)

    def start_daemon(self) -> None:
        daemon = subprocess.Popen([BINARY, "-f"], env=environment(**self.mps.environment()))
        self.daemon = daemon
        self.stack.callback(self._end_daemon, daemon)
        deadline = time.monotonic() + 10
        while "cannot" in self.control("get_server_list").lower() and time.monotonic() < deadline:
            time.sleep(0.1)

    def _end_daemon(self, daemon: subprocess.Popen[bytes]) -> None:
        if daemon.poll() is None:
            self.control("quit")
        with suppress(subprocess.TimeoutExpired):
            daemon.wait(10)
        daemon.kill()
        daemon.wait()

    def _ask(self, command: str) -> subprocess.CompletedProcess[str]:
        return self.record.command([BINARY], f"{command}\n", environment(**self.mps.environment()))

    def control(self, command: str) -> str:
        done = self._ask(command)
        return f"exit {done.returncode}, {(done.stdout + done.stderr).strip()!r}"

    def servers(self) -> list[int]:
        return [int(word) for word in self._ask("get_server_list").stdout.split() if word.isdigit()]

    def logs(self) -> None:
        """All logs of the daemon, the watcher and the agent, into the transcript."""
        for path in [*self.mps.log.glob("*.log"), *self.root.glob("watch.log")]:
            text = path.read_text(errors="replace")
            self.record.event("log", name=path.name, lines=text.splitlines()[-400:])
        if hasattr(self, "agent"):
            self.record.event("log", name="agent", lines=self.agent.lines[-400:])

    # The agent

    def start_agent(self) -> None:
        self.kubelet = self.stack.enter_context(KubeletPeer(self.root))
        self.agent = self.stack.enter_context(running(self.root, **self.variables))
        # An agent that gives none has said why; what a GPU does is worth measuring all the same.
        with suppress(AssertionError):
            self.wait_health(healthy=True, timeout=20)
        time.sleep(2)
        if not self.kubelet.allocatable:
            self.record.say("the agent gives no vGPU (see its log): containers are the model's")
            self.inventory = anyio.run(self._inventory)

    async def _inventory(self) -> Inventory:
        """The GPUs as the model divides them, whatever is wrong with them."""
        node = make_node(self.settings)
        async with make_driver(self.settings) as driver:
            scan = await driver.scan()
        node.driver_looked(Driver(scan.driver_version, None), scan, {})
        return node.snapshot.inventory

    def wait_health(self, *, healthy: bool, timeout: float = 30) -> float:
        """When the list said so of all vGPUs, by the monotonic clock."""
        word = "Healthy" if healthy else "Unhealthy"
        found = self.kubelet.wait_list(
            lambda devices: devices and all(each.health == word for each in devices), timeout
        )
        return found.time

    def containers(self, count: int) -> list[Grant]:
        """So many containers of one vGPU each, all of the same GPU."""
        ids = list(self.inventory.device_ids if self.inventory else self.kubelet.allocatable)
        gpu = ids[0].split("::")[0]
        of_gpu = [each for each in ids if each.startswith(gpu)]
        return [self._container(each) for each in of_gpu[:count]]

    def _container(self, vgpu: str) -> Grant:
        if self.inventory:
            given = grant(self.inventory, [vgpu], self.settings.sharing_rules())
        else:
            answer = self.kubelet.allocate([vgpu]).container_responses[0]
            mounted = (Mount(m.host_path, m.container_path, m.read_only) for m in answer.mounts)
            given = Grant(dict(answer.envs), tuple(mounted))
        mounts = [asdict(mount) for mount in given.mounts]
        self.record.event(
            "allocated", vgpu=vgpu, environment=dict(given.environment), mounts=mounts
        )
        return given

    @contextmanager
    def clients(
        self, *containers: Grant, namespaces: Sequence[str] = ("mount",), own_shm: bool = False
    ) -> Iterator[list[Client]]:
        with ExitStack() as stack:
            found = []
            for container in containers:
                found.append(Client(container, namespaces, own_shm))
                stack.callback(found[-1].close)
            yield found


@contextmanager
def node(record: Record, **variables: str) -> Iterator[Node]:
    """A node whose agent gives vGPUs; under MPS with its daemon. All of it ends with the block."""
    with tempfile.TemporaryDirectory(prefix="vgpu-") as name, ExitStack() as stack:
        found = Node(Path(name), record, stack, **variables)
        stack.callback(found.logs)
        if found.settings.sharing_rules().mps:
            found.start_mps()
        found.start_agent()
        yield found


def kill(pid: int) -> float:
    """Ends a process hard; when, by the monotonic clock."""
    os.kill(pid, signal.SIGKILL)
    return time.monotonic()
