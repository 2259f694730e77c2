"""The clocks, real and faked."""

import time
from datetime import UTC, datetime

from agent.ops.clock import Clock


class Host:
    """A host whose clocks are set by hand."""

    def __init__(self) -> None:
        self.uptime_s = 1000.0
        self.suspended_s = 0.0

    def clock(self) -> Clock:
        return Clock(
            boottime=lambda: self.uptime_s + self.suspended_s,
            monotonic=lambda: self.uptime_s,
            wall=lambda: datetime(2026, 1, 31, tzinfo=UTC),
        )


def test_now_is_boot_time_and_utc() -> None:
    before = time.clock_gettime(time.CLOCK_BOOTTIME)
    instant = Clock().now()
    assert before <= instant.mono <= time.clock_gettime(time.CLOCK_BOOTTIME)
    assert instant.wall.tzinfo is UTC
    assert abs((datetime.now(UTC) - instant.wall).total_seconds()) < 60


def test_a_fake_clock_returns_the_time_of_its_sources() -> None:
    host = Host()
    clock = host.clock()
    host.uptime_s = 7.0
    assert clock.now() == (7.0, datetime(2026, 1, 31, tzinfo=UTC))
    assert (clock.boottime(), clock.monotonic()) == (7.0, 7.0)


def test_a_suspension_is_reported_once() -> None:
    host = Host()
    clock = host.clock()
    assert clock.suspended_s() == 0
    host.uptime_s += 5
    host.suspended_s += 30
    assert clock.suspended_s() == 30
    assert clock.suspended_s() == 0


def test_a_suspension_before_the_start_is_not_reported() -> None:
    host = Host()
    host.suspended_s = 1e6
    assert host.clock().suspended_s() == 0


def test_a_pause_between_two_readings_is_no_suspension() -> None:
    host = Host()
    clock = host.clock()
    pauses = iter([0.0, 0.0, 9.0])  # the second reading of boot time comes late

    def boottime() -> float:
        host.uptime_s += next(pauses, 0.0)
        return host.uptime_s

    clock.boottime = boottime
    next(pauses)
    assert clock.suspended_s() == 0
    assert host.uptime_s == 1009


def test_the_real_clocks_show_no_suspension_of_a_running_test() -> None:
    clock = Clock()
    assert min(clock.suspended_s() for _ in range(20)) < 0.001
