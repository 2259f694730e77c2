"""The workload of ``failover-agent exec``: one command that runs only while this member is primary.

Owns its process, its process group and, where one can be made, its cgroup. Knows nothing of roles:
it starts, stops and restarts when it is told to, and says when the command has ended for good.

The command gets our stdout, stderr and working directory, /dev/null as stdin, our environment and
the FAILOVER_ variables. It is killed when the agent dies (PDEATHSIG); the guard sees to the rest.
Its processes are found as agent/proctree.py says, also where no cgroup can be made.
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
from agent.ops.process_tree import ProcessTree

POLL_S = 0.01
"""How often a group that is being stopped is looked at."""

FIRST_DELAY_S = 0.5
LONGEST_DELAY_S = 30.0
"""Between two starts; doubled each time, from the first again after a run of the longest."""

DOUBLINGS = 16
"""More than it takes from the first delay to the longest; no power of two grows for ever."""

GIVE_UP_AFTER = 5
"""Failed starts in a row after which another member is to try."""

UNKNOWN = "not known: SIGCHLD is ignored, or somebody else has waited for it"

log = Log(__name__)


class Restart(StrEnum):
    """What follows when the command ends by itself."""

    ALWAYS = "always"
    ON_FAILURE = "on-failure"
    NEVER = "never"


class Workload:
    """One command, started and stopped any number of times, inside one running loop.

    Args:
        argv: program and arguments; a program without a slash is looked for on PATH.
        ended: called with the exit status (128 + n for signal n) when it has ended by itself and
            is not to be started again; None: it fails again and again.
        cgroup: the directory for a cgroup of its own, or None where none can be made.
        mark: by which its processes are found again (ops/process.py).
    """

    def __init__(
        self,
        argv: Sequence[str],
        clock: Clock,
        restart: Restart,
        ended: Callable[[int | None], None],
        *,
        cgroup: Path | None = None,
        mark: str = "workload",
    ) -> None:
        self._argv = argv
        self._clock = clock
        self._restart = restart
        self._ended = ended
        self._cgroup = cgroup
        self._mark = mark
        self._env: Mapping[str, str] = {}
        self._child: Child | None = None
        self._tree: ProcessTree | None = None
        self._watching: asyncio.Task[None] | None = None
        self._killing: asyncio.Task[str | None] | None = None
        self._again: asyncio.TimerHandle | None = None
        self._restarting: asyncio.Task[None] | None = None
        self._wanted = False
        self._short = 0
        self._failed = 0
        self._started_at = float("-inf")

    @property
    def pgid(self) -> int | None:
        """Its process group, while any of it may live."""
        return self._child.pid if self._child is not None and self._child.identity else None

    @property
    def identity(self) -> proctree.Process | None:
        """Number and start time of its own process, while any of it may live."""
        return self._child.identity if self._child is not None else None

    @property
    def cgroup(self) -> Path | None:
        """Its cgroup, if it has one."""
        made = self._cgroup is not None and (self._cgroup / "cgroup.kill").exists()
        return self._cgroup if made else None

    async def start(self, env: Mapping[str, str]) -> str | None:
        """Start it with the variables of a tenure; why it could not be started, or None."""
        self._env = env
        self._wanted = True
        self._short = self._failed = 0
        return await self._spawn()

    async def stop(self) -> None:
        """TERM to all of its processes; back when nothing of it lives. ``kill`` hurries it."""
        self._call_off()
        tree = self._tree
        if (
            tree is not None
        ):  # descendants are orphans as soon as the command ends: know them before
            with suppress(StuckError):
                await tree.find_in_thread()
        self._signal(signal.SIGTERM)
        if tree is not None:
            await tree.signal(signal.SIGTERM)
        while await self._lives():  # noqa: ASYNC110 - nothing tells when the last of a tree is gone
            await asyncio.sleep(POLL_S)
        if self._watching is not None:
            await self._watching
        if self._killing is not None:
            await self._killing
        self._forget()

    def kill(self) -> None:
        """KILL to all of its processes."""
        self._call_off()
        self._signal(signal.SIGKILL)
        if self._tree is not None and (self._killing is None or self._killing.done()):
            self._killing = asyncio.get_running_loop().create_task(self._tree.kill())

    def send_signal(self, number: int) -> bool:
        """Send a signal to the command's main process; whether it runs."""
        if self._child is None or self._child.ended or self._child.identity is None:
            return False
        try:
            return proctree.send(self._child.identity, number)
        except OSError:
            return False

    # -- small steps --------------------------------------------------------------------------

    def _call_off(self) -> None:
        """It is not started again."""
        self._wanted = False
        if self._again is not None:
            self._again.cancel()
            self._again = None

    async def _spawn(self) -> str | None:
        self._again = None
        self._started_at = self._clock.boottime()
        self._tree = ProcessTree(self._mark)
        child = self._child = Child(
            self._argv,
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
            return f"{self._argv[0]} could not be started: {failed.error}"
        self._tree.add(child)
        if self.cgroup is not None:
            self._tree.cgroup = self.cgroup
        log.info("workload started", pid=child.pid, epoch=self._env.get("FAILOVER_EPOCH"))
        self._watching = asyncio.get_running_loop().create_task(self._watch(child))
        return None

    async def _watch(self, child: Child) -> None:
        status, how = _status(await child.wait())
        seconds = self._clock.boottime() - self._started_at
        log.info("workload ended", pid=child.pid, result=how, seconds=seconds)
        if self._wanted:
            await self._end_by_itself(status)

    async def _end_by_itself(self, status: int) -> None:
        if self._tree is not None:  # what it left behind does not outlive it
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
            self._short = self._failed = 0
        self._short += 1
        self._failed = self._failed + 1 if failed else 0
        if self._failed >= GIVE_UP_AFTER:
            self._wanted = False
            self._ended(None)
            return
        delay_s = min(FIRST_DELAY_S * 2 ** min(self._short - 1, DOUBLINGS), LONGEST_DELAY_S)
        log.warning("workload is started again", after_s=delay_s, failed=self._failed)
        self._again = asyncio.get_running_loop().call_later(delay_s, self._start_again)

    def _start_again(self) -> None:
        self._again = None
        self._restarting = asyncio.get_running_loop().create_task(self._spawn_again())

    def _is_called_off(self) -> bool:
        return not self._wanted

    async def _spawn_again(self) -> None:
        if self._is_called_off():
            return
        self._forget()
        why = await self._spawn()
        if not self._wanted:  # stopped while it was being started
            self.kill()
        elif why is not None:
            log.error("workload not started", reason=why)
            await self._end_by_itself(127)

    async def _lives(self) -> bool:
        """Whether anything of it is more than a zombie."""
        if self._restarting is not None and not self._restarting.done():
            return True
        if self._child is None or self._tree is None:
            return False
        if not self._child.ended:
            return True  # itself, which is known without a look at every process there is
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

    def _forget(self) -> None:
        """Reap it; its numbers are given back."""
        if self._child is not None and self._child.ended:
            self._child.release()
            self._child = None
        if self._cgroup is not None:
            with suppress(OSError):
                self._cgroup.rmdir()


def _status(ended: ExitResult) -> tuple[int, str]:
    """The exit status as a shell has it, and how it ended, for people."""
    if ended.code is not None:
        return ended.code, f"exit {ended.code}"
    if ended.signal is None:
        return 255, UNKNOWN
    try:
        name = signal.Signals(ended.signal).name
    except ValueError:  # most real-time signals have none
        name = f"signal {ended.signal}"
    return 128 + ended.signal, name


def check_workload(argv: Sequence[str]) -> None:
    """Refuse a command that could not be started.

    Raises:
        ConfigError: HOOK_MISSING or HOOK_NOT_EXECUTABLE; the message says which and where.
    """
    program = argv[0]
    if shutil.which(program) is not None:
        return
    found = shutil.which(program, mode=os.F_OK)
    if found is None:
        raise ConfigError(
            f"command {program} is not there"
            + (": no folder on PATH has it" if "/" not in program else "")
            + "; name a program that exists, after --",
            exit_code=ExitCode.HOOK_MISSING,
        )
    raise ConfigError(
        f"command {found} may not be executed; chmod +x {found}",
        exit_code=ExitCode.HOOK_NOT_EXECUTABLE,
    )
