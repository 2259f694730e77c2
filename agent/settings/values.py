"""What an agent is told, once it has been checked: plain values, without what reads them.

An agent runs for months and is told its settings once, so it does not keep pydantic in memory for
them: another process reads and checks them (cli/apart.py), and these values are what comes back. The
keys, their forms, ranges and reasons are in the forms (models.py, checks.py, progress.py, mqtt.py),
each of which names its value here; the tests compare the two. Durations are seconds. Nothing here
checks anything.
"""

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias
from urllib.parse import urlsplit

from agent.core.timing import Budget, Timing, plan
from agent.errors import ConfigError

LONGEST_SECRET = 4096
"""Bytes of a file with a password: a longer one is another file, named by mistake."""

DEFAULT_MAX_FUTURE_S = 5.0
"""The bound when there is no table [progress]: clocks that NTP keeps are within milliseconds of each
other, and a time that is further ahead would hide every later one of the tenure."""

MQTT_PORT = 1883
MQTTS_PORT = 8883

LogLevel = Literal["DEBUG", "INFO", "WARNING", "ERROR"]
LogFormat = Literal["text", "json"]
RestartRule = Literal["on-failure", "always", "never"]
Scope = Literal["always", "primary"]
Comparison = Literal[">", ">=", "<", "<=", "==", "!="]
Protocol = Literal["5", "3.1.1"]
Payload = Literal["json", "sparkplug"]


class Address(NamedTuple):
    """Where to listen, or to connect to. Port 0 takes a free one."""

    host: str
    port: int

    def __str__(self) -> str:
        """HOST:PORT, with an IPv6 address in brackets."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def loopback(self) -> bool:
        """Only this machine can reach it."""
        return is_loopback(self.host)


def is_loopback(host: str) -> bool:
    """Whether a host, by address or as ``localhost``, is this machine only. Resolves no names."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def read_secret(path: Path) -> str:
    """The secret in a file, without the line's end.

    Raises:
        ConfigError: it cannot be read, is empty, too long or not text. The secret is not repeated.
    """
    try:
        with path.open("rb") as file:
            secret = file.read(LONGEST_SECRET + 1)
        text = secret.decode().rstrip("\r\n")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: must be text in UTF-8, and is not") from None
    if not text or len(secret) > LONGEST_SECRET or not text.isprintable():
        raise ConfigError(f"{path}: must be one line of 1 to {LONGEST_SECRET} bytes: the secret")
    return text


# --- health checks ------------------------------------------------------------------------------


class StatusRange(NamedTuple):
    """The statuses of HTTP that are good, both ends included."""

    least: int
    most: int

    def __str__(self) -> str:
        """As it is written in a file: ``200`` or ``200-399``."""
        return str(self.least) if self.least == self.most else f"{self.least}-{self.most}"


@dataclass(frozen=True, slots=True, kw_only=True)
class AnyCheck:
    """What every check has."""

    name: str
    interval: float
    limit: float
    rise: int
    fall: int
    weight: float
    required: bool
    scope: Scope


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecCheck(AnyCheck):
    """Passes if a command exits with 0."""

    type: Literal["exec"]
    command: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpCheck(AnyCheck):
    """Passes if a GET is answered with a good status."""

    type: Literal["http"]
    url: str
    status: StatusRange
    contains: str | None
    insecure_tls: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class TcpCheck(AnyCheck):
    """Passes if a connection is accepted."""

    type: Literal["tcp"]
    address: Address


@dataclass(frozen=True, slots=True, kw_only=True)
class FileAgeCheck(AnyCheck):
    """Passes if a file was written lately."""

    type: Literal["file_age"]
    path: Path
    max_age: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessCheck(AnyCheck):
    """Passes if a process runs."""

    type: Literal["process"]
    pid_file: Path | None
    process: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PrometheusCheck(AnyCheck):
    """Passes if a metric of an exporter compares as it should."""

    type: Literal["prometheus"]
    url: str
    metric: str
    labels: Mapping[str, str]
    op: Comparison
    value: float


Check: TypeAlias = ExecCheck | HttpCheck | TcpCheck | FileAgeCheck | ProcessCheck | PrometheusCheck


# --- brokers ------------------------------------------------------------------------------------


def is_tls(broker: str) -> bool:
    """Whether the broker of a URL is talked to by TLS."""
    return urlsplit(broker).scheme == "mqtts"


