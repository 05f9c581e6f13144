"""The tools of the other tests, tried on small plugins, so that their faults are found here."""

import asyncio
import gc
import os
import queue
import socket
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import grpclib.server
import pytest

from tests.kubelet import capture
from tests.kubelet_peer import Device, KubeletPeer, StalledPeer, off_loop
from tests.wire import dp, dp_grpc
from vgpu_agent.kubelet._proto import v1beta1

pytestmark = pytest.mark.slow

RESOURCE = "example.com/card"


def listing(*healths, numa=None):
    topology = None if numa is None else dp.TopologyInfo(nodes=[dp.NUMANode(ID=numa)])
    devices = [
        dp.Device(ID=f"card::{n}", health=health, topology=topology)
        for n, health in enumerate(healths)
    ]
    return dp.ListAndWatchResponse(devices=devices)


class Plugin(dp_grpc.DevicePluginServicer):
    """A device plugin of a few lines on grpcio; `lists` is what its newest stream sends next."""

    def __init__(self, kubelet, name="plugin.sock"):
        self.kubelet = kubelet
        self.path = kubelet.directory / name
        self.lists = queue.SimpleQueue()
        self.pool = ThreadPoolExecutor(4)

    def __enter__(self):
        self.server = grpc.server(self.pool)
        dp_grpc.add_DevicePluginServicer_to_server(self, self.server)
        self.server.add_insecure_port(f"unix:{self.path}")
        self.server.start()
        return self

    def __exit__(self, *_):
        self.lists.put(None)
        self.server.stop(None).wait()
        self.pool.shutdown()

    def register(self, *lists, version="v1beta1", timeout=5.0):
        self.lists = queue.SimpleQueue()
        for one in lists:
            self.lists.put(one)
        request = dp.RegisterRequest(
            version=version, endpoint=self.path.name, resource_name=RESOURCE
        )
        with grpc.insecure_channel(f"unix:{self.kubelet.socket}") as channel:
            dp_grpc.RegistrationStub(channel).Register(request, timeout=timeout)

    def GetDevicePluginOptions(self, _request, _context):  # noqa: N802
        return dp.DevicePluginOptions(get_preferred_allocation_available=True)

    def ListAndWatch(self, _request, context):  # noqa: N802
        lists = self.lists
        context.add_callback(lambda: lists.put(None))
        yield from iter(lists.get, None)

    def Allocate(self, request, context):  # noqa: N802
        (one,) = request.container_requests
        if "unknown" in one.devices_ids:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "unknown")
        envs = {"IDS": ",".join(one.devices_ids)}
        return dp.AllocateResponse(container_responses=[dp.ContainerAllocateResponse(envs=envs)])

    def GetPreferredAllocation(self, request, _context):  # noqa: N802
        (one,) = request.container_requests
        chosen = [*one.must_include_deviceIDs, *one.available_deviceIDs][: one.allocation_size]
        answer = dp.ContainerPreferredAllocationResponse(deviceIDs=chosen)
        return dp.PreferredAllocationResponse(container_responses=[answer])

    def PreStartContainer(self, _request, _context):  # noqa: N802
        return dp.PreStartContainerResponse()


@pytest.fixture
def directory():
    # pytest's own directories may be too long for a socket's path.
    with tempfile.TemporaryDirectory(prefix="kubelet-") as path:
        yield Path(path)


