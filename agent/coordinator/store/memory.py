"""A store in memory, which is lost with its process: for tests, for trying things out, for a demonstration.

Keeps the same JSON text as the durable stores, so that it refuses the same values. No call waits, so each one is
atomic.
"""

import uuid
from collections.abc import Mapping, Sequence

from agent.coordinator.store import MOST_RETIRED, Stored
from agent.coordinator.store.codec import HISTORY_BOUND, decode, encode, name_of
from agent.errors import CasMismatch, ExitCode, StoreError
from agent.model import AccessList, GroupKey, GroupRecord, HistoryEntry, Progress


class MemoryStore:
    """A Store without durability. The calls are described at the Protocol."""

    def __init__(self) -> None:
        self.store_id = str(uuid.uuid4())
        self._version = 0  # never repeated, even for a group that is created again
        self._records: dict[GroupKey, tuple[int, str]] = {}
        self._progress: dict[GroupKey, Progress] = {}
        self._history: dict[GroupKey, dict[int, str]] = {}
        self._access: dict[tuple[str, str], str] = {}
        self._retired: dict[GroupKey, int] = {}
        self._restored = False
        self._closed = False

    async def load(self) -> dict[GroupKey, Stored]:
        """Load every group."""
        self._check_open()
        return {
            key: Stored(version, decode(GroupRecord, text, name_of(key)), self._progress.get(key))
            for key, (version, text) in self._records.items()
        }

    async def create(self, key: GroupKey, record: GroupRecord) -> int:
        """Add a group; return its version. Raises CasMismatch if the group exists."""
        self._check_open()
        if key in self._records:
            raise CasMismatch(f"{name_of(key)} exists already")
        return self._put(key, encode(record, name_of(key)))

    async def swap(
        self,
        key: GroupKey,
        expected: int,
        record: GroupRecord,
        history: Sequence[HistoryEntry] = (),
    ) -> int:
        """Replace a record and upsert history by epoch; return the new version, or raise CasMismatch."""
        self._check_open()
        self._check_version(key, expected)
        text = encode(record, name_of(key))
        entries = {entry.epoch: encode(entry, name_of(key)) for entry in history}
        kept = self._history.get(key, {}) | entries
        self._history[key] = {epoch: kept[epoch] for epoch in sorted(kept)[-HISTORY_BOUND:]}
        return self._put(key, text)

    async def settle(self, key: GroupKey, expected: int) -> Stored | None:  # noqa: ARG002 - every outcome is known
        """The record, or None."""
        return (await self.load()).get(key)

    async def save_progress(self, progress: Mapping[GroupKey, Progress]) -> None:
        """Replace the progress of each of these groups; a key without a group is ignored."""
        self._check_open()
        self._progress |= {key: value for key, value in progress.items() if key in self._records}

    async def delete(self, key: GroupKey, expected: int, epoch: int) -> None:
        """Remove a group with its history and progress, and remember its epoch; or CasMismatch."""
        self._check_open()
        self._check_version(key, expected)
        del self._records[key]
        self._history.pop(key, None)
        self._progress.pop(key, None)
        if epoch > 0:
            self._retired.pop(key, None)
            self._retired[key] = epoch
        while len(self._retired) > MOST_RETIRED:
            del self._retired[next(iter(self._retired))]

    async def retired_epoch(self, key: GroupKey) -> int:
        """The epoch that was remembered for the name, or 0."""
        self._check_open()
        return self._retired.get(key, 0)

    async def history(
        self, key: GroupKey, *, skip: int = 0, count: int = 100
    ) -> tuple[int, list[HistoryEntry]]:
        """How many tenures are kept, and ``count`` of them after ``skip``, newest first."""
        self._check_open()
        kept = self._history.get(key, {})
        epochs = sorted(kept, reverse=True)[skip : skip + count]
        return len(kept), [decode(HistoryEntry, kept[epoch], name_of(key)) for epoch in epochs]

    async def access(self, tenant: str, namespace: str) -> AccessList | None:
        """The access-control list of a namespace's groups, or None if none was ever set."""
        self._check_open()
        text = self._access.get((tenant, namespace))
        return None if text is None else decode(AccessList, text, f"{tenant}/{namespace}")

    async def set_access(self, tenant: str, namespace: str, acl: AccessList | None) -> None:
        """Replace that list; None removes it."""
        self._check_open()
        if acl is None:
            self._access.pop((tenant, namespace), None)
        else:
            self._access[tenant, namespace] = encode(acl, f"{tenant}/{namespace}")

    async def declare_restored(self) -> None:
        """Remember that the store was put back from an older copy."""
        self._check_open()
        self._restored = True

    async def is_restored(self) -> bool:
        """Whether ``declare_restored`` was called."""
        self._check_open()
        return self._restored

    async def close(self) -> None:
        """Refuse further calls."""
        self._closed = True

    def _check_open(self) -> None:
        if self._closed:
            raise StoreError(
                "the store is closed; calls have to come before close()",
                exit_code=ExitCode.INTERNAL,
            )

    def _check_version(self, key: GroupKey, expected: int) -> None:
        version, _ = self._records.get(key, (None, ""))
        if version != expected:
            found = "the group is gone" if version is None else f"it is at version {version}"
            raise CasMismatch(f"{name_of(key)} is not at version {expected} any more: {found}")

    def _put(self, key: GroupKey, text: str) -> int:
        self._version += 1
        self._records[key] = (self._version, text)
        return self._version
