"""The agent's local HTTP server, for reports of the workload, health probes, status and metrics.

Owns the listening socket, bounds and JSON shapes. Knows nothing of what a report, a status, a verdict
or a metric means: callbacks provide them; they run in the event loop and must not block.

    POST /data-processed {"time": "2026-01-31T12:00:00Z"}  -> 200 {"time": the current value}
    GET  /status                                            -> 200 the agent's status
    GET  /metrics                                           -> 200 the metrics, in the format of Accept
    GET  /<verdict>                                         -> 200 {"ok": true}, or
                                                               503 {"ok": false, "reason": "..."}

Every error is a JSON object with ``error``, one sentence. There is no authentication: every caller is
trusted, so the address has to be on loopback.
"""

import asyncio
import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import datetime
from types import MappingProxyType
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp
from uvicorn import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from agent.errors import ConfigError, ExitCode
from agent.wire.scalars import format_date_time, parse_date_time

MAX_BODY_BYTES = 64 * 1024
"""A report is under 100 bytes."""

MAX_REQUEST_BYTES = 1024 * 1024
"""Head, body and trailers of one request. Well above MAX_BODY_BYTES, so that a body that is too long is
answered with 413; the connection of a longer request is closed."""

MAX_CONNECTIONS = 32
"""A workload, a sidecar and a few people; each costs some 20 KiB."""

REQUEST_S = 5.0
"""Timeout of a connection, from its start or that of its last request: a slow client keeps one of the
connections no longer."""

KEEP_ALIVE_S = 3
"""Timeout of an idle connection. Less than REQUEST_S, which is for stuck ones."""

NO_PATH = (
    "There is nothing at this path; there are /livez, /readyz, /primary, /secondary, /status, /metrics"
    " and, to POST to, /data-processed."
)
NO_METHOD = "This path does not support this method; the header Allow lists those that it does."
NO_STORE = {"Cache-Control": "no-store"}
"""A verdict holds only for its moment."""

STOP_S = 0.05
"""How long a stop waits for answers that are being sent."""


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
        self._state = ServerState()
        self._server: asyncio.Server | None = None

    async def start(self, host: str, port: int) -> tuple[str, int]:
        """Listen; return the bound address, with the real port if ``port`` is 0.

        Raises:
            ConfigError: LISTEN, the address is in use, not of this host, or invalid.
        """
        config = Config(
            self._app(),
            lifespan="off",
            ws="none",
            log_config=None,
            proxy_headers=False,
            server_header=False,
            date_header=False,
            timeout_keep_alive=KEEP_ALIVE_S,
        )
        config.load()
        loop = asyncio.get_running_loop()
        try:
            self._server = await loop.create_server(
                lambda: _Connection(config, self._state, {}), host, port
            )
        except OSError as error:
            # not str(error), which has asyncio's wording
            why = os.strerror(error.errno) if error.errno else error.strerror
            raise ConfigError(
                f"probe listener cannot use {host}:{port} ({why}): choose"
                " another --probe-listen HOST:PORT on this host, with port 0 for any free one",
                exit_code=ExitCode.LISTEN,
            ) from error
        address: tuple[str, int] = self._server.sockets[0].getsockname()[:2]
        return address

    async def stop(self) -> None:
        """Stop listening; unfinished answers get STOP_S. May be called twice, or without a start."""
        if self._server is None:
            return
        self._server.close()
        for connection in list(self._state.connections):
            connection.shutdown()
        if self._state.tasks:
            await asyncio.wait(self._state.tasks, timeout=STOP_S)
        for connection in list(self._state.connections):
            connection.transport.abort()
        self._server = None

    def _app(self) -> ASGIApp:
        routes = [
            Route("/data-processed", self._data_processed, methods=["POST"]),
            Route("/status", self._show_status, methods=["GET"]),
            *(Route(f"/{name}", self._show_verdict, methods=["GET"]) for name in self._verdicts),
        ]
        if self._metrics is not None:
            routes.append(Route("/metrics", self._show_metrics, methods=["GET"]))
        app = Starlette(
            routes=routes,
            exception_handlers={HTTPException: _on_http_error, Exception: _on_exception},
        )
        app.router.redirect_slashes = False
        return app

    async def _data_processed(self, request: Request) -> JSONResponse:
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
    """uvicorn's connection, with bounds on number, time and size, which uvicorn does not have."""

    _deadline: asyncio.TimerHandle | None = None
    _received_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as in the base class
        super().connection_made(transport)
        self.access_log = False  # uvicorn's loggers are shared with other servers
        self._restart_timeout()
        if len(self.connections) > MAX_CONNECTIONS:
            transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._deadline:
            self._deadline.cancel()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._restart_timeout()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._received_bytes += len(data)
        if self._received_bytes > MAX_REQUEST_BYTES:
            self.transport.abort()

    def _restart_timeout(self) -> None:
        self._received_bytes = 0
        if self._deadline:
            self._deadline.cancel()
        self._deadline = self.loop.call_later(REQUEST_S, self.transport.abort)


async def _read_body(request: Request) -> bytes:
    too_long = HTTPException(413, f"The body may have at most {MAX_BODY_BYTES} bytes.")
    with suppress(ValueError):  # the parser has already rejected what is no number
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
