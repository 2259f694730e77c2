"""The agent's side of one session: R2-R8, with the answers of every kind of server."""

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.core.effects import (
    Cause,
    Effect,
    Escalate,
    Exit,
    Join,
    KillHook,
    Leave,
    Publish,
    Release,
    SendHeartbeat,
    StartHook,
    TermHook,
)
from agent.core.events import (
    Event,
    FitnessChanged,
    HeartbeatAnswered,
    HeartbeatFailed,
    HeartbeatFailure,
    HookEnded,
    Joined,
    Left,
    Released,
    Stalled,
    StatusRead,
    Stop,
    Tick,
)
from agent.core.heartbeats import MAX_CONFIRMATIONS, MAX_IN_FLIGHT
from agent.core.session import MIN_PROMOTION_SHARE, Phase
from agent.core.timing import Budget, minimum_interval_s, plan
from agent.errors import ExitCode
from agent.model import GroupStatus, HeartbeatAnswer, Role

from .session_bench import (
    DATA,
    LEASE_S,
    NEVER,
    NO_HOOKS,
    OTHER_STORE,
    STORE,
    TIMING,
    Answer,
    Bench,
    P,
    S,
    W,
    addressed,
    kinds,
    numbers,
    status,
    v1,
)

# -- R2 ---------------------------------------------------------------------------------------------


def test_r2_the_first_deadline_is_minus_infinity() -> None:
    """Right after boot the clock is near 0; a deadline of 0 would be in the future."""
    session = Bench(now=0.0).session
    assert (session.renew_by, session.sent_at, session.lease_until) == (NEVER, NEVER, NEVER)


def test_r2_after_a_demotion_the_deadline_is_minus_infinity_again() -> None:
    bench = Bench().primary()
    bench.answered(Answer(S, 1, 6))
    assert (bench.session.renew_by, bench.session.lease_until) == (NEVER, NEVER)


def test_r2_a_stalled_primary_demotes_before_its_next_heartbeat() -> None:
    bench = Bench(hooks={S}).primary()
    assert kinds(bench.step(Stalled(1.5), after_s=1.5)) == [(Publish, S), (StartHook, S)]
    assert kinds(bench.ends()) == [Release, SendHeartbeat]


def test_r2_a_heartbeat_from_before_a_stall_does_not_promote() -> None:
    bench = Bench().member()
    before = bench.beat
    bench.step(Stalled(1.5), after_s=1.5)
    bench.answered(Answer(P), beat=before)
    assert bench.session.role is S


def test_r2_a_stalled_secondary_sends_a_heartbeat_at_once() -> None:
    bench = Bench().member()
    bench.answered(Answer(S))
    assert kinds(bench.step(Stalled(1.5), after_s=1.5)) == [SendHeartbeat]


def test_r2_deadlines_are_checked_before_the_event() -> None:
    """An answer that was queued while its process was frozen renews nothing."""
    bench = Bench(hooks={S}).primary()
    bench.wake()
    effects = bench.answered(Answer(P), after_s=TIMING.renew_s)
    assert kinds(effects) == [(Publish, S), (StartHook, S)]


# -- R3 ---------------------------------------------------------------------------------------------


def test_r3_the_lease_counts_from_the_sending_of_the_heartbeat() -> None:
    bench = Bench().primary()
    bench.wake()
    sent_at = bench.now
    bench.answered(Answer(P), after_s=1.0)
    assert bench.session.renew_by == sent_at + TIMING.renew_s
    assert bench.session.lease_until == sent_at + LEASE_S


@pytest.mark.parametrize(
    ("answer", "beat"),
    [
        (Answer(P, 0, 9), None),
        (Answer(P, 1, 4), None),
        (Answer(P), 999),
        (Answer(W, 0, 9), None),
    ],
    ids=["stale epoch", "stale revision", "unknown beat", "stale PendingPrimary"],
)
def test_r3_a_stale_or_unknown_answer_does_not_renew(answer: Answer, beat: int | None) -> None:
    bench = Bench().primary()
    bench.wake()
    before = bench.session.renew_by
    bench.answered(answer, beat=beat, after_s=0.1)
    assert bench.session.role is P
    assert bench.session.renew_by == before


def test_r3_a_repeated_answer_renews_once() -> None:
    bench = Bench().primary()
    bench.wake()
    bench.answered(Answer(P))
    after = bench.session.renew_by
    bench.answered(Answer(P), after_s=1.0)
    assert bench.session.renew_by == after


def test_r3_an_overtaken_answer_neither_renews_nor_shortens_the_lease() -> None:
    bench = Bench().primary()
    bench.wake()
    first = bench.beat
    bench.wake()
    bench.answered(Answer(P))
    after = bench.session.renew_by
    bench.answered(Answer(P), beat=first, after_s=0.1)
    assert bench.session.renew_by == after


