"""Connections to servers over HTTP/1.1: resolved, bounded, and refused if the peer does not speak HTTP.

Owns the connection pools' transport. Knows nothing of requests' time limits, nor of what an answer means.
"""

import secrets
import ssl
from collections.abc import AsyncIterator, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Any

import httpcore2
import httpx2

from agent import __version__
from agent.errors import ExitCode
from agent.ops.names import Names
from agent.schema.api import REQUEST_HEADER

LONGEST_ANSWER = 1024 * 1024
"""The longest answer. A page of 100 groups has about 20 KiB; a faulty server must not fill the memory of an edge
host."""

LONGEST_CONNECT_S = 10.0
"""Timeout to connect, for a request that has no timeout of its own."""

_HTTP = b"HTTP/"
HTTP_HINT = "check the port, and whether it wants https instead of http"


@dataclass(frozen=True, slots=True)
class Proxy:
    """An HTTP proxy that all connections go through: https by CONNECT, http by requests for a whole URL.

    Attributes:
        url: http or https, a host, perhaps a port.
        login: its user and password, or None.
    """

    url: str
    login: tuple[bytes, bytes] | None = field(default=None, repr=False)


class UnfitAnswerError(Exception):
    """What was received is no answer to the request. Arguments: what it is, what to do, and the exit code."""


ANOTHERS_ANSWER = (
    "answers another request than the one that was sent",
    "look for a proxy or balancer on the way that mixes answers up",
    ExitCode.NO_ANSWER,
)
TOO_LONG = (
    f"answered with more than {LONGEST_ANSWER // 1024} KiB, or compressed",
    "the endpoint must be a group API, which does neither",
    ExitCode.NOT_THE_API,
)


class _Stream(httpcore2.AsyncNetworkStream):
    """A connection that refuses a peer whose first words are not HTTP.

    The parser waits for a blank line, so a banner like that of SSH would otherwise look like silence. What is
    written is kept until the next read: the head and the body of a request leave in one packet, and what came with
    the answer before is known to be no answer. Nothing is kept when TLS starts: CONNECT has been answered before.
    """

    def __init__(self, inner: httpcore2.AsyncNetworkStream) -> None:
        self._inner = inner
        self._first = b""
        self.unsent = b""

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:  # noqa: ASYNC109 - httpcore2's signature
        # What comes on a new connection may be a banner, or its refusal: it is read as that.
        tls = self._inner.get_extra_info("ssl_object") if self._first and self.unsent else None
        with suppress(ssl.SSLWantReadError, ssl.SSLZeroReturnError):  # nothing has come
            if tls is not None and tls.read(1):
                raise UnfitAnswerError(*ANOTHERS_ANSWER)
        with suppress(httpcore2.WriteError):  # as httpcore2: an early answer can be read
            if self.unsent:
                await self._inner.write(self.unsent, timeout)
        self.unsent = b""
        data = await self._inner.read(max_bytes, timeout)
        if len(self._first) < len(_HTTP):
            self._first += data
            if not _HTTP.startswith(self._first[: len(_HTTP)]):
                problem = f"does not speak HTTP (its first bytes are {repr(self._first[:32])[1:]})"
                raise UnfitAnswerError(problem, HTTP_HINT, ExitCode.NOT_HTTP)
        return data

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:  # noqa: ARG002, ASYNC109 - as above
        self.unsent += buffer  # bounded: our requests are short

    async def aclose(self) -> None:
        await self._inner.aclose()

    async def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,  # noqa: ASYNC109 - as above
    ) -> httpcore2.AsyncNetworkStream:
        return _Stream(await self._inner.start_tls(ssl_context, server_hostname, timeout))

    def get_extra_info(self, info: str) -> Any:
        return self._inner.get_extra_info(info)


