"""Ten thousand faults and heals: nothing grows, nothing leaks, the end is right."""

import gc
import random
import threading
import tracemalloc
from pathlib import Path

import pytest

from tests.gpu.watched import Watched
from vgpu_agent.gpu.simulated import SimulatedDriver, simulated_gpus
from vgpu_agent.model.facts import Reading
from vgpu_agent.model.rules import HealthRules

pytestmark = [pytest.mark.slow, pytest.mark.ci]

GPUS = simulated_gpus(4, "gpu", 2**34, (0,))


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


async def test_ten_thousand_faults_and_heals_leave_nothing_behind():
    chance, driver = random.Random(7), SimulatedDriver(GPUS)
    node = Watched(driver, health=HealthRules(driver_wait=1e9))
    await node.look()

    async def churn(events: int) -> None:
        for _ in range(events):
            uuid = chance.choice(GPUS).uuid
            match chance.randrange(5):
                case 0:
                    await node.xid(uuid, chance.choice([13, 31, 48, 62, 74, 79, 999]))
                case 1:
                    driver.fail_probes(uuid, chance.choice([None, "failing"]))
                case 2:
                    driver.show(uuid, Reading(recovery_action=chance.choice([0, 1])))
                case 3:
                    driver.fall_off(uuid)
                case 4:
                    driver.enumerate_again(uuid)
            await node.look(after=chance.choice([1, 100]))
            node.published.clear()
            node.lines.clear()

    await churn(1000)  # what is made once is made
    threads, files = threading.active_count(), descriptors()
    gc.collect()
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    await churn(10_000)
    gc.collect()
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert after - before < 2**20
    assert (threading.active_count(), descriptors()) == (threads, files)

    for gpu in GPUS:
        driver.enumerate_again(gpu.uuid)
    await node.prove(7200)
    assert node.healthy == [0, 1, 2, 3]
