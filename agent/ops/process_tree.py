"""Find, signal and kill all processes of a tenure, or of one command, even those that left its process group.

``ProcessTree`` finds them by process group and session, descent, mark, cgroup, and adoption by this process
(agent/proctree.py). A process that was found once is followed by its identity, even if its parent ends.
Knows nothing of what the processes do, and of when they have to end.

All searches read /proc in a thread. Reading the environment of a process that is stuck in the kernel can block
for ever, so a second thread does that. If it blocks, it is abandoned, and that process is not read again; if the
process is an orphan that this process adopted, it counts as part of the tenure.

Not promised without a cgroup: to find a process that has left its group, has lost its parent between two
searches *and* has cleared its environment, once this process has died. What another manager starts (systemd,
a container engine, at, cron) is no part of the tree.
"""

import concurrent.futures
import errno
import os
import signal
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path

from agent import proctree
from agent.ops.blocking import BlockingThread, StuckError
from agent.ops.process import Child, own_pids
from agent.ops.reserve import run_in_thread

KILL_S = 2.0
"""How long to wait for the end of killed processes; only one that is stuck in the kernel takes longer."""

SEARCH_S = 2.0
"""Timeout of one search, which takes milliseconds, as the kernel has the data in memory."""

SEARCH_SHARE = 0.125
"""Share of the demotion budget after which a demotion does not wait for a search any more."""

READ_S = 0.25
"""If no environment was read for this long, the process that is being read counts as stuck."""

MOST_ROOTS = 256
"""The most ``roots`` and process groups that the guard receives; it finds further processes by the mark."""

MOST_SHOWN = 5
"""Processes that a message names."""

CGROUP_ROOT = Path("/sys/fs/cgroup")

MOST_READERS = 4
"""Once this many readers are abandoned, processes with a thread stuck in the kernel are not read at all."""

STUCK_CHECKS = 10
"""A thread counts as stuck if this many checks in a row find it in state D: ordinary disk access is short."""

_unreadable: set[proctree.Process] = set()
"""Processes whose environment has blocked its reader. Global, so that each costs one thread, not one for each
tree."""

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_ANY_MARK = f"{proctree.MARK}=".encode()


