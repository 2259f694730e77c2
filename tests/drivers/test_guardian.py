"""The agent's end of the guard (R12), with real guards that are frozen, killed and closed."""

import asyncio
import errno
import itertools
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any

import pytest

import agent.guard.main
from agent.drivers.guardian import supervisor
from agent.drivers.guardian.messages import Arming, GuardHook
from agent.drivers.guardian.supervisor import Guardian
from agent.errors import ConfigError, ExitCode
from agent.ops.clock import Clock
from agent.ops.process import Popen
from tests.hung import dead_disk, freezer
from tests.this_process import children, descriptors, open_files

LIMIT_S = 60.0
"""Time limit of steps that take milliseconds on a quiet machine."""

ANSWER_S = 1.0
"""How long a guard may take to answer: far more than it needs even on a busy machine."""

TURN_S = 0.02
FAR = 1e6

AGENT = """
import asyncio, os, sys, time
from agent.drivers.guardian.messages import Arming, GuardHook
from agent.drivers.guardian.supervisor import Guardian
from agent.ops.clock import Clock
from agent.ops.process import Popen

async def main():
    clock = Clock()
    guardian = Guardian(clock, lambda why: None, limit_s=60)
    await guardian.start()
    seen, state, *_ = sys.argv[1:]
    guardian.set_hook(GuardHook(
        [["/bin/sh", "-c", f"env >{seen}; pwd >>{seen}"], ["/usr/bin/touch", seen + ".2"]],
        {"A": "1", "FAILOVER_REASON": "nul \\0 in it"},
        directory="/usr",
    ))
    guardian.arm(Arming(clock.boottime() + 60, clock.boottime() + 120, state=(state, "Secondary")))
    while guardian._unanswered:  # an answer has no public effect
        guardian.check()
        await asyncio.sleep(0.001)
    print(guardian.pid, flush=True)
    if sys.argv[3:] == ["abandon it"]:
        guardian.abandon()
        guardian.arm(None)
        guardian.check()
        await asyncio.sleep(0.3)
        print(os.path.exists(seen), flush=True)
        raise SystemExit(1)
    if sys.argv[3:]:
        real = os.kill
        os.kill = lambda pid, number: (time.sleep(0.3), real(pid, number))
        guardian.limit_s, slow = 0, guardian.pid
        while guardian.pid == slow:
            guardian.arm(Arming(clock.boottime() + 60, clock.boottime() + 120))
            guardian.check()
        await guardian.call_off()
        return
    await asyncio.sleep(1000)

asyncio.run(main())
"""


class Wire(socket.socket):
    """The agent's end of the socket. It records the messages, and the numbers of those that were answered."""

    def __init__(self, end: socket.socket) -> None:
        super().__init__(fileno=end.detach())
        self.sent: list[bytes] = []
        self.answered: list[int] = []

    @property
    def numbers(self) -> list[int]:
        """The numbers of the messages sent."""
        return [int(message.split(b"\0")[1]) for message in self.sent]

    @property
    def idle(self) -> bool:
        """Whether every message was answered."""
        return bool(self.sent) and self.answered[-1:] == self.numbers[-1:]

    def send(self, message: Any, flags: int = 0) -> int:
        self.sent.append(message)
        return super().send(message, flags)

    def recv(self, size: int, flags: int = 0) -> bytes:
        answer = super().recv(size, flags)
        if answer and not flags:
            self.answered.append(int(answer))
        return answer


@pytest.fixture(autouse=True)
def wires(monkeypatch: pytest.MonkeyPatch) -> list[Wire]:
    """The sockets to the guards of the test, the newest one last."""
    wires: list[Wire] = []

    def socketpair(*given: Any) -> tuple[Wire, socket.socket]:
        ours, theirs = real(*given)
        wires.append(Wire(ours))
        return wires[-1], theirs

    real = socket.socketpair
    monkeypatch.setattr(socket, "socketpair", socketpair)
    return wires


@pytest.fixture(autouse=True)
def started(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen[bytes]]:
    """The guards of the test, the newest one last."""
    started: list[subprocess.Popen[bytes]] = []

    def popen(*given: Any, **options: Any) -> subprocess.Popen[bytes]:
        started.append(real(*given, **options))
        return started[-1]

    real = Popen
    monkeypatch.setattr(supervisor, "Popen", popen)
    return started


