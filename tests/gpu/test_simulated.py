import time

import anyio
import pytest

from vgpu_agent.gpu.simulated import DRIVER_VERSION, SimulatedDriver, simulated_gpus
from vgpu_agent.model.devices import MAX_DEVICE_ID, device_id
from vgpu_agent.model.facts import Reading, Scan, XidEvent
from vgpu_agent.model.holders import GpuProcess

GIB = 1 << 30
WELL = Reading(memory_used_bytes=0, uncorrectable_ecc=0)
LOST = Reading(lost=True)

GPUS = simulated_gpus(2, "NVIDIA Simulated 24GB", 24 * GIB, (0, 1))
ONE, TWO = (shared.uuid for shared in GPUS)


@pytest.fixture
def driver() -> SimulatedDriver:
    return SimulatedDriver(GPUS)


# GPUs


def test_gpus_are_the_same_every_time_and_differ_from_each_other():
    gpus = simulated_gpus(64, "A GPU", GIB, (0,))
    assert gpus == simulated_gpus(64, "A GPU", GIB, (0,))
    assert [shared.index for shared in gpus] == list(range(64))
    assert len({shared.uuid for shared in gpus}) == 64
    assert len({shared.pci_bus_id for shared in gpus}) == 64
    assert {(shared.model, shared.memory_bytes) for shared in gpus} == {("A GPU", GIB)}


def test_gpus_are_on_the_numa_nodes_in_turn():
    gpus = simulated_gpus(5, "A GPU", GIB, (0, None, 3))
    assert [shared.numa_node for shared in gpus] == [0, None, 3, 0, None]


def test_ids_of_vgpus_fit_into_what_the_kubelet_takes():
    (shared,) = simulated_gpus(64, "A GPU", GIB, (0,))[-1:]
    assert len(device_id(shared.uuid, 1023)) <= MAX_DEVICE_ID


async def test_a_machine_may_have_no_gpu():
    driver = SimulatedDriver(simulated_gpus(0, "A GPU", GIB, (0,)))
    assert await driver.scan() == Scan(DRIVER_VERSION, ())
    assert await driver.probe(["GPU-unknown"]) == {"GPU-unknown": LOST}


# Handles


async def test_a_gpu_answers_only_from_a_handle_of_a_scan(driver):
    assert await driver.probe([ONE]) == {ONE: LOST}
    assert await driver.scan() == Scan(DRIVER_VERSION, GPUS)
    assert await driver.probe([ONE, TWO]) == {ONE: WELL, TWO: WELL}
    assert await driver.probe(["GPU-unknown"]) == {"GPU-unknown": LOST}


async def test_a_gpu_that_falls_off_the_bus_is_lost_until_it_has_a_new_handle(driver):
    await driver.scan()
    driver.xid(ONE, 79, falls_off_the_bus=True)
    assert await driver.probe([ONE, TWO]) == {ONE: LOST, TWO: WELL}
    assert (await driver.scan()).gpus == GPUS[1:]
    assert await driver.probe([ONE]) == {ONE: LOST}
    driver.enumerate_again(ONE)
    assert await driver.probe([ONE, TWO]) == {ONE: LOST, TWO: WELL}
    assert (await driver.scan()).gpus == GPUS
    assert await driver.probe([ONE, TWO]) == {ONE: WELL, TWO: WELL}


async def test_every_reset_voids_the_handles_of_a_gpu_that_never_left(driver):
    for _ in range(3):
        assert (await driver.scan()).gpus == GPUS
        assert await driver.probe([ONE]) == {ONE: WELL}
        driver.enumerate_again(ONE)
        assert await driver.probe([ONE]) == {ONE: LOST}


# Faults


async def test_probes_fail_until_they_are_told_to_pass_or_the_gpu_is_reset(driver):
    await driver.scan()
    driver.fail_probes(ONE, "it does not like it")
    for _ in range(2):
        assert (await driver.probe([ONE]))[ONE].error == "it does not like it"
    assert await driver.probe([TWO]) == {TWO: WELL}
    driver.fail_probes(ONE, None)
    assert await driver.probe([ONE]) == {ONE: WELL}
    driver.fail_probes(ONE, "again")
    driver.enumerate_again(ONE)
    await driver.scan()
    assert await driver.probe([ONE]) == {ONE: WELL}


async def test_an_unknown_gpu_cannot_fail(driver):
    with pytest.raises(KeyError):
        driver.fail_probes("GPU-unknown", "x")
    with pytest.raises(KeyError):
        driver.enumerate_again("GPU-unknown")


# Events


async def test_events_come_once_and_in_order(driver):
    driver.xid(ONE, 13)
    driver.xid(None, 8)
    driver.xid(TWO, 79)
    assert list(await driver.next_events()) == [
        XidEvent(ONE, 13),
        XidEvent(None, 8),
        XidEvent(TWO, 79),
    ]
    driver.xid(ONE, 31)
    assert list(await driver.next_events()) == [XidEvent(ONE, 31)]


async def test_an_event_wakes_whoever_waits(driver):
    async with anyio.create_task_group() as tasks:
        found = []

        async def wait() -> None:
            found.extend(await driver.next_events())

        start = time.monotonic()
        tasks.start_soon(wait)
        await anyio.sleep(0.05)
        assert found == []
        driver.xid(ONE, 79)
    assert found == [XidEvent(ONE, 79)]
    assert time.monotonic() - start < 0.9


async def test_an_event_that_nobody_waited_for_is_not_lost_with_a_wait_that_was_given_up(driver):
    driver.xid(ONE, 79)
    await driver.next_events()
    with anyio.move_on_after(0.05) as waited:
        await driver.next_events()
    assert waited.cancelled_caught
    driver.xid(ONE, 79)
    assert list(await driver.next_events()) == [XidEvent(ONE, 79)]


@pytest.mark.slow
async def test_no_event_within_a_second_is_an_answer_too(driver):
    start = time.monotonic()
    assert list(await driver.next_events()) == []
    assert 0.9 < time.monotonic() - start < 1.5


async def test_the_driver_can_be_entered_again(driver):
    for _ in range(2):
        async with driver as entered:
            assert entered is driver
            assert (await driver.scan()).gpus == GPUS


# Processes


async def test_processes_run_where_they_are_told_to_as_long_as_the_gpu_is_there(driver):
    running = (GpuProcess(7, GIB), GpuProcess(8, None))
    assert await driver.processes(ONE) == ()
    driver.run_processes(ONE, running)
    assert await driver.processes(ONE) == running
    assert await driver.processes(TWO) == ()
    assert await driver.processes("GPU-unknown") is None
    driver.run_processes(ONE, running[1:])
    assert await driver.processes(ONE) == running[1:]
    driver.fall_off(ONE)
    assert await driver.processes(ONE) is None
    driver.enumerate_again(ONE)
    assert await driver.processes(ONE) == ()
