"""The ``exec`` check: one command in its own process group, of which nothing outlives the run.

Owns its processes, their numbers and their output. Knows nothing of rise, fall and limits: the caller
cancels a run at its limit.

What the command gets: its argv, no shell; its own session and process group; ``/`` as working
directory; PATH, HOME, LANG and TZ of the agent; an empty stdin. Not promised: a process that leaves
the group (setsid) is not ended with it.
"""

import asyncio
import os
import signal
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import IO, Any, ClassVar, Literal

from agent.drivers.checks.kind import Check, CheckFailed, Run
from agent.ops.clock import Clock
from agent.ops.logs import Log
from agent.ops.process import Child, ExitResult, clean_environment
from agent.schema.formats import NeededCommand

OUTPUT_BYTES = 4096
"""Bytes of one run's output that are logged, at level DEBUG; the rest is discarded."""

CHUNK_BYTES = 64 * 1024

GRACE_S = 0.5
"""Time from TERM to KILL, for the trap of a shell. The check has failed already."""

DEATH_S = 1.0
"""How long a killed command is waited for. In an uninterruptible read it can take for ever; it is
left then, and no other is started beside it."""

log = Log(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecCheck(Check):
    """Passes if a command exits with 0."""

    EXAMPLE: ClassVar[Mapping[str, Any]] = {
        "name": "disk",
        "type": "exec",
        "command": ["/usr/local/bin/disk-has-room", "/var/lib/collector"],
        "interval": 30,
        "limit": 10,
    }

    type: Literal["exec"] = "exec"
    command: NeededCommand
    """An absolute path and its arguments; no shell. Exit 0 passes. At its limit its process group
    gets TERM, then KILL."""

    @property
    def commands(self) -> tuple[tuple[str, ...], ...]:
        return (self.command,)

    def runner(self, clock: Clock) -> Run:  # noqa: ARG002 - as every kind
        return Command(self)


class Command:
    """Runs an ``exec`` check. Call it, one call at a time."""

    def __init__(self, check: ExecCheck) -> None:
        self._check = check
        self._last: _Run | None = None

    async def __call__(self) -> None:
        """Return if the command exits with 0. Cancelled, it ends the group: TERM, then KILL.

        Raises:
            CheckFailed: it could not be started, was not 0, or was killed.
        """
        if self._last is not None and not self._last.released:
            self._last.try_to_release()
        if self._last is not None and not self._last.released:
            raise CheckFailed("its last run was killed and has not ended (stuck in the kernel?)")
        self._last = run = _Run(self._check)
        try:
            result = await run.end()
        finally:
            output = await run.finish()
        if isinstance(result.error, OSError):
            raise CheckFailed(
                f"{self._check.command[0]} cannot be started: {result.error.strerror}"
            )
        if result.error is not None:
            raise CheckFailed(f"{self._check.command[0]} cannot be started: {result.error}")
        if result.signal is not None:
            raise CheckFailed(_with(f"killed by signal {result.signal}", output))
        if result.code is None:
            raise CheckFailed("its exit status is unknown: it was collected elsewhere")
        if result.code != 0:
            raise CheckFailed(_with(f"exit {result.code}", output))


def _with(what: str, output: bytes) -> str:
    first = output.decode(errors="replace").strip().partition("\n")[0]
    return f"{what}: {first}" if first else what


class _Run:
    """One run. An ended leader stays a zombie until its group is dead, so that its process id is not reused."""

    def __init__(self, check: ExecCheck) -> None:
        self._name = check.name
        self._loop = asyncio.get_running_loop()
        self._kept = bytearray()
        self._pipe: IO[bytes] | None = None
        self.released = False
        self._child = Child(
            check.command,
            on_started=self._follow,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            bufsize=0,
            cwd="/",
            env=clean_environment(),
            start_new_session=True,
        )
        self._child.start()

    async def end(self) -> ExitResult:
        """Wait for the command's end. If cancelled, send TERM, and KILL after GRACE_S."""
        try:
            return await self._child.wait()
        except asyncio.CancelledError:
            self._signal(signal.SIGTERM)
            await self._wait(GRACE_S)
            raise

    async def finish(self) -> bytes:
        """Kill the rest of the group, release its id, and return the beginning of the output."""
        self._signal(signal.SIGKILL)
        try:
            await self._wait(DEATH_S)
        finally:
            self._read()
            self._close()
            self.try_to_release()
        text = self._kept.decode(errors="replace")
        log.debug("check output", check=self._name, output=text)
        return bytes(self._kept)

    def try_to_release(self) -> None:
        """Reap it, if it has ended, so that its process id may be reused."""
        if self._child.ended:
            self._child.release()
            self.released = True

    async def _wait(self, limit_s: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(limit_s):
                await self._child.wait()

    def _signal(self, number: signal.Signals) -> None:
        with suppress(PermissionError):
            self._child.signal(number)

    def _follow(self, stdout: IO[bytes] | None, _stderr: IO[bytes] | None) -> None:
        assert stdout is not None  # noqa: S101 - it was asked for
        self._pipe = stdout
        os.set_blocking(stdout.fileno(), False)
        self._loop.add_reader(stdout.fileno(), self._read)

    def _read(self) -> None:
        if self._pipe is None or self._pipe.closed:
            return
        try:
            data = os.read(self._pipe.fileno(), CHUNK_BYTES)
        except BlockingIOError:
            return
        self._kept += data[: OUTPUT_BYTES - len(self._kept)]
        if not data:
            self._close()

    def _close(self) -> None:
        if self._pipe is not None and not self._pipe.closed:
            self._loop.remove_reader(self._pipe.fileno())
            self._pipe.close()
