"""The sources ``file`` and ``file_time``: the last line of a file, and its modification time.

The workload may own the directory while the agent is root: no link is followed, only a regular file is opened, and
no content is shown in an error.
"""

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar, Literal

from agent.drivers.progress.kind import PolledSource, Reader, read_blocking
from agent.drivers.progress.times import (
    LONGEST_TEXT,
    Reason,
    Refused,
    from_seconds,
    last_line,
    read_text,
)
from agent.files import open_regular, stat_file
from agent.ops.blocking import BlockingThread
from agent.schema.formats import AnyPath
from agent.schema.kinds import JsonKey


@dataclass(frozen=True, slots=True, kw_only=True)
class FileTimeProgress(PolledSource):
    """A file whose modification time is the time."""

    EXAMPLE: ClassVar[Mapping[str, Any]] = {
        "type": "file_time",
        "path": "/var/spool/collector/last",
        "interval": 1,
    }

    type: Literal["file_time"] = "file_time"
    path: AnyPath
    """The file (or directory); a symbolic link is refused."""

    def reader(self) -> Reader:
        return FileReader(self, lambda: from_seconds(stat_file(self.path).st_mtime))


@dataclass(frozen=True, slots=True, kw_only=True)
class FileProgress(PolledSource):
    """A file whose last line that is not empty is the time."""

    EXAMPLE: ClassVar[Mapping[str, Any]] = {
        "type": "file",
        "path": "/var/lib/collector/state.json",
        "key": "output.written_until",
    }

    type: Literal["file"] = "file"
    path: AnyPath
    """The file; its last 64 KiB are read. A symbolic link is refused."""
    key: JsonKey | None = None

    def reader(self) -> Reader:
        return FileReader(self, lambda: _read_content(self.path, self.key))


class FileReader:
    """Reads a file in a thread: its file system may be gone. A thread that hangs is left alone.

    Args:
        work: reads the time, in the thread.
    """

    def __init__(
        self, settings: FileProgress | FileTimeProgress, work: Callable[[], datetime]
    ) -> None:
        self._path = settings.path
        self._limit_s = settings.limit
        self._work = work
        self._lane = BlockingThread(f"progress {settings.path}")

    async def read(self) -> datetime:
        try:
            return await read_blocking(self._lane, self._work, self._limit_s)
        except OSError as error:
            text = f"{self._path} cannot be read: {error.strerror or error}"
            raise Refused(Reason.UNREADABLE, text) from error

    async def close(self) -> None:
        """Do nothing: each reading closes its file."""


def _read_content(path: Path, key: str | None) -> datetime:
    data, complete = _end_of(path)
    if not data.strip():
        raise Refused(Reason.NOT_A_TIME, f"{path} is empty")
    line, of_line = last_line(data), f"the last line of {path}"
    if not complete and len(line) == len(data.strip()):
        raise Refused(Reason.TOO_LONG, f"{of_line} has more than {LONGEST_TEXT} bytes")
    if key is None or not complete:
        return read_text(line, key, of_line)
    try:
        return read_text(data, key, f"the content of {path}")
    except Refused as refused:
        with suppress(Refused):  # one object a line
            return read_text(line, key, of_line)
        raise refused from None


def _end_of(path: Path) -> tuple[bytes, bool]:
    """The last bytes, and whether they are the complete file."""
    with os.fdopen(open_regular(path), "rb") as file:
        start = max(0, os.fstat(file.fileno()).st_size - LONGEST_TEXT)
        file.seek(start)
        return file.read(LONGEST_TEXT), start == 0
