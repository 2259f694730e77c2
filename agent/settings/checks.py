"""The ``[[check]]`` tables: health checks that gate the role, their keys, ranges and relations.

Owns what a check may be told, and naming table, key and right value in a refusal. Refuses to know
how a check is done (drivers/checks) and whether a command can be run (drivers/hooks.py).
"""

import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypeAlias
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    ValidationError,
    model_validator,
)

from agent.settings import values
from agent.settings.forms import NUMBER, AnyPath, Argv, Duration, Kind, Listen, Text
from agent.settings.values import StatusRange

MOST_CHECKS = 64
"""Tables. Each is a task that runs every few seconds; what a host has to say fits into fewer."""

MOST_LABELS = 32
"""Of one metric; exporters have a handful."""

SHORTEST_INTERVAL_S = 0.05
"""A quarter of the shortest lease; more often a check only costs the host."""

DEFAULT_LIMIT_S = 2.0

MOST_FAULTS = 20
"""Lines about one source's tables: enough to go on with, and no flood."""

LONGEST_SHOWN = 60
"""Characters of a refused value that its error repeats."""

TCP_PORTS = range(1, 65536)


class TablesError(ValueError):
    """What is wrong in the tables of one setting: one sentence each, with table and key.

    Attributes:
        unknown_key: whether the first fault is a key that no such table has.
    """

    def __init__(self, faults: Sequence[str], *, unknown_key: bool) -> None:
        super().__init__("; ".join(faults))
        self.faults = tuple(faults)
        self.unknown_key = unknown_key


def _name(value: str) -> str:
    if not re.fullmatch(r"[a-z0-9_-]{1,64}", value):
        raise ValueError("must be 1 to 64 of the characters a-z, 0-9, _ and -")
    return value


def _command(argv: tuple[str, ...]) -> tuple[str, ...]:
    if not argv:
        raise ValueError('must be a list that begins with a program, like ["/usr/bin/test-it"]')
    return argv


def _url(value: str) -> str:
    try:
        parts = urlsplit(value)
        _ = parts.port  # is checked when it is read
    except ValueError as error:
        raise ValueError(f"must be a URL: {error}") from None
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise ValueError("must be an http:// or https:// URL with a host")
    if parts.username is not None or parts.password is not None:
        raise ValueError("must not have credentials in it: anybody can read them in this file")
    if parts.fragment or any(c.isspace() or not c.isprintable() for c in value):
        raise ValueError("must not have a fragment or white space")
    return value


def _status(value: object) -> StatusRange:
    if isinstance(value, StatusRange):
        return value
    text = str(value) if isinstance(value, int | str) else ""
    found = re.fullmatch(r"([1-5][0-9]{2})(?:-([1-5][0-9]{2}))?", text)
    if not found or int(found[1]) > int(found[2] or found[1]):
        raise ValueError('must be a status (200) or a range in quotes ("200-399")')
    return StatusRange(int(found[1]), int(found[2] or found[1]))


def _absolute(path: Path) -> Path:
    if not path.is_absolute():
        raise ValueError("must be an absolute path")
    return path


def _port(address: Any) -> Any:
    if address.port not in TCP_PORTS:
        raise ValueError("must have a port from 1 to 65535")
    return address


def _metric(value: str) -> str:
    if not re.fullmatch(r"[a-zA-Z_:][a-zA-Z0-9_:]{0,255}", value):
        raise ValueError("must be the name of a sample: letters, digits, '_' and ':'")
    return value


def _labels(labels: dict[str, str]) -> dict[str, str]:
    if len(labels) > MOST_LABELS:
        raise ValueError(f"must be at most {MOST_LABELS} labels")
    for key in labels:
        if not re.fullmatch(r"[a-zA-Z_][a-zA-Z0-9_]*", key):
            raise ValueError(f"must have names of letters, digits and '_', not {_shown(key)}")
    return labels


CheckPath = Annotated[AnyPath, AfterValidator(_absolute), Kind("PATH", "absolute path")]
CheckUrl = Annotated[str, AfterValidator(_url), Kind("URL", "URL")]
Count = Annotated[int, NUMBER, Field(ge=1, le=100), Kind("NUMBER", "number, 1 to 100")]


