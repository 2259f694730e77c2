"""Where the data-processed time comes from, beside ``POST /data-processed``.

Owns one source of the ``[progress]`` table, in a task of its own: it never blocks the event loop and
never ends on bad input. What is refused is counted by reason, and logged when the reason changes.
Knows nothing of roles and tenures: it tells each time that it reads, also an old or a lower one, and
the daemon lets none go back within a tenure (R18).
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping
from datetime import datetime

from agent.drivers.progress.listen import Listener
from agent.drivers.progress.poll import CommandReader, FileReader, MetricReader, Reader
from agent.drivers.progress.times import Plausible, Reason, Refused, read_text, read_time
from agent.ops.clock import Clock
from agent.ops.logs import Log
from agent.settings.values import (
    CommandProgress,
    FileProgress,
    FileTimeProgress,
    MetricProgress,
    MqttProgress,
    ProgressSource,
    SocketProgress,
)

__all__ = ["Plausible", "Progress", "Reason", "Refused", "read_time"]

QUIET_S = 60.0
"""The same reason is logged at most so often: a source that comes and goes must not fill the log."""

log = Log(__name__)


class Progress:
    """One source. ``start`` it inside a running loop; ``stop`` it there too.

    Args:
        settings: the source. A command must have passed ``check_hook``.
        clock: what future times are measured by.
        report: given each plausible time (aware, UTC), in the event loop; must return at once.

    Attributes:
        refused: how many times were refused since the start, by every Reason.
        last_error: why the latest was refused; None if it was taken, or none has come.
    """

    def __init__(
        self, settings: ProgressSource, clock: Clock, report: Callable[[datetime], object]
    ) -> None:
        self.settings = settings
        self.last_error: str | None = None
        self._refused = Counter({reason.value: 0 for reason in Reason})
        self._clock = clock
        self._report = report
        self._plausible = Plausible(settings.max_future)
        self._said: Reason | None = None
        self._quiet_until: dict[Reason | None, float] = {}
        self._task: asyncio.Task[None] | None = None
        self._listener: Listener | None = None
        self._reader: Reader | None = None

    @property
    def refused(self) -> Mapping[str, int]:
        return self._refused

    async def start(self) -> None:
        """Begin to read.

        Raises:
            ConfigError: LISTEN, the socket cannot be made; CONFIG_VALUE, the extra for MQTT is not
                installed, or a password or certificate cannot be used.
        """
        settings = self.settings
        match settings:
            case SocketProgress():
                self._listener = Listener(settings, self._take_text, self._refuse)
                await self._listener.start()
                return
            case MqttProgress():
                from agent.drivers.progress.mqtt import Subscriber  # noqa: PLC0415 - needs the extra

                def take(payload: bytes) -> None:
                    self._take_text(payload, settings.key)

                work = Subscriber(settings, take, self._refuse).run()
            case FileProgress() | FileTimeProgress() | MetricProgress() | CommandProgress():
                self._reader = _reader(settings)
                work = self._poll(self._reader, settings.interval)
        self._task = asyncio.get_running_loop().create_task(work)

    async def stop(self) -> None:
        """Read no more, and leave nothing behind. May be called twice, or without a start."""
        if self._listener is not None:
            self._listener.stop()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
        if self._reader is not None:
            await self._reader.close()
            self._reader = None

    async def _poll(self, reader: Reader, interval_s: float) -> None:
        while True:
            try:
                self._take(await reader.read())
            except Refused as refused:
                self._refuse(refused)
            except Exception as error:  # noqa: BLE001 - whatever one reading meets, there is a next
                self._refuse(Refused(Reason.UNREADABLE, f"{type(error).__name__}: {error}"))
            await asyncio.sleep(interval_s)

    def _take_text(self, data: bytes, key: str | None = None) -> None:
        try:
            self._take(read_text(data, key))
        except Refused as refused:
            self._refuse(refused)

    def _take(self, time: datetime) -> None:
        self._report(self._plausible.check(time, self._clock.wall()))
        self.last_error = None
        self._say(None)

    def _refuse(self, refused: Refused) -> None:
        self._refused[refused.reason.value] += 1
        self.last_error = str(refused)
        self._say(refused.reason)

    def _say(self, reason: Reason | None) -> None:
        now = self._clock.boottime()
        if reason is self._said or now < self._quiet_until.get(reason, now):
            return
        self._said = reason
        self._quiet_until[reason] = now + QUIET_S
        kind = self.settings.type
        if reason is None:
            log.info("data-processed time is read again", source=kind)
        else:
            log.warning(
                "data-processed time refused",
                source=kind,
                reason=reason.value,
                error=self.last_error,
            )


def _reader(settings: FileProgress | FileTimeProgress | MetricProgress | CommandProgress) -> Reader:
    match settings:
        case MetricProgress():
            return MetricReader(settings)
        case CommandProgress():
            return CommandReader(settings)
        case _:
            return FileReader(settings)
