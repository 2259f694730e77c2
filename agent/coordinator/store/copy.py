"""Copies of a store: from SQLite to etcd and back, and a backup of a running SQLite store.

A copy has the id of its source, so agents continue with it. The two must not both be served: the source is marked
as moved before the copy may be served. A clone gets an id of its own instead. Only a store that nobody serves is
copied. What was written is read back and compared. An interrupted copy cannot be served, but can be repeated. Once
its source is marked, it can be repeated into the same target only: a second target would be a second store of this id.
"""

import json
import os
import uuid
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol

import apsw

from agent.coordinator.store.codec import decode, decode_progress, encode, name_of
from agent.coordinator.store.data_dir import (
    DATABASE_NAME,
    UNFINISHED,
    DataDir,
    explain,
    mark,
    open_data_dir,
)
from agent.coordinator.store.etcd import EtcdCluster
from agent.coordinator.store.etcd_client import (
    Etcd,
    Json,
    delete,
    end_of,
    if_none,
    if_revision,
    put,
)
from agent.coordinator.store.etcd_layout import (
    SCHEMA,
    Layout,
    Meta,
    epoch_of_key,
    group_key_of,
    progress_of_key,
    progress_value,
    read_meta,
    record_of_key,
    record_value,
)
from agent.coordinator.store.etcd_shard import MOST_STEPS
from agent.errors import ExitCode, StoreError
from agent.model import AccessList, GroupKey, GroupRecord, HistoryEntry, Progress
from agent.schema.scalars import format_date_time

IN_PROGRESS = "another place, by a copy that has not ended"
"""The value of ``MovedTo`` of a source in etcd until its copy is complete. It stays if the copy is killed."""

PAGES_AT_ONCE = 256
"""Pages of 4 KiB in one step of a backup: the coordinator's reads and writes go on in between."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The contents of a store, without its id."""

    groups: dict[GroupKey, GroupRecord] = field(default_factory=dict)
    progress: dict[GroupKey, Progress] = field(default_factory=dict)
    history: dict[GroupKey, dict[int, HistoryEntry]] = field(default_factory=dict)
    retired: dict[GroupKey, int] = field(default_factory=dict)
    access: dict[tuple[str, str], AccessList] = field(default_factory=dict)
    restored: bool = False
    """Whether the store was declared as restored from a copy."""


class Place(Protocol):
    """A store that nobody serves, as source or target of a copy."""

    name: str
    store_id: str | None
    moved_to: str | None

    async def read(self) -> Snapshot: ...
    async def write(self, snapshot: Snapshot, store_id: str) -> None: ...
    async def mark_moved(self, to: str) -> None: ...
    async def finish(self, store_id: str) -> None: ...


async def copy(source: Place, target: Place, *, clone: bool) -> Snapshot:
    """Copy a store, check the copy, and mark the source as moved unless it is a clone; return the contents.

    Raises:
        StoreError: the copy differs, or a store cannot be used. The target cannot be served then.
    """
    assert source.store_id is not None  # noqa: S101 - a source has been opened as one
    if source.moved_to == UNFINISHED:
        raise StoreError(f"the store in {source.name} is {UNFINISHED}: copy it again")
    if source.moved_to not in {None, target.name} and not clone:
        raise StoreError(
            f"{source.name} was copied to {source.moved_to}: two copies with one id could make two"
            " primaries; copy into that very copy again, or make a clone with --clone",
            exit_code=ExitCode.STORE_MOVED,
        )
    store_id = str(uuid.uuid4()) if clone else source.store_id
    snapshot = await source.read()
    await target.write(snapshot, store_id)
    if await target.read() != snapshot:
        raise StoreError(
            f"the copy in {target.name} differs from {source.name}: it cannot be served; copy it again"
        )
    if not clone:
        await source.mark_moved(target.name)
    await target.finish(store_id)
    return snapshot


def _copy_id(store_id: str | None, found: str, found_id: int) -> int:
    """The number of a copy: that of an earlier attempt, if the target has one of the same store; else a new one."""
    return found_id if found_id and found == store_id else uuid.uuid4().int >> 66


def refuse_target(name: str) -> StoreError:
    """The error for a target that has data of its own."""
    return StoreError(
        f"{name} has a store that was served: a copy would destroy it; name another place, or remove it;"
        " nothing was changed",
        exit_code=ExitCode.STORE_MOVED,
    )


# -- SQLite ---------------------------------------------------------------------------------------


