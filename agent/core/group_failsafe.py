"""Failsafe in a group's record: whom a holder has to ask, and who may be promoted after it (R21 to R25, R34).

A holder that cannot reach the coordinator keeps the role for as long as all other members of its set agree, so
the end of its lease does not prove that it has demoted. The record therefore keeps the set that the holder
uses and the set that was offered to it: until it has demoted, only members of both may be promoted. ``cleared``
is the epoch up to which each tenure is known to be over.

Pure functions from one record to the next; core/group.py and core/group_draft.py know when each one is due.
"""

from dataclasses import replace

from agent.model import (
    FailsafeState,
    FailsafeStatus,
    GroupRecord,
    Lapsed,
    Member,
    MemberSet,
)

NOBODY = MemberSet(0, ())
"""Stands for an unknown set: nobody may be promoted until an operator lifts the restriction (R34)."""

MOST_MEMBERS = 128
"""Cap on the sessions of a group with failsafe: an agent's inbox holds the answers of all members four times."""

# -- who may be promoted ------------------------------------------------------------------------


def choosable_members(record: GroupRecord) -> tuple[Member, ...] | None:
    """The members that are in both sets; None for everybody, if no set has failsafe on."""
    sets = [one.members for one in (record.used, record.offered) if one is not None and not one.off]
    if not sets:
        return None
    return tuple(member for member in sets[0] if all(member in other for other in sets))


def is_restricted(record: GroupRecord) -> bool:
    """Whether a holder may still be active by failsafe, so that only members it would ask may be promoted."""
    return record.cleared < record.epoch and choosable_members(record) is not None


def may_be_promoted(record: GroupRecord, session_id: str) -> bool:
    """Whether a former holder that may be active by failsafe would ask this session at its present URL (R25)."""
    if record.cleared >= record.epoch:
        return True
    allowed = choosable_members(record)
    return allowed is None or member_of(record, session_id) in allowed


def has_to_accept(record: GroupRecord) -> bool:
    """Whether the holder's tenure began in a restricted group, and it has not acknowledged a set yet.

    Until then it is not replaced. Otherwise an overridden member that may not be promoted would replace each new
    holder before it learns of its tenure: the restriction would stay, and nobody could ever become primary.
    """
    return is_restricted(record) and record.cleared < record.epoch - 1


def member_of(record: GroupRecord, session_id: str) -> Member | None:
    """A session of the group with its URL, or None if it has none."""
    url = record.sessions[session_id].failsafe_url
    return Member(session_id, url) if url is not None else None


# -- the sets of a tenure -----------------------------------------------------------------------


def begin_tenure(record: GroupRecord, session_id: str) -> GroupRecord:
    """The record with the epoch and the first sets of a session's new tenure.

    In a restricted group a tenure begins with the choosable members as its set. The holder has to acknowledge
    a further set even if its members are the same: before that, it may not have accepted the role at all.
    """
    epoch = record.epoch + 1
    inherited = choosable_members(record) if is_restricted(record) else None
    if inherited is None:
        record = replace(record, epoch=epoch, cleared=epoch - 1, used=None, offered=None)
        return offer_set(record, session_id)
    record = replace(record, epoch=epoch, used=MemberSet(0, inherited), offered=None)
    return _offer(record, _current_set(record))


def offer_set(record: GroupRecord, session_id: str) -> GroupRecord:
    """Offer the holder the current members, unless it uses them already or has yet to acknowledge a set (R23)."""
    if record.offered is not None or record.sessions[session_id].failsafe_url is None:
        return record
    used = record.used.members if record.used is not None else ()
    current = _current_set(record)
    return record if current.members == used else _offer(record, current)


def acknowledge_set(record: GroupRecord, epoch: int | None, revision: int | None) -> GroupRecord:
    """The record after the holder has reported its epoch and the revision of the set that it uses."""
    offered = record.offered
    if offered is None or revision != offered.revision or epoch != record.epoch:
        return record
    cleared = max(record.cleared, record.epoch - 1)
    return replace(record, used=offered, offered=None, cleared=cleared)


def set_to_report(record: GroupRecord, session_id: str) -> MemberSet | None:
    """The set to send to the holder, or the reason why failsafe is off; None for a holder without failsafe."""
    if record.sessions[session_id].failsafe_url is None:
        return None
    known, off = record.offered or record.used, why_off(record)
    if off is not None and (known is None or known.off is not None):
        return MemberSet(known.revision if known is not None else 0, off=off)
    return known


