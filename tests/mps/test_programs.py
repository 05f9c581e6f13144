"""What the real control programs and the stand-in for them say and do alike.

Each row was seen of the real ones; where a version differs the row says so.
"""

import fcntl
import os
import signal
import stat
import struct
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field

import anyio
import pytest

from tests.mps.fixtures import PROGRAMS, USER, Mps, eventually
from vgpu_agent.model.rules import MAX_DAEMON_NAME
from vgpu_agent.mps.directories import Directories
from vgpu_agent.settings import fits

pytestmark = pytest.mark.slow

Answer = tuple[int, str, str]

NOT_FOUND = (1, "", "Cannot find MPS control daemon process\n")
CANNOT_SEND = "Cannot send command to MPS control daemon process\n"
BUSY = [(1, "", CANNOT_SEND), (1, "", ""), (0, "", ""), (0, "", CANNOT_SEND)]
"""What a caller gets that meets another one: the real programs say any of these."""
RUNNING = "An instance of this daemon is already running\n"
REFUSED = (
    "Insufficient privileges for UID 1001. Control deamon settings can only be modified by the user"
    " started it or by the root user."
)
REFUSED_SERVER = "Insufficient privileges for UID 1001"
OTHER_SERVER = f"{REFUSED_SERVER}. Only the root user may shutdown another user's server."
NO_STATUS = 'Unknown command "get_server_status"'


def said(done: subprocess.CompletedProcess[str]) -> Answer:
    return done.returncode, done.stdout, done.stderr


# What cannot be brought about without a GPU

WORDS = {
    "INITIALIZING": "535",
    "ACTIVE": "535",
    "FAULT": "535",
    "Server %d is <busy>": "",
    "NEW CLIENT %d from user %d: Server already exists": "",
    "NEW CLIENT %d from user %d: Server is not ready, push client to pending list": "",
    "NEW SERVER %d: Ready": "",
    "Server encountered a fatal exception. Shutting down": "",
}
"""Words that ours take for those of the daemon, and the beginning of the version without them."""


@pytest.mark.parametrize("version", PROGRAMS)
def test_words_that_no_test_has_heard_a_real_daemon_say_stand_in_its_program(version):
    path = PROGRAMS[version]
    if path is None:
        pytest.skip("no nvidia-cuda-mps-control: tests/mps/get-real-daemon gets it")
    said = path.read_bytes().split(b"\0")
    missing = {word for word in WORDS if word.encode() not in [each.rstrip(b"\n") for each in said]}
    assert missing == {word for word, old in WORDS.items() if old and version.startswith(old)}


# Commands: in one connection, in this order


@dataclass
class Said:
    """The answer to a command; `{server}` stands for the PID of the server."""

    command: str
    answer: str
    other: Mapping[str, str] = field(default_factory=dict)
    """By the beginning of a version that answers something else."""

    def by(self, mps: Mps) -> str:
        others = [answer for start, answer in self.other.items() if mps.version.startswith(start)]
        return others[0] if others else self.answer


PERCENTAGE = "set_default_active_thread_percentage"
SET, GET = "set_default_device_pinned_mem_limit", "get_default_device_pinned_mem_limit"
UUID = "GPU-cb1213a3-d6a4-be7f-aaaa-bbbbbbbbbbbb"

