"""The hook executor (R7)."""

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.core.effects import Effect, HookFacts, KillHook, StartHook, TermHook
from agent.core.executor import Executor
from agent.model import Role

S, P, W = Role.SECONDARY, Role.PRIMARY, Role.PENDING_PRIMARY
ALL = frozenset(Role)
D, GRACE, LIMIT = 1.0, 0.25, 5.0


def facts(role: Role, limit_s: float = D) -> HookFacts:
    return HookFacts(role, S, 1, "for the test", None, None, limit_s)


@dataclass
class Bench:
    """An executor, its clock, and the effects that it has requested."""

    hooks: frozenset[Role] = ALL
    now: float = 100.0
    seen: list[Effect] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.executor = Executor(self.hooks, limit_s=LIMIT)

    def step(self) -> list[Effect]:
        effects = self.executor.step(self.now)
        self.seen += effects
        return effects

    def want(self, role: Role, limit_s: float = D) -> list[Effect]:
        self.executor.set_wanted_role(facts(role, limit_s), self.now, grace_s=GRACE)
        return self.step()

    def end(self, run: int, *, ok: bool = True) -> list[Effect]:
        self.executor.on_hook_ended(run, ok=ok, why="exit 0" if ok else "exit 1", now=self.now)
        return self.step()

    def end_last(self, *, ok: bool = True) -> list[Effect]:
        return self.end([e.run for e in self.seen if isinstance(e, StartHook)][-1], ok=ok)

    def wake(self) -> list[Effect]:
        self.now = max(self.now, self.executor.wake_at)
        return self.step()

    def demoted(self) -> "Bench":
        """Complete the first demotion; the next run has the number 2."""
        self.want(S)
        self.end(1)
        assert self.executor.is_settled
        return self

    def promoting(self) -> "Bench":
        """Start the hook of Primary, as run 3."""
        self.demoted().want(P)
        self.end(2)
        return self


def started(effects: list[Effect]) -> list[Role]:
    return [e.facts.role for e in effects if isinstance(e, StartHook)]


def test_r6_an_executor_starts_with_a_demotion() -> None:
    bench = Bench()
    assert bench.executor.completed is None
    assert started(bench.want(S)) == [S]


def test_r7_a_promotion_to_primary_runs_both_hooks_in_order() -> None:
    bench = Bench().demoted()
    assert started(bench.want(P)) == [W]
    assert bench.step() == []
    assert started(bench.end(2)) == [P]
    assert not bench.executor.is_settled
    assert bench.end(3) == []
    assert bench.executor.completed is P
    assert bench.executor.is_settled


def test_r7_a_hook_receives_the_previous_role_and_its_limit() -> None:
    bench = Bench().promoting()
    first, second = bench.seen[-2:]
    assert isinstance(first, StartHook)
    assert isinstance(second, StartHook)
    assert (first.facts.old_role, second.facts.old_role) == (S, W)
    assert second.facts.limit_s == LIMIT - GRACE


def test_r7_a_role_without_a_hook_is_completed_at_once() -> None:
    bench = Bench(hooks=frozenset())
    assert [bench.want(S), bench.want(P)] == [[], []]
    assert bench.executor.completed is P
    assert bench.executor.is_settled


def test_r7_a_demotion_preempts_a_promotion_by_term_and_then_kill() -> None:
    bench = Bench().promoting()
    assert bench.want(S) == [TermHook(3)]
    assert bench.step() == []
    assert bench.wake() == [KillHook(3)]
    assert bench.now == 100.0 + GRACE
    assert bench.step() == []
    assert started(bench.end(3, ok=False)) == [S]


@pytest.mark.parametrize("ok", [True, False])
def test_r7_a_demotion_follows_a_preempted_promotion_whatever_its_result(*, ok: bool) -> None:
    bench = Bench().promoting()
    bench.want(S)
    assert started(bench.end(3, ok=ok)) == [S]
    assert bench.executor.completed is None
    assert bench.executor.promotion_failed is None


def test_r7_a_promotion_preempts_nothing() -> None:
    """A request for it before the end of a demotion is a bug of ours."""
    bench = Bench()
    bench.want(S)
    with pytest.raises(AssertionError):
        bench.want(P)


