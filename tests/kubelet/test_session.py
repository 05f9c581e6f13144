import asyncio
import errno
import gc
import logging
import os
import re
import shutil
import socket
import stat
import statistics
import time
import warnings
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import anyio
import grpc
import grpclib.client
import grpclib.server
import pytest
from grpclib import GRPCError, Status

from tests.kubelet.peers import (
    BAD_PEERS,
    bound,
    descriptors,
    hanging_up,
    listening,
    nothing_left,
    sockets_at,
    started,
    told,
    wait_for,
)
from tests.kubelet.rig import ENDPOINT, QUICK, RESOURCE, agent, registered
from tests.kubelet_peer import KubeletPeer, off_loop
from vgpu_agent.kubelet import session as session_module
from vgpu_agent.kubelet.session import SessionTiming

pytestmark = pytest.mark.slow


class Stats:
    """The seam for the identity of sockets: counts the looks, and can tell another ctime."""

    def __init__(self):
        self.looks = 0
        self.later = {}

    def __call__(self, path):
        self.looks += 1
        found = path.stat()
        if path.name not in self.later:
            return found
        fields = {name: getattr(found, name) for name in ("st_dev", "st_ino", "st_ctime_ns")}
        fields["st_ctime_ns"] += self.later[path.name]
        return type("Found", (), fields)

    async def more(self, looks):
        until = self.looks + looks
        await wait_for(lambda: self.looks >= until, f"{looks} more looks at the sockets")


def stale(path):
    """What a process that was killed leaves behind."""
    with socket.socket(socket.AF_UNIX) as gone:
        gone.bind(str(path))
        gone.listen()


def mode_of(path):
    return stat.S_IMODE(path.stat().st_mode)


def made_at(path):
    """When the file got its name, by the clock of the kubelet's records."""
    return path.stat().st_ctime - (time.time() - time.monotonic())


# Registering


async def test_it_registers_its_endpoint_and_is_connected(kubelet_dir, caplog):
    caplog.set_level(logging.INFO)
    async with registered(kubelet_dir) as (kubelet, rig):
        request = kubelet.registrations[0].request
        assert (request.version, request.endpoint, request.resource_name) == (
            "v1beta1",
            ENDPOINT,
            RESOURCE,
        )
        assert len(kubelet.allocatable) == 40
        assert rig.registrations("registered") == 1
        assert rig.node.snapshot.kubelet.error is None
        assert len(told(caplog, "registered with the kubelet")) == 1
        assert kubelet.errors == []


async def test_its_socket_is_roots_alone_before_anyone_can_connect(kubelet_dir, monkeypatch):
    modes, listen = [], socket.socket.listen

    def recording(self, *backlog):
        if str(self.getsockname()).endswith(f"/{ENDPOINT}"):
            modes.append(mode_of(Path(self.getsockname())))
        listen(self, *backlog)

    monkeypatch.setattr(socket.socket, "listen", recording)
    async with registered(kubelet_dir) as (_, rig):
        assert modes == [0o600]
        assert mode_of(rig.path) == 0o600


async def test_it_waits_for_a_kubelet_that_is_not_there_yet_and_says_so_once(kubelet_dir, caplog):
    looks = Stats()
    async with agent(kubelet_dir, stat_file=looks) as rig:
        await looks.more(5)
        assert rig.node.snapshot.kubelet.error == (
            f"no kubelet at {rig.session.kubelet_path}: there is no such socket"
        )
        assert len(told(caplog, "no kubelet at")) == 1
        assert not rig.path.exists()
        async with started(KubeletPeer(kubelet_dir)) as kubelet:
            await rig.registered()
            waited = kubelet.registrations[0].time - made_at(kubelet.socket)
            assert waited < 1
            assert rig.node.snapshot.registrations == {"registered": 1}


