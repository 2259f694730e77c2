"""The agent's local HTTP server, for reports of the workload, health probes, status and metrics.

Owns paths, bounds and JSON shapes. Knows nothing of what a report, a status, a verdict
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
import json
from collections.abc import Callable, Mapping
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

from agent.ops.browsers import RESOLUTION, BrowserCheck, is_json
from agent.ops.http_server import HttpServer, Limits
from agent.ops.probe_access import ProbeAccess
from agent.schema.addresses import Address, is_loopback
from agent.schema.scalars import format_date_time, parse_date_time

MAX_BODY_BYTES = 64 * 1024
"""A report is under 100 bytes."""

LIMITS = Limits(
    connections=32,  # a workload, a sidecar and a few people; each takes some 20 KiB, with TLS 60
    request_s=5.0,
    keep_alive_s=3,
    head_bytes=16 * 1024,  # a browser sends under 4 KiB in 20 headers
    headers=64,
    request_bytes=1024 * 1024,  # so that a body above MAX_BODY_BYTES is answered with 413
    pipelined=8,
)

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
READS = ("GET", "OPTIONS")


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
        self._http = HttpServer("probe", LIMITS)

    def use(self, access: ProbeAccess) -> None:
        """Use other certificates for new connections, and another password for every request."""
        self._access = access
        self._http.tls = access.tls

    async def start(self, host: str, port: int) -> Address:
        """Listen; return the bound address, with the real port if ``port`` is 0.

        A wildcard of IPv6 serves IPv4 too.

        Raises:
            ConfigError: LISTEN, the address is in use, not of this host, or invalid.
        """
        self._browsers = BrowserCheck(loopback=is_loopback(host))
        return await self._http.start(self._app(), Address(host, port))

    async def stop(self) -> None:
        """Stop listening. May be called twice, or without a start."""
        await self._http.stop()

    async def _answer(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, unless a page of another site sent it or the password is wrong."""
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
        async with self._metrics_lock:  # at most one page in each iteration of the loop
            await asyncio.sleep(0)
            page, content_type = self._metrics(request.headers.get("accept", ""))
        return Response(page, headers={"Content-Type": content_type})


async def _read_body(request: Request) -> bytes:
    too_long = HTTPException(413, f"The body may have at most {MAX_BODY_BYTES} bytes.")
    with suppress(ValueError):  # not a number: the parser has refused it already
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
