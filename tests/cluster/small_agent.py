"""A small agent, which is as slow as its promise allows (R1).

It renews until R after the *sending* of the last heartbeat that was answered Primary, and its demotion may take as long
as the lease lasts, less the margin for the drift.
"""

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from agent.core.group_state import AddSession, ReceiveHeartbeat, ReleaseRole
from agent.errors import FailoverError, NotFound
from agent.model import TICKS_PER_SECOND, GroupConfig, HeartbeatAnswer, Role, SessionConfig

if TYPE_CHECKING:
    from .world import World

LEASE_S = 2.0
RENEW_S = 0.65 * LEASE_S
REQUEST_S = RENEW_S / 3
ACTIVE_S = 0.975 * LEASE_S
"""When the slowest demotion is done: the margin is above the drift of 1 %."""


class SmallAgent:
    """One member of the group.

    Attributes:
        renewed_until: R.
        active_until: when its workload has surely ended.
    """

    def __init__(self, world: "World", name: str, rate: float) -> None:
        self.world = world
        self.name = name
        self.rate = rate
        self.instance = f"{name}-1"
        self.lives = 1
        self.epoch: int | None = None
        self.tenure: int | None = None
        self.finished: set[int] = set()
        self.renewed_until = self.active_until = float("-inf")
        self.up = True
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
                return await self.world.send(self.name, name, what)
        except (TimeoutError, ConnectionError, FailoverError) as error:
            if not isinstance(error, NotFound):
                self.at += 1
            raise

    async def beat(self) -> None:
        now = asyncio.get_running_loop().time
        sent_at, instance = now(), self.instance
        if self.tenure is not None and sent_at >= self.renewed_until:
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
            await self.ask(GroupConfig(self.world.key.group, int(LEASE_S * TICKS_PER_SECOND)))
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
            if not self.active:
                self.world.spawn(self.release(answer.epoch))
        elif asyncio.get_running_loop().time() < until:
            if self.tenure != answer.epoch:
                self.world.record(self.name, f"is primary of epoch {answer.epoch}")
                self.world.record_tenure(self.name, answer.epoch)
            self.tenure = answer.epoch
            self.renewed_until = max(self.renewed_until, until)
            self.active_until = max(self.active_until, sent_at + ACTIVE_S / self.rate)
            self.world.check()

    async def release(self, epoch: int) -> None:
        with suppress(TimeoutError, ConnectionError, FailoverError):
            await self.ask(ReleaseRole(self.name, epoch, self.instance))

    def end_tenure(self, why: str) -> None:
        """Demote, for as long as that may take or shorter, and release the role."""
        assert self.tenure is not None
        now = asyncio.get_running_loop().time()
        slowest_s = max(0.0, self.active_until - now)
        demotion_s = slowest_s * self.world.chance.choice(
            [0.05, self.world.chance.random(), 1.0, 1.0]
        )
        self.active_until = now + demotion_s
        self.world.record(self.name, f"demotes for {demotion_s:.2f} s: {why}")
        self.finished.add(self.tenure)
        self.world.spawn(self.release_later(self.tenure, demotion_s))
        self.tenure, self.renewed_until = None, float("-inf")

    async def release_later(self, epoch: int, after_s: float) -> None:
        instance = self.instance
        await asyncio.sleep(after_s)
        if self.up and instance == self.instance:
            await self.release(epoch)

    def kill(self) -> None:
        """The host is gone, its workload with it."""
        self.world.record(self.name, "is killed")
        self.up, self.tenure = False, None
        self.renewed_until = self.active_until = float("-inf")

    def start(self) -> None:
        if self.up:
            return
        self.lives += 1
        self.instance, self.up, self.epoch = f"{self.name}-{self.lives}", True, None
        self.finished = set()
