"""Faults of earlier versions, planted again: the simulation has to find each, or it proves nothing.

Each one is found twice: by the scenario of its story, and by the same search that finds nothing
without it. The plan that was found is then lived through unplanted.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from hypothesis import Phase as SearchPhase
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.core.effects import Effect
from agent.core.events import Event
from agent.core.group import decide
from agent.core.group_state import (
    AddSession,
    Decision,
    GroupState,
    Input,
    Policy,
    ReceiveHeartbeat,
    ReleaseRole,
    RemoveSession,
    state_after_restart,
)
from agent.core.session import Options, Session
from agent.model import GroupRecord, Instant

from .coordinator import REAL, Core
from .defects import Defect
from .schedule import Plan
from .search import LONG, live_on, live_through, plans, stop_in_order
from .test_scenarios import played
from .world import BrokenPromiseError

SCENARIOS = Path(__file__).parent / "scenarios"
LIMIT = 2000
"""The number of schedules within which each fault has to be found."""


class AcceptsAnyStore(Session):
    """Fault 9: answers of any store count."""

    def accepts_store(self, store_id: str | None) -> bool:
        return True


class TakesTheDemotionAway(Session):
    """Fault 6: new hooks apply at once, even to the current tenure."""

    def reconfigure(self, options: Options) -> None:
        super().reconfigure(options)
        self._executor._hooks = self._executor._configured_hooks


class AcceptsAfterAnyRegistration(Session):
    """Fault 10: a role is accepted at once from a plain v1 server that has lost its data."""

    def step(self, event: Event, now: float) -> tuple[Effect, ...]:
        self._accept_roles_at = float("-inf")
        return super().step(event, now)


class KeepsWhatItDoesNotUse(Session):
    """Fault 17: a tenure that is assigned during a stop is not released."""

    def _record_assigned_tenure(self, epoch: int | None) -> None:
        if self._stop is None:
            super()._record_assigned_tenure(epoch)


def forgets_quiet_times(record: GroupRecord, now: Instant) -> GroupState:
    """Fault 4: a quiet time does not survive a restart."""
    return state_after_restart(replace(record, quiet=False), now)


def takes_releases_of_anybody(
    state: GroupState, what: Input, now: Instant, policy: Policy
) -> Decision:
    """Fault 8: a release with the right epoch counts, whoever sends it."""
    if isinstance(what, ReleaseRole) and state.record.holder is not None:
        what = replace(what, instance=state.record.holder.instance)
    return decide(state, what, now, policy)


def takes_any_epoch(state: GroupState, what: Input, now: Instant, policy: Policy) -> Decision:
    """Fault 15: a heartbeat can raise the epoch without a bound."""
    if isinstance(what, ReceiveHeartbeat) and (what.seen_epoch or 0) > state.record.epoch:
        seen, what = what.seen_epoch or 0, replace(what, seen_epoch=None)
        record = replace(state.record, epoch=seen, holder=None, quiet=True)
        quiet_until = now.mono + record.config.lease_s
        state = GroupState(record, replace(state.live, quiet_until=quiet_until))
    return decide(state, what, now, policy)


def crowds_out_the_primary(
    state: GroupState, what: Input, now: Instant, policy: Policy
) -> Decision:
    """In a full group the primary gives way to a new session, and its lease with it (R20)."""
    record, holder = state.record, state.record.holder
    if (
        isinstance(what, AddSession)
        and what.config.id not in record.sessions
        and len(record.sessions) >= policy.max_sessions
        and holder is not None
    ):
        record = replace(record, holder=None, previous=holder.session_id)
        state = GroupState(record, state.live)
        if holder.session_id in record.sessions:
            state = decide(state, RemoveSession(holder.session_id), now, policy).state
    return decide(state, what, now, policy)


@dataclass(frozen=True)
class Planted:
    """One planted fault, and where it has to be found.

    Attributes:
        scenarios: whose end is another one with it.
        lives_on: it keeps the role from everybody, which is seen after the faults.
    """

    defects: frozenset[Defect] = frozenset()
    session: type[Session] = Session
    core: Core = REAL
    scenarios: tuple[str, ...] = ()
    schedules: st.SearchStrategy[Plan] = field(default_factory=plans)
    lives_on: bool = False

    def live(self, plan: Plan, *, planted: bool = True) -> None:
        """Run a plan, with the fault or without it."""
        if planted:
            world = live_through(plan, self.session, core=self.core, defects=self.defects)
        else:
            world = live_through(plan)
        if self.lives_on:
            live_on(world, plan)


def of_two_that_restart_soon(plan: Plan) -> Plan:
    """The same faults on two hosts that are otherwise well: one gets its own role back before long."""
    well = replace(plan, loss=0.0, repeat=0.0, outcomes=("ok",), children=("none",))
    return replace(well, agents=2, restart_share=0.3)


PLANTED = {
    "1 waits for the killed guard": Planted(
        frozenset({Defect.WAITS_FOR_THE_KILLED_GUARD}),
        scenarios=("guard_hangs",),
        schedules=plans(focus=["hang_guard"]),
    ),
    "2 run ends with its leader": Planted(
        frozenset({Defect.RUN_ENDS_WITH_ITS_LEADER}),
        scenarios=("hook_child_on_term", "hook_leaves_a_process"),
    ),
    "2 kills only groups": Planted(
        frozenset({Defect.KILLS_ONLY_GROUPS}), scenarios=("hook_leaves_a_process",)
    ),
    "3 calls the guard off": Planted(
        frozenset({Defect.CALLS_THE_GUARD_OFF}),
        scenarios=("loop_dies",),
        schedules=plans(focus=["loop_dies"]),
    ),
    "3 loses tasks": Planted(
        frozenset({Defect.LOSES_TASKS}),
        scenarios=("task_dies",),
        schedules=plans(focus=["task_dies"]),
        lives_on=True,
    ),
    "4 forgets quiet times": Planted(
        core=replace(REAL, state_after_restart=forgets_quiet_times),
        scenarios=("restored_data",),
        schedules=plans(focus=["restore"]),
    ),
    "5 starts before it demotes": Planted(
        frozenset({Defect.STARTS_BEFORE_IT_DEMOTES}), scenarios=("start_fails",)
    ),
    "6 takes the demotion away": Planted(
        session=TakesTheDemotionAway, scenarios=("reload_without_demotion_hook",)
    ),
    "7 reads by position": Planted(
        frozenset({Defect.READS_BY_POSITION}),
        scenarios=("reload_after_upgrade",),
        schedules=plans(focus=["upgrade"]),
    ),
    "8 takes releases of anybody": Planted(
        core=replace(REAL, decide=takes_releases_of_anybody),
        scenarios=("stranger_releases",),
        schedules=plans(focus=["stranger_release"]),
    ),
    "9 accepts any store": Planted(
        session=AcceptsAnyStore, scenarios=("two_stores",), schedules=plans(stores=2)
    ),
    "10 accepts after any registration": Planted(
        session=AcceptsAfterAnyRegistration,
        scenarios=("forgetful_v1_server",),
        schedules=plans(plain_v1=True),
    ),
    "15 takes any epoch": Planted(
        core=replace(REAL, decide=takes_any_epoch),
        scenarios=("stranger_teaches_an_epoch",),
        schedules=plans(focus=["stranger_teach"]),
        lives_on=True,
    ),
    "20 crowds out the primary": Planted(
        core=replace(REAL, decide=crowds_out_the_primary),
        scenarios=("full_group",),
        schedules=plans(focus=["crowd"]),
    ),
    "28 releases undone": Planted(
        frozenset({Defect.RELEASES_UNDONE}),
        scenarios=("guard_demotes_slowly",),
        schedules=plans(focus=["kill_agent", "freeze_agent"]),
    ),
    "28 releases as anybody": Planted(
        frozenset({Defect.RELEASES_AS_ANYBODY}),
        schedules=plans(focus=["kill_agent", "freeze_agent"]).map(of_two_that_restart_soon),
    ),
}


def find(schedules: st.SearchStrategy[Plan], live: Callable[[Plan], None]) -> Plan | None:
    """The first plan of a search that breaks the promise, or None."""
    found: list[Plan] = []

    @settings(
        LONG,
        max_examples=LIMIT,
        phases=[SearchPhase.generate],
        report_multiple_bugs=False,
        database=None,
    )
    @given(schedules)
    def search(plan: Plan) -> None:
        try:
            live(plan)
        except BrokenPromiseError:
            found.append(plan)
            raise

    with suppress(BrokenPromiseError):
        search()
    return found[0] if found else None


@pytest.mark.long
@pytest.mark.parametrize("planted", PLANTED.values(), ids=PLANTED)
def test_a_search_finds_a_planted_fault(planted: Planted) -> None:
    """Within 2000 schedules; without the fault, the same plan keeps the promise."""
    plan = find(planted.schedules, planted.live)
    assert plan is not None
    planted.live(plan, planted=False)


@pytest.mark.long
def test_a_search_finds_a_tenure_that_is_not_released_at_a_stop() -> None:
    """Fault 17, by graceful stops."""
    seeds = st.builds(
        Plan,
        seed=st.integers(0, 2**32 - 1),
        agents=st.just(3),
        spread_s=st.just(0.02),
        restart_share=st.none(),
    )
    plan = find(seeds, lambda plan: stop_in_order(plan, KeepsWhatItDoesNotUse))
    assert plan is not None
    stop_in_order(plan)


@pytest.mark.parametrize(
    ("name", "planted"),
    [
        pytest.param(name, planted, id=f"{fault}-{name}")
        for fault, planted in PLANTED.items()
        for name in planted.scenarios
    ],
)
def test_a_scenario_shows_a_planted_fault(name: str, planted: Planted) -> None:
    """The scenario breaks the promise, or has another transcript than without the fault."""
    text = (SCENARIOS / f"{name}.txt").read_text()
    with suppress(BrokenPromiseError):
        happened = played(
            text, session_class=planted.session, core=planted.core, defects=planted.defects
        )
        assert happened != text
