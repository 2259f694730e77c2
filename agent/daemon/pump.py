"""The pump: one inbox, one caller of ``Session.step``, one timer.

It turns what the drivers see into events, gives them to the session one by one, and has the effects
done in their order. It decides nothing itself. It turns at least every half margin: if it was late by
more than the margin, or the host was suspended, it says Stalled before it looks at anything else
(R2). Only a pump that turns tells systemd and the watchdog device that it lives.
"""

import asyncio
import json
import os
import random
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, fields, replace
from datetime import datetime
from typing import TYPE_CHECKING, Any

from agent import __version__
from agent.core.effects import (
    SELF_DEMOTIONS,
    Effect,
    Escalate,
    Exit,
    HookFacts,
    Join,
    KillHook,
    Leave,
    Publish,
    Release,
    SendBeat,
    StartHook,
    TermHook,
)
from agent.core.events import Event, Fitness, HookEnded, Stalled, Stop, Tick
from agent.core.session import Options, Phase, Session
from agent.daemon.budget import LEFT_S, longest_stop_s
from agent.daemon.requests import Requests
from agent.daemon.runs import EVENTS, Runs
from agent.daemon.vitals import Snapshot, Tally
from agent.drivers.checks import Checks, Health
from agent.drivers.guardian import Arming, Guardian, GuardLog
from agent.drivers.progress import Plausible, Progress, Reason
from agent.drivers.rest import RestClient
from agent.drivers.statefile import StateFile
from agent.errors import ConfigError, ExitCode, FailoverError
from agent.model import Role
from agent.ops import logs
from agent.ops.clock import Clock
from agent.ops.sd_notify import Notify
from agent.ops.watchdog import WatchdogDevice
from agent.settings import DEFAULT_MAX_FUTURE_S, AgentSettings
from agent.wire.scalars import format_date_time

if TYPE_CHECKING:
    from agent.drivers.mqtt import Announcer

INBOX = 256
"""Events waiting for the pump. Eight heartbeats, one run and one status read can be under way."""

SUSPENDED_S = 0.05
"""A gap between boot time and monotonic time by which the host was suspended; less is noise."""

SHORTEST_GUARD_ANSWER_S = 0.5
"""How long the guard may take to answer on the busiest host; above that it is a margin."""

BY_GUARD = "demoted by the guard"
"""The reason in the state file that the guard writes."""

BEHIND_SCORE = 1.0
"""What a secondary whose data is too far behind says of itself: anybody else is better, nobody is
worse (the promotion gate, ``max_behind``)."""

CHECKS_LOOK_S = 0.02
"""How often new checks are asked at a reload whether each has run; each run has its limit."""

RELOADABLE = frozenset(
    {
        "check",
        "cooldown",
        "cooldown_limit",
        "failover_score",
        "fence_command",
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
    }
)
"""Settings that SIGHUP changes without losing the role; a change of another one is refused by name."""

log = logs.Log(__name__)


@dataclass(frozen=True, slots=True)
class _Said:
    """What was published last."""

    role: Role
    epoch: int | None
    reason: str
    since: datetime


