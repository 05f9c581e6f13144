"""Asks the running agent for its report: at its control socket, or over HTTP."""

import json
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from pathlib import Path

from vgpu_agent import control
from vgpu_agent.address import Address
from vgpu_agent.errors import ControlError, NoAgentError
from vgpu_agent.observe.report import Report, from_json

ANSWER_SECONDS = 2.0

EVERYWHERE = ("0.0.0.0", "::")  # noqa: S104
"""An agent that listens there answers by IPv4 too, and for that nothing has to know names."""


@dataclass(frozen=True, slots=True)
class Answer:
    """The report, and the JSON in which it came."""

    text: str
    report: Report


Ask = Callable[[], Answer]
"""Asks the agent. Blocks for a few seconds at most. Raises NoAgentError."""


def by_socket(directory: Path) -> Answer:
    """Asks the agent of that state directory. Raises NoAgentError."""
    where = str(directory / control.SOCKET)
    try:
        return _understood(control.call(directory, "report"), where)
    except ControlError as error:
        raise NoAgentError(f"the agent at {where} refuses to report: {error}") from error


def by_http(address: Address, *, timeout: float = ANSWER_SECONDS) -> Answer:
    """Asks for /status.json there. Raises NoAgentError."""
    status, body = get(address, "/status.json", timeout=timeout)
    if status != 200:
        raise NoAgentError(
            f"what listens at {address} is not a vgpu-agent: it answers HTTP {status}"
        )
    return _understood(body, str(address))


def _understood(body: bytes, where: str) -> Answer:
    try:
        return Answer(body.decode(), from_json(body))
    except ValueError as error:
        why = "not JSON" if isinstance(error, json.JSONDecodeError | UnicodeError) else error
        raise NoAgentError(f"cannot read what {where} answers: {why}") from error


def get(where: Address, path: str, *, timeout: float = ANSWER_SECONDS) -> tuple[int, bytes]:
    """Status and body of a page there, asked directly: no proxy stands between.

    Raises NoAgentError where nothing answers, or what answers does not speak HTTP.
    """
    host = "127.0.0.1" if where.host in EVERYWHERE else where.host
    try:
        with closing(HTTPConnection(host, where.port, timeout=timeout)) as connection:
            # By whatever name: the check of that is for browsers.
            connection.request("GET", path, headers={"Host": "localhost"})
            answer = connection.getresponse()
            return answer.status, answer.read()
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise NoAgentError(f"no agent answers at {where}: {why}") from error
    except HTTPException as error:
        raise NoAgentError(f"what listens at {where} is not a vgpu-agent: no HTTP") from error
