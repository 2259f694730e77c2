"""A coordinator of a simulated world: one group, decided by the real core.

Owns the disk, which survives a crash and may be replaced by an older copy, and the queue of inputs: one is
decided after the other, and answered when it is durable. Callers are messages; who they are is not its
business.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from agent.core import group, group_state
from agent.core.group_state import (
    AddSession,
    Decision,
    DeclareRestored,
    GroupState,
    Input,
    Lift,
    Policy,
    Removal,
    RemoveGroup,
    Tick,
    state_after_stall,
    status_of,
)
from agent.errors import NotFound, RequestRefused
from agent.model import GroupConfig, GroupRecord, GroupStatus, Instant, RoleOverride

from .network import Clock

if TYPE_CHECKING:
    from .world import World

COPIES = 12
"""Older copies of the data that a backup may have."""


@dataclass(frozen=True)
class Core:
    """The functions of the group's core; a planted bug replaces one of them."""

    decide: Callable[[GroupState, Input, Instant, Policy], Decision]
    state_after_restart: Callable[[GroupRecord, Instant], GroupState]


REAL = Core(group.decide, group_state.state_after_restart)


class CoordinatorHost:
    """One coordinator with one group; ``disk`` survives its crash."""

    def __init__(self, world: "World", name: str) -> None:
        self.world = world
        self.name = name
        self.store_id = f"store-of-{name}"
        self.clock = Clock()
        ticks = round(world.lease_s * 10_000_000)
        self.disk = GroupRecord(GroupConfig("g", ticks))
        self.copies = [self.disk]
        self.deleted = False
        self.up = True
        self.life = 0
        self.fsync_s = 0.002
        self.backlog: list[tuple[Input, Callable[[Any], None]]] = []
        self.writing: GroupRecord | None = None
        self.readers: list[tuple[int, Callable[[GroupStatus], None]]] = []
        self.wake = float("inf")
        self.paused_at: float | None = None
        self.holders: dict[int, str] = {}
        self.newest_epoch = 0
        self.restored_at = float("-inf")
        self.restored = False
        """Whether the next start declares that its data are an older copy."""
        self.lost_epoch = -1
        """The newest epoch in the data before they were restored."""
        self.state: GroupState = world.core.state_after_restart(self.disk, self.instant())

    def instant(self) -> Instant:
        return self.world.instant(self.clock.local(self.world.now))

    # -- faults ---------------------------------------------------------------------------------

    def crash(self) -> None:
        if not self.up:
            return
        self.world.record(self.name, "is killed")
        self.up = False
        self.life += 1
        self.paused_at = None
        if self.writing is not None and self.world.rng.random() < 0.5:
            self.keep(self.writing)  # the write reached the disk, but no answer was sent
        self.writing = None
        self.backlog.clear()
        self.readers.clear()

    def restart(self) -> None:
        if self.up:
            return
        if self.world.forgets:
            self.lose_data()
        self.world.record(self.name, "starts")
        self.up = True
        self.state = self.world.core.state_after_restart(self.disk, self.instant())
        if self.restored:
            self.declare_restored()
        self.submit(Tick(), lambda _: None)

    def lose_data(self) -> None:
        """Lose all data except the group's configuration."""
        self.world.record(self.name, "loses its data")
        self.restore(GroupRecord(self.disk.config))

    def restore_copy(self, which: int) -> None:
        """Replace the data by an older copy; only while the coordinator is down."""
        if not self.up:
            copy = self.copies[which % len(self.copies)]
            self.world.record(self.name, f"gets data of epoch {copy.epoch} from a backup")
            self.restore(copy)

    def restore(self, copy: GroupRecord) -> None:
        if not self.world.forgets:  # without epochs, clients cannot report a newer one
            self.lost_epoch = max(self.lost_epoch, self.newest_epoch)
        self.disk, self.newest_epoch = copy, copy.epoch
        self.restored = self.world.failsafe
        self.deleted = False
        self.restored_at = self.world.now
        self.holders = {e: who for e, who in self.holders.items() if e < copy.epoch}
        if self.up:
            self.state = self.world.core.state_after_restart(copy, self.instant())

    def declare_restored(self) -> None:
        """Begin with a copy that is declared as one, before any request (R34)."""
        self.restored = False
        self.world.record(self.name, "its data are declared as restored")
        what = DeclareRestored()
        decision = self.world.core.decide(self.state, what, self.instant(), self.world.policy)
        self.keep(decision.state.record)
        self.conclude(decision, lambda _: None)

    def lift(self) -> None:
        """An operator lifts, having looked at each host: nobody is active."""
        if any(a.runs.may_be_active or a.guard.acts for a in self.world.agents.values()):
            return
        if self.state.record.cleared < self.state.record.epoch:
            self.world.record("operator", f"lifts epoch {self.state.record.epoch}")
            self.submit(Lift(self.state.record.epoch, "looked at each host"), lambda _: None)

    def pause(self) -> None:
        if self.up and self.paused_at is None:
            self.world.record(self.name, "is stopped")
            self.paused_at = self.clock.local(self.world.now)

    def resume(self) -> None:
        if self.paused_at is not None:
            self.world.record(self.name, "goes on")
            self.state = state_after_stall(self.state, self.paused_at, self.instant())
            self.paused_at = None
            self.work()

    # -- requests -------------------------------------------------------------------------------

    def submit(self, what: Input, reply: Callable[[Any], None]) -> None:
        if self.up:
            self.backlog.append((what, reply))
            self.work()

    def read_status(self, after: int, reply: Callable[[GroupStatus], None]) -> None:
        if self.up and not self.deleted:
            if self.state.record.revision != after:
                reply(self.status())
            else:
                self.readers.append((after, reply))

    def status(self) -> GroupStatus:
        store_id = None if self.world.plain_v1 else self.store_id
        return replace(status_of(self.state), store_id=store_id)

    def work(self) -> None:
        while self.backlog and self.writing is None and self.up and self.paused_at is None:
            what, reply = self.backlog.pop(0)
            if self.deleted and isinstance(what, AddSession):
                self.create()
            try:
                if self.deleted:
                    raise NotFound("There is no such group.", "Create it first.")
                decision = self.world.core.decide(
                    self.state, what, self.instant(), self.world.policy
                )
            except RequestRefused as refusal:
                reply(refusal)
                continue
            if isinstance(what, RemoveGroup):
                self.delete()
            elif decision.state.record is self.state.record:
                self.conclude(decision, reply)
            else:
                self.writing = decision.state.record
                self.world.after(self.fsync_s, self.written, self.life, decision, reply)

    def delete(self) -> None:
        """Delete the group; its epochs are remembered."""
        self.world.record(self.name, "deletes the group")
        self.deleted = True
        self.wake = float("inf")
        self.readers.clear()

    def create(self) -> None:
        """Create the group again, as a join does; it continues the epochs of the deleted one."""
        self.deleted = False
        record = group.new_record(self.disk.config, self.state.record.epoch)
        if record.epoch < self.newest_epoch:  # only a wrong heartbeat can have caused that
            self.newest_epoch, self.holders = record.epoch, {}
        self.keep(record)
        self.state = self.world.core.state_after_restart(self.disk, self.instant())

    def written(self, life: int, decision: Decision, reply: Callable[[Any], None]) -> None:
        if life == self.life:
            self.writing = None
            self.keep(decision.state.record)
            self.conclude(decision, reply)
            self.work()

    def keep(self, record: GroupRecord) -> None:
        """Make a record durable; no epoch has two holders, or goes back (R15)."""
        self.disk = record
        self.copies = [*self.copies[-COPIES + 1 :], record]
        if record.epoch < self.newest_epoch:
            self.world.broken(f"epoch goes back to {record.epoch}")
        self.newest_epoch = record.epoch
        if record.holder is not None:
            self.check_epoch(record.holder.epoch, str(record.holder.instance))
        if self.world.failsafe:
            self.world.check_failsafe(self)

    def check_epoch(self, epoch: int | None, holder: str) -> None:
        if epoch is None:
            return
        known = self.holders.setdefault(epoch, holder)
        if known != holder:
            self.world.broken(f"epoch {epoch} of {known} and {holder}")

    def conclude(self, decision: Decision, reply: Callable[[Any], None]) -> None:
        before, self.state = self.state.record, decision.state
        record = self.state.record
        for removal in decision.removals:
            self.check_removal(before, removal)
        for entry in decision.history:
            ended = f"ended: {entry.why_ended}" if entry.until else f"began: {entry.why_started}"
            self.world.record(self.name, f"tenure {entry.epoch} of {entry.session_id} {ended}")
            if entry.until is None and entry.epoch <= self.lost_epoch:
                self.world.void(self)
        if record.pending != before.pending and record.pending is not None:
            self.world.record(self.name, f"chooses {record.pending}")
        reply(decision.answer)
        if record.revision != before.revision:
            readers, self.readers = self.readers, []
            for _, answer in readers:
                answer(self.status())
        self.arm(decision.wake_at)

    def check_removal(self, before: GroupRecord, removal: Removal) -> None:
        """No session with a lease, a choice or an order of an operator is removed (R20)."""
        session_id = removal.session_id
        self.world.record(self.name, f"removes the dead {session_id}: {removal.cause}")
        holder = self.state.record.holder
        if holder is not None and holder.session_id == session_id:
            self.world.broken(f"{session_id} is removed, and has a lease")
        if before.sessions[session_id].override is not RoleOverride.OFF:
            self.world.broken(f"{session_id} is removed, and is overridden")
        if self.state.record.pending == session_id or removal.silent_s < self.world.lease_s:
            self.world.broken(f"{session_id} is removed, and is not dead")

    def arm(self, wake_at: float) -> None:
        self.wake = wake_at
        if wake_at < float("inf"):
            delay_s = max(0.0, self.clock.true(wake_at) - self.world.now)
            self.world.after(delay_s + 1e-6, self.tick, self.life, wake_at)

    def tick(self, life: int, wake_at: float) -> None:
        if life == self.life and wake_at == self.wake and self.up and self.paused_at is None:
            self.submit(Tick(), lambda _: None)
