"""The ``prometheus`` check: compares a metric of an exporter with a value."""

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, ClassVar, Literal, TypeAlias

from agent.drivers.checks.kind import Check, CheckFailed, Run, run_blocking
from agent.drivers.checks.request import Request
from agent.ops.blocking import BlockingThread
from agent.ops.clock import Clock
from agent.ops.scrape import ACCEPT, ScrapeError, parse_samples, read_lines
from agent.schema.formats import Labels, MetricName, Number, PageUrl

Comparison: TypeAlias = Literal[">", ">=", "<", "<=", "==", "!="]

OPERATORS: Mapping[str, Callable[[float, float], bool]] = {
    ">": operator.gt,
    ">=": operator.ge,
    "<": operator.lt,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PrometheusCheck(Check):
    """Passes if a metric of an exporter compares as it should."""

    EXAMPLE: ClassVar[Mapping[str, Any]] = {
        "name": "room",
        "type": "prometheus",
        "url": "http://127.0.0.1:9100/metrics",
        "metric": "node_filesystem_avail_bytes",
        "labels": {"mountpoint": "/var"},
        "op": ">",
        "value": 100_000_000,
    }

    type: Literal["prometheus"] = "prometheus"
    url: PageUrl
    """The exporter's page of metrics, at most 4 MiB."""
    metric: MetricName
    """The sample's name, as the page has it (with _total, _count, ...)."""
    labels: Labels = field(default_factory=dict)
    """Labels that a sample must have, beside any others. Not set: any."""
    op: Comparison
    """How every such sample must compare with value; NaN never does."""
    value: Number
    """The number to compare with."""

    def runner(self, clock: Clock) -> Run:  # noqa: ARG002 - as every kind
        request = Request(self.url, ACCEPT)
        lane = BlockingThread(f"check {self.name}")

        async def run() -> None:
            try:
                async with request.send() as response:
                    if response.status_code != HTTPStatus.OK:
                        raise CheckFailed(f"{self.url} answers {response.status_code}, must be 200")
                    lines = await read_lines(response.aiter_raw(), self.metric)
                await run_blocking(lane, lambda: self._compare(lines))
            except ScrapeError as error:
                raise CheckFailed(f"{self.url}: {error}") from error

        return run

    def _compare(self, lines: list[bytes]) -> None:
        """Check that the comparison holds for every sample with the labels. Raises CheckFailed."""
        samples = parse_samples(lines, self.metric, self.labels)
        if not samples:
            raise CheckFailed(f"{self.url} has no sample {self.metric} {self.labels or ''}".strip())
        for labels, value in samples:
            if math.isnan(value) or not OPERATORS[self.op](value, self.value):
                raise CheckFailed(
                    f"{self.metric} {labels or ''} is {value:g}, must be {self.op} {self.value:g}"
                )