async def test_a_stale_kubelet_socket_is_one_line_and_no_attempt(kubelet_dir, caplog):
    looks = Stats()
    (kubelet_dir / "device-plugins").mkdir()
    stale(kubelet_dir / "device-plugins" / "kubelet.sock")
    timing = SessionTiming(kubelet_poll_later=0.02)
    async with agent(kubelet_dir, stat_file=looks, timing=timing) as rig:
        await looks.more(10)
        assert len(told(caplog, "nobody listens on it")) == 1
        assert len(caplog.records) == 1
        assert rig.node.snapshot.registrations == {}
        async with started(KubeletPeer(kubelet_dir)):
            await rig.registered()


@pytest.mark.slow
async def test_a_refused_registration_is_told_once_in_the_kubelets_words_and_tried_less_and_less(
    kubelet_dir, caplog, kubelet
):
    kubelet.refuse_register = "not today"
    async with agent(kubelet_dir) as rig:
        await rig.until(lambda _: rig.registrations("refused") == 3)
        times = [one.time for one in kubelet.registrations]
        pauses = [later - sooner for sooner, later in pairwise(times)]
        assert pauses[0] >= 0.15
        assert pauses[1] >= 0.3
        words = "cannot register: the kubelet refused with UNKNOWN: not today"
        assert told(caplog, "not today") == [words]
        assert rig.node.snapshot.kubelet.error == words.partition(": ")[2]
        assert not rig.path.exists()  # nothing is served that nobody asks for
        kubelet.refuse_register = None
        await rig.registered()
        assert rig.node.snapshot.registrations == {"refused": 3, "registered": 1}


async def test_a_kubelet_that_does_not_answer_is_tried_again(kubelet_dir, caplog, kubelet):
    kubelet.slow_options = 0.1
    async with agent(kubelet_dir, timing=SessionTiming(register_timeout=0.05)) as rig:
        await rig.until(lambda _: rig.registrations("refused") == 1)
        assert len(told(caplog, "did not answer Register")) == 1
        rig.session.timing = SessionTiming()
        kubelet.slow_options = 0.0
        await rig.registered()
        await off_loop(kubelet.wait_list, lambda devices: len(devices) == 40)


async def test_a_kubelet_that_ends_inside_register_is_waited_for(kubelet_dir, caplog, kubelet):
    kubelet.slow_options = 30.0
    async with agent(kubelet_dir) as rig:
        await off_loop(kubelet.wait_registering)
        await off_loop(kubelet.stop, clean=False)
        await wait_for(lambda: told(caplog, "nobody listens on it"), "line of the log")
        kubelet.slow_options = 0.0
        await off_loop(kubelet.start)
        await rig.registered()
        await off_loop(kubelet.wait_list, lambda devices: len(devices) == 40)


async def test_a_kubelet_that_hangs_up_as_it_is_called_is_called_again(kubelet_dir, monkeypatch):
    """So does one that is stopping: it ends its streams before it stops to listen."""
    create = grpclib.client.Channel._create_connection

    async def lost_already(self):
        protocol = await create(self)
        await wait_for(lambda: protocol.handler.connection_lost, "end of the connection")
        return protocol

    async with agent(kubelet_dir, timing=QUICK) as rig:
        with monkeypatch.context() as patch:
            patch.setattr(grpclib.client.Channel, "_create_connection", lost_already)
            async with listening(rig.session.kubelet_path, hanging_up):
                await rig.until(lambda _: rig.registrations("unreachable") == 2)
        async with started(KubeletPeer(kubelet_dir)):
            await rig.registered()


@pytest.mark.parametrize("name", BAD_PEERS)
async def test_a_peer_that_speaks_badly_is_no_registration_and_a_good_one_is_found(
    kubelet_dir, name
):
    async with agent(kubelet_dir, timing=replace(QUICK, register_timeout=0.2)) as rig:
        async with listening(rig.session.kubelet_path, BAD_PEERS[name]):
            await rig.until(lambda snapshot: sum(snapshot.registrations.values()) >= 2)
            assert set(rig.node.snapshot.registrations) <= {"unreachable", "refused"}
        async with started(KubeletPeer(kubelet_dir)):
            await rig.registered()


