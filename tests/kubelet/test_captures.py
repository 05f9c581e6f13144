"""The bytes that a real kubelet sent to a plugin with these devices, played to ours."""

from tests.kubelet import capture
from tests.kubelet.rig import GIB, registered
from tests.kubelet_peer import off_loop
from tests.wire import dp
from vgpu_agent.model.devices import Gpu

UUIDS = [f"GPU-a000000{g}-1111-2222-3333-00000000000{g}" for g in range(4)]
GPUS = tuple(
    Gpu(
        uuid=uuid,
        index=index,
        model="Recorded",
        memory_bytes=16 * GIB,
        pci_bus_id=f"0000:0{index}:00.0",
        numa_node=0,
    )
    for index, uuid in enumerate(UUIDS)
)
IDS = {f"{uuid}::{n}" for uuid in UUIDS for n in range(10)}
METHODS = ["GetPreferredAllocation", "Allocate", "PreStartContainer"]


async def test_a_real_kubelets_calls_are_answered_right(kubelet_dir):
    async with registered(kubelet_dir, gpus=GPUS) as (kubelet, rig):
        calls = await off_loop(capture.replay, rig.path)
        observed = rig.observer.calls[1:]  # the first is that of the kubelet beside

    names = ["GetDevicePluginOptions", "ListAndWatch", *METHODS, *METHODS]
    assert [call.path.rpartition("/")[2] for call in calls] == names
    assert [call.status for call in calls] == [0, None, *[0] * 6]
    assert observed == [(name, "OK") for name in names if name != "ListAndWatch"]

    options, listed, *others = calls
    assert dp.DevicePluginOptions.FromString(options.response) == dp.DevicePluginOptions(
        pre_start_required=True, get_preferred_allocation_available=True
    )
    devices = dp.ListAndWatchResponse.FromString(listed.response).devices
    assert len(devices) == 40
    assert {device.ID for device in devices} == IDS
    assert {device.health for device in devices} == {"Healthy"}
    assert {tuple(node.ID for node in device.topology.nodes) for device in devices} == {(0,)}
    assert listed.response == kubelet.lists[0].raw

    for size, (preferred, allocate, start) in zip((1, 3), (others[:3], others[3:]), strict=True):
        check_preferred(preferred, size)
        check_allocate(allocate, size)
        assert set(dp.PreStartContainerRequest.FromString(start.request).devices_ids) <= IDS
        assert start.response == b""


def check_preferred(call, size):
    (asked,) = dp.PreferredAllocationRequest.FromString(call.request).container_requests
    (answer,) = dp.PreferredAllocationResponse.FromString(call.response).container_responses
    assert asked.allocation_size == len(answer.deviceIDs) == len(set(answer.deviceIDs)) == size
    assert set(answer.deviceIDs) <= set(asked.available_deviceIDs)
    assert len({vgpu.partition("::")[0] for vgpu in answer.deviceIDs}) == 1


def check_allocate(call, size):
    """The recorded request has the IDs that the plugin of the recording preferred."""
    (asked,) = dp.AllocateRequest.FromString(call.request).container_requests
    (answer,) = dp.AllocateResponse.FromString(call.response).container_responses
    assert len(asked.devices_ids) == size
    held = {vgpu.partition("::")[0] for vgpu in asked.devices_ids}
    on_gpus = [
        sum(vgpu.startswith(f"{uuid}::") for vgpu in asked.devices_ids)
        for uuid in UUIDS
        if uuid in held
    ]
    usable, first = 16 * GIB - GIB // 2, next(uuid for uuid in UUIDS if uuid in held)
    smallest = usable * min(on_gpus) // 10
    limits = [f"{n}={usable * count // 10 // 2**20}M" for n, count in enumerate(on_gpus)]
    assert answer.envs == {
        "NVIDIA_VISIBLE_DEVICES": ",".join(uuid for uuid in UUIDS if uuid in held),
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "VGPU_SHARE": ",".join(f"{count}/10" for count in on_gpus),
        "VGPU_MEMORY_BYTES": str(smallest),
        "VGPU_MEMORY_FRACTION": f"{smallest * 10_000 // (16 * GIB) / 10_000:.4f}",
        "CUDA_MPS_PIPE_DIRECTORY": f"/run/vgpu-agent/mps/{first}/pipe",
        "CUDA_MPS_PINNED_DEVICE_MEM_LIMIT": ",".join(limits),
        "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": str(10 * min(on_gpus)),
    }


async def test_the_agent_registers_again_when_the_recorded_kubelet_hangs_up(kubelet_dir):
    """Any end of a stream may be that of the kubelet's own."""
    async with registered(kubelet_dir, gpus=GPUS) as (kubelet, rig):
        await off_loop(capture.replay, rig.path)
        await rig.registered(2)
        await off_loop(kubelet.wait_list, 2)
        assert len(kubelet.allocatable) == 40
