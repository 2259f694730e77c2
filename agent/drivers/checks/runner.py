"""Health checks (R9): each in its own task, at its interval, within its limit.

Owns when checks run, and their results. Knows no kind of check, and of roles only "primary or not"; the callback
decides what follows from a change of health. No check can delay another one, the event loop or a heartbeat.
"""

import asyncio
from collections.abc import Callable, Sequence

from agent.drivers.checks.kind import Check, CheckFailed, Run
from agent.drivers.checks.verdict import NO_RESULT, CheckResult, Health, judge
from agent.ops.clock import Clock
from agent.ops.logs import Log, one_line
from agent.ops.tasks import start_task
from agent.schema.kinds import CheckSettings

log = Log(__name__)


class Checks:
    """All checks of one agent. ``start`` it inside a running loop; ``stop`` it there too.

    Args:
        checks: what is configured; names are unique.
        clock: measures durations and ages.
        on_change: called with each health whose score, fitness or set of passing checks is new. It
            runs in the event loop and must return at once.
        failover_score: the score when all pass, 0 to 100.
    """

    def __init__(
        self,
        checks: Sequence[CheckSettings],
        clock: Clock,
        on_change: Callable[[Health], None],
        failover_score: float = 100.0,
    ) -> None:
        self._checks = {check.name: check for check in checks}
        self._clock = clock
        self._on_change = on_change
        self._failover_score = failover_score
        self._runs = {name: _runner(check, clock) for name, check in self._checks.items()}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._notifying: asyncio.Handle | None = None
        self._primary = False
        self._stopped = False
        now = clock.wall()
        self._results = {
            name: CheckResult(up=True, since=now)
            if check.scope == "primary"
            else CheckResult(up=False, since=now, last_error=NO_RESULT, known=False)
            for name, check in self._checks.items()
        }
        self._notified = self.health

    @property
    def health(self) -> Health:
        """The current health."""
        return judge(list(self._checks.values()), self._results, self._failover_score)

    def start(self) -> None:
        """Start: every check of scope ``always`` runs at once, then at its interval."""
        for name, check in self._checks.items():
            if check.scope == "always":
                self._start(name, delay_s=0.0)

    def set_primary(self, primary: bool) -> None:  # noqa: FBT001 - its only argument
        """Start or stop judging checks of scope ``primary``.

        They start as passing, with the first run after one interval: the workload is starting.
        """
        if primary == self._primary or self._stopped:
            return
        self._primary = primary
        for name, check in self._checks.items():
            if check.scope == "primary":
                if name in self._tasks:
                    self._tasks[name].cancel()
                self._results[name] = CheckResult(up=True, since=self._clock.wall())
                if primary:
                    self._start(name, delay_s=check.interval)
        self._notify_soon()

    async def stop(self) -> None:
        """End every run with its processes; on_change is not called afterwards. May be called twice."""
        self._stopped = True
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        self._tasks.clear()
        if self._notifying is not None:
            self._notifying.cancel()

    def _start(self, name: str, delay_s: float) -> None:
        repeat = self._repeat(self._checks[name], delay_s, self._tasks.get(name))
        self._tasks[name] = start_task(repeat, name=f"check {name}")

    async def _repeat(
        self, check: CheckSettings, delay_s: float, before: asyncio.Task[None] | None
    ) -> None:
        loop = asyncio.get_running_loop()
        due = loop.time() + delay_s
        if before is not None:  # a run of an earlier tenure is being cancelled
            try:
                await asyncio.wait([before])
            finally:  # so that a stop, which waits for this task, waits for that run, too
                await asyncio.wait([before])
        while True:
            await asyncio.sleep(due - loop.time())
            started_at = self._clock.boottime()
            error = await self._run(check)
            self._record(check, error, self._clock.boottime() - started_at)
            due = max(due + check.interval, loop.time())  # missed runs are skipped

    async def _run(self, check: CheckSettings) -> str | None:
        """Why one run failed, or None."""
        try:
            async with asyncio.timeout(check.limit):
                await self._runs[check.name]()
        except TimeoutError:
            return f"gave no result within {check.limit:g} s"
        except CheckFailed as error:
            return one_line(str(error))
        except Exception as error:  # noqa: BLE001 - a task's edge: a check that cannot run is down
            log.error("check could not be run", check=check.name, reason=repr(error))  # noqa: TRY400 - no traceback needed
            return one_line(f"could not be run: {error!r}")
        return None

    def _record(self, check: CheckSettings, error: str | None, duration_s: float) -> None:
        before = self._results[check.name]
        after = before.after(check, error, duration_s, self._clock.wall())
        self._results[check.name] = after
        if (before.up, before.known) == (after.up, after.known):
            return
        event = log.info if after.up else log.warning
        event("check changed", check=check.name, up=after.up, reason=error, duration_s=duration_s)
        self._notify_soon()

    def _notify_soon(self) -> None:
        """Call on_change from the event loop, so that an exception in it ends no check."""
        if self._notifying is None or self._notifying.cancelled():
            self._notifying = asyncio.get_running_loop().call_soon(self._notify)

    def _notify(self) -> None:
        self._notifying = None
        health = self.health
        if _summary(health) != _summary(self._notified):
            self._notified = health
            self._on_change(health)


def _runner(check: CheckSettings, clock: Clock) -> Run:
    assert isinstance(check, Check), check  # noqa: S101 - as every kind in the registry
    return check.runner(clock)


def _summary(health: Health) -> tuple[object, ...]:
    states = {name: (result.up, result.known) for name, result in health.results.items()}
    return health.score, health.fit, states
