"""Run the hooks of a role change, and the workload of ``exec``, on this host.

Owns the runs that the session has requested, by their number. A promotion runs the hook and then starts
the workload; a demotion stops the workload and then runs the hook. The session decides when a run
starts, and when it gets TERM and KILL (R7, R8).
"""

import asyncio
import signal
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from agent import proctree
from agent.core.effects import HookFacts
from agent.core.events import HookEnded
from agent.daemon.fence import run_fence
from agent.daemon.payload import EVENTS, Payloads
from agent.daemon.telemetry import Stats
from agent.daemon.tenure_processes import (
    CHECK_S,
    PreviousProcesses,
    TenureProcesses,
    kill_remaining,
    log_tracking_limits,
)
from agent.drivers.guardian.messages import GuardHook
from agent.drivers.hooks.notifier import Notifier
from agent.drivers.hooks.payload import payload_environment
from agent.drivers.hooks.runner import HookRun, HookRunner
from agent.drivers.hooks.spec import PROMOTIONS, HookSpec, load_specs
from agent.drivers.workload import Restart, Workload
from agent.model import Role
from agent.ops import process, reserve
from agent.ops.blocking import BlockingThread
from agent.ops.clock import Clock
from agent.ops.logs import Log
from agent.ops.process_tree import KILL_S, SEARCH_S, SEARCH_SHARE, ProcessTree, tenure_cgroup
from agent.ops.tasks import start_task
from agent.schema.settings import AgentSettings

TREE_POLL_S = 0.02
"""Poll interval for the processes of a pre-empted promotion."""

LEAST_KILL_S = 0.2
"""Minimum time to kill the rest after a demotion hook; it takes milliseconds."""

KILL_FIRST = "killing the processes of the tenure, which may have used them up"

Payload: TypeAlias = dict[str, Any]
Outcome: TypeAlias = tuple[bool, str]  # ok, and why

log = Log(__name__)


@dataclass
class _Run:
    """A run that has not ended."""

    role: Role
    tree: ProcessTree
    hook: HookRun | None = None
    terminated: bool = False
    killed: bool = False


