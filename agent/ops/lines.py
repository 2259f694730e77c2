"""Write lines in a thread to a descriptor that may block, such as a pipe that nobody reads.

Owns a bounded queue and one daemon thread that writes. Callers never block: a line that does not fit is
dropped and counted, and once writing works again one line reports, at that place, how many are missing.
Knows nothing of what the lines mean.

Not promised: that a line was written when the process is killed. ``flush`` waits, up to a limit.
"""

import _thread
import io
import os
import select
import signal
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

MOST_BYTES = 256 * 1024
"""Bound of the queue in bytes, some 2,000 lines: the agent has to stay small, and a reader that is further behind
has stopped reading."""

BULK_BYTES = MOST_BYTES * 3 // 4
"""The part of the queue that bulk lines may use, so that output of other programs never displaces our own lines."""

RESUME_BYTES = MOST_BYTES // 2
"""After a drop, bulk lines are queued again only below this, so that gaps are few and long."""

LONGEST_PART = 8192
"""The most characters without a newline that ``StderrLines`` buffers."""


class _Entry(NamedTuple):
    """A queued line; ``missing``: how many dropped lines it reports, 0 for an ordinary line."""

    data: bytes
    missing: int


class LineWriter:
    """A queue of lines to one descriptor. Any thread may put lines, without blocking.

    Args:
        fd: the descriptor. It is not closed.
        report: formats the line that reports a number of dropped lines.
    """

    def __init__(self, fd: int, report: Callable[[int], str]) -> None:
        self.fd = fd
        self.report = report
        self.dropped = 0
        """Number of dropped lines: the queue was full, or writing failed."""
        self._missing = 0
        self._queue: deque[_Entry] = deque()
        self._bytes = 0
        self._working = True
        self._started = False
        # Reentrant: a signal handler that logs may interrupt put() in the same thread.
        self._changed = threading.Condition(threading.RLock())
        os.register_at_fork(after_in_child=self._on_fork)

    def start(self) -> None:
        """Start the thread, unless it runs. ``put`` does so, too, but by then the system may have no thread left.

        ``threading.Thread.start`` would wait until the thread runs: for ever, if memory is lacking.
        """
        with self._changed:
            if not self._started:
                with suppress(RuntimeError, MemoryError):  # the next line tries again
                    _thread.start_new_thread(self._work, ())
                    self._started = True

    def put(self, line: str, *, bulk: bool = False) -> None:
        """Queue a line, without its newline, or drop it. Never blocks, never raises.

        Args:
            line: its text.
            bulk: whether to leave the reserve (MOST_BYTES - BULK_BYTES) to other lines.
        """
        data = line.encode(errors="backslashreplace") + b"\n"
        with self._changed:
            if not self._has_room(len(data), bulk=bulk):
                self.dropped += 1
                self._missing += 1
                return
            if self._missing and self._bytes <= RESUME_BYTES:
                self._append_report()
            self._append(_Entry(data, 0))
        self.start()

    def flush(self, limit_s: float) -> bool:
        """Wait until every line is written or dropped; return False if the limit is over first."""
        with self._changed:
            if not self._started:
                return not self._queue
            return self._changed.wait_for(lambda: not self._queue, limit_s)

    def _has_room(self, size: int, *, bulk: bool) -> bool:
        if not self._queue:
            return True
        if not bulk:
            return self._bytes + size <= MOST_BYTES
        return self._bytes + size <= (RESUME_BYTES if self._missing else BULK_BYTES)

    def _append(self, entry: _Entry) -> None:
        self._queue.append(entry)
        self._bytes += len(entry.data)
        self._changed.notify_all()

    def _append_report(self) -> None:
        missing, self._missing = self._missing, 0
        data = self.report(missing).encode(errors="backslashreplace") + b"\n"
        self._append(_Entry(data, missing))

    def _work(self) -> None:
        # Leave signals to the main thread, which may be blocked in a call that they have to interrupt.
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        while True:
            entry = self._next()
            written = self._write(entry.data)
            with self._changed:
                self._working = written
                self._queue.popleft()
                self._bytes -= len(entry.data)
                if not written:
                    self._missing += entry.missing or 1
                    self.dropped += not entry.missing
                self._changed.notify_all()

    def _next(self) -> _Entry:
        """Wait for an entry. It stays in the queue until it is written, for ``flush``."""
        with self._changed:
            while not self._queue:
                if self._missing and self._working:
                    self._append_report()
                else:
                    self._changed.wait()
            return self._queue[0]

    def _write(self, data: bytes) -> bool:
        rest = memoryview(data)
        while rest:
            try:
                rest = rest[os.write(self.fd, rest) :]
            except BlockingIOError:  # another process that shares it made it non-blocking
                select.select([], [self.fd], [])
            except OSError:  # the reader is gone, or the disk is full
                return False
        return True

    def _on_fork(self) -> None:
        """In a forked child, forget the parent's lines, its thread, and a lock that the thread may have held."""
        self._changed = threading.Condition(threading.RLock())
        self._started = False
        self._queue.clear()
        self._bytes = self._missing = 0


class StderrLines(io.TextIOBase):
    """A ``sys.stderr`` that never blocks: it passes complete lines to a ``LineWriter``."""

    encoding = "utf-8"
    errors = "backslashreplace"

    def __init__(self, writer: LineWriter) -> None:
        super().__init__()
        self._writer = writer
        self._part = ""

    def fileno(self) -> int:
        """The underlying descriptor, for child processes."""
        return self._writer.fd

    def isatty(self) -> bool:
        """Whether the lines go to a terminal."""
        return os.isatty(self._writer.fd)

    def writable(self) -> bool:
        """True."""
        return True

    def write(self, text: str) -> int:
        """Queue the lines that ``text`` completes."""
        *lines, self._part = (self._part + text).split("\n")
        if len(self._part) > LONGEST_PART:
            lines.append(self._part)
            self._part = ""
        for line in lines:
            self._writer.put(line)
        return len(text)
