"""Random faults at real processes: three etcd members, three coordinators, four agents in two groups.

Agents are killed, frozen and cut off; coordinators are killed, frozen and stopped; etcd's members are killed and
frozen, a majority of them too. Whatever happens, no two members of a group are active, epochs increase,
every tenure that a hook has seen stays in the history, and each group has a primary again after the faults.

FAILOVER_SOAK_S is its length in seconds, and FAILOVER_SOAK_SEED chooses the faults:

    FAILOVER_SOAK_S=1800 .venv/bin/pytest -s tests/integration/test_soak.py
"""

import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.etcd import EtcdServer, an_etcd

from .stage import Agent, Coordinator, Gate, Stage, free_port, until

SOAK_S = float(os.environ.get("FAILOVER_SOAK_S", "60"))
SEED = int(os.environ.get("FAILOVER_SOAK_SEED", "0")) or random.SystemRandom().getrandbits(31)

TIMING = ("--failover-timeout=3", "--demote=0.25", "--margin=0.6", "--beat=0.3")
COOLDOWN = ("--cooldown=1", "--cooldown-limit=4")
TTL_S = 1
FAULT_S = (0.3, 4.0)
"""Length of a fault: from one that nobody may notice to one that ends leases and leaderships."""

CALM_S = (0.5, 3.0)
"""Time between two faults; sometimes too short to recover from the first."""

HEALED_S = 30.0
"""Within this after the last fault each group has a primary: a lease, a leadership, the start of processes, and
the cool-down of a member whose promotion was interrupted."""


@dataclass
class Group:
    """Two agents, each behind gates of its own to every coordinator."""

    stage: Stage
    gates: dict[str, list[Gate]]
    agents: dict[str, Agent] = field(default_factory=dict)

    def start(self, name: str) -> None:
        endpoints = [gate.endpoint for gate in self.gates[name]]
        self.agents[name] = self.stage.run(name, *endpoints, timing=TIMING, flags=COOLDOWN)


