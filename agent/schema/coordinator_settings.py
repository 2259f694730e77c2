"""Every setting of the coordinator, declared as in settings.py. Durations are seconds."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from agent.errors import ConfigError
from agent.schema.addresses import Address, is_exposed
from agent.schema.fields import RELOADABLE, Example, Range, Settings
from agent.schema.formats import (
    ADDRESS,
    DURATION,
    NUMBER,
    AnyPath,
    BaseUrl,
    BaseUrls,
    Count,
    DurationOrZero,
    HostNames,
    Identities,
    InputFile,
    KeyPrefix,
    Number,
    SecretFile,
    SecureUrl,
    Text,
)
from agent.schema.settings import LogFormat, LogLevel

AUTHENTICATION = "users_file, token_keys_file, token_keys_url or tls_client_ca_file"

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
    host_names: Annotated[HostNames, Example(["coordinator.example"])] = ()
    """Names by which a coordinator on loopback is asked, beside localhost: those that a proxy on this
    machine passes on in the header Host. Any other is answered 403, since a web page may have brought
    it there (DNS rebinding). The flag may be repeated; the variable separates by commas. Not set:
    none."""
    data_dir: Annotated[AnyPath, Example("/var/lib/failover-agent")] = field(
        default_factory=_own_data_dir
    )
    """Directory of the database; one coordinator at a time. Not set: $STATE_DIRECTORY (systemd),
    else /var/lib/failover-agent for root, else failover-agent in $XDG_STATE_HOME or
    ~/.local/state."""
    store: Literal["sqlite", "memory", "etcd"] = "sqlite"
    """Where groups, holders and epochs are kept: sqlite survives a restart and a crash; memory
    forgets everything and is for trials; etcd is for several coordinators."""
    etcd_endpoint: Annotated[BaseUrls, Example(["https://etcd-1.example:2379"])] = ()
    """Client URLs of the members of one etcd cluster, 3.4 or later. The flag may be repeated; the
    variable separates by commas. Not set: no etcd."""
    etcd_prefix: KeyPrefix = "/failover-agent"
    """Prefix of all keys in etcd. Coordinators with the same one are one cluster."""
    etcd_ca_file: InputFile | None = None
    """CA certificates (PEM) that etcd's are verified with. Not set: those of the system."""
    etcd_certificate: InputFile | None = None
    """Client certificate (PEM) for etcd. Not set: none."""
    etcd_key: SecretFile | None = None
    """That certificate's private key (PEM). Not set: none."""
    etcd_username: Annotated[Text | None, Example("failover")] = None
    """User of etcd, if its authentication is enabled. Not set: no login."""
    etcd_password_file: SecretFile | None = None
    """File with that user's password. Not set: no login."""
    advertise: Annotated[BaseUrl | None, Example("https://coordinator-1.example:5470")] = None
    """Where the other coordinators reach this one. Not set: it is alone, without etcd."""
    peer_ca_file: InputFile | None = None
    """CA certificates (PEM) that other coordinators' are verified with. Not set: the system's."""
    shards: Annotated[Count, Range(1, 1024)] = 8
    """Parts into which the groups in etcd are divided, each led by one coordinator. Fixed when the
    store is made. 8: enough for a few coordinators to share the work evenly."""
    leadership_ttl: Annotated[float, DURATION, Range(1, 60)] = 3.0
    """How long a coordinator that has died keeps its shards from the others. 3 s: outlasts an
    election of etcd, and is shorter than what agents with a failover timeout of 10 s can bear."""
    role_form: Literal["number", "name"] = "number"
    """How roles are written: as a number, as the cloud's API does, or as a name, as the
    on-premises API does. Both are read."""
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
    """Maximum number of connections from one address (of IPv6: from one /64). At this limit the
    oldest one that has not authenticated is closed; if all have, a further one is answered 503.
    2000: a thousand agents behind one NAT or proxy; raise it for more."""
    metrics_listen: Annotated[Address | None, ADDRESS, Example("127.0.0.1:5471")] = None
    """Address that serves /metrics, /healthz and /readyz alone, over plain HTTP and without
    authentication: keep it on loopback or in a network of your own. Not set: they are served with
    the API; else /metrics is not."""
    max_groups: Annotated[Count, Range(1, 10_000_000)] = 100000
    """Maximum number of groups. All are in memory: 100000 take some hundred megabytes."""
    max_sessions_per_group: Annotated[Count, Range(1, 10_000)] = 100
    """Maximum number of sessions in one group. A group usually has 2; 100 stops a client that
    creates a new id at each start. In a full group the longest inactive session gives way."""
    dead_session_retention: Annotated[float, DURATION, Range(0, 315_360_000)] = 604_800.0
    """A session without heartbeats for longer than this, and than ten FailoverTimeouts, is removed.
    7 days: a host that is repaired within a week keeps what is known of it."""
    session_metrics: bool = False
    """Whether /metrics has series for each session too: its role, score and last heartbeat. They
    are 5 a session, and show its id to everybody who can scrape."""
    tls_certificate: Annotated[InputFile | None, RELOADABLE] = None
    """Certificate chain (PEM) to serve HTTPS with. Not set: plain HTTP."""
    tls_key: Annotated[SecretFile | None, RELOADABLE] = None
    """That certificate's private key (PEM). Not set: plain HTTP."""
    tls_client_ca_file: Annotated[InputFile | None, RELOADABLE] = None
    """Certificates (PEM) of the authorities whose client certificates are accepted: each is the client
    of the first URI, else DNS name, else common name in it. Not set: no client certificates."""
    tls_client_certificates: Literal["optional", "required"] = "optional"
    """Whether a connection needs such a certificate, also for /healthz and /metrics. In both cases an
    Authorization header decides who calls; without one, the certificate does."""
    users_file: Annotated[SecretFile | None, RELOADABLE] = None
    """Users and password hashes for Basic authentication. Not set: no Basic."""
    token_issuer: Annotated[Text | None, Example("https://identity.example"), RELOADABLE] = None
    """Issuer (iss) that a bearer token must have. Not set: tokens are not accepted."""
    token_audience: Annotated[Text | None, Example("failover"), RELOADABLE] = None
    """Audience (aud) that a bearer token must have. Not set: tokens are not accepted."""
    token_keys_file: Annotated[InputFile | None, RELOADABLE] = None
    """Public keys (JWKS) that tokens are verified with. Not set: those of token_keys_url."""
    token_keys_url: Annotated[SecureUrl | None, Example("https://identity.example/jwks")] = None
    """URL to fetch these keys from, every 5 minutes, and for a token with an unknown key. In an outage
    the last keys stay in force for a day. Not set: those of token_keys_file."""
    token_tenant: Annotated[Text | None, Example("3f1c"), RELOADABLE] = None
    """Tenant (tid) whose tokens may use the on-premises paths, which stand for the tenant default. Not
    set: tokens of every tenant may."""
    administrator: Annotated[Identities, Example(["user:ops"]), RELOADABLE] = ()
    """Identities that may always manage access, and alone may make the first access-control list. The
    flag may be repeated; the variable separates by commas. Not set: existing lists decide, and no
    first one can be made."""
    insecure: bool = False
    """Serve beyond this machine without TLS or without authentication. Everybody who can reach the
    port can then decide who is primary."""
    log_level: LogLevel = "INFO"
    log_format: LogFormat = "text"

    @property
    def authenticates(self) -> bool:
        """Whether callers have to be known."""
        ways = (self.users_file, self.tls_client_ca_file)
        return self.takes_tokens or any(way is not None for way in ways)

    @property
    def takes_tokens(self) -> bool:
        """Whether bearer tokens are accepted."""
        return self.token_keys_file is not None or self.token_keys_url is not None

    def contradictions(self) -> Iterator[tuple[str, str]]:
        yield from self.set_together("tls_certificate", "tls_key")
        yield from self._authentication_contradictions()
        yield from self._etcd_contradictions()
        if self.metrics_listen == self.listen and self.listen.port:
            yield "metrics_listen", f"{self.listen} is also listen: choose another port"
        if self.listen.loopback or self.insecure:
            return
        missing = []
        if self.tls_certificate is None:
            missing.append("TLS (tls_certificate and tls_key)")
        if not self.authenticates:
            missing.append(f"authentication ({AUTHENTICATION})")
        if missing:
            yield (
                "listen",
                f"{self.listen} can be reached from other machines without {' and '.join(missing)}:"
                " add that, listen on 127.0.0.1, or set insecure = true (--insecure)",
            )

    def _authentication_contradictions(self) -> Iterator[tuple[str, str]]:
        keys = "token_keys_url" if self.token_keys_url is not None else "token_keys_file"
        yield from self.set_together(keys, "token_issuer", "token_audience")
        if self.token_keys_url is not None and self.token_keys_file is not None:
            yield (
                "token_keys_url",
                "cannot be used together with token_keys_file: keep one of the two",
            )
        yield from self.needs("tls_client_ca_file", "tls_certificate", "tls_key")
        if self.tls_client_certificates == "required" and self.tls_client_ca_file is None:
            yield "tls_client_certificates", "needs tls_client_ca_file too"
        if self.token_tenant is not None and not self.takes_tokens:
            yield "token_tenant", "needs token_keys_file or token_keys_url too"
        if self.administrator and not self.authenticates:
            yield "administrator", f"needs authentication ({AUTHENTICATION})"

    def _etcd_contradictions(self) -> Iterator[tuple[str, str]]:
        yield from self.set_together("etcd_certificate", "etcd_key")
        yield from self.set_together("etcd_username", "etcd_password_file")
        if self.store == "etcd":
            if self.tls_client_certificates == "required":
                yield (
                    "tls_client_certificates",
                    'cannot be "required" with store = "etcd": the other coordinators have none; with'
                    ' "optional" a caller without one needs other credentials',
                )
            for name in ("etcd_endpoint", "advertise"):
                if not getattr(self, name):
                    yield "store", f"etcd needs {name} too"
        elif self.etcd_endpoint:
            yield "etcd_endpoint", f'needs store = "etcd", and store is "{self.store}"'
        given = [("etcd_endpoint", url) for url in self.etcd_endpoint]
        given += [("advertise", self.advertise)] if self.advertise is not None else []
        for key, url in given:
            if is_exposed(url) and not self.insecure:
                right = "use https, or set insecure = true"
                yield key, f"{url} carries roles and credentials unencrypted: {right}"