class ProcessTree:
    """All processes of one tenure, or of one command; each search finds them anew.

    Args:
        value: the value of the mark. A mark that continues with a full stop after it belongs to the tree, too.
        adopts: whether orphans that this process adopted belong to the tree if they have no mark at all.
        since: search environments only of processes that started at or after this moment, in clock ticks
            since the boot; by default now. Group, descent and cgroup find older ones, too.
        known: processes of the tree that an earlier search has found.

    Attributes:
        cgroup: the directory of their cgroup, if there is one.
    """

    def __init__(
        self,
        value: str,
        *,
        adopts: bool = False,
        since: int | None = None,
        known: Iterable[proctree.Process] = (),
    ) -> None:
        self.value = value
        self.cgroup: Path | None = None
        self._mark = f"{proctree.MARK}={value}".encode()
        self._since = _now() if since is None else since
        self._adopts_until = float("inf") if adopts else float("-inf")
        self._lock = threading.Lock()
        self._children: list[Child] = []
        self._known = self._tops = frozenset(known)
        self._own_groups: set[int] = set()
        self._others: dict[proctree.Process, bool] = {}
        """Other processes that were read: whether their environment has any mark."""

    def add(self, child: Child) -> None:
        """Add a command, and all that it starts, to the tree."""
        if child not in self._children:
            self._children.append(child)

    @property
    def groups(self) -> tuple[int, ...]:
        """Process groups of the commands that are not released, so their ids cannot be reused."""
        groups = (child.group for child in tuple(self._children))
        return tuple(group for group in groups if group is not None)

    @property
    def roots(self) -> tuple[proctree.Process, ...]:
        """Processes from which the others descend, as of the last search."""
        return tuple(sorted({*self._identities(), *self._tops})[:MOST_ROOTS])

    def stop_adopting(self) -> None:
        """Leave out orphans that are started from now on."""
        self._adopts_until = min(self._adopts_until, _now())

    def find(self) -> set[proctree.Process]:
        """Find all live processes. Takes milliseconds, so call it in a thread. Raises OSError."""
        try:
            with self._lock:
                return self._find()
        except MemoryError as error:
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)) from error

    def _find(self) -> set[proctree.Process]:
        table = proctree.snapshot()
        groups, roots = list(self.groups), {*self._identities(), *self._known}
        if self.cgroup is not None:
            roots |= proctree.in_cgroup(table, str(self.cgroup))
        # Known processes and their descendants need not have their environment read.
        self._known = frozenset(proctree.related(table, groups, list(roots)))
        found = proctree.related(table, groups, [*self._known, *self._by_environment(table)])
        pids = {pid for pid, _ in found}
        self._tops = frozenset(one for one in found if table[one[0]].parent not in pids)
        self._known = frozenset(found)
        known_groups = self._own_groups if len(self._own_groups) <= MOST_ROOTS else set()
        self._own_groups = proctree.own_groups(known_groups, table, found)
        return found

    async def find_in_thread(self, limit_s: float = SEARCH_S) -> set[proctree.Process]:
        """Find all live processes. Raises StuckError if the search does not end in time."""
        try:
            thread = BlockingThread(f"processes of {self.value}", vital=True)
            return await thread.run(self.find, timeout_s=limit_s)
        except OSError as error:  # a TimeoutError, too, which has no text
            why = str(error) or f"no result within {limit_s:g} s"
            raise StuckError(f"cannot list the processes of {self.value}: {why}") from error

    async def gone(self) -> bool:
        """Whether no process is alive. Also False if the search fails."""
        try:
            thread = BlockingThread(f"processes of {self.value}", vital=True)
            return not await thread.run(self._find_repeatedly)
        except (StuckError, OSError):
            return False

    def _find_repeatedly(self) -> set[proctree.Process]:
        """Search several times: one search can miss a process whose parent ends meanwhile."""
        for _ in range(proctree.QUIET_SEARCHES):
            if found := self.find():
                return found
            time.sleep(proctree.PAUSE_S)
        return set()

    async def signal(self, number: signal.Signals) -> None:
        """Signal the processes outside ``groups``; ``Child.signal`` signals those inside."""

        def send() -> None:
            for process in self.find():
                stat = proctree.read(process[0])
                if stat is not None and stat.group not in self.groups:
                    with suppress(OSError):
                        proctree.send(process, number)

        with suppress(StuckError, OSError):
            await BlockingThread(f"processes of {self.value}", vital=True).run(send)

    async def kill(self, limit_s: float = KILL_S) -> str | None:
        """Kill all processes; return None once none is alive, else the reason."""
        thread = BlockingThread(f"killing the processes of {self.value}", vital=True)
        try:
            left = await thread.run(lambda: self._kill(limit_s), timeout_s=limit_s + KILL_S)
        except (StuckError, OSError) as error:  # a TimeoutError is one
            why = str(error) or f"not within {limit_s:g} s"
            return f"cannot list the processes of {self.value}: {why}"
        if not left:
            return None
        shown = ", ".join(f"{pid} ({_state_of(pid)})" for pid, _ in sorted(left)[:MOST_SHOWN])
        return f"{len(left)} processes of {self.value} cannot be killed: {shown}"

    def _kill(self, limit_s: float) -> set[proctree.Process]:
        if self.cgroup is not None:
            path = self.cgroup / "cgroup.kill"
            with suppress(BlockingIOError):  # the processes are killed one by one below
                run_in_thread(partial(_write, path, "1"), vital=True)
        seen: set[proctree.Process] = set()

        def find() -> set[proctree.Process]:
            found = self.find()
            seen.update(found)
            return found

        left = proctree.kill_all(find, time.monotonic() + limit_s, groups=lambda: self._own_groups)
        _reap(seen)
        if self.cgroup is not None:
            for folder, _, _ in os.walk(self.cgroup, topdown=False):
                with suppress(OSError):  # not empty; it is created anew when needed
                    Path(folder).rmdir()
        return left

    def _identities(self) -> list[proctree.Process]:
        """Identities of the commands that are not released."""
        identities = (child.identity for child in tuple(self._children))
        return [identity for identity in identities if identity is not None]

    def _by_environment(self, table: dict[int, proctree.Stat]) -> set[proctree.Process]:
        """Find processes with the mark, and adopted orphans whose environment has none or is unreadable."""
        recent = {
            (pid, stat.start): stat
            for pid, stat in table.items()
            if stat.start >= self._since and stat.state not in proctree.ENDED
        }
        self._others = {one: marked for one, marked in list(self._others.items()) if one in recent}
        _unreadable.intersection_update([(pid, stat.start) for pid, stat in table.items()])
        all_found: set[proctree.Process] = set()
        # Skip each process that blocks its reader, until one reader has read all others.
        while True:
            skipped = _unreadable | (_stuck(recent) if len(_unreadable) >= MOST_READERS else set())
            reading: list[proctree.Process] = []
            found: list[proctree.Process] = []
            read = partial(self._read_environments, recent, skipped, reading, found)
            reader = run_in_thread(read, vital=True)
            count = -1
            while not reader.done() and count != len(reading):  # as long as it makes progress
                count = len(reading)
                concurrent.futures.wait([reader], READ_S)
            all_found |= set(found)
            if reader.done():
                reader.result()
                return all_found
            if reading:
                _unreadable.add(reading[-1])

    def _read_environments(
        self,
        recent: dict[proctree.Process, proctree.Stat],
        skipped: set[proctree.Process],
        reading: list[proctree.Process],
        found: list[proctree.Process],
    ) -> None:
        us, ours = os.getpid(), proctree.contents(os.getpid(), "cmdline")
        queue, wait = list(recent.items()), proctree.ExecWait()
        for process, stat in queue:
            if process in self._known:
                continue
            reading.append(process)
            marked = self._others.get(process)
            if marked is None and process in skipped:
                marked = False  # unknown, so an orphan counts as one of the tenure
            elif marked is None:
                variables = proctree.contents(stat.thread, "environ").split(b"\0")
                _unreadable.discard(process)
                if variables == [b""] and wait.is_needed(process, stat):
                    queue.append((process, stat))
                    continue
                if any(self._is_mark(variable) for variable in variables):
                    found.append(process)
                    continue
                command = proctree.contents(stat.thread, "cmdline")
                if command in {b"", ours}:
                    continue  # a child of ours before its exec, or during it
                marked = any(variable.startswith(_ANY_MARK) for variable in variables)
                self._others[process] = marked
            orphan = stat.parent == us and process[0] not in own_pids()
            if not marked and orphan and process[1] < self._adopts_until:
                found.append(process)

    def _is_mark(self, variable: bytes) -> bool:
        return variable == self._mark or variable.startswith(self._mark + b".")


