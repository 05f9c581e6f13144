import re
from contextlib import nullcontext
from dataclasses import replace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.model.strategies import a_gpu, a_shared_gpu, ids, inventories, tried
from vgpu_agent.errors import InvalidRequestError, UnavailableDeviceError
from vgpu_agent.model.container import Mount, check_devices, check_start, grant
from vgpu_agent.model.devices import Fault, Inventory, Reason, SharedGpu
from vgpu_agent.model.limits import LimitsLook
from vgpu_agent.model.rules import MIB, DeviceList, MpsDaemons, MpsLimits, SharingRules, Threads

SHM = "/dev/shm/vgpu-agent"


def pipe(name: str) -> str:
    """Of the daemon of that name."""
    return f"/run/vgpu-agent/mps/{name}/pipe"


MPS = SharingRules()
TIME_SLICING = SharingRules(mps=False)

L4 = "GPU-5d2ef1a4-0a3c-4b9e-8f6c-2f7f5c1b9e10"
GPU = a_gpu(0, uuid=L4, memory_bytes=23034 * MIB, reserved_bytes=438 * MIB)

ONE_GPU = Inventory((a_shared_gpu(GPU, 10, reserved=300 * MIB),))
"""22296 MiB of it are usable."""


def by_mps(threads: Threads | float = Threads.SHARE, *, shm: str | None = SHM) -> SharingRules:
    return SharingRules(mps_threads=threads, mps_shm_directory=shm)


# One GPU


@pytest.mark.parametrize(
    ("vgpus", "share", "memory", "fraction", "limit", "percentage"),
    [
        (1, "1/10", "2337905049", "0.0967", "0=2229M", "10"),
        (2, "2/10", "4675810099", "0.1935", "0=4459M", "20"),
        (10, "10/10", "23379050496", "0.9679", "0=22296M", "100"),
    ],
)
def test_under_mps_a_container_is_told_its_share(vgpus, share, memory, fraction, limit, percentage):
    got = grant(ONE_GPU, ids(L4, *range(vgpus)), MPS)
    assert got.environment == {
        "NVIDIA_VISIBLE_DEVICES": L4,
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "VGPU_SHARE": share,
        "VGPU_MEMORY_BYTES": memory,
        "VGPU_MEMORY_FRACTION": fraction,
        "CUDA_MPS_PIPE_DIRECTORY": pipe(L4),
        "CUDA_MPS_PINNED_DEVICE_MEM_LIMIT": limit,
        "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": percentage,
    }
    assert got.mounts == (
        Mount(pipe(L4), pipe(L4), read_only=False),
        Mount(f"{SHM}/shared", "/dev/shm", read_only=False),
    )


def test_under_time_slicing_nothing_of_mps_is_given():
    got = grant(Inventory((a_shared_gpu(GPU, 10),)), ids(L4, 3, 7), TIME_SLICING)
    assert got.environment == {
        "NVIDIA_VISIBLE_DEVICES": L4,
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "VGPU_SHARE": "2/10",
        "VGPU_MEMORY_BYTES": "4738724659",
        "VGPU_MEMORY_FRACTION": "0.1961",
    }
    assert got.mounts == ()


def test_without_shared_memory_directory_the_container_keeps_its_own():
    assert grant(ONE_GPU, ids(L4, 0), by_mps(shm=None)).mounts == (Mount(pipe(L4), pipe(L4)),)


def test_a_share_of_memory_that_is_not_known_is_not_told():
    shared = Inventory((replace(a_shared_gpu(GPU, 10), usable_bytes=None), *THREE_GPUS.gpus))
    for names in (ids(L4, 0, 1), ids(L4, 0) + ids("large", 1)):
        got = grant(shared, names, SharingRules(mps=False)).environment
        assert {name for name in got if name.startswith("VGPU_")} == {"VGPU_SHARE"}


# Limits by the driver

REQUEST, LIMIT = "NVIDIA_GPU_MEMORY_REQUEST", "NVIDIA_GPU_MEMORY_LIMIT"


