"""What a session is given when it starts: its options, and the tenure of the process before it."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from agent.core.executor import NO_LIMITS
from agent.model import Role


@dataclass(frozen=True, slots=True)
class Options:
    """The options of one session.

    Attributes:
        session_id: its own id, to find itself in a status.
        hooks: the roles that have a hook.
        hook_limit_s: how long a promotion hook may take.
        hook_limits_s: the same for single roles, where that is another.
        cooldown_s: wait after a failed promotion; doubles with each in a row.
        cooldown_limit_s: and grows no further than this.
        jitter: from 0 to 1, drawn once by the caller, different for each process.
        store_id: the store that an earlier process of this session met, or None.
    """

    session_id: str
    hooks: frozenset[Role] = frozenset()
    hook_limit_s: float = 30.0
    hook_limits_s: Mapping[Role, float] = field(default_factory=lambda: NO_LIMITS)
    cooldown_s: float = 5.0
    cooldown_limit_s: float = 300.0
    jitter: float = 0.0
    store_id: str | None = None


@dataclass(frozen=True, slots=True)
class FormerTenure:
    """The tenure that an earlier process of this session held when it ended.

    Attributes:
        epoch: of the tenure.
        instance: the process that held it.
    """

    epoch: int
    instance: str
