"""The ``process`` check: whether a process runs on this host."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

from agent import proctree
from agent.drivers.checks.kind import Check, CheckFailed, Run, run_blocking
from agent.files import open_regular
from agent.ops.blocking import BlockingThread
from agent.ops.clock import Clock
from agent.schema.formats import AbsolutePath, Text

PID_FILE_BYTES = 64
"""How many bytes of a pid file are read: its first line is the process id."""

COMM_CHARS = 15
"""The longest command name in /proc: the kernel cuts longer ones (TASK_COMM_LEN)."""

STAT_STATE, STAT_STARTED = 0, 19
"""Fields of /proc/PID/stat, counted from after the command name: proc(5) has 2 more before."""

GONE = frozenset("ZXx")
"""States of a process that has ended."""

DELETED = " (deleted)"
"""The end of /proc/PID/exe once an update has replaced the program."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessCheck(Check):
    """Passes if a process runs."""

    EXAMPLE: ClassVar[Mapping[str, Any]] = {
        "name": "broker",
        "type": "process",
        "pid_file": "/run/broker.pid",
        "process": "mosquitto",
    }

    type: Literal["process"] = "process"
    pid_file: AbsolutePath | None = None
    """File with the process id. The check fails if the id was reused for another process while the file
    stayed the same. Not set: any process of that name."""
    process: Text | None = None
    """The process's name: its command name in /proc/PID/comm (as ps shows it, cut to 15
    characters) or the name of the file in /proc/PID/exe. With pid_file: that process must also
    have this name, which finds numbers reused across a restart. Not set: any name."""

    def runner(self, clock: Clock) -> Run:  # noqa: ARG002 - as every kind
        return Process(self)

    def contradictions(self) -> Iterator[tuple[str, str]]:
        yield from Check.contradictions(self)
        if self.pid_file is None and self.process is None:
            yield "pid_file", "needs pid_file, process or both"


class _Found(NamedTuple):
    """A running process, identified by its id and its start, in clock ticks since the boot."""

    pid: int
    comm: str
    started: int


def _read_process(pid: int) -> _Found | None:
    """The process with this id, or None if there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
        status = Path(f"/proc/{pid}/status").read_text(errors="replace")
    except OSError:
        return None
    head, _, rest = stat.rpartition(")")
    fields = rest.split()
    started = int(fields[STAT_STARTED])
    if f"\nTgid:\t{pid}\n" not in status:
        return None  # the id of a thread, not of a process
    if fields[STAT_STATE] in GONE and not proctree.lives((pid, started)):
        return None  # a zombie, unless only its main thread has ended
    return _Found(pid, head.partition("(")[2], started)


def _is_named(found: _Found, name: str) -> bool:
    if found.comm == name[:COMM_CHARS]:
        return True
    try:
        exe = Path(f"/proc/{found.pid}/exe").readlink().name
    except OSError:  # of another user, or gone
        return False
    return exe.removesuffix(DELETED) == name


def _all_processes() -> Iterator[_Found]:
    for entry in os.listdir("/proc"):  # noqa: PTH208 - Path objects of all processes cost more
        if entry.isdecimal() and (found := _read_process(int(entry))):
            yield found


class Process:
    """Runs a ``process`` check.

    A reused process id is detected by the process's start: while the pid file stays the same file with
    the same modification time, it must name the same process. The file's time is not compared with the
    process's start, since the time of day jumps when a host without a battery gets its time after the
    boot. The name detects ids that were reused after a boot.
    """

    def __init__(self, check: ProcessCheck) -> None:
        self._check = check
        self._lane = BlockingThread(f"check {check.name}")
        self._known: tuple[tuple[int, ...], int | None] | None = None
        self._last: int | None = None
        """The process that had the name at the last search."""

    async def __call__(self) -> None:
        """Return if the process runs. Raises CheckFailed."""
        try:
            await run_blocking(self._lane, self._check_now)
        except OSError as error:
            raise CheckFailed(f"{self._check.pid_file} cannot be read: {error.strerror}") from error

    def _check_now(self) -> None:
        name = self._check.process
        if self._check.pid_file is not None:
            self._check_pid_file(self._check.pid_file, name)
        elif not self._is_running(name or ""):
            raise CheckFailed(f"no process is named {name}")

    def _is_running(self, name: str) -> bool:
        """Whether a process of the name runs: reads the last known one first, then all of this host."""
        last = _read_process(self._last) if self._last is not None else None
        if last is None or not _is_named(last, name):
            named = (found.pid for found in _all_processes() if _is_named(found, name))
            self._last = next(named, None)
        return self._last is not None

    def _check_pid_file(self, path: Path, name: str | None) -> None:
        with os.fdopen(open_regular(path), "rb") as file:
            stat = os.fstat(file.fileno())
            text = file.read(PID_FILE_BYTES).partition(b"\n")[0].strip()
        if not text.isdigit() or not 0 < int(text) < 2**31:  # not shown: it may be another file's
            raise CheckFailed(f"{path} must begin with a process number, and does not")
        pid = int(text)
        found = _read_process(pid)
        identity = (stat.st_ino, stat.st_mtime_ns, pid)
        if self._known is None or self._known[0] != identity:
            self._known = (identity, found.started if found else None)
        if found is None:
            self._known = (identity, None)
            raise CheckFailed(f"{path} names process {pid}, which does not run")
        if found.started != self._known[1]:
            raise CheckFailed(
                f"{path} names process {pid}, which is another process by now: {found.comm}"
            )
        if name is not None and not _is_named(found, name):
            raise CheckFailed(f"{path} names process {pid}, which is {found.comm} and not {name}")
