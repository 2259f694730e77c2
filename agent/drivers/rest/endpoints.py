"""The endpoints of one coordinator or one cluster: which one is asked, and when the others are probed.

Owns the connections and the choice of the endpoint. Knows nothing of the operations (client.py), and retries
nothing: that is up to the caller.

``timeout_s`` bounds a whole request (credentials, connection, sending and answer), which fails only with a
ServerError. Requests go to the current endpoint. If that fails or is slow (no connection, no answer, an
answer of something else, 5xx), all others are probed concurrently by a read of the status: the first one
that answers becomes the current endpoint. Until then the current one stays.
"""

import asyncio
import re
import ssl
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from typing import Self, TypeVar

import httpx2

from agent.drivers.rest.connections import Proxy, open_client
from agent.drivers.rest.credentials import ClientCredentials
from agent.drivers.rest.exchange import (
    Answer,
    fault_of_url,
    proves_credentials,
    quoted,
    send,
)
from agent.errors import ConfigError, ExitCode, ServerError
from agent.ops.logs import Log
from agent.ops.names import Names
from agent.ops.tasks import start_task
from agent.schema import api, codec
from agent.schema.codec import BodyError, decode, has_none_of
from agent.schema.values import Shape

T = TypeVar("T")
S = TypeVar("S", bound=Shape)

log = Log(__name__)

KEEPALIVE_S = 45.0
"""Idle timeout of a connection: above the longest heartbeat interval (10 s), below the idle timeouts of
common servers and balancers (60 s and more)."""

CONNECTIONS = 8
"""Connections for all requests but blocking reads. An agent mostly has one or two in flight; each has a timeout."""

BLOCKING_READ_CONNECTIONS = 2
"""Connections for blocking reads: one for the read that waits, one for a read that was just cancelled."""

PROBE_CONNECTIONS = 8
"""Connections for probes, one for each endpoint, so that silent endpoints occupy none of the heartbeats'."""

SLOW_SHARE = 0.5
"""A request that has used this share of its timeout is slow: the other endpoints are probed."""

EXAMPLE = "http://127.0.0.1:8080/api/v1/clientfailover"

ANSWER_NAME = "the answer"

DRAIN_S = 60.0
"""How long requests may go on with credentials that were replaced: longer than a blocking read."""


@dataclass(frozen=True, slots=True)
class ServerAccess:
    """How servers are reached. ``configured.load_server_access`` makes it from the settings.

    Attributes:
        auth: httpx2.BasicAuth, ClientCredentials, or None.
        tls: verifies servers, and may have a client certificate; None where none speaks https.
        proxy: the way to all of them, or None for a direct one.
    """

    auth: httpx2.Auth | None = field(default=None, repr=False)
    tls: ssl.SSLContext | bool | None = True
    proxy: Proxy | None = None


class _Connections:
    """The connections of one ServerAccess."""

    def __init__(
        self,
        access: ServerAccess,
        names: Names,
        keepalive_s: float,
        transport: httpx2.AsyncBaseTransport | None,
    ) -> None:
        self._auth = access.auth
        self._borrowed = 0
        self._idle = asyncio.Event()
        self._idle.set()
        context = None
        if access.tls is not None:
            context = httpx2.create_ssl_context(verify=access.tls, trust_env=False)
        self.call, self.blocking_read, self.probe = (
            open_client(
                context,
                keepalive_s=kept_s,
                connections=connections,
                names=names,
                auth=access.auth,
                proxy=access.proxy,
                transport=transport,
            )
            for connections, kept_s in (
                (CONNECTIONS, keepalive_s),
                (BLOCKING_READ_CONNECTIONS, keepalive_s),
                (PROBE_CONNECTIONS, 0.0),
            )
        )

    @contextmanager
    def borrowed(self) -> Iterator[Self]:
        """Keep these connections open until the block ends. ``aclose`` and a drain of DRAIN_S still close them."""
        self._borrowed += 1
        self._idle.clear()
        try:
            yield self
        finally:
            self._borrowed -= 1
            if not self._borrowed:
                self._idle.set()

    async def drain(self) -> None:
        """Close them when no request uses them any more, or after DRAIN_S."""
        with suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_S):
                await self._idle.wait()
        await self.aclose()

    async def aclose(self) -> None:
        for client in (self.call, self.blocking_read, self.probe):
            await client.aclose()
        if isinstance(self._auth, ClientCredentials):
            await self._auth.aclose()


