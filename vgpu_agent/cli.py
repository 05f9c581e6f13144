"""The commands: `run`, `status`, `release`, `doctor` and `mps` on a node, `dev` on a desk.

What only one command needs is imported in it: `run` stays small.
"""

import argparse
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from functools import partial

import anyio

from vgpu_agent import __version__
from vgpu_agent import settings as configuration
from vgpu_agent.agent import Running, make_daemon, make_driver, run_agent
from vgpu_agent.errors import MpsSetupError, SettingsError
from vgpu_agent.model.state import Latest
from vgpu_agent.observe import logs
from vgpu_agent.release import release
from vgpu_agent.running import Told, address_of, ask, findable
from vgpu_agent.settings import (
    Address,
    LogFormat,
    LogLevel,
    Settings,
    SharingKind,
    parse_address,
)

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
        "status", help="show the cards, their vGPUs and who holds them, as the running agent says"
    )
    form = status.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="what the agent says, as JSON")
    form.add_argument(
        "--watch",
        nargs="?",
        const=2.0,
        type=_seconds,
        metavar="SECONDS",
        help="show it anew every 2 seconds, or as often as said, until Ctrl-C",
    )
    status.add_argument(
        "--address",
        type=_address,
        metavar="HOST:PORT",
        help="where the agent answers, if not at VGPU_METRICS_ADDRESS",
    )
    commands.add_parser(
        "release", help="make the running agent let go of the GPUs, so that they can be reset"
    )
    mps = commands.add_parser("mps", help="set up and watch MPS, in the MPS pod of a node")
    steps = mps.add_subparsers(dest="step", required=True)
    steps.add_parser("prepare", help="make the node ready for the MPS daemon")
    steps.add_parser("daemon", help="become the MPS daemon, in the foreground")
    steps.add_parser("watch", help="tell the daemon its limits and keep an eye on them")
    steps.add_parser("restore", help="set the compute modes back that prepare has changed")
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


# The receiver is around the task group: a second signal during the end must find it still there.
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


THREAD_TURN = 0.0005
"""Seconds for which a thread that renders or decodes may keep the event loop waiting. By default it
is 5 ms, several times in each call of the kubelet."""


async def run(settings: Settings) -> None:
    """`vgpu-agent run`: until SIGTERM or SIGINT. SIGUSR1 lets go of the cards for a while."""
    sys.setswitchinterval(THREAD_TURN)
    release_requests = Latest(0)
    with (
        anyio.open_signal_receiver(*_SIGNALS) as signals,
        findable(settings.state_directory) as tell_address,
    ):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_follow_signals, signals, tasks.cancel_scope, release_requests)
            driver = make_driver(settings)
            daemon = make_daemon(settings, driver)
            agent = partial(run_agent, settings, driver, daemon, release_requests=release_requests)
            running: Running = await tasks.start(agent)
            tell_address(running.metrics_address)


async def dev(seconds: float | None, *, watch_health: bool = True) -> None:
    """`vgpu-agent dev`: until SIGTERM or SIGINT, or for so many seconds."""
    from vgpu_agent.dev import run_dev

    with anyio.open_signal_receiver(*_SIGNALS) as signals:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_follow_signals, signals, tasks.cancel_scope, Latest(0))
            await run_dev(_tell, seconds=seconds, watch_health=watch_health)
            tasks.cancel_scope.cancel()


async def doctor(*, as_json: bool) -> int:
    """`vgpu-agent doctor`: its exit code. Works with wrong settings too."""
    from vgpu_agent.doctor import Verdict, examine, render_json, render_text, worst

    settings: Settings | SettingsError
    try:
        settings = configuration.load()
    except SettingsError as error:
        settings = error
    checks = await examine(
        settings,
        environment=os.environ,
        make_driver=make_driver,
        make_daemon=lambda chosen: make_daemon(chosen, make_driver(chosen)),
    )
    sys.stdout.write(render_json(checks) if as_json else render_text(checks))
    sys.stdout.flush()
    return int(worst(checks) is Verdict.FAIL)


def status(options: argparse.Namespace) -> None:
    """`vgpu-agent status`. Works where other settings are wrong. Raises NoAgentError."""
    from vgpu_agent.status import show, watch

    needed = () if options.address else ("metrics_address", "state_directory")
    settings = configuration.read(os.environ, *needed)

    def look() -> Told:
        # An agent that was started anew may listen elsewhere.
        return ask(options.address or address_of(settings))

    if options.json:
        sys.stdout.write(look().text)
        sys.stdout.flush()
    elif options.watch is None:
        show(look(), sys.stdout)
    else:
        watch(look, sys.stdout, options.watch)


async def _follow_signals(
    signals: AsyncIterator[signal.Signals],
    scope: anyio.CancelScope,
    release_requests: Latest[int],
) -> None:
    async for number in signals:
        if number == signal.SIGUSR1:
            release_requests.publish(release_requests.value + 1)
        else:
            log.info("%s: ending", number.name)
            scope.cancel()


def _tell(line: str) -> None:
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
        release(settings, _tell)
        return 0
    for words in configuration.unknown_in_words(os.environ):
        log.warning("%s", words)
    if options.command == "mps":
        from vgpu_agent.mps.commands import mps_daemon, mps_prepare, mps_restore, mps_watch

        if settings.sharing is not SharingKind.MPS and options.step != "restore":
            raise MpsSetupError(
                f"VGPU_SHARING={settings.sharing}: without MPS `vgpu-agent mps {options.step}` has"
                " nothing to do"
            )
        steps = {
            "prepare": mps_prepare,
            "daemon": mps_daemon,
            "watch": mps_watch,
            "restore": mps_restore,
        }
        steps[options.step](settings)
        return 0
    anyio.run(run, settings)
    return 0