@pytest.mark.parametrize(
    ("answer", "beat"),
    [(Answer(W, 0, 3), None), (Answer(P, 0, 9), None), (Answer(P), 999), (Answer(W), 999)],
)
def test_r3_a_stale_or_unknown_answer_does_not_promote(answer: Answer, beat: int | None) -> None:
    bench = Bench().member()
    bench.answered(Answer(S, 1, 4))
    bench.wake()
    bench.answered(answer, beat=beat)
    assert bench.session.role is S


@pytest.mark.parametrize("failure", HeartbeatFailure)
def test_r3_an_error_never_renews(failure: HeartbeatFailure) -> None:
    bench = Bench().primary()
    bench.wake()
    before = bench.session.renew_by
    bench.fails(failure, 1.0)
    assert bench.session.renew_by == before


@pytest.mark.parametrize("beat", [None, 999], ids=["known", "forgotten"])
def test_r3_any_answer_may_demote(beat: int | None) -> None:
    bench = Bench().primary()
    bench.wake()
    assert (Publish, S) in kinds(bench.answered(Answer(S, 1, 6), beat=beat))


@pytest.mark.parametrize("answer", [Answer(W, 1, 6), Answer(P, 2, 6)])
def test_r3_a_primary_whose_tenure_has_ended_demotes_even_if_it_is_chosen_again(
    answer: Answer,
) -> None:
    """It may be chosen again, but another may have been primary meanwhile."""
    bench = Bench(hooks={S}).primary()
    bench.wake()
    assert kinds(bench.answered(answer)) == [(Publish, S), (StartHook, S)]


def test_r3_a_status_neither_promotes_nor_renews() -> None:
    bench = Bench().member()
    bench.answered(Answer(S, 1, 4))
    bench.step(status("me", None, 2, 9))
    assert bench.session.role is S
    assert bench.session.renew_by == NEVER


# -- R4 ---------------------------------------------------------------------------------------------


def test_r4_without_renewal_demotion_starts_at_r_and_is_killed_at_r_plus_d() -> None:
    bench = Bench(hooks={S}).primary()
    renew_by = bench.session.renew_by
    while bench.session.role is P:
        effects = bench.wake()
    assert bench.now == pytest.approx(renew_by)
    assert kinds(effects) == [(Publish, S), (StartHook, S)]
    assert kinds(bench.wake()) == [TermHook]
    assert bench.now < renew_by + TIMING.demote_s
    assert kinds(bench.wake()) == [KillHook, Escalate, Exit]
    assert bench.now == pytest.approx(renew_by + TIMING.demote_s)
    assert bench.log[-1] == Exit(ExitCode.DEMOTION_FAILED)


LAST_S = TIMING.lease_s - TIMING.drift_s
"""From the sending of the heartbeat to L less the drift."""


def test_r4_a_demotion_that_starts_late_has_d_from_then_but_never_beyond_l_less_the_drift() -> None:
    """A frozen process wakes after R; at L another member may be promoted."""
    bench = Bench(hooks={S}).primary()
    last_at = bench.session.sent_at + LAST_S
    (_, start) = bench.step(Tick(), after_s=LAST_S - 0.1 * TIMING.demote_s)
    assert isinstance(start, StartHook)
    assert 0 < start.facts.limit_s < 0.1 * TIMING.demote_s
    while bench.session.phase is not Phase.ENDED:
        effects = bench.wake()
    assert kinds(effects) == [KillHook, Escalate, Exit]
    assert bench.now == pytest.approx(last_at)


def test_r4_a_freeze_until_between_r_plus_d_and_l_still_runs_the_hook() -> None:
    """Otherwise a workload that only the hook can stop would go on."""
    bench = Bench(hooks={S}).primary()
    effects = bench.step(Tick(), after_s=TIMING.renew_s + TIMING.demote_s + 0.01)
    assert kinds(effects) == [(Publish, S), (StartHook, S)]
    assert kinds(bench.ends()) == [Release, SendHeartbeat]


def test_r4_a_freeze_beyond_l_demotes_in_order() -> None:
    """The lease has expired: from here on only the epoch protects."""
    bench = Bench(hooks={S}).primary()
    (_, start) = bench.step(Tick(), after_s=LEASE_S)
    assert isinstance(start, StartHook)
    assert start.facts.limit_s == pytest.approx(0.75 * TIMING.demote_s)
    assert kinds(bench.ends()) == [Release, SendHeartbeat]


@pytest.mark.parametrize("after_s", [TIMING.renew_s + TIMING.demote_s + 0.01, LEASE_S + 1])
def test_r4_without_a_hook_a_demotion_is_never_late(after_s: float) -> None:
    bench = Bench().primary()
    assert kinds(bench.step(Tick(), after_s=after_s)) == [(Publish, S), Release, SendHeartbeat]


