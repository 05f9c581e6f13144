"""NvmlDriver against a fake libnvidia-ml.so.1, through the real pynvml."""

import dataclasses
import time
from typing import Any

import pytest

from tests.fake_nvml import XID_EVENTS, FakeGpu
from tests.mps.fixtures import eventually
from vgpu_agent.gpu.nvml.calls import bus_id

pytestmark = pytest.mark.slow

MIB = 1 << 20

NO_PERMISSION = 4
INSUFFICIENT_SIZE = 7
DRIVER_NOT_LOADED = 9
FUNCTION_NOT_FOUND = 13
GPU_IS_LOST = 15
VERSION_MISMATCH = 18
UNKNOWN = 999

L4 = FakeGpu("GPU-a")
SECOND = FakeGpu("GPU-b", bus="00000000:AF:00.0")


def uuids(scan: dict[str, Any]) -> list[str]:
    return [gpu["uuid"] for gpu in scan["gpus"]]


def test_without_the_library_says_what_is_missing(start):
    child = start(library=False)
    assert "libnvidia-ml.so.1 is not here" in child.ask("scan")["error"]
    assert child.ask("events", 1) == []
    assert child.ask("probe", "GPU-a")["lost"]


def test_a_driver_that_is_not_loaded_can_be_loaded_later(start, fake_nvml):
    child = start()
    fake_nvml.set_gpus(L4)
    for code, words in (
        (DRIVER_NOT_LOADED, "driver is not loaded"),
        (VERSION_MISMATCH, "different versions"),
        (4, "may not be opened"),
        (UNKNOWN, "Unknown Error"),
    ):
        fake_nvml.init_error(code)
        assert words in child.ask("scan")["error"]
    fake_nvml.init_error(None)
    assert uuids(child.ask("scan")) == ["GPU-a"]


def test_no_gpus_then_gpus(start, fake_nvml):
    child = start()
    scan = child.ask("scan")
    assert scan.pop("driver_version") == "570.1"
    assert not any(scan.values())
    fake_nvml.set_gpus(L4)
    assert uuids(child.ask("scan")) == ["GPU-a"]