class Endpoints:
    """Sends requests to the current one of several endpoints. Close it with ``aclose``."""

    def __init__(
        self,
        endpoints: Sequence[str],
        *,
        auth: httpx2.Auth | None = None,
        verify: ssl.SSLContext | bool | None = True,
        proxy: Proxy | None = None,
        keepalive_s: float = KEEPALIVE_S,
        transport: httpx2.AsyncBaseTransport | None = None,
    ) -> None:
        """Sends nothing yet.

        Args:
            endpoints: base paths up to clientfailover, http or https, of one coordinator or one
                cluster; the first one is used first.
            auth: httpx2.BasicAuth, ClientCredentials, or None.
            verify: how server certificates are verified; False: not at all; None: none is expected.
            proxy: the way to all endpoints, or None for a direct one.
            keepalive_s: idle timeout of a connection: longer than the heartbeat interval, shorter
                than the server's own.
            transport: stands in for the network, in tests.

        Raises:
            ConfigError: there is no endpoint, or one does not have the right form.
        """
        if not endpoints:
            raise ConfigError(f"no endpoint is given: name at least one, such as {EXAMPLE}")
        self._endpoints = tuple(dict.fromkeys(_parse_endpoint(endpoint) for endpoint in endpoints))
        self._current = 0
        self._failing = False
        self._probes: dict[int, asyncio.Task[None]] = {}
        self._probe_faults: dict[int, str] = {}
        self._refused: dict[int, str | None] = {}
        self.store_id: str | None = None
        """The id of the store that answers must come from, once the caller has set it."""
        self.date: datetime | None = None
        """The Date header of the newest answer, or None."""
        self._keepalive_s = keepalive_s
        self._transport = transport
        self._names = Names()
        self._connections = self._connect(ServerAccess(auth, verify, proxy))
        self._draining: dict[asyncio.Task[None], _Connections] = {}

    @property
    def endpoint(self) -> str:
        """The base path of the current endpoint."""
        return self._endpoints[self._current]

    @property
    def endpoints(self) -> tuple[str, ...]:
        """All base paths, in their order."""
        return self._endpoints

    @property
    def faults_of_others(self) -> str | None:
        """Why the other endpoints cannot be used, by their last probes; None without a fault."""
        faults = (fault for index, fault in self._probe_faults.items() if index != self._current)
        return "; ".join(faults) or None

    def refuse(self, endpoint: str, store_id: str | None) -> ServerError:
        """Reject an endpoint of another store, and make the next one current.

        Args:
            endpoint: the one that answered.
            store_id: the store id in its answer.

        Returns:
            The error to raise or to report.
        """
        index = self._endpoints.index(endpoint)
        error = self._other_store_error(index, store_id)
        self._leave_endpoint(index)
        return error

    def ask_next(self, asked: str, error: ServerError) -> bool:
        """Make the next endpoint current if ``asked`` has failed; return whether there is another one.

        For callers that send one request only. An agent sends again anyway.
        """
        if _is_endpoint_failure(error):
            self._leave_endpoint(self._endpoints.index(asked))
        return self.endpoint != asked

    async def aclose(self) -> None:
        """Close every connection, and ClientCredentials with them. May be called twice."""
        for probe in self._probes.values():
            probe.cancel()
        if self._probes:
            await asyncio.wait(self._probes.values())
        await self._connections.aclose()
        for draining, former in list(self._draining.items()):
            draining.cancel()
            await former.aclose()

    # --- credentials ----------------------------------------------------------------------

    async def replace_access(self, access: ServerAccess, path: str, *, timeout_s: float) -> None:
        """Put other credentials and certificates into force, once the current endpoint answers to them.

        Requests that are under way go on with the former ones, whose connections are then closed. The next
        heartbeat uses the connection of the trial.

        Args:
            access: the new ones. They are closed if they are not used.
            path: of a harmless read, below the endpoint's base path, to try them by.
            timeout_s: for that read.

        Raises:
            ServerError: they are refused, do not trust the endpoint, get no token, or get no answer; the former
                ones stay in force.
        """
        new = self._connect(access)
        url = self._url(self._current, path)
        try:
            answer = await send(
                new.call, "GET", url, what="trying the changed credentials", timeout_s=timeout_s
            )
            answer.check()
        except ServerError as error:
            if not proves_credentials(error):
                await new.aclose()
                raise
        except BaseException:
            await new.aclose()
            raise
        old, self._connections = self._connections, new
        draining = start_task(old.drain(), name="closing replaced connections")
        self._draining[draining] = old
        draining.add_done_callback(self._draining.pop)

    def _connect(self, access: ServerAccess) -> _Connections:
        return _Connections(access, self._names, self._keepalive_s, self._transport)

    # --- sending --------------------------------------------------------------------------

    async def _request(
        self,
        method: str,
        path: str,
        *,
        what: str,
        timeout_s: float,
        read: Callable[[Answer], T],
        body: bytes | None = None,
        params: Mapping[str, str] | None = None,
        probe_path: str | None = None,
    ) -> T:
        probe_path = _derive_probe_path(path) if probe_path is None else probe_path
        asked = self._current
        slow = asyncio.get_running_loop().call_later(
            SLOW_SHARE * timeout_s, self._on_endpoint_failure, asked, probe_path, timeout_s
        )
        try:
            with self._connections.borrowed() as connections:
                answer = await send(
                    connections.call,
                    method,
                    self._url(asked, path),
                    what=what,
                    timeout_s=timeout_s,
                    params=params,
                    content=body,
                )
            self.date = answer.date
            value = decode_answer(answer, read)
        except ServerError as error:
            if _is_endpoint_failure(error):
                self._on_endpoint_failure(asked, probe_path, timeout_s)
            raise
        finally:
            slow.cancel()
        if asked == self._current:
            self._confirm_endpoint()
        return value

    def _url(self, index: int, path: str) -> str:
        return f"{self._endpoints[index]}/{path}" if path else self._endpoints[index]

    # --- choice of the endpoint ------------------------------------------------------------------

    def _leave_endpoint(self, index: int) -> None:
        if index == self._current:
            self._failing = False
            self._current = (index + 1) % len(self._endpoints)

    def _confirm_endpoint(self) -> None:
        """Stop probing: the current endpoint works."""
        self._failing = False
        self._probe_faults.clear()
        for probe in self._probes.values():
            probe.cancel()

    def _on_endpoint_failure(self, asked: int, probe_path: str, timeout_s: float) -> None:
        """Probe the other endpoints, since the current one has failed or is slow."""
        if asked != self._current:
            return  # another request that failed at the same time has switched already
        self._failing = True
        for index in range(len(self._endpoints)):
            running = self._probes.get(index)
            if index != asked and (running is None or running.done()):
                self._probes[index] = start_task(
                    self._probe(index, probe_path, timeout_s), name="probe endpoint"
                )

    async def _probe(self, index: int, path: str, timeout_s: float) -> None:
        """Probe another endpoint by a read; make it the current one if it answers."""
        try:
            with self._connections.borrowed() as connections:
                answer = await send(
                    connections.probe,
                    "GET",
                    self._url(index, path),
                    what="probing the endpoint",
                    timeout_s=timeout_s,
                )
            store_id = (
                decode_answer(answer, _decode_store_id)
                if path
                else decode_answer(answer, _check_version)
            )
        except ServerError as error:
            if _is_endpoint_failure(error) or error.exit_code is ExitCode.NOT_AUTHORISED:
                self._probe_faults[index] = str(error)
                return
            store_id = None  # a refusal by the API is an answer
        if None not in (self.store_id, store_id) and store_id != self.store_id:
            self._other_store_error(index, store_id)
            return
        self._probe_faults.pop(index, None)
        if self._failing:
            self._failing = False
            self._current = index

    def _other_store_error(self, index: int, store_id: str | None) -> ServerError:
        """The error for an endpoint of another store; logged once for each change."""
        endpoint, right = self._endpoints[index], "list endpoints of one coordinator or one cluster"
        found = "no store" if store_id is None else f"store {quoted(store_id)}"
        message = f"{endpoint} answers from {found}, expected store {self.store_id}; {right}"
        if self._refused.get(index, "") != store_id:
            self._refused[index] = store_id
            log.error(
                "coordinator of another store refused",
                endpoint=endpoint,
                store=store_id,
                expected=self.store_id,
                resolution=f"{right}; see docs/operations.md if its data was replaced",
            )
        self._probe_faults[index] = message
        return ServerError(message, exit_code=ExitCode.OTHER_STORE)


