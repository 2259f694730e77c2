"""An etcd in memory, behind the transport of the real client: keys, transactions, leases, watches.

Speaks the JSON of the gateway, so that everything above it is the real code. Time is the event loop's.
``test_fake_etcd.py`` compares it with a real etcd.
"""

import asyncio
import random
from base64 import b64decode, b64encode
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from agent.coordinator.store.etcd_client import EtcdRefused, EtcdUnknown, EtcdUnreachable, Json


def _text(data: str) -> str:
    return b64decode(data).decode()


def _b64(text: str) -> str:
    return b64encode(text.encode()).decode()


@dataclass
class Entry:
    value: str
    created: int
    modified: int
    lease: int


class FakeEtcd:
    """The whole cluster, as its majority sees it."""

    def __init__(self) -> None:
        self.revision = 1
        self.keys: dict[str, Entry] = {}
        self.leases: dict[int, tuple[float, float]] = {}
        self.last_lease = 0
        self.log: list[tuple[int, Json]] = []
        self.changed = asyncio.Event()

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    def expire(self) -> None:
        for lease, (_, ends_at) in list(self.leases.items()):
            if self._now() >= ends_at:
                self._revoke(lease)

    def _revoke(self, lease: int) -> None:
        del self.leases[lease]
        gone = [key for key, entry in self.keys.items() if entry.lease == lease]
        if gone:
            self.revision += 1
            for key in gone:
                self._delete(key)

    def _delete(self, key: str) -> None:
        del self.keys[key]
        self._event(
            {"type": "DELETE", "kv": {"key": _b64(key), "mod_revision": str(self.revision)}}
        )

    def _event(self, event: Json) -> None:
        self.log.append((self.revision, event))
        self.changed.set()
        self.changed = asyncio.Event()

    def apply(self, path: str, body: Json) -> Json:
        """Carry out one request."""
        self.expire()
        match path:
            case "/v3/kv/range":
                answer = self._range(body)
            case "/v3/kv/txn":
                self._check(body)
                self.revision += 1
                before = len(self.log)
                answer = self._txn(body)
                if len(self.log) == before:
                    self.revision -= 1
            case "/v3/lease/grant":
                self.last_lease += 1
                ttl_s = float(body["TTL"])
                self.leases[self.last_lease] = ttl_s, self._now() + ttl_s
                answer = {"ID": str(self.last_lease), "TTL": body["TTL"]}
            case "/v3/lease/keepalive":
                return {"result": self._keep_alive(int(body["ID"]))}
            case "/v3/lease/revoke":
                if int(body["ID"]) not in self.leases:
                    raise EtcdRefused("requested lease not found", 5)
                self._revoke(int(body["ID"]))
                answer = {}
            case _:
                raise AssertionError(path)
        return answer | {"header": {"revision": str(self.revision)}}

    def _keep_alive(self, lease: int) -> Json:
        if lease not in self.leases:
            return {"ID": str(lease)}
        ttl_s = self.leases[lease][0]
        self.leases[lease] = ttl_s, self._now() + ttl_s
        return {"ID": str(lease), "TTL": str(int(ttl_s))}

    def _within(self, body: Json) -> list[str]:
        first = _text(body["key"])
        if "range_end" not in body:
            return [first] if first in self.keys else []
        end = _text(body["range_end"])
        return sorted(key for key in self.keys if first <= key < end)

    def _range(self, body: Json) -> Json:
        found = self._within(body)
        answer: Json = {"count": str(len(found))} if found else {}
        if body.get("sort_target") == "MOD":
            found.sort(key=lambda key: self.keys[key].modified)
        if body.get("sort_order") == "DESCEND":
            found.reverse()
        limit = int(body.get("limit", 0))
        found = found[:limit] if limit else found
        if found and not body.get("count_only"):
            keys_only = bool(body.get("keys_only"))
            answer["kvs"] = [self._shown(key, keys_only=keys_only) for key in found]
        return answer

    def _shown(self, key: str, *, keys_only: bool) -> Json:
        entry = self.keys[key]
        shown = {"key": _b64(key), "mod_revision": str(entry.modified)}
        if entry.value and not keys_only:
            shown["value"] = _b64(entry.value)
        return shown | ({"lease": str(entry.lease)} if entry.lease else {})

    def _check(self, body: Json) -> None:
        """Refuse a transaction as a whole that names a lease that is not there."""
        if self._holds(body):
            for step in body.get("success", ()):
                lease = int(step.get("request_put", {}).get("lease", 0))
                if lease and lease not in self.leases:
                    raise EtcdRefused("requested lease not found", 5)

    def _holds(self, body: Json) -> bool:
        return all(self._compare(one) for one in body.get("compare", ()))

    def _compare(self, one: Json) -> bool:
        keys = self._within(one)
        wanted = int(one["mod_revision"])
        revisions = [self.keys[key].modified for key in keys]
        if not revisions and "range_end" not in one:
            revisions = [0]
        if one["result"] == "GREATER":
            return all(revision > wanted for revision in revisions)
        return all(revision == wanted for revision in revisions)

    def _txn(self, body: Json) -> Json:
        succeeded = self._holds(body)
        steps = body.get("success" if succeeded else "failure", ())
        answer: Json = {"responses": [self._step(step) for step in steps]}
        return answer | ({"succeeded": True} if succeeded else {})

    def _step(self, step: Json) -> Json:
        ((kind, body),) = step.items()
        match kind:
            case "request_put":
                key, before = _text(body["key"]), self.keys.get(_text(body["key"]))
                created = self.revision if before is None else before.created
                lease = int(body.get("lease", 0))
                self.keys[key] = Entry(_text(body["value"]), created, self.revision, lease)
                self._event({"kv": self._shown(key, keys_only=False)})
                return {"response_put": {}}
            case "request_delete_range":
                for key in self._within(body):
                    self._delete(key)
                return {"response_delete_range": {}}
            case "request_range":
                return {"response_range": self._range(body)}
            case "request_txn":
                return {"response_txn": self._txn(body)}
            case _:
                raise AssertionError(kind)


