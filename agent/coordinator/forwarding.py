"""Send a request for a group that another coordinator leads to that coordinator (R19).

A forwarded request carries the caller's own credentials, which the leader checks as it checks every
caller's; client certificates are in forwarded_clients.py. The header FORWARDED marks the request: a
coordinator that does not lead the group refuses it instead of forwarding it again, so no request goes in a
circle, and a caller that sets the header gains nothing. If the caller hangs up, its request ends there, too, unless it
has begun (hang_up.py).

If the leader changes while a request waits for its answer, the request is sent to the new leader. That is safe:
every call may be repeated, and the old leader refuses the request, since its leadership is over. The old leader may
have carried it out before: then a DELETE that finds nothing counts as done. In all other
cases a request is sent once: if no answer comes, the caller gets 503 and may repeat it.

Owns the forwarded request, its deadline, and which parts of the answer the caller receives. Connections are in
peers.py.
"""

import asyncio
import itertools
import re
import ssl
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from http import HTTPStatus

from agent import __version__
from agent.coordinator.auth import ClientCertificate
from agent.coordinator.calls import FORWARDED, Answer, Request, header
from agent.coordinator.forwarded_clients import CLIENT, ForwardedClients
from agent.coordinator.hang_up import check_caller
from agent.coordinator.leadership import Leadership
from agent.coordinator.peer_connection import PeerAnswer, PeerError
from agent.coordinator.peers import Exchange, Peers, Place
from agent.coordinator.service import LONGEST_WAIT_S
from agent.errors import (
    NOT_LEADING_RETRY_S,
    Invalid,
    NotFound,
    NotLeading,
    RequestRefused,
    Unavailable,
)
from agent.model import GroupKey
from agent.ops.logs import Log

REQUEST_S = 10.0
"""How long a leader may take to answer, in addition to the wait of a blocking read: the longest request
timeout that an agent can have."""

LEADERS_TRIED = 3
"""How many leaders one request is sent to, one after another, while leadership moves."""

SWEEP_S = 1.0
"""Interval of the check of all deadlines; a timer for each request would cost more."""

CALLS_SHARE = 0.25
BLOCKING_READS_SHARE = 0.65
"""Shares of the connections that a leader accepts from one address: for blocking reads, and for all other
requests. The rest is left for other clients at that address. While etcd hangs, each request that has to be
stored occupies a connection, and heartbeats that only renew must still find free ones."""

log = Log(__name__)

_NOT_LEADING = f'"Error":"{NotLeading.__name__}"'.encode()

_TARGET = re.compile(rb"/[!-~]*")
_VALUE = re.compile(rb"[\t -~\x80-\xff]*")
"""Bytes that may be forwarded as path and query, and as a header's value: none of them ends the line."""

_REQUEST_HEADERS = (b"authorization", b"content-type")
_REPLY_HEADERS = frozenset({b"retry-after", b"retry-after-ms", b"total-count", b"www-authenticate"})
_WITH_BODY = frozenset({"POST", "PUT"})


class LeaderMoved(NotLeading):
    """Another coordinator leads, and the former one, which got the request, may have carried it out."""


@dataclass(eq=False, slots=True)
class _Pending:
    """A request that waits for its answer."""

    key: GroupKey
    url: str
    until: float
    exchange: Exchange


