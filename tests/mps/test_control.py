"""How a daemon is asked: one session of the control program, and what may go wrong with it."""

import fcntl
import os
import resource
import time
from pathlib import Path

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vgpu_agent.errors import (
    MpsBusyError,
    MpsDownError,
    MpsHungError,
    MpsRefusedError,
    MpsSetupError,
)
from vgpu_agent.model.rules import MIB
from vgpu_agent.mps.answers import (
    BUSY,
    GIB,
    UNREPORTED,
    parse_clients,
    parse_memory,
    parse_percentage,
    parse_pids,
    parse_status,
    same_limit,
)
from vgpu_agent.mps.control import Control
from vgpu_agent.mps.directories import DaemonDirectories

pytestmark = pytest.mark.slow


def children() -> list[str]:
    return Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def control(tmp_path: Path, script: str, timeout: float = 10) -> Control:
    """Whose program is this shell script."""
    program = tmp_path / "nvidia-cuda-mps-control"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    return Control(DaemonDirectories("one", tmp_path), binary=str(program), timeout=timeout)


ECHO = """while read -r line; do case $line in
=*) echo "Unknown command \\"$line\\"" ;;
nothing) ;;
*) echo "$line is said" ;; esac; done"""


async def test_the_answers_of_a_session_are_told_apart(tmp_path):
    asked = control(tmp_path, ECHO)
    assert await asked.ask("one", "nothing", "a b") == ["one is said", "", "a b is said"]
    assert await asked.ask() == []


@pytest.mark.parametrize(
    ("script", "error", "words"),
    [
        (
            "echo 'Cannot find MPS control daemon process' >&2; exit 1",
            MpsDownError,
            "no MPS daemon",
        ),
        ("echo 'Cannot find MPS control daemon process'; exit 1", MpsDownError, "no MPS daemon"),
        ("echo 'Cannot send command to MPS control daemon process'; exit 1", MpsBusyError, "busy"),
        ("exit 1", MpsBusyError, "busy"),
        ("exit 0", MpsBusyError, "busy"),
        ("cat >/dev/null; exit 0", MpsBusyError, "busy"),
        (f"head -n 1 | {{ {ECHO}; }}", MpsBusyError, "busy"),  # it went away in the middle
    ],
)
async def test_a_daemon_that_is_away_is_told_from_one_that_is_busy(tmp_path, script, error, words):
    for _ in range(3):
        with pytest.raises(error, match=words):
            await control(tmp_path, script).ask("one", "two")


async def test_whoever_asks_while_another_of_ours_does_waits_and_then_finds_it_busy(tmp_path):
    asked = control(tmp_path, ECHO, timeout=0.3)
    with asked.directories.lock.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(MpsBusyError, match="is locked"):
            await asked.ask("one")
    assert await asked.ask("one") == ["one is said"]


@pytest.mark.parametrize("obstacle", ["ask", "ask/control/x"])
async def test_what_keeps_a_daemon_from_being_asked_is_named(tmp_path, obstacle):
    asked = control(tmp_path, ECHO)
    path = tmp_path / obstacle
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    with pytest.raises(MpsBusyError, match=r"cannot be asked now: .*/ask"):
        await asked.ask("one")


async def test_a_daemon_that_hangs_is_reported_in_time_and_a_question_to_it_leaves_nothing(
    tmp_path,
):
    asked = control(tmp_path, "exec sleep 60", timeout=0.3)
    before, files = children(), open_files()
    start = time.monotonic()
    with pytest.raises(MpsHungError, match=r"does not answer within 0\.3 s"):
        await asked.ask("one")
    assert time.monotonic() - start < 1
    with anyio.move_on_after(0.1) as scope:
        await asked.ask("one")
    assert scope.cancelled_caught
    assert (children(), open_files()) == (before, files)


