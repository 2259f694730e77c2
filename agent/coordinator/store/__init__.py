"""The interface of a store: the durable state of the coordinator, in a few small calls (R13).

A record is one value with a version; ``swap`` is a compare-and-set. When a call that changes something returns, the
change is durable; when it raises, nothing was changed. The stores do not know what a record means: core/group.py
decides, and engine.py loads and swaps.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from agent.model import AccessList, GroupConfig, GroupKey, GroupRecord, HistoryEntry, Progress

MOST_ENTRIES = 100
"""The most tenures in one swap; a decision begins or ends a few."""

MOST_RETIRED = 100_000
"""How many deleted groups' epochs are remembered, by name: some megabytes."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A record, the version to pass to the next swap, and the progress that was saved with it."""

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
        """The random id that the store was given when it was made; a copy has the same id."""
        ...

    async def load(self) -> dict[GroupKey, Stored]:
        """Load every group. Called once, at the start."""
        ...

    async def create(self, key: GroupKey, record: GroupRecord) -> int:
        """Add a group; return its version. Raises CasMismatch if the group exists."""
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
        """The record, or None without the group. No earlier change of unknown outcome can happen after this.

        ``expected`` is the version that such a change was based on. The record may get a new version.
        """
        ...

    async def save_progress(self, progress: Mapping[GroupKey, Progress]) -> None:
        """Replace the progress of each of these groups, in one write. A key without a group is ignored.

        Progress is stored beside the record: it changes neither the record nor its version, and a swap does
        not change it.
        """
        ...

    async def delete(self, key: GroupKey, expected: int, epoch: int) -> None:
        """Remove a group with its history and progress, and remember ``epoch`` for its name if it is above 0.

        Beyond MOST_RETIRED remembered names the oldest are forgotten. Raises CasMismatch as ``swap``
        does.
        """
        ...

    async def retired_epoch(self, key: GroupKey) -> int:
        """The epoch that was remembered when a group of this name was last deleted, or 0."""
        ...

    async def history(
        self, key: GroupKey, *, skip: int = 0, count: int = 100
    ) -> tuple[int, list[HistoryEntry]]:
        """How many tenures are stored, and ``count`` of them after ``skip``, newest first."""
        ...

    async def access(self, tenant: str, namespace: str) -> AccessList | None:
        """The access-control list of a namespace's groups, or None if none was ever set."""
        ...

    async def set_access(self, tenant: str, namespace: str, acl: AccessList | None) -> None:
        """Replace the access-control list of a namespace's groups; None removes it."""
        ...

    async def declare_restored(self) -> None:
        """Remember that the store was put back from an older copy (restored.py)."""
        ...

    async def is_restored(self) -> bool:
        """Whether ``declare_restored`` was called, and nobody has trusted the store since ('store trust')."""
        ...

    async def close(self) -> None:
        """Finish the calls in progress, and release the data directory. May be called twice."""
        ...


class Directory(Protocol):
    """The part of several coordinators' store that belongs to no shard. Calls raise StoreError."""

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
