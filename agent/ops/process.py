"""Run commands as child processes: start, signal, and learn how they ended, without blocking the loop.

``Child`` is one command. It is started and waited for in a daemon thread of its own, because a start
waits for the kernel's exec, which on a dead network file system never returns. ``Tree`` is all that a
tenure's commands have started, directly or not (agent/proctree.py finds it). Knows nothing of roles, of
limits and of when something is to be stopped.

This process is a child subreaper, and so is each command's own process: orphans stay below it as long as
it lives and come to us afterwards, so that leaving the process group hides nobody. Orphans of ours are
reaped here, and only they: an ended ``Child`` stays a zombie until ``release``, which keeps its number
from being given to a stranger that a later signal would hit.

Not promised: that a command ends. One that is stuck in the kernel survives even SIGKILL.
"""

import asyncio
import ctypes
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
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

REAP_S = 1.0
"""Orphans are looked for at most this often."""

KILL_S = 2.0
"""How long the end of killed processes is waited for; only the kernel can hold one up for longer."""

CGROUP_ROOT = Path("/sys/fs/cgroup")

_prctl: Callable[..., int] = ctypes.CDLL(None, use_errno=True).prctl  # loaded before any fork
_own: set[int] = set()
"""Child processes that this process has started and has not reaped. The kernel's table of children is of
the process, and so is this."""

log = Log(__name__)


def become_subreaper() -> None:
    """Have the orphans of our descendants come to us. Call it once, before anything is started."""
    _prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def mark(value: str) -> dict[str, str]:
    """The environment variable by which processes of a tenure are found again."""
    return {proctree.MARK: value}


def register(pid: int) -> None:
    """Note a child that other code of ours waits for, so that it is not taken for an orphan."""
    _own.add(pid)


def unregister(pid: int) -> None:
    """Forget a child that was waited for."""
    _own.discard(pid)


def orphans(table: Mapping[int, proctree.Stat]) -> dict[int, proctree.Stat]:
    """Children that came to us when their parents ended, zombies too."""
    me = os.getpid()
    return {pid: stat for pid, stat in table.items() if stat.parent == me and pid not in _own}


def reap_orphans() -> None:
    """Reap the orphans that have ended."""
    for pid, stat in orphans(proctree.snapshot()).items():
        if stat.state in proctree.ENDED:
            with suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)


@dataclass(frozen=True, slots=True)
class Ended:
    """How a command ended: one of the three is set, or none if somebody else has waited for it."""

    code: int | None = None
    signal: int | None = None
    error: Exception | None = None


