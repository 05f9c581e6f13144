"""What grpclib lacks: connections that can be cut, and calls whose end is not ours.

grpclib never closes a connection, and cancels the task of a call whose connection ends.
"""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Self, cast

import anyio
from grpclib import GRPCError, Status
from grpclib.client import Channel
from grpclib.encoding.proto import ProtoCodec
from grpclib.exceptions import StreamTerminatedError
from grpclib.protocol import EventsProcessor, H2Protocol
from h2.connection import H2Connection

from vgpu_agent.errors import KubeletAwayError, KubeletError

MAX_BYTES = 16 * 2**20
"""Most bytes of an answer that are read: as much as the kubelet takes of one of PodResources."""
MAX_REQUEST = 4 * 2**20
"""Most bytes of all requests of a connection under way: as much as the kubelet takes of one."""
MAX_UNREAD = 2**20
"""Most bytes that wait for a peer that does not read them."""
H2Connection.MAX_CLOSED_STREAMS = 256
"""How a stream ended matters for frames that cross its end. By itself h2 remembers 65,536 of them:
4 MiB for a kubelet whose connection lasts for months."""
MAX_WORDS = 500
"""Most letters of what the kubelet says that are passed on."""
PREFIX = 5
"""Bytes before a message."""


class _Processor(EventsProcessor):
    """grpclib's, for either side."""

    def process(self, event: Any) -> None:
        """Passes over what it does not know, as HTTP/2 wants of frames of unknown types."""
        with suppress(NotImplementedError):
            super().process(event)

    def process_data_received(self, event: Any) -> None:
        """Passes over what is empty: grpclib keeps it without bound, and takes it for the end."""
        if event.flow_controlled_length:
            super().process_data_received(event)


class _ServedProcessor(_Processor):
    """That of a server, less grpclib's leaks and with a bound."""

    def process_stream_reset(self, event: Any) -> None:
        """Later, when the task of the call has begun: what never began would never be released."""
        asyncio.get_running_loop().call_soon(super().process_stream_reset, event)

    def process_data_received(self, event: Any) -> None:
        """Ends the call that is one byte too much."""
        super().process_data_received(event)
        stream = self.streams.get(event.stream_id)
        received = sum(each.data_received for each in self.streams.values())
        if stream is not None and stream.wrapper is not None and received > MAX_REQUEST:
            words = f"more than {MAX_REQUEST} bytes of requests at a time"
            stream.wrapper.cancel(GRPCError(Status.RESOURCE_EXHAUSTED, words))


class Connection(H2Protocol):
    """A connection of a grpclib server or channel that can be cut.

    What it stumbles over is its end, kept from asyncio, which would log it.
    """

    transport: asyncio.Transport | None = None
    ended = False
    trouble: str | None = None

    @classmethod
    def like(cls, base: H2Protocol) -> Self:
        """With the handler and the settings of what grpclib's own factory makes."""
        return cls(base.handler, base.config, base.h2_config)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by asyncio."""
        self.transport = cast("asyncio.Transport", transport)
        super().connection_made(transport)
        self.processor = _Processor(self.handler, self.connection)

    def data_received(self, data: bytes) -> None:
        """Called by asyncio."""
        try:
            super().data_received(data)
        except Exception as error:  # noqa: BLE001 - grpclib and h2 stumble in many ways
            self.give_up(f"the kubelet's answer is no gRPC: {error!r:.{MAX_WORDS}}")
        if self.transport is not None and (
            self.transport.is_closing() or self.transport.get_write_buffer_size() > MAX_UNREAD
        ):
            self.abort()  # what it has not read by now is for nobody

    def connection_lost(self, exc: BaseException | None) -> None:
        """Called by asyncio. A transport that is lost cannot even be aborted."""
        self.ended, self.transport = True, None
        super().connection_lost(exc)

    def give_up(self, trouble: str) -> None:
        """Cuts the connection for that reason."""
        self.trouble = trouble
        self.abort()

    def abort(self) -> None:
        """Cuts the connection, also where the peer reads nothing."""
        if self.transport is not None:
            self.ended = True
            self.transport.abort()


class ServedConnection(Connection):
    """One of a server, whose peer may do what it likes."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by asyncio."""
        super().connection_made(transport)
        self.processor = _ServedProcessor(self.handler, self.connection)


