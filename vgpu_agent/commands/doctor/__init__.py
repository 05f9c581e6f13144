"""`vgpu-agent doctor`: looks at everything that the agent needs, and says what is wrong.

What a running agent reports is its word; where none answers, the same code looks once at driver,
GPUs and MPS. It changes nothing and holds nothing open. A check that cannot be done is a failed
check, never an error, and nothing that hangs, a driver included, makes the whole take ten seconds.
"""

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import chain
from pathlib import Path

import anyio

from vgpu_agent import control, store
from vgpu_agent.agent import make_place, make_rules, make_watch
from vgpu_agent.commands import ask
from vgpu_agent.commands.doctor import preflight
from vgpu_agent.commands.doctor.checks import (
    TIMEOUTS,
    Checking,
    Timeouts,
    guarded,
    in_thread,
    late,
    unexpected,
)
from vgpu_agent.errors import NoAgentError, SettingsError, StoreError
from vgpu_agent.gpu import cordons, memory
from vgpu_agent.gpu.driver import GpuDriver
from vgpu_agent.gpu.watch import Intervals
from vgpu_agent.kubelet.podresources import SOCKET as POD_RESOURCES
from vgpu_agent.limiting import make_looker
from vgpu_agent.model.acceptance import Refusal
from vgpu_agent.model.advice import agent_log
from vgpu_agent.model.facts import MpsLook
from vgpu_agent.model.health import Moment
from vgpu_agent.model.limits import shares
from vgpu_agent.model.node import Node
from vgpu_agent.model.place import Place
from vgpu_agent.model.policy import remedy
from vgpu_agent.model.rules import MemoryLimits
from vgpu_agent.mps.daemon import Daemons
from vgpu_agent.observe import judge
from vgpu_agent.observe.report import Check, Report, Verdict
from vgpu_agent.observe.reporting import make_report
from vgpu_agent.settings import TABLE, GpuDriverKind, Settings, variable
from vgpu_agent.settings_reading import assume
from vgpu_agent.settings_unknown import unknown_setting_warnings

OTHER_MPS = Path("/tmp/nvidia-mps")  # noqa: S108 - where CUDA looks for MPS by itself


async def examine(
    settings: Settings | SettingsError,
    *,
    environment: Mapping[str, str],
    make_driver: Callable[[Settings], GpuDriver],
    make_daemons: Callable[[Settings], Daemons | None],
    other_mps: Path = OTHER_MPS,
    timeouts: Timeouts = TIMEOUTS,
) -> tuple[Check, ...]:
    """All checks, the first cause first. Raises nothing, and takes less than 10 s.

    Where the settings are wrong, the others are checked with the default of every wrong one.
    """
    checks = guarded("settings", partial(check_settings, settings, environment))
    if isinstance(settings, SettingsError):
        settings = assume(environment)
    reports: list[Report] = []
    place = make_place(settings)
    asking = partial(_ask, settings.state_directory, reports, place)
    answered = await in_thread("agent", asking, timeouts.ask)
    report = reports[0] if reports else None
    looks = [
        in_thread(name, checking, timeouts.look)
        for name, checking in _preflight(settings, report, other_mps, place).items()
    ]
    if report is None:
        looks.insert(0, look_once(settings, make_driver, make_daemons, timeouts))
    return tuple(chain(checks, answered, *await asyncio.gather(*looks)))


def _ask(directory: Path, reports: list[Report], place: Place) -> Iterable[Check]:
    """What the running agent reports; none where no agent answers."""
    try:
        report = ask.by_socket(directory).report
    except NoAgentError as error:
        if isinstance(error.__cause__, FileNotFoundError | ConnectionRefusedError):
            where = directory / control.SOCKET
            yield Check("agent", Verdict.OK, f"none serves {where}: looking at the node itself")
        else:
            yield judge.check("agent", Verdict.WARN, str(error), agent_log(place))
        return
    reports.append(report)
    detail = f"version {report.version} runs on node {report.node}, and reports what follows"
    yield Check("agent", Verdict.OK, detail)
    yield _accepts(report)
    yield from report.checks


def _accepts(report: Report) -> Check:
    """The verdict on the node. One that is full is not in trouble."""
    found = report.acceptance
    fine = found.accepts or found.refusals == (Refusal.FULL,)
    return Check("node", Verdict.OK if fine else Verdict.FAIL, found.words, "see below why")


