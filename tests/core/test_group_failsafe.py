"""Failsafe on the coordinator's side: whom a holder asks, who may be promoted after it (R21 to R25, R33, R34)."""

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest

from agent.core.group import LARGEST_EPOCH_STEP, decide, new_record
from agent.core.group_endings import (
    HIGHEST_LEARNED_EPOCH,
    LATEST_RESTORED_EPOCH,
    RESTORED_EPOCH_STEP,
)
from agent.core.group_failsafe import MOST_MEMBERS, choosable_members, is_restricted
from agent.core.group_state import (
    AddSession,
    DeclareRestored,
    GroupState,
    Lift,
    RemoveGroup,
    RemoveSession,
    Requester,
    SetOverride,
    Tick,
    status_of,
)
from agent.errors import Conflict
from agent.model import (
    FailsafeState,
    FailsafeStatus,
    GroupRecord,
    HeartbeatAnswer,
    Instant,
    Lapsed,
    Member,
    MemberSet,
    Role,
    RoleOverride,
    SessionConfig,
    TenureEnd,
)
from tests.core.test_group import CALM, CONFIG, LEASE_S, Bench, data

S, P, W = Role.SECONDARY, Role.PRIMARY, Role.PENDING_PRIMARY


def url_of(session_id: str) -> str:
    return f"http://{session_id}:9"


def member(session_id: str) -> Member:
    return Member(session_id, url_of(session_id))


def members(*session_ids: str) -> tuple[Member, ...]:
    return tuple(member(session_id) for session_id in session_ids)


class FailsafeBench(Bench):
    """A group whose sessions have a failsafe listener."""

    def beat(
        self, session_id: str, score: float = 100.0, *, after_s: float = 0.0, **more: Any
    ) -> HeartbeatAnswer:
        more.setdefault("failsafe_url", url_of(session_id))
        return super().beat(session_id, score, after_s=after_s, **more)

    def hold(self, session_id: str, *, after_s: float = 1.0, **more: Any) -> HeartbeatAnswer:
        """A heartbeat of the primary, which uses the newest set that it was offered."""
        record = self.state.record
        known = record.offered or record.used
        more.setdefault("holds", record.epoch)
        more.setdefault("failsafe_revision", known.revision if known is not None else None)
        return self.beat(session_id, after_s=after_s, seen_epoch=record.epoch, **more)

    def ready(self, holder: str, *others: str) -> "FailsafeBench":
        """Promote the holder, and let it use a set of all of them."""
        self.promote(holder)
        for session_id in others:
            self.beat(session_id, 50.0)
        self.hold(holder)
        self.hold(holder)
        assert self.state.record.used == MemberSet(
            self.state.record.set_revision, tuple(sorted(members(holder, *others)))
        )
        return self

    @property
    def choosable(self) -> tuple[Member, ...] | None:
        return choosable_members(self.state.record)

    @property
    def cleared(self) -> int:
        return self.state.record.cleared

    def failsafe(self) -> FailsafeStatus:
        status = status_of(self.state).failsafe
        assert status is not None
        return status


def lapsed(*others: str) -> FailsafeBench:
    """A group whose primary a was lost with a set in use."""
    bench = FailsafeBench("a", *others).ready("a", *others)
    bench.end_of_lease()
    assert (bench.primary, bench.cleared) == (None, 0)
    return bench


# -- without failsafe -------------------------------------------------------------------------------


def test_without_failsafe_nothing_is_reported_and_every_end_of_a_lease_clears() -> None:
    bench = Bench("a", "b")
    answer = bench.promote("a")
    assert (answer.cleared, answer.failsafe) == (None, None)
    assert (status_of(bench.state).cleared, status_of(bench.state).failsafe) == (None, None)
    assert bench.state.record.cleared == 0
    bench.end_of_lease()
    assert bench.state.record.cleared == 1
    bench.promote("b")
    assert bench.state.record.cleared == 1
    bench.release("b", 2)
    assert bench.state.record.cleared == 2


