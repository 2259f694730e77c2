"""The agent's loop: one inbox, one caller of ``Session.step``, one timer.

It turns what the drivers see into events, gives them to the session one by one, and has the effects
carried out in their order. It decides nothing itself. It turns at least every half margin: if it was late
by more than the margin, or the host was suspended, it says Stalled before it looks at anything else
(R2). Only a loop that turns tells systemd and the watchdog device that it lives.

Nothing that can block is called or awaited here; the modules beside this one see to that. The first
demotion (R6) is begun before anything else that can fail; the drivers come up while it runs, and the first
request waits for both. If this loop itself fails while something is promoted, the guard is left armed and
acts as soon as the process has ended.
"""

import asyncio
import random
import secrets
import signal
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from agent.core.events import Event, Stalled, Stop, Tick
from agent.core.session import Phase, Session
from agent.daemon.effect_runner import EffectRunner
from agent.daemon.guard_control import BY_GUARD, GuardControl
from agent.daemon.host_health import HostHealth
from agent.daemon.member import Member, Published, announcer_of, options_of
from agent.daemon.reload import Reload
from agent.daemon.requests import Requests
from agent.daemon.role_runner import RoleRunner
from agent.daemon.state_publisher import (
    STOPPED,
    StatePublisher,
    former_instances,
    former_tenure,
    refused_times,
    snapshot_of,
    store_of,
)
from agent.daemon.stop_budget import LEFT_S, longest_stop_s
from agent.daemon.supervise import Supervisor
from agent.daemon.telemetry import Snapshot, Stats
from agent.drivers.rest import RestClient
from agent.drivers.statefile import StateFile
from agent.errors import ExitCode, FailoverError
from agent.model import Role
from agent.ops.clock import Clock
from agent.ops.logs import Log
from agent.ops.sd_notify import Notify
from agent.settings import AgentSettings

if TYPE_CHECKING:
    from agent.drivers.mqtt import Announcer

INBOX = 256
"""Events waiting for the loop. Eight heartbeats, one run and one status read can be under way."""

SUSPENDED_S = 0.05
"""A gap between boot time and monotonic time by which the host was suspended; less is noise."""

log = Log(__name__)


