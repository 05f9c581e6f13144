"""What a peer can do to the two doors of the agent, in numbers: broken frames, requests, restarts.

The tests of each edge are elsewhere; this is about many in a row: no crash, no leak, no text of
a peer's in the log but within a line, and a kubelet that has the right list after all of it.
"""

import contextlib
import os
import random
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h2.config
import h2.connection

from tests.agent_process import Agent, running
from tests.faults.rig import odd_lines
from tests.kubelet_peer import KubeletPeer
from tests.wire import dp

AT_ONCE = 50
"""Requests or frames of a connection."""
WORST_REGISTER = 0.5
"""Seconds from the new socket to Register."""
METHODS = ("Allocate", "GetPreferredAllocation", "PreStartContainer")


@contextmanager
def node() -> Iterator[tuple[KubeletPeer, Agent]]:
    """An agent with simulated GPUs, and the kubelet that follows it."""
    with (
        tempfile.TemporaryDirectory(prefix="vgpu-") as directory,
        KubeletPeer(directory) as kubelet,
        running(Path(directory), VGPU_SHARING="time-slicing") as agent,
    ):
        kubelet.wait_list(1, 20)
        yield kubelet, agent


def restarts(count: int) -> tuple[bool, str]:
    """Restarts the kubelet so often; whether each is answered once and in time, and how fast."""
    took = []
    with node() as (kubelet, _):
        for number in range(1, count + 1):
            kubelet.restart(random.uniform(0, 0.3))
            since_boot = time.monotonic() - time.time()
            appeared = kubelet.socket.stat().st_ctime + since_boot
            kubelet.wait_list(number + 1)
            took.append(kubelet.wait_registrations(number + 1).time - appeared)
        time.sleep(1)
        registered = len(kubelet.registrations) - 1
    took.sort()
    return registered == count and took[-1] < WORST_REGISTER, (
        f"{count} kubelet restarts: {registered} registrations, Register after"
        f" {took[len(took) // 2] * 1000:.0f} ms (median), {took[-1] * 1000:.0f} ms (worst)."
    )


def requests(count: int, seed: int) -> tuple[bool, str]:
    """Sends so many; whether the agent is well and leaks nothing, and what it has more."""
    draw = random.Random(seed)
    with node() as (kubelet, agent):
        devices = kubelet.devices
        address = ("127.0.0.1", agent.port)
        made, began, warm = 0, time.monotonic(), (0, 0)
        while made < count:
            if made >= count // 5 and not warm[0]:
                warm = usage(agent)
            if draw.random() < 0.5:
                path = next(kubelet.directory.glob("vgpu-*.sock"))
                exchange(lambda path=path: unix(path), frames(draw))
            else:
                web = b"".join(web_request(draw) for _ in range(AT_ONCE))
                exchange(lambda: socket.create_connection(address, 2), web)
            made += AT_ONCE
        minutes = (time.monotonic() - began) / 60
        rss, descriptors = (now - then for now, then in zip(usage(agent), warm, strict=True))
        problems = {
            "the agent ended": agent.process.poll() is not None,
            "/healthz does not answer": agent.get("/healthz")[0] != 200,
            "the kubelet's list is wrong": kubelet.devices != devices,
            "it registered again": len(kubelet.registrations) > 1,
            f"RSS grew by {rss} KiB": rss >= 1024,
            f"{descriptors} descriptors more": descriptors > 0,
            "what is no log line": bool(odd := odd_lines(agent.lines)),
        }
        words = (
            f"{made:,} hostile requests and frames in {minutes:.0f} minutes: RSS {rss:+} KiB,"
            f" descriptors {descriptors:+}."
        )
        if wrong := [each for each, so in problems.items() if so]:
            again = f"repeat: .venv/bin/python -m tests.faults --hostile {count} --seed {seed}"
            words = "\n".join([words, f"FAILED: {'; '.join(wrong)}", *odd, again])
        return not wrong, words


