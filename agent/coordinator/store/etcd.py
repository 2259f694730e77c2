"""A store in etcd as a whole, for several coordinators (R19): its identity, access lists, and lists of all groups.

Groups are hashed onto a fixed number of shards, each of which is an ``EtcdStore`` of its leader (etcd_shard.py).
"""

import asyncio
import json
import uuid
from collections.abc import AsyncIterator, Callable

from agent.coordinator.hang_up import check_caller
from agent.coordinator.store.codec import decode, encode, name_of
from agent.coordinator.store.etcd_client import (
    Etcd,
    Found,
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
    group_key_of,
    quoted,
    read_meta,
    record_of_key,
)
from agent.coordinator.store.etcd_shard import MOST_COMMITS, MOST_STEPS, EtcdStore
from agent.errors import ConfigError, ExitCode, StoreError
from agent.model import AccessList, GroupConfig, GroupKey
from agent.ops.pages import sorted_page

PAGE = 200
"""The most records in one range read: a record of 2 members has some 500 bytes, one of 100 may have a megabyte."""


class EtcdCluster:
    """A store in etcd as a whole. ``open`` it, and close it with ``aclose``."""

    def __init__(self, etcd: Etcd, layout: Layout, meta: Meta) -> None:
        self.etcd = etcd
        self.layout = layout
        self.meta = meta
        self.store_id = meta.store_id
        self.commits = asyncio.Semaphore(MOST_COMMITS)
        self._changing_access = asyncio.Lock()

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
        if meta.copy_id or meta.schema < SCHEMA:
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
        unserved = [] if meta.copy_id else [if_none(f"{Layout(prefix, meta.shards).live}members/")]
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
        return (await self.etcd.range(read(members, end_of(members), count_only=True))).count > 0

    async def access(self, tenant: str, namespace: str) -> AccessList | None:
        """The access-control list of a namespace's groups, or None if none was ever set."""
        found = await self.etcd.get(self.layout.access(tenant, namespace))
        return None if found is None else decode(AccessList, found.value, f"{tenant}/{namespace}")

    async def set_access(self, tenant: str, namespace: str, acl: AccessList | None) -> None:
        """Replace that list; None removes it. The last call wins: no attempt of an earlier call is carried out after it."""
        key = self.layout.access(tenant, namespace)
        where = f"{tenant}/{namespace}"
        change = delete(key) if acl is None else put(key, encode(acl, where))
        changed, meta = self.layout.access_changed, self.layout.meta
        same_store = if_revision(meta, self.meta.revision)
        async with self._changing_access:  # a concurrent change would make this one fail
            check_caller()
            while True:
                unchanged = if_revision(changed, await self.etcd.revision(changed))
                check_caller()
                steps = [change, put(changed, str(uuid.uuid4()))]
                if (await self.etcd.txn([same_store, unchanged], steps)).succeeded:
                    return
                if await self.etcd.revision(meta) != self.meta.revision:
                    raise StoreError(f"the store under {self.layout.prefix} was moved or removed")

    async def is_restored(self) -> bool:
        """Whether the store was declared as restored from a copy, and is not trusted again."""
        return await self.etcd.get(self.layout.restored) is not None

    async def trust(self) -> None:
        """Withdraw the declaration that the store was restored, for every coordinator; keep one that is made meanwhile."""
        restored = self.layout.restored
        if (found := await self.etcd.get(restored)) is not None:
            await self.etcd.txn([if_revision(restored, found.revision)], [delete(restored)])

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
        """All keys with a prefix, at most ``limit`` at a time."""
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
