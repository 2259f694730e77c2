"""What the daemon asks of the server: joining, heartbeats, the status, the end.

Each call is a task of its own with its own time limit, and ends by telling an event, also if it fails
by a fault of ours: that is raised besides, for whoever supervises the task. Decides nothing about roles.

Extensions of the API (docs/api.md) are used only once the answer to joining had a StoreId. At any other server
all answers are taken as plain v1, whatever they carry.
"""

import asyncio
from collections.abc import Awaitable, Callable
from datetime import datetime
from functools import partial

from agent.core.effects import Release
from agent.core.events import (
    Answered,
    BeatFailed,
    Event,
    Failure,
    Left,
    Released,
    StatusSeen,
    Stop,
)
from agent.core.session import Session
from agent.daemon.joining import SERVER_FAULT, TOO_MANY_REQUESTS, Joining, where_next
from agent.daemon.vitals import Tally, reason_of
from agent.drivers.rest import RestClient
from agent.errors import ExitCode, FailoverError, ServerError
from agent.model import GroupStatus, HeartbeatAnswer
from agent.ops.clock import Clock
from agent.ops.logs import Log
from agent.settings import AgentSettings

LONGEST_WAIT_S = 30.0
"""One blocking read: shorter than the idle limits of usual balancers and proxies."""

SHORTEST_PAUSE_S = 0.25
"""Between status reads that are answered at once, however short a beat is."""

QUICK_READS = 4
"""Changes of the status that are read one right after the other: a takeover has about three."""

RETRY_RELEASE_S = 0.1
"""Between attempts to give the role back."""

LONGEST_REASON = 256
"""Characters that a release may carry."""

log = Log(__name__)


