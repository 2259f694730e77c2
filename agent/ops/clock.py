"""The clocks that decisions are made by (R2). Knows nothing of what is decided.

``Clock`` is passed to whatever needs the time; nothing else reads one. Its sources are arguments,
so a test's clock is ``Clock(boottime=lambda: t.now, monotonic=lambda: t.now)``.
"""

import time
from collections.abc import Callable
from datetime import UTC, datetime

from agent.model import Instant

READINGS = 3
"""A reading of two clocks is off by any pause in between; the tightest of three hardly ever is."""


def _boottime() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _utc_now() -> datetime:
    return datetime.now(UTC)


class Clock:
    """Where the time comes from.

    Attributes:
        boottime: seconds on CLOCK_BOOTTIME, which counts suspended time. Decides about leases.
        monotonic: seconds on CLOCK_MONOTONIC, which asyncio's timers use and which stops in suspend.
        wall: the time of day, aware and in UTC.
    """

    def __init__(
        self,
        boottime: Callable[[], float] = _boottime,
        monotonic: Callable[[], float] = time.monotonic,
        wall: Callable[[], datetime] = _utc_now,
    ) -> None:
        self.boottime = boottime
        self.monotonic = monotonic
        self.wall = wall
        self._gap_s = self._read_gap_s()

    def now(self) -> Instant:
        """This moment, on both clocks that the project speaks of."""
        return Instant(self.boottime(), self.wall())

    def suspended_s(self) -> float:
        """Seconds, 0 or more, that the host was suspended since the last call (or since the start).

        It is the growth of boot time minus monotonic time. A pause of this process alone is not
        seen here; a rest of some microseconds is noise.
        """
        before, self._gap_s = self._gap_s, self._read_gap_s()
        return max(0.0, self._gap_s - before)

    def _read_gap_s(self) -> float:
        readings = []
        for _ in range(READINGS):
            start = self.monotonic()
            gap_s = self.boottime() - start
            readings.append((self.monotonic() - start, gap_s))
        return min(readings)[1]
