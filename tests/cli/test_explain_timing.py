"""explain-timing: the picture of R1, for any budget, on 80 columns."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.cli.explain_timing import count_questions, explain
from agent.core.timing import (
    LONGEST_LEASE_S,
    SHORTEST_FAILSAFE_LEASE_S,
    SHORTEST_LEASE_S,
    Budget,
    divide,
    smallest_lease_s,
)
from agent.errors import ExitCode

Cli = Callable[..., tuple[int, str, str]]

PICTURE = """\
Failover timeout 10 s, counted from the sending of a heartbeat:

  0                                              R                 D      L
  |==============================================|#################|......|
  ^               ^              ^               ^

  = renew                  6.500 s  R: if not renewed by then, demotion starts
  # demote                 2.500 s  D: demotion; then what still runs is killed
  . margin                 1.000 s  M: kept free for clock drift and lateness
  L failover timeout      10.000 s  then another member may be chosen
  ^ beat                   2.167 s  from one heartbeat to the next
    request timeout        2.167 s  for one heartbeat and its answer

  holds   renew 6.5 + demote 2.5 + margin 1 = 10 <= failover timeout 10
  holds   2 x beat 2.16667 = 4.33333 <= renew 6.5
  holds   request timeout 2.16667 < renew / 2 = 3.25
  holds   margin 1 >= 1% drift of 10 = 0.1

Smallest failover timeout that fits these budgets: 0.2 s
"""

part = st.none() | st.floats(min_value=1e-6, max_value=LONGEST_LEASE_S)


def test_the_default_budget_is_drawn(cli: Cli) -> None:
    assert cli("explain-timing") == (0, PICTURE, "")


def test_a_budget_that_breaks_r1_is_drawn_with_the_broken_rule_and_the_smallest_lease(
    cli: Cli,
) -> None:
    code, out, err = cli("explain-timing", "--failover-timeout=2", "--demote=1", "--renew=1.5")
    assert code == ExitCode.TIMING
    broken = [line for line in out.splitlines() if "BROKEN" in line]
    assert broken == ["  BROKEN  renew 1.5 + demote 1 + margin 0.2 = 2.7 <= failover timeout 2"]
    assert "fits these budgets: 2.78 s" in out
    assert err.count("\n") == 1
    assert cli("explain-timing", "--failover-timeout=2.78", "--demote=1", "--renew=1.5")[0] == 0


def test_a_budget_that_fits_no_lease_is_refused_with_that_reason(cli: Cli) -> None:
    code, out, _ = cli("explain-timing", "--beat", "2", "--renew", "1", "--json")
    assert code == ExitCode.TIMING
    assert json.loads(out)["smallest_lease_s"] is None
    assert "budgets: none" in cli("explain-timing", "--beat", "2", "--renew", "1")[1]


def test_json_has_the_same_numbers(cli: Cli) -> None:
    code, out, _ = cli("explain-timing", "--failover-timeout", "PT20S", "--json")
    told = json.loads(out)
    assert code == 0
    assert (told["lease_s"], told["renew_s"], told["smallest_lease_s"]) == (20.0, 13.0, 0.2)
    assert [rule["holds"] for rule in told["rules"]] == [True] * 4


@pytest.mark.parametrize("lease_s", ["0", "-3"])
@pytest.mark.parametrize("form", [(), ("--json",)])
def test_a_failover_timeout_that_is_not_positive_is_refused_and_not_drawn(
    cli: Cli, lease_s: str, form: tuple[str, ...]
) -> None:
    """It ended in an IndexError or a ZeroDivisionError."""
    code, out, err = cli("explain-timing", "--failover-timeout", lease_s, *form)
    assert (code, out) == (ExitCode.TIMING, "")
    assert f"failover timeout {lease_s} s is out of range: it must be from 0.2 s to 24 days" in err


@pytest.mark.parametrize("lease_s", ["1e-300", "0.0001", "1e300"])
def test_a_failover_timeout_out_of_range_is_drawn_and_refused(cli: Cli, lease_s: str) -> None:
    code, out, err = cli("explain-timing", "--failover-timeout", lease_s)
    assert code == ExitCode.TIMING
    assert "R" in out.splitlines()[2]
    assert "is out of range" in err


@pytest.mark.parametrize("lease_s", [SHORTEST_LEASE_S, 0.5, LONGEST_LEASE_S])
def test_the_ends_of_the_range_hold(cli: Cli, lease_s: float) -> None:
    assert cli("explain-timing", "--failover-timeout", str(lease_s))[0] == 0


@given(
    lease_s=st.floats(min_value=SHORTEST_LEASE_S, max_value=LONGEST_LEASE_S),
    budget=st.builds(
        Budget,
        renew_s=part,
        demote_s=part,
        margin_s=part,
        heartbeat_interval_s=part,
        request_timeout_s=part,
        failsafe=st.booleans(),
    ),
)
def test_any_budget_fits_into_80_columns(lease_s: float, budget: Budget) -> None:
    lines = explain(divide(lease_s, budget), smallest_lease_s(budget))
    assert max(map(len, lines)) <= 80
    assert "L" in lines[2]
    assert all(line.isascii() for line in lines)


FAILSAFE = """\
Failover timeout 10 s, counted from the sending of a heartbeat:

  0                                              R                 D      L
  |==============================================|#################|......|
  ^               ^    ?       ? ^     ?       ? ^

  = renew                  6.500 s  R: if not renewed by then, demotion starts
  # demote                 2.500 s  D: demotion; then what still runs is killed
  . margin                 1.000 s  M: kept free for clock drift and lateness
  L failover timeout      10.000 s  then another member may be chosen
  ^ beat                   2.167 s  from one heartbeat to the next
    request timeout        2.167 s  for one heartbeat and its answer
    doubt                  0.812 s  after this silence other members are asked
  ? question               1.083 s  from one question to the next

