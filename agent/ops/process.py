"""Run commands as child processes: start, signal and wait for them, without blocking the loop.

``Child`` is one command. A daemon thread of its own starts it and waits for it, because a start waits for
the kernel's exec, which on a dead network file system never returns. Knows nothing of roles, of limits, of
when a command has to stop, and of the processes that it leaves behind (ops/process_tree.py).

This process is a child subreaper, and so is each command: orphans become children of their command while it
lives, and ours afterwards, even if they have left the process group. ``OrphanReaper`` reaps only them. An
ended ``Child`` stays a zombie until ``release``, so that its process id is not reused and no later signal
hits another process.

Not promised: that a command ends. One that is stuck in the kernel survives even SIGKILL.
"""

import asyncio
import ctypes
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from agent import proctree
from agent.ops.blocking import BlockingThread, StuckError
from agent.ops.logs import Log
from agent.ops.reserve import run_in_thread
from agent.ops.tasks import start_task

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36

INHERITED = ("PATH", "HOME", "LANG", "TZ")
"""The variables that hooks, checks and progress commands have from the agent's own environment."""

NO_TENURE = "apart"
"""The mark of commands that do not belong to a tenure: demotion and notification hooks, checks, progress."""

REAP_S = 5.0
"""Interval of the reaper: a zombie costs nothing but its process id."""

MANY_ZOMBIES = 64
BUSY_REAP_S = 0.5
"""The shorter interval while there are more than MANY_ZOMBIES: they count as tasks, whose limit may be 1,000."""

OOM_SCORE = "/proc/{}/oom_score_adj"
TASKS = Path("/proc/self/task")

# With vfork the interpreter lock is held until the exec is done, so a dead disk would block every thread.
subprocess._USE_VFORK = False  # type: ignore[misc]  # noqa: SLF001 - the documented switch

_prctl: Callable[..., int] = ctypes.CDLL(None, use_errno=True).prctl  # loaded before any fork
_own: set[int] = set()
"""Children that this process has started and has not reaped. Global, like the kernel's list of children."""

log = Log(__name__)


def become_subreaper() -> None:
    """Adopt the orphans of our descendants. Call it once, before any command is started.

    From then on every command has a mark: an orphan without one has cleared its environment.
    """
    if _prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        log.warning("orphans are not adopted", reason=os.strerror(ctypes.get_errno()))
    os.environ.setdefault(proctree.MARK, NO_TENURE)


def mark(value: str) -> dict[str, str]:
    """The environment variable that identifies the processes of a tenure."""
    return {proctree.MARK: value}


def inherited_variables() -> dict[str, str]:
    """The variables that commands have from the agent's own environment, as far as it has them."""
    return {key: os.environ[key] for key in INHERITED if key in os.environ}


def clean_environment() -> dict[str, str]:
    """The environment of a check or a progress command: the inherited variables, and no tenure."""
    return {**inherited_variables(), **mark(NO_TENURE)}


def own_pids() -> frozenset[int]:
    """Process ids of the children that this process has started and has not reaped."""
    return frozenset(_own)


