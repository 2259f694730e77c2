"""One step of a hook as a process (R11): start it, signal its process group, report its result.

Owns processes, their pipes and their process ids. Knows nothing of roles, of limits, and of when a hook
starts or stops (R7, R8): the caller decides that.

A step has its argv as configured, without a shell; its own session and process group; the directory, user
and variables of its ``HookContext``, and the FAILOVER_ variables; the payload as one JSON object on stdin;
no other open files. Its stdout and stderr go line by line into the log, up to the bounds below.

Not promised:
- A daemon that a hook leaves behind has to redirect its output: the pipes are closed ``LINGER_S`` after the
  hook's own end, and a later write to them fails (SIGPIPE).
- A process that leaves the group (setsid, setpgid) is not signalled with it; ``ProcessTree`` finds it.
"""

import asyncio
import errno
import hashlib
import json
import os
import pwd
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import IO, Any

from agent.drivers.hooks.check import RunAs
from agent.errors import ConfigError
from agent.ops.clock import Clock
from agent.ops.logs import Log
from agent.ops.process import NO_TENURE, Child, inherited_variables, mark
from agent.ops.tasks import start_task

RUN_BYTES = 64 * 1024
"""Bytes of one run's output that are logged: enough to find a fault, too few to fill a disk."""

RUN_LINES = 1000
"""Lines of one run's output that are logged: a line costs the event loop some 20 microseconds."""

LINE_BYTES = 4 * 1024
"""Bytes of one line that are logged; the journal splits lines at 48 KiB."""

CHUNK_BYTES = 4 * 1024
DRAIN_BYTES = 64 * 1024
"""Bytes per read while output is logged, and when it is discarded (a full pipe)."""

LAST_READS = 32
"""How often a pipe is read at the hook's end: the largest pipe of an ordinary user, 1 MiB, is emptied. Bounded, as
processes that the hook left behind may go on writing."""

LINGER_S = 0.1
"""How long output of a hook's children is read after the hook has ended."""

VITAL = frozenset({"secondary", "fence"})
"""Hooks that demote: they may use reserved threads (agent/ops/reserve.py)."""

log = Log(__name__)


@dataclass(frozen=True, slots=True)
class HookExit:
    """Result of a run or step: one of ``code``, ``signal`` and ``error`` is set.

    Attributes:
        code: the exit status, 0 for success.
        signal: the number of the signal that killed the hook.
        duration_s: from its start to its end, suspended time included.
        output_cut: bytes of output that were not logged, as known at the end.
        error: why it could not be started, why its result is unknown, or how a webhook failed.
        step: the file name of the deciding step, in a directory of scripts.
    """

    code: int | None
    signal: int | None
    duration_s: float
    output_cut: int = 0
    error: str | None = None
    step: str | None = None

    @property
    def ok(self) -> bool:
        """Whether the hook has succeeded."""
        return self.code == 0

    @property
    def why(self) -> str:
        """Readable result: ``exit 1``, ``20-database: killed by signal 9``."""
        if self.error is not None:
            text = self.error
        elif self.code is None:
            text = f"killed by signal {self.signal}"
        else:
            text = f"exit {self.code}"
        return f"{self.step}: {text}" if self.step is not None else text


@dataclass(frozen=True, slots=True)
class HookContext:
    """Working directory, user and environment of every step of a hook."""

    directory: str = "/"
    run_as: RunAs | None = None
    environment: Mapping[str, str] = field(default_factory=dict)

    def variables(self) -> dict[str, str]:
        """The environment without the FAILOVER_ variables."""
        own = inherited_variables()
        if self.run_as is not None and self.run_as.home is not None:
            own["HOME"] = self.run_as.home
        elif "HOME" not in own and (home := _own_home()) is not None:
            own["HOME"] = home
        return {**own, **self.environment}

    @property
    def digest(self) -> str:
        """Identifies it in a file that everybody may read; too short to reveal the value of a variable."""
        text = repr((self.directory, self.run_as, sorted(self.environment.items())))
        return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:4]

    @property
    def search_path(self) -> str:
        """The PATH on which env searches a script's interpreter."""
        return self.variables().get("PATH", os.defpath)


@cache
def _own_home() -> str | None:
    """The home directory of our user, for a service that was started without HOME."""
    try:
        return pwd.getpwuid(os.geteuid()).pw_dir
    except KeyError:
        return None


