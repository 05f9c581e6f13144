import dataclasses
import logging
import threading

import anyio
import grpc
import pytest
from grpclib import GRPCError, Status
from hypothesis import given
from hypothesis import strategies as st

from tests.kubelet.rig import (
    ENDPOINT,
    GIB,
    LOST,
    MPS,
    TIME_SLICING,
    agent,
    channel_to,
    gpus_of,
    next_message,
    registered,
    unchanging,
)
from tests.kubelet_peer import LIST_AND_WATCH, Device, StalledPeer, off_loop
from tests.model.strategies import a_look, tried
from tests.nodes import found
from tests.wire import dp
from vgpu_agent.kubelet import codec, wire
from vgpu_agent.kubelet import plugin as plugin_module
from vgpu_agent.kubelet._proto import v1beta1
from vgpu_agent.kubelet.codec import ListEncoder
from vgpu_agent.kubelet.grpc import ServedConnection
from vgpu_agent.model.container import Grant
from vgpu_agent.model.devices import Inventory, SharedGpu
from vgpu_agent.model.facts import Reading
from vgpu_agent.model.placement import Placement, prefer
from vgpu_agent.model.rules import MpsLimits

INVALID = grpc.StatusCode.INVALID_ARGUMENT
UNAVAILABLE_NOW = grpc.StatusCode.FAILED_PRECONDITION


def allocation(*containers):
    requests = [dp.ContainerAllocateRequest(devices_ids=ids) for ids in containers]
    return dp.AllocateRequest(container_requests=requests).SerializeToString()


def preference(available, must, size):
    one = dp.ContainerPreferredAllocationRequest(
        available_deviceIDs=available, must_include_deviceIDs=must, allocation_size=size
    )
    return dp.PreferredAllocationRequest(container_requests=[one]).SerializeToString()


def start(*ids):
    return dp.PreStartContainerRequest(devices_ids=ids).SerializeToString()


def healthy(devices, uuid):
    return {device.health == "Healthy" for device in devices if device.id.startswith(f"{uuid}::")}


# GetDevicePluginOptions


@pytest.mark.parametrize(("sharing", "pre_start"), [(MPS, True), (TIME_SLICING, False)])
async def test_options_ask_for_pre_start_under_mps_only(kubelet_dir, sharing, pre_start):
    async with registered(kubelet_dir, sharing=sharing) as (kubelet, rig):
        expected = dp.DevicePluginOptions(
            pre_start_required=pre_start, get_preferred_allocation_available=True
        )
        assert await off_loop(kubelet.options) == expected
        assert kubelet.registrations[0].options == expected
        assert kubelet.registrations[0].request.options == expected
        assert rig.observer.calls == [("GetDevicePluginOptions", "OK")] * 2


# ListAndWatch


async def test_every_vgpu_is_listed_with_its_gpus_numa_node(kubelet_dir):
    gpus = gpus_of(3, numa=(0, 1, None))
    async with registered(kubelet_dir, gpus=gpus, replicas=3) as (kubelet, _):
        assert kubelet.devices == [
            Device(f"{shared.uuid}::{n}", "Healthy", shared.numa_node)
            for shared in gpus
            for n in (0, 1, 2)
        ]
        raw = dp.ListAndWatchResponse.FromString(kubelet.lists[0].raw).devices
        # NUMA node 0 is told, which is not the same as telling none.
        assert [len(raw[n * 3].topology.nodes) for n in range(3)] == [1, 1, 0]
        assert [raw[n * 3].HasField("topology") for n in range(3)] == [True, True, False]


async def test_a_node_without_gpus_sends_an_empty_list(kubelet_dir):
    async with registered(kubelet_dir, gpus=0) as (kubelet, rig):
        assert kubelet.lists[0].devices == []
        found(rig.node, gpus_of(1))
        assert len((await off_loop(kubelet.wait_list, 2)).devices) == 10