class _Bounded(Connection):
    """One of a channel, with a bound on the answer."""

    received = 0
    max_bytes = MAX_BYTES

    def data_received(self, data: bytes) -> None:
        self.received += len(data)
        if self.received > self.max_bytes:
            self.give_up(f"the kubelet's answer is larger than {self.max_bytes / 2**20:g} MiB")
        else:
            super().data_received(data)


class _BytesCodec(ProtoCodec):
    """Hands answers out as they came: betterproto is too slow for the event loop."""

    def decode(self, data: bytes, message_type: Any) -> Any:  # noqa: ARG002
        return data


class _Channel(Channel):
    """grpclib's channel for one call."""

    connection: _Bounded | None = None

    def __init__(self, path: Path, max_bytes: int) -> None:
        super().__init__(path=str(path), codec=_BytesCodec())
        self._max_bytes = max_bytes

    def _protocol_factory(self) -> H2Protocol:
        self.connection = _Bounded.like(super()._protocol_factory())
        self.connection.max_bytes = self._max_bytes
        return self.connection

    @property
    def data_received(self) -> int:
        """Bytes of messages, with their prefixes."""
        return self.connection.connection.data_received if self.connection else 0

    def abort(self) -> None:
        """Leaves no connection behind."""
        if self.connection is not None:
            self.connection.abort()
        self.close()


def back_off(first: float, failures: int, longest: float) -> float:
    """Seconds until the next attempt after so many failures: twice as long each time."""
    return min(longest, first * 2.0 ** min(failures - 1, 16))


async def call(
    path: Path,
    what: str,
    request: Callable[[Channel], Awaitable[object]],
    *,
    within: float,
    max_bytes: int = MAX_BYTES,
) -> bytes:
    """Calls the kubelet over a connection of its own, so that any kubelet will do.

    `request` makes the call, which is named `what`, and has so many seconds. Returns the encoded
    answer. Raises KubeletError, and nothing else but cancellation.
    """
    channel = _Channel(path, max_bytes)
    answers: list[bytes] = []
    errors: list[KubeletError] = []

    async def run() -> None:
        try:
            answer = cast("bytes", await request(channel))
            if channel.data_received == PREFIX + len(answer):
                answers.append(answer)
            else:
                errors.append(KubeletAwayError("the kubelet answered more than once"))
        except Exception as error:  # noqa: BLE001 - grpclib and h2 stumble in many ways
            errors.append(_explained(error, path, what, channel.connection))
        finally:
            channel.abort()

    try:
        # In a task of its own: grpclib's cancellation must not be taken for our own end, nor for
        # that of the time that the call has.
        with anyio.fail_after(within):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(run)
    except TimeoutError:
        raise KubeletError(f"the kubelet did not answer {what} within {within:g} s") from None
    if answers:
        return answers[0]
    raise errors[0] if errors else _ended()


def _ended() -> KubeletError:
    return KubeletAwayError("the kubelet ended the call before its answer")


def _explained(
    error: Exception, path: Path, what: str, connection: _Bounded | None
) -> KubeletError:
    """The same words for the same trouble, which grpclib puts into several."""
    if connection is not None and connection.trouble is not None:
        return KubeletAwayError(connection.trouble)
    match error:
        case FileNotFoundError():
            return KubeletAwayError(f"there is no {path}")
        case ConnectionRefusedError():
            return KubeletAwayError(f"nobody listens on {path}")
        case OSError():
            return KubeletAwayError(f"cannot connect to {path}: {error.strerror or error}")
        case GRPCError(status=Status.UNIMPLEMENTED):
            return KubeletError(f"the kubelet does not serve {what}")
        case GRPCError():
            words = f"{error.message!s:.{MAX_WORDS}}"
            return KubeletError(f"the kubelet refused with {error.status.name}: {words}")
        case StreamTerminatedError():
            return _ended()
        case _ if connection is not None and connection.ended:
            return _ended()
        case _:
            return KubeletAwayError(f"the kubelet's answer cannot be read: {error!r:.{MAX_WORDS}}")
