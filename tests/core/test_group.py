"""The coordinator's decision: R13-R18, and every input."""

import contextlib
import copy
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import cycle
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from agent.core.group import (
    LARGEST_EPOCH_STEP,
    decide,
    epoch_after_deletion,
    is_compatible,
)
from agent.core.group_draft import CONFIRM_SHARE, MAX_ADDITIONAL_BYTES, wake_at
from agent.core.group_endings import HIGHEST_LEARNED_EPOCH
from agent.core.group_state import (
    AddSession,
    Decision,
    GroupState,
    Input,
    Policy,
    ReceiveHeartbeat,
    ReleaseRole,
    RemoveGroup,
    RemoveSession,
    SetAccess,
    SetOverride,
    Tick,
    is_alive,
    progress_of,
    role_of,
    state_after_restart,
    state_after_stall,
    status_of,
)
from agent.core.group_view import view_of
from agent.core.timing import minimum_interval_s
from agent.errors import Conflict, Invalid, NotFound, TooSoon
from agent.model import (
    LONGEST_HOLD_OFF_S,
    MAX_EPOCH,
    AccessList,
    GroupConfig,
    GroupRecord,
    HeartbeatAnswer,
    HistoryEntry,
    Instant,
    Progress,
    Role,
    RoleOverride,
    SessionConfig,
    Tenure,
)

S, P, W = Role.SECONDARY, Role.PRIMARY, Role.PENDING_PRIMARY
ON, OFF = RoleOverride.PRIMARY, RoleOverride.OFF
LEASE_S = 10.0
CONFIG = GroupConfig("g", int(LEASE_S * 10_000_000))
WALL = datetime(2026, 1, 1, tzinfo=UTC)
V1 = Policy(score_hysteresis=0.0, minimum_hold_s=0.0)
CALM = Policy(score_hysteresis=10.0, minimum_hold_s=30.0)
CROWDED = Policy(max_sessions=3, dead_session_retention_s=0.0)
"""Dead sessions are removed after 10 L, or when a fourth one joins."""


def data(seconds: float) -> datetime:
    return WALL + timedelta(seconds=seconds)


class Bench:
    """A group, its clock, and the tenures that it has seen."""

    def __init__(self, *sessions: str, policy: Policy = CALM) -> None:
        self.policy = policy
        self.mono = 1000.0
        self.state = GroupState(GroupRecord(CONFIG))
        self.history: dict[int, HistoryEntry] = {}
        self.wake = float("inf")
        for session_id in sessions:
            self.do(AddSession(SessionConfig(session_id)))

    @property
    def now(self) -> Instant:
        return Instant(self.mono, WALL + timedelta(seconds=self.mono))

    def do(self, what: Input, *, after_s: float = 0.0) -> Decision:
        self.mono += after_s
        decision = decide(self.state, what, self.now, self.policy)
        self.state = decision.state
        self.history |= {entry.epoch: entry for entry in decision.history}
        self.wake = decision.wake_at
        return decision

    def stall(self, stall_s: float, *, after_s: float = 0.0) -> None:
        """The coordinator, or its store, stalls."""
        judged_at = self.mono + after_s
        self.mono = judged_at + stall_s
        self.state = state_after_stall(self.state, judged_at, self.now)

    def beat(
        self, session_id: str, score: float = 100.0, *, after_s: float = 0.0, **more: Any
    ) -> HeartbeatAnswer:
        more.setdefault("instance", f"{session_id}#1")
        answer = self.do(ReceiveHeartbeat(session_id, score, **more), after_s=after_s).answer
        assert isinstance(answer, HeartbeatAnswer)
        return answer

    def release(
        self,
        session_id: str,
        epoch: int,
        why: str = "released",
        *,
        after_s: float = 0.0,
        **more: Any,
    ) -> Decision:
        more.setdefault("instance", f"{session_id}#1")
        return self.do(ReleaseRole(session_id, epoch, why=why, **more), after_s=after_s)

    def promote(self, session_id: str, score: float = 100.0, **more: Any) -> HeartbeatAnswer:
        """Send heartbeats until it is primary: one if it is already chosen, else two."""
        answer = self.beat(session_id, score, **more)
        if answer.role is W:
            answer = self.beat(session_id, score, **more)
        assert answer.role is P
        return answer

    def live(self, seconds: float, **scores: float) -> "Bench":
        """Each named session sends a heartbeat every second, with its score."""
        for _ in range(round(seconds)):
            self.mono += 1.0
            for session_id, score in scores.items():
                self.beat(session_id, score)
        return self

    def end_of_lease(self) -> "Bench":
        self.mono = max(self.mono, self.state.live.lease_until)
        self.do(Tick())
        return self

    def restart(self, after_s: float = 1.0) -> "Bench":
        """Restart the coordinator: only the record survives."""
        self.mono += after_s
        self.state = state_after_restart(self.state.record, self.now)
        return self

    @property
    def primary(self) -> str | None:
        return status_of(self.state).primary

    @property
    def pending(self) -> str | None:
        return self.state.record.pending


# -- R13 --------------------------------------------------------------------------------------------


def test_r13_a_heartbeat_without_a_durable_change_keeps_the_same_record_object() -> None:
    """By that its caller knows that there is nothing to write."""
    bench = Bench("a", "b")
    bench.promote("a")
    bench.beat("b")
    record = bench.state.record
    bench.beat("a", after_s=1, last_data=data(1))
    bench.beat("b", after_s=1)
    bench.do(Tick())
    assert bench.state.record is record


def test_r13_progress_belongs_to_its_tenure_and_changes_no_record() -> None:
    bench = Bench("a")
    bench.promote("a")
    assert progress_of(bench.state) is None
    record = bench.state.record
    bench.beat("a", after_s=1, last_data=data(1))
    assert progress_of(bench.state) == Progress(1, data(1))
    assert bench.state.record is record
    bench.release("a", 1, hold_off_s=5)
    assert progress_of(bench.state) is None
    assert bench.state.record.last_data == data(1)


@pytest.mark.parametrize(("epoch", "known"), [(1, data(1)), (2, None)])
def test_r13_saved_progress_counts_after_a_restart_if_it_is_of_the_present_tenure(
    epoch: int, known: datetime | None
) -> None:
    bench = Bench("a")
    bench.promote("a")
    state = state_after_restart(bench.state.record, bench.now, Progress(epoch, data(1)))
    assert status_of(state).last_data == known
    assert progress_of(state) == (Progress(1, data(1)) if known else None)


def test_r13_a_refused_input_changes_nothing() -> None:
    bench = Bench("a")
    bench.promote("a")
    bench.beat("a", after_s=1)
    before = copy.deepcopy(bench.state)
    with pytest.raises(TooSoon):
        bench.beat("a")
    assert bench.state == before


INPUTS: st.SearchStrategy[Input] = st.one_of(
    st.builds(
        ReceiveHeartbeat,
        st.sampled_from("abcx"),
        st.sampled_from([0.0, 50.0, 100.0]),
        st.none() | st.integers(0, 50).map(data),
        st.none() | st.sampled_from(["a#1", "b#1"]),
        st.none() | st.integers(0, 5),
    ),
    st.builds(AddSession, st.sampled_from("abcde").map(SessionConfig)),
    st.builds(RemoveSession, st.sampled_from("abcx"), only_inactive=st.booleans()),
    st.builds(
        SetOverride,
        st.sampled_from("abcx"),
        st.sampled_from(RoleOverride),
        st.none() | st.integers(0, 60).map(lambda s: data(1000 + s)),
    ),
    st.builds(
        ReleaseRole,
        st.sampled_from("abcx"),
        st.integers(0, 9),
        st.none() | st.sampled_from(["a#1", "b#1"]),
        hold_off_s=st.floats(0, 20),
    ),
    st.sampled_from([Tick(), RemoveGroup(), SetAccess(AccessList())]),
)


