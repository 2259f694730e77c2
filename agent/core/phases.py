"""The phases of a session, and the table of every way from one to another.

``TABLE`` has a row for each (phase, turn): the next phase, and the sentence that operators see in the
log, the status and systemd. ``next_phase`` looks a row up before anything is changed; a pair without a
row is our own mistake, and raises. ``IGNORED`` has the events that mean nothing in a phase. The diagram
in docs/roles.md is drawn from the table.
"""

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import NamedTuple

from agent.core.events import (
    Answered,
    BeatFailed,
    Event,
    Fitness,
    HookEnded,
    Joined,
    Left,
    Released,
    Stalled,
    StatusSeen,
    Stop,
    Tick,
)


class Phase(StrEnum):
    """How far a session is."""

    STARTING = "starting"
    """The demotion hook runs: the previous process may have died as primary (R6)."""
    RETURNING = "returning"
    """The tenure of the previous process is being released."""
    JOINING = "joining"
    """Not registered, or not any more; a lease that it holds goes on."""
    MEMBER = "member"
    COOLING = "cooling"
    """It has left the group after a failure, and had no epoch to release and be held off by."""
    STOPPING = "stopping"
    """The last demotion."""
    RELEASING = "releasing"
    """Demoted: waiting for heartbeats and releases under way."""
    LEAVING = "leaving"
    ENDED = "ended"


class Turn(StrEnum):
    """What moves a session from one phase to another."""

    DEMOTED = "demoted"
    FORMER_TENURE = "former_tenure"
    """Demoted, and the previous process held a tenure."""
    FORMER_RELEASED = "former_released"
    REGISTERED = "registered"
    REGISTERED_AGAIN = "registered_again"
    """At a server without epochs, which may have lost its data (R3)."""
    UNKNOWN = "unknown"
    """The server does not know the session."""
    RETIMED = "retimed"
    """The group has another failover timeout."""
    REPLACED = "replaced"
    """A server without a store id has got one."""
    COOL_DOWN = "cool_down"
    COOLED_DOWN = "cooled_down"
    STOP = "stop"
    SETTLED = "settled"
    """Nothing is under way that could still give this session the role."""
    LEFT = "left"
    DEMOTION_FAILED = "demotion_failed"


class Row(NamedTuple):
    """Where a turn leads, and what operators read from then on."""

    phase: Phase
    sentence: str


FIRST_SENTENCE = "demoting first: the previous process may have left the workload running"

_FAILED = Row(Phase.ENDED, "demotion failed: exiting without releasing the role")
_STOP = Row(Phase.STOPPING, "stopping: demoting")

TABLE: Mapping[tuple[Phase, Turn], Row] = MappingProxyType(
    {
        (Phase.STARTING, Turn.DEMOTED): Row(Phase.JOINING, "joining the group"),
        (Phase.STARTING, Turn.FORMER_TENURE): Row(
            Phase.RETURNING, "releasing the tenure of the previous process"
        ),
        (Phase.STARTING, Turn.STOP): _STOP,
        (Phase.STARTING, Turn.DEMOTION_FAILED): _FAILED,
        (Phase.RETURNING, Turn.FORMER_RELEASED): Row(Phase.JOINING, "joining the group"),
        (Phase.RETURNING, Turn.STOP): _STOP,
        (Phase.JOINING, Turn.REGISTERED): Row(Phase.MEMBER, "registered in the group"),
        (Phase.JOINING, Turn.REGISTERED_AGAIN): Row(
            Phase.MEMBER,
            "registered again at a server without epochs: no role for one failover timeout",
        ),
        (Phase.JOINING, Turn.STOP): _STOP,
        (Phase.JOINING, Turn.DEMOTION_FAILED): _FAILED,
        (Phase.MEMBER, Turn.UNKNOWN): Row(
            Phase.JOINING, "the server does not know this session: joining again"
        ),
        (Phase.MEMBER, Turn.RETIMED): Row(
            Phase.JOINING, "the group's failover timeout has changed: joining again"
        ),
        (Phase.MEMBER, Turn.REPLACED): Row(
            Phase.JOINING, "the server has a store id now: joining again"
        ),
        (Phase.MEMBER, Turn.COOL_DOWN): Row(Phase.COOLING, "cooling down outside the group"),
        (Phase.MEMBER, Turn.STOP): _STOP,
        (Phase.MEMBER, Turn.DEMOTION_FAILED): _FAILED,
        (Phase.COOLING, Turn.COOLED_DOWN): Row(Phase.JOINING, "cooled down: joining the group"),
        (Phase.COOLING, Turn.STOP): _STOP,
        (Phase.STOPPING, Turn.DEMOTED): Row(
            Phase.RELEASING, "stopping: demoted, waiting for answers under way"
        ),
        (Phase.STOPPING, Turn.DEMOTION_FAILED): _FAILED,
        (Phase.RELEASING, Turn.SETTLED): Row(Phase.LEAVING, "stopping: leaving the group"),
        (Phase.LEAVING, Turn.LEFT): Row(Phase.ENDED, "stopped"),
    }
)

_EVENTS: tuple[type[Event], ...] = (
    Answered,
    BeatFailed,
    Fitness,
    HookEnded,
    Joined,
    Left,
    Released,
    Stalled,
    StatusSeen,
    Stop,
    Tick,
)

IGNORED: frozenset[tuple[Phase, type[Event]]] = frozenset(
    [(phase, Joined) for phase in Phase if phase is not Phase.JOINING]
    + [(phase, Left) for phase in Phase if phase not in {Phase.COOLING, Phase.LEAVING}]
    + [(Phase.ENDED, event) for event in _EVENTS]
)
"""A late answer to a request of an earlier phase, and everything once the session has ended."""


def next_phase(phase: Phase, turn: Turn) -> Row:
    """The table's row.

    Raises:
        AssertionError: there is no such row; a mistake in this project.
    """
    try:
        return TABLE[phase, turn]
    except KeyError:
        raise AssertionError(f"a session that is {phase} cannot be {turn}") from None


def phase_diagram() -> str:
    """The table as a Mermaid state diagram."""
    lines = ["stateDiagram-v2", f"    [*] --> {Phase.STARTING}"]
    lines += [
        f"    {before} --> {row.phase}: {turn.replace('_', ' ')}"
        for (before, turn), row in TABLE.items()
    ]
    return "\n".join([*lines, f"    {Phase.ENDED} --> [*]"])
