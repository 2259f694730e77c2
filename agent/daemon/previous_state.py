"""Read what the previous process of this member has left in the state file.

Owns which parts of it are used: processes of another boot or PID namespace cannot be seen from this process.
"""

import os
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, TypeGuard

from agent import proctree
from agent.core.session import PreviousTenure
from agent.drivers.hooks.spec import HookSpec, shown
from agent.drivers.statefile import StateFile, in_use
from agent.ops.logs import Log

INSTANCE = re.compile(r"[0-9A-Za-z-]{1,64}")
"""The form of an instance."""

MARK = re.compile(r"[0-9a-f]{16}")
"""The form of a member's mark: it is part of the path of a cgroup, and of an environment variable."""

log = Log(__name__)


def read_previous(state_file: StateFile) -> Mapping[str, Any]:
    """Read the state that the previous process has left; empty without one.

    Raises:
        ConfigError: SESSION_IN_USE, the process that wrote it still runs, although its lock file is gone.
    """
    state = state_file.read() or {}
    if state.get("pid") != os.getpid() and writer_lives(state):
        raise in_use(state_file.path, state["pid"])
    return state


def writer_lives(state: Mapping[str, Any]) -> bool:
    """Whether the process that wrote the state is visible here, and lives. Raises OSError."""
    writer: object = [state.get("pid"), state.get("pid_start")]
    return is_of_this_boot(state) and _is_process(writer) and proctree.lives(writer)


def previous_tenure(state: Mapping[str, Any], hook: HookSpec | None) -> PreviousTenure | None:
    """The tenure that the previous process has not released.

    Args:
        state: the content of its state file.
        hook: the current demotion hook. If the previous process had another one, or ran it with another user,
            directory or environment, the current one may not stop its workload, so its lease has to expire.
    """
    unreleased = state.get("unreleased")
    if not isinstance(unreleased, dict) or previous_store(state) is None:
        return None
    if not is_of_this_boot(state):
        return None  # processes of the tenure may still be alive, on another machine or in another namespace
    epoch, instance = unreleased.get("epoch"), unreleased.get("instance")
    if not isinstance(epoch, int) or not _is_instance(instance):
        return None
    scripts = previous_scripts(state)
    stop_command, context = ((), None) if hook is None else (hook.value, hook.context.digest)
    is_directory = any(map(os.path.isdir, stop_command[:1]))
    known = isinstance(state.get("stop_scripts"), list) and (scripts or not is_directory)
    lacks_scripts = not known or not all(map(os.path.isfile, scripts))
    before = [state.get("stop_command"), state.get("stop_context")]
    if before != [list(shown(stop_command)), context] or lacks_scripts:
        log.warning(
            "role of the previous process not released: it had another demotion hook",
            epoch=epoch,
            resolution="make sure that its workload is stopped",
            stop_command=state.get("stop_command"),
        )
        return None
    return PreviousTenure(epoch, instance)


@cache
def boot_id() -> str | None:
    """The boot of the machine and the PID namespace: they identify the processes that are visible here."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return None


def previous_scripts(state: Mapping[str, Any]) -> tuple[str, ...]:
    """The scripts that belong to the demotion of the tenure that has not been released."""
    return _strings_of(state, "stop_scripts")


def _strings_of(state: Mapping[str, Any], key: str) -> tuple[str, ...]:
    given = state.get(key)
    return tuple(map(str, given)) if isinstance(given, list) else ()


def previous_processes(
    state: Mapping[str, Any],
) -> tuple[tuple[str, ...], tuple[proctree.Process, ...]]:
    """The processes that previous agents may have left: their marks, and those listed in the state file.

    The list has processes without a mark, too, such as a hook whose exec hangs.
    """
    marks = tuple(filter(MARK.fullmatch, _strings_of(state, "marks")))
    given = state.get("processes")
    if not is_of_this_boot(state) or not isinstance(given, list):
        return marks, ()
    return marks, tuple((pid, start) for pid, start in filter(_is_process, given))


def _is_process(given: object) -> TypeGuard[tuple[int, int]]:
    return isinstance(given, list) and [type(number) for number in given] == [int, int]


def _is_instance(given: object) -> TypeGuard[str]:
    return isinstance(given, str) and INSTANCE.fullmatch(given) is not None


def is_of_this_boot(state: Mapping[str, Any]) -> bool:
    """Whether the processes of the state's writer would be visible here."""
    return state.get("boot") is not None and state["boot"] == boot_id()


def previous_store(state: Mapping[str, Any]) -> str | None:
    """The store that the previous process had joined."""
    store = state.get("store")
    return store if isinstance(store, str) else None
