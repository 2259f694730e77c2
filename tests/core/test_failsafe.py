"""Failsafe at the agent: contact, questions and their counting, votes, promises (R23, R26-R32, R35)."""

from collections.abc import Callable, Iterable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.core.effects import Ask, Effect, Publish, Release, SendHeartbeat, StartHook, Vote
from agent.core.events import (
    Answered,
    Asked,
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
    Stop,
    Tick,
)
from agent.core.failsafe_contact import Contact
from agent.core.failsafe_holder import REHEARSAL_INTERVAL_S
from agent.core.failsafe_view import FailsafeView, Readiness
from agent.core.failsafe_voter import FailsafeVoter
from agent.core.options import FailsafeOptions
from agent.core.phases import Phase
from agent.core.session import PreviousTenure
from agent.model import HeartbeatAnswer, Member, MemberSet, Role

from .session_bench import (
    LATEST,
    LEASE_S,
    NEVER,
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

ME, B, D = Member("me", "http://me"), Member("b", "http://b"), Member("d", "http://d")
HERE = FailsafeOptions(ME.url)
SET = MemberSet(1, (ME, B))
DOUBT_S, ASK_S = TIMING.doubt_s, TIMING.question_interval_s


class FailsafeBench(Bench):
    """A session with failsafe; its promises of the start have ended unless ``now`` is right after it."""

    def __init__(self, *, hooks: Iterable[Role] = ()) -> None:
        super().__init__(hooks=hooks, failsafe=HERE)

    def member(self, *, v1_server: bool = False) -> "FailsafeBench":
        super().member(v1_server=v1_server)
        return self

    def free(self, epoch: int = 0) -> "FailsafeBench":
        """A Secondary that has outlived the promise of its start, and whose heartbeat was just answered."""
        self.member()
        self.answered(Answer(S, epoch, 4))
        self.now += LEASE_S
        self.step(Tick())
        self.answered(Answer(S, epoch, 4))
        return self

    def holder(self, members: MemberSet | None = SET) -> "FailsafeBench":
        """Primary in tenure 1, whose set is ``members`` and whose role counts from now."""
        self.free()
        self.wake()
        self.answered(Answer(W, 0, 4))
        self.answered(Answer(P, 1, 5, cleared=0, failsafe=members))
        for _ in self.session.options.hooks - {S}:
            self.ends()
        assert self.session.role is P
        return self

    def in_doubt(self) -> list[Effect]:
        """Its next heartbeat stays unanswered for so long that it asks."""
        self.log.clear()
        while not self.questions:
            self.wake()
        return list(self.questions)

    @property
    def questions(self) -> list[Ask]:
        """The questions of the log, without rehearsals."""
        return [effect for effect in self.log if isinstance(effect, Ask) and not effect.rehearsal]

    def says(self, question: Ask, *, yes: bool = True, after_s: float = 0.0) -> list[Effect]:
        return self.step(Answered(question.nonce, yes, "for the test"), after_s=after_s)

    def vote(self, epoch: int = 1, *, after_s: float = 0.0, rehearsal: bool = False) -> Vote:
        self.now += after_s
        vote, effects = self.session.vote(Asked("b", epoch, rehearsal), self.now)
        self.keep(effects)
        return vote

    def cut_off(self) -> "FailsafeBench":
        """Its next heartbeat fails."""
        self.wake()
        self.fails(HeartbeatFailure.OTHER)
        return self

    @property
    def last_beat(self) -> SendHeartbeat:
        return [effect for effect in self.log if isinstance(effect, SendHeartbeat)][-1]

    @property
    def view(self) -> FailsafeView:
        return self.session.failsafe_view(self.now)


# -- R23: the set --------------------------------------------------------------------------------------


def test_r23_a_holder_reports_its_epoch_and_the_set_that_it_uses() -> None:
    bench = FailsafeBench().holder()
    bench.wake()
    beat = bench.last_beat
    assert (beat.holds, beat.failsafe_revision, beat.promised) == (1, 1, False)


def test_r23_a_session_without_failsafe_reports_nothing_and_uses_no_set() -> None:
    bench = Bench().member()
    bench.answered(Answer(W, 0, 4))
    bench.answered(Answer(P, 1, 5, cleared=0, failsafe=SET))
    bench.wake()
    assert bench.log[-1] == SendHeartbeat(bench.beat)
    assert bench.session.asked_members is None


def test_r23_an_older_set_is_not_used_any_more() -> None:
    bench = FailsafeBench().holder(MemberSet(5, (ME, B, D)))
    bench.wake()
    bench.answered(Answer(P, failsafe=MemberSet(4, (ME, B))))
    assert bench.session.asked_members == (ME, B, D)


def test_r23_a_newer_set_replaces_the_one_in_use() -> None:
    bench = FailsafeBench().holder()
    bench.wake()
    bench.answered(Answer(P, failsafe=MemberSet(2, (ME, D))))
    assert bench.session.asked_members == (ME, D)
    bench.wake()
    bench.wake()
    assert bench.last_beat.failsafe_revision == 2


def test_r23_an_answer_without_a_set_ends_the_use_of_the_last_one() -> None:
    bench = FailsafeBench().holder()
    bench.wake()
    bench.answered(Answer(P))
    assert bench.session.asked_members is None
    assert bench.view.readiness is Readiness.OFF
    bench.wake()
    assert bench.last_beat.failsafe_revision is None


def test_r23_a_dropped_set_is_used_again_when_the_coordinator_reports_it_again() -> None:
    bench = FailsafeBench().holder()
    for failsafe in (None, SET):
        bench.wake()
        bench.answered(Answer(P, failsafe=failsafe))
    assert bench.session.asked_members == SET.members


def test_r23_off_is_acknowledged_like_a_set() -> None:
    bench = FailsafeBench().holder(MemberSet(3, off="v1 is in the group"))
    bench.wake()
    assert bench.last_beat.failsafe_revision == 3
    assert bench.view == FailsafeView(Readiness.OFF, "v1 is in the group", revision=3)


def test_r23_the_set_of_one_tenure_is_not_used_in_the_next_one() -> None:
    bench = FailsafeBench().holder()
    bench.answered(Answer(S, 1, 6))
    bench.step(Released())
    bench.wake()
    assert (bench.last_beat.holds, bench.last_beat.failsafe_revision) == (None, None)


# -- R26, R27: doubt and questions ---------------------------------------------------------------------


def test_r27_nobody_is_asked_while_the_coordinator_answers() -> None:
    bench = FailsafeBench().holder()
    bench.log.clear()
    for _ in range(20):
        bench.wake()
        bench.answered(Answer(P, failsafe=SET))
    assert bench.questions == []


def test_r27_the_others_are_asked_when_a_heartbeat_is_unanswered_for_an_eighth_of_r() -> None:
    bench = FailsafeBench().holder(MemberSet(1, (ME, B, D)))
    assert SendHeartbeat in kinds(bench.wake())
    sent_at = bench.now
    asked = bench.in_doubt()
    assert [ask.member for ask in asked if isinstance(ask, Ask)] == [B, D]
    assert bench.now == pytest.approx(sent_at + DOUBT_S)


def test_r27_a_failed_heartbeat_makes_it_ask_at_once_and_then_each_sixth_of_r() -> None:
    bench = FailsafeBench().holder().cut_off()
    assert len(bench.questions) == 1
    first_at = bench.now
    moments: list[float] = []
    while len(moments) < 3:
        before = len(bench.questions)
        bench.says(bench.questions[-1])
        bench.wake()
        if len(bench.questions) > before:
            moments.append(bench.now - first_at)
    assert moments == pytest.approx([ASK_S, 2 * ASK_S, 3 * ASK_S])


@pytest.mark.parametrize(
    ("failure", "contact", "asks"),
    [
        (HeartbeatFailure.OTHER, False, True),
        (HeartbeatFailure.BACK_OFF, False, True),
        (HeartbeatFailure.BACK_OFF, True, False),
        (HeartbeatFailure.OTHER, True, False),
        (HeartbeatFailure.GONE, True, False),
        (HeartbeatFailure.GONE, False, True),
        (HeartbeatFailure.OTHER_STORE, False, True),
    ],
)
def test_r26_only_a_refusal_by_the_coordinator_itself_is_contact(
    *, failure: HeartbeatFailure, contact: bool, asks: bool
) -> None:
    bench = FailsafeBench().holder()
    bench.wake()
    bench.step(HeartbeatFailed(bench.beat, failure, "for the test", contact=contact))
    assert bool(bench.questions) is asks


def test_r26_an_answer_to_an_earlier_heartbeat_does_not_end_the_doubt() -> None:
    bench = FailsafeBench().holder()
    bench.wake()
    earlier = bench.beat
    bench.wake()
    while bench.beat == earlier:
        bench.wake()
    bench.fails(HeartbeatFailure.OTHER)
    bench.answered(Answer(P, failsafe=SET), beat=earlier)
    asked = len(bench.questions)
    bench.now += ASK_S
    bench.step(Tick())
    assert len(bench.questions) > asked


def test_r26_an_answer_of_another_store_is_no_contact() -> None:
    bench = FailsafeBench().holder()
    bench.wake()
    bench.answered(Answer(P, store_id="another", failsafe=SET))
    assert bench.questions


def test_r26_an_answer_ends_the_questions() -> None:
    bench = FailsafeBench().holder().cut_off()
    while bench.last_beat.number == bench.beat and len(bench.questions) < 3:
        bench.wake()
    bench.answered(Answer(P, failsafe=SET))
    bench.log.clear()
    bench.now += ASK_S
    bench.step(Tick())
    assert bench.questions == []


def test_r27_a_holder_whose_session_is_unknown_asks_while_it_registers() -> None:
    bench = FailsafeBench().holder()
    bench.wake()
    bench.fails(HeartbeatFailure.GONE)
    assert bench.session.phase is Phase.JOINING
    bench.log.clear()
    bench.now += DOUBT_S
    bench.step(Tick())
    assert [ask.member for ask in bench.questions] == [B]


# -- R28: counting -------------------------------------------------------------------------------------


def test_r28_the_role_counts_from_the_sending_of_the_question() -> None:
    bench = FailsafeBench().holder().cut_off()
    asked_at = bench.now
    bench.says(bench.questions[-1], after_s=1.0)
    assert bench.session.renew_by == asked_at + TIMING.renew_s
    assert bench.session.lease_until == asked_at + LEASE_S
    assert bench.session.guard_deadlines is not None
    assert bench.session.guard_deadlines[0] > bench.session.renew_by


def test_r28_the_role_is_kept_for_as_long_as_all_others_agree() -> None:
    bench = FailsafeBench().holder(MemberSet(1, (ME, B, D)))
    began = bench.now
    answered = 0
    while bench.now < began + 20 * LEASE_S:
        bench.wake()
        for question in bench.questions[answered:]:
            bench.says(question)
        answered = len(bench.questions)
    assert (bench.session.role, bench.session.tenure) == (P, 1)
    assert bench.view.readiness is Readiness.HOLDING


def test_r28_one_member_that_does_not_agree_costs_the_role() -> None:
    bench = FailsafeBench().holder(MemberSet(1, (ME, B, D)))
    sent_at = bench.session.sent_at
    answered = 0
    while bench.session.role is P:
        bench.wake()
        for question in bench.questions[answered:]:
            bench.says(question, yes=question.member == B)
        answered = len(bench.questions)
    assert bench.now == pytest.approx(sent_at + TIMING.renew_s)
    reason = "lease lost: no renewal for 6.500 s, no vote of d (for the test)"
    assert [e.reason for e in bench.log if isinstance(e, Publish)][-1] == reason


def test_r28_the_member_whose_votes_have_ended_is_named() -> None:
    bench = FailsafeBench().holder(MemberSet(1, (ME, B, D))).cut_off()
    answered = 0
    while bench.session.role is P:
        for question in bench.questions[answered:]:
            if question.member == B or not answered:
                bench.says(question)
        answered = len(bench.questions)
        bench.wake()
    reason = "lease lost: no renewal for 6.500 s, no vote of d (for the test)"
    assert [e.reason for e in bench.log if isinstance(e, Publish)][-1] == reason


def test_r28_a_late_primary_without_others_has_no_missing_vote() -> None:
    bench = FailsafeBench().holder(MemberSet(1, (ME,)))
    bench.step(Tick(), after_s=TIMING.renew_s)
    assert [e.reason for e in bench.log if isinstance(e, Publish)][-1].endswith("6.500 s")


def test_r28_the_oldest_of_the_newest_votes_counts() -> None:
    bench = FailsafeBench().holder(MemberSet(1, (ME, B, D))).cut_off()
    first_at = bench.now
    for question in bench.questions:
        bench.says(question)
    first = len(bench.questions)
    while len(bench.questions) == first:
        bench.wake()
    bench.says(bench.questions[first])  # b once more, d not yet
    assert bench.session.sent_at == first_at


def test_r28_a_vote_for_an_older_question_does_not_count_for_a_newer_one() -> None:
    bench = FailsafeBench().holder().cut_off()
    first, first_at = bench.questions[0], bench.now
    while len(bench.questions) < 2:
        bench.wake()
    bench.says(bench.questions[1])
    newest_at = bench.session.sent_at
    assert newest_at > first_at
    bench.says(first)
    assert bench.session.sent_at == newest_at


def test_r28_an_answer_counts_once_and_only_for_a_known_question() -> None:
    bench = FailsafeBench().holder().cut_off()
    before = bench.session.sent_at
    bench.step(Answered(99, yes=True, why="made up"))
    bench.says(bench.questions[0], yes=False)
    bench.says(bench.questions[0])
    assert bench.session.sent_at == before


def test_r28_a_heartbeat_counts_again_when_it_is_answered() -> None:
    bench = FailsafeBench().holder().cut_off()
    bench.says(bench.questions[0])
    while bench.log[-1] != bench.last_beat:
        bench.wake()
    sent_at = bench.now
    bench.answered(Answer(P, failsafe=SET))
    assert bench.session.sent_at == sent_at
    assert bench.view.readiness is not Readiness.HOLDING


def test_r28_an_answer_to_a_heartbeat_from_before_the_newest_vote_still_renews() -> None:
    bench = FailsafeBench().holder()
    bench.wake()
    while bench.beat != bench.last_beat.number or not bench.questions:
        bench.wake()
    bench.says(bench.questions[-1])
    counted_from = bench.session.sent_at
    bench.answered(Answer(P, failsafe=MemberSet(2, (ME, B))))
    assert bench.session.asked_members == (ME, B)
    assert bench.session.sent_at == counted_from
    assert bench.view.readiness is not Readiness.HOLDING, "the coordinator answers again"


def test_r28_the_deadline_goes_back_when_a_new_member_is_in_the_set() -> None:
    bench = FailsafeBench().holder()
    bench.wake()
    sent_at = bench.now
    while not bench.questions:
        bench.wake()
    bench.says(bench.questions[-1])
    assert bench.session.sent_at > sent_at
    beats = [e.number for e in bench.log if isinstance(e, SendHeartbeat)]
    bench.answered(Answer(P, failsafe=MemberSet(2, (ME, B, D))), beat=beats[-1])
    assert bench.session.sent_at < bench.now - DOUBT_S / 2


def test_r28_a_primary_without_others_holds_alone() -> None:
    bench = FailsafeBench().holder(MemberSet(1, (ME,)))
    began = bench.now
    while bench.now < began + 10 * LEASE_S:
        bench.wake()
    assert bench.session.role is P
    assert [effect for effect in bench.log if isinstance(effect, Ask)] == []


def test_r28_another_url_of_this_session_is_another_member() -> None:
    elsewhere = Member("me", "http://elsewhere")
    bench = FailsafeBench().holder(MemberSet(1, (elsewhere,))).cut_off()
    assert [ask.member for ask in bench.questions] == [elsewhere]


def test_r28_a_demotion_forgets_all_questions() -> None:
    bench = FailsafeBench(hooks={S, P, W})
    bench.holder().cut_off()
    question = bench.questions[-1]
    bench.step(FitnessChanged(fit=False, reason="disk full"))
    before = bench.session.lease_until
    bench.says(question)
    assert bench.session.lease_until == before
    bench.ends()
    assert bench.session.sent_at == NEVER


def test_r28_nobody_is_asked_during_a_demotion() -> None:
    """A promise to a member that gives the role up would only delay the next primary."""
    bench = FailsafeBench(hooks={S}).holder().cut_off()
    asked = len(bench.questions)
    bench.step(FitnessChanged(fit=False, reason="disk full"))
    bench.step(Tick(), after_s=ASK_S)
    assert bench.session.asked_members is None
    assert len(bench.questions) == asked


def test_r28_a_vote_after_the_deadline_is_too_late() -> None:
    bench = FailsafeBench().holder().cut_off()
    bench.says(bench.questions[-1], after_s=TIMING.renew_s)
    assert bench.session.role is S


def test_r28_a_stalled_holder_demotes() -> None:
    bench = FailsafeBench().holder().cut_off()
    bench.step(Stalled(1.5), after_s=1.5)
    assert bench.session.role is S


def test_r28_answers_older_than_r_are_forgotten() -> None:
    bench = FailsafeBench().holder(MemberSet(1, (ME, B, D))).cut_off()
    old = next(ask for ask in bench.questions if ask.member == D)
    began = bench.now
    seen = 0
    while bench.now <= began + TIMING.renew_s - ASK_S:
        for question in bench.questions[seen:]:
            if question.member == B or seen:
                bench.says(question)
        seen = len(bench.questions)
        bench.wake()
    for _ in range(3):
        for question in bench.questions[seen:]:
            bench.says(question)
        seen = len(bench.questions)
        bench.wake()
    counted_from = bench.session.sent_at
    bench.says(old)
    assert bench.session.sent_at == counted_from


# -- R29: the vote -------------------------------------------------------------------------------------


def test_r29_a_member_that_does_not_reach_the_coordinator_votes_yes() -> None:
    assert FailsafeBench().free(epoch=1).cut_off().vote() == Vote(yes=True, why="promised")


def test_r29_a_member_that_reaches_the_coordinator_votes_no_and_sends_a_heartbeat_at_once() -> None:
    bench = FailsafeBench().free(epoch=1)
    bench.now += 0.5
    bench.log.clear()
    assert bench.vote() == Vote(yes=False, why="the coordinator answers")
    assert kinds(bench.log) == [SendHeartbeat]
    assert not bench.vote(after_s=DOUBT_S / 2).yes
    assert kinds(bench.log) == [SendHeartbeat], "one is under way"
    assert bench.vote(after_s=DOUBT_S / 2).yes


def test_r29_a_session_without_failsafe_votes_no() -> None:
    bench = Bench().member()
    vote, _ = bench.session.vote(Asked("b", 1), bench.now + 100)
    assert vote == Vote(yes=False, why="failsafe is off")


def test_r29_a_member_votes_no_until_its_first_demotion_is_done() -> None:
    bench = FailsafeBench(hooks={S})
    bench.begin()
    assert bench.vote(after_s=DOUBT_S) == Vote(yes=False, why="starting")
    bench.ends()
    assert not bench.vote().yes
    assert bench.vote(after_s=DOUBT_S).yes, "joined or not"


def test_r29_a_member_votes_yes_while_it_releases_the_tenure_of_the_previous_process() -> None:
    bench = FailsafeBench()
    bench.keep(bench.session.start(bench.now, PreviousTenure(7, "before")))
    assert bench.session.phase is Phase.RETURNING
    assert bench.vote(8, after_s=DOUBT_S).yes


def test_r29_a_member_that_has_something_to_do_or_undo_votes_no() -> None:
    bench = FailsafeBench(hooks={S, P, W})
    bench.holder()
    assert bench.vote(9) == Vote(yes=False, why="it is Primary")
    bench.step(FitnessChanged(fit=False, reason="disk full"))
    assert bench.vote(9) == Vote(yes=False, why="demoting")
    bench.ends()
    assert bench.vote(9).yes


def test_r29_an_epoch_below_the_newest_one_gets_no_vote() -> None:
    bench = FailsafeBench().free(epoch=3).cut_off()
    assert bench.vote(2) == Vote(yes=False, why="epoch 2 is over: epoch 3 has begun")
    assert bench.vote(4).yes
    assert bench.session.newest_epoch == 4
    assert not bench.vote(3).yes
    assert bench.vote(4).yes


def test_r29_a_revision_of_an_older_epoch_is_older_than_that_of_a_vote() -> None:
    bench = FailsafeBench().free(epoch=3).cut_off()
    bench.vote(4)
    bench.wake()
    assert bench.vote(5).yes
    bench.wake()
    bench.answered(Answer(S, 5, 1, cleared=0))
    assert not bench.vote(5).yes, "the answer was fresh"


def test_r29_an_unfit_member_votes_yes() -> None:
    bench = FailsafeBench().free(epoch=1)
    bench.step(FitnessChanged(fit=False, reason="disk full"))
    assert bench.vote().yes


def test_r29_a_session_that_has_ended_votes_no() -> None:
    bench = FailsafeBench().free()
    bench.step(Stop())
    while bench.session.phase is not Phase.ENDED:
        bench.wake()
    assert bench.vote() == Vote(yes=False, why="it has stopped")


def test_r29_a_registration_is_contact() -> None:
    bench = FailsafeBench()
    bench.begin()
    bench.now += DOUBT_S
    bench.step(Joined(TIMING, STORE))
    assert not bench.vote().yes


def test_r29_a_registration_at_another_store_is_none() -> None:
    bench = FailsafeBench().free()
    bench.wake()
    bench.now += 0.1
    bench.fails(HeartbeatFailure.GONE)
    bench.step(Joined(TIMING, "another"), after_s=DOUBT_S)
    assert bench.vote().yes


# -- R30, R31, R32: the promise ------------------------------------------------------------------------


def promised(epoch: int = 1) -> FailsafeBench:
    """Has promised to b in this tenure, now; the coordinator answers again."""
    bench = FailsafeBench().free(epoch=epoch).cut_off()
    assert bench.vote(epoch).yes
    bench.wake()
    return bench


def test_r30_a_promise_is_reported_for_l_and_its_end_by_a_heartbeat_at_once() -> None:
    bench = FailsafeBench().free(epoch=1).cut_off()
    bench.vote()
    end_at = bench.now + LEASE_S
    while bench.now < end_at:
        bench.wake()
        if bench.log[-1] == bench.last_beat and bench.now < end_at:
            assert bench.last_beat.promised
            bench.answered(Answer(S, 1, 4, cleared=0))
    assert bench.now == end_at
    assert bench.log[-1] == SendHeartbeat(bench.beat, promised=False)


def test_r30_a_reported_promise_sends_no_heartbeat_before_it_ends() -> None:
    bench = promised()
    assert bench.last_beat.promised
    assert bench.step(Tick(), after_s=0.1) == []


def test_r30_a_promise_forbids_to_become_pending() -> None:
    bench = promised()
    bench.answered(Answer(W, 1, 5, cleared=0))
    assert bench.session.role is S


def test_r30_a_promise_refuses_a_tenure_as_one_that_was_never_held() -> None:
    bench = promised()
    end_at = bench.view.promised_until
    assert end_at is not None
    effects = bench.answered(Answer(P, 2, 6, cleared=0))
    assert bench.session.role is S
    reason = "a promise to another member binds"
    assert Release(2, reason, end_at - bench.now, held=False) in effects
    bench.step(Released())
    bench.wake()
    effects = bench.answered(Answer(P, 2, 6, cleared=0))
    assert [e.held for e in effects if isinstance(e, Release)] == [False], "the release was lost"


def test_r30_after_a_refusal_no_role_is_accepted_until_the_promise_ends() -> None:
    bench = promised()
    bench.answered(Answer(P, 2, 6, cleared=0))
    bench.step(Released())
    bench.wake()
    bench.answered(Answer(W, 2, 7, cleared=2))
    assert bench.session.role is S
    bench.now += LEASE_S
    bench.step(Tick())
    bench.answered(Answer(W, 2, 7, cleared=2))
    assert bench.session.role is W


def test_r30_a_pending_session_demotes_before_it_refuses() -> None:
    bench = FailsafeBench(hooks={S, W})
    bench.free(epoch=1).cut_off()
    bench.vote()
    bench.wake()
    bench.answered(Answer(W, 1, 5, cleared=1))
    assert bench.session.role is W
    effects = bench.answered(Answer(P, 3, 6, cleared=1))
    assert (Publish, S) in kinds(effects)
    assert Release not in kinds(effects)
    while (StartHook, S) not in kinds(bench.log[-3:]):
        bench.ends()
    effects = bench.ends()
    assert [(e.epoch, e.held) for e in effects if isinstance(e, Release)] == [(3, False)]


def test_r30_the_release_of_a_tenure_that_was_held_is_marked_as_held() -> None:
    bench = FailsafeBench().holder()
    effects = bench.answered(Answer(S, 1, 6))
    effects += bench.step(FitnessChanged(fit=False, reason="disk full"))
    assert [(e.epoch, e.held) for e in bench.log if isinstance(e, Release)] == [(1, True)]


def test_r30_a_tenure_that_an_unfit_member_never_accepted_was_not_held() -> None:
    bench = FailsafeBench().free()
    bench.wake()
    bench.step(FitnessChanged(fit=False, reason="disk full"))
    effects = bench.answered(Answer(P, 1, 5, cleared=0))
    assert [e.held for e in effects if isinstance(e, Release)] == [False]


def test_r30_a_promise_lasts_for_the_timeout_of_the_group() -> None:
    """A member may vote before it knows it: the promise is counted from its receipt."""
    bench = FailsafeBench()
    bench.begin()
    bench.vote(after_s=DOUBT_S)
    voted_at = bench.now
    longer = bench.session.timing.__class__(30.0, 19.5, 7.5, 3.0, 6.0, 6.0)
    bench.step(Joined(longer, STORE))
    assert bench.view.promised_until == voted_at + 30.0


def test_r31_a_start_is_a_promise() -> None:
    bench = FailsafeBench().member()
    assert bench.last_beat.promised
    assert bench.view == FailsafeView(
        Readiness.PROMISED,
        "no role is accepted until the promise ends",
        promised_until=100.0 + LEASE_S,
    )
    bench.answered(Answer(W, 3, 4, cleared=2))
    assert bench.session.role is S


def test_r31_the_start_without_failsafe_promises_nothing() -> None:
    bench = Bench().member()
    bench.answered(Answer(W, 3, 4, cleared=2))
    assert bench.session.role is W


def test_r32_the_start_promises_nothing_against_a_group_in_which_all_tenures_are_over() -> None:
    bench = FailsafeBench().member()
    bench.answered(Answer(W, 3, 4, cleared=3))
    assert bench.session.role is W
    bench.answered(Answer(P, 4, 5, cleared=3))
    assert bench.session.role is P


def test_r32_a_plain_v1_server_cannot_have_a_holder_by_failsafe() -> None:
    bench = FailsafeBench().member(v1_server=True)
    bench.answered(v1(W))
    assert bench.session.role is W
    bench.answered(v1(P))
    assert bench.session.role is P


def test_r32_a_promise_is_discharged_when_its_own_tenure_is_over() -> None:
    bench = promised(epoch=2)
    bench.answered(Answer(W, 2, 5, cleared=1))
    assert bench.session.role is S
    bench.wake()
    bench.answered(Answer(W, 2, 6, cleared=2))
    assert bench.session.role is W
    bench.answered(Answer(P, 3, 7, cleared=2))
    assert bench.session.role is P


@pytest.mark.parametrize("older", [0, 1])
def test_r32_a_promise_for_a_newer_epoch_than_the_offered_one_binds(older: int) -> None:
    """As for the offered epoch itself, which only a coordinator with old data assigns twice."""
    bench = promised(epoch=5)
    assert bench.view.promised_to == "b"
    effects = bench.answered(Answer(P, 5 - older, 6, cleared=4 - older))
    assert bench.session.role is S
    assert [(e.epoch, e.held) for e in effects if isinstance(e, Release)] == [(5 - older, False)]


@pytest.mark.parametrize(
    ("cleared", "before", "forbidden"),
    [
        (None, 5, True),
        (4, 5, True),
        (5, 5, False),
        (5, 6, True),
        (6, 6, False),
        (3, 3, True),
        (4, 4, True),
        (5, 4, False),
    ],
)
def test_r32_a_promise_forbids_until_its_epoch_and_each_before_the_offered_one_are_cleared(
    *, cleared: int | None, before: int, forbidden: bool
) -> None:
    voter = FailsafeVoter()
    voter.promise("b", 5, 100.0)
    voter.promise("d", 2, 101.0)
    assert voter.forbids(cleared=cleared, before=before) is forbidden


@pytest.mark.parametrize(("cleared", "forbidden"), [(None, True), (3, True), (4, False)])
def test_r31_a_start_forbids_until_each_epoch_before_the_offered_one_is_cleared(
    *, cleared: int | None, forbidden: bool
) -> None:
    voter = FailsafeVoter()
    voter.promise_at_start(100.0)
    assert voter.forbids(cleared=cleared, before=4) is forbidden


# -- R35: rehearsals, and what operators see -------------------------------------------------------------


def test_r35_a_rehearsal_follows_each_new_set_and_then_each_minute() -> None:
    bench = FailsafeBench().holder()
    rehearsals = [effect for effect in bench.log if isinstance(effect, Ask)]
    assert [(ask.member, ask.rehearsal) for ask in rehearsals] == [(B, True)]
    began = bench.now
    bench.log.clear()
    while bench.now < began + REHEARSAL_INTERVAL_S:
        bench.wake()
        bench.answered(Answer(P, failsafe=SET))
    asks = [effect for effect in bench.log if isinstance(effect, Ask)]
    assert [ask.rehearsal for ask in asks] == [True]


def test_r35_a_rehearsal_promises_nothing_and_counts_for_nothing() -> None:
    voter = FailsafeBench().free(epoch=1)
    assert voter.vote(rehearsal=True) == Vote(yes=True, why="rehearsal")
    assert voter.view.readiness is Readiness.READY
    holder = FailsafeBench().holder()
    rehearsal = next(effect for effect in holder.log if isinstance(effect, Ask))
    sent_at = holder.session.sent_at
    holder.says(rehearsal, after_s=1.0)
    assert holder.session.sent_at == sent_at
    assert holder.view.readiness is Readiness.READY


def test_r35_a_yes_to_a_rehearsal_after_the_last_heartbeat_does_not_extend_the_role() -> None:
    bench = FailsafeBench().holder()
    bench.log.clear()
    while not bench.log or not isinstance(bench.log[-1], Ask):
        bench.wake()
        if isinstance(bench.log[-1], SendHeartbeat):
            bench.answered(Answer(P, failsafe=SET))
    rehearsal, sent_at = bench.log[-1], bench.session.sent_at
    assert isinstance(rehearsal, Ask)
    assert rehearsal.rehearsal
    assert sent_at < bench.now
    bench.says(rehearsal)
    assert bench.session.sent_at == sent_at


def test_r26_doubt_counts_from_the_oldest_unanswered_request() -> None:
    contact = Contact()
    contact.on_sent(1, 10.0)
    contact.on_sent(2, 12.0)
    assert contact.doubt_at(3.0) == 13.0
    contact.on_ended(1, contact=True)
    assert contact.doubt_at(3.0) == 15.0


def test_r26_an_older_answer_or_failure_does_not_undo_a_newer_one() -> None:
    contact = Contact()
    for number in range(1, 4):
        contact.on_sent(number, 10.0 * number)
    contact.on_ended(3, contact=True)
    contact.on_ended(1, contact=True)
    contact.on_ended(2, contact=False)
    assert contact.doubt_at(3.0) == float("inf")


def test_r35_a_new_set_in_doubt_is_rehearsed_after_the_questions() -> None:
    bench = FailsafeBench().holder()
    bench.wake()
    while not bench.questions:
        bench.wake()
    earlier = bench.beat
    bench.now += DOUBT_S / 4
    bench.step(Tick())
    while bench.beat == earlier:
        bench.wake()
    bench.fails(HeartbeatFailure.OTHER)
    bench.answered(Answer(P, failsafe=MemberSet(2, (ME, B, D))), beat=earlier)
    assert bench.session.wake_at > bench.now


def test_r35_a_member_that_does_not_answer_is_named_with_the_time() -> None:
    bench = FailsafeBench().holder(MemberSet(1, (ME, B, D)))
    assert bench.view.readiness is Readiness.NOT_READY
    rehearsals = [effect for effect in bench.log if isinstance(effect, Ask)]
    bench.says(rehearsals[0], after_s=1.0)
    bench.says(rehearsals[1], yes=False)
    view = bench.view
    assert (view.readiness, view.why) == (Readiness.NOT_READY, "d: for the test")
    assert view.since == bench.now - 1.0
    assert [one.ready for one in view.members] == [True, False]


def test_r35_two_members_that_are_not_ready_count_from_the_first_one() -> None:
    bench = FailsafeBench().holder(MemberSet(1, (ME, B, D)))
    began = bench.now
    rehearsals = [effect for effect in bench.log if isinstance(effect, Ask)]
    bench.says(rehearsals[0], after_s=1.0)
    bench.cut_off()
    bench.says(bench.questions[0], yes=False)
    assert bench.view.why == "b: for the test, d: not asked yet"
    assert bench.view.since == began


def test_r35_the_view_of_a_holder_shows_the_last_yes_of_each() -> None:
    bench = FailsafeBench().holder().cut_off()
    asked_at = bench.now
    bench.says(bench.questions[-1])
    view = bench.view
    assert (view.readiness, view.revision) == (Readiness.HOLDING, 1)
    assert [one.yes_at for one in view.members] == [asked_at]


def test_r35_a_holder_in_doubt_does_not_hold_by_votes_before_all_have_voted() -> None:
    bench = FailsafeBench().holder(MemberSet(1, (ME, B, D))).cut_off()
    bench.says(bench.questions[0])
    assert bench.view.readiness is Readiness.NOT_READY


def test_r35_the_view_of_a_voter_shows_to_whom_it_has_promised() -> None:
    bench = FailsafeBench().free(epoch=1).cut_off()
    bench.vote()
    view = bench.view
    assert (view.readiness, view.promised_to) == (Readiness.PROMISED, "b")
    assert view.promised_until == bench.now + LEASE_S


def test_without_failsafe_the_view_is_off() -> None:
    view = Bench().member().session.failsafe_view(100.0)
    assert view == FailsafeView(Readiness.OFF, "not configured")


def test_a_status_that_names_a_tenure_is_released_as_one_that_was_not_held() -> None:
    bench = FailsafeBench().free()
    bench.step(FitnessChanged(fit=False, reason="disk full"))
    bench.step(status("me", None, 1, 6))
    assert [e.held for e in bench.log if isinstance(e, Release)] == [False]


def test_r28_the_vote_of_a_member_that_has_left_the_set_counts_for_nothing() -> None:
    bench = FailsafeBench().holder(MemberSet(1, (ME, B, D))).cut_off()
    questions = bench.questions
    while bench.log[-1] != bench.last_beat:
        bench.wake()
    bench.answered(Answer(P, failsafe=MemberSet(2, (ME, B))))
    for question in questions:
        bench.says(question)
    assert [one.member for one in bench.view.members] == [B]


def test_r35_after_a_doubt_it_rehearses_soon() -> None:
    bench = FailsafeBench().holder().cut_off()
    bench.says(bench.questions[-1], yes=False)
    while bench.log[-1] != bench.last_beat:
        bench.wake()
    bench.answered(Answer(P, failsafe=SET))
    ended_at = bench.now
    bench.log.clear()
    while not any(isinstance(effect, Ask) for effect in bench.log):
        bench.wake()
    assert bench.now <= ended_at + ASK_S
    assert bench.questions == []


# -- any events ----------------------------------------------------------------------------------------

SETS = st.sampled_from([None, SET, MemberSet(2, (ME, B, D)), MemberSet(3, off="v1")])
EVENTS: st.SearchStrategy[Event] = st.one_of(
    st.builds(Answered, numbers(9), st.booleans(), st.just("for the test")),
    st.builds(Asked, st.just("b"), st.integers(0, 4), st.booleans()),
    st.builds(
        HeartbeatAnswered,
        numbers(12),
        st.builds(
            HeartbeatAnswer,
            st.sampled_from(Role),
            st.none(),
            st.integers(0, 4),
            st.integers(0, 9),
            st.just(LEASE_S),
            store_id=st.just(STORE),
            cleared=st.none() | st.integers(0, 4),
            failsafe=SETS,
        ),
    ),
    st.builds(
        HeartbeatFailed,
        numbers(12),
        st.sampled_from(HeartbeatFailure),
        st.just("for the test"),
        contact=st.booleans(),
    ),
    st.builds(HookEnded, numbers(8), st.booleans(), st.just("ended")),
    st.builds(FitnessChanged, st.booleans(), st.just("disk")),
    st.sampled_from([Stalled(2.0), Joined(TIMING, STORE), Released(), Left(), Tick(), Tick()]),
)


PROMISE: list[tuple[Event, float]] = [
    (Asked("b", 1, rehearsal=False), 0.0),
    (Tick(), TIMING.heartbeat_interval_s),
]
DISCHARGED: list[tuple[Event, float]] = [
    *PROMISE,
    (HeartbeatAnswered(LATEST, Answer(W, 1, 5, cleared=1).build()), 0.1),
]
STARTS: list[tuple[Callable[[FailsafeBench], object], Sequence[tuple[Event, float]]]] = [
    (FailsafeBench.begin, []),
    (FailsafeBench.free, []),
    (lambda bench: bench.free().cut_off(), PROMISE),
    (lambda bench: bench.free().cut_off(), DISCHARGED),
    (FailsafeBench.holder, []),
]
"""States from which any events follow."""


def test_any_events_keep_the_deadlines_and_the_promise() -> None:
    """Primary only with a lease, no role against a promise that is not discharged, and no busy loop."""
    reached: set[str] = set()

    @settings(max_examples=400, deadline=None, derandomize=True)
    @given(
        st.lists(st.tuples(EVENTS, st.floats(0, 4)), max_size=40),
        st.sampled_from([frozenset(), frozenset(Role)]),
        st.sampled_from(STARTS),
    )
    def check(
        events: list[tuple[Event, float]],
        hooks: frozenset[Role],
        start: tuple[Callable[[FailsafeBench], object], Sequence[tuple[Event, float]]],
    ) -> None:
        bench = FailsafeBench(hooks=hooks)
        promised_until, promised_for = bench.now + LEASE_S, -1
        begin, first = start
        begin(bench)
        session = bench.session
        for drawn, after_s in (*first, *events):
            before, event = session.role, addressed(drawn, bench.log)
            if isinstance(event, Asked):
                vote = bench.vote(event.epoch, after_s=after_s, rehearsal=event.rehearsal)
                assert session.role is S or not vote.yes
                if vote.yes and not event.rehearsal:
                    promised_until = bench.now + LEASE_S
                    promised_for = max(promised_for, event.epoch)
            else:
                bench.step(event, after_s=after_s)
            if before is S and session.role is not S and bench.now < promised_until:
                reached.add("a role during a promise")
                assert isinstance(event, HeartbeatAnswered)
                cleared = event.answer.cleared
                assert cleared is not None
                assert cleared >= promised_for
            if session.role is P:
                reached.add("primary")
                assert session.renew_by > bench.now, "primary without a lease"
            assert session.wake_at > bench.now, "the daemon would spin"
            assert session.renew_by == session.sent_at + TIMING.renew_s
            assert session.failsafe_view(bench.now).readiness in Readiness

    check()
    assert reached == {"a role during a promise", "primary"}