class Forwarder:
    """Finds the leader of a group and sends requests to it. ``start`` it first, ``aclose`` it last.

    Args:
        leadership: knows the leaders.
        tls: verifies leaders whose URL is https.
        encrypted: whether requests may be sent to https URLs only.
        connections_per_address: how many connections a leader accepts from this coordinator.
        clients: vouches for clients known by certificate; None: they are not accepted.
    """

    def __init__(
        self,
        leadership: Leadership,
        tls: ssl.SSLContext,
        *,
        encrypted: bool,
        connections_per_address: int,
        clients: ForwardedClients | None = None,
    ) -> None:
        self._leadership = leadership
        self._clients = clients
        self._peers = Peers(
            tls,
            encrypted=encrypted,
            calls=max(1, int(connections_per_address * CALLS_SHARE)),
            blocking_reads=max(1, int(connections_per_address * BLOCKING_READS_SHARE)),
        )
        self._pending: set[_Pending] = set()
        self._run_id = uuid.uuid4().hex
        self._numbers = itertools.count(1)
        self._stopped = False
        self._watching: asyncio.Task[None] | None = None
        self.forwarded = 0
        self.failed = 0

    # -- start and stop -----------------------------------------------------------------------

    def start(self) -> None:
        """Start the task that watches deadlines and leaders."""
        self._watching = asyncio.create_task(self._watch(), name="watch forwarded requests")

    def stop(self) -> None:
        """End the requests that wait for an answer, and refuse further ones."""
        self._stopped = True
        for pending in self._pending:
            pending.exchange.fail(_stopping())

    async def aclose(self) -> None:
        """Close every connection."""
        self.stop()
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.wait([self._watching])
        await self._peers.aclose()

    async def _watch(self) -> None:
        """End each request whose leader has changed, or whose time is over."""
        leaders: dict[int, str] = {}
        while True:
            await self._leadership.wait_for_change(SWEEP_S)
            before, leaders = leaders, self._leaders()
            try:
                self._end_overdue(moved=leaders != before)
                self._peers.sweep()
            except Exception:  # a task's edge: without it no request would have a deadline
                log.exception("watching forwarded requests failed")

    def _end_overdue(self, *, moved: bool) -> None:
        now = asyncio.get_running_loop().time()
        for pending in self._pending:
            leader = self._leadership.leader_of(pending.key) if moved else None
            if leader is not None and leader.url != pending.url:
                pending.exchange.fail(LeaderMoved())
            elif pending.until <= now:
                pending.exchange.fail(PeerError(f"did not answer within {REQUEST_S:g} s"))

    def _leaders(self) -> dict[int, str]:
        return {number: leader.url for number, leader in self._leadership.view.leaders.items()}

    # -- requests -----------------------------------------------------------------------------

    def client_of(self, request: Request) -> ClientCertificate | None:
        """The client that another coordinator vouches for; None if it vouches for nobody.

        Raises what ForwardedClients.read raises.
        """
        if self._clients is None:
            return None
        return self._clients.read(request, self._leadership.member)

    def accept_once(self, request: Request) -> None:
        """Accept a forwarded request once, with its body. Raises what ForwardedClients.accept_once raises."""
        if self._clients is not None:
            self._clients.accept_once(request)

    async def answer(
        self,
        key: GroupKey,
        request: Request,
        answer_here: Callable[[], Awaitable[Answer]],
        *,
        wait_s: float,
        forwarded: bool,
    ) -> Answer:
        """The answer of a group's leader: by ``answer_here``, or by ``forward``. Raises what they raise, and HungUp.

        ``forwarded``: another coordinator has sent the request here, so it is not sent on.
        """
        repeated = False
        for _ in range(LEADERS_TRIED):
            url = await self._leadership.leader_url(key)
            check_caller()
            if url is not None and forwarded:
                break
            may_be_deleted = repeated and request.method == "DELETE"
            try:
                if url is None:
                    return await answer_here()
                answer = await self.forward(key, url, request, wait_s=wait_s)
                if not may_be_deleted or answer.status != HTTPStatus.NOT_FOUND:
                    return answer
            except NotLeading as moved:
                repeated |= isinstance(moved, LeaderMoved)
                continue
            except NotFound:
                if not may_be_deleted:
                    raise
            return Answer(HTTPStatus.NO_CONTENT)
        raise NotLeading

    async def forward(
        self,
        key: GroupKey,
        url: str,
        request: Request,
        *,
        wait_s: float,
    ) -> Answer:
        """Send a request to the leader of its group, and return the leader's answer.

        Args:
            key: the group.
            url: of its leader.
            request: as it was received.
            wait_s: how long a blocking read may wait.

        Raises:
            Invalid: the request cannot be forwarded.
            NotLeading: another coordinator has become the leader; LeaderMoved if the former one may have
                carried the request out.
            Unavailable: the leader gives no usable answer, or this coordinator is stopping.
        """
        if self._stopped:
            raise _stopping()
        self.forwarded += 1
        try:
            answer = await self._exchange(key, url, request, wait_s)
        except PeerError as error:
            self.failed += 1
            raise Unavailable(
                f"The coordinator at {url}, which leads the group, {error}.",
                "Try again after Retry-After: another one leads when its time is over.",
                retry_after_s=NOT_LEADING_RETRY_S,
            ) from None
        if answer.status == HTTPStatus.SERVICE_UNAVAILABLE and _NOT_LEADING in answer.body:
            await self._leadership.wait_for_change(NOT_LEADING_RETRY_S)
            raise NotLeading
        return _build_answer(answer)

    async def _exchange(
        self, key: GroupKey, url: str, request: Request, wait_s: float
    ) -> PeerAnswer:
        if request.method == "HEAD":  # the parser would wait for a body; it is dropped later
            request = replace(request, method="GET")
        place, calls, blocking_reads = self._peers.to(url)
        number = f"{self._run_id}-{next(self._numbers):x}".encode()
        written = _format_request(place, number, request, self._vouch(key, request, number))
        exchange = Exchange(blocking_reads if wait_s > 0 else calls, written, number)
        until = asyncio.get_running_loop().time() + min(wait_s, LONGEST_WAIT_S) + REQUEST_S
        pending = _Pending(key, url, until, exchange)
        self._pending.add(pending)
        try:
            return await exchange.run()
        finally:
            self._pending.discard(pending)

    def _vouch(self, key: GroupKey, request: Request, number: bytes) -> bytes | None:
        """The header CLIENT if the caller is known by its certificate; else None."""
        certificate = request.certificate
        if certificate is None or self._clients is None:
            return None
        if header(request.headers, b"authorization") is not None:  # it takes precedence
            return None
        leader = self._leadership.leader_of(key)
        if leader is None:
            raise NotLeading
        return self._clients.sign(certificate, request, number, leader.member)


