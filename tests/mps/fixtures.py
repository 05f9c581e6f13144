"""MPS programs in a directory of their own, and everything that they start ended."""

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self, TypeVar

import pytest

from tests.agent_process import REPOSITORY, environment
from vgpu_agent.mps.control import Control
from vgpu_agent.mps.directories import Directories
from vgpu_agent.mps.processes import find_named, variable_of

NAME = "GPU-a"
"""Of the daemon that is meant where no other is named."""
SCRIPT = Path(__file__).with_name("fake_daemon.py")
USER = 1000 if os.geteuid() == 0 else os.geteuid()
"""Whose servers are started: a daemon of no root has none of others."""
PYTHON = sys._base_executable  # type: ignore[attr-defined]


def eventually(check: Callable[[], object], seconds: float = 5.0) -> None:
    """Waits until it is true."""
    deadline = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.02)


_Mps = TypeVar("_Mps", bound="Mps")

SERVER = """#!/bin/bash
{}
exec -a "$0" sleep 600
"""


class Mps:
    """A node's MPS: directories, the control program, and daemons that were started.

    Only the server is a stand-in, whatever the program is: it sleeps.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.version = ""  # of a real program
        root.chmod(0o755)  # servers are of other users
        self.bin = root / "bin"
        self.bin.mkdir()
        self.directories = Directories(root / "mps", root / "shm")
        self.one = self.directories.daemon(NAME)
        self.processes: list[subprocess.Popen[str]] = []
        self.servers_do("")

    def of(self, name: str) -> Self:
        """The daemon of that name, on the same node."""
        other = copy.copy(self)
        other.one = self.directories.daemon(name)
        return other

    def servers_do(self, code: str) -> None:
        """What a server that starts does before it sleeps, in the words of bash: `exit 1`, say."""
        server = self.bin / "nvidia-cuda-mps-server"
        server.write_text(SERVER.format(code))
        server.chmod(0o755)

    @property
    def program(self) -> str:
        return str(self.bin / "nvidia-cuda-mps-control")

    @property
    def path(self) -> str:
        """A PATH on which both programs are found."""
        return f"{self.bin}:{os.environ['PATH']}"

    @property
    def pipe(self) -> Path:
        """Of the daemon that is started and asked here, as `log` is."""
        return self.one.pipe

    @property
    def log(self) -> Path:
        """Where a daemon in the background has its log files."""
        return self.one.log

    def make_directories(self) -> None:
        for directory, mode in ((self.pipe, 0o755), (self.log, 0o700)):
            directory.mkdir(parents=True, exist_ok=True)
            directory.chmod(mode)

    def control(self, **options: float) -> Control:
        return Control(self.one, binary=self.program, **options)

    def _environment(self) -> dict[str, str]:
        return environment(
            PATH=self.path,
            CUDA_MPS_PIPE_DIRECTORY=str(self.pipe),
            CUDA_MPS_LOG_DIRECTORY=str(self.log),
        )

    @property
    def output(self) -> Path:
        """What the daemons in the foreground wrote: their log."""
        return self.one.control_log

    def start(self, *options: str) -> subprocess.Popen[str]:
        """A daemon that answers; the one before it must be gone."""
        self.make_directories()
        with self.output.open("a") as output:
            daemon = subprocess.Popen(
                [self.program, "-f", *options],
                env=self._environment(),
                stdout=output,
                stderr=output,
                text=True,
            )
        self.processes.append(daemon)
        self.daemon = daemon
        eventually(lambda: self.ask("get_server_list").returncode == 0)
        return daemon

    def kill(self) -> None:
        """The daemon is gone, without a word."""
        self.daemon.kill()
        self.daemon.wait()

    def ask(self, *lines: str, **how: Any) -> subprocess.CompletedProcess[str]:
        """What it says to these commands in one connection; `how` goes to subprocess.run."""
        return self.run_program(input="".join(f"{line}\n" for line in lines), **how)

    def run_program(self, *options: str, **how: Any) -> subprocess.CompletedProcess[str]:
        """The control program, run until it ends."""
        return subprocess.run(
            [self.program, *options],
            env=self._environment(),
            capture_output=True,
            text=True,
            check=False,
            **{"timeout": 10, **how},
        )

    @contextmanager
    def held(self) -> Iterator[subprocess.Popen[str]]:
        """A caller that has the only control connection of the daemon that was started."""

        def connections() -> int:
            return self.output.read_text().count("NEW UI")

        before = connections()
        with subprocess.Popen(
            [self.program],
            env=self._environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as holder:
            eventually(lambda: connections() > before)
            yield holder
            if holder.stdin is not None:
                holder.stdin.close()

    def start_server(self, uid: int = USER) -> int:
        """Its PID."""
        assert self.ask(f"start_server -uid {uid}").returncode == 0
        pid = int(self.ask("get_server_list").stdout.split()[-1])
        eventually(lambda: pid in self.server_pids())
        return pid

    def server_pids(self) -> list[int]:
        """Servers of this node that run, whatever a daemon says."""
        pipe = str(self.pipe)
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


class FakeMps(Mps):
    """With the stand-in for the control program, which behaves as a test wants.

    `turns` makes callers wait for each other, as no real daemon does.
    """

    def __init__(self, root: Path, *, turns: bool = True) -> None:
        super().__init__(root)
        script = shutil.copy(SCRIPT, self.bin)  # for other users too
        program = self.bin / "nvidia-cuda-mps-control"
        program.write_text(
            f"#!/bin/sh\nexport {'FAKE_MPS_TURNS=' * turns}"
            ' FAKE_MPS_BEHAVIOUR="$CUDA_MPS_PIPE_DIRECTORY/../behaviour"\n'
            f"exec '{PYTHON}' -E -S -s '{script}' \"$@\"\n"
        )
        program.chmod(0o755)

    def run_program(
        self, *options: str, user: int | None = None, **how: Any
    ) -> subprocess.CompletedProcess[str]:
        """The program becomes the user itself, who may not be allowed to run this Python."""
        with pytest.MonkeyPatch.context() as patched:
            if user is not None:
                patched.setenv("FAKE_MPS_USER", str(user))
            return super().run_program(*options, **how)

    def behave(self, **how: object) -> None:
        """What the daemon does from now on, in full."""
        self.one.root.mkdir(parents=True, exist_ok=True)
        new = self.one.root / "behaviour.new"
        new.write_text(json.dumps(how))
        new.replace(self.one.root / "behaviour")


def real_programs() -> dict[str, Path | None]:
    """By version: those of tests/mps/get-real-daemon, or else the one of this machine."""
    found = sorted(REPOSITORY.glob(".cache/mps/*/usr/bin/nvidia-cuda-mps-control"))
    if found:
        return {path.parents[2].name: path for path in found}
    installed = shutil.which("nvidia-cuda-mps-control")
    return {"installed" if installed else "real": Path(installed) if installed else None}


class RealMps(Mps):
    """With a control program of NVIDIA's."""

    def __init__(self, root: Path, version: str) -> None:
        super().__init__(root)
        self.version = version
        program = PROGRAMS[version]
        if program is None:
            pytest.skip("no nvidia-cuda-mps-control: tests/mps/get-real-daemon gets it")
        shutil.copy(program, self.bin)  # for other users too


