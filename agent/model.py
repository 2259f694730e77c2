"""Values that the agent and the coordinator share: frozen, with no behaviour but derived properties.

Units: seconds are floats named ``_s``; a FailoverTimeout is in ticks of 100 ns, the resolution of the
.NET time-span in the API; date-times are aware and in UTC. Points on a local clock
(``_at``, ``_until``) are seconds on CLOCK_BOOTTIME (R2) and never leave the process.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import IntFlag, StrEnum
from types import MappingProxyType
from typing import Any, NamedTuple

TICKS_PER_SECOND = 10_000_000

MAX_EPOCH = 2**53 - 1
"""The largest integer that every JSON parser represents exactly (RFC 8259, section 6)."""

LONGEST_HOLD_OFF_S = 86_400.0
"""Cap on the hold-off of a release, a day: any repair is done by then, and a member with a longer hold-off would be
forgotten."""

EMPTY: Mapping[str, Any] = MappingProxyType({})


class Role(StrEnum):
    """The role of a session in its group (v1 ClientRole)."""

    SECONDARY = "Secondary"
    PRIMARY = "Primary"
    PENDING_PRIMARY = "PendingPrimary"


class RoleOverride(StrEnum):
    """The override that an operator has set on a session (v1 RoleOverride)."""

    OFF = "Off"
    PRIMARY = "Primary"


class Instant(NamedTuple):
    """One moment, on both clocks.

    Attributes:
        mono: CLOCK_BOOTTIME in seconds. All lease decisions use it.
        wall: UTC. For people, for history and for overrides, which outlive a restart.
    """

    mono: float
    wall: datetime


class GroupKey(NamedTuple):
    """The key of a group on a coordinator. In on-premises paths tenant and namespace are ``default``."""

    tenant: str
    namespace: str
    group: str


class Right(IntFlag):
    """Rights of an access-control entry (v1 AccessRights)."""

    READ = 1
    WRITE = 2
    DELETE = 4
    MANAGE = 8
    SHARE = 16


@dataclass(frozen=True, slots=True)
class Trustee:
    """The subject of an access entry: ``kind`` 1 is a user, 2 a client, 3 a role."""

    kind: int
    object_id: str
    tenant_id: str | None = None


@dataclass(frozen=True, slots=True)
class AccessEntry:
    """One entry of an access-control list. Deny takes precedence over allow."""

    trustee: Trustee
    denied: bool
    rights: int


@dataclass(frozen=True, slots=True)
class AccessList:
    """The access-control list of one group, or of the groups of one namespace."""

    entries: tuple[AccessEntry, ...] = ()


@dataclass(frozen=True, slots=True)
class GroupConfig:
    """The configuration of a group, as created.

    Attributes:
        timeout_ticks: the FailoverTimeout, L.
        additional: AdditionalData, the JSON text of an object, which is passed on unchanged.
    """

    id: str
    timeout_ticks: int
    name: str | None = None
    description: str | None = None
    additional: str | None = None

    @property
    def lease_s(self) -> float:
        """L in seconds."""
        return self.timeout_ticks / TICKS_PER_SECOND


@dataclass(frozen=True, slots=True)
class SessionConfig:
    """The configuration of a client session, as registered. ``additional`` is as in GroupConfig."""

    id: str
    name: str | None = None
    additional: str | None = None


@dataclass(frozen=True, slots=True)
class HoldOff:
    """A period in which a session is not chosen, at its own request.

    Attributes:
        until: its end (wall clock). Only read after a restart.
        length_s: its full length, which caps the rest after a restart if the wall clock has changed.
    """

    until: datetime
    length_s: float


@dataclass(frozen=True, slots=True, order=True)
class Member:
    """A member of a failsafe group: a session and the URL of its failsafe listener.

    The same session with another URL is another member (R22).
    """

    id: str
    url: str


@dataclass(frozen=True, slots=True)
class MemberSet:
    """The members that a holder has to ask while it cannot reach the coordinator (R23).

    Attributes:
        revision: grows with each new set of the group.
        members: all members, the holder included; empty if failsafe is off.
        off: why failsafe is off; None if the set is to be used.
    """

    revision: int
    members: tuple[Member, ...] = ()
    off: str | None = None


@dataclass(frozen=True, slots=True)
class SessionRecord:
    """The durable part of a session.

    Attributes:
        override_until: when the override ends (wall clock), or None for never.
        override_order: grows with each override that is set in the group; the highest one wins.
        hold_off: the session is not chosen before its end.
        has_to_see: the epoch of a tenure that the session held without receiving the coordinator's answers, or
            None. The session is not chosen until its heartbeats report this epoch.
        silent_since: when it was last heard (wall clock); recorded only for a long silence (R20), else None.
        owner: the identity that registered it, such as ``user:ann`` or ``client:host-a``. None: registered
            without authentication, or by a version without owners.
        failsafe_url: the URL of its failsafe listener, by its last registration or heartbeat; or None (R21).
    """

    config: SessionConfig
    override: RoleOverride = RoleOverride.OFF
    override_until: datetime | None = None
    override_order: int = 0
    hold_off: HoldOff | None = None
    has_to_see: int | None = None
    silent_since: datetime | None = None
    owner: str | None = None
    failsafe_url: str | None = None


@dataclass(frozen=True, slots=True)
class Tenure:
    """One holding of the role, from promotion to demotion (R15).

    Attributes:
        instance: the process that confirmed it, or None for a plain v1 client. Another process with
            the same session id does not continue it.
        revoked: heartbeats of the holder are answered Secondary, and its lease is not renewed.
    """

    session_id: str
    epoch: int
    since: datetime
    why: str
    instance: str | None = None
    revoked: bool = False


@dataclass(frozen=True, slots=True)
class GroupRecord:
    """The durable part of a group: one versioned value, swapped by compare-and-set (R13).

    Attributes:
        epoch: the highest epoch of this group, whether assigned here or seen by a client.
        revision: grows with each change of the status (holder, pending, epoch).
        pending: the candidate to take over, or None.
        previous: the session of the previous tenure, or None.
        last_data: LastDataProcessedTime of the previous tenure, for the next holder.
        acl: the group's own access-control list, or None for its namespace's.
        quiet: whether a client has seen a newer epoch than this record had, so that an unknown lease may
            exist. No tenure begins for one full L, which a restart begins again.
        ended: the last tenure, if it ended without a release: its holder may resume it (R33), and the
            hold-off of a late release counts once. ``ended_at`` is when it ended.
        cleared: each tenure up to this epoch is over (R24).
        used: the set of members that the holder asks while it cannot reach the coordinator, or None.
        offered: a newer set, which the holder has not acknowledged yet, or None.
        set_revision: the revision of the newest set.
    """

    config: GroupConfig
    sessions: Mapping[str, SessionRecord] = field(default_factory=lambda: EMPTY)
    holder: Tenure | None = None
    pending: str | None = None
    epoch: int = 0
    revision: int = 1
    previous: str | None = None
    last_data: datetime | None = None
    acl: AccessList | None = None
    quiet: bool = False
    ended: Tenure | None = None
    ended_at: datetime | None = None
    cleared: int = 0
    used: MemberSet | None = None
    offered: MemberSet | None = None
    set_revision: int = 0


@dataclass(frozen=True, slots=True)
class Progress:
    """The newest LastDataProcessedTime that was reported within a tenure.

    Attributes:
        epoch: of that tenure; a later tenure does not continue its progress.
    """

    epoch: int
    last_data: datetime


class TenureEnd(StrEnum):
    """How a tenure ended, as a closed set for metrics. History also has a sentence."""

    RELEASED = "released"
    EXPIRED = "expired"
    DELETED = "deleted"
    DATA_LOSS = "data_loss"
    """A client has seen a newer epoch than the coordinator's data has."""
    REFUSED = "refused"
    """The session refused the role because of a promise to another member, and was never active (R30)."""
    LIFTED = "lifted"
    """An operator has declared that nobody is active (R34). The entry has no session."""
    RESTORED = "restored"
    """The store was declared as restored from a copy (R34). The entry has no session."""


