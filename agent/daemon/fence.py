"""Run the fence command after a demotion that has failed (R4), within the hooks' limit."""

import asyncio

from agent.daemon.payload import Payloads
from agent.drivers.hooks.payload import payload_environment
from agent.drivers.hooks.runner import HookRunner
from agent.drivers.hooks.spec import HookSpec
from agent.model import Role
from agent.ops.logs import Log
from agent.schema.settings import AgentSettings

log = Log(__name__)


async def run_fence(settings: AgentSettings, runner: HookRunner, payloads: Payloads) -> None:
    """Run the fence command, if there is one; kill it at its limit."""
    if not settings.fence_command:
        return
    limit_s = settings.hook_limit
    payload = payloads.build(
        event="fence",
        old_role=Role.PRIMARY,
        new_role=Role.SECONDARY,
        epoch=None,
        reason="demotion failed",
        last_data=None,
        deadline_s=limit_s,
        previous_primary=None,
    )
    run = runner.start(
        HookSpec("fence", settings.fence_command), payload_environment(payload), payload
    )
    try:
        async with asyncio.timeout(limit_s):
            await run.launched()
            log.warning("fence command started", pid=run.pid)
            ended = await run.wait()
            log.warning("fence command ended", result=ended.why)
    except TimeoutError:
        run.kill()
        log.error("fence command killed at its limit", limit_s=limit_s)  # noqa: TRY400 - no traceback needed
