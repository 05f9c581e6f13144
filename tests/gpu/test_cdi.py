import errno
import json
import tempfile
from pathlib import Path
from unittest.mock import Mock

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.test_store import damage
from vgpu_agent import store
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


merging = "".join(
    f"a{n}: &a{n} {{<<: [{', '.join(9 * [f'*a{n - 1}'])}], k{n}: v}}\n" for n in range(1, 12)
)
MERGED = f"kind: nvidia.com/gpu\na0: &a0 {{k: v}}\n{merging}devices: [{{name: x}}]\n"
"""Its last mapping would have 9**11 keys."""


def test_a_spec_that_cannot_be_read_names_nothing_and_is_reported(kubelet_dir, caplog):
    """Whatever lies there: it is not waited for, nor read without a bound."""
    (kubelet_dir / "a.yaml").write_text("{")
    (kubelet_dir / "b.json").write_text("[]")
    (kubelet_dir / "c.json").write_text('{"kind": "nvidia.com/gpu"}')
    (kubelet_dir / "d.yaml").write_bytes(b"\xff\xfe\x00")
    (kubelet_dir / "e.yaml").write_text("[" * 500)
    (kubelet_dir / "f.yaml").write_text("- " * 100_000)
    (kubelet_dir / "g.yaml").write_text("{a: " * 1_000_000)
    (kubelet_dir / "h.json").write_text("[" * 1_000_000)
    (kubelet_dir / "i.yaml").write_text(MERGED)
    for n, how in enumerate(["pipe", "directory", "socket", "device", "loop"]):
        damage(kubelet_dir / f"{n}.yaml", how)
    specs = CdiSpecs("nvidia.com/gpu", (kubelet_dir,))
    for _ in range(3):  # once for as long as the same is wrong
        assert specs.names() == frozenset()
        assert caplog.text.count("cannot be read") == 14
    (kubelet_dir / "b.json").write_text("7")
    (kubelet_dir / "c.json").write_text('{"kind": "nvidia.com/gpu", "devices": [{"name": "x"}]}')
    assert specs.names() == {"x"}
    assert caplog.text.count("cannot be read") == 15


HOOK = {
    "hookName": "createContainer",
    "path": "/usr/bin/nvidia-cdi-hook",
    "args": ["nvidia-cdi-hook", "apply-cuda-memory-limits"],
}
OLDER = HOOK | {"args": ["nvidia-ctk", "hook", "apply-cuda-memory-limits"]}
OTHER = HOOK | {"args": ["nvidia-cdi-hook", "update-ldcache", "--folder", "apply-cuda"]}


def edits(*hooks):
    return {"containerEdits": {"hooks": list(hooks)}}


def spec(*devices, kind="nvidia.com/gpu", **rest):
    """With a device of each of these edits."""
    named = [{"name": str(n)} | device for n, device in enumerate(devices)]
    return {"cdiVersion": "0.7.0", "kind": kind, "devices": named} | rest


@pytest.mark.parametrize(
    ("specs", "expected"),
    [
        ([], False),
        ([spec({}, edits(OTHER))], False),
        ([spec({}, {}, **edits(OTHER, HOOK))], True),
        ([spec({}, {}, **edits(OLDER))], True),
        ([spec(edits(HOOK), edits(OTHER, HOOK))], True),
        ([spec(edits(HOOK), edits(OTHER))], False),
        ([spec(edits(HOOK), {})], False),
        ([spec(edits(OTHER), **edits(HOOK)), spec({}, **edits(HOOK))], True),
        ([spec({}, **edits(HOOK)), spec({}, **edits(OTHER))], False),
        # Of another kind, or without a device, it says nothing.
        ([spec({}, **edits(HOOK)), spec({}, kind="example.com/nic")], True),
        ([spec({}, kind="example.com/nic", **edits(HOOK))], False),
        ([spec({}, **edits(HOOK)), spec()], True),
        ([spec(**edits(HOOK))], False),
        # What cannot be read could be of any kind.
        ([spec({}, **edits(HOOK)), []], False),
        ([spec({}, **edits(HOOK)), spec({"name": None}, **edits(HOOK))], False),
        # Odd edits have no hook, and hide no device.
        ([spec({}, containerEdits=[HOOK])], False),
        ([spec({}, containerEdits=None)], False),
        ([spec({}, containerEdits={"hooks": HOOK})], False),
        ([spec({}, **edits(None, 7, "args", [HOOK], {}))], False),
        ([spec({}, **edits({"args": "nvidia-cdi-hook apply-cuda-memory-limits"}))], False),
        ([spec({}, **edits({"args": {"apply-cuda-memory-limits": 1}}))], False),
        ([spec({}, **edits({"args": [None, ["apply-cuda-memory-limits"]]}, HOOK))], True),
        ([spec({}, **edits(*32 * [OTHER], HOOK))], False),
        ([spec({}, hooks=[HOOK])], False),
    ],
)
def test_limits_come_with_every_device_or_are_not_certain(tmp_path, specs, expected):
    for n, content in enumerate(specs):
        (tmp_path / f"{n}.json").write_text(json.dumps(content))
    found = CdiSpecs("nvidia.com/gpu", (tmp_path,))
    assert found.limits_memory() is expected
    named = {
        device["name"]
        for content in specs
        if isinstance(content, dict) and content["kind"] == "nvidia.com/gpu"
        for device in content["devices"]
    }
    assert found.names() == named - {None}


