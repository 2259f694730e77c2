"""The base of every kind of source: its settings, the source itself, and the receiver of its times.

A kind's file has one subclass of ``SourceKind`` (or of ``PolledSource``): a dataclass that declares the
keys of its table, and that opens the source. ``agent/schema/kinds.py`` lists the kinds.
"""

import asyncio
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol, TypeVar

from agent.drivers.progress.times import Reason, Refused
from agent.ops.blocking import BlockingThread, StuckError
from agent.ops.tasks import start_task
from agent.schema.formats import Duration, Interval
from agent.schema.kinds import DEFAULT_MAX_FUTURE_S, MaxFuture, ProgressSource

T = TypeVar("T")


class Receiver(Protocol):
    """Receives a source's times, in the event loop."""

    def receive_time(self, time: datetime) -> None:
        """Receive a time that was read."""

    def receive_text(self, data: bytes, key: str | None = None) -> None:
        """Receive a text that should be a time, or JSON with a time at ``key``."""

    def refuse(self, refused: Refused) -> None:
        """Receive the reason why no time could be read."""


class Source(Protocol):
    """One source."""

    async def start(self) -> None:
        """Begin to read. Raises ConfigError if it cannot."""

    async def stop(self) -> None:
        """Stop reading, and clean up. May be called twice, or without a start."""


class SourceKind(ProgressSource):
    """Base of the kinds."""

    __slots__ = ()

    @abstractmethod
    def open(self, receiver: Receiver) -> Source:
        """The source, to be started inside a running loop."""


class Reader(Protocol):
    """One source that is polled."""

    async def read(self) -> datetime:
        """Read the current time of the source. Raises Refused without one; takes little more than its limit."""

    async def close(self) -> None:
        """End processes and close files."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PolledSource(SourceKind):
    """A source that is polled."""

    max_future: MaxFuture = DEFAULT_MAX_FUTURE_S
    interval: Interval = 1.0
    """Time from the end of one reading to the start of the next."""
    limit: Duration = 1.0
    """How long one reading may take."""

    @abstractmethod
    def reader(self) -> Reader:
        """The reader, called for one reading at a time."""

    def open(self, receiver: Receiver) -> Source:
        return Polling(self.reader, self.interval, receiver)


class Polling:
    """Reads a source at intervals, in a task that no input can end.

    Args:
        make: makes the reader, at the start.
    """

    def __init__(self, make: Callable[[], Reader], interval_s: float, receiver: Receiver) -> None:
        self._make = make
        self._interval_s = interval_s
        self._receiver = receiver
        self._reader: Reader | None = None
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._reader = self._make()
        self._task = start_task(self._poll(self._reader))

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
        if self._reader is not None:
            await self._reader.close()
            self._reader = None

    async def _poll(self, reader: Reader) -> None:
        while True:
            try:
                self._receiver.receive_time(await reader.read())
            except Refused as refused:
                self._receiver.refuse(refused)
            except Exception as error:  # noqa: BLE001 - whatever one reading meets, there is a next
                text = f"{type(error).__name__}: {error}"
                self._receiver.refuse(Refused(Reason.UNREADABLE, text))
            await asyncio.sleep(self._interval_s)


async def read_blocking(lane: BlockingThread, work: Callable[[], T], limit_s: float) -> T:
    """Do blocking work in a thread, and return its result or raise its error.

    Raises:
        Refused: TOO_SLOW, at the limit, or while the previous reading is still stuck.
    """
    try:
        return await lane.run(work, timeout_s=limit_s)
    except TimeoutError as error:  # a subclass of OSError, which callers report differently
        raise Refused(Reason.TOO_SLOW, f"no answer within {limit_s:g} s") from error
    except StuckError as error:
        raise Refused(Reason.TOO_SLOW, str(error)) from error