def broker_address(broker: str) -> Address:
    """Where the broker of a URL is."""
    parts = urlsplit(broker)
    return Address(
        parts.hostname or "", parts.port or (MQTTS_PORT if is_tls(broker) else MQTT_PORT)
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Broker:
    """What a connection to a broker needs."""

    broker: str
    limit: float
    keepalive: int
    protocol: Protocol
    username: str | None
    password_file: Path | None
    ca_file: Path | None
    certificate: Path | None

    @property
    def tls(self) -> bool:
        """Whether the broker is talked to by TLS."""
        return is_tls(self.broker)

    @property
    def address(self) -> Address:
        """Where the broker is."""
        return broker_address(self.broker)

    @property
    def private_key(self) -> Path | None:
        """The file of the certificate's private key; None if it is in the certificate's own."""
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Mqtt(Broker):
    """Announces role and epoch to a broker."""

    key: Path | None
    client_id: str | None
    payload: Payload
    topic_prefix: str
    sparkplug_host_id: str | None

    @property
    def private_key(self) -> Path | None:
        """As ``Broker`` says."""
        return self.key


# --- sources of the data-processed time ---------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class AnySource:
    """What every source has."""

    max_future: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PolledSource(AnySource):
    """What every source has that is asked, rather than tells."""

    interval: float
    limit: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SocketProgress(AnySource):
    """A Unix socket that the agent makes; each line, or datagram, is a time."""

    type: Literal["socket"]
    path: Path
    datagram: bool
    mode: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FileTimeProgress(PolledSource):
    """A file whose modification time is the time."""

    type: Literal["file_time"]
    path: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class FileProgress(PolledSource):
    """A file whose last line that is not empty is the time."""

    type: Literal["file"]
    path: Path
    key: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricProgress(PolledSource):
    """A metric of a local exporter, in seconds since 1970."""

    type: Literal["metric"]
    url: str
    metric: str
    labels: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class MqttProgress(Broker):
    """An MQTT topic whose messages are times."""

    type: Literal["mqtt"]
    max_future: float
    topic: str
    key: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandProgress(PolledSource):
    """A command that prints the time."""

    type: Literal["command"]
    command: tuple[str, ...]


ProgressSource: TypeAlias = (
    SocketProgress
    | FileTimeProgress
    | FileProgress
    | MetricProgress
    | MqttProgress
    | CommandProgress
)


# --- all of it ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentSettings:
    """What ``failover-agent run`` was told: the settings of docs/settings.md, by their names."""

    log_level: LogLevel
    log_format: LogFormat
    endpoint: tuple[str, ...]
    group: str
    group_name: str | None
    session_id: str | None
    session_name: str | None
    failover_timeout: float
    beat: float | None
    renew: float | None
    demote: float | None
    margin: float | None
    request_timeout: float | None
    failover_score: float
    hook_primary: tuple[str, ...]
    hook_pending_primary: tuple[str, ...]
    hook_secondary: tuple[str, ...]
    hook_joined: tuple[str, ...]
    hook_lost: tuple[str, ...]
    hook_left: tuple[str, ...]
    hook_limit: float
    hook_pending_primary_limit: float | None
    hook_primary_limit: float | None
    hook_notification_limit: float | None
    hook_retries: int
    hook_user: str | None
    hook_group: str | None
    hook_directory: Path
    hook_directories_writable: bool
    hook_environment: Mapping[str, str]
    webhook_secret_file: Path | None
    webhook_ca_file: Path | None
    workload: tuple[str, ...]
    workload_restart: RestartRule
    workload_forward_hup: bool
    fence_command: tuple[str, ...]
    watchdog_device: Path | None
    guard: bool
    state_file: Path | None
    probe_listen: Address | None
    startup_timeout: float
    cooldown: float
    cooldown_limit: float
    username: str | None
    password_file: Path | None
    client_id: str | None
    client_secret_file: Path | None
    token_endpoint: str | None
    ca_file: Path | None
    check: tuple[Check, ...]
    progress: ProgressSource | None
    mqtt: Mqtt | None
    max_behind: float | None

    def hook_limit_of(self, event: str) -> float:
        """How long the hook of an event may take, in seconds; a demotion's is the lease's (R4)."""
        own = {
            "pending_primary": self.hook_pending_primary_limit,
            "primary": self.hook_primary_limit,
        }.get(event, self.hook_notification_limit)
        return self.hook_limit if own is None else own

    @property
    def budget(self) -> Budget:
        """What was asked for of the parts of the lease."""
        return Budget(
            renew_s=self.renew,
            demote_s=self.demote,
            margin_s=self.margin,
            heartbeat_interval_s=self.beat,
            request_timeout_s=self.request_timeout,
        )

    @property
    def timing(self) -> Timing:
        """The division of ``failover_timeout``. Raises TimingError if R1 does not hold."""
        return plan(self.failover_timeout, self.budget)
