"""Load credentials and certificates again when their files change, without losing the role.

Owns detecting a change, by the files' status. If changed files cannot be used, that is logged once and the former
contents stay in force until the files are right. Knows nothing of the files' contents.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from agent.errors import ConfigError, FailoverError
from agent.files import Signatures, signatures
from agent.ops.blocking import BlockingThread, StuckError
from agent.ops.clock import Clock
from agent.ops.logs import Log

T = TypeVar("T")

POLL_S = 5.0
"""Interval at which the status of unchanged files is read: a change is in force within two intervals."""

LONGEST_LOAD_S = 10.0
"""Timeout for reading some files of a few KiB; their file system may hang."""

FIRST_RETRY_S, LONGEST_RETRY_S = 1.0, 3.0
"""Backoff between attempts with changed files that are wrong, or that a server refuses: it may learn of new credentials
later than the agent. The longest delay is less than half of R with the default L."""

log = Log(__name__)


@dataclass(slots=True)
class _Watched:
    """Files that are loaded together.

    Attributes:
        name: for the log.
        load: reads them, in a thread; raises ConfigError.
        use: puts what was loaded into force, or raises FailoverError.
        loaded: the signature of the files in force.
        tried: the signature of the files that were tried last.
        failing: whether it was logged that the files cannot be used.
    """

    name: str
    files: tuple[Path, ...]
    load: Callable[[], Any]
    use: Callable[[Any], Awaitable[None]]
    lane: BlockingThread
    loaded: Signatures = ()
    tried: Signatures = ()
    failing: bool = False
    retry_at: float = 0.0
    retry_s: float = FIRST_RETRY_S

    def settle(self, signature: Signatures) -> None:
        """Record that the contents of the files are in force."""
        self.loaded = self.tried = signature
        self.failing, self.retry_s = False, FIRST_RETRY_S


class CredentialFiles:
    """The credentials of one agent."""

    def __init__(self, clock: Clock | None = None) -> None:
        self._clock = clock or Clock()
        self._watched: list[_Watched] = []
        self._lock = asyncio.Lock()

    async def load(
        self,
        name: str,
        files: Iterable[Path],
        load: Callable[[], T],
        use: Callable[[T], Awaitable[None]],
    ) -> T:
        """Load files for the first time, and follow them from now on.

        Args:
            name: for the log.
            files: the files that ``load`` reads.
            load: reads them; may block, and raises ConfigError.
            use: called with the new contents after a change; raises FailoverError to keep the former ones.

        Raises:
            ConfigError: as ``load``, or the files were not read in time.
        """
        watched = _Watched(name, tuple(files), load, use, BlockingThread(f"{name} files"))
        watched.settle(await _run(watched, partial(signatures, watched.files)))
        value: T = await _run(watched, load)
        if watched.files:
            self._watched.append(watched)
        return value

    async def follow(self) -> None:
        """Put changed files into force, until cancelled. Call ``load`` before."""
        if not self._watched:
            await asyncio.Event().wait()
        while True:
            pending = any(one.tried != one.loaded for one in self._watched)
            await asyncio.sleep(min(POLL_S, FIRST_RETRY_S) if pending else POLL_S)
            for watched in self._watched:
                async with self._lock:
                    await self._check(watched)

    async def reload(self) -> None:
        """Load all files now, whether they have changed or not; log those that cannot be used."""
        for watched in self._watched:
            async with self._lock:
                watched.failing = False
                await self._replace(watched)

    async def _check(self, watched: _Watched) -> None:
        try:
            signature = await _run(watched, partial(signatures, watched.files))
        except FailoverError as error:
            _log_failure(watched, error)
            return
        if signature == watched.loaded:
            watched.settle(signature)
        elif signature != watched.tried:  # quiet: a file may still be half written
            watched.tried, watched.retry_s = signature, FIRST_RETRY_S
            await self._replace(watched, quiet=True)
        elif self._clock.boottime() >= watched.retry_at:
            await self._replace(watched)

    async def _replace(self, watched: _Watched, *, quiet: bool = False) -> None:
        """Load and use the files; ``quiet``: do not log a failure."""
        try:
            signature = await _run(watched, partial(signatures, watched.files))
            await watched.use(await _run(watched, watched.load))
        except FailoverError as error:
            watched.retry_at = self._clock.boottime() + watched.retry_s
            if not quiet:
                watched.retry_s = min(LONGEST_RETRY_S, 2 * watched.retry_s)
                _log_failure(watched, error)
            return
        watched.settle(signature)
        log.info("credentials read again", of=watched.name)


def _log_failure(watched: _Watched, error: FailoverError) -> None:
    if not watched.failing:
        watched.failing = True
        log.error(
            "credentials not changed",
            of=watched.name,
            reason=error,
            resolution="correct the files; until then the former ones are used",
        )


async def _run(watched: _Watched, work: Callable[[], T]) -> T:
    try:
        return await watched.lane.run(work, timeout_s=LONGEST_LOAD_S)
    except TimeoutError:
        raise ConfigError(
            f"reading {', '.join(map(str, watched.files))} took longer than {LONGEST_LOAD_S:g} s;"
            " their file system must answer"
        ) from None
    except StuckError as error:
        raise ConfigError(str(error)) from None
