"""Bounds on what callers with wrong credentials may cost: failed checks by address, and remembered checks."""

import ipaddress
from collections.abc import Callable
from typing import Generic, TypeVar

MOST_KEYS = 10_000
"""Addresses, or names at an address, whose failures are counted: a megabyte or two."""

V = TypeVar("V")


class FailureLimit:
    """How many checks may fail for each key: a few at once, and then so many a second.

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
        """Seconds until a check for this key may fail again; 0: now."""
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
    """The outcomes of checks, each until a moment; the oldest are forgotten beyond ``most``."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._kept: dict[bytes, tuple[float, V]] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: bytes, now: float) -> V | None:
        """The outcome, or None if there is none any more."""
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
    """What the failures of a host are counted under: its address, or its /64 network in IPv6.

    Whoever has one IPv6 address has its network's 2**64.
    """
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host.encode()
    if isinstance(address, ipaddress.IPv6Address):
        return address.ipv4_mapped.packed if address.ipv4_mapped else address.packed[:8]
    return address.packed
