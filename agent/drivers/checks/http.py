"""The ``http`` check: whether a GET is answered as it should be."""

import re
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from agent.drivers.checks.kind import Check, CheckFailed, Run
from agent.drivers.checks.request import Request
from agent.ops.clock import Clock
from agent.schema.fields import Format
from agent.schema.formats import PageUrl, sized

HTTP_BYTES = 64 * 1024
"""How many bytes of a body are searched for ``contains``: health pages are short."""


class StatusRange(NamedTuple):
    """The statuses of HTTP that are good, both ends included."""

    least: int
    most: int

    def __str__(self) -> str:
        """As it is written in a file: ``200`` or ``200-399``."""
        return str(self.least) if self.least == self.most else f"{self.least}-{self.most}"


GOOD_STATUSES = StatusRange(200, 399)


def _parse_status(value: object) -> StatusRange:
    if isinstance(value, StatusRange):
        return value
    text = str(value) if isinstance(value, int | str) else ""
    found = re.fullmatch(r"([1-5][0-9]{2})(?:-([1-5][0-9]{2}))?", text)
    if not found or int(found[1]) > int(found[2] or found[1]):
        raise ValueError('must be a status (200) or a range in quotes ("200-399")')
    return StatusRange(int(found[1]), int(found[2] or found[1]))


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpCheck(Check):
    """Passes if a GET is answered with a good status."""

    EXAMPLE: ClassVar[Mapping[str, Any]] = {
        "name": "collector",
        "type": "http",
        "url": "http://127.0.0.1:8080/health?deep=1",
        "status": "200-299",
        "contains": "ready",
        "scope": "primary",
        "required": True,
    }

    type: Literal["http"] = "http"
    url: PageUrl
    """What to GET. No proxy is used and no redirect followed."""
    status: Annotated[StatusRange, Format("STATUS", "status or range", parse=_parse_status)] = (
        GOOD_STATUSES
    )
    """The statuses that pass."""
    contains: Annotated[str | None, Format("TEXT", "text", check=sized(1, 1024))] = None
    """Text that the first 64 KiB of the body must have. Not set: any."""
    insecure_tls: bool = False
    """Do not check the certificate of an https URL."""

    def runner(self, clock: Clock) -> Run:  # noqa: ARG002 - as every kind
        request = Request(self.url, "*/*", insecure_tls=self.insecure_tls)

        async def run() -> None:
            async with request.send() as response:
                if not self.status.least <= response.status_code <= self.status.most:
                    raise CheckFailed(
                        f"{self.url} answers {response.status_code}, must be {self.status}"
                    )
                text = self.contains
                if text is not None and not await _contains(response.aiter_raw(), text.encode()):
                    raise CheckFailed(
                        f"{self.url} answers without {text!r} in the first {HTTP_BYTES // 1024} KiB"
                    )

        return run

    def contradictions(self) -> Iterator[tuple[str, str]]:
        yield from Check.contradictions(self)
        if self.insecure_tls and not self.url.startswith("https:"):
            yield "insecure_tls", "is for an https:// url: leave it out"


async def _contains(parts: AsyncIterator[bytes], wanted: bytes) -> bool:
    body = bytearray()
    async for part in parts:
        start = max(0, len(body) - len(wanted))
        body += part[: HTTP_BYTES - len(body)]
        if body.find(wanted, start) >= 0:
            return True
        if len(body) >= HTTP_BYTES:
            return False
    return False
