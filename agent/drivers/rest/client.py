"""The group API over HTTP: each of its calls as a coroutine that takes and gives values of model.py.

Owns the choice among several endpoints of one coordinator or one cluster, and the connections. Refuses
to know what an answer means for a role, and when to ask again: nothing is retried here, the caller decides.

Each call is bounded as a whole by its ``timeout_s`` (credentials, connection, sending and answer) and
fails with a ServerError only. A call goes to one endpoint, and the client stays with the one that works.
If that fails or is slow (no connection, no answer, something that is not the API, 5xx), all the others are
looked at *beside* it, by reading a status that changes nothing: the first one that answers takes the
calls that come next. Until one does, calls go on to the endpoint that worked last.
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
from agent.schema.values import HoldOffSpan

T = TypeVar("T")
S = TypeVar("S", bound=api.Shape)

log = Log(__name__)

KEEPALIVE_S = 45.0
"""An idle connection is kept for this long: above the longest beat (10 s), below the idle limits of
common servers and balancers (60 s and more)."""

CONNECTIONS = 8
"""For all calls but blocking reads. An agent has one or two in flight; each ends by its time limit."""

WATCH_CONNECTIONS = 2
"""For blocking reads: the one that waits, and one that was just given up."""

LOOK_CONNECTIONS = 8
"""For looks at other endpoints, one each: silent ones must take no connection from a heartbeat."""

SLOW_SHARE = 0.5
"""A call that has used this share of its time limit is slow: the other endpoints are looked at."""

PAGE = 100
"""Groups asked for at once, the documented default."""

EXAMPLE = "http://127.0.0.1:8080/api/v1/clientfailover"

WHOLE = "the answer"
QUESTION = " (is this the address of a client failover service?)"

MOST_PAGES = 1000
"""A listing ends here whatever Total-Count says: 100,000 groups are more than a coordinator serves."""


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
        """Nothing is asked yet.

        Args:
            endpoints: base paths up to clientfailover, http or https, of one coordinator or one
                cluster; the first one is asked first.
            auth: httpx2.BasicAuth, ClientCredentials, or None.
            verify: how servers prove who they are; False for not at all.
            keepalive_s: for how long an idle connection is kept: longer than the beat, shorter than
                the server's own limit.
            transport: stands in for the network, in tests.

        Raises:
            ConfigError: there is no endpoint, or one has not the right form.
        """
        if not endpoints:
            raise ConfigError(f"no endpoint is given: name at least one, such as {EXAMPLE}")
        self._endpoints = tuple(dict.fromkeys(_checked(endpoint) for endpoint in endpoints))
        self._current = 0
        self._in_trouble = False
        self._looks: dict[int, asyncio.Task[None]] = {}
        self._faults: dict[int, str] = {}
        self._refused: dict[int, str | None] = {}
        self.store_id: str | None = None
        """The store that answers have to be from, as far as it is known. The caller sets it."""
        self.date: datetime | None = None
        """The Date of the newest answer, by the server's clock; None if it had none."""
        self._auth = auth
        context = httpx2.create_ssl_context(verify=verify, trust_env=False)
        self._names = Names()
        self._calls, self._watches, self._looking = (
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
                (WATCH_CONNECTIONS, keepalive_s),
                (LOOK_CONNECTIONS, 0.0),
            )
        )

    @property
    def endpoint(self) -> str:
        """The base path that the next call goes to."""
        return self._endpoints[self._current]

    @property
    def endpoints(self) -> tuple[str, ...]:
        """All base paths, in their order."""
        return self._endpoints

    @property
    def faults_of_others(self) -> str | None:
        """Why the other endpoints cannot be used, as far as that was looked at; None for nothing."""
        faults = (fault for index, fault in self._faults.items() if index != self._current)
        return "; ".join(faults) or None

    def refuse(self, endpoint: str, store_id: str | None) -> ServerError:
        """Take no answer of an endpoint, since it is of another store; ask the next one from now on.

        Args:
            endpoint: the one that answered.
            store_id: what its answer said.

        Returns:
            The error to raise or to report.
        """
        index = self._endpoints.index(endpoint)
        error = self._refusal(index, store_id)
        self._pass_over(index)
        return error

    def ask_next(self, asked: str, error: ServerError) -> bool:
        """For a caller that does not come again: whether another endpoint may do better than ``asked``.

        The next call goes to it then. An agent needs no such call, since it asks again and again.
        """
        if _may_be_better_elsewhere(error):
            self._pass_over(self._endpoints.index(asked))
        return self.endpoint != asked

    async def aclose(self) -> None:
        """Close every connection, and ClientCredentials with them. May be called twice."""
        for look in self._looks.values():
            look.cancel()
        if self._looks:
            await asyncio.wait(self._looks.values())
        await self._calls.aclose()
        await self._watches.aclose()
        await self._looking.aclose()
        if isinstance(self._auth, ClientCredentials):
            await self._auth.aclose()

    # --- what an agent asks -----------------------------------------------------------------------

    async def ensure_group(self, config: GroupConfig, *, timeout_s: float) -> GroupConfig:
        """The group as the server has it: made from ``config`` if it was missing.

        A group that is there already with another configuration is taken as it is, with its timeout
        (part B 1). ``timeout_s`` bounds both requests together.

        Raises:
            ServerError: as the class says.
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
        return await self._ask(
            "POST",
            f"groups/{_segment(group)}/clientsessions",
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
        return await self._ask(
            "POST",
            f"{_session(group, session)}/heartbeat",
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
        # It says nothing of the endpoint: a proxy may cut long reads, and others than the leader
        # may answer them. Heartbeats find out.
        answer = await send(
            self._watches,
            "GET",
            self._url(self._current, f"groups/{_segment(group)}/status"),
            what=f"status of group {group}",
            timeout_s=timeout_s if after is None else wait_s + timeout_s,
            params=params,
        )
        return _read(answer, lambda answer: _decode(api.GroupStatus, answer).to_model())

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
        """Tell that the session has demoted, so that the next one is promoted now (part C, R5).

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
                just runs out there.
        """
        await self._ask(
            "POST",
            f"{_session(group, session)}/release",
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
            read=_done,
        )

    async def leave(self, group: str, session: str, *, timeout_s: float) -> None:
        """Delete the session. It is a success too if it or its group is gone already.

        Raises:
            ServerError: as the class says.
        """
        try:
            await self._ask(
                "DELETE",
                _session(group, session),
                what=f"session {session} leaving group {group}",
                timeout_s=timeout_s,
                read=_done,
            )
        except ServerError as error:
            if error.status != httpx2.codes.NOT_FOUND:
                raise

    # --- what the command line asks ---------------------------------------------------------------

    async def version(self, *, timeout_s: float) -> str:
        """The version that the server states at its base path."""
        return await self._ask(
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
            total, groups = await self._ask(
                "GET",
                "groups",
                what="groups",
                timeout_s=timeout_s,
                params={"skip": str(page * PAGE), "count": str(PAGE)},
                read=lambda answer: (_total(answer), _decode_groups(answer)),
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
        return await self._ask(
            "GET",
            f"groups/{_segment(group)}",
            what=f"group {group}",
            timeout_s=timeout_s,
            read=_decode_group,
        )

    async def create_group(self, config: GroupConfig, *, timeout_s: float) -> GroupConfig:
        """Make a group, or find it there with what ``config`` sets; as the server has it.

        Raises:
            ServerError: ``status`` 409 if it is there with another configuration.
        """
        return await self._ask(
            "POST",
            "groups/",  # with the slash, as v1 clients do
            what=f"creating group {config.id}",
            timeout_s=timeout_s,
            body=encode(api.GroupRequest.from_model(config)),
            look=f"groups/{_segment(config.id)}/status",
            read=_decode_group,
        )

    async def delete_group(self, group: str, *, timeout_s: float) -> None:
        """Remove a group.

        Raises:
            ServerError: ``status`` 404 if there is none; 409 if it has active sessions.
        """
        await self._ask(
            "DELETE",
            f"groups/{_segment(group)}",
            what=f"deleting group {group}",
            timeout_s=timeout_s,
            read=_done,
        )

    async def sessions(self, group: str, *, timeout_s: float) -> list[SessionView]:
        """The members of a group.

        Raises:
            ServerError: ``status`` 404 if there is no such group.
        """
        return await self._ask(
            "GET",
            f"groups/{_segment(group)}/clientsessions",
            what=f"sessions of group {group}",
            timeout_s=timeout_s,
            read=lambda answer: [s.to_model() for s in _decode_many(api.ClientSession, answer)],
        )

    async def history(
        self, group: str, *, skip: int = 0, count: int = PAGE, timeout_s: float
    ) -> list[HistoryEntry]:
        """Up to ``count`` tenures of a group after ``skip`` of them, newest first (part C).

        Raises:
            ServerError: ``status`` 404 if there is no such group; a plain v1 server has no history.
        """
        return await self._ask(
            "GET",
            f"groups/{_segment(group)}/history",
            what=f"history of group {group}",
            timeout_s=timeout_s,
            params={"skip": str(skip), "count": str(count)},
            read=lambda answer: [t.to_model() for t in _decode_many(api.HistoryEntry, answer)],
        )

    # --- how it is asked --------------------------------------------------------------------------

    async def _ask(
        self,
        method: str,
        path: str,
        *,
        what: str,
        timeout_s: float,
        read: Callable[[Answer], T],
        body: bytes | None = None,
        params: Mapping[str, str] | None = None,
        look: str | None = None,
    ) -> T:
        look = _harmless(path) if look is None else look
        asked = self._current
        slow = asyncio.get_running_loop().call_later(
            SLOW_SHARE * timeout_s, self._trouble_at, asked, look, timeout_s
        )
        try:
            answer = await send(
                self._calls,
                method,
                self._url(asked, path),
                what=what,
                timeout_s=timeout_s,
                params=params,
                content=body,
            )
            self.date = answer.date
            value = _read(answer, read)
        except ServerError as error:
            if _may_be_better_elsewhere(error):
                self._trouble_at(asked, look, timeout_s)
            raise
        finally:
            slow.cancel()
        if asked == self._current:
            self._stay()
        return value

    def _url(self, index: int, path: str) -> str:
        return f"{self._endpoints[index]}/{path}" if path else self._endpoints[index]

    # --- which endpoint is asked ------------------------------------------------------------------

    def _pass_over(self, index: int) -> None:
        if index == self._current:
            self._in_trouble = False
            self._current = (index + 1) % len(self._endpoints)

    def _stay(self) -> None:
        """The current endpoint works: what was found meanwhile is not needed."""
        self._in_trouble = False
        self._faults.clear()
        for look in self._looks.values():
            look.cancel()

    def _trouble_at(self, asked: int, look: str, timeout_s: float) -> None:
        """The endpoint has failed or is slow: look at the others beside it."""
        if asked != self._current:
            return  # calls that overlap fail together: only the first of them moves on
        self._in_trouble = True
        for index in range(len(self._endpoints)):
            running = self._looks.get(index)
            if index != asked and (running is None or running.done()):
                self._looks[index] = asyncio.create_task(
                    self._look_at(index, look, timeout_s), name="look at endpoint"
                )

    async def _look_at(self, index: int, path: str, timeout_s: float) -> None:
        """Whether another endpoint answers, by a read that changes nothing."""
        try:
            answer = await send(
                self._looking,
                "GET",
                self._url(index, path),
                what="looking for an endpoint that answers",
                timeout_s=timeout_s,
            )
            store_id = _read(answer, _store_id) if path else _read(answer, _no_store_id)
        except ServerError as error:
            if _may_be_better_elsewhere(error) or error.exit_code is ExitCode.NOT_AUTHORISED:
                self._faults[index] = str(error)
                return
            store_id = None  # a refusal of the API: it answers
        if None not in (self.store_id, store_id) and store_id != self.store_id:
            self._refusal(index, store_id)
            return
        self._faults.pop(index, None)
        if self._in_trouble:
            self._in_trouble = False
            self._current = index

    def _refusal(self, index: int, store_id: str | None) -> ServerError:
        """The error that an endpoint is of another store; logged once for each change."""
        endpoint, right = self._endpoints[index], "list endpoints of one coordinator or one cluster"
        said = "no store" if store_id is None else f"store {quoted(store_id)}"
        message = f"{endpoint} answers from {said}, expected store {self.store_id}; {right}"
        if self._refused.get(index, "") != store_id:
            self._refused[index] = store_id
            log.error(
                "coordinator of another store refused",
                endpoint=endpoint,
                store=store_id,
                expected=self.store_id,
                resolution=f"{right}; docs/operations.md says what to do if its data was replaced",
            )
        self._faults[index] = message
        return ServerError(message, exit_code=ExitCode.OTHER_STORE)


def _read(answer: Answer, read: Callable[[Answer], T]) -> T:
    answer.check()
    try:
        return read(answer)
    except BodyError as error:
        raise answer.unreadable(str(error)) from None


def _decode(shape: type[S], answer: Answer) -> S:
    try:
        value = decode(shape, answer.body, WHOLE)
    except BodyError as error:
        raise BodyError(f"{error}{QUESTION}") from None
    if has_none_of(value, answer.body):
        raise BodyError(f"none of the properties of {shape.__name__}")
    return value


def _decode_many(shape: type[S], answer: Answer) -> list[S]:
    try:
        return decode_many(shape, answer.body, WHOLE)
    except BodyError as error:
        raise BodyError(f"{error}{QUESTION}") from None


def _decode_group(answer: Answer) -> GroupConfig:
    group = _decode(api.GroupConfiguration, answer).to_model()
    if not group.id:
        raise BodyError("a group without an Id")
    return group


def _decode_groups(answer: Answer) -> list[GroupConfig]:
    """Those without an id left out."""
    groups = [group.to_model() for group in _decode_many(api.GroupConfiguration, answer)]
    return [group for group in groups if group.id]


def _store_id(answer: Answer) -> str | None:
    return _decode(api.GroupStatus, answer).store_id


def _no_store_id(answer: Answer) -> None:
    _decode(api.Version, answer)


def _harmless(path: str) -> str:
    """The path of a read that shows that an endpoint can serve calls like this one."""
    kind, _, rest = path.partition("/")
    group = rest.partition("/")[0]
    return f"{kind}/{group}/status" if kind == "groups" and group else ""


def _may_be_better_elsewhere(error: ServerError) -> bool:
    """Whether the endpoint has failed, rather than refused what was asked."""
    if error.status is None or error.exit_code is ExitCode.NOT_THE_API:
        return error.exit_code is not ExitCode.NOT_AUTHORISED
    return error.status >= httpx2.codes.INTERNAL_SERVER_ERROR


def _checked(endpoint: str) -> str:
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


def _segment(name: str) -> str:
    """An id as one segment of a path."""
    if name in {"", ".", ".."}:
        raise ConfigError(f"{name!r} is no id of a group or session: it would change the URL")
    return quote(name, safe="")


def _session(group: str, session: str) -> str:
    return f"groups/{_segment(group)}/clientsessions/{_segment(session)}"


def _total(answer: Answer) -> int | None:
    """Total-Count, if it is there."""
    total = answer.headers.get("total-count", "")
    return int(total) if total.isdecimal() and len(total) < 10 else None  # noqa: PLR2004 - digits


def _done(answer: Answer) -> None:
    """An answer that has nothing to tell: empty or JSON, but no page."""
    if answer.body.strip():
        try:
            json.loads(answer.body)
        except (ValueError, RecursionError) as error:
            raise BodyError(str(error)) from None


def _hold_off(seconds: float) -> HoldOffSpan:
    return HoldOffSpan(round(min(seconds, LONGEST_HOLD_OFF_S) * TICKS_PER_SECOND))
