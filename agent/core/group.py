"""The coordinator's side of a group: one pure function, (state, input, now) -> decision (R13).

Rules of this file:

- ``decide`` changes nothing that it is given. It returns the next state, the answer, the history to
  keep and the next moment at which something will be due. Same arguments, same result.
- An input that cannot be obeyed raises a RequestRefused, and nothing has happened.
- Whoever calls it must make ``decision.state.record`` and ``decision.history`` durable *before* it
  hands the answer to anybody, whenever the record is not the one it put in.
- ``state.live`` is what a restart forgets. After one, ``awaken`` gives every session one full L
  (R14): a lease is made longer by trouble, never shorter.
- At most one tenure exists at a time, and only a session whose own heartbeat is being answered
  receives one, under a new epoch (R15, R16).
- A lease ends before its time only by a release of the very process that holds it, or, where the
  holder never named a process (plain v1), by the deletion of its session.

Owns what each input does. The steps that inputs share are core/group_draft.py's.
"""

from collections.abc import Mapping
from dataclasses import replace
from datetime import timedelta
from typing import Any, assert_never

from agent.core.group_draft import CONFIRM_SHARE, Draft, wake_at
from agent.core.group_state import (
    AddSession,
    Beat,
    Contact,
    Decision,
    GroupState,
    Input,
    KeepProgress,
    Policy,
    ReleaseRole,
    RemoveGroup,
    RemoveSession,
    SetAccess,
    SetOverride,
    Tick,
    alive,
    last_data_of,
    progress_is_unkept,
    role_of,
    session_of,
)
from agent.errors import Conflict, Invalid, TooSoon
from agent.model import (
    LONGEST_HOLD_OFF_S,
    MAX_EPOCH,
    GroupConfig,
    HeartbeatAnswer,
    HoldOff,
    Instant,
    Role,
    RoleOverride,
    SessionConfig,
    SessionRecord,
    Tenure,
    TenureEnd,
)

INTERVAL_SHARE = 0.05
LONGEST_INTERVAL_S = 1.0
"""Heartbeats closer than L/20, at most 1 s, are refused (docs/api.md, "Sessions and heartbeats")."""

INTERVAL_TOLERANCE = 0.9
"""A v1 client's second heartbeat comes 1 s after its first by a timer that may be early."""

EPOCH_LEAP = 1_000_000
"""How far above the record's epoch one heartbeat may lift it. Data that is older than its group has
missed one epoch a tenure: a million are months of a group that changes hands every ten seconds."""

HIGHEST_TAUGHT_EPOCH = 2**52
"""No heartbeat lifts the epoch above this, however often it tries: there is always room for as many
tenures again below MAX_EPOCH."""


def minimum_interval_s(lease_s: float) -> float:
    """How far apart two heartbeats of one session should be, in seconds (docs/api.md, "Sessions and heartbeats")."""
    return min(lease_s * INTERVAL_SHARE, LONGEST_INTERVAL_S)


def epoch_after_deletion(retired: int) -> int:
    """The epoch with which a group begins that has the name of a deleted one.

    Args:
        retired: the epoch of the deleted group. One that nothing but a wrong heartbeat can have
            brought about is not continued: deleting and creating a group makes it usable again.
    """
    return retired if retired <= HIGHEST_TAUGHT_EPOCH else 0


def decide(state: GroupState, what: Input, now: Instant, policy: Policy) -> Decision:
    """What one input does to a group.

    Args:
        state: the group as it is; not changed.
        what: what came, or Tick.
        now: the moment of the decision. A lease that it grants runs from here, which is never
            before the request was received.
        policy: the coordinator's settings.

    Raises:
        RequestRefused: the input cannot be obeyed, and nothing has happened.
    """
    draft = Draft(state, now, policy)
    draft.settle()
    answer: HeartbeatAnswer | bool | None = _apply(draft, what)
    draft.settle()
    if isinstance(what, Beat):
        answer = _answer_beat(draft, what.session_id)
    after = draft.state
    return Decision(after, answer, tuple(draft.history.values()), wake_at(after, now, policy))


def agrees(wanted: SessionConfig | GroupConfig, known: SessionConfig | GroupConfig) -> bool:
    """Whether a registration says nothing that contradicts what exists: absent says nothing (docs/api.md, "Groups")."""
    if isinstance(wanted, GroupConfig) and isinstance(known, GroupConfig):
        if wanted.timeout_ticks != known.timeout_ticks:
            return False
        if wanted.description is not None and wanted.description != known.description:
            return False
    return (wanted.name is None or wanted.name == known.name) and (
        wanted.additional is None or wanted.additional == known.additional
    )


def _apply(draft: Draft, what: Input) -> bool | None:
    match what:
        case Beat():
            _beat(draft, what)
        case AddSession():
            return _add(draft, what.config)
        case RemoveSession():
            _remove(draft, what.session_id)
        case SetOverride():
            _override(draft, what)
        case ReleaseRole():
            _release(draft, what)
        case SetAccess():
            draft.record = replace(draft.record, acl=what.acl)
        case RemoveGroup():
            _refuse_removal_while_alive(draft)
        case KeepProgress():
            _keep_progress(draft)
        case Tick():
            pass
        case _:
            assert_never(what)
    return None


