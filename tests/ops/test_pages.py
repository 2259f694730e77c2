"""Pages of many names, sorted while others are served."""

import asyncio
import random

import pytest

from agent.ops import pages
from agent.ops.pages import sorted_page


@pytest.mark.parametrize(
    ("skip", "count"), [(0, 0), (0, 5), (3, 10), (10, 7), (95, 10), (99, 1), (100, 5), (500, 5)]
)
@pytest.mark.parametrize("at_once", [1, 10, 33, 1000])
async def test_a_page_is_a_part_of_the_sorted_names(
    monkeypatch: pytest.MonkeyPatch, skip: int, count: int, at_once: int
) -> None:
    monkeypatch.setattr(pages, "LISTED_AT_ONCE", at_once)
    names = [f"g{number:03}" for number in range(100)]
    random.Random(1).shuffle(names)
    assert await sorted_page(names, skip, count) == sorted(names)[skip : skip + count]


async def test_others_are_served_while_many_names_are_sorted() -> None:
    """The last page needs the most steps."""
    served = 0

    async def serve() -> None:
        nonlocal served
        while True:
            served += 1
            await asyncio.sleep(0)

    other = asyncio.create_task(serve())
    await sorted_page(map(str, range(100_000)), 99_000, 1000)
    other.cancel()
    assert served >= 200
