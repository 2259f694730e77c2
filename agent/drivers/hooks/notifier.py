"""Notification hooks (R10): advisory, apart, one at a time, and nobody waits for them.

Owns one bounded queue and the run at its head. Their failure is logged and counted, nothing else.
"""

import asyncio
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from agent.drivers.hooks.facts import environment_of
from agent.drivers.hooks.runner import HookRun, HookRunner
from agent.drivers.hooks.spec import HookSpec
from agent.ops.logs import Log

WAITING = 16
"""Notifications that wait: hours of an ordinary group's changes. A hook that hangs fills it, and then
the newest are worth more than the oldest."""

GRACE_S = 1.0
"""Between TERM and KILL of one that has used up its time."""

KILLED_S = 1.0
"""How long one that was killed is waited for; in uninterruptible sleep it does not end."""

log = Log(__name__)


class Notifier:
    """Runs the hooks of ``joined``, ``lost`` and ``left``.

    Args:
        runner: starts them.
        specs: the hooks by event; an event without one is passed over.
        limit_s: how long each may take.

    Attributes:
        dropped: how many were never run, or were cut short by the end.
        failed: how many ended otherwise than with success.
        specs: may be replaced at any time.
    """

    def __init__(self, runner: HookRunner, specs: Mapping[str, HookSpec], limit_s: float) -> None:
        self.dropped = 0
        self.failed = 0
        self.limit_s = limit_s
        self._runner = runner
        self.specs = specs
        self._waiting: deque[tuple[HookSpec, Mapping[str, Any]]] = deque()
        self._working: asyncio.Task[None] | None = None

    def put(self, event: str, facts: Mapping[str, Any]) -> None:
        """Have the hook of ``event`` run when the ones before it have ended. Never waits."""
        spec = self.specs.get(event)
        if spec is None:
            return
        if len(self._waiting) >= WAITING:
            oldest, _ = self._waiting.popleft()
            self._drop(oldest.name, "too many wait")
        self._waiting.append((spec, facts))
        if self._working is None or self._working.done():
            self._working = asyncio.get_running_loop().create_task(self._work())

    async def drain(self, timeout_s: float) -> None:
        """Let those that wait run, for ``timeout_s`` seconds at most; then end it. For the exit."""
        if self._working is None:
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await asyncio.shield(self._working)
        self._working.cancel()
        await asyncio.gather(self._working, return_exceptions=True)
        for spec, _ in self._waiting:
            self._drop(spec.name, "the agent ends")
        self._waiting.clear()

    def _drop(self, name: str, reason: str) -> None:
        self.dropped += 1
        log.warning("notification dropped", hook=name, reason=reason, dropped=self.dropped)

    async def _work(self) -> None:
        while self._waiting:
            spec, facts = self._waiting.popleft()
            run = self._runner.start(spec, environment_of(facts), facts)
            log.info("hook started", hook=run.name, epoch=facts.get("epoch"))
            try:
                await self._limited(run)
            except asyncio.CancelledError:
                self._drop(run.name, "the agent ends")
                run.kill()
                with suppress(TimeoutError):
                    async with asyncio.timeout(KILLED_S):
                        await run.wait()
                        self._runner.forget(run)
                raise
            result = await run.wait() if run.ended else None
            if result is not None and result.ok:
                log.info("hook ended", hook=run.name, result=result.why, seconds=result.duration_s)
            else:
                self.failed += 1
                why = result.why if result is not None else "it does not end, even by KILL"
                log.warning("notification failed", hook=run.name, reason=why, failed=self.failed)
            if run.ended:
                self._runner.forget(run)  # nothing of it has to be signalled later

    async def _limited(self, run: HookRun) -> None:
        for limit_s, then in ((self.limit_s, run.term), (GRACE_S, run.kill), (KILLED_S, None)):
            try:
                async with asyncio.timeout(limit_s):
                    await run.wait()
            except TimeoutError:
                if then is not None:
                    then()
            else:
                return
