"""Which connection makes room for another one, what is logged about it, and cached answers."""

import asyncio
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.coordinator import limits
from agent.coordinator.api import LONG_BODY
from agent.coordinator.auth import password_checks, tokens
from agent.coordinator.auth.limits import MOST_KEYS
from agent.coordinator.changes import MAX_CHANGES
from agent.coordinator.limits import (
    MAX_LOGGED,
    MAX_SPARE,
    REPORT_S,
    Admission,
    Cache,
    Ending,
    Reports,
    address_of,
)
from agent.coordinator.routes import LONGEST_REMEMBERED, PATHS_REMEMBERED


@dataclass(eq=False)
class Fake:
    """A connection."""

    address: str = "a"
    limit: Ending | None = None


def opened(admission: Admission[Fake], address: str = "a") -> tuple[Fake, Fake | None]:
    """A new connection, and the one that is closed for it."""
    new = Fake(address)
    victim, new.limit = admission.admit(new)
    return new, victim


def test_the_oldest_that_has_not_authenticated_makes_room() -> None:
    admission: Admission[Fake] = Admission(3, 3)
    first, second, third = (opened(admission, name)[0] for name in "abc")
    admission.authenticate(first)
    fourth, victim = opened(admission, "d")
    assert (victim, fourth.limit) == (second, None)
    assert (admission.authenticated, admission.strangers) == (1, 2)
    _, victim = opened(admission, "e")
    assert victim is third


def test_without_one_a_connection_is_spare() -> None:
    admission: Admission[Fake] = Admission(2, 2)
    for name in "ab":
        admission.authenticate(opened(admission, name)[0])
    new, victim = opened(admission, "c")
    assert (victim, new.limit) == (None, Ending.CONNECTION_LIMIT)
    admission.authenticate(new)
    assert admission.authenticated == 2, "a spare one stays spare"


def test_an_address_has_a_limit_of_its_own_and_makes_its_own_room() -> None:
    admission: Admission[Fake] = Admission(10, 2)
    other, _ = opened(admission, "b")
    known, _ = opened(admission)
    admission.authenticate(known)
    stranger, _ = opened(admission)
    newer, victim = opened(admission)
    assert victim is stranger, "not the other address's, which is older"
    admission.authenticate(newer)
    spare, victim = opened(admission)
    assert (victim, spare.limit) == (None, Ending.ADDRESS_LIMIT)
    admission.remove(known)
    _, victim = opened(admission)
    assert victim is None
    admission.remove(other)


def test_spare_connections_are_few() -> None:
    admission: Admission[Fake] = Admission(1, 1)
    admission.authenticate(opened(admission)[0])
    spare = [opened(admission) for _ in range(MAX_SPARE)]
    assert all(victim is None for _, victim in spare)
    _, victim = opened(admission)
    assert victim is spare[0][0]
    admission.remove(spare[0][0])
    assert admission.strangers == MAX_SPARE


@given(
    st.lists(st.tuples(st.sampled_from(("open", "know", "close")), st.integers(0, 30)), max_size=80)
)
def test_whatever_happens_the_limits_hold_and_nothing_is_left(
    events: list[tuple[str, int]],
) -> None:
    """Authenticated connections are never closed for others."""
    admission: Admission[Fake] = Admission(5, 3)
    live: list[Fake] = []
    known: list[Fake] = []
    for kind, number in events:
        if kind == "open":
            new, victim = opened(admission, "abc"[number % 3])
            live.append(new)
            if victim is not None:
                live.remove(victim)
                assert victim not in known
        elif live and kind == "know":
            chosen = live[number % len(live)]
            admission.authenticate(chosen)
            if chosen.limit is None and chosen not in known:
                known.append(chosen)
        elif live:
            chosen = live.pop(number % len(live))
            admission.remove(chosen)
            admission.remove(chosen)
            if chosen in known:
                known.remove(chosen)
        regular = [one for one in live if one.limit is None]
        assert len(regular) <= 5
        assert all(sum(one.address == name for one in regular) <= 3 for name in "abc")
        assert admission.authenticated == len(known)
        assert admission.strangers == len(live) - len(known)
    for one in live:
        admission.remove(one)
    # nothing public shows what is kept of one that has gone
    assert not any((admission._open, admission._strangers, admission._strangers_of))
    assert not any((admission._authenticated, admission._spare))


@pytest.mark.parametrize(
    ("peer", "address"),
    [
        (("192.0.2.7", 1), "192.0.2.7"),
        (("::ffff:192.0.2.7", 1, 0, 0), "192.0.2.7"),
        (("2001:db8:1:2:3:4:5:6", 1, 0, 0), "2001:db8:1:2::/64"),
        (("2001:db8:1:2::9", 1, 0, 0), "2001:db8:1:2::/64"),
        (("2001:db8:1:3::9", 1, 0, 0), "2001:db8:1:3::/64"),
        (("fe80::1%eth0", 1, 0, 2), "fe80::/64"),
        (("::1", 1, 0, 0), "::/64"),
    ],
)
def test_an_address_of_ipv6_is_counted_by_its_network(
    peer: tuple[str, int, int, int], address: str
) -> None:
    assert address_of(peer) == address


