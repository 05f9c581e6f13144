"""The command line, and the agent as a process."""

import hashlib
import json
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from tests.agent_process import REPOSITORY, execute, running
from tests.kubelet_peer import KubeletPeer
from vgpu_agent import __main__ as program
from vgpu_agent import __version__, cli
from vgpu_agent.address import Address
from vgpu_agent.errors import ListenError, SettingsError, StoryError

VENVS = REPOSITORY / ".cache" / "venvs"
REQUIREMENTS = REPOSITORY / "requirements" / "run.txt"
OWN = f"{sys.version_info.major}.{sys.version_info.minor}"
SUPPORTED = ("3.11", "3.12", "3.13")


# Interpreters


def interpreters() -> dict[str, str]:
    """The supported versions of Python that this machine has, and where."""
    found = {OWN: sys.executable}
    for name in SUPPORTED:
        managed = sorted(Path.home().glob(f".pyenv/versions/*/bin/python{name}"))
        for candidate in (shutil.which(f"python{name}"), *map(str, managed)):
            if name not in found and candidate and _has_venv(Path(candidate), name):
                found[name] = candidate
    return dict(sorted(found.items()))


def _has_venv(python: Path, name: str) -> bool:
    """Whether its library can make a virtual environment: a shim has none beside it."""
    return (python.resolve().parents[1] / "lib" / f"python{name}" / "ensurepip").is_dir()


PYTHONS = interpreters()


def with_requirements(name: str) -> str:
    """An interpreter of that version which has what the agent needs; kept for the next time."""
    if name == OWN:
        return sys.executable
    asked = [PYTHONS[name], "-I", "-c", "import platform; print(platform.python_version())"]
    exact = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    key = hashlib.sha256(REQUIREMENTS.read_bytes()).hexdigest()[:16]
    made = VENVS / f"{exact}-{key}"
    if not made.exists():
        VENVS.mkdir(parents=True, exist_ok=True)
        # Made aside and renamed: test runs beside each other never see half of it.
        fresh = Path(tempfile.mkdtemp(dir=VENVS))
        subprocess.run([PYTHONS[name], "-m", "venv", fresh], check=True)
        pip = [fresh / "bin" / "python", "-m", "pip", "--disable-pip-version-check"]
        install = ["install", "-q", "--require-hashes", "-r", REQUIREMENTS]
        subprocess.run([*pip, *install], check=True)
        try:
            fresh.rename(made)
        except OSError:  # the other run was first
            shutil.rmtree(fresh)
    return str(made / "bin" / "python")


def sockets(kubelet_dir: Path) -> list[str]:
    return sorted(path.name for path in (kubelet_dir / "device-plugins").glob("vgpu-*"))


