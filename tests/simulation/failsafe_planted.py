"""Faults of failsafe that can be planted into the real core: one for each rule that the promise needs.

Those of the agent are subclasses of ``Session``, those of the coordinator functions around ``decide``.
"""

from dataclasses import dataclass, replace

from agent.core import group_failsafe as failsafe
from agent.core.effects import SendHeartbeat
from agent.core.failsafe_holder import NEVER, FailsafeHolder
from agent.core.failsafe_voter import FailsafeVoter
from agent.core.group import decide
from agent.core.group_state import (
    AddSession,
    Decision,
    GroupState,
    Input,
    Policy,
    ReceiveHeartbeat,
    ReleaseRole,
    state_after_restart,
)
from agent.core.options import Options
from agent.core.session import Session
from agent.core.timing import Timing
from agent.model import GroupRecord, Instant, MemberSet

from .coordinator import REAL, Core
from .failsafe_faults import LATE_CONFIRMATION, STORIES, VOTER_RESTARTS, Story

# -- the agent's side ----------------------------------------------------------------------------------


class IgnoresContact(Session):
    """A voter says yes although it hears the coordinator."""

    def _is_cut_off(self, now: float) -> bool:
        return True


class ForgetsItsPromise(Session):
    """A voter forgets its promise when it restarts."""

    def _promise_at_start(self, now: float) -> None:
        pass


class _NoPromise(FailsafeVoter):
    def promise(self, asker: str, epoch: int, now: float) -> None:
        pass


class PromisesNothing(Session):
    """A voter says yes and promises nothing."""

    def __init__(self, timing: Timing, options: Options) -> None:
        super().__init__(timing, options)
        self._voter = _NoPromise()


class _ShortPromise(FailsafeVoter):
    def until(self, lease_s: float) -> float:
        return super().until(0.95 * lease_s)


class PromisesTooLittle(Session):
    """The promise is 5 % shorter than L."""

    def __init__(self, timing: Timing, options: Options) -> None:
        super().__init__(timing, options)
        self._voter = _ShortPromise()


class AcceptsInSpiteOfItsPromise(Session):
    """A voter accepts a role in spite of its promise."""

    def _is_forbidden(self, now: float, *, cleared: int | None, before: int | None) -> bool:
        return False


class DoesNotReportItsPromise(Session):
    """A voter's heartbeats do not say that it has promised."""

    def _next_heartbeat(self, now: float) -> SendHeartbeat:
        return replace(super()._next_heartbeat(now), promised=False)


class _FromArrival(FailsafeHolder):
    def on_answered(self, nonce: int, now: float, *, yes: bool, why: str) -> None:
        question = self._questions.get(nonce)
        if question is not None:
            self._questions = {**self._questions, nonce: replace(question, sent_at=now)}
        super().on_answered(nonce, now, yes=yes, why=why)


class _WithoutNonce(FailsafeHolder):
    def on_answered(self, nonce: int, now: float, *, yes: bool, why: str) -> None:
        question = self._questions.get(nonce)
        if question is not None:
            newest = max(
                one.sent_at for one in self._questions.values() if one.member == question.member
            )
            self._questions = {**self._questions, nonce: replace(question, sent_at=newest)}
        super().on_answered(nonce, now, yes=yes, why=why)


