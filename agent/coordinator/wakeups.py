"""The next wakeup of each group. Knows keys and times, and nothing of groups.

A heartbeat moves its group's next moment further away, thousands of times a second. So the moment
is kept beside the heap: an entry of the heap that comes up too early is put back, and only a moment
that comes *nearer* costs a push at once.
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
        """Come back to ``key`` at ``at`` instead; whether the heap has a nearer moment now."""
        self._wanted[key] = at
        if at >= self._queued.get(key, inf):
            return False
        self._push(key, at)
        return self._heap[0][2] == key

    def forget(self, key: KeyT) -> None:
        """Come back to ``key`` no more."""
        self._wanted.pop(key, None)

    def next_at(self) -> float:
        """No moment is nearer than this; infinity if there is none."""
        return self._heap[0][0] if self._heap else inf

    def due(self, now: float, limit: int) -> Iterator[KeyT]:
        """At most ``limit`` keys whose moment has come. Each is to be ``set`` again."""
        for _ in range(limit):
            if not self._heap or self._heap[0][0] > now:
                return
            at, _order, key = heapq.heappop(self._heap)
            if self._queued.get(key) != at:
                continue  # a nearer one was pushed since, and has been seen
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
