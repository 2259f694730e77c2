"""The tasks that change something in the store.

Owns whether a change is finished although its caller disconnects, and how many changes of callers may be in progress.
"""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar
from weakref import WeakSet

from agent.coordinator.hang_up import check_caller, share_caller
from agent.errors import unavailable

MAX_CHANGES = 20_000
"""The most changes of callers at once: while the store hangs, callers give up, retry, and start further ones. Due
changes, at most one for each group, do not count: leases that expire together must not keep heartbeats out."""

T = TypeVar("T")


class Changes:
    """The changes in progress."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()
        self._bounded: set[asyncio.Task[Any]] = set()
        self._begun: WeakSet[asyncio.Task[Any] | None] = WeakSet()

    def begin(self) -> None:
        """Record that the task that calls this is about to write: from now on it is finished if its caller is cancelled.

        Raises HungUp if the caller has hung up, which the event loop may learn only later.
        """
        check_caller()
        self._begun.add(asyncio.current_task())

    async def carry_out(self, change: Coroutine[Any, Any, T]) -> T:
        """Start a change, and ``finish`` it. Raises as ``spawn`` does."""
        return await self.finish(self.spawn(change, bounded=True))

    async def finish(self, task: asyncio.Task[T]) -> T:
        """Await a change. If the caller is cancelled, a change that has begun to write is finished; else it is dropped."""
        share_caller(task)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if task not in self._begun:
                task.cancel()
            raise

    def spawn(self, work: Coroutine[Any, Any, T], *, bounded: bool = False) -> asyncio.Task[T]:
        """Start a task that is finished even if its caller is cancelled. ``bounded``: raise Unavailable if too many run."""
        if bounded and len(self._bounded) >= MAX_CHANGES:
            work.close()
            raise unavailable(f"{len(self._bounded)} changes wait for the store already")
        task = asyncio.get_running_loop().create_task(work)
        for tasks in (self._tasks, self._bounded) if bounded else (self._tasks,):
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        task.add_done_callback(lambda done: done.cancelled() or done.exception())
        return task

    async def wait_until_all_are_done(self) -> None:
        """Wait for the changes in progress, and for those that they start."""
        while self._tasks:
            await asyncio.wait(self._tasks)
