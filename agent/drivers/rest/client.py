"""The group API over HTTP: each operation as a coroutine with values of model.py.

Owns the choice among several endpoints of one coordinator or one cluster, and the connections. Knows
nothing of what an answer means for a role, and retries nothing: that is up to the caller.

``timeout_s`` bounds a whole request (credentials, connection, sending and answer), which fails only with a
ServerError. Requests go to the current endpoint. If that fails or is slow (no connection, no answer, an
answer of something else, 5xx), all others are probed concurrently by a read of the status: the first one
that answers becomes the current endpoint. Until then the current one stays.
"""

import asyncio
import json
import re
import ssl
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import TypeVar
from urllib.parse import quote

import httpx2

from agent.drivers.rest.connections import open_client
from agent.drivers.rest.credentials import ClientCredentials
from agent.drivers.rest.exchange import Answer, fault_of_url, quoted, send
from agent.drivers.rest.names import Names
from agent.errors import ConfigError, ExitCode, ServerError
from agent.model import (
    LONGEST_HOLD_OFF_S,
    TICKS_PER_SECOND,
    GroupConfig,
    GroupStatus,
    HeartbeatAnswer,
    HistoryEntry,
    SessionConfig,
    SessionView,
)
from agent.ops.logs import Log
from agent.schema import api
from agent.schema.codec import BodyError, decode, decode_many, encode, has_none_of
from agent.schema.scalars import format_time_span
from agent.schema.values import HoldOffSpan, Shape

T = TypeVar("T")
S = TypeVar("S", bound=Shape)

log = Log(__name__)

KEEPALIVE_S = 45.0
"""Idle timeout of a connection: above the longest heartbeat interval (10 s), below the idle timeouts of
common servers and balancers (60 s and more)."""

CONNECTIONS = 8
"""For all requests but blocking reads. An agent has one or two in flight; each has a timeout."""

BLOCKING_READ_CONNECTIONS = 2
"""For blocking reads: the one that waits, and one that was just cancelled."""

PROBE_CONNECTIONS = 8
"""For probes of other endpoints, one each: silent ones must not use up the connections of heartbeats."""

SLOW_SHARE = 0.5
"""A request that has used this share of its timeout is slow: the other endpoints are probed."""

PAGE = 100
"""Page size of lists, the documented default."""

EXAMPLE = "http://127.0.0.1:8080/api/v1/clientfailover"

ANSWER_NAME = "the answer"
ADDRESS_HINT = " (is this the address of a client failover service?)"

MOST_PAGES = 1000
"""Limit of pages, whatever Total-Count is: 100,000 groups are more than a coordinator serves."""


