"""A kubelet made with grpcio, so that the agent is tested against another implementation.

`KubeletPeer` behaves towards a device plugin as a real kubelet was seen to, also in what is
unpleasant. It runs in threads and its methods block: from a test that shares its event loop with
the plugin, call them with `await off_loop(peer.wait_list, 1)`.
"""

import math
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Self

import anyio.to_thread
import grpc
import h2.config
import h2.connection
import h2.events
import h2.exceptions
import h2.settings
from google.protobuf.message import DecodeError

from tests.wire import dp, dp_grpc

DIAL_TIMEOUT = 10.0
"""Seconds that it tries to connect to the plugin inside Register."""

LIST_AND_WATCH = "/v1beta1.DevicePlugin/ListAndWatch"
CHANNEL_OPTIONS = [
    ("grpc.default_authority", "localhost"),
    # Channels to the same path would share one connection; a kubelet dials anew each time.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 100),
]


async def off_loop(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return await anyio.to_thread.run_sync(partial(function, *args, **kwargs))


class Device(NamedTuple):
    id: str
    health: str
    numa: int | None


@dataclass(frozen=True)
class Registration:
    """One call of Register: accepted unless `error` is set."""

    time: float
    request: Any
    options: Any = None
    error: str | None = None

    def __str__(self) -> str:
        return f"Register {self.request.endpoint}: {self.error or 'accepted'}"


@dataclass(frozen=True)
class Listing:
    """One message of a ListAndWatch stream; `stream` counts the streams from 1."""

    time: float
    stream: int
    devices: list[Device]
    raw: bytes

    def __str__(self) -> str:
        healths = Counter(device.health for device in self.devices)
        return f"list on stream {self.stream}: {dict(healths)}"


@dataclass(frozen=True)
class StreamEnd:
    time: float
    stream: int
    code: grpc.StatusCode
    details: str

    def __str__(self) -> str:
        return f"stream {self.stream} ended: {self.code.name} {self.details}"


@dataclass(eq=False)
class _Endpoint:
    """A registered plugin: one connection and, on it, one stream."""

    resource: str
    path: Path
    channel: grpc.Channel
    stream: int = 0
    call: Any = None
    stalled: "StalledPeer | None" = None
    watcher: threading.Thread | None = None
    closed: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)

    def close(self) -> None:
        with self.lock:
            self.closed = True
            if self.call is not None:
                self.call.cancel()
            if self.stalled is not None:
                self.stalled.hang_up()
        self.channel.close()


class _RefusedError(Exception):
    """Register is answered with UNKNOWN and this text."""


