"""The workload of ``failover-agent exec``: one command that runs only while this member is primary.

Owns its process, its process group and, where one can be made, its cgroup. Knows nothing of roles:
it starts, stops and restarts when it is told to, and says when the command has ended for good.

The command gets our stdout, stderr and working directory, /dev/null as stdin, our environment and
the FAILOVER_ variables. It is killed when the agent dies (PDEATHSIG); the guard sees to the rest of its
group. What is not promised: where no cgroup can be made, a process that leaves the group by setsid
is not stopped with it.
"""

import asyncio
import ctypes
import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from enum import StrEnum
from pathlib import Path

from agent.errors import ConfigError, ExitCode
from agent.ops.clock import Clock
from agent.ops.logs import Log

PR_SET_PDEATHSIG = 1
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

CGROUP_ROOT = Path("/sys/fs/cgroup")

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
        cgroup: the folder of a cgroup of ours in which one can be made for it, or None.
    """

    def __init__(
        self,
        argv: Sequence[str],
        clock: Clock,
        restart: Restart,
        ended: Callable[[int | None], None],
        *,
        cgroup: Path | None = None,
    ) -> None:
        self._argv = argv
        self._clock = clock
        self._restart = restart
        self._ended = ended
        self._cgroup = cgroup / f"workload-{os.getpid()}" if cgroup is not None else None
        self._env: Mapping[str, str] = {}
        self._process: subprocess.Popen[bytes] | None = None
        self._watching: asyncio.Task[None] | None = None
        self._again: asyncio.TimerHandle | None = None
        self._wanted = False
        self._short = 0
        self._failed = 0
        self._started_at = float("-inf")
        self._prctl = ctypes.CDLL(None, use_errno=True).prctl  # loaded before any fork

    @property
    def pgid(self) -> int | None:
        """Its process group, while any of it may live."""
        return self._process.pid if self._process is not None else None

    @property
    def cgroup(self) -> Path | None:
        """Its cgroup, if it has one."""
        return self._cgroup if self._cgroup is not None and self._cgroup.is_dir() else None

    def start(self, env: Mapping[str, str]) -> str | None:
        """Start it with the variables of a tenure; why it could not be started, or None."""
        self._env = env
        self._wanted = True
        self._short = self._failed = 0
        return self._spawn()

    async def stop(self) -> None:
        """TERM to its group and cgroup; back when nothing of it lives. ``kill`` hurries it."""
        self._call_off()
        self._signal(signal.SIGTERM)
        self._term_strays()
        while self._lives():  # noqa: ASYNC110 - nothing tells when the last of a group is gone
            await asyncio.sleep(POLL_S)
        if self._watching is not None:
            await self._watching
        self._forget()

    def kill(self) -> None:
        """KILL to its group and cgroup."""
        self._call_off()
        self._kill()

    def send_signal(self, number: int) -> bool:
        """Send a signal to the command's main process; whether it runs.

        Its number is its own until ``_forget`` has reaped it, also as a zombie.
        """
        if self._process is None or self._watching is None or self._watching.done():
            return False
        try:
            os.kill(self._process.pid, number)
        except OSError:
            return False
        return True

    # -- small steps --------------------------------------------------------------------------

    def _call_off(self) -> None:
        """It is not started again."""
        self._wanted = False
        if self._again is not None:
            self._again.cancel()
            self._again = None

    def _spawn(self) -> str | None:
        self._again = None
        self._started_at = self._clock.boottime()
        agent = os.getpid()
        inside = None
        if self._cgroup is not None:
            with suppress(OSError):
                self._cgroup.mkdir(exist_ok=True)
                inside = os.open(self._cgroup / "cgroup.procs", os.O_WRONLY | os.O_CLOEXEC)

        def prepare() -> None:
            """In the child, between fork and exec."""
            self._prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != agent:  # it died before the line above
                os._exit(1)
            if inside is not None:
                with suppress(OSError):  # then its group alone is what is stopped
                    os.write(inside, b"0")

        try:
            self._process = subprocess.Popen(  # noqa: S603 - what the operator says
                list(self._argv),
                stdin=subprocess.DEVNULL,
                env={**os.environ, **self._env},
                process_group=0,
                preexec_fn=prepare,  # noqa: PLW1509 - one prctl, loaded before
            )
        except (OSError, subprocess.SubprocessError) as error:
            return f"{self._argv[0]} could not be started: {error}"
        finally:
            if inside is not None:
                os.close(inside)
        log.info("workload started", pid=self._process.pid, epoch=self._env.get("FAILOVER_EPOCH"))
        self._watching = asyncio.get_running_loop().create_task(self._watch(self._process))
        return None

    async def _watch(self, process: subprocess.Popen[bytes]) -> None:
        loop = asyncio.get_running_loop()
        noticed: asyncio.Future[os.waitid_result | None] = loop.create_future()

        def notice(result: os.waitid_result | None) -> None:
            if not noticed.done():
                noticed.set_result(result)

        def wait() -> None:
            # Not reaped here: while it is a zombie, its group's number cannot be given to a stranger.
            result = None
            with suppress(ChildProcessError):
                result = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
            with suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(notice, result)

        threading.Thread(target=wait, daemon=True).start()  # holds nobody up at the exit
        result = await noticed
        status, how = _status(result)
        seconds = self._clock.boottime() - self._started_at
        log.info("workload ended", pid=process.pid, result=how, seconds=seconds)
        if result is None:  # nothing holds its number any more
            self._kill()
            self._forget()
        if self._wanted:
            self._end_by_itself(status)

    def _end_by_itself(self, status: int) -> None:
        self._kill()  # what it left behind does not outlive it
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
        self._forget()
        why = self._spawn()
        if why is not None:
            log.error("workload not started", reason=why)
            self._end_by_itself(127)

    def _lives(self) -> bool:
        """Whether anything of its group or cgroup is more than a zombie."""
        if self._process is None:
            return False
        if self._watching is not None and not self._watching.done():
            return True  # itself, which is known without a look at every process there is
        if self.cgroup is not None:
            with suppress(OSError):
                if "populated 1" in (self.cgroup / "cgroup.events").read_text():
                    return True
        return group_lives(self._process.pid)

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None:
            try:
                os.killpg(self._process.pid, number)
            except ProcessLookupError:
                pass
            except PermissionError:
                log.error(  # noqa: TRY400 - no traceback needed
                    "workload may not be signalled",
                    pid=self._process.pid,
                    signal=number.name,
                    resolution="run the agent as the user that the command becomes",
                )

    def _kill(self) -> None:
        self._signal(signal.SIGKILL)
        if self.cgroup is not None:
            with suppress(OSError):
                (self.cgroup / "cgroup.kill").write_text("1")

    def _term_strays(self) -> None:
        """TERM to what is in its cgroup and not in its group."""
        if self.cgroup is None:
            return
        with suppress(OSError):
            for word in (self.cgroup / "cgroup.procs").read_text().split():
                with suppress(OSError):
                    pid = int(word)  # 0 is one that cannot be seen from here
                    if pid > 0 and os.getpgid(pid) != self.pgid:
                        os.kill(pid, signal.SIGTERM)

    def _forget(self) -> None:
        """Reap it; its numbers are given back."""
        if self._process is not None:
            self._process.wait()
            self._process = None
        if self._cgroup is not None:
            with suppress(OSError):
                self._cgroup.rmdir()


def _status(result: os.waitid_result | None) -> tuple[int, str]:
    """The exit status as a shell has it, and how it ended, for people."""
    if result is None:
        return 255, UNKNOWN
    if result.si_code == os.CLD_EXITED:
        return result.si_status, f"exit {result.si_status}"
    try:
        name = signal.Signals(result.si_status).name
    except ValueError:  # most real-time signals have none
        name = f"signal {result.si_status}"
    return 128 + result.si_status, name


def group_lives(pgid: int) -> bool:
    """Whether a process group has a member that is not a zombie. Reads /proc: some hundred files."""
    with os.scandir("/proc") as entries:
        for entry in entries:
            if entry.name.isdigit():
                with suppress(OSError):
                    stat = Path("/proc", entry.name, "stat").read_bytes()
                    state, _, group = stat.rpartition(b") ")[2].split(b" ", 3)[:3]
                    if int(group) == pgid and state not in (b"Z", b"X"):
                        return True
    return False


def own_cgroup() -> Path | None:
    """The folder of our own cgroup (version 2) if one can be made below it, else None."""
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            number, _, path = line.split(":", 2)
            folder = CGROUP_ROOT / path.lstrip("/")
            if number == "0" and (folder / "cgroup.kill").exists() and os.access(folder, os.W_OK):
                return folder
    return None


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
