import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.model.strategies import a_gpu, ids, inventories, tried
from vgpu_agent.model.devices import (
    MAX_DEVICE_ID,
    Fault,
    Inventory,
    Reason,
    SharedGpu,
    device_id,
    split_device_id,
)

nvml_uuids = st.uuids().map(lambda uuid: f"GPU-{uuid}")


@given(nvml_uuids | st.text(min_size=1, max_size=20), st.integers(0, 10**9))
@tried(150)
def test_an_id_splits_into_what_it_was_made_of(uuid, replica):
    assert split_device_id(device_id(uuid, replica)) == (uuid, replica)


@given(st.text(alphabet=":019a+-_ \n\uff11\xb2", max_size=8))
@tried(300)
def test_no_vgpu_has_two_spellings(text):
    parts = split_device_id(text)
    assert parts is None or device_id(*parts) == text


@given(nvml_uuids, st.integers(1, 9999))
@tried(100)
def test_ids_of_real_gpus_fit_the_kubelet(uuid, replicas):
    assert MAX_DEVICE_ID == 63
    assert len(uuid) == 40
    assert len(device_id(uuid, replicas - 1)) <= MAX_DEVICE_ID


NUMBERS = ["01", "00", "-1", "-0", "+1", "1_0", "0x1", "1.0", "1::", "\uff11", "\xb2"]


@pytest.mark.parametrize(
    "text",
    ["", "::", "x", "x:1", "::1", "a::", "a::1 ", "a:: 1", "a::1\n", *(f"a::{n}" for n in NUMBERS)],
)
def test_what_is_no_id_of_ours_is_refused(text):
    assert split_device_id(text) is None


def test_a_number_with_thousands_of_digits_is_no_id_of_ours_rather_than_an_error():
    assert split_device_id("a::" + "9" * 5000) is None


def test_the_last_separator_counts():
    assert split_device_id("a::1::2") == ("a::1", 2)


@given(inventories())
@tried(60)
def test_every_id_leads_to_its_gpu(inventory):
    owners = [(vgpu, shared) for shared in inventory.gpus for vgpu in shared.device_ids]
    assert list(inventory.device_ids) == [vgpu for vgpu, _ in owners]
    assert len(dict(owners)) == sum(shared.replicas for shared in inventory.gpus)
    for vgpu, shared in owners:
        assert inventory.gpu_of(vgpu) is shared


@given(inventories(fewest=1))
@tried(60)
def test_numbers_beyond_a_gpus_last_vgpu_lead_nowhere(inventory):
    for shared in inventory.gpus:
        for number in (shared.replicas, shared.replicas + 1, 10**9):
            assert inventory.gpu_of(device_id(shared.gpu.uuid, number)) is None


@pytest.mark.parametrize("vgpu", ["gpu-0", "gpu-0::-1", "gpu-0::01", "gpu-1::0", "GPU-0::0", ""])
def test_ids_that_are_not_advertised_lead_nowhere(vgpu):
    assert Inventory((SharedGpu(a_gpu(0), 2),)).gpu_of(vgpu) is None


def test_gpus_are_found_by_uuid():
    one, other = SharedGpu(a_gpu(0), 2), SharedGpu(a_gpu(1), 2)
    inventory = Inventory((one, other))
    assert inventory.find("gpu-1") is other
    assert inventory.find("gpu-2") is None


def test_vgpus_are_numbered_from_zero():
    assert list(SharedGpu(a_gpu(7), 3).device_ids) == ids("gpu-7", 0, 1, 2)


def test_a_gpu_is_healthy_until_it_has_a_fault_and_says_all_of_them():
    shared = SharedGpu(a_gpu(0), 1)
    xid = Fault(Reason.XID, 0.0, "XID 79")
    lost = Fault(Reason.LOST, 0.0, "not on the bus")
    assert shared.healthy
    ill = SharedGpu(shared.gpu, 1, (xid, lost))
    assert not ill.healthy
    assert ill.fault_text == "xid: XID 79; lost: not on the bus"