@pytest.mark.parametrize(
    ("limits", "rules", "told", "share"),
    [
        # CUDA shows the whole GPU where MPS limits too, or where nobody is sure of the hook.
        (LimitsLook(), MPS, {REQUEST: "0", LIMIT: "4459"}, "0.1935"),
        (LimitsLook(certain=True), MPS, {REQUEST: "0", LIMIT: "4459"}, "0.1935"),
        (LimitsLook(), TIME_SLICING, {REQUEST: "0", LIMIT: "4459"}, "0.1935"),
        (LimitsLook(certain=True), TIME_SLICING, {REQUEST: "0", LIMIT: "4459"}, "0.8134"),
        (
            LimitsLook(certain=True),
            SharingRules(mps_limits=MpsLimits.NONE),
            {REQUEST: "0", LIMIT: "4459"},
            "0.8995",
        ),
        (
            LimitsLook(enforced=True),
            replace(TIME_SLICING, memory_guarantee=True),
            {REQUEST: "4459", LIMIT: "4459"},
            "0.1935",
        ),
        # The hook would keep the container from starting, or nobody knows.
        (None, TIME_SLICING, {}, "0.1935"),
        (LimitsLook("cgroup v1", certain=True), TIME_SLICING, {}, "0.1935"),
        (LimitsLook(hook="not known", certain=True), TIME_SLICING, {}, "0.1935"),
        (LimitsLook(hook="not known", enforced=True), TIME_SLICING, {}, "0.1935"),
        (LimitsLook(gpus={L4: "MIG"}), TIME_SLICING, {}, "0.1935"),
    ],
)
def test_the_toolkits_hook_is_told_the_share_where_it_cannot_fail(limits, rules, told, share):
    got = grant(ONE_GPU, ids(L4, 0, 1), rules, limits).environment
    assert {name: value for name, value in got.items() if name in (REQUEST, LIMIT)} == told
    assert got["VGPU_MEMORY_FRACTION"] == share
    assert got["VGPU_MEMORY_BYTES"] == "4675810099"


def test_of_several_gpus_the_hook_is_told_the_smallest_share_and_of_unknown_memory_none():
    several = grant(THREE_GPUS, [*ids("large", 0), *ids("small", 0)], TIME_SLICING, LimitsLook())
    assert several.environment[LIMIT] == "250"
    unknown = Inventory((replace(a_shared_gpu(GPU, 10), usable_bytes=None),))
    assert LIMIT not in grant(unknown, ids(L4, 0), TIME_SLICING, LimitsLook()).environment


def test_a_share_smaller_than_a_context_leaves_a_fraction():
    small = Inventory((a_shared_gpu(GPU, 48),))
    got = grant(small, ids(L4, 0), TIME_SLICING, LimitsLook(certain=True)).environment
    assert got["VGPU_MEMORY_FRACTION"] == "0.1000"


# Several GPUs

LARGE = a_gpu(0, uuid="large", memory_bytes=4000 * MIB, pci_bus_id="00000000:0B:00.0")
SMALL = a_gpu(1, uuid="small", memory_bytes=1000 * MIB, pci_bus_id="00000000:0a:00.0")
UNUSED = a_gpu(2, uuid="unused", memory_bytes=1000 * MIB, pci_bus_id="00000000:01:00.0")
THREE_GPUS = Inventory((a_shared_gpu(LARGE, 10), a_shared_gpu(SMALL, 4), a_shared_gpu(UNUSED, 4)))


def test_several_gpus_are_told_in_pci_order_and_so_are_their_limits():
    got = grant(THREE_GPUS, [*ids("large", 9, 0, 5), *ids("small", 1)], by_mps())
    assert got.environment == {
        "NVIDIA_VISIBLE_DEVICES": "small,large",
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "VGPU_SHARE": "1/4,3/10",
        "VGPU_MEMORY_BYTES": str(250 * MIB),
        "VGPU_MEMORY_FRACTION": "0.2500",
        "CUDA_MPS_PIPE_DIRECTORY": pipe("small"),
        "CUDA_MPS_PINNED_DEVICE_MEM_LIMIT": "0=250M,1=1200M",
        "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": "25",
    }


def test_one_number_for_several_gpus_is_the_smallest_of_each_kind():
    got = grant(THREE_GPUS, [*ids("large", 0), *ids("small", 0, 1, 2)], by_mps()).environment
    assert got["VGPU_MEMORY_BYTES"] == str(400 * MIB)
    assert got["VGPU_MEMORY_FRACTION"] == "0.1000"
    assert got["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"] == "10"


