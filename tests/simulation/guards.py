"""The guard of a simulated host (R12): a process beside the agent, which can hang, die and linger.

Owns the deadline that it received last, and what it does when that passes or the agent dies. Decides no
deadline: ``Session.guard_deadlines`` does.
"""

from typing import TYPE_CHECKING

from agent.core.group_state import ReleaseRole

from .defects import Defect

if TYPE_CHECKING:
    from .host import AgentHost

ANSWER_S = 0.5
RESTART_S = 1.0
"""As in drivers/guardian."""

RETRY_S = 0.01


class Guard:
    """The guard of one host, over all its processes."""

    def __init__(self, host: "AgentHost") -> None:
        self.host = host
        self.world = host.world
        self.enabled = True
        self.due: tuple[float, float] | None = None
        self.up = True
        """It runs, and was not killed."""
        self.hung = False
        """It is frozen in the kernel; a kill takes effect later."""
        self.acts = False
        self.number = 0
        self.started_at = 0.0
        self.hangs = 0
        self.late_s: float | None = None
        """How long its helper takes to release the role; random if None."""

    @property
    def able(self) -> bool:
        """Whether it can act."""
        return self.enabled and self.up and not self.hung

    @property
    def claims(self) -> bool:
        """Whether it holds the lock that another agent of this session needs."""
        return self.acts or (self.hung and not self.up)

    # -- the agent's calls ------------------------------------------------------------

    def begin(self) -> None:
        """Start the guard of a new agent."""
        self.due, self.up, self.hung = None, True, False
        self.number += 1
        self.started_at = self.world.now

    def arm(self, due: tuple[float, float] | None) -> None:
        """Send it the newest deadline; a frozen guard reads it when it continues."""
        if not (self.enabled and self.up):
            due = None
        if due != self.due:
            self.due = due
            if due is not None:
                delay_s = max(0.0, self.host.clock.true(min(due)) - self.world.now)
                self.world.after(delay_s + 1e-6, self._passed, self.number, due)

    # -- faults ---------------------------------------------------------------------------------

    def hang(self, seconds: float) -> None:
        """Freeze it in the kernel for a while; a kill takes effect only after that."""
        if not self.able or self.acts or not self.host.up:
            return
        self.world.record(self.host.name, "its guard hangs")
        self.hung = True
        self.hangs += 1
        self.world.after(seconds, self._goes_on, self.hangs)
        limit_s = max(ANSWER_S, self.world.timing.margin_s)
        self.world.after(limit_s, self._unanswered, self.number, self.hangs)

    def kill(self) -> None:
        """Kill it; its agent notices the closed connection."""
        if self.able and not self.acts and self.host.up:
            self.world.record(self.host.name, "its guard is killed")
            self._lost(self.number)

    def go_on(self) -> None:
        """End the freeze."""
        self._goes_on(self.hangs)

    def _goes_on(self, hangs: int) -> None:
        if self.hung and hangs == self.hangs:
            self.hung = False
            if not self.host.up and self.up and self.due is not None:
                self.agent_died()  # the agent's end can be read now

    def _unanswered(self, number: int, hangs: int) -> None:
        if not (self.hung and (number, hangs) == (self.number, self.hangs) and self.host.up):
            return
        if not self.host.works:
            self.world.after(RETRY_S, self._unanswered, number, hangs)
            return
        if Defect.WAITS_FOR_THE_KILLED_GUARD in self.world.defects:
            self.up, self.due = False, None
            self._wait_for_end(self.host.life)
        else:
            self._lost(number)

    def _wait_for_end(self, life: int) -> None:
        """The planted wait in the loop: it does not iterate, and no guard is armed."""
        if life != self.host.life or not self.host.up:
            return
        if not self.host.blocked:
            self.host.block()
        if self.hung:
            self.world.after(RETRY_S, self._wait_for_end, life)
        else:
            self.host.unblock()
            self._lost(self.number)

    def _lost(self, number: int) -> None:
        """Its agent notices, kills it, and starts another one."""
        self.up, self.due = False, None
        if not self.host.works:  # two faults at once
            self.host.orphaned = self.host.runs.active
        self.host.mark("guard", "the guard has ended")
        wait_s = max(RETRY_S, self.started_at + RESTART_S - self.world.now)
        self.world.after(wait_s, self._again, number, self.host.life)

    def _again(self, number: int, life: int) -> None:
        if (number, life) != (self.number, self.host.life) or not self.host.up:
            return
        if not self.host.works:
            self.world.after(RETRY_S, self._again, number, life)
            return
        self.begin()
        self.hangs += 1
        self.host.mark("guard", None)
        self.host.arm_guard()

    # -- its actions ---------------------------------------------------------------------------

    def _passed(self, number: int, due: tuple[float, float]) -> None:
        """A deadline has passed without a newer one from the agent."""
        host = self.host
        if number != self.number or due != self.due or not host.up:
            return
        if host.frozen:
            self.world.after(RETRY_S, self._passed, number, due)
            return
        if self.hung:
            host.orphaned = True  # two faults at once
            self.world.after(RETRY_S, self._passed, number, due)
            return
        self.world.record(host.name, "the guard acts")
        host.die()

    def agent_died(self) -> None:
        """The connection is closed: act if a deadline is set."""
        due = self.due
        if not self.enabled:
            return
        if not self.able:  # two faults at once
            self.host.orphaned = self.host.runs.active
            return
        if due is None:
            return
        self.due = None
        self.acts = True
        nature = self.host.nature
        left_s = max(0.0, self.host.clock.true(due[1]) - self.world.now)
        seconds = left_s
        ok = self.world.rng.choice(nature.outcomes) == "ok"
        if ok:
            hook_s = nature.seconds * (0.5 + self.world.rng.random())
            seconds, ok = min(left_s, hook_s), hook_s <= left_s
        release = self.host.tenure if ok or Defect.RELEASES_UNDONE in self.world.defects else None
        if Defect.RELEASES_UNDONE in self.world.defects:
            self._release_later(release)
            release = None
        self.world.after(seconds, self._done, release)

    def _done(self, release: tuple[int, str] | None) -> None:
        if self.host.frozen:
            self.world.after(RETRY_S, self._done, release)
            return
        self.acts = False
        self.host.orphaned = self.host.state_file.owes_demotion = False
        self.host.runs.kill_all()
        self.world.record(self.host.name, "the guard has demoted")
        self.host.runs.check_nothing_left()
        if release is not None:
            self._release_later(release)

    def _release_later(self, release: tuple[int, str] | None) -> None:
        """A helper releases the role: once, at a random time, and nobody waits for it."""
        if release is not None and not self.world.plain_v1:
            late_s = self.late_s
            if late_s is None:
                late_s = self.world.lease_s * 2 * self.world.chance.random() ** 2
            self.world.after(late_s, self._release, *release)

    def _release(self, epoch: int, instance: str) -> None:
        host = self.host
        what = ReleaseRole(host.session_id, epoch, instance=instance, why="demoted by the guard")
        if Defect.RELEASES_AS_ANYBODY in self.world.defects:
            what = host.anybodys_release(what)
        coordinator = host.coordinator
        args = (what, lambda _: None)
        self.world.send(host.net, back=False, deliver=coordinator.submit, args=args)
