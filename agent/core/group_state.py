"""A group in the coordinator: its state, the inputs that change it, and reads of it, as values.

Decides nothing; core/group.py does. ``GroupState.record`` is durable, ``GroupState.live`` is lost
at a restart; ``state_after_restart`` and ``state_after_stall`` rebuild it in favour of the lease holder
(R14). All moments are CLOCK_BOOTTIME seconds unless they are date-times.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from enum import StrEnum

from agent.core.group_failsafe import status_of_failsafe, uses_failsafe
from agent.errors import NotFound
from agent.model import (
    EMPTY,
    MAX_EPOCH,
    AccessList,
    GroupRecord,
    GroupStatus,
    HeartbeatAnswer,
    HistoryEntry,
    HoldOff,
    Instant,
    Progress,
    Role,
    RoleOverride,
    SessionConfig,
    SessionRecord,
)


@dataclass(frozen=True, slots=True)
class Policy:
    """When a better session replaces a live primary (R17), and which sessions are kept.

    Attributes:
        score_hysteresis: how much higher its score must be; 0 is strict v1.
        minimum_hold_s: how long the primary must have held the role, in seconds; 0 is strict v1.
        max_sessions: cap on a group's sessions, so that one caller cannot fill the memory.
        dead_session_retention_s: how long a silent session is kept (R20), at least 10 L.
    """

    score_hysteresis: float = 10.0
    minimum_hold_s: float = 30.0
    max_sessions: int = 100
    dead_session_retention_s: float = 604_800.0


@dataclass(frozen=True, slots=True)
class Contact:
    """The part of a session that is not durable: what was received since the coordinator started.

    Attributes:
        heard_at: when it was last heard, or when its grace after a restart began.
        last_heartbeat: when the last heartbeat came, or None.
        answered_revision: the group's revision in the last answer, or None.
        passed_over: whether it is not chosen, as it did not confirm or has released the role; its next heartbeat
            clears this.
        hold_off_until: the end of its hold-off, before which it is not chosen; also in the record.
        changed_at: when a heartbeat of another instance was last accepted within the minimum interval.
        promised: whether its last heartbeat reported a promise, which forbids it to become primary (R30).
    """

    heard_at: float
    last_heartbeat: Instant | None = None
    score: float = 0.0
    last_data: datetime | None = None
    instance: str | None = None
    answered_revision: int | None = None
    passed_over: bool = False
    hold_off_until: float = float("-inf")
    changed_at: float = float("-inf")
    promised: bool = False


@dataclass(frozen=True, slots=True)
class Live:
    """The part of a group's state that is lost at a restart. All times are CLOCK_BOOTTIME seconds.

    Attributes:
        lease_until: end of the holder's lease; meaningless without a holder.
        held_since: start of the tenure; moved by a restart, and by each stall until the tenure is acknowledged.
        confirm_by: deadline of the pending session to confirm; then it is passed over.
        quiet_until: end of the quiet time; meaningless without one.
        answers_reach_holder: whether a heartbeat of the holder has reported the tenure's epoch.
        last_data: the newest LastDataProcessedTime of this tenure.
    """

    contacts: Mapping[str, Contact] = field(default_factory=lambda: EMPTY)
    lease_until: float = float("-inf")
    held_since: float = float("-inf")
    confirm_by: float = float("-inf")
    quiet_until: float = float("-inf")
    answers_reach_holder: bool = False
    last_data: datetime | None = None


@dataclass(frozen=True, slots=True)
class GroupState:
    """The whole state of a group, durable and not."""

    record: GroupRecord
    live: Live = field(default_factory=Live)


@dataclass(frozen=True, slots=True)
class Requester:
    """The caller of a request, if callers are authenticated.

    Attributes:
        identity: as in ``SessionRecord.owner``.
        manages: whether it has the right to act for sessions of other identities.
    """

    identity: str
    manages: bool = False


@dataclass(frozen=True, slots=True)
class ReceiveHeartbeat:
    """A heartbeat was received. Only our own agents send ``instance`` and the fields after it.

    Attributes:
        failsafe_url: the failsafe listener of this process.
        holds: the epoch in which this process is primary.
        failsafe_revision: the revision of the set of members that it uses.
        promised: whether a promise to another member forbids it to become primary.
    """

    session_id: str
    score: float
    last_data: datetime | None = None
    instance: str | None = None
    seen_epoch: int | None = None
    by: Requester | None = None
    failsafe_url: str | None = None
    holds: int | None = None
    failsafe_revision: int | None = None
    promised: bool = False


@dataclass(frozen=True, slots=True)
class AddSession:
    """A client registers; ``instance`` and ``failsafe_url`` as in its heartbeats (R21, R22)."""

    config: SessionConfig
    by: Requester | None = None
    instance: str | None = None
    failsafe_url: str | None = None


@dataclass(frozen=True, slots=True)
class RemoveSession:
    """Delete a session, for its client or another caller; ``only_inactive``: refuse if it is active."""

    session_id: str
    by: Requester | None = None
    only_inactive: bool = False


@dataclass(frozen=True, slots=True)
class SetOverride:
    """An operator sets a role override; without ``until`` it does not expire."""

    session_id: str
    value: RoleOverride
    until: datetime | None = None


@dataclass(frozen=True, slots=True)
class ReleaseRole:
    """The holder has demoted and releases the role.

    Ignored unless session, epoch and instance are those of the current tenure, or of the last one if that has
    expired: then only hold-off and failsafe are updated. ``held`` False: the process has refused the tenure.
    """

    session_id: str
    epoch: int
    instance: str | None = None
    why: str = "released"
    hold_off_s: float = 0.0
    last_data: datetime | None = None
    by: Requester | None = None
    held: bool = True


@dataclass(frozen=True, slots=True)
class Lift:
    """An operator has made sure that nobody is active, so that every member may be promoted (R34)."""

    epoch: int
    reason: str
    by: Requester | None = None


@dataclass(frozen=True, slots=True)
class DeclareRestored:
    """An operator has put back an older copy of the record (R34)."""


@dataclass(frozen=True, slots=True)
class SetAccess:
    """Replace the group's own access-control list; None removes it."""

    acl: AccessList | None


