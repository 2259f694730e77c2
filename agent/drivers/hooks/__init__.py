"""What is run when something happens to a member (docs/hooks.md): commands, directories, webhooks.

Owns how a hook is checked, started, stopped, and how it ended. Knows nothing of roles, of when a hook
is to run and of what follows (R7, R8): whoever starts one decides that.
"""

from agent.drivers.hooks.check import check_hook
from agent.drivers.hooks.process import HookExit, HookProcess
from agent.drivers.hooks.runner import HookRun, HookRunner

__all__ = ["HookExit", "HookProcess", "HookRun", "HookRunner", "check_hook"]