Questions within R: 4, the first after 2.97917 s at the latest

  holds   renew 6.5 + demote 2.5 + margin 1 = 10 <= failover timeout 10
  holds   2 x beat 2.16667 = 4.33333 <= renew 6.5
  holds   request timeout 2.16667 < renew / 2 = 3.25
  holds   margin 1 >= 1% drift of 10 = 0.1
  holds   beat 2.16667 + doubt 0.8125 + 2 x question 1.08333 = 5.14583 <=
          renew 6.5
  holds   failover timeout 10 >= 1, with failsafe

Smallest failover timeout that fits these budgets: 1.01 s
"""


@pytest.fixture
def failsafe(tmp_path: Path) -> tuple[str, str]:
    secret = tmp_path / "secret"
    secret.write_text("a secret of the whole group\n")
    secret.chmod(0o600)
    return "--failsafe-listen=192.0.2.1:5480", f"--failsafe-secret-file={secret}"


def test_the_questions_of_failsafe_are_drawn(cli: Cli, failsafe: tuple[str, str]) -> None:
    assert cli("explain-timing", *failsafe) == (0, FAILSAFE, "")


def test_the_questions_of_failsafe_are_in_the_document(cli: Cli, failsafe: tuple[str, str]) -> None:
    document = json.loads(cli("explain-timing", "--json", *failsafe)[1])
    assert (document["questions"], document["doubt_s"]) == (4, 0.8125)
    assert "questions" not in json.loads(cli("explain-timing", "--json")[1])


def test_a_lease_that_failsafe_does_not_fit_into_is_refused(
    cli: Cli, failsafe: tuple[str, str]
) -> None:
    flags = ("--failover-timeout=0.9",)
    code, out, err = cli("explain-timing", *failsafe, *flags)
    assert code == ExitCode.TIMING
    assert "failover timeout 0.9 >= 1, with failsafe" in err
    assert "BROKEN  failover timeout 0.9 >= 1" in out
    assert cli("explain-timing", *flags)[0] == 0


@given(
    st.floats(min_value=SHORTEST_FAILSAFE_LEASE_S, max_value=LONGEST_LEASE_S),
    st.builds(Budget, part, part, part, part, part, st.just(True)),
)
def test_two_questions_fit_wherever_r1_holds(lease_s: float, budget: Budget) -> None:
    timing = divide(lease_s, budget)
    if timing.renew_s > 0 and all(holds for _, holds in timing.rules()):
        assert count_questions(timing) >= 2
