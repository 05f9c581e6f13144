"""The control socket: how the other commands find the running agent, and what they ask it.

A unix socket in VGPU_STATE_DIRECTORY that only its owner, root in a container, can connect to. A
connection carries one request, a line of JSON, and one answer. That something listens there is all
that is needed to know an agent runs: no PID, no lock.
"""

import json
import logging
import socket
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Never

import anyio
from anyio.abc import SocketListener, SocketStream, TaskGroup

from vgpu_agent import unixsocket
from vgpu_agent.errors import ControlError, NoAgentError, Once
from vgpu_agent.pace import next_turn
from vgpu_agent.store import identity

log = logging.getLogger(__name__)

SOCKET = "control.sock"

MAX_REQUEST = 4096
MAX_ANSWER = 2**24
ANSWER_SECONDS = 5.0
POLL = 5.0
"""Seconds between two looks at whether the socket is still ours, or can be."""

Handler = Callable[[Mapping[str, object]], Awaitable[bytes]]
"""Answers a request. Raises ControlError with what is wrong with it."""


async def serve(directory: Path, handler: Handler, *, poll: float = POLL) -> Never:
    """Serves until cancelled, which removes the socket.

    Where another agent serves there, or the directory cannot be written, that is logged once, and
    tried again: the agent runs without.
    """
    path, trouble = directory / SOCKET, Once(log)
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            why = unixsocket.obstacle(path)
            if why is None:
                await _serve_here(path, handler, poll)
                trouble.warn()
        except OSError as error:
            why = f"{path}: {error.strerror or error}"
        if why is not None:
            trouble.warn(f"`vgpu-agent status` and `release` will not find this agent: {why}")
        await anyio.sleep(poll)


async def _serve_here(path: Path, handler: Handler, poll: float) -> None:
    """Serves for as long as the path is our socket. Raises OSError."""
    bound = unixsocket.bind(path)
    own = identity(path)
    try:
        bound.listen(8)
        async with (
            await SocketListener.from_socket(bound) as listener,
            anyio.create_task_group() as tasks,
        ):
            tasks.start_soon(_accept, listener, tasks, partial(_answer, handler), poll)
            while identity(path) == own:
                await next_turn(poll)
            tasks.cancel_scope.cancel()
    finally:
        bound.close()
        with suppress(OSError):  # a read-only directory keeps it; it is stale then
            _remove(path, own)


async def _accept(
    listener: SocketListener,
    tasks: TaskGroup,
    answer: Callable[[SocketStream], Coroutine[object, object, None]],
    poll: float,
) -> None:
    """As `listener.serve`, which ends where the process is out of descriptors for a moment."""
    while True:
        try:
            tasks.start_soon(answer, await listener.accept())
        except anyio.BrokenResourceError:
            await anyio.sleep(poll)


def _remove(path: Path, own: object) -> None:
    """Our socket, and nobody else's."""
    if identity(path) == own:
        path.unlink(missing_ok=True)


async def _answer(handler: Handler, stream: SocketStream) -> None:
    """One request and its answer. Whatever the peer does concerns this connection only."""
    with suppress(anyio.BrokenResourceError, anyio.ClosedResourceError, TimeoutError):
        async with stream:
            try:
                with anyio.fail_after(ANSWER_SECONDS):
                    body = await handler(await _request(stream))
                head: dict[str, object] = {"bytes": len(body)}
            except ControlError as error:
                head, body = {"error": str(error)}, b""
            except TimeoutError:
                head, body = {"error": f"no answer within {ANSWER_SECONDS:g} s"}, b""
            with anyio.fail_after(ANSWER_SECONDS):
                await stream.send(json.dumps(head).encode() + b"\n" + body)


async def _request(stream: SocketStream) -> Mapping[str, object]:
    """Raises ControlError for what is no request."""
    line = b""
    try:
        while not line.endswith(b"\n") and len(line) <= MAX_REQUEST:
            line += await stream.receive(MAX_REQUEST)
        data: object = json.loads(line)
    except (anyio.EndOfStream, ValueError, RecursionError):
        data = None
    if not isinstance(data, dict) or not isinstance(data.get("command"), str):
        raise ControlError("a request is a line of JSON with a command")
    return data


# The other side


def call(directory: Path, command: str, **arguments: object) -> bytes:
    """Asks the agent that serves in that directory; its answer. Blocks, not for long.

    Raises NoAgentError where no agent answers, and ControlError with what it objects to.
    """
    path = directory / SOCKET
    request = json.dumps({"command": command, **arguments}).encode() + b"\n"
    if len(request) > MAX_REQUEST:
        raise ControlError(f"{command}: the request has {len(request)} bytes; {MAX_REQUEST} fit")
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(ANSWER_SECONDS + 1)
            connection.connect(str(path))
            connection.sendall(request)
            with connection.makefile("rb") as answer:
                head = json.loads(answer.readline(MAX_REQUEST))
                body = answer.read(max(0, min(int(head.get("bytes", 0)), MAX_ANSWER)))
    except OSError as error:
        why = error.strerror or str(error) or "no answer in time"
        raise NoAgentError(
            f"no agent answers at {path}: {why}; run this in the agent's container, with its"
            " VGPU_STATE_DIRECTORY"
        ) from error
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise NoAgentError(f"what answers at {path} is not a vgpu-agent") from error
    if "error" in head:
        raise ControlError(str(head["error"]))
    if len(body) != head.get("bytes"):
        raise NoAgentError(f"the answer at {path} breaks off")
    return body
