"""Read one metric of an exporter's page, with bounds on reading and parsing.

Only the lines of that metric are parsed, since parsing a whole page takes seconds. Knows nothing of connections,
and of the use of the value.
"""

import re
from collections.abc import AsyncIterator, Mapping, Sequence

from prometheus_client.parser import text_string_to_metric_families

ACCEPT = "text/plain;version=0.0.4"
"""The format that is parsed. Request it uncompressed, so that the bounds hold for the bytes received."""

PAGE_BYTES = 4 * 1024 * 1024
"""Bound of a page; a large one has 1 MiB."""

LINE_BYTES = 64 * 1024
"""Bound of a line of any metric."""

SAMPLES_BYTES = 256 * 1024
SAMPLE_BYTES = 16 * 1024
"""Bounds of all lines of the metric, and of one of them: parsing them costs at most some 100 ms."""


class ScrapeError(Exception):
    """The page cannot be used; the message has the reason.

    Attributes:
        too_long: a bound was exceeded.
    """

    def __init__(self, reason: str, *, too_long: bool = False) -> None:
        super().__init__(reason)
        self.too_long = too_long


async def read_lines(page: AsyncIterator[bytes], metric: str) -> list[bytes]:
    """The lines of a page that begin with the metric's name. Raises ScrapeError at a bound."""
    begins = re.compile(rb"[ \t]*" + re.escape(metric.encode()) + rb"[ \t{]")
    found: list[bytes] = []
    read = size = 0
    rest = b""
    async for chunk in page:
        *lines, rest = (rest + chunk).split(b"\n")
        read += len(chunk)
        _check_bound("the page has", read, PAGE_BYTES)
        _check_bound("a line has", len(rest), LINE_BYTES)
        for line in filter(begins.match, lines):
            size = _add(metric, found, size, line)
    if begins.match(rest):
        _add(metric, found, size, rest)
    return found


def parse_samples(
    lines: Sequence[bytes], metric: str, labels: Mapping[str, str]
) -> list[tuple[Mapping[str, str], float]]:
    """Labels and value of each sample that has the name and at least these labels.

    Raises:
        ScrapeError: a line is no sample.
    """
    text = b"\n".join(lines).decode(errors="replace")
    try:
        return [
            (sample.labels, float(sample.value))
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == metric and labels.items() <= sample.labels.items()
        ]
    except (ValueError, IndexError, OverflowError) as error:
        raise ScrapeError(f"{metric} cannot be read: {error}") from error


def _add(metric: str, found: list[bytes], size: int, line: bytes) -> int:
    size += len(line)
    _check_bound(f"a sample of {metric} has", len(line), SAMPLE_BYTES)
    _check_bound(f"the samples of {metric} have", size, SAMPLES_BYTES)
    found.append(line)
    return size


def _check_bound(what: str, size: int, most: int) -> None:
    if size > most:
        raise ScrapeError(f"{what} more than {most >> 10} KiB", too_long=True)
