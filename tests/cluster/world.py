"""Several coordinators on a virtual clock: the real engine, leadership and store over an etcd in memory.

Owns the ways between all parts, an administrator who changes the group, and the checks: at no moment two agents are
active, no epoch has two holders, the leader decides by the record that is durable, and no acknowledged change
is lost.
"""

import asyncio
import random
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

from agent.coordinator.store.codec import decode
from agent.coordinator.store.etcd_layout import Layout
from agent.core.group_state import SetAccess, SetOverride
from agent.errors import FailoverError
from agent.model import (
    AccessEntry,
    AccessList,
    GroupKey,
    GroupRecord,
    RoleOverride,
    Trustee,
)

from .fake_etcd import FakeEtcd
from .node import TTL_S, Kinds, Node
from .small_agent import LEASE_S, REQUEST_S, SmallAgent
from .virtual import Process, run_virtually

__all__ = [
    "LEASE_S",
    "TTL_S",
    "BrokenPromiseError",
    "Cut",
    "Kinds",
    "Node",
    "World",
    "run_virtually",
]

ADMINISTRATOR = "admin"
CHANGE_S = 0.3
"""Between two changes of the administrator, on average."""


class BrokenPromiseError(AssertionError):
    """Two agents are active, or an acknowledged change is lost."""


