"""The ``exec`` check: runs a command (agent/ops/command.py), which passes if it exits with 0.

Knows nothing of rise, fall and timeouts: the caller cancels a run at its timeout.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from agent.drivers.checks.kind import Check, CheckFailed, Run
from agent.ops.blocking import StuckError
from agent.ops.clock import Clock
from agent.ops.command import Command
from agent.ops.logs import Log
from agent.schema.formats import NeededCommand

OUTPUT_BYTES = 4096
"""How many bytes of one run's output are logged, at level DEBUG; the rest is discarded."""

GRACE_S = 0.5
"""Time between TERM and KILL at the timeout, so that a shell can run its trap."""

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
        command = Command(self.command, keep_bytes=OUTPUT_BYTES, merge_stderr=True, grace_s=GRACE_S)

        async def run() -> None:
            try:
                result = await command.run()
            except StuckError as error:
                raise CheckFailed(str(error)) from error
            finally:
                output = command.stdout[:OUTPUT_BYTES].decode(errors="replace")
                log.debug("check output", check=self.name, output=output)
            if result.error is not None:
                why = result.error.strerror if isinstance(result.error, OSError) else result.error
                raise CheckFailed(f"{self.command[0]} cannot be started: {why}")
            if result.signal is not None:
                raise CheckFailed(_with_first_line(f"killed by signal {result.signal}", output))
            if result.code is None:
                raise CheckFailed("its exit status is unknown: it was collected elsewhere")
            if result.code != 0:
                raise CheckFailed(_with_first_line(f"exit {result.code}", output))

        return run


def _with_first_line(what: str, output: str) -> str:
    first = output.strip().partition("\n")[0]
    return f"{what}: {first}" if first else what
