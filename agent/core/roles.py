"""The transition table: which change of role is possible, and the sentence that operators see.

Both sides obey it: what the coordinator assigns to a session, and what an agent says of itself. A
pair that is not in the table is our own mistake, and raises. The diagram in docs/roles.md is drawn
from the table.
"""

from collections.abc import Mapping
from types import MappingProxyType

from agent.model import Role

TRANSITIONS: Mapping[tuple[Role, Role], str] = MappingProxyType(
    {
        (Role.SECONDARY, Role.PENDING_PRIMARY): "chosen to take over, and getting ready",
        (Role.PENDING_PRIMARY, Role.PRIMARY): "confirmed while no other lease is alive",
        (Role.PENDING_PRIMARY, Role.SECONDARY): "not to take over after all",
        (Role.PRIMARY, Role.SECONDARY): "demoted: the lease has ended, or was given back or taken",
    }
)


def check_transition(before: Role, after: Role) -> str:
    """The table's sentence for a change of role.

    Raises:
        AssertionError: there is no such row; a mistake in this project.
    """
    try:
        return TRANSITIONS[before, after]
    except KeyError:
        raise AssertionError(f"no role change from {before} to {after} is possible") from None


def diagram() -> str:
    """The table as a Mermaid state diagram."""
    lines = ["stateDiagram-v2", f"    [*] --> {Role.SECONDARY}"]
    lines += [f"    {a} --> {b}: {why}" for (a, b), why in TRANSITIONS.items()]
    return "\n".join(lines)
