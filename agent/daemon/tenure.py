"""One tenure on this host: its promotion hooks, the demotion with which it began, and all its processes.

Owns what has to be ended before the role can be given back: everything that a promotion of this tenure has
started, wherever it has gone (ops/process_tree.py). The demotion hook is the one that was configured when the first
promotion started: a reload changes later tenures only. Knows nothing of when a demotion is due.
"""

from contextlib import suppress
from pathlib import Path

from agent import proctree
from agent.drivers.hooks import HookRun, HookSpec
from agent.ops.blocking import StuckError
from agent.ops.logs import Log
from agent.ops.process_tree import KILL_S, ProcessTree

log = Log(__name__)


class Tenure:
    """What one tenure has started.

    Args:
        cookie: marks its processes.
        demotion: the hook by which it ends, or None.
        cgroup: the directory for a cgroup of its promotion hooks, or None.
    """

    def __init__(self, cookie: str, demotion: HookSpec | None, cgroup: Path | None) -> None:
        self.demotion = demotion
        self.cgroup = cgroup
        self._hooks: list[HookRun] = []
        self._tree = ProcessTree(cookie, adopts=True)
        self._tree.cgroup = cgroup

    def add(self, hook: HookRun) -> None:
        """Count a promotion hook to it, with all that it starts. Repeat it after each of its steps."""
        if hook not in self._hooks:
            self._hooks.append(hook)
        for child in hook.children:
            self._tree.add(child)

    @property
    def groups(self) -> tuple[int, ...]:
        """Process groups of its promotion hooks, in which something may live."""
        return tuple(pgid for hook in self._hooks for pgid in hook.pgids)

    @property
    def roots(self) -> tuple[proctree.Process, ...]:
        """Processes from which its processes descend, as far as known from the last look."""
        return self._tree.roots

    async def look(self) -> None:
        """Learn which processes there are, before their parents end."""
        with suppress(StuckError):
            await self._tree.find_in_thread()

    def begin_demotion(self) -> None:
        """Leave alone what is started from now on without a mark: it is the demotion hook's."""
        self._tree.stop_adopting()

    def kill_groups(self) -> None:
        """SIGKILL to what its promotion hooks have in their process groups. Does not wait."""
        for hook in self._hooks:
            hook.kill()

    async def kill(self, limit_s: float = KILL_S) -> str | None:
        """Kill all of it; None once nothing lives, else why something does."""
        return await self._tree.kill(limit_s)


async def kill_rest(*trees: Tenure | ProcessTree | None, limit_s: float) -> str | None:
    """Kill what is left of tenures; None once nothing lives, else why something does."""
    for tree in trees:
        if tree is not None:
            left = await tree.kill(min(KILL_S, limit_s))
            if left is not None:
                log.error("processes outlived the demotion", reason=left)
                return left
    return None


def note_limits(cgroup: Path | None) -> None:
    """Say at the start what a demotion on this host cannot find (docs/hooks.md)."""
    if cgroup is None:
        log.info(
            "processes are followed without a cgroup",
            limit="one that leaves its process group and its parent and clears its environment is not"
            " found once the agent has died",
            resolution="give the agent a cgroup of version 2 that it can write to (Delegate=yes)",
        )
