"""Random faults at real processes on hosts of their own: 3 etcd, 3 coordinators, and 4 agents in 2 groups.

Each host is a network namespace; plant_faults.py is what is done to them: SIGKILL, SIGSTOP, power cuts, partitions
both ways and one way, slow and full disks. What is checked, whatever fails:

- No two workloads of a group wrote at a time, and epochs increase.
- No fact that a client was acknowledged is lost: groups, overrides, progress, tenures (ledger.py).
- Each group has a primary within HEALED_S after a heal.
- A fault at a whole plant moves no role but that of a primary whose own host is harmed. Losing one
  coordinator, one member of etcd, or a host with both moves none.

FAILOVER_SOAK_S is its length in seconds. Everything random follows from FAILOVER_SOAK_SEED, which each run prints:

    FAILOVER_SOAK_S=1800 FAILOVER_SOAK_SEED=7 .venv/bin/pytest -s tests/integration/test_soak.py
"""

import os
import random
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import pytest

from .ledger import Ledger
from .network import entered
from .plant import Plant
from .plant_faults import Faults, Injected

SOAK_S = float(os.environ.get("FAILOVER_SOAK_S", "90"))
SEED = int(os.environ.get("FAILOVER_SOAK_SEED", "0")) or random.SystemRandom().getrandbits(31)

FAULT_S = (0.3, 5.0)
"""Length of a fault: from one that nobody may notice to one that ends leases and leaderships."""

DOUBLE = 0.25
"""Share of rounds in which a second fault begins before the first has ended."""

HEALED_S = 12.0
"""Within this after a heal each group has a primary; what it consists of is in docs/high-availability.md."""

SETTLE_S = 180.0
"""For the start, the last recovery and the end of everything."""


STARVED_S = 1.0
"""An agent or coordinator that waited for longer for a processor may have missed its deadline: half of R."""


def say(text: str) -> None:
    """Print at once: what a failure is understood by, and repeated by."""
    print(text, flush=True)  # noqa: T201 - pytest shows it with a failure


@dataclass(frozen=True, slots=True)
class Step:
    """One fault of the plan: which, at which of its targets, after how long, and for how long."""

    kind: str
    pick: int
    after_s: float
    length_s: float

    def __str__(self) -> str:
        return f"{self.kind}({self.pick}) after {self.after_s:.1f} s for {self.length_s:.1f} s"


def plan(kinds: list[str], chance: random.Random) -> Iterator[list[Step]]:
    """Rounds without end. Each kind comes once before one comes again."""
    deck: list[str] = []

    def step(after_s: float) -> Step:
        if not deck:
            deck.extend(chance.sample(kinds, len(kinds)))
        return Step(deck.pop(), chance.randrange(1000), after_s, chance.uniform(*FAULT_S))

    while True:
        first = step(0.0)
        double = chance.random() < DOUBLE
        yield [first, step(chance.uniform(0, first.length_s))] if double else [first]


class Soak:
    """One run: rounds of faults, and what has come of them."""

    def __init__(self, plant: Plant, ledger: Ledger) -> None:
        self._plant = plant
        self._faults = Faults(plant)
        self._ledger = ledger
        self._recoveries: dict[str, list[float]] = defaultdict(list)
        self._moved = 0
        self._judged = 0
        self._starved = 0
        self._amiss: list[str] = []

    def run(self, until_s: float) -> None:
        began = time.monotonic()
        for number, steps in enumerate(plan(list(self._faults.kinds), random.Random(SEED)), 1):
            if time.monotonic() >= until_s:
                return
            at_s = time.monotonic() - began
            say(f"round {number} at {at_s:.1f} s: {'; '.join(map(str, steps))}")
            self._round(steps)

    def _round(self, steps: list[Step]) -> None:
        plant = self._plant
        self._ledger.record_progress()
        before, waits = plant.epochs(), plant.waits()
        exits = {group.name: len(group.exit_codes) for group in plant.groups}
        injected = self._inject(steps)
        recovered_s = plant.until_primaries(HEALED_S)
        plant.until_whole()
        plant.check_history()
        self._ledger.check()
        moved = {name for name, epoch in plant.epochs().items() if epoch != before[name]}
        starved_s = plant.starved_s(waits)
        say(
            f"  {'; '.join(one.what for one in injected)}: primaries after {recovered_s:.2f} s,"
            f" moved {sorted(moved) or 'none'}; longest wait for a processor {starved_s:.2f} s"
        )
        kind = steps[0].kind if len(steps) == 1 else "two at once"
        self._recoveries[kind].append(recovered_s)
        self._moved += len(moved)
        if len(steps) > 1:
            return  # two losses at once may move roles
        ended = {name for g in plant.groups for name, _ in g.exit_codes[exits[g.name] :]}
        amiss = (moved - injected[0].may_move) | (ended - injected[0].may_end)
        if not amiss:
            self._judged += 1
        elif starved_s > STARVED_S:
            self._starved += 1
        else:
            self._amiss.append(f"{kind} of {injected[0].what} has moved or ended {sorted(amiss)}")

    def _inject(self, steps: list[Step]) -> list[Injected]:
        """Do everything at its time, the heals included."""
        began = time.monotonic()
        injected: list[Injected] = []
        queue: list[tuple[float, Step, Injected | None]] = [
            (step.after_s, step, None) for step in steps
        ]
        while queue:
            queue.sort(key=lambda one: one[0])
            at_s, step, fault = queue.pop(0)
            time.sleep(max(0.0, began + at_s - time.monotonic()))
            if fault is not None:
                fault.heal()
                continue
            fault = self._faults.kinds[step.kind](step.pick)
            injected.append(fault)
            queue.append((at_s + step.length_s, step, fault))
        return injected

    def report(self) -> str:
        """What was shown so far."""
        lines = [
            f"{kind}: {len(times)} times, primaries after {median(times):.2f} s (max {max(times):.2f} s)"
            for kind, times in sorted(self._recoveries.items())
        ]
        ledger = self._ledger
        lines += [
            f"single faults that moved and ended what they may: {self._judged}; on a busy machine more: {self._starved}",
            f"roles moved: {self._moved}; changes acknowledged: {ledger.acknowledged}, unanswered:"
            f" {ledger.unanswered}; facts read back: {ledger.read}",
        ]
        return "\n".join(lines)

    def check_roles(self) -> None:
        """Single faults have moved no other role than they may, and the machine was not too busy to judge."""
        assert not self._amiss, "\n".join(self._amiss)
        assert self._judged > self._starved, "the machine is too busy for this test"


@pytest.mark.timeout(SOAK_S + SETTLE_S)
def test_never_two_and_soon_one_whatever_fails(tmp_path: Path) -> None:
    say(f"FAILOVER_SOAK_SEED={SEED} FAILOVER_SOAK_S={SOAK_S:g}")
    with ExitStack() as stack:
        plant = Plant(stack, tmp_path)
        stack.enter_context(entered(plant.client))
        plant.start()
        ledger = Ledger(plant.ask, random.Random(SEED))
        ledger.start()
        stack.callback(ledger.stop)
        soak = Soak(plant, ledger)
        try:
            soak.run(time.monotonic() + SOAK_S)
        finally:
            say(soak.report())
        soak.check_roles()
