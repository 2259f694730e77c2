"""The coordinator: every operation on groups and sessions.

Owns creation and deletion, lists, blocking status reads and access-control lists. engine.py makes each decision
durable before it is answered. Knows nothing of HTTP, callers and rights.
"""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import replace

from agent.coordinator.engine import Engine, Meter
from agent.coordinator.limits import Cache
from agent.coordinator.shards import Group, group_not_found
from agent.coordinator.store import Directory, Store
from agent.core.group import is_compatible
from agent.core.group_state import (
    AddSession,
    Input,
    Policy,
    ReceiveHeartbeat,
    SetAccess,
    status_of,
)
from agent.core.group_view import view_of
from agent.errors import Conflict, NotLeading, StoreError, Unavailable, unavailable
from agent.model import (
    AccessList,
    GroupConfig,
    GroupKey,
    GroupStatus,
    HeartbeatAnswer,
    HistoryEntry,
    Instant,
    SessionView,
)
from agent.ops.pages import LISTED_AT_ONCE, sorted_page
from agent.schema.coordinator_settings import CoordinatorSettings

MAX_READERS = 10_000
"""How many status reads may wait at the same time, some kilobytes each. Further ones are refused."""

READERS_RETRY_S = 5.0
"""Retry-After of a refused status read: waiting reads end within seconds, and retries without a delay would cost
more than the read."""

LONGEST_WAIT_S = 300.0
"""The longest wait of a status read: proxies and NATs drop a silent connection after minutes."""

MAX_NAMESPACES_CACHED = 1024
"""How many namespaces' access lists are kept in memory: a deployment has a handful, but callers can guess names."""


