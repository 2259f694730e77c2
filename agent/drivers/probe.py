"""The agent's local HTTP server, for reports of the workload, health probes, status and metrics.

Owns the listening socket, bounds and JSON shapes. Knows nothing of what a report, a status, a verdict
or a metric means: callbacks provide them; they run in the event loop and must not block.

    POST /data-processed {"time": "2026-01-31T12:00:00Z"}  -> 200 {"time": the current value}
    GET  /status                                            -> 200 the agent's status
    GET  /metrics                                           -> 200 the metrics, in the format of Accept
    GET  /<verdict>                                         -> 200 {"ok": true}, or
                                                               503 {"ok": false, "reason": "..."}

OPTIONS is answered as GET: it is what HAProxy asks with. Every error is a JSON object with ``error``, one
sentence. Pages of other sites are refused. Without a password every caller is trusted.
"""

import asyncio
import errno
import json
import logging
import os
import socket
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from functools import partial
from types import MappingProxyType
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from agent.errors import ConfigError, ExitCode
from agent.ops.browsers import RESOLUTION, BrowserCheck, is_json
from agent.ops.logs import Log
from agent.ops.probe_access import ProbeAccess
from agent.schema.addresses import Address, is_loopback
from agent.schema.scalars import format_date_time, parse_date_time

MAX_BODY_BYTES = 64 * 1024
"""A report is under 100 bytes."""

MAX_REQUEST_BYTES = 1024 * 1024
"""Head, body and trailers of one request. Well above MAX_BODY_BYTES, so that a body that is too long is
answered with 413; the connection of a longer request is closed."""

MAX_HEAD_BYTES = 16 * 1024
MAX_HEADERS = 64
"""Bounds of one request: a browser sends under 4 KiB in 20 headers."""

MAX_PIPELINED = 8
"""Pipelined requests on one connection: each waits for the answers before its own."""

MAX_CONNECTIONS = 32
"""A workload, a sidecar and a few people; each costs some 20 KiB, with TLS 60. TLS handshakes count."""

BACKLOG = 64
"""Connections that wait to be accepted."""

NO_ADDRESS = frozenset({errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL})
"""The host does not have an address, or its whole family."""

ACCEPT_PAUSE_S = 0.1
"""After a failed accept, such as for want of descriptors."""

REQUEST_S = 5.0
"""Timeout of a connection, from its start or that of its last request, and of a TLS handshake: a slow client
keeps one of the connections no longer."""

KEEP_ALIVE_S = 3
"""Timeout of an idle connection. Less than REQUEST_S, which is for stuck ones."""

NO_PATH = (
    "There is nothing at this path; there are /livez, /readyz, /primary, /secondary, /status, /metrics"
    " and, to POST to, /data-processed."
)
NO_METHOD = "This path does not support this method; the header Allow lists those that it does."
NO_STORE = {"Cache-Control": "no-store"}
"""A verdict holds only for its moment."""

CHALLENGE = {"WWW-Authenticate": 'Basic realm="failover-agent"'}
NO_PASSWORD = "Send the user and password of probe_username and probe_password_file (Basic)."  # noqa: S105 - an error
NO_JSON = (
    "The body must be sent as application/json: pages of other sites can send forms and text; with curl"
    " use --json."
)
NOT_HTTP = "This is not HTTP/1.1, or it has no end."
TOO_LARGE = (
    f"A request may have {MAX_HEADERS} headers, together of {MAX_HEAD_BYTES} bytes, and {MAX_PIPELINED} others"
    " may wait behind it."
)
READS = ("GET", "OPTIONS")

STOP_S = 0.05
"""How long a stop waits for answers that are being sent."""

log = Log(__name__)