def test_describes_gpus_with_their_numa_nodes(start, fake_nvml):
    fake_nvml.set_gpus(
        FakeGpu("GPU-a", bus="00000000:3B:00.0", numa=0),
        FakeGpu("GPU-b", bus="00000000:AF:00.0", numa=1),
        FakeGpu("GPU-c", bus="00000001:3B:00.0", numa=-1, memory_v2=False),
        FakeGpu("GPU-d", name="NVIDIA H100 80GB HBM3", bus="00000002:3B:00.0", cc=(9, 0)),
    )
    gpus = start().ask("scan")["gpus"]
    assert gpus[0] == {
        "uuid": "GPU-a",
        "index": 0,
        "model": "NVIDIA L4",
        "memory_bytes": 23034 * MIB,
        "pci_bus_id": "0000:3b:00.0",
        "reserved_bytes": 512 * MIB,
        "numa_node": 0,
        "compute_capability": [8, 9],
        "mig": False,
        "mps_contexts": 48,
    }
    assert [gpu["index"] for gpu in gpus] == [0, 1, 2, 3]
    assert [gpu["numa_node"] for gpu in gpus] == [0, 1, None, None]
    assert [gpu["reserved_bytes"] // MIB for gpu in gpus] == [512, 512, 0, 512]
    assert gpus[3]["model"] == "NVIDIA H100 80GB HBM3"
    assert gpus[3]["compute_capability"] == [9, 0]


def test_a_gpu_in_mig_mode_says_so(start, fake_nvml):
    fake_nvml.set_gpus(L4, FakeGpu("GPU-mig", mig=1), FakeGpu("GPU-whole", mig=0))
    scan = start().ask("scan")
    assert [gpu["mig"] for gpu in scan["gpus"]] == [False, True, False]
    assert scan["undescribed"] == []


@pytest.mark.parametrize("code", [4, 8, 11, 15, 999])
def test_a_gpu_without_a_handle_is_shown_and_joins_when_it_answers(start, fake_nvml, code):
    fake_nvml.set_gpus(L4, FakeGpu("GPU-b", handle_error=code))
    child = start()
    scan = child.ask("scan")
    assert uuids(scan) == ["GPU-a"]
    (silent,) = scan["undescribed"]
    assert (silent["gpu"]["uuid"], silent["gpu"]["index"], silent["reason"]) == ("", 1, "error")
    assert "index 1" in silent["detail"]
    fake_nvml.update("GPU-b", handle_error=0)
    assert uuids(child.ask("scan")) == ["GPU-a", "GPU-b"]
    # One that is known is not shown twice.
    fake_nvml.update("GPU-b", handle_error=code)
    assert child.ask("scan")["undescribed"] == []


DESCRIBING = {
    "DeviceGetHandleByIndex_v2": "handle",
    "DeviceGetUUID": "uuid",
    "DeviceGetName": "name",
    "DeviceGetPciInfo_v3": "pci address",
    "DeviceGetMemoryInfo_v2": "memory",
    "DeviceGetCudaComputeCapability": "compute capability",
    "DeviceGetMigMode": "mig mode",
}


@pytest.mark.parametrize("call", DESCRIBING)
def test_a_gpu_that_hangs_hides_no_other_whichever_call_it_is(start, fake_nvml, call):
    third = FakeGpu("GPU-c", bus="00000000:C0:00.0")
    child = start()
    fake_nvml.set_gpus(L4, dataclasses.replace(SECOND, hang=30, call=call), third)
    for _ in range(2):
        scan = child.ask("scan", 0.4)
        assert uuids(scan) == ["GPU-a", "GPU-c"]
        (silent,) = scan["undescribed"]
        assert (silent["gpu"]["index"], silent["reason"]) == (1, "timeout")
        assert f"index 1 does not answer ({DESCRIBING[call]})" in silent["detail"]
        assert child.ask("probe", "GPU-c")["error"] is None
    fake_nvml.update("GPU-b", hang=0)
    assert uuids(child.ask("scan")) == ["GPU-a", "GPU-b", "GPU-c"]
    # One that is known stays, and says so; a lost one beside it is lost.
    fake_nvml.update("GPU-b", hang=30)
    fake_nvml.update("GPU-c", lost=True)
    scan = child.ask("scan", 0.4)
    assert (uuids(scan), scan["silent"]) == (["GPU-a", "GPU-b"], {"GPU-b": DESCRIBING[call]})
    assert child.ask("probe", "GPU-c")["lost"]
    assert child.ask("probe", "GPU-b", 0.4)["hung"]
    fake_nvml.update("GPU-b", hang=0)
    fake_nvml.update("GPU-c", lost=False)
    assert uuids(child.ask("scan")) == ["GPU-a", "GPU-b", "GPU-c"]
    assert not child.ask("probe", "GPU-b")["hung"]


def test_gpus_that_are_slow_do_not_hang_and_are_not_waited_for_at_first(start, fake_nvml):
    slow = [FakeGpu(f"GPU-{n}", bus=f"00000000:{n + 1:02X}:00.0", hang=0.1) for n in range(16)]
    child = start()
    fake_nvml.set_gpus(L4, *slow)
    scan = child.ask("scan", 1.0, 0.5)
    assert uuids(scan) == ["GPU-a"]
    assert {each["reason"] for each in scan["undescribed"]} == {"timeout"}
    # All its calls together take longer than one may.
    assert len(uuids(child.ask("scan", 1.0))) == 17
    assert child.ask("probe", "GPU-3", 1.0)["error"] is None


@pytest.mark.parametrize(
    "call", ["InitWithFlags", "SystemGetDriverVersion", "DeviceGetCount_v2", "Shutdown"]
)
def test_a_call_that_concerns_all_gpus_and_hangs_is_an_error(start, fake_nvml, call):
    child = start(*(() if call == "InitWithFlags" else (L4,)))
    fake_nvml.set_gpus(L4)
    fake_nvml.system_hang(call)
    if call == "Shutdown":
        assert child.ask("release") is False
    for _ in range(2):
        assert "did not answer within 0.1 s" in child.ask("scan", 0.1)["error"]
    fake_nvml.system_hang("")
    time.sleep(0.1)
    assert uuids(child.ask("scan")) == ["GPU-a"]


@pytest.mark.parametrize("code", [4, 15, 999])
@pytest.mark.parametrize("call", ["DeviceGetMigMode", "DeviceGetCudaComputeCapability"])
def test_what_decides_about_a_gpu_is_not_guessed(start, fake_nvml, call, code):
    child = start()
    odd = dataclasses.replace(SECOND, mig=1, call=call, call_error=code)
    fake_nvml.set_gpus(L4, odd)
    scan = child.ask("scan")
    assert uuids(scan) == ["GPU-a"]
    assert [each["reason"] for each in scan["undescribed"]] == ["error"]
    fake_nvml.update("GPU-b", call_error=0)
    whole = child.ask("scan")
    assert whole["gpus"][1]["mig"]
    fake_nvml.update("GPU-b", call_error=code)
    assert child.ask("scan")["gpus"][1:] == (whole["gpus"][1:] if code != GPU_IS_LOST else [])
    fake_nvml.update("GPU-b", call_error=3)  # not offered, which is an answer
    assert uuids(child.ask("scan")) == ["GPU-a", "GPU-b"]


@pytest.mark.parametrize("code", [4, 10, 999])
def test_what_a_gpu_should_say_and_does_not_is_missing_until_it_does(start, fake_nvml, code):
    child = start(L4)
    for call, what in (
        ("DeviceGetTotalEccErrors", "ecc errors"),
        ("DeviceGetRemappedRows", "remapped rows"),
        ("DeviceGetComputeMode", "compute mode"),
        ("DeviceGetFieldValues", "recovery action"),
    ):
        fake_nvml.update("GPU-a", call=call, call_error=code)
        reading = child.ask("probe", "GPU-a")
        assert (list(reading["missing"]), reading["error"]) == ([what], None)
    fake_nvml.update("GPU-a", call_error=0)
    assert child.ask("probe", "GPU-a")["missing"] == {}


@pytest.mark.parametrize("call", ["DeviceGetSupportedEventTypes", "DeviceRegisterEvents"])
@pytest.mark.parametrize("code", [3, 15, 999])
def test_events_are_asked_for_again_unless_there_are_none(start, fake_nvml, call, code):
    child = start()
    fake_nvml.set_gpus(L4, dataclasses.replace(SECOND, call=call, call_error=code))
    child.ask("scan")
    child.ask("events", 1)
    assert list(child.ask("probe", "GPU-b")["missing"]) == ["events"]
    assert child.ask("probe", "GPU-a")["missing"] == {}
    fake_nvml.xid("GPU-a", 79)
    assert child.ask("events", 1) == [["XidEvent", "GPU-a", 79]]
    fake_nvml.update("GPU-b", call_error=0)
    child.ask("advance", 6)
    child.ask("events", 1)
    there = {} if code != 3 else {"events": "Not Supported"}
    assert child.ask("probe", "GPU-b")["missing"] == there
    fake_nvml.xid("GPU-b", 79)
    assert child.ask("events", 1) == ([] if there else [["XidEvent", "GPU-b", 79]])


def test_events_of_other_gpus_come_while_a_registration_hangs(start, fake_nvml):
    child = start()
    fake_nvml.set_gpus(L4, dataclasses.replace(SECOND, hang=30, call="DeviceRegisterEvents"))
    child.ask("scan")
    fake_nvml.xid("GPU-a", 79)
    assert child.ask("events", 9) == [["XidEvent", "GPU-a", 79]]
    assert child.ask("probe", "GPU-b", 0.1)["hung"]  # a call over its limit is a fault of its GPU
    fake_nvml.update("GPU-b", hang=0)


@pytest.mark.parametrize(
    "call", ["DeviceGetMemoryInfo_v2", "DeviceGetRemappedRows", "DeviceGetComputeMode"]
)
def test_a_registration_that_another_call_holds_up_is_made_when_the_gpu_answers(
    start, fake_nvml, call
):
    child = start(L4, SECOND)
    fake_nvml.update("GPU-b", hang=30, call=call)
    assert child.ask("probe", "GPU-b", 0.1)["hung"]
    child.ask("events", 9)
    fake_nvml.update("GPU-b", hang=0)
    eventually(lambda: not child.ask("probe", "GPU-b", 0.1)["hung"])
    assert "does not answer" in child.ask("probe", "GPU-b")["missing"]["events"]
    fake_nvml.xid("GPU-b", 79)  # the clock stands still
    assert child.ask("events", 1) == [["XidEvent", "GPU-b", 79]]


@pytest.mark.parametrize("code", [1, 3, 999])
def test_waits_for_events_that_fail_are_told_for_as_long_as_they_do(start, fake_nvml, code):
    child = start(L4)
    child.ask("events", 1)
    fake_nvml.wait_error(code)
    for _ in range(3):
        assert child.ask("events", 1) == []
        assert "the wait for events fails" in child.ask("probe", "GPU-a")["missing"]["events"]
    fake_nvml.wait_error(None)
    child.ask("advance", 30)
    child.ask("events", 2)
    assert child.ask("probe", "GPU-a")["missing"] == {}
    fake_nvml.xid("GPU-a", 79)
    assert child.ask("events", 1) == [["XidEvent", "GPU-a", 79]]


@pytest.mark.parametrize("code", [3, 13, 25])
def test_a_gpu_that_shares_the_hosts_memory_has_none_that_is_known(start, fake_nvml, code):
    child = start(dataclasses.replace(L4, error=code))
    (gpu,) = child.ask("scan")["gpus"]
    assert (gpu["memory_bytes"], gpu["reserved_bytes"]) == (None, 0)
    reading = child.ask("probe", "GPU-a")
    assert (reading["error"], reading["memory_used_bytes"]) == (None, None)
    fake_nvml.update("GPU-a", call="DeviceGetUUID", call_error=999)
    assert child.ask("probe", "GPU-a")["error"]


@pytest.mark.parametrize("memory", [0, 2**30 + 1, 2**44 - 2])
def test_a_gpu_with_memory_that_cannot_be_is_no_gpu_yet(start, fake_nvml, memory):
    child = start()
    fake_nvml.set_gpus(L4, dataclasses.replace(SECOND, memory=memory))
    (silent,) = child.ask("scan")["undescribed"]
    assert f"it has {memory * 2**20} bytes of memory" in silent["detail"]


def test_odd_text_and_two_of_one_uuid_cost_no_other_gpu(start, fake_nvml):
    odd = b"NVIDIA \xf8\x95\x8f\x8d".decode(errors="surrogateescape")
    gpus = [
        FakeGpu("GPU-b", name=odd),
        FakeGpu("GPU-d", name="x" * 95),
        FakeGpu("GPU-e"),
        FakeGpu("GPU-e"),
        FakeGpu(""),
        FakeGpu("N/A"),
        FakeGpu("GPU-\udcff"),
        FakeGpu("x" * 58),  # its vGPUs could not be named
        FakeGpu("x" * 57),
    ]
    fake_nvml.set_gpus(L4, *gpus)
    child = start()
    scan = child.ask("scan")
    assert uuids(scan) == ["GPU-a", "GPU-b", "GPU-d", "x" * 57]
    assert scan["gpus"][1]["model"] == "NVIDIA " + "\ufffd" * 4
    assert sorted(each["reason"] for each in scan["undescribed"]) == [
        *["duplicate"] * 2,
        *["error"] * 4,
    ]
    # Of one that is known already it is a fault.
    fake_nvml.set_gpus(L4, FakeGpu("GPU-a"))
    child.ask("release")
    assert uuids(child.ask("scan")) == []
    assert child.ask("probe", "GPU-a")["error"] == "several GPUs have this UUID"


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("00000000:3B:00.0", "0000:3b:00.0"),
        ("03F8CFDD:00:00.0", "3f8cfdd:00:00.0"),
        ("", ""),
        ("N/A", "N/A"),
        ("::", "::"),
    ],
)
def test_a_bus_id_is_as_sysfs_has_it_and_what_is_none_stays(written, expected):
    assert bus_id(written) == expected