def test_the_deletion_of_a_v1_holder_clears_too() -> None:
    bench = Bench("a")
    bench.promote("a", instance=None)
    bench.do(RemoveSession("a"))
    assert bench.state.record.cleared == 1


# -- R21, R22 ---------------------------------------------------------------------------------------


def test_r21_a_primary_is_offered_all_members_once_each_has_a_url() -> None:
    bench = FailsafeBench("a", "b")
    answer = bench.promote("a")
    off = 'client session "b" reported no FailsafeUrl'
    assert (answer.cleared, answer.failsafe) == (0, MemberSet(0, off=off))
    assert bench.failsafe() == FailsafeStatus(FailsafeState.OFF, off)
    bench.beat("b", 50.0, after_s=1)
    assert bench.hold("a").failsafe == MemberSet(1, members("a", "b"))
    waiting = 'client session "a" has yet to acknowledge its members'
    assert bench.failsafe() == FailsafeStatus(FailsafeState.OFF, waiting)
    assert bench.hold("a").failsafe == MemberSet(1, members("a", "b"))
    assert bench.failsafe() == FailsafeStatus(FailsafeState.READY, None, 1, members("a", "b"))


def test_r21_a_member_that_registers_with_its_url_does_not_turn_failsafe_off() -> None:
    bench = FailsafeBench("a", "b").ready("a", "b")
    bench.do(AddSession(SessionConfig("c"), instance="c1", failsafe_url=url_of("c")))
    assert bench.failsafe() == FailsafeStatus(FailsafeState.READY, None, 1, members("a", "b"))
    assert bench.hold("a").failsafe == MemberSet(2, members("a", "b", "c"))
    record = bench.state.record
    bench.beat("c", 50.0, after_s=1)
    assert bench.state.record is record, "its heartbeat brings nothing new"


def test_r21_a_registration_without_an_instance_takes_no_part() -> None:
    bench = FailsafeBench("a")
    bench.do(AddSession(SessionConfig("b"), failsafe_url=url_of("b")))
    assert bench.state.record.sessions["b"].failsafe_url is None


def test_r21_a_lone_primary_has_a_set_of_itself() -> None:
    bench = FailsafeBench("a")
    bench.promote("a")
    assert bench.hold("a").failsafe == MemberSet(1, members("a"))


def test_r21_a_session_without_a_url_turns_failsafe_off_and_all_of_them_are_counted() -> None:
    bench = FailsafeBench("a", "b", "c", "d").ready("a", "b", "c", "d")
    bench.beat("c", failsafe_url=None, after_s=1)
    offered = bench.hold("a").failsafe
    assert offered == MemberSet(2, off='client session "c" reported no FailsafeUrl')
    assert bench.failsafe().state is FailsafeState.READY, "the primary still uses the former set"
    bench.beat("b", failsafe_url=None, after_s=1)
    offered = bench.hold("a").failsafe
    assert offered == MemberSet(
        2, off='client session "b" reported no FailsafeUrl (2 sessions in all)'
    )
    bench.hold("a")
    assert bench.failsafe().state is FailsafeState.OFF
    bench.end_of_lease()
    assert bench.cleared == 1, "a primary without a set has demoted"


def test_r21_more_members_than_an_agent_can_ask_at_once_turn_failsafe_off() -> None:
    others = [f"m{number:03}" for number in range(MOST_MEMBERS - 1)]
    bench = FailsafeBench(policy=replace(CALM, max_sessions=2 * MOST_MEMBERS))
    for name in ("a", *others):
        bench.do(AddSession(SessionConfig(name)))
    bench.ready("a", *others)
    register = AddSession(SessionConfig("n"), instance="n#1", failsafe_url=url_of("n"))
    bench.do(register, after_s=1)
    why = f"the group has {MOST_MEMBERS + 1} client sessions, and failsafe at most {MOST_MEMBERS}"
    assert bench.hold("a").failsafe == MemberSet(2, off=why)
    bench.do(RemoveSession("n"), after_s=1)
    bench.hold("a")
    found = bench.hold("a").failsafe
    assert found is not None
    assert len(found.members) == MOST_MEMBERS


