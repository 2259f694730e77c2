"""The formats that a value may have: duration, command, address, path, URL and others.

Owns parsing one value from any source. An invalid value raises a ValueError with one sentence on what would be
right. Knows nothing of settings, and of where a value was given.
"""

import json
import math
import os
import re
import shlex
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, TypeVar
from urllib.parse import urlsplit

from agent.core.timing import LONGEST_LEASE_S
from agent.files import make_absolute
from agent.model import TICKS_PER_SECOND
from agent.schema.addresses import Address, is_exposed, parse_ip
from agent.schema.fields import Format, Range
from agent.schema.scalars import parse_time_span
from agent.schema.secret_files import READABLE_BY_OTHERS

SHORTEST_INTERVAL_S = 0.05
"""The shortest interval of checks and polls: a quarter of the shortest lease. More often would only cost CPU."""

LONGEST_ID = 256
"""The most characters of a group or session id, which is part of a URL's path and a label of metrics."""

DEFAULT_ENDPOINT = "http://127.0.0.1:5470/api/v1/clientfailover"
"""The default endpoint: a coordinator on this machine with default settings."""

MOST_ENDPOINTS = 16
"""The most endpoints of one list, since all are probed at once when the one in use fails."""

MOST_LABELS = 32
"""The most labels of one metric; exporters use a handful."""

LONGEST_NAME, LONGEST_PATH = 255, 4095
"""The most bytes of a file's name, and of a path, that Linux takes."""

MOST_VARIABLES = 64
LONGEST_VARIABLE = 4096
"""The most characters of one environment variable; a longer value belongs in a file."""

LONGEST_SHOWN = 80
"""The most characters of a refused value in its error: enough to find it, and still one line."""

T = TypeVar("T")


def must(
    right: str, holds: Callable[[T], object], first: Callable[[Any], T] = lambda value: value
) -> Callable[[Any], T]:
    """Build a parser: ``first`` parses; if ``holds`` is false for its result, the error is "must" and ``right``."""

    def parse(given: Any) -> T:
        value = first(given)
        if not holds(value):
            raise ValueError(f"must {right}")
        return value

    return parse


def matches(pattern: str) -> Callable[[str], object]:
    """Whether the whole string matches a pattern."""
    return lambda value: re.fullmatch(pattern, value)


def sized(least: int, most: int) -> Callable[[str], str]:
    """Build a parser of strings with this many characters."""
    return must(f"be {least} to {most} characters", lambda text: least <= len(text) <= most)


def shown(value: object) -> str:
    """Format a refused value, without credentials and not too long."""
    text = re.sub(r"//(?:[^'\"]*|[^/@\s]*)@", "//***@", repr(value))
    return text if len(text) <= LONGEST_SHOWN else text[: LONGEST_SHOWN - 3] + "..."


# --- numbers and names --------------------------------------------------------------------------


def parse_duration(value: object) -> float:
    """Parse a number of seconds, a time-span or an ISO 8601 duration; return seconds."""
    if isinstance(value, int | float | str) and not isinstance(value, bool):
        for parse in (float, _parse_span):
            with suppress(ValueError, OverflowError):
                if math.isfinite(seconds := parse(value)):
                    return seconds
    raise ValueError(
        'a duration is seconds (2.5), a quoted time-span ("00:00:02.5") or ISO 8601 ("PT2.5S")'
    )


def _parse_span(value: object) -> float:
    return parse_time_span(str(value).strip()) / TICKS_PER_SECOND


check_id = must(
    f"be 1 to {LONGEST_ID} characters, without '/' and control characters, and not '.' or '..'",
    matches(rf"(?!\.\.?\Z)[^/\x00-\x1f\x7f-\x9f]{{1,{LONGEST_ID}}}"),
)
check_not_boolean: Callable[[Any], Any] = must(
    "be a number, not true or false", lambda value: not isinstance(value, bool)
)
"""Refuses a boolean, which pydantic would take for 0 or 1."""

check_metric_name = must(
    "be the name of a sample: letters, digits, '_' and ':'",
    matches(r"[a-zA-Z_:][a-zA-Z0-9_:]{0,255}"),
)
check_key_prefix = must(
    "be like /failover-agent: '/' and letters, digits, '.', '_', '-'",
    matches(r"(/[A-Za-z0-9._-]+)+"),
)
_check_host_name = must(
    "be a name of a host, like coordinator.example, without a port",
    matches(r"(?a)\w(?:[\w.-]{0,253}\w)?"),
)
_check_identity = must(
    "be user:NAME, client:ID or role:NAME", matches(r"(user|client|role):\S(.{0,254}\S)?")
)