def test_reads_a_gpu(start, fake_nvml):
    child = start(dataclasses.replace(L4, energy=1000))
    healthy = {
        "lost": False,
        "error": None,
        "hung": False,
        "uncorrectable_ecc": 0,
        "remap_failed": False,
        "remap_pending": False,
        "recovery_action": None,
        "compute_mode": 0,
        "memory_used_bytes": 0,
        "energy_millijoules": 1000,
        "missing": {},
    }
    assert child.ask("probe", "GPU-a") == healthy
    changed = {"ecc": 3, "remap_failed": 1, "remap_pending": 1, "action": 1, "used": 7}
    fake_nvml.update("GPU-a", **changed, compute_mode=3, energy=5000)
    assert child.ask("probe", "GPU-a") == {
        **healthy,
        "uncorrectable_ecc": 3,
        "remap_failed": True,
        "remap_pending": True,
        "recovery_action": 1,
        "memory_used_bytes": 7 * MIB,
        "compute_mode": 3,
        "energy_millijoules": 5000,
    }
    changed = dict.fromkeys(changed, 0)
    fake_nvml.update("GPU-a", **changed, compute_mode=0, energy=1000)
    assert child.ask("probe", "GPU-a") == {**healthy, "recovery_action": 0}


def test_what_a_gpu_does_not_offer_is_no_fault(start, fake_nvml):
    child = start()
    optional = ("ecc", "remap_failed", "remap_pending", "action", "compute_mode", "energy")
    missing = dict.fromkeys(optional)
    fake_nvml.set_gpus(FakeGpu("GPU-a", memory_v2=False, used=1, **missing))
    child.ask("scan")
    assert child.ask("probe", "GPU-a") == {
        "lost": False,
        "error": None,
        "hung": False,
        "uncorrectable_ecc": None,
        "remap_failed": None,
        "remap_pending": None,
        "recovery_action": None,
        "compute_mode": None,
        "energy_millijoules": None,
        "missing": {},
        "memory_used_bytes": 513 * MIB,  # the old call counts what is reserved
    }


