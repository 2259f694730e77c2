"""The keys by which coordinators of one store vouch for clients to one another."""

import asyncio
import random

import pytest

from agent.coordinator.cluster import PEER_KEY_INTERVAL_S, follow_peer_keys, read_peer_keys
from agent.coordinator.forwarded_clients import ForwardedClients
from agent.coordinator.store.etcd import EtcdCluster
from agent.coordinator.store.etcd_client import Etcd, delete, put
from agent.errors import StoreError

from .fake_etcd import FakeEtcd, FakeTransport, Link
from .world import run_virtually

OLD, NEW = "0a" * 32, "0b" * 32


def store_of(etcd: FakeEtcd, link: Link | None = None) -> Etcd:
    return Etcd(FakeTransport(link or Link(etcd, random.Random(1))), 1.0)


def test_the_first_coordinator_makes_it_and_all_have_the_same() -> None:
    async def check() -> None:
        etcd, other = FakeEtcd(), FakeEtcd()
        keys: list[bytes] = []
        for one in (etcd, etcd, other):
            cluster = await EtcdCluster.open(store_of(one), "/f", 8)
            keys += await read_peer_keys(cluster)
        assert keys[0] == keys[1] != keys[2]
        assert len(keys[0]) == 32

    run_virtually(check())


@pytest.mark.parametrize(
    "value", ["", "\n", "00", "x" * 64, "0" * 62, "0" * 66, f"{OLD}\n00", "\n".join([OLD] * 3)]
)
def test_something_else_in_its_place_is_named(value: str) -> None:
    async def check() -> None:
        etcd = store_of(FakeEtcd())
        cluster = await EtcdCluster.open(etcd, "/f", 8)
        await etcd.txn([], [put("/f/peer-key", value)])
        with pytest.raises(
            StoreError, match="/f/peer-key in etcd must have one key that a coordinator made"
        ):
            await read_peer_keys(cluster)

    run_virtually(check())


def test_keys_are_replaced_while_coordinators_run(caplog: pytest.LogCaptureFixture) -> None:
    """A wrong value and an outage leave the former keys in force; a deleted key is made again."""

    async def check() -> None:
        etcd = FakeEtcd()
        link = Link(etcd, random.Random(1))
        client = store_of(etcd)
        cluster = await EtcdCluster.open(store_of(etcd, link), "/f", 8)
        clients = ForwardedClients(await read_peer_keys(cluster))
        following = asyncio.create_task(follow_peer_keys(cluster, clients))

        async def after(value: str) -> tuple[bytes, ...]:
            await client.txn([], [put("/f/peer-key", value)])
            await asyncio.sleep(2 * PEER_KEY_INTERVAL_S)
            return clients.keys

        both = (bytes.fromhex(OLD), bytes.fromhex(NEW))
        assert await after(f"{OLD}\n{NEW}\n") == both
        assert await after("typing error") == both
        assert len([one for one in caplog.messages if one == "peer keys not changed"]) == 1
        link.cut = True
        assert await after(f"{NEW}\n{OLD}") == both
        link.cut = False
        await asyncio.sleep(2 * PEER_KEY_INTERVAL_S)
        assert clients.keys == both[::-1]
        assert await after(NEW) == both[1:]
        await client.txn([], [delete("/f/peer-key")])
        await asyncio.sleep(2 * PEER_KEY_INTERVAL_S)
        assert clients.keys == await read_peer_keys(cluster) != both[1:]
        following.cancel()

    run_virtually(check())
