"""What is run when something happens to a member (docs/hooks.md): commands, directories, webhooks.

Owns how a hook is checked, started, stopped, and how it ended. Knows nothing of roles, of when a hook
is to run and of what follows (R7, R8): whoever starts one decides that.
"""

from agent.drivers.hooks.check import RunAs, check_hook
from agent.drivers.hooks.facts import environment_of, facts_of
from agent.drivers.hooks.notifier import Notifier
from agent.drivers.hooks.process import HookExit, HookProcess, Surroundings
from agent.drivers.hooks.runner import HookRun, HookRunner
from agent.drivers.hooks.spec import (
    EVENTS,
    NOTIFICATIONS,
    PROMOTIONS,
    ROLE_EVENTS,
    Command,
    ExecPlan,
    Form,
    HookSpec,
    Post,
    specs_of,
)

__all__ = [
    "EVENTS",
    "NOTIFICATIONS",
    "PROMOTIONS",
    "ROLE_EVENTS",
    "Command",
    "ExecPlan",
    "Form",
    "HookExit",
    "HookProcess",
    "HookRun",
    "HookRunner",
    "HookSpec",
    "Notifier",
    "Post",
    "RunAs",
    "Surroundings",
    "check_hook",
    "environment_of",
    "facts_of",
    "specs_of",
]