def parse_account(value: object) -> str:
    """Parse the name or number of a user or group of this host."""
    text = str(value) if type(value) is int else value
    if not isinstance(text, str) or not re.fullmatch(r"[\w.][\w.@-]{0,31}", text, re.ASCII):
        raise ValueError("must be a name or a number of this host")
    return text


check_labels = must(
    f"be at most {MOST_LABELS} labels, with names of letters, digits and '_'",
    lambda labels: (
        len(labels) <= MOST_LABELS
        and all(re.fullmatch(r"[a-zA-Z_][a-zA-Z0-9_]*", name) for name in labels)
    ),
    first=dict[str, str],
)


# --- lists --------------------------------------------------------------------------------------


def load_json(text: str, what: str) -> object:
    """Parse the JSON text of a flag or variable; ``what`` describes the right value in an error."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"must be {what} in JSON, but: {error}") from None


def _split_words(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise ValueError(f"must be words as a shell splits them, but: {error}") from None


def _split_at_commas(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _strings(
    value: object, split: Callable[[str], list[str]] = _split_at_commas
) -> tuple[str, ...]:
    """Parse a list of strings. The text of a flag or variable is a JSON list, or is split."""
    if isinstance(value, str):
        in_json = value.lstrip().startswith("[")
        value = load_json(value, "a list") if in_json else split(value)
    if not isinstance(value, list | tuple) or not all(isinstance(part, str) for part in value):
        raise ValueError("must be a list of strings")
    return tuple(value)


def several(
    parse: Callable[[str], str], what: str, most: int, least: int = 0
) -> Callable[[object], tuple[str, ...]]:
    """Build a parser of a list of strings, each of which ``parse`` parses; ``what`` they are is for the error."""

    def parse_all(value: object) -> tuple[str, ...]:
        given = _strings(value)
        if not least <= len(given) <= most:
            raise ValueError(f"must be {f'{least} to' if least else 'at most'} {most} {what}")
        found = []
        for one in given:
            try:
                found.append(parse(one))
            except ValueError as error:
                which = f"{shown(one)} " if len(given) > 1 else ""
                raise ValueError(f"{which}{error}") from None
        return tuple(found)

    return parse_all


def parse_program(value: object) -> tuple[str, ...]:
    """Parse a command, a list or a string with shell quoting; () is no command. Its program is found by PATH."""
    argv = _strings(value, _split_words)
    if argv and not argv[0]:
        raise ValueError("must start with the name of a program")
    check_length(Path(*argv[:1]))
    if any("\0" in part for part in argv):
        raise ValueError("must not have a NUL character")
    return argv


parse_command = must(
    "start with an absolute path: there is no shell and no search (R11)",
    lambda argv: not argv or argv[0].startswith("/"),
    first=parse_program,
)
parse_needed_command = must(
    'be a list that begins with a program, like ["/usr/bin/test-it"]', bool, first=parse_command
)


def parse_hook(value: object) -> tuple[str, ...]:
    """Parse a command or directory as ``parse_command`` does, or one URL."""
    if isinstance(value, str) and is_http(value.strip()):
        value = [value.strip()]  # the & and ? of a query mean something else to a shell
    if isinstance(value, list | tuple) and value and is_http(value[0]):
        if len(value) > 1:
            raise ValueError("must be the URL alone: a webhook has no arguments")
        return (_check_webhook(value[0]),)
    return parse_command(value)


def is_http(value: object) -> bool:
    """Whether a hook's first word is the URL of a webhook."""
    return isinstance(value, str) and value.startswith(("http://", "https://"))


def parse_variables(value: object) -> dict[str, str]:
    """Parse environment variables: a table, a JSON object, or NAME=VALUE words."""
    if isinstance(value, str):
        in_json = value.lstrip().startswith("{")
        value = load_json(value, "an object") if in_json else _assignments(value)
    if not isinstance(value, Mapping):
        raise ValueError('must be a table of variables, like { UNIT = "collector.service" }')  # noqa: TRY004 - for pydantic
    if len(value) > MOST_VARIABLES:
        raise ValueError(f"must be at most {MOST_VARIABLES} variables")
    for name, text in value.items():
        if not re.fullmatch(r"(?!FAILOVER_)[A-Z_][A-Z0-9_]*", name):
            raise ValueError(
                f"{name!r} must be of capitals, digits and _, and not begin with a digit, nor with"
                " FAILOVER_, as the agent's own variables do"
            )
        if not isinstance(text, str) or len(text) > LONGEST_VARIABLE or "\0" in text:
            raise ValueError(
                f"{name} must be a string of at most {LONGEST_VARIABLE} characters, without NUL"
            )
    return dict(value)