@dataclass(frozen=True, slots=True)
class RemoveGroup:
    """Delete the group. Refused while a session is alive."""


@dataclass(frozen=True, slots=True)
class Tick:
    """No input: apply the changes that are due."""


Input = (
    ReceiveHeartbeat
    | AddSession
    | RemoveSession
    | SetOverride
    | ReleaseRole
    | Lift
    | DeclareRestored
    | SetAccess
    | RemoveGroup
    | Tick
)


class RemovalCause(StrEnum):
    """Why the coordinator removed a session by itself."""

    RETENTION = "retention"
    """The session was silent for longer than the retention."""
    FULL = "full"
    """The group was full, and a new session needed the place."""


@dataclass(frozen=True, slots=True)
class Removal:
    """A dead session that the coordinator removed by itself (R20)."""

    session_id: str
    silent_s: float
    cause: RemovalCause


@dataclass(frozen=True, slots=True)
class Decision:
    """The result of ``decide``.

    Attributes:
        answer: a HeartbeatAnswer for ReceiveHeartbeat; for AddSession whether it was created; else None.
        history: tenures that began or ended, to upsert by epoch together with the record.
        wake_at: when to call ``decide`` with a Tick at the latest, or infinity.
        removals: the sessions that were removed because they are dead.
    """

    state: GroupState
    answer: HeartbeatAnswer | bool | None
    history: tuple[HistoryEntry, ...]
    wake_at: float
    removals: tuple[Removal, ...] = ()


def state_after_restart(
    record: GroupRecord, now: Instant, progress: Progress | None = None
) -> GroupState:
    """The state of a group after a restart (R14).

    Every session gets one full L, a quiet time starts again, and a hold-off continues. ``progress`` is used if
    it belongs to the current tenure.
    """
    if record.epoch > MAX_EPOCH:  # version 0.1.0 let clients cause this; no answer can contain more
        record = replace(record, epoch=MAX_EPOCH, holder=None)
    lease_s = record.config.lease_s
    contacts = {
        session_id: Contact(
            heard_at=now.mono, hold_off_until=_hold_off_until(session.hold_off, now)
        )
        for session_id, session in record.sessions.items()
    }
    live = Live(contacts=contacts)
    if record.quiet:
        live = replace(live, quiet_until=now.mono + lease_s)
    if record.holder is not None:
        live = replace(live, lease_until=now.mono + lease_s, held_since=now.mono)
        if progress is not None and progress.epoch == record.holder.epoch:
            live = replace(live, last_data=progress.last_data)
    if record.pending is not None:
        live = replace(live, confirm_by=now.mono + lease_s * (2 if record.quiet else 1))
    return GroupState(record, live)


