"""Schedules of faults for several coordinators, drawn from a seed, and how they are run.

Faults are aimed: at the coordinator that leads or at the agent that is primary when the fault begins, rather than at
one by number. Their lengths, and the pauses between them, are multiples of what matters: the time to live of a
leadership, R, L.
"""

import random
from dataclasses import dataclass

from .small_agent import LEASE_S, RENEW_S, SmallAgent
from .virtual import outside
from .world import ADMINISTRATOR, TTL_S, Cut, Kinds, Node, World, run_virtually

WEIGHTS = {
    "cut_etcd": 4,
    "split": 4,
    "split_one_way": 2,
    "freeze_coordinator": 3,
    "kill_coordinator": 2,
    "stop_coordinator": 2,
    "writes_late": 3,
    "answers_lost": 2,
    "watch_late": 1,
    "watch_forgotten": 1,
    "etcd_compacts": 1,
    "etcd_elects": 1,
    "etcd_leader_stale": 2,
    "etcd_follower_stale": 2,
    "etcd_down": 1,
    "etcd_slow": 2,
    "cut_agent": 3,
    "kill_agent": 2,
    "answers_to_agent_lost": 2,
    "network_slow": 1,
    "switch_over": 2,
}
"""Each fault, and how often it is drawn."""

FAULTS = tuple(WEIGHTS)

LENGTHS_S = (0.1, 0.5 * TTL_S, 1.2 * TTL_S, TTL_S + RENEW_S, TTL_S + LEASE_S + 0.5)

PAUSES_S = (0.0, 0.05, 0.3, 0.6 * TTL_S, 1.3 * TTL_S, LEASE_S)
"""From the beginning of a fault to that of the next."""

SLOW_S = (0.1, 0.3, 0.4, 0.5)
"""Delays of a message to or from etcd, in times to live; with the last one a renewal comes too late."""

END_S = 9.0

LEADER, FOLLOWER, BOTH, ANY = "leader", "follower", "both", "any"
"""Whom a fault hits: the leading coordinator or the primary, others, the two leading ones, one by number."""

DEPOSES = ("cut_etcd", "freeze_coordinator", "split")
CHANGES = ("switch_over", "kill_agent")

Step = tuple[str | tuple[str, ...], str, float, float]
"""A fault, whom it hits, its length and the pause after its beginning."""

SEQUENCES: dict[str, tuple[Step, ...]] = {
    "leadership goes away and comes back": (
        (DEPOSES, LEADER, 1.3 * TTL_S, 1.5 * TTL_S),
        ("cut_agent", LEADER, LEASE_S, 0.1),
        (("freeze_coordinator", "kill_coordinator", "split"), LEADER, LEASE_S, LEASE_S),
    ),
    "the leader and the primary are alone": (("split", BOTH, TTL_S + LEASE_S + RENEW_S, LEASE_S),),
    "a change is on its way when leadership goes": (
        ("writes_late", LEADER, 1.6 * TTL_S, 0.2),
        (CHANGES, LEADER, LEASE_S, 0.2),
        (("freeze_coordinator", "kill_coordinator"), LEADER, LEASE_S, 1.5 * TTL_S),
    ),
    "changes happen whose answers are lost": (
        (("answers_lost", "writes_late"), LEADER, LEASE_S, 0.1),
        (CHANGES, LEADER, LEASE_S, 0.3),
        (CHANGES, FOLLOWER, LEASE_S, 0.5 * LEASE_S),
    ),
    "the next leader's member of etcd lags": (
        ("etcd_follower_stale", FOLLOWER, TTL_S + LEASE_S, 0.5),
        (DEPOSES, LEADER, TTL_S + LEASE_S, 1.5 * TTL_S),
    ),
    "the leader renews its lease at a deposed leader of etcd": (
        ("etcd_leader_stale", LEADER, 2 * TTL_S, 0.92 * TTL_S),
        ("split", BOTH, TTL_S + LEASE_S + RENEW_S, LEASE_S),
    ),
    "the leader renews its lease at a slow etcd": (
        ("etcd_slow", LEADER, 3 * TTL_S, 1.5 * TTL_S),
        ("split", BOTH, TTL_S + LEASE_S + RENEW_S, LEASE_S),
    ),
    "the primary dies with the leader": (
        ("kill_agent", LEADER, 2 * LEASE_S, 0.05),
        ("kill_coordinator", LEADER, LEASE_S, LEASE_S),
    ),
}
"""What brings several coordinators into danger. Lengths and pauses vary by a quarter, and other faults follow."""

DIRECTED = 0.7
"""Share of the schedules that begin with a sequence."""


