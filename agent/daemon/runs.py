"""What the daemon runs on this host at a change of role: hooks, and the workload of ``exec``.

Owns the runs that the session asked for, by their number. A promotion runs the hook and then starts
the workload; a demotion stops the workload, and then runs the hook. When a run starts, gets TERM and
KILL is the session's decision (R7, R8).
"""

import asyncio
import signal
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from agent import proctree
from agent.core.effects import HookFacts
from agent.core.events import HookEnded
from agent.daemon.fence import run_fence
from agent.daemon.payload import EVENTS, Payloads
from agent.daemon.tenure import Tenure, kill_rest, note_limits
from agent.daemon.vitals import Tally
from agent.drivers.guardian import GuardHook
from agent.drivers.hooks import (
    PROMOTIONS,
    HookRun,
    HookRunner,
    HookSpec,
    Notifier,
    load_specs,
    payload_environment,
)
from agent.drivers.workload import Restart, Workload
from agent.model import Role
from agent.ops import process
from agent.ops.blocking import BlockingThread
from agent.ops.clock import Clock
from agent.ops.logs import Log
from agent.ops.process_tree import KILL_S, ProcessTree, tenure_cgroup
from agent.settings import AgentSettings

TREE_POLL_S = 0.02
"""How often the processes of a pre-empted promotion are looked for."""

LEAST_KILL_S = 0.2
"""For the killing after a demotion hook that has used up its time: it takes milliseconds."""

WORKLOAD_SHARE = 0.5
"""Share of a demotion's time in which the workload may end by itself; the hook has the rest."""

log = Log(__name__)


@dataclass
class _Run:
    """One run under way."""

    role: Role
    tree: ProcessTree
    hook: HookRun | None = None
    termed: bool = False
    killed: bool = False


