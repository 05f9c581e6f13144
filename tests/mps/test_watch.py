"""`mps watch` beside daemons, real ones and one that does what a test wants."""

import os
import signal
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import anyio
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.mps.fixtures import USER, FakeMps, Mps, eventually
from vgpu_agent.commands.mps import watch_plan
from vgpu_agent.errors import MpsSetupError, StoreError
from vgpu_agent.model.devices import Excluded, Gpu
from vgpu_agent.model.facts import AppliedGpu, DaemonLook, MpsLook, Scan
from vgpu_agent.model.rules import MIB, MpsDaemons, MpsLimits, SharingRules, Threads
from vgpu_agent.model.share import Divided, divide
from vgpu_agent.mps import processes, state
from vgpu_agent.mps.answers import BUSY, UNREPORTED, fault_of
from vgpu_agent.mps.control import Control
from vgpu_agent.mps.daemon import RealDaemons
from vgpu_agent.mps.directories import Directories
from vgpu_agent.mps.look import Watcher
from vgpu_agent.mps.state import State, Watched
from vgpu_agent.mps.watch import watch
from vgpu_agent.store import since_boot

pytestmark = pytest.mark.slow

LIMIT = 2300 * MIB
A, B = "GPU-a", "GPU-b"


def a_plan(limits: MpsLimits, *names: str, threads: int = 10) -> State:
    """Each daemon has one GPU, with ten vGPUs."""
    server = limits is MpsLimits.SERVER
    look = DaemonLook(thread_percentage=threads if server else None)
    gpus = {name: AppliedGpu(name, 0, 10, LIMIT if server else None) for name in names}
    daemons = {name: Watched(replace(look, gpus=(gpu,))) for name, gpu in gpus.items()}
    return State("1.2", limits, 0.0, daemons)


SERVER, CLIENT = (a_plan(limits, A) for limits in (MpsLimits.SERVER, MpsLimits.CLIENT))
BOTH = a_plan(MpsLimits.CLIENT, A, B)

WATCH = """
from vgpu_agent import settings_reading
from vgpu_agent.commands.mps import mps_watch
from vgpu_agent.observe import logs
configured = settings_reading.load()
logs.configure(configured.log_level, configured.log_format)
mps_watch(configured)
"""


@asynccontextmanager
async def watching(
    mps: Mps, plan: State, divided: Callable[[], State] | None = None, **pace: float
) -> AsyncIterator[None]:
    async def run() -> None:
        seconds = {"poll_seconds": 0.05, "look_seconds": 0.2, **pace}
        await watch(plan, mps.directories, binary=mps.program, divided=divided, **seconds)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run)
        yield
        tasks.cancel_scope.cancel()


async def look_at(mps: Mps) -> MpsLook:
    """What the agent sees."""
    return await RealDaemons(mps.directories, SharingRules()).look()


async def becomes(
    mps: Mps, holds: Callable[[DaemonLook], object], name: str = A, seconds: float = 8
) -> DaemonLook:
    """Waits until the agent sees that of a daemon."""
    found = None
    with anyio.move_on_after(seconds):
        while True:
            found = (await look_at(mps)).daemons.get(name)
            if found is not None and holds(found):
                return found
            await anyio.sleep(0.02)
    raise AssertionError(f"not within {seconds} s: {found}")


def well(look: DaemonLook) -> bool:
    return look.generation is not None and not (look.down or look.problem or look.fault)


# Limits


@pytest.mark.parametrize("limits", MpsLimits)
async def test_limits_are_applied_read_back_and_told(any_mps, caplog, limits):
    caplog.set_level("INFO")
    any_mps.start()
    plan = a_plan(limits, A)
    async with watching(any_mps, plan):
        found = await becomes(any_mps, well)
    assert replace(found, generation=None) == plan.daemons[A].look
    assert (await look_at(any_mps)).limits is limits
    percentage, memory = ("10.0", "2G") if limits is MpsLimits.SERVER else ("100.0", "")
    get = "get_default_device_pinned_mem_limit 0"
    said = any_mps.ask("get_default_active_thread_percentage", get).stdout.split()
    assert said == [percentage, *memory.split()]
    assert [each for each in caplog.messages if "in effect" in each] == [
        f"{A}: limits are in effect: server, 10 % of the threads, 2300 MiB on GPU 0"
        if limits is MpsLimits.SERVER
        else f"{A}: limits are in effect: {limits}, 100 % of the threads, no limit on GPU 0"
    ]


