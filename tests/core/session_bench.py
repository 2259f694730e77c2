"""A session on its own, its time, and everything that it wanted."""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from agent.core.effects import (
    Effect,
    Publish,
    SendBeat,
    StartHook,
)
from agent.core.events import (
    Answered,
    BeatFailed,
    Event,
    Failure,
    HookEnded,
    Joined,
    StatusSeen,
    Tick,
)
from agent.core.session import Options, Session
from agent.core.timing import plan
from agent.model import GroupStatus, HeartbeatAnswer, Role

S, P, W = Role.SECONDARY, Role.PRIMARY, Role.PENDING_PRIMARY
NO_HOOKS: frozenset[Role] = frozenset()
LEASE_S = 10.0
TIMING = plan(LEASE_S)  # R 6.5, D 2.5, M 1, beat and request timeout 6.5 / 3
DATA = datetime(2026, 1, 1, tzinfo=UTC)
NEVER = float("-inf")
STORE, OTHER_STORE = "store-1", "store-2"


@dataclass(frozen=True)
class Told:
    """An answer in short; epoch None is a plain v1 server's."""

    role: Role
    epoch: int | None = 1
    revision: int | None = 5
    lease_s: float | None = LEASE_S
    store_id: str | None = STORE

    def answer(self) -> HeartbeatAnswer:
        return HeartbeatAnswer(
            self.role, DATA, self.epoch, self.revision, self.lease_s, "other", self.store_id
        )


def v1(role: Role) -> Told:
    return Told(role, None, None, None, None)


def status(
    primary: str | None,
    pending: str | None,
    epoch: int | None,
    revision: int | None,
    store_id: str | None = STORE,
) -> StatusSeen:
    return StatusSeen(GroupStatus(primary, pending, None, epoch, revision, store_id=store_id))


class Bench:
    """A session, its time, and everything that it wanted."""

    def __init__(
        self,
        *,
        hooks: Iterable[Role] = NO_HOOKS,
        now: float = 100.0,
        hook_limit_s: float = 3.0,
        store_id: str | None = None,
    ) -> None:
        options = Options(
            "me",
            frozenset(hooks),
            hook_limit_s,
            cooldown_s=5.0,
            cooldown_limit_s=30.0,
            store_id=store_id,
        )
        self.session = Session(TIMING, options)
        self.now = now
        self.log: list[Effect] = []

    def begin(self) -> list[Effect]:
        return self.keep(self.session.begin(self.now))

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
        return [e.beat for e in self.log if isinstance(e, SendBeat)][-1]

    @property
    def run(self) -> int:
        return [e.run for e in self.log if isinstance(e, StartHook)][-1]

    def told(self, told: Told, *, beat: int | None = None, after_s: float = 0.0) -> list[Effect]:
        answer = told.answer()
        return self.step(Answered(self.beat if beat is None else beat, answer), after_s=after_s)

    def fails(self, failure: Failure, retry_after_s: float | None = None) -> list[Effect]:
        return self.step(BeatFailed(self.beat, failure, "for the test", retry_after_s))

    def ends(self, *, ok: bool = True) -> list[Effect]:
        return self.step(HookEnded(self.run, ok, "exit 0" if ok else "exit 1"))

    # -- stages of a life

    def member(self, *, v1_server: bool = False) -> "Bench":
        """Begun, demoted and joined; the first heartbeat is under way."""
        self.begin()
        if S in self.session.options.hooks:
            self.ends()
        self.step(Joined(TIMING, None if v1_server else STORE))
        return self

    def pending(self, *, v1_server: bool = False) -> "Bench":
        self.member(v1_server=v1_server).told(v1(W) if v1_server else Told(W, 0, 4))
        assert self.session.role is W
        return self

    def primary(self, *, v1_server: bool = False) -> "Bench":
        """Primary in tenure 1, whose lease counts from now."""
        self.pending(v1_server=v1_server)
        if W in self.session.options.hooks:
            self.ends()
        self.told(v1(P) if v1_server else Told(P))
        if P in self.session.options.hooks:
            self.ends()
        assert self.session.role is P
        return self


def kinds(effects: Iterable[Effect]) -> list[Any]:
    """What was wanted, in order: the class, or for Publish and StartHook the role, too."""
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
