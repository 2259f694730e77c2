"""Read what the previous process of this member has left in the state file.

Owns which of it is trusted: processes of another boot or PID namespace cannot be seen from here.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from agent.core.session import PreviousTenure
from agent.ops.logs import Log

log = Log(__name__)


def previous_tenure(state: Mapping[str, Any], stop_command: Sequence[str]) -> PreviousTenure | None:
    """The tenure that the previous process has not released.

    Args:
        state: the content of its state file.
        stop_command: the current demotion hook. If the previous process had another one, the current
            one may not stop its workload, so its lease has to expire.
    """
    unreleased = state.get("unreleased")
    if not isinstance(unreleased, dict) or previous_store(state) is None:
        return None
    if not is_of_this_boot(state):
        return None  # its processes may still be alive, on another machine or in another namespace
    epoch, instance = unreleased.get("epoch"), unreleased.get("instance")
    if not isinstance(epoch, int) or not isinstance(instance, str):
        return None
    if state.get("stop_command") != list(stop_command):
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


def previous_instances(state: Mapping[str, Any]) -> set[str]:
    """The instances of previous processes that may have left something running here."""
    if not is_of_this_boot(state):
        return set()
    unreleased = state.get("unreleased")
    given = {state.get("instance"), unreleased.get("instance") if unreleased else None}
    return {instance for instance in given if isinstance(instance, str) and instance}


def is_of_this_boot(state: Mapping[str, Any]) -> bool:
    """Whether the processes of the state's writer would be visible here."""
    return state.get("boot") is not None and state["boot"] == boot_id()


def previous_store(state: Mapping[str, Any]) -> str | None:
    """The store that the previous process had joined."""
    store = state.get("store")
    return store if isinstance(store, str) else None
