"""What `mps watch` reads in a daemon's log."""

import os
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vgpu_agent.mps.log import BACKLOG, LINES, READ, PassedOn, Seen, read_line, read_on


def line(text: str) -> str:
    return f"[2026-05-31 23:48:21.671 Control 11107] {text}\n"


def after(text: str, seen: Seen = Seen(), now: float = 0.0) -> Seen:  # noqa: B008 - frozen
    for each in text.splitlines():
        seen, _ = read_line(seen, each, now)
    return seen


OWN = (
    line("NEW CLIENT 71 from user 1000: Server is not ready, push client to pending list")
    + line("Starting new server 60 for user 1000")
    + line("NEW SERVER 60: Ready")
)
FOREIGN = line("NEW CLIENT 72 from user 0: Server is not ready, push client to pending list")
SERVED = line("NEW CLIENT 71 from user 1000: Server already exists")
END, NEXT = line("Server 60 exited with status 0"), line("Starting new server 61 for user 0")


@pytest.mark.parametrize(
    ("text", "waiting"),
    [
        (OWN, 0),
        (OWN + FOREIGN, 1),
        (OWN + FOREIGN + FOREIGN.replace("72", "73"), 2),
        (OWN + FOREIGN + FOREIGN, 1),
        (OWN + FOREIGN + END + NEXT, 0),
        (OWN + FOREIGN + END + NEXT + line("NEW SERVER 61: Ready"), 0),
        (SERVED + FOREIGN, 1),  # the beginning of the log is lost
        (FOREIGN, 0),
        (OWN + FOREIGN + line("Starting control daemon using socket /x/control"), 0),
    ],
)
def test_clients_of_another_user_wait_until_their_server_is_ready(text, waiting):
    assert after(text).waiting_for_others() == waiting


ACCEPTING, CALLER = line("Accepting connection..."), line("NEW UI")


@pytest.mark.parametrize(
    ("text", "accepting"),
    [(ACCEPTING, True), (CALLER + ACCEPTING, True), (ACCEPTING + CALLER, False), (OWN, False)],
)
def test_somebody_who_has_connected_and_says_nothing_is_seen(tmp_path, text, accepting):
    log = tmp_path / "control.log"
    log.write_text(text)
    seen, _ = read_on(log, Seen(), 0)
    assert read_on(log, seen, 0)[0] == seen
    assert seen.accepting is accepting


START, READY = line("Starting new server 9 for user 7"), line("NEW SERVER 9: Ready")
CRASH = START + line("Server 9 exited with status 1")
KILLED = START + line("Server 9 exited with status 0")  # as after SIGKILL or SIGSEGV


@pytest.mark.parametrize("crash", [CRASH, CRASH.replace(START, START + READY), KILLED])
@pytest.mark.parametrize(
    ("times", "now", "failing"),
    [
        ((0, 10, 20), 30, True),
        ((0, 10), 30, False),
        ((0, 360, 720), 1079, True),  # of a container whose start is put off by five minutes
        ((0, 700, 1400), 1401, False),  # the first is too long ago
        ((0, 10, 20), 1201, False),
    ],
)
def test_servers_that_end_by_an_error_again_and_again_are_seen(times, now, failing, crash):
    seen = Seen()
    for at in times:
        seen = after(crash, seen, at)
    assert (seen.crashes, seen.failing(now)) == (len(times), failing)
    good = KILLED.replace(START, START + READY)
    assert after(good + END, seen, now).crashes == len(times)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("Starting new server 60 for user 1000", True),
        ("NEW SERVER 60: Ready", True),
        ("NEW SERVER 60: Ignoring connection from user", True),
        ("Server encountered a fatal exception. Shutting down", True),
        ("Server 60 exited with status 1", True),
        ("Failed to start server using uid 7. No such file or directory", True),
        ("Insufficient privileges for UID 7. Only the root user may ...", True),
        ("NEW CLIENT 72 from user 0: Server is not ready, push client to pending list", True),
        ("NEW CLIENT 72 from user 0: Server already exists", False),
        ("Accepting connection...", False),
        ("NEW UI", False),
        ("Cmd:get_server_list fatal error", False),  # what a client says is nothing to pass on
        ("Cmd:Server 60 exited with status 1", False),
        ('Unknown command "fatal"', False),
        ("No default pinned memory limit set for the device!", False),
        ("100.0", False),
    ],
)
def test_only_what_people_need_is_passed_on(text, told):
    assert read_line(Seen(), line(text), 0)[1] == (text if told else None)


