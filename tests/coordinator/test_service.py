import asyncio
import contextlib
from dataclasses import replace
from datetime import timedelta

import pytest

from agent.coordinator import changes, engine, service
from agent.coordinator.hang_up import HungUp, while_connected
from agent.coordinator.shards import Group
from agent.coordinator.store import Stored
from agent.core.group_state import (
    AddSession,
    ReceiveHeartbeat,
    ReleaseRole,
    RemoveSession,
    SetOverride,
)
from agent.errors import Conflict, NotFound, OutcomeUnknown, StoreError, TooSoon, Unavailable
from agent.model import (
    AccessEntry,
    AccessList,
    GroupConfig,
    GroupKey,
    GroupRecord,
    HeartbeatAnswer,
    Progress,
    Role,
    RoleOverride,
    SessionConfig,
    Trustee,
)

from .conftest import EPOCH, Stage

KEY = GroupKey("default", "default", "g")
LEASE_S = 2.0


async def join(stage: Stage, *sessions: str, lease_s: float = LEASE_S) -> None:
    await stage.coordinator.create_group(KEY, GroupConfig("g", int(lease_s * 10_000_000)))
    for session in sessions:
        await stage.coordinator.add_session(KEY, AddSession(SessionConfig(session)))


async def beat(stage: Stage, session: str, score: float = 100.0, **more: object) -> HeartbeatAnswer:
    return await stage.coordinator.beat(KEY, ReceiveHeartbeat(session, score, **more))  # type: ignore[arg-type]


async def promote(stage: Stage, session: str) -> HeartbeatAnswer:
    await beat(stage, session)
    answer = await beat(stage, session)
    assert answer.role is Role.PRIMARY
    return answer


async def stored(stage: Stage) -> Stored:
    return (await stage.store.load())[KEY]


async def test_nobody_sees_a_change_before_it_is_durable(stage: Stage) -> None:
    """Neither the caller, nor a status read, nor a blocked reader, nor the next heartbeat (R13)."""
    await join(stage, "a", "b")
    await beat(stage, "a")
    revision = stage.coordinator.status(KEY).revision
    assert revision is not None
    stage.store.free.clear()
    promoting = asyncio.create_task(beat(stage, "a"))
    await stage.settle()
    reading = asyncio.create_task(stage.coordinator.wait_status(KEY, revision, 60))
    other = asyncio.create_task(beat(stage, "b"))
    await stage.settle()
    assert not promoting.done()
    assert not reading.done()
    assert not other.done()
    assert stage.coordinator.status(KEY).primary is None
    stage.store.free.set()
    assert (await promoting).role is Role.PRIMARY
    assert (await reading).primary == "a"
    assert (await other).epoch == 1
    assert (await stored(stage)).record.epoch == 1


async def test_a_heartbeat_that_changes_nothing_durable_writes_nothing(stage: Stage) -> None:
    await join(stage, "a", "b")
    await promote(stage, "a")
    await beat(stage, "b")
    before = stage.store.writes
    for _ in range(5):
        await stage.run_for(0.5)
        await beat(stage, "a")
        await beat(stage, "b")
    assert stage.store.writes == before


async def test_a_failing_store_leaves_the_old_state_in_force(stage: Stage) -> None:
    await join(stage, "a")
    await beat(stage, "a")
    stage.disk_full()
    with pytest.raises(Unavailable) as refusal:
        await beat(stage, "a")
    assert refusal.value.retry_after_s > 0
    assert stage.coordinator.status(KEY).primary is None
    assert await stage.coordinator.readiness_problem() is not None
    stage.store.failing = None
    assert (await beat(stage, "a")).role is Role.PRIMARY
    assert await stage.coordinator.readiness_problem() is None


