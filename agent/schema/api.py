"""The JSON shapes of the group API, each declared once for both the coordinator and its clients.

A property's name in JSON is the field's name in PascalCase, except for WIRE_NAMES. ``from_model`` converts a value
of model.py into a shape, and ``to_model`` converts it back; their fields have the same names. ``*Request`` shapes
are the bodies of requests; the others are answers, in which a v1 server leaves out many properties. Unknown
properties are ignored, and null means absent. A string in an annotation explains the property, in the OpenAPI
document and at the end of an error's sentence, after its type in words ("... it must be a number from ...").

Knows nothing of HTTP, of callers and of decisions. codec.py decodes and encodes; access.py has the shapes of
access-control lists, failsafe_api.py those of failsafe.
"""

from typing import Annotated, Self

from msgspec import Meta

from agent import model
from agent.model import TICKS_PER_SECOND
from agent.schema.failsafe_api import Cleared, FailsafeSet, FailsafeStatus, GivenFailsafeUrl
from agent.schema.values import (
    OVERRIDES,
    ROLES,
    Additional,
    Count,
    ExpirationSpan,
    GivenAdditional,
    HoldOffSpan,
    Id,
    Lease,
    LeaseSpan,
    Mirror,
    Moment,
    Name,
    NeededMoment,
    OverrideCode,
    RoleCode,
    Shape,
    TimeSpan,
)

REQUEST_HEADER = "failover-request"
"""Header of a request: a number that its answer repeats, so the answer to another request is known."""

DEFAULT_TIMEOUT_TICKS = 60 * TICKS_PER_SECOND
"""00:01:00, the FailoverTimeout that v1 clients take when none is given."""

When = Moment | None

# --- properties that several shapes have ----------------------------------------------------------

Text = Annotated[str, Meta(max_length=1024)] | None
Score = Annotated[float, Meta(ge=0, le=100)]
NewestEpoch = Annotated[Count | None, "it grows with each tenure of a primary"]
Revision = Annotated[Count | None, "it grows with each change of the group's status"]
Previous = Annotated[Name | None, "the session of the tenure before"]
StoreId = Annotated[
    Annotated[str, Meta(max_length=128, pattern=r"^[^\x00]*\Z")] | None,
    "the id of the coordinator's store, made with its data directory",
]
GivenLastData = Annotated[
    When,
    "the time of the newest data in ISO 8601, such as 2026-01-31T12:00:00Z. Without a zone it is UTC;"
    " 0001-01-01T00:00:00 means never",
]
Instance = Annotated[str, Meta(max_length=128), "which process of this session calls"] | None
OverrideEnd = Annotated[When, "when the override ends; left out for never"]

# --- groups -------------------------------------------------------------------------------------


class GroupConfiguration(Mirror[model.GroupConfig], frozen=True):
    """A group, as its creator described it."""

    id: Annotated[str | None, "the id of the group"] = None
    name: Annotated[str | None, "a name for people"] = None
    description: Annotated[str | None, "what the group is for"] = None
    timeout_ticks: Annotated[
        TimeSpan | None, "how long a session may be silent before it counts as inactive"
    ] = None
    additional: Additional | None = None

    def to_model(self) -> model.GroupConfig:
        """The group; without a FailoverTimeout it has v1's default."""
        ticks = DEFAULT_TIMEOUT_TICKS if self.timeout_ticks is None else int(self.timeout_ticks)
        additional = None if self.additional is None else self.additional.text
        return model.GroupConfig(self.id or "", ticks, self.name, self.description, additional)


class GroupRequest(GroupConfiguration, frozen=True, kw_only=True):
    """A group to create. Id and FailoverTimeout are needed; nothing of it can be changed later."""

    id: Id
    name: Text = None
    description: Text = None
    additional: GivenAdditional | None = None
    timeout_ticks: Annotated[
        LeaseSpan,
        "a session that sends no heartbeat for longer counts as inactive. An ISO 8601 duration such as"
        " PT1M is read too",
    ]


