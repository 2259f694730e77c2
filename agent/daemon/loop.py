"""The agent's loop: one inbox, one caller of ``Session.step``, one timer.

It takes the drivers' events from the inbox, steps the session with each, and has the effects carried out
in their order. It decides nothing itself. It iterates at least every half margin: if it was late by more
than the margin, or the host was suspended, it steps the session with Stalled first (R2). Only a loop that
iterates notifies systemd and the watchdog device.

It never calls or awaits anything that can block. The first demotion (R6) begins before any other step that can
fail; the drivers start while it runs, and the first request waits for both. If this loop fails while
something is promoted, the guard stays armed and acts as soon as the process has ended.
"""

import asyncio
import random
import secrets
import signal
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from agent.core.events import Event, Stalled, Stop, Tick
from agent.core.session import Phase, Session
from agent.daemon.credential_files import CredentialFiles
from agent.daemon.effect_runner import EffectRunner
from agent.daemon.guard_control import BY_GUARD, GuardControl
from agent.daemon.host_health import HostHealth
from agent.daemon.member import Member, Published, build_announcer, build_options
from agent.daemon.previous_state import (
    previous_processes,
    previous_store,
    previous_tenure,
    read_previous,
)
from agent.daemon.reload import Reload
from agent.daemon.requests import Requests
from agent.daemon.role_runner import RoleRunner
from agent.daemon.state_publisher import STOPPED, StatePublisher, refused_times, take_snapshot
from agent.daemon.stop_budget import LEFT_HOOK_S, longest_stop_s
from agent.daemon.supervise import Supervisor
from agent.daemon.telemetry import Snapshot, Stats
from agent.daemon.tenure_processes import check_visibility
from agent.drivers.rest import RestClient
from agent.drivers.statefile import StateFile
from agent.errors import ExitCode, FailoverError
from agent.model import Role
from agent.ops.clock import Clock
from agent.ops.logs import Log
from agent.ops.sd_notify import Notify
from agent.schema.settings import AgentSettings

if TYPE_CHECKING:
    from agent.daemon.failsafe import LoadAccess
    from agent.drivers.mqtt import Announcer

INBOX_SIZE = 512
"""Bound of the inbox: over twice what MAX_IN_FLIGHT heartbeats, MAX_QUESTIONS questions and a few other tasks post."""

SUSPENDED_S = 0.05
"""If boot time and monotonic time differ by more than this, the host was suspended; less is noise."""

log = Log(__name__)


