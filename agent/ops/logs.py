"""Structured logs: one event is one line on stderr, whatever it contains.

    2026-01-31T12:00:00.000Z INFO role changed before=Secondary after=PendingPrimary epoch=7

A module that logs has ``log = Log(__name__)`` and calls ``log.info("role changed", epoch=7)``: a
constant message, and variable fields. If stderr is connected to the journal, the journal adds the time,
and the level becomes its priority prefix.

Logging never blocks: a thread writes the lines (ops/lines.py). Where stderr is a pipe that nobody reads,
lines are dropped and counted (``dropped``), output of other programs (events with a field ``line``) first.
"""

import json
import logging
import math
import os
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Literal, TextIO

from agent.ops.lines import LineWriter, StderrLines

Form = Literal["text", "json"]
"""``text`` is key=value, ``json`` is one object a line."""

LEVELS = logging.getLevelNamesMapping()
"""Each level's number."""

PRIORITIES = (
    (logging.CRITICAL, 2),
    (logging.ERROR, 3),
    (logging.WARNING, 4),
    (logging.INFO, 6),
)
"""Syslog priority from each level on; lower levels are 7, debug."""

UVICORN = ("uvicorn", "uvicorn.error", "uvicorn.asgi", "uvicorn.access")
HTTP_LIBRARIES = ("httpx2", "httpcore2")
"""Libraries that log each request, and so each heartbeat, at INFO; only their warnings are shown."""

QUOTED_CHARACTERS = frozenset(' "=\\')

FLUSH_S = 1.0
"""How long the process waits at its exit until its last lines are written."""


class Log:
    """A named logger whose events have fields. Cheap; each module has its own."""

    __slots__ = ("_logger",)

    def __init__(self, name: str) -> None:
        self._logger = logging.getLogger(name)

    def debug(self, message: str, /, **fields: Any) -> None:
        """Log a detail for troubleshooting; not shown by default."""
        self.event(logging.DEBUG, message, **fields)

    def info(self, message: str, /, **fields: Any) -> None:
        """Log an event that an operator may search for."""
        self.event(logging.INFO, message, **fields)

    def warning(self, message: str, /, **fields: Any) -> None:
        """Log a fault that was handled."""
        self.event(logging.WARNING, message, **fields)

    def error(self, message: str, /, **fields: Any) -> None:
        """Log a fault that needs a person."""
        self.event(logging.ERROR, message, **fields)

    def exception(self, message: str, /, **fields: Any) -> None:
        """Log an error with the traceback of the current exception."""
        self.event(logging.ERROR, message, exc_info=True, **fields)

    def event(self, level: int, message: str, /, *, exc_info: bool = False, **fields: Any) -> None:
        """Log ``message`` at ``level`` with ``fields`` (any values; see ``plain``)."""
        if self._logger.isEnabledFor(level):
            self._logger.log(level, message, extra={"fields": fields}, exc_info=exc_info)


Plain = str | int | float | bool | None
"""A JSON scalar."""


def plain(value: Any) -> Plain | list[Any]:
    """Convert a field's value for JSON: UTC for date-times, six decimals, no NaN, else text."""
    match value:
        case None | bool() | int():
            return value
        case float():
            return round(value, 6) if math.isfinite(value) else str(value)
        case datetime():
            return _utc(value)
        case list() | tuple():
            return [plain(part) for part in value]
        case _:
            return str(value)


def _utc(moment: datetime) -> str:
    utc = moment.astimezone(UTC) if moment.tzinfo else moment
    return utc.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def escaped(text: str) -> str:
    r"""Escape what is not printable (newlines, controls, surrogates) as ``\n``, ``\u001b``."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else json.dumps(char)[1:-1] for char in text)


def one_line(text: str, most: int = 200) -> str:
    """Make foreign text fit for a message: printable, one line, at most ``most`` characters."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text[: most * 4]).split())
    return line if len(line) <= most else f"{line[: most - 3]}..."


def _format_value(value: Any) -> str:
    value = plain(value)
    if isinstance(value, list):
        value = ",".join(map(str, value))
    if not isinstance(value, str):
        return json.dumps(value)
    if value and value.isprintable() and QUOTED_CHARACTERS.isdisjoint(value):
        return value
    return escaped(json.dumps(value, ensure_ascii=False))


class LineFormatter(logging.Formatter):
    """Formats a record as one line.

    Args:
        form: see ``Form``.
        journal: begin with the journal's priority prefix, and omit the time (``text``).
    """

    def __init__(self, form: Form, *, journal: bool) -> None:
        super().__init__()
        self.form = form
        self._journal = journal

    def format(self, record: logging.LogRecord) -> str:
        fields: Mapping[str, Any] = getattr(record, "fields", {})
        if record.exc_info:
            fields = {**fields, "traceback": self.formatException(record.exc_info)}
        time = _utc(datetime.fromtimestamp(record.created, UTC))
        if self.form == "json":
            line = _json(record, time, fields)
        else:
            words = [record.levelname, escaped(record.getMessage())]
            words += [f"{key}={_format_value(value)}" for key, value in fields.items()]
            line = " ".join(words if self._journal else [time, *words])
        return f"<{_priority(record.levelno)}>{line}" if self._journal else line


