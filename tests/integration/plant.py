"""A plant for random faults: three hosts with etcd and a coordinator each, four with an agent, in two groups.

Owns the processes and hosts, what each fault does to them, and what *whole* means. Knows nothing of schedules.
"""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from http.client import HTTPException
from pathlib import Path
from typing import Any

from tests.etcd import EtcdServer, Place, an_etcd

from . import writer
from .disks import Disk, strace
from .network import Host, Network
from .outputs import Outputs
from .requests import Reply, request
from .stage import Agent, Coordinator, Stage, until
from .workloads import START, STOP

PORT = 5470
TTL_S = 1
"""leadership_ttl: with half a second of etcd and one beat it fits into R."""

TIMING = ("--failover-timeout=3", "--demote=0.25", "--margin=0.6", "--beat=0.3")
"""L = 3 s, R = 2.15 s."""

COOLDOWN = ("--cooldown=1", "--cooldown-limit=4")
LATELY_S = 0.5
"""A workload that writes each 5 ms and has not for so long is not running, or the machine is overloaded."""

SETTLED_S = 1.0
"""A primary is there if it stays for so long: the workload of one that was killed is stopped by its guard first."""

LOOK_S = 0.05
WHOLE_S = 60.0
"""Time until everything runs again, a member of the group that had to be started again included."""


def _waited_s(pid: int) -> float:
    """How long the main thread of a process has been ready to run and did not."""
    with suppress(OSError):
        return int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) / 1e9
    return 0.0


class PlacedStage(Stage):
    """A group whose processes are on hosts of the network."""

    def __init__(self, directory: Path, group: str, places: Mapping[str, Host]) -> None:
        super().__init__(directory, group)
        self._places = places

    def spawn(
        self, name: str, *command: str, before: Sequence[str] = (), **variables: str
    ) -> tuple[subprocess.Popen[bytes], Path, int]:
        before = (*self._places[name].before, *before)
        return super().spawn(name, *command, before=before, **variables)


class Group:
    """Two agents on two hosts. Hooks start and stop the workload of the first group, ``exec`` that of the second."""

    def __init__(
        self, stage: PlacedStage, hosts: Sequence[Host], disks: Sequence[Disk], *, by_exec: bool
    ) -> None:
        self.stage = stage
        self.name = stage.group
        self.hosts = {host.name: host for host in hosts}
        self.disks = dict(zip(self.hosts, disks, strict=True))
        self.agents: dict[str, Agent] = {}
        self.exit_codes: list[tuple[str, int]] = []
        self.outputs = Outputs([self._output(name) for name in self.hosts])
        self._by_exec = by_exec

    def _output(self, name: str) -> Path:
        return self.stage.directory / f"{name}.output"

    def start(self, name: str, endpoints: Sequence[str]) -> None:
        """Start the agent of a host, for the first time or again."""
        output = self._output(name)
        workload = [sys.executable, "-S", "-E", writer.__file__, str(output), name]
        progress = {"type": "file_time", "path": str(output), "interval": 0.3}
        state_file = self.disks[name].path / "state.json"
        pid_file = self.stage.directory / f"{name}.pid"
        bodies = {"primary": "", "secondary": ""}
        if not self._by_exec:
            bodies["primary"] = START.format(writer=" ".join(workload), pid_file=pid_file)
            bodies["secondary"] = STOP.format(pid_file=pid_file)
        hooks = {event: self.stage.hook(name, event, body) for event, body in bodies.items()}
        words = [
            "exec" if self._by_exec else "run",
            f"--group={self.name}",
            f"--session-id={name}",
            f"--state-file={state_file}",
            *(f"--endpoint={endpoint}" for endpoint in endpoints),
            *(f"--hook-{event}={path}" for event, path in hooks.items()),
            f"--progress={json.dumps(progress)}",
            *TIMING,
            *COOLDOWN,
            *(["--", *workload] if self._by_exec else []),
        ]
        agent = Agent(name, *self.stage.spawn(name, *words), state_file)
        self.agents[name] = self.stage.adopt(agent)

    def cut_power(self, name: str) -> None:
        """Kill all that runs on an agent's host at once: agent, guard and workload."""
        self.hosts[name].cut_power()
        self.agents[name].wait()

    def check_promise(self) -> list[int]:
        """No two workloads wrote at a time, and promotions have increasing epochs; these.

        Not by demotion hooks: one that is killed at its limit does not note its end, and the agent or its guard
        kills the workload in its place.
        """
        self.outputs.read()
        overlap_s = self.outputs.overlap_s()
        assert overlap_s <= 0, f"{self.name}: two workloads wrote for {overlap_s:.3f} s"
        begun = [
            event.facts["epoch"]
            for event in self.stage.events()
            if (event.what, event.which) == ("begin", "primary")
        ]
        assert begun == sorted(set(begun)), f"epochs of {self.name} do not increase: {begun}"
        return begun


