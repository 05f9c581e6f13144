"""The session with the kubelet: serve, register, watch by polling, register again.

Knows sockets and registration, nothing of devices. There is no inotify: a living stream proves its
kubelet, so while one is open only our own socket is looked at; when it ends, `kubelet.sock` is
polled. What a kubelet does is in the device plugin API (KEP-3573) and the kubelet's device manager.
"""

import asyncio
import errno
import os
import random
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Never

import anyio
import anyio.lowlevel
from anyio import CancelScope
from grpclib.protocol import H2Protocol
from grpclib.server import Server

from vgpu_agent import unixsocket
from vgpu_agent.errors import (
    EndpointError,
    KubeletAwayError,
    KubeletError,
    StreamMissingError,
)
from vgpu_agent.kubelet._proto.v1beta1 import RegisterRequest, RegistrationStub
from vgpu_agent.kubelet.codec import WireCodec
from vgpu_agent.kubelet.grpc import Connection, ServedConnection, back_off, call
from vgpu_agent.kubelet.plugin import DevicePlugin
from vgpu_agent.model.node import Node
from vgpu_agent.model.snapshot import RegistrationResult
from vgpu_agent.pace import next_turn
from vgpu_agent.unixsocket import Identity

API_VERSION = "v1beta1"
KUBELET_SOCKET = "kubelet.sock"

RESULTS = {
    EndpointError: RegistrationResult.ENDPOINT,
    KubeletAwayError: RegistrationResult.UNREACHABLE,
    StreamMissingError: RegistrationResult.NO_STREAM,
}

RIVAL_AFTER = 3
"""So many short-lived streams in a row mean that another agent takes our place each time."""


@dataclass(frozen=True, slots=True)
class SessionTiming:
    """How long a session waits, in seconds.

    `register_timeout` is for Register: the kubelet dials back inside it and gives up on that after
    10 s. Within `stream_timeout` after Register it has to open its stream.

    `kubelet.sock` is looked at every `kubelet_poll` for as long as a kubelet that went away is
    expected back any moment, which is `eager`, then every `kubelet_poll_later`.

    A stream that ends sooner than `short_lived`, with the kubelet still there, is suspicious.

    `settle` is what a kubelet gets to see the end of a stream that we ended, before we register
    again: taken for the end of the new one, it would drop that. Within `clean_end` open streams
    have to end before their connections are cut.
    """

    register_timeout: float = 20.0
    stream_timeout: float = 10.0
    own_socket_poll: float = 2.0
    kubelet_poll: float = 0.015
    kubelet_poll_later: float = 1.0
    eager: float = 10.0
    back_off_max: float = 30.0
    rival_back_off_max: float = 60.0
    short_lived: float = 5.0
    settle: float = 0.1
    clean_end: float = 0.25


StatFunction = Callable[[Path], os.stat_result]


class _PluginServer(Server):
    """grpclib's server, which remembers its connections."""

    def __init__(self, plugin: DevicePlugin) -> None:
        super().__init__([plugin], codec=WireCodec())
        self._connections: list[Connection] = []

    def _protocol_factory(self) -> H2Protocol:
        connection = ServedConnection.like(super()._protocol_factory())
        # Forget the ended ones here: a session may see many connections.
        self._connections = [each for each in self._connections if not each.ended]
        self._connections.append(connection)
        return connection

    def abort_connections(self) -> None:
        """Cuts every connection, also one whose peer reads nothing."""
        for connection in self._connections:
            connection.abort()


