"""Bounds on what callers may occupy before they are known: connections, time, sizes, log lines.

Owns each bound with its reason, and which connection makes room for another one. Knows nothing of sockets
(listener.py), of HTTP (connection.py) and of what a request means.
"""

import asyncio
import socket
from collections.abc import Awaitable, Callable
from enum import StrEnum
from math import inf
from typing import Generic, Protocol, TypeVar

from agent.errors import RequestRefused, Unavailable
from agent.ops.logs import Log

MAX_HEAD_BYTES = 32 * 1024
"""Bytes of a request's target and headers: a bearer token of 16 KiB fits; the longest path has 13 KiB."""

MAX_HEADERS = 100
"""Headers of a request; a client behind two proxies sends some 30."""

BODY_OVERHEAD = 8
"""How many times ``max_body_bytes`` a chunked body may take on the wire: in chunks of one byte it takes six."""

MAX_PIPELINED = 16
PARSED_AT_ONCE = 2048
"""Once MAX_PIPELINED requests of a connection (some 4 KiB each) wait for the answer to an earlier one, nothing more is
received on it. PARSED_AT_ONCE bytes are parsed at a time, which can contain up to 100 further requests."""

HEAD_S = 10.0
"""Timeout of a request's head from its first byte, and of a connection's first request. Agents have shorter
timeouts."""

BODY_S = 20.0
BODY_BYTES_PER_S = 4096
"""Timeout of a body from the end of its head, extended by a second for each BODY_BYTES_PER_S received. So the
largest body may take as long as a line of 33 kbit/s needs."""

IDLE_S = 75.0
"""Idle timeout of a connection: longer than heartbeat intervals (10 s at most of an agent, 30 s of a v1 client
with the usual FailoverTimeout of a minute), so that the next heartbeat finds its connection open."""

ANSWER_S = 60.0
"""Timeout of sending an answer, from when its reader first falls behind. A line of 2 Mbit/s needs this for the
largest answer, 12 MB of metrics of 20,000 sessions."""

PART_BYTES = 65_536
"""How many bytes of a long answer are sent before other requests are served: 12 MB at once took 50 ms with TLS."""

MAX_UNSENT_BYTES = 64 * 1024 * 1024
"""Bound for all answers together that are longer than PART_BYTES and are being sent: callers can make answers of 16
MiB, and take ANSWER_S to read each."""

HANDSHAKE_S = 10.0
"""Timeout of a TLS handshake: some round trips, and the computing of a slow client."""

CLOSE_S = 2.0
"""How long a connection that is being closed may send its last bytes, while received bytes are discarded: a reset
would destroy the answer that states the reason."""

MAX_STALLED = 16
"""The most connections without authentication whose readers have fallen behind; beyond that the oldest is closed.
Each may keep a page of metrics in memory."""

SWEEP_S = 1.0
"""Interval of the check of all deadlines. All connections share a timer, which costs less than one for each
request."""

MAX_SPARE = 24
"""The most connections beyond a limit. Each is answered once: 503, or 200 at /healthz."""

ACCEPTED_AT_ONCE = 64
"""How many connections are accepted (some 5 ms) before open ones are served again."""

ACCEPT_RETRY_S = 0.2
"""Pause before the next attempt to accept, when the system has no descriptors or memory left."""

REPORT_S = 10.0
"""Interval between two log lines of a kind that callers can cause."""

MAX_LOGGED = 200
"""The most characters of a caller's text, such as a path, in a log line."""

CACHE_S = 1.0
"""How long an answer is cached that costs more than a heartbeat and needs no authentication."""

T = TypeVar("T")
log = Log(__name__)


class Ending(StrEnum):
    """Why a connection was ended by the coordinator."""

    ADDRESS_LIMIT = "address_limit"
    CONNECTION_LIMIT = "connection_limit"
    EVICTED = "evicted"
    HANDSHAKE = "handshake"
    IDLE = "idle"
    HEAD_TIMEOUT = "head_timeout"
    BODY_TIMEOUT = "body_timeout"
    ANSWER_TIMEOUT = "answer_timeout"
    HEAD_SIZE = "head_size"
    BODY_SIZE = "body_size"
    BAD_REQUEST = "bad_request"


