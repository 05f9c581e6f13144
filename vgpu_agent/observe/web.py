"""The HTTP side: the page, /metrics, /healthz, /readyz and /status.json, on the agent's own loop.

uvicorn speaks HTTP; the application here answers from the newest snapshot and renders metrics in a
worker thread, so that a scrape does not delay the kubelet.
"""

import base64
import hashlib
import ipaddress
import logging
import re
import socket
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from contextlib import suppress
from dataclasses import dataclass
from importlib import resources
from typing import Any

import anyio
import anyio.to_thread
import h11
from anyio import CancelScope
from anyio.abc import TaskStatus

from vgpu_agent.errors import is_shortage
from vgpu_agent.model.node import Node
from vgpu_agent.model.snapshot import Snapshot
from vgpu_agent.observe.logs import Repeats
from vgpu_agent.observe.metrics import Metrics, prefers_openmetrics
from vgpu_agent.observe.server import CANCEL, EXCHANGE_SECONDS, Server

log = logging.getLogger(__name__)

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

RENDERING = 0.25
"""Share of the time for which metrics and reports are rendered at most."""

BURST = 1.0
"""Seconds of rest that may be owed: a few who ask at once do not wait for it."""

PLAIN = "text/plain; charset=utf-8"


@dataclass(frozen=True, slots=True)
class Answer:
    """An HTTP response."""

    status: int
    body: bytes
    content_type: str = PLAIN
    headers: Mapping[str, str] | None = None


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


FOREIGN_HOST = (
    b"not served under this name: ask for an IP address or localhost, or add the name to"
    b" VGPU_STATUS_HOSTS\n"
)


def _header(scope: Mapping[str, Any], wanted: bytes) -> str:
    values = (value for name, value in scope["headers"] if name == wanted)
    return b",".join(values).decode("latin-1")


def _is_served(host: str, names: frozenset[str]) -> bool:
    """Whether a Host header names an IP address or one of the names; browsers always send one."""
    match = re.fullmatch(r"(?:\[([0-9a-f:.]+)\]|([^:\[\]]*?)\.?)(?::[0-9]*)?", host.strip().lower())
    if match is None:
        return False
    name = match[1] or match[2]
    try:
        return not host or bool(ipaddress.ip_address(name))
    except ValueError:
        return name in names


class Web:
    """Serves one node's state. Owns the listening socket.

    `report` makes /status.json, in a worker thread. Without `page` there is none at /. Both are
    for requests to an IP address, localhost or one of `hosts` only: the page of another site, whose
    name leads here (DNS rebinding), is not to read names of pods with its visitor's browser.
    """

    def __init__(
        self,
        *,
        listener: socket.socket,
        node: Node,
        metrics: Metrics,
        report: Callable[[Snapshot], bytes],
        page: bool = True,
        hosts: frozenset[str] = frozenset(),
        exchange: float = EXCHANGE_SECONDS,
    ) -> None:
        self._listener = listener
        self._node = node
        self._metrics = metrics
        self._report = report
        self._hosts = hosts | {"localhost"}
        self._repeats = Repeats(log)
        self._exchange = exchange
        self._rendering = anyio.Lock()
        self._rendered: dict[str, tuple[float, Answer]] = {}
        self._rest_until = 0.0
        self._page = load_page() if page else None
        self._paths = ["/metrics", "/healthz", "/readyz", "/status.json"]
        if page:
            self._paths.insert(0, "/")

    async def run(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Serves until cancelled, then lets requests end for a moment."""
        server = Server(self._answer_request, self._exchange)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(server.serve_shielded, self._listener)
            task_status.started()
            try:
                await anyio.sleep_forever()
            finally:
                server.stop()

    # Answers

    async def _answer_request(
        self,
        scope: Mapping[str, Any],
        receive: Receive,  # noqa: ARG002 - a request's body is nothing to us
        send: Send,
    ) -> None:
        """The ASGI application. Raises nothing: uvicorn would log a trace of each."""
        if scope["type"] != "http":
            return
        with CancelScope() as work:
            scope["state"][CANCEL] = work.cancel
            await self._respond(scope, send)
        del scope["state"][CANCEL]

    async def _respond(self, scope: Mapping[str, Any], send: Send) -> None:
        try:
            answer = await self._answer(scope)
        except Exception as error:  # noqa: BLE001 - whatever it is, the next one is answered
            words = f"a page fails: {error if is_shortage(error) else type(error).__name__}"
            trace = None if is_shortage(error) else error
            self._repeats.log(logging.ERROR, words, {"path": scope["path"]}, trace=trace)
            answer = Answer(500, b"this page fails; see the log of the agent\n")
        headers = {
            "content-type": answer.content_type,
            "content-length": str(len(answer.body)),
            **(answer.headers or {}),
        }
        start: Message = {
            "type": "http.response.start",
            "status": answer.status,
            "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
        }
        with suppress(h11.LocalProtocolError):  # the rest of the request was malformed meanwhile
            await send(start)
            # uvicorn sends none for HEAD.
            await send({"type": "http.response.body", "body": answer.body})

    async def _answer(self, scope: Mapping[str, Any]) -> Answer:
        method, path = scope["method"], scope["path"]
        if path not in self._paths:
            why = "no page here: VGPU_STATUS_PAGE=off" if path == "/" else "no such path"
            return Answer(404, f"{why}; there are {', '.join(self._paths)}\n".encode())
        if method not in ("GET", "HEAD"):
            return Answer(405, b"only GET and HEAD\n", headers={"allow": "GET, HEAD"})
        if path in ("/", "/status.json") and not _is_served(_header(scope, b"host"), self._hosts):
            return Answer(403, FOREIGN_HOST)
        match path:
            case "/metrics":
                preferred = prefers_openmetrics(_header(scope, b"accept"))
                return await self._render(
                    "metrics, OpenMetrics" if preferred else "metrics",
                    lambda now: Answer(200, *self._metrics.render(now, in_openmetrics=preferred)),
                )
            case "/status.json":
                return await self._render(
                    "report", lambda now: Answer(200, self._report(now), "application/json")
                )
            case "/healthz":
                return Answer(200, b"ok\n")  # that it is answered says that the loop lives
            case "/readyz":
                return self._readyz()
        return self._page or Answer(404, b"")

    async def _render(self, name: str, render: Callable[[Snapshot], Answer]) -> Answer:
        """Renders in a worker thread, one after the other.

        What was begun after this was asked is as good: a crowd costs no more than two. And all of
        it is RENDERING of a core at most, or those who never stop asking would slow the rest down.
        """
        asked = time.monotonic()
        async with self._rendering:
            begun, answer = self._rendered.get(name, (asked, None))
            if answer is None or begun <= asked:
                await anyio.sleep(max(0, self._rest_until - time.monotonic() - BURST))
                begun = time.monotonic()
                answer = await anyio.to_thread.run_sync(render, self._node.snapshot)
                self._rendered[name] = begun, answer
                took = time.monotonic() - begun
                self._rest_until = max(begun, self._rest_until) + took / RENDERING
            return answer

    def _readyz(self) -> Answer:
        """Whether the kubelet is registered with and follows the list, also without any GPU."""
        kubelet = self._node.snapshot.kubelet
        if kubelet.connected:
            return Answer(200, b"ready\n")
        return Answer(503, f"not registered: {kubelet.error or 'starting'}\n".encode())