async def test_a_kubelet_that_never_opens_its_stream_is_registered_with_again(
    kubelet_dir, caplog, kubelet
):
    kubelet.never_watch = True
    async with agent(kubelet_dir, timing=replace(QUICK, stream_timeout=0.05)) as rig:
        await rig.until(lambda _: rig.registrations("no-stream") == 2)
        assert len(told(caplog, "the kubelet did not open its stream")) == 1
        assert not rig.node.snapshot.kubelet.connected
        kubelet.never_watch = False
        await rig.registered()
        assert rig.registrations("no-stream") == len(kubelet.registrations) - 1


# Registering again


async def test_a_new_kubelet_is_registered_with_at_once(kubelet_dir, caplog):
    async with registered(kubelet_dir) as (kubelet, rig):
        await off_loop(kubelet.restart, 0.1)
        await rig.registered(2)
        waited = kubelet.registrations[1].time - made_at(kubelet.socket)
        assert waited < 1
        await off_loop(kubelet.wait_list, 2)
        assert len(kubelet.allocatable) == 40
        assert len(told(caplog, "registration ended: the kubelet ended the stream")) == 1
        assert len(told(caplog, "nobody listens on it")) == 1
        assert len(caplog.records) <= 3  # the third: at the moment of its start it has no socket
        for n in range(3, 9):
            await off_loop(kubelet.restart)
            await rig.registered(n)
            assert kubelet.registrations[-1].time - made_at(kubelet.socket) < 1
        # One that restarts often is not taken for another agent.
        assert told(caplog, "another agent") == []


@pytest.mark.usefixtures("kubelet")
@pytest.mark.parametrize("fails", [True, False])
async def test_a_cancellation_that_grpclib_leaves_behind_ends_nothing(
    kubelet_dir, monkeypatch, fails
):
    """It cancels the task of a call whose connection ends, also one that has ended just now."""

    class Stub(session_module.RegistrationStub):
        calls = 0

        async def register(self, *args, **kwargs):
            Stub.calls += 1
            if Stub.calls == 1:
                asyncio.current_task().cancel()
                if fails:
                    raise GRPCError(Status.UNKNOWN, "the kubelet is stopping")
            return await super().register(*args, **kwargs)

    monkeypatch.setattr(session_module, "RegistrationStub", Stub)
    results = None
    async with agent(kubelet_dir, timing=QUICK) as rig:
        await rig.registered()
        results = rig.node.snapshot.registrations
    # The block would end without an error.
    assert results == {"refused" if fails else "unreachable": 1, "registered": 1}


@pytest.mark.alone
async def test_registering_again_takes_milliseconds(kubelet_dir):
    restarts, drops = [], []
    timing = SessionTiming(short_lived=0.0)
    async with registered(kubelet_dir, timing=timing) as (kubelet, rig):
        for n in range(2, 12, 2):
            await off_loop(kubelet.restart, 0.1)
            await rig.registered(n)
            restarts.append(kubelet.registrations[n - 1].time - made_at(kubelet.socket))
            ends = len(kubelet.stream_ends)
            await off_loop(kubelet.drop_stream)
            dropped_at = (await off_loop(kubelet.wait_stream_ends, ends + 1)).time
            await rig.registered(n + 1)
            drops.append(kubelet.registrations[n].time - dropped_at)
    for what, seconds in (("new kubelet", restarts), ("dropped stream", drops)):
        assert len(seconds) == 5, f"{what}: {len(seconds)} of 5 measured; {kubelet.seen()}"
        middle = statistics.median(seconds)
        print(f"registered again, {what}: median {middle:.3f} s, at most {max(seconds):.3f} s")
        assert middle < 0.5


def deleted(path, _looks):
    path.unlink()


