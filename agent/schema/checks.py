"""The keys that every ``[[check]]`` table has. Durations are seconds.

The kinds are in drivers/checks, each with its own keys; kinds.py lists them.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from agent.schema.fields import DefaultFrom, Format, Range, Table
from agent.schema.formats import Count, Duration, Interval, Number, matches, must

DEFAULT_LIMIT_S = 2.0


_check_name = must("be 1 to 64 of the characters a-z, 0-9, _ and -", matches(r"[a-z0-9_-]{1,64}"))


def _default_limit(table: Mapping[str, Any]) -> float:
    return min(DEFAULT_LIMIT_S, float(table.get("interval", DEFAULT_LIMIT_S)))


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckSettings(Table):
    """One health check."""

    name: Annotated[str, Format("NAME", "1 to 64 of a-z, 0-9, _ and -", after=_check_name)]
    """Its name in the log and in the reason of a lost role. Unique."""
    interval: Interval = 5.0
    """Time from one run's start to the next one's."""
    limit: Annotated[Duration, DefaultFrom(_default_limit)]
    """How long a run may take before it counts as failed; at most interval. Not set: 2 s, or
    interval if that is less."""
    rise: Annotated[Count, Range(1, 100)] = 2
    """Successes in a row that make a check pass again."""
    fall: Annotated[Count, Range(1, 100)] = 3
    """Failures in a row that make it fail. The first run alone decides a start."""
    weight: Annotated[Number, Range(0, 1000, above=True)] = 1.0
    """Its weight in the score, relative to the other checks'."""
    required: bool = False
    """While it fails this member does not become or stay primary, whatever the others report."""
    scope: Literal["always", "primary"] = "always"
    """primary: run only while this member is primary, and counted as passing otherwise: for a
    workload that does not run on a secondary."""
    type: str

    def contradictions(self) -> Iterator[tuple[str, str]]:
        if self.limit > self.interval:
            yield "limit", f"must be at most interval, which is {self.interval:g} s"
