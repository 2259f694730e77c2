"""``failover-agent demo``: two hosts, one workload, four takeovers and an outage of the coordinator, measured.

Owns a temporary directory and the processes that it starts there: a coordinator, an agent for each of
two "hosts", and the processes of their hooks. Nothing is simulated: the collector (demo_collector.py)
is really started and stopped, killed and frozen, and the figures are read from its output.
"""

import contextlib
import itertools
import json
import os
import re
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from agent.cli.demo_hooks import START_HOOK, STOP_HOOK
from agent.errors import ExitCode, FailoverError

GROUP = "demo"
LEASE_S = 2.0
LINE_S = 0.02
"""Interval at which the source grows by a line."""

TIMEOUT_S = 20.0
"""Timeout of each step, ten failover timeouts: a takeover takes one or two of them."""

OUTAGE_LEASES = 3
"""How long the coordinator is away, in failover timeouts."""

WORK_S = 1.5
"""How long the collector works between two faults."""

POLL_S = 0.02
"""Interval at which a condition that is waited for is checked."""

LISTENING = re.compile(r"coordinator listening .*\burl=(\S+)")


class DemoError(FailoverError):
    """The demonstration could not be completed."""

    exit_code = ExitCode.DEMO_CHECK_FAILED


@click.command("demo")
@click.option("--keep", is_flag=True, help="Keep the directory with the logs and the output.")
def command(*, keep: bool) -> int:
    """Show takeovers after a power cut, a crash, a stop and a freeze, and an outage, in under a minute.

    Starts a coordinator and two agents on this machine's loopback, with a collector that is really
    started and stopped. Needs nothing else, changes nothing outside a temporary directory. Exit code 41
    if anything was written twice, lost, or written by two hosts at once.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):  # as Ctrl-C does: leave no process behind
        signal.signal(number, signal.default_int_handler)
    directory = Path(tempfile.mkdtemp(prefix="failover-demo-"))
    demo = Demo(directory, Console(highlight=False))
    ok = False
    try:
        ok = demo.run()
    finally:
        demo.close()
        if keep or not ok:
            click.echo(f"logs and output are in {directory}")
        else:
            shutil.rmtree(directory)
    return ExitCode.OK if ok else ExitCode.DEMO_CHECK_FAILED


@dataclass
class Host:
    """One "host": an agent and the processes of its hooks."""

    name: str
    directory: Path
    failsafe_port: int
    agent: subprocess.Popen[bytes] | None = None

    def read(self, suffix: str) -> str:
        """Return the text of this host's file with this suffix; "" if there is no such file."""
        with contextlib.suppress(OSError):
            return (self.directory / f"{self.name}{suffix}").read_text()
        return ""

    @property
    def state(self) -> dict[str, Any]:
        state: dict[str, Any] = json.loads(self.read(".json") or "{}")
        return state

    @property
    def failsafe(self) -> str | None:
        """The state of this host's failsafe."""
        return (self.state.get("failsafe") or {}).get("state")

    @property
    def collector(self) -> int | None:
        pid = self.read(".pid").strip()
        return int(pid) if pid else None

    @property
    def guard(self) -> int | None:
        """The process id of the agent's guard, from the agent's log."""
        pids = re.findall(r"guard ready pid=(\d+)", self.read(".agent.log"))
        return int(pids[-1]) if pids else None

    def signal(self, number: signal.Signals) -> None:
        """Signal the whole host, as a power cut or a freeze does: guard, collector and agent."""
        pids = [self.guard, self.collector, self.agent.pid] if self.agent else [self.collector]
        for pid in filter(None, pids):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def wait(self) -> int:
        """Wait for the agent to exit; return its exit code."""
        code = 0
        if self.agent is not None:
            code = self.agent.wait(TIMEOUT_S)
            self.agent = None
        return code


@dataclass(frozen=True)
class Written:
    """One line of the output."""

    number: int
    epoch: int
    host: str
    at_s: float


@dataclass
class Fault:
    """One row of the table at the end. Seconds on CLOCK_MONOTONIC."""

    name: str
    at_s: float
    before: str
    epoch_before: int
    after: str = ""
    epoch_after: int = 0


