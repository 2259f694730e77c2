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
    """How old the file may be."""

    def runner(self, clock: Clock) -> Run:
        """The age is the greater of two: by the time of day, and by ``clock`` since it was first seen.

        So a file with a time in the future (the clock was set back) ages, too.
        """
        lane = BlockingThread(f"check {self.name}")
        seen: tuple[int, float] | None = None

        async def run() -> None:
            nonlocal seen
            try:
                modified_ns = await run_blocking(lane, lambda: stat_file(self.path).st_mtime_ns)
            except OSError as error:
                raise CheckFailed(f"{self.path} cannot be examined: {error.strerror}") from error
            now = clock.now()
            if seen is None or seen[0] != modified_ns:
                seen = (modified_ns, now.mono)
            age_s = max(now.wall.timestamp() - modified_ns / 1e9, now.mono - seen[1])
            if age_s > self.max_age:
                raise CheckFailed(
                    f"{self.path} is {age_s:.1f} s old, must be at most {self.max_age:g} s"
                )

        return run
