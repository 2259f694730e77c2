"""Carry out the effects of the session, in their order.

Owns what each effect does on this host: which task starts, what is published and where. Everything that waits
is a task; if a task fails, its event is posted nevertheless. Decides nothing.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from agent.core.effects import (
    UNREQUESTED_DEMOTIONS,
    Ask,
    Effect,
    Escalate,
    Exit,
    HookFacts,
    Join,
    KillHook,
    Leave,
    Publish,
    Release,
    SendHeartbeat,
    StartHook,
    TermHook,
    Vote,
)
from agent.core.events import (
    Answered,
    Asked,
    Event,
    HeartbeatFailed,
    HeartbeatFailure,
    HookEnded,
    Left,
    Released,
)
from agent.core.executor import RETRY_SHARE
from agent.core.session import Phase
from agent.daemon.failsafe_report import FailsafeLog
from agent.daemon.guard_control import GuardControl
from agent.daemon.host_health import HostHealth
from agent.daemon.member import Member, Published
from agent.daemon.state_publisher import StatePublisher
from agent.daemon.supervise import Supervisor
from agent.errors import ExitCode
from agent.model import Role
from agent.ops.logs import Log

if TYPE_CHECKING:
    from agent.daemon.failsafe import Failsafe, LoadAccess
    from agent.drivers.mqtt import Announcer

EXIT_S = 2.0
"""How long the guard waits for the exit of an agent after a failed demotion and its fence command."""

REFRESH_S = 2.0
"""The longest interval between two publications. Processes that the guard has to know are reported at once."""

RUN_WITHOUT_SESSION = -1
"""The run number of the demotion without the session."""

log = Log(__name__)


@dataclass(slots=True, eq=False)
class EffectRunner:
    """Carries out the effects of one agent.

    Attributes:
        member: ``published`` is written here.
        post_event: puts an event into the inbox.
        started: awaited before each request; returns whether the drivers of this host have started.
        exit_code: set by the effect Exit.
        escalated: whether the demotion has failed, and the processes of the tenure were killed (R4).
        announcer: publishes each role to an MQTT broker; set when it has started.
        failsafe: asks the other members; set when its listener has started, if it is configured.
    """

    member: Member
    state_publisher: StatePublisher
    host_health: HostHealth
    guard_control: GuardControl
    supervisor: Supervisor
    post_event: Callable[[Event], None]
    started: Callable[[], Awaitable[bool]]
    exit_code: ExitCode | None = None
    escalated: bool = False
    announcer: "Announcer | None" = None
    failsafe: "Failsafe | None" = None
    _joining: asyncio.Task[None] | None = None
    _following: bool = False
    _refresh_at: float = float("-inf")
    _hooked: bool = True  # whether the tenure has a demotion hook or a workload to stop, whatever a reload changes
    _failsafe_log: FailsafeLog = field(default_factory=FailsafeLog)

    def perform(self, effects: tuple[Effect, ...], lease_until: float) -> None:
        """Carry effects out, in their order.

        Args:
            effects: of one step.
            lease_until: the end of the lease before that step, on CLOCK_BOOTTIME.
        """
        self._refresh_at = self.member.clock.boottime() + REFRESH_S
        self.guard_control.update()  # the guard has to know a hook before it starts, to undo it
        for effect in effects:
            self._perform(effect, lease_until)
        if effects:  # without effects, nothing has changed since the update above
            self.guard_control.update()
        self.state_publisher.write()
        if self.member.requests.joined_once:
            self.member.notify.status(self.state_publisher.status)
        self._log_failsafe()

    def refresh(self, now: float) -> None:
        """Publish anew if nothing has been published for ``REFRESH_S``. ``now`` is on CLOCK_BOOTTIME."""
        if now >= self._refresh_at:
            self.perform((), self.member.session.lease_until)

    def _perform(self, effect: Effect, lease_until: float) -> None:  # noqa: C901 - one arm for each effect
        member, start = self.member, self.supervisor.start
        requests, role_runner = member.requests, member.role_runner
        match effect:
            case Publish():
                self._publish(effect, lease_until)
            case SendHeartbeat():
                failed = HeartbeatFailed(
                    effect.number, HeartbeatFailure.OTHER, "the heartbeat's task has failed"
                )
                start("heartbeat", requests.send_heartbeat(effect), failure_event=failed)
            case Ask():
                failure_event = Answered(
                    effect.nonce, yes=False, why="the question's task has failed"
                )
                start("question", self._ask(effect), failure_event=failure_event)
            case StartHook():
                self._start_hook(effect)
            case TermHook():
                role_runner.terminate(effect.run)
            case KillHook():
                role_runner.kill(effect.run)
            case Join():
                if self._joining is not None:
                    self._joining.cancel()
                self._joining = start("join", self._join())
            case Release():
                start("release", self._release(effect), failure_event=Released())
            case Leave():
                start("leave", self._leave(), failure_event=Left())
            case Escalate():
                self._escalate(effect.reason)
            case Exit():
                self.exit_code = effect.code

    # -- failsafe -------------------------------------------------------------------------------

    async def start_failsafe(self, load: "LoadAccess | None") -> None:
        """Listen for the questions of other members, if failsafe is configured. Raises ConfigError."""
        if self.member.settings.failsafe_listen is not None and load is not None:
            from agent.daemon.failsafe import start_failsafe  # noqa: PLC0415 - saves memory where it is off

            self.failsafe = await start_failsafe(
                self.member, load, vote=self.vote, post_event=self.post_event
            )

    async def stop_failsafe(self) -> None:
        """Stop listening. May be called without a start."""
        if self.failsafe is not None:
            await self.failsafe.stop()

    def vote(self, asked: Asked) -> Vote:
        """Answer the question of another member; refuse it if an earlier step of the session has failed."""
        if self.guard_control.frozen:
            return Vote(yes=False, why="the agent has failed")
        session = self.member.session
        lease_until = session.lease_until
        try:
            vote, effects = session.vote(asked, self.member.clock.boottime())
            self.perform(effects, lease_until)
        except Exception as error:  # noqa: BLE001 - reported: the agent stops, not just this request
            self.supervisor.report_failure("vote", error)
            return Vote(yes=False, why="the agent has failed")
        return vote

    async def _ask(self, effect: Ask) -> None:
        assert self.failsafe is not None  # noqa: S101 - it has started before the join
        await self.failsafe.ask(effect)

    def _log_failsafe(self) -> None:
        session = self.member.session
        if session.options.failsafe is not None:
            self._failsafe_log.on_step(
                self.state_publisher.failsafe_view,
                self.member.clock.boottime(),
                tenure=session.tenure if session.role is not Role.SECONDARY else None,
                end=self.member.published.reason,
                settle_s=session.timing.renew_s,
            )

    # -- roles ----------------------------------------------------------------------------------

    def _publish(self, effect: Publish, lease_until: float) -> None:
        member = self.member
        if effect.before is Role.SECONDARY:
            self._hooked = Role.SECONDARY in member.role_runner.roles
            self.host_health.begin_tenure()
        member.published = Published(effect.role, effect.epoch, effect.reason, member.clock.wall())
        member.stats.record_role_change(effect)
        self.state_publisher.write()
        log.info(
            "role changed",
            group=member.settings.group,
            session=member.session_id,
            before=effect.before.value,
            after=effect.role.value,
            epoch=effect.epoch,
            reason=effect.reason,
        )
        if self.announcer is not None:
            self.announcer.announce(member.published)
        self.host_health.set_primary(primary=effect.role is Role.PRIMARY)
        if effect.role is Role.SECONDARY and not self._hooked:
            # The role is published, and there is no hook to run.
            self._record_demotion(lease_until)
        if effect.cause in UNREQUESTED_DEMOTIONS:
            self._run_notification_hook("lost", effect.reason, effect.before)

    def _record_demotion(self, lease_until: float) -> None:
        """Record how much of L is left after a demotion; below 0, two members may have been active."""
        slack_s = lease_until - self.member.clock.boottime()
        log.info("demoted", epoch=self.member.published.epoch, demote_slack_s=slack_s)
        self.member.stats.record_demotion(slack_s)

    def _run_notification_hook(self, event: str, reason: str, before: Role | None = None) -> None:
        """Queue a notification hook (R10)."""
        member, role_runner = self.member, self.member.role_runner
        payload = role_runner.payloads.build(
            event=event,
            old_role=before or member.published.role,
            new_role=member.published.role,
            epoch=member.published.epoch,
            reason=reason,
            last_data=member.progress,
            deadline_s=role_runner.notifier.limit_s,
            previous_primary=member.session.previous_primary,
        )
        role_runner.notifier.put(event, payload)

    # -- hooks ----------------------------------------------------------------------------------

    def _start_hook(self, effect: StartHook) -> None:
        member, facts = self.member, effect.facts
        last_data = facts.last_data
        if facts.role is Role.SECONDARY and member.progress is not None:
            last_data = member.progress
        run = member.role_runner.start_run(effect.run, facts, last_data)

        async def begin() -> None:
            promotes = facts.role is not Role.SECONDARY
            if promotes and not await self.guard_control.send_demotion_hook(facts):
                member.role_runner.terminate(effect.run)  # before its hook has started
            await self.state_publisher.flush()  # publish before the hook starts
            await run

        failure_event = HookEnded(effect.run, ok=False, why="the task of the hook has failed")
        self.supervisor.start("hook", begin(), failure_event=failure_event)
        if facts.role is Role.SECONDARY:
            self.host_health.set_unfit_reason("workload", None)

    def on_hook_ended(self, event: HookEnded) -> None:
        """Post the end of a run; record the slack of a demotion. Ignores runs that the session has not requested."""
        if event.run == RUN_WITHOUT_SESSION:
            return
        session = self.member.session
        secondary = self.member.published.role is Role.SECONDARY
        if event.ok and session.guard_deadlines is not None and secondary:
            self._record_demotion(session.lease_until)
        self.post_event(event)

    def on_groups_changed(self) -> None:
        """Report the processes of the tenure to the guard, and to the next process of this member.

        Not after a failed step: the same failure would end the demotion without the session.
        """
        if not self.guard_control.frozen:
            self.guard_control.update()
            self.state_publisher.write()

    def _escalate(self, reason: str) -> None:
        """Handle a failed demotion (R4): kill what is left, run the fence command, exit."""
        member = self.member
        log.error(
            "demotion failed",
            group=member.settings.group,
            session=member.session_id,
            epoch=member.published.epoch,
            reason=reason,
            action="killing the processes of the hooks and of the workload, then exiting without"
            " releasing the role",
        )
        self.escalated = True
        fence_s = member.settings.hook_limit if member.settings.fence_command else 0.0
        self.guard_control.allow_fencing(fence_s + EXIT_S)
        member.role_runner.kill_all()

    async def demote_without_session(self) -> None:
        """Demote after the loop itself has failed and no guard answers.

        What made the loop fail may fail here, too. That must not prevent the demotion hook, nor the killing.
        """
        role_runner, clock = self.member.role_runner, self.member.clock
        begun_at, budget_s = clock.boottime(), self.member.session.timing.demote_s
        left_s = self.guard_control.kill_at - begun_at
        # The hook has at least half of D, even past ``kill_at``, since the tenure is killed at that moment, or now.
        if left_s > 0:
            budget_s = min(budget_s, max(left_s, budget_s / 2))
        loop = asyncio.get_running_loop()
        loop.call_later(max(0.0, left_s), lambda: role_runner.kill_all(hooks=False))
        self.escalated = True
        try:
            async with asyncio.timeout(budget_s):
                facts = self._publish_failure(budget_s)
                await role_runner.end_runs(budget_s / 2)
                await self.state_publisher.flush()
                while self.escalated:
                    facts = replace(facts, limit_s=begun_at + budget_s - clock.boottime())
                    self.escalated = not await self._run_without_session(facts)
                    await asyncio.sleep(RETRY_SHARE * budget_s if self.escalated else 0.0)
        except Exception:
            log.exception("demotion without the session failed")
        if killing := role_runner.kill_all():
            await asyncio.wait(killing, timeout=EXIT_S)

    async def _run_without_session(self, facts: HookFacts) -> bool:
        """Run the demotion hook once; return whether it has succeeded. Shielded: ``kill_all`` would not find a cancelled run."""
        try:
            role_runner, last_data = self.member.role_runner, self.member.progress
            run = role_runner.start_run(RUN_WITHOUT_SESSION, facts, last_data)
            return await asyncio.shield(run)
        except Exception:
            log.exception("demotion hook without the session failed")
            return False

    def _publish_failure(self, demote_s: float) -> HookFacts:
        """Publish the demotion without the session, if that is possible; return the facts for its hook."""
        member = self.member
        before, epoch, reason = member.published.role, member.session.tenure, "the agent has failed"
        try:
            member.notify.stopping()  # after this, systemd does not wait for the watchdog's next answer
            member.notify.extend_timeout(demote_s + EXIT_S)
            member.published = Published(Role.SECONDARY, epoch, reason, member.clock.wall())
            self.state_publisher.write()
        except Exception:
            log.exception("demotion without the session not published")
        return HookFacts(Role.SECONDARY, before, epoch, reason, None, None, demote_s)

    # -- requests -------------------------------------------------------------------------------

    async def _join(self) -> None:
        if not await self.started():
            return  # the start has failed: the loop ends after the first demotion
        first = not self.member.requests.joined_once
        await self.member.requests.join()
        if self.member.requests.failure is not None:
            return
        self.member.notify.ready(self.state_publisher.status)
        self._run_notification_hook("joined", "registered at the coordinator")
        if first and not self._following:
            self._following = True
            self.supervisor.start("follow", self.member.requests.follow_status(), endless=True)

    async def _release(self, effect: Release) -> None:
        member = self.member
        if not await self.started():
            self.post_event(Released())
            return
        written = await self.state_publisher.flush(member.session.timing.request_timeout_s)
        if not written and not self._hooked:
            # Without a hook, only the state file makes the workload inactive.
            log.warning("role not released, its lease will expire", reason="state file not written")
            self.post_event(Released())
            return
        self._failsafe_log.on_release(effect)
        await member.requests.release(effect)
        self.state_publisher.on_released()

    async def _leave(self) -> None:
        if self._joining is not None:
            self._joining.cancel()  # it would register again after the deletion
        if await self.started():
            await self.member.requests.leave(self._left)
        else:
            self.post_event(Left())

    def _left(self) -> None:
        if self.member.session.phase is Phase.LEAVING:
            self._run_notification_hook("left", "stopping")
