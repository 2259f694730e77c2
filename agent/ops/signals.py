"""SIGTERM and SIGINT as a wish to stop. Decides nothing: whoever waits for the event does."""

import asyncio
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from agent.ops.logs import Log

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)

log = Log(__name__)


@contextmanager
def stop_signals() -> Iterator[asyncio.Event]:
    """An event that the first SIGTERM or SIGINT sets; further ones are logged and change nothing.

    A stop that was begun runs to its end: it may hold a lease (R5), and it has its own limits. To
    be entered in the main thread inside a running loop. The handlers of before are back on exit.
    """
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()

    def noticed(number: int) -> None:
        name = signal.Signals(number).name
        if stop.is_set():
            log.warning("already stopping", signal=name)
        else:
            log.info("stop asked for", signal=name)
            stop.set()

    def handler(number: int, _frame: FrameType | None) -> None:
        with suppress(RuntimeError):  # the loop is closed: there is nothing left to stop
            loop.call_soon_threadsafe(noticed, number)

    before = {number: signal.signal(number, handler) for number in STOP_SIGNALS}
    try:
        yield stop
    finally:
        for number, old in before.items():
            signal.signal(number, old)
