"""The formats that a value may have: duration, command, address, path, URL and others.

Owns parsing one value from any source. An invalid value raises a ValueError with one sentence on what would be
right. Knows nothing of settings, and of where a value was given.
"""

import ipaddress
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
from urllib.parse import SplitResult, urlsplit

from agent.core.timing import LONGEST_LEASE_S
from agent.files import make_absolute
from agent.model import TICKS_PER_SECOND
from agent.schema.addresses import Address, is_loopback
from agent.schema.fields import Format, Length, Range
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

MOST_HOST_NAMES = 16
"""The most host names of one coordinator: its name and aliases."""

MOST_IDENTITIES = 100
"""The most identities in one list: users, clients and roles."""

MOST_LABELS = 32
"""The most labels of one metric; exporters use a handful."""

LONGEST_NAME, LONGEST_PATH = 255, 4095
"""The most bytes of a file's name, and of a path, that Linux takes."""

MOST_VARIABLES = 64
LONGEST_VARIABLE = 4096
"""The most characters of one environment variable; a longer value belongs in a file."""

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


def check_id(value: str) -> str:
    """Check the id of a group or a session, which is a segment of a URL's path."""
    if not re.fullmatch(rf"[^/\x00-\x1f\x7f-\x9f]{{1,{LONGEST_ID}}}", value):
        raise ValueError(
            f"must be 1 to {LONGEST_ID} characters, without '/' and control characters"
        )
    if value in {".", ".."}:
        raise ValueError("must not be '.' or '..', which mean something else in a URL")
    return value


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


def parse_account(value: object) -> str:
    """Parse the name or number of a user or group of this host."""
    text = str(value) if type(value) is int else value
    if not isinstance(text, str) or not re.fullmatch(r"[\w.][\w.@-]{0,31}", text, re.ASCII):
        raise ValueError("must be a name or a number of this host")
    return text


