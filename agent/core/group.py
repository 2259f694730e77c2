"""The coordinator's side of a group: one pure function, (state, input, now) -> decision (R13).

Rules of this file:

- ``decide`` does not change its arguments. It returns the next state, the answer, the history to keep
  and the next wake-up time. Same arguments, same result.
- An input that cannot be applied raises a RequestRefused, and nothing has changed.
- If the record has changed, the caller must make ``decision.state.record`` and ``decision.history``
  durable *before* anybody sees the answer.
- ``state.live`` is lost at a restart. ``state_after_restart`` then gives every session one full L
  (R14): failures make a lease longer, never shorter.
- At most one tenure exists at a time. A session receives one only in the answer to its own heartbeat,
  under a new epoch (R15, R16).
- A lease ends early only if the process that holds it releases it, or, if the holder has no instance
  (plain v1), if its session is deleted.
- A session belongs to the identity that registered it (ownership.py).

Owns what each input does. The steps that inputs share are in core/group_draft.py.
"""

import json
from dataclasses import replace
from typing import assert_never

from agent.core import group_failsafe as failsafe
from agent.core.group_choice import is_eligible
from agent.core.group_draft import CONFIRM_SHARE, Draft, wake_at
from agent.core.group_endings import HIGHEST_LEARNED_EPOCH, apply_ending
from agent.core.group_state import (
    AddSession,
    Contact,
    Decision,
    DeclareRestored,
    GroupState,
    Input,
    Lift,
    Policy,
    ReceiveHeartbeat,
    ReleaseRole,
    RemoveGroup,
    RemoveSession,
    SetAccess,
    SetOverride,
    Tick,
    is_active,
    last_data_of,
    role_of,
    session_of,
)
from agent.core.ownership import adopt, refuse_stranger
from agent.core.timing import minimum_interval_s
from agent.errors import Conflict, Invalid, TooSoon
from agent.model import (
    MAX_EPOCH,
    GroupConfig,
    GroupRecord,
    HeartbeatAnswer,
    Instant,
    Role,
    RoleOverride,
    SessionConfig,
    SessionRecord,
    Tenure,
    TenureEnd,
)

EARLY_SHARE = 0.1
"""Share of the minimum interval by which a heartbeat may be early, since timers of v1 clients may be."""

LARGEST_EPOCH_STEP = 2**33
"""The most by which one heartbeat may raise the record's epoch. Restored data lack one epoch for each later tenure,
and a jump up to LATEST_RESTORED_EPOCH if the group was declared as restored after the copy was made."""


def epoch_after_deletion(retired: int) -> int:
    """The first epoch of a group that is created under the name of a deleted one.

    Args:
        retired: the epoch of the deleted group. If it is so high that only a wrong heartbeat can have caused
            it, it is not continued: deleting and creating a group makes it usable again.
    """
    return retired if retired <= HIGHEST_LEARNED_EPOCH else 0


def new_record(config: GroupConfig, retired: int) -> GroupRecord:
    """The record of a new group; ``retired`` as in ``epoch_after_deletion``.

    Epochs continue from a deleted group of this name, so that its clients do not take a new epoch for an old one.
    Nobody was active when it was deleted (R34).
    """
    epoch = epoch_after_deletion(retired)
    return GroupRecord(config, epoch=epoch, cleared=epoch)


def decide(state: GroupState, what: Input, now: Instant, policy: Policy) -> Decision:
    """Apply one input to a group.

    Args:
        state: the current state; not changed.
        what: the input.
        now: the moment of the decision, never before the request was received. A granted lease
            starts here.
        policy: the coordinator's settings.

    Raises:
        RequestRefused: the input cannot be applied, and nothing has changed.
    """
    draft = Draft(state, now, policy)
    draft.apply_due_changes()
    answer: HeartbeatAnswer | bool | None = _apply(draft, what)
    draft.apply_due_changes()
    if isinstance(what, ReceiveHeartbeat):
        answer = _answer_heartbeat(draft, what)
    after = draft.state
    history = tuple(draft.history.values())
    return Decision(after, answer, history, wake_at(after, now, policy), draft.removals)