def test_r4_the_role_is_not_released_after_a_failed_demotion() -> None:
    """The workload may still run: the role must stay taken until the lease expires."""
    bench = Bench(hooks={S}).primary()
    bench.answered(Answer(S, 1, 6))
    while bench.session.phase is not Phase.ENDED:
        bench.wake()
    assert Release not in kinds(bench.log)
    assert Leave not in kinds(bench.log)


def test_r4_a_demotion_before_r_may_use_all_of_the_lease_that_is_left() -> None:
    bench = Bench(hooks={S}).primary()
    end_at = bench.session.renew_by + TIMING.demote_s
    bench.answered(Answer(S, 1, 6), after_s=1.0)
    assert bench.session.guard_deadlines is not None
    assert bench.session.guard_deadlines[0] == float("inf")
    assert bench.session.guard_deadlines[1] == pytest.approx(end_at + BEHIND_S)


def test_r4_a_failed_demotion_is_retried() -> None:
    bench = Bench(hooks={S}).primary()
    bench.answered(Answer(S, 1, 6))
    bench.ends(ok=False)
    assert kinds(bench.wake()) == [(StartHook, S)]
    assert Release in kinds(bench.ends())


# -- R5 ---------------------------------------------------------------------------------------------


def test_r5_a_graceful_stop_demotes_then_releases_then_leaves_then_exits() -> None:
    bench = Bench(hooks={S}).primary()
    assert kinds(bench.step(Stop())) == [(Publish, S), (StartHook, S)]
    assert kinds(bench.ends()) == [Release]
    assert kinds(bench.step(Released())) == [Leave]
    assert bench.step(Left()) == [Exit(ExitCode.OK)]
    assert bench.step(Tick()) == []


def test_r5_no_heartbeat_is_sent_after_a_stop() -> None:
    bench = Bench(hooks={S}).primary()
    bench.step(Stop())
    stopped = len(bench.log)
    bench.ends()
    while bench.session.phase is not Phase.ENDED:
        bench.wake()
    assert SendHeartbeat not in kinds(bench.log[stopped:])
    assert bench.session.wake_at == float("inf")


@pytest.mark.parametrize("stage", ["joining", "member"])
def test_r5_a_secondary_that_stops_leaves_and_exits(stage: str) -> None:
    bench = Bench()
    if stage == "joining":
        bench.begin()
    else:
        bench.member().answered(Answer(S))
    assert kinds(bench.step(Stop())) == [Leave]
    assert bench.step(Left()) == [Exit(ExitCode.OK)]


def test_r5_a_stop_while_starting_waits_for_the_demotion() -> None:
    bench = Bench(hooks={S})
    bench.begin()
    assert bench.step(Stop()) == []
    assert kinds(bench.ends()) == [Leave]


def test_r5_a_stop_during_a_promotion_terminates_its_hook_first() -> None:
    bench = Bench(hooks={S, P}).pending()
    assert kinds(bench.answered(Answer(P))) == [(StartHook, P)]
    assert kinds(bench.step(Stop())) == [(Publish, S), TermHook]
    assert kinds(bench.ends(ok=False)) == [(StartHook, S)]
    assert kinds(bench.ends()) == [Release]


def test_r5_a_stopping_session_asks_for_a_hold_off() -> None:
    bench = Bench().primary()
    (release,) = [e for e in bench.step(Stop()) if isinstance(e, Release)]
    assert release.epoch == 1
    assert release.hold_off_s >= LEASE_S


def test_r5_a_stop_without_an_epoch_releases_nothing() -> None:
    """A plain v1 server reassigns the role when the session is deleted (docs/api.md, "Sessions and heartbeats")."""
    bench = Bench(hooks={S}).primary(v1_server=True)
    bench.step(Stop())
    assert kinds(bench.ends()) == [Leave]


# -- R6 ---------------------------------------------------------------------------------------------


def test_r6_the_demotion_hook_runs_before_the_first_request() -> None:
    bench = Bench(hooks={S})
    assert kinds(bench.begin()) == [(StartHook, S)]
    assert kinds(bench.ends()) == [Join]
    assert bench.session.role is S


def test_r6_a_session_whose_first_demotion_fails_exits_without_joining() -> None:
    bench = Bench(hooks={S})
    bench.begin()
    while bench.session.phase is not Phase.ENDED:
        bench.wake()
    assert Join not in kinds(bench.log)
    assert bench.log[-1] == Exit(ExitCode.DEMOTION_FAILED)


def test_r6_every_tenure_begins_as_secondary_even_if_the_first_answer_is_primary() -> None:
    """The answer of a server on whose record this session was primary when it died."""
    bench = Bench(hooks={P}).member()
    assert kinds(bench.answered(Answer(P)))[:2] == [(Publish, W), (StartHook, P)]


# -- R8 ---------------------------------------------------------------------------------------------


