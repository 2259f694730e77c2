"""The agent's end of the guard (agent/guard.py, R12): starts it, sends it deadlines, notices its loss.

Owns the guard's process and the socket to it. Knows nothing of roles: it passes moments and processes
on. The guard answers every message. An answer that is late by more than the limit means that the guard
is frozen, which is as bad as dead: it is killed, abandoned, and another one is started.

Nothing here waits in the event loop. A process that is frozen in the kernel does not die of SIGKILL
until it is thawed, and a Python on a dead disk is never executed: so an abandoned guard is reaped
later, without blocking, and a new one is started in a thread of its own.

Every guard runs the sources that were installed when this process started, from memory: a program that
has been replaced on disk since then may have other messages.
"""

import asyncio
import fcntl
import json
import marshal
import os
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.abc import SourceLoader
from pathlib import Path
from types import CodeType, ModuleType

import agent.guard
import agent.proctree
from agent.errors import ConfigError, ExitCode
from agent.guard import MESSAGE_BYTES
from agent.ops.blocking import Lane, StuckError
from agent.ops.clock import Clock
from agent.ops.logs import Log
from agent.ops.process import Popen

START_S = 10.0
"""A Python that has not started by then will not."""

RESTART_S = 1.0
"""At most one guard is started in this time: one that dies at once must not become a fork loop."""

MOST_ABANDONED = 8
"""While so many killed guards are not gone, stuck in the kernel, no further one is started."""

GONE_S = 0.1
"""How long ``call_off`` waits for a guard that it had to kill; a frozen one is left to the kernel."""

STEP_S = 0.005

HANDBACK_BYTES = 16 * 1024
"""Of a document: the messages to a guard that starts have to fit into the socket together."""

BOOTSTRAP = """\
# failover-agent guard
import marshal, os, sys
if sys.implementation.cache_tag != {tag!r}:
    sys.exit("guard not started: Python was replaced, and is not {tag} any more; restart the agent")
program = int(sys.argv[3])
of_proctree, of_guard = marshal.loads(os.pread(program, os.fstat(program).st_size, 0))
agent = sys.modules["agent"] = type(sys)("agent")
agent.proctree = sys.modules["agent.proctree"] = type(sys)("agent.proctree")
exec(of_proctree, agent.proctree.__dict__)
exec(of_guard)
"""
"""Runs the guard's program: with -I -S it can import nothing of ours. Compiling it would cost the guard
2 MiB, so it is compiled already, by the same version of Python."""

HANDBACK = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from agent.daemon.release_helper import main;"
    " sys.exit(main(sys.argv[2:]))"
)
"""The helper with which the guard releases the role; the guard adds epoch and time limit."""

log = Log(__name__)


@dataclass(frozen=True, slots=True)
class GuardHook:
    """The demotion hook as the guard runs it: its commands in order, as whom, where.

    Attributes:
        stdin: what each command reads: the facts as JSON.
        user: user id, or None for the agent's own; ``group`` and ``groups`` are used with it only.
        complete: whether the commands are the whole demotion. If a part is missing, such as a webhook,
            the guard runs what there is, and does not hand the role back.
    """

    commands: Sequence[Sequence[str]]
    environment: Mapping[str, str]
    stdin: str = ""
    directory: str = "/"
    user: int | None = None
    group: int | None = None
    groups: Sequence[int] = ()
    complete: bool = True


@dataclass(frozen=True, slots=True)
class Arming:
    """What the guard does unless it is told otherwise. Moments are CLOCK_BOOTTIME seconds.

    Attributes:
        hook_at: when it stops the agent and runs the demotion hook; infinity while the agent demotes.
        kill_at: when it kills what runs of the tenure.
        agent_at: when it kills the agent while that demotes, or None for ``kill_at``. Later than
            ``kill_at`` where the agent runs its fence command after a demotion that has failed.
        running: process groups of hooks that run, killed first.
        groups: process groups of hooks that have run in this tenure, killed last.
        workload: process group of the command of ``exec``, stopped before the hook, or None.
        cgroup: the cgroup of the tenure, killed last, or None. Below it is ``workload``, killed with that.
        roots: processes of this tenure whose descendants belong to it, as process id and start time
            (proctree.py); those that lead a running hook's group and the workload's too.
        mark: what the tenure's processes have in their environment (FAILOVER_TENURE), or None.
        epoch: of the tenure; None at a plain v1 server, where no role can be handed back.
        state: path and content of the state file that says Secondary.
    """

    hook_at: float
    kill_at: float
    agent_at: float | None = None
    running: tuple[int, ...] = ()
    groups: tuple[int, ...] = ()
    workload: int | None = None
    cgroup: str | None = None
    roots: tuple[tuple[int, int], ...] = ()
    mark: str | None = None
    epoch: int | None = None
    state: tuple[str, str] | None = None


