"""Peers that are started and stopped in threads, peers that speak badly, and what they leave."""

import asyncio
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol, TypeVar

import anyio
import h2.config
import h2.connection
import h2.events
import h2.exceptions
import pytest

from tests.kubelet_peer import off_loop
from vgpu_agent.model.node import Node
from vgpu_agent.model.snapshot import Snapshot


class Peer(Protocol):
    def start(self) -> None: ...
    def stop(self) -> None: ...


P = TypeVar("P", bound=Peer)


@asynccontextmanager
async def started(peer: P) -> AsyncIterator[P]:
    """The peer, started and stopped without holding up the loop."""
    await off_loop(peer.start)
    try:
        yield peer
    finally:
        with anyio.CancelScope(shield=True):
            await off_loop(peer.stop)


async def wait_for(condition: Callable[[], Any], what: str, within: float = 10.0) -> Any:
    """For what neither the state nor the kubelet tells: looks every few milliseconds."""
    until = time.monotonic() + within
    while not (found := condition()):
        assert time.monotonic() < until, f"no {what} within {within} s"
        await anyio.sleep(0.005)
    return found


async def until(node: Node, condition: Callable[[Snapshot], Any], within: float = 10.0) -> Snapshot:
    """The first snapshot from now on that the condition holds for."""
    with anyio.move_on_after(within):
        async for snapshot in node.latest.follow():
            if condition(snapshot):
                return snapshot
    raise AssertionError(f"not within {within} s; the last was {node.snapshot}")


def told(caplog: pytest.LogCaptureFixture, words: str = "", logger: str = "") -> list[str]:
    """The log lines with these words, of any logger or of one."""
    return [
        each.getMessage()
        for each in caplog.records
        if each.name.startswith(logger) and words in each.getMessage()
    ]


# What is left


def descriptors() -> list[str]:
    """What this process has open."""
    found = []
    for link in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # the one that the directory is read with
            found.append(str(link.readlink()))
    return found


def sockets() -> int:
    """How many sockets this process has open."""
    return sum(name.startswith("socket:") for name in descriptors())


def sockets_at(path: Path) -> int:
    """How many sockets of the kernel have this path: the listening one and each accepted one."""
    lines = Path("/proc/net/unix").read_text().splitlines()
    return sum(line.endswith(f" {path}") for line in lines)


@asynccontextmanager
async def nothing_left(open_sockets: Callable[[], int] = sockets) -> AsyncIterator[None]:
    """At the end no other tasks run, and no more sockets are open, than at the beginning."""
    tasks, before = asyncio.all_tasks(), open_sockets()
    yield
    await wait_for(lambda: asyncio.all_tasks() <= tasks, "end of all tasks", 1)
    await wait_for(lambda: open_sockets() <= before, "end of all sockets")


# Peers that speak badly


@contextmanager
def bound(path: Path, kind: int = socket.SOCK_STREAM) -> Iterator[socket.socket]:
    """A socket of another process, as far as anyone can tell."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, kind) as other:
        other.bind(str(path))
        if kind != socket.SOCK_DGRAM:
            other.listen()
        yield other
    path.unlink(missing_ok=True)


Serve = Callable[[socket.socket], None]


@asynccontextmanager
async def listening(path: Path, serve: Serve) -> AsyncIterator[None]:
    """A socket in the place of the kubelet's; `serve` has each connection, then it is closed."""

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection, suppress(OSError, h2.exceptions.ProtocolError):
                connection.settimeout(10)
                serve(connection)

    with bound(path) as listener:
        thread = threading.Thread(target=accept, name="bad-kubelet")
        thread.start()
        try:
            yield
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            with anyio.CancelScope(shield=True):
                await off_loop(thread.join)


def hanging_up(_connection: socket.socket) -> None:
    """Ends the connection as soon as it is there."""


def silent(connection: socket.socket) -> None:
    while connection.recv(65536):
        pass


