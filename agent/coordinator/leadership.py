"""Which coordinator leads which shards of a store in etcd (R19).

What is promised: a shard is led by one coordinator at a time, as long as clocks run at rates within DRIFT. Each
coordinator has one lease of etcd, its *session*. The leadership keys that it holds live as long as that lease. It
judges the session by its own CLOCK_BOOTTIME from the *sending* of the renewal, less the drift, so it stops
deciding before etcd can give its keys to another one. A session that is over is never continued.

What is not promised: that a leader exists. While etcd cannot be written for longer than the time to live,
nobody leads.

Keys under ``live/``: ``members/<lease>`` has the URL of a coordinator; ``leaders/<shard>`` names the member that
leads, and its mod revision is the leadership that each change compares. A shard is handed over in one transaction,
so that it is never vacant. A watch of these keys reports changes at once; a read with every renewal finds any that it missed.
"""

import asyncio
import json
from collections.abc import Callable, Mapping
from contextlib import aclosing
from math import ceil
from typing import Protocol

from agent.coordinator.session_tasks import SessionTasks
from agent.coordinator.shards import Lease, Shard
from agent.coordinator.spread import Leader, View, member_to_hand_a_shard_to, shards_to_claim
from agent.coordinator.store import Stored
from agent.coordinator.store.etcd import EtcdCluster
from agent.coordinator.store.etcd_client import (
    EtcdError,
    Event,
    delete,
    end_of,
    if_revision,
    put,
    read,
)
from agent.core.timing import DRIFT
from agent.errors import FailoverError, NotLeading, StoreError
from agent.model import GroupKey
from agent.ops.logs import Log

RENEWALS = 6
"""Renewals of the lease within its time to live: five may be lost. They do not wait for one another."""

LEAVE_SHARE = 1 / 3
"""Share of the time to live after which another member of etcd is asked: one that hangs costs this once. An answer
is awaited for the whole time to live, since a renewal that a slow disk has delayed still counts."""

GIVE_UP_SHARE = 1 / 2
"""Share of the time to live after which claiming or handing over shards is given up, and tried again, by then with
another member of etcd. If the former one has carried it out after all, the watch reports that."""

RETRY_S = 0.1
"""Pause after a failed request to etcd, and before a watch is begun again."""

WATCH_S = 10.0
"""After this a watch is begun again: if its connection was lost silently, it would wait for ever."""

RELOAD_S = 5.0
"""Pause before a shard with a record that cannot be read is loaded again: an operator has to correct it."""

MOVE_PAUSE_S = 0.1
"""Pause between two shards that are handed over to balance them: each handover gives its sessions one more L."""

LEADER_WAIT_S = 0.5
"""How long a request waits for a leader to be known: a handover takes less; more would use up the request
timeouts of agents with short leases."""

log = Log(__name__)


class SessionOver(FailoverError):  # noqa: N818 - an outcome
    """The session with etcd has ended; a new one begins."""


class Decider(Protocol):
    """Decides about the groups of a shard: engine.py."""

    def lead(self, shard: Shard, stored: Mapping[GroupKey, Stored]) -> None: ...
    def drop(self, shard: Shard) -> None: ...


