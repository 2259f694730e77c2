"""The coordinator's metrics for Prometheus. Decides nothing.

Counters are incremented by the engine (``Meter``). Groups and sessions are counted at each scrape, a few groups at a
time, so that a scrape of thousands delays no heartbeat. No label is a group or a session, so the number of series
is fixed, except with ``session_metrics``.
"""

import asyncio
import platform
from collections import Counter as Tally
from collections.abc import Sequence
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.exposition import choose_encoder

from agent import __version__
from agent.coordinator.limits import CACHE_S, Admission, Cache, Ending
from agent.coordinator.service import Coordinator
from agent.coordinator.shards import Group
from agent.core.group_failsafe import status_of_failsafe
from agent.core.group_state import Removal, RemovalCause, is_alive, role_of
from agent.model import FailsafeState, GroupRecord, HistoryEntry, Instant, Role, TenureEnd

GROUPS_AT_ONCE = 100
"""How many groups are counted before requests are served again: about a millisecond."""

SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10)
"""Bounds of buckets: a heartbeat takes half a millisecond, a commit a few; more than 20 ms means a problem."""

DECISIONS = ("offered", "withdrawn", "revoked")
CHECKS = ("good", "wrong", "limited", "busy")
FETCHES = ("fetched", "failed")
TENURE_ENDS = frozenset(TenureEnd) - {TenureEnd.LIFTED, TenureEnd.RESTORED}
FAILSAFE_EVENTS = ("resumed", TenureEnd.REFUSED, TenureEnd.LIFTED, TenureEnd.RESTORED)
GROUP_STATES = ("primary", "handing_over", "pending", "none")

OPENMETRICS = "application/openmetrics-text"
FORMS = {True: f"{OPENMETRICS};version=1.0.0", False: "text/plain;version=0.0.4"}
"""The Accept headers of the two forms of the page. A scraper's own header is only searched for the first one, and
not passed to the library, which would copy its version into the answer."""


