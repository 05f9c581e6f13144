"""The real process on the real pynvml: processes of this machine, listed by a fake NVML."""

import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from tests.agent_process import Agent, running
from tests.fake_nvml import FakeGpu

pytestmark = pytest.mark.slow

UUIDS = [f"GPU-a000000{n}-1111-2222-3333-00000000000{n}" for n in range(3)]
SETTINGS = {"VGPU_GPU_DRIVER": "nvml", "VGPU_SHARING": "time-slicing"}


@contextmanager
def sleepers(count: int) -> Iterator[list[int]]:
    """PIDs of processes of ours."""
    with ExitStack() as stack:
        pids = []
        for _ in range(count):
            process = stack.enter_context(subprocess.Popen(["sleep", "300"]))
            stack.callback(process.kill)
            pids.append(process.pid)
        yield pids


def wait_metrics(agent: Agent, *lines: str) -> str:
    """The metrics, once they have those lines."""
    deadline = time.monotonic() + 20
    while True:
        _, metrics = agent.get("/metrics")
        if not set(lines) - set(metrics.splitlines()):
            return metrics
        assert time.monotonic() < deadline, f"no {lines} in:\n{metrics}\n{agent.text}"
        time.sleep(0.05)


def test_processes_that_are_in_no_pod_are_counted_by_gpu(kubelet_dir, fake_nvml):
    with sleepers(3) as (one, two, client):
        fake_nvml.set_gpus(
            FakeGpu(UUIDS[0], compute=((one, 512), (client, 64)), mps=((client, 64), (two, None))),
            FakeGpu(UUIDS[1], bus="00000000:02:00.0"),
            FakeGpu(UUIDS[2], bus="00000000:03:00.0", compute_error=4),
        )
        settings = {**SETTINGS, "VGPU_PROCESS_METRICS": "on", **fake_nvml.environment()}
        with running(kubelet_dir, **settings) as agent:
            metrics = wait_metrics(
                agent,
                f'vgpu_unattributed_processes{{gpu_index="0",gpu_uuid="{UUIDS[0]}"}} 3.0',
                f'vgpu_unattributed_processes{{gpu_index="1",gpu_uuid="{UUIDS[1]}"}} 0.0',
            )
            # Of a GPU that does not list them nothing is known; and ours are in no container.
            assert (
                f'vgpu_unattributed_processes{{gpu_index="2",gpu_uuid="{UUIDS[2]}"}}' not in metrics
            )
            assert "vgpu_container_processes{" not in metrics
            assert "vgpu_container_memory_used_bytes{" not in metrics
            assert agent.end()[0] == 0
            assert "Traceback" not in agent.text


def test_without_the_setting_no_process_is_looked_at(kubelet_dir, fake_nvml):
    fake_nvml.set_gpus(FakeGpu(UUIDS[0], compute=((1, 512),)))
    with running(kubelet_dir, **SETTINGS, **fake_nvml.environment()) as agent:
        metrics = wait_metrics(
            agent, f'vgpu_gpu_healthy{{gpu_index="0",gpu_uuid="{UUIDS[0]}"}} 1.0'
        )
        assert "vgpu_unattributed_processes" not in metrics
        assert agent.end()[0] == 0
