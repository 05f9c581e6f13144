"""Log lines on standard error, as text or as one JSON object a line.

A line is a message and fields (`extra={"fields": {...}}`): key=value in text, members in JSON.
"""

import asyncio
import json
import logging
import re
import sys
import time
from collections.abc import Mapping
from enum import StrEnum
from typing import Any


class LogLevel(StrEnum):
    """The least important lines that are written."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class LogFormat(StrEnum):
    """How log lines look."""

    TEXT = "text"
    JSON = "json"


class _Text(logging.Formatter):
    def __init__(self) -> None:
        super().__init__(
            "%(asctime)s.%(msecs)03dZ %(levelname)-7s %(message)s", "%Y-%m-%dT%H:%M:%S"
        )
        self.converter = time.gmtime

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        words = " ".join(f"{name}={_value(each)}" for name, each in _fields(record).items())
        return _escaped(f"{super().formatMessage(record)} {words}".rstrip())

    def formatException(self, ei: Any) -> str:  # noqa: N802 - as above
        return "\n".join(map(_escaped, super().formatException(ei).split("\n")))


class _Json(_Text):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": f"{self.formatTime(record, self.datefmt)}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


# Control characters, and what else a terminal or a reader of lines takes for more than text.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")


def _escaped(text: str) -> str:
    """Text in one line: names of pods, drivers and peers may hold anything."""
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def _fields(record: logging.LogRecord) -> Mapping[str, object]:
    fields = getattr(record, "fields", {})
    return {name: each for name, each in fields.items() if each is not None}


def _value(value: object) -> str:
    text = str(value)
    return json.dumps(text) if not text or any(each in text for each in ' "=\n') else text


class Repeats:
    """Lines of which anybody can cause many: one at once, then one a minute with their number.

    Their messages and fields are of a bounded number of kinds. `period` is in seconds. Needs a
    running loop.
    """

    def __init__(self, logger: logging.Logger, period: float = 60.0) -> None:
        self._logger = logger
        self._period = period
        self._more: dict[tuple[object, ...], int] = {}

    def log(
        self,
        level: int,
        message: str,
        fields: Mapping[str, object] | None = None,
        times: int = 1,
        *,
        trace: BaseException | None = None,
    ) -> None:
        """Logs that this happened so many times since the last call."""
        fields = fields or {}
        key = (level, message, *fields.items())
        if key in self._more:
            self._more[key] += times
            return
        self._logger.log(level, "%s", message, extra={"fields": fields}, exc_info=trace)
        self._begin(key, times - 1)

    def _begin(self, key: tuple[object, ...], more: int) -> None:
        self._more[key] = more
        asyncio.get_running_loop().call_later(self._period, self._end, key)

    def _end(self, key: tuple[Any, ...]) -> None:
        level, message, *fields = key
        if more := self._more.pop(key):
            words = f"{message}: {more} more within {self._period:g} s"
            self._logger.log(level, "%s", words, extra={"fields": dict(fields)})
            self._begin(key, 0)


def configure(level: LogLevel, form: LogFormat) -> None:
    """Sends every log line of this process to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json() if form is LogFormat.JSON else _Text())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    # What they say at lower levels is about single requests, never about the agent.
    for library in ("asyncio", "grpclib", "hpack"):
        logging.getLogger(library).setLevel(logging.ERROR)
    # A traceback for each request that is no gRPC. What is wrong with our own calls ends the agent.
    logging.getLogger("grpclib.server").setLevel(logging.CRITICAL)
    # Its errors are about single requests too; what the agent has to do with them it logs itself.
    logging.getLogger("uvicorn").setLevel(logging.CRITICAL)