class Changes:
    """Records the calls of ``on_change``."""

    def __init__(self) -> None:
        self.reasons: list[str | None] = []

    def __call__(self, reason: str | None) -> None:
        self.reasons.append(reason)


async def until(condition: Callable[[], object], guardian: Guardian | None = None) -> None:
    async with asyncio.timeout(LIMIT_S):
        while not condition():
            if guardian is not None:
                guardian.check()
            await asyncio.sleep(TURN_S)


def state_of(pid: int) -> str:
    """R, S, T (stopped), Z; empty for no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]
    except OSError:
        return ""


def files(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def folder(pid: int) -> Path:
    return Path(f"/proc/{pid}/cwd").readlink()


def pid_of(guardian: Guardian) -> int:
    assert guardian.pid is not None
    return guardian.pid


async def freeze(pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)
    await until(lambda: state_of(pid) == "T")


def held_up(turns: list[float]) -> float:
    """The longest time between two turns of the loop."""
    return max(later - earlier for earlier, later in itertools.pairwise(turns))


@pytest.fixture
def changes() -> Changes:
    return Changes()


@pytest.fixture(autouse=True)
async def _nothing_is_left() -> AsyncIterator[None]:
    """No zombie, no child and no open file outlives a guardian."""
    before = children()
    await asyncio.to_thread(lambda: None)  # the pool's thread is no leak of anybody
    open_before = descriptors()
    yield
    assert children() <= before
    assert descriptors() == open_before


@pytest.fixture
async def guardian(changes: Changes, _nothing_is_left: None) -> AsyncIterator[Guardian]:
    guardian = Guardian(Clock(), changes, limit_s=ANSWER_S)
    await guardian.start()
    yield guardian
    await guardian.call_off()


def arming() -> Arming:
    at = Clock().boottime() + FAR
    return Arming(at, at + FAR)


# --- messages ---------------------------------------------------------------------------------


async def test_a_started_guard_is_ready(guardian: Guardian, changes: Changes) -> None:
    assert changes.reasons == [None]
    assert state_of(pid_of(guardian)) in {"R", "S"}


async def test_each_message_is_answered_and_a_repeated_one_is_not_sent(
    guardian: Guardian, wires: list[Wire]
) -> None:
    before = len(wires[0].sent)
    for _ in range(3):
        guardian.arm(arming())
    same = arming()
    for _ in range(3):
        guardian.arm(same)
    guardian.arm(None)
    sent = wires[0].sent[before:]
    assert [message.split(b"\0")[0] for message in sent] == [b"ARM"] * 4 + [b"OFF"]
    assert wires[0].numbers == list(range(1, before + 6))
    await until(lambda: wires[0].idle, guardian)
    assert wires[0].answered == wires[0].numbers


async def test_the_guard_demotes_with_the_hook_and_state_it_received(tmp_path: Path) -> None:
    """The one test of both ends of the socket together: an agent that is killed."""
    seen, state = tmp_path / "seen", tmp_path / "state"
    command = [sys.executable, "-c", AGENT, str(seen), str(state)]
    process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE)
    assert process.stdout is not None
    guard_pid = int(await process.stdout.readline())
    process.kill()
    await process.wait()
    await until(lambda: state_of(guard_pid) in {"", "Z"})
    # /bin/sh adds PWD
    lines = set(seen.read_text().splitlines()) - {"_=/usr/bin/env", "PWD=/usr", "OLDPWD=/"}
    (left,) = (line for line in lines if line.startswith("FAILOVER_DEADLINE_MS="))
    assert 0 < int(left.partition("=")[2]) < 1000 * FAR
    assert lines == {"A=1", "FAILOVER_REASON=nul   in it", "/usr", left}
    assert (tmp_path / "seen.2").exists()
    assert state.read_text() == "Secondary"


async def test_an_abandoned_guard_demotes_as_soon_as_the_agent_has_exited(tmp_path: Path) -> None:
    """Fault 3: an agent that ends by an exception ends its guard's connection, and nothing else."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", AGENT, str(tmp_path / "seen"), "state", "abandon it"),
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    output, _ = await process.communicate()
    guard_pid, before_the_end = output.split()
    assert process.returncode == 1
    assert before_the_end == b"False", "it acted although the agent ran"
    await until(lambda: state_of(int(guard_pid)) in {"", "Z"})
    assert (tmp_path / "seen.2").exists()
    assert (tmp_path / "state").read_text() == "Secondary", "Fault 14: a relative path"


