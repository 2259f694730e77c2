"""What the daemon asks of the server: joining, heartbeats, the status, the end.

Each call is a task of its own with its own time limit, and ends by telling an event. Decides nothing
about roles; whether a failed join is tried again is decided here.
"""

import asyncio
import secrets
from collections.abc import Callable
from datetime import datetime

from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_exception,
    stop_before_delay,
    stop_never,
    wait_random_exponential,
)

from agent.core.effects import Release
from agent.core.events import (
    Answered,
    BeatFailed,
    Event,
    Failure,
    Joined,
    Left,
    Released,
    StatusSeen,
    Stop,
)
from agent.core.session import Session
from agent.core.timing import Timing, plan
from agent.daemon.vitals import Tally, reason_of
from agent.drivers.rest import RestClient
from agent.errors import ExitCode, FailoverError, ServerError, TimingError
from agent.model import TICKS_PER_SECOND, GroupConfig, SessionConfig
from agent.ops.clock import Clock
from agent.ops.logs import Log
from agent.settings import AgentSettings

LONGEST_WAIT_S = 30.0
"""One blocking read: shorter than the idle limits of usual balancers and proxies."""

SHORTEST_RETRY_S = 0.05
LONGEST_REASON = 256
"""Characters that a release may carry."""

TOO_MANY_REQUESTS = 429
PERMANENT = frozenset({ExitCode.REFUSED, ExitCode.NOT_AUTHORISED})
"""What a server says at the start and would say again."""

log = Log(__name__)


