"""The guard (R12), as a process beside a small agent that freezes, hangs, dies, or ends in order.

The agent is a child of a host process that adopts orphans, as an init does: it reports how the guard
has ended, and it is the new parent that the guard must never signal.
"""

import fcntl
import importlib
import json
import marshal
import os
import queue
import re
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from agent import proctree
from agent.drivers.guardian.program import MODULES, bootstrap, program
from agent.guard import hook as guard_hook
from agent.guard import log as guard_log
from agent.guard import main as guard
from agent.guard.processes import IGNORED, ProcessTree
from tests.cgroups import new_cgroup
from tests.hung import dead_disk, freezer, stuck_thread

LIMIT_S = 60.0
"""For what takes milliseconds, on a busy machine."""

LATE_S = 1.0
"""By how much this machine may be late with what has a moment."""

FAILS_S = 2.0
"""The budget of a demotion that fails: it is repeated until that is over."""

MARK = uuid.uuid4().hex
"""The mark of a tenure's processes. Tests that run in parallel have others, so none kills the processes of another."""

RSS_KIB = 12 * 1024
GUARD = (sys.executable, "-I", "-S", "-c", bootstrap())

PROGRAM = program()

HOST = """
import ctypes, json, os, signal, subprocess, sys
argv = json.loads(sys.argv[1])
claims = list(map(int, sys.argv[3:]))
ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER

def say(what):
    os.write(1, f"{json.dumps(what)}{chr(10)}".encode())  # at once: two processes write

def agent():
    import select, socket
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    number = 0
    program = os.open(sys.argv[2], os.O_RDONLY)
    for line in sys.stdin:
        what, *rest = json.loads(line)
        result = None
        if what == "guard":
            process = subprocess.Popen(
                [*argv, *map(str, (theirs.fileno(), os.getpid(), program, *claims))],
                pass_fds=[theirs.fileno(), program, *claims], stdin=subprocess.DEVNULL, cwd="/",
                start_new_session=True,
            )
            theirs.close()
            os.close(program)
            result = process.pid
        elif what == "send":
            number += 1
            word, *fields = rest
            message = chr(0).join([word, str(number), *fields])
            ours.send(message.encode(errors="surrogateescape"))
        elif what == "answers":
            while int(ours.recv(64)) < number:
                pass
        elif what == "readable":
            select.select([ours], [], [])
        elif what == "hang":
            say(["done", None])
            while True:
                pass
        say(["done", result])
    os._exit(0)

pid = os.fork()
if pid == 0:
    agent()
for fd in (0, *claims):
    os.close(fd)
say(["agent", pid])
while True:
    try:
        pid, status = os.wait()
    except ChildProcessError:
        break
    say(["ended", pid, os.waitstatus_to_exitcode(status)])
"""


def now() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def until(condition: Callable[[], object]) -> None:
    end_at = now() + LIMIT_S
    while not condition():
        assert now() < end_at, "it has not happened"
        time.sleep(0.005)


