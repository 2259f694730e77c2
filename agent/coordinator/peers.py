"""Pools of connections to the other coordinators, which are called peers (R19).

Each peer has its own pools, so one that hangs occupies no connection to another. Which answers are accepted is
decided in peer_connection.py. Knows nothing of groups, leadership and callers.
"""

import asyncio
import ssl
from collections import deque
from dataclasses import dataclass, field
from typing import cast
from urllib.parse import urlsplit

from agent.coordinator.peer_connection import Budget, PeerAnswer, PeerConnection, PeerError

CONNECT_S = 2.0
"""Timeout to connect, including the TLS handshake: two lost packets delay it by about that."""

KEEPALIVE_S = 45.0
"""Idle timeout of a connection. A peer closes idle ones after 75 s, so this side does it before."""

QUEUED = 4
"""How many requests may wait for each connection of the pool for calls. A leader answers 2000 requests in
less than a second."""


@dataclass(frozen=True, slots=True)
class Place:
    """The address of a peer, parsed from its URL."""

    url: str
    host: str
    port: int
    netloc: bytes
    encrypted: bool

    @classmethod
    def of(cls, url: str) -> "Place":
        """Parse a URL. Raises PeerError if it is not an http or https URL."""
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
        tls: verifies the peer, if its URL is https.
        budget: of unfinished answers, shared by all pools.
        connections: the most that are open at once.
        queued: the most requests that may wait for a connection.
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
        """Whether a connection is open or being opened, or a request waits for one."""
        return bool(self._open or self._opening or self._waiting)

    def take_idle(self) -> PeerConnection | None:
        """An idle connection, or None. It is the one used last, so that superfluous ones time out."""
        oldest = asyncio.get_running_loop().time() - KEEPALIVE_S
        while self._idle:
            connection = self._idle.pop()
            if connection.idle_since > oldest:
                return connection
            connection.close()  # after this process was frozen, the peer may have closed it
        return None

    def wait(self) -> asyncio.Future[PeerConnection]:
        """Wait for the next free connection. Raises PeerError if too many requests wait already."""
        free = self._most - len(self._open) - len(self._opening)
        if free <= 0 and len(self._waiting) - len(self._opening) >= self._most_queued:
            raise PeerError(
                f"has {self._most} requests in progress, and {len(self._waiting)} more are waiting"
            )
        waiting: asyncio.Future[PeerConnection] = asyncio.get_running_loop().create_future()
        self._waiting.append(waiting)
        self._open_more()
        return waiting

    def give_up(self, waiting: asyncio.Future[PeerConnection]) -> None:
        """Stop waiting; a connection that was assigned meanwhile becomes free again."""
        if waiting in self._waiting:
            self._waiting.remove(waiting)
        elif waiting.done() and not waiting.cancelled() and waiting.exception() is None:
            self.release(waiting.result())

    def release(self, connection: PeerConnection) -> None:
        """Give a connection that became free to the next request that waits, or keep it idle."""
        while self._waiting and not connection.closed:
            waiting = self._waiting.popleft()
            if not waiting.done():
                waiting.set_result(connection)
                return
        if not connection.closed:
            connection.idle_since = asyncio.get_running_loop().time()
            self._idle.append(connection)

    def forget(self, connection: PeerConnection) -> None:
        """Remove a connection that has ended, and open another if requests wait."""
        self._open.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)
        self._open_more()

    def close_idle(self, before: float) -> None:
        """Close the connections that have been idle since before this moment."""
        while self._idle and self._idle[0].idle_since < before:
            self._idle[0].close()

    async def aclose(self) -> None:
        """Close every connection; requests that wait for one fail with a PeerError."""
        self._most = 0
        for task in self._opening:
            task.cancel()
        if self._opening:
            await asyncio.wait(self._opening)
        self._fail_waiting("is not used any more")
        self._idle.clear()
        for connection in list(self._open):
            connection.close()

    def _open_more(self) -> None:
        """Open a connection for each waiting request, up to the most that may be open."""
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
        except (OSError, ValueError) as error:  # ValueError: the host name cannot be encoded
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
        """Fail the ``most`` oldest waiting requests, or all; open connections will serve the rest."""
        for _ in range(len(self._waiting) if most is None else most):
            if not self._waiting:
                return
            waiting = self._waiting.popleft()
            if not waiting.done():
                waiting.set_exception(PeerError(reason))


@dataclass(slots=True)
class Exchange:
    """One request to a peer and its answer. Call ``run`` once; ``fail`` makes it end early.

    Attributes:
        request: head and body.
        number: the value of the request's header FORWARDED.
    """

    pool: Pool
    request: bytes
    number: bytes
    _step: asyncio.Future[PeerConnection] | asyncio.Future[PeerAnswer] | None = field(
        default=None, init=False
    )
    _failure: Exception | None = field(default=None, init=False)

    async def run(self) -> PeerAnswer:
        """Send the request and return the answer.

        Raises:
            PeerError: there is no answer, or it cannot be used.
            Exception: the one that was given to ``fail``.
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
            self._step = self._failure = None  # an error kept here forms a cycle with its traceback

    async def _connection(self) -> PeerConnection:
        """A connection that is open now."""
        connection = self.pool.take_idle() or await self._wait()
        while connection.closed:  # closed before anything was sent on it
            connection = self.pool.take_idle() or await self._wait()
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
        """Make ``run`` raise this error, unless the answer has arrived."""
        self._failure = error  # raised even if ``run`` has just received a connection
        if self._step is not None and not self._step.done():
            self._step.set_exception(error)


class Peers:
    """The pools of all peers. Call ``sweep`` from time to time, and ``aclose`` last.

    Args:
        tls: verifies peers whose URL is https.
        encrypted: whether to refuse peers whose URL is not https: requests carry passwords.
        calls: the most connections to one peer for requests that are answered at once.
        blocking_reads: the most connections to one peer for blocking reads.
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
        """A peer's place, its pool for calls and its pool for blocking reads. Raises PeerError."""
        found = self._pools.get(url)
        if found is None:
            place = Place.of(url)
            if self._encrypted and not place.encrypted:
                raise PeerError(
                    "is not https, though this coordinator's is, and requests carry credentials"
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
        """Close connections that have been idle for too long, and forget peers without connections."""
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
