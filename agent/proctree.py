"""Find and kill every process of a tenure, even one whose parent has changed.

A hook or a workload is a tree of processes: children may leave its process group (setsid), become
orphans, and outlive their parent. A process belongs to a tenure if it

- is in one of its process groups or sessions,
- descends from one of its known processes,
- has the tenure's mark in its environment, which children inherit, or
- is in its cgroup.

``kill_all`` stops every process before it kills any, so that none escapes by forking. It stops whole process
groups first: a process that keeps forking and exiting has a new id by the time it is signalled, but stays in
its group. A process is identified by its process id and start time, since process ids are reused.

The guard imports this file, so it imports only the smallest modules of the standard library.

A process that cannot be read never counts as gone: every search raises OSError if no descriptor is left, or if
/proc does not show all processes. /proc is opened once, so that nobody can mount something over it later.

Not promised: a process that has left the group, has lost its parent *and* has cleared its environment is
found only by the cgroup. Processes that another manager starts (systemd, a container engine, at, cron) are not
part of the tree. ``with_mark`` and ``in_cgroup`` may block; the rest reads only what the kernel has in memory.
"""

import errno
import os
import signal
import time

PAUSE_S = 0.002
"""Interval between two searches."""

STOP_S = 0.25
"""How long to wait until all processes have stopped; one that this process may not signal never stops."""

EXEC_S = 0.1
"""How long a search keeps reading processes that have neither environment nor command line, since an exec may be under
way. Bounded, because anybody can create processes that never have either."""

LEAST_LOOKS = 5
"""The least number of times that a search reads such a process, however long the others take."""

QUIET_SEARCHES = 3
"""How many searches in a row must find nothing new: a single one can miss a process whose parent ends meanwhile."""

MARK = "FAILOVER_TENURE"
"""The environment variable of the mark."""

ENDED = frozenset(b"ZXx")
AT_REST = frozenset(b"TtZXxDI")
"""States in which a process does not fork."""

STUCK = ord("D")

PF_KTHREAD = 0x00200000
"""The flag of a kernel thread. Its parent is process 2, which proves nothing: in a container 2 may be any process."""

GONE = (FileNotFoundError, ProcessLookupError)
"""Errors on reading a file in /proc of a process that has ended."""

NO_PIDFD = (errno.ENOSYS, errno.EPERM)
"""The errors of pidfd_open() if the kernel does not have it, or a container's seccomp filter forbids it."""

LACKING = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
"""Errors on reading a file that may exist: no descriptor or no memory is left to read it."""

INIT = 1
"""The first process of every PID namespace. A /proc that does not show it hides others, too."""

HIDDEN = "/proc hides processes: mount it without hidepid (ProtectProc=)"

Process = tuple[int, int]
"""Process id and start time, in clock ticks since the boot."""


class Stat:
    """One process at one moment, from /proc/PID/stat.

    Attributes:
        thread: id of the thread that ``state`` describes: the main thread, or another one if only the main
            thread has ended. The kernel shows such a process as a zombie, though its other threads run.
    """

    __slots__ = ("flags", "group", "parent", "session", "start", "state", "thread")

    def __init__(self, thread: int, words: "list[bytes]") -> None:
        self.thread = thread
        self.state = words[0][0]
        self.parent = int(words[1])
        self.group = int(words[2])
        self.session = int(words[3])
        self.flags = int(words[6])
        self.start = int(words[19])


class _Directory:
    """The descriptor of /proc, opened at its first use."""

    fd: "int | None" = None


def open_proc() -> int:
    """Open /proc, if that has not been done yet; return its descriptor. Raises OSError."""
    if _Directory.fd is None:
        _Directory.fd = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    return _Directory.fd


def read(pid: int) -> "Stat | None":
    """Read one process; None if it does not exist.

    Raises:
        OSError: it exists, and cannot be read.
    """
    words = _read_stat(f"{pid}/stat")
    if words is None:
        return None
    stat = Stat(pid, words)
    if stat.state in ENDED and int(words[17]) > 1:  # the number of its threads
        live = ((thread, state) for thread, state in _thread_states(pid) if state not in ENDED)
        stat.thread, stat.state = next(live, (pid, stat.state))
    return stat


def has_stuck_thread(pid: int) -> bool:
    """Whether a thread of the process waits in the kernel (state D), as for a dead disk.

    Such a thread may hold the lock that a reader of the process's environment waits for.
    """
    return any(state == STUCK for _, state in _thread_states(pid))


def _thread_states(pid: int) -> "list[tuple[int, int]]":
    """Ids and states of the threads of a process; empty if it has ended."""
    path = f"{pid}/task"
    try:
        threads = _names_in(path)
    except GONE:
        return []
    stats = ((int(thread), _read_stat(f"{path}/{thread}/stat")) for thread in threads)
    return [(thread, words[0][0]) for thread, words in stats if words is not None]


