"""The shard in etcd beyond what every store promises: leadership, unknown outcomes, one identity."""

import asyncio
import json
import ssl
import subprocess
import uuid
from collections.abc import AsyncIterator, Callable
from datetime import timedelta
from pathlib import Path

import pytest

from agent.coordinator.hang_up import HungUp, while_connected
from agent.coordinator.store import MOST_ENTRIES, Stored
from agent.coordinator.store.codec import HISTORY_BOUND, encode
from agent.coordinator.store.etcd import EtcdCluster
from agent.coordinator.store.etcd_client import (
    Etcd,
    EtcdError,
    EtcdRefused,
    EtcdUnknown,
    EtcdUnreachable,
    Json,
    delete,
    end_of,
    put,
    read,
)
from agent.coordinator.store.etcd_gateway import Gateway, Login
from agent.coordinator.store.etcd_layout import Layout, read_meta, record_value
from agent.coordinator.store.etcd_shard import EtcdStore
from agent.errors import (
    CasMismatch,
    ConfigError,
    ExitCode,
    LeadershipLost,
    OutcomeUnknown,
    StoreError,
)
from agent.model import (
    AccessEntry,
    AccessList,
    GroupKey,
    HistoryEntry,
    Progress,
    Trustee,
)
from tests.etcd import EtcdServer, an_etcd
from tests.mosquitto import Authority

from .conftest import SINCE, MakeRecord, lead, led_shard, new_cluster


class Lossy:
    """The gateway, whose answers to transactions can be lost, and whose requests can come late."""

    def __init__(self, inner: Gateway) -> None:
        self._inner = inner
        self.lost = 0
        self.late = 0
        self.refused = 0
        self.full = 0
        self.slow_s = 0.0
        self.held: list[Json] = []
        self.sent = 0
        self.holds: Callable[[Json], bool] = lambda _: True

    async def post(self, path: str, body: Json, timeout_s: float) -> Json:
        if path != "/v3/kv/txn":
            return await self._inner.post(path, body, timeout_s)
        self.sent += 1
        if self.refused:
            self.refused -= 1
            raise EtcdUnreachable("no connection")
        if self.full and self.sent > 1:
            self.full -= 1
            raise EtcdRefused("etcd refuses: database space exceeded", 8)
        if self.late and self.holds(body):
            self.late -= 1
            self.held.append(body)
            raise EtcdUnknown("no answer yet")
        answer = await self._inner.post(path, body, timeout_s)
        await asyncio.sleep(self.slow_s)
        if self.lost:
            self.lost -= 1
            raise EtcdUnknown("the answer was lost")
        return answer

    async def arrive_late(self) -> list[bool]:
        """Carry out what was held back; which of them succeeded."""
        answers = [await self._inner.post("/v3/kv/txn", body, 5.0) for body in self.held]
        self.held.clear()
        return [answer.get("succeeded", False) for answer in answers]

    def stream(self, path: str, body: Json) -> AsyncIterator[Json]:
        return self._inner.stream(path, body)

    def sibling(self) -> "Lossy":
        return self

    async def aclose(self) -> None:
        await self._inner.aclose()


@pytest.fixture
async def lossy(etcd_server: EtcdServer) -> AsyncIterator[tuple[Lossy, EtcdStore]]:
    transport = Lossy(Gateway(etcd_server.urls))
    async with led_shard(etcd_server, transport) as store:
        transport.sent = 0
        yield transport, store


async def test_r19_a_deposed_leader_changes_nothing(
    etcd_server: EtcdServer, key: GroupKey, make_record: MakeRecord
) -> None:
    other = key._replace(group="another")
    async with new_cluster(etcd_server) as cluster:
        old = await lead(cluster)
        version = await old.create(key, make_record(1))
        new = await lead(cluster)
        saved = Progress(1, SINCE)
        for change in (
            old.swap(key, version, make_record(2), [HistoryEntry(2, "s", SINCE, "chosen")]),
            old.create(other, make_record(1)),
            old.delete(key, version, 1),
            old.save_progress({key: saved}),
            old.settle(key, version),
        ):
            with pytest.raises(LeadershipLost):
                await change
        assert await new.load() == {key: Stored(version, make_record(1))}
        assert await new.history(key) == (0, [])
        await new.swap(key, version, make_record(2))