def test_r21_a_set_replaces_off_when_each_session_has_a_url_again() -> None:
    bench = FailsafeBench("a", "b").ready("a", "b")
    bench.beat("b", failsafe_url=None, after_s=1)
    bench.hold("a")
    bench.beat("b", after_s=1)
    off = MemberSet(2, off='client session "b" reported no FailsafeUrl')
    assert bench.hold("a", failsafe_revision=1).failsafe == off, "it was offered, so it comes first"
    assert bench.hold("a").failsafe == MemberSet(3, members("a", "b"))


def test_r21_a_primary_without_a_url_is_offered_nothing() -> None:
    bench = FailsafeBench("a", "b")
    assert bench.promote("a", failsafe_url=None).failsafe is None
    bench.beat("b", 50.0)
    assert bench.hold("a", failsafe_url=None).cleared is None
    assert bench.state.record.offered is None


def test_r21_a_client_without_an_instance_takes_no_part() -> None:
    bench = FailsafeBench("a")
    bench.promote("a", instance=None)
    assert bench.hold("a", instance=None).failsafe is None
    assert bench.state.record.sessions["a"].failsafe_url is None


def test_r22_the_same_session_at_another_url_is_another_member() -> None:
    bench = lapsed("b")
    bench.beat("b", failsafe_url="http://elsewhere:9", instance="b#2", after_s=LEASE_S)
    assert (bench.pending, bench.failsafe().choosable) == (None, members("a", "b"))
    bench.beat("b", after_s=1)
    assert bench.pending == "b"


@pytest.mark.parametrize("url", ["http://elsewhere:9", None])
def test_r22_a_session_that_registers_again_elsewhere_is_another_member(url: str | None) -> None:
    bench = lapsed("b")
    bench.beat("b")
    assert bench.pending == "b"
    same = AddSession(SessionConfig("b"), instance="b#1", failsafe_url=url_of("b"))
    assert bench.do(same).answer is False
    assert bench.state.record.pending is not None
    bench.do(AddSession(SessionConfig("b"), instance="b#2", failsafe_url=url))
    assert bench.choosable == members("a", "b")
    assert bench.state.record.pending is None


def test_r22_the_confirming_heartbeat_is_judged_by_its_own_url() -> None:
    bench = lapsed("b")
    bench.beat("b")
    assert bench.pending == "b"
    answer = bench.beat("b", failsafe_url="http://elsewhere:9", after_s=1)
    assert (answer.role, bench.state.record.pending) == (S, None)


# -- R23 --------------------------------------------------------------------------------------------


def test_r23_one_set_at_a_time_is_offered_and_both_restrict() -> None:
    bench = FailsafeBench("a", "b", "c").ready("a", "b", "c")
    bench.do(RemoveSession("c"))
    assert bench.hold("a").failsafe == MemberSet(2, members("a", "b"))
    bench.do(AddSession(SessionConfig("d")))
    bench.beat("d", 50.0)
    answer = bench.hold("a", failsafe_revision=1)
    assert answer.failsafe == MemberSet(2, members("a", "b")), "it has yet to be acknowledged"
    assert bench.choosable == members("a", "b")
    assert bench.hold("a").failsafe == MemberSet(3, members("a", "b", "d"))
    assert bench.choosable == members("a", "b"), "d is not asked yet"
    bench.hold("a")
    assert bench.choosable == members("a", "b", "d")


@pytest.mark.parametrize(
    "report", [{"holds": None}, {"holds": 0}, {"failsafe_revision": 0}, {"failsafe_revision": None}]
)
def test_r23_only_the_epoch_and_revision_that_were_offered_acknowledge(
    report: dict[str, Any],
) -> None:
    bench = FailsafeBench("a")
    bench.promote("a")
    bench.hold("a", **report)
    assert bench.state.record.used is None
    bench.hold("a")
    assert bench.state.record.used == MemberSet(1, members("a"))


def test_r23_a_revoked_primary_acknowledges_nothing() -> None:
    bench = FailsafeBench("a", "b").ready("a", "b")
    bench.do(AddSession(SessionConfig("c")))
    bench.beat("c", 10.0)
    bench.hold("a")
    bench.do(SetOverride("b", RoleOverride.PRIMARY))
    answer = bench.hold("a")
    assert (answer.role, answer.failsafe) == (S, None)
    assert bench.choosable == members("a", "b")