def test_an_error_is_told_in_the_words_of_nvml(start, fake_nvml):
    child = start()
    fake_nvml.set_gpus(L4, FakeGpu("GPU-new", error=UNKNOWN))
    scan = child.ask("scan")
    fake_nvml.update("GPU-a", error=UNKNOWN)
    assert child.ask("probe", "GPU-a")["error"] == "nvmlDeviceGetMemoryInfo: Unknown Error"
    # A GPU that was described once stays what it is; one that never was is left out, and told.
    assert child.ask("scan") == scan
    assert uuids(scan) == ["GPU-a"]
    assert [(shared["gpu"]["uuid"], shared["reason"]) for shared in scan["undescribed"]] == [
        ("GPU-new", "error")
    ]


def test_a_lost_gpu_is_lost_to_probe_and_scan_until_it_is_back(start, fake_nvml):
    child = start(L4, SECOND)
    fake_nvml.update("GPU-a", lost=True)
    assert child.ask("probe", "GPU-a")["lost"]
    assert not child.ask("probe", "GPU-b")["lost"]
    scan = child.ask("scan")
    assert uuids(scan) == ["GPU-b"]
    assert [(each["gpu"]["uuid"], each["detail"][:15]) for each in scan["lost"]] == [
        ("GPU-a", "index 0 is lost")
    ]
    fake_nvml.update("GPU-b", lost=True)
    assert uuids(child.ask("scan")) == []
    fake_nvml.update("GPU-a", lost=False)
    scan = child.ask("scan")
    assert (uuids(scan), [each["gpu"]["index"] for each in scan["lost"]]) == (["GPU-a"], [1])


