"""The transition table: which change of role is possible, and the sentence that operators see.

Both sides follow it: the coordinator in the roles that it assigns, the agent in those that it publishes.
A pair that is not in the table is a bug of ours, and raises. The diagram in docs/roles.md is generated
from the table.
"""

from collections.abc import Mapping
from types import MappingProxyType

from agent.model import Role

TRANSITIONS: Mapping[tuple[Role, Role], str] = MappingProxyType(
    {
        (Role.SECONDARY, Role.PENDING_PRIMARY): "chosen to take over",
        (Role.PENDING_PRIMARY, Role.PRIMARY): "confirmed, and no other lease is valid",
        (Role.PENDING_PRIMARY, Role.SECONDARY): "no longer chosen to take over",
        (
            Role.PRIMARY,
            Role.SECONDARY,
        ): "demoted: the lease has expired, or the role was released or revoked",
    }
)


def check_transition(before: Role, after: Role) -> str:
    """The table's sentence for a change of role.

    Raises:
        AssertionError: there is no such row; a bug of ours.
    """
    try:
        return TRANSITIONS[before, after]
    except KeyError:
        raise AssertionError(f"no role change from {before} to {after} is possible") from None
