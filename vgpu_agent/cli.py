"""The commands: `run` on a node, `dev` on a desk."""

import argparse
import logging
import os
import signal
import sys
from collections.abc import Sequence

import anyio
from anyio.abc import TaskStatus

from vgpu_agent import __version__
from vgpu_agent import settings as configuration
from vgpu_agent.agent import make_driver, run_agent
from vgpu_agent.dev import run_dev
from vgpu_agent.observe import logs
from vgpu_agent.settings import LogFormat, LogLevel, Settings

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


async def run(settings: Settings) -> None:
    """`vgpu-agent run`: until SIGTERM or SIGINT."""
    async with anyio.create_task_group() as tasks:
        await tasks.start(_stop_at_signal, tasks.cancel_scope)
        await run_agent(settings, make_driver(settings))


async def dev(seconds: float | None, *, watch_health: bool = True) -> None:
    """`vgpu-agent dev`: until SIGTERM or SIGINT, or for so many seconds."""
    async with anyio.create_task_group() as tasks:
        await tasks.start(_stop_at_signal, tasks.cancel_scope)
        await run_dev(_tell, seconds=seconds, watch_health=watch_health)
        tasks.cancel_scope.cancel()


async def _stop_at_signal(
    scope: anyio.CancelScope, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED
) -> None:
    with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        task_status.started()
        async for number in signals:
            log.info("%s: ending", signal.Signals(number).name)
            scope.cancel()


def _tell(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def execute(arguments: Sequence[str]) -> None:
    """Runs a command. Raises SettingsError, ListenError, StoryError, or groups of errors."""
    options = parse(arguments)
    if options.command == "dev":
        logs.configure(LogLevel.ERROR, LogFormat.TEXT)
        anyio.run(dev, options.seconds)
        return
    settings = configuration.load()
    logs.configure(settings.log_level, settings.log_format)
    for name, nearest in configuration.unknown_variables(os.environ).items():
        hint = f"; did you mean {nearest}?" if nearest else ""
        log.warning("%s is no setting of vgpu-agent and does nothing%s", name, hint)
    anyio.run(run, settings)