HEARTBEAT_OF_EITHER: list[tuple[Input, float]] = [
    (ReceiveHeartbeat(session_id, 100.0, instance=f"{session_id}#1"), 3.0) for session_id in "ab"
]


def begin_tenures(bench: Bench, steps: int) -> None:
    """Bring a group to a state from which any inputs follow: a is primary, then has released, then b is pending."""
    if steps > 0:
        bench.promote("a")
        bench.beat("a", last_data=data(0), after_s=3.0)
    if steps > 1:
        bench.release("a", 1, hold_off_s=20.0)
    if steps > 2:
        assert bench.beat("b").role is W


@pytest.mark.long
def test_r13_r15_r18_hold_for_every_sequence_of_inputs() -> None:
    """The same input twice gives the same output and changes nothing that was given.

    Epochs strictly increase, with one holder each; no lease is made shorter; the data-processed time
    never goes back within a tenure; and the next moment at which something is due is in the future.
    """
    reached: set[str] = set()

    @settings(max_examples=300, deadline=None, derandomize=True)
    @given(
        st.lists(
            st.tuples(INPUTS, st.sampled_from([0.0, 0.5, 3.0, 11.0, 60.0]))
            | st.sampled_from(HEARTBEAT_OF_EITHER),
            max_size=40,
        ),
        st.sampled_from([V1, CALM, CROWDED]),
        st.integers(0, 3),
    )
    def check(inputs: list[tuple[Input, float]], policy: Policy, steps: int) -> None:
        bench = Bench("a", "b", policy=policy)
        begin_tenures(bench, steps)
        for what, after_s in inputs:
            bench.mono += after_s
            before = bench.state
            if decide_twice(before, what, bench) is None:
                continue
            bench.do(what)
            if bench.wake <= bench.mono:  # only a Tick records and removes dead sessions
                assert policy is CROWDED
                bench.do(Tick())
            reached.update(check_step(before, bench))

    check()
    assert reached == {"the same tenure", "its progress", "a new tenure", "the end of a tenure"}


def decide_twice(before: GroupState, what: Input, bench: Bench) -> Decision | None:
    """Check that an input has the same outcome twice; return the decision, or None for a refusal."""
    kept = copy.deepcopy(before)
    outcomes: list[Decision | type[Exception]] = []
    for _ in range(2):
        try:
            outcomes.append(decide(before, what, bench.now, bench.policy))
        except (Conflict, NotFound, TooSoon) as refusal:
            outcomes.append(type(refusal))
    assert outcomes[0] == outcomes[1]
    assert before == kept
    return outcomes[0] if isinstance(outcomes[0], Decision) else None


def check_step(before: GroupState, bench: Bench) -> set[str]:
    """Check what one step may do to a group; return the cases that it was."""
    reached: set[str] = set()
    after = bench.state
    assert bench.wake > bench.mono
    assert after.record.revision >= before.record.revision
    assert after.record.epoch >= before.record.epoch
    statuses = [replace(status_of(state), last_data=None) for state in (before, after)]
    assert (statuses[0] == statuses[1]) or after.record.revision > before.record.revision
    assert set(after.live.contacts) == set(after.record.sessions)
    was, holds = before.record.holder, after.record.holder
    if was is not None and holds is not None and was.epoch == holds.epoch:
        reached.add("the same tenure")
        assert (was.session_id, was.instance) == (holds.session_id, holds.instance)
        assert after.live.lease_until >= before.live.lease_until
        assert status_of(after).last_data == status_of(before).last_data or (
            after.live.last_data is not None
        )
        if before.live.last_data is not None:
            reached.add("its progress")
            assert after.live.last_data is not None
            assert after.live.last_data >= before.live.last_data
    elif holds is not None:
        reached.add("a new tenure")
        assert holds.epoch > before.record.epoch
        assert before.live.lease_until <= bench.mono or was is None
    if was is not None and was != holds and (holds is None or holds.epoch != was.epoch):
        reached.add("the end of a tenure")
        assert bench.history[was.epoch].until is not None
    return reached


# -- R14 --------------------------------------------------------------------------------------------


def test_r14_after_a_restart_the_holder_has_one_full_lease() -> None:
    bench = Bench("a", "b")
    bench.promote("a")
    bench.restart(after_s=1000)
    bench.beat("b")
    bench.do(Tick(), after_s=LEASE_S - 0.01)
    assert bench.primary == "a"
    bench.do(Tick(), after_s=0.01)
    assert bench.primary is None


def test_r14_a_holder_that_sends_heartbeats_after_a_restart_keeps_role_and_epoch() -> None:
    bench = Bench("a", "b")
    bench.promote("a")
    bench.restart()
    bench.beat("b")
    answer = bench.beat("a")
    assert (answer.role, answer.epoch) == (P, 1)


def test_r14_a_session_is_chosen_only_after_its_first_heartbeat() -> None:
    """A session of the record is alive for one L, but not chosen before its first heartbeat."""
    bench = Bench("a", "b").restart()
    bench.do(Tick())
    assert bench.pending is None
    bench.beat("b")
    assert bench.pending == "b"


def test_r14_a_pending_session_has_one_full_lease_to_confirm_after_a_restart() -> None:
    bench = Bench("a", "b")
    bench.beat("a")
    bench.restart(after_s=1000)
    bench.do(Tick(), after_s=LEASE_S - 0.01)
    assert bench.pending == "a"
    assert bench.beat("a").role is P


def test_r14_a_holder_whose_score_is_unknown_is_not_replaced() -> None:
    bench = Bench("a", "b", policy=V1)
    bench.promote("a", 60)
    bench.restart()
    bench.beat("b", 50)
    assert bench.state.record.holder is not None
    assert not bench.state.record.holder.revoked


def test_r14_a_stall_counts_as_no_time_for_a_lease() -> None:
    bench = Bench("a", "b")
    bench.promote("a")
    bench.stall(55, after_s=0.5 * LEASE_S)
    bench.do(Tick(), after_s=0.5 * LEASE_S - 0.01)
    assert bench.primary == "a"
    bench.do(Tick(), after_s=0.02)
    assert bench.primary is None


def test_r14_a_stall_counts_as_no_time_for_a_session() -> None:
    bench = Bench("a")
    bench.stall(55, after_s=0.5 * LEASE_S)
    bench.mono += 0.5 * LEASE_S - 0.01
    assert is_alive(bench.state, "a", bench.now)
    bench.mono += 0.02
    assert not is_alive(bench.state, "a", bench.now)


def test_r14_a_stall_counts_as_no_time_to_confirm() -> None:
    bench = Bench("a")
    bench.beat("a")
    bench.stall(59, after_s=1)
    bench.do(Tick(), after_s=CONFIRM_SHARE * LEASE_S - 1.01)
    assert bench.pending == "a"
    bench.do(Tick(), after_s=0.02)
    assert bench.pending is None