def test_r23_an_offered_set_is_reported_until_it_is_used_though_failsafe_is_off_meanwhile() -> None:
    bench = FailsafeBench("a", "b").ready("a", "b")
    bench.do(AddSession(SessionConfig("c")))
    bench.beat("c", 10.0)
    revision = bench.state.record.set_revision
    offered = bench.hold("a", failsafe_revision=revision).failsafe
    assert offered == MemberSet(revision + 1, members("a", "b", "c"))
    bench.do(AddSession(SessionConfig("d")))
    assert bench.hold("a", failsafe_revision=revision).failsafe == offered
    off = bench.hold("a").failsafe
    assert off is not None
    assert (off.revision, off.off) == (
        revision + 2,
        'client session "d" reported no FailsafeUrl',
    )


def test_r23_a_set_changes_the_record_only_when_it_is_new() -> None:
    bench = FailsafeBench("a", "b").ready("a", "b")
    record = bench.state.record
    bench.hold("a")
    bench.beat("b", 50.0, after_s=1)
    assert bench.state.record is record


# -- R24, R25 ---------------------------------------------------------------------------------------


def test_r24_an_acknowledged_set_clears_the_former_tenures() -> None:
    bench = lapsed("b")
    assert bench.promote("b", after_s=1).epoch == 2
    assert bench.cleared == 0, "b may never hear of it, and a may be active"
    assert bench.state.record.used == MemberSet(0, members("a", "b"))
    bench.hold("b")
    assert bench.cleared == 1


def test_r24_a_clear_group_has_no_sets() -> None:
    """Not even one that was offered, and never used."""
    bench = FailsafeBench("a", "b").ready("a", "b")
    bench.do(AddSession(SessionConfig("c")))
    bench.beat("c", 10.0)
    bench.hold("a")
    assert None not in (bench.state.record.used, bench.state.record.offered)
    bench.release("a", 1)
    record = bench.state.record
    assert (record.cleared, record.used, record.offered) == (1, None, None)


def test_r24_a_release_clears_and_hands_over_at_once() -> None:
    bench = FailsafeBench("a", "b").ready("a", "b")
    bench.release("a", 1)
    assert (bench.cleared, bench.pending, bench.choosable) == (1, "b", None)
    assert bench.beat("b", after_s=1).cleared == 1


def test_r25_a_member_that_the_lost_primary_does_not_ask_is_not_promoted() -> None:
    bench = lapsed("b")
    bench.do(AddSession(SessionConfig("n")))
    for _ in range(30):
        assert bench.beat("n", after_s=1).role is S
    assert bench.failsafe().choosable == members("a", "b")
    assert bench.beat("b", 1.0).role is W
    assert bench.beat("b", 1.0, after_s=1).role is P
    bench.hold("b")
    assert bench.hold("b").failsafe == MemberSet(2, members("a", "b", "n"))
    assert bench.choosable == members("a", "b", "n"), "b demotes when n does not agree"


def test_r25_a_member_that_joins_may_be_the_candidate_while_the_role_is_held() -> None:
    bench = FailsafeBench("a", "b").ready("a", "b")
    bench.do(AddSession(SessionConfig("n")))
    bench.beat("n")
    bench.do(SetOverride("n", RoleOverride.PRIMARY))
    assert bench.pending == "n"
    bench.end_of_lease()
    assert bench.state.record.pending is None
    bench.beat("b")
    assert bench.pending == "b"


def test_r25_the_restriction_survives_a_restart() -> None:
    bench = lapsed("b")
    bench.do(AddSession(SessionConfig("n")))
    bench.restart()
    bench.beat("n")
    assert bench.pending is None
    bench.beat("b")
    assert bench.pending == "b"


