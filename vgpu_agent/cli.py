"""The commands, carried out: what `arguments` read.

What only one command needs is imported in it: `run` stays small.
"""

import argparse
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import anyio

from vgpu_agent import __version__, control
from vgpu_agent.arguments import parse
from vgpu_agent.aside import begin
from vgpu_agent.errors import MpsSetupError, SettingsError
from vgpu_agent.model.rules import MemoryLimits
from vgpu_agent.observe import logs
from vgpu_agent.observe.logs import LogFormat, LogLevel
from vgpu_agent.settings import Settings, SharingKind
from vgpu_agent.settings_unknown import unknown_setting_warnings

log = logging.getLogger(__name__)


RELEASE_SECONDS = 60.0


async def dev(seconds: float | None, *, watch_gpus: bool = True) -> None:
    """`vgpu-agent dev`: until SIGTERM or SIGINT, or for so many seconds."""
    from vgpu_agent.commands.dev import run_dev
    from vgpu_agent.running import until_ended

    async def work() -> None:
        await run_dev(_say, seconds=seconds, watch_gpus=watch_gpus)
        done.cancel()
        await anyio.sleep_forever()

    with anyio.CancelScope() as done:
        await until_ended(work, anyio.Event())


def operate(options: argparse.Namespace) -> None:
    """What the running agent is asked to do. Raises NoAgentError and ControlError."""
    ask = partial(control.call, _state_directory())
    match options.command:
        case "release":
            release(ask, options)
        case "cordon":
            _say_answer(ask("cordon", gpu=options.gpu, reason=options.reason))
        case "simulate":
            xid = getattr(options, "xid", None)
            _say_answer(ask("simulate", fault=options.fault, gpu=options.gpu, xid=xid))
        case command:
            _say_answer(ask(command, gpu=options.gpu))


def _state_directory() -> Path:
    """Where the running agent is found, also where other settings are wrong."""
    from vgpu_agent.settings_reading import read

    return read(os.environ, "state_directory").state_directory


def load() -> Settings:
    """The settings of this process. Raises SettingsError."""
    from vgpu_agent import settings_reading

    return settings_reading.load()


def release(ask: Callable[..., bytes], options: argparse.Namespace) -> None:
    """`vgpu-agent release`."""
    from vgpu_agent.observe.report import from_json, utc

    if options.reset_done is not None:
        which = {"gpu": options.reset_done} if options.reset_done else {}
        _say_answer(ask("reset-done", **which))
        if options.seconds is None:
            return
    answer = ask("release", seconds=options.seconds or RELEASE_SECONDS)
    until = utc(from_json(answer).driver.released_until or "")
    _say(f"released all GPUs until {until}; reset them now, on the node:")
    _say("    nvidia-smi --gpu-reset -i INDEX")
    _say("and then, for each GPU that was reset:")
    _say("    vgpu-agent release --reset-done INDEX")


def _say_answer(answer: bytes) -> None:
    from vgpu_agent.observe.report import visible

    for line in answer.decode(errors="replace").splitlines():
        _say(visible(line))


async def doctor(*, as_json: bool) -> int:
    """`vgpu-agent doctor`: its exit code. Works with wrong settings too."""
    from vgpu_agent.agent import make_daemons
    from vgpu_agent.commands.doctor import examine
    from vgpu_agent.commands.doctor.checks import render_json, render_text, worst
    from vgpu_agent.drivers import make_driver
    from vgpu_agent.observe.report import Verdict

    settings: Settings | SettingsError
    try:
        settings = load()
    except SettingsError as error:
        settings = error
    checks = await examine(
        settings,
        environment=os.environ,
        make_driver=make_driver,
        make_daemons=lambda chosen: make_daemons(chosen, make_driver(chosen)),
    )
    sys.stdout.write(render_json(checks) if as_json else render_text(checks))
    sys.stdout.flush()
    return int(worst(checks) is Verdict.FAIL)


def status(options: argparse.Namespace) -> None:
    """`vgpu-agent status`. Works where other settings are wrong. Raises NoAgentError."""
    from vgpu_agent.commands import ask
    from vgpu_agent.commands.status import show, watch

    if options.address:
        look = partial(ask.by_http, options.address)
    else:
        look = partial(ask.by_socket, _state_directory())
    if options.watch is None:
        show(look, sys.stdout, as_json=options.json, wide=options.wide)
    else:
        watch(look, sys.stdout, options.watch, wide=options.wide)


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def execute(arguments: Sequence[str]) -> int:
    """Runs a command; its exit code.

    Raises SettingsError, ListenError, StoryError, or groups of errors.
    """
    options = parse(arguments)
    match options.command:
        case "dev":
            logs.configure(LogLevel.INFO, LogFormat.TEXT)
            anyio.run(dev, options.seconds)
        case "doctor":
            logs.configure(LogLevel.ERROR, LogFormat.TEXT)
            return anyio.run(partial(doctor, as_json=options.json))
        case "status":
            status(options)
        case "run":
            run()
        case "limits":
            enforce_limits()
        case "mps":
            mps(options)
        case _:
            operate(options)
    return 0


def run() -> None:
    """`vgpu-agent run`."""
    settings_of_helper = begin(load)
    # While the helper reads the settings, the agent is loaded.
    from vgpu_agent import agent
    from vgpu_agent.running import wait_for_descriptors

    settings = settings_of_helper()
    place = agent.make_place(settings)
    names = asdict(place) if place.in_pod else {"node": place.node}
    _begin(settings, {"version": __version__, **names})
    wait_for_descriptors()
    anyio.run(agent.run, settings)


def enforce_limits() -> None:
    """`vgpu-agent limits enforce`. Raises SettingsError."""
    settings_of_helper = begin(load)
    from vgpu_agent import limiting
    from vgpu_agent.running import wait_for_descriptors

    settings = settings_of_helper()
    _begin(settings)
    if settings.memory_limits is not MemoryLimits.DRIVER:
        raise SettingsError(
            f"VGPU_MEMORY_LIMITS={settings.memory_limits}: `vgpu-agent limits enforce` is for"
            " VGPU_MEMORY_LIMITS=driver only"
        )
    wait_for_descriptors()
    anyio.run(limiting.enforce, settings)


def mps(options: argparse.Namespace) -> None:
    """`vgpu-agent mps`."""
    settings = load()
    _begin(settings)
    from vgpu_agent.commands import mps

    if settings.sharing is not SharingKind.MPS and options.step != "restore":
        raise MpsSetupError(
            f"VGPU_SHARING={settings.sharing}: without MPS `vgpu-agent mps {options.step}` has"
            " nothing to do"
        )
    steps: dict[str, Callable[[], None]] = {
        "prepare": partial(mps.mps_prepare, settings),
        "daemon": partial(mps.mps_daemon, settings),
        "watch": partial(mps.mps_watch, settings),
        "compute-modes": partial(mps.mps_compute_modes, settings),
        "restart": lambda: mps.mps_restart(settings, options.gpu),
        "restore": lambda: mps.mps_restore(settings, at_end=options.at_end),
    }
    steps[options.step]()


def _begin(settings: Settings, agent: Mapping[str, str] | None = None) -> None:
    """Logs as the settings say: which agent this is, and what is no setting."""
    logs.configure(settings.log_level, settings.log_format)
    if agent is not None:
        log.info("vgpu-agent starts", extra={"fields": agent})
    for words in unknown_setting_warnings(os.environ):
        log.warning("%s", words)
