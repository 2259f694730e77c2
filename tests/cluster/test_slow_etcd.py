"""Leadership while etcd answers slowly, as with a disk that takes long for each write (R19)."""

import asyncio
from base64 import b64decode

import pytest

from agent.coordinator.leadership import LEAVE_SHARE, RENEWALS, RETRY_S, WATCH_S
from agent.coordinator.store.etcd import EtcdCluster
from agent.coordinator.store.etcd_client import (
    Etcd,
    EtcdUnknown,
    Json,
    delete,
    put,
)
from agent.core.timing import DRIFT
from agent.errors import StoreError
from agent.model import TICKS_PER_SECOND, GroupConfig, GroupKey, GroupRecord

from .fake_etcd import FakeEtcd, FakeTransport, Link
from .world import TTL_S, Cut, Node, World, run_virtually


async def a_leader(world: World) -> Node:
    first = next(iter(world.nodes.values()))
    first.start()
    await world.until(lambda: first.leadership and first.leadership.led, 10.0, "a leader")
    return first


@pytest.mark.parametrize("answer_s", [0.2, 0.6, 0.78])
def test_r19_leadership_is_kept_if_renewing_takes_four_fifths_of_the_time_to_live(
    answer_s: float,
) -> None:
    """A renewal that is answered late counts from its own sending, and not from that of a newer one."""

    async def check() -> None:
        world = World(1, coordinators=1, agents=0)
        node = await a_leader(world)
        assert node.leadership is not None
        node.link.delay_s = answer_s / 2
        await asyncio.sleep(TTL_S)
        for _ in range(200):
            await asyncio.sleep(0.1)
            assert node.leadership.led, world.text()
            assert node.leadership.remaining_s <= TTL_S * (1 - DRIFT) - answer_s
        assert node.leadership.begun == 1
        await world.end()

    run_virtually(check())


def test_r19_renewals_are_not_repeated_at_a_slow_etcd() -> None:
    """They are sent beside each other already: each one twice would load an etcd that is slow with twice as many."""
    sent: list[str] = []

    async def check() -> None:
        world = World(1, coordinators=1, agents=0)
        node = await a_leader(world)
        assert node.leadership is not None
        node.link.delay_s = 0.3
        await asyncio.sleep(TTL_S)
        post = FakeTransport.post

        async def count(transport: FakeTransport, path: str, body: Json, timeout_s: float) -> Json:
            sent.append(path)
            return await post(transport, path, body, timeout_s)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(FakeTransport, "post", count)
            await asyncio.sleep(20 * TTL_S)
        assert node.leadership.begun == 1
        await world.end()

    run_virtually(check())
    assert set(sent) == {"/v3/lease/keepalive", "/v3/kv/range"}
    for path in set(sent):
        assert 100 < sent.count(path) <= 20 * RENEWALS + 1


def test_r19_leadership_begins_while_etcd_is_slow() -> None:
    async def check() -> None:
        world = World(1, coordinators=1, agents=0)
        for node in world.nodes.values():
            node.link.delay_s = 0.2
        node = await a_leader(world)
        assert node.leadership is not None
        assert node.leadership.begun == 1
        await world.end()

    run_virtually(check())


def test_r19_a_session_begins_with_any_renewal_that_is_answered() -> None:
    """The member of etcd that is asked may hang between the entry and the first renewal after it."""

    async def check() -> None:
        world = World(1, coordinators=1, agents=0)
        (node,) = world.nodes.values()
        post, entered, lost = FakeTransport.post, False, 0

        async def lose(transport: FakeTransport, path: str, body: Json, timeout_s: float) -> Json:
            nonlocal entered, lost
            if path == "/v3/lease/keepalive" and entered and not lost:
                lost += 1
                await asyncio.sleep(timeout_s)
                raise EtcdUnknown("no answer in time")
            answer = await post(transport, path, body, timeout_s)
            if path == "/v3/kv/txn":
                key = body["success"][0]["request_put"]["key"]
                entered |= b64decode(key).startswith(b"/f/live/members/")
            return answer

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(FakeTransport, "post", lose)
            node.start()
            took_s = await world.until(
                lambda: node.leadership and node.leadership.led, 10.0, "a leader"
            )
        assert lost == 1
        assert took_s < TTL_S / 2
        await world.end()

    run_virtually(check())


