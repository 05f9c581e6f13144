"""The fake MPS programs in a directory of their own, and everything that they start ended."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.agent_process import REPOSITORY, environment
from vgpu_agent.mps.control import Control
from vgpu_agent.mps.directories import Directories
from vgpu_agent.mps.processes import find_named, variable_of

SCRIPT = Path(__file__).with_name("fake_daemon.py")
PYTHON = sys._base_executable  # type: ignore[attr-defined]


def eventually(check: Callable[[], object], seconds: float = 5.0) -> None:
    """Waits until it is true."""
    deadline = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.02)


class FakeMps:
    """A node's MPS: directories, the two programs, and daemons that were started."""

    def __init__(self, root: Path) -> None:
        self.bin = root / "bin"
        self.bin.mkdir()
        self.behaviour = root / "behaviour"
        self.directories = Directories(root / "mps", root / "shm")
        self.processes: list[subprocess.Popen[str]] = []
        self.behave()
        program = self.bin / "nvidia-cuda-mps-control"
        program.write_text(
            f"#!/bin/sh\nFAKE_MPS_BEHAVIOUR='{self.behaviour}' FAKE_MPS_BIN='{self.bin}'"
            " export FAKE_MPS_BEHAVIOUR FAKE_MPS_BIN\n"
            f"exec '{PYTHON}' -E -S -s '{SCRIPT}' \"$@\"\n"
        )
        program.chmod(0o755)

    @property
    def program(self) -> str:
        return str(self.bin / "nvidia-cuda-mps-control")

    @property
    def path(self) -> str:
        """A PATH on which the fake is found."""
        return f"{self.bin}:{os.environ['PATH']}"

    def make_directories(self) -> None:
        for directory, mode in self.directories.modes().items():
            directory.mkdir(parents=True, exist_ok=True)
            directory.chmod(mode)

    def behave(self, **how: object) -> None:
        """What the daemon does from now on, in full."""
        new = self.behaviour.with_suffix(".new")
        new.write_text(json.dumps(how))
        new.replace(self.behaviour)

    def control(self, **options: float) -> Control:
        return Control(self.directories, binary=self.program, **options)

    def _environment(self) -> dict[str, str]:
        return environment(**self.directories.environment())

    def start(self) -> subprocess.Popen[str]:
        """A daemon that answers; the one before it must be gone."""
        self.make_directories()
        daemon = subprocess.Popen([self.program, "-f"], env=self._environment(), text=True)
        self.processes.append(daemon)
        self.daemon = daemon
        eventually(lambda: self.ask("get_server_list").returncode == 0)
        return daemon

    def kill(self) -> None:
        """The daemon is gone, without a word."""
        self.daemon.kill()
        self.daemon.wait()

    def ask(self, line: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self.program],
            input=f"{line}\n",
            env=self._environment(),
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )

    def start_server(self, uid: int = 1000) -> int:
        """Its PID."""
        assert self.ask(f"start_server -uid {uid}").returncode == 0
        return int(self.ask("get_server_list").stdout.split()[-1])

    def server_pids(self) -> list[int]:
        """Servers of this node that run, whatever a daemon says."""
        pipe = str(self.directories.pipe)
        return [
            process.pid
            for process in find_named("nvidia-cuda-mps-server")
            if variable_of(process, "CUDA_MPS_PIPE_DIRECTORY") == pipe
        ]

    def run(self, code: str, **variables: str) -> subprocess.Popen[str]:
        """Python code of the agent as a process; its log on standard error."""
        process = subprocess.Popen(
            [sys.executable, "-W", "error", "-c", code],
            env=environment(
                PATH=self.path,
                VGPU_MPS_DIRECTORY=str(self.directories.root),
                VGPU_MPS_SHM_DIRECTORY=str(self.directories.shm),
                **variables,
            ),
            cwd=REPOSITORY,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.processes.append(process)
        return process

    def close(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()
            if process.stderr is not None:
                process.stderr.close()
        for pid in self.server_pids():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@pytest.fixture
def fake_mps() -> Iterator[FakeMps]:
    # A short path: unix sockets take 107 bytes.
    with tempfile.TemporaryDirectory(prefix="vgpu-") as directory:
        mps = FakeMps(Path(directory))
        try:
            yield mps
        finally:
            mps.close()
