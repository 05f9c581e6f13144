"""`vgpu-agent mps daemon`: a daemon for each GPU, kept running by a shell; and `mps restart`."""

import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import anyio
import pytest

from tests.mps import node as nodes
from tests.mps.fixtures import SOME, eventually
from tests.mps.node import GPUS, Node
from vgpu_agent import store
from vgpu_agent.commands.mps import serves_users
from vgpu_agent.errors import MpsDownError
from vgpu_agent.model.facts import Scan
from vgpu_agent.mps import processes, serve
from vgpu_agent.mps.control import Control

pytestmark = pytest.mark.slow

FIRST, SECOND = GPUS


@pytest.fixture
def node() -> Iterator[Node]:
    with nodes.made() as made:
        yield made


@pytest.fixture(params=SOME)
def any_node(request: pytest.FixtureRequest) -> Iterator[Node]:
    with nodes.made(request.param) as made:
        yield made


def variables_of(pid: int) -> dict[str, str]:
    entries = Path(f"/proc/{pid}/environ").read_text().split("\0")
    return dict(entry.split("=", 1) for entry in entries if "=" in entry)


# Start


def test_each_gpu_has_a_daemon_that_sees_no_other_and_whose_parent_is_a_shell(any_node):
    any_node.start_daemons()
    for name in GPUS:
        pid = any_node.process(name).pid
        variables = variables_of(pid)
        assert variables["CUDA_VISIBLE_DEVICES"] == name
        assert variables["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
        assert variables["CUDA_MPS_PIPE_DIRECTORY"] == str(any_node.pipe(name))
        status = dict(
            line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
        )
        assert Path(f"/proc/{status['PPid']}/exe").resolve() == Path("/bin/sh").resolve()
        # What shells ignore for what is in the background: SIGINT and SIGQUIT.
        assert not int(status["SigIgn"], 16) & 0b110
        assert os.getsid(pid) == pid
        # Nothing that clients must not have: the lock of the supervisor, its log.
        links = [link.resolve() for link in Path(f"/proc/{pid}/fd").iterdir()]
        assert any_node.directories.daemons not in links
        assert any_node.log not in links
        log = any_node.directories.daemon(name).control_log
        assert "Starting control daemon" in log.read_text()
        assert (log.parent.stat().st_mode & 0o777, log.stat().st_mode & 0o777) == (0o700, 0o600)


def test_one_daemon_of_the_node_sees_all_gpus_in_the_order_of_the_bus(any_node):
    any_node.start_daemons(VGPU_MPS_DAEMONS="node")
    variables = variables_of(any_node.process("node").pid)
    assert variables["CUDA_VISIBLE_DEVICES"] == f"{FIRST},{SECOND}"
    assert [each.pid for each in any_node.members()] == [any_node.process("node").pid]


@pytest.mark.parametrize(
    ("driver", "multiuser"),
    [("550.163.01", False), ("555.58.02", True), ("580.1", True), ("", True), ("unknown", True)],
)
def test_several_users_are_served_where_the_driver_can(caplog, driver, multiuser):
    assert serves_users(Scan(driver, ())) is multiuser
    assert ("requires driver 555, and this node has 550.163.01" in caplog.text) is not multiuser


def test_a_setting_for_several_users_is_an_option_of_the_daemon(node):
    node.start_daemons(VGPU_MPS_MULTIUSER="on")
    words = Path(f"/proc/{node.process(FIRST).pid}/cmdline").read_bytes().split(b"\0")
    assert words[-3:] == [b"-f", b"-multiuser-server", b""]


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"VGPU_SHARING": "time-slicing"}, "without MPS `vgpu-agent mps daemon` has nothing"),
        ({"VGPU_SIMULATED_GPUS": "0"}, "none of the 0 GPUs of this node is shared"),
        ({"VGPU_REPLICAS_BY_GPU": '{"0": 0, "1": 0}'}, "none of the 2 GPUs of this node is shared"),
        ({"VGPU_GPU_DRIVER": "nvml"}, "libnvidia-ml.so.1"),
    ],
)
def test_without_a_gpu_to_share_there_is_no_daemon(node, variables, words):
    done = node.run("daemon", **variables)
    assert done.returncode == 1
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_a_second_supervisor_of_a_node_says_so_and_touches_nothing(node):
    node.start_daemons()
    before = [node.process(name) for name in GPUS]
    done = node.run("daemon")
    assert done.returncode == 1
    assert "another process holds" in done.stderr
    assert [node.process(name) for name in GPUS] == before
    assert all(map(node.lives, before))


