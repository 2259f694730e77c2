"""One host of a simulated world: the agent's daemon in small, around the real session.

Owns the agent's life and death, its tasks, its requests and its state file. What it runs is in
``processes``, its guard in ``guards``.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from agent.core.effects import (
    Ask,
    Effect,
    Escalate,
    Exit,
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
    Asked,
    Event,
    FitnessChanged,
    HeartbeatAnswered,
    HeartbeatFailed,
    HeartbeatFailure,
    HookEnded,
    Joined,
    Left,
    Released,
    Stalled,
    StatusRead,
    Stop,
    Tick,
)
from agent.core.failsafe_view import Readiness
from agent.core.group_state import AddSession, Input, ReceiveHeartbeat, ReleaseRole, RemoveSession
from agent.core.options import FailsafeOptions
from agent.core.roles import TRANSITIONS
from agent.core.session import Options, Phase, PreviousTenure, Session
from agent.errors import ExitCode, NotFound, RequestRefused, TooSoon
from agent.model import GroupStatus, HeartbeatAnswer, Member, Role, SessionConfig

from .defects import Defect
from .guards import Guard
from .network import Clock, Net
from .processes import HookNature, Processes
from .world import EPOCH_OF_WALL

if TYPE_CHECKING:
    from .coordinator import CoordinatorHost
    from .world import World

ALL_HOOKS = frozenset(Role)

CLAIM_S = 0.05
"""Poll interval of a start that waits for the previous agent's guard to exit."""

GREATEST_EPOCH = 2**53 - 1
"""The largest epoch that the API accepts; a larger one is refused before any decision."""

TASKS = ("join", "follow", "beat", "release", "leave", "reload")


@dataclass
class StateFile:
    """The part of an agent's state that survives it on its host.

    Attributes:
        unreleased: the tenure that it held, until it has given that back itself.
        owes_demotion: a promotion was begun, and nobody has demoted yet.
        store_id: the store that it has met.
    """

    unreleased: PreviousTenure | None = None
    owes_demotion: bool = False
    store_id: str | None = None


