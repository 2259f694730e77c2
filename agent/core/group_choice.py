"""Which session of a group should be primary (R17): eligibility, order of preference, who is better.

Owns the comparison and nothing else: it reads a state and changes none. When somebody is chosen, and
what a choice does, is core/group_draft.py's.
"""

from agent.core.group_state import GroupState, Policy, alive
from agent.model import Instant, RoleOverride


def eligible(state: GroupState, session_id: str, now: Instant) -> bool:
    """Whether a session may be pending or become it: alive, and nothing speaks against it."""
    contact = state.live.contacts.get(session_id)
    return (
        contact is not None
        and alive(state, session_id, now)
        and contact.hold_off_until <= now.mono
        and state.record.sessions[session_id].has_to_see is None
    )


def best(state: GroupState, now: Instant, *, exclude: str | None) -> str | None:
    """The session to ask next, or None.

    Only one that was heard since the coordinator started, and was not just passed over, is asked.
    """
    contacts = state.live.contacts
    ready = [
        session_id
        for session_id in state.record.sessions
        if session_id != exclude
        and eligible(state, session_id, now)
        and contacts[session_id].posted_at is not None
        and not contacts[session_id].passed_over
    ]
    return min(ready, key=lambda session_id: _preference(state, session_id), default=None)


def _preference(state: GroupState, session_id: str) -> tuple[float, float, float, str]:
    contact = state.live.contacts[session_id]
    data_at = contact.last_data.timestamp() if contact.last_data is not None else float("-inf")
    return (-override_rank(state, session_id), -contact.score, -data_at, session_id)


def override_rank(state: GroupState, session_id: str) -> int:
    """0 without an override; the newest override has the highest rank."""
    session = state.record.sessions.get(session_id)
    if session is None or session.override is not RoleOverride.PRIMARY:
        return 0
    return session.override_order


def should_replace(
    state: GroupState, challenger: str, holder: str, now: Instant, policy: Policy
) -> bool:
    """Whether a live holder gives way: to a newer override at once, to a score after its minimum hold."""
    overridden = override_rank(state, challenger) != override_rank(state, holder)
    if not overridden and now.mono - state.live.held_since < policy.minimum_hold_s:
        return False
    return outranks(state, challenger, holder, policy)


def outranks(state: GroupState, challenger: str, incumbent: str, policy: Policy) -> bool:
    """By a newer override, else by a score that is better by more than the hysteresis."""
    theirs, ours = override_rank(state, challenger), override_rank(state, incumbent)
    if theirs != ours:
        return theirs > ours
    contact = state.live.contacts.get(incumbent)
    if contact is None or contact.posted_at is None:
        return False  # after a restart its score is not known yet
    return state.live.contacts[challenger].score - contact.score > policy.score_hysteresis
