"""Copies of a store between SQLite and etcd, and backups of a running SQLite store."""

import asyncio
import errno
import os
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import apsw
import pytest

from agent.coordinator.store import copy as copies
from agent.coordinator.store.copy import EtcdPlace, Snapshot, SqlitePlace, backup, copy, trust_etcd
from agent.coordinator.store.data_dir import UNFINISHED
from agent.coordinator.store.etcd import EtcdCluster
from agent.coordinator.store.etcd_client import (
    Done,
    Etcd,
    EtcdUnknown,
    Json,
    put,
)
from agent.coordinator.store.etcd_gateway import Gateway
from agent.coordinator.store.sqlite import SqliteStore
from agent.errors import ExitCode, StoreError
from agent.model import (
    AccessEntry,
    AccessList,
    GroupKey,
    HistoryEntry,
    Progress,
    Trustee,
)
from tests.etcd import EtcdServer

from .conftest import SINCE, MakeRecord

ACL = AccessList((AccessEntry(Trustee(1, "u"), denied=False, rights=1),))


@dataclass
class Places:
    """Where stores are, and how they are copied."""

    etcd: Etcd
    prefix: str
    directory: Path

    async def to_etcd(self, directory: Path | None = None, *, clone: bool = False) -> Snapshot:
        source = SqlitePlace.open_source(directory or self.directory)
        try:
            target = await EtcdPlace.open_target(self.etcd, self.prefix, 4, source.store_id)
            return await copy(source, target, clone=clone)
        finally:
            source.close()

    async def to_sqlite(self, directory: Path | None = None, *, clone: bool = False) -> Snapshot:
        async with EtcdPlace.open_source(self.etcd, self.prefix) as source:
            target = SqlitePlace.open_target(directory or self.directory, source.store_id)
            try:
                return await copy(source, target, clone=clone)
            finally:
                target.close()

    async def serve_etcd(self) -> EtcdCluster:
        return await EtcdCluster.open(self.etcd, self.prefix, 4)


@pytest.fixture
async def places(etcd_server: EtcdServer, tmp_path: Path) -> AsyncIterator[Places]:
    etcd = Etcd(Gateway(etcd_server.urls), 5.0)
    yield Places(etcd, f"/test/{uuid.uuid4()}", tmp_path / "data")
    await etcd.aclose()


@pytest.fixture
async def filled(places: Places, make_record: MakeRecord) -> str:
    """The id of a SQLite store that has something of everything."""
    store = SqliteStore.open(places.directory)
    for number in range(150):
        key = GroupKey("t", "n", f"g/{number}")
        version = await store.create(key, make_record(1))
        await store.swap(key, version, make_record(2), [HistoryEntry(2, "s", SINCE, "chosen")])
    await store.save_progress({key: Progress(2, SINCE)})
    await store.delete(key, (await store.load())[key].version, 7)
    await store.save_progress({GroupKey("t", "n", "g/1"): Progress(2, SINCE)})
    await store.set_access("t", "n", ACL)
    await store.close()
    return store.store_id


async def test_a_copy_to_etcd_and_back_has_everything_and_the_same_id(
    places: Places, filled: str, tmp_path: Path
) -> None:
    snapshot = await places.to_etcd()
    assert len(snapshot.groups) == 149
    assert len(snapshot.history) == 149
    assert snapshot.retired == {GroupKey("t", "n", "g/149"): 7}
    assert snapshot.access == {("t", "n"): ACL}
    cluster = await places.serve_etcd()
    assert cluster.store_id == filled
    total, _ = await cluster.configs("t", "n", 0, 1, lambda _: True)
    assert total == 149
    assert await places.to_sqlite() == snapshot
    store = SqliteStore.open(places.directory)
    assert store.store_id == filled
    assert (await store.load())[GroupKey("t", "n", "g/1")].progress == Progress(2, SINCE)
    await store.close()


async def test_the_source_of_a_copy_can_be_served_no_more(places: Places, filled: str) -> None:
    await places.to_etcd()
    with pytest.raises(StoreError, match=f"copied to etcd:{places.prefix}") as refused:
        SqliteStore.open(places.directory)
    assert refused.value.exit_code is ExitCode.STORE_MOVED
    await places.to_sqlite()
    with pytest.raises(StoreError, match=r"copied to /") as refused:
        await places.serve_etcd()
    assert refused.value.exit_code is ExitCode.STORE_MOVED


