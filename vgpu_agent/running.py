"""The agent that runs on this machine, as the other commands find and ask it.

It is found by a file with its PID, which it keeps locked, and asked over its own web side.
"""

import fcntl
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import IO

from vgpu_agent.errors import NoAgentError
from vgpu_agent.settings import Address, Settings, parse_address

log = logging.getLogger(__name__)

PID_FILE = "agent.pid"
ANSWER_SECONDS = 2.0


# The file: a line with the PID and, once it is known, one with the metrics address


@dataclass(frozen=True, slots=True)
class Found:
    """The running agent. Its address is None until it listens."""

    pid: int
    address: Address | None


@contextmanager
def findable(directory: Path) -> Iterator[Callable[[Address], None]]:
    """Makes this process known to `find` for as long as it runs; call the result with its address.

    The lock on the file says that the process lives; a second agent leaves the first one's alone.
    A directory that cannot be written is no reason not to run.
    """
    path = directory / PID_FILE
    with ExitStack() as opened:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            file = opened.enter_context(path.open("a+"))
            ours = _lock_for_good(file)
            if ours:
                file.truncate(0)
                _add(file, os.getpid())
        except OSError as error:
            log.warning("`vgpu-agent release` will not work: %s: %s", path, error.strerror)
            ours = False
        if not ours:
            yield lambda _: None
            return
        try:
            yield partial(_add, file)
        finally:
            path.unlink(missing_ok=True)


def _add(file: IO[str], line: object) -> None:
    file.write(f"{line}\n")
    file.flush()


def find(directory: Path) -> Found | None:
    """The agent that holds the file; one that nobody holds was left by an agent that is gone."""
    try:
        with (directory / PID_FILE).open() as file:
            pid, *address = file.read().splitlines()
            if int(pid) <= 0 or _lock(file, fcntl.LOCK_SH):
                return None
        return Found(int(pid), parse_address(address[0]) if address else None)
    except (OSError, ValueError):
        return None


def _lock_for_good(file: IO[str]) -> bool:
    """Whether no other agent has it. Who looks for one has it too, for a moment."""
    for _ in range(3):
        if _lock(file, fcntl.LOCK_EX):
            return True
        time.sleep(0.02)
    return False


def _lock(file: IO[str], kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


# The web side


@dataclass(frozen=True, slots=True)
class Told:
    """What the agent says of its node: as it was sent, and parsed."""

    text: str
    report: Mapping[str, object]


def address_of(settings: Settings) -> Address:
    """Where to ask the agent of these settings. Raises NoAgentError."""
    if settings.metrics_address.port:
        return settings.metrics_address
    # Any free port: only the agent knows which.
    found = find(settings.state_directory)
    if found is None or found.address is None:
        raise NoAgentError(
            f"VGPU_METRICS_ADDRESS={settings.metrics_address} does not say where to ask, and"
            f" {settings.state_directory / PID_FILE} names no running agent"
        )
    return found.address


def get(where: Address, path: str, *, timeout: float = ANSWER_SECONDS) -> tuple[int, bytes]:
    """Status and body of a page there, asked directly: no proxy stands between.

    Raises NoAgentError where nothing answers, or what answers does not speak HTTP.
    """
    # An agent that listens everywhere listens on loopback.
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(where.host, where.host)  # noqa: S104
    try:
        with closing(HTTPConnection(host, where.port, timeout=timeout)) as connection:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read()
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise NoAgentError(
            f"no agent answers at {where}: {why}; is one running there? VGPU_METRICS_ADDRESS names"
            " its address"
        ) from error
    except HTTPException as error:
        raise NoAgentError(f"what listens at {where} is no vgpu-agent: no HTTP") from error


def ask(where: Address, *, timeout: float = ANSWER_SECONDS) -> Told:
    """Asks for /status.json. Raises NoAgentError."""
    status, body = get(where, "/status.json", timeout=timeout)
    if status != 200:
        raise NoAgentError(f"what listens at {where} is no vgpu-agent: it answers HTTP {status}")
    return _parsed(body, where)


def _parsed(body: bytes, where: Address) -> Told:
    try:
        text = body.decode()
        report: object = json.loads(text)
    except (ValueError, RecursionError):
        report = None
    if not (isinstance(report, dict) and {"resource", "cards"} <= report.keys()):
        raise NoAgentError(
            f"what listens at {where} is no vgpu-agent: its /status.json is something else"
        )
    return Told(text, report)
