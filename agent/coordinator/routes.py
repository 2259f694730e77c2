"""Routes of the API, and the lookup of a path. Knows nothing of what a handler does.

The table itself is in route_table.py.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl, unquote_to_bytes

import msgspec

from agent.errors import Invalid, NotFound
from agent.model import Right
from agent.schema.values import Id, Shape

CLOUD = "/api/v1/tenants/{tenantId}/namespaces/{namespaceId}"
BASES = (f"{CLOUD}/clientfailover", "/api/v1/clientfailover")
"""The base path of the cloud, and the one on premises, which means the tenant ``default`` and the namespace
``default``."""

DEFAULT_NAME = "default"

PATHS_REMEMBERED = 32_768
LONGEST_REMEMBERED = 320
"""How many parsed paths are remembered, and how long each may be: twice the sessions that one core can serve, with
four names of 50 characters. At most some 40 MB."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """A query parameter.

    Attributes:
        read: parses the text; raises ValueError with the accepted values.
        default: the value if it is absent.
    """

    name: str
    schema: Mapping[str, Any]
    description: str
    read: Callable[[str], Any]
    default: Any


@dataclass(frozen=True, slots=True)
class Result:
    """A successful answer of a route.

    Attributes:
        shape: of the body, or of its items if ``is_list``; None for no body, or for one without a shape.
        media: the body's Content-Type if it has no shape.
    """

    status: int
    meaning: str
    shape: type[Shape] | None = None
    is_list: bool = False
    media: str | None = None


@dataclass(frozen=True, slots=True)
class Route:
    """One call of the API.

    Attributes:
        path: after the base, or in full if ``bases`` is empty.
        handler: answers the call.
        right: the right that a caller needs; None: open to everybody, without authentication.
        for_administrators: whether the call manages access, which configured administrators may always do.
        body: the shape of its body.
        refusals: statuses in addition to those of every call.
        bound_to_instance: whether it is bound to an instance or a tenure, so that a late call harms nobody.
    """

    method: str
    path: str
    handler: Callable[..., Awaitable[Any]]
    summary: str
    results: tuple[Result, ...]
    right: Right | None = Right.READ
    body: type[Shape] | None = None
    refusals: tuple[int, ...] = ()
    query: tuple[Parameter, ...] = ()
    bases: tuple[str, ...] = BASES
    for_administrators: bool = False
    bound_to_instance: bool = False

    @property
    def may_come_late(self) -> bool:
        """Whether the call may be carried out after its caller has hung up."""
        return self.method == "GET" or self.bound_to_instance

    @property
    def name(self) -> str:
        """The handler's name, which is the operation's in the OpenAPI document."""
        return self.handler.__name__

    @property
    def paths(self) -> tuple[str, ...]:
        """Every full path of the route, with ``{parameters}``."""
        return tuple(base + self.path for base in self.bases) or (self.path,)


@dataclass(frozen=True, slots=True)
class PathMatch:
    """The routes of a path by method, and the path parameters."""

    routes: Mapping[str, Route]
    values: Mapping[str, str]


@dataclass(slots=True)
class _Node:
    """A node in the tree of paths: the position after a segment."""

    literals: dict[str, "_Node"] = field(default_factory=dict)
    parameter: tuple[str, "_Node"] | None = None
    routes: dict[str, Route] = field(default_factory=dict)


class Router:
    """Finds the routes of a path."""

    def __init__(self, routes: Sequence[Route]) -> None:
        self._root = _Node()
        for route in routes:
            for path in route.paths:
                self._node(path).routes[route.method] = route
        self._remembered: dict[bytes, PathMatch] = {}

    def remember(self, raw_path: bytes, match: PathMatch) -> None:
        """Remember this path, so that it is found faster: agents request the same few paths repeatedly.

        Call it for authenticated callers only, since anybody else could fill the memory.
        """
        remembered = self._remembered
        if raw_path in remembered or len(raw_path) > LONGEST_REMEMBERED:
            return
        if len(remembered) >= PATHS_REMEMBERED:
            del remembered[next(iter(remembered))]
        remembered[raw_path] = match

    def _node(self, path: str) -> _Node:
        node = self._root
        for segment in _segments(path):
            if segment.startswith("{"):
                node.parameter = node.parameter or (segment[1:-1], _Node())
                node = node.parameter[1]
            else:
                node = node.literals.setdefault(segment, _Node())
        return node

    def find(self, raw_path: bytes) -> PathMatch:
        """The routes of a path as the client sent it.

        Literals match in any letter case; a slash at the end is accepted.

        Raises:
            NotFound: there is no such path.
            Invalid: a path parameter is not a valid id.
        """
        if (known := self._remembered.get(raw_path)) is not None:
            return known
        node, values = self._root, {}
        for segment in _segments(raw_path.decode("latin-1")):
            literal = node.literals.get(segment.lower())
            if literal is not None:
                node = literal
            elif node.parameter is not None:
                name, node = node.parameter
                values[name] = self._read_id(name, segment)
            else:
                raise _no_path(raw_path)
        if not node.routes:
            raise _no_path(raw_path)
        return PathMatch(node.routes, values)

    def _read_id(self, name: str, segment: str) -> str:
        try:
            return msgspec.convert(unquote_to_bytes(segment).decode(), Id)
        except (UnicodeDecodeError, msgspec.ValidationError):
            raise Invalid(
                f"{segment[:60]!r} in the path cannot be a {name}.",
                "It must be 1 to 256 characters in percent-encoded UTF-8, without '/' and control"
                " characters.",
            ) from None


def _segments(path: str) -> list[str]:
    """The parts between slashes. An empty part at the end is left out."""
    return path[1:].removesuffix("/").split("/") if path not in {"", "/"} else []


def _no_path(raw_path: bytes) -> NotFound:
    return NotFound(
        f"There is nothing at the path {raw_path[:200].decode('latin-1')!r}.",
        "/openapi.json lists the paths; if metrics_listen is set, /metrics is served at that address only.",
    )


def read_query(parameters: Sequence[Parameter], query_string: bytes) -> dict[str, Any]:
    """The values of a route's query parameters; others are ignored.

    Raises:
        Invalid: one is given twice, or is not what it must be.
    """
    values = {parameter.name: parameter.default for parameter in parameters}
    if not query_string or not parameters:
        return values
    try:
        given = parse_qsl(query_string.decode("ascii"), keep_blank_values=True, errors="strict")
    except ValueError:
        raise Invalid("The query is not percent-encoded UTF-8.", "Percent-encode it.") from None
    for parameter in parameters:
        texts = [text for name, text in given if name == parameter.name]
        if not texts:
            continue
        try:
            if len(texts) > 1:
                raise ValueError("it must be given once")  # noqa: TRY301 - handled like a value that cannot be read
            values[parameter.name] = parameter.read(texts[0])
        except ValueError as error:
            raise Invalid(
                f"The query parameter {parameter.name}={texts[0][:60]} is wrong: {error}.",
                f"{parameter.name}: {parameter.description}",
            ) from None
    return values
