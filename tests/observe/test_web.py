import asyncio
import base64
import gc
import hashlib
import http.client
import json
import logging
import re
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing, suppress
from dataclasses import dataclass, field
from pathlib import Path

import anyio
import pytest
from uvicorn.protocols.http.h11_impl import H11Protocol

from tests.agent_process import REPOSITORY, environment
from tests.agent_process import running as running_agent
from tests.kubelet_peer import off_loop
from tests.observe import fuzz_web
from vgpu_agent.address import Address
from vgpu_agent.errors import ListenError
from vgpu_agent.model.devices import Gpu, Inventory, SharedGpu
from vgpu_agent.model.facts import Scan
from vgpu_agent.model.health import Moment
from vgpu_agent.model.node import Node
from vgpu_agent.model.snapshot import Driver, RegistrationResult, Rules, Snapshot
from vgpu_agent.observe import web as web_module
from vgpu_agent.observe.listen import address_of, listen
from vgpu_agent.observe.metrics import Metrics
from vgpu_agent.observe.server import MAX_CONNECTIONS, MAX_PER_PEER
from vgpu_agent.observe.web import BURST, RENDERING, Web

LOOPBACK = Address("127.0.0.1", 0)
RULES = Rules()


def report_of(snapshot: Snapshot) -> bytes:
    """Stands for the report: what /status.json answers is not the web side's to know."""
    return json.dumps({"gpus": len(snapshot.inventory.gpus)}).encode()


def some_metrics(kind: type[Metrics] = Metrics) -> Metrics:
    return kind("1.2.3", "example.com/vgpu", RULES)


def has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


# A machine without IPv6 has no such case, rather than one that is skipped.
LOOPBACKS = [LOOPBACK, Address("::1", 0)] if has_ipv6() else [LOOPBACK]


@dataclass
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes


@dataclass
class Site:
    """A running Web and the means to ask it."""

    web: Web
    node: Node
    metrics: Metrics
    scope: anyio.CancelScope = field(default_factory=anyio.CancelScope)

    @property
    def address(self) -> Address:
        return address_of(self.web._listener)

    def server_connections(self) -> list[object]:
        """The connections that the server has."""
        port = self.address.port
        return [
            each
            for each in Path("/proc/self/net/tcp").read_text().splitlines()[1:]
            if each.split()[1].endswith(f":{port:04X}") and each.split()[3] == "01"
        ]

    def kept(self) -> int:
        """How many connections are in memory, lost ones too."""
        gc.collect()
        all_ = (each for each in gc.get_objects() if isinstance(each, H11Protocol))
        return sum(each.server == tuple(self.address) for each in all_)

    def connect(self) -> socket.socket:
        return socket.create_connection(self.address, timeout=5)

    async def get(self, path: str, method: str = "GET", **headers: str) -> Reply:
        return await off_loop(self._get, path, method, headers)

    def _get(self, path: str, method: str, headers: dict[str, str]) -> Reply:
        host, port = self.address
        with closing(http.client.HTTPConnection(host, port, timeout=5)) as connection:
            connection.request(method, path, headers=headers)
            reply = connection.getresponse()
            found = {name.lower(): value for name, value in reply.getheaders()}
            return Reply(reply.status, found, reply.read())

    async def raw(self, request: bytes) -> bytes:
        """Everything that is answered until the server ends the connection."""
        return await off_loop(self._raw, request)

    def _raw(self, request: bytes) -> bytes:
        with self.connect() as connection:
            connection.sendall(request)
            answer = b""
            while data := connection.recv(65536):
                answer += data
            return answer


@asynccontextmanager
async def serving(
    address: Address = LOOPBACK, metrics: Metrics | None = None, **options: object
) -> AsyncIterator[Site]:
    """A Web that serves; what it leaves behind at its end is looked for."""
    before = running()
    node = Node(RULES, clock=lambda: Moment(1.0, 1000.0))
    metrics = metrics or some_metrics()
    web = Web(listener=listen(address), node=node, metrics=metrics, report=report_of, **options)
    async with anyio.create_task_group() as tasks:
        site = Site(web, node, metrics, tasks.cancel_scope)
        await tasks.start(web.run)
        yield site
        tasks.cancel_scope.cancel()
    assert running() <= before