def test_a_gpu_that_is_lost_where_another_one_was_is_not_taken_for_that(start, fake_nvml):
    third = FakeGpu("GPU-c", bus="00000000:C0:00.0")
    child = start(L4, SECOND, third)
    fake_nvml.set_gpus(SECOND, third, dataclasses.replace(L4, uuid="GPU-d", lost=True))
    child.ask("release")
    scan = child.ask("scan")
    assert (uuids(scan), scan["lost"]) == (["GPU-b", "GPU-c"], [])
    (lost,) = scan["undescribed"]
    assert (lost["gpu"]["uuid"], lost["gpu"]["index"], lost["reason"]) == ("", 2, "error")


def test_where_all_are_lost_and_nvml_cannot_be_closed_that_is_said(start, fake_nvml):
    child = start(L4)
    fake_nvml.update("GPU-a", lost=True)
    fake_nvml.system_hang("Shutdown")
    assert [each["gpu"]["uuid"] for each in child.ask("scan", 0.1)["lost"]] == ["GPU-a"]
    assert "did not answer within 0.1 s" in child.ask("scan", 0.1)["error"]
    fake_nvml.update("GPU-a", lost=False)
    fake_nvml.system_hang("")
    eventually(lambda: uuids(child.ask("scan")) == ["GPU-a"])