def check_labels(labels: Mapping[str, str]) -> dict[str, str]:
    """Check the labels of a sample."""
    if len(labels) > MOST_LABELS:
        raise ValueError(f"must be at most {MOST_LABELS} labels")
    for name in labels:
        if not re.fullmatch(r"[a-zA-Z_][a-zA-Z0-9_]*", name):
            raise ValueError(f"must have names of letters, digits and '_', not {name!r:.60}")
    return dict(labels)


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
        check_url(value[0], instead="sign it by webhook_secret_file", query=True)
        return (value[0],)
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
        if not isinstance(name, str) or not re.fullmatch(r"[A-Z_][A-Z0-9_]*", name):
            raise ValueError(
                f"{name!r} must be of capitals, digits and _, and not begin with a digit"
            )
        if name.startswith("FAILOVER_"):
            raise ValueError(
                f"{name} must not begin with FAILOVER_, as the agent's own variables do"
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


def parse_identities(value: object) -> tuple[str, ...]:
    """Parse identities of callers: ``user:NAME``, ``client:ID`` or ``role:NAME``."""
    identity = matches(r"(user|client|role):\S(.{0,254}\S)?")
    given = _strings(value)
    wrong = next((f", not {one!r:.60}" for one in given if not identity(one)), "")
    if wrong or len(given) > MOST_IDENTITIES:
        raise ValueError(
            f"must be a list of at most {MOST_IDENTITIES} identities, each user:NAME, client:ID or"
            f" role:NAME{wrong}"
        )
    return given


def parse_host_names(value: object) -> tuple[str, ...]:
    """Parse names of hosts, without ports."""
    names, is_name = _strings(value), matches(r"\w(?:[A-Za-z0-9_.-]{0,253}\w)?")
    if len(names) > MOST_HOST_NAMES or not all(name.isascii() and is_name(name) for name in names):
        raise ValueError(
            f"must be at most {MOST_HOST_NAMES} names of hosts, like coordinator.example, without ports"
        )
    return names


# --- URLs and addresses -------------------------------------------------------------------------


def check_url(
    url: str,
    *,
    schemes: tuple[str, ...] = ("http", "https"),
    shape: str = "an http:// or https:// URL with a host",
    instead: str = "use username and password_file",
    query: bool = False,
) -> SplitResult:
    """Parse a URL with one of the schemes and a host, without credentials and fragment; return its parts.

    Args:
        url: the text.
        schemes: in lower case.
        shape: the right form, for the error about scheme or host.
        instead: where credentials belong, for the error.
        query: whether it may have a query.
    """
    try:
        parts = urlsplit(url)
        _ = parts.port  # urlsplit checks the port only when it is read
    except ValueError as error:
        raise ValueError(f"must be a URL: {error}") from None
    if parts.scheme not in schemes or not parts.hostname:
        raise ValueError(f"must be {shape}")
    if parts.username is not None or parts.password is not None:
        raise ValueError(f"must not have credentials in the URL: {instead}")
    if ("?" in url and not query) or "#" in url or not url.isprintable() or " " in url:
        parts_refused = "a fragment" if query else "a query, a fragment"
        raise ValueError(f"must not have {parts_refused} or white space")
    return parts


def parse_api_url(url: str) -> str:
    """Parse a URL to which paths are appended."""
    check_url(url)
    return url.rstrip("/")


parse_base_url = must(
    "be http(s)://HOST:PORT without a path",
    lambda url: not urlsplit(url).path.strip("/"),
    first=parse_api_url,
)


def parse_proxy(url: str) -> str:
    """Parse the URL of an HTTP proxy."""
    if check_url(url, instead="use proxy_username and proxy_password_file").path.strip("/"):
        raise ValueError("must have nothing after the port")
    return url.rstrip("/")


def parse_page_url(url: str) -> str:
    """Check the URL of a page to GET."""
    check_url(url, instead="anybody can read them in this file", query=True)
    return url


def parse_secure_url(url: str) -> str:
    """Check the URL of a page to GET over a connection that nobody can tamper with: https, or loopback."""
    parts = check_url(url, instead="the page is public", query=True)
    if parts.scheme == "http" and not is_loopback(parts.hostname or ""):
        raise ValueError(
            "must be https, or http on this machine: whoever is on the way could change it"
        )
    return url


def parse_endpoints(value: object) -> tuple[str, ...]:
    """Parse the base paths of one coordinator or cluster."""
    if not 1 <= len(urls := _strings(value)) <= MOST_ENDPOINTS:
        raise ValueError(f"must be 1 to {MOST_ENDPOINTS} URLs")
    endpoints = tuple(map(parse_api_url, urls))
    if not all(url.lower().endswith("/clientfailover") for url in endpoints):
        raise ValueError(f"must be the base path up to clientfailover, as in {DEFAULT_ENDPOINT}")
    return endpoints


def parse_base_urls(value: object) -> tuple[str, ...]:
    """Parse the client URLs of the members of one etcd cluster."""
    if len(urls := _strings(value)) > MOST_ENDPOINTS:
        raise ValueError(f"must be at most {MOST_ENDPOINTS} URLs")
    return tuple(map(parse_base_url, urls))


def parse_member_url(url: str) -> str:
    """Check the URL of a member's failsafe listener, which needs a port."""
    parts = check_url(url, instead="use failsafe_secret_file")
    if parts.path.strip("/") or not parts.port or len(url) > LONGEST_ID:
        raise ValueError(
            f"must be http(s)://HOST:PORT without a path, of at most {LONGEST_ID} characters"
        )
    return url.rstrip("/")


def parse_address(value: object) -> Address:
    """Parse HOST:PORT."""
    if isinstance(value, Address):
        return value
    pattern = r"(?:\[(?P<six>[^\]\s]+)\]|(?P<host>[^:\[\]/\s]+)):(?P<port>[0-9]{1,5})"
    found = re.fullmatch(pattern, value) if isinstance(value, str) else None
    if not found or int(found["port"]) > 65535:  # noqa: PLR2004 - the highest TCP port
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

DURATION = Format("DURATION", "duration", unit="s", before=parse_duration)
NUMBER = Format("NUMBER", "number", before=check_not_boolean)
ADDRESS = Format("HOST:PORT", "HOST:PORT", parse=parse_address)
COMMAND = Format("COMMAND", "command: list of strings")
URL = Format("URL", "URL")
LEVEL = Format(
    "LEVEL",
    "DEBUG, INFO, WARNING or ERROR",
    before=lambda level: level.upper() if isinstance(level, str) else level,
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
Id = Annotated[str, Format("ID", f"1 to {LONGEST_ID} characters, no '/'", after=check_id)]
Text = Annotated[str, Format("TEXT", "text"), Length(1, LONGEST_ID)]
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
Endpoints = Annotated[tuple[str, ...], Format("URL", "list of URLs", parse=parse_endpoints)]
BaseUrls = Annotated[tuple[str, ...], Format("URL", "list of URLs", parse=parse_base_urls)]
BaseUrl = Annotated[str, Format("URL", "URL without a path", after=parse_base_url)]
MemberUrl = Annotated[str, Format("URL", "URL without a path", after=parse_member_url)]
ApiUrl = Annotated[str, replace(URL, after=parse_api_url)]
PageUrl = Annotated[str, replace(URL, after=parse_page_url)]
ProxyUrl = Annotated[str, replace(URL, after=parse_proxy)]
SecureUrl = Annotated[str, Format("URL", "https:// URL", after=parse_secure_url)]
KeyPrefix = Annotated[str, Format("PREFIX", "prefix of keys", after=check_key_prefix)]
HostNames = Annotated[tuple[str, ...], Format("NAME", "list of host names", parse=parse_host_names)]
Identities = Annotated[
    tuple[str, ...],
    Format("KIND:NAME", "list of user:NAME, client:ID or role:NAME", parse=parse_identities),
]
Peer = Annotated[Address, replace(ADDRESS, parse=parse_peer)]
MetricName = Annotated[str, Format("NAME", "name of a sample", after=check_metric_name)]
Labels = Annotated[
    Mapping[str, str],
    Format("TABLE", f"table of strings, at most {MOST_LABELS}", after=check_labels),
]
AnyPath = Annotated[
    Path, Format("PATH", "path", after=lambda path: make_absolute(check_path(path)))
]
AbsolutePath = Annotated[Path, Format("PATH", "absolute path", after=check_absolute)]
Directory = Annotated[Path, Format("DIRECTORY", "absolute path", after=check_directory)]
InputFile = Annotated[Path, Format("FILE", "path of a file", after=check_file)]
SecretFile = Annotated[
    Path, Format("FILE", "path of a file that others cannot read", after=check_secret_file)
]
