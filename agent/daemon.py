"""The agent's daemon: one inbox, one pump, one timer.

Owns the session's life in this process: it turns what the drivers see into events, gives them to
``Session.step`` one by one, and has the effects done in their order. It decides nothing itself.

- ``_pump`` is the only caller of ``step``. Everything that waits (requests, hooks, joining, following
  the status) is a task that ends by putting an event into the inbox, so a heartbeat waits for none.
- The pump turns at least every half margin. If it was late by more than the margin, or the host was
  suspended, it says Stalled before it looks at anything else (R2).
- The state file says Secondary before anything else happens, and before a demotion hook starts (R6).
"""

import asyncio
import json
import os
import random
import secrets
import socket
from collections.abc import Coroutine, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_exception,
    stop_before_delay,
    stop_never,
    wait_random_exponential,
)

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
from agent.core.events import (
    Answered,
    BeatFailed,
    Event,
    Failure,
    Fitness,
    HookEnded,
    Joined,
    Left,
    Released,
    Stalled,
    StatusSeen,
    Stop,
    Tick,
)
from agent.core.session import Options, Phase, Session
from agent.core.timing import Timing, plan
from agent.drivers.guardian import Arming, GuardHook, Guardian
from agent.drivers.hooks import (
    HookRun,
    HookRunner,
    Notifier,
    environment_of,
    facts_of,
    specs_of,
)
from agent.drivers.probe import ProbeServer
from agent.drivers.rest import RestClient
from agent.drivers.rest.configured import client_for
from agent.drivers.statefile import StateFile, default_directory
from agent.errors import ConfigError, ExitCode, FailoverError, ServerError, TimingError
from agent.model import TICKS_PER_SECOND, GroupConfig, Role, SessionConfig
from agent.ops import logs
from agent.ops.clock import Clock
from agent.ops.signals import stop_signals
from agent.settings import AgentSettings
from agent.wire import format_date_time

INBOX = 256
"""Events waiting for the pump. Eight heartbeats, one hook and one status read can be under way."""

SUSPENDED_S = 0.05
"""A gap between boot time and monotonic time by which the host was suspended; less is noise."""

LONGEST_WAIT_S = 30.0
"""One blocking read: shorter than the idle limits of usual balancers and proxies."""

SHORTEST_RETRY_S = 0.05
LEFT_S = 5.0
"""How long the exit waits for notification hooks: they are advisory, and a stop is to be quick."""

NAMES_ON_ONE_HOST = 64
"""Agents of one group on one host that get a session id by themselves."""

EVENTS: Mapping[Role, str] = {
    Role.PRIMARY: "primary",
    Role.PENDING_PRIMARY: "pending_primary",
    Role.SECONDARY: "secondary",
}
SHORTEST_GUARD_ANSWER_S = 0.5
"""How long the guard may take to answer on the busiest host; above that it is a margin."""

PERMANENT = frozenset({ExitCode.REFUSED, ExitCode.NOT_AUTHORISED})
"""What a server says at the start and would say again."""

log = logs.Log(__name__)


def run(settings: AgentSettings) -> int:
    """Be a member of the group until SIGTERM or SIGINT; the exit code.

    Raises:
        FailoverError: it could not start, or had to give up; everything is demoted by then.
    """
    logs.configure(settings.log_level, settings.log_format)
    return asyncio.run(_run(settings))


async def _run(settings: AgentSettings) -> int:
    async with AsyncExitStack() as stack:
        state_file, session_id = _claim(settings)
        stack.callback(state_file.close)
        client = client_for(settings)
        stack.push_async_callback(client.aclose)
        daemon = Daemon(settings, session_id, client, state_file)
        daemon.say_secondary("starting")
        stack.callback(daemon.close)
        stop = stack.enter_context(stop_signals())
        if settings.probe_listen is not None:
            probe = ProbeServer(daemon.report_progress, daemon.describe)
            stack.push_async_callback(probe.stop)
            host, port = await probe.start(settings.probe_listen.host, settings.probe_listen.port)
            daemon.probe_url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        return await daemon.live(stop)


