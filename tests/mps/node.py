"""A node with two simulated GPUs on which the commands `vgpu-agent mps` run as processes."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.agent_process import REPOSITORY, environment
from tests.mps.fixtures import USER, FakeMps, Mps, RealMps, eventually
from vgpu_agent.mps import processes, serve
from vgpu_agent.mps.processes import Process

GPUS = [f"GPU-0000000{n}-5151-4d4d-8000-00000000000{n}" for n in range(2)]


NODE = "+dac_override,+fowner"
"""What the chart gives to `prepare` and `restore`, without SYS_ADMIN, which is for the driver."""

DEFAULT = "+chown,+dac_override,+fowner,+fsetid,+kill,+setgid,+setuid,+setpcap"
"""What every container runtime gives to `daemon`."""

CAPABILITIES = {
    "prepare": NODE,
    "daemon": DEFAULT,
    "restore": NODE,
    "restart": DEFAULT,
    "compute-modes": NODE,
}


def limited(capabilities: str) -> list[str]:
    """Before a command: root with no more than these."""
    if os.geteuid() != 0:
        return []
    return ["setpriv", f"--bounding-set=-all,{capabilities}", "--inh-caps=-all"]


class Node:
    """`programs` are the MPS programs that it has."""

    def __init__(self, programs: Mps) -> None:
        self.programs = programs
        self.directories = programs.directories
        self._started: list[subprocess.Popen[str]] = []

    def environment(self, **variables: str) -> dict[str, str]:
        settings = {
            "PATH": self.programs.path,
            "VGPU_GPU_DRIVER": "simulated",
            "VGPU_MPS_DIRECTORY": str(self.directories.root),
            "VGPU_MPS_SHM_DIRECTORY": str(self.directories.shm),
        }
        return environment(**(settings | variables))

    def run(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """`vgpu-agent mps` with these, until it ends."""
        return subprocess.run(
            [*self._limits(arguments), sys.executable, "-m", "vgpu_agent", "mps", *arguments],
            env=self.environment(**variables),
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def start(self, *arguments: str, **variables: str) -> subprocess.Popen[str]:
        """The same, in the background; see `said`."""
        with self.log.open("a") as log:
            process = subprocess.Popen(
                [*self._limits(arguments), sys.executable, "-m", "vgpu_agent", "mps", *arguments],
                env=self.environment(**variables),
                cwd=REPOSITORY,
                stdout=log,
                stderr=log,
                text=True,
            )
        self._started.append(process)
        return process

    def _limits(self, arguments: tuple[str, ...]) -> list[str]:
        return limited(CAPABILITIES[arguments[0]])

    def start_daemons(self, **variables: str) -> subprocess.Popen[str]:
        """`mps daemon`, once all daemons answer."""
        supervisor = self.start("daemon", **variables)
        names = ["node"] if variables.get("VGPU_MPS_DAEMONS") == "node" else GPUS
        eventually(lambda: all(map(self.answers, names)), 20)
        return supervisor

    @property
    def log(self) -> Path:
        return self.programs.root / "log"

    @property
    def said(self) -> str:
        return self.log.read_text()

    def pipe(self, name: str) -> Path:
        return self.directories.daemon(name).pipe

    def process(self, name: str) -> Process:
        found = serve.daemon_process(self.directories.daemon(name))
        assert found is not None
        return found

    def lives(self, process: Process) -> bool:
        return processes.find(process.pid) == process

    def ask(self, name: str, line: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self.programs.program],
            input=f"{line}\n",
            env={**self.environment(), **self.directories.daemon(name).environment()},
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )

    def answers(self, name: str) -> bool:
        return (
            self.pipe(name).joinpath("control").exists()
            and self.ask(name, "get_default_active_thread_percentage").stdout.strip() == "100.0"
        )

    def start_server(self, name: str) -> Process:
        assert self.ask(name, f"start_server -uid {USER}").returncode == 0
        pid = int(self.ask(name, "get_server_list").stdout)
        eventually(lambda: any(each.pid == pid for each in processes.find_named(serve.SERVER)))
        found = processes.find(pid)
        assert found is not None
        return found

    def members(self) -> list[Process]:
        """All daemons and servers that live."""
        if not self.directories.root.is_dir():
            return []
        names = [path.name for path in self.directories.root.iterdir() if path.is_dir()]
        return [each for name in names for each in serve.members(self.directories.daemon(name))]

    def close(self) -> None:
        for process in self._started:
            with suppress(ProcessLookupError, PermissionError):
                if os.getpgid(process.pid) == process.pid:
                    os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            process.wait()
        for each in self.members():
            processes.send(each, signal.SIGKILL)


@contextmanager
def made(version: str = "fake") -> Iterator[Node]:
    """A node with the stand-ins, or with a real control program of that version."""
    # A short path: unix sockets take 107 bytes.
    with tempfile.TemporaryDirectory(prefix="v") as directory:
        root = Path(directory)
        programs = FakeMps(root, turns=False) if version == "fake" else RealMps(root, version)
        node = Node(programs)
        try:
            yield node
        finally:
            node.close()
