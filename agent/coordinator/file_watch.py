"""Detect changed files by reading their metadata every few seconds.

Owns when a changed file is to be read; knows nothing of its content. A change counts once two checks in a row have
found the same metadata, so that a file is rarely read while it is being written. Not promised: to detect a change on
a file system that keeps neither times nor inode numbers.
"""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from agent.files import Signatures, signatures
from agent.ops.blocking import BlockingThread, StuckError

WATCH_S = 2.0
"""Interval of the checks: a renewed certificate is in use after 4 s, and checking five files costs nothing."""

READ_S = 10.0
"""How long a check waits for a disk that may hang."""


class FileWatch:
    """Waits for a change of files.

    Args:
        paths: returns the files to watch.
        lane: runs the blocking calls.
        handled: the files' signatures, taken before the contents in force were read.
        every_s: interval of the checks.
    """

    def __init__(
        self,
        paths: Callable[[], Sequence[Path]],
        lane: BlockingThread,
        handled: Signatures,
        every_s: float = WATCH_S,
    ) -> None:
        self._paths = paths
        self._lane = lane
        self._every_s = every_s
        self._handled = self._last = handled

    async def wait(self, hangup: asyncio.Event) -> bool:
        """Return as soon as ``hangup`` is set (which is cleared), or the files have changed.

        Returns:
            Whether it was ``hangup``. The change is not reported again, whatever the caller does.
        """
        while True:
            try:
                async with asyncio.timeout(self._every_s):
                    await hangup.wait()
            except TimeoutError:
                if await self._has_changed():
                    return False
            else:
                hangup.clear()
                self._handled = await self._read_signatures()
                return True

    async def _has_changed(self) -> bool:
        before, now = self._last, await self._read_signatures()
        if now == self._handled or now != before:
            return False
        self._handled = now
        return True

    async def _read_signatures(self) -> Signatures:
        paths = self._paths()
        if paths:
            with suppress(StuckError, TimeoutError):
                self._last = await self._lane.run(lambda: signatures(paths), timeout_s=READ_S)
        return self._last
