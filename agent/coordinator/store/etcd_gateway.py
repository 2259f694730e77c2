"""The network of a client of etcd: the JSON gateways of its members, /v3 by HTTP/1.1.

Owns connections, the choice of the member that is asked, and the login. Knows nothing of what is asked (etcd_client.py).
"""

import asyncio
import json
import ssl
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from http.cookiejar import CookieJar, DefaultCookiePolicy

import httpx2

from agent import __version__
from agent.coordinator.store.etcd_client import EtcdRefused, EtcdUnknown, EtcdUnreachable, Json
from agent.ops.logs import Log, one_line

CONNECTIONS = 32
"""The most connections to each member of etcd. More would only wait there, and slow down each request of this client."""

KEEPALIVE_S = 30.0
"""Idle timeout of a connection: etcd itself keeps idle ones for longer."""

LONGEST_LINE = 16 * 1024 * 1024
"""Bytes of one message of a watch: etcd's own limit of a request is 1.5 MiB, an event has two of them in base64."""

_UNAUTHENTICATED = 16
_OLD_REVISION = "revision of auth store is old"
"""The error for a token (a JWT) that is older than the last change of etcd's users and roles. Its code is 3."""

_DEFINITE_CODES = frozenset({3, 5, 6, 7, 8, 9, 11, 12, _UNAUTHENTICATED})
"""gRPC codes of a request that etcd has refused. With the others (timed out, leader changed, cancelled) it may
have been carried out."""

log = Log(__name__)


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

    Requests go to one endpoint. If it refuses connections, or does not answer in time, the next one is used. A
    request that was certainly not sent is sent to the next endpoint at once. An endpoint of another etcd cluster
    than the first one, such as a member that was restored from a snapshot, counts as one that does not answer.

    Args:
        leave_after_s: how long to wait for an answer before further requests go to the next endpoint. A request
            for which there is no connection by then goes there, too. None: the timeout of the request.
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
                cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),  # keeps none
                timeout=httpx2.Timeout(None, connect=leave_after_s if len(endpoints) > 1 else None),
            )
            for endpoint in self._endpoints
        }

    def sibling(self) -> "Gateway":
        """Another gateway with connections of its own; the two always use the same endpoint."""
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
            raise EtcdUnknown(
                f"etcd at {asked} gave no answer: {one_line(repr(failure))}"
            ) from failure
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
            raise EtcdUnknown(f"a watch at {asked} ended: {one_line(repr(failure))}") from failure

    def _check_cluster(self, answer: Json, asked: str) -> None:
        """Raise EtcdUnknown if the answer is of another etcd cluster than the first one."""
        header = answer.get("header") or answer.get("result", {}).get("header", {})
        known = self._cluster.id
        found = header.get("cluster_id", known)
        if found != (known or found):
            raise EtcdUnknown(
                f"etcd at {asked} belongs to another etcd cluster ({found}) than the first answer"
                f" ({known}): correct etcd_endpoint; if etcd was restored, restart every coordinator"
            )
        self._cluster.id = found

    def _leave(self, endpoint: str) -> None:
        if self.endpoint == endpoint and len(self._endpoints) > 1:
            self._cluster.current = (self._cluster.current + 1) % len(self._endpoints)
            if not self._cluster.failing:  # a line for each attempt would fill the log
                self._cluster.failing = True
                log.warning(
                    "etcd endpoint failed, using the next one",
                    endpoint=endpoint,
                    next_endpoint=self.endpoint,
                )

    async def aclose(self) -> None:
        """Close every connection."""
        await asyncio.gather(*(client.aclose() for client in self._clients.values()))


def _read(status: int, content: bytes, endpoint: str) -> Json:
    """The JSON of an answer, or the error in it."""
    try:
        answer = json.loads(content)
    except (ValueError, RecursionError):
        answer = None
    if not isinstance(answer, dict):
        seen = f"status {status}, {content[:80].decode(errors='replace')!r}"
        if status != httpx2.codes.NOT_FOUND:
            raise EtcdUnknown(f"{endpoint} gave no answer of etcd: {seen}; check etcd_endpoint")
        wanted = f"{endpoint} is not the JSON gateway of etcd 3.4 or later: {seen}"
        raise EtcdRefused(f"{wanted}; name the client URL of a member", code=12)
    if status == httpx2.codes.OK:
        return answer
    message = answer.get("message") or answer.get("error") or f"status {status}"
    code = answer.get("code")
    text = f"etcd at {endpoint} refuses: {one_line(str(message), 1000)}"
    if isinstance(code, int) and code in _DEFINITE_CODES:
        raise EtcdRefused(text, code)
    raise EtcdUnknown(text)