class Daemon:
    """One agent. ``live`` runs it to its end.

    Args:
        settings: checked, with hooks that are fit.
        session_id: this member.
        make_client: opens the client; raises ConfigError.
        state_file: claimed by this process.
        start_probe: starts the local HTTP server and returns its URL, or None without one; raises
            ConfigError.
    """

    def __init__(
        self,
        settings: AgentSettings,
        session_id: str,
        make_client: Callable[[], Awaitable[RestClient]],
        state_file: StateFile,
        *,
        notify: Notify | None = None,
        clock: Clock | None = None,
        start_probe: "Callable[[Daemon], Awaitable[str | None]] | None" = None,
    ) -> None:
        self._make_client = make_client
        self._start_probe = start_probe
        self._claim = state_file.claim
        self._inbox: asyncio.Queue[Event] = asyncio.Queue(INBOX)
        self._started = asyncio.Event()
        self._failure: FailoverError | None = None
        self._broken: BaseException | None = None
        self._task_has_failed = False
        self._shown_at = float("-inf")
        self._announcer: Announcer | None = None
        self._supervisor = Supervisor(self._tell, self._task_failed)
        former = state_file.read() or {}
        clock, stats, instance = clock or Clock(), Stats(), secrets.token_hex(8)
        role_runner = RoleRunner(
            settings,
            session_id,
            state_file.path,
            clock,
            stats,
            instance=instance,
            ended=lambda event: self._effects.run_ended(event),  # noqa: PLW0108 - made below
            groups_changed=lambda: self._guard_control.update(),  # noqa: PLW0108 - as above
            workload_ended=lambda status: self._host_health.workload_ended(status),  # noqa: PLW0108 - as above
        )
        jitter = random.random()  # noqa: S311 - spreads heartbeats, guards nothing
        options = options_of(settings, session_id, role_runner, jitter, store_of(former))
        session = Session(settings.timing, options)
        requests = Requests(
            settings,
            session,
            self._tell,
            lambda: self._host_health.report(),  # noqa: PLW0108 - as above
            instance=instance,
            stats=stats,
            clock=clock,
        )
        published = Published(Role.SECONDARY, None, "starting", clock.wall())
        self._member = member = Member(
            settings=settings,
            session_id=session_id,
            instance=instance,
            clock=clock,
            stats=stats,
            notify=notify or Notify({}),
            session=session,
            role_runner=role_runner,
            requests=requests,
            published=published,
        )
        self._former = former
        self._former_tenure = former_tenure(former, settings.hook_secondary)
        self._state_publisher = StatePublisher(member, state_file, self._former_tenure)
        self._host_health = HostHealth(member, self._tell)
        self.report_progress = self._host_health.report_progress
        self._state_publisher.score, self._state_publisher.trouble = (
            self._host_health.score,
            self._host_health.trouble,
        )
        self._guard_control = GuardControl(member, self._state_publisher.describe, state_file.path)
        self._effects = EffectRunner(
            member,
            self._state_publisher,
            self._host_health,
            self._guard_control,
            self._supervisor,
            tell=self._tell,
            started=self._wait_for_start,
        )
        self._reload = Reload(
            member,
            self._host_health,
            options=lambda settings: options_of(
                settings, session_id, role_runner, jitter, session.store_id
            ),
            status=lambda: self._state_publisher.status,
        )

    # -- for the world --------------------------------------------------------------------------

    def describe(self) -> dict[str, Any]:
        """The content of the state file and of the probe's /status."""
        return self._state_publisher.describe()

    def snapshot(self) -> Snapshot:
        """Everything that probes and metrics are answered from, at this moment."""
        host_health, announcer = self._host_health, self._announcer
        return snapshot_of(
            self._member,
            turn_s=self._turn_s,
            unfit=host_health.unfit,
            score=host_health.score(),
            checks=host_health.checks_up,
            guard_up=None if not self._guard_control.enabled else "guard" not in host_health.unfit,
            refused=refused_times(host_health.source, self._member.stats.future_refused),
            mqtt_up=None if announcer is None else announcer.up,
            mqtt_failures=0 if announcer is None else announcer.failures,
        )

    def reload(self, reread: Callable[[], AgentSettings]) -> None:
        """SIGHUP: take what can change without losing the role; refuse the rest by name."""
        if self._member.settings.workload_forward_hup:
            self.signal_workload(signal.SIGHUP)
        self._supervisor.start("reload", self._reload.run(reread))

    def signal_workload(self, number: int) -> bool:
        """Pass a signal on to the command of ``exec``; whether it runs."""
        workload = self._member.role_runner.workload
        return workload is not None and workload.send_signal(number)

    # -- life -----------------------------------------------------------------------------------

    async def live(self, stop: asyncio.Event) -> int:
        """Run until the session is over; the exit code.

        Args:
            stop: set when somebody asks to stop.

        Raises:
            FailoverError: it could not be started, or the server cannot be used; demotion has been
                done before.
        """
        member = self._member
        member.notify.status(f"starting, not yet in group {member.settings.group}")
        member.stats.guard_fired = self._former.get("reason") == BY_GUARD
        self._failure = await self._state_publisher.write_first("starting")
        try:
            await self._end_former_life()
            self._supervisor.watch_loop()
            self._supervisor.start("stop signal", self._wait_for_stop(stop))
            self._supervisor.start("start", self._start())
            await self._run()
            self._show_stopping()
            if self._effects.escalated:
                await member.role_runner.fence()
            in_order = self._effects.exit_code is ExitCode.OK
            await member.role_runner.notifier.drain(LEFT_S if in_order else 0.0)
        finally:
            await self._let_go()
        if self._broken is not None:
            return ExitCode.TASK_FAILED
        failure = self._failure or member.requests.failure
        code = self._effects.exit_code
        if failure is not None and code is not ExitCode.DEMOTION_FAILED:
            if failure.exit_code is ExitCode.OTHER_STORE:
                failure.hint = (
                    "if the coordinator's data were made anew on purpose, remove"
                    f" {self._state_publisher.path} and start the agent again"
                )
            raise failure
        if self._task_has_failed and code is ExitCode.OK:
            code = ExitCode.TASK_FAILED  # too late to be the reason of the stop
        assert code is not None  # noqa: S101 - the loop ends by Exit or by a failure
        log.info("agent stopped", code=int(code), reason=code.name)
        return code or self._host_health.workload_status

    async def _end_former_life(self) -> None:
        """Kill what an agent that was killed together with its guard has left of its tenure."""
        for instance in former_instances(self._former):
            await self._member.role_runner.end_former_life(instance)

    async def _run(self) -> None:
        """The loop, with the one edge at which an exception of our own is caught."""
        try:
            begun = self._member.session.start(self._member.clock.boottime(), self._former_tenure)
            self._effects.perform(begun, self._member.session.lease_until)
            await self._turn_until_over()
        except Exception as error:  # the loop's edge: whatever it is, nobody keeps the lease now
            self._broken = error
            self._guard_control.freeze()
            log.exception("agent failed", action="leaving the demotion to the guard")
            if self._guard_control.owed and not self._guard_control.ready:
                await self._effects.demote_without_session()

    async def _start(self) -> None:
        """Bring up everything that may fail, while the first demotion runs (R6)."""
        try:
            if self._failure is None:
                await self._start_drivers()
        except FailoverError as error:
            self._failure = error
        finally:
            self._started.set()
            self._tell(Tick())  # it may be over now

    async def _start_drivers(self) -> None:
        member = self._member
        member.requests.use(await self._make_client())
        if self._start_probe is not None:
            member.role_runner.payloads.probe_url = await self._start_probe(self)
        if member.settings.mqtt is not None:
            self._announcer = announcer_of(member)
        await self._guard_control.start(self._host_health.guard_changed, self._claim)
        await self._host_health.start()
        if self._announcer is not None:
            self._announcer.start()
            self._effects.announcer = self._announcer
        self._state_publisher.write()  # it names the probe now
        log.info(
            "agent started",
            group=member.settings.group,
            session=member.session_id,
            endpoint=member.requests.endpoint,
            failover_timeout_s=member.session.timing.lease_s,
            state_file=self._state_publisher.path,
            probe=member.role_runner.payloads.probe_url,
        )

    async def _wait_for_start(self) -> bool:
        """Wait until the drivers are up; whether they are."""
        await self._started.wait()
        return self._failure is None

    async def _let_go(self) -> None:
        """Nothing of this session goes on after the exit; what is still owed is left to the guard."""
        if (
            self._broken is not None
        ):  # the guard acts when this process has ended: do not keep it waiting
            await self._guard_control.stop()
            return
        await self._supervisor.cancel_all()
        await self._host_health.stop()
        await self._guard_control.stop()
        member = self._member
        if not self._guard_control.owed:
            member.published = Published(
                member.published.role, member.published.epoch, STOPPED, member.published.since
            )
            await self._state_publisher.close()
        if self._announcer is not None:
            await self._announcer.stop()
        await member.requests.close()

    def close(self) -> None:
        """Give the hooks' process numbers back."""
        self._member.role_runner.close()

    async def _wait_for_stop(self, stop: asyncio.Event) -> None:
        await stop.wait()
        self._show_stopping()
        self._tell(Stop())

    def _show_stopping(self) -> None:
        """Tell systemd that the stop begins, and by when it has to be done, whatever its unit says."""
        notify, member = self._member.notify, self._member
        notify.stopping()
        notify.extend_timeout(longest_stop_s(member.settings, member.session.timing))

    # -- the loop -------------------------------------------------------------------------------

    def _tell(self, event: Event) -> None:
        self._inbox.put_nowait(event)

    def _task_failed(self, name: str, error: BaseException) -> None:
        """A background task has ended unexpectedly: end the tenure in order, then the process."""
        log.error("task failed", task=name, exc_info=error)
        self._task_has_failed = True
        self._tell(Stop(ExitCode.TASK_FAILED, f"the task {name!r} of the agent has failed"))

    def _is_over(self) -> bool:
        """Whether the session has ended, or will never begin: the first demotion is done then."""
        if self._effects.exit_code is not None:
            return True
        requests = self._member.requests
        failed = self._failure or (requests.failure and not requests.joined_once)
        started = self._member.session.phase is not Phase.STARTING
        return bool(failed) and started and not self._guard_control.owed

    async def _turn_until_over(self) -> None:
        member = self._member
        session, clock = member.session, member.clock
        clock.suspended_s()
        turned_at = clock.boottime()
        while not self._is_over():
            turn_s = self._turn_s
            due_s = min(turn_s, max(0.0, session.wake_at - clock.boottime()))
            event = await self._next(due_s)
            if self._is_over():  # a session that was refused does not leave: it may be another's
                break
            now = clock.boottime()
            late_s, turned_at = now - turned_at - turn_s, now
            member.stats.turned_at = now
            suspended_s = clock.suspended_s()
            if late_s > session.timing.margin_s or suspended_s > SUSPENDED_S:
                log.warning("this process was stopped", late_s=late_s, suspended_s=suspended_s)
                member.stats.stalled(suspended=suspended_s > SUSPENDED_S)
                self._step(Stalled(max(late_s, suspended_s)), now)
            self._show_life()
            self._step(event, clock.boottime())

    def _step(self, event: Event, now: float) -> None:
        lease_until = self._member.session.lease_until  # a step that demotes may give it back, too
        self._effects.perform(self._member.session.step(event, now), lease_until)

    @property
    def _turn_s(self) -> float:
        """At least this often the loop turns: half a margin, and half of what systemd asks for."""
        turn_s = self._member.session.timing.margin_s / 2
        watchdog_s = self._member.notify.watchdog_s
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
        member = self._member
        watchdog_s, now = member.notify.watchdog_s, member.clock.boottime()
        if watchdog_s is not None and now - self._shown_at >= watchdog_s / 4:
            self._shown_at = now  # not at each turn: the queue of the receiver is short
            member.notify.watchdog()
        self._guard_control.check()