class Requests:
    """The calls of one session.

    Args:
        session: read only.
        tell: takes the events.
        report: what a heartbeat says: FailoverScore and the data-processed time.
        tally: counts heartbeats.
        clock: measures them.

    Attributes:
        failure: why the session cannot go on, once a join has failed for good.
        group_data: the group's data-processed time, as last heard.
    """

    def __init__(
        self,
        settings: AgentSettings,
        client: RestClient,
        session: Session,
        tell: Callable[[Event], None],
        report: Callable[[], tuple[float, datetime | None]],
        *,
        tally: Tally,
        clock: Clock,
    ) -> None:
        self.settings = settings
        self.client = client
        self.joined_once = False
        self.failure: FailoverError | None = None
        self.group_data: datetime | None = None
        self.instance = secrets.token_hex(8)
        self._session = session
        self._tell = tell
        self._report = report
        self._tally = tally
        self._clock = clock
        self._trouble: str | None = None

    @property
    def _group(self) -> str:
        return self.settings.group

    @property
    def _id(self) -> str:
        return self._session.options.session_id

    async def beat(self, beat: int) -> None:
        """One heartbeat; tells Answered or BeatFailed."""
        score, last_data = self._report()
        tally, sent = self._tally, self._clock.now()
        endpoint = self.client.endpoint
        tally.asked_at[beat] = sent.mono
        try:
            answer = await self.client.heartbeat(
                self._group,
                self._id,
                score=score,
                last_data=last_data,
                instance=self.instance,
                seen_epoch=self._session.newest_epoch,
                timeout_s=self._session.timing.request_timeout_s,
            )
        except ServerError as error:
            tally.beats_failed[reason_of(error)] += 1
            if error.status != TOO_MANY_REQUESTS:  # too soon, but there is contact
                self._contact(str(error))
            self._tell(BeatFailed(beat, _failure(error), str(error), error.retry_after_s))
        else:
            tally.answered(sent, self._clock.now(), self.client.date, endpoint)
            self._contact(None)
            self.group_data = answer.last_data
            self._tell(Answered(beat, answer))
        finally:
            del tally.asked_at[beat]

    def _contact(self, trouble: str | None) -> None:
        """One line when contact is lost, changes its reason, or is back."""
        if trouble == self._trouble:
            return
        self._trouble = trouble
        if trouble is not None:
            log.warning("heartbeat failed", reason=trouble, next_endpoint=self.client.endpoint)
        else:
            log.info("heartbeat answered again", endpoint=self.client.endpoint)

    async def join(self) -> None:
        """Register, however long it takes; at the start only for ``startup_timeout``.

        Tells Joined; or Stop, with ``failure`` set.
        """
        patience_s = self.settings.startup_timeout
        bounded = not self.joined_once and patience_s > 0
        retrying = AsyncRetrying(
            retry=retry_if_exception(self._worth_retrying),
            wait=wait_random_exponential(
                multiplier=SHORTEST_RETRY_S, max=self._session.timing.beat_s
            ),
            stop=stop_before_delay(patience_s) if bounded else stop_never,
            before_sleep=_say_retry,
            reraise=True,
        )
        try:
            timing: Timing = await retrying(self._register)
        except FailoverError as error:
            self.failure = error
            self._tell(Stop())
            return
        self.joined_once = True
        log.info(
            "joined",
            group=self._group,
            session=self._id,
            endpoint=self.client.endpoint,
            failover_timeout_s=timing.lease_s,
        )
        self._tell(Joined(timing))

    def _worth_retrying(self, error: BaseException) -> bool:
        if not isinstance(error, ServerError):
            return False
        not_ready = error.status is not None and (error.status == 429 or error.status >= 500)  # noqa: PLR2004 - codes of HTTP
        return self.joined_once or not_ready or error.exit_code not in PERMANENT

    async def _register(self) -> Timing:
        settings = self.settings
        timing = self._session.timing
        limit_s = timing.request_timeout_s
        wanted = GroupConfig(
            self._group,
            round(settings.failover_timeout * TICKS_PER_SECOND),
            name=settings.group_name,
        )
        group = await self.client.ensure_group(wanted, timeout_s=2 * limit_s)
        if group.lease_s != timing.lease_s:
            log.info("adopted the group's failover timeout", failover_timeout_s=group.lease_s)
            try:
                timing = plan(group.lease_s, settings.budget)
            except TimingError as error:
                raise TimingError(
                    f"group {self._group} has failover timeout {group.lease_s:g} s at"
                    f" {self.client.endpoint}, and with it {error}",
                    smallest_lease_s=error.smallest_lease_s,
                ) from error
        name = settings.session_name if settings.session_name is not None else self._id
        await self.client.join(self._group, SessionConfig(self._id, name=name), timeout_s=limit_s)
        return timing

    async def follow(self) -> None:
        """Read the status for ever: by blocking reads where the server has them, else every beat."""
        after: int | None = None
        while True:
            timing = self._session.timing
            wait_s = min(max(timing.lease_s, 1.0), LONGEST_WAIT_S)
            try:
                status = await self.client.status(
                    self._group, after=after, wait_s=wait_s, timeout_s=timing.request_timeout_s
                )
            except ServerError:  # the heartbeat meets the same and says so
                after = None
                await asyncio.sleep(timing.beat_s)
                continue
            self._tell(StatusSeen(status))
            after = status.revision
            if after is None:
                await asyncio.sleep(timing.beat_s)

    async def release(self, effect: Release) -> None:
        """Give the role back; tells Released, also if it failed: the lease ends by itself then."""
        try:
            await self.client.release(
                self._group,
                self._id,
                epoch=effect.epoch,
                instance=effect.instance or self.instance,
                reason=effect.reason[:LONGEST_REASON],
                hold_off_s=effect.hold_off_s or None,
                last_data=self._report()[1],
                timeout_s=self._session.timing.request_timeout_s,
            )
        except ServerError as error:
            log.warning("role not given back, its lease will end", reason=error)
        self._tell(Released())

    async def leave(self, left: Callable[[], None]) -> None:
        """Delete the session; ``left`` is called if that succeeded. Tells Left in any case."""
        try:
            await self.client.leave(
                self._group, self._id, timeout_s=self._session.timing.request_timeout_s
            )
        except ServerError as error:
            log.warning("session not deleted", reason=error)
        else:
            left()
        self._tell(Left())


def _failure(error: ServerError) -> Failure:
    match error.status:
        case 404 if error.exit_code is not ExitCode.NOT_THE_API:
            return Failure.GONE
        case 429 | 503:
            return Failure.BACK_OFF
        case _:
            return Failure.OTHER


def _say_retry(state: RetryCallState) -> None:
    error = state.outcome.exception() if state.outcome is not None else None
    if state.attempt_number == 1 or state.attempt_number % 20 == 0:
        log.warning("cannot join yet", reason=error, attempt=state.attempt_number)