def test_r14_the_time_to_confirm_counts_from_the_end_of_a_lease_that_a_stall_made_longer() -> None:
    bench = Bench("a", "b", policy=V1)
    bench.promote("a", 50)
    bench.beat("b", 60)
    bench.stall(3)
    live = bench.state.live
    assert live.confirm_by == live.lease_until + CONFIRM_SHARE * LEASE_S


def test_r14_a_stall_that_is_noticed_twice_gives_one_full_lease_at_most() -> None:
    """Of the process, while the store stalled, too."""
    bench = Bench("a", "b")
    bench.promote("a", seen_epoch=0)
    bench.stall(55)
    bench.state = state_after_stall(bench.state, bench.mono - 55, bench.now)
    assert bench.state.live.lease_until == bench.mono + LEASE_S
    assert bench.state.live.held_since == bench.state.live.contacts["a"].heard_at == bench.mono


def test_r14_a_stall_does_not_revive_a_dead_session() -> None:
    bench = Bench("a", "b")
    bench.promote("a")
    bench.stall(60, after_s=LEASE_S)
    bench.do(Tick())
    assert bench.primary is None
    assert bench.pending is None


RECURRING = st.lists(st.tuples(st.floats(0.06, 0.5), st.floats(0.26, 2.0)), min_size=1, max_size=5)
"""Times without and with a stall, in L, that are repeated again and again."""


@given(recurring=RECURRING, dead=st.booleans())
@example(recurring=[(0.24, 0.26)], dead=True)
@example(recurring=[(0.24, 0.26)], dead=False)
def test_r14_stalls_that_recur_do_not_keep_a_holder(
    *, recurring: list[tuple[float, float]], dead: bool
) -> None:
    """One that is dead, or receives no answers (R16), loses the role in a bounded time, the stalls left out."""
    bench = Bench("a", "b")
    bench.promote("a", seen_epoch=0)
    ran = 0.0
    for run, stall in cycle(recurring):
        ran += run
        bench.mono += run * LEASE_S
        if not dead:
            bench.beat("a", 100.0, seen_epoch=0)
        bench.beat("b", 50.0, seen_epoch=bench.state.record.epoch)
        if bench.primary == "b":
            break
        assert ran < (1.0 if dead else 1.0 + CONFIRM_SHARE + 0.5) + 2 * 0.5
        bench.stall(stall * LEASE_S)


@given(RECURRING, st.sampled_from([None, "a#1"]), st.floats(0.06, 0.5))
def test_r14_stalls_that_recur_cost_a_healthy_holder_nothing(
    recurring: list[tuple[float, float]], instance: str | None, every: float
) -> None:
    """A v1 client sends a heartbeat each L / 2; one that comes during a stall is read after it."""
    bench = Bench("a", "b")
    seen = bench.promote("a", instance=instance, seen_epoch=None if instance is None else 0).epoch
    due = bench.mono + every * LEASE_S
    for run, stall in recurring * 3:
        stalls_at = bench.mono + run * LEASE_S
        while due <= stalls_at:
            bench.mono = max(due, bench.mono)
            known = None if instance is None else seen
            assert bench.beat("a", instance=instance, seen_epoch=known).role is P
            due = max(due + every * LEASE_S, bench.mono + 0.06 * LEASE_S)
        bench.mono = stalls_at
        bench.stall(stall * LEASE_S)


# -- R15 --------------------------------------------------------------------------------------------


def test_r15_each_tenure_has_the_next_epoch_in_the_same_record_as_its_holder() -> None:
    bench = Bench("a", "b")
    for epoch in range(1, 6):
        session_id = "ab"[epoch % 2]
        bench.beat(session_id, after_s=LEASE_S)
        assert bench.beat(session_id).epoch == epoch
        holder = bench.state.record.holder
        assert holder is not None
        assert (holder.epoch, bench.state.record.epoch) == (epoch, epoch)
        bench.end_of_lease()


def test_r15_history_has_each_tenure_with_its_end_and_why() -> None:
    bench = Bench("a", "b")
    bench.promote("a")
    began = bench.now.wall
    assert bench.history[1] == HistoryEntry(1, "a", began, "chosen")
    bench.end_of_lease()
    ended = bench.history[1]
    assert (ended.since, ended.until) == (began, bench.now.wall)
    assert ended.why_ended == "its lease ended without a heartbeat"


def test_r15_another_process_with_the_same_session_id_does_not_continue_a_tenure() -> None:
    bench = Bench("a")
    bench.promote("a", instance="first")
    lease_until = bench.state.live.lease_until
    answer = bench.beat("a", after_s=1, instance="second")
    assert answer.role is S
    assert bench.state.live.lease_until == lease_until
    bench.end_of_lease()
    assert bench.promote("a", instance="second").epoch == 2


def test_r15_two_processes_with_one_session_id_are_never_both_primary() -> None:
    bench = Bench("a")
    bench.promote("a", instance="first")
    for _ in range(30):
        assert bench.beat("a", after_s=1, instance="second").role is S
        assert bench.beat("a", instance="first").role is P


def test_r15_the_tenure_of_a_v1_client_has_no_instance() -> None:
    """It names no process: a restarted client continues the tenure within L."""
    bench = Bench("a")
    bench.promote("a", instance=None)
    assert bench.beat("a", after_s=9, instance=None).role is P


# -- R16 --------------------------------------------------------------------------------------------


def test_r16_a_sole_member_becomes_pending_and_then_primary() -> None:
    bench = Bench("a")
    assert [bench.beat("a").role for _ in range(2)] == [W, P]


def test_r16_nobody_is_pending_while_the_holder_is_alive() -> None:
    bench = Bench("a", "b")
    bench.promote("a")
    bench.live(60, a=100, b=100)
    assert (bench.primary, bench.pending) == ("a", None)


def test_r16_a_pending_session_is_not_primary_while_the_other_lease_is_alive() -> None:
    bench = Bench("a", "b", policy=V1)
    bench.promote("a", 50)
    assert bench.beat("b", 60).role is W
    assert [bench.beat("b", 60, after_s=1).role for _ in range(5)] == [W] * 5
    bench.end_of_lease()
    assert bench.beat("b", 60).role is P


def test_r16_a_pending_session_is_primary_by_its_next_heartbeat_after_a_release() -> None:
    bench = Bench("a", "b", policy=V1)
    bench.promote("a", 50)
    bench.beat("b", 60)
    bench.release("a", 1)
    assert bench.beat("b", 60).role is P


def test_r16_a_candidate_that_does_not_confirm_in_time_is_passed_over() -> None:
    bench = Bench("a", "b")
    bench.beat("a")
    bench.beat("b", after_s=1)
    assert bench.pending == "a"
    bench.do(Tick(), after_s=CONFIRM_SHARE * LEASE_S - 1.01)
    assert bench.pending == "a"
    bench.do(Tick(), after_s=0.01)
    assert bench.pending == "b"
    assert bench.beat("b").role is P


def test_r16_a_passed_over_session_can_be_chosen_after_its_next_heartbeat() -> None:
    bench = Bench("a")
    bench.beat("a")
    bench.do(Tick(), after_s=CONFIRM_SHARE * LEASE_S)
    assert bench.pending is None
    assert [bench.beat("a").role, bench.beat("a").role] == [W, P]