def test_r7_nothing_leads_from_primary_to_pending_primary() -> None:
    """The table has no such row; the executor would look for a hook for ever."""
    bench = Bench().promoting()
    with pytest.raises(AssertionError):
        bench.want(W)


def test_r7_promotions_that_have_not_started_coalesce() -> None:
    bench = Bench().demoted()
    assert started(bench.want(W)) == [W]
    assert bench.want(P) == []
    assert started(bench.want(S) + bench.end(2, ok=False)) == [S]
    assert started(bench.seen) == [S, W, S]


def test_r7_a_promotion_that_is_requested_twice_runs_once() -> None:
    bench = Bench().demoted()
    bench.want(W)
    bench.end(2)
    assert bench.want(W) == []
    assert started(bench.want(P)) == [P]


def test_r7_a_promotion_hook_is_killed_at_its_limit() -> None:
    bench = Bench().promoting()
    assert bench.wake() == [TermHook(3)]
    assert bench.now == 100.0 + LIMIT - GRACE
    assert bench.wake() == [KillHook(3)]
    assert bench.now == 100.0 + LIMIT
    assert bench.end(3, ok=False) == []
    assert bench.executor.promotion_failed == "exit 1"
    assert bench.executor.wake_at == float("inf")


def test_r7_a_promotion_that_survives_kill_has_failed() -> None:
    """Otherwise a hook that is stuck in the kernel would block the role for ever."""
    bench = Bench().promoting()
    assert bench.wake() == [TermHook(3)]
    assert bench.wake() == [KillHook(3)]
    assert bench.now == 100.0 + LIMIT
    assert bench.wake() == []
    assert bench.now == 100.0 + LIMIT + GRACE
    assert bench.executor.promotion_failed == "it does not end, even after KILL"


def test_r7_a_promotion_that_is_killed_late_has_a_full_grace_to_end() -> None:
    """This process may have been frozen past the limit: KILL counts from its sending."""
    bench = Bench().promoting()
    bench.now += LIMIT + 2 * GRACE
    assert bench.step() == [KillHook(3)]
    assert bench.step() == []
    assert bench.executor.wake_at == bench.now + GRACE
    assert bench.wake() == []
    assert bench.executor.promotion_failed == "it does not end, even after KILL"
    assert bench.executor.wake_at == float("inf")


def test_r7_a_failed_demotion_is_retried_only_within_its_budget() -> None:
    bench = Bench()
    bench.want(S)
    runs = 1
    while not bench.executor.is_overdue(bench.now):
        bench.end(runs, ok=False)
        runs += len(started(bench.wake()))
    assert runs == 8  # every tenth of the budget, as long as more than the grace is left
    assert bench.now == 100.0 + D
    assert bench.executor.completed is None


def test_r7_a_missed_retry_does_not_make_the_caller_spin() -> None:
    """Less than the grace is left of the budget: too late to try, too early to give up."""
    bench = Bench()
    bench.want(S)
    bench.end(1, ok=False)
    bench.now = 100.0 + D - GRACE / 2
    assert bench.step() == []
    assert bench.executor.wake_at == 100.0 + D


def test_r4_a_demotion_hook_is_killed_when_its_budget_ends() -> None:
    bench = Bench()
    bench.want(S)
    assert bench.wake() == [TermHook(1)]
    assert bench.now == 100.0 + D - GRACE
    assert bench.wake() == [KillHook(1)]
    assert bench.now == 100.0 + D
    assert bench.executor.is_overdue(bench.now)


def test_r4_the_end_of_a_preempted_promotion_counts_against_the_demotion_budget() -> None:
    bench = Bench().promoting()
    bench.want(S)
    bench.wake()
    (start,) = bench.end(3, ok=False)
    assert isinstance(start, StartHook)
    assert start.facts.limit_s == pytest.approx(D - 2 * GRACE)


def test_r7_the_end_of_an_unknown_run_is_ignored() -> None:
    bench = Bench()
    bench.want(S)
    assert bench.end(7) == []
    assert not bench.executor.is_settled
    bench.end(1)
    bench.want(W)
    assert bench.end(1, ok=False) == []
    assert bench.executor.promotion_failed is None


