"""Callers of one coordinator whose changes compare the same key of etcd: each makes a few requests, however many wait."""

import asyncio
from typing import Any

import pytest

from agent.coordinator.hang_up import HungUp, while_connected
from agent.coordinator.store.etcd import EtcdCluster
from agent.coordinator.store.etcd_client import Etcd, put
from agent.coordinator.store.etcd_shard import EtcdStore
from agent.model import TICKS_PER_SECOND, AccessList, GroupConfig, GroupKey, GroupRecord

from .fake_etcd import DELAY_S, FakeEtcd, FakeTransport, Link
from .world import run_virtually

CALLERS = 40


class Counting(FakeTransport):
    """Counts what is sent."""

    sent = 0

    async def post(self, path: str, body: Any, timeout_s: float) -> Any:
        self.sent += 1
        return await super().post(path, body, timeout_s)


class Caller:
    """A caller who may hang up."""

    def __init__(self) -> None:
        self.gone = False

    async def ask(self, change: Any) -> None:
        await while_connected(change, asyncio.Event().wait, lambda: self.gone)


async def a_cluster() -> tuple[Counting, EtcdCluster, EtcdStore]:
    transport = Counting(Link(FakeEtcd()))
    cluster = await EtcdCluster.open(Etcd(transport, 3.0), "/f", 1)
    leading = await cluster.etcd.txn([], [put(cluster.layout.leader(0), "the test")])
    transport.sent = 0
    return transport, cluster, cluster.shard(0, leading.revision)


def key_of(number: int) -> GroupKey:
    return GroupKey("default", "default", f"g{number}")


def record_of(number: int) -> GroupRecord:
    return GroupRecord(GroupConfig(f"g{number}", TICKS_PER_SECOND))


def test_changes_of_access_lists_do_not_repeat_one_another() -> None:
    async def check() -> None:
        transport, cluster, _ = await a_cluster()
        changes = (cluster.set_access("t", f"n{n}", AccessList()) for n in range(CALLERS))
        await asyncio.gather(*changes)
        assert transport.sent <= 2 * CALLERS
        for number in range(CALLERS):
            assert await cluster.access("t", f"n{number}") == AccessList()

    run_virtually(check())


@pytest.mark.parametrize("pause_s", [0.0, DELAY_S, 2 * DELAY_S])
def test_deletions_do_not_repeat_creations(pause_s: float) -> None:
    """However they fall between the two requests of a creation."""

    async def check() -> None:
        transport, _, store = await a_cluster()
        old, new = range(CALLERS), range(CALLERS, 2 * CALLERS)
        versions = [await store.create(key_of(number), record_of(number)) for number in old]
        transport.sent = 0

        async def delete(number: int) -> None:
            await asyncio.sleep(pause_s * number)
            await store.delete(key_of(number), versions[number], 0)

        creations = (store.create(key_of(number), record_of(number)) for number in new)
        await asyncio.gather(*map(delete, old), *creations)
        assert transport.sent <= (1 + 2 * 2) * CALLERS
        assert set(await store.load()) == set(map(key_of, new))

    run_virtually(check())


@pytest.mark.parametrize("what", ["access list", "deletion"])
def test_a_caller_who_hangs_up_while_others_are_served_changes_nothing(what: str) -> None:
    """Nor does etcd hear of it, so that those behind it do not wait for it."""

    async def check() -> None:
        transport, cluster, store = await a_cluster()
        versions = [await store.create(key_of(number), record_of(number)) for number in range(2)]
        transport.sent = 0

        def change(number: int) -> Any:
            if what == "access list":
                return cluster.set_access("t", f"n{number}", AccessList())
            return store.delete(key_of(number), versions[number], 0)

        first, late = Caller(), Caller()
        asked = [asyncio.create_task(c.ask(change(n))) for n, c in enumerate((first, late))]
        await asyncio.sleep(DELAY_S)
        late.gone = True
        await asked[0]
        with pytest.raises(HungUp):
            await asked[1]
        assert transport.sent == (2 if what == "access list" else 1)
        if what == "access list":
            assert await cluster.access("t", "n1") is None
        else:
            assert set(await store.load()) == {key_of(1)}

    run_virtually(check())


def test_a_caller_who_hangs_up_before_the_write_changes_no_access_list() -> None:
    async def check() -> None:
        transport, cluster, _ = await a_cluster()
        caller = Caller()
        asked = asyncio.create_task(caller.ask(cluster.set_access("t", "n", AccessList())))
        await asyncio.sleep(DELAY_S)
        caller.gone = True
        with pytest.raises(HungUp):
            await asked
        assert transport.sent == 1
        assert await cluster.access("t", "n") is None

    run_virtually(check())
