"""A simulation as a value: a plan with its faults, and the injection of each fault."""

from dataclasses import dataclass, replace

from agent.core.group_state import SetOverride
from agent.core.session import Session
from agent.core.timing import Budget
from agent.model import RoleOverride

from .coordinator import Core
from .defects import Defect
from .host import ALL_HOOKS, TASKS, AgentHost
from .network import Clock, Net
from .processes import HookNature
from .strangers import ACTS
from .world import World

NAMES = "abcdefgh"


@dataclass(frozen=True)
class Fault:
    """One fault of a plan: time from the start, kind, target, duration and variant."""

    at_s: float
    kind: str
    target: int
    seconds: float
    which: int = 0


@dataclass(frozen=True)
class Plan:
    """A simulation; the same plan gives the same transcript."""

    seed: int
    agents: int
    faults: tuple[Fault, ...] = ()
    lease_s: float = 2.0
    drift: tuple[float, ...] = (0.0, 0.0, 0.0, 0.0)
    hook_seconds: float = 0.01
    outcomes: tuple[str, ...] = ("ok",)
    children: tuple[str, ...] = ("none",)
    loss: float = 0.0
    repeat: float = 0.0
    spread_s: float = 0.003
    plain_v1: bool = False
    forgets: bool = False
    stores: int = 1
    restart_share: float | None = 0.3
    """An agent that has ended is started again after this share of L; None for never."""
    horizon: float = 12.0
    budget: Budget | None = None
    cooldown_limit_s: float | None = None
    guarded: bool = True
    failsafe: bool = False


ON_HOSTS = (
    "kill",
    "freeze",
    "stop",
    "stop_confirming",
    "unfit",
    "score",
    "override",
    "reload",
    "upgrade",
    "task_dies",
    "loop_dies",
)
ON_PROCESSES = (
    "kill_agent",
    "freeze_agent",
    "linger_agent",
    "hang_guard",
    "kill_guard",
    "kill_both",
    "fail_start",
)
ON_NETWORKS = ("cut", "cut_out", "cut_back", "slow")
ON_THE_LAN = ("cut_lan", "cut_votes", "slow_lan", "outage", "plain", "bounce")
"""Faults that concern failsafe only."""
ON_COORDINATORS = ("kill_coordinator", "pause_coordinator", "restore")
KINDS = (*ON_HOSTS, *ON_PROCESSES, *ON_NETWORKS, *ON_COORDINATORS, *ACTS)


def build(
    plan: Plan,
    session_class: type[Session] = Session,
    *,
    core: Core | None = None,
    defects: frozenset[Defect] = frozenset(),
) -> World:
    """The plan's world, with its faults scheduled."""
    world = World(
        plan.seed,
        lease_s=plan.lease_s,
        plain_v1=plan.plain_v1,
        forgets=plan.forgets,
        session_class=session_class,
        core=core,
        budget=plan.budget,
        cooldown_limit_s=plan.cooldown_limit_s,
        stores=plan.stores,
        defects=defects,
        failsafe=plan.failsafe,
    )
    world.lan.loss, world.lan.repeat = plan.loss, plan.repeat
    for coordinator in world.coordinators:
        coordinator.clock = Clock(1 + plan.drift[0], 1000.0)
        coordinator.state = world.core.state_after_restart(coordinator.disk, coordinator.instant())
    for index in range(plan.agents):
        agent = AgentHost(
            world,
            NAMES[index],
            clock=Clock(1 + plan.drift[index + 1], 50.0 * index),
            nature=HookNature(plan.hook_seconds, plan.outcomes, plan.children, plan.lease_s / 2),
            net=Net(loss=plan.loss, repeat=plan.repeat, spread_s=plan.spread_s),
        )
        if plan.stores > 1:  # members that joined different stores cannot know of each other
            agent.state_file.store_id = world.coordinator.store_id
        if plan.restart_share is not None:
            agent.restart_after_s = plan.restart_share * plan.lease_s
        agent.guard.enabled = plan.guarded
        world.agents[agent.name] = agent
        agent.start()
    for fault in plan.faults:
        world.after(fault.at_s, inject, world, fault)
    return world