def _names_in(path: str) -> "list[str]":
    """The names in a directory of /proc. It is opened anew: threads and forked processes share a descriptor's position."""
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=open_proc())
    try:
        return os.listdir(folder)
    finally:
        os.close(folder)


def _read_stat(path: str) -> "list[bytes] | None":
    """The words of a stat file after the name of the program; None if there is none."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC, dir_fd=open_proc())
        try:
            line = os.read(fd, 1024)
        finally:
            os.close(fd)
    except GONE:
        return None
    words = line.rpartition(b") ")[2].split()
    return words if len(words) >= 20 else None  # noqa: PLR2004 - fewer: it ended meanwhile


def snapshot() -> "dict[int, Stat]":
    """Read all processes, which takes some ten microseconds for each.

    Raises:
        OSError: they cannot be read, or /proc does not show all of them.
    """
    try:
        us = os.readlink("self", dir_fd=open_proc())
    except FileNotFoundError:
        us = "nobody"
    if us != str(os.getpid()):
        raise OSError("/proc is not mounted, or that of another PID namespace")
    table = {}
    try:
        for name in reversed(_names_in(".")):  # the newest first: they may end soon
            if name.isdigit():
                stat = read(int(name))
                if stat is not None:
                    table[int(name)] = stat
    except PermissionError:
        raise OSError(HIDDEN) from None
    if INIT not in table:
        raise OSError(HIDDEN)
    return table


def identify(pid: int) -> "Process | None":
    """Identity of a process; None if it does not exist. Raises OSError as ``read`` does."""
    stat = read(pid)
    return None if stat is None else (pid, stat.start)


def lives(process: Process) -> bool:
    """Whether the process still exists under its id and is no zombie. Raises OSError as ``read`` does."""
    stat = read(process[0])
    return stat is not None and stat.start == process[1] and stat.state not in ENDED


def related(
    table: "dict[int, Stat]", groups: "list[int]", roots: "list[Process]"
) -> "set[Process]":
    """Live members of the process groups and sessions, the roots, and the descendants of both."""
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


def own_groups(known: "set[int]", table: "dict[int, Stat]", found: "set[Process]") -> "set[int]":
    """The process groups of ``found`` and the ``known`` ones, without those that have other live members."""
    pids = {pid for pid, _ in found}
    live = ((pid, stat.group) for pid, stat in table.items() if stat.state not in ENDED)
    others = {group for pid, group in live if pid not in pids}
    others.add(0)  # a group of another PID namespace; a signal to 0 would go to this process's own
    return (known | {table[pid].group for pid in pids}) - others


def signal_groups(groups: "set[int]", number: int) -> None:
    """Signal process groups; those that are gone are skipped."""
    for group in groups:
        try:
            os.killpg(group, number)
        except OSError:
            pass


def with_mark(table: "dict[int, Stat]", mark: str) -> "set[Process]":
    """Live processes that were started with the mark in their environment. May block.

    A mark that begins with ``mark`` and a full stop counts, too.
    """
    wanted = f"{MARK}={mark}".encode()
    found: set[int] = set()
    queue, wait = list(table.items()), ExecWait()
    for pid, stat in queue:
        text = contents(stat.thread, "environ")
        if not text and wait.is_needed((pid, stat.start), stat):
            queue.append((pid, stat))
        if any(entry == wanted or entry.startswith(wanted + b".") for entry in text.split(b"\0")):
            found.add(pid)
    return _killable(table, found)


def in_cgroup(table: "dict[int, Stat]", directory: str) -> "set[Process]":
    """Live members of the cgroup at ``directory`` and of those below it. May block."""
    found: set[int] = set()
    for folder, _, _ in os.walk(directory):
        words = _read_file(f"{folder}/cgroup.procs").split()
        found.update(int(word) for word in words if word.isdigit())
    return _killable(table, found)


def send(process: Process, number: int) -> bool:
    """Signal exactly this process; return False if it is gone.

    Raises:
        OSError: no permission to signal it, or no descriptor is left.
    """
    fd = None
    try:
        try:
            fd = os.pidfd_open(process[0])  # while it is open, the process id is not reused
        except OSError as error:
            if error.errno not in NO_PIDFD:
                raise
        stat = read(process[0])
        if stat is None or stat.start != process[1]:
            return False
        if fd is None:
            os.kill(process[0], number)
        else:
            signal.pidfd_send_signal(fd, number)
    except ProcessLookupError:
        return False
    finally:
        if fd is not None:
            os.close(fd)
    return True


def kill_all(find, end_at: float, clock=time.monotonic, groups=set) -> "set[Process]":  # type: ignore[no-untyped-def]  # noqa: ANN001 - Callable would need typing
    """Stop the processes that ``find`` returns until it returns no new ones, kill them, repeat until none is left.

    Args:
        find: searches anew and returns a set of processes.
        end_at: how long to wait for their end, by ``clock``.
        clock: returns seconds.
        groups: returns the process groups of all that ``find`` has found, see ``own_groups``.

    Returns:
        Survivors: they are stuck in the kernel, or this process has no permission to signal them.

    Raises:
        OSError, MemoryError: raised by ``find``. Processes that were found before it have been sent SIGKILL.
    """
    while True:
        found = _stop_all(find, end_at, clock, groups)
        signal_groups(groups(), signal.SIGKILL)
        for process in found:
            try_to_send(process, signal.SIGKILL)
        while (left := {process for process in found if _may_live(process)}) and clock() < end_at:
            time.sleep(PAUSE_S)
        if left or not found:
            return left
        if clock() >= end_at:
            late: set[Process] = find()
            return late


def _stop_all(find, end_at: float, clock, groups) -> "set[Process]":  # type: ignore[no-untyped-def]  # noqa: ANN001 - as above
    """Stop all processes found, until several searches in a row find no new one."""
    found: set[Process] = set()
    stop_by = clock() + STOP_S
    quiet = 0
    while quiet < QUIET_SEARCHES:
        try:
            new = find() - found
        except (OSError, MemoryError):
            for process in found:  # nobody else would end those that are stopped
                try_to_send(process, signal.SIGKILL)
            raise
        found |= new
        signal_groups(groups(), signal.SIGSTOP)
        for process in new:
            try_to_send(process, signal.SIGSTOP)
        waiting = clock() < stop_by and any(map(_can_fork, found))
        quiet = 0 if new or waiting else quiet + 1
        if clock() >= end_at:  # too late for another search: kill what was found
            break
        if not new:
            time.sleep(PAUSE_S)
    return found


def _may_live(process: Process) -> bool:
    """Whether the process lives; True if it cannot be read."""
    try:
        return lives(process)
    except OSError:
        return True


def _can_fork(process: Process) -> bool:
    """Whether the process may still fork; True if it cannot be read."""
    try:
        stat = read(process[0])
    except OSError:
        return True
    return stat is not None and stat.start == process[1] and stat.state not in AT_REST


def try_to_send(process: Process, number: int) -> None:
    """Signal exactly this process, if that is possible."""
    try:
        send(process, number)
    except OSError:
        pass  # kill_all returns the process as a survivor


def _killable(table: "dict[int, Stat]", pids: "set[int]") -> "set[Process]":
    """The live processes among ``pids``, without this process, its ancestors and kernel threads."""
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


_bare: "set[Process]" = set()
"""Processes that still had neither an environment nor a command line after EXEC_S: no search waits for them again."""

MOST_BARE = 10_000
"""How many of these are remembered at most."""


class ExecWait:
    """How long one search waits for execs: EXEC_S in all, and until each process was read LEAST_LOOKS times."""

    def __init__(self) -> None:
        self._end_at, self._round = 0.0, 0
        self._looks: dict[Process, int] = {}

    def is_needed(self, process: "Process", stat: Stat) -> bool:
        """Whether to read a process without environment again. Pauses first if it has no command line, either."""
        if process in _bare or stat.flags & PF_KTHREAD:
            return False
        if contents(stat.thread, "cmdline"):  # perhaps its exec has just ended
            return bool(contents(stat.thread, "environ"))
        now = read(stat.thread)
        if now is None or now.state in ENDED:
            return False
        self._end_at = self._end_at or time.monotonic() + EXEC_S
        looks = self._looks[process] = self._looks.get(process, 0) + 1
        if looks < LEAST_LOOKS or time.monotonic() < self._end_at:
            if looks > self._round:  # one pause for all that are read again
                self._round = looks
                time.sleep(PAUSE_S)
            return True
        if len(_bare) >= MOST_BARE:
            _bare.clear()
        _bare.add(process)
        return False


def contents(thread: int, name: str) -> bytes:
    """Content of a file in /proc of a thread; empty if it cannot be read. May block. Raises the errors of LACKING."""
    return _read_file(f"{thread}/{name}", open_proc())


def _read_file(path: str, directory: "int | None" = None) -> bytes:
    """The content of a file; empty if it is not there, or belongs to another user."""
    text = b""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC, dir_fd=directory)
        try:
            while part := os.read(fd, 65536):
                text += part
        finally:
            os.close(fd)
    except OSError as error:
        if error.errno in LACKING:
            raise
    return text
