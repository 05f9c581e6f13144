import json
import logging
import re
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import pytest

from vgpu_agent.observe import logs
from vgpu_agent.settings import LogFormat, LogLevel

LIBRARIES = ("asyncio", "grpclib", "hpack", "uvicorn")


@pytest.fixture(autouse=True)
def restored_logging() -> Iterator[None]:
    """The root logger is the process's: other tests want it back as it was."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    levels = {name: logging.getLogger(name).level for name in LIBRARIES}
    root.handlers.clear()
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    for name, before in levels.items():
        logging.getLogger(name).setLevel(before)


@pytest.fixture
def far_away(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine whose local time is not UTC."""
    import time

    with monkeypatch.context() as patch:
        patch.setenv("TZ", "UTC-09:30")
        time.tzset()
        yield
    time.tzset()


def line(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.endswith("\n")
    return captured.err.removesuffix("\n")


def fail() -> None:
    raise LookupError("no such card")


def log_failure(message: str, *args: object) -> None:
    try:
        fail()
    except LookupError:
        logging.getLogger("vgpu_agent.test").exception(message, *args)


def test_a_text_line_has_time_level_and_message(capsys):
    logs.configure(LogLevel.INFO, LogFormat.TEXT)
    logging.getLogger("vgpu_agent.test").warning("card %d is %s", 3, "gone")
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z WARNING card 3 is gone", line(capsys)
    )


def test_a_json_line_is_one_object_with_time_level_logger_and_message(capsys):
    logs.configure(LogLevel.INFO, LogFormat.JSON)
    logging.getLogger("vgpu_agent.test").warning('card %d is "%s"\nreally ☃', 3, "gone")
    told = line(capsys)
    assert "\n" not in told
    found = json.loads(told)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", found.pop("time"))
    assert found == {
        "level": "warning",
        "logger": "vgpu_agent.test",
        "message": 'card 3 is "gone"\nreally ☃',
    }


@pytest.mark.usefixtures("far_away")
@pytest.mark.parametrize("form", LogFormat)
def test_time_is_utc_wherever_the_machine_is(capsys, form):
    logs.configure(LogLevel.INFO, form)
    logging.getLogger("vgpu_agent.test").info("now")
    told = line(capsys)
    stamp = json.loads(told)["time"] if form is LogFormat.JSON else told.split()[0]
    said = datetime.strptime(stamp, "%Y-%m-%dT%H:%M:%S.%fZ").replace(tzinfo=UTC)
    assert abs(datetime.now(UTC) - said) < timedelta(minutes=1)


@pytest.mark.parametrize("form", LogFormat)
def test_an_exception_is_a_part_of_its_json_line_and_follows_its_text_line(capsys, form):
    logs.configure(LogLevel.INFO, form)
    log_failure("cannot ask card %d", 3)
    told = line(capsys)
    if form is LogFormat.JSON:
        assert "\n" not in told
        found = json.loads(told)
        told = f"{found['level'].upper()}   {found['message']}\n{found['exception']}"
    first, second, *_, last = told.splitlines()
    assert first.endswith("ERROR   cannot ask card 3")
    assert second == "Traceback (most recent call last):"
    assert last == "LookupError: no such card"


@pytest.mark.parametrize("level", LogLevel)
def test_only_lines_of_the_level_and_above_are_written(capsys, level):
    logs.configure(level, LogFormat.JSON)
    for each in LogLevel:
        logging.getLogger("vgpu_agent.test").log(logging.getLevelName(each.upper()), "x")
    told = [json.loads(each)["level"] for each in line(capsys).splitlines()]
    assert told == list(LogLevel)[list(LogLevel).index(level) :]


@pytest.mark.parametrize("library", LIBRARIES)
def test_libraries_tell_only_errors_also_at_debug(capsys, library):
    logs.configure(LogLevel.DEBUG, LogFormat.TEXT)
    logging.getLogger(f"{library}.part").warning("chatter")
    logging.getLogger(f"{library}.part").error("trouble")
    told = line(capsys)
    assert told.endswith("ERROR   trouble")
    assert "chatter" not in told


def test_configuring_again_writes_each_line_once(capsys):
    logs.configure(LogLevel.INFO, LogFormat.TEXT)
    logs.configure(LogLevel.INFO, LogFormat.JSON)
    logging.getLogger("vgpu_agent.test").info("once")
    assert json.loads(line(capsys))["message"] == "once"
    assert [handler.stream for handler in logging.getLogger().handlers] == [sys.stderr]
