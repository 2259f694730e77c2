"""Build the view of a session that the API shows."""

from agent.core.group_state import GroupState, is_active, last_heard, role_of, session_of
from agent.model import Instant, SessionView


def view_of(state: GroupState, session_id: str, now: Instant) -> SessionView:
    """Build the view of one session.

    Raises:
        NotFound: there is no such session.
    """
    record = session_of(state.record, session_id)
    contact = state.live.contacts[session_id]
    active = is_active(state, session_id, now)
    silent_since = None if active else last_heard(state, session_id, now)
    return SessionView(
        record=record,
        role=role_of(state.record, session_id),
        score=contact.score,
        last_data=contact.last_data,
        heartbeat_at=contact.last_heartbeat.wall if contact.last_heartbeat else None,
        active=active,
        silent_since=silent_since,
    )
