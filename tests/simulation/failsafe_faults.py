"""What may happen to a world with failsafe: any faults, and the stories of the protocol."""

from collections.abc import Callable

from agent.core.group_state import RemoveGroup, RemoveSession

from .failsafe_world import HOSTS, SECONDS, TICK_S, C, FailsafeRun, L

Fault = Callable[[FailsafeRun], object]


def outage(run: FailsafeRun) -> None:
    """The members lose the coordinator; whoever comes later does not."""
    run.world.record("", "outage")
    for name in run.up:
        run.cut_both(name, C)


def ragged_outage(run: FailsafeRun) -> None:
    run.world.record("", "ragged outage")
    for name in run.up:
        run.world.after(run.rng.uniform(0, 60) * TICK_S, run.cut_until_healed, name)


def cut_some(run: FailsafeRun, names: list[str], others: list[str], share: float = 1.0) -> None:
    for name in names:
        for other in others:
            if name == other or run.rng.random() >= share:
                continue
            both, one = run.rng.random() < 0.7, run.rng.random() < 0.5
            if both or one:
                run.cut(name, other)
            if both or not one:
                run.cut(other, name)


def cut_primary(run: FailsafeRun) -> None:
    cut_some(run, [str(run.active)], [C])


def cut_others(run: FailsafeRun) -> None:
    cut_some(run, [name for name in run.up if name != run.active], [C], 0.8)


def cut_peers(run: FailsafeRun) -> None:
    one, other = run.rng.sample(HOSTS[:4], 2)
    cut_some(run, [one], [other])


def cut_any(run: FailsafeRun) -> None:
    one, other = run.rng.sample((*HOSTS[:4], C), 2)
    run.cut(one, other)


def stall_any(run: FailsafeRun) -> None:
    links = (
        [(name, C) for name in run.up] + [(C, name) for name in run.up] + [("b", "a"), ("a", "b")]
    )
    sender, receiver = run.rng.choice(links)
    run.stall(sender, receiver, run.rng.randint(5, int(1.4 * L)))


def mend(run: FailsafeRun) -> None:
    run.mend()


def mend_coordinator(run: FailsafeRun) -> None:
    run.mend(lan=False)


def crash(run: FailsafeRun) -> None:
    if run.up:
        name = str(run.active) if run.rng.random() < 0.4 else run.rng.choice(run.up)
        run.crash(name)
        if run.rng.random() < 0.8:
            failsafe = run.rng.random() < 0.85
            run.world.after(
                run.rng.uniform(1, 150) * TICK_S, lambda: run.start(name, failsafe=failsafe)
            )


def bounce_voter(run: FailsafeRun) -> None:
    others = [name for name in run.up if name != run.active]
    if others:
        run.bounce(run.rng.choice(others), failsafe=run.rng.random() < 0.8)


def kill_coordinator(run: FailsafeRun) -> None:
    run.world.coordinator.crash()
    if run.rng.random() < 0.8:
        run.world.after(run.rng.uniform(1, 2 * L) * TICK_S, run.world.coordinator.restart)


def pause_coordinator(run: FailsafeRun) -> None:
    run.world.coordinator.pause()
    run.world.after(run.rng.uniform(1, 2 * L) * TICK_S, run.world.coordinator.resume)


def bounce_coordinator(run: FailsafeRun) -> None:
    run.bounce_coordinator()


def join(run: FailsafeRun) -> None:
    name = run.rng.choice(["n", "n", "c"])
    run.start(name)
    if run.rng.random() < 0.3:
        cut_some(run, [name], [other for other in HOSTS if other != name])


def second(run: FailsafeRun) -> None:
    name = run.rng.choice(SECONDS)
    run.start_second(name, alone=run.rng.random() < 0.7, failsafe=run.rng.random() < 0.8)


def stop(run: FailsafeRun) -> None:
    if run.up:
        name = str(run.active) if run.rng.random() < 0.4 else run.rng.choice(run.up)
        run.world.agents[name].stop()


def override(run: FailsafeRun) -> None:
    run.override(run.rng.choice(["a", "b", "c", "n", None]))