def test_r4_a_late_success_of_the_demotion_counts() -> None:
    """It was killed, and had succeeded just before."""
    bench = Bench()
    bench.want(S)
    bench.wake()
    bench.end(1, ok=True)
    assert bench.executor.is_settled
    assert not bench.executor.is_overdue(bench.now + D)


def changed(bench: Bench, hooks: frozenset[Role], limit_s: float = 9.0) -> None:
    bench.executor.reconfigure(hooks, limit_s=limit_s, limits_s={})


@pytest.mark.parametrize("stage", ["pending", "promoting", "primary", "demoting", "failing"])
def test_r7_a_tenure_keeps_the_demotion_hook_that_a_reload_removes(stage: str) -> None:
    """A demotion that is completed without its hook leaves the workload running."""
    bench = Bench().demoted()
    bench.want(W if stage == "pending" else P)
    if stage not in {"pending", "promoting"}:
        bench.end_last()
        bench.end_last()
    if stage in {"demoting", "failing"}:
        bench.want(S)
    if stage == "failing":
        bench.end_last(ok=False)
    changed(bench, frozenset())
    if stage == "failing":
        assert started(bench.wake()) == [S]
    elif stage != "demoting":
        bench.want(S)
    while not bench.executor.is_settled:
        bench.end_last()
    assert started(bench.seen)[-1] is S
    assert bench.want(P) == [], "the next tenure has no hooks"


def test_r7_a_demotion_without_a_hook_runs_none_that_a_reload_adds() -> None:
    """The hook of another configuration may manage something else than this tenure does."""
    bench = Bench(hooks=frozenset({P}))
    bench.want(S)
    bench.want(P)
    bench.end(1)
    changed(bench, ALL)
    assert bench.want(S) == []
    assert started(bench.want(P)) == [W]


def test_r7_new_limits_apply_from_the_next_tenure_on() -> None:
    bench = Bench().promoting()
    changed(bench, ALL)
    bench.want(S)
    bench.end(3, ok=False)
    bench.end(4)
    (start,) = bench.want(P)
    assert isinstance(start, StartHook)
    assert start.facts.limit_s == 9.0 - GRACE


@pytest.mark.parametrize(("role", "keeps"), [(S, False), (W, True), (P, True)])
def test_r7_the_executor_shows_whether_a_demotion_is_owed(role: Role, *, keeps: bool) -> None:
    bench = Bench(hooks=frozenset())
    bench.want(S)
    bench.want(role)
    assert bench.executor.demotion_is_owed is keeps


def test_r7_a_reload_applies_at_once_while_nothing_is_promoted() -> None:
    bench = Bench().demoted()
    changed(bench, frozenset({P}))
    assert not bench.executor.demotion_is_owed
    assert started(bench.want(P)) == [P]


def test_r6_a_reload_during_the_first_demotion_keeps_its_hook() -> None:
    bench = Bench()
    bench.want(S)
    bench.end(1, ok=False)
    changed(bench, frozenset())
    assert started(bench.wake()) == [S]
    assert not bench.executor.is_settled


MOVES = st.lists(
    st.one_of(
        st.tuples(st.just("want"), st.sampled_from(Role)),
        st.tuples(st.just("end"), st.booleans()),
        st.tuples(st.just("wake"), st.none()),
        st.tuples(st.just("early"), st.floats(0.0, 1.0)),
        st.tuples(st.just("stray"), st.integers(0, 9)),
        st.tuples(st.just("reload"), st.sets(st.sampled_from(Role)).map(frozenset)),
    ),
    max_size=60,
)


