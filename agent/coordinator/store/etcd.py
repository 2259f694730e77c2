"""Groups in etcd, for several coordinators (R19).

Groups are hashed onto a fixed number of shards. An ``EtcdStore`` is one shard, used by its leader: every change is
one transaction that also compares the leadership key, so that a deposed leader changes nothing. ``EtcdCluster`` is
the part that belongs to no shard: the identity, the access lists, lists of all groups.

A record's version is its mod revision, which etcd never repeats. Each value of a record begins with a random
token: a write without an answer is sent again with the same token until its outcome is known, for at most
SETTLE_S; then OutcomeUnknown is raised.

Knows nothing of who leads, nor of what a record means.
"""

import asyncio
import json
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence

from agent.coordinator.store import MOST_ENTRIES, MOST_RETIRED, Stored
from agent.coordinator.store.codec import HISTORY_BOUND, decode, encode, name_of
from agent.coordinator.store.etcd_client import (
    RESEND_SHARE,
    Done,
    Etcd,
    EtcdError,
    EtcdRefused,
    EtcdUnknown,
    Found,
    Json,
    KeyValue,
    delete,
    end_of,
    if_none,
    if_revision,
    put,
    read,
)
from agent.coordinator.store.etcd_layout import (
    SCHEMA,
    Layout,
    Meta,
    epoch_of_key,
    group_key_of,
    progress_of_key,
    progress_value,
    quoted,
    read_meta,
    record_of_key,
    record_value,
)
from agent.errors import (
    CasMismatch,
    ConfigError,
    ExitCode,
    LeadershipLost,
    OutcomeUnknown,
    StoreError,
)
from agent.model import AccessList, GroupConfig, GroupKey, GroupRecord, HistoryEntry, Progress
from agent.ops.pages import sorted_page

PAGE = 200
"""The most records in one range read: a record of 2 members has some 500 bytes, one of 100 may have a megabyte."""

KEYS_PAGE = 5_000
"""The most keys in one range read without values."""

MOST_STEPS = 100
"""The most steps in one transaction; etcd's default limit is 128."""

SETTLE_S = 2.0
"""How long a write without an answer is repeated, at least once: as long as an election of etcd usually takes.
Other inputs of the group wait meanwhile."""

RESEND_S = 0.05
"""Pause between two attempts: an etcd that refuses at once must not be flooded."""

_INVALID = 3