async def test_the_guard_has_its_own_session_and_no_other_descriptors(guardian: Guardian) -> None:
    pid = pid_of(guardian)
    assert os.getsid(pid) == os.getpgid(pid) == pid
    assert folder(pid) == Path("/")
    assert files(pid) == 5, "the three, the socket, and /proc"


# --- trouble ----------------------------------------------------------------------------------


async def test_a_frozen_guard_is_noticed_within_the_limit_and_replaced(
    guardian: Guardian, changes: Changes
) -> None:
    first = pid_of(guardian)
    await freeze(first)
    guardian.arm(arming())
    told_at = time.monotonic()
    await until(lambda: len(changes.reasons) > 1, guardian)
    assert ANSWER_S <= time.monotonic() - told_at <= ANSWER_S + TURN_S + 1.0
    why = changes.reasons[1]
    assert why is not None
    assert "has not answered for 1." in why
    await until(lambda: len(changes.reasons) > 2, guardian)
    assert state_of(first) == "", "it is gone, and no zombie"
    assert changes.reasons[2] is None
    assert len(changes.reasons) == 3
    assert pid_of(guardian) != first


async def test_a_guard_that_survives_sigkill_blocks_nothing(
    guardian: Guardian, changes: Changes, wires: list[Wire]
) -> None:
    """Fault 1: it is frozen in the kernel. Waiting for its end stopped every heartbeat."""
    first = pid_of(guardian)
    guardian.arm(arming())
    await until(lambda: wires[0].idle, guardian)
    with freezer("guardian") as cgroup:
        cgroup.freeze(first)
        guardian.arm(arming())
        turns = [time.monotonic()]
        while len(changes.reasons) < 3:  # lost, and another one answers
            guardian.check()
            await asyncio.sleep(TURN_S)
            turns.append(time.monotonic())
            assert turns[-1] < turns[0] + LIMIT_S
        assert held_up(turns) < ANSWER_S / 2
        assert pid_of(guardian) != first
        assert state_of(first) == "D", "SIGKILL has ended it: this shows nothing"
        begun_at = time.monotonic()
        await guardian.call_off()
        assert time.monotonic() - begun_at < ANSWER_S + 1.0
        assert state_of(first) == "D"
    await until(lambda: state_of(first) == "", guardian)  # it is reaped when it can be


async def test_no_further_guard_is_started_beside_too_many_that_cannot_die(
    guardian: Guardian,
    changes: Changes,
    monkeypatch: pytest.MonkeyPatch,
    started: list[subprocess.Popen[bytes]],
) -> None:
    monkeypatch.setattr(supervisor, "MOST_ABANDONED", 1)
    monkeypatch.setattr(supervisor, "RESTART_S", 0.05)
    with freezer("guardian") as cgroup:
        cgroup.freeze(pid_of(guardian))
        guardian.arm(arming())
        await until(lambda: len(changes.reasons) == 2, guardian)
        await asyncio.sleep(10 * supervisor.RESTART_S)  # the moments of the starts that must not be
        assert guardian.pid is None
        assert len(started) == 1
    await until(lambda: len(changes.reasons) == 3, guardian)
    assert changes.reasons[2] is None


async def test_python_on_a_dead_disk_blocks_nothing(
    guardian: Guardian,
    changes: Changes,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    wires: list[Wire],
) -> None:
    """Fault 1: executing it never returns, and not in the loop."""
    with dead_disk(tmp_path / "disk") as disk, monkeypatch.context() as patch:
        patch.setattr(sys, "executable", str(disk / "python"))
        os.kill(pid_of(guardian), signal.SIGKILL)
        await until(lambda: len(wires) == 2)  # the start that hangs has made its socket
        turns = [time.monotonic()]
        for _ in range(50):
            guardian.check()
            await asyncio.sleep(TURN_S)
            turns.append(time.monotonic())
        assert held_up(turns) < ANSWER_S / 2
        assert changes.reasons == [None, "the guard has ended"]
    await until(lambda: len(changes.reasons) == 3, guardian)
    assert changes.reasons[2] is None, "the disk is back"


