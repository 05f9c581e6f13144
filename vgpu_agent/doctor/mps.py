"""MPS on this node: its program, its directories, its daemon, and the limits that it was told."""

import os
import shutil
import stat
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import anyio

from vgpu_agent.doctor.files import connects, described, selinux_label
from vgpu_agent.doctor.report import TIMEOUTS, Check, Timeouts, Verdict, late, unexpected
from vgpu_agent.model.devices import Gpu
from vgpu_agent.model.share import Division, MpsLimits
from vgpu_agent.mps.control import BINARY
from vgpu_agent.mps.daemon import Daemon, DaemonLook
from vgpu_agent.mps.guard import judge

_SEE_POD = "see the log of the MPS pod of this node"


async def ask_daemon(
    make: Callable[[], Daemon | None], *, timeouts: Timeouts = TIMEOUTS
) -> DaemonLook | Check:
    """A look at the daemon, or the check that says why there is none. Raises nothing."""
    name = "mps daemon"
    try:
        with anyio.move_on_after(timeouts.daemon):
            daemon = make()
            if daemon is None:
                return Check(name, Verdict.OK, "none is needed")
            return await daemon.look()
    except Exception as error:  # noqa: BLE001 - whatever it is, it is told
        return unexpected(name, error)
    return late(name, timeouts.daemon, f"{_SEE_POD}; a daemon that hangs needs the pod replaced")


def check_daemon(
    look: DaemonLook | Check, gpus: tuple[Gpu, ...], division: Division, limits: MpsLimits
) -> Iterable[Check]:
    """Whether it answers, with the limits of these settings in force: as the agent judges it."""
    if isinstance(look, Check):
        yield look
        return
    if look.error is not None:
        yield Check("mps daemon", Verdict.FAIL, look.error, _SEE_POD)
        return
    clients = sum(look.clients.values())
    yield Check("mps daemon", Verdict.OK, f"it answers, and has {clients} clients")
    if look.faulty:
        servers = ", ".join(map(str, look.faulty))
        advice = "nothing: it is over when its clients are gone; find the client that failed"
        yield Check("mps servers", Verdict.FAIL, f"status FAULT of MPS server {servers}", advice)
    if look.waiting:
        detail = f"{look.waiting} clients of another user wait until all of the first are gone"
        advice = "run the containers of a card as one user: MPS serves one at a time"
        yield Check("mps clients", Verdict.WARN, detail, advice)
    mps = judge(look, gpus, division, limits).mps
    if mps.problem is not None:
        advice = "see the container of `vgpu-agent mps watch` in the MPS pod of this node"
        yield Check("mps limits", Verdict.FAIL, f"not in force: {mps.problem}", advice)
    elif mps.replacement is not None:
        advice = "drain the node's GPU pods, then delete its MPS pod"
        yield Check("mps limits", Verdict.WARN, mps.replacement, advice)
    else:
        yield Check("mps limits", Verdict.OK, f"in force (VGPU_MPS_LIMITS={limits})")


def check_binary(environment: Mapping[str, str]) -> Iterable[Check]:
    """Whether the daemon's control program is there: the daemon is asked through it."""
    found = shutil.which(BINARY, path=environment.get("PATH", os.defpath))
    if found is not None:
        yield Check("mps binary", Verdict.OK, found)
        return
    yield Check(
        "mps binary",
        Verdict.FAIL,
        f"{BINARY} is not on PATH",
        "run this container with the NVIDIA runtime and"
        " NVIDIA_DRIVER_CAPABILITIES=compute,utility, which brings it in",
    )


def check_other(path: Path) -> Iterable[Check]:
    """Another MPS on the node, in the directory that the NVIDIA runtime mounts everywhere."""
    if not path.exists():
        yield Check("other mps", Verdict.OK, f"{path} is not there")
        return
    alive = connects(path / "control") is None
    yield Check(
        "other mps",
        Verdict.WARN,
        f"{path} is there ({'a daemon serves it' if alive else 'left behind'}): the NVIDIA runtime"
        " mounts it into every GPU container, and those that name no other directory become"
        " clients there, without limits",
        f"{'end that daemon, then ' if alive else ''}remove {path} on the node",
    )


def check_directories(directory: Path, shm: Path | None) -> Iterable[Check]:
    """The daemon's directories. Containers of every user must get into `pipe`, and write to shm.

    The agent itself needs only `pipe`: it may not see the others from its container.
    """
    in_pipe = stat.S_IROTH | stat.S_IXOTH
    yield _directory("mps pipe", directory / "pipe", others=in_pipe, missing=Verdict.FAIL)
    yield _directory("mps log", directory / "log", others=0, missing=Verdict.WARN)
    if shm is not None:
        yield _directory("mps shm", shm, others=stat.S_IRWXO, missing=Verdict.WARN)


def _directory(name: str, path: Path, *, others: int, missing: Verdict) -> Check:
    """A directory, the mode bits that others need, and how bad it is where it is missing."""
    prepare = "`vgpu-agent mps prepare` in the MPS pod makes it: see that pod's log"
    try:
        found = path.stat()
    except OSError as error:
        return Check(name, missing, f"{path}: {error.strerror}", prepare)
    if not stat.S_ISDIR(found.st_mode):
        return Check(name, Verdict.FAIL, f"{path} is not a directory", f"remove it; {prepare}")
    label = selinux_label(path)
    detail = described(path, found, label)
    if found.st_mode & others != others:
        mode = stat.S_IMODE(found.st_mode) | others
        detail += ": containers of other users cannot use it"
        return Check(name, Verdict.WARN, detail, f"`chmod {mode:o} {path}` on the node")
    if others and label is not None and label.split(":")[2:3] != ["container_file_t"]:
        detail += ": where SELinux is enforcing, containers cannot use it"
        return Check(name, Verdict.WARN, detail, f"`chcon -t container_file_t {path}` on the node")
    return Check(name, Verdict.OK, detail)