def replaced_by_a_dead_one(path, _looks):
    stale(path.with_name("stale.sock"))
    path.with_name("stale.sock").rename(path)


def of_another_ctime(path, looks):
    looks.later[path.name] = 1


@pytest.mark.parametrize("becomes", [deleted, replaced_by_a_dead_one, of_another_ctime])
async def test_it_serves_again_when_its_socket_is_another(kubelet_dir, caplog, becomes):
    looks = Stats()
    async with registered(kubelet_dir, stat_file=looks, timing=QUICK) as (kubelet, rig):
        since = time.monotonic()
        becomes(rig.path, looks)
        await rig.registered(2)
        assert kubelet.registrations[1].time - since < 1.5
        assert len(told(caplog, f"our socket {rig.path} was removed or replaced")) == 1
        assert kubelet.stream_ends[0].code is grpc.StatusCode.OK
        assert kubelet.stream_ends[0].time < kubelet.registrations[1].time
        await off_loop(kubelet.wait_list, 2)
        assert len(kubelet.allocatable) == 40


async def test_it_leaves_alone_what_replaced_its_socket_and_lives(kubelet_dir, caplog):
    async with registered(kubelet_dir, timing=QUICK) as (_, rig):
        with bound(kubelet_dir / "other.sock") as other:
            (kubelet_dir / "other.sock").rename(rig.path)
            await rig.until(lambda _: rig.registrations("endpoint") == 2)
            assert len(told(caplog, f"another process serves {rig.path}")) == 1
            own = f"at {ENDPOINT} (process {os.getpid()}, "
            assert rig.node.snapshot.kubelet.rival.startswith(own)
            other.setblocking(False)
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(str(rig.path))  # it is still there
        await rig.registered(2)


@pytest.mark.slow
async def test_another_ctime_alone_makes_another_kubelet(kubelet_dir, kubelet):
    looks = Stats()
    kubelet.refuse_register = "no"
    async with agent(kubelet_dir, stat_file=looks) as rig:
        await rig.until(lambda _: rig.registrations("refused") == 4)  # 1.2 s to the next
        kubelet.refuse_register = None
        looks.later["kubelet.sock"] = 1
        await rig.registered()
        assert kubelet.registrations[4].time - kubelet.registrations[3].time < 0.8


async def test_the_directory_may_go_and_come_back(kubelet_dir, caplog):
    async with registered(kubelet_dir) as (kubelet, rig):
        await off_loop(kubelet.stop)
        shutil.rmtree(rig.path.parent)
        await wait_for(lambda: told(caplog, "there is no such socket"), "line of the log")
        await off_loop(kubelet.start)
        await rig.registered(2)


# Overlapping registrations: a kubelet knows its endpoints by the resource name only


@pytest.mark.parametrize("hold_connection", [False, True])
async def test_the_old_stream_has_ended_before_it_registers_again(
    kubelet_dir, kubelet, hold_connection
):
    kubelet.hold_connection = hold_connection
    async with agent(kubelet_dir, timing=QUICK) as rig:
        await rig.registered()
        for n in (2, 3):
            await off_loop(kubelet.wait_list, n - 1)
            rig.path.unlink()
            await rig.registered(n)
            assert kubelet.stream_ends[n - 2].time < kubelet.registrations[n - 1].time
        await off_loop(kubelet.wait_list, 3)
        rig.fail(1)
        await off_loop(kubelet.wait_list, 4)
        assert len(kubelet.allocatable) == 30
        assert [end.stream for end in kubelet.stream_ends] == [1, 2]
        assert {end.code for end in kubelet.stream_ends} == {grpc.StatusCode.OK}


