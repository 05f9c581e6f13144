"""What the servers of the examples take of a GPU, whoever limits memory, by stand-ins for them.

The modes are the rows of the table in docs/mps.md, "What the variables mean".
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.examples.test_examples import FILES, MANIFESTS, containers, node_of, vgpus
from vgpu_agent.model.container import grant
from vgpu_agent.model.devices import Gpu
from vgpu_agent.model.limits import LimitsLook
from vgpu_agent.model.rules import MIB, MpsLimits, SharingRules

STANDIN = Path(__file__).with_name("standin")
GIB = 1 << 30
WHOLE = 80 * GIB
GPU = Gpu("GPU-5d2ef1a4-0a3c-4b9e-8f6c-2f7f5c1b9e10", 0, "NVIDIA H100", WHOLE, "0:1:0.0")

SHOWN = {
    "nobody, or MPS": f"0:{WHOLE}",
    "the driver, from the start": "0:{share}",
    "the driver, a second later": f"0:{WHOLE},1:{{share}}",
}
"""Who limits memory, and what CUDA shows as the GPU's total from which second on."""

SERVERS = [
    "serving/tensorflow.yaml",
    "serving/vllm.yaml",
    "serving/triton.yaml",
    "serving/pytorch.yaml",
    "from-aws/resnet-short.yaml",
]


def environment(
    vgpu: int, *, mps: bool, limits: LimitsLook | None = None, by: MpsLimits = MpsLimits.CLIENT
) -> dict[str, str]:
    """That of a container with one vGPU of so many bytes."""
    rules = SharingRules(mps=mps, device_memory=vgpu, mps_limits=by)
    inventory = node_of([GPU], rules)
    ids = [next(iter(inventory.device_ids))]
    return dict(grant(inventory, ids, rules, limits).environment)


def taken(name: str, place: Path, variables: dict[str, str], shown: str) -> int:
    """Bytes that the server of an example takes; its paths are in that directory."""
    programs = place / "bin"
    for each in ("sleep", "vllm", "tensorflow_model_server", "tf_serving_entrypoint.sh",
                 "tritonserver", "python3"):  # fmt: skip
        runs = "" if each == "python3" else f" {STANDIN}/servers.py {each}"
        program = programs / each
        programs.mkdir(exist_ok=True)
        program.write_text(f'#!/bin/sh\nexec {sys.executable}{runs} "$@"\n')
        program.chmod(0o755)
    for each in ("tmp", "models/classifier"):
        (place / each).mkdir(parents=True, exist_ok=True)
    (place / "clock").write_text("0")
    ((_, container),) = [each for each in containers(name) if vgpus(each[1])]
    command = [*container["command"], *container["args"]]
    command[2] = re.sub("/usr/(bin/)|/(tmp/)|/(models)", rf"{place}/\1\2\3", command[2])
    own = {"CLOCK": f"{place}/clock", "TAKEN": f"{place}/taken", "SHOWN": shown}
    done = subprocess.run(
        command,
        env={"PATH": f"{programs}:{os.defpath}", "PYTHONPATH": str(STANDIN), **own, **variables},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return int((place / "taken").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("shown", SHOWN)
@pytest.mark.parametrize("vgpu", [int(2.3 * GIB), 16 * GIB], ids=["2.3 GiB", "16 GiB"])
@pytest.mark.parametrize("name", SERVERS)
def test_a_server_takes_most_of_its_share_and_no_more(name, vgpu, shown, tmp_path):
    for mps in (True, False):
        variables = environment(vgpu, mps=mps)
        share = int(variables["VGPU_MEMORY_BYTES"])
        assert share == vgpu
        # The driver's limit is in whole MiB.
        seen = SHOWN[shown].format(share=share // MIB * MIB)
        assert 0.6 * share <= taken(name, tmp_path, variables, seen) <= share - 448 * MIB


@pytest.mark.slow
@pytest.mark.parametrize("name", SERVERS)
def test_half_of_a_share_that_is_too_small_for_a_context_is_left(name, tmp_path):
    variables = environment(600 * MIB, mps=True)
    for shown in SHOWN.values():
        seen = shown.format(share=600 * MIB)
        assert 0.49 * 600 * MIB <= taken(name, tmp_path, variables, seen) <= 300 * MIB


NO, SURE, PERHAPS = None, LimitsLook(certain=True), LimitsLook(enforced=True)


@pytest.mark.parametrize("vgpu", [2400 * MIB, 16 * GIB])
@pytest.mark.parametrize(
    ("mps", "by", "limits", "shown", "least"),
    [
        (False, MpsLimits.NONE, NO, WHOLE, 0.99),
        (True, MpsLimits.NONE, NO, WHOLE, 0.99),
        (True, MpsLimits.CLIENT, NO, WHOLE, 0.99),
        (True, MpsLimits.CLIENT, SURE, WHOLE, 0.99),
        (True, MpsLimits.SERVER, PERHAPS, WHOLE, 0.99),
        (False, MpsLimits.NONE, SURE, None, 0.65),
        (True, MpsLimits.NONE, SURE, None, 0.8),
        (False, MpsLimits.NONE, PERHAPS, WHOLE, 0.99),
        (False, MpsLimits.NONE, PERHAPS, None, 0.0),  # too little, and never too much
    ],
)
def test_the_fraction_of_what_cuda_shows_is_within_the_share(vgpu, mps, by, limits, shown, least):
    given = environment(vgpu, mps=mps, limits=limits, by=by)
    share = int(given["VGPU_MEMORY_BYTES"])
    assert share == vgpu
    takes = float(given["VGPU_MEMORY_FRACTION"]) * (shown or share)
    assert least * share <= takes <= share


def test_every_server_of_the_examples_is_tried():
    assert set(SERVERS) >= {name for name in MANIFESTS if name.startswith("serving/")}
    reading = {name for name in MANIFESTS if "VGPU_MEMORY_" in FILES[name].read_text("utf-8")}
    assert reading == set(SERVERS)
