"""Servers that answer constants: what the libraries cost without an agent.

`python -m tests.bench.floors grpclib|grpcio DIRECTORY` registers with the kubelet of a directory
and serves a list of 40 vGPUs, and the same bytes for every Allocate and GetPreferredAllocation.
"""

import asyncio
import signal
import socket
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

SERVICE = "/v1beta1.DevicePlugin/"
RESOURCE = "example.com/floor"
COUNT = 40


def field(number: int, value: bytes) -> bytes:
    """A field of fewer than 128 bytes."""
    return bytes((number << 3 | 2, len(value))) + value


LIST = b"".join(
    field(1, field(1, b"GPU-a0000000-1111-2222-3333-000000000000::%d" % n) + field(2, b"Healthy"))
    for n in range(COUNT)
)
GRANT = field(
    1, field(1, field(1, b"NVIDIA_VISIBLE_DEVICES") + field(2, b"GPU-a0000000-1111-2222-3333-0"))
)
ADVICE = field(1, field(1, b"GPU-a0000000-1111-2222-3333-000000000000::0"))
UNARY = {"GetDevicePluginOptions": b"", "Allocate": GRANT, "GetPreferredAllocation": ADVICE}


def register(directory: Path, endpoint: str) -> None:
    """Tells the kubelet of the endpoint."""
    import grpc

    request = field(1, b"v1beta1") + field(2, endpoint.encode()) + field(3, RESOURCE.encode())
    with grpc.insecure_channel(f"unix:{directory}/kubelet.sock") as channel:
        channel.unary_unary("/v1beta1.Registration/Register")(request, timeout=10)


def with_grpcio(directory: Path) -> None:
    """A server of grpcio, which is C."""
    import grpc

    ended = threading.Event()

    class Handler(grpc.GenericRpcHandler):
        def service(self, details: Any) -> grpc.RpcMethodHandler:
            name = details.method.removeprefix(SERVICE)
            if name == "ListAndWatch":
                return grpc.unary_stream_rpc_method_handler(self.watch)
            return grpc.unary_unary_rpc_method_handler(lambda *_: UNARY[name])

        def watch(self, *_: Any) -> Any:
            yield LIST
            ended.wait()

    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    server = grpc.server(ThreadPoolExecutor(4), handlers=[Handler()])
    server.add_insecure_port(f"unix:{directory}/floor.sock")
    server.start()
    register(directory, "floor.sock")
    ended.wait()
    server.stop(None)


async def with_grpclib(directory: Path) -> None:
    """A server of grpclib, which is Python, as the agent's."""
    from grpclib.const import Cardinality, Handler
    from grpclib.encoding.base import CodecBase
    from grpclib.server import Server

    ended = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)

    class Raw(CodecBase):
        __content_subtype__ = "proto"

        def encode(self, message: bytes, _: Any) -> bytes:
            return message

        def decode(self, data: bytes, _: Any) -> bytes:
            return data

    class Plugin:
        def __mapping__(self) -> dict[str, Handler]:
            unary = {
                SERVICE + name: Handler(self.answering(body), Cardinality.UNARY_UNARY, None, None)
                for name, body in UNARY.items()
            }
            watch = Handler(self.watch, Cardinality.UNARY_STREAM, None, None)
            return {**unary, SERVICE + "ListAndWatch": watch}

        def answering(self, body: bytes) -> Any:
            async def answer(stream: Any) -> None:
                await stream.recv_message()
                await stream.send_message(body)

            return answer

        async def watch(self, stream: Any) -> None:
            await stream.recv_message()
            await stream.send_message(LIST)
            await ended.wait()

    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{directory}/floor.sock")
    server = Server([Plugin()], codec=Raw())
    await server.start(sock=listener)
    await asyncio.to_thread(register, directory, "floor.sock")
    await ended.wait()
    server.close()


if __name__ == "__main__":
    if sys.argv[1] == "grpcio":
        with_grpcio(Path(sys.argv[2]))
    else:
        asyncio.run(with_grpclib(Path(sys.argv[2])))
