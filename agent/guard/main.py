"""The guard's main loop: receives the agent's messages, and demotes when a deadline passes (R12).

Arguments: the descriptor of a SOCK_SEQPACKET socket, the agent's process id, the descriptor of the program,
and further descriptors to keep open. The fields of a message are separated by NUL; moments are CLOCK_BOOTTIME
seconds. The guard answers each message with the message's number:

    ARM      number hook_at kill_at agent_at running(comma) groups(comma) workload cgroup
             roots(comma, pid:start) mark epoch state_path state_text
    HOOK     number directory user group groups(comma) complete stdin nenv env... {nargs args...}...
    RELEASE  number document helper...
    OFF      number
    LOG      number min_level form group session role epoch

ARM: ``running``, ``groups`` and ``workload`` are process groups: of a running hook, of hooks that have run,
and of the command of ``exec``. ``cgroup`` contains the whole tenure; the cgroups of its hooks and workload
are below it. ``hook_at`` is "inf" while the agent runs its demotion hook: then the guard kills the tenure at
``kill_at`` and demotes at ``agent_at``, and the agent may run its fence command in between.

HOOK: ``complete`` is 0 if the commands are not the whole demotion.

RELEASE: ``helper`` is the command that releases the role, ``document`` its input. Without a document, or
without an epoch, the lease has to expire.

LOG: ``min_level`` and ``form`` are those of the agent's log; the rest describes the agent.

Only OFF disarms the guard. Exit code: 0 if nothing was armed at the end of the connection, else ``ACTED``.
"""

import os
import select
import signal
import sys
import time

