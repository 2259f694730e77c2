"""Sources of the data-processed time other than ``POST /data-processed``.

Owns the source of the ``[progress]`` table: it never blocks the event loop and never ends on bad input. Refused
times are counted by reason, and logged when the reason changes. Knows no kind of source, and nothing of roles and
tenures: it reports each time that it reads, even one that goes back, which the daemon ignores within a
tenure (R18).
"""

from collections import Counter
from collections.abc import Callable, Mapping
from datetime import datetime

from agent.drivers.progress.kind import Source, SourceKind
from agent.drivers.progress.times import Plausible, Reason, Refused, read_text, read_time
from agent.ops.clock import Clock
from agent.ops.logs import Log
from agent.schema.kinds import ProgressSource

__all__ = ["Plausible", "Progress", "Reason", "Refused", "read_time"]

QUIET_S = 60.0
"""Interval in which the same reason is logged once, so that an unsteady source does not fill the log."""

log = Log(__name__)


class Progress:
    """One source. ``start`` it inside a running loop; ``stop`` it there too.

    Args:
        settings: the source. A command must have passed ``HookCheck.check_command``.
        clock: decides which times are in the future.
        report: called in the event loop with each plausible time (aware, UTC); must return at once.

    Attributes:
        refused: how many times were refused since the start, by every Reason.
        last_error: why the latest time was refused; None if it was accepted, or before the first one.
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
        self._logged: Reason | None = None
        self._quiet_until: dict[Reason | None, float] = {}
        self._source: Source | None = None

    @property
    def refused(self) -> Mapping[str, int]:
        return self._refused

    async def start(self) -> None:
        """Begin to read.

        Raises:
            ConfigError: LISTEN, the socket cannot be made; CONFIG_VALUE, the extra for MQTT is not
                installed, or a password or certificate cannot be used.
        """
        assert isinstance(self.settings, SourceKind)  # noqa: S101 - as every kind in the registry
        self._source = self.settings.open(self)
        await self._source.start()

    async def stop(self) -> None:
        """Stop reading, and clean up. May be called twice, or without a start."""
        if self._source is not None:
            await self._source.stop()

    def receive_text(self, data: bytes, key: str | None = None) -> None:
        """Parse a text, and report its time."""
        try:
            self.receive_time(read_text(data, key))
        except Refused as refused:
            self.refuse(refused)

    def receive_time(self, time: datetime) -> None:
        """Report a time. Raises Refused if it is not plausible."""
        self._report(self._plausible.check(time, self._clock.wall()))
        self.last_error = None
        self._log(None)

    def refuse(self, refused: Refused) -> None:
        """Count and log that no time could be read."""
        self._refused[refused.reason.value] += 1
        self.last_error = str(refused)
        self._log(refused.reason)

    def _log(self, reason: Reason | None) -> None:
        now = self._clock.boottime()
        if reason is self._logged or now < self._quiet_until.get(reason, now):
            return
        self._logged = reason
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
