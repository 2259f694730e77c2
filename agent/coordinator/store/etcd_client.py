"""The calls of etcd (3.4 or later) that a store needs, in the JSON of its gateway.

Owns what an answer means: done, refused, or unknown. Connections are in etcd_gateway.py. Knows nothing of groups.
The gateway leaves out default values (a transaction that failed has no ``succeeded``), and writes 64-bit integers
as strings and all bytes as base64.

What is not promised: that a request without an answer had no effect. ``EtcdUnknown`` is raised for it, and
etcd may carry it out later, after other requests.
"""

import asyncio
from base64 import b64decode, b64encode
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Protocol

from agent.errors import ExitCode, StoreError

Json = dict[str, Any]

RESEND_SHARE = 1 / 3
"""A request is sent again, probably to another member of etcd, when this share of its timeout has passed. The first
answer to any attempt counts, so a slow disk and a member that hangs both cost little."""


class EtcdError(StoreError):
    """A request to etcd failed."""

    exit_code = ExitCode.ETCD


class EtcdRefused(EtcdError):  # noqa: N818 - an answer
    """etcd has refused a request, which had no effect. ``code``: the gRPC code of the refusal."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class EtcdUnreachable(EtcdError):  # noqa: N818 - a state
    """No member of etcd could be connected to: the request was not sent."""


class EtcdUnknown(EtcdError):  # noqa: N818 - an outcome
    """No answer came: whether the request was or will be carried out is unknown."""


@dataclass(frozen=True, slots=True)
class KeyValue:
    """A key of etcd, with the revision of its last write, which is never the same for two writes, and its lease or 0."""

    key: str
    value: str
    revision: int
    lease: int = 0


@dataclass(frozen=True, slots=True)
class Found:
    """The answer to a range read: keys, their number in the range, the store's revision, and the member's Raft term."""

    keys: tuple[KeyValue, ...]
    count: int
    revision: int
    term: int = 0


@dataclass(frozen=True, slots=True)
class Done:
    """The answer to a transaction: which branch was taken, the answers in it, and the store's revision."""

    succeeded: bool
    answers: tuple[Found | None, ...]
    revision: int


@dataclass(frozen=True, slots=True)
class Event:
    """A change that a watch reports; ``value`` is None for a deleted key."""

    key: str
    value: str | None
    revision: int
    lease: int = 0


class Transport(Protocol):
    """Sends JSON to the gateway. Raises EtcdError."""

    async def post(self, path: str, body: Json, timeout_s: float) -> Json: ...
    def stream(self, path: str, body: Json) -> AsyncIterator[Json]: ...
    def sibling(self) -> "Transport": ...
    async def aclose(self) -> None: ...


# -- the parts of a request -----------------------------------------------------------------------


def _b64(text: str) -> str:
    return b64encode(text.encode()).decode()


def _text(data: str) -> str:
    return b64decode(data).decode(errors="replace")  # its reader reports what is wrong with it


def end_of(prefix: str) -> str:
    """The end of the range of all keys with a prefix, which ends in an ASCII character."""
    return prefix[:-1] + chr(ord(prefix[-1]) + 1)


def if_revision(key: str, revision: int) -> Json:
    """A condition: the key's last write has this revision; 0: there is no such key."""
    return {"key": _b64(key), "target": "MOD", "result": "EQUAL", "mod_revision": str(revision)}


def if_none(prefix: str) -> Json:
    """A condition: there is no key with this prefix."""
    return if_revision(prefix, 0) | {"range_end": _b64(end_of(prefix))}


def put(key: str, value: str, lease: int = 0) -> Json:
    """A step of a transaction: write a key, to be deleted with a lease if one is named."""
    return {"request_put": {"key": _b64(key), "value": _b64(value), "lease": str(lease)}}


def delete(key: str, end: str | None = None) -> Json:
    """A step of a transaction: delete a key, or those from it up to before ``end``."""
    return {"request_delete_range": _span(key, end)}


def read(
    key: str,
    end: str | None = None,
    *,
    limit: int = 0,
    newest_key_first: bool = False,
    oldest_write_first: bool = False,
    keys_only: bool = False,
    count_only: bool = False,
) -> Json:
    """A step of a transaction, or the body of a range read."""
    body = _span(key, end) | {"limit": str(limit), "keys_only": keys_only, "count_only": count_only}
    if newest_key_first:
        body |= {"sort_order": "DESCEND", "sort_target": "KEY"}
    if oldest_write_first:
        body |= {"sort_order": "ASCEND", "sort_target": "MOD"}
    return {"request_range": body}


def _span(key: str, end: str | None) -> Json:
    return {"key": _b64(key)} | ({} if end is None else {"range_end": _b64(end)})


def _found(answer: Mapping[str, Any], revision: int, term: int = 0) -> Found:
    keys = tuple(_key_value(one) for one in answer.get("kvs", ()))
    return Found(keys, int(answer.get("count", 0)), revision, term)


def _key_value(one: Mapping[str, Any]) -> KeyValue:
    return KeyValue(
        _text(one["key"]),
        _text(one.get("value", "")),
        int(one["mod_revision"]),
        int(one.get("lease", 0)),
    )