def state_of(pid: int) -> str:
    """R, S, T (stopped), Z; empty for no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]
    except OSError:
        return ""


def lives(pid: int) -> bool:
    return state_of(pid) not in {"", "Z", "X"}


def children_of(pid: int) -> list[int]:
    """In the order of their start."""
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


class Host:
    """A host with an agent on it, and the agent's guard."""

    def __init__(
        self,
        *,
        argv: Sequence[str] = GUARD,
        program: bytes = PROGRAM,
        stderr: int | None = None,
        before: Callable[[], None] | None = None,
        claims: Sequence[int] = (),
    ) -> None:
        self._program = tempfile.NamedTemporaryFile()  # noqa: SIM115 - until close()
        self._program.write(program)
        self._program.flush()
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-S", "-c", HOST, json.dumps(argv), self._program.name),
                *map(str, claims),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            preexec_fn=before,  # noqa: PLW1509 - one call of the kernel
            pass_fds=claims,
        )
        self.pid = self._process.pid
        self._lines: queue.Queue[list[Any]] = queue.Queue()
        self._ended: dict[int, int] = {}
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        self.agent: int = self._next("agent")[1]
        self.guard = 0

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(json.loads(line))

    def _next(self, word: str) -> list[Any]:
        while True:
            line = self._lines.get(timeout=LIMIT_S)
            if line[0] == "ended":
                self._ended[line[1]] = line[2]
            if line[0] == word:
                return line

    def command(self, *words: Any) -> Any:
        """Have the agent run a command, and return its result."""
        self._write(words)
        return self._next("done")[1]

    def _write(self, words: Sequence[Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(words) + "\n")
        self._process.stdin.flush()

    def start_guard(self) -> None:
        self.guard = self.command("guard")

    def send(self, *words: str) -> None:
        """Send a message to the guard, and wait for its answer."""
        self.command("send", *words)
        self.command("answers")

    def send_last(self, *words: str) -> None:
        """Send a message on which the guard acts at once: the agent may be stopped before it answers."""
        self._write(["send", *words])

    def exit(self) -> None:
        """The agent ends in order."""
        assert self._process.stdin is not None
        self._process.stdin.close()

    def signal(self, pid: int, number: int) -> None:
        os.kill(pid, number)
        if number == signal.SIGSTOP:
            until(lambda: state_of(pid) == "T")

    def code(self, pid: int) -> int:
        """How a process of the host has ended."""
        while pid not in self._ended:
            self._next("ended")
        return self._ended[pid]

    def close(self) -> None:
        for pid in (self.agent, self.guard):
            if pid and pid not in self._ended:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self._process.kill()
        self._process.wait()
        self._program.close()
        self._reader.join()  # all that have its stdout are gone
        with suppress(BrokenPipeError):
            self._process.__exit__(None, None, None)


@pytest.fixture
def new_host() -> Iterator[Callable[..., Host]]:
    hosts = []

    def new(*, start: bool = True, **options: Any) -> Host:
        host = Host(**options)
        hosts.append(host)
        if start:
            host.start_guard()
        return host

    yield new
    for host in hosts:
        host.close()


@pytest.fixture
def host(new_host: Callable[..., Host]) -> Host:
    return new_host()


Run = Callable[[str], subprocess.Popen[bytes]]


@pytest.fixture
def run() -> Iterator[Run]:
    """Start a shell script in a process group of its own, and wait until it prints that it is ready."""
    started = []

    def start(text: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            ["/bin/sh", "-c", text], stdout=subprocess.PIPE, start_new_session=True
        )
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        return process

    yield start
    for process in started:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with process:
            pass


IDLE = "echo ready; exec sleep 1000"
STUBBORN = "trap '' TERM; echo ready; while :; do sleep 0.01; done"


def arm(
    hook_at: float,
    kill_at: float,
    *,
    running: int | str = "",
    groups: int | str = "",
    workload: int | str = "",
    cgroup: str = "",
    agent_at: float | None = None,
    roots: str = "",
    mark: str = "",
    epoch: int | str = "",
    state: tuple[object, str] = ("", ""),
) -> list[str]:
    moments = [repr(at) for at in (hook_at, kill_at, kill_at if agent_at is None else agent_at)]
    fields = (running, groups, workload, cgroup, roots, mark, epoch, *state)
    return ["ARM", *moments, *map(str, fields)]


def hook(
    *commands: Sequence[object],
    env: Sequence[str] = ("PATH=/usr/bin:/bin",),
    directory: object = "/",
    ids: tuple[int, int, str] = (-1, -1, ""),
    stdin: str = "",
    complete: bool = True,
) -> list[str]:
    words: list[object] = ["HOOK", directory, *ids, int(complete), stdin, len(env), *env]
    for command in commands:
        words += [len(command), *command]
    return [str(word) for word in words]


def sh(text: str) -> list[str]:
    return ["/bin/sh", "-c", text]


# --- what it does -----------------------------------------------------------------------------


def test_a_frozen_agent_is_demoted_in_order_and_by_kill_at(
    host: Host, run: Run, tmp_path: Path
) -> None:
    seen, state_file = tmp_path / "seen", tmp_path / "state"
    state_file.write_text("Primary")
    before = state_file.stat().st_ino
    running, workload, left = run(STUBBORN), run(STUBBORN), run(IDLE)
    pids = [host.agent, running.pid, workload.pid, left.pid]
    states = "; ".join(f"cut -d' ' -f3 /proc/{pid}/stat" for pid in pids)
    look = f"(cut -d' ' -f1 /proc/uptime; {states}; cat {state_file}) >{seen}"
    host.send(*hook(sh(look)))
    hook_at = now() + LATE_S
    kill_at = hook_at + 4.0
    host.send(
        *arm(
            hook_at,
            kill_at,
            running=running.pid,
            groups=left.pid,
            workload=workload.pid,
            state=(state_file, "Secondary"),
        )
    )
    host.signal(host.agent, signal.SIGSTOP)
    until(lambda: not lives(running.pid))
    assert now() >= hook_at
    until(lambda: not lives(workload.pid))
    assert hook_at + 1.9 <= now() <= hook_at + 2.0 + LATE_S
    assert host.code(host.guard) == guard.ACTED
    assert now() < kill_at
    assert host.code(host.agent) == -signal.SIGKILL
    for process in (running, workload, left):
        assert process.wait(LIMIT_S) == -signal.SIGKILL
    uptime, agent, *others, state = seen.read_text().split()
    assert float(uptime) >= hook_at + 1.9
    assert (agent, others, state) == ("T", ["Z", "Z", "S"], "Secondary")
    assert state_file.stat().st_ino != before, "it was not replaced as a whole"
    assert not state_file.with_name("state.guard").exists()


def test_a_workload_that_ends_at_term_delays_nothing(host: Host, run: Run, tmp_path: Path) -> None:
    workload = run(IDLE)
    host.send(*hook(sh(f"touch {tmp_path}/done")))
    hook_at = now() + LATE_S
    host.send(*arm(hook_at, hook_at + 2 * LIMIT_S, workload=workload.pid))
    host.signal(host.agent, signal.SIGSTOP)
    assert workload.wait(LIMIT_S) == -signal.SIGTERM
    assert host.code(host.guard) == guard.ACTED
    assert now() < hook_at + LIMIT_S
    assert (tmp_path / "done").exists()


def test_the_guard_demotes_at_once_when_the_agent_is_killed(host: Host, tmp_path: Path) -> None:
    host.send(*hook(sh(f"touch {tmp_path}/done")))
    hook_at = now() + LIMIT_S
    host.send(*arm(hook_at, hook_at + LIMIT_S))
    os.kill(host.agent, signal.SIGKILL)
    assert host.code(host.guard) == guard.ACTED
    assert (tmp_path / "done").exists()
    assert now() < hook_at
    assert lives(host.pid)


def test_a_hung_agent_is_demoted(host: Host, tmp_path: Path) -> None:
    host.send(*hook(sh(f"touch {tmp_path}/done")))
    hook_at = now() + LATE_S
    host.send(*arm(hook_at, hook_at + LIMIT_S))
    host.command("hang")
    assert host.code(host.guard) == guard.ACTED
    assert now() >= hook_at
    assert (tmp_path / "done").exists()
    assert host.code(host.agent) == -signal.SIGKILL


def test_while_the_agent_demotes_the_guard_acts_at_kill_at_only(
    host: Host, run: Run, tmp_path: Path
) -> None:
    """The guard ran no hook then, so an agent that froze before its own hook left a service active for ever."""
    running = run(IDLE)
    host.send(*hook(sh(f"cut -d' ' -f3 /proc/{running.pid}/stat >{tmp_path}/seen")))
    host.send(*arm(now() + LIMIT_S, now() + 2 * LIMIT_S))  # so that it knows the budget
    kill_at = now() + 0.5
    host.send_last(*arm(float("inf"), kill_at, running=running.pid))
    assert host.code(host.guard) == guard.ACTED
    assert now() >= kill_at
    assert running.wait(LIMIT_S) == -signal.SIGKILL
    assert host.code(host.agent) == -signal.SIGKILL
    assert (tmp_path / "seen").read_text().strip() == "Z"


def test_the_hook_runs_if_the_agent_dies_while_it_demotes(host: Host, tmp_path: Path) -> None:
    host.send(*hook(sh(f"touch {tmp_path}/done")))
    host.send(*arm(float("inf"), now() + LIMIT_S))
    os.kill(host.agent, signal.SIGKILL)
    assert host.code(host.guard) == guard.ACTED
    assert (tmp_path / "done").exists()


def test_a_late_guard_kills_the_tenure_first_and_still_runs_the_hook(
    host: Host, run: Run, tmp_path: Path
) -> None:
    left, workload = run(IDLE), run(STUBBORN)
    pids = (left.pid, workload.pid)
    look = "; ".join(f"cut -d' ' -f3 /proc/{pid}/stat" for pid in pids)
    host.send(*hook(sh(f"({look}) >{tmp_path}/seen")))
    host.send_last(*arm(now() - LIMIT_S, now() - 0.1, groups=left.pid, workload=workload.pid))
    assert host.code(host.guard) == guard.ACTED
    assert (tmp_path / "seen").read_text().split() == ["Z", "Z"]


@pytest.mark.parametrize("by_mark", [False, True])
def test_a_hook_that_begins_shortly_before_kill_at_keeps_no_process_of_the_tenure_alive(
    host: Host, run: Run, tmp_path: Path, *, by_mark: bool
) -> None:
    """The hook has half of its budget nevertheless, and the tenure was killed only after that: past L."""
    left = run(f"export {proctree.MARK}={MARK}; exec /bin/sh -c '{IDLE}'" if by_mark else IDLE)
    seen = tmp_path / "seen"
    waits = f"until grep -q ') Z' /proc/{left.pid}/stat; do sleep 0.01; done; touch {seen}"
    host.send(*hook(sh(waits)))
    host.send(*arm(now() + LIMIT_S, now() + 1.5 * LIMIT_S))  # so that it knows the budget
    kill_at = now() + 0.5
    found_by = {"mark": MARK} if by_mark else {"groups": left.pid}
    host.send(*arm(float("inf"), kill_at, **found_by))
    os.kill(host.agent, signal.SIGKILL)
    assert host.code(host.guard) == guard.ACTED
    assert now() < kill_at + 2 * LATE_S
    assert seen.exists()


def test_a_late_guard_kills_the_tenure_before_it_looks_for_free_tasks(
    new_host: Callable[..., Host], run: Run, tmp_path: Path
) -> None:
    left = run(IDLE)
    look = f"""
def can_fork(*_):
    with open("/proc/{left.pid}/stat") as stat, open("{tmp_path}/seen", "w") as seen:
        seen.write(stat.read())
    return True
"""
    host = new_host(program=build_program_with(look))
    host.send_last(*arm(now() - LIMIT_S, now() - 0.1, groups=left.pid))
    assert host.code(host.guard) == guard.ACTED
    assert (tmp_path / "seen").read_text().rpartition(") ")[2][0] == "Z"


PROBE = """
import time
from pathlib import Path
from agent.guard.processes import KILL_S, can_fork, now
begun_at = now()
assert can_fork(lambda: time.sleep(1000), [], 8, begun_at + KILL_S / 5)
assert now() - begun_at < KILL_S
print(Path("/proc/thread-self/children").read_text())
"""


def test_a_probe_for_free_tasks_ends_in_its_time_and_leaves_no_zombie() -> None:
    """It always had 0.1 s, which may be all that there is, and stayed a zombie: a task.

    In a process of its own, which adopts no orphans.
    """
    command = [sys.executable, "-c", PROBE]
    result = subprocess.run(command, check=False, capture_output=True, text=True, timeout=30)
    assert (result.returncode, result.stdout.strip()) == (0, ""), result.stderr


# --- what the hook gets -----------------------------------------------------------------------


LOG = ("LOG", "20", "json", "7", "host-a", "Primary", "7")


def events(output: Path) -> list[dict[str, Any]]:
    """The log of a guard in JSON."""
    return [json.loads(line) for line in output.read_text().splitlines()]


def test_the_hook_has_the_configured_environment_user_and_files_only(
    new_host: Callable[..., Host], tmp_path: Path
) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs: root: run as root")
    output = tmp_path / "stderr"
    facts = (
        "id -u; id -g; id -G; pwd; cat; ls /proc/self/fd | wc -l;"
        " cut -d' ' -f5,6 /proc/$$/stat; echo $$; grep SigIgn /proc/self/status"
    )
    with output.open("wb") as stderr:
        host = new_host(stderr=stderr.fileno())
    host.send(*LOG)
    host.send(
        *hook(
            ["/usr/bin/env"],
            sh(facts),
            env=["A=1", "B==2", "C=", "D=a b\nc"],
            directory="/usr",
            ids=(65534, 65533, "65532,65531"),
            stdin='{"event": "secondary"}\n',
        )
    )
    host.send(*arm(now() + LIMIT_S, now() + 2 * LIMIT_S))
    os.kill(host.agent, signal.SIGKILL)
    assert host.code(host.guard) == guard.ACTED
    lines = [e["line"] for e in events(output) if e["message"] == "hook output"]
    assert lines[:5] == ["A=1", "B==2", "C=", "D=a b", "c"]
    assert lines.pop(5).startswith("FAILOVER_DEADLINE_MS=")
    uid, gid, gids, cwd, stdin, files, leads, pid, ignored = lines[5:]
    assert (uid, gid, cwd, stdin) == ("65534", "65533", "/usr", '{"event": "secondary"}')
    assert sorted(gids.split(), reverse=True) == ["65533", "65532", "65531"]
    assert files == "4", "the three, and the folder that ls reads"
    assert leads == f"{pid} {pid}", "it leads its own group and session"
    ours = (*IGNORED, signal.SIGXFSZ)  # what else is ignored is inherited from our shell
    assert not int(ignored.split()[1], 16) & sum(1 << (number - 1) for number in ours)


def test_each_command_receives_the_time_until_its_term(host: Host, tmp_path: Path) -> None:
    """A hook escalates by it, so the time that was planned at the promotion would be too long."""
    seen = tmp_path / "seen"
    look = f"(cut -d' ' -f1 /proc/uptime; echo $FAILOVER_DEADLINE_MS; cat) >>{seen}"
    on_term = f"trap 'cut -d\" \" -f1 /proc/uptime >>{seen}; exit 1' TERM"
    host.send(
        *hook(
            sh(f"{look}; sleep 0.5"),
            sh(f"{on_term}; {look}; while :; do sleep 0.01; done"),
            env=["PATH=/usr/bin:/bin", "FAILOVER_DEADLINE_MS=60000"],
            stdin='{"reason": "\\"deadline_ms\\": 7", "deadline_ms": 60000, "gap_ms": null}\n',
        )
    )
    host.send(*arm(now() + 2.0, now() + 4.0))
    os.kill(host.agent, signal.SIGKILL)
    assert host.code(host.guard) == guard.ACTED
    first_at, first, first_in, second_at, second, second_in, termed_at = seen.read_text().split(
        "\n"
    )[:7]
    for began_at, left_ms, payload in (
        (first_at, first, first_in),
        (second_at, second, second_in),
    ):
        assert abs(float(began_at) + int(left_ms) / 1000 - float(termed_at)) < LATE_S
        given = {"reason": '"deadline_ms": 7', "deadline_ms": int(left_ms), "gap_ms": None}
        assert json.loads(payload) == given


def test_a_command_that_fails_does_not_prevent_the_next_one(
    new_host: Callable[..., Host], tmp_path: Path
) -> None:
    (tmp_path / "plain").write_text("#!/bin/sh\n")
    (tmp_path / "text").write_text("no interpreter\n")
    (tmp_path / "text").chmod(0o755)
    strange = os.fsdecode(os.fsencode(tmp_path) + b"/\xff")
    Path(strange).write_text(f"#!/bin/sh\necho strange >>{tmp_path}/seen\n")
    Path(strange).chmod(0o755)
    output = tmp_path / "stderr"
    with output.open("wb") as stderr:
        host = new_host(stderr=stderr.fileno())
    host.send(*LOG)
    host.send(
        *hook(
            sh(f"echo one >>{tmp_path}/seen; exit 3"),
            [tmp_path / "missing"],
            [tmp_path / "plain"],
            [tmp_path / "text"],
            [strange],
            sh(f"echo two >>{tmp_path}/seen; kill -USR1 $$"),
        )
    )
    hook_at = now()
    host.send_last(*arm(hook_at, hook_at + FAILS_S))
    assert host.code(host.guard) == guard.ACTED
    assert (tmp_path / "seen").read_text().split()[:3] == ["one", "strange", "two"]
    logged = events(output)
    ended = [(e["command"], e["result"]) for e in logged if e["message"] == "hook ended"]
    assert ended[0] == ("/bin/sh", "exit 3")
    assert ended[-2:] == [
        (f"{tmp_path}/\ufffd", "exit 0"),
        ("/bin/sh", f"signal {signal.SIGUSR1:d}"),
    ]
    output_lines = [e["line"] for e in logged if e["message"] == "hook output"]
    for part in ("No such file", "Permission denied", "Exec format error"):
        assert any(part in line for line in output_lines), part
    assert "Traceback" not in output.read_text()


def test_a_hook_that_failed_is_repeated_when_the_tenure_and_the_agent_are_dead(
    host: Host, run: Run, tmp_path: Path
) -> None:
    """It lacked tasks, memory or files that the tenure had used up; the role may be released then."""
    left = run(IDLE)
    alive = "; ".join(
        f"! grep -q '^State:.[RST]' /proc/{pid}/status" for pid in (left.pid, host.agent)
    )
    host.send(*hook(sh(f"set -e; echo run >>{tmp_path}/runs; {alive}")))
    host.send(*back(tmp_path))
    hook_at = now()
    host.send_last(*arm(hook_at, hook_at + 5 * LATE_S, groups=left.pid, epoch=7))
    assert host.code(host.guard) == guard.ACTED
    assert (tmp_path / "runs").read_text().split() == ["run", "run"]
    assert go_ahead(tmp_path) == "1"


def test_a_hook_that_always_fails_is_repeated_until_its_time_is_over(
    host: Host, tmp_path: Path
) -> None:
    host.send(*hook(sh(f"echo run >>{tmp_path}/runs; exit 1")))
    kill_at = now() + FAILS_S
    host.send_last(*arm(now(), kill_at))
    assert host.code(host.guard) == guard.ACTED
    assert 1 < len((tmp_path / "runs").read_text().split()) <= 1 / guard.RETRY_SHARE
    assert now() < kill_at + LATE_S


def test_a_hook_whose_user_has_no_further_process_succeeds_after_the_tenure(
    new_host: Callable[..., Host], tmp_path: Path
) -> None:
    """Its limit is not that of the guard, which runs as root."""
    if os.geteuid() != 0:
        pytest.skip("needs: root: run as root")
    user, most = 61_234, 20

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_NPROC, (most, most))

    output = tmp_path / "stderr"
    with output.open("wb") as stderr:
        host = new_host(before=limit, stderr=stderr.fileno())
    many = f"i=0; while [ $i -lt {most} ]; do sleep 1000 & i=$((i + 1)); done; echo ready; wait"
    with subprocess.Popen(
        sh(many), user=user, start_new_session=True, stdout=subprocess.PIPE
    ) as left:
        assert left.stdout is not None
        assert left.stdout.readline() == b"ready\n"
        host.send(*LOG)
        host.send(*hook(["/bin/bash", "-c", "/bin/true; /bin/true"], ids=(user, user, "")))
        host.send_last(*arm(now(), now() + 3 * LATE_S, groups=left.pid))
        assert host.code(host.guard) == guard.ACTED
    results = [e["result"] for e in events(output) if e["message"] == "hook ended"]
    assert results[-1] == "exit 0"


