"""How long a stop may take, for whoever has to wait for it: systemd, and people who set its limits.

Pure arithmetic on settings and timing.
"""

from agent.core.lifecycle import STOP_WAIT_REQUESTS
from agent.core.timing import Timing
from agent.settings import AgentSettings

LEFT_S = 5.0
"""How long the exit waits for notification hooks: they are advisory, and a stop is to be quick."""

CLOSING_S = 5.0
"""For what comes after the session: checks, progress source, guard and connections are let go."""


def longest_stop_s(settings: AgentSettings, timing: Timing) -> float:
    """Seconds from SIGTERM to the exit, at most.

    A demotion ends by R + D from the last renewal (R4); while the agent starts, it has the hooks'
    limit (R6). Then heartbeats under way are answered, the role is released, the session deleted
    (R5), and ``left`` runs; or, if the demotion failed, the fence command runs.
    """
    demotion_s = max(timing.renew_s + timing.demote_s, settings.hook_limit)
    leaving_s = (1 + 2 * STOP_WAIT_REQUESTS) * timing.request_timeout_s + LEFT_S
    fencing_s = settings.hook_limit if settings.fence_command else 0.0
    return demotion_s + max(leaving_s, fencing_s) + CLOSING_S