async def test_what_somebody_changes_is_set_again(any_mps):
    any_mps.start()
    async with watching(any_mps, SERVER):
        await becomes(any_mps, well)
        eventually(lambda: any_mps.ask("set_default_active_thread_percentage 50").returncode == 0)
        with anyio.fail_after(8):
            while "10.0" not in any_mps.ask("get_default_active_thread_percentage").stdout:  # noqa: ASYNC110
                await anyio.sleep(0.1)
        await becomes(any_mps, well)


async def test_a_limit_where_there_should_be_none_is_a_problem(any_mps):
    any_mps.start()
    any_mps.ask(
        "set_default_active_thread_percentage 25", "set_default_device_pinned_mem_limit 0 512M"
    )
    async with watching(any_mps, CLIENT):
        found = await becomes(any_mps, lambda look: look.problem)
    assert "(25 % of the threads, 512 MiB on GPU 0)" in found.problem
    any_mps.ask(
        "set_default_active_thread_percentage 100", "set_default_device_pinned_mem_limit 0 0M"
    )
    async with watching(any_mps, CLIENT):
        await becomes(any_mps, well)


@pytest.mark.parametrize(
    ("behaviour", "words"),
    [
        ({"answers": {"get_default_device_pinned_mem_limit 0": "1G"}}, "and says 1024 MiB on GPU"),
        ({"answers": {"get_default_active_thread_percentage": "all"}}, "no thread percentage"),
        (
            {"answers": {"get_default_active_thread_percentage": "x" * 2**19}},
            "no thread percentage",
        ),
        ({"answers": {"get_default_device_pinned_mem_limit 0": "x" * 2**19}}, "no limit of memory"),
        ({"answers": {"get_server_list": "No servers"}}, "lists no PIDs"),
        ({"servers": [2**22 - 1]}, "hostPID: true"),
    ],
    ids=[
        *("another limit is read back", "no number", "much text", "much text of memory", "no PIDs"),
        "/proc does not know its server",
    ],
)
async def test_a_daemon_has_a_problem_as_long_as(fake_mps, behaviour, words):
    fake_mps.start()
    fake_mps.behave(**behaviour)
    async with watching(fake_mps, SERVER):
        await becomes(fake_mps, lambda look: words in (look.problem or ""))
        # Who poses as a daemon makes no file that is too large for the others to be read.
        assert fake_mps.directories.state.stat().st_size < 4096
        fake_mps.behave()
        await becomes(fake_mps, well)


# Servers


async def test_a_server_that_is_older_than_the_limits_is_a_problem_until_it_ends(any_mps):
    any_mps.start()
    server = any_mps.start_server()
    words = f"MPS server {server} is older than the limits"
    async with watching(any_mps, SERVER):
        await becomes(any_mps, lambda look: words in (look.problem or ""))
    # A watcher that comes back knows it still.
    async with watching(any_mps, SERVER):
        await anyio.sleep(0.5)
        await becomes(any_mps, lambda look: words in (look.problem or ""))
        assert any_mps.server_pids() == [server]  # never ended
        os.kill(server, signal.SIGKILL)
        await becomes(any_mps, well)


async def test_a_younger_server_is_none_also_for_a_watcher_that_comes_back(any_mps):
    any_mps.start()
    async with watching(any_mps, SERVER):
        await becomes(any_mps, well)
    await anyio.sleep(0.05)
    server = any_mps.start_server()
    async with watching(any_mps, SERVER):
        await becomes(any_mps, lambda look: well(look) and look.servers == (server,))


def threads(percentage: int) -> State:
    return a_plan(MpsLimits.SERVER, A, threads=percentage)


