"""Which session of a group should be primary (R17): eligibility, preference, replacement.

Owns the comparison only, and changes no state. core/group_draft.py owns when a candidate is chosen and
what follows.
"""

from agent.core.group_failsafe import may_be_promoted
from agent.core.group_state import GroupState, Policy, is_alive
from agent.model import Instant, RoleOverride


def is_eligible(state: GroupState, session_id: str, now: Instant) -> bool:
    """Whether a session may be the candidate: alive, not held off, receiving our answers, allowed by failsafe.

    While a former holder may be active by failsafe, a session is allowed if that holder asks it (R25) and it
    has given no promise (R30).
    """
    record, contact = state.record, state.live.contacts.get(session_id)
    return (
        contact is not None
        and is_alive(state, session_id, now)
        and contact.hold_off_until <= now.mono
        and record.sessions[session_id].has_to_see is None
        and not (contact.promised and record.cleared < record.epoch)
        and (record.holder is not None or may_be_promoted(record, session_id))
    )


def best_candidate(state: GroupState, now: Instant, *, exclude: str | None) -> str | None:
    """The session to choose next, or None.

    Considers only sessions that have sent a heartbeat since the coordinator started and are not passed over.
    """
    contacts = state.live.contacts
    ready = [
        session_id
        for session_id in state.record.sessions
        if session_id != exclude
        and is_eligible(state, session_id, now)
        and contacts[session_id].last_heartbeat is not None
        and not contacts[session_id].passed_over
    ]
    return min(ready, key=lambda session_id: _preference(state, session_id), default=None)


def _preference(state: GroupState, session_id: str) -> tuple[float, float, float, str]:
    contact = state.live.contacts[session_id]
    data_at = contact.last_data.timestamp() if contact.last_data is not None else float("-inf")
    return (-override_rank(state, session_id), -contact.score, -data_at, session_id)


def override_rank(state: GroupState, session_id: str) -> int:
    """The rank of a session's override: 0 without one, highest for the newest."""
    session = state.record.sessions.get(session_id)
    if session is None or session.override is not RoleOverride.PRIMARY:
        return 0
    return session.override_order


def should_replace(
    state: GroupState, challenger: str, holder: str, now: Instant, policy: Policy
) -> bool:
    """Whether to replace a live holder: at once by a newer override, by a better score after the minimum hold."""
    overridden = override_rank(state, challenger) != override_rank(state, holder)
    if not overridden and now.mono - state.live.held_since < policy.minimum_hold_s:
        return False
    return outranks(state, challenger, holder, policy)


def outranks(state: GroupState, challenger: str, incumbent: str, policy: Policy) -> bool:
    """Whether a session has a newer override, or else a score better by more than the hysteresis."""
    theirs, ours = override_rank(state, challenger), override_rank(state, incumbent)
    if theirs != ours:
        return theirs > ours
    contact = state.live.contacts.get(incumbent)
    if contact is None or contact.last_heartbeat is None:
        return False  # its score is unknown after a restart
    return state.live.contacts[challenger].score - contact.score > policy.score_hysteresis