def _json(record: logging.LogRecord, time: str, fields: Mapping[str, Any]) -> str:
    line: dict[str, Any] = {
        "time": time,
        "level": record.levelname,
        "logger": record.name,
        "message": record.getMessage(),
    }
    for key, value in fields.items():
        line[f"{key}_" if key in line else key] = plain(value)
    return json.dumps(line)


def _priority(level: int) -> int:
    return next((priority for least, priority in PRIORITIES if level >= least), 7)


def format_fatal_error(text: str, exit_code: int) -> str:
    """Format the error that ends this process: as JSON if its log is JSON, else as plain text.

    In the journal it has the priority of an error, even before the log is configured.
    """
    journal = in_journal(sys.stderr, os.environ)
    formatters = [handler.formatter for handler in logging.getLogger().handlers]
    ours = next((f for f in formatters if isinstance(f, LineFormatter)), None)
    if ours is None or ours.form != "json":
        return f"<{_priority(logging.ERROR)}>{text}" if journal else text
    record = logging.LogRecord("agent", logging.ERROR, "", 0, "exiting with an error", None, None)
    record.fields = {"reason": text, "exit_code": exit_code}
    return ours.format(record)


def in_journal(stream: TextIO, environ: Mapping[str, str]) -> bool:
    """Whether ``stream`` goes to the journal: JOURNAL_STREAM has its device and inode (systemd.exec)."""
    try:
        stat = os.fstat(stream.fileno())
    except (OSError, ValueError):  # closed, or not a file at all
        return False
    return environ.get("JOURNAL_STREAM") == f"{stat.st_dev}:{stat.st_ino}"


class _QueueHandler(logging.Handler):
    """Passes each line to a ``LineWriter``, which never blocks."""

    def __init__(self, writer: LineWriter, formatter: LineFormatter) -> None:
        super().__init__()
        self.writer = writer
        self.setFormatter(formatter)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record)
        except Exception:  # noqa: BLE001 - a field that cannot be formatted must not end the caller
            self.handleError(record)
            return
        self.writer.put(line, bulk="line" in getattr(record, "fields", {}))

    def flush(self) -> None:
        """Write the last lines; logging.shutdown() calls it at the exit of the process."""
        self.writer.flush(FLUSH_S)


def _writer_of(stream: TextIO) -> LineWriter | None:
    """The writer in use, or a new one for ``stream``; None if it is not a file and cannot block."""
    try:
        fd = stream.fileno()
    except (OSError, ValueError):
        return None
    for handler in logging.getLogger().handlers:
        if isinstance(handler, _QueueHandler) and handler.writer.fd == fd:
            return handler.writer
    return LineWriter(fd, str)


def _handler_of(stream: TextIO, formatter: LineFormatter) -> logging.Handler:
    writer = _writer_of(stream)
    if writer is None:
        handler: logging.Handler = logging.StreamHandler(stream)
        handler.setFormatter(formatter)
        return handler

    def report(count: int) -> str:
        name, text = __name__, "log lines dropped"
        record = logging.LogRecord(name, logging.WARNING, "", 0, text, None, None)
        record.fields = {"count": count}
        return formatter.format(record)

    writer.report = report
    writer.start()
    if stream is sys.__stderr__:  # other output, such as tracebacks, must not block either
        sys.stderr = StderrLines(writer)
    return _QueueHandler(writer, formatter)


def dropped() -> int:
    """Number of log lines that this process has dropped because nobody reads its stderr."""
    handlers = logging.getLogger().handlers
    return sum(h.writer.dropped for h in handlers if isinstance(h, _QueueHandler))


def configure(level: str, form: Form, *, access_log: bool = False) -> None:
    """Send every event of this process to stderr. May be called again.

    Args:
        level: the lowest level that is shown: DEBUG, INFO, WARNING, ERROR or CRITICAL.
        form: see ``Form``.
        access_log: log uvicorn's line per request (the server's Config must agree).
    """
    formatter = LineFormatter(form, journal=in_journal(sys.stderr, os.environ))
    logging.basicConfig(level=level, handlers=[_handler_of(sys.stderr, formatter)], force=True)
    for name in UVICORN:
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.setLevel(logging.NOTSET)  # an earlier server may have set a level
        logger.propagate = access_log or name != "uvicorn.access"
    for name in HTTP_LIBRARIES:
        logging.getLogger(name).setLevel(logging.WARNING)
