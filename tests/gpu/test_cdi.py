import errno
import json
import tempfile
from pathlib import Path

from hypothesis import example, given, settings
from hypothesis import strategies as st

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


laughter = "".join(f"a{n}: &a{n} [{', '.join(8 * [f'*a{n - 1}'])}]\n" for n in range(1, 12))
BOMB = f"kind: nvidia.com/gpu\na0: &a0 [ha]\n{laughter}devices: [{{name: *a11}}]\n"

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just(ONE),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["kind", "devices", "name", "x"]), inner, max_size=4)
    ),
    max_leaves=12,
)
specs = st.fixed_dictionaries({"kind": st.just("nvidia.com/gpu"), "devices": values})


@given(st.binary() | st.text().map(str.encode) | (values | specs).map(json.dumps).map(str.encode))
@example(BOMB.encode())
@settings(max_examples=100, deadline=None)
def test_whatever_a_spec_is_names_are_texts(content):
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "a.yaml").write_bytes(content)
        names = CdiSpecs("nvidia.com/gpu", (Path(directory),)).names()
    assert all(isinstance(name, str) and len(name) <= len(content) for name in names)


def test_where_nothing_can_be_looked_at_now_names_are_as_they_were(tmp_path, monkeypatch):
    (tmp_path / "nvidia.yaml").write_text(SPEC)
    found = CdiSpecs("nvidia.com/gpu", (tmp_path,))
    before = found.names()
    for code in (errno.EMFILE, errno.EIO, errno.ELOOP):
        error = OSError(code, "odd")
        monkeypatch.setattr(Path, "glob", lambda *_, error=error: (_ for _ in ()).throw(error))
        assert found.names() == before


def test_what_the_specs_name_now_counts(tmp_path):
    assert CdiSpecs("nvidia.com/gpu", (tmp_path,)).names() == frozenset()
    (tmp_path / "nvidia.yaml").write_text(SPEC)
    assert CdiSpecs("nvidia.com/gpu", (tmp_path,)).names() == {"0", ONE}
