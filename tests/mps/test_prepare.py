"""The directories that clients write to, before and after the daemons; and compute modes.

What is done as root is done with the capabilities that the chart gives to whoever does it.
"""

import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.agent_process import REPOSITORY, environment
from tests.fake_nvml import FakeGpu, FakeNvml
from tests.mps import node as nodes
from tests.mps.fixtures import eventually
from tests.mps.node import Node
from vgpu_agent.errors import MpsSetupError
from vgpu_agent.mps import trees
from vgpu_agent.mps.directories import Directories
from vgpu_agent.mps.prepare import prepare, remove
from vgpu_agent.mps.programs import hold
from vgpu_agent.mps.serve import SOCKETS

pytestmark = pytest.mark.slow

ROOT = os.geteuid() == 0
needs_root = pytest.mark.skipif(not ROOT, reason="makes files of several users")


def run(code: str, *arguments: object, caps: str = nodes.NODE) -> subprocess.CompletedProcess[str]:
    """Python code of ours, with those capabilities."""
    return subprocess.run(
        [*nodes.limited(caps), sys.executable, "-c", code, *map(str, arguments)],
        cwd=REPOSITORY,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


# What clients can leave behind. Each takes the directory, as root or another owner of it.


def nothing(_: Path) -> None: ...


def the_daemons_own(directory: Path) -> None:
    for name in SOCKETS:
        (directory / name).touch()


def closed(directory: Path) -> None:
    (directory / "file").touch()
    directory.chmod(0)


def opened(directory: Path) -> None:
    directory.chmod(0o2777)


def given_away(directory: Path) -> None:
    os.chown(directory, 1000, 1000)


def given_to_a_group(directory: Path) -> None:
    os.chown(directory, 0, 1000)


def files_of_any_mode_and_owner(directory: Path) -> None:
    for owner in (0, 1000, 65534):
        file = directory / f"file-{owner}"
        file.touch(mode=0)
        os.chown(file, owner, owner)


def closed_directories(directory: Path) -> None:
    (directory / "a/b/c").mkdir(parents=True)
    (directory / "a/b/file").touch()
    for each in ("a/b/c", "a/b", "a"):
        (directory / each).chmod(0)


def sticky_directories_of_others(directory: Path) -> None:
    (directory / "sticky").mkdir()
    (directory / "sticky/file").touch()
    os.chown(directory / "sticky/file", 1001, 1001)
    (directory / "sticky").chmod(0o1777)
    os.chown(directory / "sticky", 1000, 1000)


def many_directories_in_each_other(directory: Path) -> None:
    here = os.open(directory, os.O_RDONLY)
    for _ in range(5000):
        os.mkdir("d" * 200, dir_fd=here)
        deeper = os.open("d" * 200, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = deeper
    os.close(os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=here))
    os.close(here)


def many_files(directory: Path) -> None:
    for number in range(20_000):
        os.close(os.open(directory / str(number), os.O_CREAT | os.O_WRONLY))


def many_directories_in_one(directory: Path) -> None:
    for number in range(12_000):
        (directory / f"w/{number}").mkdir(parents=True)


def links(directory: Path) -> None:
    precious = directory.parents[1] / "precious"
    (directory / "to-file").symlink_to(precious / "file")
    (directory / "to-directory").symlink_to(precious)
    (directory / "folder").mkdir()
    (directory / "folder/up").symlink_to("../..")
    os.link(precious / "file", directory / "hard")


def links_in_place_of_sockets(directory: Path) -> None:
    for name in SOCKETS:
        (directory / name).symlink_to(directory.parents[1] / "precious/file")


def directories_in_place_of_sockets(directory: Path) -> None:
    for name in SOCKETS:
        (directory / name / "x").mkdir(parents=True)


def special_files(directory: Path) -> None:
    os.mkfifo(directory / "fifo")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(directory / "socket"))


def names_that_are_no_text(directory: Path) -> None:
    for name in (b"\xff\xfe", b"new\nline", b"-rf", b"pipe.old-x", b"a" * 255):
        (directory / os.fsdecode(name)).mkdir()


