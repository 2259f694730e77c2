"""The effects that a session requests. Values; the daemon carries them out.

The order in the tuple that ``Session.step`` returns is a contract: the daemon starts the effects one by one in that
order, and a role is published before any later effect starts. So ``Publish(Secondary)`` comes before the demotion
hook, and ``Release`` only after the hook has succeeded (R5).
"""

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from agent.errors import ExitCode
from agent.model import Member, Role


class Cause(StrEnum):
    """Why a role changed, as a closed set. The values are labels of metrics."""

    CHOSEN = "chosen"
    CONFIRMED = "confirmed"
    LEASE_LOST = "lease_lost"
    """No renewal until R, or this process was frozen."""
    UNFIT = "unfit"
    """A health check, the guard or the workload failed."""
    PROMOTION_FAILED = "promotion_failed"
    REVOKED = "revoked"
    """The coordinator has answered with another role, or with another tenure."""
    GONE = "gone"
    """A server without epochs does not know the session any more."""
    OTHER_STORE = "other_store"
    """The answers came from another store than the session's."""
    TASK_FAILED = "task_failed"
    """A part of the agent has failed."""
    STOPPING = "stopping"


UNREQUESTED_DEMOTIONS = frozenset(
    {Cause.LEASE_LOST, Cause.UNFIT, Cause.OTHER_STORE, Cause.TASK_FAILED}
)
"""Demotions that nobody has requested: these run the notification hook ``lost``."""


@dataclass(frozen=True, slots=True)
class HookFacts:
    """The facts of a hook payload that the session knows (docs/hooks.md).

    Attributes:
        role: the new role, which also selects the hook.
        epoch: of the tenure that begins or ends, or None at a server without epochs.
        last_data: the group's LastDataProcessedTime.
        previous_primary: session id of the previous tenure, if known.
        limit_s: seconds from its start after which the hook is killed.
    """

    role: Role
    old_role: Role
    epoch: int | None
    reason: str
    last_data: datetime | None
    previous_primary: str | None
    limit_s: float


@dataclass(frozen=True, slots=True)
class Join:
    """Register the group and the session, with retries; answered by Joined."""


@dataclass(frozen=True, slots=True)
class SendHeartbeat:
    """Send a heartbeat now, within the request timeout; answered by HeartbeatAnswered or HeartbeatFailed.

    Attributes:
        holds: the epoch that this session holds, or None.
        failsafe_revision: the revision of the set of members that it uses in that tenure, or None (R23).
        promised: whether a promise binds this session (R30).
    """

    number: int
    holds: int | None = None
    failsafe_revision: int | None = None
    promised: bool = False


@dataclass(frozen=True, slots=True)
class Ask:
    """Send a question to another member, within ``Timing.question_interval_s``; answered by Answered.

    Attributes:
        member: the member to ask.
        epoch: of the tenure that this session holds.
        nonce: identifies the question in this process; the message that is sent has a random one.
        rehearsal: whether the question is only a test (R35).
    """

    member: Member
    epoch: int
    nonce: int
    rehearsal: bool = False


@dataclass(frozen=True, slots=True)
class Vote:
    """The answer to the question of another member (R29).

    Attributes:
        yes: whether the member that asked may stay primary. In a rehearsal: whether it could if the
            coordinator were away.
        why: for people.
    """

    yes: bool
    why: str


@dataclass(frozen=True, slots=True)
class Publish:
    """Publish the role of this session (state file, log, probe)."""

    before: Role
    role: Role
    epoch: int | None
    cause: Cause
    reason: str


@dataclass(frozen=True, slots=True)
class StartHook:
    """Run the hook of ``facts.role``; answered by HookEnded."""

    run: int
    facts: HookFacts


@dataclass(frozen=True, slots=True)
class TermHook:
    """SIGTERM to the process group of a hook; HookEnded is still expected."""

    run: int


@dataclass(frozen=True, slots=True)
class KillHook:
    """SIGKILL to the process group of a hook; HookEnded is still expected."""

    run: int


@dataclass(frozen=True, slots=True)
class Release:
    """Release the role at the coordinator after the demotion; answered by Released.

    Attributes:
        epoch: of the tenure that ends.
        hold_off_s: how long this session asks not to be chosen.
        instance: the process that held the tenure; None for this one.
        held: whether the tenure was accepted. False: it was refused and never active (R25).
    """

    epoch: int
    reason: str
    hold_off_s: float
    instance: str | None = None
    held: bool = True


@dataclass(frozen=True, slots=True)
class Leave:
    """Delete the session at the server; answered by Left.

    A Join under way is cancelled first: it would register the session again.
    """


@dataclass(frozen=True, slots=True)
class Escalate:
    """The demotion has failed within its budget (R4): kill all processes of this tenure."""

    reason: str


@dataclass(frozen=True, slots=True)
class Exit:
    """The session has ended; no other effect follows."""

    code: ExitCode


Effect = (
    Join
    | SendHeartbeat
    | Ask
    | Publish
    | StartHook
    | TermHook
    | KillHook
    | Release
    | Leave
    | Escalate
    | Exit
)
