"""Any sequence of calls leaves a store with what a dictionary would hold."""

import asyncio
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from agent.coordinator.store import Store, Stored
from agent.coordinator.store.memory import MemoryStore
from agent.coordinator.store.sqlite import SqliteStore
from agent.errors import CasMismatch
from agent.model import (
    AccessEntry,
    AccessList,
    GroupConfig,
    GroupKey,
    GroupRecord,
    HistoryEntry,
    Progress,
    Trustee,
)

from .conftest import SINCE

keys = st.builds(GroupKey, st.just("t"), st.sampled_from("nN"), st.sampled_from("ab"))
epochs = st.integers(0, 9)
moments = st.datetimes(datetime(2, 1, 1), timezones=st.just(UTC))  # noqa: DTZ001 - the zone is added
records = st.builds(
    lambda epoch: GroupRecord(GroupConfig("g", 10_000_000), epoch=epoch, revision=epoch), epochs
)
histories = st.lists(
    st.builds(HistoryEntry, epochs, st.sampled_from("xy"), st.just(SINCE), st.text(max_size=2)),
    max_size=3,
)


class Machine(RuleBasedStateMachine):
    """A store beside its model. ``versions`` are all that were ever given, the stale ones too."""

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.store = self.open()
        self.groups: dict[GroupKey, Stored] = {}
        self.histories: dict[GroupKey, dict[int, HistoryEntry]] = {}
        self.lists: dict[str, AccessList] = {}
        self.versions: list[int] = [0]

    def open(self) -> Store:
        raise NotImplementedError

    def teardown(self) -> None:
        self.runner.run(self.store.close())
        self.runner.close()

    def expected(self, key: GroupKey, pick: int) -> int:
        """The version of ``key`` half of the time; otherwise one that was given some time."""
        if pick % 2 and key in self.groups:
            return self.groups[key].version
        return self.versions[pick % len(self.versions)]

    def keep(self, key: GroupKey, version: int, record: GroupRecord) -> None:
        assert version not in self.versions
        self.versions.append(version)
        known = self.groups.get(key)
        self.groups[key] = Stored(version, record, known.progress if known else None)

    @rule(key=keys, record=records)
    def create(self, key: GroupKey, record: GroupRecord) -> None:
        if key in self.groups:
            with pytest.raises(CasMismatch):
                self.runner.run(self.store.create(key, record))
        else:
            self.keep(key, self.runner.run(self.store.create(key, record)), record)

    @rule(key=keys, pick=st.integers(0, 99), record=records, history=histories)
    def swap(
        self, key: GroupKey, pick: int, record: GroupRecord, history: list[HistoryEntry]
    ) -> None:
        expected = self.expected(key, pick)
        swap = self.store.swap(key, expected, record, history)
        if key in self.groups and self.groups[key].version == expected:
            self.keep(key, self.runner.run(swap), record)
            self.histories.setdefault(key, {}).update({entry.epoch: entry for entry in history})
        else:
            with pytest.raises(CasMismatch):
                self.runner.run(swap)

    @precondition(lambda self: self.groups)
    @rule(key=keys, candidates=st.lists(records, min_size=2, max_size=4))
    def race(self, key: GroupKey, candidates: list[GroupRecord]) -> None:
        if key not in self.groups:
            return
        expected = self.groups[key].version

        async def overlap() -> list[int | BaseException]:
            swaps = (self.store.swap(key, expected, record) for record in candidates)
            return await asyncio.gather(*swaps, return_exceptions=True)

        outcomes = self.runner.run(overlap())
        won = [n for n, outcome in enumerate(outcomes) if isinstance(outcome, int)]
        assert len(won) == 1
        assert sum(isinstance(o, CasMismatch) for o in outcomes) == len(candidates) - 1
        version = outcomes[won[0]]
        assert isinstance(version, int)
        self.keep(key, version, candidates[won[0]])

    @rule(key=keys, pick=st.integers(0, 99))
    def delete(self, key: GroupKey, pick: int) -> None:
        expected = self.expected(key, pick)
        if key in self.groups and self.groups[key].version == expected:
            self.runner.run(self.store.delete(key, expected, 1))
            del self.groups[key]
            self.histories.pop(key, None)
        else:
            with pytest.raises(CasMismatch):
                self.runner.run(self.store.delete(key, expected, 1))

    @rule(progress=st.dictionaries(keys, st.builds(Progress, epochs, moments)))
    def save_progress(self, progress: dict[GroupKey, Progress]) -> None:
        self.runner.run(self.store.save_progress(progress))
        for key in progress.keys() & self.groups.keys():
            self.groups[key] = replace(self.groups[key], progress=progress[key])

    @rule(namespace=st.sampled_from("nN"), rights=st.integers(0, 31))
    def set_access(self, namespace: str, rights: int) -> None:
        acl = AccessList((AccessEntry(Trustee(1, "u"), denied=False, rights=rights),))
        self.runner.run(self.store.set_access("t", namespace, acl))
        self.lists[namespace] = acl

    @rule(namespace=st.sampled_from("nN"))
    def remove_access(self, namespace: str) -> None:
        self.runner.run(self.store.set_access("t", namespace, None))
        self.lists.pop(namespace, None)

    @rule(key=keys, skip=st.integers(0, 4), count=st.integers(0, 4))
    def read_history(self, key: GroupKey, skip: int, count: int) -> None:
        kept = sorted(
            self.histories.get(key, {}).values(), key=lambda entry: entry.epoch, reverse=True
        )
        read = self.runner.run(self.store.history(key, skip=skip, count=count))
        assert read == (len(kept), kept[skip : skip + count])

    @invariant()
    def the_store_holds_what_the_model_holds(self) -> None:
        assert self.runner.run(self.store.load()) == self.groups
        for namespace in "nN":
            assert self.runner.run(self.store.access("t", namespace)) == self.lists.get(namespace)


class MemoryMachine(Machine):
    def open(self) -> Store:
        return MemoryStore()


class SqliteMachine(Machine):
    def open(self) -> Store:
        self.directory = TemporaryDirectory()
        return SqliteStore.open(Path(self.directory.name))

    @rule()
    def reopen(self) -> None:
        self.runner.run(self.store.close())
        self.store = SqliteStore.open(Path(self.directory.name))
        self.versions = [0, *(stored.version for stored in self.groups.values())]

    def teardown(self) -> None:
        super().teardown()
        self.directory.cleanup()


TestMemory = MemoryMachine.TestCase
TestMemory.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
TestSqlite = SqliteMachine.TestCase
TestSqlite.settings = settings(max_examples=15, stateful_step_count=20, deadline=None)
