"""The key by which coordinators of one store vouch for clients to one another."""

import random

import pytest

from agent.coordinator.cluster import read_peer_key
from agent.coordinator.store.etcd import EtcdCluster
from agent.coordinator.store.etcd_client import Etcd, put
from agent.errors import StoreError

from .fake_etcd import FakeEtcd, FakeTransport, Link
from .world import run_virtually


def store_of(etcd: FakeEtcd) -> Etcd:
    return Etcd(FakeTransport(Link(etcd, random.Random(1))), 1.0)


def test_the_first_coordinator_makes_it_and_all_have_the_same() -> None:
    async def check() -> None:
        etcd, other = FakeEtcd(), FakeEtcd()
        keys = []
        for one in (etcd, etcd, other):
            cluster = await EtcdCluster.open(store_of(one), "/f", 8)
            keys.append(await read_peer_key(cluster))
        assert keys[0] == keys[1] != keys[2]
        assert len(keys[0]) == 32

    run_virtually(check())


@pytest.mark.parametrize("value", ["", "00", "x" * 64, "0" * 62, "0" * 66])
def test_something_else_in_its_place_is_named(value: str) -> None:
    async def check() -> None:
        etcd = store_of(FakeEtcd())
        cluster = await EtcdCluster.open(etcd, "/f", 8)
        await etcd.txn([], [put("/f/peer-key", value)])
        with pytest.raises(StoreError, match="/f/peer-key in etcd is not a key"):
            await read_peer_key(cluster)

    run_virtually(check())