async def test_a_fault_takes_all_vgpus_of_its_gpu_in_one_update_and_only_those(kubelet_dir):
    async with registered(kubelet_dir) as (kubelet, rig):
        ill = set(rig.ids(2))
        rig.fail(2)
        update = await off_loop(kubelet.wait_list, 2)
        assert {one.id for one in update.devices if one.health == "Unhealthy"} == ill
        assert {one.id for one in update.devices} == {one.id for one in kubelet.lists[0].devices}
        rig.fail(2, Reading(error="and an error"))  # the same list: not sent
        rig.heal(2)
        update = await off_loop(kubelet.wait_list, 3)
        assert update.devices == kubelet.lists[0].devices
        rig.fail(0)
        update = await off_loop(kubelet.wait_list, 4)
        assert {one.id for one in update.devices if one.health == "Unhealthy"} == set(rig.ids(0))
        assert len(kubelet.lists) == 4
        await rig.until(lambda snapshot: snapshot.lists_sent == 4)


async def test_every_one_of_several_streams_follows_the_list(kubelet_dir):
    async with (
        registered(kubelet_dir, gpus=2) as (kubelet, rig),
        channel_to(rig.path) as one,
        channel_to(rig.path) as other,
    ):
        streams = [each.unary_stream(LIST_AND_WATCH)(b"") for each in (one, other)]
        for stream in streams:
            assert await next_message(stream) == kubelet.lists[0].raw
        assert rig.node.snapshot.kubelet.streams == 3
        rig.fail(1)
        update = await off_loop(kubelet.wait_list, 2)
        for stream in streams:
            assert await next_message(stream) == update.raw
        assert not healthy(update.devices, rig.gpus[1].gpu.uuid) - {False}


async def test_a_slow_watcher_skips_to_the_newest_list(kubelet_dir):
    async with registered(kubelet_dir, gpus=2) as (kubelet, rig):
        slow = await off_loop(StalledPeer, rig.path)
        await off_loop(slow.wait_blocked)  # the first list is under way, and has no room
        for wanted in range(2, 7):
            (rig.heal if wanted % 2 else rig.fail)(0)
            await off_loop(kubelet.wait_list, wanted)
        rig.fail(1)
        newest = await off_loop(kubelet.wait_list, 7)
        await off_loop(slow.make_room)
        assert await off_loop(slow.messages, 2) == [kubelet.lists[0].raw, newest.raw]
        assert [one.health for one in newest.devices] == ["Unhealthy"] * 20
        await off_loop(slow.close)


@pytest.mark.slow
async def test_a_list_of_sixteen_hundred_vgpus_arrives(kubelet_dir):
    async with registered(kubelet_dir, gpus=16, replicas=100) as (kubelet, rig):
        assert len(set(kubelet.allocatable)) == 1600
        rig.fail(15)
        await off_loop(kubelet.wait_list, 2)
        assert len(kubelet.allocatable) == 1500


# Allocate


