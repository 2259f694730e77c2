"""The group API over HTTP: each operation as a coroutine with values of model.py.

Knows nothing of what an answer means for a role, and retries nothing: that is up to the caller. Which
endpoint is asked is decided in endpoints.py.
"""

import asyncio
import json
from datetime import datetime
from urllib.parse import quote

import httpx2
from msgspec.structs import replace

from agent.drivers.rest.endpoints import (
    Endpoints,
    decode_answer,
    decode_many,
    decode_one,
)
from agent.drivers.rest.exchange import Answer, send
from agent.errors import ConfigError, ServerError
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
from agent.schema import api, failsafe_api
from agent.schema.codec import BodyError, encode
from agent.schema.scalars import format_time_span
from agent.schema.values import HoldOffSpan

PAGE = 100
"""Page size of lists, the documented default."""

MOST_PAGES = 1000
"""The most pages that are read, whatever Total-Count is: a coordinator serves fewer than 100,000 groups."""


class RestClient(Endpoints):
    """The operations of the group API. Close it with ``aclose``."""

    # --- requests of an agent -----------------------------------------------------------------------

    async def ensure_group(self, config: GroupConfig, *, timeout_s: float) -> GroupConfig:
        """Create the group from ``config`` if it is missing; return the server's version of it.

        An existing group with another configuration is used as it is, with its timeout, as v1 clients do
        (docs/api.md). ``timeout_s`` bounds both requests together.
        """
        end_at = asyncio.get_running_loop().time() + timeout_s
        try:
            return await self.create_group(config, timeout_s=timeout_s)
        except ServerError as error:
            if error.status != httpx2.codes.CONFLICT:
                raise
        rest_s = end_at - asyncio.get_running_loop().time()
        return await self.group(config.id, timeout_s=rest_s)

    async def join(
        self,
        group: str,
        session: SessionConfig,
        *,
        timeout_s: float,
        instance: str | None = None,
        failsafe_url: str | None = None,
    ) -> str | None:
        """Register the session. One that is registered with the same configuration counts as success.

        Args:
            group: its id.
            session: its configuration.
            timeout_s: seconds.
            instance: this process; None unless the server is known to have extensions.
            failsafe_url: URL of this process's failsafe listener; None under the same condition.

        Returns:
            The id of the store that it is registered in. None means a plain v1 server, which may
            refuse any extension: send it no instance, no epoch, no blocking read and no release.

        Raises:
            ServerError: ``status`` 404 if the group is gone; 409 if a session with this id has another
                configuration.
        """
        request = api.SessionRequest.from_model(session)
        return await self._request(
            "POST",
            f"groups/{_quote_segment(group)}/clientsessions",
            what=f"joining group {group} as session {session.id}",
            timeout_s=timeout_s,
            body=encode(replace(request, instance=instance, failsafe_url=failsafe_url)),
            read=lambda answer: decode_one(api.ClientSession, answer).store_id,
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
        failsafe_url: str | None = None,
        holds: int | None = None,
        failsafe_revision: int | None = None,
        promised: bool = False,
    ) -> HeartbeatAnswer:
        """Send a heartbeat; return its answer.

        Args:
            group: its id.
            session: its id.
            score: FailoverScore, 0 to 100.
            last_data: when data was last processed, or None for never.
            instance: this process; None at a plain v1 server.
            seen_epoch: the newest epoch seen; None at a plain v1 server.
            timeout_s: seconds, under R / 2 (R1).
            failsafe_url: this process's failsafe listener, or None without failsafe.
            holds: the epoch that this process holds, or None.
            failsafe_revision: the revision of the set of members that it uses, or None.
            promised: whether a promise to another member binds this process.

        Raises:
            ServerError: ``status`` 404 if the group or the session is gone; 429 if the heartbeat is too soon.
        """
        return await self._request(
            "POST",
            f"{_session_path(group, session)}/heartbeat",
            what=f"heartbeat of session {session} in group {group}",
            timeout_s=timeout_s,
            body=encode(
                api.HeartbeatRequest(
                    score=score,
                    last_data=last_data,
                    instance=instance,
                    epoch=seen_epoch,
                    failsafe_url=failsafe_url,
                    holds=holds,
                    failsafe_revision=failsafe_revision,
                    promised=promised or None,
                )
            ),
            read=lambda answer: decode_one(api.HeartbeatResponse, answer).to_model(),
        )

    async def status(
        self, group: str, *, after: int | None = None, wait_s: float = 0.0, timeout_s: float
    ) -> GroupStatus:
        """The status of the group; with ``after``, once its revision has passed that.

        Args:
            group: its id.
            after: the newest revision seen, or None to be answered at once.
            wait_s: how long the server may delay the answer, if ``after`` is given. A plain v1 server
                always answers at once: poll it.
            timeout_s: for everything except that wait.

        Raises:
            ServerError: ``status`` 404 if the group is gone.
        """
        params = None
        if after is not None:
            wait = format_time_span(round(wait_s * TICKS_PER_SECOND))
            params = {"after": str(after), "wait": wait}
        # A failure here is no reason to change the endpoint: a proxy may cut long reads, and coordinators other
        # than the leader answer them, too. Heartbeats show whether an endpoint has failed.
        with self._connections.borrowed() as connections:
            answer = await send(
                connections.blocking_read,
                "GET",
                self._url(self._current, status_path(group)),
                what=f"status of group {group}",
                timeout_s=timeout_s if after is None else wait_s + timeout_s,
                params=params,
            )
        return decode_answer(answer, lambda answer: decode_one(api.GroupStatus, answer).to_model())

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
        held: bool = True,
        timeout_s: float,
    ) -> None:
        """Release a tenure after demotion, so that the next session can be promoted at once (R5).

        Args:
            group: its id.
            session: its id.
            epoch: of the tenure that has ended.
            instance: the process that held it; the server ignores a release of another process.
            reason: for the history.
            hold_off_s: seconds in which this session is not to be chosen again, or None.
            last_data: when data was last processed, or None for never.
            held: False if this process has refused the tenure.
            timeout_s: seconds.

        Raises:
            ServerError: ``status`` 404 or NOT_THE_API by a plain v1 server, which has no releases: there the
                lease has to expire.
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
                    last_data=last_data,
                    held=None if held else False,
                )
            ),
            read=_check_no_content,
        )

    async def lift_failsafe(self, group: str, *, epoch: int, reason: str, timeout_s: float) -> None:
        """Declare that no member of a group is active by failsafe (R34).

        Args:
            group: its id.
            epoch: the newest epoch of the group.
            reason: for the history.
            timeout_s: seconds.

        Raises:
            ServerError: ``status`` 409 if somebody is primary, or the epoch is not the newest; 404 without
                the group.
        """
        await self._request(
            "POST",
            f"groups/{_quote_segment(group)}/failsafe/lift",
            what=f"lifting failsafe of group {group}",
            timeout_s=timeout_s,
            body=encode(
                failsafe_api.LiftRequest(epoch=epoch, reason=reason, nobody_is_active=True)
            ),
            read=_check_no_content,
        )

    async def leave(self, group: str, session: str, *, timeout_s: float) -> None:
        """Delete the session. A session or group that is gone already counts as success, too."""
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
            read=lambda answer: decode_one(api.Version, answer).version,
        )

    async def groups(self, *, timeout_s: float) -> list[GroupConfig]:
        """Every group that the caller may see, page by page; ``timeout_s`` is for each page.

        A group that is created or deleted meanwhile may be missing; none appears twice.
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
        """Create a group, or find one with the same configuration; return the server's version of it.

        Raises:
            ServerError: ``status`` 409 if the group exists with another configuration.
        """
        return await self._request(
            "POST",
            "groups/",  # with the slash, as v1 clients do
            what=f"creating group {config.id}",
            timeout_s=timeout_s,
            body=encode(api.GroupRequest.from_model(config)),
            probe_path=status_path(config.id),
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
            read=lambda answer: [s.to_model() for s in decode_many(api.ClientSession, answer)],
        )

    async def forget_session(self, group: str, session: str, *, timeout_s: float) -> None:
        """Remove a member if it is inactive. A plain v1 server ignores that condition.

        Raises:
            ServerError: ``status`` 404 if there is none; 409 if it is active.
        """
        await self._request(
            "DELETE",
            _session_path(group, session),
            what=f"forgetting session {session} of group {group}",
            timeout_s=timeout_s,
            params={"inactive": "true"},
            read=_check_no_content,
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
            read=lambda answer: [t.to_model() for t in decode_many(api.HistoryEntry, answer)],
        )


