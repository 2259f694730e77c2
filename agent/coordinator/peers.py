"""The ways to the other coordinators: connections to each of them, and who may use one (R19).

A peer that hangs takes up its own connections only. What is accepted as an answer is in peer_connection.py. Knows
nothing of groups, leadership and callers.
"""

import asyncio
import ssl
from collections import deque
from dataclasses import dataclass, field
from typing import cast
from urllib.parse import urlsplit

from agent.coordinator.peer_connection import Budget, PeerAnswer, PeerConnection, PeerError

CONNECT_S = 2.0
"""To connect, with the TLS handshake: as long as two lost packets delay it."""

KEEPALIVE_S = 45.0
"""Idle timeout of a connection: shorter than that of a coordinator (75 s)."""

QUEUED = 4
"""Requests that may wait for each connection for calls: 2000 of them take a leader less than a second."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a peer is, by its URL."""

    url: str
    host: str
    port: int
    netloc: bytes
    encrypted: bool

    @classmethod
    def of(cls, url: str) -> "Place":
        """Raises PeerError if the URL is not that of a coordinator."""
        try:
            parts = urlsplit(url)
            port = parts.port or {"http": 80, "https": 443}[parts.scheme]
            netloc = parts.netloc.encode("ascii")
        except (ValueError, KeyError):
            raise PeerError("is not a URL of HTTP") from None
        if not parts.hostname or "@" in parts.netloc:
            raise PeerError("is not a URL of HTTP")
        return cls(url, parts.hostname, port, netloc, parts.scheme == "https")


class Pool:
    """The connections to one peer for one kind of request.

    Args:
        place: of the peer.
        tls: verifies it, if its URL is https.
        connections: the most of them.
        queued: the most requests that wait for one of these.
    """

    def __init__(
        self,
        place: Place,
        tls: ssl.SSLContext,
        budget: Budget,
        *,
        connections: int,
        queued: int,
    ) -> None:
        self._place = place
        self._tls = tls if place.encrypted else None
        self._budget = budget
        self._most = connections
        self._most_queued = queued
        self._open: set[PeerConnection] = set()
        self._idle: deque[PeerConnection] = deque()
        self._waiting: deque[asyncio.Future[PeerConnection]] = deque()
        self._opening: set[asyncio.Task[None]] = set()

    @property
    def in_use(self) -> bool:
        """Whether there is a connection, or somebody waits for one."""
        return bool(self._open or self._opening or self._waiting)

    def take(self) -> PeerConnection | None:
        """An idle connection: the one that was used last, so that those not needed grow old."""
        oldest = asyncio.get_running_loop().time() - KEEPALIVE_S
        while self._idle:
            connection = self._idle.pop()
            if connection.idle_since > oldest:
                return connection
            connection.close()  # after this process was frozen, the peer may have closed it
        return None

    def wait(self) -> asyncio.Future[PeerConnection]:
        """The next connection that is free. Raises PeerError if too many wait already."""
        free = self._most - len(self._open) - len(self._opening)
        if free <= 0 and len(self._waiting) - len(self._opening) >= self._most_queued:
            raise PeerError(
                f"has {self._most} requests in progress, and {len(self._waiting)} wait for it already"
            )
        waiting: asyncio.Future[PeerConnection] = asyncio.get_running_loop().create_future()
        self._waiting.append(waiting)
        self._open_more()
        return waiting

    def give_up(self, waiting: asyncio.Future[PeerConnection]) -> None:
        """Nobody waits for this connection any more."""
        if waiting in self._waiting:
            self._waiting.remove(waiting)
        elif waiting.done() and not waiting.cancelled() and waiting.exception() is None:
            self.release(waiting.result())

    def release(self, connection: PeerConnection) -> None:
        """A connection is free: give it to the next who waits."""
        while self._waiting and not connection.closed:
            waiting = self._waiting.popleft()
            if not waiting.done():
                waiting.set_result(connection)
                return
        if not connection.closed:
            connection.idle_since = asyncio.get_running_loop().time()
            self._idle.append(connection)

    def forget(self, connection: PeerConnection) -> None:
        """A connection has ended."""
        self._open.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)
        self._open_more()

    def close_idle(self, before: float) -> None:
        """Close the connections that are idle since before a moment."""
        while self._idle and self._idle[0].idle_since < before:
            self._idle[0].close()

    async def aclose(self) -> None:
        """Close every connection; whoever waits gets a PeerError."""
        self._most = 0
        for task in self._opening:
            task.cancel()
        if self._opening:
            await asyncio.wait(self._opening)
        self._fail_waiting("is not asked any more")
        self._idle.clear()
        for connection in list(self._open):
            connection.close()

    def _open_more(self) -> None:
        """Open connections for those who wait, as far as there may be more."""
        wanted = len(self._waiting) - len(self._opening)
        free = self._most - len(self._open) - len(self._opening)
        for _ in range(min(wanted, free)):
            task = asyncio.create_task(self._connect(), name="connect to a coordinator")
            self._opening.add(task)

    async def _connect(self) -> None:
        failure = None
        try:
            async with asyncio.timeout(CONNECT_S):
                _, connection = await asyncio.get_running_loop().create_connection(
                    lambda: PeerConnection(self, self._budget),
                    self._place.host,
                    self._place.port,
                    ssl=self._tls,
                    server_hostname=self._place.host if self._tls is not None else None,
                )
        except TimeoutError:
            failure = f"could not be connected to within {CONNECT_S:g} s"
        except (
            OSError,
            ValueError,
        ) as error:  # ssl.SSLError is an OSError, that of a name a ValueError
            failure = f"could not be connected to: {error}"
        else:
            if connection.closed:
                failure = "closed the connection at once"
        finally:
            self._opening.discard(cast("asyncio.Task[None]", asyncio.current_task()))
        if failure is None:
            self._open.add(connection)
            self.release(connection)
        else:
            self._fail_waiting(failure, 1 if self._open else None)

    def _fail_waiting(self, reason: str, most: int | None = None) -> None:
        """Those who wait longest, or all: open connections will serve the others."""
        for _ in range(len(self._waiting) if most is None else most):
            if not self._waiting:
                return
            waiting = self._waiting.popleft()
            if not waiting.done():
                waiting.set_exception(PeerError(reason))


