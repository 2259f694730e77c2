"""The coordinator itself: load, decide, swap (R13). Every group is in memory, its truth in the store.

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

It refuses to know HTTP, who asks and whether they may, and what a decision means.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from math import inf
from typing import Any, TypeVar

from agent.coordinator.store import Store, Stored
from agent.coordinator.wakeups import Wakeups
from agent.core.group import agrees, decide
from agent.core.group_state import (
    AddSession,
    Beat,
    Decision,
    GroupState,
    Input,
    KeepProgress,
    Policy,
    RemoveGroup,
    SetAccess,
    Tick,
    awaken,
    excuse,
    progress_is_unkept,
    role_of,
    status_of,
    view_of,
)
from agent.errors import CasMismatch, Conflict, ExitCode, NotFound, StoreError, Unavailable
from agent.model import (
    AccessList,
    GroupConfig,
    GroupKey,
    GroupRecord,
    GroupStatus,
    HeartbeatAnswer,
    HistoryEntry,
    Instant,
    Role,
    SessionConfig,
    SessionView,
)
from agent.ops.logs import Log

TURN_S = 0.05
"""The loop shows this often that it still turns; a stall is noticed by the gap."""

STALL_FLOOR_S = 0.1
STALL_SHARE = 0.25
"""A stall of L/4 cannot yet cost a lease that is renewed as R1 demands, nor that of a v1 client, which
beats every L/2; and an excuse at each shorter one would keep a dead primary for ever on a busy host.
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

MAX_READERS = 10_000
"""Status reads that may wait at once, some kilobytes each; whoever comes beyond is answered at once."""

LONGEST_WAIT_S = 300.0
"""The longest that a status read waits: proxies and NATs forget a silent connection after minutes."""

MAX_NAMESPACES_CACHED = 1024
"""Access lists of namespaces in memory: a deployment has a handful; guessed names must not fill it."""

T = TypeVar("T")
log = Log(__name__)


class _Group:
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


