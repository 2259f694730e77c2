"""The guard (R12): a tiny process beside the agent that demotes when the agent cannot.

It is told each new deadline. If one comes and no newer one came, the agent is frozen or hung; if the
connection ends while one is set, the agent is dead. Then, in this order: the agent is stopped, so
that it does not wake up in between; a hook that still runs is killed, so that it does not start
again what the next one stops; a workload of ``exec`` gets TERM, and KILL at half the time; the
demotion hook runs, TERM and KILL at its limit; what is left in any group is killed; the agent is
killed. All of it by ``kill_at``; only where the guard itself came too late (the host was suspended,
say) the groups are killed at once, and the hook still gets half of its budget: a late demotion is
better than none.

Rules of this file: the standard library's smallest modules only, nothing of ours, no asyncio, no
threads: it must stay small, and run when the agent cannot. It decides nothing: every moment in it was
computed by the agent. What it cannot do: act while the whole host is frozen; call a webhook; stop or
kill an agent that is process 1 of a container (its workload and its hooks' groups it can).

Arguments: the descriptor of a SOCK_SEQPACKET socket, and the agent's process id. Messages have their
fields divided by NUL; moments are CLOCK_BOOTTIME seconds. Each is answered by its number:

    ARM   number hook_at kill_at running(comma) groups(comma) workload cgroup state_path state_text
    HOOK  number directory user group groups(comma) stdin nenv env... {nargs args...}...
    OFF   number
    LOG   number least form group session role epoch

``running``, ``groups`` and ``workload`` are process groups: of a hook that runs, of hooks that have run, of
the command of ``exec`` (whose cgroup may be given, too). ``hook_at`` may be "inf": the agent is
demoting, and only the killing at ``kill_at`` is left to do, if it lives. ``least`` and ``form`` are
those of the agent's log (ops/logs.py, whose lines the guard's look like); the rest is what it says of
the agent.
Ends with 0 when the agent has closed the connection and nothing was due, with 3 when it has acted.
"""

import os
import select
import signal
import stat
import sys
import time

MESSAGE_BYTES = 65536
"""Longer messages are not sent: they would arrive cut. An ordinary one has 2,000."""

GRACE_SHARE = 0.25
LONGEST_GRACE_S = 2.0
POLL_S = 0.01
"""How often a running hook is looked at: the guard waits for nothing else then."""

KILLED_WAIT_S = 0.2
"""How long it waits for a killed hook to be gone before it goes on with the killing."""

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


def kill(groups: "list[int]") -> None:
    """SIGKILL to process groups; nothing may be left of one."""
    signal_groups(groups, signal.SIGKILL)


def signal_groups(groups: "list[int]", number: int) -> None:
    """A signal to process groups."""
    for group in groups:
        try:
            os.killpg(group, number)
        except OSError:
            pass


def lives(groups: "list[int]") -> bool:
    """Whether one of them has a member that is not a zombie."""
    if not groups:
        return False
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                fd = os.open(f"/proc/{name}/stat", os.O_RDONLY)
            except OSError:
                continue
            try:
                line = os.read(fd, 1024)
            except OSError:
                continue
            finally:
                os.close(fd)
            state, _, group = line.rpartition(b") ")[2].split(b" ", 3)[:3]
            if int(group) in groups and state not in (b"Z", b"X"):
                return True
    return False


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
        put(f"{f'<{priority}>' if self.journal else ''}{line}\n".encode())

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


