"""Reads on in the log of an MPS daemon, and keeps of it what matters to people.

Its lines are not documented. These were seen of 535 and 550, or stand in reports:

    NEW CLIENT 812 from user 0: Server is not ready, push client to pending list
    NEW CLIENT 812 from user 1000: Server already exists
    Starting new server 640 for user 1000
    NEW SERVER 640: Ready
    Server encountered a fatal exception. Shutting down
    Server 640 exited with status 1
"""

import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from vgpu_agent.store import closing, open_regular

READ = 2**20
"""Most bytes of the log that are read at a time, and its size from which it is truncated."""

BACKLOG = 8 * READ
"""Size from which a log is given up: it grows so fast that it is never read to its end."""

MANY = 256
"""Most servers and clients that are remembered; more are not distinguished."""

LINES = 60
"""Most lines of a daemon that are passed on in a minute."""

CRASHES, CRASH_SECONDS = 3, 1200.0
"""So many servers that ended by an error within that time end again and again.

A container that does not stay is started again every five minutes at last, and a server with it.
"""


@dataclass(frozen=True, slots=True)
class Seen:
    """What the log of a daemon said up to `offset`, in bytes.

    `owners` are the UIDs of servers by their PID, `running` that of the server that serves now.
    `waiting` are PID and UID of clients that have to wait. `crashes` counts servers that ended
    by an error or before they were ready, `recent` are the times of the last of them, in seconds
    since the boot. `starting` are the PIDs of servers that are not ready yet. `accepting`: nothing
    was said since somebody has connected, who has not said yet what it is.
    """

    offset: int = 0
    owners: Mapping[str, int] = field(default_factory=dict)
    running: int | None = None
    waiting: tuple[tuple[int, int], ...] = ()
    crashes: int = 0
    recent: tuple[float, ...] = ()
    starting: tuple[int, ...] = ()
    accepting: bool = False

    def waiting_for_others(self) -> int:
        """Clients of another user than the running server's: they wait for its end."""
        if self.running is None:
            return 0
        return sum(uid != self.running for _, uid in self.waiting)

    def failing(self, now: float) -> bool:
        """Whether servers end by an error again and again."""
        return sum(now - each < CRASH_SECONDS for each in self.recent) >= CRASHES


_LINE = re.compile(
    r"Starting control (?P<daemon>daemon)"
    r"|NEW CLIENT (?P<client>\d{1,10}) from user (?P<user>\d{1,10}): (?P<said>.*)"
    r"|Starting new server (?P<started>\d{1,10}) for user (?P<owner>\d{1,10})"
    r"|NEW SERVER (?P<ready>\d{1,10}): Ready"
    r"|Server (?P<ended>\d{1,10}) exited with status (?P<status>-?\d+)"
)
_TROUBLE = re.compile(
    r"\b(fatal|failed|failure|error|exception|ignoring|insufficient|cannot|warning|fault)\b",
    re.IGNORECASE,
)
_ACCEPTING = "Accepting connection"
_HEAD = re.compile(r"^\[[^\]]*\]\s*")


def read_line(seen: Seen, line: str, now: float) -> tuple[Seen, str | None]:
    """What is known after a line, and the line where people need it; `None` for the many others.

    A client that waited is served when a server of its user is ready: no line says so. A server
    that a signal has ended has the status 0 (seen): one that was not ready by then has crashed.
    """
    text = _HEAD.sub("", line).strip()
    if seen.accepting is not text.startswith(_ACCEPTING):
        seen = replace(seen, accepting=not seen.accepting)
    match = _LINE.match(text)
    if match is None:
        # What clients say of commands stands behind "Cmd:".
        trouble = _TROUBLE.search(text) and not text.startswith(("Cmd:", "Unknown command"))
        return seen, text if trouble else None
    owners = dict(seen.owners)
    if match["daemon"]:
        return Seen(seen.offset, crashes=seen.crashes, recent=seen.recent), text
    if match["client"]:
        client = int(match["client"]), int(match["user"])
        waiting = tuple(each for each in seen.waiting if each != client)
        if "pending" not in match["said"]:
            return replace(seen, running=client[1], waiting=waiting), None
        return replace(seen, waiting=(*waiting, client)[-MANY:]), text
    if match["started"]:
        owners[match["started"]] = int(match["owner"])
        owners = dict(list(owners.items())[-MANY:])
        starting = (*seen.starting, int(match["started"]))[-MANY:]
        seen = replace(seen, owners=owners, running=int(match["owner"]), starting=starting)
        return seen, text
    pid = int(match["ready"] or match["ended"])
    never_ready = pid in seen.starting
    seen = replace(seen, starting=tuple(each for each in seen.starting if each != pid))
    if match["ready"]:
        running = owners.get(match["ready"], seen.running)
        waiting = tuple(each for each in seen.waiting if each[1] != running)
        return replace(seen, running=running, waiting=waiting), text
    owners.pop(match["ended"], None)
    seen = replace(seen, owners=owners, running=next(reversed(owners.values()), None))
    if int(match["status"]) != 0 or never_ready:
        recent = (*seen.recent, now)[-CRASHES:]
        seen = replace(seen, crashes=seen.crashes + 1, recent=recent)
    return seen, text


@dataclass
class PassedOn:
    """Lines that were passed on in the minute from `since` on, and others: any user makes some."""

    lines: int = 0
    others: int = 0
    since: float = 0.0

    def take(self, lines: Sequence[str], now: float) -> list[str]:
        """What is to be passed on of these, and how many were not in the minute before."""
        said = []
        if now - self.since >= 60:
            said += [f"{self.others} more such lines"] if self.others else []
            self.lines, self.others, self.since = 0, 0, now
        room = LINES - self.lines
        self.lines += len(lines[:room])
        self.others += len(lines[room:])
        return [*said, *lines[:room]]


def read_on(path: Path, seen: Seen, now: float) -> tuple[Seen, list[str]]:
    """Reads what was written since; the lines that people need.

    A log that has grown large and is read to its end is emptied. Blocks; a log that cannot be read
    says nothing.
    """
    said: list[str] = []
    with suppress(OSError):
        descriptor = open_regular(path, os.O_RDWR | os.O_NOFOLLOW)
        if descriptor is None:
            return seen, said
        with closing(descriptor):
            found = os.fstat(descriptor)
            if not 0 <= seen.offset <= found.st_size:  # it is another one
                seen = replace(seen, offset=0)
            if found.st_size > BACKLOG:
                said.append(f"{found.st_size - seen.offset} bytes of the log were not read")
                os.ftruncate(descriptor, 0)
                return replace(seen, offset=0), said
            content = os.pread(descriptor, READ, seen.offset)
            end = content.rfind(b"\n") + 1
            whole = content[:end] if end or len(content) < READ else content
            # Not by `splitlines`: what clients say may hold all that it takes for the end of one.
            for line in filter(None, whole.decode(errors="replace").split("\n")):
                seen, text = read_line(seen, line[:500], now)
                said += [text] if text else []
            seen = replace(seen, offset=seen.offset + len(whole))
            if seen.offset > READ and os.fstat(descriptor).st_size == seen.offset:
                os.ftruncate(descriptor, 0)
                seen = replace(seen, offset=0)
    return seen, said