@dataclass(frozen=True, slots=True)
class HistoryEntry:
    """A tenure in the history. ``until``, ``why_ended`` and ``end`` are None until it ends."""

    epoch: int
    session_id: str
    since: datetime
    why_started: str
    until: datetime | None = None
    why_ended: str | None = None
    end: TenureEnd | None = None


class FailsafeState(StrEnum):
    """The state of failsafe in a group, for operators."""

    OFF = "Off"
    """A holder that loses contact with the coordinator demotes at R."""
    READY = "Ready"
    """The holder has a set of members to ask."""
    RESTRICTED = "Restricted"
    """Nobody holds the role, and only members that the former holder would ask may get it."""


@dataclass(frozen=True, slots=True)
class Lapsed:
    """A tenure whose lease has expired, though its holder may still be active by failsafe."""

    session_id: str
    epoch: int
    since: datetime


@dataclass(frozen=True, slots=True)
class FailsafeStatus:
    """The failsafe part of a status.

    Attributes:
        why: the reason of the state, for people.
        revision: the revision of ``members``.
        members: the set that the holder uses, or used.
        choosable: the members that may be promoted while the group is restricted; else None.
    """

    state: FailsafeState
    why: str | None = None
    revision: int | None = None
    members: tuple[Member, ...] = ()
    choosable: tuple[Member, ...] | None = None
    lapsed: Lapsed | None = None


@dataclass(frozen=True, slots=True)
class GroupStatus:
    """The answer to a status read. A plain v1 server omits the fields after ``last_data``.

    Attributes:
        cleared: the epoch up to which every tenure is over; None in a group without failsafe.
    """

    primary: str | None = None
    pending: str | None = None
    last_data: datetime | None = None
    epoch: int | None = None
    revision: int | None = None
    primary_since: datetime | None = None
    previous: str | None = None
    store_id: str | None = None
    leader: str | None = None
    cleared: int | None = None
    failsafe: FailsafeStatus | None = None


@dataclass(frozen=True, slots=True)
class HeartbeatAnswer:
    """The answer to a heartbeat. A plain v1 server omits the fields after ``last_data``.

    Attributes:
        lease_s: L, counted by the coordinator from its receipt of the heartbeat.
        store_id: the store behind the answer; an agent accepts answers from one store only.
        cleared: the epoch up to which every tenure is over, for members with a failsafe listener.
        failsafe: for the holder, the set of members to ask; None: it asks nobody.
    """

    role: Role
    last_data: datetime | None = None
    epoch: int | None = None
    revision: int | None = None
    lease_s: float | None = None
    previous: str | None = None
    store_id: str | None = None
    cleared: int | None = None
    failsafe: MemberSet | None = None


@dataclass(frozen=True, slots=True)
class SessionView:
    """A session as the API shows it (v1 ClientSession).

    Attributes:
        heartbeat_at: time of the last heartbeat, or None if none came since the coordinator started.
        store_id: the store that the session is registered in.
        active: whether it was heard within L. A plain v1 server does not report it.
        silent_since: when an inactive session was last heard, or the latest time at which it may have been.
    """

    record: SessionRecord
    role: Role
    score: float = 0.0
    last_data: datetime | None = None
    heartbeat_at: datetime | None = None
    store_id: str | None = None
    active: bool | None = None
    silent_since: datetime | None = None
