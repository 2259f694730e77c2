"""The agent's end of the guard (agent/guard.py, R12): starts it, tells it, notices when it is gone.

Owns the guard's process and the socket to it. Knows nothing of roles: it passes moments and process
groups on. The guard answers every message; one that stays unanswered for longer than the limit
means that the guard is frozen, which is as bad as dead: it is killed and another one started.
"""

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import agent.guard
from agent.errors import ConfigError, ExitCode
from agent.guard import MESSAGE_BYTES
from agent.ops.clock import Clock
from agent.ops.logs import Log

START_S = 10.0
"""A Python that has not started by then will not."""

RESTART_S = 1.0
"""At most one guard is started in this time: one that dies at once must not become a fork loop."""

log = Log(__name__)


@dataclass(frozen=True, slots=True)
class GuardHook:
    """The demotion hook as the guard runs it: its commands in order, as whom, where.

    Attributes:
        stdin: what each command reads: the facts as JSON.
        user: user id, or None for the agent's own; ``group`` and ``groups`` are used with it only.
    """

    commands: Sequence[Sequence[str]]
    environment: Mapping[str, str]
    stdin: str = ""
    directory: str = "/"
    user: int | None = None
    group: int | None = None
    groups: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class Arming:
    """What the guard is to do unless it hears otherwise. Moments are CLOCK_BOOTTIME seconds.

    Attributes:
        hook_at: when it runs the demotion hook; infinity for not at all.
        kill_at: when it kills.
        running: process groups of hooks that run, killed first.
        groups: process groups of hooks that have run in this tenure, killed last.
        workload: process group of the command of ``exec``, stopped before the hook, or None.
        cgroup: its cgroup, killed with it, or None.
        state: path and content of the state file that says Secondary.
    """

    hook_at: float
    kill_at: float
    running: tuple[int, ...] = ()
    groups: tuple[int, ...] = ()
    workload: int | None = None
    cgroup: str | None = None
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
    """Keeps one guard running. ``start`` first; ``close`` last; all inside one running loop.

    Args:
        clock: for deadlines.
        changed: called with None when the guard answers (again), and with the reason when it does
            not: from then on it must not be relied on.
        limit_s: how long an answer may take.
        claim: a descriptor that every guard keeps open until its end, or None (StateFile.claim).
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
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._number = 0
        self._unanswered: deque[tuple[int, float]] = deque()
        self._arming: Arming | None = None
        self._hook: GuardHook | None = None
        self._log: GuardLog | None = None
        self._started_at = self._sent_at = float("-inf")
        self._trouble: str | None = "the guard has not started yet"
        self._restart: asyncio.TimerHandle | None = None
        self._closed = False

    @property
    def pid(self) -> int | None:
        """The guard's process id, or None while there is none."""
        return self._process.pid if self._process else None

    async def start(self) -> None:
        """Start the guard and wait until it answers.

        Raises:
            ConfigError: GUARD, it could not be started.
        """
        self._spawn()
        end_at = self._clock.boottime() + START_S
        while self._trouble is not None:
            if self._clock.boottime() > end_at or self._process is None:
                why = self._trouble
                await self.close()
                raise ConfigError(
                    f"the guard could not be started with {sys.executable}: {why};"
                    " without it a frozen agent would keep its workload running (see docs/guard.md)",
                    exit_code=ExitCode.GUARD,
                )
            await asyncio.sleep(0.005)

    def set_log(self, said: GuardLog) -> None:
        """Tell what its lines are to look like, and to say. Repeating it sends nothing."""
        if said != self._log:
            self._log = said
            self._send_log()

    def set_hook(self, hook: GuardHook) -> None:
        """Tell the demotion hook of the tenure that begins."""
        self._hook = hook
        self._send_hook()

    def arm(self, arming: Arming | None) -> None:
        """Tell the newest deadline, or None for nothing to guard. Repeating it sends nothing."""
        if arming != self._arming:
            self._arming = arming
            self._send_arming()

    def check(self) -> None:
        """To be called often: asks a guard that had nothing to answer, and notices a silent one."""
        while self._socket is not None and self._read():
            pass  # answers that lie there since this process itself was late are not late
        if not self._unanswered and self._clock.boottime() - self._sent_at > self.limit_s:
            self._send_arming()
        if self._unanswered:
            limit_s = self.limit_s if self._trouble is None else START_S
            late_s = self._clock.boottime() - self._unanswered[0][1]
            if late_s > limit_s:
                self._lost(f"the guard has not answered for {late_s:.3f} s")

    async def close(self) -> None:
        """Call the guard off and wait for its end."""
        self._closed = True
        if self._restart is not None:
            self._restart.cancel()
        self._arming = None
        self._send_arming()
        self._disconnect()
        process, self._process = self._process, None
        if process is not None:
            try:
                await asyncio.to_thread(process.wait, self.limit_s)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    # -- the process ----------------------------------------------------------------------------

    def _spawn(self) -> None:
        self._restart = None
        self._started_at = self._clock.boottime()
        try:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        except OSError as error:
            self._not_spawned(error)
            return
        claims = [self._claim] if self._claim is not None else []
        with theirs:
            try:
                self._process = subprocess.Popen(  # noqa: S603 - ourselves
                    [
                        sys.executable,
                        "-I",
                        "-S",
                        str(Path(agent.guard.__file__)),
                        str(theirs.fileno()),
                        str(os.getpid()),
                        *map(str, claims),
                    ],
                    pass_fds=[theirs.fileno(), *claims],
                    stdin=subprocess.DEVNULL,
                    cwd="/",
                    start_new_session=True,
                )
            except OSError as error:
                ours.close()
                self._not_spawned(error)
                return
        ours.setblocking(False)
        self._socket = ours
        asyncio.get_running_loop().add_reader(ours, self._read)
        self._send_log()
        self._send_hook()
        self._send_arming()

    def _not_spawned(self, error: OSError) -> None:
        log.error("guard not started", reason=error)
        self._trouble = str(error)
        self._restart_soon()

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

    def _lost(self, why: str) -> None:
        """Get rid of what is left of it, start another one, and say so."""
        process, self._process = self._process, None
        if process is not None:
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
            process.wait()
        self._disconnect()  # only now: to a guard that lives it would say that this process is dead
        if self._closed:
            return
        log.error("guard lost", reason=why, action="starting another one")
        first = self._trouble is None
        self._trouble = why
        self._restart_soon()
        if first:
            self._changed(why)

    def _restart_soon(self) -> None:
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
        words = [hook.directory, *_ids(hook), hook.stdin, str(len(env)), *env]
        for command in hook.commands:
            words += [str(len(command)), *command]
        self._send("HOOK", *words)

    def _send_arming(self) -> None:
        if self._arming is None:
            self._send("OFF")
            return
        arming = self._arming
        path, text = arming.state or ("", "")
        self._send(
            "ARM",
            repr(arming.hook_at),
            repr(arming.kill_at),
            ",".join(map(str, arming.running)),
            ",".join(map(str, arming.groups)),
            str(arming.workload or ""),
            arming.cgroup or "",
            path,
            text,
        )

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
