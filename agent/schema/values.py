"""The base of all JSON shapes, and the types inside them that JSON does not have.

``encode_inside`` and ``read`` are the hooks for msgspec. A type's ``read`` raises TypeError for a value
of the wrong JSON type, and ValueError, whose text completes "PROPERTY: ...", for any other wrong value. ``words``
describe the accepted values, and ``schema`` does as far as JSON Schema can.
"""

import json
from collections.abc import Mapping
from dataclasses import fields
from datetime import datetime
from functools import cache, lru_cache
from itertools import chain
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Generic, Self, TypeVar, get_args

from msgspec import Meta, Raw, Struct
from msgspec.structs import fields as struct_fields

from agent.core.timing import LONGEST_LEASE_S, SHORTEST_LEASE_S
from agent.model import LONGEST_HOLD_OFF_S, MAX_EPOCH, TICKS_PER_SECOND, Role, RoleOverride
from agent.schema.fields import parts_of
from agent.schema.scalars import (
    CLOCK,
    ISO_BODY,
    LONGEST_PERIOD_TICKS,
    MAX_TICKS,
    format_time_span,
    not_a_time,
    parse_date_time,
    parse_time_span,
    shown,
)

E = TypeVar("E", Role, RoleOverride)
M = TypeVar("M")

MAX_DEPTH = 62
"""Levels of lists and objects in AdditionalData. .NET's readers refuse a document of more than 64; the
list of sessions that it is part of has two."""

MAX_NODES = 1000
MAX_BYTES = 16 * 1024
"""The most values in one AdditionalData, and its length: a list of sessions contains that of every session."""


def _span_schema(*patterns: str) -> dict[str, Any]:
    pattern = "|".join(f"^{one}$" for one in patterns)
    return {"type": "string", "pattern": pattern, "examples": ["00:01:00"]}


class TimeSpan(int):
    """Ticks of 100 ns; a time-span in JSON. ``words`` have the range that ``low`` and ``high`` have in ticks."""

    words: ClassVar = "a time-span"
    low: ClassVar = -MAX_TICKS - 1
    high: ClassVar = MAX_TICKS
    schema: ClassVar = _span_schema(rf"-?(?:[1-9][0-9]{{0,7}}\.)?{CLOCK}")

    @classmethod
    def read(cls, given: object) -> Self:
        if not isinstance(given, str):
            raise TypeError
        ticks = parse_time_span(given)
        if not cls.low <= ticks <= cls.high:
            raise ValueError(f"{format_time_span(ticks)} is out of range: it must be {cls.words}")
        return cls(ticks)


class LeaseSpan(TimeSpan):
    """A FailoverTimeout that a new group may have."""

    words = "a time-span from 00:00:00.2000000 (0.2 s) to 24.00:00:00 (24 days), such as 00:01:00"
    low = round(SHORTEST_LEASE_S * TICKS_PER_SECOND)
    high = round(LONGEST_LEASE_S * TICKS_PER_SECOND)
    schema = _span_schema(
        rf"(?!(?:0\.)?00?:00:00(?:\.[01][0-9]*)?$)(?:(?:[0-9]|1[0-9]|2[0-3])\.)?{CLOCK}",
        r"24\.00:00:00(?:\.0{1,7})?",
        r"P(?:(?:[1-9]|1[0-9]|2[0-4])D|T(?:[1-9][0-9]?H|[1-9][0-9]{0,3}M|[1-9][0-9]{0,5}S))",
    )


class Lease(TimeSpan):
    """A lease, which model.py has in seconds."""


class HoldOffSpan(TimeSpan):
    """How long a session that releases is not to be chosen again."""

    words = "a time-span from 00:00:00 to 1.00:00:00 (1 day)"
    low = 0
    high = round(LONGEST_HOLD_OFF_S * TICKS_PER_SECOND)
    schema = _span_schema(
        rf"(?:0\.)?{CLOCK}",
        r"1\.00:00:00(?:\.0{1,7})?",
        r"P(?:1D|T(?:(?:[0-9]|1[0-9]|2[0-4])H|[0-9]{1,3}M|[0-9]{1,4}S))",
    )


class ExpirationSpan(TimeSpan):
    """The time that an override lasts."""

    words = "a time-span longer than 00:00:00, under 2000000 days"
    low = 1
    high = LONGEST_PERIOD_TICKS
    schema = _span_schema(
        rf"(?=.*[1-9])(?:(?:0|[1-9][0-9]{{0,5}}|1[0-9]{{6}})\.)?{CLOCK}",
        rf"(?=.*[1-9]){ISO_BODY}",
    )


