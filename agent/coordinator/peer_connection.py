"""One connection to another coordinator: a small HTTP/1.1 client (R19).

The other coordinators are trusted with the callers' credentials. But nothing that one of them sends, or fails to
send, may stop this coordinator, confuse it or fill its memory:

- a connection carries one request at a time, and the answer has to repeat that request's number;
- a connection is closed after anything unexpected, and when its answer is no longer awaited;
- a request is sent once. If no answer comes, nobody knows whether it was carried out;
- the bytes of one answer, and of all unfinished answers together, are bounded.

The parser is the one that uvicorn uses. A general HTTP client costs 1 ms of CPU for each request, ten times
what the leader needs to answer it. The caller keeps the deadline and calls ``give_up``.
"""

import asyncio
from contextlib import suppress
from dataclasses import dataclass
from socket import SO_LINGER, SOL_SOCKET
from struct import pack
from typing import Protocol, cast

import httptools

from agent.coordinator.calls import FORWARDED
from agent.coordinator.limits import MAX_HEAD_BYTES, MAX_HEADERS
from agent.ops.browsers import is_json

MAX_ANSWER_BYTES = 16 * 1024 * 1024
"""The largest answer, a list of 10,000 sessions with long ids, has about 10 MB."""

MAX_UNFINISHED_BYTES = 64 * 1024 * 1024
"""Maximum size of all answers together that are being received."""

NO_CONTENT = 204


class PeerError(Exception):
    """There is no usable answer. The message completes a sentence that begins with the peer's URL."""


@dataclass(slots=True)
class PeerAnswer:
    """An answer, complete and for this request. ``headers``: with names in lower case."""

    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes


@dataclass(slots=True)
class Budget:
    """Bytes of unfinished answers, of all connections together."""

    used: int = 0


class Owner(Protocol):
    """The owner of a connection: the pool in peers.py."""

    def release(self, connection: "PeerConnection") -> None: ...
    def forget(self, connection: "PeerConnection") -> None: ...


def _drop_unsent(transport: asyncio.Transport) -> None:
    """Have the kernel drop what it has not sent yet when the connection is closed.

    Otherwise a peer that is cut off now would receive the request after the cut, long after it was given up, and carry
    it out.
    """
    sock = transport.get_extra_info("socket")
    if sock is not None:  # else it is closed already
        with suppress(OSError):
            sock.setsockopt(SOL_SOCKET, SO_LINGER, pack("ii", 1, 0))


class PeerConnection(asyncio.Protocol):
    """One connection to a peer, with at most one request on it.

    Args:
        pool: gets the connection back after each answer, and is notified when it ends.
        budget: of unfinished answers.

    Attributes:
        idle_since: when the connection became idle, in seconds of the loop's clock.
    """

    def __init__(self, pool: Owner, budget: Budget) -> None:
        self.idle_since = 0.0
        self.closed = False
        self._pool = pool
        self._budget = budget
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._awaited: asyncio.Future[PeerAnswer] | None = None
        self._number = b""
        self._begin()

    def _begin(self) -> None:
        self._headers: list[tuple[bytes, bytes]] = []
        self._body: list[bytes] = []
        self._unfinished = 0
        self._begun = self._in_body = self._complete = self._reusable = False

    # -- for the pool -------------------------------------------------------------------------

    def send(self, request: bytes, number: bytes) -> asyncio.Future[PeerAnswer]:
        """Send a request; the future is its answer. Call it on an open and idle connection only."""
        assert self._transport is not None  # noqa: S101 - the pool keeps open connections only
        assert self._awaited is None  # noqa: S101 - as above
        self._number = number
        self._awaited = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return self._awaited

    def give_up(self, awaited: asyncio.Future[PeerAnswer]) -> None:
        """Stop awaiting this answer. If it has not arrived, the connection is closed."""
        if self._awaited is awaited:
            self.close()

    def close(self) -> None:
        """Close at once; an awaited answer fails."""
        if not self.closed:
            self._end("closed the connection")

    def _end(self, why: str) -> None:
        """End the connection, and fail the awaited answer with this reason."""
        self.closed = True
        self._budget.used -= self._unfinished
        self._begin()
        del self._parser  # it refers back to this object, and collections of cycles are rare
        awaited, self._awaited = self._awaited, None
        if self._transport is not None:
            if awaited is not None:
                _drop_unsent(self._transport)
            self._transport.abort()
        self._pool.forget(self)
        if awaited is not None and not awaited.done():
            awaited.set_exception(PeerError(why))

    # -- callbacks of the transport -----------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if not self.closed:
            self._end(f"closed the connection before its answer was complete ({exc or 'EOF'})")

    def data_received(self, data: bytes) -> None:
        if self.closed:
            return
        if self._awaited is None:
            self._end("sent data without a request")
            return
        try:
            self._parser.feed_data(data)
            if not self._complete:
                self._count_unfinished(len(data))
        except httptools.HttpParserError as error:
            reason = error.__context__ if isinstance(error.__context__, PeerError) else None
            self._end(str(reason or f"sent an answer that is not HTTP/1.1: {error}"))
        except PeerError as error:
            self._end(str(error))
        else:
            if self._complete:  # a byte after the answer has raised an error
                self._deliver()

    def _count_unfinished(self, received: int) -> None:
        self._unfinished += received
        self._budget.used += received
        if not self._in_body and self._unfinished > MAX_HEAD_BYTES:
            raise PeerError(f"sent an answer whose head has more than {MAX_HEAD_BYTES} bytes")
        if self._unfinished > MAX_ANSWER_BYTES:
            raise PeerError(f"sent an answer of more than {MAX_ANSWER_BYTES} bytes")
        if self._budget.used > MAX_UNFINISHED_BYTES:
            raise PeerError(
                f"sent an answer while {MAX_UNFINISHED_BYTES} bytes of others were unfinished"
            )

    def _deliver(self) -> None:
        awaited, self._awaited = self._awaited, None
        answer = PeerAnswer(self._parser.get_status_code(), self._headers, b"".join(self._body))
        reusable = self._reusable
        self._budget.used -= self._unfinished
        self._begin()
        if awaited is not None and not awaited.done():
            awaited.set_result(answer)
        if reusable:
            self._pool.release(self)
        else:
            self.close()

    # -- callbacks of the parser, which turns their exceptions into an HttpParserError ---------

    def on_message_begin(self) -> None:
        if self._begun:
            raise PeerError("sent two answers to one request")
        self._begun = True

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_body:  # a trailer
            return
        if len(self._headers) >= MAX_HEADERS:
            raise PeerError(f"sent an answer with more than {MAX_HEADERS} headers")
        self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        self._in_body = True
        status = self._parser.get_status_code()
        found = dict(self._headers)
        if not 200 <= status < 600:  # noqa: PLR2004 - the classes of final answers
            raise PeerError(f"answered with the status {status}")
        framed = b"content-length" in found or (
            found.get(b"transfer-encoding", b"").lower() == b"chunked"
        )
        if not framed and status != NO_CONTENT:
            raise PeerError("sent an answer without its length")
        if found.get(FORWARDED) != self._number:
            raise PeerError(f"sent an answer ({status}) that is not for this request")
        if status != NO_CONTENT and not is_json(found.get(b"content-type")):
            raise PeerError(f"sent an answer ({status}) that is not JSON")

    def on_body(self, body: bytes) -> None:
        self._body.append(body)

    def on_message_complete(self) -> None:
        self._complete = True
        self._reusable = self._parser.should_keep_alive()  # the parser knows it only now