@dataclass(frozen=True)
class Fault:
    """One fault: when it begins, what, to whom, and for how long."""

    at_s: float
    kind: str
    aim: str
    number: int
    seconds: float


def draw(seed: int) -> list[Fault]:
    """A schedule of up to eight faults."""
    chance = random.Random(seed)
    at_s, faults = chance.uniform(1.0, 2.5), []
    steps: list[Step] = []
    if chance.random() < DIRECTED:
        steps += chance.choice([*SEQUENCES.values()])
    steps += [_random_step(chance) for _ in range(chance.randint(1, 6))]
    for kind, aim, seconds, pause_s in steps:
        one = kind if isinstance(kind, str) else chance.choice(kind)
        seconds *= chance.uniform(0.75, 1.25)  # noqa: PLW2901 - varied
        faults.append(Fault(at_s, one, aim, chance.randrange(6), seconds))
        at_s += pause_s * chance.uniform(0.75, 1.25)
        if at_s > END_S - 1.5:
            break
    return faults


def _random_step(chance: random.Random) -> Step:
    (kind,) = chance.choices(FAULTS, [*WEIGHTS.values()])
    (aim,) = chance.choices([LEADER, FOLLOWER, BOTH, ANY], [3, 1, 1, 1])
    return kind, aim, chance.choice(LENGTHS_S), chance.choice(PAUSES_S)


def build(seed: int, kinds: Kinds | None = None) -> World:
    """The world of a seed: two or three coordinators, one to three shards, perhaps a mistake in the settings."""
    chance = random.Random(seed)
    world = World(
        seed,
        kinds or Kinds(),
        coordinators=chance.choice([2, 2, 3]),
        shards=chance.choice([1, 1, 2, 3]),
    )
    if chance.random() < 0.05:
        first, second, *_ = world.nodes.values()
        second.url = first.url
        world.record(second.name, f"has the URL of {first.name} in its settings")
    return world


