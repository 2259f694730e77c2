"""Check passwords without letting wrong ones keep right ones out.

A check takes 60 ms and 32 MiB, so its outcome is remembered. Good and bad outcomes are kept apart, so a flood of
wrong passwords does not displace a good one. A good outcome is renewed in the background before it expires, by a
worker reserved for passwords that were good before. All other checks wait for the other workers, and an
address with too many failed checks gets no further ones for a while.
"""

import asyncio
import base64
import binascii
import hmac
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from agent.coordinator.auth.callers import Caller, user_caller
from agent.coordinator.auth.limits import FailureLimit, Remembered, address_key
from agent.coordinator.auth.passwords import Password, dummy_password
from agent.errors import RequestRefused, TooManyAttempts, Unavailable
from agent.ops.logs import Log

VERIFIERS = 2
"""How many passwords are checked at the same time, in threads of 32 MiB each, if they have not been good before."""

KNOWN_VERIFIERS = 1
"""The same for those that were good before: 16 a second, 60,000 in the hour that a good check lasts."""

MOST_WAITING = 200
"""How many different credentials may wait for a check (6 s of work). Further callers get 503."""

MOST_WAITING_OF_ADDRESS = 100
MOST_WAITING_OF_NAME = 2
"""How many of them may come from one address, and from one user name at an address, so that one caller does not
delay the others. A name has two passwords only while its password is being changed; more are guesses."""

WAIT_S = 5.0
"""How long a check waits for a worker on a slow machine. After that its caller has given up."""

KNOWN_FOR_S = 3600.0
"""How long a good check is remembered, which saves a hash for each heartbeat."""

RENEW_AFTER_S = KNOWN_FOR_S / 2
"""A good check of this age is renewed in the background: early enough to renew those of thousands of agents."""

WRONG_FOR_S = 10.0
"""How long a bad check is remembered, so that a misconfigured agent does not use up the processor."""

MOST_GOOD = 16_384
MOST_BAD = 4096
"""How many checks are remembered. Only users of the file can add a good one, and a coordinator serves fewer
agents."""

ADDRESS_BURST, ADDRESS_PER_S = 50, 5.0
"""How many checks of one address may fail: a third of a processor. Agents behind one router share this, and one
misconfigured agent, which fails once in WRONG_FOR_S, does not use it up."""

NAME_BURST, NAME_PER_S = 10, 0.5
"""How many checks of one user name at an address may fail, so that somebody who guesses its password leaves checks to
the other names at that address."""

DELAY_S = 0.5
MOST_DELAYED = 1000
"""A refusal beyond the limits is delayed, so that a caller in a loop costs little; but not if MOST_DELAYED answers
are delayed already."""

RETRY_S = 1.0

LOG_EVERY_S = 10.0
"""Interval between two log lines about callers beyond the limits: a flood of them must not fill the disk."""

log = Log(__name__)


@dataclass(frozen=True, slots=True)
class _Good:
    """A good check: its caller, the entry that it was checked against, and when it expires."""

    caller: Caller
    entry: Password
    renew_at: float
    until: float


@dataclass(frozen=True, slots=True)
class _Attempt:
    """The credentials of one request.

    Attributes:
        digest: identifies name and password; made with a key that only this process has.
        host: the caller's address, for the log.
        address: the same, for the limits.
        name: the user name at that address, for the limits.
    """

    user: str
    password: bytes
    digest: bytes
    host: str
    address: bytes
    name: bytes