async def test_a_stalled_stream_has_ended_before_it_registers_again(kubelet_dir, kubelet):
    kubelet.stall = True
    async with agent(kubelet_dir, timing=QUICK) as rig:
        await rig.until(lambda snapshot: snapshot.kubelet.connected)
        await off_loop(kubelet.wait_stalled)
        kubelet.stall = False
        rig.path.unlink()
        await rig.until(lambda _: rig.registrations("registered") == 2)
        await off_loop(kubelet.wait_list, 1)
        assert kubelet.stream_ends[0].time < kubelet.registrations[1].time
        rig.fail(1)
        await off_loop(kubelet.wait_list, 2)
        assert len(kubelet.allocatable) == 30


# Another agent for the same resource


@pytest.mark.slow
async def test_another_agent_for_the_resource_is_recognised_and_given_way_to(
    kubelet_dir, caplog, kubelet
):
    """What another agent does to us, without its timing: each stream of ours ends soon."""

    def streaming() -> bool:
        # With a list: a stream that is dropped before it was open is one that never was.
        newest = kubelet.lists[-1].stream if kubelet.lists else 0
        return newest == kubelet.streams > len(kubelet.stream_ends)

    async def take_the_place() -> None:
        directory = kubelet.directory
        with bound(directory / "other.sock"), bound(directory / "nvidia-aws-vgpu.sock"):
            while True:
                await off_loop(kubelet.wait, streaming, "a stream")
                await off_loop(kubelet.drop_stream)

    timing = SessionTiming(rival_back_off_max=0.4)
    async with agent(kubelet_dir, timing=timing) as rig:
        await rig.registered()
        async with anyio.create_task_group() as rival:
            rival.start_soon(take_the_place)
            await wait_for(lambda: told(caplog, "another agent"), "word of another agent")
            assert f"another agent seems to serve {RESOURCE}" in told(caplog, "another agent")[0]
            # The sockets of other plugins are named, the newest first.
            seems = re.escape(f" (process {os.getpid()}, ") + ".*"
            named = f" at nvidia-aws-vgpu.sock{seems} or other.sock{seems}"
            assert re.search(named, told(caplog, "another agent")[0])
            before = len(kubelet.registrations)
            assert before <= 5
            await off_loop(kubelet.wait_registrations, before + 4)
            times = [one.time for one in kubelet.registrations[before:]]
            pauses = [later - sooner for sooner, later in pairwise(times)]
            assert min(pauses) >= 0.3
            rival.cancel_scope.cancel()
        # It is ours again when the other one is gone, and the short lives are forgotten.
        await wait_for(lambda: len(kubelet.allocatable) == 40, "our devices")
        rig.session.timing = SessionTiming(short_lived=0.0)
        times = len(kubelet.registrations)
        await off_loop(kubelet.drop_stream)
        await off_loop(kubelet.wait_registrations, times + 1)
        assert kubelet.registrations[-1].time - kubelet.stream_ends[-1].time < 1


async def test_another_agents_end_that_takes_our_stream_along_is_overcome(kubelet_dir, kubelet):
    async with agent(kubelet_dir, endpoint="rival.sock") as rival:
        await rival.registered()
        async with agent(kubelet_dir) as rig:
            await rig.registered()
            await rival.stop()
            # Its end is taken for that of the resource's newest endpoint, which is ours.
            ends = [await off_loop(kubelet.wait_stream_ends, n) for n in (1, 2)]
            assert [end.stream for end in ends] == [1, 2]
            await rig.registered(2)
            await off_loop(kubelet.wait_list, 3)
            assert len(kubelet.allocatable) == 40


# What is in the way of our socket


@contextmanager
def a_directory(path):
    path.mkdir()
    yield
    path.rmdir()


@contextmanager
def a_file(path):
    path.write_text("something of value")
    yield
    assert path.read_text() == "something of value"
    path.unlink()