def test_a_plugin_is_registered_listed_and_called(directory):
    with KubeletPeer(directory) as kubelet, Plugin(kubelet) as plugin:
        plugin.register(listing("Healthy", "Unhealthy", numa=0))
        registration = kubelet.wait_registrations(1)
        assert registration.error is None
        assert registration.request.endpoint == "plugin.sock"
        assert registration.options.get_preferred_allocation_available
        first = kubelet.wait_list(1)
        assert first.devices == [Device("card::0", "Healthy", 0), Device("card::1", "Unhealthy", 0)]
        assert first.raw == listing("Healthy", "Unhealthy", numa=0).SerializeToString()
        assert first.time >= registration.time
        assert kubelet.allocatable == ["card::0"]

        assert kubelet.options() == registration.options
        answer = kubelet.allocate(["card::1", "card::0"])
        assert answer.container_responses[0].envs == {"IDS": "card::1,card::0"}
        with pytest.raises(grpc.RpcError) as refused:
            kubelet.allocate(["unknown"])
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert kubelet.preferred(["card::0", "card::1"], ["card::1"], 1) == ["card::1"]
        assert kubelet.pre_start(["card::0"]) == dp.PreStartContainerResponse()

        plugin.lists.put(listing("Healthy", "Healthy"))
        later = kubelet.wait_list(lambda devices: all(one.health == "Healthy" for one in devices))
        assert later.devices[0].numa is None
        assert kubelet.errors == []


def test_the_end_of_a_stream_makes_all_devices_unhealthy_and_is_final(directory):
    with KubeletPeer(directory) as kubelet, Plugin(kubelet) as plugin:
        plugin.register(listing("Healthy"))
        kubelet.wait_list(1)
        plugin.lists.put(None)
        assert kubelet.wait_stream_ends(1).code is grpc.StatusCode.OK
        assert kubelet.devices == [Device("card::0", "Unhealthy", None)]
        with pytest.raises(AssertionError, match="no plugin is registered"):
            kubelet.allocate(["card::0"])
        # The list of the ended stream does not count as the latest one.
        with pytest.raises(AssertionError, match=r"(?s)no list as wanted.*stream 1 ended: OK"):
            kubelet.wait_list(lambda _: True, timeout=0.1)


def test_a_dropped_stream_leaves_the_kubelet_up(directory):
    with KubeletPeer(directory) as kubelet, Plugin(kubelet) as plugin:
        plugin.register(listing("Healthy"))
        kubelet.wait_list(1)
        kubelet.drop_stream()
        assert kubelet.stream_ends[0].code is grpc.StatusCode.CANCELLED
        assert kubelet.allocatable == []
        plugin.register(listing("Healthy", "Healthy"))
        assert len(kubelet.wait_list(2).devices) == 2
        assert kubelet.lists[1].stream == 2


def test_the_late_end_of_an_old_stream_takes_the_new_endpoint_away(directory):
    with KubeletPeer(directory) as kubelet, Plugin(kubelet) as plugin:
        plugin.register(listing("Healthy"))
        kubelet.wait_list(1)
        old = plugin.lists
        plugin.register(listing("Healthy", "Healthy"))
        kubelet.wait_list(2)
        assert len(kubelet.allocatable) == 2
        old.put(None)
        kubelet.wait_stream_ends(2)
        ends = {end.stream: end.code for end in kubelet.stream_ends}
        assert ends == {1: grpc.StatusCode.OK, 2: grpc.StatusCode.CANCELLED}
        assert kubelet.devices == []


def test_a_registration_that_fails_half_way_makes_it_blind_to_the_old_stream(directory):
    with KubeletPeer(directory, dial_timeout=0.2) as kubelet, Plugin(kubelet) as plugin:
        plugin.register(listing("Healthy"))
        kubelet.wait_list(1)
        old, plugin.path = plugin.lists, kubelet.directory / "absent.sock"
        with pytest.raises(grpc.RpcError) as refused:
            plugin.register()
        assert refused.value.code() is grpc.StatusCode.UNKNOWN
        old.put(None)
        kubelet.wait_stream_ends(1)
        assert kubelet.allocatable == ["card::0"]


def test_registrations_are_refused_as_told_and_recorded(directory):
    with KubeletPeer(directory, refuse_register="not today") as kubelet, Plugin(kubelet) as plugin:
        with pytest.raises(grpc.RpcError) as refused:
            plugin.register()
        assert refused.value.code() is grpc.StatusCode.UNKNOWN
        assert refused.value.details() == "not today"
        kubelet.refuse_register = None
        with pytest.raises(grpc.RpcError) as refused:
            plugin.register(version="v1")
        assert "'v1'" in refused.value.details()
        assert [one.error is None for one in kubelet.registrations] == [False, False]
        assert kubelet.streams == 0


