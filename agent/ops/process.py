"""Run commands as child processes: start, signal, and learn how they ended, without blocking the loop.

``Child`` is one command. It is started and waited for in a daemon thread of its own, because a start
waits for the kernel's exec, which on a dead network file system never returns. Knows nothing of roles, of limits,
of when something is to be stopped, and of what a command leaves behind (ops/trees.py).

This process is a child subreaper, and so is each command's own process: orphans stay below it as long as
it lives and come to us afterwards, so that leaving the process group hides nobody. ``Orphans`` reaps them,
and only them: an ended ``Child`` stays a zombie until ``release``, which keeps its process id from being
given to a stranger that a later signal would hit.

Not promised: that a command ends. One that is stuck in the kernel survives even SIGKILL.
"""

import asyncio
import ctypes
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from agent import proctree
from agent.ops.blocking import Lane, StuckError
from agent.ops.logs import Log

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36

APART = "apart"
"""The mark of commands that belong to no tenure: demotion and notification hooks, checks, progress."""

REAP_S = 5.0
"""Between two looks for orphans: a zombie costs nothing but its process id."""

# With vfork the interpreter lock is held until the program is executed: a dead disk would stop every thread.
subprocess._USE_VFORK = False  # type: ignore[misc]  # noqa: SLF001 - the documented switch

_prctl: Callable[..., int] = ctypes.CDLL(None, use_errno=True).prctl  # loaded before any fork
_own: set[int] = set()
"""Child processes that this process has started and has not reaped. The kernel's table of children is of
the process, and so is this."""

log = Log(__name__)


def become_subreaper() -> None:
    """Have the orphans of our descendants come to us. Call it once, before anything is started.

    From then on everything that is started has a mark: an orphan without one has cleared its environment.
    """
    if _prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        log.warning("orphans are not adopted", reason=os.strerror(ctypes.get_errno()))
    os.environ.setdefault(proctree.MARK, APART)


def mark(value: str) -> dict[str, str]:
    """The environment variable by which processes of a tenure are found again."""
    return {proctree.MARK: value}


def own_pids() -> frozenset[int]:
    """Process ids of the children that this process has started and has not reaped."""
    return frozenset(_own)