class SqlitePlace:
    """A data directory as source or target. It is locked against coordinators until ``close``."""

    def __init__(self, data_dir: DataDir, directory: Path, copy_id: int = 0) -> None:
        self._data_dir = data_dir
        self._db = data_dir.database
        self._copy_id = copy_id
        self.name = str(directory.resolve()) + (f" (copy {copy_id:x})" if copy_id else "")
        self.store_id: str | None = data_dir.store_id
        self.moved_to = data_dir.moved_to

    @classmethod
    def open_source(cls, directory: Path) -> "SqlitePlace":
        """Open a directory that has a store. Raises StoreError."""
        _find_database(directory)
        return cls(open_data_dir(directory, moved_too=True), directory)

    @classmethod
    def open_target(cls, directory: Path, store_id: str | None) -> "SqlitePlace":
        """Open a directory without a store, with a copy that nobody served, or with a moved store of this id."""
        opened = open_data_dir(directory, moved_too=True)
        same = opened.store_id == store_id and opened.moved_to is not None
        if not (same or opened.copy_id):
            opened.close()
            raise refuse_target(str(directory))
        return cls(opened, directory, _copy_id(store_id, opened.store_id, opened.copy_id))

    def close(self) -> None:
        """Unlock and close the directory."""
        self._data_dir.close()

    def trust(self) -> bool:
        """Withdraw the declaration that the store was restored; return whether there was one."""
        try:
            restored = self._data_dir.is_restored()
            self._data_dir.trust()
        except apsw.Error as error:
            raise explain(error, self._data_dir.path.parent) from error
        return restored

    async def read(self) -> Snapshot:
        snapshot = Snapshot(restored=self._data_dir.is_restored())
        rows = self._db.execute("SELECT id, tenant, namespace, name, record FROM failover_group")
        keys: dict[int, GroupKey] = {}
        for number, *names, text in rows:
            keys[number] = key = GroupKey(*names)
            snapshot.groups[key] = decode(GroupRecord, text, name_of(key))
        for number, epoch, text in self._db.execute(
            "SELECT group_id, epoch, last_data FROM progress"
        ):
            key = keys[number]
            snapshot.progress[key] = decode_progress(epoch, text, name_of(key))
        for number, epoch, text in self._db.execute("SELECT group_id, epoch, entry FROM history"):
            key = keys[number]
            entry = decode(HistoryEntry, text, name_of(key))
            snapshot.history.setdefault(key, {})[epoch] = entry
        rows = self._db.execute("SELECT tenant, namespace, name, epoch FROM retired ORDER BY id")
        snapshot.retired.update({GroupKey(*names): epoch for *names, epoch in rows})
        for tenant, namespace, text in self._db.execute(
            "SELECT tenant, namespace, acl FROM access"
        ):
            snapshot.access[tenant, namespace] = decode(AccessList, text, f"{tenant}/{namespace}")
        return snapshot

    async def write(self, snapshot: Snapshot, store_id: str) -> None:
        try:
            with self._db:
                mark(self._db, moved_to=UNFINISHED, copy_id=self._copy_id)
                self._write(snapshot, store_id)
        except apsw.Error as error:
            raise explain(error, self._data_dir.path.parent) from error

    def _write(self, snapshot: Snapshot, store_id: str) -> None:
        for table in ("progress", "history", "failover_group", "retired", "access"):
            self._db.execute(f"DELETE FROM {table}")  # noqa: S608 - ours
        self._db.execute("UPDATE identity SET store_id = ?", (store_id,))
        self._data_dir.trust()
        if snapshot.restored:
            self._data_dir.declare_restored()
        for number, (key, record) in enumerate(snapshot.groups.items(), start=1):
            self._db.execute(
                "INSERT INTO failover_group (id, tenant, namespace, name, version, record)"
                " VALUES (?, ?, ?, ?, ?, ?)",
                (number, *key, number, encode(record, name_of(key))),
            )
            if (saved := snapshot.progress.get(key)) is not None:
                self._db.execute(
                    "INSERT INTO progress (group_id, epoch, last_data) VALUES (?, ?, ?)",
                    (number, saved.epoch, format_date_time(saved.last_data)),
                )
            for epoch, entry in snapshot.history.get(key, {}).items():
                self._db.execute(
                    "INSERT INTO history (group_id, epoch, entry) VALUES (?, ?, ?)",
                    (number, epoch, encode(entry, name_of(key))),
                )
        self._db.executemany(
            "INSERT INTO retired (tenant, namespace, name, epoch) VALUES (?, ?, ?, ?)",
            [(*key, epoch) for key, epoch in snapshot.retired.items()],
        )
        self._db.executemany(
            "INSERT INTO access (tenant, namespace, acl) VALUES (?, ?, ?)",
            [(*names, encode(acl, "/".join(names))) for names, acl in snapshot.access.items()],
        )

    async def mark_moved(self, to: str) -> None:
        self._mark(to, 0)

    async def finish(self, store_id: str) -> None:  # noqa: ARG002 - it was written with the rest
        self._mark(None, self._copy_id)

    def _mark(self, moved_to: str | None, copy_id: int) -> None:
        try:
            mark(self._db, moved_to=moved_to, copy_id=copy_id)
        except apsw.Error as error:
            raise explain(error, self._data_dir.path.parent) from error


