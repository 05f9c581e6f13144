import os
import resource
import time
from pathlib import Path

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vgpu_agent.errors import MpsBinaryError, MpsDownError, MpsHungError, MpsRefusedError
from vgpu_agent.model.rules import MIB
from vgpu_agent.mps.answers import (
    GIB,
    parse_clients,
    parse_fault,
    parse_memory,
    parse_percentage,
    parse_pids,
    same_limit,
    waiting_clients,
)
from vgpu_agent.mps.control import Control, Defaults
from vgpu_agent.mps.directories import Directories

pytestmark = pytest.mark.slow


def children() -> list[str]:
    return Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


# The daemon


async def test_a_daemon_is_asked_and_set_up(fake_mps):
    fake_mps.start()
    control = fake_mps.control()
    assert await control.servers() == ()
    assert await control.defaults([0, 1]) == Defaults(100, {0: None, 1: None})
    await control.set_defaults(Defaults(10, {0: 2300 * MIB + 17, 1: None}))
    assert await control.defaults([0, 1]) == Defaults(10, {0: 2300 * MIB, 1: None})
    pid = fake_mps.start_server()
    assert await control.servers() == (pid,)
    assert not await control.server_failed(pid)
    fake_mps.behave(status="FAULT", clients=f"GPU-a {pid + 1}\n")
    assert await control.server_failed(pid)
    assert await control.clients() == ("GPU-a",)


async def test_questions_at_the_same_time_take_turns(fake_mps):
    fake_mps.start()
    control = fake_mps.control()
    most, left = 0, 3

    async def ask() -> None:
        nonlocal left
        await control.servers()
        left -= 1

    async with anyio.create_task_group() as tasks:
        for _ in range(left):
            tasks.start_soon(ask)
        while left:
            most = max(most, len(children()))
            await anyio.sleep(0.005)
    assert most <= 2  # the daemon, and one question


async def test_without_a_daemon_it_is_down_also_where_a_killed_one_left_its_socket(fake_mps):
    fake_mps.make_directories()
    with pytest.raises(MpsDownError, match="no MPS daemon answers"):
        await fake_mps.control().servers()
    fake_mps.start()
    fake_mps.kill()
    assert (fake_mps.directories.pipe / "control").exists()
    with pytest.raises(MpsDownError):
        await fake_mps.control().servers()


async def test_a_daemon_that_hangs_is_reported_in_time_and_a_question_to_it_leaves_nothing(
    fake_mps,
):
    fake_mps.start()
    control = fake_mps.control()
    await control.servers()
    before, files = children(), open_files()
    fake_mps.behave(hang=True)
    start = time.monotonic()
    with pytest.raises(MpsHungError, match=r"does not answer `get_server_list` within 1\.5 s"):
        await control.servers()
    assert time.monotonic() - start < 2
    assert (children(), open_files()) == (before, files)
    with anyio.move_on_after(0.2) as scope:
        await control.servers()
    assert scope.cancelled_caught
    assert (children(), open_files()) == (before, files)
    fake_mps.behave()
    assert await control.servers() == ()


async def test_a_refusal_is_reported_with_its_words(fake_mps):
    fake_mps.start()
    fake_mps.behave(refuse={"get_server_list": "Not today"})
    with pytest.raises(MpsRefusedError, match=r"refused `get_server_list` .*Not today"):
        await fake_mps.control().servers()


@pytest.mark.parametrize("where", ["", " >&2"])
@pytest.mark.parametrize("word", ["yes", "trap '' PIPE; yes", "cat /dev/zero"])
async def test_an_endless_answer_is_refused_in_bounded_memory(tmp_path, word, where):
    program = tmp_path / "program"
    program.write_text(f"#!/bin/sh\n({word}){where}\n")
    program.chmod(0o755)
    before, files = children(), open_files()
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(MpsRefusedError, match="`get_server_list` with more than 1048576 bytes"):
        await Control(Directories(tmp_path), binary=str(program), timeout=10).servers()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - used < 32 * 1024  # KiB
    await anyio.sleep(0.1)
    assert (children(), open_files()) == (before, files)


async def test_a_process_that_is_out_of_descriptors_says_so(fake_mps):
    fake_mps.start()
    control = fake_mps.control()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        with pytest.raises(MpsHungError, match=r"cannot be asked now: .*Too many open files"):
            await control.servers()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert await control.servers() == ()


async def test_a_program_that_is_missing_or_may_not_be_run_is_reported(tmp_path):
    program = tmp_path / "program"
    control = Control(Directories(tmp_path), binary=str(program))
    with pytest.raises(MpsBinaryError, match="install the driver"):
        await control.servers()
    program.write_text("#!/bin/sh\n")
    with pytest.raises(MpsBinaryError, match="Permission denied"):
        await control.servers()


# Its answers


@given(st.lists(st.integers(0, 2**22)))
def test_pids_are_read_back(pids):
    assert parse_pids("\n".join(map(str, pids)) + "\n") == tuple(pids)


