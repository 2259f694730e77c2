"""Run one guard, send it messages, and replace it when it is lost (R12).

Owns the guard's process and the socket to it. Knows nothing of roles: it passes moments and process ids
on. The guard answers every message. A guard whose answer is late is frozen, which is as bad as dead: it is
killed, abandoned, and replaced.

Nothing here blocks the event loop. A process that is frozen in the kernel does not die of SIGKILL until it
is thawed, and a Python on a dead disk never starts: so an abandoned guard is reaped later, without
blocking, and a new one is started in a thread of its own.
"""

import asyncio
import os
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from functools import partial

from agent.drivers.guardian.messages import Arming, GuardHook, GuardLogContext
from agent.drivers.guardian.program import bootstrap, helper_command, program, sealed_memory
from agent.errors import ConfigError, ExitCode
from agent.guard import MESSAGE_BYTES
from agent.ops.blocking import BlockingThread, StuckError
from agent.ops.clock import Clock
from agent.ops.logs import Log
from agent.ops.process import Popen

START_S = 10.0
"""How long a guard may take to start."""

RESTART_S = 1.0
"""The least interval between two starts, so that a guard that dies at once does not cause a fork loop."""

MOST_ABANDONED = 8
"""While so many killed guards are stuck in the kernel, no further guard is started."""

GONE_S = 0.1
"""How long ``call_off`` waits for a guard that it had to kill; a frozen one is left to the kernel."""

STEP_S = 0.005

RELEASE_DOCUMENT_BYTES = 16 * 1024
"""Bound of the document: all messages to a new guard have to fit into the socket together."""

log = Log(__name__)


