"""What a session wants done. Values; the daemon does them.

The order in the tuple that ``Session.step`` returns is contract: the daemon begins them one by one
in that order, and what an earlier one says is said before a later one starts. In particular
``Publish(Secondary)`` comes before the demotion hook starts, and ``Release`` is only ever wanted
after the demotion hook has succeeded (R5).
"""

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from agent.errors import ExitCode
from agent.model import Role


class Cause(StrEnum):
    """Why a role changed, as a closed set: for metrics, and for who acts on the difference."""

    CHOSEN = "chosen"
    CONFIRMED = "confirmed"
    LEASE_LOST = "lease_lost"
    """No renewal until R, or this process was stopped: nobody told us."""
    UNFIT = "unfit"
    """A health check, the guard or the workload failed."""
    PROMOTION_FAILED = "promotion_failed"
    TOLD = "told"
    """The coordinator says so."""
    GONE = "gone"
    """A server without epochs does not know the session any more."""
    OTHER_STORE = "other_store"
    """The answers are from another store than the one that this session has met."""
    TASK_FAILED = "task_failed"
    """A part of the agent has failed."""
    STOPPING = "stopping"


SELF_DEMOTIONS = frozenset({Cause.LEASE_LOST, Cause.UNFIT, Cause.OTHER_STORE, Cause.TASK_FAILED})
"""Demotions that nobody asked for: these run the notification hook ``lost``."""


@dataclass(frozen=True, slots=True)
class HookFacts:
    """What a hook is told (docs/hooks.md).

    Attributes:
        role: the role that is being taken; it names the hook, too.
        epoch: of the tenure that begins or ends, or None when the server has none.
        last_data: up to which moment data was processed, by whoever was primary.
        previous_primary: session id of the tenure before, if known.
        limit_s: seconds from its start after which it is killed.
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
    """Make sure that the group and the session exist; keep trying; then say Joined."""


@dataclass(frozen=True, slots=True)
class SendBeat:
    """Send a heartbeat now; say Answered or BeatFailed. Bound by the timing's request timeout."""

    beat: int


@dataclass(frozen=True, slots=True)
class Publish:
    """Say to the world (state file, log, probe) what this session is."""

    before: Role
    role: Role
    epoch: int | None
    cause: Cause
    reason: str


@dataclass(frozen=True, slots=True)
class StartHook:
    """Run the hook of ``facts.role``; say HookEnded."""

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
    """Tell the coordinator that demotion is done; say Released.

    Attributes:
        epoch: whose tenure ends.
        hold_off_s: how long this session does not want to be chosen.
        instance: the process that held the tenure; None for this one.
    """

    epoch: int
    reason: str
    hold_off_s: float
    instance: str | None = None


@dataclass(frozen=True, slots=True)
class Leave:
    """Delete the session at the server; say Left.

    A Join under way is cancelled first: it would register the session again.
    """


@dataclass(frozen=True, slots=True)
class Escalate:
    """Demotion failed within its budget (R4): kill what hooks of this tenure left running."""

    reason: str


@dataclass(frozen=True, slots=True)
class Exit:
    """The session is over; nothing else will be wanted."""

    code: ExitCode


Effect = (
    Join | SendBeat | Publish | StartHook | TermHook | KillHook | Release | Leave | Escalate | Exit
)
