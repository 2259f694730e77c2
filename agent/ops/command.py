"""Run a command repeatedly, with bounded output, and end its process group after each run.

Owns the processes, their ids and their output. Has no timeout: the caller cancels a run that takes too long.

A command runs without a shell, in its own session and process group, with ``/`` as working directory, PATH,
HOME, LANG and TZ of the agent, and an empty stdin. Not promised: the end of a process that has left the
process group (setsid).
"""

import asyncio
import os
import signal
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from typing import IO

from agent.ops.blocking import StuckError
from agent.ops.process import Child, ExitResult, clean_environment

CHUNK_BYTES = 64 * 1024

DEATH_S = 1.0
"""How long to wait until a killed command has ended. One in an uninterruptible read may never end; then it is
abandoned, and no further run is started until it has ended."""


class Command:
    """Runs a command inside a running loop, one run at a time.

    Args:
        argv: a program and its arguments.
        keep_bytes: how much of each output stream to keep; the rest is discarded.
        merge_stderr: whether to write stderr into stdout.
        kill_if_longer: whether to kill a run once a stream has more than ``keep_bytes``.
        grace_s: time between TERM and KILL if a run is cancelled; 0: KILL at once.

    Attributes:
        stdout: of the last run; one byte longer than ``keep_bytes`` if there was more output.
        stderr: likewise.
    """

    def __init__(
        self,
        argv: Sequence[str],
        *,
        keep_bytes: int,
        merge_stderr: bool = False,
        kill_if_longer: bool = False,
        grace_s: float = 0.0,
    ) -> None:
        self._argv = argv
        self._most = keep_bytes + 1
        self._merge_stderr = merge_stderr
        self._kill_if_longer = kill_if_longer
        self._grace_s = grace_s
        self._child: Child | None = None
        self._pipes: dict[IO[bytes], bytearray] = {}
        self.stdout = bytearray()
        self.stderr = bytearray()

    async def run(self) -> ExitResult:
        """Run the command once; return how it ended. A cancelled run ends the process group first.

        When the first process ends it stays a zombie until its group is dead, so its id is not reused.

        Raises:
            StuckError: the previous run was killed and has not ended.
        """
        self.stdout, self.stderr = bytearray(), bytearray()
        self._release()
        if self._child is not None:
            raise StuckError("its last run was killed and has not ended (stuck in the kernel?)")
        self._child = child = Child(
            self._argv,
            on_started=self._follow,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT if self._merge_stderr else subprocess.PIPE,
            bufsize=0,
            cwd="/",
            env=clean_environment(),
            start_new_session=True,
        )
        child.start()
        try:
            return await child.wait()
        except asyncio.CancelledError:
            if self._grace_s:
                self._signal(child, signal.SIGTERM)
                await _wait(child, self._grace_s)
            raise
        finally:
            await self._finish(child)

    async def _finish(self, child: Child) -> None:
        """Kill the rest of the process group, and release its id."""
        self._signal(child, signal.SIGKILL)
        try:
            await _wait(child, DEATH_S)
        finally:
            for pipe in list(self._pipes):
                self._read(pipe)
                self._close(pipe)
            self._release()

    def _release(self) -> None:
        """Reap the last run, if it has ended, so that its process id may be reused."""
        if self._child is not None and self._child.ended:
            for pipe in list(self._pipes):  # a run that was stuck has left them open
                self._close(pipe)
            self._child.release()
            self._child = None

    def _signal(self, child: Child, number: signal.Signals) -> None:
        with suppress(PermissionError):
            child.signal(number)

    def _follow(self, stdout: IO[bytes] | None, stderr: IO[bytes] | None) -> None:
        loop = asyncio.get_running_loop()
        for pipe, kept in ((stdout, self.stdout), (stderr, self.stderr)):
            if pipe is not None:
                self._pipes[pipe] = kept
                os.set_blocking(pipe.fileno(), False)
                loop.add_reader(pipe.fileno(), self._read, pipe)

    def _read(self, pipe: IO[bytes]) -> None:
        if pipe not in self._pipes:
            return
        try:
            data = os.read(pipe.fileno(), CHUNK_BYTES)
        except BlockingIOError:
            return
        kept = self._pipes[pipe]
        kept += data[: self._most - len(kept)]
        if not data:
            self._close(pipe)
        elif len(kept) == self._most and self._kill_if_longer and self._child is not None:
            self._signal(self._child, signal.SIGKILL)

    def _close(self, pipe: IO[bytes]) -> None:
        if self._pipes.pop(pipe, None) is not None:
            asyncio.get_running_loop().remove_reader(pipe.fileno())
            pipe.close()


async def _wait(child: Child, limit_s: float) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(limit_s):
            await child.wait()
