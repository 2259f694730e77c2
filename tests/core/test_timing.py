"""R1: how a lease is divided, and which budgets are refused."""

import math
from dataclasses import fields

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.core.timing import (
    DRIFT,
    LONGEST_BEAT_S,
    LONGEST_LEASE_S,
    SHORTEST_LEASE_S,
    Budget,
    Timing,
    divide,
    plan,
    smallest_lease_s,
)
from agent.errors import ExitCode, TimingError

steady = settings(deadline=None, derandomize=True)
PARTS = [f.name for f in fields(Budget)]


def holds(timing: Timing) -> bool:
    """R1, written out once more."""
    slack = 1e-6
    return (
        timing.renew_s + timing.demote_s + timing.margin_s <= timing.lease_s + slack
        and 2 * timing.heartbeat_interval_s <= timing.renew_s + slack
        and timing.request_timeout_s < timing.renew_s / 2
        and timing.margin_s >= DRIFT * timing.lease_s - slack
        and min(
            timing.renew_s, timing.demote_s, timing.heartbeat_interval_s, timing.request_timeout_s
        )
        > 0
    )


@steady
@given(st.floats(SHORTEST_LEASE_S, LONGEST_LEASE_S))
def test_r1_holds_by_default_for_every_lease_from_the_shortest_to_24_days(lease_s: float) -> None:
    timing = plan(lease_s)
    assert holds(timing)
    assert timing.heartbeat_interval_s <= LONGEST_BEAT_S
    assert all(held for _, held in timing.rules())


@steady
@given(
    st.floats(SHORTEST_LEASE_S, 1000),
    st.builds(Budget, **dict.fromkeys(PARTS, st.none() | st.floats(0.001, 100))),
)
def test_r1_a_budget_either_fits_or_is_refused_with_a_lease_that_fits(
    lease_s: float, budget: Budget
) -> None:
    try:
        timing = plan(lease_s, budget)
    except TimingError as error:
        smallest_s = error.smallest_lease_s
        assert smallest_s == math.inf or holds(plan(smallest_s, budget))
    else:
        assert holds(timing)
        asked = {p: getattr(budget, p) for p in PARTS if getattr(budget, p) is not None}
        assert asked == {p: getattr(timing, p) for p in asked}


@pytest.mark.parametrize(
    ("budget", "rule"),
    [
        (Budget(renew_s=6, demote_s=3, margin_s=2), "renew 6 + demote 3 + margin 2 = 11 <="),
        (Budget(heartbeat_interval_s=4), "2 x beat 4 = 8 <= renew"),
        (Budget(request_timeout_s=4), "request timeout 4 < renew / 2"),
        (Budget(margin_s=0.05), "margin 0.05 >= 1% drift of 10 = 0.1"),
        (Budget(demote_s=12), "demote 12 + margin 1 < failover timeout 10"),
    ],
)
def test_r1_a_broken_relation_is_named_with_its_numbers(budget: Budget, rule: str) -> None:
    with pytest.raises(TimingError) as refused:
        plan(10, budget)
    assert rule in str(refused.value)
    assert refused.value.exit_code is ExitCode.TIMING


@pytest.mark.parametrize(
    "budget",
    [
        Budget(heartbeat_interval_s=4),
        Budget(demote_s=12),
        Budget(renew_s=6, demote_s=3, margin_s=2),
    ],
)
def test_r1_the_smallest_lease_that_fits_is_the_smallest(budget: Budget) -> None:
    smallest_s = smallest_lease_s(budget)
    assert holds(plan(smallest_s, budget))
    with pytest.raises(TimingError, match=f"that fits these budgets is {smallest_s:g} s"):
        plan(smallest_s - 0.02, budget)


def test_r1_a_lease_without_time_to_renew_does_not_fit() -> None:
    """Demote 1 + margin 2 is 3: the smallest lease is just longer."""
    budget = Budget(demote_s=1, margin_s=2)
    assert smallest_lease_s(budget) == pytest.approx(3.01)
    assert holds(plan(smallest_lease_s(budget), budget))


def test_r1_a_margin_below_the_drift_of_every_lease_has_no_smallest_lease() -> None:
    with pytest.raises(TimingError, match="no failover timeout fits") as refused:
        plan(10, Budget(margin_s=0.001))
    assert refused.value.smallest_lease_s == math.inf


@pytest.mark.parametrize("lease_s", [0.0, -1.0, 0.19, LONGEST_LEASE_S + 1, math.inf, math.nan])
def test_r1_a_lease_out_of_range_is_refused(lease_s: float) -> None:
    with pytest.raises(TimingError, match="out of range"):
        plan(lease_s)


def test_r1_rounding_of_floats_does_not_break_a_budget() -> None:
    """0.1 + 0.2 is more than 0.3 by 4e-17."""
    assert plan(0.3, Budget(renew_s=0.2, demote_s=0.07, margin_s=0.03)).renew_s == 0.2


def test_r1_failsafe_allows_two_questions_after_a_silence_by_default() -> None:
    timing = plan(10.0, Budget(failsafe=True))
    beat_s = timing.heartbeat_interval_s
    assert timing.doubt_s == pytest.approx(6.5 / 8)
    assert timing.question_interval_s == pytest.approx(6.5 / 6)
    assert beat_s + timing.doubt_s + 2 * timing.question_interval_s <= timing.renew_s


def test_r1_failsafe_notices_a_silence_within_5_s_of_a_long_lease() -> None:
    timing = plan(LONGEST_LEASE_S, Budget(failsafe=True))
    assert (timing.doubt_s, timing.question_interval_s) == (5.0, 5.0)


def test_r1_failsafe_shows_how_much_of_r_its_questions_take() -> None:
    """A beat of at most R / 2 leaves room for two of them, so no other relation can break this one."""
    rules = dict(divide(10.0, Budget(heartbeat_interval_s=4, failsafe=True)).rules())
    assert rules["beat 4 + doubt 0.8125 + 2 x question 1.08333 = 6.97917 <= renew 6.5"] is False


def test_r1_failsafe_refuses_a_lease_below_one_second() -> None:
    with pytest.raises(TimingError, match=r"failover timeout 0\.9 >= 1, with failsafe") as refused:
        plan(0.9, Budget(failsafe=True))
    assert refused.value.smallest_lease_s == pytest.approx(1.0, abs=0.011)