def running() -> set[asyncio.Task[object]]:
    """All tasks but those of the test runner."""
    tasks = asyncio.all_tasks()
    return {task for task in tasks if "TestRunner" not in task.get_coro().__qualname__}


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    """One loop for all, since `site` lives as long."""
    return "asyncio"


@pytest.fixture(scope="module")
async def site() -> AsyncIterator[Site]:
    """For tests that change no state: the end of each Web takes a tenth of a second."""
    async with serving() as site:
        yield site


@pytest.fixture(scope="module")
async def named_site() -> AsyncIterator[Site]:
    async with serving(hosts=frozenset({"gpus.example.com"})) as site:
        yield site


@pytest.fixture
async def own_site() -> AsyncIterator[Site]:
    async with serving() as site:
        yield site


# /metrics


@pytest.mark.parametrize("address", LOOPBACKS, ids=str)
async def test_metrics_are_served(address):
    async with serving(address) as site:
        assert site.address.host == address.host
        assert site.address.port > 0  # one was found
        reply = await site.get("/metrics")
    assert reply.status == 200
    assert reply.headers["content-type"].startswith("text/plain; version=")
    assert reply.headers["content-length"] == str(len(reply.body))
    assert reply.headers["cache-control"] == "no-store"
    assert b'vgpu_build_info{version="1.2.3"} 1.0\n' in reply.body


async def test_metrics_are_those_of_the_newest_snapshot(own_site):
    assert (
        b'vgpu_registrations_total{result="refused"} 0.0\n' in (await own_site.get("/metrics")).body
    )
    own_site.node.registration_tried(RegistrationResult.REFUSED, "no")
    assert (
        b'vgpu_registrations_total{result="refused"} 1.0\n' in (await own_site.get("/metrics")).body
    )


@pytest.mark.parametrize(
    ("accept", "openmetrics"),
    [
        (b"Accept: application/openmetrics-text; version=1.0.0", True),
        (b"Accept: text/html\r\naccept: application/openmetrics-text; version=1.0.0", True),
        (b"Accept: \xff\xfe", False),
        (b'Accept: text/plain; version="0.0.4"', False),
        (b"Accept: text/plain;version=1.0.0;escaping=\x80,application/openmetrics-text", True),
        (b"Accept: application/openmetrics-text; version=0.0.1,*/*", False),
        (b'Accept: application/openmetrics-text; q=0.5; version="1.0.0"', True),
        (b"Accept: application/openmetrics-text; version=a.b", False),
        (b"Accept: text/plain; version=" + b"9" * 5000, False),
        (b"Accept:", False),
        (b"X-No-Accept: at all", False),
        (b'Accept: application/openmetrics-text; version="0.0.4"', False),
        (b'Accept: ;;,=,"application/openmetrics-text";q=;version=";', False),
        (b"Accept: application/openmetrics-text;q=0.2, text/plain;q=0.7, */*;q=0.1", False),
        (b"Accept: application/openmetrics-text;q=0", False),
    ],
    ids=range(15),
)
async def test_metrics_are_served_in_the_format_that_is_accepted(site, accept, openmetrics):
    answer = await site.raw(
        b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n%b\r\n\r\n" % accept
    )
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert (b"content-type: application/openmetrics-text; version=1.0.0" in answer) is openmetrics
    assert answer.endswith(b"# EOF\n") is openmetrics


# Requests in general