def is_compatible(wanted: SessionConfig | GroupConfig, known: SessionConfig | GroupConfig) -> bool:
    """Whether a registration agrees with the existing one; absent fields agree with any value."""
    if isinstance(wanted, GroupConfig) and isinstance(known, GroupConfig):
        if wanted.timeout_ticks != known.timeout_ticks:
            return False
        if wanted.description is not None and wanted.description != known.description:
            return False
    return (wanted.name is None or wanted.name == known.name) and (
        wanted.additional is None or _is_same_json(wanted.additional, known.additional)
    )


def _is_same_json(wanted: str, known: str | None) -> bool:
    """Whether two objects are equal, in whatever order their properties are written."""
    return wanted == known or (known is not None and json.loads(wanted) == json.loads(known))


def _apply(draft: Draft, what: Input) -> bool | None:
    match what:
        case ReceiveHeartbeat():
            _receive_heartbeat(draft, what)
        case AddSession():
            return _add_session(draft, what)
        case RemoveSession():
            _remove_session(draft, what)
        case SetOverride():
            _set_override(draft, what)
        case SetAccess():
            draft.record = replace(draft.record, acl=what.acl)
        case ReleaseRole() | Lift() | DeclareRestored() | RemoveGroup():
            apply_ending(draft, what)
        case Tick():
            draft.apply_retention()
        case _:
            assert_never(what)
    return None


# -- heartbeats ---------------------------------------------------------------------------------


def _receive_heartbeat(draft: Draft, heartbeat: ReceiveHeartbeat) -> None:
    session = session_of(draft.record, heartbeat.session_id)
    refuse_stranger(draft, heartbeat.session_id, heartbeat.by)
    contact = draft.live.contacts[heartbeat.session_id]
    changed_at = _check_interval(draft, heartbeat, contact)
    _refuse_unusable_epoch(draft, heartbeat)
    draft.live = replace(
        draft.live,
        contacts={
            **draft.live.contacts,
            heartbeat.session_id: Contact(  # the hot path: replace() takes twice as long
                heard_at=draft.now.mono,
                last_heartbeat=draft.now,
                score=heartbeat.score,
                last_data=heartbeat.last_data
                if heartbeat.last_data is not None
                else contact.last_data,
                instance=heartbeat.instance,
                answered_revision=contact.answered_revision,
                hold_off_until=contact.hold_off_until,
                changed_at=changed_at,
                promised=heartbeat.promised,
            ),
        },
    )
    if session.silent_since is not None:
        draft.change_session(heartbeat.session_id, silent_since=None)
    url = _failsafe_url_of(heartbeat)
    if session.failsafe_url != url:
        draft.change_session(heartbeat.session_id, failsafe_url=url)
    adopt(draft, session, heartbeat)
    if session.has_to_see is not None and _has_seen(heartbeat, session.has_to_see):
        draft.change_session(heartbeat.session_id, has_to_see=None)
    if heartbeat.seen_epoch is not None and heartbeat.seen_epoch > draft.record.epoch:
        draft.learn_epoch(heartbeat.seen_epoch)
    holder = draft.record.holder
    if holder is not None and draft.holds(heartbeat.session_id, heartbeat.instance):
        _renew(draft, holder, heartbeat)
    elif holder is None and not draft.record.quiet:
        _give_role(draft, heartbeat)


def _failsafe_url_of(what: ReceiveHeartbeat | AddSession) -> str | None:
    """Offer a set of members only to a process with an instance, so that its answer can be recognised."""
    return what.failsafe_url if what.instance is not None else None


