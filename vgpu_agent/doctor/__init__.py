"""`vgpu-agent doctor`: looks at everything that the agent needs, and says what is wrong.

It changes nothing and holds nothing open. A check that cannot be done is a failed check, never an
error, and nothing that hangs, a driver included, makes the whole take ten seconds.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path

import anyio

from vgpu_agent import settings as configuration
from vgpu_agent.doctor import mps, node
from vgpu_agent.doctor.cards import Cards, Plan, ask_driver
from vgpu_agent.doctor.report import (
    TIMEOUTS,
    Check,
    Look,
    Timeouts,
    Verdict,
    guarded,
    in_thread,
    render_json,
    render_text,
    worst,
)
from vgpu_agent.errors import SettingsError
from vgpu_agent.gpu.driver import GpuDriver
from vgpu_agent.mps.daemon import Daemon, DaemonLook
from vgpu_agent.settings import (
    GpuDriverKind,
    MpsComputeMode,
    Settings,
    SharingKind,
)

__all__ = ["Check", "Timeouts", "Verdict", "examine", "render_json", "render_text", "worst"]

OTHER_MPS = Path("/tmp/nvidia-mps")  # noqa: S108 - where CUDA looks for MPS by itself


async def examine(
    settings: Settings | SettingsError,
    *,
    environment: Mapping[str, str],
    make_driver: Callable[[Settings], GpuDriver],
    make_daemon: Callable[[Settings], Daemon | None],
    other_mps: Path = OTHER_MPS,
    timeouts: Timeouts = TIMEOUTS,
) -> tuple[Check, ...]:
    """All checks, the first cause first. Raises nothing, and takes less than 10 s.

    Where the settings are wrong, the others are checked with the default of every wrong one.
    """
    checks = guarded("settings", partial(check_settings, settings, environment))
    if isinstance(settings, SettingsError):
        assumed = configuration.assume(environment)
        if assumed is None:
            return checks
        settings = assumed
    plan = Plan(
        settings.division(),
        by_mps=settings.sharing is SharingKind.MPS,
        exclusive=settings.mps_compute_mode is MpsComputeMode.EXCLUSIVE,
    )
    real = settings.gpu_driver is GpuDriverKind.NVML
    before, after = _looks(settings, real=real, by_mps=plan.by_mps, environment=environment)
    if real:
        before["other mps"] = partial(mps.check_other, other_mps)
    cards = Cards()
    daemon: DaemonLook | Check | None = None
    looked: dict[str, tuple[Check, ...]] = {}

    async def look_at_cards() -> None:
        nonlocal cards
        cards = await ask_driver(partial(make_driver, settings), plan, timeouts=timeouts)

    async def look_at_daemon() -> None:
        nonlocal daemon
        daemon = await mps.ask_daemon(partial(make_daemon, settings), timeouts=timeouts)

    async def look_at(name: str, look: Look) -> None:
        looked[name] = await in_thread(name, look, timeouts.look)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(look_at_cards)
        if real and plan.by_mps:
            tasks.start_soon(look_at_daemon)
        for name, look in (before | after).items():
            tasks.start_soon(look_at, name, look)

    checks += cards.checks
    checks += tuple(check for name in before for check in looked[name])
    if daemon is not None:
        judged = partial(mps.check_daemon, daemon, cards.gpus, plan.division, settings.mps_limits)
        checks += guarded("mps daemon", judged)
    return checks + tuple(check for name in after for check in looked[name])


def _looks(
    settings: Settings, *, real: bool, by_mps: bool, environment: Mapping[str, str]
) -> tuple[dict[str, Look], dict[str, Look]]:
    """What blocks, by the name under which a failure is told: before the daemon's, and after."""
    sockets = [settings.plugin_directory / settings.endpoint]
    before: dict[str, Look] = {}
    if real and by_mps:
        sockets.append(settings.mps_directory / "pipe" / "control")
        shm = settings.mps_shm_directory if settings.mps_shm else None
        before["mps binary"] = partial(mps.check_binary, environment)
        before["mps directories"] = partial(mps.check_directories, settings.mps_directory, shm)
    return before, {
        "socket path": partial(node.check_socket_paths, *sockets),
        "kubelet": partial(node.check_kubelet, settings.plugin_directory),
        "endpoint": partial(node.check_endpoint, settings),
        "metrics address": partial(node.check_metrics, settings.metrics_address),
        "state directory": partial(node.check_state_directory, settings.state_directory),
        "remembered faults": partial(node.check_faults, settings.state_directory),
    }


def check_settings(
    settings: Settings | SettingsError, environment: Mapping[str, str]
) -> Iterable[Check]:
    """Every wrong variable, and every unknown one."""
    if isinstance(settings, SettingsError):
        advice = "set what is allowed: `vgpu-agent run` ends with exit code 2 as it is"
        lines = str(settings).splitlines()
        for line in lines[1:] or lines:
            yield Check("settings", Verdict.FAIL, line.strip(), advice)
    else:
        known = {configuration.variable(name) for name in Settings.model_fields}
        count = sum(name.upper() in known for name in environment)
        yield Check("settings", Verdict.OK, f"{count} VGPU_* variables are set, and right")
    for name, nearest in configuration.unknown_variables(environment).items():
        detail = f"{name} is no setting of vgpu-agent and does nothing"
        advice = f"did you mean {nearest}?" if nearest else "remove it"
        yield Check("settings", Verdict.WARN, detail, advice)