def _assignments(text: str) -> dict[str, str]:
    words = [word.partition("=") for word in _split_words(text)]
    if not all(equals for _, equals, _ in words):
        raise ValueError("must be NAME=VALUE words, or a JSON object")
    return {name: value for name, _, value in words}


# --- URLs and addresses -------------------------------------------------------------------------

PAGE = "http(s)://HOST[:PORT][/PATH][?QUERY]"
API = "http(s)://HOST[:PORT][/PATH]"
BASE = "http(s)://HOST[:PORT]"
USE_FILE = "use username and password_file"


def url_like(form: str, instead: str) -> Callable[[str], str]:
    """Build a parser of URLs of a form, like those above; the error says where credentials belong ``instead``."""
    scheme = form.partition("(")[0]

    def parse(text: str) -> str:
        try:
            parts = urlsplit(text)
            if parts.port == 0:  # urlsplit checks the port only when it is read
                raise ValueError("Port out of range 1-65535")  # noqa: TRY301 - as its own errors
        except ValueError as error:  # its text may quote a part of credentials
            why = f"{form}, and nothing else" if "@" in text else f"a URL: {error}"
            raise ValueError(f"must be {why}") from None
        if parts.username is not None or parts.password is not None:
            raise ValueError(f"must not have credentials in the URL: {instead}")
        if (
            parts.scheme not in {scheme, f"{scheme}s"}
            or not parts.hostname
            or (parts.port is None and "[:PORT]" not in form)
            or (parts.path.strip("/") and "PATH" not in form)
            or ("?" in text and "QUERY" not in form)
            or not re.fullmatch(r"[^#\s]+", text)
            or not text.isprintable()
        ):
            raise ValueError(f"must be {form}, and nothing else")
        text = parts.scheme + text[len(parts.scheme) :]  # in lower case, so that all may compare it
        return text if "QUERY" in form else text.rstrip("/")

    return parse


_check_webhook = url_like(PAGE, "sign it by webhook_secret_file")
_parse_endpoint = must(
    f"be the base path up to clientfailover, as in {DEFAULT_ENDPOINT}",
    lambda text: text.lower().endswith("/clientfailover"),
    first=url_like(API, USE_FILE),
)
_check_secure = must(
    "be https, or http on this machine: whoever is on the way could change it",
    lambda text: not is_exposed(text),
    first=url_like(PAGE, "the page is public"),
)
_parse_member_url = must(
    f"have at most {LONGEST_ID} characters",
    lambda text: len(text) <= LONGEST_ID,
    first=url_like("http(s)://HOST:PORT", "use failsafe_secret_file"),
)


def parse_address(value: object) -> Address:
    """Parse HOST:PORT."""
    if isinstance(value, Address):
        return value
    pattern = r"(?:\[(?P<six>[^\]\s]*:[^\]\s]*)\]|(?P<host>[^:\[\]/\s]+)):(?P<port>[0-9]{1,5})"
    found = re.fullmatch(pattern, value) if isinstance(value, str) else None
    highest = 65535
    if not found or int(found["port"]) > highest or (found["six"] and not parse_ip(found["six"])):
        raise ValueError(
            "must be HOST:PORT with a port from 0 to 65535, an IPv6 address in brackets"
            " (127.0.0.1:5470, [::1]:5470)"
        )
    return Address(found["six"] or found["host"], int(found["port"]))


parse_peer = must("have a port from 1 to 65535", lambda address: address.port, first=parse_address)

# --- paths --------------------------------------------------------------------------------------


def check_length(path: Path) -> Path:
    """Refuse a path, or a name in it, that is longer than Linux permits."""
    text = os.fsencode(path)
    if len(text) > LONGEST_PATH or max(map(len, text.split(b"/"))) > LONGEST_NAME:
        raise ValueError(f"must have at most {LONGEST_PATH} bytes, and {LONGEST_NAME} in each name")
    return path


check_path: Callable[[Any], Path] = must(
    "be a path", lambda path: path.name and "\0" not in str(path), first=check_length
)
check_absolute = must("be an absolute path", Path.is_absolute, first=check_path)
check_directory: Callable[[Any], Path] = must(
    "be the absolute path of a directory",
    lambda path: path.is_absolute() and "\0" not in str(path),
    first=check_length,
)
check_exists = must(
    "be a file that exists, in directories that this user may enter",
    os.path.isfile,  # Path.is_file raises PermissionError
    first=lambda path: make_absolute(check_length(path)),
)
check_file = must(
    "be readable by this user", lambda path: os.access(path, os.R_OK), first=check_exists
)


