"""A bounded HTTP/1.1 server for an agent, with limits on number, size and time.

Owns the listening sockets, TLS handshakes and connections of one handler. Knows no path, no body and no
setting. uvicorn and a framework would do, but cost an agent 3 MiB and each of its starts 80 ms.
"""

import asyncio
import errno
import os
import socket
import ssl
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any

from agent.errors import ConfigError, ExitCode
from agent.ops.http_connection import Connection, Handler, Limits
from agent.ops.logs import Log
from agent.ops.tasks import start_task
from agent.schema.addresses import Address

BACKLOG = 64
"""Connections that wait to be accepted."""

NO_ADDRESS = frozenset({errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL})
"""Errors of a host that does not have this address, or no address of its family (IPv6, say)."""

ACCEPT_PAUSE_S = 0.1
"""Pause after a failed accept, such as one for want of descriptors."""

STOP_S = 0.05
"""How long ``stop`` waits for answers that are being sent."""

log = Log(__name__)


class HttpServer:
    """The server of one handler. ``start`` it inside a running loop; ``stop`` it there too.

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
        self._listeners: list[socket.socket] = []
        self._accepting: list[asyncio.Task[None]] = []
        self._tasks: dict[asyncio.Task[None], None] = {}  # of connections, the oldest first
        self._connections: dict[asyncio.Task[None], Connection] = {}  # whose TLS handshake is done

    async def start(self, handler: Handler, address: Address) -> Address:
        """Listen; return the bound address, with the port that the kernel chose if the port was 0.

        The IPv6 wildcard address serves IPv4, too.

        Raises:
            ConfigError: LISTEN, the address is in use, not of this host, or invalid.
        """
        loop = asyncio.get_running_loop()
        try:
            found = await loop.getaddrinfo(
                *address, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )
            self._listeners = _listen_at_all(list(dict.fromkeys(found)))
        except OSError as error:
            raise _listen_error(self._name, address, error) from error
        self._accepting = [
            start_task(self._accept(listener, handler), name=self._name)
            for listener in self._listeners
        ]
        return Address(*self._listeners[0].getsockname()[:2])

    async def _accept(self, listener: socket.socket, handler: Handler) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(0)  # others run, even if connections never stop coming
            try:
                accepted, _ = listener.accept()
            except BlockingIOError:
                await _until_readable(listener)
                continue
            except OSError:
                await asyncio.sleep(ACCEPT_PAUSE_S)
                continue
            accepted.setblocking(False)
            if len(self._tasks) >= self.limits.connections:
                self._end(next(iter(self._tasks)))
            serving = loop.create_task(
                self._serve(accepted, handler), name=f"{self._name} connection"
            )
            self._tasks[serving] = None
            serving.add_done_callback(self._on_ended)

    def _on_ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.pop(task, None)
        with suppress(asyncio.CancelledError):
            task.result()  # else the error would keep the buffers of its connection until a garbage collection

    def _end(self, task: asyncio.Task[None]) -> None:
        self._tasks.pop(task, None)
        task.cancel()

    async def _serve(self, accepted: socket.socket, handler: Handler) -> None:
        """Serve one connection to its end, its TLS handshake included."""
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None  # noqa: S101 - it runs in one
        reader = asyncio.StreamReader()
        protocol = asyncio.StreamReaderProtocol(reader)
        transport: asyncio.Transport | None = None
        try:
            transport, _ = await loop.connect_accepted_socket(
                lambda: protocol,
                accepted,
                ssl=self.tls,
                ssl_handshake_timeout=self.limits.request_s if self.tls is not None else None,
            )
            writer = asyncio.StreamWriter(transport, protocol, reader, loop)
            self._connections[task] = Connection(reader, writer, handler, self.limits)
            await self._connections[task].serve()
        except OSError as error:  # a timeout is one; the client has gone, or was too slow
            error.__traceback__ = None  # a reference cycle, with the buffers of TLS in it
        except Exception:  # a task's edge: no client may stop the agent
            log.exception("connection failed", server=self._name)
        finally:
            self._connections.pop(task, None)
            if transport is not None:
                transport.abort()

    async def stop(self) -> None:
        """Stop listening; wait STOP_S for unfinished answers. May be called twice, or without a start."""
        await _cancel(self._accepting)
        for listener in self._listeners:
            listener.close()
        self._listeners.clear()
        answering = [task for task, one in self._connections.items() if one.answering]
        for task in answering:
            self._connections[task].end()
        await _cancel(self._tasks.keys() - set(answering))
        if answering:
            await asyncio.wait(answering, timeout=STOP_S)
        await _cancel(self._tasks)


async def _cancel(tasks: Iterable["asyncio.Task[None]"]) -> None:
    cancelled = list(tasks)
    for task in cancelled:
        task.cancel()
    await asyncio.gather(*cancelled, return_exceptions=True)


async def _until_readable(listener: socket.socket) -> None:
    """Wait for a connection. The loop's sock_accept() raises in the loop if it is cancelled just as one comes."""
    loop, readable = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(listener, readable.set)
    try:
        await readable.wait()
    finally:
        loop.remove_reader(listener)


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
    # Prefer the system's text for the errno, since asyncio rewords some errors.
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
