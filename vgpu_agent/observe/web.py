"""The HTTP side: the page, /metrics, /healthz, /readyz and /status.json, on the agent's own loop.

uvicorn speaks HTTP; the application here answers from the newest snapshot and renders metrics in a
worker thread, so that a scrape does not delay the kubelet.
"""

import asyncio
import base64
import hashlib
import re
import socket
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from typing import Any

import anyio
import anyio.to_thread
import uvicorn
from anyio import CancelScope, CapacityLimiter
from anyio.abc import TaskStatus
from uvicorn.protocols.http.h11_impl import H11Protocol

from vgpu_agent.address import Address
from vgpu_agent.errors import ListenError
from vgpu_agent.model.node import Node
from vgpu_agent.model.snapshot import Snapshot
from vgpu_agent.observe.metrics import Metrics

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

MAX_CONNECTIONS = 64
"""Connections that may be open: Prometheus, probes and people need a few."""

GRACE = 1
"""Seconds that requests get to end at shutdown."""

PLAIN = "text/plain; charset=utf-8"

EVERYWHERE = [
    ("cache-control", "no-store"),
    ("referrer-policy", "no-referrer"),
    ("x-content-type-options", "nosniff"),
]
"""Headers of every answer."""


def listen(address: Address) -> socket.socket:
    """A listening socket. Raises ListenError with the address and the reason."""
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    try:
        listener = socket.create_server(
            address, family=family, dualstack_ipv6=address.host == "::", backlog=64
        )
        # asyncio does not see that it is TCP; an answer would wait for an acknowledgement.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except OSError as error:
        # create_server puts the address into its message; ours has it already.
        reason = (error.strerror or str(error)).partition(" (while")[0]
        raise ListenError(
            f"VGPU_METRICS_ADDRESS={address}: cannot listen there: {reason};"
            " set another host:port, or end what uses this one"
        ) from error
    return listener


@dataclass(frozen=True, slots=True)
class Answer:
    """An HTTP response."""

    status: int
    body: bytes
    content_type: str = PLAIN
    headers: Mapping[str, str] | None = None


Page = Callable[[Mapping[str, Any]], Awaitable[Answer]]
"""Answers a request, whose ASGI scope it is given."""


