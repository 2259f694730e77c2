"""Run calls that may block for ever in a thread, without blocking the event loop.

A dead network file system, a pipe that nobody reads or a resolver that does not answer may block its
caller for ever. ``BlockingThread`` runs such a call in a daemon thread: the loop goes on, and the process
can exit. Knows nothing of what the call does.

Not promised: that the call returns. A thread that is stuck in the kernel is abandoned; there is at most one
for each ``BlockingThread``.
"""

import asyncio
import concurrent.futures
from collections.abc import Callable
from typing import TypeVar

from agent.ops.reserve import run_in_thread

T = TypeVar("T")


class StuckError(Exception):
    """The previous call has not returned, so no further one is started."""


class BlockingThread:
    """At most one thread for one kind of blocking call.

    Args:
        name: of the kind of call, for messages, such as "state file".
        vital: whether a demotion needs it; then it may use a reserved thread (ops/reserve.py).
    """

    def __init__(self, name: str, *, vital: bool = False) -> None:
        self.name = name
        self._vital = vital
        self._last: concurrent.futures.Future[object] | None = None

    @property
    def busy(self) -> bool:
        """Whether the last call has not returned yet."""
        return self._last is not None and not self._last.done()

    async def run(self, work: Callable[[], T], *, timeout_s: float | None = None) -> T:
        """Call ``work`` in a daemon thread; return what it returns, or raise what it raises.

        If the caller is cancelled or times out, the call goes on and its result is lost.

        Args:
            work: the blocking call.
            timeout_s: seconds to wait for it; None waits for ever.

        Raises:
            StuckError: the previous call has not returned, or no thread can be started.
            TimeoutError: ``timeout_s`` is over.
        """
        if self.busy:
            raise StuckError(f"{self.name}: the last call is still blocked in the kernel")
        try:
            future = run_in_thread(work, vital=self._vital)
        except BlockingIOError as error:
            raise StuckError(f"{self.name}: {error.strerror}") from error
        self._last = future  # type: ignore[assignment]
        async with asyncio.timeout(timeout_s):
            return await asyncio.wrap_future(future)
