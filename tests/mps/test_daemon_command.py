"""`vgpu-agent mps daemon`: the process that the kubelet keeps an eye on is the daemon itself."""

import os
import signal
from pathlib import Path

import pytest

from tests.agent_process import execute
from tests.mps.fixtures import FakeMps, eventually

pytestmark = pytest.mark.slow

DAEMON = "from vgpu_agent.cli import execute; execute(['mps', 'daemon'])"


def test_the_process_is_the_daemon_and_answers(fake_mps: FakeMps):
    fake_mps.make_directories()
    process = fake_mps.run(DAEMON)
    eventually(lambda: fake_mps.ask("get_server_list").returncode == 0)
    command = Path(f"/proc/{process.pid}/cmdline").read_bytes().split(b"\0")
    assert command[-2:] == [b"-f", b""]
    assert b"mps" not in command
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=10) is not None
    assert fake_mps.ask("get_server_list").returncode != 0


@pytest.fixture
def told(tmp_path: Path):
    """What a daemon is started with, by a program of its name that writes it down."""
    program = tmp_path / "nvidia-cuda-mps-control"
    program.write_text('#!/bin/sh\necho "arguments $*"\nenv\nexec cat /proc/self/status\n')
    program.chmod(0o755)

    def start(**variables: str) -> str:
        path = f"{tmp_path}:{os.environ['PATH']}"
        done = execute("mps", "daemon", PATH=path, VGPU_MPS_DIRECTORY="/run/x/mps", **variables)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    return start


def test_it_gets_its_directories_and_the_order_of_cards(told):
    lines = told().splitlines()
    assert "arguments -f" in lines
    assert "CUDA_MPS_PIPE_DIRECTORY=/run/x/mps/pipe" in lines
    assert "CUDA_MPS_LOG_DIRECTORY=/run/x/mps/log" in lines
    assert "CUDA_DEVICE_ORDER=PCI_BUS_ID" in lines


def test_several_users_are_served_where_that_is_wanted(told):
    assert "arguments -f -multiuser-server" in told(VGPU_MPS_MULTIUSER="on").splitlines()


def test_signals_that_python_ignores_are_not_ignored_by_the_daemon(told):
    ignored = next(line for line in told().splitlines() if line.startswith("SigIgn:"))
    bits = int(ignored.split()[1], 16)
    assert not bits & (1 << (signal.SIGPIPE - 1))
    assert not bits & (1 << (signal.SIGXFSZ - 1))


def test_a_missing_program_is_named_with_what_to_do(tmp_path: Path):
    done = execute("mps", "daemon", PATH=str(tmp_path))
    assert done.returncode == 1
    assert "nvidia-cuda-mps-control cannot be run" in done.stderr
    assert "NVIDIA runtime" in done.stderr
    assert "Traceback" not in done.stderr


def test_without_mps_there_is_no_daemon():
    done = execute("mps", "daemon", VGPU_SHARING="time-slicing")
    assert done.returncode == 1
    assert "without MPS `vgpu-agent mps daemon` has nothing to do" in done.stderr