def rights_that_are_inherited(directory: Path) -> None:
    # user::rwx, user:1000:rwx, group::r-x, mask::rwx, other::r-x (acl(5), posix_acl_xattr.h)
    entries = ((1, 7, -1), (2, 7, 1000), (4, 5, -1), (16, 7, -1), (32, 5, -1))
    acl = (2).to_bytes(4, "little") + b"".join(
        tag.to_bytes(2, "little")
        + perm.to_bytes(2, "little")
        + (who & 2**32 - 1).to_bytes(4, "little")
        for tag, perm, who in entries
    )
    os.setxattr(directory, "system.posix_acl_default", acl)


def a_link(directory: Path) -> None:
    directory.rmdir()
    directory.symlink_to(directory.parents[1] / "precious")


def a_file(directory: Path) -> None:
    directory.rmdir()
    directory.touch(mode=0)


def gone(directory: Path) -> None:
    directory.rmdir()


KEPT = (the_daemons_own, links_in_place_of_sockets)
AS_ANYBODY = [
    *(nothing, closed, opened, closed_directories, many_directories_in_each_other, many_files),
    *(many_directories_in_one, links, directories_in_place_of_sockets, special_files),
    *(links_in_place_of_sockets, the_daemons_own),
    *(names_that_are_no_text, rights_that_are_inherited, a_link, a_file, gone),
]
AS_ROOT = [
    *(given_away, given_to_a_group, files_of_any_mode_and_owner, sticky_directories_of_others),
]
ATTACKS = [*AS_ANYBODY, *(pytest.param(each, marks=needs_root) for each in AS_ROOT)]


RENEW_PIPE = """
import sys
from pathlib import Path
from vgpu_agent.mps import trees
from vgpu_agent.mps.serve import SOCKETS
pipe = Path(sys.argv[1])
with trees.made(pipe.parent, 0o755) as parent:
    trees.renew(pipe, 0o755, parent, ours=SOCKETS)
"""
PREPARE = """
import logging, sys
from pathlib import Path
from vgpu_agent.errors import MpsSetupError
from vgpu_agent.mps.directories import Directories
from vgpu_agent.mps.prepare import prepare
logging.basicConfig()
try:
    prepare(Directories(*map(Path, sys.argv[1:])))
except MpsSetupError as error:
    sys.exit(str(error))
"""


def precious(directory: Path) -> Path:
    kept = directory / "precious"
    kept.mkdir()
    (kept / "file").write_text("of somebody else")
    return kept


def untouched(kept: Path) -> bool:
    found = (kept / "file").stat()
    right = (found.st_mode & 0o777, found.st_uid) == (0o644, os.geteuid())
    return right and kept.is_dir() and (kept / "file").read_text() == "of somebody else"


