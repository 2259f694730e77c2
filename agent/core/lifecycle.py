"""The phases of a session, from its first demotion to its exit (R5, R6, R8).

Owns the way along the table of core/phases.py: registering, cooling down, stopping, and releasing every
tenure that this session does not take. It knows no answers to heartbeats; core/session.py reads them.
"""

from agent.core.cooldown import Cooldown
from agent.core.effects import Cause, Effect, Escalate, Exit, Join, Leave, Release
from agent.core.events import Joined, Stop
from agent.core.knowledge import Knowledge
from agent.core.lease import LeaseHolder
from agent.core.options import FormerTenure, Options
from agent.core.phases import FIRST_SENTENCE, Phase, Turn, next_phase
from agent.core.timing import Timing
from agent.errors import ExitCode
from agent.model import Role

RETRY_SHARE = 0.1
"""What has failed is tried again after this share of R, if a beat is longer."""

HELD_OFF_AT_STOP = 1.0
"""A stopping session asks not to be chosen again for this many L; it is gone long before."""

PATIENCE = 2.0
"""Request timeouts after which a stop does not wait for an answer any longer. One is a call's bound."""

STOPPED_BY = {
    ExitCode.TASK_FAILED: Cause.TASK_FAILED,
    ExitCode.OTHER_STORE: Cause.OTHER_STORE,
}
"""Why a tenure ends by Stop, by exit code; STOPPING for any other one."""

NEVER_RELEASED = -1
FORMER_REASON = "demoted by the next process of this session"
_ON_THE_WAY_OUT = frozenset({Phase.STOPPING, Phase.RELEASING, Phase.LEAVING})


