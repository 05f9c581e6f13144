"""Parts of the agent run for as long as it does."""

import math
from collections.abc import Awaitable, Callable

import anyio


async def endless(run: Callable[..., Awaitable[object]], *args: object, **status: object) -> None:
    """Runs a part of the agent, none of which ends by itself.

    Raises RuntimeError where it does, also where it was cancelled by somebody who did not cancel
    the agent: libraries cancel tasks, and a task group takes that for a good end.
    """
    ended: BaseException | None = None
    try:
        await run(*args, **status)
    except anyio.get_cancelled_exc_class() as cancelled:
        if anyio.current_effective_deadline() == -math.inf:
            raise
        ended = cancelled
    raise RuntimeError(f"{run.__qualname__} ended, though nobody asked it to") from ended