def test_a_hook_whose_user_has_used_up_the_room_for_pipes_runs(
    new_host: Callable[..., Host], tmp_path: Path
) -> None:
    """Such a user's pipes have one page, and the hook waited for a reader of its stdin, which was itself."""
    small = """
new_pipe = os.pipe

def pipe():
    ends = new_pipe()
    fcntl.fcntl(ends[1], fcntl.F_SETPIPE_SZ, 4096)
    return ends

import fcntl
os.pipe = pipe
"""
    host = new_host(program=build_program_with(small))
    host.send(*hook(sh(f"touch {tmp_path}/done"), stdin="x" * 20_000))
    host.send_last(*arm(now(), now() + FAILS_S))
    assert host.code(host.guard) == guard.ACTED
    assert (tmp_path / "done").exists()


def test_a_missing_directory_is_logged_and_the_agent_is_killed(
    new_host: Callable[..., Host], tmp_path: Path
) -> None:
    output = tmp_path / "stderr"
    with output.open("wb") as stderr:
        host = new_host(stderr=stderr.fileno())
    host.send(*hook(sh("exit 0"), directory=tmp_path / "gone"))
    host.send_last(*arm(now(), now() + FAILS_S))
    assert host.code(host.guard) == guard.ACTED
    assert host.code(host.agent) == -signal.SIGKILL
    assert "could not be started" in output.read_text()


