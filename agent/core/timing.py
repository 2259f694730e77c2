"""The time budget of a lease (R1): how FailoverTimeout L is divided, and whether the parts fit.

All durations are seconds. The agent counts from the moment at which a heartbeat *request was sent*; the
coordinator counts L from the moment at which it *received* the request. That is later, so the agent's
lease always ends first.

    sent                    R: renewal is due      R+D: demotion is done    L: another may be chosen
      |------- renew_s ------------|------- demote_s ------|--- margin_s ---|

What is not promised: nothing here helps against a clock that runs faster than ``DRIFT`` allows.
"""

import math
from dataclasses import dataclass

from agent.errors import TimingError

DRIFT = 0.01
"""The tolerated difference of two clocks' rates (share). Crystal clocks stay under 0.0002; 1 % allows
for virtual machines that lose ticks."""

MARGIN_SHARE = 0.10
"""Default share of L for the margin: drift, and how late the agent's loop may be before it counts as
frozen (R2)."""

DEMOTE_SHARE = 0.25
"""Default share of L for the demotion hook."""

DOUBT_SHARE = 1 / 8
"""If a heartbeat is unanswered for this share of R, the coordinator is in doubt (R26)."""

QUESTION_SHARE = 1 / 6
"""Interval between two questions to the other members, and timeout of each, as a share of R (R27)."""

LONGEST_DOUBT_S = 5.0
LONGEST_QUESTION_S = 5.0
"""Caps on these two times, so that a failure is noticed soon even with a long L."""

SHORTEST_FAILSAFE_LEASE_S = 1.0
"""The shortest lease with failsafe: with less an ordinary host cannot send and answer questions in time."""

LONGEST_BEAT_S = 10.0
"""Cap on the heartbeat interval: the data-processed time stays fresh however long L is."""

SHORTEST_LEASE_S = 0.2
"""With a shorter lease, scheduling delays of an ordinary host exceed the margin."""

LONGEST_LEASE_S = 24 * 24 * 3600.0
"""24 days: the longest timer of v1 clients (2**31 ms)."""

INTERVAL_SHARE = 0.05
LONGEST_INTERVAL_S = 1.0
"""Minimum interval between heartbeats: L/20, at most 1 s (docs/api.md, "Sessions and heartbeats")."""

SPLIT_TOLERANCE_S = 1e-9
"""Tolerance for sums of floats, such as 0.1 + 0.2; a nanosecond of a lease does not matter."""


@dataclass(frozen=True, slots=True)
class Timing:
    """A budget for which R1 holds. Build it by ``plan``.

    Attributes:
        lease_s: L, the group's FailoverTimeout.
        renew_s: R, the time without renewal after which demotion starts.
        demote_s: D, the demotion budget; processes that are left at its end are killed.
        margin_s: M, reserved for drift and scheduling.
        heartbeat_interval_s: time between two heartbeats.
        request_timeout_s: timeout of one request, from sending it to its answer.
        failsafe: whether failsafe's questions have to fit into R, too.
    """

    lease_s: float
    renew_s: float
    demote_s: float
    margin_s: float
    heartbeat_interval_s: float
    request_timeout_s: float
    failsafe: bool = False

    @property
    def drift_s(self) -> float:
        """The part of the margin that is reserved for clock drift."""
        return DRIFT * self.lease_s

    @property
    def doubt_s(self) -> float:
        """How long a heartbeat may be unanswered before the coordinator is in doubt (R26)."""
        return min(DOUBT_SHARE * self.renew_s, LONGEST_DOUBT_S)

    @property
    def question_interval_s(self) -> float:
        """The time between two questions to the same member, and the timeout of each (R27)."""
        return min(QUESTION_SHARE * self.renew_s, LONGEST_QUESTION_S)

    def _failsafe_rules(self) -> tuple[tuple[str, bool], ...]:
        """The relations that failsafe adds: after a silence, two questions have to fit into R."""
        if not self.failsafe:
            return ()
        beat, doubt, question = self.heartbeat_interval_s, self.doubt_s, self.question_interval_s
        asked_s = beat + doubt + 2 * question
        return (
            (
                f"beat {beat:g} + doubt {doubt:g} + 2 x question {question:g} = {asked_s:g}"
                f" <= renew {self.renew_s:g}",
                asked_s <= self.renew_s + SPLIT_TOLERANCE_S,
            ),
            (
                f"failover timeout {self.lease_s:g} >= {SHORTEST_FAILSAFE_LEASE_S:g}, with failsafe",
                self.lease_s >= SHORTEST_FAILSAFE_LEASE_S - SPLIT_TOLERANCE_S,
            ),
        )

    def rules(self) -> tuple[tuple[str, bool], ...]:
        """Each relation of R1 with its numbers, and whether it holds."""
        spent = self.renew_s + self.demote_s + self.margin_s
        return (
            (
                f"renew {self.renew_s:g} + demote {self.demote_s:g} + margin {self.margin_s:g}"
                f" = {spent:g} <= failover timeout {self.lease_s:g}",
                spent <= self.lease_s + SPLIT_TOLERANCE_S,
            ),
            (
                f"2 x beat {self.heartbeat_interval_s:g} = {2 * self.heartbeat_interval_s:g} <= renew {self.renew_s:g}",
                2 * self.heartbeat_interval_s <= self.renew_s + SPLIT_TOLERANCE_S,
            ),
            (
                f"request timeout {self.request_timeout_s:g} < renew / 2 = {self.renew_s / 2:g}",
                self.request_timeout_s < self.renew_s / 2,
            ),
            (
                f"margin {self.margin_s:g} >= {DRIFT:.0%} drift of {self.lease_s:g}"
                f" = {DRIFT * self.lease_s:g}",
                self.margin_s >= DRIFT * self.lease_s - SPLIT_TOLERANCE_S,
            ),
            *self._failsafe_rules(),
        )