COMMANDS = [
    Said("get_server_list", "{server}"),
    Said(f"start_server -uid {USER}", ""),
    Said("start_server -uid 1001", ""),  # one server at a time
    Said("get_server_list", "{server}"),
    Said("get_server_status {server}", "INITIALIZING", {"535": NO_STATUS}),
    Said("get_server_status 1", "Server 1 not found", {"535": NO_STATUS}),
    Said("get_device_client_list", ""),
    Said("get_device_client_list {server}", ""),
    Said("get_device_client_list 1", "Server 1 not found"),
    Said("shutdown_server 1", "Server 1 not found"),
    Said("get_default_active_thread_percentage", "100.0"),
    *(Said(f"{PERCENTAGE} {none}", "100.0") for none in ("0", "101", "-5", "abc")),
    Said(f"{PERCENTAGE} 12.5", "12.5"),
    Said(f"{PERCENTAGE} 10", "10.0"),
    Said("get_default_active_thread_percentage", "10.0"),
    Said(f"{GET} 0", ""),
    *(
        each
        for limit, read in [
            ("4812M", "4G"),  # whole GiB from one on
            ("500M", "500M"),
            ("1023M", "1023M"),
            ("1024M", "1G"),
            ("2047M", "1G"),
            ("0G", ""),
            ("3G", "3G"),
            ("0M", ""),
            ("512", "512M"),
            ("abc", ""),
        ]
        for each in (Said(f"{SET} 0 {limit}", ""), Said(f"{GET} 0", read))
    ),
    *(Said(f"{SET} {ordinal} 1G", "") for ordinal in (0, 31, 32)),
    Said(f"{GET} 31", "1G"),
    Said(f"{GET} 32", ""),
    Said(f"{SET} {UUID} 3G", ""),
    Said(f"{GET} {UUID}", ""),
    Said(f"{GET} 0", ""),  # which the UUID has lifted
    Said(f"{GET} 31", "1G"),
    Said("=1", 'Unknown command "=1"'),
    Said("such a command", 'Unknown command "such"'),
]

OF_ANOTHER_USER = [
    Said(f"{PERCENTAGE} 10", REFUSED, {"535": "10.0"}),
    Said("get_default_active_thread_percentage", "100.0", {"535": "10.0"}),
    Said(f"{SET} 0 1G", REFUSED, {"535": ""}),
    Said(f"{GET} 0", "", {"535": "1G"}),
    Said("shutdown_server {server}", OTHER_SERVER, {"535": REFUSED_SERVER}),
    Said("quit", "Not enough privilege to execute quit command"),
    Said("quit -t 1", "Not enough privilege to execute quit command"),
    Said("get_server_list", "{server}"),
]


def answers(mps: Mps, rows: list[Said], server: int, **how: int) -> list[tuple[str, str]]:
    """Asked in one connection: a word that the daemon does not know ends each answer."""
    lines = [line for row in rows for line in (row.command.format(server=server), "=end")]
    done = mps.ask(*lines, **how)
    assert (done.returncode, done.stderr) == (0, "")
    *texts, rest = done.stdout.split('Unknown command "=end"\n')
    assert rest == ""
    return [(row.command, text.rstrip("\n")) for row, text in zip(rows, texts, strict=True)]


def expected(mps: Mps, rows: list[Said], server: int) -> list[tuple[str, str]]:
    return [(row.command, row.by(mps).format(server=server)) for row in rows]


def test_the_answers_to_commands(every_mps):
    every_mps.start()
    server = every_mps.start_server()
    assert answers(every_mps, COMMANDS, server) == expected(every_mps, COMMANDS, server)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
def test_the_answers_to_another_user(every_mps):
    every_mps.start()
    server = every_mps.start_server()
    said = answers(every_mps, OF_ANOTHER_USER, server, user=1001)
    assert said == expected(every_mps, OF_ANOTHER_USER, server)


# What is done, and what is seen then