@pytest.mark.parametrize("path", ["/v3/lease/keepalive", "/v3/kv/range", "/v3/kv/txn"])
def test_r19_a_request_that_is_cancelled_by_itself_ends_no_task_of_leadership_unseen(
    path: str,
) -> None:
    """It looks like a cancellation by the session, and a TaskGroup does not miss a task that ends so."""

    async def check() -> None:
        world = World(1, coordinators=2, agents=0)
        node = await a_leader(world)
        assert node.leadership is not None
        post, cancelled = FakeTransport.post, 0

        async def cancel(
            transport: FakeTransport, asked: str, body: Json, timeout_s: float
        ) -> Json:
            nonlocal cancelled
            if asked == path and not cancelled:
                cancelled += 1
                raise asyncio.CancelledError
            return await post(transport, asked, body, timeout_s)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(FakeTransport, "post", cancel)
            if path == "/v3/kv/txn":  # something to claim
                world.etcd.apply("/v3/kv/txn", {"success": [delete("/f/live/leaders/0")]})
            await world.until(lambda: cancelled, 5.0, "a cancelled request")
            await asyncio.sleep(4 * TTL_S)
        assert node.leadership.fault is None
        assert node.leadership.led
        await world.end()

    run_virtually(check())


def test_r19_leadership_ends_in_time_if_renewing_takes_longer() -> None:
    async def check() -> None:
        world = World(1, coordinators=1, agents=0)
        node = await a_leader(world)
        assert node.leadership is not None
        began = asyncio.get_running_loop().time()
        node.link.delay_s = 0.5
        took_s = await world.until(lambda: not node.leadership.led, 2 * TTL_S, "its end")  # type: ignore[union-attr]
        assert took_s <= TTL_S * (1 - DRIFT) + 0.01
        assert node.leadership.remaining_s == 0
        node.link.heal()
        await world.until(lambda: node.leadership.led, 5.0, "another one")  # type: ignore[union-attr]
        assert asyncio.get_running_loop().time() > began + TTL_S
        await world.end()

    run_virtually(check())


def test_r19_a_new_session_does_not_wait_for_the_end_of_the_last_one() -> None:
    """What was sent before the way to etcd was back may be lost, and its answer never comes."""

    async def check() -> None:
        world = World(1, coordinators=1, agents=0)
        node = await a_leader(world)
        world.cuts.append(Cut(frozenset({node.name}), frozenset({"etcd"})))
        await world.until(lambda: not node.leadership.member, 3 * TTL_S, "the session to end")  # type: ignore[union-attr]
        await asyncio.sleep(0.1 * TTL_S)
        world.cuts.clear()
        took_s = await world.until(lambda: node.leadership.member, 5.0, "another session")  # type: ignore[union-attr]
        assert took_s < TTL_S * LEAVE_SHARE + RETRY_S
        await world.end()

    run_virtually(check())


def test_r19_a_watch_whose_connection_was_lost_silently_is_begun_again() -> None:
    """Else changes would be seen by renewals only from then on, a sixth of the time to live later."""

    async def check() -> None:
        world = World(1, coordinators=2, agents=0)
        await a_leader(world)
        first, second = world.nodes.values()
        second.start()
        await world.until(lambda: second.leadership and second.leadership.member, 5.0, "a standby")
        await asyncio.sleep(TTL_S)
        second.link.silent_watches = second.link.watches
        await asyncio.sleep(WATCH_S + TTL_S)
        assert second.link.watches > second.link.silent_watches
        await first.stop()
        took_s = await world.until(lambda: second.leadership.led, 5.0, "the second to lead")  # type: ignore[union-attr]
        assert took_s < TTL_S / RENEWALS / 2
        await world.end()

    run_virtually(check())


