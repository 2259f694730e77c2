"""Notification hooks (R10): advisory, one at a time, and no change of role waits for them.

Owns one bounded queue and the run at its head. A failure is only logged and counted.
"""

import asyncio
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from agent.drivers.hooks.payload import payload_environment
from agent.drivers.hooks.runner import HookRun, HookRunner
from agent.drivers.hooks.spec import HookSpec
from agent.ops.logs import Log
from agent.ops.tasks import start_task

QUEUE_LIMIT = 16
"""Bound of the queue: hours of an ordinary group's changes. A hook that hangs fills it; then the oldest
are dropped."""

GRACE_S = 1.0
"""Time between TERM and KILL of a hook at its limit."""

KILLED_S = 1.0
"""How long to wait for a killed hook; in uninterruptible sleep it does not end."""

log = Log(__name__)


class Notifier:
    """Runs the hooks of ``joined``, ``lost`` and ``left``.

    Args:
        runner: starts the hooks.
        specs: the hooks by event; an event without a hook is ignored.
        limit_s: how long each may take.

    Attributes:
        dropped: number of notifications that never ran, or were killed at the exit of the agent.
        failed: number of notifications that failed.
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

    def put(self, event: str, payload: Mapping[str, Any]) -> None:
        """Queue the hook of ``event``. Never waits."""
        spec = self.specs.get(event)
        if spec is None:
            return
        if len(self._waiting) >= QUEUE_LIMIT:
            oldest, _ = self._waiting.popleft()
            self._drop(oldest.name, "the queue is full")
        self._waiting.append((spec, payload))
        if self._working is None or self._working.done():
            self._working = start_task(self._work())

    async def drain(self, timeout_s: float) -> None:
        """Run the queued hooks, for ``timeout_s`` seconds at most, and drop the rest. Used at the exit."""
        if self._working is None:
            return
        await asyncio.wait({self._working}, timeout=timeout_s)
        self._working.cancel()
        await asyncio.gather(self._working, return_exceptions=True)
        for spec, _ in self._waiting:
            self._drop(spec.name, "the agent exits")
        self._waiting.clear()

    def _drop(self, name: str, reason: str) -> None:
        self.dropped += 1
        log.warning("notification dropped", hook=name, reason=reason, dropped=self.dropped)

    async def _work(self) -> None:
        while self._waiting:
            spec, payload = self._waiting.popleft()
            run = self._runner.start(spec, payload_environment(payload), payload)
            log.info("hook started", hook=run.name, epoch=payload.get("epoch"))
            try:
                await self._wait_with_limit(run)
            except asyncio.CancelledError:
                self._drop(run.name, "the agent exits")
                run.kill()
                with suppress(TimeoutError):
                    async with asyncio.timeout(KILLED_S):
                        await run.wait()
                        self._runner.release(run)
                raise
            result = await run.wait() if run.ended else None
            if result is not None and result.ok:
                log.info("hook ended", hook=run.name, result=result.why, seconds=result.duration_s)
            else:
                self.failed += 1
                why = result.why if result is not None else "it does not end, even after KILL"
                log.warning("notification failed", hook=run.name, reason=why, failed=self.failed)
            if run.ended:
                self._runner.release(run)  # this run is never signalled again

    async def _wait_with_limit(self, run: HookRun) -> None:
        for limit_s, then in ((self.limit_s, run.term), (GRACE_S, run.kill), (KILLED_S, None)):
            try:
                async with asyncio.timeout(limit_s):
                    await run.wait()
            except TimeoutError:
                if then is not None:
                    then()
            else:
                return
