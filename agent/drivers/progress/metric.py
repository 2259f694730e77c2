"""The source ``metric``: a sample of a local exporter."""

import asyncio
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, ClassVar, Literal

import httpx2
from prometheus_client.parser import text_string_to_metric_families

from agent.drivers.progress.kind import PolledSource, Reader
from agent.drivers.progress.times import Reason, Refused, from_seconds
from agent.schema.formats import Labels, MetricName, PageUrl

LONGEST_PAGE = 4 * 1024 * 1024
"""Bytes of an exporter's page; a large node exporter's has a tenth."""

LONGEST_LINE = 64 * 1024
"""Bytes of one line of it."""

LONGEST_SAMPLE = 1024
MOST_SAMPLES = 64
"""Bytes and lines of the one metric: some milliseconds of parsing. One of the lines may fit."""

METRICS_TEXT = {"accept": "text/plain; version=0.0.4", "accept-encoding": "identity"}
"""One form, and not compressed: what is bounded is then what is read."""


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

    async def read(self) -> datetime:
        settings = self._settings
        try:
            async with asyncio.timeout(settings.limit):
                lines = await self._lines()
        except TimeoutError:
            text = f"{settings.url} did not answer within {settings.limit:g} s"
            raise Refused(Reason.TOO_SLOW, text) from None
        except httpx2.HTTPError as error:
            text = f"{settings.url} cannot be read: {str(error) or type(error).__name__}"
            raise Refused(Reason.UNREADABLE, text) from error
        fitting = self._fitting(lines)
        if len(fitting) != 1:
            labels = ", ".join(f'{key}="{value}"' for key, value in settings.labels.items())
            text = (
                f"{settings.url} has {len(fitting)} samples {settings.metric}{{{labels}}}, and must"
                " have one: name it by its labels"
            )
            raise Refused(Reason.UNREADABLE, text)
        return from_seconds(fitting[0])

    async def close(self) -> None:
        if self._client is not None:
            await self._client.aclose()

    async def _lines(self) -> list[str]:
        """The lines of the page that begin with the metric's name."""
        if self._client is None:
            tls = self._settings.url.lower().startswith("https:")  # its certificates take a while
            context = httpx2.create_ssl_context(verify=tls, trust_env=False)
            self._client = httpx2.AsyncClient(verify=context, trust_env=False, timeout=None)
        begins = re.compile(re.escape(self._settings.metric.encode()) + rb"[{\s]")
        found: list[str] = []
        rest, taken = b"", 0
        async with self._client.stream("GET", self._settings.url, headers=METRICS_TEXT) as response:
            if response.status_code != httpx2.codes.OK:
                text = f"{self._settings.url} answers {response.status_code}, right is 200"
                raise Refused(Reason.UNREADABLE, text)
            async for chunk in response.aiter_raw():
                *lines, rest = (rest + chunk).split(b"\n")
                found += [line.decode(errors="replace") for line in lines if begins.match(line)]
                taken += len(chunk)
                self._check_bounds(taken, len(rest), found)
        if begins.match(rest):
            found.append(rest.decode(errors="replace"))
            self._check_bounds(taken, 0, found)
        return found

    def _check_bounds(self, taken: int, rest: int, samples: list[str]) -> None:
        for count, most, what in (
            (taken, LONGEST_PAGE, "bytes"),
            (rest, LONGEST_LINE, "bytes in a line"),
            (len(samples), MOST_SAMPLES, f"samples {self._settings.metric}"),
            (max(map(len, samples), default=0), LONGEST_SAMPLE, "bytes in a sample"),
        ):
            if count > most:
                text = f"{self._settings.url} has more than {most} {what}"
                raise Refused(Reason.TOO_LONG, text)

    def _fitting(self, lines: list[str]) -> list[float]:
        """The values of those that have the name and the labels. Parsing a whole page takes long."""
        try:
            families = list(text_string_to_metric_families("\n".join(lines)))
        except (ValueError, IndexError, OverflowError) as error:
            text = f"{self._settings.url}: {self._settings.metric} cannot be read: {error}"
            raise Refused(Reason.NOT_A_TIME, text) from error
        wanted = self._settings.labels.items()
        return [
            sample.value
            for family in families
            for sample in family.samples
            if sample.name == self._settings.metric and wanted <= sample.labels.items()
        ]
