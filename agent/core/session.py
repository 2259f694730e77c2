"""The agent's side of one session: ``step(event, now) -> effects``, and ``wake_at`` (R1-R8).

Rules of this file:

- ``now`` is CLOCK_BOOTTIME in seconds, read by the caller *after* it took the event from its queue.
  Deadlines are judged at the door, before the event: a process that was frozen demotes first (R2).
- Phases change along the table of core/phases.py only. A step that raises has changed nothing.
- Only the answer to a heartbeat that is not forgotten, from the store that the session has met and not
  older than the newest seen, may promote or extend; any answer may demote; an error never extends (R3).
- Everything is counted from the moment at which a heartbeat was *sent*; the caller must pass it to
  the network right when it sees ``SendBeat``. Later is safe, earlier is impossible.
- A demotion forgets the heartbeats under way: nothing from before it can promote. If one of them is
  answered with a tenure that this session cannot use, it is released (R5).
- The caller calls ``step(Tick(), now)`` when ``wake_at`` has come, and has exactly one timer.
"""

from agent.core.cooldown import Cooldown
from agent.core.effects import Cause, Effect
from agent.core.events import (
    Answered,
    BeatFailed,
    Event,
    Failure,
    Fitness,
    HookEnded,
    Joined,
    Left,
    Released,
    Stalled,
    StatusSeen,
    Stop,
    Tick,
)
from agent.core.executor import Executor
from agent.core.heartbeats import Heartbeats
from agent.core.knowledge import Knowledge
from agent.core.lifecycle import RETRY_SHARE, LifeCycle
from agent.core.options import FormerTenure, Options
from agent.core.phases import IGNORED, Phase, Turn
from agent.core.timing import Timing
from agent.errors import ExitCode
from agent.model import GroupStatus, HeartbeatAnswer, Role

__all__ = ["FormerTenure", "Options", "Phase", "Session"]

PROMOTE_SHARE = 0.25
"""A promotion starts only if this share of R is left (R8)."""