class ProbeServer:
    """The server. ``start`` it inside a running loop; ``stop`` it there too.

    Args:
        report: receives a reported time (aware, UTC) and returns the current one; raises ValueError for
            an impossible time.
        status: returns the answer of ``GET /status``, as JSON values.
        verdicts: by path: each returns None for yes, or the reason for no.
        metrics: receives the Accept header, and returns the page and its content type; None for no page.
    """

    def __init__(
        self,
        report: Callable[[datetime], datetime],
        status: Callable[[], Mapping[str, Any]],
        verdicts: Mapping[str, Callable[[], str | None]] = MappingProxyType({}),
        metrics: Callable[[str], tuple[bytes, str]] | None = None,
    ) -> None:
        self._report = report
        self._status = status
        self._verdicts = verdicts
        self._metrics = metrics
        self._metrics_lock = asyncio.Lock()
        self._access = ProbeAccess()
        self._browsers = BrowserCheck()
        self._state = ServerState()
        self._listeners: list[socket.socket] = []
        self._accepting: list[asyncio.Task[None]] = []
        self._connections: set[asyncio.Task[None]] = set()

    def use(self, access: ProbeAccess) -> None:
        """Serve new connections by other certificates, and every request by another password."""
        self._access = access

    async def start(self, host: str, port: int) -> tuple[str, int]:
        """Listen; return the bound address, with the real port if ``port`` is 0.

        A wildcard of IPv6 serves IPv4 too.

        Raises:
            ConfigError: LISTEN, the address is in use, not of this host, or invalid.
        """
        config = Config(
            self._app(),
            lifespan="off",
            interface="asgi3",
            ws="none",
            log_config=None,
            proxy_headers=False,
            server_header=False,
            date_header=False,
            timeout_keep_alive=KEEP_ALIVE_S,
        )
        config.load()
        self._browsers = BrowserCheck(loopback=is_loopback(host))
        loop = asyncio.get_running_loop()
        try:
            found = await loop.getaddrinfo(
                host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )
            self._listeners = _listen_at_all(list(dict.fromkeys(found)))
        except OSError as error:
            raise _listen_error(Address(host, port), error) from error
        self._accepting = [
            loop.create_task(self._accept(listener, config), name="probe")
            for listener in self._listeners
        ]
        address: tuple[str, int] = self._listeners[0].getsockname()[:2]
        return address

    async def _accept(self, listener: socket.socket, config: Config) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, _ = await loop.sock_accept(listener)
            except OSError:
                await asyncio.sleep(ACCEPT_PAUSE_S)
                continue
            if len(self._connections) >= MAX_CONNECTIONS:
                connection.close()
                continue
            serving = loop.create_task(self._serve(connection, config), name="probe connection")
            self._connections.add(serving)
            serving.add_done_callback(self._connections.discard)

    async def _serve(self, connection: socket.socket, config: Config) -> None:
        """Serve one connection to its end, its TLS handshake included."""
        protocol = _Connection(config, self._state, {})
        tls = self._access.tls
        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                lambda: protocol,
                connection,
                ssl=tls,
                ssl_handshake_timeout=REQUEST_S if tls is not None else None,
            )
        except OSError:  # also of the TLS handshake, or its timeout: it was no client of ours
            return
        except Exception:  # a connection's edge: what one client does must not stop the agent
            log.exception("probe connection failed")
            return
        await protocol.ended.wait()

    async def stop(self) -> None:
        """Stop listening; unfinished answers get STOP_S. May be called twice, or without a start."""
        await _cancel(self._accepting)
        self._close_listeners()
        for connection in list(self._state.connections):
            connection.shutdown()
        if self._state.tasks:
            await asyncio.wait(self._state.tasks, timeout=STOP_S)
        for connection in list(self._state.connections):
            connection.transport.abort()
        await _cancel(self._connections)

    def _close_listeners(self) -> None:
        for listener in self._listeners:
            listener.close()
        self._listeners.clear()

    async def _answer(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer callers that may have one: no page of another site, and none without the password."""
        headers = scope["headers"]
        if reason := self._browsers.refusal(headers, scope["scheme"]):
            refusal = JSONResponse({"error": f"{reason} {RESOLUTION}"}, 403)
            await refusal(scope, receive, send)
        elif not self._access.allows(dict(headers).get(b"authorization")):
            await JSONResponse({"error": NO_PASSWORD}, 401, CHALLENGE)(scope, receive, send)
        else:
            await app(scope, receive, send)

    def _app(self) -> ASGIApp:
        routes = [
            Route("/data-processed", self._data_processed, methods=["POST"]),
            Route("/status", self._show_status, methods=READS),
            *(Route(f"/{name}", self._show_verdict, methods=READS) for name in self._verdicts),
        ]
        if self._metrics is not None:
            routes.append(Route("/metrics", self._show_metrics, methods=READS))
        app = Starlette(
            routes=routes,
            exception_handlers={HTTPException: _on_http_error, Exception: _on_exception},
        )
        app.router.redirect_slashes = False
        return partial(self._answer, app)

    async def _data_processed(self, request: Request) -> JSONResponse:
        content_type = request.headers.get("content-type")
        if content_type is not None and not is_json(content_type.encode("latin-1")):
            raise HTTPException(415, NO_JSON)
        time = _parse_report(await _read_body(request))
        try:
            current = self._report(time)
        except ValueError as error:
            raise HTTPException(400, f"time: {error}.") from error
        return JSONResponse({"time": format_date_time(current)})

    async def _show_status(self, _request: Request) -> JSONResponse:
        return JSONResponse(self._status())

    async def _show_verdict(self, request: Request) -> JSONResponse:
        why_not = self._verdicts[request.url.path.removeprefix("/")]()
        if why_not is None:
            return JSONResponse({"ok": True}, headers=NO_STORE)
        return JSONResponse({"ok": False, "reason": why_not}, 503, headers=NO_STORE)

    async def _show_metrics(self, request: Request) -> Response:
        assert self._metrics is not None  # noqa: S101 - else there is no such route
        async with self._metrics_lock:  # one page per turn of the loop, however many are requested
            await asyncio.sleep(0)
            page, content_type = self._metrics(request.headers.get("accept", ""))
        return Response(page, headers={"Content-Type": content_type})


class _Connection(HttpToolsProtocol):
    """uvicorn's connection, with bounds on time and size, which uvicorn does not have."""

    def __init__(self, config: Config, state: ServerState, app_state: dict[str, Any]) -> None:
        super().__init__(config, state, app_state)
        self.ended = asyncio.Event()
        self.access_log = False  # uvicorn's loggers are shared with other servers
        self.logger = logging.getLogger("uvicorn.error.probe")
        self.logger.setLevel(logging.ERROR)  # what a stranger sends is no warning
        self._deadline: asyncio.TimerHandle | None = None
        self._received_bytes = 0
        self._head_bytes = 0
        self._in_head = True
        self._too_large = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as in the base class
        super().connection_made(transport)
        self._restart_timeout()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._deadline:
            self._deadline.cancel()
        super().connection_lost(exc)
        self.ended.set()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._restart_timeout()
        self._head_bytes, self._in_head = 0, True
        self._refuse_above(len(self.pipeline), MAX_PIPELINED)

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        self._count(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        self._count(len(name) + len(value))
        self._refuse_above(len(self.headers), MAX_HEADERS)

    def on_headers_complete(self) -> None:
        self._in_head = False
        super().on_headers_complete()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._received_bytes += len(data)
        if self._received_bytes > MAX_REQUEST_BYTES:
            self.transport.abort()
        elif (
            self._in_head
            and self._received_bytes > MAX_HEAD_BYTES
            and not self.transport.is_closing()
        ):
            self._too_large = True
            self.send_400_response(NOT_HTTP)

    def send_400_response(self, _msg: str) -> None:
        """Answer what cannot be parsed, or is too large, and close the connection."""
        status = "431 Request Header Fields Too Large" if self._too_large else "400 Bad Request"
        body = json.dumps({"error": TOO_LARGE if self._too_large else NOT_HTTP}).encode()
        head = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nConnection: close\r\n"
        self.transport.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        self.transport.close()

    def _count(self, size: int) -> None:
        self._head_bytes += size
        self._refuse_above(self._head_bytes, MAX_HEAD_BYTES)

    def _refuse_above(self, number: int, most: int) -> None:
        """Stop the parser, which answers by ``send_400_response``."""
        if number > most:
            self._too_large = True
            raise ValueError("the request is too large")

    def _restart_timeout(self) -> None:
        self._received_bytes = 0
        if self._deadline:
            self._deadline.cancel()
        self._deadline = self.loop.call_later(REQUEST_S, self.transport.abort)


async def _cancel(tasks: Iterable["asyncio.Task[None]"]) -> None:
    cancelled = list(tasks)
    for task in cancelled:
        task.cancel()
    await asyncio.gather(*cancelled, return_exceptions=True)


def _listen_at_all(found: Sequence[tuple[Any, ...]]) -> list[socket.socket]:
    """Listen at every address of a name, on one port. Raises OSError of the first that cannot be used."""
    listeners: list[socket.socket] = []
    unusable: OSError | None = None
    for family, _, _, _, place in found:
        port = listeners[0].getsockname()[1] if listeners else place[1]
        try:
            listeners.append(_listen(family, (place[0], port, *place[2:])))
        except OSError as error:
            unusable = unusable or error
            if error.errno not in NO_ADDRESS:  # localhost may have an address that this host lacks
                break
    else:
        if listeners:
            return listeners
    for listener in listeners:
        listener.close()
    raise unusable or OSError("the name has no address")


def _listen(family: int, place: tuple[Any, ...]) -> socket.socket:
    """A listening socket. Raises OSError."""
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:  # independent of the host's default (net.ipv6.bindv6only)
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(place[0] != "::"))
        listener.setblocking(False)
        listener.bind(place)
        listener.listen(BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener


def _listen_error(address: Address, error: OSError) -> ConfigError:
    # not str(error) of every error: asyncio's wording is another
    own = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror
    why = own or error
    right = "choose another --probe-listen HOST:PORT on this host, with port 0 for any free one"
    if ":" in address.host and error.errno in NO_ADDRESS:
        right = (
            f"this host has no such IPv6 address, or no IPv6: use 0.0.0.0:{address.port} for IPv4"
        )
    return ConfigError(
        f"probe listener cannot use {address} ({why}): {right}", exit_code=ExitCode.LISTEN
    )


async def _read_body(request: Request) -> bytes:
    too_long = HTTPException(413, f"The body may have at most {MAX_BODY_BYTES} bytes.")
    with suppress(ValueError):  # of no number: the parser has rejected it already
        if int(request.headers.get("content-length", "0")) > MAX_BODY_BYTES:
            raise too_long
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise too_long
    return bytes(body)


def _parse_report(body: bytes) -> datetime:
    expected = 'the body must be like {"time": "2026-01-31T12:00:00Z"}'
    try:
        report = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, f"The body is not JSON ({error}); {expected}.") from error
    if not isinstance(report, dict) or not isinstance(report.get("time"), str):
        raise HTTPException(400, f'The body has no "time" that is a string; {expected}.')
    try:
        time = parse_date_time(report["time"])
    except ValueError as error:
        raise HTTPException(400, f"time: {error}.") from error
    if time is None:
        raise HTTPException(400, f"time: {report['time']} means never; {expected}.")
    return time


async def _on_http_error(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)  # noqa: S101 - it is registered for these
    text = {404: NO_PATH, 405: NO_METHOD}.get(error.status_code, error.detail)
    return JSONResponse({"error": text}, error.status_code, headers=error.headers)


async def _on_exception(_request: Request, _error: Exception) -> JSONResponse:
    return JSONResponse({"error": "The agent failed to answer; see its log."}, 500)
