"""What the loss of a coordinator costs, by the workloads' own output. A script: it needs a quiet machine.

    .venv/bin/python -m tests.bench.coordinator_loss [--kills 50] [--pairs 20] [--stops 10] [--rounds 15]

On a busy machine give it priority, and a directory in memory: ``TMPDIR=/dev/shm nice -n -10``.

Three members of etcd, three coordinators with ``leadership_ttl`` 1 s, and two groups of two agents with FailoverTimeout
3 s, all on loopback. Each agent's workload notes every 5 ms that it lives. Exit code 1 if a limit is missed:

- SIGKILL of the coordinator that leads a group, while all primaries live: no role changes.
- SIGKILL of that coordinator together with a primary, its guard and its workload: another workload writes within
  ``leadership_ttl`` + FailoverTimeout + 1 s.
- SIGTERM to that coordinator: the others lead its shards within 0.3 s (median), by their own log.
- An override of the other member, and a power cut of the primary's host, each time beside a single coordinator on
  SQLite: from the request or the cut to the first line of the next workload, within 0.1 s of one another (medians).
"""

import argparse
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from functools import partial
from pathlib import Path
from statistics import median

import click

from tests.etcd import EtcdServer, an_etcd
from tests.integration import workloads, writer
from tests.integration.outputs import Outputs
from tests.integration.stage import Agent, Coordinator, Stage, ask, free_port, until

L_S, TTL_S = 3.0, 1
TIMING = ("--failover-timeout=3", "--demote=0.25", "--margin=0.6", "--beat=0.3")
"""R is 2.15 s: longer than TTL_S, half a second of etcd and a beat together."""

SLACK_S = 1.0
HANDOVER_S = 0.3
BESIDE_S = 0.1
LATELY_S = 0.3
LOOK_S = 0.02
SETTLE_S = 2.5
"""Longer than R: what a lost leader has done to a role shows by then."""

HOSTS = ("host-a", "host-b")


