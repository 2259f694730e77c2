"""Run the demotion hook in the guard: its commands in order, each in its own process group."""

import os
import select
import signal
import time

from agent import proctree
from agent.guard.log import ERROR, INFO, WARNING, LogWriter, write_stderr
from agent.guard.processes import IGNORED, POLL_S, now

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

GRACE_SHARE = 0.25
LONGEST_GRACE_S = 2.0
"""Time between TERM and KILL: a share of the hook's time, up to this."""

KILLED_WAIT_S = 0.2
"""How long the guard waits for killed processes to be gone before it goes on."""

OUTPUT_BYTES = 65536
"""How much of a hook's output is logged, and how much is read at a time at most."""


def parse_ids(field: bytes) -> "list[int]":
    """Parse numbers that are separated by commas."""
    return [int(number) for number in field.split(b",") if number]


class DemotionHook:
    """The demotion hook of a HOOK message.

    Args:
        fields: of the message, see main.py.

    Attributes:
        complete: whether the commands are the whole demotion.
    """

    def __init__(self, fields: "list[bytes]") -> None:
        self.directory = fields[0]
        self.user = int(fields[1])
        self.group = int(fields[2])
        self.groups = parse_ids(fields[3])
        self.complete = fields[4] == b"1"
        self.stdin = fields[5]
        env_count = int(fields[6])
        self.env = {}
        for pair in fields[7 : 7 + env_count]:
            key, _, value = pair.partition(b"=")
            self.env[key] = value
        rest = fields[7 + env_count :]
        self.pipe: tuple[int, int] | None = None  # one for all runs: repeats leak none
        self.commands = []
        while rest:
            arg_count = int(rest[0])
            self.commands.append(rest[1 : 1 + arg_count])
            rest = rest[1 + arg_count :]

    def become_user(self) -> None:
        """Switch this process to the user of the hook, irrevocably."""
        if self.user >= 0:
            os.setgroups(self.groups)
            os.setgid(self.group)
            os.setuid(self.user)

    def run(
        self,
        term_at: float,
        end_at: float,
        log: LogWriter,
        failed_groups: "set[int]",
        close_fds: "list[int]",
        *,
        meanwhile: "Callable[[], None]",
    ) -> bool:
        """Run every command, one after the other, until ``end_at``.

        Args:
            term_at: when the running command gets TERM.
            end_at: when it gets KILL.
            log: for the output and the results.
            failed_groups: receives the process group of each command that failed. Processes that a
                successful command leaves running are meant to run on a standby.
            close_fds: descriptors that no command may keep open, not even while its exec hangs.
            meanwhile: called repeatedly while a command runs.

        Returns:
            Whether all commands have succeeded.
        """
        room = OUTPUT_BYTES
        succeeded = True
        for argv in self.commands:
            names = (("hook", "secondary"), ("command", argv[0].decode(errors="replace")))
            if now() >= term_at:
                log.log(WARNING, "hook not started: no time left", *names)
                return False
            # The agent cannot send the deadline: how much time is left depends on why the guard demotes.
            self.env[b"FAILOVER_DEADLINE_MS"] = left_ms = b"%d" % max(0, 1000 * (term_at - now()))
            before, name, after = self.stdin.partition(b'"deadline_ms": ')
            self.stdin = before + name + (name and left_ms) + after.lstrip(b"0123456789")
            try:
                output, hook_output = self.pipe = self.pipe or os.pipe()
                os.set_blocking(output, False)
                command = _Command(self, argv, hook_output, close_fds)
            except OSError as error:
                log.log(ERROR, "hook could not be started", *names, ("reason", str(error)))
                succeeded = False
                continue
            result = None
            while result is None and now() < end_at + KILLED_WAIT_S:
                result = command.poll(term_at, end_at)
                meanwhile()
                read = log_output(output, room, log)
                room -= read
                if result is None and not read:
                    time.sleep(POLL_S)
            log.log_hook_output(b"", end=True)
            level = INFO if result == "exit 0" else WARNING
            shown = result or "killed, but not gone yet"
            log.log(level, "hook ended", *names, ("result", shown))
            if result != "exit 0":
                failed_groups.add(command.pid)
                succeeded = False
        return succeeded


class _Command:
    """One running command of the hook. It stays a zombie, so that its process id is not reused.

    Args:
        hook: has the user, directory, environment and stdin.
        argv: program and arguments.
        output: descriptor for its stdout and stderr.
        close_fds: descriptors that it must not keep open.

    Raises:
        OSError: the process could not be forked.
    """

    def __init__(
        self, hook: DemotionHook, argv: "list[bytes]", output: int, close_fds: "list[int]"
    ) -> None:
        self.termed = False
        self.pid = os.fork()
        """Also the id of its process group."""
        if self.pid:
            return
        try:
            for fd in close_fds:
                os.close(fd)
            os.setsid()
            stdin, end = os.pipe()
            os.set_blocking(end, False)  # a small pipe takes only a part
            os.write(end, hook.stdin)
            os.close(end)
            os.dup2(stdin, 0)
            os.dup2(output, 1)
            os.dup2(output, 2)
            os.chdir(hook.directory)
            hook.become_user()
            for number in (*IGNORED, signal.SIGXFSZ):
                signal.signal(number, signal.SIG_DFL)
            os.execve(argv[0], argv, hook.env)  # noqa: S606 - the agent has checked it
        except (OSError, ValueError, OverflowError) as error:
            write_stderr(f"could not be started: {error}\n".encode(errors="replace"))
        finally:
            os._exit(127)

    def poll(self, term_at: float, end_at: float) -> "str | None":
        """Send TERM at ``term_at`` and KILL at ``end_at``; return how it ended, or None."""
        # WNOWAIT: while it is a zombie its number cannot be given to another process.
        ended = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if ended is not None:
            return f"{'exit' if ended.si_code == os.CLD_EXITED else 'signal'} {ended.si_status}"
        if now() >= end_at:
            proctree.signal_groups({self.pid}, signal.SIGKILL)
            try:
                os.kill(self.pid, signal.SIGKILL)  # its process group may not exist yet
            except OSError:
                pass
        elif now() >= term_at and not self.termed:
            self.termed = True
            proctree.signal_groups({self.pid}, signal.SIGTERM)
        return None


def log_output(output: int, room: int, log: LogWriter) -> int:
    """Read what a hook has written and log up to ``room`` bytes of it; return how much was read."""
    read = 0
    for _ in range(OUTPUT_BYTES // select.PIPE_BUF):
        try:
            data = os.read(output, select.PIPE_BUF)
        except BlockingIOError:
            break
        log.log_hook_output(data[: max(0, room - read)])
        read += len(data)
    return read
