"""Every call of the group API: what it asks of the coordinator, and how it is described.

``ROUTES`` is the one list: api.py dispatches from it and openapi.py describes from it. A handler gets
a ``Call`` whose body, query and rights have been checked, and returns an ``Answer``; refusals are
raised. Nothing here knows HTTP beyond status codes and the names of headers.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from pydantic import BaseModel

from agent import __version__
from agent.coordinator.metrics import Metrics
from agent.coordinator.routes import CLOUD, DEFAULT_PLACE, Parameter, Result, Route
from agent.coordinator.service import LONGEST_WAIT_S, Coordinator
from agent.core.group_state import ReceiveHeartbeat, ReleaseRole, RemoveSession, SetOverride
from agent.errors import Unavailable
from agent.model import TICKS_PER_SECOND, AccessList, GroupKey, Instant, Right
from agent.wire import scalars, shapes

MOST_LISTED = 1000
"""The largest page of a list, some hundred kilobytes: making it keeps heartbeats waiting."""

LISTED = 100
"""The page of whoever does not say: the default of v1."""

MOST_SKIPPED = 2**53 - 1
"""The largest integer that every JSON reader keeps exactly."""

READY_RETRY_S = 1.0


@dataclass(slots=True)  # frozen costs two microseconds each, thousands of times a second
class Call:
    """One call, checked. Not changed by anybody.

    Attributes:
        values: what stands in the path.
        query: every query parameter of the route.
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
    def place(self) -> tuple[str, str]:
        """Tenant and namespace."""
        values = self.values
        return values.get("tenantId", DEFAULT_PLACE), values.get("namespaceId", DEFAULT_PLACE)

    @property
    def key(self) -> GroupKey:
        """The group in the path."""
        return GroupKey(*self.place, self.values["groupId"])


@dataclass(slots=True)  # as above
class Answer:
    """What to answer. Not changed by anybody. ``body`` is a shape, several, JSON as bytes, or nothing."""

    status: int = 200
    body: BaseModel | Sequence[BaseModel] | bytes | None = None
    headers: tuple[tuple[bytes, bytes], ...] = field(default=())
    media: str = "application/json"


def _total(number: int) -> tuple[tuple[bytes, bytes], ...]:
    return ((b"total-count", str(number).encode()),)


# -- the service itself -----------------------------------------------------------------------


async def index(_call: Call) -> Answer:
    """Where to find what."""
    return Answer(
        body=b'{"Name":"failover-agent coordinator","Version":"%s","Links":{"Api":"/api/v1/'
        b'clientfailover","OpenApi":"/openapi.json","Health":"/healthz","Readiness":"/readyz","Metrics":"/metrics"}}'
        % __version__.encode()
    )


async def healthz(_call: Call) -> Answer:
    """That the process is up and its loop turns: it has answered."""
    return Answer(body=b'{"Status":"ok"}')


async def readyz(call: Call) -> Answer:
    """Whether requests can be obeyed."""
    trouble = await call.coordinator.trouble()
    if trouble is not None:
        raise Unavailable(f"Not ready: {trouble}.", "Wait.", retry_after_s=READY_RETRY_S)
    return Answer(body=b'{"Status":"ok"}')


async def metrics(call: Call) -> Answer:
    """The numbers, for Prometheus."""
    page, media = await call.metrics.page(call.coordinator, call.clock(), call.accept)
    return Answer(body=page, media=media)


async def openapi(call: Call) -> Answer:
    """The description of all this."""
    return Answer(body=call.document)


async def get_version(_call: Call) -> Answer:
    """The version of the service."""
    return Answer(body=shapes.Version(Version=__version__))


# -- groups -----------------------------------------------------------------------------------


async def list_groups(call: Call) -> Answer:
    """The groups that the caller may read, by id."""
    total, groups = call.coordinator.groups(
        *call.place, call.query["skip"], call.query["count"], call.may_read
    )
    return Answer(body=[shapes.GroupConfiguration.of(g) for g in groups], headers=_total(total))


async def create_group(call: Call) -> Answer:
    """Make a group, or find that it is there."""
    config = call.body.to_model()
    known, created = await call.coordinator.create_group(GroupKey(*call.place, config.id), config)
    return Answer(201 if created else 200, shapes.GroupConfiguration.of(known))


async def get_group(call: Call) -> Answer:
    """A group's configuration."""
    return Answer(body=shapes.GroupConfiguration.of(call.coordinator.group(call.key)))


async def delete_group(call: Call) -> Answer:
    """Remove a group."""
    await call.coordinator.delete_group(call.key)
    return Answer(204)


