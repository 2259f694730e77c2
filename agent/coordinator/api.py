"""The group API over HTTP: an ASGI application around the coordinator.

Owns the HTTP side: dispatch, bodies and their types, authentication, status codes, and the ErrorResponse of
each refusal. The handlers are in calls.py.

A plain ASGI application rather than Starlette routes: a heartbeat costs a third as much, and every
error, also one of routing, is answered in one form.
"""

import asyncio
import itertools
import math
import uuid
from collections.abc import Awaitable, Callable, Coroutine, MutableMapping, Sequence
from contextlib import suppress
from email.utils import formatdate
from time import perf_counter
from typing import Any

from agent.coordinator.auth import Authenticator, Rights
from agent.coordinator.calls import (
    FORWARDED,
    Answer,
    Call,
    Forwarder,
    Request,
    create_group,
    get_status,
    header,
    repeated_headers,
)
from agent.coordinator.connection import CERTIFICATE, ON_AUTHENTICATED, REFUSAL
from agent.coordinator.hang_up import HUNG_UP, HungUp, never, while_connected
from agent.coordinator.limits import MAX_LOGGED, PART_BYTES, HeadTooLarge, TooSlow, Unsent
from agent.coordinator.metrics import Metrics
from agent.coordinator.openapi import document
from agent.coordinator.route_table import LISTS, ROUTES, SHARED
from agent.coordinator.routes import DEFAULT_NAME, PathMatch, Route, Router, read_query
from agent.coordinator.service import Coordinator
from agent.errors import (
    Conflict,
    Forbidden,
    Invalid,
    NotFound,
    RequestRefused,
    TooManyAttempts,
    TooSoon,
    Unauthenticated,
    Unavailable,
)
from agent.model import GroupKey, Instant
from agent.ops.browsers import RESOLUTION, BrowserCheck, is_json
from agent.ops.logs import Log
from agent.schema.api import ErrorResponse
from agent.schema.codec import BodyError, decode, encode

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Answering = Coroutine[Any, Any, Answer]

OPERATION_ID = b"operation-id"

ADMITTED_FOR_S = 1.0
"""If a body takes longer than this to arrive, credentials and rights are checked again: a request that is kept
open could outlive both."""

LONG_BODY = 4096
"""Longer bodies take up to milliseconds to decode: one is decoded in each iteration of the loop, so others are served."""

log = Log(__name__)


class MethodNotAllowed(RequestRefused):
    """The path exists, but not with this method. ``allow`` lists its methods."""

    def __init__(self, method: str, allow: str) -> None:
        super().__init__(f"There is no {method} here.", f"Use one of {allow}.")
        self.allow = allow


class TooLarge(RequestRefused):
    """The body is longer than this service reads."""


class UnsupportedContent(RequestRefused):
    """The body is not JSON by its Content-Type."""


STATUSES: tuple[tuple[type[RequestRefused], int], ...] = (
    (Invalid, 400),
    (Unauthenticated, 401),
    (Forbidden, 403),
    (NotFound, 404),
    (MethodNotAllowed, 405),
    (TooSlow, 408),
    (Conflict, 409),
    (TooLarge, 413),
    (UnsupportedContent, 415),
    (TooSoon, 429),
    (TooManyAttempts, 429),
    (HeadTooLarge, 431),
    (HungUp, 499),
    (Unavailable, 503),
)


