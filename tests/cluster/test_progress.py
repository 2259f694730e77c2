"""Data-processed times in etcd: written by shard, not by heartbeat, and known to the next leader."""

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from agent.coordinator import engine
from agent.core.group_state import AddSession, ReceiveHeartbeat
from agent.model import TICKS_PER_SECOND, GroupConfig, GroupKey, SessionConfig

from .fake_etcd import FakeEtcd
from .world import World, run_virtually

GROUPS = 30
BEATS = 50
SINCE = datetime(2026, 1, 1, tzinfo=UTC)


def test_etcd_sees_writes_of_progress_by_shard_and_not_by_heartbeat() -> None:
    writes: list[float] = []

    class Counting(FakeEtcd):
        def apply(self, path: str, body: Any) -> Any:
            if path == "/v3/kv/txn" and any("request_txn" in one for one in body["success"]):
                writes.append(asyncio.get_running_loop().time())
            return super().apply(path, body)

    async def main() -> None:
        world = World(1, coordinators=2, agents=0, shards=1)
        world.etcd = Counting()
        for node in world.nodes.values():
            node.link.etcd = world.etcd
        first, second = world.nodes.values()
        first.start()
        await world.until(lambda: first.leadership and first.leadership.led, 5.0, "a leader")
        assert first.coordinator is not None
        keys = [GroupKey("default", "default", f"g{number}") for number in range(GROUPS)]
        for key in keys:
            await first.coordinator.create_group(key, GroupConfig(key.group, 10 * TICKS_PER_SECOND))
            await first.coordinator.apply(key, AddSession(SessionConfig("s")))
        for beat in range(BEATS):
            for key in keys:
                processed = SINCE + timedelta(seconds=beat)
                await first.coordinator.beat(
                    key, ReceiveHeartbeat("s", 100.0, processed, "i", None)
                )
            await asyncio.sleep(0.6)
        took_s = BEATS * 0.6
        assert len(writes) <= took_s / 0.8 + 1, "not more than one each 0.8 s"
        assert len(writes) >= took_s / 2
        second.start()
        await asyncio.sleep(1.0)
        await first.stop()
        await world.until(lambda: second.leadership and second.leadership.led, 5.0, "the second")
        assert second.coordinator is not None
        for key in keys:
            status = second.coordinator.status(key)
            assert status.primary == "s"
            assert status.last_data == SINCE + timedelta(seconds=BEATS - 1)
        await world.end()

    run_virtually(main())


def test_progress_of_more_groups_than_one_write_takes_is_saved_within_a_second(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(engine, "PROGRESS_BATCH", 10)

    async def main() -> None:
        world = World(1, coordinators=1, agents=0, shards=1)
        (node,) = world.nodes.values()
        node.start()
        await world.until(lambda: node.leadership and node.leadership.led, 5.0, "a leader")
        coordinator = node.coordinator
        assert coordinator is not None
        keys = [GroupKey("default", "default", f"g{n}") for n in range(GROUPS)]
        for key in keys:
            await coordinator.create_group(key, GroupConfig(key.group, 10 * TICKS_PER_SECOND))
            await coordinator.apply(key, AddSession(SessionConfig("s")))
        for beat in range(3):
            for key in keys:
                processed = SINCE + timedelta(seconds=beat)
                await coordinator.beat(key, ReceiveHeartbeat("s", 100.0, processed, "i", None))
            await asyncio.sleep(1.0)
        stored = [entry.value for name, entry in world.etcd.keys.items() if "/progress/" in name]
        assert sum("00:00:02" in one for one in stored) == len(keys)
        await world.end()

    run_virtually(main())
