"""One connection of an HTTP/1.1 server: requests within limits, answered one after another.

Owns when a request is complete, what is refused before anybody sees it, and how an answer is sent; httptools
parses. Knows no path, no body and no setting.
"""

import asyncio
import json
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from http import HTTPStatus
from types import MappingProxyType
from typing import TypeAlias
from urllib.parse import unquote

import httptools

from agent.ops.logs import Log

READ_BYTES = 16 * 1024
"""Bytes that are received at a time."""

NOT_HTTP = "This is not a valid request of HTTP/1.1."

Headers: TypeAlias = list[tuple[bytes, bytes]]

log = Log(__name__)


@dataclass(frozen=True, slots=True)
class Limits:
    """The bounds of a server.

    Attributes:
        connections: at once; TLS handshakes count. A new one above the bound ends the oldest one, so that clients
            which only hold connections keep nobody else out.
        request_s: how long a connection may take for its TLS handshake, and then for each request with its
            answer: a slow client occupies a connection no longer than this.
        keep_alive_s: timeout of an idle connection. Shorter than request_s.
        head_bytes: of one request.
        headers: of one request.
        body_bytes: of one request; a longer body is received, and dropped.
        request_bytes: of head, body and trailers of one request; a longer one closes its connection.
        pipelined: requests on one connection that wait until an earlier one is answered.
    """

    connections: int
    request_s: float
    keep_alive_s: float
    head_bytes: int
    headers: int
    body_bytes: int
    request_bytes: int
    pipelined: int


@dataclass(frozen=True, slots=True)
class Request:
    """One complete request.

    Attributes:
        path: decoded, without the query.
        headers: names in lower case.
        body: None if it is longer than ``Limits.body_bytes``.
        scheme: http or https.
        client: its address; None if that is unknown.
    """

    method: str
    path: str
    headers: Headers
    body: bytes | None
    scheme: str
    client: str | None

    def header(self, name: bytes) -> bytes | None:
        """The value of a header by its name in lower case; several are joined, as RFC 9110 (5.3) does."""
        values = [value for key, value in self.headers if key == name]
        return b", ".join(values) if values else None


@dataclass(frozen=True, slots=True)
class Response:
    """The answer to a request; the header Content-Length is sent with it.

    Attributes:
        close: whether the connection ends with it.
    """

    status: int
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)
    close: bool = False


JSON = MappingProxyType({"Content-Type": "application/json"})


