"""Load, decide, swap (R13): the groups in memory, their durable records, and the timer that expires leases.

Rules of this file:

- A decision is durable before it is visible: in an answer, a status read, a blocked read or to another
  input. A change of ``live`` alone (a heartbeat that only renews) awaits nothing.
- One durable change of a group at a time. Other inputs of that group wait for it.
- Progress (the data-processed time) decides nothing: one write saves that of many groups, and no input awaits it.
- A durable change that has begun is finished even if its caller disconnects. If it fails, the old state stays in force.
  If its outcome is unknown, the group is used again only after its record was read from the store.
- Groups belong to shards. A decision about a group is made only while this coordinator leads its shard (R19), which
  ``_now`` checks for every decision. A shard is loaded whenever its leadership begins, as after a restart.
- A stall of the process or the store counts as no time for the sessions that were alive (R14), since their heartbeats
  may be waiting.

Knows nothing of the operations (service.py), of HTTP, and of what a decision means.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from math import inf
from time import perf_counter
from typing import Any, Protocol, TypeVar

from agent.coordinator.changes import MAX_CHANGES, Changes
from agent.coordinator.hang_up import HungUp
from agent.coordinator.journal import log_decision, log_names, log_role_changes
from agent.coordinator.restored import distrust
from agent.coordinator.shards import STALL_FLOOR_S, Group, Shard, group_not_found
from agent.coordinator.store import Store, Stored
from agent.coordinator.wakeups import Wakeups
from agent.core.group import decide, new_record
from agent.core.group_state import (
    Decision,
    Input,
    Policy,
    Removal,
    RemoveGroup,
    Tick,
    state_after_restart,
    state_after_stall,
)
from agent.errors import (
    CasMismatch,
    ExitCode,
    LeadershipLost,
    NotFound,
    NotLeading,
    OutcomeUnknown,
    StoreError,
    Unavailable,
    unavailable,
)
from agent.model import (
    GroupConfig,
    GroupKey,
    GroupRecord,
    HeartbeatAnswer,
    HistoryEntry,
    Instant,
    Progress,
)
from agent.ops.logs import Log

TIMER_S = 0.05
"""The longest interval between two runs of the timer; a longer gap counts as a stall."""

BATCH = 50
"""How many groups one run checks (some ms), so that requests are served even if many leases expire at once."""

PROGRESS_DELAY_S = 0.5
PROGRESS_BATCH_S = 0.03
"""Delay before new progress is saved (R13: within a second, commit included), and interval of these writes."""

SHARD_PROGRESS_BATCH_S = 0.8
"""Interval of these writes for each shard in etcd, where the first write is not delayed."""

PROGRESS_BATCH = 1_000
"""The most groups whose progress is saved in one write, which takes this process some ms."""

MOST_TICKS = 12
"""The most due changes that are written to etcd at once: fewer than MOST_COMMITS, so that callers can write, too."""

RETRY_S = 0.5
"""Retry interval of a due change that could not be stored: shorter than any useful L, but no burden to the disk."""

FAILURE_MEMORY_S = 10.0
"""How long a store counts as unusable after a failure, unless a write succeeds earlier."""

T = TypeVar("T")
log = Log(__name__)


class Meter(Protocol):
    """Receives what is counted here."""

    def committed(self, seconds: float) -> None: ...
    def commit_failed(self) -> None: ...
    def decided(
        self, before: GroupRecord, after: GroupRecord, history: Sequence[HistoryEntry]
    ) -> None: ...
    def removed(self, removals: Sequence[Removal]) -> None: ...
    def stalled(self) -> None: ...


class Engine:
    """All groups, each with its state, its durable record and its next wakeup.

    Call ``start`` first and ``stop`` last. ``groups`` is for reading.

    Args:
        store: the store of all groups, which are led from ``start`` on; None: the caller uses ``lead`` and
            ``drop`` for each shard.
        shard_of: the number of a group's shard.
    """

    def __init__(
        self,
        store: Store | None,
        clock: Callable[[], Instant],
        policy: Policy,
        meter: Meter | None = None,
        shard_of: Callable[[GroupKey], int] = lambda _: 0,
    ) -> None:
        self._meter = meter
        self.groups: dict[GroupKey, Group] = {}
        self.stopping = False
        self._store = store
        self._shards: dict[int, Shard] = {}
        self._shard_of = shard_of
        self._clock = clock
        self._policy = policy
        self._wakeups: Wakeups[GroupKey] = Wakeups()
        self._ticks = asyncio.Semaphore(MOST_TICKS if store is None else MAX_CHANGES)
        self._progress_queue: deque[tuple[float, Group]] = deque()
        # etcd receives at most one such write a second for each shard, not one for each heartbeat
        self._progress_delay_s = PROGRESS_DELAY_S if store is not None else 0.0
        self._progress_batch_s = PROGRESS_BATCH_S if store is not None else SHARD_PROGRESS_BATCH_S
        self._next_progress_write = -inf
        self._saving_progress = False
        self.changes = Changes()
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = inf
        self._ran_at = clock().mono
        self._store_failure: tuple[float, str] | None = None

    async def start(self) -> None:
        """Load every group, give every session one full L (R14), and start the timer.

        Raises:
            StoreError: the store cannot be read.
        """
        stored = {} if self._store is None else await self._store.load()
        self._ran_at = self._clock().mono
        if self._store is not None:
            self.lead(Shard(0, self._store), stored)
        self._on_timer()

    def lead(self, shard: Shard, stored: Mapping[GroupKey, Stored]) -> None:
        """Begin to decide about the groups of a shard, and give every session one full L (R14)."""
        self._shards[shard.number] = shard
        now = self._now()
        for key, one in stored.items():
            self._add_group(key, shard, one, now)

    def drop(self, shard: Shard) -> None:
        """Forget the groups of a shard that is no longer led, and answer their blocked reads."""
        shard.ended = True
        if self._shards.get(shard.number) is shard:
            del self._shards[shard.number]
        for group in [one for one in self.groups.values() if one.shard is shard]:
            self._forget(group)

    def refuse_requests(self) -> None:
        """Refuse new requests, stop expiring leases, and answer all blocked reads."""
        self.stopping = True
        for group in self.groups.values():
            group.wake_blocked_reads()

    async def stop(self) -> None:
        """Wait for the writes in progress, and save the progress that is not saved yet."""
        self.refuse_requests()
        if self._timer is not None:
            self._timer.cancel()
        await self.changes.wait_until_all_are_done()
        if due := self._due_progress(inf, len(self._progress_queue)):
            await self._save_progress(due)

    def find(self, key: GroupKey) -> Group:
        """A group. Raises NotFound, or NotLeading."""
        try:
            group = self.groups[key]
        except KeyError:
            self._shard(key)
            raise group_not_found(key) from None
        if group.shard.lease.until < inf and not group.shard.is_led_at(self._clock().mono):
            raise NotLeading
        return group

    def _shard(self, key: GroupKey) -> Shard:
        """The shard of a group. Raises NotLeading if it is not led."""
        shard = self._shards.get(self._shard_of(key))
        if shard is None or not shard.is_led_at(self._clock().mono):
            raise NotLeading
        return shard

    def recent_store_failure(self) -> str | None:
        """The store's newest failure, if it is not older than FAILURE_MEMORY_S; or None."""
        at, failure = self._store_failure or (-inf, "")
        return failure if self._clock().mono < at + FAILURE_MEMORY_S else None

    # -- decide and swap ----------------------------------------------------------------------

    async def apply(self, group: Group, what: Input) -> HeartbeatAnswer | bool | None:
        if not group.lock.locked() and not group.doubtful:
            now = self._now(group.shard)
            decision = decide(group.state, what, now, self._policy)
            if decision.state.record is group.state.record and not decision.history:
                self._apply_decision(group, decision, now)
                return decision.answer
        return await self.changes.carry_out(self._apply_durably(group, what))

    async def _apply_durably(self, group: Group, what: Input) -> HeartbeatAnswer | bool | None:
        async with group.lock:
            await self._resolve_doubt(group)
            now = self._now(group.shard)
            before = group.state
            decision = decide(before, what, now, self._policy)
            after = decision.state
            if after.record is before.record and not decision.history:
                self._apply_decision(group, decision, now)
                return decision.answer
            swap = group.shard.store.swap(group.key, group.version, after.record, decision.history)
            try:
                group.version = await self._write_change(group, swap)
            except BaseException:
                self._excuse_group(group, now.mono, self._clock())
                raise
            log_decision(group.key, before.record, decision)
            if self._meter is not None:
                self._meter.decided(before.record, after.record, decision.history)
                self._meter.removed(decision.removals)
            self._apply_decision(group, decision, now)
            self._excuse_group(group, now.mono, self._clock())
            return decision.answer

    def _apply_decision(self, group: Group, decision: Decision, now: Instant) -> None:
        """Put a decision into force. Call it once its durable changes, if any, are stored."""
        group.state = state = decision.state
        if group.shard.ended:
            return  # the key may belong to a newer Group, with other wakeups
        if self._wakeups.set(group.key, decision.wake_at):
            self._set_timer(now)
        if not group.progress_queued and group.unsaved_progress() is not None:
            self._queue_progress(group, now.mono + self._progress_delay_s)
            if len(self._progress_queue) == 1:
                self._set_timer(now)
        if group.readers:
            group.wake_blocked_reads(state.record.revision)

    async def create(self, key: GroupKey, config: GroupConfig) -> bool:
        """Create a group; return whether it is new. If not, the store's record is loaded."""
        shard = self._shard(key)
        retired = await self.read(shard.store.retired_epoch(key))
        record = new_record(config, retired)
        restored = await self.read(shard.store.is_restored())
        if restored:
            record = distrust(Stored(0, record), self._now(shard), self._policy).state.record
        try:
            version = await self.write(shard.store.create(key, record))
        except CasMismatch:  # an earlier attempt of unknown outcome has succeeded
            stored = await self.read(shard.store.settle(key, 0))
            if stored is None:
                raise unavailable("the group is being deleted") from None
            self._add_group(key, shard, stored, self._now(shard))
            return False
        self._add_group(key, shard, Stored(version, record), self._now(shard))
        why = "restored store" if restored else None
        log.info("group created", **log_names(key), timeout_s=config.lease_s, restricted=why)
        return True

    def _add_group(self, key: GroupKey, shard: Shard, stored: Stored, now: Instant) -> None:
        self.groups[key] = Group(key, shard, stored, now)
        self._wakeups.set(key, now.mono)  # the first Tick computes the next wakeup

    async def delete(self, group: Group) -> None:
        async with group.lock:
            await self._resolve_doubt(group)
            decide(group.state, RemoveGroup(), self._now(group.shard), self._policy)
            await self._write_change(
                group, group.shard.store.delete(group.key, group.version, group.state.record.epoch)
            )
            self._remove(group)
            log.info("group deleted", **log_names(group.key))

    def _remove(self, group: Group) -> None:
        group.gone = True
        if self.groups.get(group.key) is group:
            self._forget(group)

    def _forget(self, group: Group) -> None:
        del self.groups[group.key]
        self._wakeups.forget(group.key)
        group.wake_blocked_reads()

    async def _write_change(self, group: Group, change: Coroutine[Any, Any, T]) -> T:
        """Await a change of the record; mark the group as doubtful if the outcome is unknown."""
        try:
            return await self.write(change)
        except (Unavailable, HungUp) as error:
            group.doubtful = isinstance(error.__cause__, OutcomeUnknown)
            raise  # with any other cause nothing was written
        except CasMismatch as error:
            group.doubtful = True
            log.warning("unexpected version of a record", **log_names(group.key), error=error)
            raise unavailable(str(error)) from error
        except BaseException:  # cancelled, or a fault of the store: it may have been written
            group.doubtful = True
            raise

    async def _resolve_doubt(self, group: Group) -> None:
        """Reload the record of a doubtful group. Raises NotFound for one that was deleted."""
        began_at = self._now(group.shard).mono
        if group.doubtful and not group.gone:
            try:
                stored = await self.read(group.shard.store.settle(group.key, group.version))
            finally:
                self._excuse_group(group, began_at, self._clock())
            if stored is None:
                self._remove(group)
            else:
                group.version = stored.version
                if stored.record != group.state.record:
                    log_role_changes(group.key, group.state.record, stored.record, ())
                    group.saved = stored.progress
                    group.state = state_after_restart(stored.record, self._clock(), stored.progress)
                    group.wake_blocked_reads(stored.record.revision)
                group.doubtful = False
        if group.gone:
            raise group_not_found(group.key)

    async def write(self, change: Coroutine[Any, Any, T]) -> T:
        began_at = perf_counter()
        try:
            self.changes.begin()
            result = await change
        except HungUp:
            change.close()
            raise
        except LeadershipLost as error:
            raise NotLeading from error
        except StoreError as error:
            if self._meter is not None:
                self._meter.commit_failed()
            if error.exit_code is not ExitCode.INTERNAL:  # the store's fault, not the value's
                if self._store_failure is None:
                    log.warning("store failed", error=error)
                self._store_failure = (self._clock().mono, str(error))
            raise unavailable(str(error)) from error
        if self._meter is not None:
            self._meter.committed(perf_counter() - began_at)
        if self._store_failure is not None:
            self._store_failure = None
            log.info("store works again")
        return result

    async def read(self, reading: Awaitable[T]) -> T:
        try:
            return await reading
        except LeadershipLost as error:
            raise NotLeading from error
        except StoreError as error:
            raise unavailable(str(error)) from error

    # -- time ---------------------------------------------------------------------------------

    def _now(self, shard: Shard | None = None) -> Instant:
        """The time for a decision. If this process was stopped, leases are made longer for it first.

        Raises:
            NotLeading: the decision is about a shard that is not led at that time.
        """
        now = self._clock()
        if shard is not None and not shard.is_led_at(now.mono):
            raise NotLeading
        gap_s = now.mono - self._ran_at
        if gap_s > STALL_FLOOR_S:
            judged_at, self._ran_at = self._ran_at, now.mono
            excused = [self._excuse_group(group, judged_at, now) for group in self.groups.values()]
            if any(excused):
                if self._meter is not None:
                    self._meter.stalled()
                log.warning("process stalled", gap_s=gap_s, groups_excused=sum(excused))
        return now

    def _excuse_group(self, group: Group, judged_at: float, now: Instant) -> bool:
        if excused := now.mono - judged_at > group.stall_s:
            group.state = state_after_stall(group.state, judged_at, now)
        return excused

    def run_due_changes(self) -> None:
        """Run the changes that are due. Called by the timer, and by tests."""
        now = self._now()
        self._ran_at = now.mono
        if self.stopping:
            return
        for key in self._wakeups.due(now.mono, BATCH):
            group = self.groups[key]
            if not group.ticking:  # else that Tick sets the next wakeup
                group.ticking = True
                self.changes.spawn(self._run_tick(group))
        if now.mono >= self._next_progress_write and not self._saving_progress:
            due = self._due_progress(now.mono, PROGRESS_BATCH)
            more_are_due = len(due) == PROGRESS_BATCH
            self._next_progress_write = now.mono + (0 if more_are_due else self._progress_batch_s)
            if due:
                self._saving_progress = True
                self.changes.spawn(self._save_progress(due))

    async def _run_tick(self, group: Group) -> None:
        """Apply a Tick; if that fails, retry it later, and delay the Ticks that wait for this one: the store may be full."""
        async with self._ticks:
            try:
                await self._apply_durably(group, Tick())
            except (NotFound, NotLeading):
                return  # deleted meanwhile, or led by another coordinator
            except Exception as error:  # a task's edge: the timer must go on
                if not isinstance(error, Unavailable):
                    log.exception("due change of group failed", **log_names(group.key))
                if not group.shard.ended:
                    self._wakeups.set(group.key, self._clock().mono + RETRY_S)
            else:
                return
            finally:
                group.ticking = False
            await asyncio.sleep(0 if self.stopping else RETRY_S)

    def _queue_progress(self, group: Group, at: float) -> None:
        group.progress_queued = True
        self._progress_queue.append((at, group))

    def _due_progress(self, until: float, limit: int) -> dict[Group, Progress]:
        """Remove from the queue, and return, at most ``limit`` groups whose progress is due to be saved."""
        due: dict[Group, Progress] = {}
        while len(due) < limit and self._progress_queue and self._progress_queue[0][0] <= until:
            _, group = self._progress_queue.popleft()
            group.progress_queued = False
            if not group.gone and (progress := group.unsaved_progress()) is not None:
                due[group] = progress
        return due

    async def _save_progress(self, due: dict[Group, Progress]) -> None:
        """Save progress, in one write for each shard."""
        try:
            shards = dict.fromkeys(group.shard for group in due)
            parts = [{g: p for g, p in due.items() if g.shard is shard} for shard in shards]
            await asyncio.gather(*map(self._save_shard, shards, parts))
        finally:
            self._saving_progress = False

    async def _save_shard(self, shard: Shard, due: dict[Group, Progress]) -> None:
        """Save progress of one shard; retry later if that fails."""
        try:
            self._now(shard)
            progress = {group.key: saved for group, saved in due.items()}
            await self.write(shard.store.save_progress(progress))
        except NotLeading:
            return  # the new leader receives it from the holder
        except Exception as error:  # a task's edge: the timer must go on
            if not isinstance(error, Unavailable):
                log.exception("saving progress failed", groups=len(due))
            again_at = self._clock().mono + RETRY_S
            for group in due:
                if not group.progress_queued:
                    self._queue_progress(group, again_at)
        else:
            for group, saved in due.items():
                group.saved = saved

    def _on_timer(self) -> None:
        try:
            self.run_due_changes()
        finally:
            self._timer = None
            if not self.stopping:
                self._set_timer(self._clock())

    def _set_timer(self, now: Instant) -> None:
        """Set the timer to the next wakeup, at most TIMER_S ahead."""
        at = min(self._wakeups.next_at(), now.mono + TIMER_S)
        if self._progress_queue and not self._saving_progress:
            at = min(at, max(self._progress_queue[0][0], self._next_progress_write))
        if self._timer is not None:
            if self._timer_at <= at:
                return
            self._timer.cancel()
        self._timer_at = at
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(max(0.0, at - now.mono), self._on_timer)
