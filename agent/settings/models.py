"""Every setting of both programs: its name, form, default and reason, and the relations between them.

Owns what a configuration means and which ones contradict themselves. Refuses to know where a value
was given, and what is done with it: nothing is opened, started or asked. The division of a lease
(R1) is core/timing.py's; whether a hook can be run is drivers/hooks.py's.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, ClassVar, Self
from urllib.parse import urlsplit

from pydantic import Field, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from agent.errors import ConfigError
from agent.settings.checks import EXAMPLES as CHECKS
from agent.settings.checks import CheckTables
from agent.settings.forms import (
    DEFAULT_ENDPOINT,
    NUMBER,
    AnyPath,
    Argv,
    Duration,
    DurationOrZero,
    Endpoints,
    Id,
    InputFile,
    Kind,
    Lease,
    Level,
    Listen,
    ProbeListen,
    Program,
    Restarts,
    RoleForm,
    SecretFile,
    Share,
    StoreKind,
    Text,
    Url,
)
from agent.settings.hooks import Directory, Hook, Owner, Retries, Variables
from agent.settings.mqtt import EXAMPLE as BROKER
from agent.settings.mqtt import MqttTable
from agent.settings.plain import plain_of
from agent.settings.progress import EXAMPLES as SOURCES
from agent.settings.progress import ProgressTable
from agent.settings.values import Address, AgentSettings, LogFormat, is_loopback


class ContradictionError(ConfigError):
    """Settings that are each well-formed contradict each other."""

    def __init__(self, faults: Sequence[tuple[str, str]]) -> None:
        super().__init__("\n".join(f"{key}: {text}" for key, text in faults))
        self.faults = faults


class Settings(BaseSettings):
    """What both programs have. Construction validates; only ``load`` reads flags, environment, file.

    Raises:
        pydantic.ValidationError: a value has the wrong form or is out of range.
        ConfigError: two settings contradict each other.
    """

    model_config = SettingsConfigDict(
        frozen=True, extra="forbid", enable_decoding=False, validate_default=False
    )

    env_prefix: ClassVar[str]
    """What a setting's environment variable starts with."""

    log_level: Level = Field(
        "INFO",
        description="The least serious log line that is written. Info has each change of role and"
        " no line per heartbeat.",
    )
    log_format: Annotated[LogFormat, Kind("text|json", "text or json")] = Field(
        "text",
        description="How a log line looks: text for people and the journal, json for collectors.",
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],  # noqa: ARG003 - pydantic-settings gives it
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - pydantic-settings gives it
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - pydantic-settings gives it
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - pydantic-settings gives it
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Leave the merging to ``load``, which has to know where each value is from."""
        return (init_settings,)

    @model_validator(mode="after")
    def _check_relations(self) -> Self:
        if faults := tuple(self._contradictions()):
            raise ContradictionError(faults)
        return self

    def _contradictions(self) -> Iterator[tuple[str, str]]:
        """Each broken relation: the setting to name, and what would be right."""
        yield from ()

    def _together(self, *keys: str) -> Iterator[tuple[str, str]]:
        """All of these, or none."""
        given = [key for key in keys if getattr(self, key) is not None]
        if given and len(given) < len(keys):
            missing = " and ".join(key for key in keys if key not in given)
            yield given[0], f"needs {missing} too"


class AgentForm(Settings):
    """What ``failover-agent run`` can be told. Durations are seconds."""

    plain: ClassVar = AgentSettings

    model_config = SettingsConfigDict(env_prefix="FAILOVER_AGENT_")
    env_prefix: ClassVar[str] = "FAILOVER_AGENT_"

    endpoint: Endpoints = Field(
        (DEFAULT_ENDPOINT,),
        description="Base paths of ONE coordinator, or of one cluster, up to and with 'clientfailover'."
        " The agent stays with the one that works, and asks the others when that fails or is slow."
        " Never list two coordinators that know nothing of each other: answers from another store are"
        " refused (exit code 27 at the start). The flag may be repeated; the variable separates by commas. The default is a coordinator"
        " on this machine with its own defaults.",
    )
    group: Id = Field(
        "",
        description="Id of the group to be a member of. run needs it; the group is made if missing.",
        examples=["demo"],
    )
    group_name: Text | None = Field(
        None,
        description="Name for people of the group, if this agent makes it. Not set: none.",
        examples=["Line 7 collectors"],
    )
    session_id: Id | None = Field(
        None,
        description="Id of this member, unique in its group and the same after a restart."
        " Not set: the host's name, with -2, -3, ... where agents of this host have it already.",
        examples=["host-a"],
    )
    session_name: Text | None = Field(
        None,
        description="Name for people of this member. Not set: the session id.",
        examples=["Host A, rack 3"],
    )
    failover_timeout: Lease = Field(
        10.0,
        description="L, how long after its last heartbeat a member is given up and another may be"
        " chosen. A group that exists keeps its own. 10 s outlasts lost packets and"
        " short pauses of virtual machines, and leaves a demotion 2.5 s.",
    )
    beat: Duration | None = Field(
        None,
        description="Time between two heartbeats; 2 beats must fit into renew (R1)."
        " Not set: renew / 3, at most 10 s, so that two may be lost.",
        examples=[2.0],
    )
    renew: Duration | None = Field(
        None,
        description="R, without renewal for this long demotion starts (R4)."
        " Not set: what demote and margin leave of L.",
        examples=[6.5],
    )
    demote: Duration | None = Field(
        None,
        description="D, how long demotion may take before its processes are killed."
        " Not set: a quarter of L.",
        examples=[2.5],
    )
    margin: Duration | None = Field(
        None,
        description="M, kept free for clock drift (1 % of L at least) and for scheduling."
        " Not set: a tenth of L.",
        examples=[1.0],
    )
    request_timeout: Duration | None = Field(
        None,
        description="How long one request may take; under half of renew, so that a lost one can be"
        " repeated (R1). Not set: renew / 3, at most 10 s.",
        examples=[2.0],
    )
    failover_score: Share = Field(
        100.0,
        description="How fit this member is (v1 FailoverScore, the share of active streams)."
        " The member with the highest is chosen. 100: as fit as can be.",
    )
    hook_primary: Hook = Field(
        (),
        description="Starts the workload: a command (an absolute path and its arguments), one"
        " directory of scripts, or one URL (docs/hooks.md). A flag or variable is split as a shell"
        " would, or is a JSON list. Not set: none.",
        examples=[["/usr/local/bin/start-collector", "--active"]],
    )
    hook_pending_primary: Hook = Field(
        (),
        description="Gets the workload ready while the predecessor ends. Not set: none.",
        examples=[["/etc/failover-agent/pending_primary.d"]],
    )
    hook_secondary: Hook = Field(
        (),
        description="Stops the workload. It also runs when the agent starts (R6), so it must do no"
        " harm when there is nothing to stop. Not set: none.",
        examples=[["/usr/local/bin/stop-collector"]],
    )
    hook_joined: Hook = Field(
        (),
        description="Told when this member has joined; advisory, as the next two: their failure is"
        " logged and delays nothing (R10). Not set: none.",
        examples=[["http://127.0.0.1:9000/joined"]],
    )
    hook_lost: Hook = Field(
        (),
        description="Told when this member gives the role up by itself: no contact, a frozen process,"
        " its health. Not set: none.",
        examples=[["/usr/local/bin/raise-alarm", "role lost"]],
    )
    hook_left: Hook = Field(
        (),
        description="Told when this member has left the group at its stop. Not set: none.",
        examples=[["http://127.0.0.1:9000/left"]],
    )
    hook_limit: Duration = Field(
        30.0,
        description="How long a promotion hook may take before it is killed and counts as failed"
        " (a demotion has the time that demote gives). 30 s: most services start in less.",
    )
    hook_pending_primary_limit: Duration | None = Field(
        None,
        description="The same for hook_pending_primary alone. Not set: hook_limit.",
        examples=[10],
    )
    hook_primary_limit: Duration | None = Field(
        None,
        description="The same for hook_primary alone. Not set: hook_limit.",
        examples=[60],
    )
    hook_notification_limit: Duration | None = Field(
        None,
        description="The same for each of hook_joined, hook_lost and hook_left. Not set: hook_limit.",
        examples=[5],
    )
    hook_retries: Retries = Field(
        0,
        description="How often a step of a promotion hook that failed is tried again, half a second"
        " later, within hook_limit. 0: the other member may be healthier.",
    )
    hook_user: Owner | None = Field(
        None,
        description="User that all hooks run as; the agent has to be root. Not set: the agent's.",
        examples=["collector"],
    )
    hook_group: Owner | None = Field(
        None,
        description="Group that all hooks run as; the agent has to be root. Not set: hook_user's.",
        examples=["collector"],
    )
    hook_directory: Directory = Field(
        Path("/"),
        description="Working directory of all hooks; absolute. The default is on every host and"
        " keeps no file system from being unmounted.",
    )
    hook_directories_writable: Annotated[bool, Kind("", "true or false")] = Field(
        default=False,
        description="Whether directories on the way to a hook, a check or a fence command may be"
        " writable by others, as a Kubernetes ConfigMap volume is (mode 0777, mounted read-only)."
        " Whoever can write there decides what the agent runs.",
    )
    hook_environment: Variables = Field(
        default_factory=dict,
        description="Variables for all hooks, beside the documented ones. A flag or variable is"
        " NAME=VALUE words, or a JSON object. check-config prints them: no secrets. Not set: none.",
        examples=[{"UNIT": "collector.service"}],
    )
    webhook_secret_file: SecretFile | None = Field(
        None,
        description="File with the secret that webhooks are signed with (docs/hooks.md)."
        " Not set: unsigned.",
        examples=["/etc/failover-agent/webhook-secret"],
    )
    webhook_ca_file: InputFile | None = Field(
        None,
        description="Certificates (PEM) to trust a webhook's server by. Not set: the system's.",
        examples=["/etc/failover-agent/ca.pem"],
    )
    workload: Program = Field(
        (),
        description="A command that runs only while this member is primary, beside the hooks: after"
        " hook_primary, and stopped before hook_secondary (docs/exec.md). Not set: none.",
        examples=[["collector", "--active"]],
    )
    workload_restart: Restarts = Field(
        "on-failure",
        description="When the workload is started again after it has ended by itself. If it is not,"
        " the agent stops, with the workload's exit code.",
    )
    workload_forward_hup: Annotated[bool, Kind("", "true or false")] = Field(
        default=False,
        description="Whether SIGHUP, which has the agent read its configuration again, is passed on to"
        " the workload, too. Off: many programs end at SIGHUP. Other signals are passed on in any case"
        " (docs/exec.md).",
    )
    fence_command: Argv = Field(
        (),
        description="Run when a demotion has failed and everything was killed, before the agent"
        " exits: to cut this host off by other means (R4). Not set: none.",
        examples=[["/usr/local/bin/cut-power", "self"]],
    )
    watchdog_device: AnyPath | None = Field(
        None,
        description="The kernel's watchdog: kept alive while this member is primary and its loop"
        " turns, so that a host on which even the guard is stuck is reset. Not set: none.",
        examples=["/dev/watchdog"],
    )
    guard: Annotated[bool, Kind("", "true or false")] = Field(
        default=True,
        description="Whether a second small process demotes in the agent's place when the agent is"
        " frozen, hung or killed. Without it such an agent leaves its workload running.",
    )
    state_file: AnyPath | None = Field(
        None,
        description="File with role and epoch for sidecars, replaced atomically. Not set:"
        " group.session.json in $RUNTIME_DIRECTORY (systemd), else in failover-agent under"
        " $XDG_RUNTIME_DIR, for root /run.",
        examples=["/run/failover-agent/state.json"],
    )
    probe_listen: ProbeListen = Field(
        Address("127.0.0.1", 0),
        description="Where probes are answered and POST /data-processed is taken; off switches it"
        " off. Port 0 takes a free port, so that several agents fit on one host; the log says which.",
    )
    startup_timeout: DurationOrZero = Field(
        60.0,
        description="How long to try to reach a coordinator at the start before giving up with an"
        " exit code; 0 tries for ever. 60 s outlasts the start of a coordinator beside it.",
    )
    cooldown: Duration = Field(
        5.0,
        description="Wait after a failed promotion before this member may be chosen again, doubled"
        " each time. 5 s lets the other member try first (R8).",
    )
    cooldown_limit: Duration = Field(
        300.0,
        description="The longest such wait. 300 s: a repaired host is back within 5 minutes.",
    )
    username: Text | None = Field(
        None,
        description="User name for Basic authentication. Not set: none.",
        examples=["collector"],
    )
    password_file: SecretFile | None = Field(
        None,
        description="File with that user's password. Not set: none.",
        examples=["/etc/failover-agent/password"],
    )
    client_id: Text | None = Field(
        None,
        description="Client id for OAuth 2 client credentials. Not set: none.",
        examples=["3f1c"],
    )
    client_secret_file: SecretFile | None = Field(
        None,
        description="File with that client's secret. Not set: none.",
        examples=["/etc/failover-agent/client-secret"],
    )
    token_endpoint: Url | None = Field(
        None,
        description="Where tokens are got. Not set: asked from the endpoint's host, at"
        " /identity/.well-known/openid-configuration.",
        examples=["https://identity.example/connect/token"],
    )
    ca_file: InputFile | None = Field(
        None,
        description="Certificates (PEM) to trust a coordinator by. Not set: the system's.",
        examples=["/etc/failover-agent/ca.pem"],
    )
    check: CheckTables = Field(
        (),
        description="Health checks: the share of their weights that pass scales failover_score. At"
        " 0, and while a required one fails, this member gives up the role (R9). A flag or variable"
        " is JSON. Not set: always fit.",
        examples=list(CHECKS),
    )
    progress: ProgressTable = Field(
        None,
        description="Where the data-processed time comes from, beside POST /data-processed, which"
        " always counts. A flag or variable is JSON. Not set: from that call only.",
        examples=list(SOURCES),
    )
    mqtt: MqttTable = Field(
        None,
        description="A broker that role changes are announced to (docs/mqtt.md), by the extra mqtt;"
        " advisory: it can delay and fail nothing. A flag or variable is JSON. Not set: none.",
        examples=[BROKER],
    )

    max_behind: Duration | None = Field(
        None,
        description="A secondary whose own data-processed time is further than this behind the"
        " group's says FailoverScore 1, so that a better one is chosen if there is one."
        " Not set: no such gate.",
        examples=[60],
    )

    def value(self) -> AgentSettings:
        """What the agent is told by it."""
        settings: AgentSettings = plain_of(self)
        return settings

    def _contradictions(self) -> Iterator[tuple[str, str]]:
        yield from self._together("username", "password_file")
        yield from self._together("client_id", "client_secret_file")
        if self.token_endpoint is not None and self.client_id is None:
            yield "token_endpoint", "needs client_id and client_secret_file too"
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
            if parts.scheme == "http" and not is_loopback(parts.hostname or ""):
                yield key, f"{url} would carry the {secret} unencrypted: use https"


def default_data_dir(environ: Mapping[str, str], *, root: bool) -> Path:
    """Where a coordinator keeps its data unless told: systemd's choice, the system's, or the user's.

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


