"""Who looks at the driver's memory limits on this node, and who sets them, from the settings."""

import gc

import anyio

from vgpu_agent.drivers import make_driver
from vgpu_agent.gpu.driver import GpuDriver
from vgpu_agent.kubelet.checkpoint import CHECKPOINT
from vgpu_agent.limits.look import Looker
from vgpu_agent.limits.tree import Finder
from vgpu_agent.limits.watch import PATIENCE, Enforced, Enforcer, LimitsWatch, Paced
from vgpu_agent.model.node import Node
from vgpu_agent.model.rules import MemoryLimits
from vgpu_agent.running import until_ended
from vgpu_agent.settings import Settings


def make_looker(settings: Settings, driver: GpuDriver, *, enforce: bool = False) -> Looker:
    """What looks at the limits, and with `enforce` sets them."""
    guarantee = settings.memory_guarantee
    finder = Finder(
        settings.plugin_directory / CHECKPOINT,
        settings.resource_name,
        enable=enforce and settings.memory_limits_enable_controller,
        living=enforce and guarantee,
    )
    return Looker(driver, finder, guarantee, enforce)


def make_limits_watch(settings: Settings, driver: GpuDriver, node: Node) -> LimitsWatch:
    """What tells the agent of the limits."""
    if settings.memory_limits is MemoryLimits.DRIVER:
        # Which says itself when its own patience is over.
        watch = LimitsWatch(Enforced(settings.state_directory).look, node, patience=2 * PATIENCE)
    else:
        watch = LimitsWatch(Paced(make_looker(settings, driver)).own_look, node, interval=4)
    if settings.device_list.by_cdi:
        from vgpu_agent.gpu.cdi import CdiSpecs  # few nodes need it

        watch.certain = CdiSpecs(settings.cdi_kind).limits_memory
    return watch


async def enforce(settings: Settings) -> None:
    """`vgpu-agent limits enforce`: until SIGTERM or SIGINT."""
    gc.freeze()
    looker = make_looker(settings, make_driver(settings), enforce=True)
    await until_ended(Enforcer(looker, settings.state_directory).run, anyio.Event())