Http = h2.connection.H2Connection


def over_http2(answer: Callable[[Http, int], None]) -> Serve:
    """Serves one request: `answer` writes what it likes to the connection and the stream."""

    def serve(connection: socket.socket) -> None:
        http = Http(h2.config.H2Configuration(client_side=False))
        http.initiate_connection()
        connection.sendall(http.data_to_send())
        while data := connection.recv(65536):
            for event in http.receive_data(data):
                if isinstance(event, h2.events.StreamEnded):
                    answer(http, event.stream_id)
            connection.sendall(http.data_to_send())

    return serve


def answering(data: bytes, *, status: str | None = None, end: bool = False) -> Serve:
    """What gRPC answers begin with, this data, then the status if there is one, or the end."""

    def answer(http: Http, stream: int) -> None:
        http.send_headers(stream, [(":status", "200"), ("content-type", "application/grpc")])
        if data:
            http.send_data(stream, data, end_stream=end)
        if status is not None:
            http.send_headers(stream, [("grpc-status", status)], end_stream=True)

    return over_http2(answer)


def replying(*headers: tuple[str, str], end: bool = True) -> Serve:
    """Headers alone."""
    return over_http2(lambda http, stream: http.send_headers(stream, headers, end_stream=end))


def saying(data: bytes) -> Serve:
    """This, whatever it is asked."""

    def serve(connection: socket.socket) -> None:
        connection.sendall(data)
        silent(connection)

    return serve


def then(answer: Callable[[Http, int], None]) -> Serve:
    """The same after the headers of an answer."""

    def begun(http: Http, stream: int) -> None:
        http.send_headers(stream, [(":status", "200"), ("content-type", "application/grpc")])
        answer(http, stream)

    return over_http2(begun)


HALF = b"\0\0\0\0\x64" + b"x" * 10
"""The beginning of a message."""

BROKEN_OFF, WITHOUT_END = answering(HALF, end=True), answering(HALF)

BAD_PEERS: dict[str, Serve] = {
    "hanging up": hanging_up,
    "silent": silent,
    "no HTTP": saying(b"SSH-2.0-OpenSSH_9.6\r\n"),
    "bad frame": saying(bytes(9)),  # data without a stream
    "broken off": BROKEN_OFF,
    "nothing said": answering(b"", status="0"),
    "compressed": answering(b"\1\0\0\0\x01x", status="0"),
    "no gRPC": replying((":status", "404"), ("content-type", "text/html")),
    "odd status": replying(
        (":status", "200"), ("content-type", "application/grpc"), ("grpc-status", "ok")
    ),
    "reset": over_http2(lambda http, stream: http.reset_stream(stream, 8)),
    "going away": over_http2(lambda http, _: http.close_connection()),
    # Events that grpclib does not know.
    "informational": replying((":status", "103"), end=False),
    "pushing": over_http2(
        lambda http, stream: http.push_stream(stream, 2, [(":method", "GET"), (":path", "/")])
    ),
    "without end": WITHOUT_END,
    "twice": answering(bytes(10), status="0"),
    "only an end": replying(
        (":status", "200"), ("content-type", "application/grpc"), ("grpc-status", "0")
    ),
    "only an error": replying(
        (":status", "200"), ("content-type", "application/grpc"), ("grpc-status", "14")
    ),
    "cancelled": answering(b"", status="1"),
    "reset after headers": then(lambda http, stream: http.reset_stream(stream, 2)),
    "going away after headers": then(lambda http, _: http.close_connection()),
    "half a frame": lambda connection: connection.sendall(bytes(7)),
    "TLS": saying(bytes.fromhex("15030300020246")),
    "HTTP/1.1": saying(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n"),
    "noise": saying(bytes(range(256)) * 300),
    "no end of words": replying(
        (":status", "200"),
        ("content-type", "application/grpc"),
        ("grpc-status", "2"),
        ("grpc-message", "x" * 60_000),
    ),
}
