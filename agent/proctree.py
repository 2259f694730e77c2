"""Find and end every process of a tenure, whoever its parent is by now.

A hook or a workload is a tree of processes: children may leave its process group (setsid), become
orphans, and go on after their parent has ended. A process belongs to a tenure if it

- is in one of its process groups or sessions,
- descends from one of its known processes,
- has the tenure's mark in its environment, which children inherit, or
- is in its cgroup.

``kill_all`` stops everything that it finds before it kills anything, so that nothing escapes by forking.
A process is identified by its number and its start time, since numbers are used again.

Rules of this file: the standard library's smallest modules only, for the guard loads it; nothing of ours.
Not promised: a process that has left the group, has lost its parent *and* has cleared its environment is
found only by the cgroup. Nothing that runs under another manager (systemd, a container engine, at, cron)
is a part of the tree. Reading an environment can block on a process that is stuck in the kernel:
``with_mark`` says so, everything else reads only what the kernel has at hand.
"""

import os
import signal
import time

PAUSE_S = 0.002
"""Between two looks at what is being stopped or killed."""

STOP_S = 0.25
"""How long it is waited for that what was found has stopped: what may not be signalled never does."""

QUIET_LOOKS = 3
"""Looks in a row that find nothing new: one can miss a process whose parent ends while it is made."""

MARK = "FAILOVER_TENURE"
"""The variable of the mark."""

ENDED = frozenset(b"ZXx")
AT_REST = frozenset(b"TtZXxDI")
"""States in which a process does not fork."""

PF_KTHREAD = 0x00200000
"""The flag of a kernel thread. Its parent says nothing: in a container process 2 can be anybody."""

Process = tuple[int, int]
"""Number and start time, in clock ticks since the boot."""


class Stat:
    """One process at one moment, as /proc/PID/stat has it."""

    __slots__ = ("flags", "group", "parent", "session", "start", "state")

    def __init__(  # noqa: PLR0917 - in the order of the file
        self, state: int, parent: int, group: int, session: int, flags: int, start: int
    ) -> None:
        self.state = state
        self.parent = parent
        self.group = group
        self.session = session
        self.flags = flags
        self.start = start


def read(pid: int) -> "Stat | None":
    """One process; None if it is not there."""
    try:
        fd = os.open(f"/proc/{pid}/stat", os.O_RDONLY)
    except OSError:
        return None
    try:
        line = os.read(fd, 1024)
    except OSError:
        return None
    finally:
        os.close(fd)
    words = line.rpartition(b") ")[2].split()
    if len(words) < 20:  # noqa: PLR2004 - it ended meanwhile
        return None
    return Stat(
        words[0][0], int(words[1]), int(words[2]), int(words[3]), int(words[6]), int(words[19])
    )


def snapshot() -> "dict[int, Stat]":
    """Every process that is there. It costs some ten microseconds for each."""
    table = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            stat = read(int(name))
            if stat is not None:
                table[int(name)] = stat
    return table


def identify(pid: int) -> "Process | None":
    """A process with its start time; None if it is not there."""
    stat = read(pid)
    return None if stat is None else (pid, stat.start)


def lives(process: Process) -> bool:
    """Whether it is there, the same one, and no zombie."""
    stat = read(process[0])
    return stat is not None and stat.start == process[1] and stat.state not in ENDED


def related(
    table: "dict[int, Stat]", groups: "list[int]", roots: "list[Process]"
) -> "set[Process]":
    """Live members of the process groups and sessions, and the roots with all that descend from them."""
    wanted = set(groups)
    inside = {pid for pid, stat in table.items() if stat.group in wanted or stat.session in wanted}
    inside |= {pid for pid, start in roots if pid in table and table[pid].start == start}
    children: dict[int, list[int]] = {}
    for pid, stat in table.items():
        children.setdefault(stat.parent, []).append(pid)
    todo = list(inside)
    while todo:
        for child in children.get(todo.pop(), ()):
            if child not in inside:
                inside.add(child)
                todo.append(child)
    return _killable(table, inside)


