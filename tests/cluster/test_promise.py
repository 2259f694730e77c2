"""Several coordinators keep the promise under any schedule of faults (R19), or a planted fault is found.

Each planted fault is a mistake that several coordinators invite. The same search that finds nothing without
it has to find it, or the search proves nothing. FAILOVER_SIMULATION_SEED is where all searches begin, and
FAILOVER_SIMULATION_EXAMPLES, divided by 20, the number of schedules that must keep the promise.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from math import inf

import pytest

from agent.coordinator.engine import Engine
from agent.coordinator.leadership import Leadership
from agent.coordinator.shards import Shard
from agent.coordinator.store import Stored
from agent.coordinator.store.etcd import EtcdCluster
from agent.coordinator.store.etcd_client import (
    Done,
    Etcd,
    EtcdUnknown,
    Found,
    Json,
    KeyValue,
    if_revision,
)
from agent.coordinator.store.etcd_shard import EtcdStore
from agent.core.group_state import GroupState, Live
from agent.errors import CasMismatch, StoreError
from agent.model import GroupKey

from .schedule import live_through
from .world import BrokenPromiseError, Kinds

SCHEDULES = int(os.environ.get("FAILOVER_SIMULATION_EXAMPLES", "2000")) // 20
FIRST = int(os.environ.get("FAILOVER_SIMULATION_SEED", "0"))
"""The first seed of each search. None is better than another one."""

LIMIT = 2_000
"""Schedules within which each planted fault has to be found, from any first seed."""


class _UnfencedStore(EtcdStore):
    def __init__(self, cluster: EtcdCluster, shard: int, leader_revision: int) -> None:
        super().__init__(cluster, shard, leader_revision)
        self._fence = if_revision("/f/absent", 0)


class ComparesNoLeadership(EtcdCluster):
    """A durable change compares the record's revision only."""

    def shard(self, number: int, leader_revision: int) -> EtcdStore:
        return _UnfencedStore(self, number, leader_revision)


class _HastyStore(EtcdStore):
    async def _commit(
        self, key: GroupKey, expected: int, steps: list[Json], token: str | None, *also: Json
    ) -> Done | KeyValue:
        conditions = [if_revision(self._layout.record(key), expected), self._fence, *also]
        try:
            done = await self._etcd.txn(conditions, steps)
        except EtcdUnknown as error:
            raise StoreError("nothing was changed") from error
        if not done.succeeded:
            raise CasMismatch("not at this version")
        return done


class TakesUnknownForFailure(EtcdCluster):
    """A write without an answer counts as one that has failed."""

    def shard(self, number: int, leader_revision: int) -> EtcdStore:
        return _HastyStore(self, number, leader_revision)


class AnswersOn(Leadership):
    """Leadership ends when that is heard of, not when its time is over."""

    async def _renew(self) -> None:
        await super()._renew()
        self._lease.until = inf


class KeepsLive:
    """What is known of leases survives a change of the leader."""

    def __init__(self, engine: Engine, boottime: Callable[[], float]) -> None:
        self.engine = engine
        self.boottime = boottime
        self.kept: dict[GroupKey, Live] = {}

    def lead(self, shard: Shard, stored: Mapping[GroupKey, Stored]) -> None:
        self.engine.lead(shard, stored)
        for key in stored:
            group = self.engine.groups[key]
            live = self.kept.get(key)
            if live is not None and live.contacts.keys() == group.state.live.contacts.keys():
                group.state = GroupState(group.state.record, live)

    def drop(self, shard: Shard) -> None:
        self.kept |= {key: group.state.live for key, group in self.engine.groups.items()}
        self.engine.drop(shard)


class DoesNotWait(KeepsLive):
    """A new leader gives nobody the grace of a full L."""

    def lead(self, shard: Shard, stored: Mapping[GroupKey, Stored]) -> None:
        self.engine.lead(shard, stored)
        for key in stored:
            group = self.engine.groups[key]
            live = replace(group.state.live, lease_until=self.boottime())
            group.state = GroupState(group.state.record, live)


class ReadsFromAnyMember(Etcd):
    """Ranges are serializable reads: a member of etcd answers by what it has applied."""

    async def range(self, what: Json, *, once: bool = False) -> Found:
        wanted = what["request_range"] | {"serializable": True}
        return await super().range({"request_range": wanted}, once=once)


class TrustsAnyRenewal(Etcd):
    """A renewal counts, even if a leader of etcd has confirmed it that is deposed."""

    async def keep_alive(self, lease: int) -> int | None:
        return None if await super().keep_alive(lease) is None else 0

    async def range(self, what: Json, *, once: bool = False) -> Found:
        return replace(await super().range(what, once=once), term=0)


PLANTED = {
    "compares no leadership": Kinds(cluster=ComparesNoLeadership),
    "takes unknown for failure": Kinds(cluster=TakesUnknownForFailure),
    "answers on": Kinds(leadership=AnswersOn),
    "keeps live": Kinds(decider=KeepsLive),
    "does not wait": Kinds(decider=DoesNotWait),
    "reads from any member": Kinds(etcd=ReadsFromAnyMember),
    "trusts any renewal": Kinds(etcd=TrustsAnyRenewal),
}


@pytest.mark.parametrize("first", range(0, SCHEDULES, 25))
def test_r19_no_schedule_breaks_the_promise(first: int) -> None:
    """Never two active, no decision by a stale record, and a primary again after the faults."""
    for seed in range(FIRST + first, FIRST + min(first + 25, SCHEDULES)):
        live_through(seed)


@pytest.mark.parametrize("name", PLANTED)
def test_r19_a_search_finds_a_planted_fault(name: str) -> None:
    """Without the fault, the same schedule keeps the promise."""
    for seed in range(FIRST, FIRST + LIMIT):
        try:
            live_through(seed, PLANTED[name], live_on=False)
        except BrokenPromiseError:
            live_through(seed)
            return
    pytest.fail(f"not found within {LIMIT} schedules")