def test_r16_the_time_to_confirm_starts_at_the_end_of_the_lease() -> None:
    bench = Bench("a", "b", policy=V1)
    bench.promote("a", 50)
    bench.beat("b", 60)
    lease_until = bench.state.live.lease_until
    assert bench.state.live.confirm_by == lease_until + CONFIRM_SHARE * LEASE_S
    bench.release("a", 1, after_s=1)
    assert bench.state.live.confirm_by == bench.mono + CONFIRM_SHARE * LEASE_S


@pytest.mark.parametrize("by", ["score", "override"])
def test_r16_a_tenure_that_would_be_revoked_at_once_does_not_begin(by: str) -> None:
    """Its holder would be answered Secondary, have nothing to release, and block the role for one L."""
    bench = Bench("a", "b", policy=V1)
    bench.beat("a", 50)
    if by == "score":
        bench.beat("b", 60)
    else:
        bench.beat("b", 50)
        bench.do(SetOverride("b", ON))
    assert bench.beat("a", 50).role is S
    assert (bench.primary, bench.pending) == (None, "b")
    assert bench.beat("b", 60).role is P


def test_r16_a_dead_pending_session_is_replaced() -> None:
    bench = Bench("a", "b", policy=V1)
    bench.promote("a", 50)
    bench.beat("b", 60)
    bench.live(9, a=50)
    bench.end_of_lease()
    assert bench.pending == "a"


def test_r16_a_revoked_holder_is_answered_secondary_and_its_lease_is_not_renewed() -> None:
    bench = Bench("a", "b", policy=V1)
    bench.promote("a", 50)
    bench.beat("b", 60)
    lease_until = bench.state.live.lease_until
    assert bench.beat("a", 50, after_s=1).role is S
    assert bench.primary == "a"
    assert bench.state.live.lease_until == lease_until


# -- R17 --------------------------------------------------------------------------------------------


def vacancy(**sessions: dict[str, Any]) -> Bench:
    """A group without a holder, in which every session has just sent a heartbeat."""
    bench = Bench("z", *sorted(sessions))
    bench.promote("z", 100)
    for session_id, what in sessions.items():
        bench.beat(session_id, **{k: v for k, v in what.items() if k != "override"})
    record = bench.state.record
    overridden = {
        session_id: replace(
            record.sessions[session_id], override=ON, override_order=what["override"]
        )
        for session_id, what in sessions.items()
        if "override" in what
    }
    record = replace(record, sessions={**record.sessions, **overridden})
    bench.state = replace(bench.state, record=record)
    bench.do(RemoveSession("z"))
    bench.release("z", 1)
    return bench


@pytest.mark.parametrize(
    ("sessions", "chosen"),
    [
        ({"a": {"score": 90.0}, "b": {"score": 1.0, "override": 1}}, "b"),
        ({"a": {"override": 1}, "b": {"override": 2, "score": 1.0}}, "b"),
        ({"a": {"score": 10.0, "last_data": data(9)}, "b": {"score": 20.0}}, "b"),
        ({"a": {"last_data": data(1)}, "b": {"last_data": data(2)}}, "b"),
        ({"a": {}, "b": {"last_data": data(1)}}, "b"),
        ({"b": {}, "a": {}}, "a"),
    ],
    ids=["override", "newest override", "score", "newest data", "any data", "id"],
)
def test_r17_the_order_of_choice(sessions: dict[str, dict[str, Any]], chosen: str) -> None:
    assert vacancy(**sessions).pending == chosen


def test_r17_a_live_holder_is_replaced_beyond_the_hysteresis_and_the_minimum_hold() -> None:
    bench = Bench("a", "b")
    bench.promote("a", 80)
    bench.live(60, a=80, b=90)
    assert bench.primary == "a"
    assert bench.pending is None, "90 is not more than 80 by more than 10"
    bench.live(1, a=80, b=90.5)
    assert bench.pending == "b"


def test_r17_the_minimum_hold_protects_a_young_tenure_and_no_longer() -> None:
    bench = Bench("a", "b")
    bench.promote("a", 50)
    bench.live(29, a=50, b=100)
    assert bench.pending is None
    assert bench.wake == pytest.approx(1030.0), "nothing needs to come for it to be looked at"
    bench.live(1, a=50, b=100)
    assert bench.pending == "b"


@pytest.mark.parametrize("policy", [V1, CALM])
@pytest.mark.parametrize("score", [0.0, 40.0])
def test_r17_equally_sick_members_never_flap(policy: Policy, score: float) -> None:
    bench = Bench("a", "b", policy=policy)
    bench.promote("b", score)
    bench.live(120, a=score, b=score)
    assert bench.primary == "b"
    assert bench.state.record.epoch == 1


def test_r17_strict_v1_replaces_at_the_least_better_score() -> None:
    bench = Bench("a", "b", policy=V1)
    bench.promote("a", 80)
    bench.beat("b", 80.01)
    assert bench.pending == "b"


def test_r17_a_session_is_not_chosen_during_its_hold_off() -> None:
    bench = Bench("a")
    bench.promote("a")
    bench.release("a", 1, hold_off_s=5.0)
    assert bench.wake == bench.mono + 5.0
    assert bench.beat("a", after_s=4.9).role is S
    bench.do(Tick(), after_s=0.1)
    assert bench.pending == "a"


def test_r17_a_member_that_has_released_the_role_is_chosen_after_the_others() -> None:
    """Its heartbeats may arrive but not the answers: it would get the role again and again."""
    bench = Bench("a", "b")
    bench.promote("a")
    bench.beat("b")
    bench.release("a", 1, "no renewal for 6.5 s")
    assert bench.pending == "b"


def test_r17_a_sole_member_that_has_released_the_role_is_chosen_after_its_next_heartbeat() -> None:
    bench = Bench("a", "b")
    bench.promote("a")
    bench.release("a", 1, "no renewal for 6.5 s")
    assert bench.pending is None
    assert bench.beat("a", after_s=1).role is W


def test_r17_a_member_without_a_heartbeat_for_l_is_not_chosen() -> None:
    bench = Bench("a", "b")
    bench.promote("a")
    bench.beat("b")
    bench.live(9, a=100)
    bench.release("a", 1, hold_off_s=100, after_s=1)
    assert bench.pending is None


# -- overrides --------------------------------------------------------------------------------------


def test_an_override_replaces_a_better_holder_at_once() -> None:
    bench = Bench("a", "b")
    bench.promote("a", 100)
    bench.beat("b", 1)
    bench.do(SetOverride("b", ON))
    assert bench.pending == "b"
    bench.release("a", 1)
    bench.beat("b", 1)
    bench.live(60, a=100, b=1)
    assert bench.primary == "b"
    assert bench.history[2].why_started == "overridden"


def test_the_newest_override_wins() -> None:
    bench = Bench("a", "b", "c")
    bench.promote("a")
    bench.live(1, a=100, b=100, c=100)
    bench.do(SetOverride("c", ON))
    bench.release("a", 1)
    bench.promote("c")
    bench.do(SetOverride("b", ON))
    assert bench.pending == "b"
    bench.release("c", 2)
    bench.promote("b")
    bench.beat("c", after_s=1)
    bench.do(SetOverride("c", ON))
    assert bench.pending == "c"


def test_an_override_that_is_turned_off_has_no_effect() -> None:
    bench = Bench("a", "b", policy=V1)
    bench.do(SetOverride("b", ON))
    bench.promote("b", 1)
    bench.live(5, a=100, b=1)
    assert bench.primary == "b"
    bench.do(SetOverride("b", OFF))
    assert bench.pending == "a"


