"""The agent's side of one session: ``step(event, now) -> effects``, and ``wake_at`` (R1-R8).

Rules of this file:

- ``now`` is CLOCK_BOOTTIME in seconds, read by the caller *after* it took the event from its queue.
  Deadlines are checked before the event, so a process that was frozen demotes first (R2).
- Phases change only by the table of core/phases.py. A step that raises has changed nothing.
- Only the answer to a heartbeat that is not forgotten, from the session's store, and not older than the
  newest seen, may promote or renew; any answer may demote; an error never renews (R3).
- The lease is counted from the moment at which a heartbeat was *sent*. The caller must send it when it
  sees ``SendHeartbeat``; a later sending is safe.
- A demotion forgets the heartbeats in flight, so none of them can promote. If one is answered with a
  tenure that this session does not accept, that tenure is released (R5).
- The caller calls ``step(Tick(), now)`` at ``wake_at``, and has exactly one timer.
"""

from agent.core.effects import Cause, Effect, Vote
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
    StatusRead,
    Stop,
    Tick,
)
from agent.core.failsafe import STOPPED, FailsafeMember
from agent.core.lifecycle import RETRY_SHARE
from agent.core.options import Options, PreviousTenure
from agent.core.phases import IGNORED, Phase, Trigger
from agent.core.timing import Timing, minimum_interval_s
from agent.errors import ExitCode
from agent.model import GroupStatus, HeartbeatAnswer, Role

__all__ = ["Options", "Phase", "PreviousTenure", "Session"]

MIN_PROMOTION_SHARE = 0.25
"""A promotion starts only if at least this share of R is left (R8)."""


