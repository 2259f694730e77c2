"""Log lines of the coordinator about groups. Decides nothing."""

from collections.abc import Sequence

from agent.core.group_failsafe import choosable_members, is_restricted
from agent.core.group_state import Decision, Removal, role_of
from agent.core.roles import TRANSITIONS
from agent.model import GroupKey, GroupRecord, HistoryEntry, Role
from agent.ops.logs import Log

log = Log(__name__)


def log_names(key: GroupKey) -> dict[str, str]:
    """The fields that name a group in a log line; tenant and namespace unless they are the default."""
    names = {"group": key.group}
    if key[:2] != ("default", "default"):
        names |= {"tenant": key.tenant, "namespace": key.namespace}
    return names


def log_decision(key: GroupKey, before: GroupRecord, decision: Decision) -> None:
    """Log the changes of a decision that is durable."""
    after = decision.state.record
    log_role_changes(key, before, after, decision.history)
    _log_failsafe_changes(key, before, after, decision.history)
    _log_removals(key, decision.removals)


def log_role_changes(
    key: GroupKey, before: GroupRecord, after: GroupRecord, history: Sequence[HistoryEntry]
) -> None:
    """Log each session whose role differs between two records."""
    if before.revision == after.revision:
        return
    holders = [record.holder.session_id for record in (before, after) if record.holder]
    touched = dict.fromkeys([*holders, before.pending, after.pending])
    ended = {entry.session_id: entry.why_ended for entry in history if entry.why_ended}
    for session_id in touched:
        if session_id is None:
            continue
        old, new = role_of(before, session_id), role_of(after, session_id)
        if old is new:
            continue
        # One decision may end a tenure and choose the same session again: by way of Secondary.
        direct = (old, new) in TRANSITIONS or old is Role.SECONDARY  # to Primary: a resumed tenure
        for step in (new,) if direct else (Role.SECONDARY, new):
            why = {
                Role.PRIMARY: after.holder.why if after.holder else None,
                Role.PENDING_PRIMARY: "chosen to take over",
                Role.SECONDARY: ended.get(session_id, "not chosen any more"),
            }[step]
            log.info(
                "role changed",
                **log_names(key),
                session=session_id,
                before=old,
                after=step,
                epoch=after.epoch,
                reason=why,
            )
            old = step


def _log_failsafe_changes(
    key: GroupKey, before: GroupRecord, after: GroupRecord, history: Sequence[HistoryEntry]
) -> None:
    """Log each change that concerns failsafe (R21 to R25, R34)."""
    names = log_names(key)
    for session_id, session in after.sessions.items():
        known = before.sessions.get(session_id)
        url = known.failsafe_url if known is not None else None
        if url != session.failsafe_url:
            log.info(
                "failsafe URL changed",
                **names,
                session=session_id,
                before=url,
                after=session.failsafe_url,
            )
    for what, old, new in (
        ("failsafe set offered", before.offered, after.offered),
        ("failsafe set in use", before.used, after.used),
    ):
        if new is not None and new != old and new.revision > 0:
            members = [member.id for member in new.members]
            log.info(what, **names, revision=new.revision, members=members, off=new.off)
    if after.holder is None and is_restricted(after) and before.holder is not None:
        choosable = [member.id for member in choosable_members(after) or ()]
        log.warning(
            "failsafe restricts the choice", **names, epoch=after.epoch, choosable=choosable
        )
    for entry in history:
        if not entry.session_id:
            log.warning("failsafe declared", **names, epoch=entry.epoch, what=entry.why_started)


def _log_removals(key: GroupKey, removals: Sequence[Removal]) -> None:
    """Log each dead session that was removed."""
    for removal in removals:
        log.info(
            "dead session removed",
            **log_names(key),
            session=removal.session_id,
            silent_s=round(removal.silent_s),
            cause=removal.cause,
        )