class Leadership:
    """Leads shards as long as it runs. ``start`` it first, ``stop`` it last.

    Args:
        cluster: the store.
        decider: gets the groups of each shard that is led.
        boottime: CLOCK_BOOTTIME in seconds.
        ttl_s: the time to live: how long a coordinator that has died keeps its shards.
        url: where the others reach this coordinator, without a path.
        on_access_change: an access list has changed, or may have.
    """

    def __init__(
        self,
        cluster: EtcdCluster,
        decider: Decider,
        boottime: Callable[[], float],
        *,
        ttl_s: float,
        url: str,
        on_access_change: Callable[[], None] = lambda: None,
    ) -> None:
        self._cluster = cluster
        self._etcd = cluster.etcd
        self._layout = cluster.layout
        self._decider = decider
        self._boottime = boottime
        self._ttl_s = ttl_s
        self.url = url
        self._on_access_change = on_access_change
        self.view = View()
        self.member = ""
        self.fault: str | None = "this coordinator has just started"
        """Why there is no session with etcd now, or None."""
        self._outage_logged = False
        self._lease = Lease(float("-inf"))
        self._failure = ""
        self._lease_id = 0
        self._terms: dict[int, tuple[int, Shard]] = {}
        self._loading: dict[int, asyncio.Task[None]] = {}
        self._handed_over: set[int] = set()
        self._access_seen = -1
        self.begun = 0
        """How many times this coordinator began to lead a shard."""
        self._vacant_since: dict[int, float] = {}
        self._changed = asyncio.Event()
        self._waiters: set[asyncio.Future[None]] = set()
        self._stopping = False
        self._task: asyncio.Task[None] | None = None

    # -- for requests -------------------------------------------------------------------------

    @property
    def led(self) -> list[int]:
        """The shards that are led and loaded."""
        now = self._boottime()
        return sorted(
            n
            for n, (_, shard) in self._terms.items()
            if shard.is_led_at(now) and n not in self._loading
        )

    @property
    def without_leader(self) -> list[int]:
        """The shards that nobody leads, as last seen."""
        return [n for n in range(self._layout.shards) if n not in self.view.leaders]

    @property
    def remaining_s(self) -> float:
        """For how many seconds this coordinator may still lead without another renewal; 0 or more."""
        return max(0.0, self._lease.until - self._boottime())

    async def leader_url(self, key: GroupKey) -> str | None:
        """The URL of the coordinator that leads a group, or None if this one does.

        Waits for LEADER_WAIT_S at most. Raises NotLeading if no leader is known by then.
        """
        number = self._layout.shard_of(key)
        deadline = asyncio.get_running_loop().time() + LEADER_WAIT_S
        while True:
            now = self._boottime()
            term = self._terms.get(number)
            if term is not None and number not in self._loading and term[1].is_led_at(now):
                return None
            leader = self.view.leaders.get(number)
            if leader is not None and leader.url != self.url:  # else an old key of this coordinator
                return leader.url
            left_s = deadline - asyncio.get_running_loop().time()
            if left_s <= 0:
                raise NotLeading
            await self.wait_for_change(left_s)

    def leader_of(self, key: GroupKey) -> Leader | None:
        """The coordinator that is known to lead a group."""
        return self.view.leaders.get(self._layout.shard_of(key))

    async def wait_for_change(self, timeout_s: float | None) -> None:
        """Wait until what is known of members and leaders changes, for ``timeout_s`` at most."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.add(waiter)
        try:
            await asyncio.wait([waiter], timeout=timeout_s)
        finally:
            self._waiters.discard(waiter)

    def _notify(self) -> None:
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)

    # -- start and stop -----------------------------------------------------------------------

    def start(self) -> None:
        """Start to register this member with etcd and to compete for shards."""
        self._etcd = self._cluster.etcd.sibling()  # renewals must not wait behind changes of groups
        self._task = asyncio.create_task(self._run(), name="leadership")

    async def stop(self) -> None:
        """Hand all shards over to the others, and end the session. May be called twice."""
        if self._stopping:
            return
        self._stopping = True
        try:
            async with asyncio.timeout(self._ttl_s * GIVE_UP_SHARE):
                await self._hand_over_all()
        except (TimeoutError, EtcdError) as error:
            log.warning("shards not handed over, they are vacant until the lease ends", error=error)
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        await self._end_session()
        await self._etcd.aclose()

    async def _run(self) -> None:
        while not self._stopping:  # a task that fails while it is cancelled hides the cancellation
            try:
                await self._session()
            except (SessionOver, StoreError) as error:
                self.fault = str(error)
            except Exception:  # a task's edge: another session may succeed
                self.fault = "a fault of this program, see its log"
                if not self._outage_logged:
                    log.exception("session with etcd failed")
            if not self._outage_logged:  # a line for each attempt would fill the log
                self._outage_logged = True
                log.warning("session with etcd ended, retrying", reason=self.fault)
            await self._end_session()
            await asyncio.sleep(RETRY_S)

    async def _session(self) -> None:
        """Take part until the session is over."""
        sent_at = self._boottime()
        self._lease_id = await self._etcd.grant(ceil(self._ttl_s))
        self._lease = Lease(sent_at + self._ttl_s * (1 - DRIFT))
        tasks = SessionTasks()
        try:
            tasks.start(self._keep_renewing(tasks))
            tasks.start(self._begin(tasks), may_end=True)
            raise SessionOver(await tasks.first_end())
        finally:
            await tasks.end()

    async def _begin(self, tasks: SessionTasks) -> None:
        await self._enter(str(self._lease_id))
        tasks.start(self._try_to_renew(), may_end=True)
        while self.member not in self.view.members:  # a renewal that is answered reads it
            await self.wait_for_change(None)
        self.fault = None
        self._outage_logged = False
        log.info("session with etcd begun", member=self.member, url=self.url)
        tasks.start(self._watch())
        tasks.start(self._balance())

    async def _enter(self, member: str) -> None:
        """Add this coordinator to the members of the store."""
        meta = if_revision(self._layout.meta, self._cluster.meta.revision)
        value = json.dumps({"Url": self.url})
        step = put(self._layout.member(member), value, self._lease_id)
        if not (await self._etcd.txn([meta], [step])).succeeded:
            raise SessionOver(f"the store under {self._layout.prefix} was moved or removed")
        self.member = member

    async def _end_session(self) -> None:
        """Stop leading at once, and delete this member's keys if etcd can be reached."""
        self._lease.until = float("-inf")
        for number in list(self._terms):
            self._end_term(number)
        self._handed_over.clear()
        lease, self._lease_id = self._lease_id, 0
        self.member = ""
        if lease:
            try:
                async with asyncio.timeout(self._ttl_s * LEAVE_SHARE):  # the next session waits
                    await self._etcd.revoke(lease)
            except (EtcdError, TimeoutError):
                return  # it ends by itself

    # -- the lease ----------------------------------------------------------------------------

    async def _keep_renewing(self, tasks: SessionTasks) -> None:
        """Send a renewal at each interval, also while earlier ones are unanswered: each counts from its own sending."""
        interval_s, pause_s = self._ttl_s / RENEWALS, 0.0
        while True:
            await asyncio.sleep(pause_s)
            self._check_lease()
            renewal = tasks.start(self._try_to_renew(), may_end=True)
            await asyncio.wait([renewal], timeout=interval_s)
            pause_s = 0.0 if not renewal.done() else interval_s if renewal.result() else RETRY_S

    async def _try_to_renew(self) -> bool:
        try:
            await self._renew()
        except EtcdError as error:
            self._failure = f": {error}"
            return False
        self._failure = ""
        return True

    def _check_lease(self) -> None:
        if self._boottime() >= self._lease.until:
            raise SessionOver(f"the lease was not renewed in time{self._failure}")

    async def _renew(self) -> None:
        """Renew the lease and read all keys, both at once.

        The read proves that a majority of etcd knew the lease after this was sent. If its term is later than the
        renewal's, a deposed leader of etcd may have answered the renewal, which then does not count. If the terms
        are equal, that leader can have been deposed only after this was sent, and its successor has given each
        lease its whole time again.
        """
        sent_at, member, live = self._boottime(), self.member, self._layout.live
        term, found = await asyncio.gather(
            self._etcd.keep_alive(self._lease_id),
            self._etcd.range(read(live, end_of(live)), once=True),
        )
        if term is None:
            raise SessionOver("etcd has ended the lease")
        mine = self._layout.member(member)
        if member and not any(one.key == mine for one in found.keys) and not self._stopping:
            raise SessionOver("etcd has ended the lease")
        self._check_lease()
        if found.term == term:
            self._lease.until = max(self._lease.until, sent_at + self._ttl_s * (1 - DRIFT))
        if found.revision >= self.view.revision:
            view = View(found.revision)
            for one in found.keys:
                view.apply(live, Event(one.key, one.value, one.revision, one.lease))
            self._follow_view(view)

    # -- the view -----------------------------------------------------------------------------

    async def _watch(self) -> None:
        """Apply changes as they happen. Without them the next renewal reads everything."""
        while True:
            try:
                async with asyncio.timeout(WATCH_S):
                    await self._follow()
            except TimeoutError:
                continue
            except EtcdError as error:
                log.debug("watch ended", error=error)
            await asyncio.sleep(RETRY_S)

    async def _follow(self) -> None:
        changes = self._etcd.watch(self._layout.live, self.view.revision + 1)
        async with aclosing(changes):  # type: ignore[type-var]
            async for revision, events in changes:
                if revision <= self.view.revision:
                    continue
                for event in events:
                    self.view.apply(self._layout.live, event)
                self.view.revision = revision
                self._follow_view(self.view)

    def _follow_view(self, view: View) -> None:
        """Follow the leadership keys: end terms that are over, and begin the terms of this member."""
        self.view = view
        if view.access != self._access_seen:
            self._access_seen = view.access
            self._on_access_change()
        for number, (revision, _) in list(self._terms.items()):
            leader = view.leaders.get(number)
            if leader is None or leader.revision != revision:
                self._end_term(number)
        for number, leader in view.leaders.items():
            mine = leader.member == self.member and leader.revision not in self._handed_over
            if mine and number not in self._terms:
                self._begin_term(number, leader.revision)
        self._changed.set()
        self._notify()

    def _begin_term(self, number: int, revision: int) -> None:
        store = self._cluster.shard(number, revision)
        shard = Shard(number, store, self._lease)
        store.is_over = lambda: shard.ended
        self._terms[number] = revision, shard
        self._loading[number] = asyncio.create_task(self._load(shard), name=f"load shard {number}")

    async def _load(self, shard: Shard) -> None:
        """Load the groups of a shard and lead it, unless that is over by then."""
        while not shard.ended:
            try:
                stored = await shard.store.load()
                if shard.is_led_at(self._boottime()):
                    self._decider.lead(shard, stored)
                    self.begun += 1
                    log.info("leadership acquired", shard=shard.number, groups=len(stored))
                break
            except StoreError as error:
                log.warning("shard cannot be loaded", shard=shard.number, error=error)
                await asyncio.sleep(RETRY_S if isinstance(error, EtcdError) else RELOAD_S)
            except Exception:  # a task's edge: the shard would stay led and not served
                log.exception("shard cannot be loaded", shard=shard.number)
                await asyncio.sleep(RELOAD_S)
        if not shard.ended:
            self._loading.pop(shard.number, None)
            self._notify()

    def _end_term(self, number: int) -> None:
        _, shard = self._terms.pop(number)
        shard.ended = True
        loading = self._loading.pop(number, None)
        if loading is not None:
            loading.cancel()
        else:
            self._decider.drop(shard)
            log.info("leadership ended", shard=number)

    # -- who should lead ----------------------------------------------------------------------

    async def _balance(self) -> None:
        """Claim vacant shards, and hand surplus ones over."""
        while True:
            try:
                async with asyncio.timeout(self._ttl_s * GIVE_UP_SHARE):
                    await self._claim()
                    moved = await self._hand_over_one_shard()
            except (EtcdError, TimeoutError) as error:
                log.debug("claiming shards failed", error=error)
                moved = False
                await asyncio.sleep(RETRY_S)
            if moved:
                await asyncio.sleep(MOVE_PAUSE_S)
                continue
            self._changed.clear()
            try:
                async with asyncio.timeout(self._ttl_s / RENEWALS):
                    await self._changed.wait()
            except TimeoutError:
                continue

    async def _claim(self) -> None:
        if self._stopping:
            return
        now = self._boottime()
        for number, leader in list(self.view.leaders.items()):
            if leader.member == self.member and leader.revision in self._handed_over:
                await self._put_leader(number, leader.revision, self.member)
        numbers = range(self._layout.shards)
        vacant = [number for number in numbers if number not in self.view.leaders]
        self._vacant_since = {n: self._vacant_since.get(n, now) for n in vacant}
        claims = shards_to_claim(self.view, self.member, vacant, self._layout.shards)
        neglected = [n for n in vacant if now - self._vacant_since[n] > self._ttl_s]
        wanted = dict.fromkeys([*claims, *neglected])
        await asyncio.gather(*(self._put_leader(number, 0, self.member) for number in wanted))

    async def _put_leader(self, number: int, revision: int, member: str) -> bool:
        """Make a member the leader if the key has this revision; return whether it has become the leader."""
        url = self.view.members.get(member, self.url)
        value = json.dumps({"Member": member, "Url": url})
        key = self._layout.leader(number)
        done = await self._etcd.txn([if_revision(key, revision)], [put(key, value, int(member))])
        return done.succeeded

    async def _hand_over_one_shard(self) -> bool:
        """Hand one shard over if another member has fewer; return whether that was done."""
        to = member_to_hand_a_shard_to(self.view, self.member, self._layout.shards)
        if to is None or self._stopping or self._loading:
            return False
        number = max(self._terms, default=None)
        if number is None:
            return False
        await self._hand_over(number, to)
        return True

    async def _hand_over(self, number: int, to: str) -> None:
        """Stop leading a shard, then name another leader.

        If the outcome is unknown, the old key counts no more: ``_claim`` replaces it, which settles who leads.
        """
        revision, _ = self._terms[number]
        self._handed_over.add(revision)
        self._end_term(number)
        if await self._put_leader(number, revision, to):
            log.info("leadership handed over", shard=number, to=self.view.members.get(to))

    async def _hand_over_all(self) -> None:
        """Hand every shard over in one transaction, and leave the members."""
        others = {m: n for m, n in self.view.counts().items() if m != self.member}
        terms = {number: revision for number, (revision, _) in self._terms.items()}
        for number, revision in terms.items():
            self._handed_over.add(revision)
            self._end_term(number)
        self._notify()
        if not self.member or not others:
            return
        conditions, steps = [], [delete(self._layout.member(self.member))]
        for number, revision in terms.items():
            to = min(others, key=lambda member: (others[member], member))
            others[to] += 1
            value = json.dumps({"Member": to, "Url": self.view.members[to]})
            conditions.append(if_revision(self._layout.leader(number), revision))
            steps.append(put(self._layout.leader(number), value, int(to)))
        done = await self._etcd.txn(conditions, steps)
        log.info("handover of all shards ended", shards=sorted(terms), done=done.succeeded)
