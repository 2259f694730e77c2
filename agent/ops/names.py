"""Resolve host names without blocking anything else, and connect to the first address that answers.

Owns one look-up thread for each host and the addresses that each look-up last found. Knows nothing of
HTTP. The resolver of the C library may block its thread for a long time. In asyncio's shared executor it
would delay look-ups of other hosts, and the exit; so each host has a thread of its own, and at most one
look-up of a host can be stuck.

A DNS outage must not cost a role: if a look-up fails or is slow, the addresses of the last one are used.
"""

import asyncio
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from agent.ops.blocking import BlockingThread, StuckError
from agent.ops.resolver import is_numeric
from agent.ops.tasks import retrieve_error

SLOW_LOOK_UP_S = 0.25
SLOW_SHARE = 0.25
"""A look-up that takes longer than this, or than this share of the connection's time limit, is slow."""

GIVE_UP_SHARE = 0.9
"""Share of the timeout that a look-up may take without known addresses; the rest is left to report the error."""

STAGGER_S = 0.25
STAGGER_SHARE = 0.25
"""If an address has not answered after this time, or this share of the timeout, the next one is tried in
parallel (RFC 8305)."""

MOST_ADDRESSES = 8
"""How many addresses of one host are tried: more could not be tried within the timeout."""

MOST_HOSTS = 256
"""For how many hosts addresses are remembered. An agent has a few endpoints, an identity server, and for
failsafe the other members of its group."""


class _Stream(Protocol):
    async def aclose(self) -> None: ...


S = TypeVar("S", bound=_Stream)


@dataclass(slots=True)
class _Host:
    lane: BlockingThread
    known: tuple[str, ...] = ()
    look_up: "asyncio.Task[tuple[str, ...]] | None" = field(default=None)


class Names:
    """The resolver of one client.

    Args:
        known_first: use known addresses without waiting for a look-up, which then serves the next connection.
    """

    def __init__(self, *, known_first: bool = False) -> None:
        self._known_first = known_first
        self._hosts: dict[str, _Host] = {}

    async def connect(
        self, host: str, dial: Callable[[str], Awaitable[S]], *, timeout_s: float
    ) -> S:
        """Connect to the first address of ``host`` that answers; the last one used is tried first.

        Args:
            host: a name, or an address, which needs no look-up.
            dial: connects to one address; has a timeout of its own.
            timeout_s: seconds for the look-up and all addresses together.

        Raises:
            OSError: the name has no address (socket.gaierror), or was not resolved in time.
            Exception: what ``dial`` raises for the first address, if none answers.
        """
        if is_numeric(host):
            return await dial(host)
        entry = self._entry(host)
        addresses = await _addresses(entry, host, timeout_s, known_first=self._known_first)
        address, stream = await _first(
            addresses, dial, stagger_s=min(STAGGER_S, STAGGER_SHARE * timeout_s)
        )
        entry.known = (address, *(other for other in entry.known if other != address))
        return stream

    def _entry(self, host: str) -> _Host:
        if host not in self._hosts and len(self._hosts) >= MOST_HOSTS:
            self._hosts.pop(next(iter(self._hosts)))
        return self._hosts.setdefault(host, _Host(BlockingThread(f"look-up of {host}")))


async def _addresses(
    entry: _Host, host: str, timeout_s: float, *, known_first: bool
) -> tuple[str, ...]:
    """The addresses of a look-up, or the known ones if it fails or is slow."""
    if entry.look_up is None or entry.look_up.done():
        entry.look_up = asyncio.create_task(_look_up(entry, host), name=f"look-up of {host}")
        entry.look_up.add_done_callback(retrieve_error)
    look_up = entry.look_up
    if known_first and entry.known:
        return entry.known
    timeout_part_s = min(SLOW_LOOK_UP_S, SLOW_SHARE * timeout_s)
    if not entry.known:
        timeout_part_s = GIVE_UP_SHARE * timeout_s
    # Not cancelled at the timeout: other connections may wait for the same look-up.
    await asyncio.wait([look_up], timeout=timeout_part_s)
    if look_up.done() and not look_up.cancelled() and look_up.exception() is None:
        return look_up.result()
    if entry.known:
        return entry.known
    if look_up.done():
        return look_up.result()
    raise TimeoutError(f"the name {host} was not resolved within {timeout_part_s:.3g} s")


async def _look_up(entry: _Host, host: str) -> tuple[str, ...]:
    def resolve() -> list[str]:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        return [str(address[0]) for *_, address in found]

    try:
        found = dict.fromkeys(await entry.lane.run(resolve))
    except StuckError as error:
        raise TimeoutError(str(error)) from error
    if not found:
        raise socket.gaierror(socket.EAI_NONAME, "the name has no address")
    last = entry.known[:1]  # stay with the address that worked, as long as it is one of the host's
    ordered = sorted(found, key=lambda address: address not in last)
    entry.known = tuple(ordered[:MOST_ADDRESSES])
    return entry.known


async def _first(
    addresses: tuple[str, ...], dial: Callable[[str], Awaitable[S]], *, stagger_s: float
) -> tuple[str, S]:
    """The first connection that succeeds; later addresses are tried in parallel with earlier ones."""
    waiting, pending, errors = (
        list(addresses),
        dict[asyncio.Future[S], str](),
        list[BaseException](),
    )
    try:
        while waiting or pending:
            if waiting:
                address = waiting.pop(0)
                pending[asyncio.ensure_future(dial(address))] = address
            done, _ = await asyncio.wait(
                pending,
                timeout=stagger_s if waiting else None,
                return_when=asyncio.FIRST_COMPLETED,
            )
            for task in done:
                error = task.exception()
                if error is None:
                    return pending.pop(task), task.result()
                del pending[task]
                errors.append(error)
        raise errors[0]
    finally:
        await _close_unused(pending)


async def _close_unused(pending: "dict[asyncio.Future[S], str]") -> None:
    """Cancel the other connection attempts, and close those that have just succeeded."""
    for task in pending:
        task.cancel()
    if pending:
        await asyncio.wait(pending)
    for task in pending:
        if not task.cancelled() and task.exception() is None:
            await task.result().aclose()
