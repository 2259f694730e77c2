"""The next wakeup of each group. Knows keys and moments, and nothing of groups.

Heartbeats postpone their groups' wakeups thousands of times a second. So the moment of each key is stored beside the
heap, and only a moment that becomes *earlier* is pushed at once; a heap entry that comes up too early is pushed
again with the stored moment.
"""

import heapq
from collections.abc import Iterator
from math import inf
from typing import Generic, TypeVar

KeyT = TypeVar("KeyT")


class Wakeups(Generic[KeyT]):
    """The next moment of each key, in CLOCK_BOOTTIME seconds."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, KeyT]] = []
        self._wanted: dict[KeyT, float] = {}
        self._queued: dict[KeyT, float] = {}
        self._order = 0

    def set(self, key: KeyT, at: float) -> bool:
        """Set the moment of ``key``; return whether it became the earliest of all."""
        self._wanted[key] = at
        if at >= self._queued.get(key, inf):
            return False
        self._push(key, at)
        return self._heap[0][2] == key

    def forget(self, key: KeyT) -> None:
        """Remove the wakeup of ``key``."""
        self._wanted.pop(key, None)

    def next_at(self) -> float:
        """A moment before which no wakeup is due; infinity if there is none."""
        return self._heap[0][0] if self._heap else inf

    def due(self, now: float, limit: int) -> Iterator[KeyT]:
        """Remove and return at most ``limit`` keys that are due. Call ``set`` for each again."""
        for _ in range(limit):
            if not self._heap or self._heap[0][0] > now:
                return
            at, _order, key = heapq.heappop(self._heap)
            if self._queued.get(key) != at:
                continue  # an earlier moment was pushed after this one
            del self._queued[key]
            wanted = self._wanted.get(key, inf)
            if wanted <= now:
                del self._wanted[key]
                yield key
            elif wanted < inf:
                self._push(key, wanted)

    def _push(self, key: KeyT, at: float) -> None:
        self._order += 1
        self._queued[key] = at
        heapq.heappush(self._heap, (at, self._order, key))
