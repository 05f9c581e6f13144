"""The same request is answered alike in every process and under every hash seed."""

import os
import subprocess
import sys

import pytest

from tests.agent_process import REPOSITORY

GPUS = """
from vgpu_agent.gpu.simulated import simulated_gpus
from vgpu_agent.model.devices import Inventory, SharedGpu

made = simulated_gpus(6, "Model", 2**34, (0, 1))
gpus = tuple(SharedGpu(gpu, 4, usable_bytes=2**34) for gpu in made)
inventory = Inventory(gpus)
wanted = sorted({each.uuid + "::" + str(n) for each in made for n in range(3)}, key=hash)
"""
ALLOCATE = """
from vgpu_agent.kubelet.plugin import _response
from vgpu_agent.model.container import grant
from vgpu_agent.model.rules import DeviceList, SharingRules

rules = SharingRules(device_list=DeviceList.CDI_ENVVAR)
print(bytes(_response(grant(inventory, wanted, rules))).hex())
"""
PREFER = """
from vgpu_agent.model.placement import prefer
from vgpu_agent.model.rules import Placement

must = [made[3].uuid + "::1", "x", "y"]
for placement in Placement:
    for size in range(25):
        print(prefer(inventory, inventory.device_ids, must, size, placement))
"""


@pytest.mark.slow
@pytest.mark.parametrize("code", [ALLOCATE, PREFER], ids=["Allocate", "GetPreferredAllocation"])
def test_the_order_of_a_request_the_process_and_the_hash_seed_change_nothing(code):
    answers = {
        subprocess.run(
            [sys.executable, "-c", GPUS + code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("0", "1", "4711")
    }
    assert len(answers) == 1
    assert len(answers.pop()) > 200
