"""The groups in memory: which this coordinator decides about, and for how long (R19).

A ``Shard`` is one tenure of leadership over a part of the groups. It is over once it has ``ended``, or when its
``Lease`` is not renewed in time, and is never continued: the next tenure begins with a new ``Shard``, whose
groups are loaded anew. Knows nothing of how leadership is won; leadership.py does.
"""

import asyncio
from math import inf

from agent.coordinator.store import Store, Stored
from agent.core.group_state import progress_of, state_after_restart
from agent.errors import NotFound
from agent.model import GroupKey, Instant, Progress

STALL_FLOOR_S = 0.1
STALL_SHARE = 0.25
"""The stalls that are excused: longer than this share of L and than 0.1 s, which is ordinary scheduling. A shorter
stall cannot expire a lease that is renewed as R1 demands, nor that of a v1 client (every L/2), and excusing it would
keep a dead primary for longer on a busy host."""


class Lease:
    """Until when shards may be led, in CLOCK_BOOTTIME seconds. Only leadership.py changes it."""

    __slots__ = ("until",)

    def __init__(self, until: float) -> None:
        self.until = until


class Shard:
    """One tenure of leadership. ``store`` refuses changes once another coordinator leads."""

    __slots__ = ("ended", "lease", "number", "store")

    def __init__(self, number: int, store: Store, lease: Lease | None = None) -> None:
        self.number = number
        self.store = store
        self.lease = lease or Lease(inf)
        self.ended = False

    def is_led_at(self, mono: float) -> bool:
        """Whether this coordinator may decide at a moment, in CLOCK_BOOTTIME seconds."""
        return mono < self.lease.until and not self.ended


class Group:
    """One group in memory.

    Attributes:
        lock: held during a durable change.
        saved: the progress that the store has.
        doubtful: whether the outcome of a change is unknown, so that the record has to be read before the
            next decision.
        gone: whether the group was deleted; inputs that wait for the lock fail with NotFound.
        progress_queued: whether the group is in the queue of groups with unsaved progress.
        ticking: whether a Tick runs, or waits for the lock.
    """

    __slots__ = (
        "doubtful",
        "gone",
        "key",
        "lock",
        "progress_queued",
        "readers",
        "saved",
        "shard",
        "stall_s",
        "state",
        "ticking",
        "version",
    )

    def __init__(self, key: GroupKey, shard: Shard, stored: Stored, now: Instant) -> None:
        self.key = key
        self.shard = shard
        self.state = state = state_after_restart(stored.record, now, stored.progress)
        self.version = stored.version
        self.saved = stored.progress
        self.stall_s = max(STALL_FLOOR_S, STALL_SHARE * state.record.config.lease_s)
        self.lock = asyncio.Lock()
        self.doubtful = self.gone = self.progress_queued = self.ticking = False
        self.readers: dict[asyncio.Future[None], int] = {}

    def unsaved_progress(self) -> Progress | None:
        """The progress that the store does not have yet, or None."""
        progress = progress_of(self.state)
        return progress if progress != self.saved else None

    def wake_blocked_reads(self, revision: float = inf) -> None:
        """Wake the blocked status reads that wait for ``revision`` or an earlier one."""
        for changed, after in self.readers.items():
            if after < revision and not changed.done():
                changed.set_result(None)


def group_not_found(key: GroupKey) -> NotFound:
    """Build the refusal of a request for a group that does not exist."""
    return NotFound(f'There is no group "{key.group}".', "Create it with POST .../groups first.")
