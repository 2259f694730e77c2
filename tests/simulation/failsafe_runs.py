"""Runs with failsafe, drawn from one seed: faults and stories, and sweeps of one fault.

Half of the runs are one of ``STORIES`` with chance in its times, the others are any faults. After the faults
everything is healed, and a primary has to exist in time.
"""

import random

from .failsafe_faults import FAULTS, STORIES, Story, outage
from .failsafe_world import LEASE_S, TICK_S, C, FailsafeRun, L

R = 130
"""R with the default budget, in ticks."""


def random_run(
    seed: int, stories: tuple[Story, ...] = STORIES, **planted: object
) -> tuple[FailsafeRun, float]:
    """Live through one run, heal, and wait for a primary; the run, and the ticks that took.

    An odd seed draws any faults, an even one a story.

    Raises:
        BrokenPromiseError: an invariant or the bound does not hold.
    """
    rng = random.Random(seed)
    run = FailsafeRun(rng, rng.choice(["ab", "ab", "ab", "abc", "a"]), **planted)  # type: ignore[arg-type]
    kinds, weights = list(FAULTS), list(FAULTS.values())

    def something() -> None:
        rng.choices(kinds, weights)[0](run)
        run.run(rng.choice([2, 20, 60, 150]) * (0.3 + rng.random()))

    run.run(rng.randint(260, 340))
    if seed % 2:
        for _ in range(rng.randint(2, 12)):
            something()
    else:
        surprise = rng.choice([0, 0, 0.2])
        for fault, (low, high) in stories[seed // 2 % len(stories)]:
            fault(run)
            run.run(rng.uniform(low, high))
            if rng.random() < surprise:
                something()
    run.run(rng.choice([0, 50, 300]))
    run.heal()
    return run, run.settle()


# -- sweeps: one fault, everything else well -----------------------------------------------------------

PARTIAL_BOUND = 1.25 * L
KILLED_BOUND = 1.35 * L
HANDOVER_BOUND = 0.8 * L
"""Ticks within which the role is filled after each; an expired lease takes L, a promise as long."""


def well(seed: int, names: list[str], **planted: object) -> FailsafeRun:
    """A group in which a primary holds the role and uses its set."""
    rng = random.Random(seed)
    run = FailsafeRun(rng, rng.choice(names), **planted)  # type: ignore[arg-type]
    for host in run.hosts.values():
        host.deaf = 0.0
    run.run(rng.randint(260, 340))
    holder = run.holder
    if holder is None or run.world.agents[holder].session.asked_members is None:
        run.world.broken("no primary with a set at the start")
    return run


def sweep_outage(seed: int, **planted: object) -> None:
    """All lose the coordinator within R/4 and get it back within R/2: the same tenure goes on without a gap."""
    run = well(seed, ["a", "ab", "abc"], **planted)
    world, rng, first = run.world, run.rng, run.holder
    tenure = world.agents[str(first)].tenure
    kind = rng.choice(["both ways", "killed", "paused", "answers only", "requests only"])
    lasts = rng.choice([60, 120, 190, 400, 1000, 3000]) + rng.randint(0, 50)
    world.record("", f"outage ({kind}) for {lasts} ticks")
    if kind == "killed":
        world.coordinator.crash()
        world.after(lasts * TICK_S, world.coordinator.restart)
    elif kind == "paused":
        world.coordinator.pause()
        world.after(lasts * TICK_S, world.coordinator.resume)
    for name in run.up if kind not in {"killed", "paused"} else []:
        for sender, receiver in ((name, C), (C, name)):
            if (kind, receiver) not in {("answers only", C), ("requests only", name)}:
                world.after(rng.uniform(0, R / 4) * TICK_S, run.cut, sender, receiver)
                back_s = (lasts + R / 4 + rng.uniform(0, R / 2)) * TICK_S
                world.after(back_s, lambda s=sender, r=receiver: run.cut(s, r, cut=False))
    began, rounds = len(world.transcript), int(lasts / 10) + 2 * L // 10 + 10
    for _ in range(rounds):
        run.run(10)
        if world.primary() != first:
            world.broken(f"the primary changed by an outage ({kind})")
    if run.holder != first or world.agents[str(first)].tenure != tenure:
        world.broken(f"the tenure changed by an outage ({kind})")
    assert len(world.transcript) > began


def sweep_partial(seed: int, **planted: object) -> float:
    """Only the primary loses the coordinator: another one takes over; the ticks until it has."""
    run = well(seed, ["ab", "abc"], **planted)
    first = str(run.holder)
    links = [(first, C), (C, first)]
    for sender, receiver in links if run.rng.random() < 0.5 else [run.rng.choice(links)]:
        run.cut(sender, receiver)
    waited = 0.0
    while run.holder in {None, first}:
        if waited > PARTIAL_BOUND:
            run.world.broken(f"no takeover although only {first} lost the coordinator")
        run.run(1)
        waited += 1
    return waited


def sweep_killed(seed: int, **planted: object) -> float:
    """The primary dies in an outage: nobody until the coordinator is back; the ticks from then."""
    run = well(seed, ["ab", "abc"], **planted)
    first = str(run.holder)
    outage(run)
    run.run(run.rng.choice([100, 300, 600]))
    run.crash(first)
    run.run(run.rng.choice([1, 30, 100, 300]))
    if run.world.primary() is not None:
        run.world.broken("somebody is primary without a coordinator")
    run.mend()
    return await_holder(run, KILLED_BOUND, "the coordinator is back, the primary is dead")


def sweep_handover(seed: int, **planted: object) -> float:
    """The primary stops while the others have just restarted: the ticks until another one is primary.

    What it sends to the coordinator is late, and comes in any order, in half of the runs.
    """
    run = well(seed, ["ab", "abc"], **planted)
    first = str(run.holder)
    for name in [name for name in run.up if name != first]:
        run.world.agents[name].kill()
        run.world.agents[name].start()
    run.run(run.rng.randint(20, 100))
    if run.rng.random() < 0.5:
        run.stall(first, C, run.rng.randint(10, 60))
        run.run(run.rng.randint(0, 20))
    run.world.agents[first].stop()
    run.world.run_until(lambda: not run.world.agents[first].runs.active, LEASE_S, "a demotion")
    return await_holder(run, HANDOVER_BOUND, "an orderly stop")


def await_holder(run: FailsafeRun, bound: float, why: str) -> float:
    waited = 0.0
    while run.holder is None:
        if waited > bound:
            run.world.broken(f"no primary {bound:.0f} ticks after: {why}")
        run.run(2)
        waited += 2
    return waited
