"""Follow all processes that one purpose has started, wherever they have gone, and end them.

``Tree`` finds them by process group and session, descent, mark, cgroup, and adoption by this process
(agent/proctree.py). One that was seen once is followed by its identity: it is not lost when its parent ends.
Knows nothing of what runs, and of when it is to end.

Everything here reads /proc in a thread. To read the environment of a process that is stuck in the kernel
can block for ever: that is done in yet another thread, which is abandoned then, and that process is not
asked again.

Not promised, unless there is a cgroup: that a process is found which has left its group, has lost its parent
between two looks *and* has cleared its environment, once this process has died. Whatever another manager
starts on request (systemd, a container engine, at, cron) is no part of a tree.
"""

import os
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path

from agent import proctree
from agent.ops.blocking import Lane, StuckError
from agent.ops.process import Child, own_pids

KILL_S = 2.0
"""How long the end of killed processes is waited for; only the kernel can hold one up for longer."""

LOOK_S = 2.0
"""How long one look may take: it reads what the kernel has at hand, and takes milliseconds."""

READ_S = 0.25
"""How long the reading of environments may take before the one that is being read counts as stuck."""

MOST_ROOTS = 256
"""Of the processes that others are told of; they know the mark as well."""

SHOWN = 5
"""Processes that a message names."""

CGROUP_ROOT = Path("/sys/fs/cgroup")

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_ANY_MARK = f"{proctree.MARK}=".encode()