class Cell:
    """One group: two agents with a workload each, and the coordinators that they ask."""

    def __init__(self, directory: Path, name: str, coordinators: list[Coordinator]) -> None:
        directory.mkdir()
        self.stage = Stage(directory, name)
        self.coordinators = coordinators
        self._files = {host: directory / f"{host}.output" for host in HOSTS}
        self.outputs = Outputs(list(self._files.values()))
        self.agents: dict[str, Agent] = {}

    def start(self, host: str) -> None:
        """Start an agent, and wait until it has joined."""
        first, *others = self.coordinators
        command = [sys.executable, "-S", "-E", writer.__file__, str(self._files[host]), host]
        flags = [f"--endpoint={one.endpoint}" for one in others]
        agent = workloads.start(
            self.stage, host, first, command=command, flags=flags, timing=TIMING
        )
        self.agents[host] = agent
        agent.until_said("guard ready pid=")
        agent.until_said("joined")

    def primary(self) -> tuple[int, str]:
        """Epoch and host of the workload that writes now; an agent that has given up is started again."""
        for host, agent in self.agents.items():
            if (code := agent.popen.poll()) is not None:
                click.echo(f"the agent of {host} has ended with {code}", err=True)
                self.start(host)

        def found() -> int | None:
            self.outputs.read()
            newest = max(self.outputs.spans, default=0)
            return newest if newest and self.outputs.writes(newest, LATELY_S) else None

        epoch = until(found, f"a workload of {self.stage.group}")
        return epoch, self.outputs.spans[epoch].host

    def successor_s(self, epoch: int, since_s: float) -> float:
        """From a moment to the first line under a later epoch."""

        def found() -> float | None:
            self.outputs.read()
            later = [span.first_s for e, span in self.outputs.spans.items() if e > epoch]
            return min(later, default=None)

        return until(found, f"a successor of epoch {epoch}") - since_s

    def cut_power(self, host: str) -> None:
        """SIGKILL to agent, guard and workload of a host."""
        agent = self.agents[host]
        guard = workloads.guard_of(agent)
        epoch, _ = self.primary()
        for pid in (guard, agent.popen.pid, self.outputs.spans[epoch].pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        agent.wait()

    def leader(self) -> int:
        """Which coordinator leads the group."""
        urls = [one.endpoint.partition("/api")[0] for one in self.coordinators]

        def found() -> int | None:
            for one in self.coordinators:
                with suppress(OSError):
                    answer = one.ask("GET", f"groups/{self.stage.group}/status")
                    if answer.status == 200 and answer.body.get("Leader") in urls:
                        return urls.index(answer.body["Leader"]) + 1
            return None

        return until(found, f"a leader of {self.stage.group}") - 1

    def overlap_s(self) -> float:
        self.outputs.read()
        return self.outputs.overlap_s()


class Cluster:
    """Three coordinators over etcd."""

    def __init__(self, stage: Stage, etcd: EtcdServer) -> None:
        self._stage = stage
        self._flags = [f"--etcd-endpoint={url}" for url in etcd.urls]
        self._flags += [f"--leadership-ttl={TTL_S}", "--shards=3"]
        self._ports = [free_port() for _ in range(3)]
        self.coordinators = [self._serve(port) for port in self._ports]
        self.wait_until_shared()

    def _serve(self, port: int) -> Coordinator:
        advertise = f"--advertise=http://127.0.0.1:{port}"
        return self._stage.serve(*self._flags, advertise, port=port, store="etcd")

    def restart(self, number: int) -> None:
        """Start one again, and wait until all share the shards."""
        self.coordinators[number] = self._serve(self._ports[number])
        self.wait_until_shared()

    def wait_until_shared(self) -> None:
        def shared() -> bool:
            with suppress(OSError):
                bases = [one.endpoint.partition("/api")[0] for one in self.coordinators]
                ready = [ask("GET", f"{base}/readyz").body for base in bases]
                return all(len(one.get("ShardsLed", ())) == 1 for one in ready)
            return False

        until(shared, "a shard for each coordinator")


class Results:
    """What is printed, and whether every limit was kept."""

    def __init__(self) -> None:
        self.missed = False

    def show(self, text: str, limit: str, *, kept: bool) -> None:
        self.missed |= not kept
        click.echo(f"{text}   {limit}: {'yes' if kept else 'NO'}")


def spread(times: Sequence[float]) -> str:
    return f"median {median(times):.3f} s, max {max(times):.3f} s"


def kills(cluster: Cluster, cells: Sequence[Cell], rounds: int, results: Results) -> None:
    """SIGKILL of leaders, all primaries alive."""
    changes, times = 0, []
    for number in range(rounds):
        cell = cells[number % len(cells)]
        before = [one.primary() for one in cells]
        leader = cell.leader()
        struck_s = time.monotonic()
        cluster.coordinators[leader].end(signal.SIGKILL)
        while cell.leader() == leader:
            time.sleep(LOOK_S)
        times.append(time.monotonic() - struck_s)
        cluster.restart(leader)
        time.sleep(max(0.0, struck_s + SETTLE_S - time.monotonic()))
        changes += sum(one.primary() != was for one, was in zip(cells, before, strict=True))
    text = f"leader killed, {rounds} rounds: {changes} role changes; another leads after {spread(times)}"
    results.show(text, "no role changes", kept=changes == 0)


def pairs(cluster: Cluster, cells: Sequence[Cell], rounds: int, results: Results) -> None:
    """SIGKILL of a leader together with a primary's host."""
    times = []
    for number in range(rounds):
        cell = cells[number % len(cells)]
        epoch, host = cell.primary()
        leader = cell.leader()
        struck_s = time.monotonic()
        cluster.coordinators[leader].send(signal.SIGKILL)
        cell.cut_power(host)
        times.append(cell.successor_s(epoch, struck_s))
        cluster.coordinators[leader].wait()
        cluster.restart(leader)
        cell.start(host)
        time.sleep(SETTLE_S)
    limit_s = TTL_S + L_S + SLACK_S
    within = sum(one <= limit_s for one in times)
    text = f"leader and primary killed, {rounds} rounds: replaced after {spread(times)}"
    results.show(text, f"{within} of {rounds} within {limit_s:g} s", kept=within == rounds)


def stops(cluster: Cluster, cell: Cell, rounds: int, results: Results) -> None:
    """Orderly stops of leaders."""
    times, changes = [], 0
    for _ in range(rounds):
        before = cell.primary()
        leader = cell.leader()
        others = [one for one in cluster.coordinators if one is not cluster.coordinators[leader]]
        positions = [len(one.said()) for one in others]
        struck = time.time()
        cluster.coordinators[leader].send(signal.SIGTERM)
        logs = list(zip(others, positions, strict=True))
        times.append(until(partial(acquired_at, logs), "another leader") - struck)
        cluster.coordinators[leader].wait()
        cluster.restart(leader)
        changes += cell.primary() != before
    text = f"leader stopped, {rounds} rounds: {changes} role changes; handed over after {spread(times)}"
    kept = median(times) < HANDOVER_S and changes == 0
    results.show(text, f"median under {HANDOVER_S:g} s", kept=kept)


def acquired_at(logs: Sequence[tuple[Coordinator, int]]) -> float | None:
    """When a coordinator logged that it leads a further shard, after a position of its log."""
    for coordinator, position in logs:
        if lines := coordinator.lines("leadership acquired", after=position):
            return datetime.fromisoformat(lines[0].split()[0]).timestamp()
    return None


def override(cell: Cell) -> float:
    """Ask for the other member; how long until its workload writes."""
    epoch, host = cell.primary()
    other = next(name for name in HOSTS if name != host)
    path = f"groups/{cell.stage.group}/clientsessions/{other}/roleoverride"
    struck_s = time.monotonic()
    assert cell.coordinators[0].ask("POST", path, {"Value": 1}).status == 200
    return cell.successor_s(epoch, struck_s)


def take_over(cell: Cell) -> float:
    """Cut the power of the primary's host; how long until the other workload writes."""
    epoch, host = cell.primary()
    struck_s = time.monotonic()
    cell.cut_power(host)
    took_s = cell.successor_s(epoch, struck_s)
    cell.start(host)
    return took_s


def beside(
    what: str, act: Callable[[Cell], float], cells: dict[str, Cell], rounds: int, results: Results
) -> None:
    """The same on both stores, in turn."""
    times: dict[str, list[float]] = {store: [] for store in cells}
    for number in range(rounds):
        for store, cell in cells.items():
            cell.primary()
            # At another moment of the beat each time, the same ones for both.
            time.sleep(1.0 + 0.3 * (number / rounds))
            times[store].append(act(cell))
    for store, one in times.items():
        click.echo(f"{what}, {store}, {rounds} rounds: {spread(one)}")
    more_s = median(times["etcd"]) - median(times["sqlite"])
    text = f"{what}: etcd {more_s:+.3f} s"
    results.show(text, f"at most {BESIDE_S:g} s more", kept=more_s <= BESIDE_S)


@contextmanager
def running(directory: Path) -> Iterator[tuple[Cluster, list[Cell], Cell]]:
    """The cluster with its two groups, and the group of a single coordinator."""
    (directory / "etcd").mkdir()
    (directory / "alone").mkdir()
    with (
        an_etcd(directory / "etcd", members=3) as etcd,
        Stage(directory / "etcd") as together,
        Stage(directory / "alone") as alone,
    ):
        cluster = Cluster(together, etcd)
        cells = [
            Cell(directory / name, name, cluster.coordinators) for name in ("line-1", "line-2")
        ]
        single = Cell(directory / "single", "single", [alone.serve(store="sqlite")])
        with cells[0].stage, cells[1].stage, single.stage:
            for cell in (*cells, single):
                for host in HOSTS:
                    cell.start(host)
            yield cluster, cells, single


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, rounds in (("kills", 50), ("pairs", 20), ("stops", 10), ("rounds", 15)):
        parser.add_argument(f"--{name}", type=int, default=rounds)
    args = parser.parse_args()
    results = Results()
    click.echo(
        f"FailoverTimeout {L_S:g} s, leadership_ttl {TTL_S} s, load {os.getloadavg()[0]:.1f}"
    )
    with (
        tempfile.TemporaryDirectory(prefix="coordinator-loss-") as directory,
        running(Path(directory)) as (cluster, cells, single),
    ):
        if args.kills:
            kills(cluster, cells, args.kills, results)
        if args.pairs:
            pairs(cluster, cells, args.pairs, results)
        if args.stops:
            stops(cluster, cells[0], args.stops, results)
        if args.rounds:
            stores = {"sqlite": single, "etcd": cells[0]}
            beside("override", override, stores, args.rounds, results)
            beside("power cut", take_over, stores, args.rounds, results)
        overlap_s = max(cell.overlap_s() for cell in (*cells, single))
        results.show(f"longest overlap {overlap_s:.3f} s", "none", kept=overlap_s <= 0)
    click.echo(f"load {os.getloadavg()[0]:.1f}")
    raise SystemExit(results.missed)


if __name__ == "__main__":
    main()
