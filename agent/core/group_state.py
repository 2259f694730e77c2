"""A coordinator's group as values: the state, what can come in, what is read out of it.

Nothing here decides; core/group.py does. ``GroupState.record`` is durable, ``GroupState.live`` is
what a restart forgets; ``awaken`` and ``excuse`` rebuild it to the advantage of whoever holds a lease
(R14). All moments are CLOCK_BOOTTIME seconds unless they are date-times.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime

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
    Role,
    RoleOverride,
    SessionConfig,
    SessionRecord,
    SessionView,
)


@dataclass(frozen=True, slots=True)
class Policy:
    """How eagerly a live primary is replaced by a better one (R17).

    Attributes:
        score_hysteresis: its score must be exceeded by more than this; 0 is strict v1.
        minimum_hold_s: and it must have held for this long, in seconds; 0 is strict v1.
        max_sessions: bound on a group's sessions, so that one caller cannot fill the memory.
    """

    score_hysteresis: float = 10.0
    minimum_hold_s: float = 30.0
    max_sessions: int = 100


@dataclass(frozen=True, slots=True)
class Contact:
    """What is known of a session since the coordinator started.

    Attributes:
        heard_at: when it was last heard, or the start of its grace.
        posted_at: when a heartbeat last came, or None.
        told_revision: the group's revision in the last answer, or None.
        passed_over: it did not confirm, or gave the role back; its next heartbeat forgives that.
        hold_off_until: it asked not to be chosen before then; kept in the record, too.
    """

    heard_at: float
    posted_at: Instant | None = None
    score: float = 0.0
    last_data: datetime | None = None
    instance: str | None = None
    told_revision: int | None = None
    passed_over: bool = False
    hold_off_until: float = float("-inf")


@dataclass(frozen=True, slots=True)
class Live:
    """The part of a group's state that a restart forgets. All times are CLOCK_BOOTTIME seconds.

    Attributes:
        lease_until: end of the holder's lease; meaningless without a holder.
        held_since: when the tenure began, as far as this run knows.
        confirm_by: when the pending session is passed over.
        quiet_until: when the quiet time of the record ends; meaningless without one.
        holder_hears: a heartbeat of the holder has carried its epoch, so our answers reach it.
        last_data: the newest LastDataProcessedTime of this tenure.
    """

    contacts: Mapping[str, Contact] = field(default_factory=lambda: EMPTY)
    lease_until: float = float("-inf")
    held_since: float = float("-inf")
    confirm_by: float = float("-inf")
    quiet_until: float = float("-inf")
    holder_hears: bool = False
    last_data: datetime | None = None


@dataclass(frozen=True, slots=True)
class GroupState:
    """All of a group: what is durable, and what is not."""

    record: GroupRecord
    live: Live = field(default_factory=Live)


@dataclass(frozen=True, slots=True)
class Beat:
    """A heartbeat. ``instance`` and ``seen_epoch`` come from our own agents only."""

    session_id: str
    score: float
    last_data: datetime | None = None
    instance: str | None = None
    seen_epoch: int | None = None


@dataclass(frozen=True, slots=True)
class AddSession:
    """A client registers."""

    config: SessionConfig


@dataclass(frozen=True, slots=True)
class RemoveSession:
    """A client leaves, or somebody removes it."""

    session_id: str


@dataclass(frozen=True, slots=True)
class SetOverride:
    """An operator's wish; ``until`` None is for ever."""

    session_id: str
    value: RoleOverride
    until: datetime | None = None


@dataclass(frozen=True, slots=True)
class ReleaseRole:
    """The holder has demoted; the next one may be promoted now.

    It counts only if session, epoch and instance are those of the tenure, and so does its hold-off,
    which counts also if that tenure has just ended by itself.
    """

    session_id: str
    epoch: int
    instance: str | None = None
    why: str = "released"
    hold_off_s: float = 0.0
    last_data: datetime | None = None


@dataclass(frozen=True, slots=True)
class SetAccess:
    """The group's own access-control list is replaced."""

    acl: AccessList


@dataclass(frozen=True, slots=True)
class RemoveGroup:
    """Somebody wants to delete the group. Allowed while no session is alive."""


