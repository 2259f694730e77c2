"""The clocks for all decisions (R2).

A ``Clock`` is passed to each part that needs the time; nothing else reads the system's clocks. Its sources
are arguments, so a test's clock is ``Clock(boottime=lambda: t.now, monotonic=lambda: t.now)``.
"""

import time
from collections.abc import Callable
from datetime import UTC, datetime

from agent.model import Instant

READINGS = 3
"""How often two clocks are read together; a pause between them falsifies the difference, so the quickest counts."""


def _boottime() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _utc_now() -> datetime:
    return datetime.now(UTC)


class Clock:
    """Source of the time.

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
        """The current moment, as boot time and as time of day."""
        return Instant(self.boottime(), self.wall())

    def suspended_s(self) -> float:
        """Seconds, 0 or more, that the host was suspended since the last call (or since the start).

        Measured as the growth of boot time minus monotonic time, with some microseconds of noise. A pause
        of this process alone does not count.
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
