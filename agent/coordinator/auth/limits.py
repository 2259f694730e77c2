"""Bounds on what callers with wrong credentials may cost: failed checks by address, and remembered checks."""

import ipaddress
from collections.abc import Callable
from typing import Generic, TypeVar

MOST_KEYS = 10_000
"""For how many addresses, or names at an address, failures are counted: a megabyte or two."""

V = TypeVar("V")


class FailureLimit:
    """Limits how many checks may fail for each key: ``burst`` at once, and then ``per_s`` a second.

    Args:
        burst: failures in a row.
        per_s: failures a second after that.
        clock: monotonic seconds.
    """

    def __init__(self, burst: int, per_s: float, clock: Callable[[], float]) -> None:
        self._burst = burst
        self._per_s = per_s
        self._clock = clock
        self._left: dict[bytes, tuple[float, float]] = {}

    def wait_s(self, key: bytes) -> float:
        """Seconds until another check for this key is allowed; 0: now."""
        return max(0.0, (1 - self._tokens(key)) / self._per_s)

    def fail(self, key: bytes) -> None:
        """Count a failed check."""
        tokens = self._tokens(key) - 1
        self._left.pop(key, None)
        if len(self._left) >= MOST_KEYS:
            self._left.pop(next(iter(self._left)))
        self._left[key] = tokens, self._clock()

    def forget(self, key: bytes) -> None:
        """Forget the failures of a key."""
        self._left.pop(key, None)

    def _tokens(self, key: bytes) -> float:
        tokens, at = self._left.get(key, (float(self._burst), 0.0))
        return min(float(self._burst), tokens + (self._clock() - at) * self._per_s)


class Remembered(Generic[V]):
    """Outcomes of checks, each with a moment of expiry; beyond ``most`` the oldest are forgotten."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._kept: dict[bytes, tuple[float, V]] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: bytes, now: float) -> V | None:
        """The outcome, or None if it has expired or was forgotten."""
        until, value = self._kept.get(key, (0.0, None))
        return value if now < until else None

    def put(self, key: bytes, value: V, until: float) -> None:
        """Remember an outcome."""
        self._kept.pop(key, None)
        if len(self._kept) >= self._most:
            self._kept.pop(next(iter(self._kept)))
        self._kept[key] = until, value

    def clear(self) -> None:
        """Forget everything."""
        self._kept.clear()


def address_key(host: str) -> bytes:
    """The key under which a host's failures are counted: its IPv4 address, or its IPv6 /64 network.

    A host with one IPv6 address can use all 2**64 of its network.
    """
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host.encode()
    if isinstance(address, ipaddress.IPv6Address):
        return address.ipv4_mapped.packed if address.ipv4_mapped else address.packed[:8]
    return address.packed