class _Backend(httpcore2.AnyIOBackend):
    """Opens connections. Host names are resolved by ``names``, never by the shared executor.

    Args:
        proxied: all connections are to a proxy.
    """

    def __init__(self, names: Names, *, proxied: bool) -> None:
        self._names = names
        self._proxied = proxied

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109 - httpcore2's signature
        local_address: str | None = None,
        socket_options: Iterable[httpcore2.SOCKET_OPTION] | None = None,
    ) -> httpcore2.AsyncNetworkStream:
        timeout_s = LONGEST_CONNECT_S if timeout is None else timeout
        connect = super().connect_tcp

        async def dial(address: str) -> httpcore2.AsyncNetworkStream:
            return await connect(address, port, timeout_s, local_address, socket_options)

        try:
            return _Stream(await self._names.connect(host, dial, timeout_s=timeout_s))
        except (OSError, httpcore2.ConnectError, httpcore2.ConnectTimeout) as error:
            if self._proxied:
                raise httpcore2.ProxyError(f"{host}:{port} does not answer") from error
            if isinstance(error, OSError):
                raise httpcore2.ConnectError(str(error)) from error
            raise


class _Bounded(httpx2.AsyncByteStream):
    """A body of at most LONGEST_ANSWER bytes."""

    def __init__(self, inner: httpx2.AsyncByteStream) -> None:
        self._inner = inner

    async def __aiter__(self) -> AsyncIterator[bytes]:
        seen = 0
        async for part in self._inner:
            seen += len(part)
            if seen > LONGEST_ANSWER:
                raise UnfitAnswerError(*TOO_LONG)
            yield part

    async def aclose(self) -> None:
        await self._inner.aclose()


class _Transport(httpx2.AsyncHTTPTransport):
    """HTTP/1.1 without retries, whose answers are bounded wherever they are read."""

    def __init__(
        self,
        context: ssl.SSLContext | None,
        keepalive_s: float,
        connections: int,
        names: Names,
        proxy: Proxy | None,
    ) -> None:
        backend = _Backend(names, proxied=proxy is not None)
        # In place of the base class's pool, which takes no network backend and always makes a context.
        if proxy is None:
            self._pool = httpcore2.AsyncConnectionPool(
                ssl_context=context,
                max_connections=connections,
                keepalive_expiry=keepalive_s,
                network_backend=backend,
            )
        else:
            self._pool = httpcore2.AsyncHTTPProxy(
                proxy.url,
                proxy_auth=proxy.login,
                ssl_context=context,
                proxy_ssl_context=context if proxy.url.lower().startswith("https:") else None,
                max_connections=connections,
                keepalive_expiry=keepalive_s,
                network_backend=backend,
            )

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        number = request.headers[REQUEST_HEADER] = secrets.token_hex(8)
        response = await super().handle_async_request(request)
        headers, stream = response.headers, response.extensions["network_stream"]
        repeated = headers.get_list(REQUEST_HEADER, split_commas=True)
        if stream.unsent or not {number}.issuperset(repeated):
            unfit = ANOTHERS_ANSWER  # unsent: it had come with the answer before
        elif headers.get("content-encoding", "identity") != "identity":
            unfit = TOO_LONG  # 1 KiB can unpack to 1 MiB, and we asked for identity
        else:
            if isinstance(response.stream, httpx2.AsyncByteStream):
                response.stream = _Bounded(response.stream)
            return response
        await response.aclose()
        raise UnfitAnswerError(*unfit)


def open_client(
    context: ssl.SSLContext | None,
    *,
    keepalive_s: float,
    connections: int,
    names: Names,
    auth: httpx2.Auth | None = None,
    proxy: Proxy | None = None,
    transport: httpx2.AsyncBaseTransport | None = None,
) -> httpx2.AsyncClient:
    """A client with connections of its own; close it with ``aclose``.

    Args:
        context: verifies the servers' certificates; None: by the authorities of this host, read then.
        keepalive_s: seconds after which an idle connection is not used again.
        connections: how many there are at most.
        names: resolves the names of hosts.
        auth: the credentials of each request.
        proxy: the way to all servers, or None for a direct one.
        transport: stands in for the network, in tests.
    """
    return httpx2.AsyncClient(
        auth=auth,
        transport=transport or _Transport(context, keepalive_s, connections, names, proxy),
        trust_env=False,
        follow_redirects=False,
        # No cookie is kept: a server could fill the memory.
        cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),
        headers={
            "User-Agent": f"failover-agent/{__version__}",
            "Accept": "application/json",
            "Accept-Encoding": "identity",
        },
    )
