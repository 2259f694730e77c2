"""Start background tasks whose failure is reported at once, for owners that never await them.

asyncio itself reports it only when the task is garbage collected, so never while its owner keeps it.
"""

import asyncio
from collections.abc import Coroutine
from typing import Any


def start_task(work: Coroutine[Any, Any, Any], *, name: str | None = None) -> asyncio.Task[Any]:
    """Run ``work`` in a task; pass its failure to the loop's exception handler (daemon/supervise.py)."""
    task = asyncio.get_running_loop().create_task(
        work, name=name or getattr(work, "__qualname__", None)
    )
    task.add_done_callback(_report)
    return task


def failure_of(task: asyncio.Task[Any]) -> BaseException | None:
    """The exception that ended a task; also for one that ended as cancelled, though nothing had cancelled it."""
    if not task.cancelled():
        return task.exception()
    return None if task.cancelling() else RuntimeError("it ended as cancelled without a cancel()")


def retrieve_error(task: asyncio.Future[Any]) -> None:
    """Done callback: retrieve the error, so that asyncio does not report a task that nobody awaits any more."""
    if not task.cancelled():
        task.exception()


def _report(task: asyncio.Task[Any]) -> None:
    if (error := failure_of(task)) is not None:
        context = {"message": task.get_name(), "exception": error, "future": task}
        task.get_loop().call_exception_handler(context)
