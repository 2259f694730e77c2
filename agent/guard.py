"""The guard (R12): a tiny process beside the agent that demotes when the agent cannot.

It gets each new deadline. If one passes and no newer one came, the agent is frozen or hung; if the
connection ends while one is set, the agent is dead. Then, in this order: the agent is stopped, so
that it does not wake up in between; a hook that still runs is killed with its whole process tree, so
that it does not start again what the next one stops; a workload of ``exec`` gets TERM, and KILL at half
the time; the demotion hook runs, TERM and KILL at its limit; everything else of the tenure is killed; the
agent is killed. All of it by ``kill_at``; only where the guard itself came too late (the host was
suspended, say) the tenure is killed at once, and the hook still gets half of its budget: a late
demotion is better than none. If all of it succeeded, a helper releases the role.

Rules of this file: the standard library's smallest modules only, nothing of ours but proctree.py, no
asyncio, no threads: it must stay small, and run when the agent cannot. What can block (a file on a dead
disk, another process's environment, a cgroup) is done in a forked process, which is waited for only so
long. No step that fails keeps the next one from running. It decides nothing: every moment in it was
computed by the agent. What it cannot do: act while the whole host is frozen; call a webhook; stop or
kill an agent that is process 1 of a container (its workload and its hooks' groups it can).

Arguments: the descriptor of a SOCK_SEQPACKET socket, the agent's process id, and descriptors to keep open.
Messages have their fields divided by NUL; moments are CLOCK_BOOTTIME seconds. Each is answered by its
number:

    ARM   number hook_at kill_at agent_at running(comma) groups(comma) workload cgroup
          roots(comma, pid:start) mark epoch state_path state_text
    HOOK  number directory user group groups(comma) complete stdin nenv env... {nargs args...}...
    BACK  number document helper...
    OFF   number
    LOG   number least form group session role epoch

``running``, ``groups`` and ``workload`` are process groups: of a hook that runs, of hooks that have run, of
the command of ``exec``. ``cgroup`` is that of the whole tenure, with those of its hooks and of the
workload below it. ``hook_at`` may be "inf": the agent is
demoting. Then what is left of the tenure is killed at ``kill_at``, and the agent at ``agent_at``: in
between it may run its fence command. ``complete`` is 0 if the commands are not the whole demotion.
``document`` is what the helper hands the role back with; without one, or an epoch, the lease runs
out. ``least`` and ``form`` are those of the agent's log (ops/logs.py, whose lines the guard's look
like); the rest is what it says of the agent.

Only OFF calls it off. Ends with 0 when the agent has closed the connection and nothing was due, with 3
when it has acted.
"""

import os
import select
import signal
import stat
import sys
import time

from agent import proctree

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

MESSAGE_BYTES = 65536
"""Longer messages are not sent: they would arrive cut. An ordinary one has 2,000."""

GRACE_SHARE = 0.25
LONGEST_GRACE_S = 2.0
POLL_S = 0.01
"""How often a running hook is looked at: the guard waits for nothing else then."""

KILL_S = 0.1
"""The least time for one killing; in most cases it takes milliseconds."""

KILLED_WAIT_S = 0.2
"""How long it waits for a killed hook to be gone before it goes on with the killing."""

STATE_WAIT_S = 0.1
"""How long the demotion waits for the state file: a dead network file system never answers."""

SWEEP_S = 1.0
"""The least time for the last search and killing, where nothing is left of the limit."""

DEAD_WAIT_S = 1.0
"""How long a killed agent may take to be gone."""

WRITTEN_WAIT_S = 0.2
"""How long it waits at its end for its lines to be written to a file."""

HELPER_WAIT_S = 30.0
"""For how long after the limit the helper waits for the go: nothing of a demotion takes longer."""

HELPER_FD = 3
"""Where the helper has the document."""

LONGEST_POLL_S = 0.25
"""While something is due it looks at the clock this often: poll() counts no suspended time."""

OUTPUT_BYTES = 65536
"""Of a hook's output that is passed on, and the most that is read of it in one turn."""

LINE_BYTES = 1000
"""Of a hook's output that are one line at most."""

VALUE_BYTES = 3000
"""Of one value in a line, as it is written: a pipe takes 4,096 bytes at once."""