@given(inventories(fewest=1, healthy=True), st.data())
@tried(60)
def test_ordinals_of_limits_match_the_places_of_the_gpus(inventory, data):
    vgpus = data.draw(st.lists(st.sampled_from(list(inventory.device_ids)), min_size=1))
    environment = grant(inventory, list(dict.fromkeys(vgpus)), by_mps()).environment
    visible = environment["NVIDIA_VISIBLE_DEVICES"].split(",")
    limits = environment["CUDA_MPS_PINNED_DEVICE_MEM_LIMIT"].split(",")
    buses = [inventory.find(uuid).gpu.pci_bus_id for uuid in visible]
    assert buses == sorted(buses)
    assert set(visible) == {inventory.gpu_of(vgpu).gpu.uuid for vgpu in vgpus}
    for ordinal, (uuid, limit) in enumerate(zip(visible, limits, strict=True)):
        shared = inventory.find(uuid)
        held = sum(inventory.gpu_of(vgpu) is shared for vgpu in set(vgpus))
        usable = shared.usable_bytes
        assert limit == f"{ordinal}={usable * held // shared.replicas // MIB}M"


# Threads


def percentage(vgpus: int, of: int, threads: Threads | float) -> str | None:
    inventory = Inventory((a_shared_gpu(GPU, of),))
    environment = grant(inventory, ids(L4, *range(vgpus)), by_mps(threads)).environment
    return environment.get("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE")


@pytest.mark.parametrize(
    ("vgpus", "of", "factor", "expected"),
    [
        (1, 10, Threads.NONE, None),
        # A factor multiplies the share, within 1 and 100.
        (1, 10, 1, "10"),
        (1, 10, 1.5, "15"),
        (2, 10, 2.0, "40"),
        (6, 10, 2, "100"),
        (10, 10, 1.0, "100"),
        (1, 10, 1e6, "100"),
        (10, 10, 0.005, "1"),
        (1, 10, 0.01, "1"),
        (1, 200, 1, "1"),
        # The share itself, not its rounded percentage.
        (1, 3, 3, "100"),
        (1, 60, 6, "10"),
        (1, 48, 1.5, "3"),
        # It is as exact as it is written.
        (10, 10, 0.29, "29"),
        (10, 10, 0.57, "57"),
        (10, 10, 0.58, "58"),
    ],
)
def test_threads_are_limited_by_a_factor_of_the_share(vgpus, of, factor, expected):
    assert percentage(vgpus, of, factor) == expected


@given(st.integers(1, 300), st.floats(0.001, 1e6))
@example(of=300, factor=0.001)
@tried(60)
def test_a_percentage_of_threads_is_one_that_mps_takes(of, factor):
    assert 1 <= int(percentage(1, of, factor)) <= 100


# What is refused

ILL = SharedGpu(
    a_gpu(3, uuid="ill"),
    2,
    (Fault(Reason.XID, 0.0, "XID 79"), Fault(Reason.LOST, 0.0, "not on the bus")),
)
NODE = Inventory((a_shared_gpu(LARGE, 10), ILL))