def test_it_can_be_slow_and_never_open_the_stream(directory):
    with (
        KubeletPeer(directory, slow_options=0.3, never_watch=True) as kubelet,
        Plugin(kubelet) as plugin,
    ):
        with pytest.raises(grpc.RpcError) as late:
            plugin.register(timeout=0.1)
        assert late.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        kubelet.slow_options = 0.0
        plugin.register(listing("Healthy"))
        kubelet.wait_registrations(2)
        with pytest.raises(AssertionError, match=r"(?s)no list 1 within.*plugin.sock: accepted"):
            kubelet.wait_list(1, timeout=0.1)


def test_a_restart_leaves_a_stale_socket_and_then_deletes_the_plugins_sockets(directory):
    with KubeletPeer(directory) as kubelet:
        with Plugin(kubelet) as plugin:
            plugin.register(listing("Healthy"))
            kubelet.wait_list(1)
            (kubelet.directory / "checkpoint").touch()
            restart = threading.Thread(target=kubelet.restart, args=(0.3,))
            restart.start()
            kubelet.wait_stream_ends(1)
            with socket.socket(socket.AF_UNIX) as probe:
                until = time.monotonic() + 0.2
                while probe.connect_ex(str(kubelet.socket)) == 0 and time.monotonic() < until:
                    time.sleep(0.01)
                with pytest.raises(ConnectionRefusedError):
                    probe.connect(str(kubelet.socket))
            assert plugin.path.exists()
            restart.join()
            assert not plugin.path.exists()
            assert {path.name for path in kubelet.directory.iterdir()} == {
                "checkpoint",
                "kubelet.sock",
            }
            assert kubelet.devices == []
        with Plugin(kubelet) as plugin:
            plugin.register(listing("Healthy"))
            assert kubelet.wait_list(lambda devices: devices).stream == 2
        # Servers of grpc-core that are gone by now have not taken the new one's socket along.
        gc.collect()
        assert kubelet.socket.is_socket()
        kubelet.stop(clean=False)
        assert kubelet.socket.is_socket()
        kubelet.start()
    assert not kubelet.socket.exists()


def test_a_stalled_stream_gets_headers_and_no_list(directory):
    with KubeletPeer(directory) as kubelet, Plugin(kubelet) as plugin:
        plugin.lists.put(listing("Healthy"))
        with StalledPeer(plugin.path) as stalled:
            stalled.wait_blocked()
            with pytest.raises(AssertionError, match="still open"):
                stalled.wait_closed(0.1)
            plugin.server.stop(None).wait()
            assert stalled.wait_closed()


def test_a_kubelet_can_stall(directory):
    with KubeletPeer(directory, stall=True) as kubelet, Plugin(kubelet) as plugin:
        plugin.register(listing("Healthy"))
        kubelet.wait_stalled()
        with pytest.raises(AssertionError, match="no list 1"):
            kubelet.wait_list(1, timeout=0.2)
        assert kubelet.stream_ends == []
        kubelet.drop_stream()
        assert len(kubelet.stream_ends) == 1


def test_it_can_hold_its_connection_after_the_end_of_a_stream(directory):
    with (
        KubeletPeer(directory, hold_connection=True) as kubelet,
        Plugin(kubelet) as plugin,
    ):
        plugin.register(listing("Healthy"))
        kubelet.wait_list(1)
        assert open_sockets(plugin.path) == 2
        plugin.lists.put(None)
        kubelet.wait_stream_ends(1)
        time.sleep(0.1)
        assert open_sockets(plugin.path) == 2
    assert open_sockets(plugin.path) == 0


def open_sockets(path):
    """How many sockets of the kernel have this path: the listening one and each accepted one."""
    lines = Path("/proc/net/unix").read_text().splitlines()
    return sum(line.endswith(f" {path}") for line in lines)


