"""Schedules of faults for several coordinators, drawn from a seed, and how they are lived through."""

import asyncio
import random
from dataclasses import dataclass

from .world import LEASE_S, TTL_S, Kinds, Node, World, run_virtually

FAULTS = (
    "kill_coordinator",
    "freeze_coordinator",
    "stop_coordinator",
    "cut_etcd",
    "etcd_blip",
    "answers_lost",
    "writes_late",
    "cut_agent",
    "kill_agent",
)

END_S = 9.0


@dataclass(frozen=True)
class Fault:
    """One fault: when it begins, what, to whom, and for how long."""

    at_s: float
    kind: str
    target: int
    seconds: float


def draw(seed: int, kinds: tuple[str, ...] = FAULTS) -> list[Fault]:
    """A schedule of up to eight faults."""
    chance = random.Random(seed)
    return sorted(
        (
            Fault(
                chance.uniform(1.0, END_S - 2),
                chance.choice(kinds),
                chance.randrange(6),
                chance.choice([0.1, 0.4, 1.2, 1.7, 2.6]) * chance.uniform(0.9, 1.1),
            )
            for _ in range(chance.randint(1, 8))
        ),
        key=lambda fault: fault.at_s,
    )


async def inject(world: World, fault: Fault) -> None:
    """Let one fault begin, and end."""
    nodes = list(world.nodes.values())
    node = nodes[fault.target % len(nodes)]
    agent = world.members[fault.target % len(world.members)]
    later = asyncio.get_running_loop().call_later
    match fault.kind:
        case "kill_coordinator" | "stop_coordinator":
            if fault.kind == "stop_coordinator":
                await node.stop()
            node.kill()
            later(fault.seconds, lambda: world.spawn(node.start()))
        case "freeze_coordinator":
            node.freeze()
            later(fault.seconds, node.thaw)
        case "cut_agent":
            agent.reachable.discard(node.name)
            world.record(agent.name, f"is cut off from {node.name}")
            later(fault.seconds, agent.reachable.add, node.name)
        case "kill_agent":
            agent.kill()
            later(fault.seconds, agent.start)
        case "etcd_blip":
            for one in nodes:
                _inject_link(world, one, "cut_etcd", fault.seconds)
        case _:
            _inject_link(world, node, fault.kind, fault.seconds)


def _inject_link(world: World, node: Node, kind: str, seconds: float) -> None:
    link = node.link
    world.record(node.name, f"{kind} for {seconds:.2f} s")
    later = asyncio.get_running_loop().call_later
    match kind:
        case "cut_etcd":
            link.cut = True
            later(seconds, setattr, link, "cut", False)
        case "answers_lost":
            link.lose_answer = 0.5
            later(seconds, setattr, link, "lose_answer", 0.0)
        case "writes_late":
            link.late, link.late_s = 0.5, seconds
            later(seconds, setattr, link, "late", 0.0)
        case _:
            raise AssertionError(kind)


def live_through(
    seed: int, kinds: Kinds | None = None, only: tuple[str, ...] = FAULTS, *, live_on: bool = True
) -> World:
    """Live through the schedule of a seed; raises BrokenPromiseError, or AssertionError if no primary comes back."""
    world: World | None = None

    async def main() -> None:
        nonlocal world
        world = World(seed, kinds or Kinds(), coordinators=2 + seed % 2, shards=1)
        await world.begin()
        at_s = 0.0
        for fault in draw(seed, only):
            await world.run_for(fault.at_s - at_s)
            at_s = fault.at_s
            await inject(world, fault)
        await world.run_for(END_S - at_s)
        if live_on:
            for node in world.nodes.values():
                node.thaw()
                node.link.cut, node.link.late, node.link.lose_answer = False, 0.0, 0.0
            await world.run_for(4.0)
            await world.until(
                lambda: world.primary() is not None, 3 * LEASE_S + 2 * TTL_S, "a primary"
            )
        await world.end()

    run_virtually(main())
    assert world is not None
    return world
