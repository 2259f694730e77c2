"""The coordinator's listening socket, and the connections that it accepts.

Owns accepting, the check of all deadlines every SWEEP_S, and the shutdown. connection.py decides what a connection
may do, and limits.py which one is closed for another. The event loop does not accept the sockets itself, since
connections that are still in their TLS handshake have to be counted, too.
"""

import asyncio
import socket
import ssl
from collections.abc import Callable
from math import inf
from typing import Any, cast

import uvicorn
from uvicorn.server import ServerState

from agent.coordinator.connection import Connection
from agent.coordinator.limits import (
    ACCEPT_RETRY_S,
    ACCEPTED_AT_ONCE,
    CLOSE_S,
    HANDSHAKE_S,
    MAX_STALLED,
    SWEEP_S,
    Admission,
    Ending,
    Reports,
    address_of,
)
from agent.ops.logs import Log

BACKLOG = 2048
"""How many connections may wait to be accepted: after a restart all agents reconnect at once."""

GRACE_S = 5.0
"""How long a shutdown waits for requests in progress before it aborts them. Durable writes are always finished."""

LAST_REQUESTS_S = 0.2
"""How long a shutdown answers requests that are on their way with 503, rather than with a reset."""

log = Log(__name__)


class Listener:
    """Serves an ASGI application on a socket. ``start`` it in a running loop, ``stop`` it there.

    Args:
        app: the application.
        listener: a bound socket that does not listen yet. The caller closes it.
        tls: or None for plain HTTP.
        admission: counts the connections.
        reports: receives why connections are ended.
        max_body_bytes: the rest of longer bodies is not read.
    """

    def __init__(
        self,
        app: Callable[..., Any],
        listener: socket.socket,
        tls: ssl.SSLContext | None,
        *,
        admission: Admission[Connection],
        reports: Reports,
        max_body_bytes: int,
    ) -> None:
        self.max_body_bytes = max_body_bytes
        self.now = 0.0
        self._socket = listener
        self._tls = tls
        self._admission = admission
        self.refusal = admission.refusal
        self._reports = reports
        self._config = uvicorn.Config(
            app,
            ws="none",
            loop="none",
            lifespan="off",
            interface="asgi3",
            log_config=None,
            log_level="warning",
            access_log=False,
            proxy_headers=False,
            server_header=False,
            date_header=False,  # uvicorn's may be a second old; api.py writes the header itself
        )
        self._config.load()
        self._state = ServerState()
        self._connections = cast("set[Connection]", self._state.connections)
        self._handshakes: dict[asyncio.Task[None], Connection] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._swept_at = 0.0
        self._empty = asyncio.Event()
        self._accepting = True

    def start(self) -> None:
        """Listen, and accept connections from now on."""
        self._loop = asyncio.get_running_loop()
        self._swept_at = self._loop.time()
        self._timer = self._loop.call_later(SWEEP_S, self._sweep)
        self._socket.setblocking(False)
        self._socket.listen(BACKLOG)
        self._resume()

    async def stop(self) -> None:
        """Stop accepting, and end all connections; wait GRACE_S for requests in progress."""
        await asyncio.sleep(LAST_REQUESTS_S)
        self._accepting = False
        self._loop.remove_reader(self._socket)
        for connection in self._handshakes.values():
            connection.abort()
        for connection in list(self._connections):
            connection.shutdown()
        try:
            async with asyncio.timeout(GRACE_S):
                await self._all_ended()
        except TimeoutError:
            log.warning("requests aborted", count=len(self._state.tasks), after_s=GRACE_S)
        for task in self._state.tasks:
            task.cancel()
        for connection in list(self._connections):
            connection.transport.abort()
        await self._all_ended()
        if self._timer is not None:
            self._timer.cancel()

    async def _all_ended(self) -> None:
        while self._connections:
            self._empty.clear()
            await self._empty.wait()
        while tasks := {*self._state.tasks, *self._handshakes}:
            await asyncio.wait(tasks)

    # -- accepting ----------------------------------------------------------------------------

    def _resume(self) -> None:
        if self._accepting:
            self._loop.add_reader(self._socket, self._accept)

    def _accept(self) -> None:
        for _ in range(ACCEPTED_AT_ONCE):
            try:
                accepted, peer = self._socket.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:  # no files or no memory left
                self._loop.remove_reader(self._socket)
                self._loop.call_later(ACCEPT_RETRY_S, self._resume)
                if (oldest := self._admission.oldest_stranger()) is not None:
                    self._evict(oldest)
                self._reports.not_accepted(error.strerror or str(error))
                return
            accepted.setblocking(False)
            self._open(accepted, address_of(peer))

    def _open(self, accepted: socket.socket, address: str) -> None:
        connection = Connection(self, self._config, self._state, address)
        victim, limit = self._admission.admit(connection)
        if victim is not None:
            self._evict(victim)
        if limit is not None:
            connection.spare = limit
            self._reports.ended(limit, address)
        task = self._loop.create_task(self._connect(connection, accepted))
        self._handshakes[task] = connection
        task.add_done_callback(self._handshakes.pop)

    def _evict(self, connection: Connection) -> None:
        self._reports.ended(Ending.EVICTED, connection.address)
        connection.abort()

    async def _connect(self, connection: Connection, accepted: socket.socket) -> None:
        """Let the loop read and write this socket, after a TLS handshake if there is TLS."""
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - it is a coroutine of one
        if not connection.begin(task):
            accepted.close()
            self._admission.remove(connection)
            return
        limits = {}
        if self._tls is not None:
            limits = {"ssl_handshake_timeout": HANDSHAKE_S, "ssl_shutdown_timeout": CLOSE_S}
        failed = True
        try:
            await self._loop.connect_accepted_socket(
                lambda: connection, accepted, ssl=self._tls, **limits
            )
            failed = False
        except OSError as error:  # TLS failed, or the peer is gone
            self._reports.ended(Ending.HANDSHAKE, connection.address, str(error))
        finally:
            connection.end_handshake()
            if failed:  # also by abort(): there may be no connection_lost
                connection.abort()
                self._connections.discard(connection)
                self.lost(connection)

    # -- what connections report --------------------------------------------------------------

    def authenticated(self, connection: Connection) -> None:
        """Record that a caller on this connection was authenticated."""
        self._admission.authenticate(connection)

    def ended(self, connection: Connection, why: Ending, reason: str = "") -> None:
        """Record that the coordinator closes this connection, and why."""
        self._reports.ended(why, connection.address, reason)

    def lost(self, connection: Connection) -> None:
        """Record that a connection is closed."""
        self._admission.remove(connection)
        if not self._connections:
            self._empty.set()

    # -- deadlines ----------------------------------------------------------------------------

    def _sweep(self) -> None:
        """Act on deadlines that have passed. Time during which this process was stopped does not count."""
        self._timer = self._loop.call_later(SWEEP_S, self._sweep)
        before, self._swept_at = self._swept_at, self._loop.time()
        now = self.now = self.now + min(self._swept_at - before, 2 * SWEEP_S)
        due = [
            connection
            for connection in self._connections
            if connection.read_deadline <= now or connection.write_deadline != inf
        ]
        stalled = []
        for connection in due:
            if connection.read_deadline <= now or connection.write_deadline <= now:
                connection.on_deadline(now)
            elif not connection.authenticated:
                stalled.append(connection)
        stalled.sort(key=lambda connection: connection.write_deadline)
        for connection in stalled[: max(0, len(stalled) - MAX_STALLED)]:
            self.ended(connection, Ending.ANSWER_TIMEOUT)
            connection.abort()
