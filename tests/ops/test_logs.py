"""The shape of log lines."""

import io
import json
import logging
import os
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.model import Role
from agent.ops import logs
from agent.ops.logs import Form, LineFormatter, Log


def line(message: str, /, *, form: Form = "text", journal: bool = False, **fields: Any) -> str:
    record = logging.LogRecord("agent.x", logging.INFO, __file__, 1, message, None, None)
    record.fields = fields
    record.created = datetime(2026, 1, 31, 12, tzinfo=UTC).timestamp()
    return LineFormatter(form, journal=journal).format(record)


@pytest.fixture
def restored() -> Iterator[None]:
    """Leave the process's loggers as they were."""
    names = ["", *logs.UVICORN, *logs.HTTP_LIBRARIES]
    loggers = [logging.getLogger(name) for name in names]
    before = [(x, x.handlers[:], x.level, x.propagate) for x in loggers]
    for handler in logging.getLogger().handlers[:]:  # or configure() would close pytest's own
        logging.getLogger().removeHandler(handler)
    yield
    for logger, handlers, level, propagate in before:
        logger.handlers[:] = handlers
        logger.setLevel(level)
        logger.propagate = propagate


def test_an_event_is_a_message_and_its_fields_in_order() -> None:
    got = line(
        "role changed",
        before=Role.SECONDARY,
        after=Role.PENDING_PRIMARY,
        epoch=7,
        reason="chosen to take over",
    )
    assert got == (
        "2026-01-31T12:00:00.000Z INFO role changed before=Secondary after=PendingPrimary"
        ' epoch=7 reason="chosen to take over"'
    )


@pytest.mark.parametrize(
    ("value", "written"),
    [
        ("plain", "plain"),
        ("/a/b-c:1.5,[x]", "/a/b-c:1.5,[x]"),
        ("grüße", "grüße"),
        ("", '""'),
        ("a b", '"a b"'),
        ("a=b", '"a=b"'),
        ('say "no"', '"say \\"no\\""'),
        ("back\\slash", '"back\\\\slash"'),
        ("two\nlines", '"two\\nlines"'),
        ("\x1b[31mred", '"\\u001b[31mred"'),
        ("del\x7f", '"del\\u007f"'),
        ("\u2028", '"\\u2028"'),
        ("\udc80", '"\\udc80"'),
        (None, "null"),
        (True, "true"),
        (0.1 + 0.2, "0.3"),
        (float("-inf"), "-inf"),
        (Path("/x y"), '"/x y"'),
        (datetime(2026, 1, 31, 1, tzinfo=UTC), "2026-01-31T01:00:00.000Z"),
        (["group", "endpoint"], "group,endpoint"),
        (("a b", 1), '"a b,1"'),
        ([], '""'),
    ],
)
def test_a_value_is_quoted_only_when_it_has_to_be(value: object, written: str) -> None:
    assert line("m", v=value).removeprefix("2026-01-31T12:00:00.000Z INFO m v=") == written


@given(st.text(), st.text())
def test_every_event_is_one_line_that_can_be_encoded(message: str, value: str) -> None:
    for form in ("text", "json"):
        got = line(message, form=form, value=value)
        assert len((got + "x").splitlines()) == 1
        got.encode()


@given(st.text())
def test_json_keeps_every_value_as_it_is(value: str) -> None:
    assert json.loads(line("m", form="json", value=value))["value"] == value


def test_json_has_time_level_logger_message_and_fields() -> None:
    assert json.loads(line("m", form="json", epoch=7, until=float("inf"), none=None, time="x")) == {
        "time": "2026-01-31T12:00:00.000Z",
        "level": "INFO",
        "logger": "agent.x",
        "message": "m",
        "epoch": 7,
        "until": "inf",
        "none": None,
        "time_": "x",
    }


def test_a_traceback_stays_in_its_events_line() -> None:
    try:
        int("first\nsecond")
    except ValueError:
        record = logging.LogRecord("x", logging.ERROR, __file__, 1, "broke", None, sys.exc_info())
    got = LineFormatter("text", journal=False).format(record)
    assert "\n" not in got
    assert 'ERROR broke traceback="Traceback' in got
    assert "first\\\\nsecond" in got  # as int() quotes it


