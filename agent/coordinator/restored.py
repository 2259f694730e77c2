"""A store that an operator has put back from an older copy and declares so: ``serve --restored`` (R34).

The copy does not know who became primary after it was made. With failsafe such a primary may stay active for as
long as it likes, so nobody is chosen in any group until an operator lifts that, group by group. Groups may be
missing in the copy, so that the declaration is kept in the store: each group that is created later starts like
the others, at every coordinator, until an operator trusts the store again.
"""

import asyncio
from collections.abc import Callable

from agent.coordinator.store import Store, Stored
from agent.core.group import decide
from agent.core.group_state import Decision, DeclareRestored, Policy, state_after_restart
from agent.model import GroupKey, Instant

AT_ONCE = 100
"""Groups in one batch: stores commit what comes together at once."""


def distrust(stored: Stored, now: Instant, policy: Policy) -> Decision:
    """The decision for one group."""
    state = state_after_restart(stored.record, now, stored.progress)
    return decide(state, DeclareRestored(), now, policy)


async def declare_restored(store: Store, clock: Callable[[], Instant], policy: Policy) -> int:
    """Declare a store that nobody serves yet, and every group of it; how many groups there are.

    Raises:
        StoreError: not all of them are declared. It may be called again.
    """

    async def declare(key: GroupKey, stored: Stored) -> None:
        decision = distrust(stored, clock(), policy)
        await store.swap(key, stored.version, decision.state.record, decision.history)

    await store.declare_restored()
    groups = list((await store.load()).items())
    for first in range(0, len(groups), AT_ONCE):
        await asyncio.gather(*(declare(*group) for group in groups[first : first + AT_ONCE]))
    return len(groups)
