"""An etcd in memory, behind the transport of the real client: keys, transactions, leases, watches.

Speaks the JSON of the gateway, so that everything above it is the real code. Time is the event loop's.
``test_fake_etcd.py`` compares it with a real etcd.
"""

import asyncio
import random
from base64 import b64decode, b64encode
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

from agent.coordinator.store.etcd_client import (
    EtcdRefused,
    EtcdUnknown,
    EtcdUnreachable,
    Json,
)

from .virtual import outside

RETRANSMISSION_S = 0.2
"""How long after the end of a partition a connection that outlived it goes on."""

DELAY_S = 0.002


class Direction(Enum):
    """The direction of a message between a coordinator and etcd."""

    THERE = auto()
    BACK = auto()


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
        self.term = 2
        self.compacted = 0
        self.keys: dict[str, Entry] = {}
        self.leases: dict[int, tuple[float, float]] = {}
        self.last_lease = 0
        self.log: list[tuple[int, Json]] = []
        self.changed = asyncio.Event()
        self.listeners: list[Callable[[str, str], None]] = []

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    def elect(self) -> None:
        """Another member leads, and extends all leases, as it does not know when they were renewed."""
        self.expire()
        self.term += 1
        for lease, (ttl_s, _) in self.leases.items():
            self.leases[lease] = ttl_s, self._now() + ttl_s

    def compact(self) -> None:
        """Forget the history: no watch may begin in it."""
        self.compacted = self.revision
        self.log.clear()

    def snapshot(self) -> "FakeEtcd":
        """A member that applies nothing more."""
        copy = FakeEtcd()
        copy.revision, copy.keys = self.revision, dict(self.keys)
        return copy

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
                header = {"header": {"raft_term": str(self.term)}}
                return {"result": self._keep_alive(int(body["ID"])) | header}
            case "/v3/lease/revoke":
                if int(body["ID"]) not in self.leases:
                    raise EtcdRefused("requested lease not found", 5)
                self._revoke(int(body["ID"]))
                answer = {}
            case _:
                raise AssertionError(path)
        return answer | {"header": {"revision": str(self.revision), "raft_term": str(self.term)}}

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
                for listener in self.listeners:
                    listener(key, self.keys[key].value)
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
        delay_s: of each message; with a slow disk some tenths of a second.
        passes: whether a message from one end to the other gets through; what does not is lost.
        cut: connections are refused.
        lose_answer: share of requests that are carried out, and whose answer is lost.
        late: share of requests without an answer that are carried out ``late_s`` later.
        watch_delay_s: how much later than they happen changes are seen.
        silent_watches: watches up to this number have been forgotten by something on the way.
        stale_term: the leader of etcd that renews leases here has been deposed and does not know it: of this term.
        stale: what the member that serves this link has applied; only serializable reads show that.
    """

    etcd: FakeEtcd
    chance: random.Random = field(default_factory=random.Random)
    delay_s: float = DELAY_S
    passes: Callable[[Direction], bool] = lambda _: True
    cut: bool = False
    lose_answer: float = 0.0
    late: float = 0.0
    late_s: float = 0.0
    watch_delay_s: float = 0.0
    watches: int = 0
    silent_watches: int = 0
    stale_term: int | None = None
    stale: FakeEtcd | None = None

    def heal(self) -> None:
        """End all faults, but for those of watches that are forgotten already."""
        self.cut, self.lose_answer, self.late, self.watch_delay_s = False, 0.0, 0.0, 0.0
        self.stale_term = self.stale = None
        self.delay_s = DELAY_S

    def carry_out(self, path: str, body: Json) -> Json:
        """What the member of etcd at the other end does with a request."""
        if self.stale_term is not None and path == "/v3/lease/keepalive":
            term = {"header": {"raft_term": str(self.stale_term)}}
            return {"result": {"ID": body["ID"], "TTL": "1"} | term}
        if self.stale is not None and path == "/v3/kv/range" and body.get("serializable"):
            return self.stale.apply(path, body)
        return self.etcd.apply(path, body)


class FakeTransport:
    """A Transport over a Link. A request that was sent goes its way, whatever becomes of its sender."""

    def __init__(self, link: Link) -> None:
        self.link = link

    def sibling(self) -> "FakeTransport":
        return FakeTransport(self.link)

    async def post(self, path: str, body: Json, timeout_s: float) -> Json:
        if self.link.cut:
            await asyncio.sleep(self.link.delay_s)
            raise EtcdUnreachable("cut off")
        answer: asyncio.Future[Json] = asyncio.get_running_loop().create_future()
        if self.link.passes(Direction.THERE):
            outside(self._arrive, path, body, answer, after_s=self.link.delay_s)
        try:
            async with asyncio.timeout(timeout_s):
                return await answer
        except TimeoutError:
            raise EtcdUnknown("no answer in time") from None

    def _arrive(self, path: str, body: Json, answer: asyncio.Future[Json]) -> None:
        link = self.link
        chance = link.chance.random()
        if chance < link.late:
            outside(self._carry_out_late, path, body, after_s=link.late_s)
            return
        outcome: Json | EtcdRefused
        try:
            outcome = link.carry_out(path, body)
        except EtcdRefused as refusal:
            outcome = refusal
        if chance >= link.late + link.lose_answer and link.passes(Direction.BACK):
            outside(self._answer, answer, outcome, after_s=link.delay_s)

    def _answer(self, answer: asyncio.Future[Json], outcome: Json | EtcdRefused) -> None:
        if answer.done():
            return
        if isinstance(outcome, EtcdRefused):
            answer.set_exception(outcome)
        else:
            answer.set_result(outcome)

    def _carry_out_late(self, path: str, body: Json) -> None:
        with suppress(EtcdRefused):
            self.link.etcd.apply(path, body)

    async def stream(self, path: str, body: Json) -> AsyncIterator[Json]:
        assert path == "/v3/watch"
        wanted: dict[str, Any] = body["create_request"]
        first, end = _text(wanted["key"]), _text(wanted["range_end"])
        position = int(wanted["start_revision"])
        link, etcd = self.link, self.link.etcd
        link.watches += 1
        mine = link.watches
        while True:
            await asyncio.sleep(link.delay_s + link.watch_delay_s)
            if link.cut:
                raise EtcdUnreachable("cut off")
            changed = etcd.changed
            if not link.passes(Direction.BACK):
                await asyncio.sleep(RETRANSMISSION_S)
                continue
            if mine <= link.silent_watches:
                await asyncio.Event().wait()
            if position <= etcd.compacted:
                yield {"result": {"canceled": True, "compact_revision": str(etcd.compacted)}}
                return
            news: dict[int, list[Json]] = {}
            for revision, event in reversed(etcd.log):
                if revision < position:
                    break
                if first <= _text(event["kv"]["key"]) < end:
                    news.setdefault(revision, []).insert(0, event)
            for revision in sorted(news):
                header = {"revision": str(revision)}
                yield {"result": {"header": header, "events": news[revision]}}
                position = revision + 1
            await changed.wait()

    async def aclose(self) -> None:
        pass
