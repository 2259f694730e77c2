"""The keys that every ``[progress]`` table has: a source of the data-processed time.

The kinds are in drivers/progress, each with its own keys; kinds.py lists them.
"""

from collections.abc import Callable
from typing import Annotated

from agent.schema.fields import Format, Table
from agent.schema.formats import DurationOrZero, must, sized

DEFAULT_MAX_FUTURE_S = 5.0
"""Also the bound without a table [progress]. Clocks that NTP adjusts are within milliseconds of each other, and
a time that is further ahead would hide every later one of the tenure."""

MaxFuture = Annotated[
    DurationOrZero,
    "How far ahead of this host's clock a time may be; what is further is refused and counted. Counts"
    " for POST /data-processed too.",
]


_check_key: Callable[[str], str] = must(
    'be names, or numbers in lists, with dots between ("status.items.0")',
    lambda key: all(key.split(".")),
    first=sized(1, 256),
)
JsonKey = Annotated[
    str,
    Format("KEY", "names with dots between", after=_check_key),
    "Where in it the time is, if it is JSON. Not set: it is the time itself.",
]


class ProgressSource(Table):
    """One source. Its class is a dataclass with at least these fields."""

    __slots__ = ()

    type: str
    max_future: float