def _find_database(directory: Path) -> Path:
    """The database of a data directory. Raises StoreError if there is none."""
    database = directory / DATABASE_NAME
    if not os.path.exists(database):  # noqa: PTH110 - Path.exists raises PermissionError
        raise StoreError(
            f"{directory} has no {DATABASE_NAME} that this user can reach: name a coordinator's data_dir"
        )
    return database


def backup(directory: Path, file: Path) -> None:
    """Write a consistent copy of a data directory's database to a new file; a coordinator may be serving it.

    Raises:
        StoreError: the file exists, or one of the two cannot be used. No partial file is left.
    """
    database = _find_database(directory)
    if os.path.exists(file):  # noqa: PTH110 - Path.exists raises PermissionError
        raise StoreError(
            f"{file} exists: name a new file; nothing was changed", exit_code=ExitCode.USAGE
        )
    try:
        with TemporaryDirectory(
            prefix=".backup-", dir=file.parent, ignore_cleanup_errors=True
        ) as own:  # files beside the target may belong to others, such as another backup
            unfinished = Path(own, DATABASE_NAME)
            with (
                closing(apsw.Connection(str(database), flags=apsw.SQLITE_OPEN_READONLY)) as source,
                closing(apsw.Connection(str(unfinished))) as target,
            ):
                with target.backup("main", source, "main") as step:
                    while not step.done:
                        step.step(PAGES_AT_ONCE)
                if (fault := target.pragma("integrity_check", 1)) != "ok":
                    raise StoreError(f"{database} is damaged ({fault}): no backup was made")
                target.pragma("journal_mode", "delete")
            with unfinished.open("rb") as written:
                os.fchmod(written.fileno(), 0o600)
                os.fsync(written.fileno())
            unfinished.replace(file)
    except OSError as error:  # the database is read by SQLite alone
        raise StoreError(
            f"{file} cannot be written ({error.strerror}): name a file in another directory",
            exit_code=ExitCode.USAGE,
        ) from error
    except apsw.Error as error:
        raise explain(
            error, file.parent if isinstance(error, apsw.FullError) else directory
        ) from error


# -- etcd -----------------------------------------------------------------------------------------