@pytest.mark.parametrize(
    ("obstacle", "words"),
    [
        (a_directory, "{} is a directory; remove it"),
        (a_file, "{} is a file that is no socket; remove it"),
        (bound, "another process serves {}"),
        (lambda path: bound(path, socket.SOCK_DGRAM), "another process serves {}"),
    ],
    ids=["directory", "file", "living socket", "living datagram socket"],
)
async def test_what_is_in_the_way_is_named_left_alone_and_waited_for(
    kubelet_dir, caplog, kubelet, obstacle, words
):
    path = kubelet.directory / ENDPOINT
    with ExitStack() as in_the_way:
        in_the_way.enter_context(obstacle(path))
        inode = path.stat().st_ino
        async with agent(kubelet_dir, timing=QUICK) as rig:
            await rig.until(lambda _: rig.registrations("endpoint") == 2)
            assert set(rig.node.snapshot.registrations) == {"endpoint"}
            assert len(told(caplog, words.format(path))) == 1
            assert words.format(path) in rig.node.snapshot.kubelet.error
            assert path.stat().st_ino == inode
            assert kubelet.registrations == []
            # Who serves there is named, as far as it can be seen.
            served = f"at {ENDPOINT}" if "serves" in words else ""
            assert (rig.node.snapshot.kubelet.rival or "").startswith(served)
            assert (rig.node.snapshot.kubelet.rival is None) is (not served)
            in_the_way.close()
            await rig.registered()
            assert rig.node.snapshot.kubelet.error is None
            assert rig.node.snapshot.kubelet.rival is None


@pytest.mark.parametrize(
    ("owner", "call", "number"),
    [
        (socket.socket, "bind", errno.EROFS),
        (socket.socket, "bind", errno.ENOSPC),
        (socket.socket, "bind", errno.EACCES),
        (socket.socket, "bind", errno.ENOENT),
        (Path, "chmod", errno.EPERM),
    ],
)
async def test_a_directory_that_takes_no_socket_is_named_and_tried_again(
    kubelet_dir, caplog, monkeypatch, kubelet, owner, call, number
):
    good = getattr(owner, call)

    def failing(self, argument):
        if str(argument if call == "bind" else self).endswith(f"/{ENDPOINT}"):
            raise OSError(number, os.strerror(number))
        return good(self, argument)

    monkeypatch.setattr(owner, call, failing)
    async with agent(kubelet_dir, timing=QUICK) as rig:
        await rig.until(lambda _: rig.registrations("endpoint") == 2)
        words = f"cannot bind {rig.path}: {os.strerror(number)}"
        assert told(caplog, words) == [f"cannot register: {words}"]
        assert rig.node.snapshot.kubelet.error == words
        assert kubelet.registrations == []  # a socket that anyone can use is never served
        monkeypatch.setattr(owner, call, good)
        await rig.registered()
        assert len(kubelet.registrations) == 1


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
async def test_a_socket_that_cannot_be_removed_ends_nothing(
    kubelet_dir, monkeypatch, kubelet, number
):
    good = Path.unlink

    def failing(self, **options):
        if self.name == ENDPOINT:
            raise OSError(number, os.strerror(number))
        good(self, **options)

    async with agent(kubelet_dir, timing=QUICK) as rig:
        await rig.registered()
        monkeypatch.setattr(Path, "unlink", failing)
        await off_loop(kubelet.drop_stream)
        await rig.until(lambda _: rig.registrations("endpoint") == 2)
        assert f"cannot bind {rig.path}" in rig.node.snapshot.kubelet.error
        monkeypatch.setattr(Path, "unlink", good)
        await rig.registered()
        monkeypatch.setattr(Path, "unlink", failing)


async def test_a_socket_left_by_an_agent_that_was_killed_is_replaced(kubelet_dir, caplog, kubelet):
    stale(kubelet.directory / ENDPOINT)
    async with agent(kubelet_dir) as rig:
        await rig.registered()
        assert caplog.records == []


# The end


@pytest.fixture
def own_sockets(kubelet_dir):
    """How many sockets of ours the kernel has; asked for before the kubelet, which has others."""
    return partial(sockets_at, kubelet_dir / "device-plugins" / ENDPOINT)