class Popen(subprocess.Popen[bytes]):
    """A child that is in ``own_pids`` from its fork until it is reaped."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "pid" and value is not None:
            _own.add(value)
        elif name == "returncode" and value is not None:
            _own.discard(self.pid)


class OrphanReaper:
    """Reaps adopted orphans, as process 1 does, inside one running loop.

    Args:
        on_interval: called each time before it reaps.
    """

    def __init__(self, on_interval: Callable[[], object] | None = None) -> None:
        self._on_interval = on_interval
        self._zombies: set[proctree.Process] = set()
        self._thread = BlockingThread("orphans")
        self._working = start_task(self._work(), name="orphans")

    def close(self) -> None:
        """Stop reaping."""
        self._working.cancel()

    async def _work(self) -> None:
        while True:
            await asyncio.sleep(BUSY_REAP_S if len(self._zombies) > MANY_ZOMBIES else REAP_S)
            if self._on_interval is not None:
                self._on_interval()
            if _has_zombies():
                with suppress(StuckError, OSError):  # tried again after the next interval
                    await self._thread.run(self.reap)

    def reap(self) -> None:
        """Reap each zombie that the previous call has also seen. May block, so call it in a thread.

        Other code in this process reaps its own children long before the second call.
        """
        us, own = os.getpid(), own_pids()
        found = {pid: proctree.read(pid) for pid in _children() if pid not in own}
        zombies = {
            (pid, stat.start)
            for pid, stat in found.items()
            if stat is not None and stat.parent == us and stat.state in proctree.ENDED
        }
        for pid, _ in zombies & self._zombies:
            with suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
        self._zombies = zombies


def _children() -> Iterable[int]:
    """Our children; all processes, where the kernel has no list of children."""
    found: list[bytes] = []
    try:
        for thread in TASKS.iterdir():
            with suppress(ProcessLookupError):  # it has ended
                found += (thread / "children").read_bytes().split()
    except FileNotFoundError:
        return proctree.snapshot()
    return map(int, found)


def _has_zombies() -> bool:
    try:
        return os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return False


@dataclass(frozen=True, slots=True)
class ExitResult:
    """How a command ended: one of the three is set, or none if other code has reaped it."""

    code: int | None = None
    signal: int | None = None
    error: Exception | None = None


class StoppedEarlyError(Exception):
    """The command was stopped before it was started, and never starts."""

    def __init__(self) -> None:
        super().__init__("it was stopped before it was started")


class _Popen(Popen):
    """Reports its process id right after the fork, while the constructor still waits for the exec."""

    def __init__(self, forked: Callable[[int], None], *args: Any, **kwargs: Any) -> None:
        self._forked = forked
        super().__init__(*args, **kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "pid" and value is not None:
            self._forked(value)


class Child:
    """One command, inside one running loop. ``start`` once; ``release`` last.

    Args:
        argv: program and arguments, no shell.
        before: called in the thread before the start; if it raises, the command is not started.
        on_forked: called in the loop once it has a process id, while its exec may still hang.
        on_started: called in the loop after the exec, with stdout and stderr where they are pipes.
        die_with_us: whether the kernel sends it SIGKILL when this process dies.
        subreaper: whether its orphans become its children. Not for a long-running command, which may never
            reap children that it has not started.
        cgroup: a cgroup directory to move it into; it and its parent are created where possible.
        vital: whether a demotion needs it: then its thread may be a reserved one (ops/reserve.py), and it keeps
            this process's protection from the OOM killer.
        options: of subprocess.Popen; ``start_new_session`` or ``process_group`` is needed.

    Attributes:
        pid: its process id, also its process group's; None until it is forked.
    """

    def __init__(
        self,
        argv: Sequence[str],
        *,
        before: Callable[[], None] | None = None,
        on_forked: Callable[[], None] | None = None,
        on_started: Callable[[IO[bytes] | None, IO[bytes] | None], None] | None = None,
        die_with_us: bool = False,
        subreaper: bool = True,
        cgroup: Path | None = None,
        vital: bool = False,
        **options: Any,
    ) -> None:
        self.pid: int | None = None
        self._argv = list(argv)
        self._before = before
        self._report_fork = on_forked
        self._on_started = on_started
        self._die_with_us = die_with_us
        self._subreaper = subreaper
        self._cgroup = cgroup
        self._vital = vital
        self._options = options
        self._loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[ExitResult] = self._loop.create_future()
        self._launched: asyncio.Future[None] = self._loop.create_future()
        self._popen: _Popen | None = None
        self._lock = threading.Lock()
        self._forking = self._running = self._stopped = False
        self._pending: signal.Signals | None = None
        self._identity: proctree.Process | None = None
        self._reaped = False

    @property
    def ended(self) -> bool:
        """Whether the end of its process has been noticed."""
        return self._ended.done()

    @property
    def identity(self) -> proctree.Process | None:
        """Process id and start time; None before the fork, after ``release``, and if it cannot be read."""
        return self._identity

    @property
    def group(self) -> int | None:
        """Its process group, until it is reaped."""
        return None if self._reaped else self.pid

    def start(self) -> None:
        """Start it, without waiting. A failure is not raised here, but is the result of ``wait``."""
        try:
            run_in_thread(self._work, vital=self._vital)
        except BlockingIOError as error:
            self._failed(error)

    async def launched(self) -> ExitResult | None:
        """Wait until it runs; return the result if it could not be started."""
        await asyncio.wait([self._launched])
        if self._ended.done() and self._ended.result().error is not None:
            return self._ended.result()
        return None

    async def wait(self) -> ExitResult:
        """Wait for its own process, not for its descendants. May be called repeatedly."""
        return await asyncio.shield(self._ended)

    def signal(self, number: signal.Signals) -> None:
        """Signal its process group, if any process of it is left.

        Before the fork a signal cancels the start, which may hang on a dead disk. Between fork and exec only
        SIGKILL has an effect at once; another signal is sent after the exec.

        Raises:
            PermissionError: no permission to signal any process of the group.
        """
        with self._lock:
            self._stopped = self._stopped or not self._forking
        if self._stopped:
            self._failed(StoppedEarlyError())
            return
        if self.pid is None or not (self._running or self.ended or number is signal.SIGKILL):
            self._pending = number
            return
        if self._reaped:
            return  # the process id may have been reused
        assert self.pid not in {0, 1, os.getpgrp()}  # noqa: S101 - our own mistake
        try:
            os.killpg(self.pid, number)
        except ProcessLookupError:
            if number is signal.SIGKILL and not self.ended:
                os.kill(self.pid, number)  # its process group does not exist yet

    def release(self) -> None:
        """Reap it: its process id may be reused, and its group is never signalled again."""
        assert self.ended, "a running command is not released"  # noqa: S101 - our own mistake
        self._identity, self._reaped = None, True
        if self._popen is not None:
            for pipe in (self._popen.stdout, self._popen.stderr):
                if pipe is not None:
                    pipe.close()
            self._popen.wait()
            self._popen = None

    # -- in the thread --------------------------------------------------------------------------

    def _work(self) -> None:
        inside = None
        try:
            if self._before is not None:
                self._before()
            if self._cgroup is not None:
                inside = _open_cgroup(self._cgroup)
            with self._lock:
                if self._stopped:
                    return
                self._forking = True
            popen = _Popen(
                self._on_forked, self._argv, preexec_fn=self._build_preexec(inside), **self._options
            )
        except Exception as error:  # noqa: BLE001 - returned by wait()
            if self.pid is not None and self.pid in _own:  # it was forked, and would run unnoticed
                for kill in (os.killpg, os.kill):
                    with suppress(OSError):
                        kill(self.pid, signal.SIGKILL)
            self._call_in_loop(self._failed, error)
            return
        finally:
            if inside is not None:
                os.close(inside)
        self._call_in_loop(self._on_exec, popen)
        result = None
        with suppress(ChildProcessError):  # not reaped here: see ``release``
            result = os.waitid(os.P_PID, popen.pid, os.WEXITED | os.WNOWAIT)
        self._call_in_loop(self._on_ended, result)

    def _build_preexec(self, inside: int | None) -> Callable[[], None]:
        us, die_with_us, subreaper = os.getpid(), self._die_with_us, self._subreaper

        def prepare() -> None:
            """Prepare the child, between fork and exec."""
            if subreaper:  # kept across exec, not inherited by fork
                _prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
            if die_with_us:
                _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
                if os.getppid() != us:  # the parent died before prctl
                    os._exit(1)
            if inside is not None:
                with suppress(OSError):  # without a cgroup its processes are found by other means
                    os.write(inside, b"0")

        return prepare

    def _on_forked(self, pid: int) -> None:
        with suppress(OSError, MemoryError):  # the process can be signalled nevertheless
            self._identity = proctree.identify(pid)
        self.pid = pid
        if not self._vital:
            _drop_oom_protection(pid)
        if self._pending is signal.SIGKILL:
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        if self._report_fork is not None:
            self._call_in_loop(self._report_fork)

    def _call_in_loop(self, callback: Callable[..., None], *arguments: object) -> None:
        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(callback, *arguments)

    # -- in the loop ----------------------------------------------------------------------------

    def _failed(self, error: Exception) -> None:
        self._identity = self.pid = None  # subprocess has reaped it if the exec failed
        self._reaped = True
        if not self._ended.done():
            self._ended.set_result(ExitResult(error=error))
            self._launched.set_result(None)

    def _on_exec(self, popen: _Popen) -> None:
        self._popen = popen
        self._running = True
        self._launched.set_result(None)
        if self._on_started is not None:
            self._on_started(popen.stdout, popen.stderr)
        if self._pending is not None:
            number, self._pending = self._pending, None
            with suppress(PermissionError):
                self.signal(number)

    def _on_ended(self, result: os.waitid_result | None) -> None:
        self._running = False
        if result is None:
            self._identity, self._reaped = None, True
            self._ended.set_result(ExitResult())
        elif result.si_code == os.CLD_EXITED:
            self._ended.set_result(ExitResult(code=result.si_status))
        else:
            self._ended.set_result(ExitResult(signal=result.si_status))


def _drop_oom_protection(pid: int) -> None:
    """Let the kernel's OOM killer choose a child before an agent that OOMScoreAdjust= protects.

    The child could not do this itself once it has become the user of hooks.
    """
    with suppress(OSError), Path(OOM_SCORE.format(pid)).open("r+b", buffering=0) as score:
        if score.read().startswith(b"-"):
            score.seek(0)
            score.write(b"0\n")


def _open_cgroup(directory: Path) -> int | None:
    with suppress(OSError):
        directory.parent.mkdir(exist_ok=True)
        directory.mkdir(exist_ok=True)
        return os.open(directory / "cgroup.procs", os.O_WRONLY | os.O_CLOEXEC)
    return None