@dataclass
class Demo:
    """The demonstration: its hosts, faults and figures."""

    directory: Path
    console: Console
    hosts: list[Host] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    endpoint: str = ""
    coordinator: subprocess.Popen[bytes] | None = None
    started_at: float = field(default_factory=time.monotonic)
    growing: threading.Event = field(default_factory=threading.Event)
    shown_at: float = 0.0
    lines: int = 0
    unclean: int = 0
    lost_in_outage: int = 0
    lease_s: float = LEASE_S

    def run(self) -> bool:
        """Run everything; return whether every check holds."""
        self.log(
            f"One group, two hosts, failover timeout {self.lease_s:g} s. A collector copies a growing"
            f" file; a line is due every {LINE_S * 1000:.0f} ms."
        )
        self.prepare()
        self.serve()
        for host in self.hosts:
            self.start(host)
        primary = self.until_primary(after_epoch=0)
        self.log(f"{primary.name} is primary, and its collector works.")
        self.work(WORK_S)
        self.restart(self.kill(), "the killed host to come back")
        self.restart(self.crash(), "the crashed agent's successor")
        self.start(self.stop_one())
        self.work(WORK_S)
        self.outage()
        self.work(self.lease_s)  # until the other host's promise has ended
        self.freeze()
        self.work(WORK_S / 2)
        self.finish()
        return self.report()

    # -- setting up ------------------------------------------------------------------------------

    def prepare(self) -> None:
        for name in ("source", "output", "activity"):
            (self.directory / name).touch()
        (self.directory / "secret").touch(0o600)
        (self.directory / "secret").write_text(secrets.token_hex())
        for name in ("host-a", "host-b"):
            words = {
                "directory": shlex.quote(str(self.directory)),
                "host": name,
                "python": shlex.quote(sys.executable),
            }
            for kind, text in (("start", START_HOOK), ("stop", STOP_HOOK)):
                path = self.directory / f"{kind}-{name}"
                path.write_text(text.format(**words))
                path.chmod(0o700)
            with socket.create_server(("127.0.0.1", 0)) as free:
                self.hosts.append(Host(name, self.directory, free.getsockname()[1]))
        self.growing.set()
        threading.Thread(target=self.grow, daemon=True).start()

    def grow(self) -> None:
        """Write the source: a numbered line with its time, every LINE_S."""
        with (self.directory / "source").open("a") as source:
            while self.growing.is_set():
                self.lines += 1
                source.write(f"{self.lines} {datetime.now(UTC).isoformat()}\n")
                source.flush()
                time.sleep(LINE_S)

    def spawn(self, log: str, *words: str) -> subprocess.Popen[bytes]:
        """Start our own program with its log in a file."""
        with (self.directory / log).open("ab") as stderr:
            return subprocess.Popen(  # noqa: S603 - ourselves
                [sys.executable, "-P", "-m", "agent", *words],
                stderr=stderr,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )

    def serve(self) -> None:
        words = ("serve", "--listen", "127.0.0.1:0", "--data-dir", str(self.directory / "data"))
        self.coordinator = self.spawn("coordinator.log", *words)
        log = self.directory / "coordinator.log"
        while not (listening := LISTENING.search(log.read_text())):
            if self.coordinator.poll() is not None:
                raise DemoError(f"the coordinator did not start: {log.read_text()}")
            time.sleep(POLL_S)
        self.endpoint = f"{listening[1]}/api/v1/clientfailover"
        self.log(f"The coordinator listens at {listening[1]}.")

    def start(self, host: Host) -> None:
        words = {
            "--endpoint": self.endpoint,
            "--group": GROUP,
            "--session-id": host.name,
            "--failover-timeout": f"{self.lease_s:g}",
            "--hook-primary": str(self.directory / f"start-{host.name}"),
            "--hook-secondary": str(self.directory / f"stop-{host.name}"),
            "--state-file": str(self.directory / f"{host.name}.json"),
            "--probe-listen": "127.0.0.1:0",
            "--failsafe-listen": f"127.0.0.1:{host.failsafe_port}",
            "--failsafe-secret-file": str(self.directory / "secret"),
        }
        flags = [word for pair in words.items() for word in pair]
        host.agent = self.spawn(f"{host.name}.agent.log", "run", *flags)
        self.log(f"An agent starts on {host.name}.")

    def restart(self, host: Host, what: str) -> None:
        """Start a host, and wait until its agent has replaced the state file of the killed one."""
        self.start(host)
        self.until(lambda: host.state.get("reason") == "starting", what)
        self.work(WORK_S)

    # -- the faults ------------------------------------------------------------------------------

    def kill(self) -> Host:
        host, _, fault = self.strike("power cut (SIGKILL)")
        self.log(f"{host.name} loses power: SIGKILL to its agent, its guard and its collector.")
        host.signal(signal.SIGKILL)
        host.wait()
        (self.directory / f"{host.name}.pid").unlink(missing_ok=True)
        self.taken_over(fault)
        return host

    def crash(self) -> Host:
        host, agent, fault = self.strike("crash (SIGKILL)")
        self.log(
            f"{host.name}'s agent crashes: SIGKILL to it alone. Its collector goes on, until the guard"
            " has stopped it and has released the role."
        )
        agent.kill()
        host.wait()
        self.taken_over(fault)
        return host

    def stop_one(self) -> Host:
        host, agent, fault = self.strike("stop (SIGTERM)")
        self.log(f"{host.name} is stopped: SIGTERM to its agent, which hands over.")
        agent.send_signal(signal.SIGTERM)
        self.taken_over(fault)
        self.unclean += host.wait() != ExitCode.OK
        return host

    def outage(self) -> None:
        """Stop the coordinator for several leases: the primary goes on, since the other host votes for it."""
        host, coordinator = self.until_primary(after_epoch=0), self.coordinator
        assert coordinator is not None  # noqa: S101 - it was started
        self.until(lambda: host.failsafe == "ready", "failsafe to be ready")
        epoch, began_at = host.state["epoch"], time.monotonic()
        outage_s = OUTAGE_LEASES * self.lease_s
        self.log(
            f"The coordinator hangs for {outage_s:g} s: SIGSTOP. {host.name} goes on, by the vote of the other host."
        )
        coordinator.send_signal(signal.SIGSTOP)
        self.work(outage_s)
        coordinator.send_signal(signal.SIGCONT)
        self.until(lambda: host.failsafe == "ready", "the coordinator to answer")
        self.lost_in_outage = int(host.state["epoch"] != epoch)
        moments = [line.at_s for line in self.written() if line.at_s > began_at]
        pause_s = max(later - earlier for earlier, later in itertools.pairwise(moments))
        self.log(
            f"{host.name} is still primary under epoch {host.state['epoch']}; its longest pause between two"
            f" lines was {pause_s:.3f} s."
        )

    def freeze(self) -> None:
        host, agent, fault = self.strike("frozen (SIGSTOP)")
        self.log(
            f"{host.name}'s agent freezes: SIGSTOP. Its collector goes on, until the guard acts."
        )
        agent.send_signal(signal.SIGSTOP)
        self.taken_over(fault)
        if host.wait() == -signal.SIGKILL:
            self.log(f"{host.name}'s guard has stopped the collector, and killed the frozen agent.")
        else:
            self.unclean += 1

    def strike(self, name: str) -> tuple[Host, subprocess.Popen[bytes], Fault]:
        host = self.until_primary(after_epoch=0)
        assert host.agent is not None  # noqa: S101 - it is primary
        fault = Fault(name, time.monotonic(), host.name, host.state["epoch"])
        self.faults.append(fault)
        return host, host.agent, fault

    def taken_over(self, fault: Fault) -> None:
        host = self.until_primary(after_epoch=fault.epoch_before)
        fault.after, fault.epoch_after = host.name, host.state["epoch"]
        first = next(line for line in self.written() if line.epoch == fault.epoch_after)
        self.log(
            f"{host.name} has taken over: its first line came {first.at_s - fault.at_s:.3f} s after"
            f" the fault, under epoch {fault.epoch_after}."
        )

    def finish(self) -> None:
        self.growing.clear()
        self.until(lambda: self.lines == len(self.written()), "the collector to catch up")
        for host in self.hosts:
            if host.agent is not None:
                host.agent.send_signal(signal.SIGTERM)
        for host in self.hosts:
            self.unclean += host.wait() != ExitCode.OK
        self.log("Both agents have stopped, and so has the collector.")

    def close(self) -> None:
        """Kill what still runs, also after an error."""
        self.growing.clear()
        for host in self.hosts:
            host.signal(signal.SIGKILL)
            host.wait()
        if self.coordinator is not None:
            self.coordinator.terminate()
            self.coordinator.wait(TIMEOUT_S)

    # -- watching -------------------------------------------------------------------------------

    def written(self) -> list[Written]:
        lines = []
        for line in (self.directory / "output").read_text().splitlines():
            number, _, epoch, host, at_ns = line.split()
            lines.append(Written(int(number), int(epoch), host, int(at_ns) / 1e9))
        return lines

    def until_primary(self, *, after_epoch: int) -> Host:
        """The host that is primary under a later epoch and whose collector has written."""

        def found() -> Iterator[Host]:
            epochs = {line.epoch for line in self.written()}
            for host in self.hosts:
                state = host.state
                epoch = state.get("epoch") or 0
                if state.get("role") == "Primary" and epoch > after_epoch and epoch in epochs:
                    yield host

        self.until(lambda: any(found()), "a primary")
        return next(found())

    def until(self, condition: Callable[[], bool], what: str) -> None:
        end_at = time.monotonic() + TIMEOUT_S
        while not condition():
            if time.monotonic() > end_at:
                raise DemoError(f"timeout after {TIMEOUT_S:g} s: waiting for {what}")
            self.show()
            time.sleep(POLL_S)

    def work(self, seconds: float) -> None:
        end_at = time.monotonic() + seconds
        self.until(lambda: time.monotonic() >= end_at, "the time to pass")

    def show(self) -> None:
        """Print the state of both hosts, twice a second."""
        if time.monotonic() - self.shown_at < 0.5:  # noqa: PLR2004 - often enough to follow
            return
        self.shown_at = time.monotonic()
        self.log("   ".join(f"{self.describe(host):<62}" for host in self.hosts), style="dim")

    def describe(self, host: Host) -> str:
        state = host.state
        if host.agent is None:
            return f"{host.name}: down"
        until = state.get("active_until_boottime_s")
        left_s = 0.0 if until is None else until - time.clock_gettime(time.CLOCK_BOOTTIME)
        if left_s < 0:  # the file is still that of an agent which was killed
            return f"{host.name}: starting"
        text = f"{host.name}: {state.get('role', 'starting'):<14}"
        if until is not None:
            text += f" epoch {state['epoch'] or '-'}, lease left {left_s:.2f} s"
        if until is not None and (stamp := state.get("last_data_processed_time")):
            lag_s = (datetime.now(UTC) - datetime.fromisoformat(stamp)).total_seconds()
            text += f", lag {lag_s:.2f} s"
        return text

    def log(self, text: str, style: str | None = None) -> None:
        at_s = time.monotonic() - self.started_at
        self.console.print(f"{at_s:6.2f} s  {text.rstrip()}", style=style, soft_wrap=True)

    # -- the result ---------------------------------------------------------------------------

    def report(self) -> bool:
        """Print the table and the checks; return whether all hold."""
        written = self.written()
        table = Table("fault", "from", "to", "epoch", "took over in", "gap", "overlap", box=None)
        overlaps = []
        for fault in self.faults:
            first = next(line.at_s for line in written if line.epoch == fault.epoch_after)
            last = max(line.at_s for line in written if line.epoch == fault.epoch_before)
            overlap_s = self.overlap_s(fault.epoch_before, fault.epoch_after)
            overlaps.append(overlap_s)
            table.add_row(
                fault.name,
                fault.before,
                fault.after,
                f"{fault.epoch_before} -> {fault.epoch_after}",
                f"{first - fault.at_s:.3f} s",
                f"{first - last:.3f} s",
                f"{overlap_s:.3f} s" if overlap_s else "0",
            )
        self.console.print(table)
        numbers = [line.number for line in written]
        checks = {
            "overlap: moments at which two hosts tried to write": sum(o > 0 for o in overlaps),
            "lost: lines of the source that are not in the output": len(
                set(range(1, self.lines + 1)) - set(numbers)
            ),
            "duplicates: lines that are in the output twice": len(numbers) - len(set(numbers)),
            "disorder: lines that are not in the order of the source": sum(
                later <= earlier for earlier, later in itertools.pairwise(numbers)
            ),
            "outage: times that the primary lost its role in it": self.lost_in_outage,
            "unclean: agents that did not exit as they should": self.unclean,
        }
        for what, count in checks.items():
            self.console.print(f"{'ok    ' if count == 0 else 'FAILED'}  {count}  {what}")
        self.console.print(
            f"{len(numbers)} of {self.lines} lines written, by {len(self.faults) + 1} tenures."
        )
        return not any(checks.values())

    def overlap_s(self, before: int, after: int) -> float:
        """How long the earlier epoch still tried to write after the later one had begun."""
        first, last = float("inf"), float("-inf")
        for line in (self.directory / "activity").read_text().splitlines():
            epoch, _, at_ns = line.split()
            if int(epoch) <= before:
                last = max(last, int(at_ns) / 1e9)
            elif int(epoch) >= after:
                first = min(first, int(at_ns) / 1e9)
        return max(0.0, last - first)
