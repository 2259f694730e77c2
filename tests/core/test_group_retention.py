"""R20: how long a session that sends no heartbeats is kept, and what is never removed."""

from dataclasses import replace
from datetime import timedelta

import pytest

from agent.core.group_state import (
    AddSession,
    Decision,
    Removal,
    RemovalCause,
    RemoveSession,
    SetOverride,
    Tick,
    is_active,
)
from agent.core.group_view import view_of
from agent.errors import Conflict, NotFound
from agent.model import RoleOverride, SessionConfig

from .test_group import CALM, LEASE_S, Bench, P, S, W

WEEK_S = 7 * 86_400.0
SHORT = replace(CALM, dead_session_retention_s=0.0)
FULL = replace(CALM, max_sessions=3)
HOUR_S = 3600.0


def tick_through(bench: Bench, seconds: float, **scores: float) -> list[Removal]:
    """Let time pass, with a Tick whenever one is due, and a heartbeat of the named in each half L."""
    removals: list[Removal] = []
    end = bench.mono + seconds
    beat_at = bench.mono + LEASE_S / 2 if scores else end
    while bench.mono < end:
        bench.mono = max(bench.mono, min(bench.wake, end, beat_at))
        removals += bench.do(Tick()).removals
        if scores and bench.mono >= beat_at:
            beat_at += LEASE_S / 2
            for session_id, score in scores.items():
                bench.beat(session_id, score)
    return removals


def sessions(bench: Bench) -> set[str]:
    assert set(bench.state.live.contacts) == set(bench.state.record.sessions)
    return set(bench.state.record.sessions)


def join(bench: Bench, session_id: str) -> Decision:
    return bench.do(AddSession(SessionConfig(session_id)))


def test_r20_a_session_is_removed_when_it_was_silent_for_the_retention() -> None:
    bench = Bench("a", "b")
    bench.promote("a")
    bench.beat("b")
    assert tick_through(bench, WEEK_S - 1) == []
    assert sessions(bench) == {"a", "b"}
    removals = tick_through(bench, 2)
    assert {one.session_id for one in removals} == {"a", "b"}
    assert {one.cause for one in removals} == {RemovalCause.RETENTION}
    assert all(one.silent_s == pytest.approx(WEEK_S, abs=1) for one in removals)
    assert (sessions(bench), bench.primary, bench.wake) == (set(), None, float("inf"))


def test_r20_a_session_is_kept_for_ten_leases_at_least() -> None:
    bench = Bench("a", "b", policy=SHORT)
    bench.beat("b")
    assert tick_through(bench, 10 * LEASE_S - 1, a=100) == []
    assert [one.session_id for one in tick_through(bench, 2, a=100)] == ["b"]
    assert (sessions(bench), bench.primary) == ({"a"}, "a")


def test_r20_a_session_that_never_sent_a_heartbeat_is_removed_too() -> None:
    bench = Bench("a", policy=SHORT)
    assert [one.session_id for one in tick_through(bench, 10 * LEASE_S + 1)] == ["a"]


def test_r20_a_removed_member_registers_again_and_is_a_member_as_before() -> None:
    bench = Bench("a", "b", policy=SHORT)
    bench.promote("a")
    bench.live(2, a=100, b=100)
    tick_through(bench, 11 * LEASE_S, b=100)
    assert (sessions(bench), bench.primary) == ({"b"}, "b")
    with pytest.raises(NotFound):
        bench.beat("a")
    assert join(bench, "a").answer is True
    assert bench.beat("a", 50).role is S


def test_r20_a_removal_is_a_change_of_the_record() -> None:
    """So it is durable before anybody sees it."""
    bench = Bench("a", policy=SHORT)
    tick_through(bench, LEASE_S + 1)
    record = bench.state.record
    tick_through(bench, 9 * LEASE_S)
    assert record is not bench.state.record
    assert "a" in record.sessions


def test_r20_the_silence_survives_restarts_of_the_coordinator() -> None:
    """One that is restarted each day forgets the dead after seven days all the same."""
    bench = Bench("a")
    bench.beat("a")
    heard = bench.now.wall
    for _ in range(6):
        tick_through(bench, 86_400)
        bench.restart()
        assert bench.state.record.sessions["a"].silent_since == heard
    tick_through(bench, 86_400 - 60)
    assert sessions(bench) == {"a"}
    tick_through(bench, 60)
    assert sessions(bench) == set()


