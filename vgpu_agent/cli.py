"""The commands, carried out: what `arguments` read.

What only one command needs is imported in it: `run` stays small.
"""

import argparse
import asyncio
import gc
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import anyio

from vgpu_agent import __version__, control, signals
from vgpu_agent import settings as configuration
from vgpu_agent.agent import (
    Agent,
    make_daemons,
    make_driver,
    make_looker,
    make_place,
    make_watch,
)
from vgpu_agent.arguments import parse
from vgpu_agent.errors import MpsSetupError, SettingsError, is_shortage
from vgpu_agent.limits.watch import Enforcer
from vgpu_agent.model.rules import MemoryLimits
from vgpu_agent.observe import logs
from vgpu_agent.observe.logs import LogFormat, LogLevel, Repeats
from vgpu_agent.observe.report import from_json, visible
from vgpu_agent.settings import Settings, SharingKind
from vgpu_agent.settings_unknown import unknown_setting_warnings

log = logging.getLogger(__name__)


OPERATE = ("release", "cordon", "uncordon", "drain-list", "simulate")

RELEASE_SECONDS = 60.0

END_SECONDS = 5
"""Whatever hangs at the end, the process is gone then."""

GIL_SWITCH_INTERVAL = 0.0005
"""Seconds for which a thread that renders or decodes may keep the event loop waiting. By default it
is 5 ms, several times in each call of the kubelet."""


async def run(settings: Settings) -> None:
    """`vgpu-agent run`: until SIGTERM or SIGINT. SIGUSR1 is `vgpu-agent release`."""
    sys.setswitchinterval(GIL_SWITCH_INTERVAL)
    # What is imported stays, and need not be looked at again: garbage is found while it is little.
    gc.freeze()
    driver = make_driver(settings)
    agent = Agent(settings, driver, make_daemons(settings, driver))
    await _until_ended(agent.run, agent.ending, agent.watch.release)


async def enforce_limits(settings: Settings) -> None:
    """`vgpu-agent limits enforce`: until SIGTERM or SIGINT. Raises SettingsError."""
    if settings.memory_limits is not MemoryLimits.DRIVER:
        raise SettingsError(
            f"VGPU_MEMORY_LIMITS={settings.memory_limits}: only with VGPU_MEMORY_LIMITS=driver does"
            " `vgpu-agent limits enforce` have something to do"
        )
    gc.freeze()
    looker = make_looker(settings, make_driver(settings), enforce=True)
    await _until_ended(Enforcer(looker, settings.state_directory).run, anyio.Event())


async def dev(seconds: float | None, *, watch_gpus: bool = True) -> None:
    """`vgpu-agent dev`: until SIGTERM or SIGINT, or for so many seconds."""
    from vgpu_agent.commands.dev import run_dev

    async def work() -> None:
        await run_dev(_say, seconds=seconds, watch_gpus=watch_gpus)
        done.cancel()
        await anyio.sleep_forever()

    with anyio.CancelScope() as done:
        await _until_ended(work, anyio.Event())


def operate(options: argparse.Namespace) -> None:
    """What the running agent is asked to do. Raises NoAgentError and ControlError."""
    ask = partial(control.call, configuration.read(os.environ, "state_directory").state_directory)
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


def release(ask: Callable[..., bytes], options: argparse.Namespace) -> None:
    """`vgpu-agent release`."""
    if options.reset_done is not None:
        which = {"gpu": options.reset_done} if options.reset_done else {}
        _say_answer(ask("reset-done", **which))
        if options.seconds is None:
            return
    answer = ask("release", seconds=options.seconds or RELEASE_SECONDS)
    until = from_json(answer).driver.released_until
    _say(f"released all GPUs until {until}; reset them now, on the node:")
    _say("    nvidia-smi --gpu-reset -i INDEX")
    _say("and then, for each GPU that was reset:")
    _say("    vgpu-agent release --reset-done INDEX")


def _say_answer(answer: bytes) -> None:
    for line in answer.decode(errors="replace").splitlines():
        _say(visible(line))


async def doctor(*, as_json: bool) -> int:
    """`vgpu-agent doctor`: its exit code. Works with wrong settings too."""
    from vgpu_agent.commands.doctor import Verdict, examine, render_json, render_text, worst

    settings: Settings | SettingsError
    try:
        settings = configuration.load()
    except SettingsError as error:
        settings = error
    checks = await examine(
        settings,
        environment=os.environ,
        make_driver=make_driver,
        make_daemons=lambda chosen: make_daemons(chosen, make_driver(chosen)),
        make_watch=make_watch,
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
        directory = configuration.read(os.environ, "state_directory").state_directory
        look = partial(ask.by_socket, directory)
    if options.watch is None:
        show(look, sys.stdout, as_json=options.json, wide=options.wide)
    else:
        watch(look, sys.stdout, options.watch, wide=options.wide)


async def _until_ended(
    work: Callable[[], Awaitable[None]],
    ending: anyio.Event,
    release: Callable[[], None] = lambda: None,
) -> None:
    """Works until SIGTERM or SIGINT, which give `work` a bounded time to clean up.

    Raises RuntimeError where it ends before. Where it sets `ending` before and does not end then,
    the process ends with 1: one that does nothing must not stay.
    """
    loop, repeats = asyncio.get_running_loop(), Repeats(log)

    def follow(number: signal.Signals) -> None:
        if number == signal.SIGUSR1:
            release()
        else:
            log.info("%s: ending", number.name)
            signals.end_within(END_SECONDS, 0)
            scope.cancel()

    def report(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if error is not None and is_shortage(error):
            repeats.log(logging.WARNING, f"{context['message']}: {error}")
        else:
            loop.default_exception_handler(context)

    async def watch() -> None:
        await ending.wait()
        signals.end_within(END_SECONDS, 1)

    loop.set_exception_handler(report)
    with (
        signals.received(lambda number: loop.call_soon_threadsafe(follow, number)),
        anyio.CancelScope() as scope,
    ):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(watch)
            await work()
            raise RuntimeError("the agent ended, though nobody asked it to")


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def execute(arguments: Sequence[str]) -> int:
    """Runs a command; its exit code.

    Raises SettingsError, ListenError, StoryError, or groups of errors.
    """
    options = parse(arguments)
    if options.command == "dev":
        logs.configure(LogLevel.INFO, LogFormat.TEXT)
        anyio.run(dev, options.seconds)
        return 0
    if options.command == "doctor":
        logs.configure(LogLevel.ERROR, LogFormat.TEXT)
        return anyio.run(partial(doctor, as_json=options.json))
    if options.command == "status":
        status(options)
        return 0
    if options.command in OPERATE:
        operate(options)
        return 0
    settings = configuration.load()
    logs.configure(settings.log_level, settings.log_format)
    if options.command == "run":
        place = make_place(settings)
        names = asdict(place) if place.in_pod else {"node": place.node}
        fields = {"version": __version__, **names}
        log.info("vgpu-agent starts", extra={"fields": fields})
    for words in unknown_setting_warnings(os.environ):
        log.warning("%s", words)
    if options.command == "mps":
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
        return 0
    anyio.run(enforce_limits if options.command == "limits" else run, settings)
    return 0