@pytest.mark.parametrize("hold_connection", [False, True])
async def test_the_end_is_clean_while_the_kubelet_follows(
    kubelet_dir, kubelet, own_sockets, hold_connection
):
    kubelet.hold_connection = hold_connection
    async with nothing_left(own_sockets), agent(kubelet_dir) as rig:
        await rig.registered()
        await off_loop(kubelet.wait_list, 1)
        assert await rig.stop() < 1.5
        end = await off_loop(kubelet.wait_stream_ends, 1)
        assert (end.code, end.details) == (grpc.StatusCode.OK, "")
        assert not rig.path.exists()
        assert own_sockets() == 0
        assert len(kubelet.registrations) == 1
        assert rig.node.snapshot.kubelet.streams == 0


@pytest.mark.parametrize(
    ("option", "value", "until"),
    [
        ("stall", True, KubeletPeer.wait_stalled),
        ("slow_options", 30.0, KubeletPeer.wait_registering),
        ("never_watch", True, lambda kubelet: kubelet.wait_registrations(1)),
        ("refuse_register", "no", lambda kubelet: kubelet.wait_registrations(2)),
    ],
    ids=["a send is blocked", "inside Register", "it waits for a stream", "it backs off"],
)
async def test_the_end_is_quick_while(kubelet_dir, kubelet, own_sockets, option, value, until):
    setattr(kubelet, option, value)
    async with nothing_left(own_sockets), agent(kubelet_dir) as rig:
        await off_loop(until, kubelet)
        assert await rig.stop() < 1.5
        assert not rig.path.exists()
        assert own_sockets() == 0


async def test_the_end_cuts_connections_that_come_with_it(kubelet_dir):
    """asyncio leaks a connection that it accepts just before the server is closed."""

    async def come(delay: int) -> None:
        for turn in range(delay + 6):
            if turn >= delay:
                late = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
                clients.append(late)
                if late.connect_ex(str(rig.path)):
                    return
            await anyio.lowlevel.checkpoint()

    clients: list[socket.socket] = []
    for delay in range(5):
        async with registered(kubelet_dir) as (_, rig), anyio.create_task_group() as tasks:
            tasks.start_soon(come, delay)
            tasks.start_soon(rig.stop)
        assert sockets_at(rig.path) == 0
        with warnings.catch_warnings(record=True) as leaks:
            warnings.simplefilter("always", ResourceWarning)
            gc.collect()
        assert not leaks
    for client in clients:
        client.close()


async def test_the_end_is_quick_without_a_kubelet(kubelet_dir):
    looks = Stats()
    async with nothing_left(), agent(kubelet_dir, stat_file=looks) as rig:
        await looks.more(2)
        assert await rig.stop() < 1.5


async def test_an_end_between_bind_and_serve_leaves_no_socket(kubelet_dir, monkeypatch, kubelet):
    start = grpclib.server.Server.start
    async with agent(kubelet_dir) as rig:

        async def ended_meanwhile(self, **kwargs):
            assert rig.path.exists()
            rig.scope.cancel()
            await start(self, **kwargs)

        monkeypatch.setattr(grpclib.server.Server, "start", ended_meanwhile)
        with anyio.fail_after(5):
            await rig.ended.wait()
        assert not rig.path.exists()
        assert sockets_at(rig.path) == 0
        assert kubelet.registrations == []


async def test_the_end_leaves_alone_what_replaced_its_socket(kubelet_dir):
    async with registered(kubelet_dir) as (_, rig):
        with bound(kubelet_dir / "other.sock"):
            (kubelet_dir / "other.sock").rename(rig.path)
            inode = rig.path.stat().st_ino
            await rig.stop()
            assert rig.path.stat().st_ino == inode


async def test_no_inotify_is_used(kubelet_dir):
    """The kernel gives a user 128 instances by default, and nodes run out of them."""
    async with registered(kubelet_dir):
        assert any(name.startswith("socket:") for name in descriptors())
        assert "anon_inode:inotify" not in descriptors()
