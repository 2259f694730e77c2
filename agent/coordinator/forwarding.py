"""Requests for groups that another coordinator leads: sent there, once (R19).

A forwarded request carries the caller's own credentials, which the leader checks like any other's. The header
FORWARDED marks it: who receives one for a group that it does not lead refuses it, so no request goes in a circle, and
a caller who sets the header gains nothing.

If the leader changes while it has a request, the request is sent to the new one. That is safe: every
call may be repeated, and one that the old leader still has is refused there, since its leadership is over.
"""

import asyncio
import ssl
from collections.abc import Coroutine
from typing import Any

import httpx2

from agent import __version__
from agent.coordinator.calls import FORWARDED, Answer, Request
from agent.coordinator.leadership import Leadership
from agent.errors import NOT_LEADING_RETRY_S, NotLeading, Unavailable
from agent.model import GroupKey

REQUEST_S = 10.0
"""The longest that a leader may take for an answer, beside the wait of a blocking read: the longest request
timeout of an agent."""

KEEPALIVE_S = 45.0
"""Idle timeout of a connection: shorter than that of a coordinator (75 s)."""

CONNECTIONS = 128
"""For all requests but blocking reads, to all leaders together."""

_NOT_LEADING = f'"Error":"{NotLeading.__name__}"'.encode()

_ASKED = (b"authorization", b"content-type", b"accept")
_ANSWERED = ("retry-after", "retry-after-ms", "total-count", "www-authenticate")


class Forwarder:
    """Finds the leader of a group and sends requests to it. Close it with ``aclose``."""

    def __init__(self, leadership: Leadership, tls: ssl.SSLContext | None = None) -> None:
        self._leadership = leadership
        self._calls = self._open(tls, CONNECTIONS)
        self._blocking_reads = self._open(tls, None)
        self._stopped = asyncio.Event()
        self.forwarded = 0
        self.failed = 0

    @staticmethod
    def _open(tls: ssl.SSLContext | None, connections: int | None) -> httpx2.AsyncClient:
        return httpx2.AsyncClient(
            verify=tls or False,  # without a context all coordinators are plain http
            trust_env=False,
            follow_redirects=False,
            limits=httpx2.Limits(
                max_connections=connections,
                max_keepalive_connections=CONNECTIONS,
                keepalive_expiry=KEEPALIVE_S,
            ),
        )

    async def leader_url(self, key: GroupKey, *, forwarded: bool) -> str | None:
        """The leader of a group, or None if that is this coordinator.

        Raises NotLeading if there is none, or another one for a request that was forwarded already.
        """
        url = await self._leadership.place(key)
        if url is not None and forwarded:
            raise NotLeading
        return url

    async def forward(
        self,
        key: GroupKey,
        url: str,
        request: Request,
        *,
        wait_s: float,
    ) -> Answer:
        """The leader's answer.

        Args:
            key: the group.
            url: of its leader.
            request: as it came.
            wait_s: how long a blocking read may wait.

        Raises:
            NotLeading: another one leads by now.
            Unavailable: the leader cannot be reached, or this coordinator stops.
        """
        passed = {
            name.decode(): value.decode("latin-1")
            for name, value in request.headers
            if name in _ASKED
        }
        passed[FORWARDED.decode()] = self._leadership.member
        passed["User-Agent"] = f"failover-agent/{__version__}"
        client = self._blocking_reads if wait_s > 0 else self._calls
        sending = client.request(
            request.method,
            url + request.target.decode("ascii"),
            headers=passed,
            content=request.body,
            timeout=httpx2.Timeout(wait_s + REQUEST_S),
        )
        self.forwarded += 1
        try:
            answer = await self._unless_moved(key, url, sending)
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            self.failed += 1
            raise Unavailable(
                f"The leader of the group at {url} cannot be reached: {error!r}.",
                "Try again after Retry-After: another one leads when its time is over.",
                retry_after_s=NOT_LEADING_RETRY_S,
            ) from None
        if (
            answer.status_code == httpx2.codes.SERVICE_UNAVAILABLE
            and _NOT_LEADING in answer.content
        ):
            await self._leadership.wait_for_change(NOT_LEADING_RETRY_S)
            raise NotLeading
        kept = tuple(
            (name.encode(), answer.headers[name].encode("latin-1"))
            for name in _ANSWERED
            if name in answer.headers
        )
        return Answer(
            answer.status_code,
            answer.content,
            kept,
            answer.headers.get("content-type", "application/json"),
            operation_id=answer.headers.get("operation-id"),
        )

    async def _unless_moved(
        self, key: GroupKey, url: str, sending: Coroutine[Any, Any, httpx2.Response]
    ) -> httpx2.Response:
        request = asyncio.ensure_future(sending)
        moved = asyncio.ensure_future(self._leadership.wait_until_moved(key, url))
        stopped = asyncio.ensure_future(self._stopped.wait())
        try:
            await asyncio.wait([request, moved, stopped], return_when=asyncio.FIRST_COMPLETED)
            if request.done():
                return request.result()
            if stopped.done():
                raise Unavailable(
                    "The coordinator is stopping.",
                    "Ask another endpoint, or this one after Retry-After.",
                )
            raise NotLeading
        finally:
            for task in (request, moved, stopped):
                task.cancel()

    def stop(self) -> None:
        """End the requests that wait for an answer."""
        self._stopped.set()

    async def aclose(self) -> None:
        """Close every connection."""
        self.stop()
        await self._calls.aclose()
        await self._blocking_reads.aclose()
