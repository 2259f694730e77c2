"""Whether the coordinator still answers this process (R26).

Owns which requests are unanswered, and since when. Only an answer of the coordinator itself, or its refusal, is
contact; an error of a proxy, for example, is not. Knows nothing of roles.
"""

from agent.core.heartbeats import MAX_IN_FLIGHT

JOIN = 0
"""The number of a registration, which is retried until it is answered; heartbeats have numbers from 1."""


class Contact:
    """The contact of one session with the coordinator. Moments are CLOCK_BOOTTIME seconds.

    What counts is when a request was *sent*: an answer ends the doubt only if no later request has failed.
    """

    def __init__(self) -> None:
        self._sent: dict[int, float] = {}
        self._answered_at = float("-inf")
        """When the newest answered request was sent."""
        self._failed_at = float("-inf")
        """When the newest failed request was sent."""

    def on_sent(self, number: int, now: float) -> None:
        """Record that a request is sent; a registration counts from its first attempt."""
        sent = {**self._sent, number: self._sent.get(number, now)}
        self._sent = dict(sorted(sent.items())[-MAX_IN_FLIGHT:])

    def on_ended(self, number: int, *, contact: bool) -> None:
        """Record that a request was answered by the coordinator, or has failed."""
        sent_at = self._sent.get(number)
        if sent_at is None:
            return
        self._sent = {n: at for n, at in self._sent.items() if n != number}
        if contact:
            self._answered_at = max(self._answered_at, sent_at)
        else:
            self._failed_at = max(self._failed_at, sent_at)

    @property
    def is_waiting(self) -> bool:
        """Whether a request is unanswered that was sent no earlier than the newest answered one."""
        return self._oldest_unanswered_at is not None

    def doubt_at(self, silence_s: float) -> float:
        """From when on the coordinator is in doubt; infinity while nothing is unanswered."""
        if self._failed_at > self._answered_at:
            return float("-inf")
        oldest_at = self._oldest_unanswered_at
        return float("inf") if oldest_at is None else oldest_at + silence_s

    @property
    def _oldest_unanswered_at(self) -> float | None:
        later = [at for at in self._sent.values() if at >= self._answered_at]
        return min(later, default=None)
