"""One run of a hook: its steps one after the other, and what follows of each.

Owns the order of steps, their repetition, and the process groups that a run has made. Knows nothing
of limits and of why a hook runs: the caller limits a run by ``term``, then ``kill``.
"""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agent.drivers.hooks.process import HookExit, HookProcess
from agent.drivers.hooks.spec import Command, HookSpec, Post, Step
from agent.errors import ConfigError
from agent.ops.blocking import BlockingThread, StuckError
from agent.ops.clock import Clock
from agent.ops.process import Child

if TYPE_CHECKING:
    from agent.drivers.hooks.webhook import Webhook

KEPT = 16
"""Ended runs whose groups can still be signalled: a tenure's promotions, and all tries to demote
within one budget. Each step of one keeps one process number in use."""

RETRY_PAUSE_S = 0.5
"""Before a failed step is tried again: a service needs a moment, and this is no fork loop."""


class HookRun:
    """One run. Made by ``HookRunner.start``; ``wait`` tells how it ended.

    Attributes:
        name: the event.
    """

    def __init__(
        self,
        spec: HookSpec,
        clock: Clock,
        env: Mapping[str, str],
        facts: Mapping[str, Any],
        *,
        launched: Callable[[], None] | None,
        cgroup: Path | None,
    ) -> None:
        self.name = spec.name
        self._launched = launched
        self._cgroup = cgroup
        self._spec = spec
        self._clock = clock
        self._env = env
        self._facts = facts
        self._started_at = clock.boottime()
        self._loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[HookExit] = self._loop.create_future()
        self._running: HookProcess | Webhook | None = None
        self._made: list[HookProcess | Webhook] = []
        self._begun = asyncio.Event()
        self._stop = asyncio.Event()
        self._cut_bytes = 0
        self._task: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        """The process of the step that runs; None between steps, for a webhook, and at the end."""
        return self._running.pid if self._running is not None else None

    @property
    def pgids(self) -> tuple[int, ...]:
        """The process groups of all its steps, in which something may live; none once forgotten."""
        return tuple(step.pgid for step in self._made if step.pgid is not None)

    @property
    def ended(self) -> bool:
        """Whether all steps have ended that will be started."""
        return self._ended.done()

    @property
    def children(self) -> tuple[Child, ...]:
        """The commands of all its steps."""
        made = (step.child for step in self._made if isinstance(step, HookProcess))
        return tuple(child for child in made if child is not None)

    async def launched(self) -> None:
        """Wait until the first step runs, or has ended."""
        await self._begun.wait()
        for child in self.children[:1]:
            await child.launched()

    async def wait(self) -> HookExit:
        """Wait for the last step, not for what was left behind. May be called repeatedly."""
        return await asyncio.shield(self._ended)

    def term(self) -> None:
        """SIGTERM to the group of the running step; no further step starts."""
        self._stop.set()
        if self._running is not None:
            self._running.term()

    def kill(self) -> None:
        """SIGKILL to the groups of all steps of this run; no further step starts."""
        self._stop.set()
        for step in self._made:
            step.kill()

    def forget(self) -> None:
        """Give an ended run's process numbers back; its groups are never signalled again."""
        assert self.ended, "a running hook is not forgotten"  # noqa: S101 - our own mistake
        for step in self._made:
            step.forget()
        self._made.clear()

    def start(self) -> None:
        """Once, by ``HookRunner.start``."""
        self._task = self._loop.create_task(self._go())

    async def _go(self) -> None:
        try:
            steps = await self._steps()
        except (ConfigError, OSError, StuckError) as error:
            self._finish(HookExit(None, None, 0.0, error=str(error)))
            return
        failed: HookExit | None = None
        result = HookExit(0, None, 0.0)
        for step in steps:
            if self._stop.is_set():
                result = HookExit(None, None, 0.0, error="stopped before it", step=step.name)
                break
            result = await self._end_of(step)
            if not result.ok and not self._spec.all_steps:
                break
            failed = failed or (None if result.ok else result)
        self._finish(failed or result)

    async def _steps(self) -> tuple[Step, ...]:
        """Read the steps off the loop: the directory may be on a disk that hangs.

        Raises:
            ConfigError: there are none.
            StuckError: it was stopped meanwhile.
        """
        reading = self._loop.create_task(BlockingThread(f"hook {self.name}").run(self._spec.steps))
        stopping = self._loop.create_task(self._stop.wait())
        await asyncio.wait({reading, stopping}, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if not reading.done():
            reading.cancel()
            raise StuckError("stopped before its first step")
        return reading.result()

    async def _end_of(self, step: Step) -> HookExit:
        """How one step ended, after its repetitions."""
        for again in range(self._spec.retries + 1):
            self._begin(step)
            assert self._running is not None  # noqa: S101 - it was begun
            result = await self._running.wait()
            self._running = None
            self._cut_bytes += result.output_cut
            if result.ok or again == self._spec.retries or await self._stopped_within_pause():
                break
        return replace(result, step=step.name)

    async def _stopped_within_pause(self) -> bool:
        try:
            async with asyncio.timeout(RETRY_PAUSE_S):
                await self._stop.wait()
        except TimeoutError:
            return False
        return True

    def _begin(self, step: Step) -> None:
        env, facts = self._now()
        epoch = env.get("FAILOVER_EPOCH", "")
        match step:
            case Command():
                process = HookProcess(self.name, self._clock, epoch, self._spec.around)
                self._running = process
                self._made.append(process)
                process.start(
                    step.argv,
                    env,
                    facts,
                    lambda: self._spec.check_again(step),
                    launched=self._launched,
                    cgroup=self._cgroup,
                )
            case Post():
                from agent.drivers.hooks.webhook import Webhook  # noqa: PLC0415 - 0.1 s, for few

                assert self._spec.tls is not None  # noqa: S101 - a spec with a URL has one
                post = Webhook(
                    self.name,
                    step.url,
                    self._clock,
                    epoch,
                    tls=self._spec.tls,
                    secret=self._spec.secret,
                )
                self._running = post
                self._made.append(post)
                post.start(facts)
        self._begun.set()

    def _now(self) -> tuple[dict[str, str], dict[str, Any]]:
        """The facts, with what is left of the time for the step that starts now."""
        env, facts = dict(self._env), dict(self._facts)
        if isinstance(deadline_ms := facts.get("deadline_ms"), int):
            spent_ms = round((self._clock.boottime() - self._started_at) * 1000)
            facts["deadline_ms"] = max(0, deadline_ms - spent_ms)
            env["FAILOVER_DEADLINE_MS"] = str(facts["deadline_ms"])
        return env, facts

    def _finish(self, result: HookExit) -> None:
        duration_s = self._clock.boottime() - self._started_at
        self._begun.set()
        self._ended.set_result(replace(result, duration_s=duration_s, output_cut=self._cut_bytes))


class HookRunner:
    """Starts hooks, and sees to it that not too many ended ones are kept."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._runs: list[HookRun] = []

    def start(
        self,
        spec: HookSpec,
        env: Mapping[str, str],
        facts: Mapping[str, Any],
        *,
        launched: Callable[[], None] | None = None,
        cgroup: Path | None = None,
    ) -> HookRun:
        """Start a hook. Does not wait for it, and does not raise. Must be called inside the loop.

        A hook that cannot be started has ended, with ``HookExit.error``. The caller limits
        its time: by ``term``, then ``kill``.

        Args:
            spec: which one; ``HookSpec.check`` has passed it, and a directory is read anew.
            env: ``environment_of(facts)``; FAILOVER_EPOCH goes into the log with the output.
            facts: ``facts_of(...)``, for stdin; the time left is corrected for later steps.
            launched: called whenever a step that is a process has been started.
            cgroup: the directory of a cgroup to put its processes into, if that can be made.
        """
        ended = [run for run in self._runs if run.ended]
        for run in ended[:-KEPT]:
            self.forget(run)
        run = HookRun(spec, self._clock, env, facts, launched=launched, cgroup=cgroup)
        self._runs.append(run)
        run.start()
        return run

    def forget(self, run: HookRun) -> None:
        """Give one ended run's process numbers back: nothing that it left behind is of interest."""
        run.forget()
        self._runs.remove(run)

    def close(self) -> None:
        """Forget every run that has ended, before the loop closes. One that goes on does so alone."""
        for run in [run for run in self._runs if run.ended]:
            self.forget(run)
