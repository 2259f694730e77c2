"""Three members with failsafe and a coordinator, each on a host of a LAN of its own; the workload writes lines.

Owns how they are started and what can be read of them. Knows nothing of what is right.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from .lan import Lan, LanHost, a_lan
from .stage import PATIENCE_S, Agent, Coordinator, Said, Stage, ask, until
from .workloads import output, start, writes
from .writer import written

LEASE_S = 5.0
TIMING = ("--failover-timeout=5", "--demote=1", "--margin=1.2")
"""L = 5 s, R = 2.8 s: a question each 0.47 s, and a margin that a busy machine does not use up."""

COORDINATOR = "coordinator"
MEMBERS = ("host-a", "host-b", "host-c")
PORT = 5480


class LanCoordinator(Coordinator):
    """A coordinator that is asked from its own host."""

    host: LanHost

    def ask(self, method: str, path: str, body: object = None) -> Said:
        return self.host.call(lambda: ask(method, f"{self.endpoint}/{path}", body))


@dataclass
class Plant:
    """A coordinator, its members, and the LAN between them.

    Attributes:
        agents: the newest process of each member.
    """

    stage: Stage
    lan: Lan
    coordinator: LanCoordinator
    agents: dict[str, Agent] = field(default_factory=dict)

    def run(self, name: str, *flags: str, timing: Sequence[str] = TIMING) -> Agent:
        """Start a member, with failsafe; its workload is the writer."""
        host = self.lan.hosts[name]
        self.agents[name] = start(
            self.stage,
            name,
            self.coordinator,
            flags=(*failsafe_flags(self.stage, host), *flags),
            command=writes(self.stage, name),
            timing=timing,
            before=host.before,
        )
        return self.agents[name]

    def run_all(self, *flags: str, timing: Sequence[str] = TIMING) -> str:
        """Start all members; the name of the primary, once it could keep the role without the coordinator."""
        for name in MEMBERS:
            self.run(name, *flags, timing=timing)
        return self.until_ready()

    def until_ready(self) -> str:
        """The name of the primary, once failsafe is ready at it."""

        def found() -> str | None:
            for name, agent in self.agents.items():
                assert agent.popen.poll() is None, agent.said()
                ready = failsafe_state(agent) == "ready"
                if agent.state.get("role") == "Primary" and ready and self.all_are_used():
                    return name
            return None

        try:
            return until(found, "failsafe to be ready", 2 * PATIENCE_S)
        except AssertionError as error:
            raise AssertionError(f"{error}: {[a.state for a in self.agents.values()]}") from None

    def all_are_used(self) -> bool:
        """Whether the coordinator knows that the primary asks each member."""
        used = self.coordinator.status()["Failsafe"].get("Members") or []
        return {member["Id"] for member in used} == set(self.agents)

    def others(self, name: str) -> list[str]:
        """The members beside this one."""
        return [other for other in self.agents if other != name]

    def members(self, name: str) -> list[dict[str, Any]]:
        """The other members that a primary asks."""
        return list((self.agents[name].state.get("failsafe") or {}).get("members", []))

    def until_failsafe(self, name: str, state: str) -> None:
        agent = self.agents[name]
        try:
            until(lambda: failsafe_state(agent) == state, f"failsafe of {name} to be {state}")
        except AssertionError as error:
            raise AssertionError(f"{error}: {agent.state}\n{agent.said()}") from None

    def restart_coordinator(self) -> None:
        """Start it again on the same data."""
        self.coordinator = serve(self.stage, self.lan)

    def gap_s(self, since_s: float) -> float:
        """The longest pause in the lines of the workloads since a moment of the monotonic clock."""
        moments = [since_s, *(line.at_s for line in written(output(self.stage)))]
        return max(
            after - before for before, after in pairwise(sorted(moments)) if after >= since_s
        )

    def writers(self, since_s: float) -> set[tuple[int, str]]:
        """Epoch and host of each line since a moment."""
        lines = written(output(self.stage))
        return {(line.epoch, line.host) for line in lines if line.at_s >= since_s}


def failsafe_state(agent: Agent) -> str | None:
    """The state of failsafe in the state file."""
    state: str | None = (agent.state.get("failsafe") or {}).get("state")
    return state


def failsafe_flags(stage: Stage, host: LanHost) -> tuple[str, ...]:
    secret = stage.directory / "failsafe-secret"
    if not secret.exists():
        secret.touch(0o600)
        secret.write_text("a secret of the whole group\n")
    return f"--failsafe-listen={host.address}:{PORT}", f"--failsafe-secret-file={secret}"


def serve(stage: Stage, lan: Lan, *flags: str) -> LanCoordinator:
    """Start a coordinator with a durable store, on its own host."""
    host = lan.hosts[COORDINATOR]
    words = ("serve", f"--listen={host.address}:5470", "--insecure", "--store=sqlite", *flags)
    words = (*words, f"--data-dir={stage.directory / 'data'}")
    endpoint = f"http://{host.address}:5470/api/v1/clientfailover"
    spawned = stage.spawn(COORDINATOR, *words, before=host.before)
    coordinator = LanCoordinator(COORDINATOR, *spawned, endpoint, stage.group)
    coordinator.host = host
    stage.adopt(coordinator)
    coordinator.until_said("coordinator listening")
    return coordinator


@contextlib.contextmanager
def a_plant(directory: Path, *more: str) -> Iterator[Plant]:
    """The LAN and the coordinator; ``more`` are hosts beside the members'."""
    with a_lan(COORDINATOR, *MEMBERS, *more) as lan, Stage(directory) as stage:
        yield Plant(stage, lan, serve(stage, lan))