def why_off(record: GroupRecord) -> str | None:
    """What keeps failsafe off, or None if every session has a URL and they are not too many."""
    if len(record.sessions) > MOST_MEMBERS:
        return f"the group has {len(record.sessions)} client sessions, and failsafe at most {MOST_MEMBERS}"
    without = sorted(
        one for one, session in record.sessions.items() if session.failsafe_url is None
    )
    if not without:
        return None
    more = f" ({len(without)} sessions in all)" if len(without) > 1 else ""
    return f'client session "{without[0]}" reported no FailsafeUrl{more}'


def _offer(record: GroupRecord, offered: MemberSet) -> GroupRecord:
    return replace(record, offered=offered, set_revision=offered.revision)


def _current_set(record: GroupRecord) -> MemberSet:
    """The next set: every registered session with its URL; none at all if something keeps failsafe off."""
    revision, off = record.set_revision + 1, why_off(record)
    if off is not None:
        return MemberSet(revision, (), off)
    members = (member_of(record, session_id) for session_id in record.sessions)
    return MemberSet(revision, tuple(sorted(one for one in members if one is not None)))


# -- the end of a tenure ------------------------------------------------------------------------


def end_by_expiry(record: GroupRecord) -> GroupRecord:
    """The record after a lease has expired: the tenure is over if its holder was offered no set."""
    return clear(record) if choosable_members(record) is None else record


def end_by_release(record: GroupRecord, *, held: bool) -> GroupRecord:
    """The record after a release. If the holder was never active (``held`` is False), a restriction stays."""
    if held or record.used is None or record.used.off is not None:
        return clear(record)
    return replace(record, offered=None)


def clear(record: GroupRecord) -> GroupRecord:
    """The record when every tenure up to the newest epoch is over."""
    return replace(record, cleared=record.epoch, used=None, offered=None)


def distrust(record: GroupRecord) -> GroupRecord:
    """Restrict a record that is older than the group: an unknown holder may be active by failsafe (R34)."""
    cleared = min(record.cleared, record.epoch - 1)
    return replace(record, cleared=cleared, used=NOBODY, offered=None)


def uses_failsafe(record: GroupRecord) -> bool:
    """Whether failsafe is, or was, used in this group."""
    return is_restricted(record) or any(
        session.failsafe_url is not None for session in record.sessions.values()
    )


# -- for operators ------------------------------------------------------------------------------


def status_of_failsafe(record: GroupRecord) -> FailsafeStatus | None:
    """The failsafe part of a group's status; None in a group without failsafe."""
    if not uses_failsafe(record):
        return None
    used = record.used if record.used is not None and not record.used.off else None
    members = used.members if used is not None else ()
    revision = used.revision if used is not None else None
    if record.holder is None and is_restricted(record):
        return FailsafeStatus(
            FailsafeState.RESTRICTED,
            _why_restricted(record),
            revision,
            members,
            choosable_members(record) or (),
            _lapsed(record),
        )
    off = why_off(record)
    if record.holder is None:
        return FailsafeStatus(FailsafeState.OFF, off or "nobody is primary")
    if used is not None and used.revision > 0:
        return FailsafeStatus(FailsafeState.READY, off, revision, members)
    waiting = f'client session "{record.holder.session_id}" has yet to acknowledge its members'
    return FailsafeStatus(FailsafeState.OFF, off or waiting)


def is_resumable(record: GroupRecord) -> bool:
    """Whether the last tenure ended only by expiry, and no later one may have begun (R33)."""
    ended = record.ended
    return (
        record.holder is None
        and ended is not None
        and not ended.revoked
        and ended.epoch == record.epoch
        and is_restricted(record)
    )


def _lapsed(record: GroupRecord) -> Lapsed | None:
    ended = record.ended
    if ended is None or record.ended_at is None or not is_resumable(record):
        return None
    return Lapsed(ended.session_id, ended.epoch, record.ended_at)


def _why_restricted(record: GroupRecord) -> str:
    lapsed = _lapsed(record)
    if lapsed is not None:
        return f'client session "{lapsed.session_id}" may still be primary by failsafe in epoch {lapsed.epoch}'
    if record.used == NOBODY:
        return "the coordinator's data were older than the group: an unknown session may be primary by failsafe"
    return f"a session may still be primary by failsafe in an epoch after {record.cleared}"
