"""The workload of ``failover-agent exec``: one command that runs only while this member is primary.

Owns its process, process group and, where one can be created, cgroup. Knows nothing of roles: the caller starts and
stops the command; this module restarts it by its policy, and reports when it gives up.

The command inherits our stdout, stderr, working directory and environment, and gets /dev/null as stdin and
the FAILOVER_ variables. The kernel kills it when the agent dies (PDEATHSIG), and the guard its descendants.
"""

import asyncio
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from enum import StrEnum
from pathlib import Path

from agent import proctree
from agent.errors import ConfigError, ExitCode
from agent.ops import process
from agent.ops.blocking import StuckError
from agent.ops.clock import Clock
from agent.ops.logs import Log
from agent.ops.process import Child, ExitResult
from agent.ops.process_tree import SEARCH_S, SEARCH_SHARE, ProcessTree
from agent.ops.tasks import start_task

POLL_S = 0.01
"""Interval of the check whether a stopped process tree is gone."""

FIRST_DELAY_S = 0.5
LONGEST_DELAY_S = 30.0
"""Backoff between two starts: doubled each time, and reset after a run of the longest delay."""

MAX_DOUBLINGS = 16
"""Cap of the exponent, so that the delay cannot overflow."""

KILL_SHARE = 0.5
GIVE_UP_SHARE = 0.75
"""Shares of the demotion budget after which the workload is killed, and is waited for no longer: the hook has the rest."""

GIVE_UP_AFTER = 5
"""Failures in a row after which another member should take over."""

UNKNOWN = "unknown: SIGCHLD is ignored, or other code has reaped it"

log = Log(__name__)


class Restart(StrEnum):
    """Restart policy for a command that ends by itself."""

    ALWAYS = "always"
    ON_FAILURE = "on-failure"
    NEVER = "never"