def _give_role(draft: Draft, heartbeat: ReceiveHeartbeat) -> None:
    """Resume the tenure that this process still holds, or begin one if it is the candidate."""
    ended = draft.record.ended
    if (
        ended is not None
        and failsafe.is_resumable(draft.record)
        and (heartbeat.session_id, heartbeat.instance, heartbeat.holds)
        == (ended.session_id, ended.instance, ended.epoch)
    ):
        draft.resume(ended)
        _renew(draft, ended, heartbeat)
    elif draft.record.pending == heartbeat.session_id and is_eligible(
        draft.state, heartbeat.session_id, draft.now
    ):
        draft.confirm(heartbeat.session_id, heartbeat.instance)


def _renew(draft: Draft, holder: Tenure, heartbeat: ReceiveHeartbeat) -> None:
    """Apply the heartbeat of the process that holds the tenure."""
    draft.record_progress(heartbeat.last_data)
    if not draft.live.answers_reach_holder and _has_seen(heartbeat, holder.epoch):
        draft.live = replace(draft.live, answers_reach_holder=True)
    held_s = draft.now.mono - draft.live.held_since
    if not draft.live.answers_reach_holder and held_s > CONFIRM_SHARE * draft.lease_s:
        # No answer has reached the holder. So it is not active, but keeps the role from the others.
        draft.change_session(heartbeat.session_id, has_to_see=holder.epoch)
        draft.revoke(holder)
    elif not holder.revoked:
        draft.extend()
        draft.record = failsafe.offer_set(
            failsafe.acknowledge_set(draft.record, heartbeat.holds, heartbeat.failsafe_revision),
            heartbeat.session_id,
        )


def _has_seen(heartbeat: ReceiveHeartbeat, epoch: int) -> bool:
    """Whether the client of a heartbeat knows ``epoch``; v1 clients send none and pass."""
    return heartbeat.seen_epoch is None or heartbeat.seen_epoch >= epoch


def _check_interval(draft: Draft, heartbeat: ReceiveHeartbeat, contact: Contact) -> float:
    """Enforce the minimum interval between heartbeats; return the contact's new ``changed_at``.

    Exempt are confirmations, clients that have not seen the newest revision, and, once in an interval, another
    instance, such as a restarted agent. For the holder only its own renewals count, not other instances' heartbeats.
    """
    interval_s = minimum_interval_s(draft.lease_s)
    if (
        contact.last_heartbeat is None
        or contact.answered_revision != draft.record.revision
        or draft.record.pending == heartbeat.session_id
    ):
        return contact.changed_at
    last_at, holder = contact.last_heartbeat.mono, draft.record.holder
    if draft.holds(heartbeat.session_id, heartbeat.instance) and holder and not holder.revoked:
        last_at = min(last_at, draft.live.lease_until - draft.lease_s)  # its last renewal
    early_s = last_at + interval_s - draft.now.mono
    if early_s > EARLY_SHARE * interval_s:
        changed = contact.instance != heartbeat.instance
        if changed and draft.now.mono >= contact.changed_at + interval_s:
            return draft.now.mono
        raise TooSoon(
            f'The heartbeat of client session "{heartbeat.session_id}" came {early_s:.3f} s before'
            f" the group's minimum interval of {interval_s:g} s had passed.",
            "Wait for the time in Retry-After, and send heartbeats every FailoverTimeout / 2 or so.",
            retry_after_s=early_s,
        )
    return contact.changed_at


def _refuse_unusable_epoch(draft: Draft, heartbeat: ReceiveHeartbeat) -> None:
    """Bound the epoch that a client can set, so that there is always a next one."""
    known = draft.record.epoch
    limit = max(known, min(known + LARGEST_EPOCH_STEP, HIGHEST_LEARNED_EPOCH))
    if heartbeat.seen_epoch is not None and heartbeat.seen_epoch > limit:
        raise Invalid(
            f"Epoch is {heartbeat.seen_epoch}: it must be at most {limit}, since the newest epoch of group"
            f' "{draft.record.config.id}" is {known}.',
            "Restart the client, so that it forgets this epoch; or restore newer data of the"
            " coordinator.",
        )
    if known >= MAX_EPOCH and not draft.holds(heartbeat.session_id, heartbeat.instance):
        raise Conflict(
            f'Group "{draft.record.config.id}" has used up its epochs: the newest is {known}.',
            "Delete the group when FailoverTimeout has passed, create it again, and restart its"
            " clients.",
        )