def test_r25_a_tenure_begun_under_restriction_that_nobody_accepted_keeps_it() -> None:
    bench = lapsed("b")
    bench.do(AddSession(SessionConfig("n")))
    bench.beat("n")
    bench.promote("b", after_s=1)
    bench.end_of_lease()
    bench.beat("n", after_s=1)
    assert (bench.pending, bench.cleared, bench.choosable) == (None, 0, members("a", "b"))


def test_r25_a_set_is_offered_to_a_restricted_tenure_even_if_nothing_has_changed() -> None:
    bench = lapsed("b")
    answer = bench.promote("b", after_s=1)
    assert answer.failsafe == MemberSet(2, members("a", "b"))


def test_r25_an_override_waits_until_the_holder_of_a_restricted_tenure_has_accepted_it() -> None:
    """Else the holder learns nothing of its tenure, which expires and leaves the group as restricted as before."""
    bench = lapsed("b")
    bench.do(AddSession(SessionConfig("n")))
    bench.do(SetOverride("n", RoleOverride.PRIMARY))
    bench.beat("n")
    answer = bench.promote("b", after_s=1)
    assert (answer.role, bench.pending) == (P, None)
    assert bench.beat("n", after_s=1).role is S
    assert bench.hold("b").role is S, "it has accepted, and is replaced as ordered"
    assert bench.pending == "n"
    bench.release("b", 2)
    assert bench.beat("n", after_s=1).role is P


# -- R30: promises ----------------------------------------------------------------------------------


def test_r30_a_member_that_has_promised_is_not_chosen_before_the_tenures_are_over() -> None:
    bench = lapsed("b")
    for _ in range(5):
        assert bench.beat("b", after_s=1, promised=True).role is S
    assert bench.beat("b", after_s=1).role is W
    assert bench.beat("b", after_s=1, promised=True).role is S, "the confirming heartbeat counts"
    assert bench.promote("b", after_s=1).epoch == 2


def test_r30_a_promise_does_not_matter_in_a_clear_group() -> None:
    bench = FailsafeBench("a", "b").ready("a", "b")
    bench.release("a", 1)
    assert bench.beat("b", after_s=1, promised=True).role is P


def test_r30_a_refused_tenure_leaves_the_restriction_as_it_was() -> None:
    bench = lapsed("b")
    bench.do(AddSession(SessionConfig("n")))
    before = status_of(bench.state)
    bench.promote("b", after_s=1)
    bench.release("b", 2, "bound by a promise", held=False, hold_off_s=5.0)
    assert (bench.primary, bench.cleared, bench.choosable) == (None, 0, members("a", "b"))
    assert bench.history[2].end is TenureEnd.REFUSED
    assert (before.previous, status_of(bench.state).previous) == ("a", "a")
    assert "in an epoch after 0" in (bench.failsafe().why or "")
    assert bench.failsafe().lapsed is None
    assert bench.beat("n").role is S
    assert bench.beat("b", after_s=1).role is S, "held off"
    assert bench.beat("b", after_s=4).epoch == 3
    assert bench.state.record.used == MemberSet(0, members("a", "b"))


def test_r30_a_refused_tenure_of_a_clear_group_leaves_it_clear() -> None:
    bench = FailsafeBench("a", "b").ready("a", "b")
    bench.release("a", 1)
    bench.promote("b", after_s=1)
    bench.release("b", 2, held=False)
    assert (bench.cleared, is_restricted(bench.state.record)) == (2, False)


def test_r30_a_late_refusal_neither_clears_nor_resumes() -> None:
    bench = lapsed("b")
    bench.promote("b", after_s=1)
    bench.end_of_lease()
    bench.release("b", 2, held=False)
    assert (bench.cleared, bench.choosable) == (0, members("a", "b"))
    assert bench.beat("b", holds=2, after_s=1, promised=True).role is S
    bench.release("b", 2, held=True)
    assert bench.cleared == 0


# -- R33: resuming ----------------------------------------------------------------------------------


