"""A member's promise not to become primary while another member may be primary by its vote (R30-R32).

Owns when a promise began, for which epoch, and what it forbids. A promise lasts L by this process's own clock and
is not stored. Instead the start of a process counts as a promise, since the previous process may have given one.
Knows neither roles nor phases.
"""

NEVER = float("-inf")


class FailsafeVoter:
    """The promises of one process. Moments are CLOCK_BOOTTIME seconds.

    Attributes:
        promised_to: session id of the member that received the newest promise.
        refuses_until: no role is accepted before this moment, since a promise made this member refuse one.
        reported: whether the last heartbeat reported a promise.
    """

    def __init__(self) -> None:
        self.promised_to: str | None = None
        self.refuses_until = NEVER
        self.reported = False
        self._promised_at = NEVER
        self._epoch: int | None = None
        """The newest epoch that a promise was given for; None if only the start counts as a promise."""

    def promise_at_start(self, now: float) -> None:
        """Count the start of the process as a promise, since its predecessor may have given one (R31)."""
        self._promised_at = now

    def promise(self, asker: str, epoch: int, now: float) -> None:
        """Give a promise to the holder of ``epoch``; it begins when its question is received (R30)."""
        self.promised_to = asker
        self._promised_at = max(self._promised_at, now)
        self._epoch = epoch if self._epoch is None else max(self._epoch, epoch)

    def until(self, lease_s: float) -> float:
        """When the promise ends. ``lease_s`` is the group's L, which may be learned only after the promise."""
        return self._promised_at + lease_s

    def forbids(self, *, cleared: int | None, before: int) -> bool:
        """Whether a promise that has not ended forbids a tenure: not if every promised tenure is over (R32).

        Args:
            cleared: the epoch up to which every tenure is over, as the coordinator has answered.
            before: the epoch before the offered tenure. It may be below a promised one, after old data were restored.
        """
        needed = before if self._epoch is None else max(before, self._epoch)
        return cleared is None or cleared < needed