def lock_holder(mps: Mps) -> int | None:
    """The PID that holds the lock of the daemon, by F_GETLK."""
    form = "hhqqi4x"
    with (mps.pipe / "control_lock").open("r+b") as file:
        asked = struct.pack(form, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        kind, *_, pid = struct.unpack(form, fcntl.fcntl(file, fcntl.F_GETLK, asked))
    return None if kind == fcntl.F_UNLCK else pid


def files(mps: Mps) -> dict[str, str]:
    found = sorted(mps.pipe.iterdir())
    return {path.name: stat.filemode(path.lstat().st_mode) for path in found}


def runs(pid: int) -> bool:
    with suppress(ProcessLookupError):
        os.kill(pid, 0)
        return True
    return False


def no_daemon(mps: Mps) -> object:
    mps.make_directories()
    return said(mps.ask("get_server_list"))


def killed(mps: Mps) -> object:
    mps.start()
    mps.kill()
    return said(mps.ask("get_server_list")), "control" in files(mps)


def nothing_asked(mps: Mps) -> object:
    mps.start()
    return said(mps.ask()), said(mps.ask(""))


def held(mps: Mps) -> object:
    mps.start()
    with mps.held() as holder:
        others = [said(mps.ask("get_default_active_thread_percentage")) for _ in range(5)]
        assert holder.stdin is not None
        holder.stdin.write("get_default_active_thread_percentage\n")
        out, err = holder.communicate(timeout=5)
    return [other for other in others if other not in BUSY], out, err, holder.returncode


def unflushed(mps: Mps) -> object:
    """Whether an answer is to be read before the end of what is asked."""
    mps.start()
    with mps.held() as holder:
        assert holder.stdin is not None
        assert holder.stdout is not None
        holder.stdin.write("get_default_active_thread_percentage\n")
        holder.stdin.flush()
        eventually(lambda: "100.0" in mps.output.read_text())  # its log
        os.set_blocking(holder.stdout.fileno(), False)
        early = holder.stdout.buffer.read()
        os.set_blocking(holder.stdout.fileno(), True)
        holder.stdin.close()
        return early, holder.stdout.read()


def second(mps: Mps) -> object:
    daemon = mps.start()
    return said(mps.run_program("-f")), said(mps.run_program("-d")), daemon.poll()


def stopped(mps: Mps) -> object:
    daemon = mps.start()
    daemon.send_signal(signal.SIGSTOP)
    with pytest.raises(subprocess.TimeoutExpired):
        mps.ask("get_server_list", timeout=0.5)
    seen = lock_holder(mps) == daemon.pid, said(mps.run_program("-f"))
    daemon.send_signal(signal.SIGCONT)
    eventually(lambda: said(mps.ask("get_server_list")) == (0, "", ""))
    return seen


def several_users(mps: Mps) -> object:
    mps.make_directories()
    try:
        return said(mps.run_program("-f", "-multiuser-server", timeout=0.5))
    except subprocess.TimeoutExpired:
        return "runs"


def foreground(mps: Mps) -> object:
    daemon = mps.start()
    mps.ask("=1")
    eventually(lambda: mps.output.read_text().count("UI closed\n") > 1)
    head = f" Control {daemon.pid:5}] "
    lines = [line.partition(head)[2] for line in mps.output.read_text().splitlines()]
    begins = lines[0].startswith("Starting control daemon using socket ")
    return begins, lines[-5:], [path.name for path in mps.log.iterdir()]


def background(mps: Mps) -> object:
    mps.make_directories()
    done = said(mps.run_program("-d"))
    eventually(lambda: mps.ask("get_server_list").returncode == 0)
    daemon = lock_holder(mps)
    assert daemon is not None
    try:
        eventually(lambda: "NEW UI" in (mps.log / "control.log").read_text())
        return done, sorted(path.name for path in mps.log.iterdir())
    finally:
        os.kill(daemon, signal.SIGKILL)


def lock(mps: Mps) -> object:
    daemon = mps.start()
    mps.start_server()
    living = lock_holder(mps) == daemon.pid
    mps.kill()
    return living, lock_holder(mps)


def terminated(mps: Mps) -> object:
    daemon = mps.start()
    server = mps.start_server()
    before = files(mps)
    daemon.terminate()
    code = daemon.wait(timeout=5)
    return code, mps.server_pids() == [server], files(mps) == before, lock_holder(mps)


def quits(mps: Mps) -> object:
    daemon = mps.start()
    return said(mps.ask("quit")), daemon.wait(timeout=5), list(files(mps))


def quits_in_time(mps: Mps) -> object:
    daemon = mps.start()
    mps.start_server()
    began = time.monotonic()
    done = said(mps.ask("quit -t 1"))
    return done, daemon.wait(timeout=5), mps.server_pids(), time.monotonic() - began >= 1


def quits_with_a_server(mps: Mps) -> object:
    """Which it waits for."""
    daemon = mps.start()
    server = mps.start_server()
    with pytest.raises(subprocess.TimeoutExpired):
        mps.ask("quit", timeout=0.5)
    before = daemon.poll(), runs(server)
    os.kill(server, signal.SIGKILL)
    return before, daemon.wait(timeout=5)


def failing_server(mps: Mps) -> object:
    mps.start()
    mps.servers_do("exit 1")
    done = said(mps.ask(f"start_server -uid {USER}"))
    eventually(lambda: " exited with status 1\n" in mps.output.read_text())
    return done, said(mps.ask("get_server_list"))


def killed_server(mps: Mps) -> object:
    mps.start()
    server = mps.start_server()
    os.kill(server, signal.SIGKILL)
    eventually(lambda: said(mps.ask("get_server_list")) == (0, "", ""))
    status = mps.ask(f"get_server_status {server}").stdout.replace(str(server), "PID")
    return status, mps.start_server() != server


def longest(mps: Mps) -> object:
    """In the longest directory that a setting may name, and in one of a letter more."""

    def in_directory(letters: int) -> Mps:
        other = mps.of("")
        other.directories = Directories(mps.root / (letters * "x"))
        other.one = other.directories.daemon("n" * MAX_DAEMON_NAME)
        other.make_directories()
        return other

    letters = 1
    while fits("mps_directory", mps.root / ((letters + 1) * "x"), {}):
        letters += 1
    one, other = map(in_directory, (letters, letters + 1))
    daemon = one.start()
    asked = anyio.run(one.control().ask, "get_default_active_thread_percentage")
    daemon.kill()
    return asked, other.run_program("-f").returncode


PRIVATE = {
    "control": "srw-rw-rw-",
    "control_lock": "-rw-rw-rw-",
    "control_privileged": "srwxr-xr-x",
}
FILES = {**PRIVATE, "log": "prwxrwxrwx"}
PID_FILE = {"nvidia-cuda-mps-control.pid": "-rw-rw-rw-"}


def made_files(mps: Mps) -> object:
    mps.start()
    return files(mps)


@dataclass
class Seen:
    """What is seen after something was done."""

    do: Callable[[Mps], object]
    seen: object
    other: Mapping[str, object] = field(default_factory=dict)
    """By the beginning of a version of which something else is seen."""


SITUATIONS = [
    Seen(no_daemon, NOT_FOUND),
    Seen(killed, (NOT_FOUND, True)),
    Seen(nothing_asked, ((0, "", ""), (0, 'Unknown command ""\n', ""))),
    Seen(held, ([], "100.0\n", "", 0)),
    Seen(unflushed, (None, "100.0\n")),
    Seen(second, ((1, RUNNING, ""), (1, RUNNING, ""), None)),
    Seen(stopped, (True, (1, RUNNING, ""))),
    Seen(several_users, "runs", {"535": NOT_FOUND, "550": NOT_FOUND}),
    Seen(
        foreground,
        (
            True,
            ["Accepting connection...", "NEW UI", "Cmd:=1", 'Unknown command "=1"', "UI closed"],
            ["control.log"],  # which we made
        ),
    ),
    Seen(background, ((0, "", ""), ["control.log", "server.log"])),
    Seen(made_files, {**FILES, **PID_FILE}, {"535": FILES}),
    Seen(lock, (True, None)),
    Seen(terminated, (-signal.SIGTERM, True, True, None)),
    Seen(quits, ((0, "", ""), 0, list(PRIVATE))),
    Seen(quits_in_time, ((0, "", ""), 0, [], True)),
    Seen(quits_with_a_server, ((None, True), 0)),
    Seen(failing_server, ((0, "", ""), (0, "", ""))),
    Seen(longest, (["100.0"], 1)),
    Seen(killed_server, ("Server PID not found\n", True), {"535": (f"{NO_STATUS}\n", True)}),
]


@pytest.mark.parametrize("row", SITUATIONS, ids=lambda row: row.do.__name__)
def test_what_is_seen(every_mps, row):
    others = [seen for start, seen in row.other.items() if every_mps.version.startswith(start)]
    assert row.do(every_mps) == (others[0] if others else row.seen)