@pytest.mark.parametrize(
    ("vgpus", "error", "message"),
    [
        ([], InvalidRequestError, "the request names no device"),
        *(
            (
                ["large::0", unknown],
                InvalidRequestError,
                f"device {unknown!r} is not one of the 12 vGPUs of this node",
            )
            for unknown in ("large::10", "large::01", "large", "elsewhere::0", "")
        ),
        (
            ["large::0", "large::4", "large::4"],
            InvalidRequestError,
            "device 'large::4' is requested more than once",
        ),
        (
            ["large::0", "ill::1"],
            UnavailableDeviceError,
            "device 'ill::1' is unhealthy: xid: XID 79; lost: not on the bus",
        ),
    ],
)
def test_what_cannot_be_given_is_refused_by_name(vgpus, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        grant(NODE, vgpus, MPS)


@pytest.mark.parametrize("sharing", [MPS, TIME_SLICING], ids=["mps", "time-slicing"])
def test_a_fault_of_one_gpu_does_not_keep_others_from_being_given(sharing):
    assert grant(NODE, ["large::0"], sharing).environment["NVIDIA_VISIBLE_DEVICES"] == "large"


def test_checked_devices_come_with_their_gpus_in_the_order_of_the_request():
    assert check_devices(THREE_GPUS, ["small::0", "large::1", "small::1"]) == [
        THREE_GPUS.gpus[1],
        THREE_GPUS.gpus[0],
        THREE_GPUS.gpus[1],
    ]


# What may start again


def test_a_container_starts_again_with_a_vgpu_that_is_no_longer_made():
    check_start(NODE, ["large::0", "large::99"], SharingRules())


def test_on_a_cordoned_gpu_no_pod_begins_and_what_is_there_starts_again():
    cordon, lost = Fault(Reason.CORDONED, 0.0, "fan"), Fault(Reason.LOST, 0.0, "away")
    cordoned = Inventory((replace(ONE_GPU.gpus[0], faults=(cordon,)),))
    check_start(cordoned, [f"{L4}::0"], SharingRules())
    with pytest.raises(UnavailableDeviceError, match=r"is unhealthy: cordoned: fan$"):
        check_devices(cordoned, [f"{L4}::0"])
    both = Inventory((replace(ONE_GPU.gpus[0], faults=(lost, cordon)),))
    with pytest.raises(UnavailableDeviceError, match=r"is unhealthy: lost: away$"):
        check_start(both, [f"{L4}::0"], SharingRules())


@pytest.mark.parametrize(
    ("vgpus", "error", "message"),
    [
        ([], InvalidRequestError, "the request names no device"),
        (
            ["large::0", "large::x"],
            InvalidRequestError,
            "device 'large::x' is not of the form <GPU UUID>::<number>",
        ),
        (
            ["large::0", "gone::1"],
            UnavailableDeviceError,
            "device 'gone::1': its GPU is not on this node",
        ),
        (
            ["large::0", "ill::7"],
            UnavailableDeviceError,
            "device 'ill::7' is unhealthy: xid: XID 79; lost: not on the bus",
        ),
    ],
)
def test_a_container_does_not_start_without_its_gpus(vgpus, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        check_start(NODE, vgpus, SharingRules())


@pytest.mark.parametrize(
    ("vgpus", "rules", "starts"),
    [
        (["large::0", "large::5"], {}, True),
        (["large::0", "small::1"], {}, False),  # the kubelet gave what no process can use
        (["large::0", "small::1"], {"mps_daemons": MpsDaemons.NODE}, True),
        (["large::0", "small::1"], {"mps": False}, True),
    ],
)
def test_a_container_of_several_mps_daemons_does_not_start(vgpus, rules, starts):
    with nullcontext() if starts else pytest.raises(UnavailableDeviceError, match="DAEMONS=node"):
        check_start(THREE_GPUS, vgpus, SharingRules(**rules))


@pytest.mark.parametrize(
    ("uuid", "name"),
    [
        (L4, L4),
        ("GPU-../../etc", "GPU-______etc"),
        ("GPU-\ufffd\n", "GPU-__"),
        ("G" * 99, "G" * 40),
    ],
)
def test_the_name_of_a_daemon_is_one_of_a_directory(uuid, name):
    assert SharingRules().daemon_of(uuid) == name
    assert SharingRules(mps_daemons=MpsDaemons.NODE).daemon_of(uuid) == "node"


# Same request, same answer

sharings = st.builds(
    SharingRules,
    mps=st.booleans(),
    mps_shm_directory=st.sampled_from([None, SHM]),
    mps_threads=st.sampled_from(Threads) | st.floats(0.1, 10),
)


@given(inventories(fewest=1, healthy=True), sharings, st.data())
@tried(60)
def test_the_order_of_a_request_and_of_the_gpus_does_not_matter(inventory, sharing, data):
    vgpus = data.draw(
        st.lists(st.sampled_from(list(inventory.device_ids)), min_size=1, unique=True)
    )
    shuffled = Inventory(tuple(data.draw(st.permutations(inventory.gpus))))
    again = data.draw(st.permutations(vgpus))
    got = grant(inventory, vgpus, sharing)
    assert grant(shuffled, again, sharing) == got
    # Equal as text too: what is sent must not depend on the order either.
    assert list(grant(shuffled, again, sharing).environment) == list(got.environment)


def test_an_answer_cannot_be_changed_by_who_holds_it():
    with pytest.raises(TypeError):
        grant(ONE_GPU, ids(L4, 0), MPS).environment["CUDA_VISIBLE_DEVICES"] = "0"


# All containers of one GPU


@given(
    inventories(fewest=1, most=1, healthy=True),
    st.lists(st.integers(0, 3), min_size=12, max_size=12),
)
@tried(100)
def test_limits_of_all_containers_of_a_gpu_stay_within_what_is_usable(inventory, owners):
    (shared,) = inventory.gpus
    groups: dict[int, list[str]] = {}
    for owner, vgpu in zip(owners, shared.device_ids, strict=False):
        groups.setdefault(owner, []).append(vgpu)
    told = [grant(inventory, group, MPS).environment for group in groups.values()]
    limits = [
        int(environment["CUDA_MPS_PINNED_DEVICE_MEM_LIMIT"].removeprefix("0=").removesuffix("M"))
        for environment in told
    ]
    assert sum(limits) * MIB <= shared.usable_bytes
    assert sum(int(environment["VGPU_MEMORY_BYTES"]) for environment in told) <= shared.usable_bytes
    assert sum(int(e["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"]) for e in told) <= 100


# Other ways to be told


def test_with_limits_in_the_daemon_a_client_is_told_none_and_a_container_has_one_vgpu():
    sharing = SharingRules(mps_limits=MpsLimits.SERVER)
    environment = grant(ONE_GPU, ids(L4, 3), sharing).environment
    assert environment["CUDA_MPS_PIPE_DIRECTORY"] == pipe(L4)
    assert not [name for name in environment if "LIMIT" in name or "PERCENTAGE" in name]
    assert environment["VGPU_SHARE"] == "1/10"
    with pytest.raises(InvalidRequestError, match=r"2 vGPUs .* VGPU_MPS_LIMITS=server"):
        grant(ONE_GPU, ids(L4, 0, 1), sharing)


def test_without_limits_a_client_is_told_none_however_many_vgpus_it_has():
    sharing = SharingRules(mps_limits=MpsLimits.NONE)
    environment = grant(ONE_GPU, ids(L4, *range(10)), sharing).environment
    assert [name for name in environment if name.startswith("CUDA_MPS")] == [
        "CUDA_MPS_PIPE_DIRECTORY"
    ]


FOLDER = "/var/run/nvidia-container-devices"


@pytest.mark.parametrize(
    ("sharing", "visible", "cdi_devices", "mounts"),
    [
        (
            SharingRules(mps=False, device_list=DeviceList.VOLUME_MOUNTS),
            FOLDER,
            (),
            (Mount("/dev/null", f"{FOLDER}/{L4}"),),
        ),
        # The runtime adds none then.
        (
            SharingRules(mps=False, device_list=DeviceList.CDI, cdi_kind="example.com/GPU"),
            "void",
            (f"example.com/GPU={L4}",),
            (),
        ),
        (
            SharingRules(mps=False, device_list=DeviceList.CDI_ENVVAR),
            L4,
            (f"nvidia.com/gpu={L4}",),
            (),
        ),
    ],
    ids=["mounts", "CDI", "CDI and variable"],
)
def test_gpus_are_named_otherwise_than_by_the_variable(sharing, visible, cdi_devices, mounts):
    granted = grant(ONE_GPU, ids(L4, 0, 1), sharing)
    assert granted.environment["NVIDIA_VISIBLE_DEVICES"] == visible
    assert (granted.cdi_devices, granted.mounts) == (cdi_devices, mounts)


def test_a_vgpu_of_a_size_has_that_size_and_two_have_twice_as_much():
    inventory = Inventory((SharedGpu(GPU, 3, usable_bytes=6500 * MIB, vgpu_bytes=2000 * MIB),))
    for count in (1, 2):
        environment = grant(inventory, ids(L4, *range(count)), by_mps()).environment
        assert environment["VGPU_MEMORY_BYTES"] == str(count * 2000 * MIB)
        assert environment["CUDA_MPS_PINNED_DEVICE_MEM_LIMIT"] == f"0={count * 2000}M"
        assert environment["VGPU_SHARE"] == f"{count}/3"


# What the daemon was set up for


CLIENT, SERVER, NONE = MpsLimits.CLIENT, MpsLimits.SERVER, MpsLimits.NONE


@pytest.mark.parametrize(
    ("wanted", "applied", "holds"),
    [
        (CLIENT, None, CLIENT),
        (CLIENT, NONE, CLIENT),
        (NONE, CLIENT, NONE),
        (SERVER, SERVER, SERVER),
        (CLIENT, SERVER, SERVER),
        (NONE, SERVER, SERVER),
        (SERVER, CLIENT, CLIENT),
        (SERVER, NONE, NONE),
    ],
)
def test_what_the_daemon_was_set_up_for_holds_where_it_has_limits_of_its_own(
    wanted, applied, holds
):
    rules = SharingRules(mps_limits=wanted)
    assert rules.with_applied_limits(applied) == SharingRules(mps_limits=holds)