def test_a_write_is_sent_again_whatever_the_time_to_live() -> None:
    """A member of etcd that hangs costs a third of it, and not the change."""

    class HangsOnce(FakeTransport):
        hung = 0

        async def post(self, path: str, body: Json, timeout_s: float) -> Json:
            if path == "/v3/kv/txn" and not HangsOnce.hung:
                HangsOnce.hung += 1
                await asyncio.sleep(timeout_s)
                raise EtcdUnknown("no answer in time")
            return await super().post(path, body, timeout_s)

    async def check(ttl_s: float) -> None:
        link = Link(FakeEtcd())
        cluster = await EtcdCluster.open(Etcd(FakeTransport(link), ttl_s), "/f", 1)
        leader = cluster.layout.leader(0)
        done = await cluster.etcd.txn([], [put(leader, "the test")])
        cluster.etcd = Etcd(HangsOnce(link), ttl_s)
        clock = asyncio.get_running_loop().time
        began, HangsOnce.hung = clock(), 0
        key = GroupKey("default", "default", "g")
        await cluster.shard(0, done.revision).create(
            key, GroupRecord(GroupConfig("g", TICKS_PER_SECOND))
        )
        assert clock() - began < ttl_s / 3 + 0.1
        assert HangsOnce.hung == 1

    for ttl_s in (1.0, 3.0, 12.0, 60.0):
        run_virtually(check(ttl_s))


@pytest.mark.parametrize(
    ("junk", "value"),
    [
        ("/f/live/members/junk", "junk"),
        ("/f/live/members/0", "[]"),
        ("/f/live/leaders/0", "{}"),
        ("/f/live/leaders/junk", '{"Member": "1", "Url": "http://a"}'),
    ],
)
def test_r19_junk_in_the_store_is_named_once_or_now_and_then(
    caplog: pytest.LogCaptureFixture, junk: str, value: str
) -> None:
    """A shard that cannot be loaded is loaded once it is mended; a session that cannot begin fills no log."""

    async def check() -> None:
        world = World(1, coordinators=1, agents=0)
        (node,) = world.nodes.values()
        etcd = Etcd(FakeTransport(Link(world.etcd)), TTL_S)
        progress = f"/f/shards/0/progress/{'/'.join(world.key)}"
        await EtcdCluster.open(etcd, "/f", 1)
        await etcd.txn([], [put(progress, "junk"), put(junk, value)])
        node.start()
        await asyncio.sleep(60.0)
        assert caplog.messages.count("session with etcd ended, retrying") == 1
        assert node.leadership is not None
        assert node.leadership.fault == (
            f"{junk} in etcd is not what a coordinator wrote: delete it"
        )
        assert not any(record.exc_info for record in caplog.records)
        await etcd.txn([], [delete(junk)])
        await asyncio.sleep(20.0)
        assert 2 <= caplog.messages.count("shard cannot be loaded") <= 6
        await etcd.txn([], [delete(progress)])
        await world.until(lambda: node.leadership.led, 10.0, "a leader")  # type: ignore[union-attr]
        await world.end()

    run_virtually(check())


def test_junk_as_the_epoch_of_a_deleted_group_is_named() -> None:
    async def check() -> None:
        cluster = await EtcdCluster.open(Etcd(FakeTransport(Link(FakeEtcd())), TTL_S), "/f", 1)
        key = GroupKey("default", "default", "g")
        place = cluster.layout.retired(key)
        await cluster.etcd.txn([], [put(place, "junk")])
        with pytest.raises(StoreError, match=f"{place} in etcd must be the last epoch"):
            await cluster.shard(0, 1).retired_epoch(key)

    run_virtually(check())
