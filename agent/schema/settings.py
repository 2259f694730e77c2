"""Every setting of the agent: its name, format, range, default, reason, and whether a reload changes it.

The agent runs for months and reads its settings once, so nothing here imports pydantic: another process
reads and checks them (read.py), and an AgentSettings is what it sends back. Durations are seconds. How a
lease is divided (R1) is core/timing.py's; whether a hook can be run is drivers/hooks'.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar, Literal
from urllib.parse import urlsplit

from agent.core.timing import LONGEST_LEASE_S, SHORTEST_LEASE_S, Budget, Timing, plan
from agent.schema.addresses import Address, is_loopback
from agent.schema.fields import RELOADABLE, Example, Range, Settings
from agent.schema.formats import (
    ADDRESS,
    ADDRESS_OR_OFF,
    DEFAULT_ENDPOINT,
    DURATION,
    LEVEL,
    Account,
    AnyPath,
    ApiUrl,
    Command,
    Count,
    Directory,
    Duration,
    DurationOrZero,
    Endpoints,
    Hook,
    Id,
    InputFile,
    MemberUrl,
    Number,
    Program,
    ProxyUrl,
    SecretFile,
    Text,
    Variables,
)
from agent.schema.kinds import CHECKS, MQTT, PROGRESS, CheckSettings, ProgressSource
from agent.schema.mqtt import Mqtt

DEFAULT_PROBE_LISTEN = Address("127.0.0.1", 0)

MOST_RETRIES = 100
"""Each retry waits half a second: more retries would outlast any limit."""

LogLevel = Annotated[
    Literal["DEBUG", "INFO", "WARNING", "ERROR"],
    LEVEL,
    "The least serious log line that is written. Info has each change of role and no line per"
    " heartbeat.",
    RELOADABLE,
]
LogFormat = Annotated[
    Literal["text", "json"],
    "How a log line looks: text for people and the journal, json for collectors.",
    RELOADABLE,
]


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentSettings(Settings):
    """The settings of ``failover-agent run`` and ``exec``."""

    env_prefix: ClassVar[str] = "FAILOVER_AGENT_"

    endpoint: Endpoints = (DEFAULT_ENDPOINT,)
    """Base paths of ONE coordinator, or of one cluster, up to and with 'clientfailover'. The agent
    stays with the one that works, and asks the others when that fails or is slow. Never list two
    coordinators that know nothing of each other: answers from another store are refused (exit code
    27 at the start). The flag may be repeated; the variable separates by commas. The default is a
    coordinator on this machine with its own defaults."""
    group: Annotated[Id, Example("demo")] = ""
    """Id of the group to join; run needs it. The group is created if it does not exist."""
    group_name: Annotated[Text | None, Example("Line 7 collectors")] = None
    """Display name of the group, if this agent creates it. Not set: none."""
    session_id: Annotated[Id | None, Example("host-a")] = None
    """Id of this member, unique in its group and the same after a restart. Not set: the host's
    name, with -2, -3, ... where agents of this host have it already."""
    session_name: Annotated[Text | None, Example("Host A, rack 3")] = None
    """Display name of this member. Not set: the session id."""
    failover_timeout: Annotated[
        float, DURATION, Range(SHORTEST_LEASE_S, LONGEST_LEASE_S, enforced=False)
    ] = 10.0
    """L, how long a member's lease lasts after its last heartbeat; then another may be chosen. An
    existing group keeps its own. 10 s outlasts lost packets and short pauses of virtual machines,
    and leaves a demotion 2.5 s."""
    beat: Annotated[Duration | None, Example(2.0)] = None
    """Time between two heartbeats; 2 beats must fit into renew (R1). Not set: renew / 3, at most
    10 s, so that two may be lost."""
    renew: Annotated[Duration | None, Example(6.5)] = None
    """R, the renewal deadline: demotion starts after this long without renewal (R4). Not set: what
    demote and margin leave of L."""
    demote: Annotated[Duration | None, Example(2.5)] = None
    """D, the demotion budget: how long demotion may take before its processes are killed. Not set:
    a quarter of L."""
    margin: Annotated[Duration | None, Example(1.0)] = None
    """M, the margin for clock drift (1 % of L at least) and for scheduling. Not set: a tenth of
    L."""
    request_timeout: Annotated[Duration | None, Example(2.0)] = None
    """How long one request may take; under half of renew, so that a lost one can be repeated (R1).
    Not set: renew / 3, at most 10 s."""
    failover_score: Annotated[Number, Range(0, 100), RELOADABLE] = 100.0
    """How fit this member is (v1 FailoverScore, the share of active streams). The member with the
    highest score is chosen. 100: fully fit."""
    hook_primary: Annotated[
        Hook, Example(["/usr/local/bin/start-collector", "--active"]), RELOADABLE
    ] = ()
    """Starts the workload: a command (an absolute path and its arguments), one directory of
    scripts, or one URL (docs/hooks.md). A flag or variable is split as a shell would, or is a JSON
    list. Not set: none."""
    hook_pending_primary: Annotated[
        Hook, Example(["/etc/failover-agent/pending_primary.d"]), RELOADABLE
    ] = ()
    """Prepares the workload while the previous primary stops. Not set: none."""
    hook_secondary: Annotated[Hook, Example(["/usr/local/bin/stop-collector"]), RELOADABLE] = ()
    """Stops the workload. It also runs when the agent starts (R6), so it must do no harm when
    there is nothing to stop. Not set: none."""
    hook_joined: Annotated[Hook, Example(["http://127.0.0.1:9000/joined"]), RELOADABLE] = ()
    """Runs when this member has joined; advisory, as the next two: their failure is logged and
    delays nothing (R10). Not set: none."""
    hook_lost: Annotated[
        Hook, Example(["/usr/local/bin/raise-alarm", "role lost"]), RELOADABLE
    ] = ()
    """Runs when this member loses the role: no contact, a frozen process, its health. Not set:
    none."""
    hook_left: Annotated[Hook, Example(["http://127.0.0.1:9000/left"]), RELOADABLE] = ()
    """Runs when this member has left the group at its stop. Not set: none."""
    hook_limit: Annotated[Duration, RELOADABLE] = 30.0
    """How long a promotion hook may take before it is killed and counts as failed (a demotion has
    the time that demote gives). 30 s: most services start in less."""
    hook_pending_primary_limit: Annotated[Duration | None, Example(10), RELOADABLE] = None
    """The same for hook_pending_primary alone. Not set: hook_limit."""
    hook_primary_limit: Annotated[Duration | None, Example(60), RELOADABLE] = None
    """The same for hook_primary alone. Not set: hook_limit."""
    hook_notification_limit: Annotated[Duration | None, Example(5), RELOADABLE] = None
    """The same for each of hook_joined, hook_lost and hook_left. Not set: hook_limit."""
    hook_retries: Annotated[Count, Range(0, MOST_RETRIES), RELOADABLE] = 0
    """Retries of a failed step of a promotion hook, each half a second later, within hook_limit.
    0: the other member may be healthier."""
    hook_user: Annotated[Account | None, Example("collector"), RELOADABLE] = None
    """User that all hooks run as; the agent has to be root. Not set: the agent's."""
    hook_group: Annotated[Account | None, Example("collector"), RELOADABLE] = None
    """Group that all hooks run as; the agent has to be root. Not set: hook_user's."""
    hook_directory: Annotated[Directory, RELOADABLE] = Path("/")
    """Working directory of all hooks; absolute. The default is on every host and keeps no file
    system from being unmounted."""
    hook_directories_writable: Annotated[bool, RELOADABLE] = False
    """Whether directories on the way to a hook, a check or a fence command may be writable by
    others, as a Kubernetes ConfigMap volume is (mode 0777, mounted read-only). Whoever can write
    there decides what the agent runs."""
    hook_environment: Annotated[Variables, Example({"UNIT": "collector.service"}), RELOADABLE] = (
        field(default_factory=dict)
    )
    """Variables for all hooks, beside the documented ones. A flag or variable is NAME=VALUE words,
    or a JSON object. check-config prints them, so put no secret there. Not set: none."""
    webhook_secret_file: Annotated[SecretFile | None, RELOADABLE] = None
    """File with the secret that webhooks are signed with (docs/hooks.md). Not set: unsigned."""
    webhook_ca_file: Annotated[InputFile | None, RELOADABLE] = None
    """Certificates (PEM) to trust a webhook's server by. Not set: the system's."""
    workload: Annotated[Program, Example(["collector", "--active"])] = ()
    """A command that runs only while this member is primary, beside the hooks: after hook_primary,
    and stopped before hook_secondary (docs/exec.md). Not set: none."""
    workload_restart: Literal["on-failure", "always", "never"] = "on-failure"
    """When the workload is started again after it has ended by itself. If it is not, the agent
    stops, with the workload's exit code."""
    workload_forward_hup: Annotated[bool, RELOADABLE] = False
    """Whether SIGHUP, which has the agent read its configuration again, is passed on to the
    workload, too. Off: many programs end at SIGHUP. Other signals are passed on in any case
    (docs/exec.md)."""
    fence_command: Annotated[
        Command, Example(["/usr/local/bin/cut-power", "self"]), RELOADABLE
    ] = ()
    """Run when a demotion has failed and everything was killed, before the agent exits: to cut
    this host off by other means (R4). Not set: none."""
    watchdog_device: Annotated[AnyPath | None, Example("/dev/watchdog")] = None
    """The kernel's watchdog: fed while this member is primary and its event loop runs, so that a
    host on which even the guard is stuck is reset. Not set: none."""
    guard: bool = True
    """Whether a second small process demotes in the agent's place when the agent is frozen, hung
    or killed. Without it such an agent leaves its workload running."""
    state_file: Annotated[AnyPath | None, Example("/run/failover-agent/state.json")] = None
    """File with role and epoch for sidecars, replaced atomically. Not set: group.session.json in
    $RUNTIME_DIRECTORY (systemd), else in failover-agent under $XDG_RUNTIME_DIR, for root /run."""
    probe_listen: Annotated[Address | None, ADDRESS_OR_OFF] = DEFAULT_PROBE_LISTEN
    """Where probes and POST /data-processed are served; off switches it off. Port 0 takes a free
    port, so that several agents fit on one host; the log has it."""
    probe_tls_certificate: InputFile | None = None
    """Certificate chain (PEM) to serve probes by HTTPS with. Read again when it changes, as the next
    two files are. Not set: plain HTTP."""
    probe_tls_key: SecretFile | None = None
    """That certificate's private key (PEM). Not set: plain HTTP."""
    probe_username: Annotated[Text | None, Example("monitoring")] = None
    """User that probes, /metrics and POST /data-processed then ask for (Basic). Not set: none."""
    probe_password_file: SecretFile | None = None
    """File with that user's password. Not set: none."""
    startup_timeout: Annotated[DurationOrZero, RELOADABLE] = 60.0
    """Timeout for reaching a coordinator at the start; then the agent exits with an error code. 0
    tries for ever. 60 s outlasts the start of a coordinator beside it."""
    cooldown: Annotated[Duration, RELOADABLE] = 5.0
    """Wait after a failed promotion before this member may be chosen again, doubled each time. 5 s
    lets the other member try first (R8)."""
    cooldown_limit: Annotated[Duration, RELOADABLE] = 300.0
    """The longest such wait. 300 s: a repaired host is back within 5 minutes."""
    username: Annotated[Text | None, Example("collector")] = None
    """User name for Basic authentication. Not set: none."""
    password_file: SecretFile | None = None
    """File with that user's password. Not set: none."""
    client_id: Annotated[Text | None, Example("3f1c")] = None
    """Client id for OAuth 2 client credentials. Not set: none."""
    client_secret_file: SecretFile | None = None
    """File with that client's secret. Not set: none."""
    token_endpoint: Annotated[ApiUrl | None, Example("https://identity.example/connect/token")] = (
        None
    )
    """URL that issues tokens. Not set: discovered from the endpoint's host, at
    /identity/.well-known/openid-configuration."""
    ca_file: InputFile | None = None
    """Certificates (PEM) to trust a coordinator by. Not set: the system's. This file and those with
    secrets are read again when they change (docs/operations.md)."""
    client_certificate: InputFile | None = None
    """Certificate (PEM) to show to a coordinator that asks for one. Not set: none."""
    client_key: SecretFile | None = None
    """That certificate's private key (PEM). Not set: none."""
    proxy: Annotated[ProxyUrl | None, Example("http://proxy.example:3128")] = None
    """HTTP proxy to all endpoints and to token_endpoint: https by CONNECT, their names are resolved
    by the proxy. HTTP_PROXY and the like are ignored. Not set: no proxy."""
    proxy_username: Annotated[Text | None, Example("edge")] = None
    """User name at the proxy (Basic). Not set: none."""
    proxy_password_file: SecretFile | None = None
    """File with that user's password. Not set: none."""
    failsafe_listen: Annotated[Address | None, ADDRESS, Example("192.0.2.11:5480")] = None
    """Where the other members of the group ask this one for failsafe (docs/failsafe.md): with it a
    primary that cannot reach the coordinator keeps the role while all of them agree. Set it for all
    members or for none. Not set: no failsafe."""
    failsafe_url: Annotated[MemberUrl | None, Example("http://host-a.example:5480")] = None
    """URL at which the other members reach failsafe_listen; no other process may ever have it. Not
    set: the address of failsafe_listen, which has to be one, with a port."""
    failsafe_secret_file: SecretFile | None = None
    """File with the secret that all members of the group share, of at least 16 characters; with two
    lines both are valid, while it is being changed. Read again when it changes, as the next three files are. Not
    set: no failsafe."""
    failsafe_ca_file: InputFile | None = None
    """Certificates (PEM) to trust the other members by. Not set: the system's."""
    failsafe_certificate: InputFile | None = None
    """Certificate chain (PEM) to serve failsafe_listen by HTTPS with. Not set: plain HTTP, whose
    messages are authentic, but not secret."""
    failsafe_key: SecretFile | None = None
    """That certificate's private key (PEM). Not set: plain HTTP."""
    check: Annotated[tuple[CheckSettings, ...], CHECKS, RELOADABLE] = ()
    """Health checks: the share of their weights that pass scales failover_score. At 0, and while a
    required one fails, this member demotes (R9). A flag or variable is JSON. Not set:
    always fit."""
    progress: Annotated[ProgressSource | None, PROGRESS, RELOADABLE] = None
    """Where the data-processed time comes from, beside POST /data-processed, which always counts.
    A flag or variable is JSON. Not set: from that call only."""
    mqtt: Annotated[Mqtt | None, MQTT] = None
    """A broker that role changes are announced to (docs/mqtt.md), by the extra mqtt; advisory: it
    can delay and fail nothing. A flag or variable is JSON. Not set: none."""
    max_behind: Annotated[Duration | None, Example(60), RELOADABLE] = None
    """A secondary whose own data-processed time is further than this behind the group's reports
    FailoverScore 1, so that a better one is chosen if there is one. Not set: no such gate."""
    log_level: LogLevel = "INFO"
    log_format: LogFormat = "text"

    def hook_limit_of(self, event: str) -> float:
        """How long the hook of an event may take, in seconds; a demotion's is the lease's (R4)."""
        own = {
            "pending_primary": self.hook_pending_primary_limit,
            "primary": self.hook_primary_limit,
        }.get(event, self.hook_notification_limit)
        return self.hook_limit if own is None else own

    @property
    def budget(self) -> Budget:
        """The configured parts of the lease; None for each that is derived."""
        return Budget(
            renew_s=self.renew,
            demote_s=self.demote,
            margin_s=self.margin,
            heartbeat_interval_s=self.beat,
            request_timeout_s=self.request_timeout,
            failsafe=self.failsafe_listen is not None,
        )

    @property
    def timing(self) -> Timing:
        """The division of ``failover_timeout``. Raises TimingError if R1 does not hold."""
        return plan(self.failover_timeout, self.budget)

    @property
    def member_url(self) -> str | None:
        """The URL at which other members ask this one; None without failsafe."""
        if self.failsafe_listen is None or self.failsafe_url is not None:
            return self.failsafe_url
        scheme = "https" if self.failsafe_certificate is not None else "http"
        return f"{scheme}://{self.failsafe_listen}"

    def contradictions(self) -> Iterator[tuple[str, str]]:
        yield from self.set_together("username", "password_file")
        yield from self.set_together("client_id", "client_secret_file")
        yield from self.set_together("client_certificate", "client_key")
        yield from self.set_together("proxy_username", "proxy_password_file")
        yield from self.needs("proxy_username", "proxy")
        yield from self.set_together("probe_tls_certificate", "probe_tls_key")
        yield from self.set_together("probe_username", "probe_password_file")
        if self.probe_listen is None and (self.probe_tls_certificate or self.probe_username):
            yield "probe_listen", "cannot be off with probe_tls_certificate or probe_username set"
        yield from self._failsafe_contradictions()
        yield from self.needs("token_endpoint", "client_id", "client_secret_file")
        if self.username is not None and self.client_id is not None:
            yield "client_id", "cannot be used together with username: keep one of the two"
        if self.cooldown_limit < self.cooldown:
            yield "cooldown_limit", f"must be at least cooldown, which is {self.cooldown:g} s"
        if self.username is None and self.client_id is None:
            return
        secret = "password" if self.username is not None else "client secret"
        urls = [("endpoint", url) for url in self.endpoint]
        if self.token_endpoint is not None:
            urls.append(("token_endpoint", self.token_endpoint))
        for key, url in urls:
            parts = urlsplit(url)
            hosts = [parts.hostname, urlsplit(self.proxy).hostname if self.proxy else "localhost"]
            if parts.scheme == "http" and not all(is_loopback(host or "") for host in hosts):
                yield key, f"{url} would carry the {secret} unencrypted: use https"

    def _failsafe_contradictions(self) -> Iterator[tuple[str, str]]:
        yield from self.set_together("failsafe_listen", "failsafe_secret_file")
        yield from self.set_together("failsafe_certificate", "failsafe_key")
        if self.failsafe_listen is None:
            for key in ("failsafe_url", "failsafe_ca_file", "failsafe_certificate"):
                yield from self.needs(key, "failsafe_listen", "failsafe_secret_file")
            return
        yield from self.needs("failsafe_ca_file", "failsafe_certificate", "failsafe_key")
        if self.failsafe_url is None and not self.failsafe_listen.is_one_place:
            yield (
                "failsafe_listen",
                f"{self.failsafe_listen} is not one address and port that other members can reach: set"
                " failsafe_url too",
            )
        elif self.failsafe_url is not None:
            scheme = "http" if self.failsafe_certificate is None else "https"
            if urlsplit(self.failsafe_url).scheme != scheme:
                is_set = "not set" if self.failsafe_certificate is None else "set"
                yield "failsafe_url", f"must be {scheme}:// as failsafe_certificate is {is_set}"