class Coordinator:
    """Every operation on groups and sessions.

    Call ``start`` first and ``stop`` last. All calls raise RequestRefused: NotFound, Conflict and so on
    from core/group.py, and Unavailable while nothing can be made durable or it is stopping.

    Args:
        store: the store of all groups; None if this coordinator leads shards (R19).
        directory: the store's part that belongs to no shard; needed without ``store``.
        shard_of: returns the number of a group's shard.
        problem: returns why a coordinator that leads shards is not ready, or None.
        report: returns the details of readiness of a coordinator that leads shards.
        url: the URL at which other coordinators reach this one.
    """

    def __init__(
        self,
        store: Store | None,
        clock: Callable[[], Instant],
        policy: Policy | None = None,
        *,
        max_groups: int = 100_000,
        meter: Meter | None = None,
        directory: Directory | None = None,
        shard_of: Callable[[GroupKey], int] = lambda _: 0,
        problem: Callable[[], str | None] = lambda: None,
        report: Callable[[], Mapping[str, object]] = dict,
        url: str | None = None,
    ) -> None:
        common = store or directory
        assert common is not None  # noqa: S101 - our own mistake
        self._store = common
        self._directory = directory
        self._problem = problem
        self.report = report
        self._url = url
        self._clock = clock
        policy = policy or Policy()
        self.engine = self._engine = Engine(store, clock, policy, meter, shard_of)
        self._max_groups = max_groups
        self._creating: dict[GroupKey, asyncio.Task[bool]] = {}
        self._access: dict[tuple[str, str], asyncio.Task[AccessList | None]] = {}
        self._waiting = 0
        self._readiness: Cache[str | None] = Cache()

    # -- start and stop -----------------------------------------------------------------------

    async def start(self) -> int:
        """Load every group, and give every session one full L (R14); return the number of groups.

        Raises:
            StoreError: the store cannot be read.
        """
        await self._engine.start()
        return len(self._engine.groups)

    def refuse_requests(self) -> None:
        """Refuse new requests and answer all blocked reads. May be called twice."""
        self._engine.refuse_requests()

    async def stop(self) -> None:
        """Wait for the writes in progress. Close the store afterwards."""
        await self._engine.stop()

    def run_due_changes(self) -> None:
        """Run the changes that are due, for tests that move the clock by hand."""
        self._engine.run_due_changes()

    @property
    def stopping(self) -> bool:
        """Whether new requests are refused."""
        return self._engine.stopping

    @property
    def blocked_readers(self) -> int:
        """Number of status reads that wait now."""
        return self._waiting

    def all_groups(self) -> list[Group]:
        """Every group, for counting. The objects change with later decisions."""
        return list(self._engine.groups.values())

    async def readiness_problem(self) -> str | None:
        """Why no request can be served now, or None. Queries the store, once a second at most."""
        if self._engine.stopping:
            return "the coordinator is stopping"
        if (failure := self._engine.recent_store_failure()) is not None:
            return f"the store failed: {failure}"
        if (problem := self._problem()) is not None:
            return problem
        return await self._readiness.get("store", self._store_problem)

    async def _store_problem(self) -> str | None:
        try:
            await self._store.access("default", "default")
        except StoreError as error:
            return f"the store fails: {error}"
        return None

    # -- groups -------------------------------------------------------------------------------

    async def create_group(self, key: GroupKey, config: GroupConfig) -> tuple[GroupConfig, bool]:
        """Create a group unless it exists; return it, and whether this call has created it."""
        self._refuse_if_stopping()
        await self._creation_of(key)
        created = key not in self._engine.groups
        if not created:
            self._engine.find(key)  # raises NotLeading unless the shard is led here
        else:
            if len(self._engine.groups) + len(self._creating) >= self._max_groups:
                raise Conflict(
                    f"There are {len(self._engine.groups)} groups, the most that this coordinator allows.",
                    "Delete groups that are not used any more, or raise max_groups.",
                )
            task = self._engine.changes.spawn(self._engine.create(key, config), bounded=True)
            self._creating[key] = task
            task.add_done_callback(lambda _: self._creating.pop(key))
            created = await self._engine.changes.finish(task)
        known = self._engine.find(key).state.record.config
        if not created and not is_compatible(config, known):
            raise Conflict(
                f'Group "{key.group}" exists with another configuration.',
                "GET it and use its FailoverTimeout, or choose another Id.",
            )
        return known, created

    async def _creation_of(self, key: GroupKey) -> None:
        """Wait until nobody is creating the group."""
        while (other := self._creating.get(key)) is not None:
            await asyncio.wait([other])

    def group(self, key: GroupKey) -> GroupConfig:
        """A group's configuration."""
        return self._engine.find(key).state.record.config

    async def list_groups(
        self,
        tenant: str,
        namespace: str,
        skip: int,
        count: int,
        visible: Callable[[AccessList | None], bool] = lambda _: True,
    ) -> tuple[int, list[GroupConfig]]:
        """How many groups a namespace has, and ``count`` of them after ``skip``, sorted by id.

        ``visible`` receives a group's own access-control list, or None; if it returns False, the group is left out.
        Groups that other coordinators lead are included.
        """
        if self._directory is not None:
            self._refuse_if_stopping()
            listing = self._directory.configs(tenant, namespace, skip, count, visible)
            return await self._engine.read(listing)
        found: dict[str, Group] = {}
        groups, where = self.all_groups(), (tenant, namespace)
        for first in range(0, len(groups), LISTED_AT_ONCE):
            for group in groups[first : first + LISTED_AT_ONCE]:
                if group.key[:2] == where and visible(group.state.record.acl):
                    found[group.key.group] = group
            await asyncio.sleep(0)
        page = await sorted_page(found, skip, count)
        return len(found), [found[name].state.record.config for name in page]

    async def delete_group(self, key: GroupKey) -> None:
        """Remove a group without active sessions, with its history."""
        self._refuse_if_stopping()
        await self._creation_of(key)
        await self._engine.changes.carry_out(self._engine.delete(self._engine.find(key)))

    def status(self, key: GroupKey) -> GroupStatus:
        """The status of a group."""
        return self._status_of(self._engine.find(key))

    def _status_of(self, group: Group) -> GroupStatus:
        status = status_of(group.state)
        return replace(status, store_id=self._store.store_id, leader=self._url)

    async def wait_status(self, key: GroupKey, after: int, wait_s: float) -> GroupStatus:
        """Wait until the status has a later revision than ``after``, or for ``wait_s`` seconds; return it.

        Returns at once when the coordinator stops, and after LONGEST_WAIT_S at the latest.

        Raises:
            NotFound: there is no such group, or it was deleted during the wait.
            Unavailable: MAX_READERS wait already.
        """
        group = self._engine.find(key)
        # A higher ``after`` is from before the group was deleted and created again.
        has_changed = group.state.record.revision != after
        if has_changed or wait_s <= 0 or self._engine.stopping:
            return self._status_of(group)
        if self._waiting >= MAX_READERS:
            raise Unavailable(
                f"{self._waiting} status reads wait already, the most that this coordinator allows.",
                "Try again after Retry-After, or read the status without after.",
                retry_after_s=READERS_RETRY_S,
            )
        changed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        group.readers[changed] = after
        self._waiting += 1
        try:
            await asyncio.wait([changed], timeout=min(wait_s, LONGEST_WAIT_S))
        finally:
            self._waiting -= 1
            group.readers.pop(changed, None)
        if group.gone:
            raise group_not_found(key)
        if group.shard.ended:
            raise NotLeading
        return self._status_of(group)

    async def history(self, key: GroupKey, skip: int, count: int) -> tuple[int, list[HistoryEntry]]:
        """How many tenures are stored, and ``count`` of them after ``skip``, newest first."""
        store = self._engine.find(key).shard.store
        return await self._engine.read(store.history(key, skip=skip, count=count))

    # -- sessions -----------------------------------------------------------------------------

    async def add_session(
        self, key: GroupKey, registration: AddSession
    ) -> tuple[SessionView, bool]:
        """Register a session unless it exists; return it, and whether this call has created it."""
        created = await self.apply(key, registration)
        return self.session(key, registration.config.id), created is True

    def session(self, key: GroupKey, session_id: str) -> SessionView:
        """One session."""
        view = view_of(self._engine.find(key).state, session_id, self._clock())
        return replace(view, store_id=self._store.store_id)

    def owner(self, key: GroupKey, session_id: str) -> str | None:
        """The identity that a session belongs to; None if it has no owner, or there is no such session."""
        session = self._engine.find(key).state.record.sessions.get(session_id)
        return session.owner if session is not None else None

    def sessions(self, key: GroupKey) -> list[SessionView]:
        """All sessions of a group, sorted by id."""
        state, now = self._engine.find(key).state, self._clock()
        return [view_of(state, session_id, now) for session_id in sorted(state.record.sessions)]

    async def beat(self, key: GroupKey, beat: ReceiveHeartbeat) -> HeartbeatAnswer:
        """Receive a heartbeat. Raises TooSoon within the minimum interval."""
        answer = await self.apply(key, beat)
        assert isinstance(answer, HeartbeatAnswer)  # noqa: S101 - the answer to a ReceiveHeartbeat
        return HeartbeatAnswer(  # replace() takes five times as long, thousands of times a second
            answer.role,
            answer.last_data,
            answer.epoch,
            answer.revision,
            answer.lease_s,
            answer.previous,
            self._store.store_id,
            answer.cleared,
            answer.failsafe,
        )

    async def apply(self, key: GroupKey, what: Input) -> HeartbeatAnswer | bool | None:
        """Decide on an input of a group, and make the decision durable where it changes the record."""
        self._refuse_if_stopping()
        return await self._engine.apply(self._engine.find(key), what)

    # -- access -------------------------------------------------------------------------------

    def group_access(self, key: GroupKey) -> AccessList | None:
        """A group's own access-control list; None if its namespace's list is in force."""
        return self._engine.find(key).state.record.acl

    async def set_group_access(self, key: GroupKey, acl: AccessList | None) -> None:
        """Give a group an access-control list of its own; None removes it."""
        await self.apply(key, SetAccess(acl))

    async def access(self, tenant: str, namespace: str) -> AccessList | None:
        """The access-control list of a namespace's groups, or None if none was ever set."""
        where = (tenant, namespace)
        reading = self._access.get(where)
        if reading is None:  # callers at the same time share one read
            if len(self._access) >= MAX_NAMESPACES_CACHED:
                self._access.pop(next(iter(self._access)))
            reading = self._engine.changes.spawn(self._read_access(where), bounded=True)
            self._access[where] = reading
        return reading.result() if reading.done() else await asyncio.shield(reading)

    async def _read_access(self, where: tuple[str, str]) -> AccessList | None:
        try:
            return await self._engine.read(self._store.access(*where))
        except BaseException:
            if self._access.get(where) is asyncio.current_task():
                del self._access[where]
            raise

    def forget_access(self) -> None:
        """Read the lists of namespaces anew: another coordinator may have changed one."""
        self._access.clear()

    async def set_access(self, tenant: str, namespace: str, acl: AccessList | None) -> None:
        """Replace the access-control list of a namespace's groups; None removes it."""
        self._refuse_if_stopping()
        await self._engine.changes.carry_out(self._set_access(tenant, namespace, acl))

    async def _set_access(self, tenant: str, namespace: str, acl: AccessList | None) -> None:
        try:
            await self._engine.write(self._store.set_access(tenant, namespace, acl))
        finally:
            self._access.pop((tenant, namespace), None)

    def _refuse_if_stopping(self) -> None:
        if self._engine.stopping:
            raise unavailable("it is stopping")


def policy_of(settings: CoordinatorSettings) -> Policy:
    """Build the policy that decisions use from the settings."""
    return Policy(
        score_hysteresis=settings.score_hysteresis,
        minimum_hold_s=settings.minimum_hold,
        max_sessions=settings.max_sessions_per_group,
        dead_session_retention_s=settings.dead_session_retention,
    )