class Plant:
    """Everything that can fail."""

    def __init__(self, stack: ExitStack, directory: Path) -> None:
        self._stack = stack
        names = [f"coordinator-{n}" for n in (1, 2, 3)]
        agents = [f"agent-{n}" for n in (1, 2, 3, 4)]
        strace()  # before everything else is started
        network = Network(stack, [*names, *agents, "client"])
        self.network = network
        self.servers = [network.hosts[name] for name in names]
        self.client = network.hosts["client"]
        self.server_disks = [Disk(stack, directory / name, "160m") for name in names]
        self._directory = directory
        self.endpoints = [
            f"http://{host.address}:{PORT}/api/v1/clientfailover" for host in self.servers
        ]
        self.groups: list[Group] = []
        for number, name in enumerate(("line-1", "line-2")):
            (directory / name).mkdir()
            hosts = [network.hosts[agent] for agent in agents[2 * number : 2 * number + 2]]
            places = {host.name: host for host in hosts}
            stage = stack.enter_context(PlacedStage(directory / name, name, places))
            disks = [Disk(stack, directory / host.name, "1m") for host in hosts]
            self.groups.append(Group(stage, hosts, disks, by_exec=number == 1))
        self._stage = stack.enter_context(
            PlacedStage(directory, "none", dict(zip(names, self.servers, strict=True)))
        )
        self._leaders = {group.name: 0 for group in self.groups}
        self._primaries = {group.name: next(iter(group.hosts)) for group in self.groups}
        self.etcd: EtcdServer
        self.coordinators: list[Coordinator] = []

    def start(self) -> None:
        """Start everything, and wait until it works. Called on the client's host, as all that asks."""
        places = [
            Place(host.address, disk.path, host.before)
            for host, disk in zip(self.servers, self.server_disks, strict=True)
        ]
        # Snapshots are written often, so that a full disk is met soon. With pre-vote, which is the default from
        # 3.5 on, a member that comes back does not depose the leader.
        flags = ("--snapshot-count=20", "--pre-vote")
        self.etcd = self._stack.enter_context(an_etcd(self._directory, places=places, flags=flags))
        self.coordinators = [self.serve(number) for number in range(3)]
        for group in self.groups:
            for name in group.hosts:
                group.start(name, self.endpoints)
        self.until_whole()

    def serve(self, number: int) -> Coordinator:
        """Start a coordinator."""
        host = self.servers[number]
        words = [
            "serve",
            f"--listen={host.address}:{PORT}",
            "--insecure",
            f"--advertise=http://{host.address}:{PORT}",
            "--store=etcd",
            "--shards=2",
            f"--leadership-ttl={TTL_S}",
            *(f"--etcd-endpoint={url}" for url in self.etcd.urls),
        ]
        spawned = self._stage.spawn(host.name, *words)
        coordinator = Coordinator(host.name, *spawned, self.endpoints[number], "none")
        return self._stage.adopt(coordinator)

    def restart_server(self, number: int) -> None:
        """Start what has ended on a coordinator's host."""
        if self.etcd.has_ended(number):
            self.etcd.start(number)
        if self.coordinators[number].popen.poll() is not None:
            self.coordinators[number] = self.serve(number)

    # -- what is so ---------------------------------------------------------------------------

    def ask(self, number: int, method: str, path: str, body: object = None) -> Reply | None:
        """What a coordinator answers, or None if it does not."""
        with suppress(OSError, HTTPException):
            return request(method, f"{self.endpoints[number]}/{path}", body)
        return None

    def status(self, group: Group, asked: Sequence[int] = (0, 1, 2)) -> Mapping[str, Any]:
        """The status of a group by the first coordinator that has one, or nothing."""
        for number in asked:
            reply = self.ask(number, "GET", f"groups/{group.name}/status")
            if reply is not None and reply.status == 200:
                return dict(reply.body)
        return {}

    def leader_of(self, group: Group) -> int:
        """Which coordinator leads the shard of a group, as far as that is known."""
        urls = [endpoint.partition("/api")[0] for endpoint in self.endpoints]
        leader = self.status(group).get("Leader")
        if leader in urls:
            self._leaders[group.name] = urls.index(leader)
        return self._leaders[group.name]

    def primary_of(self, group: Group) -> str:
        """The session that is primary, or was when that was last known."""
        primary = self.status(group).get("Primary", self._primaries[group.name])
        self._primaries[group.name] = primary
        return str(primary)

    def epochs(self) -> dict[str, int]:
        """The newest epoch of each group."""
        return {group.name: max(group.outputs.spans, default=0) for group in self.groups}

    # -- recovery -----------------------------------------------------------------------------

    def restart_what_has_ended(self) -> None:
        """As systemd does: a guard may have killed its agent, or an agent have given up."""
        for group in self.groups:
            for name, agent in list(group.agents.items()):
                if (code := agent.popen.poll()) is not None:
                    group.exit_codes.append((name, code))
                    group.start(name, self.endpoints)

    def has_primary(self, group: Group, asked: Sequence[int] = (0, 1, 2)) -> bool:
        """Whether the workload of the primary that a coordinator names writes now."""
        status = self.status(group, asked)
        if "Primary" not in status or "PendingPrimary" in status:
            return False
        return group.outputs.writes(status["Epoch"], LATELY_S)

    def until_primaries(self, within_s: float) -> float:
        """Wait until each group has a primary that stays; how long it took until it was there.

        Fails after the bound. The longest time that one of them has waited for a processor does not count.
        """
        began = time.monotonic()
        waits = self.waits()
        there: float | None = None
        while there is None or time.monotonic() - there < SETTLED_S:
            self.restart_what_has_ended()
            if all(self.has_primary(group) for group in self.groups):
                there = there or time.monotonic()
            else:
                there = None
                took_s = time.monotonic() - began
                if took_s > within_s:
                    waited_s = self.waited_s(waits)
                    assert took_s < within_s + waited_s, (
                        f"no primary {took_s:.1f} s after a heal, {waited_s:.1f} s of it without a processor"
                    )
            time.sleep(LOOK_S)
        return there - began

    def waits(self) -> dict[int, float]:
        """For how many seconds each agent and coordinator has waited for a processor so far."""
        processes = [*self.coordinators, *(one for g in self.groups for one in g.agents.values())]
        return {one.popen.pid: _waited_s(one.popen.pid) for one in processes}

    def starved_s(self, before: Mapping[int, float]) -> float:
        """The most that a process which runs since then has waited."""
        now = self.waits()
        return max((now[pid] - before[pid] for pid in now.keys() & before.keys()), default=0.0)

    def waited_s(self, before: Mapping[int, float]) -> float:
        """The most that any process has waited since then, also one that was started meanwhile."""
        return max(now - before.get(pid, 0.0) for pid, now in self.waits().items())

    def is_whole(self) -> bool:
        """Whether every process runs and does its part."""
        self.restart_what_has_ended()
        for number, url in enumerate(self.etcd.urls):
            if not self.etcd.is_healthy(url) or not self._is_ready(number):
                return False
            for group in self.groups:
                if not self.has_primary(group, [number]):
                    return False
        return all(self._takes_part(group) for group in self.groups)

    def _is_ready(self, number: int) -> bool:
        base = self.endpoints[number].partition("/api")[0]
        with suppress(OSError, HTTPException):
            reply = request("GET", f"{base}/readyz")
            return (
                reply.status == 200
                and len(reply.body["Coordinators"]) == 3
                and not reply.body["ShardsWithoutLeader"]
            )
        return False

    def _takes_part(self, group: Group) -> bool:
        """Whether both agents send heartbeats."""
        reply = self.ask(0, "GET", f"groups/{group.name}/clientsessions")
        sessions = reply.body if reply is not None and reply.status == 200 else []
        return {one["Id"] for one in sessions if one["Active"] and one["HeartbeatPosted"]} == set(
            group.hosts
        )

    def until_whole(self) -> None:
        until(self.is_whole, "the plant to be whole", WHOLE_S)

    def check_history(self) -> None:
        """Every tenure that a hook has seen is in the history."""
        for group in self.groups:
            epochs = group.check_promise()
            reply = self.ask(0, "GET", f"groups/{group.name}/history?count=1000")
            assert reply is not None
            kept = {entry["Epoch"] for entry in reply.body}
            assert set(epochs[-900:]) <= kept, f"tenures of {group.name} are lost"

    def send(self, process: Coordinator | Agent, number: signal.Signals) -> None:
        """Signal a process that may have ended."""
        if process.popen.poll() is None:
            process.send(number)