@pytest.mark.parametrize(
    ("parse", "texts"),
    [
        (parse_pids, ["12 13", "-1", "no servers", "12\nServer 13"]),
        (parse_percentage, ["", "all", "101", "-5", "5 5"]),
        (parse_memory, ["unlimited", "-1G", "1.5G", "8G 8G"]),
    ],
    ids=["PIDs", "a percentage", "a limit of memory"],
)
def test_what_makes_no_sense_is_refused(parse, texts):
    for text in texts:
        with pytest.raises(MpsRefusedError):
            parse(text)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("ACTIVE", False),
        ("Server 12 status: Initializing", False),
        ("FAULT\n", True),
        ("Server 12 status: fault", True),
        ("ACTIVE, was FAULT", True),
        ("DEFAULT", False),
        ("", False),
    ],
)
def test_a_fault_is_a_word_of_the_status(text, fault):
    assert parse_fault(text) is fault


@given(st.integers(0, 100), st.sampled_from(["", ".0", ".25", "%", ".0 %"]))
def test_percentages_are_read_back(percentage, form):
    assert parse_percentage(f" {percentage}{form}\n") == percentage


@given(st.integers(1, 10**6), st.sampled_from([("M", MIB), ("G", GIB), ("", 1), ("MB", MIB)]))
def test_limits_of_memory_are_read_back(number, unit):
    assert parse_memory(f"{number}{unit[0]}\n") == number * unit[1]


@pytest.mark.parametrize("text", ["", "  \n", "0", "0G", "0M"])
def test_nothing_and_zero_are_no_limit(text):
    assert parse_memory(text) is None


@given(st.integers(MIB, 2**38))
def test_a_limit_is_the_same_exactly_or_in_whole_gib(wanted):
    assert same_limit(wanted, wanted // MIB * MIB)
    assert same_limit(wanted, wanted // GIB * GIB or wanted // MIB * MIB)
    assert not same_limit(wanted, None)
    assert not same_limit(None, wanted)
    assert not same_limit(wanted, wanted // GIB * GIB + GIB)
    assert same_limit(None, None)


PS = """PID ID SERVER DEVICE NAMESPACE COMMAND
9741 0 6472 GPU-cb1213a3-d6a4-be7f 4026531836 ./nbody
9743 0 6472 GPU-cb1213a3-d6a4-be7f 4026531836 ./matmul
"""


@pytest.mark.parametrize(
    ("text", "clients"),
    [
        ("", []),
        (PS, ["GPU-cb1213a3-d6a4-be7f"] * 2),
        ("GPU-a 71\n72 GPU-b\n", ["GPU-a", "GPU-b"]),
        ("GPU-a: 71, 72", ["GPU-a", "GPU-a"]),
        ("0 71\n72 1\n", ["0", "1"]),
        ("Device 0\n71\n72\nDevice 1:\n73", ["0", "0", "1"]),
        ("GPU-a\n71\n", ["GPU-a"]),
        ("71\n72\n", ["", ""]),
        ("71 some words\n", [""]),
        ("no clients\n", []),
    ],
)
def test_clients_are_read_in_every_form_that_may_be(text, clients):
    assert list(parse_clients(text)) == clients


@given(st.text(max_size=300))
def test_no_text_breaks_a_parser_that_does_not_refuse(text):
    parse_clients(text)
    parse_fault(text)
    waiting_clients(text)


# The log


def line(text: str) -> str:
    return f"[2026-05-31 23:48:21.671 Control 11107] {text}\n"


OWN = (
    line("NEW CLIENT 71 from user 1000: Server is not ready, push client to pending list")
    + line("Starting new server 60 for user 1000")
    + line("NEW SERVER 60: Ready")
)
FOREIGN = line("NEW CLIENT 72 from user 0: Server is not ready, push client to pending list")


def test_clients_of_another_user_wait_until_their_server_is_ready():
    assert waiting_clients(OWN) == set()
    assert waiting_clients(OWN + FOREIGN) == {(72, 0)}
    after = line("Server 60 exited with status 0") + line("Starting new server 61 for user 0")
    assert waiting_clients(OWN + FOREIGN + after) == set()
    assert waiting_clients(OWN + FOREIGN + after + line("NEW SERVER 61: Ready")) == set()


def test_a_log_whose_beginning_is_lost_shows_the_user_by_its_clients():
    served = line("NEW CLIENT 71 from user 1000: Server already exists")
    assert waiting_clients(served + FOREIGN) == {(72, 0)}
    assert waiting_clients(FOREIGN) == set()


async def test_a_program_that_ends_without_reading_is_a_daemon_that_is_down(tmp_path):
    program = tmp_path / "nvidia-cuda-mps-control"
    program.write_text("#!/bin/sh\necho 'Cannot find MPS control daemon process'; exit 1\n")
    program.chmod(0o755)
    control = Control(Directories(tmp_path), binary=str(program))
    for _ in range(5):
        with pytest.raises(MpsDownError):
            await control.servers()
