"""The keys of an identity provider, fetched from its JWKS URL and kept up to date.

Keys are fetched at the start, then every REFRESH_S, and when a token names an unknown key (the provider has
rotated its keys). While the provider cannot be reached, the last keys stay in force for STALE_S.
The coordinator starts without it: tokens cannot be checked until the first fetch has succeeded.
"""

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import httpx2
from joserfc.jwk import KeySet

from agent.coordinator.auth.tokens import parse_key_set
from agent.errors import ConfigError, Unavailable
from agent.ops.logs import Log, one_line

REFRESH_S = 300.0
"""Interval between two fetches: a key that the provider has withdrawn is refused after 5 minutes."""

RETRY_S = 10.0
"""Time to the next fetch after a failure."""

UNKNOWN_KEY_INTERVAL_S = 30.0
"""Least interval between fetches for tokens with unknown keys, since anybody can make up such tokens."""

STALE_S = 24 * 3600.0
"""How long keys stay in force while they cannot be fetched: an outage of the provider over a night stops no
agent, and a withdrawn key is refused in the end."""

FETCH_TIMEOUT_S = 10.0
"""Timeout of a whole fetch: identity providers are slow after their start."""

MOST_BYTES = 256 * 1024
"""Bound of an answer, which is hundreds of keys. Parsing them all takes some hundredths of a second."""

OK = 200

log = Log(__name__)


class RemoteKeys:
    """The keys at a URL. Use the other methods only inside ``kept_fresh``, which fetches them.

    Args:
        url: https, or http on this machine.
        clock: monotonic seconds.
        changed: called after the keys in force have changed.
        count: receives the outcome of each fetch: fetched or failed.
    """

    def __init__(
        self,
        url: str,
        clock: Callable[[], float],
        changed: Callable[[], None],
        count: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.count = count
        self._url = url
        self._clock = clock
        self._changed = changed
        self._keys: KeySet | None = None
        self._fetched_at = 0.0
        self._tried_at = float("-inf")
        self._failing = False
        self._fetching: asyncio.Task[None] | None = None
        self._tls: ssl.SSLContext | None = None

    def keys(self) -> KeySet:
        """The keys in force.

        Raises:
            Unavailable: there are none, or they are too old.
        """
        if self._keys is None or self._clock() > self._fetched_at + STALE_S:
            raise Unavailable(
                "The keys of the identity provider cannot be fetched, so no token can be checked.",
                "Try again after Retry-After; the coordinator's log has the reason.",
                retry_after_s=RETRY_S,
            )
        return self._keys

    async def refresh(self) -> bool:
        """Fetch again for a token with an unknown key, unless that was done just now.

        Returns:
            Whether a fetch was made, which may have brought the key.
        """
        running = self._fetching is not None
        if not running and self._clock() < self._tried_at + UNKNOWN_KEY_INTERVAL_S:
            return False
        await asyncio.shield(self._fetch())
        return True

    @asynccontextmanager
    async def kept_fresh(self) -> AsyncIterator[None]:
        """Fetch the keys now, and then at intervals, while the block runs."""
        task = asyncio.create_task(self._keep_fresh())
        try:
            yield
        finally:
            running = [one for one in (task, self._fetching) if one is not None]
            for one in running:
                one.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    async def _keep_fresh(self) -> None:
        while True:
            try:
                await asyncio.shield(self._fetch())
            except Exception:  # a task's edge: fetching must go on
                log.exception("fetching token keys failed unexpectedly", url=self._url)
            await asyncio.sleep(RETRY_S if self._failing else REFRESH_S)

    def _fetch(self) -> asyncio.Task[None]:
        """The task of the fetch in progress, or of a new fetch."""
        if self._fetching is None:
            self._fetching = asyncio.get_running_loop().create_task(self._fetch_once())
            self._fetching.add_done_callback(self._end)
        return self._fetching

    def _end(self, _: object) -> None:
        self._fetching = None

    async def _fetch_once(self) -> None:
        self._tried_at = self._clock()
        try:
            async with asyncio.timeout(FETCH_TIMEOUT_S):
                keys = parse_key_set(await self._get(), f"the answer of {self._url}")
        except Exception as error:  # noqa: BLE001 - a task's edge: whatever a provider answers, the old keys stay
            reason = one_line(str(error)) or type(error).__name__
            self.count("failed")
            if not self._failing:
                log.error(  # noqa: TRY400 - no traceback needed
                    "token keys not fetched, the old ones stay in force",
                    url=self._url,
                    reason=reason,
                    for_s=STALE_S,
                )
            self._failing = True
            return
        self.count("fetched")
        if self._failing or self._keys is None:
            log.info("token keys fetched", url=self._url, keys=len(keys.keys))
        self._failing = False
        self._fetched_at = self._clock()
        if self._keys is None or _content(keys) != _content(self._keys):
            self._keys = keys
            self._changed()

    async def _get(self) -> bytes:
        if self._tls is None:  # in a thread: this reads certificates from the disk
            self._tls = await asyncio.to_thread(ssl.create_default_context)
        body = b""
        async with (
            httpx2.AsyncClient(verify=self._tls, trust_env=False, timeout=None) as client,
            client.stream("GET", self._url, headers={"accept-encoding": "identity"}) as answer,
        ):
            if answer.status_code != OK:
                raise ConfigError(f"the status is {answer.status_code}, must be 200")
            async for part in answer.aiter_raw():
                body += part
                if len(body) > MOST_BYTES:
                    raise ConfigError(f"the answer is longer than {MOST_BYTES} bytes")
        return body


def _content(keys: KeySet) -> list[Any]:
    with suppress(TypeError, ValueError):
        return [key.as_dict(private=False) for key in keys.keys]
    return [keys]
