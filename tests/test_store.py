import json
import os
import socket
from dataclasses import dataclass
from pathlib import Path

import pytest

from vgpu_agent import store
from vgpu_agent.errors import StoreError


@dataclass
class Numbered:
    number: int


def damage(path: Path, how: str) -> None:
    """Makes something at the path that is no file of ours."""
    match how:
        case "pipe":
            os.mkfifo(path)
        case "directory":
            path.mkdir()
        case "socket":
            with socket.socket(socket.AF_UNIX) as one:
                one.bind(str(path))
        case "device":
            path.symlink_to("/dev/zero")
        case "loop":
            path.symlink_to(path)
        case "half":
            path.write_text('{"a": [1, 2')
        case "nested":
            path.write_text("[" * 100_000)
        case "list":
            path.write_text("[]")
        case "bytes":
            path.write_bytes(b"\xff\xfe\x00")
        case "empty":
            path.write_text("")
        case "huge":
            path.write_text('{"a": "' + "x" * store.MAX_BYTES + '"}')
        case "digits":
            path.write_text('{"a": ' + "9" * 5000 + "}")


NOT_REGULAR = ["pipe", "directory", "socket", "device", "loop"]
NOT_JSON = ["half", "nested", "list", "bytes", "empty", "huge", "digits"]


@pytest.mark.parametrize("how", NOT_REGULAR + NOT_JSON)
def test_what_is_no_file_of_ours_is_an_error_that_names_it_at_once(kubelet_dir, how):
    """Neither waited for (fault 6 was a pipe), nor kept open."""
    path = kubelet_dir / "file"
    damage(path, how)
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(StoreError) as caught:
        store.read(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 600
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_what_is_not_there_is_nothing(tmp_path):
    assert store.read(tmp_path / "none") is None
    assert store.read_bytes(tmp_path / "none" / "below") is None


def test_a_file_is_replaced_as_a_whole(tmp_path, monkeypatch):
    """Fault 11 is one that was written in place."""
    path = tmp_path / "new" / "file"
    store.write(path, {"a": 1})
    assert store.read(path) == {"a": 1}

    def killed(_descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        store.write(path, {"a": 2, "b": "x" * 100_000})
    assert store.read(path) == {"a": 1}
    monkeypatch.undo()
    store.write(path, {"a": 3}, mode=0o600)
    assert store.read(path) == {"a": 3}
    assert path.stat().st_mode & 0o777 == 0o600
    assert [each.name for each in path.parent.iterdir()] == ["file"]


@pytest.mark.parametrize("how", [*NOT_REGULAR, "half", "a directory that holds something"])
@pytest.mark.parametrize("name", ["file", ".file.new"])
def test_whatever_is_there_is_replaced_and_the_files_of_others_stay(kubelet_dir, how, name):
    path = kubelet_dir / "file"
    damage(kubelet_dir / name, "directory" if how.startswith("a ") else how)
    if how.startswith("a "):
        (kubelet_dir / name / "other").write_text("")
    for n in range(2):
        store.write(path, {"a": n})
        assert store.read(path) == {"a": n}
    others = [each.name for each in kubelet_dir.rglob("other")]
    assert others == (["other"] if how.startswith("a ") else [])


@pytest.mark.parametrize(
    "text", ["[" * 5000, '{"a": 1}', "9" * 4000, '"9"', "true", "[1]", "1e999"], ids=range(7)
)
def test_a_number_that_is_none_is_an_error_that_names_it(tmp_path, text):
    path = tmp_path / "file"
    path.write_text('{"number": ' + text + "}")
    with pytest.raises(StoreError, match=r"number|damaged"):
        store.read_as(Numbered, path)


@pytest.mark.parametrize("obstacle", ["the directory is a file", "a full disk"])
def test_what_cannot_be_written_is_an_error_that_names_it(tmp_path, monkeypatch, obstacle):
    path = tmp_path / "state" / "file"
    if obstacle == "the directory is a file":
        path.parent.write_text("")
    else:
        monkeypatch.setattr(json, "dump", _full)
    with pytest.raises(StoreError, match=f"^cannot write {path}: "):
        store.write(path, {})
    assert [*tmp_path.rglob(".*")] == []


def _full(*_: object) -> None:
    raise OSError(28, "No space left on device")


def test_the_boot_is_named_by_the_kernel_and_by_nothing_where_it_cannot(tmp_path):
    assert store.boot_id() == store.BOOT_ID.read_text().strip() != ""
    (tmp_path / "id").write_bytes(b"\xff")
    assert store.boot_id(tmp_path / "id") == store.boot_id(tmp_path / "none") == ""
