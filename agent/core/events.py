"""The events of an agent's session. Values; core/session.py decides what follows."""

from dataclasses import dataclass
from enum import StrEnum

from agent.core.timing import Timing
from agent.errors import ExitCode
from agent.model import GroupStatus, HeartbeatAnswer


class HeartbeatFailure(StrEnum):
    """Why a heartbeat has failed. Causes are distinguished only where the session acts differently."""

    GONE = "gone"
    """404: the server does not know the group or the session (docs/api.md, "Status codes")."""
    BACK_OFF = "back_off"
    """429 or 503: the server asks for a later retry."""
    OTHER_STORE = "other_store"
    """The answer came from another store than the session's."""
    OTHER = "other"


@dataclass(frozen=True, slots=True)
class Joined:
    """The group exists and the session is registered in it.

    Attributes:
        timing: for the group's L at the server.
        store_id: the store that the session is registered in; None at a plain v1 server.
    """

    timing: Timing
    store_id: str | None = None


@dataclass(frozen=True, slots=True)
class HeartbeatAnswered:
    """A heartbeat was answered."""

    number: int
    answer: HeartbeatAnswer


@dataclass(frozen=True, slots=True)
class HeartbeatFailed:
    """A heartbeat was not answered, or was answered with an error.

    Attributes:
        why: for people.
        retry_after_s: the server's Retry-After, or None.
        contact: whether the coordinator itself refused the heartbeat, with a status from 400 to 499 (R26).
    """

    number: int
    failure: HeartbeatFailure
    why: str
    retry_after_s: float | None = None
    contact: bool = False


@dataclass(frozen=True, slots=True)
class StatusRead:
    """The group's status was read."""

    status: GroupStatus


@dataclass(frozen=True, slots=True)
class HookEnded:
    """A hook has ended, or could not be started; ``why`` is its result, for people."""

    run: int
    ok: bool
    why: str


@dataclass(frozen=True, slots=True)
class Stalled:
    """The host was suspended, or the loop was late by more than the margin (R2)."""

    late_s: float


@dataclass(frozen=True, slots=True)
class FitnessChanged:
    """This host has become fit or unfit to be primary (R9), by its checks, its guard or its workload.

    An unfit session demotes and sends no heartbeats, so it is not chosen.
    """

    fit: bool
    reason: str


@dataclass(frozen=True, slots=True)
class Released:
    """The release was answered, or has failed and is not retried."""


@dataclass(frozen=True, slots=True)
class Left:
    """The session was deleted at the server, or the deletion has failed and is not retried."""


@dataclass(frozen=True, slots=True)
class Stop:
    """Shut the session down: demote, release, leave, exit (R5).

    Attributes:
        code: the exit code; not OK if a part of the agent has failed.
        reason: for operators.
    """

    code: ExitCode = ExitCode.OK
    reason: str = "stopping"


@dataclass(frozen=True, slots=True)
class Asked:
    """Another member asks whether it may stay primary without the coordinator (R29).

    Pass it to ``Session.vote``, which returns the answer.

    Attributes:
        asker: session id of the member that asks.
        epoch: of the tenure that it holds.
        rehearsal: whether the question is only a test, so that the answer promises nothing (R35).
    """

    asker: str
    epoch: int
    rehearsal: bool = False


@dataclass(frozen=True, slots=True)
class Answered:
    """A question of this session (effect ``Ask``) was answered, or has failed.

    Attributes:
        nonce: the nonce of the question.
        yes: the vote; False also if no valid answer came in time.
        why: for people.
    """

    nonce: int
    yes: bool
    why: str


@dataclass(frozen=True, slots=True)
class Tick:
    """``wake_at`` has come."""


Event = (
    Joined
    | HeartbeatAnswered
    | HeartbeatFailed
    | StatusRead
    | HookEnded
    | Stalled
    | FitnessChanged
    | Released
    | Left
    | Stop
    | Asked
    | Answered
    | Tick
)
