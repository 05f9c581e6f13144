import json
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace

import anyio
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.mps.fixtures import FakeMps, eventually
from vgpu_agent.commands.mps import watch_plan
from vgpu_agent.errors import MpsSetupError, StoreError
from vgpu_agent.model.devices import Excluded, Gpu
from vgpu_agent.model.facts import Applied, AppliedGpu, Scan
from vgpu_agent.model.rules import MIB, MpsLimits, SharingRules, Threads
from vgpu_agent.model.share import Divided, divide
from vgpu_agent.mps.applied import generation_of, read
from vgpu_agent.mps.control import Control
from vgpu_agent.mps.watch import watch

pytestmark = pytest.mark.slow

LIMIT = 2300 * MIB
GPUS = (AppliedGpu("GPU-a", 0, 10, LIMIT), AppliedGpu("GPU-b", 1, 10, LIMIT))
OPEN_GPUS = tuple(replace(gpu, memory_limit_bytes=None) for gpu in GPUS)
SERVER = Applied("", MpsLimits.SERVER, 10, GPUS, None, "1.2")
CLIENT = Applied("", MpsLimits.CLIENT, None, OPEN_GPUS, None, "1.2")

WATCH = """
from vgpu_agent import settings
from vgpu_agent.commands.mps import mps_watch
from vgpu_agent.observe import logs
configured = settings.load()
logs.configure(configured.log_level, configured.log_format)
mps_watch(configured)
"""


def state(mps: FakeMps) -> Applied | None:
    return read(mps.directories.state)


@asynccontextmanager
async def watching(
    mps: FakeMps, plan: Applied, control: Control | None = None
) -> AsyncIterator[None]:
    async def run() -> None:
        await watch(plan, control or mps.control(), poll_seconds=0.05, look_seconds=0.2)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run)
        yield
        tasks.cancel_scope.cancel()


async def becomes(check: Callable[[], object], seconds: float = 5) -> None:
    with anyio.fail_after(seconds):
        while not check():  # noqa: ASYNC110 - files and logs tell nobody
            await anyio.sleep(0.02)


def problem(mps: FakeMps) -> str:
    found = state(mps)
    return (found.problem if found else None) or ""


def in_effect(mps: FakeMps) -> bool:
    found = state(mps)
    return (
        found is not None
        and found.problem is None
        and found.generation == generation_of(mps.directories.pipe)
    )


# What is applied and published


@pytest.mark.parametrize(("whole_gib", "said"), [(False, "2300M"), (True, "2G")])
async def test_limits_are_applied_read_back_and_published(fake_mps, caplog, whole_gib, said):
    caplog.set_level("INFO")
    fake_mps.behave(whole_gib=whole_gib)
    fake_mps.start()
    async with watching(fake_mps, SERVER):
        await becomes(lambda: in_effect(fake_mps))
    generation = generation_of(fake_mps.directories.pipe)
    assert state(fake_mps) == Applied(generation, MpsLimits.SERVER, 10, GPUS, None, "1.2")
    assert fake_mps.ask("get_default_active_thread_percentage").stdout == "10.0\n"
    assert fake_mps.ask("get_default_device_pinned_mem_limit 1").stdout == f"{said}\n"
    assert caplog.messages == [
        "limits are in effect: server, 10 % of the threads, 2300 MiB on GPU 0, 2300 MiB on GPU 1"
    ]


@pytest.mark.parametrize("limits", [MpsLimits.CLIENT, MpsLimits.NONE])
async def test_open_defaults_are_read_back_and_published(fake_mps, limits):
    fake_mps.start()
    async with watching(fake_mps, replace(CLIENT, limits=limits)):
        await becomes(lambda: in_effect(fake_mps))
    found = state(fake_mps)
    assert (found.limits, found.thread_percentage, found.gpus) == (limits, None, OPEN_GPUS)


async def test_a_limit_that_is_set_where_it_should_be_open_is_a_problem(fake_mps):
    fake_mps.start()
    fake_mps.ask("set_default_active_thread_percentage 25")
    fake_mps.ask("set_default_device_pinned_mem_limit 1 512M")
    async with watching(fake_mps, CLIENT):
        await becomes(lambda: "(25 % of the threads, 512 MiB on GPU 1)" in problem(fake_mps))
        found = state(fake_mps)
        assert (found.thread_percentage, found.gpus[1].memory_limit_bytes) == (25, 512 * MIB)
        fake_mps.ask("set_default_active_thread_percentage 100")
        fake_mps.ask("set_default_device_pinned_mem_limit 1 0G")
        await becomes(lambda: in_effect(fake_mps))


