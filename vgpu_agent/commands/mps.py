"""The `vgpu-agent mps` commands, from the settings. Each runs to its end."""

import logging
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import NoReturn

import anyio

from vgpu_agent import __version__
from vgpu_agent.drivers import make_driver
from vgpu_agent.errors import DriverError, MpsSetupError, StoreError, UnknownGpuError
from vgpu_agent.model.devices import pci_order
from vgpu_agent.model.facts import AppliedGpu, DaemonLook, Scan
from vgpu_agent.model.names import GpuName, find_gpu
from vgpu_agent.model.rules import MIB, MpsLimits, SharingRules
from vgpu_agent.model.share import Divided, divide, thread_percentage
from vgpu_agent.mps.directories import Directories
from vgpu_agent.mps.look import Measure
from vgpu_agent.mps.modes import ComputeModes
from vgpu_agent.mps.prepare import prepare, remove, wait_for_end
from vgpu_agent.mps.programs import hold
from vgpu_agent.mps.serve import end, lives
from vgpu_agent.mps.state import State, Watched, with_division
from vgpu_agent.mps.supervise import supervise
from vgpu_agent.mps.watch import watch
from vgpu_agent.running import until_ended
from vgpu_agent.settings import GpuDriverKind, MpsComputeMode, Settings

log = logging.getLogger(__name__)

MULTIUSER_DRIVER = 555
"""The first driver whose daemon has -multiuser-server; that of 550 ends with exit code 1 (seen)."""


def mps_prepare(settings: Settings) -> None:
    """`vgpu-agent mps prepare`. Raises MpsSetupError and DriverError."""
    directories = _directories(settings)
    prepare(directories)
    mps_compute_modes(settings)
    log.info("%s is ready for MPS daemons", directories.root)


def mps_compute_modes(settings: Settings) -> None:
    """`vgpu-agent mps compute-modes`: a reset of a GPU sets its mode to DEFAULT.

    Raises MpsSetupError and DriverError.
    """
    modes = _compute_modes(settings)
    if modes is None or settings.mps_compute_mode is not MpsComputeMode.EXCLUSIVE:
        log.info("compute modes are left as they are")
    else:
        anyio.run(modes.take, settings.sharing_rules())


def mps_restore(settings: Settings, *, at_end: bool) -> None:
    """`vgpu-agent mps restore`. Raises MpsSetupError and DriverError.

    `at_end`: when SIGTERM has come, which must be blocked, and the daemons have ended.
    """
    directories = _directories(settings)
    if at_end:
        wait_for_end(directories)
    elif directories.root.is_dir():
        hold(directories.daemons)
    modes = _compute_modes(settings)
    if modes is None:
        log.info("simulated GPUs have no compute mode")
    else:
        anyio.run(modes.restore)
    remove(directories)


def mps_daemon(settings: Settings) -> NoReturn:
    """`vgpu-agent mps daemon`: this process keeps the daemons running.

    Raises MpsSetupError and DriverError.
    """
    scan = anyio.run(_scan, settings)
    plan = watch_plan(scan, _rules(settings))
    daemons = {
        name: ",".join(gpu.uuid for gpu in each.look.gpus) for name, each in plan.daemons.items()
    }
    if not daemons:
        raise MpsSetupError(
            f"none of the {len(scan.gpus)} GPUs of this node is shared: `vgpu-agent status` in the"
            " agent's pod says why; they are looked at again when this container is started again"
        )
    options = ["-multiuser-server"] if settings.mps_multiuser and serves_users(scan) else []
    supervise(_directories(settings), daemons, options)


def serves_users(scan: Scan) -> bool:
    """Whether the daemons take the option for several users; said where not.

    An older one ends at once. To do without costs users their turn, and no GPU and no limit.
    """
    major = scan.driver_version.partition(".")[0]
    if not major.isdecimal() or int(major) >= MULTIUSER_DRIVER:
        return True
    log.warning(
        "VGPU_MPS_MULTIUSER=on is not in effect: it requires driver %d, and this node has %s; users"
        " of different UIDs wait for each other until the driver is updated",
        MULTIUSER_DRIVER,
        scan.driver_version,
    )
    return False


def mps_restart(settings: Settings, gpu: str) -> None:
    """`vgpu-agent mps restart`. Raises MpsSetupError."""
    directories = _directories(settings)
    named = directories.daemon(_daemon_name(settings, gpu))
    if not lives(named):
        raise MpsSetupError(
            f"no MPS daemon serves {gpu} now: `ls {directories.root}` shows the names of daemons"
        )
    end(named)
    if lives(named):
        raise MpsSetupError(
            f"the MPS daemon {named.name} cannot be ended: run this in the container `daemon`; if"
            " that does not help, drain and reboot the node"
        )
    log.info("MPS daemon %s has ended and is started again; other daemons are not", named.name)