class RestClient:
    """Calls the group API at the current one of several endpoints. Close it with ``aclose``."""

    def __init__(
        self,
        endpoints: Sequence[str],
        *,
        auth: httpx2.Auth | None = None,
        verify: ssl.SSLContext | bool = True,
        keepalive_s: float = KEEPALIVE_S,
        transport: httpx2.AsyncBaseTransport | None = None,
    ) -> None:
        """Sends nothing yet.

        Args:
            endpoints: base paths up to clientfailover, http or https, of one coordinator or one
                cluster; the first one is used first.
            auth: httpx2.BasicAuth, ClientCredentials, or None.
            verify: how server certificates are verified; False: not at all.
            keepalive_s: idle timeout of a connection: longer than the heartbeat interval, shorter
                than the server's own.
            transport: stands in for the network, in tests.

        Raises:
            ConfigError: there is no endpoint, or one does not have the right form.
        """
        if not endpoints:
            raise ConfigError(f"no endpoint is given: name at least one, such as {EXAMPLE}")
        self._endpoints = tuple(dict.fromkeys(_parse_endpoint(endpoint) for endpoint in endpoints))
        self._current = 0
        self._failing = False
        self._probes: dict[int, asyncio.Task[None]] = {}
        self._probe_faults: dict[int, str] = {}
        self._refused: dict[int, str | None] = {}
        self.store_id: str | None = None
        """The id of the store that answers must come from, once the caller has set it."""
        self.date: datetime | None = None
        """The Date header of the newest answer, or None."""
        self._auth = auth
        context = httpx2.create_ssl_context(verify=verify, trust_env=False)
        self._names = Names()
        self._call_client, self._blocking_read_client, self._probe_client = (
            open_client(
                context,
                keepalive_s=kept_s,
                connections=connections,
                names=self._names,
                auth=auth,
                transport=transport,
            )
            for connections, kept_s in (
                (CONNECTIONS, keepalive_s),
                (BLOCKING_READ_CONNECTIONS, keepalive_s),
                (PROBE_CONNECTIONS, 0.0),
            )
        )

    @property
    def endpoint(self) -> str:
        """The base path of the current endpoint."""
        return self._endpoints[self._current]

    @property
    def endpoints(self) -> tuple[str, ...]:
        """All base paths, in their order."""
        return self._endpoints

    @property
    def faults_of_others(self) -> str | None:
        """Why the other endpoints cannot be used, by their last probes; None without a fault."""
        faults = (fault for index, fault in self._probe_faults.items() if index != self._current)
        return "; ".join(faults) or None

    def refuse(self, endpoint: str, store_id: str | None) -> ServerError:
        """Reject an endpoint of another store, and make the next one current.

        Args:
            endpoint: the one that answered.
            store_id: the store id in its answer.

        Returns:
            The error to raise or to report.
        """
        index = self._endpoints.index(endpoint)
        error = self._other_store_error(index, store_id)
        self._leave_endpoint(index)
        return error

    def ask_next(self, asked: str, error: ServerError) -> bool:
        """Make the next endpoint current if ``asked`` has failed; whether there is another one to try.

        For callers that send one request only. An agent sends again anyway.
        """
        if _is_endpoint_failure(error):
            self._leave_endpoint(self._endpoints.index(asked))
        return self.endpoint != asked

    async def aclose(self) -> None:
        """Close every connection, and ClientCredentials with them. May be called twice."""
        for probe in self._probes.values():
            probe.cancel()
        if self._probes:
            await asyncio.wait(self._probes.values())
        await self._call_client.aclose()
        await self._blocking_read_client.aclose()
        await self._probe_client.aclose()
        if isinstance(self._auth, ClientCredentials):
            await self._auth.aclose()

    # --- requests of an agent -----------------------------------------------------------------------

    async def ensure_group(self, config: GroupConfig, *, timeout_s: float) -> GroupConfig:
        """The group as the server has it, created from ``config`` if it was missing.

        An existing group with another configuration is used as it is, with its timeout, as v1 clients do
        (docs/api.md). ``timeout_s`` bounds both requests together.

        Raises:
            ServerError: see the module.
        """
        end_at = asyncio.get_running_loop().time() + timeout_s
        try:
            return await self.create_group(config, timeout_s=timeout_s)
        except ServerError as error:
            if error.status != httpx2.codes.CONFLICT:
                raise
        rest_s = end_at - asyncio.get_running_loop().time()
        return await self.group(config.id, timeout_s=rest_s)

    async def join(self, group: str, session: SessionConfig, *, timeout_s: float) -> str | None:
        """Register the session, or find it registered with the same configuration.

        Returns:
            The id of the store that it is registered in. None means a plain v1 server, which may
            refuse any extension: send it no instance, no epoch, no blocking read and no release.

        Raises:
            ServerError: ``status`` 404 if the group is gone; 409 if the id is taken by a session of
                another configuration.
        """
        return await self._request(
            "POST",
            f"groups/{_quote_segment(group)}/clientsessions",
            what=f"joining group {group} as session {session.id}",
            timeout_s=timeout_s,
            body=encode(api.SessionRequest.from_model(session)),
            read=lambda answer: _decode(api.ClientSession, answer).store_id,
        )

    async def heartbeat(
        self,
        group: str,
        session: str,
        *,
        score: float,
        last_data: datetime | None,
        instance: str | None,
        seen_epoch: int | None,
        timeout_s: float,
    ) -> HeartbeatAnswer:
        """One heartbeat.

        Args:
            group: its id.
            session: its id.
            score: FailoverScore, 0 to 100.
            last_data: when data was last processed, or None for never.
            instance: this process; None at a plain v1 server.
            seen_epoch: the newest epoch seen; None at a plain v1 server.
            timeout_s: seconds, under R / 2 (R1).

        Raises:
            ServerError: ``status`` 404 if the group or the session is gone; 429 if it came too soon.
        """
        return await self._request(
            "POST",
            f"{_session_path(group, session)}/heartbeat",
            what=f"heartbeat of session {session} in group {group}",
            timeout_s=timeout_s,
            body=encode(
                api.HeartbeatRequest(
                    failover_score=score,
                    last_data_processed_time=last_data,
                    instance=instance,
                    epoch=seen_epoch,
                )
            ),
            read=lambda answer: _decode(api.HeartbeatResponse, answer).to_model(),
        )

    async def status(
        self, group: str, *, after: int | None = None, wait_s: float = 0.0, timeout_s: float
    ) -> GroupStatus:
        """The status of the group; with ``after``, once its revision has passed that.

        Args:
            group: its id.
            after: the newest revision seen, or None to be answered at once.
            wait_s: for how long the server may hold the answer back, if ``after`` is given. A plain v1
                server answers at once all the same: poll it.
            timeout_s: for everything beside that wait.

        Raises:
            ServerError: ``status`` 404 if the group is gone.
        """
        params = None
        if after is not None:
            wait = format_time_span(round(wait_s * TICKS_PER_SECOND))
            params = {"after": str(after), "wait": wait}
        # A failure here is no reason to change the endpoint: a proxy may cut long reads, and not only the
        # leader answers them. Heartbeats find out.
        answer = await send(
            self._blocking_read_client,
            "GET",
            self._url(self._current, f"groups/{_quote_segment(group)}/status"),
            what=f"status of group {group}",
            timeout_s=timeout_s if after is None else wait_s + timeout_s,
            params=params,
        )
        return _decode_answer(answer, lambda answer: _decode(api.GroupStatus, answer).to_model())

    async def release(
        self,
        group: str,
        session: str,
        *,
        epoch: int,
        instance: str,
        reason: str,
        hold_off_s: float | None = None,
        last_data: datetime | None = None,
        timeout_s: float,
    ) -> None:
        """Release a tenure after demotion, so that the next session can be promoted at once (R5).

        Args:
            group: its id.
            session: its id.
            epoch: that of the tenure that has ended.
            instance: the process that held it; a release of another one is ignored.
            reason: for the history.
            hold_off_s: seconds in which this session is not to be chosen again, or None.
            last_data: when data was last processed, or None for never.
            timeout_s: seconds.

        Raises:
            ServerError: a plain v1 server knows no release: ``status`` 404, or NOT_THE_API. The lease
                expires there.
        """
        await self._request(
            "POST",
            f"{_session_path(group, session)}/release",
            what=f"release of group {group} by session {session}",
            timeout_s=timeout_s,
            body=encode(
                api.ReleaseRequest(
                    epoch=epoch,
                    instance=instance,
                    hold_off_period=None if hold_off_s is None else _hold_off(hold_off_s),
                    reason=reason,
                    last_data_processed_time=last_data,
                )
            ),
            read=_check_no_content,
        )

    async def leave(self, group: str, session: str, *, timeout_s: float) -> None:
        """Delete the session. It is a success too if it or its group is gone already.

        Raises:
            ServerError: see the module.
        """
        try:
            await self._request(
                "DELETE",
                _session_path(group, session),
                what=f"session {session} leaving group {group}",
                timeout_s=timeout_s,
                read=_check_no_content,
            )
        except ServerError as error:
            if error.status != httpx2.codes.NOT_FOUND:
                raise

    # --- requests of the command line ---------------------------------------------------------------

    async def version(self, *, timeout_s: float) -> str:
        """The version of the server, from its base path."""
        return await self._request(
            "GET",
            "",
            what="version",
            timeout_s=timeout_s,
            read=lambda answer: _decode(api.Version, answer).version,
        )

    async def groups(self, *, timeout_s: float) -> list[GroupConfig]:
        """Every group that the caller may see, page by page; ``timeout_s`` is for each page.

        A group that is made or deleted meanwhile may be missing; none is there twice.
        """
        found: dict[str, GroupConfig] = {}
        for page in range(MOST_PAGES):
            total, groups = await self._request(
                "GET",
                "groups",
                what="groups",
                timeout_s=timeout_s,
                params={"skip": str(page * PAGE), "count": str(PAGE)},
                read=lambda answer: (_total_count(answer), _decode_groups(answer)),
            )
            known = len(found)
            found |= {group.id: group for group in groups}
            if len(found) == known or (total is not None and (page + 1) * PAGE >= total):
                break
        return list(found.values())

    async def group(self, group: str, *, timeout_s: float) -> GroupConfig:
        """One group as the server has it.

        Raises:
            ServerError: ``status`` 404 if there is none.
        """
        return await self._request(
            "GET",
            f"groups/{_quote_segment(group)}",
            what=f"group {group}",
            timeout_s=timeout_s,
            read=_decode_group,
        )

    async def create_group(self, config: GroupConfig, *, timeout_s: float) -> GroupConfig:
        """Make a group, or find it there with what ``config`` sets; as the server has it.

        Raises:
            ServerError: ``status`` 409 if it is there with another configuration.
        """
        return await self._request(
            "POST",
            "groups/",  # with the slash, as v1 clients do
            what=f"creating group {config.id}",
            timeout_s=timeout_s,
            body=encode(api.GroupRequest.from_model(config)),
            probe_path=f"groups/{_quote_segment(config.id)}/status",
            read=_decode_group,
        )

    async def delete_group(self, group: str, *, timeout_s: float) -> None:
        """Remove a group.

        Raises:
            ServerError: ``status`` 404 if there is none; 409 if it has active sessions.
        """
        await self._request(
            "DELETE",
            f"groups/{_quote_segment(group)}",
            what=f"deleting group {group}",
            timeout_s=timeout_s,
            read=_check_no_content,
        )

    async def sessions(self, group: str, *, timeout_s: float) -> list[SessionView]:
        """The members of a group.

        Raises:
            ServerError: ``status`` 404 if there is no such group.
        """
        return await self._request(
            "GET",
            f"groups/{_quote_segment(group)}/clientsessions",
            what=f"sessions of group {group}",
            timeout_s=timeout_s,
            read=lambda answer: [s.to_model() for s in _decode_many(api.ClientSession, answer)],
        )

    async def history(
        self, group: str, *, skip: int = 0, count: int = PAGE, timeout_s: float
    ) -> list[HistoryEntry]:
        """Up to ``count`` tenures of a group after ``skip`` of them, newest first.

        Raises:
            ServerError: ``status`` 404 if there is no such group; a plain v1 server has no history.
        """
        return await self._request(
            "GET",
            f"groups/{_quote_segment(group)}/history",
            what=f"history of group {group}",
            timeout_s=timeout_s,
            params={"skip": str(skip), "count": str(count)},
            read=lambda answer: [t.to_model() for t in _decode_many(api.HistoryEntry, answer)],
        )

    # --- sending --------------------------------------------------------------------------

    async def _request(
        self,
        method: str,
        path: str,
        *,
        what: str,
        timeout_s: float,
        read: Callable[[Answer], T],
        body: bytes | None = None,
        params: Mapping[str, str] | None = None,
        probe_path: str | None = None,
    ) -> T:
        probe_path = _derive_probe_path(path) if probe_path is None else probe_path
        asked = self._current
        slow = asyncio.get_running_loop().call_later(
            SLOW_SHARE * timeout_s, self._on_endpoint_failure, asked, probe_path, timeout_s
        )
        try:
            answer = await send(
                self._call_client,
                method,
                self._url(asked, path),
                what=what,
                timeout_s=timeout_s,
                params=params,
                content=body,
            )
            self.date = answer.date
            value = _decode_answer(answer, read)
        except ServerError as error:
            if _is_endpoint_failure(error):
                self._on_endpoint_failure(asked, probe_path, timeout_s)
            raise
        finally:
            slow.cancel()
        if asked == self._current:
            self._confirm_endpoint()
        return value

    def _url(self, index: int, path: str) -> str:
        return f"{self._endpoints[index]}/{path}" if path else self._endpoints[index]

    # --- choice of the endpoint ------------------------------------------------------------------

    def _leave_endpoint(self, index: int) -> None:
        if index == self._current:
            self._failing = False
            self._current = (index + 1) % len(self._endpoints)

    def _confirm_endpoint(self) -> None:
        """Stop probing: the current endpoint works."""
        self._failing = False
        self._probe_faults.clear()
        for probe in self._probes.values():
            probe.cancel()

    def _on_endpoint_failure(self, asked: int, probe_path: str, timeout_s: float) -> None:
        """Probe the other endpoints, since the current one has failed or is slow."""
        if asked != self._current:
            return  # overlapping requests fail together: only the first one counts
        self._failing = True
        for index in range(len(self._endpoints)):
            running = self._probes.get(index)
            if index != asked and (running is None or running.done()):
                self._probes[index] = asyncio.create_task(
                    self._probe(index, probe_path, timeout_s), name="probe endpoint"
                )

    async def _probe(self, index: int, path: str, timeout_s: float) -> None:
        """Probe another endpoint by a read; make it the current one if it answers."""
        try:
            answer = await send(
                self._probe_client,
                "GET",
                self._url(index, path),
                what="probing the endpoint",
                timeout_s=timeout_s,
            )
            store_id = (
                _decode_answer(answer, _decode_store_id)
                if path
                else _decode_answer(answer, _check_version)
            )
        except ServerError as error:
            if _is_endpoint_failure(error) or error.exit_code is ExitCode.NOT_AUTHORISED:
                self._probe_faults[index] = str(error)
                return
            store_id = None  # a refusal by the API is an answer
        if None not in (self.store_id, store_id) and store_id != self.store_id:
            self._other_store_error(index, store_id)
            return
        self._probe_faults.pop(index, None)
        if self._failing:
            self._failing = False
            self._current = index

    def _other_store_error(self, index: int, store_id: str | None) -> ServerError:
        """The error for an endpoint of another store; logged once for each change."""
        endpoint, right = self._endpoints[index], "list endpoints of one coordinator or one cluster"
        found = "no store" if store_id is None else f"store {quoted(store_id)}"
        message = f"{endpoint} answers from {found}, expected store {self.store_id}; {right}"
        if self._refused.get(index, "") != store_id:
            self._refused[index] = store_id
            log.error(
                "coordinator of another store refused",
                endpoint=endpoint,
                store=store_id,
                expected=self.store_id,
                resolution=f"{right}; see docs/operations.md if its data was replaced",
            )
        self._probe_faults[index] = message
        return ServerError(message, exit_code=ExitCode.OTHER_STORE)


