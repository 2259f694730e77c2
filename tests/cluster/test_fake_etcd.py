"""The etcd in memory answers as a real one does."""

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest

from agent.coordinator.store.etcd_client import (
    Done,
    Etcd,
    EtcdError,
    EtcdRefused,
    Event,
    Found,
    Json,
    delete,
    end_of,
    if_none,
    if_revision,
    put,
    read,
)
from agent.coordinator.store.etcd_gateway import Gateway
from tests.etcd import an_etcd

from .fake_etcd import FakeEtcd, FakeTransport, Link

KEYS = [f"/x/{letter}" for letter in "abc"]


def step(chance: random.Random, leases: list[int]) -> Json:
    key = chance.choice(KEYS)
    match chance.randrange(4):
        case 0:
            return delete(key) if chance.random() < 0.5 else delete("/x/", "/x/c")
        case 1:
            return read(
                "/x/",
                end_of("/x/"),
                limit=chance.randrange(3),
                newest_key_first=chance.random() < 0.3,
                keys_only=chance.random() < 0.3,
                count_only=chance.random() < 0.2,
            )
        case 2:
            return read("/x/", end_of("/x/"), limit=2, oldest_write_first=True)
        case _:
            return put(key, chance.choice(["", "v"]), chance.choice(leases))


class Player:
    """Plays the same requests on one etcd; revisions are counted from its own first one."""

    def __init__(self, etcd: Etcd) -> None:
        self.etcd = etcd
        self.base = 0
        self.leases = [0]

    async def begin(self) -> None:
        self.leases = [0, await self.etcd.grant(60), await self.etcd.grant(60)]
        self.base = (await self.etcd.txn([], [put("/base", "x")])).revision

    def plain(self, answer: Any) -> Any:
        match answer:
            case Found(keys, count, revision):
                kept = [
                    (k.key, k.value, k.revision - self.base, self.leases.index(k.lease))
                    for k in keys
                ]
                return kept, count, revision - self.base
            case Done(succeeded, answers, revision):
                return succeeded, [self.plain(a) for a in answers], revision - self.base
            case _:
                return answer

    async def play(self, seed: int) -> list[Any]:
        chance, seen = random.Random(seed), []
        for _ in range(60):
            which = chance.randrange(3)
            known = chance.randrange(12)
            conditions = [if_revision(chance.choice(KEYS), 0)] if which == 1 else []
            if which == 2:
                greater = if_revision(chance.choice(KEYS), 0) | {"result": "GREATER"}
                conditions = [chance.choice([greater, if_none("/x/")])]
            if known > 9:
                conditions.append(if_revision(chance.choice(KEYS), self.base + known))
            steps = [step(chance, self.leases)]
            if chance.random() < 0.3:
                steps = [
                    {"request_txn": {"compare": conditions, "success": [put(KEYS[0], "n")]}},
                    read("/x/", end_of("/x/")),
                ]
                conditions = []
            on_failure = [read(chance.choice(KEYS))]
            seen.append(self.plain(await self.etcd.txn(conditions, steps, on_failure)))
        await self.etcd.revoke(self.leases[1])
        seen.append(await self.etcd.keep_alive(self.leases[1]))
        seen.append(await self.etcd.keep_alive(self.leases[2]))
        try:
            await self.etcd.txn([], [put(KEYS[0], "v", self.leases[1])])
        except EtcdRefused as refusal:
            seen.append(refusal.code)
        seen.append(self.plain(await self.etcd.range(read("/x/", end_of("/x/")))))
        return seen

    async def watched(self) -> list[tuple[int, list[Event]]]:
        """All changes since the beginning, as a watch reports them."""
        seen: list[tuple[int, list[Event]]] = []
        last = (await self.etcd.txn([], [put("/x/last", "x")])).revision
        async for revision, events in self.etcd.watch("/x/", self.base + 1):
            plain = [
                Event(e.key, e.value, e.revision - self.base, self.leases.index(e.lease))
                for e in events
            ]
            # a real one may put several revisions into one message
            seen.extend((event.revision, [event]) for event in plain)
            if revision >= last:
                break
        return seen


async def test_the_etcd_in_memory_answers_as_a_real_one(tmp_path: Path) -> None:
    with an_etcd(tmp_path) as server:
        for seed in range(6):
            real = Player(Etcd(Gateway(server.urls), 5.0))
            fake = Player(Etcd(FakeTransport(Link(FakeEtcd(), delay_s=0.0)), 5.0))
            answers = []
            for player in (real, fake):
                await player.begin()
                answers.append(await player.play(seed))
            assert answers[0] == answers[1], seed
            changes = [await player.watched() for player in (real, fake)]
            assert changes[0] == changes[1], seed
            await real.etcd.txn([], [delete("/x/", end_of("/x/"))])
            await real.etcd.aclose()


async def test_a_lease_that_is_not_renewed_ends_with_its_keys() -> None:
    etcd = FakeEtcd()
    client = Etcd(FakeTransport(Link(etcd, delay_s=0.0)), 5.0)
    lease = await client.grant(1)
    await client.txn([], [put("/x/a", "v", lease)])
    ttl_s, _ = etcd.leases[lease]
    etcd.leases[lease] = ttl_s, asyncio.get_running_loop().time() - 0.1
    assert await client.get("/x/a") is None
    assert not await client.keep_alive(lease)


async def test_a_cut_link_fails_at_once() -> None:
    client = Etcd(FakeTransport(Link(FakeEtcd(), delay_s=0.0, cut=True)), 5.0)
    with pytest.raises(EtcdError, match="cut off"):
        await client.get("/x")
