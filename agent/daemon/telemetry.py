"""What an agent knows of itself at one moment: counts, a snapshot, and the verdicts of its probes.

Owns the counts, and what "primary", "ready" and "live" mean to somebody who asks. All is judged by the
deadlines at the moment of asking, never by a role that was noted earlier. Knows nothing of HTTP, nor of
how metrics are written (``metrics`` does).
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
from agent.errors import ExitCode, ServerError
from agent.model import Instant, Role

HEARTBEAT_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Bounds of the histogram. A request takes 10 s at most unless it is configured otherwise."""

HOOK_S = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
"""Likewise of hooks: a promotion is limited to 30 s by default."""

HOOKS = ("primary", "pending_primary", "secondary")

_PROMOTING = frozenset({Cause.CHOSEN, Cause.CONFIRMED})

CHANGES = tuple(
    (before, after, cause)
    for before, after in TRANSITIONS
    for cause in Cause
    if (cause in _PROMOTING) is (after is not Role.SECONDARY)
)
"""Every possible change of role with its cause. They are told from 0 on: a rate sees the first one."""

SKEWS = 16
"""Readings of the server's clock that are remembered. A Date header has whole seconds, cut off: the
smallest difference among so many is within some tenths of the truth. A server that renews its Date by a
timer of its own, once a second, adds the phase of that timer, up to a second; our coordinator does not."""

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


def reason_of(error: ServerError) -> str:
    """Which of REASONS an error is."""
    by_code = _CODES.get(error.exit_code, OTHER)
    return by_code if error.status is None else _STATUSES.get(error.status, by_code)


class Histogram:
    """Seconds, counted by upper bounds."""

    def __init__(self, bounds_s: tuple[float, ...]) -> None:
        self.bounds_s = bounds_s
        self.counts = [0] * (len(bounds_s) + 1)
        self.sum_s = 0.0

    def add(self, seconds: float) -> None:
        self.counts[bisect_left(self.bounds_s, seconds)] += 1
        self.sum_s += seconds


