"""Shared by the searches of this folder: strategies for schedules, and running a schedule."""

import os
from collections.abc import Sequence

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from agent.core.session import Phase, Session

from .coordinator import Core
from .defects import Defect
from .schedule import (
    KINDS,
    ON_HOSTS,
    ON_NETWORKS,
    ON_PROCESSES,
    ON_THE_LAN,
    Fault,
    Plan,
    build,
    end_faults,
)
from .world import World

EXAMPLES = int(os.environ.get("FAILOVER_SIMULATION_EXAMPLES", "2000"))

LONG = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)

ON_PLAIN_V1 = (*ON_HOSTS, *ON_PROCESSES, *ON_NETWORKS, "kill_coordinator", "pause_coordinator")
"""Without strangers: a plain v1 server has nothing to distinguish them from members."""

HELD_OFF = frozenset({"stop", "stop_confirming", "unfit", "task_dies", "hang_guard", "kill_guard"})
"""Faults after which a member has a hold-off, of L at most."""

DATA_LOST = frozenset({"restore", "stranger_teach", "delete_group", "stranger_beat", "crowd"})
"""Faults after which the role may stay vacant for a full L."""


@st.composite
def _faults(draw: st.DrawFn, kinds: Sequence[str], focus: Sequence[str]) -> tuple[Fault, ...]:
    """Up to ten faults of a few kinds, which finds failures that need several of one kind sooner."""
    few = [*focus, *draw(st.lists(st.sampled_from(kinds), min_size=not focus, max_size=5))]
    fault = st.builds(
        Fault,
        at_s=st.floats(0.0, 10.0),
        kind=st.sampled_from(few),
        target=st.integers(0, 2),
        seconds=st.one_of(st.floats(0.01, 0.5), st.floats(0.01, 5.0)),
        which=st.integers(0, 15),
    )
    return tuple(draw(st.lists(fault, max_size=10)))


def plans(
    *,
    plain_v1: bool = False,
    stores: int = 1,
    focus: Sequence[str] = (),
    failsafe: bool = False,
) -> st.SearchStrategy[Plan]:
    """Schedules: up to ten faults of every kind, on clocks within the promised drift.

    Args:
        plain_v1: with a plain v1 server that keeps nothing over a restart.
        stores: how many coordinators there are that do not know each other.
        focus: kinds that are always among those of a schedule.
        failsafe: with agents that take part in failsafe, and faults of the LAN between them.
    """
    kinds = ON_PLAIN_V1 if plain_v1 else KINDS
    drift = st.sampled_from([-0.005, 0.0, 0.005])
    return st.builds(
        Plan,
        seed=st.integers(0, 2**32 - 1),
        agents=st.integers(2, 3),
        faults=_faults((*kinds, *ON_THE_LAN) if failsafe else kinds, focus),
        lease_s=st.sampled_from([2.0, 2.0, 0.5]),
        drift=st.tuples(drift, drift, drift, drift),
        hook_seconds=st.sampled_from([0.0005, 0.02, 0.2]),
        outcomes=st.sampled_from(
            [("ok",), ("ok", "ok", "fail"), ("ok", "ok", "hang", "deaf", "stuck")]
        ),
        children=st.sampled_from(
            [("none",), ("none", "starter", "escaped"), ("helper", "deaf", "late", "stuck")]
        ),
        loss=st.sampled_from([0.0, 0.05, 0.3]),
        # TCP repeats nothing; v1 needs that.
        repeat=st.sampled_from([0.0] if plain_v1 else [0.0, 0.2]),
        spread_s=st.sampled_from([0.003, 0.3]),
        plain_v1=st.just(plain_v1),
        forgets=st.just(plain_v1),
        stores=st.just(stores),
        restart_share=st.sampled_from([0.3, 0.3, 2.0]),
        failsafe=st.just(failsafe),
    )


def live_through(
    plan: Plan,
    session_class: type[Session] = Session,
    *,
    core: Core | None = None,
    defects: frozenset[Defect] = frozenset(),
) -> World:
    """Run a plan's faults; any broken promise raises."""
    world = build(plan, session_class, core=core, defects=defects)
    world.run(plan.horizon)
    return world


def live_on(world: World, plan: Plan) -> None:
    """Check that after the faults the role is filled in time, and then every host is a member.

    The time is L plus two beats, beside hooks, cool-down and what is on its way; and another L where data
    were lost.
    """
    end_faults(world)
    timing, kinds = world.timing, {fault.kind for fault in plan.faults}
    hooks_s = 3 * 1.5 * plan.hook_seconds + 0.05
    under_way_s = plan.spread_s  # a heartbeat in flight may arrive this late
    limit_s = 1.01 * (timing.lease_s + 2 * timing.heartbeat_interval_s) + hooks_s + under_way_s
    if HELD_OFF & kinds:
        limit_s += world.lease_s  # the longest cool-down, and the hold-off of a stop
    if plan.outcomes != ("ok",):
        limit_s += (
            3 * world.lease_s
        )  # a hook that hangs in the first demotion, and then a cool-down
    if DATA_LOST & kinds:
        limit_s += world.lease_s
    if plan.failsafe:  # an operator looks whether anybody is active, and lifts after L
        for number in range(10):
            late_s = world.lease_s * (1.05 + number * 0.2)
            world.after(late_s, world.coordinator.lift)
        limit_s += 2 * world.lease_s
    world.run_until(lambda: world.primary() is not None, limit_s, "a primary")
    world.run_until(lambda: all_are_members(world), 4 * world.lease_s + 2, "every host a member")


def all_are_members(world: World) -> bool:
    """Whether each host has an agent that is a member; start agents that have ended."""
    return all(a.works and a.session.phase is Phase.MEMBER for a in world.agents.values())


def stop_in_order(plan: Plan, session_class: type[Session] = Session) -> None:
    """Stop the primary, and the next one while it confirms; the third must get the role long before L."""
    world = build(plan, session_class)
    world.run(2.5 * world.lease_s)
    first = world.primary()
    if first is None:
        return
    others = [name for name in world.agents if name != first]
    world.agents[others[0]].stops_confirming = True
    world.agents[first].stop()
    limit_s = 0.8 * world.lease_s
    world.run_until(lambda: world.primary() in others, limit_s, "a primary after an orderly stop")
    if world.primary() == others[0]:
        return
    world.run_until(lambda: world.primary() == others[1], limit_s, "the third as primary")
