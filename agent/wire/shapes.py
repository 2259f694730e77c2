"""The JSON shapes of the group API, to and from the values of model.py, as the coordinator has them.

The names of the fields *are* the names on the wire. A shape ``of`` a value is what to send; its
``to_model`` is what was meant. ``*Request`` shapes are what this service demands of a caller; the
others are answers. Unknown properties are ignored, and a null property is an absent one. The
descriptions of the fields are used twice: in the OpenAPI document, and as the end of the sentence
that ``explain_request`` makes ("... it must be a number from ...").

What this module refuses to know: HTTP, who asks, and what is decided. How a caller reads the answers
is wire/answers.py.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any, Generic, Self

import pydantic_core
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    PlainSerializer,
    PlainValidator,
    SerializationInfo,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from pydantic.json_schema import JsonSchemaMode, JsonSchemaValue, models_json_schema
from pydantic_core import core_schema

from agent import model
from agent.core.timing import LONGEST_LEASE_S, SHORTEST_LEASE_S
from agent.model import LONGEST_HOLD_OFF_S, TICKS_PER_SECOND, Right, Role, RoleOverride
from agent.wire.scalars import (
    CLOCK,
    ISO_BODY,
    LONGEST_PERIOD_TICKS,
    MAX_EPOCH,
    MAX_TICKS,
    OVERRIDE_NUMBERS,
    ROLE_NUMBERS,
    E,
    format_date_time,
    format_time_span,
    not_json,
    parse_time_span,
    read_member,
    read_optional_time,
    read_required_time,
    shown,
)

MAX_ENTRIES = 1000
"""Entries of an access-control list: each request walks them, so the list has an end."""


@dataclass(frozen=True, slots=True)
class _Span:
    """Makes an int of ticks a time-span in JSON.

    Attributes:
        limits: the range in words; ``low`` and ``high`` are the same in ticks.
        patterns: what JSON Schema can say of the accepted texts, at most all of them.
    """

    limits: str
    low: int
    high: int
    patterns: tuple[str, ...]

    def _check(self, ticks: int) -> int:
        if not self.low <= ticks <= self.high:
            raise ValueError(f"{format_time_span(ticks)} is out of range: it must be {self.limits}")
        return ticks

    def _read(self, text: str) -> int:
        return self._check(parse_time_span(text))

    def __get_pydantic_core_schema__(
        self, _source: Any, _handler: GetCoreSchemaHandler
    ) -> core_schema.CoreSchema:
        then = core_schema.no_info_after_validator_function
        return core_schema.json_or_python_schema(
            then(self._read, core_schema.str_schema(strict=True)),
            then(self._check, core_schema.int_schema(strict=True)),
            serialization=core_schema.plain_serializer_function_ser_schema(format_time_span),
        )

    def __get_pydantic_json_schema__(
        self, _schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        written = (rf"-?(?:[1-9][0-9]{{0,7}}\.)?{CLOCK}",)
        patterns = written if handler.mode == "serialization" else self.patterns
        return {
            "type": "string",
            "pattern": "|".join(f"^{pattern}$" for pattern in patterns),
            "description": f"A time-span {self.limits}.",
            "examples": ["00:01:00"],
        }


_ANY_SPAN = _Span(
    "from -10675199.02:48:05.4775808 to 10675199.02:48:05.4775807",
    -MAX_TICKS - 1,
    MAX_TICKS,
    (
        r"-?(?:(0|[1-9][0-9]{0,6}|10[0-5][0-9]{5}|106[0-6][0-9]{4}|1067[0-4][0-9]{3}"
        rf"|10675(?:0[0-9]{{2}}|1[0-8][0-9]|19[0-8]))\.)?{CLOCK}",
        rf"-?{ISO_BODY}",
    ),
)
_LEASE_SPAN = _Span(
    "from 00:00:00.2000000 (0.2 s) to 24.00:00:00 (24 days), such as 00:01:00",
    round(SHORTEST_LEASE_S * TICKS_PER_SECOND),
    round(LONGEST_LEASE_S * TICKS_PER_SECOND),
    (
        rf"(?!(?:0\.)?00:00:00(?:\.[01][0-9]*)?$)(?:(?:[0-9]|1[0-9]|2[0-3])\.)?{CLOCK}",
        r"24\.00:00:00(?:\.0{1,7})?",
        r"P(?:(?:[1-9]|1[0-9]|2[0-4])D|T(?:[1-9][0-9]?H|[1-9][0-9]{0,3}M|[1-9][0-9]{0,5}S))",
    ),
)
_PERIOD_PATTERNS = (
    rf"(?:(?:0|[1-9][0-9]{{0,5}}|1[0-9]{{6}})\.)?{CLOCK}",
    ISO_BODY,
)
_HOLD_OFF_SPAN = _Span(
    "from 00:00:00 to 1.00:00:00 (1 day)",
    0,
    round(LONGEST_HOLD_OFF_S * TICKS_PER_SECOND),
    (
        rf"(?:0\.)?{CLOCK}",
        r"1\.00:00:00(?:\.0{1,7})?",
        r"P(?:1D|T(?:(?:[0-9]|1[0-9]|2[0-4])H|[0-9]{1,3}M|[0-9]{1,4}S))",
    ),
)
_EXPIRATION_SPAN = _Span(
    "longer than 00:00:00, under 2000000 days",
    1,
    LONGEST_PERIOD_TICKS,
    tuple(f"(?=.*[1-9]){pattern}" for pattern in _PERIOD_PATTERNS),
)

TimeSpan = Annotated[int, _ANY_SPAN]
"""Ticks of 100 ns in Python, a time-span in JSON."""

# --- date-times ---------------------------------------------------------------------------------

_WRITE_TIME = PlainSerializer(format_date_time, return_type=str, when_used="unless-none")
_TIME_SCHEMA = {
    "type": "string",
    "format": "date-time",
    "description": "A date-time in ISO 8601; one without a zone is UTC.",
}

UtcDateTime = Annotated[
    datetime, PlainValidator(read_required_time), _WRITE_TIME, WithJsonSchema(_TIME_SCHEMA)
]
"""An aware datetime in UTC in Python, ISO 8601 in JSON."""

OptionalUtcDateTime = Annotated[
    datetime | None,
    PlainValidator(read_optional_time),
    _WRITE_TIME,
    WithJsonSchema({"anyOf": [_TIME_SCHEMA, {"type": "null"}]}),
]
"""The same where the property may be absent: null and 0001-01-01T00:00:00 are read as None."""

# --- enumerations and other small types ---------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Enumeration(Generic[E]):
    """Makes an enumeration a v1 enumeration in JSON: numbers and names are read, one of them written."""

    numbers: tuple[tuple[E, int], ...]

    def __get_pydantic_core_schema__(
        self, _source: Any, _handler: GetCoreSchemaHandler
    ) -> core_schema.CoreSchema:
        numbers = dict(self.numbers)

        def read(given: Any) -> E:
            return read_member(self.numbers, given)

        def write(member: E, info: SerializationInfo) -> int | str:
            return member.value if info.context else numbers[member]

        return core_schema.no_info_plain_validator_function(
            read,
            serialization=core_schema.plain_serializer_function_ser_schema(write, info_arg=True),
        )

    def __get_pydantic_json_schema__(
        self, _schema: core_schema.CoreSchema, _handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        names = [member.value for member, _ in self.numbers]
        return {"type": ["integer", "string"], "enum": [n for _, n in self.numbers] + names}


WireRole = Annotated[Role, _Enumeration(ROLE_NUMBERS)]
WireOverride = Annotated[RoleOverride, _Enumeration(OVERRIDE_NUMBERS)]


def _whole(given: Any) -> Any:
    """To JSON, 1.0 is an integer."""
    return int(given) if isinstance(given, float) and given.is_integer() else given


def _writable(given: dict[str, Any]) -> dict[str, Any]:
    """What is kept and repeated to others has to be JSON: readers here take NaN and 1e999."""
    try:
        json.dumps(given, allow_nan=False)
    except ValueError:
        raise ValueError("it holds a number that JSON cannot: each must be finite") from None
    return given


# C stands for the characters that no id has: '/' would end a path segment, and "." and ".." as
# whole segments are taken out of a URL by HTTP clients.
_ID_PATTERN = "^(?:[^.C]|[.][^.C]|[.][.][^C])[^C]*$".replace("C", r"/\x00-\x1f\x7f-\x9f")

Id = Annotated[
    str,
    Field(
        min_length=1,
        max_length=256,
        pattern=_ID_PATTERN,
        description="A string of 1 to 256 characters, without '/' and control characters,"
        " and not '.' or '..'.",
    ),
]
Text = Annotated[
    str | None, Field(max_length=1024, description="A string of at most 1024 characters.")
]
Score = Annotated[float, Field(ge=0, le=100)]
Count = Annotated[int, Field(ge=0, le=MAX_EPOCH), BeforeValidator(_whole)]
Additional = Annotated[
    Annotated[dict[str, Any], AfterValidator(_writable)] | None,
    Field(description="An object, kept as it was given."),
]

EpochSeen = Annotated[
    Count | None, Field(description="An integer; it grows with each tenure of a primary.")
]
StatusRevision = Annotated[
    Count | None, Field(description="An integer; it grows with each change of the group's status.")
]
Previous = Annotated[str | None, Field(description="The session of the tenure before.")]
StoreName = Annotated[
    str | None,
    Field(description="A string: the id of the coordinator's store, made with its data directory."),
]
LastData = Annotated[
    OptionalUtcDateTime,
    Field(
        description="A date-time in ISO 8601, such as 2026-01-31T12:00:00Z: the time of the newest"
        " data. Without a zone it is UTC; 0001-01-01T00:00:00 means never."
    ),
]
InstanceName = Annotated[
    str | None,
    Field(
        max_length=128,
        description="A string of at most 128 characters: which process of this session calls.",
    ),
]
_A_ROLE = "A role: 0 or Secondary, 1 or Primary, 2 or PendingPrimary."
_AN_OVERRIDE = "An override: 0 or Off, 1 or Primary."
Expiration = Annotated[
    OptionalUtcDateTime, Field(description="When the override ends; left out for never.")
]

# --- shapes -------------------------------------------------------------------------------------


class _Shape(BaseModel):
    model_config = ConfigDict(
        strict=True,
        frozen=True,
        extra="ignore",
        allow_inf_nan=False,
        field_title_generator=lambda name, _info: name,
    )

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        """The schema without ``default: null``; in answers without null, which is never written."""
        reference = handler(schema)
        properties = handler.resolve_ref_schema(reference).get("properties", {})
        for name, declared in properties.items():
            kept = {key: value for key, value in declared.items() if key != "default"}
            if handler.mode == "serialization" and "anyOf" in kept:
                (inner,) = (s for s in kept.pop("anyOf") if s != {"type": "null"})
                kept = inner | kept
            properties[name] = kept
        return reference


class GroupConfiguration(_Shape):
    """A group, as its creator described it."""

    Id: Annotated[str | None, Field(description="The id of the group.")] = None
    Name: Annotated[str | None, Field(description="A name for people.")] = None
    Description: Annotated[str | None, Field(description="What the group is for.")] = None
    FailoverTimeout: Annotated[
        TimeSpan | None,
        Field(description="A time-span, after which a silent session counts as inactive."),
    ] = None
    AdditionalData: Additional = None

    @classmethod
    def of(cls, group: model.GroupConfig) -> Self:
        return cls(
            Id=group.id,
            Name=group.name,
            Description=group.description,
            FailoverTimeout=group.timeout_ticks,
            AdditionalData=None if group.additional is None else dict(group.additional),
        )


class GroupRequest(GroupConfiguration):
    """A group to create. Id and FailoverTimeout are needed; nothing of it can be changed later."""

    Id: Id
    Name: Text = None
    Description: Text = None
    FailoverTimeout: Annotated[
        int,
        _LEASE_SPAN,
        Field(
            description=f"A time-span {_LEASE_SPAN.limits}: a session that sends no heartbeat for"
            " longer counts as inactive. An ISO 8601 duration such as PT1M is read too."
        ),
    ]

    def to_model(self) -> model.GroupConfig:
        return model.GroupConfig(
            id=self.Id,
            timeout_ticks=self.FailoverTimeout,
            name=self.Name,
            description=self.Description,
            additional=self.AdditionalData,
        )


class GroupStatus(_Shape):
    """Who is primary in a group, and since when."""

    Primary: Annotated[str | None, Field(description="The session that is primary.")] = None
    PendingPrimary: Annotated[
        str | None, Field(description="The session that is about to take over.")
    ] = None
    LastDataProcessedTime: Annotated[
        OptionalUtcDateTime, Field(description="When the primary last processed data.")
    ] = None
    Epoch: EpochSeen = None
    Revision: StatusRevision = None
    PrimarySince: Annotated[
        OptionalUtcDateTime, Field(description="When this primary's tenure began.")
    ] = None
    PreviousPrimary: Previous = None
    StoreId: StoreName = None

    @classmethod
    def of(cls, status: model.GroupStatus) -> Self:
        return cls(
            Primary=status.primary,
            PendingPrimary=status.pending,
            LastDataProcessedTime=status.last_data,
            Epoch=status.epoch,
            Revision=status.revision,
            PrimarySince=status.primary_since,
            PreviousPrimary=status.previous,
            StoreId=status.store_id,
        )


class SessionRequest(_Shape):
    """A client session to create. It cannot be changed later."""

    Id: Id
    Name: Text = None
    AdditionalData: Additional = None

    @classmethod
    def of(cls, session: model.SessionConfig) -> Self:
        additional = None if session.additional is None else dict(session.additional)
        return cls(Id=session.id, Name=session.name, AdditionalData=additional)

    def to_model(self) -> model.SessionConfig:
        return model.SessionConfig(id=self.Id, name=self.Name, additional=self.AdditionalData)


class SessionHeartbeat(_Shape):
    """The last heartbeat of a session. Without HeartbeatTime there was none."""

    FailoverScore: Annotated[Score | None, Field(description="A number from 0 to 100.")] = None
    LastDataProcessedTime: Annotated[
        OptionalUtcDateTime, Field(description="When the session last processed data.")
    ] = None
    HeartbeatTime: Annotated[
        OptionalUtcDateTime, Field(description="When the heartbeat was received.")
    ] = None


class ClientSession(_Shape):
    """A member of a group."""

    Id: Annotated[str, Field(description="The id of the session.")]
    Name: Annotated[str | None, Field(description="A name for people.")] = None
    Heartbeat: Annotated[
        SessionHeartbeat | None, Field(description="An object: the last heartbeat of the session.")
    ] = None
    Role: Annotated[WireRole | None, Field(description=_A_ROLE)] = None
    HeartbeatPosted: Annotated[
        bool | None, Field(description="A boolean: whether a heartbeat came since the start.")
    ] = None
    RoleOverride: Annotated[WireOverride | None, Field(description=_AN_OVERRIDE)] = None
    RoleOverrideExpirationTime: Expiration = None
    AdditionalData: Additional = None
    StoreId: StoreName = None

    @classmethod
    def of(cls, view: model.SessionView) -> Self:
        """Heartbeat is always there: v1 clients read it without asking."""
        record, config = view.record, view.record.config
        return cls(
            Id=config.id,
            Name=config.name,
            Heartbeat=SessionHeartbeat(
                FailoverScore=view.score,
                LastDataProcessedTime=view.last_data,
                HeartbeatTime=view.heartbeat_at,
            ),
            Role=view.role,
            HeartbeatPosted=view.heartbeat_at is not None,
            RoleOverride=record.override,
            RoleOverrideExpirationTime=record.override_until,
            AdditionalData=None if config.additional is None else dict(config.additional),
            StoreId=view.store_id,
        )


class HeartbeatRequest(_Shape):
    """A sign of life."""

    FailoverScore: Annotated[
        Score, Field(description="A number from 0 to 100: the share of streams that are active.")
    ]
    LastDataProcessedTime: LastData = None
    Instance: InstanceName = None
    Epoch: Annotated[
        Count | None,
        Field(
            description="An integer from 0 to 9007199254740991: the highest epoch the client saw,"
            " at most 1000000 above the group's."
        ),
    ] = None


class HeartbeatResponse(_Shape):
    """What a session is from now on."""

    Role: Annotated[WireRole, Field(description=_A_ROLE)]
    LastDataProcessedTime: Annotated[
        OptionalUtcDateTime, Field(description="When the group's primary last processed data.")
    ] = None
    Epoch: EpochSeen = None
    LeaseDuration: Annotated[
        TimeSpan | None,
        Field(description="A time-span: how long the next heartbeat is waited for."),
    ] = None
    Revision: StatusRevision = None
    PreviousPrimary: Previous = None
    StoreId: StoreName = None

    @classmethod
    def of(cls, answer: model.HeartbeatAnswer) -> Self:
        lease_s = answer.lease_s
        return cls(
            Role=answer.role,
            LastDataProcessedTime=answer.last_data,
            Epoch=answer.epoch,
            LeaseDuration=None if lease_s is None else round(lease_s * TICKS_PER_SECOND),
            Revision=answer.revision,
            PreviousPrimary=answer.previous,
            StoreId=answer.store_id,
        )


class RoleOverrideRequest(_Shape):
    """What an operator wants a session to be."""

    Value: Annotated[WireOverride, Field(description=_AN_OVERRIDE)]
    ExpirationPeriod: Annotated[
        Annotated[int, _EXPIRATION_SPAN] | None,
        Field(
            description=f"A time-span {_EXPIRATION_SPAN.limits}, after which the override ends;"
            " left out for never."
        ),
    ] = None


class RoleOverrideResponse(_Shape):
    """The override that a session has."""

    Value: Annotated[WireOverride, Field(description=_AN_OVERRIDE)]
    RoleOverrideExpirationTime: Expiration = None

    @classmethod
    def of(cls, record: model.SessionRecord) -> Self:
        return cls(Value=record.override, RoleOverrideExpirationTime=record.override_until)


class ReleaseRequest(_Shape):
    """The holder has demoted: the next one may be promoted now."""

    Epoch: Annotated[
        Count,
        Field(description="An integer from 0 to 9007199254740991: the epoch of the ended tenure."),
    ]
    Instance: InstanceName = None
    HoldOffPeriod: Annotated[
        Annotated[int, _HOLD_OFF_SPAN] | None,
        Field(
            description=f"A time-span {_HOLD_OFF_SPAN.limits}, in which this session is not to be"
            " chosen again."
        ),
    ] = None
    Reason: Annotated[
        str | None,
        Field(max_length=256, description="A string of at most 256 characters, for the history."),
    ] = None
    LastDataProcessedTime: LastData = None


class HistoryEntry(_Shape):
    """One tenure of a primary. Until and WhyEnded are left out while it lasts."""

    Epoch: Annotated[Count, Field(description="An integer, the epoch of the tenure.")]
    SessionId: Annotated[str, Field(description="The session that was primary.")]
    Since: Annotated[UtcDateTime, Field(description="A date-time: when the tenure began.")]
    Until: Annotated[
        OptionalUtcDateTime, Field(description="A date-time: when the tenure ended.")
    ] = None
    WhyStarted: Annotated[str, Field(description="Why this session was chosen.")]
    WhyEnded: Annotated[str | None, Field(description="Why the tenure ended.")] = None

    @classmethod
    def of(cls, entry: model.HistoryEntry) -> Self:
        return cls(
            Epoch=entry.epoch,
            SessionId=entry.session_id,
            Since=entry.since,
            Until=entry.until,
            WhyStarted=entry.why_started,
            WhyEnded=entry.why_ended,
        )


class Trustee(_Shape):
    """Whom an entry speaks of."""

    Type: Annotated[
        int,
        Field(ge=1, le=3, description="An integer: 1 for a user, 2 for a client, 3 for a role."),
        BeforeValidator(_whole),
    ]
    ObjectId: Annotated[
        str,
        Field(min_length=1, max_length=256, description="A string of 1 to 256 characters."),
    ]
    TenantId: Annotated[
        str | None, Field(max_length=256, description="A string of at most 256 characters.")
    ] = None


class AccessControlEntry(_Shape):
    """What one trustee may do, or may not. Denied beats allowed."""

    Trustee: Annotated[Trustee, Field(description="An object with Type and ObjectId.")]
    AccessType: Annotated[
        int,
        Field(ge=0, le=1, description="An integer: 0 for allowed, 1 for denied."),
        BeforeValidator(_whole),
    ]
    AccessRights: Annotated[
        int,
        Field(
            ge=0,
            le=31,
            description="An integer from 0 to 31, the sum of Read 1, Write 2, Delete 4,"
            " ManageAccessControl 8, Share 16.",
        ),
        BeforeValidator(_whole),
    ]


class AccessControlList(_Shape):
    """Who may do what."""

    RoleTrusteeAccessControlEntries: Annotated[
        list[AccessControlEntry],
        Field(
            max_length=MAX_ENTRIES,
            description=f"A list of at most {MAX_ENTRIES} access-control entries.",
        ),
    ]

    @classmethod
    def of(cls, access: model.AccessList) -> Self:
        return cls(
            RoleTrusteeAccessControlEntries=[
                AccessControlEntry(
                    Trustee=Trustee(
                        Type=entry.trustee.kind,
                        ObjectId=entry.trustee.object_id,
                        TenantId=entry.trustee.tenant_id,
                    ),
                    AccessType=int(entry.denied),
                    AccessRights=entry.rights,
                )
                for entry in access.entries
            ]
        )

    def to_model(self) -> model.AccessList:
        return model.AccessList(
            tuple(
                model.AccessEntry(
                    trustee=model.Trustee(
                        kind=entry.Trustee.Type,
                        object_id=entry.Trustee.ObjectId,
                        tenant_id=entry.Trustee.TenantId,
                    ),
                    denied=bool(entry.AccessType),
                    rights=entry.AccessRights,
                )
                for entry in self.RoleTrusteeAccessControlEntries
            )
        )


class AccessControlRequest(AccessControlList):
    """Who may do what from now on. At least one trustee keeps ManageAccessControl."""

    RoleTrusteeAccessControlEntries: Annotated[
        list[AccessControlEntry],
        Field(
            max_length=MAX_ENTRIES,
            description=f"A list of 1 to {MAX_ENTRIES} access-control entries.",
            json_schema_extra={
                "contains": {
                    "properties": {
                        "AccessType": {"const": 0},
                        "AccessRights": {"enum": [r for r in range(32) if r & Right.MANAGE]},
                    }
                }
            },
        ),
    ]

    @model_validator(mode="after")
    def _keeps_a_manager(self) -> Self:
        allowed, denied = (
            {
                (entry.Trustee.Type, entry.Trustee.ObjectId, entry.Trustee.TenantId)
                for entry in self.RoleTrusteeAccessControlEntries
                if entry.AccessType == kind and entry.AccessRights & Right.MANAGE
            }
            for kind in (0, 1)
        )
        if not allowed - denied:
            raise ValueError(
                "nobody would keep the right ManageAccessControl: RoleTrusteeAccessControlEntries"
                " must allow (AccessType 0) it (AccessRights 8) to one trustee that is not denied it"
            )
        return self


class ErrorResponse(_Shape):
    """Why a call was refused, and what to do about it. Further properties are kept."""

    model_config = ConfigDict(extra="allow")

    OperationId: Annotated[str | None, Field(description="Names this call in the log.")] = None
    Error: Annotated[str | None, Field(description="What kind of error it is.")] = None
    Reason: Annotated[str | None, Field(description="Why the call was refused.")] = None
    Resolution: Annotated[str | None, Field(description="What can be done about it.")] = None
    AdditionalParameters: Annotated[
        dict[str, Any] | None, Field(description="An object with further facts.")
    ] = None


class Version(_Shape):
    """What answers at the base path."""

    Version: Annotated[str, Field(description="The version of the server.")]


REQUESTS: tuple[type[BaseModel], ...] = (
    GroupRequest,
    SessionRequest,
    HeartbeatRequest,
    RoleOverrideRequest,
    ReleaseRequest,
    AccessControlRequest,
)
ANSWERS: tuple[type[BaseModel], ...] = (
    GroupConfiguration,
    GroupStatus,
    ClientSession,
    HeartbeatResponse,
    RoleOverrideResponse,
    HistoryEntry,
    ErrorResponse,
    Version,
)


def component_schemas() -> dict[str, Any]:
    """OpenAPI 3.1 ``components.schemas`` of all shapes, by class name."""
    read: list[type[BaseModel]] = [*REQUESTS, AccessControlList]
    shapes: list[tuple[type[BaseModel], JsonSchemaMode]] = []
    shapes += [(shape, "validation") for shape in read]
    shapes += [(shape, "serialization") for shape in ANSWERS]
    _, document = models_json_schema(shapes, ref_template="#/components/schemas/{model}")
    schemas: dict[str, Any] = document["$defs"]
    return schemas


def to_json(value: BaseModel | Sequence[BaseModel], *, enum_names: bool = False) -> bytes:
    """A body. Null properties are left out; roles are numbers, or names with ``enum_names``."""
    return pydantic_core.to_json(value, exclude_none=True, context=enum_names or None)


# --- errors -------------------------------------------------------------------------------------


def explain_request(error: ValidationError) -> str:
    """One sentence on a request's body: which property, what was given, what would be right."""
    whole = "the body"
    first = error.errors(include_url=False)[0]
    place, kind, given = first["loc"], first["type"], first["input"]
    path = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in place).lstrip(".") or whole
    right = _right(error.title, next((p for p in reversed(place) if isinstance(p, str)), ""))
    match kind:
        case "json_invalid":
            return not_json(given, whole, first["ctx"]["error"])
        case "value_error":
            return f"{path}: {first['ctx']['error']}"
        case "missing":
            return f"{path} is missing: it must be {right}"
        case "model_type":
            return f"{path} is {shown(given)}: it must be a JSON object"
        case _:
            return f"{path} is {shown(given)}: it must be {right}"


def _right(title: str, name: str) -> str:
    """The description of a property: of the shape named ``title``, or of one inside it."""
    shapes: list[type[BaseModel]] = [*REQUESTS, *ANSWERS]
    shapes += [AccessControlList, SessionHeartbeat, AccessControlEntry, Trustee]
    shapes.sort(key=lambda shape: shape.__name__ != title)
    described = (s.model_fields[name].description for s in shapes if name in s.model_fields)
    text = next(described, None) or "as the API documents it"
    return text[0].lower() + text[1:].rstrip(".")