def load_page() -> Answer:
    """The page for people. It runs its own style and script and nothing else, and asks only us."""
    body = (resources.files(__package__) / "page.html").read_bytes()
    policy = (
        "default-src 'none'; connect-src 'self'; img-src data:;"
        f" style-src {_hashes(body, b'style')}; script-src {_hashes(body, b'script')};"
        " base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    headers = {"content-security-policy": policy, "x-frame-options": "DENY"}
    return Answer(200, body, "text/html; charset=utf-8", headers)


def _hashes(html: bytes, tag: bytes) -> str:
    """The sources of a content security policy for what stands between these tags."""
    inline = re.findall(rb"<%b>(.*?)</%b>" % (tag, tag), html, re.DOTALL)
    digests = (base64.b64encode(hashlib.sha256(each).digest()).decode() for each in inline)
    return " ".join(f"'sha256-{digest}'" for digest in digests)


def _always(answer: Answer) -> Page:
    async def page(scope: Mapping[str, Any]) -> Answer:  # noqa: ARG001
        return answer

    return page


class Web:
    """Serves one node's state. Owns the sign of life and the listening socket.

    `report` makes /status.json, in a worker thread. Without `page` there is none at /. The loop
    gives a sign of life every `beat` seconds, and /healthz says no where there was none for `alive`
    seconds.
    """

    def __init__(
        self,
        *,
        listener: socket.socket,
        node: Node,
        metrics: Metrics,
        report: Callable[[Snapshot], bytes],
        page: bool = True,
        clock: Callable[[], float] = time.monotonic,
        beat: float = 1.0,
        alive: float = 10.0,
    ) -> None:
        self._listener = listener
        self._node = node
        self._metrics = metrics
        self._report = report
        self._clock = clock
        self._beat, self._alive = beat, alive
        self._last_beat = clock()
        self._rendering = CapacityLimiter(1)
        self._pages: dict[str, Page] = {"/": _always(load_page())} if page else {}
        self._pages |= {
            "/metrics": self._metrics_page,
            "/healthz": self._healthz,
            "/readyz": self._readyz,
            "/status.json": self._status_json,
        }

    @property
    def address(self) -> Address:
        """Where it listens, with the port that was found for port 0."""
        host, port = self._listener.getsockname()[:2]
        return Address(host, port)

    async def run(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Serves until cancelled, then lets requests end for a moment."""
        server = _Server(self._answer_request)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._keep_beating)
            tasks.start_soon(server.serve_shielded, self._listener)
            task_status.started()
            try:
                await anyio.sleep_forever()
            finally:
                server.stop()

    async def _keep_beating(self) -> None:
        while True:
            self._last_beat = self._clock()
            await anyio.sleep(self._beat)

    # Answers

    async def _answer_request(
        self,
        scope: Mapping[str, Any],
        receive: Receive,  # noqa: ARG002 - a request's body is nothing to us
        send: Send,
    ) -> None:
        """The ASGI application."""
        if scope["type"] != "http":
            return
        method, path = scope["method"], scope["path"]
        page = self._pages.get(path)
        if page is None:
            why = "no page here: VGPU_STATUS_PAGE=off" if path == "/" else "no such path"
            answer = Answer(404, f"{why}; there are {', '.join(self._pages)}\n".encode())
        elif method not in ("GET", "HEAD"):
            answer = Answer(405, b"only GET and HEAD\n", headers={"allow": "GET, HEAD"})
        else:
            answer = await page(scope)
        headers = {
            "content-type": answer.content_type,
            "content-length": str(len(answer.body)),
            **(answer.headers or {}),
        }
        await send(
            {
                "type": "http.response.start",
                "status": answer.status,
                "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
            }
        )
        # uvicorn sends none for HEAD.
        await send({"type": "http.response.body", "body": answer.body})

    async def _metrics_page(self, scope: Mapping[str, Any]) -> Answer:
        accept = b",".join(value for name, value in scope["headers"] if name == b"accept")
        body, content_type = await anyio.to_thread.run_sync(
            self._metrics.render,
            self._node.snapshot,
            accept.decode("latin-1"),
            limiter=self._rendering,
        )
        return Answer(200, body, content_type)

    async def _status_json(self, scope: Mapping[str, Any]) -> Answer:  # noqa: ARG002
        body = await anyio.to_thread.run_sync(
            self._report, self._node.snapshot, limiter=self._rendering
        )
        return Answer(200, body, "application/json")

    async def _healthz(self, scope: Mapping[str, Any]) -> Answer:  # noqa: ARG002
        """Whether the loop lives. That this is answered proves half of it, the beat the rest."""
        age = self._clock() - self._last_beat
        if age > self._alive:
            return Answer(503, f"no sign of life for {age:.0f} s\n".encode())
        return Answer(200, b"ok\n")

    async def _readyz(self, scope: Mapping[str, Any]) -> Answer:  # noqa: ARG002
        """Whether the kubelet is registered with and follows the list, also without any GPU."""
        kubelet = self._node.snapshot.kubelet
        if kubelet.connected:
            return Answer(200, b"ready\n")
        return Answer(503, f"not registered: {kubelet.error or 'starting'}\n".encode())


class _Connection(H11Protocol):
    """uvicorn's connection; for one too many the oldest that waits for a request has to go.

    Nobody can starve the kubelet's probes, or the agent of descriptors, by connecting and waiting.
    """

    opened = 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.opened = self.loop.time()
        there = [
            each
            for each in self.connections
            if isinstance(each, _Connection) and not each.transport.is_closing()
        ]
        waiting = [each for each in there if each.cycle is None or each.cycle.response_complete]
        if len(there) > MAX_CONNECTIONS and waiting:
            min(waiting, key=lambda each: each.opened).transport.abort()


class _Server(uvicorn.Server):
    """uvicorn without signal handlers and without its ten ticks a second."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                interface="asgi3",
                proxy_headers=False,
                headers=EVERYWHERE,
                http=_Connection,
                backlog=MAX_CONNECTIONS,
                ws="none",
                loop="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                date_header=False,
                timeout_graceful_shutdown=GRACE,
            )
        )
        self._stopping = anyio.Event()

    def stop(self) -> None:
        """Ends `serve_shielded`."""
        self.should_exit = True
        self._stopping.set()

    async def serve_shielded(self, listener: socket.socket) -> None:
        """Serves until `stop`, whatever is cancelled around it.

        Raises RuntimeError where it ends before that: nothing else would notice.
        """
        with CancelScope(shield=True), listener:
            await self.serve(sockets=[listener])
        if not self._stopping.is_set():
            raise RuntimeError("the web server ended by itself")

    async def main_loop(self) -> None:
        """Waits. uvicorn's own loop wakes up for a date header and signals that are not used."""
        await self.on_tick(0)
        await self._stopping.wait()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are the agent's."""
        yield