def check_secret_file(path: Path) -> Path:
    """Check a file with a secret, to which other users must have no access."""
    mode = (path := check_file(path)).stat().st_mode
    if mode & READABLE_BY_OTHERS:
        raise ValueError(
            f"must not be readable or writable by others: its mode is {mode & 0o777:o},"
            f" right is 600 (chmod 600 {shlex.quote(str(path))})"
        )
    return path


# --- types with their formats -------------------------------------------------------------------

DURATION = Format("DURATION", "duration", unit="s", parse=parse_duration)
NUMBER = Format("NUMBER", "number", parse=check_not_boolean)
ADDRESS = Format("HOST:PORT", "HOST:PORT", parse=parse_address)
COMMAND = Format("COMMAND", "command: list of strings")
LEVEL = Format(
    "LEVEL",
    "DEBUG, INFO, WARNING or ERROR",
    parse=lambda level: level.upper() if isinstance(level, str) else level,
)
ADDRESS_OR_OFF = Format(
    "HOST:PORT|off",
    "HOST:PORT or off",
    parse=lambda value: None if value is None or value == "off" else parse_address(value),
    none="off",
)

Duration = Annotated[float, DURATION, Range(0, LONGEST_LEASE_S, above=True)]
Interval = Annotated[float, DURATION, Range(SHORTEST_INTERVAL_S, LONGEST_LEASE_S)]
DurationOrZero = Annotated[float, DURATION, Range(0, LONGEST_LEASE_S)]
Count = Annotated[int, NUMBER]
Number = Annotated[float, NUMBER]
Id = Annotated[str, Format("ID", f"1 to {LONGEST_ID} characters, no '/'", check=check_id)]
Text = Annotated[str, Format("TEXT", "text", check=sized(1, LONGEST_ID))]
Account = Annotated[str, Format("NAME", "name or number", parse=parse_account)]
Command = Annotated[tuple[str, ...], replace(COMMAND, parse=parse_command)]
NeededCommand = Annotated[tuple[str, ...], replace(COMMAND, parse=parse_needed_command)]
Program = Annotated[tuple[str, ...], replace(COMMAND, parse=parse_program)]
Hook = Annotated[
    tuple[str, ...],
    Format("HOOK", "list of strings: a command, one directory, or one URL", parse=parse_hook),
]
Variables = Annotated[
    Mapping[str, str], Format("VARIABLES", "table of strings", parse=parse_variables)
]
Endpoints = Annotated[
    tuple[str, ...],
    Format("URL", "list of URLs", parse=several(_parse_endpoint, "URLs", MOST_ENDPOINTS, least=1)),
]
BaseUrls = Annotated[
    tuple[str, ...],
    Format("URL", "list of URLs", parse=several(url_like(BASE, USE_FILE), "URLs", MOST_ENDPOINTS)),
]
BaseUrl = Annotated[str, Format("URL", "URL without a path", check=url_like(BASE, USE_FILE))]
MemberUrl = Annotated[str, Format("URL", "URL without a path", check=_parse_member_url)]
ApiUrl = Annotated[str, Format("URL", "URL", check=url_like(API, USE_FILE))]
PageUrl = Annotated[
    str, Format("URL", "URL", check=url_like(PAGE, "anybody can read them in this file"))
]
ProxyUrl = Annotated[
    str, Format("URL", "URL", check=url_like(BASE, "use proxy_username and proxy_password_file"))
]
SecureUrl = Annotated[str, Format("URL", "https:// URL", check=_check_secure)]
KeyPrefix = Annotated[str, Format("PREFIX", "prefix of keys", check=check_key_prefix)]
HostNames = Annotated[
    tuple[str, ...],
    Format(
        "NAME",
        "list of host names",
        parse=several(_check_host_name, "names of hosts", most=16),  # its own and aliases
    ),
]
Identities = Annotated[
    tuple[str, ...],
    Format(
        "KIND:NAME",
        "list of user:NAME, client:ID or role:NAME",
        parse=several(_check_identity, "identities", most=100),
    ),
]
Peer = Annotated[Address, replace(ADDRESS, parse=parse_peer)]
MetricName = Annotated[str, Format("NAME", "name of a sample", check=check_metric_name)]
Labels = Annotated[
    Mapping[str, str],
    Format("TABLE", f"table of strings, at most {MOST_LABELS}", check=check_labels),
]
AnyPath = Annotated[
    Path, Format("PATH", "path", check=lambda path: make_absolute(check_path(path)))
]
AbsolutePath = Annotated[Path, Format("PATH", "absolute path", check=check_absolute)]
Directory = Annotated[Path, Format("DIRECTORY", "absolute path", check=check_directory)]
InputFile = Annotated[Path, Format("FILE", "path of a file", check=check_file)]
SecretFile = Annotated[
    Path, Format("FILE", "path of a file that others cannot read", check=check_secret_file)
]
