"""The kubelet side in an agent that is a process of its own."""

import pytest

from tests.agent_process import running
from tests.kubelet.podresources_peer import PodResourcesPeer, a_pod, checkpoint, encoded, entry
from tests.kubelet.rig import RESOURCE
from tests.kubelet_peer import KubeletPeer
from vgpu_agent.gpu.simulated import simulated_gpus
from vgpu_agent.model.devices import device_id

pytestmark = pytest.mark.slow

# An end that nobody asked for

PARTS = {
    "KubeletSession": "vgpu_agent.kubelet.session",
    "PodResourcesWatch": "vgpu_agent.kubelet.podresources",
    "Keeper": "vgpu_agent.gpu.memory",
    "Web": "vgpu_agent.observe.web",
}
ENDS = {
    "returns": "pass",
    "is cancelled": "asyncio.current_task().cancel(); await asyncio.sleep(1)",
}


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("part", PARTS)
def test_an_agent_of_which_a_part_ends_by_itself_ends_with_1(kubelet_dir, part, end):
    changes = f"""
import asyncio
from {PARTS[part]} import {part}
async def run(self, *, task_status=None):
    if task_status:
        task_status.started()
    await asyncio.sleep(0.1)
    {ENDS[end]}
{part}.run = run
"""
    with KubeletPeer(kubelet_dir), running(kubelet_dir, changes=changes) as agent:
        assert agent.process.wait(10) == 1
        agent.wait_line("run ended, though nobody asked it to")
    assert [each.name for each in kubelet_dir.glob("device-plugins/vgpu-*")] == []


# Where the kubelet has its directories


def test_a_kubelet_whose_root_is_elsewhere_is_followed_and_asked(kubelet_dir):
    """Device plugins and the checkpoint stay where they are, PodResources does not."""
    (gpu,) = simulated_gpus(1, "x", 2**34, (0,))
    main, init = (device_id(gpu.uuid, n) for n in (1, 2))
    root = kubelet_dir / "root"
    pods = PodResourcesPeer(root, encoded(a_pod("a", main)))
    settings = {
        "VGPU_KUBELET_DIR": str(root),
        "VGPU_DEVICE_PLUGIN_DIR": str(kubelet_dir / "device-plugins"),
        "VGPU_RESOURCE_NAME": RESOURCE,
    }
    with KubeletPeer(kubelet_dir) as kubelet:
        pods.start()
        file = kubelet.directory / "kubelet_internal_checkpoint"
        file.write_text(checkpoint(entry("u", main), entry("u", init, container="init")))
        with running(kubelet_dir, **settings) as agent:
            kubelet.wait_list(1)
            agent.wait_line("the kubelet says who holds which vGPU")
            held = [line for line in agent.get("/metrics")[1].splitlines() if 'pod="a"' in line]
        pods.stop()
    for vgpu, container in ((main, "main"), (init, "init")):
        assert any(f'"{vgpu}"' in line and f'"{container}"' in line for line in held), held
