"""The handlers of the group API's routes (route_table.py).

A handler receives a ``Call``, whose body, query and rights have been checked. It returns an ``Answer``, or raises a
refusal. Of HTTP the handlers know only status codes and the names of headers.
"""

import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Protocol

from msgspec import Struct
from msgspec.json import encode as encode_json

from agent import __version__
from agent.coordinator.auth import ClientCertificate, Rights
from agent.coordinator.metrics import Metrics
from agent.coordinator.routes import DEFAULT_NAME
from agent.coordinator.service import Coordinator
from agent.core.group_state import (
    AddSession,
    Lift,
    ReceiveHeartbeat,
    ReleaseRole,
    RemoveSession,
    Requester,
    SetOverride,
)
from agent.errors import Conflict, Forbidden, NotFound, Unavailable
from agent.model import TICKS_PER_SECOND, AccessList, GroupKey, Instant, Right
from agent.schema import access, api, failsafe_api

READY_RETRY_S = 1.0

FORWARDED = b"failover-forwarded"
"""Header of a request that another coordinator has forwarded; its value is the request's number. Such a request is
not forwarded again. The answer repeats the header, so it cannot be taken for the answer to another request."""

REQUEST = api.REQUEST_HEADER.encode()
_NUMBER = re.compile(rb"[0-9a-f-]{1,64}")


@dataclass(slots=True)  # frozen costs two microseconds each, thousands of times a second
class Call:
    """A request whose path, query, body and rights have been checked. Treated as immutable.

    Attributes:
        values: the path parameters.
        query: the query parameters of the route, with defaults.
        body: of the route's shape; None if it has none.
        rights: what the caller may do in the path's tenant.
    """

    coordinator: Coordinator
    clock: Callable[[], Instant]
    values: Mapping[str, str]
    query: Mapping[str, Any]
    body: Any
    rights: Rights
    document: bytes
    metrics: Metrics
    accept: str

    @property
    def tenant_namespace(self) -> tuple[str, str]:
        """The tenant, and the namespace in it."""
        values = self.values
        return values.get("tenantId", DEFAULT_NAME), values.get("namespaceId", DEFAULT_NAME)

    @property
    def key(self) -> GroupKey:
        """The key of the group in the path."""
        return GroupKey(*self.tenant_namespace, self.values["groupId"])

    async def may(self, key: GroupKey, right: Right) -> bool:
        """Whether the access-control list in force gives the caller a right on a group."""
        acl = self.coordinator.group_access(key)
        if acl is None:
            acl = await self.coordinator.access(key.tenant, key.namespace)
        return self.rights.may(acl, right)

    async def requester(self, session_id: str) -> Requester | None:
        """The caller that acts for a session; None without authentication."""
        caller = self.rights.caller
        if caller is None:
            return None
        owner = self.coordinator.owner(self.key, session_id)
        manages = owner not in {None, caller.identity} and await self.may(self.key, Right.MANAGE)
        return Requester(caller.identity, manages)


@dataclass(slots=True)  # as above
class Answer:
    """An answer to send. Treated as immutable. ``body``: a shape, several, JSON as bytes, or None.

    Attributes:
        operation_id: the operation id of the coordinator that answered a forwarded request.
    """

    status: int = 200
    body: Struct | Sequence[Struct] | bytes | None = None
    headers: tuple[tuple[bytes, bytes], ...] = field(default=())
    media: str = "application/json"
    operation_id: str | None = None


@dataclass(slots=True)  # as above
class Request:
    """A request as it was received. Treated as immutable.

    Attributes:
        target: path and query.
        certificate: the client certificate of the caller's connection, or None.
    """

    method: str
    target: bytes
    headers: list[tuple[bytes, bytes]]
    body: bytes
    certificate: ClientCertificate | None = None


def header(headers: Sequence[tuple[bytes, bytes]], wanted: bytes) -> bytes | None:
    """The value of the first header with this name, given in lower case; None without one."""
    for name, value in headers:
        if name == wanted:
            return value
    return None


