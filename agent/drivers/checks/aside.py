"""How a single run fails, and how work that can block for ever is a part of one."""

from collections.abc import Callable
from typing import TypeVar

from agent.ops.blocking import BlockingThread, StuckError

T = TypeVar("T")


class Failed(Exception):  # noqa: N818 - an outcome of a run, not a fault of ours
    """A run of a check did not succeed; the message says why."""


async def run_in(lane: BlockingThread, work: Callable[[], T]) -> T:
    """Do blocking work, and return or raise what it does.

    Raises:
        Failed: the run before is still stuck, or there are no threads left.
    """
    try:
        return await lane.run(work)
    except StuckError as error:
        raise Failed(f"{error} (a dead network file system?)") from error