def usage(agent: Agent) -> tuple[int, int]:
    """KiB of RSS and descriptors, the least of some seconds."""
    proc, found = Path("/proc") / str(agent.process.pid), []
    for _ in range(24):
        time.sleep(0.25)
        rss = int((proc / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1024
        found.append((rss, len(list((proc / "fd").iterdir()))))
    return min(rss for rss, _ in found), min(descriptors for _, descriptors in found)


def unix(path: Path) -> socket.socket:
    one = socket.socket(socket.AF_UNIX)
    one.settimeout(2)
    one.connect(str(path))
    return one


def exchange(connect: Callable[[], socket.socket], data: bytes) -> None:
    """Sends it, and reads a little of whatever is answered; the end is as the peer likes it."""
    with contextlib.suppress(OSError), connect() as one:
        one.sendall(data)
        one.settimeout(0.02)
        while one.recv(65536):
            pass


def mutated(draw: random.Random, data: bytes) -> bytes:
    """With some bytes changed, cut out or doubled; as it is one time in four."""
    changed = bytearray(data)
    for _ in range(draw.choice((0, 1, 2, 8))):
        at = draw.randrange(len(changed) or 1)
        match draw.randrange(4):
            case 0:
                changed[at : at + 1] = draw.randbytes(1)
            case 1:
                changed[at : at + draw.randrange(8)] = b""
            case 2:
                changed[at:at] = changed[at : at + draw.randrange(32)]
            case _:
                changed[at : at + 1] = draw.choice((b"\0", b"\xff", b"\x7f", b"\r\n"))
    return bytes(changed)


def frames(draw: random.Random) -> bytes:
    """A client's connection: good calls, of which some frames are not."""
    client = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True))
    client.initiate_connection()
    sent = [client.data_to_send()]
    # Who asks for both is a kubelet to the agent, and its end one of a registration.
    methods = (*METHODS, draw.choice(("GetDevicePluginOptions", "ListAndWatch")))
    for stream in range(1, AT_ONCE, 2):
        headers = [
            (":method", "POST"),
            (":scheme", "http"),
            (":path", f"/v1beta1.DevicePlugin/{draw.choice(methods)}"),
            (":authority", "localhost"),
            ("content-type", "application/grpc"),
            ("te", "trailers"),
        ]
        client.send_headers(stream, headers)
        sent.append(client.data_to_send())
        body = mutated(draw, message(draw).SerializeToString())
        client.send_data(stream, b"\0" + len(body).to_bytes(4, "big") + body, end_stream=True)
        sent.append(client.data_to_send())
    broken = draw.random() < 0.7
    at = draw.randrange(len(sent))
    return b"".join(mutated(draw, f) if broken and n >= at else f for n, f in enumerate(sent))


def message(draw: random.Random) -> Any:
    ids = [f"GPU-{draw.randrange(9)}::{draw.randrange(99)}" for _ in range(draw.randrange(20))]
    one = dp.ContainerAllocateRequest(devices_ids=ids)
    return dp.AllocateRequest(container_requests=[one] * draw.randrange(4))


def web_request(draw: random.Random) -> bytes:
    path = draw.choice(("/", "/metrics", "/status.json", "/healthz", "/readyz", "/nothing"))
    method = draw.choice(("GET", "HEAD", "POST", "PRI"))
    host = draw.choice(("localhost", "127.0.0.1:9408", "evil.example", ""))
    accept = draw.choice(("*/*", "text/plain;q=x", "application/openmetrics-text", "\xff"))
    body = b"5\r\nhello\r\n0\r\n\r\n" if method == "POST" else b""
    chunked = "Transfer-Encoding: chunked\r\n" if body else ""
    head = f"{method} {path} HTTP/1.1\r\nHost: {host}\r\nAccept: {accept}\r\n{chunked}\r\n"
    request = head.encode("latin-1") + body
    return mutated(draw, request) if draw.random() < 0.1 else request