class CoordinatorSettings(Settings):
    """What ``failover-agent serve`` can be told. Durations are seconds."""

    model_config = SettingsConfigDict(env_prefix="FAILOVER_COORDINATOR_")
    env_prefix: ClassVar[str] = "FAILOVER_COORDINATOR_"

    listen: Listen = Field(
        Address("127.0.0.1", 5470),
        description="Where the API is served. The default can be reached from this machine only:"
        " anything else needs TLS and authentication, or insecure. Port 0 takes a free one.",
    )
    data_dir: AnyPath = Field(
        default_factory=lambda: default_data_dir(os.environ, root=os.geteuid() == 0),
        description="Directory of the database; one coordinator at a time. Not set: $STATE_DIRECTORY"
        " (systemd), else /var/lib/failover-agent for root, else failover-agent in $XDG_STATE_HOME"
        " or ~/.local/state.",
        examples=["/var/lib/failover-agent"],
    )
    store: Annotated[StoreKind, Kind("sqlite|memory", "sqlite or memory")] = Field(
        "sqlite",
        description="Where groups, holders and epochs are kept: sqlite survives a restart and a"
        " crash; memory forgets everything and is for trials.",
    )
    role_form: Annotated[RoleForm, Kind("number|name", "number or name")] = Field(
        "number",
        description="How roles are written: number as the cloud's API documents, name as the"
        " on-premises one. Both are read.",
    )
    score_hysteresis: Share = Field(
        10.0,
        description="A live primary with a lower score is replaced only if the other's is higher by"
        " more than this. 10: one stream of ten that comes and goes changes nothing; 0 is strict"
        " v1 behaviour.",
    )
    minimum_hold: DurationOrZero = Field(
        30.0,
        description="A live primary is not replaced for a better score earlier than this after it"
        " became primary. 30 s: a swap costs a gap, so two in a minute are the most; 0 is"
        " strict v1 behaviour.",
    )
    max_body_bytes: Annotated[int, NUMBER, Kind("BYTES", "bytes, 1024 to 16777216")] = Field(
        65536,
        ge=1024,
        le=16 * 1024 * 1024,
        description="Longest body of a request; a longer one is answered 413. 64 KiB holds a group"
        " with plenty of AdditionalData.",
    )
    max_groups: Annotated[int, NUMBER, Kind("NUMBER", "number, 1 to 10000000")] = Field(
        100_000,
        ge=1,
        le=10_000_000,
        description="Most groups. All are in memory: 100000 take some hundred megabytes.",
    )
    max_sessions_per_group: Annotated[int, NUMBER, Kind("NUMBER", "number, 1 to 10000")] = Field(
        100,
        ge=1,
        le=10_000,
        description="Most sessions of one group. A group is usually 2; 100 stops a client that makes"
        " a new id at each start.",
    )
    session_metrics: Annotated[bool, Kind("", "true or false")] = Field(
        default=False,
        description="Whether /metrics has series for each session too: its role, score and last"
        " heartbeat. They are 5 a session, and tell its id to whoever may scrape.",
    )
    tls_certificate: InputFile | None = Field(
        None,
        description="Certificate chain (PEM) to serve HTTPS with. Not set: plain HTTP.",
        examples=["/etc/failover-agent/tls.crt"],
    )
    tls_key: SecretFile | None = Field(
        None,
        description="That certificate's private key (PEM). Not set: plain HTTP.",
        examples=["/etc/failover-agent/tls.key"],
    )
    users_file: SecretFile | None = Field(
        None,
        description="Users and password hashes for Basic authentication. Not set: no Basic.",
        examples=["/etc/failover-agent/users"],
    )
    token_issuer: Text | None = Field(
        None,
        description="Issuer (iss) that a bearer token must have. Not set: no tokens are taken.",
        examples=["https://identity.example"],
    )
    token_audience: Text | None = Field(
        None,
        description="Audience (aud) that a bearer token must have. Not set: no tokens are taken.",
        examples=["failover"],
    )
    token_keys_file: InputFile | None = Field(
        None,
        description="Public keys (JWKS) that tokens are checked with. Not set: no tokens are taken.",
        examples=["/etc/failover-agent/jwks.json"],
    )
    insecure: Annotated[bool, Kind("", "true or false")] = Field(
        default=False,
        description="Serve beyond this machine without TLS or without authentication. Whoever"
        " reaches the port can then decide who is primary.",
    )

    def _contradictions(self) -> Iterator[tuple[str, str]]:
        yield from self._together("tls_certificate", "tls_key")
        yield from self._together("token_keys_file", "token_issuer", "token_audience")
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
                " add that, listen on 127.0.0.1, or say insecure = true (--insecure)",
            )