@dataclass
class Link:
    """The way of one coordinator to etcd, with its faults.

    Attributes:
        cut: nothing gets through.
        held: the coordinator is frozen: nothing is sent, and answers are not read.
        lose_answer: share of requests whose answer is lost.
        delay: share of requests without an answer that are carried out later.
    """

    etcd: FakeEtcd
    chance: random.Random = field(default_factory=random.Random)
    delay_s: float = 0.002
    cut: bool = False
    lose_answer: float = 0.0
    late: float = 0.0
    late_s: float = 0.0
    free: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.free.set()


class FakeTransport:
    """A Transport over a Link."""

    def __init__(self, link: Link) -> None:
        self.link = link

    async def post(self, path: str, body: Json, timeout_s: float) -> Json:
        link = self.link
        try:
            async with asyncio.timeout(timeout_s):
                await asyncio.sleep(link.delay_s)
                await self._ready()
                chance = link.chance.random()
                if chance < link.late:
                    loop = asyncio.get_running_loop()
                    loop.call_later(link.late_s, self._carry_out_late, path, body)
                    await asyncio.sleep(timeout_s)
                answer = link.etcd.apply(path, body)
                if chance < link.late + link.lose_answer:
                    await asyncio.sleep(timeout_s)
                await asyncio.sleep(link.delay_s)
                await link.free.wait()
                return answer
        except TimeoutError:
            await link.free.wait()
            raise EtcdUnknown("no answer in time") from None

    def _carry_out_late(self, path: str, body: Json) -> None:
        try:
            self.link.etcd.apply(path, body)
        except EtcdRefused:
            return

    async def _ready(self) -> None:
        await self.link.free.wait()
        if self.link.cut:
            raise EtcdUnreachable("cut off")

    async def stream(self, path: str, body: Json) -> AsyncIterator[Json]:
        assert path == "/v3/watch"
        wanted: dict[str, Any] = body["create_request"]
        first, end = _text(wanted["key"]), _text(wanted["range_end"])
        position = int(wanted["start_revision"])
        etcd = self.link.etcd
        while True:
            await asyncio.sleep(self.link.delay_s)
            await self._ready()
            changed = etcd.changed
            news: dict[int, list[Json]] = {}
            for revision, event in etcd.log:
                if revision >= position and first <= _text(event["kv"]["key"]) < end:
                    news.setdefault(revision, []).append(event)
            for revision, events in news.items():
                header = {"revision": str(revision)}
                yield {"result": {"header": header, "events": events}}
                position = revision + 1
            await changed.wait()

    async def aclose(self) -> None:
        pass
