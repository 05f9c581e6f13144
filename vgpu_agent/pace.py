"""Looks that are made together."""

import anyio


async def next_turn(seconds: float) -> None:
    """Sleeps until the loop's clock is at the next multiple of that: about so long.

    Tasks that all do so wake the process once. At rest a wake costs more than what is looked at.
    """
    left = seconds - anyio.current_time() % seconds
    await anyio.sleep(left if left > seconds / 10 else left + seconds)
