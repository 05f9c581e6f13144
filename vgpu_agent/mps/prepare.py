"""`vgpu-agent mps prepare` and `mps restore`: the node before and after an MPS daemon.

`prepare` runs to its end before the daemon starts, as often as need be, and changes only what is
not yet right. What it changes of a card is remembered first, so that `restore` can undo it.
"""

import json
import logging
import os
import shutil
import signal
import stat
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import anyio
from anyio import to_thread

from vgpu_agent.errors import (
    DriverError,
    MpsBinaryError,
    MpsDownError,
    MpsError,
    MpsSetupError,
)
from vgpu_agent.gpu.driver import ComputeMode, GpuDriver
from vgpu_agent.gpu.memory import BOOT_ID
from vgpu_agent.model.devices import Excluded, Gpu
from vgpu_agent.model.share import Division, divide
from vgpu_agent.mps import processes
from vgpu_agent.mps.control import Control
from vgpu_agent.mps.processes import Process

log = logging.getLogger(__name__)

SERVER = "nvidia-cuda-mps-server"

OURS = ".vgpu-agent"
"""Marks a directory of shared memory as made by us, so that it may be emptied."""

SetComputeMode = Callable[[str, ComputeMode], bool]
"""Sets the mode of the card of that UUID; False where it has none. Blocks; raises DriverError."""


@dataclass(frozen=True, slots=True)
class Directories:
    """Where MPS lives on a node. `shm` is None where containers keep their own /dev/shm."""

    root: Path
    shm: Path | None

    @property
    def pipe(self) -> Path:
        """What clients reach the daemon through (`CUDA_MPS_PIPE_DIRECTORY`)."""
        return self.root / "pipe"

    @property
    def log(self) -> Path:
        """Logs of the daemon and its servers (`CUDA_MPS_LOG_DIRECTORY`)."""
        return self.root / "log"

    @property
    def state(self) -> Path:
        """What `mps watch` says of the limits; see `applied`."""
        return self.root / "state"

    @property
    def compute_modes(self) -> Path:
        """The compute modes that were found before ours."""
        return self.root / "compute-modes"

    @property
    def watch(self) -> Path:
        """Held by the one `mps watch`, with what it has applied."""
        return self.root / "watch"

    def modes(self) -> Mapping[Path, int]:
        """Each directory and its mode.

        A client runs as the user of its container, and so does the MPS server that is started for
        it; both connect to sockets in `pipe` by name and make no file there: they need to enter it,
        and nobody but root may put another socket in. Logs name the processes of all tenants, so
        they are root's. The shared memory directory is a /dev/shm, with its mode.
        """
        modes = {self.root: 0o755, self.pipe: 0o755, self.log: 0o700}
        return modes if self.shm is None else modes | {self.shm: 0o1777}


async def prepare(
    directories: Directories,
    control: Control,
    driver: GpuDriver,
    division: Division,
    set_mode: SetComputeMode | None,
    *,
    end_seconds: float = 5,
    boot_id_file: Path = BOOT_ID,
) -> None:
    """Makes the node ready for a daemon. Raises MpsSetupError, and DriverError without a driver.

    `set_mode` None leaves compute modes alone. An orphaned server has `end_seconds` to end.
    """
    if directories.shm is not None:
        _refuse_foreign(directories.shm)
    for directory, mode in directories.modes().items():
        _make(directory, mode)
    if directories.shm is not None:
        (directories.shm / OURS).touch(mode=0o600)
    await end_orphans(directories.pipe, control, end_seconds=end_seconds)
    await _clear_away(directories, control)
    if set_mode is None:
        log.info("compute modes are left as they are")
        return
    memory = _Modes(directories.compute_modes, boot_id_file)
    await _take_cards(driver, division, set_mode, memory)


async def restore(
    directories: Directories,
    driver: GpuDriver,
    set_mode: SetComputeMode,
    *,
    boot_id_file: Path = BOOT_ID,
) -> None:
    """Sets the remembered compute modes back. Raises MpsSetupError and DriverError.

    A card whose mode was changed since then is left as it is.
    """
    memory = _Modes(directories.compute_modes, boot_id_file)
    if not memory.found:
        log.info("no compute mode was changed in this boot of the node: nothing to restore")
        return
    async with driver:
        await driver.scan()
        for uuid in list(memory.found):
            await _give_back(driver, uuid, set_mode, memory)


# Directories


