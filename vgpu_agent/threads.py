"""Blocking calls in worker threads, where the machine may lack threads for a while.

A tenant that starts processes without end takes the threads of all: what waits for one is late, and
no reason to end.
"""

from collections.abc import Callable
from typing import TypeVar, TypeVarTuple

import anyio
import anyio.to_thread
from anyio import CapacityLimiter

from vgpu_agent.errors import lacks_thread

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

PAUSE = 0.5
"""Seconds until a thread is asked for again."""


async def in_thread(
    call: Callable[[*Ts], T],
    *arguments: *Ts,
    limiter: CapacityLimiter | None = None,
    abandon_on_cancel: bool = False,
) -> T:
    """What a blocking call answers in a worker thread, once there is one to be had."""
    while True:
        try:
            return await anyio.to_thread.run_sync(
                call, *arguments, limiter=limiter, abandon_on_cancel=abandon_on_cancel
            )
        except RuntimeError as error:
            if not lacks_thread(error):
                raise
        await anyio.sleep(PAUSE)