@dataclass(slots=True)
class Exchange:
    """One request to a peer and its answer. ``run`` it once; ``fail`` ends that early.

    Attributes:
        request: head and body.
        number: in the header FORWARDED of the request.
    """

    pool: Pool
    request: bytes
    number: bytes
    _step: asyncio.Future[PeerConnection] | asyncio.Future[PeerAnswer] | None = field(
        default=None, init=False
    )
    _failure: Exception | None = field(default=None, init=False)

    async def run(self) -> PeerAnswer:
        """The answer.

        Raises:
            PeerError: there is none, or it cannot be used.
            Exception: that was given to ``fail``.
        """
        try:
            connection = await self._connection()
            answer = self._step = connection.send(self.request, self.number)
            try:
                return await answer
            except BaseException:
                connection.give_up(answer)
                raise
            finally:
                del answer
        finally:
            self._step = self._failure = None  # they would be in a circle with their traceback

    async def _connection(self) -> PeerConnection:
        """A connection that is open now."""
        connection = self.pool.take() or await self._wait()
        while connection.closed:  # since it became ours: nothing was sent
            connection = self.pool.take() or await self._wait()
        if self._failure is not None:
            self.pool.release(connection)
            raise self._failure
        return connection

    async def _wait(self) -> PeerConnection:
        waiting = self._step = self.pool.wait()
        try:
            return await waiting
        except BaseException:
            self.pool.give_up(waiting)
            raise
        finally:
            del waiting

    def fail(self, error: Exception) -> None:
        """Make ``run`` raise this, unless the answer is there."""
        self._failure = error  # for a connection that it has got just now
        if self._step is not None and not self._step.done():
            self._step.set_exception(error)


class Peers:
    """The pools of all peers. Call ``sweep`` now and then, and ``aclose`` last.

    Args:
        tls: verifies peers whose URL is https.
        encrypted: refuse peers whose URL is not: requests carry passwords.
        calls: the most connections to one peer, for requests that are answered at once.
        blocking_reads: the most for the others.
    """

    def __init__(
        self, tls: ssl.SSLContext, *, encrypted: bool, calls: int, blocking_reads: int
    ) -> None:
        self._tls = tls
        self._encrypted = encrypted
        self._calls = calls
        self._blocking_reads = blocking_reads
        self._budget = Budget()
        self._pools: dict[str, tuple[Place, Pool, Pool]] = {}

    def to(self, url: str) -> tuple[Place, Pool, Pool]:
        """A peer: its place, its pool for calls, and the one for blocking reads. Raises PeerError."""
        found = self._pools.get(url)
        if found is None:
            place = Place.of(url)
            if self._encrypted and not place.encrypted:
                raise PeerError(
                    "is not https, as advertise is here, and requests carry credentials"
                )
            found = self._pools[url] = (place, *self._make(place))
        return found

    def _make(self, place: Place) -> tuple[Pool, Pool]:
        calls = Pool(
            place,
            self._tls,
            self._budget,
            connections=self._calls,
            queued=QUEUED * self._calls,
        )
        return calls, Pool(
            place, self._tls, self._budget, connections=self._blocking_reads, queued=0
        )

    def sweep(self) -> None:
        """Close connections that were idle for long, and forget peers without any."""
        before = asyncio.get_running_loop().time() - KEEPALIVE_S
        for url, (_, *pools) in list(self._pools.items()):
            for pool in pools:
                pool.close_idle(before)
            if not any(pool.in_use for pool in pools):
                del self._pools[url]

    async def aclose(self) -> None:
        """Close every connection."""
        for _, *pools in self._pools.values():
            for pool in pools:
                await pool.aclose()
