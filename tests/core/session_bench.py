"""A session without a daemon, its clock, and every effect that it requested."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from hypothesis import strategies as st

from agent.core.effects import (
    Ask,
    Effect,
    Publish,
    SendHeartbeat,
    StartHook,
)
from agent.core.events import (
    Answered,
    Event,
    HeartbeatAnswered,
    HeartbeatFailed,
    HeartbeatFailure,
    HookEnded,
    Joined,
    StatusRead,
    Tick,
)
from agent.core.options import FailsafeOptions
from agent.core.session import Options, Session
from agent.core.timing import plan
from agent.model import GroupStatus, HeartbeatAnswer, MemberSet, Role

S, P, W = Role.SECONDARY, Role.PRIMARY, Role.PENDING_PRIMARY
NO_HOOKS: frozenset[Role] = frozenset()
LEASE_S = 10.0
TIMING = plan(LEASE_S)  # R 6.5, D 2.5, M 1, beat and request timeout 6.5 / 3
DATA = datetime(2026, 1, 1, tzinfo=UTC)
NEVER = float("-inf")
STORE, OTHER_STORE = "store-1", "store-2"


@dataclass(frozen=True)
class Answer:
    """A short form of a heartbeat's answer; epoch None for a plain v1 server."""

    role: Role
    epoch: int | None = 1
    revision: int | None = 5
    lease_s: float | None = LEASE_S
    store_id: str | None = STORE
    cleared: int | None = None
    failsafe: MemberSet | None = None

    def build(self) -> HeartbeatAnswer:
        return HeartbeatAnswer(
            self.role,
            DATA,
            self.epoch,
            self.revision,
            self.lease_s,
            "other",
            self.store_id,
            self.cleared,
            self.failsafe,
        )


def v1(role: Role) -> Answer:
    return Answer(role, None, None, None, None)


def status(
    primary: str | None,
    pending: str | None,
    epoch: int | None,
    revision: int | None,
    store_id: str | None = STORE,
) -> StatusRead:
    return StatusRead(GroupStatus(primary, pending, None, epoch, revision, store_id=store_id))


class Bench:
    """A session, its clock, and every effect that it requested."""

    def __init__(
        self,
        *,
        hooks: Iterable[Role] = NO_HOOKS,
        now: float = 100.0,
        hook_limit_s: float = 3.0,
        store_id: str | None = None,
        failsafe: FailsafeOptions | None = None,
    ) -> None:
        options = Options(
            "me",
            frozenset(hooks),
            hook_limit_s,
            cooldown_s=5.0,
            cooldown_limit_s=30.0,
            store_id=store_id,
            failsafe=failsafe,
        )
        self.session = Session(TIMING, options)
        self.now = now
        self.log: list[Effect] = []

    def begin(self) -> list[Effect]:
        return self.keep(self.session.start(self.now))

    def keep(self, effects: tuple[Effect, ...]) -> list[Effect]:
        self.log += effects
        return list(effects)

    def step(self, event: Event, *, after_s: float = 0.0) -> list[Effect]:
        self.now += after_s
        return self.keep(self.session.step(event, self.now))

    def wake(self) -> list[Effect]:
        self.now = max(self.now, self.session.wake_at)
        return self.step(Tick())

    @property
    def beat(self) -> int:
        """The heartbeat that was sent last."""
        return [e.number for e in self.log if isinstance(e, SendHeartbeat)][-1]

    @property
    def run(self) -> int:
        return [e.run for e in self.log if isinstance(e, StartHook)][-1]

    def answered(
        self, answer: Answer, *, beat: int | None = None, after_s: float = 0.0
    ) -> list[Effect]:
        number = self.beat if beat is None else beat
        return self.step(HeartbeatAnswered(number, answer.build()), after_s=after_s)

    def fails(self, failure: HeartbeatFailure, retry_after_s: float | None = None) -> list[Effect]:
        gone = failure is HeartbeatFailure.GONE  # only the coordinator itself knows that
        return self.step(
            HeartbeatFailed(self.beat, failure, "for the test", retry_after_s, contact=gone)
        )

    def ends(self, *, ok: bool = True) -> list[Effect]:
        return self.step(HookEnded(self.run, ok, "exit 0" if ok else "exit 1"))

    # -- stages of a session

    def member(self, *, v1_server: bool = False) -> "Bench":
        """Begun, demoted and joined; the first heartbeat is under way."""
        self.begin()
        if S in self.session.options.hooks:
            self.ends()
        self.step(Joined(TIMING, None if v1_server else STORE))
        return self

    def pending(self, *, v1_server: bool = False) -> "Bench":
        self.member(v1_server=v1_server).answered(v1(W) if v1_server else Answer(W, 0, 4))
        assert self.session.role is W
        return self

    def primary(self, *, v1_server: bool = False) -> "Bench":
        """Primary in tenure 1, whose lease counts from now."""
        self.pending(v1_server=v1_server)
        if W in self.session.options.hooks:
            self.ends()
        self.answered(v1(P) if v1_server else Answer(P))
        if P in self.session.options.hooks:
            self.ends()
        assert self.session.role is P
        return self


def kinds(effects: Iterable[Effect]) -> list[Any]:
    """The kinds of effects, in order: the class, with the role for Publish and StartHook."""
    short: list[Any] = []
    for effect in effects:
        match effect:
            case Publish():
                short.append((Publish, effect.role))
            case StartHook():
                short.append((StartHook, effect.facts.role))
            case _:
                short.append(type(effect))
    return short


# -- events for hypothesis

LATEST = 0
"""As a number of an event: that of the heartbeat, hook or question that was begun last."""


def numbers(most: int) -> st.SearchStrategy[int]:
    return st.just(LATEST) | st.integers(1, most)


def addressed(event: Event, log: Sequence[Effect]) -> Event:
    """The event with the number that LATEST stands for, by the effects so far."""
    match event:
        case HeartbeatAnswered(number=0) | HeartbeatFailed(number=0):
            sent = [effect.number for effect in log if isinstance(effect, SendHeartbeat)]
            return replace(event, number=sent[-1]) if sent else event
        case HookEnded(run=0):
            started = [effect.run for effect in log if isinstance(effect, StartHook)]
            return replace(event, run=started[-1]) if started else event
        case Answered(nonce=0):
            asked = [effect.nonce for effect in log if isinstance(effect, Ask)]
            return replace(event, nonce=asked[-1]) if asked else event
        case _:
            return event