def delete(run: FailsafeRun) -> None:
    run.submit(RemoveSession(run.rng.choice("abcn")))


def remake(run: FailsafeRun) -> None:
    run.submit(RemoveGroup())


def freeze(run: FailsafeRun) -> None:
    if run.up:
        host = run.world.agents[run.rng.choice(run.up)]
        ticks = run.rng.randint(5, int(1.5 * L))
        if run.rng.random() < 0.7:
            host.freeze_agent()
            run.world.after(ticks * TICK_S, host.thaw_agent)
        else:
            host.freeze()
            run.world.after(ticks * TICK_S, host.thaw)


def unfit(run: FailsafeRun) -> None:
    if run.up:
        host = run.world.agents[run.rng.choice(run.up)]
        host.unfit()
        run.world.after(run.rng.uniform(20, 2 * L) * TICK_S, host.fit)


def weather(run: FailsafeRun) -> None:
    loss, spread = run.rng.choice([0.0, 0.05, 0.3]), run.rng.choice([0.15, 5.0, 60.0])
    run.set_weather(loss, spread, run.rng.choice([0.0, 0.1]))


def restore(run: FailsafeRun) -> None:
    coordinator = run.world.coordinator
    coordinator.crash()
    delay_s = run.rng.uniform(1, L) * TICK_S
    run.world.after(delay_s, coordinator.restore_copy, run.rng.randrange(12))
    run.world.after(delay_s, coordinator.restart)


def lift(run: FailsafeRun) -> None:
    if run.world.coordinator.up:
        run.world.coordinator.lift()


FAULTS: dict[Fault, float] = {
    outage: 10,
    ragged_outage: 4,
    cut_primary: 8,
    cut_others: 5,
    cut_peers: 4,
    cut_any: 6,
    stall_any: 8,
    mend: 6,
    mend_coordinator: 6,
    crash: 7,
    bounce_voter: 5,
    kill_coordinator: 5,
    pause_coordinator: 2,
    bounce_coordinator: 4,
    join: 10,
    second: 4,
    stop: 4,
    override: 5,
    delete: 2,
    remake: 3,
    freeze: 4,
    unfit: 3,
    weather: 5,
    restore: 0.5,
    lift: 0.5,
}
"""Each fault, and how often it is drawn."""

# -- stories -----------------------------------------------------------------------------------------


def both(one: str, other: str) -> Fault:
    return lambda run: run.cut_both(one, other)


def one_way(sender: str, receiver: str) -> Fault:
    return lambda run: run.cut(sender, receiver)


def join_up(one: str, other: str) -> Fault:
    return lambda run: run.cut_both(one, other, cut=False)


def stalled(sender: str, receiver: str, low: int, high: int) -> Fault:
    return lambda run: run.stall(sender, receiver, run.rng.randint(low, high))


def started(name: str) -> Fault:
    return lambda run: run.start(name)


def stopped(name: str) -> Fault:
    return lambda run: run.world.agents[name].stop()


def bounced(name: str, *, failsafe: bool = True) -> Fault:
    return lambda run: run.bounce(name, failsafe=failsafe)


def overridden(session_id: str | None) -> Fault:
    return lambda run: run.override(session_id)


def deleted(session_id: str) -> Fault:
    return lambda run: run.submit(RemoveSession(session_id))


def seconded(name: str) -> Fault:
    return lambda run: run.start_second(name)


SOON, BEATS, LEASE = (1, 15), (20, 120), (150, 260)
Story = tuple[tuple[Fault, tuple[int, int]], ...]
"""Faults, each with how many ticks pass after it."""

VOTER_RESTARTS: Story = (
    (outage, LEASE),
    (bounced("b"), (5, 60)),
    (join_up("b", C), LEASE),
)
LATE_CONFIRMATION: Story = ((both("a", C), (90, 150)), (stalled("b", C, 50, 120), LEASE))
"""A heartbeat from before a promise arrives when the lease of the one it was given to has ended."""