def test_a_missing_program_is_named_with_what_to_do(node):
    Path(node.programs.program).unlink()
    node.start("daemon", PATH="/usr/bin:/bin")
    eventually(lambda: node.log.exists() and "nvidia-cuda-mps-control cannot be run" in node.said)
    assert "NVIDIA runtime" in node.said
    assert "Traceback" not in node.said


# A daemon that ends


def test_a_daemon_that_was_killed_is_started_again_alone(any_node):
    any_node.start_daemons()
    server, other_server = map(any_node.start_server, GPUS)
    killed, other = map(any_node.process, GPUS)
    os.kill(killed.pid, signal.SIGKILL)
    eventually(lambda: any_node.process(FIRST) != killed and any_node.answers(FIRST))
    # Its servers cannot be reached by anybody.
    eventually(lambda: not any_node.lives(server))
    assert any_node.lives(other)
    assert any_node.lives(other_server)
    assert any_node.process(SECOND) == other
    assert f"MPS daemon {FIRST} ended after" in any_node.said
    assert "with exit code 137: started again in 1 s" in any_node.said
    assert SECOND not in any_node.said


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_loop_that_somebody_ends_is_begun_again(any_node, number):
    supervisor = any_node.start_daemons()
    ended, other = map(any_node.process, GPUS)
    os.kill(parent_of(ended.pid), number)
    eventually(lambda: any_node.process(FIRST) != ended and any_node.answers(FIRST), 10)
    assert not any_node.lives(ended)
    assert any_node.process(SECOND) == other
    assert f"the loop of MPS daemon {FIRST} was ended" in any_node.said
    # And it is ended with all others.
    last = any_node.process(FIRST)
    supervisor.terminate()
    assert supervisor.wait(10) == 0
    assert not any(map(any_node.lives, (last, other)))
    assert "did not end in order" not in any_node.said.partition("was ended")[2]


def test_what_ends_a_daemon_at_once_is_tried_again_later_and_later(node):
    program = Path(node.programs.program)
    works = program.read_text()
    program.write_text(f'#!/bin/sh\ncase "$CUDA_VISIBLE_DEVICES" in {FIRST}) exit 3; esac\n{works}')
    began = time.monotonic()
    node.start("daemon")
    eventually(lambda: node.log.exists() and "exit code 3: started again in 4 s" in node.said, 20)
    assert time.monotonic() - began >= 3
    for seconds in (1, 2, 4):
        assert node.said.count(f"started again in {seconds} s") == 1
    assert node.answers(SECOND)
    assert SECOND not in node.said
    program.write_text(works)
    eventually(lambda: node.answers(FIRST), 10)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_a_log_that_is_no_file_is_named(node, make):
    log = node.directories.daemon(FIRST).control_log
    log.parent.mkdir(parents=True, mode=0o700)
    make(log)
    node.start("daemon")
    eventually(lambda: node.log.exists() and "'control.log'" in node.said, 10)
    eventually(lambda: node.answers(SECOND), 10)


def closed(pipe: Path) -> None:
    pipe.chmod(0)


def given_away(pipe: Path) -> None:
    if os.geteuid() == 0:
        os.chown(pipe, 1000, 1000)
    pipe.chmod(0)


def filled(pipe: Path) -> None:
    (pipe / "deep").mkdir()
    (pipe / "deep/link").symlink_to("/")


def replaced(pipe: Path) -> None:
    (pipe / "control").unlink()
    (pipe / "control/x").mkdir(parents=True)
    (pipe / "control_lock").unlink()
    (pipe / "control_lock").symlink_to(pipe.parent.parent / "daemons")


def test_records_in_what_clients_could_write_to_end_nobody(node):
    """`pipe` was the directory of all clients in version 0.2."""
    with subprocess.Popen(["sleep", "60"]) as victim:
        found = processes.find(victim.pid)
        record = {"boot_id": store.boot_id(), "pid": found.pid, "started": found.started}
        (node.directories.root / "pipe").mkdir(parents=True)
        store.write(node.directories.root / "pipe/process", record)
        node.start_daemons()
        assert victim.poll() is None
        victim.kill()


