"""The phases of a session, and the table of every transition between them.

``TABLE`` has a row for each (phase, trigger): the next phase, and the sentence that operators see in
the log, the status and systemd. ``next_phase`` looks a row up before anything is changed; a pair
without a row is a bug of ours, and raises. ``IGNORED`` has the events that have no effect in a phase.
The diagram in docs/roles.md is generated from the table.
"""

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import NamedTuple

from agent.core.events import (
    Answered,
    Asked,
    Event,
    FitnessChanged,
    HeartbeatAnswered,
    HeartbeatFailed,
    HookEnded,
    Joined,
    Left,
    Released,
    Stalled,
    StatusRead,
    Stop,
    Tick,
)


class Phase(StrEnum):
    """The phase of a session."""

    STARTING = "starting"
    """The demotion hook runs: the previous process may have died as primary (R6)."""
    RETURNING = "returning"
    """The tenure of the previous process is being released."""
    JOINING = "joining"
    """Registering, for the first time or again; a lease continues."""
    MEMBER = "member"
    COOLING = "cooling"
    """Out of the group for the hold-off after a failure: without an epoch there is no release to report it with."""
    STOPPING = "stopping"
    """The last demotion."""
    RELEASING = "releasing"
    """Demoted: waiting for heartbeats and releases in flight."""
    LEAVING = "leaving"
    ENDED = "ended"


class Trigger(StrEnum):
    """What triggers a transition from one phase to another."""

    DEMOTED = "demoted"
    PREVIOUS_TENURE = "previous_tenure"
    """Demoted, and the previous process held a tenure."""
    PREVIOUS_RELEASED = "previous_released"
    REGISTERED = "registered"
    REGISTERED_AGAIN = "registered_again"
    """Registered again, at a server without epochs, which may have lost its data (R3)."""
    UNKNOWN = "unknown"
    """The server does not know the session."""
    RETIMED = "retimed"
    """The group has another failover timeout."""
    REPLACED = "replaced"
    """The server has a store id, but had none before."""
    COOL_DOWN = "cool_down"
    COOLED_DOWN = "cooled_down"
    STOP = "stop"
    SETTLED = "settled"
    """No request in flight can still assign the role to this session."""
    LEFT = "left"
    DEMOTION_FAILED = "demotion_failed"


class Row(NamedTuple):
    """The next phase, and the sentence that operators see in it."""

    phase: Phase
    sentence: str


FIRST_SENTENCE = "demoting first: the previous process may have left the workload running"

_FAILED = Row(Phase.ENDED, "demotion failed: exiting without releasing the role")
_STOP = Row(Phase.STOPPING, "stopping: demoting")

TABLE: Mapping[tuple[Phase, Trigger], Row] = MappingProxyType(
    {
        (Phase.STARTING, Trigger.DEMOTED): Row(Phase.JOINING, "joining the group"),
        (Phase.STARTING, Trigger.PREVIOUS_TENURE): Row(
            Phase.RETURNING, "releasing the tenure of the previous process"
        ),
        (Phase.STARTING, Trigger.STOP): _STOP,
        (Phase.STARTING, Trigger.DEMOTION_FAILED): _FAILED,
        (Phase.RETURNING, Trigger.PREVIOUS_RELEASED): Row(Phase.JOINING, "joining the group"),
        (Phase.RETURNING, Trigger.STOP): _STOP,
        (Phase.JOINING, Trigger.REGISTERED): Row(Phase.MEMBER, "registered in the group"),
        (Phase.JOINING, Trigger.REGISTERED_AGAIN): Row(
            Phase.MEMBER,
            "registered again at a server without epochs: refusing any role for one failover timeout",
        ),
        (Phase.JOINING, Trigger.STOP): _STOP,
        (Phase.JOINING, Trigger.DEMOTION_FAILED): _FAILED,
        (Phase.MEMBER, Trigger.UNKNOWN): Row(
            Phase.JOINING, "session unknown to the server: joining again"
        ),
        (Phase.MEMBER, Trigger.RETIMED): Row(
            Phase.JOINING, "failover timeout of the group changed: joining again"
        ),
        (Phase.MEMBER, Trigger.REPLACED): Row(
            Phase.JOINING, "the server has a store id now: joining again"
        ),
        (Phase.MEMBER, Trigger.COOL_DOWN): Row(Phase.COOLING, "cooling down outside the group"),
        (Phase.MEMBER, Trigger.STOP): _STOP,
        (Phase.MEMBER, Trigger.DEMOTION_FAILED): _FAILED,
        (Phase.COOLING, Trigger.COOLED_DOWN): Row(Phase.JOINING, "cooled down: joining the group"),
        (Phase.COOLING, Trigger.STOP): _STOP,
        (Phase.STOPPING, Trigger.DEMOTED): Row(
            Phase.RELEASING, "stopping: demoted, waiting for heartbeats and releases in flight"
        ),
        (Phase.STOPPING, Trigger.DEMOTION_FAILED): _FAILED,
        (Phase.RELEASING, Trigger.SETTLED): Row(Phase.LEAVING, "stopping: leaving the group"),
        (Phase.LEAVING, Trigger.LEFT): Row(Phase.ENDED, "stopped"),
    }
)

_EVENTS: tuple[type[Event], ...] = (
    Answered,
    Asked,
    HeartbeatAnswered,
    HeartbeatFailed,
    FitnessChanged,
    HookEnded,
    Joined,
    Left,
    Released,
    Stalled,
    StatusRead,
    Stop,
    Tick,
)

IGNORED: frozenset[tuple[Phase, type[Event]]] = frozenset(
    [(phase, Joined) for phase in Phase if phase is not Phase.JOINING]
    + [(phase, Left) for phase in Phase if phase not in {Phase.COOLING, Phase.LEAVING}]
    + [(Phase.ENDED, event) for event in _EVENTS]
)
"""Late answers to requests of an earlier phase, and every event once the session has ended."""


def next_phase(phase: Phase, trigger: Trigger) -> Row:
    """The table's row.

    Raises:
        AssertionError: there is no such row; a bug of ours.
    """
    try:
        return TABLE[phase, trigger]
    except KeyError:
        raise AssertionError(f"no transition from {phase} by {trigger}") from None
