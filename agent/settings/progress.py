"""The ``[progress]`` table: where the data-processed time comes from, beside the local HTTP call.

Owns what each kind of source may be told, and naming key and right value in a refusal. Refuses to
know how a source is read (drivers/progress) and whether its command can be run (drivers/hooks.py).
"""

import difflib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeAlias
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

from agent.settings.checks import SHORTEST_INTERVAL_S, CheckUrl, TablesError
from agent.settings.forms import (
    Address,
    AnyPath,
    Argv,
    Duration,
    DurationOrZero,
    InputFile,
    Kind,
    SecretFile,
    Text,
    is_loopback,
)

DEFAULT_MAX_FUTURE_S = 5.0
"""The bound when there is no table: clocks that NTP keeps are within milliseconds of each other, and
a time that is further ahead would hide every later one of the tenure."""

LONGEST_SOCKET_PATH = 107
"""Bytes; the kernel's address has 108 with the closing NUL (unix(7))."""

LONGEST_SHOWN = 60
"""Characters of a refused value that its error repeats."""

MQTT_PORT = 1883
MQTTS_PORT = 8883


def _socket_path(path: Path) -> Path:
    if not path.is_absolute() or len(bytes(path)) > LONGEST_SOCKET_PATH:
        raise ValueError(f"must be an absolute path of at most {LONGEST_SOCKET_PATH} bytes")
    return path


def _mode(value: object) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"0?[0-7]{3}", value):
        raise ValueError('must be permissions in octal and in quotes, like "0660"')
    return value


def _command(argv: tuple[str, ...]) -> tuple[str, ...]:
    if not argv:
        raise ValueError('must be a list that begins with a program, like ["/usr/bin/last-time"]')
    return argv


def _key(value: str) -> str:
    if not all(value.split(".")):
        raise ValueError('must be names, or numbers in lists, with dots between ("status.items.0")')
    return value


def _topic(value: str) -> str:
    if re.search(r"[+#\0]", value):
        raise ValueError("must be one topic, without the wildcards + and #")
    return value


def _broker(value: str) -> str:
    try:
        parts = urlsplit(value)
        port = parts.port
    except ValueError as error:
        raise ValueError(f"must be a URL: {error}") from None
    if parts.scheme not in {"mqtt", "mqtts"} or not parts.hostname or port == 0:
        raise ValueError("must be mqtt://HOST:PORT or mqtts://HOST:PORT")
    if parts.username is not None or parts.password is not None:
        raise ValueError("must not have credentials in it: use username and password_file")
    if parts.path.strip("/") or parts.query or parts.fragment or not value.isprintable():
        raise ValueError("must have nothing after the port")
    return value


Key = Annotated[
    str, Field(max_length=256), AfterValidator(_key), Kind("KEY", "names with dots between")
]
Limit = Annotated[Duration, Kind("DURATION", "duration, more than 0 s to 24 d")]
KEY_MEANING = "Where in it the time is, if it is JSON. Not set: it is the time itself."