async def test_a_start_with_python_on_a_dead_disk_raises(
    changes: Changes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(supervisor, "START_S", 0.3)
    with dead_disk(tmp_path / "disk") as disk:
        monkeypatch.setattr(sys, "executable", str(disk / "python"))
        guardian = Guardian(Clock(), changes, limit_s=ANSWER_S)
        with pytest.raises(ConfigError, match=r"not executed within 0\.3 s"):
            await guardian.start()
    # a start that was given up shows nothing else
    await until(lambda: not guardian._start_thread.busy)
    await guardian.call_off()


async def test_a_new_guard_runs_the_program_that_was_installed_at_the_start(
    changes: Changes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Fault 7: a program that has replaced it on disk since the start is not run."""
    # in place of another version of the whole package
    other = tmp_path / "main.py"
    shutil.copy(agent.guard.main.__file__, other)
    loader = SourceFileLoader("agent.guard.main", str(other))
    monkeypatch.setattr(agent.guard.main.__spec__, "loader", loader)
    guardian = Guardian(Clock(), changes, limit_s=ANSWER_S)
    await guardian.start()
    other.write_text("import sys\nsys.exit(5)\n")
    os.kill(pid_of(guardian), signal.SIGKILL)
    await until(lambda: len(changes.reasons) == 3, guardian)
    assert changes.reasons == [None, "the guard has ended", None]
    (program,) = (number for number, name in open_files().items() if "/memfd:" in name)
    with pytest.raises(PermissionError):
        os.write(program, b"it is sealed")
    await guardian.call_off()


async def test_a_guard_program_that_cannot_be_read_raises(
    changes: Changes, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = SourceFileLoader("agent.guard.main", "/nowhere/main.py")
    monkeypatch.setattr(agent.guard.main.__spec__, "loader", loader)
    with pytest.raises(ConfigError, match=r"cannot be read.*nowhere") as caught:
        Guardian(Clock(), changes, limit_s=ANSWER_S)
    assert caught.value.exit_code is ExitCode.GUARD


async def test_a_frozen_idle_guard_is_noticed(guardian: Guardian, changes: Changes) -> None:
    """It is asked once in a limit, and has as much to answer."""
    await freeze(pid_of(guardian))
    at = time.monotonic()
    await until(lambda: len(changes.reasons) > 1, guardian)
    assert time.monotonic() - at <= 2 * ANSWER_S + 2 * TURN_S + 1.0


async def test_a_slow_guard_is_killed_before_its_socket_is_closed(
    tmp_path: Path,
) -> None:
    """It is armed: the end of the connection would have it kill the agent."""
    seen = tmp_path / "seen"
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", AGENT, str(seen), str(tmp_path / "state"), "lose it"),
        stdout=subprocess.DEVNULL,
    )
    assert await process.wait() == 0
    assert not seen.exists()


async def test_a_guard_whose_queue_is_full_is_lost(guardian: Guardian, changes: Changes) -> None:
    await freeze(pid_of(guardian))
    guardian.limit_s = LIMIT_S
    for _ in range(10_000):
        guardian.arm(arming())
        if len(changes.reasons) > 1:
            break
    assert changes.reasons == [None, "cannot send to the guard: Resource temporarily unavailable"]


@pytest.mark.parametrize("has_pidfd", [True, False])
async def test_a_killed_guard_is_noticed_at_once_and_replaced(
    guardian: Guardian,
    changes: Changes,
    wires: list[Wire],
    monkeypatch: pytest.MonkeyPatch,
    *,
    has_pidfd: bool,
) -> None:
    def forbidden(_: int) -> int:
        raise PermissionError(errno.EPERM, "as in a container with a seccomp filter")

    if not has_pidfd:
        monkeypatch.setattr(os, "pidfd_open", forbidden)
        os.kill(pid_of(guardian), signal.SIGKILL)
        await until(lambda: len(changes.reasons) == 3, guardian)
        del changes.reasons[1:], wires[0]
    guardian.arm(arming())
    first = pid_of(guardian)
    os.kill(first, signal.SIGKILL)
    await until(lambda: len(changes.reasons) > 1)  # without check()
    assert changes.reasons == [None, "the guard has ended"]
    await until(lambda: len(changes.reasons) > 2, guardian)
    assert state_of(first) == "", "it is no zombie"
    assert changes.reasons[2:] == [None]
    assert wires[1].sent[-1].startswith(b"ARM\0")
    assert wires[1].idle, "the new one has received everything"


async def test_a_guard_that_dies_again_and_again_is_started_once_a_second(
    guardian: Guardian, changes: Changes, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts = []

    def popen(*_: object, **options: object) -> subprocess.Popen[bytes]:
        starts.append(time.monotonic())
        return real(["/bin/false"], start_new_session=True)

    real = subprocess.Popen
    monkeypatch.setattr(supervisor, "RESTART_S", 0.2)
    monkeypatch.setattr(supervisor, "Popen", popen)
    os.kill(pid_of(guardian), signal.SIGKILL)
    await until(lambda: len(starts) == 4, guardian)
    assert starts[-1] - starts[0] >= 3 * 0.2 - 0.01
    assert changes.reasons == [None, "the guard has ended"], "once, however often it fails"


async def test_a_new_guard_that_never_answers_is_replaced(
    guardian: Guardian, changes: Changes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def popen(*_: object, pass_fds: list[int], **__: object) -> subprocess.Popen[bytes]:
        monkeypatch.setattr(supervisor, "Popen", real)
        stuck.append(real(["/bin/sleep", "1000"], pass_fds=pass_fds))
        return stuck[0]

    stuck: list[subprocess.Popen[bytes]] = []
    real = subprocess.Popen
    monkeypatch.setattr(supervisor, "START_S", 0.5)
    monkeypatch.setattr(supervisor, "Popen", popen)
    os.kill(pid_of(guardian), signal.SIGKILL)
    await until(lambda: len(changes.reasons) == 3, guardian)
    assert changes.reasons == [None, "the guard has ended", None]
    assert stuck[0].returncode == -signal.SIGKILL


async def test_an_answer_that_was_not_read_in_time_is_not_late(
    guardian: Guardian, changes: Changes, wires: list[Wire]
) -> None:
    """This process was frozen, not the guard: what is there is read before anything is judged."""
    guardian.arm(arming())

    def answered() -> bool:
        """Without a turn of the loop, as after a freeze in the middle of one."""
        try:
            return int(wires[0].recv(64, socket.MSG_PEEK)) == wires[0].numbers[-1]
        except BlockingIOError:
            return False

    end_at = time.monotonic() + LIMIT_S
    while not answered() and time.monotonic() < end_at:
        pass
    guardian.limit_s = 0.2
    time.sleep(1.5 * guardian.limit_s)  # noqa: ASYNC251 - this process is frozen
    guardian.check()
    assert changes.reasons == [None]
    assert wires[0].numbers[-2] in wires[0].answered


async def test_an_answer_does_not_wake_the_loop(
    guardian: Guardian, changes: Changes, wires: list[Wire]
) -> None:
    """Each wakeup of an agent at rest costs more than the answer; ``check`` runs often enough."""
    guardian.arm(arming())
    number = wires[0].numbers[-1]
    readable = select.poll()
    readable.register(wires[0], select.POLLIN)
    await until(lambda: readable.poll(0))
    assert number not in wires[0].answered
    await until(lambda: number in wires[0].answered, guardian)
    assert changes.reasons == [None]


async def test_a_hook_that_does_not_fit_into_a_message_is_reported(
    guardian: Guardian, changes: Changes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "RESTART_S", 0.1)
    guardian.set_hook(GuardHook([["/bin/true"]], {"BIG": "x" * agent.guard.MESSAGE_BYTES}))
    assert len(changes.reasons) == 2
    why = changes.reasons[1]
    assert why is not None
    assert "HOOK has 65" in why
    assert "at most 65536 fit; shorten" in why
    guardian.set_hook(GuardHook([["/bin/true"]], {"SMALL": "x"}))
    await until(lambda: len(changes.reasons) == 3, guardian)
    assert changes.reasons[2] is None


async def test_the_longest_message_arrives_complete(
    guardian: Guardian, changes: Changes, wires: list[Wire]
) -> None:
    overhead = len(
        f"HOOK\0{wires[0].numbers[-1] + 1}\0/\0-1\0-1\0\0001\0\0001\0BIG=\0001\0/bin/true"
    )
    big = "x" * (agent.guard.MESSAGE_BYTES - overhead)
    guardian.set_hook(GuardHook([["/bin/true"]], {"BIG": big}))
    await until(lambda: wires[0].idle, guardian)
    assert changes.reasons == [None]


# --- start and end ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("program", "reason"),
    [("/nowhere/python", "No such file"), ("/bin/false", "(has ended|Broken pipe|reset by peer)")],
)
async def test_a_guard_that_cannot_be_started_raises_with_the_reason(
    changes: Changes, monkeypatch: pytest.MonkeyPatch, program: str, reason: str
) -> None:
    monkeypatch.setattr(sys, "executable", program)
    monkeypatch.setattr(supervisor, "RESTART_S", 0.0)
    guardian = Guardian(Clock(), changes, limit_s=ANSWER_S)
    with pytest.raises(
        ConfigError, match=f"could not be started with {program}.*{reason}"
    ) as caught:
        await guardian.start()
    assert caught.value.exit_code is ExitCode.GUARD
    assert changes.reasons == []
    monkeypatch.undo()
    await asyncio.sleep(0.1)
    assert guardian.pid is None, "it was started again after it was given up"


async def test_a_guard_that_does_not_answer_at_the_start_raises(
    changes: Changes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    silent = tmp_path / "python"
    silent.write_text("#!/bin/sh\nexec sleep 1000\n")
    silent.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(silent))
    monkeypatch.setattr(supervisor, "START_S", 0.1)
    guardian = Guardian(Clock(), changes, limit_s=0.1)
    with pytest.raises(ConfigError, match="has not started yet") as caught:
        await guardian.start()
    assert caught.value.exit_code is ExitCode.GUARD


async def test_a_lack_of_descriptors_raises_at_the_start_and_is_retried_later(
    guardian: Guardian,
    changes: Changes,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def full(*_: object) -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(supervisor, "RESTART_S", 0.05)
    with monkeypatch.context() as patch:
        patch.setattr(socket, "socketpair", full)
        other = Guardian(Clock(), changes, limit_s=ANSWER_S)
        with pytest.raises(ConfigError, match="Too many open files"):
            await other.start()
        caplog.clear()
        os.kill(pid_of(guardian), signal.SIGKILL)
        await until(lambda: "guard not started" in caplog.messages)
    await until(lambda: changes.reasons == [None, "the guard has ended", None])


async def test_call_off_disarms_an_armed_guard(
    changes: Changes, tmp_path: Path, started: list[subprocess.Popen[bytes]]
) -> None:
    guardian = Guardian(Clock(), changes, limit_s=LIMIT_S)
    await guardian.start()
    guardian.set_hook(GuardHook([["/usr/bin/touch", str(tmp_path / "done")]], {}))
    guardian.arm(arming())
    await guardian.call_off()
    assert started[0].returncode == 0
    assert guardian.pid is None
    assert not (tmp_path / "done").exists()
    await guardian.call_off()
    assert changes.reasons == [None]


async def test_call_off_kills_a_frozen_guard_after_the_limit(
    changes: Changes, started: list[subprocess.Popen[bytes]]
) -> None:
    guardian = Guardian(Clock(), changes, limit_s=0.2)
    await guardian.start()
    await freeze(started[0].pid)
    at = time.monotonic()
    await guardian.call_off()
    assert time.monotonic() - at >= 0.2
    assert started[0].returncode == -signal.SIGKILL
    assert changes.reasons == [None]


async def test_call_off_during_a_restart_starts_no_guard(
    changes: Changes, monkeypatch: pytest.MonkeyPatch, started: list[subprocess.Popen[bytes]]
) -> None:
    monkeypatch.setattr(supervisor, "RESTART_S", 0.2)
    guardian = Guardian(Clock(), changes, limit_s=ANSWER_S)
    await guardian.start()
    os.kill(pid_of(guardian), signal.SIGKILL)
    await until(lambda: len(changes.reasons) == 2)
    await guardian.call_off()
    await asyncio.sleep(supervisor.RESTART_S)  # the moment of the restart that must not be
    assert guardian.pid is None
    assert len(started) == 1