from agent import proctree
from agent.guard import MESSAGE_BYTES
from agent.guard.hook import GRACE_SHARE, KILLED_WAIT_S, LONGEST_GRACE_S, DemotionHook, parse_ids
from agent.guard.log import ERROR, WARNING, LogWriter
from agent.guard.processes import (
    IGNORED,
    KILL_S,
    POLL_S,
    ProcessTree,
    Worker,
    can_fork,
    now,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

STATE_WAIT_S = 0.1
"""How long the demotion waits for the state file: a dead network file system never answers."""

ROOM_S = 0.5
"""If a tenure has used up all tasks, how long the guard waits until its killed processes are reaped."""

FREE_TASKS = 8
"""How many tasks an ordinary demotion script uses at a time: a pipeline or two."""

LEAST_TASKS = 2
"""With fewer free tasks no hook can be forked, or its program cannot be executed as its user."""

RETRY_SHARE = 0.1
"""A demotion hook that has failed is repeated after this share of its budget, as by the agent."""

SWEEP_S = 1.0
"""The least time for the last search and killing, even after the deadline."""

AGENT_DEATH_WAIT_S = 1.0
"""How long to wait until a killed agent is gone."""

HELPER_WAIT_S = 30.0
"""How long after the demotion's deadline the release helper waits for the guard's permission."""

HELPER_FD = 3
"""The descriptor from which the release helper reads the document."""

LONGEST_POLL_S = 0.25
"""How often an armed guard reads the clock: the timeout of poll() does not count suspended time."""

ACTED = 3


class Guard:
    """Keeps the agent's newest messages, and demotes in the agent's place.

    Args:
        fd: the socket to the agent.
        agent: the agent's process id.
        claims: further descriptors that this process keeps open, and that its children must close.
    """

    def __init__(self, fd: int, agent: int, claims: "tuple[int, ...]" = ()) -> None:
        self.fd = fd
        self.agent = agent
        self.close_fds = [fd, *claims]
        self.hook_at = self.kill_at = self.agent_at = float("inf")
        self.budget_s = 0.0
        self.running: list[int] = []
        self.workload: list[int] = []
        self.cgroup = b""
        self.tenure = ProcessTree(set(), set())
        self.epoch: int | None = None
        self.state: tuple[bytes, bytes] | None = None
        self.hook: DemotionHook | None = None
        self.document = b""
        self.helper: list[bytes] = []
        self.tenure_killed = self.step_has_failed = False
        self.sweeper: object = None
        self.log = LogWriter()
        self.role = "Primary"
        self.role_epoch: int | None = None

    @property
    def armed(self) -> bool:
        """Whether there is a tenure to demote."""
        return self.agent_at != float("inf")

    @property
    def due_at(self) -> float:
        """When the guard has to act next."""
        return self.agent_at if self.tenure_killed else min(self.hook_at, self.kill_at)

    def run(self) -> int:
        """Receive messages until the agent is gone or a demotion is done; return the exit code."""
        poll = select.poll()
        poll.register(self.fd, select.POLLIN)
        while True:
            due_s = self.due_at - now()
            wait_s = min(max(0.0, due_s), LONGEST_POLL_S)
            wait_ms = None if due_s == float("inf") else int(wait_s * 1000) + 1
            if poll.poll(wait_ms):
                # Always first: a newer deadline may have arrived while this process was frozen.
                if not self.receive():
                    if not self.armed:
                        return 0
                    self.demote("it is dead")
                    return ACTED
            elif now() >= self.due_at:
                if self.hook_at == float("inf") and now() < self.agent_at:
                    self.kill_tenure_only()
                    continue
                self.demote("it has not renewed its deadline")
                return ACTED

    def receive(self) -> bool:
        """Receive and answer one message; return False if the agent has closed the connection."""
        try:
            message = os.read(self.fd, MESSAGE_BYTES)
        except ConnectionResetError:
            return True  # the agent left answers unread; its last messages can still be received
        if not message:
            return False
        word, number, *fields = message.split(b"\0")
        try:
            self.on_message(word, fields)
        except (ValueError, IndexError):
            return True  # without an answer the agent replaces this guard
        try:
            os.write(self.fd, number)
        except OSError:
            pass  # the agent is dead, as the next read shows
        return True

    def on_message(self, word: bytes, fields: "list[bytes]") -> None:
        """Apply one message."""
        if word in {b"ARM", b"OFF"}:
            self.stop_sweep()
        if word == b"ARM":
            self.arm(fields)
        elif word == b"OFF":
            self.hook_at = self.kill_at = self.agent_at = float("inf")
            self.budget_s = 0.0
        elif word == b"HOOK":
            self.hook = DemotionHook(fields)
        elif word == b"RELEASE":
            self.document, self.helper = fields[0], fields[1:]
        elif word == b"LOG":
            level, form, group, session, role, epoch = (
                field.decode(errors="replace") for field in fields
            )
            self.log.min_level, self.log.json = int(level), form == "json"
            self.log.common_fields = [("group", group), ("session", session)]
            self.role, self.role_epoch = role, int(epoch) if epoch else None

    def stop_sweep(self) -> None:
        """Stop a running sweep: the mark that it searches for may now belong to a new tenure."""
        if isinstance(self.sweeper, Worker):
            self.sweeper.wait_or_kill(now())
            self.sweeper = None

    def arm(self, fields: "list[bytes]") -> None:
        """Store the newest deadlines, and the processes to kill when they pass."""
        hook_at, kill_at, agent_at = (float(field) for field in fields[:3])
        if hook_at != float("inf"):
            self.budget_s = max(self.budget_s, kill_at - hook_at)
        self.running, self.workload = parse_ids(fields[3]), parse_ids(fields[5])
        self.cgroup = fields[6]
        roots = [root.partition(b":") for root in fields[7].split(b",") if root]
        self.tenure = ProcessTree(
            {(int(pid), int(start)) for pid, _, start in roots},
            {*self.running, *parse_ids(fields[4]), *self.workload},
            fields[8],
            fields[6],
        )
        self.epoch = int(fields[9]) if fields[9] else None
        self.state = (fields[10], fields[11]) if fields[10] else None
        self.tenure_killed = False
        self.hook_at, self.kill_at, self.agent_at = hook_at, kill_at, max(kill_at, agent_at)

    # -- the demotion ---------------------------------------------------------------------------

    def try_step(self, name: str, act: "Callable[..., object]", *args: object) -> object:
        """Run one step. An exception is logged, and does not prevent the next step."""
        try:
            return act(*args)
        except Exception as error:  # noqa: BLE001 - the next step may be the one that stops the workload
            self.step_has_failed = True
            self.log_failure(name, error)
            return None

    def log_failure(self, name: str, error: Exception) -> None:
        """Log a step that failed, if that is possible."""
        try:
            reason = f"{type(error).__name__}: {error}"
            self.log.log(ERROR, "guard step failed", ("step", name), ("reason", reason))
        except Exception:  # noqa: BLE001, S110 - no step may fail because of a log line
            pass

    def kill_tenure_only(self) -> None:
        """Kill the tenure once, if a demotion takes too long: the agent may still fence, and the hook may go on."""
        if self.tenure_killed or now() < self.kill_at:
            return
        self.tenure_killed = True
        self.try_step("kill the tenure", self.tenure.kill, now())
        self.sweeper = self.try_step("kill the tenure", self.start_sweep, now())
        self.try_step("open the log", self.log.start_writer, self.close_fds)
        self.try_step("log", self.log.log, WARNING, "processes killed at the limit of the demotion")

    def demote(self, why: str) -> None:
        """Demote in the agent's place, and have the role released if that has succeeded."""
        self.try_step("stop the agent", self.signal_agent, signal.SIGSTOP)
        started_at = now()
        late = started_at >= self.kill_at
        kill_at = started_at if late else self.kill_at
        end_at = max(kill_at, started_at + self.budget_s / 2)
        if late:
            self.try_step("kill the tenure", self.tenure.kill, started_at)
        self.try_step("make room", self.make_room, (started_at + end_at) / 2)
        self.try_step("kill running hooks", self.tenure.subtree(self.running).kill, started_at)
        self.try_step("find the tenure", self.tenure.find)  # while parents of its processes live
        self.try_step("open the log", self.log.start_writer, self.close_fds)
        go_fd = None
        if not late:
            go_fd = self.try_step("start the helper", self.start_helper, end_at)
        state = self.try_step("write the state file", Worker, self.write_state, self.close_fds)
        if isinstance(state, Worker):  # the hook finds the new state, unless it cannot be written
            self.try_step("write the state file", state.wait, now() + STATE_WAIT_S)
        self.try_step("log", self.log_demotion, why)
        self.try_step("stop the workload", self.stop_workload, (now() + kill_at) / 2)
        if self.workload:  # it may have used up all tasks when it got TERM
            self.try_step("make room", self.make_room, (now() + end_at) / 2)
        done = self.try_step("demotion hook", self.run_hook, end_at)
        gone = self.try_step("kill the tenure", self.kill_tenure, kill_at if done else now())
        self.try_step("kill the agent", self.signal_agent, signal.SIGKILL)
        if not done:
            end_at = max(end_at, now() + self.budget_s / 2)  # late is better than never
            done = self.try_step("demotion hook", self.repeat_hook, end_at)
            gone = self.try_step("kill the tenure", self.kill_tenure, kill_at)
        dead = self.try_step("kill the agent", self.wait_for_agent_death)
        if not self.tenure.groups and (self.hook is None or not self.hook.commands):
            # Only the state file makes a workload inactive.
            done = self.try_step("write the state file", self.finish_state, state) and done
        if isinstance(go_fd, int) and done and gone and dead and not self.step_has_failed:
            self.try_step("release the role", os.write, go_fd, b"1")
        left = ("left_of_limit_s", round(self.kill_at - now(), 3))
        self.try_step("log", self.log.log, WARNING, "demoted by the guard, agent killed", left)
        self.try_step("write the state file", self.finish_state, state)
        self.try_step("close the log", self.log.close)

    def make_room(self, end_at: float) -> None:
        """If no hook can be forked, kill the tenure and the agent now.

        The tenure may have used up all tasks. Killed processes still count until they are reaped, and an
        agent that is only stopped reaps none. Waits ``ROOM_S`` for all tasks that a hook may need, and then
        until ``end_at`` for ``LEAST_TASKS``.
        """
        become = self.hook.become_user if self.hook is not None else lambda: None
        enough_at = now() + ROOM_S
        probe_s = min(KILL_S, (end_at - now()) / 4)
        while not can_fork(become, self.close_fds, FREE_TASKS, now() + probe_s):
            if now() >= end_at or (
                now() >= enough_at
                and can_fork(become, self.close_fds, LEAST_TASKS, now() + probe_s)
            ):
                break
            self.tenure.kill(min(end_at, now() + ROOM_S))
            self.signal_agent(signal.SIGKILL)
            try:
                self.start_sweep(now()).wait_or_kill(now() + KILL_S)
            except OSError:
                pass  # not even one task is free: try again
            time.sleep(POLL_S)

    def log_demotion(self, why: str) -> None:
        """Log the change of role, or that a demotion of the agent is repeated."""
        self.log.log(
            WARNING,
            "role changed" if self.role != "Secondary" else "demotion taken over",
            ("before", self.role),
            ("after", "Secondary"),
            ("epoch", self.role_epoch),
            ("reason", f"the guard demotes in the place of the agent: {why}"),
        )

    def stop_workload(self, end_at: float) -> None:
        """Send TERM to the workload's tree, and KILL to what is still alive at ``end_at``."""
        if not self.workload:
            return
        tree = self.tenure.subtree(self.workload)
        for process in tree.find():
            proctree.try_to_send(process, signal.SIGTERM)
        while tree.find() and now() < end_at:
            time.sleep(POLL_S)
        tree.kill(end_at)
        self.tenure.roots |= tree.roots
        if not self.cgroup:
            return
        killing = Worker(lambda: self.kill_cgroup(self.cgroup + b"/workload"), self.close_fds)
        self.step_has_failed |= not killing.wait_or_kill(now() + KILLED_WAIT_S)

    def kill_cgroup(self, directory: bytes) -> bool:
        """Send KILL to a cgroup and those below it. May block."""
        try:
            fd = os.open(directory + b"/cgroup.kill", os.O_WRONLY)
            os.write(fd, b"1")
            os.close(fd)
        except FileNotFoundError:
            return True  # a cgroup that is gone was empty
        except OSError as error:
            self.log.log(ERROR, "cgroup not killed", ("reason", str(error)))
            return False
        return True

    def run_hook(self, end_at: float) -> bool:
        """Run the demotion hook; return whether it succeeded and was the whole demotion."""
        if self.hook is None:
            return False
        term_at = end_at - min(GRACE_SHARE * (end_at - now()), LONGEST_GRACE_S)
        args = (self.log, self.tenure.groups, self.close_fds)
        done = self.hook.run(term_at, end_at, *args, meanwhile=self.kill_tenure_only)
        return done and self.hook.complete

    def repeat_hook(self, end_at: float) -> bool:
        """Repeat a demotion hook that has failed; return as ``run_hook`` does.

        The hook may have lacked tasks, memory or open files that the tenure used, which is dead now.
        """
        if self.hook is None or not self.hook.complete:
            return False
        pause_s = RETRY_SHARE * self.budget_s
        while now() + 2 * pause_s < end_at:
            time.sleep(pause_s)
            if self.run_hook(end_at):
                return True
        return False

    def kill_tenure(self, kill_at: float) -> bool:
        """Kill the tenure, first the processes found without blocking; return whether none is left."""
        self.try_step("kill the tenure", self.tenure.kill, now())
        fork_by = now() + min(ROOM_S, self.budget_s / 8)
        while True:
            try:
                killed = self.start_sweep(kill_at).wait_or_kill(max(kill_at, now() + SWEEP_S))
            except OSError:
                self.signal_agent(signal.SIGKILL)
                if now() >= fork_by:  # nothing can be forked, not even a hook
                    return self.tenure.kill(kill_at, may_block=True, skip_stuck=True)
            else:
                if killed or now() >= kill_at:
                    return killed  # else it was killed early, perhaps by the OOM killer: try again
            time.sleep(POLL_S)

    def start_sweep(self, end_at: float) -> Worker:
        """Start ``sweep`` in a forked process, until ``end_at`` or for ``SWEEP_S``."""
        end_at = max(end_at, now() + SWEEP_S)
        return Worker(lambda: self.sweep(end_at), self.close_fds)

    def sweep(self, end_at: float) -> bool:
        """Kill also the processes that only their environment or cgroup identifies. May block."""
        killed = not self.cgroup or self.kill_cgroup(self.cgroup)
        # A blocking environment must not keep other processes alive, so those are killed first.
        self.tenure.kill(now(), may_block=True, skip_stuck=True)
        return self.tenure.kill(end_at, may_block=True) and killed

    def wait_for_agent_death(self) -> bool:
        """Wait until the agent is gone, which is when this process gets another parent."""
        end_at = now() + AGENT_DEATH_WAIT_S
        while os.getppid() == self.agent and now() < end_at:
            time.sleep(POLL_S)
        return os.getppid() != self.agent

    def finish_state(self, state: object) -> bool:
        """Wait for the state file, and write it again if that has failed; return whether it is written.

        If no process can be forked for it, this one writes it: a dead disk then delays nothing else.
        """
        end_at = now() + STATE_WAIT_S
        while not isinstance(state, Worker) or state.ok is False:
            try:
                state = Worker(self.write_state, self.close_fds)
            except OSError:
                if now() >= end_at:
                    return self.write_state()
                time.sleep(POLL_S)
        return state.wait_or_kill(now() + STATE_WAIT_S)

    def write_state(self) -> bool:
        """Replace the state file: from here on sidecars read Secondary. May block."""
        if self.state is None:
            return True
        path, text = self.state
        try:
            if os.path.lexists(path + b".guard"):  # a link, or a file of another user
                os.unlink(path + b".guard")
            fd = os.open(path + b".guard", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
            os.fchmod(fd, 0o644)  # sidecars of other users read it, whatever the umask is
            while text:
                text = text[os.write(fd, text) :]
            os.close(fd)
            os.replace(path + b".guard", path)
        except OSError as error:
            self.log.log(ERROR, "state file not written", ("reason", str(error)))
            return False
        return True

    def start_helper(self, end_at: float) -> "int | None":
        """Start the helper that releases the role; return the descriptor on which it waits for one byte.

        Its imports run while the hook does. If this process ends first, the helper does nothing.
        """
        if not self.document or self.epoch is None:
            return None
        wait_s = end_at - now() + HELPER_WAIT_S
        argv = [*self.helper, b"%d" % self.epoch, b"%.3f" % wait_s]
        waiting, go_fd = os.pipe()
        self.close_fds.append(go_fd)
        document = os.memfd_create("release")
        os.write(document, self.document)
        if not os.fork():
            try:
                for fd in self.close_fds:
                    os.close(fd)  # an exec may hang for ever
                os.setsid()
                os.dup2(waiting, 0)
                if document == HELPER_FD:
                    os.set_inheritable(document, True)
                else:
                    os.dup2(document, HELPER_FD)
                os.execv(argv[0], argv)  # noqa: S606 - our own program
            finally:
                os._exit(127)
        os.close(waiting)
        os.close(document)
        return go_fd

    def signal_agent(self, number: int) -> None:
        """Signal the agent if it is still the parent; else its process id may have been reused."""
        if os.getppid() == self.agent:
            os.kill(self.agent, number)


def main() -> int:
    """Run the guard; the arguments are described above.

    The agent's process id is an argument: if the agent is dead by now, getppid() is another process.
    """
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    fd, agent, program, *claims = map(int, sys.argv[1:])
    os.close(program)
    for kept in (fd, *claims):
        os.set_inheritable(kept, False)  # hooks must not have them
    guard = Guard(fd, agent, tuple(claims))
    try:
        proctree.open_proc()  # from now on nobody can mount something over it
    except OSError:
        pass  # each search tries again
    while True:
        try:
            return guard.run()
        except Exception as error:  # noqa: BLE001 - a guard that ends protects nobody
            guard.log_failure("main loop", error)
            time.sleep(POLL_S)