async def test_a_container_is_told_its_share(kubelet_dir):
    async with registered(kubelet_dir) as (kubelet, rig):
        ids = rig.ids(1, 0, 1)
        answer = await off_loop(kubelet.allocate, ids[::-1])  # a kubelet's order is random
        (one,) = answer.container_responses
        pipe = f"/run/vgpu-agent/mps/{rig.gpus[1].gpu.uuid}/pipe"
        assert one.envs == {
            "NVIDIA_VISIBLE_DEVICES": rig.gpus[1].gpu.uuid,
            "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
            "VGPU_SHARE": "2/10",
            "VGPU_MEMORY_BYTES": str((16 * GIB - GIB // 2) * 2 // 10),
            "VGPU_MEMORY_FRACTION": "0.1937",
            "CUDA_MPS_PIPE_DIRECTORY": pipe,
            "CUDA_MPS_PINNED_DEVICE_MEM_LIMIT": "0=3174M",
            "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": "20",
        }
        assert list(one.mounts) == [
            dp.Mount(container_path=pipe, host_path=pipe),
            dp.Mount(container_path="/dev/shm", host_path="/dev/shm/vgpu-agent/shared"),
        ]
        assert (one.devices, one.annotations, one.cdi_devices) == ([], {}, [])
        assert await off_loop(kubelet.allocate, ids) == answer


def serving(limits, rig):
    """Daemons that were set up with these limits."""
    return a_look(limits, **{shared.gpu.uuid: 10 for shared in rig.gpus})


async def test_allocations_are_for_the_daemon_as_it_was_set_up(kubelet_dir):
    """With limits of its own a client gets those of one vGPU, whatever the settings say now."""
    async with registered(kubelet_dir) as (_, rig):
        rig.node.set_mps(serving(MpsLimits.SERVER, rig))
        two = await rig.call("Allocate", allocation(rig.ids(1, 0, 1)))
        assert two.code is INVALID
        assert "VGPU_MPS_LIMITS=server" in two.details
        one = await rig.call("Allocate", allocation(rig.ids(1, 0)))
        answer = dp.AllocateResponse.FromString(one.response)
        assert "CUDA_MPS_PINNED_DEVICE_MEM_LIMIT" not in answer.container_responses[0].envs


async def test_several_containers_of_one_request_get_an_answer_each_in_order(kubelet_dir):
    async with registered(kubelet_dir) as (_, rig):
        answer = await rig.call("Allocate", allocation(rig.ids(1, 0), rig.ids(0, 0, 1)))
        told = dp.AllocateResponse.FromString(answer.response).container_responses
        assert [one.envs["VGPU_SHARE"] for one in told] == ["1/10", "2/10"]


# GetPreferredAllocation


@pytest.mark.parametrize(("placement", "shared"), [(Placement.SPREAD, 1), (Placement.PACK, 0)])
async def test_the_preferred_vgpus_come_from_one_gpu_by_placement(kubelet_dir, placement, shared):
    async with registered(kubelet_dir, gpus=2, placement=placement) as (kubelet, rig):
        available = [*rig.ids(0, 0, 1, 2, 3), *rig.ids(1)]
        assert await off_loop(kubelet.preferred, available, [], 3) == rig.ids(shared, 0, 1, 2)
        must = rig.ids(1, 9)
        assert await off_loop(kubelet.preferred, available, must, 2) == rig.ids(1, 9, 0)
        assert await off_loop(kubelet.preferred, available, [], 0) == []


async def test_unknown_and_unhealthy_ids_are_passed_over_and_told(kubelet_dir, caplog):
    caplog.set_level(logging.INFO)
    async with registered(kubelet_dir, gpus=2) as (kubelet, rig):
        rig.fail(1)
        await off_loop(kubelet.wait_list, 2)
        before = unchanging(rig.node.snapshot)
        available = ["GPU-gone::0", *rig.ids(1, 0, 1), *rig.ids(0, 0, 1), "nonsense"]
        # There are two to be had, and an error would reject the pod.
        assert await off_loop(kubelet.preferred, available, [], 4) == rig.ids(0, 0, 1)
        assert await off_loop(kubelet.preferred, available, ["GPU-gone::1"], 1) == rig.ids(0, 0)
        assert await off_loop(kubelet.preferred, rig.ids(1), [], 1) == []
        passed = ", ".join(sorted(["GPU-gone::0", *rig.ids(1, 0, 1), "nonsense"]))
        assert f"passed over as unknown or unhealthy: {passed}" in caplog.text
        await off_loop(kubelet.preferred, [f"GPU-gone::{n}" for n in range(5000)], [], 1)
        assert caplog.messages[-1].endswith(" and 4980 more")
        assert unchanging(rig.node.snapshot) == before
        assert rig.observer.calls[-4:] == [("GetPreferredAllocation", "OK")] * 4


async def test_a_large_choice_is_made_off_the_loop(kubelet_dir, monkeypatch):
    made = []

    def noted(*arguments):
        made.append(threading.current_thread() is threading.main_thread())
        return prefer(*arguments)

    monkeypatch.setattr(plugin_module, "prefer", noted)
    async with registered(kubelet_dir, gpus=2) as (kubelet, rig):
        unknown = [f"GPU-gone::{n}" for n in range(plugin_module.LARGE)]
        for available in (rig.ids(0, 1), rig.ids(0, 1) + unknown):
            assert await off_loop(kubelet.preferred, available, [], 1) == rig.ids(0, 1)
    assert made == [True, False]


# PreStartContainer


async def test_a_container_may_start_while_its_gpu_is_well(kubelet_dir):
    async with registered(kubelet_dir, gpus=2) as (kubelet, rig):
        assert await off_loop(kubelet.pre_start, rig.ids(0, 0, 9)) == dp.PreStartContainerResponse()
        # What was allocated when the GPU was cut into more is still the container's.
        held = f"{rig.gpus[0].gpu.uuid}::47"
        assert await off_loop(kubelet.pre_start, [held]) == dp.PreStartContainerResponse()
        rig.fail(0)
        with pytest.raises(grpc.RpcError) as refused:
            await off_loop(kubelet.pre_start, [held])
        assert refused.value.code() is UNAVAILABLE_NOW
        rig.heal(0)
        await off_loop(kubelet.pre_start, [held])


# Wrong requests. The GPU of index 3 is unhealthy in all of them.

UUIDS = [shared.uuid for shared in gpus_of(4)]
WELL, ILL = f"{UUIDS[0]}::0", f"{UUIDS[3]}::0"
MANY = [[f"{uuid}::{n}"] for uuid in UUIDS for n in range(10)] + [["x::0"]]
REFUSED = {
    "no container": ("Allocate", allocation(), INVALID, ["names no container"]),
    "a container without devices": ("Allocate", allocation([]), INVALID, ["names no device"]),
    "a second container without": (
        "Allocate",
        allocation([WELL], []),
        INVALID,
        ["names no device"],
    ),
    "an unknown ID": ("Allocate", allocation([WELL, "GPU-x::0"]), INVALID, ["'GPU-x::0'", "40"]),
    "a number too high": (
        "Allocate",
        allocation([f"{UUIDS[0]}::10"]),
        INVALID,
        [f"{UUIDS[0]}::10"],
    ),
    "another spelling": ("Allocate", allocation([f"{UUIDS[0]}::00"]), INVALID, [f"{UUIDS[0]}::00"]),
    "an empty ID": ("Allocate", allocation([""]), INVALID, ["''"]),
    "an ID in other letters": ("Allocate", allocation(["värld\n::0"]), INVALID, ["'värld\\n::0'"]),
    "the same ID twice": ("Allocate", allocation([WELL, WELL]), INVALID, [WELL, "more than once"]),
    "one ID for two containers": (
        "Allocate",
        allocation([WELL], [WELL]),
        INVALID,
        [WELL, "two containers"],
    ),
    "an unhealthy vGPU": (
        "Allocate",
        allocation([WELL, ILL]),
        UNAVAILABLE_NOW,
        [ILL, "unhealthy", "lost: fell off the bus"],
    ),
    "an unhealthy one in the second container": (
        "Allocate",
        allocation([WELL], [ILL]),
        UNAVAILABLE_NOW,
        [ILL, "lost: fell off the bus"],
    ),
    "more containers than vGPUs": ("Allocate", allocation(*MANY), INVALID, ["41", "40 vGPUs"]),
    "too many containers": ("Allocate", allocation(*[[WELL]] * 65), INVALID, ["65", "64"]),
    "too many containers, preferred": (
        "GetPreferredAllocation",
        preference([WELL], [], 1) * 65,
        INVALID,
        ["65 containers; 64 are allowed"],
    ),
    "too many IDs": ("Allocate", allocation([""] * 20_000), INVALID, ["more than 20000 fields"]),
    "too many IDs in all": (
        "Allocate",
        allocation(*[["x"] * 500] * 40),
        INVALID,
        ["more than 20000 fields"],
    ),
    "too many IDs to start with": ("PreStartContainer", start(*["x"] * 20_001), INVALID, ["20000"]),
    "a long ID": ("Allocate", allocation(["x" * 257]), INVALID, ["257 bytes; 256 are allowed"]),
    "a long ID to start with": (
        "PreStartContainer",
        start("x" * 2**20),
        INVALID,
        ["1048576 bytes"],
    ),
    "too many bytes": (
        "GetPreferredAllocation",
        preference(["x" * 2**22], [], 1),
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        ["more than 4194304 bytes"],
    ),
    "a negative size": (
        "GetPreferredAllocation",
        preference([WELL], [], -1),
        INVALID,
        ["allocation_size", "-1"],
    ),
    "no device to start with": ("PreStartContainer", start(), INVALID, ["names no device"]),
    "an ID of another form": ("PreStartContainer", start("7"), INVALID, ["'7'", "<GPU UUID>::"]),
    "a GPU that is not here": (
        "PreStartContainer",
        start(WELL, "GPU-x::0"),
        UNAVAILABLE_NOW,
        ["'GPU-x::0'", "not on this node"],
    ),
    "a GPU that is ill": (
        "PreStartContainer",
        start(WELL, ILL),
        UNAVAILABLE_NOW,
        [ILL, "lost: fell off the bus"],
    ),
}


TYPES = {
    "GetDevicePluginOptions": "Empty",
    "GetPreferredAllocation": "PreferredAllocationRequest",
    "Allocate": "AllocateRequest",
    "PreStartContainer": "PreStartContainerRequest",
}
WRONG_BYTES = {
    **{f"no message, {method}": (method, b"\x0a\xff") for method in TYPES},
    "a number where a message is, preferred": ("GetPreferredAllocation", b"\x08\x01"),
    "a number where a message is, allocate": ("Allocate", b"\x08\x01"),
    "a number where a text is": ("PreStartContainer", b"\x08\x01"),
    "a text where a number is": ("GetPreferredAllocation", b"\x0a\x03\x1a\x01\x61"),
    "no UTF-8, allocate": ("Allocate", b"\x0a\x04\x0a\x02\xff\xfe"),
    "no UTF-8, start": ("PreStartContainer", b"\x0a\x02\xff\xfe"),
}
REFUSED |= {
    case: (method, request, INVALID, ["cannot decode", TYPES[method]])
    for case, (method, request) in WRONG_BYTES.items()
}
REFUSED |= {
    f"a call without a message, {method}": (method, None, INVALID, ["the call carries no message"])
    for method in list(TYPES)[1:]
}


@pytest.mark.parametrize("case", REFUSED)
async def test_a_wrong_request_is_refused_in_words_and_changes_nothing(kubelet_dir, case):
    method, request, code, told = REFUSED[case]
    async with registered(kubelet_dir) as (kubelet, rig):
        rig.fail(3)
        await off_loop(kubelet.wait_list, 2)
        await rig.until(lambda snapshot: snapshot.lists_sent == 2)
        before = rig.node.snapshot
        answer = await rig.call(method, *([] if request is None else [request]))
        assert answer.code is code
        for words in told:
            assert words in answer.details
        assert rig.node.snapshot == before
        too_large = code is grpc.StatusCode.RESOURCE_EXHAUSTED  # ended from outside
        assert rig.observer.calls[-1] == (method, "CANCELLED" if too_large else code.name)
        assert all(seconds >= 0 for seconds in rig.observer.seconds)
        # The agent serves on.
        await off_loop(kubelet.allocate, [WELL])
        assert (kubelet.streams, len(kubelet.lists), kubelet.stream_ends) == (1, 2, [])


async def test_options_and_the_list_need_no_message(kubelet_dir):
    async with registered(kubelet_dir, gpus=1) as (kubelet, rig), channel_to(rig.path) as channel:
        answer = await rig.call("GetDevicePluginOptions")
        assert answer.code is grpc.StatusCode.OK
        assert dp.DevicePluginOptions.FromString(answer.response).pre_start_required
        stream = channel.stream_stream(LIST_AND_WATCH)(iter(()))
        assert await next_message(stream) == kubelet.lists[0].raw


async def test_a_list_asked_for_in_bytes_that_are_no_message_is_refused(kubelet_dir):
    async with registered(kubelet_dir, gpus=1) as (_, rig), channel_to(rig.path) as channel:
        stream = channel.unary_stream(LIST_AND_WATCH)(b"\x0a\xff")
        with pytest.raises(grpc.RpcError) as refused:
            await next_message(stream)
        assert refused.value.code() is INVALID
        assert "cannot decode Empty" in refused.value.details()


async def test_a_method_that_does_not_exist_is_unimplemented(kubelet_dir):
    async with registered(kubelet_dir, gpus=1) as (_, rig):
        assert (await rig.call("Deallocate", b"")).code is grpc.StatusCode.UNIMPLEMENTED


async def test_no_preference_at_all_is_answered_with_none(kubelet_dir):
    async with registered(kubelet_dir, gpus=1) as (_, rig):
        answer = await rig.call("GetPreferredAllocation", b"")
        assert (answer.code, answer.response) == (grpc.StatusCode.OK, b"")


# Unexpected errors


async def test_a_bug_in_a_call_is_internal_to_the_caller_and_ends_the_agent(
    kubelet_dir, monkeypatch, kubelet
):
    def broken(*_):
        raise RuntimeError("a bug")

    monkeypatch.setattr(plugin_module, "grant", broken)
    with pytest.RaisesGroup(pytest.RaisesExc(RuntimeError, match="a bug"), flatten_subgroups=True):
        async with agent(kubelet_dir) as rig:
            await rig.registered()
            with pytest.raises(grpc.RpcError) as failed:
                await off_loop(kubelet.allocate, [WELL])
            await anyio.sleep(10)  # cancelled
    assert failed.value.code() is grpc.StatusCode.INTERNAL
    assert "a bug" in failed.value.details()
    assert rig.observer.calls[-1] == ("Allocate", "INTERNAL")
    # Even so the kubelet is told: its devices are unhealthy, the socket is gone.
    assert (await off_loop(kubelet.wait_stream_ends, 1)).code is grpc.StatusCode.OK
    assert not (kubelet.directory / ENDPOINT).exists()


# The decoder

texts = st.lists(st.text(max_size=20), max_size=4)
REQUESTS = {
    v1beta1.Empty: st.builds(v1beta1.Empty),
    v1beta1.PreStartContainerRequest: st.builds(v1beta1.PreStartContainerRequest, texts),
    v1beta1.AllocateRequest: st.builds(
        v1beta1.AllocateRequest,
        st.lists(st.builds(v1beta1.ContainerAllocateRequest, texts), max_size=3),
    ),
    v1beta1.PreferredAllocationRequest: st.builds(
        v1beta1.PreferredAllocationRequest,
        st.lists(
            st.builds(
                v1beta1.ContainerPreferredAllocationRequest,
                texts,
                texts,
                st.integers(-(2**31), 2**31 - 1),
            ),
            max_size=3,
        ),
    ),
}


@tried(200)
@given(st.one_of(REQUESTS.values()))
def test_every_request_is_decoded(request_):
    assert codec.WireCodec().decode(bytes(request_), type(request_)) == request_


@tried(300)
@given(
    st.sampled_from(list(REQUESTS)),
    st.binary(max_size=60) | st.one_of(REQUESTS.values()).map(bytes),
)
def test_whatever_comes_is_decoded_or_the_callers_mistake(kind, data):
    try:
        codec.WireCodec().decode(data, kind)
    except GRPCError as error:
        assert error.status is Status.INVALID_ARGUMENT  # noqa: PT017 - or nothing at all


# The encoder


def whole_list(inventory):
    """The same list, made in one piece."""
    return v1beta1.ListAndWatchResponse(
        devices=[
            v1beta1.Device(
                id=vgpu,
                health="Healthy" if shared.healthy else "Unhealthy",
                **(
                    {}
                    if shared.gpu.numa_node is None
                    else {
                        "topology": v1beta1.TopologyInfo(
                            nodes=[v1beta1.NumaNode(id=shared.gpu.numa_node)]
                        )
                    }
                ),
            )
            for shared in inventory.gpus
            for vgpu in shared.device_ids
        ]
    )


@pytest.fixture
def encoded_gpus(monkeypatch):
    """The GPUs that were encoded, in each call."""
    seen, encode = [], codec._encode
    indices = {gpu.uuid: gpu.index for gpu in gpus_of(4)}

    def recording(gpus):
        seen.append([indices[uuid] for uuid, *_ in gpus])
        return encode(gpus)

    monkeypatch.setattr(codec, "_encode", recording)
    return seen


def inventory_of(*numbers, replicas=10, ill=()):
    gpus = gpus_of(4, numa=(0, 1, None, 300))
    return Inventory(
        tuple(
            SharedGpu(gpus[n], replicas, (LOST,) if n in ill else ()) for n in numbers or range(4)
        )
    )


async def test_the_joined_bytes_are_those_of_the_whole_list():
    encoder = ListEncoder()
    for inventory in (Inventory(), inventory_of(), inventory_of(ill=(0, 2)), inventory_of(3, 1)):
        assert await encoder.encode(inventory) == bytes(whole_list(inventory))


@pytest.mark.parametrize("length", [1, 127, 128, 200, 16_383, 16_384])
def test_a_field_of_any_length_is_encoded_as_protobuf_does(length):
    text = "x" * length
    assert wire.field(2, text.encode()) == dp.Device(health=text).SerializeToString()


ANSWERS = [
    v1beta1.AllocateResponse(),
    v1beta1.AllocateResponse(
        container_responses=[
            v1beta1.ContainerAllocateResponse(),
            v1beta1.ContainerAllocateResponse(
                envs={"A": "1", "EMPTY": "", "LONG": "ü" * 300},
                mounts=[
                    v1beta1.Mount(container_path="/in", host_path="/out"),
                    v1beta1.Mount(container_path="/in", host_path="/out", read_only=True),
                    v1beta1.Mount(),
                ],
                cdi_devices=[v1beta1.CdiDevice(name="nvidia.com/gpu=GPU-a"), v1beta1.CdiDevice()],
            ),
        ]
    ),
    v1beta1.PreferredAllocationResponse(),
    v1beta1.PreferredAllocationResponse(
        container_responses=[
            v1beta1.ContainerPreferredAllocationResponse(),
            v1beta1.ContainerPreferredAllocationResponse(device_i_ds=["a::0", "b" * 200, ""]),
        ]
    ),
]


@pytest.mark.parametrize("answer", ANSWERS, ids=lambda each: type(each).__name__)
def test_answers_that_are_encoded_field_by_field_mean_the_same_as_of_the_library(answer):
    theirs = getattr(dp, type(answer).__name__)
    encoded = codec.WireCodec().encode(answer, type(answer))
    assert theirs.FromString(encoded) == theirs.FromString(bytes(answer))


def test_what_is_never_granted_is_no_part_of_the_encoding_on_purpose():
    """Whoever grants device nodes or annotations one day has to encode them."""
    assert {f.name for f in dataclasses.fields(v1beta1.ContainerAllocateResponse)} == {
        *("envs", "mounts", "cdi_devices"),
        *("devices", "annotations"),
    }
    assert {f.name for f in dataclasses.fields(Grant)} == {"environment", "mounts", "cdi_devices"}


async def test_a_gpu_is_encoded_once_for_both_states_of_its_health(encoded_gpus):
    encoder = ListEncoder()
    well = await encoder.encode(inventory_of())
    assert await encoder.encode(inventory_of()) == well
    assert await encoder.encode(inventory_of(ill=(1,))) != well
    assert await encoder.encode(inventory_of(ill=(0, 1, 2, 3))) != well
    assert encoded_gpus == [[0, 1, 2, 3]]


async def test_only_a_gpu_that_is_new_or_differs_is_encoded(encoded_gpus):
    encoder = ListEncoder()
    await encoder.encode(inventory_of(0, 1))
    await encoder.encode(inventory_of(0, 1, 3))
    assert encoded_gpus == [[0, 1], [3]]
    await encoder.encode(inventory_of(0, 1, 3, replicas=7))
    assert encoded_gpus[2:] == [[0, 1, 3]]


async def test_the_encoder_forgets_gpus_that_are_gone(encoded_gpus):
    encoder = ListEncoder()
    await encoder.encode(inventory_of(0, 1, ill=(1,)))
    await encoder.encode(inventory_of(2))
    await encoder.encode(inventory_of(2, 0))
    assert encoded_gpus == [[0, 1], [2], [0]]


async def test_a_connection_that_lasts_does_not_grow_with_its_calls(kubelet_dir, monkeypatch):
    made, connect = [], ServedConnection.connection_made

    def connected(connection, transport):
        connect(connection, transport)
        made.append(connection.connection._connection)

    monkeypatch.setattr(ServedConnection, "connection_made", connected)

    def calls(kubelet, rig):
        for _ in range(400):
            kubelet.allocate(rig.ids(0, 0))

    async with registered(kubelet_dir) as (kubelet, rig):
        await off_loop(calls, kubelet, rig)
        most = max(made, key=lambda each: each.highest_inbound_stream_id)
        assert most.highest_inbound_stream_id > 2 * 400
        assert 0 < len(most._closed_streams) <= 256