STORIES: tuple[Story, ...] = (
    # Who may be promoted: joining, leaving, sets on their way.
    ((outage, BEATS), (started("n"), LEASE), (mend_coordinator, SOON)),
    ((started("n"), (1, 60)), (both("a", C), (1, 30)), (both("b", C), LEASE)),
    ((started("n"), (1, 60)), (one_way(C, "a"), (1, 60)), (both("b", C), LEASE)),
    (
        (started("n"), (1, 60)),
        (stalled(C, "a", 15, 48), SOON),
        (stalled("a", C, 15, 150), SOON),
        (both("b", C), LEASE),
    ),
    ((stopped("b"), (1, 60)), (both("a", C), LEASE), (started("b"), LEASE)),
    (
        (outage, BEATS),
        (started("n"), LEASE),
        (join_up("a", C), (1, 80)),
        (both("a", C), LEASE),
    ),
    (
        (both("c", C), (5, 30)),
        (deleted("c"), (60, 120)),
        (both("b", C), (60, 110)),
        (join_up("c", C), (3, 45)),
        (stalled(C, "a", 20, 48), (1, 30)),
        (overridden("c"), (5, 50)),
        (one_way(C, "a"), LEASE),
    ),
    # Promises: restarts, late answers, refusals.
    VOTER_RESTARTS,
    ((outage, LEASE), (bounced("b", failsafe=False), (5, 60)), (join_up("b", C), LEASE)),
    ((outage, LEASE), (stalled("b", "a", 5, 70), (10, 60)), (join_up("b", C), LEASE)),
    ((outage, LEASE), (join_up("b", C), LEASE)),
    (
        (outage, LEASE),
        (stalled(C, "b", 20, 48), SOON),
        (join_up("b", C), BEATS),
        (join_up("a", C), LEASE),
    ),
    (
        (both("a", C), SOON),
        (stalled("b", C, 180, 300), BEATS),
        (started("n"), LEASE),
        (mend, BEATS),
    ),
    (
        (both("a", C), SOON),
        (stalled("b", C, 180, 240), BEATS),
        (started("n"), (170, 230)),
        (both(C, "b"), LEASE),
    ),
    (
        (both("a", C), SOON),
        (stalled("b", C, 180, 240), BEATS),
        (started("n"), (100, 200)),
        (one_way(C, "b"), LEASE),
    ),
    LATE_CONFIRMATION,
    ((one_way(C, "a"), (90, 150)), (stalled("b", C, 50, 120), LEASE)),
    # The coordinator: restarts, resuming, old copies, the group made anew.
    ((outage, BEATS), (bounce_coordinator, BEATS), (started("n"), LEASE)),
    ((outage, LEASE), (bounce_coordinator, SOON), (join_up("a", C), LEASE)),
    ((outage, LEASE), (started("n"), BEATS), (bounce_coordinator, LEASE)),
    ((outage, LEASE), (bounced("a"), (1, 120)), (join_up("a", C), LEASE)),
    ((stalled("a", C, 230, 500), LEASE), (both("a", "b"), BEATS), (stopped("b"), LEASE)),
    ((stalled("a", C, 230, 500), LEASE), (overridden("b"), LEASE), (stopped("b"), LEASE)),
    ((stopped("b"), BEATS), (outage, (210, 300)), (remake, SOON), (started("n"), LEASE)),
    ((outage, (210, 300)), (remake, SOON), (started("n"), LEASE)),
    ((bounce_coordinator, BEATS), (outage, BEATS), (restore, LEASE), (started("n"), LEASE)),
    (
        (overridden("b"), LEASE),
        (overridden(None), BEATS),
        (outage, BEATS),
        (restore, LEASE),
        (started("n"), LEASE),
    ),
    # Second processes of a session.
    ((outage, BEATS), (seconded("a2"), LEASE), (mend_coordinator, LEASE)),
    ((outage, BEATS), (seconded("b2"), LEASE), (mend_coordinator, LEASE)),
    ((seconded("b2"), BEATS), (outage, BEATS), (join_up("b2", C), LEASE)),
)