@pytest.mark.parametrize("how", ["kill", "restart"])
@pytest.mark.parametrize("attack", [closed, given_away, filled, replaced])
def test_whatever_clients_left_in_the_pipe_directory_the_next_daemon_starts(node, attack, how):
    node.start_daemons()
    killed = node.process(FIRST)
    attack(node.pipe(FIRST))
    if how == "kill":
        os.kill(killed.pid, signal.SIGKILL)
    else:
        assert node.run("restart", FIRST).returncode == 0
    eventually(lambda: node.process(FIRST) != killed and node.answers(FIRST))
    left = {path.name for path in node.pipe(FIRST).parent.iterdir()}
    assert left - {"lock", "ask"} == {"log", "pipe", "process"}


def test_a_link_in_the_place_of_a_socket_leads_to_no_other_daemon(any_node):
    """Who asks is root, and has the sockets of all daemons."""
    any_node.start_daemons()
    ended, other = map(any_node.process, GPUS)
    for name in ("control", "control_privileged"):
        socket = any_node.pipe(FIRST) / name
        socket.unlink()
        socket.symlink_to(any_node.pipe(SECOND) / name)
    one = any_node.directories.daemon(FIRST)
    control = Control(one, binary=any_node.programs.program)
    with pytest.raises(MpsDownError):
        anyio.run(control.ask, "set_default_active_thread_percentage 50")
    assert any_node.run("restart", FIRST).returncode == 0
    eventually(lambda: any_node.process(FIRST) != ended and any_node.answers(FIRST))
    assert not any_node.lives(ended)
    assert any_node.lives(other)
    assert any_node.answers(SECOND)  # with the limits that it had
    assert anyio.run(control.ask, "get_server_list") == [""]


# End


def test_all_daemons_end_in_order_and_leave_nothing(any_node):
    supervisor = any_node.start_daemons()
    daemons = list(map(any_node.process, GPUS))
    supervisor.terminate()
    assert supervisor.wait(10) == 0
    assert not any(map(any_node.lives, daemons))
    for name in GPUS:
        assert f"quit -t {serve.QUIT_SECONDS}" in (
            any_node.directories.daemon(name).control_log.read_text()
        )
    assert not re.search("in order|is ended|ended after", any_node.said)


def test_a_daemon_whose_connection_others_hold_ends_too(any_node):
    supervisor = any_node.start_daemons()
    servers = list(map(any_node.start_server, GPUS))
    log = any_node.directories.daemon(FIRST).control_log
    opened = log.read_text().count("NEW UI")
    holder = subprocess.Popen(
        [any_node.programs.program],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**any_node.environment(), **any_node.directories.daemon(FIRST).environment()},
    )
    with holder:
        eventually(lambda: log.read_text().count("NEW UI") > opened)
        # So that the other one needs no 20 seconds either.
        processes.send(servers[1], signal.SIGTERM)
        began = time.monotonic()
        supervisor.terminate()
        assert supervisor.wait(35) == 0
        assert time.monotonic() - began < 20
        holder.stdin.close()
    assert any_node.members() == []
    assert not any(map(any_node.lives, servers))
    assert f"{FIRST}: process" in any_node.said
    assert "did not end in order" in any_node.said


@pytest.mark.ci
@pytest.mark.parametrize("any_node", SOME[-1:], indirect=True)  # it takes 25 s
@pytest.mark.parametrize("hung", ["daemon", "server"])
def test_the_end_is_bounded_whatever_hangs(any_node, hung):
    supervisor = any_node.start_daemons()
    server = any_node.start_server(FIRST)
    os.kill(server.pid if hung == "server" else any_node.process(FIRST).pid, signal.SIGSTOP)
    began = time.monotonic()
    supervisor.terminate()
    assert supervisor.wait(40) == 0
    assert time.monotonic() - began < 35
    assert any_node.members() == []
    assert not any_node.lives(server)