async def test_a_gpu_is_divided_anew_when_no_server_has_the_limits_of_before(any_mps):
    any_mps.start()
    asked = threads(10)

    async def becomes_well(percentage: int) -> None:
        await becomes(any_mps, lambda look: well(look) and look.thread_percentage == percentage)

    async with watching(any_mps, asked):
        await becomes_well(10)
        server = any_mps.start_server()
        await becomes(any_mps, lambda look: look.servers)
    # A watcher that comes back knows with what the server was started.
    asked = threads(15)
    async with watching(any_mps, asked, divided=lambda: asked):
        await anyio.sleep(1)
        await becomes_well(10)
        os.kill(server, signal.SIGKILL)
        await becomes_well(15)
        server, asked = any_mps.start_server(), threads(20)
        await anyio.sleep(1)
        await becomes_well(15)
        os.kill(server, signal.SIGKILL)
        await becomes_well(20)
        asked = threads(25)
        await becomes_well(25)
        any_mps.start_server()
        await becomes(any_mps, lambda look: look.servers)
        asked = threads(50)
        any_mps.kill()
        any_mps.start()
        await becomes_well(50)


async def test_a_server_that_no_look_has_seen_yet_keeps_its_division(any_mps):
    any_mps.start()
    old, new = (threads(percentage).daemons[A].look for percentage in (10, 20))
    watcher = Watcher(old, any_mps.control(), MpsLimits.SERVER, None, None)
    await watcher.look()
    await anyio.sleep(0.05)
    server = any_mps.start_server()
    watcher.divide(new)
    found = await watcher.look()
    assert (found.servers, found.thread_percentage, found.problem) == ((server,), 10, None)


@pytest.mark.parametrize(("then", "words"), [("", None), ("4194303", "hostPID: true")])
async def test_a_server_that_ends_while_it_is_looked_at_is_no_problem(tmp_path, then, words):
    """As servers do that crash in a loop: the line of their start is what makes us look."""
    one = Directories(tmp_path).daemon(A)
    one.pipe.mkdir(parents=True)
    (one.pipe / "control").touch()
    listed = iter(["4194303", then])
    said = {"get_default_active_thread_percentage": "10.0", "get_server_status": "INITIALIZING"}
    said["get_default_device_pinned_mem_limit"] = "2G"

    class Asked(Control):
        async def ask(self, *lines: str) -> list[str]:
            words = [line.split()[0] for line in lines]
            return [next(listed) if w == "get_server_list" else said.get(w, "") for w in words]

    watcher = Watcher(SERVER.daemons[A].look, Asked(one), MpsLimits.SERVER, None, None)
    found = await watcher.look()
    assert found.servers == ((4194303,) if words else ())
    assert words in found.problem if words else found.problem is None


@pytest.mark.parametrize(
    ("answers", "words"),
    [
        ({"get_active_thread_percentage {}": "50.0"}, "was given 50.0"),
        ({"get_active_thread_percentage {}": "10.0"}, None),
        ({"get_active_thread_percentage {}": "Server {} not found"}, None),
        ({"get_device_pinned_mem_limit {} 0": "3G"}, "was given 3G"),
        ({"get_device_pinned_mem_limit {} 0": "2G"}, None),
        ({"get_device_pinned_mem_limit {} 0": ""}, None),  # not told
    ],
)
async def test_what_a_server_was_given_beyond_the_limits_is_a_problem(fake_mps, answers, words):
    fake_mps.start()
    async with watching(fake_mps, SERVER):
        await becomes(fake_mps, well)
        pid = fake_mps.start_server()
        said = {line.format(pid): text.format(pid) for line, text in answers.items()}
        fake_mps.behave(answers=said)
        found = await becomes(fake_mps, lambda look: look.servers and (look.problem or not words))
    assert words in found.problem if words else well(found)


@pytest.mark.parametrize(
    ("status", "seconds", "words"),
    [
        ("ACTIVE", 1e6, None),
        (UNREPORTED, 1e6, None),
        ("INITIALIZING", 59, None),
        ("INITIALIZING", 61, "is INITIALIZING for over 60 s"),
        (BUSY, 59, None),
        (BUSY, 61, "is <busy> for over 60 s"),
        ("FAULT", 0, "has the status FAULT"),
        ("UNKNOWN", 0, "has the status UNKNOWN"),
        ("SOMETHING NEW", 0, "has the status SOMETHING NEW"),
    ],
)
def test_a_server_serves_while_it_is_active_or_starts(status, seconds, words):
    found = fault_of({7: (status, 0.0)}, seconds)
    assert (found is None) is (words is None)
    assert (words or "") in (found or "")