class GroupStatus(Mirror[model.GroupStatus], frozen=True):
    """Who is primary in a group, and since when."""

    primary: Annotated[Name | None, "the session that is primary"] = None
    pending: Annotated[Name | None, "the session that is about to take over"] = None
    last_data: Annotated[When, "when the primary last processed data"] = None
    epoch: NewestEpoch = None
    revision: Revision = None
    primary_since: Annotated[When, "when this primary's tenure began"] = None
    previous: Previous = None
    store_id: StoreId = None
    leader: Annotated[str | None, "the URL of the coordinator that leads the group"] = None
    cleared: Cleared = None
    failsafe: Annotated[
        FailsafeStatus | None, "the state of failsafe; left out in groups without failsafe"
    ] = None


class HistoryEntry(Mirror[model.HistoryEntry], frozen=True, kw_only=True):
    """One tenure of a primary. Until and WhyEnded are left out while it lasts."""

    epoch: Annotated[Count, "the epoch of the tenure"]
    session_id: Annotated[str, "the session that was primary"]
    since: Annotated[NeededMoment, "when the tenure began"]
    until: Annotated[When, "when the tenure ended"] = None
    why_started: Annotated[str, "why this session was chosen"]
    why_ended: Annotated[str | None, "why the tenure ended"] = None


# --- sessions -----------------------------------------------------------------------------------


class SessionRequest(Mirror[model.SessionConfig], frozen=True):
    """A client session to create. Only its Instance and FailsafeUrl can be changed later."""

    id: Id
    name: Text = None
    additional: GivenAdditional | None = None
    instance: Instance = None
    failsafe_url: GivenFailsafeUrl = None


class SessionHeartbeat(Shape, frozen=True):
    """The last heartbeat of a session. Without HeartbeatTime there was none."""

    score: Score | None = None
    last_data: Annotated[When, "when the session last processed data"] = None
    heartbeat_at: Annotated[When, "when the heartbeat was received"] = None


class ClientSession(Shape, frozen=True):
    """A member of a group."""

    id: Annotated[str, "the id of the session"]
    name: Annotated[str | None, "a name for people"] = None
    heartbeat: Annotated[SessionHeartbeat | None, "the last heartbeat of the session"] = None
    role: RoleCode | None = None
    heartbeat_posted: Annotated[bool | None, "whether a heartbeat came since the start"] = None
    role_override: OverrideCode | None = None
    role_override_expiration_time: OverrideEnd = None
    additional: Additional | None = None
    active: Annotated[bool | None, "whether it was heard within FailoverTimeout"] = None
    silent_since: Annotated[When, "when an inactive session was last heard"] = None
    store_id: StoreId = None

    @classmethod
    def from_model(cls, view: model.SessionView) -> Self:
        """Heartbeat is always there: v1 clients read it without asking."""
        record, config = view.record, view.record.config
        return cls(
            id=config.id,
            name=config.name,
            heartbeat=SessionHeartbeat(view.score, view.last_data, view.heartbeat_at),
            role=ROLES[view.role],
            heartbeat_posted=view.heartbeat_at is not None,
            role_override=OVERRIDES[record.override],
            role_override_expiration_time=record.override_until,
            additional=None if config.additional is None else Additional(config.additional),
            active=view.active,
            silent_since=view.silent_since,
            store_id=view.store_id,
        )

    def to_model(self) -> model.SessionView:
        beat = self.heartbeat or SessionHeartbeat()
        additional = None if self.additional is None else self.additional.text
        return model.SessionView(
            record=model.SessionRecord(
                config=model.SessionConfig(self.id, self.name, additional),
                override=(self.role_override or OVERRIDES[model.RoleOverride.OFF]).member,
                override_until=self.role_override_expiration_time,
            ),
            role=(self.role or ROLES[model.Role.SECONDARY]).member,
            score=beat.score or 0.0,
            last_data=beat.last_data,
            heartbeat_at=beat.heartbeat_at,
            store_id=self.store_id,
            active=self.active,
            silent_since=self.silent_since,
        )


