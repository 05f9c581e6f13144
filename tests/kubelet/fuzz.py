"""Requests and frames that are nearly right, for a plugin that has to survive them.

`python -m tests.kubelet.fuzz SECONDS [SEED]` sends them to an agent's kubelet side and reports what
it cost: how many, growth of memory, descriptors, the longest time for which the loop was blocked.
"""

import asyncio
import gc
import logging
import random
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import anyio
import grpc
import grpclib.protocol
import hpack

from tests.kubelet.peers import descriptors, wait_for
from tests.kubelet.rig import Rig, registered
from tests.kubelet_peer import CHANNEL_OPTIONS, off_loop
from tests.wire import dp
from vgpu_agent.kubelet.session import SessionTiming

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
METHODS = {
    "Allocate": lambda ids: dp.AllocateRequest(
        container_requests=[dp.ContainerAllocateRequest(devices_ids=ids)]
    ),
    "GetPreferredAllocation": lambda ids: dp.PreferredAllocationRequest(
        container_requests=[
            dp.ContainerPreferredAllocationRequest(available_deviceIDs=ids, allocation_size=2)
        ]
    ),
    "PreStartContainer": lambda ids: dp.PreStartContainerRequest(devices_ids=ids),
    "GetDevicePluginOptions": lambda _: dp.Empty(),
    "ListAndWatch": lambda _: dp.Empty(),
}
UNARY = [each for each in METHODS if each != "ListAndWatch"]


def headers(method: str, *others: tuple[str, str]) -> list[tuple[str, str]]:
    """Of a call."""
    path = f"/v1beta1.DevicePlugin/{method}"
    return [
        *((":method", "POST"), (":scheme", "http"), (":path", path), (":authority", "localhost")),
        *(("te", "trailers"), ("content-type", "application/grpc"), *others),
    ]


def encoded(method: str) -> bytes:
    """The headers of a call, on the wire."""
    return bytes(hpack.Encoder().encode(headers(method)))


class Fuzz:
    """What is nearly right, by a seed."""

    def __init__(self, ids: list[str], seed: int) -> None:
        self.chance = random.Random(seed)
        self._ids = ids

    def message(self, method: str) -> bytes:
        """A request, mostly mutated."""
        few = self.chance.sample(self._ids, self.chance.randint(0, 3))
        return self.mutated(METHODS[method](few).SerializeToString())

    def mutated(self, data: bytes) -> bytes:
        """With some bytes changed, left out, put in or doubled, or cut short."""
        for _ in range(self.chance.choice((0, 1, 1, 2, 5))):
            at, to = sorted(self.chance.randint(0, len(data)) for _ in range(2))
            some = self.chance.randbytes(self.chance.randint(0, 4))
            data = self.chance.choice(
                (
                    data[:at] + some + data[at + len(some) :],
                    data[:at] + some + data[at:],
                    data[:at] + data[to:],
                    data[:to] + data[at:],
                    data[:at],
                )
            )
        return data

    def frames(self, method: str, stream: int) -> list[bytes]:
        """A call, or what else a peer may send."""
        pick, some = self.chance.choice, self.chance.randbytes
        named = headers(method, ("grpc-timeout", pick(("1S", "1n", "x"))))
        if self.chance.random() < 0.3:
            named.pop(self.chance.randrange(len(named)))
        block = hpack.Encoder().encode(named)
        message = self.message(method)
        prefixed = pick((b"\0", b"\0", b"\0", b"\1")) + len(message).to_bytes(4) + message
        call = [frame(1, 4, stream, block), frame(0, pick((0, 1, 1)), stream, prefixed)]
        reset = frame(3, 0, stream, (8).to_bytes(4))
        other = frame(
            self.chance.randrange(13), self.chance.randrange(256), pick((0, stream)), some(8)
        )
        return pick(
            (
                call,
                [*call, reset],
                [call[0], reset],
                [*call, other],
                [other],
                [call[0], call[0]],
                [self.mutated(b"".join(call))],
                [frame(6, 0, 0, bytes(8)), *call],  # a ping
                [*call, frame(7, 0, 0, bytes(8))],  # a GOAWAY
            )
        )


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3) + bytes((kind, flags)) + stream.to_bytes(4) + payload