def decode_answer(answer: Answer, read: Callable[[Answer], T]) -> T:
    answer.check()
    try:
        return read(answer)
    except BodyError as error:
        raise answer.unreadable(
            f"{error} (is this the address of a client failover service?)"
        ) from None


def decode_one(shape: type[S], answer: Answer) -> S:
    value = decode(shape, answer.body, ANSWER_NAME)
    if has_none_of(value, answer.body):
        raise BodyError(f"none of the properties of {shape.__name__}")
    return value


def decode_many(shape: type[S], answer: Answer) -> list[S]:
    return codec.decode_many(shape, answer.body, ANSWER_NAME)


def _decode_store_id(answer: Answer) -> str | None:
    return decode_one(api.GroupStatus, answer).store_id


def _check_version(answer: Answer) -> None:
    decode_one(api.Version, answer)


def _derive_probe_path(path: str) -> str:
    """The path of a harmless read by which an endpoint is probed for requests like this one."""
    kind, _, rest = path.partition("/")
    group = rest.partition("/")[0]
    return f"{kind}/{group}/status" if kind == "groups" and group else ""


def _is_endpoint_failure(error: ServerError) -> bool:
    """Whether the endpoint has failed, rather than refused the request."""
    if error.status is None or error.exit_code is ExitCode.NOT_THE_API:
        return error.exit_code is not ExitCode.NOT_AUTHORISED
    return error.status >= httpx2.codes.INTERNAL_SERVER_ERROR


def _parse_endpoint(endpoint: str) -> str:
    """The endpoint without a slash at its end."""
    right = f"it must be the base path of a group API, up to clientfailover, such as {EXAMPLE}"
    problem = fault_of_url(endpoint)
    if problem is None:
        if "?" in endpoint or "#" in endpoint:
            problem = "has a query or a fragment"
        elif not endpoint.rstrip("/").lower().endswith("/clientfailover"):
            problem = "does not end in /clientfailover"
        else:
            return str(httpx2.URL(endpoint)).rstrip("/")
    shown = re.sub("//.*@", "//***@", endpoint)
    raise ConfigError(f"endpoint {shown!r} {problem}; {right}")
