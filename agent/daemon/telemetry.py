"""Telemetry of an agent: its counters, a snapshot of its state, and the verdicts of its probes.

Owns the counters, and the meaning of "primary", "ready" and "live". Verdicts use the deadlines at the
moment of the request, never a role that was recorded earlier. Knows nothing of HTTP, nor of the format of
metrics (``metrics`` does).
"""

from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime

from agent.core.effects import Cause, Publish
from agent.core.roles import TRANSITIONS
from agent.core.session import Phase
from agent.core.timing import Timing
from agent.daemon.failsafe_report import FailsafeSnapshot
from agent.errors import ExitCode, ServerError
from agent.model import Instant, Role

HEARTBEAT_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Bounds of the heartbeats' histogram. The default request timeout is 10 s at most."""

HOOK_S = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
"""Bounds of the hooks' histogram. The default limit of a promotion hook is 30 s."""

HOOKS = ("primary", "pending_primary", "secondary")

_PROMOTING = frozenset({Cause.CHOSEN, Cause.CONFIRMED})

CHANGES = tuple(
    (before, after, cause)
    for before, after in TRANSITIONS
    for cause in Cause
    if (cause in _PROMOTING) is (after is not Role.SECONDARY)
)
"""Every possible role change with its cause. Each counter starts at 0, so that a rate sees the first one."""

SKEW_SAMPLES = 16
"""Samples of the server's Date header, which is truncated to whole seconds: the smallest difference of so
many is accurate to some tenths of a second. A server that updates its Date once a second by a timer adds
up to 1 s; our coordinator does not."""

_STATUSES = {404: "gone", 429: "back_off", 503: "back_off"}
_CODES = {
    code: code.name.lower()
    for code in (
        ExitCode.UNREACHABLE,
        ExitCode.NO_ANSWER,
        ExitCode.NOT_HTTP,
        ExitCode.NOT_THE_API,
        ExitCode.HALF_BODY,
        ExitCode.NOT_AUTHORISED,
        ExitCode.OTHER_STORE,
        ExitCode.REFUSED,
    )
}
OTHER = "other"
REASONS = (*dict.fromkeys(_STATUSES.values()), *_CODES.values(), OTHER)
"""Why a heartbeat can fail, as a closed set."""


def failure_reason(error: ServerError) -> str:
    """Return which of REASONS an error is."""
    by_code = _CODES.get(error.exit_code, OTHER)
    return by_code if error.status is None else _STATUSES.get(error.status, by_code)


class Histogram:
    """A histogram of durations in seconds, by upper bounds."""

    def __init__(self, bounds_s: tuple[float, ...]) -> None:
        self.bounds_s = bounds_s
        self.counts = [0] * (len(bounds_s) + 1)
        self.sum_s = 0.0

    def add(self, seconds: float) -> None:
        self.counts[bisect_left(self.bounds_s, seconds)] += 1
        self.sum_s += seconds