async def get_status(call: Call) -> Answer:
    """Who is primary: now, or once it has changed."""
    after = call.query["after"]
    if after is None:
        status = call.coordinator.status(call.key)
    else:
        status = await call.coordinator.wait_status(call.key, after, call.query["wait"])
    return Answer(body=shapes.GroupStatus.of(status))


async def get_history(call: Call) -> Answer:
    """Who was primary, and why, newest first."""
    skip, count = call.query["skip"], call.query["count"]
    total, entries = await call.coordinator.history(call.key, skip, count)
    return Answer(body=[shapes.HistoryEntry.of(e) for e in entries], headers=_total(total))


async def get_group_access(call: Call) -> Answer:
    """The group's own access-control list; without one, its namespace's, which is in force."""
    acl = call.coordinator.group_access(call.key)
    if acl is None:
        acl = await call.coordinator.access(*call.place)
    return Answer(body=shapes.AccessControlList.of(acl or AccessList()))


async def put_group_access(call: Call) -> Answer:
    """Give the group an access-control list of its own."""
    await call.coordinator.set_group_access(call.key, call.body.to_model())
    return Answer(204)


async def get_access(call: Call) -> Answer:
    """The access-control list of a namespace's groups; empty if none was ever set."""
    acl = await call.coordinator.access(*call.place)
    return Answer(body=shapes.AccessControlList.of(acl or AccessList()))


async def put_access(call: Call) -> Answer:
    """Replace the access-control list of a namespace's groups."""
    await call.coordinator.set_access(*call.place, call.body.to_model())
    return Answer(204)


# -- sessions ---------------------------------------------------------------------------------


async def list_sessions(call: Call) -> Answer:
    """The sessions of a group, by id."""
    sessions = call.coordinator.sessions(call.key)
    return Answer(
        body=[shapes.ClientSession.of(s) for s in sessions], headers=_total(len(sessions))
    )


async def create_session(call: Call) -> Answer:
    """Join a group, or find that one has joined."""
    view, created = await call.coordinator.add_session(call.key, call.body.to_model())
    return Answer(201 if created else 200, shapes.ClientSession.of(view))


async def get_session(call: Call) -> Answer:
    """One session."""
    view = call.coordinator.session(call.key, call.values["sessionId"])
    return Answer(body=shapes.ClientSession.of(view))


async def delete_session(call: Call) -> Answer:
    """Leave a group."""
    await call.coordinator.apply(call.key, RemoveSession(call.values["sessionId"]))
    return Answer(204)


async def post_heartbeat(call: Call) -> Answer:
    """Say that one is alive, and hear which role one has."""
    body: shapes.HeartbeatRequest = call.body
    beat = ReceiveHeartbeat(
        call.values["sessionId"],
        body.FailoverScore,
        body.LastDataProcessedTime,
        body.Instance,
        body.Epoch,
    )
    answer = await call.coordinator.beat(call.key, beat)
    return Answer(body=shapes.HeartbeatResponse.of(answer))


async def set_override(call: Call) -> Answer:
    """Make a session primary by hand, or stop that."""
    ticks = call.body.ExpirationPeriod
    until = None
    if ticks is not None:
        until = call.clock().wall + timedelta(microseconds=ticks / 10)
    session_id = call.values["sessionId"]
    await call.coordinator.apply(call.key, SetOverride(session_id, call.body.Value, until))
    record = call.coordinator.session(call.key, session_id).record
    return Answer(body=shapes.RoleOverrideResponse.of(record))