class Guardian:
    """Supervises one guard process, inside one running loop.

    ``start`` first. At the end ``call_off`` if nothing is left to demote, and ``abandon`` in every
    other case: an armed guard demotes as soon as this process has ended.

    Args:
        clock: for deadlines.
        on_change: called with None when the guard answers (again), and with the reason when it is
            lost, and no longer protects this member.
        limit_s: how long an answer may take.
        claim: a descriptor that every guard keeps open until its end, or None (StateFile.claim).

    Raises:
        ConfigError: GUARD, the guard's program cannot be read.
    """

    def __init__(
        self,
        clock: Clock,
        on_change: Callable[[str | None], None],
        *,
        limit_s: float,
        claim: int | None = None,
    ) -> None:
        self.limit_s = limit_s
        self._claim = claim
        self._clock = clock
        self._on_change = on_change
        try:
            self._program: int | None = sealed_memory(program())
        except OSError as error:
            raise ConfigError(
                f"the guard's program cannot be read: {error}", exit_code=ExitCode.GUARD
            ) from error
        self._start_thread = BlockingThread("start of the guard")
        self._starting: asyncio.Task[None] | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._killed: list[subprocess.Popen[bytes]] = []
        self._socket: socket.socket | None = None
        self._pidfd: int | None = None
        self._number = 0
        self._unanswered: deque[tuple[int, float]] = deque()
        self._arming: Arming | None = None
        self._hook: GuardHook | None = None
        self._release_document = ""
        self._log: GuardLogContext | None = None
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
                if self._start_thread.busy:
                    why = f"it was not executed within {START_S:g} s: is it on a disk that hangs?"
                await self.call_off()
                raise ConfigError(
                    f"the guard could not be started with {sys.executable}: {why};"
                    " without it a frozen agent would keep its workload running (see docs/guard.md)",
                    exit_code=ExitCode.GUARD,
                )
            await asyncio.sleep(STEP_S)

    def set_log(self, context: GuardLogContext) -> None:
        """Send the format and context of its log lines. An unchanged one is not sent again."""
        if context != self._log:
            self._log = context
            self._send_log()

    def set_hook(self, hook: GuardHook) -> None:
        """Send the demotion hook of the tenure that begins."""
        self._hook = hook
        self._send_hook()

    def set_release_document(self, document: bytes | None) -> None:
        """Send the document by which a guard that has demoted releases the role.

        Args:
            document: from agent/daemon/release_helper.py, in JSON; None lets the lease expire instead.
        """
        text = document.decode() if document is not None else ""
        if len(text) > RELEASE_DOCUMENT_BYTES:
            reason = (
                f"its settings have {len(text)} bytes; at most {RELEASE_DOCUMENT_BYTES} can be sent"
            )
            log.warning("guard cannot release the role, its lease will expire", reason=reason)
            text = ""
        if text != self._release_document:
            self._release_document = text
            self._send_release_document()

    def arm(self, arming: Arming | None) -> None:
        """Send the newest deadlines, or None to disarm. An unchanged one is not sent again."""
        if arming != self._arming:
            self._arming = arming
            self._send_arming()

    def check(self) -> None:
        """Notice a guard that does not answer, and poll an idle one. Call it often."""
        self._reap()
        while self._unanswered and self._socket is not None and self._receive_answer():
            pass  # read first: an answer is not late if this process was late to read it
        if not self._unanswered and self._clock.boottime() - self._sent_at > self.limit_s:
            self._send_arming()
        if self._unanswered:
            limit_s = self.limit_s if self._trouble is None else START_S
            late_s = self._clock.boottime() - self._unanswered[0][1]
            if late_s > limit_s:
                self._lost(f"the guard has not answered for {late_s:.3f} s")

    async def call_off(self) -> None:
        """Disarm and stop the guard. Call it only when nothing is left to demote; may be called twice."""
        self._stop()
        self._arming = None
        self._send_arming()
        self._disconnect()
        process, self._process = self._process, None
        if process is not None:
            self._killed.append(process)
        await self._wait_until_gone(self.limit_s)
        if self._starting is not None:
            self._starting.cancel()  # if this guard ever starts, it finds its socket closed, and ends
        for process in self._killed:
            process.kill()
        await self._wait_until_gone(GONE_S)
        if self._program is not None and not self._start_thread.busy:
            os.close(self._program)
            self._program = None

    def abandon(self) -> None:
        """Leave the guard as it is: if armed, it demotes as soon as this process has ended.

        Nothing is closed: a closed socket means to the guard that this process has ended.
        """
        self._stop()
        if self._socket is not None:
            self._stop_reading(self._socket)
            self._socket.detach()  # neither its finalizer nor the loop closes it
            self._socket = None
            self._unanswered.clear()

    # -- the process ----------------------------------------------------------------------------

    def _stop(self) -> None:
        self._closed = True
        if self._restart is not None:
            self._restart.cancel()

    async def _wait_until_gone(self, limit_s: float) -> None:
        """Wait until no guard is left, for ``limit_s`` at most."""
        end_at = self._clock.boottime() + limit_s
        while (self._reap() or self._starting is not None) and self._clock.boottime() < end_at:  # noqa: ASYNC110 - a child's end
            await asyncio.sleep(STEP_S)

    def _reap(self) -> int:
        """Reap killed guards without blocking; return how many are left."""
        self._killed = [process for process in self._killed if process.poll() is None]
        return len(self._killed)

    def _spawn(self) -> None:
        self._restart = None
        self._started_at = self._clock.boottime()
        if self._reap() >= MOST_ABANDONED:
            self._restart_soon()
            return
        self._starting = asyncio.get_running_loop().create_task(self._start_process())
        self._starting.add_done_callback(self._on_start_ended)

    def _on_start_ended(self, task: asyncio.Task[None]) -> None:
        self._starting = None
        error = None if task.cancelled() else task.exception()
        if error is not None:
            self._lost(str(error), "guard not started")

    async def _start_process(self) -> None:
        """Start a guard in a thread: a Python on a dead disk may never be executed."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            process = await self._start_thread.run(partial(self._start_in_thread, theirs))
        except BaseException as error:
            ours.close()
            if isinstance(error, StuckError):
                theirs.close()  # no thread could be started for it
            raise
        self._process = process
        if self._closed:
            ours.close()
            self._lost("it is no longer needed")
            return
        ours.setblocking(False)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * MESSAGE_BYTES)
        self._socket = ours
        asyncio.get_running_loop().add_reader(ours, self._receive_answer)
        self._send_log()
        self._send_hook()
        self._send_release_document()
        self._send_arming()

    def _start_in_thread(self, theirs: socket.socket) -> subprocess.Popen[bytes]:
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

    def _receive_answer(self) -> bool:
        """Receive one answer without blocking; return whether there was one."""
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
            self._watch_process()
            log.info("guard ready", pid=self.pid)
            self._on_change(None)
        return True

    def _watch_process(self) -> None:
        """Wake the loop when the guard ends, and no longer at each answer: ``check`` reads those."""
        assert self._process and self._socket  # noqa: S101, PT018 - it has answered
        try:
            self._pidfd = os.pidfd_open(self._process.pid)
        except OSError:  # no descriptor is left, or it is forbidden: the socket shows it, too
            return
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._socket)
        loop.add_reader(self._pidfd, self._lost, "the guard has ended")

    def _stop_reading(self, ours: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        loop.remove_reader(ours)
        if self._pidfd is not None:
            loop.remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = None

    def _lost(self, why: str, message: str = "guard lost") -> None:
        """Kill and abandon the guard, report the loss, and start another one.

        The socket can be closed as soon as kill() has returned: from then on no system call returns to
        the guard's program, so it cannot mistake the closed socket for the agent's death.
        """
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            self._killed.append(process)
        self._disconnect()
        if self._closed:
            return
        was_ready = self._trouble is None
        self._trouble = why
        self._restart_soon()
        log.error(message, reason=why, action="starting another one")
        if was_ready:
            self._on_change(why)

    def _restart_soon(self) -> None:
        if not self._closed:
            wait_s = max(0.0, self._started_at + RESTART_S - self._clock.boottime())
            self._restart = asyncio.get_running_loop().call_later(wait_s, self._spawn)

    def _disconnect(self) -> None:
        if self._socket is not None:
            self._stop_reading(self._socket)
            self._socket.close()
            self._socket = None
            self._unanswered.clear()

    # -- messages -------------------------------------------------------------------------------

    def _send_log(self) -> None:
        if self._log is not None:
            self._send("LOG", *self._log.fields())

    def _send_hook(self) -> None:
        if self._hook is not None:
            self._send("HOOK", *self._hook.fields())

    def _send_arming(self) -> None:
        if self._arming is None:
            self._send("OFF")
        else:
            self._send("ARM", *self._arming.fields())

    def _send_release_document(self) -> None:
        if self._release_document:
            self._send("RELEASE", self._release_document, *helper_command())
        else:
            self._send("RELEASE", "")

    def _send(self, word: str, *fields: str) -> None:
        if self._socket is None:
            return
        self._number += 1
        # A server's text may contain NUL; variables and arguments of a process cannot.
        words = (word, str(self._number), *(field.replace("\0", " ") for field in fields))
        message = "\0".join(words).encode(errors="surrogateescape")
        if len(message) > MESSAGE_BYTES:
            self._lost(
                f"cannot send to the guard: {word} has {len(message)} bytes, and at most"
                f" {MESSAGE_BYTES} fit; shorten the demotion hook's variables or arguments"
            )
            return
        try:
            self._socket.send(message)
        except OSError as error:  # also a full queue: it has been frozen for long
            self._lost(f"cannot send to the guard: {error.strerror}")
            return
        self._sent_at = self._clock.boottime()
        self._unanswered.append((self._number, self._sent_at))