@pytest.mark.parametrize(
    ("behaviour", "words"),
    [
        (
            {"answers": {"get_default_device_pinned_mem_limit 0": "1G"}},
            "2300 MiB on GPU 1 and says 1024 MiB on GPU 0: see its control.log",
        ),
        ({"refuse": {"set_default_device_pinned_mem_limit": "No such device"}}, "No such device"),
        ({"servers": [0]}, "hostPID: true"),
    ],
    ids=["another limit is read back", "it refuses", "/proc does not know its server"],
)
async def test_a_daemon_has_a_problem_as_long_as(fake_mps, behaviour, words):
    fake_mps.start()
    fake_mps.behave(**behaviour)
    async with watching(fake_mps, SERVER):
        await becomes(lambda: words in problem(fake_mps))
        fake_mps.behave()
        await becomes(lambda: in_effect(fake_mps))


async def test_a_damaged_state_is_replaced(fake_mps):
    fake_mps.start()
    fake_mps.directories.state.write_text("{")
    with pytest.raises(StoreError):
        state(fake_mps)

    def whole() -> bool:
        try:
            return in_effect(fake_mps)
        except StoreError:
            return False

    async with watching(fake_mps, CLIENT):
        await becomes(whole)


# Servers


async def test_a_server_that_is_older_than_the_limits_is_a_problem_until_it_ends(fake_mps):
    fake_mps.start()
    server = fake_mps.start_server()
    async with watching(fake_mps, SERVER):
        await becomes(lambda: f"MPS server {server} is older than the limits" in problem(fake_mps))
    # A watcher that comes back knows it still.
    async with watching(fake_mps, SERVER):
        await anyio.sleep(0.3)
        assert f"MPS server {server} is older" in problem(fake_mps)
        assert fake_mps.server_pids() == [server]  # never ended
        os.kill(server, 9)
        await becomes(lambda: in_effect(fake_mps))


async def test_a_younger_server_is_none_also_for_a_watcher_that_comes_back(fake_mps):
    fake_mps.start()
    async with watching(fake_mps, SERVER):
        await becomes(lambda: in_effect(fake_mps))
    await anyio.sleep(0.05)
    fake_mps.start_server()
    fake_mps.directories.state.unlink()
    async with watching(fake_mps, SERVER):
        await becomes(lambda: state(fake_mps))
        assert problem(fake_mps) == ""
    # Other limits than those that it was started with: it is old.
    async with watching(fake_mps, replace(SERVER, thread_percentage=20)):
        await becomes(lambda: "is older than the limits" in problem(fake_mps))


# Daemons that come and go


async def test_a_new_daemon_gets_its_limits_within_two_seconds(fake_mps):
    fake_mps.start()

    async def run() -> None:
        await watch(SERVER, fake_mps.control())  # at its own pace

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run)
        await becomes(lambda: in_effect(fake_mps))
        fake_mps.kill()
        before = state(fake_mps)
        await anyio.sleep(0.6)
        assert state(fake_mps) == before  # of the daemon that is gone, which it says itself
        fake_mps.start()
        await becomes(lambda: in_effect(fake_mps), seconds=2)
        tasks.cancel_scope.cancel()


async def test_a_daemon_that_hangs_is_logged_once_and_waited_for(fake_mps, caplog):
    fake_mps.start()
    fake_mps.behave(hang=True)
    async with watching(fake_mps, CLIENT, fake_mps.control(timeout=0.5)):
        await becomes(lambda: "does not answer" in caplog.text)
        await anyio.sleep(1.2)
        assert state(fake_mps) is None
        assert caplog.text.count("does not answer") == 1
        fake_mps.behave()
        await becomes(lambda: in_effect(fake_mps))


async def test_a_missing_program_is_logged_once_and_waited_for(fake_mps, caplog):
    fake_mps.start()
    program = anyio.Path(fake_mps.program)
    away = await program.rename(program.with_name("away"))
    async with watching(fake_mps, CLIENT):
        await becomes(lambda: "install the driver" in caplog.text)
        await anyio.sleep(0.6)
        assert caplog.text.count("install the driver") == 1
        await away.rename(program)
        await becomes(lambda: in_effect(fake_mps))


async def test_a_daemon_that_does_not_stay_is_logged(fake_mps, caplog):
    fake_mps.make_directories()
    async with watching(fake_mps, CLIENT):
        for _ in range(3):
            await anyio.to_thread.run_sync(fake_mps.start)
            await becomes(lambda: in_effect(fake_mps))
            fake_mps.kill()
        assert "the MPS daemon was started 3 times within" in caplog.text


async def test_without_its_directory_it_says_what_makes_it(fake_mps):
    with pytest.raises(MpsSetupError, match="mps prepare"):
        await watch(CLIENT, fake_mps.control())


# Real processes


