"""Peers of our own socket that are no good kubelet, and what they leave behind."""

import logging
import socket
from contextlib import suppress

import grpc
import h2.config
import h2.events
import pytest

from tests.kubelet import fuzz
from tests.kubelet.fuzz import PREFACE, frame, streams_in_memory
from tests.kubelet.peers import Http, listening, wait_for
from tests.kubelet.rig import QUICK, channel_to, next_message, registered
from tests.kubelet.test_plugin import allocation
from tests.kubelet_peer import LIST_AND_WATCH, off_loop
from vgpu_agent.kubelet._proto.v1beta1 import RegisterRequest, RegistrationStub
from vgpu_agent.kubelet.grpc import call

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def asyncio_says_nothing(caplog):
    yield
    assert [each.getMessage() for each in caplog.records if each.name == "asyncio"] == []


async def cancelled(stream):
    assert await next_message(stream)
    stream.cancel()


async def refused(stream):
    with pytest.raises(grpc.RpcError):
        await next_message(stream)


@pytest.mark.parametrize(
    ("request_", "end"),
    [(b"", cancelled), (b"\x0a\xff", refused), (b"\x07", refused)],
    ids=["a second one", "a bad one", "another bad one"],
)
async def test_the_end_of_a_guests_stream_is_not_that_of_the_kubelets(kubelet_dir, request_, end):
    async with registered(kubelet_dir, timing=QUICK) as (kubelet, rig):
        async with channel_to(rig.path) as channel:
            await end(channel.unary_stream(LIST_AND_WATCH)(request_))
        await rig.until(lambda snapshot: snapshot.kubelet.streams == 1)
        rig.fail(1)
        await off_loop(kubelet.wait_list, 2)
        assert len(kubelet.registrations) == 1
        await off_loop(kubelet.drop_stream)
        await rig.registered(2)


async def test_a_guest_does_not_hide_the_end_of_the_kubelets_stream(kubelet_dir):
    async with (
        registered(kubelet_dir, timing=QUICK) as (kubelet, rig),
        channel_to(rig.path) as channel,
    ):
        assert await next_message(channel.unary_stream(LIST_AND_WATCH)(b""))
        await off_loop(kubelet.drop_stream)
        await rig.registered(2)


def raw(rig, *frames):
    """A connection that says this, in one piece, and reads nothing."""
    peer = socket.socket(socket.AF_UNIX)
    peer.connect(str(rig.path))
    peer.sendall(PREFACE + b"".join(frames))
    return peer


HEADERS = fuzz.encoded("ListAndWatch")
ROOM = frame(4, 0, 0, b"\0\4" + (2**31 - 1).to_bytes(4)) + frame(8, 0, 0, (2**30).to_bytes(4))
"""Windows as large as can be."""
CALLS = [
    each
    for stream in range(1, 41, 2)
    for each in (frame(1, 4, stream, HEADERS), frame(0, 1, stream, bytes(5)))
]
GOAWAY = frame(7, 0, 0, bytes(8))


@pytest.mark.parametrize("later", [GOAWAY, frame(0, 0, 0, b"")], ids=["GOAWAY", "an error"])
async def test_what_a_peer_that_goes_away_drains_later_does_no_harm(kubelet_dir, later):
    """Its connection is closed with data in our buffer, and is lost when that is read."""
    async with registered(kubelet_dir, gpus=16, replicas=100) as (_, rig):
        with raw(rig, ROOM, *CALLS) as peer:
            await rig.until(lambda snapshot: snapshot.kubelet.streams == 21)
            peer.sendall(later)
            await rig.until(lambda snapshot: snapshot.kubelet.streams == 1)
            await off_loop(drain, peer)
            await rig.stop()


def drain(peer):
    peer.settimeout(5)
    with suppress(ConnectionError):
        while peer.recv(65536):
            pass


def read_until(peer, words):
    peer.settimeout(5)
    read = b""
    while words not in read:
        got = peer.recv(65536)
        assert got, f"closed after {read!r}"
        read += got


async def test_a_call_that_is_reset_as_it_comes_is_released(kubelet_dir):
    resets = [
        each
        for stream in range(1, 161, 2)
        for each in (frame(1, 4, stream, HEADERS), frame(3, 0, stream, bytes(4)))
    ]
    async with registered(kubelet_dir) as (_, rig):
        before = streams_in_memory()
        with raw(rig, frame(4, 0, 0, b""), *resets, frame(6, 0, 0, bytes(8))) as peer:
            await off_loop(read_until, peer, frame(6, 1, 0, bytes(8)))
            await wait_for(lambda: streams_in_memory() <= before + 10, "end of the calls")


NOTHING = pytest.mark.parametrize(
    "between", [frame(0, 0, 1, b""), frame(0xFA, 3, 0, b"new")], ids=["empty data", "unknown"]
)


@NOTHING
async def test_frames_that_say_nothing_are_passed_over(kubelet_dir, between):
    async with registered(kubelet_dir) as (_, rig):
        message = allocation(rig.ids(0, 1))
        data = bytes(1) + len(message).to_bytes(4) + message
        call = frame(1, 4, 1, fuzz.encoded("Allocate"))
        parts = frame(0, 0, 1, data[:9]), between * 1000, frame(0, 1, 1, data[9:])
        with raw(rig, frame(4, 0, 0, b""), call, *parts) as peer:
            await off_loop(read_until, peer, b"NVIDIA_VISIBLE_DEVICES")


@NOTHING
async def test_frames_that_say_nothing_are_passed_over_in_answers(kubelet_dir, between):
    path = kubelet_dir / "kubelet.sock"

    def kubelet(connection: socket.socket) -> None:
        http = Http(h2.config.H2Configuration(client_side=False))
        http.initiate_connection()
        connection.sendall(http.data_to_send())
        while data := connection.recv(65536):
            if any(isinstance(each, h2.events.StreamEnded) for each in http.receive_data(data)):
                http.send_headers(1, [(":status", "200"), ("content-type", "application/grpc")])
                connection.sendall(http.data_to_send() + between * 1000)
                http.send_data(1, b"\0\0\0\0\2ok")
                http.send_headers(1, [("grpc-status", "0")], end_stream=True)
            connection.sendall(http.data_to_send())

    async with listening(path, kubelet):
        answer = await call(
            path,
            "Register",
            lambda channel: RegistrationStub(channel).register(RegisterRequest()),
            within=5,
        )
    assert answer == b"ok"


async def test_a_peer_that_reads_no_answer_is_cut(kubelet_dir):
    """Answers to pings are not held back by any window."""
    pings = frame(6, 0, 0, bytes(8)) * 150_000
    async with registered(kubelet_dir) as (_, rig):
        with raw(rig, frame(4, 0, 0, b"")) as peer:
            peer.settimeout(60)
            with pytest.raises(ConnectionError):
                await off_loop(peer.sendall, pings)


async def test_peers_that_speak_nearly_right_do_no_harm_and_leave_nothing(kubelet_dir, caplog):
    caplog.set_level(logging.CRITICAL, "grpclib")
    async with registered(kubelet_dir) as (kubelet, rig):
        requests, frames = await fuzz.attack(rig, 1, lambda _, frames: frames < 3000)
        assert (requests > 300, frames >= 3000) == (True, True)
        assert streams_in_memory() < 200  # grpclib keeps some, for a while
        await off_loop(kubelet.allocate, rig.ids(0, 1))
