"""Sends a plugin the very bytes that a real kubelet sent, and reads what comes back.

`tests/data/plugin-connection.jsonl` is one connection of a kubelet to another plugin; see `replay`.
"""

import base64
import json
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import hpack
from hyperframe.frame import (
    DataFrame,
    Frame,
    GoAwayFrame,
    HeadersFrame,
    PingFrame,
    RstStreamFrame,
    SettingsFrame,
)

CONNECTION = Path(__file__).parent.parent / "data" / "plugin-connection.jsonl"
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


class Call(NamedTuple):
    """One call, in the messages' own bytes; the status is None while the stream is open."""

    path: str
    request: bytes
    response: bytes
    status: int | None


def kubelet_chunks() -> list[bytes]:
    """What the kubelet sent, read by read, up to the end of the connection."""
    records = [json.loads(line) for line in CONNECTION.read_text().splitlines()]
    chunks = [base64.b64decode(record["b64"]) for record in records if record["dir"] == ">"]
    return [chunk for chunk in chunks if chunk]


@dataclass
class _Side:
    """What one side of the connection has sent. Headers are decoded with its own state."""

    rest: bytes = b""
    decoder: hpack.Decoder = field(default_factory=hpack.Decoder)
    headers: dict[int, dict[str, str]] = field(default_factory=dict)
    data: dict[int, bytes] = field(default_factory=dict)
    ended: set[int] = field(default_factory=set)
    greeted: bool = False
    pings: int = 0
    pongs: int = 0

    def read(self, data: bytes) -> None:
        for frame in self._frames(data):
            if isinstance(frame, HeadersFrame):
                # Neither side needed a CONTINUATION frame for headers this small.
                assert "END_HEADERS" in frame.flags
                headers = self.headers.setdefault(frame.stream_id, {})
                headers.update(self.decoder.decode(frame.data))
            elif isinstance(frame, DataFrame):
                self.data[frame.stream_id] = self.data.get(frame.stream_id, b"") + frame.data
            elif isinstance(frame, PingFrame):
                acknowledged = "ACK" in frame.flags
                self.pongs += acknowledged
                self.pings += not acknowledged
            elif isinstance(frame, SettingsFrame):
                self.greeted |= "ACK" not in frame.flags
            broken = isinstance(frame, GoAwayFrame | RstStreamFrame)
            assert not broken, f"the connection or a stream was ended: {frame}"
            if "END_STREAM" in frame.flags:
                self.ended.add(frame.stream_id)

    def _frames(self, data: bytes) -> Iterator[Frame]:
        self.rest += data
        while len(self.rest) >= 9:
            frame, length = Frame.parse_frame_header(memoryview(self.rest[:9]))
            if len(self.rest) < 9 + length:
                return
            body, self.rest = self.rest[9 : 9 + length], self.rest[9 + length :]
            frame.parse_body(memoryview(body))
            yield frame

    def message(self, stream: int) -> bytes | None:
        """The one message of the stream, without gRPC's prefix; None while it is incomplete."""
        data = self.data.get(stream, b"")
        if len(data) < 5 or len(data) < 5 + int.from_bytes(data[1:5]):
            return None
        assert data[0] == 0, "compressed, which nobody asked for"
        assert len(data) == 5 + int.from_bytes(data[1:5]), "more than one message"
        return data[5:]

    def answered(self, stream: int, path: str) -> bool:
        if stream in self.ended:
            return True
        return path.endswith("/ListAndWatch") and self.message(stream) is not None


def replay(path: Path | str, timeout: float = 10.0) -> list[Call]:
    """Plays the recorded kubelet to the plugin at `path`: its calls in order, with the answers.

    Before a chunk is sent, all calls so far have been answered, as they were to the kubelet. In
    the chunks are also acknowledgements, window updates and pings that the kubelet made for the
    answers of the other plugin; a server has to take them.
    """
    until = time.monotonic() + timeout
    kubelet, plugin = _Side(), _Side()
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(path))
        for chunk in kubelet_chunks():
            connection.sendall(chunk)
            kubelet.read(chunk.removeprefix(PREFACE))
            while not _settled(kubelet, plugin):
                connection.settimeout(max(until - time.monotonic(), 0.001))
                try:
                    data = connection.recv(65536)
                except TimeoutError:
                    raise AssertionError(
                        f"no answer; calls so far: {_calls(kubelet, plugin)}"
                    ) from None
                assert data, f"closed; calls so far: {_calls(kubelet, plugin)}"
                plugin.read(data)
    return _calls(kubelet, plugin)


def _settled(kubelet: _Side, plugin: _Side) -> bool:
    calls = kubelet.headers.items()
    answered = all(plugin.answered(stream, headers[":path"]) for stream, headers in calls)
    return plugin.greeted and answered and plugin.pongs >= kubelet.pings


def _calls(kubelet: _Side, plugin: _Side) -> list[Call]:
    calls = []
    for stream, headers in kubelet.headers.items():
        status = plugin.headers.get(stream, {}).get("grpc-status")
        calls.append(
            Call(
                headers[":path"],
                kubelet.message(stream) or b"",
                plugin.message(stream) or b"",
                None if status is None else int(status),
            )
        )
    return calls
