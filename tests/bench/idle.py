"""What an agent at rest costs, and how long its start takes. A script, not a test.

    .venv/bin/python -m tests.bench.idle [--rest 60] [--starts 10]

L is 10 s. Two agents rest, one after the other, at a coordinator on loopback: a plain one (probe, guard,
state file, two hooks) and one with every feature (TLS and a password, MQTT announcements and progress
by a mosquitto with TLS, six health checks, webhooks, JSON logs). Both are scraped every 5 s, as
Prometheus does. Told is, for each:

- resident: VmRSS of the agent's own process at the end of the rest, and its peak; and of its guard;
- CPU: of the agent and its guard during the rest, in percent of one core, and that of the commands
  that the agent has started (an exec check is a process every 5 s);
- start: from the start of the process to READY=1, the demotion of the start (R6) included.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from statistics import median

from tests.integration.resting import cost, everything, plain, resting, secure_coordinator
from tests.integration.stage import Stage
from tests.mosquitto import Authority, a_broker

MOST_RESIDENT_MIB = {"plain": 45.0, "everything": 60.0}
MOST_CPU_PERCENT = 0.5
LONGEST_START_S = 1.5
SETTLE_S = 15.0
"""Joins, becomes primary, has been scraped and has run every check."""


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def right(value: float, most: float, unit: str) -> str:
    return f"   aim <= {most:g} {unit}: {'yes' if value <= most else 'NO'}"


def measure(stage: Stage, name: str, words: list[str], args: argparse.Namespace) -> bool:
    """Four lines for one agent; whether it is as it should be."""
    starts = []
    for number in range(args.starts):
        with resting(stage, f"{name}-{number}", words) as agent:
            assert agent.notified.ready_s is not None
            starts.append(agent.notified.ready_s)
    with resting(stage, name, words) as agent:
        agent.rest(SETTLE_S)
        before, guard_before = cost(agent.pid), cost(agent.guard)
        agent.rest(args.rest)
        after, guard_after = cost(agent.pid), cost(agent.guard)
        assert agent.notified.beats > 0
    cpu = 100 / args.rest * (after.cpu_s - before.cpu_s)
    guard_cpu = 100 / args.rest * (guard_after.cpu_s - guard_before.cpu_s)
    commands = 100 / args.rest * (after.children_s - before.children_s)
    most = MOST_RESIDENT_MIB[name]
    say(f"{name}, at rest for {args.rest:g} s, {args.starts} starts")
    say(
        f"  resident {after.resident_mib:.1f} MiB, peak {after.peak_mib:.1f};"
        f" guard {guard_after.resident_mib:.1f} MiB{right(after.resident_mib, most, 'MiB')}"
    )
    total = cpu + guard_cpu
    say(
        f"  CPU {total:.2f} % of a core (guard {guard_cpu:.2f}); commands that it starts"
        f" {commands:.2f} %{right(total, MOST_CPU_PERCENT, '%')}"
    )
    middle = median(starts)
    say(
        f"  start median {middle:.3f} s, max {max(starts):.3f} s{right(middle, LONGEST_START_S, 's')}"
    )
    return after.resident_mib <= most and total <= MOST_CPU_PERCENT and middle <= LONGEST_START_S


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
        ok = measure(stage, "plain", plain(stage, stage.serve()), args)
        secure = secure_coordinator(stage, authority)
        words = everything(stage, secure, authority, broker)
        return 0 if measure(stage, "everything", words, args) and ok else 1


if __name__ == "__main__":
    sys.exit(main())
