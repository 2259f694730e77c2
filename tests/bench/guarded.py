"""The promise under a frozen and a killed agent, many times over. A script, not a test.

    .venv/bin/python -m tests.bench.guarded [--rounds 50] [--lanes 3] [--failover-timeout 3]

Each round is a pair of agents in a group of their own; the primary's agent gets SIGSTOP or
SIGKILL at a random moment of its heartbeat's period. The workload writes a line every 5 ms; in every
second round hooks start and stop it, in the others it is the command of ``exec``, with a child. Told is,
for each fault:

- overlap: for how long both workloads wrote; 0 in all rounds is the promise;
- demotion slack: what was left of L when the guard's (or the agent's) demotion was done; its minimum
  has to be positive;
- time to take over: from the signal to the first line under a newer epoch;
- the part of it after the demotion: from the last line of the old workload to that first line. It has the rest of the
  demotion hook, the release by the guard's helper, and the start of the new workload.

At the end, how long a hook takes from the decision to its start: from the agent's own line ``role
changed`` to the time that the hook's script sees first.
"""

import argparse
import random
import re
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from statistics import median, quantiles

from tests.integration.stage import Coordinator, Stage, until
from tests.integration.workloads import (
    by_exec,
    by_hooks,
    demote_slacks_s,
    output,
    pair,
    start,
    until_written_after,
)
from tests.integration.writer import first_and_last, overlap_s

LEASE_S = 3.0
HOOKS = 25
"""Promotions, and as many demotions, whose hook's start is measured."""

STAMP = "#!/bin/sh\necho $FAILOVER_EVENT $(date +%s%N) >> {stamps}\n"


@dataclass(frozen=True, slots=True)
class Round:
    """What came of one fault, in seconds."""

    fault: str
    overlap_s: float
    slacks_s: list[float]
    takeover_s: float
    after_demotion_s: float


def strike(
    directory: Path, coordinator: Coordinator, number: int, fault: str, lease_s: float
) -> Round:
    """One round."""
    folder = directory / f"{fault}-{number}"
    folder.mkdir()
    group = f"{fault}-{number}"
    with Stage(folder, group) as stage:
        how = by_hooks if number % 2 else by_exec
        margin_s = lease_s / 5
        timing = f"--failover-timeout={lease_s}", f"--demote={lease_s / 3}", f"--margin={margin_s}"
        one, _, epoch = pair(stage, replace(coordinator, group=group), how, *timing)
        time.sleep(random.random() * lease_s / 6)
        struck_at = time.monotonic()
        one.send(signal.Signals[fault])
        newer = until_written_after(stage, epoch)
        one.wait()
        slacks_s = until(lambda: demote_slacks_s(one, margin_s), "the guard to have told its slack")
        spans = first_and_last(output(stage))
        begun_at, ended_at = spans[newer][0], spans[epoch][1]
        overlap = overlap_s(output(stage))
        return Round(fault, overlap, slacks_s, begun_at - struck_at, begun_at - ended_at)


def hook_starts_s(stage: Stage, coordinator: Coordinator) -> Iterator[float]:
    """From each line ``role changed`` to the start of the hook that it caused."""
    stamps = stage.directory / "stamps"
    hook = stage.directory / "hook"
    hook.write_text(STAMP.format(stamps=stamps))
    hook.chmod(0o700)
    flags = [f"--hook-{event}={hook}" for event in ("pending-primary", "secondary")]
    for number in range(HOOKS):
        agent = start(stage, f"host-{number}", coordinator, flags=flags)
        agent.until_role("Primary")
        agent.end()
        told = re.findall(
            r"(\S+) INFO role changed .*after=(PendingPrimary|Secondary)", agent.said()
        )
        started = [line.split() for line in stamps.read_text().splitlines()]
        stamps.unlink()
        # The first is the demotion at the start (R6), which no change of role goes before.
        for (at, _), (_, ns) in zip(told, started[1:], strict=True):
            yield int(ns) / 1e9 - datetime.fromisoformat(at).timestamp()


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def report(fault: str, rounds: list[Round], lease_s: float) -> bool:
    """The lines for one fault; whether all is as promised."""
    overlap = max(0.0, *(r.overlap_s for r in rounds))
    gap_s = min(-r.overlap_s for r in rounds)
    slack_s = min(s for r in rounds for s in r.slacks_s)
    takeovers = [r.takeover_s for r in rounds]
    after_s = [r.after_demotion_s for r in rounds]
    p90 = quantiles(takeovers, n=10, method="inclusive")[-1] if len(rounds) > 1 else takeovers[0]
    say(f"{fault}, {len(rounds)} rounds, L = {lease_s:g} s")
    say(f"  max overlap {overlap:.3f} s (smallest pause between the two workloads {gap_s:.3f} s)")
    say(f"  min demotion slack {slack_s:.3f} s")
    say(
        f"  time to take over: median {median(takeovers):.3f} s, p90 {p90:.3f}, max {max(takeovers):.3f}"
    )
    say(f"  of it after the demotion: median {median(after_s):.3f} s, max {max(after_s):.3f}")
    return overlap == 0 and slack_s > 0


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--lanes", type=int, default=3)
    parser.add_argument("--failover-timeout", type=float, default=LEASE_S)
    args = parser.parse_args()
    lease_s: float = args.failover_timeout
    with (
        tempfile.TemporaryDirectory(prefix="guarded-") as directory,
        Stage(Path(directory)) as stage,
        ThreadPoolExecutor(args.lanes) as lanes,
    ):
        coordinator = stage.serve()
        kept = True
        for fault in ("SIGSTOP", "SIGKILL"):

            def one(number: int, fault: str = fault) -> Round:
                try:
                    return strike(Path(directory), coordinator, number, fault, lease_s)
                except AssertionError:
                    for log in sorted(Path(directory, f"{fault}-{number}").glob("*.log")):
                        say(f"--- {log.parent.name} {log.name}\n{log.read_text()[-4000:]}")
                    raise

            kept &= report(fault, list(lanes.map(one, range(args.rounds))), lease_s)
        starts = list(hook_starts_s(stage, replace(coordinator, group="hooks")))
        say(f"hook start, from decision to its first command, {len(starts)} hooks")
        middle_ms, worst_ms = median(starts) * 1e3, max(starts) * 1e3
        say(
            f"  median {middle_ms:.1f} ms, max {worst_ms:.1f} ms; median <= 20 ms: {middle_ms <= 20}"
        )
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
