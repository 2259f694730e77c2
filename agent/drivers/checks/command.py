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
from agent.ops.process import Child, clean_environment
from agent.schema.formats import NeededCommand

OUTPUT_BYTES = 4096
"""Of one run, into the debug log; the rest is read and thrown away."""

CHUNK_BYTES = 64 * 1024

GRACE_S = 0.5
"""From TERM to KILL: for a shell's trap. The check has failed already."""

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
        self._last: Child | None = None
        """Of the last run, until it is released: its number is no other's until its group is dead."""

    async def __call__(self) -> None:
        """Return if the command exits with 0. Cancelled, it ends the group: TERM, then KILL.

        Raises:
            CheckFailed: it could not be started, was not 0, or was killed.
        """
        self._try_to_release()
        if self._last is not None:
            raise CheckFailed("its last run was killed and has not ended (stuck in the kernel?)")
        output = _Output()
        self._last = child = Child(
            self._check.command,
            on_started=output.follow,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            bufsize=0,
            cwd="/",
            env=clean_environment(),
            start_new_session=True,
        )
        child.start()
        try:
            result = await child.wait()
        except asyncio.CancelledError:
            _signal(child, signal.SIGTERM)
            await _wait(child, GRACE_S)
            raise
        finally:
            await self._finish(child, output)
        if result.error is not None:
            why = getattr(result.error, "strerror", None) or result.error
            raise CheckFailed(f"{self._check.command[0]} cannot be started: {why}")
        if result.signal is not None:
            raise CheckFailed(f"killed by signal {result.signal}{output.first_line}")
        if result.code is None:
            raise CheckFailed("its exit status is unknown: it was collected elsewhere")
        if result.code != 0:
            raise CheckFailed(f"exit {result.code}{output.first_line}")

    async def _finish(self, child: Child, output: "_Output") -> None:
        """KILL the rest of the group, and release its number."""
        _signal(child, signal.SIGKILL)
        try:
            await _wait(child, DEATH_S)
        finally:
            output.close()
            self._try_to_release()
        log.debug("check output", check=self._check.name, output=output.text)

    def _try_to_release(self) -> None:
        if self._last is not None and self._last.ended:
            self._last.release()
            self._last = None


async def _wait(child: Child, limit_s: float) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(limit_s):
            await child.wait()


def _signal(child: Child, number: signal.Signals) -> None:
    with suppress(PermissionError):
        child.signal(number)


class _Output:
    """The beginning of what one run prints; all of it is read."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._kept = bytearray()
        self._pipe: IO[bytes] | None = None

    @property
    def text(self) -> str:
        return self._kept.decode(errors="replace")

    @property
    def first_line(self) -> str:
        """Behind a colon, if there is one."""
        first = self.text.strip().partition("\n")[0]
        return f": {first}" if first else ""

    def follow(self, stdout: IO[bytes] | None, _stderr: IO[bytes] | None) -> None:
        assert stdout is not None  # noqa: S101 - it was asked for
        self._pipe = stdout
        os.set_blocking(stdout.fileno(), False)
        self._loop.add_reader(stdout.fileno(), self._read)

    def close(self) -> None:
        """Read what is there, and close the pipe."""
        self._read()
        self._close()

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
