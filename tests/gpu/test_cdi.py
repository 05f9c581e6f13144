import json

from tests.test_store import damage
from vgpu_agent.gpu.cdi import CdiSpecs
from vgpu_agent.gpu.simulated import simulated_gpus

GPUS = simulated_gpus(2, "gpu", 2**34, (0,))
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
    names = CdiSpecs("nvidia.com/gpu", (tmp_path / "a", tmp_path, tmp_path / "none")).names()
    assert names == {"0", ONE, TWO}
    assert CdiSpecs("example.com/nic", (tmp_path,)).names() == {"eth"}


def test_a_spec_that_cannot_be_read_names_nothing_and_is_reported(kubelet_dir, caplog):
    """Whatever lies there: it is not waited for, nor read without a bound."""
    (kubelet_dir / "a.yaml").write_text("{")
    (kubelet_dir / "b.json").write_text("[]")
    (kubelet_dir / "c.json").write_text('{"kind": "nvidia.com/gpu"}')
    (kubelet_dir / "d.yaml").write_bytes(b"\xff\xfe\x00")
    (kubelet_dir / "e.yaml").write_text("[" * 500)
    for n, how in enumerate(["pipe", "directory", "socket", "device", "loop"]):
        damage(kubelet_dir / f"{n}.yaml", how)
    specs = CdiSpecs("nvidia.com/gpu", (kubelet_dir,))
    for _ in range(3):  # once for as long as the same is wrong
        assert specs.names() == frozenset()
        assert caplog.text.count("cannot be read") == 10
    (kubelet_dir / "b.json").write_text("7")
    (kubelet_dir / "c.json").write_text('{"kind": "nvidia.com/gpu", "devices": [{"name": "x"}]}')
    assert specs.names() == {"x"}
    assert caplog.text.count("cannot be read") == 11


def test_what_the_specs_name_now_counts(tmp_path):
    assert CdiSpecs("nvidia.com/gpu", (tmp_path,)).names() == frozenset()
    (tmp_path / "nvidia.yaml").write_text(SPEC)
    assert CdiSpecs("nvidia.com/gpu", (tmp_path,)).names() == {"0", ONE}