async def test_a_holder_extends_its_lease_while_the_store_fails(stage: Stage) -> None:
    """A lease extension needs no store; a heartbeat that was refused has extended nothing."""
    await join(stage, "a", "b")
    await promote(stage, "a")
    stage.disk_full()
    for _ in range(8):
        await stage.run_for(0.5)
        assert (await beat(stage, "a")).role is Role.PRIMARY
    await stage.run_for(LEASE_S + 0.1)
    with pytest.raises(Unavailable):
        await beat(stage, "a")
    with pytest.raises(Unavailable):
        await beat(stage, "b")
    stage.store.failing = None
    await stage.run_for(1)
    assert stage.coordinator.status(KEY).primary is None


async def test_what_is_due_is_tried_again_until_the_store_works(stage: Stage) -> None:
    await join(stage, "a")
    await promote(stage, "a")
    stage.disk_full()
    await stage.run_for(LEASE_S + 1)
    assert stage.coordinator.status(KEY).primary == "a"
    stage.store.failing = None
    await stage.run_for(1)
    assert stage.coordinator.status(KEY).primary is None


async def test_a_change_whose_caller_has_gone_is_finished(stage: Stage) -> None:
    await join(stage, "a")
    await beat(stage, "a")
    stage.store.free.clear()
    promoting = asyncio.create_task(beat(stage, "a"))
    await stage.settle()
    promoting.cancel()
    await stage.settle()
    stage.store.free.set()
    await stage.settle()
    assert promoting.cancelled()
    assert stage.coordinator.status(KEY).primary == "a"
    assert (await stored(stage)).record.holder is not None


async def test_a_change_begins_only_if_its_caller_is_still_connected(stage: Stage) -> None:
    """The event loop may learn of the end later: it has not yet read it, or it reads no more from the connection."""
    await join(stage, "a")
    stage.store.free.clear()
    first = asyncio.create_task(stage.coordinator.add_session(KEY, AddSession(SessionConfig("c"))))
    second = asyncio.create_task(stage.coordinator.add_session(KEY, AddSession(SessionConfig("b"))))
    await stage.settle()
    gone = False
    change = stage.coordinator.apply(KEY, SetOverride("a", RoleOverride.PRIMARY))
    late = asyncio.create_task(while_connected(change, asyncio.Event().wait, lambda: gone))
    await stage.settle()
    gone = True
    stage.store.free.set()
    with pytest.raises(HungUp):
        await late
    await asyncio.gather(first, second)
    assert (await stored(stage)).record.sessions["a"].override is RoleOverride.OFF
    await stage.coordinator.apply(KEY, SetOverride("a", RoleOverride.PRIMARY))
    assert (await stored(stage)).record.sessions["a"].override is RoleOverride.PRIMARY


