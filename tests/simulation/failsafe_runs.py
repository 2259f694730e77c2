"""Worlds with failsafe: random runs of faults and stories, and sweeps of one fault.

A run is drawn from one seed. Half of them are one of ``STORIES`` with chance in its times, the others are any
faults. After the faults everything is healed, and a primary has to exist in time. The unit of time is a tick,
L / 200. Hosts are a, b and c; n joins later; a2 and b2 are second processes of the sessions a and b on other
hosts.
"""

import random
from collections.abc import Callable
from dataclasses import replace

from agent.core.effects import StartHook
from agent.core.group_failsafe import choosable_members
from agent.core.group_state import RemoveGroup, RemoveSession, SetOverride
from agent.core.session import Session
from agent.core.timing import Budget
from agent.model import Role, RoleOverride

from .coordinator import Core
from .defects import Defect
from .host import AgentHost
from .network import Clock
from .world import World

LEASE_S = 2.0
TICK_S = LEASE_S / 200
L = 200
R = 130
HOSTS = ("a", "b", "c", "n", "a2", "b2")
SECONDS = ("a2", "b2")
BOUND = 2.6 * L
"""Ticks within which a primary has to exist once everything is well: L, two beats, and what is still under way."""

TIGHT = Budget(margin_s=0.0101 * LEASE_S, demote_s=0.05 * LEASE_S)
"""The least margin that R1 allows."""

DEMOTION_SHARE = 0.74
"""Share of D that the slowest demotion hook takes: after 0.75 it is terminated."""

QUICK_S = 0.002
QUICK_SHARE = 0.3
"""How long a quick hook takes, and how many demotions are quick."""

C = "C"
"""The coordinator, as one end of a link."""


class SlowToDemote(AgentHost):
    """A host whose promotion is quick, and whose demotion mostly takes nearly all of its budget."""

    def start_hook(self, effect: StartHook) -> None:
        timing = self.session.timing
        budget_s = DEMOTION_SHARE * timing.demote_s
        quick = effect.facts.role is not Role.SECONDARY or self.world.rng.random() < QUICK_SHARE
        self.nature = replace(self.nature, seconds=QUICK_S if quick else budget_s / 1.5)
        super().start_hook(effect)
        self.nature = replace(self.nature, seconds=budget_s / 1.5)  # for the guard