def json_response(
    value: object, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """An answer whose body is ``value`` in JSON: in ASCII, as it may quote half a surrogate pair of a request."""
    return Response(status, json.dumps(value).encode(), {**JSON, **(headers or {})})


def error_response(status: int, error: str, headers: Mapping[str, str] | None = None) -> Response:
    """An answer with this status and a sentence that explains the error."""
    return json_response({"error": error}, status, headers)


Handler: TypeAlias = Callable[[Request], Awaitable[Response]]
"""Answers a request. What it raises is logged, and answered with status 500."""


class Connection:
    """One connection. ``serve`` it once; the caller closes its transport."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        handler: Handler,
        limits: Limits,
    ) -> None:
        self.answering = False
        """Whether a request is complete, and its answer is not."""
        self._reader = reader
        self._writer = writer
        self._handler = handler
        self._limits = limits
        self._requests = _Requests(limits, writer)
        self._ending = False

    def end(self) -> None:
        """End the connection after the answer that is being sent."""
        self._ending = True

    async def serve(self) -> None:
        """Answer requests until a side ends the connection. Raises OSError; a timeout is one."""
        with closing(self._requests):
            await self._serve()

    async def _serve(self) -> None:
        idle_s = self._limits.request_s
        while not self._ending:
            begun = bool(self._requests.complete or self._requests.has_begun)
            async with asyncio.timeout(self._limits.request_s if begun else idle_s) as deadline:
                if not await self._receive(None if begun else deadline):
                    break
                await self._answer(self._requests.complete.popleft())
                await asyncio.sleep(0)  # others run between two requests, however many there are
            idle_s = self._limits.keep_alive_s
        async with asyncio.timeout(self._limits.request_s):  # to send what is buffered
            self._writer.close()
            await self._writer.wait_closed()

    async def _receive(self, idle: asyncio.Timeout | None) -> bool:
        """Receive until there is something to answer; False at the end of the connection.

        With the first bytes, even of empty lines, the timeout ``idle`` becomes that of a request.
        """
        while not self._requests.complete:
            data = await self._reader.read(READ_BYTES)
            if not data:
                return False
            if idle is not None:
                idle.reschedule(asyncio.get_running_loop().time() + self._limits.request_s)
                idle = None
            self._requests.parse(data)
        return True

    async def _answer(self, request: Request | Response) -> None:
        self.answering = True
        without_body = False
        if isinstance(request, Request):
            without_body = request.method == "HEAD"
            response = await self._handle(request)
        else:
            response = request
        self._ending |= response.close or (self._requests.ended and not self._requests.complete)
        head = [
            f"HTTP/1.1 {response.status} {HTTPStatus(response.status).phrase}",
            f"Content-Length: {len(response.body)}",
            *(f"{name}: {value}" for name, value in response.headers.items()),
            *(["Connection: close"] if self._ending else []),
        ]
        self._writer.write("\r\n".join([*head, "", ""]).encode("latin-1"))
        if not without_body:
            self._writer.write(response.body)
        await self._writer.drain()
        self.answering = False

    async def _handle(self, request: Request) -> Response:
        try:
            return await self._handler(request)
        except Exception:  # a request's edge: no client may stop the agent
            log.exception("request failed", path=request.path)
            return error_response(500, "The agent failed to answer; see its log.")


class _Requests:
    """The requests of one connection, by the callbacks of httptools.

    Attributes:
        complete: requests that are not answered yet. A ``Response`` is the refusal of an invalid one.
        has_begun: whether a part of the next one has been received.
        ended: whether no further one is read.
    """

    def __init__(self, limits: Limits, writer: asyncio.StreamWriter) -> None:
        self.complete: deque[Request | Response] = deque()
        self.has_begun = False
        self.ended = False
        peer = writer.get_extra_info("peername")
        self._client = str(peer[0]) if peer else None
        self._scheme = "http" if writer.get_extra_info("ssl_object") is None else "https"
        self._writer = writer
        self._limits = limits
        self._parser = httptools.HttpRequestParser(self)
        self._in_head = False
        self._received_bytes = self._head_bytes = 0
        self._url = b""
        self._headers: Headers = []
        self._body = bytearray()

    def parse(self, data: bytes) -> None:
        """Parse what was received. Raises ConnectionAbortedError above ``Limits.request_bytes``."""
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:  # answered like any other request
            self.ended = True
        except httptools.HttpParserError:
            self._refuse(400, NOT_HTTP)
        self._received_bytes += len(data)
        if self._received_bytes > self._limits.request_bytes:
            raise ConnectionAbortedError("the request is too long")
        if self._in_head and self._received_bytes > self._limits.head_bytes:
            self._refuse_size()

    def close(self) -> None:
        """Drop the parser, which refers back to this object: otherwise the buffers stay until a garbage collection."""
        del self._parser

    def on_message_begin(self) -> None:
        self.has_begun = self._in_head = True
        self._received_bytes = self._head_bytes = 0
        self._url = b""
        self._headers = []
        self._body = bytearray()
        self._check(len(self.complete), self._limits.pipelined)

    def on_url(self, url: bytes) -> None:
        self._url += url
        self._count(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value))
        if self._in_head:  # else it is a trailer
            self._headers.append((name.lower(), value))
            self._check(len(self._headers), self._limits.headers)

    def on_headers_complete(self) -> None:
        self._in_head = False
        expected = [value.lower() for name, value in self._headers if name == b"expect"]
        modern = self._parser.get_http_version() == "1.1"  # 1.0 has no 100 (RFC 9110, 10.1.1)
        if modern and expected == [b"100-continue"] and not self.complete:
            self._writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, body: bytes) -> None:
        if len(self._body) <= self._limits.body_bytes:
            self._body += body

    def on_message_complete(self) -> None:
        self.has_begun = False
        request = Request(
            method=self._parser.get_method().decode(),
            path=unquote(httptools.parse_url(self._url).path),
            headers=self._headers,
            body=bytes(self._body) if len(self._body) <= self._limits.body_bytes else None,
            scheme=self._scheme,
            client=self._client,
        )
        self.complete.append(request)
        self.ended = (
            self._parser.get_http_version() != "1.1" or not self._parser.should_keep_alive()
        )

    def _count(self, size: int) -> None:
        self._head_bytes += size
        self._check(self._head_bytes, self._limits.head_bytes)

    def _check(self, number: int, most: int) -> None:
        """Stop the parser above a bound: it reports what a callback raises as its own error."""
        if number > most:
            self._refuse_size()
            raise ValueError("the request is too large")

    def _refuse_size(self) -> None:
        limits = self._limits
        self._refuse(
            431,
            f"A request may have at most {limits.headers} headers and {limits.head_bytes} bytes of them, and"
            f" at most {limits.pipelined} further requests may wait on its connection.",
        )

    def _refuse(self, status: int, error: str) -> None:
        if not self.ended:
            self.ended = True
            self.complete.append(error_response(status, error))
