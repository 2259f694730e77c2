"""A client of etcd (3.4 or later) over its JSON gateway: /v3 by HTTP/1.1.

Owns the connections, the login, and what an answer means: done, refused, or unknown. Knows nothing of groups.
The gateway leaves out default values (a transaction that failed has no ``succeeded``), and writes 64-bit integers
as strings and all bytes as base64.

What is not promised: that a request without an answer had no effect. ``EtcdUnknown`` is raised for it, and
etcd may carry it out later, after other requests.
"""

import asyncio
import json
import ssl
from base64 import b64decode, b64encode
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Protocol

import httpx2

from agent import __version__
from agent.errors import ExitCode, StoreError
from agent.ops.logs import Log

Json = dict[str, Any]

CONNECTIONS = 64
"""To each member of etcd, which serves some hundred writes a second: more would only wait there."""

KEEPALIVE_S = 30.0
"""Idle timeout of a connection: etcd itself keeps idle ones for longer."""

RESEND_SHARE = 1 / 3
"""A request is sent again, probably to another member of etcd, when this share of its timeout has passed. The first
answer to any attempt counts, so a slow disk and a member that hangs both cost little."""

LONGEST_LINE = 16 * 1024 * 1024
"""Bytes of one message of a watch: etcd's own limit of a request is 1.5 MiB, an event has two of them in base64."""

_UNAUTHENTICATED = 16
_OLD_REVISION = "revision of auth store is old"
"""Refuses a token (as JWT) from before the last change of etcd's users and roles; with the code of a wrong argument."""

_DEFINITE_CODES = frozenset({3, 5, 6, 7, 8, 9, 11, 12, _UNAUTHENTICATED})
"""gRPC codes of a request that etcd has refused. With the others (timed out, leader changed, cancelled) it may
have been carried out."""

log = Log(__name__)


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
    return b64decode(data).decode(errors="replace")  # whoever reads it names what is wrong with it


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
        """Make a lease of at least ``ttl_s`` seconds; its id."""
        return int((await self._post("/v3/lease/grant", {"TTL": str(ttl_s)}))["ID"])

    async def keep_alive(self, lease: int) -> int | None:
        """Renew a lease; return the Raft term of the member that answered, or None if the lease is gone. It is sent once.

        etcd's leader renews a lease without asking a majority, and may have been deposed without knowing it. A
        range read with the same term, sent at the same time, proves that it was not deposed before that.
        """
        answer = await self._post("/v3/lease/keepalive", {"ID": str(lease)}, once=True)
        result = answer.get("result", {})
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
        patience_s, left_s = RESEND_SHARE * self.timeout_s, (1 - RESEND_SHARE) * self.timeout_s
        attempts = {asyncio.create_task(self._transport.post(path, body, self.timeout_s))}
        try:
            ended, other = await asyncio.wait(attempts, timeout=None if once else patience_s)
            if not ended:
                attempts.add(asyncio.create_task(self._transport.post(path, body, left_s)))
                ended, other = await asyncio.wait(attempts, return_when=asyncio.FIRST_COMPLETED)
            if other and isinstance(next(iter(ended)).exception(), EtcdUnknown | EtcdUnreachable):
                ended, _ = await asyncio.wait(other)
            return min(ended, key=lambda one: one.exception() is not None).result()
        finally:
            for attempt in attempts:
                _ = attempt.cancel() or attempt.exception()  # so that asyncio logs none


def _header(answer: Mapping[str, Any], name: str) -> int:
    return int(answer.get("header", {}).get(name, 0))


def _event(one: Mapping[str, Any]) -> Event:
    kv = one["kv"]
    value = None if one.get("type") == "DELETE" else _text(kv.get("value", ""))
    return Event(_text(kv["key"]), value, int(kv.get("mod_revision", 0)), int(kv.get("lease", 0)))


@dataclass(frozen=True, slots=True)
class Login:
    """A user of etcd with role-based access control."""

    name: str
    password: str


