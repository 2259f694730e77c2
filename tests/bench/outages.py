"""Outages of the coordinator under failsafe, many times over. A script, not a test; it needs root, ip and nft.

    .venv/bin/python -m tests.bench.outages [--rounds 20] [--only kill,stop,cut,partial]

L is 3 s. Each round is a LAN of its own, with a coordinator and three members whose workload writes a line each
5 ms. The coordinator is killed, stopped, or cut off from all for ten L, at a random moment of a heartbeat's
period; or only the primary is cut off. Reported is, for each fault:

- kept: rounds in which the same member wrote under the same epoch all the time, and the longest pause between
  two of its lines;
- partial: rounds in which another member took over, and how long that took;
- overlap: for how long two members wrote at once; 0 in all rounds is the promise.

The exit code is 1 if a round lost the role, or anything overlapped.
"""

import argparse
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from tests.integration.failsafe import COORDINATOR, Plant, a_plant
from tests.integration.stage import until
from tests.integration.workloads import output
from tests.integration.writer import overlap_s

LEASE_S = 3.0
TIMING = ("--failover-timeout=3",)
OUTAGE_S = 10 * LEASE_S
BEAT_S = 0.65
FAULTS = ("kill", "stop", "cut", "partial")


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def outage(plant: Plant, one: str, fault: str) -> None:
    """The coordinator is away for OUTAGE_S; returns when the primary has contact again."""
    match fault:
        case "kill":
            plant.coordinator.end(signal.SIGKILL)
        case "stop":
            plant.coordinator.send(signal.SIGSTOP)
        case _:
            plant.lan.cut_both_ways(COORDINATOR, *plant.agents)
    time.sleep(OUTAGE_S)
    match fault:
        case "kill":
            plant.restart_coordinator()
        case "stop":
            plant.coordinator.send(signal.SIGCONT)
        case _:
            plant.lan.heal()
    until(lambda: plant.coordinator.status().get("Primary") == one, f"{one} to be primary")
    time.sleep(LEASE_S)  # whoever is promoted by mistake is by then


def play(fault: str) -> tuple[bool, float, float]:
    """One round: whether it went as promised, the pause or the time to take over, and the overlap."""
    # The guard of an agent that was killed at the end may still write its state file.
    directory = tempfile.TemporaryDirectory(prefix="outage-", ignore_cleanup_errors=True)
    with directory as name, a_plant(Path(name)) as plant:
        one = plant.run_all(timing=TIMING)
        epoch = plant.agents[one].state["epoch"]
        time.sleep(random.random() * BEAT_S)
        since_s = time.monotonic()
        if fault == "partial":
            plant.lan.cut_both_ways(COORDINATOR, one)
            others = [plant.agents[name] for name in plant.others(one)]
            plant.stage.until_primary(*others, after_epoch=epoch)
            return True, time.monotonic() - since_s, overlap_s(output(plant.stage))
        try:
            outage(plant, one, fault)
        except AssertionError as error:
            say(f"  {error}")
            return False, plant.gap_s(since_s), overlap_s(output(plant.stage))
        kept = plant.writers(since_s) == {(epoch, one)}
        return kept, plant.gap_s(since_s), overlap_s(output(plant.stage))


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--only", default=",".join(FAULTS))
    args = parser.parse_args()
    missed = 0
    for fault in args.only.split(","):
        rounds = [play(fault) for _ in range(args.rounds)]
        right = sum(well for well, _, _ in rounds)
        times_s = [took_s for _, took_s, _ in rounds]
        most_s = max(0.0, *(overlap for _, _, overlap in rounds))
        what = "taken over in" if fault == "partial" else "longest pause"
        say(
            f"{fault}: {right} of {len(rounds)} as promised; {what} median {median(times_s):.3f} s, max"
            f" {max(times_s):.3f} s; overlap {most_s:g} s"
        )
        missed += len(rounds) - right + (most_s > 0)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