# -- heartbeats ---------------------------------------------------------------------------------


def _beat(draft: Draft, beat: Beat) -> None:
    session = session_of(draft.record, beat.session_id)
    contact = draft.live.contacts[beat.session_id]
    _refuse_haste(draft, beat, contact)
    _refuse_unusable_epoch(draft, beat)
    draft.live = replace(
        draft.live,
        contacts={
            **draft.live.contacts,
            beat.session_id: Contact(  # each heartbeat comes by here: replace() costs twice this
                heard_at=draft.now.mono,
                posted_at=draft.now,
                score=beat.score,
                last_data=beat.last_data if beat.last_data is not None else contact.last_data,
                instance=beat.instance,
                told_revision=contact.told_revision,
                hold_off_until=contact.hold_off_until,
            ),
        },
    )
    if session.has_to_see is not None and _has_seen(beat, session.has_to_see):
        draft.change_session(beat.session_id, has_to_see=None)
    if beat.seen_epoch is not None and beat.seen_epoch > draft.record.epoch:
        draft.learn_epoch(beat.seen_epoch)
    holder = draft.record.holder
    if holder is not None and draft.holds(beat.session_id, beat.instance):
        _renew(draft, holder, beat)
    elif draft.record.pending == beat.session_id and holder is None and not draft.record.quiet:
        draft.confirm(beat.session_id, beat.instance)


def _renew(draft: Draft, holder: Tenure, beat: Beat) -> None:
    """The heartbeat of the process that holds the tenure."""
    draft.keep_progress(beat.last_data)
    if not draft.live.holder_hears and _has_seen(beat, holder.epoch):
        draft.live = replace(draft.live, holder_hears=True)
    held_s = draft.now.mono - draft.live.held_since
    if not draft.live.holder_hears and held_s > CONFIRM_SHARE * draft.lease_s:
        # Our answers do not reach it: it is not active, and would keep everybody else from the role.
        # One late heartbeat from before its tenure says nothing once a newer one has been here.
        draft.change_session(beat.session_id, has_to_see=holder.epoch)
        draft.revoke(holder)
    elif not holder.revoked:
        draft.extend()


def _has_seen(beat: Beat, epoch: int) -> bool:
    """Whether a heartbeat says that its client knows ``epoch``; a v1 client never says so."""
    return beat.seen_epoch is None or beat.seen_epoch >= epoch


def _refuse_haste(draft: Draft, beat: Beat, contact: Contact) -> None:
    """Confirmations, and whoever has not heard of the newest change, are never refused (docs/api.md, "Sessions and heartbeats")."""
    interval_s = minimum_interval_s(draft.lease_s)
    if (
        contact.posted_at is None
        or contact.instance != beat.instance
        or contact.told_revision != draft.record.revision
        or draft.record.pending == beat.session_id
    ):
        return
    early_s = contact.posted_at.mono + interval_s - draft.now.mono
    if early_s > interval_s * (1 - INTERVAL_TOLERANCE):
        raise TooSoon(
            f'The heartbeat of client session "{beat.session_id}" came {early_s:.3f} s before'
            f" the group's minimum interval of {interval_s:g} s had passed.",
            "Wait for the time in Retry-After, and beat every FailoverTimeout / 2 or so.",
            retry_after_s=early_s,
        )


def _refuse_unusable_epoch(draft: Draft, beat: Beat) -> None:
    """An epoch must leave room for the next ones: what a caller teaches is bounded."""
    known = draft.record.epoch
    limit = max(known, min(known + EPOCH_LEAP, HIGHEST_TAUGHT_EPOCH))
    if beat.seen_epoch is not None and beat.seen_epoch > limit:
        raise Invalid(
            f"Epoch is {beat.seen_epoch}: it must be at most {limit}, since the newest epoch of group"
            f' "{draft.record.config.id}" is {known}.',
            "Restart the client, so that it forgets this epoch; or restore newer data of the"
            " coordinator.",
        )
    if known >= MAX_EPOCH and not draft.holds(beat.session_id, beat.instance):
        raise Conflict(
            f'Group "{draft.record.config.id}" has used up its epochs: the newest is {known}.',
            "Delete the group when FailoverTimeout has passed, create it again, and restart its"
            " clients.",
        )


def _answer_beat(draft: Draft, session_id: str) -> HeartbeatAnswer:
    record, contact = draft.record, draft.live.contacts[session_id]
    holder = record.holder
    role = role_of(record, session_id)
    keeps = draft.holds(session_id, contact.instance) and holder is not None and not holder.revoked
    if role is Role.PRIMARY and not keeps:
        role = Role.SECONDARY  # to be demoted, or another process than the one that holds
    if contact.told_revision != record.revision:
        draft.change_contact(session_id, told_revision=record.revision)
    return HeartbeatAnswer(
        role=role,
        last_data=last_data_of(draft.state),
        epoch=record.epoch,
        revision=record.revision,
        lease_s=draft.lease_s,
        previous=record.previous,
    )


