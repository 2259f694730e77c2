"""The source ``metric``: a sample of a local exporter."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Any, ClassVar, Literal

import httpx2

from agent.drivers.progress.kind import PolledSource, Reader
from agent.drivers.progress.times import Reason, Refused, from_seconds
from agent.ops.blocking import BlockingThread, StuckError
from agent.ops.scrape import ACCEPT, ScrapeError, parse_samples, read_lines
from agent.schema.formats import Labels, MetricName, PageUrl

HEADERS = {"accept": ACCEPT, "accept-encoding": "identity"}


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricProgress(PolledSource):
    """A metric of a local exporter, in seconds since 1970."""

    EXAMPLE: ClassVar[Mapping[str, Any]] = {
        "type": "metric",
        "url": "http://127.0.0.1:9105/metrics",
        "metric": "collector_last_processed_timestamp_seconds",
        "labels": {"line": "7"},
    }

    type: Literal["metric"] = "metric"
    url: PageUrl
    """The exporter's page of metrics, at most 4 MiB."""
    metric: MetricName
    """The sample's name, as the page has it."""
    labels: Labels = field(default_factory=dict)
    """Labels that the sample must have, beside any others; exactly one may fit. Not set: any."""

    def reader(self) -> Reader:
        return MetricReader(self)


class MetricReader:
    """Reads the one sample of an exporter's page that fits."""

    def __init__(self, settings: MetricProgress) -> None:
        self._settings = settings
        self._client: httpx2.AsyncClient | None = None
        self._parsing = BlockingThread(f"progress {settings.metric}")

    async def read(self) -> datetime:
        settings = self._settings
        try:
            async with asyncio.timeout(settings.limit):
                lines = await self._lines()
                # Not in the loop: a metric with thousands of samples takes 100 ms.
                found = await self._parsing.run(
                    lambda: parse_samples(lines, settings.metric, settings.labels)
                )
        except (TimeoutError, StuckError) as error:
            text = str(error) or f"{settings.url} did not answer within {settings.limit:g} s"
            raise Refused(Reason.TOO_SLOW, text) from None
        except httpx2.HTTPError as error:
            text = f"{settings.url} cannot be read: {str(error) or type(error).__name__}"
            raise Refused(Reason.UNREADABLE, text) from error
        except ScrapeError as error:
            reason = Reason.TOO_LONG if error.too_long else Reason.NOT_A_TIME
            raise Refused(reason, f"{settings.url}: {error}") from error
        if len(found) != 1:
            labels = ", ".join(f'{key}="{value}"' for key, value in settings.labels.items())
            text = (
                f"{settings.url} has {len(found)} samples {settings.metric}{{{labels}}}, and must"
                " have one: name it by its labels"
            )
            raise Refused(Reason.UNREADABLE, text)
        return from_seconds(found[0][1])

    async def close(self) -> None:
        if self._client is not None:
            await self._client.aclose()

    async def _lines(self) -> list[bytes]:
        settings = self._settings
        if self._client is None:
            tls = settings.url.lower().startswith("https:")  # without it no authorities are loaded
            context = httpx2.create_ssl_context(verify=tls, trust_env=False)
            jar = CookieJar(DefaultCookiePolicy(allowed_domains=[]))  # keeps none, to bound memory
            self._client = httpx2.AsyncClient(
                verify=context, trust_env=False, timeout=None, cookies=jar
            )
        async with self._client.stream("GET", settings.url, headers=HEADERS) as response:
            if response.status_code != httpx2.codes.OK:
                text = f"{settings.url} answers {response.status_code}, must be 200"
                raise Refused(Reason.UNREADABLE, text)
            return await read_lines(response.aiter_raw(), settings.metric)
