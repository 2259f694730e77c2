"""The coordinator's store in one SQLite file, which survives SIGKILL and power loss at any moment.

Owns a thread, the only one that uses the database. Calls wait in a queue; when the thread is free, all waiting calls
become one transaction with one sync of the disk (group commit), and are answered after it. Knows nothing of what
a record means; data_dir.py creates and opens the file.

Not promised: that a cancelled call had no effect. A store belongs to one event loop. A network file system is
unsafe (WAL, locks).
"""

import asyncio
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import apsw

from agent.coordinator.store import MOST_RETIRED, Stored
from agent.coordinator.store.codec import HISTORY_BOUND, decode, decode_progress, encode, name_of
from agent.coordinator.store.data_dir import DataDir, explain, open_data_dir
from agent.errors import CasMismatch, ExitCode, StoreError
from agent.model import AccessList, GroupKey, GroupRecord, HistoryEntry, Progress
from agent.schema.scalars import format_date_time

QUEUE_BOUND = 10_000
"""How many calls may wait for the disk: a change of role in several thousand groups at once, about a second's
work. A disk that is further behind is too slow for a lease."""

BATCH_BOUND = 1_000
"""The most calls in one transaction, so that the first one does not wait for too many others."""

_SELECT_STORED = (
    "SELECT tenant, namespace, name, version, record, epoch, last_data"
    " FROM failover_group LEFT JOIN progress ON group_id = id"
)
_IS_GROUP = "tenant = ? AND namespace = ? AND name = ?"

AnswerT = TypeVar("AnswerT")


@dataclass(frozen=True, slots=True)
class _Call:
    """A submitted call: ``work`` runs inside a transaction, in the store's thread.

    Attributes:
        savepoint: False if ``work`` is a single statement, which SQLite undoes by itself if it fails.
    """

    work: Callable[[], Any]
    answer: asyncio.Future[Any]
    savepoint: bool = True


@dataclass(frozen=True, slots=True)
class _Outcome:
    """The outcome of a call, delivered to its awaiter once the transaction is durable."""

    value: Any = None
    error: Exception | None = None