async def look_once(
    settings: Settings,
    make_driver: Callable[[Settings], GpuDriver],
    make_daemons: Callable[[Settings], Daemons | None],
    timeouts: Timeouts,
) -> tuple[Check, ...]:
    """What the agent would report of driver, GPUs and MPS. Raises nothing, and does not hang."""
    rules = make_rules(settings)
    node = Node(rules, clock=lambda: Moment(time.monotonic(), time.time()))
    kept = guarded("kept faults", partial(_recall, settings.state_directory, node))
    kept += guarded("cordons", partial(_cordons, settings.cordon_directory, node))
    failed: list[Check] = []

    async def look_at_gpus() -> None:
        try:
            driver = make_driver(settings)
            await driver.__aenter__()
            try:
                watch = make_watch(settings, driver, node)
                watch.intervals = Intervals(call_limit=timeouts.call)
                with anyio.move_on_after(timeouts.look) as scope:
                    await watch.look()
                    if settings.memory_limits is not MemoryLimits.OFF:
                        of = shares(node.snapshot.inventory.gpus)
                        node.set_limits(await make_looker(settings, driver).look(of))
                if scope.cancelled_caught:
                    failed.append(late("driver", timeouts.look, "see the kernel log of the node"))
            finally:
                with anyio.move_on_after(timeouts.leave, shield=True):
                    await driver.__aexit__(None, None, None)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is said
            failed.append(unexpected("driver", error))

    async def look_at_daemons() -> None:
        look = MpsLook(f"no answer within {timeouts.look:g} s")
        try:
            with anyio.move_on_after(timeouts.look):
                daemons = make_daemons(settings)
                look = MpsLook("there is none") if daemons is None else await daemons.look()
        except Exception as error:  # noqa: BLE001 - whatever it is, it is said
            look = MpsLook(f"they could not be looked at: {type(error).__name__}: {error}")
        node.set_mps(look)

    await asyncio.gather(look_at_gpus(), look_at_daemons())
    report = make_report(node.snapshot, rules, time.time())
    found = guarded("report", partial(judge.of_look, report, rules))
    if failed:
        found = tuple(each for each in found if each.name != "driver")
    return (*failed, *found, *kept, *_absent(node))


def _recall(directory: Path, node: Node) -> Iterable[Check]:
    """Begins with what the last agent kept, as the next one will."""
    name = "kept faults"
    try:
        kept = memory.load(directory, store.boot_id())
    except StoreError as error:
        advice = "remove it: the agent writes it again"
        yield Check(name, Verdict.WARN, str(error), advice)
        return
    if kept is not None:
        node.recalled(kept.first_seen, kept.health)
    count = len(kept.faults) if kept else 0
    yield Check(name, Verdict.OK, f"of {count} GPUs that waited for a reset" if count else "none")


def _cordons(directory: Path, node: Node) -> Iterable[Check]:
    """Begins with the GPUs that are cordoned, as the agent will."""
    try:
        node.set_cordons(cordons.load(directory))
    except StoreError as error:
        yield Check("cordons", Verdict.WARN, str(error), "look at VGPU_CORDON_DIRECTORY")


def _absent(node: Node) -> Iterable[Check]:
    """The GPUs that wait for a reset and are not listed."""
    for uuid, health in node.snapshot.health.items():
        if health.waits_for_reset and node.snapshot.inventory.find(uuid) is None:
            fault = next(each for each in health.faults if each.until_reset)
            detail = f"{uuid} is not listed, and waits for a reset: {fault.detail}"
            yield Check("kept faults", Verdict.FAIL, detail, remedy(health.faults).words)


def _preflight(
    settings: Settings, report: Report | None, other_mps: Path, place: Place
) -> dict[str, Checking]:
    """What blocks, by the name under which a failure is reported."""
    real = settings.gpu_driver is GpuDriverKind.NVML
    endpoint = settings.plugin_directory / settings.endpoint
    control_socket = settings.state_directory / control.SOCKET
    sockets = [endpoint, control_socket, settings.kubelet_dir / POD_RESOURCES]
    checks: dict[str, Checking] = {
        "socket path": partial(preflight.check_socket_paths, *sockets),
        "kubelet": partial(preflight.check_kubelet, settings.plugin_directory),
        "endpoint": partial(
            preflight.check_endpoint,
            endpoint,
            control_socket,
            report,
            settings.resource_name,
            place,
        ),
        "other plugins": partial(
            preflight.check_plugins, settings.plugin_directory, settings.endpoint
        ),
        "metrics address": partial(preflight.check_metrics, settings.metrics_address),
        "state directory": partial(
            preflight.check_kept_directory,
            "state directory",
            settings.state_directory,
            "a restart of the agent would forget which GPUs wait for a reset",
        ),
        "cordon directory": partial(
            preflight.check_kept_directory,
            "cordon directory",
            settings.cordon_directory,
            "no GPU can be cordoned",
        ),
    }
    if real and settings.sharing_rules().mps:
        checks["mps directories"] = partial(
            preflight.check_mps_directories, settings.mps_directory, place
        )
    if real:
        checks["other mps"] = partial(preflight.check_other_mps, other_mps)
    if report is None or not report.podresources.up:
        checks["podresources"] = partial(preflight.check_podresources, settings.kubelet_dir)
    return checks


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
        known = {variable(name) for name in TABLE}
        count = sum(name.upper() in known for name in environment)
        yield Check("settings", Verdict.OK, f"{count} VGPU_* variables are set, and right")
    for words in unknown_setting_warnings(environment):
        yield Check("settings", Verdict.WARN, words, "give it its right name, or remove it")
