"""Supervise the background tasks of one agent: none of them dies unseen.

Whatever the daemon waits for is a task that ends by putting an event into the inbox. A task that ends
otherwise would leave the session waiting for ever, so ``Supervisor`` reports it at once: the event that
stands for the lost answer first, then the failure itself. Knows nothing of sessions.
"""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from agent.core.events import Event

Failed = Callable[[str, BaseException], None]
"""Takes the name of a task and what it raised."""


class Supervisor:
    """The background tasks of one agent, inside one running loop.

    Args:
        tell: takes events.
        failed: called once for each task that ended unexpectedly. It must not raise.
    """

    def __init__(self, tell: Callable[[Event], None], failed: Failed) -> None:
        self._tell = tell
        self._failed = failed
        self._tasks: set[asyncio.Task[Any]] = set()
        self._closing = False

    def start(
        self,
        name: str,
        work: Coroutine[Any, Any, Any],
        *,
        lost: Event | None = None,
        endless: bool = False,
    ) -> asyncio.Task[Any]:
        """Run ``work`` in a task.

        Args:
            name: for the log.
            work: what to run. It may be cancelled at any time.
            lost: the event to tell if it raises, in place of the one that it would have told.
            endless: it is not to return; if it does, it has failed.
        """
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(lambda done: self._ended(done, lost, endless=endless))
        return task

    def watch_loop(self) -> None:
        """Report, too, what a callback of the loop raises, and a driver's task that nobody awaits.

        Connections are not meant: what a peer does to one of them is the driver's affair.
        """
        loop = asyncio.get_running_loop()

        def handle(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
            error = context.get("exception")
            ours = "handle" in context or isinstance(context.get("future"), asyncio.Task)
            if ours and error is not None and not self._closing:
                self._failed(str(context.get("message")), error)
            else:
                loop.default_exception_handler(context)

        loop.set_exception_handler(handle)

    async def cancel_all(self) -> None:
        """Cancel every task and wait until all have ended. Nothing is reported any more."""
        await asyncio.sleep(0)  # what has failed already is reported
        self._closing = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _ended(self, task: asyncio.Task[Any], lost: Event | None, *, endless: bool) -> None:
        self._tasks.discard(task)
        if self._closing or task.cancelled():
            return
        error = task.exception()
        if error is None and endless:
            error = RuntimeError("it returned, and was to run until the end")
        if error is None:
            return
        if lost is not None:
            self._tell(lost)
        self._failed(task.get_name(), error)