def test_r33_the_same_process_resumes_its_tenure_after_its_lease_has_ended() -> None:
    bench = FailsafeBench("a", "b").ready("a", "b")
    bench.hold("a", last_data=data(5))
    since = bench.history[1].since
    bench.end_of_lease()
    assert bench.failsafe() == FailsafeStatus(
        FailsafeState.RESTRICTED,
        'client session "a" may still be primary by failsafe in epoch 1',
        1,
        members("a", "b"),
        members("a", "b"),
        Lapsed("a", 1, bench.now.wall),
    )
    bench.beat("b")
    assert bench.pending == "b"
    answer = bench.hold("a", failsafe_revision=1)
    assert (answer.role, answer.epoch, answer.last_data) == (P, 1, data(5))
    assert (bench.primary, bench.state.record.pending) == ("a", None)
    entry = bench.history[1]
    assert (entry.since, entry.why_started, entry.until) == (since, "chosen, resumed", None)
    assert bench.state.live.lease_until == bench.mono + LEASE_S
    assert bench.failsafe().state is FailsafeState.READY
    bench.end_of_lease()
    assert bench.hold("a").role is P
    assert bench.history[1].why_started == "chosen, resumed"


@pytest.mark.parametrize(
    "stranger",
    [{"instance": "a#2"}, {"holds": None}, {"holds": 2}, {"instance": None}],
)
def test_r33_another_process_or_tenure_is_not_resumed(stranger: dict[str, Any]) -> None:
    bench = lapsed("b")
    bench.beat("b")
    more: dict[str, Any] = {"holds": 1, "promised": True, **stranger}
    assert bench.beat("a", after_s=1, **more).role is S
    assert bench.primary is None


def test_r33_nothing_is_resumed_after_a_later_tenure_or_a_release_or_a_revocation() -> None:
    later = lapsed("b")
    later.promote("b", after_s=1)
    later.end_of_lease()
    assert later.beat("a", holds=1, promised=True).role is S
    released = lapsed("b")
    released.release("a", 1)
    assert released.cleared == 1
    assert released.beat("a", holds=1, promised=True).role is not P
    revoked = FailsafeBench("a", "b").ready("a", "b")
    revoked.do(SetOverride("b", RoleOverride.PRIMARY))
    revoked.end_of_lease()
    assert revoked.failsafe().lapsed is None
    assert revoked.beat("a", holds=1, after_s=1, promised=True).role is S
    assert revoked.state.record.holder is None, (
        "it keeps the role from b, though it is answered Secondary"
    )


def test_r33_a_tenure_is_resumed_after_a_restart_of_the_coordinator() -> None:
    bench = lapsed("b")
    bench.restart()
    assert bench.hold("a").role is P


def test_r33_a_resumed_primary_is_replaced_as_ordered() -> None:
    bench = lapsed("b")
    bench.do(SetOverride("b", RoleOverride.PRIMARY))
    bench.beat("b", promised=True)
    assert bench.hold("a").role is P
    bench.beat("b", after_s=1)
    assert bench.hold("a").role is S


def test_r33_a_session_that_was_deleted_meanwhile_is_resumed_when_it_has_joined_again() -> None:
    bench = lapsed("b")
    bench.do(RemoveSession("a"))
    bench.do(AddSession(SessionConfig("a")))
    assert bench.hold("a").role is P


def test_r33_a_late_release_clears_once_and_its_hold_off_still_counts() -> None:
    bench = lapsed("b")
    revision = bench.state.record.revision
    bench.release("a", 1)
    assert (bench.cleared, bench.state.record.revision) == (1, revision + 1)
    assert bench.state.live.contacts["a"].passed_over, "the others are preferred"
    before = bench.state
    bench.release("a", 1)
    assert bench.state == before
    bench.release("a", 1, hold_off_s=5)
    assert bench.beat("a").role is S


def test_r33_the_late_release_of_a_session_that_was_deleted_clears() -> None:
    bench = lapsed("b")
    bench.do(RemoveSession("a"))
    bench.release("a", 1, hold_off_s=5)
    assert bench.cleared == 1


# -- R34: undoing -----------------------------------------------------------------------------------