def test_a_log_is_read_on_from_where_it_was_and_emptied_when_it_has_grown(tmp_path):
    log = tmp_path / "control.log"
    assert read_on(log, Seen(), 0) == (Seen(), [])
    log.write_text(OWN + "half a line")
    assert read_on(log, Seen(10**30), 0) == read_on(log, Seen(-5), 0) == read_on(log, Seen(), 0)
    seen, lines = read_on(log, Seen(), 0)
    assert (seen.offset, len(lines)) == (len(OWN), 3)
    with log.open("a") as file:
        file.write("\n" + FOREIGN)
    seen, lines = read_on(log, seen, 0)
    assert (seen.waiting_for_others(), len(lines)) == (1, 1)
    # A flood is read in parts, and the waiting client is not forgotten.
    with log.open("a") as file:
        file.write(line("NEW UI") * (3 * READ // len(line("NEW UI"))))
    for _ in range(4):
        seen, lines = read_on(log, seen, 0)
        assert lines == []
    assert log.stat().st_size == seen.offset == 0
    assert seen.waiting_for_others() == 1
    log.write_text(END)
    seen, lines = read_on(log, seen, 0)
    assert (seen.offset, len(lines)) == (len(END), 1)


@pytest.mark.parametrize("unread", [BACKLOG + 10, 5])
def test_a_log_that_grows_faster_than_it_is_read_is_given_up_with_a_word(tmp_path, unread):
    """Whether it gets ahead or is read as fast as it is written: it would grow for ever."""
    log = tmp_path / "control.log"
    log.touch()
    os.truncate(log, BACKLOG + 10)
    seen, lines = read_on(log, Seen(BACKLOG + 10 - unread), 0)
    assert lines == [f"{unread} bytes of the log were not read"]
    assert log.stat().st_size == seen.offset == 0


def test_a_flood_of_lines_is_passed_on_in_part_and_counted():
    """Any user can make a daemon refuse as many commands as it likes."""
    passed = PassedOn()
    assert passed.take(["one"], 100) == ["one"]
    assert passed.take(["x"] * 1000, 101) == ["x"] * (LINES - 1)
    assert passed.take(["x"] * 1000, 159) == []
    assert passed.take([], 161) == [f"{2001 - LINES} more such lines"]
    assert passed.take(["x"], 162) == ["x"]
    assert passed.take([], 300) == []


@pytest.mark.parametrize("between", ["", "x\v", "x\r", "x\x85", "x\u2028", "x\x1c"])
@pytest.mark.parametrize("text", [CRASH, OWN + FOREIGN, line("Starting control daemon")])
def test_nothing_is_believed_that_clients_say_in_the_words_of_the_daemon(tmp_path, between, text):
    """What they send stands in the log as it is, of all that ends a line but the line feed."""
    known = after(OWN + FOREIGN)
    log = tmp_path / "control.log"
    commands = "".join(
        line(f"Cmd:{between}{said.partition('] ')[2]}") for said in text.splitlines()
    )
    log.write_text(commands)
    seen, lines = read_on(log, known, 0)
    assert (replace(seen, offset=0), lines) == (known, [])


def test_what_is_no_log_says_nothing(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to("/etc/passwd")
    for name in ("fifo", "link", "none", "."):
        assert read_on(tmp_path / name, Seen(), 0) == (Seen(), [])


@given(st.lists(st.sampled_from([OWN, FOREIGN, SERVED, END, NEXT, CRASH]) | st.text(max_size=80)))
def test_whatever_a_log_says_what_is_known_of_it_is_bounded(lines):
    seen = after("\n".join(lines * 40))
    assert max(len(seen.waiting), len(seen.owners)) <= 256
    assert len(seen.recent) <= 3
    assert 0 <= seen.waiting_for_others() <= len(seen.waiting)