class _Majority(FailsafeHolder):
    @property
    def counts_from(self) -> float:
        if self.members is None or not self.others:
            return super().counts_from
        votes = sorted(self._yes.get(member, NEVER) for member in self.others)
        return votes[-((len(votes) + 1) // 2)]


class _OldSet(FailsafeHolder):
    def adopt(self, received: MemberSet | None, now: float) -> None:
        before = self.members
        if before and received is not None and received.off is None:
            received = MemberSet(received.revision, before)
        super().adopt(received, now)


class CountsFromTheArrival(Session):
    """A yes is counted from its arrival."""

    def __init__(self, timing: Timing, options: Options) -> None:
        super().__init__(timing, options)
        self._holder = _FromArrival(self._holder.me)


class TakesAnOlderYes(Session):
    """A yes to an older question is taken for one to the newest."""

    def __init__(self, timing: Timing, options: Options) -> None:
        super().__init__(timing, options)
        self._holder = _WithoutNonce(self._holder.me)


class TakesAMajority(Session):
    """More than half of the members are enough."""

    def __init__(self, timing: Timing, options: Options) -> None:
        super().__init__(timing, options)
        self._holder = _Majority(self._holder.me)


class AcknowledgesAnUnusedSet(Session):
    """The holder acknowledges a set, and goes on asking the older one."""

    def __init__(self, timing: Timing, options: Options) -> None:
        super().__init__(timing, options)
        self._holder = _OldSet(self._holder.me)


# -- the coordinator's side ----------------------------------------------------------------------------


def _changed(decision: Decision, record: GroupRecord) -> Decision:
    return replace(decision, state=GroupState(record, decision.state.live))


def takes_told_for_used(state: GroupState, what: Input, now: Instant, policy: Policy) -> Decision:
    """A set counts as used when it is offered."""
    decision = decide(state, what, now, policy)
    record = decision.state.record
    if record.offered is None or record.used == record.offered:
        return decision
    return _changed(decision, replace(record, used=record.offered))


def restricts_nobody(state: GroupState, what: Input, now: Instant, policy: Policy) -> Decision:
    """The choosable members are not kept once the lease has ended."""
    decision = decide(state, what, now, policy)
    record = decision.state.record
    if record.holder is not None or record.cleared >= record.epoch or record.used is None:
        return decision
    return _changed(decision, replace(record, used=None, offered=None))


def forgets_the_restriction(record: GroupRecord, now: Instant) -> GroupState:
    """The choosable members are lost when the coordinator restarts."""
    cleared = record.epoch - (record.holder is not None)
    return state_after_restart(replace(record, used=None, offered=None, cleared=cleared), now)


def promotes_joiners(state: GroupState, what: Input, now: Instant, policy: Policy) -> Decision:
    """A member that joins is choosable before the holder asks it."""
    decision = decide(state, what, now, policy)
    record = decision.state.record
    if not isinstance(what, AddSession):
        return decision
    member = failsafe.member_of(record, what.config.id)
    if member is None or what.config.id in state.record.sessions:
        return decision

    def with_joiner(one: MemberSet | None) -> MemberSet | None:
        if one is None or one.off or member in one.members:
            return one
        return replace(one, members=(*one.members, member))

    used, offered = with_joiner(record.used), with_joiner(record.offered)
    return _changed(decision, replace(record, used=used, offered=offered))


def resumes_an_older_tenure(
    state: GroupState, what: Input, now: Instant, policy: Policy
) -> Decision:
    """A tenure is resumed although there was a later one."""
    record = state.record
    ended = record.ended
    if isinstance(what, ReceiveHeartbeat) and ended is not None and record.holder is None:
        same = (ended.session_id, ended.instance) == (what.session_id, what.instance)
        if same and what.holds is not None and not record.quiet:
            holder = replace(ended, epoch=record.epoch)
            state = GroupState(
                replace(record, holder=holder, pending=None),
                replace(state.live, held_since=now.mono),
            )
    decision = decide(state, what, now, policy)
    after = decision.state.record
    if ended is not None and after.ended is None and not isinstance(what, ReleaseRole):
        return decision
    kept = ended if after.ended is None else after.ended
    return _changed(decision, replace(after, ended=kept)) if kept is not after.ended else decision


def resumes_another_process(
    state: GroupState, what: Input, now: Instant, policy: Policy
) -> Decision:
    """A tenure is resumed for another process of its session."""
    record, live = state.record, state.live
    ended = record.ended
    resumable = failsafe.is_resumable(record) and ended is not None and not record.quiet
    if isinstance(what, ReceiveHeartbeat) and resumable and ended.session_id == what.session_id:  # type: ignore[union-attr]
        holder = replace(ended, instance=what.instance)  # type: ignore[type-var]
        record = replace(record, holder=holder, pending=None)
        lease_until = now.mono + record.config.lease_s
        live = replace(live, held_since=now.mono, lease_until=lease_until)
        state = GroupState(record, live)
    return decide(state, what, now, policy)


def resumes_a_released_tenure(
    state: GroupState, what: Input, now: Instant, policy: Policy
) -> Decision:
    """A tenure that was released is resumed."""
    record, live = state.record, state.live
    ended = record.ended
    if isinstance(what, ReceiveHeartbeat) and ended is not None and record.holder is None:
        same = (ended.session_id, ended.instance, ended.epoch) == (
            what.session_id,
            what.instance,
            what.holds,
        )
        if same and ended.epoch == record.epoch and not record.quiet:
            record = replace(record, holder=replace(ended, revoked=False), pending=None)
            lease_until = now.mono + record.config.lease_s
            live = replace(live, held_since=now.mono, lease_until=lease_until)
            state = GroupState(record, live)
    decision = decide(state, what, now, policy)
    if isinstance(what, ReleaseRole) and decision.state.record.holder is None:
        released = record.holder or ended
        return _changed(decision, replace(decision.state.record, ended=released))
    return decision


@dataclass(frozen=True)
class PlantedFailsafe:
    """One planted fault of failsafe.

    Attributes:
        stories: those that are searched, if a search of all takes long.
    """

    session: type[Session] = Session
    core: Core = REAL
    stories: tuple[Story, ...] = STORIES


PLANTED = {
    "ignores contact": PlantedFailsafe(IgnoresContact),
    "forgets its promise": PlantedFailsafe(ForgetsItsPromise, stories=(VOTER_RESTARTS,)),
    "promises nothing": PlantedFailsafe(PromisesNothing),
    "promises too little": PlantedFailsafe(PromisesTooLittle),
    "accepts in spite of its promise": PlantedFailsafe(
        AcceptsInSpiteOfItsPromise, stories=(LATE_CONFIRMATION,)
    ),
    "does not report its promise": PlantedFailsafe(DoesNotReportItsPromise),
    "counts from the arrival": PlantedFailsafe(CountsFromTheArrival),
    "takes an older yes": PlantedFailsafe(TakesAnOlderYes),
    "takes a majority": PlantedFailsafe(TakesAMajority),
    "acknowledges an unused set": PlantedFailsafe(AcknowledgesAnUnusedSet),
    "takes told for used": PlantedFailsafe(core=replace(REAL, decide=takes_told_for_used)),
    "restricts nobody": PlantedFailsafe(core=replace(REAL, decide=restricts_nobody)),
    "forgets the restriction": PlantedFailsafe(
        core=replace(REAL, state_after_restart=forgets_the_restriction)
    ),
    "promotes joiners": PlantedFailsafe(core=replace(REAL, decide=promotes_joiners)),
    "resumes an older tenure": PlantedFailsafe(core=replace(REAL, decide=resumes_an_older_tenure)),
    "resumes another process": PlantedFailsafe(core=replace(REAL, decide=resumes_another_process)),
    "resumes a released tenure": PlantedFailsafe(
        core=replace(REAL, decide=resumes_a_released_tenure)
    ),
}
