"""Several coordinators on a virtual clock: the real engine, leadership and store over an etcd in memory.

Owns time (an event loop whose clock jumps to the next timer), the coordinators' lives, the ways between all
parts, and small agents, which keep the promise of R1: active until R after the *sending* of the last heartbeat that
was answered Primary. At every promotion it is checked that no other agent is active.
"""

import asyncio
import random
import selectors
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from agent.coordinator.engine import Engine
from agent.coordinator.leadership import Decider, Leadership
from agent.coordinator.service import Coordinator
from agent.coordinator.store.codec import decode
from agent.coordinator.store.etcd import EtcdCluster
from agent.coordinator.store.etcd_client import Etcd
from agent.coordinator.store.etcd_layout import Layout
from agent.core.group_state import AddSession, Policy, ReceiveHeartbeat, ReleaseRole
from agent.errors import FailoverError, NotFound, NotLeading
from agent.model import (
    TICKS_PER_SECOND,
    GroupConfig,
    GroupKey,
    GroupRecord,
    HeartbeatAnswer,
    Instant,
    Role,
    SessionConfig,
)

from .fake_etcd import FakeEtcd, FakeTransport, Link

EPOCH_OF_WALL = datetime(2026, 1, 1, tzinfo=UTC)
KEY = GroupKey("default", "default", "g")
LEASE_S = 2.0
TTL_S = 1.0
RENEW_S = 0.65 * LEASE_S
REQUEST_S = RENEW_S / 3


class BrokenPromiseError(AssertionError):
    """Two agents are active."""


class _Selector(selectors.SelectSelector):
    """Jumps to the next timer instead of waiting for it."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        assert timeout is not None, "nothing is going to happen any more"
        self.now += max(0.0, timeout)
        return super().select(0)


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop on a virtual clock."""

    def __init__(self) -> None:
        self._virtual = _Selector()
        super().__init__(self._virtual)

    def time(self) -> float:
        return self._virtual.now


