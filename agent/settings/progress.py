"""The ``[progress]`` table: where the data-processed time comes from, beside the local HTTP call.

Owns what each kind of source may be told, and naming key and right value in a refusal. Refuses to
know how a source is read (drivers/progress) and whether its command can be run (drivers/hooks.py).
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import AfterValidator, Field, PlainSerializer, PlainValidator

from agent.settings import values
from agent.settings.checks import SHORTEST_INTERVAL_S, CheckUrl, TablesError
from agent.settings.forms import AnyPath, Argv, Duration, DurationOrZero, Kind
from agent.settings.mqtt import BrokerForm, Topic
from agent.settings.tables import Table, as_table, read_table, shown
from agent.settings.values import DEFAULT_MAX_FUTURE_S

LONGEST_SOCKET_PATH = 107
"""Bytes; the kernel's address has 108 with the closing NUL (unix(7))."""


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


Key = Annotated[
    str, Field(max_length=256), AfterValidator(_key), Kind("KEY", "names with dots between")
]
Limit = Annotated[Duration, Kind("DURATION", "duration, more than 0 s to 24 d")]
KEY_MEANING = "Where in it the time is, if it is JSON. Not set: it is the time itself."


class SourceForm(Table):
    """What every source has. Durations are seconds."""

    max_future: DurationOrZero = Field(
        DEFAULT_MAX_FUTURE_S,
        description="How far ahead of this host's clock a time may be; what is further is refused"
        " and counted. Counts for POST /data-processed too.",
    )


class _Polled(SourceForm):
    """What every source has that is asked, rather than tells."""

    interval: Annotated[
        Duration, Field(ge=SHORTEST_INTERVAL_S), Kind("DURATION", "duration, 0.05 s to 24 d")
    ] = Field(1.0, description="Time from the end of one reading to the start of the next.")
    limit: Limit = Field(1.0, description="How long one reading may take.")


class SocketProgressForm(SourceForm):
    """A Unix socket that the agent makes; each line, or datagram, is a time."""

    plain: ClassVar = values.SocketProgress

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


class FileTimeProgressForm(_Polled):
    """A file whose modification time is the time."""

    plain: ClassVar = values.FileTimeProgress

    type: Annotated[Literal["file_time"], Kind("TYPE", "file_time")]
    path: AnyPath = Field(description="The file (or directory).")


class FileProgressForm(_Polled):
    """A file whose last line that is not empty is the time."""

    plain: ClassVar = values.FileProgress

    type: Annotated[Literal["file"], Kind("TYPE", "file")]
    path: AnyPath = Field(description="The file; its last 64 KiB are read.")
    key: Key | None = Field(None, description=KEY_MEANING)


class MetricProgressForm(_Polled):
    """A metric of a local exporter, in seconds since 1970."""

    plain: ClassVar = values.MetricProgress

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


class MqttProgressForm(BrokerForm, SourceForm):
    """An MQTT topic whose messages are times."""

    plain: ClassVar = values.MqttProgress

    type: Annotated[Literal["mqtt"], Kind("TYPE", "mqtt")]
    topic: Topic = Field(description="The topic; a retained message counts.")
    key: Key | None = Field(None, description=KEY_MEANING)


class CommandProgressForm(_Polled):
    """A command that prints the time."""

    plain: ClassVar = values.CommandProgress

    type: Annotated[Literal["command"], Kind("TYPE", "command")]
    command: Annotated[
        Argv, AfterValidator(_command), Kind("COMMAND", "command: list of strings")
    ] = Field(
        description="An absolute path and its arguments; no shell. Exits with 0, and the last line"
        " of its output is the time. At its limit its process group is killed."
    )


AnySourceForm: TypeAlias = (
    SocketProgressForm
    | FileTimeProgressForm
    | FileProgressForm
    | MetricProgressForm
    | MqttProgressForm
    | CommandProgressForm
)

TYPES: Mapping[str, type[SourceForm]] = {
    "socket": SocketProgressForm,
    "file_time": FileTimeProgressForm,
    "file": FileProgressForm,
    "metric": MetricProgressForm,
    "mqtt": MqttProgressForm,
    "command": CommandProgressForm,
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


def _read(value: object) -> AnySourceForm | None:
    """The source of a table, or of the same as JSON (from a flag or a variable).

    Raises:
        ValueError: it is no table; TablesError if something in it is wrong.
    """
    if value is None or isinstance(value, SourceForm):
        return value  # type: ignore[return-value] # no other class is made of the base
    table = as_table(value, "progress")
    kind = table.get("type")
    model = TYPES.get(kind) if isinstance(kind, str) else None
    if model is None:
        said = f"progress: type = {shown(kind)}" if "type" in table else "progress: type"
        raise TablesError([f"{said}: must be one of {', '.join(TYPES)}"], unknown_key=False)
    source: AnySourceForm = read_table(table, model, "progress", f"a source of type {kind}")
    return source


def _dump(source: AnySourceForm | None) -> dict[str, Any] | None:
    return None if source is None else source.model_dump(mode="json", exclude_none=True)


ProgressTable = Annotated[
    AnySourceForm | None,
    PlainValidator(_read),
    PlainSerializer(_dump),
    Kind("JSON", "table [progress]"),
]