class FailsafeRun:
    """One world with failsafe, and what may happen to it."""

    def __init__(
        self,
        rng: random.Random,
        names: str,
        *,
        session_class: type[Session] = Session,
        core: Core | None = None,
        defects: frozenset[Defect] = frozenset(),
    ) -> None:
        self.rng = rng
        tight = rng.random() < 0.5
        self.world = world = World(
            rng.randrange(2**32),
            lease_s=LEASE_S,
            session_class=session_class,
            core=core,
            budget=TIGHT if tight else None,
            cooldown_limit_s=0.2 * LEASE_S,
            defects=defects,
            failsafe=True,
        )
        world.lan.patient = rng.random() < 0.5
        self.healed = False
        world.coordinator.clock = Clock(1 + rng.choice([-0.005, 0.0, 0.005]), 1000.0)
        world.coordinator.state = world.core.state_after_restart(
            world.coordinator.disk, world.coordinator.instant()
        )
        for name in HOSTS:
            self.add_host(name)
        for number, name in enumerate(names):
            world.after(number * 7 * TICK_S, world.agents[name].start)

    def add_host(self, name: str) -> None:
        clock = Clock(1 + self.rng.choice([-0.005, 0.0, 0.005]), self.rng.uniform(0.0, 100.0))
        host = SlowToDemote(self.world, name, clock=clock, session_id=name[0])
        self.world.agents[name] = host

    # -- read ---------------------------------------------------------------------------------

    def run(self, ticks: float) -> None:
        self.world.run(ticks * TICK_S)

    @property
    def up(self) -> list[str]:
        return [name for name, host in self.world.agents.items() if host.up]

    @property
    def holder(self) -> str | None:
        """The member that is primary, also for the coordinator."""
        tenure = self.world.coordinator.state.record.holder
        for name, host in self.world.agents.items():
            primary = host.works and host.session.role is Role.PRIMARY
            if primary and tenure is not None and tenure.instance == host.instance:
                return name
        return None

    @property
    def active(self) -> str | None:
        """The member that is primary, or somebody."""
        return self.world.primary() or self.rng.choice("ab")

    # -- links --------------------------------------------------------------------------------

    def cut(self, sender: str, receiver: str, *, cut: bool = True) -> None:
        """Lose what one end sends to another; or do not, any more."""
        if receiver == C:
            self.world.agents[sender].net.cut_out = cut
        elif sender == C:
            self.world.agents[receiver].net.cut_back = cut
        else:
            self.world.lan.cut(sender, receiver, cut=cut)

    def cut_both(self, one: str, other: str, *, cut: bool = True) -> None:
        self.cut(one, other, cut=cut)
        self.cut(other, one, cut=cut)

    def cut_until_healed(self, name: str) -> None:
        """Cut a member from the coordinator, unless this comes too late."""
        if not self.healed:
            self.cut_both(name, C)

    def stall(self, sender: str, receiver: str, ticks: int) -> None:
        """What is sent waits for so long, and then comes in any order."""
        if C in {sender, receiver}:
            net = self.world.agents[sender if receiver == C else receiver].net
            back = sender == C
        else:  # the answers of a voter
            net, back = self.world.lan.net(receiver, sender), True
        if (net.held_back if back else net.held_out) is not None:
            return
        if back:
            net.held_back = []
        else:
            net.held_out = []
        self.world.record("", f"{sender}>{receiver} stalls for {ticks} ticks")
        self.world.after(ticks * TICK_S, self.release_link, net, back)

    def release_link(self, net: "object", back: bool) -> None:  # noqa: FBT001 - a timer's argument
        held = (net.held_back if back else net.held_out) or []  # type: ignore[attr-defined]
        if back:
            net.held_back = None  # type: ignore[attr-defined]
        else:
            net.held_out = None  # type: ignore[attr-defined]
        self.rng.shuffle(held)
        for deliver, args in held:
            self.world.after(self.rng.uniform(1, 3) * TICK_S, deliver, *args)

    def mend(self, *, lan: bool = True) -> None:
        self.world.record("", "links are mended")
        for host in self.world.agents.values():
            host.net.cut_out = host.net.cut_back = False
        if lan:
            for net in self.world.lan.nets.values():
                net.cut_out = net.cut_back = False

    def set_weather(self, loss: float, spread_ticks: float, repeat: float) -> None:
        for net in [*(h.net for h in self.world.agents.values()), *self.world.lan.nets.values()]:
            net.loss, net.repeat, net.spread_s = loss, repeat, spread_ticks * TICK_S
        self.world.lan.loss, self.world.lan.repeat = loss, repeat

    # -- the coordinator ----------------------------------------------------------------------

    def submit(self, what: "object") -> None:
        self.world.coordinator.submit(what, lambda _: None)  # type: ignore[arg-type]

    def override(self, session_id: str | None) -> None:
        record = self.world.coordinator.state.record
        self.world.record("operator", f"override {session_id}")
        for known in record.sessions:
            value = RoleOverride.PRIMARY if known == session_id else RoleOverride.OFF
            if known == session_id or record.sessions[known].override is not RoleOverride.OFF:
                self.submit(SetOverride(known, value))

    def bounce_coordinator(self) -> None:
        self.world.coordinator.crash()
        self.world.after(self.rng.uniform(1, 10) * TICK_S, self.world.coordinator.restart)

    # -- hosts --------------------------------------------------------------------------------

    def start(self, name: str, *, failsafe: bool = True) -> None:
        host = self.world.agents[name]
        if not host.up:
            host.failsafe = failsafe or self.healed
            host.start()

    def crash(self, name: str) -> None:
        """Kill the agent, and mostly its guard demotes; or the whole host."""
        host = self.world.agents[name]
        if self.rng.random() < 0.7:
            host.kill_agent()
        else:
            host.kill()

    def bounce(self, name: str, *, failsafe: bool = True) -> None:
        self.crash(name)
        self.world.after(
            self.rng.uniform(1, 20) * TICK_S, lambda: self.start(name, failsafe=failsafe)
        )

    def start_second(self, name: str, *, alone: bool = True, failsafe: bool = True) -> None:
        """Start a second process of a session, on a host that mostly no other member reaches."""
        for other in HOSTS:
            if alone and other != name:
                self.cut_both(name, other)
        self.start(name, failsafe=failsafe)

    # -- the end ------------------------------------------------------------------------------

    def heal(self) -> None:
        """End all faults: one process for each session, all with failsafe, all links well."""
        self.healed = True
        self.world.record("", "everything is healed")
        self.mend()
        self.set_weather(0.0, 0.15, 0.0)
        self.world.coordinator.resume()
        self.world.coordinator.restart()
        self.override(None)
        for name, host in self.world.agents.items():
            host.thaw()
            host.thaw_agent()
            host.fit()
            if name in SECONDS or (host.up and not host.failsafe):
                host.kill_agent()
        self.start_all()

    def start_all(self) -> None:
        for name, host in self.world.agents.items():
            if host.life and name not in SECONDS and not host.up and not host.guard.claims:
                self.start(name)

    def settle(self, bound: float = BOUND) -> float:
        """Wait for a primary that stays; the ticks that took. An operator lifts where that is needed."""
        waited = 0.0
        limit = bound
        lifted = False
        while self.holder is None:
            if waited > L and not lifted and self.needs_lift:
                lifted, limit = True, waited + bound
                self.world.coordinator.lift()
            if waited > limit:
                self.world.broken(f"no primary {limit:.0f} ticks after everything was healed")
            self.start_all()
            self.run(5)
            waited += 5
        self.run(2 * L)
        if self.holder is None:
            self.world.broken("the primary did not stay")
        return waited

    @property
    def needs_lift(self) -> bool:
        """Whether nobody runs any more who may be promoted."""
        record = self.world.coordinator.state.record
        allowed = choosable_members(record)
        if record.cleared >= record.epoch or allowed is None:
            return False
        here = {host.member for host in self.world.agents.values() if host.up}
        return not here & set(allowed)


# -- faults ------------------------------------------------------------------------------------------

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
