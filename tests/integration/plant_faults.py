"""What can be done to a plant: each fault finds its target, does harm, and returns how that is ended."""

import signal
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from .disks import WRITES_OF_ETCD, WRITES_OF_STATE_FILES, slow_disk
from .network import Host
from .plant import TTL_S, Group, Plant

DELAYS_S = (0.05, 0.3, 1.5)
"""Of each write to a slow disk: below, about and above the election timeout of etcd (0.25 s)."""

SLOW_S = TTL_S / 6
"""A commit needs two writes of the leader's disk at worst, and has a third of the time to live."""

DIRECTIONS = ("both ways", "out", "in")


@dataclass(frozen=True, slots=True)
class Injected:
    """A fault that has begun: at what, how it is ended, whose roles it may move, and which agents it may end."""

    what: str
    heal: Callable[[], object]
    may_move: frozenset[str] = frozenset()
    may_end: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Target:
    """An agent that is harmed."""

    group: Group
    name: str
    is_primary: bool

    @property
    def what(self) -> str:
        return f"{self.name}, {'primary' if self.is_primary else 'secondary'} of {self.group.name}"

    def harmed(self, heal: Callable[[], object], beside: str = "") -> Injected:
        may_move = frozenset([self.group.name] if self.is_primary else [])
        what = f"{self.what}, {beside}" if beside else self.what
        return Injected(what, heal, may_move, frozenset([self.name]))