class Counted:
    """A meter."""

    def __init__(self) -> None:
        self.endings: list[Ending] = []

    def connection_ended(self, why: Ending) -> None:
        self.endings.append(why)


def test_a_kind_of_line_is_logged_once_in_a_while(caplog: pytest.LogCaptureFixture) -> None:
    now, counted = [0.0], Counted()
    reports = Reports(counted, lambda: now[0])
    for _ in range(100):
        reports.ended(Ending.BAD_REQUEST, "192.0.2.7", "x" * 1000)
        reports.ended(Ending.IDLE, "192.0.2.7")
    reports.ended(Ending.EVICTED, "192.0.2.7")
    reports.not_accepted("Too many open files")
    assert len(caplog.records) == 3, "one of each kind, and none of what is usual"
    now[0] += REPORT_S
    reports.ended(Ending.BAD_REQUEST, "192.0.2.8", "why")
    first, *_, last = (getattr(record, "fields", {}) for record in caplog.records)
    assert first["reason"] == "x" * MAX_LOGGED
    assert (last["address"], last["reason"]) == ("192.0.2.8", "why")
    assert last["not_logged_before"] == 99
    assert len(counted.endings) == 202


async def test_an_answer_is_made_once_for_all_who_ask_at_the_same_time() -> None:
    made, free = 0, asyncio.Event()

    async def make() -> int:
        nonlocal made
        made += 1
        await free.wait()
        return made

    cache: Cache[int] = Cache(0.05)
    asking = [asyncio.create_task(cache.get("k", make)) for _ in range(10)]
    gone = asyncio.create_task(cache.get("k", make))
    await asyncio.sleep(0)
    gone.cancel()
    await asyncio.sleep(0)
    free.set()
    assert await asyncio.gather(*asking) == [1] * 10
    assert await cache.get("k", make) == 1
    assert await cache.get("other", make) == 2
    while await cache.get("k", make) == 1:  # noqa: ASYNC110 - until it is too old
        await asyncio.sleep(0.01)
    assert made == 3


async def test_a_failure_is_not_used_again() -> None:
    async def fail() -> int:
        raise OSError("no")

    async def make() -> int:
        return 1

    cache: Cache[int] = Cache(60)
    with pytest.raises(OSError, match="no"):
        await cache.get("k", fail)
    assert await cache.get("k", make) == 1


def test_the_memory_for_callers_and_its_bounds_are_in_the_operators_page() -> None:
    """Each number that bounds what an unknown caller may occupy, as the program has it."""
    page = (Path(__file__).parents[2] / "docs" / "operations.md").read_text()
    kib = f"{limits.MAX_HEAD_BYTES // 1024} KiB, {limits.MAX_HEADERS} headers, {limits.HEAD_S:g} s"
    for wanted in (
        f"| head of a request | {kib} |",
        f"| idle connection | {limits.IDLE_S:g} s |",
        f"| reading an answer | {limits.ANSWER_S:g} s from",
        f"| long answers that are being sent | {limits.MAX_UNSENT_BYTES >> 20} MiB of those above"
        f" {limits.PART_BYTES >> 10} KiB |",
        f"| bodies above {LONG_BODY // 1024} KiB |",
        f"| changes, and reads of access lists, that wait for the store | {MAX_CHANGES:,} |",
        f"| callers without authentication that are behind with reading | {limits.MAX_STALLED} |",
        f"| connections beyond a limit | {limits.MAX_SPARE} at once |",
        f"| paths that are remembered | {PATHS_REMEMBERED:,}, of at most {LONGEST_REMEMBERED} bytes",
        f"| {password_checks.MOST_GOOD:,} right ones of each, for 1 h and 5 min at most;"
        f" {password_checks.MOST_BAD:,} wrong ones, for {password_checks.WRONG_FOR_S:g} s |",
        f"those of {MOST_KEYS:,} addresses (IPv6: networks), and of {MOST_KEYS:,} names",
        f"| {password_checks.MOST_WAITING}; {password_checks.MOST_WAITING_OF_ADDRESS} of one address,"
        f" {password_checks.MOST_WAITING_OF_NAME} of one name; {password_checks.WAIT_S:g} s each |",
    ):
        assert wanted in page
    assert (tokens.MOST_GOOD, tokens.MOST_BAD) == (
        password_checks.MOST_GOOD,
        password_checks.MOST_BAD,
    )
    assert (password_checks.KNOWN_FOR_S, tokens.KNOWN_FOR_S) == (3600.0, 300.0)
