"""What operators see of a session's failsafe: for the local status, the log and metrics.

Values only. ``Session.failsafe_view`` builds one; the daemon compares two of them to log what has changed.
"""

from dataclasses import dataclass
from enum import StrEnum

from agent.model import Member


class Readiness(StrEnum):
    """The state of failsafe at one member. The values are labels of metrics."""

    OFF = "off"
    """Not configured, or turned off for the group; ``why`` says by what."""
    READY = "ready"
    """Primary: each other member has answered the last question. Else: questions are answered."""
    NOT_READY = "not_ready"
    """Primary, and a member does not answer: without the coordinator the role would be lost."""
    HOLDING = "holding"
    """Primary by the votes of all other members, since the coordinator does not answer."""
    PROMISED = "promised"
    """Not primary, and bound by a promise to accept no role."""


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
        since: when it began to hold, or to be not ready; None in the other states.
        revision: the set of members that the primary uses, or None.
        members: the other members of that set.
        promised_to: session id of the member that the newest promise was given to; None if that of the
            process's start still binds, or if none binds.
        promised_until: the end of the promise that binds, or None.
    """

    readiness: Readiness
    why: str
    since: float | None = None
    revision: int | None = None
    members: tuple[MemberReadiness, ...] = ()
    promised_to: str | None = None
    promised_until: float | None = None
