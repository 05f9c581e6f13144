"""The web side's connections: uvicorn, with bounds on what a peer can take."""

import asyncio
import logging
import socket
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import anyio
import h11
import uvicorn
import uvicorn.lifespan.off  # which uvicorn loads when it begins
from anyio import CancelScope
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

log = logging.getLogger(__name__)

MAX_CONNECTIONS = 128
"""Connections that may be open: Prometheus, probes and people need a few."""

MAX_PER_PEER = 48
"""Connections of one peer address."""

ACCEPTED_AT_ONCE = 12
"""Connections in one turn of the loop: what each of them asks is read before many others come."""

EXCHANGE_SECONDS = 10.0
"""Seconds for a request and its answer, from its first byte to the last one that the peer takes."""

CANCEL = "cancel"
"""The member of a request's state that ends the work on it, when its peer has gone."""

GRACE = 1
"""Seconds that requests get to end at shutdown."""

EVERYWHERE = [
    ("cache-control", "no-store"),
    ("referrer-policy", "no-referrer"),
    ("x-content-type-options", "nosniff"),
]
"""Headers of every answer."""


class _Connection(H11Protocol):
    """uvicorn's connection, with bounds: nobody starves the kubelet's probes by staying.

    For one too many another one has to go, of the same peer or of the one that has most: one that
    was answered before one that is still to ask its first question, as a probe is, then the oldest.
    """

    since = 0.0
    """When the exchange under way began: the connection was made, or a request came, all that was
    before being answered and taken; it may take so many `seconds`."""

    _last: RequestResponseCycle | None = None

    def __init__(self, seconds: float, **parts: Any) -> None:
        super().__init__(**parts)
        self._seconds = seconds

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.since = self.loop.time()
        self._check = self.loop.call_later(self._seconds, self._end_if_stuck)
        peers = Counter(each.peer for each in self._all())
        if peers[self.peer] > MAX_PER_PEER:
            self._make_room(self.peer)
        elif peers.total() > MAX_CONNECTIONS:
            self._make_room(peers.most_common(1)[0][0])

    @property
    def peer(self) -> str:
        """The address of the other side."""
        return self.client[0] if self.client else ""

    def _all(self) -> list["_Connection"]:
        return [each for each in self.connections if isinstance(each, _Connection)]

    def _make_room(self, peer: str) -> None:
        others = [each for each in self._all() if each.peer == peer and each is not self]
        oldest = min(others, key=lambda each: (each.cycle is None, each.since))
        self.connections.discard(oldest)
        oldest.transport.abort()

    def data_received(self, data: bytes) -> None:
        # Once for each answer: bytes that come one by one are one request.
        if (
            self.cycle is not self._last
            and self.cycle.response_complete
            and not self.transport.get_write_buffer_size()
        ):
            self._last, self.since = self.cycle, self.loop.time()
        super().data_received(data)

    def handle_events(self) -> None:
        try:
            super().handle_events()
        except h11.ProtocolError:  # malformed, when its answer is under way already
            self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._check.cancel()
        # uvicorn leaves its timer after a reset, and a question that is asked for nobody: who
        # comes and goes would leave thousands of dead connections behind.
        self._unset_keepalive_if_required()
        scope: Mapping[str, Any] | None = self.scope  # uvicorn's type leaves the None out
        if scope is not None and (cancel := scope["state"].get(CANCEL)):
            cancel()

    def _end_if_stuck(self) -> None:
        """Cuts it where an exchange takes longer; idle ones uvicorn has closed before."""
        ends = self.since + self._seconds
        if ends <= self.loop.time():
            self.transport.abort()
        else:
            self._check = self.loop.call_at(ends, self._end_if_stuck)


class Server(uvicorn.Server):
    """uvicorn without signal handlers and without its ten ticks a second."""

    def __init__(self, app: Callable[..., Awaitable[None]], exchange: float) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                interface="asgi3",
                proxy_headers=False,
                headers=EVERYWHERE,
                http=partial(_Connection, exchange),  # type: ignore[arg-type]  # is called only
                backlog=ACCEPTED_AT_ONCE,
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
            for connection in tuple(self.server_state.connections):
                connection.transport.abort()
        if not self._stopping.is_set():
            raise RuntimeError("the web server ended by itself")

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listens. Only asyncio is to take few at once, the kernel may keep many."""
        await super().startup(sockets)
        for each in sockets or []:
            each.listen(1024)

    async def main_loop(self) -> None:
        """Waits for the end. uvicorn's own loop has dates and signals to look at."""
        await self.on_tick(0)
        await self._stopping.wait()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are the agent's."""
        yield