class Tree:
    """All processes of one tenure, or of one command: found anew at each look.

    Args:
        value: of their mark. Commands whose mark begins with it and a full stop belong to it, too.
        adopts: orphans that came to this process, and have no mark at all, belong to it.
        since: when the first of it was started, in clock ticks since the boot; processes that are older
            are found by group, descent and cgroup only. Not given: now.

    Attributes:
        cgroup: the directory of their cgroup, if there is one.
    """

    def __init__(self, value: str, *, adopts: bool = False, since: int | None = None) -> None:
        self.value = value
        self.cgroup: Path | None = None
        self._mark = f"{proctree.MARK}={value}".encode()
        self._since = _now() if since is None else since
        self._adopts_until = float("inf") if adopts else float("-inf")
        self._lock = threading.Lock()
        self._children: list[Child] = []
        self._known: frozenset[proctree.Process] = frozenset()
        self._tops: frozenset[proctree.Process] = frozenset()
        self._others: dict[proctree.Process, bool] = {}
        """What was read of other environments: whether there is a mark."""
        self._unreadable: set[proctree.Process] = set()

    def add(self, child: Child) -> None:
        """Count a command, and all that it starts, to the tree."""
        if child not in self._children:
            self._children.append(child)

    @property
    def empty(self) -> bool:
        """Whether no command was ever counted to it."""
        return not self._children

    @property
    def groups(self) -> tuple[int, ...]:
        """Process groups of its commands, which cannot be a stranger's yet."""
        return tuple(identity[0] for identity in self._identities())

    @property
    def roots(self) -> tuple[proctree.Process, ...]:
        """Processes from which all of it descends, as far as known from the last look."""
        return tuple(sorted({*self._identities(), *self._tops})[:MOST_ROOTS])

    def adopt_no_more(self) -> None:
        """Leave orphans alone that are started from now on."""
        self._adopts_until = min(self._adopts_until, _now())

    def find(self) -> set[proctree.Process]:
        """Every process of it that lives. Takes milliseconds: for a thread."""
        with self._lock:
            return self._find()

    def _find(self) -> set[proctree.Process]:
        table = proctree.snapshot()
        roots = {*self._identities(), *self._known, *self._by_environment(table)}
        if self.cgroup is not None:
            roots |= proctree.in_cgroup(table, str(self.cgroup))
        found = proctree.related(table, list(self.groups), list(roots))
        pids = {pid for pid, _ in found}
        self._tops = frozenset(one for one in found if table[one[0]].parent not in pids)
        self._known = frozenset(found)
        return found

    async def look(self) -> set[proctree.Process]:
        """Every process of it that lives. Raises StuckError if that cannot be found out in time."""
        try:
            return await Lane(f"processes of {self.value}").run(self.find, timeout_s=LOOK_S)
        except OSError as error:  # a TimeoutError is one
            raise StuckError(
                f"the processes of {self.value} cannot be looked at: {error}"
            ) from error

    async def gone(self) -> bool:
        """Whether nothing of it lives. False, too, if that cannot be found out now."""
        try:
            return not await Lane(f"processes of {self.value}").run(self._find_repeatedly)
        except (StuckError, OSError):
            return False

    def _find_repeatedly(self) -> set[proctree.Process]:
        """One look can miss a process whose parent ends while it is made."""
        for _ in range(proctree.QUIET_LOOKS):
            if found := self.find():
                return found
            time.sleep(proctree.PAUSE_S)
        return set()

    async def signal(self, number: signal.Signals) -> None:
        """Signal its processes outside of its groups; ``Child.signal`` signals those inside."""

        def send() -> None:
            for process in self.find():
                stat = proctree.read(process[0])
                if stat is not None and stat.group not in self.groups:
                    with suppress(OSError):
                        proctree.send(process, number)

        with suppress(StuckError, OSError):
            await Lane(f"processes of {self.value}").run(send)

    async def kill(self, limit_s: float = KILL_S) -> str | None:
        """Kill every process of it; None once nothing lives, else why something does."""
        lane = Lane(f"killing the processes of {self.value}")
        try:
            left = await lane.run(lambda: self._kill(limit_s), timeout_s=limit_s + KILL_S)
        except (StuckError, OSError):  # a TimeoutError is one
            return f"the processes of {self.value} cannot be looked at within {limit_s:g} s"
        if not left:
            return None
        shown = ", ".join(f"{pid} ({_state_of(pid)})" for pid, _ in sorted(left)[:SHOWN])
        return f"{len(left)} processes of {self.value} cannot be killed: {shown}"

    def _kill(self, limit_s: float) -> set[proctree.Process]:
        if self.cgroup is not None:
            path = self.cgroup / "cgroup.kill"
            threading.Thread(target=_write, args=(path, "1"), daemon=True).start()
        left = proctree.kill_all(self.find, time.monotonic() + limit_s)
        if self.cgroup is not None:
            for folder, _, _ in os.walk(self.cgroup, topdown=False):
                with suppress(OSError):  # not empty; the next command that needs it makes it anew
                    Path(folder).rmdir()
        return left

    def _identities(self) -> list[proctree.Process]:
        """Of the commands whose process ids are still their own."""
        identities = (child.identity for child in tuple(self._children))
        return [identity for identity in identities if identity is not None]

    def _by_environment(self, table: dict[int, proctree.Stat]) -> set[proctree.Process]:
        """Processes that have the mark, and adopted orphans without any."""
        recent = {
            (pid, stat.start): stat.parent
            for pid, stat in table.items()
            if stat.start >= self._since and stat.state not in proctree.ENDED
        }
        self._others = {one: marked for one, marked in list(self._others.items()) if one in recent}
        all_found: set[proctree.Process] = set()
        while (
            True
        ):  # past each process that blocks its reader, until one reader has seen all others
            reading: list[proctree.Process] = []
            found: list[proctree.Process] = []
            reader = threading.Thread(
                target=self._read_environments, args=(recent, reading, found), daemon=True
            )
            reader.start()
            count = -1
            while reader.is_alive() and count != len(
                reading
            ):  # it gets on, however busy the host is
                count = len(reading)
                reader.join(READ_S)
            all_found |= set(found)
            if not reader.is_alive():
                return all_found
            if reading:
                self._unreadable.add(reading[-1])

    def _read_environments(
        self,
        recent: dict[proctree.Process, int],
        reading: list[proctree.Process],
        found: list[proctree.Process],
    ) -> None:
        us, ours = os.getpid(), _contents(os.getpid(), "cmdline")
        for process, parent in recent.items():
            if process in self._known or process in self._unreadable:
                continue
            reading.append(process)
            marked = self._others.get(process)
            if marked is None:
                variables = _contents(process[0], "environ").split(b"\0")
                self._unreadable.discard(process)
                if any(self._is_mark(variable) for variable in variables):
                    found.append(process)
                    continue
                command = _contents(process[0], "cmdline")
                if command in {b"", ours}:
                    continue  # a child of ours that is not executed yet, or one that is just executed
                marked = any(variable.startswith(_ANY_MARK) for variable in variables)
                self._others[process] = marked
            orphan = parent == us and process[0] not in own_pids()
            if not marked and orphan and process[1] < self._adopts_until:
                found.append(process)

    def _is_mark(self, variable: bytes) -> bool:
        return variable == self._mark or variable.startswith(self._mark + b".")


def tenure_cgroup(instance: str) -> Path | None:
    """The directory for the cgroup of an agent's tenures, below which hooks and workload have theirs.

    None where none can be made. An agent that comes later on this host finds it by the same instance.
    """
    own = own_cgroup()
    return None if own is None else own / f"failover-{instance}"


def own_cgroup() -> Path | None:
    """The directory of our own cgroup (version 2) if one can be made below it, else None."""
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            number, _, path = line.split(":", 2)
            directory = CGROUP_ROOT / path.lstrip("/")
            writable = (directory / "cgroup.kill").exists() and os.access(directory, os.W_OK)
            if number == "0" and writable:
                return directory
    return None


def _now() -> int:
    """This moment as /proc has the start of a process."""
    return int(time.clock_gettime(time.CLOCK_BOOTTIME) * _TICKS_PER_S)


def _state_of(pid: int) -> str:
    stat = proctree.read(pid)
    return "gone" if stat is None else f"state {chr(stat.state)}"


def _contents(pid: int, name: str) -> bytes:
    with suppress(OSError):
        return Path("/proc", str(pid), name).read_bytes()
    return b""


def _write(path: Path, text: str) -> None:
    with suppress(OSError):
        path.write_text(text)
