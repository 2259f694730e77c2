"""One step of a hook as an HTTP request.

Owns one POST, its signature, and the message for each failure. ``term`` and ``kill`` close the connection;
what the server has begun goes on.
"""

import asyncio
import hashlib
import hmac
import json
import ssl
from collections.abc import Mapping
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

import httpx2

from agent import __version__
from agent.drivers.hooks.process import HookExit
from agent.ops.clock import Clock
from agent.ops.logs import Log, one_line
from agent.ops.tasks import start_task

ANSWER_BYTES = 4 * 1024
ANSWER_LINES = 64
"""Bytes of an answer's body that are logged."""

ANSWER_S = 1.0
"""How long the body may take; the status has already decided the result."""

LONGEST_S = 24 * 3600.0
"""Fallback timeout, if the caller sets no limit."""

log = Log(__name__)


def signature(secret: bytes, timestamp: str, body: bytes) -> str:
    """The value of X-Failover-Signature (docs/hooks.md)."""
    digest = hmac.new(secret, timestamp.encode() + b"." + body, hashlib.sha256).hexdigest()
    return f"sha256={digest}"


class Webhook:
    """One POST. Call ``start`` once, inside the loop; ``wait`` returns the result.

    Args:
        name: of the hook, for the log.
        url: its query is never logged, as it may contain a token.
        tls: verifies an https server.
        secret: signs the request; None leaves it unsigned.
    """

    pid: int | None = None

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
        self._log_fields = {"hook": name, "epoch": int(epoch) if epoch else None}
        self._clock = clock
        self._started_at = clock.boottime()
        self._tls = tls
        self._secret = secret
        self._ended: asyncio.Future[HookExit] = asyncio.get_running_loop().create_future()
        self._task: asyncio.Task[str | None] | None = None
        self._cancelled_by: str | None = None

    @property
    def ended(self) -> bool:
        """Whether the request has succeeded or failed."""
        return self._ended.done()

    def start(self, payload: Mapping[str, Any]) -> None:
        """Send ``payload`` as the body."""
        self._task = start_task(self._run(payload))
        self._task.add_done_callback(self._finish)

    async def wait(self) -> HookExit:
        """Wait for the answer. May be called repeatedly."""
        return await asyncio.shield(self._ended)

    def term(self) -> None:
        """Cancel the request."""
        self._cancel("TERM")

    def kill(self) -> None:
        """Cancel the request."""
        self._cancel("KILL")

    def release(self) -> None:
        """Do nothing: a request has no process."""

    def _cancel(self, by: str) -> None:
        if self._task is not None and not self.ended:
            self._cancelled_by = self._cancelled_by or by
            self._task.cancel()

    async def _run(self, payload: Mapping[str, Any]) -> str | None:
        """Send the request; return why it failed, or None."""
        try:
            async with asyncio.timeout(LONGEST_S):
                return await self._post(json.dumps(payload).encode())
        except Exception as fault:  # noqa: BLE001 - whatever it is, the hook has not succeeded
            return f"{self._shown} failed: {one_line(str(fault)) or type(fault).__name__}"

    def _finish(self, task: asyncio.Task[str | None]) -> None:
        """Set the result. A callback, since a task that is cancelled before it begins runs no code of its own."""
        if task.cancelled():
            before = self._cancelled_by or "the end of the agent"
            error: str | None = f"{self._shown} gave no answer before {before}"
        else:
            error = task.result()
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
            phrase = one_line(answer.reason_phrase)
            return f"{self._shown} answered {answer.status_code} {phrase}".rstrip()

    async def _log_body(self, answer: httpx2.Response) -> None:
        text = bytearray()
        # The status has decided the result, and TERM does not change it.
        with suppress(TimeoutError, httpx2.HTTPError, asyncio.CancelledError):
            async with asyncio.timeout(ANSWER_S):
                async for part in answer.aiter_raw(ANSWER_BYTES):
                    text += part[: ANSWER_BYTES - len(text)]
                    if len(text) >= ANSWER_BYTES:
                        break
        for line in text.decode(errors="replace").splitlines()[:ANSWER_LINES]:
            if line:
                log.info("hook output", **self._log_fields, stream="answer", line=line)
