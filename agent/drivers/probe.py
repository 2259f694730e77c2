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
from datetime import datetime
from functools import partial
from types import MappingProxyType
from typing import Any

from agent.ops.browsers import RESOLUTION, BrowserCheck, is_json
from agent.ops.http_connection import (
    Handler,
    Limits,
    Request,
    Response,
    error_response,
    json_response,
)
from agent.ops.http_server import HttpServer
from agent.ops.probe_access import ProbeAccess
from agent.schema.addresses import Address, is_loopback
from agent.schema.scalars import format_date_time, parse_date_time

MAX_BODY_BYTES = 64 * 1024
"""A report is under 100 bytes."""

LIMITS = Limits(
    connections=32,  # a workload, a sidecar and a few people; each takes some 20 KiB, with TLS 60
    request_s=5.0,
    keep_alive_s=75,  # longer than the interval of scrapes: new connections are expensive, above all with TLS
    head_bytes=16 * 1024,  # a browser sends under 4 KiB in 20 headers
    headers=64,
    body_bytes=MAX_BODY_BYTES,
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
READS = ("GET", "HEAD", "OPTIONS")


class _Refused(Exception):  # noqa: N818 - ends a request
    def __init__(self, status: int, error: str) -> None:
        super().__init__(error)
        self.status = status


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
        self._metrics_lock = asyncio.Lock()
        self._access = ProbeAccess()
        self._browsers = BrowserCheck()
        self._http = HttpServer("probe", LIMITS)
        self._routes: dict[str, tuple[tuple[str, ...], Handler]] = {
            "/data-processed": (("POST",), self._data_processed),
            "/status": (READS, self._show_status),
            **{
                f"/{name}": (READS, partial(self._show_verdict, verdict))
                for name, verdict in verdicts.items()
            },
        }
        if metrics is not None:
            self._routes["/metrics"] = (READS, partial(self._show_metrics, metrics))

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
        return await self._http.start(self._handle, Address(host, port))

    async def stop(self) -> None:
        """Stop listening. May be called twice, or without a start."""
        await self._http.stop()

    async def _handle(self, request: Request) -> Response:
        """Answer a request, unless a page of another site sent it or the password is wrong."""
        if reason := self._browsers.refusal(request.headers, request.scheme):
            return error_response(403, f"{reason} {RESOLUTION}")
        if not self._access.allows(request.header(b"authorization")):
            return error_response(401, NO_PASSWORD, CHALLENGE)
        if request.path not in self._routes:
            return error_response(404, NO_PATH)
        methods, answer = self._routes[request.path]
        if request.method not in methods:
            return error_response(405, NO_METHOD, {"Allow": ", ".join(methods)})
        return await answer(request)

    async def _data_processed(self, request: Request) -> Response:
        try:
            current = self._report(_parse_report(request))
        except _Refused as refused:
            return error_response(refused.status, str(refused))
        except ValueError as error:
            return error_response(400, f"time: {error}.")
        return json_response({"time": format_date_time(current)})

    async def _show_status(self, _request: Request) -> Response:
        return json_response(self._status())

    async def _show_verdict(self, verdict: Callable[[], str | None], _request: Request) -> Response:
        why_not = verdict()
        if why_not is None:
            return json_response({"ok": True}, headers=NO_STORE)
        return json_response({"ok": False, "reason": why_not}, 503, NO_STORE)

    async def _show_metrics(
        self, build_page: Callable[[str], tuple[bytes, str]], request: Request
    ) -> Response:
        accept = request.header(b"accept") or b""
        async with self._metrics_lock:  # at most one page in each iteration of the loop
            await asyncio.sleep(0)
            page, content_type = build_page(accept.decode("latin-1"))
        return Response(200, page, {"Content-Type": content_type})


def _parse_report(request: Request) -> datetime:
    """The time of a report. Raises _Refused."""
    if not is_json(request.header(b"content-type")):
        raise _Refused(415, NO_JSON)
    if request.body is None:
        raise _Refused(413, f"The body may have at most {MAX_BODY_BYTES} bytes.")
    expected = 'the body must be like {"time": "2026-01-31T12:00:00Z"}'
    try:
        report = json.loads(request.body)
    except (ValueError, RecursionError) as error:
        raise _Refused(400, f"The body is not JSON ({error}); {expected}.") from error
    if not isinstance(report, dict) or not isinstance(report.get("time"), str):
        raise _Refused(400, f'The body has no "time" that is a string; {expected}.')
    try:
        time = parse_date_time(report["time"])
    except ValueError as error:
        raise _Refused(400, f"time: {error}.") from error
    if time is None:
        raise _Refused(400, f"time: {report['time']} means never; {expected}.")
    return time