def test_r8_primary_is_published_only_after_the_hook_has_succeeded() -> None:
    bench = Bench(hooks={P}).pending()
    assert kinds(bench.answered(Answer(P))) == [(StartHook, P)]
    assert bench.session.role is W
    assert kinds(bench.ends()) == [(Publish, P)]


def test_r8_a_promotion_needs_enough_of_the_lease() -> None:
    late_s = TIMING.renew_s * (1 - MIN_PROMOTION_SHARE)
    late, in_time = Bench().member(), Bench().member()
    late.answered(Answer(P), after_s=late_s + 0.01)
    in_time.answered(Answer(P), after_s=late_s - 0.01)
    assert (late.session.role, in_time.session.role) == (S, P)


def test_r8_a_promotion_hook_is_terminated_when_the_lease_is_lost() -> None:
    bench = Bench(hooks={P}, hook_limit_s=100).pending()
    bench.answered(Answer(P))
    renew_by = bench.session.renew_by
    while bench.session.role is W:
        effects = bench.wake()
    assert bench.now == pytest.approx(renew_by)
    assert kinds(effects) == [(Publish, S), TermHook]


def test_r8_a_promotion_hook_is_terminated_when_the_role_is_revoked() -> None:
    bench = Bench(hooks={P}).pending()
    bench.answered(Answer(P))
    assert kinds(bench.answered(Answer(S, 1, 6), beat=999)) == [(Publish, S), TermHook]


def test_r8_a_failed_promotion_demotes_and_releases_with_a_hold_off() -> None:
    bench = Bench(hooks={P, S}).pending()
    bench.answered(Answer(P))
    assert kinds(bench.ends(ok=False)) == [(Publish, S), (StartHook, S)]
    release, beat = bench.ends()
    assert release == Release(1, "promotion failed: exit 1", 5.0)
    assert isinstance(beat, SendHeartbeat)


def fail_promotion(bench: Bench, epoch: int) -> float:
    """Fail a promotion; the hold-off of its release."""
    bench.answered(Answer(P, epoch, 10 * epoch))
    (release,) = [e for e in bench.ends(ok=False) if isinstance(e, Release)]
    bench.step(Released())
    bench.step(Tick(), after_s=release.hold_off_s)
    return release.hold_off_s


def test_r8_hold_offs_double_up_to_the_limit() -> None:
    bench = Bench(hooks={P}).member()
    assert [fail_promotion(bench, epoch) for epoch in range(1, 6)] == [5, 10, 20, 30, 30]


def test_r8_a_long_tenure_resets_the_hold_off() -> None:
    bench = Bench(hooks={P}).member()
    assert [fail_promotion(bench, epoch) for epoch in (1, 2)] == [5, 10]
    bench.answered(Answer(P, 3, 30))
    bench.ends()
    for _ in range(40):  # seconds; longer than the longest hold-off
        bench.step(Tick(), after_s=1.0)
        bench.answered(Answer(P, 3, 30))
    (release,) = [
        e for e in bench.step(FitnessChanged(fit=False, reason="disk")) if isinstance(e, Release)
    ]
    assert release.hold_off_s == 5


@pytest.mark.parametrize("role", [W, P])
def test_r8_a_session_accepts_no_role_while_it_cools_down(role: Role) -> None:
    bench = Bench(hooks={P}).pending()
    bench.answered(Answer(P))
    bench.ends(ok=False)
    bench.step(Released())
    bench.answered(Answer(role, 2, 9), after_s=4.9)
    assert bench.session.role is S


def test_r8_a_tenure_assigned_despite_the_hold_off_is_released() -> None:
    """Otherwise its heartbeats would renew the lease and block the role."""
    bench = Bench(hooks={P}).pending()
    bench.answered(Answer(P))
    bench.ends(ok=False)
    bench.step(Released())
    (release, *_) = bench.answered(Answer(P, 2, 9), after_s=2.0)
    assert release == Release(2, "promotion failed: exit 1", 3.0)
    bench.step(Released())
    bench.step(Tick(), after_s=10)
    bench.answered(Answer(P, 2, 9))
    assert bench.session.role is S, "a tenure that was released is never taken"


def test_r8_a_lost_release_is_repeated() -> None:
    bench = Bench().primary()
    bench.answered(Answer(S, 1, 6))
    bench.step(Released())
    bench.step(Tick())
    assert kinds(bench.answered(Answer(P, 1, 6))) == [Release]
    bench.wake()
    assert bench.answered(Answer(P, 1, 6)) == [], "one release at a time"


def test_r8_after_a_failed_pending_hook_the_session_leaves_and_comes_back_later() -> None:
    """It has no tenure to release, and must not be chosen again at once."""
    bench = Bench(hooks={W}).pending()
    assert kinds(bench.ends(ok=False)) == [(Publish, S), Leave]
    assert bench.session.wake_at == float("inf"), "not before it is known to have left"
    assert bench.step(Left()) == []
    assert kinds(bench.wake()) == [Join]
    assert bench.now == 105.0