class EtcdPlace:
    """A store in etcd. While it is a source or a target, no coordinator can begin to serve it."""

    def __init__(self, etcd: Etcd, layout: Layout, meta: Meta | None, copy_id: int = 0) -> None:
        self._cluster = EtcdCluster(etcd, layout, meta or Meta("", layout.shards, None, 0))
        self._etcd = etcd
        self._layout = layout
        self._meta = meta
        self._moving = False
        self._copy_id = copy_id
        self.name = f"etcd:{layout.prefix}" + (f" (copy {copy_id:x})" if copy_id else "")
        self.store_id = None if meta is None else meta.store_id
        self.moved_to = None if meta is None else meta.moved_to

    @classmethod
    @asynccontextmanager
    async def open_source(cls, etcd: Etcd, prefix: str) -> AsyncIterator["EtcdPlace"]:
        """Open a store and keep coordinators from serving it. After a clone or a failed copy they may serve it again.

        After a failure that follows ``mark_moved`` they may not: the copy may be complete. An earlier copy that still
        runs fails because of the new mark: it has to mark the source before it completes its target.
        """
        meta = await read_meta(etcd, prefix)
        if meta is None:
            raise StoreError(f"there is no store under {prefix} in etcd: name its --etcd-prefix")
        if meta.moved_to == IN_PROGRESS:
            meta = replace(meta, moved_to=None)
        place = cls(etcd, Layout(prefix, meta.shards), meta)
        if meta.moved_to is not None:
            yield place
            return
        await place._mark(replace(meta, moved_to=IN_PROGRESS))
        try:
            yield place
        finally:
            if not place._moving:
                await place._mark(meta)

    @classmethod
    async def open_target(
        cls, etcd: Etcd, prefix: str, shards: int, store_id: str | None
    ) -> "EtcdPlace":
        """Open a prefix without a store, with a copy that nobody served, or with a moved store of this id."""
        meta = await read_meta(etcd, prefix)
        found = meta or Meta("", shards, UNFINISHED, 0, 1)
        same = found.store_id == store_id and found.moved_to is not None
        if not (same or found.copy_id):
            raise refuse_target(f"the prefix {prefix} of etcd")
        copy_id = _copy_id(store_id, found.store_id, found.copy_id)
        return cls(etcd, Layout(prefix, shards), meta, copy_id)

    async def read(self) -> Snapshot:
        snapshot, layout = Snapshot(restored=await self._cluster.is_restored()), self._layout
        async for found in self._cluster.pages(f"{layout.prefix}/shards/"):
            for one in found.keys:
                kind = one.key.removeprefix(f"{layout.prefix}/shards/").split("/")[1]
                if kind == "history":
                    key = group_key_of(one.key.rpartition("/")[0])
                    entry = decode(HistoryEntry, one.value, name_of(key))
                    snapshot.history.setdefault(key, {})[entry.epoch] = entry
                    continue
                key = group_key_of(one.key)
                if kind == "groups":
                    snapshot.groups[key] = record_of_key(one, name_of(key))
                elif kind == "progress":
                    snapshot.progress[key] = progress_of_key(one)
                else:
                    snapshot.retired[key] = epoch_of_key(one)
        async for found in self._cluster.pages(f"{layout.prefix}/access/"):
            for one in found.keys:
                _, tenant, namespace = group_key_of(one.key)
                acl = decode(AccessList, one.value, f"{tenant}/{namespace}")
                snapshot.access[tenant, namespace] = acl
        return snapshot

    async def write(self, snapshot: Snapshot, store_id: str) -> None:
        layout = self._layout
        await self._mark(Meta(store_id, layout.shards, UNFINISHED, 0, self._copy_id))
        for part in ("shards", "access"):
            prefix = f"{layout.prefix}/{part}/"
            await self._write([delete(prefix, end_of(prefix))])
        steps: list[Json] = [delete(layout.restored)]
        if snapshot.restored:
            steps = [put(layout.restored, str(uuid.uuid4()))]
        for key, epoch in snapshot.retired.items():
            steps.append(put(layout.retired(key), str(epoch)))
        for key, record in snapshot.groups.items():
            steps.append(put(layout.record(key), record_value(encode(record, name_of(key)))))
        for key, saved in snapshot.progress.items():
            steps.append(put(layout.progress(key), progress_value(saved)))
        for key, entries in snapshot.history.items():
            for epoch, entry in entries.items():
                steps.append(put(layout.tenure(key, epoch), encode(entry, name_of(key))))
        for names, acl in snapshot.access.items():
            steps.append(put(layout.access(*names), encode(acl, "/".join(names))))
        for first in range(0, len(steps), MOST_STEPS):
            await self._write(steps[first : first + MOST_STEPS])

    async def _write(self, steps: list[Json]) -> None:
        """Write while this copy is in progress: a request without an answer cannot be carried out after the copy has ended."""
        assert self._meta is not None  # noqa: S101 - ``write`` has marked the target
        in_progress = if_revision(self._layout.meta, self._meta.revision)
        if not (await self._etcd.txn([in_progress], steps)).succeeded:
            raise self._served()

    async def mark_moved(self, to: str) -> None:
        assert self._meta is not None  # noqa: S101 - a source has one
        self._moving = True
        await self._mark(replace(self._meta, moved_to=to, copy_id=0))

    async def finish(self, store_id: str) -> None:
        await self._mark(Meta(store_id, self._layout.shards, None, 0, self._copy_id))

    async def _mark(self, meta: Meta) -> None:
        """Replace the identity, unless a coordinator has a session or has replaced it."""
        text: Mapping[str, object] = {
            "StoreId": meta.store_id,
            "Shards": meta.shards,
            "Schema": SCHEMA,
            "MovedTo": meta.moved_to,
            "IsCopy": meta.copy_id,
        }
        known = 0 if self._meta is None else self._meta.revision
        members = f"{self._layout.live}members/"
        conditions = [if_revision(self._layout.meta, known), if_none(members)]
        done = await self._etcd.txn(conditions, [put(self._layout.meta, json.dumps(text))])
        if not done.succeeded:
            raise self._served()
        self._meta = replace(meta, revision=done.revision)

    def _served(self) -> StoreError:
        return StoreError(
            f"a coordinator serves {self.name}, or another copy is in progress: stop all of them, and copy again",
            exit_code=ExitCode.DATA_DIR_LOCKED,
        )


async def trust_etcd(etcd: Etcd, prefix: str) -> bool:
    """Withdraw the declaration that a store in etcd was restored, even while it is served; return if it had one."""
    meta = await read_meta(etcd, prefix)
    if meta is None:
        raise StoreError(f"there is no store under {prefix} in etcd: name its --etcd-prefix")
    cluster = EtcdCluster(etcd, Layout(prefix, meta.shards), meta)
    restored = await cluster.is_restored()
    await cluster.trust()
    return restored
