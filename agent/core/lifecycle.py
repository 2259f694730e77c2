"""The phases of a session, from its first demotion to its exit (R5, R6, R8).

Owns the transitions of the table in core/phases.py: registering, cooling down, stopping, and releasing
every tenure that this session does not accept. core/session.py handles the answers to heartbeats.
"""

from agent.core.cooldown import Cooldown
from agent.core.effects import Cause, Effect, Escalate, Exit, Join, Leave, Release, SendHeartbeat
from agent.core.events import Joined, Stop
from agent.core.knowledge import GroupKnowledge
from agent.core.lease import LeaseHolder
from agent.core.options import Options, PreviousTenure
from agent.core.phases import FIRST_SENTENCE, Phase, Trigger, next_phase
from agent.core.timing import Timing
from agent.errors import ExitCode
from agent.model import Role

RETRY_SHARE = 0.1
"""A failed request is retried after this share of R, if the heartbeat interval is longer."""

STOP_HOLD_OFF_LEASES = 1.0
"""The hold-off of a stopping session, in L. The session has exited long before its end."""

STOP_WAIT_REQUESTS = 2.0
"""How long a stop waits for answers, in request timeouts; each call takes one at most."""

CAUSE_BY_EXIT_CODE = {
    ExitCode.TASK_FAILED: Cause.TASK_FAILED,
    ExitCode.OTHER_STORE: Cause.OTHER_STORE,
}
"""Why a Stop ends a tenure, by its exit code; STOPPING for any other code."""

NO_EPOCH = -1
RELEASED_BY_NEXT_PROCESS = "demoted by the next process of this session"
_ON_THE_WAY_OUT = frozenset({Phase.STOPPING, Phase.RELEASING, Phase.LEAVING})


