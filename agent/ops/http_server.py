"""A bounded HTTP/1.1 server for an agent: uvicorn's connections, with limits on number, size and time.

Owns the listening sockets, TLS handshakes and connections of one ASGI application, and answers bytes that are
not an HTTP request. Knows no path, no body and no setting.
"""

import asyncio
import errno
import json
import logging
import os
import socket
import ssl
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.types import ASGIApp
from uvicorn import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from agent.errors import ConfigError, ExitCode
from agent.ops.logs import Log
from agent.schema.addresses import Address

BACKLOG = 64
"""Connections that wait to be accepted."""

NO_ADDRESS = frozenset({errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL})
"""Errors of a host that does not have this address, or no address of its family (IPv6, say)."""

ACCEPT_PAUSE_S = 0.1
"""Pause after a failed accept, such as one for want of descriptors."""

STOP_S = 0.05
"""How long ``stop`` waits for answers that are being sent."""

NOT_HTTP = "This is not HTTP/1.1, or it has no end."

log = Log(__name__)


@dataclass(frozen=True, slots=True)
class Limits:
    """The bounds of a server.

    Attributes:
        connections: at once; TLS handshakes count.
        request_s: how long a connection may take for its TLS handshake, and then for each request: a slow
            client occupies a connection no longer than this.
        keep_alive_s: timeout of an idle connection. Shorter than request_s.
        head_bytes: of one request.
        headers: of one request.
        request_bytes: of head, body and trailers of one request; a longer one closes its connection.
        pipelined: requests on one connection that wait until an earlier one is answered.
        newest_first: whether a connection above the bound replaces the oldest one; else it is refused.
    """

    connections: int
    request_s: float
    keep_alive_s: int
    head_bytes: int
    headers: int
    request_bytes: int
    pipelined: int
    newest_first: bool = False


class HttpServer:
    """The server of one application. ``start`` it inside a running loop; ``stop`` it there too.

    Args:
        name: for tasks and errors, such as "probe".
        limits: the bounds.

    Attributes:
        tls: of new connections; None for plain HTTP.
    """

    def __init__(self, name: str, limits: Limits) -> None:
        self.tls: ssl.SSLContext | None = None
        self.limits = limits
        self._name = name
        self._state = ServerState()
        self._listeners: list[socket.socket] = []
        self._accepting: list[asyncio.Task[None]] = []
        self._connections: dict[asyncio.Task[None], None] = {}  # the oldest first

    async def start(self, app: ASGIApp, address: Address) -> Address:
        """Listen; return the bound address, with the port that the kernel chose if the port was 0.

        The IPv6 wildcard address serves IPv4, too.

        Raises:
            ConfigError: LISTEN, the address is in use, not of this host, or invalid.
        """
        config = Config(
            app,
            lifespan="off",
            interface="asgi3",
            ws="none",
            log_config=None,
            proxy_headers=False,
            server_header=False,
            date_header=False,
            timeout_keep_alive=self.limits.keep_alive_s,
        )
        config.load()
        loop = asyncio.get_running_loop()
        try:
            found = await loop.getaddrinfo(
                *address, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )
            self._listeners = _listen_at_all(list(dict.fromkeys(found)))
        except OSError as error:
            raise _listen_error(self._name, address, error) from error
        self._accepting = [
            loop.create_task(self._accept(listener, config), name=self._name)
            for listener in self._listeners
        ]
        return Address(*self._listeners[0].getsockname()[:2])

    async def _accept(self, listener: socket.socket, config: Config) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(0)  # sock_accept() does not wait while connections are there
            try:
                connection, _ = await loop.sock_accept(listener)
            except OSError:
                await asyncio.sleep(ACCEPT_PAUSE_S)
                continue
            if len(self._connections) >= self.limits.connections:
                if not self.limits.newest_first:
                    connection.close()
                    continue
                self._end(next(iter(self._connections)))
            serving = loop.create_task(
                self._serve(connection, config), name=f"{self._name} connection"
            )
            self._connections[serving] = None
            serving.add_done_callback(lambda ended: self._connections.pop(ended, None))

    def _end(self, connection: asyncio.Task[None]) -> None:
        self._connections.pop(connection, None)
        connection.cancel()

    async def _serve(self, connection: socket.socket, config: Config) -> None:
        """Serve one connection to its end, its TLS handshake included."""
        protocol = _Connection(config, self._state, self.limits)
        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                lambda: protocol,
                connection,
                ssl=self.tls,
                ssl_handshake_timeout=self.limits.request_s if self.tls is not None else None,
            )
            await protocol.ended.wait()
        except OSError:  # the TLS handshake failed or timed out: no request was received
            pass
        except Exception:  # a task's edge: no client may stop the agent
            log.exception("connection failed", server=self._name)
        finally:
            protocol.abort()

    async def stop(self) -> None:
        """Stop listening; wait STOP_S for unfinished answers. May be called twice, or without a start."""
        await _cancel(self._accepting)
        for listener in self._listeners:
            listener.close()
        self._listeners.clear()
        for connection in list(self._state.connections):
            connection.shutdown()
        if self._state.tasks:
            await asyncio.wait(self._state.tasks, timeout=STOP_S)
        for connection in list(self._state.connections):
            connection.transport.abort()
        await _cancel(self._connections)