class CheckForm(BaseModel):
    """What every check has. Durations are seconds."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: Annotated[str, AfterValidator(_name), Kind("NAME", "1 to 64 of a-z, 0-9, _ and -")] = (
        Field(description="What the log and the reason of a lost role call it. Unique.")
    )
    interval: Annotated[
        Duration, Field(ge=SHORTEST_INTERVAL_S), Kind("DURATION", "duration, 0.05 s to 24 d")
    ] = Field(5.0, description="Time from one run's start to the next one's.")
    limit: Duration = Field(
        default_factory=lambda data: min(DEFAULT_LIMIT_S, data.get("interval", DEFAULT_LIMIT_S)),
        description="How long a run may take before it counts as failed; at most interval."
        " Not set: 2 s, or interval if that is less.",
    )
    rise: Count = Field(2, description="Successes in a row that make a check pass again.")
    fall: Count = Field(
        3, description="Failures in a row that make it fail. The first run alone decides a start."
    )
    weight: Annotated[
        float, NUMBER, Field(gt=0, le=1000), Kind("NUMBER", "number, more than 0 to 1000")
    ] = Field(1.0, description="Its part of the score, beside the other checks' weights.")
    required: Annotated[bool, Kind("", "true or false")] = Field(
        default=False,
        description="While it fails this member does not become or stay primary, whatever the"
        " others say.",
    )
    scope: Annotated[values.Scope, Kind("WHEN", "always or primary")] = Field(
        "always",
        description="primary: done only while this member is primary, and passing otherwise: for"
        " a workload that does not run on a secondary.",
    )

    @model_validator(mode="after")
    def _check_relations(self) -> Self:
        for key, text in self._contradictions():
            raise ValueError(f"{key}: {text}")
        return self

    def _contradictions(self) -> Iterator[tuple[str, str]]:
        if self.limit > self.interval:
            yield "limit", f"must be at most interval, which is {self.interval:g} s"


class ExecCheckForm(CheckForm):
    """Passes if a command exits with 0."""

    plain: ClassVar = values.ExecCheck

    type: Annotated[Literal["exec"], Kind("TYPE", "exec")]
    command: Annotated[
        Argv, AfterValidator(_command), Kind("COMMAND", "command: list of strings")
    ] = Field(
        description="An absolute path and its arguments; no shell. Exit 0 passes. At its limit its"
        " process group gets TERM, then KILL."
    )


class HttpCheckForm(CheckForm):
    """Passes if a GET is answered with a good status."""

    plain: ClassVar = values.HttpCheck

    type: Annotated[Literal["http"], Kind("TYPE", "http")]
    url: CheckUrl = Field(description="What to GET. No proxy is used and no redirect followed.")
    status: Annotated[
        StatusRange,
        PlainValidator(_status),
        PlainSerializer(str),
        Kind("STATUS", "status or range"),
    ] = Field(StatusRange(200, 399), description="The statuses that pass.")
    contains: Annotated[str, Field(min_length=1, max_length=1024), Kind("TEXT", "text")] | None = (
        Field(None, description="Text that the first 64 KiB of the body must have. Not set: any.")
    )
    insecure_tls: Annotated[bool, Kind("", "true or false")] = Field(
        default=False, description="Do not check the certificate of an https URL."
    )

    def _contradictions(self) -> Iterator[tuple[str, str]]:
        yield from super()._contradictions()
        if self.insecure_tls and not self.url.startswith("https:"):
            yield "insecure_tls", "is for an https:// url: leave it out"


class TcpCheckForm(CheckForm):
    """Passes if a connection is accepted."""

    plain: ClassVar = values.TcpCheck

    type: Annotated[Literal["tcp"], Kind("TYPE", "tcp")]
    address: Annotated[Listen, AfterValidator(_port), Kind("HOST:PORT", "HOST:PORT")] = Field(
        description="What to connect to. Nothing is sent."
    )


class FileAgeCheckForm(CheckForm):
    """Passes if a file was written lately."""

    plain: ClassVar = values.FileAgeCheck

    type: Annotated[Literal["file_age"], Kind("TYPE", "file_age")]
    path: CheckPath = Field(description="The file (or directory) whose modification time counts.")
    max_age: Duration = Field(description="How old it may be.")


class ProcessCheckForm(CheckForm):
    """Passes if a process runs."""

    plain: ClassVar = values.ProcessCheck

    type: Annotated[Literal["process"], Kind("TYPE", "process")]
    pid_file: CheckPath | None = Field(
        None,
        description="File with the process's number. A number that came to name another process"
        " while the file stayed the same fails. Not set: any process of that name.",
    )
    process: Text | None = Field(
        None,
        description="The process's name: its command name in /proc/PID/comm (as ps shows it, cut to"
        " 15 characters) or the name of the file in /proc/PID/exe. With pid_file: that process"
        " must also have this name, which finds numbers reused across a restart. Not set: any"
        " name.",
    )

    def _contradictions(self) -> Iterator[tuple[str, str]]:
        yield from super()._contradictions()
        if self.pid_file is None and self.process is None:
            yield "pid_file", "needs pid_file, process or both"


class PrometheusCheckForm(CheckForm):
    """Passes if a metric of an exporter compares as it should."""

    plain: ClassVar = values.PrometheusCheck

    type: Annotated[Literal["prometheus"], Kind("TYPE", "prometheus")]
    url: CheckUrl = Field(description="The exporter's page of metrics, at most 4 MiB.")
    metric: Annotated[str, AfterValidator(_metric), Kind("NAME", "name of a sample")] = Field(
        description="The sample's name, as the page has it (with _total, _count, ...)."
    )
    labels: Annotated[
        dict[str, str],
        AfterValidator(_labels),
        Kind("TABLE", f"table of strings, at most {MOST_LABELS}"),
    ] = Field(
        default_factory=dict,
        description="Labels that a sample must have, beside any others. Not set: any.",
    )
    op: Annotated[values.Comparison, Kind("OP", "> >= < <= == or !=")] = Field(
        description="How every such sample must compare with value; NaN never does."
    )
    value: Annotated[float, NUMBER, Kind("NUMBER", "number")] = Field(description="With what.")


AnyCheckForm: TypeAlias = (
    ExecCheckForm
    | HttpCheckForm
    | TcpCheckForm
    | FileAgeCheckForm
    | ProcessCheckForm
    | PrometheusCheckForm
)
TYPES: Mapping[str, type[CheckForm]] = {
    "exec": ExecCheckForm,
    "http": HttpCheckForm,
    "tcp": TcpCheckForm,
    "file_age": FileAgeCheckForm,
    "process": ProcessCheckForm,
    "prometheus": PrometheusCheckForm,
}

EXAMPLES: tuple[Mapping[str, Any], ...] = (
    {
        "name": "disk",
        "type": "exec",
        "command": ["/usr/local/bin/disk-has-room", "/var/lib/collector"],
        "interval": 30,
        "limit": 10,
    },
    {
        "name": "collector",
        "type": "http",
        "url": "http://127.0.0.1:8080/health?deep=1",
        "status": "200-299",
        "contains": "ready",
        "scope": "primary",
        "required": True,
    },
    {"name": "plc", "type": "tcp", "address": "192.0.2.10:502", "weight": 3},
    {"name": "spool", "type": "file_age", "path": "/var/spool/collector/last", "max_age": 60},
    {"name": "broker", "type": "process", "pid_file": "/run/broker.pid", "process": "mosquitto"},
    {
        "name": "room",
        "type": "prometheus",
        "url": "http://127.0.0.1:9100/metrics",
        "metric": "node_filesystem_avail_bytes",
        "labels": {"mountpoint": "/var"},
        "op": ">",
        "value": 100_000_000,
    },
)


def _read(value: object) -> tuple[AnyCheckForm, ...]:
    """The checks of a list of tables, or of the same as JSON (from a flag or a variable).

    Raises:
        ValueError: it is no list of tables; TablesError if something in one is wrong.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"must be a list of tables in JSON, but: {error}") from None
    if not isinstance(value, list | tuple):
        raise ValueError("must be tables, each under [[check]]")  # noqa: TRY004 - for pydantic
    if len(value) > MOST_CHECKS:
        raise ValueError(f"must be at most {MOST_CHECKS} tables")
    checks: list[AnyCheckForm] = []
    faults: list[tuple[str, bool]] = []
    first: dict[str, int] = {}
    for number, table in enumerate(value, 1):
        try:
            check = _read_one(table)
        except TablesError as error:
            place = _place(number, table)
            faults += [(f"{place}: {fault}", error.unknown_key) for fault in error.faults]
            continue
        if check.name in first:
            other = f"check {first[check.name]} has that name already: choose another"
            faults.append((f"{_place(number, table)}: name: {other}", False))
        first.setdefault(check.name, number)
        checks.append(check)
    if faults:
        told = [fault for fault, _ in faults[:MOST_FAULTS]]
        raise TablesError(told, unknown_key=faults[0][1])
    return tuple(checks)


