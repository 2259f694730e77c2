"""The ``prometheus`` check: whether a metric of an exporter compares as it should."""

import math
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, ClassVar, Literal, TypeAlias

from prometheus_client.parser import text_string_to_metric_families

from agent.drivers.checks.kind import Check, CheckFailed, Run, run_blocking
from agent.drivers.checks.request import Request
from agent.ops.blocking import BlockingThread
from agent.ops.clock import Clock
from agent.schema.formats import Labels, MetricName, Number, PageUrl

METRICS_BYTES = 4 * 1024 * 1024
"""Of an exporter's page; a large one has 1 MiB."""

SAMPLE_BYTES = 16 * 1024
SAMPLES_BYTES = 256 * 1024
"""Of one sample's line, and of all lines of the metric: parsing them costs at most some 100 ms."""

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
        return Prometheus(self)


class Prometheus:
    """Runs a ``prometheus`` check: every sample of the metric that has the labels must compare."""

    def __init__(self, check: PrometheusCheck) -> None:
        self._check = check
        self._request = Request(check.url, "text/plain;version=0.0.4")
        self._line = re.compile(
            rb"^[ \t]*" + check.metric.encode() + rb"(?=[ \t{]).*$", re.MULTILINE
        )
        self._lane = BlockingThread(f"check {check.name}")

    async def __call__(self) -> None:
        """Return if the metric is as it should be. Raises CheckFailed."""
        page = bytearray()
        async with self._request.send() as response:
            if response.status_code != HTTPStatus.OK:
                raise CheckFailed(f"{self._check.url} answers {response.status_code}, must be 200")
            async for part in response.aiter_raw():
                page += part
                if len(page) > METRICS_BYTES:
                    raise CheckFailed(f"{self._check.url} has more than {METRICS_BYTES >> 20} MiB")
        await run_blocking(self._lane, lambda: self._compare(page))

    def _compare(self, page: bytearray) -> None:
        check = self._check
        compare = OPERATORS[check.op]
        samples = [
            (labels, value)
            for labels, value in self._samples(page)
            if check.labels.items() <= labels.items()
        ]
        if not samples:
            raise CheckFailed(
                f"{check.url} has no sample {check.metric} {check.labels or ''}".strip()
            )
        for labels, value in samples:
            if math.isnan(value) or not compare(value, check.value):
                raise CheckFailed(
                    f"{check.metric} {labels or ''} is {value:g},"
                    f" must be {check.op} {check.value:g}"
                )

    def _samples(self, page: bytearray) -> list[tuple[Mapping[str, str], float]]:
        """The samples of that name. Only their lines are parsed: a page takes the parser seconds."""
        lines = [match[0] for match in self._line.finditer(page)]
        if sum(map(len, lines)) > SAMPLES_BYTES or any(len(line) > SAMPLE_BYTES for line in lines):
            raise CheckFailed(
                f"{self._check.url} has too much of {self._check.metric}: at most"
                f" {SAMPLE_BYTES >> 10} KiB a sample and {SAMPLES_BYTES >> 10} KiB together"
            )
        try:
            text = b"\n".join(lines).decode(errors="replace")
            families = list(text_string_to_metric_families(text))
            return [
                (sample.labels, float(sample.value))
                for family in families
                for sample in family.samples
            ]
        except (ValueError, IndexError, OverflowError) as error:
            raise CheckFailed(
                f"{self._check.url}: {self._check.metric} cannot be read: {error}"
            ) from error
