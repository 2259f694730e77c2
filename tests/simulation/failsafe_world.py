"""A world with failsafe, and what may be done to it.

The unit of time is a tick, L / 200. Hosts are a, b and c; n joins later; a2 and b2 are second processes of the
sessions a and b on other hosts. What happens, and when, is in failsafe_faults.py and failsafe_runs.py.
"""

import random

from agent.core.effects import StartHook
from agent.core.group_failsafe import choosable_members
from agent.core.group_state import Input, SetOverride
from agent.core.session import Phase, Session
from agent.core.timing import Budget
from agent.model import Role, RoleOverride

from .coordinator import Core
from .defects import Defect
from .host import AgentHost
from .network import Clock, Net
from .processes import HookNature
from .world import World

LEASE_S = 2.0
TICK_S = LEASE_S / 200
L = 200
HOSTS = ("a", "b", "c", "n", "a2", "b2")
SECONDS = ("a2", "b2")
BOUND = 2.6 * L
"""Ticks within which a primary has to exist once everything is well: L, two beats, and what is still under way."""

TIGHT = Budget(margin_s=0.0101 * LEASE_S, demote_s=0.05 * LEASE_S)
"""The least margin that R1 allows."""

DEMOTION_SHARE = 0.74
"""Share of D that the slowest demotion hook takes: after 0.75 it is terminated."""

DEAF_SHARE = 0.15
QUICK_S = 0.002
QUICK_SHARE = 0.3
"""How long a quick hook takes, and how many demotions are quick."""

C = "C"
"""The coordinator, as one end of a link."""


class SlowToDemote(AgentHost):
    """A host whose promotion is quick, and whose demotion mostly takes nearly all of its budget.

    Attributes:
        deaf: the share of demotions that only KILL ends, at the very end of the budget.
    """

    deaf = DEAF_SHARE

    def start_hook(self, effect: StartHook) -> None:
        timing = self.session.timing
        budget_s = DEMOTION_SHARE * timing.demote_s
        chance = self.world.rng.random()
        quick = effect.facts.role is not Role.SECONDARY or chance < QUICK_SHARE
        deaf = not quick and self.session.phase is not Phase.STARTING and chance > 1 - self.deaf
        self.nature = HookNature(
            QUICK_S if quick else budget_s / 1.5, ("deaf",) if deaf else ("ok",)
        )
        super().start_hook(effect)
        outcomes = ("ok", "ok", "deaf") if self.deaf else ("ok",)
        self.nature = HookNature(budget_s / 1.5, outcomes)  # for the guard


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
        self.hosts: dict[str, SlowToDemote] = {}
        for name in HOSTS:
            self.add_host(name)
        for number, name in enumerate(names):
            world.after(number * 7 * TICK_S, world.agents[name].start)

    def add_host(self, name: str) -> None:
        clock = Clock(1 + self.rng.choice([-0.005, 0.0, 0.005]), self.rng.uniform(0.0, 100.0))
        host = SlowToDemote(self.world, name, clock=clock, session_id=name[0])
        self.hosts[name] = self.world.agents[name] = host

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

    def release_link(self, net: Net, back: bool) -> None:  # noqa: FBT001 - a timer's argument
        held = (net.held_back if back else net.held_out) or []
        if back:
            net.held_back = None
        else:
            net.held_out = None
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

    def submit(self, what: Input) -> None:
        self.world.coordinator.submit(what, lambda _: None)

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
        for name, host in self.hosts.items():
            host.deaf = 0.0
            host.nature = HookNature(QUICK_S)
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
