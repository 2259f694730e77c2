"""The time budget of a lease (R1): how FailoverTimeout L is divided, and whether it holds.

All durations are seconds. Everything on the agent's side is counted from the moment at which a
heartbeat *request was sent*; the coordinator counts L from the moment at which it *received* it,
which is later, so whatever the network does the agent's end comes first.

    sent                    R: renewal is due      R+D: demotion is done    L: another may be chosen
      |------- renew_s ------------|------- demote_s ------|--- margin_s ---|

What is not promised: nothing here helps against a clock that runs faster than ``drift`` says.
"""

import math
from dataclasses import dataclass

from agent.errors import TimingError

DRIFT = 0.01
"""By how much the rates of two hosts' clocks may differ (share). Crystal clocks stay under 0.0002;
1 % leaves room for virtual machines that lose ticks."""

MARGIN_SHARE = 0.10
"""Share of L kept free by default: drift, and how late the agent's loop may be before it counts as
frozen (R2)."""

DEMOTE_SHARE = 0.25
"""Share of L for the demotion hook by default."""

LONGEST_BEAT_S = 10.0
"""However long L is, a heartbeat this often keeps the data-processed time fresh."""

SHORTEST_LEASE_S = 0.2
"""Under this, scheduling delays of an ordinary host are longer than the margin."""

LONGEST_LEASE_S = 24 * 24 * 3600.0
"""24 days: what v1 clients can express as a timer in milliseconds (2**31)."""

SPLIT_TOLERANCE_S = 1e-9
"""Rounding of sums of floats; a nanosecond of a lease does not matter, refusing 0.1+0.2 would."""


@dataclass(frozen=True, slots=True)
class Timing:
    """A budget for which R1 holds. Make one by ``plan``.

    Attributes:
        lease_s: L, the group's FailoverTimeout.
        renew_s: R, without renewal for this long demotion starts.
        demote_s: D, after which what still runs is killed.
        margin_s: M, kept free for drift and for scheduling.
        beat_s: time between two heartbeats.
        request_timeout_s: how long one request may take, of its sending and answering together.
    """

    lease_s: float
    renew_s: float
    demote_s: float
    margin_s: float
    beat_s: float
    request_timeout_s: float

    @property
    def drift_s(self) -> float:
        """What of the margin is for clocks that run at different rates; nothing else may use it."""
        return DRIFT * self.lease_s

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
                f"2 x beat {self.beat_s:g} = {2 * self.beat_s:g} <= renew {self.renew_s:g}",
                2 * self.beat_s <= self.renew_s + SPLIT_TOLERANCE_S,
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
        )


@dataclass(frozen=True, slots=True)
class Budget:
    """What a person asked for; None leaves a part to ``plan``. Seconds."""

    renew_s: float | None = None
    demote_s: float | None = None
    margin_s: float | None = None
    beat_s: float | None = None
    request_timeout_s: float | None = None


def divide(lease_s: float, budget: Budget) -> Timing:
    """What ``plan`` checks, unchecked: only for showing which rule is broken."""
    margin = budget.margin_s if budget.margin_s is not None else MARGIN_SHARE * lease_s
    demote = budget.demote_s if budget.demote_s is not None else DEMOTE_SHARE * lease_s
    renew = budget.renew_s if budget.renew_s is not None else lease_s - demote - margin
    beat = budget.beat_s if budget.beat_s is not None else min(renew / 3, LONGEST_BEAT_S)
    request = budget.request_timeout_s
    if request is None:
        request = min(renew / 3, LONGEST_BEAT_S)
    return Timing(lease_s, renew, demote, margin, beat, request)


def smallest_lease_s(budget: Budget) -> float:
    """The shortest L that the asked-for parts fit in, rounded up to 10 ms."""

    def fits(lease_s: float) -> bool:
        timing = divide(lease_s, budget)
        return timing.renew_s > 0 and all(holds for _, holds in timing.rules())

    low, high = SHORTEST_LEASE_S, LONGEST_LEASE_S
    if budget.margin_s is not None:
        high = min(high, budget.margin_s / DRIFT)  # a longer lease drifts by more than this margin
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
        TimingError: the parts do not fit; the message has the rule that is broken, with its numbers,
            and the smallest L that would do.
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
                rule = (  # noqa: PLW2901 - said in terms of what was set
                    f"demote {timing.demote_s:g} + margin {timing.margin_s:g}"
                    f" < failover timeout {lease_s:g}"
                )
            right = (
                f"the smallest failover timeout that fits these budgets is {smallest:g} s"
                if math.isfinite(smallest)
                else "no failover timeout fits these budgets: change the part that the rule names"
            )
            raise TimingError(
                f"timings break R1: {rule} does not hold (seconds); {right}",
                smallest_lease_s=smallest,
            )
    return timing