INFO, WARNING, ERROR = 20, 30, 40
LEVELS = {INFO: ("INFO", 6), WARNING: ("WARNING", 4), ERROR: ("ERROR", 3)}
"""Name and syslog priority of each level."""

ACTED = 3
FAULTS = (signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGSEGV)
IGNORED = tuple(
    signal.valid_signals()
    - {signal.SIGKILL, signal.SIGSTOP, signal.SIGCONT, signal.SIGCHLD}
    - {*FAULTS, signal.SIGSYS, signal.SIGTRAP}
)
"""It ends when the agent does, not before."""


def now() -> float:
    """CLOCK_BOOTTIME, in seconds."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def put(data: bytes) -> None:
    """To stderr, which is the agent's, without ever waiting: what nobody reads is lost."""
    fd = 2
    try:
        # Opened anew: O_NONBLOCK on the one that is there would be the agent's and its parent's, too.
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            fd = os.open("/proc/self/fd/2", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError:
        pass  # a socket: one that says it is ready has room for many lines
    try:
        poll = select.poll()
        poll.register(fd, select.POLLOUT)
        if poll.poll(0):
            os.write(fd, data[: select.PIPE_BUF])
    except OSError:
        pass
    if fd != 2:  # noqa: PLR2004 - stderr
        os.close(fd)


def signal_groups(groups: "list[int] | set[int]", number: int) -> None:
    """A signal to process groups."""
    for group in groups:
        try:
            os.killpg(group, number)
        except OSError:
            pass


class Worker:
    """A forked process for what may block. It is waited for only so long.

    Args:
        work: done there; returns whether it succeeded.
        closing: descriptors that it must not keep open.
    """

    def __init__(self, work: "Callable[[], bool]", closing: "list[int]") -> None:
        self.ok: bool | None = None
        self.pid = os.fork()
        if self.pid:
            return
        try:
            for fd in closing:
                os.close(fd)
            os._exit(0 if work() else 1)
        finally:
            os._exit(1)

    def result(self, end_at: float) -> "bool | None":
        """Wait for its end; whether it succeeded, or None if it still runs at ``end_at``."""
        while self.ok is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            if ended:
                self.ok = status == 0
            elif now() >= end_at:
                break
            else:
                time.sleep(POLL_S)
        return self.ok

    def succeeded(self, end_at: float) -> bool:
        """Wait until it has ended, or kill it at ``end_at``."""
        ok = self.result(end_at)
        if ok is None:
            os.kill(self.pid, signal.SIGKILL)  # it is not reaped, so it is no stranger
        return ok is True


def quoted(text: str) -> str:
    """A string in JSON, and in a line of text; cut to what a line has room for."""
    out = '"'
    for char in text:
        code = ord(char)
        if len(out) > VALUE_BYTES:
            break
        if char in '"\\':
            out += "\\" + char
        elif 32 <= code < 127:  # noqa: PLR2004 - printable ASCII
            out += char
        elif code < 0x10000:  # noqa: PLR2004 - one unit of UTF-16
            out += f"\\u{code:04x}"
        else:
            high, low = divmod(code - 0x10000, 0x400)
            out += f"\\u{0xD800 + high:04x}\\u{0xDC00 + low:04x}"
    return out + '"'


class Voice:
    """The guard's lines on the agent's stderr, which look like the agent's own."""

    def __init__(self) -> None:
        self.least = INFO
        self.json = False
        self.facts: list[tuple[str, str]] = []
        self.partial = b""
        try:
            there = os.fstat(2)
            stream = f"{there.st_dev}:{there.st_ino}"
        except OSError:
            stream = "closed"
        self.journal = os.environ.get("JOURNAL_STREAM") == stream
        self.pipe = self.writer = 0

    def open(self, closing: "list[int]") -> None:
        """Have a forked process write the lines if stderr is a file: its disk may be dead."""
        if self.pipe or not stat.S_ISREG(os.fstat(2).st_mode):
            return
        lines, pipe = os.pipe()
        self.writer = os.fork()
        if not self.writer:
            try:
                for fd in (pipe, *closing):
                    os.close(fd)
                while data := os.read(lines, select.PIPE_BUF):
                    os.write(2, data)
            finally:
                os._exit(0)
        os.close(lines)
        os.set_blocking(pipe, False)
        self.pipe = pipe

    def close(self) -> None:
        """Wait until all is written, but not for long."""
        if not self.pipe:
            return
        os.close(self.pipe)
        end_at = now() + WRITTEN_WAIT_S
        while os.waitpid(self.writer, os.WNOHANG) == (0, 0) and now() < end_at:
            time.sleep(POLL_S)

    def put(self, data: bytes) -> None:
        """One line, to where it is written."""
        if not self.pipe:
            put(data)
            return
        try:
            os.write(self.pipe, data)
        except OSError:
            pass  # as many as a pipe holds wait already

    def say(self, level: int, message: str, *fields: "tuple[str, str | float | None]") -> None:
        """One event."""
        if level < self.least:
            return
        name, priority = LEVELS[level]
        seconds = time.time()
        at = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
        at += f".{int(seconds % 1 * 1000):03}Z"
        if self.json:
            told = [("time", at), ("level", name), ("logger", "agent.guard"), ("message", message)]
            pairs = [
                f'"{key}": {self.value(value)}' for key, value in (*told, *self.facts, *fields)
            ]
            line = "{" + ", ".join(pairs) + "}"
        else:
            words = [f"{key}={self.value(value)}" for key, value in (*self.facts, *fields)]
            line = " ".join(
                [name, message, *words] if self.journal else [at, name, message, *words]
            )
        self.put(f"{f'<{priority}>' if self.journal else ''}{line}\n".encode())

    def value(self, value: "str | float | None") -> str:
        """A value as the form has it."""
        if not isinstance(value, str):
            return "null" if value is None else str(value)
        plain = value.isascii() and value.isprintable() and not any(c in value for c in ' "=\\')
        return value if plain and value and not self.json else quoted(value)

    def hook_output(self, data: bytes, *, end: bool = False) -> None:
        """What a hook has written, line by line; at its end what has no end of line, too."""
        *lines, self.partial = (self.partial + data).split(b"\n")
        if end or len(self.partial) >= LINE_BYTES:
            lines.append(self.partial)
            self.partial = b""
        for line in lines:
            for at in range(0, len(line), LINE_BYTES):
                text = line[at : at + LINE_BYTES].decode(errors="replace")
                self.say(INFO, "hook output", ("hook", "secondary"), ("line", text))


def pass_on(output: int, room: int, voice: Voice) -> int:
    """What a hook has written is said, up to ``room`` bytes; how much it was. Never waits."""
    passed = 0
    for _ in range(OUTPUT_BYTES // select.PIPE_BUF):
        try:
            data = os.read(output, select.PIPE_BUF)
        except BlockingIOError:
            break
        voice.hook_output(data[: max(0, room - passed)])
        passed += len(data)
    return passed


class Tree:
    """Processes of a tenure. All but the mark and the cgroup are looked for without blocking.

    Args:
        roots: those whose descendants belong to it; grows with each search, so that children are found
            after the end of their parents.
        groups: process groups and sessions, by the process id of their leader.
        mark: what they have in their environment, or empty.
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
        self.mark = os.fsdecode(mark)
        self.cgroup = os.fsdecode(cgroup)

    def part(self, groups: "list[int]") -> "Tree":
        """The trees of some of its groups."""
        return Tree({root for root in self.roots if root[0] in groups}, set(groups))

    def find(self, *, everywhere: bool = False) -> "set[proctree.Process]":
        """Those that live now; ``everywhere`` may block."""
        marked = everywhere and (self.mark or self.cgroup)
        if not self.roots and not self.groups and not marked:
            return set()
        table = proctree.snapshot()
        known = {pid for pid, _ in self.roots if pid in table}
        # The number of an ended process may lead a stranger's group by now.
        strange = {pid for pid in known if (pid, table[pid].start) not in self.roots}
        if everywhere and self.mark:
            self.roots |= proctree.with_mark(table, self.mark)
        if everywhere and self.cgroup:
            self.roots |= proctree.in_cgroup(table, self.cgroup)
        found = proctree.related(table, list(self.groups - strange), list(self.roots))
        self.roots |= found
        return found

    def kill(self, end_at: float, *, everywhere: bool = False) -> bool:
        """Kill all; whether none is left at ``end_at``, or shortly after."""

        def find() -> "set[proctree.Process]":
            return self.find(everywhere=everywhere)

        end_at = max(end_at, now() + KILL_S)
        while find():
            proctree.kill_all(find, end_at, now)
            if now() >= end_at:
                return not find()
        return True


def numbers(field: bytes) -> "list[int]":
    """Numbers divided by commas."""
    return [int(number) for number in field.split(b",") if number]


class Hook:
    """The demotion hook, as processes."""

    def __init__(self, fields: "list[bytes]") -> None:
        self.directory = fields[0]
        self.user = int(fields[1])
        self.group = int(fields[2])
        self.groups = numbers(fields[3])
        self.complete = fields[4] == b"1"
        self.stdin = fields[5]
        count = int(fields[6])
        self.env = {}
        for pair in fields[7 : 7 + count]:
            key, _, value = pair.partition(b"=")
            self.env[key] = value
        rest = fields[7 + count :]
        self.commands = []
        while rest:
            many = int(rest[0])
            self.commands.append(rest[1 : 1 + many])
            rest = rest[1 + many :]

    def start(self, argv: "list[bytes]", output: int) -> int:
        """The process id, which is its group's, too. Its stdout and stderr are ``output``.

        Raises:
            OSError: there is no room for a process.
        """
        pid = os.fork()
        if pid:
            return pid
        try:
            os.setsid()
            facts, end = os.pipe()
            os.write(end, self.stdin)  # shorter than a message, and so than what a pipe holds
            os.close(end)
            os.dup2(facts, 0)
            os.dup2(output, 1)
            os.dup2(output, 2)
            os.chdir(self.directory)
            if self.user >= 0:
                os.setgroups(self.groups)
                os.setgid(self.group)
                os.setuid(self.user)
            for number in (*IGNORED, signal.SIGXFSZ):
                signal.signal(number, signal.SIG_DFL)
            os.execve(argv[0], argv, self.env)  # noqa: S606 - the agent has checked it
        except (OSError, ValueError, OverflowError) as error:
            put(f"could not be started: {error}\n".encode(errors="replace"))  # its own output
        finally:
            os._exit(127)


class Guard:
    """The newest messages of the agent, and what follows from them.

    Args:
        fd: the socket to the agent.
        agent: its process id.
        kept: further descriptors that no forked process may keep open.
    """

    def __init__(self, fd: int, agent: int, kept: "tuple[int, ...]" = ()) -> None:
        self.fd = fd
        self.agent = agent
        self.kept = [fd, *kept]
        self.hook_at = self.kill_at = self.agent_at = float("inf")
        self.budget_s = 0.0
        self.running: list[int] = []
        self.workload: list[int] = []
        self.cgroup = b""
        self.tenure = Tree(set(), set())
        self.epoch: int | None = None
        self.state: tuple[bytes, bytes] | None = None
        self.hook: Hook | None = None
        self.document = b""
        self.helper: list[bytes] = []
        self.termed = 0
        self.killed = self.failed = False
        self.sweeper: object = None
        self.voice = Voice()
        self.role = "Primary"
        self.role_epoch: int | None = None

    @property
    def armed(self) -> bool:
        """There is something to demote."""
        return self.agent_at != float("inf")

    @property
    def due_at(self) -> float:
        """When something has to be done."""
        return self.agent_at if self.killed else min(self.hook_at, self.kill_at)

    def watch(self) -> int:
        """Until there is something to do or nobody to watch; the exit code."""
        poll = select.poll()
        poll.register(self.fd, select.POLLIN)
        while True:
            due_s = self.due_at - now()
            wait_s = min(max(0.0, due_s), LONGEST_POLL_S)
            wait_ms = None if due_s == float("inf") else int(wait_s * 1000) + 1
            if poll.poll(wait_ms):
                # Always first: a newer deadline may lie there, unread while this process was frozen.
                if not self.read():
                    if not self.armed:
                        return 0
                    self.act("it is dead", hook=True)
                    return ACTED
            elif now() >= self.due_at:
                if self.hook_at == float("inf") and now() < self.agent_at:
                    self.kill_beside_agent()
                    continue
                self.act("it has not renewed its deadline", hook=self.hook_at != float("inf"))
                return ACTED

    def read(self) -> bool:
        """Take in one message; whether the agent is still there."""
        try:
            message = os.read(self.fd, MESSAGE_BYTES)
        except ConnectionResetError:
            return True  # it has left answers unread; its last messages and its end come after this
        if not message:
            return False
        word, number, *fields = message.split(b"\0")
        try:
            self.take(word, fields)
        except (ValueError, IndexError):
            return True  # no answer: the agent takes this guard for lost
        try:
            os.write(self.fd, number)
        except OSError:
            pass  # it is dead: the next read says so
        return True

    def take(self, word: bytes, fields: "list[bytes]") -> None:
        """Take one message in."""
        if word in {b"ARM", b"OFF"}:
            self.end_sweep()
        if word == b"ARM":
            self.arm(fields)
        elif word == b"OFF":
            self.hook_at = self.kill_at = self.agent_at = float("inf")
        elif word == b"HOOK":
            self.hook = Hook(fields)
        elif word == b"BACK":
            self.document, self.helper = fields[0], fields[1:]
        elif word == b"LOG":
            said = [field.decode(errors="replace") for field in fields]
            self.voice.least, self.voice.json = int(said[0]), said[1] == "json"
            self.voice.facts = [("group", said[2]), ("session", said[3])]
            self.role, self.role_epoch = said[4], int(said[5]) if said[5] else None

    def end_sweep(self) -> None:
        """End a killing that still goes on: the same mark may be that of a new tenure from now on."""
        if isinstance(self.sweeper, Worker):
            self.sweeper.succeeded(now())
            self.sweeper = None

    def arm(self, fields: "list[bytes]") -> None:
        """Take the newest deadline, and what is to be killed then."""
        hook_at, kill_at, agent_at = (float(field) for field in fields[:3])
        if hook_at != float("inf"):
            self.budget_s = kill_at - hook_at
        self.running = numbers(fields[3])
        self.workload = numbers(fields[5])
        self.cgroup = fields[6]
        roots = [root.partition(b":") for root in fields[7].split(b",") if root]
        self.tenure = Tree(
            {(int(pid), int(start)) for pid, _, start in roots},
            {*self.running, *numbers(fields[4]), *self.workload},
            fields[8],
            fields[6],
        )
        self.epoch = int(fields[9]) if fields[9] else None
        self.state = (fields[10], fields[11]) if fields[10] else None
        self.killed = False
        self.hook_at, self.kill_at, self.agent_at = hook_at, kill_at, max(kill_at, agent_at)

    # -- the demotion ---------------------------------------------------------------------------

    def step(self, what: str, act: "Callable[..., object]", *args: object) -> object:
        """One step. Whatever it raises is said, and keeps no other step from running."""
        try:
            return act(*args)
        except Exception as error:  # noqa: BLE001 - the next step may be the one that stops the workload
            self.failed = True
            self.step_failed(what, error)
            return None

    def step_failed(self, what: str, error: Exception) -> None:
        """Say so, if that is possible."""
        try:
            reason = f"{type(error).__name__}: {error}"
            self.voice.say(ERROR, "guard step failed", ("step", what), ("reason", reason))
        except Exception:  # noqa: BLE001, S110 - saying is the least important
            pass

    def kill_beside_agent(self) -> None:
        """The agent's own demotion has taken too long: kill the tenure, leave the agent to its fence."""
        self.killed = True
        self.step("kill the tenure", self.tenure.kill, now())
        self.sweeper = self.step("kill the tenure", self.start_sweep, now())
        self.step("open the log", self.voice.open, self.kept)
        self.step("log", self.voice.say, WARNING, "processes killed at the limit of the demotion")

    def act(self, why: str, *, hook: bool) -> None:
        """Demote in the place of the agent, and hand the role back if that has succeeded."""
        self.step("stop the agent", self.signal, self.agent, signal.SIGSTOP)
        begun_at = now()
        late = begun_at >= self.kill_at
        kill_at = begun_at if late else self.kill_at
        end_at = max(kill_at, begun_at + self.budget_s / 2)
        self.step("kill running hooks", self.tenure.part(self.running).kill, begun_at)
        self.step("look for the tenure", self.tenure.find)  # those whose parents are killed next
        if late:
            self.step("kill the tenure", self.tenure.kill, begun_at)
        self.step("open the log", self.voice.open, self.kept)
        go = self.step("start the helper", self.start_helper, end_at) if hook and not late else None
        state = self.step("write the state file", Worker, self.write_state, self.kept)
        if isinstance(state, Worker):  # hooks find it changed, unless it cannot be written
            self.step("write the state file", state.result, now() + STATE_WAIT_S)
        self.step("log", self.say_demotion, why)
        self.step("stop the workload", self.stop_workload, (now() + kill_at) / 2)
        done = self.step("demotion hook", self.run_hook, end_at) if hook else False
        gone = self.step("kill the tenure", self.kill_tenure, kill_at)
        self.step("kill the agent", self.signal, self.agent, signal.SIGKILL)
        dead = self.step("kill the agent", self.agent_is_dead)
        if isinstance(go, int) and done and gone and dead and not self.failed:
            self.step("hand the role back", os.write, go, b"1")
        if isinstance(state, Worker):
            self.step("write the state file", state.succeeded, now() + STATE_WAIT_S)
        left = ("left_of_limit_s", round(self.kill_at - now(), 3))
        self.step("log", self.voice.say, WARNING, "demoted by the guard, agent killed", left)
        self.step("close the log", self.voice.close)

    def say_demotion(self, why: str) -> None:
        """The first line: the change of role."""
        self.voice.say(
            WARNING,
            "role changed" if self.role != "Secondary" else "demotion taken over",
            ("before", self.role),
            ("after", "Secondary"),
            ("epoch", self.role_epoch),
            ("reason", f"the guard demotes in the place of the agent: {why}"),
        )

    def stop_workload(self, end_at: float) -> None:
        """TERM to the whole tree, and KILL to what lives at ``end_at``."""
        if not self.workload:
            return
        tree = self.tenure.part(self.workload)
        for process in tree.find():
            proctree.send(process, signal.SIGTERM)
        while tree.find() and now() < end_at:
            time.sleep(POLL_S)
        tree.kill(end_at)
        self.tenure.roots |= tree.roots
        if not self.cgroup:
            return
        killing = Worker(lambda: self.kill_cgroup(self.cgroup + b"/workload"), self.kept)
        if not killing.succeeded(now() + KILLED_WAIT_S):
            self.failed = True

    def kill_cgroup(self, directory: bytes) -> bool:
        """KILL to all that is in a cgroup and in those below it. May block."""
        try:
            fd = os.open(directory + b"/cgroup.kill", os.O_WRONLY)
            os.write(fd, b"1")
            os.close(fd)
        except FileNotFoundError:
            return True  # it is gone, and so is what was in it
        except OSError as error:
            self.voice.say(ERROR, "cgroup not killed", ("reason", str(error)))
            return False
        return True

    def run_hook(self, end_at: float) -> bool:
        """Every command, one after the other, to its end or to ``end_at``; whether all succeeded."""
        hook = self.hook
        if hook is None:
            return False
        term_at = end_at - min(GRACE_SHARE * (end_at - now()), LONGEST_GRACE_S)
        output, of_hook = os.pipe()
        os.set_blocking(output, False)
        room = OUTPUT_BYTES
        done = hook.complete
        for argv in hook.commands:
            which = (("hook", "secondary"), ("command", argv[0].decode(errors="replace")))
            if now() >= term_at:
                self.voice.say(WARNING, "no time is left for the hook", *which)
                return False
            try:
                pid = hook.start(argv, of_hook)
            except OSError as error:
                self.voice.say(ERROR, "hook could not be started", *which, ("reason", str(error)))
                done = False
                continue
            how = None
            while how is None and now() < end_at + KILLED_WAIT_S:
                how = self.look(pid, term_at, end_at)
                room -= pass_on(output, room, self.voice)
                if how is None:
                    time.sleep(POLL_S)
            self.voice.hook_output(b"", end=True)
            level = INFO if how == "exit 0" else WARNING
            result = how or "killed, and not gone yet"
            self.voice.say(level, "hook ended", *which, ("result", result))
            if how != "exit 0":  # what a hook that succeeds leaves to run is a standby's
                self.tenure.groups.add(pid)
                done = False
        return done

    def look(self, pid: int, term_at: float, end_at: float) -> "str | None":
        """How a command ended, or None; TERM before its end, KILL at it. It stays a zombie: see below."""
        # WNOWAIT: while it is a zombie its number cannot be given to a stranger.
        ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if ended is not None:
            return f"{'exit' if ended.si_code == os.CLD_EXITED else 'signal'} {ended.si_status}"
        if now() >= end_at:
            signal_groups([pid], signal.SIGKILL)
            try:
                os.kill(pid, signal.SIGKILL)  # it may not have come to lead its group yet
            except OSError:
                pass
        elif now() >= term_at and self.termed != pid:
            self.termed = pid
            signal_groups([pid], signal.SIGTERM)
        return None

    def kill_tenure(self, kill_at: float) -> bool:
        """Kill all that is left, at once what can be found without blocking; whether nothing lives."""
        try:
            self.tenure.kill(now())
        except Exception:
            signal_groups(self.tenure.groups, signal.SIGKILL)  # better than nothing
            raise
        return self.start_sweep(kill_at).succeeded(max(kill_at, now() + SWEEP_S))

    def start_sweep(self, end_at: float) -> Worker:
        """Have what may block of the killing done, until ``end_at`` or for a short time."""
        end_at = max(end_at, now() + SWEEP_S)
        return Worker(lambda: self.sweep(end_at), self.kept)

    def sweep(self, end_at: float) -> bool:
        """Find and kill also what only its environment or its cgroup gives away. May block."""
        killed = not self.cgroup or self.kill_cgroup(self.cgroup)
        return self.tenure.kill(end_at, everywhere=True) and killed

    def agent_is_dead(self) -> bool:
        """Wait until the agent is gone, and not only signalled: then this has another parent."""
        end_at = now() + DEAD_WAIT_S
        while os.getppid() == self.agent:
            if now() >= end_at:
                return False
            time.sleep(POLL_S)
        return True

    def write_state(self) -> bool:
        """Sidecars read Secondary from here on. May block."""
        if self.state is None:
            return True
        path, text = self.state
        try:
            fd = os.open(path + b".guard", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            os.fchmod(fd, 0o644)  # sidecars under other users read it, whatever the umask is
            while text:
                text = text[os.write(fd, text) :]
            os.close(fd)
            os.replace(path + b".guard", path)
        except OSError as error:
            self.voice.say(ERROR, "state file not written", ("reason", str(error)))
            return False
        return True

    def start_helper(self, end_at: float) -> "int | None":
        """Start what hands the role back; the descriptor on which it waits for one byte.

        Its imports run while the hook does. It ends without having done anything if this process does.
        """
        if not self.document or self.epoch is None:
            return None
        wait_s = end_at - now() + HELPER_WAIT_S
        words = [*self.helper, b"%d" % self.epoch, b"%.3f" % wait_s]
        waiting, go = os.pipe()
        self.kept.append(go)
        document = os.memfd_create("handback")
        os.write(document, self.document)
        if not os.fork():
            try:
                os.setsid()
                os.dup2(waiting, 0)
                if document == HELPER_FD:
                    os.set_inheritable(document, True)
                else:
                    os.dup2(document, HELPER_FD)
                os.execv(words[0], words)  # noqa: S606 - ourselves
            finally:
                os._exit(127)
        os.close(waiting)
        os.close(document)
        return go

    def signal(self, pid: int, number: int) -> None:
        """To the agent, if it is still our parent: its number may be a stranger's otherwise."""
        if os.getppid() == pid:
            os.kill(pid, number)


def main() -> int:
    """Guard the agent; see above for the arguments.

    The agent's number is not asked of the kernel: if it has died by now, the parent is a stranger.
    """
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    fd, agent, program, *claims = map(int, sys.argv[1:])
    os.close(program)
    for kept in (fd, *claims):
        os.set_inheritable(kept, False)  # not for the hooks
    guard = Guard(fd, agent, tuple(claims))
    while True:
        try:
            return guard.watch()
        except Exception as error:  # noqa: BLE001 - a guard that ends is none
            guard.step_failed("watch", error)
            time.sleep(POLL_S)


if __name__ == "__main__":
    sys.exit(main())
