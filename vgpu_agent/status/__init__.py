"""`vgpu-agent status`: what the running agent says of its node, for people."""

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

from vgpu_agent.errors import NoAgentError
from vgpu_agent.running import Told
from vgpu_agent.status.page import ODD, page
from vgpu_agent.status.report import parse

WIDE = 100_000
"""Columns of what is no terminal: nothing is folded there, and programs find a row on its line."""

Look = Callable[[], Told]
"""Asks the agent. Raises NoAgentError."""


def show(told: Told, out: TextIO) -> None:
    """Writes it once."""
    _console(out).print(page(parse(told.report)))


def _now() -> datetime:
    return datetime.now().astimezone()


def watch(
    look: Look,
    out: TextIO,
    seconds: float,
    *,
    now: Callable[[], datetime] = _now,
    sleep: Callable[[float], object] = time.sleep,
) -> None:
    """Writes it anew every so many seconds until SIGINT or SIGTERM; on a terminal in place.

    An agent that does not answer is waited for; what was seen last stays on show.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    console, shown = _console(out), _Shown(look, now)
    if not out.isatty() or console.is_dumb_terminal:
        with suppress(KeyboardInterrupt):
            while True:
                console.print(shown.anew(), Text())
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
            live.update(shown.anew(), refresh=True)
            sleep(seconds)
    # It stays to be read, also what did not fit on the screen.
    console.print(shown.newest)


class _Shown:
    """The newest report, and since when there is none newer."""

    def __init__(self, look: Look, now: Callable[[], datetime]) -> None:
        self._look = look
        self._now = now
        self._page: RenderableType | None = None
        self.newest: RenderableType = Text()
        self._silent_since: datetime | None = None

    def anew(self) -> RenderableType:
        """Asks again; what is to be shown then."""
        self.newest = self._asked()
        return self.newest

    def _asked(self) -> RenderableType:
        try:
            self._page = page(parse(self._look().report))
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
