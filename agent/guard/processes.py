"""The guard's processes: forked workers for calls that may block, and the process tree of a tenure."""

import os
import signal
import time

from agent import proctree

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

POLL_S = 0.01
"""Interval between two checks whether a process has ended."""

KILL_S = 0.1
"""The least time allowed to kill a process tree, which mostly takes milliseconds."""

FAULTS = (signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGSEGV)
IGNORED = tuple(
    signal.valid_signals()
    - {signal.SIGKILL, signal.SIGSTOP, signal.SIGCONT, signal.SIGCHLD}
    - {*FAULTS, signal.SIGSYS, signal.SIGTRAP}
)
"""Signals that the guard ignores, since it must not end before the agent."""


def now() -> float:
    """CLOCK_BOOTTIME, in seconds."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Worker:
    """A forked process for a call that may block.

    Args:
        work: called in the forked process; returns whether it succeeded.
        close_fds: descriptors that the forked process must not keep open.
    """

    def __init__(self, work: "Callable[[], bool]", close_fds: "list[int]") -> None:
        self.ok: bool | None = None
        self.pid = os.fork()
        if self.pid:
            return
        try:
            for fd in close_fds:
                os.close(fd)
            os._exit(0 if work() else 1)
        finally:
            os._exit(1)

    def wait(self, end_at: float) -> "bool | None":
        """Wait until the process ends; return whether it succeeded, or None if it runs at ``end_at``."""
        while self.ok is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.ok = status == 0
            elif now() >= end_at:
                break
            else:
                time.sleep(max(0.0, min(POLL_S, end_at - now())))
        return self.ok

    def wait_or_kill(self, end_at: float) -> bool:
        """Wait until the process ends, or kill it at ``end_at``; return whether it succeeded."""
        ok = self.wait(end_at)
        if ok is None:
            os.kill(self.pid, signal.SIGKILL)  # not reaped yet, so the number is still its own
            self.wait(now() + POLL_S)  # a zombie would count as a task
        return ok is True


def can_fork(
    become: "Callable[[], None]", close_fds: "list[int]", count: int, end_at: float
) -> bool:
    """Whether ``count`` processes can be forked now and exist at the same time.

    Also True if that is still unknown at ``end_at``, as on a busy machine.

    Args:
        become: switches to the user that will run the processes, as the limit may be the user's.
        close_fds: as for ``Worker``.
        count: number of processes, zombies included.
        end_at: when the answer is due.
    """
    give_up_at = (now() + end_at) / 2

    def work() -> bool:
        become()
        children: list[int] = []
        try:
            # The worker itself is one of them. It reaps its children, as nobody else could.
            while len(children) < count - 1 and now() < give_up_at:
                children.append(os.fork())
                if not children[-1]:
                    os._exit(0)
        except OSError:
            return False
        finally:
            for child in children:
                os.waitpid(child, 0)
        return True

    try:
        worker = Worker(work, close_fds)
    except OSError:
        return False
    if worker.wait(end_at) is None:
        worker.wait_or_kill(now())
        return True
    return worker.ok is True


class ProcessTree:
    """The processes of a tenure.

    Args:
        roots: processes whose descendants belong to the tenure. Grows with each search, so that
            children are found after their parents have ended.
        groups: process groups and sessions, by the process id of their leader.
        mark: value of FAILOVER_TENURE in their environment, or empty.
        cgroup: directory of their cgroup, or empty.
    """

    def __init__(
        self,
        roots: "set[proctree.Process]",
        groups: "set[int]",
        mark: bytes = b"",
        cgroup: bytes = b"",
    ) -> None:
        self.roots = roots
        self.groups = groups
        self.own_groups: set[int] = set()
        self.mark = os.fsdecode(mark)
        self.cgroup = os.fsdecode(cgroup)

    def subtree(self, groups: "list[int]") -> "ProcessTree":
        """The part of this tree that is in these process groups, as a tree of its own."""
        return ProcessTree({root for root in self.roots if root[0] in groups}, set(groups))

    def find(self, *, may_block: bool = False, skip_stuck: bool = False) -> "set[proctree.Process]":
        """Find the live processes of the tenure.

        Args:
            may_block: whether to search by mark and cgroup, too. Use it in a ``Worker`` only.
            skip_stuck: do not read the mark of processes with a thread stuck in the kernel, which may block.
        """
        searchable = may_block and (self.mark or self.cgroup)
        if not self.roots and not self.groups and not searchable:
            return set()
        table = proctree.snapshot()
        known = {pid for pid, _ in self.roots if pid in table}
        # The id of an ended group leader may have been reused for an unrelated group.
        reused = {pid for pid in known if (pid, table[pid].start) not in self.roots}
        if may_block and self.mark:
            stuck = set(filter(proctree.has_stuck_thread, table)) if skip_stuck else set()
            readable = {pid: stat for pid, stat in table.items() if pid not in stuck}
            self.roots |= proctree.with_mark(readable, self.mark)
        if may_block and self.cgroup:
            self.roots |= proctree.in_cgroup(table, self.cgroup)
        found = proctree.related(table, list(self.groups - reused), list(self.roots))
        self.roots |= found
        self.own_groups = proctree.own_groups(self.own_groups, table, found)
        return found

    def kill(self, end_at: float, *, may_block: bool = False, skip_stuck: bool = False) -> bool:
        """Kill all processes; return whether none is left at ``end_at``, or ``KILL_S`` after the call.

        If the processes cannot be listed, send SIGKILL to their process groups and raise OSError.
        """

        def find() -> "set[proctree.Process]":
            return self.find(may_block=may_block, skip_stuck=skip_stuck)

        end_at = max(end_at, now() + KILL_S)
        try:
            return not proctree.kill_all(find, end_at, now, lambda: self.own_groups)
        except Exception:
            proctree.signal_groups(self.groups, signal.SIGKILL)
            raise