# The command line


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ("run", {}),
        ("dev", {"seconds": None}),
        ("dev --for 1e1", {"seconds": 10.0}),
        ("release", {"seconds": None, "reset_done": None}),
        ("release --for 10m --reset-done 0", {"seconds": 600.0, "reset_done": "0"}),
        ("release --for 1.5h", {"seconds": 5400.0, "reset_done": None}),
        ("release --reset-done --for 90s", {"seconds": 90.0, "reset_done": ""}),
        ("cordon GPU-a", {"gpu": "GPU-a", "reason": ""}),
        ("cordon 0 --reason fan", {"gpu": "0", "reason": "fan"}),
        ("uncordon 0", {"gpu": "0"}),
        ("drain-list 0", {"gpu": "0"}),
        ("simulate xid 79 --gpu 0", {"fault": "xid", "xid": 79, "gpu": "0"}),
        ("simulate ecc --gpu 0", {"fault": "ecc", "gpu": "0"}),
        ("simulate heal", {"fault": "heal", "gpu": None}),
        ("doctor --json", {"json": True}),
        ("status", {"json": False, "watch": None, "wide": False, "address": None}),
        ("status --watch", {"json": False, "watch": 2.0, "wide": False, "address": None}),
        ("status --wide", {"json": False, "watch": None, "wide": True, "address": None}),
        ("status --watch 0.5", {"json": False, "watch": 0.5, "wide": False, "address": None}),
        (
            "status --json --address [::1]:9408",
            {"json": True, "watch": None, "wide": False, "address": Address("::1", 9408)},
        ),
    ],
)
def test_arguments(arguments, options):
    command = arguments.split()[0]
    assert vars(cli.parse(arguments.split())) == {"command": command, **options}


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "required: command"),
        (["walk"], "'walk'"),
        (["run", "--fast"], "--fast"),
        (["run", "now"], "now"),
        (["--replicas", "run"], "--replicas"),
        (["dev", "--for"], "--for"),
        (["dev", "--for", "0"], "'0' is not a number of seconds above 0"),
        (["dev", "--for", "-1"], "--for"),
        (["dev", "--for", "inf"], "'inf' is not a number of seconds above 0"),
        (["dev", "--for", "nan"], "'nan' is not a number of seconds above 0"),
        (["dev", "--for", "soon"], "'soon' is not a number of seconds above 0"),
        (["release", "--for", "10d"], "'10d' is not a number of seconds above 0, nor a time such"),
        (["release", "--for", "m"], "'m' is not a number of seconds"),
        (["cordon"], "required: GPU"),
        (["drain-list"], "required: GPU"),
        (["simulate"], "required: fault"),
        (["simulate", "burn", "--gpu", "0"], "(choose from 'xid', 'lose', 'ecc', 'hang', 'heal')"),
        (["simulate", "xid", "--gpu", "0"], "required: XID"),
        (["simulate", "xid", "x", "--gpu", "0"], "'x' is not the number of an XID"),
        (["simulate", "hang"], "required: --gpu"),
        (["status", "--watch", "0"], "'0' is not a number of seconds above 0"),
        (["status", "--json", "--watch"], "not allowed with"),
        (["status", "--address", "9408"], "'9408' is not host:port or [IPv6]:port"),
        (["status", "--address", "localhost:0"], "'localhost:0' is not host:port"),
        (["status", "--address", "a:99999"], "'a:99999' is not host:port"),
    ],
)
def test_wrong_arguments_end_with_2_and_a_message_that_names_them(capsys, arguments, named):
    with pytest.raises(SystemExit) as caught:
        cli.parse(arguments)
    assert caught.value.code == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert "usage: vgpu-agent" in told.err
    assert named in told.err.splitlines()[-1]


