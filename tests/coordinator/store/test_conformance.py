"""What every store promises, whatever it keeps its groups in."""

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path

import pytest

from agent.coordinator.store import MOST_ENTRIES, Store, Stored, etcd_shard, memory, sqlite
from agent.coordinator.store.codec import HISTORY_BOUND
from agent.coordinator.store.memory import MemoryStore
from agent.coordinator.store.sqlite import SqliteStore
from agent.errors import CasMismatch, StoreError
from agent.model import (
    AccessEntry,
    AccessList,
    GroupConfig,
    GroupKey,
    GroupRecord,
    HistoryEntry,
    Progress,
    Trustee,
)

from .conftest import SINCE, MakeRecord, led_shard


@pytest.fixture(params=["memory", "sqlite", "etcd"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Store]:
    if request.param == "etcd":
        async with led_shard(request.getfixturevalue("etcd_server")) as shard:
            yield shard
        return
    made: Store = MemoryStore() if request.param == "memory" else SqliteStore.open(tmp_path / "d")
    yield made
    await made.close()


def tenure(epoch: int, why_ended: str | None = None) -> HistoryEntry:
    return HistoryEntry(
        epoch=epoch,
        session_id=f"s{epoch % 2}",
        since=SINCE + timedelta(seconds=epoch),
        why_started="chosen",
        until=SINCE + timedelta(seconds=epoch + 1) if why_ended else None,
        why_ended=why_ended,
    )


async def test_a_created_group_is_loaded_as_it_was_given(
    store: Store, key: GroupKey, make_record: MakeRecord
) -> None:
    version = await store.create(key, make_record(1))
    assert await store.load() == {key: Stored(version, make_record(1))}


async def test_a_record_of_nothing_but_defaults_is_kept(store: Store, key: GroupKey) -> None:
    record = GroupRecord(GroupConfig("pumps", 1))
    version = await store.create(key, record)
    assert await store.load() == {key: Stored(version, record)}


async def test_a_group_that_exists_is_not_created_again(
    store: Store, key: GroupKey, make_record: MakeRecord
) -> None:
    version = await store.create(key, make_record(1))
    with pytest.raises(CasMismatch, match=r"'pumps'.*exists already"):
        await store.create(key, make_record(2))
    assert await store.load() == {key: Stored(version, make_record(1))}


async def test_a_swap_replaces_the_record_and_gives_a_new_version(
    store: Store, key: GroupKey, make_record: MakeRecord
) -> None:
    version = await store.create(key, make_record(1))
    newer = await store.swap(key, version, make_record(2))
    assert newer != version
    assert await store.load() == {key: Stored(newer, make_record(2))}


async def test_a_swap_of_another_version_changes_neither_record_nor_history(
    store: Store, key: GroupKey, make_record: MakeRecord
) -> None:
    version = await store.create(key, make_record(1))
    newer = await store.swap(key, version, make_record(2), [tenure(2)])
    with pytest.raises(CasMismatch, match=f"not at version {version} any more.*{newer}"):
        await store.swap(key, version, make_record(3), [tenure(2, "stale"), tenure(3)])
    assert await store.load() == {key: Stored(newer, make_record(2))}
    assert await store.history(key) == (1, [tenure(2)])


async def test_a_missing_group_is_neither_swapped_nor_deleted(
    store: Store, key: GroupKey, make_record: MakeRecord
) -> None:
    with pytest.raises(CasMismatch, match="gone"):
        await store.swap(key, 1, make_record(1), [tenure(1)])
    with pytest.raises(CasMismatch, match="gone"):
        await store.delete(key, 1, 1)
    assert await store.load() == {}
    assert await store.history(key) == (0, [])


async def test_a_delete_takes_the_group_with_its_history_and_leaves_the_others(
    store: Store, key: GroupKey, make_record: MakeRecord
) -> None:
    other = key._replace(group="fans")
    stays = await store.swap(
        other, await store.create(other, make_record(7)), make_record(8), [tenure(8)]
    )
    version = await store.create(key, make_record(1))
    version = await store.swap(key, version, make_record(2), [tenure(2)])
    with pytest.raises(CasMismatch):
        await store.delete(key, version + 1, 1)
    await store.delete(key, version, 1)
    assert await store.load() == {other: Stored(stays, make_record(8))}
    await store.create(key, make_record(1))
    assert await store.history(key) == (0, [])
    assert await store.history(other) == (1, [tenure(8)])


async def test_a_version_does_not_outlive_its_group(
    store: Store, key: GroupKey, make_record: MakeRecord
) -> None:
    version = await store.create(key, make_record(1))
    await store.delete(key, version, 1)
    again = await store.create(key, make_record(1))
    with pytest.raises(CasMismatch):
        await store.swap(key, version, make_record(9))
    assert await store.load() == {key: Stored(again, make_record(1))}


async def test_of_swaps_that_overlap_exactly_one_wins(
    store: Store, key: GroupKey, make_record: MakeRecord
) -> None:
    version = await store.create(key, make_record(1))
    swaps = (store.swap(key, version, make_record(n), [tenure(n)]) for n in range(2, 22))
    outcomes = await asyncio.gather(*swaps, return_exceptions=True)
    won = [n for n, outcome in enumerate(outcomes, start=2) if isinstance(outcome, int)]
    assert len(won) == 1
    assert sum(isinstance(outcome, CasMismatch) for outcome in outcomes) == len(outcomes) - 1
    (stored,) = (await store.load()).values()
    assert stored.record == make_record(won[0])
    assert await store.history(key) == (1, [tenure(won[0])])


async def test_history_is_upserted_by_epoch_and_read_newest_first_in_pages(
    store: Store, key: GroupKey, make_record: MakeRecord
) -> None:
    version = await store.create(key, make_record(1))
    version = await store.swap(key, version, make_record(3), [tenure(3), tenure(1), tenure(2)])
    await store.swap(key, version, make_record(4), [tenure(3, "lease ended"), tenure(4)])
    entries = [tenure(4), tenure(3, "lease ended"), tenure(2), tenure(1)]
    assert await store.history(key) == (4, entries)
    assert await store.history(key, skip=1, count=2) == (4, entries[1:3])
    assert await store.history(key, skip=9) == (4, [])
    assert await store.history(key, count=0) == (4, [])


async def test_history_keeps_the_newest_tenures_up_to_its_bound(
    store: Store, key: GroupKey, make_record: MakeRecord
) -> None:
    version = await store.create(key, make_record(1))
    many = [tenure(epoch) for epoch in range(1, HISTORY_BOUND + 5)]
    for first in range(0, len(many), MOST_ENTRIES):
        some = many[first : first + MOST_ENTRIES]
        version = await store.swap(key, version, make_record(1), some)
    await store.swap(key, version, make_record(1), [tenure(HISTORY_BOUND + 5)])
    total, entries = await store.history(key, count=2 * HISTORY_BOUND)
    assert (total, len(entries)) == (HISTORY_BOUND, HISTORY_BOUND)
    assert (entries[0].epoch, entries[-1].epoch) == (HISTORY_BOUND + 5, 6)


async def test_progress_is_kept_beside_the_record_and_leaves_its_version(
    store: Store, key: GroupKey, make_record: MakeRecord
) -> None:
    fans, gone = key._replace(group="fans"), key._replace(group="gone")
    version = await store.create(key, make_record(1))
    other = await store.create(fans, make_record(2))
    first, second = Progress(1, SINCE), Progress(3, SINCE + timedelta(microseconds=1))
    await store.save_progress({key: first, fans: second, gone: first})
    assert await store.load() == {
        key: Stored(version, make_record(1), first),
        fans: Stored(other, make_record(2), second),
    }
    await store.save_progress({key: second})
    newer = await store.swap(key, version, make_record(4), [tenure(4)])
    assert (await store.load())[key] == Stored(newer, make_record(4), second)
    assert (await store.load())[fans] == Stored(other, make_record(2), second)


async def test_progress_ends_with_its_group(
    store: Store, key: GroupKey, make_record: MakeRecord
) -> None:
    version = await store.create(key, make_record(1))
    await store.save_progress({key: Progress(1, SINCE)})
    await store.delete(key, version, 1)
    await store.save_progress({key: Progress(1, SINCE)})
    again = await store.create(key, make_record(1))
    assert await store.load() == {key: Stored(again, make_record(1))}


async def test_the_access_list_of_a_namespace_is_its_own_and_replaced_as_a_whole(
    store: Store,
) -> None:
    first = AccessList((AccessEntry(Trustee(2, "c"), denied=False, rights=1),))
    assert await store.access("t", "n") is None
    await store.set_access("t", "n", first)
    await store.set_access("t", "other", AccessList())
    assert await store.access("t", "n") == first
    assert await store.access("t", "other") == AccessList()
    await store.set_access("t", "n", AccessList())
    assert await store.access("t", "n") == AccessList()
    assert await store.access("T", "n") is None
    for _ in range(2):
        await store.set_access("t", "n", None)
        assert await store.access("t", "n") is None
    assert await store.access("t", "other") == AccessList()


async def test_names_that_differ_in_one_letter_are_different(
    store: Store, make_record: MakeRecord
) -> None:
    names = [
        "pumps",
        "Pumps",
        "pumps ",
        "",
        "p'u\"m%p_s",
        "pump\0s",
        "pump",
        "насос",
        "🌀",
        "1",
        "1.0",
    ]
    keys = [GroupKey("t", "n", name) for name in names]
    keys += [GroupKey("n", "t", "pumps"), GroupKey("t", "n/pumps", "")]
    stored = {
        key: Stored(await store.create(key, make_record(epoch)), make_record(epoch))
        for epoch, key in enumerate(keys)
    }
    assert await store.load() == stored


@pytest.mark.parametrize("bad", [10**5000, object(), "\ud800", ("a",), {"a": 1}], ids=type)
async def test_a_value_that_would_not_read_back_is_refused_and_changes_nothing(
    store: Store, key: GroupKey, make_record: MakeRecord, bad: object
) -> None:
    version = await store.create(key, make_record(1))
    poison = GroupRecord(GroupConfig("pumps", 1, additional=bad))  # type: ignore[arg-type]
    with pytest.raises(StoreError, match=r"'pumps'.*cannot be kept as JSON.*nothing was changed"):
        await store.swap(key, version, poison, [tenure(1)])
    assert await store.load() == {key: Stored(version, make_record(1))}
    assert await store.history(key) == (0, [])


async def test_after_close_every_call_is_refused_and_a_second_close_is_not(
    store: Store, key: GroupKey, make_record: MakeRecord
) -> None:
    await store.close()
    await store.close()
    for call in (
        store.load(),
        store.create(key, make_record(1)),
        store.swap(key, 1, make_record(1)),
        store.delete(key, 1, 1),
        store.save_progress({}),
        store.retired_epoch(key),
        store.settle(key, 1),
        store.history(key),
        store.access("t", "n"),
        store.set_access("t", "n", AccessList()),
        store.declare_restored(),
        store.is_restored(),
    ):
        with pytest.raises(StoreError, match="closed"):
            await call


async def test_the_epoch_of_a_deleted_group_is_remembered_for_its_name(
    store: Store, key: GroupKey, make_record: MakeRecord
) -> None:
    other = key._replace(group="another")
    assert await store.retired_epoch(key) == 0
    for epoch in (7, 9, 9):
        version = await store.create(key, make_record(1))
        await store.delete(key, version, epoch)
        assert await store.retired_epoch(key) == epoch
    await store.delete(other, await store.create(other, make_record(1)), 0)
    assert await store.retired_epoch(other) == 0
    with pytest.raises(CasMismatch):
        await store.delete(key, version, 77)
    assert await store.retired_epoch(key) == 9


async def test_a_store_is_restored_when_that_was_declared(store: Store) -> None:
    assert not await store.is_restored()
    for _ in range(2):
        await store.declare_restored()
        assert await store.is_restored()


async def test_of_deleted_groups_the_oldest_are_forgotten(
    store: Store, key: GroupKey, make_record: MakeRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (memory, sqlite, etcd_shard):
        monkeypatch.setattr(module, "MOST_RETIRED", 3)
    keys = [key._replace(group=f"g{number}") for number in range(5)]
    for one in (*keys, keys[2]):  # the third one twice: it is not among the oldest then
        await store.delete(one, await store.create(one, make_record(1)), 1)
    assert [await store.retired_epoch(one) for one in keys] == [0, 0, 1, 1, 1]


async def test_a_record_is_settled_as_it_is(
    store: Store, key: GroupKey, make_record: MakeRecord
) -> None:
    assert await store.settle(key, 0) is None
    version = await store.create(key, make_record(1))
    settled = await store.settle(key, version)
    assert settled is not None
    assert settled.record == make_record(1)
    newer = await store.swap(key, settled.version, make_record(2))
    assert await store.settle(key, version) == Stored(newer, make_record(2))
    assert await store.load() == {key: Stored(newer, make_record(2))}