def _claim(settings: AgentSettings) -> tuple[StateFile, str]:
    """The state file and the session id, both for this process alone."""
    host = socket.gethostname() or "localhost"
    names = [host, *(f"{host}-{n}" for n in range(2, NAMES_ON_ONE_HOST + 1))]
    for name in [settings.session_id] if settings.session_id is not None else names:
        path = settings.state_file
        if path is None:
            path = default_directory() / f"{_safe(settings.group)}.{_safe(name)}.json"
        state_file = StateFile(path)
        try:
            state_file.acquire()
        except ConfigError as error:
            last = name == names[-1] or settings.session_id or settings.state_file
            if error.exit_code is not ExitCode.SESSION_IN_USE or last:
                raise
        else:
            return state_file, name
    raise AssertionError("the last name raises")


def _safe(name: str) -> str:
    """An id as part of a file's name."""
    return "".join(c if c.isalnum() or c in "-_" else f"%{ord(c):02X}" for c in name)[:100]


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
        clock: Clock | None = None,
    ) -> None:
        self.settings = settings
        self.session_id = session_id
        self.probe_url: str | None = None
        self._client = client
        self._state_file = state_file
        self._clock = clock or Clock()
        self._instance = secrets.token_hex(8)
        self._specs = specs_of(settings)
        self._runner = HookRunner(self._clock)
        self._notifier = Notifier(self._runner, self._specs, settings.hook_limit)
        self._running: dict[int, HookRun] = {}
        self._of_tenure: list[HookRun] = []
        options = Options(
            session_id=session_id,
            hooks=frozenset(role for role, event in EVENTS.items() if event in self._specs),
            hook_limit_s=settings.hook_limit,
            cooldown_s=settings.cooldown,
            cooldown_limit_s=settings.cooldown_limit,
            jitter=random.random(),  # noqa: S311 - spreads heartbeats, guards nothing
        )
        self._session = Session(settings.timing, options)
        self._guardian: Guardian | None = None
        self._inbox: asyncio.Queue[Event] = asyncio.Queue(INBOX)
        self._tasks: set[asyncio.Task[None]] = set()
        self._joining: asyncio.Task[None] | None = None
        self._following = False
        self._joined_once = False
        self._exit: ExitCode | None = None
        self._failure: FailoverError | None = None
        self._progress: datetime | None = None
        self._trouble: str | None = None
        self._said = _Said(Role.SECONDARY, None, "starting", self._clock.wall())
        self._written_for = (float("-inf"), self._said)

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
            "endpoint": self._client.endpoint,
            "probe": self.probe_url,
            "instance": self._instance,
            "pid": os.getpid(),
        }

    def report_progress(self, time: datetime) -> datetime:
        """Take in up to when data was processed; never back within a tenure (R18)."""
        if self._progress is None or time > self._progress:
            self._progress = time
        return self._progress

    def say_secondary(self, reason: str) -> None:
        """The first thing that is said, before anything is asked or run (R6).

        Raises:
            ConfigError: the state file cannot be written.
        """
        try:
            self._state_file.write(self.describe() | {"reason": reason})
        except OSError as error:
            raise ConfigError(
                f"state file {self._state_file.path} cannot be written ({error.strerror}): make"
                " room for it, or choose another --state-file",
                exit_code=ExitCode.STATE_FILE,
            ) from error

    def _write_state(self) -> None:
        lease = (self._session.renew_by, self._said)
        if lease == self._written_for:
            return
        try:
            self._state_file.write(self.describe())
            self._written_for = lease
        except OSError as error:
            log.error(  # noqa: TRY400 - no traceback needed
                "state file cannot be written",
                path=self._state_file.path,
                reason=error.strerror,
                resolution="make room; until then sidecars see an old role that has run out",
            )

    # -- the pump -------------------------------------------------------------------------------

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
            endpoint=self._client.endpoint,
            failover_timeout_s=self._session.timing.lease_s,
            state_file=self._state_file.path,
            probe=self.probe_url,
        )
        self._begin(self._stopping(stop))
        if self.settings.guard:
            self._guardian = self._new_guardian()
            await self._guardian.start()
        self._perform(self._session.begin(self._clock.boottime()))
        await self._pump()
        await self._notifier.drain(LEFT_S if self._exit is ExitCode.OK else 0.0)
        await self._let_go()
        if self._failure is not None:
            raise self._failure
        assert self._exit is not None  # noqa: S101 - the pump ends by Exit or by a failure
        log.info("agent stopped", code=int(self._exit), reason=self._exit.name)
        return self._exit

    async def _pump(self) -> None:
        self._clock.suspended_s()
        turned_at = self._clock.boottime()
        while self._exit is None and not (self._failure and not self._joined_once):
            turn_s = self._session.timing.margin_s / 2
            due_s = min(turn_s, max(0.0, self._session.wake_at - self._clock.boottime()))
            event = await self._next(due_s)
            now = self._clock.boottime()
            late_s, turned_at = now - turned_at - turn_s, now
            if self._guardian is not None:
                self._guardian.check()
            suspended_s = self._clock.suspended_s()
            if late_s > self._session.timing.margin_s or suspended_s > SUSPENDED_S:
                log.warning("this process was stopped", late_s=late_s, suspended_s=suspended_s)
                self._perform(self._session.step(Stalled(max(late_s, suspended_s)), now))
            self._perform(self._session.step(event, self._clock.boottime()))

    async def _next(self, due_s: float) -> Event:
        if self._inbox.empty():
            try:
                async with asyncio.timeout(due_s):
                    return await self._inbox.get()
            except TimeoutError:
                return Tick()
        return self._inbox.get_nowait()

    def _perform(self, effects: tuple[Effect, ...]) -> None:
        self._arm_guard()  # before a hook starts that it would have to undo
        for effect in effects:
            self._do(effect)
        self._arm_guard()
        self._write_state()

    def _do(self, effect: Effect) -> None:  # noqa: C901 - an arm an effect
        match effect:
            case Publish():
                self._publish(effect)
            case SendBeat():
                self._begin(self._beat(effect.beat))
            case StartHook():
                self._start_hook(effect)
            case TermHook():
                self._running[effect.run].term()
            case KillHook():
                self._running[effect.run].kill()
            case Join():
                if self._joining is not None:
                    self._joining.cancel()
                self._joining = self._begin(self._join())
            case Release():
                self._begin(self._release(effect))
            case Leave():
                self._begin(self._leave())
            case Escalate():
                self._escalate(effect.reason)
            case Exit():
                self._exit = effect.code

    def _publish(self, effect: Publish) -> None:
        if effect.before is Role.SECONDARY:
            self._progress = None  # a new tenure may begin further back (R18)
        self._said = _Said(effect.role, effect.epoch, effect.reason, self._clock.wall())
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
        if effect.cause in SELF_DEMOTIONS:
            self._notify("lost", effect.reason, effect.before)

    def _begin(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _let_go(self) -> None:
        """Nothing of this session goes on behind the exit."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._guardian is not None:
            await self._guardian.close()
        self._said = replace(self._said, reason="stopped")
        self._write_state()

    def close(self) -> None:
        """Give the hooks' process numbers back."""
        self._runner.close()

    async def _stopping(self, stop: asyncio.Event) -> None:
        await stop.wait()
        self._inbox.put_nowait(Stop())

    # -- the guard ------------------------------------------------------------------------------

    def _new_guardian(self) -> Guardian:
        limit_s = max(SHORTEST_GUARD_ANSWER_S, self._session.timing.margin_s)

        def changed(trouble: str | None) -> None:
            self._inbox.put_nowait(Fitness(trouble is None, trouble or "the guard answers"))

        return Guardian(self._clock, changed, limit_s=limit_s)

    def _arm_guard(self) -> None:
        """Tell the guard the newest deadline, and what it would have to kill (R12)."""
        if self._guardian is None:
            return
        due = self._session.guard_by
        if due is None:
            self._guardian.arm(None)
            return
        said = self.describe() | {
            "role": Role.SECONDARY.value,
            "reason": "demoted by the guard",
            "active_until_boottime_s": None,
        }
        arming = Arming(
            hook_at=due[0],
            kill_at=due[1],
            running=tuple(pgid for run in self._running.values() for pgid in run.pgids),
            groups=tuple(pgid for run in self._of_tenure for pgid in run.pgids),
            state=(str(self._state_file.path), json.dumps(said)),
        )
        self._guardian.arm(arming)

    # -- hooks ----------------------------------------------------------------------------------

    def _start_hook(self, effect: StartHook) -> None:
        facts = self._facts(effect.facts)
        role = effect.facts.role
        name = EVENTS[role]
        if role is not Role.SECONDARY and self._guardian is not None:
            self._guardian.set_hook(self._guard_hook(effect.facts))
        run = self._runner.start(self._specs[name], environment_of(facts), facts)
        log.info("hook started", hook=name, pid=run.pid, epoch=effect.facts.epoch)
        self._running[effect.run] = run
        if role is not Role.SECONDARY:
            self._of_tenure.append(run)
        self._begin(self._hook_ended(effect.run, run))

    def _guard_hook(self, promotion: HookFacts) -> GuardHook:
        """The demotion of the tenure that a promotion begins, as the guard would run it."""
        facts = replace(
            promotion,
            role=Role.SECONDARY,
            old_role=Role.PRIMARY,
            reason="the guard acts for the agent",
            limit_s=self._session.timing.demote_s,
        )
        spec = self._specs.get(EVENTS[Role.SECONDARY])
        if spec is None:
            return GuardHook([], {})
        try:
            plan = spec.exec_plan()
        except ConfigError as error:
            log.error("the guard has no demotion hook", reason=error)  # noqa: TRY400 - no traceback needed
            return GuardHook([], {})
        if plan.left_out:
            log.warning("the guard cannot call webhooks", hook=spec.name, left_out=plan.left_out)
        env = {**plan.environment, **environment_of(self._facts(facts))}
        return GuardHook(plan.commands, env, plan.directory, plan.uid, plan.gid, plan.groups)

    def _facts(self, facts: HookFacts) -> dict[str, Any]:
        last_data = facts.last_data
        if self._progress is not None and facts.role is Role.SECONDARY:
            last_data = self._progress
        return self._told(
            event=EVENTS[facts.role],
            old_role=facts.old_role,
            new_role=facts.role,
            epoch=facts.epoch,
            reason=facts.reason,
            last_data=last_data,
            deadline_s=facts.limit_s,
            previous_primary=facts.previous_primary,
        )

    def _told(self, **facts: Any) -> dict[str, Any]:
        """What a hook is told, with what every hook is told."""
        return facts_of(
            **facts,
            group=self.settings.group,
            session=self.session_id,
            state_file=str(self._state_file.path),
            probe_url=self.probe_url,
            now=self._clock.wall(),
        )

    def _notify(self, event: str, reason: str, before: Role | None = None) -> None:
        """Run an advisory hook apart from everything else (R10)."""
        facts = self._told(
            event=event,
            old_role=before or self._said.role,
            new_role=self._said.role,
            epoch=self._said.epoch,
            reason=reason,
            last_data=self._progress,
            deadline_s=self._notifier.limit_s,
            previous_primary=self._session.previous_primary,
        )
        self._notifier.put(event, facts)

    async def _hook_ended(self, number: int, run: HookRun) -> None:
        ended = await run.wait()
        del self._running[number]
        if ended.ok and run.name == EVENTS[Role.SECONDARY]:
            self._of_tenure.clear()
        say = log.info if ended.ok else log.warning
        say("hook ended", hook=run.name, result=ended.why, seconds=ended.duration_s)
        self._inbox.put_nowait(HookEnded(number, ended.ok, ended.why))

    def _escalate(self, reason: str) -> None:
        """R4: the demotion hook failed; kill what its and the promotion's hooks left running."""
        log.error(
            "demotion failed",
            group=self.settings.group,
            session=self.session_id,
            epoch=self._said.epoch,
            reason=reason,
            action="killing the hooks' process groups, then exiting without giving the role back",
        )
        for run in [*self._running.values(), *self._of_tenure]:
            run.kill()

    # -- requests -------------------------------------------------------------------------------

    async def _beat(self, beat: int) -> None:
        try:
            answer = await self._client.heartbeat(
                self.settings.group,
                self.session_id,
                score=self.settings.failover_score,
                last_data=self._progress,
                instance=self._instance,
                seen_epoch=self._session.newest_epoch,
                timeout_s=self._session.timing.request_timeout_s,
            )
        except ServerError as error:
            if error.status != 429:  # noqa: PLR2004 - too soon: there is contact
                self._contact(str(error))
            self._inbox.put_nowait(
                BeatFailed(beat, _failure(error), str(error), error.retry_after_s)
            )
        else:
            self._contact(None)
            self._inbox.put_nowait(Answered(beat, answer))

    def _contact(self, trouble: str | None) -> None:
        """One line when contact is lost, changes its reason, or is back."""
        if trouble == self._trouble:
            return
        self._trouble = trouble
        if trouble is not None:
            log.warning("heartbeat failed", reason=trouble, next_endpoint=self._client.endpoint)
        else:
            log.info("heartbeat answered again", endpoint=self._client.endpoint)

    async def _join(self) -> None:
        """Register, however long it takes; at the start only for ``startup_timeout``."""
        settings = self.settings
        patience_s = settings.startup_timeout
        bounded = not self._joined_once and patience_s > 0
        retrying = AsyncRetrying(
            retry=retry_if_exception(self._worth_retrying),
            wait=wait_random_exponential(
                multiplier=SHORTEST_RETRY_S, max=self._session.timing.beat_s
            ),
            stop=stop_before_delay(patience_s) if bounded else stop_never,
            before_sleep=_say_retry,
            reraise=True,
        )
        try:
            timing: Timing = await retrying(self._register)
        except FailoverError as error:
            self._failure = error
            self._inbox.put_nowait(Stop())
            return
        self._joined_once = True
        log.info(
            "joined",
            group=settings.group,
            session=self.session_id,
            endpoint=self._client.endpoint,
            failover_timeout_s=timing.lease_s,
        )
        self._notify("joined", "registered at the coordinator")
        self._inbox.put_nowait(Joined(timing))
        if not self._following:
            self._following = True
            self._begin(self._follow())

    def _worth_retrying(self, error: BaseException) -> bool:
        if not isinstance(error, ServerError):
            return False
        return self._joined_once or error.exit_code not in PERMANENT

    async def _register(self) -> Timing:
        settings = self.settings
        timing = self._session.timing
        limit_s = timing.request_timeout_s
        wanted = GroupConfig(
            settings.group,
            round(settings.failover_timeout * TICKS_PER_SECOND),
            name=settings.group_name,
        )
        group = await self._client.ensure_group(wanted, timeout_s=2 * limit_s)
        if group.lease_s != timing.lease_s:
            log.info("adopted the group's failover timeout", failover_timeout_s=group.lease_s)
            try:
                timing = plan(group.lease_s, settings.budget)
            except TimingError as error:
                raise TimingError(
                    f"group {settings.group} has failover timeout {group.lease_s:g} s at"
                    f" {self._client.endpoint}, and with it {error}",
                    smallest_lease_s=error.smallest_lease_s,
                ) from error
        name = settings.session_name if settings.session_name is not None else self.session_id
        session = SessionConfig(self.session_id, name=name)
        await self._client.join(settings.group, session, timeout_s=limit_s)
        return timing

    async def _follow(self) -> None:
        """Read the status: by blocking reads where the server has them, else every beat."""
        after: int | None = None
        while True:
            timing = self._session.timing
            wait_s = min(max(timing.lease_s, 1.0), LONGEST_WAIT_S)
            try:
                status = await self._client.status(
                    self.settings.group,
                    after=after,
                    wait_s=wait_s,
                    timeout_s=timing.request_timeout_s,
                )
            except ServerError:  # the heartbeat meets the same and says so
                after = None
                await asyncio.sleep(timing.beat_s)
                continue
            self._inbox.put_nowait(StatusSeen(status))
            after = status.revision
            if after is None:
                await asyncio.sleep(timing.beat_s)

    async def _release(self, effect: Release) -> None:
        try:
            await self._client.release(
                self.settings.group,
                self.session_id,
                epoch=effect.epoch,
                reason=effect.reason[:256],
                hold_off_s=effect.hold_off_s or None,
                last_data=self._progress,
                timeout_s=self._session.timing.request_timeout_s,
            )
        except ServerError as error:
            log.warning("role not given back, its lease will end", reason=error)
        self._inbox.put_nowait(Released())

    async def _leave(self) -> None:
        try:
            await self._client.leave(
                self.settings.group,
                self.session_id,
                timeout_s=self._session.timing.request_timeout_s,
            )
        except ServerError as error:
            log.warning("session not deleted", reason=error)
        else:
            if self._session.phase is Phase.LEAVING:
                self._notify("left", "stopping")
        self._inbox.put_nowait(Left())


def _failure(error: ServerError) -> Failure:
    match error.status:
        case 404 if error.exit_code is not ExitCode.NOT_THE_API:
            return Failure.GONE
        case 429 | 503:
            return Failure.BACK_OFF
        case _:
            return Failure.OTHER


def _say_retry(state: RetryCallState) -> None:
    error = state.outcome.exception() if state.outcome is not None else None
    if state.attempt_number == 1 or state.attempt_number % 20 == 0:
        log.warning("cannot join yet", reason=error, attempt=state.attempt_number)


def _iso(time: datetime | None) -> str | None:
    return format_date_time(time) if time is not None else None
