"""The hold-off after failed tenures (R8): a backoff that doubles up to a limit."""

MAX_DOUBLINGS = 32
"""Cap the exponent so that the delay cannot overflow; the limit is reached long before."""


class Cooldown:
    """The backoff of one session.

    Attributes:
        until: no role is accepted before this moment; CLOCK_BOOTTIME seconds.
    """

    def __init__(self) -> None:
        self.until = float("-inf")
        self._failures = 0
        self._pending_s = 0.0

    def record_failure(self, first_s: float, limit_s: float, lasted_s: float) -> None:
        """Compute the next delay; it doubles with each failure after a short tenure.

        Args:
            first_s: the delay after the first failure.
            limit_s: the longest delay.
            lasted_s: how long the member was Primary.
        """
        if lasted_s >= limit_s:
            self._failures = 0
        self._failures += 1
        doubled_s = first_s * 2.0 ** min(self._failures - 1, MAX_DOUBLINGS)
        self._pending_s = min(doubled_s, limit_s)

    def start(self, now: float) -> bool:
        """Start the delay, once the demotion is done; return whether there is one."""
        pending_s, self._pending_s = self._pending_s, 0.0
        if pending_s > 0:
            self.until = now + pending_s
        return pending_s > 0