def test_r20_a_restart_costs_no_more_than_the_time_until_a_silence_is_recorded() -> None:
    bench = Bench("a")
    bench.beat("a")
    tick_through(bench, HOUR_S - 1)
    bench.restart()
    bench.do(Tick())
    tick_through(bench, WEEK_S - 2)
    assert sessions(bench) == {"a"}
    tick_through(bench, 5)
    assert sessions(bench) == set()


@pytest.mark.parametrize("jump", [timedelta(days=3650), timedelta(days=-3650)])
def test_r20_a_wrong_wall_clock_removes_nobody_that_could_not_be_heard_yet(
    jump: timedelta,
) -> None:
    bench = Bench("a", "b")
    bench.beat("a")
    tick_through(bench, 2 * HOUR_S, b=100)
    assert bench.state.record.sessions["a"].silent_since is not None
    bench.restart()
    record = bench.state.record
    since = record.sessions["a"].silent_since
    assert since is not None
    moved = replace(record.sessions["a"], silent_since=since - jump)
    bench.state = replace(
        bench.state, record=replace(record, sessions={**record.sessions, "a": moved})
    )
    tick_through(bench, 10 * LEASE_S - 2, b=100)
    assert sessions(bench) == {"a", "b"}
    assert bench.beat("a").role is S
    assert bench.state.record.sessions["a"].silent_since is None
    tick_through(bench, 11 * LEASE_S, a=100, b=100)
    assert sessions(bench) == {"a", "b"}


def test_r20_short_silences_write_nothing() -> None:
    bench = Bench("a", "b")
    bench.promote("a")
    bench.live(2, a=100, b=100)
    record = bench.state.record
    for _ in range(3):
        tick_through(bench, HOUR_S - LEASE_S, a=100)
        bench.beat("b")
    assert bench.state.record is record


def test_r20_a_session_that_returns_is_active_again_and_its_silence_begins_anew() -> None:
    bench = Bench("a", "b")
    bench.promote("a")
    tick_through(bench, 2 * HOUR_S, a=100)
    view = view_of(bench.state, "b", bench.now)
    assert (view.active, view.silent_since) == (False, bench.now.wall - timedelta(hours=2))
    bench.beat("b")
    view = view_of(bench.state, "b", bench.now)
    assert (view.active, view.silent_since) == (True, None)
    assert bench.state.record.sessions["b"].silent_since is None


def test_r20_what_an_operator_has_set_outlives_the_silence() -> None:
    bench = Bench("a", "b", policy=SHORT)
    bench.do(SetOverride("b", RoleOverride.PRIMARY))
    tick_through(bench, 50 * LEASE_S, a=100)
    assert sessions(bench) == {"a", "b"}
    bench.do(SetOverride("b", RoleOverride.OFF))
    tick_through(bench, 1, a=100)
    assert sessions(bench) == {"a"}


def test_r20_a_session_is_kept_during_its_hold_off() -> None:
    bench = Bench("a", "b", policy=SHORT)
    bench.promote("a")
    bench.release("a", 1, hold_off_s=20 * LEASE_S)
    tick_through(bench, 20 * LEASE_S - 1, b=100)
    assert sessions(bench) == {"a", "b"}
    tick_through(bench, 2, b=100)
    assert sessions(bench) == {"b"}


def test_r20_the_holder_of_a_lease_is_never_removed() -> None:
    """Not even if its record is taken for silent since long ago, as after a jump of the wall clock."""
    bench = Bench("a", "b", policy=SHORT)
    bench.promote("a")
    record = bench.state.record
    silent = replace(record.sessions["a"], silent_since=bench.now.wall - timedelta(days=999))
    contact = replace(bench.state.live.contacts["a"], heard_at=0.0, last_heartbeat=None)
    bench.state = replace(
        bench.state,
        record=replace(record, sessions={**record.sessions, "a": silent}),
        live=replace(bench.state.live, contacts={**bench.state.live.contacts, "a": contact}),
    )
    assert bench.do(Tick(), after_s=1).removals == ()
    assert (bench.primary, sessions(bench)) == ("a", {"a", "b"})


