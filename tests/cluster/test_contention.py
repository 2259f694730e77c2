"""Many changes at once in one coordinator: each makes a few requests of etcd, however many wait for it."""

import asyncio
from typing import Any

import pytest

from agent.coordinator.engine import MOST_TICKS, RETRY_S
from agent.coordinator.hang_up import HungUp, while_connected
from agent.coordinator.service import Coordinator
from agent.coordinator.store.etcd import EtcdCluster
from agent.coordinator.store.etcd_client import Done, Etcd, EtcdRefused, EtcdUnknown, put
from agent.coordinator.store.etcd_shard import MOST_COMMITS, SETTLE_S, EtcdStore
from agent.core.group_state import AddSession, ReceiveHeartbeat
from agent.errors import LeadershipLost, NotLeading, Unavailable
from agent.model import (
    TICKS_PER_SECOND,
    AccessList,
    GroupConfig,
    GroupKey,
    GroupRecord,
    Role,
    SessionConfig,
)

from .fake_etcd import DELAY_S, FakeEtcd, FakeTransport, Link
from .node import TTL_S, Kinds
from .world import World, run_virtually

CALLERS = 40
WRITE_S = 0.01


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


class Busy(Counting):
    """An etcd that writes one transaction after another; whoever waits for too long gets no answer."""

    def __init__(self, link: Link) -> None:
        super().__init__(link)
        self.disk = asyncio.Lock()

    async def post(self, path: str, body: Any, timeout_s: float) -> Any:
        if path == "/v3/kv/txn":
            try:
                async with asyncio.timeout(timeout_s), self.disk:
                    await asyncio.sleep(WRITE_S)
            except TimeoutError:
                raise EtcdUnknown("no answer in time") from None
        return await super().post(path, body, timeout_s)


async def a_cluster(kind: type[Counting] = Counting) -> tuple[Counting, EtcdCluster, EtcdStore]:
    transport = kind(Link(FakeEtcd()))
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


def test_changes_of_many_groups_are_sent_once_though_etcd_is_behind() -> None:
    """Their time runs from when etcd can take them. Else each would be sent again and again, and few be done."""

    async def check() -> None:
        transport, _, store = await a_cluster(Busy)
        groups = int(6 / WRITE_S)
        await asyncio.gather(*(store.create(key_of(n), record_of(n)) for n in range(groups)))
        assert transport.sent == 2 * groups

    run_virtually(check())


def test_changes_that_wait_end_with_the_leadership() -> None:
    """Else a stop would wait until etcd had hung for each of them in turn."""

    async def check() -> None:
        transport, _, store = await a_cluster()
        changes = [
            asyncio.create_task(store.swap(key_of(n), 1, record_of(n)))
            for n in range(3 * MOST_COMMITS)
        ]
        await asyncio.sleep(DELAY_S)
        store.is_over = lambda: True
        ended = await asyncio.gather(*changes, return_exceptions=True)
        assert sum(isinstance(one, LeadershipLost) for one in ended) == 2 * MOST_COMMITS
        assert transport.sent == MOST_COMMITS

    run_virtually(check())


def test_a_stop_does_not_wait_for_each_change_while_etcd_hangs() -> None:
    async def check() -> None:
        world = World(1, coordinators=1, agents=0, shards=1)
        (node,) = world.nodes.values()
        node.start()
        await world.until(lambda: node.leadership and node.leadership.led, 5.0, "a leader")
        coordinator, leadership = node.coordinator, node.leadership
        assert coordinator is not None
        assert leadership is not None
        keys = [key_of(number) for number in range(4 * MOST_COMMITS)]
        for key in keys:
            await coordinator.create_group(key, GroupConfig(key.group, TICKS_PER_SECOND))
        node.link.passes = lambda _: False
        changes = [coordinator.apply(key, AddSession(SessionConfig("s"))) for key in keys]
        began = asyncio.get_running_loop().time()
        ended = await asyncio.gather(*changes, return_exceptions=True)
        assert asyncio.get_running_loop().time() - began < TTL_S + SETTLE_S + 1.0
        assert sum(isinstance(one, NotLeading) for one in ended) >= 3 * MOST_COMMITS
        await world.end()

    run_virtually(check())


