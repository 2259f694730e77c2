"""The durable state of the coordinator, as a few small calls (R13).

A record is one value with a version; ``swap`` is a compare-and-set. When a call that changes
something returns, the change is durable; when it raises, nothing of it is. The stores do not know
what a record means: deciding is core/group.py's, loading and swapping is service.py's.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from agent.model import AccessList, GroupConfig, GroupKey, GroupRecord, HistoryEntry, Progress

MOST_ENTRIES = 100
"""Tenures in one swap; a decision begins or ends a few."""

MOST_RETIRED = 100_000
"""How many deleted groups' epochs are remembered, by name: some megabytes."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A record, the version that a swap of it has to name, and the progress that was saved for it."""

    version: int
    record: GroupRecord
    progress: Progress | None = None


class Store(Protocol):
    """One coordinator's durable state. Calls may overlap; each is atomic.

    All calls but ``close`` raise StoreError if the disk or the server fails: then nothing was changed, and the
    store is usable again once the cause is gone. Two kinds of StoreError differ: OutcomeUnknown, after which the
    change may have been made, and LeadershipLost.
    """

    @property
    def store_id(self) -> str:
        """The random id that this store was given when it was made; a copy of it has the same."""
        ...

    async def load(self) -> dict[GroupKey, Stored]:
        """Every group there is. Asked once, at the start."""
        ...

    async def create(self, key: GroupKey, record: GroupRecord) -> int:
        """Add a group; its version. Raises CasMismatch if there is one."""
        ...

    async def swap(
        self,
        key: GroupKey,
        expected: int,
        record: GroupRecord,
        history: Sequence[HistoryEntry] = (),
    ) -> int:
        """Replace a record, and upsert at most MOST_ENTRIES of history by epoch, in one transaction.

        Returns the new version. Raises CasMismatch if the version is not ``expected`` any more, or the
        group is gone.
        """
        ...

    async def settle(self, key: GroupKey, expected: int) -> Stored | None:
        """The record, for good: no earlier change of unknown outcome can happen any more.

        ``expected`` is the version that such a change has named. The record may have a new version; None
        if there is no group.
        """
        ...

    async def save_progress(self, progress: Mapping[GroupKey, Progress]) -> None:
        """Replace the progress of each of these groups, all in one write.

        It is kept beside the record: it changes neither record nor version, and a swap does not
        change it. A key without a group is ignored.
        """
        ...

    async def delete(self, key: GroupKey, expected: int, epoch: int) -> None:
        """Remove a group with its history and progress, and remember ``epoch`` for its name if it is above 0.

        Of the names that are remembered the oldest are forgotten beyond MOST_RETIRED. Raises
        CasMismatch as ``swap`` does.
        """
        ...

    async def retired_epoch(self, key: GroupKey) -> int:
        """The epoch that was remembered when a group of this name was last deleted, or 0."""
        ...

    async def history(
        self, key: GroupKey, *, skip: int = 0, count: int = 100
    ) -> tuple[int, list[HistoryEntry]]:
        """How many tenures are kept, and ``count`` of them after ``skip``, newest first."""
        ...

    async def access(self, tenant: str, namespace: str) -> AccessList | None:
        """The access-control list of a namespace's groups, or None if none was ever set."""
        ...

    async def set_access(self, tenant: str, namespace: str, acl: AccessList | None) -> None:
        """Replace that list; None removes it."""
        ...

    async def declare_restored(self) -> None:
        """Remember that the store was put back from an older copy (restored.py)."""
        ...

    async def is_restored(self) -> bool:
        """Whether ``declare_restored`` was called, and nobody has trusted the store since ('store trust')."""
        ...

    async def close(self) -> None:
        """Finish what was begun and let go of the data directory. May be called twice."""
        ...


class Directory(Protocol):
    """The part of a store of several coordinators that is not of one shard. Raises StoreError."""

    @property
    def store_id(self) -> str:
        """As ``Store.store_id``."""
        ...

    async def configs(
        self,
        tenant: str,
        namespace: str,
        skip: int,
        count: int,
        visible: Callable[[AccessList | None], bool],
    ) -> tuple[int, list[GroupConfig]]:
        """How many groups a namespace has, and ``count`` of them after ``skip``, sorted by id.

        Those are left out whose own access-control list (or None) is not ``visible``.
        """
        ...

    async def access(self, tenant: str, namespace: str) -> AccessList | None:
        """As ``Store.access``."""
        ...

    async def set_access(self, tenant: str, namespace: str, acl: AccessList | None) -> None:
        """As ``Store.set_access``."""
        ...
