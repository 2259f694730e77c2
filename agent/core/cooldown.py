"""How long a session asks not to be chosen after a failure (R8): backoff that doubles up to a limit."""

MOST_DOUBLINGS = 32
"""Cap the exponent so that the delay cannot overflow; the limit is reached long before."""


class Cooldown:
    """The backoff of one session.

    Attributes:
        until: before this moment no role is accepted; CLOCK_BOOTTIME seconds.
    """

    def __init__(self) -> None:
        self.until = float("-inf")
        self._failures = 0
        self._owed_s = 0.0

    def failed(self, first_s: float, limit_s: float, lasted_s: float) -> None:
        """Owe a wait; a longer one with each failure after a short tenure.

        Args:
            first_s: the wait after the first failure.
            limit_s: the longest wait.
            lasted_s: how long the tenure lasted as Primary.
        """
        if lasted_s >= limit_s:
            self._failures = 0
        self._failures += 1
        doubled_s = first_s * 2.0 ** min(self._failures - 1, MOST_DOUBLINGS)
        self._owed_s = min(doubled_s, limit_s)

    def begin(self, now: float) -> bool:
        """Start the wait that is owed, once the demotion is done; whether there is one."""
        owed_s, self._owed_s = self._owed_s, 0.0
        if owed_s > 0:
            self.until = now + owed_s
        return owed_s > 0