class Daemon:
    """One agent. ``run`` runs it to its end.

    Args:
        settings: checked, with usable hooks.
        session_id: of this member.
        make_client: opens the client; raises ConfigError.
        state_file: locked by this process.
        start_probe: starts the local HTTP server and returns its URL, or None without one; raises
            ConfigError.
        load_failsafe: loads the secret and the certificates of failsafe.
        credentials: watches the files with credentials, once they are loaded.
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
        load_failsafe: "LoadAccess | None" = None,
        credentials: CredentialFiles | None = None,
    ) -> None:
        self._make_client = make_client
        self._start_probe = start_probe
        self._load_failsafe = load_failsafe
        self._credentials = credentials or CredentialFiles()
        self._claim = state_file.claim
        self._inbox: asyncio.Queue[Event | None] = asyncio.Queue(INBOX_SIZE)
        self._started = asyncio.Event()
        self._start_failure: FailoverError | None = None
        self._loop_error: BaseException | None = None
        self._task_has_failed = False
        self._announcer: Announcer | None = None
        self._supervisor = Supervisor(self._post_event, self._task_failed)
        self._previous_state = previous = read_previous(state_file)
        clock, stats, instance = clock or Clock(), Stats(), secrets.token_hex(8)
        role_runner = RoleRunner(
            settings,
            session_id,
            state_file.path,
            clock,
            stats,
            instance=instance,
            on_ended=lambda event: self._effects.on_hook_ended(event),  # noqa: PLW0108 - made below
            on_groups_changed=lambda: self._effects.on_groups_changed(),  # noqa: PLW0108 - as above
            on_workload_ended=lambda status: self._host_health.on_workload_ended(status),  # noqa: PLW0108 - as above
        )
        role_runner.leftover.follow(*previous_processes(previous))
        jitter = random.random()  # noqa: S311 - spreads heartbeats, guards nothing
        store = previous_store(previous)
        options = build_options(settings, session_id, role_runner, jitter, store)
        session = Session(settings.timing, options)
        requests = Requests(
            settings,
            session,
            self._post_event,
            lambda: self._host_health.heartbeat_content(),  # noqa: PLW0108 - as above
            instance=instance,
            stats=stats,
            clock=clock,
        )
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
            published=Published(Role.SECONDARY, None, "starting", clock.wall()),
        )
        self._previous_tenure = previous_tenure(previous, role_runner.demotion_hook)
        self._state_publisher = StatePublisher(
            member, state_file, self._previous_tenure, previous, self._post_event
        )
        self._host_health = HostHealth(member, self._post_event)
        self.report_progress = self._host_health.report_progress
        self._state_publisher.score = self._host_health.score
        self._state_publisher.unfit_reason = self._host_health.unfit_reason
        self._guard_control = GuardControl(member, self._state_publisher.own_state, state_file.path)
        self._effects = EffectRunner(
            member,
            self._state_publisher,
            self._host_health,
            self._guard_control,
            self._supervisor,
            post_event=self._post_event,
            started=self._wait_for_start,
        )
        self._reload = Reload(
            member,
            self._host_health,
            self._credentials,
            options=lambda settings: build_options(
                settings, session_id, role_runner, jitter, session.store_id
            ),
            status=lambda: self._state_publisher.status,
        )

    # -- the local HTTP server and signals --------------------------------------------------------

    def describe(self) -> dict[str, Any]:
        """The content of the state file and of the probe's /status."""
        return self._state_publisher.describe()

    def snapshot(self) -> Snapshot:
        """A snapshot for probes and metrics."""
        host_health, announcer = self._host_health, self._announcer
        return take_snapshot(
            self._member,
            loop_interval_s=self._loop_interval_s,
            unfit=host_health.unfit,
            score=host_health.score(),
            checks=host_health.checks_up,
            guard_up=None if not self._guard_control.enabled else "guard" not in host_health.unfit,
            refused=refused_times(host_health.source, self._member.stats.future_refused),
            mqtt_up=None if announcer is None else announcer.up,
            mqtt_failures=0 if announcer is None else announcer.failures,
            failsafe=None if self._effects.failsafe is None else self._effects.failsafe.snapshot(),
        )

    def reload(self, reread: Callable[[], AgentSettings]) -> None:
        """SIGHUP: apply the settings that can change without losing the role; refuse the rest."""
        if self._member.settings.workload_forward_hup:
            self.signal_workload(signal.SIGHUP)
        self._supervisor.start("reload", self._reload.run(reread))

    def signal_workload(self, number: int) -> bool:
        """Pass a signal on to the command of ``exec``; return whether it runs."""
        workload = self._member.role_runner.workload
        return workload is not None and workload.send_signal(number)

    # -- start and shutdown -----------------------------------------------------------------------

    async def run(self, stop: asyncio.Event) -> int:
        """Run until the session has ended; return the exit code.

        Args:
            stop: set to request a stop.

        Raises:
            FailoverError: the agent cannot start, or cannot use the server; it has demoted before.
        """
        member = self._member
        member.notify.status(f"starting, not yet in group {member.settings.group}")
        member.stats.guard_fired = self._previous_state.get("reason") == BY_GUARD
        self._start_failure = await self._state_publisher.write_first("starting")
        hidden = await check_visibility()
        if hidden is not None and not self._previous_state:
            member.role_runner.leftover.forget()  # none is known; the start fails nevertheless
        self._start_failure = self._start_failure or hidden
        try:
            await member.role_runner.leftover.kill()
            self._supervisor.watch_loop()
            self._supervisor.start("stop signal", self._wait_for_stop(stop))
            self._supervisor.start("start", self._start())
            await self._run_session()
            self._notify_stopping()
            if self._effects.escalated:
                await member.role_runner.run_fence_command()
            in_order = self._effects.exit_code is ExitCode.OK
            await member.role_runner.notifier.drain(LEFT_HOOK_S if in_order else 0.0)
        finally:
            await self._shut_down()
        if self._loop_error is not None:
            return ExitCode.DEMOTION_FAILED if self._effects.escalated else ExitCode.TASK_FAILED
        failure = self._start_failure or member.requests.failure
        code = self._effects.exit_code
        if failure is not None and code is not ExitCode.DEMOTION_FAILED:
            raise self._state_publisher.with_hint(failure)
        if self._task_has_failed and code is ExitCode.OK:
            code = ExitCode.TASK_FAILED  # it failed during the stop
        assert code is not None  # noqa: S101 - the loop ends by Exit or by a failure
        log.info("agent stopped", code=int(code), reason=code.name)
        return code or self._host_health.workload_status

    async def _run_session(self) -> None:
        """Start the session and run the loop; the only place that catches an unexpected exception."""
        try:
            begun = self._member.session.start(self._member.clock.boottime(), self._previous_tenure)
            self._effects.perform(begun, self._member.session.lease_until)
            await self._run_loop()
        except Exception as error:  # the task's edge: nothing renews the lease after this
            self._loop_error = error
            self._guard_control.frozen = True
            log.exception("agent failed", action="leaving the demotion to the guard")
            if self._guard_control.demotion_is_owed and not self._guard_control.ready:
                await self._effects.demote_without_session()

    async def _start(self) -> None:
        """Start the drivers, while the first demotion runs (R6)."""
        try:
            if self._start_failure is None:
                await self._start_drivers()
        except FailoverError as error:
            self._start_failure = error
        finally:
            self._started.set()
            self._post_event(Tick())  # the loop checks whether the start has failed

    async def _start_drivers(self) -> None:
        member = self._member
        member.requests.set_client(await self._make_client())
        if self._start_probe is not None:
            member.role_runner.payloads.probe_url = await self._start_probe(self)
        await self._effects.start_failsafe(self._load_failsafe)
        if member.settings.mqtt is not None:
            self._announcer = build_announcer(member)
        await self._guard_control.start(self._host_health.on_guard_changed, self._claim)
        await self._host_health.start()
        if self._announcer is not None:
            self._announcer.start()
            self._effects.announcer = self._announcer
        self._state_publisher.write()  # with the probe's URL
        self._supervisor.start("credential files", self._credentials.follow(), endless=True)
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
        """Wait until the drivers have started, or one has failed; return whether they have started."""
        await self._started.wait()
        return self._start_failure is None

    async def _shut_down(self) -> None:
        """End every part; leave a demotion that has not succeeded to the guard."""
        if self._loop_error is not None:  # exit quickly: the guard acts when this process has ended
            await self._guard_control.stop()
            return
        await self._effects.stop_failsafe()
        await self._supervisor.cancel_all()
        await self._host_health.stop()
        await self._guard_control.stop()
        member = self._member
        if not self._guard_control.demotion_is_owed:
            member.published = replace(member.published, reason=STOPPED)
            await self._state_publisher.close()
        if self._announcer is not None:
            await self._announcer.stop()
        await member.requests.close()

    def close(self) -> None:
        """Release the handles of the hooks' processes."""
        self._member.role_runner.close()

    async def _wait_for_stop(self, stop: asyncio.Event) -> None:
        await stop.wait()
        self._notify_stopping()
        self._post_event(Stop())

    def _notify_stopping(self) -> None:
        """Notify systemd that the stop begins, and extend its timeout, whatever its unit configures."""
        notify, member = self._member.notify, self._member
        notify.stopping()
        notify.extend_timeout(longest_stop_s(member.settings, member.session.timing))

    # -- the loop -------------------------------------------------------------------------------

    def _post_event(self, event: Event) -> None:
        self._inbox.put_nowait(event)

    def _task_failed(self, name: str, error: BaseException) -> None:
        """Stop in order after a background task has failed."""
        log.error("task failed", task=name, exc_info=error)
        self._task_has_failed = True
        self._post_event(Stop(ExitCode.TASK_FAILED, f"the task {name!r} of the agent has failed"))

    def _has_ended(self) -> bool:
        """Whether the session has ended, or the start has failed and the first demotion is done."""
        if self._effects.exit_code is not None:
            return True
        requests = self._member.requests
        failed = self._start_failure or (requests.failure and not requests.joined_once)
        started = self._member.session.phase is not Phase.STARTING
        return bool(failed) and started and not self._guard_control.demotion_is_owed

    async def _run_loop(self) -> None:
        member = self._member
        session, clock = member.session, member.clock
        clock.suspended_s()
        loop_ran_at = clock.boottime()
        while not self._has_ended():
            loop_interval_s = self._loop_interval_s
            event = await self._next_event(min(loop_interval_s, session.wake_at - clock.boottime()))
            if self._has_ended():  # a refused session is not deleted: it may be another agent's
                break
            now = clock.boottime()
            late_s, loop_ran_at = now - loop_ran_at - loop_interval_s, now
            member.stats.loop_ran_at = now
            suspended_s = clock.suspended_s()
            if late_s > session.timing.margin_s or suspended_s > SUSPENDED_S:
                log.warning("process stalled", late_s=late_s, suspended_s=suspended_s)
                member.stats.record_stall(suspended=suspended_s > SUSPENDED_S)
                self._step(Stalled(max(late_s, suspended_s)), now)
            member.notify.watchdog()
            self._guard_control.check()
            self._step(event, clock.boottime())

    def _step(self, event: Event | None, now: float) -> None:
        """Step the session with an event, or with a Tick if one is due; then carry out its effects."""
        session = self._member.session
        lease_until = session.lease_until  # a step that demotes may clear it
        if event is not None or now >= session.wake_at:
            self._effects.perform(session.step(event or Tick(), now), lease_until)
        else:
            self._effects.refresh(now)

    @property
    def _loop_interval_s(self) -> float:
        """The longest interval of the loop: half a margin, and half of systemd's watchdog interval."""
        loop_interval_s = self._member.session.timing.margin_s / 2
        watchdog_s = self._member.notify.watchdog_s
        return min(loop_interval_s, watchdog_s / 2) if watchdog_s is not None else loop_interval_s

    async def _next_event(self, due_s: float) -> Event | None:
        timer = asyncio.get_running_loop().call_later(due_s, self._wake)
        try:
            return await self._inbox.get()
        finally:
            timer.cancel()

    def _wake(self) -> None:
        if self._inbox.empty():  # else an event wakes the loop anyway, and the inbox may be full
            self._inbox.put_nowait(None)
