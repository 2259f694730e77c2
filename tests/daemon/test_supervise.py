"""Which ends of background tasks the supervisor reports (R9)."""

import asyncio

import pytest

from agent.core.events import Event, Tick
from agent.daemon.supervise import Supervisor
from agent.ops.tasks import start_task


class Watched:
    """A supervisor, and what it has reported."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.failed: list[str] = []
        self.supervisor = Supervisor(self.events.append, lambda name, _: self.failed.append(name))
        self.supervisor.watch_loop()


async def _cancelled_by_nobody() -> None:
    """What a library does that cancels a future of its own, for which a task waits."""
    future = asyncio.get_running_loop().create_future()
    future.cancel()
    await future


async def test_a_task_that_ends_as_cancelled_by_nobody_has_failed() -> None:
    watched = Watched()
    watched.supervisor.start("beat", _cancelled_by_nobody(), failure_event=Tick())
    start_task(_cancelled_by_nobody(), name="check")
    await asyncio.sleep(0.01)
    assert sorted(watched.failed) == ["beat", "check"]
    assert watched.events == [Tick()]


@pytest.mark.parametrize("endless", [False, True])
async def test_a_task_that_its_owner_cancels_has_not_failed(endless: bool) -> None:  # noqa: FBT001 - a case
    watched = Watched()
    tasks = [
        watched.supervisor.start("join", asyncio.Event().wait(), endless=endless),
        start_task(asyncio.Event().wait(), name="check"),
    ]
    await asyncio.sleep(0)
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    await asyncio.sleep(0)
    assert watched.failed == []


async def test_a_failed_task_is_reported_once_and_while_its_owner_keeps_it() -> None:
    async def fail() -> None:
        raise RuntimeError

    watched = Watched()
    kept = start_task(fail(), name="check")
    await asyncio.wait({kept})
    await asyncio.sleep(0)
    assert watched.failed == ["check"]
    del kept
    await asyncio.sleep(0)
    assert watched.failed == ["check"]