@pytest.mark.parametrize("path", ["/", "/metrics", "/healthz", "/readyz", "/nothing"])
async def test_head_has_the_headers_of_get_and_no_body(site, path):
    whole = await site.get(path)
    answer = await site.raw(
        f"HEAD {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()
    )
    head, _, body = answer.partition(b"\r\n\r\n")
    assert body == b""
    assert f"content-length: {whole.headers['content-length']}".encode() in head.splitlines()
    assert head.splitlines()[0].split()[1] == str(whole.status).encode()


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "BREW"])
@pytest.mark.parametrize("path", ["/metrics", "/healthz", "/readyz"])
async def test_only_get_and_head_are_allowed(site, method, path):
    reply = await site.get(path, method)
    assert (reply.status, reply.body) == (405, b"only GET and HEAD\n")
    assert reply.headers["allow"] == "GET, HEAD"


async def test_the_body_of_a_refused_request_does_not_become_the_next_request(site):
    def ask() -> list[int]:
        host, port = site.address
        with closing(http.client.HTTPConnection(host, port, timeout=5)) as connection:
            statuses = []
            for method in ("POST", "GET"):
                connection.request(method, "/healthz", body=b"GET /nothing HTTP/1.1\r\n\r\n")
                reply = connection.getresponse()
                reply.read()
                statuses.append(reply.status)
            return statuses

    assert await off_loop(ask) == [405, 200]


@pytest.mark.parametrize("path", ["/metrics/", "/metricsx", "//metrics", "/%6detricz"])
async def test_an_unknown_path_is_answered_with_those_that_exist(site, path):
    reply = await site.get(path)
    assert reply.status == 404
    assert reply.body == b"no such path; there are /, /metrics, /healthz, /readyz, /status.json\n"


@pytest.mark.parametrize("path", ["/healthz?", "/healthz?verbose", "/healthz?a=%ff&b=/nothing"])
async def test_a_query_changes_nothing(site, path):
    assert (await site.get(path)).status == 200


@pytest.mark.parametrize(
    "request_",
    [
        b"\r\n\r\n\r\n",
        b"nonsense\r\n\r\n",
        b"GET /metrics\r\n\r\n",
        b"GET /metrics HTTP/9.9\r\n\r\n",
        b"GET /met rics HTTP/1.1\r\n\r\n",
        b"GET /metrics HTTP/1.1\r\n\r\n",  # without a host
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100),  # TLS
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET /metrics HTTP/1.1\r\nHost: x\r\nX: " + b"x" * 200_000,
        b"GET /" + b"x" * 200_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    ],
)
async def test_a_malformed_request_is_refused_and_the_next_one_answered(site, request_):
    def send() -> bytes:
        with site.connect() as connection:
            try:
                connection.sendall(request_)
                connection.shutdown(socket.SHUT_WR)
                return connection.recv(65536)
            except OSError:  # it may hang up in the middle of ours
                return b""

    answer = await off_loop(send)
    assert answer == b"" or answer.startswith(b"HTTP/1.1 4")
    assert (await site.get("/healthz")).status == 200


@pytest.mark.parametrize("rest", [b"zz\r\n", b"1\r\nabc", b"F" * 30 + b"\r\n"], ids=range(3))
@pytest.mark.parametrize("path", [b"/metrics", b"/healthz", b"/nothing"])
async def test_a_body_that_is_malformed_costs_no_line_of_the_log(site, caplog, path, rest):
    """In the request that is answered, when it was answered, and in one after it."""
    head = b"POST %b HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" % path
    get = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"
    caplog.set_level(logging.CRITICAL, "uvicorn")  # as in the agent

    def answered_first() -> None:
        with site.connect() as connection, suppress(ConnectionError):
            connection.sendall(head)
            assert connection.recv(65536).startswith(b"HTTP/1.1 4")
            connection.sendall(rest)
            while connection.recv(65536):
                pass

    await off_loop(answered_first)
    for request in (head + rest, get + head + rest, get + b"\x00\r\n\r\n"):
        with suppress(ConnectionError):
            await site.raw(request)
    gc.collect()  # asyncio reports a forgotten error with its task
    assert (await site.get("/healthz")).status == 200
    assert caplog.records == []