class LifeCycle(LeaseHolder):
    """Public attributes may be read at any time, and written by nobody else.

    Attributes:
        phase: how far the session is.
        store_id: the store that it has met; None before that, and at a plain v1 server.
    """

    def __init__(self, timing: Timing, options: Options) -> None:
        """Make a session that has not begun."""
        super().__init__(timing, options)
        self.phase = Phase.STARTING
        self.store_id = options.store_id
        self._sentence = FIRST_SENTENCE
        self._knowledge = Knowledge()
        self._cooldown = Cooldown()
        self._former: FormerTenure | None = None
        self._registered = False
        self._registered_at = float("-inf")
        self._join_at = float("inf")
        self._accept_at = float("-inf")
        self._cool_until = float("inf")
        self._unfit: str | None = None
        self._stop: Stop | None = None
        self._unused: int | None = None
        """Epoch of a tenure that was given to this session and that it has not taken."""
        self._given_up = NEVER_RELEASED
        self._releases = 0
        self._wait_by = float("inf")
        self._left = False

    def accepts_store(self, store_id: str | None) -> bool:
        """Whether answers of this store count: any store's do until one has been met (R3)."""
        return self.store_id is None or store_id == self.store_id

    @property
    def sentence(self) -> str:
        """What the session is doing, for operators: the table's sentence, or why it demotes."""
        if self._demoting and self.phase is not Phase.STARTING and self.phase is not Phase.ENDED:
            return f"demoting: {self._reason}"
        return self._sentence

    @property
    def _answered_by(self) -> float:
        """When heartbeats under way are answered. A plain v1 server has no release to wait for."""
        if self.store_id is None:
            return float("-inf")
        return self._heartbeats.answered_by(self.timing.request_timeout_s)

    @property
    def _may_beat(self) -> bool:
        return self.phase is Phase.MEMBER and not self._demoting and self._unfit is None

    def _refusal(self, now: float) -> str | None:
        """Why this session would not take a role that it is given now, or None (R8, R9)."""
        if self._stop is not None:
            return self._stop.reason
        if self._unfit is not None:
            return f"unfit: {self._unfit}"
        if self.phase not in {Phase.JOINING, Phase.MEMBER} or now < self._cooldown.until:
            return self._reason
        return "registered again" if now < self._accept_at else None

    def _rejoin(self, turn: Turn, effects: list[Effect]) -> None:
        self._turn(turn)
        self._heartbeats.forget()
        self._join(effects)

    def _join(self, effects: list[Effect]) -> None:
        self._join_at = float("inf")
        effects.append(Join())

    def _joined(self, event: Joined, now: float) -> None:
        retry_at = self._registered_at + RETRY_SHARE * event.timing.renew_s
        if not self.accepts_store(event.store_id):
            self._join_at = now + RETRY_SHARE * self.timing.renew_s
            return
        if self._registered and self.store_id is None:
            # The server may have lost its data, and with them a lease that another member still holds.
            self._accept_at = now + max(self.timing.lease_s, event.timing.lease_s)
            self._turn(Turn.REGISTERED_AGAIN)
            if event.store_id is not None:
                self._knowledge.forget_epoch()
                self._holds, self._unused, self._given_up = False, None, NEVER_RELEASED
        else:
            self._turn(Turn.REGISTERED)
        self.timing = event.timing
        self.store_id = event.store_id
        self._registered = True
        self._knowledge.registered()
        # At once, unless a server that knows nobody keeps taking registrations.
        self._heartbeats.due_at = max(now, retry_at)
        self._registered_at = now

    def _cool_down(self, now: float) -> None:
        """Ask not to be chosen for a while; for longer with each failure that is soon repeated."""
        lasted_s = now - self._primary_at if self.role is Role.PRIMARY else 0.0
        self._cooldown.failed(self.options.cooldown_s, self.options.cooldown_limit_s, lasted_s)

    def _advance(self, now: float, effects: list[Effect]) -> None:
        """Move on with whatever the event, the hooks and the time allow."""
        self._begin_stop(now, effects)
        self._run_hooks(now, effects)
        if self._executor.promotion_failed is not None:
            why = f"promotion failed: {self._executor.promotion_failed}"
            self._cool_down(now)
            self._demote(Cause.PROMOTION_FAILED, why, now, effects)
            self._run_hooks(now, effects)
        if self._demoting and self._executor.settled:
            self._demoted(now, effects)
        elif self._demoting and self._executor.overdue(now):
            effects.append(Escalate(self._reason))
            self._turn(Turn.DEMOTION_FAILED)
            effects.append(Exit(ExitCode.DEMOTION_FAILED))
            return
        self._move_on(now, effects)
        if self._may_beat and now >= self._heartbeats.due_at:
            effects.append(self._heartbeats.send(now, self.timing.beat_s))

    def _begin_stop(self, now: float, effects: list[Effect]) -> None:
        """R5: demote, release, leave, exit; each step waits for the one before."""
        if self._stop is None or self._starting or self.phase in _ON_THE_WAY_OUT:
            return
        self._turn(Turn.STOP)
        if self._is_held:
            cause = STOPPED_BY.get(self._stop.code, Cause.STOPPING)
            self._demote(cause, self._stop.reason, now, effects)

    def _demoted(self, now: float, effects: list[Effect]) -> None:
        self._demoting = False
        self.sent_at = self.renew_by = float("-inf")
        self._heartbeats.due_at = now
        cools_down = self._cooldown.begin(now)
        held, self._holds = self._holds, False
        if self._starting:
            self._started(now, effects)
        elif held and self.tenure is not None and self.store_id is not None:
            self._release(self.tenure, self._reason, now, effects)
        elif cools_down and self.phase is Phase.MEMBER:
            # Not before it is known to have left: an overtaking DELETE would end the next tenure.
            self._cool_until = float("inf")
            self._leave(Turn.COOL_DOWN, effects)

    def _started(self, now: float, effects: list[Effect]) -> None:
        """The first demotion is done: the tenure of the previous process can be released."""
        self._starting = False
        former, self._former = self._former, None
        if former is not None:
            self._releases += 1
            effects.append(Release(former.epoch, FORMER_REASON, 0.0, former.instance))
        if self._stop is not None:
            self._turn(Turn.STOP)
        elif former is not None:
            self._turn(Turn.FORMER_TENURE)
            self._wait_by = now + self.timing.request_timeout_s
        else:
            self._turn(Turn.DEMOTED)
            self._join(effects)

    def _move_on(self, now: float, effects: list[Effect]) -> None:
        """What the phase waited for may have come."""
        refusal = self._refusal(now)
        if refusal is not None and self.role is Role.SECONDARY and not self._demoting:
            self._release_unused(refusal, now, effects)
        if self.phase is Phase.RETURNING and (not self._releases or now >= self._wait_by):
            self._turn(Turn.FORMER_RELEASED)
            self._join(effects)
        if self.phase is Phase.JOINING and now >= self._join_at:
            self._join(effects)
        if self.phase is Phase.COOLING and now >= self._cool_until:
            self._rejoin(Turn.COOLED_DOWN, effects)
        if self.phase is Phase.STOPPING and not self._demoting:
            self._turn(Turn.DEMOTED)
            self._wait_longer(now)
        if self.phase is Phase.RELEASING and now >= self._settled_by:
            self._leave(Turn.SETTLED, effects)
            self._wait_longer(now)
        if self.phase is Phase.LEAVING and (self._has_left or now >= self._wait_by):
            assert self._stop is not None  # noqa: S101 - ours: only a stop leads here
            self._turn(Turn.LEFT)
            effects.append(Exit(self._stop.code))

    @property
    def _settled_by(self) -> float:
        """When nothing that is under way can give this session the role any more."""
        return self._wait_by if self._releases else min(self._wait_by, self._answered_by)

    @property
    def _has_left(self) -> bool:
        return self._left and not self._releases

    def _wait_longer(self, now: float) -> None:
        self._wait_by = now + PATIENCE * self.timing.request_timeout_s

    def _note_tenure(self, epoch: int | None) -> None:
        """Remember a tenure that was given, until it is taken or released."""
        taken = self._holds and epoch == self.tenure
        if epoch is not None and self.store_id is not None and not taken:
            self._unused = epoch if epoch > self._given_up else None

    def _release_unused(self, reason: str, now: float, effects: list[Effect]) -> None:
        """Release what this session does not take: its holder would keep the role from all (R8)."""
        epoch, self._unused = self._unused, None
        if epoch is not None:
            self._release(epoch, reason, now, effects)

    def _release(self, epoch: int, reason: str, now: float, effects: list[Effect]) -> None:
        if self._releases and epoch == self._given_up:
            return  # under way
        self._given_up = max(self._given_up, epoch)
        self._releases += 1
        if self.phase in _ON_THE_WAY_OUT:
            self._wait_longer(now)
        stop_s = HELD_OFF_AT_STOP * self.timing.lease_s if self._stop is not None else 0.0
        hold_off_s = max(stop_s, self._cooldown.until - now)
        effects.append(Release(epoch, reason, hold_off_s))

    def _leave(self, turn: Turn, effects: list[Effect]) -> None:
        self._turn(turn)
        self._left = False
        self._heartbeats.forget()
        effects.append(Leave())

    def _turn(self, turn: Turn) -> None:
        self.phase, self._sentence = next_phase(self.phase, turn)
