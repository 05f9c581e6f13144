"""`vgpu-agent status`: the running agent's report, for people and programs."""

import io
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from typing import TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from vgpu_agent.commands.ask import Ask
from vgpu_agent.commands.tables import ODD, WIDEST, page
from vgpu_agent.errors import NoAgentError


def show(ask: Ask, out: TextIO, *, as_json: bool = False, wide: bool = False) -> None:
    """Writes it once; as JSON as the agent sent it. Raises NoAgentError."""
    answer = ask()
    if as_json:
        out.write(answer.text)
        out.flush()
    else:
        _console(out).print(page(answer.report, wide=wide))


def watch(
    ask: Ask,
    out: TextIO,
    seconds: float,
    *,
    wide: bool = False,
    now: Callable[[], datetime] = lambda: datetime.now(UTC),
    sleep: Callable[[float], object] = time.sleep,
) -> None:
    """Writes it again every so many seconds until SIGINT or SIGTERM; on a terminal in place.

    An agent that does not answer is waited for; what was seen last stays on show.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    console, pages = _console(out), _pages(ask, now, wide=wide)
    newest: RenderableType = Text()
    if not out.isatty() or console.is_dumb_terminal:
        with suppress(KeyboardInterrupt):
            for newest in pages:
                console.print(newest, Text())
                sleep(seconds)
        return
    live = Live(
        console=console,
        screen=True,
        auto_refresh=False,
        redirect_stdout=False,
        redirect_stderr=False,
    )
    with suppress(KeyboardInterrupt), live:
        for newest in pages:
            live.update(newest, refresh=True)
            sleep(seconds)
    # It stays to be read, also what did not fit on the screen.
    console.print(newest)


def _pages(ask: Ask, now: Callable[[], datetime], *, wide: bool) -> Iterator[RenderableType]:
    """What is to be shown, asked for again each time."""
    last: RenderableType | None = None
    silent_since: datetime | None = None
    while True:
        try:
            last = page(ask().report, wide=wide)
        except NoAgentError as error:
            silent_since = silent_since or now()
            silence = Text(f"not answering since {silent_since:%H:%M:%S} UTC: {error}", ODD)
            silence.overflow = "fold"
            yield silence if last is None else Group(silence, Text(), last)
        else:
            silent_since = None
            yield last


def _console(out: TextIO) -> Console:
    if isinstance(out, io.TextIOWrapper):
        out.reconfigure(errors="backslashreplace")
    # Where there is no terminal a container is one line, which programs find.
    width = None if out.isatty() else WIDEST
    return Console(file=out, width=width, markup=False, emoji=False, highlight=False)