class Injector:
    """Lets faults begin, and end."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.nodes = list(world.nodes.values())

    def node(self, fault: Fault) -> Node:
        leader = self.world.leader()
        others = [node for node in self.nodes if node is not leader]
        if fault.aim in (LEADER, BOTH) and leader is not None:
            return leader
        among = others if fault.aim == FOLLOWER else self.nodes
        return among[fault.number % len(among)]

    def agent(self, fault: Fault) -> SmallAgent:
        members, primary = self.world.members, self.world.primary()
        others = [agent for agent in members if agent is not primary]
        if fault.aim in (LEADER, BOTH) and primary is not None:
            return primary
        among = others if fault.aim == FOLLOWER else members
        return among[fault.number % len(among)]

    def inject(self, fault: Fault) -> None:
        """Let one fault begin, and end after its length."""
        node, agent = self.node(fault), self.agent(fault)
        match fault.kind:
            case "stop_coordinator" | "kill_coordinator" | "freeze_coordinator":
                self._inject_node(fault, node)
            case "kill_agent" | "answers_to_agent_lost" | "switch_over":
                self._inject_agent(fault, agent)
            case "cut_agent":
                self._cut({agent.name}, {node.name}, fault)
            case "split" | "split_one_way":
                self._split(fault)
            case "network_slow":
                self._slow_down(fault, node)
            case "cut_etcd":
                self._cut_etcd(node, fault)
            case "etcd_compacts" | "etcd_elects" | "etcd_down":
                self._inject_etcd(fault)
            case _:
                self._inject_link(fault, node)

    def _inject_node(self, fault: Fault, node: Node) -> None:
        match fault.kind:
            case "stop_coordinator":
                self.world.spawn(self._restart(node, fault.seconds))
            case "kill_coordinator":
                node.kill()
                outside(node.start, after_s=fault.seconds)
            case _:
                node.freeze()
                outside(node.thaw, after_s=fault.seconds)

    def _inject_agent(self, fault: Fault, agent: SmallAgent) -> None:
        world, seconds = self.world, fault.seconds
        match fault.kind:
            case "kill_agent":
                agent.kill()
                outside(agent.start, after_s=seconds)
            case "answers_to_agent_lost":
                world.record(agent.name, f"loses answers for {seconds:.2f} s")
                world.forgotten_answers[agent.name] = 0.6
                outside(world.forgotten_answers.pop, agent.name, None, after_s=seconds)
            case _:
                world.spawn(world.switch_over(agent.name))

    def _slow_down(self, fault: Fault, node: Node) -> None:
        self.world.record(node.name, f"is slow for {fault.seconds:.2f} s")
        self.world.slow[node.name] = 0.5
        outside(self.world.slow.pop, node.name, None, after_s=fault.seconds)

    async def _restart(self, node: Node, seconds: float) -> None:
        await node.stop()
        outside(node.start, after_s=seconds)

    def _cut_etcd(self, node: Node, fault: Fault) -> None:
        if fault.number % 2:
            self._cut({node.name}, {"etcd"}, fault)
            return
        node.link.cut = True
        self.world.record(node.name, f"is refused by etcd for {fault.seconds:.2f} s")
        outside(setattr, node.link, "cut", False, after_s=fault.seconds)

    def _split(self, fault: Fault) -> None:
        """Cut off a coordinator, an agent or both from the rest, of which etcd may or may not be a part."""
        node, agent = self.node(fault), self.agent(fault)
        side = {node.name, agent.name}
        if fault.aim != BOTH:
            side = [{node.name}, {agent.name}, side][fault.number % 3]
        everybody = {*self.world.nodes, *(one.name for one in self.world.members)}
        rest = {*everybody, ADMINISTRATOR} - side
        rest |= {"etcd"}
        self._cut(side, rest, fault, both_ways=fault.kind == "split")

    def _cut(self, side: set[str], rest: set[str], fault: Fault, *, both_ways: bool = True) -> None:
        cuts = [Cut(frozenset(side), frozenset(rest))]
        if both_ways:
            cuts.append(Cut(frozenset(rest), frozenset(side)))
        elif fault.number >= 3:
            cuts = [Cut(frozenset(rest), frozenset(side))]
        self.world.cuts += cuts
        way = "from" if both_ways else "one way from"
        names = f"{way} {sorted(rest)} for {fault.seconds:.2f} s"
        self.world.record("+".join(sorted(side)), f"cut off {names}")
        outside(self._heal, cuts, after_s=fault.seconds)

    def _heal(self, cuts: list[Cut]) -> None:
        self.world.cuts = [cut for cut in self.world.cuts if cut not in cuts]

    def _inject_etcd(self, fault: Fault) -> None:
        """A fault of etcd as a whole."""
        etcd = self.world.etcd
        self.world.record("etcd", fault.kind)
        match fault.kind:
            case "etcd_compacts":
                etcd.compact()
            case "etcd_elects":
                etcd.elect()
            case "etcd_down":
                self._cut({"etcd"}, set(self.world.nodes), fault)
            case _:
                raise AssertionError(fault.kind)

    def _inject_link(self, fault: Fault, node: Node) -> None:
        """A fault of one coordinator's way to etcd, or of the member of etcd at its end."""
        etcd, link, seconds = self.world.etcd, node.link, fault.seconds
        self.world.record(node.name, f"{fault.kind} for {seconds:.2f} s")
        match fault.kind:
            case "answers_lost":
                link.lose_answer = 0.5
            case "writes_late":
                link.late, link.late_s = 0.5, seconds
            case "watch_late":
                link.watch_delay_s = seconds
            case "etcd_slow":
                link.delay_s = SLOW_S[fault.number % len(SLOW_S)] * TTL_S
            case "watch_forgotten":
                link.silent_watches = link.watches
            case "etcd_leader_stale":
                link.stale_term = etcd.term
                etcd.elect()
            case "etcd_follower_stale":
                link.stale = etcd.snapshot()
            case _:
                raise AssertionError(fault.kind)
        outside(link.heal, after_s=seconds)


def live_through(seed: int, kinds: Kinds | None = None, *, live_on: bool = True) -> World:
    """Live through the schedule of a seed.

    Raises BrokenPromiseError, or AssertionError if no primary comes back, which is looked for with ``live_on``.
    """
    world: World | None = None

    async def main() -> None:
        nonlocal world
        world = build(seed, kinds)
        injector = Injector(world)
        await world.begin()
        try:
            at_s = 0.0
            for fault in draw(seed):
                await world.run_for(fault.at_s - at_s)
                at_s = fault.at_s
                injector.inject(fault)
            await world.run_for(END_S - at_s)
            if live_on:
                await _recover(world)
        finally:
            await world.end()

    run_virtually(main())
    assert world is not None
    return world


async def _recover(world: World) -> None:
    """End all faults; a primary has to come back."""
    world.cuts.clear()
    world.slow.clear()
    world.forgotten_answers.clear()
    for node in world.nodes.values():
        node.thaw()
        node.link.heal()
        node.start()
    await world.run_for(4.0)
    await world.until(lambda: world.primary() is not None, 3 * LEASE_S + 2 * TTL_S, "a primary")
