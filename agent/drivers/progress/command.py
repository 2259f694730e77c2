"""The source ``command``: a command that prints the time.

It runs as a hook does: no shell, its own process group, ``/`` as working directory, a clean environment;
nothing on stdin. At its end or limit all of its group is killed.
"""

import asyncio
import os
import select
import shlex
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Any, ClassVar, Literal

from agent.drivers.progress.kind import PolledSource, Reader, read_blocking
from agent.drivers.progress.times import Reason, Refused, last_line, read_text
from agent.ops.blocking import BlockingThread
from agent.ops.process import Popen, clean_environment
from agent.schema.formats import NeededCommand

LONGEST_OUTPUT = 4 * 1024
"""Bytes of each stream of a command that prints one line."""

STOP_S = 0.5
"""How long a stop waits for a killed command to be gone."""

STOP_POLL_S = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandProgress(PolledSource):
    """A command that prints the time."""

    EXAMPLE: ClassVar[Mapping[str, Any]] = {
        "type": "command",
        "command": ["/usr/local/bin/last-processed", "--utc"],
        "limit": 5,
    }

    type: Literal["command"] = "command"
    command: NeededCommand
    """An absolute path and its arguments; no shell. Exits with 0, and the last line of its output
    is the time. At its limit its process group is killed."""

    @property
    def commands(self) -> tuple[tuple[str, ...], ...]:
        return (self.command,)

    def reader(self) -> Reader:
        return CommandReader(self)


class CommandReader:
    """Runs a command that ``HookCheck.check_command`` has passed, in a thread."""

    def __init__(self, settings: CommandProgress) -> None:
        self._argv = settings.command
        self._limit_s = settings.limit
        self._stop = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._lane = BlockingThread(f"progress {self._argv[0]}")

    async def read(self) -> datetime:
        try:
            # The command has a limit of its own; the longer one here is for a start that hangs.
            return await read_blocking(self._lane, self._run, self._limit_s + STOP_S)
        except OSError as error:
            text = f"{self._argv[0]} could not be started: {error}"
            raise Refused(Reason.UNREADABLE, text) from error

    async def close(self) -> None:
        os.eventfd_write(self._stop, 1)
        with suppress(TimeoutError):
            async with asyncio.timeout(STOP_S):
                while self._lane.busy:  # noqa: ASYNC110 - a cancelled reading has no future to await
                    await asyncio.sleep(STOP_POLL_S)
        if not self._lane.busy:
            os.close(self._stop)

    def _run(self) -> datetime:
        process = Popen(
            self._argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            cwd="/",
            env=clean_environment(),
            start_new_session=True,
        )
        pidfd = os.pidfd_open(process.pid)
        try:
            output = self._follow(process, pidfd)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # a zombie at least: the number is its own
            for fd in (process.stdout, process.stderr):
                assert fd is not None  # noqa: S101 - both were asked for
                fd.close()
            process.wait()
            os.close(pidfd)
        if process.returncode != 0:
            stderr = last_line(output[1]).decode(errors="replace")
            text = (
                f"{shlex.join(self._argv)} ended with {process.returncode}: {stderr or 'silence'}"
            )
            raise Refused(Reason.UNREADABLE, text)
        return read_text(last_line(output[0]))

    def _follow(self, process: subprocess.Popen[bytes], pidfd: int) -> Sequence[bytes]:
        """Both streams, until the command's own end."""
        assert process.stdout is not None  # noqa: S101 - asked for
        assert process.stderr is not None  # noqa: S101 - asked for
        output = {process.stdout.fileno(): bytearray(), process.stderr.fileno(): bytearray()}
        waiting = select.poll()
        for fd in (*output, pidfd, self._stop):
            waiting.register(fd, select.POLLIN)
        ends_at = time.monotonic() + self._limit_s
        while True:
            left_s = ends_at - time.monotonic()
            ready = [fd for fd, _ in waiting.poll(max(0.0, left_s) * 1000)]
            for fd in output.keys() & ready:
                data = os.read(fd, LONGEST_OUTPUT)
                output[fd] += data
                if not data:
                    waiting.unregister(fd)
                if len(output[fd]) > LONGEST_OUTPUT:
                    text = f"{self._argv[0]} prints more than {LONGEST_OUTPUT} bytes"
                    raise Refused(Reason.TOO_LONG, text)
            if pidfd in ready and not output.keys() & ready:
                return [bytes(data) for data in output.values()]
            if self._stop in ready or left_s <= 0:
                text = f"{shlex.join(self._argv)} was killed after {self._limit_s:g} s"
                raise Refused(Reason.TOO_SLOW, text)
