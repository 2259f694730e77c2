"""The promise of docs/design.md, over schedules that Hypothesis finds (R1-R8, R13-R18)."""

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.core.effects import Cause, Effect, Release
from agent.core.events import FitnessChanged
from agent.core.group_state import state_after_restart
from agent.core.session import Session
from agent.core.timing import Budget
from agent.model import Role

from .network import Clock
from .processes import HookNature
from .schedule import Fault, Plan, build, inject
from .search import EXAMPLES, LONG, ON_PLAIN_V1, live_on, live_through, plans, stop_in_order
from .world import BrokenPromiseError, World


@LONG
@given(plans())
def test_never_two_active_and_every_tenure_has_its_own_epoch(plan: Plan) -> None:
    """Whatever fails, and when: at most one active member, one holder per epoch, only the table's transitions (R15)."""
    live_through(plan)


@settings(LONG, max_examples=max(1, EXAMPLES // 4))
@given(plans(plain_v1=True))
def test_the_promise_holds_with_a_server_without_epochs(plan: Plan) -> None:
    """A plain v1 server has no epoch, no revision, no blocking reads and no release."""
    live_through(plan)


@settings(LONG, max_examples=max(1, EXAMPLES // 4))
@given(plans(stores=2))
def test_the_promise_holds_with_two_coordinators_that_do_not_know_each_other(plan: Plan) -> None:
    """Both are in one list of endpoints, and each member has joined the first one before."""
    live_through(plan)


@settings(LONG, max_examples=max(1, EXAMPLES // 5))
@given(plans(focus=["crowd", "kill", "cut"]))
def test_the_promise_holds_while_dead_sessions_give_way_to_new_ones(plan: Plan) -> None:
    """In a full group; every host is a member again when the strangers' sessions are dead, too (R20)."""
    live_on(live_through(plan), plan)


@settings(LONG, max_examples=max(1, EXAMPLES // 4))
@given(plans())
def test_a_primary_exists_within_l_and_two_beats_after_the_faults(plan: Plan) -> None:
    """After the faults stop, the role is filled in time, and every host becomes a member again."""
    live_on(live_through(plan), plan)


@settings(LONG, max_examples=max(1, EXAMPLES // 10))
@given(
    seed=st.integers(0, 2**32 - 1),
    spread_s=st.sampled_from([0.003, 0.02, 0.1]),
    hook_seconds=st.sampled_from([0.0005, 0.02]),
)
def test_a_graceful_stop_never_leaves_a_lease_to_expire(
    seed: int, spread_s: float, hook_seconds: float
) -> None:
    """Not even a stop during the confirming heartbeat."""
    stop_in_order(Plan(seed, 3, hook_seconds=hook_seconds, spread_s=spread_s, restart_share=None))


@settings(LONG, max_examples=50)
@given(plans())
def test_the_same_plan_gives_the_same_transcript(plan: Plan) -> None:
    """The core depends on its arguments only."""
    assert live_through(plan).text() == live_through(plan).text()


class CountsFromTheAnswer(Session):
    """A planted bug: the lease is counted from the arrival of the answer."""

    _now = 0.0

    def step(self, event: object, now: float) -> tuple[Effect, ...]:
        self._now = now
        return super().step(event, now)  # type: ignore[arg-type]

    def _renew(self, sent_at: float) -> None:
        super()._renew(self._now)


class ReleasesFirst(Session):
    """A planted bug: the role is released before the demotion hook has run."""

    def _demote(self, cause: Cause, reason: str, now: float, effects: list[Effect]) -> None:
        if self.tenure is not None and self.role is Role.PRIMARY:
            effects.append(Release(self.tenure, reason, 0.0))
        super()._demote(cause, reason, now, effects)


class ResumesAfterStall(Session):
    """A planted bug: after a freeze, a heartbeat is sent before the demotion."""

    def _on_stalled(self, late_s: float, now: float, effects: list[Effect]) -> None:
        self.renew_by = now + self.timing.renew_s


class GuardsTooLate(Session):
    """A planted bug: the guard gets a deadline after the end of the lease (R12)."""

    @property
    def guard_deadlines(self) -> tuple[float, float] | None:
        due = super().guard_deadlines
        lease_s = self.timing.lease_s
        return due and (due[0] + lease_s, due[1] + lease_s)


class StaysThoughUnfit(Session):
    """A planted bug: an unfit member releases the role before its demotion hook has run (R9)."""

    def _on_fitness_changed(self, event: FitnessChanged, now: float, effects: list[Effect]) -> None:
        if not event.fit and self.role is Role.PRIMARY and self.tenure is not None:
            effects.append(Release(self.tenure, event.reason, 0.0))
        super()._on_fitness_changed(event, now, effects)


def test_without_a_guard_a_frozen_agent_breaks_the_promise() -> None:
    """The same plan keeps the promise with a guard, and breaks it without one (R12)."""
    plan = Plan(3, 2, (Fault(2.0, "freeze_agent", 0, 5.0),), horizon=8.0)
    plans_of_both = (plan, replace(plan, faults=(replace(plan.faults[0], target=1),)))
    for one in plans_of_both:
        live_through(one)
    broken = 0
    for one in plans_of_both:
        try:
            live_through(replace(one, guarded=False))
        except BrokenPromiseError:
            broken += 1
    assert broken == 1, "one of the two was primary"


@pytest.mark.long
@pytest.mark.parametrize(
    "bug",
    [CountsFromTheAnswer, ReleasesFirst, ResumesAfterStall, GuardsTooLate, StaysThoughUnfit],
)
def test_the_simulation_finds_a_planted_bug(bug: type[Session]) -> None:
    """A simulation that cannot fail proves nothing. The budget is as tight as R1 allows."""
    chance = random.Random(1)
    for seed in range(2000):
        faults = tuple(
            Fault(
                chance.uniform(0, 8),
                chance.choice(ON_PLAIN_V1),
                chance.randrange(2),
                0.5 + 4 * chance.random(),
            )
            for _ in range(5)
        )
        plan = Plan(
            seed,
            2,
            faults,
            hook_seconds=0.2,
            outcomes=("ok", "ok", "hang"),
            spread_s=0.05,
            budget=Budget(margin_s=0.0202),
            drift=(0.00497, -0.00497, -0.00497),
        )
        try:
            live_through(plan, bug)
        except BrokenPromiseError:
            live_through(plan)
            return
    pytest.fail(f"{bug.__name__} was not found")


def test_a_frozen_primary_demotes_before_anything_else() -> None:
    """SIGSTOP for longer than L, then SIGCONT: it publishes Secondary first (R2)."""
    world = build(Plan(3, 2))
    world.run(2.0)
    victim = world.agents[str(world.primary())]
    inject(world, Fault(0, "freeze", "abc".index(victim.name), 5.0))
    world.run(10.0)
    after = world.transcript[
        world.transcript.index(next(t for t in world.transcript if "thawed" in t)) + 1
    ]
    assert victim.name in after
    assert "Primary -> Secondary" in after


def test_a_member_that_receives_no_answers_does_not_block_the_role() -> None:
    """A one-way partition of the member with the better score: its heartbeats arrive, no answer does."""
    world = build(Plan(7, 2))
    world.agents["b"].score = 80.0
    world.run(3.0)
    deaf = world.agents["a"]
    assert world.primary() == "a"
    inject(world, Fault(0, "cut_back", 0, 60.0))
    world.run(4 * world.lease_s)
    filled_s = 0.0
    for _ in range(200):
        world.run(0.2)
        filled_s += 0.2 if world.primary() == "b" else 0.0
    assert deaf.session.role is Role.SECONDARY
    assert filled_s > 0.8 * 40.0, "b has it nearly all of the time"


@pytest.mark.parametrize("margin", [0.0101, 0.02, 0.1])
def test_the_guard_leaves_the_drift_alone(margin: float) -> None:
    """R12 with clocks that differ by all of the stated drift, and a hook that only KILL ends."""
    lease_s = 10.0
    budget = Budget(margin_s=margin * lease_s)
    for seed in range(20):
        world = World(seed, lease_s=lease_s, budget=budget)
        world.coordinator.clock = Clock(1.005, 1000.0)
        world.coordinator.state = state_after_restart(
            world.coordinator.disk, world.coordinator.instant()
        )
        for name in "ab":
            agent = world.add_agent(name, clock=Clock(0.995))
        world.run(5.0)
        agent = world.agents[str(world.primary())]
        agent.nature = HookNature(outcomes=("deaf",))
        agent.kill_agent()
        world.run(3 * lease_s)