class Workload:
    """One command, started and stopped any number of times, inside one running loop.

    Args:
        argv: program and arguments; a program without a slash is searched on PATH.
        ended: called when the command has ended by itself and is not restarted, with the exit status
            (128 + n for signal n), or None after too many failures.
        changed: called when ``pgid`` and ``identity`` have changed: the command was forked, or is gone.
        cgroup: the directory for a cgroup of its own, or None where none can be created.
        mark: identifies its processes (ops/process.py).
    """

    def __init__(
        self,
        argv: Sequence[str],
        clock: Clock,
        restart: Restart,
        ended: Callable[[int | None], None],
        *,
        changed: Callable[[], None] = lambda: None,
        cgroup: Path | None = None,
        mark: str,
    ) -> None:
        self._argv = argv
        self._clock = clock
        self._restart = restart
        self._ended = ended
        self._changed = changed
        self._cgroup = cgroup
        self._mark = mark
        self._env: Mapping[str, str] = {}
        self._child: Child | None = None
        self._tree: ProcessTree | None = None
        self._watching: asyncio.Task[None] | None = None
        self._killing: asyncio.Task[str | None] | None = None
        self._restart_timer: asyncio.TimerHandle | None = None
        self._restarting: asyncio.Task[None] | None = None
        self._wanted = False
        self._short_runs = 0
        self._failed_runs = 0
        self._started_at = float("-inf")

    @property
    def pgid(self) -> int | None:
        """Its process group, until it is released."""
        return self._child.group if self._child is not None else None

    @property
    def identity(self) -> proctree.Process | None:
        """Process id and start time of the command, until it is released."""
        return self._child.identity if self._child is not None else None

    @property
    def cgroup(self) -> Path | None:
        """The cgroup of the command, or None."""
        made = self._cgroup is not None and (self._cgroup / "cgroup.kill").exists()
        return self._cgroup if made else None

    async def start(self, env: Mapping[str, str]) -> str | None:
        """Start the workload with the variables of a tenure; return None, or why it could not be started."""
        self._env = env
        self._wanted = True
        self._short_runs = self._failed_runs = 0
        return await self._spawn()

    async def stop_within(self, limit_s: float) -> bool:
        """Stop the workload, with KILL after ``KILL_SHARE``; return whether all its processes ended in time."""
        killing = asyncio.get_running_loop().call_later(KILL_SHARE * limit_s, self.kill)
        try:
            async with asyncio.timeout(GIVE_UP_SHARE * limit_s):
                await self.stop(min(SEARCH_S, SEARCH_SHARE * limit_s))
        except TimeoutError:
            log.error("workload not stopped in time", limit_s=GIVE_UP_SHARE * limit_s)  # noqa: TRY400 - no traceback needed
            return False
        finally:
            killing.cancel()
        return True

    async def stop(self, search_s: float = SEARCH_S) -> None:
        """Send TERM to all of its processes, and wait until none is left; ``kill`` shortens the wait.

        Args:
            search_s: how long the search for them may delay the TERM to its process group.
        """
        self._cancel_restart()
        tree = self._tree
        if tree is not None:  # find descendants before they become orphans
            with suppress(StuckError):
                await tree.find_in_thread(search_s)
        self._signal(signal.SIGTERM)
        if tree is not None:
            await tree.signal(signal.SIGTERM)
        while await self._is_alive():  # noqa: ASYNC110 - the kernel has no event for the end of a tree
            await asyncio.sleep(POLL_S)
        for task in filter(None, (self._watching, self._killing)):
            await asyncio.wait({task})  # if it fails, that is reported
        self._release()

    def kill(self) -> None:
        """Send KILL to all of its processes."""
        self._cancel_restart()
        self._signal(signal.SIGKILL)
        if self._tree is not None and (self._killing is None or self._killing.done()):
            self._killing = start_task(self._tree.kill())

    def send_signal(self, number: int) -> bool:
        """Send a signal to the command's own process; return whether it runs."""
        if self._child is None or self._child.ended or self._child.identity is None:
            return False
        try:
            return proctree.send(self._child.identity, number)
        except OSError:
            return False

    # -- small steps --------------------------------------------------------------------------

    def _cancel_restart(self) -> None:
        """Cancel the next start, if one is due."""
        self._wanted = False
        if self._restart_timer is not None:
            self._restart_timer.cancel()
            self._restart_timer = None

    async def _spawn(self) -> str | None:
        self._restart_timer = None
        self._started_at = self._clock.boottime()
        self._tree = ProcessTree(self._mark)
        child = self._child = Child(
            self._argv,
            on_forked=self._changed,  # an exec may hang
            die_with_us=True,
            subreaper=False,
            cgroup=self._cgroup,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **self._env, **process.mark(self._mark)},
            process_group=0,
        )
        child.start()
        failed = await child.launched()
        if failed is not None:
            self._changed()
            return f"{self._argv[0]} could not be started: {failed.error}"
        self._tree.add(child)
        if self.cgroup is not None:
            self._tree.cgroup = self.cgroup
        log.info("workload started", pid=child.pid, epoch=self._env.get("FAILOVER_EPOCH"))
        self._watching = start_task(self._watch(child))
        return None

    async def _watch(self, child: Child) -> None:
        status, how = _status(await child.wait())
        seconds = self._clock.boottime() - self._started_at
        log.info("workload ended", pid=child.pid, result=how, seconds=seconds)
        if self._wanted:
            await self._on_own_end(status)

    async def _on_own_end(self, status: int) -> None:
        if self._tree is not None:  # its descendants must not outlive it
            left = await self._tree.kill()
            if left is not None:
                log.error("workload left processes behind", reason=left)
        if not self._wanted:
            return
        failed = status != 0
        if self._restart is Restart.NEVER or (self._restart is Restart.ON_FAILURE and not failed):
            self._wanted = False
            self._ended(status)
            return
        if self._clock.boottime() - self._started_at >= LONGEST_DELAY_S:
            self._short_runs = self._failed_runs = 0
        self._short_runs += 1
        self._failed_runs = self._failed_runs + 1 if failed else 0
        if self._failed_runs >= GIVE_UP_AFTER:
            self._wanted = False
            self._ended(None)
            return
        doublings = min(self._short_runs - 1, MAX_DOUBLINGS)
        delay_s = min(FIRST_DELAY_S * 2**doublings, LONGEST_DELAY_S)
        log.warning("workload restart scheduled", after_s=delay_s, failed=self._failed_runs)
        self._restart_timer = asyncio.get_running_loop().call_later(delay_s, self._start_again)

    def _start_again(self) -> None:
        self._restart_timer = None
        self._restarting = start_task(self._spawn_again())

    def _is_cancelled(self) -> bool:
        return not self._wanted

    async def _spawn_again(self) -> None:
        if self._is_cancelled():
            return
        self._release()
        why = await self._spawn()
        if not self._wanted:  # stopped while it was being started
            self.kill()
        elif why is not None:
            log.error("workload not started", reason=why)
            await self._on_own_end(127)

    async def _is_alive(self) -> bool:
        """Whether any of its processes is alive, zombies excepted."""
        if self._restarting is not None and not self._restarting.done():
            return True
        if self._child is None or self._tree is None:
            return False
        if not self._child.ended:
            return True  # no search of /proc is needed
        return not await self._tree.gone()

    def _signal(self, number: signal.Signals) -> None:
        if self._child is not None:
            try:
                self._child.signal(number)
            except PermissionError:
                log.error(  # noqa: TRY400 - no traceback needed
                    "no permission to signal workload",
                    pid=self._child.pid,
                    signal=number.name,
                    resolution="run the agent as the user that the command becomes",
                )

    def _release(self) -> None:
        """Reap the process, and remove the cgroup."""
        if self._child is not None and self._child.ended:
            self._child.release()
            self._child = None
            self._changed()
        if self._cgroup is not None:
            with suppress(OSError):
                self._cgroup.rmdir()


def _status(ended: ExitResult) -> tuple[int, str]:
    """The exit status as in a shell, and a readable result."""
    if ended.code is not None:
        return ended.code, f"exit {ended.code}"
    if ended.signal is None:
        return 255, UNKNOWN
    try:
        name = signal.Signals(ended.signal).name
    except ValueError:  # most real-time signals have no name
        name = f"signal {ended.signal}"
    return 128 + ended.signal, name


def check_workload(argv: Sequence[str]) -> None:
    """Reject a command that could not be started.

    Raises:
        ConfigError: HOOK_MISSING or HOOK_NOT_EXECUTABLE; the message names the program.
    """
    program = argv[0]
    if shutil.which(program) is not None:
        return
    found = shutil.which(program, mode=os.F_OK)
    if found is None:
        wrong = "is not a file" if "/" in program else "is not in any directory on PATH"
        text = f"command {program} {wrong}; name a program that exists"
        raise ConfigError(text, exit_code=ExitCode.HOOK_MISSING)
    raise ConfigError(
        f"command {found} may not be executed; chmod +x {found}",
        exit_code=ExitCode.HOOK_NOT_EXECUTABLE,
    )
