"""The writer thread of the SQLite store: batches, refusals, cancellation, bounds, syncs."""

import asyncio
import shutil
import threading
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import apsw
import pytest

from agent.coordinator.store import Stored, sqlite
from agent.coordinator.store.sqlite import SqliteStore
from agent.errors import CasMismatch, ExitCode, StoreError
from agent.model import GroupKey, HistoryEntry

from .conftest import MakeRecord

LIMIT_S = 20.0  # for a wait that ends at once unless something is broken


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[SqliteStore]:
    made = SqliteStore.open(tmp_path / "data")
    yield made
    await made.close()


class Gate:
    """Keeps the store's thread inside one call until it is opened, so that others queue up."""

    def __init__(self, store: SqliteStore) -> None:
        self._inside = threading.Event()
        self._opened = threading.Event()
        # no call of a Store lasts until a test ends it
        self.call = asyncio.ensure_future(store._submit(self._wait))

    def _wait(self) -> str:
        self._inside.set()
        assert self._opened.wait(LIMIT_S)
        return "through"

    async def shut(self) -> None:
        await asyncio.sleep(0)
        assert await asyncio.to_thread(self._inside.wait, LIMIT_S)

    def open(self) -> None:
        self._opened.set()


async def start(*calls: Coroutine[Any, Any, Any]) -> list[asyncio.Task[Any]]:
    """Let each call reach the store's queue, in this order."""
    futures = [asyncio.create_task(call) for call in calls]
    await asyncio.sleep(0)
    return futures


def damage(directory: Path, statement: str) -> None:
    """Change the database as the store would not."""
    with closing(apsw.Connection(str(directory / "data/coordinator.db"))) as database:
        database.execute(statement)


def entry(epoch: int) -> HistoryEntry:
    return HistoryEntry(epoch, "a", datetime(2024, 1, 1, tzinfo=UTC), "chosen")


async def test_calls_that_wait_together_become_one_transaction(
    tmp_path: Path, key: GroupKey, make_record: MakeRecord
) -> None:
    with disk_of_tests() as disk:
        store = SqliteStore.open(tmp_path)
        await store.create(key, make_record(0))
        gate = Gate(store)
        await gate.shut()
        disk.synced.clear()
        calls = await start(
            *(store.create(key._replace(group=str(n)), make_record(n)) for n in range(50))
        )
        gate.open()
        versions = await asyncio.gather(*calls)
        assert len(set(versions)) == 50
        assert [Path(name).name for name in disk.synced] == ["coordinator.db-wal"]
        await store.close()


async def test_a_refused_call_undoes_nothing_of_the_others_in_its_transaction(
    store: SqliteStore, key: GroupKey, make_record: MakeRecord
) -> None:
    one, two, three = (key._replace(group=name) for name in ("one", "two", "three"))
    version = await store.create(two, make_record(1))
    gate = Gate(store)
    await gate.shut()
    calls = await start(
        store.create(one, make_record(1)),
        store.create(one, make_record(2)),  # exists by now
        store.swap(two, version, make_record(2), [entry(2), entry(2**70)]),  # fails half-way
        store.swap(two, version, make_record(3), [entry(3)]),
        store.create(key._replace(group="\ud800"), make_record(1)),  # not text
        store.create(three, make_record(1)),
    )
    gate.open()
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [
        int, CasMismatch, StoreError, int, StoreError, int,
    ]  # fmt: skip
    loaded = await store.load()
    assert {key.group: stored.record for key, stored in loaded.items()} == {
        "one": make_record(1),
        "two": make_record(3),
        "three": make_record(1),
    }
    assert await store.history(two) == (1, [entry(3)])


async def test_a_call_cancelled_while_it_waits_does_not_happen_and_the_others_do(
    store: SqliteStore, key: GroupKey, make_record: MakeRecord
) -> None:
    keys = [key._replace(group=str(n)) for n in range(3)]
    gate = Gate(store)
    await gate.shut()
    calls = await start(*(store.create(each, make_record(1)) for each in keys))
    calls[1].cancel()
    await asyncio.sleep(0)
    gate.open()
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [int, asyncio.CancelledError, int]
    assert set(await store.load()) == {keys[0], keys[2]}


async def test_a_call_cancelled_while_it_runs_breaks_nothing(
    store: SqliteStore, key: GroupKey, make_record: MakeRecord
) -> None:
    gate = Gate(store)
    await gate.shut()
    (call,) = await start(store.create(key, make_record(1)))
    gate.call.cancel()
    gate.open()
    version = await call
    assert await store.load() == {key: Stored(version, make_record(1))}


