"""Say that a workload of an earlier run may still be active, when a start fails before it is stopped.

The first demotion (R6) stops whatever an agent left behind that was killed together with its guard. Where
not even that can be begun, because the settings cannot be read or the demotion hook is not fit, a person
has to stop it: the error says so, and how.
"""

import json
import shlex
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from agent.drivers.statefile import MAX_BYTES, default_directory_path
from agent.errors import FailoverError
from agent.model import Role


def add_hint(error: FailoverError, stop_command: Sequence[str]) -> None:
    """Add to an error what to do about a workload that may still run.

    Args:
        error: why the agent cannot start.
        stop_command: the demotion hook, or empty if there is none.
    """
    error.hint = f"a workload of an earlier run may still be active; {_to_stop_it(stop_command)}"


def add_hint_of_usual_directory(error: FailoverError) -> None:
    """Add a line for each member that died as primary, by the state files in their usual directory."""
    lines = []
    with suppress(OSError):
        for path in sorted(default_directory_path().glob("*.json")):
            command = _stop_command(path)
            if command is not None:
                lines.append(
                    f"the member of {path} was primary when it died, and its workload may still be"
                    f" active; {_to_stop_it(command)}"
                )
    error.hint = "\n".join(lines) or None


def _to_stop_it(command: Sequence[str]) -> str:
    if not command:
        return "stop it by hand"
    return f"to stop it, run: {shlex.join(command)}"


def _stop_command(path: Path) -> list[str] | None:
    """The demotion hook of a member that died as primary; None for any other."""
    try:
        with path.open("rb") as file:
            state = json.loads(file.read(MAX_BYTES))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(state, dict) or state.get("role") in {None, Role.SECONDARY.value}:
        return None
    command = state.get("stop_command")
    return [str(word) for word in command] if isinstance(command, list) else []
