"""The tasks of a session with etcd: the first end is noticed, and all of them end with the session."""

import asyncio

import pytest

from agent.coordinator.session_tasks import SessionTasks
from agent.errors import StoreError

LIMIT_S = 10.0


async def rest() -> None:
    await asyncio.Event().wait()


async def end() -> None:
    return


async def fail() -> None:
    raise StoreError("etcd is gone")


async def be_cancelled() -> None:
    raise asyncio.CancelledError


@pytest.mark.parametrize("work", [end, be_cancelled])
async def test_a_task_that_ends_or_is_cancelled_ends_the_session(work: object) -> None:
    tasks = SessionTasks()
    tasks.start(rest())
    tasks.start(work())  # type: ignore[operator]
    async with asyncio.timeout(LIMIT_S):
        assert await tasks.first_end() == f"its task {work.__name__} has ended"  # type: ignore[attr-defined]
        await tasks.end()


async def test_what_a_task_raises_ends_the_session_even_if_the_task_may_end() -> None:
    tasks = SessionTasks()
    tasks.start(end(), may_end=True)
    tasks.start(fail(), may_end=True)
    async with asyncio.timeout(LIMIT_S):
        with pytest.raises(StoreError, match="etcd is gone"):
            await tasks.first_end()
        await tasks.end()


async def test_a_task_that_misses_its_cancellation_ends_all_the_same() -> None:
    """It has asked for two things at once, and one of them fails just before the session ends."""
    failing: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    missed = 0

    async def claim() -> None:
        nonlocal missed
        while True:
            try:
                await asyncio.gather(part(), rest())
            except StoreError:
                missed += 1
            await asyncio.sleep(0.01)

    async def part() -> None:
        if missed:
            await rest()
        await failing

    tasks = SessionTasks()
    tasks.start(claim())
    await asyncio.sleep(0.01)
    failing.set_exception(StoreError("refused"))
    await asyncio.sleep(0)  # the part has failed, and gather does not know it yet
    async with asyncio.timeout(LIMIT_S):
        await tasks.end()
    assert missed == 1