async def test_a_client_that_hangs_up_at_once_does_no_harm(site, caplog):
    def knock() -> None:
        for _ in range(20):
            with site.connect() as connection:
                connection.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")

    await off_loop(knock)
    assert (await site.get("/healthz")).status == 200
    assert caplog.records == []


async def test_a_connection_serves_many_requests_and_no_answer_waits_for_its_first_half(site):
    """Nagle's algorithm and delayed confirmations cost 40 ms an answer where both are on."""

    def ask() -> list[float]:
        host, port = site.address
        with closing(http.client.HTTPConnection(host, port, timeout=5)) as connection:
            took = []
            connection.connect()
            own = connection.sock.getsockname()
            for _ in range(20):
                start = time.monotonic()
                connection.request("GET", "/healthz")
                reply = connection.getresponse()
                assert (reply.status, reply.read()) == (200, b"ok\n")
                took.append(time.monotonic() - start)
                assert connection.sock.getsockname() == own
            return sorted(took)

    assert (await off_loop(ask))[10] < 0.03


# The page


async def test_the_page_runs_nothing_but_its_own_script_and_is_framed_by_nobody(site):
    reply = await site.get("/")
    assert reply.status == 200
    assert reply.headers["content-type"] == "text/html; charset=utf-8"
    assert reply.headers["x-frame-options"] == "DENY"
    policy = dict(
        part.strip().split(" ", 1) for part in reply.headers["content-security-policy"].split(";")
    )
    assert policy["default-src"] == "'none'"
    assert policy["connect-src"] == "'self'"
    assert policy["frame-ancestors"] == "'none'"
    for name in ("style", "script"):
        begin, end = f"<{name}>".encode(), f"</{name}>".encode()
        assert reply.body.count(begin) == 1
        inline = reply.body.partition(begin)[2].partition(end)[0]
        digest = base64.b64encode(hashlib.sha256(inline).digest()).decode()
        assert policy[f"{name}-src"] == f"'sha256-{digest}'"
    # It names no other address, and takes no text for markup.
    assert b"//" not in re.sub(rb"\n *// ", b"\n", reply.body)
    assert b"innerHTML" not in reply.body


@pytest.mark.parametrize("path", ["/", "/metrics", "/status.json", "/nothing"])
async def test_no_answer_is_guessed_at_cached_or_named_to_others(site, path):
    headers = (await site.get(path)).headers
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["cache-control"] == "no-store"


async def test_without_the_page_the_answer_names_the_setting():
    async with serving(page=False) as site:
        reply = await site.get("/")
        assert reply.status == 404
        assert reply.body == (
            b"no page here: VGPU_STATUS_PAGE=off;"
            b" there are /metrics, /healthz, /readyz, /status.json\n"
        )
        assert (await site.get("/status.json")).status == 200


async def test_the_report_is_that_of_the_newest_snapshot(own_site):
    reply = await own_site.get("/status.json")
    assert reply.headers["content-type"] == "application/json"
    assert json.loads(reply.body) == {"gpus": 0}
    gpu = Gpu("GPU-a", 0, "NVIDIA L4", 1 << 34, "00000000:01:00.0")
    own_site.node.driver_looked(Driver("1", None), Scan("1", (gpu,)), {})
    assert json.loads((await own_site.get("/status.json")).body) == {"gpus": 1}


@pytest.mark.slow
def test_without_the_page_the_report_names_no_pod(kubelet_dir):
    with running_agent(kubelet_dir, VGPU_STATUS_PAGE="off") as agent:
        status, why = agent.get("/")
        assert status == 404
        assert "VGPU_STATUS_PAGE=off" in why
        status, report = agent.get("/status.json")
        assert status == 200
        assert json.loads(report)["names_pods"] is False
        assert "released_until" in json.loads(report)["driver"]
    with running_agent(kubelet_dir) as agent:
        assert agent.get("/")[0] == 200
        assert json.loads(agent.get("/status.json")[1])["names_pods"] is True