# -- sessions -----------------------------------------------------------------------------------


def _add(draft: Draft, config: SessionConfig) -> bool:
    record = draft.record
    known = record.sessions.get(config.id)
    if known is None:
        if len(record.sessions) >= draft.policy.max_sessions:
            raise Conflict(
                f'Group "{record.config.id}" has {len(record.sessions)} client'
                " sessions, the most that this coordinator allows.",
                "Delete sessions that are not used any more, or raise max_sessions_per_group.",
            )
        draft.record = replace(
            record, sessions={**record.sessions, config.id: SessionRecord(config)}
        )
        contacts = {**draft.live.contacts, config.id: Contact(heard_at=draft.now.mono)}
        draft.live = replace(draft.live, contacts=contacts)
        return True
    if not agrees(config, known.config):
        raise Conflict(
            f'Client session "{config.id}" exists with another configuration.',
            "Use the same Name and AdditionalData, another Id, or delete that session first.",
        )
    return False


def _remove(draft: Draft, session_id: str) -> None:
    session_of(draft.record, session_id)
    holder = draft.record.holder
    # A v1 client deletes its session when it has stopped. Ours releases first (R5): if one
    # is removed while it still holds, somebody else did it, and the lease has to run out.
    if holder is not None and holder.session_id == session_id and holder.instance is None:
        draft.end_tenure(holder, TenureEnd.DELETED, "its client session was deleted")
    if draft.record.pending == session_id:
        draft.set_pending(None)
    draft.record = replace(draft.record, sessions=_without(draft.record.sessions, session_id))
    draft.live = replace(draft.live, contacts=_without(draft.live.contacts, session_id))


def _without(sessions: Mapping[str, Any], session_id: str) -> dict[str, Any]:
    return {known: value for known, value in sessions.items() if known != session_id}


def _override(draft: Draft, wish: SetOverride) -> None:
    session_of(draft.record, wish.session_id)
    draft.change_session(
        wish.session_id,
        override=wish.value,
        override_until=wish.until if wish.value is not RoleOverride.OFF else None,
        override_order=1 + max(s.override_order for s in draft.record.sessions.values()),
    )


# -- releases -----------------------------------------------------------------------------------


def _release(draft: Draft, release: ReleaseRole) -> None:
    """End the tenure that the caller holds. Anything else was asked for by somebody else, or is done."""
    holder, ended = draft.record.holder, draft.record.ended
    if holder is not None and _is_of(release, holder):
        draft.keep_progress(release.last_data)
        draft.end_tenure(holder, TenureEnd.RELEASED, release.why)
        if release.session_id in draft.record.sessions:
            # The others are asked first: it may be heard here, and hear nothing itself.
            draft.change_contact(release.session_id, passed_over=True)
    elif ended is not None and _is_of(release, ended) and release.hold_off_s > 0:
        draft.record = replace(draft.record, ended=None)
    else:
        return
    if release.hold_off_s > 0 and release.session_id in draft.record.sessions:
        _hold_off(draft, release.session_id, min(release.hold_off_s, LONGEST_HOLD_OFF_S))


def _is_of(release: ReleaseRole, tenure: Tenure) -> bool:
    """Whether the caller is the process that held this tenure."""
    return (release.session_id, release.epoch, release.instance) == (
        tenure.session_id,
        tenure.epoch,
        tenure.instance,
    )


def _hold_off(draft: Draft, session_id: str, length_s: float) -> None:
    until = draft.now.wall + timedelta(seconds=length_s)
    draft.change_session(session_id, hold_off=HoldOff(until, length_s))
    draft.change_contact(session_id, hold_off_until=draft.now.mono + length_s)


# -- the group ----------------------------------------------------------------------------------


def _refuse_removal_while_alive(draft: Draft) -> None:
    group_id = draft.record.config.id
    active = {s for s in draft.record.sessions if alive(draft.state, s, draft.now)}
    if draft.record.holder is not None:
        active.add(draft.record.holder.session_id)
    if active:
        raise Conflict(
            f'Group "{group_id}" has active client sessions: {", ".join(sorted(active))}.',
            "Stop these clients, or wait until FailoverTimeout after their last heartbeat.",
        )
    if draft.record.quiet:  # a group of its name would know nothing of that lease
        raise Conflict(
            f'A client of group "{group_id}" may hold the role, since one has seen an epoch that'
            " the group's data did not have.",
            "Wait until FailoverTimeout after that has passed.",
        )


def _keep_progress(draft: Draft) -> None:
    holder = draft.record.holder
    if holder is not None and progress_is_unkept(draft.state):
        draft.record = replace(draft.record, holder=replace(holder, last_data=draft.live.last_data))
