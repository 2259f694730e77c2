"""No call of a third party shortens a lease: random calls by everybody, in every order (R15, R16).

Fault 8. The members here are processes that know which lease they were granted last. A stranger has
every right, knows every session and epoch, and does not know the ``Instance`` of another process. A
lease is over when its L has passed since it was granted last, when the process that holds it has
released it, or, where it never named a process, when its session was deleted (v1).
"""

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from agent.core.group import decide, epoch_after_deletion
from agent.core.group_state import (
    AddSession,
    GroupState,
    Input,
    Policy,
    ReceiveHeartbeat,
    ReleaseRole,
    RemoveGroup,
    RemoveSession,
    SetOverride,
    Tick,
    state_after_restart,
    state_after_stall,
)
from agent.errors import RequestRefused
from agent.model import (
    GroupConfig,
    GroupRecord,
    HeartbeatAnswer,
    Instant,
    Role,
    RoleOverride,
    SessionConfig,
)

LEASE_S = 10.0
CONFIG = GroupConfig("g", int(LEASE_S * 10_000_000))
POLICY = Policy(
    score_hysteresis=10.0, minimum_hold_s=0.0, max_sessions=5, dead_session_retention_s=0.0
)
"""Strangers can fill the group, and dead sessions are kept for ten leases only (R20)."""

WALL = datetime(2026, 1, 1, tzinfo=UTC)
SESSIONS = "abc"

Process = tuple[str, str | None]


@dataclass(frozen=True)
class Own:
    """A member sends a heartbeat at once, releases, restarts, or is cut off (or connected again)."""

    session_id: str
    what: str


@dataclass(frozen=True)
class Happens:
    """A restart or a stall of the coordinator."""

    what: str