def connection(path: Path, fuzz: Fuzz) -> int:
    """One connection with some calls; how many frames went out."""
    sent = 0
    with socket.socket(socket.AF_UNIX) as peer, suppress(OSError):
        peer.connect(str(path))
        peer.sendall(fuzz.mutated(PREFACE) if fuzz.chance.random() < 0.05 else PREFACE)
        peer.sendall(frame(4, 0, 0, b""))
        peer.settimeout(0.01)
        # One that asks for options and follows the list is taken for a kubelet, its end too.
        but = fuzz.chance.choice(("ListAndWatch", "GetDevicePluginOptions"))
        for number in range(fuzz.chance.randint(1, 20)):
            method = fuzz.chance.choice([each for each in METHODS if each != but])
            frames = fuzz.frames(method, 2 * number + 1)
            sent += len(frames)
            peer.sendall(b"".join(frames))
            if fuzz.chance.random() < 0.2:
                peer.recv(65536)
    return sent


def calls(channel: grpc.Channel, fuzz: Fuzz, count: int) -> int:
    """So many requests of grpcio's own client. Raises where an answer is not of those allowed."""
    allowed = {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION}
    for _ in range(count):
        method = fuzz.chance.choice(UNARY)
        call = channel.unary_unary(f"/v1beta1.DevicePlugin/{method}")
        try:
            call(fuzz.message(method), timeout=10)
        except grpc.RpcError as error:
            if error.code() not in allowed:
                raise
    return count


@contextmanager
def dialled(path: Path) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(f"unix:{path}", CHANNEL_OPTIONS) as channel:
        yield channel


async def attack(rig: Rig, seed: int, again: Callable[[int, int], bool]) -> tuple[int, int]:
    """Sends them while `again` of the requests and frames so far; then nothing is left of them.

    Returns how many requests and frames it sent.
    """
    fuzz = Fuzz([*rig.ids(0), *rig.ids(1)], seed)
    requests = frames = 0
    before = len(descriptors())
    while again(requests, frames):
        with dialled(rig.path) as channel:
            requests += await off_loop(calls, channel, fuzz, 20)
        for _ in range(10):
            frames += await off_loop(connection, rig.path, fuzz)
    await wait_for(lambda: rig.node.snapshot.kubelet.streams == 1, "end of the other streams")
    await wait_for(lambda: len(descriptors()) <= before, "end of the connections")
    return requests, frames


def streams_in_memory() -> int:
    """How many of grpclib's streams were not released."""
    gc.collect()
    return sum(isinstance(each, grpclib.protocol.Stream) for each in gc.get_objects())


class Said(logging.Handler):
    """What asyncio logs; the others are taken note of and no more."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        if record.name == "asyncio":
            self.lines.add(record.getMessage())


def resident() -> int:
    """Bytes of memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


async def main(seconds: float, seed: int) -> None:
    said = Said()
    logging.basicConfig(handlers=[said])
    lag = 0.0

    async def watch() -> None:
        nonlocal lag
        while True:
            asked = time.monotonic()
            await asyncio.sleep(0.01)
            lag = max(lag, time.monotonic() - asked - 0.01)

    with tempfile.TemporaryDirectory() as directory:
        async with (
            registered(Path(directory), timing=SessionTiming()) as (kubelet, rig),
            anyio.create_task_group() as tasks,
        ):
            rig.observer.observe_rpc = lambda *_: None  # it would keep them all
            await attack(rig, seed, lambda _, frames: frames < 5000)  # what is made once
            memory, opened, streams = resident(), len(descriptors()), streams_in_memory()
            tasks.start_soon(watch)
            until = time.monotonic() + seconds
            sent = await attack(rig, seed + 1, lambda *_: time.monotonic() < until)
            tasks.cancel_scope.cancel()
        print(f"{sent[0]} requests, {sent[1]} frames, {len(kubelet.registrations)} registrations")
        print(
            f"RSS {(resident() - memory) / 2**20:+.1f} MiB, descriptors"
            f" {len(descriptors()) - opened:+}, streams {streams_in_memory() - streams:+}, loop"
            f" blocked {lag * 1000:.0f} ms at most, asyncio said {said.lines or 'nothing'}"
        )


if __name__ == "__main__":
    anyio.run(main, float(sys.argv[1]), int((sys.argv[2:] or ["1"])[0]))
