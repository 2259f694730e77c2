"""One shard of groups in etcd, used by its leader (R19).

Every change is one transaction that also compares the leadership key, so that a deposed leader changes nothing. A
request without an answer may still be carried out, long after it was given up. So each change also compares what the
one before has written, or what it has read: a delayed one is refused after a later change.

A record's version is its mod revision, which etcd never repeats. Each value of a record begins with a random
token: a write without an answer is sent again with the same token until its outcome is known, for at most
SETTLE_S; then OutcomeUnknown is raised.

Knows nothing of who leads, nor of what a record means.
"""

import asyncio
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from agent.coordinator.hang_up import check_caller
from agent.coordinator.store import MOST_ENTRIES, MOST_RETIRED, Stored
from agent.coordinator.store.codec import HISTORY_BOUND, decode, encode, name_of
from agent.coordinator.store.etcd_client import (
    RESEND_SHARE,
    Done,
    EtcdError,
    EtcdRefused,
    EtcdUnknown,
    Found,
    Json,
    KeyValue,
    delete,
    end_of,
    if_revision,
    put,
    read,
)
from agent.coordinator.store.etcd_layout import (
    epoch_of_key,
    group_key_of,
    progress_of_key,
    progress_value,
    record_of_key,
    record_value,
)
from agent.errors import CasMismatch, ExitCode, LeadershipLost, OutcomeUnknown, StoreError
from agent.model import AccessList, GroupKey, GroupRecord, HistoryEntry, Progress

if TYPE_CHECKING:
    from agent.coordinator.store.etcd import EtcdCluster

KEYS_PAGE = 5_000
"""The most keys in one range read without values."""

MOST_STEPS = 100
"""The most steps in one transaction; etcd's default limit is 128."""

MOST_COMMITS = 16
"""The most changes of records under way, half of the connections to etcd. Further ones wait here, before
their timeouts begin: else many would time out and be sent again, until etcd had no time for any."""

SETTLE_S = 2.0
"""How long a write without an answer is repeated, at least once: as long as an election of etcd usually takes.
Other inputs of the group wait meanwhile."""

RESEND_S = 0.05
"""Pause between two attempts: an etcd that refuses at once must not be flooded."""

_INVALID = 3