@pytest.mark.parametrize(
    ("level", "prefix"), [("DEBUG", 7), ("INFO", 6), ("WARNING", 4), ("ERROR", 3), ("CRITICAL", 2)]
)
def test_in_the_journal_a_line_has_its_priority_and_no_time(level: str, prefix: int) -> None:
    number = logging.getLevelNamesMapping()[level]
    record = logging.LogRecord("x", number, __file__, 1, "hello", None, None)
    assert LineFormatter("text", journal=True).format(record) == f"<{prefix}>{level} hello"


def test_the_journal_is_recognized_by_device_and_inode(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as stream:
        stat = os.fstat(stream.fileno())
        right = f"{stat.st_dev}:{stat.st_ino}"
        assert logs.in_journal(stream, {"JOURNAL_STREAM": right})
        assert not logs.in_journal(stream, {"JOURNAL_STREAM": right + "0"})
        assert not logs.in_journal(stream, {})
    assert not logs.in_journal(stream, {"JOURNAL_STREAM": right})
    assert not logs.in_journal(io.StringIO(), {"JOURNAL_STREAM": right})


@pytest.mark.usefixtures("restored")
def test_configure_sends_everything_to_stderr_once(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("DEBUG", "text")
    logs.configure("INFO", "text")
    Log("agent.test").debug("hidden")
    Log("agent.test").info("shown", n=1)
    logging.getLogger("uvicorn.error").warning("Invalid %s\nreceived.", "request")
    lines = capsys.readouterr().err.splitlines()
    assert [text.split(" ", 1)[1] for text in lines] == [
        "INFO shown n=1",
        "WARNING Invalid request\\nreceived.",
    ]


@pytest.mark.usefixtures("restored")
def test_access_log_lines_are_off_by_default(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("INFO", "json")
    logging.getLogger("uvicorn.access").info("GET /")
    logging.getLogger("httpx2").info("HTTP Request: POST")
    assert capsys.readouterr().err == ""
    assert not logging.getLogger("uvicorn.access").hasHandlers()
    logs.configure("INFO", "json", access_log=True)
    logging.getLogger("uvicorn.access").info("GET /")
    assert json.loads(capsys.readouterr().err)["message"] == "GET /"


@pytest.mark.usefixtures("restored")
def test_a_percent_sign_in_a_message_is_not_a_placeholder(
    capsys: pytest.CaptureFixture[str],
) -> None:
    logs.configure("INFO", "text")
    Log("x").info("100 %d done")
    assert capsys.readouterr().err.endswith("INFO 100 %d done\n")


def test_json_has_lists_as_lists() -> None:
    assert json.loads(line("m", form="json", v=("a", 1, [None])))["v"] == ["a", 1, [None]]


WORDS = "failover-agent: error: no"


def test_a_fatal_error_is_plain_text_by_default(restored: None) -> None:
    assert logs.format_fatal_error(WORDS, 12) == WORDS
    logs.configure("INFO", "text")
    assert logs.format_fatal_error(WORDS, 12) == WORDS


def test_a_fatal_error_is_json_if_the_log_is_json(restored: None) -> None:
    logs.configure("INFO", "json")
    event = json.loads(logs.format_fatal_error(WORDS, 17))
    assert event.pop("time")
    assert event == {
        "level": "ERROR",
        "logger": "agent",
        "message": "exiting with an error",
        "reason": WORDS,
        "exit_code": 17,
    }


@pytest.mark.parametrize(
    ("form", "begins"), [(None, "<3>failover"), ("text", "<3>failover"), ("json", "<3>{")]
)
def test_a_fatal_error_has_the_priority_of_an_error_in_the_journal(
    restored: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, form: Form | None, begins: str
) -> None:
    with (tmp_path / "journal").open("w") as stream:
        stat = os.fstat(stream.fileno())
        monkeypatch.setenv("JOURNAL_STREAM", f"{stat.st_dev}:{stat.st_ino}")
        monkeypatch.setattr(sys, "stderr", stream)
        if form is not None:
            logs.configure("INFO", form)
        assert logs.format_fatal_error(WORDS, 17).startswith(begins)