def test_r34_a_restricted_group_is_not_deleted() -> None:
    bench = lapsed("b")
    bench.mono += 2 * LEASE_S
    with pytest.raises(Conflict, match="may be active by failsafe"):
        bench.do(RemoveGroup())
    bench.do(Lift(1, "scrapped", Requester("user:ann")))
    assert bench.history[2].why_started == "lifted by user:ann: scrapped"
    bench.do(RemoveGroup())


def test_r34_a_group_that_is_created_again_is_clear() -> None:
    record = new_record(CONFIG, 7)
    assert (record.epoch, record.cleared, is_restricted(record)) == (7, 7, False)
    assert new_record(CONFIG, HIGHEST_LEARNED_EPOCH + 1).epoch == 0


def test_r34_a_lift_lets_everybody_be_promoted_and_is_kept() -> None:
    bench = lapsed("b")
    bench.do(AddSession(SessionConfig("n")))
    bench.do(Lift(1, "a was scrapped"))
    assert (bench.cleared, status_of(bench.state).epoch, bench.choosable) == (2, 2, None)
    entry = bench.history[2]
    assert (entry.session_id, entry.end) == ("", TenureEnd.LIFTED)
    assert entry.why_started == "lifted by an operator: a was scrapped"
    assert bench.beat("a", holds=1, promised=True).role is W, "it is not resumed"
    assert bench.beat("n", after_s=1).role is S
    before = bench.state
    bench.do(Lift(1, "once more", Requester("user:ann")))
    assert bench.state == before


def test_r34_a_lift_is_refused_while_somebody_holds_and_for_another_epoch() -> None:
    bench = FailsafeBench("a", "b").ready("a", "b")
    with pytest.raises(Conflict, match='"a" is primary'):
        bench.do(Lift(1, "r"))
    bench.end_of_lease()
    for epoch in (0, 2):
        with pytest.raises(Conflict, match="newest epoch"):
            bench.do(Lift(epoch, "r"))
    bench.do(Lift(1, "r"))
    with pytest.raises(Conflict, match="newest epoch"):
        bench.do(Lift(3, "r"))


def test_r34_an_epoch_learned_from_a_client_restricts_until_an_operator_lifts() -> None:
    bench = FailsafeBench("a", "b").ready("a", "b")
    bench.beat("b", after_s=1, seen_epoch=7)
    assert (bench.primary, bench.choosable) == (None, ())
    with pytest.raises(Conflict, match="a lease may exist"):
        bench.do(Lift(7, "r"))
    bench.mono += LEASE_S
    for session_id in ("a", "b", "a", "b"):
        assert bench.beat(session_id, after_s=1, seen_epoch=7).role is S
    assert "older than the group" in (bench.failsafe().why or "")
    assert bench.failsafe().lapsed is None
    bench.do(Lift(7, "looked at both hosts"))
    assert bench.beat("a", after_s=1).epoch == 9


def test_r34_without_failsafe_a_learned_epoch_only_costs_one_lease() -> None:
    bench = Bench("a", "b")
    bench.promote("a")
    bench.beat("b", after_s=1, seen_epoch=7)
    bench.mono += LEASE_S
    bench.do(Tick())
    assert (bench.state.record.cleared, bench.state.record.quiet) == (7, False)
    assert bench.beat("a", after_s=1, seen_epoch=7).role is W


def test_r34_a_learned_epoch_of_a_group_whose_primary_still_uses_a_set_restricts() -> None:
    bench = FailsafeBench("a", "b").ready("a", "b")
    bench.beat("b", after_s=1, failsafe_url=None)
    bench.beat("a", after_s=1, failsafe_url=None)
    bench.beat("b", after_s=1, failsafe_url=None, seen_epoch=7)
    assert bench.choosable == ()


OLD_DATA = "coordinator's data are older than group"


def test_r34_a_group_without_sessions_is_not_removed_while_an_unknown_lease_may_last() -> None:
    bench = FailsafeBench()
    bench.do(DeclareRestored())
    with pytest.raises(Conflict, match=OLD_DATA):
        bench.do(RemoveGroup())


