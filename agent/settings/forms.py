"""The forms that a value may have: what is read as a duration, a command, an address, and its range.

Owns reading one value, whichever source it is from; a refusal is one sentence that says what would
be right. Refuses to know which settings there are and where a value was given.
"""

import ipaddress
import json
import math
import os
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import SplitResult, urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, PlainSerializer, PlainValidator

from agent.core.timing import LONGEST_LEASE_S
from agent.model import TICKS_PER_SECOND
from agent.schema.scalars import parse_time_span
from agent.settings.values import Address, LogLevel, RestartRule

LONGEST_ID = 256
"""Characters of a group or session id: it is a part of a URL's path, and a label of metrics."""

DEFAULT_ENDPOINT = "http://127.0.0.1:5470/api/v1/clientfailover"
"""A coordinator on this machine, with its own defaults."""

MOST_ENDPOINTS = 16
"""They are asked all at once when the one in use fails; more would be a load for nothing."""

READABLE_BY_OTHERS = 0o006
"""Permission bits that a file with a secret must not have (its group may read it)."""


StoreKind = Literal["sqlite", "memory"]
RoleForm = Literal["number", "name"]


_NOT_IN_IDS = re.compile(r"[/\x00-\x1f\x7f-\x9f]")


@dataclass(frozen=True, slots=True)
class Kind:
    """What a person is told of a form: a word for the help texts, and its range for the docs."""

    metavar: str
    text: str


def _seconds(value: object) -> float:
    wrong = ValueError(
        'a duration is seconds (2.5), a quoted time-span ("00:00:02.5") or ISO 8601 ("PT2.5S")'
    )
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise wrong
    try:
        seconds = float(value)
    except OverflowError:
        raise wrong from None
    except ValueError:
        try:
            seconds = parse_time_span(str(value).strip()) / TICKS_PER_SECOND
        except ValueError:
            raise wrong from None
    if not math.isfinite(seconds):
        raise wrong
    return seconds


def _upper(value: object) -> object:
    return value.upper() if isinstance(value, str) else value


def _not_bool(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("must be a number, not true or false")  # noqa: TRY004 - for pydantic
    return value


def check_id(value: str) -> str:
    """The same id, of a group or a session.

    Raises:
        ValueError: the API would refuse it (it is a segment of a URL's path).
    """
    if not 1 <= len(value) <= LONGEST_ID or _NOT_IN_IDS.search(value):
        raise ValueError(
            f"must be 1 to {LONGEST_ID} characters, without '/' and control characters"
        )
    if value in {".", ".."}:
        raise ValueError("must not be '.' or '..', which mean something else in a URL")
    return value


def _split(value: object, *, by_shell_rules: bool) -> object:
    """Make a list of a flag or variable: a JSON list, or words."""
    if not isinstance(value, str):
        return value
    if value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"must be a list in JSON, but: {error}") from None
    if by_shell_rules:
        try:
            return shlex.split(value)
        except ValueError as error:
            raise ValueError(f"must be words as a shell splits them, but: {error}") from None
    return [part.strip() for part in value.split(",") if part.strip()]


def _strings(value: object) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or not all(isinstance(part, str) for part in value):
        raise ValueError("must be a list of strings")
    return tuple(value)


def _program(value: object) -> tuple[str, ...]:
    """As ``argv_of``, for a program that may also be looked for on PATH."""
    argv = _strings(_split(value, by_shell_rules=True))
    if argv and not argv[0]:
        raise ValueError("must start with the name of a program")
    if any("\0" in part for part in argv):
        raise ValueError("must not have a NUL character")
    return argv


def argv_of(value: object) -> tuple[str, ...]:
    """A command: a list, or words as a shell splits them. Raises ValueError."""
    argv = _strings(_split(value, by_shell_rules=True))
    if argv and not argv[0].startswith("/"):
        raise ValueError("must start with an absolute path: there is no shell and no search (R11)")
    if any("\0" in part for part in argv):
        raise ValueError("must not have a NUL character")
    return argv


def _url(value: str) -> str:
    parts = _split_url(value)
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise ValueError("must be an http:// or https:// URL with a host")
    if parts.username is not None or parts.password is not None:
        raise ValueError("must not have credentials in the URL: use username and password_file")
    if parts.query or parts.fragment or any(c.isspace() or not c.isprintable() for c in value):
        raise ValueError("must not have a query, a fragment or white space")
    return value.rstrip("/")


def _split_url(value: str) -> SplitResult:
    try:
        parts = urlsplit(value)
        _ = parts.port  # is checked when it is read
    except ValueError as error:
        raise ValueError(f"must be a URL: {error}") from None
    return parts