def test_a_hook_that_hangs_and_ignores_term_is_killed_with_its_children(
    host: Host, tmp_path: Path
) -> None:
    """It gets a second attempt, with half of its time, once the tenure is dead: that may have slowed it down."""
    child = f"trap '' TERM; sleep 1000 & echo $$ $! >>{tmp_path}/pids; while :; do sleep 0.01; done"
    host.send(*hook(sh(child), sh(f"touch {tmp_path}/second")))
    hook_at = now()
    budget_s = 1.5
    host.send_last(*arm(hook_at, hook_at + budget_s))
    assert host.code(host.guard) == guard.ACTED
    assert budget_s - 0.1 <= now() - hook_at <= budget_s * 1.5 + LATE_S
    assert host.code(host.agent) == -signal.SIGKILL
    pids = list(map(int, (tmp_path / "pids").read_text().split()))
    assert len(pids) == 4
    until(lambda: not any(map(lives, pids)))
    assert not (tmp_path / "second").exists()


@pytest.mark.parametrize("code", [0, 1])
def test_processes_that_a_successful_hook_left_survive(
    host: Host, tmp_path: Path, code: int
) -> None:
    left = f"sleep 1000 & echo $! >{tmp_path}/pid; exit {code}"
    host.send(*hook(sh(left), sh(f"touch {tmp_path}/second")))
    host.send_last(*arm(now(), now() + (FAILS_S if code else LIMIT_S)))
    assert host.code(host.guard) == guard.ACTED
    assert (tmp_path / "second").exists(), "the helper held it up"
    pid = int((tmp_path / "pid").read_text())
    if code:
        until(lambda: not lives(pid))
    else:
        assert lives(pid), "a helper of the standby"
        os.kill(pid, signal.SIGKILL)


def test_a_process_that_is_found_only_by_its_cgroup_is_killed(host: Host, run: Run) -> None:
    """It has left its group, lost its parent and cleared its environment, and the agent is dead."""
    with new_cgroup() as folder:
        inside = folder / "hooks"
        inside.mkdir()
        left = run(f"echo 0 >{inside}/cgroup.procs; {IDLE}")
        host.send_last(*arm(now(), now() + LIMIT_S, cgroup=str(folder)))
        assert host.code(host.guard) == guard.ACTED
        assert left.wait(LIMIT_S) == -signal.SIGKILL


def test_after_term_no_further_command_starts(host: Host, tmp_path: Path) -> None:
    host.send(*hook(sh("exec sleep 1000"), sh(f"touch {tmp_path}/second")))
    host.send_last(*arm(now(), now() + 2.0))
    assert host.code(host.guard) == guard.ACTED
    assert not (tmp_path / "second").exists()


def test_a_hook_without_any_time_does_not_prevent_the_killing(host: Host, run: Run) -> None:
    left = run(IDLE)
    host.send(*hook(sh("exec sleep 1000")))
    host.send_last(*arm(now(), now() + 1e-3, groups=left.pid))
    assert host.code(host.guard) == guard.ACTED
    assert left.wait(LIMIT_S) == -signal.SIGKILL
    assert host.code(host.agent) == -signal.SIGKILL


def test_the_tenure_is_killed_even_if_fork_fails(
    new_host: Callable[..., Host], run: Run, tmp_path: Path
) -> None:
    full = "def fork(): raise BlockingIOError(11, 'no more processes')\nos.fork = fork"
    output = tmp_path / "stderr"
    with output.open("wb") as stderr:
        host = new_host(program=build_program_with(full), stderr=stderr.fileno())
    left = run(IDLE)
    host.send(*hook(sh("exit 0")))
    host.send_last(*arm(now(), now() + 2.0, groups=left.pid))
    assert host.code(host.guard) == guard.ACTED
    assert left.wait(LIMIT_S) == -signal.SIGKILL
    assert host.code(host.agent) == -signal.SIGKILL
    assert "no more processes" in output.read_text()


def test_the_state_file_is_written_even_if_fork_fails(
    new_host: Callable[..., Host], tmp_path: Path
) -> None:
    """It stayed Primary, as the process that writes it could not be forked."""
    full = "def fork(): raise BlockingIOError(11, 'no more processes')\nos.fork = fork"
    host = new_host(program=build_program_with(full))
    host.send_last(*arm(now(), now() + 2.0, state=(tmp_path / "state", "Secondary")))
    assert host.code(host.guard) == guard.ACTED
    assert (tmp_path / "state").read_text() == "Secondary"


def test_a_process_that_is_found_only_by_its_mark_is_killed_even_if_fork_fails(
    new_host: Callable[..., Host], escaped: Callable[[str], int]
) -> None:
    """It may be the very one that uses up the tasks."""
    full = "def fork(): raise BlockingIOError(11, 'no more processes')\nos.fork = fork"
    host = new_host(program=build_program_with(full))
    ours = escaped(MARK)
    host.send_last(*arm(now(), now() + 2.0, mark=MARK))
    assert host.code(host.guard) == guard.ACTED
    assert not lives(ours)


# --- an output that nobody reads --------------------------------------------------------------