def _hold_off_until(hold_off: HoldOff | None, now: Instant) -> float:
    if hold_off is None:
        return float("-inf")
    left_s = (hold_off.until - now.wall).total_seconds()
    return now.mono + min(max(0.0, left_s), hold_off.length_s)


def state_after_stall(state: GroupState, judged_at: float, now: Instant) -> GroupState:
    """The state after the coordinator itself has stalled since ``judged_at``.

    Each deadline that had not passed then is moved by the stall, whose heartbeats may still be unread (R14); by no
    more than that, so that recurring stalls do not keep a holder that is dead, or receives no answers (R16).
    """
    stall_s, lease_s = now.mono - judged_at, state.record.config.lease_s
    contacts = {
        session_id: replace(contact, heard_at=min(contact.heard_at + stall_s, now.mono))
        if contact.heard_at + lease_s > judged_at
        else contact
        for session_id, contact in state.live.contacts.items()
    }
    live = replace(state.live, contacts=contacts, confirm_by=state.live.confirm_by + stall_s)
    if state.record.holder is not None and live.lease_until > judged_at:
        live = replace(live, lease_until=min(live.lease_until + stall_s, now.mono + lease_s))
        if not live.answers_reach_holder:
            live = replace(live, held_since=min(live.held_since + stall_s, now.mono))
    return GroupState(state.record, live)


def status_of(state: GroupState) -> GroupStatus:
    """The answer to a status read."""
    record = state.record
    holder = record.holder
    return GroupStatus(
        primary=holder.session_id if holder else None,
        pending=record.pending,
        last_data=last_data_of(state),
        epoch=record.epoch,
        revision=record.revision,
        primary_since=holder.since if holder else None,
        previous=record.previous,
        cleared=record.cleared if uses_failsafe(record) else None,
        failsafe=status_of_failsafe(record),
    )


def last_data_of(state: GroupState) -> datetime | None:
    """The primary's LastDataProcessedTime, or the previous tenure's until it reports one (R18)."""
    if state.record.holder is not None and state.live.last_data is not None:
        return state.live.last_data
    return state.record.last_data


def role_of(record: GroupRecord, session_id: str) -> Role:
    """The role that a session has in the group."""
    if record.holder is not None and record.holder.session_id == session_id:
        return Role.PRIMARY
    return Role.PENDING_PRIMARY if record.pending == session_id else Role.SECONDARY


def last_heard(state: GroupState, session_id: str, now: Instant) -> datetime:
    """When a session was last heard, by the wall clock; before a restart only if that was recorded."""
    contact = state.live.contacts[session_id]
    recorded = state.record.sessions[session_id].silent_since
    if recorded is not None and contact.last_heartbeat is None:
        return recorded
    return now.wall - timedelta(seconds=now.mono - contact.heard_at)


def is_alive(state: GroupState, session_id: str, now: Instant) -> bool:
    """Whether a session's last heartbeat, or the start of its grace, is less than L ago."""
    contact = state.live.contacts.get(session_id)
    return contact is not None and now.mono < contact.heard_at + state.record.config.lease_s


def is_active(state: GroupState, session_id: str, now: Instant) -> bool:
    """Whether a session is alive, or has the role or is about to get it."""
    return role_of(state.record, session_id) is not Role.SECONDARY or is_alive(
        state, session_id, now
    )


def progress_of(state: GroupState) -> Progress | None:
    """The data-processed time of the current tenure, which is stored beside the record (R13)."""
    holder, last_data = state.record.holder, state.live.last_data
    return None if holder is None or last_data is None else Progress(holder.epoch, last_data)


def session_of(record: GroupRecord, session_id: str) -> SessionRecord:
    """A registered session.

    Raises:
        NotFound: there is none.
    """
    try:
        return record.sessions[session_id]
    except KeyError:
        raise NotFound(
            f'There is no client session "{session_id}" in group "{record.config.id}".',
            "Register it with POST .../clientsessions first.",
        ) from None
