"""When the next heartbeat is due, and which ones are in flight (R3).

The answer to a *forgotten* heartbeat can neither promote nor renew, but it may still name a tenure that
has to be released.
"""

from agent.core.effects import SendHeartbeat

MAX_IN_FLIGHT = 64
"""The most heartbeats in flight whose answers count: the request timeout may be set to many heartbeat intervals."""

MAX_CONFIRMATIONS = 10
"""How many heartbeats in a row are sent without a delay while the answer is PendingPrimary (docs/api.md, "Sessions
and heartbeats")."""

JITTER_SHARE = 0.1
"""Share of the interval that is jitter, so that agents that were started together do not send together."""

GOLDEN = 0.6180339887498949
"""Multiples of the golden ratio, modulo 1, are evenly spread: jitter without randomness."""


class Heartbeats:
    """The heartbeats of one session. Moments are CLOCK_BOOTTIME seconds.

    Attributes:
        due_at: when to send the next one.
        not_before: end of the pause that a server has asked for (Retry-After).
        confirmations: how many were sent without a delay since the session was chosen.
    """

    def __init__(self, jitter: float) -> None:
        """Build it for one process.

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

    def send(self, now: float, heartbeat_interval_s: float) -> SendHeartbeat:
        """The next heartbeat; the one after it is due an interval later, less some jitter."""
        self._count += 1
        self._sent = _newest({**self._sent, self._count: now})
        share = (self._jitter + self._count * GOLDEN) % 1.0
        self.due_at = now + heartbeat_interval_s * (1.0 - JITTER_SHARE * share)
        return SendHeartbeat(self._count)

    def send_by(self, at: float) -> None:
        """Send the next one at this moment, unless it is due earlier."""
        self.due_at = min(self.due_at, at)

    def send_now(self, now: float, *, interval_s: float, obey_pause: bool) -> None:
        """Send the next one now.

        Args:
            now: this moment.
            interval_s: the minimum interval after a heartbeat in flight, whose answer may have the news
                already; the coordinator would refuse an earlier one.
            obey_pause: whether to wait for the end of a pause that a server asked for.
        """
        self.confirmations = 0
        not_before = self.not_before if obey_pause else now
        in_flight_at = max(self._sent.values(), default=float("-inf"))
        self.due_at = max(now, not_before, in_flight_at + interval_s)

    def send_confirmation(self, now: float) -> None:
        """Send the next one without a delay, at most MAX_CONFIRMATIONS times in a row."""
        if self.confirmations < MAX_CONFIRMATIONS:
            self.confirmations += 1
            self.due_at = now

    def back_off(self, until: float) -> None:
        """Send no heartbeat before the moment that the server asked for."""
        self.due_at = self.not_before = until

    def finish(self, number: int) -> float | None:
        """Record that a heartbeat was answered or has failed.

        Returns:
            When it was sent, or None if its answer may neither promote nor renew.
        """
        sent_at = self._sent.get(number)
        self._sent = {n: at for n, at in self._sent.items() if n != number}
        self._forgotten = {n: at for n, at in self._forgotten.items() if n != number}
        return sent_at

    def forget(self) -> None:
        """Forget all that are in flight: their answers may neither promote nor renew."""
        self._forgotten = _newest({**self._forgotten, **self._sent})
        self._sent = {}

    def all_finished_by(self, timeout_s: float) -> float:
        """When the last one in flight is answered or has timed out; minus infinity if none is."""
        sent_at = max([*self._sent.values(), *self._forgotten.values()], default=float("-inf"))
        return sent_at + timeout_s


def _newest(sent: dict[int, float]) -> dict[int, float]:
    return dict(sorted(sent.items())[-MAX_IN_FLIGHT:])
