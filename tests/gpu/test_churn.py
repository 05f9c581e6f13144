"""Ten thousand faults and heals: nothing grows, nothing leaks, the end is right."""

import gc
import random
import threading
import tracemalloc
from pathlib import Path

import pytest

from vgpu_agent.gpu.driver import Reading
from vgpu_agent.gpu.health import HealthPolicy
from vgpu_agent.gpu.memory import FaultMemory
from vgpu_agent.gpu.probe import HealthWatch
from vgpu_agent.gpu.simulated import SimulatedDriver, simulated_gpus
from vgpu_agent.model.share import Division
from vgpu_agent.model.state import NodeState

pytestmark = [pytest.mark.slow, pytest.mark.ci]

GPUS = simulated_gpus(4, "card", 2**34, (0,))


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


async def test_ten_thousand_faults_and_heals_leave_nothing_behind(tmp_path, caplog):
    caplog.set_level("CRITICAL", "vgpu_agent")
    chance, clock = random.Random(7), Clock()
    driver, state = SimulatedDriver(GPUS), NodeState(Division(10))
    watch = HealthWatch(
        driver, state, HealthPolicy(), FaultMemory(tmp_path), clock, wall_clock=clock
    )
    await watch.look()

    async def churn(events: int) -> None:
        for _ in range(events):
            uuid = chance.choice(GPUS).uuid
            match chance.randrange(5):
                case 0:
                    driver.xid(uuid, chance.choice([13, 31, 48, 62, 74, 79, 999]))
                    await watch.take_events()
                case 1:
                    driver.fail_probes(uuid, chance.choice([None, "failing"]))
                case 2:
                    driver.show(uuid, Reading(recovery_action=chance.choice([0, 1])))
                case 3:
                    driver.fall_off(uuid)
                case 4:
                    driver.enumerate_again(uuid)
            clock.now += chance.choice([1, 100])
            await watch.look()

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
    for _ in range(3):
        clock.now += 4000
        await watch.look()
    assert all(card.healthy for card in state.snapshot.inventory.cards)
    assert len(state.snapshot.inventory.cards) == 4