class _Connection(HttpToolsProtocol):
    """uvicorn's connection, with bounds on time and size, which uvicorn does not have."""

    def __init__(self, config: Config, state: ServerState, limits: Limits) -> None:
        super().__init__(config, state, {})
        self.ended = asyncio.Event()
        self._limits = limits
        self.access_log = False  # uvicorn's loggers are shared with other servers
        self.logger = logging.getLogger("uvicorn.error.agent")
        self.logger.setLevel(logging.ERROR)  # bad requests of strangers are no warning
        self._deadline: asyncio.TimerHandle | None = None
        self._received_bytes = 0
        self._head_bytes = 0
        self._in_head = True
        self._too_large = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as in the base class
        super().connection_made(transport)
        self._restart_timeout()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._deadline:
            self._deadline.cancel()
        super().connection_lost(exc)
        self.ended.set()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._restart_timeout()
        self._head_bytes, self._in_head = 0, True
        self._refuse_above(len(self.pipeline), self._limits.pipelined)

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        self._count(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        self._count(len(name) + len(value))
        self._refuse_above(len(self.headers), self._limits.headers)

    def on_headers_complete(self) -> None:
        self._in_head = False
        super().on_headers_complete()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._received_bytes += len(data)
        if self._received_bytes > self._limits.request_bytes:
            self.transport.abort()
        elif (
            self._in_head
            and self._received_bytes > self._limits.head_bytes
            and not self.transport.is_closing()
        ):
            self._too_large = True
            self.send_400_response(NOT_HTTP)

    def send_400_response(self, _msg: str) -> None:
        """Refuse a request that cannot be parsed or is too large, and close the connection."""
        status = "431 Request Header Fields Too Large" if self._too_large else "400 Bad Request"
        reason = self._limits_text if self._too_large else NOT_HTTP
        body = json.dumps({"error": reason}).encode()
        head = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nConnection: close\r\n"
        self.transport.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        self.transport.close()

    @property
    def _limits_text(self) -> str:
        limits = self._limits
        return (
            f"A request may have {limits.headers} headers, together of {limits.head_bytes} bytes, and"
            f" {limits.pipelined} others may wait behind it."
        )

    def abort(self) -> None:
        """Close the connection at once."""
        if self.transport is not None:
            self.transport.abort()

    def _count(self, size: int) -> None:
        self._head_bytes += size
        self._refuse_above(self._head_bytes, self._limits.head_bytes)

    def _refuse_above(self, number: int, most: int) -> None:
        """Raise an error above this bound: uvicorn then calls ``send_400_response``."""
        if number > most:
            self._too_large = True
            raise ValueError("the request is too large")

    def _restart_timeout(self) -> None:
        self._received_bytes = 0
        if self._deadline:
            self._deadline.cancel()
        self._deadline = self.loop.call_later(self._limits.request_s, self.transport.abort)


async def _cancel(tasks: Iterable["asyncio.Task[None]"]) -> None:
    cancelled = list(tasks)
    for task in cancelled:
        task.cancel()
    await asyncio.gather(*cancelled, return_exceptions=True)


def _listen_at_all(found: Sequence[tuple[Any, ...]]) -> list[socket.socket]:
    """Listen at every address of a name, on one port. Raises the OSError of the first unusable address."""
    listeners: list[socket.socket] = []
    unusable: OSError | None = None
    for family, _, _, _, place in found:
        port = listeners[0].getsockname()[1] if listeners else place[1]
        try:
            listeners.append(_listen(family, (place[0], port, *place[2:])))
        except OSError as error:
            unusable = unusable or error
            if error.errno not in NO_ADDRESS:  # localhost may have an address that this host lacks
                break
    else:
        if listeners:
            return listeners
    for listener in listeners:
        listener.close()
    raise unusable or OSError("the name has no address")


def _listen(family: int, place: tuple[Any, ...]) -> socket.socket:
    """A listening socket. Raises OSError."""
    # asyncio sends without delay (TCP_NODELAY) only on sockets whose protocol is stated.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:  # independent of the host's default (net.ipv6.bindv6only)
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(place[0] != "::"))
        listener.setblocking(False)
        listener.bind(place)
        listener.listen(BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener


def _listen_error(name: str, address: Address, error: OSError) -> ConfigError:
    # asyncio words the text of its errors differently, so the text of errno is used if there is one
    own = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror
    why = own or error
    any_free = ", with port 0 for any free one" if name == "probe" else ""
    right = f"choose another --{name}-listen HOST:PORT on this host{any_free}"
    if ":" in address.host and error.errno in NO_ADDRESS:
        right = (
            f"this host has no such IPv6 address, or no IPv6: use 0.0.0.0:{address.port} for IPv4"
        )
    return ConfigError(
        f"{name} listener cannot use {address} ({why}): {right}", exit_code=ExitCode.LISTEN
    )
