"""The ``http`` and ``prometheus`` checks: one GET on a connection of its own, and what it says.

No proxy, no redirect, no compression; nothing beyond the bounds is read or kept.
"""

import math
import operator
import re
import ssl
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager

import httpx2
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from agent import __version__
from agent.drivers.checks.aside import Failed, run_in
from agent.drivers.checks.verdict import one_line
from agent.ops.blocking import BlockingThread
from agent.settings.values import HttpCheck, PrometheusCheck

HTTP_BYTES = 64 * 1024
"""Of a body that ``contains`` is looked for in: health pages are short."""

METRICS_BYTES = 4 * 1024 * 1024
"""Of an exporter's page; a large one has 1 MiB."""

SAMPLE_BYTES = 16 * 1024
SAMPLES_BYTES = 256 * 1024
"""Of one sample's line, and of all lines of the metric: parsing them costs at most some 100 ms."""

OPERATORS: Mapping[str, Callable[[float, float], bool]] = {
    ">": operator.gt,
    ">=": operator.ge,
    "<": operator.lt,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
}


class _Web:
    """Asks one URL."""

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
        else:  # never used, and what httpx2 would make of its own takes 20 ms each time
            self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        if insecure_tls:
            self._context.check_hostname = False
            self._context.verify_mode = ssl.CERT_NONE

    @asynccontextmanager
    async def ask(self) -> AsyncIterator[httpx2.Response]:
        """The answer, its body unread. Raises Failed if none comes, or while it is read."""
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
                    raise Failed(f"{self._url} answers compressed, which was not asked for")
                yield response
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            why = one_line(str(error)) or type(error).__name__
            raise Failed(f"{self._url} gives no answer: {why}") from error


class Http:
    """Runs an ``http`` check."""

    def __init__(self, check: HttpCheck) -> None:
        self._check = check
        self._web = _Web(check.url, "*/*", insecure_tls=check.insecure_tls)

    async def __call__(self) -> None:
        """Return if status and body are right. Raises Failed."""
        check = self._check
        async with self._web.ask() as response:
            if not check.status.least <= response.status_code <= check.status.most:
                raise Failed(f"{check.url} answers {response.status_code}, must be {check.status}")
            if check.contains is not None and not await _has(response, check.contains.encode()):
                raise Failed(
                    f"{check.url} answers without {check.contains!r} in the first"
                    f" {HTTP_BYTES // 1024} KiB"
                )


async def _has(response: httpx2.Response, wanted: bytes) -> bool:
    body = bytearray()
    async for part in response.aiter_raw():
        start = max(0, len(body) - len(wanted))
        body += part[: HTTP_BYTES - len(body)]
        if body.find(wanted, start) >= 0:
            return True
        if len(body) >= HTTP_BYTES:
            return False
    return False


class Prometheus:
    """Runs a ``prometheus`` check: every sample of the metric that has the labels must compare."""

    def __init__(self, check: PrometheusCheck) -> None:
        self._check = check
        self._web = _Web(check.url, "text/plain;version=0.0.4")
        self._line = re.compile(
            rb"^[ \t]*" + check.metric.encode() + rb"(?=[ \t{]).*$", re.MULTILINE
        )
        self._lane = BlockingThread(f"check {check.name}")

    async def __call__(self) -> None:
        """Return if the metric is as it should be. Raises Failed."""
        page = bytearray()
        async with self._web.ask() as response:
            if response.status_code != httpx2.codes.OK:
                raise Failed(f"{self._check.url} answers {response.status_code}, must be 200")
            async for part in response.aiter_raw():
                page += part
                if len(page) > METRICS_BYTES:
                    raise Failed(f"{self._check.url} has more than {METRICS_BYTES >> 20} MiB")
        await run_in(self._lane, lambda: self._compare(page))

    def _compare(self, page: bytearray) -> None:
        check = self._check
        compare = OPERATORS[check.op]
        samples = [
            sample
            for sample in self._samples(page)
            if check.labels.items() <= sample.labels.items()
        ]
        if not samples:
            raise Failed(f"{check.url} has no sample {check.metric} {check.labels or ''}".strip())
        for sample in samples:
            if math.isnan(sample.value) or not compare(sample.value, check.value):
                raise Failed(
                    f"{check.metric} {sample.labels or ''} is {sample.value:g},"
                    f" must be {check.op} {check.value:g}"
                )

    def _samples(self, page: bytearray) -> list[Sample]:
        """The samples of that name. Only their lines are parsed: a page takes the parser seconds."""
        lines = [match[0] for match in self._line.finditer(page)]
        if sum(map(len, lines)) > SAMPLES_BYTES or any(len(line) > SAMPLE_BYTES for line in lines):
            raise Failed(
                f"{self._check.url} has too much of {self._check.metric}: at most"
                f" {SAMPLE_BYTES >> 10} KiB a sample and {SAMPLES_BYTES >> 10} KiB together"
            )
        try:
            text = b"\n".join(lines).decode(errors="replace")
            families = list(text_string_to_metric_families(text))
            return [
                sample._replace(value=float(sample.value))
                for family in families
                for sample in family.samples
            ]
        except (ValueError, IndexError, OverflowError) as error:
            raise Failed(
                f"{self._check.url}: {self._check.metric} cannot be read: {error}"
            ) from error