@dataclass(slots=True)
class _Cluster:
    """What siblings share: which endpoint is asked, whether requests fail there, and the id of the etcd cluster."""

    current: int = 0
    failing: bool = False
    id: str | None = None


class Gateway:
    """The network: the JSON gateways of the members of one etcd cluster.

    Requests go to one endpoint. One that cannot be connected to, or does not answer in time, is replaced by
    the next one; a request that was surely not sent is sent there at once. An endpoint of another etcd cluster
    than the first one, such as a member that was restored from a snapshot, counts as one that does not answer.

    Args:
        leave_after_s: after that time without an answer further requests go to the next endpoint; without a
            connection this one does, too. None: after the timeout of the request, which may be longer.
    """

    def __init__(
        self,
        endpoints: Sequence[str],
        *,
        tls: ssl.SSLContext | None = None,
        login: Login | None = None,
        leave_after_s: float | None = None,
    ) -> None:
        self._endpoints = tuple(endpoints)
        self._cluster = _Cluster()
        self._tls = tls
        self._login = login
        self._leave_after_s = leave_after_s
        self._token: str | None = None
        self._logging_in = {endpoint: asyncio.Lock() for endpoint in self._endpoints}
        self._clients = {
            endpoint: httpx2.AsyncClient(
                verify=tls or False,  # without a context all endpoints are plain http
                trust_env=False,
                follow_redirects=False,
                limits=httpx2.Limits(max_connections=CONNECTIONS, keepalive_expiry=KEEPALIVE_S),
                headers={"User-Agent": f"failover-agent/{__version__}"},
                timeout=httpx2.Timeout(None, connect=leave_after_s if len(endpoints) > 1 else None),
            )
            for endpoint in self._endpoints
        }

    def sibling(self) -> "Gateway":
        """Another one with connections of its own; an endpoint that one of the two leaves is left by both."""
        other = Gateway(
            self._endpoints, tls=self._tls, login=self._login, leave_after_s=self._leave_after_s
        )
        other._cluster = self._cluster
        return other

    @property
    def endpoint(self) -> str:
        """The endpoint that is asked now."""
        return self._endpoints[self._cluster.current]

    async def post(self, path: str, body: Json, timeout_s: float) -> Json:
        """Send one request and read its answer."""
        asked, error = self.endpoint, None
        leave_s = min(timeout_s, self._leave_after_s or timeout_s)
        leaving = asyncio.get_running_loop().call_later(leave_s, lambda: self._leave(asked))
        try:
            async with asyncio.timeout(timeout_s):
                for _ in self._endpoints:
                    asked = self.endpoint
                    try:
                        return await self._post(asked, path, body)
                    except EtcdUnreachable as failure:
                        error = failure
        except TimeoutError:
            raise EtcdUnknown(f"etcd at {asked} did not answer within {timeout_s:g} s") from None
        finally:
            leaving.cancel()
        assert error is not None  # noqa: S101 - there is at least one endpoint
        raise error

    async def _post(self, asked: str, path: str, body: Json) -> Json:
        try:
            answer = await self._with_login(asked, path, body)
            self._check_cluster(answer, asked)
        except (httpx2.ConnectError, httpx2.ConnectTimeout) as failure:
            self._leave(asked)
            why = str(failure) or f"not within {self._leave_after_s:g} s"
            raise EtcdUnreachable(f"etcd at {asked} cannot be connected to: {why}") from failure
        except (httpx2.HTTPError, httpx2.StreamError) as failure:
            self._leave(asked)
            raise EtcdUnknown(f"etcd at {asked} gave no answer: {failure!r}") from failure
        except EtcdUnknown:
            self._leave(asked)
            raise
        if asked == self.endpoint:
            self._cluster.failing = False
        return answer

    async def _with_login(self, endpoint: str, path: str, body: Json) -> Json:
        if self._login is not None and self._token is None:
            await self._authenticate(endpoint, None)
        token = self._token
        try:
            return await self._send(endpoint, path, body, token)
        except EtcdRefused as refusal:
            is_old = refusal.code == _UNAUTHENTICATED or _OLD_REVISION in str(refusal)
            if self._login is None or not is_old:
                raise
        await self._authenticate(endpoint, token)  # the token has expired, or etcd was restarted
        return await self._send(endpoint, path, body, self._token)

    async def _authenticate(self, endpoint: str, old: str | None) -> None:
        assert self._login is not None  # noqa: S101 - the callers have checked it
        async with self._logging_in[endpoint]:
            if self._token == old:
                body = {"name": self._login.name, "password": self._login.password}
                answer = await self._send(endpoint, "/v3/auth/authenticate", body, None)
                self._token = answer["token"]

    async def _send(self, endpoint: str, path: str, body: Json, token: str | None) -> Json:
        headers = {} if token is None else {"Authorization": token}
        answer = await self._clients[endpoint].post(
            endpoint + path, content=json.dumps(body), headers=headers
        )
        return _read(answer.status_code, answer.content, endpoint)

    async def stream(self, path: str, body: Json) -> AsyncIterator[Json]:
        """Send one request and yield each message of its answer."""
        asked = self.endpoint
        headers = {} if self._token is None else {"Authorization": self._token}
        try:
            async with self._clients[asked].stream(
                "POST", asked + path, content=json.dumps(body), headers=headers
            ) as answer:
                if answer.status_code != httpx2.codes.OK:
                    _read(answer.status_code, await answer.aread(), asked)
                rest = b""
                async for part in answer.aiter_bytes():
                    *lines, rest = (rest + part).split(b"\n")
                    if len(rest) > LONGEST_LINE:
                        raise EtcdUnknown(f"etcd at {asked} sent an endless message")
                    for line in lines:
                        if line.strip():
                            message = _read(httpx2.codes.OK, line, asked)
                            self._check_cluster(message, asked)
                            yield message
        except (httpx2.HTTPError, httpx2.StreamError) as failure:
            raise EtcdUnknown(f"a watch at {asked} ended: {failure!r}") from failure

    def _check_cluster(self, answer: Json, asked: str) -> None:
        """Raise EtcdUnknown if the answer is of another etcd cluster than the first one."""
        header = answer.get("header") or answer.get("result", {}).get("header", {})
        known = self._cluster.id
        found = header.get("cluster_id", known)
        if found != (known or found):
            raise EtcdUnknown(
                f"etcd at {asked} is of another etcd cluster ({found}) than the first answer"
                f" ({known}): correct etcd_endpoint; if etcd was restored, restart every coordinator"
            )
        self._cluster.id = found

    def _leave(self, endpoint: str) -> None:
        if self.endpoint == endpoint and len(self._endpoints) > 1:
            self._cluster.current = (self._cluster.current + 1) % len(self._endpoints)
            if not self._cluster.failing:  # a line for each attempt would fill the log
                self._cluster.failing = True
                log.warning("etcd endpoint left", endpoint=endpoint, next_endpoint=self.endpoint)

    async def aclose(self) -> None:
        """Close every connection."""
        await asyncio.gather(*(client.aclose() for client in self._clients.values()))


def _read(status: int, content: bytes, endpoint: str) -> Json:
    """The JSON of an answer, or the error in it."""
    try:
        answer = json.loads(content)
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        seen = f"status {status}, {content[:80].decode(errors='replace')!r}"
        if status != httpx2.codes.NOT_FOUND:
            raise EtcdUnknown(f"{endpoint} gave {seen}")
        wanted = f"{endpoint} is not the JSON gateway of etcd 3.4 or later: {seen}"
        raise EtcdRefused(f"{wanted}; name the client URL of a member", code=12)
    if status == httpx2.codes.OK:
        return answer
    message = answer.get("message") or answer.get("error") or f"status {status}"
    code = answer.get("code")
    text = f"etcd at {endpoint} refuses: {message}"
    if isinstance(code, int) and code in _DEFINITE_CODES:
        raise EtcdRefused(text, code)
    raise EtcdUnknown(text)
