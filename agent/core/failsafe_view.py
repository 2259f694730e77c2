"""The view of a session's failsafe for operators: local status, log and metrics.

Values only. ``Session.failsafe_view`` builds a view; the daemon compares two views to log what has changed.
"""

from dataclasses import dataclass
from enum import StrEnum

from agent.model import Member


class Readiness(StrEnum):
    """The state of failsafe at one member. The values are labels of metrics."""

    OFF = "off"
    """Not configured, or turned off for the group; ``why`` has the reason."""
    READY = "ready"
    """On the primary: each other member has answered the last question. Elsewhere: it answers questions."""
    NOT_READY = "not_ready"
    """Primary, but a member does not answer: if the coordinator went away, the role would be lost."""
    HOLDING = "holding"
    """Primary by the votes of all other members, since the coordinator does not answer."""
    PROMISED = "promised"
    """Not primary, and bound by a promise not to accept the role."""


@dataclass(frozen=True, slots=True)
class MemberReadiness:
    """How a member has answered the questions of the primary.

    Attributes:
        member: the member.
        ready: whether its last answer was yes.
        why: its last answer, for people.
        since: when ``ready`` last changed, or when it was first asked; CLOCK_BOOTTIME seconds.
        yes_at: when the newest question that it answered with yes was sent, or minus infinity.
    """

    member: Member
    ready: bool
    why: str
    since: float
    yes_at: float = float("-inf")


@dataclass(frozen=True, slots=True)
class FailsafeView:
    """The failsafe of one session at one moment. Moments are CLOCK_BOOTTIME seconds.

    Attributes:
        readiness: the state.
        why: a sentence for people.
        since: when HOLDING or NOT_READY began; None in the other states.
        revision: the set of members that the primary uses, or None.
        members: the other members of that set.
        promised_to: session id of the member that received the newest promise. None if no promise binds, or if it
            is only assumed: a process that has started may have promised something before.
        promised_until: when the promise that binds ends, or None.
    """

    readiness: Readiness
    why: str
    since: float | None = None
    revision: int | None = None
    members: tuple[MemberReadiness, ...] = ()
    promised_to: str | None = None
    promised_until: float | None = None
