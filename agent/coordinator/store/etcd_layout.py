"""The keys and values of a store in etcd. Sends nothing but one read.

After the prefix a key continues with ``meta``, ``restored``, ``live/`` (keys that end with their coordinator),
``access/``, ``saves/``, ``deletions/`` or ``shards/``. Names of tenants, namespaces and groups are percent-encoded.
"""

import hashlib
import json
import uuid
from dataclasses import dataclass
from urllib.parse import quote, unquote

from agent.coordinator.store.codec import decode, decode_progress, upgrade_record
from agent.coordinator.store.etcd_client import Etcd, KeyValue
from agent.errors import ExitCode, StoreError
from agent.model import GroupKey, GroupRecord, Progress
from agent.schema.scalars import format_date_time

SCHEMA = 2
"""Incremented with each change that earlier versions cannot read. 2: records restrict who may be promoted
(R24)."""


@dataclass(frozen=True, slots=True)
class Meta:
    """The identity of a store in etcd, written once by the first coordinator.

    Attributes:
        moved_to: where the groups were copied to, so that nobody may serve them here any more; or None.
        revision: of the key that holds this value.
        copy_id: the number of the copy that was made here, which its source also records; 0 once the store has
            been served. A copy that was never served may be replaced by another one.
        schema: the schema of the version that served it last.
    """

    store_id: str
    shards: int
    moved_to: str | None
    revision: int
    copy_id: int = 0
    schema: int = SCHEMA


@dataclass(frozen=True, slots=True)
class Layout:
    """The keys. ``prefix`` has no slash at its end."""

    prefix: str
    shards: int

    @property
    def meta(self) -> str:
        """The key of the identity."""
        return f"{self.prefix}/meta"

    @property
    def restored(self) -> str:
        """The key whose presence means that the store was declared as restored from a copy."""
        return f"{self.prefix}/restored"

    @property
    def live(self) -> str:
        """The prefix of all keys that live as long as a coordinator: members and leaders."""
        return f"{self.prefix}/live/"

    @property
    def access_changed(self) -> str:
        """A key that is written with every change of an access list, so that caches are emptied."""
        return f"{self.live}access"

    def member(self, member: str) -> str:
        """The key of a coordinator."""
        return f"{self.live}members/{member}"

    def leader(self, shard: int) -> str:
        """The leadership key of a shard."""
        return f"{self.live}leaders/{shard}"

    def shard_of(self, key: GroupKey) -> int:
        """The shard of a group: the same at every coordinator, for good."""
        digest = hashlib.sha256("\0".join(key).encode(errors="surrogatepass")).digest()
        return int.from_bytes(digest[:8], "big") % self.shards

    def records(self, shard: int) -> str:
        """The prefix of a shard's records."""
        return f"{self.prefix}/shards/{shard}/groups/"

    def record(self, key: GroupKey) -> str:
        """The key of a record."""
        return self._of("groups", key)

    def progress(self, key: GroupKey) -> str:
        """The key of a group's progress."""
        return self._of("progress", key)

    def all_progress(self, shard: int) -> str:
        """The prefix of a shard's progress."""
        return f"{self.prefix}/shards/{shard}/progress/"

    def last_save(self, shard: int) -> str:
        """A key that is written with each save of a shard's progress, so that a delayed save is not carried out after a later one."""
        return f"{self.prefix}/saves/{shard}"

    def last_deletion(self, shard: int) -> str:
        """The same for deletions of groups, so that a delayed creation is not carried out after a deletion."""
        return f"{self.prefix}/deletions/{shard}"

    def history(self, key: GroupKey) -> str:
        """The prefix of a group's tenures."""
        return self._of("history", key) + "/"

    def tenure(self, key: GroupKey, epoch: int) -> str:
        """The key of a tenure; keys sort as epochs do."""
        return f"{self.history(key)}{epoch:020d}"

    def retired(self, key: GroupKey) -> str:
        """The key of a deleted group's epoch."""
        return self._of("retired", key)

    def all_retired(self, shard: int) -> str:
        """The prefix of the epochs of a shard's deleted groups."""
        return f"{self.prefix}/shards/{shard}/retired/"

    def access(self, tenant: str, namespace: str) -> str:
        """The key of a namespace's access list."""
        return f"{self.prefix}/access/{quoted(tenant)}/{quoted(namespace)}"

    def _of(self, kind: str, key: GroupKey) -> str:
        name = "/".join(map(quoted, key))
        return f"{self.prefix}/shards/{self.shard_of(key)}/{kind}/{name}"


def quoted(name: str) -> str:
    """A name as a part of a key. Raises StoreError for half a surrogate pair."""
    try:
        return quote(name, safe="")
    except UnicodeEncodeError as error:
        raise StoreError(
            f"a name cannot be kept: {error}; nothing was changed", exit_code=ExitCode.INTERNAL
        ) from None


def group_key_of(key: str) -> GroupKey:
    """The group whose name is at the end of a key."""
    return GroupKey(*(unquote(part) for part in key.split("/")[-3:]))


def record_value(text: str, token: str | None = None) -> str:
    """The value of a record's key: a random token, and the record's text."""
    return f"{token or uuid.uuid4()}\n{text}"


def record_of_key(found: KeyValue, place: str) -> GroupRecord:
    """Decode a record, also one that schema 1 wrote. Raises StoreError."""
    _token, _, text = found.value.partition("\n")
    if '"cleared":' not in text:  # cannot match inside a string, where quotes are escaped
        text, _ = upgrade_record(text, place)
    return decode(GroupRecord, text, place)


async def read_meta(etcd: Etcd, prefix: str) -> Meta | None:
    """The identity of a store, or None if there is none. Raises StoreError if it is unusable."""
    found = await etcd.get(f"{prefix}/meta")
    if found is None:
        return None
    try:
        text = json.loads(found.value)
        schema = text["Schema"]
        meta = Meta(
            text["StoreId"],
            text["Shards"],
            text.get("MovedTo"),
            found.revision,
            int(text.get("IsCopy", 0)),
            schema,
        )
    except (ValueError, KeyError, TypeError):
        raise StoreError(
            f"{prefix}/meta in etcd is not what a coordinator wrote: restore etcd from a copy, or name"
            " another --etcd-prefix"
        ) from None
    if schema > SCHEMA:
        raise StoreError(
            f"the store under {prefix} of etcd was written by a newer version of this program: its schema"
            f" is {schema}, and this version knows {SCHEMA}: install that version",
            exit_code=ExitCode.DATA_DIR_NEWER,
        )
    return meta


def progress_value(progress: Progress) -> str:
    """The value of a progress key."""
    return f"{progress.epoch} {format_date_time(progress.last_data)}"


def progress_of_key(found: KeyValue) -> Progress:
    """The progress of its key. Raises StoreError."""
    epoch, _, last_data = found.value.partition(" ")
    return decode_progress(epoch, last_data, f"{found.key} in etcd")


def epoch_of_key(found: KeyValue) -> int:
    """The epoch of a deleted group. Raises StoreError."""
    try:
        return int(found.value)
    except ValueError:
        text = (
            f"{found.key} in etcd must be the last epoch of a deleted group, a number: correct it"
        )
        raise StoreError(text) from None