async def test_a_fault_of_a_server_and_its_clients_are_told(fake_mps):
    fake_mps.start()
    pid = fake_mps.start_server()
    async with watching(fake_mps, CLIENT):
        others = "".join(f"GPU-of-others-{number} {number}\n" for number in range(20_000))
        fake_mps.behave(status="FAULT", clients=f"GPU-a 71\n0 72\n{others}")
        found = await becomes(fake_mps, lambda look: look.fault)
        assert found.fault == f"MPS server {pid} has the status FAULT"
        assert (found.servers, found.clients) == ((pid,), {A: 2, "": 20_000})
        fake_mps.behave()
        await becomes(fake_mps, lambda look: well(look) and not look.clients)


@pytest.mark.parametrize(
    ("does", "status"),
    [("exit 1", 1), ("exit 139", 139), ("kill -KILL $$", 0), ("kill -SEGV $$", 0)],
)
async def test_servers_that_do_not_stay_are_told_and_change_no_vgpu(any_mps, caplog, does, status):
    """The daemon says 0 of one that a signal has ended, such as that of a lack of memory."""
    caplog.set_level("INFO")
    any_mps.start()
    any_mps.servers_do(does)
    async with watching(any_mps, CLIENT):
        for _ in range(3):
            any_mps.ask(f"start_server -uid {USER}")
            await anyio.sleep(0.3)
        found = await becomes(any_mps, lambda look: look.failing)
    assert found.crashes >= 3
    assert "end by an error soon after their start" in found.failing
    assert well(found)
    assert f"exited with status {status}" in caplog.text


async def test_a_client_that_ends_while_it_waits_waits_no_more(fake_mps):
    """The daemon has no word for it, and nobody would be served for a client that is gone."""
    fake_mps.start()
    client = fake_mps.run("import time; time.sleep(60)")
    waits = "NEW CLIENT {} from user 0: Server is not ready, push client to pending list"
    said = ["Starting new server 7 for user 1000", *map(waits.format, (client.pid, 0))]
    with fake_mps.output.open("a") as log:
        log.writelines(f"[2026-05-31 23:48:21.671 Control 1] {each}\n" for each in said)
    async with watching(fake_mps, CLIENT):
        await becomes(fake_mps, lambda look: look.waiting == 2)
        client.kill()
        client.wait()
        await becomes(fake_mps, lambda look: look.waiting == 1)


# Who asks


async def test_a_tenant_who_keeps_the_connection_makes_no_vgpu_unhealthy(any_mps, caplog):
    """Reproduced with the daemon that was asked by agent and watch: all vGPUs of the node."""
    any_mps.start()
    async with watching(any_mps, CLIENT):
        before = await becomes(any_mps, well)
        with any_mps.held() as holder:
            found = await becomes(any_mps, lambda look: look.busy, seconds=15)
            if not isinstance(any_mps, FakeMps):  # its name is Python's
                assert f": process {holder.pid} of user {os.getuid()}" in found.busy
            for _ in range(8):
                await anyio.sleep(0.5)
                assert well(await becomes(any_mps, lambda _: True))
            said = caplog.text.count("somebody else has it")
        after = await becomes(any_mps, lambda look: not look.busy, seconds=15)
    assert after == before
    assert said == 1


@pytest.mark.parametrize("said", [b"", b"get_server_list\n"])
async def test_a_tenant_who_connects_and_says_nothing_makes_no_vgpu_unhealthy(
    any_mps, caplog, said
):
    """The daemon waits for it, and answers nobody: that looks like a daemon that hangs."""
    if isinstance(any_mps, FakeMps):
        pytest.skip("seen of the real daemon only")
    any_mps.start()
    async with watching(any_mps, SERVER):
        before = await becomes(any_mps, well)
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as holder:
            holder.connect(str(any_mps.pipe / "control"))
            if said:
                holder.send(said)
            found = await becomes(any_mps, lambda look: look.busy, seconds=15)
            assert "has connected to it and says nothing" in found.busy
            for _ in range(12):
                await anyio.sleep(0.5)
                assert well(await becomes(any_mps, lambda _: True))
        after = await becomes(any_mps, lambda look: not look.busy, seconds=15)
    assert after == before
    assert caplog.text.count("says nothing") == 1