class _Source(BaseModel):
    """What every source has. Durations are seconds."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    max_future: DurationOrZero = Field(
        DEFAULT_MAX_FUTURE_S,
        description="How far ahead of this host's clock a time may be; what is further is refused"
        " and counted. Counts for POST /data-processed too.",
    )

    @model_validator(mode="after")
    def _check_relations(self) -> Self:
        for key, text in self._contradictions():
            raise ValueError(f"{key}: {text}")
        return self

    def _contradictions(self) -> Iterator[tuple[str, str]]:
        yield from ()


class _Polled(_Source):
    """What every source has that is asked, rather than tells."""

    interval: Annotated[
        Duration, Field(ge=SHORTEST_INTERVAL_S), Kind("DURATION", "duration, 0.05 s to 24 d")
    ] = Field(1.0, description="Time from the end of one reading to the start of the next.")
    limit: Limit = Field(1.0, description="How long one reading may take.")


class SocketProgress(_Source):
    """A Unix socket that the agent makes; each line, or datagram, is a time."""

    type: Annotated[Literal["socket"], Kind("TYPE", "socket")]
    path: Annotated[AnyPath, AfterValidator(_socket_path), Kind("PATH", "absolute path")] = Field(
        description="The socket. What a dead agent left there is replaced."
    )
    datagram: Annotated[bool, Kind("", "true or false")] = Field(
        default=False, description="A datagram socket, instead of a stream of lines."
    )
    mode: Annotated[str, PlainValidator(_mode), Kind("MODE", "permissions in octal, in quotes")] = (
        Field("0660", description="Its permissions; who may write to it is believed.")
    )


class FileTimeProgress(_Polled):
    """A file whose modification time is the time."""

    type: Annotated[Literal["file_time"], Kind("TYPE", "file_time")]
    path: AnyPath = Field(description="The file (or directory).")


class FileProgress(_Polled):
    """A file whose last line that is not empty is the time."""

    type: Annotated[Literal["file"], Kind("TYPE", "file")]
    path: AnyPath = Field(description="The file; its last 64 KiB are read.")
    key: Key | None = Field(None, description=KEY_MEANING)


class MetricProgress(_Polled):
    """A metric of a local exporter, in seconds since 1970."""

    type: Annotated[Literal["metric"], Kind("TYPE", "metric")]
    url: CheckUrl = Field(description="The exporter's page of metrics, at most 4 MiB.")
    metric: Annotated[
        str, Field(pattern=r"^[a-zA-Z_:][a-zA-Z0-9_:]{0,255}$"), Kind("NAME", "name of a sample")
    ] = Field(description="The sample's name, as the page has it.")
    labels: Annotated[
        dict[str, str], Field(max_length=32), Kind("TABLE", "table of strings, at most 32")
    ] = Field(
        default_factory=dict,
        description="Labels that the sample must have, beside any others; exactly one may fit."
        " Not set: any.",
    )


class MqttProgress(_Source):
    """An MQTT topic whose messages are times."""

    type: Annotated[Literal["mqtt"], Kind("TYPE", "mqtt")]
    broker: Annotated[str, AfterValidator(_broker), Kind("URL", "mqtt or mqtts URL")] = Field(
        description="mqtt://HOST:PORT, or mqtts:// for TLS. Without PORT: 1883, with TLS 8883."
    )
    topic: Annotated[
        str, Field(min_length=1, max_length=1024), AfterValidator(_topic), Kind("TOPIC", "topic")
    ] = Field(description="The topic; a retained message counts.")
    key: Key | None = Field(None, description=KEY_MEANING)
    limit: Limit = Field(
        5.0, description="How long the broker may take to answer. It may be far away, and busy."
    )
    username: Text | None = Field(None, description="User name. Not set: none.")
    password_file: SecretFile | None = Field(
        None, description="File with that user's password. Not set: none."
    )
    ca_file: InputFile | None = Field(
        None, description="Certificates (PEM) to trust the broker by. Not set: the system's."
    )

    @property
    def tls(self) -> bool:
        """Whether the broker is talked to by TLS."""
        return urlsplit(self.broker).scheme == "mqtts"

    @property
    def address(self) -> Address:
        """Where the broker is."""
        parts = urlsplit(self.broker)
        return Address(parts.hostname or "", parts.port or (MQTTS_PORT if self.tls else MQTT_PORT))

    def _contradictions(self) -> Iterator[tuple[str, str]]:
        if self.password_file is not None and self.username is None:
            yield "password_file", "needs username too"
        if self.ca_file is not None and not self.tls:
            yield "ca_file", "is for a broker with TLS: use mqtts://, or leave it out"
        if self.password_file is not None and not self.tls and not is_loopback(self.address.host):
            yield "broker", f"{self.broker} would carry the password unencrypted: use mqtts://"


class CommandProgress(_Polled):
    """A command that prints the time."""

    type: Annotated[Literal["command"], Kind("TYPE", "command")]
    command: Annotated[
        Argv, AfterValidator(_command), Kind("COMMAND", "command: list of strings")
    ] = Field(
        description="An absolute path and its arguments; no shell. Exits with 0, and the last line"
        " of its output is the time. At its limit its process group is killed."
    )


ProgressSource: TypeAlias = (
    SocketProgress
    | FileTimeProgress
    | FileProgress
    | MetricProgress
    | MqttProgress
    | CommandProgress
)

TYPES: Mapping[str, type[_Source]] = {
    "socket": SocketProgress,
    "file_time": FileTimeProgress,
    "file": FileProgress,
    "metric": MetricProgress,
    "mqtt": MqttProgress,
    "command": CommandProgress,
}

EXAMPLES: tuple[Mapping[str, Any], ...] = (
    {"type": "socket", "path": "/run/failover-agent/progress.sock", "mode": "0660"},
    {"type": "file_time", "path": "/var/spool/collector/last", "interval": 1},
    {"type": "file", "path": "/var/lib/collector/state.json", "key": "output.written_until"},
    {
        "type": "metric",
        "url": "http://127.0.0.1:9105/metrics",
        "metric": "collector_last_processed_timestamp_seconds",
        "labels": {"line": "7"},
    },
    {
        "type": "mqtt",
        "broker": "mqtts://broker.example:8883",
        "topic": "plant/line7/processed",
        "key": "time",
        "username": "failover",
        "password_file": "/etc/failover-agent/mqtt-password",
        "ca_file": "/etc/failover-agent/mqtt-ca.pem",
    },
    {"type": "command", "command": ["/usr/local/bin/last-processed", "--utc"], "limit": 5},
)


def _read(value: object) -> ProgressSource | None:
    """The source of a table, or of the same as JSON (from a flag or a variable).

    Raises:
        ValueError: it is no table; TablesError if something in it is wrong.
    """
    if value is None or isinstance(value, _Source):
        return value  # type: ignore[return-value] # no other class is made of the base
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"must be a table in JSON, but: {error}") from None
    if not isinstance(value, Mapping):
        raise ValueError("must be a table, under [progress]")  # noqa: TRY004 - for pydantic
    kind = value.get("type")
    model = TYPES.get(kind) if isinstance(kind, str) else None
    if model is None:
        said = f"progress: type = {_shown(kind)}" if "type" in value else "progress: type"
        raise TablesError([f"{said}: must be one of {', '.join(TYPES)}"], unknown_key=False)
    try:
        return model.model_validate(value)  # type: ignore[return-value] # as above
    except ValidationError as error:
        faults = dict(_faults(error, model, str(kind)))
        unknown = any(key not in model.model_fields for key in faults if key)
        raise TablesError(
            [f"progress: {text}" for text in faults.values()], unknown_key=unknown
        ) from None


def _faults(error: ValidationError, model: type[_Source], kind: str) -> Iterator[tuple[str, str]]:
    """Keys and a sentence on each, unknown keys first."""
    found = error.errors(include_url=False)
    for fault in sorted(found, key=lambda fault: fault["type"] != "extra_forbidden"):
        key = str(fault["loc"][0]) if fault["loc"] else ""
        told = fault.get("ctx", {}).get("error")
        text = str(told) if told else fault["msg"].replace("Input should", "must")
        match fault["type"]:
            case "extra_forbidden":
                keys = list(model.model_fields)
                close = difflib.get_close_matches(key, keys, n=1)
                right = f"did you mean {close[0]}?" if close else f"it has {', '.join(keys)}"
                yield key, f"a source of type {kind} has no key {_shown(key)}: {right}"
            case "missing":
                yield key, f"{key}: is missing, and a source of type {kind} needs it"
            case "path_type":
                yield key, f"{key} = {_shown(fault['input'])}: must be a path, as a string"
            case _ if not key:  # a relation names its key itself
                yield key, text
            case _:
                yield key, f"{key} = {_shown(fault['input'])}: {text}"


def _shown(value: object) -> str:
    text = re.sub(r"//[^/@\s]*@", "//***@", repr(value))
    return text if len(text) <= LONGEST_SHOWN else text[: LONGEST_SHOWN - 3] + "..."


def _dump(source: ProgressSource | None) -> dict[str, Any] | None:
    return None if source is None else source.model_dump(mode="json", exclude_none=True)


ProgressTable = Annotated[
    ProgressSource | None,
    PlainValidator(_read),
    PlainSerializer(_dump),
    Kind("JSON", "table [progress]"),
]