class Daemon:
    """One agent. ``live`` runs it to its end."""

    def __init__(
        self,
        settings: AgentSettings,
        session_id: str,
        client: RestClient,
        state_file: StateFile,
        *,
        notify: Notify | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.settings = settings
        self.session_id = session_id
        self._state_file = state_file
        self._clock = clock or Clock()
        self._tally = Tally()
        self._notify = notify or Notify({})
        self._runs = Runs(
            settings,
            session_id,
            state_file.path,
            self._clock,
            self._tally,
            ended=self._run_ended,
            groups_changed=self._arm_guard,
            workload_ended=self._workload_ended,
        )
        options = self._options(settings, jitter=random.random())  # noqa: S311 - spreads heartbeats, guards nothing
        self._session = Session(settings.timing, options)
        self._requests = Requests(
            settings,
            client,
            self._session,
            self._tell,
            self._report,
            tally=self._tally,
            clock=self._clock,
        )
        self._checks = self._new_checks()
        self._guardian: Guardian | None = None
        self._lease_until = self._session.lease_until
        self._source: Progress | None = None
        self._watchdog: WatchdogDevice | None = None
        if settings.watchdog_device is not None:
            self._watchdog = WatchdogDevice(settings.watchdog_device)
            self._watchdog.check()
        self._inbox: asyncio.Queue[Event] = asyncio.Queue(INBOX)
        self._tasks: set[asyncio.Task[None]] = set()
        self._joining: asyncio.Task[None] | None = None
        self._following = False
        self._reloading = asyncio.Lock()
        self._promotion: HookFacts | None = None
        self._unfit: dict[str, str] = {}
        self._shown_at = float("-inf")
        self._exit: ExitCode | None = None
        self._workload_status = 0
        self._escalated = False
        self._progress: datetime | None = None
        self._said = _Said(Role.SECONDARY, None, "starting", self._clock.wall())
        self._announcer = self._new_announcer()
        self._written: tuple[float, _Said, str | None] | None = None

    def _options(self, settings: AgentSettings, *, jitter: float) -> Options:
        return Options(
            session_id=self.session_id,
            hooks=self._runs.roles,
            hook_limit_s=settings.hook_limit,
            hook_limits_s={
                role: settings.hook_limit_of(EVENTS[role])
                for role in (Role.PENDING_PRIMARY, Role.PRIMARY)
            },
            cooldown_s=settings.cooldown,
            cooldown_limit_s=settings.cooldown_limit,
            jitter=jitter,
        )

    # -- for the world --------------------------------------------------------------------------

    def describe(self) -> dict[str, Any]:
        """What the state file and the probe's /status say."""
        session = self._session
        holds = self._said.role is not Role.SECONDARY
        return {
            "group": self.settings.group,
            "session": self.session_id,
            "role": self._said.role.value,
            "epoch": self._said.epoch,
            "since": format_date_time(self._said.since),
            "reason": self._said.reason,
            # On CLOCK_BOOTTIME. By then demotion is done or killed; a workload that looks at it
            # before each write fences itself.
            "active_until_boottime_s": session.renew_by + session.timing.demote_s
            if holds
            else None,
            "last_data_processed_time": _iso(self._progress),
            "failover_timeout_s": session.timing.lease_s,
            "score": self._score(),
            "unfit": self._trouble,
            "endpoint": self._requests.client.endpoint,
            "probe": self._runs.probe_url,
            "instance": self._requests.instance,
            "pid": os.getpid(),
            "version": __version__,
        }

    def snapshot(self) -> Snapshot:
        """What probes and metrics are answered from, at this moment."""
        session, source = self._session, self._source
        refused = dict(source.refused) if source is not None else dict.fromkeys(map(str, Reason), 0)
        refused[Reason.FUTURE] += self._tally.future_refused
        return Snapshot(
            now=self._clock.boottime(),
            wall=self._clock.wall(),
            group=self.settings.group,
            session_id=self.session_id,
            timing=session.timing,
            phase=session.phase,
            said=session.role,
            demoting=session.guard_by is not None and session.role is Role.SECONDARY,
            epoch=session.newest_epoch,
            renew_by=session.renew_by,
            lease_until=session.lease_until,
            wake_at=session.wake_at,
            turn_s=self._turn_s,
            unfit=dict(self._unfit),
            score=self._score(),
            checks={name: result.up for name, result in self._checks.health.results.items()},
            data=self._progress,
            group_data=self._requests.group_data,
            endpoint=self._requests.client.endpoint,
            endpoints=self._requests.client.endpoints,
            guard_up=None if self._guardian is None else "guard" not in self._unfit,
            refused=refused,
            mqtt_up=None if self._announcer is None else self._announcer.up,
            mqtt_failures=0 if self._announcer is None else self._announcer.failures,
            notifications_dropped=self._runs.notifier.dropped,
            notifications_failed=self._runs.notifier.failed,
            tally=self._tally,
        )

    def listens_at(self, url: str) -> None:
        """Where the probe listens; hooks are told."""
        self._runs.probe_url = url

    def report_progress(self, time: datetime) -> datetime:
        """Take in up to when data was processed; never back within a tenure (R18).

        Returns:
            The time that is in force now.

        Raises:
            ValueError: it lies too far in the future to be true.
        """
        source = self.settings.progress
        bound_s = source.max_future if source is not None else DEFAULT_MAX_FUTURE_S
        try:
            plausible = Plausible(bound_s).check(time, self._clock.wall())
        except ValueError:
            self._tally.future_refused += 1
            raise
        return self._take_progress(plausible)

    def _take_progress(self, time: datetime) -> datetime:
        if self._progress is None or time > self._progress:
            self._progress = time
        return self._progress

    def say_secondary(self, reason: str) -> None:
        """The first thing that is said, before anything is asked or run (R6).

        Raises:
            ConfigError: the state file cannot be written.
        """
        before = self._state_file.read()
        self._tally.guard_fired = before is not None and before.get("reason") == BY_GUARD
        try:
            self._state_file.write(self.describe() | {"reason": reason})
        except OSError as error:
            raise ConfigError(
                f"state file {self._state_file.path} cannot be written ({error.strerror}): make"
                " room for it, or choose another --state-file",
                exit_code=ExitCode.STATE_FILE,
            ) from error

    def _write_state(self) -> None:
        told = (self._session.renew_by, self._said, self._trouble)
        if told == self._written:
            return
        try:
            self._state_file.write(self.describe())
            self._written = told
        except OSError as error:
            log.error(  # noqa: TRY400 - no traceback needed
                "state file cannot be written",
                path=self._state_file.path,
                reason=error.strerror,
                resolution="make room; until then sidecars see an old role that has run out",
            )

    # -- life -----------------------------------------------------------------------------------

    async def live(self, stop: asyncio.Event) -> int:
        """Run until the session is over; the exit code.

        Args:
            stop: set when somebody asks to stop.

        Raises:
            FailoverError: the server cannot be used; demotion has been done before.
        """
        log.info(
            "agent started",
            group=self.settings.group,
            session=self.session_id,
            endpoint=self._requests.client.endpoint,
            failover_timeout_s=self._session.timing.lease_s,
            state_file=self._state_file.path,
            probe=self._runs.probe_url,
        )
        self._notify.status(f"starting, not yet in group {self.settings.group}")
        self._begin(self._stopping(stop))
        try:
            await self._start_drivers()
            self._perform(self._session.begin(self._clock.boottime()))
            await self._pump()
            self._say_stopping()
            if self._escalated:
                await self._runs.fence()
            await self._runs.notifier.drain(LEFT_S if self._exit is ExitCode.OK else 0.0)
        finally:
            await self._let_go()
        if self._requests.failure is not None:
            raise self._requests.failure
        assert self._exit is not None  # noqa: S101 - the pump ends by Exit or by a failure
        log.info("agent stopped", code=int(self._exit), reason=self._exit.name)
        return self._exit or self._workload_status

    async def _start_drivers(self) -> None:
        if self.settings.guard:
            limit_s = max(SHORTEST_GUARD_ANSWER_S, self._session.timing.margin_s)
            self._guardian = Guardian(
                self._clock, self._guard_changed, limit_s=limit_s, claim=self._state_file.claim
            )
            await self._guardian.start()
        await self._start_source(self.settings)
        self._health_changed(self._checks.health)
        self._checks.start()
        if self._announcer is not None:
            self._announcer.start()

    def _new_announcer(self) -> "Announcer | None":
        settings = self.settings
        if settings.mqtt is None:
            return None
        from agent.drivers import mqtt  # noqa: PLC0415 - needs the extra

        group, session = settings.group, self.session_id
        return mqtt.Announcer(settings.mqtt, group, session, clock=self._clock, first=self._said)

    async def _start_source(self, settings: AgentSettings) -> None:
        self._source = None
        if settings.progress is not None:
            self._source = Progress(settings.progress, self._clock, self._take_progress)
            await self._source.start()

    async def _let_go(self) -> None:
        """Nothing of this session goes on behind the exit."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._checks.stop()
        if self._source is not None:
            await self._source.stop()
        if self._guardian is not None:
            if self._session.guard_by is None:
                await self._guardian.call_off()
            else:
                self._guardian.abandon()  # it demotes when this process has ended
        if self._watchdog is not None:
            self._watchdog.disarm()
        self._said = replace(self._said, reason="stopped")
        self._write_state()
        if self._announcer is not None:
            await self._announcer.stop()

    def close(self) -> None:
        """Give the hooks' process numbers back."""
        self._runs.close()

    async def _stopping(self, stop: asyncio.Event) -> None:
        await stop.wait()
        self._say_stopping()
        self._tell(Stop())

    def _say_stopping(self) -> None:
        """Tell systemd that the stop begins, and by when it has to be done, whatever its unit says."""
        self._notify.stopping()
        self._notify.extend_timeout(longest_stop_s(self.settings, self._session.timing))

    @property
    def _status(self) -> str:
        """The line in ``systemctl status``."""
        said = self._said
        epoch = "-" if said.epoch is None else said.epoch
        return f"{said.role} of {self.settings.group} epoch={epoch} ({said.reason})"

    # -- the pump -------------------------------------------------------------------------------

    def _tell(self, event: Event) -> None:
        self._inbox.put_nowait(event)

    async def _pump(self) -> None:
        self._clock.suspended_s()
        turned_at = self._clock.boottime()
        requests = self._requests
        while self._exit is None and not (requests.failure and not requests.joined_once):
            turn_s = self._turn_s
            due_s = min(turn_s, max(0.0, self._session.wake_at - self._clock.boottime()))
            event = await self._next(due_s)
            now = self._clock.boottime()
            late_s, turned_at = now - turned_at - turn_s, now
            self._tally.turned_at = now
            suspended_s = self._clock.suspended_s()
            if late_s > self._session.timing.margin_s or suspended_s > SUSPENDED_S:
                log.warning("this process was stopped", late_s=late_s, suspended_s=suspended_s)
                self._tally.stalled(suspended=suspended_s > SUSPENDED_S)
                self._step(Stalled(max(late_s, suspended_s)), now)
            self._show_life()
            self._step(event, self._clock.boottime())

    def _step(self, event: Event, now: float) -> None:
        self._lease_until = self._session.lease_until  # a step that demotes may give it back, too
        self._perform(self._session.step(event, now))

    @property
    def _turn_s(self) -> float:
        """At least this often the pump turns: half a margin, and half of what systemd asks for."""
        turn_s = self._session.timing.margin_s / 2
        watchdog_s = self._notify.watchdog_s
        return min(turn_s, watchdog_s / 2) if watchdog_s is not None else turn_s

    async def _next(self, due_s: float) -> Event:
        if self._inbox.empty():
            try:
                async with asyncio.timeout(due_s):
                    return await self._inbox.get()
            except TimeoutError:
                return Tick()
        return self._inbox.get_nowait()

    def _show_life(self) -> None:
        watchdog_s, now = self._notify.watchdog_s, self._clock.boottime()
        if watchdog_s is not None and now - self._shown_at >= watchdog_s / 4:
            self._shown_at = now  # not at each turn: the queue of whoever listens is short
            self._notify.watchdog()
        if self._guardian is not None:
            self._guardian.check()
        if self._watchdog is not None:
            self._watchdog.pet()

    def _perform(self, effects: tuple[Effect, ...]) -> None:
        self._arm_guard()  # before a hook starts that it would have to undo
        for effect in effects:
            self._do(effect)
        if effects:  # an idle turn has changed nothing that the guard was not told just now
            self._arm_guard()
        self._write_state()

    def _do(self, effect: Effect) -> None:  # noqa: C901 - an arm an effect
        match effect:
            case Publish():
                self._publish(effect)
            case SendBeat():
                self._begin(self._requests.beat(effect.beat))
            case StartHook():
                self._start_run(effect)
            case TermHook():
                self._runs.term(effect.run)
            case KillHook():
                self._runs.kill(effect.run)
            case Join():
                if self._joining is not None:
                    self._joining.cancel()
                self._joining = self._begin(self._join())
            case Release():
                self._begin(self._requests.release(effect))
            case Leave():
                self._begin(self._requests.leave(self._left))
            case Escalate():
                self._escalate(effect.reason)
            case Exit():
                self._exit = effect.code

    def _publish(self, effect: Publish) -> None:
        if effect.before is Role.SECONDARY:
            self._progress = None  # a new tenure may begin further back (R18)
        self._said = _Said(effect.role, effect.epoch, effect.reason, self._clock.wall())
        self._tally.changed(effect)
        self._write_state()
        log.info(
            "role changed",
            group=self.settings.group,
            session=self.session_id,
            before=effect.before.value,
            after=effect.role.value,
            epoch=effect.epoch,
            reason=effect.reason,
        )
        self._notify.status(self._status)
        if self._announcer is not None:
            self._announcer.announce(self._said)
        self._checks.set_primary(effect.role is Role.PRIMARY)
        if self._watchdog is not None:
            if effect.role is Role.SECONDARY:
                self._watchdog.disarm()
            elif effect.before is Role.SECONDARY:
                self._watchdog.arm(self._session.timing.lease_s)
        if effect.role is Role.SECONDARY and Role.SECONDARY not in self._runs.roles:
            self._demoted(
                self._lease_until
            )  # who reads the state file has been told, and there is nothing to run
        if effect.cause in SELF_DEMOTIONS:
            self._advise("lost", effect.reason, effect.before)

    def _begin(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _join(self) -> None:
        first = not self._requests.joined_once
        await self._requests.join()
        if self._requests.failure is not None:
            return
        self._notify.ready(self._status)
        self._advise("joined", "registered at the coordinator")
        if first and not self._following:
            self._following = True
            self._begin(self._requests.follow())

    def _left(self) -> None:
        if self._session.phase is Phase.LEAVING:
            self._advise("left", "stopping")

    def _start_run(self, effect: StartHook) -> None:
        facts = effect.facts
        last_data = facts.last_data
        if facts.role is Role.SECONDARY and self._progress is not None:
            last_data = self._progress
        if facts.role is not Role.SECONDARY:
            self._promotion = facts
            self._tell_guard_hook()
        self._begin(self._runs.begin(effect.run, facts, last_data))
        if facts.role is Role.SECONDARY:
            self._mark("workload", None)

    def _tell_guard_hook(self) -> None:
        if self._guardian is not None and self._promotion is not None:
            demote_s = self._session.timing.demote_s
            self._guardian.set_hook(self._runs.guard_hook(self._promotion, demote_s))

    def _run_ended(self, event: HookEnded) -> None:
        """Measure how much of L was left when the demotion was done: less than 0 breaks the promise."""
        if event.ok and self._session.guard_by is not None and self._said.role is Role.SECONDARY:
            self._demoted(self._session.lease_until)
        self._tell(event)

    def _demoted(self, lease_until: float) -> None:
        slack_s = lease_until - self._clock.boottime()
        log.info("demoted", epoch=self._said.epoch, demote_slack_s=slack_s)
        self._tally.demoted(slack_s)

    def _advise(self, event: str, reason: str, before: Role | None = None) -> None:
        self._runs.notify(
            event,
            old_role=before or self._said.role,
            new_role=self._said.role,
            epoch=self._said.epoch,
            reason=reason,
            last_data=self._progress,
            previous_primary=self._session.previous_primary,
        )

    def _escalate(self, reason: str) -> None:
        """R4: the demotion failed; kill what is left, run the fence command, exit."""
        log.error(
            "demotion failed",
            group=self.settings.group,
            session=self.session_id,
            epoch=self._said.epoch,
            reason=reason,
            action="killing the hooks' and the workload's process groups, then exiting without"
            " giving the role back",
        )
        self._escalated = True
        self._runs.kill_all()

    # -- fitness --------------------------------------------------------------------------------

    def _score(self) -> float:
        """FailoverScore: what the checks say, or nearly nothing for a member that is far behind."""
        score = self._checks.health.score
        group_data, bound_s = self._requests.group_data, self.settings.max_behind
        if (
            bound_s is None
            or group_data is None
            or self._progress is None
            or self._said.role is Role.PRIMARY
        ):
            return score
        behind_s = (group_data - self._progress).total_seconds()
        return min(score, BEHIND_SCORE) if behind_s > bound_s else score

    def _report(self) -> tuple[float, datetime | None]:
        return self._score(), self._progress

    @property
    def _trouble(self) -> str | None:
        """What makes this host unfit, or None."""
        return "; ".join(self._unfit.values()) or None

    def _mark(self, source: str, trouble: str | None, *, expected: bool = False) -> None:
        """Say that something makes this host unfit, or no more; the session hears each change."""
        before = dict(self._unfit)
        self._unfit.pop(source, None)
        if trouble is not None:
            self._unfit[source] = trouble
        if self._unfit != before:
            if self._trouble is not None:
                say = log.info if expected else log.warning
                say("unfit to be primary", reason=self._trouble)
            else:
                log.info("fit to be primary again")
            self._tell(Fitness(self._trouble is None, self._trouble or ""))

    def _health_changed(self, _: Health) -> None:
        health = self._checks.health  # checks that do not count yet tell theirs, too
        waiting = not all(result.known for result in health.results.values())
        self._mark("checks", None if health.fit else health.reason, expected=waiting)

    def _guard_changed(self, trouble: str | None) -> None:
        self._tally.guard_lost += trouble is not None
        self._mark("guard", trouble)

    def _workload_ended(self, status: int | None) -> None:
        if status is None:
            self._mark("workload", "the workload fails again and again")
        else:
            self._workload_status = status
            self._tell(Stop())

    def _arm_guard(self) -> None:
        """Tell the guard the newest deadline, and what it would have to kill (R12)."""
        if self._guardian is None:
            return
        self._guardian.set_log(
            GuardLog(
                logs.LEVELS[self.settings.log_level],
                self.settings.log_format,
                self.settings.group,
                self.session_id,
                self._said.role.value,
                self._said.epoch,
            )
        )
        due = self._session.guard_by
        if due is None:
            self._guardian.arm(None)
            return
        said = self.describe() | {
            "role": Role.SECONDARY.value,
            "reason": BY_GUARD,
            "active_until_boottime_s": None,
        }
        workload = self._runs.workload
        cgroup = workload.cgroup if workload is not None else None
        arming = Arming(
            hook_at=due[0],
            kill_at=due[1],
            running=self._runs.running_groups,
            groups=self._runs.tenure_groups,
            workload=workload.pgid if workload is not None else None,
            cgroup=str(cgroup) if cgroup is not None else None,
            state=(str(self._state_file.path), json.dumps(said)),
        )
        self._guardian.arm(arming)

    # -- reload ---------------------------------------------------------------------------------

    def reload(self, reread: Callable[[], AgentSettings]) -> None:
        """SIGHUP: take what can change without losing the role; refuse the rest by name."""
        self._begin(self._reload(reread))

    async def _reload(self, reread: Callable[[], AgentSettings]) -> None:
        async with self._reloading:
            self._notify.reloading()
            try:
                await self._take_over(await asyncio.to_thread(reread))
            except FailoverError as error:
                log.error("configuration not changed", reason=error)  # noqa: TRY400 - no traceback needed
            finally:
                self._notify.ready(self._status)

    async def _take_over(self, wanted: AgentSettings) -> None:
        before = self.settings
        keys = [setting.name for setting in fields(wanted)]
        changed = {key for key in keys if getattr(wanted, key) != getattr(before, key)}
        kept = changed - RELOADABLE
        update = {key: getattr(wanted, key) for key in changed & RELOADABLE}
        settings = replace(before, **update)
        self._runs.reconfigure(settings)
        if "progress" in changed:
            try:
                await self._change_source(settings)
            except FailoverError:
                self._runs.reconfigure(before)
                raise
        self.settings = self._requests.settings = settings
        self._session.reconfigure(self._options(settings, jitter=self._session.options.jitter))
        self._tell_guard_hook()
        logs.configure(settings.log_level, settings.log_format)
        if {"check", "failover_score"} & changed:
            await self._change_checks()
        if kept:
            log.warning(
                "settings not changed",
                refused=sorted(kept),
                resolution="restart the agent to change them",
            )
        log.info("configuration read again", changed=sorted(update))

    async def _change_source(self, settings: AgentSettings) -> None:
        """Another source, or the one of before if that cannot be started."""
        if self._source is not None:
            await self._source.stop()
        try:
            await self._start_source(settings)
        except FailoverError:
            await self._start_source(self.settings)
            raise

    async def _change_checks(self) -> None:
        """Other checks, from when each has a first result: the ones of before count until then."""
        checks = self._new_checks()
        checks.start()
        try:
            while not all(  # noqa: ASYNC110 - checks tell changes, and a first failure is none
                result.known for result in checks.health.results.values()
            ):
                await asyncio.sleep(CHECKS_LOOK_S)
        except asyncio.CancelledError:
            await checks.stop()
            raise
        before, self._checks = self._checks, checks
        checks.set_primary(self._said.role is Role.PRIMARY)
        self._health_changed(checks.health)
        await before.stop()

    def _new_checks(self) -> Checks:
        settings = self.settings
        return Checks(settings.check, self._clock, self._health_changed, settings.failover_score)


def _iso(time: datetime | None) -> str | None:
    return format_date_time(time) if time is not None else None