# -- R9: fitness ------------------------------------------------------------------------------------


def test_r9_an_unfit_primary_demotes_releases_and_sends_no_heartbeats() -> None:
    bench = Bench(hooks={S}).primary()
    effects = bench.step(FitnessChanged(fit=False, reason="disk full"))
    assert kinds(effects) == [(Publish, S), (StartHook, S)]
    assert isinstance(effects[0], Publish)
    assert effects[0].cause is Cause.UNFIT
    assert kinds(bench.ends()) == [Release]
    assert bench.session.wake_at == float("inf")


def test_r9_a_session_sends_heartbeats_again_once_it_is_fit() -> None:
    bench = Bench().member()
    bench.answered(Answer(S))
    bench.step(FitnessChanged(fit=False, reason="disk full"))
    assert bench.step(Tick(), after_s=LEASE_S) == []
    assert kinds(bench.step(FitnessChanged(fit=True, reason=""))) == [SendHeartbeat]


@pytest.mark.parametrize(("role", "wanted"), [(W, []), (P, [Release])])
def test_r9_an_unfit_session_accepts_no_role(role: Role, wanted: list[type]) -> None:
    bench = Bench().member()
    bench.step(FitnessChanged(fit=False, reason="disk full"))
    assert kinds(bench.answered(Answer(role))) == wanted
    assert bench.session.role is S


# -- heartbeats -------------------------------------------------------------------------------------


def test_heartbeats_are_at_most_an_interval_apart() -> None:
    bench = Bench().member()
    for _ in range(50):
        bench.answered(Answer(S))
        before = bench.now
        assert kinds(bench.wake()) == [SendHeartbeat]
        assert (
            0.9 * TIMING.heartbeat_interval_s <= bench.now - before <= TIMING.heartbeat_interval_s
        )


def test_the_number_of_remembered_heartbeats_is_bounded() -> None:
    bench = Bench().member()
    first = bench.beat
    for _ in range(MAX_IN_FLIGHT):
        bench.wake()
    bench.answered(Answer(P), beat=first)
    assert bench.session.role is S


def test_answers_within_the_request_timeout_renew_however_short_the_interval_is() -> None:
    """Heartbeats each second and answers after 9.5 s: ten heartbeats are in flight at a time."""
    timing = plan(60.0, Budget(heartbeat_interval_s=1.0))
    assert timing.request_timeout_s == 10.0
    bench = Bench()
    in_flight: list[tuple[int, float]] = []

    def note(effects: list[Effect]) -> None:
        in_flight.extend((e.number, bench.now) for e in effects if isinstance(e, SendHeartbeat))

    bench.begin()
    note(bench.step(Joined(timing, STORE)))
    end_at = bench.now + 120.0
    while bench.now < end_at:
        number, sent_at = in_flight[0]
        if sent_at + 9.5 > bench.session.wake_at:
            note(bench.wake())
            continue
        in_flight.pop(0)
        bench.now = sent_at + 9.5
        note(bench.answered(Answer(P, lease_s=60.0), beat=number))
    assert bench.session.role is P
    assert bench.session.renew_by > bench.now + 20.0


def test_a_pending_primary_confirms_at_once_ten_times_at_most() -> None:
    """As the published client (docs/api.md, "What v1 clients do, and what they get")."""
    bench = Bench().member()
    at_once = sum(kinds(bench.answered(Answer(W, 0, 4))).count(SendHeartbeat) for _ in range(30))
    assert at_once == MAX_CONFIRMATIONS == 10
    assert kinds(bench.wake()) == [SendHeartbeat]


def test_a_changed_status_makes_a_pending_primary_send_a_heartbeat() -> None:
    bench = Bench().member()
    for _ in range(30):
        bench.answered(Answer(W, 0, 4))
    news = status(None, "me", 0, 5)
    assert kinds(bench.step(news)) == [SendHeartbeat]
    assert bench.step(news) == []
    assert kinds(bench.answered(Answer(W, 0, 5))) == [SendHeartbeat]


def test_a_changed_status_waits_for_the_answer_of_a_heartbeat_in_flight() -> None:
    """That answer may have the news, and the coordinator would refuse a second heartbeat (429)."""
    bench = Bench().member()
    bench.wake()
    sent_at = bench.now
    assert bench.step(status("me", None, 1, 5)) == []
    assert bench.session.wake_at == pytest.approx(sent_at + minimum_interval_s(LEASE_S))
    assert kinds(bench.wake()) == [SendHeartbeat]


def test_a_changed_status_of_others_makes_no_secondary_send_a_heartbeat() -> None:
    bench = Bench().member()
    bench.answered(Answer(S, 0, 4))
    assert bench.step(status(None, "other", 0, 5)) == []


def test_a_status_that_names_another_primary_demotes() -> None:
    bench = Bench().primary()
    effects = bench.step(status("other", None, 2, 9))
    assert kinds(effects)[:2] == [(Publish, S), Release]