# --- what a session sends -------------------------------------------------------------------------


class HeartbeatRequest(Shape, frozen=True):
    """A heartbeat. A plain v1 client omits Instance and Epoch."""

    score: Annotated[Score, "the share of streams that are active"]
    last_data: GivenLastData = None
    instance: Instance = None
    epoch: Annotated[
        Count | None, "the highest epoch the client saw, at most 8589934592 above the group's"
    ] = None
    failsafe_url: GivenFailsafeUrl = None
    holds: Annotated[Count | None, "the epoch in which this process is primary"] = None
    failsafe_revision: Annotated[Count | None, "the revision of the set that a primary uses"] = None
    promised: Annotated[
        bool | None, "whether a promise to another member forbids this one to be primary now"
    ] = None


class HeartbeatResponse(Mirror[model.HeartbeatAnswer], frozen=True):
    """The role of a session from now on, and its lease."""

    role: RoleCode
    last_data: Annotated[When, "when the group's primary last processed data"] = None
    epoch: NewestEpoch = None
    lease_s: Annotated[Lease | None, "how long the next heartbeat is waited for"] = None
    revision: Revision = None
    previous: Previous = None
    store_id: StoreId = None
    cleared: Cleared = None
    failsafe: Annotated[FailsafeSet | None, "the members that a primary has to ask"] = None

    @classmethod
    def from_model(cls, value: model.HeartbeatAnswer) -> Self:
        """Convert an answer. By hand: Mirror's way takes several times as long, thousands of times a second."""
        lease_s, failsafe = value.lease_s, value.failsafe
        return cls(
            ROLES[value.role],
            value.last_data,
            value.epoch,
            None if lease_s is None else Lease(round(lease_s * TICKS_PER_SECOND)),
            value.revision,
            value.previous,
            value.store_id,
            value.cleared,
            None if failsafe is None else FailsafeSet.from_model(failsafe),
        )


class ReleaseRequest(Shape, frozen=True):
    """The holder's notice that it has demoted, so that the next member can be promoted at once."""

    epoch: Annotated[Count, "the epoch of the ended tenure"]
    instance: Instance = None
    hold_off_period: Annotated[
        HoldOffSpan | None, "how long this session is not to be chosen again"
    ] = None
    reason: Annotated[str, Meta(max_length=256), ", for the history"] | None = None
    last_data: GivenLastData = None
    held: Annotated[
        bool | None,
        "false if this process has refused the tenure and was never primary in it; left out for true",
    ] = None


class RoleOverrideRequest(Shape, frozen=True):
    """An operator's override of the role of a session."""

    value: OverrideCode
    expiration_period: Annotated[
        ExpirationSpan | None, "how long the override lasts; left out for ever"
    ] = None


class RoleOverrideResponse(Shape, frozen=True):
    """The override that a session has."""

    value: OverrideCode
    role_override_expiration_time: OverrideEnd = None

    @classmethod
    def from_model(cls, record: model.SessionRecord) -> Self:
        override, until = OVERRIDES[record.override], record.override_until
        return cls(value=override, role_override_expiration_time=until)


# --- the service itself -------------------------------------------------------------------------


class ErrorResponse(Shape, frozen=True):
    """Why a call was refused, and what to do about it. Further properties are possible."""

    operation_id: Annotated[str | None, "it names this call in the log"] = None
    error: Annotated[str | None, "what kind of error it is"] = None
    reason: Annotated[str | None, "why the call was refused"] = None
    resolution: Annotated[str | None, "what can be done about it"] = None
    additional_parameters: Annotated[Additional | None, "further facts"] = None


class Version(Shape, frozen=True):
    """The version of the service, as answered at the base path."""

    version: Annotated[str, "the version of the server"]
