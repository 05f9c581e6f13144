"""Log lines on standard error, as text or as one JSON object a line.

A line is a message and fields (`extra={"fields": {...}}`): key=value in text, members in JSON.
"""

import json
import logging
import sys
import time
from collections.abc import Mapping
from enum import StrEnum


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
        return f"{super().formatMessage(record)} {words}".rstrip()


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


def _fields(record: logging.LogRecord) -> Mapping[str, object]:
    fields = getattr(record, "fields", {})
    return {name: each for name, each in fields.items() if each is not None}


def _value(value: object) -> str:
    text = str(value)
    return json.dumps(text) if not text or any(each in text for each in ' "=\n') else text


def configure(level: LogLevel, form: LogFormat) -> None:
    """Sends every log line of this process to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json() if form is LogFormat.JSON else _Text())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    # What they say at lower levels is about single requests, never about the agent.
    for library in ("asyncio", "grpclib", "hpack", "uvicorn"):
        logging.getLogger(library).setLevel(logging.ERROR)
    # A traceback for each request that is no gRPC. What is wrong with our own calls ends the agent.
    logging.getLogger("grpclib.server").setLevel(logging.CRITICAL)