@pytest.mark.parametrize(
    ("host", "served"),
    [
        ("127.0.0.1", True),
        ("[fe80::1]:9408", True),
        ("localhost:9408", True),
        ("LocalHost.", True),
        ("Gpus.Example.com:443", True),
        ("", True),  # no browser
        ("evil.example", False),
        ("localhost.evil.example:9408", False),
        ("127.0.0.1.evil.example", False),
        ("1::", False),
        ("gpus.example.com:80:80", False),
        ("localhost, evil.example", False),
    ],
)
@pytest.mark.parametrize("path", ["/", "/status.json"])
async def test_pages_that_name_pods_are_served_under_known_names_alone(
    named_site, host, served, path
):
    reply = await named_site.get(path, Host=host)
    assert (reply.status == 200) is served
    if not served:
        assert reply.status == 403
        assert b"VGPU_STATUS_HOSTS" in reply.body
    assert (await named_site.get("/metrics", Host=host)).status == 200


# /readyz


async def test_an_agent_is_ready_while_the_kubelet_follows_its_list_also_without_a_gpu(own_site):
    async def answer() -> tuple[int, bytes]:
        reply = await own_site.get("/readyz")
        return reply.status, reply.body

    node = own_site.node
    assert await answer() == (503, b"not registered: starting\n")
    node.driver_looked(Driver(None, "no driver"), None, {})
    node.registration_tried(RegistrationResult.REFUSED, "the kubelet refused")
    assert await answer() == (503, b"not registered: the kubelet refused\n")
    node.registration_tried(RegistrationResult.REGISTERED)
    assert (await answer())[0] == 503
    node.stream_opened()
    assert await answer() == (200, b"ready\n")
    node.registration_ended("the kubelet ended the stream")
    node.stream_ended()
    assert await answer() == (503, b"not registered: the kubelet ended the stream\n")


# Listening


@pytest.fixture
def taken() -> Iterator[Address]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield Address(*server.getsockname())


def test_a_port_in_use_is_reported_with_variable_address_and_reason(taken):
    with pytest.raises(ListenError) as caught:
        listen(taken)
    assert str(caught.value) == (
        f"VGPU_METRICS_ADDRESS={taken}: cannot listen there: Address already in use;"
        " set another host:port, or end what uses this one"
    )


@pytest.mark.parametrize(
    "address",
    [
        Address("no-such-host.invalid", 9408),
        Address("192.0.2.1", 9408),  # never of this machine: kept for documentation
        Address("2001:db8::1", 9408),
        Address("0.0.0..0", 9408),  # not a name at all
        Address("x" * 64, 9408),
    ],
    ids=lambda address: address.host,
)
def test_an_address_that_is_not_here_is_reported_with_variable_address_and_reason(address):
    with pytest.raises(ListenError) as caught:
        listen(address)
    head, _, reason = str(caught.value).partition(": cannot listen there: ")
    assert head == f"VGPU_METRICS_ADDRESS={address}"
    assert len(reason.partition(";")[0]) > 5
    assert "\n" not in reason


@pytest.mark.parametrize("address", LOOPBACKS[1:], ids=str)
def test_the_ipv6_wildcard_takes_ipv4_too(address):
    assert address.host == "::1"
    with listen(Address("::", 0)) as listener:
        port = listener.getsockname()[1]
        for host in ("127.0.0.1", "::1"):
            socket.create_connection((host, port), timeout=5).close()


async def test_the_port_is_free_again_after_the_end():
    async with serving() as site:
        address = site.address
        assert (await site.get("/healthz")).status == 200
    listen(address).close()


# The end


class Huge(Metrics):
    """Metrics that do not fit into the buffers of a connection."""

    def render(self, *_: object, **__: object) -> tuple[bytes, str]:
        return b"x" * 50_000_000, "text/plain"


