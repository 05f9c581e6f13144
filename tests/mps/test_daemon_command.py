"""`vgpu-agent mps daemon`: the process that the kubelet keeps an eye on is the daemon itself."""

import os
import signal
from pathlib import Path

import pytest

from tests.agent_process import execute
from tests.mps.fixtures import eventually

pytestmark = pytest.mark.slow

DAEMON = "from vgpu_agent.cli import execute; execute(['mps', 'daemon'])"


def test_the_process_is_the_daemon_and_answers(fake_mps):
    fake_mps.make_directories()
    process = fake_mps.run(DAEMON)
    eventually(lambda: fake_mps.ask("get_server_list").returncode == 0)
    command = Path(f"/proc/{process.pid}/cmdline").read_bytes().split(b"\0")
    assert command[-2:] == [b"-f", b""]
    assert b"mps" not in command
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=10) is not None
    assert fake_mps.ask("get_server_list").returncode != 0


@pytest.mark.parametrize(
    ("variables", "arguments"),
    [({}, "-f"), ({"VGPU_MPS_MULTIUSER": "on"}, "-f -multiuser-server")],
    ids=["by default", "several users"],
)
def test_it_gets_arguments_directories_the_order_of_gpus_and_its_signals(
    tmp_path, variables: dict[str, str], arguments
):
    """Seen by a program of its name that writes down what it is started with."""
    program = tmp_path / "nvidia-cuda-mps-control"
    program.write_text('#!/bin/sh\necho "arguments $*"\nenv\nexec cat /proc/self/status\n')
    program.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = execute("mps", "daemon", PATH=path, VGPU_MPS_DIRECTORY="/run/x/mps", **variables)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert f"arguments {arguments}" in lines
    assert "CUDA_MPS_PIPE_DIRECTORY=/run/x/mps/pipe" in lines
    assert "CUDA_MPS_LOG_DIRECTORY=/run/x/mps/log" in lines
    assert "CUDA_DEVICE_ORDER=PCI_BUS_ID" in lines
    # What Python ignores the daemon does not.
    ignored = int(next(line for line in lines if line.startswith("SigIgn:")).split()[1], 16)
    assert not ignored & (1 << (signal.SIGPIPE - 1))
    assert not ignored & (1 << (signal.SIGXFSZ - 1))


def test_a_missing_program_is_named_with_what_to_do(tmp_path):
    done = execute("mps", "daemon", PATH=str(tmp_path))
    assert done.returncode == 1
    assert "nvidia-cuda-mps-control cannot be run" in done.stderr
    assert "NVIDIA runtime" in done.stderr
    assert "Traceback" not in done.stderr


def test_without_mps_there_is_no_daemon():
    done = execute("mps", "daemon", VGPU_SHARING="time-slicing")
    assert done.returncode == 1
    assert "without MPS `vgpu-agent mps daemon` has nothing to do" in done.stderr