def test_a_control_program_that_cannot_be_ended_holds_no_end_up(node, monkeypatch):
    """As in a call to the driver that does not return: a signal does not reach it."""
    node.start_daemons()
    ended = node.process(FIRST)
    Path(node.programs.program).write_text("#!/bin/sh\nexec sleep 60\n")
    stuck: list[subprocess.Popen[bytes]] = []

    def kill(process: subprocess.Popen[bytes]) -> None:
        stuck.append(process)

    with monkeypatch.context() as patched:
        patched.setattr(serve, "QUIT_SECONDS", 0)
        patched.setattr(subprocess.Popen, "kill", kill)
        began = time.monotonic()
        assert serve.end(node.directories.daemon(FIRST), node.programs.program) == []
        assert time.monotonic() - began < 12
    assert not node.lives(ended)
    assert stuck
    for each in stuck:
        each.kill()
        each.wait()


def test_daemons_that_a_killed_supervisor_left_are_ended_by_the_next_one(node):
    supervisor = node.start_daemons()
    server = node.start_server(FIRST)
    before = list(map(node.process, GPUS))
    os.killpg(supervisor.pid, signal.SIGKILL)
    supervisor.wait()
    assert all(map(node.lives, [*before, server]))
    # Also where the next one has other daemons.
    node.start_daemons(VGPU_MPS_DAEMONS="node")
    assert not any(map(node.lives, [*before, server]))


def test_a_server_of_somebody_else_is_logged_and_left(node):
    """Unless it shows that it is ours, as that of a daemon whose records are gone."""
    name = "nvidia-cuda-mps-server"
    others = {"PATH": node.programs.path, "CUDA_MPS_PIPE_DIRECTORY": "/elsewhere"}
    silent = {"PATH": node.programs.path}
    ours = {"PATH": node.programs.path, "CUDA_MPS_PIPE_DIRECTORY": str(node.pipe("GPU-gone"))}
    as_daemon = nodes.limited(nodes.DEFAULT)
    started = [subprocess.Popen([*as_daemon, name], env=env) for env in (others, silent, ours)]
    try:
        eventually(
            lambda: {each.pid for each in processes.find_named(name)} >= {s.pid for s in started}
        )
        node.start_daemons()
        assert [each.poll() is None for each in started] == [True, True, False]
        assert f"MPS server {started[1].pid} does not show whose it is" in node.said
        assert f"MPS server {started[0].pid}" not in node.said
    finally:
        for each in started:
            each.kill()
            each.wait()


# One GPU


@pytest.mark.parametrize("name", [FIRST, "node"])
def test_one_daemon_is_restarted_in_order(any_node, name):
    variables = {"VGPU_MPS_DAEMONS": "node" if name == "node" else "gpu"}
    any_node.start_daemons(**variables)
    before = {each.name: any_node.process(each.name) for each in paths(any_node)}
    # By its GPU too, where that is not its name.
    for attempt in {name, FIRST}:
        ended = any_node.process(name)
        done = any_node.run("restart", attempt, **variables)
        assert done.returncode == 0, done.stderr
        assert not any_node.lives(ended)
        eventually(lambda ended=ended: any_node.process(name) != ended and any_node.answers(name))
    for other in before.keys() - {name}:
        assert any_node.process(other) == before[other]
        assert any_node.lives(before[other])


def paths(node: Node) -> list[Path]:
    return [path for path in node.directories.root.iterdir() if path.is_dir()]


@pytest.mark.parametrize("name", ["1", "GPU-00000001", "02:00.0"])
def test_a_daemon_is_restarted_by_any_name_of_its_gpu(node, name):
    node.start_daemons()
    ended, other = node.process(SECOND), node.process(FIRST)
    # A GPU that hangs is not asked for its name where its daemon's directory says it.
    variables = {"VGPU_GPU_DRIVER": "nvml"} if name.startswith("GPU") else {}
    done = node.run("restart", name, **variables)
    assert done.returncode == 0, done.stderr
    assert not node.lives(ended)
    assert node.process(FIRST) == other
    assert node.lives(other)


@pytest.mark.parametrize("name", ["GPU-x", "../mps", "", "daemons", "7"])
def test_a_daemon_that_is_not_there_cannot_be_restarted(node, name):
    node.directories.root.mkdir()
    done = node.run("restart", name)
    assert done.returncode == 1
    assert f"no MPS daemon serves {name} now" in done.stderr