class Faults:
    """The faults of a plant. Each takes a number that chooses among its targets."""

    def __init__(self, plant: Plant) -> None:
        self._plant = plant
        self.kinds: dict[str, Callable[[int], Injected]] = {
            fault.__name__: fault
            for fault in (
                self.leader_killed,
                self.leader_frozen,
                self.leader_stopped,
                self.coordinator_killed,
                self.coordinator_frozen,
                self.server_cut_off,
                self.server_power_cut,
                self.servers_link_cut,
                self.etcd_leader_killed,
                self.etcd_leader_frozen,
                self.etcd_member_killed,
                self.etcd_leader_slow_disk,
                self.etcd_member_slow_disk,
                self.etcd_full_disk,
                self.etcd_without_majority,
                self.agent_killed,
                self.agent_frozen,
                self.agent_power_cut,
                self.agent_cut_off,
                self.agent_link_cut,
                self.agent_full_disk,
                self.agent_slow_disk,
                self.leader_and_primary_power_cut,
            )
        }

    # -- coordinators -------------------------------------------------------------------------

    def leader_killed(self, pick: int) -> Injected:
        return self._coordinator_ended(self._leader(pick), signal.SIGKILL)

    def leader_stopped(self, pick: int) -> Injected:
        return self._coordinator_ended(self._leader(pick), signal.SIGTERM)

    def leader_frozen(self, pick: int) -> Injected:
        return self._coordinator_frozen(self._leader(pick))

    def coordinator_killed(self, pick: int) -> Injected:
        return self._coordinator_ended(pick % 3, signal.SIGKILL)

    def coordinator_frozen(self, pick: int) -> Injected:
        return self._coordinator_frozen(pick % 3)

    def _leader(self, pick: int) -> int:
        return self._plant.leader_of(self._plant.groups[pick % 2])

    def _coordinator_ended(self, number: int, how: signal.Signals) -> Injected:
        plant = self._plant
        coordinator = plant.coordinators[number]
        plant.send(coordinator, signal.SIGCONT)
        plant.send(coordinator, how)
        coordinator.wait()
        return Injected(coordinator.name, lambda: plant.restart_server(number))

    def _coordinator_frozen(self, number: int) -> Injected:
        plant = self._plant
        coordinator = plant.coordinators[number]
        plant.send(coordinator, signal.SIGSTOP)
        return Injected(coordinator.name, lambda: plant.send(coordinator, signal.SIGCONT))

    # -- hosts with a coordinator and a member of etcd ----------------------------------------

    def server_cut_off(self, pick: int) -> Injected:
        may_move = self._of_both_leaders(pick % 3)
        cut = self._cut_off(self._plant.servers[pick % 3], DIRECTIONS[pick // 3 % 3])
        return replace(cut, may_move=may_move)

    def server_power_cut(self, pick: int) -> Injected:
        plant, number = self._plant, pick % 3
        may_move = self._of_both_leaders(number)
        plant.servers[number].cut_power()
        plant.etcd.kill(number)  # collects it
        plant.coordinators[number].wait()
        name = plant.servers[number].name
        return Injected(name, lambda: plant.restart_server(number), may_move)

    def _of_both_leaders(self, number: int) -> frozenset[str]:
        """The groups that a coordinator leads, if the leader of etcd is on the same host.

        That is two losses at once: the new leader of etcd gives every lease its whole time again, so the shards are
        vacant only an election and a time to live later. L = 3 s does not outlast that.
        """
        if self._etcd_leader(-1) != number:
            return frozenset()
        plant = self._plant
        return self._names(group for group in plant.groups if plant.leader_of(group) == number)

    def servers_link_cut(self, pick: int) -> Injected:
        one, other = pick % 3, (pick + 1) % 3
        servers = self._plant.servers
        return self._link_cut(servers[one], servers[other], DIRECTIONS[pick // 3 % 3])

    def _cut_off(self, host: Host, direction: str) -> Injected:
        everybody = list(self._plant.network.hosts.values())
        return self._cut(f"{host.name} {direction}", [host], everybody, direction)

    def _link_cut(self, host: Host, other: Host, direction: str) -> Injected:
        return self._cut(f"{host.name} to {other.name} {direction}", [host], [other], direction)

    def _cut(self, what: str, one: list[Host], other: list[Host], direction: str) -> Injected:
        network = self._plant.network
        mends = []
        if direction != "in":
            mends.append(network.cut(one, other))
        if direction != "out":
            mends.append(network.cut(other, one))
        return Injected(what, lambda: [mend() for mend in mends])

    # -- members of etcd ----------------------------------------------------------------------

    def etcd_leader_killed(self, pick: int) -> Injected:
        return self._etcd_killed(self._etcd_leader(pick))

    def etcd_member_killed(self, pick: int) -> Injected:
        return self._etcd_killed(pick % 3)

    def etcd_leader_frozen(self, pick: int) -> Injected:
        return self._etcd_frozen([self._etcd_leader(pick)])

    def etcd_without_majority(self, pick: int) -> Injected:
        return self._etcd_frozen([pick % 3, (pick + 1) % 3], self._names(self._plant.groups))

    def etcd_leader_slow_disk(self, pick: int) -> Injected:
        return self._etcd_slow_disk(self._etcd_leader(pick), DELAYS_S[pick % 3])

    def etcd_member_slow_disk(self, pick: int) -> Injected:
        return self._etcd_slow_disk(pick % 3, DELAYS_S[pick // 3 % 3])

    def etcd_full_disk(self, pick: int) -> Injected:
        plant, number = self._plant, pick % 3
        disk = plant.server_disks[number]
        disk.fill()

        def heal() -> None:
            disk.free()
            plant.restart_server(number)  # etcd may have given up

        return Injected(f"etcd m{number}", heal)

    def _etcd_leader(self, pick: int) -> int:
        try:
            return self._plant.etcd.leader()
        except AssertionError:  # beside another fault there may be none
            return pick % 3

    def _etcd_killed(self, number: int) -> Injected:
        plant = self._plant
        plant.etcd.kill(number)
        return Injected(f"etcd m{number}", lambda: plant.restart_server(number))

    def _etcd_frozen(self, numbers: list[int], may_move: frozenset[str] = frozenset()) -> Injected:
        etcd = self._plant.etcd
        for number in numbers:
            etcd.send(number, signal.SIGSTOP)

        def thaw() -> None:
            for number in numbers:
                etcd.send(number, signal.SIGCONT)

        return Injected(f"etcd {' '.join(f'm{n}' for n in numbers)}", thaw, may_move)

    def _etcd_slow_disk(self, number: int, delay_s: float) -> Injected:
        """A leader of etcd whose heartbeats still come just in time keeps its place and delays every write."""
        leads = self._etcd_leader(number) == number
        may_move = self._names(self._plant.groups if leads and delay_s > SLOW_S else ())
        end = slow_disk(self._plant.etcd.pid(number), WRITES_OF_ETCD, delay_s)
        return Injected(f"etcd m{number} by {delay_s:g} s", end, may_move)

    # -- agents -------------------------------------------------------------------------------

    def agent_killed(self, pick: int) -> Injected:
        target = self._agent(pick)
        agent = target.group.agents[target.name]
        self._plant.send(agent, signal.SIGKILL)
        agent.wait()
        return target.harmed(lambda: None)

    def agent_frozen(self, pick: int) -> Injected:
        target = self._agent(pick)
        agent = target.group.agents[target.name]
        self._plant.send(agent, signal.SIGSTOP)
        return target.harmed(lambda: self._plant.send(agent, signal.SIGCONT))

    def agent_power_cut(self, pick: int) -> Injected:
        target = self._agent(pick)
        target.group.cut_power(target.name)
        return target.harmed(lambda: None)

    def agent_cut_off(self, pick: int) -> Injected:
        target = self._agent(pick)
        direction = DIRECTIONS[pick // 8 % 3]
        cut = self._cut_off(target.group.hosts[target.name], direction)
        return target.harmed(cut.heal, direction)

    def agent_link_cut(self, pick: int) -> Injected:
        target = self._agent(pick)
        leader = self._plant.servers[self._plant.leader_of(target.group)]
        host = target.group.hosts[target.name]
        return self._link_cut(host, leader, DIRECTIONS[pick // 8 % 3])

    def agent_full_disk(self, pick: int) -> Injected:
        target = self._agent(pick)
        disk = target.group.disks[target.name]
        disk.fill()
        return Injected(target.what, disk.free)

    def agent_slow_disk(self, pick: int) -> Injected:
        target = self._agent(pick)
        delay_s = DELAYS_S[pick // 8 % 3]
        pid = target.group.agents[target.name].popen.pid
        end = slow_disk(pid, WRITES_OF_STATE_FILES, delay_s)
        return Injected(f"{target.what} by {delay_s:g} s", end)

    def leader_and_primary_power_cut(self, pick: int) -> Injected:
        group = self._plant.groups[pick % 2]
        target = Target(group, self._plant.primary_of(group), is_primary=True)
        leader = self._plant.leader_of(group)
        group.cut_power(target.name)
        ended = self._coordinator_ended(leader, signal.SIGKILL)
        return target.harmed(ended.heal, ended.what)

    def _agent(self, pick: int) -> "Target":
        """The primary of a group three times in four, else the other one."""
        group = self._plant.groups[pick % 2]
        primary = self._plant.primary_of(group)
        other = next(name for name in group.hosts if name != primary)
        if pick // 2 % 4 == 3:
            return Target(group, other, is_primary=False)
        return Target(group, primary, is_primary=True)

    def _names(self, groups: Iterable[Group]) -> frozenset[str]:
        return frozenset(group.name for group in groups)
