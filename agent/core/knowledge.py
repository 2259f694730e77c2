"""What a session knows of its group: the newest epoch and revision, and the last status (R3)."""

from agent.model import GroupStatus


class GroupKnowledge:
    """The newest known state of the group.

    Attributes:
        epoch: the newest epoch, or None before one was seen.
    """

    def __init__(self) -> None:
        self.epoch: int | None = None
        self._revision = -1
        self._answered_revision: int | None = None
        self._status: tuple[object, ...] | None = None

    def on_registered(self) -> None:
        """Forget the revision: a group that was created again restarts it, but continues the epochs."""
        self._revision = -1

    def forget_epoch(self) -> None:
        """Forget the epoch, which was of another server."""
        self.epoch = None

    def accept_if_fresh(self, epoch: int | None, revision: int | None) -> bool:
        """Record an epoch and revision; return False if they are older than the newest ones (R3).

        Answers of a server without epochs and revisions always count as new.
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

    def learn_epoch(self, epoch: int) -> None:
        """Record an epoch that another member holds. Revisions of older epochs no longer count."""
        if self.epoch is None or self.epoch < epoch:
            self.epoch, self._revision = epoch, -1

    def record_answer(self, revision: int | None) -> None:
        """Record the revision of a heartbeat's answer: a status with the same revision has no news."""
        self._answered_revision = revision

    def record_status(self, status: GroupStatus, me: str, *, holds: bool, prepares: bool) -> bool:
        """Record a status; return whether it differs from the last one and from the heartbeats' answers.

        Args:
            status: the status that was read.
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
