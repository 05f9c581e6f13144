"""What may listen where an agent is looked for: a server with one answer to everything."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from vgpu_agent.address import Address


def http(body: str, status: str = "200 OK") -> bytes:
    return f"HTTP/1.1 {status}\r\nConnection: close\r\n\r\n{body}".encode()


@contextmanager
def answering(answer: bytes | None) -> Iterator[Address]:
    """Something that reads a request and answers so; None does not answer."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        done = threading.Event()

        def serve() -> None:
            while True:
                connection, _ = listener.accept()
                with connection:
                    if done.is_set():
                        return
                    connection.recv(65536)
                    if answer is None:
                        done.wait(20)
                    else:
                        connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        address = Address("127.0.0.1", listener.getsockname()[1])
        try:
            yield address
        finally:
            done.set()
            socket.create_connection(address).close()
            thread.join()


def closed() -> Address:
    """Where nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return Address("127.0.0.1", listener.getsockname()[1])