class Metrics:
    """The metrics of one coordinator. Also the engine's Meter.

    Args:
        sessions: whether each session has series of its own.
        cache_s: how long a page is cached, in seconds.
    """

    def __init__(self, *, sessions: bool = False, cache_s: float = CACHE_S) -> None:
        self._each_session = sessions
        self._pages: Cache[tuple[bytes, str]] = Cache(cache_s)
        disable_created_metrics()  # type: ignore[no-untyped-call] # the process collector has the start time
        self.registry = registry = CollectorRegistry()
        prefix = "failover_coordinator"
        self._requests: dict[tuple[str, int], tuple[Counter, Histogram]] = {}
        self._request = Counter(
            f"{prefix}_requests",
            "Requests answered, by operation (none for a path that is not served) and status.",
            ("route", "code"),
            registry=registry,
        )
        self._request_s = Histogram(
            f"{prefix}_request_duration_seconds",
            "Time from a request's arrival to its answer; blocking reads wait on purpose.",
            ("route",),
            buckets=SECONDS,
            registry=registry,
        )
        self._commit_s = Histogram(
            f"{prefix}_store_commit_duration_seconds",
            "Time until a change was durable.",
            buckets=SECONDS,
            registry=registry,
        )
        self._commit_failures = Counter(
            f"{prefix}_store_commit_failures",
            "Changes that could not be made durable.",
            registry=registry,
        )
        self._began = Counter(f"{prefix}_tenures_started", "Tenures begun.", registry=registry)
        self._ended = Counter(
            f"{prefix}_tenures_ended",
            "Tenures ended: released, expired (no heartbeat came), deleted, data_loss (a client has seen"
            " a later epoch), or refused (by a promise to another member).",
            ("reason",),
            registry=registry,
        )
        for reason in TENURE_ENDS:
            self._ended.labels(reason)
        self._failsafe_events = Counter(
            f"{prefix}_failsafe_events",
            "Failsafe: tenures resumed after their lease had ended, and tenures refused by a promise;"
            " groups that an operator has lifted, and groups that were declared as restored.",
            ("kind",),
            registry=registry,
        )
        for kind in FAILSAFE_EVENTS:
            self._failsafe_events.labels(kind)
        self._decisions = Counter(
            f"{prefix}_decisions",
            "What was decided beside the tenures: a role offered (PendingPrimary), an offer withdrawn"
            " that was not taken up in time, a tenure revoked for a better member.",
            ("kind",),
            registry=registry,
        )
        for kind in DECISIONS:
            self._decisions.labels(kind)
        self._removed = Counter(
            f"{prefix}_dead_sessions_removed",
            "Sessions without heartbeats that were removed: retention (silent for dead_session_retention),"
            " full (it gave way to a new session of a full group).",
            ("cause",),
            registry=registry,
        )
        for cause in RemovalCause:
            self._removed.labels(cause)
        self._stalls = Counter(
            f"{prefix}_stalls",
            "Times at which this process was stopped, and leases were made longer for it.",
            registry=registry,
        )
        self._password_checks = Counter(
            f"{prefix}_password_checks",
            "Passwords that were not remembered: good, wrong, limited (429: too many of that address were"
            " wrong) or busy (503: too many wait).",
            ("outcome",),
            registry=registry,
        )
        for outcome in CHECKS:
            self._password_checks.labels(outcome)
        self._key_fetches = Counter(
            f"{prefix}_token_key_fetches",
            "Fetches from token_keys_url: fetched or failed (the old keys stay in force for a day).",
            ("outcome",),
            registry=registry,
        )
        for outcome in FETCHES:
            self._key_fetches.labels(outcome)
        self._reload = Gauge(
            f"{prefix}_last_reload_successful",
            "Whether the last reload of settings and files succeeded; if not, the old ones are in force.",
            registry=registry,
        )
        self._reload.set(1)
        self._groups = Gauge(
            f"{prefix}_groups",
            "Groups: with a primary; with one that has to hand over; with a candidate that has to confirm; or none.",
            ("state",),
            registry=registry,
        )
        self._sessions = Gauge(
            f"{prefix}_sessions",
            "Client sessions, by role and by whether a heartbeat came within FailoverTimeout.",
            ("role", "active"),
            registry=registry,
        )
        self._vacant = Gauge(
            f"{prefix}_groups_without_primary",
            "Groups that have active sessions, and no primary.",
            registry=registry,
        )
        self._failsafe_groups = Gauge(
            f"{prefix}_failsafe_groups",
            "Groups with failsafe: off, ready, or restricted (nobody is primary, and only members that the"
            " last primary asks may be promoted).",
            ("state",),
            registry=registry,
        )
        self._readers = Gauge(
            f"{prefix}_blocked_readers", "Status reads that wait for a change.", registry=registry
        )
        self._connections = Gauge(
            f"{prefix}_connections",
            "Open connections, by whether a caller was authenticated on them (without authentication: whether a"
            " call of the group API was allowed).",
            ("authenticated",),
            registry=registry,
        )
        for authenticated in ("true", "false"):
            self._connections.labels(authenticated)
        self._connections_ended = Counter(
            f"{prefix}_connections_ended",
            "Connections ended by the coordinator, by reason: idle, a limit, a timeout or a request that is"
            " too large or no HTTP.",
            ("reason",),
            registry=registry,
        )
        for why in Ending:
            self._connections_ended.labels(why)
        build = Info(
            f"{prefix}_build",
            "Version of the coordinator and of Python; always 1.",
            registry=registry,
        )
        build.info({"version": __version__, "python": platform.python_version()})
        ProcessCollector(registry=registry)

    # -- what happens ---------------------------------------------------------------------------

    def answered(self, route: str, code: int, seconds: float) -> None:
        """Count an answered request. ``route`` is an operation of the API, so the labels are few."""
        try:
            count, duration = self._requests[route, code]
        except KeyError:
            count = self._request.labels(route, str(code))
            duration = self._request_s.labels(route)
            self._requests[route, code] = count, duration
        count.inc()
        duration.observe(seconds)

    def committed(self, seconds: float) -> None:
        """Count a change that was made durable."""
        self._commit_s.observe(seconds)

    def commit_failed(self) -> None:
        """Count a change that could not be made durable."""
        self._commit_failures.inc()

    def decided(
        self, before: GroupRecord, after: GroupRecord, history: Sequence[HistoryEntry]
    ) -> None:
        """Count the role changes of a durable decision about one group."""
        for entry in history:
            end = entry.end or TenureEnd.RELEASED
            if end in FAILSAFE_EVENTS:
                self._failsafe_events.labels(end).inc()
            if entry.until is None and entry.epoch <= before.epoch:
                self._failsafe_events.labels("resumed").inc()
            elif entry.until is None:
                self._began.inc()
            elif end in TENURE_ENDS:
                self._ended.labels(end).inc()
        begun = after.holder is not None and after.epoch != before.epoch
        if after.pending is not None and after.pending != before.pending:
            self._decisions.labels("offered").inc()
        if before.pending is not None and after.pending != before.pending and not begun:
            self._decisions.labels("withdrawn").inc()
        if after.holder is not None and after.holder.revoked:
            was = before.holder
            if was is None or not was.revoked:
                self._decisions.labels("revoked").inc()

    def removed(self, removals: Sequence[Removal]) -> None:
        """Count removed dead sessions."""
        for removal in removals:
            self._removed.labels(removal.cause).inc()

    def stalled(self) -> None:
        """Count a stall of this process that was long enough to expire a lease."""
        self._stalls.inc()

    def password_checked(self, outcome: str) -> None:
        """Count a check of a password, also one that a limit refused."""
        self._password_checks.labels(outcome).inc()

    def token_keys_fetched(self, outcome: str) -> None:
        """Count a fetch of the identity provider's keys, by outcome."""
        self._key_fetches.labels(outcome).inc()

    def reloaded(self, success: bool) -> None:  # noqa: FBT001 - the one thing to report
        """Record whether the last reload of settings and files succeeded."""
        self._reload.set(success)

    def connection_ended(self, why: Ending) -> None:
        """Count a connection that the coordinator ended."""
        self._connections_ended.labels(why).inc()

    # -- what is --------------------------------------------------------------------------------

    def count_connections(self, admission: Admission[Any]) -> None:
        """Report the number of these connections from now on."""
        self._connections.labels("true").set_function(lambda: admission.authenticated)
        self._connections.labels("false").set_function(lambda: admission.strangers)

    async def page(self, coordinator: Coordinator, now: Instant, accept: str) -> tuple[bytes, str]:
        """The page for a scraper, in the form that it accepts, and its Content-Type.

        Scrapes at the same time, and soon after, get the same page.
        """
        form = FORMS[OPENMETRICS in accept]
        return await self._pages.get(form, lambda: self._make_page(coordinator, now, form))

    async def _make_page(
        self, coordinator: Coordinator, now: Instant, accept: str
    ) -> tuple[bytes, str]:
        groups: Tally[str] = Tally()
        sessions: Tally[tuple[Role, bool]] = Tally()
        failsafe: Tally[FailsafeState] = Tally()
        vacant = 0
        lines = SessionLines() if self._each_session else None
        for number, group in enumerate(coordinator.all_groups()):
            if number % GROUPS_AT_ONCE == GROUPS_AT_ONCE - 1:
                if lines is not None:
                    lines.encode_lines()
                await asyncio.sleep(0)
            vacant += _count(group, now, groups, sessions)
            status = status_of_failsafe(group.state.record)
            if status is not None:
                failsafe[status.state] += 1
            if lines is not None:
                lines.add(group)
        for state in GROUP_STATES:
            self._groups.labels(state).set(groups[state])
        for role in Role:
            for active in (True, False):
                self._sessions.labels(role.value, str(active).lower()).set(sessions[role, active])
        for one in FailsafeState:
            self._failsafe_groups.labels(one.lower()).set(failsafe[one])
        self._vacant.set(vacant)
        self._readers.set(coordinator.blocked_readers)
        encode, media = choose_encoder(accept)
        page = encode(self.registry)
        return page if lines is None else lines.append_to(page), media


