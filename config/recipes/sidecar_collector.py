"""A collector in a container of its own: ``sidecar_collector.py STATE_FILE OUTPUT``.

It shares a volume with the agent's container, reads the state file before each write, and so stops
by itself when the agent is dead or frozen and the lease is over.
"""

import json
import sys
import time
from pathlib import Path

PERIOD_S = 0.05


def current_epoch(state_file: Path) -> int | None:
    """The epoch to write under, or None: do not write."""
    try:
        state = json.loads(state_file.read_text())
    except (OSError, ValueError):
        return None
    until = state["active_until_boottime_s"]
    if state["role"] != "Primary" or until is None:
        return None
    return state["epoch"] if time.clock_gettime(time.CLOCK_BOOTTIME) < until else None


with Path(sys.argv[2]).open("a", buffering=1) as output:
    while True:
        if (epoch := current_epoch(Path(sys.argv[1]))) is not None:
            output.write(f"{epoch} {time.monotonic_ns()}\n")
        time.sleep(PERIOD_S)