async def test_a_program_that_cannot_be_ended_holds_nobody_up_and_is_not_started_again(
    tmp_path, monkeypatch
):
    """As in a call to the driver that does not return: a signal does not reach it."""
    asked = control(tmp_path, "echo $$ >>pids; exec sleep 3", timeout=0.3)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("vgpu_agent.mps.control.Popen.kill", lambda _: None)
    start = time.monotonic()
    for _ in range(3):
        with pytest.raises(MpsHungError):
            await asked.ask("one")
    assert time.monotonic() - start < 2
    assert len((tmp_path / "pids").read_text().split()) == 1
    await anyio.sleep(2.2)  # the call returns
    with pytest.raises(MpsHungError):
        await asked.ask("one")
    assert len((tmp_path / "pids").read_text().split()) == 2
    assert asked._stuck is not None
    asked._stuck.wait(10)


@pytest.mark.parametrize("where", ["", " >&2"])
@pytest.mark.parametrize("word", ["yes", "trap '' PIPE; yes", "cat /dev/zero"])
async def test_an_endless_answer_is_refused_in_bounded_memory(tmp_path, word, where):
    before, files = children(), open_files()
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(MpsRefusedError, match="answers with more than 1048576 bytes"):
        await control(tmp_path, f"({word}){where}").ask("one")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - used < 32 * 1024  # KiB
    await anyio.sleep(0.1)
    assert (children(), open_files()) == (before, files)


async def test_a_process_that_is_out_of_descriptors_says_so(tmp_path):
    asked = control(tmp_path, ECHO)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (open_files(), hard))
    try:
        with pytest.raises((MpsBusyError, MpsDownError), match="Too many open files"):
            await asked.ask("one")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert await asked.ask("one") == ["one is said"]


async def test_a_program_that_is_missing_or_may_not_be_run_is_reported(tmp_path):
    asked = control(tmp_path, ECHO)
    program = tmp_path / "nvidia-cuda-mps-control"
    program.chmod(0o644)
    with pytest.raises(MpsSetupError, match="Permission denied"):
        await asked.ask("one")
    program.unlink()
    with pytest.raises(MpsSetupError, match="install the driver"):
        await asked.ask("one")


# Its answers


@given(st.lists(st.integers(0, 2**22)))
def test_pids_are_read_back_one_or_several_a_line(pids):
    for between in "\n", " ":
        assert parse_pids(between.join(map(str, pids)) + "\n") == tuple(pids)


@pytest.mark.parametrize(
    ("parse", "texts"),
    [
        (parse_pids, ["-1", "no servers", "12\nServer 13", "1" * 11]),
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
    ("text", "status"),
    [
        ("ACTIVE", "ACTIVE"),
        ("initializing\n", "INITIALIZING"),
        ("FAULT", "FAULT"),
        ("Server 12 not found", None),
        ('Unknown command "get_server_status"', UNREPORTED),
        ("Server 12 is <busy>\n", BUSY),
        ("Server 12 is gone", "Server 12 is gone"),
        ("", ""),
    ],
)
def test_a_status_is_one_word_and_a_server_that_is_gone_has_none(text, status):
    assert parse_status(text) == status


@given(st.integers(0, 100), st.sampled_from(["", ".0", ".25", "%", ".0 %"]))
def test_percentages_are_read_back(percentage, form):
    assert parse_percentage(f" {percentage}{form}\n") == percentage


@given(st.integers(1, 10**6), st.sampled_from([("M", MIB), ("G", GIB), ("", 1), ("MB", MIB)]))
def test_limits_of_memory_are_read_back(number, unit):
    assert parse_memory(f"{number}{unit[0]}\n") == number * unit[1]


@pytest.mark.parametrize(
    "text", ["", "  \n", "0", "0G", "0M", "No default pinned memory limit set for the device!"]
)
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
        (
            PS.replace("DEVICE", "STATUS DEVICE").replace(" GPU", " ACTIVE GPU"),
            ["GPU-cb1213a3-d6a4-be7f"] * 2,
        ),
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
    parse_status(text)