def _answer_heartbeat(draft: Draft, heartbeat: ReceiveHeartbeat) -> HeartbeatAnswer:
    session_id, record = heartbeat.session_id, draft.record
    contact = draft.live.contacts[session_id]
    holder = record.holder
    role = role_of(record, session_id)
    holds_role = (
        draft.holds(session_id, contact.instance) and holder is not None and not holder.revoked
    )
    if role is Role.PRIMARY and not holds_role:
        role = Role.SECONDARY  # revoked, or another process than the holder
    if contact.answered_revision != record.revision:
        draft.change_contact(session_id, answered_revision=record.revision)
    return HeartbeatAnswer(
        role=role,
        last_data=last_data_of(draft.state),
        epoch=record.epoch,
        revision=record.revision,
        lease_s=draft.lease_s,
        previous=record.previous,
        cleared=record.cleared if heartbeat.failsafe_url is not None else None,
        failsafe=failsafe.set_to_report(record, session_id) if role is Role.PRIMARY else None,
    )


# -- sessions -----------------------------------------------------------------------------------


def _add_session(draft: Draft, registration: AddSession) -> bool:
    config, by = registration.config, registration.by
    refuse_stranger(draft, config.id, by)
    record, url = draft.record, _failsafe_url_of(registration)
    known = record.sessions.get(config.id)
    if known is None:
        if len(record.sessions) >= draft.policy.max_sessions and not draft.make_room():
            raise Conflict(
                f'Group "{record.config.id}" has {len(record.sessions)} client sessions, the most that'
                " this coordinator allows, and none is inactive without a role override or a hold-off.",
                "Delete sessions that are not used any more, or raise max_sessions_per_group.",
            )
        draft.refuse_too_much_data(config)
        owner = by.identity if by is not None else None
        session = SessionRecord(config, owner=owner, failsafe_url=url)
        sessions = {**draft.record.sessions, config.id: session}
        draft.record = replace(draft.record, sessions=sessions)
        contacts = {**draft.live.contacts, config.id: Contact(heard_at=draft.now.mono)}
        draft.live = replace(draft.live, contacts=contacts)
        return True
    if not is_compatible(config, known.config):
        raise Conflict(
            f'Client session "{config.id}" exists with another configuration.',
            "Use the same Name and AdditionalData, another Id, or delete that session first.",
        )
    if known.failsafe_url != url:
        draft.change_session(config.id, failsafe_url=url)
    return False


def _remove_session(draft: Draft, request: RemoveSession) -> None:
    session_id = request.session_id
    session_of(draft.record, session_id)
    refuse_stranger(draft, session_id, request.by)
    if request.only_inactive and is_active(draft.state, session_id, draft.now):
        raise Conflict(
            f'Client session "{session_id}" is active: it has a role, or a heartbeat may have come within'
            f" the FailoverTimeout of {draft.lease_s:g} s.",
            "Stop its client, or wait until FailoverTimeout after its last heartbeat.",
        )
    holder = draft.record.holder
    # A v1 client deletes its session after it has stopped. Our agents release first (R5): a
    # holder's session is deleted by somebody else, and its lease has to expire.
    if holder is not None and holder.session_id == session_id and holder.instance is None:
        draft.end_tenure(holder, TenureEnd.DELETED, "its client session was deleted")
    if draft.record.pending == session_id:
        draft.set_pending(None)
    draft.remove_session(session_id)


def _set_override(draft: Draft, request: SetOverride) -> None:
    session_of(draft.record, request.session_id)
    draft.change_session(
        request.session_id,
        override=request.value,
        override_until=request.until if request.value is not RoleOverride.OFF else None,
        override_order=1 + max(s.override_order for s in draft.record.sessions.values()),
    )