def test_an_override_expires() -> None:
    bench = Bench("a", "b", policy=V1)
    bench.do(SetOverride("b", ON, bench.now.wall + timedelta(seconds=5)))
    assert bench.wake == pytest.approx(bench.mono + 5)
    bench.promote("b", 1)
    bench.beat("a", 100)
    assert bench.do(Tick(), after_s=4.9).state.record.pending is None
    assert bench.do(Tick(), after_s=0.1).state.record.pending == "a"
    session = view_of(bench.state, "b", bench.now).record
    assert (session.override, session.override_until) == (OFF, None)


def test_an_override_never_pins_a_dead_session() -> None:
    """docs/api.md, "Role override": it loses the role like any other, and gets it again when it returns."""
    bench = Bench("a", "b")
    bench.do(SetOverride("b", ON))
    bench.promote("b", 1)
    bench.live(15, a=100)
    assert bench.primary == "a"
    bench.beat("b", 1)
    assert bench.pending == "b"


def test_an_override_survives_a_restart() -> None:
    bench = Bench("a", "b")
    bench.promote("a")
    bench.do(SetOverride("b", ON))
    bench.restart()
    bench.beat("a")
    bench.beat("b", 1)
    assert bench.pending == "b"


# -- R18 --------------------------------------------------------------------------------------------


def test_r18_the_status_has_the_primarys_time_and_not_a_secondarys() -> None:
    bench = Bench("a", "b")
    bench.promote("a")
    bench.beat("a", after_s=1, last_data=data(5))
    bench.beat("b", after_s=1, last_data=data(9))
    assert status_of(bench.state).last_data == data(5)


def test_r18_the_data_processed_time_never_goes_back_within_a_tenure() -> None:
    bench = Bench("a")
    bench.promote("a")
    for seconds, expected in [(5, 5), (3, 5), (6, 6)]:
        bench.beat("a", after_s=1, last_data=data(seconds))
        assert status_of(bench.state).last_data == data(expected)
    bench.beat("a", after_s=1)
    assert status_of(bench.state).last_data == data(6)


def test_r18_the_next_holder_receives_the_data_processed_time_with_its_promotion() -> None:
    bench = Bench("a", "b")
    bench.promote("a")
    bench.beat("a", after_s=1, last_data=data(5))
    bench.release("a", 1, hold_off_s=100, last_data=data(6))
    bench.beat("b")
    answer = bench.beat("b")
    assert (answer.role, answer.last_data, answer.previous) == (P, data(6), "a")
    assert status_of(bench.state).last_data == data(6), "until the new primary reports its own"


def test_r18_the_next_holder_does_not_receive_its_own_older_time() -> None:
    """Its hook would back-fill from too far back."""
    bench = Bench("a", "b")
    bench.promote("a")
    bench.beat("a", after_s=1, last_data=data(500))
    bench.release("a", 1, hold_off_s=100)
    bench.beat("b", last_data=data(3))
    assert bench.beat("b", last_data=data(3)).last_data == data(500)


def test_r18_a_tenure_without_a_report_passes_on_the_time_that_it_received() -> None:
    bench = Bench("a", "b")
    bench.promote("a")
    bench.beat("a", after_s=1, last_data=data(5))
    bench.release("a", 1, hold_off_s=100)
    bench.promote("b")
    bench.release("b", 2, hold_off_s=1000)
    bench.restart(after_s=100)
    assert bench.promote("a").last_data == data(5)


def test_r18_a_release_of_an_old_tenure_reports_no_progress() -> None:
    bench = Bench("a", "b")
    bench.promote("a")
    bench.release("a", 0, last_data=data(9))
    bench.release("b", 1, last_data=data(9))
    assert (bench.primary, status_of(bench.state).last_data) == ("a", None)


# -- the minimum interval of heartbeats -------------------------------------------------------------


@pytest.mark.parametrize(("lease_s", "interval_s"), [(0.5, 0.025), (10, 0.5), (60, 1), (2e6, 1)])
def test_the_minimum_interval_grows_with_the_lease_to_one_second(
    lease_s: float, interval_s: float
) -> None:
    assert minimum_interval_s(lease_s) == pytest.approx(interval_s)


def test_heartbeats_closer_than_the_interval_are_refused_with_the_time_to_wait() -> None:
    bench = Bench("a")
    bench.promote("a")
    bench.beat("a", after_s=0.5)
    with pytest.raises(TooSoon, match=r'"a" came 0\.300 s before') as refused:
        bench.beat("a", after_s=0.2)
    assert refused.value.retry_after_s == pytest.approx(0.3)
    assert bench.beat("a", after_s=0.3).role is P


def test_a_heartbeat_that_is_a_little_early_is_not_refused() -> None:
    bench = Bench("a")
    bench.promote("a")
    bench.beat("a", after_s=0.5)
    assert bench.beat("a", after_s=0.46).role is P


def test_confirmations_are_never_refused() -> None:
    bench = Bench("a", "b", policy=V1)
    bench.promote("a", 50)
    assert [bench.beat("b", 60).role for _ in range(20)] == [W] * 20


def test_a_session_that_has_not_seen_the_newest_revision_is_never_refused() -> None:
    bench = Bench("a", "b")
    bench.promote("a")
    bench.beat("b")
    with pytest.raises(TooSoon):
        bench.beat("b")
    bench.release("a", 1, hold_off_s=100)
    assert bench.beat("b").role is P


def test_another_process_of_the_session_is_not_refused() -> None:
    bench = Bench("a", "b")
    bench.promote("b")
    bench.beat("a", instance="first")
    assert bench.beat("a", instance="second").role is S


@pytest.mark.parametrize("names", [["1", "2"], ["1", None], [str(n) for n in range(200)]])
def test_the_interval_is_not_escaped_by_changing_the_instance(names: list[str | None]) -> None:
    """Two heartbeats in an interval are the most, however many processes a session claims to be."""
    bench = Bench("a", "b")
    bench.promote("b")
    accepted = 0
    for number in range(200):  # in 10 intervals
        bench.mono += 0.025
        try:
            bench.beat("a", instance=names[number % len(names)])
        except TooSoon:
            continue
        accepted += 1
    assert 10 <= accepted <= 22


@pytest.mark.parametrize("mine", ["a#1", None])
def test_the_holder_is_heard_however_many_heartbeats_others_send_for_its_session(
    mine: str | None,
) -> None:
    """Two other instances took turns, and each heartbeat of the holder was too soon: its lease ended."""
    bench = Bench("a", "b")
    bench.promote("a", instance=mine)
    for _ in range(30):  # three leases
        for number in range(100):
            bench.mono += 0.01
            with contextlib.suppress(TooSoon):
                bench.beat("a", instance=f"other {number % 2}")
        assert bench.beat("a", instance=mine, seen_epoch=1).role is P
        with pytest.raises(TooSoon):
            bench.beat("a", instance=mine, seen_epoch=1)


def test_an_agent_that_is_restarted_again_and_again_is_heard_each_time() -> None:
    bench = Bench("a", "b")
    bench.promote("b")
    for number in range(5):
        assert bench.beat("a", after_s=0.5, instance=f"{number}").role is S
        assert bench.beat("a", after_s=0.1, instance=f"{number}, restarted").role is S


def test_confirmations_by_another_process_are_never_refused() -> None:
    bench = Bench("a", "b", policy=V1)
    bench.promote("a", 50)
    assert [bench.beat("b", 60, instance=f"{n}").role for n in range(20)] == [W] * 20


