"""`vgpu-agent dev`: the rehearsal, as a process and inside this one."""

import gc
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import anyio
import pytest

from tests.agent_process import environment
from vgpu_agent.address import Address
from vgpu_agent.commands import dev
from vgpu_agent.errors import StoryError
from vgpu_agent.settings import GpuDriverKind

STRAY = {
    "VGPU_REPLICAS": "99",
    "VGPU_GPU_DRIVER": "nvml",
    "VGPU_KUBELET_DIR": "not-absolute",
    "VGPU_METRICS_ADDRESS": "nowhere",
    "VGPU_LOG_LEVEL": "debug",
}

STORY = [
    r"kubelet: a plugin registered k8s\.amazonaws\.com/vgpu",
    r"kubelet: its first list has 20 vGPUs, all healthy",
    r"look yourself: http://127\.0\.0\.1:\d+/ in a browser, curl http://127\.0\.0\.1:\d+/metrics",
    r"shell after `\. /\S+/env`, vgpu-agent status and doctor$",
    r"kubelet: pod resnet-0 admitted with GPU-\S+::\d+$",
    r"NVIDIA_VISIBLE_DEVICES=GPU-\S+$",
    r"VGPU_SHARE=1/10$",
    r"mount \S+ on /dev/shm",
    r"kubelet: pod bert-0 admitted with GPU-\S+, GPU-\S+$",
    r"VGPU_SHARE=2/10$",
    r"kubelet: pod llama-0 admitted with GPU-",
    r"VGPU_SHARE=5/10$",
    r"agent: vGPUs are held by resnet-0 1, bert-0 2, llama-0 5 \(PodResources\)$",
    r"\(pod bert-0 ends\)",
    r"agent: vGPUs are held by resnet-0 1, llama-0 5 \(PodResources\)$",
    r"\(GPU 0 reports XID 79 and falls off the bus\)",
    r"kubelet: one update: now 20 vGPUs, 10 of them unhealthy",
    r"\(GPU 0 was reset and is enumerated again\)",
    r"kubelet: one update: now 20 vGPUs, all healthy",
    r"\(the MPS daemon of GPU 0 dies\)",
    r"kubelet: .* now 20 vGPUs, 10 of them unhealthy",
    r"\(another MPS daemon is there, with its limits\)",
    r"kubelet: .* now 20 vGPUs, all healthy",
    r"\(the kubelet stops and starts again\)",
    r"kubelet: the plugin registered again; its list has 20 vGPUs, all healthy",
    r"kubelet: pod resnet-1 admitted with GPU-\S+$",
    r"vgpu-agent simulate ecc --gpu 1",
    r"all of it worked: .*MPS.*",
    r"serving until 15 s",
]


@pytest.fixture
def temporary() -> Iterator[Path]:
    """Where processes put temporary files. Short: unix sockets take 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="t-") as directory:
        yield Path(directory)


@contextmanager
def taken(host: str, port: int) -> Iterator[None]:
    """That address in use: by this test, or by whoever else has it."""
    with ExitStack() as stack:
        with suppress(OSError):
            stack.enter_context(socket.create_server((host, port)))
        yield


def start(temporary: Path, *arguments: str, **variables: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-W", "default::ResourceWarning", "-m", "vgpu_agent", "dev", *arguments],
        env=environment(**variables, TMPDIR=str(temporary)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def in_order(patterns: list[str], lines: list[str]) -> list[str]:
    """The patterns of which no line tells, each looked for after the line of the one before."""
    missing, rest = [], list(lines)
    for pattern in patterns:
        at = next((n for n, line in enumerate(rest) if re.search(pattern, line)), None)
        if at is None:
            missing.append(pattern)
        else:
            rest = rest[at + 1 :]
    return missing


LOG = [
    r"driver simulated answers gpus=2",
    r"registered with the kubelet",
    r"Allocate: ",
    r"XID 79",
    r"healthy again",
    r"registration ended",
    r"registered with the kubelet",
]
"""The agent's own, beside the story."""


def no_log_lines(errors: str) -> list[str]:
    """Lines that are none of the agent's log, such as a warning of Python's."""
    form = r"\d{4}-\d\d-\d\dT[\d:.]+Z (?:INFO|WARNING) "
    return [line for line in errors.splitlines() if not re.match(form, line)]


# As a process


@pytest.mark.slow
def test_the_whole_story_is_told_in_time_whatever_is_set_or_taken_on_the_machine(temporary):
    began = time.monotonic()
    with taken("127.0.0.1", 9408), start(temporary, "--for", "15", **STRAY) as process:
        told, errors = process.communicate(timeout=40)
    assert process.returncode == 0, told + errors
    assert time.monotonic() - began < 20
    assert in_order(STORY, told.splitlines()) == []
    assert "curl http://127.0.0.1:9408/" not in told
    assert list(temporary.iterdir()) == []
    assert in_order(LOG, errors.splitlines()) == []
    assert no_log_lines(errors) == []