class Requests:
    """The calls of one session.

    Args:
        session: read only.
        tell: takes the events.
        report: the content of a heartbeat: FailoverScore and the data-processed time.
        instance: identifies this process.
        tally: counts heartbeats.
        clock: measures them.

    Attributes:
        failure: why the session cannot go on, once a join has failed for good.
        group_data: the group's data-processed time, as last heard.
    """

    def __init__(
        self,
        settings: AgentSettings,
        session: Session,
        tell: Callable[[Event], None],
        report: Callable[[], tuple[float, datetime | None]],
        *,
        instance: str,
        tally: Tally,
        clock: Clock,
    ) -> None:
        self.settings = settings
        self._client: RestClient | None = None
        self.joined_once = False
        self.failure: FailoverError | None = None
        self.group_data: datetime | None = None
        self.instance = instance
        self._session = session
        self._tell = tell
        self._report = report
        self._tally = tally
        self._clock = clock
        self._trouble: tuple[object, ...] | None = None
        self._too_soon = 0
        self._extended = False
        """Whether the server has the extensions of docs/api.md, by its answer to joining."""

    def use(self, client: RestClient) -> None:
        """Take the client for all calls; needed before the first one."""
        client.store_id = self._session.store_id
        self._client = client

    async def close(self) -> None:
        """Close the client."""
        if self._client is not None:
            await self._client.aclose()

    @property
    def client(self) -> RestClient:
        """The client that makes the calls."""
        assert self._client is not None, "use() comes first"  # noqa: S101 - our own mistake
        return self._client

    @property
    def endpoint(self) -> str:
        """The endpoint that the next call goes to."""
        return self.settings.endpoint[0] if self._client is None else self._client.endpoint

    @property
    def _group(self) -> str:
        return self.settings.group

    @property
    def _id(self) -> str:
        return self._session.options.session_id

    @property
    def _limit_s(self) -> float:
        return self._session.timing.request_timeout_s

    # -- heartbeats -----------------------------------------------------------------------------

    async def beat(self, beat: int) -> None:
        """Send one heartbeat; tell Answered or BeatFailed."""
        tally, sent = self._tally, self._clock.now()
        endpoint = self.client.endpoint
        tally.asked_at[beat] = sent.mono
        try:
            answer = await self._beat(endpoint)
        except ServerError as error:
            tally.beats_failed[reason_of(error)] += 1
            self._lost_contact(endpoint, error)
            self._tell(BeatFailed(beat, _failure(error), str(error), error.retry_after_s))
        except Exception as error:
            self._tell(BeatFailed(beat, Failure.OTHER, _fault(error)))
            raise
        else:
            tally.answered(sent, self._clock.now(), self.client.date, endpoint)
            self._has_contact()
            self.group_data = answer.last_data
            self._tell(Answered(beat, answer))
        finally:
            del tally.asked_at[beat]

    async def _beat(self, endpoint: str) -> HeartbeatAnswer:
        score, last_data = self._report()
        answer = await self.client.heartbeat(
            self._group,
            self._id,
            score=score,
            last_data=last_data,
            instance=self.instance if self._extended else None,
            seen_epoch=self._session.newest_epoch if self._extended else None,
            timeout_s=self._limit_s,
        )
        if not self._session.accepts_store(answer.store_id):
            raise self.client.refuse(endpoint, answer.store_id)
        return answer if self._extended else HeartbeatAnswer(answer.role, answer.last_data)

    def _lost_contact(self, endpoint: str, error: ServerError) -> None:
        """One line when contact is lost, or changes its reason."""
        if error.status == TOO_MANY_REQUESTS and error.exit_code is not ExitCode.NOT_THE_API:
            self._too_soon += 1
            if self._too_soon == 1:
                return  # the API itself finds a heartbeat too soon: there is contact
        trouble = (endpoint, error.exit_code, error.status)
        if trouble != self._trouble:
            self._trouble = trouble
            log.warning("heartbeat failed", reason=error, **where_next(self.client))

    def _has_contact(self) -> None:
        self._too_soon = 0
        if self._trouble is not None:
            self._trouble = None
            log.info("heartbeat answered again", endpoint=self.client.endpoint)

    # -- joining --------------------------------------------------------------------------------

    async def join(self) -> None:
        """Register, however long it takes; at the start only for ``startup_timeout``.

        Tells Joined; or Stop, with ``failure`` set.
        """
        try:
            joined = await Joining(
                self.settings, self.client, self._session, again=self.joined_once
            ).run()
        except FailoverError as error:
            self.failure = error
            self._tell(Stop(error.exit_code, str(error)))
        except Exception as error:
            self._tell(Stop(ExitCode.TASK_FAILED, _fault(error)))
            raise
        else:
            self.joined_once = True
            self._extended = joined.store_id is not None
            self.client.store_id = joined.store_id
            log.info(
                "joined",
                group=self._group,
                session=self._id,
                endpoint=self.client.endpoint,
                failover_timeout_s=joined.timing.lease_s,
                store=joined.store_id,
            )
            self._tell(joined)

    # -- the status -----------------------------------------------------------------------------

    async def follow(self) -> None:
        """Read the status for ever: by blocking reads where the server has them, else every beat.

        A server that does not block, although it is asked to, is read once a beat; only some changes
        in a row are read one right after the other.
        """
        after: int | None = None
        quick = 0
        while True:
            asked_at = self._clock.boottime()
            revision, retry_after_s = await self._read_status(after)
            pause_s = max(self._session.timing.beat_s, SHORTEST_PAUSE_S)
            took_s = self._clock.boottime() - asked_at
            if took_s >= pause_s:
                quick = 0
            elif revision not in (None, after):
                quick += 1
            if revision is None or revision == after or quick > QUICK_READS:
                await asyncio.sleep(max(pause_s - took_s, retry_after_s))
            after = revision

    async def _read_status(self, after: int | None) -> tuple[int | None, float]:
        """Tell StatusSeen; the revision to wait behind, or None, and how long the server asks to wait."""
        endpoint, timing = self.client.endpoint, self._session.timing
        try:
            status = await self.client.status(
                self._group,
                after=after,
                wait_s=min(max(timing.lease_s, 1.0), LONGEST_WAIT_S),
                timeout_s=timing.request_timeout_s,
            )
        except ServerError as error:  # the heartbeat meets the same and says so
            return None, error.retry_after_s or 0.0
        if not self._session.accepts_store(status.store_id):
            self.client.refuse(endpoint, status.store_id)
            return None, 0.0
        if not self._extended:
            self._tell(StatusSeen(GroupStatus(status.primary, status.pending, status.last_data)))
            return None, 0.0
        self._tell(StatusSeen(status))
        return status.revision, 0.0

    # -- the end --------------------------------------------------------------------------------

    async def release(self, effect: Release) -> None:
        """Give the role back; tells Released, also if it failed: the lease ends by itself then.

        A plain v1 server is sent nothing. That of a former life is known by the store it had.
        """
        try:
            if self._extended or self._session.store_id is not None:
                await self._insist(partial(self._release, effect))
        except ServerError as error:
            log.warning("role not given back, its lease will end", reason=error)
        finally:
            self._tell(Released())

    async def _release(self, effect: Release, limit_s: float) -> None:
        await self.client.release(
            self._group,
            self._id,
            epoch=effect.epoch,
            instance=effect.instance or self.instance,
            reason=effect.reason[:LONGEST_REASON],
            hold_off_s=effect.hold_off_s or None,
            last_data=self._report()[1],
            timeout_s=limit_s,
        )

    async def _insist(self, call: Callable[[float], Awaitable[None]]) -> None:
        """Make a call again while the server fails and the time of one request is not over."""
        loop = asyncio.get_running_loop()
        end_at = loop.time() + self._limit_s
        while True:
            try:
                return await call(end_at - loop.time())
            except ServerError as error:
                refused = error.status is not None and error.status < SERVER_FAULT
                pause_s = max(RETRY_RELEASE_S, error.retry_after_s or 0.0)
                if refused or loop.time() + pause_s >= end_at:
                    raise
            await asyncio.sleep(pause_s)

    async def leave(self, left: Callable[[], None]) -> None:
        """Delete the session; ``left`` is called if that succeeded. Tells Left in any case."""
        try:
            await self.client.leave(self._group, self._id, timeout_s=self._limit_s)
            left()
        except ServerError as error:
            log.warning("session not deleted", reason=error)
        finally:
            self._tell(Left())


def _failure(error: ServerError) -> Failure:
    if error.exit_code is ExitCode.OTHER_STORE:
        return Failure.OTHER_STORE
    match error.status:
        case 404 if error.exit_code is not ExitCode.NOT_THE_API:
            return Failure.GONE
        case 429 | 503:
            return Failure.BACK_OFF
        case _:
            return Failure.OTHER


def _fault(error: Exception) -> str:
    """A fault of ours, for the log and the history."""
    return f"internal error: {type(error).__name__}: {error}"
