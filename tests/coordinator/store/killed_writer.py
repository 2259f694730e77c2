"""Started by test_sigkill.py: changes groups until it is killed, and says what was acknowledged.

``killed_writer.py DIRECTORY`` prints, after each await that returned: group, version, epoch.
"""

import asyncio
import os
import sys
from datetime import UTC, datetime
from pathlib import Path

from agent.coordinator.store import Stored
from agent.coordinator.store.sqlite import SqliteStore
from agent.model import GroupConfig, GroupKey, GroupRecord, HistoryEntry, Tenure

GROUPS = 20
SINCE = datetime(2024, 1, 1, tzinfo=UTC)


def record(key: GroupKey, epoch: int) -> GroupRecord:
    return GroupRecord(
        GroupConfig(key.group, 10_000_000), holder=Tenure("a", epoch, SINCE, "chosen"), epoch=epoch
    )


async def write(store: SqliteStore, key: GroupKey, stored: Stored | None) -> None:
    if stored is None:
        version, epoch = await store.create(key, record(key, 0)), 0
    else:
        version, epoch = stored.version, stored.record.epoch
    while True:
        os.write(1, f"{key.group} {version} {epoch}\n".encode())
        epoch += 1
        entry = HistoryEntry(epoch, "a", SINCE, "chosen")
        version = await store.swap(key, version, record(key, epoch), [entry])


async def main() -> None:
    store = SqliteStore.open(Path(sys.argv[1]))
    groups = await store.load()
    keys = [GroupKey("t", "n", str(n)) for n in range(GROUPS)]
    await asyncio.gather(*(write(store, key, groups.get(key)) for key in keys))


asyncio.run(main())