def test_a_reset_gpu_is_lost_to_its_old_handle_and_found_by_the_next_scan(start, fake_nvml):
    child = start(L4, SECOND)
    child.ask("cancel", 0.05)  # long enough to register for events
    fake_nvml.update("GPU-a", epoch=1)
    assert child.ask("probe", "GPU-a")["lost"]
    assert uuids(child.ask("scan")) == ["GPU-a", "GPU-b"]
    assert not child.ask("probe", "GPU-a")["lost"]
    child.send("events", 3)
    fake_nvml.xid("GPU-a", 13)
    assert child.answer() == [["XidEvent", "GPU-a", 13]]
    # Between a probe and the next scan, which takes a new handle, it does not go unseen either.
    fake_nvml.update("GPU-a", epoch=2)
    assert child.ask("scan")["returned"] == ["GPU-a"]
    fake_nvml.update("GPU-a", handle_error=999)  # it stays as it was, and has not returned again
    assert child.ask("scan")["returned"] == []
    fake_nvml.update("GPU-a", handle_error=0)
    assert child.ask("scan")["returned"] == []


def test_a_gpu_that_was_added_is_seen_after_a_while(start, fake_nvml):
    child = start(L4)
    child.ask("advance", 31)
    assert uuids(child.ask("scan")) == ["GPU-a"]
    fake_nvml.set_gpus(L4, SECOND)
    assert uuids(child.ask("scan")) == ["GPU-a", "GPU-b"]
    assert not child.ask("probe", "GPU-b")["lost"]


def test_events_name_their_gpu_where_it_can_be_told(start, fake_nvml):
    fake_nvml.set_gpus(L4, SECOND, FakeGpu("GPU-mute", events=None))
    fake_nvml.xid("GPU-a", 31)  # of the past
    child = start()
    child.ask("scan")
    child.send("events", 5)
    fake_nvml.xid("GPU-b", 48)
    assert child.answer() == [["XidEvent", "GPU-b", 48]]
    child.send("events", 5)
    fake_nvml.xid(None, 79)
    assert child.answer() == [["XidEvent", None, 79]]
    # A GPU that is off the bus no longer says its name, but its event does.
    fake_nvml.update("GPU-a", lost=True)
    fake_nvml.xid("GPU-a", 79)
    fake_nvml.action_event("GPU-b")
    fake_nvml.xid("GPU-mute", 31)
    found = child.ask("events", 5)
    assert found == [["XidEvent", "GPU-a", 79], ["RecoveryActionChanged", "GPU-b"]]


def test_events_go_on_when_gpus_come_back_and_after_errors(start, fake_nvml):
    child = start(FakeGpu("GPU-a", events=XID_EVENTS), SECOND)
    child.ask("cancel", 0.05)
    fake_nvml.wait_error(GPU_IS_LOST)
    started = time.monotonic()
    assert child.ask("events", 1) == []
    assert time.monotonic() - started > 0.5  # it does not spin
    fake_nvml.wait_error(None)
    fake_nvml.update("GPU-b", lost=True)
    child.ask("scan")
    child.ask("cancel", 0.05)
    fake_nvml.update("GPU-b", lost=False)
    child.ask("scan")
    child.send("events", 5)
    fake_nvml.xid("GPU-b", 94)
    assert child.answer() == [["XidEvent", "GPU-b", 94]]


def test_waiting_without_any_events_takes_its_second(start):
    child = start(FakeGpu("GPU-a", events=0))
    started = time.monotonic()
    assert child.ask("events", 1) == []
    assert time.monotonic() - started > 0.9


def test_a_cancelled_wait_is_over_at_once_and_leaves_no_thread(start):
    child = start(L4)
    assert child.ask("cancel", 0.1) < 0.4
    assert child.end() < 1


def test_leaving_while_a_thread_waits_is_orderly(start, fake_nvml):
    # The fake library aborts if it is shut down under a waiting thread.
    child = start(L4)
    assert child.ask("leave") < 1
    assert child.ask("probe", "GPU-a")["lost"]
    assert uuids(child.ask("scan")) == ["GPU-a"]
    child.send("events", 5)
    fake_nvml.xid("GPU-a", 13)
    assert child.answer() == [["XidEvent", "GPU-a", 13]]


