"""A session belongs to the identity that registered it, and its owner notices nothing of that."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.core.group import decide
from agent.core.group_state import (
    AddSession,
    GroupState,
    Policy,
    ReceiveHeartbeat,
    ReleaseRole,
    RemoveSession,
    Requester,
    Tick,
)
from agent.errors import Forbidden, RequestRefused
from agent.model import GroupConfig, GroupRecord, HeartbeatAnswer, Instant, Role, SessionConfig

Act = ReceiveHeartbeat | ReleaseRole | RemoveSession | AddSession

CONFIG = GroupConfig("g", 100_000_000)
POLICY = Policy(minimum_hold_s=0.0)
WALL = datetime(2026, 1, 1, tzinfo=UTC)
OWNERS = {"a": Requester("user:a"), "b": Requester("user:b")}
EVE = Requester("user:eve")
MANAGER = Requester("user:ops", manages=True)


def at(mono: float) -> Instant:
    return Instant(mono, WALL + timedelta(seconds=mono))


def with_sessions(by: Requester | None = None) -> GroupState:
    """A group whose sessions a and b are of their owners (or of ``by``), and a is its primary."""
    state = GroupState(GroupRecord(CONFIG))
    for name, owner in OWNERS.items():
        state = decide(state, AddSession(SessionConfig(name), by or owner), at(1), POLICY).state
    for mono in (2.0, 3.0):
        beat = ReceiveHeartbeat("a", 50.0, instance="a1", by=by or OWNERS["a"])
        state = decide(state, beat, at(mono), POLICY).state
    assert state.record.holder is not None
    return state


@st.composite
def inputs(draw: st.DrawFn) -> Act:
    name = draw(st.sampled_from("ab"))
    instance = draw(st.sampled_from([None, "a1", "x"]))
    epochs = st.integers(0, 3)
    made: Act = draw(
        st.one_of(
            st.builds(
                ReceiveHeartbeat,
                st.just(name),
                st.floats(0, 100),
                instance=st.just(instance),
                seen_epoch=st.none() | epochs,
            ),
            st.builds(ReleaseRole, st.just(name), epochs, instance=st.just(instance)),
            st.just(RemoveSession(name)),
            st.just(AddSession(SessionConfig(name))),
        )
    )
    return made


def by(what: Act, requester: Requester) -> Act:
    """The same input by somebody."""
    return replace(what, by=requester)


def owner_of(what: Act) -> Requester:
    return OWNERS[what.config.id if isinstance(what, AddSession) else what.session_id]


@given(inputs(), st.floats(3, 30))
def test_nobody_else_acts_for_a_session(what: Act, mono: float) -> None:
    with pytest.raises(Forbidden, match="belongs to another identity"):
        decide(with_sessions(), by(what, EVE), at(mono), POLICY)


@pytest.mark.long
@given(
    st.lists(st.tuples(inputs() | st.just(Tick()), st.floats(0.1, 4)), max_size=8), st.booleans()
)
def test_owners_and_managers_decide_what_anybody_does_without_authentication(
    acts: list[tuple[Act | Tick, float]],
    manager: bool,  # noqa: FBT001 - drawn
) -> None:
    """The same roles, epochs and refusals, in every order."""
    known = with_sessions()
    unknown = replace(known, record=without_owners(known.record))
    mono = 3.0
    for what, after_s in acts:
        mono += after_s
        owned = what if isinstance(what, Tick) else by(what, MANAGER if manager else owner_of(what))
        outcomes: list[tuple[GroupState, object]] = []
        for state, one in ((known, owned), (unknown, what)):
            try:
                decision = decide(state, one, at(mono), POLICY)
                outcomes.append((decision.state, decision.answer))
            except RequestRefused as refusal:
                outcomes.append((state, str(refusal)))
        (known, first), (unknown, second) = outcomes
        assert first == second
        assert without_owners(known.record) == unknown.record
        assert known.live == unknown.live


def without_owners(record: GroupRecord) -> GroupRecord:
    sessions = {name: replace(one, owner=None) for name, one in record.sessions.items()}
    return replace(record, sessions=sessions)


def test_the_first_heartbeat_of_somebody_known_adopts_a_session() -> None:
    state = with_sessions()
    state = replace(state, record=without_owners(state.record))
    beat = ReceiveHeartbeat("b", 50.0, instance="b1", by=OWNERS["b"])
    state = decide(state, beat, at(4), POLICY).state
    assert state.record.sessions["b"].owner == "user:b"
    with pytest.raises(Forbidden):
        decide(state, replace(beat, by=EVE), at(8), POLICY)


@pytest.mark.parametrize("instance", [None, "x"])
def test_a_primarys_session_is_adopted_by_the_process_that_holds_the_tenure(
    instance: str | None,
) -> None:
    state = with_sessions()
    state = replace(state, record=without_owners(state.record))
    strange = decide(state, ReceiveHeartbeat("a", 9.0, instance=instance, by=EVE), at(6), POLICY)
    assert isinstance(strange.answer, HeartbeatAnswer)
    assert strange.answer.role is Role.SECONDARY
    assert strange.state.record.sessions["a"].owner is None
    beat = ReceiveHeartbeat("a", 50.0, instance="a1", by=OWNERS["a"])
    state = decide(strange.state, beat, at(7), POLICY).state
    assert state.record.sessions["a"].owner == "user:a"


def test_registering_alone_adopts_nothing() -> None:
    state = with_sessions()
    state = replace(state, record=without_owners(state.record))
    after = decide(state, AddSession(SessionConfig("b"), EVE), at(4), POLICY)
    assert after.answer is False
    assert after.state.record == state.record


def test_without_authentication_owners_do_not_matter() -> None:
    """It was switched off: everything is allowed, as the operator wants it."""
    state = with_sessions()
    assert decide(state, RemoveSession("b"), at(4), POLICY).state.record.sessions.keys() == {"a"}