class Etcd:
    """The calls of etcd that a store and its leadership need. All raise EtcdError.

    Args:
        timeout_s: how long one request may take.
    """

    def __init__(self, transport: Transport, timeout_s: float) -> None:
        self._transport = transport
        self.timeout_s = timeout_s

    def sibling(self) -> "Etcd":
        """Another client of the same etcd, with connections of its own."""
        return type(self)(self._transport.sibling(), self.timeout_s)

    async def revision(self, key: str) -> int:
        """The revision of a key's last write, or 0 if there is no such key."""
        found = await self.get(key)
        return 0 if found is None else found.revision

    async def get(self, key: str) -> KeyValue | None:
        """One key, as the majority of etcd has it."""
        found = await self.range(read(key))
        return found.keys[0] if found.keys else None

    async def range(self, what: Json, *, once: bool = False) -> Found:
        """Keys, as the majority of etcd has them; ``what`` is made by ``read``. ``once``: it is not sent again."""
        answer = await self._post("/v3/kv/range", what["request_range"], once=once)
        return _found(answer, _header(answer, "revision"), _header(answer, "raft_term"))

    async def txn(
        self, conditions: Sequence[Json], then: Sequence[Json], otherwise: Sequence[Json] = ()
    ) -> Done:
        """One transaction: ``then`` if all conditions hold. It is sent once."""
        body = {"compare": list(conditions), "success": list(then), "failure": list(otherwise)}
        answer = await self._post("/v3/kv/txn", body, once=True)
        revision = _header(answer, "revision")
        answers = tuple(
            _found(one["response_range"], revision) if "response_range" in one else None
            for one in answer.get("responses", ())
        )
        return Done(answer.get("succeeded", False), answers, revision)

    async def grant(self, ttl_s: int) -> int:
        """Make a lease of at least ``ttl_s`` seconds; return its id."""
        return int((await self._post("/v3/lease/grant", {"TTL": str(ttl_s)}))["ID"])

    async def keep_alive(self, lease: int) -> int | None:
        """Renew a lease; return the Raft term of the member that answered, or None if the lease is gone. It is sent once.

        etcd's leader renews a lease without asking a majority, and may have been deposed without knowing it. A
        range read with the same term, sent at the same time, proves that it was not deposed before that.
        """
        answer = await self._post("/v3/lease/keepalive", {"ID": str(lease)}, once=True)
        result = answer.get("result", {})
        if int(result.get("ID", lease)) != lease:
            raise EtcdUnknown("etcd has answered for another lease: a proxy mixes answers up")
        return _header(result, "raft_term") if int(result.get("TTL", 0)) > 0 else None

    async def revoke(self, lease: int) -> None:
        """End a lease, and delete its keys."""
        await self._post("/v3/lease/revoke", {"ID": str(lease)})

    async def watch(self, prefix: str, revision: int) -> AsyncIterator[tuple[int, list[Event]]]:
        """Every change of keys with a prefix from a revision on, as it happens. Ends when etcd ends it."""
        span = _span(prefix, end_of(prefix)) | {"start_revision": str(revision)}
        async with aclosing(
            self._transport.stream("/v3/watch", {"create_request": span})  # type: ignore[type-var]
        ) as messages:
            async for message in messages:
                result = message.get("result", {})
                if result.get("canceled") or "error" in message:
                    return
                events = [_event(one) for one in result.get("events", ())]
                if events:
                    yield _header(result, "revision"), events

    async def aclose(self) -> None:
        """Close every connection."""
        await self._transport.aclose()

    async def _post(self, path: str, body: Json, *, once: bool = False) -> Json:
        """Send a request; unless ``once``, send it again if no answer has come for a while.

        An attempt that fails decides nothing while the other one may still be answered.
        """
        resend_s, left_s = RESEND_SHARE * self.timeout_s, (1 - RESEND_SHARE) * self.timeout_s
        attempts = {asyncio.create_task(self._transport.post(path, body, self.timeout_s))}
        try:
            ended, other = await asyncio.wait(attempts, timeout=None if once else resend_s)
            if not ended:
                attempts.add(asyncio.create_task(self._transport.post(path, body, left_s)))
                ended, other = await asyncio.wait(attempts, return_when=asyncio.FIRST_COMPLETED)
            if other and isinstance(_failure(*ended), EtcdUnknown | EtcdUnreachable):
                ended, _ = await asyncio.wait(other)
            best = min(ended, key=lambda one: _failure(one) is not None)
            if (failure := _failure(best)) is not None:
                raise failure
            return best.result()
        finally:
            for attempt in attempts:
                _ = attempt.cancel() or _failure(attempt)  # so that asyncio logs none


def _failure(attempt: asyncio.Task[Json]) -> BaseException | None:
    """Why an attempt has no answer. One that nobody here has cancelled was cancelled by the HTTP client."""
    if attempt.cancelled():
        return EtcdUnknown("a request to etcd was cancelled by the HTTP client")
    return attempt.exception()


def _header(answer: Mapping[str, Any], name: str) -> int:
    return int(answer.get("header", {}).get(name, 0))


def _event(one: Mapping[str, Any]) -> Event:
    kv = one["kv"]
    value = None if one.get("type") == "DELETE" else _text(kv.get("value", ""))
    return Event(_text(kv["key"]), value, int(kv.get("mod_revision", 0)), int(kv.get("lease", 0)))