def run_virtually(main: Coroutine[Any, Any, None]) -> None:
    """Run to the end; no real time passes in waits."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(main)


@dataclass(frozen=True)
class Kinds:
    """The classes of the parts; a planted fault replaces one."""

    leadership: type[Leadership] = Leadership
    cluster: type[EtcdCluster] = EtcdCluster
    decider: Callable[[Engine, Callable[[], float]], Decider] = lambda engine, _: engine


class Node:
    """One coordinator, which can be killed, frozen, cut off and started again."""

    def __init__(self, world: "World", name: str, rate: float) -> None:
        self.world = world
        self.name = name
        self.rate = rate
        self.link = Link(world.etcd, random.Random(world.chance.random()))
        self.up = False
        self.coordinator: Coordinator | None = None
        self.leadership: Leadership | None = None
        self.tasks: set[asyncio.Task[Any]] = set()

    def boottime(self) -> float:
        return 100.0 + asyncio.get_running_loop().time() * self.rate

    def instant(self) -> Instant:
        now = asyncio.get_running_loop().time()
        return Instant(self.boottime(), EPOCH_OF_WALL + timedelta(seconds=now))

    async def start(self) -> None:
        """Start a new process."""
        if self.up:
            return
        self.up = True
        etcd = Etcd(FakeTransport(self.link), TTL_S / 3)
        while True:
            try:
                kinds = self.world.kinds
                cluster = await kinds.cluster.open(etcd, "/f", self.world.shards)
                break
            except FailoverError:
                await asyncio.sleep(0.1)
        self.coordinator = Coordinator(
            None,
            self.instant,
            Policy(score_hysteresis=10, minimum_hold_s=LEASE_S),
            directory=cluster,
            shard_of=cluster.layout.shard_of,
        )
        self.leadership = kinds.leadership(
            cluster,
            kinds.decider(self.coordinator.engine, self.boottime),
            self.boottime,
            ttl_s=TTL_S,
            url=self.name,
        )
        await self.coordinator.start()
        self.leadership.start()
        self.world.record(self.name, "starts")

    def kill(self) -> None:
        """SIGKILL: nothing of it runs any more, and nobody gets an answer."""
        if not self.up or self.coordinator is None or self.leadership is None:
            return
        self.world.record(self.name, "is killed")
        self.up = False
        engine = self.coordinator.engine
        engine.stopping = True
        if engine._timer is not None:
            engine._timer.cancel()
        for task in (self.leadership._task, *self.leadership._loading.values(), *engine._tasks):
            if task is not None:
                task.cancel()
        for task in list(self.tasks):
            task.cancel()
        self.link.free.set()
        self.link = Link(self.world.etcd, self.link.chance)
        self.coordinator = self.leadership = None

    async def stop(self) -> None:
        """An orderly stop."""
        if self.up and self.leadership is not None and self.coordinator is not None:
            self.world.record(self.name, "stops")
            await self.leadership.stop()
            self.kill()

    def freeze(self) -> None:
        self.world.record(self.name, "is frozen")
        self.link.free.clear()

    def thaw(self) -> None:
        self.world.record(self.name, "goes on")
        self.link.free.set()

    async def request(self, what: Any, *, forwarded: bool = False) -> Any:
        """A request that has arrived, and its answer; forwarded once."""
        await self.link.free.wait()
        coordinator, leadership = self.coordinator, self.leadership
        if not self.up or coordinator is None or leadership is None:
            raise ConnectionError(self.name)
        for _ in range(3):
            url = await leadership.place(KEY)
            if url is not None:
                if forwarded:
                    raise NotLeading
                await asyncio.sleep(0.001)
                return await self.world.nodes[url].answer(what, forwarded=True)
            try:
                return await self._decide(coordinator, what)
            except NotLeading:
                continue
        raise NotLeading

    async def _decide(self, coordinator: Coordinator, what: Any) -> Any:
        if isinstance(what, GroupConfig):
            return await coordinator.create_group(KEY, what)
        if isinstance(what, ReceiveHeartbeat):
            return await coordinator.beat(KEY, what)
        return await coordinator.apply(KEY, what)

    async def answer(self, what: Any, *, forwarded: bool = False) -> Any:
        """As ``request``, in a task that dies with this process."""
        task = asyncio.ensure_future(self.request(what, forwarded=forwarded))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        try:
            result = await task
        except asyncio.CancelledError:
            if asyncio.current_task().cancelling():  # type: ignore[union-attr]
                task.cancel()
                raise
            raise ConnectionError(self.name) from None
        await self.link.free.wait()
        return result


class SmallAgent:
    """A member: heartbeats, and the promise of R1 to be inactive R after the sending of the last good one."""

    def __init__(self, world: "World", name: str, rate: float) -> None:
        self.world = world
        self.name = name
        self.rate = rate
        self.instance = f"{name}-1"
        self.lives = 1
        self.epoch: int | None = None
        self.tenure: int | None = None
        self.finished: set[int] = set()
        self.active_until = float("-inf")
        self.up = True
        self.reachable = set(world.nodes)
        self.at = 0

    @property
    def active(self) -> bool:
        return asyncio.get_running_loop().time() < self.active_until

    async def run(self) -> None:
        self.at = self.world.chance.randrange(len(self.world.nodes))
        while True:
            if self.up:
                self.world.spawn(self.beat())
            await asyncio.sleep(RENEW_S / 4 * self.world.chance.uniform(0.9, 1.1))

    async def ask(self, what: Any) -> Any:
        names = list(self.world.nodes)
        name = names[self.at % len(names)]
        try:
            async with asyncio.timeout(REQUEST_S):
                await asyncio.sleep(self.world.chance.uniform(0.0005, 0.02))
                if name not in self.reachable:
                    await asyncio.sleep(REQUEST_S)
                answer = await self.world.nodes[name].answer(what)
                await asyncio.sleep(self.world.chance.uniform(0.0005, 0.02))
                return answer
        except (TimeoutError, ConnectionError, FailoverError) as error:
            if not isinstance(error, NotFound):
                self.at += 1
            raise

    async def beat(self) -> None:
        now = asyncio.get_running_loop().time
        sent_at, instance = now(), self.instance
        if self.tenure is not None and sent_at >= self.active_until:
            self.end_tenure("not renewed in time")
        try:
            answer = await self.ask(ReceiveHeartbeat(self.name, 100.0, None, instance, self.epoch))
        except NotFound:
            await self.join()
            return
        except (TimeoutError, ConnectionError, FailoverError):
            return
        if instance == self.instance and self.up:
            self.receive(answer, sent_at)

    async def join(self) -> None:
        try:
            await self.ask(GroupConfig("g", int(LEASE_S * TICKS_PER_SECOND)))
            await self.ask(AddSession(SessionConfig(self.name)))
        except (TimeoutError, ConnectionError, FailoverError):
            return

    def receive(self, answer: HeartbeatAnswer, sent_at: float) -> None:
        assert answer.epoch is not None
        if answer.epoch < (self.epoch or 0):
            return
        self.epoch = answer.epoch
        until = sent_at + RENEW_S / self.rate
        if answer.role is not Role.PRIMARY:
            if self.tenure is not None:
                self.end_tenure("demoted")
        elif answer.epoch in self.finished:
            self.world.spawn(self.release(answer.epoch))
        elif asyncio.get_running_loop().time() < until:
            if self.tenure != answer.epoch:
                self.world.record(self.name, f"is primary of epoch {answer.epoch}")
                self.world.tenures.append((self.name, answer.epoch))
            self.tenure = answer.epoch
            self.active_until = max(self.active_until, until)
            self.world.check()

    async def release(self, epoch: int) -> None:
        try:
            await self.ask(ReleaseRole(self.name, epoch, self.instance))
        except (TimeoutError, ConnectionError, FailoverError):
            return

    def end_tenure(self, why: str) -> None:
        assert self.tenure is not None
        self.world.record(self.name, f"is not primary any more: {why}")
        self.finished.add(self.tenure)
        self.tenure, self.active_until = None, float("-inf")

    def kill(self) -> None:
        """The host is gone, its workload with it."""
        self.world.record(self.name, "is killed")
        self.up, self.tenure, self.active_until = False, None, float("-inf")

    def start(self) -> None:
        self.lives += 1
        self.instance, self.up, self.epoch = f"{self.name}-{self.lives}", True, None
        self.finished = set()


@dataclass
class World:
    """Everything. Build it inside ``run_virtually``."""

    seed: int
    kinds: Kinds = field(default_factory=Kinds)
    coordinators: int = 2
    agents: int = 2
    shards: int = 1

    def __post_init__(self) -> None:
        self.chance = random.Random(self.seed)
        self.transcript: list[str] = []
        self.tenures: list[tuple[str, int]] = []
        self.tasks: set[asyncio.Task[Any]] = set()
        self.failures: list[BaseException] = []
        self.etcd = FakeEtcd()
        self.decoded: tuple[int, GroupRecord | None] = (0, None)
        rates = [1 - 0.004, 1.0, 1 + 0.004]
        self.nodes = {
            name: Node(self, name, self.chance.choice(rates))
            for name in (f"c{number}" for number in range(self.coordinators))
        }
        self.members = [
            SmallAgent(self, name, self.chance.choice(rates)) for name in "abc"[: self.agents]
        ]

    def record(self, who: str, what: str) -> None:
        self.transcript.append(f"{asyncio.get_running_loop().time():8.3f} {who:3} {what}")

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self.tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self.tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.failures.append(error)

    def check(self) -> None:
        active = [agent.name for agent in self.members if agent.active]
        if len(active) > 1:
            raise BrokenPromiseError(f"active at once: {active}\n" + self.text())

    def check_records(self) -> None:
        """The leader decides by the record that is durable."""
        layout = Layout("/f", self.shards)
        number = layout.shard_of(KEY)
        stored = self.etcd.keys.get(layout.record(KEY))
        leader = self.etcd.keys.get(layout.leader(number))
        for node in self.nodes.values():
            if node.coordinator is None or node.leadership is None:
                continue
            group = node.coordinator.engine.groups.get(KEY)
            term = node.leadership._terms.get(number)
            if leader is None or term is None or term[0] != leader.modified or group is None:
                continue
            if group.lock.locked() or group.doubtful or stored is None:
                continue
            if stored.modified != self.decoded[0]:
                text = stored.value.partition("\n")[2]
                self.decoded = stored.modified, decode(GroupRecord, text, "the record")
            if self.decoded[1] != group.state.record:
                raise BrokenPromiseError(f"{node.name} decides by a stale record\n" + self.text())

    async def keep_checking(self) -> None:
        while True:
            self.check_records()
            await asyncio.sleep(0.02)

    def text(self) -> str:
        return "\n".join(self.transcript)

    def primary(self) -> SmallAgent | None:
        return next((agent for agent in self.members if agent.active), None)

    def leader(self) -> Node | None:
        """The coordinator that leads the group, by its own judgement."""
        for node in self.nodes.values():
            if node.leadership is not None and node.leadership.led:
                return node
        return None

    async def begin(self) -> None:
        for node in self.nodes.values():
            self.spawn(node.start())
        for agent in self.members:
            self.spawn(agent.run())
        self.spawn(self.keep_checking())

    async def run_for(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
        if self.failures:
            raise self.failures[0]

    async def until(self, condition: Any, limit_s: float, what: str) -> float:
        """Let time pass until something holds; how long that took."""
        began = now = asyncio.get_running_loop().time()
        while not condition():
            await self.run_for(0.01)
            now = asyncio.get_running_loop().time()
            assert now < began + limit_s, f"{what} within {limit_s:g} s\n{self.text()}"
        return now - began

    async def end(self) -> None:
        for node in self.nodes.values():
            node.kill()
        tasks = [t for t in asyncio.all_tasks() if t is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