class Plant:
    """Everything that can fail. Each fault returns what ends it."""

    def __init__(self, directory: Path, etcd: EtcdServer, chance: random.Random) -> None:
        self.etcd = etcd
        self.chance = chance
        self.stages = []
        for name in ("line-1", "line-2"):
            (directory / name).mkdir()
            self.stages.append(Stage(directory / name, name))
        self._flags = [f"--etcd-endpoint={url}" for url in etcd.urls]
        self._flags += [f"--leadership-ttl={TTL_S}", "--shards=2"]
        self.coordinators = [self._serve(free_port()) for _ in range(3)]
        self.groups = []
        for stage in self.stages:
            gates = {
                name: [Gate(stage, one.endpoint) for one in self.coordinators]
                for name in ("host-a", "host-b")
            }
            self.groups.append(Group(stage, gates))
            for name in gates:
                self.groups[-1].start(name)
        self.faults: tuple[Callable[[], Callable[[], object]], ...] = (
            self.agent_killed,
            self.agent_frozen,
            self.agent_cut_off,
            self.coordinator_killed,
            self.coordinator_frozen,
            self.coordinator_stopped,
            self.etcd_killed,
            self.etcd_frozen,
            self.etcd_without_majority,
        )

    def _serve(self, port: int) -> Coordinator:
        advertise = f"--advertise=http://127.0.0.1:{port}"
        return self.stages[0].serve(*self._flags, advertise, port=port, store="etcd")

    # -- faults -------------------------------------------------------------------------------

    def _an_agent(self) -> tuple[Group, Agent]:
        group = self.chance.choice(self.groups)
        return group, group.agents[self.chance.choice(("host-a", "host-b"))]

    def agent_killed(self) -> Callable[[], object]:
        group, agent = self._an_agent()
        agent.send(signal.SIGKILL)
        agent.wait()
        return lambda: group.start(agent.name)

    def agent_frozen(self) -> Callable[[], object]:
        group, agent = self._an_agent()
        agent.send(signal.SIGSTOP)

        def thaw() -> None:
            if agent.popen.poll() is None:
                agent.send(signal.SIGCONT)
            else:  # its guard has killed it
                group.start(agent.name)

        return thaw

    def agent_cut_off(self) -> Callable[[], object]:
        group, agent = self._an_agent()
        gates = group.gates[agent.name]
        for gate in gates:
            gate.close()

        def reconnect() -> None:
            for gate in gates:
                gate.open()

        return reconnect

    def coordinator_killed(self) -> Callable[[], object]:
        return self._coordinator_ended(signal.SIGKILL)

    def coordinator_stopped(self) -> Callable[[], object]:
        return self._coordinator_ended(signal.SIGTERM)

    def _coordinator_ended(self, how: signal.Signals) -> Callable[[], object]:
        number = self.chance.randrange(3)
        one = self.coordinators[number]
        port = int(one.endpoint.split(":")[2].split("/")[0])
        one.send(how)
        one.wait()

        def serve() -> None:
            self.coordinators[number] = self._serve(port)

        return serve

    def coordinator_frozen(self) -> Callable[[], object]:
        one = self.chance.choice(self.coordinators)
        one.send(signal.SIGSTOP)
        return lambda: one.send(signal.SIGCONT)

    def etcd_killed(self) -> Callable[[], object]:
        member = self.chance.randrange(3)
        self.etcd.kill(member)
        return lambda: self.etcd.start(member)

    def etcd_frozen(self) -> Callable[[], object]:
        return self._etcd_frozen(1)

    def etcd_without_majority(self) -> Callable[[], object]:
        return self._etcd_frozen(2)

    def _etcd_frozen(self, count: int) -> Callable[[], object]:
        members = self.chance.sample(range(3), count)
        for member in members:
            self.etcd.send(member, signal.SIGSTOP)

        def thaw() -> None:
            for member in members:
                self.etcd.send(member, signal.SIGCONT)

        return thaw

    # -- what has to be so --------------------------------------------------------------------

    def restart_ended_agents(self) -> None:
        """As systemd does: a guard may have killed its agent, or an agent have given up."""
        for group in self.groups:
            for name, agent in group.agents.items():
                if agent.popen.poll() is not None:
                    group.start(name)

    def check_promise(self) -> None:
        for stage in self.stages:
            stage.check_promise()

    def check_recovery(self) -> None:
        """Each group has a primary, which a coordinator confirms, and nothing of its history is lost."""
        for group in self.groups:

            def confirmed(group: Group = group) -> bool:
                self.restart_ended_agents()
                primary = [
                    name
                    for name, agent in group.agents.items()
                    if agent.state.get("role") == "Primary" and agent.popen.poll() is None
                ]
                path = f"groups/{group.stage.group}/status"
                answer = self.coordinators[0].ask("GET", path)
                return len(primary) == 1 and answer.body.get("Primary") == primary[0]

            until(confirmed, f"a primary of {group.stage.group}", HEALED_S)
            epochs = group.stage.check_promise()
            path = f"groups/{group.stage.group}/history?count=1000"
            history = self.coordinators[1].ask("GET", path).body
            assert set(epochs) <= {entry["Epoch"] for entry in history}, "tenures are lost"

    def end(self) -> None:
        for stage in self.stages:
            stage.__exit__(None, None, None)


@pytest.mark.timeout(SOAK_S + 180)
def test_never_two_and_soon_one_whatever_fails(tmp_path: Path) -> None:
    print(f"FAILOVER_SOAK_SEED={SEED}")  # noqa: T201 - to repeat it
    chance = random.Random(SEED)
    happened = []
    with an_etcd(tmp_path, members=3) as etcd:
        plant = Plant(tmp_path, etcd, chance)
        try:
            plant.check_recovery()
            end_at = time.monotonic() + SOAK_S
            while time.monotonic() < end_at:
                fault = chance.choice(plant.faults)
                length_s = chance.uniform(*FAULT_S)
                happened.append(f"{fault.__name__} {length_s:.1f} s")
                heal = fault()
                time.sleep(length_s)
                heal()
                plant.restart_ended_agents()
                time.sleep(chance.uniform(*CALM_S))
                plant.check_promise()
            plant.check_recovery()
        except AssertionError as error:
            error.add_note(f"FAILOVER_SOAK_SEED={SEED}: {'; '.join(happened)}")
            raise
        finally:
            plant.end()
    print(f"{len(happened)} faults: {'; '.join(happened)}")  # noqa: T201 - what was shown