def _count(
    group: Group, now: Instant, groups: Tally[str], sessions: Tally[tuple[Role, bool]]
) -> bool:
    """Count one group; return whether it could have a primary but has none."""
    record = group.state.record
    some_active = False
    for session_id in record.sessions:
        active = is_alive(group.state, session_id, now)
        some_active |= active
        sessions[role_of(record, session_id), active] += 1
    if record.holder is not None:
        groups["handing_over" if record.holder.revoked else "primary"] += 1
        return False
    groups["pending" if record.pending is not None else "none"] += 1
    return some_active


class SessionLines:
    """The samples of every session as lines, which are the same in both forms of the page.

    Not made by the library, which would write the samples of 20,000 sessions without a pause for requests.
    """

    FAMILIES = (
        ("failover_coordinator_session_role", "1 for the role of a session, 0 for the others."),
        ("failover_coordinator_session_score", "FailoverScore of a session's last heartbeat."),
        (
            "failover_coordinator_session_heartbeat_timestamp_seconds",
            "When a session's last heartbeat came, by this host's clock, since 1970. None came since"
            " the start: no sample.",
        ),
    )

    def __init__(self) -> None:
        self._done: tuple[list[bytes], ...] = tuple(
            [f"# HELP {name} {text}\n# TYPE {name} gauge\n".encode()]
            for name, text in self.FAMILIES
        )
        self._open: tuple[list[str], ...] = tuple([] for _ in self.FAMILIES)

    def add(self, group: Group) -> None:
        """The sessions of one group."""
        record, contacts = group.state.record, group.state.live.contacts
        tenant, namespace, name = map(_quoted, group.key)
        of_group = f'tenant="{tenant}",namespace="{namespace}",group="{name}"'
        (role_name, _), (score_name, _), (beat_name, _) = self.FAMILIES
        roles, scores, beats = self._open
        for session_id in record.sessions:
            labels = f'{of_group},session="{_quoted(session_id)}"'
            now = role_of(record, session_id)
            roles += [
                f'{role_name}{{{labels},role="{role.value}"}} {int(role is now)}' for role in Role
            ]
            contact = contacts.get(session_id)
            if contact is not None and contact.last_heartbeat is not None:
                scores.append(f"{score_name}{{{labels}}} {contact.score}")
                beats.append(f"{beat_name}{{{labels}}} {contact.last_heartbeat.wall.timestamp()}")

    def encode_lines(self) -> None:
        """Encode the lines collected so far, in small portions."""
        for done, lines in zip(self._done, self._open, strict=True):
            if lines:
                done.append(("\n".join(lines) + "\n").encode())
                lines.clear()

    def append_to(self, page: bytes) -> bytes:
        """The page with these lines appended, before the end marker of OpenMetrics."""
        self.encode_lines()
        own, end, _ = page.partition(b"# EOF")
        parts = [part for done in self._done for part in done]
        return b"".join([own, *parts, b"# EOF\n" if end else b""])


def _quoted(label: str) -> str:
    """Escape the value of a label, which both forms of the page do in the same way."""
    return label.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")
