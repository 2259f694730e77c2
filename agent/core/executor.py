"""The hook executor (R7): serial and level-triggered, as a pure state machine.

It knows the wanted role, the last completed role and the one running hook. Rules of this file:

- A demotion pre-empts a running promotion (TERM, then KILL after a grace period) and runs until it ends or
  its budget is used up; a promotion never pre-empts anything.
- Once a promotion hook was started, only a completed demotion makes this host Secondary.
- A promotion to Primary runs the hook of PendingPrimary first, unless that has already run.
- A role without a hook is completed at once.
- A tenure keeps the hooks and limits of its promotion until its demotion is completed; a reload takes
  effect after that.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from agent.core.effects import Effect, HookFacts, KillHook, StartHook, TermHook
from agent.model import Role

NO_LIMITS: Mapping[Role, float] = MappingProxyType({})

RETRY_SHARE = 0.1
"""A failed demotion hook is retried after this share of its budget, which allows some retries and no
fork loop."""


_ROLE_BEFORE = {Role.PENDING_PRIMARY: Role.SECONDARY, Role.PRIMARY: Role.PENDING_PRIMARY}


@dataclass(frozen=True, slots=True)
class _Hooks:
    """The roles that have a hook, and the limits of their hooks."""

    roles: frozenset[Role]
    limit_s: float
    limits_s: Mapping[Role, float]


@dataclass(frozen=True, slots=True)
class _RunningHook:
    run: int
    role: Role
    term_at: float
    kill_at: float
    term_sent: bool = False
    kill_sent: bool = False


class Executor:
    """The hooks of one session. Time comes in as CLOCK_BOOTTIME seconds.

    Call ``step`` after each ``set_wanted_role`` and ``on_hook_ended``, and at ``wake_at``.
    """

    def __init__(
        self,
        hooks: frozenset[Role],
        *,
        limit_s: float,
        limits_s: Mapping[Role, float] = NO_LIMITS,
    ) -> None:
        """Build an executor for the roles that have a hook.

        Args:
            hooks: the roles that have a hook.
            limit_s: the limit of a promotion hook, in seconds.
            limits_s: overrides of that limit, by role.
        """
        self._hooks = self._configured_hooks = _Hooks(hooks, limit_s, limits_s)
        self._runs = 0
        self._running: _RunningHook | None = None
        self._facts: HookFacts | None = None
        self.demote_by = float("inf")
        """The deadline of the wanted demotion (R4)."""
        self._grace_s = 0.0
        self._retry_s = 0.0
        self._retry_at = float("-inf")
        self.wanted = Role.SECONDARY
        self.completed: Role | None = None
        """The last role whose hook succeeded; None while a demotion has yet to succeed."""
        self.promotion_failed: str | None = None

    def reconfigure(
        self, hooks: frozenset[Role], *, limit_s: float, limits_s: Mapping[Role, float]
    ) -> None:
        """Replace hooks and limits: at once, or after the demotion that is owed."""
        self._configured_hooks = _Hooks(hooks, limit_s, limits_s)
        if not self.demotion_is_owed:
            self._hooks = self._configured_hooks

    @property
    def demotion_is_owed(self) -> bool:
        """Whether a demotion has yet to succeed; until then the current hooks stay in force."""
        return self.completed is not Role.SECONDARY or self.wanted is not Role.SECONDARY

    @property
    def is_settled(self) -> bool:
        """Whether no hook runs and the wanted role is completed."""
        return self._running is None and self.completed is self.wanted

    def set_wanted_role(self, facts: HookFacts, now: float, *, grace_s: float) -> None:
        """Set the wanted role.

        Args:
            facts: the role and the facts for its hook; ``limit_s`` is the whole budget of a demotion.
            now: CLOCK_BOOTTIME seconds.
            grace_s: seconds between TERM and KILL.
        """
        if facts.role is not Role.SECONDARY:
            forward = facts.role is Role.PRIMARY or self.wanted is not Role.PRIMARY
            assert forward  # noqa: S101 - our own mistake: Primary never becomes PendingPrimary
            assert self.completed is not None  # noqa: S101 - likewise: demote first
            assert self.wanted is not Role.SECONDARY or self.is_settled  # noqa: S101 - likewise
        self.wanted = facts.role
        self._facts = facts
        self._grace_s = grace_s
        self._retry_at = now
        self.promotion_failed = None
        if facts.role is Role.SECONDARY:
            self.demote_by = now + facts.limit_s
            self._retry_s = RETRY_SHARE * facts.limit_s
            self.completed = None
            if self._running is not None and self._running.role is not Role.SECONDARY:
                self._running = replace(
                    self._running, term_at=now, kill_at=min(self._running.kill_at, now + grace_s)
                )

    def is_overdue(self, now: float) -> bool:
        """Whether a demotion has used up its budget (R4)."""
        return self.wanted is Role.SECONDARY and not self.is_settled and now >= self.demote_by

    def on_hook_ended(self, run: int, *, ok: bool, why: str, now: float) -> None:
        """Record the end of a hook; ignored unless it is the running one."""
        if self._running is None or self._running.run != run:
            return
        role, self._running = self._running.role, None
        if role is Role.SECONDARY:
            if ok:
                self._complete(role)
            else:
                self._retry_at = now + self._retry_s
        elif ok and self.wanted is not Role.SECONDARY:
            self.completed = role
        elif self.wanted is not Role.SECONDARY:
            self.promotion_failed = why

    def step(self, now: float) -> list[Effect]:
        """The effects that are due at ``now``, in order."""
        if self._running is not None:
            return self._enforce_limits(self._running, now)
        effects: list[Effect] = []
        while (role := self._next_role(now)) is not None:
            if role in self._hooks.roles:
                effects.append(self._start(role, now))
                break
            self._complete(role)
        if now >= self.demote_by - self._grace_s:
            self._retry_at = self.demote_by  # too late for another attempt
        return effects

    @property
    def wake_at(self) -> float:
        """When to call ``step`` next if no event comes."""
        run = self._running
        if run is None:
            retrying = self.wanted is Role.SECONDARY and not self.is_settled
            if not retrying:
                return float("inf")
            return (
                self._retry_at
                if self._retry_at < self.demote_by - self._grace_s
                else self.demote_by
            )
        due = run.kill_at if run.term_sent else run.term_at
        if self.wanted is Role.SECONDARY:
            return self.demote_by if run.kill_sent else min(due, self.demote_by)
        if run.kill_sent:
            return float("inf") if self.promotion_failed else self._stuck_at(run)
        return due

    def _next_role(self, now: float) -> Role | None:
        if self.completed is self.wanted or self.promotion_failed is not None:
            return None
        if self.wanted is Role.SECONDARY:
            in_time = self._retry_at <= now < self.demote_by - self._grace_s
            return Role.SECONDARY if in_time or Role.SECONDARY not in self._hooks.roles else None
        return Role.PENDING_PRIMARY if self.completed is Role.SECONDARY else Role.PRIMARY

    def _complete(self, role: Role) -> None:
        self.completed = role
        if role is Role.SECONDARY:
            self._hooks = self._configured_hooks

    def _start(self, role: Role, now: float) -> StartHook:
        assert self._facts is not None  # noqa: S101 - nothing is wanted without facts
        self._runs += 1
        limit_s = self._hooks.limits_s.get(role, self._hooks.limit_s)
        kill_at = self.demote_by if role is Role.SECONDARY else now + limit_s
        term_at = max(now, kill_at - self._grace_s)
        self._running = _RunningHook(self._runs, role, term_at, kill_at)
        old_role = _ROLE_BEFORE.get(role, self._facts.old_role)
        facts = replace(self._facts, role=role, old_role=old_role, limit_s=term_at - now)
        return StartHook(self._runs, facts)

    def _enforce_limits(self, run: _RunningHook, now: float) -> list[Effect]:
        if now >= run.kill_at and not run.kill_sent:
            self._running = replace(run, term_sent=True, kill_sent=True, kill_at=now)
            return [KillHook(run.run)]
        if now >= run.term_at and not run.term_sent:
            self._running = replace(run, term_sent=True)
            return [TermHook(run.run)]
        if run.kill_sent and self.wanted is not Role.SECONDARY and now >= self._stuck_at(run):
            self.promotion_failed = "it does not end, even after KILL"
        return []

    def _stuck_at(self, run: _RunningHook) -> float:
        """When a promotion that survives KILL counts as failed: a hook stuck in the kernel may never end."""
        return run.kill_at + self._grace_s
