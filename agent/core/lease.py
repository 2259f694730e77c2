"""The role of a session, its lease and its hooks (R2, R4, R7, R8).

Owns the steps of a tenure: ``LeaseHolder`` renews, promotes, demotes and publishes on request. It knows
neither phases nor answers; core/session.py decides.
"""

from datetime import datetime

from agent.core.effects import Cause, Effect, HookFacts, Publish
from agent.core.executor import Executor
from agent.core.failsafe_holder import FailsafeHolder
from agent.core.heartbeats import Heartbeats
from agent.core.options import Options
from agent.core.roles import check_transition
from agent.core.timing import Timing
from agent.model import Member, Role

GRACE_SHARE = 0.25
LONGEST_GRACE_S = 2.0
"""Time between TERM and KILL: this share of D, capped at what a well-behaved hook needs."""


class LeaseHolder:
    """The lease of a session. Other objects may read its public attributes, but not set them.

    Attributes:
        tenure: epoch of the tenure that the session prepares, holds, or ends.
        last_data: LastDataProcessedTime of the previous tenure, as last received.
        previous_primary: session id of the previous tenure, if known.
        renew_by: the renewal deadline, at which demotion starts.
        sent_at: the start of the lease: when the renewing heartbeat was sent, or, during a hold, the
            question that all other members agreed to (R28).
    """

    def __init__(self, timing: Timing, options: Options) -> None:
        """Build a holder that is Secondary, and whose first demotion has yet to succeed."""
        self.timing = timing
        self.options = options
        self.role = Role.SECONDARY
        self.tenure: int | None = None
        self.last_data: datetime | None = None
        self.previous_primary: str | None = None
        self.renew_by = float("-inf")
        self.sent_at = float("-inf")
        self._granted_timing = timing
        """The timing of the current lease; that of the group may have changed since."""
        self._executor = Executor(
            options.hooks, limit_s=options.hook_limit_s, limits_s=options.hook_limits_s
        )
        self._heartbeats = Heartbeats(options.jitter)
        failsafe = options.failsafe
        me = None if failsafe is None else Member(options.session_id, failsafe.url)
        self._holder = FailsafeHolder(me)
        self._heartbeat_at = float("-inf")
        """When the newest heartbeat was sent that the coordinator has answered with a role."""
        self._accepted_epoch: int | None = None
        """The epoch of the last tenure whose promotion was begun."""
        self._reason = ""
        self._old_role = Role.SECONDARY
        self._starting = True
        self._demoting = False
        self._owes_release = False
        self._primary_since = float("-inf")

    def reconfigure(self, options: Options) -> None:
        """Replace the options.

        A tenure keeps the hooks and limits of its promotion until its demotion is completed. A running
        hook keeps its own.
        """
        self.options = options
        self._executor.reconfigure(
            options.hooks, limit_s=options.hook_limit_s, limits_s=options.hook_limits_s
        )

    @property
    def demotion_is_owed(self) -> bool:
        """Whether a demotion has yet to succeed; until then the hooks of a reload are not in force."""
        return self._executor.demotion_is_owed

    @property
    def lease_until(self) -> float:
        """The end of the lease, from which another member may become primary: CLOCK_BOOTTIME seconds.

        Minus infinity without a lease.
        """
        return self.sent_at + self._granted_timing.lease_s

    @property
    def guard_deadlines(self) -> tuple[float, float] | None:
        """The deadlines at which the guard acts for the agent (R12), or None while nothing is promoted.

        Two moments on CLOCK_BOOTTIME: when it runs the demotion hook (infinity while the agent itself
        demotes), and when it kills. Each follows the agent's own deadline by half of the margin beyond
        the drift, so the kill comes before L by the drift and the other half. They do not change after
        a failed demotion.
        """
        timing = self._granted_timing
        behind_s = (timing.margin_s - timing.drift_s) / 2
        if self._demoting:
            last_at = max(self._executor.demote_by, self.lease_until - timing.drift_s)
            kill_at = min(self._executor.demote_by + behind_s, last_at)
            return None if self._starting else (float("inf"), kill_at)
        if self.role is Role.SECONDARY:
            return None
        hook_at = self.renew_by + behind_s
        return hook_at, hook_at + timing.demote_s

    @property
    def _holds_tenure(self) -> bool:
        """Whether this session has accepted a tenure that has not ended."""
        return self._has_lease and self._executor.wanted is Role.PRIMARY

    @property
    def _has_lease(self) -> bool:
        """Whether this session has a lease that it renews."""
        return self.role is not Role.SECONDARY and not self._demoting

    def _renew(self, sent_at: float) -> None:
        self._granted_timing = self.timing
        self._heartbeat_at = max(self._heartbeat_at, sent_at)
        self._update_lease_start()

    def _update_lease_start(self) -> None:
        """Count the lease from the newest answered heartbeat, or from the votes of all others if newer."""
        self.sent_at = max(self._heartbeat_at, self._holder.counts_from)
        self.renew_by = self.sent_at + self._granted_timing.renew_s

    def _end_lease(self) -> None:
        self._heartbeat_at = self.sent_at = self.renew_by = float("-inf")
        self._holder.end_tenure()

    def _become_pending(self, now: float, effects: list[Effect]) -> None:
        """Become PendingPrimary."""
        self.tenure = None
        self._reason = "chosen to take over"
        self._publish(Role.PENDING_PRIMARY, Cause.CHOSEN, effects)
        self._set_wanted_role(Role.PENDING_PRIMARY, self.options.hook_limit_s, now)

    def _promote(self, epoch: int | None, now: float, effects: list[Effect]) -> None:
        """Run the promotion hooks; Primary is published after their success (R8)."""
        self.tenure = self._accepted_epoch = epoch
        self._owes_release = True
        self._reason = "confirmed by the coordinator"
        if self.role is Role.SECONDARY:
            self._publish(Role.PENDING_PRIMARY, Cause.CONFIRMED, effects)
        self._set_wanted_role(Role.PRIMARY, self.options.hook_limit_s, now)

    def _begin_first_demotion(self, now: float) -> None:
        """Begin the first demotion: the previous process may have left a workload running (R6)."""
        self._demoting = True
        self._reason = "starting"
        budget_s = max(self.timing.demote_s, self.options.hook_limit_s)
        self._set_wanted_role(Role.SECONDARY, budget_s, now)

    def _demote(self, cause: Cause, reason: str, now: float, effects: list[Effect]) -> None:
        """Publish Secondary, then run the demotion hook within its budget (R4).

        The budget is D from now. After a freeze it ends at L less the drift, since another member may
        be promoted at L. After that only the order matters, and the hook has D again.
        """
        self._demoting = True
        self._reason = reason
        self._heartbeats.forget()
        self._holder.forget_questions()
        timing = self._granted_timing
        last_at = self.lease_until - timing.drift_s
        end_at = max(now, self.renew_by) + timing.demote_s
        if now < last_at:
            end_at = min(end_at, last_at)
        self._publish(Role.SECONDARY, cause, effects)
        self._set_wanted_role(Role.SECONDARY, end_at - now, now)

    def _run_hooks(self, now: float, effects: list[Effect]) -> None:
        """Advance the hooks; publish Primary when the promotion has succeeded."""
        effects += self._executor.step(now)
        promoted = self._executor.completed is Role.PRIMARY
        if self.role is Role.PENDING_PRIMARY and not self._demoting and promoted:
            self._primary_since = now
            self._publish(Role.PRIMARY, Cause.CONFIRMED, effects)

    def _set_wanted_role(self, role: Role, limit_s: float, now: float) -> None:
        facts = HookFacts(
            role=role,
            old_role=self._old_role,
            epoch=self.tenure,
            reason=self._reason,
            last_data=self.last_data,
            previous_primary=self.previous_primary,
            limit_s=limit_s,
        )
        budget_s = min(self._granted_timing.demote_s, max(0.0, limit_s))
        grace_s = min(GRACE_SHARE * budget_s, LONGEST_GRACE_S)
        self._executor.set_wanted_role(facts, now, grace_s=grace_s)

    def _publish(self, role: Role, cause: Cause, effects: list[Effect]) -> None:
        check_transition(self.role, role)
        before, self.role = self.role, role
        self._old_role = before
        effects.append(Publish(before, role, self.tenure, cause, self._reason))