class Session(FailsafeMember):
    """The session of one agent. Other objects may read its public attributes, but not set them."""

    def __init__(self, timing: Timing, options: Options) -> None:
        """Build a session that has not started. Call ``start`` next."""
        super().__init__(timing, options)
        self._last_failure: HeartbeatFailure | None = None
        """Why the last heartbeat did not renew the lease."""

    @property
    def _mutable_parts(self) -> tuple[object, ...]:
        """The objects that a step may change."""
        return (
            self,
            self._executor,
            self._heartbeats,
            self._knowledge,
            self._cooldown,
            self._holder,
            self._contact,
            self._voter,
        )

    # -- the caller's interface ---------------------------------------------------------------

    def start(self, now: float, previous: PreviousTenure | None = None) -> tuple[Effect, ...]:
        """Start with a demotion: the previous process may have left a workload running (R6).

        Args:
            now: CLOCK_BOOTTIME seconds.
            previous: the tenure of the previous process, to release after the demotion.
        """
        self._previous_tenure = previous
        self._promise_at_start(now)
        self._begin_first_demotion(now)
        return self.step(Tick(), now)

    def step(self, event: Event, now: float) -> tuple[Effect, ...]:
        """Handle one event; return the effects, in order. If it raises, nothing has changed.

        Args:
            event: the event.
            now: CLOCK_BOOTTIME seconds, read after the event was taken from the queue.
        """
        if (self.phase, type(event)) in IGNORED:
            if self.phase is Phase.ENDED:
                return ()
            event = Tick()
        before = [(vars(part), vars(part).copy()) for part in self._mutable_parts]
        effects: list[Effect] = []
        try:
            self._check_deadlines(now, effects)
            self._handle(event, now, effects)
            self._advance(now, effects)
        except BaseException:
            for attributes, values in before:  # shallow: collections are never mutated
                attributes.clear()
                attributes.update(values)
            raise
        return tuple(effects)

    def vote(self, asked: Asked, now: float) -> tuple[Vote, tuple[Effect, ...]]:
        """Answer the question of another member; return the vote and the step's effects, in order (R29).

        Args:
            asked: the question.
            now: CLOCK_BOOTTIME seconds, read after the question was received: a promise begins here.
        """
        self._vote = STOPPED
        effects = self.step(asked, now)
        return self._vote, effects

    @property
    def wake_at(self) -> float:
        """When to call ``step(Tick(), now)`` at the latest: CLOCK_BOOTTIME seconds, or infinity."""
        due = [self._executor.wake_at] if self.phase is not Phase.ENDED else []
        due += self._failsafe_due
        if self._has_lease:
            due.append(self.renew_by)
        if self._may_send_heartbeat:
            due.append(self._heartbeats.due_at)
        match self.phase:
            case Phase.JOINING:
                due.append(self._join_at)
            case Phase.COOLING:
                due.append(self._rejoin_at)
            case Phase.RETURNING | Phase.LEAVING:
                due.append(self._wait_by)
            case Phase.RELEASING:
                due.append(self._settled_by)
            case _:
                pass
        return min(due, default=float("inf"))

    @property
    def newest_epoch(self) -> int | None:
        """The newest epoch of the group that this session has seen; heartbeats report it."""
        return self._knowledge.epoch

    # -- deadlines ----------------------------------------------------------------------------

    def _check_deadlines(self, now: float, effects: list[Effect]) -> None:
        if self._has_lease and now >= self.renew_by:
            why = f"lease lost: no renewal for {now - self.sent_at:.3f} s{self._missing_votes}"
            if self._last_failure is HeartbeatFailure.OTHER_STORE:
                why = f"{why}: the answers were from another store"
                self._demote(Cause.OTHER_STORE, why, now, effects)
            else:
                self._demote(Cause.LEASE_LOST, why, now, effects)

    def _handle(self, event: Event, now: float, effects: list[Effect]) -> None:  # noqa: C901, PLR0912 - one arm for each event
        match event:
            case HeartbeatAnswered():
                self._on_heartbeat_answered(event.number, event.answer, now, effects)
            case HeartbeatFailed():
                self._on_heartbeat_failed(event, now, effects)
            case StatusRead():
                self._on_status_read(event.status, now, effects)
            case HookEnded():
                self._executor.on_hook_ended(event.run, ok=event.ok, why=event.why, now=now)
            case Joined():
                self._on_joined(event, now)
            case Stalled():
                self._on_stalled(event.late_s, now, effects)
            case FitnessChanged():
                self._on_fitness_changed(event, now, effects)
            case Released():
                self._open_releases = max(0, self._open_releases - 1)
            case Left():
                self._session_is_deleted = True
                self._rejoin_at = max(now, self._cooldown.until)
            case Stop():
                if self._stop is None or self._stop.code is ExitCode.OK:
                    self._stop = event
            case Asked():
                self._on_asked(event, now)
            case Answered():
                self._on_answered(event, now)
            case Tick():  # pragma: no branch - mypy proves that no event is left
                pass

    # -- answers ------------------------------------------------------------------------------

    def _on_heartbeat_answered(
        self, number: int, answer: HeartbeatAnswer, now: float, effects: list[Effect]
    ) -> None:
        sent_at = self._heartbeats.finish(number)
        self._contact.on_ended(number, contact=answer.store_id == self.store_id)
        if answer.store_id != self.store_id:
            self._on_foreign_answer(sent_at, now, effects)
            return
        if not self._knowledge.accept_if_fresh(answer.epoch, answer.revision):
            self._on_stale_answer(answer, now, effects)
            return
        self._knowledge.record_answer(answer.revision)
        if answer.role is Role.PRIMARY:
            self._record_assigned_tenure(answer.epoch)
        if self.phase is not Phase.MEMBER or self._demoting:
            return
        if answer.role is Role.SECONDARY:
            self._heartbeats.confirmations = 0
            if self._has_lease:
                self._demote(Cause.REVOKED, "demoted by the coordinator", now, effects)
        elif sent_at is not None and sent_at >= self._heartbeat_at:
            # The heartbeat is not forgotten, and not older than the one that the lease counts from (R3).
            self._on_role_answer(sent_at, answer, now, effects)

    def _on_stale_answer(self, answer: HeartbeatAnswer, now: float, effects: list[Effect]) -> None:
        """Release a tenure of restored data, so that it does not block the role (R8).

        A late answer looks the same; releasing a tenure that has ended changes nothing.
        """
        idle = self.phase is Phase.MEMBER and self.role is Role.SECONDARY and not self._demoting
        if idle and answer.role is Role.PRIMARY and answer.epoch is not None:
            self._release(answer.epoch, "an earlier tenure, from older data", now, effects)

    def _on_role_answer(
        self, sent_at: float, answer: HeartbeatAnswer, now: float, effects: list[Effect]
    ) -> None:
        if answer.lease_s is not None and abs(answer.lease_s - self.timing.lease_s) > 1e-3:  # noqa: PLR2004 - a millisecond: the resolution of a timer
            self._rejoin(Trigger.RETIMED, effects)
            return
        if answer.previous is not None:
            self.previous_primary = answer.previous
        if answer.role is Role.PENDING_PRIMARY:
            self._on_pending_answer(sent_at, answer, now, effects)
        else:
            self._on_primary_answer(sent_at, answer, now, effects)

    def _on_foreign_answer(self, sent_at: float | None, now: float, effects: list[Effect]) -> None:
        """Handle an answer from another store: count it as an error, or register at a server that was plain v1."""
        if sent_at is None or self.phase is not Phase.MEMBER:
            return
        if self.store_id is not None:
            self._retry_heartbeat(HeartbeatFailure.OTHER_STORE, now)
            return
        if self._has_lease:
            self._demote(Cause.OTHER_STORE, "the server has been replaced", now, effects)
        self._rejoin(Trigger.REPLACED, effects)

    def _on_pending_answer(
        self, sent_at: float, answer: HeartbeatAnswer, now: float, effects: list[Effect]
    ) -> None:
        if self._executor.wanted is Role.PRIMARY:
            self._demote(
                Cause.REVOKED,
                "the tenure has ended: the coordinator answered PendingPrimary",
                now,
                effects,
            )
            return
        if self._refusal_reason(now) is not None or self._is_forbidden(
            now, cleared=answer.cleared, before=answer.epoch
        ):
            return
        self._renew(sent_at)
        self.last_data = answer.last_data
        self._heartbeats.send_confirmation(now)
        if self.role is Role.SECONDARY and now < self.renew_by:
            self._become_pending(now, effects)

    def _on_primary_answer(
        self, sent_at: float, answer: HeartbeatAnswer, now: float, effects: list[Effect]
    ) -> None:
        self._heartbeats.confirmations = 0
        epoch = answer.epoch
        if epoch is not None and epoch <= self._released_epoch:
            # The release was lost (R8).
            self._release(epoch, self._reason, now, effects)
        elif self._executor.wanted is Role.PRIMARY:
            if epoch == self.tenure:
                self._renew(sent_at)
                self._adopt_members(answer.failsafe, now)
            else:
                self._demote(
                    Cause.REVOKED, "the tenure has ended: another was assigned", now, effects
                )
        elif self._refusal_reason(now) is not None:
            pass  # the next step of the life cycle releases it
        elif epoch is not None and self._is_forbidden(
            now, cleared=answer.cleared, before=epoch - 1
        ):
            self._refuse_by_promise(now, effects)
        else:
            left_s = sent_at + self.timing.renew_s - now
            if left_s >= MIN_PROMOTION_SHARE * self.timing.renew_s:
                self._unaccepted_epoch = None
                self.last_data = answer.last_data
                self._renew(sent_at)
                self._promote(epoch, now, effects)
                self._adopt_members(answer.failsafe, now)
            elif self.role is Role.SECONDARY:
                self._release_unaccepted("too little of the lease is left", now, effects)

    def _renew(self, sent_at: float) -> None:
        super()._renew(sent_at)
        self._last_failure = None

    def _on_heartbeat_failed(
        self, event: HeartbeatFailed, now: float, effects: list[Effect]
    ) -> None:
        gone = event.failure is HeartbeatFailure.GONE
        self._contact.on_ended(event.number, contact=event.contact)
        if self._heartbeats.finish(event.number) is None or self.phase is not Phase.MEMBER:
            return
        if gone:
            if self.store_id is None and self._has_lease:
                # A plain v1 server that deletes a session reassigns its role (docs/api.md, "Sessions and
                # heartbeats").
                why = "the server does not know this session any more"
                self._demote(Cause.GONE, why, now, effects)
            self._rejoin(Trigger.UNKNOWN, effects)
        elif event.failure is HeartbeatFailure.BACK_OFF and event.retry_after_s is not None:
            # Retry-After may be 0, or a date that is over; more than R / 2 would cost the lease.
            pause_s = max(event.retry_after_s, minimum_interval_s(self.timing.lease_s))
            self._heartbeats.back_off(now + min(pause_s, self.timing.renew_s / 2))
        else:
            self._retry_heartbeat(event.failure, now)

    def _retry_heartbeat(self, failure: HeartbeatFailure, now: float) -> None:
        self._last_failure = failure
        self._heartbeats.send_by(now + RETRY_SHARE * self.timing.renew_s)

    def _on_status_read(self, status: GroupStatus, now: float, effects: list[Effect]) -> None:
        """A status never promotes or renews; it may demote, or trigger a heartbeat (R3)."""
        if status.store_id != self.store_id or not self._registered:
            return
        me = self.options.session_id
        if status.primary is not None and status.primary != me:
            self.previous_primary = status.primary
        if not self._knowledge.accept_if_fresh(status.epoch, status.revision):
            return
        if status.primary == me:
            self._record_assigned_tenure(status.epoch)  # the heartbeat's answer may be lost
        holds = self._executor.wanted is Role.PRIMARY
        prepares = self.role is Role.PENDING_PRIMARY and not holds
        news = self._knowledge.record_status(status, me, holds=holds, prepares=prepares)
        if self.phase is not Phase.MEMBER or self._demoting:
            return
        known = None not in (status.epoch, self.tenure, status.primary)
        if holds and known and status.primary != me:
            self._demote(Cause.REVOKED, f"{status.primary} is primary", now, effects)
        elif news and (me in (status.primary, status.pending) or self.role is not Role.SECONDARY):
            # Our coordinator never refuses a heartbeat after a change; a v1 server may ask for a pause.
            self._heartbeats.send_now(
                now,
                interval_s=minimum_interval_s(self.timing.lease_s),
                obey_pause=status.revision is None,
            )

    # -- demotion, promotion, the end -----------------------------------------------------------

    def _on_stalled(self, late_s: float, now: float, effects: list[Effect]) -> None:
        self._heartbeats.forget()
        self._heartbeats.send_by(now)
        if self._has_lease:
            why = f"lease lost: process stalled for {late_s:.3f} s"
            self._demote(Cause.LEASE_LOST, why, now, effects)

    def _on_fitness_changed(self, event: FitnessChanged, now: float, effects: list[Effect]) -> None:
        was_unfit, self._unfit_reason = self._unfit_reason, None if event.fit else event.reason
        if event.fit:
            if was_unfit is not None:
                self._heartbeats.due_at = now
        elif self._has_lease:
            self._record_failure(now)
            self._demote(Cause.UNFIT, f"unfit: {event.reason}", now, effects)