def tenure_cgroup(member: str) -> Path | None:
    """Directory of the cgroup of an agent's tenures; those of hooks and workload are below it.

    None where none can be created. The next agent of this member finds it by the same mark.
    """
    own = own_cgroup()
    return None if own is None else own / f"failover-{member}"


def own_cgroup() -> Path | None:
    """Directory of our own cgroup (version 2) if one can be created below it, else None."""
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            number, _, path = line.split(":", 2)
            directory = CGROUP_ROOT / path.lstrip("/")
            writable = (directory / "cgroup.kill").exists() and os.access(directory, os.W_OK)
            if number == "0" and writable:
                return directory
    return None


def _stuck(processes: dict[proctree.Process, proctree.Stat]) -> set[proctree.Process]:
    """The processes with a thread that is stuck in the kernel, which may block a reader."""
    stuck = set(processes)
    for _ in range(STUCK_CHECKS):
        stuck = {process for process in stuck if proctree.has_stuck_thread(process[0])}
        time.sleep(proctree.PAUSE_S)
    return stuck


def _now() -> int:
    """The current moment in clock ticks, the unit of a process's start in /proc."""
    return int(time.clock_gettime(time.CLOCK_BOOTTIME) * _TICKS_PER_S)


def _reap(processes: set[proctree.Process]) -> None:
    """Reap the ended processes that this process adopted: a zombie still counts as a task."""
    us, own = os.getpid(), own_pids()
    for pid, start in processes:
        with suppress(OSError):
            stat = proctree.read(pid)
            if stat is not None and (stat.parent, stat.start) == (us, start) and pid not in own:
                os.waitpid(pid, os.WNOHANG)


def _state_of(pid: int) -> str:
    try:
        stat = proctree.read(pid)
    except OSError as error:
        return f"state unknown: {error.strerror}"
    return "gone" if stat is None else f"state {chr(stat.state)}"


def _write(path: Path, text: str) -> None:
    with suppress(OSError):
        path.write_text(text)
