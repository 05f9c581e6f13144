import json

from vgpu_agent.gpu.cdi import NamedByCdi, named_devices
from vgpu_agent.gpu.simulated import SimulatedDriver, simulated_gpus

GPUS = simulated_gpus(2, "card", 2**34, (0,))
ONE, TWO = (gpu.uuid for gpu in GPUS)

SPEC = f"""\
cdiVersion: 0.5.0
kind: nvidia.com/gpu
devices:
  - name: "0"
    containerEdits: {{}}
  - name: {ONE}
    containerEdits:
      deviceNodes: [{{path: /dev/nvidia0}}]
containerEdits:
  env: [NVIDIA_VISIBLE_DEVICES=void]
"""


def test_devices_of_a_kind_are_named_by_specs_in_yaml_and_json(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "nvidia.yaml").write_text(SPEC)
    other = {"cdiVersion": "0.5.0", "kind": "nvidia.com/gpu", "devices": [{"name": TWO}]}
    (tmp_path / "b.json").write_text(json.dumps(other))
    (tmp_path / "c.yaml").write_text("kind: example.com/nic\ndevices: [{name: eth}]\n")
    (tmp_path / "d.txt").write_text("no spec")
    names = named_devices("nvidia.com/gpu", (tmp_path / "a", tmp_path, tmp_path / "none"))
    assert names == {"0", ONE, TWO}
    assert named_devices("example.com/nic", (tmp_path,)) == {"eth"}


def test_a_spec_that_cannot_be_read_names_nothing_and_is_told(tmp_path, caplog):
    (tmp_path / "a.yaml").write_text("{")
    (tmp_path / "b.json").write_text("[]")
    (tmp_path / "c.json").write_text('{"kind": "nvidia.com/gpu"}')
    assert named_devices("nvidia.com/gpu", (tmp_path,)) == frozenset()
    assert caplog.text.count("cannot be read") == 3


async def test_a_card_that_no_spec_names_is_left_out_until_one_does(tmp_path):
    (tmp_path / "nvidia.yaml").write_text(SPEC)
    async with NamedByCdi(SimulatedDriver(GPUS), "nvidia.com/gpu", (tmp_path,)) as driver:
        scan = await driver.scan()
        assert [gpu.uuid for gpu in scan.gpus] == [ONE]
        (left,) = scan.excluded
        assert (left.gpu.uuid, left.reason) == (TWO, "cdi")
        assert f"nvidia.com/gpu={TWO}" in left.detail
        assert not (await driver.probe(ONE)).lost
        more = {"kind": "nvidia.com/gpu", "devices": [{"name": TWO}]}
        (tmp_path / "more.json").write_text(json.dumps(more))
        assert len((await driver.scan()).gpus) == 2
        await driver.release()
        assert (await driver.probe(ONE)).lost