async def test_a_copy_can_be_repeated_until_it_is_served(places: Places, filled: str) -> None:
    first = await places.to_etcd()
    assert await places.to_etcd() == first
    await places.serve_etcd()
    with pytest.raises(StoreError, match="was served"):
        await places.to_etcd()


async def test_a_second_copy_elsewhere_would_be_a_second_store_of_one_id(
    places: Places, filled: str
) -> None:
    await places.to_etcd()
    elsewhere = Places(places.etcd, f"/test/{uuid.uuid4()}", places.directory)
    with pytest.raises(StoreError, match="two copies with one id"):
        await elsewhere.to_etcd()
    await elsewhere.to_etcd(clone=True)
    assert (await elsewhere.serve_etcd()).store_id != filled


async def test_a_clone_has_an_id_of_its_own_and_leaves_its_source_usable(
    places: Places, filled: str, tmp_path: Path
) -> None:
    await places.to_etcd(clone=True)
    cluster = await places.serve_etcd()
    assert cluster.store_id != filled
    store = SqliteStore.open(places.directory)
    assert store.store_id == filled
    await store.close()
    await places.to_sqlite(tmp_path / "clone", clone=True)
    store = SqliteStore.open(tmp_path / "clone")
    assert store.store_id not in {filled, cluster.store_id}
    await store.close()
    assert (await places.serve_etcd()).store_id == cluster.store_id


async def test_a_store_with_groups_of_its_own_is_not_overwritten(
    places: Places, filled: str, tmp_path: Path
) -> None:
    await places.serve_etcd()
    with pytest.raises(StoreError, match="a copy would destroy it"):
        await places.to_etcd()
    with pytest.raises(StoreError, match="a copy would destroy it"):
        await places.to_sqlite()
    await places.to_sqlite(tmp_path / "new")