def test_an_old_status_changes_nothing() -> None:
    bench = Bench().primary()
    assert bench.step(status("other", None, 1, 4)) == []
    assert bench.session.role is P


# -- answers of servers -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked_s", "waits_s"),
    [(0.0, minimum_interval_s(TIMING.lease_s)), (0.8, 0.8), (60.0, TIMING.renew_s / 2)],
)
def test_retry_after_is_obeyed_within_bounds(asked_s: float, waits_s: float) -> None:
    """A longer pause would cost a healthy primary its lease, and none at all would be a loop."""
    bench = Bench().primary()
    bench.wake()
    before = bench.now
    bench.fails(HeartbeatFailure.BACK_OFF, asked_s)
    assert kinds(bench.wake()) == [SendHeartbeat]
    assert bench.now - before == pytest.approx(waits_s)


@pytest.mark.parametrize("failure", [HeartbeatFailure.OTHER, HeartbeatFailure.BACK_OFF])
def test_a_failed_heartbeat_is_retried_before_the_next_interval(failure: HeartbeatFailure) -> None:
    bench = Bench().primary()
    bench.wake()
    before = bench.now
    bench.fails(failure)
    assert kinds(bench.wake()) == [SendHeartbeat]
    assert bench.now - before == pytest.approx(TIMING.renew_s / 10)


def test_the_failure_of_an_answered_heartbeat_is_ignored() -> None:
    bench = Bench().primary()
    bench.wake()
    bench.answered(Answer(P))
    due = bench.session.wake_at
    assert bench.fails(HeartbeatFailure.GONE) == []
    assert bench.session.wake_at == due


def test_a_session_unknown_to_the_server_joins_again_and_keeps_its_lease() -> None:
    """Its tenure is on record: nobody else gets the role before the lease expires."""
    bench = Bench().primary()
    bench.wake()
    assert kinds(bench.fails(HeartbeatFailure.GONE)) == [Join]
    assert bench.session.role is P
    assert kinds(bench.step(Joined(TIMING, STORE))) == [SendHeartbeat]
    bench.answered(Answer(P, 1, 1))
    assert bench.session.renew_by == bench.now + TIMING.renew_s


def test_a_server_that_forgets_each_registration_is_asked_with_a_delay() -> None:
    """404 to each heartbeat and 200 to each join would be a loop without delay."""
    bench = Bench().member()
    bench.fails(HeartbeatFailure.GONE)
    bench.step(Joined(TIMING, STORE))
    began_at = bench.now
    for _ in range(20):
        if SendHeartbeat not in kinds(bench.log[-1:]):
            bench.wake()
        bench.fails(HeartbeatFailure.GONE)
        bench.step(Joined(TIMING, STORE))
    assert bench.now - began_at > TIMING.renew_s


def test_r4_a_session_that_cannot_join_again_demotes_at_r() -> None:
    bench = Bench().primary()
    renew_by = bench.session.renew_by
    bench.wake()
    bench.fails(HeartbeatFailure.GONE)
    assert (Publish, S) in kinds(bench.wake())
    assert bench.now == pytest.approx(renew_by)


def test_a_session_unknown_to_a_plain_v1_server_demotes_first() -> None:
    """That server has reassigned the role with the deletion (docs/api.md, "Sessions and heartbeats")."""
    bench = Bench(hooks={S}).primary(v1_server=True)
    bench.wake()
    assert kinds(bench.fails(HeartbeatFailure.GONE)) == [(Publish, S), Join, (StartHook, S)]


def test_the_servers_timeout_is_adopted() -> None:
    bench = Bench()
    bench.begin()
    longer = plan(2 * LEASE_S)
    bench.step(Joined(longer, STORE))
    assert bench.session.timing == longer
    bench.answered(replace(Answer(P), lease_s=2 * LEASE_S))
    assert bench.session.renew_by == bench.now + longer.renew_s


def test_an_answer_with_another_timeout_does_not_renew_and_joins_again() -> None:
    bench = Bench().primary()
    bench.wake()
    before = bench.session.renew_by
    assert kinds(bench.answered(replace(Answer(P), lease_s=2 * LEASE_S))) == [Join]
    assert bench.session.renew_by == before


def test_a_session_runs_at_a_plain_v1_server_from_start_to_exit() -> None:
    bench = Bench(hooks={P, S}).member(v1_server=True)
    assert kinds(bench.answered(v1(W))) == [(Publish, W), SendHeartbeat]
    assert kinds(bench.answered(v1(P))) == [(StartHook, P)]
    bench.ends()
    bench.wake()
    bench.answered(v1(P))
    assert bench.session.renew_by == bench.now + TIMING.renew_s
    bench.wake()
    assert kinds(bench.answered(v1(S))) == [(Publish, S), (StartHook, S)]
    assert kinds(bench.ends()) == [SendHeartbeat]
    assert bench.session.role is S
    assert bench.session.tenure is None