class Hook:
    """The demotion hook, as processes: nothing of its outcome is decided by the guard."""

    def __init__(self, fields: "list[bytes]") -> None:
        self.directory = fields[0]
        self.user = int(fields[1])
        self.group = int(fields[2])
        self.groups = [int(group) for group in fields[3].split(b",") if group]
        self.stdin = fields[4]
        count = int(fields[5])
        self.env = {}
        for pair in fields[6 : 6 + count]:
            key, _, value = pair.partition(b"=")
            self.env[key] = value
        rest = fields[6 + count :]
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
    """What was told last, and what follows of it."""

    def __init__(self, fd: int, agent: int) -> None:
        self.fd = fd
        self.agent = agent
        self.hook_at = self.kill_at = float("inf")
        self.budget_s = 0.0
        self.running: list[int] = []
        self.groups: list[int] = []
        self.workload: list[int] = []
        self.cgroup = b""
        self.state: tuple[bytes, bytes] | None = None
        self.hook: Hook | None = None
        self.termed = 0
        self.voice = Voice()
        self.role = "Primary"
        self.epoch: int | None = None

    def watch(self) -> int:
        """Until there is something to do or nobody to watch; the exit code."""
        poll = select.poll()
        poll.register(self.fd, select.POLLIN)
        while True:
            due_s = min(self.hook_at, self.kill_at) - now()
            wait_s = min(max(0.0, due_s), LONGEST_POLL_S)
            wait_ms = None if due_s == float("inf") else int(wait_s * 1000) + 1
            if poll.poll(wait_ms):
                # Always first: a newer deadline may lie there, unread while this process was frozen.
                if not self.read():
                    if self.kill_at == float("inf"):
                        return 0
                    self.act("it is dead", hook=True)
                    return ACTED
            elif now() >= min(self.hook_at, self.kill_at):
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
        if word == b"ARM":
            self.hook_at, self.kill_at = float(fields[0]), float(fields[1])
            if self.hook_at != float("inf"):
                self.budget_s = self.kill_at - self.hook_at
            self.running = [int(group) for group in fields[2].split(b",") if group]
            self.groups = [int(group) for group in fields[3].split(b",") if group]
            self.workload = [int(group) for group in fields[4].split(b",") if group]
            self.cgroup = fields[5]
            self.state = (fields[6], fields[7]) if fields[6] else None
        elif word == b"OFF":
            self.hook_at = self.kill_at = float("inf")
        elif word == b"HOOK":
            self.hook = Hook(fields)
        elif word == b"LOG":
            said = [field.decode(errors="replace") for field in fields]
            self.voice.least, self.voice.json = int(said[0]), said[1] == "json"
            self.voice.facts = [("group", said[2]), ("session", said[3])]
            self.role, self.epoch = said[4], int(said[5]) if said[5] else None
        try:
            os.write(self.fd, number)
        except OSError:
            pass  # it is dead: the next read says so
        return True

    def act(self, why: str, *, hook: bool) -> None:
        """Demote: what still runs, workload, hook, the rest, agent. Whatever fails, it kills."""
        self.signal(self.agent, signal.SIGSTOP)
        end_at = max(self.kill_at, now() + self.budget_s / 2)
        try:
            self.write_state()
            changed = "role changed" if self.role != "Secondary" else "demotion taken over"
            self.voice.say(
                WARNING,
                changed,
                ("before", self.role),
                ("after", "Secondary"),
                ("epoch", self.epoch),
                ("reason", f"the guard demotes in the place of the agent: {why}"),
            )
            kill(self.running)
            self.stop_workload((now() + self.kill_at) / 2)
            if now() >= self.kill_at:
                kill(self.groups)
            if hook and self.hook is not None:
                self.run_hook(self.hook, end_at)
        finally:
            kill(self.groups + self.workload)
            self.signal(self.agent, signal.SIGKILL)
        left_s = round(self.kill_at - now(), 3)
        self.voice.say(WARNING, "demoted by the guard, agent killed", ("left_of_limit_s", left_s))

    def stop_workload(self, end_at: float) -> None:
        """TERM, and KILL to what lives at ``end_at``."""
        signal_groups(self.workload, signal.SIGTERM)
        while lives(self.workload) and now() < end_at:
            time.sleep(POLL_S)
        kill(self.workload)
        if self.cgroup:
            try:
                fd = os.open(self.cgroup + b"/cgroup.kill", os.O_WRONLY)
                os.write(fd, b"1")
                os.close(fd)
            except OSError as error:
                self.voice.say(ERROR, "cgroup of the workload not killed", ("reason", str(error)))

    def run_hook(self, hook: Hook, end_at: float) -> None:
        """Every command of it, one after the other, to its end or to ``end_at``."""
        term_at = end_at - min(GRACE_SHARE * (end_at - now()), LONGEST_GRACE_S)
        output, of_hook = os.pipe()
        os.set_blocking(output, False)
        room = OUTPUT_BYTES
        for argv in hook.commands:
            which = (("hook", "secondary"), ("command", argv[0].decode(errors="replace")))
            if now() >= term_at:
                self.voice.say(WARNING, "no time is left for the hook", *which)
                break
            try:
                pid = hook.start(argv, of_hook)
            except OSError as error:
                self.voice.say(ERROR, "hook could not be started", *which, ("reason", str(error)))
                continue
            self.groups.append(pid)
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

    def look(self, pid: int, term_at: float, end_at: float) -> "str | None":
        """How a command ended, or None; TERM before its end, KILL at it. It stays a zombie: see below."""
        # WNOWAIT: while it is a zombie its number cannot be given to a stranger.
        ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if ended is not None:
            return f"{'exit' if ended.si_code == os.CLD_EXITED else 'signal'} {ended.si_status}"
        if now() >= end_at:
            kill([pid])
            try:
                os.kill(pid, signal.SIGKILL)  # it may not have come to lead its group yet
            except OSError:
                pass
        elif now() >= term_at and self.termed != pid:
            self.termed = pid
            signal_groups([pid], signal.SIGTERM)
        return None

    def write_state(self) -> None:
        """Sidecars read Secondary from here on."""
        if self.state is None:
            return
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

    def signal(self, pid: int, number: int) -> None:
        """To the agent, if it is still our parent: its number may be a stranger's otherwise."""
        if os.getppid() == pid:
            try:
                os.kill(pid, number)
            except OSError as error:
                self.voice.say(ERROR, "agent not signalled", ("reason", str(error)))


def main() -> int:
    """Guard the agent; see above for the arguments.

    The agent's number is not asked of the kernel: if it has died by now, the parent is a stranger.
    """
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    fd, agent = int(sys.argv[1]), int(sys.argv[2])
    for kept in [fd, *map(int, sys.argv[3:])]:
        os.set_inheritable(kept, False)  # not for the hooks
    return Guard(fd, agent).watch()


if __name__ == "__main__":
    sys.exit(main())
