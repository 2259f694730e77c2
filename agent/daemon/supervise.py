"""Supervise the background tasks of one agent, so that no failure goes unnoticed.

Whatever the daemon waits for is a task that ends by posting an event. A task that fails would leave the
session waiting for that event, so ``Supervisor`` posts a substitute, and then reports the failure. Knows
nothing of sessions.
"""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from agent.core.events import Event
from agent.ops.tasks import failure_of

OnFailed = Callable[[str, BaseException], None]
"""Receives the name of a failed task and its exception."""


class Supervisor:
    """The background tasks of one agent, inside one running loop.

    Args:
        post_event: puts an event into the inbox.
        on_failed: called once for each task that ended unexpectedly. It must not raise.
    """

    def __init__(self, post_event: Callable[[Event], None], on_failed: OnFailed) -> None:
        self._post_event = post_event
        self._on_failed = on_failed
        self._tasks: set[asyncio.Task[Any]] = set()
        self._closing = False

    def start(
        self,
        name: str,
        work: Coroutine[Any, Any, Any],
        *,
        failure_event: Event | None = None,
        endless: bool = False,
    ) -> asyncio.Task[Any]:
        """Run ``work`` in a task.

        Args:
            name: for the log.
            work: may be cancelled at any time.
            failure_event: the event to post if ``work`` raises, as a substitute for its own.
            endless: ``work`` must not return; if it does, it has failed.
        """
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(lambda done: self._ended(done, failure_event, endless=endless))
        return task

    def watch_loop(self) -> None:
        """Also report exceptions of loop callbacks, and of tasks that drivers have started (ops/tasks.py).

        Not those of connections: drivers handle what a peer does.
        """
        loop = asyncio.get_running_loop()

        def handle(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
            error = context.get("exception")
            ours = "handle" in context or isinstance(context.get("future"), asyncio.Task)
            if ours and error is not None and not self._closing:
                self._on_failed(str(context.get("message")), error)
            else:
                loop.default_exception_handler(context)

        loop.set_exception_handler(handle)

    def report_failure(self, name: str, error: BaseException) -> None:
        """Report a failure that is not the end of a task."""
        if not self._closing:
            self._on_failed(name, error)

    async def cancel_all(self) -> None:
        """Cancel every task and wait until all have ended. Later failures are not reported."""
        await asyncio.sleep(0)  # report the tasks that have failed already
        self._closing = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _ended(
        self, task: asyncio.Task[Any], failure_event: Event | None, *, endless: bool
    ) -> None:
        self._tasks.discard(task)
        if self._closing:
            return
        error = failure_of(task)
        if error is None and endless and not task.cancelled():
            error = RuntimeError("it returned, though it should run until cancelled")
        if error is None:
            return
        if failure_event is not None:
            self._post_event(failure_event)
        self._on_failed(task.get_name(), error)