def _make(directory: Path, mode: int) -> None:
    """A directory of ours with that mode, also where it was there before."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        # By its descriptor, not followed: what a name means could change in between.
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError as error:
        raise MpsSetupError(
            f"{directory} cannot be made a directory ({error.strerror}): remove what is there, and"
            " mount its parent from the host, writable, into this container"
        ) from error
    try:
        found = os.fstat(descriptor)
        if (found.st_uid, found.st_gid) != (os.geteuid(), os.getegid()):
            os.fchown(descriptor, os.geteuid(), os.getegid())
        if stat.S_IMODE(found.st_mode) != mode:
            os.fchmod(descriptor, mode)
        _label(descriptor, directory)
    except OSError as error:
        raise MpsSetupError(
            f"owner and mode {mode:o} of {directory} cannot be set ({error.strerror}): run this"
            " container as root"
        ) from error
    finally:
        os.close(descriptor)


_LABEL = "security.selinux"
_CONTAINER_FILE = "container_file_t"


def _label(descriptor: int, directory: Path) -> None:
    """Lets containers use a directory where the node has SELinux; without it there is no label."""
    try:
        label = os.getxattr(descriptor, _LABEL)
    except OSError:
        return
    # user:role:type:level, where the level may hold colons and the end a zero byte
    parts = label.rstrip(b"\0").decode(errors="replace").split(":", 3)
    if len(parts) < 3 or parts[2] == _CONTAINER_FILE:
        return
    parts[2] = _CONTAINER_FILE
    try:
        os.setxattr(descriptor, _LABEL, ":".join(parts).encode() + b"\0")
    except OSError as error:
        log.warning(
            "%s cannot be given the SELinux type %s (%s): containers may be refused; on the node,"
            " run `chcon -t %s %s`",
            directory,
            _CONTAINER_FILE,
            error.strerror,
            _CONTAINER_FILE,
            directory,
        )


def _refuse_foreign(shm: Path) -> None:
    """Shared memory is emptied when no client is left: never what somebody else put there."""
    try:
        names = {path.name for path in shm.iterdir()}
    except OSError:
        return  # not there yet, or no directory, which is told where it is made
    if names and OURS not in names:
        raise MpsSetupError(
            f"{shm} holds files and was not made by vgpu-agent: it would be opened to every"
            " container and emptied; set VGPU_MPS_SHM_DIRECTORY to a directory of its own"
        )


async def _clear_away(directories: Directories, control: Control) -> None:
    """Removes what a daemon that is gone has left: what was said of it, and its shared memory.

    Only here can no client be there. Of a living daemon both are still true.
    """
    try:
        await control.servers()
    except MpsDownError:
        _remove(directories.state)
        if directories.shm is not None:
            _empty(directories.shm)
    except MpsError:
        return  # the daemon is there, or nobody knows: the file names the daemon that it means


def _empty(directory: Path) -> None:
    """Removes what is in a directory that every pod may write to; what cannot be is told."""
    try:
        with os.scandir(directory) as entries:
            for entry in entries:
                if entry.name == OURS:
                    continue
                if entry.is_dir(follow_symlinks=False):
                    shutil.rmtree(entry.path)
                else:
                    Path(entry.path).unlink(missing_ok=True)
    except OSError as error:
        log.warning("%s cannot be emptied: %s", directory, error)


def _remove(file: Path) -> None:
    try:
        file.unlink(missing_ok=True)
    except OSError as error:
        raise MpsSetupError(f"{file} cannot be removed ({error.strerror})") from error


# Orphans


async def end_orphans(
    pipe_directory: Path, control: Control, *, end_seconds: float = 5
) -> tuple[int, ...]:
    """Ends the servers of a dead daemon of that directory; their PIDs. Raises MpsSetupError.

    They hold the cards, and no client can reach them any more. Servers of any other daemon, and
    all servers while ours answers or may only be slow, are left alone. One that does not show whose
    it is, which takes capabilities, is told.
    """
    told = {
        server: processes.variable_of(server, "CUDA_MPS_PIPE_DIRECTORY")
        for server in processes.find_named(SERVER)
    }
    ours = [server for server, pipe in told.items() if pipe and Path(pipe) == pipe_directory]
    unknown = [server for server, pipe in told.items() if pipe is None]
    if not ours and not unknown:
        return ()
    try:
        await control.servers()
    except MpsDownError:
        pass
    except MpsBinaryError as error:
        log.warning("whether MPS servers are orphans cannot be asked: %s", error)
        return ()
    except MpsError as error:
        log.warning("the MPS daemon is there but in trouble; its servers are left: %s", error)
        return ()
    else:
        return ()
    for server in unknown:
        log.warning(
            "MPS server %d does not show whose it is: if it is left from a daemon of ours, it holds"
            " the cards. Install the chart with mps.endOrphans=true, or end it on the node",
            server.pid,
        )
    for server in ours:
        log.warning("MPS server %d has lost its daemon and is ended", server.pid)
    await _end(ours, end_seconds)
    return tuple(server.pid for server in ours)


async def _end(servers: Iterable[Process], seconds: float) -> None:
    """SIGTERM, and SIGKILL for what is still there after that time."""
    for number, patience in ((signal.SIGTERM, seconds), (signal.SIGKILL, 2.0)):
        servers = [server for server in servers if _signal(server, number)]
        with anyio.move_on_after(patience):
            while any(processes.find(server.pid) == server for server in servers):  # noqa: ASYNC110
                await anyio.sleep(0.05)
            return
    left = ", ".join(str(server.pid) for server in servers)
    raise MpsSetupError(
        f"MPS server {left} has lost its daemon and cannot be killed: a call to the driver hangs;"
        " drain and reboot the node"
    )


def _signal(server: Process, number: signal.Signals) -> bool:
    """Whether the server was still there."""
    if processes.find(server.pid) != server:
        return False
    try:
        os.kill(server.pid, number)
    except ProcessLookupError:
        return False
    except PermissionError as error:
        raise MpsSetupError(
            f"MPS server {server.pid} has lost its daemon and may not be ended: run this container"
            " as root"
        ) from error
    return True


# Compute modes


class _Modes:
    """The modes that were found before ours, in this boot: the driver forgets them with it."""

    def __init__(self, path: Path, boot_id_file: Path) -> None:
        self._path = path
        self._boot_id = boot_id_file.read_text().strip()
        self.found: dict[str, ComputeMode] = {}
        try:
            data = json.loads(path.read_text())
            if data["boot_id"] == self._boot_id:
                self.found = {uuid: ComputeMode(mode) for uuid, mode in data["modes"].items()}
        except FileNotFoundError:
            pass
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            log.warning("%s is damaged (%r): the modes found now are remembered", path, error)

    def keep(self, uuid: str, mode: ComputeMode) -> None:
        """Remembers the first mode of a card; what is found later may be ours."""
        if uuid not in self.found:
            self._write({**self.found, uuid: mode})

    def forget(self, uuid: str) -> None:
        self._write({each: mode for each, mode in self.found.items() if each != uuid})

    def _write(self, found: dict[str, ComputeMode]) -> None:
        new = self._path.with_name(f".{self._path.name}.new")
        try:
            with new.open("w") as file:
                json.dump({"boot_id": self._boot_id, "modes": found}, file)
                file.flush()
                os.fsync(file.fileno())
            new.replace(self._path)
        except OSError as error:
            raise MpsSetupError(
                f"{self._path} cannot be written ({error.strerror}), so compute modes could not be"
                " restored: mount its directory writable, or set VGPU_MPS_COMPUTE_MODE=keep"
            ) from error
        self.found = found


async def _take_cards(
    driver: GpuDriver, division: Division, set_mode: SetComputeMode, memory: _Modes
) -> None:
    """EXCLUSIVE_PROCESS for the shared cards, so that nothing runs past the daemon on them."""
    async with driver:
        scan = await driver.scan()
        shared = [gpu for gpu in scan.gpus if not isinstance(divide(gpu, division), Excluded)]
        for uuid in set(memory.found) - {gpu.uuid for gpu in shared}:
            # Shared before and not any more: others need the mode that they had.
            await _give_back(driver, uuid, set_mode, memory)
        for gpu in shared:
            await _take(driver, gpu, set_mode, memory)


async def _take(driver: GpuDriver, gpu: Gpu, set_mode: SetComputeMode, memory: _Modes) -> None:
    mode = (await driver.probe(gpu.uuid)).compute_mode
    if mode is None:
        log.warning("card %s has no compute mode: processes past MPS are not kept off", gpu.uuid)
        return
    memory.keep(gpu.uuid, mode)
    if mode is ComputeMode.EXCLUSIVE_PROCESS:
        return
    if await _set(gpu.uuid, ComputeMode.EXCLUSIVE_PROCESS, set_mode):
        log.info("card %s: compute mode EXCLUSIVE_PROCESS, was %s", gpu.uuid, mode.name)
    else:
        log.warning("card %s takes no compute mode: processes past MPS are not kept off", gpu.uuid)


async def _give_back(
    driver: GpuDriver, uuid: str, set_mode: SetComputeMode, memory: _Modes
) -> None:
    before = memory.found[uuid]
    reading = await driver.probe(uuid)
    if reading.lost:
        log.warning("card %s is not there; compute mode %s is not restored", uuid, before.name)
        return
    if reading.compute_mode is not ComputeMode.EXCLUSIVE_PROCESS:
        log.info("card %s: its compute mode was changed since; it is left alone", uuid)
    elif before is not ComputeMode.EXCLUSIVE_PROCESS:
        await _set(uuid, before, set_mode)
        log.info("card %s: compute mode %s is restored", uuid, before.name)
    else:
        log.info("card %s: compute mode %s was its own", uuid, before.name)
    memory.forget(uuid)


async def _set(uuid: str, mode: ComputeMode, set_mode: SetComputeMode) -> bool:
    try:
        return await to_thread.run_sync(set_mode, uuid, mode)
    except DriverError as error:
        raise MpsSetupError(
            f"{error}; or set VGPU_MPS_COMPUTE_MODE=keep to leave compute modes alone"
        ) from error