@dataclass(frozen=True, slots=True)
class Tick:
    """Nothing came; look whether something is due."""


@dataclass(frozen=True, slots=True)
class KeepProgress:
    """Make the tenure's data-processed time durable (R13: at least once a second)."""


Input = (
    Beat
    | AddSession
    | RemoveSession
    | SetOverride
    | ReleaseRole
    | SetAccess
    | RemoveGroup
    | Tick
    | KeepProgress
)


@dataclass(frozen=True, slots=True)
class Decision:
    """What ``decide`` decided.

    Attributes:
        answer: for Beat a HeartbeatAnswer; for AddSession whether it was created; else None.
        history: tenures that began or ended, to be upserted by epoch with the record.
        wake_at: when to come back with a Tick at the latest, or infinity.
    """

    state: GroupState
    answer: HeartbeatAnswer | bool | None
    history: tuple[HistoryEntry, ...]
    wake_at: float


def awaken(record: GroupRecord, now: Instant) -> GroupState:
    """A group as it stands after a restart (R14).

    Every session has one full L, a quiet time begins anew, and a hold-off goes on.
    """
    if record.epoch > MAX_EPOCH:  # version 0.1.0 could be taught this; no answer can carry it
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
        live = replace(
            live,
            lease_until=now.mono + lease_s,
            held_since=now.mono,
            last_data=record.holder.last_data,
        )
    if record.pending is not None:
        live = replace(live, confirm_by=now.mono + lease_s * (2 if record.quiet else 1))
    return GroupState(record, live)


def _hold_off_until(hold_off: HoldOff | None, now: Instant) -> float:
    if hold_off is None:
        return float("-inf")
    left_s = (hold_off.until - now.wall).total_seconds()
    return now.mono + min(max(0.0, left_s), hold_off.length_s)


def excuse(state: GroupState, judged_at: float, now: Instant) -> GroupState:
    """The state after the coordinator itself was stopped or stalled since ``judged_at``.

    Whoever was alive then gets one full L from now: the heartbeats may lie unread (R14).
    """
    lease_s = state.record.config.lease_s
    live = state.live
    contacts = {
        session_id: replace(contact, heard_at=now.mono)
        if contact.heard_at + lease_s > judged_at
        else contact
        for session_id, contact in live.contacts.items()
    }
    live = replace(live, contacts=contacts)
    if state.record.holder is not None and live.lease_until > judged_at:
        live = replace(live, lease_until=now.mono + lease_s)
    if state.record.pending is not None:
        live = replace(live, confirm_by=max(live.confirm_by, now.mono + lease_s))
    return GroupState(state.record, live)


def status_of(state: GroupState) -> GroupStatus:
    """What a status read tells."""
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
    )


def last_data_of(state: GroupState) -> datetime | None:
    """The primary's LastDataProcessedTime; until it reports one, what it was handed (R18)."""
    if state.record.holder is not None and state.live.last_data is not None:
        return state.live.last_data
    return state.record.last_data


def role_of(record: GroupRecord, session_id: str) -> Role:
    """The role that a session has in the group."""
    if record.holder is not None and record.holder.session_id == session_id:
        return Role.PRIMARY
    return Role.PENDING_PRIMARY if record.pending == session_id else Role.SECONDARY


def view_of(state: GroupState, session_id: str) -> SessionView:
    """A session as a reader sees it.

    Raises:
        NotFound: there is no such session.
    """
    record = session_of(state.record, session_id)
    contact = state.live.contacts[session_id]
    return SessionView(
        record=record,
        role=role_of(state.record, session_id),
        score=contact.score,
        last_data=contact.last_data,
        heartbeat_at=contact.posted_at.wall if contact.posted_at else None,
    )


def alive(state: GroupState, session_id: str, now: Instant) -> bool:
    """Whether a session's last heartbeat, or its grace after a restart, is younger than L."""
    contact = state.live.contacts.get(session_id)
    return contact is not None and now.mono < contact.heard_at + state.record.config.lease_s


def progress_is_unkept(state: GroupState) -> bool:
    """Whether the tenure's data-processed time is newer than its durable copy."""
    holder = state.record.holder
    return holder is not None and state.live.last_data != holder.last_data


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
