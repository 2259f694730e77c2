"""A world of agents and coordinators on a virtual clock, around the real core.

Owns time and the promise, which is checked at every change. Decides nothing itself: ``Session`` and
``decide`` do. Requests and answers are separate messages that can be late, lost and repeated; a durable
write takes time, and a crash may fall into it. Chance comes from seeded generators, so that the same plan
gives the same transcript.

What counts as active: from the start of a promotion hook to the success of a demotion hook, the
escalation after one failed, or the death of the host; and a workload that a process starts later which
such a hook has left behind. Out of the promise (docs/design.md, "What is promised") is a host

- that was frozen until after its lease, until it has demoted: there the epoch protects;
- whose agent and guard are both dead or stopped, until it has demoted;
- that is promoted by a coordinator with lost data, if it had never heard of the newer epoch.
"""

import heapq
import random
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, NoReturn

from agent.core.group_failsafe import choosable_members
from agent.core.group_state import Policy
from agent.core.session import Session
from agent.core.timing import Budget, plan
from agent.model import Instant, Role

from .defects import Defect
from .network import Net, send

if TYPE_CHECKING:
    from .coordinator import CoordinatorHost, Core
    from .host import AgentHost

EPOCH_OF_WALL = datetime(2026, 1, 1, tzinfo=UTC)
MAX_SESSIONS = 5
"""Sessions of the group: so few that strangers can fill it, and dead members have to give way."""


class BrokenPromiseError(AssertionError):
    """An invariant does not hold."""


class World:
    """Hosts, network and time; ``run`` moves it on."""

    def __init__(
        self,
        seed: int = 0,
        *,
        lease_s: float = 2.0,
        policy: Policy | None = None,
        plain_v1: bool = False,
        forgets: bool = False,
        session_class: type[Session] = Session,
        core: "Core | None" = None,
        budget: Budget | None = None,
        cooldown_limit_s: float | None = None,
        stores: int = 1,
        defects: frozenset[Defect] = frozenset(),
        failsafe: bool = False,
    ) -> None:
        from .coordinator import REAL, CoordinatorHost  # noqa: PLC0415 - they know the world
        from .lan import Lan  # noqa: PLC0415 - likewise

        self.rng = random.Random(seed)
        self.chance = random.Random(seed + 1)
        """For all that a plain schedule has none of: it must not change the others."""
        self.now = 0.0
        self.lease_s = lease_s
        self.timing = plan(lease_s, budget)
        self.cooldown_limit_s = lease_s if cooldown_limit_s is None else cooldown_limit_s
        self.policy = policy or Policy(
            score_hysteresis=10.0,
            minimum_hold_s=lease_s,
            max_sessions=MAX_SESSIONS,
            dead_session_retention_s=0.0,
        )
        self.plain_v1 = plain_v1
        self.forgets = forgets
        """Whether the coordinators keep nothing over a restart."""
        self.session_class = session_class
        self.core = core or REAL
        self.defects = defects
        self.failsafe = failsafe
        """Whether the agents take part in failsafe, unless they are told otherwise."""
        self.lan = Lan(self)
        self.queue: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self.count = 0
        self.transcript: list[str] = []
        self.void_until = 0.0
        """Until then a member may be active twice: data were lost, and one that had not heard came first."""
        self.agents: dict[str, AgentHost] = {}
        names = ["coordinator", *(f"coordinator{number + 2}" for number in range(stores - 1))]
        self.coordinators = [CoordinatorHost(self, name) for name in names]

    @property
    def coordinator(self) -> "CoordinatorHost":
        """The first one, which every member has met."""
        return self.coordinators[0]

    def instant(self, local: float) -> Instant:
        """A moment, with the reading of somebody's own clock."""
        return Instant(local, EPOCH_OF_WALL + timedelta(seconds=self.now))

    # -- time -----------------------------------------------------------------------------------

    def after(self, delay_s: float, do: Callable[..., None], *args: Any) -> None:
        """Call something later."""
        self.count += 1
        heapq.heappush(self.queue, (self.now + delay_s, self.count, do, args))

    def run(self, seconds: float) -> None:
        """Let time pass."""
        end = self.now + seconds
        while self.queue and self.queue[0][0] <= end:
            self.now, _, do, args = heapq.heappop(self.queue)
            do(*args)
        self.now = end

    def run_until(self, condition: Callable[[], bool], limit_s: float, what: str = "it") -> float:
        """Run until a condition holds; seconds that took, or fail at the limit."""
        start = self.now
        while not condition():
            if not self.queue or self.queue[0][0] > start + limit_s:
                self.now = start + limit_s
                self.broken(f"{what} not reached within {limit_s:.3f} s")
            self.now, _, do, args = heapq.heappop(self.queue)
            do(*args)
        return self.now - start

    def record(self, who: str, what: str) -> None:
        """One line of the transcript."""
        self.transcript.append(f"{self.now:8.3f} {who:11} {what}")

    def text(self) -> str:
        """The transcript."""
        return "\n".join(self.transcript)

    def send(
        self, net: Net, *, back: bool, deliver: Callable[..., None], args: tuple[Any, ...]
    ) -> None:
        """Send one message over a link."""
        send(self.rng, self.after, net, deliver, args, back=back)

    # -- the promise ----------------------------------------------------------------------------

    def broken(self, what: str) -> NoReturn:
        """An invariant does not hold.

        Raises:
            BrokenPromiseError: always, with the transcript.
        """
        raise BrokenPromiseError(f"{what} at {self.now:.3f}\n{self.text()}")

    def check_active(self) -> None:
        """At most one is active."""
        active = [agent.name for agent in self.agents.values() if agent.is_active]
        if len(active) > 1 and self.now >= self.void_until:
            self.broken(f"active at once: {active}")

    def check_failsafe(self, coordinator: "CoordinatorHost") -> None:
        """No active member is in a tenure that is taken for over, and it asks whoever may be promoted (R24, R25)."""
        record = coordinator.disk
        allowed = choosable_members(record)
        for agent in self.agents.values():
            if not agent.is_active or agent.tenure is None or self.now < self.void_until:
                continue
            if agent.tenure[0] <= record.cleared:
                self.broken(f"{record.cleared} is taken for over, {agent.name} is active in it")
            asked = agent.session.asked_members if agent.works else None
            if asked is not None and not (allowed is not None and set(allowed) <= set(asked)):
                self.broken(f"{allowed} may be promoted, {agent.name} asks {asked}")

    def void(self, coordinator: "CoordinatorHost") -> None:
        """A member that had not heard of a lease came first after the data with it were lost."""
        void_until = coordinator.restored_at + 1.02 * self.lease_s
        self.void_until = max(self.void_until, void_until)

    def check_epoch(self, store_id: str | None, epoch: int, instance: str) -> None:
        """One process for each epoch of a store (R15)."""
        for coordinator in self.coordinators:
            if coordinator.store_id == store_id and self.now >= self.void_until:
                coordinator.check_epoch(epoch, instance)

    def primary(self) -> str | None:
        """Who is Primary, and works."""
        for agent in self.agents.values():
            if agent.works and agent.session.role is Role.PRIMARY:
                return agent.name
        return None

    def add_agent(self, name: str, **options: Any) -> "AgentHost":
        """A host, and start its agent."""
        from .host import AgentHost  # noqa: PLC0415 - it knows the world

        agent = AgentHost(self, name, **options)
        self.agents[name] = agent
        agent.start()
        return agent