def full_pipe() -> tuple[int, int]:
    """Both ends of a pipe in which nothing fits any more."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    _fill(write)
    os.set_blocking(write, True)
    return read, write


def full_socket() -> tuple[int, int]:
    """The same of a socket, which is what stderr is under systemd."""
    theirs, ours = socket.socketpair()
    ours.setblocking(False)
    _fill(ours.fileno())
    ours.setblocking(True)
    return theirs.detach(), ours.detach()


def _fill(fd: int) -> None:
    with suppress(BlockingIOError):
        while True:
            os.write(fd, b"x" * 4096)
    with suppress(BlockingIOError):
        while True:
            os.write(fd, b"x")


@pytest.mark.parametrize("full", [full_pipe, full_socket])
def test_a_full_stderr_blocks_neither_the_guard_nor_the_hook(
    new_host: Callable[..., Host], tmp_path: Path, full: Callable[[], tuple[int, int]]
) -> None:
    read, write = full()
    try:
        host = new_host(stderr=write)
        flood = f"head -c 1000000 /dev/zero >&2; head -c 1000000 /dev/zero; touch {tmp_path}/done"
        host.send(*hook(sh(flood)))
        host.send_last(*arm(now(), now() + LIMIT_S))
        assert host.code(host.guard) == guard.ACTED
        assert (tmp_path / "done").exists()
        assert not fcntl.fcntl(write, fcntl.F_GETFL) & os.O_NONBLOCK, "it is the agent's, too"
    finally:
        os.close(read)
        os.close(write)


def test_much_output_does_not_slow_a_hook_down(host: Host, tmp_path: Path) -> None:
    """Output was read at 6 MB/s, so a verbose hook was killed at its limit, in the middle of its work."""
    begun_at = now()
    host.send(*hook(sh(f"head -c 300000000 /dev/zero; touch {tmp_path}/done")))
    host.send_last(*arm(now(), now() + LIMIT_S))
    assert host.code(host.guard) == guard.ACTED
    assert (tmp_path / "done").exists()
    assert now() < begun_at + LIMIT_S / 4


def test_logged_hook_output_is_bounded(new_host: Callable[..., Host], tmp_path: Path) -> None:
    output = tmp_path / "stderr"
    with output.open("wb") as stderr:
        host = new_host(stderr=stderr.fileno())
    host.send(*LOG)
    host.send(*hook(sh("head -c 1000000 /dev/zero | tr '\\0' x")))
    host.send_last(*arm(now(), now() + LIMIT_S))
    assert host.code(host.guard) == guard.ACTED
    lines = [e["line"] for e in events(output) if e["message"] == "hook output"]
    assert sum(map(len, lines)) == guard_hook.OUTPUT_BYTES
    assert set("".join(lines)) == {"x"}


# --- its lines --------------------------------------------------------------------------------


def acted(
    new_host: Callable[..., Host],
    output: Path,
    *log: str,
    script: str = "exit 0",
    budget_s: float = LIMIT_S,
    **spawn: Any,
) -> str:
    """Have a guard demote; return its log."""
    with output.open("wb") as stderr:
        host = new_host(stderr=stderr.fileno(), **spawn)
    if log:
        host.send(*log)
    host.send(*hook(sh(script)))
    host.send_last(*arm(now(), now() + budget_s))
    assert host.code(host.guard) == guard.ACTED
    return output.read_text()


def test_log_lines_have_the_agents_format_in_json(
    new_host: Callable[..., Host], tmp_path: Path
) -> None:
    script = r"""printf 'a "b" \\ \t\303\274\360\237\230\200\377\n5\n\nlast'"""
    acted(new_host, tmp_path / "stderr", *LOG, script=script)
    logged = events(tmp_path / "stderr")
    for event in logged:
        assert list(event)[:6] == ["time", "level", "logger", "message", "group", "session"]
        assert datetime.fromisoformat(event.pop("time")) > datetime.now(UTC) - timedelta(minutes=5)
        assert (event["logger"], event["group"], event["session"]) == ("agent.guard", "7", "host-a")
    changed, *output, ended, demoted = logged
    assert changed == changed | {
        "level": "WARNING",
        "message": "role changed",
        "before": "Primary",
        "after": "Secondary",
        "epoch": 7,
        "reason": "the guard demotes in the place of the agent: it has not renewed its deadline",
    }
    assert [event["line"] for event in output] == ['a "b" \\ \tü😀\ufffd', "5", "last"]
    assert (ended["level"], ended["result"]) == ("INFO", "exit 0")
    assert 0 < demoted["left_of_limit_s"] <= LIMIT_S


def test_log_lines_have_the_agents_format_in_text(
    new_host: Callable[..., Host], tmp_path: Path
) -> None:
    context = ("LOG", "30", "text", "line 7", "host-a", "PendingPrimary", "")
    lines = acted(new_host, tmp_path / "stderr", *context).splitlines()
    assert len(lines) == 2, "hook ended is less than a warning"
    time_, _, rest = lines[0].partition(" ")
    assert datetime.fromisoformat(time_).tzinfo is not None
    assert rest == (
        'WARNING role changed group="line 7" session=host-a before=PendingPrimary after=Secondary'
        ' epoch=null reason="the guard demotes in the place of the agent: it has not renewed its'
        ' deadline"'
    )


def test_a_demotion_of_the_agent_that_the_guard_repeats_is_no_second_role_change(
    new_host: Callable[..., Host], tmp_path: Path
) -> None:
    context = ("LOG", "20", "json", "g", "host-a", "Secondary", "7")
    acted(new_host, tmp_path / "stderr", *context)
    assert events(tmp_path / "stderr")[0]["message"] == "demotion taken over"


def test_journal_lines_have_a_priority_and_no_time(
    new_host: Callable[..., Host], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "stderr"
    output.touch()
    there = output.stat()
    monkeypatch.setenv("JOURNAL_STREAM", f"{there.st_dev}:{there.st_ino}")
    text = ("LOG", "20", "text", "g", "host-a", "Primary", "7")
    lines = acted(new_host, output, *text, script="exit 1", budget_s=FAILS_S).splitlines()
    assert len(lines) >= 3, "role changed, hook ended, demoted"
    assert {line.partition(" ")[0] for line in lines} == {"<4>WARNING"}
    output.write_text("")
    lines = acted(new_host, output, *LOG, script="echo a").splitlines()
    assert [line[:4] for line in lines] == ["<4>{", "<6>{", "<6>{", "<4>{"]


# --- the state file ---------------------------------------------------------------------------


def test_the_state_file_is_readable_for_sidecars_under_any_umask(
    new_host: Callable[..., Host], tmp_path: Path
) -> None:
    def strict() -> None:
        os.umask(0o077)

    host = new_host(before=strict)
    host.send_last(*arm(now(), now() + LIMIT_S, state=(tmp_path / "state", "Secondary")))
    assert host.code(host.guard) == guard.ACTED
    assert (tmp_path / "state").read_text() == "Secondary"
    assert (tmp_path / "state").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("how", ["symbolic", "hard", "fifo"])
def test_a_trap_where_the_state_is_prepared_is_removed(
    new_host: Callable[..., Host], tmp_path: Path, how: str
) -> None:
    """The directory may belong to a hostile workload, and the guard be root."""
    precious, trap = tmp_path / "precious", tmp_path / "state.guard"
    precious.touch(0o600)
    precious.write_text("as it was")
    if how == "fifo":
        os.mkfifo(trap)
    elif how == "hard":
        trap.hardlink_to(precious)
    else:
        trap.symlink_to(precious)
    host = new_host()
    host.send_last(*arm(now(), now() + LIMIT_S, state=(tmp_path / "state", "Secondary")))
    assert host.code(host.guard) == guard.ACTED
    assert (tmp_path / "state").read_text() == "Secondary"
    assert not (tmp_path / "state").is_symlink()
    assert precious.read_text() == "as it was"
    assert precious.stat().st_mode & 0o777 == 0o600


def test_a_state_file_that_cannot_be_written_completely_is_not_replaced(
    new_host: Callable[..., Host], tmp_path: Path
) -> None:
    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))

    state = tmp_path / "state"
    state.write_text("Primary")
    host = new_host(before=small_files)
    host.send(*hook(sh(f"touch {tmp_path}/done")))
    host.send_last(*arm(now(), now() + LIMIT_S, state=(state, "x" * 1000)))
    assert host.code(host.guard) == guard.ACTED
    assert state.read_text() == "Primary"
    assert (tmp_path / "done").exists()


# --- when it does nothing ---------------------------------------------------------------------


def test_the_guard_does_nothing_when_the_agent_exits_after_off(
    host: Host, run: Run, tmp_path: Path
) -> None:
    workload = run(IDLE)
    host.send(*hook(sh(f"touch {tmp_path}/done")))
    host.send(*arm(now() + LIMIT_S, now() + LIMIT_S, workload=workload.pid))
    host.send("OFF")
    host.exit()
    assert host.code(host.guard) == 0
    assert host.code(host.agent) == 0
    assert not (tmp_path / "done").exists()
    assert workload.poll() is None


def test_the_guard_does_nothing_when_the_agent_exits_with_unread_answers(
    host: Host, tmp_path: Path
) -> None:
    host.send(*hook(sh(f"touch {tmp_path}/done")))
    host.command("send", *arm(now() + LIMIT_S, now() + LIMIT_S))
    host.command("readable")
    host.signal(host.guard, signal.SIGSTOP)
    host.command("send", "OFF")
    host.exit()
    assert host.code(host.agent) == 0
    os.kill(host.guard, signal.SIGCONT)
    assert host.code(host.guard) == 0
    assert not (tmp_path / "done").exists()


def test_the_guard_does_nothing_while_it_receives_new_deadlines(host: Host, tmp_path: Path) -> None:
    host.send(*hook(sh(f"touch {tmp_path}/done")))
    end_at = now() + 2.0
    while now() < end_at:
        host.send(*arm(now() + LATE_S, now() + LIMIT_S))
        time.sleep(0.02)
    host.send("OFF")
    host.exit()
    assert host.code(host.guard) == 0
    assert not (tmp_path / "done").exists()


def test_a_thawed_guard_reads_messages_before_it_acts(host: Host, tmp_path: Path) -> None:
    host.send(*hook(sh(f"touch {tmp_path}/done")))
    hook_at = now() + LATE_S
    host.send(*arm(hook_at, hook_at + 0.1))
    host.signal(host.guard, signal.SIGSTOP)
    until(lambda: now() > hook_at + 0.1)
    host.command("send", *arm(now() + LIMIT_S, now() + LIMIT_S))
    os.kill(host.guard, signal.SIGCONT)
    host.command("answers")
    host.send("OFF")
    host.exit()
    assert host.code(host.guard) == 0
    assert not (tmp_path / "done").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_that_end_services_do_not_end_the_guard(host: Host, number: int) -> None:
    host.send(*arm(now() + LIMIT_S, now() + LIMIT_S))
    os.kill(host.guard, number)
    host.send("OFF")
    host.exit()
    assert host.code(host.guard) == 0


def test_a_new_parent_of_the_guard_is_never_signalled(
    new_host: Callable[..., Host], tmp_path: Path
) -> None:
    """The agent dies before the guard's first line: its parent is the host's init by then."""
    stopped = ("/bin/sh", "-c", 'kill -STOP $$; exec "$@"', "sh")
    host = new_host(argv=(*stopped, *GUARD), start=False)
    host.command("send", *hook(sh(f"cut -d' ' -f3 /proc/{host.pid}/stat >{tmp_path}/seen")))
    host.command("send", *arm(now() + LIMIT_S, now() + LIMIT_S))
    host.start_guard()
    until(lambda: state_of(host.guard) == "T")
    os.kill(host.agent, signal.SIGKILL)
    assert host.code(host.agent) == -signal.SIGKILL
    os.kill(host.guard, signal.SIGCONT)
    assert host.code(host.guard) == guard.ACTED
    assert (tmp_path / "seen").read_text().strip() == "S", "the host was stopped"


def test_a_deadline_that_passes_during_a_suspend_is_noticed_at_the_next_poll(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """poll() counts no suspended time: it would end a long while after the deadline."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    acted: list[str] = []
    calls: list[None] = []

    def jumping() -> float:
        calls.append(None)
        return 0.0 if len(calls) == 1 else 1e6

    with ours, theirs:
        monkeypatch.setattr(guard, "now", jumping)
        monkeypatch.setattr(guard.Guard, "demote", lambda _, why: acted.append(why))
        process = guard.Guard(theirs.fileno(), os.getpid())
        process.hook_at = process.kill_at = 3 * LIMIT_S
        start = time.monotonic()
        assert process.run() == guard.ACTED
    assert acted == ["it has not renewed its deadline"]
    assert time.monotonic() - start < LIMIT_S