@pytest.mark.parametrize(
    ("sent", "within"),
    [
        pytest.param(None, 0.5, id="nobody is there"),
        pytest.param(b"", 1.5, id="nothing was asked"),
        pytest.param(b"GET /metrics HTTP/1.1\r\nHost:", 1.5, id="half was asked"),
        pytest.param(
            b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n",
            1.5,
            id="an answer is not read",
            marks=pytest.mark.slow,
        ),
    ],
)
async def test_it_ends_while_a_client(sent, within):
    huge = some_metrics(Huge)
    async with serving(metrics=huge) as site:
        if sent is not None:
            connection = await off_loop(site.connect)
            await off_loop(connection.sendall, sent)
            await anyio.sleep(0.2)
        start = time.monotonic()
        site.scope.cancel()
    assert time.monotonic() - start < within
    if sent is not None:
        connection.close()


async def test_it_ends_while_a_client_keeps_its_connection():
    async with serving() as site:
        host, port = site.address
        connection = http.client.HTTPConnection(host, port, timeout=5)
        await off_loop(connection.request, "GET", "/healthz")
        await off_loop(lambda: connection.getresponse().read())
        start = time.monotonic()
        site.scope.cancel()
    assert time.monotonic() - start < 1.5
    with closing(connection):
        assert connection.sock.recv(1) == b""


class Slow(Metrics):
    """Metrics that take until they may go on."""

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)
        self.asked = threading.Event()
        self.go_on = threading.Event()
        self.renders = 0

    def render(self, snapshot: Snapshot, *, in_openmetrics: bool = False) -> tuple[bytes, str]:
        self.renders += 1
        self.asked.set()
        self.go_on.wait(5)
        return super().render(snapshot, in_openmetrics=in_openmetrics)


async def test_a_request_under_way_is_answered_before_the_end():
    slow = some_metrics(Slow)
    replies = []
    async with serving(metrics=slow) as site, anyio.create_task_group() as tasks:

        async def ask() -> None:
            with anyio.CancelScope(shield=True):
                replies.append(await site.get("/metrics"))

        tasks.start_soon(ask)
        await off_loop(slow.asked.wait, 5)
        start = time.monotonic()
        threading.Timer(0.2, slow.go_on.set).start()
        site.scope.cancel()
    assert time.monotonic() - start < 1.5
    assert replies[0].status == 200


# A server that ends by itself

ENDED_BY_ITSELF = pytest.RaisesGroup(
    pytest.RaisesExc(RuntimeError, match="ended by itself"), flatten_subgroups=True
)


@pytest.fixture
def short_lived(monkeypatch: pytest.MonkeyPatch) -> None:
    """uvicorn that returns though nobody stopped it."""

    async def return_early(_: object) -> None:
        await anyio.sleep(0.05)

    monkeypatch.setattr(web_module.Server, "main_loop", return_early)


@pytest.mark.usefixtures("short_lived")
async def test_a_server_that_returns_early_ends_the_web_side_with_an_error():
    with ENDED_BY_ITSELF:
        async with serving():
            await anyio.sleep(5)


async def test_a_server_that_does_not_start_ends_the_web_side_with_an_error(monkeypatch):
    async def refuse(self: web_module.Server, *_: object, **__: object) -> None:
        self.should_exit = True  # as uvicorn does where its start fails

    monkeypatch.setattr(web_module.Server, "startup", refuse)
    with ENDED_BY_ITSELF:
        async with serving():
            await anyio.sleep(5)


async def test_a_server_that_is_stopped_before_it_serves_ends_without_one():
    async with serving() as site:
        site.scope.cancel()


SHORT_LIVED = """
import sys
import anyio
from vgpu_agent.__main__ import main
from vgpu_agent.observe import web
async def return_early(_):
    await anyio.sleep(0.5)
web.Server.main_loop = return_early
sys.argv = ["vgpu-agent", "run"]
sys.exit(main())
"""


