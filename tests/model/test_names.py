"""How people name a GPU, to every command alike."""

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.nodes import found, new_node
from vgpu_agent.errors import UnknownGpuError
from vgpu_agent.model.devices import Excluded, Gpu
from vgpu_agent.model.facts import Cordon, Scan
from vgpu_agent.model.names import GpuName, find_gpu, known_gpus
from vgpu_agent.model.snapshot import Driver, FirstSeen

ONE = GpuName("GPU-a1b2c3d4-0000", 0, "0000:01:00.0")
TWO = GpuName("GPU-a1ffffff-0000", 1, "00000001:AF:00.0")
LOST = GpuName("GPU-0abc", 1, "0000:3b:00.0")
"""It had the index that another has now."""
REMEMBERED = GpuName("GPU-0")
GPUS = (ONE, TWO, LOST, REMEMBERED)


@pytest.mark.parametrize(
    ("text", "gpu"),
    [
        ("0", ONE),
        (" 0\n", ONE),
        ("GPU-a1b2c3d4-0000", ONE),
        ("gpu-A1B2", ONE),
        ("GPU-a1f", TWO),
        ("0000:01:00.0", ONE),
        ("00000000:01:00.0", ONE),
        ("01:00.0", ONE),
        ("1:0.0", ONE),
        ("0001:af:00.0", TWO),
        ("1:AF:0.0", TWO),
        ("GPU-0", REMEMBERED),  # in full, though another begins so
        ("GPU-0a", LOST),
    ],
)
def test_a_gpu_is_found_by_what_people_call_it(text, gpu):
    assert find_gpu(text, GPUS) == gpu


@pytest.mark.parametrize(
    "text", ["2", "00", "-1", "", "GPU-", "GPU-b", "af:00.0", ":", "1:", "x:y"]
)
def test_an_unknown_name_says_what_there_is(text):
    with pytest.raises(UnknownGpuError) as caught:
        find_gpu(text, GPUS)
    assert str(caught.value) == (
        f"there is no GPU {text!r}: GPU 0 (GPU-a1b2c3d4-0000) at 0000:01:00.0,"
        " GPU 1 (GPU-0abc) at 0000:3b:00.0, GPU 1 (GPU-a1ffffff-0000) at 00000001:AF:00.0, GPU-0"
    )
    with pytest.raises(UnknownGpuError, match=r"there is no GPU '.*': no GPU is known yet"):
        find_gpu(text, ())


@pytest.mark.parametrize("text", ["1", "GPU-a1"])
def test_a_name_of_several_is_refused_with_their_uuids(text):
    with pytest.raises(
        UnknownGpuError, match=f"'{text}' names several GPUs: .*GPU-a1f.*use a UUID"
    ):
        find_gpu(text, GPUS)


@given(st.text())
def test_any_text_names_a_gpu_or_is_refused(text):
    with suppress(UnknownGpuError):
        assert find_gpu(text, GPUS) in GPUS


def test_known_are_listed_excluded_and_remembered_gpus():
    shared = Gpu("GPU-a", 0, "M", 2**34, "0000:01:00.0")
    silent = Gpu("GPU-b", 1, "", None, "0000:02:00.0")
    nameless = Gpu("", 2, "", None, "0000:03:00.0")
    node = new_node()
    undescribed = tuple(Excluded(gpu, "error", "why") for gpu in (silent, nameless))
    node.driver_looked(Driver("550", None), Scan("550", (shared,), undescribed), {})
    node.set_cordons({"GPU-a": Cordon(0.0), "GPU-c": Cordon(0.0)})
    node.recalled({"GPU-a": FirstSeen(0, 1, 0), "GPU-d": FirstSeen(3, 1, 0)}, {})
    assert sorted(known_gpus(node.snapshot), key=str) == [
        GpuName.of(shared),
        GpuName.of(silent),
        GpuName("GPU-c"),
        GpuName("GPU-d"),
    ]
    found(node, [])
    assert GpuName.of(shared) in known_gpus(node.snapshot)