def _decode_answer(answer: Answer, read: Callable[[Answer], T]) -> T:
    answer.check()
    try:
        return read(answer)
    except BodyError as error:
        raise answer.unreadable(str(error)) from None


def _decode(shape: type[S], answer: Answer) -> S:
    try:
        value = decode(shape, answer.body, ANSWER_NAME)
    except BodyError as error:
        raise BodyError(f"{error}{ADDRESS_HINT}") from None
    if has_none_of(value, answer.body):
        raise BodyError(f"none of the properties of {shape.__name__}")
    return value


def _decode_many(shape: type[S], answer: Answer) -> list[S]:
    try:
        return decode_many(shape, answer.body, ANSWER_NAME)
    except BodyError as error:
        raise BodyError(f"{error}{ADDRESS_HINT}") from None


def _decode_group(answer: Answer) -> GroupConfig:
    group = _decode(api.GroupConfiguration, answer).to_model()
    if not group.id:
        raise BodyError("a group without an Id")
    return group


def _decode_groups(answer: Answer) -> list[GroupConfig]:
    """Those without an id left out."""
    groups = [group.to_model() for group in _decode_many(api.GroupConfiguration, answer)]
    return [group for group in groups if group.id]


def _decode_store_id(answer: Answer) -> str | None:
    return _decode(api.GroupStatus, answer).store_id