class LifeCycle(LeaseHolder):
    """The phases of a session. Other objects may read its public attributes, but not set them.

    Attributes:
        phase: the current phase.
        store_id: the store that the session has joined; None before it joins, and at a plain v1 server.
    """

    def __init__(self, timing: Timing, options: Options) -> None:
        """Build a session that has not started."""
        super().__init__(timing, options)
        self.phase = Phase.STARTING
        self.store_id = options.store_id
        self._sentence = FIRST_SENTENCE
        self._knowledge = GroupKnowledge()
        self._cooldown = Cooldown()
        self._previous_tenure: PreviousTenure | None = None
        self._registered = False
        self._registered_at = float("-inf")
        self._join_at = float("inf")
        self._accept_roles_at = float("-inf")
        self._rejoin_at = float("inf")
        self._unfit_reason: str | None = None
        self._stop: Stop | None = None
        self._unaccepted_epoch: int | None = None
        """Epoch of a tenure that was assigned to this session and that it has not accepted."""
        self._released_epoch = NO_EPOCH
        self._open_releases = 0
        self._wait_by = float("inf")
        self._session_is_deleted = False

    def accepts_store(self, store_id: str | None) -> bool:
        """Whether answers of this store count. Until the first join, those of any store do (R3)."""
        return self.store_id is None or store_id == self.store_id

    @property
    def sentence(self) -> str:
        """The sentence for operators: the one in the table, or the reason of a demotion."""
        if self._demoting and self.phase is not Phase.STARTING and self.phase is not Phase.ENDED:
            return f"demoting: {self._reason}"
        return self._sentence

    @property
    def _heartbeats_end_by(self) -> float:
        """When the heartbeats in flight end. A plain v1 server needs no release, so no wait."""
        if self.store_id is None:
            return float("-inf")
        return self._heartbeats.all_finished_by(self.timing.request_timeout_s)

    @property
    def _may_send_heartbeat(self) -> bool:
        return self.phase is Phase.MEMBER and not self._demoting and self._unfit_reason is None

    def _refusal_reason(self, now: float) -> str | None:
        """Why this session refuses a role that is assigned to it now, or None (R8, R9)."""
        if self._stop is not None:
            return self._stop.reason
        if self._unfit_reason is not None:
            return f"unfit: {self._unfit_reason}"
        if self.phase not in {Phase.JOINING, Phase.MEMBER} or now < self._cooldown.until:
            return self._reason
        return "registered again" if now < self._accept_roles_at else None

    def _rejoin(self, trigger: Trigger, effects: list[Effect]) -> None:
        self._change_phase(trigger)
        self._heartbeats.forget()
        self._join(effects)

    def _join(self, effects: list[Effect]) -> None:
        self._join_at = float("inf")
        effects.append(Join())

    def _on_joined(self, event: Joined, now: float) -> None:
        retry_at = self._registered_at + RETRY_SHARE * event.timing.renew_s
        if not self.accepts_store(event.store_id):
            self._join_at = now + RETRY_SHARE * self.timing.renew_s
            return
        if self._registered and self.store_id is None:
            # The server may have lost its data, including another member's lease.
            self._accept_roles_at = now + max(self.timing.lease_s, event.timing.lease_s)
            self._change_phase(Trigger.REGISTERED_AGAIN)
            if event.store_id is not None:
                self._knowledge.forget_epoch()
                self._owes_release = False
                self._unaccepted_epoch, self._released_epoch = None, NO_EPOCH
        else:
            self._change_phase(Trigger.REGISTERED)
        self.timing = event.timing
        self.store_id = event.store_id
        self._registered = True
        self._knowledge.on_registered()
        # At once, unless a server registers and forgets this session again and again.
        self._heartbeats.due_at = max(now, retry_at)
        self._registered_at = now

    def _record_failure(self, now: float) -> None:
        """Record a failed tenure: the hold-off grows with each one that follows soon."""
        lasted_s = now - self._primary_since if self.role is Role.PRIMARY else 0.0
        self._cooldown.record_failure(
            self.options.cooldown_s, self.options.cooldown_limit_s, lasted_s
        )

    def _advance(self, now: float, effects: list[Effect]) -> None:
        """Take every step that is possible after the event: stop, hooks, phase, heartbeat."""
        self._begin_stop(now, effects)
        self._run_hooks(now, effects)
        if self._executor.promotion_failed is not None:
            why = f"promotion failed: {self._executor.promotion_failed}"
            self._record_failure(now)
            self._demote(Cause.PROMOTION_FAILED, why, now, effects)
            self._run_hooks(now, effects)
        if self._demoting and self._executor.is_settled:
            self._on_demoted(now, effects)
        elif self._demoting and self._executor.is_overdue(now):
            effects.append(Escalate(self._reason))
            self._change_phase(Trigger.DEMOTION_FAILED)
            effects.append(Exit(ExitCode.DEMOTION_FAILED))
            return
        self._advance_phase(now, effects)
        if self._may_send_heartbeat and now >= self._heartbeats.due_at:
            effects.append(self._next_heartbeat(now))

    def _next_heartbeat(self, now: float) -> SendHeartbeat:
        return self._heartbeats.send(now, self.timing.heartbeat_interval_s)

    def _begin_stop(self, now: float, effects: list[Effect]) -> None:
        """Begin a stop (R5): demote, release, leave, exit; each step waits for the one before."""
        if self._stop is None or self._starting or self.phase in _ON_THE_WAY_OUT:
            return
        self._change_phase(Trigger.STOP)
        if self._has_lease:
            cause = CAUSE_BY_EXIT_CODE.get(self._stop.code, Cause.STOPPING)
            self._demote(cause, self._stop.reason, now, effects)

    def _on_demoted(self, now: float, effects: list[Effect]) -> None:
        self._demoting = False
        self._end_lease()
        self._heartbeats.due_at = now
        cools_down = self._cooldown.start(now)
        held, self._owes_release = self._owes_release, False
        if self._starting:
            self._on_first_demotion_done(now, effects)
        elif held and self.tenure is not None and self.store_id is not None:
            self._release(self.tenure, self._reason, now, effects)
        elif cools_down and self.phase is Phase.MEMBER:
            # Rejoin only after the deletion is answered: a late DELETE would end the next tenure.
            self._rejoin_at = float("inf")
            self._leave(Trigger.COOL_DOWN, effects)

    def _on_first_demotion_done(self, now: float, effects: list[Effect]) -> None:
        """After the first demotion, release the tenure of the previous process."""
        self._starting = False
        previous, self._previous_tenure = self._previous_tenure, None
        if previous is not None:
            self._open_releases += 1
            effects.append(
                Release(previous.epoch, RELEASED_BY_NEXT_PROCESS, 0.0, previous.instance)
            )
        if self._stop is not None:
            self._change_phase(Trigger.STOP)
        elif previous is not None:
            self._change_phase(Trigger.PREVIOUS_TENURE)
            self._wait_by = now + self.timing.request_timeout_s
        else:
            self._change_phase(Trigger.DEMOTED)
            self._join(effects)

    def _advance_phase(self, now: float, effects: list[Effect]) -> None:
        """Leave each phase whose condition is met."""
        refusal = self._refusal_reason(now)
        if refusal is not None and self.role is Role.SECONDARY and not self._demoting:
            self._release_unaccepted(refusal, now, effects)
        if self.phase is Phase.RETURNING and (not self._open_releases or now >= self._wait_by):
            self._change_phase(Trigger.PREVIOUS_RELEASED)
            self._join(effects)
        if self.phase is Phase.JOINING and now >= self._join_at:
            self._join(effects)
        if self.phase is Phase.COOLING and now >= self._rejoin_at:
            self._rejoin(Trigger.COOLED_DOWN, effects)
        if self.phase is Phase.STOPPING and not self._demoting:
            self._change_phase(Trigger.DEMOTED)
            self._restart_wait(now)
        if self.phase is Phase.RELEASING and now >= self._settled_by:
            self._leave(Trigger.SETTLED, effects)
            self._restart_wait(now)
        if self.phase is Phase.LEAVING and (self._leave_is_done or now >= self._wait_by):
            assert self._stop is not None  # noqa: S101 - our own mistake: only a stop leads here
            self._change_phase(Trigger.LEFT)
            effects.append(Exit(self._stop.code))

    @property
    def _settled_by(self) -> float:
        """When no request in flight can assign the role to this session any more."""
        return self._wait_by if self._open_releases else min(self._wait_by, self._heartbeats_end_by)

    @property
    def _leave_is_done(self) -> bool:
        return self._session_is_deleted and not self._open_releases

    def _restart_wait(self, now: float) -> None:
        self._wait_by = now + STOP_WAIT_REQUESTS * self.timing.request_timeout_s

    def _record_assigned_tenure(self, epoch: int | None) -> None:
        """Remember an assigned tenure until it is accepted or released."""
        accepted = self._owes_release and epoch == self.tenure
        if epoch is not None and self.store_id is not None and not accepted:
            self._unaccepted_epoch = epoch if epoch > self._released_epoch else None

    def _release_unaccepted(self, reason: str, now: float, effects: list[Effect]) -> None:
        """Release a tenure that this session does not accept, so that it does not block the role (R8)."""
        epoch, self._unaccepted_epoch = self._unaccepted_epoch, None
        if epoch is not None:
            self._release(epoch, reason, now, effects)

    def _release(self, epoch: int, reason: str, now: float, effects: list[Effect]) -> None:
        if self._open_releases and epoch == self._released_epoch:
            return  # already in flight
        self._released_epoch = max(self._released_epoch, epoch)
        self._open_releases += 1
        if self.phase in _ON_THE_WAY_OUT:
            self._restart_wait(now)
        effects.append(self._build_release(epoch, reason, now))

    def _build_release(self, epoch: int, reason: str, now: float) -> Release:
        stop_s = STOP_HOLD_OFF_LEASES * self.timing.lease_s if self._stop is not None else 0.0
        return Release(epoch, reason, max(stop_s, self._cooldown.until - now))

    def _leave(self, trigger: Trigger, effects: list[Effect]) -> None:
        self._change_phase(trigger)
        self._session_is_deleted = False
        self._heartbeats.forget()
        effects.append(Leave())

    def _change_phase(self, trigger: Trigger) -> None:
        self.phase, self._sentence = next_phase(self.phase, trigger)
