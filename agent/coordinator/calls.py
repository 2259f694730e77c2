"""The handlers and the route table of the group API.

api.py dispatches from ``ROUTES`` and openapi.py builds its document from it. A handler gets a ``Call``
whose body, query and rights have been checked, and returns an ``Answer``; refusals are
raised. Nothing here knows HTTP beyond status codes and the names of headers.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from msgspec import Struct

from agent import __version__
from agent.coordinator.metrics import Metrics
from agent.coordinator.routes import CLOUD, DEFAULT_NAME, Parameter, Result, Route
from agent.coordinator.service import LONGEST_WAIT_S, Coordinator
from agent.core.group_state import ReceiveHeartbeat, ReleaseRole, RemoveSession, SetOverride
from agent.errors import Unavailable
from agent.model import TICKS_PER_SECOND, AccessList, GroupKey, Instant, Right
from agent.schema import access, api
from agent.schema.scalars import parse_time_span
from agent.schema.values import whole

MOST_LISTED = 1000
"""Largest page size, some hundred kilobytes: building a page delays heartbeats."""

LISTED = 100
"""Default page size, as in v1."""

MOST_SKIPPED = 2**53 - 1
"""The largest integer that every JSON reader keeps exactly."""

READY_RETRY_S = 1.0


@dataclass(slots=True)  # frozen costs two microseconds each, thousands of times a second
class Call:
    """A request whose path, query, body and rights have been checked. Treated as immutable.

    Attributes:
        values: the path parameters.
        query: the query parameters of the route, with defaults.
        body: of the route's shape; None if it has none.
        may_read: whether the caller may read a group with this list.
    """

    coordinator: Coordinator
    clock: Callable[[], Instant]
    values: Mapping[str, str]
    query: Mapping[str, Any]
    body: Any
    may_read: Callable[[AccessList | None], bool]
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


@dataclass(slots=True)  # as above
class Answer:
    """An answer to send. Treated as immutable. ``body``: a shape, several, JSON as bytes, or None."""

    status: int = 200
    body: Struct | Sequence[Struct] | bytes | None = None
    headers: tuple[tuple[bytes, bytes], ...] = field(default=())
    media: str = "application/json"


def _total_count(number: int) -> tuple[tuple[bytes, bytes], ...]:
    return ((b"total-count", str(number).encode()),)


# -- the service itself -----------------------------------------------------------------------


async def index(_call: Call) -> Answer:
    """Links to the parts of the service."""
    return Answer(
        body=b'{"Name":"failover-agent coordinator","Version":"%s","Links":{"Api":"/api/v1/'
        b'clientfailover","OpenApi":"/openapi.json","Health":"/healthz","Readiness":"/readyz","Metrics":"/metrics"}}'
        % __version__.encode()
    )


async def healthz(_call: Call) -> Answer:
    """Liveness: the event loop runs."""
    return Answer(body=b'{"Status":"ok"}')


async def readyz(call: Call) -> Answer:
    """Readiness: whether requests can be served."""
    readiness_problem = await call.coordinator.readiness_problem()
    if readiness_problem is not None:
        raise Unavailable(f"Not ready: {readiness_problem}.", "Wait.", retry_after_s=READY_RETRY_S)
    return Answer(body=b'{"Status":"ok"}')


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
    total, groups = call.coordinator.groups(
        *call.tenant_namespace, call.query["skip"], call.query["count"], call.may_read
    )
    return Answer(
        body=[api.GroupConfiguration.from_model(g) for g in groups], headers=_total_count(total)
    )


async def create_group(call: Call) -> Answer:
    """Create a group, or return the existing one with the same configuration."""
    config = call.body.to_model()
    known, created = await call.coordinator.create_group(
        GroupKey(*call.tenant_namespace, config.id), config
    )
    return Answer(201 if created else 200, api.GroupConfiguration.from_model(known))


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


async def get_group_access(call: Call) -> Answer:
    """The group's own access-control list; without one, its namespace's, which is in force."""
    acl = call.coordinator.group_access(call.key)
    if acl is None:
        acl = await call.coordinator.access(*call.tenant_namespace)
    return Answer(body=access.AccessControlList.from_model(acl or AccessList()))


async def put_group_access(call: Call) -> Answer:
    """Give the group an access-control list of its own."""
    await call.coordinator.set_group_access(call.key, call.body.to_model())
    return Answer(204)


async def get_access(call: Call) -> Answer:
    """The access-control list of a namespace's groups; empty if none was ever set."""
    acl = await call.coordinator.access(*call.tenant_namespace)
    return Answer(body=access.AccessControlList.from_model(acl or AccessList()))