async def test_a_copy_that_is_cut_off_is_not_served_and_can_be_made_again(
    places: Places, filled: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def cut_off(_self: EtcdPlace) -> Snapshot:
        raise StoreError("cut off")

    with monkeypatch.context() as patch:
        patch.setattr(EtcdPlace, "read", cut_off)
        with pytest.raises(StoreError, match="cut off"):
            await places.to_etcd()
    with pytest.raises(StoreError, match=UNFINISHED):
        await places.serve_etcd()
    await SqliteStore.open(places.directory).close()
    await places.to_etcd()
    await places.serve_etcd()


async def test_a_write_of_a_copy_that_was_cut_off_cannot_come_after_the_next_copy(
    places: Places, filled: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would put old records into a store that is served by then."""
    held: list[tuple[Sequence[Json], Sequence[Json]]] = []

    async def hold(self: Etcd, conditions: Sequence[Json], then: Sequence[Json]) -> Done:
        if len(then) > 10 and not held:
            held.append((conditions, then))
            raise EtcdUnknown("no answer yet")
        return await txn(self, conditions, then)

    txn = Etcd.txn
    with monkeypatch.context() as patch:
        patch.setattr(Etcd, "txn", hold)
        with pytest.raises(EtcdUnknown):
            await places.to_etcd()
    await places.to_etcd()
    assert not (await places.etcd.txn(*held[0])).succeeded


async def test_a_copy_that_was_overtaken_changes_nothing_of_the_next_one(
    places: Places, filled: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It withdrew the declaration that the store was restored."""
    store = SqliteStore.open(tmp_path / "restored")
    await store.declare_restored()
    await store.close()
    write, writes = EtcdPlace._write, 0

    async def overtaken(self: EtcdPlace, steps: list[Json]) -> None:
        nonlocal writes
        await write(self, steps)
        writes += 1
        if writes == 2:
            await places.to_etcd(tmp_path / "restored")

    monkeypatch.setattr(EtcdPlace, "_write", overtaken)
    with pytest.raises(StoreError, match="another copy is in progress"):
        await places.to_etcd()
    cluster = await places.serve_etcd()
    assert cluster.store_id == store.store_id
    assert await cluster.is_restored()


async def test_a_source_is_served_no_more_if_its_copy_may_be_finished(
    places: Places, filled: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its mark was withdrawn, and both could be served with one id."""
    await places.to_etcd()
    finish = SqlitePlace.finish

    async def finish_without_answer(self: SqlitePlace, store_id: str) -> None:
        await finish(self, store_id)
        raise StoreError("no answer")

    monkeypatch.setattr(SqlitePlace, "finish", finish_without_answer)
    with pytest.raises(StoreError, match="no answer"):
        await places.to_sqlite(tmp_path / "new")
    with pytest.raises(StoreError, match="was copied to"):
        await places.serve_etcd()
    await SqliteStore.open(tmp_path / "new").close()


async def test_a_copy_from_etcd_that_was_killed_can_be_made_again_and_does_not_go_on(
    places: Places, filled: str, tmp_path: Path
) -> None:
    """It left a mark with which neither a copy nor a coordinator could use the store."""
    await places.to_etcd()
    killing = EtcdPlace.open_source(places.etcd, places.prefix)  # its end is never run
    killed = await killing.__aenter__()
    with pytest.raises(StoreError, match=copies.IN_PROGRESS):
        await places.serve_etcd()
    await places.to_sqlite(tmp_path / "new")
    with pytest.raises(StoreError, match="another copy is in progress"):
        await killed.mark_moved("elsewhere")


async def test_a_copy_to_a_new_directory_that_failed_is_not_served_and_can_be_made_again(
    places: Places, filled: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It left a new and empty store, which could be served, and which a further copy took for one that was."""

    async def fail(_self: EtcdPlace) -> Snapshot:
        raise StoreError("etcd is lost")

    snapshot = await places.to_etcd()
    with monkeypatch.context() as patch:
        patch.setattr(EtcdPlace, "read", fail)
        with pytest.raises(StoreError, match="etcd is lost"):
            await places.to_sqlite(tmp_path / "new")
    with pytest.raises(StoreError, match=UNFINISHED):
        SqliteStore.open(tmp_path / "new")
    with pytest.raises(StoreError, match=UNFINISHED):  # there is nothing in it
        await Places(places.etcd, "/clone", tmp_path / "new").to_etcd(clone=True)
    assert await places.to_sqlite(tmp_path / "new") == snapshot


@pytest.mark.parametrize("served", [True, False])
async def test_a_copy_that_was_copied_on_is_not_made_again(
    places: Places, filled: str, tmp_path: Path, *, served: bool
) -> None:
    """A third place has the id by now: the copy in between, and after that its source, could be served beside it."""
    await places.to_etcd()
    if served:
        await places.serve_etcd()
    await places.to_sqlite(tmp_path / "third")
    third = SqliteStore.open(tmp_path / "third")
    with pytest.raises(StoreError, match="two copies with one id"):
        await places.to_etcd()
    await third.close()


@pytest.mark.parametrize("cut_off", [True, False], ids=["an unfinished copy", "nothing"])
async def test_another_place_of_the_same_name_is_another_place(
    places: Places,
    filled: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    cut_off: bool,
) -> None:
    """Such as the same path on another host, and the same prefix in another etcd."""

    async def fail(_self: SqlitePlace, _to: str) -> None:
        raise StoreError("cut off")

    directory, elsewhere = tmp_path / "copy", tmp_path / "elsewhere"
    await places.to_etcd()
    if cut_off:
        with monkeypatch.context() as patch:
            patch.setattr(SqlitePlace, "finish", fail)
            patch.setattr(EtcdPlace, "mark_moved", fail)
            with pytest.raises(StoreError, match="cut off"):
                await places.to_sqlite(directory)
        directory.rename(elsewhere)
    await places.to_sqlite(directory)
    directory.rename(tmp_path / "served")
    if cut_off:
        elsewhere.rename(directory)
    with pytest.raises(StoreError, match="two copies with one id"):
        await places.to_sqlite(directory)
    await SqliteStore.open(tmp_path / "served").close()


async def test_a_source_that_cannot_be_marked_is_a_clear_error(
    places: Places, filled: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_args: object, **_kwargs: object) -> None:
        raise apsw.FullError("database or disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(copies, "mark", full)
        with pytest.raises(StoreError) as caught:
            await places.to_etcd()
    assert caught.value.exit_code is ExitCode.DATA_DIR_FULL
    await places.to_etcd()
    await places.serve_etcd()


async def test_a_copy_that_differs_is_refused(
    places: Places, filled: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def forgetful(_self: EtcdPlace) -> Snapshot:
        return Snapshot()

    with monkeypatch.context() as patch:
        patch.setattr(EtcdPlace, "read", forgetful)
        with pytest.raises(StoreError, match="differs"):
            await places.to_etcd()
    await SqliteStore.open(places.directory).close()


async def test_a_store_that_is_served_is_not_copied(
    places: Places, filled: str, tmp_path: Path
) -> None:
    store = SqliteStore.open(places.directory)
    with pytest.raises(StoreError, match="in use by another coordinator"):
        await places.to_etcd()
    await store.close()
    cluster = await places.serve_etcd()
    await places.etcd.txn([], [put(cluster.layout.member("1"), "{}")])
    with pytest.raises(StoreError, match="a coordinator serves"):
        await places.to_sqlite(tmp_path / "new")


async def test_a_coordinator_that_lost_its_session_changes_no_access_list_of_a_moved_store(
    places: Places, filled: str, tmp_path: Path
) -> None:
    """Such as one that was frozen. It would confirm a change that the store that is served now does not have."""
    await places.to_etcd()
    cluster = await places.serve_etcd()
    await places.to_sqlite(tmp_path / "new")
    with pytest.raises(StoreError, match="was moved or removed"):
        await cluster.set_access("t", "n", None)
    assert await cluster.access("t", "n") == ACL


async def test_nothing_to_copy_is_an_error(places: Places, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"has no coordinator\.db"):
        await places.to_etcd(tmp_path / "absent")
    with pytest.raises(StoreError, match="there is no store under"):
        await places.to_sqlite()
    assert not (tmp_path / "absent").exists()


async def test_a_backup_of_a_running_store_is_whole(
    places: Places, make_record: MakeRecord, tmp_path: Path
) -> None:
    store = SqliteStore.open(places.directory)
    keys = [GroupKey("t", "n", f"g{number}") for number in range(300)]

    async def write() -> None:
        for key in keys:
            await store.create(key, make_record(1))

    writing = asyncio.create_task(write())
    while len(await store.load()) < 10:  # noqa: ASYNC110 - a write sets no event
        await asyncio.sleep(0)
    file = tmp_path / "restored" / "coordinator.db"
    file.parent.mkdir()
    await asyncio.to_thread(backup, places.directory, file)
    await writing
    assert len(await store.load()) == 300
    await store.close()
    assert file.stat().st_mode & 0o077 == 0
    restored = SqliteStore.open(file.parent)
    assert restored.store_id == store.store_id
    groups = await restored.load()
    assert list(groups) == keys[: len(groups)]
    assert len(groups) >= 10
    await restored.close()


def hidden_in(directory: Path) -> list[Path]:
    return list(directory.glob(".*"))


async def test_a_backup_replaces_no_file_and_needs_a_store(
    places: Places, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(StoreError, match=r"has no coordinator\.db"):
        backup(places.directory, tmp_path / "b")
    await SqliteStore.open(places.directory).close()
    (tmp_path / "b").write_text("mine")
    with pytest.raises(StoreError, match="exists") as caught:
        backup(places.directory, tmp_path / "b")
    assert caught.value.exit_code is ExitCode.USAGE
    assert (tmp_path / "b").read_text() == "mine"

    def refuse(*_: object, **_options: object) -> None:  # as in a directory that may not be entered
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    with monkeypatch.context() as patched:
        patched.setattr(os, "mkdir", refuse)
        with pytest.raises(StoreError, match=r"cannot be written \(Permission denied\)"):
            backup(places.directory, tmp_path / "closed")
    (tmp_path / "b").rename(tmp_path / "b.new")
    backup(places.directory, tmp_path / "b")
    assert not hidden_in(tmp_path)
    assert (tmp_path / "b.new").read_text() == "mine"
    file = tmp_path / "absent" / "b"
    with pytest.raises(StoreError, match=f"{file} cannot be written") as caught:
        backup(places.directory, file)
    assert caught.value.exit_code is ExitCode.USAGE
    assert "data directory" not in str(caught.value)


async def test_a_copy_of_a_restored_store_is_restored_until_it_is_trusted(places: Places) -> None:
    store = SqliteStore.open(places.directory)
    await store.declare_restored()
    await store.close()
    await places.to_etcd()
    cluster = await places.serve_etcd()
    assert await cluster.is_restored()
    await places.to_sqlite()
    store = SqliteStore.open(places.directory)
    assert await store.is_restored()
    await store.close()
    assert await trust_etcd(places.etcd, places.prefix)
    assert not await trust_etcd(places.etcd, places.prefix)
    place = SqlitePlace.open_source(places.directory)
    assert place.trust()
    assert not place.trust()
    place.close()
    await places.to_etcd()
    assert not await cluster.is_restored()
    with pytest.raises(StoreError, match="there is no store under"):
        await trust_etcd(places.etcd, f"{places.prefix}/absent")