def _endpoints(value: object) -> tuple[str, ...]:
    urls = _strings(_split(value, by_shell_rules=False))
    if not 1 <= len(urls) <= MOST_ENDPOINTS:
        raise ValueError(f"must be 1 to {MOST_ENDPOINTS} URLs")
    return tuple(_endpoint(url) for url in urls)


def _endpoint(value: str) -> str:
    url = _url(value)
    if not url.lower().endswith("/clientfailover"):
        raise ValueError(f"must be the base path up to clientfailover, as in {DEFAULT_ENDPOINT}")
    return url


_ADDRESS = re.compile(r"(?:\[(?P<six>[^\]\s]+)\]|(?P<host>[^:\[\]/\s]+)):(?P<port>[0-9]{1,5})")


def _address(value: object) -> Address:
    if isinstance(value, Address):
        return value
    found = _ADDRESS.fullmatch(value) if isinstance(value, str) else None
    if not found or int(found["port"]) > 65535:  # noqa: PLR2004 - ports are 16 bits
        raise ValueError(
            "must be HOST:PORT with a port from 0 to 65535, an IPv6 address in brackets"
            " (127.0.0.1:5470, [::1]:5470)"
        )
    if found["six"]:
        try:
            ipaddress.IPv6Address(found["six"])
        except ValueError as error:
            raise ValueError(f"must have an IPv6 address in its brackets: {error}") from None
    return Address(found["six"] or found["host"], int(found["port"]))


def _address_or_off(value: object) -> Address | None:
    return None if value is None or value == "off" else _address(value)


def _file(path: Path) -> Path:
    if not path.is_file():
        raise ValueError("must be a file that exists")
    if not os.access(path, os.R_OK):
        raise ValueError("must be readable by this user")
    return path


def _secret_file(path: Path) -> Path:
    mode = _file(path).stat().st_mode
    if mode & READABLE_BY_OTHERS:
        raise ValueError(
            f"must not be readable or writable by others: its mode is {mode & 0o777:o},"
            f" right is 600 (chmod 600 {shlex.quote(str(path))})"
        )
    return path


def _path(path: Path) -> Path:
    if not path.name or "\0" in str(path):
        raise ValueError("must be a path")
    return path


_DURATION = BeforeValidator(_seconds)
NUMBER = BeforeValidator(_not_bool)
Duration = Annotated[
    float,
    _DURATION,
    Field(gt=0, le=LONGEST_LEASE_S),
    Kind("DURATION", "duration, more than 0 s to 24 d"),
]
DurationOrZero = Annotated[
    float, _DURATION, Field(ge=0, le=LONGEST_LEASE_S), Kind("DURATION", "duration, 0 s to 24 d")
]
Lease = Annotated[
    float, _DURATION, Kind("DURATION", "duration, 0.2 s to 24 d")
]  # its range is R1's (exit 13)
Share = Annotated[float, NUMBER, Field(ge=0, le=100), Kind("NUMBER", "number, 0 to 100")]
Id = Annotated[str, AfterValidator(check_id), Kind("ID", f"1 to {LONGEST_ID} characters, no '/'")]
Text = Annotated[str, Field(min_length=1, max_length=LONGEST_ID), Kind("TEXT", "text")]
Endpoints = Annotated[tuple[str, ...], BeforeValidator(_endpoints), Kind("URL", "list of URLs")]
Url = Annotated[str, AfterValidator(_url), Kind("URL", "URL")]
Argv = Annotated[
    tuple[str, ...], BeforeValidator(argv_of), Kind("COMMAND", "command: list of strings")
]
Program = Annotated[
    tuple[str, ...], BeforeValidator(_program), Kind("COMMAND", "command: list of strings")
]
Restarts = Annotated[RestartRule, Kind("on-failure|always|never", "on-failure, always or never")]
Listen = Annotated[
    Address, PlainValidator(_address), PlainSerializer(str), Kind("HOST:PORT", "HOST:PORT")
]
ProbeListen = Annotated[
    Address | None,
    PlainValidator(_address_or_off),
    PlainSerializer(lambda address: "off" if address is None else str(address)),
    Kind("HOST:PORT|off", "HOST:PORT or off"),
]
Level = Annotated[LogLevel, BeforeValidator(_upper), Kind("LEVEL", "DEBUG, INFO, WARNING or ERROR")]
AnyPath = Annotated[Path, AfterValidator(_path), Kind("PATH", "path")]
InputFile = Annotated[Path, AfterValidator(_file), Kind("FILE", "path of a file")]
SecretFile = Annotated[
    Path, AfterValidator(_secret_file), Kind("FILE", "path of a file that others cannot read")
]
