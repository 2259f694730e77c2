"""What an agent at rest costs, and how long its start takes. A script, not a test.

    .venv/bin/python -m tests.bench.idle [--rest 60] [--starts 10]

L is 10 s. Three agents rest, one after the other, at a coordinator on loopback: a plain one (probe, guard,
state file, two hooks), the same with failsafe, and one with every feature (TLS and a password, MQTT announcements and progress
by a mosquitto with TLS, six health checks, webhooks, JSON logs). Both are scraped every 5 s, as
Prometheus does; the last is told a newer data-processed time as often. Told is, for each:

- resident: VmRSS of the agent's own process at the end of the rest, and the most that it was during
  the rest, which is what the aim is for, and before it; and VmRSS of its guard;
- CPU: of the agent and its guard during the rest, in percent of one core, and that of the commands
  that the agent has started (an exec check is a process every 5 s);
- start: from the start of the process to READY=1, the demotion of the start (R6) included. One start
  goes before those, so that all files are in the page cache.

The exit code is 1 if an aim is missed.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

from agent.schema.scalars import format_date_time
from tests.integration.resting import (
    PROCESSED,
    cost,
    everything,
    failsafe,
    forget_peak,
    plain,
    resting,
    secure_coordinator,
)
from tests.integration.stage import Stage
from tests.mosquitto import Authority, a_broker, watching

MOST_RESIDENT_MIB = {"plain": 40.0, "failsafe": 42.0, "everything": 46.0}
MOST_CPU_PERCENT = 0.5
LONGEST_START_S = 1.5
SETTLE_S = 15.0
"""Joins, becomes primary, has been scraped and has run every check."""


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def right(value: float, most: float, unit: str) -> str:
    return f"   aim <= {most:g} {unit}: {'yes' if value <= most else 'NO'}"


def starts_s(stage: Stage, name: str, words: list[str], number: int) -> list[float]:
    """How long each start took, but for the first of all."""
    starts = []
    for which in range(number + 1):
        with resting(stage, f"{name}-{which}", words) as agent:
            assert agent.notified.ready_s is not None
            starts.append(agent.notified.ready_s)
    return starts[1:]


def measure(
    stage: Stage,
    name: str,
    words: list[str],
    args: argparse.Namespace,
    meanwhile: Callable[[], object] = lambda: None,
) -> bool:
    """Four lines for one agent; whether it is as it should be."""
    starts = starts_s(stage, name, words, args.starts)
    with resting(stage, name, words) as agent:
        agent.rest(SETTLE_S, meanwhile)
        before, guard_before = cost(agent.pid), cost(agent.guard)
        forget_peak(agent.pid)
        agent.rest(args.rest, meanwhile)
        after, guard_after = cost(agent.pid), cost(agent.guard)
        assert agent.notified.beats > 0
        state = agent.state
    assert state["role"] == "Primary"
    assert (state["last_data_processed_time"] is None) == (name != "everything")
    guard_cpu = 100 / args.rest * (guard_after.cpu_s - guard_before.cpu_s)
    cpu = 100 / args.rest * (after.cpu_s - before.cpu_s) + guard_cpu
    commands = 100 / args.rest * (after.children_s - before.children_s)
    most_mib, middle_s = MOST_RESIDENT_MIB[name], median(starts)
    say(f"{name}, at rest for {args.rest:g} s, {args.starts} starts")
    say(
        f"  resident {after.resident_mib:.1f} MiB, max {after.peak_mib:.1f}, max before the rest"
        f" {before.peak_mib:.1f}; guard {guard_after.resident_mib:.1f}"
        f"{right(after.peak_mib, most_mib, 'MiB')}"
    )
    say(
        f"  CPU {cpu:.2f} % of a core, of which the guard {guard_cpu:.2f}; commands that it starts"
        f" {commands:.2f} %{right(cpu, MOST_CPU_PERCENT, '%')}"
    )
    say(
        f"  start median {middle_s:.3f} s, max {max(starts):.3f} s"
        f"{right(middle_s, LONGEST_START_S, 's')}"
    )
    return after.peak_mib <= most_mib and cpu <= MOST_CPU_PERCENT and middle_s <= LONGEST_START_S


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rest", type=float, default=60.0)
    parser.add_argument("--starts", type=int, default=10)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="idle-") as name, Stage(Path(name)) as stage:
        folder = Path(name, "broker")
        folder.mkdir(mode=0o755)
        authority = Authority(stage.directory)
        broker = stage.enter(a_broker(folder))
        broker.secure()
        broker.start()
        coordinator = stage.serve()
        ok = measure(stage, "plain", plain(stage, coordinator), args)
        ok &= measure(stage, "failsafe", failsafe(stage, coordinator), args)
        secure = secure_coordinator(stage, authority)
        words = everything(stage, secure, authority, broker)
        workload = stage.enter(watching(broker))

        def process() -> None:
            workload.publish(PROCESSED, format_date_time(datetime.now(UTC)).encode())

        return 0 if measure(stage, "everything", words, args, process) and ok else 1


if __name__ == "__main__":
    sys.exit(main())