def test_nothing_is_left_open(directory):
    def once():
        with KubeletPeer(directory, stall=True) as kubelet, Plugin(kubelet) as plugin:
            plugin.register(listing("Healthy"))
            kubelet.wait_stalled()
            kubelet.stall = False
            plugin.register(listing("Healthy"))
            kubelet.wait_list(1)
            kubelet.restart()

    def left():
        gc.collect()
        return len(os.listdir("/proc/self/fd")), threading.active_count()  # noqa: PTH208

    once()  # what grpc-core makes once for the process
    before = left()
    for _ in range(3):
        once()
    until = time.monotonic() + 5  # grpc-core closes in its own time
    while left() > before and time.monotonic() < until:
        time.sleep(0.05)
    files, threads = left()
    assert files <= before[0]
    assert threads <= before[1]


# What a real kubelet sent

CARDS = [f"GPU-a000000{g}-1111-2222-3333-00000000000{g}" for g in range(4)]
EXPECTED_CALLS = [
    ("GetDevicePluginOptions", 0),
    ("ListAndWatch", None),
    *[("GetPreferredAllocation", 0), ("Allocate", 0), ("PreStartContainer", 0)] * 2,
]


def check_replay(calls):
    assert [(call.path, call.status) for call in calls] == [
        (f"/v1beta1.DevicePlugin/{method}", status) for method, status in EXPECTED_CALLS
    ]
    devices = dp.ListAndWatchResponse.FromString(calls[1].response).devices
    assert len(devices) == 40
    sizes = []
    for preferred, allocate, start in (calls[2:5], calls[5:8]):
        (one,) = dp.PreferredAllocationRequest.FromString(preferred.request).container_requests
        sizes.append(one.allocation_size)
        assert set(one.available_deviceIDs) <= {device.ID for device in devices}
        (asked,) = dp.AllocateRequest.FromString(allocate.request).container_requests
        (given,) = dp.AllocateResponse.FromString(allocate.response).container_responses
        assert given.envs == {"IDS": ",".join(asked.devices_ids)}
        begun = dp.PreStartContainerRequest.FromString(start.request)
        assert sorted(begun.devices_ids) == sorted(asked.devices_ids)
        assert start.response == b""
    assert sizes == [1, 3]


class GrpclibPlugin(v1beta1.DevicePluginBase):
    """On the agent's own stack: grpc-core ends a connection with an acknowledgement too many."""

    async def get_device_plugin_options(self, empty):  # noqa: ARG002
        return v1beta1.DevicePluginOptions(pre_start_required=True)

    async def list_and_watch(self, empty):  # noqa: ARG002
        ids = [f"{card}::{n}" for card in CARDS for n in range(10)]
        devices = [v1beta1.Device(id=one, health="Healthy") for one in ids]
        yield v1beta1.ListAndWatchResponse(devices=devices)
        await asyncio.Event().wait()

    async def get_preferred_allocation(self, preferred_allocation_request):
        (one,) = preferred_allocation_request.container_requests
        chosen = one.available_device_i_ds[: one.allocation_size]
        answer = v1beta1.ContainerPreferredAllocationResponse(device_i_ds=chosen)
        return v1beta1.PreferredAllocationResponse(container_responses=[answer])

    async def allocate(self, allocate_request):
        (one,) = allocate_request.container_requests
        envs = {"IDS": ",".join(one.devices_ids)}
        answer = v1beta1.ContainerAllocateResponse(envs=envs)
        return v1beta1.AllocateResponse(container_responses=[answer])

    async def pre_start_container(self, pre_start_container_request):  # noqa: ARG002
        return v1beta1.PreStartContainerResponse()


def test_the_recorded_kubelet_is_replayed(directory):
    async def served():
        server = grpclib.server.Server([GrpclibPlugin()])
        await server.start(path=str(directory / "plugin.sock"))
        try:
            return await off_loop(capture.replay, directory / "plugin.sock")
        finally:
            server.close()
            await server.wait_closed()

    check_replay(asyncio.run(served()))
