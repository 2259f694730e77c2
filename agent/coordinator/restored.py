"""Declare that a store was put back from an older copy: ``serve --restored`` (R34).

The copy does not know who became primary after it was made. With failsafe such a primary may stay active for any
time, so nobody is chosen in a group until an operator lifts that group's restriction. The copy may also lack
groups. Therefore the store keeps the declaration, and groups that are created later are restricted, too, until an
operator trusts the store again.
"""

import asyncio
from collections.abc import Callable

from agent.coordinator.store import Store, Stored
from agent.core.group import decide
from agent.core.group_state import Decision, DeclareRestored, Policy, state_after_restart
from agent.model import GroupKey, Instant

AT_ONCE = 100
"""Groups that are declared in parallel: a store writes changes that arrive together faster."""


def distrust(stored: Stored, now: Instant, policy: Policy) -> Decision:
    """Decide the restriction of one group."""
    state = state_after_restart(stored.record, now, stored.progress)
    return decide(state, DeclareRestored(), now, policy)


async def declare_restored(store: Store, clock: Callable[[], Instant], policy: Policy) -> int:
    """Declare a store that nobody serves yet, with every group of it; return the number of groups.

    Raises:
        StoreError: not every group is declared. Call it again.
    """

    async def declare(key: GroupKey, stored: Stored) -> None:
        decision = distrust(stored, clock(), policy)
        await store.swap(key, stored.version, decision.state.record, decision.history)

    await store.declare_restored()
    groups = list((await store.load()).items())
    for first in range(0, len(groups), AT_ONCE):
        await asyncio.gather(*(declare(*group) for group in groups[first : first + AT_ONCE]))
    return len(groups)