@pytest.mark.slow
def test_too_short_a_time_fails_and_names_the_step(temporary):
    with start(temporary, "--for", "2") as process:
        told, errors = process.communicate(timeout=20)
    assert process.returncode == 1
    (last,) = no_log_lines(errors)
    assert re.fullmatch(r"vgpu-agent: the time ended at step '[a-z0-9 -]+': all of it .*", last)
    assert "all of it worked" not in told
    assert list(temporary.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_the_middle_ends_it_cleanly(temporary, number):
    with start(temporary) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        line = ""
        while "its first list" not in line:
            line = process.stdout.readline()
            assert line, process.stderr.read()
        began = time.monotonic()
        process.send_signal(number)
        code = process.wait(10)
        took = time.monotonic() - began
        errors = process.stderr.read()
    assert (code, took < 2) == (0, True), errors
    assert list(temporary.iterdir()) == []
    assert no_log_lines(errors) == []


@pytest.mark.slow
def test_beside_it_all_commands_work_and_the_doctor_finds_nothing_wrong(temporary):
    """As a second shell is told to."""

    def typed(command: str) -> subprocess.CompletedProcess[str]:
        words = ["sh", "-c", f". {file} && vgpu-agent {command}"]
        return subprocess.run(
            words, env=environment(), capture_output=True, text=True, check=False, timeout=30
        )

    with start(temporary) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        told = ""
        while "serving until" not in told:
            line = process.stdout.readline()
            assert line, process.stderr.read()
            told += line
        file = re.search(r"`\. (\S+)`", told)[1]
        doctor = typed("doctor")
        status = typed("status")
        assert typed("simulate ecc --gpu 1").returncode == 0
        while not (ill := typed("doctor")).returncode:
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        errors = process.stderr.read()
    assert doctor.stdout.splitlines()[-1].endswith(" ok, 0 warn, 0 fail"), doctor.stdout
    assert (doctor.returncode, doctor.stderr) == (0, "")
    assert re.search(r"^fail +GPU 1 +unhealthy: ecc ", ill.stdout, re.MULTILINE)
    assert no_log_lines(errors) == []
    # What the pods have in use, of a GPU as drivers report it.
    assert re.findall(r"[\d.]+ GiB of [\d.]+ GiB", status.stdout) == [
        "39.1 GiB of 79.6 GiB",
        "7 GiB of 79.6 GiB",
    ]


# Inside this process


QUICK = dev.StoryTiming(step=2.5, shown_for=0.05)
"""A step that is not observed is given up soon, and nobody reads along."""


@pytest.fixture
def collected() -> Iterator[None]:
    """What was left open is told of here, not in a later test."""
    yield
    gc.collect()


@pytest.mark.slow
@pytest.mark.usefixtures("collected")
async def test_a_fault_that_nobody_notices_is_a_failure_that_names_the_step(monkeypatch, temporary):
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    told: list[str] = []
    with pytest.RaisesGroup(
        pytest.RaisesExc(
            StoryError,
            match=r"^step 'GPU failing' failed: not observed within 2.5 s.*20 vGPUs, all healthy",
        ),
        flatten_subgroups=True,
        allow_unwrapped=True,
    ):
        await dev.run_dev(told.append, watch_gpus=False, timing=QUICK)
    assert told[-1] == "(GPU 0 reports XID 79 and falls off the bus)"
    assert list(temporary.iterdir()) == []


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.usefixtures("collected")
@pytest.mark.parametrize("below", ["", "d" * 60], ids=["near", "far down"])
async def test_the_story_ends_well_when_somebody_watches(monkeypatch, temporary, below):
    """A long TMPDIR would make the path of a unix socket too long."""
    (temporary / below).mkdir(exist_ok=True)
    monkeypatch.setattr(tempfile, "tempdir", str(temporary / below))
    told: list[str] = []
    with anyio.CancelScope() as scope:

        def tell(line: str) -> None:
            told.append(line)
            if line == "serving until Ctrl-C":
                scope.cancel()

        await dev.run_dev(tell, timing=QUICK)
    assert in_order(STORY[:-1], told) == []
    assert list((temporary / below).iterdir()) == []


def test_the_metrics_are_where_they_always_are_if_nobody_else_is_there():
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = Address(*free.getsockname())
    with dev._listen(address) as first, dev._listen(address) as second:
        assert first.getsockname() == tuple(address)
        assert second.getsockname()[1] not in (0, address.port)


def test_the_settings_come_from_no_variable(monkeypatch):
    for name, value in STRAY.items():
        monkeypatch.setenv(name, value)
    settings = dev.embedded_settings(Path("/k"), Address("127.0.0.1", 9408))
    assert settings.gpu_driver is GpuDriverKind.SIMULATED
    assert settings.replicas == 10
    assert settings.kubelet_dir == Path("/k")