def test_r34_restored_data_give_nobody_the_role_until_an_operator_lifts() -> None:
    bench = FailsafeBench("a", "b").ready("a", "b")
    bench.do(DeclareRestored())
    epoch = int(bench.now.wall.timestamp())
    status = status_of(bench.state)
    assert (status.primary, status.epoch, status.cleared) == (None, epoch, 0)
    assert bench.history[1].end is TenureEnd.DATA_LOSS
    assert (bench.history[epoch].session_id, bench.history[epoch].end) == ("", TenureEnd.RESTORED)
    assert bench.state.live.quiet_until == bench.mono + LEASE_S
    bench.restart()
    with pytest.raises(Conflict, match=OLD_DATA):
        bench.do(Lift(epoch, "too soon"))
    bench.mono += LEASE_S
    assert bench.hold("a", holds=1).role is S
    assert bench.hold("b", holds=5).role is S
    bench.do(Lift(epoch, "nothing runs"))
    assert bench.beat("a", after_s=1).epoch == epoch + 2


def declared(known: int, wall: datetime) -> int:
    """The epoch of a copy that is declared as restored at this time."""
    record = GroupRecord(CONFIG, epoch=known, cleared=known)
    what, now = DeclareRestored(), Instant(1000.0, wall)
    return decide(GroupState(record), what, now, FailsafeBench().policy).state.record.epoch


def test_r34_one_copy_that_is_declared_twice_does_not_give_the_same_epochs_twice() -> None:
    first = declared(7, data(0))
    tenures = 59
    assert declared(7, data(60)) > first + tenures


def test_r34_restored_data_raise_the_epoch_if_the_clock_is_behind() -> None:
    assert declared(7, datetime(1970, 1, 1, tzinfo=UTC)) == 7 + RESTORED_EPOCH_STEP
    later = int(data(0).timestamp()) + 5
    assert declared(later, data(0)) == later + RESTORED_EPOCH_STEP


@pytest.mark.parametrize("wall", [data(0), datetime(9999, 12, 31, tzinfo=UTC)])
def test_r34_an_older_copy_that_nobody_declared_learns_the_epoch_of_a_declared_one(
    wall: datetime,
) -> None:
    """However far ahead the clock was: the agents' heartbeats must not be refused."""
    bench = FailsafeBench("a")
    bench.beat("a")
    seen = declared(1000, wall) + 1000
    assert bench.beat("a", after_s=1, seen_epoch=seen).role is S
    assert (bench.state.record.epoch, bench.state.record.quiet) == (seen, True)
    assert bench.failsafe().state is FailsafeState.RESTRICTED


def test_each_epoch_of_restored_data_is_far_below_what_a_heartbeat_may_report() -> None:
    assert LATEST_RESTORED_EPOCH + 1000 * RESTORED_EPOCH_STEP < LARGEST_EPOCH_STEP
    assert LARGEST_EPOCH_STEP < HIGHEST_LEARNED_EPOCH


@pytest.mark.parametrize("known", [HIGHEST_LEARNED_EPOCH - 5, HIGHEST_LEARNED_EPOCH + 5])
def test_r34_restored_data_restrict_however_high_the_epoch_is(known: int) -> None:
    record = GroupRecord(CONFIG, epoch=known, cleared=known)
    state = decide(
        GroupState(record), DeclareRestored(), Instant(1000.0, data(0)), FailsafeBench().policy
    ).state
    assert known <= state.record.epoch <= max(known, HIGHEST_LEARNED_EPOCH)
    assert is_restricted(state.record)


# -- status -----------------------------------------------------------------------------------------


def test_a_group_with_failsafe_but_without_a_primary_is_off() -> None:
    bench = FailsafeBench("a")
    bench.beat("a", score=0.0)
    bench.state = replace(bench.state, record=replace(bench.state.record, pending=None))
    assert bench.failsafe() == FailsafeStatus(FailsafeState.OFF, "nobody is primary")


def test_a_late_heartbeat_from_before_the_tenure_does_not_revoke_a_resumed_primary() -> None:
    """The network may deliver it more than 0.6 L late."""
    bench = lapsed("b")
    bench.hold("a")
    answer = bench.beat("a", after_s=0.7 * LEASE_S, seen_epoch=0)
    assert answer.role is P
