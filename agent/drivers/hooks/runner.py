"""Run the steps of a hook, one after the other.

Owns the order of steps, their retries, and the process groups of a run. Knows nothing of time limits and of why a
hook runs: the caller enforces its limit by ``term``, then ``kill``.
"""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agent.drivers.hooks.process import VITAL, HookExit, HookProcess
from agent.drivers.hooks.spec import CommandStep, HookSpec, Step, WebhookStep
from agent.ops.blocking import BlockingThread, StuckError
from agent.ops.clock import Clock
from agent.ops.process import Child
from agent.ops.tasks import start_task

if TYPE_CHECKING:
    from agent.drivers.hooks.webhook import Webhook

KEPT_RUNS = 16
"""How many ended runs are not released: a tenure's promotions, and all attempts to demote within one budget. Each of
their steps keeps one process id in use."""

RETRY_PAUSE_S = 0.5
"""Delay before a retry: a service may need a moment, and retries must not become a fork loop."""


class HookRun:
    """One run. Made by ``HookRunner.start``; ``wait`` returns its result.

    Attributes:
        name: the event.
    """

    def __init__(
        self,
        spec: HookSpec,
        clock: Clock,
        env: Mapping[str, str],
        payload: Mapping[str, Any],
        *,
        on_forked: Callable[[], None] | None,
        cgroup: Path | None,
    ) -> None:
        self.name = spec.name
        self._on_forked = on_forked
        self._cgroup = cgroup
        self._spec = spec
        self._clock = clock
        self._env = env
        self._payload = payload
        self._started_at = clock.boottime()
        self._loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[HookExit] = self._loop.create_future()
        self._running: HookProcess | Webhook | None = None
        self._started_steps: list[HookProcess | Webhook] = []
        self._first_started = asyncio.Event()
        self._stop = asyncio.Event()
        self._cut_bytes = 0
        self._task: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        """Process id of the running step; None between steps, for a webhook, and at the end."""
        return self._running.pid if self._running is not None else None

    @property
    def pgids(self) -> tuple[int, ...]:
        """Process groups of all its steps, until ``release``; they may have live processes."""
        return tuple(step.pid for step in self._started_steps if step.pid is not None)

    @property
    def ended(self) -> bool:
        """Whether the last step has ended."""
        return self._ended.done()

    @property
    def children(self) -> tuple[Child, ...]:
        """The child processes of its steps."""
        children = (step.child for step in self._started_steps if isinstance(step, HookProcess))
        return tuple(child for child in children if child is not None)

    async def launched(self) -> None:
        """Wait until the first step runs, or has ended."""
        await self._first_started.wait()
        for child in self.children[:1]:
            await child.launched()

    async def wait(self) -> HookExit:
        """Wait for the last step, not for its descendants. May be called repeatedly."""
        return await asyncio.shield(self._ended)

    def term(self) -> None:
        """Send SIGTERM to the group of the running step; no further step starts."""
        self._stop.set()
        if self._running is not None:
            self._running.term()

    def kill(self) -> None:
        """Send SIGKILL to the groups of all steps of this run; no further step starts."""
        self._stop.set()
        for step in self._started_steps:
            step.kill()

    def release(self) -> None:
        """Reap the processes of an ended run; its groups are never signalled again."""
        assert self.ended, "a running hook is not released"  # noqa: S101 - our own mistake
        for step in self._started_steps:
            step.release()
        self._started_steps.clear()

    def start(self) -> None:
        """Start the run. Called once, by ``HookRunner.start``."""
        self._task = start_task(self._run())

    async def _run(self) -> None:
        try:
            result = await self._run_steps()
        except Exception as error:  # noqa: BLE001 - the task's edge: somebody waits for the result
            result = HookExit(None, None, 0.0, error=str(error) or type(error).__name__)
        self._finish(result)

    async def _run_steps(self) -> HookExit:
        """Run the steps. Raises ConfigError, OSError or StuckError if they cannot be read."""
        steps = await self._read_steps()
        failed: HookExit | None = None
        result = HookExit(0, None, 0.0)
        for step in steps:
            if self._stop.is_set():
                result = HookExit(None, None, 0.0, error="stopped before it", step=step.name)
                break
            result = await self._run_step(step)
            if not result.ok and not self._spec.all_steps:
                break
            failed = failed or (None if result.ok else result)
        return failed or result

    async def _read_steps(self) -> tuple[Step, ...]:
        """Read the steps in a thread: the directory may be on a dead disk.

        Raises:
            ConfigError: there are none.
            StuckError: the run was stopped meanwhile.
        """
        thread = BlockingThread(f"hook {self.name}", vital=self.name in VITAL)
        reading = self._loop.create_task(thread.run(self._spec.steps))
        stopping = self._loop.create_task(self._stop.wait())
        await asyncio.wait({reading, stopping}, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if not reading.done():
            reading.cancel()
            raise StuckError("stopped before its first step")
        return reading.result()

    async def _run_step(self, step: Step) -> HookExit:
        """Run one step, with its retries."""
        for again in range(self._spec.retries + 1):
            self._start_step(step)
            assert self._running is not None  # noqa: S101 - it was started
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

    def _start_step(self, step: Step) -> None:
        env, payload = self._current_payload()
        epoch = env.get("FAILOVER_EPOCH", "")
        match step:
            case CommandStep():
                process = HookProcess(self.name, self._clock, epoch, self._spec.context)
                self._running = process
                self._started_steps.append(process)
                process.start(
                    step.argv,
                    env,
                    payload,
                    lambda: self._spec.recheck(step),
                    on_forked=self._on_forked,
                    cgroup=self._cgroup,
                )
            case WebhookStep():
                from agent.drivers.hooks.webhook import Webhook  # noqa: PLC0415 - takes 0.1 s, and few need it

                assert self._spec.tls is not None  # noqa: S101 - a spec with a URL has one
                request = Webhook(
                    self.name,
                    step.url,
                    self._clock,
                    epoch,
                    tls=self._spec.tls,
                    secret=self._spec.secret,
                )
                self._running = request
                self._started_steps.append(request)
                request.start(payload)
        self._first_started.set()

    def _current_payload(self) -> tuple[dict[str, str], dict[str, Any]]:
        """Environment and payload for a step that starts now, with the remaining time."""
        env, payload = dict(self._env), dict(self._payload)
        if isinstance(deadline_ms := payload.get("deadline_ms"), int):
            spent_ms = round((self._clock.boottime() - self._started_at) * 1000)
            payload["deadline_ms"] = max(0, deadline_ms - spent_ms)
            env["FAILOVER_DEADLINE_MS"] = str(payload["deadline_ms"])
        return env, payload

    def _finish(self, result: HookExit) -> None:
        duration_s = self._clock.boottime() - self._started_at
        self._first_started.set()
        self._ended.set_result(replace(result, duration_s=duration_s, output_cut=self._cut_bytes))


class HookRunner:
    """Starts hooks, and releases old runs."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._runs: list[HookRun] = []

    def start(
        self,
        spec: HookSpec,
        env: Mapping[str, str],
        payload: Mapping[str, Any],
        *,
        on_forked: Callable[[], None] | None = None,
        cgroup: Path | None = None,
    ) -> HookRun:
        """Start a hook, inside the loop, without waiting.

        A hook that cannot be started does not raise: its result has ``HookExit.error``. The caller limits
        its time: by ``term``, then ``kill``.

        Args:
            spec: a hook that has passed ``HookSpec.check``; a directory is read anew.
            env: ``payload_environment(payload)``; FAILOVER_EPOCH is logged with the output.
            payload: ``build_payload(...)``, for stdin; later steps get the remaining time.
            on_forked: called when a step that is a process has its process id, before its exec is done.
            cgroup: the directory of a cgroup for its processes, if that can be created.
        """
        ended = [run for run in self._runs if run.ended]
        for run in ended[:-KEPT_RUNS]:
            self.release(run)
        run = HookRun(spec, self._clock, env, payload, on_forked=on_forked, cgroup=cgroup)
        self._runs.append(run)
        run.start()
        return run

    def release(self, run: HookRun) -> None:
        """Reap an ended run, whose processes need no further signal."""
        run.release()
        self._runs.remove(run)

    def close(self) -> None:
        """Release every ended run, before the loop closes. Running ones go on by themselves."""
        for run in [run for run in self._runs if run.ended]:
            self.release(run)