class Stats:
    """The counters of this process. Written by the daemon's parts only.

    Attributes:
        renewed_at: when the newest answered heartbeat was sent (wall clock), or None.
        heard_at: the same on CLOCK_BOOTTIME; minus infinity for never.
        in_flight: the send time of each heartbeat in flight, on CLOCK_BOOTTIME.
        slack_s: how much of L was left at the end of the last demotion, or None.
        min_slack_s: the smallest of those.
        loop_ran_at: the last iteration of the loop, on CLOCK_BOOTTIME, or None before the first.
        guard_fired: whether the guard demoted in place of the previous process.
    """

    def __init__(self) -> None:
        self.heartbeats = Histogram(HEARTBEAT_S)
        self.heartbeats_failed = Counter(dict.fromkeys(REASONS, 0))
        self.renewed_at: datetime | None = None
        self.heard_at = float("-inf")
        self.in_flight: dict[int, float] = {}
        self.role_changes: Counter[tuple[Role, Role, Cause]] = Counter(dict.fromkeys(CHANGES, 0))
        self.hooks = {name: Histogram(HOOK_S) for name in HOOKS}
        self.hooks_ended = Counter({(name, ok): 0 for name in HOOKS for ok in (True, False)})
        self.slack_s: float | None = None
        self.min_slack_s = float("inf")
        self.stalls = Counter({"late": 0, "suspended": 0})
        self.guard_lost = 0
        self.guard_fired = False
        self.future_refused = 0
        self.loop_ran_at: float | None = None
        self._skews_s: deque[float] = deque(maxlen=SKEW_SAMPLES)
        self._skew_of: str | None = None

    def record_role_change(self, change: Publish) -> None:
        """Count a role change."""
        self.role_changes[change.before, change.role, change.cause] += 1

    def record_hook(self, name: str, seconds: float, *, ok: bool) -> None:
        """Count a run of a hook of HOOKS."""
        self.hooks[name].add(seconds)
        self.hooks_ended[name, ok] += 1

    def record_demotion(self, slack_s: float) -> None:
        """Record the slack of a demotion; below 0, two members may have been active."""
        self.slack_s = slack_s
        self.min_slack_s = min(self.min_slack_s, slack_s)

    def record_stall(self, *, suspended: bool) -> None:
        """Count a stall of this process (R2)."""
        self.stalls["suspended" if suspended else "late"] += 1

    def record_answer(
        self, sent: Instant, now: Instant, date: datetime | None, endpoint: str
    ) -> None:
        """Record an answered heartbeat, with the Date header of its answer."""
        self.heartbeats.add(now.mono - sent.mono)
        if sent.mono > self.heard_at:
            self.heard_at, self.renewed_at = sent.mono, sent.wall
        if endpoint != self._skew_of:
            self._skews_s.clear()
            self._skew_of = endpoint
        if date is not None:
            halfway_s = (now.mono - sent.mono) / 2
            self._skews_s.append((now.wall - date).total_seconds() - halfway_s)

    @property
    def skew_s(self) -> float | None:
        """How far this host's clock is ahead of the server's, in seconds; None if unknown."""
        return min(self._skews_s, default=None)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The state of an agent at one moment. ``now`` and all ``_at`` and ``_by`` are on CLOCK_BOOTTIME.

    Attributes:
        phase: of the session.
        session_role: the role of the session, whose lease may have expired since.
        demoting: whether a demotion is under way.
        epoch: the newest epoch seen.
        renew_by: the renewal deadline.
        lease_until: when another member may become primary.
        wake_at: when the session needs its next step at the latest.
        loop_interval_s: the longest interval between two iterations of the loop.
        unfit: why this host is unfit to be primary, by source.
        checks: whether each health check passes, by name.
        guard_up: whether the guard answers; None without a guard.
        refused: refused data-processed times, by reason.
        mqtt_up: whether the role is announced to the MQTT broker; None without one.
        mqtt_failures: failed or lost connections to the broker.
        failsafe: None if it is not configured.
    """

    now: float
    wall: datetime
    group: str
    session_id: str
    timing: Timing
    phase: Phase
    session_role: Role
    demoting: bool
    epoch: int | None
    renew_by: float
    lease_until: float
    wake_at: float
    loop_interval_s: float
    unfit: Mapping[str, str]
    score: float
    checks: Mapping[str, bool]
    data: datetime | None
    group_data: datetime | None
    endpoint: str
    endpoints: tuple[str, ...]
    guard_up: bool | None
    refused: Mapping[str, int]
    mqtt_up: bool | None
    mqtt_failures: int
    notifications_dropped: int
    notifications_failed: int
    stats: Stats
    failsafe: FailsafeSnapshot | None = None

    @property
    def role(self) -> Role:
        """The current role: Secondary from the renewal deadline on."""
        return self.session_role if self.now < self.renew_by else Role.SECONDARY


def why_not_primary(snap: Snapshot) -> str | None:
    """None for a primary before its renewal deadline; else the reason."""
    if snap.role is Role.PRIMARY:
        return None
    if snap.session_role is Role.PRIMARY:
        return f"no renewal, demotion was due {snap.now - snap.renew_by:.3f} s ago"
    return f"this member is {snap.session_role}"


def why_not_secondary(snap: Snapshot) -> str | None:
    """Why this member is not a demoted secondary; None if it is one, whether it is healthy or not."""
    if snap.session_role is not Role.SECONDARY:
        return f"this member is {snap.session_role}"
    if snap.demoting or snap.phase is Phase.STARTING:
        return "the demotion is not done yet"
    return None


def why_not_ready(snap: Snapshot) -> str | None:
    """Why this member neither holds the role nor could take it over; None if it does or could."""
    if snap.phase is not Phase.MEMBER:
        return f"not joined: {snap.phase.value}"
    if snap.unfit:
        return f"unfit to be primary: {'; '.join(snap.unfit.values())}"
    silent_s = snap.now - snap.stats.heard_at
    if snap.role is not Role.PRIMARY and silent_s >= snap.timing.lease_s:
        return f"no heartbeat was answered within {snap.timing.lease_s:g} s"
    return why_not_live(snap)


def why_not_live(snap: Snapshot) -> str | None:
    """Why the agent is stuck; None while its loop iterates and its heartbeats end in time.

    Failed heartbeats are live: a restart of the agent repairs neither coordinator nor network.
    """
    stats, margin_s = snap.stats, snap.timing.margin_s
    if stats.loop_ran_at is None:
        return None  # the start has its own timeouts
    late_s = snap.now - stats.loop_ran_at - snap.loop_interval_s
    if late_s > margin_s:
        return f"the loop has stalled, it is {late_s:.3f} s late"
    late_s = snap.now - snap.wake_at
    if late_s > margin_s:
        return f"the session has stalled, it is {late_s:.3f} s late"
    oldest_s = snap.now - min(stats.in_flight.values(), default=snap.now)
    if oldest_s > snap.timing.request_timeout_s + margin_s:
        return f"renewal has stalled, a heartbeat hangs for {oldest_s:.3f} s"
    return None


PROBES: Mapping[str, Callable[[Snapshot], str | None]] = {
    "livez": why_not_live,
    "readyz": why_not_ready,
    "primary": why_not_primary,
    "secondary": why_not_secondary,
}
"""The function of each probe: it returns None if the answer is yes, else the reason for no."""