class Runs:
    """The runs of one session, inside one running loop.

    Args:
        settings: hooks and workload.
        session_id: for the payload of hooks.
        state_file: likewise.
        instance: marks the processes of this agent's tenures, to find them again.
        tally: counts hooks.
        ended: takes HookEnded.
        groups_changed: called when there is something else to be killed by the guard.
        workload_ended: called with the exit status when the workload has ended for good, or None
            when it fails again and again.

    Attributes:
        payloads: builds the payloads of hooks.
        cgroup: the directory of the cgroup of its tenures, which may not be there yet, or None.
    """

    def __init__(
        self,
        settings: AgentSettings,
        session_id: str,
        state_file: Path,
        clock: Clock,
        tally: Tally,
        *,
        instance: str,
        ended: Callable[[HookEnded], None],
        groups_changed: Callable[[], None],
        workload_ended: Callable[[int | None], None],
    ) -> None:
        self.payloads = Payloads(settings.group, session_id, state_file, clock)
        self._settings = settings
        self._clock = clock
        self._tally = tally
        self._ended = ended
        self._groups_changed = groups_changed
        self._runner = HookRunner(clock)
        self._specs = load_specs(settings)
        self.notifier = Notifier(self._runner, self._specs, settings.hook_limit_of("joined"))
        self.cookie = instance
        self._runs: dict[int, _Run] = {}
        self._tenure: Tenure | None = None
        self._former: ProcessTree | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._looking: asyncio.Task[Any] | None = None
        self._orphans = process.OrphanReaper(self._look)
        self.cgroup = tenure_cgroup(instance)
        self.workload: Workload | None = None
        if settings.workload:
            self.workload = Workload(
                settings.workload,
                clock,
                Restart(settings.workload_restart),
                workload_ended,
                cgroup=self.cgroup / "workload" if self.cgroup is not None else None,
                mark=f"{instance}.workload",
            )
        if self.workload is not None or set(PROMOTIONS) & set(self._specs):
            note_limits(self.cgroup)

    @property
    def demotion(self) -> HookSpec | None:
        """The demotion hook: of the tenure, else as configured."""
        if self._tenure is not None:
            return self._tenure.demotion
        return self._specs.get(EVENTS[Role.SECONDARY])

    @property
    def roles(self) -> frozenset[Role]:
        """The roles for which there is something to run, or to tell the guard at a promotion.

        Whatever a promotion starts, a demotion has to end, with a hook of its own or without.
        """
        hooked = {role for role, event in EVENTS.items() if event in self._specs}
        if self._tenure is not None:
            hooked.add(Role.SECONDARY)
        both = {Role.PRIMARY, Role.SECONDARY} if self.workload is not None or hooked else set()
        return frozenset(hooked | both)

    @staticmethod
    def read_hooks(settings: AgentSettings) -> Mapping[str, HookSpec]:
        """The hooks of other settings, checked. May block.

        Raises:
            ConfigError: they cannot be used.
        """
        specs = load_specs(settings)
        for spec in specs.values():
            spec.check()
        return specs

    def reconfigure(self, settings: AgentSettings, specs: Mapping[str, HookSpec]) -> None:
        """Use other hooks, of ``read_hooks``, from the next tenure on."""
        self._specs, self._settings = specs, settings
        self.notifier.specs = specs
        self.notifier.limit_s = settings.hook_limit_of("joined")

    @property
    def running_groups(self) -> tuple[int, ...]:
        """Process groups of the hooks that run."""
        hooks = [run.hook for run in self._runs.values() if run.hook is not None]
        return tuple(pgid for hook in hooks for pgid in hook.pgids)

    @property
    def tenure_groups(self) -> tuple[int, ...]:
        """Process groups of the promotion hooks of this tenure, in which something may live."""
        return self._tenure.groups if self._tenure is not None else ()

    @property
    def tenure_roots(self) -> tuple[proctree.Process, ...]:
        """Known processes of this tenure, by process id and start time."""
        roots = set(self._tenure.roots) if self._tenure is not None else set()
        if self.workload is not None and self.workload.identity is not None:
            roots.add(self.workload.identity)
        return tuple(sorted(roots))

    async def end_former_life(self, instance: str) -> None:
        """Kill what an earlier agent, which died together with its guard, has left of its tenure.

        While something of it lives that cannot be killed, the first demotion fails.
        """
        self._former = ProcessTree(instance, since=0)
        self._former.cgroup = tenure_cgroup(instance)
        left = await self._former.kill()
        if left is not None:
            log.error("processes of an earlier run are left", reason=left)

    def begin(
        self, number: int, facts: HookFacts, last_data: datetime | None
    ) -> Coroutine[Any, Any, None]:
        """One whole run, to be awaited in a task; tells HookEnded. It can be stopped from now on."""
        run = self._runs[number] = _Run(facts.role, ProcessTree(f"{self.cookie}.{number}"))
        if facts.role is not Role.SECONDARY and self._tenure is None:
            spec = self._specs.get(EVENTS[Role.SECONDARY])
            self._tenure = Tenure(self.cookie, spec, self.cgroup)
        return self._whole(number, run, facts, self.payloads.of_role(facts, last_data))

    async def _whole(self, number: int, run: _Run, facts: HookFacts, told: dict[str, Any]) -> None:
        try:
            if facts.role is Role.SECONDARY:
                ok, why = await self._demote(run, facts, told)
            else:
                ok, why = await self._promote(run, facts.role, told)
        finally:
            del self._runs[number]
        self._ended(HookEnded(number, ok, why))

    def term(self, number: int) -> None:
        """TERM to what runs; nothing further of this run starts."""
        run = self._runs.get(number)
        if run is None:
            return
        run.termed = True
        if run.hook is not None:
            run.hook.term()
            if run.role is not Role.SECONDARY:
                self._start(run.tree.signal(signal.SIGTERM))
        elif run.role is Role.SECONDARY and self.workload is not None:
            self.workload.kill()  # TERM was the beginning of its stop

    def kill(self, number: int) -> None:
        """KILL to what runs, with all that a promotion has started."""
        run = self._runs.get(number)
        if run is None:
            return
        run.termed = run.killed = True
        if run.hook is not None:
            run.hook.kill()
            if run.role is not Role.SECONDARY:
                self._start(run.tree.kill())
        elif self.workload is not None:
            self.workload.kill()

    def kill_all(self) -> set[asyncio.Task[Any]]:
        """R4's escalation: KILL to all of this tenure, and to the demotion hook; what is under way."""
        for run in self._runs.values():
            if run.hook is not None:
                run.hook.kill()
        if self.workload is not None:
            self.workload.kill()
        if self._tenure is not None:
            self._tenure.kill_groups()
            self._start(self._tenure.kill())
        return set(self._tasks)

    def _start(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _look(self) -> None:
        """Follow the tenure's processes while their parents live, and have the guard know of them."""
        if self._tenure is not None and (self._looking is None or self._looking.done()):
            self._looking = self._start(self._look_at(self._tenure))

    async def _look_at(self, tenure: Tenure) -> None:
        before = tenure.roots
        await tenure.look()
        if tenure.roots != before and tenure is self._tenure:
            self._groups_changed()

    async def fence(self) -> None:
        """R4's escalation: wait for the killing, then run the fence command, if there is one.

        The killing takes moments, the command at most the hooks' limit. Without a command a guard allows
        no time for either: it does the killing itself as soon as the agent has ended.
        """
        if self._tasks and (self._settings.fence_command or not self._settings.guard):
            await asyncio.wait(self._tasks, timeout=KILL_S)
        await run_fence(self._settings, self._runner, self.payloads)

    def close(self) -> None:
        """Give the hooks' process ids back."""
        self._orphans.close()
        self._runner.close()

    # -- a change of role -----------------------------------------------------------------------

    async def _promote(self, run: _Run, role: Role, payload: dict[str, Any]) -> tuple[bool, str]:
        ok, why = await self._hook(run, role, self._specs.get(EVENTS[role]), payload)
        if ok and role is Role.PRIMARY and self.workload is not None and not run.termed:
            fault = await self.workload.start(payload_environment(payload))
            self._groups_changed()
            ok, why = fault is None, fault or "workload started"
        if run.termed:  # also if it ended well: what it has started got TERM as well
            await self._until_gone(run)
            return False, "terminated" if ok else why
        return ok, why

    async def _until_gone(self, run: _Run) -> None:
        """Wait until nothing lives that a pre-empted promotion has started.

        It was sent TERM; KILL comes from the session when the grace is over.
        """
        while not await run.tree.gone():
            if run.killed:
                await run.tree.kill()
            await asyncio.sleep(TREE_POLL_S)

    async def _demote(
        self, run: _Run, facts: HookFacts, payload: dict[str, Any]
    ) -> tuple[bool, str]:
        kill_by = self._clock.boottime() + facts.limit_s
        tenure = self._tenure
        if tenure is not None:
            await tenure.look()  # before parents end
        if self.workload is not None:
            loop = asyncio.get_running_loop()
            killing = loop.call_later(WORKLOAD_SHARE * facts.limit_s, self.workload.kill)
            try:
                await self.workload.stop()
            finally:
                killing.cancel()
        if tenure is not None:
            tenure.begin_demotion()
        ok, why = await self._hook(run, Role.SECONDARY, self.demotion, payload)
        if ok:
            # Not before the hook: it may stop in order what a promotion hook has left to run.
            limit_s = max(LEAST_KILL_S, kill_by - self._clock.boottime())
            left = await kill_rest(self._tenure, self._former, limit_s=limit_s)
            if left is not None:
                return False, left
            self._tenure = self._former = None
        return ok, why

    async def _hook(
        self, run: _Run, role: Role, spec: HookSpec | None, payload: dict[str, Any]
    ) -> tuple[bool, str]:
        if spec is None:
            return True, "no hook"
        if run.termed:
            return False, "terminated"
        environment, cgroup = payload_environment(payload), None
        if role is not Role.SECONDARY:
            environment |= process.mark(run.tree.value)
            cgroup = self.cgroup / "hooks" if self.cgroup is not None else None
        run.hook = hook = self._runner.start(
            spec,
            environment,
            payload,
            launched=lambda: self._note_processes(run, hook),
            cgroup=cgroup,
        )
        await hook.launched()
        log.info("hook started", hook=spec.name, pid=hook.pid, epoch=payload["epoch"])
        self._note_processes(run, hook)
        ended = await hook.wait()
        run.hook = None
        self._note_processes(run, hook)
        self._tally.hook_ended(spec.name, ended.duration_s, ok=ended.ok)
        say = log.info if ended.ok else log.warning
        say("hook ended", hook=spec.name, result=ended.why, seconds=ended.duration_s)
        if role is not Role.SECONDARY:
            self._look()  # for what it has left behind
        return ended.ok, ended.why

    def _note_processes(self, run: _Run, hook: HookRun) -> None:
        """Count what a promotion hook has started to the tenure; the guard hears of all groups."""
        if run.role is not Role.SECONDARY and self._tenure is not None:
            self._tenure.add(hook)
            for child in hook.children:
                run.tree.add(child)
        self._groups_changed()

    # -- the guard and notifications ---------------------------------------------------------------

    async def guard_hook(self, promotion: HookFacts, limit_s: float) -> GuardHook:
        """The demotion of the tenure that a promotion begins, as the guard would run it."""
        spec, lane = self.demotion, BlockingThread("demotion hook of the guard")
        return await lane.run(lambda: self.payloads.of_guard(spec, promotion, limit_s))

    def notify(
        self,
        event: str,
        *,
        old_role: Role,
        new_role: Role,
        epoch: int | None,
        reason: str,
        last_data: datetime | None,
        previous_primary: str | None,
    ) -> None:
        """Run an advisory hook apart from everything else (R10)."""
        facts = self.payloads.build(
            event=event,
            old_role=old_role,
            new_role=new_role,
            epoch=epoch,
            reason=reason,
            last_data=last_data,
            deadline_s=self.notifier.limit_s,
            previous_primary=previous_primary,
        )
        self.notifier.put(event, facts)
