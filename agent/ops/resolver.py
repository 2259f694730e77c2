"""Resolve names without the event loop's shared executor.

The C library's resolver may block its thread for long. In asyncio's executor, a few blocked look-ups delay
every other one, and the exit of the process waits for them. Here each look-up has a daemon thread of its
own, which callers with the same question share, and look-ups are bounded for each host.
"""

import asyncio
import ipaddress
import socket
from collections import Counter
from functools import partial
from typing import Any

from agent.ops.blocking import BlockingThread, StuckError
from agent.ops.tasks import retrieve_error

MOST_OF_ONE_HOST = 4
"""The most blocked look-ups of one name, for different ports or kinds."""

MOST_LOOKUPS = 32
"""The most blocked look-ups in total, each of which is a thread that waits for a dead resolver."""

Key = tuple[Any, ...]


class Resolver:
    """The ``getaddrinfo`` of an event loop."""

    def __init__(self) -> None:
        self._pending: dict[Key, asyncio.Task[list[Any]]] = {}

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
        """Resolve a name, with the arguments of ``loop.getaddrinfo``.

        Raises:
            OSError: the name has no address (socket.gaierror), or too many look-ups are blocked.
        """
        key = (host, port, family, type, proto, flags)
        if is_numeric(host):
            return socket.getaddrinfo(*key)
        look_up = self._pending.get(key)
        if look_up is None or look_up.done():  # not cached: the system's resolver does that
            look_up = self._start(key)
        return list(await asyncio.shield(look_up))

    def _start(self, key: Key) -> asyncio.Task[list[Any]]:
        self._pending = {one: task for one, task in self._pending.items() if not task.done()}
        of_host = Counter(one[0] for one in self._pending)[key[0]]
        if of_host >= MOST_OF_ONE_HOST or len(self._pending) >= MOST_LOOKUPS:
            raise socket.gaierror(socket.EAI_AGAIN, "too many look-ups are blocked")
        look_up = asyncio.get_running_loop().create_task(_look_up(key))
        look_up.add_done_callback(retrieve_error)  # its callers may have been cancelled
        self._pending[key] = look_up
        return look_up


async def _look_up(key: Key) -> list[Any]:
    try:
        return await BlockingThread(f"look-up of {key[0]}").run(partial(socket.getaddrinfo, *key))
    except StuckError as error:
        raise socket.gaierror(socket.EAI_AGAIN, str(error)) from error


def is_numeric(host: str | bytes | None) -> bool:
    """Whether a host is an address, or None for all addresses of this host: it needs no look-up."""
    try:
        ipaddress.ip_address((host.decode() if isinstance(host, bytes) else host) or "::")
    except ValueError:
        return False
    return True


def resolve_in_own_threads(loop: asyncio.AbstractEventLoop) -> None:
    """Have a ``Resolver`` do every look-up of this loop: connections, checks, webhooks."""
    loop.getaddrinfo = Resolver().getaddrinfo  # type: ignore[method-assign]