@pytest.mark.parametrize(
    ("count", "seconds", "named"), [(1, 9, 1), (3, 9, 3), (5, 9, 3), (5, 0, 0)]
)
def test_of_those_that_may_hold_a_connection_some_are_named_that_last(count, seconds, named):
    """Who comes and goes would be another warning at every look."""
    program = f"held-{os.getpid()}"
    script = f"exec -a {program} sleep 60"
    started = [subprocess.Popen(["bash", "-c", script]) for _ in range(count)]
    try:
        eventually(lambda: len(list(processes.find_named(program))) == count)
        words = processes.holders(program, Path("/pipe"), since_boot() + seconds)
    finally:
        for each in started:
            each.kill()
            each.wait()
    assert words.count(f"of user {os.getuid()}") == named
    assert ("not seen" in words, "and others" in words) == (named == 0, 0 < named < count)


@pytest.mark.parametrize(("plan", "healthy"), [(CLIENT, True), (SERVER, False)])
async def test_a_daemon_that_is_busy_from_its_start_serves_where_nothing_is_to_be_set(
    any_mps, plan, healthy
):
    any_mps.start()
    with any_mps.held():
        async with watching(any_mps, plan):
            found = await becomes(any_mps, lambda look: look.busy, seconds=15)
            assert well(found) is healthy


@pytest.mark.parametrize("busy", [[1, ""], [0, ""], [0, "Cannot send command"]])
async def test_a_question_that_meets_another_one_is_put_again(fake_mps, busy):
    fake_mps.start()
    fake_mps.behave(busy=busy)
    async with watching(fake_mps, CLIENT):
        await becomes(fake_mps, well)
        with fake_mps.held():
            await anyio.sleep(1)
        found = await becomes(fake_mps, lambda look: not look.busy)
    assert well(found)


# Daemons that come and go


async def test_a_daemon_that_dies_concerns_its_own_gpu_and_a_new_one_gets_its_limits(any_mps):
    one, other = any_mps, any_mps.of(B)
    for mps in (one, other):
        mps.start()
    async with watching(one, a_plan(MpsLimits.SERVER, A, B), look_seconds=5, poll_seconds=0.5):
        await becomes(one, well)
        kept = await becomes(one, well, B)
        one.kill()
        found = await becomes(one, lambda look: look.down, seconds=2)
        assert "no MPS daemon serves" in found.down
        one.start()
        await becomes(one, well, seconds=3)
        assert await becomes(one, well, B) == kept
    assert one.ask("get_default_active_thread_percentage").stdout == "10.0\n"


async def test_a_daemon_that_is_stopped_is_down_and_its_neighbour_is_not(any_mps, caplog):
    one, other = any_mps, any_mps.of(B)
    for mps in (one, other):
        mps.start()
    async with watching(one, BOTH):
        await becomes(one, well)
        kept = await becomes(one, well, B)
        one.daemon.send_signal(signal.SIGSTOP)
        await becomes(one, lambda look: "does not answer" in (look.down or ""), seconds=15)
        assert await becomes(one, well, B) == kept
        assert caplog.text.count("does not answer") == 1
        one.daemon.send_signal(signal.SIGCONT)
        await becomes(one, well)


async def test_one_question_without_an_answer_is_no_end(fake_mps):
    fake_mps.start()
    async with watching(fake_mps, CLIENT):
        await becomes(fake_mps, well)
        fake_mps.behave(hang=True)
        await anyio.sleep(1.8)  # one has not been answered
        fake_mps.behave()
        for _ in range(10):
            assert well(await becomes(fake_mps, lambda _: True))
            await anyio.sleep(0.1)