async def put_access(call: Call) -> Answer:
    """Replace the access-control list of a namespace's groups."""
    await call.coordinator.set_access(*call.tenant_namespace, call.body.to_model())
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
    view, created = await call.coordinator.add_session(call.key, call.body.to_model())
    return Answer(201 if created else 200, api.ClientSession.from_model(view))


async def get_session(call: Call) -> Answer:
    """One session."""
    view = call.coordinator.session(call.key, call.values["sessionId"])
    return Answer(body=api.ClientSession.from_model(view))


async def delete_session(call: Call) -> Answer:
    """Delete a session."""
    await call.coordinator.apply(call.key, RemoveSession(call.values["sessionId"]))
    return Answer(204)


async def post_heartbeat(call: Call) -> Answer:
    """Receive a heartbeat and answer with the role of the session."""
    body: api.HeartbeatRequest = call.body
    beat = ReceiveHeartbeat(
        call.values["sessionId"],
        body.failover_score,
        body.last_data_processed_time,
        body.instance,
        whole(body.epoch),
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
    """Receive the release of a tenure: the next session may be promoted now."""
    body: api.ReleaseRequest = call.body
    await call.coordinator.apply(
        call.key,
        ReleaseRole(
            call.values["sessionId"],
            int(body.epoch),
            instance=body.instance,
            why=body.reason or "released",
            hold_off_s=(body.hold_off_period or 0) / TICKS_PER_SECOND,
            last_data=body.last_data_processed_time,
        ),
    )
    return Answer(204)


# -- the list ---------------------------------------------------------------------------------


def _integer(low: int, high: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not (text.isascii() and text.isdecimal() and len(text) <= len(str(high))):
            raise ValueError(f"it must be an integer from {low} to {high}")
        number = int(text)
        if not low <= number <= high:
            raise ValueError(f"it must be from {low} to {high}")
        return number

    return read


def _read_wait(text: str) -> float:
    ticks = parse_time_span(text)
    if ticks < 0:
        raise ValueError("it must not be negative")
    return ticks / TICKS_PER_SECOND


def _integer_parameter(name: str, high: int, default: int | None, description: str) -> Parameter:
    schema: dict[str, Any] = {"type": "integer", "minimum": 0, "maximum": high}
    if default is not None:
        schema["default"] = default
    return Parameter(name, schema, description, _integer(0, high), default)


PAGE = (
    _integer_parameter("skip", MOST_SKIPPED, 0, "How many to leave out at the beginning."),
    _integer_parameter("count", MOST_LISTED, LISTED, f"How many to list, at most {MOST_LISTED}."),
)
WAIT = (
    _integer_parameter(
        "after",
        MOST_SKIPPED,
        None,
        "A Revision: answer once the group's is past it, or at the end of the wait.",
    ),
    Parameter(
        "wait",
        {
            "type": "string",
            "pattern": r"^([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\.[0-9]{1,7})?$",
            "default": "00:00:00",
        },
        f"A time-span: how long to wait for that; at most {LONGEST_WAIT_S:g} s are waited.",
        _read_wait,
        0.0,
    ),
)

GROUP = "/groups/{groupId}"
SESSIONS = GROUP + "/clientsessions"
SESSION = SESSIONS + "/{sessionId}"
ACCESS = GROUP + "/accesscontrol"
NAMESPACE_ACCESS = "/accesscontrol/clientfailover/groups"

_JSON = "application/json"


def _service_route(
    path: str, handler: Callable[..., Any], summary: str, meaning: str, media: str = _JSON
) -> Route:
    """A route outside the group API, open to every caller."""
    results = (Result(200, meaning, media=media),)
    return Route("GET", path, handler, summary, results, right=None, bases=())


ROUTES: tuple[Route, ...] = (
    _service_route("/", index, "Where to find what", "Links"),
    _service_route("/healthz", healthz, "Whether the process is up", "It is"),
    _service_route("/readyz", readyz, "Whether requests can be obeyed", "They can"),
    _service_route("/metrics", metrics, "Numbers for Prometheus", "All of them", "text/plain"),
    _service_route("/openapi.json", openapi, "This description", "OpenAPI 3.1"),
    Route(
        "GET",
        "",
        get_version,
        "The version of the service",
        (Result(200, "The version", api.Version),),
    ),
    Route(
        "GET",
        "/groups",
        list_groups,
        "List groups",
        (Result(200, "A page of groups", api.GroupConfiguration, is_list=True),),
        query=PAGE,
    ),
    Route(
        "POST",
        "/groups",
        create_group,
        "Create a group",
        (
            Result(201, "Created", api.GroupConfiguration),
            Result(200, "It existed, with the same configuration", api.GroupConfiguration),
        ),
        right=Right.WRITE,
        body=api.GroupRequest,
        refusals=(409,),
    ),
    Route(
        "GET",
        GROUP,
        get_group,
        "Read a group",
        (Result(200, "The group", api.GroupConfiguration),),
        refusals=(404,),
    ),
    Route(
        "DELETE",
        GROUP,
        delete_group,
        "Delete a group without active sessions",
        (Result(204, "Deleted"),),
        right=Right.DELETE,
        refusals=(404, 409),
    ),
    Route(
        "GET",
        GROUP + "/status",
        get_status,
        "Read who is primary, or wait for a change",
        (Result(200, "The status", api.GroupStatus),),
        refusals=(404,),
        query=WAIT,
    ),
    Route(
        "GET",
        GROUP + "/history",
        get_history,
        "List the tenures of primaries, newest first",
        (Result(200, "A page of tenures", api.HistoryEntry, is_list=True),),
        refusals=(404,),
        query=PAGE,
    ),
    Route(
        "GET",
        ACCESS,
        get_group_access,
        "Read the access-control list of a group",
        (Result(200, "The list in force", access.AccessControlList),),
        refusals=(404,),
    ),
    Route(
        "PUT",
        ACCESS,
        put_group_access,
        "Replace the access-control list of a group",
        (Result(204, "Replaced"),),
        right=Right.MANAGE,
        body=access.AccessControlRequest,
        refusals=(404,),
    ),
    Route(
        "GET",
        NAMESPACE_ACCESS,
        get_access,
        "Read the access-control list of a namespace's groups",
        (Result(200, "The list", access.AccessControlList),),
        bases=(CLOUD,),
    ),
    Route(
        "PUT",
        NAMESPACE_ACCESS,
        put_access,
        "Replace the access-control list of a namespace's groups",
        (Result(204, "Replaced"),),
        right=Right.MANAGE,
        body=access.AccessControlRequest,
        bases=(CLOUD,),
    ),
    Route(
        "GET",
        SESSIONS,
        list_sessions,
        "List the sessions of a group",
        (Result(200, "All sessions", api.ClientSession, is_list=True),),
        refusals=(404,),
    ),
    Route(
        "POST",
        SESSIONS,
        create_session,
        "Join a group",
        (
            Result(201, "Created", api.ClientSession),
            Result(200, "It existed, with the same configuration", api.ClientSession),
        ),
        right=Right.WRITE,
        body=api.SessionRequest,
        refusals=(404, 409),
    ),
    Route(
        "GET",
        SESSION,
        get_session,
        "Read a session",
        (Result(200, "The session", api.ClientSession),),
        refusals=(404,),
    ),
    Route(
        "DELETE",
        SESSION,
        delete_session,
        "Leave a group",
        (Result(204, "Deleted"),),
        right=Right.DELETE,
        refusals=(404,),
    ),
    Route(
        "POST",
        SESSION + "/heartbeat",
        post_heartbeat,
        "Send a heartbeat",
        (Result(200, "The role from now on", api.HeartbeatResponse),),
        right=Right.WRITE,
        body=api.HeartbeatRequest,
        refusals=(404, 409, 429),
    ),
    Route(
        "POST",
        SESSION + "/roleoverride",
        set_override,
        "Override the choice of the primary",
        (Result(200, "The override", api.RoleOverrideResponse),),
        right=Right.WRITE,
        body=api.RoleOverrideRequest,
        refusals=(404,),
    ),
    Route(
        "POST",
        SESSION + "/release",
        release_role,
        "Give the role of primary back",
        (Result(204, "It is released"),),
        right=Right.WRITE,
        body=api.ReleaseRequest,
        refusals=(404,),
    ),
)