async def release_role(call: Call) -> Answer:
    """Say that one has demoted: the next one may be promoted now."""
    body: shapes.ReleaseRequest = call.body
    await call.coordinator.apply(
        call.key,
        ReleaseRole(
            call.values["sessionId"],
            body.Epoch,
            instance=body.Instance,
            why=body.Reason or "released",
            hold_off_s=(body.HoldOffPeriod or 0) / TICKS_PER_SECOND,
            last_data=body.LastDataProcessedTime,
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


def _wait(text: str) -> float:
    ticks = scalars.parse_time_span(text)
    if ticks < 0:
        raise ValueError("it must not be negative")
    return ticks / TICKS_PER_SECOND


def _whole(name: str, high: int, default: int | None, description: str) -> Parameter:
    schema: dict[str, Any] = {"type": "integer", "minimum": 0, "maximum": high}
    if default is not None:
        schema["default"] = default
    return Parameter(name, schema, description, _integer(0, high), default)


PAGE = (
    _whole("skip", MOST_SKIPPED, 0, "How many to leave out at the beginning."),
    _whole("count", MOST_LISTED, LISTED, f"How many to list, at most {MOST_LISTED}."),
)
WAIT = (
    _whole(
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
        _wait,
        0.0,
    ),
)

GROUP = "/groups/{groupId}"
SESSIONS = GROUP + "/clientsessions"
SESSION = SESSIONS + "/{sessionId}"
ACCESS = GROUP + "/accesscontrol"
NAMESPACE_ACCESS = "/accesscontrol/clientfailover/groups"

_JSON = "application/json"


def _plain(
    path: str, handler: Callable[..., Any], summary: str, meaning: str, media: str = _JSON
) -> Route:
    """A route that is no part of the group API, and that anybody may call."""
    results = (Result(200, meaning, media=media),)
    return Route("GET", path, handler, summary, results, right=None, bases=())


ROUTES: tuple[Route, ...] = (
    _plain("/", index, "Where to find what", "Links"),
    _plain("/healthz", healthz, "Whether the process is up", "It is"),
    _plain("/readyz", readyz, "Whether requests can be obeyed", "They can"),
    _plain("/metrics", metrics, "Numbers for Prometheus", "All of them", "text/plain"),
    _plain("/openapi.json", openapi, "This description", "OpenAPI 3.1"),
    Route(
        "GET",
        "",
        get_version,
        "The version of the service",
        (Result(200, "The version", shapes.Version),),
    ),
    Route(
        "GET",
        "/groups",
        list_groups,
        "List groups",
        (Result(200, "A page of groups", shapes.GroupConfiguration, many=True),),
        query=PAGE,
    ),
    Route(
        "POST",
        "/groups",
        create_group,
        "Create a group",
        (
            Result(201, "Created", shapes.GroupConfiguration),
            Result(200, "It existed, with the same configuration", shapes.GroupConfiguration),
        ),
        right=Right.WRITE,
        body=shapes.GroupRequest,
        refusals=(409,),
    ),
    Route(
        "GET",
        GROUP,
        get_group,
        "Read a group",
        (Result(200, "The group", shapes.GroupConfiguration),),
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
        (Result(200, "The status", shapes.GroupStatus),),
        refusals=(404,),
        query=WAIT,
    ),
    Route(
        "GET",
        GROUP + "/history",
        get_history,
        "List the tenures of primaries, newest first",
        (Result(200, "A page of tenures", shapes.HistoryEntry, many=True),),
        refusals=(404,),
        query=PAGE,
    ),
    Route(
        "GET",
        ACCESS,
        get_group_access,
        "Read the access-control list of a group",
        (Result(200, "The list in force", shapes.AccessControlList),),
        refusals=(404,),
    ),
    Route(
        "PUT",
        ACCESS,
        put_group_access,
        "Replace the access-control list of a group",
        (Result(204, "Replaced"),),
        right=Right.MANAGE,
        body=shapes.AccessControlRequest,
        refusals=(404,),
    ),
    Route(
        "GET",
        NAMESPACE_ACCESS,
        get_access,
        "Read the access-control list of a namespace's groups",
        (Result(200, "The list", shapes.AccessControlList),),
        bases=(CLOUD,),
    ),
    Route(
        "PUT",
        NAMESPACE_ACCESS,
        put_access,
        "Replace the access-control list of a namespace's groups",
        (Result(204, "Replaced"),),
        right=Right.MANAGE,
        body=shapes.AccessControlRequest,
        bases=(CLOUD,),
    ),
    Route(
        "GET",
        SESSIONS,
        list_sessions,
        "List the sessions of a group",
        (Result(200, "All sessions", shapes.ClientSession, many=True),),
        refusals=(404,),
    ),
    Route(
        "POST",
        SESSIONS,
        create_session,
        "Join a group",
        (
            Result(201, "Created", shapes.ClientSession),
            Result(200, "It existed, with the same configuration", shapes.ClientSession),
        ),
        right=Right.WRITE,
        body=shapes.SessionRequest,
        refusals=(404, 409),
    ),
    Route(
        "GET",
        SESSION,
        get_session,
        "Read a session",
        (Result(200, "The session", shapes.ClientSession),),
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
        (Result(200, "The role from now on", shapes.HeartbeatResponse),),
        right=Right.WRITE,
        body=shapes.HeartbeatRequest,
        refusals=(404, 409, 429),
    ),
    Route(
        "POST",
        SESSION + "/roleoverride",
        set_override,
        "Override the choice of the primary",
        (Result(200, "The override", shapes.RoleOverrideResponse),),
        right=Right.WRITE,
        body=shapes.RoleOverrideRequest,
        refusals=(404,),
    ),
    Route(
        "POST",
        SESSION + "/release",
        release_role,
        "Give the role of primary back",
        (Result(204, "It is released"),),
        right=Right.WRITE,
        body=shapes.ReleaseRequest,
        refusals=(404,),
    ),
)