if TYPE_CHECKING:
    Moment = datetime
    NeededMoment = datetime
    Count = int
    TrusteeKind = int
    AccessType = int
    AccessRights = int
    Confirmed = bool
else:

    class _AcceptsAnyValue(type):
        """Metaclass for types whose ``read`` returns a value of another type: it makes msgspec accept that value."""

        def __instancecheck__(cls, value: object) -> bool:
            return True

    class Moment(metaclass=_AcceptsAnyValue):
        """An aware datetime in UTC, or None: ISO 8601 in JSON, where 0001-01-01T00:00:00 means never."""

        words = "a date-time"
        schema = {"type": "string", "format": "date-time"}  # noqa: RUF012 - nothing changes it
        read = staticmethod(parse_date_time)

    class NeededMoment(Moment):
        """A Moment for which "never" is refused."""

        @classmethod
        def read(cls, given: object) -> datetime:
            if (moment := parse_date_time(given)) is None:
                raise ValueError(not_a_time(given))
            return moment

    class _Integer(metaclass=_AcceptsAnyValue):
        """An integer from ``least`` to ``most``. In JSON, 1.0 is an integer, too."""

        def __init_subclass__(cls) -> None:
            cls.words = f"an integer from {cls.least} to {cls.most}"
            cls.schema = {"type": "integer", "minimum": cls.least, "maximum": cls.most}

        @classmethod
        def read(cls, given: object) -> int:
            if isinstance(given, float) and given.is_integer():
                given = int(given)
            if type(given) is not int or not cls.least <= given <= cls.most:
                raise TypeError
            return given

    class Count(_Integer):
        least, most = 0, MAX_EPOCH

    class TrusteeKind(_Integer):
        least, most = 1, 3

    class AccessType(_Integer):
        least, most = 0, 1

    class AccessRights(_Integer):
        least, most = 0, 31

    class Confirmed(metaclass=_AcceptsAnyValue):
        """The JSON value true; every other value is refused."""

        words = "the value true"
        schema = {"type": "boolean", "const": True}  # noqa: RUF012 - nothing changes it

        @classmethod
        def read(cls, given: object) -> bool:
            if given is not True:
                raise TypeError
            return True


class _Code(Generic[E]):  # not a dataclass: msgspec would decode it without calling ``read``
    """A member of an enumeration of v1: numbers, and names in any letter case, are read; one of them is written."""

    numbers: ClassVar[Mapping[Any, int]]
    words: ClassVar[str]
    schema: ClassVar[Mapping[str, Any]]

    def __init_subclass__(cls) -> None:
        cls.words = ", ".join(f"{number} or {member}" for member, number in cls.numbers.items())
        known = [*cls.numbers.values(), *cls.numbers]
        cls.schema = {"type": ["integer", "string"], "enum": known}

    def __init__(self, member: E) -> None:
        self.member: E = member
        self.number = self.numbers[member]

    @classmethod
    def read(cls, given: object) -> Self:
        known = isinstance(given, str | int | float) and not isinstance(given, bool)
        for member, number in cls.numbers.items() if known else ():
            if given == number or str(given).lower() == member.lower():
                return cls(member)
        raise ValueError(f"{shown(given)} is unknown: it must be {cls.words}")


class RoleCode(_Code[Role]):
    """A ClientRole."""

    numbers: ClassVar = {Role.SECONDARY: 0, Role.PRIMARY: 1, Role.PENDING_PRIMARY: 2}


class OverrideCode(_Code[RoleOverride]):
    """A RoleOverride."""

    numbers: ClassVar = {RoleOverride.OFF: 0, RoleOverride.PRIMARY: 1}


ROLES: Mapping[Role, RoleCode] = {role: RoleCode(role) for role in Role}
OVERRIDES: Mapping[RoleOverride, OverrideCode] = {one: OverrideCode(one) for one in RoleOverride}


class Additional:
    """An object that is passed on to clients unchanged. It is kept as JSON, so it is encoded only once."""

    words: ClassVar = "an object, kept as it was given"
    schema: ClassVar = {"type": "object", "additionalProperties": True}

    def __init__(self, text: str) -> None:
        self.text = text

    @classmethod
    def read(cls, given: object) -> Self:
        if not isinstance(given, dict):
            raise TypeError
        return cls(json.dumps(given, ensure_ascii=False, separators=(",", ":")))


class GivenAdditional(Additional):
    """AdditionalData in a request, within the limits of this service."""

    words = f"an object of at most {MAX_BYTES} bytes, {MAX_NODES} values and {MAX_DEPTH} levels"

    @classmethod
    def read(cls, given: object) -> Self:
        kept = None if _is_larger(given) else super().read(given)
        if kept is None or len(kept.text.encode()) > MAX_BYTES:
            raise ValueError(f"it is too large: it must be {cls.words}")
        return kept


