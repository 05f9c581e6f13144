import json
import os
import stat

import pytest

from tests.fake_nvml import FakeGpu, FakeNvml
from tests.mps.fixtures import FakeMps, eventually
from vgpu_agent.errors import MpsSetupError
from vgpu_agent.mps.prepare import prepare

pytestmark = pytest.mark.slow

# As `vgpu-agent mps` does it, and without the settings, which take longest to import.
COMMAND = """
from vgpu_agent import settings
from vgpu_agent.commands.mps import mps_{0}
from vgpu_agent.observe import logs
configured = settings.load()
logs.configure(configured.log_level, configured.log_format)
mps_{0}(configured)
"""
BARE = """
import logging, sys
from pathlib import Path
import anyio
from vgpu_agent.gpu.nvml import NvmlDriver, set_compute_mode
from vgpu_agent.model.rules import SharingRules
from vgpu_agent.mps.control import Control
from vgpu_agent.mps.directories import Directories
from vgpu_agent.mps.modes import ComputeModes
from vgpu_agent.mps.prepare import prepare
logging.basicConfig(level="INFO")
directories = Directories(Path({root!r}))
modes = ComputeModes(NvmlDriver(), set_compute_mode, directories.compute_modes)
if {command!r} == "restore":
    anyio.run(modes.restore)
else:
    anyio.run(prepare, Control(directories))
    anyio.run(modes.take, SharingRules(replicas_by_gpu={by_gpu!r}))
"""


async def make(mps: FakeMps, end_seconds: float = 5) -> None:
    await prepare(mps.control(timeout=0.5), end_seconds=end_seconds)


def modes(mps: FakeMps) -> dict[str, tuple[int, int, int]]:
    return {
        path.name: (stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid)
        for path in mps.directories.modes()
        for found in [path.stat()]
    }


# Directories


async def test_directories_are_made_and_made_right_again(fake_mps):
    own = (os.geteuid(), os.getegid())
    wanted = {
        "mps": (0o755, *own),
        "pipe": (0o755, *own),
        "log": (0o700, *own),
        "shm": (0o1777, *own),
    }
    await make(fake_mps)
    assert modes(fake_mps) == wanted
    kept = fake_mps.directories.log / "control.log"
    kept.write_text("kept")
    fake_mps.directories.pipe.chmod(0o700)
    fake_mps.directories.shm.chmod(0o755)
    if os.geteuid() == 0:
        os.chown(fake_mps.directories.pipe, 12345, 12345)
    await make(fake_mps)
    assert modes(fake_mps) == wanted
    assert kept.read_text() == "kept"


async def test_a_file_or_a_link_in_the_way_is_reported(fake_mps, tmp_path):
    fake_mps.directories.root.mkdir()
    fake_mps.directories.pipe.symlink_to(tmp_path)
    with pytest.raises(MpsSetupError, match=r"pipe cannot be made a directory .*remove what is"):
        await make(fake_mps)
    fake_mps.directories.pipe.unlink()
    fake_mps.directories.pipe.write_text("")
    with pytest.raises(MpsSetupError, match="pipe cannot be made a directory"):
        await make(fake_mps)


async def test_the_selinux_type_is_set_where_there_are_labels(fake_mps, monkeypatch, caplog):
    label = b"system_u:object_r:container_var_run_t:s0:c1,c2\0"
    labels: list[bytes] = []
    monkeypatch.setattr(os, "getxattr", lambda *_: label)
    monkeypatch.setattr(os, "setxattr", lambda _, name, value: labels.append((name, value)))
    await make(fake_mps)
    right = b"system_u:object_r:container_file_t:s0:c1,c2\0"
    assert labels == [("security.selinux", right)] * 4

    label = right
    await make(fake_mps)
    assert len(labels) == 4

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    label = b"system_u:object_r:var_run_t:s0\0"
    monkeypatch.setattr(os, "setxattr", refuse)
    await make(fake_mps)
    assert "chcon -t container_file_t" in caplog.text


async def test_the_state_of_a_dead_daemon_is_removed_and_that_of_a_living_one_kept(fake_mps):
    fake_mps.start()
    fake_mps.directories.state.write_text("{}")
    await make(fake_mps)
    assert fake_mps.directories.state.exists()
    fake_mps.kill()
    await make(fake_mps)
    assert not fake_mps.directories.state.exists()


# Orphans


async def test_a_directory_that_holds_files_of_others_is_neither_opened_nor_emptied(fake_mps):
    shm = fake_mps.directories.shm
    shm.mkdir(mode=0o700)
    (shm / "precious").write_text("of somebody else")
    with pytest.raises(MpsSetupError, match="VGPU_MPS_SHM_DIRECTORY"):
        await make(fake_mps)
    assert (shm / "precious").exists()
    assert stat.S_IMODE(shm.stat().st_mode) == 0o700


async def test_shared_memory_is_emptied_where_no_daemon_and_so_no_client_is(fake_mps, tmp_path):
    await make(fake_mps)
    shm, elsewhere = fake_mps.directories.shm, tmp_path / "precious"
    elsewhere.write_text("of somebody else")

    def litter() -> None:
        (shm / "psm_1").write_text("left")
        (shm / "folder").mkdir()
        (shm / "folder" / "file").write_text("left")
        (shm / "link").symlink_to(elsewhere)
        (shm / "links").symlink_to(tmp_path)

    litter()
    await make(fake_mps)
    assert [path.name for path in shm.iterdir()] == [".vgpu-agent"]
    assert elsewhere.exists()
    litter()
    fake_mps.start()
    await make(fake_mps)
    assert len(list(shm.iterdir())) == 5


