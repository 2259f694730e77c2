"""The tasks of one session with etcd: all of them run, or none.

An asyncio.TaskGroup treats a cancelled task as one that has ended normally, and waits for ever for a task that goes on
after its cancellation (as one in asyncio.gather does if a part of it fails at the same moment). Either would leave a
session that nobody renews and nobody ends.
"""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

AGAIN_S = 0.1
"""Interval at which tasks are cancelled until they have ended."""

T = TypeVar("T")


class SessionTasks:
    """Starts tasks, and notices the first one that fails, is cancelled or ends. Call ``end`` last."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()
        self._ended: asyncio.Future[asyncio.Task[Any]] = asyncio.get_running_loop().create_future()

    def start(self, work: Coroutine[Any, Any, T], *, may_end: bool = False) -> asyncio.Task[T]:
        """Start a task. ``may_end``: the session goes on if it returns."""
        task = asyncio.create_task(work, name=getattr(work, "__name__", None))
        self._tasks.add(task)

        def notice(task: asyncio.Task[T]) -> None:
            self._tasks.discard(task)
            failed = task.cancelled() or task.exception() is not None
            if (failed or not may_end) and not self._ended.done():
                self._ended.set_result(task)

        task.add_done_callback(notice)
        return task

    async def first_end(self) -> str:
        """Wait for the first end; return what has ended, or raise what it has raised."""
        task = await self._ended
        if not task.cancelled():
            task.result()
        return f"its task {task.get_name()} has ended"

    async def end(self) -> None:
        """Cancel all tasks, again and again, since a task may miss its cancellation; wait for their ends."""
        while self._tasks:
            for task in self._tasks:
                task.cancel()
            await asyncio.wait(self._tasks, timeout=AGAIN_S)