class _Popen(subprocess.Popen[bytes]):
    """Tells its number as soon as it has forked, while the constructor still waits for the exec."""

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
        cgroup: a cgroup directory to move it into, if that can be made.
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
        cgroup: Path | None = None,
        **options: Any,
    ) -> None:
        self.pid: int | None = None
        self._argv = list(argv)
        self._before = before
        self._started = started
        self._die_with_us = die_with_us
        self._cgroup = cgroup
        self._options = options
        self._loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[Ended] = self._loop.create_future()
        self._launched: asyncio.Future[None] = self._loop.create_future()
        self._popen: _Popen | None = None
        self._running = False
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

        Before the exec only SIGKILL has effect at once; another signal is sent after it.

        Raises:
            PermissionError: none of it may be signalled.
        """
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
            unregister(self._popen.pid)
            self._popen = None

    # -- in the thread --------------------------------------------------------------------------

    def _work(self) -> None:
        inside = None
        try:
            if self._before is not None:
                self._before()
            if self._pending is signal.SIGKILL:
                raise RuntimeError("it was killed before it could be started")  # noqa: TRY301
            if self._cgroup is not None:
                inside = _open_cgroup(self._cgroup)
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
        us, die_with_us = os.getpid(), self._die_with_us

        def prepare() -> None:
            """In the child, between fork and exec."""
            _prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # kept across exec, not inherited by fork
            if die_with_us:
                _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
                if os.getppid() != us:  # we died before the line above
                    os._exit(1)
            if inside is not None:
                with suppress(OSError):  # then it is found by other means
                    os.write(inside, b"0")

        return prepare

    def _has_forked(self, pid: int) -> None:
        register(pid)
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
        if self.pid is not None:  # the exec has failed, and subprocess has reaped it
            unregister(self.pid)
            self._identity = self.pid = None
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


class Tree:
    """All processes of one tenure, or of one command: found anew at each look.

    Args:
        value: of their mark. Commands whose mark begins with it and a full stop belong to it, too.
        adopts: orphans that came to us meanwhile, and say of themselves nothing else, belong to it.

    Attributes:
        groups: process groups, which are sessions too.
        roots: known processes.
        cgroup: the directory of their cgroup, if there is one.
    """

    def __init__(self, value: str, *, adopts: bool = False) -> None:
        self.value = value
        self._adopts = adopts
        self.groups: set[int] = set()
        self.roots: set[proctree.Process] = set()
        self.cgroup: str | None = None
        self._lane = Lane(f"processes of {value}")
        table = proctree.snapshot()
        self._spared = {(pid, stat.start) for pid, stat in orphans(table).items()}

    def add(self, child: Child) -> None:
        """Count a command, and all that it starts, to the tenure."""
        if child.pid is not None and child.identity is not None:
            self.groups.add(child.pid)
            self.roots.add(child.identity)

    def find(self) -> set[proctree.Process]:
        """Every process of it that lives. May block: for a thread."""
        table = proctree.snapshot()
        marked = proctree.with_mark(table, self.value)
        if self._adopts:
            apart = proctree.with_mark(table, APART)
            adopted = {(pid, stat.start) for pid, stat in orphans(table).items()}
            self.roots |= adopted - self._spared - apart
        found = proctree.related(table, list(self.groups), list(self.roots)) | marked
        if self.cgroup is not None:
            found |= proctree.in_cgroup(table, self.cgroup)
        return found

    async def look(self) -> set[proctree.Process]:
        """Every process of it that lives. Raises StuckError if an earlier look has not come back."""
        return await self._lane.run(self.find)

    async def signal(self, number: signal.Signals) -> None:
        """Signal every process of it."""

        def send() -> None:
            for process in self.find():
                with suppress(OSError):
                    proctree.send(process, number)

        with suppress(StuckError):
            await self._lane.run(send)

    async def kill(self, limit_s: float = KILL_S) -> str | None:
        """Kill every process of it; None once nothing lives, else why something does."""
        lane = Lane(f"killing the processes of {self.value}")  # not kept waiting by a look
        try:
            left = await lane.run(lambda: self._kill(limit_s), timeout_s=limit_s + KILL_S)
        except (StuckError, TimeoutError):
            return f"the processes of {self.value} cannot be looked at within {limit_s:g} s"
        if not left:
            return None
        shown = ", ".join(f"{pid} ({_state_of(pid)})" for pid, _ in sorted(left)[:5])
        return f"{len(left)} processes of {self.value} cannot be killed: {shown}"

    def _kill(self, limit_s: float) -> set[proctree.Process]:
        if self.cgroup is not None:
            with suppress(OSError):
                Path(self.cgroup, "cgroup.kill").write_text("1")
        return proctree.kill_all(self.find, time.monotonic() + limit_s)


def _state_of(pid: int) -> str:
    stat = proctree.read(pid)
    return "gone" if stat is None else f"state {chr(stat.state)}"


def own_cgroup() -> Path | None:
    """The directory of our own cgroup (version 2) if one can be made below it, else None."""
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            number, _, path = line.split(":", 2)
            directory = CGROUP_ROOT / path.lstrip("/")
            writable = (directory / "cgroup.kill").exists() and os.access(directory, os.W_OK)
            if number == "0" and writable:
                return directory
    return None


def _open_cgroup(directory: Path) -> int | None:
    with suppress(OSError):
        directory.mkdir(exist_ok=True)
        return os.open(directory / "cgroup.procs", os.O_WRONLY | os.O_CLOEXEC)
    return None