class Api:
    """The ASGI application.

    Args:
        coordinator: started and stopped by the caller.
        clock: for the Date header, the end of an override, and metrics.
        authenticator: without schemes every call is allowed.
        max_body_bytes: a longer body is answered 413.
        role_names: write roles as names rather than numbers.
        metrics: also served at /metrics.
        browsers: refuses requests from pages of other sites; the default does not check Host.
        forwarder: sends requests to the leader of the group; None with a single coordinator.
    """

    def __init__(
        self,
        coordinator: Coordinator,
        clock: Callable[[], Instant],
        authenticator: Authenticator | None = None,
        *,
        max_body_bytes: int = 65536,
        role_names: bool = False,
        metrics: Metrics | None = None,
        browsers: BrowserCheck | None = None,
        forwarder: Forwarder | None = None,
        routes: Sequence[Route] = ROUTES,
    ) -> None:
        self._browsers = browsers or BrowserCheck()
        self._forwarder = forwarder
        self._metrics = metrics or Metrics()
        self._coordinator = coordinator
        self._clock = clock
        self._date_header = (0, b"")
        self._lists = {handler: asyncio.Lock() for handler in LISTS}
        self._turn, self._unsent = asyncio.Lock(), Unsent()
        self._auth = authenticator or Authenticator()
        self._auth.meter(self._metrics)
        self._open = not self._auth.schemes
        self._max_body_bytes = max_body_bytes
        self._role_names = role_names
        self._rights_of_everybody = self._auth.rights(None, DEFAULT_NAME)
        self._router = Router(routes)
        self._run_id = str(uuid.uuid4())[:-12]  # prefix of each operation id
        self._operations = itertools.count(1)
        self._document = document(routes, self._auth.schemes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        assert scope["type"] == "http"  # noqa: S101 - the server is configured without the others
        operation_id = f"{self._run_id}{next(self._operations):012x}"
        began_at, unsent = perf_counter(), 0
        try:
            answer = await self._answer(scope, receive)
            if isinstance(answer.body, bytes) and scope.get("failover.route") not in SHARED:
                unsent = self._unsent.add(answer.body)
        except RequestRefused as refusal:
            answer = self._refusal_answer(refusal, operation_id)
        except Exception:  # a request's edge: the caller gets an ErrorResponse
            path = scope["path"][:MAX_LOGGED]
            log.exception("request failed", operation_id=operation_id, path=path)
            answer = _error(500, "InternalError", _INTERNAL_REFUSAL, operation_id)
        operation_id = answer.operation_id or operation_id
        try:
            await self._send(scope, answer, operation_id, send)
        finally:
            self._unsent.remove(unsent)
        route = scope.get("failover.route", "none")
        self._metrics.answered(route, answer.status, perf_counter() - began_at)

    async def _answer(self, scope: Scope, receive: Receive) -> Answer:
        _raise_refusal(scope)
        headers: list[tuple[bytes, bytes]] = scope["headers"]
        method: str = scope["method"]
        page = scope["path"] == "/" and method == "GET"
        if reason := self._browsers.refusal(headers, scope.get("scheme", "http"), page=page):
            raise Forbidden(reason, RESOLUTION)
        raw_path = scope.get("raw_path") or scope["path"].encode()
        found = self._router.find(raw_path)
        route = found.routes.get("GET" if method == "HEAD" else method)
        if route is None:
            return self._without_route(method, found)
        scope["failover.route"] = route.name
        if self._coordinator.stopping and route.right is not None:
            raise _STOPPING_REFUSAL
        rights = await self._identify(scope, found, route)
        if route.right is not None:
            self._router.remember(raw_path, found)
        if self._forwarder is not None and _is_about_a_group(route, found):
            return await self._answer_by_leader(
                self._forwarder, scope, receive, route, found, rights
            )
        await self._authorise(route, found.values, rights)
        text = b""
        if route.body is not None:
            text, again = await self._read_body_of(route, scope, receive)
            if again:
                rights = await self._identify(scope, found, route)
                await self._authorise(route, found.values, rights)
        wait_s = _wait_s(route, scope)
        answering = self._answer_here(scope, route, found, rights, text)
        return await _for_caller(answering, receive, route, scope, waits=wait_s > 0)

    async def _read_body_of(
        self, route: Route, scope: Scope, receive: Receive
    ) -> tuple[bytes, bool]:
        """The body, and whether the caller has to be identified again because the body took long to arrive."""
        admitted_at = perf_counter()
        text = await self._read_body(scope["headers"], receive)
        if len(text) > LONG_BODY:
            async with self._turn:
                await asyncio.sleep(0)
        _raise_refusal(scope)  # the rest of the body did not arrive
        return text, route.for_administrators or perf_counter() - admitted_at > ADMITTED_FOR_S

    async def _answer_here(
        self, scope: Scope, route: Route, found: PathMatch, rights: Rights, text: bytes
    ) -> Answer:
        body = None if route.body is None else _decode_body(route, text)
        call = Call(
            self._coordinator,
            self._clock,
            found.values,
            read_query(route.query, scope["query_string"]),
            body,
            rights,
            self._document,
            self._metrics,
            (header(scope["headers"], b"accept") or b"").decode("latin-1"),
        )
        if route.handler not in LISTS:
            answer: Answer = await route.handler(call)
            return answer
        async with self._lists[route.handler]:
            await asyncio.sleep(0)  # others are served between two lists
            answer = await route.handler(call)
            answer.body = self._encode(answer)
            return answer

    async def _answer_by_leader(  # noqa: PLR0917 - the parts of one request
        self,
        forwarder: Forwarder,
        scope: Scope,
        receive: Receive,
        route: Route,
        found: PathMatch,
        rights: Rights,
    ) -> Answer:
        """Answer a request about a group if this coordinator leads its shard, else forward it to the leader (R19)."""
        text = b""
        if route.body is not None:
            text, again = await self._read_body_of(route, scope, receive)
            if again:
                rights = await self._identify(scope, found, route)
        group = found.values.get("groupId") or _decode_body(route, text).to_model().id
        key = GroupKey(*_tenant_namespace(found.values), group)
        request = _request(scope, text)
        forwarded = header(request.headers, FORWARDED) is not None
        if forwarded:
            forwarder.accept_once(request)

        async def answer_here() -> Answer:
            await self._authorise(route, found.values, rights)
            return await self._answer_here(scope, route, found, rights, text)

        wait_s = _wait_s(route, scope)
        answering = forwarder.answer(key, request, answer_here, wait_s=wait_s, forwarded=forwarded)
        return await _for_caller(answering, receive, route, scope, waits=wait_s > 0)

    def _without_route(self, method: str, found: PathMatch) -> Answer:
        """The answer to OPTIONS; otherwise raise MethodNotAllowed."""
        methods = {*found.routes, "OPTIONS"} | ({"HEAD"} if "GET" in found.routes else set())
        allow = ", ".join(sorted(methods))
        if method == "OPTIONS":
            return Answer(204, headers=((b"allow", allow.encode()),))
        raise MethodNotAllowed(method, allow)

    # -- rights -------------------------------------------------------------------------------

    async def _identify(self, scope: Scope, found: PathMatch, route: Route) -> Rights:
        """The rights of the caller. Raises unless it may call this route in the path's tenant."""
        if route.right is None:
            return self._rights_of_everybody
        rights = self._rights_of_everybody
        if not self._open:
            rights = await self._authenticate(scope, found, route)
        if ON_AUTHENTICATED in scope:
            scope[ON_AUTHENTICATED]()
        rights.check_tenant()
        return rights

    async def _authenticate(self, scope: Scope, found: PathMatch, route: Route) -> Rights:
        """The rights of the caller in the tenant of the path."""
        client = scope.get("client")
        certificate = scope.get(CERTIFICATE)
        if self._forwarder is not None and _is_about_a_group(route, found):
            certificate = self._forwarder.client_of(_request(scope)) or certificate
        caller = await self._auth.caller(
            header(scope["headers"], b"authorization"),
            client[0] if client else "",
            certificate,
        )
        return self._auth.rights(caller, found.values.get("tenantId", DEFAULT_NAME))

    async def _authorise(self, route: Route, values: Any, rights: Rights) -> None:
        """Raise Forbidden unless the access-control list in force grants the right."""
        right = route.right
        if rights.caller is None or right is None:
            return
        if route.for_administrators and rights.administers:
            return
        tenant_namespace = _tenant_namespace(values)
        acl = None
        if "groupId" in values:
            with suppress(NotFound):  # 404 is only for callers with the right
                acl = self._coordinator.group_access(GroupKey(*tenant_namespace, values["groupId"]))
        if acl is None:
            acl = await self._coordinator.access(*tenant_namespace)
        if not rights.may(acl, right):
            raise Forbidden(
                f'"{rights.caller.name}" does not have the right {right.name} for {route.name}.',
                "A caller with ManageAccessControl can grant it."
                if acl is not None
                else "The first access-control list is made by an identity that the coordinator's"
                " setting administrator names.",
            )

    # -- bodies -------------------------------------------------------------------------------

    async def _read_body(self, headers: list[tuple[bytes, bytes]], receive: Receive) -> bytes:
        length = header(headers, b"content-length")
        if length is not None and int(length) > self._max_body_bytes:
            raise self._too_large()
        _check_content_type(header(headers, b"content-type"))
        message = await receive()
        body: bytes = message.get("body", b"")
        while message.get("more_body") and len(body) <= self._max_body_bytes:
            message = await receive()
            body += message.get("body", b"")
        if len(body) > self._max_body_bytes:
            raise self._too_large()
        return body

    def _too_large(self) -> TooLarge:
        return TooLarge(
            f"The body is longer than {self._max_body_bytes} bytes.",
            "Send less, or raise max_body_bytes.",
        )

    # -- answers ------------------------------------------------------------------------------

    def _refusal_answer(self, refusal: RequestRefused, operation_id: str) -> Answer:
        status = next(status for kind, status in STATUSES if isinstance(refusal, kind))
        headers: tuple[tuple[bytes, bytes], ...] = ()
        match refusal:
            case (
                TooSoon(retry_after_s=wait_s)
                | TooManyAttempts(retry_after_s=wait_s)
                | Unavailable(retry_after_s=wait_s)
            ):
                headers = (
                    (b"retry-after", str(max(1, math.ceil(wait_s))).encode()),
                    (b"retry-after-ms", str(max(1, math.ceil(wait_s * 1000))).encode()),
                )
            case Unauthenticated():
                headers = tuple(
                    (b"www-authenticate", f'{scheme} realm="failover-agent"'.encode())
                    for scheme in self._auth.schemes
                )
            case MethodNotAllowed(allow=allow):
                headers = ((b"allow", allow.encode()),)
            case TooLarge():
                headers = ((b"connection", b"close"),)  # the rest of the body is not read
            case _:
                pass
        return _error(status, type(refusal).__name__, refusal, operation_id, headers)

    def _date(self) -> bytes:
        """The Date header, which agents compare their clocks with; formatted once a second."""
        second = int(self._clock().wall.timestamp())
        if second != self._date_header[0]:
            self._date_header = second, formatdate(second, usegmt=True).encode()
        return self._date_header[1]

    def _encode(self, answer: Answer) -> bytes:
        body = b"" if answer.body is None else answer.body
        return body if isinstance(body, bytes) else encode(body, enum_names=self._role_names)

    async def _send(self, scope: Scope, answer: Answer, operation_id: str, send: Send) -> None:
        body = self._encode(answer)
        headers = [(OPERATION_ID, operation_id.encode()), *answer.headers]
        headers += [(b"date", self._date()), *repeated_headers(scope["headers"])]
        if answer.status != 204:  # noqa: PLR2004 - No Content
            headers += [
                (b"content-type", answer.media.encode()),
                (b"content-length", str(len(body)).encode()),
            ]
        await send({"type": "http.response.start", "status": answer.status, "headers": headers})
        if scope["method"] == "HEAD":
            body = b""
        sent = 0
        while len(body) - sent > PART_BYTES:
            part = body[sent : sent + PART_BYTES]
            await send({"type": "http.response.body", "body": part, "more_body": True})
            await asyncio.sleep(0)
            sent += PART_BYTES
        await send({"type": "http.response.body", "body": body[sent:]})


_STOPPING_REFUSAL = Unavailable(
    "The coordinator is stopping.", "Ask another endpoint, or this one after Retry-After."
)
_INTERNAL_REFUSAL = RequestRefused(
    "The coordinator failed to answer.", "Look for the OperationId in its log, and report it."
)


def _tenant_namespace(values: Any) -> tuple[str, str]:
    return values.get("tenantId", DEFAULT_NAME), values.get("namespaceId", DEFAULT_NAME)


def _is_about_a_group(route: Route, found: PathMatch) -> bool:
    """Whether only the leader of the group's shard may answer this request."""
    return "groupId" in found.values or route.handler is create_group


def _request(scope: Scope, body: bytes = b"") -> Request:
    raw_path: bytes = scope.get("raw_path") or scope["path"].encode()
    query: bytes = scope["query_string"]
    target = raw_path + (b"?" + query if query else b"")
    return Request(scope["method"], target, scope["headers"], body, scope.get(CERTIFICATE))


def _decode_body(route: Route, text: bytes) -> Any:
    """The body of a request in the route's shape. Raises Invalid."""
    assert route.body is not None  # noqa: S101 - the callers have checked it
    try:
        return decode(route.body, text)
    except BodyError as error:
        raise Invalid(f"{error}.", f"{route.body.__name__} is in /openapi.json.") from None


def _raise_refusal(scope: Scope) -> None:
    """Raise the refusal that the connection has put into the scope, if there is one."""
    if REFUSAL in scope:
        raise scope.pop(REFUSAL)  # kept there it would form a reference cycle


def _error(
    status: int,
    kind: str,
    refusal: RequestRefused,
    operation_id: str,
    headers: tuple[tuple[bytes, bytes], ...] = (),
) -> Answer:
    body = ErrorResponse(
        operation_id=operation_id,
        error=kind,
        reason=refusal.reason,
        resolution=refusal.resolution,
    )
    return Answer(status, body, headers)


def _check_content_type(value: bytes | None) -> None:
    """Raise UnsupportedContent unless it is JSON in UTF-8, or absent."""
    if value is not None and not is_json(value):
        raise UnsupportedContent(
            f"The body is {value.decode('latin-1')[:100]}.", "Send application/json in UTF-8."
        )


def _hung_up(route: Route, scope: Scope) -> Callable[[], bool]:
    """Whether the caller has hung up, so that the call must not be carried out any more."""
    return never if route.may_come_late else scope.get(HUNG_UP, never)


def _for_caller(
    answering: Answering, receive: Receive, route: Route, scope: Scope, *, waits: bool
) -> Answering:
    """The answer. A blocking read, a change, or a list that waits for its turn is cancelled if the caller hangs up."""
    if waits or not route.may_come_late or route.handler in LISTS:
        return while_connected(answering, receive, _hung_up(route, scope))
    return answering


def _wait_s(route: Route, scope: Scope) -> float:
    """How long a request may block: a status read that waits for a change."""
    if route.handler is not get_status:
        return 0.0
    wanted = read_query(route.query, scope["query_string"])
    return float(wanted["wait"]) if wanted["after"] is not None else 0.0
