"""The requests to the server: join, heartbeat, status, release, leave.

Each request is a task with its own timeout, and ends by posting its event. After an internal error it posts the
event, too, and then raises the error to the supervisor. Decides nothing about roles.

Extensions of the API are used only if the answer to joining had a StoreId. The answers of any
other server are handled as plain v1, whatever properties they have.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import datetime
from functools import partial

from agent.core.effects import Release, SendHeartbeat
from agent.core.events import (
    Event,
    HeartbeatAnswered,
    HeartbeatFailed,
    HeartbeatFailure,
    Left,
    Released,
    StatusRead,
    Stop,
)
from agent.core.session import Session
from agent.daemon.joining import SERVER_FAULT, TOO_MANY_REQUESTS, Registration, endpoint_fields
from agent.daemon.telemetry import Stats, failure_reason
from agent.drivers.rest import RestClient
from agent.errors import ExitCode, FailoverError, ServerError
from agent.model import GroupStatus, HeartbeatAnswer
from agent.ops.clock import Clock
from agent.ops.logs import Log
from agent.schema.settings import AgentSettings

LONGEST_WAIT_S = 30.0
"""Cap on one blocking read: shorter than the idle timeouts of usual balancers and proxies."""

SHORTEST_PAUSE_S = 0.25
"""Minimum interval between status reads if the server answers them at once."""

QUICK_READS = 4
"""How many changes of the status in a row are read without a pause: a takeover has about three."""

RETRY_RELEASE_S = 0.1
"""Minimum delay between attempts to release the role."""

LONGEST_REASON = 256
"""Cap on the reason of a release, in characters."""

log = Log(__name__)


@dataclass(slots=True, eq=False)
class Requests:
    """The requests of one session.

    Attributes:
        session: read only.
        post_event: puts an event into the inbox.
        heartbeat_content: returns FailoverScore and data-processed time.
        instance: identifies this process.
        stats: counts heartbeats.
        clock: measures them.
        failure: the error of a join that has failed for good.
        group_data: the group's data-processed time, as last received.
    """

    settings: AgentSettings
    session: Session
    post_event: Callable[[Event], None]
    heartbeat_content: Callable[[], tuple[float, datetime | None]]
    instance: str
    stats: Stats
    clock: Clock
    joined_once: bool = False
    failure: FailoverError | None = None
    group_data: datetime | None = None
    _client: RestClient | None = None
    _last_failure: tuple[object, ...] | None = None
    _too_soon_count: int = 0
    _has_extensions: bool = False
    """Whether the server has the extensions of the API, by its answer to joining."""

    def set_client(self, client: RestClient) -> None:
        """Set the client, before the first request."""
        client.store_id = self.session.store_id
        self._client = client

    async def close(self) -> None:
        """Close the client."""
        if self._client is not None:
            await self._client.aclose()

    @property
    def client(self) -> RestClient:
        """The HTTP client that sends all requests."""
        assert self._client is not None, "set_client() comes first"  # noqa: S101 - our own mistake
        return self._client

    @property
    def endpoint(self) -> str:
        """The endpoint of the next request."""
        return self.settings.endpoint[0] if self._client is None else self._client.endpoint

    @property
    def _group(self) -> str:
        return self.settings.group

    @property
    def _id(self) -> str:
        return self.session.options.session_id

    @property
    def _timeout_s(self) -> float:
        return self.session.timing.request_timeout_s

    # -- heartbeats -----------------------------------------------------------------------------

    async def send_heartbeat(self, effect: SendHeartbeat) -> None:
        """Send one heartbeat; posts HeartbeatAnswered or HeartbeatFailed."""
        number = effect.number
        stats, sent = self.stats, self.clock.now()
        endpoint = self.client.endpoint
        stats.in_flight[number] = sent.mono
        try:
            answer = await self._request_heartbeat(endpoint, effect)
        except ServerError as error:
            stats.heartbeats_failed[failure_reason(error)] += 1
            self._record_failure(endpoint, error)
            self.post_event(
                HeartbeatFailed(
                    number,
                    _failure(error),
                    str(error),
                    error.retry_after_s,
                    contact=_is_contact(error),
                )
            )
        except Exception as error:
            self.post_event(
                HeartbeatFailed(number, HeartbeatFailure.OTHER, _format_internal_error(error))
            )
            raise
        else:
            stats.record_answer(sent, self.clock.now(), self.client.date, endpoint)
            self._record_success()
            self.group_data = answer.last_data
            self.post_event(HeartbeatAnswered(number, answer))
        finally:
            del stats.in_flight[number]

    async def _request_heartbeat(self, endpoint: str, effect: SendHeartbeat) -> HeartbeatAnswer:
        failsafe = self.session.options.failsafe if self._has_extensions else None
        score, last_data = self.heartbeat_content()
        answer = await self.client.heartbeat(
            self._group,
            self._id,
            score=score,
            last_data=last_data,
            instance=self.instance if self._has_extensions else None,
            seen_epoch=self.session.newest_epoch if self._has_extensions else None,
            timeout_s=self._timeout_s,
            failsafe_url=None if failsafe is None else failsafe.url,
            holds=None if failsafe is None else effect.holds,
            failsafe_revision=None if failsafe is None else effect.failsafe_revision,
            promised=failsafe is not None and effect.promised,
        )
        if not self.session.accepts_store(answer.store_id):
            raise self.client.refuse(endpoint, answer.store_id)
        return answer if self._has_extensions else HeartbeatAnswer(answer.role, answer.last_data)

    def _record_failure(self, endpoint: str, error: ServerError) -> None:
        """Log a failed heartbeat, but only the first of several in a row that fail in the same way."""
        if error.status == TOO_MANY_REQUESTS and error.exit_code is not ExitCode.NOT_THE_API:
            self._too_soon_count += 1
            if self._too_soon_count == 1 and self.session.lease_until == float("-inf"):
                return  # there is contact, and no lease that may end before the next answer
        failure = (endpoint, error.exit_code, error.status)
        if failure != self._last_failure:
            self._last_failure = failure
            log.warning("heartbeat failed", reason=error, **endpoint_fields(self.client))

    def _record_success(self) -> None:
        self._too_soon_count = 0
        if self._last_failure is not None:
            self._last_failure = None
            log.info("heartbeat answered again", endpoint=self.client.endpoint)

    # -- joining --------------------------------------------------------------------------------

    async def join(self) -> None:
        """Register, with retries; at the start only for ``startup_timeout``.

        Posts Joined; or Stop, with ``failure`` set.
        """
        try:
            joined = await Registration(
                self.settings,
                self.client,
                self.session,
                self.instance,
                rejoining=self.joined_once,
            ).run()
        except FailoverError as error:
            self.failure = error
            self.post_event(Stop(error.exit_code, str(error)))
        except Exception as error:
            self.post_event(Stop(ExitCode.TASK_FAILED, _format_internal_error(error)))
            raise
        else:
            self.joined_once = True
            self._has_extensions = joined.store_id is not None
            self.client.store_id = joined.store_id
            log.info(
                "joined",
                group=self._group,
                session=self._id,
                endpoint=self.client.endpoint,
                failover_timeout_s=joined.timing.lease_s,
                store=joined.store_id,
            )
            self.post_event(joined)

    # -- the status -----------------------------------------------------------------------------

    async def follow_status(self) -> None:
        """Read the status in a loop: by blocking reads if the server has them, else every interval.

        A server that does not block is read once per heartbeat interval, except for QUICK_READS changes
        in a row.
        """
        after: int | None = None
        quick = 0
        while True:
            asked_at = self.clock.boottime()
            revision, retry_after_s = await self._read_status(after)
            pause_s = max(self.session.timing.heartbeat_interval_s, SHORTEST_PAUSE_S)
            took_s = self.clock.boottime() - asked_at
            if took_s >= pause_s:
                quick = 0
            elif revision not in (None, after):
                quick += 1
            if revision is None or revision == after or quick > QUICK_READS:
                await asyncio.sleep(max(pause_s - took_s, retry_after_s))
            after = revision

    async def _read_status(self, after: int | None) -> tuple[int | None, float]:
        """Read the status once; posts StatusRead. Returns the revision for the next read, and Retry-After."""
        endpoint, timing = self.client.endpoint, self.session.timing
        try:
            status = await self.client.status(
                self._group,
                after=after,
                wait_s=min(max(timing.lease_s, 1.0), LONGEST_WAIT_S),
                timeout_s=timing.request_timeout_s,
            )
        except ServerError as error:  # the heartbeat fails, too, and logs it
            return None, error.retry_after_s or 0.0
        if not self.session.accepts_store(status.store_id):
            self.client.refuse(endpoint, status.store_id)
            return None, 0.0
        if not self._has_extensions:
            self.post_event(
                StatusRead(GroupStatus(status.primary, status.pending, status.last_data))
            )
            return None, 0.0
        self.post_event(StatusRead(status))
        return status.revision, 0.0

    # -- the end --------------------------------------------------------------------------------

    async def release(self, effect: Release) -> None:
        """Release the role; posts Released, even after a failure: the lease then expires.

        A plain v1 server gets no release. Before the first join, a known store id decides.
        """
        try:
            if self._has_extensions or self.session.store_id is not None:
                await self._call_with_retries(partial(self._release, effect))
        except ServerError as error:
            log.warning("role not released, its lease will expire", reason=error)
        finally:
            self.post_event(Released())

    async def _release(self, effect: Release, limit_s: float) -> None:
        await self.client.release(
            self._group,
            self._id,
            epoch=effect.epoch,
            instance=effect.instance or self.instance,
            reason=effect.reason[:LONGEST_REASON],
            hold_off_s=effect.hold_off_s or None,
            last_data=self.heartbeat_content()[1],
            held=effect.held,
            timeout_s=limit_s,
        )

    async def _call_with_retries(self, call: Callable[[float], Awaitable[None]]) -> None:
        """Call with retries while the server fails, within one request timeout."""
        loop = asyncio.get_running_loop()
        end_at = loop.time() + self._timeout_s
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
        """Delete the session; ``left`` is called if that succeeded. Posts Left in any case."""
        try:
            await self.client.leave(self._group, self._id, timeout_s=self._timeout_s)
            left()
        except ServerError as error:
            log.warning("session not deleted", reason=error)
        finally:
            self.post_event(Left())


def _failure(error: ServerError) -> HeartbeatFailure:
    if error.exit_code is ExitCode.OTHER_STORE:
        return HeartbeatFailure.OTHER_STORE
    match error.status:
        case 404 if error.exit_code is not ExitCode.NOT_THE_API:
            return HeartbeatFailure.GONE
        case 429 | 503:
            return HeartbeatFailure.BACK_OFF
        case _:
            return HeartbeatFailure.OTHER


def _is_contact(error: ServerError) -> bool:
    """Whether the coordinator itself has refused a request, and not a portal or a proxy on the way (R26)."""
    refused = error.status is not None and error.status < SERVER_FAULT
    return refused and error.has_operation_id


def _format_internal_error(error: Exception) -> str:
    """Format an internal error for the log and the history."""
    return f"internal error: {type(error).__name__}: {error}"