class _Output:
    """Logs both output streams of one run, up to the bounds. The pipes are always drained."""

    def __init__(self, name: str, epoch: str) -> None:
        self.cut_bytes = 0
        self._log_fields = {"hook": name, "epoch": int(epoch) if epoch else None}
        self._bytes_left = RUN_BYTES
        self._lines_left = RUN_LINES
        self._open: dict[int, tuple[IO[bytes], str, bytearray]] = {}
        self._loop = asyncio.get_running_loop()

    @property
    def is_open(self) -> bool:
        return bool(self._open)

    def follow(self, pipe: IO[bytes], stream: str) -> None:
        """Read ``pipe`` whenever it has data, and close it at its end."""
        fd = pipe.fileno()
        os.set_blocking(fd, False)
        self._open[fd] = (pipe, stream, bytearray())
        self._loop.add_reader(fd, self._read, fd)

    def read_rest(self) -> None:
        """Read what is already in the pipes."""
        for fd in list(self._open):
            for _ in range(LAST_READS):
                if not self._read(fd):
                    break

    def close(self) -> None:
        for fd in list(self._open):
            self._end(fd)
        if self.cut_bytes:
            log.warning("hook output cut", **self._log_fields, cut_bytes=self.cut_bytes)

    def _read(self, fd: int) -> bool:
        """Read once; return whether there may be more."""
        wanted = self._bytes_left > 0 and self._lines_left > 0
        try:
            data = os.read(fd, CHUNK_BYTES if wanted else DRAIN_BYTES)
        except BlockingIOError:
            return False
        if not data:
            self._end(fd)
            return False
        taken = data[: self._bytes_left] if wanted else b""
        self._bytes_left -= len(taken)
        self.cut_bytes += len(data) - len(taken)
        _, stream, line = self._open[fd]
        *ended, rest = taken.split(b"\n")
        for part in ended:
            self._append(line, part)
            self._log_line(stream, line)
        self._append(line, rest)
        return True

    def _append(self, line: bytearray, part: bytes) -> None:
        room = LINE_BYTES - len(line)
        line += part[:room]
        self.cut_bytes += max(0, len(part) - room)

    def _log_line(self, stream: str, line: bytearray) -> None:
        if line and self._lines_left > 0:
            self._lines_left -= 1
            text = line.decode(errors="replace")
            log.info("hook output", **self._log_fields, stream=stream, line=text)
        else:
            self.cut_bytes += len(line)
        line.clear()

    def _end(self, fd: int) -> None:
        pipe, stream, line = self._open.pop(fd)
        self._loop.remove_reader(fd)
        pipe.close()
        self._log_line(stream, line)


