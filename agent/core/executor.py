"""Which hook runs when (R7): one serial, level-triggered executor, as a pure machine.

It knows the wanted role, the last completed role and the one hook that runs. Rules of this file:

- A demotion pre-empts a running promotion (TERM, after a grace KILL) and runs to its end or its
  budget; a promotion never pre-empts anything.
- Once a promotion hook was started, nothing but a completed demotion makes this host Secondary.
- The way to Primary leads over PendingPrimary: both hooks run, in that order.
- A role without a hook is completed by wanting it.
- A tenure keeps the hooks and limits with which its promotion began, until its demotion is completed:
  other ones from a reload come into force after that.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from agent.core.effects import Effect, HookFacts, KillHook, StartHook, TermHook
from agent.model import Role

NO_LIMITS: Mapping[Role, float] = MappingProxyType({})

RETRY_SHARE = 0.1
"""A failed demotion hook is tried again after this share of its budget: often enough to matter,
seldom enough not to be a fork loop."""


_BEFORE = {Role.PENDING_PRIMARY: Role.SECONDARY, Role.PRIMARY: Role.PENDING_PRIMARY}


@dataclass(frozen=True, slots=True)
class _Hooks:
    """Which roles have a hook, and how long their hooks may take."""

    roles: frozenset[Role]
    limit_s: float
    limits_s: Mapping[Role, float]


@dataclass(frozen=True, slots=True)
class _Run:
    run: int
    role: Role
    term_at: float
    kill_at: float
    termed: bool = False
    killed: bool = False


class Executor:
    """The hooks of one session. Time comes in as CLOCK_BOOTTIME seconds.

    After each call of ``want`` and ``ended``, and when ``wake_at`` has come, call ``step``.
    """

    def __init__(
        self,
        hooks: frozenset[Role],
        *,
        limit_s: float,
        limits_s: Mapping[Role, float] = NO_LIMITS,
    ) -> None:
        """Make one for the roles that have a hook.

        Args:
            hooks: the roles that have one.
            limit_s: how long a promotion hook may take, in seconds.
            limits_s: the same for single roles, where that is another.
        """
        self._hooks = self._next_hooks = _Hooks(hooks, limit_s, limits_s)
        self._runs = 0
        self._running: _Run | None = None
        self._facts: HookFacts | None = None
        self.by = float("inf")
        """When the budget of the wanted demotion ends (R4)."""
        self._grace_s = 0.0
        self._retry_s = 0.0
        self._retry_at = float("-inf")
        self.wanted = Role.SECONDARY
        self.completed: Role | None = None
        """The last role whose hook succeeded, or None: unknown, demotion is owed."""
        self.promotion_failed: str | None = None

    def reconfigure(
        self, hooks: frozenset[Role], *, limit_s: float, limits_s: Mapping[Role, float]
    ) -> None:
        """Other hooks, or other limits: at once, or after the demotion that is owed."""
        self._next_hooks = _Hooks(hooks, limit_s, limits_s)
        if not self.keeps_hooks:
            self._hooks = self._next_hooks

    @property
    def keeps_hooks(self) -> bool:
        """Whether a demotion is owed, so that other hooks have to wait."""
        return self.completed is not Role.SECONDARY or self.wanted is not Role.SECONDARY

    @property
    def settled(self) -> bool:
        """Nothing runs and nothing is owed."""
        return self._running is None and self.completed is self.wanted

    def want(self, facts: HookFacts, now: float, *, grace_s: float) -> None:
        """Set the wanted role.

        Args:
            facts: the role and what its hook is told; ``limit_s`` is the demotion's whole budget.
            now: the moment.
            grace_s: seconds between TERM and KILL.
        """
        if facts.role is not Role.SECONDARY:
            forward = facts.role is Role.PRIMARY or self.wanted is not Role.PRIMARY
            assert forward  # noqa: S101 - ours: nothing leads from Primary to PendingPrimary
            assert self.completed is not None  # noqa: S101 - likewise: demote first
            assert self.wanted is not Role.SECONDARY or self.settled  # noqa: S101 - likewise
        self.wanted = facts.role
        self._facts = facts
        self._grace_s = grace_s
        self._retry_at = now
        self.promotion_failed = None
        if facts.role is Role.SECONDARY:
            self.by = now + facts.limit_s
            self._retry_s = RETRY_SHARE * facts.limit_s
            self.completed = None
            if self._running is not None and self._running.role is not Role.SECONDARY:
                self._running = replace(
                    self._running, term_at=now, kill_at=min(self._running.kill_at, now + grace_s)
                )

    def overdue(self, now: float) -> bool:
        """Whether a demotion has used up its budget (R4)."""
        return self.wanted is Role.SECONDARY and not self.settled and now >= self.by

    def ended(self, run: int, *, ok: bool, why: str, now: float) -> None:
        """Take in that a hook has ended; one that is not the running one says nothing."""
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
        """What is to be done at ``now``, in order."""
        if self._running is not None:
            return self._limit(self._running, now)
        effects: list[Effect] = []
        while (role := self._next_role(now)) is not None:
            if role in self._hooks.roles:
                effects.append(self._start(role, now))
                break
            self._complete(role)
        if now >= self.by - self._grace_s:
            self._retry_at = self.by  # too late for another try
        return effects

    @property
    def wake_at(self) -> float:
        """When to call ``step`` next if nothing happens."""
        run = self._running
        if run is None:
            retrying = self.wanted is Role.SECONDARY and not self.settled
            if not retrying:
                return float("inf")
            return self._retry_at if self._retry_at < self.by - self._grace_s else self.by
        due = run.kill_at if run.termed else run.term_at
        if self.wanted is Role.SECONDARY:
            return self.by if run.killed else min(due, self.by)
        if run.killed:
            return float("inf") if self.promotion_failed else self._given_up_at(run)
        return due

    def _next_role(self, now: float) -> Role | None:
        if self.completed is self.wanted or self.promotion_failed is not None:
            return None
        if self.wanted is Role.SECONDARY:
            in_time = self._retry_at <= now < self.by - self._grace_s
            return Role.SECONDARY if in_time or Role.SECONDARY not in self._hooks.roles else None
        return Role.PENDING_PRIMARY if self.completed is Role.SECONDARY else Role.PRIMARY

    def _complete(self, role: Role) -> None:
        self.completed = role
        if role is Role.SECONDARY:
            self._hooks = self._next_hooks

    def _start(self, role: Role, now: float) -> StartHook:
        assert self._facts is not None  # noqa: S101 - nothing is wanted without facts
        self._runs += 1
        limit_s = self._hooks.limits_s.get(role, self._hooks.limit_s)
        kill_at = self.by if role is Role.SECONDARY else now + limit_s
        term_at = max(now, kill_at - self._grace_s)
        self._running = _Run(self._runs, role, term_at, kill_at)
        old_role = _BEFORE.get(role, self._facts.old_role)
        facts = replace(self._facts, role=role, old_role=old_role, limit_s=term_at - now)
        return StartHook(self._runs, facts)

    def _limit(self, run: _Run, now: float) -> list[Effect]:
        if now >= run.kill_at and not run.killed:
            self._running = replace(run, termed=True, killed=True)
            return [KillHook(run.run)]
        if now >= run.term_at and not run.termed:
            self._running = replace(run, termed=True)
            return [TermHook(run.run)]
        if run.killed and self.wanted is not Role.SECONDARY and now >= self._given_up_at(run):
            self.promotion_failed = "it does not end, even by KILL"
        return []

    def _given_up_at(self, run: _Run) -> float:
        """A promotion that is stuck in the kernel must not keep the role for ever."""
        return run.kill_at + self._grace_s