def test_whether_limits_come_with_a_device_is_what_its_spec_says_now(tmp_path):
    found = CdiSpecs("nvidia.com/gpu", (tmp_path,))
    for hooks in ([], [HOOK], [OTHER, OTHER], [HOOK, HOOK, HOOK]):
        (tmp_path / "nvidia.yaml").write_text(json.dumps(spec({}, **edits(*hooks))))
        assert found.limits_memory() is (HOOK in hooks)
    (tmp_path / "nvidia.yaml").unlink()
    assert not found.limits_memory()


laughter = "".join(f"a{n}: &a{n} [{', '.join(8 * [f'*a{n - 1}'])}]\n" for n in range(1, 12))
BOMB = f"kind: nvidia.com/gpu\na0: &a0 [ha]\n{laughter}devices: [{{name: *a11}}]\n"

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just(ONE),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["kind", "devices", "name", "containerEdits", "hooks", "args", "x"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)
named = st.fixed_dictionaries({"name": st.text()}, optional={"containerEdits": values})
specs = st.fixed_dictionaries(
    {"kind": st.just("nvidia.com/gpu"), "devices": values | st.lists(named, max_size=3)},
    optional={"containerEdits": values},
)


@given(st.binary() | st.text().map(str.encode) | (values | specs).map(json.dumps).map(str.encode))
@example(BOMB.encode())
@settings(max_examples=100, deadline=None)
def test_whatever_a_spec_is_names_are_texts(content):
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "a.yaml").write_bytes(content)
        found = CdiSpecs("nvidia.com/gpu", (Path(directory),))
        names = found.names()
        assert not found.limits_memory()
    assert all(isinstance(name, str) and len(name) <= len(content) for name in names)


def test_where_nothing_can_be_looked_at_now_names_are_as_they_were(tmp_path, monkeypatch):
    (tmp_path / "nvidia.yaml").write_text(SPEC)
    found = CdiSpecs("nvidia.com/gpu", (tmp_path,))
    before = found.names()
    for code in (errno.EMFILE, errno.EIO, errno.ELOOP):
        error = OSError(code, "odd")
        monkeypatch.setattr(Path, "glob", lambda *_, error=error: (_ for _ in ()).throw(error))
        assert found.names() == before


def test_a_spec_that_cannot_be_read_for_want_of_descriptors_is_read_later(
    tmp_path, monkeypatch, caplog
):
    found, none = (CdiSpecs("nvidia.com/gpu", (tmp_path,)) for _ in range(2))
    (tmp_path / "nvidia.yaml").write_text(SPEC)
    before = found.names()
    assert before
    for content in (SPEC, f"{SPEC}\n"):
        (tmp_path / "nvidia.yaml").write_text(content)
        with monkeypatch.context() as patched:
            short = Mock(side_effect=OSError(errno.EMFILE, "Too many open files"))
            patched.setattr(store, "open_regular", short)
            assert found.names() == before
            assert none.names() == frozenset()
        assert found.names() == none.names() == before
        none = CdiSpecs("nvidia.com/gpu", (tmp_path,))
    assert caplog.text == ""


def test_what_the_specs_name_now_counts(tmp_path):
    assert CdiSpecs("nvidia.com/gpu", (tmp_path,)).names() == frozenset()
    (tmp_path / "nvidia.yaml").write_text(SPEC)
    assert CdiSpecs("nvidia.com/gpu", (tmp_path,)).names() == {"0", ONE}
