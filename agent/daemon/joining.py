"""Register the group and the session, with retries.

Owns which failures are retried, and the backoff between attempts. Knows nothing of events, nor of what
happens to a session that cannot register.
"""

import asyncio
from dataclasses import dataclass
from functools import partial

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, wait_random_exponential

from agent.core.events import Joined
from agent.core.session import Session
from agent.core.timing import plan
from agent.drivers.rest import RestClient
from agent.errors import ExitCode, ServerError, TimingError
from agent.model import TICKS_PER_SECOND, GroupConfig, SessionConfig
from agent.ops.logs import Log
from agent.schema.settings import AgentSettings

SHORTEST_RETRY_S = 0.05
CONFLICT = 409
TOO_MANY_REQUESTS = 429
SERVER_FAULT = 500
"""The lowest HTTP status that means a fault of the server rather than a refusal."""

PERMANENT = frozenset({ExitCode.REFUSED, ExitCode.NOT_AUTHORISED})
"""Failures that are not retried at the start."""

LOGGED_EVERY = 20
"""The first failed attempt is logged, and then one in so many."""

log = Log(__name__)


@dataclass(frozen=True, slots=True)
class Registration:
    """One registration.

    Args:
        session: read only.
        instance: identifies this process.
        rejoining: the session was registered before; every failure is retried without a timeout.
    """

    settings: AgentSettings
    client: RestClient
    session: Session
    instance: str
    rejoining: bool

    async def run(self) -> Joined:
        """Register, with retries; the first time only for ``startup_timeout``.

        Raises:
            ServerError: OTHER_STORE if only a coordinator of another store answered; else the last
                failure.
            TimingError: the existing group's timeout does not fit the settings; never when rejoining.
        """
        timeout_s = self.settings.startup_timeout
        bounded = not self.rejoining and timeout_s > 0
        failures: dict[ExitCode, ServerError] = {}
        retrying = AsyncRetrying(
            retry=retry_if_exception(self._should_retry),
            wait=self._pause_s,
            before_sleep=partial(self._record_failure, failures),
            reraise=True,
        )
        try:
            async with asyncio.timeout(timeout_s if bounded else None):
                joined: Joined = await retrying(self._register)
                return joined
        except TimeoutError:
            pass
        if failures:
            raise failures.get(ExitCode.OTHER_STORE, list(failures.values())[-1])
        raise ServerError(
            f"joining group {self.settings.group}: {self.client.endpoint} gave no answer within"
            f" startup_timeout {timeout_s:g} s; check that the server is healthy and that nothing on"
            " the way drops packets",
            exit_code=ExitCode.NO_ANSWER,
        )

    async def _register(self) -> Joined:
        settings, session_id = self.settings, self.session.options.session_id
        timing = self.session.timing
        limit_s = timing.request_timeout_s
        wanted = GroupConfig(
            settings.group,
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
                    f"group {settings.group} has failover timeout {group.lease_s:g} s at"
                    f" {self.client.endpoint}, and with it {error}",
                    smallest_lease_s=error.smallest_lease_s,
                ) from error
        name = settings.session_name if settings.session_name is not None else session_id
        endpoint = self.client.endpoint
        failsafe = self.session.options.failsafe
        takes_part = failsafe is not None and await self._has_extensions(limit_s)
        join = partial(
            self.client.join,
            settings.group,
            timeout_s=limit_s,
            instance=self.instance if takes_part else None,
            failsafe_url=failsafe.url if failsafe is not None and takes_part else None,
        )
        try:
            store_id = await join(SessionConfig(session_id, name=name))
        except ServerError as error:
            if not self.rejoining or error.status != CONFLICT:
                raise
            store_id = await join(SessionConfig(session_id))  # others have given it another name
        if not self.session.accepts_store(store_id):
            raise self.client.refuse(endpoint, store_id)
        return Joined(timing, store_id)

    async def _has_extensions(self, limit_s: float) -> bool:
        """Whether the server has extensions. A plain v1 server may refuse a registration with a FailsafeUrl.

        Before the first registration only the group's status shows this. If there is no permission to read
        it, the first heartbeat reports the URL.
        """
        if self.rejoining:
            return self.session.store_id is not None
        try:
            status = await self.client.status(self.settings.group, timeout_s=limit_s)
        except ServerError as error:
            if self._worth_retrying(error):
                raise
            return False
        return status.store_id is not None

    def _should_retry(self, error: BaseException) -> bool:
        """Retry also if a portal on the way has refused: with failsafe this member votes in the meantime."""
        of_portal = isinstance(error, ServerError) and not error.has_operation_id
        votes = self.session.options.failsafe is not None
        return self._worth_retrying(error) or (of_portal and votes)

    def _worth_retrying(self, error: BaseException) -> bool:
        if not isinstance(error, ServerError):
            return self.rejoining and isinstance(error, TimingError)
        not_ready = error.status is not None and (
            error.status == TOO_MANY_REQUESTS or error.status >= SERVER_FAULT
        )
        return self.rejoining or not_ready or error.exit_code not in PERMANENT

    def _pause_s(self, state: RetryCallState) -> float:
        """Exponential backoff with jitter; longer if the server asks for that."""
        timing = self.session.timing
        backoff_s = wait_random_exponential(
            multiplier=SHORTEST_RETRY_S, max=timing.heartbeat_interval_s
        )(state)
        error = _error_of(state)
        asked_s = (error.retry_after_s or 0.0) if error is not None else 0.0
        if self.rejoining:  # a longer wait could cost the lease
            asked_s = min(asked_s, timing.renew_s / 2)
        return max(backoff_s, asked_s)

    def _record_failure(self, failures: dict[ExitCode, ServerError], state: RetryCallState) -> None:
        """Keep the newest failure of each kind, in order; log some of them."""
        error = _error_of(state)
        if error is not None:
            failures.pop(error.exit_code, None)
            failures[error.exit_code] = error
        if state.attempt_number % LOGGED_EVERY == 1:
            log.warning(
                "join failed, retrying",
                reason=state.outcome.exception() if state.outcome is not None else None,
                attempt=state.attempt_number,
                **endpoint_fields(self.client),
            )


def endpoint_fields(client: RestClient) -> dict[str, str]:
    """Log fields of a failed request: the next endpoint, and the faults of the others."""
    faults = client.faults_of_others
    others = {} if faults is None else {"other_endpoints": faults}
    return {"next_endpoint": client.endpoint, **others}


def _error_of(state: RetryCallState) -> ServerError | None:
    error = state.outcome.exception() if state.outcome is not None else None
    return error if isinstance(error, ServerError) else None
