"""The ``file_age`` check: whether a file was written lately."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from agent.drivers.checks.kind import Check, CheckFailed, Run, run_blocking
from agent.files import stat_file
from agent.ops.blocking import BlockingThread
from agent.ops.clock import Clock
from agent.schema.formats import AbsolutePath, Duration


@dataclass(frozen=True, slots=True, kw_only=True)
class FileAgeCheck(Check):
    """Passes if a file was written lately."""

    EXAMPLE: ClassVar[Mapping[str, Any]] = {
        "name": "spool",
        "type": "file_age",
        "path": "/var/spool/collector/last",
        "max_age": 60,
    }

    type: Literal["file_age"] = "file_age"
    path: AbsolutePath
    """The file (or directory) whose modification time counts; a symbolic link is refused."""
    max_age: Duration
    """How old it may be."""

    def runner(self, clock: Clock) -> Run:
        return FileAge(self, clock)


class FileAge:
    """Runs a ``file_age`` check.

    The age is the greater of two: by the time of day, and by our own clock since this modification
    time was first seen. So a file from "the future" (a clock that was set back) ages too.
    """

    def __init__(self, check: FileAgeCheck, clock: Clock) -> None:
        self._check = check
        self._clock = clock
        self._lane = BlockingThread(f"check {check.name}")
        self._seen: tuple[int, float] | None = None

    async def __call__(self) -> None:
        """Return if the file is young enough. Raises CheckFailed."""
        path, most = self._check.path, self._check.max_age
        try:
            modified_ns = await run_blocking(self._lane, lambda: stat_file(path).st_mtime_ns)
        except OSError as error:
            raise CheckFailed(f"{path} cannot be examined: {error.strerror}") from error
        now = self._clock.now()
        if self._seen is None or self._seen[0] != modified_ns:
            self._seen = (modified_ns, now.mono)
        age_s = max(now.wall.timestamp() - modified_ns / 1e9, now.mono - self._seen[1])
        if age_s > most:
            raise CheckFailed(f"{path} is {age_s:.1f} s old, must be at most {most:g} s")