# -- sessions and the group -------------------------------------------------------------------------


def test_a_session_is_created_once() -> None:
    bench = Bench()
    assert bench.do(AddSession(SessionConfig("a", "A"))).answer is True
    record = bench.state.record
    assert bench.do(AddSession(SessionConfig("a", "A"))).answer is False
    assert bench.do(AddSession(SessionConfig("a"))).answer is False, "absent fields agree with any"
    assert bench.state.record is record
    with pytest.raises(Conflict, match='"a" exists with another configuration'):
        bench.do(AddSession(SessionConfig("a", "B")))


def test_the_number_of_sessions_of_a_group_is_bounded() -> None:
    bench = Bench("a", "b", policy=replace(CALM, max_sessions=2))
    with pytest.raises(Conflict, match="has 2 client sessions, the most"):
        bench.do(AddSession(SessionConfig("c")))
    assert bench.do(AddSession(SessionConfig("a"))).answer is False
    bench.do(RemoveSession("b"))
    assert bench.do(AddSession(SessionConfig("c"))).answer is True


@pytest.mark.parametrize(
    "what", [ReceiveHeartbeat("x", 1.0), RemoveSession("x"), SetOverride("x", ON)]
)
def test_a_session_that_is_not_registered_is_not_found(what: Input) -> None:
    with pytest.raises(NotFound, match='no client session "x" in group "g"'):
        Bench("a").do(what)


@pytest.mark.parametrize(
    ("wanted", "known", "same"),
    [
        (GroupConfig("g", 1), GroupConfig("g", 1, "G", "text", '{"x":1}'), True),
        (GroupConfig("g", 1, "G"), GroupConfig("g", 1), False),
        (GroupConfig("g", 2), GroupConfig("g", 1), False),
        (GroupConfig("g", 1, description="a"), GroupConfig("g", 1, description="b"), False),
        (
            GroupConfig("g", 1, additional='{"x":1}'),
            GroupConfig("g", 1, additional='{"x":2}'),
            False,
        ),
        (SessionConfig("a"), SessionConfig("a", "A", '{"x":1}'), True),
        (SessionConfig("a", None, '{"x":1}'), SessionConfig("a"), False),
        (
            SessionConfig("a", None, '{"x":1,"y":[]}'),
            SessionConfig("a", "A", '{"y":[],"x":1}'),
            True,
        ),
        (SessionConfig("a", "B"), SessionConfig("a", "A"), False),
    ],
)
def test_configurations_are_compatible_if_their_common_fields_agree(
    wanted: Any, known: Any, *, same: bool
) -> None:
    """docs/api.md, "Groups"."""
    assert is_compatible(wanted, known) is same


def test_deleting_a_v1_holder_frees_the_role() -> None:
    """docs/api.md, "Sessions and heartbeats": a v1 client has no other way to release."""
    bench = Bench("a", "b")
    bench.promote("a", instance=None)
    bench.beat("b")
    bench.do(RemoveSession("a"))
    assert bench.pending == "b"
    assert bench.history[1].why_ended == "its client session was deleted"
    assert bench.beat("b").role is P


def test_deleting_a_holder_with_an_instance_leaves_its_lease_to_expire() -> None:
    """R5: our agents release first; so somebody else deleted it, and it may still be active."""
    bench = Bench("a", "b")
    bench.promote("a")
    bench.live(1, a=100, b=100)
    bench.do(RemoveSession("a"))
    assert bench.primary == "a"
    bench.live(9, b=100)
    assert bench.primary == "a"
    bench.end_of_lease()
    assert bench.pending == "b"


def test_a_deleted_holder_that_registers_again_keeps_its_tenure() -> None:
    bench = Bench("a", "b")
    bench.promote("a")
    bench.beat("b")
    bench.do(RemoveSession("a"))
    with pytest.raises(NotFound):
        bench.beat("a", after_s=1)
    bench.do(AddSession(SessionConfig("a")))
    answer = bench.beat("a")
    assert (answer.role, answer.epoch) == (P, 1)


def test_a_deleted_pending_session_is_replaced() -> None:
    bench = Bench("a", "b")
    bench.beat("a")
    bench.beat("b")
    bench.do(RemoveSession("a"))
    assert bench.pending == "b"


def test_a_group_with_active_sessions_is_not_deleted() -> None:
    bench = Bench("a", "b")
    with pytest.raises(Conflict, match="active client sessions: a, b"):
        bench.do(RemoveGroup())
    bench.do(RemoveGroup(), after_s=LEASE_S)


def test_a_group_whose_holder_was_deleted_is_active_until_the_lease_ends() -> None:
    bench = Bench("a")
    bench.promote("a")
    bench.do(RemoveSession("a"))
    with pytest.raises(Conflict, match="active client sessions: a"):
        bench.do(RemoveGroup())
    bench.do(RemoveGroup(), after_s=LEASE_S)


def test_the_access_list_is_replaced() -> None:
    bench = Bench("a")
    acl = AccessList()
    bench.do(SetAccess(acl))
    assert bench.state.record.acl is acl


def test_a_repeated_release_ends_one_tenure() -> None:
    bench = Bench("a")
    bench.promote("a")
    bench.release("a", 1)
    bench.promote("a")
    bench.release("a", 1)
    assert (bench.primary, bench.state.record.epoch) == ("a", 2)


def test_a_view_has_the_role_and_the_last_heartbeat() -> None:
    bench = Bench("a", "b")
    assert view_of(bench.state, "a", bench.now).heartbeat_at is None
    bench.promote("a", 70, last_data=data(1))
    view = view_of(bench.state, "a", bench.now)
    assert (view.role, view.score, view.last_data) == (P, 70, data(1))
    assert view.heartbeat_at == bench.now.wall
    assert role_of(bench.state.record, "b") is S
    with pytest.raises(NotFound):
        view_of(bench.state, "x", bench.now)


def test_the_revision_grows_only_with_a_change_of_the_status() -> None:
    bench = Bench("a", "b")
    revision = bench.state.record.revision
    bench.do(SetAccess(AccessList()))
    assert bench.state.record.revision == revision
    bench.beat("a")
    assert bench.state.record.revision == revision + 1
    assert bench.beat("a").revision == revision + 2


# -- data loss --------------------------------------------------------------------------------------


def test_data_older_than_its_clients_gives_nobody_the_role_for_one_lease() -> None:
    """A member may hold a lease of an epoch that was lost."""
    bench = Bench("a", "b")
    answer = bench.beat("a", seen_epoch=7)
    assert (answer.role, answer.epoch) == (W, 7)
    learned_at = bench.mono
    while bench.mono - learned_at < LEASE_S - 0.5:
        assert bench.beat("a", after_s=0.5, seen_epoch=7).role in {W, S}
    bench.mono = learned_at + LEASE_S
    answer = bench.promote("a", seen_epoch=7)
    assert (answer.role, answer.epoch) == (P, 8)


def test_a_tenure_older_than_what_clients_have_seen_ends() -> None:
    bench = Bench("a", "b")
    bench.promote("a")
    assert bench.beat("b", seen_epoch=7).epoch == 7
    assert bench.primary is None
    assert bench.history[1].why_ended == "its epoch is older than one that a client has seen"
    assert bench.beat("a", after_s=1).role is not P


def test_a_known_epoch_changes_nothing() -> None:
    bench = Bench("a", "b")
    bench.promote("a")
    assert bench.beat("a", after_s=1, seen_epoch=1).role is P
    assert bench.beat("b", seen_epoch=0).role is S
    assert bench.state.live.quiet_until == float("-inf")


