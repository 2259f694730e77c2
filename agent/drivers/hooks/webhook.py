"""One step of a hook as an HTTP request: for what cannot be reached by starting a process.

Owns one POST, its signature, and the sentence for each way in which it fails. What ends it early is
``term`` or ``kill``: the connection is broken off, and what the other side began goes on.
"""

import asyncio
import hashlib
import hmac
import json
import ssl
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

import httpx2

from agent import __version__
from agent.drivers.hooks.process import HookExit
from agent.ops.clock import Clock
from agent.ops.logs import Log

ANSWER_BYTES = 4 * 1024
ANSWER_LINES = 64
"""Of an answer's body that are logged: a sentence or two, not a page."""

ANSWER_S = 1.0
"""How long the body may take; the status has decided before."""

LONGEST_S = 24 * 3600.0
"""For one whose caller sets no limit: nothing waits for ever."""

log = Log(__name__)


def signature(secret: bytes, timestamp: str, body: bytes) -> str:
    """The value of X-Failover-Signature (docs/hooks.md)."""
    digest = hmac.new(secret, timestamp.encode() + b"." + body, hashlib.sha256).hexdigest()
    return f"sha256={digest}"


class Webhook:
    """One POST. Call ``start`` once, inside the loop; ``wait`` tells how it ended.

    Args:
        name: which hook, for the log.
        url: where to; its query is never logged, it may hold a token.
        tls: how an https server proves who it is.
        secret: signs the request; None leaves it unsigned.
    """

    pid: int | None = None
    pgid: int | None = None

    def __init__(
        self,
        name: str,
        url: str,
        clock: Clock,
        epoch: str,
        *,
        tls: ssl.SSLContext,
        secret: bytes | None,
    ) -> None:
        self.name = name
        self._url = url
        self._facts = {"hook": name, "epoch": int(epoch) if epoch else None}
        self._clock = clock
        self._started_at = clock.boottime()
        self._tls = tls
        self._secret = secret
        self._ended: asyncio.Future[HookExit] = asyncio.get_running_loop().create_future()
        self._task: asyncio.Task[None] | None = None
        self._broken_off: str | None = None

    @property
    def ended(self) -> bool:
        """Whether the answer is there, or there will be none."""
        return self._ended.done()

    def start(self, facts: Mapping[str, Any]) -> None:
        """Send ``facts`` as the body."""
        self._task = asyncio.get_running_loop().create_task(self._run(facts))

    async def wait(self) -> HookExit:
        """Wait for the answer. May be called repeatedly."""
        return await asyncio.shield(self._ended)

    def term(self) -> None:
        """Break it off."""
        self._break_off("TERM")

    def kill(self) -> None:
        """Break it off."""
        self._break_off("KILL")

    def forget(self) -> None:
        """Nothing is kept."""

    def _break_off(self, by: str) -> None:
        if self._task is not None and not self.ended:
            self._broken_off = self._broken_off or by
            self._task.cancel()

    async def _run(self, facts: Mapping[str, Any]) -> None:
        error: str | None = None
        try:
            async with asyncio.timeout(LONGEST_S):
                error = await self._post(json.dumps(facts).encode())
        except asyncio.CancelledError:
            error = f"{self._shown} gave no answer until it was broken off ({self._broken_off})"
            if self._broken_off is None:  # the loop ends, not this hook
                raise
        except (httpx2.HTTPError, httpx2.InvalidURL, OSError, ValueError) as fault:
            error = f"{self._shown} could not be asked: {str(fault) or type(fault).__name__}"
        finally:
            duration_s = self._clock.boottime() - self._started_at
            code = 0 if error is None else None
            self._ended.set_result(HookExit(code, None, duration_s, error=error))

    @property
    def _shown(self) -> str:
        parts = urlsplit(self._url)
        return f"POST {parts.scheme}://{parts.netloc}{parts.path}"

    async def _post(self, body: bytes) -> str | None:
        headers = {
            "Content-Type": "application/json",
            "User-Agent": f"failover-agent/{__version__}",
            "Accept-Encoding": "identity",
        }
        if self._secret is not None:
            timestamp = str(int(self._clock.wall().timestamp()))
            headers["X-Failover-Timestamp"] = timestamp
            headers["X-Failover-Signature"] = signature(self._secret, timestamp, body)
        async with (
            httpx2.AsyncClient(
                verify=self._tls, trust_env=False, follow_redirects=False, timeout=None
            ) as client,
            client.stream("POST", self._url, content=body, headers=headers) as answer,
        ):
            await self._log_body(answer)
            if answer.is_success:
                return None
            return f"{self._shown} answered {answer.status_code} {answer.reason_phrase}".rstrip()

    async def _log_body(self, answer: httpx2.Response) -> None:
        text = bytearray()
        try:
            async with asyncio.timeout(ANSWER_S):
                async for part in answer.aiter_raw(ANSWER_BYTES):
                    text += part[: ANSWER_BYTES - len(text)]
                    if len(text) >= ANSWER_BYTES:
                        break
        except (TimeoutError, httpx2.HTTPError):
            pass  # the status is known, and it decides
        for line in text.decode(errors="replace").splitlines()[:ANSWER_LINES]:
            if line:
                log.info("hook output", **self._facts, stream="answer", line=line)