class AgentHost:
    """One host: the agent's daemon in small, its hooks and its workload."""

    def __init__(
        self,
        world: "World",
        name: str,
        *,
        clock: Clock | None = None,
        nature: HookNature | None = None,
        net: Net | None = None,
        score: float = 100.0,
        hooks: frozenset[Role] = ALL_HOOKS,
        session_id: str | None = None,
    ) -> None:
        self.world = world
        self.name = name
        self.session_id = session_id or name
        self.failsafe = world.failsafe
        """Whether its agent takes part in failsafe, from its next start on."""
        self.clock = clock or Clock()
        self.nature = nature or HookNature()
        self.nets = [net or Net(), *(Net() for _ in world.coordinators[1:])]
        self.endpoint = 0
        self.score = score
        self.hooks_present = hooks
        self.up = False
        self.frozen = False
        self.agent_frozen = False
        self.blocked = False
        self.doomed = False
        """Its agent was killed, but is still stuck in the kernel."""
        self.stale = False
        """It was frozen beyond its lease, and has not demoted yet."""
        self.orphaned = False
        """Neither agent nor guard could act in time, and nobody has demoted yet."""
        self.life = 0
        self.wake_at = float("inf")
        """When its session wants to be called next, as of the last call."""
        self.backlog: list[tuple[Event, int]] = []
        self.frozen_at = 0.0
        self.restart_after_s: float | None = None
        self.exits: list[ExitCode] = []
        self.unfitness: dict[str, str] = {}
        self.registrations = 0
        """Of this process."""
        self.failing_starts = 0
        self.stops_confirming = False
        """It gets a stop right after its next confirming heartbeat."""
        self.dying: list[str] = []
        self.state_file = StateFile()
        self.tenure: tuple[int, str] | None = None
        self.readiness = Readiness.OFF
        self.runs = Processes(self, self.run_ended)
        self.guard = Guard(self)
        self.session: Session

    # -- read by others --------------------------------------------------------------------

    @property
    def is_active(self) -> bool:
        """Whether its workload may be active, in the sense of the promise."""
        return self.runs.active and not self.frozen and not self.stale and not self.orphaned

    @property
    def works(self) -> bool:
        """Whether its agent's loop runs."""
        return self.up and not self.frozen and not self.agent_frozen and not self.blocked

    @property
    def net(self) -> Net:
        return self.nets[0]

    @net.setter
    def net(self, net: Net) -> None:
        self.nets[0] = net

    @property
    def coordinator(self) -> "CoordinatorHost":
        """The coordinator that it currently asks."""
        return self.world.coordinators[self.endpoint]

    @property
    def instance(self) -> str:
        return f"{self.name}#{self.life}"

    @property
    def member(self) -> Member:
        """It as a member of a failsafe group."""
        return Member(self.session_id, f"http://{self.name}")

    def local(self) -> float:
        return self.clock.local(self.world.now)

    # -- start, stop and faults -------------------------------------------------------------------------

    def start(self) -> None:
        """Start an agent, once the previous one and its guard can no longer act."""
        if self.up:
            return
        if self.guard.claims:
            self.world.after(CLAIM_S, self.start)
            return
        if self.failing_starts and Defect.STARTS_BEFORE_IT_DEMOTES in self.world.defects:
            self.failing_starts -= 1
            self.world.record(self.name, "cannot start")
            self.process_ends()
            if self.runs.active:
                self.world.broken(f"{self.name} left a workload")
            return
        self.up = True
        self.frozen = self.agent_frozen = self.blocked = self.doomed = self.stale = False
        self.life += 1
        self.endpoint = self.registrations = 0
        self.backlog.clear()
        self.dying.clear()
        self.unfitness.clear()
        self.runs.new_life()
        self.guard.begin()
        self.runs.kill_leftovers()  # of an agent that was killed together with its guard
        options = self.options(self.world.rng.random())
        if self.state_file.owes_demotion:  # with the hook of that promotion
            options = replace(options, hooks=options.hooks | {Role.SECONDARY})
        self.session = self.world.session_class(self.world.timing, options)
        self.revision = -1
        self.world.record(self.name, "starts")
        self.begin_session()
        if not self.world.plain_v1:
            self.follow(self.life)

    def begin_session(self) -> None:
        """Begin the first demotion (R6); the previous process's tenure is released after it."""
        former = None if self.world.plain_v1 else self.state_file.unreleased
        self.perform(self.session.start(self.local(), former))

    def options(self, jitter: float) -> Options:
        """The current settings, and the store id that is remembered over a restart."""
        return Options(
            session_id=self.session_id,
            hooks=self.hooks_present,
            hook_limit_s=self.world.lease_s,
            cooldown_s=self.world.cooldown_limit_s / 4,
            cooldown_limit_s=self.world.cooldown_limit_s,
            jitter=jitter,
            store_id=self.state_file.store_id,
            failsafe=FailsafeOptions(self.member.url) if self.failsafe else None,
        )

    def kill(self) -> None:
        """Kill the whole host."""
        if self.up or self.runs.active or self.guard.acts:
            self.world.record(self.name, "is killed")
            self.up = self.agent_frozen = self.blocked = self.doomed = self.orphaned = False
            self.guard.begin()
            self.guard.acts = False
            self.runs.all_gone()
            self.life += 1

    def kill_agent(self, *, linger_s: float = 0.0) -> None:
        """Kill only the agent: processes of hooks go on. Its guard notices once it is gone."""
        if self.up and not self.frozen:
            if linger_s > 0.0:
                self.world.record(
                    self.name, f"its agent is killed, and lingers for {linger_s:.3f} s"
                )
                self.freeze_now()
                self.doomed = True
                self.world.after(linger_s, self.gone, self.life)
                return
            self.world.record(self.name, "its agent is killed")
            self.die()

    def gone(self, life: int) -> None:
        """A killed agent has exited."""
        if life == self.life and self.doomed and not self.frozen:
            self.die()

    def kill_both(self) -> None:
        """Kill agent and guard together, as the OOM killer does; processes of hooks go on."""
        if self.up and not self.frozen and not self.guard.acts:
            self.world.record(self.name, "its agent and its guard are killed")
            self.orphaned = self.runs.active
            self.guard.begin()
            self.process_ends()

    def freeze_agent(self) -> None:
        """Freeze only the agent: processes of hooks go on until the guard acts."""
        if self.works:
            self.world.record(self.name, "its agent is frozen")
            self.freeze_now()

    def freeze_now(self) -> None:
        if not self.agent_frozen and not self.blocked:
            self.frozen_at = self.local()
        self.agent_frozen = True
        if self.guard.enabled and not self.guard.up:
            self.orphaned = self.runs.active  # two faults at once

    def thaw_agent(self) -> None:
        if self.up and self.agent_frozen and not self.frozen and not self.doomed:
            self.world.record(self.name, "its agent is thawed")
            self.agent_frozen = False
            self.wake(self.local() - self.frozen_at)

    def block(self) -> None:
        """Block its loop."""
        self.world.record(self.name, "its loop waits")
        self.blocked, self.frozen_at = True, self.local()

    def unblock(self) -> None:
        self.blocked = False
        if self.works:
            self.wake(self.local() - self.frozen_at)

    def die(self) -> None:
        """The agent dies; its guard runs the hook, and kills the rest at its limit."""
        self.process_ends()
        self.guard.agent_died()

    def process_ends(self) -> None:
        """The process ends; a service manager starts it again."""
        self.up = self.agent_frozen = self.blocked = self.doomed = False
        self.life += 1
        self.runs.new_life()
        if self.restart_after_s is not None:
            self.world.after(self.restart_after_s, self.start)

    def stop(self) -> None:
        if self.up:
            self.world.record(self.name, "is asked to stop")
            self.post(Stop())

    def freeze(self) -> None:
        """Freeze the whole host: suspend, or a paused virtual machine."""
        if self.up and not self.frozen:
            self.world.record(self.name, "is frozen")
            self.frozen = True
            if not self.agent_frozen and not self.blocked:
                self.frozen_at = self.local()

    def thaw(self) -> None:
        if not (self.up and self.frozen):
            return
        self.world.record(self.name, "is thawed")
        self.frozen = False
        if self.doomed:
            self.world.after(0.0, self.gone, self.life)
        late_s = self.local() - self.frozen_at
        # The coordinator's clock may be ahead by the drift: nothing on the host can be in time any more.
        over_at = self.session.lease_until - self.session.timing.drift_s
        if self.runs.active and self.local() >= over_at:
            self.stale = True
        self.world.check_active()
        if self.works:
            self.wake(late_s)

    def wake(self, late_s: float) -> None:
        """The first step of the loop after a stall (R2)."""
        backlog, self.backlog = self.backlog, []
        if late_s > self.session.timing.margin_s:
            self.post(Stalled(late_s))
            if self.session.role is not Role.SECONDARY:
                self.world.broken(f"{self.name} woke as primary")
        for event, life in [*backlog, (Tick(), self.life)]:
            self.post(event, life)

    # -- fitness and settings -------------------------------------------------------------------

    def mark(self, source: str, trouble: str | None) -> None:
        """Record why this host is unfit by a source, or that it is fit."""
        before = dict(self.unfitness)
        self.unfitness.pop(source, None)
        if trouble is not None:
            self.unfitness[source] = trouble
        if self.unfitness != before:
            self.post(FitnessChanged(not self.unfitness, "; ".join(self.unfitness.values())))

    def unfit(self) -> None:
        self.mark("checks", "check down")

    def fit(self) -> None:
        self.mark("checks", None)

    def reload(self, hooks: frozenset[Role]) -> None:
        """SIGHUP, with other hooks in the settings."""
        if not self.works or self.dies("reload"):
            return
        self.hooks_present = hooks
        names = ", ".join(sorted(hooks)) or "no hooks"
        self.world.record(self.name, f"reads its settings again: {names}")
        self.session.reconfigure(self.options(self.session.options.jitter))
        self.perform(())

    def upgrade(self) -> None:
        """SIGHUP after an upgrade on disk: changes need a restart."""
        if self.works and Defect.READS_BY_POSITION in self.world.defects:
            self.world.record(self.name, "reads the settings of another version")
            self.runs.program[Role.SECONDARY] = Role.PRIMARY

    # -- the model of the daemon --------------------------------------------------------------------

    def post(self, event: Event, life: int | None = None) -> None:
        if (life is not None and life != self.life) or not self.up:
            return
        if not self.works:
            self.backlog.append((event, self.life))
            return
        self.perform(self.session.step(event, self.local()))

    def vote(self, asked: Asked) -> Vote:
        """Answer the question of another member; only while its loop runs."""
        vote, effects = self.session.vote(asked, self.local())
        self.perform(effects)
        return vote

    def arm_guard(self) -> None:
        self.guard.arm(self.session.guard_deadlines)

    def perform(self, effects: tuple[Effect, ...]) -> None:
        """Carry out effects in order, with an update of the guard before and after."""
        life = self.life
        self.arm_guard()
        for effect in effects:
            if self.dies("loop"):
                return
            self.begin(effect)
            if life != self.life:
                return
        if effects:
            self.arm_guard()
        self.record_readiness()
        self.wake_at = wake_at = self.session.wake_at
        if wake_at < float("inf"):
            delay_s = max(0.0, self.clock.true(wake_at) - self.world.now)
            self.world.after(delay_s + 1e-6, self.timer, self.life, wake_at)

    def record_readiness(self) -> None:
        """Record what has changed of failsafe, as the log does."""
        if self.failsafe and self.up:
            view = self.session.failsafe_view(self.local())
            if view.readiness is not self.readiness:
                self.readiness = view.readiness
                self.world.record(self.name, f"failsafe {view.readiness}: {view.why}")

    def timer(self, life: int, wake_at: float) -> None:
        if life == self.life and wake_at == self.wake_at:
            self.post(Tick())

    def begin(self, effect: Effect) -> None:  # noqa: C901 - one arm an effect
        match effect:
            case SendHeartbeat():
                self.beat(effect)
            case Publish():
                self.publish(effect)
            case Ask():
                self.world.lan.ask(self, effect)
            case StartHook():
                self.start_hook(effect)
            case TermHook():
                self.runs.term(effect.run)
            case KillHook():
                self.runs.kill(effect.run)
            case Join():
                self.join(self.life)
            case Release():
                self.release(effect)
            case Leave():
                self.call("leave", RemoveSession(self.session_id), lambda _: Left(), Left)
            case Escalate():
                self.world.record(self.name, f"escalates: {effect.reason}")
                self.runs.kill_all()
                self.orphaned = self.state_file.owes_demotion = False
            case Exit():
                self.exit(effect.code)

    def exit(self, code: ExitCode) -> None:
        self.world.record(self.name, f"exits {code.name}")
        self.exits.append(code)
        if self.runs.active or self.runs.leftovers:
            self.world.broken(f"{self.name} left a workload")
        self.process_ends()

    def publish(self, effect: Publish) -> None:
        if (effect.before, effect.role) not in TRANSITIONS:
            self.world.broken(f"{effect}")
        epoch = "" if effect.epoch is None else f" epoch={effect.epoch}"
        self.world.record(self.name, f"{effect.before} -> {effect.role}{epoch}: {effect.reason}")
        if effect.role is not Role.SECONDARY and effect.epoch is not None:
            self.state_file.unreleased = PreviousTenure(effect.epoch, self.instance)

    def start_hook(self, effect: StartHook) -> None:
        facts = effect.facts
        if facts.role is Role.PRIMARY:
            if self.local() >= self.session.renew_by:
                self.world.broken(f"{self.name} promoted without a lease")
            self.stale = False
            self.state_file.owes_demotion = True
            if (
                self.world.forgets and self.registrations == 1
            ):  # a new process knows nothing of the server
                self.world.void(self.coordinator)
            if facts.epoch is not None:
                self.tenure = (facts.epoch, self.instance)
                self.state_file.unreleased = PreviousTenure(*self.tenure)
                self.world.check_epoch(self.session.store_id, facts.epoch, self.instance)
        self.runs.start(effect.run, facts)

    def run_ended(self, event: HookEnded) -> None:
        if event.ok and not self.runs.active:
            self.stale = self.orphaned = self.state_file.owes_demotion = False
        self.post(event)
        if (
            event.ok
            and self.up
            and self.failing_starts
            and self.session.phase is not Phase.STARTING
            and self.registrations == 0
        ):
            self.failing_starts -= 1
            self.world.record(self.name, "cannot start")
            self.exit(ExitCode.GUARD)

    # -- failing tasks -------------------------------------------------------------------------

    def dies(self, task: str) -> bool:
        """Whether an exception ends this task now; if so, its consequences are scheduled."""
        if task not in self.dying or not self.up:
            return False
        self.dying.remove(task)
        self.world.record(self.name, f"an exception ends its {task}")
        if task == "loop":
            if Defect.CALLS_THE_GUARD_OFF in self.world.defects:
                self.guard.arm(None)
            unguarded = self.guard.due is None and self.guard.able
            if self.is_active and unguarded:
                self.world.broken(f"{self.name} left a workload")
            self.die()
        elif Defect.LOSES_TASKS not in self.world.defects:
            self.world.after(
                0.0, self.post, Stop(ExitCode.TASK_FAILED, f"{task} failed"), self.life
            )
        return True

    # -- requests -------------------------------------------------------------------------------

    def call(  # noqa: C901 - a request is these closures
        self,
        task: str,
        what: Input,
        answered: Callable[[Any], Event],
        failed: Callable[[], Event],
    ) -> None:
        """One request with its timeout; the answer may still come after that."""
        life, endpoint = self.life, self.endpoint
        open_calls = [True]
        lost = self.dies(task)
        if lost and Defect.LOSES_TASKS not in self.world.defects:
            self.world.after(0.0, self.post, failed(), life)  # a substitute for its event

        def on_answer(answer: Any) -> None:
            event = answered(answer)
            if open_calls or isinstance(
                event, HeartbeatAnswered
            ):  # a late answer is posted, too (R3)
                open_calls.clear()
                self.post(event, life)

        def on_limit() -> None:
            if open_calls and life == self.life:
                open_calls.clear()
                self.next_endpoint(endpoint)
                self.post(failed(), life)

        coordinator, net = self.coordinator, self.nets[endpoint]

        def reply(answer: Any) -> None:
            if not lost:
                self.world.send(net, back=True, deliver=on_answer, args=(answer,))

        def deliver() -> None:
            # A plain v1 server cannot distinguish a late DELETE from one of the session's next instance. Here
            # it is lost with its connection, as it nearly always is over TCP.
            if open_calls or not (self.world.plain_v1 and isinstance(what, RemoveSession)):
                coordinator.submit(what, reply)

        self.world.send(net, back=False, deliver=deliver, args=())
        if not lost:
            self.world.after(self.session.timing.request_timeout_s, on_limit)

    def next_endpoint(self, tried: int) -> None:
        """Use the next endpoint of the list, unless another request has done so already."""
        if tried == self.endpoint and len(self.nets) > 1:
            self.revision = -1
            self.endpoint = (tried + 1) % len(self.world.coordinators)

    def beat(self, effect: SendHeartbeat) -> None:
        beat, plain = effect.number, self.world.plain_v1
        seen = None if plain else self.session.newest_epoch
        coordinator = self.coordinator
        what = ReceiveHeartbeat(
            self.session_id,
            self.score,
            last_data=EPOCH_OF_WALL + timedelta(seconds=self.world.now)
            if self.runs.active
            else None,
            instance=None if plain else self.instance,
            seen_epoch=seen,
            failsafe_url=self.member.url if self.session.options.failsafe else None,
            holds=effect.holds,
            failsafe_revision=effect.failsafe_revision,
            promised=effect.promised,
        )

        def answered(answer: Any) -> Event:
            match answer:
                case HeartbeatAnswer():
                    if plain:
                        return HeartbeatAnswered(
                            beat, HeartbeatAnswer(answer.role, answer.last_data)
                        )
                    return HeartbeatAnswered(beat, replace(answer, store_id=coordinator.store_id))
                case NotFound():
                    return HeartbeatFailed(beat, HeartbeatFailure.GONE, "404", contact=True)
                case TooSoon():
                    return HeartbeatFailed(
                        beat, HeartbeatFailure.BACK_OFF, "429", answer.retry_after_s, contact=True
                    )
                case _:
                    return HeartbeatFailed(beat, HeartbeatFailure.OTHER, "refused", contact=True)

        def failed() -> Event:
            return HeartbeatFailed(beat, HeartbeatFailure.OTHER, "no answer in time")

        if seen is not None and seen > GREATEST_EPOCH:
            self.world.after(
                0.002, self.post, HeartbeatFailed(beat, HeartbeatFailure.OTHER, "400"), self.life
            )
            return
        self.call("beat", what, answered, failed)
        if self.stops_confirming and coordinator.state.record.pending == self.session_id:
            self.stops_confirming = False
            self.world.after(0.0, self.stop)

    def release(self, effect: Release) -> None:
        self.world.record(self.name, f"releases epoch {effect.epoch}")
        if self.runs.may_be_active:
            self.world.broken(f"{self.name} releases, and its workload runs")
        what = ReleaseRole(
            self.session_id,
            effect.epoch,
            instance=effect.instance or self.instance,
            why=effect.reason,
            hold_off_s=effect.hold_off_s,
            held=effect.held,
        )
        if effect.instance is None:
            self.state_file.unreleased = None
        if Defect.RELEASES_AS_ANYBODY in self.world.defects and effect.instance is not None:
            what = self.anybodys_release(what)
        self.call("release", what, lambda _: Released(), Released)

    def anybodys_release(self, what: ReleaseRole) -> ReleaseRole:
        """The planted release, of whatever tenure is current."""
        holder = self.coordinator.state.record.holder
        if holder is None or holder.session_id != self.session_id:
            return what
        return replace(what, epoch=holder.epoch, instance=holder.instance)

    def join(self, life: int) -> None:
        """Retry until it is answered, once per heartbeat interval, like the daemon."""
        if life != self.life or not self.up or self.session.phase is not Phase.JOINING:
            return
        if not self.works:
            self.world.after(0.05, self.join, life)
            return
        if self.dies("join"):
            return
        endpoint, coordinator = self.endpoint, self.coordinator
        done: list[bool] = []

        def on_answer(answer: Any) -> None:
            full = isinstance(answer, RequestRefused)  # of active sessions: again, later
            if not done and life == self.life and not full:
                done.append(True)
                store_id = None if self.world.plain_v1 else coordinator.store_id
                if self.session.accepts_store(store_id):
                    self.registrations += 1
                    self.state_file.store_id = store_id
                    self.post(Joined(self.world.timing, store_id), life)
                else:
                    self.next_endpoint(endpoint)

        net = self.nets[endpoint]

        def reply(answer: Any) -> None:
            self.world.send(net, back=True, deliver=on_answer, args=(answer,))

        def again() -> None:
            if not done:
                self.next_endpoint(endpoint)
            self.join(life)

        url = self.member.url if self.session.options.failsafe else None
        what = AddSession(SessionConfig(self.session_id), instance=self.instance, failsafe_url=url)
        self.world.send(net, back=False, deliver=coordinator.submit, args=(what, reply))
        self.world.after(self.world.timing.heartbeat_interval_s, again)

    def follow(self, life: int) -> None:
        """Read the status by blocking reads, one after the other."""
        if life != self.life or not self.up or self.dies("follow"):
            return
        endpoint, coordinator = self.endpoint, self.coordinator
        settled: list[bool] = []

        def again(status: GroupStatus | None) -> None:
            if settled or life != self.life:
                return
            settled.append(True)
            if status is not None and status.revision is not None:
                self.revision = status.revision
                self.post(StatusRead(status), life)
            self.world.after(0.0, self.follow, life)

        net = self.nets[endpoint]

        def reply(status: GroupStatus) -> None:
            self.world.send(net, back=True, deliver=again, args=(status,))

        self.world.send(
            net, back=False, deliver=coordinator.read_status, args=(self.revision, reply)
        )
        self.world.after(2 * self.world.lease_s, again, None)
