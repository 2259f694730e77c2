"""Every setting of the coordinator, declared as in settings.py. Durations are seconds."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from agent.errors import ConfigError
from agent.schema.addresses import Address
from agent.schema.fields import RELOADABLE, Example, Range, Settings
from agent.schema.formats import (
    ADDRESS,
    NUMBER,
    AnyPath,
    Count,
    DurationOrZero,
    InputFile,
    Number,
    SecretFile,
    Text,
)
from agent.schema.settings import LogFormat, LogLevel

DEFAULT_LISTEN = Address("127.0.0.1", 5470)


def default_data_dir(environ: Mapping[str, str], *, root: bool) -> Path:
    """The default place of a coordinator's data: systemd's choice, the system's, or the user's.

    Raises:
        ConfigError: there is no such place.
    """
    if given := environ.get("STATE_DIRECTORY", "").split(":")[0]:
        return Path(given)
    if root:
        return Path("/var/lib/failover-agent")
    if (xdg := environ.get("XDG_STATE_HOME", "")).startswith("/"):
        return Path(xdg, "failover-agent")
    try:
        return Path.home() / ".local/state/failover-agent"
    except RuntimeError:
        raise ConfigError(
            "data_dir: this user has no home directory to default to:"
            " set --data-dir, FAILOVER_COORDINATOR_DATA_DIR or data_dir in a file"
        ) from None


def _own_data_dir() -> Path:
    return default_data_dir(os.environ, root=os.geteuid() == 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class CoordinatorSettings(Settings):
    """The settings of ``failover-agent serve``."""

    env_prefix: ClassVar[str] = "FAILOVER_COORDINATOR_"

    listen: Annotated[Address, ADDRESS] = DEFAULT_LISTEN
    """Address of the API. The default can be reached from this machine only: anything else needs
    TLS and authentication, or insecure. Port 0 takes a free one."""
    data_dir: Annotated[AnyPath, Example("/var/lib/failover-agent")] = field(
        default_factory=_own_data_dir
    )
    """Directory of the database; one coordinator at a time. Not set: $STATE_DIRECTORY (systemd),
    else /var/lib/failover-agent for root, else failover-agent in $XDG_STATE_HOME or
    ~/.local/state."""
    store: Literal["sqlite", "memory"] = "sqlite"
    """Where groups, holders and epochs are kept: sqlite survives a restart and a crash; memory
    forgets everything and is for trials."""
    role_form: Literal["number", "name"] = "number"
    """How roles are written: number as the cloud's API documents, name as the on-premises one.
    Both are read."""
    score_hysteresis: Annotated[Number, Range(0, 100)] = 10.0
    """A live primary with a lower score is replaced only if the other's is higher by more than
    this. 10: one stream of ten that comes and goes changes nothing; 0 is strict v1 behaviour."""
    minimum_hold: DurationOrZero = 30.0
    """A live primary is not replaced for a better score earlier than this after it became primary.
    30 s: a swap costs a gap, so two in a minute are the most; 0 is strict v1 behaviour."""
    max_body_bytes: Annotated[
        int, replace(NUMBER, metavar="BYTES", noun="bytes"), Range(1024, 16 * 1024 * 1024)
    ] = 65536
    """Maximum size of a request's body; a larger one is answered 413. 64 KiB holds a group with
    plenty of AdditionalData."""
    max_connections_per_address: Annotated[Count, Range(10, 1_000_000)] = 2000
    """Maximum number of connections from one address (of IPv6: from one /64). At it the oldest one
    that has not authenticated is closed; if all have, a further one is answered 503. 2000: a
    thousand agents behind one NAT or proxy; raise it for more."""
    metrics_listen: Annotated[Address | None, ADDRESS, Example("127.0.0.1:5471")] = None
    """Address that serves /metrics, /healthz and /readyz alone, over plain HTTP and without
    authentication: keep it on loopback or in a network of your own. Not set: they are served with
    the API; else /metrics is not."""
    max_groups: Annotated[Count, Range(1, 10_000_000)] = 100000
    """Maximum number of groups. All are in memory: 100000 take some hundred megabytes."""
    max_sessions_per_group: Annotated[Count, Range(1, 10_000)] = 100
    """Maximum number of sessions in one group. A group usually has 2; 100 stops a client that
    creates a new id at each start."""
    session_metrics: bool = False
    """Whether /metrics has series for each session too: its role, score and last heartbeat. They
    are 5 a session, and show its id to everybody who can scrape."""
    tls_certificate: Annotated[
        InputFile | None, Example("/etc/failover-agent/tls.crt"), RELOADABLE
    ] = None
    """Certificate chain (PEM) to serve HTTPS with. Not set: plain HTTP."""
    tls_key: Annotated[SecretFile | None, Example("/etc/failover-agent/tls.key"), RELOADABLE] = None
    """That certificate's private key (PEM). Not set: plain HTTP."""
    users_file: Annotated[SecretFile | None, Example("/etc/failover-agent/users"), RELOADABLE] = (
        None
    )
    """Users and password hashes for Basic authentication. Not set: no Basic."""
    token_issuer: Annotated[Text | None, Example("https://identity.example"), RELOADABLE] = None
    """Issuer (iss) that a bearer token must have. Not set: tokens are not accepted."""
    token_audience: Annotated[Text | None, Example("failover"), RELOADABLE] = None
    """Audience (aud) that a bearer token must have. Not set: tokens are not accepted."""
    token_keys_file: Annotated[
        InputFile | None, Example("/etc/failover-agent/jwks.json"), RELOADABLE
    ] = None
    """Public keys (JWKS) that tokens are verified with. Not set: tokens are not accepted."""
    insecure: bool = False
    """Serve beyond this machine without TLS or without authentication. Everybody who can reach the
    port can then decide who is primary."""
    log_level: LogLevel = "INFO"
    log_format: LogFormat = "text"

    def contradictions(self) -> Iterator[tuple[str, str]]:
        yield from self.set_together("tls_certificate", "tls_key")
        yield from self.set_together("token_keys_file", "token_issuer", "token_audience")
        if self.metrics_listen == self.listen and self.listen.port:
            yield "metrics_listen", f"{self.listen} is also listen: choose another port"
        if self.listen.loopback or self.insecure:
            return
        missing = []
        if self.tls_certificate is None:
            missing.append("TLS (tls_certificate and tls_key)")
        if self.users_file is None and self.token_keys_file is None:
            missing.append("authentication (users_file or token_keys_file)")
        if missing:
            yield (
                "listen",
                f"{self.listen} can be reached from other machines without {' and '.join(missing)}:"
                " add that, listen on 127.0.0.1, or set insecure = true (--insecure)",
            )