class PasswordChecks:
    """Checks and remembers passwords.

    Args:
        users: by name.
        clock: monotonic seconds.
        count: receives the outcome of each check: good, wrong, limited, or busy.
    """

    def __init__(
        self,
        users: Mapping[str, Password],
        clock: Callable[[], float],
        count: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.count = count
        self._users = users
        self._clock = clock
        self._key = os.urandom(32)
        self._good: dict[bytes, _Good] = {}
        self._bad: Remembered[bool] = Remembered(MOST_BAD)
        self._running: dict[bytes, asyncio.Task[Caller | None]] = {}
        self._waiting: dict[bytes, _Attempt] = {}
        self._workers = asyncio.Semaphore(VERIFIERS)
        self._reserved = asyncio.Semaphore(KNOWN_VERIFIERS)
        self._of_address = FailureLimit(ADDRESS_BURST, ADDRESS_PER_S, clock)
        self._of_name = FailureLimit(NAME_BURST, NAME_PER_S, clock)
        self._delayed = 0
        self._logged_at = float("-inf")
        self._dummy = dummy_password()

    @property
    def users(self) -> Mapping[str, Password]:
        """The users in force."""
        return self._users

    def replace(self, users: Mapping[str, Password]) -> None:
        """Use these users from now on.

        Keep good checks against entries that have not changed, as repeating those of 10,000 agents would take
        minutes. Forget all other checks.
        """
        self._users = users
        self._bad.clear()
        self._good = {
            digest: good
            for digest, good in self._good.items()
            if users.get(good.caller.name) == good.entry
        }

    async def caller(self, credentials: bytes, host: str) -> Caller | None:
        """The user with these credentials (Base64 of ``name:password``), or None if they are wrong.

        Raises:
            TooManyAttempts: too many checks for this address have failed, or wait.
            Unavailable: too many credentials are being checked.
        """
        try:
            decoded = base64.b64decode(credentials, validate=True)
            digest = hmac.digest(self._key, decoded, "sha256")
            good = self._good.get(digest)
            now = self._clock()
            if good is not None and now < good.renew_at:
                return good.caller
            name, colon, password = decoded.partition(b":")
            user = name.decode()
        except (binascii.Error, UnicodeDecodeError):
            return None
        if not colon:
            return None
        address = address_key(host)
        of_name = hmac.digest(self._key, address + b"\0" + name, "sha256")
        attempt = _Attempt(user, password, digest, host, address, of_name)
        if good is not None:
            renewal = self._start(attempt, known=True)
            return good.caller if now < good.until else await asyncio.shield(renewal)
        if self._bad.get(digest, now):
            return None
        if digest not in self._running:
            await self._refuse_excess(attempt)
        return await asyncio.shield(self._start(attempt, known=False))

    async def _refuse_excess(self, attempt: _Attempt) -> None:
        """Raise TooManyAttempts or Unavailable if no further check may wait."""
        refusal: RequestRefused
        if self._is_limited(attempt):
            refusal = self._too_many(attempt)
        elif len(self._waiting) >= MOST_WAITING:
            refusal = self._too_busy()
        else:
            return
        if self._delayed < MOST_DELAYED:
            self._delayed += 1
            try:
                await asyncio.sleep(DELAY_S)
            finally:
                self._delayed -= 1
        raise refusal

    def _is_limited(self, attempt: _Attempt) -> bool:
        waiting = self._waiting.values()
        return (
            self._wait_s(attempt) > 0
            or sum(one.name == attempt.name for one in waiting) >= MOST_WAITING_OF_NAME
            or sum(one.address == attempt.address for one in waiting) >= MOST_WAITING_OF_ADDRESS
        )

    def _wait_s(self, attempt: _Attempt) -> float:
        return max(self._of_address.wait_s(attempt.address), self._of_name.wait_s(attempt.name))

    def _too_many(self, attempt: _Attempt) -> TooManyAttempts:
        self.count("limited")
        if self._clock() >= self._logged_at + LOG_EVERY_S:
            self._logged_at = self._clock()
            log.warning(
                "too many wrong passwords, checks for this address refused", address=attempt.host
            )
        return TooManyAttempts(
            "Too many passwords from this address were wrong, or are being checked.",
            "Correct the credentials, and try again after Retry-After.",
            retry_after_s=max(RETRY_S, self._wait_s(attempt)),
        )

    def _too_busy(self) -> Unavailable:
        self.count("busy")
        return Unavailable(
            "Too many passwords are being checked.",
            "Try again after Retry-After.",
            retry_after_s=RETRY_S,
        )

    def _start(self, attempt: _Attempt, *, known: bool) -> asyncio.Task[Caller | None]:
        """The check of these credentials: one for all concurrent requests with them."""
        task = self._running.get(attempt.digest)
        if task is None:
            check = self._check_known(attempt) if known else self._check_unknown(attempt)
            task = asyncio.get_running_loop().create_task(check)
            self._running[attempt.digest] = task
            if not known:
                self._waiting[attempt.digest] = attempt
            task.add_done_callback(lambda done: self._end(attempt.digest, done))
        return task

    def _end(self, digest: bytes, done: asyncio.Task[Caller | None]) -> None:
        del self._running[digest]
        self._waiting.pop(digest, None)
        if not done.cancelled():
            done.exception()  # of a renewal that nobody awaits

    async def _check_known(self, attempt: _Attempt) -> Caller | None:
        async with self._reserved:
            return await self._verify(attempt)

    async def _check_unknown(self, attempt: _Attempt) -> Caller | None:
        try:
            async with asyncio.timeout(WAIT_S):
                await self._workers.acquire()
        except TimeoutError:
            raise self._too_busy() from None
        try:
            if self._wait_s(attempt) > 0:  # others of this address have failed meanwhile
                raise self._too_many(attempt)
            caller = await self._verify(attempt)
        finally:
            self._workers.release()
        if caller is None:
            self._of_address.fail(attempt.address)
            self._of_name.fail(attempt.name)
        else:
            self._of_name.forget(attempt.name)
        return caller

    async def _verify(self, attempt: _Attempt) -> Caller | None:
        """Hash the password and remember the outcome; again if the user's entry changes meanwhile."""
        while True:
            entry = self._users.get(attempt.user)
            fits = await asyncio.to_thread((entry or self._dummy).fits, attempt.password)
            if self._users.get(attempt.user) == entry:
                break
        now = self._clock()
        self._good.pop(attempt.digest, None)
        if entry is None or not fits:
            self.count("wrong")
            self._bad.put(attempt.digest, True, now + WRONG_FOR_S)
            return None
        self.count("good")
        caller = user_caller(attempt.user, entry.roles)
        if len(self._good) >= MOST_GOOD:
            self._good.pop(next(iter(self._good)))
        self._good[attempt.digest] = _Good(caller, entry, now + RENEW_AFTER_S, now + KNOWN_FOR_S)
        return caller
