"""The inputs of a session's start: its options, and the tenure of the previous process."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from agent.core.executor import NO_LIMITS
from agent.model import Role


@dataclass(frozen=True, slots=True)
class FailsafeOptions:
    """The options of failsafe: staying primary while the coordinator is away.

    Attributes:
        url: where the other members send their questions to this one; part of its identity (R22).
    """

    url: str


@dataclass(frozen=True, slots=True)
class Options:
    """The options of one session.

    Attributes:
        session_id: the session's id, to find itself in a status.
        hooks: the roles that have a hook.
        hook_limit_s: the limit of a promotion hook.
        hook_limits_s: overrides of that limit, by role.
        cooldown_s: the hold-off after a failed promotion; it doubles with each one in a row.
        cooldown_limit_s: cap on the hold-off.
        jitter: from 0 to 1, drawn once by the caller, different for each process.
        store_id: the store that a previous process of this session has joined, or None.
        failsafe: None if this session takes no part in failsafe.
    """

    session_id: str
    hooks: frozenset[Role] = frozenset()
    hook_limit_s: float = 30.0
    hook_limits_s: Mapping[Role, float] = field(default_factory=lambda: NO_LIMITS)
    cooldown_s: float = 5.0
    cooldown_limit_s: float = 300.0
    jitter: float = 0.0
    store_id: str | None = None
    failsafe: FailsafeOptions | None = None


@dataclass(frozen=True, slots=True)
class PreviousTenure:
    """The tenure that the previous process of this session held when it ended.

    Attributes:
        epoch: of the tenure.
        instance: the process that held it.
    """

    epoch: int
    instance: str