PROGRAMS = real_programs()
_FOUND = [name for name, path in PROGRAMS.items() if path is not None]
SOME = sorted({_FOUND[0], _FOUND[-1]}) if _FOUND else ["fake"]
"""The oldest and the newest program: what differs is seen in these."""


@contextmanager
def made(make: Callable[[Path], _Mps]) -> Iterator[_Mps]:
    # A short path: unix sockets take 107 bytes.
    with tempfile.TemporaryDirectory(prefix="vgpu-") as directory:
        mps = make(Path(directory))
        try:
            yield mps
        finally:
            mps.close()


@pytest.fixture
def fake_mps() -> Iterator[FakeMps]:
    with made(FakeMps) as mps:
        yield mps


@contextmanager
def made_as(name: str) -> Iterator[Mps]:
    """The stand-in, or the real one of that version."""

    def make(root: Path) -> Mps:
        if name != "fake":
            return RealMps(root, name)
        mps = FakeMps(root, turns=False)
        mps.behave(status="INITIALIZING")  # which a server that sleeps stays
        return mps

    with made(make) as mps:
        yield mps


@pytest.fixture(params=["fake", *PROGRAMS])
def every_mps(request: pytest.FixtureRequest) -> Iterator[Mps]:
    """The stand-in, and each real one."""
    with made_as(request.param) as mps:
        yield mps


@pytest.fixture(params=SOME)
def any_mps(request: pytest.FixtureRequest) -> Iterator[Mps]:
    """The oldest and the newest real one, or else the stand-in."""
    with made_as(request.param) as mps:
        yield mps
