"""Log lines of the coordinator about groups. Decides nothing."""

from collections.abc import Sequence

from agent.core.group_state import Removal, role_of
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


def log_role_changes(
    key: GroupKey, before: GroupRecord, after: GroupRecord, history: Sequence[HistoryEntry]
) -> None:
    """One line for each session whose role another record changes."""
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
        for step in (new,) if (old, new) in TRANSITIONS else (Role.SECONDARY, new):
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


def log_removals(key: GroupKey, removals: Sequence[Removal]) -> None:
    """One line for each dead session that was removed."""
    for removal in removals:
        log.info(
            "dead session removed",
            **log_names(key),
            session=removal.session_id,
            silent_s=round(removal.silent_s),
            cause=removal.cause,
        )