async def test_a_creation_whose_caller_has_gone_is_dropped_and_others_make_the_group(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    free, config = asyncio.Event(), GroupConfig("g", 20_000_000)

    async def hang(_: GroupKey) -> int:
        await free.wait()
        return 0

    monkeypatch.setattr(stage.store, "retired_epoch", hang)
    creations = [asyncio.create_task(stage.coordinator.create_group(KEY, config)) for _ in range(2)]
    await stage.settle()
    creations[0].cancel()
    await stage.settle()
    free.set()
    assert await creations[1] == (config, True)
    assert stage.store.writes == 1


@pytest.mark.parametrize("given_up", [True, False])
async def test_a_creation_is_not_carried_out_after_a_deletion(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, *, given_up: bool
) -> None:
    free = asyncio.Event()

    async def hang(_: GroupKey) -> int:
        await free.wait()
        return 0

    monkeypatch.setattr(stage.store, "retired_epoch", hang)
    creating = asyncio.create_task(
        stage.coordinator.create_group(KEY, GroupConfig("g", 20_000_000))
    )
    await stage.settle()
    deleting = asyncio.create_task(stage.coordinator.delete_group(KEY))
    await stage.settle()
    if given_up:
        creating.cancel()
    free.set()
    await asyncio.wait([creating, deleting])
    await stage.settle()
    assert isinstance(deleting.exception(), NotFound) is given_up
    assert not await stage.store.load()


@pytest.mark.parametrize("fault", [RuntimeError("lost answer"), asyncio.CancelledError()])
async def test_a_change_of_unknown_outcome_is_settled_with_the_store(
    stage: Stage, fault: BaseException
) -> None:
    """It was made, though nobody heard: the next input finds the truth, and no second tenure."""
    await join(stage, "a", "b")
    await beat(stage, "a")
    stage.store.failing_after = fault
    with pytest.raises((RuntimeError, asyncio.CancelledError)):
        await beat(stage, "a")
    stage.store.failing_after = None
    answer = await beat(stage, "b")
    assert (answer.role, answer.epoch) == (Role.SECONDARY, 1)
    assert stage.coordinator.status(KEY).primary == "a"


async def test_a_group_that_somebody_else_changed_is_read_again(stage: Stage) -> None:
    await join(stage, "a")
    foreign = await stored(stage)
    await stage.store.swap(KEY, foreign.version, GroupRecord(foreign.record.config, epoch=7))
    with pytest.raises(Unavailable):
        await stage.coordinator.add_session(KEY, AddSession(SessionConfig("b")))
    _, created = await stage.coordinator.add_session(KEY, AddSession(SessionConfig("b")))
    assert created
    assert stage.coordinator.status(KEY).epoch == 7


async def test_the_creation_of_unknown_outcome_is_found_by_the_next(stage: Stage) -> None:
    stage.store.failing_after = RuntimeError("lost answer")
    config = GroupConfig("g", 20_000_000)
    with pytest.raises(RuntimeError):
        await stage.coordinator.create_group(KEY, config)
    stage.store.failing_after = None
    assert await stage.coordinator.create_group(KEY, config) == (config, False)


async def test_two_creations_at_once_make_one_group(stage: Stage) -> None:
    config = GroupConfig("g", 20_000_000)
    results = await asyncio.gather(*(stage.coordinator.create_group(KEY, config) for _ in range(5)))
    assert sorted(created for _, created in results) == [False] * 4 + [True]


async def test_the_number_of_groups_is_bounded(stage: Stage) -> None:
    for number in range(5):
        key = KEY._replace(group=str(number))
        await stage.coordinator.create_group(key, GroupConfig(str(number), 20_000_000))
    with pytest.raises(Conflict, match="max_groups"):
        await stage.coordinator.create_group(KEY, GroupConfig("g", 20_000_000))


async def test_a_lease_ends_by_itself_and_the_other_takes_over(stage: Stage) -> None:
    await join(stage, "a", "b")
    await promote(stage, "a")
    await beat(stage, "b")
    for _ in range(5):
        await stage.run_for(0.5)
        answer = await beat(stage, "b")
    assert (answer.role, answer.epoch, answer.previous) == (Role.PRIMARY, 2, "a")
    total, entries = await stage.coordinator.history(KEY, 0, 10)
    assert total == 2
    assert [entry.session_id for entry in entries] == ["b", "a"]
    assert entries[1].until is not None


async def test_after_a_restart_the_holder_has_one_full_lease(stage: Stage) -> None:
    """R14: without any heartbeat it keeps its role for L, and then loses it."""
    await join(stage, "a", "b")
    await promote(stage, "a")
    await stage.run_for(LEASE_S - 0.1)
    await stage.restart()
    await stage.run_for(LEASE_S - 0.1)
    await beat(stage, "b")
    assert stage.coordinator.status(KEY).primary == "a"
    await stage.run_for(0.2)
    assert stage.coordinator.status(KEY).primary is None


@pytest.mark.parametrize("first", ["turn", "heartbeat"])
async def test_a_stall_of_the_coordinator_costs_nobody_a_lease(stage: Stage, first: str) -> None:
    """R14: after the stall either the timer or a heartbeat of the other member may come first."""
    await join(stage, "a", "b")
    await promote(stage, "a")
    await stage.run_for(0.2)
    await beat(stage, "b")
    stage.clock.elapsed += 10
    if first == "turn":
        stage.coordinator.run_due_changes()
    else:
        await beat(stage, "b")
    await stage.settle()
    assert stage.coordinator.status(KEY).primary == "a"
    assert (await beat(stage, "a")).role is Role.PRIMARY
    await stage.run_for(LEASE_S + 0.1)
    assert stage.coordinator.status(KEY).primary is None


@pytest.mark.parametrize(("times", "stall_s", "runs_s"), [(10, 0.5, 0.0), (3, 1.5, 1.5)])
async def test_stalls_that_recur_do_not_keep_a_dead_primary(
    stage: Stage, times: int, stall_s: float, runs_s: float
) -> None:
    """R14: short ones count as time; each longer one counts as none, and gives no new lease."""
    await join(stage, "a", "b", lease_s=4)
    await promote(stage, "a")
    for _ in range(times):
        stage.clock.elapsed += stall_s
        stage.coordinator.run_due_changes()
        await stage.settle()
        await stage.run_for(runs_s)
    assert stage.coordinator.status(KEY).primary is None


@pytest.mark.parametrize("answers", [True, False])
async def test_a_store_that_hangs_costs_nobody_a_lease(stage: Stage, *, answers: bool) -> None:
    """The heartbeats that waited for the disk meanwhile have come, though late to be judged."""
    await join(stage, "a", "b")
    await promote(stage, "a")
    stage.store.free.clear()
    overriding = asyncio.create_task(
        stage.coordinator.apply(KEY, SetOverride("a", RoleOverride.PRIMARY))
    )
    await stage.run_for(LEASE_S + 1)
    waiting = asyncio.create_task(beat(stage, "a"))
    await stage.settle()
    stage.store.failing = None if answers else OutcomeUnknown("no answer")
    stage.store.free.set()
    with contextlib.nullcontext() if answers else pytest.raises(Unavailable):
        await overriding
    assert (await waiting).role is Role.PRIMARY
    assert stage.coordinator.status(KEY).epoch == 1


@pytest.mark.parametrize("answers", [True, False])
async def test_a_store_that_hangs_while_a_change_is_settled_costs_nobody_a_lease(
    stage: Stage, *, answers: bool
) -> None:
    await join(stage, "a", "b")
    await promote(stage, "a")
    stage.store.failing = OutcomeUnknown("no answer")
    with pytest.raises(Unavailable):
        await stage.coordinator.apply(KEY, SetOverride("a", RoleOverride.PRIMARY))
    stage.store.failing = None
    stage.store.free.clear()
    settling = asyncio.create_task(beat(stage, "b"))
    await stage.run_for(LEASE_S + 1)
    stage.store.failing_settle = None if answers else StoreError("no answer")
    stage.store.free.set()
    with contextlib.nullcontext() if answers else pytest.raises(Unavailable):
        await settling
    stage.store.failing_settle = None
    assert (await beat(stage, "a")).role is Role.PRIMARY
    assert stage.coordinator.status(KEY).epoch == 1


async def test_the_number_of_changes_that_wait_for_the_store_is_bounded(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Callers that give up and come back must not fill the memory while the store hangs."""
    monkeypatch.setattr(changes, "MAX_CHANGES", 10)
    await join(stage, "a")
    stage.store.free.clear()
    overrides = (SetOverride("a", RoleOverride.PRIMARY), SetOverride("a", RoleOverride.OFF))
    asked = [
        asyncio.create_task(stage.coordinator.apply(KEY, overrides[number % 2]))
        for number in range(30)
    ]
    await stage.settle()
    refused = [task.exception() for task in asked if task.done()]
    assert len(refused) == 20
    assert all("10 changes wait for the store already" in str(one) for one in refused)
    stage.store.free.set()
    await asyncio.wait(asked)
    assert sum(task.exception() is None for task in asked) == 10
    await stage.coordinator.apply(KEY, overrides[0])


async def test_leases_that_expire_together_leave_room_for_callers(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the heartbeats that are to take the roles over would be answered 503."""
    keys = [KEY._replace(group=f"g{number}") for number in range(4)]
    for key in keys:
        await stage.coordinator.create_group(key, GroupConfig(key.group, 20_000_000))
        await stage.coordinator.add_session(key, AddSession(SessionConfig("a")))
        for _ in range(2):
            await stage.coordinator.beat(key, ReceiveHeartbeat("a", 100.0))
    await stage.run_for(LEASE_S / 2)
    await join(stage, "b")
    await beat(stage, "b")
    monkeypatch.setattr(changes, "MAX_CHANGES", 8)
    stage.store.free.clear()
    await stage.run_for(LEASE_S / 2 + 0.1)
    confirming = asyncio.create_task(beat(stage, "b"))
    await stage.settle()
    stage.store.free.set()
    assert (await confirming).role is Role.PRIMARY
    await stage.settle()
    assert {stage.coordinator.status(key).primary for key in keys} == {None}


async def test_no_second_due_change_of_a_group_waits(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They take no place, so a slow store must not collect them."""
    run_tick, running, most = engine.Engine._run_tick, 0, 0

    async def counted(self: engine.Engine, group: Group) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await run_tick(self, group)
        running -= 1

    monkeypatch.setattr(engine.Engine, "_run_tick", counted)
    await join(stage, "a")
    await promote(stage, "a")
    may_write = asyncio.Semaphore(0)
    monkeypatch.setattr(stage.store.free, "wait", may_write.acquire)
    overrides = (SetOverride("a", RoleOverride.PRIMARY), SetOverride("a", RoleOverride.OFF))
    asked = [
        asyncio.create_task(stage.coordinator.apply(KEY, overrides[number % 2]))
        for number in range(10)
    ]
    for _ in asked:
        await stage.run_for(LEASE_S + 0.1)
        may_write.release()
    await asyncio.wait(asked)
    may_write.release()
    await stage.run_for(LEASE_S + 1)
    assert most == 1
    assert running == 0
    assert stage.coordinator.status(KEY).primary is None


async def test_a_due_change_that_fails_once_its_shard_is_gone_is_not_tried_again(
    stage: Stage,
) -> None:
    """An etcd that hangs ends the leadership first, and then the write."""
    await join(stage, "a")
    await promote(stage, "a")
    stage.store.free.clear()
    await stage.run_for(LEASE_S + 0.1)
    stage.coordinator.engine.drop(stage.coordinator.engine.groups[KEY].shard)
    stage.disk_full()
    stage.store.free.set()
    await stage.run_for(1)


async def test_a_change_that_still_waits_when_its_caller_hangs_up_is_dropped(stage: Stage) -> None:
    """The one that is being written is finished: it may be durable already."""
    await join(stage, "a", "b")
    stage.store.free.clear()
    begun = asyncio.create_task(
        stage.coordinator.apply(KEY, SetOverride("a", RoleOverride.PRIMARY))
    )
    waiting = asyncio.create_task(
        stage.coordinator.apply(KEY, SetOverride("b", RoleOverride.PRIMARY))
    )
    await stage.settle()
    begun.cancel()
    waiting.cancel()
    await asyncio.wait([begun, waiting])
    stage.store.free.set()
    await stage.settle()
    overrides = {name: stage.coordinator.session(KEY, name).record.override for name in ("a", "b")}
    assert overrides == {"a": RoleOverride.PRIMARY, "b": RoleOverride.OFF}


@pytest.mark.parametrize("what", ["access list", "group"])
async def test_the_number_of_names_that_wait_for_the_store_is_bounded(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """A caller can name a new namespace or group in each request; giving up ends neither the read nor the creation."""
    monkeypatch.setattr(changes, "MAX_CHANGES", 3)
    free = asyncio.Event()

    async def hang(*_: object) -> None:
        await free.wait()

    async def ask(number: int) -> None:
        if what == "group":
            key = KEY._replace(group=f"g{number}")
            await stage.coordinator.create_group(key, GroupConfig(key.group, 20_000_000))
        else:
            await stage.coordinator.access("default", f"n{number}")

    monkeypatch.setattr(stage.store, "access", hang)
    monkeypatch.setattr(stage.store, "create", hang)
    asked = [asyncio.create_task(ask(number)) for number in range(30)]
    await stage.settle()
    refused = [task.exception() for task in asked if task.done()]
    free.set()
    await asyncio.wait(asked)
    assert len(refused) == 27
    assert all("3 changes wait for the store already" in str(one) for one in refused)
    assert await stage.coordinator.access("default", "n29") is None


async def test_progress_is_durable_within_a_second(stage: Stage) -> None:
    """R13; and it changes neither the group's record nor its version."""
    await join(stage, "a")
    await promote(stage, "a")
    before = await stored(stage)
    await stage.run_for(0.5)
    await beat(stage, "a", last_data=EPOCH)
    await stage.run_for(0.9)
    assert await stored(stage) == replace(before, progress=Progress(1, EPOCH))
    await stage.restart()
    assert stage.coordinator.status(KEY).last_data == EPOCH


@pytest.mark.parametrize("failing", [False, True])
async def test_a_stop_saves_the_progress_that_is_left(stage: Stage, *, failing: bool) -> None:
    """If the store fails then, the stop goes on without."""
    await join(stage, "a")
    await promote(stage, "a")
    await stage.run_for(0.2)
    await beat(stage, "a", last_data=EPOCH)
    if failing:
        stage.disk_full()
    await stage.coordinator.stop()
    stage.store.failing = None
    assert (await stored(stage)).progress == (None if failing else Progress(1, EPOCH))


async def test_the_progress_of_many_groups_is_saved_in_one_write(stage: Stage) -> None:
    keys = [KEY._replace(group=str(number)) for number in range(5)]
    for key in keys:
        await stage.coordinator.create_group(key, GroupConfig(key.group, 20_000_000))
        await stage.coordinator.add_session(key, AddSession(SessionConfig("a")))
        for _ in range(2):
            await stage.coordinator.beat(key, ReceiveHeartbeat("a", 100.0))
    writes = stage.store.writes
    for second in range(1, 4):
        await stage.run_for(0.2)
        moment = EPOCH + timedelta(seconds=second)
        for key in keys:
            await stage.coordinator.beat(key, ReceiveHeartbeat("a", 100.0, last_data=moment))
        await stage.run_for(1)
        assert {one.progress for one in (await stage.store.load()).values()} == {
            Progress(1, moment)
        }
        assert stage.store.writes == writes + second


async def test_more_progress_than_one_write_may_have_follows_in_the_next(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "PROGRESS_BATCH", 2)
    keys = [KEY._replace(group=str(number)) for number in range(5)]
    for key in keys:
        await stage.coordinator.create_group(key, GroupConfig(key.group, 20_000_000))
        await stage.coordinator.add_session(key, AddSession(SessionConfig("a")))
        for _ in range(2):
            await stage.coordinator.beat(key, ReceiveHeartbeat("a", 100.0))
    await stage.run_for(0.2)
    for key in keys:
        await stage.coordinator.beat(key, ReceiveHeartbeat("a", 100.0, last_data=EPOCH))
    writes = stage.store.writes
    await stage.run_for(1)
    assert {one.progress for one in (await stage.store.load()).values()} == {Progress(1, EPOCH)}
    assert stage.store.writes == writes + 3


async def test_progress_that_could_not_be_saved_is_saved_later(stage: Stage) -> None:
    await join(stage, "a")
    await promote(stage, "a")
    await stage.run_for(0.2)
    await beat(stage, "a", last_data=EPOCH)
    stage.disk_full()
    await stage.run_for(1.5)
    assert (await stored(stage)).progress is None
    stage.store.failing = None
    await stage.run_for(0.8)
    assert (await stored(stage)).progress == Progress(1, EPOCH)


async def test_the_progress_of_a_deleted_group_is_not_saved(stage: Stage) -> None:
    await join(stage, "a")
    await promote(stage, "a")
    await stage.run_for(0.2)
    await beat(stage, "a", last_data=EPOCH)
    await stage.coordinator.apply(KEY, ReleaseRole("a", 1))
    await stage.coordinator.apply(KEY, RemoveSession("a"))
    await stage.coordinator.delete_group(KEY)
    writes = stage.store.writes
    await stage.run_for(1)
    assert stage.store.writes == writes


async def test_heartbeats_do_not_wait_while_progress_is_kept(stage: Stage) -> None:
    """A hanging disk delays no renewal; and what came in meanwhile is not undone."""
    await join(stage, "a", "b")
    await promote(stage, "a")
    await stage.run_for(0.2)
    await beat(stage, "a", last_data=EPOCH)
    stage.store.free.clear()
    for number in range(1, 9):
        await stage.run_for(0.5)
        moment = EPOCH + timedelta(seconds=number)
        answer = await asyncio.wait_for(beat(stage, "a", last_data=moment), 5)
        assert answer.last_data == moment
    stage.store.free.set()
    await stage.run_for(1)
    status = stage.coordinator.status(KEY)
    assert (status.primary, status.last_data) == ("a", EPOCH + timedelta(seconds=8))
    assert (await stored(stage)).progress == Progress(1, EPOCH + timedelta(seconds=8))


def newest(stage: Stage) -> int:
    revision = stage.coordinator.status(KEY).revision
    assert revision is not None
    return revision


async def test_a_reader_with_a_revision_of_a_deleted_group_does_not_wait(stage: Stage) -> None:
    """It has seen a revision that this coordinator never gave: what it has is out of date."""
    await join(stage, "a")
    status = await asyncio.wait_for(stage.coordinator.wait_status(KEY, newest(stage) + 1, 100), 5)
    assert status.revision == newest(stage)


async def test_a_waiting_reader_is_answered_when_the_wait_ends(stage: Stage) -> None:
    await join(stage, "a")
    status = await stage.coordinator.wait_status(KEY, newest(stage), 0.01)
    assert status.revision == stage.coordinator.status(KEY).revision


async def test_waiting_readers_are_answered_at_a_stop(stage: Stage) -> None:
    await join(stage, "a")
    reading = asyncio.create_task(stage.coordinator.wait_status(KEY, newest(stage), 100))
    await stage.settle()
    stage.coordinator.refuse_requests()
    assert (await asyncio.wait_for(reading, 5)).primary is None
    with pytest.raises(Unavailable):
        await beat(stage, "a")


async def test_deleting_the_group_answers_its_readers(stage: Stage) -> None:
    await join(stage)
    reading = asyncio.create_task(stage.coordinator.wait_status(KEY, newest(stage), 100))
    await stage.settle()
    await stage.coordinator.delete_group(KEY)
    with pytest.raises(NotFound):
        await asyncio.wait_for(reading, 5)
    assert await stage.store.load() == {}


async def test_the_number_of_waiting_readers_is_bounded(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "MAX_READERS", 1)
    await join(stage)
    first = asyncio.create_task(stage.coordinator.wait_status(KEY, newest(stage), 100))
    await stage.settle()
    with pytest.raises(Unavailable, match="1 status reads wait already") as refused:
        await stage.coordinator.wait_status(KEY, newest(stage), 100)
    assert refused.value.retry_after_s == service.READERS_RETRY_S
    assert (await stage.coordinator.wait_status(KEY, 0, 100)).revision == newest(stage)
    assert not first.done()
    first.cancel()
    await stage.settle()
    assert stage.coordinator.blocked_readers == 0


async def test_a_group_with_active_sessions_is_not_deleted(stage: Stage) -> None:
    await join(stage, "a")
    await promote(stage, "a")
    with pytest.raises(Conflict):
        await stage.coordinator.delete_group(KEY)
    await stage.coordinator.apply(KEY, RemoveSession("a"))
    await stage.coordinator.delete_group(KEY)
    with pytest.raises(NotFound):
        stage.coordinator.status(KEY)


async def test_a_release_lets_the_other_be_promoted_at_once(stage: Stage) -> None:
    await join(stage, "a", "b")
    await promote(stage, "a")
    await beat(stage, "b")
    await stage.coordinator.apply(KEY, ReleaseRole("a", 1, hold_off_s=5))
    assert (await beat(stage, "b")).role is Role.PRIMARY


async def test_a_heartbeat_that_comes_too_soon_is_refused_and_changes_nothing(stage: Stage) -> None:
    await join(stage, "a")
    await promote(stage, "a")
    with pytest.raises(TooSoon):
        await beat(stage, "a", score=3)
    assert stage.coordinator.session(KEY, "a").score == 100


async def test_each_change_of_role_is_one_log_line(
    stage: Stage, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    await join(stage, "a")
    await promote(stage, "a")
    await stage.run_for(LEASE_S + 0.1)
    lines = [r.fields for r in caplog.records if r.getMessage() == "role changed"]  # type: ignore[attr-defined]
    assert [(line["before"], line["after"], line["epoch"]) for line in lines] == [
        ("Secondary", "PendingPrimary", 0),
        ("PendingPrimary", "Primary", 1),
        ("Primary", "Secondary", 1),
    ]
    assert lines[2]["reason"] == "its lease ended without a heartbeat"
    assert all((line["group"], line["session"]) == ("g", "a") for line in lines)


async def test_access_lists_survive_a_restart(stage: Stage) -> None:
    await join(stage)
    acl = AccessList((AccessEntry(Trustee(1, "ann"), denied=False, rights=31),))
    await stage.coordinator.set_group_access(KEY, acl)
    await stage.coordinator.set_access("default", "default", acl)
    await stage.restart()
    assert stage.coordinator.group_access(KEY) == acl
    assert await stage.coordinator.access("default", "default") == acl
    assert await stage.coordinator.access("default", "other") is None


async def test_an_access_list_is_read_once_for_all_who_need_it(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each change of any list ends all of them: heartbeats of everybody must not all read theirs again."""
    old, new = AccessList(), AccessList((AccessEntry(Trustee(1, "ann"), denied=False, rights=1),))
    answers: list[asyncio.Future[AccessList]] = []

    async def read(*_where: str) -> AccessList:
        answers.append(asyncio.get_running_loop().create_future())
        return await answers[-1]

    def reading() -> list[asyncio.Task[AccessList | None]]:
        return [asyncio.create_task(stage.coordinator.access("t", "n")) for _ in range(20)]

    monkeypatch.setattr(stage.store, "access", read)
    before = reading()
    await stage.settle()
    stage.coordinator.forget_access()
    after = reading()
    await stage.settle()
    assert len(answers) == 2
    answers[1].set_result(new)
    answers[0].set_result(old)
    assert await asyncio.gather(*before) == [old] * 20
    assert await asyncio.gather(*after, *reading()) == [new] * 40
    stage.coordinator.forget_access()
    failing = reading()
    await stage.settle()
    answers[2].set_exception(StoreError("no"))
    for task in failing:
        with pytest.raises(Unavailable):
            await task
    again = asyncio.gather(*reading())
    await stage.settle()
    answers[3].set_result(new)
    assert await again == [new] * 20


async def test_groups_are_listed_by_id_within_their_namespace(stage: Stage) -> None:
    for group in ("c", "a", "b"):
        key = KEY._replace(group=group)
        await stage.coordinator.create_group(key, GroupConfig(group, 20_000_000))
    await stage.coordinator.create_group(GroupKey("t", "n", "x"), GroupConfig("x", 20_000_000))
    total, page = await stage.coordinator.list_groups("default", "default", 1, 1)
    assert (total, [group.id for group in page]) == (3, ["b"])


async def test_a_group_that_is_made_again_goes_on_with_its_epochs(stage: Stage) -> None:
    """R15: who refuses older epochs, downstream, must not refuse the new group's."""
    await join(stage, "a")
    assert (await promote(stage, "a")).epoch == 1
    await stage.coordinator.apply(KEY, RemoveSession("a"))
    await stage.coordinator.delete_group(KEY)
    await join(stage, "a")
    assert stage.coordinator.status(KEY).primary is None
    assert (await promote(stage, "a")).epoch == 2
    _, tenures = await stage.coordinator.history(KEY, 0, 10)
    assert [tenure.epoch for tenure in tenures] == [2]