class SqliteStore:
    """A Store in a data directory; create it by ``open``. The calls are described at the Protocol."""

    def __init__(self, data_dir: DataDir) -> None:
        self._data_dir = data_dir
        self._db = data_dir.database
        self.store_id = data_dir.store_id
        # Continuing from the highest version, none is repeated for a group that is created again.
        self._version: int = self._db.execute(
            "SELECT ifnull(max(version), 0) FROM failover_group"
        ).get
        self._calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._closing = False
        self._closed: Future[None] = Future()
        # A daemon thread: a process that ends without ``close`` is as safe as one that is killed.
        threading.Thread(target=self._run, name="sqlite-store", daemon=True).start()

    @classmethod
    def open(cls, data_dir: Path) -> "SqliteStore":
        """Open a data directory; create it if missing. Blocks on the disk: call it in a thread or early.

        Raises:
            StoreError: the directory is read-only, full, locked by another coordinator, from a newer
                version, or damaged; ``exit_code`` is specific, and nothing was changed.
        """
        opened = open_data_dir(data_dir)
        try:
            return cls(opened)
        except apsw.Error as error:
            opened.close()
            raise explain(error, data_dir) from error

    async def load(self) -> dict[GroupKey, Stored]:
        """Load every group. Raises StoreError for a record that cannot be read."""

        def work() -> dict[GroupKey, Stored]:
            return dict(self._stored(row) for row in self._db.execute(_SELECT_STORED))

        return await self._submit(work)

    async def create(self, key: GroupKey, record: GroupRecord) -> int:
        """Add a group; return its version. Raises CasMismatch if the group exists."""
        text = encode(record, name_of(key))

        def work() -> int:
            if self._find(key) is not None:
                raise CasMismatch(f"{name_of(key)} exists already")
            self._version += 1
            self._db.execute(
                "INSERT INTO failover_group (tenant, namespace, name, version, record)"
                " VALUES (?, ?, ?, ?, ?)",
                (*key, self._version, text),
            )
            return self._version

        return await self._submit(work)

    async def swap(
        self,
        key: GroupKey,
        expected: int,
        record: GroupRecord,
        history: Sequence[HistoryEntry] = (),
    ) -> int:
        """Replace a record and upsert history by epoch; return the new version, or raise CasMismatch."""
        text = encode(record, name_of(key))
        entries = [(entry.epoch, encode(entry, name_of(key))) for entry in history]

        def work_without_history() -> int:
            self._db.execute(
                "UPDATE failover_group SET version = ?, record = ?"
                " WHERE tenant = ? AND namespace = ? AND name = ? AND version = ?",
                (self._version + 1, text, *key, expected),
            )
            if self._db.changes() == 0:
                self._check_version(key, expected)  # raises CasMismatch
            self._version += 1
            return self._version

        def work() -> int:
            group = self._check_version(key, expected)
            self._version += 1
            self._db.execute(
                "UPDATE failover_group SET version = ?, record = ? WHERE id = ?",
                (self._version, text, group),
            )
            for epoch, entry in entries:
                self._db.execute(
                    "INSERT INTO history (group_id, epoch, entry) VALUES (?, ?, ?)"
                    " ON CONFLICT (group_id, epoch) DO UPDATE SET entry = excluded.entry",
                    (group, epoch, entry),
                )
            if entries:
                self._db.execute(
                    "DELETE FROM history WHERE group_id = ?1 AND epoch <= (SELECT epoch FROM history"
                    " WHERE group_id = ?1 ORDER BY epoch DESC LIMIT 1 OFFSET ?2)",
                    (group, HISTORY_BOUND),
                )
            return self._version

        if not entries:
            return await self._submit(work_without_history, savepoint=False)
        return await self._submit(work)

    async def settle(self, key: GroupKey, expected: int) -> Stored | None:  # noqa: ARG002 - calls keep their order
        """The record, or None."""

        def work() -> Stored | None:
            rows = self._db.execute(f"{_SELECT_STORED} WHERE {_IS_GROUP}", key)
            return next((self._stored(row)[1] for row in rows), None)

        return await self._submit(work)

    async def save_progress(self, progress: Mapping[GroupKey, Progress]) -> None:
        """Replace the progress of each of these groups; a key without a group is ignored."""
        rows = [
            (saved.epoch, format_date_time(saved.last_data), *key)
            for key, saved in progress.items()
        ]

        def work() -> None:
            self._db.executemany(
                "INSERT INTO progress (group_id, epoch, last_data)"
                " SELECT id, ?, ? FROM failover_group"
                " WHERE tenant = ? AND namespace = ? AND name = ?"
                " ON CONFLICT (group_id) DO UPDATE"
                " SET epoch = excluded.epoch, last_data = excluded.last_data",
                rows,
            )

        await self._submit(work)

    async def delete(self, key: GroupKey, expected: int, epoch: int) -> None:
        """Remove a group with its history and progress, and remember its epoch; or CasMismatch."""

        def work() -> None:
            group = self._check_version(key, expected)
            self._db.execute("DELETE FROM failover_group WHERE id = ?", (group,))
            if epoch > 0:
                # Each insertion gets a new number, so the lowest numbers are the oldest.
                self._db.execute(
                    "INSERT OR REPLACE INTO retired (tenant, namespace, name, epoch)"
                    " VALUES (?, ?, ?, ?)",
                    (*key, epoch),
                )
                self._db.execute(
                    "DELETE FROM retired WHERE id <= (SELECT id FROM retired ORDER BY id DESC"
                    " LIMIT 1 OFFSET ?)",
                    (MOST_RETIRED,),
                )

        await self._submit(work)

    async def retired_epoch(self, key: GroupKey) -> int:
        """The epoch that was remembered for the name, or 0."""

        def work() -> int:
            rows = self._db.execute(
                "SELECT epoch FROM retired WHERE tenant = ? AND namespace = ? AND name = ?", key
            )
            return next((int(epoch) for (epoch,) in rows), 0)

        return await self._submit(work)

    async def history(
        self, key: GroupKey, *, skip: int = 0, count: int = 100
    ) -> tuple[int, list[HistoryEntry]]:
        """How many tenures are kept, and ``count`` of them after ``skip``, newest first."""

        def work() -> tuple[int, list[HistoryEntry]]:
            found = self._find(key)
            if found is None:
                return 0, []
            total = self._db.execute(
                "SELECT count(*) FROM history WHERE group_id = ?", (found[0],)
            ).get
            rows = self._db.execute(
                "SELECT entry FROM history WHERE group_id = ? ORDER BY epoch DESC LIMIT ? OFFSET ?",
                (found[0], count, skip),
            )
            return total, [decode(HistoryEntry, text, self._place(key)) for (text,) in rows]

        return await self._submit(work)

    async def access(self, tenant: str, namespace: str) -> AccessList | None:
        """The access-control list of a namespace's groups, or None if none was ever set."""

        def work() -> AccessList | None:
            text = self._db.execute(
                "SELECT acl FROM access WHERE tenant = ? AND namespace = ?", (tenant, namespace)
            ).get
            return None if text is None else decode(AccessList, text, f"{tenant}/{namespace}")

        return await self._submit(work)

    async def set_access(self, tenant: str, namespace: str, acl: AccessList | None) -> None:
        """Replace that list; None removes it."""
        text = encode(acl, f"{tenant}/{namespace}") if acl is not None else None

        def work() -> None:
            if text is None:
                self._db.execute(
                    "DELETE FROM access WHERE tenant = ? AND namespace = ?", (tenant, namespace)
                )
                return
            self._db.execute(
                "INSERT INTO access (tenant, namespace, acl) VALUES (?, ?, ?)"
                " ON CONFLICT (tenant, namespace) DO UPDATE SET acl = excluded.acl",
                (tenant, namespace, text),
            )

        await self._submit(work)

    async def declare_restored(self) -> None:
        """Remember that the store was put back from an older copy."""
        await self._submit(self._data_dir.declare_restored)

    async def is_restored(self) -> bool:
        """Whether ``declare_restored`` was called and not withdrawn."""
        return await self._submit(self._data_dir.is_restored)

    async def close(self) -> None:
        """Carry out the calls that wait, then close the data directory. May be called twice."""
        if not self._closing:
            self._closing = True
            self._calls.put(None)
        await asyncio.shield(asyncio.wrap_future(self._closed))

    async def _submit(self, work: Callable[[], AnswerT], *, savepoint: bool = True) -> AnswerT:
        """Run ``work`` in the store's thread; return its result once its transaction is durable."""
        if self._closing:
            raise StoreError(
                f"the store in {self._data_dir.path.parent} is closed;"
                " calls have to come before close()",
                exit_code=ExitCode.INTERNAL,
            )
        if self._calls.qsize() >= QUEUE_BOUND:
            raise StoreError(
                f"the disk of {self._data_dir.path.parent} is too slow: {QUEUE_BOUND} calls wait for"
                " it already, and no more may; nothing was changed, ask again later",
                exit_code=ExitCode.INTERNAL,
            )
        answer: asyncio.Future[AnswerT] = asyncio.get_running_loop().create_future()
        self._calls.put(_Call(work, answer, savepoint))
        return await answer

    # The methods below run in the store's thread.

    def _run(self) -> None:
        while (first := self._calls.get()) is not None:
            batch = self._next_batch(first)
            outcomes = self._commit(batch)
            with suppress(RuntimeError):  # the event loop has ended, so nobody awaits the result
                batch[0].answer.get_loop().call_soon_threadsafe(_deliver, batch, outcomes)
        try:
            self._data_dir.close()
        except (OSError, apsw.Error) as error:
            self._closed.set_exception(explain(error, self._data_dir.path.parent))
        else:
            self._closed.set_result(None)

    def _next_batch(self, first: _Call) -> list[_Call]:
        batch = [first]
        with suppress(queue.Empty):
            while len(batch) < BATCH_BOUND:
                call = self._calls.get_nowait()
                if call is None:
                    self._calls.put(None)  # close() comes after this batch, and nothing after it
                    break
                batch.append(call)
        return batch

    def _commit(self, batch: list[_Call]) -> list[_Outcome]:
        """Run a batch as one transaction; return the result of each call, or the disk's error for all."""
        try:
            self._db.execute("BEGIN IMMEDIATE")
            outcomes = [self._run_call(call) for call in batch]
            self._db.execute("COMMIT")
        except Exception as error:  # noqa: BLE001 - a thread's edge: every error goes to the awaiters
            self._roll_back(error)
            return [_Outcome(error=self._explain(error)) for _ in batch]
        return outcomes

    def _run_call(self, call: _Call) -> _Outcome:
        """Run one call inside a savepoint, so that its refusal undoes nothing of the others."""
        if call.answer.cancelled():
            return _Outcome()
        if call.savepoint:
            self._db.execute("SAVEPOINT one_call")
        try:
            outcome = _Outcome(value=call.work())
        except (CasMismatch, StoreError) as error:
            outcome = _Outcome(error=error)
        except (ValueError, OverflowError) as error:  # half a surrogate pair, an epoch of 65 bits
            refusal = StoreError(
                f"a name or number cannot be kept: {error}; nothing was changed",
                exit_code=ExitCode.INTERNAL,
            )
            outcome = _Outcome(error=refusal)
        if call.savepoint:
            if outcome.error is not None:
                self._db.execute("ROLLBACK TO one_call")
            self._db.execute("RELEASE one_call")
        return outcome

    def _roll_back(self, error: Exception) -> None:
        """Remove every trace of a failed transaction, so that the store stays usable."""
        with suppress(apsw.Error):
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            if isinstance(error, apsw.FullError | apsw.IOError):
                # A transaction whose sync failed may be complete in the WAL, and a restart would
                # apply it. Emptying the WAL removes it, and frees some disk space.
                self._db.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)

    def _explain(self, error: Exception) -> StoreError:
        if isinstance(error, OSError | apsw.Error):
            return explain(error, self._data_dir.path.parent)
        return StoreError(
            f"a transaction in {self._data_dir.path} failed: {error!r}; nothing was changed",
            exit_code=ExitCode.INTERNAL,
        )

    def _place(self, key: GroupKey) -> str:
        return f"{name_of(key)} in {self._data_dir.path}"

    def _stored(self, row: tuple[Any, ...]) -> tuple[GroupKey, Stored]:
        tenant, namespace, name, version, text, epoch, last_data = row
        key = GroupKey(tenant, namespace, name)
        place = self._place(key)
        progress = None if epoch is None else decode_progress(epoch, last_data, place)
        return key, Stored(version, decode(GroupRecord, text, place), progress)

    def _find(self, key: GroupKey) -> tuple[int, int] | None:
        """The row id and the version of a group."""
        found: tuple[int, int] | None = self._db.execute(
            "SELECT id, version FROM failover_group"
            " WHERE tenant = ? AND namespace = ? AND name = ?",
            key,
        ).get
        return found

    def _check_version(self, key: GroupKey, expected: int) -> int:
        """The row id of a group whose version is ``expected``; otherwise raise CasMismatch."""
        found = self._find(key)
        if found is not None and found[1] == expected:
            return found[0]
        now = "the group is gone" if found is None else f"it is at version {found[1]}"
        raise CasMismatch(f"{name_of(key)} is not at version {expected} any more: {now}")


def _deliver(batch: list[_Call], outcomes: list[_Outcome]) -> None:
    """Deliver the outcomes to the awaiters, in their event loop; skip those that were cancelled."""
    for call, outcome in zip(batch, outcomes, strict=True):
        if call.answer.done():
            continue
        if outcome.error is not None:
            call.answer.set_exception(outcome.error)
        else:
            call.answer.set_result(outcome.value)