# --- the processes of the tenure ---------------------------------------------------------------


def root(pid: int) -> str:
    process = proctree.identify(pid)
    assert process is not None
    return "{}:{}".format(*process)


@pytest.fixture
def escaped(tmp_path: Path) -> Iterator[Callable[[str], int]]:
    """Start a script whose child leaves the process group and the session, and then has no parent."""
    found: list[int] = []

    def start(mark: str) -> int:
        pid_file = tmp_path / f"escaped-{len(found)}"
        script = f"setsid sh -c 'echo $$ >{pid_file}.new; mv {pid_file}.new {pid_file}; exec sleep 1000' &"
        subprocess.run(sh(script), check=True, env=os.environ | {"FAILOVER_TENURE": mark})
        until(pid_file.exists)
        found.append(int(pid_file.read_text()))
        return found[-1]

    yield start
    for pid in found:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def test_descendants_of_a_running_promotion_are_killed_before_the_demotion_hook(
    host: Host, run: Run, tmp_path: Path
) -> None:
    """Fault 2: at TERM it starts the workload again."""
    promotion = run(
        f'setsid sh -c \'trap "sleep 1000 & touch {tmp_path}/active" TERM; echo $$'
        f" >{tmp_path}/child; while :; do sleep 0.01; done' & {STUBBORN}"
    )
    until(lambda: (tmp_path / "child").exists() and (tmp_path / "child").read_text())
    child = int((tmp_path / "child").read_text())
    host.send(
        *hook(sh(f"cut -d' ' -f3 /proc/{child}/stat >{tmp_path}/seen || touch {tmp_path}/gone"))
    )
    host.send_last(*arm(now(), now() + LIMIT_S, running=promotion.pid, roots=root(promotion.pid)))
    assert host.code(host.guard) == guard.ACTED
    assert (tmp_path / "gone").exists() or (tmp_path / "seen").read_text().strip() == "Z"
    assert not lives(child)
    assert not (tmp_path / "active").exists()


def test_a_process_that_is_found_only_by_its_mark_is_killed_and_another_tenures_is_not(
    host: Host, escaped: Callable[[str], int]
) -> None:
    ours, other = escaped(MARK), escaped(f"{MARK}2")
    host.send(*hook(sh("exit 0")))
    host.send_last(*arm(now(), now() + LIMIT_S, mark=MARK))
    assert host.code(host.guard) == guard.ACTED
    assert not lives(ours)
    assert lives(other)


def test_a_search_that_the_oom_killer_ends_is_repeated(
    new_host: Callable[..., Host], escaped: Callable[[str], int], tmp_path: Path
) -> None:
    """The process that it was to find went on for good."""
    ended = f"""
sweep = Guard.sweep

def sweep_or_die(self, end_at):
    if not os.path.exists("{tmp_path}/ended"):
        os.mkdir("{tmp_path}/ended")
        os.kill(os.getpid(), signal.SIGKILL)
    return sweep(self, end_at)

Guard.sweep = sweep_or_die
"""
    ours = escaped(MARK)
    host = new_host(program=build_program_with(ended))
    host.send(*hook(sh("exit 0")))
    host.send_last(*arm(now(), now() + FAILS_S, mark=MARK))
    assert host.code(host.guard) == guard.ACTED
    assert not lives(ours)


def test_the_whole_process_tree_of_a_workload_gets_term_and_kill(
    host: Host, run: Run, tmp_path: Path
) -> None:
    """Such as ``su -c``, which gives its command a session of its own."""
    note = "trap 'echo term >>%s; exit' TERM" % (tmp_path / "term")
    polite, stubborn = (tmp_path / name for name in ("polite", "stubborn"))
    loop = "while :; do sleep 0.01; done"
    workload = run(
        f'setsid sh -c "{note}; echo \\$\\$ >{polite}; {loop}" &'
        f" setsid sh -c \"trap '' TERM; echo \\$\\$ >{stubborn}; {loop}\" & {STUBBORN}"
    )
    until(lambda: all(file.exists() and file.read_text() for file in (polite, stubborn)))
    host.send(
        *hook(
            sh(f"grep -q '^State:.[RS]' /proc/$(cat {stubborn})/status && touch {tmp_path}/alive")
        )
    )
    host.send_last(*arm(now(), now() + 2.0, workload=workload.pid, roots=root(workload.pid)))
    assert host.code(host.guard) == guard.ACTED
    assert (tmp_path / "term").read_text() == "term\n"
    assert not any(lives(int(file.read_text())) for file in (polite, stubborn))
    assert not (tmp_path / "alive").exists(), "it was killed after the hook only"


def test_a_reused_process_id_is_not_signalled(host: Host, run: Run) -> None:
    stranger = run(IDLE)
    host.send(*hook(sh("exit 0")))
    recorded = f"{stranger.pid}:1"
    host.send_last(*arm(now(), now() + LIMIT_S, groups=stranger.pid, roots=recorded))
    assert host.code(host.guard) == guard.ACTED
    assert stranger.poll() is None


# --- nothing holds the demotion up -------------------------------------------------------------


def build_program_with(lines: str, module: ModuleType = guard) -> bytes:
    """The guard's program with ``lines`` at the end of one of its modules."""
    codes = []
    for name in MODULES:
        each = importlib.import_module(name)
        assert each.__file__ is not None
        source = Path(each.__file__).read_text() + (lines if each is module else "")
        codes.append((each.__name__, compile(source, each.__name__, "exec")))
    return marshal.dumps(codes)


def test_an_environment_that_blocks_its_reader_delays_only_the_last_search(
    new_host: Callable[..., Host], run: Run, tmp_path: Path
) -> None:
    """As that of a process that is stuck in the kernel."""
    stuck = "\ndef _read_file(path):\n    time.sleep(1000)\n"
    left = run(IDLE)
    host = new_host(program=build_program_with(stuck, proctree))
    host.send(*hook(sh(f"touch {tmp_path}/done")))
    host.send(*back(tmp_path))
    kill_at = now() + 1.5
    host.send_last(*arm(now(), kill_at, groups=left.pid, mark=MARK, epoch=7))
    assert host.code(host.guard) == guard.ACTED
    assert now() < kill_at + guard.SWEEP_S + LATE_S
    assert (tmp_path / "done").exists()
    assert left.wait(LIMIT_S) == -signal.SIGKILL
    assert host.code(host.agent) == -signal.SIGKILL
    assert go_ahead(tmp_path) == "", "what lives of the tenure is not known"


def test_an_environment_that_blocks_its_reader_holds_up_no_guard_without_free_tasks(
    new_host: Callable[..., Host], tmp_path: Path
) -> None:
    """The guard read it in its own process before it ran the hook, and never ran it."""
    scarce = """
proctree._read_file = lambda *_: time.sleep(1000)
probes = []

def can_fork(*_):
    probes.append(None)
    return len(probes) > 3
"""
    host = new_host(program=build_program_with(scarce))
    host.send(*hook(sh(f"touch {tmp_path}/done")))
    host.send_last(*arm(now(), now() + 2 * LATE_S, mark=MARK))
    assert host.code(host.guard) == guard.ACTED
    assert (tmp_path / "done").exists()


def test_a_stuck_stranger_protects_no_process_that_is_found_only_by_its_mark(
    new_host: Callable[..., Host], escaped: Callable[[str], int]
) -> None:
    """The search read all environments before anything was killed, and blocked at the stranger's."""
    ours = escaped(MARK)
    with stuck_thread() as stranger:
        blocks = f"""
read_contents = contents

def contents(thread, name):
    if thread == {stranger}:
        time.sleep(1000)
    return read_contents(thread, name)
"""
        host = new_host(program=build_program_with(blocks, proctree))
        host.send(*hook(sh("exit 0")))
        host.send_last(*arm(now(), now() + LATE_S, mark=MARK))
        assert host.code(host.guard) == guard.ACTED
        assert not lives(ours)


def test_the_mark_of_a_process_with_a_stuck_thread_is_not_read_where_that_must_not_block() -> None:
    """Its main thread sleeps, and so it was read: the other one may hold the lock for its memory."""
    name = f"stuck-{os.getpid()}"
    with stuck_thread(FAILOVER_TENURE=name) as pid:
        tree = ProcessTree(set(), set(), name.encode())
        assert pid not in {one for one, _ in tree.find(may_block=True, skip_stuck=True)}
        assert pid in {one for one, _ in tree.find(may_block=True)}


