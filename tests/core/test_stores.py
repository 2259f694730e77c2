"""R3: the stores whose answers count, and members of a server that may have lost its data."""

import pytest

from agent.core.effects import Cause, Join, Publish, Release, SendHeartbeat, StartHook
from agent.core.events import HeartbeatFailure, Joined, Left
from agent.core.timing import plan
from agent.model import Role

from .session_bench import (
    LEASE_S,
    OTHER_STORE,
    STORE,
    TIMING,
    Answer,
    Bench,
    P,
    S,
    W,
    kinds,
    status,
    v1,
)

FOREIGN = [OTHER_STORE, None]


# -- answers of another store -----------------------------------------------------------------------


@pytest.mark.parametrize("store_id", FOREIGN)
@pytest.mark.parametrize("role", [W, P])
def test_r3_an_answer_from_another_store_does_not_promote(store_id: str | None, role: Role) -> None:
    bench = Bench().member()
    bench.answered(Answer(role, 7, 70, store_id=store_id))
    assert bench.session.role is S
    assert Release not in kinds(bench.log), "the tenure of another store is none of ours"


@pytest.mark.parametrize("store_id", FOREIGN)
def test_r3_an_answer_from_another_store_does_not_renew_and_is_retried_early(
    store_id: str | None,
) -> None:
    bench = Bench().primary()
    bench.wake()
    before = bench.session.renew_by
    bench.answered(Answer(P, store_id=store_id), after_s=0.1)
    assert bench.session.renew_by == before
    sent_at = bench.now
    assert kinds(bench.wake()) == [SendHeartbeat]
    assert bench.now - sent_at == pytest.approx(TIMING.renew_s / 10)


@pytest.mark.parametrize("store_id", FOREIGN)
def test_r3_an_answer_from_another_store_does_not_demote(store_id: str | None) -> None:
    bench = Bench().primary()
    bench.wake()
    bench.answered(Answer(S, 9, 90, store_id=store_id))
    assert bench.session.role is P


@pytest.mark.parametrize("store_id", FOREIGN)
def test_r3_an_epoch_of_another_store_is_ignored(store_id: str | None) -> None:
    """Otherwise every answer of its own store would count as stale."""
    bench = Bench().member()
    bench.answered(Answer(S, 999, 999, store_id=store_id))
    bench.step(status("me", None, 999, 999, store_id))
    assert bench.session.newest_epoch is None
    bench.wake()
    bench.answered(Answer(P))
    assert bench.session.role is P


@pytest.mark.parametrize("store_id", FOREIGN)
def test_r3_a_status_of_another_store_does_not_demote(store_id: str | None) -> None:
    bench = Bench().primary()
    assert bench.step(status("other", None, 2, 9, store_id)) == []
    assert bench.session.role is P


def test_r3_a_status_before_the_registration_is_ignored() -> None:
    bench = Bench()
    bench.begin()
    bench.step(status("other", None, 999, 999, OTHER_STORE))
    bench.step(Joined(TIMING, STORE))
    bench.answered(Answer(P))
    assert bench.session.role is P


def test_r3_a_lease_lost_to_answers_of_another_store_has_its_own_cause() -> None:
    bench = Bench().primary()
    while bench.session.role is P:
        if kinds(bench.wake()) == [SendHeartbeat]:
            bench.answered(Answer(P, store_id=OTHER_STORE))
    (lost,) = [e for e in bench.log if isinstance(e, Publish) and e.role is S]
    assert lost.cause is Cause.OTHER_STORE
    assert "another store" in lost.reason


def test_r3_a_heartbeat_failed_by_another_store_is_an_error() -> None:
    bench = Bench().primary()
    before = bench.session.renew_by
    bench.wake()
    assert bench.fails(HeartbeatFailure.OTHER_STORE) == []
    assert bench.session.renew_by == before


@pytest.mark.parametrize("store_id", FOREIGN)
def test_r3_a_session_does_not_register_at_another_store(store_id: str | None) -> None:
    """It retries: another endpoint of the list may have the right store."""
    bench = Bench(store_id=STORE)
    bench.begin()
    assert bench.step(Joined(TIMING, store_id)) == []
    assert not bench.session.accepts_store(store_id)
    assert kinds(bench.wake()) == [Join]
    assert kinds(bench.step(Joined(TIMING, STORE))) == [SendHeartbeat]


def test_r3_a_session_keeps_the_store_that_it_has_joined() -> None:
    bench = Bench()
    assert bench.session.accepts_store(STORE)
    assert bench.session.accepts_store(OTHER_STORE)
    bench.member()
    assert bench.session.store_id == STORE
    assert bench.session.accepts_store(STORE)
    assert not bench.session.accepts_store(OTHER_STORE)
    assert not bench.session.accepts_store(None)


def test_r3_answers_of_another_store_neither_shorten_nor_renew_the_lease() -> None:
    """An independent coordinator answers 404, and then accepts a registration."""
    bench = Bench().primary()
    renew_by = bench.session.renew_by
    bench.wake()
    assert kinds(bench.fails(HeartbeatFailure.GONE)) == [Join]
    while bench.session.role is P:
        effects = bench.wake()
        if kinds(effects) == [Join]:
            bench.step(Joined(TIMING, OTHER_STORE))
    assert bench.now == pytest.approx(renew_by)


# -- servers without a store id ---------------------------------------------------------------------