def _format_request(place: Place, number: bytes, request: Request, client: bytes | None) -> bytes:
    """The bytes of a forwarded request. All that the caller sent, except the body, is checked first."""
    if not _TARGET.fullmatch(request.target):
        raise Invalid("The path has bytes that are not printable ASCII.", "Percent-encode them.")
    method = request.method
    lines = [
        b"%b %b HTTP/1.1" % (method.encode(), request.target),
        b"Host: " + place.netloc,
        _USER_AGENT,
        b"%b: %b" % (FORWARDED, number),
    ]
    for wanted in _REQUEST_HEADERS:
        value = header(request.headers, wanted)
        if value is not None and _VALUE.fullmatch(value):
            lines.append(b"%b: %b" % (wanted, value))
    if client is not None:
        lines.append(b"%b: %b" % (CLIENT, client))
    if method in _WITH_BODY or request.body:
        lines.append(b"Content-Length: %d" % len(request.body))
    return b"\r\n".join((*lines, b"", request.body))


_USER_AGENT = f"User-Agent: failover-agent/{__version__}".encode()


def _build_answer(answer: PeerAnswer) -> Answer:
    operation_id = None
    kept = []
    for name, value in answer.headers:
        if name in _REPLY_HEADERS:
            kept.append((name, value))
        elif name == b"operation-id" and value.isascii():
            operation_id = value.decode()
    return Answer(answer.status, answer.body, tuple(kept), operation_id=operation_id)


def _stopping() -> RequestRefused:
    return Unavailable(
        "The coordinator is stopping.", "Ask another endpoint, or this one after Retry-After."
    )
