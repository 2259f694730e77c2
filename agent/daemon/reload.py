"""At SIGHUP, read settings and credentials again, and apply changes that are possible without losing the role.

The declaration of a setting states whether a reload may change it. A change of any other is refused by name.
"""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from functools import partial

from agent.core.session import Options
from agent.daemon.credential_files import LONGEST_LOAD_S, CredentialFiles
from agent.daemon.host_health import HostHealth
from agent.daemon.member import Member
from agent.drivers.hooks.spec import HookSpec, load_specs
from agent.errors import FailoverError
from agent.ops import logs
from agent.ops.blocking import BlockingThread, StuckError
from agent.schema.fields import reloadable
from agent.schema.settings import AgentSettings

RELOADABLE = reloadable(AgentSettings)
"""The settings that SIGHUP changes."""

log = logs.Log(__name__)


class Reload:
    """The reload of one agent; one at a time.

    Args:
        member: ``settings`` is written here.
        credentials: read again, too.
        options: builds the session's options from settings.
        status: the status line for systemd after the reload.
    """

    def __init__(
        self,
        member: Member,
        host_health: HostHealth,
        credentials: CredentialFiles,
        *,
        options: Callable[[AgentSettings], Options],
        status: Callable[[], str],
    ) -> None:
        self._member = member
        self._host_health = host_health
        self._credentials = credentials
        self._options = options
        self._status = status
        self._lock = asyncio.Lock()
        self._waiting = False
        self._lane = BlockingThread("configuration")

    async def run(self, reread: Callable[[], AgentSettings]) -> None:
        """Read the settings again and apply them, unless a reload that waits will do it; log an error.

        Args:
            reread: reads them; may block, and raises FailoverError.
        """
        if self._waiting:
            return
        self._waiting = True
        async with self._lock:
            self._waiting = False
            self._member.notify.reloading()
            try:
                await self._reread(reread)
                await self._credentials.reload()
            finally:
                self._member.notify.ready(self._status())

    async def _reread(self, reread: Callable[[], AgentSettings]) -> None:
        try:
            await self._apply(await self._lane.run(reread))
        except (FailoverError, StuckError, OSError) as error:
            # A TimeoutError, which is an OSError, has no text.
            reason = str(error) or f"the hooks were not read within {LONGEST_LOAD_S:g} s"
            log.error("configuration not changed", reason=reason)  # noqa: TRY400 - no traceback needed

    async def _apply(self, wanted: AgentSettings) -> None:
        member = self._member
        before = member.settings
        keys = [setting.name for setting in fields(wanted)]
        changed = {key for key in keys if getattr(wanted, key) != getattr(before, key)}
        refused = changed - RELOADABLE
        update = {key: getattr(wanted, key) for key in changed & RELOADABLE}
        settings = replace(before, **update)
        specs = await self._lane.run(partial(read_hooks, settings), timeout_s=LONGEST_LOAD_S)
        if "progress" in changed:
            await self._host_health.replace_source(settings)
        member.role_runner.reconfigure(settings, specs)
        member.settings = member.requests.settings = settings
        member.session.reconfigure(self._options(settings))
        logs.configure(settings.log_level, settings.log_format)
        if {"check", "failover_score"} & changed:
            await self._host_health.replace_checks(settings)
        if refused:
            log.warning(
                "settings not changed",
                refused=sorted(refused),
                resolution="restart the agent to change them",
            )
        log.info("configuration read again", changed=sorted(update))


def read_hooks(settings: AgentSettings) -> Mapping[str, HookSpec]:
    """Load and check the hooks of new settings. May block. Raises ConfigError: a hook cannot be used."""
    specs = load_specs(settings)
    for spec in specs.values():
        spec.check()
    return specs
