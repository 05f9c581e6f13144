import json
import logging
import re
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import anyio
import pytest

from vgpu_agent.observe import logs
from vgpu_agent.observe.logs import LogFormat, LogLevel

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


def test_a_text_line_has_time_level_and_message(capsys):
    logs.configure(LogLevel.INFO, LogFormat.TEXT)
    logging.getLogger("vgpu_agent.test").warning("GPU %d is %s", 3, "gone")
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z WARNING GPU 3 is gone", line(capsys)
    )


def test_a_json_line_is_one_object_with_time_level_logger_and_message(capsys):
    logs.configure(LogLevel.INFO, LogFormat.JSON)
    logging.getLogger("vgpu_agent.test").warning('GPU %d is "%s"\nreally ☃', 3, "gone")
    written = line(capsys)
    assert "\n" not in written
    found = json.loads(written)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", found.pop("time"))
    assert found == {
        "level": "warning",
        "logger": "vgpu_agent.test",
        "message": 'GPU 3 is "gone"\nreally ☃',
    }


def log_fields(message: str, **fields: object) -> None:
    logging.getLogger("vgpu_agent.test").warning(message, extra={"fields": fields})


def test_fields_follow_the_message_of_a_text_line(capsys):
    logs.configure(LogLevel.INFO, LogFormat.TEXT)
    log_fields("10 vGPUs are unhealthy", gpu=0, uuid="GPU-a", xid=None, reason="xid,lost")
    assert line(capsys).endswith("WARNING 10 vGPUs are unhealthy gpu=0 uuid=GPU-a reason=xid,lost")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("", '""'),
        ("NVIDIA L4", '"NVIDIA L4"'),
        ('say "no"', '"say \\"no\\""'),
        ("a=b", '"a=b"'),
        ("two\nlines", '"two\\nlines"'),
        (0, "0"),
        (False, "False"),
    ],
)
def test_the_value_of_a_field_can_be_told_from_the_next_field(capsys, value, text):
    logs.configure(LogLevel.INFO, LogFormat.TEXT)
    log_fields("message", first=value, second=2)
    assert line(capsys).endswith(f"message first={text} second=2")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a\nERROR forged", "a\\nERROR forged"),
        ("\x1b[31mred", "\\x1b[31mred"),
        ("a\r\x9b\u2028\u202eb", "a\\r\\x9b\\u2028\\u202eb"),
        ("Grüße ☃", "Grüße ☃"),
    ],
)
@pytest.mark.parametrize("where", ["message", "field", "exception"])
def test_a_name_is_never_more_than_text_of_one_line(capsys, name, text, where):
    logs.configure(LogLevel.INFO, LogFormat.TEXT)
    match where:
        case "message":
            logging.getLogger("vgpu_agent.test").warning("pod %s is gone", name)
        case "field":
            log_fields("gone", pod=f"{name} =")
        case "exception":
            logging.getLogger("vgpu_agent.test").warning("gone", exc_info=KeyError(name))
    written = line(capsys)
    assert where == "field" or text in written.replace("\\\\", "\\")
    assert len(written.splitlines()) == (2 if where == "exception" else 1)
    assert written.isprintable() or where == "exception"


@pytest.mark.slow
async def test_what_comes_often_is_logged_at_once_and_then_by_number(caplog):
    repeats = logs.Repeats(logging.getLogger("test"), period=0.2)
    for n in range(500):
        repeats.log(logging.WARNING, "XID 13", {"xid": 13})
        repeats.log(logging.WARNING, "XID 31", {"xid": 31}, 1 + n % 2)
    assert caplog.messages == ["XID 13", "XID 31"]
    with anyio.fail_after(5):
        while len(caplog.messages) < 4:  # noqa: ASYNC110 - a log tells nobody
            await anyio.sleep(0.01)
    assert caplog.messages[2:] == [
        "XID 13: 499 more within 0.2 s",
        "XID 31: 749 more within 0.2 s",
    ]
    assert [record.fields for record in caplog.records] == 2 * [{"xid": 13}, {"xid": 31}]
    await anyio.sleep(0.5)
    repeats.log(logging.WARNING, "XID 13", {"xid": 13})
    assert caplog.messages[4:] == ["XID 13"]


def test_fields_are_members_of_a_json_line(capsys):
    logs.configure(LogLevel.INFO, LogFormat.JSON)
    log_fields("advertising 10 vGPUs", gpu=0, uuid="GPU-a", xid=None)
    found = json.loads(line(capsys))
    assert found.pop("time")
    assert found == {
        "level": "warning",
        "logger": "vgpu_agent.test",
        "message": "advertising 10 vGPUs",
        "gpu": 0,
        "uuid": "GPU-a",
    }


@pytest.mark.usefixtures("far_away")
@pytest.mark.parametrize("form", LogFormat)
def test_time_is_utc_wherever_the_machine_is(capsys, form):
    logs.configure(LogLevel.INFO, form)
    logging.getLogger("vgpu_agent.test").info("now")
    written = line(capsys)
    stamp = json.loads(written)["time"] if form is LogFormat.JSON else written.split()[0]
    said = datetime.strptime(stamp, "%Y-%m-%dT%H:%M:%S.%fZ").replace(tzinfo=UTC)
    assert abs(datetime.now(UTC) - said) < timedelta(minutes=1)


@pytest.mark.parametrize("form", LogFormat)
def test_an_exception_is_a_part_of_its_json_line_and_follows_its_text_line(capsys, form):
    logs.configure(LogLevel.INFO, form)
    try:
        _ = {}["GPU 3"]
    except KeyError:
        log = logging.getLogger("vgpu_agent.test")
        log.exception("cannot ask GPU %d", 3, extra={"fields": {"gpu": 3}})
    written = line(capsys)
    if form is LogFormat.JSON:
        assert "\n" not in written
        found = json.loads(written)
        text = f"{found['level'].upper()}   {found['message']} gpu={found['gpu']}"
        written = f"{text}\n{found['exception']}"
    first, second, *_, last = written.splitlines()
    assert first.endswith("ERROR   cannot ask GPU 3 gpu=3")
    assert second == "Traceback (most recent call last):"
    assert last == "KeyError: 'GPU 3'"


@pytest.mark.parametrize("level", LogLevel)
def test_only_lines_of_the_level_and_above_are_written(capsys, level):
    logs.configure(level, LogFormat.JSON)
    for each in LogLevel:
        logging.getLogger("vgpu_agent.test").log(logging.getLevelName(each.upper()), "x")
    written = [json.loads(each)["level"] for each in line(capsys).splitlines()]
    assert written == list(LogLevel)[list(LogLevel).index(level) :]


@pytest.mark.parametrize("library", LIBRARIES)
def test_libraries_log_only_errors_also_at_debug(capsys, library):
    logs.configure(LogLevel.DEBUG, LogFormat.TEXT)
    logging.getLogger(f"{library}.part").warning("chatter")
    serious = logging.CRITICAL if library == "uvicorn" else logging.ERROR
    logging.getLogger(f"{library}.part").log(serious, "trouble")
    logging.getLogger("grpclib.server").error("a peer that speaks badly")
    written = line(capsys)
    assert written.endswith(" trouble")
    assert "chatter" not in written


def test_configuring_again_writes_each_line_once(capsys):
    logs.configure(LogLevel.INFO, LogFormat.TEXT)
    logs.configure(LogLevel.INFO, LogFormat.JSON)
    logging.getLogger("vgpu_agent.test").info("once")
    assert json.loads(line(capsys))["message"] == "once"
    assert [handler.stream for handler in logging.getLogger().handlers] == [sys.stderr]
