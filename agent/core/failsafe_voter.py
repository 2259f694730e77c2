"""The promise of a member: to accept no role while another one may be primary by its vote (R30-R32).

Owns when a promise began, for which epoch, and what it forbids. A promise lasts L of this process's own
clock, and nothing is stored: the start of a process counts as a promise, since the one before it may have
given one. Knows neither roles nor phases.
"""

NEVER = float("-inf")


class FailsafeVoter:
    """The promises of one process. Moments are CLOCK_BOOTTIME seconds.

    Attributes:
        promised_to: session id of the member that the newest promise was given to.
        refuses_until: no role is accepted before this moment, since one was refused for a promise.
        reported: whether the last heartbeat has reported a promise.
    """

    def __init__(self) -> None:
        self.promised_to: str | None = None
        self.refuses_until = NEVER
        self.reported = False
        self._promised_at = NEVER
        self._epoch: int | None = None
        """The newest epoch that a promise was given for; None for that of the start alone."""

    def promise_at_start(self, now: float) -> None:
        """Promise at the start of the process, for whatever its predecessor has promised (R31)."""
        self._promised_at = now

    def promise(self, asker: str, epoch: int, now: float) -> None:
        """Promise to a member that holds ``epoch``, from the receipt of its question (R30)."""
        self.promised_to = asker
        self._promised_at = max(self._promised_at, now)
        self._epoch = epoch if self._epoch is None else max(self._epoch, epoch)

    def until(self, lease_s: float) -> float:
        """The end of the promise. L is that of the group, which may be known only after the promise."""
        return self._promised_at + lease_s

    def forbids(self, *, cleared: int | None, before: int) -> bool:
        """Whether a promise that has not ended forbids a tenure; not if all that it is for are over (R32).

        Args:
            cleared: the epoch up to which every tenure is over, by the coordinator's answer.
            before: the epoch before the tenure that is offered.
        """
        needed = before if self._epoch is None else max(before, self._epoch)
        return cleared is None or cleared < needed
