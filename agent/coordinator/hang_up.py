"""Requests whose caller hangs up while they wait.

A caller without an answer asks another coordinator. If its first request were carried out after that, it would undo
what the second one was acknowledged for. So a change that has not begun ends with its caller's connection. What has
begun is finished. Heartbeats and releases are not affected (``Route.may_come_late``). A caller that closes only its
sending side counts as one that has hung up.
"""

import asyncio
import select
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from agent.errors import RequestRefused

T = TypeVar("T")

HUNG_UP = "failover.hung_up"
"""Scope key of a callback: whether the peer has closed the connection."""

_callers: WeakKeyDictionary[asyncio.Task[Any] | None, Callable[[], bool]] = WeakKeyDictionary()
"""For each task that works for a caller: a function that returns whether the caller has hung up."""

_CLOSED = getattr(select, "POLLRDHUP", select.POLLHUP)


def never() -> bool:
    """Whether the caller has hung up, for a request to which that does not matter."""
    return False


class HungUp(RequestRefused):
    """The caller has closed the connection. It receives no answer; metrics count the status."""

    def __init__(self) -> None:
        super().__init__("The caller has closed the connection.", "Wait for the answer.")


def is_closed_by_peer(transport: asyncio.BaseTransport) -> bool:
    """Whether the peer has closed its side of a connection.

    The kernel is asked: after a freeze of the process a request and the end of its connection are both waiting, and
    the event loop would learn of the end only after the request has begun.
    """
    sock = transport.get_extra_info("socket")
    if transport.is_closing() or sock is None or sock.fileno() < 0:
        return True
    poll = select.poll()
    poll.register(sock.fileno(), _CLOSED)
    return bool(poll.poll(0))


def check_caller() -> None:
    """Raise HungUp if the present task works for a caller who has hung up."""
    if _callers.get(asyncio.current_task(), never)():
        raise HungUp


def share_caller(task: asyncio.Task[Any]) -> None:
    """Record that ``task`` works for the same caller as the present task."""
    _callers[task] = _callers.get(asyncio.current_task(), never)


async def while_connected(
    answering: Coroutine[Any, Any, T],
    receive: Callable[[], Awaitable[Any]],
    hung_up: Callable[[], bool] = never,
) -> T:
    """Await an answer; cancel it if the caller hangs up first. Raises HungUp."""
    answer = asyncio.create_task(answering)
    _callers[answer] = hung_up
    gone = asyncio.ensure_future(_wait_for_disconnect(receive))
    try:
        await asyncio.wait([answer, gone], return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            raise HungUp
        return await answer
    finally:
        gone.cancel()
        answer.cancel()


async def _wait_for_disconnect(receive: Callable[[], Awaitable[Any]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