def _check_version(answer: Answer) -> None:
    _decode(api.Version, answer)


def _derive_probe_path(path: str) -> str:
    """The path of a harmless read by which an endpoint is probed for requests like this one."""
    kind, _, rest = path.partition("/")
    group = rest.partition("/")[0]
    return f"{kind}/{group}/status" if kind == "groups" and group else ""


def _is_endpoint_failure(error: ServerError) -> bool:
    """Whether the endpoint has failed, rather than refused the request."""
    if error.status is None or error.exit_code is ExitCode.NOT_THE_API:
        return error.exit_code is not ExitCode.NOT_AUTHORISED
    return error.status >= httpx2.codes.INTERNAL_SERVER_ERROR


def _parse_endpoint(endpoint: str) -> str:
    """The endpoint without a slash at its end."""
    right = f"it must be the base path of a group API, up to clientfailover, such as {EXAMPLE}"
    problem = fault_of_url(endpoint)
    if problem is None:
        if "?" in endpoint or "#" in endpoint:
            problem = "has a query or a fragment"
        elif not endpoint.rstrip("/").lower().endswith("/clientfailover"):
            problem = "does not end in /clientfailover"
        else:
            return str(httpx2.URL(endpoint)).rstrip("/")
    shown = re.sub("//.*@", "//***@", endpoint)
    raise ConfigError(f"endpoint {shown!r} {problem}; {right}")


def _quote_segment(name: str) -> str:
    """An id as one segment of a path."""
    if name in {"", ".", ".."}:
        raise ConfigError(f"{name!r} is no id of a group or session: it would change the URL")
    return quote(name, safe="")


def _session_path(group: str, session: str) -> str:
    return f"groups/{_quote_segment(group)}/clientsessions/{_quote_segment(session)}"


def _total_count(answer: Answer) -> int | None:
    """The header Total-Count, or None."""
    total = answer.headers.get("total-count", "")
    return int(total) if total.isdecimal() and len(total) < 10 else None  # noqa: PLR2004 - digits


def _check_no_content(answer: Answer) -> None:
    """Check an answer without content: empty or JSON, but no HTML page."""
    if answer.body.strip():
        try:
            json.loads(answer.body)
        except (ValueError, RecursionError) as error:
            raise BodyError(str(error)) from None


def _hold_off(seconds: float) -> HoldOffSpan:
    return HoldOffSpan(round(min(seconds, LONGEST_HOLD_OFF_S) * TICKS_PER_SECOND))
