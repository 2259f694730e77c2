"""What can happen to an agent's session. Values; core/session.py decides what follows."""

from dataclasses import dataclass
from enum import StrEnum

from agent.core.timing import Timing
from agent.errors import ExitCode
from agent.model import GroupStatus, HeartbeatAnswer


class Failure(StrEnum):
    """Why a heartbeat was not answered, as far as the session acts on the difference."""

    GONE = "gone"
    """404: the group or the session is not known there (docs/api.md, "Status codes")."""
    BACK_OFF = "back_off"
    """429 or 503: asked to come later."""
    OTHER_STORE = "other_store"
    """The answer is from another store than the one that this session has met."""
    OTHER = "other"


@dataclass(frozen=True, slots=True)
class Joined:
    """The group exists and the session is registered in it.

    Attributes:
        timing: for the server's L.
        store_id: the store that the session is registered in; None at a plain v1 server.
    """

    timing: Timing
    store_id: str | None = None


@dataclass(frozen=True, slots=True)
class Answered:
    """A heartbeat was answered."""

    beat: int
    answer: HeartbeatAnswer


@dataclass(frozen=True, slots=True)
class BeatFailed:
    """A heartbeat was not answered, or with an error.

    Attributes:
        why: for people.
        retry_after_s: how long the server asks to wait, or None.
    """

    beat: int
    failure: Failure
    why: str
    retry_after_s: float | None = None


@dataclass(frozen=True, slots=True)
class StatusSeen:
    """The group's status was read."""

    status: GroupStatus


@dataclass(frozen=True, slots=True)
class HookEnded:
    """A hook that was started has ended, or could not be started; ``why`` says how, for people."""

    run: int
    ok: bool
    why: str


@dataclass(frozen=True, slots=True)
class Stalled:
    """The host slept or the loop was late by more than the margin (R2)."""

    late_s: float


@dataclass(frozen=True, slots=True)
class Fitness:
    """Whether this host may be primary at all (R9): its checks, its guard, its workload.

    Said at each change. An unfit session demotes, beats no more, and so is not chosen.
    """

    fit: bool
    reason: str


@dataclass(frozen=True, slots=True)
class Released:
    """The release was answered, or given up."""


@dataclass(frozen=True, slots=True)
class Left:
    """The session was deleted at the server, or that was given up."""


@dataclass(frozen=True, slots=True)
class Stop:
    """The session is to end: demote, release, leave, exit (R5).

    Attributes:
        code: the exit code. Not OK if a part of the agent has failed.
        reason: for operators.
    """

    code: ExitCode = ExitCode.OK
    reason: str = "stopping"


@dataclass(frozen=True, slots=True)
class Tick:
    """``wake_at`` has come."""


Event = (
    Joined
    | Answered
    | BeatFailed
    | StatusSeen
    | HookEnded
    | Stalled
    | Fitness
    | Released
    | Left
    | Stop
    | Tick
)