class HeadTooLarge(RequestRefused):
    """The head of a request is longer than this service reads."""


class TooSlow(RequestRefused):
    """A request has not arrived in time."""


class Meter(Protocol):
    """Receives what is counted here."""

    def connection_ended(self, why: Ending) -> None: ...


class Reports:
    """Logs why connections are ended: one line of each kind in REPORT_S, with the number of the others.

    Args:
        meter: counts all of them.
        clock: seconds.
    """

    def __init__(self, meter: Meter, clock: Callable[[], float]) -> None:
        self._meter = meter
        self._clock = clock
        self._next: dict[str, float] = {}
        self._unlogged: dict[str, int] = {}

    def ended(self, why: Ending, address: str, reason: str = "") -> None:
        """Record that the coordinator ended a connection of this address."""
        self._meter.connection_ended(why)
        if why is not Ending.IDLE:
            self._warn(why, "connection ended", why=why, address=address, reason=reason)

    def not_accepted(self, reason: str) -> None:
        """Record that the system has no room for another connection."""
        self._warn("accept", "connections cannot be accepted", reason=reason)

    def _warn(self, kind: str, message: str, **fields: str) -> None:
        """Log a warning, at most one of each kind in REPORT_S. The kinds are few."""
        if (now := self._clock()) < self._next.get(kind, -inf):
            self._unlogged[kind] = self._unlogged.get(kind, 0) + 1
            return
        self._next[kind] = now + REPORT_S
        shown = {key: value[:MAX_LOGGED] for key, value in fields.items() if value}
        log.warning(message, **shown, not_logged_before=self._unlogged.pop(kind, 0))


class Slot(Protocol):
    """A connection as ``Admission`` sees it. Its ``address`` is from ``address_of``."""

    address: str


S = TypeVar("S", bound=Slot)


class Admission(Generic[S]):
    """Which connections are open, and which one has to make room for another.

    At a limit the oldest connection that has never authenticated is closed for the new one. If all have,
    the new one is *spare*: its request is refused for lack of room.

    Args:
        most: connections in all.
        most_per_address: of one address.
    """

    def __init__(self, most: int, most_per_address: int) -> None:
        self.most = most
        self.most_per_address = most_per_address
        self._open: dict[str, int] = {}
        self._strangers: dict[S, None] = {}
        self._strangers_of: dict[str, dict[S, None]] = {}
        self._authenticated: set[S] = set()
        self._spare: dict[S, None] = {}

    @property
    def authenticated(self) -> int:
        """Number of connections that have authenticated."""
        return len(self._authenticated)

    @property
    def strangers(self) -> int:
        """Number of connections that have not authenticated, spare ones included."""
        return len(self._strangers) + len(self._spare)

    def admit(self, new: S) -> tuple[S | None, Ending | None]:
        """Count a connection.

        Returns:
            The connection to close for it, already taken out; and the limit if the new one is spare.
        """
        limit = None
        if self._open.get(new.address, 0) >= self.most_per_address:
            limit, oldest = Ending.ADDRESS_LIMIT, self._strangers_of.get(new.address)
        elif len(self._strangers) + len(self._authenticated) >= self.most:
            limit, oldest = Ending.CONNECTION_LIMIT, self._strangers
        victim = None
        if limit is not None and oldest:
            victim, limit = next(iter(oldest)), None
            self.remove(victim)
        if limit is not None:
            if len(self._spare) >= MAX_SPARE:
                victim = next(iter(self._spare))
                del self._spare[victim]
            self._spare[new] = None
            return victim, limit
        self._open[new.address] = self._open.get(new.address, 0) + 1
        self._strangers[new] = None
        self._strangers_of.setdefault(new.address, {})[new] = None
        return victim, None

    def authenticate(self, slot: S) -> None:
        """Record that a caller on this connection was authenticated: it is no longer closed for another one."""
        if slot in self._strangers:
            self._forget_stranger(slot)
            self._authenticated.add(slot)

    def remove(self, slot: S) -> None:
        """Record that the connection is closed. May be called twice."""
        if slot in self._spare:
            del self._spare[slot]
            return
        if slot in self._strangers:
            self._forget_stranger(slot)
        elif slot in self._authenticated:
            self._authenticated.discard(slot)
        else:
            return
        self._open[slot.address] -= 1
        if not self._open[slot.address]:
            del self._open[slot.address]

    def oldest_stranger(self) -> S | None:
        """The connection that is closed next if there has to be room."""
        return next(iter(self._strangers), None)

    def _forget_stranger(self, slot: S) -> None:
        del self._strangers[slot]
        others = self._strangers_of[slot.address]
        del others[slot]
        if not others:
            del self._strangers_of[slot.address]

    def refusal(self, limit: Ending, address: str) -> Unavailable:
        """The answer to a request on a spare connection."""
        if limit is Ending.ADDRESS_LIMIT:
            return Unavailable(
                f"{address} has {self.most_per_address} connections, the most of one address.",
                "Close some, or raise max_connections_per_address.",
                retry_after_s=HEAD_S,
            )
        return Unavailable(
            f"There are {self.most} connections, the most that this coordinator serves.",
            "Ask again later, or raise the coordinator's limit of open files.",
            retry_after_s=HEAD_S,
        )