def test_r20_nothing_is_removed_in_a_quiet_time() -> None:
    """A session of the group may hold a lease that the record does not know."""
    bench = Bench("a", "b", policy=SHORT)
    tick_through(bench, 10 * LEASE_S - 1, b=100)
    bench.beat("b", after_s=0.5, seen_epoch=7)
    tick_through(bench, LEASE_S - 0.1)
    assert sessions(bench) == {"a", "b"}
    tick_through(bench, 1)
    assert sessions(bench) == {"b"}


# -- a full group -----------------------------------------------------------------------------------


def test_r20_in_a_full_group_the_longest_dead_session_gives_way() -> None:
    bench = Bench("a", "b", "c", policy=FULL)
    bench.promote("a")
    bench.beat("c", after_s=1)
    bench.beat("b", after_s=1)
    tick_through(bench, 2 * LEASE_S, a=100)
    decision = join(bench, "d")
    assert decision.answer is True
    assert [(one.session_id, one.cause) for one in decision.removals] == [("c", RemovalCause.FULL)]
    assert sessions(bench) == {"a", "b", "d"}
    assert [one.session_id for one in join(bench, "e").removals] == ["b"]


def test_r20_active_sessions_never_give_way() -> None:
    bench = Bench("a", "b", "c", policy=FULL)
    bench.promote("a")
    tick_through(bench, 3 * LEASE_S, a=100, b=1, c=1)
    with pytest.raises(Conflict, match="has 3 client sessions, the most"):
        join(bench, "d")
    assert join(bench, "b").answer is False


def test_r20_after_a_restart_nobody_gives_way_for_one_lease() -> None:
    """R14: until then it is not known who is dead; after that, the recorded silence decides."""
    bench = Bench("a", "b", "c", policy=FULL)
    bench.beat("b")
    tick_through(bench, 2 * HOUR_S, a=100, c=100)
    bench.restart()
    with pytest.raises(Conflict, match="the most"):
        join(bench, "d")
    bench.do(Tick(), after_s=LEASE_S + 1)
    assert [one.session_id for one in join(bench, "d").removals] == ["b"]


def test_r20_a_full_group_of_dead_sessions_with_overrides_refuses_a_new_one() -> None:
    bench = Bench("a", "b", "c", policy=FULL)
    for session_id in "abc":
        bench.do(SetOverride(session_id, RoleOverride.PRIMARY))
    bench.mono += 100 * LEASE_S
    with pytest.raises(Conflict, match="none is inactive without a role override or a hold-off"):
        join(bench, "d")


def test_r20_a_holder_whose_session_was_deleted_keeps_its_lease_while_others_join() -> None:
    bench = Bench("a", "b", "c", policy=FULL)
    bench.promote("a")
    bench.do(RemoveSession("a"))
    join(bench, "d")
    bench.beat("d")
    assert bench.primary == "a"


# -- forgotten by an operator -----------------------------------------------------------------------


def test_only_an_inactive_session_is_removed_if_that_is_asked() -> None:
    bench = Bench("a", "b")
    bench.promote("a")
    bench.beat("b")
    for session_id in "ab":
        with pytest.raises(Conflict, match=f'"{session_id}" is active'):
            bench.do(RemoveSession(session_id, only_inactive=True))
    tick_through(bench, LEASE_S, a=100)
    assert not is_active(bench.state, "b", bench.now)
    bench.do(RemoveSession("b", only_inactive=True))
    assert sessions(bench) == {"a"}
    with pytest.raises(NotFound):
        bench.do(RemoveSession("b", only_inactive=True))


def test_a_session_that_is_about_to_get_the_role_is_active() -> None:
    bench = Bench("a", "b")
    bench.promote("a")
    assert bench.beat("b", 100).role is S
    bench.do(SetOverride("b", RoleOverride.PRIMARY))
    assert bench.beat("b").role is W
    assert is_active(bench.state, "b", bench.now)
    assert bench.beat("a", after_s=1).role is not P