async def test_servers_of_a_dead_daemon_are_ended_and_others_left_alone(fake_mps, caplog):
    other_root = fake_mps.directories.root.parent / "other"
    other_root.mkdir()
    other = FakeMps(other_root)
    try:
        other.start()
        foreign = other.start_server()
        other.kill()
        fake_mps.start()
        server = fake_mps.start_server()
        await make(fake_mps)
        assert fake_mps.server_pids() == [server]
        assert caplog.records == []
        fake_mps.kill()
        await make(fake_mps)
        assert f"MPS server {server} has lost its daemon and is ended" in caplog.text
        assert fake_mps.server_pids() == []
        assert other.server_pids() == [foreign]
    finally:
        other.close()


async def test_a_server_that_may_not_be_looked_into_is_logged_and_left(
    fake_mps, monkeypatch, caplog
):
    """Root without capabilities cannot read the environment of another user's process."""
    fake_mps.start()
    server = fake_mps.start_server()
    with monkeypatch.context() as patched:
        patched.setattr("vgpu_agent.mps.processes.variable_of", lambda *_: None)
        await make(fake_mps)
        assert "does not show whose it is" not in caplog.text  # its daemon answers
        fake_mps.kill()
        await make(fake_mps)
    assert f"MPS server {server} does not show whose it is" in caplog.text
    assert fake_mps.server_pids() == [server]


async def test_a_server_that_takes_no_sigterm_is_killed(fake_mps):
    fake_mps.behave(stubborn=True)
    fake_mps.start()
    fake_mps.start_server()
    fake_mps.kill()
    await make(fake_mps, end_seconds=0.2)
    eventually(lambda: fake_mps.server_pids() == [])


async def test_servers_of_a_daemon_that_hangs_are_left(fake_mps, caplog):
    fake_mps.start()
    server = fake_mps.start_server()
    fake_mps.directories.state.write_text("{}")
    fake_mps.behave(hang=True)
    await make(fake_mps)
    assert fake_mps.server_pids() == [server]
    assert fake_mps.directories.state.exists()
    assert "the MPS daemon cannot be asked; what is there of it is left alone" in caplog.text


# Compute modes: as processes, since the loader reads LD_LIBRARY_PATH only at the start of one


class Node:
    """A node with fake GPUs, on which the commands run."""

    def __init__(self, mps: FakeMps, nvml: FakeNvml) -> None:
        self.mps, self.nvml = mps, nvml
        nvml.set_gpus(
            FakeGpu("GPU-a", bus="00000000:3B:00.0"),
            FakeGpu("GPU-b", bus="00000000:5E:00.0", compute_mode=2),
        )

    def run(self, command: str, code: int = 0, by_gpu: dict[str, int] | None = None) -> str:
        """What it says."""
        root = str(self.mps.directories.root)
        return self._run(BARE.format(command=command, root=root, by_gpu=by_gpu or {}), code)

    def run_command(self, command: str, **variables: str) -> str:
        return self._run(
            COMMAND.format(command), VGPU_GPU_DRIVER="nvml", VGPU_SHARING="mps", **variables
        )

    def _run(self, script: str, code: int = 0, **variables: str) -> str:
        process = self.mps.run(script, **{**self.nvml.environment(), **variables})
        _, said = process.communicate(timeout=30)
        assert process.returncode == code, said
        return said

    @property
    def sets(self) -> list[str]:
        if not self.nvml.log.exists():
            return []
        lines = self.nvml.log.read_text().splitlines()
        return [line.removeprefix("compute_mode ") for line in lines]

    @property
    def remembered(self) -> dict[str, int]:
        return json.loads(self.mps.directories.compute_modes.read_text())["modes"]


@pytest.fixture
def node(fake_mps: FakeMps, fake_nvml: FakeNvml) -> Node:
    return Node(fake_mps, fake_nvml)


def test_shared_gpus_become_exclusive_once_and_are_restored(node):
    said = node.run_command("prepare")
    assert node.sets == ["GPU-a 3", "GPU-b 3"]
    assert "GPU-a: compute mode EXCLUSIVE_PROCESS, was DEFAULT" in said
    assert node.remembered == {"GPU-a": 0, "GPU-b": 2}
    # As after a kill: what is found now is ours.
    node.run("prepare")
    assert len(node.sets) == 2
    assert node.remembered == {"GPU-a": 0, "GPU-b": 2}
    said = node.run_command("restore")
    assert node.sets[2:] == ["GPU-a 0", "GPU-b 2"]
    assert "GPU-b: compute mode PROHIBITED is restored" in said
    assert "nothing to restore" in node.run("restore")
    assert len(node.sets) == 4


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
    said = node.run_command("prepare", VGPU_MPS_COMPUTE_MODE="keep")
    assert node.sets == []
    assert "compute modes are left as they are" in said
    assert not node.mps.directories.compute_modes.exists()


def test_what_was_remembered_in_another_boot_is_found_again(node):
    node.mps.make_directories()
    node.mps.directories.compute_modes.write_text(
        json.dumps({"boot_id": "of another boot", "modes": {"GPU-a": 2, "GPU-x": 2}})
    )
    assert "nothing to restore" in node.run("restore")
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
