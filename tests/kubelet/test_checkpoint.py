"""The kubelet's checkpoint: as kubelets write it, damaged, and too large."""

import json
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.kubelet.podresources_peer import checkpoint, entry
from tests.kubelet.rig import RESOURCE
from tests.model.strategies import tried
from vgpu_agent.errors import KubeletError
from vgpu_agent.kubelet.checkpoint import read_checkpoint


def test_a_checkpoint_is_read(tmp_path):
    path = tmp_path / "checkpoint"
    assert read_checkpoint(path, RESOURCE) is None
    path.write_text(checkpoint())
    assert read_checkpoint(path, RESOURCE) == []
    path.write_text(
        checkpoint(
            entry("u", "g::0", "g::1", "g::2"),
            entry("u", "g::3", container="init"),
            entry("w", "x", resource="example.com/other"),
            {**entry("old"), "DeviceIDs": ["g::4", "g::5"]},
            {**entry("none"), "DeviceIDs": None},
            {**entry("empty"), "DeviceIDs": {"0": None, "-1": []}},
        )
    )
    found = read_checkpoint(path, RESOURCE)
    assert [(each.pod_uid, each.container, set(each.device_ids)) for each in found] == [
        ("u", "main", {"g::0", "g::1", "g::2"}),
        ("u", "init", {"g::3"}),
        ("old", "main", {"g::4", "g::5"}),
        ("none", "main", set()),
        ("empty", "main", set()),
    ]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"null",
        b"[]",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"Data": null}',
        b'{"Data": {}}',
        b'{"Data": {"PodDeviceEntries": 3}}',
        b'{"Data": {"PodDeviceEntries": [{}]}}',
        b'{"Data": {"PodDeviceEntries": [3]}}',
        *(
            json.dumps({"Data": {"PodDeviceEntries": [entry("u") | {key: value}]}}).encode()
            for key, value in (("PodUID", 3), ("DeviceIDs", 3), ("DeviceIDs", {"0": [3]}))
        ),
        checkpoint(entry("u", "g::0")).encode()[:-40],
    ],
)
def test_what_is_no_checkpoint_is_said_to_be_none(tmp_path, content):
    path = tmp_path / "checkpoint"
    path.write_bytes(content)
    with pytest.raises(KubeletError, match="is no checkpoint"):
        read_checkpoint(path, RESOURCE)


def test_a_huge_checkpoint_and_a_directory_are_not_read(tmp_path):
    path = tmp_path / "checkpoint"
    path.write_text(checkpoint(entry("u", "g::0")))
    size = path.stat().st_size
    assert len(read_checkpoint(path, RESOURCE, max_bytes=size)) == 1
    with pytest.raises(KubeletError, match="is larger than"):
        read_checkpoint(path, RESOURCE, max_bytes=size - 1)
    with pytest.raises(KubeletError, match="not a regular file"):
        read_checkpoint(tmp_path, RESOURCE)


def test_a_checkpoint_of_too_many_values_is_not_decoded(tmp_path):
    """While json decodes it, nothing else runs."""
    path = tmp_path / "checkpoint"
    for value in ("[]", "1", "{}"):
        path.write_text(f'{{"Data": {{"PodDeviceEntries": [{",".join([value] * 140_000)}]}}}}')
        with pytest.raises(KubeletError, match="more than 131072 values"):
            read_checkpoint(path, RESOURCE)


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3)
lists = st.lists(scalars, max_size=3)
json_values = scalars | lists | st.dictionaries(st.text(max_size=3), scalars | lists, max_size=3)
some_entries = st.fixed_dictionaries(
    {},
    optional={
        "PodUID": st.just("u") | json_values,
        "ContainerName": st.just("main") | json_values,
        "ResourceName": st.just(RESOURCE) | json_values,
        "DeviceIDs": st.just({"0": ["g::0"], "-1": None}) | json_values,
    },
)


@tried(300)
@given(json_values | st.lists(some_entries | json_values, max_size=2))
def test_any_json_is_a_checkpoint_or_said_to_be_none(entries):
    with tempfile.NamedTemporaryFile() as file:
        for data in (entries, {"Data": entries}, {"Data": {"PodDeviceEntries": entries}}):
            Path(file.name).write_text(json.dumps(data))
            with suppress(KubeletError):
                for each in read_checkpoint(Path(file.name), RESOURCE):
                    texts = [each.pod_uid, each.container, *each.device_ids]
                    assert all(isinstance(text, str) for text in texts)


@pytest.mark.slow
def test_who_only_reads_the_checkpoint_loads_no_grpc():
    code = "import sys, vgpu_agent.kubelet.checkpoint; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {"grpclib", "betterproto", "h2", "anyio"}.isdisjoint(done.stdout.split())