class EtcdCluster:
    """A store in etcd as a whole. ``open`` it, and close it with ``aclose``."""

    def __init__(self, etcd: Etcd, layout: Layout, meta: Meta) -> None:
        self.etcd = etcd
        self.layout = layout
        self.meta = meta
        self.store_id = meta.store_id

    @classmethod
    async def open(cls, etcd: Etcd, prefix: str, shards: int) -> "EtcdCluster":
        """Open a store, and make it if there is none.

        Raises:
            ConfigError: it was made with another number of shards.
            StoreError: etcd fails, or the store was moved.
        """
        meta = await read_meta(etcd, prefix)
        if meta is None:
            text = json.dumps({"StoreId": str(uuid.uuid4()), "Shards": shards, "Schema": SCHEMA})
            key = f"{prefix}/meta"
            await etcd.txn([if_none(f"{prefix}/")], [put(key, text)])
            meta = await read_meta(etcd, prefix)
            if meta is None:
                raise StoreError(
                    f"etcd has keys under {prefix}/ that are no store of this program:"
                    " name another --etcd-prefix; nothing was changed"
                )
        if meta.moved_to is not None:
            raise StoreError(
                f"the store under {prefix} of etcd was copied to {meta.moved_to}, and must not be served"
                " beside the copy: serve that one, or copy it back with 'failover-agent store copy'",
                exit_code=ExitCode.STORE_MOVED,
            )
        if meta.shards != shards:
            raise ConfigError(
                f"shards is {shards}, and the store under {prefix} of etcd was made with {meta.shards}:"
                f" set shards to {meta.shards}; it is fixed when a store is made"
            )
        if meta.is_copy or meta.schema < SCHEMA:
            await cls._begin_to_serve(etcd, prefix, meta)
            return await cls.open(etcd, prefix, shards)
        return cls(etcd, Layout(prefix, shards), meta)

    @staticmethod
    async def _begin_to_serve(etcd: Etcd, prefix: str, meta: Meta) -> None:
        """Adopt a store that is a copy, or that an older version has served.

        Records are converted when they are read. A coordinator of the older version that still has a session
        could not read the new records, and would not know whom they exclude.
        """
        key = f"{prefix}/meta"
        text = json.dumps({"StoreId": meta.store_id, "Shards": meta.shards, "Schema": SCHEMA})
        unserved = [] if meta.is_copy else [if_none(f"{Layout(prefix, meta.shards).live}members/")]
        known = if_revision(key, meta.revision)
        if (await etcd.txn([known, *unserved], [put(key, text)])).succeeded or not unserved:
            return
        if (await etcd.txn([known], [])).succeeded:
            raise StoreError(
                f"coordinators of an older version serve the store under {prefix} of etcd: stop all of"
                " them, and start this one again when their leadership_ttl has passed; nothing was changed",
                exit_code=ExitCode.DATA_DIR_LOCKED,
            )

    def shard(self, number: int, leader_revision: int) -> "EtcdStore":
        """A shard, led under the leadership key of this revision."""
        return EtcdStore(self, number, leader_revision)

    async def is_served(self) -> bool:
        """Whether any coordinator has a session."""
        members = self.layout.member("")
        found = await self.etcd.range(read(members, end_of(members), count_only=True))
        return found.count > 0

    async def access(self, tenant: str, namespace: str) -> AccessList | None:
        """The access-control list of a namespace's groups, or None if none was ever set."""
        found = await self.etcd.get(self.layout.access(tenant, namespace))
        return None if found is None else decode(AccessList, found.value, f"{tenant}/{namespace}")

    async def set_access(self, tenant: str, namespace: str, acl: AccessList | None) -> None:
        """Replace that list; None removes it. It has no version, so a repeated attempt needs no settling."""
        key = self.layout.access(tenant, namespace)
        where = f"{tenant}/{namespace}"
        change = delete(key) if acl is None else put(key, encode(acl, where))
        await self.etcd.txn([], [change, put(self.layout.access_changed, str(uuid.uuid4()))])

    async def is_restored(self) -> bool:
        """Whether the store was declared as restored from a copy, and is not trusted again."""
        return await self.etcd.get(self.layout.restored) is not None

    async def trust(self) -> None:
        """Withdraw the declaration that the store was restored, for every coordinator at once."""
        await self.etcd.txn([], [delete(self.layout.restored)])

    async def configs(
        self,
        tenant: str,
        namespace: str,
        skip: int,
        count: int,
        visible: Callable[[AccessList | None], bool],
    ) -> tuple[int, list[GroupConfig]]:
        """A page of a namespace's groups of all leaders, sorted by id; and their number."""
        groups: list[str] = []
        for shard in range(self.layout.shards):
            prefix = f"{self.layout.records(shard)}{quoted(tenant)}/{quoted(namespace)}/"
            async for found in self.pages(prefix):
                for one in found.keys:
                    key = group_key_of(one.key)
                    if visible(record_of_key(one, name_of(key)).acl):
                        groups.append(key.group)
        page, wanted = [], await sorted_page(groups, skip, count)
        for first in range(0, len(wanted), MOST_STEPS):
            keys = [GroupKey(tenant, namespace, one) for one in wanted[first : first + MOST_STEPS]]
            done = await self.etcd.txn([], [read(self.layout.record(key)) for key in keys])
            for key, record in zip(keys, done.answers, strict=True):
                if record is not None and record.keys:
                    page.append(record_of_key(record.keys[0], name_of(key)).config)
        return len(groups), page

    async def pages(self, prefix: str, limit: int = PAGE) -> AsyncIterator[Found]:
        """All keys with a prefix, some at a time."""
        start, end = prefix, end_of(prefix)
        while True:
            found = await self.etcd.range(read(start, end, limit=limit))
            yield found
            if len(found.keys) < limit:
                return
            start = found.keys[-1].key + "\0"

    async def aclose(self) -> None:
        """Close the connections."""
        await self.etcd.aclose()


