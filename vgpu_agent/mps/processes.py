"""Processes of this machine, as far as MPS asks for them, from /proc (proc(5)).

In a container they are those of its PID namespace: the MPS pod has `hostPID: true`.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")

_LASTS = 2.0
"""Seconds that a process has run which may be what held a daemon while that was asked for."""

_NAMED = 3
"""Most processes that are named where any may be the one."""


@dataclass(frozen=True, slots=True)
class Process:
    """A process that runs. `started` is in seconds since the boot, rounded down to a clock tick.

    A PID alone names another process once it was used again; the pair does not.
    """

    pid: int
    started: float


def find(pid: int) -> Process | None:
    """The process of that PID; None where there is none, or one that has ended (a zombie)."""
    fields = _stat(pid)
    if not fields or fields[0] in {"Z", "X"}:
        return None
    return Process(pid, int(fields[19]) / os.sysconf("SC_CLK_TCK"))


def _stat(pid: int) -> list[str]:
    """What `stat` says after the name, which stands in brackets and may hold anything."""
    return _read(pid, "stat").rpartition(b")")[2].decode(errors="replace").split()


def _read(pid: int, file: str) -> bytes:
    """A file of a process; nothing where it has ended, or where we may not look."""
    with suppress(OSError):
        return (PROC / str(pid) / file).read_bytes()
    return b""


def find_named(name: str) -> Iterator[Process]:
    """Processes of that program, by the file that runs or by the name it was started under."""
    for directory in PROC.iterdir():
        if not directory.name.isdecimal():
            continue
        names = set()
        with suppress(OSError):
            names.add((directory / "exe").readlink().name)
        first = _read(int(directory.name), "cmdline").partition(b"\0")[0]
        names.add(Path(os.fsdecode(first)).name)
        process = find(int(directory.name)) if name in names else None
        if process is not None:
            yield process


def variable_of(process: Process, name: str) -> str | None:
    """A variable of the environment that a process was started with.

    None where it has none, or where we may not look (that takes root, or its own user).
    """
    for entry in _read(process.pid, "environ").split(b"\0"):
        key, _, value = entry.partition(b"=")
        if key == name.encode():
            return os.fsdecode(value)
    return None


def is_daemon(process: Process) -> bool:
    """Whether it is a control daemon, or gone, and not somebody who asks one."""
    words = _read(process.pid, "cmdline").split(b"\0")
    return words == [b""] or not {b"-f", b"-d"}.isdisjoint(words)


def holders(program: str, pipe: Path, now: float) -> str:
    """Who may hold the connection of the daemon of that directory: words to be added to others.

    They are callers by that program that have run for a while. Others come and go, and would be
    news at every look.
    """
    found = [
        f"process {each.pid} of user {owner_of(each)}"
        for each in find_named(program)
        if each.started < now - _LASTS
        and variable_of(each, "CUDA_MPS_PIPE_DIRECTORY") in (None, str(pipe))
        and not is_daemon(each)
    ]
    if not found:
        return ", which is not seen among the processes"
    return f": {', '.join(found[:_NAMED])}{' and others' if found[_NAMED:] else ''}"


def owner_of(process: Process) -> int | None:
    """The UID that a process runs as; None where it has ended."""
    try:
        return (PROC / str(process.pid)).stat().st_uid
    except OSError:
        return None


def session_of(process: Process) -> int | None:
    """The PID of the process that began its session; None where it has ended."""
    fields = _stat(process.pid)
    return int(fields[3]) if fields else None


def send(process: Process, number: signal.Signals) -> bool:
    """Signals that process and no other that has its PID by now; whether it was still there.

    Raises PermissionError.
    """
    try:
        descriptor = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return False
    except OSError:  # seccomp profiles of old container runtimes do not know it
        descriptor = None
    try:
        if find(process.pid) != process:
            return False
        if descriptor is None:
            os.kill(process.pid, number)
        else:
            signal.pidfd_send_signal(descriptor, number)
    except ProcessLookupError:
        return False
    finally:
        if descriptor is not None:
            os.close(descriptor)
    return True
