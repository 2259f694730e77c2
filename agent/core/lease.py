"""The role of a session, the lease that it rests on, and the hooks that follow it (R2, R4, R7, R8).

Owns what a tenure consists of: ``LeaseHolder`` extends, promotes, demotes and publishes when it is asked
to. It knows neither phases nor answers; core/session.py decides.
"""

from datetime import datetime

from agent.core.effects import Cause, Effect, HookFacts, Publish
from agent.core.executor import Executor
from agent.core.heartbeats import Heartbeats
from agent.core.options import Options
from agent.core.roles import check_transition
from agent.core.timing import Timing
from agent.model import Role

GRACE_SHARE = 0.25
LONGEST_GRACE_S = 2.0
"""Between TERM and KILL: this share of D, and no longer than a well-behaved hook needs."""


class LeaseHolder:
    """Public attributes may be read at any time, and written by nobody else.

    Attributes:
        tenure: epoch of the tenure that it holds, prepares, or is giving up.
        last_data: up to when data was processed in the tenure before, as last heard.
        previous_primary: session id of the tenure before, if known.
        renew_by: R, the moment at which demotion starts if no answer extends it.
        sent_at: when the heartbeat was sent that the lease is counted from.
    """

    def __init__(self, timing: Timing, options: Options) -> None:
        """Make one that is Secondary, and owes its first demotion."""
        self.timing = timing
        self.options = options
        self.role = Role.SECONDARY
        self.tenure: int | None = None
        self.last_data: datetime | None = None
        self.previous_primary: str | None = None
        self.renew_by = float("-inf")
        self.sent_at = float("-inf")
        self._granted = timing
        """The timing of the lease that it holds: the group's may have changed since."""
        self._executor = Executor(
            options.hooks, limit_s=options.hook_limit_s, limits_s=options.hook_limits_s
        )
        self._heartbeats = Heartbeats(options.jitter)
        self._reason = ""
        self._old_role = Role.SECONDARY
        self._starting = True
        self._demoting = False
        self._holds = False
        self._primary_at = float("-inf")

    def reconfigure(self, options: Options) -> None:
        """Use other options from now on.

        The hooks and limits of a tenure stay the ones that its promotion began with, until its demotion
        is completed. So does a hook that runs.
        """
        self.options = options
        self._executor.reconfigure(
            options.hooks, limit_s=options.hook_limit_s, limits_s=options.hook_limits_s
        )

    @property
    def keeps_hooks(self) -> bool:
        """Whether a demotion is owed: then the hooks of a reload are not in force yet."""
        return self._executor.keeps_hooks

    @property
    def lease_until(self) -> float:
        """When somebody else may become primary at the earliest: CLOCK_BOOTTIME seconds.

        Minus infinity without a lease.
        """
        return self.sent_at + self._granted.lease_s

    @property
    def guard_by(self) -> tuple[float, float] | None:
        """When the guard has to act in the agent's place (R12), or None while nothing is promoted.

        Two moments on CLOCK_BOOTTIME: when it runs the demotion hook (infinity while the agent
        demotes itself) and when it kills. Each lies behind the agent's own by half of what the margin
        has beyond the drift, and so the killing lies before L by the drift and the other half. After a
        demotion that failed they stay as they were.
        """
        timing = self._granted
        behind_s = (timing.margin_s - timing.drift_s) / 2
        if self._demoting:
            last_at = max(self._executor.by, self.lease_until - timing.drift_s)
            kill_at = min(self._executor.by + behind_s, last_at)
            return None if self._starting else (float("inf"), kill_at)
        if self.role is Role.SECONDARY:
            return None
        hook_at = self.renew_by + behind_s
        return hook_at, hook_at + timing.demote_s

    @property
    def _is_held(self) -> bool:
        """Whether there is a lease that has to be renewed."""
        return self.role is not Role.SECONDARY and not self._demoting

    def _extend(self, sent_at: float) -> None:
        self._granted = self.timing
        self.sent_at = max(self.sent_at, sent_at)
        self.renew_by = self.sent_at + self.timing.renew_s

    def _prepare(self, now: float, effects: list[Effect]) -> None:
        """Become PendingPrimary."""
        self.tenure = None
        self._reason = "chosen to take over"
        self._publish(Role.PENDING_PRIMARY, Cause.CHOSEN, effects)
        self._want(Role.PENDING_PRIMARY, self.options.hook_limit_s, now)

    def _promote(self, epoch: int | None, now: float, effects: list[Effect]) -> None:
        """Run the promotion hooks; Primary is published when they have succeeded (R8)."""
        self.tenure = epoch
        self._holds = True
        self._reason = "confirmed by the coordinator"
        if self.role is Role.SECONDARY:
            self._publish(Role.PENDING_PRIMARY, Cause.CONFIRMED, effects)
        self._want(Role.PRIMARY, self.options.hook_limit_s, now)

    def _begin_demotion(self, now: float) -> None:
        """The first demotion, whatever the previous process left running (R6)."""
        self._demoting = True
        self._reason = "starting"
        budget_s = max(self.timing.demote_s, self.options.hook_limit_s)
        self._want(Role.SECONDARY, budget_s, now)

    def _demote(self, cause: Cause, reason: str, now: float, effects: list[Effect]) -> None:
        """Publish Secondary, then run the hook; R4 says until when.

        It has D from now. That is R + D if it starts in time; a process that was frozen has at most
        until L less the drift, since another may be promoted at L, and kills what is not done then.
        Behind that there is nothing left to keep but order, and the hook has D again.
        """
        self._demoting = True
        self._reason = reason
        self._heartbeats.forget()
        timing = self._granted
        last_at = self.lease_until - timing.drift_s
        end_at = max(now, self.renew_by) + timing.demote_s
        if now < last_at:
            end_at = min(end_at, last_at)
        self._publish(Role.SECONDARY, cause, effects)
        self._want(Role.SECONDARY, end_at - now, now)

    def _run_hooks(self, now: float, effects: list[Effect]) -> None:
        """Move the hooks on; publish Primary when the promotion has succeeded."""
        effects += self._executor.step(now)
        promoted = self._executor.completed is Role.PRIMARY
        if self.role is Role.PENDING_PRIMARY and not self._demoting and promoted:
            self._primary_at = now
            self._publish(Role.PRIMARY, Cause.CONFIRMED, effects)

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
        whole_s = min(self._granted.demote_s, max(0.0, limit_s))
        grace_s = min(GRACE_SHARE * whole_s, LONGEST_GRACE_S)
        self._executor.want(facts, now, grace_s=grace_s)

    def _publish(self, role: Role, cause: Cause, effects: list[Effect]) -> None:
        check_transition(self.role, role)
        before, self.role = self.role, role
        self._old_role = before
        effects.append(Publish(before, role, self.tenure, cause, self._reason))