class EtcdStore:
    """One shard as a Store (see the Protocol), for as long as one coordinator leads it."""

    def __init__(self, cluster: EtcdCluster, shard: int, leader_revision: int) -> None:
        self.store_id = cluster.meta.store_id
        self._cluster = cluster
        self._layout = cluster.layout
        self._etcd = cluster.etcd
        self._shard = shard
        self._fence = if_revision(self._layout.leader(shard), leader_revision)
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
        """Add a group; return its version. Raises CasMismatch if the group exists."""
        self._check_open()
        return await self._write(key, 0, encode(record, name_of(key)), [])

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

    async def _write(self, key: GroupKey, expected: int, text: str, history: list[Json]) -> int:
        """Put a record with some tenures; the new version."""
        token = str(uuid.uuid4())
        steps = [put(self._layout.record(key), record_value(text, token)), *history]
        if history:
            prefix = self._layout.history(key)
            steps.append(read(prefix, end_of(prefix), count_only=True))
        done = await self._commit(key, expected, steps, token)
        if isinstance(done, KeyValue):
            return done.revision
        kept = done.answers[-1] if history else None
        # Many at once: it must not delay each change of role.
        if kept is not None and kept.count >= HISTORY_BOUND + MOST_ENTRIES:
            await self._forget(self._layout.history(key), kept.count - HISTORY_BOUND)
        return done.revision

    async def settle(self, key: GroupKey, expected: int) -> Stored | None:
        """The record. One with the expected version is rewritten, so that no earlier write can still happen."""
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
        """Replace the progress of each of these groups; a key without a group is ignored."""
        self._check_open()
        steps = []
        for key, saved in progress.items():
            record = if_revision(self._layout.record(key), 0) | {"result": "GREATER"}
            write = put(self._layout.progress(key), progress_value(saved))
            steps.append({"request_txn": {"compare": [record], "success": [write]}})
        for first in range(0, len(steps), MOST_STEPS):
            done = await self._etcd.txn([self._fence], steps[first : first + MOST_STEPS])
            if not done.succeeded:
                raise self._lost()

    async def delete(self, key: GroupKey, expected: int, epoch: int) -> None:
        """Remove a group with its history and progress, and remember its epoch; or CasMismatch."""
        self._check_open()
        history, retired = self._layout.history(key), self._layout.all_retired(self._shard)
        steps = [
            delete(self._layout.record(key)),
            delete(self._layout.progress(key)),
            delete(history, end_of(history)),
        ]
        if epoch > 0:
            steps.append(put(self._layout.retired(key), str(epoch)))
        steps.append(read(retired, end_of(retired), count_only=True))
        done = await self._commit(key, expected, steps, token=None)
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
        self, key: GroupKey, expected: int, steps: list[Json], token: str | None
    ) -> Done | KeyValue:
        """Carry out a change of one record once; return its answer, or the record that proves the change.

        ``token`` is the token in the record's new value; None: the change deletes the record.
        """
        record = self._layout.record(key)
        conditions = [if_revision(record, expected), self._fence]
        leader = self._layout.leader(self._shard)
        on_failure = [read(record), read(leader, keys_only=True)]
        loop = asyncio.get_running_loop()
        until, resent = loop.time() + SETTLE_S, False
        unknown: EtcdError = EtcdUnknown("etcd did not answer in time")
        attempts: set[asyncio.Task[Done]] = set()
        try:
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
            for attempt in attempts:
                attempt.cancel()

    def _outcome(
        self, key: GroupKey, done: Done, expected: int, token: str | None, *, resent: bool
    ) -> KeyValue:
        """Explain a refused transaction: an earlier attempt succeeded, or CasMismatch, or leadership was lost."""
        found, leader = done.answers
        assert found is not None  # noqa: S101 - both are range reads
        assert leader is not None  # noqa: S101 - likewise
        record = found.keys[0] if found.keys else None
        if token is not None and record is not None and record.value.startswith(f"{token}\n"):
            return record
        if token is None and resent and record is None:
            return KeyValue("", "", done.revision)
        fence = int(self._fence["mod_revision"])
        if not leader.keys or leader.keys[0].revision != fence:
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
            keys = [one.key for one in found.keys]
            for first in range(0, len(keys), MOST_STEPS):
                steps = [delete(key) for key in keys[first : first + MOST_STEPS]]
                await self._etcd.txn([self._fence], steps)
        except EtcdError:
            return

    def _lost(self) -> LeadershipLost:
        return LeadershipLost(
            f"another coordinator leads shard {self._shard} by now; nothing was changed"
        )

    def _explained(self, failure: EtcdError, key: GroupKey) -> StoreError:
        """The error of a change that surely was not made."""
        invalid = isinstance(failure, EtcdRefused) and failure.code == _INVALID  # one value's fault
        code = ExitCode.INTERNAL if invalid else ExitCode.ETCD
        return StoreError(f"{name_of(key)}: {failure}; nothing was changed", exit_code=code)

    def _place(self, key: GroupKey) -> str:
        return f"{name_of(key)} in etcd"

    def _check_open(self) -> None:
        if self._closed:
            raise StoreError(
                "the store is closed; calls have to come before close()",
                exit_code=ExitCode.INTERNAL,
            )
