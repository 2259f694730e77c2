"""What the coordinator tells Prometheus. Knows numbers; decides nothing.

Counters grow where the thing happens (``Meter``); what stands in the groups is counted at each scrape,
a few groups at a time, so that a scrape of thousands delays no heartbeat. No label is a group or a
session: the number of series is fixed.
"""

import asyncio
from collections import Counter as Tally

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info
from prometheus_client.exposition import choose_encoder

from agent import __version__
from agent.coordinator.engine import Group
from agent.coordinator.service import Coordinator
from agent.core.group_state import alive, role_of
from agent.model import HistoryEntry, Instant, Role

GROUPS_AT_ONCE = 100
"""Counted before requests get their turn: about a millisecond."""

SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10)
"""Buckets: a heartbeat takes half a millisecond, a commit some; beyond 20 ms something is wrong."""

ENDS = {
    "its lease ended without a heartbeat": "expired",
    "its client session was deleted": "deleted",
    "its epoch is older than one that a client has seen": "data_loss",
}
"""Why tenures end, by what history says; everything else was a release, in the releaser's words."""

GROUP_STATES = ("primary", "handing_over", "pending", "none")


class Metrics:
    """The numbers of one coordinator. Also the engine's Meter."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        prefix = "failover_coordinator"
        self._requests: dict[tuple[str, int], tuple[Counter, Histogram]] = {}
        self._request = Counter(
            f"{prefix}_requests", "Requests answered.", ("route", "code"), registry=registry
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
            f"{prefix}_tenures_ended", "Tenures ended, by why.", ("reason",), registry=registry
        )
        for reason in ("released", *ENDS.values()):
            self._ended.labels(reason)
        self._stalls = Counter(
            f"{prefix}_stalls",
            "Times at which this process was stopped, and leases were made longer for it.",
            registry=registry,
        )
        self._groups = Gauge(
            f"{prefix}_groups",
            "Groups, by whether they have a primary.",
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
        self._readers = Gauge(
            f"{prefix}_blocked_readers", "Status reads that wait for a change.", registry=registry
        )
        Info(f"{prefix}_build", "This program.", registry=registry).info({"version": __version__})

    # -- what happens ---------------------------------------------------------------------------

    def answered(self, route: str, code: int, seconds: float) -> None:
        """A request was answered. ``route`` is an operation of the API, so the labels are few."""
        try:
            count, duration = self._requests[route, code]
        except KeyError:
            count = self._request.labels(route, str(code))
            duration = self._request_s.labels(route)
            self._requests[route, code] = count, duration
        count.inc()
        duration.observe(seconds)

    def committed(self, seconds: float) -> None:
        """A change is durable."""
        self._commit_s.observe(seconds)

    def commit_failed(self) -> None:
        """A change could not be made durable."""
        self._commit_failures.inc()

    def tenure(self, entry: HistoryEntry) -> None:
        """A tenure has begun or ended."""
        if entry.until is None:
            self._began.inc()
        else:
            self._ended.labels(ENDS.get(entry.why_ended or "", "released")).inc()

    def stalled(self) -> None:
        """This process was stopped for longer than some lease could bear."""
        self._stalls.inc()

    # -- what is --------------------------------------------------------------------------------

    async def page(self, coordinator: Coordinator, now: Instant, accept: str) -> tuple[bytes, str]:
        """The page for a scraper, in the form that it accepts, and its Content-Type."""
        groups: Tally[str] = Tally()
        sessions: Tally[tuple[Role, bool]] = Tally()
        vacant = 0
        for number, group in enumerate(coordinator.all_groups()):
            if number % GROUPS_AT_ONCE == GROUPS_AT_ONCE - 1:
                await asyncio.sleep(0)
            vacant += _count(group, now, groups, sessions)
        for state in GROUP_STATES:
            self._groups.labels(state).set(groups[state])
        for role in Role:
            for active in (True, False):
                self._sessions.labels(role.value, str(active).lower()).set(sessions[role, active])
        self._vacant.set(vacant)
        self._readers.set(coordinator.blocked_readers)
        encode, media = choose_encoder(accept)
        return encode(self.registry), media


def _count(
    group: Group, now: Instant, groups: Tally[str], sessions: Tally[tuple[Role, bool]]
) -> bool:
    """Count one group; whether it could have a primary and has none."""
    record = group.state.record
    some_active = False
    for session_id in record.sessions:
        active = alive(group.state, session_id, now)
        some_active |= active
        sessions[role_of(record, session_id), active] += 1
    if record.holder is not None:
        groups["handing_over" if record.holder.revoked else "primary"] += 1
        return False
    groups["pending" if record.pending is not None else "none"] += 1
    return some_active