def repeated_headers(headers: Sequence[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """The headers that the answer repeats: FORWARDED and REQUEST, if the request had them."""
    return [one for one in headers if one[0] in {FORWARDED, REQUEST} and _NUMBER.fullmatch(one[1])]


class Forwarder(Protocol):
    """Sends requests to the coordinator that leads a group: forwarding.py."""

    def client_of(self, request: Request) -> ClientCertificate | None: ...
    def accept_once(self, request: Request) -> None: ...
    async def answer(
        self,
        key: GroupKey,
        request: Request,
        answer_here: Callable[[], Awaitable[Answer]],
        *,
        wait_s: float,
        forwarded: bool,
    ) -> Answer: ...


def _total_count(number: int) -> tuple[tuple[bytes, bytes], ...]:
    return ((b"total-count", str(number).encode()),)


# -- the service itself -----------------------------------------------------------------------


async def index(call: Call) -> Answer:
    """Links to the parts of the service."""
    metrics_link = b',"Metrics":"/metrics"' if b'"/metrics":' in call.document else b""
    return Answer(
        body=b'{"Name":"failover-agent coordinator","Version":"%s","Links":{"Api":"/api/v1/'
        b'clientfailover","OpenApi":"/openapi.json","Health":"/healthz","Readiness":"/readyz"%s}}'
        % (__version__.encode(), metrics_link)
    )


async def healthz(_call: Call) -> Answer:
    """Liveness: the event loop runs."""
    return Answer(body=b'{"Status":"ok"}')


async def readyz(call: Call) -> Answer:
    """Readiness: whether requests can be served."""
    readiness_problem = await call.coordinator.readiness_problem()
    if readiness_problem is not None:
        raise Unavailable(f"Not ready: {readiness_problem}.", "Wait.", retry_after_s=READY_RETRY_S)
    return Answer(body=encode_json({"Status": "ok", **call.coordinator.report()}))


async def metrics(call: Call) -> Answer:
    """The metrics, for Prometheus."""
    page, media = await call.metrics.page(call.coordinator, call.clock(), call.accept)
    return Answer(body=page, media=media)


async def openapi(call: Call) -> Answer:
    """The OpenAPI document."""
    return Answer(body=call.document)


async def get_version(_call: Call) -> Answer:
    """The version of the service."""
    return Answer(body=api.Version(version=__version__))


# -- groups -----------------------------------------------------------------------------------


async def list_groups(call: Call) -> Answer:
    """The groups that the caller may read, sorted by id."""
    total, groups = await call.coordinator.list_groups(
        *call.tenant_namespace, call.query["skip"], call.query["count"], call.rights.may_read
    )
    return Answer(
        body=[api.GroupConfiguration.from_model(g) for g in groups], headers=_total_count(total)
    )


async def create_group(call: Call) -> Answer:
    """Create a group, or return the existing one with the same configuration.

    A caller without the right to read the existing group learns nothing of its configuration, not even
    whether it agrees.
    """
    config = call.body.to_model()
    key = GroupKey(*call.tenant_namespace, config.id)
    try:
        known, created = await call.coordinator.create_group(key, config)
    except Conflict:
        await _refuse_unreadable(call, key)
        raise
    if not created:
        await _refuse_unreadable(call, key)
    return Answer(201 if created else 200, api.GroupConfiguration.from_model(known))


async def _refuse_unreadable(call: Call, key: GroupKey) -> None:
    with suppress(NotFound):
        if not await call.may(key, Right.READ):
            raise Forbidden(
                f'Group "{key.group}" exists, and the caller does not have the right READ on it.',
                "Choose another Id; a caller with ManageAccessControl can grant the right.",
            )


async def get_group(call: Call) -> Answer:
    """A group's configuration."""
    return Answer(body=api.GroupConfiguration.from_model(call.coordinator.group(call.key)))


async def delete_group(call: Call) -> Answer:
    """Remove a group."""
    await call.coordinator.delete_group(call.key)
    return Answer(204)


async def get_status(call: Call) -> Answer:
    """The status: now, or after the next change."""
    after = call.query["after"]
    if after is None:
        status = call.coordinator.status(call.key)
    else:
        status = await call.coordinator.wait_status(call.key, after, call.query["wait"])
    return Answer(body=api.GroupStatus.from_model(status))


async def get_history(call: Call) -> Answer:
    """The tenures of primaries, newest first."""
    skip, count = call.query["skip"], call.query["count"]
    total, entries = await call.coordinator.history(call.key, skip, count)
    return Answer(
        body=[api.HistoryEntry.from_model(e) for e in entries], headers=_total_count(total)
    )


async def lift_failsafe(call: Call) -> Answer:
    """Lift the restriction of a group, after an operator has made sure that no member is active."""
    body: failsafe_api.LiftRequest = call.body
    caller = call.rights.caller
    by = Requester(caller.identity, manages=True) if caller is not None else None
    await call.coordinator.apply(call.key, Lift(int(body.epoch), body.reason, by))
    return Answer(204)


async def get_group_access(call: Call) -> Answer:
    """The access-control list in force for the group: its own, or its namespace's if it has none."""
    acl = call.coordinator.group_access(call.key)
    if acl is None:
        acl = await call.coordinator.access(*call.tenant_namespace)
    return Answer(body=access.AccessControlList.from_model(acl or AccessList()))


async def put_group_access(call: Call) -> Answer:
    """Give the group an access-control list of its own."""
    acl = call.body.to_model()
    call.rights.check_manager_remains(acl)
    await call.coordinator.set_group_access(call.key, acl)
    return Answer(204)


async def delete_group_access(call: Call) -> Answer:
    """Remove the group's own access-control list: its namespace's is in force again."""
    await call.coordinator.set_group_access(call.key, None)
    return Answer(204)


async def get_access(call: Call) -> Answer:
    """The access-control list of a namespace's groups; empty if none was ever set."""
    acl = await call.coordinator.access(*call.tenant_namespace)
    return Answer(body=access.AccessControlList.from_model(acl or AccessList()))


async def put_access(call: Call) -> Answer:
    """Replace the access-control list of a namespace's groups."""
    acl = call.body.to_model()
    call.rights.check_manager_remains(acl)
    await call.coordinator.set_access(*call.tenant_namespace, acl)
    return Answer(204)


async def delete_access(call: Call) -> Answer:
    """Remove the access-control list of a namespace's groups. Only administrators may do that."""
    if not call.rights.administers:
        raise Forbidden(
            "Without its list, a namespace is open to every known caller: only an administrator can"
            " delete it.",
            "Replace it by PUT, or ask an identity of the coordinator's setting administrator.",
        )
    await call.coordinator.set_access(*call.tenant_namespace, None)
    return Answer(204)


# -- sessions ---------------------------------------------------------------------------------


async def list_sessions(call: Call) -> Answer:
    """The sessions of a group, sorted by id."""
    sessions = call.coordinator.sessions(call.key)
    return Answer(
        body=[api.ClientSession.from_model(s) for s in sessions],
        headers=_total_count(len(sessions)),
    )


async def create_session(call: Call) -> Answer:
    """Register a session, or return the existing one with the same configuration."""
    body: api.SessionRequest = call.body
    by = await call.requester(body.id)
    registration = AddSession(body.to_model(), by, body.instance, body.failsafe_url)
    view, created = await call.coordinator.add_session(call.key, registration)
    return Answer(201 if created else 200, api.ClientSession.from_model(view))


async def get_session(call: Call) -> Answer:
    """One session."""
    view = call.coordinator.session(call.key, call.values["sessionId"])
    return Answer(body=api.ClientSession.from_model(view))


async def delete_session(call: Call) -> Answer:
    """Delete a session. Refuse if it is active and the caller asked to delete only an inactive one."""
    session_id = call.values["sessionId"]
    by = await call.requester(session_id)
    removal = RemoveSession(session_id, by, only_inactive=call.query["inactive"])
    await call.coordinator.apply(call.key, removal)
    return Answer(204)


async def post_heartbeat(call: Call) -> Answer:
    """Receive a heartbeat and answer with the role of the session."""
    body: api.HeartbeatRequest = call.body
    session_id = call.values["sessionId"]
    beat = ReceiveHeartbeat(
        session_id,
        body.score,
        body.last_data,
        body.instance,
        body.epoch,
        await call.requester(session_id),
        body.failsafe_url,
        body.holds,
        body.failsafe_revision,
        body.promised is True,
    )
    answer = await call.coordinator.beat(call.key, beat)
    return Answer(body=api.HeartbeatResponse.from_model(answer))


async def set_override(call: Call) -> Answer:
    """Set or remove the role override of a session."""
    ticks = call.body.expiration_period
    until = None
    if ticks is not None:
        until = call.clock().wall + timedelta(microseconds=ticks / 10)
    session_id = call.values["sessionId"]
    await call.coordinator.apply(call.key, SetOverride(session_id, call.body.value.member, until))
    record = call.coordinator.session(call.key, session_id).record
    return Answer(body=api.RoleOverrideResponse.from_model(record))


async def release_role(call: Call) -> Answer:
    """Receive the release of a tenure, so that the next session may be promoted at once."""
    body: api.ReleaseRequest = call.body
    session_id = call.values["sessionId"]
    await call.coordinator.apply(
        call.key,
        ReleaseRole(
            session_id,
            int(body.epoch),
            instance=body.instance,
            why=body.reason or "released",
            hold_off_s=(body.hold_off_period or 0) / TICKS_PER_SECOND,
            last_data=body.last_data,
            by=await call.requester(session_id),
            held=body.held is not False,
        ),
    )
    return Answer(204)
