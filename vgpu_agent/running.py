"""What runs until a signal ends it."""

import asyncio
import logging
import os
import signal
import time
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from typing import Any

import anyio

from vgpu_agent import signals
from vgpu_agent.errors import is_shortage
from vgpu_agent.observe.logs import Repeats

log = logging.getLogger(__name__)

DESCRIPTORS = 8
"""Those that a loop has, and some to spare."""

END_SECONDS = 5
"""Whatever hangs at the end, the process is gone then."""


def wait_for_descriptors(pause: float = 1.0) -> None:
    """Waits until there are as many as an event loop and its first files take. Blocks.

    asyncio leaves half a loop where there are fewer, and says so in a trace.
    """
    problem = ""
    while True:
        with ExitStack() as opened:
            try:
                for _ in range(DESCRIPTORS // 2):
                    for end in os.pipe():
                        opened.callback(os.close, end)
            except OSError as error:
                if not problem:
                    problem = f"cannot begin: {error.strerror or error}"
                    log.warning("%s; tried again", problem)
            else:
                return
        time.sleep(pause)


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