async def test_a_write_whose_answer_is_lost_succeeds_once(
    lossy: tuple[Lossy, EtcdStore], key: GroupKey, make_record: MakeRecord
) -> None:
    transport, store = lossy
    transport.lost = 1
    version = await store.create(key, make_record(1))
    transport.lost = 2
    version = await store.swap(key, version, make_record(2))
    assert await store.load() == {key: Stored(version, make_record(2))}
    transport.lost = 1
    await store.delete(key, version, 7)
    assert await store.load() == {}
    assert await store.retired_epoch(key) == 7


async def test_a_write_that_comes_late_is_sent_again_and_happens_once(
    lossy: tuple[Lossy, EtcdStore], key: GroupKey, make_record: MakeRecord
) -> None:
    transport, store = lossy
    version = await store.create(key, make_record(1))
    transport.late = 1
    newer = await store.swap(key, version, make_record(2))
    assert await transport.arrive_late() == [False]
    assert await store.load() == {key: Stored(newer, make_record(2))}


async def test_an_outcome_that_stays_unknown_is_settled_for_good(
    lossy: tuple[Lossy, EtcdStore],
    key: GroupKey,
    make_record: MakeRecord,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("agent.coordinator.store.etcd_shard.SETTLE_S", 0.1)
    transport, store = lossy
    version = await store.create(key, make_record(1))
    transport.late = 1_000
    with pytest.raises(OutcomeUnknown, match=r"'pumps'.*was changed is unknown"):
        await store.swap(key, version, make_record(2))
    transport.late = 0
    settled = await store.settle(key, version)
    assert settled is not None
    assert settled.record == make_record(1)
    assert not any(await transport.arrive_late()), "it must not happen after it was settled"
    assert await store.load() == {key: settled}


async def test_a_late_write_that_has_happened_is_found_by_settling(
    lossy: tuple[Lossy, EtcdStore],
    key: GroupKey,
    make_record: MakeRecord,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("agent.coordinator.store.etcd_shard.SETTLE_S", 0.1)
    transport, store = lossy
    version = await store.create(key, make_record(1))
    transport.late = 1_000
    with pytest.raises(OutcomeUnknown):
        await store.swap(key, version, make_record(2))
    transport.late = 0
    assert sum(await transport.arrive_late()) == 1
    settled = await store.settle(key, version)
    assert settled is not None
    assert settled.record == make_record(2)


async def test_a_write_that_was_not_sent_fails_at_once_and_changes_nothing(
    lossy: tuple[Lossy, EtcdStore], key: GroupKey, make_record: MakeRecord
) -> None:
    transport, store = lossy
    transport.refused = 1
    with pytest.raises(StoreError, match="nothing was changed") as failed:
        await store.create(key, make_record(1))
    assert not isinstance(failed.value, OutcomeUnknown)
    assert transport.sent == 1
    assert await store.load() == {}


async def test_progress_of_many_groups_is_few_transactions(
    lossy: tuple[Lossy, EtcdStore], make_record: MakeRecord
) -> None:
    transport, store = lossy
    keys = [GroupKey("t", "n", f"g{number}") for number in range(150)]
    for key in keys:
        await store.create(key, make_record(1))
    transport.sent = 0
    saved = {key: Progress(n, SINCE + timedelta(seconds=n)) for n, key in enumerate(keys)}
    await store.save_progress(saved | {GroupKey("t", "n", "absent"): Progress(1, SINCE)})
    assert transport.sent == 2
    assert {key: one.progress for key, one in (await store.load()).items()} == saved


async def test_more_groups_than_a_page_are_loaded_and_listed(
    etcd_server: EtcdServer, make_record: MakeRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agent.coordinator.store.etcd.PAGE", 3)
    async with new_cluster(etcd_server) as cluster:
        store = await lead(cluster)
        names = [f"g{number}" for number in range(10)]
        for name in names:
            await store.create(GroupKey("t", "n", name), make_record(1))
        await store.create(GroupKey("t", "other", "x"), make_record(1))
        assert len(await store.load()) == 11
        total, page = await cluster.configs("t", "n", 2, 3, lambda _: True)
        assert (total, len(page)) == (10, 3)
        monkeypatch.setattr("agent.coordinator.store.etcd.MOST_STEPS", 4)
        monkeypatch.delattr(Etcd, "get")  # one request for each group took a second of CPU
        assert len((await cluster.configs("t", "n", 1, 100, lambda _: True))[1]) == 9
        assert await cluster.configs("t", "n", 0, 9, lambda acl: acl is None) == (0, [])


async def test_a_store_has_one_identity_and_one_number_of_shards(etcd_server: EtcdServer) -> None:
    etcd = Etcd(Gateway(etcd_server.urls), 5.0)
    prefix = f"/test/{uuid.uuid4()}"
    assert await read_meta(etcd, prefix) is None
    opened = await asyncio.gather(*(EtcdCluster.open(etcd, prefix, 3) for _ in range(4)))
    assert len({cluster.store_id for cluster in opened}) == 1
    with pytest.raises(ConfigError, match=r"shards is 4.*made with 3.*set shards to 3"):
        await EtcdCluster.open(etcd, prefix, 4)
    await etcd.aclose()


async def test_a_store_of_schema_1_is_taken_over_once_nobody_serves_it(
    etcd_server: EtcdServer, key: GroupKey, make_record: MakeRecord
) -> None:
    """R24: an older coordinator would not know whom a record excludes."""
    prefix = f"/test/{uuid.uuid4()}"
    etcd = Etcd(Gateway(etcd_server.urls), 5.0)
    cluster = await EtcdCluster.open(etcd, prefix, 1)
    record, layout = make_record(2), cluster.layout
    text = json.loads(encode(record, "g"))
    for failsafe in ("cleared", "used", "offered", "set_revision", "ended_at"):
        del text[failsafe]
    text["sessions"]["b"]["config"]["additional"] = '{"cleared":1}'
    value, meta = record_value(json.dumps(text, separators=(",", ":"))), layout.meta
    old = json.dumps({"StoreId": cluster.store_id, "Shards": 1, "Schema": 1})
    member = layout.member("7")
    await etcd.txn([], [put(layout.record(key), value), put(meta, old), put(member, "{}")])
    with pytest.raises(StoreError, match="of an older version serve the store") as caught:
        await EtcdCluster.open(etcd, prefix, 1)
    assert caught.value.exit_code is ExitCode.DATA_DIR_LOCKED
    await etcd.txn([], [delete(member)])
    cluster = await EtcdCluster.open(etcd, prefix, 1)
    found = await read_meta(etcd, prefix)
    assert found is not None
    assert (found.schema, found.store_id) == (2, cluster.store_id)
    (stored,) = (await (await lead(cluster)).load()).values()
    await cluster.aclose()
    assert (stored.record.cleared, stored.record.used) == (1, None)
    assert stored.record.sessions["b"].config.additional == '{"cleared":1}'


async def test_foreign_keys_under_the_prefix_are_left_alone(etcd_server: EtcdServer) -> None:
    etcd = Etcd(Gateway(etcd_server.urls), 5.0)
    prefix = f"/test/{uuid.uuid4()}"
    await etcd.txn([], [put(f"{prefix}/theirs", "x")])
    with pytest.raises(StoreError, match="name another --etcd-prefix"):
        await EtcdCluster.open(etcd, prefix, 3)
    await etcd.txn([], [put(f"{prefix}/meta", "x")])
    with pytest.raises(StoreError, match="is not what a coordinator wrote"):
        await EtcdCluster.open(etcd, prefix, 3)
    await etcd.txn([], [put(f"{prefix}/meta", '{"StoreId":"i","Shards":3,"Schema":99}')])
    with pytest.raises(StoreError, match="newer version") as newer:
        await EtcdCluster.open(etcd, prefix, 3)
    assert newer.value.exit_code is ExitCode.DATA_DIR_NEWER
    await etcd.aclose()


async def test_an_endpoint_that_cannot_be_reached_is_replaced_at_once(
    etcd_server: EtcdServer,
) -> None:
    etcd = Etcd(Gateway(["http://127.0.0.1:1", *etcd_server.urls]), 5.0)
    assert await etcd.get("/absent") is None
    assert await etcd.get("/absent") is None
    await etcd.aclose()


async def test_something_that_is_not_etcd_is_named(etcd_server: EtcdServer) -> None:
    etcd = Etcd(Gateway([etcd_server.peers[0]]), 5.0)
    with pytest.raises(EtcdRefused, match="is not the JSON gateway of etcd"):
        await etcd.get("/absent")
    await etcd.aclose()


async def test_a_change_of_an_access_list_marks_that_caches_are_stale(
    etcd_server: EtcdServer,
) -> None:
    async with new_cluster(etcd_server) as cluster:
        place = cluster.layout.access_changed
        assert await cluster.etcd.get(place) is None
        await cluster.set_access("t", "n", AccessList())
        first = await cluster.etcd.get(place)
        await cluster.set_access("t", "n", AccessList())
        second = await cluster.etcd.get(place)
        assert first is not None
        assert second is not None
        assert first.revision < second.revision
        await cluster.set_access("t", "n", None)
        assert await cluster.access("t", "n") is None
        third = await cluster.etcd.get(place)
        assert third is not None
        assert second.revision < third.revision


def test_a_group_has_the_same_shard_in_every_version() -> None:
    """A change of this would lose every group."""
    layout = Layout("/p", 8)
    names = ("pumps", "fans", "насос", "", "\ud800")
    shards = [layout.shard_of(GroupKey("default", "default", name)) for name in names]
    assert shards == SHARDS
    counts = [0] * 8
    for number in range(800):
        counts[layout.shard_of(GroupKey("t", "n", f"line-{number}"))] += 1
    assert min(counts) > 60


SHARDS = [3, 6, 0, 7, 0]


async def test_a_login_is_renewed_when_its_token_ends(tmp_path: Path) -> None:
    """Over TLS, with an etcd that lets in nobody without a password."""
    authority = Authority(tmp_path)
    certificate, key = authority.issue("etcd")
    with an_etcd(tmp_path, tls=(certificate, key, authority.file)) as server:
        context = ssl.create_default_context(cafile=authority.file)
        anonymous = Gateway(server.urls, tls=context)
        for path, body in (
            ("user/add", {"name": "root", "password": "secret"}),
            ("role/add", {"name": "root"}),
            ("user/grant", {"user": "root", "role": "root"}),
            ("enable", {}),
        ):
            await anonymous.post(f"/v3/auth/{path}", body, 5.0)
        with pytest.raises(EtcdRefused, match="user name is empty"):
            await Etcd(anonymous, 5.0).get("/absent")
        await anonymous.aclose()
        wrong = Etcd(Gateway(server.urls, tls=context, login=Login("root", "wrong")), 5.0)
        with pytest.raises(EtcdRefused, match="authentication failed"):
            await wrong.get("/absent")
        await wrong.aclose()
        gateway = Gateway(server.urls, tls=context, login=Login("root", "secret"))
        cluster = await EtcdCluster.open(Etcd(gateway, 5.0), "/test", 1)
        # etcd ends a token after minutes, and no call ends one: it refuses this as it refuses an ended one
        gateway._token = "forgotten"
        store = await lead(cluster)
        assert await store.load() == {}
        await cluster.aclose()
        strangers = Etcd(Gateway(server.urls, tls=ssl.create_default_context()), 5.0)
        with pytest.raises(EtcdError, match="cannot be connected to"):
            await strangers.get("/absent")
        await strangers.aclose()


async def test_a_refusal_of_a_repeated_write_says_nothing_of_the_first_attempt(
    lossy: tuple[Lossy, EtcdStore], key: GroupKey, make_record: MakeRecord
) -> None:
    """The first one has filled etcd up; its answer was lost, and the others are refused."""
    transport, store = lossy
    transport.lost, transport.full = 1, 2
    version = await store.create(key, make_record(1))
    assert transport.sent == 4
    transport.sent, transport.lost, transport.full = 0, 1, 1000
    with pytest.raises(OutcomeUnknown, match="space exceeded"):
        await store.swap(key, version, make_record(2))
    transport.full = 0
    settled = await store.settle(key, version)
    assert settled is not None
    assert settled.record == make_record(2)
    transport.sent, transport.full = 1, 1
    with pytest.raises(StoreError, match="nothing was changed"):
        await store.swap(key, settled.version, make_record(3))


async def test_the_first_answer_to_any_attempt_counts(
    etcd_server: EtcdServer, key: GroupKey, make_record: MakeRecord
) -> None:
    """A slow answer is awaited while the write is sent again; it is the same write."""
    transport = Lossy(Gateway(etcd_server.urls))
    async with new_cluster(etcd_server, transport, timeout_s=0.3) as cluster:
        store = await lead(cluster)
        transport.sent, transport.slow_s = 0, 0.5
        version = await store.create(key, make_record(1))
        assert transport.sent > 1
        transport.slow_s = 0.0
        assert await store.load() == {key: Stored(version, make_record(1))}


async def test_old_tenures_are_forgotten_many_at_a_time(
    etcd_server: EtcdServer, key: GroupKey, make_record: MakeRecord
) -> None:
    """A change of role in a group with a full history is one transaction, as in any other group."""
    transport = Lossy(Gateway(etcd_server.urls))
    async with new_cluster(etcd_server, transport) as cluster:
        store = await lead(cluster)
        version = await store.create(key, make_record(1))
        tenures = [
            HistoryEntry(epoch, "s", SINCE, "chosen") for epoch in range(1, HISTORY_BOUND + 200)
        ]
        full, rest = tenures[:HISTORY_BOUND], tenures[HISTORY_BOUND:]
        for first in range(0, len(full), MOST_ENTRIES):
            some = full[first : first + MOST_ENTRIES]
            version = await store.swap(key, version, make_record(1), some)
        transport.sent = 0
        for one in rest:
            version = await store.swap(key, version, make_record(1), [one])
        assert len(rest) < transport.sent <= len(rest) + 2
        total, entries = await store.history(key, count=2 * HISTORY_BOUND)
        assert (total, entries) == (HISTORY_BOUND, tenures[: -HISTORY_BOUND - 1 : -1])
        # what is kept beyond the bound is visible in etcd only
        prefix = cluster.layout.history(key)
        kept = await cluster.etcd.range(read(prefix, end_of(prefix), count_only=True))
        assert HISTORY_BOUND <= kept.count < HISTORY_BOUND + MOST_ENTRIES


def make_key(directory: Path) -> tuple[Path, Path]:
    key, public = directory / "jwt.key", directory / "jwt.pub"
    for words in (("genrsa", "-out", key, "2048"), ("rsa", "-in", key, "-pubout", "-out", public)):
        subprocess.run(["openssl", *map(str, words)], check=True, capture_output=True)
    return key, public


async def test_a_login_is_renewed_when_users_of_etcd_have_changed(tmp_path: Path) -> None:
    """A JWT is of one revision of users and roles. Turning authentication off and on again ends nothing either."""
    key, public = make_key(tmp_path)
    token = f"jwt,pub-key={public},priv-key={key},sign-method=RS256,ttl=10m"
    with an_etcd(tmp_path, flags=("--auth-token", token)) as server:
        anonymous = Gateway(server.urls)

        async def administer(path: str, body: Json, by: Gateway) -> None:
            await by.post(f"/v3/auth/{path}", body, 5.0)

        await administer("user/add", {"name": "root", "password": "secret"}, anonymous)
        await administer("role/add", {"name": "root"}, anonymous)
        await administer("user/grant", {"user": "root", "role": "root"}, anonymous)
        await administer("enable", {}, anonymous)
        root, mine = (Gateway(server.urls, login=Login("root", "secret")) for _ in range(2))
        etcd = Etcd(mine, 5.0)
        assert await etcd.get("/absent") is None
        await administer("role/add", {"name": "another"}, root)
        assert await etcd.get("/absent") is None
        assert (await etcd.txn([], [put("/some", "value")])).succeeded
        await administer("disable", {}, root)
        assert (await etcd.txn([], [put("/some", "value")])).succeeded
        await administer("enable", {}, anonymous)
        assert (await etcd.txn([], [put("/some", "value")])).succeeded
        for one in (anonymous, root, mine):
            await one.aclose()


async def test_a_leader_that_was_deposed_cannot_declare_the_store_as_restored(
    etcd_server: EtcdServer,
) -> None:
    async with new_cluster(etcd_server) as cluster:
        store = await lead(cluster)
        await lead(cluster)
        with pytest.raises(LeadershipLost):
            await store.declare_restored()
        assert not await store.is_restored()


def progress_at(hour: int) -> Progress:
    return Progress(1, SINCE + timedelta(hours=hour))


async def test_a_late_save_of_progress_undoes_no_later_one(
    lossy: tuple[Lossy, EtcdStore], key: GroupKey, make_record: MakeRecord
) -> None:
    transport, store = lossy
    version = await store.create(key, make_record(1))
    for late in (1, 2):
        transport.late = late
        for hour in range(late):
            with pytest.raises(EtcdUnknown):
                await store.save_progress({key: progress_at(hour)})
        await store.save_progress({key: progress_at(5)})
        assert await transport.arrive_late() == [False] * late
        assert await store.load() == {key: Stored(version, make_record(1), progress_at(5))}


async def test_progress_is_saved_after_an_earlier_save_that_came_late(
    lossy: tuple[Lossy, EtcdStore], key: GroupKey, make_record: MakeRecord
) -> None:
    """It comes before the next save, or just before its write."""
    transport, store = lossy
    version = await store.create(key, make_record(1))
    transport.late = 1
    with pytest.raises(EtcdUnknown):
        await store.save_progress({key: progress_at(1)})
    assert await transport.arrive_late() == [True]
    await store.save_progress({key: progress_at(2)})
    transport.late = 1
    with pytest.raises(EtcdUnknown):
        await store.save_progress({key: progress_at(3)})
    arrived: list[bool] = []

    def arrive_first(body: Json) -> bool:
        return not arrived

    transport.holds, transport.late = arrive_first, 1
    with pytest.raises(EtcdUnknown):
        await store.save_progress({key: progress_at(4)})
    arrived += await transport.arrive_late()
    assert arrived == [True, False]
    await store.save_progress({key: progress_at(5)})
    assert await store.load() == {key: Stored(version, make_record(1), progress_at(5))}


@pytest.mark.parametrize("newer", [AccessList(), None])
async def test_a_late_change_of_an_access_list_undoes_no_later_one(
    etcd_server: EtcdServer, newer: AccessList | None
) -> None:
    transport = Lossy(Gateway(etcd_server.urls))
    older = AccessList((AccessEntry(Trustee(1, "u", "t"), denied=False, rights=31),))
    async with new_cluster(etcd_server, transport) as cluster:
        transport.late = 1
        with pytest.raises(EtcdUnknown):
            await cluster.set_access("t", "n", older)
        await cluster.set_access("t", "n", newer)
        assert await transport.arrive_late() == [False]
        assert await cluster.access("t", "n") == newer


async def test_an_access_list_is_not_written_again_for_a_caller_who_has_gone(
    etcd_server: EtcdServer,
) -> None:
    """It has asked another coordinator while this one waited, and that one has answered."""
    older = AccessList((AccessEntry(Trustee(1, "u", "t"), denied=False, rights=31),))
    async with new_cluster(etcd_server) as cluster:
        await cluster.set_access("t", "n", AccessList())
        late = cluster.set_access("t", "n", older)
        with pytest.raises(HungUp):
            await while_connected(late, asyncio.Event().wait, lambda: True)
        assert await cluster.access("t", "n") == AccessList()


async def test_a_late_creation_does_not_bring_a_deleted_group_back(
    lossy: tuple[Lossy, EtcdStore], key: GroupKey, make_record: MakeRecord
) -> None:
    """Its first attempt hangs, and the second one is answered. With it an old epoch would come back."""
    transport, store = lossy
    transport.late = 1
    version = await store.create(key, make_record(1))
    await store.delete(key, version, 9)
    assert await transport.arrive_late() == [False]
    assert await store.load() == {}


async def test_a_group_is_created_while_others_are_deleted(
    lossy: tuple[Lossy, EtcdStore], key: GroupKey, make_record: MakeRecord
) -> None:
    transport, store = lossy
    other = key._replace(group="other")
    version = await store.create(other, make_record(1))
    transport.slow_s = 0.05
    changes = [store.delete(other, version, 1), store.create(key, make_record(1))]
    await asyncio.gather(*changes)
    assert list(await store.load()) == [key]
    with pytest.raises(CasMismatch):
        await store.create(key, make_record(2))


async def test_a_late_trust_does_not_withdraw_a_later_declaration(etcd_server: EtcdServer) -> None:
    transport = Lossy(Gateway(etcd_server.urls))
    async with new_cluster(etcd_server, transport) as cluster:
        store = await lead(cluster)
        await store.declare_restored()
        transport.late = 1
        with pytest.raises(EtcdUnknown):
            await cluster.trust()
        await cluster.trust()
        assert not await store.is_restored()
        await store.declare_restored()
        assert await transport.arrive_late() == [False]
        assert await store.is_restored()


async def test_a_late_forgetting_spares_what_was_written_meanwhile(
    lossy: tuple[Lossy, EtcdStore],
    key: GroupKey,
    make_record: MakeRecord,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The epoch of a name that was used and deleted again."""
    monkeypatch.setattr("agent.coordinator.store.etcd_shard.MOST_RETIRED", 1)
    transport, store = lossy
    other = key._replace(group="other")
    await store.delete(key, await store.create(key, make_record(1)), 1)
    transport.holds, transport.late = (lambda body: not body["failure"]), 1
    await store.delete(other, await store.create(other, make_record(2)), 2)
    assert len(transport.held) == 1
    await store.delete(key, await store.create(key, make_record(3)), 9)
    assert await transport.arrive_late() == [False]
    assert await store.retired_epoch(key) == 9
