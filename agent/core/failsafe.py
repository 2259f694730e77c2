"""Failsafe in a session: stay primary without the coordinator, and vote on others that want to (R26-R32, R35).

Owns when this session asks questions, and its votes on the questions of others. The set of members and their
votes are in core/failsafe_holder.py, the promise in core/failsafe_voter.py, contact with the coordinator in
core/failsafe_contact.py. Without ``Options.failsafe`` the session asks nothing, and votes no.
"""

from dataclasses import replace

from agent.core.effects import Cause, Effect, Release, SendHeartbeat, Vote
from agent.core.events import Answered, Asked, Joined
from agent.core.failsafe_contact import JOIN, Contact
from agent.core.failsafe_view import FailsafeView, Readiness
from agent.core.failsafe_voter import FailsafeVoter
from agent.core.lifecycle import LifeCycle
from agent.core.options import Options
from agent.core.phases import Phase
from agent.core.timing import Timing
from agent.model import Member, MemberSet, Role

STOPPED = Vote(yes=False, why="it has stopped")

_REGISTERING = frozenset({Phase.RETURNING, Phase.JOINING})
"""Phases in which the session registers, so that a request under way is not a heartbeat."""


class FailsafeMember(LifeCycle):
    """The failsafe part of a session. Other objects may read its public attributes, but not set them."""

    def __init__(self, timing: Timing, options: Options) -> None:
        """Build a session that has not started."""
        super().__init__(timing, options)
        self._contact = Contact()
        self._voter = FailsafeVoter()
        self._vote = STOPPED

    # -- for operators --------------------------------------------------------------------------

    def failsafe_view(self, now: float) -> FailsafeView:
        """Build the view of failsafe for operators, at ``now`` in CLOCK_BOOTTIME seconds."""
        if self.options.failsafe is None:
            return FailsafeView(Readiness.OFF, "not configured")
        if self._holds_tenure:
            return self._view_of_holder(now)
        until = self._voter.until(self.timing.lease_s)
        if now < until:
            why = "no role is accepted until the promise ends"
            asker = self._voter.promised_to
            return FailsafeView(Readiness.PROMISED, why, promised_to=asker, promised_until=until)
        return FailsafeView(Readiness.READY, "questions of the primary are answered")

    def _view_of_holder(self, now: float) -> FailsafeView:
        holder = self._holder
        revision, members = holder.revision, holder.readiness
        if holder.members is None:
            return FailsafeView(Readiness.OFF, str(holder.off), revision=revision)
        if holder.counts_from > self._heartbeat_at and self._in_doubt(now):
            why = "primary by the votes of all other members"
            since = self._heartbeat_at
            return FailsafeView(Readiness.HOLDING, why, since, revision, members)
        missing = [one for one in members if not one.ready]
        if missing:
            why = ", ".join(f"{one.member.id}: {one.why}" for one in missing)
            since = min(one.since for one in missing)
            return FailsafeView(Readiness.NOT_READY, why, since, revision, members)
        return FailsafeView(Readiness.READY, "all members answer", None, revision, members)

    @property
    def asked_members(self) -> tuple[Member, ...] | None:
        """The set of members in use during this session's tenure, itself included; or None."""
        return self._holder.members if self._holds_tenure else None

    # -- contact --------------------------------------------------------------------------------

    def _in_doubt(self, now: float) -> bool:
        """Whether the coordinator may be away (R26)."""
        return now >= self._contact.doubt_at(self.timing.doubt_s)

    def _on_joined(self, event: Joined, now: float) -> None:
        super()._on_joined(event, now)
        self._contact.on_ended(JOIN, contact=self.phase is Phase.MEMBER)

    def _next_heartbeat(self, now: float) -> SendHeartbeat:
        heartbeat = super()._next_heartbeat(now)
        self._contact.on_sent(heartbeat.number, now)
        if self.options.failsafe is None:
            return heartbeat
        self._voter.reported = now < self._voter.until(self.timing.lease_s)
        return replace(
            heartbeat,
            holds=self.tenure if self._holds_tenure else None,
            failsafe_revision=self._holder.revision,
            promised=self._voter.reported,
        )

    # -- as the holder --------------------------------------------------------------------------

    def _adopt_members(self, received: MemberSet | None, now: float) -> None:
        """Use the set from a heartbeat's answer; this may make the deadline earlier (R28)."""
        self._holder.adopt(received, now)
        self._update_lease_start()

    def _ask_members(self, now: float, effects: list[Effect]) -> None:
        """Ask the other members while the coordinator is in doubt (R27); else rehearse (R35)."""
        holder, timing = self._holder, self._granted_timing
        if self.asked_members is None or self.tenure is None:
            return
        if not self._in_doubt(now):
            if now >= holder.rehearse_at:
                effects += holder.rehearse(self.tenure, now)
            return
        if now >= holder.ask_at:
            interval_s, forget_s = timing.question_interval_s, timing.renew_s
            effects += holder.ask(self.tenure, now, interval_s=interval_s, forget_s=forget_s)
            self._update_lease_start()
        holder.rehearse_at = holder.ask_at  # a vote of no does not prove that a member is not ready

    @property
    def _missing_votes(self) -> str:
        """The members whose votes are missing when the role is lost, as the end of a sentence."""
        if self.asked_members is None:
            return ""
        missing = [one for one in self._holder.readiness if one.yes_at <= self.sent_at]
        votes = ", ".join(f"{one.member.id} ({one.why})" for one in missing)
        return f", no vote of {votes}" if votes else ""

    def _on_answered(self, event: Answered, now: float) -> None:
        if self._holds_tenure:
            self._holder.on_answered(event.nonce, now, yes=event.yes, why=event.why)
            self._update_lease_start()

    # -- as a voter -----------------------------------------------------------------------------

    def _promise_at_start(self, now: float) -> None:
        if self.options.failsafe is not None:
            self._voter.promise_at_start(now)

    def _on_asked(self, asked: Asked, now: float) -> None:
        refusal = self._refusal_of_vote(asked)
        if refusal is None and not asked.rehearsal and not self._is_cut_off(now):
            refusal = "the coordinator answers"
            if self._may_send_heartbeat and not self._contact.is_waiting:
                self._heartbeats.send_by(now)  # answered before the next question comes
        if refusal is not None:
            self._vote = Vote(yes=False, why=refusal)
        elif asked.rehearsal:
            self._vote = Vote(yes=True, why="rehearsal")
        else:
            self._knowledge.learn_epoch(asked.epoch)
            self._voter.promise(asked.asker, asked.epoch, now)
            self._vote = Vote(yes=True, why="promised")

    def _refusal_of_vote(self, asked: Asked) -> str | None:
        """Why the vote is no, even if the coordinator is away; None if there is no such reason (R29)."""
        if self.options.failsafe is None:
            return "failsafe is off"
        if self._starting:
            return "starting"
        settled = self._executor.is_settled and not self._demoting
        if self.role is not Role.SECONDARY or not settled:
            return "demoting" if self._demoting else f"it is {self.role}"
        seen = self._knowledge.epoch
        if seen is not None and asked.epoch < seen:
            return f"epoch {asked.epoch} is over: epoch {seen} has begun"
        return None

    def _is_cut_off(self, now: float) -> bool:
        """Whether the coordinator is in doubt, or cannot choose this member as candidate."""
        unfit = self._unfit_reason is not None or self.phase is Phase.COOLING
        return unfit or self._in_doubt(now)

    def _is_forbidden(self, now: float, *, cleared: int | None, before: int | None) -> bool:
        """Whether a promise forbids the tenure that follows epoch ``before`` (R30, R32).

        Without an epoch the server is a plain v1 server, which has no failsafe.
        """
        if before is None or now >= self._voter.until(self.timing.lease_s):
            return False
        return self._voter.forbids(cleared=cleared, before=before)

    def _refuse_by_promise(self, now: float, effects: list[Effect]) -> None:
        """Refuse a tenure: release it as never active, with a hold-off until the promise ends (R30)."""
        self._voter.refuses_until = self._voter.until(self.timing.lease_s)
        if self.role is Role.PENDING_PRIMARY:
            why = "the role was refused: a promise to another member binds"
            self._demote(Cause.REVOKED, why, now, effects)

    def _refusal_reason(self, now: float) -> str | None:
        reason = super()._refusal_reason(now)
        if reason is None and now < self._voter.refuses_until:
            return "a promise to another member binds"
        return reason

    def _build_release(self, epoch: int, reason: str, now: float) -> Release:
        release = super()._build_release(epoch, reason, now)
        if self.options.failsafe is None:
            return release
        hold_off_s = max(release.hold_off_s, self._voter.refuses_until - now)
        return replace(release, hold_off_s=hold_off_s, held=epoch == self._accepted_epoch)

    # -- time -----------------------------------------------------------------------------------

    def _advance(self, now: float, effects: list[Effect]) -> None:
        if self._voter.reported and now >= self._voter.until(self.timing.lease_s):
            self._voter.reported = False
            self._heartbeats.send_by(now)  # the coordinator may choose it again
        super()._advance(now, effects)
        if self.phase in _REGISTERING:
            self._contact.on_sent(JOIN, now)
        self._ask_members(now, effects)

    @property
    def _failsafe_due(self) -> list[float]:
        """The moments at which a question, a rehearsal or a heartbeat is due."""
        due = []
        if self.asked_members is not None:
            due.append(max(self._contact.doubt_at(self.timing.doubt_s), self._holder.ask_at))
            due.append(self._holder.rehearse_at)
        if self._voter.reported and self._may_send_heartbeat:
            due.append(self._voter.until(self.timing.lease_s))
        return due
