"""One GET on a connection of its own, for the checks that ask a URL.

No proxy, no redirect, no compression.
"""

import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx2

from agent import __version__
from agent.drivers.checks.kind import CheckFailed
from agent.ops.logs import one_line


class Request:
    """A GET of one URL, to be sent any number of times."""

    def __init__(self, url: str, accept: str, *, insecure_tls: bool = False) -> None:
        self._url = url
        self._headers = {
            "Accept": accept,
            "Accept-Encoding": "identity",
            "Connection": "close",
            "User-Agent": f"failover-agent/{__version__}",
        }
        if url.startswith("https:"):
            self._context = ssl.create_default_context()
        else:  # never used; the context that httpx2 would make by default takes 20 ms each time
            self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        if insecure_tls:
            self._context.check_hostname = False
            self._context.verify_mode = ssl.CERT_NONE

    @asynccontextmanager
    async def send(self) -> AsyncIterator[httpx2.Response]:
        """Send the request; yields the answer, its body unread. Raises CheckFailed without a complete answer."""
        client = httpx2.AsyncClient(
            verify=self._context,
            headers=self._headers,
            timeout=None,
            trust_env=False,
            follow_redirects=False,
        )
        try:
            async with client, client.stream("GET", self._url) as response:
                if response.headers.get("content-encoding", "identity") != "identity":
                    raise CheckFailed(f"{self._url} answers compressed, which was not asked for")
                yield response
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            why = one_line(str(error)) or type(error).__name__
            raise CheckFailed(f"{self._url} gives no answer: {why}") from error
