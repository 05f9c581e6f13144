"""`vgpu-agent status`: the running agent's report, for people and programs."""

import io
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from typing import TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from vgpu_agent.commands.ask import Ask
from vgpu_agent.commands.tables import ODD, page
from vgpu_agent.errors import NoAgentError

WIDE = 100_000
"""Columns of what is no terminal: nothing is folded there, and programs find a row on its line."""


def show(ask: Ask, out: TextIO, *, as_json: bool = False) -> None:
    """Writes it once; as JSON as the agent sent it. Raises NoAgentError."""
    answer = ask()
    if as_json:
        out.write(answer.text)
        out.flush()
    else:
        _console(out).print(page(answer.report))


def _now() -> datetime:
    return datetime.now().astimezone()


def watch(
    ask: Ask,
    out: TextIO,
    seconds: float,
    *,
    now: Callable[[], datetime] = _now,
    sleep: Callable[[float], object] = time.sleep,
) -> None:
    """Writes it again every so many seconds until SIGINT or SIGTERM; on a terminal in place.

    An agent that does not answer is waited for; what was seen last stays on show.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    console, shown = _console(out), _Shown(ask, now)
    if not out.isatty() or console.is_dumb_terminal:
        with suppress(KeyboardInterrupt):
            while True:
                console.print(shown.refreshed(), Text())
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
        while True:
            live.update(shown.refreshed(), refresh=True)
            sleep(seconds)
    # It stays to be read, also what did not fit on the screen.
    console.print(shown.newest)


class _Shown:
    """The newest report, and since when there is none newer."""

    def __init__(self, ask: Ask, now: Callable[[], datetime]) -> None:
        self._ask = ask
        self._now = now
        self._page: RenderableType | None = None
        self.newest: RenderableType = Text()
        self._silent_since: datetime | None = None

    def refreshed(self) -> RenderableType:
        """Asks again; what is to be shown then."""
        self.newest = self._asked()
        return self.newest

    def _asked(self) -> RenderableType:
        try:
            self._page = page(self._ask().report)
        except NoAgentError as error:
            self._silent_since = self._silent_since or self._now()
            silence = Text(f"not answering since {self._silent_since:%H:%M:%S}: {error}", ODD)
            silence.overflow = "fold"
            return silence if self._page is None else Group(silence, Text(), self._page)
        self._silent_since = None
        return self._page


def _console(out: TextIO) -> Console:
    if isinstance(out, io.TextIOWrapper):
        out.reconfigure(errors="backslashreplace")
    width = None if out.isatty() else WIDE
    return Console(file=out, width=width, markup=False, emoji=False, highlight=False)
