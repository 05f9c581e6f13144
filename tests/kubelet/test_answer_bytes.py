"""The same request is answered with the same bytes, in every process and under every hash seed."""

import os
import subprocess
import sys

import pytest

from tests.agent_process import REPOSITORY

CODE = """
from vgpu_agent.gpu.simulated import simulated_gpus
from vgpu_agent.kubelet.plugin import _response
from vgpu_agent.model.container import DeviceList, MpsSharing, Sharing, grant
from vgpu_agent.model.devices import Card, Inventory

cards = tuple(Card(gpu, 10) for gpu in simulated_gpus(3, "card", 2**34, (0, 1)))
inventory = Inventory(cards)
sharing = Sharing(MpsSharing("/pipe", "/shm"), device_list=DeviceList.CDI_ENVVAR)
wanted = sorted({card.gpu.uuid + "::" + str(n) for card in cards for n in range(3)}, key=hash)
print(bytes(_response(grant(inventory, wanted, sharing))).hex())
"""


@pytest.mark.slow
def test_the_order_of_a_request_the_process_and_the_hash_seed_change_no_byte():
    answers = {
        subprocess.run(
            [sys.executable, "-c", CODE],
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
