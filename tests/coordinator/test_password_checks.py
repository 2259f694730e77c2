"""Wrong passwords keep nobody out who has the right one, and what they cost has a bound."""

import asyncio
import base64
import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from agent.coordinator.auth import password_checks
from agent.coordinator.auth.limits import MOST_KEYS, FailureLimit, address_key
from agent.coordinator.auth.password_checks import PasswordChecks
from agent.coordinator.auth.passwords import Password
from agent.errors import TooManyAttempts, Unavailable


class Site:
    """Checks of passwords on a clock that is set; hashing takes as long as the test wants."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.counted: Counter[str] = Counter()
        self.begun: list[bytes] = []
        self.hashed: list[bytes] = []
        self.gate = threading.Event()
        self.gate.set()
        self.begin("ann", "ben")

    def begin(self, *names: str) -> None:
        """Begin with these users and without remembered checks; bounds are read here."""
        self.checks = PasswordChecks(users(*names), lambda: self.now, self.count)

    def count(self, outcome: str) -> None:
        self.counted[outcome] += 1

    async def name(self, user: str, password: str, host: str = "192.0.2.1") -> str | None:
        token = base64.b64encode(f"{user}:{password}".encode())
        caller = await self.checks.caller(token, host)
        return caller.name if caller is not None else None


def users(*names: str, roles: tuple[str, ...] = ()) -> dict[str, Password]:
    """Users whose names are their passwords."""
    return {name: Password(1, 8, 1, name.encode(), b"", roles) for name in names}


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    site = Site()

    def fits(self: Password, given: bytes) -> bool:
        site.begun.append(given)
        site.gate.wait(30)
        site.hashed.append(given)
        return given == self.salt

    monkeypatch.setattr(Password, "fits", fits)
    monkeypatch.setattr(password_checks, "DELAY_S", 0.0)
    yield site
    site.gate.set()


async def until(condition: Any) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - it changes in threads too
            await asyncio.sleep(0.001)


async def test_a_password_is_hashed_once_however_often_it_comes(site: Site) -> None:
    """A hundred agents at once, and each of their heartbeats, cost one hash until it is renewed."""
    await asyncio.gather(*(site.name("ann", "ann") for _ in range(100)))
    assert await site.name("ann", "ann") == "ann"
    assert site.hashed == [b"ann"]


async def test_a_good_check_is_renewed_in_the_background_before_it_ends(site: Site) -> None:
    await site.name("ann", "ann")
    site.now += password_checks.RENEW_AFTER_S
    site.gate.clear()
    assert await asyncio.wait_for(site.name("ann", "ann"), 5) == "ann"
    site.gate.set()
    await until(lambda: len(site.hashed) == 2)
    site.now += password_checks.RENEW_AFTER_S + 1
    site.gate.clear()
    assert await asyncio.wait_for(site.name("ann", "ann"), 5) == "ann"
    site.gate.set()


async def test_an_expired_good_check_has_a_worker_of_its_own(site: Site) -> None:
    """While every other worker is busy, and the queue for them is full."""
    await site.name("ann", "ann")
    site.now += password_checks.KNOWN_FOR_S + 1
    hosts = [f"198.51.100.{number % 5}" for number in range(400)]
    stuck = threading.Event()
    entered = threading.Semaphore(0)
    fits = Password.fits

    def slow(self: Password, given: bytes) -> bool:
        if given != b"ann":
            entered.release()
            stuck.wait(30)
        return fits(self, given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Password, "fits", slow)
        storm = [
            asyncio.create_task(site.name(f"eve{number}", "x", host))
            for number, host in enumerate(hosts)
        ]
        await until(lambda: site.counted["busy"] == 400 - password_checks.MOST_WAITING)
        assert await asyncio.wait_for(site.name("ann", "ann"), 5) == "ann"
        stuck.set()
        outcomes = await asyncio.gather(*storm, return_exceptions=True)
    assert {type(one) for one in outcomes} == {type(None), Unavailable}


async def test_wrong_passwords_evict_no_good_one(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(password_checks, "MOST_BAD", 3)
    site.begin("ann", "ben")
    await site.name("ann", "ann")
    for number in range(9):
        assert await site.name("ben", str(number)) is None
    hashed = len(site.hashed)
    assert await site.name("ann", "ann") == "ann"
    assert len(site.hashed) == hashed


async def test_only_the_newest_checks_are_remembered(
    monkeypatch: pytest.MonkeyPatch, site: Site
) -> None:
    """A check that is not remembered hashes the password again."""
    monkeypatch.setattr(password_checks, "MOST_GOOD", 3)
    monkeypatch.setattr(password_checks, "MOST_BAD", 3)
    names = [f"u{number}" for number in range(9)]
    site.begin(*names)
    for name in names:
        assert await site.name(name, name) == name
        await site.name("eve", name, f"192.0.2.{name[1:]}")
    site.hashed.clear()
    for name in names[-3:]:
        assert await site.name(name, name) == name
        await site.name("eve", name, f"192.0.2.{name[1:]}")
    assert site.hashed == []
    assert await site.name(names[0], names[0]) == names[0]
    await site.name("eve", names[0], "192.0.2.0")
    assert site.hashed == [names[0].encode()] * 2


async def test_a_wrong_password_is_hashed_once_in_a_while(site: Site) -> None:
    for _ in range(3):
        assert await site.name("ann", "wrong") is None
    assert site.hashed == [b"wrong"]
    site.now += password_checks.WRONG_FOR_S + 1
    assert await site.name("ann", "wrong") is None
    assert len(site.hashed) == 2


async def test_an_address_gets_no_more_checks_after_too_many_failures(site: Site) -> None:
    """Of one name: other names at the address are still checked, and the name at other addresses."""
    for number in range(password_checks.NAME_BURST):
        assert await site.name("ann", str(number)) is None
    hashed = len(site.hashed)
    with pytest.raises(TooManyAttempts) as refused:
        await site.name("ann", "once more")
    assert refused.value.retry_after_s >= 1
    assert len(site.hashed) == hashed
    assert await site.name("ben", "ben") == "ben"
    assert await site.name("ann", "ann", "192.0.2.2") == "ann"
    assert await site.name("ann", "ann") == "ann", "good before, so it is not counted"
    site.now += 1 / password_checks.NAME_PER_S
    assert await site.name("ann", "once more") is None
    with pytest.raises(TooManyAttempts):
        await site.name("ann", "and more")


async def test_all_names_of_an_address_have_a_limit_together(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    """The log has the address, and one line."""
    for number in range(password_checks.ADDRESS_BURST):
        assert await site.name(f"eve{number}", "x") is None
    with pytest.raises(TooManyAttempts):
        await site.name("another", "x")
    assert site.counted == {"wrong": password_checks.ADDRESS_BURST, "limited": 1}
    for _ in range(3):
        with pytest.raises(TooManyAttempts):
            await site.name("another", "x")
    lines = [r for r in caplog.records if "too many wrong passwords" in r.getMessage()]
    assert [line.fields["address"] for line in lines] == ["192.0.2.1"]  # type: ignore[attr-defined]


async def test_guesses_of_one_name_leave_the_workers_to_others(site: Site) -> None:
    """However many come at once: the right password for another name waits for two of them."""
    site.gate.clear()
    storm = [asyncio.create_task(site.name("ann", str(number))) for number in range(100)]
    await asyncio.sleep(0)
    other = asyncio.create_task(site.name("ben", "ben"))
    await until(lambda: site.counted["limited"] == 100 - password_checks.MOST_WAITING_OF_NAME)
    site.gate.set()
    assert await other == "ben"
    await asyncio.gather(*storm, return_exceptions=True)
    assert len(site.hashed) == password_checks.MOST_WAITING_OF_NAME + 1


async def test_nobody_waits_for_a_worker_for_long(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(password_checks, "WAIT_S", 0.01)
    site.gate.clear()
    busy = [
        asyncio.create_task(site.name(f"u{number}", "x"))
        for number in range(password_checks.VERIFIERS)
    ]
    await until(lambda: len(site.begun) == password_checks.VERIFIERS)
    with pytest.raises(Unavailable):
        await site.name("ben", "ben")
    site.gate.set()
    await asyncio.gather(*busy)
    assert await site.name("ben", "ben") == "ben"


async def test_those_who_wait_are_refused_when_others_have_used_the_limit_up(site: Site) -> None:
    """A storm that has filled the queue costs the limit, and not the queue."""
    site.gate.clear()
    storm = [asyncio.create_task(site.name(f"eve{number}", "x")) for number in range(90)]
    await asyncio.sleep(0)
    site.gate.set()
    outcomes = await asyncio.gather(*storm, return_exceptions=True)
    checked = password_checks.ADDRESS_BURST + password_checks.VERIFIERS
    assert password_checks.ADDRESS_BURST <= len(site.hashed) <= checked
    assert sum(isinstance(one, TooManyAttempts) for one in outcomes) == 90 - len(site.hashed)


async def test_a_refusal_beyond_the_limit_is_late_but_not_for_too_many(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(password_checks, "DELAY_S", 60.0)
    monkeypatch.setattr(password_checks, "MOST_DELAYED", 1)
    for number in range(password_checks.NAME_BURST):
        await site.name("ann", str(number))
    late = asyncio.create_task(site.name("ann", "x"))
    await until(lambda: site.counted["limited"] == 1)
    with pytest.raises(TooManyAttempts):
        await asyncio.wait_for(site.name("ann", "y"), 5)
    assert not late.done()
    late.cancel()


async def test_nothing_is_remembered_beyond_a_change_of_the_password(site: Site) -> None:
    """Nor by a check that was under way when the users were replaced."""
    await site.name("ann", "ann")
    ben = users("ben")
    site.checks.replace({"ann": Password(1, 8, 1, b"new", b"")} | ben)
    assert await site.name("ann", "ann") is None
    assert await site.name("ann", "new") == "ann"
    site.gate.clear()
    checking = asyncio.create_task(site.name("ben", "ben"))
    await until(lambda: site.begun[-1] == b"ben")
    site.checks.replace({"ben": Password(1, 8, 1, b"other", b"")})
    site.gate.set()
    assert await checking is None
    assert await site.name("ben", "other") == "ben"


async def test_an_unchanged_password_stays_known_when_the_users_are_replaced(site: Site) -> None:
    """Fault 22: to check 10,000 agents again would cost them their roles."""
    await site.name("ann", "ann")
    assert await site.name("ben", "new") is None
    site.checks.replace(users("ann") | {"ben": Password(1, 8, 1, b"new", b"")})
    assert await site.name("ann", "ann") == "ann"
    assert await site.name("ben", "new") == "ben", "the refusal of before is forgotten"
    assert site.hashed == [b"ann", b"new", b"new"]


async def test_changed_roles_count_at_once(site: Site) -> None:
    token = base64.b64encode(b"ann:ann")
    await site.checks.caller(token, "")
    site.checks.replace(users("ann", roles=("ops",)))
    caller = await site.checks.caller(token, "")
    assert caller is not None
    assert (3, "ops") in caller.trustees


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("192.0.2.1", "192.0.2.1", True),
        ("192.0.2.1", "192.0.2.2", False),
        ("::ffff:192.0.2.1", "192.0.2.1", True),
        ("::ffff:192.0.2.1", "::ffff:192.0.2.2", False),
        ("2001:db8::1", "2001:db8::ffff", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("fe80::1%eth0", "fe80::2%eth1", True),
        ("unix", "unix", True),
    ],
)
def test_failures_count_for_an_address_or_an_ipv6_network(
    one: str, other: str, *, same: bool
) -> None:
    assert (address_key(one) == address_key(other)) is same


def test_counted_failures_are_bounded() -> None:
    limit = FailureLimit(1, 1.0, lambda: 0.0)
    for number in range(MOST_KEYS + 5):
        limit.fail(str(number).encode())
    assert limit.wait_s(b"4") == 0, "the oldest are forgotten"
    assert limit.wait_s(b"5") == 1
    assert limit.wait_s(str(MOST_KEYS).encode()) == 1
