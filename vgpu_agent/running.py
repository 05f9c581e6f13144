"""The running agent, from its settings to a signal that ends it."""

import asyncio
import gc
import logging
import signal
import sys
from collections.abc import Awaitable, Callable
from typing import Any

import anyio

from vgpu_agent import signals
from vgpu_agent.agent import Agent, make_daemons, make_driver
from vgpu_agent.errors import is_shortage
from vgpu_agent.observe.logs import Repeats
from vgpu_agent.settings import Settings

log = logging.getLogger(__name__)

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
    await until_ended(agent.run, agent.ending, agent.watch.release)


async def until_ended(
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
