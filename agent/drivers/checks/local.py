"""The ``tcp``, ``file_age`` and ``process`` checks: what this host can see by itself."""

import asyncio
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from agent.drivers.checks.aside import Failed, run_in
from agent.ops.blocking import BlockingThread
from agent.ops.clock import Clock
from agent.settings.values import FileAgeCheck, ProcessCheck, TcpCheck

PID_FILE_BYTES = 64
"""Of a pid file that are read: its first line is the number."""

COMM_CHARS = 15
"""To which the kernel cuts a command name (TASK_COMM_LEN)."""

STAT_STATE, STAT_STARTED = 0, 19
"""Fields of /proc/PID/stat, counted from after the command name: proc(5) has 2 more before."""

GONE = frozenset("ZXx")
"""States of a process that has ended."""

DELETED = " (deleted)"
"""What /proc/PID/exe ends with once a program was replaced by an update."""


class Connect:
    """Runs a ``tcp`` check."""

    def __init__(self, check: TcpCheck) -> None:
        self._address = check.address

    async def __call__(self) -> None:
        """Return if the address takes a connection. Raises Failed."""
        try:
            _, writer = await asyncio.open_connection(*self._address)
        except OSError as error:
            why = error.strerror or str(error)
            raise Failed(f"{self._address} takes no connection: {why}") from error
        writer.close()
        with suppress(OSError):  # it was taken, whatever happened then
            await writer.wait_closed()


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
        """Return if the file is young enough. Raises Failed."""
        path, most = self._check.path, self._check.max_age
        try:
            modified_ns = await run_in(self._lane, lambda: path.stat().st_mtime_ns)
        except OSError as error:
            raise Failed(f"{path} cannot be looked at: {error.strerror}") from error
        now = self._clock.now()
        if self._seen is None or self._seen[0] != modified_ns:
            self._seen = (modified_ns, now.mono)
        age_s = max(now.wall.timestamp() - modified_ns / 1e9, now.mono - self._seen[1])
        if age_s > most:
            raise Failed(f"{path} is {age_s:.1f} s old, must be at most {most:g} s")


class _Found(NamedTuple):
    """A process that runs. ``started`` is in ticks since the boot: with the pid, it names it."""

    pid: int
    comm: str
    started: int


def _look(pid: int) -> _Found | None:
    """The process of this number, or None if there is none (any more)."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
        status = Path(f"/proc/{pid}/status").read_text(errors="replace")
    except OSError:
        return None
    head, _, rest = stat.rpartition(")")
    fields = rest.split()
    if f"\nTgid:\t{pid}\n" not in status or fields[STAT_STATE] in GONE:
        return None  # the number of a thread, or a zombie
    return _Found(pid, head.partition("(")[2], int(fields[STAT_STARTED]))


def _is_named(found: _Found, name: str) -> bool:
    if found.comm == name[:COMM_CHARS]:
        return True
    try:
        exe = Path(f"/proc/{found.pid}/exe").readlink().name
    except OSError:  # of another user, or gone
        return False
    return exe.removesuffix(DELETED) == name


def _all() -> Iterator[_Found]:
    for entry in os.listdir("/proc"):  # noqa: PTH208 - Path objects of all processes cost more
        if entry.isdecimal() and (found := _look(int(entry))):
            yield found


class Process:
    """Runs a ``process`` check.

    A reused number is found by the process's start: while the pid file stays the same file with the
    same modification time, it must name the process that it named before. The file's time is not
    compared with the process's start, since the time of day jumps when a host without a battery
    gets its time after the boot; the name finds what was reused across a boot.
    """

    def __init__(self, check: ProcessCheck) -> None:
        self._check = check
        self._lane = BlockingThread(f"check {check.name}")
        self._known: tuple[tuple[int, ...], int | None] | None = None
        self._last: int | None = None
        """Which process had the name when it was last looked for."""

    async def __call__(self) -> None:
        """Return if the process runs. Raises Failed."""
        try:
            await run_in(self._lane, self._see)
        except OSError as error:
            raise Failed(f"{self._check.pid_file} cannot be read: {error.strerror}") from error

    def _see(self) -> None:
        name = self._check.process
        if self._check.pid_file is not None:
            self._see_pid_file(self._check.pid_file, name)
        elif not self._is_there(name or ""):
            raise Failed(f"no process is named {name}")

    def _is_there(self, name: str) -> bool:
        """Whether a process of the name runs: first the one that did, then all of this host."""
        last = _look(self._last) if self._last is not None else None
        if last is None or not _is_named(last, name):
            named = (found.pid for found in _all() if _is_named(found, name))
            self._last = next(named, None)
        return self._last is not None

    def _see_pid_file(self, path: Path, name: str | None) -> None:
        with path.open("rb") as file:
            stat = os.fstat(file.fileno())
            text = file.read(PID_FILE_BYTES).partition(b"\n")[0].strip()
        if not text.isdigit() or not 0 < int(text) < 2**31:
            raise Failed(f"{path} must begin with a process number, not {text!r}")
        pid = int(text)
        found = _look(pid)
        identity = (stat.st_ino, stat.st_mtime_ns, pid)
        if self._known is None or self._known[0] != identity:
            self._known = (identity, found.started if found else None)
        if found is None:
            self._known = (identity, None)
            raise Failed(f"{path} names process {pid}, which does not run")
        if found.started != self._known[1]:
            raise Failed(f"{path} names process {pid}, which is another one by now: {found.comm}")
        if name is not None and not _is_named(found, name):
            raise Failed(f"{path} names process {pid}, which is {found.comm} and not {name}")
