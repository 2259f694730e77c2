"""Hooks: the commands, directories of scripts and webhooks that run at events (docs/hooks.md).

Owns how a hook is checked, started and stopped, and its result. Knows nothing of roles, of when a hook has
to run and of what follows (R7, R8): the caller decides that.
"""

from agent.drivers.hooks.check import HookCheck, RunAs
from agent.drivers.hooks.notifier import Notifier
from agent.drivers.hooks.payload import build_payload, payload_environment
from agent.drivers.hooks.process import HookContext, HookExit, HookProcess
from agent.drivers.hooks.runner import HookRun, HookRunner
from agent.drivers.hooks.spec import (
    EVENTS,
    NOTIFICATIONS,
    PROMOTIONS,
    ROLE_EVENTS,
    CommandStep,
    Form,
    HookSpec,
    WebhookStep,
    load_specs,
)

__all__ = [
    "EVENTS",
    "NOTIFICATIONS",
    "PROMOTIONS",
    "ROLE_EVENTS",
    "CommandStep",
    "Form",
    "HookCheck",
    "HookContext",
    "HookExit",
    "HookProcess",
    "HookRun",
    "HookRunner",
    "HookSpec",
    "Notifier",
    "RunAs",
    "WebhookStep",
    "build_payload",
    "load_specs",
    "payload_environment",
]
