"""Every route of the coordinator: method, path, handler, right, shapes and refusals.

api.py dispatches from ``ROUTES``, and openapi.py builds its document from it.
"""

from collections.abc import Callable
from typing import Any

from agent.coordinator.calls import (
    create_group,
    create_session,
    delete_access,
    delete_group,
    delete_group_access,
    delete_session,
    get_access,
    get_group,
    get_group_access,
    get_history,
    get_session,
    get_status,
    get_version,
    healthz,
    index,
    lift_failsafe,
    list_groups,
    list_sessions,
    metrics,
    openapi,
    post_heartbeat,
    put_access,
    put_group_access,
    readyz,
    release_role,
    set_override,
)
from agent.coordinator.routes import CLOUD, Parameter, Result, Route
from agent.coordinator.service import LONGEST_WAIT_S
from agent.model import TICKS_PER_SECOND, Right
from agent.schema import access, api, failsafe_api
from agent.schema.scalars import parse_time_span

MOST_LISTED = 1000
"""Largest page size, some hundred kilobytes: building a page delays heartbeats."""

LISTED = 100
"""Default page size, as in v1."""

MOST_SKIPPED = 2**53 - 1
"""The largest integer that every JSON reader keeps exactly."""


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


def _read_boolean(text: str) -> bool:
    if text not in {"true", "false"}:
        raise ValueError("it must be true or false")
    return text == "true"


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
        "A Revision: answer once the group's Revision is greater, or when the wait is over.",
    ),
    Parameter(
        "wait",
        {
            "type": "string",
            "pattern": r"^([01]?[0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\.[0-9]{1,7})?$",
            "default": "00:00:00",
        },
        f"How long to wait for that, as a time-span; at most {LONGEST_WAIT_S:g} s.",
        _read_wait,
        0.0,
    ),
)

INACTIVE = (
    Parameter(
        "inactive",
        {"type": "boolean", "default": False},
        "true: delete the session only if it is inactive, else answer 409.",
        _read_boolean,
        default=False,
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
    _service_route("/", index, "Links to the parts of the service", "Links"),
    _service_route("/healthz", healthz, "Whether the process is up", "It is up"),
    _service_route("/readyz", readyz, "Whether requests can be served", "They can be"),
    _service_route("/metrics", metrics, "Metrics for Prometheus", "The metrics", "text/plain"),
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
        "POST",
        GROUP + "/failsafe/lift",
        lift_failsafe,
        "Declare that no member of a group is active by failsafe",
        (Result(204, "Every member may be promoted"),),
        right=Right.MANAGE,
        body=failsafe_api.LiftRequest,
        refusals=(404, 409),
        for_administrators=True,
    ),
    Route(
        "GET",
        ACCESS,
        get_group_access,
        "Read the access-control list of a group",
        (Result(200, "The list in force", access.AccessControlList),),
        refusals=(404,),
        for_administrators=True,
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
        for_administrators=True,
    ),
    Route(
        "DELETE",
        ACCESS,
        delete_group_access,
        "Remove the access-control list of a group",
        (Result(204, "Its namespace's list is in force"),),
        right=Right.MANAGE,
        refusals=(404,),
        for_administrators=True,
    ),
    Route(
        "GET",
        NAMESPACE_ACCESS,
        get_access,
        "Read the access-control list of a namespace's groups",
        (Result(200, "The list", access.AccessControlList),),
        bases=(CLOUD,),
        for_administrators=True,
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
        for_administrators=True,
    ),
    Route(
        "DELETE",
        NAMESPACE_ACCESS,
        delete_access,
        "Remove the access-control list of a namespace's groups",
        (Result(204, "Removed"),),
        right=Right.MANAGE,
        bases=(CLOUD,),
        for_administrators=True,
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
        refusals=(404, 409),
        query=INACTIVE,
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
        bound_to_instance=True,
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
        bound_to_instance=True,
    ),
)

METRICS_ROUTES = tuple(route for route in ROUTES if route.handler in {healthz, readyz, metrics})
"""The routes served at ``metrics_listen``."""

API_ROUTES = tuple(route for route in ROUTES if route.handler is not metrics)
"""The routes served at ``listen`` if ``metrics_listen`` is set, too."""

LISTS = frozenset({list_groups, list_sessions, get_history})
"""Calls whose answers take milliseconds to make. Answers to the same call are made one after another, so that other
callers are served in between."""

SHARED = frozenset({metrics.__name__, openapi.__name__})
"""Routes whose answer is one object in memory, shared by all who read it."""
