"""Carry out what the session wants, effect by effect, in the order in which it wants them.

Owns what each effect means on this host: which task starts, what is published and to whom. Whatever
waits is a task; an event stands for each one that dies. Decides nothing.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from agent.core.effects import (
    UNREQUESTED_DEMOTIONS,
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
)
from agent.core.events import Event, HeartbeatFailed, HeartbeatFailure, HookEnded, Left, Released
from agent.core.session import Phase
from agent.daemon.guard_control import GuardControl
from agent.daemon.host_health import HostHealth
from agent.daemon.member import Member, Published
from agent.daemon.state_publisher import StatePublisher
from agent.daemon.supervise import Supervisor
from agent.errors import ExitCode
from agent.model import Role
from agent.ops.logs import Log

if TYPE_CHECKING:
    from agent.drivers.mqtt import Announcer

EXIT_S = 2.0
"""How long the guard waits for the exit of an agent whose demotion, and fence command, have failed."""

LAST_RUN = -1
"""The number of the demotion that is run without the session."""

log = Log(__name__)


class EffectRunner:
    """The effects of one agent.

    Args:
        member: ``published`` is written here.
        tell: takes events.
        started: awaited before each request: whether the drivers of this host have come up.

    Attributes:
        exit_code: set by Exit.
        escalated: the demotion has failed, and what was left was killed (R4).
        announcer: tells an MQTT broker of each role; set when it has started.
    """

    def __init__(
        self,
        member: Member,
        state_publisher: StatePublisher,
        host_health: HostHealth,
        guard_control: GuardControl,
        supervisor: Supervisor,
        *,
        tell: Callable[[Event], None],
        started: Callable[[], Awaitable[bool]],
    ) -> None:
        self.exit_code: ExitCode | None = None
        self.escalated = False
        self.announcer: Announcer | None = None
        self._member = member
        self._state_publisher = state_publisher
        self._host_health = host_health
        self._guard_control = guard_control
        self._supervisor = supervisor
        self._tell = tell
        self._started = started
        self._joining: asyncio.Task[None] | None = None
        self._following = False

    def perform(self, effects: tuple[Effect, ...], lease_until: float) -> None:
        """Carry them out.

        Args:
            effects: in their order.
            lease_until: when the lease ended or ends that they are about, on CLOCK_BOOTTIME.
        """
        self._guard_control.update()  # before a hook starts that it would have to undo
        for effect in effects:
            self._perform(effect, lease_until)
        if effects:  # an idle turn has changed nothing that the guard was not told just now
            self._guard_control.update()
        self._state_publisher.write()

    def _perform(self, effect: Effect, lease_until: float) -> None:  # noqa: C901 - an arm an effect
        requests, role_runner, start = (
            self._member.requests,
            self._member.role_runner,
            self._supervisor.start,
        )
        match effect:
            case Publish():
                self._publish(effect, lease_until)
            case SendHeartbeat():
                lost = HeartbeatFailed(
                    effect.number, HeartbeatFailure.OTHER, "the heartbeat's task has failed"
                )
                start("heartbeat", requests.beat(effect.number), lost=lost)
            case StartHook():
                self._start_run(effect)
            case TermHook():
                role_runner.term(effect.run)
            case KillHook():
                role_runner.kill(effect.run)
            case Join():
                if self._joining is not None:
                    self._joining.cancel()
                self._joining = start("join", self._join())
            case Release():
                start("release", self._release(effect), lost=Released())
            case Leave():
                start("leave", self._leave(), lost=Left())
            case Escalate():
                self._escalate(effect.reason)
            case Exit():
                self.exit_code = effect.code

    # -- roles ----------------------------------------------------------------------------------

    def _publish(self, effect: Publish, lease_until: float) -> None:
        member = self._member
        if effect.before is Role.SECONDARY:
            self._host_health.begin_tenure()
        member.published = Published(effect.role, effect.epoch, effect.reason, member.clock.wall())
        member.stats.changed(effect)
        self._state_publisher.write()
        log.info(
            "role changed",
            group=member.settings.group,
            session=member.session_id,
            before=effect.before.value,
            after=effect.role.value,
            epoch=effect.epoch,
            reason=effect.reason,
        )
        member.notify.status(self._state_publisher.status)
        if self.announcer is not None:
            self.announcer.announce(member.published)
        self._host_health.set_primary(primary=effect.role is Role.PRIMARY)
        if effect.role is Role.SECONDARY and Role.SECONDARY not in member.role_runner.roles:
            # Readers of the state file know now, and there is nothing to run.
            self._demoted(lease_until)
        if effect.cause in UNREQUESTED_DEMOTIONS:
            self._advise("lost", effect.reason, effect.before)

    def _demoted(self, lease_until: float) -> None:
        """Measure how much of L is left after a demotion: less than 0 breaks the promise."""
        slack_s = lease_until - self._member.clock.boottime()
        log.info("demoted", epoch=self._member.published.epoch, demote_slack_s=slack_s)
        self._member.stats.demoted(slack_s)

    def _advise(self, event: str, reason: str, before: Role | None = None) -> None:
        """Run a notification hook (R10)."""
        member = self._member
        member.role_runner.notify(
            event,
            old_role=before or member.published.role,
            new_role=member.published.role,
            epoch=member.published.epoch,
            reason=reason,
            last_data=member.progress,
            previous_primary=member.session.previous_primary,
        )

    # -- hooks ----------------------------------------------------------------------------------

    def _start_run(self, effect: StartHook) -> None:
        member, facts = self._member, effect.facts
        last_data = facts.last_data
        if facts.role is Role.SECONDARY and member.progress is not None:
            last_data = member.progress
        run = member.role_runner.begin(effect.run, facts, last_data)

        async def begin() -> None:
            if facts.role is not Role.SECONDARY:
                await self._guard_control.set_promotion(facts)
            await (
                self._state_publisher.flushed()
            )  # what is published is published before its hook starts
            await run

        lost = HookEnded(effect.run, ok=False, why="the task of the hook has failed")
        self._supervisor.start("hook", begin(), lost=lost)
        if facts.role is Role.SECONDARY:
            self._host_health.mark("workload", None)

    def run_ended(self, event: HookEnded) -> None:
        """A run has ended; of a demotion the slack is measured."""
        session = self._member.session
        secondary = self._member.published.role is Role.SECONDARY
        if event.ok and session.guard_deadlines is not None and secondary:
            self._demoted(session.lease_until)
        self._tell(event)

    def _escalate(self, reason: str) -> None:
        """R4: the demotion failed; kill what is left, run the fence command, exit."""
        member = self._member
        log.error(
            "demotion failed",
            group=member.settings.group,
            session=member.session_id,
            epoch=member.published.epoch,
            reason=reason,
            action="killing the processes of the hooks and of the workload, then exiting without"
            " giving the role back",
        )
        self.escalated = True
        fence_s = member.settings.hook_limit if member.settings.fence_command else 0.0
        self._guard_control.fencing(fence_s + EXIT_S)
        member.role_runner.kill_all()

    async def demote_without_session(self) -> None:
        """Demote after the loop itself has failed and no guard answers: all that is left to do."""
        member = self._member
        demote_s = member.session.timing.demote_s
        before, epoch, reason = member.published.role, member.session.tenure, "the agent has failed"
        member.published = Published(Role.SECONDARY, epoch, reason, member.clock.wall())
        self._state_publisher.write()
        facts = HookFacts(Role.SECONDARY, before, epoch, reason, None, None, demote_s)
        try:
            async with asyncio.timeout(demote_s):
                await self._state_publisher.flushed()
                await member.role_runner.begin(LAST_RUN, facts, member.progress)
        except Exception:  # the killing below is all that is left to do
            log.exception("last demotion failed")
        if killing := member.role_runner.kill_all():
            await asyncio.wait(killing, timeout=EXIT_S)

    # -- requests -------------------------------------------------------------------------------

    async def _join(self) -> None:
        if not await self._started():
            return  # the loop ends as soon as the first demotion is done
        first = not self._member.requests.joined_once
        await self._member.requests.join()
        if self._member.requests.failure is not None:
            return
        self._member.notify.ready(self._state_publisher.status)
        self._advise("joined", "registered at the coordinator")
        if first and not self._following:
            self._following = True
            self._supervisor.start("follow", self._member.requests.follow(), endless=True)

    async def _release(self, effect: Release) -> None:
        member = self._member
        if not await self._started():
            self._tell(Released())
            return
        written = await self._state_publisher.flushed(member.session.timing.request_timeout_s)
        if not written and Role.SECONDARY not in member.role_runner.roles:
            # Nothing but the state file tells the workload that it is not active any more.
            log.warning("role not given back, its lease will end", reason="state file not written")
            self._tell(Released())
            return
        await member.requests.release(effect)
        self._state_publisher.released()

    async def _leave(self) -> None:
        if self._joining is not None:
            self._joining.cancel()  # it would register again after the session was deleted
        if await self._started():
            await self._member.requests.leave(self._left)
        else:
            self._tell(Left())

    def _left(self) -> None:
        if self._member.session.phase is Phase.LEAVING:
            self._advise("left", "stopping")