async def test_a_failure_that_nobody_foresaw_reaches_its_awaiters_and_the_thread_goes_on(
    store: SqliteStore, key: GroupKey, make_record: MakeRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = await store.create(key, make_record(1))
    monkeypatch.setattr(sqlite, "HISTORY_BOUND", object())  # used when the record is written
    with pytest.raises(StoreError, match="TypeError"):
        await store.swap(key, version, make_record(2), [entry(2)])
    assert await store.load() == {key: Stored(version, make_record(1))}


async def test_more_calls_than_may_wait_are_refused_at_once_and_those_that_wait_are_kept(
    store: SqliteStore, key: GroupKey, make_record: MakeRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite, "QUEUE_BOUND", 3)
    gate = Gate(store)
    await gate.shut()
    calls = await start(
        *(store.create(key._replace(group=str(n)), make_record(n)) for n in range(3))
    )
    with pytest.raises(StoreError, match="3 calls wait for it already"):
        await store.create(key, make_record(9))
    gate.open()
    await asyncio.gather(*calls)
    assert {each.group for each in await store.load()} == {"0", "1", "2"}


async def test_a_batch_has_a_bound_and_what_is_beyond_it_comes_next(
    store: SqliteStore, key: GroupKey, make_record: MakeRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite, "BATCH_BOUND", 2)
    calls = (store.create(key._replace(group=str(n)), make_record(n)) for n in range(7))
    assert len(set(await asyncio.gather(*calls))) == 7


async def test_close_answers_what_waits_and_then_lets_go_of_the_directory(
    store: SqliteStore, key: GroupKey, make_record: MakeRecord, tmp_path: Path
) -> None:
    gate = Gate(store)
    await gate.shut()
    (call,) = await start(store.create(key, make_record(1)))
    closes = await start(store.close(), store.close())
    with pytest.raises(StoreError, match="closed"):
        await store.load()
    gate.open()
    version = await call
    await asyncio.gather(*closes)
    reopened = SqliteStore.open(tmp_path / "data")
    try:
        assert await reopened.load() == {key: Stored(version, make_record(1))}
    finally:
        await reopened.close()


async def test_a_close_that_is_cancelled_goes_on(store: SqliteStore, tmp_path: Path) -> None:
    gate = Gate(store)
    await gate.shut()
    (closing,) = await start(store.close())
    closing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await closing
    gate.open()
    await store.close()
    await SqliteStore.open(tmp_path / "data").close()


async def test_a_record_that_cannot_be_read_is_named_with_its_group_and_file(
    store: SqliteStore, tmp_path: Path, key: GroupKey, make_record: MakeRecord
) -> None:
    await store.create(key, make_record(1))
    damage(tmp_path, "UPDATE failover_group SET record = '{}'")
    with pytest.raises(StoreError, match=r"group 'pumps'.*coordinator\.db.*config: ") as refused:
        await store.load()
    assert refused.value.exit_code is ExitCode.DATA_DIR_DAMAGED


class Disk(apsw.VFS):
    """The disk, with syncs that are recorded, and fail on demand."""

    def __init__(self) -> None:
        super().__init__("syncs", "unix", makedefault=True)
        self.synced: list[str] = []
        self.failures_due = 0

    def xOpen(self, name: Any, flags: list[int]) -> apsw.VFSFile:  # noqa: N802 - apsw's name
        return File(self, name, flags)


class File(apsw.VFSFile):
    def __init__(self, disk: Disk, name: Any, flags: list[int]) -> None:
        super().__init__("unix", name, flags)
        self._disk = disk
        self._name = name.filename() if isinstance(name, apsw.URIFilename) else str(name)

    def xSync(self, flags: int) -> None:  # noqa: N802 - apsw's name
        if self._disk.failures_due:
            self._disk.failures_due -= 1
            raise apsw.IOError("the disk does not sync")
        super().xSync(flags)
        self._disk.synced.append(self._name)


@contextmanager
def disk_of_tests() -> Iterator[Disk]:
    disk = Disk()
    try:
        yield disk
    finally:
        disk.unregister()


async def test_a_record_is_settled_without_reading_those_of_other_groups(
    store: SqliteStore, tmp_path: Path, make_record: MakeRecord
) -> None:
    """In a store of 100,000 groups all requests would wait for that."""
    one, other = GroupKey("t", "n", "one"), GroupKey("t", "n", "other")
    version = await store.create(one, make_record(1))
    await store.create(other, make_record(1))
    damage(tmp_path, "UPDATE failover_group SET record = 'damaged' WHERE name = 'other'")
    assert await store.settle(one, version) == Stored(version, make_record(1))
    with pytest.raises(StoreError, match="other"):
        await store.settle(other, version)


async def test_a_change_is_synced_before_it_is_answered(
    tmp_path: Path, key: GroupKey, make_record: MakeRecord
) -> None:
    with disk_of_tests() as disk:
        store = SqliteStore.open(tmp_path)
        version = await store.create(key, make_record(0))
        for epoch in range(1, 4):
            disk.synced.clear()
            version = await store.swap(key, version, make_record(epoch))
            assert [Path(name).name for name in disk.synced] == ["coordinator.db-wal"]
        await store.close()


async def test_a_change_whose_sync_failed_is_not_there_after_a_crash(
    tmp_path: Path, key: GroupKey, make_record: MakeRecord
) -> None:
    """The whole transaction stands in the WAL by then: it has to be taken away."""
    with disk_of_tests() as disk:
        store = SqliteStore.open(tmp_path / "data")
        version = await store.create(key, make_record(1))

        disk.failures_due = 1
        with pytest.raises(StoreError) as failed:
            await store.swap(key, version, make_record(2), [entry(2)])
        assert disk.failures_due == 0
        assert failed.value.exit_code is ExitCode.DATA_DIR_DAMAGED
        shutil.copytree(tmp_path / "data", tmp_path / "crashed")
        assert await store.load() == {key: Stored(version, make_record(1))}
        await store.swap(key, version, make_record(3))
        await store.close()
    crashed = SqliteStore.open(tmp_path / "crashed")
    try:
        assert await crashed.load() == {key: Stored(version, make_record(1))}
        assert await crashed.history(key) == (0, [])
    finally:
        await crashed.close()