def test_a_learned_epoch_restarts_the_time_to_confirm_after_the_quiet_time() -> None:
    bench = Bench("a", "b")
    bench.beat("a")
    bench.beat("b", after_s=1)
    bench.beat("b", after_s=1, seen_epoch=7)
    assert bench.state.live.confirm_by == bench.mono + (1 + CONFIRM_SHARE) * LEASE_S


def test_the_quiet_time_starts_again_after_a_restart() -> None:
    """Fault 4: the protection of an unknown lease survives the coordinator."""
    bench = Bench("a", "b")
    bench.beat("a", seen_epoch=7)
    for _ in range(3):
        bench.restart(after_s=LEASE_S - 1)
        began_at = bench.mono
        while bench.mono - began_at < LEASE_S - 1:
            assert bench.beat("a", after_s=0.5, seen_epoch=7).role is not P
    bench.restart(after_s=0.0)
    bench.beat("a")
    assert bench.state.record.pending == "a"
    assert bench.state.live.confirm_by > bench.mono + LEASE_S, "it can confirm after the quiet time"
    assert bench.wake <= bench.mono + LEASE_S
    bench.do(Tick(), after_s=LEASE_S)
    assert not bench.state.record.quiet
    assert (bench.promote("a").epoch, bench.wake) == (8, bench.mono + LEASE_S)


def test_a_restart_after_the_quiet_time_starts_none() -> None:
    bench = Bench("a")
    bench.beat("a", seen_epoch=7)
    bench.do(Tick(), after_s=LEASE_S)
    bench.restart()
    assert bench.promote("a", seen_epoch=7).epoch == 8


def test_a_group_is_not_deleted_in_its_quiet_time() -> None:
    """Fault 8: a new group of this name would not know of the lease."""
    bench = Bench("a", "b")
    bench.promote("a")
    bench.beat("b", seen_epoch=7)
    for session_id in "ab":
        bench.do(RemoveSession(session_id))
    with pytest.raises(Conflict, match='older than group "g": a client may hold the role'):
        bench.do(RemoveGroup(), after_s=LEASE_S - 0.1)
    bench.do(RemoveGroup(), after_s=0.1)


# -- epochs from callers ----------------------------------------------------------------------------


@pytest.mark.parametrize("seen", [LARGEST_EPOCH_STEP + 2, MAX_EPOCH])
def test_an_implausible_epoch_is_refused(seen: int) -> None:
    """Fault 15: one heartbeat made a group unusable for ever."""
    bench = Bench("a", "b")
    bench.promote("a")
    before = copy.deepcopy(bench.state)
    bench.mono += 1
    with pytest.raises(
        Invalid, match=rf"Epoch is {seen}: it must be at most {LARGEST_EPOCH_STEP + 1}, .* is 1\."
    ):
        bench.beat("b", seen_epoch=seen)
    assert bench.state == before
    assert bench.beat("a").role is P


def test_an_epoch_within_reach_is_learned() -> None:
    bench = Bench("a")
    bench.beat("a", seen_epoch=LARGEST_EPOCH_STEP)
    assert bench.state.record.epoch == LARGEST_EPOCH_STEP


def test_repeated_heartbeats_cannot_raise_the_epoch_beyond_the_limit() -> None:
    bench = at_epoch(HIGHEST_LEARNED_EPOCH - 5)
    bench.beat("a", seen_epoch=HIGHEST_LEARNED_EPOCH)
    with pytest.raises(Invalid, match=f"must be at most {HIGHEST_LEARNED_EPOCH}"):
        bench.beat("a", after_s=1, seen_epoch=HIGHEST_LEARNED_EPOCH + 1)
    bench.do(Tick(), after_s=LEASE_S)
    assert bench.promote("a", seen_epoch=HIGHEST_LEARNED_EPOCH).epoch == HIGHEST_LEARNED_EPOCH + 1
    assert bench.beat("a", after_s=1, seen_epoch=HIGHEST_LEARNED_EPOCH + 1).role is P


def at_epoch(epoch: int) -> Bench:
    """A group with one session, whose record has that epoch."""
    bench = Bench("a")
    bench.state = state_after_restart(replace(bench.state.record, epoch=epoch), bench.now)
    return bench


def test_a_group_without_epochs_left_is_refused_and_can_be_deleted_and_created_again() -> None:
    """Fault 15: a heartbeat could set the last epoch in version 0.1.0."""
    bench = at_epoch(MAX_EPOCH)
    with pytest.raises(Conflict, match='"g" has used up its epochs') as error:
        bench.beat("a", seen_epoch=MAX_EPOCH)
    assert "Delete the group" in error.value.resolution
    with pytest.raises(Conflict):
        bench.beat("a", after_s=LEASE_S - 1)
    bench.do(RemoveGroup(), after_s=1)  # a refused heartbeat keeps no session active
    assert epoch_after_deletion(bench.state.record.epoch) == 0
    assert epoch_after_deletion(7) == 7


def test_the_last_tenure_of_a_group_without_epochs_left_is_renewed() -> None:
    bench = at_epoch(MAX_EPOCH - 1)
    assert bench.promote("a", seen_epoch=None).epoch == MAX_EPOCH
    assert bench.beat("a", after_s=1, seen_epoch=MAX_EPOCH).role is P


def test_an_epoch_above_the_maximum_is_loaded_as_the_maximum() -> None:
    record = Bench("a").state.record
    record = replace(
        record, epoch=2**53 + 3, holder=Tenure("a", 2**53 + 3, WALL, "chosen", instance="a#1")
    )
    state = state_after_restart(record, Instant(1000.0, WALL))
    assert (state.record.epoch, state.record.holder) == (MAX_EPOCH, None)


# -- wake-up times ----------------------------------------------------------------------------------


def test_nothing_but_the_silence_of_its_session_is_due_in_an_idle_group() -> None:
    assert wake_at(Bench().state, Bench().now, CALM) == float("inf")
    bench = Bench("a")
    assert wake_at(bench.state, bench.now, CALM) == bench.mono + 3600


def test_the_end_of_the_lease_is_due() -> None:
    bench = Bench("a")
    bench.promote("a")
    assert bench.wake == bench.mono + LEASE_S


def test_r16_a_holder_that_receives_no_answers_is_revoked_and_not_chosen_again() -> None:
    """Its heartbeats arrive, our answers do not: it is not active, and blocks the role."""
    bench = Bench("a", "b")
    bench.promote("a", seen_epoch=0)
    lease_s = CONFIG.lease_s
    for _ in range(40):
        bench.beat("a", 100.0, after_s=0.1 * lease_s, seen_epoch=0)
        bench.beat("b", 50.0, seen_epoch=bench.state.record.epoch)
    assert bench.primary == "b"
    assert bench.state.record.sessions["a"].has_to_see == 1
    bench.beat("a", 100.0, after_s=0.1 * lease_s, seen_epoch=bench.state.record.epoch)
    assert bench.state.record.sessions["a"].has_to_see is None, "it hears again"


def test_r16_the_epoch_that_a_session_has_to_see_survives_a_restart() -> None:
    """Fault 4: chosen again, it would block the role for another lease."""
    bench = Bench("a", "b")
    bench.promote("a", seen_epoch=0)
    for _ in range(7):
        bench.beat("a", after_s=1, seen_epoch=0)
    bench.restart()
    bench.beat("a", seen_epoch=0)
    bench.end_of_lease()
    assert bench.beat("a", seen_epoch=0).role is S
    assert bench.promote("a", seen_epoch=1, after_s=1).epoch == 2