def _decode_group(answer: Answer) -> GroupConfig:
    group = decode_one(api.GroupConfiguration, answer).to_model()
    if not group.id:
        raise BodyError("a group without an Id")
    return group


def _decode_groups(answer: Answer) -> list[GroupConfig]:
    """Decode a list of groups, without those that have no id."""
    return [g.to_model() for g in decode_many(api.GroupConfiguration, answer) if g.id]


def _quote_segment(name: str) -> str:
    """Quote an id, so that it is one segment of a path."""
    if name in {"", ".", ".."}:
        raise ConfigError(f"{name!r} is no id of a group or session: it would change the URL")
    return quote(name, safe="")


def status_path(group: str) -> str:
    """The path of a group's status, below the base path: a read that changes nothing."""
    return f"groups/{_quote_segment(group)}/status"


def _session_path(group: str, session: str) -> str:
    return f"groups/{_quote_segment(group)}/clientsessions/{_quote_segment(session)}"


def _total_count(answer: Answer) -> int | None:
    """The header Total-Count, or None."""
    total = answer.headers.get("total-count", "")
    return int(total) if total.isdecimal() and len(total) < 10 else None  # noqa: PLR2004 - digits


def _check_no_content(answer: Answer) -> None:
    """Check an answer that needs no content: it is empty or JSON, but not an HTML page."""
    if answer.body.strip():
        try:
            json.loads(answer.body)
        except (ValueError, RecursionError) as error:
            raise BodyError(str(error)) from None


def _hold_off(seconds: float) -> HoldOffSpan:
    return HoldOffSpan(round(min(seconds, LONGEST_HOLD_OFF_S) * TICKS_PER_SECOND))