class RoleRunner:
    """Runs the hooks and the workload of one session, inside one running loop.

    Args:
        settings: hooks and workload.
        session_id: for the payload of hooks.
        state_file: likewise.
        instance: part of the mark of this agent's processes, to find them again.
        stats: counts hooks.
        on_ended: receives HookEnded.
        on_groups_changed: called when the processes that the guard has to kill have changed.
        on_workload_ended: called with the exit status when the workload has ended for good, or None
            when it fails again and again.

    Attributes:
        payloads: builds the payloads of hooks.
        cgroup: the directory of its tenures' cgroup, which may not exist yet, or None.
        demotion_hook_started: whether the demotion hook of the tenure was started, or there is none.
        leftover: the processes that previous agents have left, until the first demotion has ended them.
    """

    def __init__(
        self,
        settings: AgentSettings,
        session_id: str,
        state_file: Path,
        clock: Clock,
        stats: Stats,
        *,
        instance: str,
        on_ended: Callable[[HookEnded], None],
        on_groups_changed: Callable[[], None],
        on_workload_ended: Callable[[int | None], None],
    ) -> None:
        self.payloads = Payloads(settings.group, session_id, state_file, clock)
        self._settings = settings
        self._clock = clock
        self._stats = stats
        self._on_ended = on_ended
        self._on_groups_changed = on_groups_changed
        self._runner = HookRunner(clock)
        self._specs = self._first_specs = load_specs(settings)
        self.notifier = Notifier(self._runner, self._specs, settings.hook_limit_of("joined"))
        self.leftover = PreviousProcesses(settings.group, session_id, str(state_file))
        self.process_mark = f"{self.leftover.mark}.{instance}"
        self.demotion_hook_started = False
        self._runs: dict[int, _Run] = {}
        self._tenure: TenureProcesses | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._tracking: asyncio.Task[Any] | None = None
        self._quiet_searches = 0
        self._orphans = process.OrphanReaper(self._track_processes)
        self.cgroup = tenure_cgroup(self.leftover.mark)
        self.workload: Workload | None = None
        if settings.workload:
            self.workload = Workload(
                settings.workload,
                clock,
                Restart(settings.workload_restart),
                on_workload_ended,
                changed=on_groups_changed,
                cgroup=self.cgroup / "workload" if self.cgroup is not None else None,
                mark=f"{self.process_mark}.workload",
            )
        if self.workload is not None or set(PROMOTIONS) & set(self._specs):
            log_tracking_limits(self.cgroup)

    @property
    def demotion_hook(self) -> HookSpec | None:
        """The tenure's demotion hook, or else the start's until the first demotion has succeeded, or the configured one."""
        if self._tenure is not None:
            return self._tenure.demotion_hook
        return (self._first_specs if self.leftover.trees else self._specs).get("secondary")

    @property
    def roles(self) -> frozenset[Role]:
        """The roles that have a run, or that the guard has to know.

        A demotion has to end what a promotion starts, so it has a run even without a hook.
        """
        hooked = {role for role, event in EVENTS.items() if event in self._specs}
        if self._tenure is not None or self.demotion_hook is not None:
            hooked.add(Role.SECONDARY)
        both = {Role.PRIMARY, Role.SECONDARY} if self.workload is not None or hooked else set()
        return frozenset(hooked | both)

    def reconfigure(self, settings: AgentSettings, specs: Mapping[str, HookSpec]) -> None:
        """Replace the hooks by those of ``read_hooks`` (reload.py), from the next tenure on. The first demotion keeps its hook."""
        self._first_specs = self._first_specs if self.roles else specs
        self._specs, self._settings = specs, settings
        self.notifier.specs = specs
        self.notifier.limit_s = settings.hook_limit_of("joined")

    @property
    def running_groups(self) -> tuple[int, ...]:
        """Process groups of the running hooks."""
        hooks = [run.hook for run in self._runs.values() if run.hook is not None]
        return tuple(pgid for hook in hooks for pgid in hook.pgids)

    @property
    def tenure_groups(self) -> tuple[int, ...]:
        """Process groups of this tenure's promotion hooks, in which processes may be alive."""
        return self._tenure.groups if self._tenure is not None else ()

    @property
    def tenure_roots(self) -> tuple[proctree.Process, ...]:
        """Known processes of this tenure, by process id and start time."""
        roots = set(self._tenure.roots) if self._tenure is not None else set()
        if self.workload is not None and self.workload.identity is not None:
            roots.add(self.workload.identity)
        return tuple(sorted(roots))

    @property
    def known_processes(self) -> tuple[proctree.Process, ...]:
        """The processes that this member's next process has to end if this process and its guard are killed."""
        return tuple(sorted({*self.tenure_roots, *self.leftover.roots}))

    def start_run(
        self, number: int, facts: HookFacts, last_data: datetime | None
    ) -> Coroutine[Any, Any, bool]:
        """Register a run, so that it can be terminated; return its coroutine, which posts HookEnded and returns ``ok``."""
        run = _Run(facts.role, ProcessTree(f"{self.process_mark}.{number}"))
        if facts.role is not Role.SECONDARY and self._tenure is None:
            spec = self._specs.get(EVENTS[Role.SECONDARY])
            self._tenure = TenureProcesses(self.process_mark, spec, self.cgroup)
            self.demotion_hook_started = spec is None
            self._reserve_descriptors()
            self.leftover.forget()  # the first demotion has succeeded, with or without a hook
        if facts.role is Role.SECONDARY:
            reserve.free_descriptors()
        payload = self.payloads.build_role_payload(facts, last_data)
        self._runs[number] = run
        return self._execute(number, run, facts, payload)

    @staticmethod
    def _reserve_descriptors() -> None:
        try:
            reserve.reserve_descriptors()
        except OSError as error:
            log.warning("too few descriptors for a demotion are left", reason=error.strerror)

    async def _execute(self, number: int, run: _Run, facts: HookFacts, payload: Payload) -> bool:
        try:
            if facts.role is Role.SECONDARY:
                ok, why = await self._demote(run, facts, payload)
            else:
                ok, why = await self._promote(run, facts.role, payload)
        finally:
            del self._runs[number]
        self._on_ended(HookEnded(number, ok, why))
        return ok

    def terminate(self, number: int) -> None:
        """Send TERM to the processes of a run, which then starts no further ones."""
        if (run := self._runs.get(number)) is None:
            return
        run.terminated = True
        if run.hook is not None:
            run.hook.term()
            if run.role is not Role.SECONDARY:
                self._start_task(run.tree.signal(signal.SIGTERM))
        elif run.role is Role.SECONDARY and self.workload is not None:
            self.workload.kill()  # it got TERM when its stop began

    def kill(self, number: int) -> None:
        """Send SIGKILL to the processes of a run, and to all that a promotion has started."""
        if (run := self._runs.get(number)) is None:
            return
        run.terminated = run.killed = True
        if run.hook is not None:
            run.hook.kill()
            if run.role is not Role.SECONDARY:
                self._start_task(run.tree.kill())
        elif self.workload is not None:
            self.workload.kill()

    async def end_runs(self, limit_s: float) -> None:
        """Kill every run, and wait for their ends up to ``limit_s``: two runs never have hooks at once."""
        for number in tuple(self._runs):
            self.kill(number)
        end_at = self._clock.boottime() + limit_s
        while self._runs and self._clock.boottime() < end_at:  # noqa: ASYNC110 - a moment, and rare
            await asyncio.sleep(TREE_POLL_S)

    def kill_all(self, *, hooks: bool = True) -> set[asyncio.Task[Any]]:
        """Send KILL to the whole tenure (R4), and to running ``hooks``; return the tasks that do it."""
        for run in self._runs.values():
            if hooks and run.hook is not None:
                run.hook.kill()
        if self.workload is not None:
            self.workload.kill()
        if self._tenure is not None:
            self._tenure.kill_groups()
            self._start_task(self._tenure.kill())
        return set(self._tasks)

    def _start_task(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = start_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _track_processes(self) -> None:
        """Track the tenure's processes while their parents live, and report them to the guard.

        Not after several searches in a row have found none: then only a new hook of the agent can start further ones.
        """
        none_left = self._quiet_searches >= proctree.QUIET_SEARCHES and self.workload is None
        idle = self._tracking is None or self._tracking.done()
        if self._tenure is not None and idle and not none_left:
            self._tracking = self._start_task(self._track_processes_of(self._tenure))

    async def _track_processes_of(self, tenure: TenureProcesses) -> None:
        before = tenure.roots
        none_left = await tenure.track_processes()
        self._quiet_searches = self._quiet_searches + 1 if none_left else 0
        if tenure.roots != before and tenure is self._tenure:
            self._on_groups_changed()

    async def run_fence_command(self) -> None:
        """Escalate (R4): wait for the KILL, then run the fence command, if there is one.

        The KILL takes moments, the command at most the hooks' limit. Without a command the agent does
        not wait if it has a guard, which kills as soon as the agent has exited.
        """
        if self._tasks and (self._settings.fence_command or not self._settings.guard):
            await asyncio.wait(self._tasks, timeout=KILL_S)
        await run_fence(self._settings, self._runner, self.payloads)

    def close(self) -> None:
        """Release the handles of the hooks' processes."""
        reserve.free_descriptors()
        self._orphans.close()
        self._runner.close()

    # -- a change of role -----------------------------------------------------------------------

    async def _promote(self, run: _Run, role: Role, payload: Payload) -> Outcome:
        if self._tenure is not None and (fault := await self._tenure.prepare_demotion_hook()):
            return False, fault
        ok, why = await self._run_hook(run, role, self._specs.get(EVENTS[role]), payload)
        if ok and role is Role.PRIMARY and self.workload is not None and not run.terminated:
            fault = await self.workload.start(payload_environment(payload))
            ok, why = fault is None, fault or "workload started"
        if run.terminated:  # TERM also went to the processes it started, so even a success counts as a failed promotion
            await self._wait_until_gone(run)
            return False, "terminated" if ok else why
        return ok, why

    async def _wait_until_gone(self, run: _Run) -> None:
        """Wait until every process of a terminated promotion is gone; the session decides on KILL."""
        while not await run.tree.gone():
            if run.killed:
                await run.tree.kill()
            await asyncio.sleep(TREE_POLL_S)

    async def _demote(self, run: _Run, facts: HookFacts, payload: Payload) -> Outcome:
        kill_by = self._clock.boottime() + facts.limit_s
        if (tenure := self._tenure) is not None:  # an orphan may not be found any more
            await tenure.track_processes(min(SEARCH_S, SEARCH_SHARE * facts.limit_s))
        stopped = self.workload is None or await self.workload.stop_within(facts.limit_s)
        if tenure is not None:
            tenure.stop_adopting()
            if reserve.tasks_are_scarce():
                log.warning("no tasks left for the demotion hook", action=KILL_FIRST)
                limit_s = max(LEAST_KILL_S, (kill_by - self._clock.boottime()) / 2)
                await asyncio.wait({self._start_task(tenure.kill(limit_s))}, timeout=limit_s)
        ok, why = await self._run_hook(run, Role.SECONDARY, self.demotion_hook, payload)
        # Not before the hook, which may shut processes of the tenure down in order. Also after a hook that
        # failed: it may have lacked resources that the tenure used, and will be run again.
        limit_s = max(LEAST_KILL_S, kill_by - self._clock.boottime()) if ok else LEAST_KILL_S
        left = await kill_remaining(self._tenure, self.leftover, limit_s=limit_s)
        if left is not None:
            return False, left if ok else f"{why}; {left}"
        if not stopped:
            return False, "the workload was not stopped in time"
        if ok:
            self._tenure = None
            self.leftover.forget()
        return ok, why

    async def _run_hook(
        self, run: _Run, role: Role, spec: HookSpec | None, payload: Payload
    ) -> Outcome:
        if spec is None:
            return True, "no hook"
        if run.terminated:
            return False, "terminated"
        environment, cgroup = payload_environment(payload), None
        if role is not Role.SECONDARY:
            environment |= process.mark(run.tree.value)
            cgroup = self.cgroup / "hooks" if self.cgroup is not None else None
        run.hook = hook = self._runner.start(
            spec,
            environment,
            payload,
            on_forked=lambda: self._record_processes(run, hook),  # an exec may hang
            cgroup=cgroup,
        )
        await hook.launched()
        log.info("hook started", hook=spec.name, pid=hook.pid, epoch=payload["epoch"])
        self._record_processes(run, hook)
        result = await hook.wait()
        run.hook = None
        self._record_processes(run, hook)
        self._stats.record_hook(spec.name, result.duration_s, ok=result.ok)
        write = log.info if result.ok else log.warning
        write("hook ended", hook=spec.name, result=result.why, seconds=result.duration_s)
        if role is not Role.SECONDARY:
            self._track_processes()  # the processes that the hook has left running
        return result.ok, result.why

    def _record_processes(self, run: _Run, hook: HookRun) -> None:
        """Add the processes of a promotion hook to the tenure; report all to the guard."""
        if run.role is Role.SECONDARY:
            self.demotion_hook_started = True
        elif self._tenure is not None:
            self._quiet_searches = 0
            self._tenure.add(hook)
            for child in hook.children:
                run.tree.add(child)
        self._on_groups_changed()

    # -- the guard ----------------------------------------------------------------------------------

    async def build_guard_hook(self, promotion: HookFacts) -> GuardHook:
        """Build the demotion hook that the guard runs for the tenure. Raises TimeoutError, StuckError."""
        if self._tenure is not None:
            await self._tenure.prepare_demotion_hook()
        build = partial(self.payloads.build_guard_hook, self.demotion_hook, promotion)
        return await BlockingThread("demotion hook of the guard").run(build, timeout_s=CHECK_S)
