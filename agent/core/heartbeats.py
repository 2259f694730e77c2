"""When the next heartbeat is due, and which ones are under way (R3).

A heartbeat that is *forgotten* can neither promote nor extend, but its answer may still name a tenure
that has to be released.
"""

from agent.core.effects import SendBeat

MAX_IN_FLIGHT = 8
"""Heartbeats under way at once. Each is bound by the request timeout, which is under three beats."""

MAX_CONFIRMATIONS = 10
"""Heartbeats sent at once, one after the other, while the answer is PendingPrimary (docs/api.md, "What v1 clients do, and what they get")."""

JITTER_SHARE = 0.1
"""By how much of a beat heartbeats are spread, so that agents started together drift apart."""

GOLDEN = 0.6180339887498949
"""Multiples of the golden ratio, modulo 1, are spread evenly: jitter without chance."""


class Heartbeats:
    """The heartbeats of one session. Moments are CLOCK_BOOTTIME seconds.

    Attributes:
        due_at: when the next one is to be sent.
        not_before: until then a server has asked for no heartbeat (Retry-After).
        confirmations: how many were sent at once since the session was chosen.
    """

    def __init__(self, jitter: float) -> None:
        """Make it for a process.

        Args:
            jitter: from 0 to 1, different for each process.
        """
        self.due_at = float("inf")
        self.not_before = float("-inf")
        self.confirmations = 0
        self._jitter = jitter
        self._count = 0
        self._sent: dict[int, float] = {}
        self._forgotten: dict[int, float] = {}

    def send(self, now: float, beat_s: float) -> SendBeat:
        """The next heartbeat; the one after it is due a beat later, less some jitter."""
        self._count += 1
        self._sent = _newest({**self._sent, self._count: now})
        share = (self._jitter + self._count * GOLDEN) % 1.0
        self.due_at = now + beat_s * (1.0 - JITTER_SHARE * share)
        return SendBeat(self._count)

    def hurry(self, at: float) -> None:
        """Send the next one at a moment, unless it is due earlier."""
        self.due_at = min(self.due_at, at)

    def ask(self, now: float, *, obey_pause: bool) -> None:
        """Send the next one now, as there is news; or after the pause that a server asked for."""
        self.confirmations = 0
        self.due_at = max(now, self.not_before) if obey_pause else now

    def confirm(self, now: float) -> None:
        """Send the next one at once, as long as that was not done too often."""
        if self.confirmations < MAX_CONFIRMATIONS:
            self.confirmations += 1
            self.due_at = now

    def back_off(self, until: float) -> None:
        """Send none until a moment that the server asked for."""
        self.due_at = self.not_before = until

    def end(self, beat: int) -> float | None:
        """Take in that a heartbeat was answered or has failed.

        Returns:
            When it was sent, or None if it may neither promote nor extend.
        """
        sent_at = self._sent.get(beat)
        self._sent = {b: at for b, at in self._sent.items() if b != beat}
        self._forgotten = {b: at for b, at in self._forgotten.items() if b != beat}
        return sent_at

    def forget(self) -> None:
        """Let nothing that is under way promote or extend."""
        self._forgotten = _newest({**self._forgotten, **self._sent})
        self._sent = {}

    def answered_by(self, timeout_s: float) -> float:
        """When all that are under way are answered, at the latest; minus infinity if none is."""
        sent_at = max([*self._sent.values(), *self._forgotten.values()], default=float("-inf"))
        return sent_at + timeout_s


def _newest(sent: dict[int, float]) -> dict[int, float]:
    return dict(sorted(sent.items())[-MAX_IN_FLIGHT:])