@pytest.mark.slow
def test_an_agent_whose_web_server_returns_ends_with_an_error(kubelet_dir):
    """Without it nobody would see a thing of it, and its probes would fail."""
    done = subprocess.run(
        [sys.executable, "-c", SHORT_LIVED],
        env=environment(
            VGPU_GPU_DRIVER="simulated",
            VGPU_KUBELET_DIR=str(kubelet_dir),
            VGPU_STATE_DIRECTORY=str(kubelet_dir / "state"),
            VGPU_METRICS_ADDRESS="127.0.0.1:0",
        ),
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert "the web server ended by itself" in done.stderr


# The loop


async def test_other_pages_are_answered_while_metrics_are_rendered():
    slow = some_metrics(Slow)
    async with serving(metrics=slow) as site, anyio.create_task_group() as tasks:
        start = time.monotonic()
        tasks.start_soon(site.get, "/metrics")
        await off_loop(slow.asked.wait, 5)
        assert (await site.get("/healthz")).status == 200
        assert time.monotonic() - start < 2  # and not when the five seconds of `Slow` were over
        slow.go_on.set()


@pytest.mark.slow
async def test_a_crowd_of_scrapes_is_rendered_once_more():
    slow = some_metrics(Slow)
    bodies = []
    async with serving(metrics=slow) as site:

        async def ask() -> None:
            bodies.append((await site.get("/metrics")).body)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ask)
            await off_loop(slow.asked.wait, 5)
            for _ in range(20):
                tasks.start_soon(ask)
            await anyio.sleep(0.5)
            site.node.registration_tried(RegistrationResult.REFUSED, "no")
            slow.go_on.set()
    assert slow.renders == 2
    refused = [b'result="refused"} 1.0' in body for body in bodies]
    assert sorted(refused) == [False] + 20 * [True]


async def test_who_asks_and_goes_leaves_nothing_behind(own_site, monkeypatch):
    """Neither work that waits for its turn, nor a dead connection until uvicorn's timer ends."""
    slow = Slow("1", "example.com/vgpu", RULES)
    monkeypatch.setattr(own_site.metrics, "render", slow.render)
    before = len(asyncio.all_tasks())

    def come_and_go(path: str, end: bytes) -> None:
        for _ in range(50):
            with own_site.connect() as one:
                one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                one.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
                reply = b""
                while not reply.endswith(end):
                    reply += one.recv(65536)

    await off_loop(come_and_go, "/metrics", b"")
    await off_loop(come_and_go, "/healthz", b"ok\n")
    with anyio.fail_after(3):
        # There may be the one that is rendered for.
        while len(asyncio.all_tasks()) > before + 1 or own_site.kept() > 1:  # noqa: ASYNC110 - garbage tells nobody
            await anyio.sleep(0.25)
    slow.go_on.set()


@pytest.mark.slow
async def test_rendering_takes_a_share_of_the_time_at_most():
    class Heavy(Metrics):
        def render(self, *_: object, **__: object) -> tuple[bytes, str]:
            time.sleep(0.05)
            return b"", "text/plain"

    async with serving(metrics=some_metrics(Heavy)) as site:
        start = time.monotonic()
        for _ in range(12):
            await site.get("/metrics")
        assert time.monotonic() - start > 11 * 0.05 / RENDERING - BURST


async def test_the_scrapes_of_many_gpus_do_not_hold_up_the_loop(own_site):
    gpus = tuple(
        SharedGpu(Gpu(f"GPU-{n:036d}", n, "NVIDIA L4", 1 << 30, f"00000000:{n:02x}:00.0"), 48)
        for n in range(64)
    )
    own_site.node.latest.publish(Snapshot(inventory=Inventory(gpus), driver=Driver("1", None)))
    worst = 0.0

    async def tick() -> None:
        nonlocal worst
        while True:
            start = time.monotonic()
            await anyio.sleep(0.005)
            worst = max(worst, time.monotonic() - start)

    async with anyio.create_task_group() as ticker:
        ticker.start_soon(tick)
        async with anyio.create_task_group() as scrapes:
            for _ in range(8):
                scrapes.start_soon(own_site.get, "/metrics")
        ticker.cancel_scope.cancel()
    assert worst < 0.5