@dataclass
class World:
    """A coordinator, its members, and every lease that has not expired."""

    v1: frozenset[str]
    mono: float = 1000.0
    state: GroupState = field(default_factory=lambda: GroupState(GroupRecord(CONFIG)))
    starts: dict[str, int] = field(default_factory=dict)
    cut_off: set[str] = field(default_factory=set)
    epochs: dict[Process, int] = field(default_factory=dict)
    leases: dict[Process, float] = field(default_factory=dict)

    @property
    def now(self) -> Instant:
        return Instant(self.mono, WALL + timedelta(seconds=self.mono))

    def process(self, session_id: str) -> Process:
        if session_id in self.v1:
            return session_id, None
        return session_id, f"{session_id}#{self.starts.get(session_id, 0)}"

    def score(self, session_id: str) -> float:
        """Scores whose order changes every few seconds, by too little to replace a holder."""
        return 95.0 + (self.mono // 7 + SESSIONS.index(session_id)) % len(SESSIONS)

    def call(self, what: Input) -> HeartbeatAnswer | None:
        """Decide an input, and check each promotion against every lease that has not expired."""
        try:
            decision = decide(self.state, what, self.now, POLICY)
        except RequestRefused:
            return None
        self.state = decision.state
        if decision.removals:
            event("a dead session was removed")
        if isinstance(what, RemoveSession):
            stopped: Process = (what.session_id, None)  # v1
            self.leases.pop(stopped, None)
        if isinstance(what, RemoveGroup):
            epoch = epoch_after_deletion(self.state.record.epoch)
            self.state = GroupState(GroupRecord(CONFIG, epoch=epoch))
        if not isinstance(what, ReceiveHeartbeat) or not isinstance(
            decision.answer, HeartbeatAnswer
        ):
            return None
        if decision.answer.role is Role.PRIMARY:
            self.grant((what.session_id, what.instance), decision.answer.epoch)
        return decision.answer

    def grant(self, process: Process, epoch: int | None) -> None:
        running = {
            other: until
            for other, until in self.leases.items()
            if other != process and until > self.mono
        }
        assert not running, f"{process} is primary at {self.mono}, and so are {running}"
        assert epoch is not None
        self.leases[process] = self.mono + LEASE_S
        self.epochs[process] = epoch
        event("a lease was granted")

    def own(self, call: Own) -> None:
        session_id, instance = process = self.process(call.session_id)
        match call.what:
            case "beat":
                seen = self.epochs.get(process, 0) if instance is not None else None
                answer = self.call(
                    ReceiveHeartbeat(session_id, self.score(session_id), None, instance, seen)
                )
                if answer is None:
                    self.call(AddSession(SessionConfig(session_id)))
                elif answer.role is not Role.PRIMARY and answer.epoch is not None:
                    self.epochs[process] = answer.epoch
            case "release":
                epoch = self.epochs.get(process, 0)
                if self.leases.pop(process, None) is not None:
                    event("a lease was released")
                self.call(ReleaseRole(session_id, epoch, instance, hold_off_s=2.0))
            case "start":
                self.starts[session_id] = self.starts.get(session_id, 0) + 1
            case _:
                self.cut_off ^= {session_id}

    def pass_time(self, seconds: float) -> None:
        """Each connected member sends a heartbeat about every second."""
        end = self.mono + seconds
        while self.mono + 1.0 <= end:
            self.mono += 1.0
            self.call(Tick())
            for session_id in SESSIONS:
                if session_id not in self.cut_off:
                    self.own(Own(session_id, "beat"))
        self.mono = end

    def happens(self, what: str) -> None:
        if what == "restart":
            self.state = state_after_restart(self.state.record, self.now)
        else:
            judged_at, self.mono = self.mono, self.mono + 4.0
            self.state = state_after_stall(self.state, judged_at, self.now)


def strangers_calls(world: World, session_id: str, draw: int) -> list[Input]:
    """An input that a stranger can send, or one that could make a group forget a lease."""
    epoch = world.state.record.epoch
    leave_nobody: list[Input] = [RemoveSession(known) for known in SESSIONS]
    if draw % 8 == 0:
        return [*leave_nobody, RemoveGroup()]
    if draw % 8 == 1:
        return [
            ReceiveHeartbeat(session_id, 0.0, None, "stranger", epoch + 1),
            *leave_nobody,
            RemoveGroup(),
        ]
    if draw % 8 == 2:
        crowd = [AddSession(SessionConfig(f"stranger {draw}.{number}")) for number in range(3)]
        return [*crowd]
    calls: list[Input] = [
        RemoveSession(session_id),
        AddSession(SessionConfig(session_id)),
        RemoveSession(session_id, only_inactive=True),
        ReceiveHeartbeat(session_id, 0.0, None, "stranger", epoch),
        ReceiveHeartbeat(session_id, 0.0, None, "stranger", 0),
        ReceiveHeartbeat(session_id, 100.0, None, "stranger", epoch + 1),
        ReceiveHeartbeat(session_id, 100.0, None, "stranger"),
        ReceiveHeartbeat(session_id, 100.0),
        ReceiveHeartbeat(session_id, 0.0, None, None, epoch + 2),
        SetOverride(session_id, RoleOverride.PRIMARY),
        SetOverride(session_id, RoleOverride.OFF),
        SetOverride(session_id, RoleOverride.PRIMARY, world.now.wall + timedelta(seconds=3)),
        ReleaseRole(session_id, epoch, "stranger", hold_off_s=5.0),
        ReleaseRole(session_id, epoch - 1, "stranger", hold_off_s=5.0),
        ReleaseRole(session_id, epoch, ""),
        RemoveGroup(),
        Tick(),
    ]
    if session_id not in world.v1:  # a v1 holder has no instance that a stranger could lack
        calls.append(ReleaseRole(session_id, epoch, None, hold_off_s=5.0))
    return [calls[draw // 2 % len(calls)]]


STRANGERS = st.tuples(st.sampled_from(SESSIONS), st.integers(0, 100))
STEPS = st.one_of(
    STRANGERS,
    STRANGERS,
    STRANGERS,
    STRANGERS,
    st.builds(Own, st.sampled_from(SESSIONS), st.sampled_from(["beat", "release", "start", "cut"])),
    st.builds(Happens, st.sampled_from(["restart", "stall"])),
)
PAUSES = st.sampled_from([0.0, 0.3, 1.0, 1.0, 2.0, 2.0, 4.0, 11.0, 40.0])


@pytest.mark.long
@pytest.mark.parametrize("v1", [frozenset[str](), frozenset("a"), frozenset(SESSIONS)])
def test_nobody_is_primary_before_the_other_lease_has_expired(v1: frozenset[str]) -> None:
    @settings(max_examples=300, deadline=None, derandomize=True)
    @given(st.lists(st.tuples(STEPS, PAUSES), min_size=5, max_size=40))
    def check(steps: list[tuple[Own | Happens | tuple[str, int], float]]) -> None:
        world = World(v1)
        world.pass_time(4)
        for step, pause_s in steps:
            world.pass_time(pause_s)
            match step:
                case Own():
                    world.own(step)
                case Happens():
                    world.happens(step.what)
                case (session_id, draw):
                    for call in strangers_calls(world, session_id, draw):
                        world.call(call)

    check()