@dataclass(frozen=True, slots=True)
class Budget:
    """The configured parts of a timing, in seconds; None leaves a part to ``plan``.

    Attributes:
        failsafe: whether the member takes part in failsafe.
    """

    renew_s: float | None = None
    demote_s: float | None = None
    margin_s: float | None = None
    heartbeat_interval_s: float | None = None
    request_timeout_s: float | None = None
    failsafe: bool = False


def minimum_interval_s(lease_s: float) -> float:
    """The minimum interval between two heartbeats of one session, in seconds."""
    return min(lease_s * INTERVAL_SHARE, LONGEST_INTERVAL_S)


def divide(lease_s: float, budget: Budget) -> Timing:
    """Divide L without checking R1: only for showing which rule is broken."""
    margin = budget.margin_s if budget.margin_s is not None else MARGIN_SHARE * lease_s
    demote = budget.demote_s if budget.demote_s is not None else DEMOTE_SHARE * lease_s
    renew = budget.renew_s if budget.renew_s is not None else lease_s - demote - margin
    interval = (
        budget.heartbeat_interval_s
        if budget.heartbeat_interval_s is not None
        else min(renew / 3, LONGEST_BEAT_S)
    )
    request = budget.request_timeout_s
    if request is None:
        request = min(renew / 3, LONGEST_BEAT_S)
    return Timing(lease_s, renew, demote, margin, interval, request, budget.failsafe)


def smallest_lease_s(budget: Budget) -> float:
    """The shortest L that the configured parts fit in, rounded up to 10 ms."""

    def fits(lease_s: float) -> bool:
        timing = divide(lease_s, budget)
        return timing.renew_s > 0 and all(holds for _, holds in timing.rules())

    low, high = SHORTEST_LEASE_S, LONGEST_LEASE_S
    if budget.margin_s is not None:
        high = min(high, budget.margin_s / DRIFT)  # the drift of a longer lease exceeds this margin
    if high < low or not fits(high):
        return math.inf
    if fits(low):
        return low
    while high - low > 1e-4:  # noqa: PLR2004 - a hundredth of what is reported
        middle = (low + high) / 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    rounded_s = math.ceil(round(high * 100, 2)) / 100
    return rounded_s if fits(rounded_s) else rounded_s + 0.01


def plan(lease_s: float, budget: Budget | None = None) -> Timing:
    """Divide L into the parts of R1.

    Raises:
        TimingError: the parts do not fit; the message has the broken rule with its numbers, and the
            smallest L that fits.
    """
    budget = budget or Budget()
    timing = divide(lease_s, budget)
    if not SHORTEST_LEASE_S <= lease_s <= LONGEST_LEASE_S:
        raise TimingError(
            f"failover timeout {lease_s:g} s is out of range:"
            f" it must be from {SHORTEST_LEASE_S:g} s to 24 days",
            smallest_lease_s=SHORTEST_LEASE_S,
        )
    for rule, holds in timing.rules():
        if timing.renew_s <= 0 or not holds:
            smallest = smallest_lease_s(budget)
            if timing.renew_s <= 0:
                rule = (  # noqa: PLW2901 - in terms of the settings
                    f"demote {timing.demote_s:g} + margin {timing.margin_s:g}"
                    f" < failover timeout {lease_s:g}"
                )
            right = (
                f"the smallest failover timeout that fits these budgets is {smallest:g} s"
                if math.isfinite(smallest)
                else "no failover timeout fits these budgets: change the part that the rule names"
            )
            raise TimingError(
                f"timings break R1, which requires {rule} (seconds); {right}",
                smallest_lease_s=smallest,
            )
    return timing
