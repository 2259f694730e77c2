"""Spread shards evenly over the coordinators: pure functions of the keys seen in etcd (R19).

A member with fewer shards than its share claims vacant ones, and a member with at least two more than another
hands one over to it. Every member decides by its own view of the keys; the transactions in leadership.py settle
conflicts.
"""

import json
from dataclasses import dataclass, field
from math import ceil

from agent.coordinator.store.etcd_client import Event
from agent.errors import StoreError


@dataclass(frozen=True, slots=True)
class Leader:
    """Who leads a shard: a member, its URL, and the mod revision of the key that states it."""

    member: str
    url: str
    revision: int


@dataclass(slots=True)
class View:
    """The keys under ``live/`` as last seen: members with their URLs, leaders by shard.

    Attributes:
        access: revision of the last change of an access list.
    """

    revision: int = 0
    members: dict[str, str] = field(default_factory=dict)
    leaders: dict[int, Leader] = field(default_factory=dict)
    access: int = 0

    def apply(self, prefix: str, event: Event) -> None:
        """Apply a change of one key to the view. Raises StoreError."""
        kind, _, name = event.key.removeprefix(prefix).partition("/")
        try:
            self._apply(kind, name, event)
        except (ValueError, KeyError, TypeError):
            text = f"{event.key} in etcd is not what a coordinator wrote: delete it"
            raise StoreError(text) from None

    def _apply(self, kind: str, name: str, event: Event) -> None:
        value = event.value
        if kind == "members":
            if value is None:
                self.members.pop(name, None)
            else:
                self.members[name] = json.loads(value)["Url"]
        elif kind == "leaders":
            if value is None:
                self.leaders.pop(int(name), None)
            else:
                one = json.loads(value)
                self.leaders[int(name)] = Leader(one["Member"], one["Url"], event.revision)
        elif kind == "access":
            self.access = event.revision

    def counts(self) -> dict[str, int]:
        """How many shards each member leads."""
        counts = dict.fromkeys(self.members, 0)
        for leader in self.leaders.values():
            if leader.member in counts:
                counts[leader.member] += 1
        return counts


def shards_to_claim(view: View, me: str, vacant: list[int], shards: int) -> list[int]:
    """The vacant shards that a member should claim: up to its share, beginning at a place of its own."""
    counts = view.counts()
    share = ceil(shards / max(1, len(counts))) - counts.get(me, 0)
    if share <= 0 or not vacant:
        return []
    rank = sorted(counts).index(me) if me in counts else 0
    first = rank * len(vacant) // max(1, len(counts))
    return (vacant[first:] + vacant[:first])[:share]


def member_to_hand_a_shard_to(view: View, me: str, shards: int) -> str | None:
    """The member that should get one of my shards; None if they are spread evenly, or one is vacant."""
    if len(view.leaders) < shards:
        return None
    counts = view.counts()
    least = min(counts, key=lambda member: (counts[member], member), default=me)
    return least if counts.get(me, 0) - counts.get(least, 0) > 1 else None
