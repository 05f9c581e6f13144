"""The commands: `run`, `status`, `release`, `doctor` and `mps` on a node, `dev` on a desk.

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
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from typing import Any

import anyio

from vgpu_agent import __version__, control, signals
from vgpu_agent import settings as configuration
from vgpu_agent.address import Address, parse_address
from vgpu_agent.agent import Agent, make_daemons, make_driver, make_place, make_watch
from vgpu_agent.errors import MpsSetupError, SettingsError, is_shortage
from vgpu_agent.observe import logs
from vgpu_agent.observe.logs import LogFormat, LogLevel, Repeats
from vgpu_agent.observe.report import from_json
from vgpu_agent.settings import Settings, SharingKind
from vgpu_agent.settings_unknown import unknown_setting_warnings

log = logging.getLogger(__name__)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line. Exits with 2 and a message where it is wrong."""
    parser = argparse.ArgumentParser(
        prog="vgpu-agent",
        description="Shares each NVIDIA GPU of a Kubernetes node as many virtual GPUs.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("run", help="run the agent; settings are VGPU_* variables")
    status = commands.add_parser(
        "status", help="show the GPUs, their vGPUs and who holds them, as the running agent says"
    )
    form = status.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="what the agent says, as JSON")
    form.add_argument(
        "--watch",
        nargs="?",
        const=2.0,
        type=_seconds,
        metavar="SECONDS",
        help="show it again every 2 seconds, or at that interval, until Ctrl-C",
    )
    status.add_argument(
        "--wide",
        action="store_true",
        help="with UUID, PCI address and NUMA node of each GPU, and nothing cut",
    )
    status.add_argument(
        "--address",
        type=_address,
        metavar="HOST:PORT",
        help="ask an agent over HTTP instead of the one whose VGPU_STATE_DIRECTORY this is",
    )
    release = commands.add_parser(
        "release", help="make the running agent close NVML, so that GPUs can be reset"
    )
    release.add_argument(
        "--for",
        dest="seconds",
        type=_seconds,
        default=60.0,
        metavar="SECONDS",
        help="for how long (60)",
    )
    release.add_argument(
        "--reset-done",
        action="store_true",
        help="end a release: the GPUs that wait for a reset were reset",
    )
    mps = commands.add_parser("mps", help="set up and watch MPS, in the MPS pod of a node")
    steps = mps.add_subparsers(dest="step", required=True)
    steps.add_parser("prepare", help="make the node ready for MPS daemons")
    steps.add_parser("daemon", help="run the MPS daemons, in the foreground")
    steps.add_parser("watch", help="set the limits of the daemons and watch them")
    restart = steps.add_parser(
        "restart", help="end the MPS daemon of one GPU in order; it is started again"
    )
    restart.add_argument(
        "gpu", metavar="GPU", help="UUID of the GPU, or the name of the daemon's directory"
    )
    restore = steps.add_parser(
        "restore", help="leave the node as it was before MPS: compute modes, directories"
    )
    restore.add_argument(
        "--at-end", action="store_true", help="after SIGTERM, when the daemons have ended"
    )
    doctor = commands.add_parser(
        "doctor",
        help="check all that the agent needs; exit code 1 if something would stop it",
    )
    doctor.add_argument("--json", action="store_true", help="the report as JSON")
    dev = commands.add_parser(
        "dev", help="run the agent with simulated GPUs and a stand-in kubelet, and watch it work"
    )
    dev.add_argument(
        "--for",
        dest="seconds",
        type=_seconds,
        metavar="SECONDS",
        help="end after so many seconds; exit code 0 only if all of it worked",
    )
    return parser.parse_args(arguments)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return seconds


def _address(text: str) -> Address:
    with suppress(ValueError):
        if (address := parse_address(text)).port:
            return address
    raise argparse.ArgumentTypeError(f"{text!r} is not host:port or [IPv6]:port")


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


async def dev(seconds: float | None, *, watch_gpus: bool = True) -> None:
    """`vgpu-agent dev`: until SIGTERM or SIGINT, or for so many seconds."""
    from vgpu_agent.commands.dev import run_dev

    async def work() -> None:
        await run_dev(_say, seconds=seconds, watch_gpus=watch_gpus)
        done.cancel()
        await anyio.sleep_forever()

    with anyio.CancelScope() as done:
        await _until_ended(work, anyio.Event())


def release(settings: Settings, seconds: float) -> None:
    """`vgpu-agent release`. Raises NoAgentError and ControlError."""
    answer = control.call(settings.state_directory, "release", seconds=seconds)
    until = from_json(answer).driver.released_until
    _say(f"released all GPUs until {until}; reset them now:")
    _say("    nvidia-smi --gpu-reset -i <index>")
    _say("and then, where the driver does not show that they were reset:")
    _say("    vgpu-agent release --reset-done")


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
        logs.configure(LogLevel.ERROR, LogFormat.TEXT)
        anyio.run(dev, options.seconds)
        return 0
    if options.command == "doctor":
        logs.configure(LogLevel.ERROR, LogFormat.TEXT)
        return anyio.run(partial(doctor, as_json=options.json))
    if options.command == "status":
        status(options)
        return 0
    settings = configuration.load()
    logs.configure(settings.log_level, settings.log_format)
    if options.command == "release":
        if options.reset_done:
            control.call(settings.state_directory, "reset-done")
        else:
            release(settings, options.seconds)
        return 0
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
            "restart": lambda: mps.mps_restart(settings, options.gpu),
            "restore": lambda: mps.mps_restore(settings, at_end=options.at_end),
        }
        steps[options.step]()
        return 0
    anyio.run(run, settings)
    return 0
