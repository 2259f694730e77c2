"""OAuth2 client credentials (RFC 6749, 4.4): a bearer token on every request, and a fresh one in time.

Owns the client secret and the token; neither is ever in a message, a repr or a log. Knows nothing of
what the token is good for.

A request that needs a token waits for at most one fetch, which all requests to that origin share, and no
longer than its own timeout. Once most of a token's lifetime is over, the next one is fetched in the
background, so a slow identity server delays no heartbeat while the old token is valid.
"""

import asyncio
import json
import re
import ssl
from collections.abc import AsyncGenerator, Callable
from dataclasses import replace
from typing import Any
from urllib.parse import quote, quote_plus

import httpx2

from agent.drivers.rest.connections import Proxy, open_client
from agent.drivers.rest.exchange import Answer, fault_of_url, quoted, send
from agent.errors import ConfigError, ExitCode, ServerError
from agent.ops.names import Names
from agent.ops.tasks import retrieve_error

DISCOVERY_PATH = "/identity/.well-known/openid-configuration"
"""Path of the cloud service's OpenID discovery document, at the origin of the endpoint."""

REFRESH_SHARE = 0.8
"""Share of a token's life after which the next one is fetched: a fifth is left for trouble."""

FETCH_TIMEOUT_S = 10.0
"""Timeout of the discovery and of the token request, each: identity servers are slow after their start."""

DEFAULT_LIFE_S = 300.0
"""The life of a token whose server does not state it (RFC 6749 only recommends to)."""

CONNECTIONS = 8
"""The most connections: one for the identity server of each endpoint, and some that are being abandoned."""

LONGEST_LIFE_S = 24 * 3600.0
"""Upper limit of a token's lifetime: a revoked secret is noticed within a day."""