def registered_again(*, store_id: str | None = None, lease_s: float = LEASE_S) -> Bench:
    """A member of a plain v1 server that has answered 404 and registered the session again."""
    bench = Bench().member(v1_server=True)
    bench.answered(v1(S))
    bench.wake()
    bench.fails(HeartbeatFailure.GONE)
    bench.step(Joined(plan(lease_s), store_id))
    return bench


def beats_for(bench: Bench, seconds: float, answer: Answer) -> None:
    """Answer each heartbeat at once, for this long."""
    end = bench.now + seconds
    while bench.session.wake_at < end:
        if SendHeartbeat in kinds(bench.wake()):
            bench.answered(answer)
    bench.now = end


@pytest.mark.parametrize("role", [W, P])
def test_r3_a_second_registration_at_a_server_without_epochs_accepts_no_role_for_one_lease(
    role: Role,
) -> None:
    """Such a server has lost its data, including the lease of another member."""
    bench = registered_again()
    bench.answered(v1(role))
    beats_for(bench, LEASE_S - 0.1, v1(role))
    assert bench.session.role is S
    beats_for(bench, 0.1 + TIMING.heartbeat_interval_s, v1(role))
    assert bench.session.role is role


def test_r3_the_first_registration_at_a_server_without_epochs_does_not_wait() -> None:
    bench = Bench().member(v1_server=True)
    bench.answered(v1(P))
    assert bench.session.role is P


def test_r3_a_second_registration_at_a_server_with_a_store_does_not_wait() -> None:
    bench = Bench().member()
    bench.fails(HeartbeatFailure.GONE)
    bench.step(Joined(TIMING, STORE))
    bench.wake()
    bench.answered(Answer(P))
    assert bench.session.role is P


def test_r3_the_wait_is_as_long_as_the_longer_of_both_failover_timeouts() -> None:
    """The group may have been created again with a shorter timeout than the holder's."""
    bench = registered_again(lease_s=LEASE_S / 2)
    beats_for(bench, LEASE_S - 0.1, v1(P))
    assert bench.session.role is S


def test_r3_a_session_that_left_a_server_without_epochs_to_cool_down_also_waits() -> None:
    """It may have lost its data meanwhile, which its answers do not show."""
    bench = Bench(hooks={P}).pending(v1_server=True)
    bench.answered(v1(P))
    bench.ends(ok=False)
    bench.step(Left())
    assert Join in kinds(bench.wake())
    bench.step(Joined(TIMING))
    beats_for(bench, LEASE_S - 0.1, v1(P))
    assert bench.session.role is S


def test_r3_two_members_of_a_v1_server_that_lost_its_data_are_never_both_primary() -> None:
    """In either order of their next heartbeats: the holder demotes, the other one waits."""
    for first in (0, 1):
        pair = [Bench(hooks={S}).primary(v1_server=True), Bench(hooks={S}).member(v1_server=True)]
        holder, other = pair
        other.answered(v1(S))
        holder.wake()
        other.wake()
        lease_until = holder.session.lease_until
        for bench in (pair[first], pair[1 - first]):
            bench.fails(HeartbeatFailure.GONE)
            bench.step(Joined(TIMING))
        if holder.session.role is S:
            holder.ends()
        assert holder.session.role is S
        for bench in pair:
            beats_for(bench, LEASE_S - 0.1, v1(P))
            assert bench.session.role is S
        beats_for(other, 0.1 + TIMING.heartbeat_interval_s, v1(P))
        assert other.session.role is P
        assert other.now > lease_until


def test_r3_the_member_waits_although_the_holder_receives_no_answers() -> None:
    """The holder is cut off while the server loses its data: its lease ends before the wait does."""
    holder = Bench(hooks={S}).primary(v1_server=True)
    other = registered_again()
    other.now = holder.now
    other.step(Joined(TIMING))
    beats_for(other, holder.session.lease_until - other.now, v1(P))
    assert other.session.role is S
    beats_for(other, 2 * TIMING.heartbeat_interval_s, v1(P))
    assert other.session.role is P


def test_r3_a_v1_server_that_gets_a_store_counts_as_a_new_server() -> None:
    """An upgrade in place, or the next one of a list with two independent servers."""
    bench = Bench(hooks={S}).primary(v1_server=True)
    bench.wake()
    assert kinds(bench.answered(Answer(P))) == [(Publish, S), Join, (StartHook, S)]
    bench.ends()
    bench.step(Joined(TIMING, STORE))
    assert bench.session.store_id == STORE
    assert bench.session.newest_epoch is None
    beats_for(bench, LEASE_S - 0.1, Answer(P, 3, 30))
    assert bench.session.role is S
    assert Release(3, "registered again", 0.0) in bench.log


def test_r3_a_secondary_registers_again_at_a_server_that_gets_a_store() -> None:
    bench = Bench().member(v1_server=True)
    assert kinds(bench.answered(Answer(P))) == [Join]
    assert bench.session.role is S


def test_r3_a_forgotten_answer_of_a_server_that_gets_a_store_changes_nothing() -> None:
    bench = Bench().primary(v1_server=True)
    assert bench.answered(Answer(P), beat=999) == []
    assert bench.session.role is P


def test_r5_a_v1_server_with_epochs_is_released_by_leaving() -> None:
    """A server without a store id has no release: waiting for one would block the role."""
    bench = Bench(hooks={P}).member(v1_server=True)
    bench.answered(Answer(P, 1, 1, store_id=None))
    bench.ends(ok=False)
    assert Release not in kinds(bench.log)
    assert bench.session.phase == "cooling"