@pytest.fixture
def place() -> Iterator[Path]:
    """On a file system like that of /run, where root keeps nobody out."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as directory:
        Path(directory).chmod(0o755)
        yield Path(directory)


def state_of(directory: Path) -> tuple[int, int, int, list[str], list[str]]:
    found = directory.lstat()
    mode = stat.S_IMODE(found.st_mode) if stat.S_ISDIR(found.st_mode) else -1
    names = sorted(path.name for path in directory.iterdir())
    return mode, found.st_uid, found.st_gid, names, os.listxattr(directory)


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("of_a_daemon", [True, False], ids=["pipe", "shm"])
def test_nothing_that_clients_leave_keeps_a_directory_from_being_new(
    place: Path, attack: Callable[[Path], None], of_a_daemon
) -> None:
    kept = precious(place)
    parent, mode = place / "parent", 0o755 if of_a_daemon else 0o1777
    directory = parent / ("pipe" if of_a_daemon else "shared")

    def renew() -> None:
        if of_a_daemon:
            done = run(RENEW_PIPE, directory, caps=nodes.DEFAULT)
        else:
            done = run(PREPARE, place / "mps", parent)
        assert (done.returncode, done.stderr) == (0, "")

    parent.mkdir()
    renew()
    mounted = os.open(directory, os.O_RDONLY)  # its number is not given to another one
    attack(directory)
    renew()
    same = os.path.samestat(os.fstat(mounted), directory.stat())
    os.close(mounted)
    assert state_of(directory) == (mode, os.geteuid(), os.getegid(), [], [])
    assert [path.name for path in parent.iterdir()] == [directory.name]
    assert untouched(kept)
    # Running containers keep the one that is in order.
    assert same is (attack is nothing or (of_a_daemon and attack in KEPT))


def test_a_fresh_directory_is_another_one(tmp_path):
    pipe = tmp_path / "daemon/pipe"
    with trees.made(pipe.parent, 0o755) as parent:
        trees.renew(pipe, 0o755, parent)
        with trees.made(pipe, 0o755, parent) as before:
            trees.renew(pipe, 0o755, parent, fresh=True)
            assert not os.path.samestat(os.fstat(before), pipe.stat())
    assert [path.name for path in pipe.parent.iterdir()] == ["pipe"]


def test_who_goes_on_writing_delays_a_start_by_little_and_leaves_nothing_for_ever(tmp_path, caplog):
    pipe = tmp_path / "daemon/pipe"
    with trees.made(pipe.parent, 0o755) as parent:
        trees.renew(pipe, 0o755, parent)
        mounted = os.open(pipe, os.O_RDONLY)
        end = threading.Event()

        def write() -> None:
            for number in range(10**9):
                for name in (f"{number % 1000}", f"d{number % 1000}/x"):
                    try:
                        os.mkdir(name, dir_fd=mounted)
                    except OSError:
                        if end.is_set():
                            return

        writers = [threading.Thread(target=write) for _ in range(2)]
        for writer in writers:
            writer.start()
        try:
            eventually(lambda: len(list(pipe.iterdir())) > 100)
            began = time.monotonic()
            trees.renew(pipe, 0o755, parent)
            took = time.monotonic() - began
        finally:
            end.set()
            for writer in writers:
                writer.join()
            os.close(mounted)
        assert took < 6
        assert list(pipe.iterdir()) == []
        trees.renew(pipe, 0o755, parent)
    assert [path.name for path in pipe.parent.iterdir()] == ["pipe"]
    lines = [line for line in caplog.messages if "cannot be removed now" in line]
    assert len(lines) <= 1


def test_what_takes_too_long_is_removed_bit_by_bit(tmp_path):
    (tmp_path / "a").mkdir()
    many_files(tmp_path / "a")
    parent = os.open(tmp_path, os.O_RDONLY)
    rounds = 0
    try:
        while trees.remove("a", parent, time.monotonic() + 0.02):
            rounds += 1
            assert rounds < 1000
    finally:
        os.close(parent)
    assert rounds > 1
    assert not (tmp_path / "a").exists()


@needs_root
def test_another_file_system_is_not_entered(tmp_path):
    """As seen from where it is mounted; elsewhere its place is an empty directory."""
    code = """
