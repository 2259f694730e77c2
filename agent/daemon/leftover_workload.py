"""Warn in a start's error that the workload of a previous run may still be active.

If an agent was killed together with its guard, the next agent's first demotion (R6) stops the workload. If that
demotion cannot begin, because of unreadable settings or an unusable demotion hook, a person has to stop the
workload: the error has the command.
"""

import json
import shlex
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from agent.daemon.previous_state import writer_lives
from agent.drivers.statefile import MAX_BYTES, default_directory_path
from agent.errors import FailoverError
from agent.files import read_regular
from agent.model import Role


def add_hint(error: FailoverError, stop_command: Sequence[str]) -> None:
    """Add the command that stops a leftover workload to an error.

    Args:
        error: why the agent cannot start.
        stop_command: the demotion hook, or empty if there is none.
    """
    error.hint = f"a workload of a previous run may still be active; {_stop_advice(stop_command)}"


def hint_of_state_files(given: str) -> str | None:
    """A line for each member that died as primary, by the given state file, or all in the default directory."""
    lines = []
    with suppress(OSError):
        usual = sorted(default_directory_path().glob("*.json"))
        for path in [Path(given)] if given else usual:
            command = _stop_command(path)
            if command is not None:
                lines.append(
                    f"the member of {path} was primary when it died, and its workload may still be"
                    f" active; {_stop_advice(command)}"
                )
    return "\n".join(lines) or None


def _stop_advice(command: Sequence[str]) -> str:
    by_hand = not command or "://" in command[0]
    return "stop it by hand" if by_hand else f"to stop it, run: {shlex.join(command)}"


def _stop_command(path: Path) -> list[str] | None:
    """The demotion hook of a member that died as primary; None for any other member."""
    try:
        state = json.loads(read_regular(path, MAX_BYTES))
        if state.get("role") in {None, Role.SECONDARY.value} or writer_lives(state):
            return None
    except (OSError, ValueError, RecursionError, AttributeError, TypeError):
        return None  # unreadable, or not a state
    command = state.get("stop_command")
    return [str(word) for word in command] if isinstance(command, list) else []