def test_killing_the_watcher_leaves_the_daemon_its_server_and_clients_alone(fake_mps):
    daemon = fake_mps.start()
    variables = {
        "VGPU_GPU_DRIVER": "simulated",
        "VGPU_SHARING": "mps",
        "VGPU_MPS_LIMITS": "server",
    }
    first = fake_mps.run(WATCH, **variables)
    eventually(lambda: in_effect(fake_mps), 10)
    time.sleep(0.05)
    server = fake_mps.start_server()
    published = fake_mps.directories.state.read_bytes()

    second = fake_mps.run(WATCH, **variables)
    _, said = second.communicate(timeout=15)
    assert second.returncode == 1
    assert "another `vgpu-agent mps watch` holds" in said

    first.kill()
    first.wait()
    assert daemon.poll() is None
    assert fake_mps.server_pids() == [server]
    assert fake_mps.ask("get_server_list").stdout == f"{server}\n"
    assert fake_mps.directories.state.read_bytes() == published

    third = fake_mps.run(WATCH, **variables)
    assert "limits are in effect: server, 10 % of the threads" in third.stderr.readline()
    assert fake_mps.directories.state.read_bytes() == published
    third.terminate()
    _, said = third.communicate(timeout=10)
    assert third.returncode == 0
    assert "the MPS daemon and its limits stay" in said
    assert fake_mps.server_pids() == [server]


KILLED = """
import json, os, signal
def end(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)
{} = end
"""


@pytest.mark.parametrize("call", ["json.dump", "os.fsync", "os.replace"])
def test_a_watcher_that_is_killed_while_it_writes_loses_nothing(fake_mps, call):
    """Were what it applied lost, every server would count as older than the limits."""
    variables = {
        "VGPU_GPU_DRIVER": "simulated",
        "VGPU_SHARING": "mps",
        "VGPU_MPS_LIMITS": "server",
    }
    fake_mps.start()
    first = fake_mps.run(WATCH, **variables)
    eventually(lambda: in_effect(fake_mps), 10)
    first.kill()
    first.wait()
    time.sleep(0.05)
    fake_mps.start_server()
    remembered = fake_mps.directories.watch_memory.read_bytes()
    # Somebody lifts a limit: it is applied again, and what was applied is written again.
    fake_mps.ask("set_default_active_thread_percentage 50")
    second = fake_mps.run(KILLED.format(call) + WATCH, **variables)
    assert second.wait(timeout=15) == -signal.SIGKILL
    assert fake_mps.directories.watch_memory.read_bytes() == remembered
    third = fake_mps.run(WATCH, **variables)
    assert "limits are in effect: server, 10 % of the threads" in third.stderr.readline()
    assert in_effect(fake_mps)


@pytest.mark.parametrize(
    "damaged", ["", "{", "[]", "{}", '{"generation": 1}', '{"generation": "", "x": 2}']
)
async def test_a_damaged_memory_is_none(fake_mps, damaged):
    fake_mps.start()
    fake_mps.directories.watch_memory.write_text(damaged)
    async with watching(fake_mps, SERVER):
        await becomes(lambda: in_effect(fake_mps))
    kept = json.loads(fake_mps.directories.watch_memory.read_text())
    assert kept["generation"] == generation_of(fake_mps.directories.pipe)


# The plan


def gpu(number: int, bus: str, memory: int = 24 * 1024 * MIB) -> Gpu:
    return Gpu(f"GPU-{number}", number, "NVIDIA L4", memory, bus, 512 * MIB)


def test_the_plan_has_the_share_of_one_vgpu_and_ordinals_in_pci_order():
    mig = Excluded(gpu(2, "0000:01:00.0"), "mig", "in MIG mode")
    scan = Scan("570.1", (gpu(0, "0000:5e:00.0"), gpu(1, "0000:3b:00.0")), (mig,))
    rules = SharingRules(replicas_by_gpu={"GPU-0": 4}, mps_limits=MpsLimits.SERVER)
    plan = watch_plan(scan, rules)
    assert plan.thread_percentage == 10
    assert plan.gpus == (
        AppliedGpu("GPU-1", 1, 10, 2355 * MIB),
        AppliedGpu("GPU-0", 2, 4, 5888 * MIB),
    )
    opened = watch_plan(scan, replace(rules, mps_limits=MpsLimits.CLIENT))
    assert opened.thread_percentage is None
    assert {each.memory_limit_bytes for each in opened.gpus} == {None}
    unbound = watch_plan(scan, replace(rules, mps_threads=Threads.NONE))
    assert unbound.thread_percentage is None
    whole = watch_plan(scan, SharingRules(replicas=1, mps_limits=MpsLimits.SERVER))
    assert whole.thread_percentage is None
    assert watch_plan(scan, replace(rules, mps_threads=2.0)).thread_percentage == 20


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
    assert bool(plan.gpus) == isinstance(divide(only, rules), Divided)
    for each in plan.gpus:
        assert each.memory_limit_bytes % MIB == 0
        assert each.memory_limit_bytes * each.replicas <= max(
            0, memory - only.reserved_bytes - reserved
        )