def test_a_state_file_on_a_dead_disk_does_not_delay_the_demotion(
    host: Host, run: Run, tmp_path: Path
) -> None:
    """Fault 14: and neither does any other fault of the state file."""
    left = run(IDLE)
    with dead_disk(tmp_path / "disk") as disk:
        host.send(*hook(sh(f"touch {tmp_path}/done")))
        begun_at = now()
        state = (disk / "state", "Secondary")
        host.send_last(*arm(begun_at, begun_at + LIMIT_S, groups=left.pid, state=state))
        assert host.code(host.guard) == guard.ACTED
        assert now() < begun_at + LATE_S + 2 * guard.STATE_WAIT_S
        assert (tmp_path / "done").exists()
        assert left.wait(LIMIT_S) == -signal.SIGKILL


@pytest.mark.parametrize("what", ["hook", "helper"])
def test_a_program_on_a_dead_disk_does_not_keep_the_claim_of_the_session(
    new_host: Callable[..., Host], tmp_path: Path, what: str
) -> None:
    """A program that is never executed never closes its copy of the claim: the next agent could not start."""
    claim = os.open(tmp_path / "claim", os.O_RDWR | os.O_CREAT)
    fcntl.flock(claim, fcntl.LOCK_EX)
    host = new_host(claims=[claim])
    os.close(claim)
    with dead_disk(tmp_path / "disk") as disk:
        host.send(*hook([disk / "program"] if what == "hook" else sh("exit 0")))
        if what == "helper":
            host.send("RELEASE", "document", str(disk / "program"))
        host.send_last(*arm(now(), now() + FAILS_S, epoch=7))
        assert host.code(host.guard) == guard.ACTED
        with (tmp_path / "claim").open() as free:
            fcntl.flock(free, fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.mark.parametrize("path", ["/nowhere/state", "state", "/proc/state"])
def test_a_state_file_that_cannot_be_written_does_not_prevent_the_demotion(
    host: Host, tmp_path: Path, path: str
) -> None:
    host.send(*hook(sh(f"touch {tmp_path}/done")))
    host.send_last(*arm(now(), now() + LIMIT_S, state=(path, "Secondary")))
    assert host.code(host.guard) == guard.ACTED
    assert (tmp_path / "done").exists()
    with suppress(FileNotFoundError):
        Path("/state").unlink()


@pytest.mark.parametrize(
    "broken",
    [
        "proctree.snapshot = None",
        "LogWriter.log = None",
        "LogWriter.start_writer = None",
        "Worker.__init__ = None",
        "Guard.stop_workload = None",
        "Guard.run_hook = None",
        "Guard.start_helper = None",
        "os.getppid = lambda: 1 / 0",
    ],
)
def test_a_step_that_fails_prevents_no_other_step(
    new_host: Callable[..., Host], run: Run, tmp_path: Path, broken: str
) -> None:
    left = run(IDLE)
    output = tmp_path / "stderr"
    with output.open("wb") as stderr:
        host = new_host(program=build_program_with(broken), stderr=stderr.fileno())
    host.send(*hook(sh(f"touch {tmp_path}/done")))
    host.send(*back(tmp_path))
    host.send(*arm(now() + 4, now() + 8, groups=left.pid, epoch=7))
    os.kill(host.agent, signal.SIGKILL)
    assert host.code(host.guard) == guard.ACTED
    assert (tmp_path / "done").exists() or "run_hook" in broken
    assert left.poll() is not None or left.wait(0.5)
    assert go_ahead(tmp_path) == ""
    if "LogWriter.log" not in broken:
        assert "guard step failed" in output.read_text()


def test_an_invalid_message_is_not_answered_and_does_not_end_the_guard(host: Host) -> None:
    host.command("send", "ARM", "soon")
    host.command("send", *arm(now() + LIMIT_S, now() + LIMIT_S))
    host.command("answers")
    host.send("OFF")
    host.exit()
    assert host.code(host.guard) == 0


def test_lines_for_a_file_on_a_dead_disk_are_dropped(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The process that writes them is stuck, and not waited for."""
    kept = os.dup(2)
    with (tmp_path / "stderr").open("wb") as file:
        os.dup2(file.fileno(), 2)
    try:
        log = guard_log.LogWriter()
        log.start_writer([])
        os.kill(log.writer_pid, signal.SIGSTOP)
        begun_at = now()
        for _ in range(10_000):
            log.log(guard_log.ERROR, "a line")
        log.close()
        assert now() - begun_at < guard_log.FLUSH_S + LATE_S
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.kill(log.writer_pid, signal.SIGKILL)
        os.waitpid(log.writer_pid, 0)


# --- an agent that fences itself ---------------------------------------------------------------


def test_the_agent_may_run_its_fence_command_until_agent_at(
    host: Host, run: Run, tmp_path: Path
) -> None:
    """Fault 12: the guard killed the agent in the middle of its fence command."""
    left, workload = run(IDLE), run(STUBBORN)
    host.send(*hook(sh(f"touch {tmp_path}/done")))
    kill_at = now() + 0.3
    agent_at = kill_at + 2.0
    host.send(
        *arm(float("inf"), kill_at, agent_at=agent_at, groups=left.pid, workload=workload.pid)
    )
    assert left.wait(LIMIT_S) == workload.wait(LIMIT_S) == -signal.SIGKILL
    assert kill_at <= now() < agent_at
    assert state_of(host.agent) != "T"
    host.send(*LOG)  # it goes on
    assert now() < agent_at, "this machine is too slow"
    assert host.code(host.agent) == -signal.SIGKILL
    assert now() >= agent_at
    assert host.code(host.guard) == guard.ACTED


def test_a_tenure_that_begins_during_a_sweep_is_not_killed(
    host: Host, escaped: Callable[[str], int]
) -> None:
    """It has the same mark, and the killing still goes on: something cannot die."""
    with freezer("guard") as cgroup:
        cgroup.freeze(escaped(MARK))
        host.send(*arm(float("inf"), now(), agent_at=now() + LIMIT_S, mark=MARK))
        until(lambda: len(children_of(host.guard)) == 2)
        sweeper, _log_writer = children_of(host.guard)
        host.send("OFF")
        process = escaped(MARK)
        until(lambda: not lives(sweeper))
        assert lives(process)


def test_the_demotion_is_repeated_if_the_agent_exits_after_its_fence_command(
    host: Host, run: Run, tmp_path: Path
) -> None:
    left = run(IDLE)
    host.send(*hook(sh(f"touch {tmp_path}/done")))
    host.send(*back(tmp_path))
    host.send(*arm(now() + LIMIT_S, now() + 2 * LIMIT_S))  # so that it knows the budget
    host.send(*arm(float("inf"), now() + 0.2, agent_at=now() + LIMIT_S, epoch=7, groups=left.pid))
    assert left.wait(LIMIT_S) == -signal.SIGKILL
    host.exit()
    assert host.code(host.guard) == guard.ACTED
    assert host.code(host.agent) == 0
    assert (tmp_path / "done").exists()
    assert go_ahead(tmp_path) == "", "it came too late"


def test_a_frozen_agent_is_stopped_at_hook_at_even_if_agent_at_is_later(host: Host) -> None:
    host.send(*hook(sh("exit 0")))
    host.send_last(*arm(now(), now() + LIMIT_S, agent_at=now() + 2 * LIMIT_S))
    assert host.code(host.guard) == guard.ACTED
    assert host.code(host.agent) == -signal.SIGKILL


# --- releasing the role ------------------------------------------------------------------------


def back(folder: Path) -> list[str]:
    """A RELEASE message with a helper that records its document, and what it reads from stdin."""
    note = f'echo "$@" >{folder}/words; cat /proc/self/fd/3 >{folder}/document; head -c 1 >{folder}/byte'
    return ["RELEASE", '{"document": 1}', "/bin/sh", "-c", f"{note}; touch {folder}/ended", "sh"]


def helper_runs(folder: Path) -> bool:
    """Whether a process still has the helper's document open, from its fork on."""
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            ours = (process / "cmdline").read_bytes()
            if str(folder).encode() not in ours and b"\0".join(map(os.fsencode, GUARD)) not in ours:
                continue
            for link in (process / "fd").iterdir():
                with suppress(FileNotFoundError):  # closed meanwhile
                    if link.readlink().name.startswith("memfd:release"):
                        return True
    return False


def go_ahead(folder: Path) -> str:
    """The byte that the helper received; empty if it received none, or was not started. The guard has ended."""
    until(lambda: not helper_runs(folder))
    byte = folder / "byte"
    return byte.read_text() if byte.exists() else ""


def test_the_role_is_released_after_a_successful_demotion(
    host: Host, run: Run, tmp_path: Path
) -> None:
    """Fault 28."""
    workload, left = run(IDLE), run(STUBBORN)
    states = "; ".join(f"cut -d' ' -f3 /proc/{pid}/stat" for pid in (host.agent, left.pid))
    note = f"head -c 1 >{tmp_path}/byte; ({states}) >{tmp_path}/seen; touch {tmp_path}/ended"
    words = f'echo "$@" >{tmp_path}/words; cat /proc/self/fd/3 >{tmp_path}/document'
    host.send("RELEASE", '{"document": 1}', "/bin/sh", "-c", f"{words}; {note}", "sh")
    host.send(*hook(sh(f"until [ -e {tmp_path}/words ]; do sleep 0.01; done"), sh("exit 0")))
    host.send(
        *arm(now() + LIMIT_S, now() + 2 * LIMIT_S, groups=left.pid, workload=workload.pid, epoch=7)
    )
    os.kill(host.agent, signal.SIGKILL)
    assert host.code(host.guard) == guard.ACTED
    assert go_ahead(tmp_path) == "1"
    epoch, wait_s = (tmp_path / "words").read_text().split()
    assert epoch == "7"
    assert float(wait_s) > guard.HELPER_WAIT_S
    assert (tmp_path / "document").read_text() == '{"document": 1}'
    assert set((tmp_path / "seen").read_text().split()) <= {"Z"}


def test_the_role_is_released_once_a_stopped_agent_is_dead(host: Host, tmp_path: Path) -> None:
    host.send(*hook(sh("exit 0")))
    host.send(*back(tmp_path))
    host.send_last(*arm(now(), now() + LIMIT_S, epoch=7))
    assert host.code(host.guard) == guard.ACTED
    assert go_ahead(tmp_path) == "1"


@pytest.mark.parametrize(
    ("fails", "arming"),
    [
        pytest.param({"exits": 1}, {}, id="the hook fails"),
        pytest.param({"exits": "0; kill -9 $$"}, {}, id="the hook is killed"),
        pytest.param({"complete": False}, {}, id="a part of the hook is a webhook"),
        pytest.param({"hook": False}, {}, id="no hook was sent"),
        pytest.param({"back": False}, {}, id="there is no document"),
        pytest.param({}, {"epoch": ""}, id="the server has no epochs"),
        pytest.param({}, {"late": True}, id="it came too late"),
        pytest.param({}, {"demoting": True}, id="the agent's demotion hangs"),
    ],
)
def test_the_role_is_not_released_if(
    host: Host, tmp_path: Path, fails: dict[str, Any], arming: dict[str, Any]
) -> None:
    """Fault 28: never by a guard whose demotion failed, or that came too late."""
    if fails.get("hook", True):
        script = sh(f"exit {fails.get('exits', 0)}")
        if "kill" in str(fails.get("exits")):
            script = sh("kill -9 $$")
        host.send(*hook(script, complete=fails.get("complete", True)))
    if fails.get("back", True):
        host.send(*back(tmp_path))
    hook_at, kill_at = now(), now() + (FAILS_S if "exits" in fails else LIMIT_S)
    if arming.get("late"):
        hook_at, kill_at = now() - 2.0, now() - 1.0
    if arming.get("demoting"):
        hook_at, kill_at = float("inf"), now() + 0.2
    host.send_last(*arm(hook_at, kill_at, epoch=arming.get("epoch", 7)))
    assert host.code(host.guard) == guard.ACTED
    assert go_ahead(tmp_path) == ""


@pytest.mark.parametrize("writable", [True, False])
def test_without_hooks_and_workload_the_role_is_released_only_if_the_state_file_is_written(
    host: Host, tmp_path: Path, *, writable: bool
) -> None:
    """A sidecar that reads it was active until R + D, beside the next primary."""
    state = tmp_path / "state" if writable else tmp_path / "gone" / "state"
    host.send(*hook())
    host.send(*back(tmp_path))
    host.send(*arm(now() + LIMIT_S, now() + 2 * LIMIT_S, epoch=7, state=(state, "Secondary")))
    os.kill(host.agent, signal.SIGKILL)
    assert host.code(host.guard) == guard.ACTED
    assert go_ahead(tmp_path) == ("1" if writable else "")


@pytest.mark.parametrize("which", ["agent", "left"])
def test_the_role_is_not_released_while_a_process_of_the_tenure_is_alive(
    host: Host, run: Run, tmp_path: Path, which: str
) -> None:
    """It is frozen in the kernel: it has got SIGKILL, and lives."""
    left = run(IDLE)
    host.send(*hook(sh("exit 0")))
    host.send(*back(tmp_path))
    with freezer("guard") as cgroup:
        host.send(*arm(now() + LATE_S, now() + 2 * LATE_S, groups=left.pid, epoch=7))
        frozen = host.agent if which == "agent" else left.pid
        cgroup.freeze(frozen)
        if which == "left":
            os.kill(host.agent, signal.SIGKILL)
        until(lambda: not lives(host.guard))
        assert lives(frozen)
        assert go_ahead(tmp_path) == ""


def test_a_killed_guard_does_not_release_the_role(host: Host, tmp_path: Path) -> None:
    host.send(*hook(sh("exec sleep 1000")))
    host.send(*back(tmp_path))
    host.send_last(*arm(now(), now() + LIMIT_S, epoch=7))
    until((tmp_path / "words").exists)
    os.kill(host.guard, signal.SIGKILL)
    assert go_ahead(tmp_path) == ""


# --- how small it is --------------------------------------------------------------------------


def test_the_guard_takes_little_memory(
    host: Host, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    host.send(*hook(sh("x" * 2000)))
    host.send(*arm(now() + LIMIT_S, now() + LIMIT_S, state=(tmp_path / "state", "x" * 1000)))
    status = Path(f"/proc/{host.guard}/status").read_text()
    rollup = Path(f"/proc/{host.guard}/smaps_rollup").read_text()
    sizes = {
        name: int(number) for name, number in re.findall(r"(\w+):\s+(\d+) kB", status + rollup)
    }
    uss = sizes["Private_Clean"] + sizes["Private_Dirty"]
    record_property("guard_kib", {"rss": sizes["VmRSS"], "pss": sizes["Pss"], "uss": uss})
    assert sizes["VmRSS"] < RSS_KIB, f"RSS {sizes['VmRSS']}, PSS {sizes['Pss']}, USS {uss} KiB"
    maps = Path(f"/proc/{host.guard}/maps").read_text()
    libraries = {Path(name).name.split(".")[0] for name in re.findall(r"\S+\.so\S*", maps)}
    foreign = {name for name in libraries if not name.startswith(("ld-linux", "lib", "ld-"))}
    assert foreign <= {"select"}
    assert not libraries & {"libssl", "libcrypto", "libsqlite3", "libffi"}


def test_the_guard_imports_only_the_smallest_modules() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.close()
    with theirs, tempfile.TemporaryFile() as file:
        file.write(PROGRAM)
        file.flush()
        kept = file.fileno()
        command = [sys.executable, "-X", "importtime", *GUARD[1:]]
        result = subprocess.run(
            [*command, str(theirs.fileno()), str(os.getpid()), str(kept)],
            pass_fds=[theirs.fileno(), kept],
            capture_output=True,
            text=True,
            check=True,
            timeout=LIMIT_S,
        )
    lines = [line.rpartition("|")[2].rstrip() for line in result.stderr.splitlines()]
    modules = {line.strip() for line in lines}
    assert "signal" in modules
    heavy = {"asyncio", "socket", "subprocess", "threading", "re", "typing", "pathlib", "logging"}
    assert not modules & heavy
    assert not {name for name in modules if name.partition(".")[0] == "agent"}


def test_one_search_that_finds_nothing_does_not_end_the_killing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A search can miss a process whose parent ends meanwhile; the role would be released."""
    looks: list[None] = []
    find = ProcessTree.find

    def miss_once(tree: ProcessTree, **how: bool) -> set[proctree.Process]:
        looks.append(None)
        return find(tree, **how) if len(looks) > 1 else set()

    monkeypatch.setattr(ProcessTree, "find", miss_once)
    with subprocess.Popen(["sleep", "1000"], start_new_session=True) as process:
        gone = ProcessTree(set(), {process.pid}).kill(
            time.clock_gettime(time.CLOCK_BOOTTIME) + LIMIT_S
        )
        killed = process.poll()
        process.kill()
    assert gone
    assert killed == -signal.SIGKILL
