"""How a single run fails, and where work that can block for ever is done: beside the event loop."""

import asyncio
import concurrent.futures
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Failed(Exception):  # noqa: N818 - an outcome of a run, not a fault of ours
    """A run of a check did not succeed; the message says why."""


class Aside(Generic[T]):
    """One thread at a time for work that the kernel may never return from.

    A dead network file system blocks its readers for ever. Such a thread is left alone, as a daemon
    thread it does not keep the process, and no second one is begun until it has come back.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._last: concurrent.futures.Future[T] | None = None

    async def run(self, work: Callable[[], T]) -> T:
        """What ``work`` returns or raises. Cancelled, it leaves the work to itself.

        Raises:
            Failed: the run before is still stuck, or there are no threads left.
        """
        if self._last is not None and not self._last.done():
            raise Failed("its last run is still stuck in the kernel (a dead network file system?)")
        future: concurrent.futures.Future[T] = concurrent.futures.Future()
        future.set_running_or_notify_cancel()  # only its end ends it

        def do() -> None:
            try:
                future.set_result(work())
            except Exception as error:  # noqa: BLE001 - raised again where it is waited for
                future.set_exception(error)

        thread = threading.Thread(target=do, name=f"check {self._name}", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            raise Failed(f"no thread can be started: {error}") from error
        self._last = future
        return await asyncio.wrap_future(future)
