"""The `vgpu-agent mps` commands, from the settings. Each runs to its end."""

import logging
import signal
from typing import NoReturn

import anyio

from vgpu_agent import __version__
from vgpu_agent.agent import make_driver
from vgpu_agent.model.devices import pci_order
from vgpu_agent.model.facts import Applied, AppliedGpu, Scan
from vgpu_agent.model.rules import MIB, MpsLimits, SharingRules
from vgpu_agent.model.share import Divided, divide, thread_percentage
from vgpu_agent.mps.control import Control, become_daemon
from vgpu_agent.mps.directories import Directories
from vgpu_agent.mps.modes import ComputeModes
from vgpu_agent.mps.prepare import prepare
from vgpu_agent.mps.watch import Measure, watch
from vgpu_agent.settings import GpuDriverKind, MpsComputeMode, Settings

log = logging.getLogger(__name__)


def mps_prepare(settings: Settings) -> None:
    """`vgpu-agent mps prepare`. Raises MpsSetupError and DriverError."""
    anyio.run(_prepare, settings)


def mps_restore(settings: Settings) -> None:
    """`vgpu-agent mps restore`. Raises MpsSetupError and DriverError."""
    modes = _compute_modes(settings)
    if modes is None:
        log.info("simulated GPUs have no compute mode")
    else:
        anyio.run(modes.restore)


def mps_daemon(settings: Settings) -> NoReturn:
    """`vgpu-agent mps daemon`: this process becomes the daemon. Raises MpsBinaryError."""
    become_daemon(_directories(settings), multiuser=settings.mps_multiuser)


def mps_watch(settings: Settings) -> None:
    """`vgpu-agent mps watch`, until SIGTERM or SIGINT. Raises MpsSetupError and DriverError."""
    anyio.run(_watch, settings)


async def _prepare(settings: Settings) -> None:
    directories = _directories(settings)
    await prepare(Control(directories))
    modes = _compute_modes(settings)
    if modes is None or settings.mps_compute_mode is not MpsComputeMode.EXCLUSIVE:
        log.info("compute modes are left as they are")
    else:
        await modes.take(settings.sharing_rules())
    log.info("%s is ready for the MPS daemon", directories.root)


async def _watch(settings: Settings) -> None:
    with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_work, settings)
            async for number in signals:
                log.info("%s: ending; the MPS daemon and its limits stay", number.name)
                break
            tasks.cancel_scope.cancel()


async def _work(settings: Settings) -> None:
    async with make_driver(settings) as driver:
        scan = await driver.scan()
    plan = watch_plan(scan, settings.sharing_rules())
    await watch(plan, Control(_directories(settings)), measure=_measure(settings))


def watch_plan(scan: Scan, rules: SharingRules) -> Applied:
    """What the daemon is set up for with these GPUs, whichever daemon it is.

    Under `server` a client has the memory, in whole MiB, and the threads of one vGPU; otherwise
    there are no limits.

    Ordinals are in PCI order over all GPUs that the driver shows, excluded ones too: the daemon is
    started with CUDA_DEVICE_ORDER=PCI_BUS_ID and sees all of them.
    """
    everything = [*scan.gpus, *(each.gpu for each in scan.undescribed)]
    order = [g.uuid for g in sorted(everything, key=lambda gpu: pci_order(gpu.pci_bus_id))]
    server = rules.mps_limits is MpsLimits.SERVER
    gpus = []
    for gpu in sorted(scan.gpus, key=lambda gpu: order.index(gpu.uuid)):
        divided = divide(gpu, rules)
        if isinstance(divided, Divided):
            limit = None
            if server:  # in whole MiB, as the daemon takes it
                size = divided.vgpu_bytes or (divided.usable_bytes or 0) // divided.replicas
                limit = size // MIB * MIB
            gpus.append(AppliedGpu(gpu.uuid, order.index(gpu.uuid), divided.replicas, limit))
    # The daemon knows one number for all GPUs.
    percentages = [thread_percentage(1, gpu.replicas, rules.mps_threads) for gpu in gpus]
    least = min(filter(None, percentages), default=100)
    return Applied(
        generation="",
        limits=rules.mps_limits,
        thread_percentage=least if server and least < 100 else None,
        gpus=tuple(gpus),
        problem=None,
        version=__version__,
    )


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
