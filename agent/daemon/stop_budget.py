"""The longest duration of a stop, for systemd and for people who configure its timeouts.

Pure arithmetic on settings and timing.
"""

from agent.core.lifecycle import STOP_WAIT_REQUESTS
from agent.core.timing import Timing
from agent.schema.settings import AgentSettings

LEFT_HOOK_S = 5.0
"""Timeout of the notification hooks at the exit: they are advisory, and must not delay a stop."""

CLOSE_S = 5.0
"""Time to close checks, progress source, guard and connections after the session."""


def longest_stop_s(settings: AgentSettings, timing: Timing) -> float:
    """The longest time from SIGTERM to the exit, in seconds.

    A demotion ends by R + D from the last renewal (R4); the first one has the limit of hooks (R6).
    Then heartbeats in flight end, the role is released, the session is deleted (R5), and ``left``
    runs; or, after a failed demotion, the fence command runs.
    """
    demotion_s = max(timing.renew_s + timing.demote_s, settings.hook_limit)
    leaving_s = (1 + 2 * STOP_WAIT_REQUESTS) * timing.request_timeout_s + LEFT_HOOK_S
    fencing_s = settings.hook_limit if settings.fence_command else 0.0
    return demotion_s + max(leaving_s, fencing_s) + CLOSE_S