class Stats:
    """What has happened since the start of this process. Written by the daemon's parts only.

    Attributes:
        renewed_at: when the newest heartbeat was sent that was answered (wall clock), or None.
        heard_at: the same on CLOCK_BOOTTIME; minus infinity for never.
        asked_at: when each heartbeat was sent that is under way, on CLOCK_BOOTTIME.
        slack_s: how much of L was left when the last demotion was done, or None.
        least_slack_s: the smallest of those.
        turned_at: when the pump last turned, on CLOCK_BOOTTIME, or None before it does.
        guard_fired: whether the process before this one was ended by its guard.
    """

    def __init__(self) -> None:
        self.beats = Histogram(HEARTBEAT_S)
        self.beats_failed = Counter(dict.fromkeys(REASONS, 0))
        self.renewed_at: datetime | None = None
        self.heard_at = float("-inf")
        self.asked_at: dict[int, float] = {}
        self.changes: Counter[tuple[Role, Role, Cause]] = Counter(dict.fromkeys(CHANGES, 0))
        self.hooks = {name: Histogram(HOOK_S) for name in HOOKS}
        self.hooks_ended = Counter({(name, ok): 0 for name in HOOKS for ok in (True, False)})
        self.slack_s: float | None = None
        self.least_slack_s = float("inf")
        self.stalls = Counter({"late": 0, "suspended": 0})
        self.guard_lost = 0
        self.guard_fired = False
        self.future_refused = 0
        self.turned_at: float | None = None
        self._skews_s: deque[float] = deque(maxlen=SKEWS)
        self._skew_of: str | None = None

    def changed(self, change: Publish) -> None:
        """A role was published."""
        self.changes[change.before, change.role, change.cause] += 1

    def hook_ended(self, name: str, seconds: float, *, ok: bool) -> None:
        """A hook of HOOKS has ended."""
        self.hooks[name].add(seconds)
        self.hooks_ended[name, ok] += 1

    def demoted(self, slack_s: float) -> None:
        """A demotion is done; less than 0 breaks the promise."""
        self.slack_s = slack_s
        self.least_slack_s = min(self.least_slack_s, slack_s)

    def stalled(self, *, suspended: bool) -> None:
        """This process did not run for a while (R2)."""
        self.stalls["suspended" if suspended else "late"] += 1

    def answered(self, sent: Instant, now: Instant, date: datetime | None, endpoint: str) -> None:
        """A heartbeat that was sent then to that endpoint was answered, with that Date or none."""
        self.beats.add(now.mono - sent.mono)
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
        """How far this host's clock is ahead of the server's, in seconds; None if it is not known."""
        return min(self._skews_s, default=None)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One moment. ``now`` and all ``_at`` and ``_by`` are on CLOCK_BOOTTIME.

    Attributes:
        phase: how far the session is.
        said: the role of the session, whose lease may have ended since.
        demoting: whether a demotion is under way.
        epoch: the newest that was seen.
        renew_by: when demotion starts unless a heartbeat is answered.
        lease_until: when somebody else may become primary.
        wake_at: when the session wants to be asked again at the latest.
        turn_s: how often the pump turns at least.
        unfit: why this host may not be primary, by source.
        checks: whether each health check passes, by name.
        guard_up: whether the guard answers; None without a guard.
        refused: data-processed times that were refused, by reason.
        mqtt_up: whether the role is announced to the broker; None if there is none to tell.
        mqtt_failures: connections to it that failed or were lost.
    """

    now: float
    wall: datetime
    group: str
    session_id: str
    timing: Timing
    phase: Phase
    said: Role
    demoting: bool
    epoch: int | None
    renew_by: float
    lease_until: float
    wake_at: float
    turn_s: float
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

    @property
    def role(self) -> Role:
        """The role at this very moment: no lease, no Primary and no PendingPrimary."""
        return self.said if self.now < self.renew_by else Role.SECONDARY


def why_not_primary(snap: Snapshot) -> str | None:
    """None for a primary whose lease runs at this moment; else a sentence."""
    if snap.role is Role.PRIMARY:
        return None
    if snap.said is Role.PRIMARY:
        return f"no renewal, demotion was due {snap.now - snap.renew_by:.3f} s ago"
    return f"this member is {snap.said}"


def why_not_secondary(snap: Snapshot) -> str | None:
    """None for a secondary whose demotion is done, whatever its health; else a sentence."""
    if snap.said is not Role.SECONDARY:
        return f"this member is {snap.said}"
    if snap.demoting or snap.phase is Phase.STARTING:
        return "the demotion is not done yet"
    return None


def why_not_ready(snap: Snapshot) -> str | None:
    """None for a member that holds the role or could take it over; else a sentence."""
    if snap.phase is not Phase.MEMBER:
        return f"not joined: {snap.phase.value}"
    if snap.unfit:
        return f"unfit to be primary: {'; '.join(snap.unfit.values())}"
    silent_s = snap.now - snap.stats.heard_at
    if silent_s >= snap.timing.lease_s:
        return f"no heartbeat was answered within {snap.timing.lease_s:g} s"
    return why_not_live(snap)


def why_not_live(snap: Snapshot) -> str | None:
    """None while the loop turns and heartbeats are sent and end; else a sentence.

    Heartbeats that fail are alive: to start an agent anew repairs no coordinator and no network.
    """
    stats, margin_s = snap.stats, snap.timing.margin_s
    if stats.turned_at is None:
        return None  # the start has limits of its own
    late_s = snap.now - stats.turned_at - snap.turn_s
    if late_s > margin_s:
        return f"the loop has stalled, it is {late_s:.3f} s late"
    late_s = snap.now - snap.wake_at
    if late_s > margin_s:
        return f"the session has stalled, it is {late_s:.3f} s late"
    oldest_s = snap.now - min(stats.asked_at.values(), default=snap.now)
    if oldest_s > snap.timing.request_timeout_s + margin_s:
        return f"renewal has stalled, a heartbeat hangs for {oldest_s:.3f} s"
    return None


PROBES: Mapping[str, Callable[[Snapshot], str | None]] = {
    "livez": why_not_live,
    "readyz": why_not_ready,
    "primary": why_not_primary,
    "secondary": why_not_secondary,
}
"""Each question with what answers it: why not, or None."""
