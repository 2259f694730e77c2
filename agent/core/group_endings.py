"""Apply inputs that end something in a group: a release, an operator's lift, restored data, removal of the group.

Each either changes the draft of the group or raises a RequestRefused, as in core/group.py, which calls them.
"""

from dataclasses import replace
from datetime import timedelta
from typing import assert_never

from agent.core import group_failsafe as failsafe
from agent.core.group_draft import Draft
from agent.core.group_state import DeclareRestored, Lift, ReleaseRole, RemoveGroup, is_alive
from agent.core.ownership import refuse_stranger
from agent.errors import Conflict
from agent.model import LONGEST_HOLD_OFF_S, MAX_EPOCH, HoldOff, Tenure, TenureEnd

HIGHEST_LEARNED_EPOCH = 2**52
"""Heartbeats and restored data never raise the epoch above this, so that enough epochs are left for tenures."""

RESTORED_EPOCH_STEP = 2**12
"""The least by which restored data raise the epoch, in case the clock is far behind."""

LATEST_RESTORED_EPOCH = 2**32
"""A clock that is far ahead raises the epoch no higher than this: the seconds from 1970 to 2106."""


def apply_ending(draft: Draft, what: ReleaseRole | Lift | DeclareRestored | RemoveGroup) -> None:
    """Apply one of these inputs to the draft."""
    match what:
        case ReleaseRole():
            _release_role(draft, what)
        case Lift():
            _lift(draft, what)
        case DeclareRestored():
            _declare_restored(draft)
        case RemoveGroup():
            _refuse_removal_while_active(draft)
        case _:
            assert_never(what)


# -- releases -----------------------------------------------------------------------------------


def _release_role(draft: Draft, release: ReleaseRole) -> None:
    """End the tenure if its holder releases it; ignore a repeated release, and one by anybody else."""
    refuse_stranger(draft, release.session_id, release.by)
    holder, ended = draft.record.holder, draft.record.ended
    if holder is not None and _matches_tenure(release, holder):
        draft.record_progress(release.last_data)
        end = TenureEnd.RELEASED if release.held else TenureEnd.REFUSED
        draft.end_tenure(holder, end, release.why)
        _prefer_others(draft, release.session_id)
    elif ended is not None and _matches_tenure(release, ended):
        if not _release_late(draft, release, ended):
            return
    else:
        return
    if release.hold_off_s > 0 and release.session_id in draft.record.sessions:
        _hold_off(draft, release.session_id, min(release.hold_off_s, LONGEST_HOLD_OFF_S))


def _release_late(draft: Draft, release: ReleaseRole, ended: Tenure) -> bool:
    """Apply the release of a tenure that has expired; return whether it changed anything.

    Its hold-off counts once, and with failsafe the release proves that the tenure is over (R24).
    """
    record = draft.record
    was_restricted = ended.epoch == record.epoch and failsafe.is_restricted(record)
    if was_restricted:
        draft.record = failsafe.end_by_release(record, held=release.held)
        draft.change_status()
        _prefer_others(draft, release.session_id)
    if release.hold_off_s > 0 or not release.held:
        draft.record = replace(draft.record, ended=None, ended_at=None)
    return was_restricted or release.hold_off_s > 0


def _prefer_others(draft: Draft, session_id: str) -> None:
    """Pass the former holder over until its next heartbeat: the coordinator's answers may not reach it."""
    if session_id in draft.record.sessions:
        draft.change_contact(session_id, passed_over=True)


def _matches_tenure(release: ReleaseRole, tenure: Tenure) -> bool:
    """Whether a release comes from the process that held this tenure."""
    return (release.session_id, release.epoch, release.instance) == (
        tenure.session_id,
        tenure.epoch,
        tenure.instance,
    )


def _hold_off(draft: Draft, session_id: str, length_s: float) -> None:
    until = draft.now.wall + timedelta(seconds=length_s)
    draft.change_session(session_id, hold_off=HoldOff(until, length_s))
    draft.change_contact(session_id, hold_off_until=draft.now.mono + length_s)


# -- operators ----------------------------------------------------------------------------------


def _lift(draft: Draft, request: Lift) -> None:
    """Lift the restriction of a group: an operator has made sure that no member is active (R34).

    Changes nothing if the group is not restricted: the lift is repeated, or was not needed.
    """
    record = draft.record
    group = f'group "{record.config.id}"'
    if record.holder is not None:
        raise Conflict(
            f'Client session "{record.holder.session_id}" is primary of {group}, in epoch'
            f" {record.holder.epoch}.",
            "There is nothing to lift while somebody is primary: stop that client first, if it has to"
            " release the role.",
        )
    if record.quiet:
        raise Conflict(
            f"The coordinator's data are older than {group}: a lease may exist that they do not have.",
            f"Try again when the FailoverTimeout of {draft.lease_s:g} s has passed.",
        )
    if not failsafe.is_restricted(record) and request.epoch <= record.epoch:
        return
    if request.epoch != record.epoch:
        raise Conflict(
            f"The newest epoch of {group} is {record.epoch}, not {request.epoch}.",
            "Read the status again, and make sure that nobody is active in the newest epoch either.",
        )
    epoch = min(record.epoch + 1, MAX_EPOCH)
    draft.change_status(epoch=epoch, ended=None, ended_at=None)
    draft.record = failsafe.clear(draft.record)
    operator = request.by.identity if request.by is not None else "an operator"
    why = f"lifted by {operator}: {request.reason}"
    draft.record_event(epoch, why, TenureEnd.LIFTED)


def _declare_restored(draft: Draft) -> None:
    """Raise the epoch above every one used after the copy was made, and restrict the group until a lift (R34).

    Epochs grow by less than one a second, so the number of seconds since 1970 is above all of them, even if the
    same copy was declared before and tenures have begun since.
    """
    known = draft.record.epoch
    seconds = min(int(draft.now.wall.timestamp()), LATEST_RESTORED_EPOCH)
    raised = min(max(known + RESTORED_EPOCH_STEP, seconds), HIGHEST_LEARNED_EPOCH)
    draft.declare_restored(max(known, raised))


# -- the group ----------------------------------------------------------------------------------


def _refuse_removal_while_active(draft: Draft) -> None:
    """Raise Conflict if a member of the group may be active."""
    record = draft.record
    group_id = record.config.id
    active = {s for s in record.sessions if is_alive(draft.state, s, draft.now)}
    if record.holder is not None:
        active.add(record.holder.session_id)
    if active:
        raise Conflict(
            f'Group "{group_id}" has active client sessions: {", ".join(sorted(active))}.',
            "Stop these clients, or wait until FailoverTimeout after their last heartbeat.",
        )
    if record.quiet:  # a new group of this name would not know of that lease
        raise Conflict(
            f'The coordinator\'s data are older than group "{group_id}": a client may hold the role.',
            "Wait until FailoverTimeout has passed.",
        )
    if failsafe.is_restricted(record):
        raise Conflict(
            f'A client of group "{group_id}" may be active by failsafe, in an epoch up to {record.epoch}.',
            "Bring back one of its Choosable members, or make sure that no client is active and lift"
            " that (failover-agent failsafe lift).",
        )