def with_mark(table: "dict[int, Stat]", mark: str) -> "set[Process]":
    """Live processes whose environment, as it was at their start, has the mark. May block.

    A mark that goes on with a full stop and more counts, too.
    """
    wanted = f"{MARK}={mark}".encode()
    found = {pid for pid in table if _has_mark(pid, wanted)}
    return _killable(table, found)


def in_cgroup(table: "dict[int, Stat]", directory: str) -> "set[Process]":
    """Live members of a cgroup and of those below it, by its directory. May block."""
    found: set[int] = set()
    for folder, _, _ in os.walk(directory):
        words = _contents(f"{folder}/cgroup.procs").split()
        found.update(int(word) for word in words if word.isdigit())
    return _killable(table, found)


def send(process: Process, number: int) -> bool:
    """Signal exactly this process; False if it is gone.

    Raises:
        PermissionError: it may not be signalled.
    """
    try:
        fd = os.pidfd_open(process[0])
    except OSError:
        return False
    try:
        stat = read(process[0])  # the descriptor holds the number: it cannot be a stranger's by now
        if stat is None or stat.start != process[1]:
            return False
        signal.pidfd_send_signal(fd, number)
    except ProcessLookupError:
        return False
    finally:
        os.close(fd)
    return True


def kill_all(find, end_at: float, clock=time.monotonic) -> "set[Process]":  # type: ignore[no-untyped-def]  # noqa: ANN001 - Callable would need typing
    """Stop all that ``find`` finds, until it finds nothing new; then kill them; until nothing is found.

    Args:
        find: returns a set of processes, each time anew.
        end_at: by ``clock``; how long to wait for their end.
        clock: seconds.

    Returns:
        Those that live on: they are stuck in the kernel, or may not be signalled.
    """
    while True:
        found = _stop_all(find, end_at, clock)
        for process in found:
            _try_to_send(process, signal.SIGKILL)
        while (left := {process for process in found if lives(process)}) and clock() < end_at:
            time.sleep(PAUSE_S)
        if left or not found:
            return left
        if clock() >= end_at:
            late: set[Process] = find()
            return late


def _stop_all(find, end_at: float, clock) -> "set[Process]":  # type: ignore[no-untyped-def]  # noqa: ANN001 - as above
    """Stop all that is found until several looks in a row find nothing new."""
    found: set[Process] = set()
    stop_by = clock() + STOP_S
    quiet = 0
    while quiet < QUIET_LOOKS:
        new = find() - found
        found |= new
        for process in new:
            _try_to_send(process, signal.SIGSTOP)
        waiting = clock() < stop_by and any(map(_moves, found))
        quiet = 0 if new or waiting else quiet + 1
        if clock() >= end_at:  # too late to be sure; what was found is killed at once
            break
        if not new:
            time.sleep(PAUSE_S)
    return found


def _moves(process: Process) -> bool:
    """Whether it may still fork."""
    stat = read(process[0])
    return stat is not None and stat.start == process[1] and stat.state not in AT_REST


def _try_to_send(process: Process, number: int) -> None:
    try:
        send(process, number)
    except OSError:
        pass  # it lives on, and is returned


def _killable(table: "dict[int, Stat]", pids: "set[int]") -> "set[Process]":
    """Those that live, without this process, its ancestors and the kernel's threads."""
    spared = {0, 1}
    pid = os.getpid()
    while pid not in spared:
        spared.add(pid)
        pid = table[pid].parent if pid in table else 0
    return {
        (pid, table[pid].start)
        for pid in pids - spared
        if pid in table and table[pid].state not in ENDED and not table[pid].flags & PF_KTHREAD
    }


def _has_mark(pid: int, wanted: bytes) -> bool:
    for entry in _contents(f"/proc/{pid}/environ").split(b"\0"):
        if entry == wanted or entry.startswith(wanted + b"."):
            return True
    return False


def _contents(path: str) -> bytes:
    try:
        fd = os.open(path, os.O_RDONLY)
    except OSError:
        return b""
    text = b""
    try:
        while part := os.read(fd, 65536):
            text += part
    except OSError:
        pass
    finally:
        os.close(fd)
    return text
