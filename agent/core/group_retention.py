"""When a session that sends no heartbeats is removed (R20).

Owns when its silence is recorded, when it may be removed, and which session is removed from a full group. Changes
no state: core/group_draft.py records and removes.
"""

from agent.core.group_state import GroupState, Policy, is_alive, last_heard
from agent.model import Instant, RoleOverride

RETENTION_LEASES = 10
"""The shortest retention, in L: a member that restarts, or is cut off for a while, keeps its session."""

RECORDED_AFTER_S = 3600.0
RECORDED_AFTER_SHARE = 0.1
"""After how long a silence is recorded, in seconds, or as a share of the retention if that is shorter. So a restart
of the coordinator forgets an hour of silence at most, and short outages of many members cost no writes."""


def retention_s(lease_s: float, policy: Policy) -> float:
    """How long a silent session is kept."""
    return max(policy.dead_session_retention_s, RETENTION_LEASES * lease_s)


def silence_s(state: GroupState, session_id: str, now: Instant) -> float:
    """How long a session has been silent; a recorded silence includes the time before a restart."""
    return (now.wall - last_heard(state, session_id, now)).total_seconds()


def recorded_after_s(lease_s: float, policy: Policy) -> float:
    """After how many seconds of silence of a session the silence is recorded."""
    share_s = RECORDED_AFTER_SHARE * retention_s(lease_s, policy)
    return max(lease_s, min(RECORDED_AFTER_S, share_s))


def removal_at(state: GroupState, session_id: str, now: Instant, policy: Policy) -> float:
    """When a session whose silence is recorded is to be removed; infinity while it must not be."""
    if not _is_removable(state, session_id):
        return float("inf")
    lease_s = state.record.config.lease_s
    # The wall clock also counts the coordinator's downtime, which is no silence, and may be wrong.
    heard_again_by = state.live.contacts[session_id].heard_at + RETENTION_LEASES * lease_s
    rest_s = retention_s(lease_s, policy) - silence_s(state, session_id, now)
    return max(heard_again_by, now.mono + rest_s)


def next_due_at(state: GroupState, now: Instant, policy: Policy) -> float:
    """When the next silence is to be recorded or the next session to be removed, or infinity."""
    contacts, at = state.live.contacts, float("inf")
    recorded_s = recorded_after_s(state.record.config.lease_s, policy)
    for session_id, session in state.record.sessions.items():
        if session.silent_since is None:
            at = min(at, contacts[session_id].heard_at + recorded_s)
        else:
            at = min(at, removal_at(state, session_id, now, policy))
    return at


def longest_dead(state: GroupState, now: Instant) -> str | None:
    """The session to remove from a full group for a new one; None if all are active or have to be kept."""
    dead = [
        session_id
        for session_id in state.record.sessions
        if not is_alive(state, session_id, now) and _is_removable(state, session_id)
    ]
    return max(dead, key=lambda session_id: silence_s(state, session_id, now), default=None)


def _is_removable(state: GroupState, session_id: str) -> bool:
    """Whether nothing depends on a session: no lease, no candidacy, no override, no hold-off."""
    record, session = state.record, state.record.sessions[session_id]
    return (
        not record.quiet
        and (record.holder is None or record.holder.session_id != session_id)
        and record.pending != session_id
        and session.override is RoleOverride.OFF
        and session.hold_off is None
    )
