"""A world of agents and one coordinator on a virtual clock, around the real core.

Owns time, the network, the hosts and the hooks of a simulation, and checks the promise at every
change. Decides nothing itself: ``Session`` and ``decide`` do. Requests and answers are separate
messages that can be late, lost and repeated; a durable write takes time, and a crash may fall into
it. Chance comes from one seeded generator, so that the same plan gives the same transcript.

What counts as active: from the start of a promotion hook to the success of a demotion hook, the
escalation after one failed, or the death of the host. A host that was frozen until after its lease
is out of the promise until it has demoted (design.md, "What is promised"): there the epoch protects.
"""

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from agent.core.effects import (
    Effect,
    Escalate,
    Exit,
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
from agent.core.group import decide
from agent.core.group_state import (
    AddSession,
    Beat,
    Decision,
    GroupState,
    Input,
    Policy,
    ReleaseRole,
    RemoveSession,
    SetOverride,
    awaken,
    excuse,
    status_of,
)
from agent.core.group_state import (
    Tick as GroupTick,
)
from agent.core.roles import TRANSITIONS
from agent.core.session import Options, Phase, Session
from agent.core.timing import Budget, plan
from agent.errors import NotFound, RequestRefused, TooSoon
from agent.model import (
    GroupConfig,
    GroupRecord,
    GroupStatus,
    HeartbeatAnswer,
    Instant,
    Role,
    RoleOverride,
    SessionConfig,
)

EPOCH_OF_WALL = datetime(2026, 1, 1, tzinfo=UTC)
ALL_HOOKS = frozenset(Role)
NAMES = "abcdefgh"


class BrokenPromiseError(AssertionError):
    """An invariant does not hold."""


@dataclass
class HookNature:
    """How the hooks of one host behave: seconds, and an outcome that is drawn for each run."""

    seconds: float = 0.01
    outcomes: tuple[str, ...] = ("ok",)  # ok, fail, hang (heeds TERM), deaf (needs KILL)


@dataclass
class Net:
    """The network between one agent and the coordinator."""

    delay_s: float = 0.002
    spread_s: float = 0.003
    loss: float = 0.0
    repeat: float = 0.0
    cut_out: bool = False
    cut_back: bool = False


@dataclass
class Clock:
    """A host's clock: an offset, and a rate within the promised drift."""

    rate: float = 1.0
    offset: float = 0.0

    def local(self, true: float) -> float:
        return self.offset + self.rate * true

    def true(self, local: float) -> float:
        return (local - self.offset) / self.rate


class World:
    """Hosts, network and time; ``run`` moves it on."""

    def __init__(
        self,
        seed: int = 0,
        *,
        lease_s: float = 2.0,
        policy: Policy | None = None,
        plain_v1: bool = False,
        session_class: type[Session] = Session,
        budget: Budget | None = None,
        cooldown_limit_s: float | None = None,
    ) -> None:
        self.rng = random.Random(seed)
        self.now = 0.0
        self.lease_s = lease_s
        self.timing = plan(lease_s, budget)
        self.cooldown_limit_s = lease_s if cooldown_limit_s is None else cooldown_limit_s
        self.policy = policy or Policy(score_hysteresis=10.0, minimum_hold_s=lease_s)
        self.plain_v1 = plain_v1
        self.session_class = session_class
        self.queue: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self.count = 0
        self.transcript: list[str] = []
        self.agents: dict[str, AgentHost] = {}
        self.coordinator = CoordinatorHost(self)
        self.holders: dict[int, str] = {}
        self.newest_epoch = 0

    # -- time -----------------------------------------------------------------------------------

    def after(self, delay_s: float, do: Callable[..., None], *args: Any) -> None:
        self.count += 1
        heapq.heappush(self.queue, (self.now + delay_s, self.count, do, args))

    def run(self, seconds: float) -> None:
        end = self.now + seconds
        while self.queue and self.queue[0][0] <= end:
            self.now, _, do, args = heapq.heappop(self.queue)
            do(*args)
        self.now = end

    def run_until(self, condition: Callable[[], bool], limit_s: float) -> float:
        """Run until it holds; seconds that took, or fail at the limit."""
        start = self.now
        while not condition():
            if not self.queue or self.queue[0][0] > start + limit_s:
                raise BrokenPromiseError(f"not reached within {limit_s:.3f} s:\n{self.text()}")
            self.now, _, do, args = heapq.heappop(self.queue)
            do(*args)
        return self.now - start

    def say(self, who: str, what: str) -> None:
        self.transcript.append(f"{self.now:8.3f} {who:11} {what}")

    def text(self) -> str:
        return "\n".join(self.transcript)

    # -- network --------------------------------------------------------------------------------

    def send(
        self, net: Net, *, back: bool, deliver: Callable[..., None], args: tuple[Any, ...]
    ) -> None:
        copies = 2 if self.rng.random() < net.repeat else 1
        for _ in range(copies):
            lost = net.cut_back if back else net.cut_out
            if not lost and self.rng.random() >= net.loss:
                self.after(net.delay_s + self.rng.random() * net.spread_s, deliver, *args)

    # -- the promise ----------------------------------------------------------------------------

    def check_active(self) -> None:
        active = [a.name for a in self.agents.values() if a.is_active]
        if len(active) > 1:
            raise BrokenPromiseError(f"active at once: {active}\n{self.text()}")

    def check_epoch(self, epoch: int | None, holder: str) -> None:
        if epoch is None:
            return
        known = self.holders.setdefault(epoch, holder)
        if known != holder:
            raise BrokenPromiseError(f"epoch {epoch} of {known} and {holder}\n{self.text()}")

    def primary(self) -> str | None:
        for agent in self.agents.values():
            if (
                agent.up
                and not agent.frozen
                and not agent.agent_frozen
                and agent.session.role is Role.PRIMARY
            ):
                return agent.name
        return None

    def add_agent(self, name: str, **options: Any) -> "AgentHost":
        agent = AgentHost(self, name, **options)
        self.agents[name] = agent
        agent.start()
        return agent


class CoordinatorHost:
    """One coordinator with one group; ``disk`` is what survives it."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.clock = Clock()
        ticks = round(world.lease_s * 10_000_000)
        self.disk = GroupRecord(GroupConfig("g", ticks))
        self.up = True
        self.life = 0
        self.fsync_s = 0.002
        self.backlog: list[tuple[Input, Callable[[Any], None]]] = []
        self.writing: GroupRecord | None = None
        self.state: GroupState = awaken(self.disk, self.instant())
        self.readers: list[tuple[int, Callable[[GroupStatus], None]]] = []
        self.wake = float("inf")
        self.paused_at: float | None = None

    def instant(self) -> Instant:
        wall = EPOCH_OF_WALL + timedelta(seconds=self.world.now)
        return Instant(self.clock.local(self.world.now), wall)

    # -- faults ---------------------------------------------------------------------------------

    def crash(self) -> None:
        if not self.up:
            return
        self.world.say("coordinator", "is killed")
        self.up = False
        self.life += 1
        self.paused_at = None
        if self.writing is not None and self.world.rng.random() < 0.5:
            self.disk = self.writing  # the write had reached the disk, the answer nobody
        self.writing = None
        self.backlog.clear()
        self.readers.clear()

    def restart(self) -> None:
        if self.up:
            return
        self.world.say("coordinator", "starts")
        self.up = True
        self.state = awaken(self.disk, self.instant())
        self.submit(GroupTick(), lambda _: None)

    def pause(self) -> None:
        if self.up and self.paused_at is None:
            self.world.say("coordinator", "is stopped")
            self.paused_at = self.clock.local(self.world.now)

    def resume(self) -> None:
        if self.paused_at is not None:
            self.world.say("coordinator", "goes on")
            self.state = excuse(self.state, self.paused_at, self.instant())
            self.paused_at = None
            self.work()

    # -- requests -------------------------------------------------------------------------------

    def submit(self, what: Input, reply: Callable[[Any], None]) -> None:
        if self.up:
            self.backlog.append((what, reply))
            self.work()

    def read_status(self, after: int, reply: Callable[[GroupStatus], None]) -> None:
        if self.up:
            if self.state.record.revision != after:
                reply(status_of(self.state))
            else:
                self.readers.append((after, reply))

    def work(self) -> None:
        while self.backlog and self.writing is None and self.up and self.paused_at is None:
            what, reply = self.backlog.pop(0)
            try:
                decision = decide(self.state, what, self.instant(), self.world.policy)
            except RequestRefused as refusal:
                reply(refusal)
                continue
            if decision.state.record is self.state.record:
                self.conclude(decision, reply)
            else:
                self.writing = decision.state.record
                self.world.after(self.fsync_s, self.written, self.life, decision, reply)

    def written(self, life: int, decision: Decision, reply: Callable[[Any], None]) -> None:
        if life == self.life:
            self.disk = decision.state.record
            self.writing = None
            self.check_disk()
            self.conclude(decision, reply)
            self.work()

    def check_disk(self) -> None:
        world = self.world
        if self.disk.epoch < world.newest_epoch:
            raise BrokenPromiseError(f"epoch goes back to {self.disk.epoch}\n{world.text()}")
        world.newest_epoch = self.disk.epoch
        if self.disk.holder is not None:
            world.check_epoch(self.disk.holder.epoch, str(self.disk.holder.instance))

    def conclude(self, decision: Decision, reply: Callable[[Any], None]) -> None:
        before, self.state = self.state.record, decision.state
        record = self.state.record
        for entry in decision.history:
            ended = f"ended: {entry.why_ended}" if entry.until else f"began: {entry.why_started}"
            self.world.say("coordinator", f"tenure {entry.epoch} of {entry.session_id} {ended}")
        if record.pending != before.pending and record.pending is not None:
            self.world.say("coordinator", f"chooses {record.pending}")
        reply(decision.answer)
        if record.revision != before.revision:
            readers, self.readers = self.readers, []
            for _, answer in readers:
                answer(status_of(self.state))
        self.arm(decision.wake_at)

    def arm(self, wake_at: float) -> None:
        self.wake = wake_at
        if wake_at < float("inf"):
            delay_s = max(0.0, self.clock.true(wake_at) - self.world.now)
            self.world.after(delay_s + 1e-6, self.tick, self.life, wake_at)

    def tick(self, life: int, wake_at: float) -> None:
        if life == self.life and wake_at == self.wake and self.up and self.paused_at is None:
            self.submit(GroupTick(), lambda _: None)


@dataclass
class Hook:
    role: Role
    outcome: str
    running: bool = True


class AgentHost:
    """One host: the agent's daemon in small, its hooks and its workload."""

    def __init__(
        self,
        world: World,
        name: str,
        *,
        clock: Clock | None = None,
        nature: HookNature | None = None,
        net: Net | None = None,
        score: float = 100.0,
        hooks: frozenset[Role] = ALL_HOOKS,
    ) -> None:
        self.world = world
        self.name = name
        self.clock = clock or Clock()
        self.nature = nature or HookNature()
        self.net = net or Net()
        self.score = score
        self.hooks_present = hooks
        self.up = False
        self.frozen = False
        self.agent_frozen = False
        self.guarded = True
        self.guarding: tuple[float, float] | None = None
        self.guard_acts = False
        self.stale = False
        self.active_epoch: int | None = None
        self.active = False
        self.life = 0
        self.backlog: list[tuple[Event, int]] = []
        self.frozen_at = 0.0
        self.restart_after_s: float | None = None
        self.exits: list[str] = []

    @property
    def is_active(self) -> bool:
        return self.active and not self.frozen and not self.stale

    def local(self) -> float:
        return self.clock.local(self.world.now)

    # -- life and death -------------------------------------------------------------------------

    def start(self) -> None:
        if self.up:
            return
        if self.guard_acts:  # it holds the claim on the session until it is done
            self.world.after(0.05, self.start)
            return
        self.up, self.frozen, self.stale, self.active = True, False, False, False
        self.agent_frozen = False
        self.guarding = None
        self.life += 1
        self.backlog.clear()
        self.hooks: dict[int, Hook] = {}
        self.session = self.world.session_class(
            self.world.timing,
            Options(
                session_id=self.name,
                hooks=self.hooks_present,
                hook_limit_s=self.world.lease_s,
                cooldown_s=self.world.cooldown_limit_s / 4,
                cooldown_limit_s=self.world.cooldown_limit_s,
                jitter=self.world.rng.random(),
            ),
        )
        self.revision = -1
        self.world.say(self.name, "starts")
        self.perform(self.session.begin(self.local()))
        if not self.world.plain_v1:
            self.follow(self.life)

    def kill(self) -> None:
        if self.up:
            self.world.say(self.name, "is killed")
            self.up = self.active = self.agent_frozen = False
            self.life += 1

    def kill_agent(self) -> None:
        """Only the agent: its hooks' work goes on, and its guard notices at once."""
        if self.up and not self.frozen:
            self.world.say(self.name, "its agent is killed")
            self.die_guarded()

    def freeze_agent(self) -> None:
        """Only the agent: its hooks' work goes on until the guard acts."""
        if self.up and not self.frozen and not self.agent_frozen:
            self.world.say(self.name, "its agent is frozen")
            self.agent_frozen, self.frozen_at = True, self.local()

    def thaw_agent(self) -> None:
        if self.up and self.agent_frozen and not self.frozen:
            self.world.say(self.name, "its agent is thawed")
            self.agent_frozen = False
            self.wake(self.local() - self.frozen_at)

    def guard(self, life: int, due: tuple[float, float]) -> None:
        """The guard's timer (R12): nothing newer was heard of the agent."""
        if life == self.life and due == self.guarding and self.up:
            if self.frozen:
                self.world.after(0.01, self.guard, life, due)
                return
            self.world.say(self.name, "the guard acts")
            self.die_guarded()

    def die_guarded(self) -> None:
        """The agent is dead; the guard runs the hook, and kills what is left by its limit."""
        due, self.guarding = self.guarding, None
        self.up = self.agent_frozen = False
        self.life += 1
        if self.restart_after_s is not None:
            self.world.after(self.restart_after_s, self.start)
        if due is None or not self.guarded:
            return
        self.guard_acts = True
        left_s = max(0.0, self.clock.true(due[1]) - self.world.now)
        seconds = left_s
        if self.world.rng.choice(self.nature.outcomes) == "ok":
            seconds = min(left_s, self.nature.seconds * (0.5 + self.world.rng.random()))
        self.world.after(seconds, self.guarded_down)

    def guarded_down(self) -> None:
        if self.frozen:
            self.world.after(0.01, self.guarded_down)
            return
        self.guard_acts = self.active = False
        self.world.say(self.name, "the guard has demoted")

    def unfit(self) -> None:
        self.tell(Fitness(False, "check down"))

    def fit(self) -> None:
        self.tell(Fitness(True, ""))

    def stop(self) -> None:
        if self.up:
            self.world.say(self.name, "is asked to stop")
            self.tell(Stop())

    def freeze(self) -> None:
        if self.up and not self.frozen:
            self.world.say(self.name, "is frozen")
            self.frozen = True
            if not self.agent_frozen:
                self.frozen_at = self.local()

    def thaw(self) -> None:
        if not (self.up and self.frozen):
            return
        self.world.say(self.name, "is thawed")
        self.frozen = False
        late_s = self.local() - self.frozen_at
        if self.active and self.local() >= self.session.lease_until:
            self.stale = True
        self.world.check_active()
        if not self.agent_frozen:
            self.wake(late_s)

    def wake(self, late_s: float) -> None:
        """What the pump does first after it did not turn for a while (R2)."""
        backlog, self.backlog = self.backlog, []
        if late_s > self.session.timing.margin_s:
            self.tell(Stalled(late_s))
            if self.session.role is not Role.SECONDARY:
                raise BrokenPromiseError(f"{self.name} woke as primary\n{self.world.text()}")
        for event, life in [*backlog, (Tick(), self.life)]:
            self.tell(event, life)

    # -- the daemon in small --------------------------------------------------------------------

    def tell(self, event: Event, life: int | None = None) -> None:
        if life is not None and life != self.life:
            return
        if self.frozen or self.agent_frozen:
            self.backlog.append((event, self.life))
            return
        if self.up:
            self.perform(self.session.step(event, self.local()))

    def arm_guard(self) -> None:
        due = self.session.guard_by if self.guarded else None
        if due != self.guarding:
            self.guarding = due
            if due is not None:
                delay_s = max(0.0, self.clock.true(min(due)) - self.world.now)
                self.world.after(delay_s + 1e-6, self.guard, self.life, due)

    def perform(self, effects: tuple[Effect, ...]) -> None:
        self.arm_guard()
        for effect in effects:
            self.begin(effect)
            if not self.up:
                return
        self.arm_guard()
        wake_at = self.session.wake_at
        if wake_at < float("inf"):
            delay_s = max(0.0, self.clock.true(wake_at) - self.world.now)
            self.world.after(delay_s + 1e-6, self.timer, self.life, wake_at)

    def timer(self, life: int, wake_at: float) -> None:
        if life == self.life and wake_at == self.session.wake_at:
            self.tell(Tick())

    def begin(self, effect: Effect) -> None:  # noqa: C901, PLR0912 - one arm an effect
        match effect:
            case SendBeat():
                self.beat(effect.beat)
            case Publish():
                self.publish(effect)
            case StartHook():
                self.start_hook(effect)
            case TermHook():
                if self.hooks[effect.run].outcome != "deaf":
                    self.world.after(0.001, self.hook_over, self.life, effect.run, "terminated")
            case KillHook():
                self.world.after(0.0001, self.hook_over, self.life, effect.run, "killed")
            case Join():
                self.join(self.life)
            case Release():
                self.world.say(self.name, f"releases epoch {effect.epoch}")
                what = ReleaseRole(
                    self.name,
                    effect.epoch,
                    instance=effect.instance or f"{self.name}#{self.life}",
                    why=effect.reason,
                    hold_off_s=effect.hold_off_s,
                )
                self.call(what, lambda _: Released(), Released)
            case Leave():
                self.call(RemoveSession(self.name), lambda _: Left(), Left)
            case Escalate():
                self.world.say(self.name, f"escalates: {effect.reason}")
                self.active = False
            case Exit():
                self.world.say(self.name, f"exits {effect.code.name}")
                self.exits.append(effect.code.name)
                if self.active:
                    raise BrokenPromiseError(f"{self.name} left a workload\n{self.world.text()}")
                self.up = False
                self.life += 1
                if self.restart_after_s is not None:
                    self.world.after(self.restart_after_s, self.start)

    def publish(self, effect: Publish) -> None:
        if (effect.before, effect.role) not in TRANSITIONS:
            raise BrokenPromiseError(f"{effect}\n{self.world.text()}")
        epoch = "" if effect.epoch is None else f" epoch={effect.epoch}"
        self.world.say(self.name, f"{effect.before} -> {effect.role}{epoch}: {effect.reason}")

    # -- hooks ----------------------------------------------------------------------------------

    def start_hook(self, effect: StartHook) -> None:
        if any(hook.running for hook in self.hooks.values()):
            raise BrokenPromiseError(f"{self.name} runs two hooks\n{self.world.text()}")
        role, epoch = effect.facts.role, effect.facts.epoch
        if role is Role.PRIMARY:
            self.active, self.active_epoch, self.stale = True, epoch, False
            if self.local() >= self.session.renew_by:
                raise BrokenPromiseError(f"promoted without a lease\n{self.world.text()}")
            self.world.check_epoch(epoch, f"{self.name}#{self.life}")
            self.world.check_active()
        outcome = self.world.rng.choice(self.nature.outcomes)
        self.hooks[effect.run] = Hook(role, outcome)
        if outcome in {"ok", "fail"}:
            seconds = self.nature.seconds * (0.5 + self.world.rng.random())
            self.world.after(seconds, self.hook_over, self.life, effect.run, outcome)

    def hook_over(self, life: int, run: int, how: str) -> None:
        if life != self.life or not self.hooks[run].running:
            return
        if self.frozen:
            self.world.after(0.01, self.hook_over, life, run, how)
            return
        hook = self.hooks[run]
        hook.running = False
        if hook.role is Role.SECONDARY and how == "ok":
            self.active = False
        if how != "ok":
            self.world.say(self.name, f"hook {hook.role} {how}")
        self.tell(HookEnded(run, ok=how == "ok", why=how), life)

    # -- requests -------------------------------------------------------------------------------

    def call(
        self,
        what: Input,
        answered: Callable[[Any], Event],
        failed: Callable[[], Event],
    ) -> None:
        """One request with its time limit; the answer may still come after it."""
        life = self.life
        open_calls = [True]

        def on_answer(answer: Any) -> None:
            event = answered(answer)
            if open_calls or isinstance(event, Answered):  # a late answer is told, too (R3)
                open_calls.clear()
                self.tell(event, life)

        def on_limit() -> None:
            if open_calls:
                open_calls.clear()
                self.tell(failed(), life)

        coordinator = self.world.coordinator

        def reply(answer: Any) -> None:
            self.world.send(self.net, back=True, deliver=on_answer, args=(answer,))

        def deliver() -> None:
            # Plain v1 has nothing that tells a late DELETE from one of the session's next life. Here
            # it dies with its connection, as over TCP it nearly always does.
            if open_calls or not (self.world.plain_v1 and isinstance(what, RemoveSession)):
                coordinator.submit(what, reply)

        self.world.send(self.net, back=False, deliver=deliver, args=())
        self.world.after(self.session.timing.request_timeout_s, on_limit)

    def beat(self, beat: int) -> None:
        what = Beat(
            self.name,
            self.score,
            last_data=EPOCH_OF_WALL + timedelta(seconds=self.world.now) if self.active else None,
            instance=None if self.world.plain_v1 else f"{self.name}#{self.life}",
            seen_epoch=None if self.world.plain_v1 else self.session.newest_epoch,
        )

        def answered(answer: Any) -> Event:
            match answer:
                case HeartbeatAnswer():
                    if self.world.plain_v1:
                        answer = HeartbeatAnswer(answer.role, answer.last_data)
                    return Answered(beat, answer)
                case NotFound():
                    return BeatFailed(beat, Failure.GONE, "404")
                case TooSoon():
                    return BeatFailed(beat, Failure.BACK_OFF, "429", answer.retry_after_s)
                case _:
                    return BeatFailed(beat, Failure.OTHER, "refused")

        self.call(what, answered, lambda: BeatFailed(beat, Failure.OTHER, "no answer in time"))

    def join(self, life: int) -> None:
        """Like the daemon's task: tries until it is answered, a beat apart."""
        if life != self.life or not self.up or self.session.phase is not Phase.JOINING:
            return
        if self.frozen:
            self.world.after(0.05, self.join, life)
            return
        done: list[bool] = []

        def on_answer(_: Any) -> None:
            if not done and life == self.life:
                done.append(True)
                self.tell(Joined(self.world.timing), life)

        coordinator = self.world.coordinator

        def reply(answer: Any) -> None:
            self.world.send(self.net, back=True, deliver=on_answer, args=(answer,))

        what = AddSession(SessionConfig(self.name))
        self.world.send(self.net, back=False, deliver=coordinator.submit, args=(what, reply))
        self.world.after(self.world.timing.beat_s, self.join, life)

    def follow(self, life: int) -> None:
        """Blocking reads of the status, one after the other."""
        if life != self.life or not self.up:
            return
        settled: list[bool] = []

        def again(status: GroupStatus | None) -> None:
            if settled or life != self.life:
                return
            settled.append(True)
            if status is not None and status.revision is not None:
                self.revision = status.revision
                self.tell(StatusSeen(status), life)
            self.world.after(0.0, self.follow, life)

        coordinator = self.world.coordinator

        def reply(status: GroupStatus) -> None:
            self.world.send(self.net, back=True, deliver=again, args=(status,))

        self.world.send(
            self.net, back=False, deliver=coordinator.read_status, args=(self.revision, reply)
        )
        self.world.after(2 * self.world.lease_s, again, None)


@dataclass(frozen=True)
class Fault:
    """One fault of a plan: seconds from the start, what, to whom, for how long."""

    at_s: float
    kind: str
    target: int
    seconds: float


@dataclass(frozen=True)
class Plan:
    """A whole simulation: same plan, same transcript."""

    seed: int
    agents: int
    faults: tuple[Fault, ...] = ()
    lease_s: float = 2.0
    drift: tuple[float, ...] = (0.0, 0.0, 0.0, 0.0)
    hook_seconds: float = 0.01
    outcomes: tuple[str, ...] = ("ok",)
    loss: float = 0.0
    repeat: float = 0.0
    spread_s: float = 0.003
    plain_v1: bool = False
    horizon: float = 12.0
    budget: Budget | None = None
    cooldown_limit_s: float | None = None
    guarded: bool = True


KINDS = (
    "kill",
    "freeze",
    "stop",
    "cut",
    "cut_out",
    "cut_back",
    "slow",
    "kill_coordinator",
    "pause_coordinator",
    "override",
    "score",
    "remove_session",
    "kill_agent",
    "freeze_agent",
    "unfit",
)


def build(plan_: Plan, session_class: type[Session] = Session) -> World:
    """The plan's world, with its faults scheduled."""
    world = World(
        plan_.seed,
        lease_s=plan_.lease_s,
        plain_v1=plan_.plain_v1,
        session_class=session_class,
        budget=plan_.budget,
        cooldown_limit_s=plan_.cooldown_limit_s,
    )
    world.coordinator.clock = Clock(1 + plan_.drift[0], 1000.0)
    world.coordinator.state = awaken(world.coordinator.disk, world.coordinator.instant())
    for index in range(plan_.agents):
        agent = world.add_agent(
            NAMES[index],
            clock=Clock(1 + plan_.drift[index + 1], 50.0 * index),
            nature=HookNature(plan_.hook_seconds, plan_.outcomes),
            net=Net(loss=plan_.loss, repeat=plan_.repeat, spread_s=plan_.spread_s),
        )
        agent.restart_after_s = 0.3 * plan_.lease_s
        agent.guarded = plan_.guarded
    for fault in plan_.faults:
        world.after(fault.at_s, inject, world, fault)
    return world


def inject(world: World, fault: Fault) -> None:  # noqa: C901, PLR0912 - one arm a kind
    """Begin a fault, and schedule its end."""
    agents = list(world.agents.values())
    agent = agents[fault.target % len(agents)]
    coordinator = world.coordinator
    net = agent.net
    match fault.kind:
        case "kill":
            agent.kill()
            world.after(fault.seconds, agent.start)
        case "freeze":
            agent.freeze()
            world.after(fault.seconds, agent.thaw)
        case "stop":
            agent.stop()
        case "kill_agent":
            agent.kill_agent()
        case "freeze_agent":
            agent.freeze_agent()
            world.after(fault.seconds, agent.thaw_agent)
        case "unfit":
            agent.unfit()
            world.after(fault.seconds, agent.fit)
        case "cut" | "cut_out" | "cut_back":
            world.say(agent.name, f"network {fault.kind}")
            net.cut_out |= fault.kind != "cut_back"
            net.cut_back |= fault.kind != "cut_out"
            world.after(fault.seconds, mend, agent)
        case "slow":
            world.say(agent.name, "network slow")
            agent.net = replace(net, delay_s=0.1 * world.lease_s, spread_s=1.5 * world.lease_s)
            world.after(fault.seconds, mend, agent)
        case "kill_coordinator":
            coordinator.crash()
            world.after(fault.seconds, coordinator.restart)
        case "pause_coordinator":
            coordinator.pause()
            world.after(fault.seconds, coordinator.resume)
        case "override":
            value = RoleOverride.PRIMARY if fault.seconds > world.lease_s / 2 else RoleOverride.OFF
            coordinator.submit(SetOverride(agent.name, value), lambda _: None)
        case "score":
            agent.score = 50.0 if agent.score > 50 else 100.0
        case "remove_session":
            coordinator.submit(RemoveSession(agent.name), lambda _: None)
        case _:
            raise AssertionError(fault.kind)


def mend(agent: AgentHost) -> None:
    """A network as it was before the faults."""
    agent.net.cut_out = agent.net.cut_back = False
    agent.net.delay_s, agent.net.spread_s = Net.delay_s, Net.spread_s


def end_faults(world: World) -> None:
    """Everything works from here on."""
    world.coordinator.resume()
    world.coordinator.restart()
    for agent in world.agents.values():
        mend(agent)
        agent.net.loss = agent.net.repeat = 0.0
        agent.thaw()
        agent.thaw_agent()
        agent.fit()
        agent.nature = HookNature(agent.nature.seconds)
        agent.start()
