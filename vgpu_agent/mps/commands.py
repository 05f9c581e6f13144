"""The `vgpu-agent mps` commands, from the settings. Each runs to its end."""

import logging
import signal
from collections.abc import Sequence
from fractions import Fraction
from typing import NoReturn

import anyio

from vgpu_agent import __version__
from vgpu_agent.agent import make_driver
from vgpu_agent.gpu.driver import Scan
from vgpu_agent.model.container import Threads
from vgpu_agent.model.devices import Gpu
from vgpu_agent.model.share import MIB, Divided, Division, MpsLimits, Share, divide, usable_bytes
from vgpu_agent.mps.applied import AppliedCard
from vgpu_agent.mps.control import Control, become_daemon
from vgpu_agent.mps.prepare import Directories, SetComputeMode, prepare, restore
from vgpu_agent.mps.watch import Measure, WatchFiles, WatchPlan, watch
from vgpu_agent.settings import GpuDriverKind, MpsComputeMode, Settings

log = logging.getLogger(__name__)


def mps_prepare(settings: Settings) -> None:
    """`vgpu-agent mps prepare`. Raises MpsSetupError and DriverError."""
    anyio.run(_prepare, settings)


def mps_restore(settings: Settings) -> None:
    """`vgpu-agent mps restore`. Raises MpsSetupError and DriverError."""
    anyio.run(_restore, settings)


def mps_daemon(settings: Settings) -> NoReturn:
    """`vgpu-agent mps daemon`: this process becomes the daemon. Raises MpsBinaryError."""
    directories = _directories(settings)
    become_daemon(directories.pipe, directories.log, multiuser=settings.mps_multiuser)


def mps_watch(settings: Settings) -> None:
    """`vgpu-agent mps watch`, until SIGTERM or SIGINT. Raises MpsSetupError and DriverError."""
    anyio.run(_watch, settings)


async def _prepare(settings: Settings) -> None:
    directories = _directories(settings)
    exclusive = settings.mps_compute_mode is MpsComputeMode.EXCLUSIVE
    await prepare(
        directories,
        _control(directories),
        make_driver(settings),
        settings.division(),
        _set_mode(settings) if exclusive else None,
    )
    log.info("%s is ready for the MPS daemon", directories.root)


async def _restore(settings: Settings) -> None:
    set_mode = _set_mode(settings)
    if set_mode is None:
        log.info("simulated cards have no compute mode")
        return
    await restore(_directories(settings), make_driver(settings), set_mode)


async def _watch(settings: Settings) -> None:
    directories = _directories(settings)
    with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_work, settings, directories)
            async for number in signals:
                log.info("%s: ending; the MPS daemon and its limits stay", number.name)
                break
            tasks.cancel_scope.cancel()


async def _work(settings: Settings, directories: Directories) -> None:
    async with make_driver(settings) as driver:
        scan = await driver.scan()
    plan = watch_plan(scan, settings.division(), settings.mps_limits, settings.mps_threads)
    await watch(
        plan,
        _control(directories),
        WatchFiles(directories.state, directories.watch),
        measure=_measure(settings),
    )


def watch_plan(
    scan: Scan, division: Division, limits: MpsLimits, threads: Threads | float
) -> WatchPlan:
    """What the daemon is told for these cards: under `server` the share of one vGPU.

    Ordinals are in PCI order over all cards that the driver shows, excluded ones too: the daemon is
    started with CUDA_DEVICE_ORDER=PCI_BUS_ID and sees all of them.
    """
    excluded = [each.gpu for each in scan.excluded]
    order = _pci_order([*scan.gpus, *excluded])
    divided = {gpu: each for gpu in scan.gpus if isinstance(each := divide(gpu, division), Divided)}
    server = limits is MpsLimits.SERVER
    cards = tuple(
        AppliedCard(
            uuid=gpu.uuid,
            ordinal=order.index(gpu.uuid),
            replicas=each.replicas,
            memory_limit_bytes=_vgpu_bytes(gpu, each, division) if server else None,
        )
        for gpu, each in sorted(divided.items(), key=lambda item: order.index(item[0].uuid))
    )
    percentage = None
    if server and threads is not Threads.NONE and cards:
        # By its text: a factor of 0.29 is meant, and not the nearest binary number below it.
        factor = Fraction(1) if isinstance(threads, Threads) else Fraction(str(threads))
        # The daemon knows one number for all cards.
        percentage = min(Share(1, card.replicas).thread_percentage(factor) for card in cards)
    return WatchPlan(limits, None if percentage == 100 else percentage, cards, __version__)


def _vgpu_bytes(gpu: Gpu, divided: Divided, division: Division) -> int:
    """Memory of one vGPU, in whole MiB as the daemon takes it."""
    size = divided.vgpu_bytes
    if size is None:
        usable = usable_bytes(gpu.memory_bytes, gpu.reserved_bytes, division.held_back)
        size = Share(1, divided.replicas).memory_bytes(usable)
    return size // MIB * MIB


def _pci_order(gpus: Sequence[Gpu]) -> list[str]:
    return [gpu.uuid for gpu in sorted(gpus, key=lambda gpu: gpu.pci_bus_id.lower())]


def _directories(settings: Settings) -> Directories:
    shm = settings.mps_shm_directory if settings.mps_shm else None
    return Directories(settings.mps_directory, shm)


def _control(directories: Directories) -> Control:
    return Control(directories.pipe, directories.log)


def _measure(settings: Settings) -> Measure | None:
    if settings.gpu_driver is GpuDriverKind.SIMULATED:
        return None
    from vgpu_agent.gpu.nvml import process_memory

    return process_memory


def _set_mode(settings: Settings) -> SetComputeMode | None:
    if settings.gpu_driver is GpuDriverKind.SIMULATED:
        return None
    # Imported where it is used: simulated cards need no NVML.
    from vgpu_agent.gpu.nvml import set_compute_mode

    return set_compute_mode