class EtcdStore:
    """One shard as a Store (see the Protocol), for as long as one coordinator leads it."""

    def __init__(self, cluster: "EtcdCluster", shard: int, leader_revision: int) -> None:
        self.store_id = cluster.meta.store_id
        self._cluster = cluster
        self._layout = cluster.layout
        self._etcd = cluster.etcd
        self._shard = shard
        self._leader_revision = leader_revision
        self._fence = if_revision(self._layout.leader(shard), leader_revision)
        self._last_save: int | None = None
        self._deleting = asyncio.Lock()
        self.is_over: Callable[[], bool] = lambda: False
        self._closed = False

    async def load(self) -> dict[GroupKey, Stored]:
        """Every group of the shard."""
        self._check_open()
        saved: dict[GroupKey, Progress] = {}
        async for found in self._cluster.pages(self._layout.all_progress(self._shard), KEYS_PAGE):
            saved |= {group_key_of(one.key): progress_of_key(one) for one in found.keys}
        groups = {}
        async for found in self._cluster.pages(self._layout.records(self._shard)):
            for one in found.keys:
                key = group_key_of(one.key)
                groups[key] = Stored(
                    one.revision, record_of_key(one, self._place(key)), saved.get(key)
                )
            await asyncio.sleep(0)  # decoding a page takes milliseconds
        return groups

    async def create(self, key: GroupKey, record: GroupRecord) -> int:
        """Add a group; return its version. Raises CasMismatch if it exists, or if a deletion was carried out meanwhile."""
        self._check_open()
        with suppress(CasMismatch):
            return await self._create(key, record)
        async with self._deleting:  # another group was deleted meanwhile, unless this one exists
            return await self._create(key, record)

    async def _create(self, key: GroupKey, record: GroupRecord) -> int:
        text, last = encode(record, name_of(key)), self._layout.last_deletion(self._shard)
        none_since = if_revision(last, await self._etcd.revision(last))
        return await self._write(key, 0, text, [], none_since)

    async def swap(
        self,
        key: GroupKey,
        expected: int,
        record: GroupRecord,
        history: Sequence[HistoryEntry] = (),
    ) -> int:
        """Replace a record and upsert history by epoch; return the new version, or raise CasMismatch."""
        self._check_open()
        assert len(history) <= MOST_ENTRIES  # noqa: S101 - our own mistake
        steps = [
            put(self._layout.tenure(key, entry.epoch), encode(entry, name_of(key)))
            for entry in history
        ]
        return await self._write(key, expected, encode(record, name_of(key)), steps)

    async def _write(
        self, key: GroupKey, expected: int, text: str, history: list[Json], *conditions: Json
    ) -> int:
        """Put a record with some tenures; return its new version."""
        token = str(uuid.uuid4())
        steps = [put(self._layout.record(key), record_value(text, token)), *history]
        if history:
            prefix = self._layout.history(key)
            steps.append(read(prefix, end_of(prefix), count_only=True))
        done = await self._commit(key, expected, steps, token, *conditions)
        if isinstance(done, KeyValue):
            return done.revision
        kept = done.answers[-1] if history else None
        # Delete many old entries at once, so that not every change of role has to wait for a deletion.
        if kept is not None and kept.count >= HISTORY_BOUND + MOST_ENTRIES:
            await self._forget(self._layout.history(key), kept.count - HISTORY_BOUND)
        return done.revision

    async def settle(self, key: GroupKey, expected: int) -> Stored | None:
        """Read the record; rewrite one with the expected version, so that no earlier write can still happen."""
        self._check_open()
        place = self._layout.record(key)
        found = await self._etcd.get(place)
        if found is not None and (version := found.revision) == expected:
            token = str(uuid.uuid4())
            value = record_value(found.value.partition("\n")[2], token)
            try:
                version = (await self._commit(key, expected, [put(place, value)], token)).revision
            except CasMismatch:  # the earlier change has happened meanwhile
                found = await self._etcd.get(place)
        if found is None:
            return None
        version = max(version, found.revision)
        saved = await self._etcd.get(self._layout.progress(key))
        return Stored(
            version,
            record_of_key(found, self._place(key)),
            None if saved is None else progress_of_key(saved),
        )

    async def save_progress(self, progress: Mapping[GroupKey, Progress]) -> None:
        """Replace the progress of each of these groups; a key without a group is ignored. One call at a time."""
        self._check_open()
        steps = []
        for key, saved in progress.items():
            record = if_revision(self._layout.record(key), 0) | {"result": "GREATER"}
            write = put(self._layout.progress(key), progress_value(saved))
            steps.append({"request_txn": {"compare": [record], "success": [write]}})
        for first in range(0, len(steps), MOST_STEPS):
            while not await self._save_after_the_last(steps[first : first + MOST_STEPS]):
                pass

    async def _save_after_the_last(self, steps: list[Json]) -> bool:
        """Save progress unless an earlier save has come late, after the last one was read; return whether it was done."""
        key, leader = self._layout.last_save(self._shard), self._layout.leader(self._shard)
        if self._last_save is None:
            self._last_save = await self._etcd.revision(key)
        conditions = [self._fence, if_revision(key, self._last_save)]
        self._last_save = None  # unknown until it is answered
        done = await self._etcd.txn(
            conditions, [put(key, ""), *steps], [read(leader, keys_only=True)]
        )
        if done.succeeded:
            self._last_save = done.revision
        elif not self._leads(done.answers[0]):
            raise self._lost()
        return done.succeeded

    async def delete(self, key: GroupKey, expected: int, epoch: int) -> None:
        """Remove a group with its history and progress, and remember its epoch; or CasMismatch."""
        self._check_open()
        history, retired = self._layout.history(key), self._layout.all_retired(self._shard)
        steps = [
            delete(self._layout.record(key)),
            delete(self._layout.progress(key)),
            delete(history, end_of(history)),
            put(self._layout.last_deletion(self._shard), ""),
        ]
        if epoch > 0:
            steps.append(put(self._layout.retired(key), str(epoch)))
        steps.append(read(retired, end_of(retired), count_only=True))
        async with self._deleting:
            done = await self._commit(key, expected, steps, None)
        kept = done.answers[-1] if isinstance(done, Done) else None
        most = max(1, MOST_RETIRED // self._layout.shards)
        if kept is not None and kept.count > most:
            await self._forget(retired, kept.count - most, oldest_write_first=True)

    async def retired_epoch(self, key: GroupKey) -> int:
        """The epoch that was remembered for the name, or 0."""
        self._check_open()
        found = await self._etcd.get(self._layout.retired(key))
        return 0 if found is None else epoch_of_key(found)

    async def history(
        self, key: GroupKey, *, skip: int = 0, count: int = 100
    ) -> tuple[int, list[HistoryEntry]]:
        """How many tenures are kept, and ``count`` of them after ``skip``, newest first."""
        self._check_open()
        prefix = self._layout.history(key)
        limit = min(skip + count, HISTORY_BOUND)
        found = await self._etcd.range(
            read(prefix, end_of(prefix), limit=max(1, limit), newest_key_first=True)
        )
        page = found.keys[skip : skip + count]
        total = min(found.count, HISTORY_BOUND)
        return total, [decode(HistoryEntry, one.value, self._place(key)) for one in page]

    async def access(self, tenant: str, namespace: str) -> AccessList | None:
        """The access-control list of a namespace's groups, or None if none was ever set."""
        self._check_open()
        return await self._cluster.access(tenant, namespace)

    async def set_access(self, tenant: str, namespace: str, acl: AccessList | None) -> None:
        """Replace that list; None removes it."""
        self._check_open()
        await self._cluster.set_access(tenant, namespace, acl)

    async def declare_restored(self) -> None:
        """Remember that the store was put back from an older copy."""
        self._check_open()
        step = put(self._layout.restored, str(uuid.uuid4()))
        if not (await self._etcd.txn([self._fence], [step])).succeeded:
            raise self._lost()

    async def is_restored(self) -> bool:
        """Whether ``declare_restored`` was called and not withdrawn."""
        self._check_open()
        return await self._cluster.is_restored()

    async def close(self) -> None:
        """Refuse further calls."""
        self._closed = True

    # -- transactions -------------------------------------------------------------------------

    async def _commit(
        self, key: GroupKey, expected: int, steps: list[Json], token: str | None, *also: Json
    ) -> Done | KeyValue:
        """Carry out a change of one record once; return its answer, or the record that proves the change.

        ``token`` is the token in the record's new value; None: the change deletes the record. ``also``: conditions
        besides the record's version and the leadership.
        """
        record = self._layout.record(key)
        conditions = [if_revision(record, expected), self._fence, *also]
        leader = self._layout.leader(self._shard)
        on_failure = [read(record), read(leader, keys_only=True)]
        loop = asyncio.get_running_loop()
        unknown: EtcdError = EtcdUnknown("etcd did not answer in time")
        attempts: set[asyncio.Task[Done]] = set()
        await self._cluster.commits.acquire()
        try:
            check_caller()
            self._check_open()
            until, resent = loop.time() + SETTLE_S, False
            while True:
                attempt = loop.create_task(self._etcd.txn(conditions, steps, on_failure))
                attempt.add_done_callback(lambda one: one.cancelled() or one.exception())
                attempts.add(attempt)
                answered, attempts = await asyncio.wait(
                    attempts,
                    timeout=RESEND_SHARE * self._etcd.timeout_s,
                    return_when=asyncio.FIRST_COMPLETED,
                )
                for attempt in answered:
                    try:
                        done = attempt.result()
                    except EtcdError as failure:
                        if not resent and not isinstance(failure, EtcdUnknown):
                            raise self._explained(failure, key) from failure
                        unknown = failure  # an attempt in parallel may still succeed
                    else:
                        if done.succeeded:
                            return done
                        return self._outcome(key, done, expected, token, resent=resent)
                if resent and loop.time() >= until:
                    raise OutcomeUnknown(
                        f"{unknown}; whether {name_of(key)} was changed is unknown"
                    ) from unknown
                if answered:
                    await asyncio.sleep(RESEND_S)
                resent = True
        finally:
            self._cluster.commits.release()
            for attempt in attempts:
                attempt.cancel()

    def _outcome(
        self, key: GroupKey, done: Done, expected: int, token: str | None, *, resent: bool
    ) -> KeyValue:
        """Explain a refused transaction: an earlier attempt succeeded, or CasMismatch, or leadership was lost."""
        found, leader = done.answers
        assert found is not None  # noqa: S101 - it is a range read
        record = found.keys[0] if found.keys else None
        if token is not None and record is not None and record.value.startswith(f"{token}\n"):
            return record
        if token is None and resent and record is None:
            return KeyValue("", "", done.revision)
        if not self._leads(leader):
            raise self._lost()
        if expected == 0:
            raise CasMismatch(f"{name_of(key)} exists already")
        now = "the group is gone" if record is None else f"it is at version {record.revision}"
        raise CasMismatch(f"{name_of(key)} is not at version {expected} any more: {now}")

    async def _forget(self, prefix: str, number: int, *, oldest_write_first: bool = False) -> None:
        """Delete the first keys of a range. After a failure the next call deletes them."""
        try:
            found = await self._etcd.range(
                read(
                    prefix,
                    end_of(prefix),
                    limit=number,
                    keys_only=True,
                    oldest_write_first=oldest_write_first,
                )
            )
            for first in range(0, len(found.keys), MOST_STEPS):
                some = found.keys[first : first + MOST_STEPS]
                unchanged = [if_revision(one.key, one.revision) for one in some]
                await self._etcd.txn([self._fence, *unchanged], [delete(one.key) for one in some])
        except EtcdError:
            return

    def _leads(self, leader: Found | None) -> bool:
        """Whether the leadership key that was read still has the revision of this leadership."""
        keys = leader.keys if leader is not None else ()
        return any(one.revision == self._leader_revision for one in keys)

    def _lost(self) -> LeadershipLost:
        return LeadershipLost(
            f"another coordinator leads shard {self._shard} by now; nothing was changed"
        )

    def _explained(self, failure: EtcdError, key: GroupKey) -> StoreError:
        """The error of a change that was certainly not made."""
        # If etcd finds the request invalid, the value is at fault, and not etcd.
        invalid = isinstance(failure, EtcdRefused) and failure.code == _INVALID
        code = ExitCode.INTERNAL if invalid else ExitCode.ETCD
        return StoreError(f"{name_of(key)}: {failure}; nothing was changed", exit_code=code)

    def _place(self, key: GroupKey) -> str:
        return f"{name_of(key)} in etcd"

    def _check_open(self) -> None:
        if self.is_over():
            raise self._lost()
        if self._closed:
            raise StoreError(
                "the store is closed; calls have to come before close()",
                exit_code=ExitCode.INTERNAL,
            )