def inject(world: World, fault: Fault) -> None:
    """Begin a fault, and schedule its end."""
    agents = list(world.agents.values())
    agent = agents[fault.target % len(agents)]
    if fault.kind in ACTS:
        coordinator = world.coordinators[fault.which // 8 % len(world.coordinators)]
        ACTS[fault.kind](coordinator, agent.name, fault.which)
    elif fault.kind in ON_HOSTS:
        _inject_host(world, agent, fault)
    elif fault.kind in ON_PROCESSES:
        _inject_process(world, agent, fault)
    elif fault.kind in ON_NETWORKS:
        _inject_network(world, agent, fault)
    elif fault.kind in ON_THE_LAN:
        _inject_lan(world, agent, fault)
    else:
        _inject_coordinator(world, fault)


def _inject_host(world: World, agent: AgentHost, fault: Fault) -> None:  # noqa: C901 - one arm a kind
    match fault.kind:
        case "kill":
            agent.kill()
            world.after(fault.seconds, agent.start)
        case "freeze":
            agent.freeze()
            world.after(fault.seconds, agent.thaw)
        case "stop":
            agent.stop()
        case "stop_confirming":
            agent.stops_confirming = True
        case "unfit":
            agent.unfit()
            world.after(fault.seconds, agent.fit)
        case "score":
            agent.score = 50.0 if agent.score > 50 else 100.0
        case "override":
            value = RoleOverride.PRIMARY if fault.seconds > world.lease_s / 2 else RoleOverride.OFF
            world.coordinator.submit(SetOverride(agent.name, value), lambda _: None)
        case "reload":
            agent.reload(frozenset() if agent.hooks_present else ALL_HOOKS)
        case "upgrade":
            agent.upgrade()
        case "task_dies":
            agent.dying.append(TASKS[fault.which % len(TASKS)])
        case "loop_dies":
            agent.dying.append("loop")
        case _:
            raise AssertionError(fault.kind)


def _inject_process(world: World, agent: AgentHost, fault: Fault) -> None:
    match fault.kind:
        case "kill_agent":
            agent.kill_agent()
        case "linger_agent":
            agent.kill_agent(linger_s=fault.seconds)
        case "freeze_agent":
            agent.freeze_agent()
            world.after(fault.seconds, agent.thaw_agent)
        case "hang_guard":
            agent.guard.hang(fault.seconds)
        case "kill_guard":
            agent.guard.kill()
        case "kill_both":
            agent.kill_both()
        case "fail_start":
            agent.failing_starts = 1 + fault.which % 2
            agent.kill_both()
        case _:
            raise AssertionError(fault.kind)


def _inject_network(world: World, agent: AgentHost, fault: Fault) -> None:
    net = agent.net
    if fault.kind == "slow":
        world.record(agent.name, "network slow")
        agent.net = replace(net, delay_s=0.1 * world.lease_s, spread_s=1.5 * world.lease_s)
    else:
        world.record(agent.name, f"network {fault.kind}")
        net.cut_out |= fault.kind != "cut_back"
        net.cut_back |= fault.kind != "cut_out"
    world.after(fault.seconds, mend, agent)


def _inject_lan(world: World, agent: AgentHost, fault: Fault) -> None:
    names = list(world.agents)
    peer = names[fault.which % len(names)]
    net = world.lan.net(agent.name, peer)
    match fault.kind:
        case "cut_lan":
            world.lan.cut(agent.name, peer)
            world.after(fault.seconds, net.mend)
        case "cut_votes":
            net.cut_back = True
            world.after(fault.seconds, net.mend)
        case "slow_lan":
            net.delay_s, net.spread_s = 0.05 * world.lease_s, 0.5 * world.lease_s
            world.after(fault.seconds, net.mend)
        case "outage":
            world.record("", "outage")
            for host in world.agents.values():
                host.net.cut_out = host.net.cut_back = True
                late_s = world.lease_s * 0.1 * (fault.which % 4)
                world.after(fault.seconds + late_s, mend, host)
        case "bounce" | "plain":
            agent.failsafe = fault.kind == "bounce"
            agent.kill_agent()
            world.after(0.01 * world.lease_s, agent.start)
        case _:
            raise AssertionError(fault.kind)


def mend(agent: AgentHost) -> None:
    """Restore a host's network, except for the plan's permanent loss."""
    agent.net.mend()


def _inject_coordinator(world: World, fault: Fault) -> None:
    coordinator = world.coordinators[fault.target % len(world.coordinators)]
    match fault.kind:
        case "kill_coordinator":
            coordinator.crash()
            world.after(fault.seconds, coordinator.restart)
        case "pause_coordinator":
            coordinator.pause()
            world.after(fault.seconds, coordinator.resume)
        case "restore":
            down_s = 0.1 * fault.seconds
            coordinator.crash()
            world.after(down_s, coordinator.restore_copy, fault.which)
            world.after(down_s, coordinator.restart)
            if fault.which % 2:  # again, during the grace after the restart
                again_s = down_s + world.lease_s * fault.seconds / 5
                world.after(again_s, coordinator.crash)
                world.after(again_s + 0.05, coordinator.restart)
        case _:
            raise AssertionError(fault.kind)


def end_faults(world: World) -> None:
    """End every fault."""
    for coordinator in world.coordinators:
        coordinator.resume()
        coordinator.restart()
    for agent in world.agents.values():
        for net in [*agent.nets, *world.lan.nets.values()]:
            net.mend()
            net.loss = net.repeat = 0.0
        agent.failing_starts, agent.stops_confirming = 0, False
        agent.dying.clear()
        agent.guard.go_on()
        agent.thaw()
        agent.gone(agent.life)
        agent.thaw_agent()
        agent.fit()
        agent.nature = HookNature(agent.nature.seconds)
        agent.restart_after_s = 0.1 * world.lease_s
        agent.reload(ALL_HOOKS)
        agent.start()