async def test_a_page_that_fails_is_a_500_and_the_next_one_is_answered(caplog):
    class Broken(Metrics):
        def render(self, *_: object, **__: object) -> tuple[bytes, str]:
            raise LookupError("broken")

    with caplog.at_level(logging.ERROR):
        async with serving(metrics=some_metrics(Broken)) as site:
            assert (await site.get("/metrics")).status == 500
            assert (await site.get("/healthz")).status == 200
    assert any(
        record.exc_info and isinstance(record.exc_info[1], LookupError) for record in caplog.records
    )


GET = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sent", "after"),
    [
        pytest.param(b"", b"", id="silent"),
        pytest.param(GET[:-2], b"", id="half a request"),
        pytest.param(400 * GET, b"", id="answers are not read"),
        pytest.param(GET, GET, id="scrapers that stay"),
        pytest.param(b"POST" + GET[3:-2] + b"Content-Length: 99999\r\n\r\n", b"x", id="endless"),
    ],
)
async def test_a_crowd_keeps_nobody_else_out_and_does_not_stay(sent, after, caplog):
    """Neither the kubelet's probes nor, by their number, any other part of the agent."""
    crowd: list[socket.socket] = []

    def come(site: Site) -> None:
        for _ in range(2 * MAX_PER_PEER):
            crowd.append(site.connect())
            crowd[-1].setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            crowd[-1].setblocking(False)
            send(crowd[-1], sent)

    def send(client: socket.socket, data: bytes) -> None:
        with suppress(ConnectionError, BlockingIOError):
            client.send(data)

    def is_open(client: socket.socket) -> bool:
        try:
            while client.recv(65536):
                pass
        except BlockingIOError:
            return True
        except ConnectionError:
            pass
        return False

    caplog.set_level(logging.CRITICAL, "uvicorn")  # as in the agent
    async with serving(exchange=1.0) as site:
        try:
            await off_loop(come, site)
            for _ in range(5):
                assert (await site.get("/healthz")).status == 200
                for client in crowd:
                    send(client, after)
            if after:
                assert sum(map(is_open, crowd)) <= MAX_PER_PEER
            else:  # looked at here: to its reader a connection ends when it has read what was sent
                with anyio.fail_after(15):
                    while len(site.server_connections()) > 1:  # noqa: ASYNC110 - /proc
                        await anyio.sleep(0.1)
        finally:
            for client in crowd:
                client.close()
    assert caplog.records == []


@pytest.mark.slow
def test_mutated_requests_cost_the_agent_no_line_and_no_descriptor(kubelet_dir):
    """A few of them; `python -m tests.observe.fuzz_web` sends many."""
    with running_agent(kubelet_dir) as agent:
        agent.wait_line("cannot ask the kubelet")
        before, lines = fuzz_web.descriptors(agent), agent.lines[:]
        fuzz_web.send(agent.port, 400, seed=1)
        assert agent.get("/healthz") == (200, "ok\n")
        assert fuzz_web.descriptors(agent) <= before + 2  # a thread, a socket of the kubelet's
        assert agent.lines == lines
        assert agent.end()[0] == 0


@pytest.mark.slow
async def test_a_crowd_of_many_addresses_gives_way_to_one_that_asks():
    def come(site: Site, n: int) -> socket.socket:
        return socket.create_connection(
            site.address, timeout=5, source_address=(f"127.0.1.{n % 8 + 1}", 0)
        )

    async with serving() as site:
        crowd = [await off_loop(come, site, n) for n in range(2 * MAX_CONNECTIONS)]
        try:
            assert (await site.get("/healthz")).status == 200
            assert len(site.server_connections()) <= MAX_CONNECTIONS
        finally:
            for client in crowd:
                client.close()
