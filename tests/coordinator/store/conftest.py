"""What the tests of the stores share: records to keep."""

import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime

import pytest

from agent.coordinator.store.etcd import EtcdCluster
from agent.coordinator.store.etcd_client import Etcd, Transport, put
from agent.coordinator.store.etcd_gateway import Gateway
from agent.coordinator.store.etcd_shard import EtcdStore
from agent.model import (
    AccessEntry,
    AccessList,
    GroupConfig,
    GroupKey,
    GroupRecord,
    HoldOff,
    Member,
    MemberSet,
    RoleOverride,
    SessionConfig,
    SessionRecord,
    Tenure,
    Trustee,
)
from tests.etcd import EtcdServer, an_etcd

MakeRecord = Callable[[int], GroupRecord]

SINCE = datetime(2024, 1, 1, tzinfo=UTC)
NOW = datetime(2024, 5, 6, 7, 8, 9, 123456, tzinfo=UTC)
ADDITIONAL = '{"Site":["a",1,null,0.5]}'


@pytest.fixture
def key() -> GroupKey:
    return GroupKey("default", "default", "pumps")


@pytest.fixture
def make_record() -> Callable[[int], GroupRecord]:
    """Records that use every field, and differ by their epoch."""

    def make(epoch: int) -> GroupRecord:
        return GroupRecord(
            config=GroupConfig("pumps", 20_000_000, "Pumps", "all", ADDITIONAL),
            sessions={
                "a": SessionRecord(
                    SessionConfig("a", "A", '{"x":"é\\u0000"}'),
                    RoleOverride.PRIMARY,
                    NOW,
                    3,
                    HoldOff(NOW, 2.5),
                    epoch,
                    NOW,
                    "user:ann",
                    "http://a:9",
                ),
                "b": SessionRecord(SessionConfig("b")),
            },
            holder=Tenure("a", epoch, NOW, "sole member", "i1", revoked=True),
            pending="b",
            epoch=epoch,
            revision=2 * epoch,
            previous="b",
            last_data=NOW,
            acl=AccessList((AccessEntry(Trustee(1, "u", "t"), denied=True, rights=31),)),
            quiet=True,
            ended=Tenure("b", epoch - 1, NOW, "chosen", "i2"),
            ended_at=NOW,
            cleared=epoch - 1,
            used=MemberSet(3, (Member("a", "http://a:9"),)),
            offered=MemberSet(4, off="b has none"),
            set_revision=4,
        )

    return make


@pytest.fixture(scope="session")
def etcd_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdServer]:
    """One etcd for all tests; each has keys of its own."""
    with an_etcd(tmp_path_factory.mktemp("etcd")) as server:
        yield server


@asynccontextmanager
async def new_cluster(
    server: EtcdServer, transport: Transport | None = None, *, timeout_s: float = 5.0
) -> AsyncIterator[EtcdCluster]:
    """A new store in etcd, of one shard."""
    etcd = Etcd(transport or Gateway(server.urls), timeout_s)
    cluster = await EtcdCluster.open(etcd, f"/test/{uuid.uuid4()}", 1)
    yield cluster
    await cluster.aclose()


@asynccontextmanager
async def led_shard(
    server: EtcdServer, transport: Transport | None = None
) -> AsyncIterator[EtcdStore]:
    """The only shard of a new store in etcd, led by the test."""
    async with new_cluster(server, transport) as cluster:
        store = await lead(cluster)
        yield store
        await store.close()


async def lead(cluster: EtcdCluster) -> EtcdStore:
    """Take the leadership of shard 0, from whoever has it."""
    done = await cluster.etcd.txn([], [put(cluster.layout.leader(0), "the test")])
    return cluster.shard(0, done.revision)
