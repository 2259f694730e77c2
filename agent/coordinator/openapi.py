"""The OpenAPI 3.1 document, built from the route table and from the shapes of schema/api.py."""

import re
from collections.abc import Sequence
from typing import Any

import msgspec

from agent import __version__
from agent.coordinator.routes import BASES, CLOUD, Result, Route
from agent.schema.codec import component_schemas, id_schema
from agent.schema.values import Shape

ABOUT = (
    "Groups of clients of which exactly one is primary. Path literals match in any letter case, and"
    " a slash at the end of a path is accepted. The paths under /api/v1/clientfailover stand for the"
    " tenant and namespace `default`. Unknown properties of a body and unknown query parameters are"
    " ignored. A property without a value is left out of an answer. Any call can also be answered 400,"
    " 408, 431 or 503 with an ErrorResponse before it was read as a whole; the connection is closed then."
)

MEANINGS = {
    400: "The request is wrong; Reason has the property, its value and what would be right.",
    401: "The caller is not known.",
    403: "The caller may not do this.",
    404: "There is no such group or session.",
    409: "The request conflicts with the present state.",
    413: "The body is too long.",
    415: "The body is not JSON in UTF-8.",
    429: "The heartbeat came too soon after the last, or too many passwords from this address were wrong.",
    503: "Nothing can be made durable now, the coordinator is stopping, or too many status reads wait"
    " already. Nothing was changed.",
}

SECURITY = {
    "Basic": {"type": "http", "scheme": "basic"},
    "Bearer": {"type": "http", "scheme": "bearer", "bearerFormat": "JWT"},
    "Certificate": {"type": "mutualTLS"},
}

ERROR = {"$ref": "#/components/schemas/ErrorResponse"}

OPERATION_ID = {
    "description": "Names this call in the coordinator's log.",
    "required": True,
    "schema": {"type": "string", "format": "uuid"},
}
TOTAL = {
    "description": "How many there are in all.",
    "required": True,
    "schema": {"type": "integer", "minimum": 0},
}
RETRY = {
    "Retry-After": {
        "description": "Seconds to wait, rounded up.",
        "required": True,
        "schema": {"type": "integer", "minimum": 1},
    },
    "Retry-After-Ms": {
        "description": "The same in milliseconds.",
        "required": True,
        "schema": {"type": "integer", "minimum": 1},
    },
}
CHALLENGE = {
    "WWW-Authenticate": {
        "description": "The accepted authentication schemes.",
        "required": True,
        "schema": {"type": "string"},
    }
}
REFUSAL_HEADERS: dict[int, dict[str, Any]] = {401: CHALLENGE, 429: RETRY, 503: RETRY}


def document(routes: Sequence[Route], schemes: Sequence[str]) -> bytes:
    """Build the document, as JSON.

    Args:
        routes: every route of the application.
        schemes: the configured ways to authenticate, of ``Basic``, ``Bearer`` and ``Certificate``.
    """
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        for path in route.paths:
            paths.setdefault(path, {})[route.method.lower()] = _operation(route, path, schemes)
    components: dict[str, Any] = {"schemas": component_schemas()}
    if schemes:
        components["securitySchemes"] = {name: SECURITY[name] for name in schemes}
    return msgspec.json.encode(
        {
            "openapi": "3.1.0",
            "info": {
                "title": "Client failover",
                "version": __version__,
                "description": ABOUT,
                "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
            },
            "paths": paths,
            "components": components,
        }
    )


def _operation(route: Route, path: str, schemes: Sequence[str]) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "operationId": _operation_id(route, path),
        "summary": route.summary,
        "tags": [_tag(path)],
        "parameters": _parameters(route, path),
        "responses": {str(result.status): _result(result) for result in route.results}
        | {str(status): _refusal(status) for status in _refusals(route, path, schemes)},
    }
    if route.body is not None:
        operation["requestBody"] = {"required": True, "content": _content(_reference(route.body))}
    if schemes and route.right is not None:
        operation["security"] = [{name: []} for name in schemes]
    return operation


def _operation_id(route: Route, path: str) -> str:
    return f"{route.name}_on_premises" if path.startswith(BASES[1]) else route.name


def _tag(path: str) -> str:
    if path.startswith(CLOUD):
        return "cloud form"
    return "on-premises form" if path.startswith(BASES[1]) else "service"


def _refusals(route: Route, path: str, schemes: Sequence[str]) -> list[int]:
    """Every status of a refusal, except 404 and 405 of routing."""
    known = {403, *route.refusals}  # pages of other sites
    if route.query or route.body is not None or "{" in path:
        known.add(400)
    if route.body is not None:
        known |= {413, 415}
    if route.right is not None:
        known |= {503} | ({401} if schemes else set()) | ({429} if "Basic" in schemes else set())
    if route.name == "readyz":
        known.add(503)
    return sorted(known)


def _parameters(route: Route, path: str) -> list[dict[str, Any]]:
    schema = id_schema()
    in_path = [
        {"name": name, "in": "path", "required": True, "schema": schema}
        for name in re.findall(r"\{(\w+)\}", path)
    ]
    in_query = [
        {
            "name": parameter.name,
            "in": "query",
            "description": parameter.description,
            "schema": parameter.schema,
        }
        for parameter in route.query
    ]
    return in_path + in_query


def _result(result: Result) -> dict[str, Any]:
    response: dict[str, Any] = {
        "description": result.meaning,
        "headers": {"Operation-Id": OPERATION_ID},
    }
    if result.is_list:
        response["headers"] |= {"Total-Count": TOTAL}
    if result.shape is not None:
        schema = _reference(result.shape)
        response["content"] = _content(
            {"type": "array", "items": schema} if result.is_list else schema
        )
    elif result.media is not None:
        kind = "object" if result.media == "application/json" else "string"
        response["content"] = {result.media: {"schema": {"type": kind}}}
    return response


def _refusal(status: int) -> dict[str, Any]:
    return {
        "description": MEANINGS[status],
        "headers": {"Operation-Id": OPERATION_ID} | REFUSAL_HEADERS.get(status, {}),
        "content": _content(ERROR),
    }


def _reference(shape: type[Shape]) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{shape.__name__}"}


def _content(schema: Any) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}