@dataclass(frozen=True, slots=True)
class GuardLog:
    """How the guard's lines look, and what they say of the agent.

    Attributes:
        least: the lowest level that is shown, as a number of the logging module.
        form: as ops/logs.py has it.
        role: the agent's, as it was last said.
    """

    least: int
    form: str
    group: str
    session: str
    role: str
    epoch: int | None


class Guardian:
    """Keeps one guard running, inside one running loop.

    ``start`` first. At the end ``call_off`` if nothing is left to demote, and ``abandon`` in every
    other case: an armed guard demotes as soon as this process has ended.

    Args:
        clock: for deadlines.
        changed: called with None when the guard answers (again), and with the reason when it does
            not: from then on it must not be relied on.
        limit_s: how long an answer may take.
        claim: a descriptor that every guard keeps open until its end, or None (StateFile.claim).

    Raises:
        ConfigError: GUARD, the guard's program cannot be read.
    """

    def __init__(
        self,
        clock: Clock,
        changed: Callable[[str | None], None],
        *,
        limit_s: float,
        claim: int | None = None,
    ) -> None:
        self.limit_s = limit_s
        self._claim = claim
        self._clock = clock
        self._changed = changed
        try:
            self._program: int | None = _sealed(program())
        except OSError as error:
            raise ConfigError(
                f"the guard's program cannot be read: {error}", exit_code=ExitCode.GUARD
            ) from error
        self._lane = Lane("start of the guard")
        self._starting: asyncio.Task[None] | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._killed: list[subprocess.Popen[bytes]] = []
        self._socket: socket.socket | None = None
        self._number = 0
        self._unanswered: deque[tuple[int, float]] = deque()
        self._arming: Arming | None = None
        self._hook: GuardHook | None = None
        self._handback = ""
        self._log: GuardLog | None = None
        self._started_at = self._sent_at = float("-inf")
        self._trouble: str | None = "the guard has not started yet"
        self._restart: asyncio.TimerHandle | None = None
        self._closed = False

    @property
    def pid(self) -> int | None:
        """The guard's process id, or None while there is none."""
        return self._process.pid if self._process else None

    @property
    def ready(self) -> bool:
        """Whether there is a guard that answers."""
        return self._trouble is None

    async def start(self) -> None:
        """Start the guard and wait until it answers.

        Raises:
            ConfigError: GUARD, it could not be started.
        """
        self._spawn()
        end_at = self._clock.boottime() + START_S
        while self._trouble is not None:
            failed = self._process is None and self._starting is None
            if failed or self._clock.boottime() > end_at:
                why = self._trouble
                if self._lane.busy:
                    why = f"it was not executed within {START_S:g} s: is it on a disk that hangs?"
                await self.call_off()
                raise ConfigError(
                    f"the guard could not be started with {sys.executable}: {why};"
                    " without it a frozen agent would keep its workload running (see docs/guard.md)",
                    exit_code=ExitCode.GUARD,
                )
            await asyncio.sleep(STEP_S)

    def set_log(self, said: GuardLog) -> None:
        """Send what its lines look like, and name. Repeating it sends nothing."""
        if said != self._log:
            self._log = said
            self._send_log()

    def set_hook(self, hook: GuardHook) -> None:
        """Send the demotion hook of the tenure that begins."""
        self._hook = hook
        self._send_hook()

    def set_handback(self, document: bytes | None) -> None:
        """Send the document with which a guard that has demoted hands the role back.

        Args:
            document: made by agent/daemon/release_helper.py, in JSON; None for a lease that just runs out.
        """
        text = document.decode() if document is not None else ""
        if len(text) > HANDBACK_BYTES:
            reason = f"its settings have {len(text)} bytes, and at most {HANDBACK_BYTES} are sent"
            log.warning("guard cannot hand the role back", reason=reason)
            text = ""
        if text != self._handback:
            self._handback = text
            self._send_handback()

    def arm(self, arming: Arming | None) -> None:
        """Send the newest deadline, or None for nothing to guard. Repeating it sends nothing."""
        if arming != self._arming:
            self._arming = arming
            self._send_arming()

    def check(self) -> None:
        """To be called often: asks a guard that had nothing to answer, and notices a silent one."""
        self._reap()
        while self._socket is not None and self._read():
            pass  # answers that lie there since this process itself was late are not late
        if not self._unanswered and self._clock.boottime() - self._sent_at > self.limit_s:
            self._send_arming()
        if self._unanswered:
            limit_s = self.limit_s if self._trouble is None else START_S
            late_s = self._clock.boottime() - self._unanswered[0][1]
            if late_s > limit_s:
                self._lost(f"the guard has not answered for {late_s:.3f} s")

    async def call_off(self) -> None:
        """Call the guard off and end it. Only when nothing is left to demote; may be called twice."""
        self._stop()
        self._arming = None
        self._send_arming()
        self._disconnect()
        process, self._process = self._process, None
        if process is not None:
            self._killed.append(process)
        await self._gone(self.limit_s)
        if self._starting is not None:
            self._starting.cancel()  # if it ever starts, it finds itself alone, and ends
        for process in self._killed:
            process.kill()
        await self._gone(GONE_S)
        if self._program is not None and not self._lane.busy:
            os.close(self._program)
            self._program = None

    def abandon(self) -> None:
        """Leave the guard as it is: armed, it demotes as soon as this process has ended.

        Nothing is closed: the guard takes a closed socket for the end of this process.
        """
        self._stop()
        if self._socket is not None:
            asyncio.get_running_loop().remove_reader(self._socket)
            self._socket.detach()  # no end of this object, or of the loop, closes it
            self._socket = None
            self._unanswered.clear()

    # -- the process ----------------------------------------------------------------------------

    def _stop(self) -> None:
        self._closed = True
        if self._restart is not None:
            self._restart.cancel()

    async def _gone(self, limit_s: float) -> None:
        """Wait until no guard is left, or for so long."""
        end_at = self._clock.boottime() + limit_s
        while (self._reap() or self._starting is not None) and self._clock.boottime() < end_at:  # noqa: ASYNC110 - a child's end
            await asyncio.sleep(STEP_S)

    def _reap(self) -> int:
        """Take in the end of killed guards without waiting for one; how many are left."""
        self._killed = [process for process in self._killed if process.poll() is None]
        return len(self._killed)

    def _spawn(self) -> None:
        self._restart = None
        self._started_at = self._clock.boottime()
        if self._reap() >= MOST_ABANDONED:
            self._restart_soon()
            return
        self._starting = asyncio.get_running_loop().create_task(self._start_process())
        self._starting.add_done_callback(self._start_ended)

    def _start_ended(self, task: asyncio.Task[None]) -> None:
        self._starting = None
        error = None if task.cancelled() else task.exception()
        if error is not None:
            self._lost(str(error), "guard not started")

    async def _start_process(self) -> None:
        """Start a guard in a thread: a Python on a dead disk may never be executed."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            process = await self._lane.run(partial(self._execute, theirs))
        except BaseException as error:
            ours.close()
            if isinstance(error, StuckError):
                theirs.close()  # no thread has it
            raise
        self._process = process
        if self._closed:
            ours.close()
            self._lost("it is not needed any more")
            return
        ours.setblocking(False)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * MESSAGE_BYTES)
        self._socket = ours
        asyncio.get_running_loop().add_reader(ours, self._read)
        self._send_log()
        self._send_hook()
        self._send_handback()
        self._send_arming()

    def _execute(self, theirs: socket.socket) -> subprocess.Popen[bytes]:
        """Runs in a thread of its own."""
        assert self._program is not None  # noqa: S101 - it is closed last
        claims = [self._claim] if self._claim is not None else []
        with theirs:
            kept = [self._program, *claims]
            return Popen(
                [
                    sys.executable,
                    "-I",
                    "-S",
                    "-c",
                    bootstrap(),
                    str(theirs.fileno()),
                    str(os.getpid()),
                    *map(str, kept),
                ],
                pass_fds=[theirs.fileno(), *kept],
                stdin=subprocess.DEVNULL,
                cwd="/",
                start_new_session=True,
            )

    def _read(self) -> bool:
        """Take in one answer, if there is one; whether there was."""
        assert self._socket is not None  # noqa: S101 - the reader is removed with it
        try:
            number = self._socket.recv(64)
        except BlockingIOError:
            return False
        except OSError:
            number = b""
        if not number:
            self._lost("the guard has ended")
            return False
        while self._unanswered and self._unanswered[0][0] <= int(number):
            self._unanswered.popleft()
        if self._trouble is not None and not self._unanswered:
            self._trouble = None
            log.info("guard ready", pid=self.pid)
            self._changed(None)
        return True

    def _lost(self, why: str, message: str = "guard lost") -> None:
        """Kill and abandon the guard, say so at once, and start another one.

        The socket can be closed as soon as kill() has returned: from then on no system call of the guard
        returns to its program, so it cannot learn of the end and take this process for dead.
        """
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            self._killed.append(process)
        self._disconnect()
        if self._closed:
            return
        first = self._trouble is None
        self._trouble = why
        self._restart_soon()
        log.error(message, reason=why, action="starting another one")
        if first:
            self._changed(why)

    def _restart_soon(self) -> None:
        if not self._closed:
            wait_s = max(0.0, self._started_at + RESTART_S - self._clock.boottime())
            self._restart = asyncio.get_running_loop().call_later(wait_s, self._spawn)

    def _disconnect(self) -> None:
        if self._socket is not None:
            asyncio.get_running_loop().remove_reader(self._socket)
            self._socket.close()
            self._socket = None
            self._unanswered.clear()

    # -- messages -------------------------------------------------------------------------------

    def _send_log(self) -> None:
        if (said := self._log) is not None:
            epoch = "" if said.epoch is None else str(said.epoch)
            self._send(
                "LOG", str(said.least), said.form, said.group, said.session, said.role, epoch
            )

    def _send_hook(self) -> None:
        if self._hook is None:
            return
        hook = self._hook
        env = [f"{key}={value}" for key, value in hook.environment.items()]
        directory = str(Path(hook.directory).absolute())  # the guard's own is /
        words = [directory, *_ids(hook), str(int(hook.complete)), hook.stdin, str(len(env)), *env]
        for command in hook.commands:
            words += [str(len(command)), *command]
        self._send("HOOK", *words)

    def _send_arming(self) -> None:
        if self._arming is None:
            self._send("OFF")
            return
        arming = self._arming
        path, text = arming.state or ("", "")
        agent_at = arming.kill_at if arming.agent_at is None else arming.agent_at
        self._send(
            "ARM",
            repr(arming.hook_at),
            repr(arming.kill_at),
            repr(agent_at),
            ",".join(map(str, arming.running)),
            ",".join(map(str, arming.groups)),
            str(arming.workload or ""),
            arming.cgroup or "",
            ",".join(f"{pid}:{start}" for pid, start in arming.roots),
            arming.mark or "",
            "" if arming.epoch is None else str(arming.epoch),
            str(Path(path).absolute()) if path else "",  # the guard's own directory is /
            text,
        )

    def _send_handback(self) -> None:
        if self._handback:
            self._send("BACK", self._handback, *_helper())
        else:
            self._send("BACK", "")

    def _send(self, word: str, *fields: str) -> None:
        if self._socket is None:
            return
        self._number += 1
        # No process can have a NUL in a variable or an argument; a server's text may.
        words = (word, str(self._number), *(field.replace("\0", " ") for field in fields))
        message = "\0".join(words).encode(errors="surrogateescape")
        if len(message) > MESSAGE_BYTES:
            self._lost(
                f"the guard cannot be told: {word} has {len(message)} bytes, and at most"
                f" {MESSAGE_BYTES} fit; shorten the demotion hook's variables or arguments"
            )
            return
        try:
            self._socket.send(message)
        except OSError as error:  # a full queue, too: it has been frozen for long
            self._lost(f"the guard cannot be told: {error.strerror}")
            return
        self._sent_at = self._clock.boottime()
        self._unanswered.append((self._number, self._sent_at))


def _ids(hook: GuardHook) -> tuple[str, str, str]:
    user = -1 if hook.user is None else hook.user
    group = -1 if hook.group is None else hook.group
    return str(user), str(group), ",".join(map(str, hook.groups))


def _helper() -> tuple[str, ...]:
    """The command that hands the role back. The guard's directory is /, so its paths are absolute."""
    paths = json.dumps([str(Path(path).absolute()) for path in sys.path])
    return sys.executable, "-P", "-c", HANDBACK, paths


def bootstrap() -> str:
    """What Python is started with, to run ``program``."""
    return BOOTSTRAP.format(tag=sys.implementation.cache_tag)


def program() -> bytes:
    """The guard's whole program, as it is installed now."""
    return marshal.dumps(tuple(_code(module) for module in (agent.proctree, agent.guard)))


def _code(module: ModuleType) -> CodeType:
    loader = module.__loader__
    assert isinstance(loader, SourceLoader)  # noqa: S101 - nothing else is installed
    code = loader.get_code(module.__name__)
    assert code is not None  # noqa: S101 - likewise
    return code


def _sealed(text: bytes) -> int:
    """A descriptor of memory with this text, which nobody can change any more."""
    descriptor = os.memfd_create("guard", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    with open(descriptor, "wb", closefd=False) as file:
        file.write(text)
    seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    return descriptor