class Coordinator:
    """Every call on groups and sessions that the API has.

    Call ``start`` first and ``stop`` last. All calls raise RequestRefused: NotFound, Conflict and so on
    as core/group.py says, and Unavailable if nothing can be made durable now or it is stopping.
    """

    def __init__(
        self,
        store: Store,
        clock: Callable[[], Instant],
        policy: Policy | None = None,
        *,
        max_groups: int = 100_000,
    ) -> None:
        self._store = store
        self._clock = clock
        self._policy = policy or Policy()
        self._max_groups = max_groups
        self._groups: dict[GroupKey, _Group] = {}
        self._creating: dict[GroupKey, asyncio.Task[bool]] = {}
        self._access: dict[tuple[str, str], AccessList | None] = {}
        self._wakeups: Wakeups[GroupKey] = Wakeups()
        self._to_keep: deque[tuple[float, _Group]] = deque()
        self._keep_from = -inf
        self._tasks: set[asyncio.Task[Any]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._armed_for = inf
        self._turned_at = clock().mono
        self._waiting = 0
        self._stopping = False
        self._trouble: tuple[float, str] | None = None

    # -- life ---------------------------------------------------------------------------------

    async def start(self) -> int:
        """Load every group, give every session one full L (R14); how many groups there are.

        Raises:
            StoreError: the store cannot be read.
        """
        stored = await self._store.load()
        now = self._clock()
        self._turned_at = now.mono
        for key, one in stored.items():
            self._admit(key, one, now)
        self._turn()
        return len(self._groups)

    def stop_taking(self) -> None:
        """Refuse what comes from now on, and answer all blocked readers. May be called twice."""
        self._stopping = True
        for group in self._groups.values():
            _answer_readers(group)

    async def stop(self) -> None:
        """Finish the writes that were begun. The store is still to be closed."""
        self.stop_taking()
        if self._timer is not None:
            self._timer.cancel()
        while self._tasks:
            await asyncio.wait(self._tasks)

    @property
    def stopping(self) -> bool:
        """Whether nothing is taken any more."""
        return self._stopping

    async def trouble(self) -> str | None:
        """Why no request can be obeyed now, or None. Asks the store."""
        if self._stopping:
            return "the coordinator is stopping"
        if self._trouble is not None and self._clock().mono < self._trouble[0] + TROUBLE_S:
            return f"the store failed: {self._trouble[1]}"
        try:
            await self._store.access("default", "default")
        except StoreError as error:
            return f"the store fails: {error}"
        return None

    # -- groups -------------------------------------------------------------------------------

    async def create_group(self, key: GroupKey, config: GroupConfig) -> tuple[GroupConfig, bool]:
        """The group as it is then, and whether this call has created it."""
        self._refuse_if_stopping()
        while (other := self._creating.get(key)) is not None:
            await asyncio.wait([other])
        created = key not in self._groups
        if created:
            if len(self._groups) + len(self._creating) >= self._max_groups:
                raise Conflict(
                    f"There are {len(self._groups)} groups, the most that this coordinator allows.",
                    "Delete groups that are not used any more, or raise max_groups.",
                )
            task = self._spawn(self._create(key, config))
            self._creating[key] = task
            task.add_done_callback(lambda _: self._creating.pop(key))
            created = await asyncio.shield(task)
        known = self._group(key).state.record.config
        if not created and not agrees(config, known):
            raise Conflict(
                f'Group "{key.group}" exists with another configuration.',
                "GET it and use its FailoverTimeout, or choose another Id.",
            )
        return known, created

    def group(self, key: GroupKey) -> GroupConfig:
        """A group's configuration."""
        return self._group(key).state.record.config

    def groups(
        self,
        tenant: str,
        namespace: str,
        skip: int,
        count: int,
        visible: Callable[[AccessList | None], bool] = lambda _: True,
    ) -> tuple[int, list[GroupConfig]]:
        """How many groups a namespace has, and ``count`` of them after ``skip``, sorted by id.

        Those are left out whose own access-control list (or None) is not ``visible``.
        """
        place = (tenant, namespace)
        keys = sorted(
            key
            for key, group in self._groups.items()
            if key[:2] == place and visible(group.state.record.acl)
        )
        return len(keys), [self.group(key) for key in keys[skip : skip + count]]

    async def delete_group(self, key: GroupKey) -> None:
        """Remove a group without active sessions, with its history."""
        self._refuse_if_stopping()
        await asyncio.shield(self._spawn(self._delete(self._group(key))))

    def status(self, key: GroupKey) -> GroupStatus:
        """Who is primary, who is to be, and the rest of the status."""
        return status_of(self._group(key).state)

    async def wait_status(self, key: GroupKey, after: int, wait_s: float) -> GroupStatus:
        """The status as soon as its revision is past ``after``, or after ``wait_s`` seconds.

        Answered at once if MAX_READERS wait already, and when the coordinator stops. Longer waits
        than LONGEST_WAIT_S end there.

        Raises:
            NotFound: there is no such group, or it was deleted during the wait.
        """
        group = self._group(key)
        if (
            group.state.record.revision > after
            or wait_s <= 0
            or self._stopping
            or self._waiting >= MAX_READERS
        ):
            return status_of(group.state)
        changed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        group.readers[changed] = after
        self._waiting += 1
        try:
            await asyncio.wait([changed], timeout=min(wait_s, LONGEST_WAIT_S))
        finally:
            self._waiting -= 1
            group.readers.pop(changed, None)
        if group.gone:
            raise _no_group(key)
        return status_of(group.state)

    async def history(self, key: GroupKey, skip: int, count: int) -> tuple[int, list[HistoryEntry]]:
        """How many tenures are kept, and ``count`` of them after ``skip``, newest first."""
        self._group(key)
        return await self._read(self._store.history(key, skip=skip, count=count))

    # -- sessions -----------------------------------------------------------------------------

    async def add_session(self, key: GroupKey, config: SessionConfig) -> tuple[SessionView, bool]:
        """The session as it is then, and whether this call has created it."""
        created = await self.apply(key, AddSession(config))
        return self.session(key, config.id), created is True

    def session(self, key: GroupKey, session_id: str) -> SessionView:
        """One session."""
        return view_of(self._group(key).state, session_id)

    def sessions(self, key: GroupKey) -> list[SessionView]:
        """All sessions of a group, sorted by id."""
        state = self._group(key).state
        return [view_of(state, session_id) for session_id in sorted(state.record.sessions)]

    async def beat(self, key: GroupKey, beat: Beat) -> HeartbeatAnswer:
        """Take a heartbeat. Raises TooSoon if it must not come yet."""
        answer = await self.apply(key, beat)
        assert isinstance(answer, HeartbeatAnswer)  # noqa: S101 - what decide promises
        return answer

    async def apply(self, key: GroupKey, what: Input) -> HeartbeatAnswer | bool | None:
        """Let a group decide on an input, and make the decision durable if anything durable is in it."""
        self._refuse_if_stopping()
        return await self._apply(self._group(key), what)

    # -- access -------------------------------------------------------------------------------

    def group_access(self, key: GroupKey) -> AccessList | None:
        """A group's own access-control list, or None for its namespace's."""
        return self._group(key).state.record.acl

    async def set_group_access(self, key: GroupKey, acl: AccessList) -> None:
        """Give a group an access-control list of its own."""
        await self.apply(key, SetAccess(acl))

    async def access(self, tenant: str, namespace: str) -> AccessList | None:
        """The list of a namespace's groups, or None if none was ever set."""
        place = (tenant, namespace)
        if place not in self._access:
            acl = await self._read(self._store.access(tenant, namespace))
            if len(self._access) >= MAX_NAMESPACES_CACHED:
                self._access.pop(next(iter(self._access)))
            self._access.setdefault(place, acl)
        return self._access[place]

    async def set_access(self, tenant: str, namespace: str, acl: AccessList) -> None:
        """Replace that list."""
        self._refuse_if_stopping()
        await asyncio.shield(self._spawn(self._set_access(tenant, namespace, acl)))

    async def _set_access(self, tenant: str, namespace: str, acl: AccessList) -> None:
        try:
            await self._write(self._store.set_access(tenant, namespace, acl))
        finally:
            self._access.pop((tenant, namespace), None)

    # -- decide and swap ----------------------------------------------------------------------

    async def _apply(self, group: _Group, what: Input) -> HeartbeatAnswer | bool | None:
        if (not group.lock.locked() or group.keeping) and not group.doubtful:
            now = self._now()
            before = group.state
            decision = decide(before, what, now, self._policy)
            if decision.state.record is before.record and not decision.history:
                self._adopt(group, decision, now)
                return decision.answer
        return await asyncio.shield(self._spawn(self._apply_durably(group, what)))

    async def _apply_durably(self, group: _Group, what: Input) -> HeartbeatAnswer | bool | None:
        async with group.lock:
            await self._be_sure(group)
            now = self._now()
            before = group.state
            decision = decide(before, what, now, self._policy)
            after = decision.state
            if after.record is before.record and not decision.history:
                self._adopt(group, decision, now)
                return decision.answer
            group.keeping = isinstance(what, KeepProgress) and _only_progress(before, after)
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
            self._adopt(group, decision, now)
            self._excuse_one(group, now.mono, self._clock())
            return decision.answer

    def _adopt(self, group: _Group, decision: Decision, now: Instant) -> None:
        """Make a decision the truth: it is durable, or there is nothing durable in it."""
        group.state = state = decision.state
        if self._wakeups.set(group.key, decision.wake_at):
            self._arm(now)
        if not group.queued and progress_is_unkept(state):
            group.queued = True
            self._to_keep.append((now.mono + KEEP_AFTER_S, group))
            if len(self._to_keep) == 1:
                self._arm(now)
        if group.readers:
            _answer_readers(group, state.record.revision)

    async def _create(self, key: GroupKey, config: GroupConfig) -> bool:
        """Whether it was this that created the group; else it is what the store has."""
        record = GroupRecord(config)
        try:
            version = await self._write(self._store.create(key, record))
        except CasMismatch:  # an earlier attempt whose outcome was never known did succeed
            stored = (await self._read(self._store.load())).get(key)
            if stored is None:
                raise _unavailable("the group is being deleted") from None
            self._admit(key, stored, self._clock())
            return False
        self._admit(key, Stored(version, record), self._clock())
        log.info("group created", **_names(key), timeout_s=config.lease_s)
        return True

    def _admit(self, key: GroupKey, stored: Stored, now: Instant) -> None:
        group = _Group(key, awaken(stored.record, now), stored.version)
        self._groups[key] = group
        self._wakeups.set(key, now.mono)  # the first Tick says when there is something to do

    async def _delete(self, group: _Group) -> None:
        async with group.lock:
            await self._be_sure(group)
            decide(group.state, RemoveGroup(), self._now(), self._policy)
            await self._settled(group, self._store.delete(group.key, group.version))
            self._remove(group)
            log.info("group deleted", **_names(group.key))

    def _remove(self, group: _Group) -> None:
        group.gone = True
        del self._groups[group.key]
        self._wakeups.forget(group.key)
        _answer_readers(group)

    async def _settled(self, group: _Group, change: Awaitable[T]) -> T:
        """The result of a change; if it is not known whether it was made, the group is in doubt."""
        try:
            return await self._write(change)
        except Unavailable:
            raise  # it was not made
        except CasMismatch as error:
            group.doubtful = True
            log.warning("the store has another version", **_names(group.key), error=error)
            raise _unavailable(str(error)) from error
        except BaseException:  # cancelled, or a fault of the store's: it may have been made
            group.doubtful = True
            raise

    async def _be_sure(self, group: _Group) -> None:
        """Go on only with a group that exists, and whose state is the store's."""
        if group.doubtful and not group.gone:
            stored = (await self._read(self._store.load())).get(group.key)
            if stored is None:
                self._remove(group)
            else:
                group.version = stored.version
                if stored.record != group.state.record:
                    log_role_changes(group.key, group.state.record, stored.record, ())
                    group.state = awaken(stored.record, self._clock())
                    _answer_readers(group, stored.record.revision)
                group.doubtful = False
        if group.gone:
            raise _no_group(group.key)

    async def _write(self, change: Awaitable[T]) -> T:
        try:
            result = await change
        except StoreError as error:
            if error.exit_code is not ExitCode.INTERNAL:  # the disk, not this one value
                if self._trouble is None:
                    log.warning("store failed", error=error)
                self._trouble = (self._clock().mono, str(error))
            raise _unavailable(str(error)) from error
        if self._trouble is not None:
            self._trouble = None
            log.info("store works again")
        return result

    async def _read(self, reading: Awaitable[T]) -> T:
        try:
            return await reading
        except StoreError as error:
            raise _unavailable(str(error)) from error

    def _spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
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
            excused = [self._excuse_one(group, judged_at, now) for group in self._groups.values()]
            if any(excused):
                log.warning("stalled", gap_s=gap_s, groups_excused=sum(excused))
        return now

    def _excuse_one(self, group: _Group, judged_at: float, now: Instant) -> bool:
        if now.mono - judged_at <= group.stall_s:
            return False
        group.state = excuse(group.state, judged_at, now)
        return True

    def turn(self) -> None:
        """Do what is due. Called by the coordinator's one timer; and by a test that has no time."""
        now = self._now()
        self._turned_at = now.mono
        if self._stopping:
            return
        for key in self._wakeups.due(now.mono, BATCH):
            self._spawn(self._try(self._groups[key], Tick()))
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
            self._spawn(self._try(group, KeepProgress()))
            kept += 1

    async def _try(self, group: _Group, what: Tick | KeepProgress) -> None:
        """What is due of itself; if it cannot be made durable now, again soon."""
        try:
            if isinstance(what, KeepProgress):
                await self._apply_durably(group, what)
            else:
                await self._apply(group, what)
        except NotFound:
            return  # deleted meanwhile
        except Exception as error:  # a task's edge: the timer must go on
            if not isinstance(error, Unavailable):
                log.exception("a group could not be judged", **_names(group.key))
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
            if not self._stopping:
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

    # -- small steps --------------------------------------------------------------------------

    def _group(self, key: GroupKey) -> _Group:
        try:
            return self._groups[key]
        except KeyError:
            raise _no_group(key) from None

    def _refuse_if_stopping(self) -> None:
        if self._stopping:
            raise _unavailable("it is stopping")


def _answer_readers(group: _Group, revision: float = inf) -> None:
    for changed, after in group.readers.items():
        if after < revision and not changed.done():
            changed.set_result(None)


def _only_progress(before: GroupState, after: GroupState) -> bool:
    """Whether a KeepProgress did nothing else: what was due by the way decides something."""
    return after.record.revision == before.record.revision and (
        after.record.sessions is before.record.sessions
    )


def _names(key: GroupKey) -> dict[str, str]:
    """A group in a log line; tenant and namespace only where there are any."""
    names = {"group": key.group}
    if key[:2] != ("default", "default"):
        names |= {"tenant": key.tenant, "namespace": key.namespace}
    return names


def _no_group(key: GroupKey) -> NotFound:
    return NotFound(f'There is no group "{key.group}".', "Create it with POST .../groups first.")


def _unavailable(why: str) -> Unavailable:
    return Unavailable(
        f"The coordinator cannot do this now: {why}.", "Try again after Retry-After."
    )


def log_role_changes(
    key: GroupKey, before: GroupRecord, after: GroupRecord, history: Sequence[HistoryEntry]
) -> None:
    """One line for each session whose role another record changes."""
    if before.revision == after.revision:
        return
    holders = [record.holder.session_id for record in (before, after) if record.holder]
    touched = dict.fromkeys([*holders, before.pending, after.pending])
    ended = {entry.session_id: entry.why_ended for entry in history if entry.why_ended}
    for session_id in touched:
        if session_id is None:
            continue
        old, new = role_of(before, session_id), role_of(after, session_id)
        if old is new:
            continue
        why = {
            Role.PRIMARY: after.holder.why if after.holder else None,
            Role.PENDING_PRIMARY: "chosen to take over",
            Role.SECONDARY: ended.get(session_id, "not chosen any more"),
        }[new]
        log.info(
            "role changed",
            **_names(key),
            session=session_id,
            before=old,
            after=new,
            epoch=after.epoch,
            reason=why,
        )
