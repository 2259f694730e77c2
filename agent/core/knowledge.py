"""What a session has heard of its group: the newest epoch and revision, and the statuses (R3)."""

from agent.model import GroupStatus


class Knowledge:
    """The newest that is known.

    Attributes:
        epoch: the newest epoch, or None before one was seen.
    """

    def __init__(self) -> None:
        self.epoch: int | None = None
        self._revision = -1
        self._answered_revision: int | None = None
        self._status: tuple[object, ...] | None = None

    def registered(self) -> None:
        """A group that was made anew counts its revisions from the start; epochs go on."""
        self._revision = -1

    def forget_epoch(self) -> None:
        """The epochs of another server say nothing about those of this one."""
        self.epoch = None

    def is_fresh(self, epoch: int | None, revision: int | None) -> bool:
        """Whether it is not older than the newest, which it becomes (R3).

        A server without epochs and revisions is always fresh.
        """
        newest = (self.epoch if self.epoch is not None else -1, self._revision)
        seen = (
            epoch if epoch is not None else newest[0],
            revision if revision is not None else newest[1],
        )
        if seen < newest:
            return False
        if epoch is not None:
            self.epoch = epoch
        self._revision = seen[1]
        return True

    def answered(self, revision: int | None) -> None:
        """The revision of the last heartbeat's answer: a status with the same one is no news."""
        self._answered_revision = revision

    def is_news(self, status: GroupStatus, me: str, *, holds: bool, prepares: bool) -> bool:
        """Whether a status says what neither a status nor a heartbeat's answer has said before.

        Args:
            status: what was read.
            me: this session's id.
            holds: whether this session holds a tenure as far as it knows.
            prepares: whether it is PendingPrimary as far as it knows.
        """
        seen = (status.primary, status.pending, status.epoch, status.revision)
        before, self._status = self._status, seen
        if seen == before:
            return False
        if status.revision is not None:
            return status.revision != self._answered_revision
        # Plain v1: no news if it agrees with the answers to heartbeats.
        return (status.primary == me, status.pending == me) != (holds, prepares)