@dataclass(frozen=True)
class Cut:
    """A partition in one direction: nothing gets from a source to a destination."""

    sources: frozenset[str]
    destinations: frozenset[str]


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
        self.key = group_of_last_shard(self.shards)
        self.transcript: list[str] = []
        self.tenures: dict[int, str] = {}
        self.tasks: set[asyncio.Task[Any]] = set()
        self.processes: list[Process] = []
        self.failures: list[BaseException] = []
        self.cuts: list[Cut] = []
        self.slow: dict[str, float] = {}
        self.forgotten_answers: dict[str, float] = {}
        self.changes = 0
        self.acknowledged: list[int] = []
        self.stored: set[int] = set()
        self.etcd = FakeEtcd()
        self.etcd.listeners.append(self.see_stored)
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

    def text(self) -> str:
        return f"seed {self.seed}\n" + "\n".join(self.transcript)

    # -- the network --------------------------------------------------------------------------

    def passes(self, source: str, destination: str) -> bool:
        """Whether a message gets through now."""
        return not any(
            source in cut.sources and destination in cut.destinations for cut in self.cuts
        )

    async def send(self, source: str, url: str, what: Any, *, forwarded: bool = False) -> Any:
        """Send a request to a coordinator, or to one of those that claim a URL; its answer, if one comes."""
        nodes = [node for node in self.nodes.values() if node.url == url] if forwarded else []
        node = self.chance.choice(nodes) if nodes else self.nodes[url]
        await self._pass(source, node.name)
        answer = await node.receive(what, forwarded=forwarded)
        if self.chance.random() < self.forgotten_answers.get(source, 0.0):
            await asyncio.Event().wait()
        await self._pass(node.name, source)
        return answer

    async def _pass(self, source: str, destination: str) -> None:
        late_s = max(self.slow.get(source, 0.0), self.slow.get(destination, 0.0))
        await asyncio.sleep(self.chance.uniform(0.0005, 0.02) + self.chance.random() * late_s)
        if not self.passes(source, destination):
            await asyncio.Event().wait()

    # -- tasks --------------------------------------------------------------------------------

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        self.watch_over(asyncio.ensure_future(work))

    def watch_over(self, task: asyncio.Task[None]) -> None:
        """Fail with a task that fails."""
        self.tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self.tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.failures.append(error)

    async def administer(self) -> None:
        """Change the group's access list now and then, each time to a later number."""
        while True:
            await asyncio.sleep(self.chance.uniform(0, 2 * CHANGE_S))
            self.changes += 1
            number = self.changes
            acl = AccessList(
                (AccessEntry(Trustee(1, f"user-{number}"), denied=False, rights=number),)
            )
            if await self.order(SetAccess(acl)):
                self.acknowledged.append(number)

    async def order(self, what: Any) -> bool:
        """Ask any coordinator for a change; whether it is acknowledged."""
        try:
            async with asyncio.timeout(REQUEST_S):
                await self.send(ADMINISTRATOR, self.chance.choice(list(self.nodes)), what)
        except (TimeoutError, ConnectionError, FailoverError):
            return False
        return True

    async def switch_over(self, to: str) -> None:
        """Override the role of an agent, until it has it."""
        if await self.order(SetOverride(to, RoleOverride.PRIMARY)):
            self.record(to, "is to be primary")
            await asyncio.sleep(0.8 * LEASE_S)
            await self.order(SetOverride(to, RoleOverride.OFF))

    # -- checks -------------------------------------------------------------------------------

    def break_promise(self, what: str) -> None:
        raise BrokenPromiseError(f"{what}\n{self.text()}")

    def record_tenure(self, name: str, epoch: int) -> None:
        if self.tenures.setdefault(epoch, name) != name:
            self.break_promise(f"epoch {epoch} has two holders")

    def check(self) -> None:
        active = [agent.name for agent in self.members if agent.active]
        if len(active) > 1:
            self.break_promise(f"active at once: {active}")

    def see_stored(self, key: str, value: str) -> None:
        """Note which change of the administrator a record has that is written to etcd."""
        if key == Layout("/f", self.shards).record(self.key):
            record = decode_record(value)
            if record.acl is not None:
                self.stored.add(record.acl.entries[0].rights)

    def check_records(self) -> None:
        """The leader decides by the record that is durable, and what was acknowledged is in it."""
        layout = Layout("/f", self.shards)
        number = layout.shard_of(self.key)
        stored = self.etcd.keys.get(layout.record(self.key))
        leader = self.etcd.keys.get(layout.leader(number))
        if stored is None:
            return
        if stored.modified != self.decoded[0]:
            self.decoded = stored.modified, decode_record(stored.value)
        record = self.decoded[1]
        if lost := set(self.acknowledged) - self.stored:
            self.break_promise(f"changes {sorted(lost)} are acknowledged and were never stored")
        for node in self.nodes.values():
            if node.coordinator is None or node.leadership is None:
                continue
            group = node.coordinator.engine.groups.get(self.key)
            # which revision it leads by is shown to nobody: etcd compares it at each write
            term = node.leadership._terms.get(number)
            if leader is None or term is None or term[0] != leader.modified or group is None:
                continue
            if group.lock.locked() or group.doubtful or not node.process.runs:
                continue
            if record != group.state.record:
                self.break_promise(f"{node.name} decides by a stale record")

    async def keep_checking(self) -> None:
        while True:
            self.check_records()
            await asyncio.sleep(0.05)

    # -- for schedules ------------------------------------------------------------------------

    def primary(self) -> SmallAgent | None:
        return next((agent for agent in self.members if agent.active), None)

    def leader(self) -> Node | None:
        """The coordinator that leads the group, by its own judgement."""
        number = Layout("/f", self.shards).shard_of(self.key)
        for node in self.nodes.values():
            if node.leadership is not None and number in node.leadership.led:
                return node
        return None

    async def begin(self) -> None:
        for node in self.nodes.values():
            node.start()
        for agent in self.members:
            self.spawn(agent.run())
        self.spawn(self.administer())
        self.spawn(self.keep_checking())

    async def run_for(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
        if self.failures:
            raise self.failures[0]

    async def until(self, condition: Callable[[], Any], limit_s: float, what: str) -> float:
        """Let time pass until something holds; how long that took."""
        began = now = asyncio.get_running_loop().time()
        while not condition():
            await self.run_for(0.01)
            now = asyncio.get_running_loop().time()
            assert now < began + limit_s, f"{what} within {limit_s:g} s\n{self.text()}"
        return now - began

    async def end(self) -> None:
        """End every task, those of dead processes, too."""
        for node in self.nodes.values():
            node.kill()
        self.cuts = [Cut(frozenset(self.nodes), frozenset({"etcd"}))]
        for process in self.processes:
            process.go_on()
        while tasks := asyncio.all_tasks() - {asyncio.current_task()}:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks, timeout=1.0)


def decode_record(value: str) -> GroupRecord:
    return decode(GroupRecord, value.partition("\n")[2], "the record")


def group_of_last_shard(shards: int) -> GroupKey:
    """A group of the shard that is handed over first when shards are spread anew."""
    layout = Layout("/f", shards)
    names = (GroupKey("default", "default", f"g{number}") for number in range(1000))
    return next(key for key in names if layout.shard_of(key) == shards - 1)
