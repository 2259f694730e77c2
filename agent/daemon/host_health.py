"""The health of this host: its fitness (R9), its score, and its data-processed time (R18).

Owns the health checks, the source of the data-processed time, and the reasons why this member is unfit.
Posts each change as an event to the session, and decides nothing.
"""

import asyncio
from collections.abc import Callable, Mapping
from datetime import datetime

from agent.core.events import Event, FitnessChanged, Stop
from agent.daemon.member import Member
from agent.drivers.checks.runner import Checks
from agent.drivers.checks.verdict import Health
from agent.drivers.progress import Plausible, Progress
from agent.errors import FailoverError
from agent.model import Role
from agent.ops.logs import Log
from agent.schema.kinds import DEFAULT_MAX_FUTURE_S
from agent.schema.settings import AgentSettings

BEHIND_SCORE = 1.0
"""The score of a secondary whose data is too far behind (``max_behind``): it is chosen only if no other
member has a better one."""

CHECKS_POLL_S = 0.02
"""Poll interval for the first results of new checks at a reload; each check has its own timeout."""

log = Log(__name__)


class HostHealth:
    """Checks, progress and fitness of one agent.

    Args:
        member: ``progress`` is written here.
        post_event: puts an event into the inbox.
    """

    def __init__(self, member: Member, post_event: Callable[[Event], None]) -> None:
        self._member = member
        self._post_event = post_event
        self._unfit: dict[str, str] = {}
        self._checks = self._build_checks(member.settings)
        self.source: Progress | None = None
        self.workload_status = 0
        """The exit status of the command of ``exec``, once it has ended by itself."""

    async def start(self) -> None:
        """Start the checks and the source of the data-processed time.

        Raises:
            ConfigError: the source cannot be started.
        """
        await self._start_source(self._member.settings)
        self._on_health_changed(self._checks.health)
        self._checks.start()

    async def stop(self) -> None:
        """Stop both."""
        await self._checks.stop()
        if self.source is not None:
            await self.source.stop()

    # -- data-processed time --------------------------------------------------------------------

    def report_progress(self, time: datetime) -> datetime:
        """Record a data-processed time from the probe; it never goes back within a tenure (R18).

        Returns:
            The newest time of the tenure.

        Raises:
            ValueError: it is implausibly far in the future.
        """
        source = self._member.settings.progress
        bound_s = source.max_future if source is not None else DEFAULT_MAX_FUTURE_S
        try:
            plausible = Plausible(bound_s).check(time, self._member.clock.wall())
        except ValueError:
            self._member.stats.future_refused += 1
            raise
        return self._record_progress(plausible)

    def begin_tenure(self) -> None:
        """Forget the data-processed time: a new tenure may begin further back (R18)."""
        self._member.progress = None

    def _record_progress(self, time: datetime) -> datetime:
        known = self._member.progress
        if known is None or time > known:
            self._member.progress = known = time
        return known

    async def replace_source(self, settings: AgentSettings) -> None:
        """Replace the source; keep the previous one if the new one cannot be started.

        Raises:
            FailoverError: it cannot be started.
        """
        if self.source is not None:
            await self.source.stop()
        try:
            await self._start_source(settings)
        except FailoverError:
            await self._start_source(self._member.settings)
            raise

    async def _start_source(self, settings: AgentSettings) -> None:
        self.source = None
        if settings.progress is not None:
            self.source = Progress(settings.progress, self._member.clock, self._record_progress)
            await self.source.start()

    # -- score and fitness ----------------------------------------------------------------------

    def heartbeat_content(self) -> tuple[float, datetime | None]:
        """The content of the next heartbeat: FailoverScore and data-processed time."""
        return self.score(), self._member.progress

    def score(self) -> float:
        """FailoverScore: that of the checks, or BEHIND_SCORE for a secondary that is too far behind."""
        score = self._checks.health.score
        member = self._member
        group_data, bound_s = member.requests.group_data, member.settings.max_behind
        if (
            bound_s is None
            or group_data is None
            or member.progress is None
            or member.published.role is Role.PRIMARY
        ):
            return score
        behind_s = (group_data - member.progress).total_seconds()
        return min(score, BEHIND_SCORE) if behind_s > bound_s else score

    @property
    def checks_up(self) -> Mapping[str, bool]:
        """Whether each health check passes, by name."""
        return {name: result.up for name, result in self._checks.health.results.items()}

    @property
    def unfit(self) -> Mapping[str, str]:
        """Why this host may not be primary, by source."""
        return dict(self._unfit)

    def unfit_reason(self) -> str | None:
        """Why this host may not be primary, in one line; None if it may."""
        return "; ".join(self._unfit.values()) or None

    def set_unfit_reason(self, source: str, why: str | None, *, expected: bool = False) -> None:
        """Record why this host is unfit by a source, or that it is fit; each change is posted.

        Args:
            source: what has found it.
            why: the reason; None for fit.
            expected: whether it is part of an ordinary start, and not worth a warning.
        """
        before = dict(self._unfit)
        self._unfit.pop(source, None)
        if why is not None:
            self._unfit[source] = why
        if self._unfit == before:
            return
        reason = self.unfit_reason()
        if reason is not None:
            write = log.info if expected else log.warning
            write("unfit to be primary", reason=reason)
        else:
            log.info("fit to be primary again")
        self._post_event(FitnessChanged(reason is None, reason or ""))

    def set_primary(self, *, primary: bool) -> None:
        """Evaluate the checks that are for primaries only, or leave them out."""
        self._checks.set_primary(primary)

    def on_guard_changed(self, why: str | None) -> None:
        """The guard was lost, or answers again."""
        self._member.stats.guard_lost += why is not None
        self.set_unfit_reason("guard", why)

    def on_workload_ended(self, status: int | None) -> None:
        """Record that the command of ``exec`` has ended for good, or (None) fails again and again."""
        if status is None:
            self.set_unfit_reason("workload", "the workload fails again and again")
        else:
            self.workload_status = status
            self._post_event(Stop(reason="the workload has ended"))

    async def replace_checks(self, settings: AgentSettings) -> None:
        """Replace the checks once each new one has a first result; the old ones count until then."""
        checks = self._build_checks(settings)
        checks.start()
        try:
            while not all(  # noqa: ASYNC110 - a first result that fails is not reported as a change
                result.known for result in checks.health.results.values()
            ):
                await asyncio.sleep(CHECKS_POLL_S)
        except asyncio.CancelledError:
            await checks.stop()
            raise
        before, self._checks = self._checks, checks
        checks.set_primary(self._member.published.role is Role.PRIMARY)
        self._on_health_changed(checks.health)
        await before.stop()

    def _build_checks(self, settings: AgentSettings) -> Checks:
        return Checks(
            settings.check, self._member.clock, self._on_health_changed, settings.failover_score
        )

    def _on_health_changed(self, _: Health) -> None:
        health = self._checks.health  # checks that are not in force yet report theirs, too
        waiting = not all(result.known for result in health.results.values())
        self.set_unfit_reason("checks", None if health.fit else health.reason, expected=waiting)