def test_help_names_the_commands(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.parse(["--help"])
    assert caught.value.code == 0
    told = capsys.readouterr().out
    assert re.search(r"^ +run +run the agent", told, re.MULTILINE)
    assert re.search(r"^ +status +show the GPUs", told, re.MULTILINE)
    assert re.search(r"^ +dev +run the agent with simulated GPUs", told, re.MULTILINE)


# Exit codes


class BugError(Exception):
    pass


@pytest.fixture
def ended(monkeypatch):
    """Runs the program, in which this happens; its exit code."""

    def end(happens: Any) -> int:
        monkeypatch.setattr(program, "execute", Mock(side_effect=[happens]))
        with pytest.raises(SystemExit) as caught:
            program.main()
        return caught.value.code

    return end


@pytest.mark.parametrize(
    ("happens", "code", "told"),
    [
        (0, 0, ""),
        (SettingsError("1 setting is wrong:\n  X"), 2, "vgpu-agent: 1 setting is wrong:\n  X\n"),
        (ExceptionGroup("", [ListenError("taken")]), 2, "vgpu-agent: taken\n"),
        (
            ExceptionGroup("", [ExceptionGroup("", [StoryError("step 'x' failed")])]),
            1,
            "vgpu-agent: step 'x' failed\n",
        ),
    ],
)
def test_an_expected_end_is_a_message_and_an_exit_code(ended, capsys, happens, code, told):
    assert ended(happens) == code
    assert capsys.readouterr().err == told


@pytest.mark.parametrize(
    "error",
    [
        BugError("oh"),
        ExceptionGroup("", [BugError("oh")]),
        ExceptionGroup("", [ListenError("x"), BugError("oh")]),
    ],
)
def test_a_bug_ends_with_1_and_is_logged_with_its_trace(ended, caplog, error):
    assert ended(error) == 1
    (record,) = caplog.records
    assert record.getMessage() == "ending after an unexpected error"
    assert "BugError: oh" in (record.exc_text or caplog.text)


# Processes that end by themselves


@pytest.mark.slow
def test_the_version_is_that_of_the_package():
    done = execute("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, version("vgpu-agent") + "\n", "")


@pytest.mark.slow
def test_wrong_settings_end_with_2_and_a_line_for_each():
    done = execute(
        "run", VGPU_GPU_DRIVER="simulated", VGPU_REPLICAS="many", VGPU_METRICS_ADDRESS="9408"
    )
    assert (done.returncode, done.stdout) == (2, "")
    head, first, second = done.stderr.splitlines()
    assert head == "vgpu-agent: 2 settings are wrong:"
    assert first.startswith("  VGPU_REPLICAS='many' is wrong; allowed: ")
    assert second.startswith("  VGPU_METRICS_ADDRESS='9408' is wrong; allowed: ")


@pytest.mark.slow
def test_a_metrics_port_in_use_ends_with_2_and_a_message(kubelet_dir):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = "{}:{}".format(*taken.getsockname())
        done = execute(
            "run",
            VGPU_GPU_DRIVER="simulated",
            VGPU_KUBELET_DIR=str(kubelet_dir),
            VGPU_METRICS_ADDRESS=address,
        )
    assert (done.returncode, done.stdout) == (2, "")
    first, last = done.stderr.splitlines()
    # The first line says where it runs.
    starts = f" INFO    vgpu-agent starts version={__version__} node={socket.gethostname()}"
    assert first.endswith(starts)
    assert last == (
        f"vgpu-agent: VGPU_METRICS_ADDRESS={address}: cannot listen there: Address already in use;"
        " set another host:port, or end what uses this one"
    )


@pytest.mark.slow
def test_the_log_begins_with_the_names_of_node_and_pod(kubelet_dir):
    names = {
        "VGPU_NODE_NAME": "gpu-1.example.com",
        "VGPU_POD_NAMESPACE": "gpus",
        "VGPU_POD_NAME": "vgpu-agent-x7k2p",
    }
    with running(kubelet_dir, **names, VGPU_REPLICS="3") as agent:
        agent.wait_line("metrics at")
        report = json.loads(agent.get("/status.json")[1])
    assert agent.lines[0].endswith(
        f"vgpu-agent starts version={__version__} node=gpu-1.example.com"
        " namespace=gpus pod=vgpu-agent-x7k2p"
    )
    found = (report["node"], report["namespace"], report["pod"])
    assert found == ("gpu-1.example.com", "gpus", "vgpu-agent-x7k2p")


# The agent


@pytest.mark.slow
def test_the_agent_registers_lists_and_is_ready(kubelet_dir):
    with KubeletPeer(kubelet_dir) as peer, running(kubelet_dir, VGPU_REPLICAS="4") as agent:
        assert peer.wait_registrations(1).error is None
        devices = peer.wait_list(1).devices
        assert len(devices) == 2 * 4
        assert {device.health for device in devices} == {"Healthy"}
        agent.wait_line(r"registered with the kubelet.* resource=k8s\.amazonaws\.com/vgpu")
        assert agent.get("/readyz") == (200, "ready\n")
        assert agent.get("/healthz") == (200, "ok\n")
        status, metrics = agent.get("/metrics")
        assert status == 200
        assert "vgpu_kubelet_connected 1.0" in metrics
        code, took = agent.end()
    assert (code, took < 2) == (0, True)


@pytest.mark.slow
@pytest.mark.alone
def test_without_a_kubelet_it_waits_is_not_ready_and_ends_at_once(kubelet_dir):
    with running(kubelet_dir) as agent:
        agent.wait_line("no kubelet at .*kubelet.sock: there is no such socket; waiting for it")
        status, why = agent.get("/readyz")
        assert status == 503
        assert why.startswith(f"not registered: no kubelet at {kubelet_dir}/device-plugins/")
        assert agent.get("/healthz")[0] == 200
        code, took = agent.end()
    assert (code, took < 2) == (0, True)
    assert "Traceback" not in agent.text


@pytest.mark.slow
def test_every_line_is_a_json_object_where_json_is_asked_for(kubelet_dir):
    # What Kubernetes sets for a service named vgpu-agent is nobody's setting.
    variables = {"VGPU_REPLICA": "3", "VGPU_XYZZY": "1", "VGPU_AGENT_PORT": "tcp://10.0.0.7:9408"}
    variables |= {"VGPU_LOG_FORMAT": "json", "VGPU_LOG_LEVEL": "debug"}
    with KubeletPeer(kubelet_dir) as peer, running(kubelet_dir, **variables) as agent:
        peer.wait_list(1)
        agent.wait_line("with the kubelet")
        agent.wait_line("cannot ask")
        assert agent.end()[0] == 0
    told: list[dict[str, Any]] = [json.loads(line) for line in agent.lines]
    assert all({"time", "level", "logger", "message"} <= set(line) for line in told)
    holders = kubelet_dir / "pod-resources" / "kubelet.sock"
    assert [line["message"] for line in told if line["level"] == "warning"] == [
        "VGPU_REPLICA: unknown setting, ignored; did you mean VGPU_REPLICAS?",
        "VGPU_XYZZY: unknown setting, ignored",
        f"cannot ask the kubelet who holds which vGPU: there is no {holders}",
    ]
    assert told[-1]["message"] == "SIGTERM: ending"


# The end


@pytest.mark.slow
def test_ctrl_c_ends_it_with_0_and_without_its_socket(kubelet_dir):
    with KubeletPeer(kubelet_dir) as peer, running(kubelet_dir) as agent:
        peer.wait_list(1)
        assert len(sockets(kubelet_dir)) == 1
        agent.wait_line("registered with the kubelet")
        code, took = agent.end(signal.SIGINT)
        assert peer.wait_stream_ends(1).code.name == "OK"
    assert (code, took < 2) == (0, True), agent.text
    assert sockets(kubelet_dir) == []
    assert "SIGINT: ending" in agent.lines[-1]


@pytest.mark.slow
def test_signals_that_come_again_change_nothing(kubelet_dir):
    with KubeletPeer(kubelet_dir, hold_connection=True) as peer, running(kubelet_dir) as agent:
        peer.wait_list(1)
        agent.process.send_signal(signal.SIGINT)
        agent.wait_line("SIGINT: ending")
        time.sleep(0.03)  # the end is under way, and takes a tenth of a second at least
        code, took = agent.end(signal.SIGTERM)
    assert (code, took < 2) == (0, True), agent.text
    assert sockets(kubelet_dir) == []
    assert "Traceback" not in agent.text


@pytest.mark.slow
@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("behaviour", ["hold_connection", "stall"])
def test_it_ends_on_every_python_whatever_the_kubelet_does(kubelet_dir, python, behaviour):
    executable = with_requirements(python)
    variables = {} if python == OWN else {"PYTHONPATH": str(REPOSITORY)}
    with (
        KubeletPeer(kubelet_dir, **{behaviour: True}) as peer,
        running(kubelet_dir, executable, **variables) as agent,
    ):
        if behaviour == "stall":
            peer.wait_stalled(20)
        else:
            peer.wait_list(1, 20)
        agent.wait_line("with the kubelet")
        code, took = agent.end()
        ended = peer.wait_stream_ends(1)
        if behaviour == "hold_connection":
            assert ended.code.name == "OK"
    assert (code, took < 2) == (0, True), agent.text
    assert sockets(kubelet_dir) == []
    assert "SIGTERM: ending" in agent.lines[-1]
    assert "Traceback" not in agent.text
    assert "Warning" not in agent.text


IMPORTING = """
import os, signal, sys
from vgpu_agent import signals
signals.end_within(20, 9)
class Early:
    def find_spec(self, name, *_):
        if name == "vgpu_agent.{}":
            os.kill(os.getpid(), signal.{})
sys.meta_path.insert(0, Early())
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", ["SIGTERM", "SIGINT"])
@pytest.mark.parametrize("module", ["cli", "gpu.memory", "settings", "running"])
def test_a_signal_before_all_is_imported_ends_it_with_0(kubelet_dir, module, number):
    with running(kubelet_dir, changes=IMPORTING.format(module, number)) as agent:
        assert agent.process.wait(15) == 0
    assert agent.lines == []


@pytest.mark.slow
def test_a_release_before_all_is_imported_is_nothing(kubelet_dir):
    with running(kubelet_dir, changes=IMPORTING.format("cli", "SIGUSR1")) as agent:
        assert agent.get("/healthz")[0] == 200


PART = """
import anyio, asyncio
from vgpu_agent import running
from vgpu_agent.kubelet.podresources import PodResourcesWatch as Part
from vgpu_agent.kubelet.session import KubeletSession
running.END_SECONDS = 1
async def part(self):
    await anyio.sleep(0.5)
    {}
Part.run = part
async def stays(self):
    with anyio.CancelScope(shield={}):
        await anyio.sleep_forever()
KubeletSession.run = stays
"""


@pytest.mark.slow
@pytest.mark.parametrize("stays", [True, False])
@pytest.mark.parametrize("end", ["raise asyncio.CancelledError", "raise LookupError"])
def test_an_agent_one_of_whose_parts_ends_is_a_failure_whatever_the_others_do(
    kubelet_dir, end, stays
):
    with running(kubelet_dir, changes=PART.format(end, stays)) as agent:
        assert agent.process.wait(15) == 1


@pytest.mark.slow
def test_what_hangs_at_the_end_does_not_keep_the_agent(kubelet_dir):
    with running(kubelet_dir, changes=PART.format("await anyio.sleep_forever()", True)) as agent:
        assert agent.get("/healthz")[0] == 200
        assert agent.end()[0] == 0


@pytest.mark.slow
def test_an_agent_that_is_out_of_descriptors_waits_for_some(kubelet_dir, monkeypatch):
    monkeypatch.delenv("COVERAGE_PROCESS_CONFIG", raising=False)  # its file could not be opened
    (kubelet_dir / "device-plugins").mkdir()
    with socket.socket(socket.AF_UNIX) as stale:  # it is tried again and again
        stale.bind(str(kubelet_dir / "device-plugins" / "kubelet.sock"))
    with running(kubelet_dir, VGPU_REPLICAS="4") as agent:
        agent.wait_line("no kubelet at")
        pid, (soft, hard) = agent.process.pid, resource.getrlimit(resource.RLIMIT_NOFILE)
        port = agent.port
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (3, hard))
        with socket.create_connection(("127.0.0.1", port)):
            time.sleep(3)
        assert agent.process.poll() is None, agent.text
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (soft, hard))
        with KubeletPeer(kubelet_dir) as peer:
            peer.wait_list(1, 20)
            agent.wait_line("with the kubelet")
            assert agent.get("/healthz")[0] == 200
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (3, hard))
            time.sleep(0.5)
            assert agent.end()[0] == 0, agent.text
    assert "Traceback" not in agent.text
    assert len(agent.lines) < 40


SCARCE = """
import resource
import vgpu_agent.agent, vgpu_agent.settings_reading
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, ({}, hard))
"""


@pytest.mark.slow
@pytest.mark.parametrize("limit", [4, 5, 8, 10])
def test_an_agent_that_begins_without_descriptors_waits_for_some(kubelet_dir, monkeypatch, limit):
    monkeypatch.delenv("COVERAGE_PROCESS_CONFIG", raising=False)
    with running(kubelet_dir, changes=SCARCE.format(limit)) as agent:
        agent.wait_line("Too many open files")
        time.sleep(1.5)
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.prlimit(agent.process.pid, resource.RLIMIT_NOFILE, limits)
        assert agent.get("/healthz")[0] == 200
        assert agent.end()[0] == 0
    assert "Traceback" not in agent.text
    assert sum("Too many open files" in line for line in agent.lines) < 5


# The doctor


@pytest.mark.slow
def test_the_doctor_finds_nothing_wrong_where_all_is_there(kubelet_dir):
    variables = {
        "VGPU_GPU_DRIVER": "simulated",
        "VGPU_KUBELET_DIR": str(kubelet_dir),
        "VGPU_STATE_DIRECTORY": str(kubelet_dir / "state"),
        "VGPU_METRICS_ADDRESS": "127.0.0.1:0",
    }
    with KubeletPeer(kubelet_dir):
        done = execute("doctor", "--json", **variables)
    assert done.returncode == 0, done.stdout
    assert done.stderr == ""
    assert json.loads(done.stdout)


@pytest.mark.slow
def test_the_doctor_goes_on_where_the_settings_are_wrong_and_ends_with_1(kubelet_dir):
    done = execute("doctor", VGPU_KUBELET_DIR=str(kubelet_dir), VGPU_REPLICAS="x")
    assert done.returncode == 1
    assert "VGPU_REPLICAS='x'" in done.stdout
    assert "kubelet directory" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
