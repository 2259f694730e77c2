"""The processes of one simulated host: hooks, what they leave behind, and the workload.

Owns which processes run, what a signal does to them, and whether the workload may be active. It is the
driver in small, as ``agent/daemon/role_runner.py`` does it: a terminated hook has ended when its
whole tree is gone, and what a tenure's promotion has left is killed after the demotion hook has succeeded,
before that is reported. A process that was killed may linger in the kernel: it does nothing any more, but
it is not gone.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from agent.core.effects import HookFacts
from agent.core.events import HookEnded
from agent.model import Role

from .defects import Defect

if TYPE_CHECKING:
    from .host import AgentHost

STARTERS = frozenset({"starter", "late", "escaped"})
"""Children that may start the workload: only the hook ``primary`` may have them at all."""

POLL_S = 0.005
"""Poll interval for killed processes."""


@dataclass
class HookNature:
    """How the hooks of one host behave: seconds, and an outcome that is drawn for each run.

    Attributes:
        outcomes: ok, fail, hang (heeds TERM), deaf (needs KILL), stuck (lingers in the kernel after that).
        children: what a promotion hook leaves behind it: none, helper (heeds TERM), deaf (does not),
            starter (on TERM it finishes its work by starting the workload), late (starts the workload
            after a while), escaped (the same, in a session of its own), stuck (deaf, and lingers).
        linger_s: how long what lingers does so.
    """

    seconds: float = 0.01
    outcomes: tuple[str, ...] = ("ok",)
    children: tuple[str, ...] = ("none",)
    linger_s: float = 0.5


@dataclass
class Child:
    """A process that a promotion hook has started and has not waited for."""

    nature: str
    role: Role = Role.PRIMARY
    """The role of its hook; children of ``pending_primary`` never start the workload."""
    running: bool = True
    killed: bool = False
    """It was killed, but may still be stuck in the kernel."""


@dataclass
class Hook:
    """One run of a hook: its first process and its descendants."""

    role: Role
    outcome: str
    running: bool = True
    led: bool = True
    """Its first process runs."""
    termed: bool = False
    killed: bool = False
    why: str = ""
    children: list[Child] = field(default_factory=list)


class Processes:
    """All processes of one host that the agent has started, by itself or through hooks.

    Args:
        host: whose they are.
        ended: takes the end of a run.
    """

    def __init__(self, host: "AgentHost", ended: Callable[[HookEnded], None]) -> None:
        self.host = host
        self.world = host.world
        self.ended = ended
        self.life = 0
        self.hooks: dict[int, Hook] = {}
        self.left: list[Child] = []
        """Descendants of this tenure's promotion hooks."""
        self.active = False
        """Whether the workload may run."""
        self.epoch: int | None = None
        self.program = {role: role for role in Role}
        """The hook that runs for a role; a wrong one after a planted reload."""

    @property
    def nature(self) -> HookNature:
        return self.host.nature

    def new_life(self) -> None:
        """Start with another agent, which knows of no run and receives no end of one."""
        self.life += 1
        for hook in self.hooks.values():
            if hook.led and hook.role is not Role.SECONDARY:
                self.left.append(Child("deaf", hook.role))  # it goes on without its agent
        self.hooks = {}

    def all_gone(self) -> None:
        """Remove every process: the host has died."""
        self.new_life()
        for child in list(self.left):
            self._gone(child)
        self.active = False

    @property
    def leftovers(self) -> list[Child]:
        """Processes of a promotion that may still act."""
        return [child for child in self.left if child.running and not child.killed]

    @property
    def may_be_active(self) -> bool:
        """Whether the workload runs, or a process that may start it."""
        return self.active or any(child.role is Role.PRIMARY for child in self.leftovers)

    # -- a run ----------------------------------------------------------------------------------

    def start(self, run: int, facts: HookFacts) -> None:
        """Start a hook; ``ended`` is called at its end."""
        if any(hook.running for hook in self.hooks.values()):
            self.world.broken(f"{self.host.name} runs two hooks")
        outcome = self.world.rng.choice(self.nature.outcomes)
        self.hooks[run] = hook = Hook(facts.role, outcome)
        if facts.role is not Role.SECONDARY:
            self._bear(hook)
        if facts.role is Role.PRIMARY:
            self.activate(facts.epoch)
        if outcome in {"ok", "fail"}:
            seconds = self.nature.seconds * (0.5 + self.world.rng.random())
            self.world.after(seconds, self._leader_ends, self.life, run, outcome)

    def activate(self, epoch: int | None) -> None:
        """The workload may run from now on."""
        self.active, self.epoch = True, epoch
        self.world.check_active()

    def _bear(self, hook: Hook) -> None:
        natures = self.nature.children
        nature = self.world.chance.choice(natures) if len(natures) > 1 else natures[0]
        if nature == "none" or (hook.role is not Role.PRIMARY and nature in STARTERS):
            return
        child = Child(nature, hook.role)
        hook.children.append(child)
        self.left.append(child)
        if nature in {"late", "escaped"}:
            self.world.after(self._work_s(), self._starts_workload, child)

    def _work_s(self) -> float:
        return self.world.lease_s * 2 * self.world.chance.random()

    def _starts_workload(self, child: Child) -> None:
        if not child.running or child.killed:
            return
        if self.host.frozen:
            self.world.after(0.01, self._starts_workload, child)
            return
        if not self.active:
            self.world.record(self.host.name, "a process of a hook starts the workload")
            self.activate(self.epoch)

    def _leader_ends(self, life: int, run: int, how: str) -> None:
        if life != self.life or not self.hooks[run].led:
            return
        if self.host.frozen:
            self.world.after(0.01, self._leader_ends, life, run, how)
            return
        hook = self.hooks[run]
        hook.led, hook.why = False, how
        if how == "ok" and hook.role is Role.SECONDARY:
            if self.program[Role.SECONDARY] is Role.SECONDARY:
                self.active = False
            else:
                self.activate(self.epoch)
            self.kill_leftovers()
        self._look(life, run)

    def _look(self, life: int, run: int) -> None:
        """Check whether a run has ended: with its first process, or with its last one after TERM."""
        if life != self.life or not self.hooks[run].running:
            return
        hook = self.hooks[run]
        if not self._over(hook):
            self.world.after(POLL_S, self._look, life, run)
            return
        hook.running = False
        if hook.role is Role.SECONDARY and hook.why == "ok":
            self.check_nothing_left()
        if hook.why != "ok":
            self.world.record(self.host.name, f"hook {hook.role} {hook.why}")
        self.ended(HookEnded(run, hook.why == "ok", hook.why))

    def _over(self, hook: Hook) -> bool:
        if hook.led:
            return False
        if Defect.RUN_ENDS_WITH_ITS_LEADER in self.world.defects:
            return True
        if hook.role is Role.SECONDARY:
            return hook.why != "ok" or not any(c.running and c.killed for c in self.left)
        return not (hook.termed and any(c.running for c in hook.children if self._is_seen(c)))

    def check_nothing_left(self) -> None:
        """Check that no process of the promotion runs after a completed demotion."""
        if self.active:
            self.world.broken(f"{self.host.name} has demoted, and its workload runs")
        if self.leftovers and not self.world.defects:
            natures = [child.nature for child in self.leftovers]
            self.world.broken(f"{self.host.name} has demoted, and a hook has left {natures}")

    # -- signals --------------------------------------------------------------------------------

    def term(self, run: int) -> None:
        """SIGTERM to a hook's process group."""
        hook = self.hooks[run]
        hook.termed = True
        if hook.outcome not in {"deaf", "stuck"}:
            self.world.after(0.001, self._leader_ends, self.life, run, "terminated")
        for child in hook.children:
            if child.nature == "helper":
                self._gone(child)
            elif child.nature == "starter" and child.running and not child.killed:
                self.world.after(self._work_s(), self._starts_workload, child)

    def kill(self, run: int) -> None:
        """SIGKILL to all processes of a hook."""
        hook = self.hooks[run]
        hook.termed = hook.killed = True
        linger_s = self.nature.linger_s if hook.outcome == "stuck" else 0.0001
        self.world.after(linger_s, self._leader_ends, self.life, run, "killed")
        for child in hook.children:
            self._kill_child(child)

    def kill_leftovers(self) -> None:
        """SIGKILL to all processes that the promotion of a tenure has left."""
        if Defect.RUN_ENDS_WITH_ITS_LEADER not in self.world.defects:
            for child in list(self.left):
                self._kill_child(child)

    def kill_all(self) -> None:
        """SIGKILL to all processes of the tenure, including the workload (R4, R12)."""
        for child in list(self.left):
            self._kill_child(child)
        for hook in self.hooks.values():
            hook.led = hook.running = False
        self.active = False

    def _kill_child(self, child: Child) -> None:
        if child.killed or not child.running:
            return
        if not self._is_seen(child):
            return
        child.killed = True
        if child.nature == "stuck":
            self.world.after(self.nature.linger_s, self._gone, child)
        else:
            self._gone(child)

    def _is_seen(self, child: Child) -> bool:
        return child.nature != "escaped" or Defect.KILLS_ONLY_GROUPS not in self.world.defects

    def _gone(self, child: Child) -> None:
        child.running = False
        if child in self.left:
            self.left.remove(child)