def test_r8_with_a_plain_v1_server_a_session_leaves_to_cool_down() -> None:
    bench = Bench(hooks={P}).pending(v1_server=True)
    bench.answered(v1(P))
    assert kinds(bench.ends(ok=False)) == [(Publish, S), Leave]
    bench.step(Left())
    assert kinds(bench.wake()) == [Join]


def test_r5_a_stop_while_it_cools_down_leaves_and_exits() -> None:
    bench = Bench(hooks={P}).pending(v1_server=True)
    bench.answered(v1(P))
    bench.ends(ok=False)
    bench.step(Left())
    assert kinds(bench.step(Stop())) == [Leave]
    assert bench.step(Left()) == [Exit(ExitCode.OK)]


# -- the whole --------------------------------------------------------------------------------------


def test_r18_the_hook_receives_the_data_processed_time_and_the_previous_primary() -> None:
    bench = Bench(hooks={P}).pending()
    (start,) = bench.answered(Answer(P))
    assert isinstance(start, StartHook)
    assert start.facts.last_data == DATA
    assert start.facts.previous_primary == "other"
    assert start.facts.epoch == 1


BEHIND_S = (TIMING.margin_s - TIMING.drift_s) / 2


def test_r12_the_guard_acts_after_the_agent_and_before_the_lease_end_less_the_drift() -> None:
    bench = Bench().primary()
    session = bench.session
    assert session.guard_deadlines is not None
    runs_at, kills_at = session.guard_deadlines
    assert runs_at == pytest.approx(session.renew_by + BEHIND_S)
    assert kills_at + BEHIND_S + TIMING.drift_s == pytest.approx(session.lease_until)
    assert Bench().member().session.guard_deadlines is None


ROLES = st.sampled_from(Role)
STORES = st.sampled_from([STORE, STORE, STORE, OTHER_STORE, None])
EVENTS: st.SearchStrategy[Event] = st.one_of(
    st.builds(
        HeartbeatAnswered,
        numbers(12),
        st.builds(
            HeartbeatAnswer,
            ROLES,
            st.none(),
            st.none() | st.integers(0, 4),
            st.none() | st.integers(0, 9),
            st.just(LEASE_S),
            store_id=STORES,
        ),
    ),
    st.builds(HeartbeatFailed, numbers(12), st.sampled_from(HeartbeatFailure), st.just("no")),
    st.builds(
        StatusRead,
        st.builds(
            GroupStatus,
            st.sampled_from([None, "me", "other"]),
            st.sampled_from([None, "me"]),
            st.none(),
            st.integers(0, 4),
            st.integers(0, 9),
            store_id=STORES,
        ),
    ),
    st.builds(HookEnded, numbers(8), st.booleans(), st.just("ended")),
    st.builds(Stalled, st.just(2.0)),
    st.builds(FitnessChanged, st.booleans(), st.just("disk")),
    st.builds(Joined, st.just(TIMING), STORES),
    st.sampled_from([Released(), Left(), Tick()]),
    st.sampled_from([Tick(), Stop()]),
)


def revoked(bench: Bench) -> None:
    """A primary whose tenure the coordinator has just ended; its demotion hook runs, if it has one."""
    bench.primary().answered(Answer(S, 1, 6))


def released(bench: Bench) -> None:
    """A session that has demoted, and whose release is under way."""
    revoked(bench)
    if S in bench.session.options.hooks:
        bench.ends()


def test_any_events_in_any_order_keep_the_order_of_effects() -> None:
    """Whatever comes: only the table's transitions, no release before the demotion, nothing after Exit.

    And twice the same events give twice the same effects.
    """
    reached: set[str] = set()

    @settings(max_examples=400, deadline=None, derandomize=True)
    @given(
        st.lists(st.tuples(EVENTS, st.floats(0, 4)), max_size=40),
        st.sampled_from([NO_HOOKS, frozenset(Role)]),
        st.sampled_from([Bench.begin, Bench.member, Bench.primary, revoked, released]),
    )
    def check(
        events: list[tuple[Event, float]],
        hooks: frozenset[Role],
        begin: Callable[[Bench], object],
    ) -> None:
        first, second = Bench(hooks=hooks), Bench(hooks=hooks)
        begin(first)
        begin(second)
        assert first.log == second.log
        for drawn, after_s in events:
            event = addressed(drawn, first.log)
            assert first.step(event, after_s=after_s) == second.step(event, after_s=after_s)
            session = first.session
            if session.role is P:
                reached.add("primary")
                assert session.renew_by > first.now, "primary without a lease"
            assert session.wake_at > first.now, "the daemon would spin"
        if hooks:
            reached.update(check_order(first.log))
        ended = [index for index, effect in enumerate(first.log) if isinstance(effect, Exit)]
        assert ended in ([], [len(first.log) - 1])
        reached.update("an end" for _ in ended)

    check()
    assert reached == {"primary", "a release after a promotion", "an end"}


