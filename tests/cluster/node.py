"""One coordinator: the real engine, leadership and store, in a process that is frozen and killed."""

import asyncio
import random
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from agent.coordinator.engine import Engine
from agent.coordinator.leadership import Decider, Leadership
from agent.coordinator.service import Coordinator
from agent.coordinator.store.etcd import EtcdCluster
from agent.coordinator.store.etcd_client import Etcd
from agent.core.group_state import Policy, ReceiveHeartbeat
from agent.errors import FailoverError, NotLeading
from agent.model import GroupConfig, Instant

from .fake_etcd import Direction, FakeTransport, Link
from .small_agent import LEASE_S
from .virtual import Process

if TYPE_CHECKING:
    from .world import World

EPOCH_OF_WALL = datetime(2026, 1, 1, tzinfo=UTC)
WALL_OFFSETS_S = (0.0, 0.0, 240.0, -240.0)
"""By how much the time of day of a coordinator is wrong: no lease may depend on it."""

TTL_S = 1.0
LEADERS_TRIED = 3


@dataclass(frozen=True)
class Kinds:
    """The classes of the parts; a planted fault replaces one."""

    leadership: type[Leadership] = Leadership
    cluster: type[EtcdCluster] = EtcdCluster
    decider: Callable[[Engine, Callable[[], float]], Decider] = lambda engine, _: engine
    etcd: type[Etcd] = Etcd


class Node:
    """One coordinator, which can be killed, frozen, cut off and started again.

    Attributes:
        url: where the others find it; with a mistake in its settings, that of another one.
    """

    def __init__(self, world: "World", name: str, rate: float) -> None:
        self.world = world
        self.name = self.url = name
        self.rate = rate
        self.chance = random.Random(world.chance.random())
        self.wall_s = self.chance.choice(WALL_OFFSETS_S)
        self.link = self._new_link()
        self.up = False
        self.coordinator: Coordinator | None = None
        self.leadership: Leadership | None = None
        self.process = Process()
        self.replies: set[asyncio.Future[Any]] = set()

    def _new_link(self) -> Link:
        def passes(direction: Direction) -> bool:
            ends = (self.name, "etcd")
            return self.world.passes(*(ends if direction is Direction.THERE else ends[::-1]))

        return Link(self.world.etcd, self.chance, passes=passes)

    def boottime(self) -> float:
        return 100.0 + asyncio.get_running_loop().time() * self.rate

    def instant(self) -> Instant:
        now = asyncio.get_running_loop().time()
        return Instant(self.boottime(), EPOCH_OF_WALL + timedelta(seconds=now + self.wall_s))

    def start(self) -> None:
        """Start a new process."""
        if not self.up:
            self.up = True
            self.process = Process()
            self.world.processes.append(self.process)
            self.world.watch_over(self.process.spawn(self._start()))

    async def _start(self) -> None:
        kinds = self.world.kinds
        etcd = kinds.etcd(FakeTransport(self.link), TTL_S)
        while True:
            try:
                cluster = await kinds.cluster.open(etcd, "/f", self.world.shards)
                break
            except FailoverError:
                await asyncio.sleep(0.1)
        coordinator = Coordinator(
            None,
            self.instant,
            Policy(score_hysteresis=10, minimum_hold_s=LEASE_S),
            directory=cluster,
            shard_of=cluster.layout.shard_of,
        )
        self.leadership = kinds.leadership(
            cluster,
            kinds.decider(coordinator.engine, self.boottime),
            self.boottime,
            ttl_s=TTL_S,
            url=self.url,
        )
        await coordinator.start()
        self.coordinator = coordinator
        self.leadership.start()
        self.world.record(self.name, "starts")

    def kill(self) -> None:
        """SIGKILL. Its connections are reset."""
        if not self.up:
            return
        self.world.record(self.name, "is killed")
        self.up = False
        self.process.pause()
        self.link = self._new_link()
        self.coordinator = self.leadership = None
        for reply in self.replies:
            if not reply.done():
                reply.set_exception(ConnectionError(self.name))
        self.replies.clear()

    async def stop(self) -> None:
        """An orderly stop, which a service manager ends by force."""
        if self.up and self.process.runs and self.leadership is not None:
            self.world.record(self.name, "stops")
            await asyncio.wait([self.process.spawn(self.leadership.stop())], timeout=5 * TTL_S)
        self.kill()

    def freeze(self) -> None:
        if self.up:
            self.world.record(self.name, "is frozen")
            self.process.pause()

    def thaw(self) -> None:
        if self.up and not self.process.runs:
            self.world.record(self.name, "goes on")
            self.process.go_on()

    def receive(self, what: Any, *, forwarded: bool) -> asyncio.Future[Any]:
        """A request has arrived; its answer."""
        reply: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        if not self.up:
            reply.set_exception(ConnectionError(self.name))
            return reply
        self.replies.add(reply)
        reply.add_done_callback(self.replies.discard)
        self.process.spawn(self._serve(what, reply, forwarded=forwarded))
        return reply

    async def _serve(self, what: Any, reply: asyncio.Future[Any], *, forwarded: bool) -> None:
        try:
            answer = await self._answer(what, forwarded=forwarded)
        except (FailoverError, ConnectionError) as error:
            if not reply.done():
                reply.set_exception(error)
        except Exception as error:  # noqa: BLE001 - a fault of the program under test
            self.world.failures.append(error)
        else:
            if not reply.done():
                reply.set_result(answer)

    async def _answer(self, what: Any, *, forwarded: bool) -> Any:
        coordinator, leadership = self.coordinator, self.leadership
        if coordinator is None or leadership is None:
            raise ConnectionError(self.name)
        for _ in range(LEADERS_TRIED):
            url = await leadership.leader_url(self.world.key)
            if url is not None and forwarded:
                break
            with suppress(NotLeading):
                if url is None:
                    return await self._decide(coordinator, what)
                return await self._forward(leadership, url, what)
        raise NotLeading

    async def _forward(self, leadership: Leadership, url: str, what: Any) -> Any:
        request = asyncio.ensure_future(self.world.send(self.name, url, what, forwarded=True))
        moved = asyncio.ensure_future(self._wait_until_moved(leadership, url))
        await asyncio.wait([request, moved], return_when=asyncio.FIRST_COMPLETED)
        moved.cancel()
        if request.done():
            return request.result()
        request.cancel()
        raise NotLeading

    async def _wait_until_moved(self, leadership: Leadership, url: str) -> None:
        while (leader := leadership.leader_of(self.world.key)) is None or leader.url == url:
            await leadership.wait_for_change(None)

    async def _decide(self, coordinator: Coordinator, what: Any) -> Any:
        if isinstance(what, GroupConfig):
            return await coordinator.create_group(self.world.key, what)
        if isinstance(what, ReceiveHeartbeat):
            return await coordinator.beat(self.world.key, what)
        return await coordinator.apply(self.world.key, what)
