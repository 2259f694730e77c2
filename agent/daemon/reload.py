"""SIGHUP: read the settings anew and change what can change without losing the role.

Owns the rule which settings those are. The rest is refused by name, and stays.
"""

import asyncio
from collections.abc import Callable
from dataclasses import fields, replace

from agent.core.session import Options
from agent.daemon.inputs import Inputs
from agent.daemon.member import Member
from agent.errors import FailoverError
from agent.ops import logs
from agent.ops.blocking import BlockingThread, StuckError
from agent.settings import AgentSettings

RELOADABLE = frozenset(
    {
        "check",
        "cooldown",
        "cooldown_limit",
        "failover_score",
        "fence_command",
        "hook_directories_writable",
        "hook_directory",
        "hook_environment",
        "hook_group",
        "hook_joined",
        "hook_left",
        "hook_limit",
        "hook_lost",
        "hook_notification_limit",
        "hook_pending_primary",
        "hook_pending_primary_limit",
        "hook_primary",
        "hook_primary_limit",
        "hook_retries",
        "hook_secondary",
        "hook_user",
        "log_format",
        "log_level",
        "max_behind",
        "progress",
        "startup_timeout",
        "webhook_ca_file",
        "webhook_secret_file",
        "workload_forward_hup",
    }
)
"""Settings that SIGHUP changes without losing the role; a change of another one is refused by name."""

log = logs.Log(__name__)


class Reload:
    """The reload of one agent; one at a time.

    Args:
        member: ``settings`` is written here.
        options: makes the session's options of settings.
        status: the line for systemd once it is done.
    """

    def __init__(
        self,
        member: Member,
        inputs: Inputs,
        *,
        options: Callable[[AgentSettings], Options],
        status: Callable[[], str],
    ) -> None:
        self._member = member
        self._inputs = inputs
        self._options = options
        self._status = status
        self._lock = asyncio.Lock()
        self._lane = BlockingThread("configuration")

    async def run(self, reread: Callable[[], AgentSettings]) -> None:
        """Read the settings anew and take them over; what is wrong with them is logged.

        Args:
            reread: reads them; may block, and raises FailoverError.
        """
        async with self._lock:
            self._member.notify.reloading()
            try:
                await self._take_over(await self._lane.run(reread))
            except (FailoverError, StuckError) as error:
                log.error("configuration not changed", reason=error)  # noqa: TRY400 - no traceback needed
            finally:
                self._member.notify.ready(self._status())

    async def _take_over(self, wanted: AgentSettings) -> None:
        member = self._member
        before = member.settings
        keys = [setting.name for setting in fields(wanted)]
        changed = {key for key in keys if getattr(wanted, key) != getattr(before, key)}
        refused = changed - RELOADABLE
        update = {key: getattr(wanted, key) for key in changed & RELOADABLE}
        settings = replace(before, **update)
        specs = await self._lane.run(lambda: member.runs.read_hooks(settings))
        if "progress" in changed:
            await self._inputs.change_source(settings)
        member.runs.reconfigure(settings, specs)
        member.settings = member.requests.settings = settings
        member.session.reconfigure(self._options(settings))
        logs.configure(settings.log_level, settings.log_format)
        if {"check", "failover_score"} & changed:
            await self._inputs.change_checks(settings)
        if refused:
            log.warning(
                "settings not changed",
                refused=sorted(refused),
                resolution="restart the agent to change them",
            )
        log.info("configuration read again", changed=sorted(update))