def _place(number: int, table: object) -> str:
    name = table.get("name") if isinstance(table, Mapping) else None
    return f"check {number} ({_shown(name)})" if isinstance(name, str) else f"check {number}"


def _read_one(table: object) -> AnyCheckForm:
    if isinstance(table, CheckForm):
        return table  # type: ignore[return-value] # no other class is made of the base
    if not isinstance(table, Mapping):
        raise TablesError(["must be a table, under [[check]]"], unknown_key=False)
    kind = table.get("type")
    model = TYPES.get(kind) if isinstance(kind, str) else None
    if model is None:
        said = f"type = {_shown(kind)}" if "type" in table else "type"
        raise TablesError([f"{said}: must be one of {', '.join(TYPES)}"], unknown_key=False)
    try:
        return model.model_validate(table)  # type: ignore[return-value] # as above
    except ValidationError as error:
        faults = list(_faults(error, model, str(kind)))
        raise TablesError(
            [text for text, _ in faults], unknown_key=any(unknown for _, unknown in faults)
        ) from None


def _faults(
    error: ValidationError, model: type[CheckForm], kind: str
) -> Iterator[tuple[str, bool]]:
    """One sentence per key, unknown keys first, and whether it is about an unknown one."""
    seen = set()
    found = error.errors(include_url=False)
    for fault in sorted(found, key=lambda fault: fault["type"] != "extra_forbidden"):
        key = str(fault["loc"][0]) if fault["loc"] else ""
        told = fault.get("ctx", {}).get("error")
        text = str(told) if told else fault["msg"].replace("Input should", "must")
        if key in seen or fault["type"] == "default_factory_not_called":  # follows from another
            continue
        seen.add(key)
        match fault["type"]:
            case "extra_forbidden":
                yield _unknown(key, model, kind), True
            case "missing":
                yield f"{key}: is missing, and a check of type {kind} needs it", False
            case _ if not key:  # a relation names its key itself
                yield text, False
            case "path_type":
                yield f"{key} = {_shown(fault['input'])}: must be a path, as a string", False
            case _:
                yield f"{key} = {_shown(fault['input'])}: {text}", False


def _unknown(key: str, model: type[CheckForm], kind: str) -> str:
    keys = list(model.model_fields)
    close = difflib.get_close_matches(key, keys, n=1)
    right = f"did you mean {close[0]}?" if close else f"it has {', '.join(keys)}"
    return f"a check of type {kind} has no key {_shown(key)}: {right}"


def _shown(value: object) -> str:
    text = re.sub(r"//[^/@\s]*@", "//***@", repr(value))
    return text if len(text) <= LONGEST_SHOWN else text[: LONGEST_SHOWN - 3] + "..."


CheckTables = Annotated[
    tuple[AnyCheckForm, ...],
    PlainValidator(_read),
    PlainSerializer(lambda checks: [check.model_dump(mode="json") for check in checks]),
    Kind("JSON", f"tables [[check]], at most {MOST_CHECKS}"),
]
