"""The formats of a reported time, and why one is refused. Pure: no clock, no I/O.

Owns parsing a time from text, JSON and numbers, and the bound on future times. Knows nothing of where a time came
from, nor of tenures: the daemon ensures that it never goes back within one (R18).
"""

import json
import math
import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any

from agent.schema.scalars import format_date_time, parse_date_time

LONGEST_TEXT = 64 * 1024
"""The most bytes of a file's end or of a message: a page of state in JSON, parsed in a millisecond."""

LONGEST_REASON = 300
"""The most characters of a refusal, which is logged and shown in /status."""

EARLIEST_S = 100_000_000
"""3 March 1973. A smaller number is an age, a count or a date without dashes, given by mistake; as a time it would
make the next primary fetch the data of half a century. ISO 8601 can express any time."""

LATEST_S = 253_402_300_800
"""The year 10000. A current time in milliseconds is above this."""

_NUMBER = re.compile(r"[+-]?[0-9]+(\.[0-9]*)?([eE][+-]?[0-9]{1,3})?")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_RIGHT = "it must be ISO 8601, such as 2026-01-31T12:00:00Z, or seconds since 1970"


class Reason(StrEnum):
    """Why a time was refused. The values are labels of a metric."""

    FUTURE = "future"
    NEVER = "never"
    NOT_A_TIME = "not_a_time"
    TOO_LONG = "too_long"
    TOO_SLOW = "too_slow"
    UNREADABLE = "unreadable"


class Refused(ValueError):  # noqa: N818 - bad input is expected, and answered
    """A time was refused; the message is one sentence of bounded length."""

    def __init__(self, reason: Reason, text: str) -> None:
        super().__init__(
            text if len(text) <= LONGEST_REASON else text[: LONGEST_REASON - 3] + "..."
        )
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Plausible:
    """The check that every reported time has to pass, from every source.

    Attributes:
        max_future_s: how far ahead of this host's clock a time may be, in seconds, 0 or more.
    """

    max_future_s: float

    def check(self, time: datetime, now: datetime) -> datetime:
        """Return the time unless it is too far ahead of ``now``. Both have a time zone.

        Raises:
            Refused: FUTURE. A time in the future would hide every later one of the tenure (R18).
        """
        ahead_s = (time - now).total_seconds()
        if ahead_s > self.max_future_s:
            raise Refused(
                Reason.FUTURE,
                f"{format_date_time(time)} is {ahead_s:.3f} s ahead of this host's clock, and may be"
                f" {self.max_future_s:g} s: set the clocks, or raise max_future",
            )
        return time


def read_time(value: object, origin: str | None = None) -> datetime:
    """A moment in UTC, from ISO 8601 text, or from seconds since 1970 as a number or as text.

    Args:
        value: to parse.
        origin: names the value in an error instead of showing it, since a file may contain a secret.

    Raises:
        Refused: NOT_A_TIME, or NEVER for 0 and .NET's year 1.
    """
    if isinstance(value, str):
        text = value.strip()
        if _NUMBER.fullmatch(text):
            return from_seconds(float(text), origin)
        try:
            time = parse_date_time(text)
        except ValueError as error:
            fault = f"{error}, or seconds since 1970" if origin is None else _not_a_time(origin)
            raise Refused(Reason.NOT_A_TIME, fault) from None
        if time is None:
            raise Refused(Reason.NEVER, f"{text} means that nothing was processed yet")
        return time
    if isinstance(value, int | float) and not isinstance(value, bool):
        return from_seconds(value, origin)
    raise Refused(Reason.NOT_A_TIME, _not_a_time(origin or f"{value!r:.80}"))


def from_seconds(seconds: float, origin: str | None = None) -> datetime:
    """The moment that is so many seconds after 1970 began, in UTC, to the microsecond.

    Args:
        seconds: may be any number.
        origin: as for ``read_time``.

    Raises:
        Refused: NOT_A_TIME, before EARLIEST_S or from LATEST_S on; NEVER for 0.
    """
    if seconds == 0:
        raise Refused(Reason.NEVER, "0 means that nothing was processed yet")
    if not EARLIEST_S <= seconds < LATEST_S:  # also false for NaN
        hint = ""
        if LATEST_S <= seconds < math.inf:
            hint = ": this looks like milliseconds, or finer"
        elif 0 < seconds < EARLIEST_S:
            hint = ": this looks like an age or a count"
        raise Refused(
            Reason.NOT_A_TIME,
            f"{origin or f'{seconds!s:.40}'} must be seconds since 1970, from {EARLIEST_S} to"
            f" {LATEST_S}{hint}",
        )
    return _EPOCH + timedelta(seconds=seconds)


def read_text(data: bytes, key: str | None = None, origin: str | None = None) -> datetime:
    """The time that a message is, or that its JSON has at ``key``.

    Args:
        data: UTF-8, at most LONGEST_TEXT bytes.
        key: names of an object's members, or indexes of a list, with dots between.
        origin: as for ``read_time``.

    Raises:
        Refused: TOO_LONG, NOT_A_TIME or NEVER.
    """
    if len(data) > LONGEST_TEXT:
        raise Refused(Reason.TOO_LONG, f"{len(data)} bytes are more than {LONGEST_TEXT}")
    try:
        text = data.decode()
    except UnicodeDecodeError:
        shown = origin or f"{data!r:.80}"
        raise Refused(Reason.NOT_A_TIME, f"{shown} is not text: {_RIGHT}") from None
    if key is None:
        return read_time(text, origin)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Refused(
            Reason.NOT_A_TIME, f"{origin or f'{text!r:.80}'} is not JSON: {error}"
        ) from None
    return read_time(_member(value, key), origin)


def _not_a_time(shown: str) -> str:
    return f"{shown} is not a time: {_RIGHT}"


def _member(value: Any, key: str) -> object:
    for name in key.split("."):
        match value:
            case dict() if name in value:
                value = value[name]
            case list() if re.fullmatch("[0-9]{1,6}", name) and int(name) < len(value):
                value = value[int(name)]
            case _:
                raise Refused(Reason.NOT_A_TIME, f"the JSON has no {key}: there is no {name}")
    return value


def last_line(data: bytes) -> bytes:
    """The last line that is not empty, or nothing."""
    return data.rstrip().rpartition(b"\n")[2].strip()
