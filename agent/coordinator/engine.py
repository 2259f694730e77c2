"""Load, decide, swap (R13): the groups in memory, what is made durable of them, and when they are judged.

Rules of this file:

- What ``decide`` says is durable before anybody can see it: an answer, a status read, a blocked
  reader or another input. A change of ``live`` alone (a heartbeat that only extends) awaits nothing.
- One durable change of a group at a time. While one is on its way, other inputs of that group wait
  for it; except while only the data-processed time is being kept, which decides nothing.
- A durable change that was begun is finished, whoever has gone away meanwhile. If it fails, the old
  state stays in force. If nobody knows whether it failed, the group is used again only once the
  store has told.
- Whenever this process was stopped or stalled, or the store was, whoever was alive before gets one
  full L (R14): what they sent may still lie unread.

It refuses to know what is asked (service.py), HTTP, and what a decision means.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from math import inf
from time import perf_counter
from typing import Any, Protocol, TypeVar

from agent.coordinator.journal import log_role_changes, names_of
from agent.coordinator.store import Store, Stored
from agent.coordinator.wakeups import Wakeups
from agent.core.group import decide, epoch_after_deletion
from agent.core.group_state import (
    Decision,
    GroupState,
    Input,
    Policy,
    RemoveGroup,
    SaveProgress,
    Tick,
    has_unsaved_progress,
    state_after_restart,
    state_after_stall,
)
from agent.errors import CasMismatch, ExitCode, NotFound, StoreError, Unavailable
from agent.model import (
    GroupConfig,
    GroupKey,
    GroupRecord,
    HeartbeatAnswer,
    HistoryEntry,
    Instant,
)
from agent.ops.logs import Log

TURN_S = 0.05
"""The loop shows this often that it still turns; a stall is noticed by the gap."""

STALL_FLOOR_S = 0.1
STALL_SHARE = 0.25
"""A stall of L/4 cannot yet cost a lease that is renewed as R1 demands, nor that of a v1 client, which
beats every L/2; and an extension at each shorter one would keep a dead primary for ever on a busy host.
Under 0.1 s it is scheduling."""

BATCH = 50
"""Groups judged in one go (some ms): requests get their turn in between when many leases end at once."""

KEEP_AFTER_S = 0.5
KEEP_EVERY_S = 0.03
"""A new data-processed time is made durable so long after it came (R13: within a second, commit
included), together with all others of these 30 ms in one commit, which halves what one costs."""

RETRY_S = 0.5
"""What is due and could not be made durable is tried again so often: well under any useful L, and
no storm on a full disk."""

TROUBLE_S = 10.0
"""A store that has failed counts as unusable for so long, unless a write succeeds before."""

T = TypeVar("T")
log = Log(__name__)


class Group:
    """One group in memory.

    Attributes:
        lock: held during a durable change.
        keeping: the change on its way is of the data-processed time only.
        doubtful: the outcome of a change is not known; nothing is decided before the store tells.
        gone: deleted; whoever still waits for the lock has to ask again.
        queued: it is in the queue of those whose data-processed time is to be kept.
    """

    __slots__ = (
        "doubtful",
        "gone",
        "keeping",
        "key",
        "lock",
        "queued",
        "readers",
        "stall_s",
        "state",
        "version",
    )

    def __init__(self, key: GroupKey, state: GroupState, version: int) -> None:
        self.key = key
        self.state = state
        self.version = version
        self.stall_s = max(STALL_FLOOR_S, STALL_SHARE * state.record.config.lease_s)
        self.lock = asyncio.Lock()
        self.keeping = self.doubtful = self.gone = self.queued = False
        self.readers: dict[asyncio.Future[None], int] = {}


class Meter(Protocol):
    """Who counts what happens here."""

    def committed(self, seconds: float) -> None: ...
    def commit_failed(self) -> None: ...
    def decided(
        self, before: GroupRecord, after: GroupRecord, history: Sequence[HistoryEntry]
    ) -> None: ...
    def stalled(self) -> None: ...


class Engine:
    """All groups, each with its state, its durable copy and its moment to be judged.

    Call ``start`` first and ``stop`` last. ``groups`` is for reading.
    """

    def __init__(
        self,
        store: Store,
        clock: Callable[[], Instant],
        policy: Policy,
        meter: Meter | None = None,
    ) -> None:
        self._meter = meter
        self.groups: dict[GroupKey, Group] = {}
        self.stopping = False
        self._store = store
        self._clock = clock
        self._policy = policy
        self._wakeups: Wakeups[GroupKey] = Wakeups()
        self._to_keep: deque[tuple[float, Group]] = deque()
        self._keep_from = -inf
        self._tasks: set[asyncio.Task[Any]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._armed_for = inf
        self._turned_at = clock().mono
        self._trouble: tuple[float, str] | None = None

    async def start(self) -> None:
        """Load every group, give every session one full L (R14), and begin to judge.

        Raises:
            StoreError: the store cannot be read.
        """
        stored = await self._store.load()
        now = self._clock()
        self._turned_at = now.mono
        for key, one in stored.items():
            self._admit(key, one, now)
        self._turn()

    def stop_taking(self) -> None:
        """Judge nobody any more, and answer all blocked readers."""
        self.stopping = True
        for group in self.groups.values():
            answer_readers(group)

    async def stop(self) -> None:
        """Finish the writes that were begun."""
        self.stop_taking()
        if self._timer is not None:
            self._timer.cancel()
        while self._tasks:
            await asyncio.wait(self._tasks)

    def find(self, key: GroupKey) -> Group:
        """A group. Raises NotFound."""
        try:
            return self.groups[key]
        except KeyError:
            raise no_group(key) from None

    def recent_trouble(self) -> str | None:
        """How the store failed within TROUBLE_S, or None."""
        if self._trouble is not None and self._clock().mono < self._trouble[0] + TROUBLE_S:
            return self._trouble[1]
        return None

    # -- decide and swap ----------------------------------------------------------------------

    async def apply(self, group: Group, what: Input) -> HeartbeatAnswer | bool | None:
        if (not group.lock.locked() or group.keeping) and not group.doubtful:
            now = self._now()
            before = group.state
            decision = decide(before, what, now, self._policy)
            if decision.state.record is before.record and not decision.history:
                self._adopt(group, decision, now)
                return decision.answer
        return await asyncio.shield(self.spawn(self._apply_durably(group, what)))

    async def _apply_durably(self, group: Group, what: Input) -> HeartbeatAnswer | bool | None:
        async with group.lock:
            await self._be_sure(group)
            now = self._now()
            before = group.state
            decision = decide(before, what, now, self._policy)
            after = decision.state
            if after.record is before.record and not decision.history:
                self._adopt(group, decision, now)
                return decision.answer
            group.keeping = isinstance(what, SaveProgress) and _only_progress(before, after)
            try:
                group.version = await self._settled(
                    group,
                    self._store.swap(group.key, group.version, after.record, decision.history),
                )
            finally:
                group.keeping, kept = False, group.keeping
            if kept:  # heartbeats may have come in meanwhile
                group.state = GroupState(after.record, group.state.live)
                return None
            log_role_changes(group.key, before.record, after.record, decision.history)
            if self._meter is not None:
                self._meter.decided(before.record, after.record, decision.history)
            self._adopt(group, decision, now)
            self._excuse_one(group, now.mono, self._clock())
            return decision.answer

    def _adopt(self, group: Group, decision: Decision, now: Instant) -> None:
        """Make a decision the truth: it is durable, or there is nothing durable in it."""
        group.state = state = decision.state
        if self._wakeups.set(group.key, decision.wake_at):
            self._arm(now)
        if not group.queued and has_unsaved_progress(state):
            group.queued = True
            self._to_keep.append((now.mono + KEEP_AFTER_S, group))
            if len(self._to_keep) == 1:
                self._arm(now)
        if group.readers:
            answer_readers(group, state.record.revision)

    async def create(self, key: GroupKey, config: GroupConfig) -> bool:
        """Whether it was this that created the group; else it is what the store has."""
        # Who remembers the epochs of a deleted group of this name must not take the new one's for old.
        retired = await self.read(self._store.retired_epoch(key))
        record = GroupRecord(config, epoch=epoch_after_deletion(retired))
        try:
            version = await self.write(self._store.create(key, record))
        except CasMismatch:  # an earlier attempt whose outcome was never known did succeed
            stored = (await self.read(self._store.load())).get(key)
            if stored is None:
                raise unavailable("the group is being deleted") from None
            self._admit(key, stored, self._clock())
            return False
        self._admit(key, Stored(version, record), self._clock())
        log.info("group created", **names_of(key), timeout_s=config.lease_s)
        return True

    def _admit(self, key: GroupKey, stored: Stored, now: Instant) -> None:
        group = Group(key, state_after_restart(stored.record, now), stored.version)
        self.groups[key] = group
        self._wakeups.set(key, now.mono)  # the first Tick says when there is something to do

    async def delete(self, group: Group) -> None:
        async with group.lock:
            await self._be_sure(group)
            decide(group.state, RemoveGroup(), self._now(), self._policy)
            await self._settled(
                group, self._store.delete(group.key, group.version, group.state.record.epoch)
            )
            self._remove(group)
            log.info("group deleted", **names_of(group.key))

    def _remove(self, group: Group) -> None:
        group.gone = True
        del self.groups[group.key]
        self._wakeups.forget(group.key)
        answer_readers(group)

    async def _settled(self, group: Group, change: Awaitable[T]) -> T:
        """The result of a change; if it is not known whether it was made, the group is in doubt."""
        try:
            return await self.write(change)
        except Unavailable:
            raise  # it was not made
        except CasMismatch as error:
            group.doubtful = True
            log.warning("the store has another version", **names_of(group.key), error=error)
            raise unavailable(str(error)) from error
        except BaseException:  # cancelled, or a fault of the store's: it may have been made
            group.doubtful = True
            raise

    async def _be_sure(self, group: Group) -> None:
        """Go on only with a group that exists, and whose state is the store's."""
        if group.doubtful and not group.gone:
            stored = (await self.read(self._store.load())).get(group.key)
            if stored is None:
                self._remove(group)
            else:
                group.version = stored.version
                if stored.record != group.state.record:
                    log_role_changes(group.key, group.state.record, stored.record, ())
                    group.state = state_after_restart(stored.record, self._clock())
                    answer_readers(group, stored.record.revision)
                group.doubtful = False
        if group.gone:
            raise no_group(group.key)

    async def write(self, change: Awaitable[T]) -> T:
        began_at = perf_counter()
        try:
            result = await change
        except StoreError as error:
            if self._meter is not None:
                self._meter.commit_failed()
            if error.exit_code is not ExitCode.INTERNAL:  # the disk, not this one value
                if self._trouble is None:
                    log.warning("store failed", error=error)
                self._trouble = (self._clock().mono, str(error))
            raise unavailable(str(error)) from error
        if self._meter is not None:
            self._meter.committed(perf_counter() - began_at)
        if self._trouble is not None:
            self._trouble = None
            log.info("store works again")
        return result

    async def read(self, reading: Awaitable[T]) -> T:
        try:
            return await reading
        except StoreError as error:
            raise unavailable(str(error)) from error

    def spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Work that runs to its end even if nobody waits for it any more."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(lambda done: done.cancelled() or done.exception())
        return task

    # -- time ---------------------------------------------------------------------------------

    def _now(self) -> Instant:
        """This moment, for a decision: if this process has stalled before it, nobody pays for that."""
        now = self._clock()
        gap_s = now.mono - self._turned_at
        if gap_s > STALL_FLOOR_S:
            judged_at, self._turned_at = self._turned_at, now.mono
            excused = [self._excuse_one(group, judged_at, now) for group in self.groups.values()]
            if any(excused):
                if self._meter is not None:
                    self._meter.stalled()
                log.warning("stalled", gap_s=gap_s, groups_excused=sum(excused))
        return now

    def _excuse_one(self, group: Group, judged_at: float, now: Instant) -> bool:
        if now.mono - judged_at <= group.stall_s:
            return False
        group.state = state_after_stall(group.state, judged_at, now)
        return True

    def turn(self) -> None:
        """Do what is due. Called by the coordinator's one timer; and by a test that has no time."""
        now = self._now()
        self._turned_at = now.mono
        if self.stopping:
            return
        for key in self._wakeups.due(now.mono, BATCH):
            self.spawn(self._try(self.groups[key], Tick()))
        if now.mono >= self._keep_from:
            self._keep_progress(now)

    def _keep_progress(self, now: Instant) -> None:
        self._keep_from = now.mono + KEEP_EVERY_S
        kept = 0
        while self._to_keep and self._to_keep[0][0] <= now.mono:
            if kept == BATCH:
                self._keep_from = now.mono  # the rest as soon as requests have had their turn
                return
            group = self._to_keep.popleft()[1]
            group.queued = False
            self.spawn(self._try(group, SaveProgress()))
            kept += 1

    async def _try(self, group: Group, what: Tick | SaveProgress) -> None:
        """What is due of itself; if it cannot be made durable now, again soon."""
        try:
            if isinstance(what, SaveProgress):
                await self._apply_durably(group, what)
            else:
                await self.apply(group, what)
        except NotFound:
            return  # deleted meanwhile
        except Exception as error:  # a task's edge: the timer must go on
            if not isinstance(error, Unavailable):
                log.exception("a group could not be judged", **names_of(group.key))
            again_at = self._clock().mono + RETRY_S
            if isinstance(what, Tick):
                self._wakeups.set(group.key, again_at)
            elif not group.queued:
                group.queued = True
                self._to_keep.append((again_at, group))

    def _turn(self) -> None:
        try:
            self.turn()
        finally:
            self._timer = None
            if not self.stopping:
                self._arm(self._clock())

    def _arm(self, now: Instant) -> None:
        """Let the timer come at the nearest moment; in any case after TURN_S."""
        at = min(self._wakeups.next_at(), now.mono + TURN_S)
        if self._to_keep:
            at = min(at, max(self._to_keep[0][0], self._keep_from))
        if self._timer is not None:
            if self._armed_for <= at:
                return
            self._timer.cancel()
        self._armed_for = at
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(max(0.0, at - now.mono), self._turn)


def answer_readers(group: Group, revision: float = inf) -> None:
    """Wake the blocked status reads that ``revision`` is news to."""
    for changed, after in group.readers.items():
        if after < revision and not changed.done():
            changed.set_result(None)


def _only_progress(before: GroupState, after: GroupState) -> bool:
    """Whether a SaveProgress did nothing else: what was due by the way decides something."""
    return (
        after.record.revision == before.record.revision
        and after.record.sessions is before.record.sessions
        and after.record.quiet == before.record.quiet
    )


def no_group(key: GroupKey) -> NotFound:
    """The refusal of whoever asks for a group that does not exist."""
    return NotFound(f'There is no group "{key.group}".', "Create it with POST .../groups first.")


def unavailable(why: str) -> Unavailable:
    """The refusal of what cannot be done now."""
    return Unavailable(
        f"The coordinator cannot do this now: {why}.", "Try again after Retry-After."
    )
