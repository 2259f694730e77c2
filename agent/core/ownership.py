"""Which identity a session belongs to, and who else may act for it.

A session belongs to the identity that registered it. One without an owner (registered without
authentication, or before there were owners) is open to everybody with the right of the call, until the
first authenticated heartbeat adopts it. Knows no credentials and no access lists: the coordinator passes
a ``Requester``, or None where nobody is authenticated.
"""

from agent.core.group_draft import Draft
from agent.core.group_state import ReceiveHeartbeat, Requester
from agent.errors import Forbidden
from agent.model import SessionRecord


def refuse_stranger(draft: Draft, session_id: str, by: Requester | None) -> None:
    """Raise Forbidden if a session belongs to another identity, unless the requester may act for that."""
    session = draft.record.sessions.get(session_id)
    if by is None or session is None or session.owner in {None, by.identity} or by.manages:
        return
    raise Forbidden(
        f'Client session "{session_id}" of group "{draft.record.config.id}" belongs to another'
        f' identity than "{by.identity}".',
        "Use the credentials that it was registered with, or another Id; somebody with"
        " ManageAccessControl can delete it.",
    )


def adopt(draft: Draft, session: SessionRecord, heartbeat: ReceiveHeartbeat) -> None:
    """Make the sender of a heartbeat the owner of a session that has none.

    Only the process that holds the tenure can adopt the session of a primary: nobody else knows its instance.
    """
    if session.owner is not None or heartbeat.by is None:
        return
    session_id = heartbeat.session_id
    holder = draft.record.holder
    if (
        holder is None
        or holder.session_id != session_id
        or draft.holds(session_id, heartbeat.instance)
    ):
        draft.change_session(session_id, owner=heartbeat.by.identity)