async def test_a_missing_program_is_logged_once_and_waited_for(fake_mps, caplog):
    fake_mps.start()
    program = anyio.Path(fake_mps.program)
    away = await program.rename(program.with_name("away"))
    async with watching(fake_mps, CLIENT):
        found = await becomes(fake_mps, lambda look: look.problem)
        assert "install the driver" in found.problem
        await anyio.sleep(0.6)
        assert caplog.text.count("install the driver") == 1
        await away.rename(program)
        await becomes(fake_mps, well)


async def test_without_its_directory_it_says_what_makes_it(fake_mps):
    with pytest.raises(MpsSetupError, match="mps prepare"):
        await watch(a_plan(MpsLimits.CLIENT, A), fake_mps.of("x").directories)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": 2}', "\0" * 50])
async def test_a_damaged_state_is_replaced(fake_mps, content):
    fake_mps.start()
    fake_mps.directories.state.write_text(content)
    with pytest.raises(StoreError):
        state.read(fake_mps.directories.state)
    async with watching(fake_mps, SERVER):
        await becomes(fake_mps, well)


# For long


@pytest.mark.parametrize("server", [False, True], ids=["without a server", "with a server"])
@pytest.mark.parametrize("plan", [CLIENT, SERVER], ids=["client", "server"])
async def test_a_round_is_one_session_and_writes_little_log(any_mps, plan, server):
    """At its own pace, a look every 15 or 5 seconds, a daemon writes so much in a month."""
    any_mps.start()
    async with watching(any_mps, plan, look_seconds=0.25 if server else 0.1):
        await becomes(any_mps, well)
        if server:
            await anyio.sleep(0.05)
            pid = any_mps.start_server()
            await becomes(any_mps, lambda look: look.servers == (pid,))
        await anyio.sleep(0.3)
        log = any_mps.output
        size, sessions = log.stat().st_size, log.read_text().count("NEW UI")
        await anyio.sleep(2.1)
        rounds = log.read_text().count("NEW UI") - sessions
        assert 4 <= rounds <= 9
        month = (log.stat().st_size - size) / rounds * 30 * 24 * 3600 / (5 if server else 15)
    most = {(False, False): 75, (True, False): 150, (False, True): 500, (True, True): 1100}
    assert month < most[plan is SERVER, server] * 1e6, f"{month / 1e6:.0f} MB"


async def test_a_server_that_starts_or_ends_is_seen_at_once(any_mps):
    any_mps.start()
    async with watching(any_mps, CLIENT, look_seconds=60):
        await becomes(any_mps, well)
        await anyio.sleep(0.2)
        pid = any_mps.start_server()
        await becomes(any_mps, lambda look: look.servers == (pid,), seconds=2)
        await anyio.sleep(0.2)
        os.kill(pid, signal.SIGKILL)
        await becomes(any_mps, lambda look: not look.servers, seconds=2)


# Real processes


SETTINGS = {
    "VGPU_GPU_DRIVER": "simulated",
    "VGPU_SIMULATED_GPUS": "1",
    "VGPU_SHARING": "mps",
    "VGPU_MPS_LIMITS": "server",
    "VGPU_MPS_DAEMONS": "node",
}


def seen(mps: Mps) -> Watched:
    found = state.read(mps.directories.state)
    return Watched() if found is None else found.daemons["node"]


def test_killing_the_watcher_leaves_the_daemon_its_server_and_clients_alone(any_mps):
    mps = any_mps.of("node")
    daemon = mps.start()
    first = mps.run(WATCH, **SETTINGS)
    eventually(lambda: well(seen(mps).look), 10)
    time.sleep(0.05)
    server = mps.start_server()
    eventually(lambda: seen(mps).look.servers == (server,), 10)

    second = mps.run(WATCH, **SETTINGS)
    _, said = second.communicate(timeout=15)
    assert second.returncode == 1
    assert "another process holds" in said

    first.kill()
    first.wait()
    assert daemon.poll() is None
    assert mps.server_pids() == [server]
    known = seen(mps)

    third = mps.run(WATCH, **SETTINGS)
    assert "limits are in effect: server, 10 % of the threads" in third.stderr.readline()
    assert replace(seen(mps), log=known.log) == known
    third.terminate()
    _, said = third.communicate(timeout=10)
    assert third.returncode == 0
    assert "the MPS daemons and their limits stay" in said
    assert mps.server_pids() == [server]


