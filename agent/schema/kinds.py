"""The keys that every ``[[check]]`` and every ``[progress]`` table has, and the registry of their kinds.

A kind's class declares its keys as a setting is declared (fields.py), and its file in drivers/checks or
drivers/progress implements it; the registry has one line for each. Durations are seconds.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from agent.schema.fields import DefaultFrom, Format, Range, Table, TableKinds
from agent.schema.formats import (
    Count,
    Duration,
    DurationOrZero,
    Interval,
    Number,
    matches,
    must,
    sized,
)

DEFAULT_LIMIT_S = 2.0

_check_name = must("be 1 to 64 of the characters a-z, 0-9, _ and -", matches(r"[a-z0-9_-]{1,64}"))


def _default_limit(table: Mapping[str, Any]) -> float:
    return min(DEFAULT_LIMIT_S, float(table.get("interval", DEFAULT_LIMIT_S)))


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckSettings(Table):
    """One health check."""

    name: Annotated[str, Format("NAME", "1 to 64 of a-z, 0-9, _ and -", check=_check_name)]
    """Its name in the log and in the reason of a lost role. Unique."""
    interval: Interval = 5.0
    """Time from one run's start to the next one's."""
    limit: Annotated[Duration, DefaultFrom(_default_limit)]
    """How long a run may take before it counts as failed; at most interval. Not set: 2 s, or
    interval if that is less."""
    rise: Annotated[Count, Range(1, 100)] = 2
    """Successes in a row that make a check pass again."""
    fall: Annotated[Count, Range(1, 100)] = 3
    """Failures in a row that make it fail. The first run alone decides a start."""
    weight: Annotated[Number, Range(0, 1000, above=True)] = 1.0
    """Its weight in the score, relative to the other checks'."""
    required: bool = False
    """While it fails this member does not become or stay primary, whatever the others report."""
    scope: Literal["always", "primary"] = "always"
    """primary: run only while this member is primary, and counted as passing otherwise: for a
    workload that does not run on a secondary."""
    type: str

    def contradictions(self) -> Iterator[tuple[str, str]]:
        if self.limit > self.interval:
            yield "limit", f"must be at most interval, which is {self.interval:g} s"


DEFAULT_MAX_FUTURE_S = 5.0
"""Also the bound without a table [progress]. Clocks that NTP adjusts are within milliseconds of each other, and
a time that is further ahead would hide every later one of the tenure."""

MaxFuture = Annotated[
    DurationOrZero,
    "How far ahead of this host's clock a time may be; what is further is refused and counted. Counts"
    " for POST /data-processed too.",
]

_check_key: Callable[[str], str] = must(
    'be names, or numbers in lists, with dots between ("status.items.0")',
    lambda key: all(key.split(".")),
    first=sized(1, 256),
)
JsonKey = Annotated[
    str,
    Format("KEY", "names with dots between", check=_check_key),
    "Where in it the time is, if it is JSON. Not set: it is the time itself.",
]


class ProgressSource(Table):
    """One source. Its class is a dataclass with at least these fields."""

    __slots__ = ()

    type: str
    max_future: float


CHECKS = TableKinds(
    "check",
    "a check",
    {
        "exec": "agent.drivers.checks.command:ExecCheck",
        "http": "agent.drivers.checks.http:HttpCheck",
        "tcp": "agent.drivers.checks.tcp:TcpCheck",
        "file_age": "agent.drivers.checks.file_age:FileAgeCheck",
        "process": "agent.drivers.checks.process:ProcessCheck",
        "prometheus": "agent.drivers.checks.prometheus:PrometheusCheck",
    },
    most=64,  # each is a task that runs every few seconds; what matters on a host fits into fewer
)

PROGRESS = TableKinds(
    "progress",
    "a source",
    {
        "socket": "agent.drivers.progress.unix_socket:SocketProgress",
        "file_time": "agent.drivers.progress.file:FileTimeProgress",
        "file": "agent.drivers.progress.file:FileProgress",
        "metric": "agent.drivers.progress.metric:MetricProgress",
        "mqtt": "agent.drivers.progress.mqtt:MqttProgress",
        "command": "agent.drivers.progress.command:CommandProgress",
    },
)

MQTT = TableKinds("mqtt", "the table [mqtt]", {"": "agent.schema.mqtt:Mqtt"})
