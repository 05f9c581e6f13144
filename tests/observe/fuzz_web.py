"""Mutated HTTP requests against a running agent.

A long run: `python -m tests.observe.fuzz_web 100000 [SEED]`; it prints what was sent and what the
agent's memory, descriptors and log did meanwhile.
"""

import random
import socket
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

from tests.agent_process import Agent, running

SEEDS = (
    (
        b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nAccept: application/openmetrics-text;"
        b'version=1.0.0,text/plain;version="0.0.4"\r\nAccept-Encoding: gzip\r\n\r\n'
    ),
    b"GET / HTTP/1.1\r\nHost: [::1]:9408\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
    b"HEAD /status.json?x=%ff HTTP/1.0\r\nConnection: keep-alive\r\n\r\n",
    b"POST /healthz HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
    b"PUT /readyz HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\nhello",
)
PIECES = (
    b"\r\n",
    b"\0",
    b"\xff",
    b":",
    b",",
    b'"',
    b";version=",
    b" ",
    b"%",
    b"GET /metrics",
    b"1e9",
)


def mutated(random_: random.Random) -> bytes:
    """A request or several, with bytes changed, cut out, put in or repeated."""
    data = bytearray(b"".join(random_.choices(SEEDS, k=random_.choice((1, 1, 1, 2, 20)))))
    for _ in range(random_.choice((0, 1, 1, 2, 8))):
        at = random_.randrange(len(data) + 1)
        end = min(len(data), at + random_.choice((1, 1, 4, 40)))
        match random_.randrange(4):
            case 0:
                data[at:end] = random_.randbytes(end - at)
            case 1:
                del data[at:end]
            case 2:
                data[at:at] = random_.choice(PIECES)
            case 3:
                data[at:at] = data[at:end] * random_.choice((2, 50, 2000))
    return bytes(data)


def send(port: int, requests: int, seed: int) -> None:
    """Sends so many; some are left without reading, some come in two parts."""
    random_ = random.Random(seed)
    for n in range(requests):
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=5) as one:
            one.settimeout(0.2)
            data = mutated(random_)
            cut = random_.randrange(len(data) + 1)
            one.sendall(data[:cut])
            if n % 64 == 0:
                with suppress(TimeoutError):
                    one.recv(65536)
            one.sendall(data[cut:])
            if n % 8:
                one.shutdown(socket.SHUT_WR)
                while one.recv(65536):
                    pass


def resident(agent: Agent) -> int:
    """KiB of memory."""
    status = Path(f"/proc/{agent.process.pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0])


def descriptors(agent: Agent) -> int:
    return len(list(Path(f"/proc/{agent.process.pid}/fd").iterdir()))


def main(requests: int, seed: int) -> None:
    with tempfile.TemporaryDirectory() as directory, running(Path(directory)) as agent:
        send(agent.port, 5000, seed + 1)  # warm
        memory, files, lines = resident(agent), descriptors(agent), len(agent.lines)
        for part in range(10):
            send(agent.port, requests // 10, seed * 1000 + part)
            sys.stdout.write(
                f"{(part + 1) * requests // 10} requests: {resident(agent) - memory:+} KiB,"
                f" {descriptors(agent) - files:+} descriptors,"
                f" {len(agent.lines) - lines} lines, healthz {agent.get('/healthz')[0]}\n"
            )
            sys.stdout.flush()
        code, took = agent.end()
        sys.stdout.write(f"ended with {code} in {took:.1f} s\n" + "\n".join(agent.lines[lines:]))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1)