class Session(LifeCycle):
    """One session's life. Public attributes may be read at any time, and written by nobody else."""

    def __init__(self, timing: Timing, options: Options) -> None:
        """Make a session that has not begun. Call ``begin`` next."""
        super().__init__(timing, options)
        self._failure: Failure | None = None
        """Why the last heartbeat did not renew the lease."""

    @property
    def _parts(self) -> "tuple[Session | Executor | Heartbeats | Knowledge | Cooldown, ...]":
        """Every object that a step changes."""
        return (self, self._executor, self._heartbeats, self._knowledge, self._cooldown)

    # -- what the caller calls ----------------------------------------------------------------

    def begin(self, now: float, former: FormerTenure | None = None) -> tuple[Effect, ...]:
        """Start: demote first, whatever the previous process left behind (R6).

        Args:
            now: CLOCK_BOOTTIME seconds.
            former: the tenure that the previous process held. It is released after the demotion.
        """
        self._former = former
        self._begin_demotion(now)
        return self.step(Tick(), now)

    def step(self, event: Event, now: float) -> tuple[Effect, ...]:
        """What one event makes necessary, in order. If it raises, nothing has changed.

        Args:
            event: what happened.
            now: CLOCK_BOOTTIME seconds, read after the event was taken up.
        """
        if (self.phase, type(event)) in IGNORED:
            if self.phase is Phase.ENDED:
                return ()
            event = Tick()
        before = [(vars(part), vars(part).copy()) for part in self._parts]
        effects: list[Effect] = []
        try:
            self._judge_deadlines(now, effects)
            self._handle(event, now, effects)
            self._advance(now, effects)
        except BaseException:
            for attributes, values in before:  # their collections are replaced, never changed
                attributes.clear()
                attributes.update(values)
            raise
        return tuple(effects)

    @property
    def wake_at(self) -> float:
        """When to call ``step(Tick(), now)`` at the latest: CLOCK_BOOTTIME seconds, or infinity."""
        due = [self._executor.wake_at] if self.phase is not Phase.ENDED else []
        if self._is_held:
            due.append(self.renew_by)
        if self._may_beat:
            due.append(self._heartbeats.due_at)
        match self.phase:
            case Phase.JOINING:
                due.append(self._join_at)
            case Phase.COOLING:
                due.append(self._cool_until)
            case Phase.RETURNING | Phase.LEAVING:
                due.append(self._wait_by)
            case Phase.RELEASING:
                due.append(self._settled_by)
            case _:
                pass
        return min(due, default=float("inf"))

    @property
    def newest_epoch(self) -> int | None:
        """The newest epoch of the group, as far as this session has seen; heartbeats carry it."""
        return self._knowledge.epoch

    # -- the door -----------------------------------------------------------------------------

    def _judge_deadlines(self, now: float, effects: list[Effect]) -> None:
        if self._is_held and now >= self.renew_by:
            why = f"no renewal for {now - self.sent_at:.3f} s"
            if self._failure is Failure.OTHER_STORE:
                why = f"{why}: the answers were from another store"
                self._demote(Cause.OTHER_STORE, why, now, effects)
            else:
                self._demote(Cause.LEASE_LOST, why, now, effects)

    def _handle(self, event: Event, now: float, effects: list[Effect]) -> None:  # noqa: C901 - an arm an event
        match event:
            case Answered():
                self._answered(event.beat, event.answer, now, effects)
            case BeatFailed():
                self._beat_failed(event, now, effects)
            case StatusSeen():
                self._status_seen(event.status, now, effects)
            case HookEnded():
                self._executor.ended(event.run, ok=event.ok, why=event.why, now=now)
            case Joined():
                self._joined(event, now)
            case Stalled():
                self._stalled(event.late_s, now, effects)
            case Fitness():
                self._fitness(event, now, effects)
            case Released():
                self._releases = max(0, self._releases - 1)
            case Left():
                self._left = True
                self._cool_until = max(now, self._cooldown.until)
            case Stop():
                if self._stop is None or self._stop.code is ExitCode.OK:
                    self._stop = event
            case Tick():  # pragma: no branch - mypy proves that no event is left
                pass

    # -- answers ------------------------------------------------------------------------------

    def _answered(
        self, beat: int, answer: HeartbeatAnswer, now: float, effects: list[Effect]
    ) -> None:
        sent_at = self._heartbeats.end(beat)
        if answer.store_id != self.store_id:
            self._on_foreign_answer(sent_at, now, effects)
            return
        if not self._knowledge.is_fresh(answer.epoch, answer.revision):
            self._on_stale(answer, now, effects)
            return
        self._knowledge.answered(answer.revision)
        if answer.role is Role.PRIMARY:
            self._note_tenure(answer.epoch)
        if self.phase is not Phase.MEMBER or self._demoting:
            return
        if answer.role is Role.SECONDARY:
            self._heartbeats.confirmations = 0
            if self._is_held:
                self._demote(Cause.TOLD, "told Secondary by the coordinator", now, effects)
        elif sent_at is not None and sent_at >= self.sent_at:
            # Neither forgotten, nor overtaken by the answer to a later one (R3).
            self._on_role(sent_at, answer, now, effects)

    def _on_stale(self, answer: HeartbeatAnswer, now: float, effects: list[Effect]) -> None:
        """Release a tenure of restored data: as its holder this session would keep the role (R8).

        A late answer looks the same, and to release a tenure that is over changes nothing.
        """
        idle = self.phase is Phase.MEMBER and self.role is Role.SECONDARY and not self._demoting
        if idle and answer.role is Role.PRIMARY and answer.epoch is not None:
            self._release(answer.epoch, "an earlier tenure, by data that are older", now, effects)

    def _on_role(
        self, sent_at: float, answer: HeartbeatAnswer, now: float, effects: list[Effect]
    ) -> None:
        if answer.lease_s is not None and abs(answer.lease_s - self.timing.lease_s) > 1e-3:  # noqa: PLR2004 - a millisecond: the resolution of a timer
            self._rejoin(Turn.RETIMED, effects)
            return
        if answer.previous is not None:
            self.previous_primary = answer.previous
        if answer.role is Role.PENDING_PRIMARY:
            self._on_pending(sent_at, answer, now, effects)
        else:
            self._on_primary(sent_at, answer, now, effects)

    def _on_foreign_answer(self, sent_at: float | None, now: float, effects: list[Effect]) -> None:
        """It counts as an error. A plain v1 server that now has a store id is another server."""
        if sent_at is None or self.phase is not Phase.MEMBER:
            return
        if self.store_id is not None:
            self._not_renewed(Failure.OTHER_STORE, now)
            return
        if self._is_held:
            self._demote(Cause.OTHER_STORE, "the server is another one now", now, effects)
        self._rejoin(Turn.REPLACED, effects)

    def _on_pending(
        self, sent_at: float, answer: HeartbeatAnswer, now: float, effects: list[Effect]
    ) -> None:
        if self._executor.wanted is Role.PRIMARY:
            self._demote(Cause.TOLD, "the tenure has ended, told PendingPrimary", now, effects)
            return
        if self._refusal(now) is not None:
            return
        self._extend(sent_at)
        self.last_data = answer.last_data
        self._heartbeats.confirm(now)
        if self.role is Role.SECONDARY and now < self.renew_by:
            self._prepare(now, effects)

    def _on_primary(
        self, sent_at: float, answer: HeartbeatAnswer, now: float, effects: list[Effect]
    ) -> None:
        self._heartbeats.confirmations = 0
        epoch = answer.epoch
        if epoch is not None and epoch <= self._given_up:
            # The coordinator has not heard of it (R8).
            self._release(epoch, self._reason, now, effects)
        elif self._executor.wanted is Role.PRIMARY:
            if epoch == self.tenure:
                self._extend(sent_at)
            else:
                self._demote(Cause.TOLD, "the tenure has ended, another was given", now, effects)
        elif self._refusal(now) is None:
            left_s = sent_at + self.timing.renew_s - now
            if left_s >= PROMOTE_SHARE * self.timing.renew_s:
                self._unused = None
                self.last_data = answer.last_data
                self._extend(sent_at)
                self._promote(epoch, now, effects)
            elif self.role is Role.SECONDARY:
                self._release_unused("too little of the lease is left", now, effects)

    def _extend(self, sent_at: float) -> None:
        super()._extend(sent_at)
        self._failure = None

    def _beat_failed(self, event: BeatFailed, now: float, effects: list[Effect]) -> None:
        if self._heartbeats.end(event.beat) is None or self.phase is not Phase.MEMBER:
            return
        if event.failure is Failure.GONE:
            if self.store_id is None and self._is_held:
                # A plain v1 server hands the role on when it deletes a session (docs/api.md, "Sessions and heartbeats").
                why = "the server does not know this session any more"
                self._demote(Cause.GONE, why, now, effects)
            self._rejoin(Turn.UNKNOWN, effects)
        elif event.failure is Failure.BACK_OFF and event.retry_after_s is not None:
            # Kept short of R / 2: a server that asks for more would take the role away by it.
            self._heartbeats.back_off(now + min(event.retry_after_s, self.timing.renew_s / 2))
        else:
            self._not_renewed(event.failure, now)

    def _not_renewed(self, failure: Failure, now: float) -> None:
        self._failure = failure
        self._heartbeats.hurry(now + RETRY_SHARE * self.timing.renew_s)

    def _status_seen(self, status: GroupStatus, now: float, effects: list[Effect]) -> None:
        """A status never promotes or extends; it demotes, and it says when to ask (R3)."""
        if status.store_id != self.store_id or not self._registered:
            return
        me = self.options.session_id
        if status.primary is not None and status.primary != me:
            self.previous_primary = status.primary
        if not self._knowledge.is_fresh(status.epoch, status.revision):
            return
        if status.primary == me:
            self._note_tenure(status.epoch)  # the answer that gave it may be lost
        holds = self._executor.wanted is Role.PRIMARY
        prepares = self.role is Role.PENDING_PRIMARY and not holds
        news = self._knowledge.is_news(status, me, holds=holds, prepares=prepares)
        if self.phase is not Phase.MEMBER or self._demoting:
            return
        known = None not in (status.epoch, self.tenure, status.primary)
        if holds and known and status.primary != me:
            self._demote(Cause.TOLD, f"{status.primary} is primary", now, effects)
        elif news and (me in (status.primary, status.pending) or self.role is not Role.SECONDARY):
            # News is never too soon for our coordinator; a v1 server may have asked for a pause.
            self._heartbeats.ask(now, obey_pause=status.revision is None)

    # -- demotion, promotion, the end -----------------------------------------------------------

    def _stalled(self, late_s: float, now: float, effects: list[Effect]) -> None:
        self._heartbeats.forget()
        self._heartbeats.hurry(now)
        if self._is_held:
            why = f"this process was stopped for {late_s:.3f} s"
            self._demote(Cause.LEASE_LOST, why, now, effects)

    def _fitness(self, event: Fitness, now: float, effects: list[Effect]) -> None:
        was_unfit, self._unfit = self._unfit, None if event.fit else event.reason
        if event.fit:
            if was_unfit is not None:
                self._heartbeats.due_at = now
        elif self._is_held:
            self._cool_down(now)
            self._demote(Cause.UNFIT, f"unfit: {event.reason}", now, effects)
