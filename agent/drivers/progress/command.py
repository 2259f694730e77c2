"""The source ``command``: runs a command (agent/ops/command.py) that prints the time.

When it ends, or at its timeout, its whole process group is killed.
"""

import asyncio
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, ClassVar, Literal

from agent.drivers.progress.kind import PolledSource, Reader
from agent.drivers.progress.times import Reason, Refused, last_line, read_text
from agent.ops.blocking import StuckError
from agent.ops.command import Command
from agent.schema.formats import NeededCommand

LONGEST_OUTPUT = 4 * 1024
"""The most bytes that are read of each stream of a command, which should print one line."""


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
    """Runs a command that ``HookCheck.check_command`` has passed."""

    def __init__(self, settings: CommandProgress) -> None:
        self._argv = settings.command
        self._limit_s = settings.limit
        self._command = Command(self._argv, keep_bytes=LONGEST_OUTPUT, kill_if_longer=True)

    async def read(self) -> datetime:
        command = shlex.join(self._argv)
        try:
            async with asyncio.timeout(self._limit_s):
                result = await self._command.run()
        except TimeoutError:
            text = f"{command} was killed after {self._limit_s:g} s"
            raise Refused(Reason.TOO_SLOW, text) from None
        except StuckError as error:
            raise Refused(Reason.TOO_SLOW, f"{command}: {error}") from error
        stdout, stderr = bytes(self._command.stdout), bytes(self._command.stderr)
        if result.error is not None:
            text = f"{self._argv[0]} could not be started: {result.error}"
            raise Refused(Reason.UNREADABLE, text) from result.error
        if max(len(stdout), len(stderr)) > LONGEST_OUTPUT:
            text = f"{self._argv[0]} prints more than {LONGEST_OUTPUT} bytes"
            raise Refused(Reason.TOO_LONG, text)
        if result.code != 0:
            status = result.code if result.signal is None else -result.signal
            why = last_line(stderr).decode(errors="replace") or "no error output"
            raise Refused(Reason.UNREADABLE, f"{command} ended with {status}: {why}")
        return read_text(last_line(stdout))

    async def close(self) -> None:
        """Do nothing: a cancelled run has ended its process group."""