@dataclass
class KubeletSession:
    """Keeps this node's vGPUs registered with whatever kubelet is there.

    `make_plugin` gives the service for one registration. `stat_file` reads the identity of a
    socket; a test can make it read what a file system cannot be made to do.
    """

    directory: Path
    endpoint: str
    resource_name: str
    node: Node
    make_plugin: Callable[[], DevicePlugin]
    stat_file: StatFunction = os.stat
    clock: Callable[[], float] = time.monotonic
    timing: SessionTiming = SessionTiming()
    _short_lived: int = 0
    _failures: int = 0
    _random: random.Random = field(default_factory=random.Random)

    @property
    def socket_path(self) -> Path:
        """Our own socket."""
        return self.directory / self.endpoint

    @property
    def kubelet_path(self) -> Path:
        """The kubelet's socket."""
        return self.directory / KUBELET_SOCKET

    async def run(self) -> Never:
        """Runs until cancelled, which leaves no socket and no connection behind."""
        last: Identity | None = None
        while True:
            await self._kubelet_there()
            kubelet = self._identity(self.kubelet_path)
            if kubelet != last:
                # Another kubelet: what the last one did says nothing of this one.
                self._failures = self._short_lived = 0
                last = kubelet
            if await self._waited(self._delay(), kubelet):
                await self._once()

    # Waiting

    async def _kubelet_there(self) -> None:
        """Returns when something listens on the kubelet's socket."""
        away_since = self.clock()
        tried: Identity | None = None
        refused = ""
        tried_at = -self.timing.kubelet_poll_later
        while True:
            identity = self._identity(self.kubelet_path)
            # A socket that refused stays stale; a new one is tried at once.
            if identity is not None and (
                identity != tried or self.clock() - tried_at >= self.timing.kubelet_poll_later
            ):
                why = unixsocket.refusal(self.kubelet_path)
                if why is None:
                    return
                nobody = why == os.strerror(errno.ECONNREFUSED)
                refused = "nobody listens on it" if nobody else why
                tried, tried_at = identity, self.clock()
            problem = "there is no such socket" if identity is None else refused
            self.node.registration_ended(f"no kubelet at {self.kubelet_path}: {problem}", away=True)
            await next_turn(self._poll_interval(away_since))

    def _poll_interval(self, since: float) -> float:
        eager = self.clock() - since < self.timing.eager
        return self.timing.kubelet_poll if eager else self.timing.kubelet_poll_later

    async def _waited(self, seconds: float, kubelet: Identity | None) -> bool:
        """Waits so long; False, and sooner, where another kubelet is there, or none."""
        started = self.clock()
        while (left := started + seconds - self.clock()) > 0:
            if self._identity(self.kubelet_path) != kubelet:
                return False
            await next_turn(min(left, self._poll_interval(started)))
        return True

    def _delay(self) -> float:
        """Seconds until the next attempt: none at first, more with every failure in a row."""
        if self._failures:
            seconds = back_off(0.2, self._failures, self.timing.back_off_max)
        elif self._short_lived >= RIVAL_AFTER:
            longest = self.timing.rival_back_off_max
            seconds = back_off(1.0, self._short_lived - RIVAL_AFTER + 1, longest)
            others = unixsocket.listeners(self.directory, KUBELET_SOCKET, self.endpoint)
            rival = f"at {' or '.join(others)}" if others else "at a socket that is not known"
            self.node.registration_ended(
                "the kubelet ends the stream soon after each registration: another agent seems to"
                f" serve {self.resource_name} on this node, {rival}, and each takes the other's"
                f" place. Waiting up to {longest:.0f} s between attempts",
                rival=rival,
            )
        else:
            return 0.0
        return seconds * self._random.uniform(0.75, 1.0)

    # One registration

    async def _once(self) -> None:
        """Serves and registers once; returns when that has ended, whatever ended it."""
        async with anyio.create_task_group() as tasks:
            plugin = self.make_plugin()
            await tasks.start(plugin.run)
            try:
                async with self._serving(plugin) as own:
                    await self._register(plugin)
                    self._failures = 0
                    opened = self.clock()
                    ended = await self._watch(plugin, own)
                    lived = self.clock() - opened
                    ended_by_kubelet = plugin.streams.value.ended > 0
                if not ended_by_kubelet:
                    await anyio.sleep(self.timing.settle)
                self._short_lived = self._short_lived + 1 if lived < self.timing.short_lived else 0
                self.node.registration_ended(ended)
            except KubeletError as error:
                self._failures += 1
                # A kubelet that goes away just now is reported when it is seen to be away.
                passing = self._failures == 1 and isinstance(error, KubeletAwayError)
                result = RESULTS.get(type(error), RegistrationResult.REFUSED)
                rival = error.rival if isinstance(error, EndpointError) else None
                self.node.registration_tried(result, None if passing else str(error), rival=rival)
            tasks.cancel_scope.cancel()

    @asynccontextmanager
    async def _serving(self, plugin: DevicePlugin) -> AsyncIterator[Identity]:
        """Our socket, bound and served. Raises EndpointError."""
        listener, server, own = self._bound(), _PluginServer(plugin), None
        try:
            own = Identity.of(self.stat_file(self.socket_path))
            await server.start(sock=listener)
        except BaseException as error:
            listener.close()
            self._remove(own)
            if isinstance(error, OSError):
                raise EndpointError(f"cannot serve {self.socket_path}: {error}") from error
            raise
        try:
            yield own
        finally:
            with CancelScope(shield=True):
                await self._stop_serving(server, listener, plugin, own)

    async def _stop_serving(
        self, server: _PluginServer, listener: socket.socket, plugin: DevicePlugin, own: Identity
    ) -> None:
        """Ends the streams, then the connections, then the socket: in that order on purpose.

        A late end of an old stream would make the kubelet drop a new registration, and a server
        of Python 3.12 and newer waits for as long as a connection is open.
        """
        # asyncio leaks what it has accepted but not made a connection of when the server closes:
        # two turns of the loop make it one, which is then cut with the others.
        asyncio.get_running_loop().remove_reader(listener)
        for _ in range(2):
            await anyio.lowlevel.checkpoint()
        plugin.end_streams()
        with anyio.move_on_after(self.timing.clean_end):
            await plugin.streams.until(lambda streams: not streams.open)
        await anyio.lowlevel.checkpoint()  # what was written last goes out
        server.close()
        server.abort_connections()
        with anyio.move_on_after(1):
            await server.wait_closed()
        self._remove(own)

    def _remove(self, own: Identity | None) -> None:
        """Removes our socket, and nobody else's. A read-only directory keeps it, as a stale one."""
        if own is not None and self._identity(self.socket_path) == own:
            with suppress(OSError):
                self.socket_path.unlink()

    def _bound(self) -> socket.socket:
        """Our socket, bound where a stale one or none was. Raises EndpointError."""
        path = self.socket_path
        try:
            obstacle = unixsocket.obstacle(path)
            if obstacle is None:
                return unixsocket.bind(path)
        except OSError as error:
            raise EndpointError(f"cannot bind {path}: {error.strerror or error}") from error
        if unixsocket.refusal(path) is not None:
            raise EndpointError(obstacle)
        rival = f"at {unixsocket.listener(path)}"
        raise EndpointError(f"{obstacle}: another agent for {self.resource_name}, {rival}", rival)

    async def _register(self, plugin: DevicePlugin) -> None:
        """Registers and waits for the kubelet's stream. Raises KubeletError."""
        request = RegisterRequest(
            version=API_VERSION,
            endpoint=self.endpoint,
            resource_name=self.resource_name,
            options=plugin.options,
        )
        await call(
            self.kubelet_path,
            "Register",
            lambda channel: RegistrationStub(channel).register(request),
            within=self.timing.register_timeout,
        )
        with anyio.move_on_after(self.timing.stream_timeout) as waited:
            await plugin.streams.until(lambda streams: streams.opened)
        if waited.cancelled_caught:
            raise StreamMissingError(
                f"the kubelet did not open its stream within {self.timing.stream_timeout:.0f} s"
            )
        self.node.registration_tried(RegistrationResult.REGISTERED)

    async def _watch(self, plugin: DevicePlugin, own: Identity) -> str:
        """Returns what ended the registration, in words."""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._own_socket_gone, own, tasks.cancel_scope)
            await plugin.streams.until(lambda streams: streams.ended)
            tasks.cancel_scope.cancel()
        if self._identity(self.socket_path) != own:
            return f"our socket {self.socket_path} was removed or replaced"
        return "the kubelet ended the stream"

    async def _own_socket_gone(self, own: Identity, watching: CancelScope) -> None:
        """Polls our own socket, and ends the watching when it is another or none."""
        while self._identity(self.socket_path) == own:
            await next_turn(self.timing.own_socket_poll)
        watching.cancel()

    def _identity(self, path: Path) -> Identity | None:
        """Which socket the path is now; None where there is none."""
        try:
            return Identity.of(self.stat_file(path))
        except OSError:
            return None