class HookProcess:
    """One step of a hook. Call ``start`` once; ``wait`` returns the result."""

    def __init__(self, name: str, clock: Clock, epoch: str, context: HookContext) -> None:
        self.name = name
        self.child: Child | None = None
        self._context = context
        self._clock = clock
        self._started_at = clock.boottime()
        self._loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[HookExit] = self._loop.create_future()
        self._output = _Output(name, epoch)
        self._lingering: asyncio.TimerHandle | None = None
        self._waiting: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        """Its process id, also that of its group and session; None until it is started."""
        return self.child.pid if self.child is not None else None

    @property
    def ended(self) -> bool:
        """Whether the end of the hook's own process has been noticed."""
        return self._ended.done()

    async def wait(self) -> HookExit:
        """Wait for the hook's own process, not for its descendants. May be called repeatedly."""
        return await asyncio.shield(self._ended)

    def term(self) -> None:
        """Send SIGTERM to the process group, if any process of it is left."""
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL to the process group, if any process of it is left."""
        self._signal(signal.SIGKILL)

    def release(self) -> None:
        """Reap an ended hook and close its pipes; its group is never signalled again.

        Until then the hook stays a zombie, so that its process id is not reused: a signal to its group
        reaches only processes that the hook left behind.
        """
        assert self.ended, "a running hook is not released"  # noqa: S101 - our own mistake
        if self._lingering:
            self._lingering.cancel()
            self._lingering = None
            self._output.close()
        if self.child is not None and self.child.ended:
            self.child.release()
            self.child = None

    def _signal(self, number: signal.Signals) -> None:
        if self.child is None:  # never started, or released
            return
        try:
            self.child.signal(number)
        except PermissionError:
            log.error(  # noqa: TRY400 - no traceback needed
                "no permission to signal hook", hook=self.name, pid=self.pid, signal=number.name
            )

    def start(
        self,
        argv: Sequence[str],
        env: Mapping[str, str],
        payload: Mapping[str, Any],
        before: Callable[[], None] | None = None,
        *,
        on_forked: Callable[[], None] | None = None,
        cgroup: Path | None = None,
    ) -> None:
        """Start it, once, without waiting. A failure is not raised here, but is the result of ``wait``.

        Args:
            argv: program and arguments.
            env: variables in addition to those of its context.
            payload: for its stdin.
            before: called in a thread before the start; if it raises, the hook is not started.
            on_forked: called once it has a process id.
            cgroup: the directory of a cgroup to move it into, if that can be created.
        """
        run_as = self._context.run_as
        try:
            stdin = _open_payload(json.dumps(payload).encode() + b"\n")
        except (OSError, ValueError) as error:
            self._output.close()
            self._finish(error=_start_error(argv, error))
            return
        self.child = Child(
            argv,
            before=before,
            on_forked=on_forked,
            on_started=self._follow,
            cgroup=cgroup,
            vital=self.name in VITAL,
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            cwd=self._context.directory,
            env={**self._context.variables(), **mark(NO_TENURE), **env},
            user=run_as.uid if run_as else None,
            group=run_as.gid if run_as else None,
            extra_groups=run_as.groups if run_as else None,
            start_new_session=True,
        )
        self.child.start()
        self._waiting = start_task(self._watch(self.child, stdin, argv))

    def _follow(self, stdout: IO[bytes] | None, stderr: IO[bytes] | None) -> None:
        for pipe, stream in ((stdout, "stdout"), (stderr, "stderr")):
            assert pipe is not None  # noqa: S101 - both were asked for
            self._output.follow(pipe, stream)

    async def _watch(self, child: Child, stdin: IO[bytes], argv: Sequence[str]) -> None:
        result = await child.wait()
        unread = ""
        try:
            stdin.close()
            self._output.read_rest()
        except Exception as fault:  # noqa: BLE001 - the task's edge: somebody waits for the result
            unread = str(fault) or type(fault).__name__
        if self._output.is_open:
            self._lingering = self._loop.call_later(LINGER_S, self._stop_reading)
        else:
            self._output.close()
        if unread:
            self._finish(error=f"its output could not be read: {unread}")
        elif isinstance(result.error, ConfigError):
            self._finish(error=str(result.error))
        elif result.error is not None:
            self._finish(error=_start_error(argv, result.error))
        elif result.code is None and result.signal is None:
            error = "its result is unknown: other code has reaped it, or SIGCHLD is ignored"
            self._finish(error=error)
            self.release()
        else:
            self._finish(code=result.code, signal=result.signal)

    def _stop_reading(self) -> None:
        self._lingering = None
        if self._output.is_open:
            log.warning(
                "hook left a process behind that holds its output: it is closed now",
                hook=self.name,
                pid=self.pid,
                resolution="redirect the output of what the hook starts",
            )
        self._output.close()

    def _finish(
        self, *, code: int | None = None, signal: int | None = None, error: str | None = None
    ) -> None:
        duration_s = self._clock.boottime() - self._started_at
        self._ended.set_result(HookExit(code, signal, duration_s, self._output.cut_bytes, error))


def _open_payload(data: bytes) -> IO[bytes]:
    """Return a file with the payload, for a hook's stdin. Raises OSError."""
    try:
        # A file in memory rather than a pipe: a hook that does not read its stdin blocks no writer.
        file = os.fdopen(os.memfd_create("payload"), "w+b", buffering=0)
    except OSError:
        return _payload_pipe(data)
    try:
        written = file.write(data)
        file.seek(0)
    except OSError:
        written = 0
    if written == len(data):
        return file
    file.close()  # RLIMIT_FSIZE also holds for a file in memory
    return _payload_pipe(data)


def _payload_pipe(data: bytes) -> IO[bytes]:
    """Return a pipe that contains the payload. Raises OSError if it is too long for one."""
    stdin, end = os.pipe()
    try:
        os.set_blocking(end, False)
        if os.write(end, data) != len(data):
            raise BlockingIOError(errno.EAGAIN, "the payload does not fit into a pipe")
    except OSError:
        os.close(stdin)
        raise
    finally:
        os.close(end)
    return os.fdopen(stdin, "rb", buffering=0)


def _start_error(argv: Sequence[str], error: Exception) -> str:
    match error:
        case FileNotFoundError():
            hint = "; do the program and the interpreter of its first line exist?"
        case OSError(errno=errno.ENOEXEC):
            hint = "; a script must begin with a line like #!/bin/sh"
        case _:
            hint = ""
    return f"{argv[0]} could not be started: {error}{hint}"