class Watch:
    """The rules of R7, checked at every effect."""

    def __init__(self, hooks: frozenset[Role]) -> None:
        self.bench = Bench(hooks)
        self.running: StartHook | None = None
        self.termed_at: float | None = None
        self.killed = False
        self.owed = True  # a demotion, from the beginning and from the start of any promotion
        self.in_force = self.reloaded = hooks

    def see(self, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case StartHook():
                    assert self.running is None, "two hooks at once"
                    assert effect.facts.limit_s > 0
                    self.running, self.termed_at, self.killed = effect, None, False
                    self.owed |= effect.facts.role is not S
                case TermHook(run):
                    assert self.running is not None
                    assert run == self.running.run
                    assert self.termed_at is None
                    self.termed_at = self.bench.now
                case KillHook(run):
                    assert self.running is not None
                    assert run == self.running.run
                    assert self.termed_at is not None, "KILL before TERM"
                    assert not self.killed
                    self.killed = True
                case _:
                    pytest.fail(f"not for an executor to want: {effect}")
        executor = self.bench.executor
        if executor.wanted is S and executor.is_settled:
            assert not self.owed or S not in self.in_force, "a demotion was dropped"
            self.owed = False
            self.in_force = self.reloaded
        if self.termed_at is not None and not self.killed:
            assert self.bench.now < self.termed_at + GRACE + 1e-9, "TERM without KILL"

    def want(self, role: Role) -> None:
        executor = self.bench.executor
        legal = executor.completed is not None and (executor.wanted is not S or executor.is_settled)
        if role is S:
            self.owed = True
        forward = role is P or executor.wanted is not P
        if role is S or (legal and forward):
            self.see(self.bench.want(role))

    def end(self, *, ok: bool) -> None:
        if self.running is not None:
            ended, self.running, self.termed_at = self.running, None, None
            if ok and ended.facts.role is S:
                self.owed = False
            self.see(self.bench.end(ended.run, ok=ok))

    def move(self, what: str, how: object) -> None:
        executor, bench = self.bench.executor, self.bench
        match what, how:
            case "want", Role() as role:
                self.want(role)
            case "end", bool() as ok:
                self.end(ok=ok)
            case "wake", _ if executor.wake_at < float("inf"):
                self.see(bench.wake())
            case "early", float() as share if executor.wake_at < float("inf"):
                bench.now += share * max(0.0, executor.wake_at - bench.now)
                self.see(bench.step())
            case "reload", frozenset() as hooks:
                changed(bench, hooks, LIMIT)
                self.reloaded = hooks
                if executor.wanted is S and executor.is_settled:
                    self.in_force = hooks
            case "stray", int() as run if self.running is None or run != self.running.run:
                self.see(bench.end(run))
            case _:
                pass


@pytest.mark.long
@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.sets(st.sampled_from(Role)).map(frozenset), MOVES)
def test_r7_holds_for_every_sequence_of_wanted_roles_ends_and_times(
    hooks: frozenset[Role], moves: list[tuple[str, object]]
) -> None:
    """Never two hooks; KILL follows TERM; a promotion is demoted, or overdue, within the budget."""
    watch = Watch(hooks)
    watch.want(S)
    for what, how in moves:
        watch.move(what, how)
    watch.want(S)
    executor, bench = watch.bench.executor, watch.bench
    end = bench.now + D
    for _ in range(40):  # from here on hooks end only by KILL
        if executor.is_settled or executor.is_overdue(bench.now):
            break
        assert executor.wake_at <= end + 1e-9, "nobody would wake it"
        watch.see(bench.wake())
        if watch.killed:
            watch.end(ok=False)
    assert executor.is_settled or executor.is_overdue(bench.now)
    assert bench.now <= end + 1e-9


def test_r11_a_role_can_override_the_limit() -> None:
    facts = HookFacts(P, W, 1, "for the test", None, None, LIMIT)
    executor = Executor(frozenset(Role), limit_s=LIMIT, limits_s={P: 2 * LIMIT})
    executor.completed = executor.wanted = S
    executor.set_wanted_role(facts, 100.0, grace_s=GRACE)
    (pending,) = executor.step(100.0)
    assert isinstance(pending, StartHook)
    assert pending.facts.limit_s == LIMIT - GRACE
    executor.on_hook_ended(pending.run, ok=True, why="exit 0", now=100.0)
    (primary,) = executor.step(100.0)
    assert isinstance(primary, StartHook)
    assert primary.facts.limit_s == 2 * LIMIT - GRACE