class Hanging(Etcd):
    """An etcd that renews leases and answers reads, and is slow at transactions, or takes none, for a while."""

    hangs = refuses = False
    refused = 0
    takes_s = 0.0

    async def txn(self, *what: Any) -> Done:
        await asyncio.sleep(Hanging.takes_s)
        if Hanging.hangs:
            await asyncio.Event().wait()
        if Hanging.refuses:
            Hanging.refused += 1
            await asyncio.sleep(DELAY_S)
            raise EtcdRefused("database space exceeded", 8)
        return await super().txn(*what)


async def a_leader() -> tuple[World, Coordinator, list[GroupKey]]:
    """A coordinator with many groups, in each of which "m" is primary."""
    Hanging.hangs = Hanging.refuses = False
    Hanging.takes_s = 0.0
    world = World(1, kinds=Kinds(etcd=Hanging), coordinators=1, agents=0, shards=1)
    (node,) = world.nodes.values()
    node.start()
    await world.until(lambda: node.leadership and node.leadership.led, 5.0, "a leader")
    coordinator = node.coordinator
    assert coordinator is not None
    keys = [key_of(number) for number in range(2 * MOST_COMMITS + 1)]
    for key in keys:
        await coordinator.create_group(key, GroupConfig(key.group, TICKS_PER_SECOND))
        await coordinator.apply(key, AddSession(SessionConfig("m")))
    for key in 2 * keys:  # chosen, then confirmed
        await coordinator.beat(key, ReceiveHeartbeat("m", 100.0))
    return world, coordinator, keys


async def renew(coordinator: Coordinator, key: GroupKey, seconds: float) -> None:
    """Be a healthy primary for a while."""
    until = asyncio.get_running_loop().time() + seconds
    while asyncio.get_running_loop().time() < until:
        await asyncio.sleep(0.3)
        answer = await coordinator.beat(key, ReceiveHeartbeat("m", 100.0))
        assert answer.role is Role.PRIMARY


def test_a_caller_does_not_wait_behind_the_leases_that_end_while_etcd_hangs() -> None:
    async def check() -> None:
        world, coordinator, keys = await a_leader()
        clock = asyncio.get_running_loop().time
        Hanging.hangs = True
        await renew(coordinator, keys[-1], 2.0)
        began = clock()
        with pytest.raises(Unavailable):
            await coordinator.apply(keys[-1], AddSession(SessionConfig("n")))
        assert clock() - began < SETTLE_S + 0.5
        Hanging.hangs = False
        await coordinator.apply(keys[-1], AddSession(SessionConfig("n")))
        assert clock() - began < 2 * SETTLE_S
        await world.end()

    run_virtually(check())


def test_leases_that_end_do_not_flood_an_etcd_that_refuses_at_once() -> None:
    async def check() -> None:
        world, coordinator, keys = await a_leader()
        Hanging.refuses, Hanging.refused = True, 0
        await renew(coordinator, keys[-1], 6.0)
        assert MOST_TICKS < Hanging.refused < 6 * MOST_TICKS / RETRY_S
        Hanging.refuses = False
        await renew(coordinator, keys[-1], 3.0)
        assert [key for key in keys if coordinator.status(key).primary] == keys[-1:]
        await world.end()

    run_virtually(check())


def test_groups_that_all_fail_over_at_once_have_a_primary_soon_though_etcd_is_slow(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Time that a change waits for etcd must not count: candidates would be passed over again and again."""
    monkeypatch.setattr("agent.coordinator.store.etcd.MOST_COMMITS", 2)

    async def check() -> None:
        world, coordinator, keys = await a_leader()
        for key in keys:
            await coordinator.apply(key, AddSession(SessionConfig("n")))
        Hanging.takes_s = 0.08
        sent: list[asyncio.Task[Any]] = []
        for _ in range(40):
            beats = (coordinator.beat(key, ReceiveHeartbeat("n", 100.0)) for key in keys)
            sent += map(asyncio.create_task, beats)
            await asyncio.sleep(0.3)
        primaries = [coordinator.status(key).primary for key in keys]
        await asyncio.gather(*sent, return_exceptions=True)
        await world.end()
        assert primaries == ["n"] * len(keys)

    run_virtually(check())