class Popen(subprocess.Popen[bytes]):
    """A child that is not taken for an orphan, from its fork until it is reaped."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "pid" and value is not None:
            _own.add(value)
        elif name == "returncode" and value is not None:
            _own.discard(self.pid)


class Orphans:
    """Reaps adopted orphans, as process 1 does, inside one running loop.

    Args:
        look: called at each look for orphans.
    """

    def __init__(self, look: Callable[[], object] | None = None) -> None:
        self._look = look
        self._zombies: set[proctree.Process] = set()
        self._lane = Lane("orphans")
        self._working = asyncio.get_running_loop().create_task(self._work(), name="orphans")

    def close(self) -> None:
        """Reap no more."""
        self._working.cancel()

    async def _work(self) -> None:
        while True:
            await asyncio.sleep(REAP_S)
            if self._look is not None:
                self._look()
            if _has_zombies():
                with suppress(StuckError, OSError):  # the next look comes soon
                    await self._lane.run(self.reap)

    def reap(self) -> None:
        """Reap the zombies that were there at the last look, too. May block: for a thread.

        A child of other code of ours is waited for by that code, long before the second look.
        """
        us, own = os.getpid(), own_pids()
        zombies = {
            (pid, stat.start)
            for pid, stat in proctree.snapshot().items()
            if stat.parent == us and stat.state in proctree.ENDED and pid not in own
        }
        for pid, _ in zombies & self._zombies:
            with suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
        self._zombies = zombies


def _has_zombies() -> bool:
    try:
        return os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return False


@dataclass(frozen=True, slots=True)
class Ended:
    """How a command ended: one of the three is set, or none if somebody else has waited for it."""

    code: int | None = None
    signal: int | None = None
    error: Exception | None = None


class StoppedEarlyError(Exception):
    """A command was stopped before it was started, so it never is."""

    def __init__(self) -> None:
        super().__init__("it was stopped before it was started")


class _Popen(Popen):
    """Tells its process id as soon as it has forked, while the constructor still waits for the exec."""

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
        before: called in the thread before the start; what it raises is why it is not started.
        started: called in the loop with stdout and stderr, where they are pipes, after the exec.
        die_with_us: SIGKILL to it when this process dies.
        subreaper: its orphans stay below it, which is not for one that runs for long: it may never
            wait for children that it does not know.
        cgroup: a cgroup directory to move it into, if that can be made, with the one above it.
        options: as of subprocess.Popen; ``start_new_session`` or ``process_group`` is needed.

    Attributes:
        pid: its number, which is its process group's too; None until it was forked.
    """

    def __init__(
        self,
        argv: Sequence[str],
        *,
        before: Callable[[], None] | None = None,
        started: Callable[[IO[bytes] | None, IO[bytes] | None], None] | None = None,
        die_with_us: bool = False,
        subreaper: bool = True,
        cgroup: Path | None = None,
        **options: Any,
    ) -> None:
        self.pid: int | None = None
        self._argv = list(argv)
        self._before = before
        self._started = started
        self._die_with_us = die_with_us
        self._subreaper = subreaper
        self._cgroup = cgroup
        self._options = options
        self._loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[Ended] = self._loop.create_future()
        self._launched: asyncio.Future[None] = self._loop.create_future()
        self._popen: _Popen | None = None
        self._lock = threading.Lock()
        self._forking = self._running = self._stopped = False
        self._pending: signal.Signals | None = None
        self._identity: proctree.Process | None = None

    @property
    def ended(self) -> bool:
        """Whether it has ended, and that was noticed."""
        return self._ended.done()

    @property
    def identity(self) -> proctree.Process | None:
        """Number and start time; None until it was forked, and once it was released."""
        return self._identity

    def start(self) -> None:
        """Start it. Does not wait and does not raise: what cannot be started has ended."""
        try:
            threading.Thread(target=self._work, name=self._argv[0], daemon=True).start()
        except RuntimeError as error:
            self._failed(error)

    async def launched(self) -> Ended | None:
        """Wait until it runs; or how it ended, if it could not be started."""
        await asyncio.wait([self._launched])
        if self._ended.done() and self._ended.result().error is not None:
            return self._ended.result()
        return None

    async def wait(self) -> Ended:
        """Wait for its own process, not for what it left behind. May be called repeatedly."""
        return await asyncio.shield(self._ended)

    def signal(self, number: signal.Signals) -> None:
        """Signal its process group, if any of it is left.

        One that is not forked yet has ended with that: it may hang on a dead disk for ever, and is never
        started. Between fork and exec only SIGKILL has effect at once; another signal is sent after it.

        Raises:
            PermissionError: none of it may be signalled.
        """
        with self._lock:
            self._stopped = self._stopped or not self._forking
        if self._stopped:
            self._failed(StoppedEarlyError())
            return
        if self.pid is None or not (self._running or self.ended or number is signal.SIGKILL):
            self._pending = number
            return
        if self._identity is None:
            return  # released, or reaped by somebody else: the number may be a stranger's
        assert self.pid not in {0, 1, os.getpgrp()}  # noqa: S101 - our own mistake
        try:
            os.killpg(self.pid, number)
        except ProcessLookupError:
            if number is signal.SIGKILL and not self.ended:
                proctree.send(self._identity, number)  # it does not lead its group yet

    def release(self) -> None:
        """Reap it: its number is given back, and its group is never signalled again."""
        assert self.ended, "a running command is not released"  # noqa: S101 - our own mistake
        self._identity = None
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
                self._has_forked, self._argv, preexec_fn=self._preparation(inside), **self._options
            )
        except Exception as error:  # noqa: BLE001 - raised where it is waited for
            self._call(self._failed, error)
            return
        finally:
            if inside is not None:
                os.close(inside)
        self._call(self._has_started, popen)
        result = None
        with suppress(ChildProcessError):  # not reaped here: see ``release``
            result = os.waitid(os.P_PID, popen.pid, os.WEXITED | os.WNOWAIT)
        self._call(self._has_ended, result)

    def _preparation(self, inside: int | None) -> Callable[[], None]:
        us, die_with_us, subreaper = os.getpid(), self._die_with_us, self._subreaper

        def prepare() -> None:
            """In the child, between fork and exec."""
            if subreaper:
                _prctl(
                    PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0
                )  # kept across exec, not inherited by fork
            if die_with_us:
                _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
                if os.getppid() != us:  # we died before the line above
                    os._exit(1)
            if inside is not None:
                with suppress(OSError):  # then it is found by other means
                    os.write(inside, b"0")

        return prepare

    def _has_forked(self, pid: int) -> None:
        self._identity = proctree.identify(pid)
        self.pid = pid
        if self._pending is signal.SIGKILL:
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)

    def _call(self, callback: Callable[[Any], None], argument: object) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(callback, argument)

    # -- in the loop ----------------------------------------------------------------------------

    def _failed(self, error: Exception) -> None:
        self._identity = self.pid = None  # subprocess has reaped one whose exec has failed
        if not self._ended.done():
            self._ended.set_result(Ended(error=error))
            self._launched.set_result(None)

    def _has_started(self, popen: _Popen) -> None:
        self._popen = popen
        self._running = True
        self._launched.set_result(None)
        if self._started is not None:
            self._started(popen.stdout, popen.stderr)
        if self._pending is not None:
            number, self._pending = self._pending, None
            with suppress(PermissionError):
                self.signal(number)

    def _has_ended(self, result: os.waitid_result | None) -> None:
        self._running = False
        if result is None:
            self._identity = None
            self._ended.set_result(Ended())
        elif result.si_code == os.CLD_EXITED:
            self._ended.set_result(Ended(code=result.si_status))
        else:
            self._ended.set_result(Ended(signal=result.si_status))


def _open_cgroup(directory: Path) -> int | None:
    with suppress(OSError):
        directory.parent.mkdir(exist_ok=True)
        directory.mkdir(exist_ok=True)
        return os.open(directory / "cgroup.procs", os.O_WRONLY | os.O_CLOEXEC)
    return None
