"""Parse and format the values inside the JSON shapes: time-spans, date-times, enumerations, and their errors.

Plain functions, for both sides of the API. Owns no shape, and imports no pydantic, which an agent does not load.
"""

import json
import re
from collections.abc import Mapping
from datetime import UTC, datetime

from agent.model import TICKS_PER_SECOND

MAX_TICKS = 2**63 - 1
"""A .NET time-span is a signed 64-bit count of ticks: 10675199.02:48:05.4775807 at most."""

LONGEST_PERIOD_TICKS = 2_000_000 * 86_400 * TICKS_PER_SECOND - 1
"""The end of a period is a date that can be written: 2000000 days end well before the year 9999."""

MAX_SHOWN = 60
"""Characters of a wrong value that an error repeats: enough to recognise it in a log line."""


_MINUTE, _HOUR, _DAY, _WEEK = (s * TICKS_PER_SECOND for s in (60, 3600, 86_400, 604_800))
CLOCK = r"([01]?[0-9]|2[0-3]):([0-5][0-9]):([0-5][0-9])(?:\.([0-9]{1,7}))?"
_CONSTANT = re.compile(rf"(-)?(?:(0|[1-9][0-9]{{0,7}})\.)?{CLOCK}")
# The digits are limited so that no sum of the parts passes LONGEST_PERIOD_TICKS.
ISO_BODY = (
    r"P(?=[0-9T])(?:([0-9]{1,4})W)?(?:([0-9]{1,6})D)?(?:T(?=[0-9])(?:([0-9]{1,6})H)?"
    r"(?:([0-9]{1,8})M)?(?:([0-9]{1,9})(?:[.,]([0-9]{1,7}))?S)?)?"
)
_ISO = re.compile(f"(-)?{ISO_BODY}")
_ISO_CALENDAR = re.compile(r"-?P[^T]*[0-9][YM]")
_FORMS = "[-][d.]hh:mm:ss[.fffffff] such as 00:01:00, or an ISO 8601 duration such as PT1M"


def parse_time_span(text: str) -> int:
    """Ticks of 100 ns, from the .NET constant form or from an ISO 8601 duration (W, D, H, M, S).

    Raises:
        ValueError: it is neither, counts in years or months, or is beyond a .NET time-span.
    """
    weeks: str | None = None
    if match := _CONSTANT.fullmatch(text):
        sign, days, hours, minutes, seconds, fraction = match.groups()
    elif match := _ISO.fullmatch(text):
        sign, weeks, days, hours, minutes, seconds, fraction = match.groups()
    elif _ISO_CALENDAR.match(text):
        raise ValueError(
            f"{shown(text)} counts in years or months, which have no fixed length:"
            " count in weeks or days, such as P30D"
        )
    else:
        raise ValueError(f"{shown(text)} is not a time-span: it must be {_FORMS}")
    ticks = (
        int(weeks or 0) * _WEEK
        + int(days or 0) * _DAY
        + int(hours or 0) * _HOUR
        + int(minutes or 0) * _MINUTE
        + int(seconds or 0) * TICKS_PER_SECOND
        + int((fraction or "").ljust(7, "0"))
    )
    return _within(-ticks if sign else ticks, text)


def format_time_span(ticks: int) -> str:
    """The .NET constant form, ``[-][d.]hh:mm:ss[.fffffff]``.

    Raises:
        ValueError: more ticks than a .NET time-span has.
    """
    seconds, fraction = divmod(abs(_within(ticks, ticks)), TICKS_PER_SECOND)
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    sign, whole_days = "-" if ticks < 0 else "", f"{days}." if days else ""
    fractions = f".{fraction:07}" if fraction else ""
    return f"{sign}{whole_days}{hours:02}:{minutes:02}:{seconds:02}{fractions}"


def _within(ticks: int, given: object) -> int:
    if not -MAX_TICKS - 1 <= ticks <= MAX_TICKS:
        raise ValueError(
            f"{shown(given)} does not fit a time-span:"
            " it must be from -10675199.02:48:05.4775808 to 10675199.02:48:05.4775807"
        )
    return ticks


_DATE_TIME = re.compile(
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}[Tt][0-9]{2}:[0-9]{2}:[0-9]{2}(?:\.[0-9]+)?"
    r"(?:[Zz]|[+-][0-9]{2}(?::?[0-9]{2})?)?"
)


def parse_date_time(text: object) -> datetime | None:
    """A moment in UTC, cut to microseconds; None for .NET's "never", midnight of 0001-01-01.

    No zone means UTC. A moment that its offset moves before the year 1 is "never" too, and one that
    is moved past 9999 is the last that can be written.

    Raises:
        ValueError: it is not an ISO 8601 date and time.
    """
    if not isinstance(text, str) or not _DATE_TIME.fullmatch(text):
        raise ValueError(not_a_time(text))
    try:
        read = datetime.fromisoformat(text.upper())
    except ValueError as error:
        raise ValueError(f"{not_a_time(text)} ({error})") from None
    if read.tzinfo is UTC and read.year > 1:
        return read
    if read.replace(tzinfo=None) == datetime.min:  # noqa: DTZ901 - the wall time, whatever its zone
        return None
    try:
        return read.astimezone(UTC) if read.tzinfo else read.replace(tzinfo=UTC)
    except OverflowError:
        return None if read.year == 1 else datetime.max.replace(tzinfo=UTC)


def format_date_time(moment: datetime) -> str:
    """ISO 8601 in UTC with ``Z``. ``moment`` is aware."""
    return moment.astimezone(UTC).isoformat()[:-6] + "Z"


def not_a_time(given: object) -> str:
    """Build the error's sentence for a value that is not a date-time."""
    return f"{shown(given)} is not a date-time: it must be ISO 8601, such as 2026-01-31T12:00:00Z"


def not_json(given: str | bytes, whole: str, why: str) -> str:
    """Build the error's sentence for a text that is not JSON. ``whole`` is the name of the text."""
    text = given if isinstance(given, str) else given[: 4 * MAX_SHOWN].decode(errors="replace")
    if not text.strip():
        return f"{whole} is empty: it must be a JSON object"
    what = "HTML or XML" if text.lstrip().startswith("<") else f"not JSON ({why})"
    return f"{whole} is {what}: it must be a JSON object, and begins with {shown(text)}"


def shown(given: object) -> str:
    """Format a wrong value as JSON; of a list or an object show only the kind."""
    match given:
        case list() | tuple():
            return "a list"
        case Mapping():
            return "an object"
        case str():
            cut = given[:MAX_SHOWN]
            more = f" ({len(given)} characters)" if len(given) > len(cut) else ""
            return json.dumps(cut, ensure_ascii=False) + more
        case None | bool() | int() | float():
            return json.dumps(given)[:MAX_SHOWN]
        case _:
            return repr(given)[:MAX_SHOWN]