def check_order(log: list[Effect]) -> set[str]:
    """Check that nothing was released before the demotion's hook has started; return what was seen."""
    reached: set[str] = set()
    promotions, promoted = 0, False
    for effect in log:
        match effect:
            case StartHook():
                promoted = effect.facts.role is not S
                promotions += promoted
            case Release() | Leave() if promotions:
                reached.add("a release after a promotion")
                assert not promoted, "released before the demotion"
            case _:
                pass
    return reached


def test_a_plain_v1_status_is_new_only_if_it_differs_from_the_answers() -> None:
    bench = Bench().member(v1_server=True)
    bench.answered(v1(S))
    assert bench.step(status(None, None, None, None, None)) == []
    assert bench.step(status("other", None, None, None, None)) == []
    assert kinds(bench.step(status("me", None, None, None, None))) == [SendHeartbeat]


def test_r18_an_answer_without_a_previous_primary_keeps_the_known_one() -> None:
    bench = Bench().member()
    bench.step(status("other", None, 0, 1))
    bench.step(HeartbeatAnswered(bench.beat, replace(Answer(W, 0, 4).build(), previous=None)))
    assert bench.session.previous_primary == "other"


# -- what each guard of a step is for -----------------------------------------------------------------


def test_r2_the_demotion_begins_exactly_at_the_renewal_deadline() -> None:
    bench = Bench().primary()
    bench.now = bench.session.renew_by
    assert kinds(bench.step(Tick()))[0] == (Publish, S)


@pytest.mark.parametrize("late_s", [0.0, 1.0])
def test_r4_after_the_lease_the_hook_and_the_guard_have_the_whole_budget(late_s: float) -> None:
    bench = Bench(hooks={S}).primary()
    bench.now = bench.session.lease_until - TIMING.drift_s + late_s
    assert kinds(bench.step(Tick())) == [(Publish, S), (StartHook, S)]
    assert bench.session.guard_deadlines is not None
    assert bench.session.guard_deadlines[1] == pytest.approx(bench.now + TIMING.demote_s)


def test_r12_the_guard_kills_no_later_than_the_lease_end_less_the_drift() -> None:
    bench = Bench(hooks={S}).primary()
    kill_by = bench.session.lease_until - TIMING.drift_s
    bench.now = kill_by - 0.1
    bench.step(Tick())
    assert bench.session.guard_deadlines is not None
    assert bench.session.guard_deadlines[1] == pytest.approx(kill_by)


@pytest.mark.parametrize(
    ("hook_limit_s", "budget_s"), [(TIMING.demote_s + 1, TIMING.demote_s + 1), (1, TIMING.demote_s)]
)
def test_r6_the_first_demotion_has_the_longer_of_its_budget_and_the_hook_limit(
    hook_limit_s: float, budget_s: float
) -> None:
    bench = Bench(hooks={S}, hook_limit_s=hook_limit_s)
    began_at = bench.now
    bench.begin()
    while bench.session.phase is not Phase.ENDED:
        bench.wake()
    assert bench.now == pytest.approx(began_at + budget_s)


def test_r3_a_late_answer_of_an_older_heartbeat_neither_renews_nor_demotes() -> None:
    bench = Bench().member(v1_server=True)
    bench.answered(v1(W))
    older = bench.beat
    bench.wake()
    assert bench.beat != older
    bench.answered(v1(P))
    assert bench.session.role is P
    sent_at = bench.session.sent_at
    assert bench.answered(v1(W), beat=older) == []
    assert bench.session.sent_at == sent_at


def test_r8_a_late_answer_of_its_own_tenure_does_not_release_it() -> None:
    bench = Bench().primary()
    older = bench.beat
    bench.wake()
    bench.answered(Answer(P, 1, 7))
    assert Release not in kinds(bench.answered(Answer(P, 1, 5), beat=older))
    assert bench.session.role is P


def test_r8_a_late_answer_during_the_demotion_does_not_release_the_role() -> None:
    bench = Bench(hooks={S}).primary()
    older = bench.beat
    bench.answered(Answer(S, 1, 7))
    assert bench.answered(Answer(P, 1, 5), beat=older) == []


def test_r8_only_an_answer_of_primary_from_older_data_is_released() -> None:
    bench = Bench().member()
    bench.answered(Answer(S, 2, 9))
    bench.wake()
    assert Release not in kinds(bench.answered(Answer(S, 1, 5)))


def test_r3_another_stores_answer_to_a_forgotten_heartbeat_is_ignored() -> None:
    bench = Bench().primary(v1_server=True)
    forgotten = bench.beat
    bench.step(Stalled(1.0))
    assert bench.answered(replace(v1(S), store_id=OTHER_STORE), beat=forgotten) == []