def _daemon_name(settings: Settings, gpu: str) -> str:
    """The daemon that serves a GPU. Raises MpsSetupError.

    The driver, which may hang, is asked only for an index or a bus ID.
    """
    rules, directories = settings.sharing_rules(), _directories(settings)
    for name in (gpu, rules.daemon_of(gpu)):
        if "/" not in name and directories.daemon(name).process.exists():
            return name
    try:
        serving = [GpuName(path.parent.name) for path in directories.root.glob("*/process")]
        with suppress(UnknownGpuError):
            return find_gpu(gpu, serving).uuid
        gpus = [GpuName.of(each) for each in anyio.run(_scan, settings).gpus]
        return rules.daemon_of(find_gpu(gpu, gpus).uuid)
    except (UnknownGpuError, DriverError) as error:
        raise MpsSetupError(f"no MPS daemon serves {gpu} now: {error}") from error


def mps_watch(settings: Settings) -> None:
    """`vgpu-agent mps watch`, until SIGTERM or SIGINT. Raises MpsSetupError and DriverError."""
    anyio.run(until_ended, partial(_watch, settings), anyio.Event())
    log.info("the MPS daemons and their limits stay")


async def _watch(settings: Settings) -> None:
    scan, directories = await _scan(settings), _directories(settings)

    def divided() -> State:
        rules = with_division(directories.division, settings.sharing_rules())
        return watch_plan(scan, rules)

    plan = watch_plan(scan, _rules(settings))
    await watch(plan, directories, measure=_measure(settings), divided=divided)


async def _scan(settings: Settings) -> Scan:
    async with make_driver(settings) as driver:
        return await driver.scan()


def _rules(settings: Settings) -> SharingRules:
    """Our settings, with GPUs divided as the agent does: this pod is older than its settings."""
    rules = settings.sharing_rules()
    try:
        return with_division(_directories(settings).division, rules)
    except StoreError as error:
        log.warning("%s; GPUs are divided by the settings of this pod", error)
        return rules


def watch_plan(scan: Scan, rules: SharingRules) -> State:
    """What each daemon is set up for with these GPUs.

    Under `server` a client has the memory, in whole MiB, and the threads of one vGPU; otherwise
    there are no limits. Ordinals are in PCI order over the GPUs of the daemon, which sees no other.
    """
    server = rules.mps_limits is MpsLimits.SERVER
    daemons: dict[str, list[AppliedGpu]] = {}
    for gpu in sorted(scan.gpus, key=lambda gpu: pci_order(gpu.pci_bus_id)):
        divided = divide(gpu, rules)
        if isinstance(divided, Divided):
            limit = None
            if server:  # in whole MiB, as the daemon takes it
                size = divided.vgpu_bytes or (divided.usable_bytes or 0) // divided.replicas
                limit = size // MIB * MIB
            gpus = daemons.setdefault(rules.daemon_of(gpu.uuid), [])
            gpus.append(AppliedGpu(gpu.uuid, len(gpus), divided.replicas, limit))
    return State(
        __version__,
        rules.mps_limits,
        0.0,
        {name: Watched(_planned(gpus, rules)) for name, gpus in daemons.items()},
    )


def _planned(gpus: Sequence[AppliedGpu], rules: SharingRules) -> DaemonLook:
    # The daemon knows one number for all its GPUs.
    percentages = [thread_percentage(1, gpu.replicas, rules.mps_threads) for gpu in gpus]
    least = min(filter(None, percentages), default=100)
    limited = rules.mps_limits is MpsLimits.SERVER and least < 100
    return DaemonLook(gpus=tuple(gpus), thread_percentage=least if limited else None)


def _directories(settings: Settings) -> Directories:
    shm = settings.mps_shm_directory if settings.mps_shm else None
    return Directories(settings.mps_directory, shm)


def _measure(settings: Settings) -> Measure | None:
    if settings.gpu_driver is GpuDriverKind.SIMULATED:
        return None
    # Imported where it is used: simulated GPUs need no NVML.
    from vgpu_agent.gpu.nvml import process_memory

    return process_memory


def _compute_modes(settings: Settings) -> ComputeModes | None:
    """None where GPUs have none."""
    if settings.gpu_driver is GpuDriverKind.SIMULATED:
        return None
    from vgpu_agent.gpu.nvml import set_compute_mode  # as above

    path = _directories(settings).compute_modes
    return ComputeModes(make_driver(settings), set_compute_mode, path)
