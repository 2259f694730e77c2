"""Resolve names without the event loop's shared executor.

The C library's resolver blocks its thread for as long as it likes. In asyncio's executor, a few look-ups
that hang delay every other one, and the end of the process waits for them. Here each look-up has a daemon
thread of its own, shared by those who ask for the same at the same time, and bounded for each host.
"""

import asyncio
import concurrent.futures
import ipaddress
import socket
import threading
from collections import Counter
from typing import Any

MOST_OF_ONE_HOST = 4
"""Blocked look-ups of one name, for different ports or kinds."""

MOST_LOOKUPS = 32
"""Blocked look-ups at the same time: threads that wait for a resolver that is gone."""

Key = tuple[Any, ...]


class Resolver:
    """The ``getaddrinfo`` of an event loop."""

    def __init__(self) -> None:
        self._pending: dict[Key, concurrent.futures.Future[list[Any]]] = {}

    async def getaddrinfo(
        self,
        host: str | bytes | None,
        port: str | bytes | int | None,
        *,
        family: int = 0,
        type: int = 0,  # noqa: A002 - asyncio's own name
        proto: int = 0,
        flags: int = 0,
    ) -> list[Any]:
        """As ``loop.getaddrinfo``.

        Raises:
            OSError: the name has no address (socket.gaierror), or too many look-ups are blocked.
        """
        key = (host, port, family, type, proto, flags)
        if _is_numeric(host):
            return socket.getaddrinfo(*key)
        found = self._pending.get(key)
        if found is None or found.done():  # answers are not kept: that is the resolver's matter
            found = self._start(key)
        addresses: list[Any] = await asyncio.wrap_future(found)
        return list(addresses)

    def _start(self, key: Key) -> concurrent.futures.Future[list[Any]]:
        for done in [one for one, future in self._pending.items() if future.done()]:
            del self._pending[done]
        of_host = Counter(one[0] for one in self._pending)[key[0]]
        if of_host >= MOST_OF_ONE_HOST or len(self._pending) >= MOST_LOOKUPS:
            raise socket.gaierror(socket.EAI_AGAIN, "too many look-ups are blocked")
        future: concurrent.futures.Future[list[Any]] = concurrent.futures.Future()
        future.set_running_or_notify_cancel()  # a caller that is cancelled must not cancel the others'

        def look_up() -> None:
            try:
                future.set_result(socket.getaddrinfo(*key))
            except BaseException as error:  # noqa: BLE001 - raised again where it is awaited
                future.set_exception(error)

        thread = threading.Thread(target=look_up, name=f"look-up of {key[0]}", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            raise socket.gaierror(socket.EAI_AGAIN, f"no thread can be started: {error}") from error
        self._pending[key] = future
        return future


def _is_numeric(host: str | bytes | None) -> bool:
    try:
        ipaddress.ip_address((host.decode() if isinstance(host, bytes) else host) or "::")
    except ValueError:
        return False
    return True


def resolve_in_own_threads(loop: asyncio.AbstractEventLoop) -> None:
    """Have every look-up of this loop done by a Resolver: connections, checks, webhooks."""
    loop.getaddrinfo = Resolver().getaddrinfo  # type: ignore[method-assign]