def test_a_call_that_hangs_costs_one_thread_and_no_time_of_the_loop(start, fake_nvml):
    child = start(L4, SECOND)
    fake_nvml.update("GPU-a", hang=60)
    found = child.ask("hang", "GPU-a", 0.1, 4)
    assert found["timeouts"] == 4
    assert found["ticks"] > 10
    assert found["threads"] <= 1
    assert child.ask("leave") < 2  # nor does it hold up the end
    fake_nvml.update("GPU-a", hang=0)
    child.ask("scan")
    assert not child.ask("probe", "GPU-b")["lost"]


def test_a_process_of_both_lists_is_one_with_the_larger_known_memory(start, fake_nvml):
    child = start(L4, SECOND)
    assert child.ask("processes", "GPU-a") == []
    assert child.ask("processes", "GPU-unknown") is None
    fake_nvml.update(
        "GPU-a",
        compute=((41, 512), (12, 30), (13, None), (14, 7)),
        mps=((12, 64), (13, 9), (14, None), (15, None), (16, 0)),
    )
    assert child.ask("processes", "GPU-a") == [
        [12, 64 * MIB],
        [13, 9 * MIB],
        [14, 7 * MIB],
        [15, None],
        [16, 0],
        [41, 512 * MIB],
    ]
    assert child.ask("processes", "GPU-b") == []
    fake_nvml.update("GPU-a", compute=tuple((pid, pid) for pid in range(1, 65)), mps=())
    assert child.ask("processes", "GPU-a") == [[pid, pid * MIB] for pid in range(1, 65)]


@pytest.mark.parametrize("process_v3", [True, False], ids=["v3", "v2"])
def test_processes_are_told_without_mps_or_by_older_calls(start, fake_nvml, process_v3):
    child = start(dataclasses.replace(L4, compute=((41, 512),), process_v3=process_v3))
    assert child.ask("processes", "GPU-a") == [[41, 512 * MIB]]
    fake_nvml.update("GPU-a", mps=None)
    assert child.ask("processes", "GPU-a") == [[41, 512 * MIB]]
    fake_nvml.update("GPU-a", mps_error=FUNCTION_NOT_FOUND)
    assert child.ask("processes", "GPU-a") == [[41, 512 * MIB]]


@pytest.mark.parametrize(
    "failure",
    [
        {"compute": None},
        {"compute_error": FUNCTION_NOT_FOUND},
        {"compute_error": NO_PERMISSION},
        {"compute_error": INSUFFICIENT_SIZE},  # more processes than room was made for
        {"compute_error": UNKNOWN},
        {"mps_error": NO_PERMISSION},
        {"mps_error": INSUFFICIENT_SIZE},
        {"lost": True},
        {"epoch": 1},
    ],
    ids=str,
)
def test_a_gpu_whose_processes_are_not_all_told_tells_none(start, fake_nvml, failure):
    child = start(dataclasses.replace(L4, compute=((41, 512),), mps=((42, 1),)))
    assert len(child.ask("processes", "GPU-a")) == 2
    fake_nvml.update("GPU-a", **failure)
    assert child.ask("processes", "GPU-a") is None


def test_asking_for_processes_does_not_open_what_was_let_go_of(start, fake_nvml):
    child = start()
    fake_nvml.set_gpus(dataclasses.replace(L4, compute=((41, 512),)))
    assert child.ask("processes", "GPU-a") is None
    child.ask("scan")
    assert child.ask("release")
    assert child.ask("processes", "GPU-a") is None
    assert child.ask("probe", "GPU-a")["lost"]  # it is still closed
    child.ask("scan")
    assert child.ask("processes", "GPU-a") == [[41, 512 * MIB]]


def test_a_list_of_processes_that_hangs_costs_one_thread_and_holds_up_no_probe(start, fake_nvml):
    child = start(L4, SECOND)
    child.ask("probe", "GPU-a")  # which leaves an idle thread
    fake_nvml.update("GPU-a", list_hang=60)
    found = child.ask("hang", "GPU-a", 0.1, 4, "processes")
    assert found["timeouts"] == 4
    assert found["ticks"] > 10
    assert found["threads"] <= 1
    assert child.ask("hang", "GPU-a", 10, 1, "probe")["timeouts"] == 0
    assert child.ask("processes", "GPU-b") == []
    fake_nvml.update("GPU-a", list_hang=0)
    assert child.ask("processes", "GPU-a") == []