def _is_larger(value: object) -> bool:
    """Whether a value has more than MAX_NODES values in it, or more than MAX_DEPTH levels."""
    level, levels, nodes = [value], 0, 0
    while containers := [one for one in level if isinstance(one, dict | list)]:
        insides = (one.values() if isinstance(one, dict) else one for one in containers)
        level = [*chain.from_iterable(insides)]
        levels, nodes = levels + 1, nodes + len(level)
        if levels > MAX_DEPTH or nodes > MAX_NODES:
            return True
    return False


# C stands for the characters that no id has: '/' would end a path segment, and "." and ".." as
# whole segments are taken out of a URL by HTTP clients.
_ID_PATTERN = "^(?:[^.C]|[.][^.C]|[.][.][^C])[^C]*\\Z".replace("C", r"/\x00-\x1f\x7f-\x9f")

Id = Annotated[
    str,
    Meta(min_length=1, max_length=256, pattern=_ID_PATTERN),
    ", without '/' and control characters, and not '.' or '..'",
]

Name = Annotated[str, Meta(max_length=1024, pattern=r"^[^\x00]*\Z")]
"""An id in an answer. Agents pass it to hooks and store it in files, so its length is bounded."""


WIRE_NAMES = {
    "additional": "AdditionalData",
    "denied": "AccessType",
    "entries": "RoleTrusteeAccessControlEntries",
    "heartbeat_at": "HeartbeatTime",
    "kind": "Type",
    "last_data": "LastDataProcessedTime",
    "lease_s": "LeaseDuration",
    "pending": "PendingPrimary",
    "previous": "PreviousPrimary",
    "rights": "AccessRights",
    "score": "FailoverScore",
    "timeout_ticks": "FailoverTimeout",
}
"""JSON names of fields that have another name in model.py, and so in the shapes."""


def wire_name(field: str) -> str:
    """The name of a field in JSON: PascalCase, except for WIRE_NAMES."""
    return WIRE_NAMES.get(field) or field.title().replace("_", "")


class Shape(Struct, rename=wire_name, omit_defaults=True, frozen=True):
    """A JSON object of the API. A property without a value is None, and left out of the JSON."""

    words: ClassVar[str] = "an object"


class Mirror(Shape, Generic[M], frozen=True):
    """The shape of a class of model.py, whose fields have the same names."""

    @classmethod
    def from_model(cls, value: M) -> Self:
        """Convert a value, without a check: whoever receives it checks it."""
        _, kinds = _mirrored(cls)
        return cls(**{name: _from_model(kinds[name], getattr(value, name)) for name in kinds})

    def to_model(self) -> M:
        """Convert the shape. What is not set in it, or not part of it, gets the default of model.py."""
        model, kinds = _mirrored(type(self))
        given = {name: getattr(self, name) for name in kinds}
        made: M = model(**{name: _to_model(one) for name, one in given.items() if one is not None})
        return made


@cache
def _mirrored(shape: Any) -> tuple[Any, dict[str, Any]]:
    """The class that a shape mirrors, and for each field that both have the type of this module in it, or None."""
    (model,) = get_args(shape.__orig_bases__[0])
    names = {item.name for item in fields(model)}
    kinds = {}
    for item in struct_fields(shape):
        types = (part for part in parts_of(item.type) if isinstance(part, type))
        own = (one for one in types if issubclass(one, TimeSpan | _Code | Additional | Mirror))
        if item.name in names:
            kinds[item.name] = next(own, None)
    return model, kinds


def _from_model(kind: Any, value: Any) -> Any:
    if isinstance(value, tuple):
        return [_from_model(kind, one) for one in value]
    if value is None or kind is None:
        return int(value) if isinstance(value, bool) else value
    if kind is Lease:
        return Lease(round(value * TICKS_PER_SECOND))
    return kind.from_model(value) if issubclass(kind, Mirror) else kind(value)


def _to_model(value: Any) -> Any:
    match value:
        case Lease():
            return value / TICKS_PER_SECOND
        case TimeSpan():
            return int(value)
        case _Code():
            return value.member
        case Additional():
            return value.text
        case list():
            return tuple(map(_to_model, value))
        case Mirror():
            return value.to_model()
        case _:
            return value


def encode_inside(value: Any, *, names: bool) -> Any:
    """Convert a value of these types for JSON; roles and overrides to names, or to numbers."""
    if isinstance(value, _Code):
        return value.member.value if names else value.number
    return Raw(value.text.encode()) if isinstance(value, Additional) else _encode_span(value)


# groups have few different timeouts, and each heartbeat is answered with one
_encode_span = lru_cache(maxsize=1024)(format_time_span)