class ClientCredentials(httpx2.Auth):
    """Authorises requests by tokens that a client id and its secret are exchanged for.

    Call ``aclose`` after the last request; a RestClient that was given this does it.
    """

    def __init__(
        self,
        client_id: str,
        client_secret: str,
        *,
        clock: Callable[[], float],
        token_url: str | None = None,
        verify: ssl.SSLContext | bool = True,
        proxy: Proxy | None = None,
        transport: httpx2.AsyncBaseTransport | None = None,
    ) -> None:
        """Sends nothing yet.

        Args:
            client_id: of this client.
            client_secret: its secret.
            clock: seconds that go on in suspend (CLOCK_BOOTTIME).
            token_url: the token endpoint; None to discover it by DISCOVERY_PATH at the origin of the
                endpoint in use.
            verify: how the certificate of the identity server is verified.
            proxy: the way to it, or None for a direct one.
            transport: stands in for the network, in tests.

        Raises:
            ConfigError: the token URL is not valid.
        """
        if token_url is not None and (problem := fault_of_url(token_url)):
            shown = re.sub("//.*@", "//***@", token_url)
            raise ConfigError(
                f"token URL {shown!r} {problem}; it must be the address of an OAuth2 token endpoint,"
                " such as https://host/identity/connect/token"
            )
        self._id = client_id
        self._secret = client_secret
        self._clock = clock
        self._token_url = token_url
        self._client = open_client(
            httpx2.create_ssl_context(verify=verify, trust_env=False),
            keepalive_s=FETCH_TIMEOUT_S,
            connections=CONNECTIONS,
            names=Names(),
            proxy=proxy,
            transport=transport,
        )
        self._token = ""
        self._refresh_at = self._end_at = float("-inf")
        self._fetching: dict[str, asyncio.Task[None]] = {}

    def __repr__(self) -> str:
        return f"ClientCredentials(client_id={self._id!r})"

    async def aclose(self) -> None:
        """Cancel a fetch that is under way, and close its connections."""
        for fetch in self._fetching.values():
            fetch.cancel()
        if self._fetching:
            await asyncio.wait(self._fetching.values())
        await self._client.aclose()

    async def async_auth_flow(
        self, request: httpx2.Request
    ) -> AsyncGenerator[httpx2.Request, httpx2.Response]:
        """Send with a token; if the server refuses that token, once more with another one.

        Raises:
            ServerError: no token could be obtained: NOT_AUTHORISED if the identity server refuses
                this client, else as ``send`` does.
        """
        token = await self._valid_token(request.url)
        request.headers["Authorization"] = f"Bearer {token}"
        response = yield request
        if response.status_code == httpx2.codes.UNAUTHORIZED:
            if token == self._token:
                self._end_at = float("-inf")
            token = await self._valid_token(request.url)
            request.headers["Authorization"] = f"Bearer {token}"
            yield request

    async def _valid_token(self, asked: httpx2.URL) -> str:
        now = self._clock()
        if now >= self._refresh_at or now >= self._end_at:
            fetch = self._fetch_for(asked)
            if now >= self._end_at:
                await asyncio.shield(fetch)
        return self._token

    def _fetch_for(self, asked: httpx2.URL) -> asyncio.Task[None]:
        """The fetch that is under way, or a new one.

        Where the token URL is discovered each origin has its own: one that does not answer must not
        hold up calls to the others.
        """
        origin = "" if self._token_url else f"{asked.scheme}://{asked.host}:{asked.port}"
        fetch = self._fetching.get(origin)
        if fetch is None or fetch.done():
            fetch = self._fetching[origin] = asyncio.create_task(self._fetch(asked), name="token")
            fetch.add_done_callback(retrieve_error)  # the next request fetches again
        return fetch

    async def _fetch(self, asked: httpx2.URL) -> None:
        asked_at = self._clock()
        url = self._token_url or await self._discover(asked)
        form = {
            "grant_type": "client_credentials",
            "client_id": self._id,
            "client_secret": self._secret,
        }
        answer = await send(
            self._client,
            "POST",
            url,
            what=f"token for client {self._id}",
            timeout_s=FETCH_TIMEOUT_S,
            form=form,
        )
        if answer.status in {400, 401, 403}:
            raise self._refused(answer)
        replace(answer, body=b"").check()  # the body may quote the request and its secret
        granted = _document(answer)
        token, life_s = granted.get("access_token"), _seconds(granted.get("expires_in"))
        if not (isinstance(token, str) and token and token.isascii() and token.isprintable()):
            raise answer.error(
                "answered without a usable access_token",
                "the token URL must be an OAuth2 token endpoint",
                ExitCode.NOT_AUTHORISED,
                of_the_api=False,
            )
        self._token = token
        self._refresh_at, self._end_at = asked_at + REFRESH_SHARE * life_s, asked_at + life_s

    async def _discover(self, asked: httpx2.URL) -> str:
        answer = await send(
            self._client,
            "GET",
            str(asked.copy_with(raw_path=DISCOVERY_PATH.encode())),
            what="discovery of the token URL",
            timeout_s=FETCH_TIMEOUT_S,
        )
        url = _document(answer).get("token_endpoint") if answer.status == httpx2.codes.OK else None
        if not isinstance(url, str) or fault_of_url(url):
            problem = f"answered {answer.status} without a usable token_endpoint"
        elif asked.scheme == "https" and not url.startswith("https:"):
            problem = f"names the token endpoint {quoted(url)}, which would get the secret in clear"
        else:
            return url
        right = "set the token URL in the configuration"
        raise answer.error(problem, right, ExitCode.NOT_AUTHORISED, of_the_api=False)

    def _refused(self, answer: Answer) -> ServerError:
        fields = _document(answer)
        words = [fields.get(name) for name in ("error", "error_description")]
        reason = ": ".join(word for word in words if isinstance(word, str))
        secret = self._secret
        for form in (secret, quote_plus(secret), quote(secret, safe="")):  # some servers repeat it
            reason = reason.replace(form, "***")
        return answer.error(
            f"answered {answer.status} ({quoted(reason) or 'no reason given'})",
            "check the client id and its secret",
            ExitCode.NOT_AUTHORISED,
            of_the_api=False,
        )


def _seconds(expires_in: Any) -> float:
    """The lifetime of a token; some servers send it as a string."""
    try:
        life_s = float(expires_in)
    except (TypeError, ValueError, OverflowError):
        return DEFAULT_LIFE_S
    return min(life_s, LONGEST_LIFE_S) if life_s > 0 else DEFAULT_LIFE_S


def _document(answer: Answer) -> dict[str, Any]:
    try:
        document = json.loads(answer.body)
    except (ValueError, RecursionError):
        document = None
    return document if isinstance(document, dict) else {}
