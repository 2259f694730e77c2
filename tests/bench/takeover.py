"""How long a takeover takes, by the workload's own output. A script, not a test: it needs a quiet machine.

    .venv/bin/python tests/bench/takeover.py [--rounds 20]

The stage is that of ``failover-agent demo``: a coordinator, two agents, FailoverTimeout 2 s, and the
demo's collector, which is really started and stopped by hooks. Each round is a fault at a random
moment of the heartbeat's period:

- SIGKILL of the primary's agent, guard and collector together, as a power cut. Reported is the time
  from the signal to the first line that the other host's collector wrote under a newer epoch.
- SIGKILL of the primary's agent alone, at FailoverTimeout 10 s: its guard stops the collector and hands
  the role back. Reported is the same; and what is left of it without the hooks' own time.
- SIGTERM to the primary's agent. Reported is the same; and what is left of it without the hooks' own
  time: without the demotion hook (it waits for the collector's end) and without what comes after
  the start of the promotion hook (it starts an interpreter, which has to read its modules).
"""

import argparse
import random
import re
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import click
from rich.console import Console

from agent.cli.demo import Demo, Host

PATIENCE_S = 30.0
SETTLE_S = 1.0
"""The collector works for this long between two rounds, and up to a heartbeat's period longer."""

BEAT_S = 0.5


@dataclass
class Round:
    """One fault. Seconds on CLOCK_MONOTONIC."""

    fault: str
    at_s: float
    epoch: int
    beside_hooks_s: float = 0.0


def until(condition: Callable[[], Any], what: str) -> Any:
    end_at = time.monotonic() + PATIENCE_S
    while not (value := condition()):
        if time.monotonic() > end_at:
            raise TimeoutError(f"waited {PATIENCE_S:g} s in vain for {what}")
        time.sleep(0.02)
    return value


def primary(demo: Demo, after_epoch: int) -> Host:
    """Whoever is primary under a later epoch."""

    def found() -> Host | None:
        for host in demo.hosts:
            state = host.state
            if state.get("role") == "Primary" and state["epoch"] > after_epoch:
                return host
        return None

    host: Host = until(found, "a primary")
    return host


def agent_log(demo: Demo, host: Host) -> str:
    return (demo.directory / f"{host.name}.agent.log").read_text()


def demotion_hook_s(log: str) -> float:
    """How long the demotion hook took: by the agent's line, or by the guard's of a crashed agent."""
    if by_agent := re.search(r"hook ended hook=secondary .* seconds=([\d.]+)", log):
        return float(by_agent[1])
    begun = re.search(r"(\S+) WARNING role changed .*the guard demotes", log)
    ended = re.search(r"(\S+) INFO hook ended .*hook=secondary", log)
    assert begun is not None, log
    assert ended is not None, log
    span = datetime.fromisoformat(ended[1]) - datetime.fromisoformat(begun[1])
    return span.total_seconds()


def strike(demo: Demo, fault: str, wall_less_mono_s: float) -> Round:
    """One round: a fault, a takeover, and the struck host is back."""
    host = primary(demo, after_epoch=0)
    other = next(h for h in demo.hosts if h is not host)
    time.sleep(SETTLE_S + random.random() * BEAT_S)
    said = {h.name: len(agent_log(demo, h)) for h in demo.hosts}
    assert host.agent is not None
    round_ = Round(fault, time.monotonic(), host.state["epoch"])
    match fault:
        case "power cut":
            host.signal(signal.SIGKILL)
        case "crash":
            host.agent.kill()
        case _:
            host.agent.send_signal(signal.SIGTERM)
    host.wait()
    primary(demo, after_epoch=round_.epoch)
    if fault != "power cut":
        demoted = agent_log(demo, host)[said[host.name] :]
        hook_s = demotion_hook_s(demoted)
        promoted = agent_log(demo, other)[said[other.name] :]
        started = re.search(r"(\S+) INFO hook started hook=primary ", promoted)
        assert started is not None, promoted
        started_s = datetime.fromisoformat(started[1]).timestamp() - wall_less_mono_s
        round_.beside_hooks_s = started_s - round_.at_s - hook_s
    (demo.directory / f"{host.name}.pid").unlink(missing_ok=True)
    joined = len(agent_log(demo, host))
    demo.start(host)
    until(lambda: "joined" in agent_log(demo, host)[joined:], f"{host.name} to come back")
    return round_


def report(name: str, seconds: list[float], target_s: float | None) -> None:
    middle = median(seconds)
    right = ""
    if target_s is not None:
        right = f"   median <= {target_s:.3f} s: {'yes' if middle <= target_s else 'NO'}"
    p90 = quantiles(seconds, n=10, method="inclusive")[-1] if len(seconds) > 1 else seconds[0]
    click.echo(
        f"{name:<34} median {middle:.3f} s, p90 {p90:.3f} s, max {max(seconds):.3f} s{right}"
    )


def measure(demo: Demo, faults: list[str]) -> list[Round]:
    demo.prepare()
    demo.serve()
    for host in demo.hosts:
        demo.start(host)
    wall_less_mono_s = time.time() - time.monotonic()
    done = [strike(demo, fault, wall_less_mono_s) for fault in faults]
    time.sleep(SETTLE_S)
    return done


def show(
    demo: Demo, done: list[Round], fault: str, targets_s: tuple[float | None, float | None]
) -> None:
    first: dict[int, float] = {}
    for line in demo.written():
        first.setdefault(line.epoch, line.at_s)
    rounds = [r for r in done if r.fault == fault]
    # By the next tenure that wrote: one that was given and lost again has cost time too.
    takeovers = [
        min(at_s for epoch, at_s in first.items() if epoch > r.epoch) - r.at_s for r in rounds
    ]
    overlaps = sum(demo.overlap_s(r.epoch, r.epoch + 1) > 0 for r in rounds)
    click.echo(
        f"{fault}: {len(rounds)} rounds, FailoverTimeout {demo.lease_s:g} s; rounds with overlap:"
        f" {overlaps}"
    )
    report("  to the first line", takeovers, targets_s[0])
    if fault != "power cut":
        report("  beside the hooks", [r.beside_hooks_s for r in rounds], targets_s[1])


def stage(
    rounds: int, lease_s: float, faults: dict[str, tuple[float | None, float | None]]
) -> None:
    """One lease, and its faults with their aims: to the first line, and beside the hooks."""
    with tempfile.TemporaryDirectory(prefix="takeover-") as directory:
        demo = Demo(Path(directory), Console(quiet=True), lease_s=lease_s)
        try:
            done = measure(demo, [fault for fault in faults for _ in range(rounds)])
            for fault, targets_s in faults.items():
                show(demo, done, fault, targets_s)
        except TimeoutError:
            for host in demo.hosts:
                click.echo(f"{host.name}: {host.state}\n{agent_log(demo, host)[-3000:]}", err=True)
            raise
        finally:
            demo.close()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=20)
    rounds = parser.parse_args().rounds
    stage(rounds, 2.0, {"power cut": (2.150, None), "graceful stop": (None, 0.150)})
    stage(rounds, 10.0, {"crash": (None, 1.0)})


if __name__ == "__main__":
    main()