KILLED = """
import json, os, signal
def end(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)
{} = end
"""


@pytest.mark.parametrize("call", ["json.dump", "os.fsync", "os.replace"])
def test_a_watcher_that_is_killed_while_it_writes_loses_nothing(fake_mps: FakeMps, call):
    """Were what it applied lost, every server would count as older than the limits."""
    mps = fake_mps.of("node")
    mps.start()
    first = mps.run(WATCH, **SETTINGS)
    eventually(lambda: well(seen(mps).look), 10)
    first.kill()
    first.wait()
    time.sleep(0.05)
    mps.start_server()
    remembered = seen(mps)
    second = mps.run(KILLED.format(call) + WATCH, **SETTINGS)
    assert second.wait(timeout=15) == -signal.SIGKILL
    assert seen(mps) == remembered
    third = mps.run(WATCH, **SETTINGS)
    lines = [third.stderr.readline() for _ in range(2)]
    assert any("limits are in effect: server, 10 % of the threads" in line for line in lines)
    assert well(seen(mps).look)


# The plan


def gpu(number: int, bus: str, memory: int = 24 * 1024 * MIB) -> Gpu:
    return Gpu(f"GPU-{number}", number, "NVIDIA L4", memory, bus, 512 * MIB)


def test_the_plan_has_the_share_of_one_vgpu_and_ordinals_in_pci_order():
    mig = Excluded(gpu(2, "0000:01:00.0"), "mig", "in MIG mode")
    scan = Scan("570.1", (gpu(0, "0000:5e:00.0"), gpu(1, "0000:3b:00.0")), (mig,))
    rules = SharingRules(replicas_by_gpu={"GPU-0": 4}, mps_limits=MpsLimits.SERVER)
    plan = {name: each.look for name, each in watch_plan(scan, rules).daemons.items()}
    assert plan == {
        "GPU-1": DaemonLook(gpus=(AppliedGpu("GPU-1", 0, 10, 2355 * MIB),), thread_percentage=10),
        "GPU-0": DaemonLook(gpus=(AppliedGpu("GPU-0", 0, 4, 5888 * MIB),), thread_percentage=25),
    }
    node = replace(rules, mps_daemons=MpsDaemons.NODE)
    assert watch_plan(scan, node).daemons["node"].look == DaemonLook(
        gpus=(AppliedGpu("GPU-1", 0, 10, 2355 * MIB), AppliedGpu("GPU-0", 1, 4, 5888 * MIB)),
        thread_percentage=10,
    )

    def of(rules: SharingRules) -> DaemonLook:
        return watch_plan(scan, rules).daemons["GPU-1"].look

    opened = of(replace(rules, mps_limits=MpsLimits.CLIENT))
    assert (opened.thread_percentage, opened.gpus[0].memory_limit_bytes) == (None, None)
    assert of(replace(rules, mps_threads=Threads.NONE)).thread_percentage is None
    assert of(SharingRules(replicas=1, mps_limits=MpsLimits.SERVER)).thread_percentage is None
    assert of(replace(rules, mps_threads=2.0)).thread_percentage == 20


@given(
    st.integers(MIB, 2**38),
    st.integers(1, 48),
    st.one_of(st.none(), st.integers(MIB, 2**36)),
    st.integers(0, 2**30),
)
@example(24 * 1024 * MIB, 10, 2048 * MIB, 512 * MIB)
def test_the_limits_of_all_vgpus_of_a_gpu_fit_into_it(memory, replicas, size, reserved):
    only = gpu(0, "0000:01:00.0", memory)
    rules = SharingRules(
        replicas=replicas,
        device_memory=size,
        memory_reserved=reserved,
        mps_limits=MpsLimits.SERVER,
    )
    plan = watch_plan(Scan("570.1", (only,)), rules)
    assert bool(plan.daemons) == isinstance(divide(only, rules), Divided)
    for each in [gpu for daemon in plan.daemons.values() for gpu in daemon.look.gpus]:
        assert each.memory_limit_bytes % MIB == 0
        assert each.memory_limit_bytes * each.replicas <= max(
            0, memory - only.reserved_bytes - reserved
        )
