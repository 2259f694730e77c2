"""The agent's side of one session: ``step(event, now) -> effects``, and ``wake_at`` (R1-R8).

Rules of this file:

- ``now`` is CLOCK_BOOTTIME in seconds, read by the caller *after* it took the event from its queue.
  Deadlines are judged at the door, before the event: whoever was frozen demotes first (R2).
- Only the answer to a heartbeat that is still known, not older than the newest seen, may promote or
  extend; any answer may demote; every error means "not renewed" (R3).
- Everything is counted from the moment at which a heartbeat was *sent*; the caller must pass it to
  the network right when it sees ``SendBeat``. Later is safe, earlier is impossible.
- A demotion forgets the heartbeats that are under way, so that nothing from before can promote.
- The caller calls ``step(Tick(), now)`` when ``wake_at`` has come, and has exactly one timer.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum

from agent.core.effects import (
    Cause,
    Effect,
    Escalate,
    Exit,
    HookFacts,
    Join,
    Leave,
    Publish,
    Release,
    SendBeat,
)
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
from agent.core.executor import NO_LIMITS, Executor
from agent.core.roles import check_transition
from agent.core.timing import Timing
from agent.errors import ExitCode
from agent.model import GroupStatus, HeartbeatAnswer, Role

MAX_IN_FLIGHT = 8
"""Heartbeats under way at once. Each is bound by the request timeout, which is under three beats."""

MAX_CONFIRMATIONS = 10
"""Heartbeats sent at once, one after the other, while the answer is PendingPrimary (api.md, B.4)."""

RETRY_SHARE = 0.1
"""After a failed heartbeat the next one comes after this share of R, if a beat is longer."""

PROMOTE_SHARE = 0.25
"""A promotion starts only if this share of R is left (R8)."""

GRACE_SHARE = 0.25
LONGEST_GRACE_S = 2.0
"""Between TERM and KILL: this share of D, and no longer than a well-behaved hook needs."""

JITTER_SHARE = 0.1
"""By how much of a beat heartbeats are spread, so that agents started together drift apart."""

GOLDEN = 0.6180339887498949
"""Multiples of the golden ratio, modulo 1, are spread evenly: jitter without chance."""

HELD_OFF_AT_STOP = 1.0
"""A stopping session asks not to be chosen again for this many L; it is gone long before."""


@dataclass(frozen=True, slots=True)
class Options:
    """What a session is told once.

    Attributes:
        session_id: its own id, to find itself in a status.
        hooks: the roles that have a hook.
        hook_limit_s: how long a promotion hook may take.
        hook_limits_s: the same for single roles, where that is another.
        cooldown_s: wait after a failed promotion; doubles with each in a row.
        cooldown_limit_s: and grows no further than this.
        jitter: from 0 to 1, drawn once by the caller, different for each process.
        store_id: the store that an earlier process of this session met, or None.
    """

    session_id: str
    hooks: frozenset[Role] = frozenset()
    hook_limit_s: float = 30.0
    hook_limits_s: Mapping[Role, float] = field(default_factory=lambda: NO_LIMITS)
    cooldown_s: float = 5.0
    cooldown_limit_s: float = 300.0
    jitter: float = 0.0
    store_id: str | None = None


@dataclass(frozen=True, slots=True)
class FormerTenure:
    """The tenure that an earlier process of this session held when it ended.

    Attributes:
        epoch: of the tenure.
        instance: the process that held it.
    """

    epoch: int
    instance: str


class Phase(StrEnum):
    """How far a session is."""

    STARTING = "starting"
    """The demotion hook runs: the run before may have died as primary (R6)."""
    JOINING = "joining"
    """It is not registered (any more); a lease that it has goes on."""
    MEMBER = "member"
    COOLING = "cooling"
    """It has left the group after a promotion failed: there was no epoch to release and hold off by."""
    STOPPING = "stopping"
    RELEASING = "releasing"
    LEAVING = "leaving"
    ENDED = "ended"


class Session:
    """One session's life. Public attributes may be read at any time, and written by nobody else."""

    def __init__(self, timing: Timing, options: Options) -> None:
        """Make a session that has not begun. Call ``begin`` next."""
        self.timing = timing
        self.options = options
        self.phase = Phase.STARTING
        self.role = Role.SECONDARY
        self.tenure: int | None = None
        """Epoch of the tenure that it holds, prepares, or is giving up."""
        self.newest_epoch: int | None = None
        self.store_id = options.store_id
        """The store that this session has met; answers of another one count for nothing (R3)."""
        self.last_data: datetime | None = None
        self.previous_primary: str | None = None
        self.renew_by = float("-inf")
        """R: the moment at which demotion starts if no answer extends it."""
        self.sent_at = float("-inf")
        """When the heartbeat was sent that the lease is counted from."""
        self._executor = Executor(
            options.hooks, limit_s=options.hook_limit_s, limits_s=options.hook_limits_s
        )
        self._reason = ""
        self._old_role = Role.SECONDARY
        self._demoting = False
        self._holds = False
        self._given_up = -1
        self._hold_off_s = 0.0
        self._not_before = float("-inf")
        self._cool_until = float("inf")
        self._failures = 0
        self._newest_revision = -1
        self._told_revision: int | None = None
        self._seen: tuple[object, ...] | None = None
        self._confirmations = 0
        self._beats = 0
        self._in_flight: dict[int, float] = {}
        self._beat_at = float("inf")
        self._joined_at = float("-inf")
        self._not_sooner = float("-inf")
        """Until then the server has asked to be left alone (Retry-After)."""
        self._releasing = False
        self._stop: Stop | None = None
        self._former: FormerTenure | None = None
        self._unfit: str | None = None
        self._primary_at = float("-inf")

    # -- what the caller calls ----------------------------------------------------------------

    def begin(self, now: float, former: FormerTenure | None = None) -> tuple[Effect, ...]:
        """Start: demote first, whatever the last run left behind (R6).

        Args:
            now: CLOCK_BOOTTIME seconds.
            former: the tenure that the last run held. It is released after the demotion.
        """
        self._former = former
        self._demoting = True
        self._reason = "starting"
        budget_s = max(self.timing.demote_s, self.options.hook_limit_s)
        self._want(Role.SECONDARY, budget_s, now)
        return self.step(Tick(), now)

    def reconfigure(self, options: Options) -> None:
        """Use other options from now on; a hook that runs keeps its limit."""
        self.options = options
        self._executor.reconfigure(
            options.hooks, limit_s=options.hook_limit_s, limits_s=options.hook_limits_s
        )

    def accepts_store(self, store_id: str | None) -> bool:
        """Whether answers of this store count: any store does until one has been met."""
        return self.store_id is None or store_id == self.store_id

    def step(self, event: Event, now: float) -> tuple[Effect, ...]:
        """What one event makes necessary, in order.

        Args:
            event: what happened.
            now: CLOCK_BOOTTIME seconds, read after the event was taken up.
        """
        if self.phase is Phase.ENDED:
            return ()
        effects: list[Effect] = []
        self._judge_deadlines(now, effects)
        self._take(event, now, effects)
        self._advance(now, effects)
        if self._may_beat and now >= self._beat_at:
            effects.append(self._beat(now))
        return tuple(effects)

    @property
    def wake_at(self) -> float:
        """When to call ``step(Tick(), now)`` at the latest: CLOCK_BOOTTIME seconds, or infinity."""
        if self.phase is Phase.ENDED:
            return float("inf")
        due = self._executor.wake_at
        if self.role is not Role.SECONDARY and not self._demoting:
            due = min(due, self.renew_by)
        if self._may_beat:
            due = min(due, self._beat_at)
        if self.phase is Phase.COOLING:
            due = min(due, self._cool_until)
        return due

    @property
    def lease_until(self) -> float:
        """When somebody else may become primary at the earliest: CLOCK_BOOTTIME seconds.

        Minus infinity without a lease.
        """
        return self.sent_at + self.timing.lease_s

    @property
    def guard_by(self) -> tuple[float, float] | None:
        """When the guard has to act in the agent's place (R12), or None while nothing is promoted.

        Two moments on CLOCK_BOOTTIME: when it runs the demotion hook (infinity while the agent
        demotes itself) and when it kills. Each lies behind the agent's own by half of what the margin
        has beyond the drift, and so the killing lies before L by the drift and the other half.
        """
        behind_s = (self.timing.margin_s - self.timing.drift_s) / 2
        if self._demoting:
            started = self.phase is not Phase.STARTING
            last_at = max(self._executor.by, self.lease_until - self.timing.drift_s)
            kill_at = min(self._executor.by + behind_s, last_at)
            return (float("inf"), kill_at) if started else None
        if self.role is Role.SECONDARY:
            return None
        hook_at = self.renew_by + behind_s
        return hook_at, hook_at + self.timing.demote_s

    @property
    def _may_beat(self) -> bool:
        return self.phase is Phase.MEMBER and not self._demoting and self._unfit is None

    # -- the door -----------------------------------------------------------------------------

    def _judge_deadlines(self, now: float, effects: list[Effect]) -> None:
        if self.role is not Role.SECONDARY and not self._demoting and now >= self.renew_by:
            late_s = now - self.sent_at
            self._demote(Cause.LEASE_LOST, f"no renewal for {late_s:.3f} s", now, effects)

    def _take(self, event: Event, now: float, effects: list[Effect]) -> None:  # noqa: C901 - an arm an event
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
                self._releasing = False
                if self.phase is Phase.RELEASING:
                    self._leave(Phase.LEAVING, effects)
            case Left():
                self._left(now, effects)
            case Stop():
                self._stop = self._stop if self._stop and self._stop.code else event
            case Tick():
                pass

    # -- answers ------------------------------------------------------------------------------

    def _answered(
        self, beat: int, answer: HeartbeatAnswer, now: float, effects: list[Effect]
    ) -> None:
        if not self.accepts_store(answer.store_id):
            why = f"the answer is from store {answer.store_id}"
            self._beat_failed(BeatFailed(beat, Failure.OTHER_STORE, why), now, effects)
            return
        sent_at = self._in_flight.pop(beat, None)
        fresh = self._is_fresh(answer.epoch, answer.revision)
        if fresh:
            self._told_revision = answer.revision
        if not fresh or self.phase is not Phase.MEMBER or self._demoting:
            return
        if answer.role is Role.SECONDARY:
            self._confirmations = 0
            if self.role is not Role.SECONDARY:
                self._demote(Cause.TOLD, "told Secondary by the coordinator", now, effects)
            return
        if sent_at is None or sent_at < self.sent_at:
            return  # forgotten, or overtaken by the answer to a later one (R3)
        if answer.lease_s is not None and abs(answer.lease_s - self.timing.lease_s) > 1e-3:  # noqa: PLR2004 - a millisecond: the resolution of a timer
            self._rejoin(effects)
            return
        if answer.previous is not None:
            self.previous_primary = answer.previous
        if answer.role is Role.PENDING_PRIMARY:
            self._told_pending(sent_at, answer, now, effects)
        else:
            self._told_primary(sent_at, answer, now, effects)

    def _is_fresh(self, epoch: int | None, revision: int | None) -> bool:
        """R3; and remembers the newest. A server without epochs and revisions is always fresh."""
        newest = (self.newest_epoch if self.newest_epoch is not None else -1, self._newest_revision)
        seen = (epoch if epoch is not None else newest[0], revision if revision is not None else -1)
        if revision is None:
            seen = (seen[0], newest[1])
        if seen < newest:
            return False
        if epoch is not None:
            self.newest_epoch = epoch
        self._newest_revision = seen[1]
        return True

    def _told_pending(
        self, sent_at: float, answer: HeartbeatAnswer, now: float, effects: list[Effect]
    ) -> None:
        if self.role is Role.PRIMARY or self._executor.wanted is Role.PRIMARY:
            self._demote(Cause.TOLD, "the tenure has ended, told PendingPrimary", now, effects)
            return
        if self._unfit or now < self._not_before:
            return
        self._extend(sent_at)
        self.last_data = answer.last_data
        if self._confirmations < MAX_CONFIRMATIONS:
            self._confirmations += 1
            self._beat_at = now
        if self.role is Role.SECONDARY and now < self.renew_by:
            self.tenure = None
            self._reason = "chosen to take over"
            self._publish(Role.PENDING_PRIMARY, Cause.CHOSEN, effects)
            self._want(Role.PENDING_PRIMARY, self.options.hook_limit_s, now)

    def _told_primary(
        self, sent_at: float, answer: HeartbeatAnswer, now: float, effects: list[Effect]
    ) -> None:
        self._confirmations = 0
        epoch = answer.epoch
        unwanted = self._unfit is not None or now < self._not_before
        if epoch is not None and (epoch <= self._given_up or unwanted):
            # Given up, or given by a coordinator that does not know that it must not be: beating on
            # as its holder would keep everybody else from it (R8).
            self._given_up = max(self._given_up, epoch)
            self._release(epoch, now, effects)
            return
        if self._executor.wanted is Role.PRIMARY:
            if epoch != self.tenure:
                self._demote(Cause.TOLD, "the tenure has ended, another was given", now, effects)
            else:
                self._extend(sent_at)
            return
        left_s = sent_at + self.timing.renew_s - now
        if unwanted or left_s < PROMOTE_SHARE * self.timing.renew_s:
            return
        self._extend(sent_at)
        self.tenure = epoch
        self._holds = True
        self.last_data = answer.last_data
        self._reason = "confirmed by the coordinator"
        if self.role is Role.SECONDARY:
            self._publish(Role.PENDING_PRIMARY, Cause.CONFIRMED, effects)
        self._want(Role.PRIMARY, self.options.hook_limit_s, now)

    def _extend(self, sent_at: float) -> None:
        self.sent_at = max(self.sent_at, sent_at)
        self.renew_by = self.sent_at + self.timing.renew_s

    def _beat_failed(self, event: BeatFailed, now: float, effects: list[Effect]) -> None:
        if self._in_flight.pop(event.beat, None) is None or self.phase is not Phase.MEMBER:
            return
        if event.failure is Failure.GONE:
            if self.role is not Role.SECONDARY and self.newest_epoch is None:
                # A plain v1 server hands the role on when it deletes a session (api.md, B.7).
                why = "the server does not know this session any more"
                self._demote(Cause.TOLD, why, now, effects)
            self._rejoin(effects)
            return
        if event.failure is Failure.BACK_OFF and event.retry_after_s is not None:
            # Kept short of R / 2: a server that asks for more would take the role away by it.
            self._beat_at = now + min(event.retry_after_s, self.timing.renew_s / 2)
            self._not_sooner = self._beat_at
            return
        self._beat_at = min(self._beat_at, now + RETRY_SHARE * self.timing.renew_s)

    def _rejoin(self, effects: list[Effect]) -> None:
        self.phase = Phase.JOINING
        self._in_flight.clear()
        effects.append(Join())

    def _joined(self, event: Joined, now: float) -> None:
        if self.phase is Phase.JOINING and self.accepts_store(event.store_id):
            timing = event.timing
            self.phase = Phase.MEMBER
            self.store_id = event.store_id
            self.timing = timing
            self._newest_revision = -1
            # At once, unless a server that knows nobody keeps taking registrations.
            self._beat_at = max(now, self._joined_at + RETRY_SHARE * timing.renew_s)
            self._joined_at = now

    def _status_seen(self, status: GroupStatus, now: float, effects: list[Effect]) -> None:
        """A status never promotes or extends; it demotes, and it says when to ask (R3)."""
        if not self.accepts_store(status.store_id):
            return
        me = self.options.session_id
        if status.primary is not None and status.primary != me:
            self.previous_primary = status.primary
        if not self._is_fresh(status.epoch, status.revision):
            return
        seen = (status.primary, status.pending, status.epoch, status.revision)
        known = seen == self._seen or (
            status.revision is not None and status.revision == self._told_revision
        )
        self._seen = seen
        if status.revision is None:  # plain v1: no news if it says what heartbeats have told
            holds = self._executor.wanted is Role.PRIMARY
            prepares = self.role is Role.PENDING_PRIMARY and not holds
            known = known or (status.primary == me, status.pending == me) == (holds, prepares)
        if self.phase is not Phase.MEMBER or self._demoting:
            return
        if (
            self._executor.wanted is Role.PRIMARY
            and None not in (status.epoch, self.tenure, status.primary)
            and status.primary != me
        ):
            self._demote(Cause.TOLD, f"{status.primary} is primary", now, effects)
        elif not known and (
            me in (status.primary, status.pending) or self.role is not Role.SECONDARY
        ):
            self._confirmations = 0
            # News is never too soon for our coordinator; a plain v1 server may have said Retry-After.
            self._beat_at = now if status.revision is not None else max(now, self._not_sooner)

    # -- demotion, promotion, the end -----------------------------------------------------------

    def _stalled(self, late_s: float, now: float, effects: list[Effect]) -> None:
        self._in_flight.clear()
        self._beat_at = min(self._beat_at, now)
        if self.role is not Role.SECONDARY and not self._demoting:
            why = f"this process was stopped for {late_s:.3f} s"
            self._demote(Cause.LEASE_LOST, why, now, effects)

    def _demote(self, cause: Cause, reason: str, now: float, effects: list[Effect]) -> None:
        """Say Secondary, then run the hook; R4 says until when.

        It has D from now. That is R + D if it starts in time; a process that was frozen has at most
        until L less the drift, since another may be promoted at L, and kills what is not done then.
        Behind that there is nothing left to keep but order, and the hook has D again.
        """
        self._demoting = True
        self._reason = reason
        self._in_flight.clear()
        last_at = self.lease_until - self.timing.drift_s
        end_at = max(now, self.renew_by) + self.timing.demote_s
        if now < last_at:
            end_at = min(end_at, last_at)
        self._publish(Role.SECONDARY, cause, effects)
        self._want(Role.SECONDARY, end_at - now, now)

    def _advance(self, now: float, effects: list[Effect]) -> None:
        """Move on with whatever the event, the hooks and the time allow."""
        effects += self._executor.step(now)
        if self._executor.promotion_failed is not None and not self._demoting:
            self._promotion_failed(self._executor.promotion_failed, now, effects)
            effects += self._executor.step(now)
        if (
            self.role is Role.PENDING_PRIMARY
            and not self._demoting
            and self._executor.completed is Role.PRIMARY
        ):
            self._primary_at = now
            self._publish(Role.PRIMARY, Cause.CONFIRMED, effects)
        if self._demoting and self._executor.settled:
            self._demoted(now, effects)
        elif self._demoting and self._executor.overdue(now):
            effects.append(Escalate(self._reason))
            self._exit(ExitCode.DEMOTION_FAILED, effects)
        if self.phase is Phase.COOLING and now >= self._cool_until:
            self._rejoin(effects)
        self._stop_if_asked(now, effects)

    def _fitness(self, event: Fitness, now: float, effects: list[Effect]) -> None:
        was_unfit, self._unfit = self._unfit, None if event.fit else event.reason
        if event.fit:
            if was_unfit is not None:
                self._beat_at = now
        elif self.role is not Role.SECONDARY and not self._demoting:
            self._cool_down(now)
            self._demote(Cause.UNFIT, f"unfit: {event.reason}", now, effects)

    def _promotion_failed(self, why: str, now: float, effects: list[Effect]) -> None:
        self._cool_down(now)
        self._demote(Cause.PROMOTION_FAILED, f"promotion failed: {why}", now, effects)

    def _cool_down(self, now: float) -> None:
        """Ask not to be chosen for a while; for longer with each failure that is soon repeated."""
        if self.role is Role.PRIMARY and now - self._primary_at >= self.options.cooldown_limit_s:
            self._failures = 0
        self._failures += 1
        doubled_s = self.options.cooldown_s * 2.0 ** min(self._failures - 1, 32)
        self._hold_off_s = min(doubled_s, self.options.cooldown_limit_s)

    def _demoted(self, now: float, effects: list[Effect]) -> None:
        self._demoting = False
        self.sent_at = self.renew_by = float("-inf")
        self._beat_at = now
        if self._stop:
            self._hold_off_s = max(self._hold_off_s, HELD_OFF_AT_STOP * self.timing.lease_s)
        if self._hold_off_s > 0:
            self._not_before = now + self._hold_off_s
        held, self._holds = self._holds, False
        if self.phase is Phase.STARTING and self._former is not None:
            former, self._former = self._former, None
            reason = "demoted by the next process of the session"
            self._releasing = True
            effects.append(Release(former.epoch, reason, 0.0, former.instance))
        if self.phase is Phase.STARTING and not self._stop:
            self._rejoin(effects)
        elif held and self.tenure is not None:
            self._given_up = max(self._given_up, self.tenure)
            self._release(self.tenure, now, effects)
        elif self._hold_off_s > 0 and not self._stop:
            # Not before it is known to have left: an overtaking DELETE would end the next tenure.
            self._cool_until = float("inf")
            self._leave(Phase.COOLING, effects)
        self._hold_off_s = 0.0

    def _release(self, epoch: int, now: float, effects: list[Effect]) -> None:
        if not self._releasing:
            self._releasing = True
            hold_off_s = max(0.0, self._not_before - now)
            effects.append(Release(epoch, self._reason, hold_off_s))

    def _leave(self, phase: Phase, effects: list[Effect]) -> None:
        self.phase = phase
        self._in_flight.clear()
        effects.append(Leave())

    def _left(self, now: float, effects: list[Effect]) -> None:
        if self.phase is Phase.LEAVING:
            self._exit(self._stop.code if self._stop else ExitCode.OK, effects)
        elif self.phase is Phase.COOLING:
            self._cool_until = max(now, self._not_before)

    def _stop_if_asked(self, now: float, effects: list[Effect]) -> None:
        """R5: demote, release, leave, exit; each step waits for the one before."""
        if not self._stop or self.phase in {Phase.RELEASING, Phase.LEAVING, Phase.ENDED}:
            return
        if self.role is not Role.SECONDARY and not self._demoting:
            self._demote(Cause.STOPPING, self._stop.reason, now, effects)
            effects += self._executor.step(now)
            if self._executor.settled:
                self._demoted(now, effects)
        if self._demoting:
            self.phase = Phase.STARTING if self.phase is Phase.STARTING else Phase.STOPPING
        elif self._releasing:
            self.phase = Phase.RELEASING
        else:
            self._leave(Phase.LEAVING, effects)

    def _exit(self, code: ExitCode, effects: list[Effect]) -> None:
        self.phase = Phase.ENDED
        effects.append(Exit(code))

    # -- small steps --------------------------------------------------------------------------

    def _want(self, role: Role, limit_s: float, now: float) -> None:
        facts = HookFacts(
            role=role,
            old_role=self._old_role,
            epoch=self.tenure,
            reason=self._reason,
            last_data=self.last_data,
            previous_primary=self.previous_primary,
            limit_s=limit_s,
        )
        whole_s = min(self.timing.demote_s, max(0.0, limit_s))
        grace_s = min(GRACE_SHARE * whole_s, LONGEST_GRACE_S)
        self._executor.want(facts, now, grace_s=grace_s)

    def _publish(self, role: Role, cause: Cause, effects: list[Effect]) -> None:
        check_transition(self.role, role)
        before, self.role = self.role, role
        self._old_role = before
        effects.append(Publish(before, role, self.tenure, cause, self._reason))

    def _beat(self, now: float) -> SendBeat:
        self._beats += 1
        if len(self._in_flight) >= MAX_IN_FLIGHT:
            del self._in_flight[next(iter(self._in_flight))]
        self._in_flight[self._beats] = now
        phase = (self.options.jitter + self._beats * GOLDEN) % 1.0
        self._beat_at = now + self.timing.beat_s * (1.0 - JITTER_SHARE * phase)
        return SendBeat(self._beats)