import os, sys, time
from vgpu_agent.mps import trees
parent = os.open(sys.argv[1], os.O_RDONLY)
print(trees.remove("a", parent, time.monotonic() + 5), os.listdir(sys.argv[1] + "/a"))
print(os.path.exists(sys.argv[1] + "/a/mounted/file"))
"""
    (tmp_path / "a/mounted").mkdir(parents=True)
    (tmp_path / "a/file").touch()
    script = (
        f'mount -t tmpfs t {tmp_path}/a/mounted && touch {tmp_path}/a/mounted/file && exec "$@"'
    )
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script, "sh", sys.executable, "-c", code, tmp_path],
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    assert (done.stdout, done.stderr) == ("1 ['mounted']\nTrue\n", "")


# The directories above


def test_directories_are_made_and_made_right_again(tmp_path):
    directories = Directories(tmp_path / "run/mps", tmp_path / "shm/ours")

    def modes() -> list[int]:
        return [
            stat.S_IMODE(each.stat().st_mode)
            for each in (directories.root, directories.shm, directories.shared)
        ]

    for _ in range(2):
        prepare(directories)
        assert modes() == [0o755, 0o755, 0o1777]
        directories.root.chmod(0o700)
        directories.shm.chmod(0o777)
        (directories.root / "state").write_text("kept")
    assert (directories.root / "state").read_text() == "kept"


def test_containers_without_shared_memory_need_no_directory_for_it(tmp_path):
    prepare(Directories(tmp_path / "mps"))
    assert [path.name for path in tmp_path.iterdir()] == ["mps"]


@pytest.mark.parametrize("which", ["mps", "shm"])
@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        pytest.param(lambda path: path.touch(), "cannot be made a directory", id="file"),
        pytest.param(lambda path: path.symlink_to("/"), "cannot be made a directory", id="link"),
        pytest.param(
            lambda path: (path.mkdir(), os.chown(path, 1000, 1000)),
            "belongs to user 1000",
            id="of another user",
            marks=needs_root,
        ),
    ],
)
def test_what_is_no_directory_of_ours_is_reported_and_left(tmp_path, which, wrong, words):
    wrong(tmp_path / which)
    before = (tmp_path / which).lstat()
    with pytest.raises(MpsSetupError, match=rf"{which} {words}.*: (remove|run)"):
        prepare(Directories(tmp_path / "mps", tmp_path / "shm"))
    after = (tmp_path / which).lstat()
    assert (after.st_mode, after.st_uid, after.st_ino) == (
        before.st_mode,
        before.st_uid,
        before.st_ino,
    )


@needs_root
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("-o ro", "Read-only file system"),
        ("-o nr_inodes=1", "No space left on device"),
        ("-o nr_inodes=2", "No space left on device"),
        ("-o nr_inodes=3", "No space left on device"),
    ],
)
def test_a_file_system_that_takes_nothing_is_reported(tmp_path, options, words):
    script = f'mount -t tmpfs {options} t {tmp_path} && exec "$@"'
    done = subprocess.run(
        [
            *("unshare", "--mount", "sh", "-c", script, "sh"),
            *(sys.executable, "-c", PREPARE, tmp_path / "mps", tmp_path / "shm"),
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    assert done.returncode == 1
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_a_parent_that_keeps_other_users_out_is_named(tmp_path, caplog):
    parent = tmp_path / "run"
    parent.mkdir(mode=0o700)
    prepare(Directories(parent / "mps"))
    assert f"run `chmod o+x {parent}` on the node" in caplog.text
    caplog.clear()
    parent.chmod(0o711)
    prepare(Directories(parent / "mps"))
    assert str(parent) not in caplog.text


def test_the_selinux_type_is_set_where_there_are_labels(tmp_path, monkeypatch, caplog):
    directories = Directories(tmp_path / "mps", tmp_path / "shm")
    label = b"system_u:object_r:container_var_run_t:s0:c1,c2\0"
    labels: list[bytes] = []
    monkeypatch.setattr(os, "getxattr", lambda *_: label)
    monkeypatch.setattr(os, "setxattr", lambda _, name, value: labels.append((name, value)))
    prepare(directories)
    right = b"system_u:object_r:container_file_t:s0:c1,c2\0"
    assert labels == [("security.selinux", right)] * 3

    label = right
    prepare(directories)
    assert len(labels) == 3

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    label = b"system_u:object_r:var_run_t:s0\0"
    monkeypatch.setattr(os, "setxattr", refuse)
    prepare(directories)
    assert "chcon -t container_file_t" in caplog.text


def test_another_mps_pod_of_the_node_must_have_ended(tmp_path):
    directories = Directories(tmp_path / "mps", tmp_path / "shm")
    prepare(directories)
    os.close(hold(directories.restore))
    held = hold(directories.restore)
    with pytest.raises(MpsSetupError, match="another process holds"):
        prepare(directories)
    os.close(held)
    prepare(directories)


# Removing all of it


def test_only_what_is_ours_is_removed(tmp_path):
    directories = Directories(tmp_path / "mps", tmp_path / "shm")
    prepare(directories)
    daemon = directories.daemon("GPU-a")
    for each in (daemon.log, daemon.pipe / "deep/er", daemon.root / "pipe.old-1234/x"):
        each.mkdir(parents=True)
    for file in (directories.state, directories.watch, directories.compute_modes, daemon.process):
        file.touch()
    (directories.root / ".state.new").touch()
    (directories.shm / "shared.old-1/x").mkdir(parents=True)
    (directories.shared / "psm").touch()
    others = [directories.root / "theirs", directories.shm / "theirs"]
    for each in others:
        each.mkdir()
        (each / "file").touch()
    remove(directories)
    assert sorted(tmp_path.glob("*/*")) == sorted(others)
    assert all((each / "file").exists() for each in others)
    for each in others:
        shutil.rmtree(each)
    remove(directories)
    assert list(tmp_path.iterdir()) == []
    remove(directories)


# Compute modes: as processes, since the loader reads LD_LIBRARY_PATH only at the start of one


class ModesNode:
    """A node with fake GPUs, on which the commands run."""

    def __init__(self, node: Node, nvml: FakeNvml) -> None:
        self.node, self.nvml, self.directories = node, nvml, node.directories
        nvml.set_gpus(
            FakeGpu("GPU-a", bus="00000000:3B:00.0"),
            FakeGpu("GPU-b", bus="00000000:5E:00.0", compute_mode=2),
        )

    @property
    def variables(self) -> dict[str, str]:
        return {"VGPU_GPU_DRIVER": "nvml", **self.nvml.environment()}

    def run(self, command: str, code: int = 0, by_gpu: object = (), **variables: str) -> str:
        """What it says."""
        chosen = {"VGPU_REPLICAS_BY_GPU": json.dumps(dict(by_gpu)), **variables}
        done = self.node.run(command, **self.variables, **chosen)
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr
        return done.stderr

    @property
    def sets(self) -> list[str]:
        if not self.nvml.log.exists():
            return []
        lines = self.nvml.log.read_text().splitlines()
        return [line.removeprefix("compute_mode ") for line in lines]

    @property
    def remembered(self) -> dict[str, int]:
        return json.loads(self.directories.compute_modes.read_text())["modes"]


@pytest.fixture
def node(fake_nvml: FakeNvml) -> Iterator[ModesNode]:
    with nodes.made() as made:
        yield ModesNode(made, fake_nvml)


def test_shared_gpus_become_exclusive_once_and_are_restored(node):
    said = node.run("prepare")
    assert node.sets == ["GPU-a 3", "GPU-b 3"]
    assert "GPU-a: compute mode EXCLUSIVE_PROCESS, was DEFAULT" in said
    assert node.remembered == {"GPU-a": 0, "GPU-b": 2}
    # As after a kill: what is found now is ours.
    node.run("prepare")
    assert len(node.sets) == 2
    assert node.remembered == {"GPU-a": 0, "GPU-b": 2}
    # Also where the node is shared in another way by now.
    said = node.run("restore", VGPU_SHARING="time-slicing")
    assert node.sets[2:] == ["GPU-a 0", "GPU-b 2"]
    assert "GPU-b: compute mode PROHIBITED is restored" in said
    assert not node.directories.root.exists()
    assert not node.directories.shm.exists()
    assert "nothing to restore" in node.run("restore")
    assert len(node.sets) == 4


def test_a_gpu_that_was_reset_gets_its_mode_again_while_the_daemons_run(node):
    node.run("prepare")
    running = [hold(getattr(node.directories, name)) for name in ("restore", "daemons", "watch")]
    with node.nvml.log.open("a") as file:
        file.write("compute_mode GPU-a 0\n")
    said = node.run("compute-modes")
    assert node.sets == ["GPU-a 3", "GPU-b 3", "GPU-a 0", "GPU-a 3"]
    assert "GPU-a: compute mode EXCLUSIVE_PROCESS, was DEFAULT" in said
    assert node.remembered == {"GPU-a": 0, "GPU-b": 2}
    for descriptor in running:
        os.close(descriptor)
    node.run("restore")
    assert node.sets[4:] == ["GPU-a 0", "GPU-b 2"]


def test_gpus_that_are_not_shared_are_not_touched(node):
    node.nvml.set_gpus(
        FakeGpu("GPU-a", bus="00000000:3B:00.0", mig=1),
        FakeGpu("GPU-b", bus="00000000:5E:00.0", cc=(6, 1)),
        FakeGpu("GPU-c", bus="00000000:86:00.0"),
        FakeGpu("GPU-d", bus="00000000:AF:00.0"),
    )
    node.run("prepare", by_gpu={"GPU-c": 0})
    assert node.sets == ["GPU-d 3"]
    # Left to others from now on, with the mode that it had.
    node.run("prepare", by_gpu={"GPU-c": 0, "GPU-d": 0})
    assert node.sets == ["GPU-d 3", "GPU-d 0"]


def test_keep_leaves_compute_modes_alone(node):
    said = node.run("prepare", VGPU_MPS_COMPUTE_MODE="keep")
    assert node.sets == []
    assert "compute modes are left as they are" in said
    assert not node.directories.compute_modes.exists()


def test_what_was_remembered_in_another_boot_is_found_again(node):
    node.directories.root.mkdir()
    other = json.dumps({"boot_id": "of another boot", "modes": {"GPU-a": 2, "GPU-x": 2}})
    node.directories.compute_modes.write_text(other)
    assert "nothing to restore" in node.run("restore")
    node.directories.root.mkdir()
    node.directories.compute_modes.write_text(other)
    node.run("prepare")
    assert node.remembered == {"GPU-a": 0, "GPU-b": 2}


def test_a_mode_that_was_changed_since_is_left(node):
    node.run("prepare")
    with node.nvml.log.open("a") as file:
        file.write("compute_mode GPU-a 2\n")
    assert "GPU-a: its compute mode was changed since" in node.run("restore")
    assert node.sets[-1] == "GPU-b 2"
    assert "GPU-a 0" not in node.sets


def test_a_missing_permission_says_what_to_do(node):
    node.nvml.update("GPU-a", set_mode_error=4)
    said = node.run("prepare", code=1)
    assert "SYS_ADMIN" in said
    assert "VGPU_MPS_COMPUTE_MODE=keep" in said


def test_a_gpu_that_takes_no_compute_mode_is_logged_and_used(node):
    node.nvml.update("GPU-a", set_mode_error=3)
    assert "GPU-a takes no compute mode" in node.run("prepare")
    assert node.sets == ["GPU-b 3"]


# The end of the MPS pod


def test_when_the_pod_ends_the_node_is_as_it_was_before(node):
    """All containers get SIGTERM at once; `restore` waits for the daemons."""
    node.run("prepare")
    restore = node.node.start("restore", "--at-end", **node.variables)
    eventually(lambda: held(node.directories.restore), 10)
    daemons = node.node.start("daemon", **node.variables)
    eventually(lambda: all(map(node.node.answers, ("GPU-a", "GPU-b"))), 10)
    pipe = node.node.pipe("GPU-a")
    (pipe / "deep/er").mkdir(parents=True)
    (node.directories.shared / "psm").touch()
    pipe.chmod(0)
    restore.terminate()
    time.sleep(1)
    assert restore.poll() is None
    assert node.sets == ["GPU-a 3", "GPU-b 3"]
    daemons.terminate()
    assert daemons.wait(35) == 0
    assert restore.wait(10) == 0
    assert node.sets[2:] == ["GPU-a 0", "GPU-b 2"]
    assert not node.directories.root.exists()
    assert not node.directories.shm.exists()


def held(lock: Path) -> bool:
    try:
        os.close(hold(lock))
    except MpsSetupError:
        return True
    return False


def takes_no_end(pid: int) -> bool:
    """Whether a process keeps SIGTERM for later."""
    status = Path(f"/proc/{pid}/status").read_text()
    mask = int(status.partition("SigBlk:")[2].split()[0], 16)
    return bool(mask >> (signal.SIGTERM - 1) & 1)


def test_a_pod_that_ends_at_its_start_restores_too(node):
    node.run("prepare")
    restore = node.node.start("restore", "--at-end", **node.variables)
    eventually(lambda: takes_no_end(restore.pid))
    restore.terminate()  # while it is still loaded
    assert restore.wait(10) == 0
    assert node.sets[2:] == ["GPU-a 0", "GPU-b 2"]


def test_while_daemons_run_nothing_is_restored_by_hand(node):
    node.run("prepare")
    held_by_daemons = hold(node.directories.daemons)
    said = node.run("restore", code=1)
    assert "another process holds" in said
    os.close(held_by_daemons)
    assert node.sets == ["GPU-a 3", "GPU-b 3"]
    node.run("restore")


def test_what_cannot_be_restored_stays_remembered(node):
    node.run("prepare")
    node.nvml.update("GPU-a", set_mode_error=4)
    restore = node.node.start("restore", "--at-end", **node.variables)
    eventually(lambda: held(node.directories.restore), 10)
    restore.send_signal(signal.SIGTERM)
    assert restore.wait(10) == 1
    assert node.remembered == {"GPU-a": 0, "GPU-b": 2}
    node.nvml.update("GPU-a", set_mode_error=0)
    node.run("restore")
    assert not node.directories.root.exists()