@dataclass(eq=False)
class KubeletPeer:
    """A kubelet in `kubelet_dir`, which must be short: socket paths end at 107 bytes.

    The options may be changed while it runs; each registration looks anew.

    `refuse_register`  a text: Register fails with UNKNOWN and this text
    `slow_options`     seconds that it waits inside Register before it dials the plugin
    `never_watch`      Register succeeds, but ListAndWatch is never opened
    `stall`            ListAndWatch is opened by a `StalledPeer`; there are no other calls then
    `hold_connection`  after the end of a stream its connection stays open until `stop`
    """

    kubelet_dir: Path | str
    refuse_register: str | None = None
    slow_options: float = 0.0
    never_watch: bool = False
    stall: bool = False
    hold_connection: bool = False

    def __post_init__(self) -> None:
        self.kubelet_dir = Path(self.kubelet_dir)
        self.directory = self.kubelet_dir / "device-plugins"
        self.socket = self.directory / "kubelet.sock"
        self.registrations: list[Registration] = []
        self.lists: list[Listing] = []
        self.stream_ends: list[StreamEnd] = []
        self.errors: list[str] = []
        self.streams = 0
        # Calls of Register that are not answered yet.
        self.registering = 0

        # Guards everything above and below, and wakes the waits.
        self._changed = threading.Condition()
        self._stopping = threading.Event()
        self._server: grpc.Server | None = None
        self._pool: ThreadPoolExecutor | None = None
        self._started = time.monotonic()
        self._endpoints: list[_Endpoint] = []
        # By resource name: whom the end of a stream takes away, whoever's stream it was.
        self._clients: dict[str, _Endpoint] = {}
        self._serving: _Endpoint | None = None
        self._devices: list[Device] = []
        # Lists before this one came on a stream that has ended.
        self._void = 0

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    # Its life

    def start(self) -> None:
        """Starts as a kubelet does: plugins' sockets go first, then its own is made anew."""
        self._stopping.clear()
        self.directory.mkdir(parents=True, exist_ok=True)
        own_last = sorted(self.directory.iterdir(), key=lambda path: path == self.socket)
        for path in own_last:
            if path.is_socket():
                path.unlink(missing_ok=True)
        # grpc-core removes a socket by its name when a server is destroyed, at some later time.
        # Bound aside and renamed, the name that it removes is never kubelet.sock.
        aside = self.kubelet_dir / f"{time.monotonic_ns() % 10**10}.sock"
        self._pool = ThreadPoolExecutor(8, "kubelet-register")
        self._server = grpc.server(self._pool)
        dp_grpc.add_RegistrationServicer_to_server(self, self._server)
        self._server.add_insecure_port(f"unix:{aside}")
        self._server.start()
        aside.rename(self.socket)

    def stop(self, clean: bool = True) -> None:
        """Ends it and all its connections; kubelet.sock stays behind, stale, unless `clean`."""
        if self._server is None or self._pool is None:
            return
        self._stopping.set()
        # Before the streams end, or a quick plugin would register with it again.
        ended = self._server.stop(None)
        self._close_all()
        ended.wait()
        self._pool.shutdown()
        # Once more, for what a registration under way has left.
        self._close_all()
        for endpoint in self._endpoints:
            if endpoint.watcher is not None:
                endpoint.watcher.join()
        self._endpoints.clear()
        with self._changed:
            self._clients.clear()
            self._serving = None
            self._devices = []
            self._void = len(self.lists)
        self._server = self._pool = None
        if clean:
            self.socket.unlink(missing_ok=True)

    def restart(self, pause: float = 0.0) -> None:
        """What systemctl restart does: the old socket is stale until the new kubelet starts."""
        self.stop(clean=False)
        time.sleep(pause)
        self.start()

    def _close_all(self) -> None:
        with self._changed:
            endpoints = list(self._endpoints)
        for endpoint in endpoints:
            endpoint.close()

    # What it believes

    @property
    def devices(self) -> list[Device]:
        """The devices as it counts them now, of the resource that registered last."""
        with self._changed:
            return list(self._devices)

    @property
    def allocatable(self) -> list[str]:
        return [device.id for device in self.devices if device.health == "Healthy"]

    def seen(self) -> str:
        """Everything so far, for the message of a failed wait."""
        with self._changed:
            everything = sorted(
                [*self.registrations, *self.lists, *self.stream_ends], key=lambda one: one.time
            )
            told = [f"  {one.time - self._started:.3f} s {one}" for one in everything]
            return "\n".join(["seen so far:", *told, *self.errors])

    # Waits

    def wait(self, condition: Callable[[], Any], what: str, timeout: float = 10.0) -> Any:
        """The first true value of `condition`, looked at whenever something happens."""
        with self._changed:
            result = self._changed.wait_for(condition, timeout)
            if not result:
                raise AssertionError(f"no {what} within {timeout} s; {self.seen()}")
            return result

    def _nth(self, records: list[Any], n: int, what: str, timeout: float) -> Any:
        self.wait(lambda: len(records) >= n, f"{what} {n}", timeout)
        return records[n - 1]

    def wait_registrations(self, n: int, timeout: float = 10.0) -> Registration:
        """The n-th call of Register, accepted or not, counted from 1."""
        return self._nth(self.registrations, n, "registration", timeout)

    def wait_registering(self, timeout: float = 10.0) -> None:
        """Until a call of Register is under way."""
        self.wait(lambda: self.registering, "Register under way", timeout)

    def wait_list(
        self, wanted: int | Callable[[list[Device]], Any], timeout: float = 10.0
    ) -> Listing:
        """The n-th list, counted from 1; or the latest or a later one that `wanted` holds for.

        What came on a stream that has ended is no longer the latest.
        """
        if isinstance(wanted, int):
            return self._nth(self.lists, wanted, "list", timeout)
        with self._changed:
            first = max(len(self.lists) - 1, self._void)

        def found() -> Listing | None:
            return next((one for one in self.lists[first:] if wanted(one.devices)), None)

        return self.wait(found, "list as wanted", timeout)

    def wait_stream_ends(self, n: int, timeout: float = 10.0) -> StreamEnd:
        return self._nth(self.stream_ends, n, "end of stream", timeout)

    def wait_stalled(self, timeout: float = 10.0) -> None:
        """With `stall`: until the plugin has begun its answer and cannot send the list."""
        self.wait(
            lambda: self._serving and self._serving.stalled, "stalled stream", timeout
        ).wait_blocked(timeout)

    # Calls to the plugin

    def options(self, timeout: float = 10.0) -> Any:
        return self._plugin().GetDevicePluginOptions(dp.Empty(), timeout=timeout)

    def preferred(
        self, available: list[str], must: list[str], size: int, timeout: float = 10.0
    ) -> list[str]:
        one = dp.ContainerPreferredAllocationRequest(
            available_deviceIDs=available, must_include_deviceIDs=must, allocation_size=size
        )
        request = dp.PreferredAllocationRequest(container_requests=[one])
        answer = self._plugin().GetPreferredAllocation(request, timeout=timeout)
        return list(answer.container_responses[0].deviceIDs)

    def allocate(self, ids: list[str], timeout: float = 10.0) -> Any:
        """The answer for one container, which is all that a kubelet asks for and reads."""
        one = dp.ContainerAllocateRequest(devices_ids=ids)
        return self._plugin().Allocate(
            dp.AllocateRequest(container_requests=[one]), timeout=timeout
        )

    def pre_start(self, ids: list[str], timeout: float = 30.0) -> Any:
        request = dp.PreStartContainerRequest(devices_ids=ids)
        return self._plugin().PreStartContainer(request, timeout=timeout)

    def drop_stream(self) -> None:
        """Ends the latest stream and its connection, as a kubelet in trouble does."""
        with self._changed:
            endpoint = self._serving
        if endpoint is None or endpoint.watcher is None:
            raise AssertionError(f"there is no stream; {self.seen()}")
        endpoint.close()
        endpoint.watcher.join()

    def _plugin(self) -> Any:
        with self._changed:
            if self._serving is None:
                raise AssertionError(f"no plugin is registered; {self.seen()}")
            return dp_grpc.DevicePluginStub(self._serving.channel)

    # The Registration service

    def Register(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        at = time.monotonic()
        with self._changed:
            self.registering += 1
            self._changed.notify_all()
        try:
            endpoint, options = self._accept(request, context)
        except _RefusedError as refusal:
            self._record(self.registrations, Registration(at, request, error=str(refusal)))
            context.abort(grpc.StatusCode.UNKNOWN, str(refusal))
        finally:
            with self._changed:
                self.registering -= 1
        self._record(self.registrations, Registration(at, request, options))
        # The stream is opened when the answer is out.
        if not self.never_watch and not context.add_callback(partial(self._open, endpoint)):
            self._open(endpoint)
        return dp.Empty()

    def _accept(self, request: Any, context: grpc.ServicerContext) -> tuple[_Endpoint, Any]:
        if self.refuse_register is not None:
            raise _RefusedError(self.refuse_register)
        if request.version != "v1beta1":
            raise _RefusedError(f"version {request.version!r} is not v1beta1")
        if "/" not in request.resource_name or "kubernetes.io/" in request.resource_name:
            raise _RefusedError(f"{request.resource_name!r} is not an extended resource")
        # None or a huge number where the plugin has set no deadline.
        until = time.monotonic() + min(context.time_remaining() or math.inf, 3600.0)
        self._stopping.wait(self.slow_options)
        path = self.directory / request.endpoint
        channel = grpc.insecure_channel(f"unix:{path}", CHANNEL_OPTIONS)
        endpoint = _Endpoint(request.resource_name, path, channel)
        with self._changed:
            self._endpoints.append(endpoint)
            self._clients[endpoint.resource] = endpoint
        try:
            options = self._dial(channel, until)
        except _RefusedError:
            # From here on it has no client of that name, and ignores the end of an older stream.
            with self._changed:
                self._clients.pop(endpoint.resource, None)
            channel.close()
            raise
        with self._changed:
            self._serving = endpoint
        return endpoint, options

    def _dial(self, channel: grpc.Channel, until: float) -> Any:
        plugin = dp_grpc.DevicePluginStub(channel)
        connect_until = time.monotonic() + DIAL_TIMEOUT
        while not self._stopping.is_set():
            try:
                left = max(until - time.monotonic(), 0.001)
                return plugin.GetDevicePluginOptions(dp.Empty(), timeout=left)
            except grpc.RpcError as error:
                absent = "failed to connect" in (error.details() or "").lower()
                if not absent or time.monotonic() > connect_until:
                    told = f"{error.code().name} {error.details()}"
                    raise _RefusedError(f"the plugin gave no options: {told}") from error
            except ValueError as error:  # the channel was closed by stop
                raise _RefusedError("the kubelet is stopping") from error
            self._stopping.wait(0.05)
        raise _RefusedError("the kubelet is stopping")

    # ListAndWatch

    def _open(self, endpoint: _Endpoint) -> None:
        with self._changed, endpoint.lock:
            if endpoint.closed or self._stopping.is_set():
                return
            self.streams += 1
            self._changed.notify_all()
            endpoint.stream = self.streams
            watch = self._watch_stalled if self.stall else self._watch
            endpoint.watcher = threading.Thread(
                target=watch, args=(endpoint,), name=f"kubelet-watch-{endpoint.stream}"
            )
            endpoint.watcher.start()

    def _watch(self, endpoint: _Endpoint) -> None:
        code, details = grpc.StatusCode.CANCELLED, "closed before the stream was open"
        try:
            with endpoint.lock:
                if not endpoint.closed:
                    open_stream = endpoint.channel.unary_stream(
                        LIST_AND_WATCH, request_serializer=dp.Empty.SerializeToString
                    )
                    endpoint.call = open_stream(dp.Empty())
            if endpoint.call is not None:
                for raw in endpoint.call:
                    self._listed(endpoint, raw)
                code, details = endpoint.call.code(), endpoint.call.details()
        except grpc.RpcError as error:
            code, details = error.code(), error.details()
        except DecodeError as error:
            self._record(self.errors, f"stream {endpoint.stream}: {error!r}")
        self._ended(endpoint, code, details)

    def _watch_stalled(self, endpoint: _Endpoint) -> None:
        details = ""
        try:
            with endpoint.lock:
                if not endpoint.closed:
                    endpoint.stalled = StalledPeer(endpoint.path)
            with self._changed:
                self._changed.notify_all()
            # Like a kubelet it has one connection only.
            endpoint.channel.close()
            if endpoint.stalled is not None:
                details = endpoint.stalled.wait_closed()
                endpoint.stalled.close()
        except OSError as error:
            details = str(error)
        self._ended(endpoint, grpc.StatusCode.UNAVAILABLE, details)

    def _listed(self, endpoint: _Endpoint, raw: bytes) -> None:
        at = time.monotonic()
        devices = [
            Device(
                device.ID,
                device.health,
                device.topology.nodes[0].ID if device.topology.nodes else None,
            )
            for device in dp.ListAndWatchResponse.FromString(raw).devices
        ]
        with self._changed:
            self.lists.append(Listing(at, endpoint.stream, devices, raw))
            self._devices = devices
            self._changed.notify_all()

    def _ended(self, endpoint: _Endpoint, code: grpc.StatusCode, details: str) -> None:
        with self._changed:
            end = StreamEnd(time.monotonic(), endpoint.stream, code, details or "")
            self.stream_ends.append(end)
            # It knows its clients by resource name only, so the late end of an old stream takes
            # the new endpoint away; and with no client of that name nothing happens at all.
            client = self._clients.pop(endpoint.resource, None)
            if client is endpoint:
                self._devices = [device._replace(health="Unhealthy") for device in self._devices]
            elif client is not None:
                self._devices = []
            if client is not None:
                self._serving = None
                self._void = len(self.lists)
            self._changed.notify_all()
        if not self.hold_connection:
            endpoint.close()
        if client is not None and client is not endpoint:
            client.close()

    def _record(self, where: list[Any], what: Any) -> None:
        with self._changed:
            where.append(what)
            self._changed.notify_all()


class StalledPeer:
    """Opens ListAndWatch with a window of 0 bytes, so that the plugin's first send blocks."""

    def __init__(self, path: Path | str) -> None:
        self._h2 = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True))
        self._h2.initiate_connection()
        self._h2.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: 0})
        headers = [
            (":method", "POST"),
            (":scheme", "http"),
            (":path", LIST_AND_WATCH),
            (":authority", "localhost"),
            ("content-type", "application/grpc"),
            ("te", "trailers"),
        ]
        self._h2.send_headers(1, headers)
        self._h2.send_data(1, b"\0\0\0\0\0", end_stream=True)
        # Guards everything here, and wakes the waits.
        self._changed = threading.Condition()
        self._answered = False
        self._data = b""
        self._ended: str | None = None
        self._socket = socket.socket(socket.AF_UNIX)
        try:
            self._socket.connect(str(path))
            self._socket.sendall(self._h2.data_to_send())
        except OSError:
            self._socket.close()
            raise
        self._reader = threading.Thread(target=self._read, name="kubelet-stalled")
        self._reader.start()

    def wait_blocked(self, timeout: float = 10.0) -> None:
        """Until the plugin has sent its headers: the message that follows has no room."""
        with self._changed:
            answered = self._changed.wait_for(lambda: self._answered, timeout)
            assert answered, f"the plugin answered no headers within {timeout} s: {self._ended}"

    def make_room(self) -> None:
        """Lets the plugin send what it has, and more."""
        with self._changed:
            self._h2.increment_flow_control_window(2**20, stream_id=1)
            self._socket.sendall(self._h2.data_to_send())

    def messages(self, count: int, timeout: float = 10.0) -> list[bytes]:
        """The first messages, which need room."""

        def found() -> list[bytes]:
            messages, rest = [], self._data
            while len(rest) >= 5 and len(rest) >= (end := 5 + int.from_bytes(rest[1:5])):
                messages.append(rest[5:end])
                rest = rest[end:]
            return messages

        with self._changed:
            enough = self._changed.wait_for(lambda: len(found()) >= count, timeout)
            assert enough, f"{len(found())} messages within {timeout} s: {self._ended}"
            return found()[:count]

    def wait_closed(self) -> str:
        """Until the plugin ends the stream or the connection; says which."""
        with self._changed:
            self._changed.wait_for(lambda: self._ended is not None)
            return self._ended or ""

    def hang_up(self) -> None:
        """Ends the connection from this side; `close` waits for the end too."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:  # ended already
            return

    def close(self) -> None:
        self.hang_up()
        self._reader.join()
        self._socket.close()

    def _read(self) -> None:
        why = "the connection was closed"
        try:
            while data := self._socket.recv(65536):
                with self._changed:
                    for event in self._h2.receive_data(data):
                        self._seen(event)
                    self._socket.sendall(self._h2.data_to_send())
        except OSError as error:
            why = str(error)
        except h2.exceptions.ProtocolError as error:
            # Among others for what may follow a GOAWAY, which h2 does not expect.
            why = f"the connection was given up: {error!r}"
        with self._changed:
            self._end(why)

    def _seen(self, event: h2.events.Event) -> None:
        if isinstance(event, h2.events.ResponseReceived):
            self._answered = True
        elif isinstance(event, h2.events.DataReceived):
            self._data += event.data
        elif isinstance(event, h2.events.StreamEnded | h2.events.StreamReset):
            self._end(f"the stream was ended: {event}")
        self._changed.notify_all()

    def _end(self, why: str) -> None:
        self._ended = self._ended or why
        self._changed.notify_all()
