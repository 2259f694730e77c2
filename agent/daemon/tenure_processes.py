"""The processes of one tenure on this host, and its demotion hook.

Owns what has to end before the role can be released: every process that a promotion of this tenure has
started (ops/process_tree.py). The demotion hook is the one that was configured when the first promotion started, with
the scripts that its directory had then: a change affects later tenures only. Knows nothing of when a demotion is due.
"""

import hashlib
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from agent import proctree
from agent.drivers.hooks.runner import HookRun
from agent.drivers.hooks.spec import HookSpec
from agent.errors import ConfigError, ExitCode, FailoverError
from agent.ops.blocking import BlockingThread, StuckError
from agent.ops.logs import Log
from agent.ops.process_tree import KILL_S, SEARCH_S, ProcessTree, tenure_cgroup

CHECK_S = 1.0
"""Timeout for checking the demotion hook before a promotion, which usually takes a millisecond."""

log = Log(__name__)


class TenureProcesses:
    """The processes of one tenure.

    Args:
        process_mark: the mark of its processes.
        demotion_hook: the hook that ends it, or None.
        cgroup: the directory for the cgroup of its promotion hooks, or None.
    """

    def __init__(
        self, process_mark: str, demotion_hook: HookSpec | None, cgroup: Path | None
    ) -> None:
        self.demotion_hook = demotion_hook
        self.cgroup = cgroup
        self._hooks: list[HookRun] = []
        self._tree = ProcessTree(process_mark, adopts=True)
        self._tree.cgroup = cgroup

    def add(self, hook: HookRun) -> None:
        """Add a promotion hook with its processes. Repeat this after each step of the hook."""
        if hook not in self._hooks:
            self._hooks.append(hook)
        for child in hook.children:
            self._tree.add(child)

    @property
    def groups(self) -> tuple[int, ...]:
        """Process groups of its promotion hooks, in which processes may be alive."""
        return tuple(pgid for hook in self._hooks for pgid in hook.pgids)

    @property
    def roots(self) -> tuple[proctree.Process, ...]:
        """The roots of its process trees, as last tracked."""
        return self._tree.roots

    async def track_processes(self, limit_s: float = SEARCH_S) -> bool:
        """Record which processes there are, before their parents end; return whether there are none."""
        with suppress(StuckError):
            return not await self._tree.find_in_thread(limit_s)
        return False

    async def prepare_demotion_hook(self) -> str | None:
        """Fix the scripts of the demotion hook. Return why it could not be run, or None; if so, start nothing."""
        if (hook := self.demotion_hook) is None:
            return None
        try:
            thread = BlockingThread("demotion hook")
            self.demotion_hook = await thread.run(hook.with_scripts, timeout_s=CHECK_S)
        except (ConfigError, StuckError, OSError) as error:
            return str(error) or f"the demotion hook was not read within {CHECK_S:g} s"
        return None

    def stop_adopting(self) -> None:
        """Do not add unmarked processes from now on: they belong to the demotion hook."""
        self._tree.stop_adopting()

    def kill_groups(self) -> None:
        """Send SIGKILL to the process groups of its promotion hooks. Does not wait."""
        for hook in self._hooks:
            hook.kill()

    async def kill(self, limit_s: float = KILL_S) -> str | None:
        """Kill all its processes; return None once all are gone, else the reason why some are not."""
        return await self._tree.kill(limit_s)


class PreviousProcesses:
    """The processes of tenures of previous agents of this member, which are found even if its state file was lost.

    Args:
        member: what identifies it on this host: group, session and state file.

    Attributes:
        mark: of this member. The marks of all its agents begin with it and a full stop.
        trees: the processes, by mark; none once a demotion has succeeded.
    """

    def __init__(self, *member: str) -> None:
        self.mark = hashlib.sha256(os.fsencode("\0".join(member))).hexdigest()[:16]
        self.trees: dict[str, ProcessTree] = {}

    @property
    def marks(self) -> tuple[str, ...]:
        """This member's mark, and those of previous agents whose processes have not been ended yet."""
        return tuple(sorted({self.mark, *self.trees}))

    @property
    def roots(self) -> tuple[proctree.Process, ...]:
        """The processes from which the others descend, as of the last search."""
        return tuple({root for tree in self.trees.values() for root in tree.roots})

    def follow(self, marks: Iterable[str] = (), known: Iterable[proctree.Process] = ()) -> None:
        """Find all of these processes from now on.

        Args:
            marks: of previous agents: another name of the same state file makes another mark.
            known: processes that have no mark, such as a hook whose exec hangs.
        """
        for mark in {self.mark, *marks}:
            self.trees[mark] = ProcessTree(mark, since=0, known=known)
            self.trees[mark].cgroup = tenure_cgroup(mark)

    def forget(self) -> None:
        """Forget all processes: they are gone."""
        self.trees = {}

    async def kill(self, limit_s: float = KILL_S) -> str | None:
        """Kill all of these processes; return None once all are gone, else the reason why some are not."""
        reasons = [await tree.kill(limit_s) for tree in self.trees.values()]
        left = "; ".join(filter(None, reasons)) or None
        if left is not None:
            log.error("processes of a previous run are still alive", reason=left)
        return left


async def kill_remaining(
    *trees: TenureProcesses | PreviousProcesses | None, limit_s: float
) -> str | None:
    """Kill the remaining processes of tenures; return None once all are gone, else why some are not."""
    for tree in (one for one in trees if one is not None):
        if (left := await tree.kill(min(KILL_S, limit_s))) is not None:
            log.error("processes outlived the demotion", reason=left)
            return left
    return None


async def check_visibility() -> FailoverError | None:
    """Check that this process can see the processes that it may have to end; return the error if not."""
    try:
        await BlockingThread("processes").run(proctree.snapshot, timeout_s=SEARCH_S)
    except (StuckError, OSError) as error:
        return ConfigError(
            f"the processes of a tenure could not be found, so a demotion could not end them: {error}",
            exit_code=ExitCode.DEMOTION_FAILED,
        )
    return None


def log_tracking_limits(cgroup: Path | None) -> None:
    """Log at the start which processes a demotion on this host cannot find (docs/hooks.md)."""
    if cgroup is None:
        log.info(
            "processes are followed without a cgroup",
            limit="one that leaves its process group and its parent and clears its environment is not"
            " found once the agent has died",
            resolution="give the agent a cgroup of version 2 that it can write to (Delegate=yes)",
        )
