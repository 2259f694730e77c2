"""A workload that notes each moment at which it is alive. Runs alone: ``python writer.py OUTPUT HOST``.

Appends ``epoch host nanoseconds pid`` every few milliseconds, on CLOCK_MONOTONIC, which all processes
of one machine share. A third argument "child" makes two processes of it, "deaf" ignores TERM.
"""

import os
import signal
import sys
import time
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

PERIOD_S = 0.005


@dataclass(frozen=True, slots=True)
class Line:
    """One moment, in seconds on CLOCK_MONOTONIC."""

    epoch: int
    host: str
    at_s: float
    pid: int


def written(output: Path) -> list[Line]:
    """What writers have noted so far."""
    words = [line.split() for line in output.read_text().splitlines()] if output.exists() else []
    return [Line(int(epoch), host, int(ns) / 1e9, int(pid)) for epoch, host, ns, pid in words]


def first_and_last(output: Path) -> dict[int, tuple[float, float]]:
    """When each epoch's writers wrote first and last."""
    spans: dict[int, tuple[float, float]] = {}
    for line in written(output):
        first_s, last_s = spans.get(line.epoch, (line.at_s, line.at_s))
        spans[line.epoch] = min(first_s, line.at_s), max(last_s, line.at_s)
    return dict(sorted(spans.items()))


def overlap_s(output: Path) -> float:
    """For how long a tenure's writers wrote beside those of another: 0 or less is as promised.

    Writers of one epoch on two hosts are two tenures, too.
    """
    tenures: dict[tuple[int, str], list[float]] = {}
    for line in written(output):
        tenures.setdefault((line.epoch, line.host), []).append(line.at_s)
    spans = sorted((min(moments), max(moments)) for moments in tenures.values())
    ends = accumulate((last_s for _, last_s in spans), max)
    starts = (first_s for first_s, _ in spans[1:])
    return max((end_s - start_s for end_s, start_s in zip(ends, starts, strict=False)), default=0.0)


def main(output: str, host: str, *traits: str) -> None:
    """Until somebody ends it."""
    if "deaf" in traits:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if "child" in traits:
        os.fork()
    epoch = os.environ["FAILOVER_EPOCH"]
    file = os.open(output, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    while True:
        os.write(file, f"{epoch} {host} {time.monotonic_ns()} {os.getpid()}\n".encode())
        time.sleep(PERIOD_S)


if __name__ == "__main__":
    main(*sys.argv[1:])
