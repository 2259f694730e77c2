"""The values that the whole project speaks of. Frozen, and without behaviour beyond their own.

Units: seconds are floats named ``_s``; a FailoverTimeout is kept in ticks of 100 ns, the resolution
of the .NET time-span that it travels as; date-times are aware and in UTC. Points on a local clock
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
"""The largest integer that every JSON reader keeps exactly (RFC 8259, section 6)."""

LONGEST_HOLD_OFF_S = 86_400.0
"""The longest hold-off of a release: a day outlasts every repair that somebody is waiting for, and a
member that asked for more would be forgotten rather than spared."""

EMPTY: Mapping[str, Any] = MappingProxyType({})


class Role(StrEnum):
    """What a session is in its group (v1 ClientRole)."""

    SECONDARY = "Secondary"
    PRIMARY = "Primary"
    PENDING_PRIMARY = "PendingPrimary"


class RoleOverride(StrEnum):
    """What an operator has asked a session to be (v1 RoleOverride)."""

    OFF = "Off"
    PRIMARY = "Primary"


class Instant(NamedTuple):
    """One moment, on both clocks.

    Attributes:
        mono: CLOCK_BOOTTIME in seconds. Decides everything about leases.
        wall: UTC. For people, for history and for overrides, which outlive a restart.
    """

    mono: float
    wall: datetime


class GroupKey(NamedTuple):
    """Names one group on a coordinator. The on-premises paths use ``default``, ``default``."""

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
    """Whom an entry speaks of: ``kind`` 1 is a user, 2 a client, 3 a role."""

    kind: int
    object_id: str
    tenant_id: str | None = None


@dataclass(frozen=True, slots=True)
class AccessEntry:
    """One line of an access-control list. Denied beats allowed."""

    trustee: Trustee
    denied: bool
    rights: int


@dataclass(frozen=True, slots=True)
class AccessList:
    """Who may do what with one group, or with the groups of one namespace."""

    entries: tuple[AccessEntry, ...] = ()


@dataclass(frozen=True, slots=True)
class GroupConfig:
    """A group as its creator described it. ``timeout_ticks`` is the FailoverTimeout, L."""

    id: str
    timeout_ticks: int
    name: str | None = None
    description: str | None = None
    additional: Mapping[str, Any] | None = None

    @property
    def lease_s(self) -> float:
        """L in seconds."""
        return self.timeout_ticks / TICKS_PER_SECOND


@dataclass(frozen=True, slots=True)
class SessionConfig:
    """A client session as its creator described it."""

    id: str
    name: str | None = None
    additional: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class HoldOff:
    """A session asked not to be chosen for a time.

    Attributes:
        until: when it ends (wall clock). Only a restart reads this.
        length_s: the whole of it: what is left after a restart is not more, whatever the wall
            clock says.
    """

    until: datetime
    length_s: float


@dataclass(frozen=True, slots=True)
class SessionRecord:
    """The durable part of a session.

    Attributes:
        override_until: when the override ends (wall clock), or None for never.
        override_order: grows with each override that is set in the group; the highest one wins.
        hold_off: it is not chosen before this has passed.
        has_to_see: the epoch of a tenure that it held without ever receiving our answers, or None.
            It is not chosen until its heartbeats carry this epoch.
    """

    config: SessionConfig
    override: RoleOverride = RoleOverride.OFF
    override_until: datetime | None = None
    override_order: int = 0
    hold_off: HoldOff | None = None
    has_to_see: int | None = None


@dataclass(frozen=True, slots=True)
class Tenure:
    """One holder's time as primary (R15).

    Attributes:
        instance: which process of that session confirmed it, or None for a plain v1 client. Another
            process with the same session id does not continue it.
        revoked: the holder is being told to demote; its lease is extended no more.
        last_data: the newest LastDataProcessedTime that it reported, as last made durable.
    """

    session_id: str
    epoch: int
    since: datetime
    why: str
    instance: str | None = None
    revoked: bool = False
    last_data: datetime | None = None


@dataclass(frozen=True, slots=True)
class GroupRecord:
    """The durable part of a group: one versioned value, swapped by compare-and-set (R13).

    Attributes:
        epoch: the highest ever given in this group, or seen by one of its clients.
        revision: grows with each change of the status (holder, pending, epoch).
        pending: the session that is chosen to take over, or None.
        previous: the session of the tenure before, or None.
        last_data: what the next holder is told: the last LastDataProcessedTime of the tenures before.
        acl: the group's own access-control list, or None for its namespace's.
        quiet: a client has seen a newer epoch than this record had, so a lease may exist that it does
            not know. No tenure begins for one full L; a restart begins that L anew.
        ended: the last tenure, if it ended without a release: the hold-off of a release that comes
            late still counts, once.
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


class TenureEnd(StrEnum):
    """How a tenure ended, as a closed set: for metrics. History has a sentence besides."""

    RELEASED = "released"
    EXPIRED = "expired"
    DELETED = "deleted"
    DATA_LOSS = "data_loss"
    """A client has seen a newer epoch than the data."""


@dataclass(frozen=True, slots=True)
class HistoryEntry:
    """One tenure, as history keeps it. ``until``, ``why_ended`` and ``end`` are None while it lasts."""

    epoch: int
    session_id: str
    since: datetime
    why_started: str
    until: datetime | None = None
    why_ended: str | None = None
    end: TenureEnd | None = None


@dataclass(frozen=True, slots=True)
class GroupStatus:
    """What a status read tells. A plain v1 server leaves out the part after ``last_data``."""

    primary: str | None
    pending: str | None
    last_data: datetime | None
    epoch: int | None = None
    revision: int | None = None
    primary_since: datetime | None = None
    previous: str | None = None
    store_id: str | None = None


@dataclass(frozen=True, slots=True)
class HeartbeatAnswer:
    """What a heartbeat is told. A plain v1 server leaves out the part after ``last_data``.

    Attributes:
        lease_s: how long the coordinator waits for the next heartbeat, from its receipt of this one.
        store_id: the store that decided; an agent takes answers from one store only.
    """

    role: Role
    last_data: datetime | None = None
    epoch: int | None = None
    revision: int | None = None
    lease_s: float | None = None
    previous: str | None = None
    store_id: str | None = None


@dataclass(frozen=True, slots=True)
class SessionView:
    """A session as a reader sees it (v1 ClientSession).

    Attributes:
        heartbeat_at: when the last heartbeat came, or None if none came since the coordinator started.
        store_id: the store that the session is registered in.
    """

    record: SessionRecord
    role: Role
    score: float = 0.0
    last_data: datetime | None = None
    heartbeat_at: datetime | None = None
    store_id: str | None = None