def test_r16_a_late_heartbeat_from_before_the_tenure_revokes_nobody() -> None:
    """Fault 27: the network may deliver it more than 0.6 L late."""
    bench = Bench("a", "b")
    bench.promote("a", seen_epoch=0)
    for _ in range(7):
        assert bench.beat("a", after_s=1, seen_epoch=1).role is P
    assert bench.beat("a", after_s=0.5, seen_epoch=0).role is P
    assert bench.beat("a", after_s=0.5, instance="stranger", seen_epoch=0).role is S
    assert bench.beat("a", after_s=0.5, seen_epoch=0).role is P
    assert bench.beat("a", after_s=0.5, seen_epoch=1).role is P


@pytest.mark.parametrize("share", [0.0, 0.3, 0.55])
def test_r16_a_late_heartbeat_after_a_stall_of_the_coordinator_revokes_nobody(share: float) -> None:
    """Fault 27: it was the first one that a coordinator read that had been frozen since the grant."""
    bench = Bench("a", "b")
    bench.promote("a", seen_epoch=0)
    bench.stall(0.7 * LEASE_S, after_s=share * LEASE_S)
    assert bench.beat("a", seen_epoch=0).role is P
    assert bench.beat("a", after_s=0.5, seen_epoch=1).role is P
    assert bench.beat("a", after_s=0.5 * LEASE_S, seen_epoch=1).role is P


def test_the_additional_data_of_a_group_and_its_sessions_are_bounded() -> None:
    bench = Bench()
    text = '"' + "x" * (MAX_ADDITIONAL_BYTES // 2) + '"'
    bench.do(AddSession(SessionConfig("a", additional=text)))
    with pytest.raises(Conflict, match="would have"):
        bench.do(AddSession(SessionConfig("b", additional=text)))


# -- releases ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("instance", [None, "", "a#2"])
def test_a_release_by_another_process_changes_nothing(instance: str | None) -> None:
    """Fault 8: the next one was primary within 20 ms, while the first could act until R."""
    bench = Bench("a", "b")
    bench.promote("a")
    bench.beat("b")
    before = bench.state
    bench.release("a", 1, instance=instance, hold_off_s=100)
    assert bench.state == before
    bench.release("b", 1, hold_off_s=100)
    bench.release("a", 2, hold_off_s=100)
    assert bench.state == before


def test_a_release_by_a_v1_holder_needs_no_process() -> None:
    bench = Bench("a")
    bench.promote("a", instance=None)
    bench.release("a", 1, instance="a#1")
    assert bench.primary == "a"
    bench.release("a", 1, instance=None)
    assert bench.primary is None


def test_the_hold_off_of_a_late_release_counts_once() -> None:
    """The demotion outlasted the lease; and the same release may come again much later."""
    bench = Bench("a", "b")
    bench.promote("a")
    bench.end_of_lease()
    bench.release("a", 1, instance="stranger", hold_off_s=100)
    assert bench.beat("a").role is W
    bench.release("a", 1, hold_off_s=5)
    assert bench.beat("a", after_s=4).role is S
    assert bench.beat("a", after_s=1).role is P
    state = bench.state
    bench.release("a", 1, hold_off_s=5)
    assert bench.state == state


def test_a_repeated_release_holds_off_once() -> None:
    bench = Bench("a")
    bench.promote("a")
    bench.release("a", 1, hold_off_s=5)
    bench.release("a", 1, hold_off_s=5, after_s=4)
    assert bench.wake == bench.mono + 1


def test_a_release_without_a_hold_off_does_not_consume_the_late_one() -> None:
    """The guard releases the tenure, and then the agent asks for a hold-off."""
    bench = Bench("a")
    bench.promote("a")
    bench.end_of_lease()
    bench.release("a", 1)
    bench.release("a", 1, hold_off_s=5)
    assert bench.beat("a").role is S


def test_a_hold_off_is_bounded() -> None:
    bench = Bench("a")
    bench.promote("a")
    bench.release("a", 1, hold_off_s=1e9)
    held_until = bench.state.live.contacts["a"].hold_off_until
    assert held_until == bench.mono + LONGEST_HOLD_OFF_S
    hold_off = bench.state.record.sessions["a"].hold_off
    assert hold_off is not None
    assert hold_off.until == bench.now.wall + timedelta(days=1)


def test_a_hold_off_continues_after_a_restart() -> None:
    """Fault 4: the member whose promotion had just failed was chosen first."""
    bench = Bench("a")
    bench.promote("a")
    bench.release("a", 1, hold_off_s=60)
    bench.restart(after_s=20)
    assert bench.beat("a").role is S
    assert bench.wake == pytest.approx(bench.mono + 40)
    bench.beat("a", after_s=39)
    assert bench.pending is None
    record = bench.do(Tick(), after_s=1).state.record
    assert (record.pending, record.sessions["a"].hold_off) == ("a", None)


@pytest.mark.parametrize(("step_s", "left_s"), [(3600, 0), (-3600, 60)])
def test_a_changed_wall_clock_never_lengthens_a_hold_off(step_s: float, left_s: float) -> None:
    bench = Bench("a")
    bench.promote("a")
    bench.release("a", 1, hold_off_s=60)
    now = Instant(bench.mono, bench.now.wall + timedelta(seconds=step_s))
    awake = state_after_restart(bench.state.record, now)
    assert awake.live.contacts["a"].hold_off_until == bench.mono + left_s


def test_a_release_of_a_session_that_was_deleted_frees_the_role() -> None:
    bench = Bench("a", "b")
    bench.promote("a")
    bench.beat("b")
    bench.do(RemoveSession("a"))
    bench.release("a", 1, hold_off_s=100)
    assert bench.pending == "b"
    assert bench.beat("b").role is P


def test_the_deletion_of_another_session_does_not_end_the_tenure_of_a_v1_client() -> None:
    bench = Bench("a", "b")
    bench.promote("a", instance=None)
    bench.do(RemoveSession("b"))
    assert bench.primary == "a"


def test_r17_the_end_of_the_minimum_hold_is_awaited_once() -> None:
    bench = Bench("a", "b")
    bench.promote("a")
    bench.live(CALM.minimum_hold_s, a=100, b=100)
    bench.do(Tick())
    assert bench.wake > bench.mono


def test_r16_the_time_to_confirm_ends_at_its_deadline() -> None:
    bench = Bench("a", "b")
    bench.beat("a")
    bench.mono = bench.state.live.confirm_by
    bench.do(Tick())
    assert bench.pending is None


@pytest.mark.parametrize("excess", [0, 1, 5])
def test_only_a_session_with_additional_data_can_exceed_their_bound(excess: int) -> None:
    bench = Bench()
    text = '"' + "x" * (MAX_ADDITIONAL_BYTES - 4 + excess) + '"'
    bench.state = replace(
        bench.state, record=replace(bench.state.record, config=replace(CONFIG, additional=text))
    )
    bench.do(AddSession(SessionConfig("a")))
    if excess:
        with pytest.raises(Conflict):
            bench.do(AddSession(SessionConfig("b", additional="{}")))
    else:
        bench.do(AddSession(SessionConfig("b", additional="{}")))
