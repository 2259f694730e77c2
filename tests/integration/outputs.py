"""What the workloads of one group have written, read bit by bit while they write.

Each host's workload (writer.py) has a file of its own. Knows nothing of faults.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Span:
    """When one epoch's workload wrote, in seconds on CLOCK_MONOTONIC, where, and which process did last."""

    host: str
    first_s: float
    last_s: float
    pid: int


class Outputs:
    """The files of a group's workloads."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._offsets = dict.fromkeys(paths, 0)
        self.spans: dict[int, Span] = {}

    def read(self) -> None:
        """Take in what is new. The end of a line that was killed while it wrote is left alone."""
        for path, offset in self._offsets.items():
            if not path.exists():
                continue
            with path.open("rb") as file:
                file.seek(offset)
                text, newline, _ = file.read().rpartition(b"\n")
            self._offsets[path] = offset + len(text) + len(newline)
            for line in text.splitlines():
                epoch, host, ns, pid = line.split()
                self._add(int(epoch), host.decode(), int(ns) / 1e9, int(pid))

    def _add(self, epoch: int, host: str, at_s: float, pid: int) -> None:
        span = self.spans.setdefault(epoch, Span(host, at_s, at_s, pid))
        assert span.host == host, f"epoch {epoch} is of {span.host} and of {host}"
        span.first_s = min(span.first_s, at_s)
        span.last_s = max(span.last_s, at_s)
        span.pid = pid

    def overlap_s(self) -> float:
        """The longest time for which one epoch was written while a later one was; 0 as promised."""
        longest, latest = 0.0, float("-inf")
        for _, span in sorted(self.spans.items()):
            longest = max(longest, latest - span.first_s)
            latest = max(latest, span.last_s)
        return longest

    def writes(self, epoch: int, within_s: float) -> bool:
        """Whether that epoch, and no later one, has been written lately."""
        self.read()
        if epoch not in self.spans or epoch != max(self.spans):
            return False
        return time.monotonic() - self.spans[epoch].last_s < within_s