def address_of(peer: tuple[str, int] | tuple[str, int, int, int] | str) -> str:
    """The address by which a peer's connections are counted; in IPv6 its /64 network, which is one host or site."""
    host = peer[0] if isinstance(peer, tuple) else peer
    if ":" not in host:
        return host
    packed = socket.inet_pton(socket.AF_INET6, host.partition("%")[0])
    if packed[:12] == b"\0" * 10 + b"\xff\xff":
        return socket.inet_ntop(socket.AF_INET, packed[12:])
    return f"{socket.inet_ntop(socket.AF_INET6, packed[:8] + bytes(8))}/64"


class Unsent:
    """The bytes of the long answers that are being sent."""

    def __init__(self) -> None:
        self._bytes = 0

    def add(self, answer: bytes) -> int:
        """Count an answer, if it is long; return its size for ``remove``. Raises Unavailable beyond the bound."""
        size = len(answer) if len(answer) > PART_BYTES else 0
        if self._bytes + size > MAX_UNSENT_BYTES:
            raise Unavailable(
                f"Long answers of {self._bytes} bytes are being sent already, and this one has {size}.",
                "Try again after Retry-After, or ask for a shorter page.",
            )
        self._bytes += size
        return size

    def remove(self, size: int) -> None:
        """Record that an answer was sent, or will not be."""
        self._bytes -= size


class Cache(Generic[T]):
    """A cache of values by key. Concurrent callers share one call of ``make``; its result is used for ``seconds``.

    The keys must be few, since each value stays in memory until it is too old.
    """

    def __init__(self, seconds: float = CACHE_S) -> None:
        self._seconds = seconds
        self._making: dict[str, asyncio.Task[T]] = {}

    async def get(self, key: str, make: Callable[[], Awaitable[T]]) -> T:
        """The cached value, or the result of ``make``. Raises what ``make`` raises."""
        task = self._making.get(key)
        if task is None:
            task = asyncio.ensure_future(self._make(key, make))
            self._making[key] = task
        return await asyncio.shield(task)

    async def _make(self, key: str, make: Callable[[], Awaitable[T]]) -> T:
        try:
            value = await make()
        except BaseException:
            del self._making[key]
            raise
        if self._seconds:
            asyncio.get_running_loop().call_later(self._seconds, self._making.pop, key)
        else:
            del self._making[key]
        return value
