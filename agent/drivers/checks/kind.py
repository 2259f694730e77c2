"""The base of every kind of check: its settings, its runner, and how a run fails.

A kind's file has one subclass of ``Check``: a dataclass that declares the keys of its table, and whose
``runner`` does the work. ``agent/schema/kinds.py`` lists the kinds.
"""

from abc import abstractmethod
from collections.abc import Awaitable, Callable
from typing import TypeVar

from agent.ops.blocking import BlockingThread, StuckError
from agent.ops.clock import Clock
from agent.schema.kinds import CheckSettings

T = TypeVar("T")

Run = Callable[[], Awaitable[None]]
"""One run: returns if it passes, raises CheckFailed if not, and cleans up when it is cancelled."""


class CheckFailed(Exception):  # noqa: N818 - an outcome of a run, not a fault of ours
    """A run of a check did not succeed; the message has the reason."""


class Check(CheckSettings):
    """Base of the kinds."""

    __slots__ = ()

    @abstractmethod
    def runner(self, clock: Clock) -> Run:
        """The runner of this check, called for one run at a time."""


async def run_blocking(lane: BlockingThread, work: Callable[[], T]) -> T:
    """Do blocking work in a thread, and return its result or raise its error.

    Raises:
        CheckFailed: the previous run is still stuck, or there are no threads left.
    """
    try:
        return await lane.run(work)
    except StuckError as error:
        raise CheckFailed(f"{error} (a dead network file system?)") from error
