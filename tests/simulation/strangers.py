"""Callers that are no members: they have the rights, and know or guess public data.

A stranger knows session ids and the epoch, since anybody may read the status. It does not know the
instance of a process, which is in heartbeats only. It has a perfect network and acts at once.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from agent.core.group_state import (
    AddSession,
    Input,
    ReceiveHeartbeat,
    ReleaseRole,
    RemoveGroup,
    RemoveSession,
    SetOverride,
)
from agent.model import RoleOverride, SessionConfig

from .host import GREATEST_EPOCH

if TYPE_CHECKING:
    from .coordinator import CoordinatorHost

A_MILLION_DAYS_S = 86_400e6


def release(coordinator: "CoordinatorHost", session_id: str, which: int) -> None:
    """A stranger releases a role that it does not hold, with a hold-off."""
    epoch = coordinator.state.record.epoch + (0, 0, 1, -1)[which % 4]
    instance = (None, "stranger#1")[which // 4 % 2]
    hold_off_s = (0.0, A_MILLION_DAYS_S)[which // 2 % 2]
    what = ReleaseRole(session_id, epoch, instance=instance, why="?", hold_off_s=hold_off_s)
    _send(coordinator, what, f"releases epoch {epoch} of {session_id}")


def delete(coordinator: "CoordinatorHost", session_id: str, _: int) -> None:
    """A stranger deletes a session."""
    coordinator.submit(RemoveSession(session_id), lambda _: None)


def recreate(coordinator: "CoordinatorHost", session_id: str, which: int) -> None:
    """A stranger deletes a session and registers it again, perhaps to impersonate it."""
    _send(coordinator, RemoveSession(session_id), f"deletes {session_id} and makes it anew")
    coordinator.submit(AddSession(SessionConfig(session_id)), lambda _: None)
    if which % 2:
        beat(coordinator, session_id, which)


def beat(coordinator: "CoordinatorHost", session_id: str, which: int) -> None:
    """A stranger sends a heartbeat as a session, without an instance or with its own."""
    instance = (None, "stranger#1")[which % 2]
    seen = (None, 0, coordinator.state.record.epoch)[which // 2 % 3]
    what = ReceiveHeartbeat(session_id, 100.0, instance=instance, seen_epoch=seen)
    _send(coordinator, what, f"heartbeats as {session_id}")


def teach(coordinator: "CoordinatorHost", session_id: str, which: int) -> None:
    """A stranger claims to have seen an epoch that never existed."""
    epoch = coordinator.state.record.epoch
    seen = (GREATEST_EPOCH, epoch + 1, epoch + 1000, GREATEST_EPOCH - 1)[which % 4]
    instance = (None, "stranger#1")[which // 4 % 2]
    what = ReceiveHeartbeat(session_id, 100.0, instance=instance, seen_epoch=seen)
    _send(coordinator, what, f"has seen epoch {seen}")


def override(coordinator: "CoordinatorHost", session_id: str, which: int) -> None:
    """A stranger sets an override."""
    value = RoleOverride.PRIMARY if which % 4 else RoleOverride.OFF
    coordinator.submit(SetOverride(session_id, value), lambda _: None)


def delete_group(coordinator: "CoordinatorHost", _: str, __: int) -> None:
    """A stranger deletes the group, which is refused while a session is alive."""
    coordinator.submit(RemoveGroup(), lambda _: None)


def crowd(coordinator: "CoordinatorHost", _: str, which: int) -> None:
    """A stranger registers new sessions, one for each free or dead one of a full group."""
    names = [f"crowd-{coordinator.world.now:.3f}-{number}" for number in range(1 + which % 8)]
    coordinator.world.record("stranger", f"registers {len(names)} new sessions")
    for name in names:
        coordinator.submit(AddSession(SessionConfig(name)), lambda _: None)


def _send(coordinator: "CoordinatorHost", what: Input, text: str) -> None:
    coordinator.world.record("stranger", text)
    coordinator.submit(what, lambda _: None)


ACTS: dict[str, Callable[["CoordinatorHost", str, int], None]] = {
    "stranger_release": release,
    "remove_session": delete,
    "stranger_recreate": recreate,
    "stranger_beat": beat,
    "stranger_teach": teach,
    "stranger_override": override,
    "delete_group": delete_group,
    "crowd": crowd,
}
"""Faults that are acts of strangers."""
