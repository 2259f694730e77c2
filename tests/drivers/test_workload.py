"""The command of ``failover-agent exec``, as real processes: its group, its cgroup, its ends."""

import asyncio
import logging
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from agent.drivers import workload as workload_module
from agent.drivers.workload import (
    GIVE_UP_AFTER,
    Restart,
    Workload,
    check_workload,
)
from agent.errors import ConfigError, ExitCode
from agent.ops import process_tree
from agent.ops.clock import Clock
from agent.ops.process_tree import own_cgroup
from tests.cgroups import new_cgroup

LIMIT_S = 60.0
"""Time limit of steps that take milliseconds on a quiet machine."""

MARK = uuid.uuid4().hex
"""The mark of the workload's processes. Tests that run in parallel have others, so none kills the processes of another."""

AGENT = """
import asyncio, sys, uuid
from agent.drivers.workload import Restart, Workload
from agent.ops.clock import Clock

async def main():
    argv, mark = sys.argv[2:], uuid.uuid4().hex
    workload = Workload(argv, Clock(), Restart.NEVER, lambda status: None, mark=mark)
    assert await workload.start({"FAILOVER_EPOCH": "7"}) is None
    if sys.argv[1] == "wait":
        await workload._watching
        await workload.stop()
    else:
        await asyncio.sleep(1000)

asyncio.run(main())
"""

IGNORING = "trap 'echo x >>{0}.term' TERM; echo $$ >{0}; while :; do sleep 0.01; done"


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(LIMIT_S):
        while not condition():  # noqa: ASYNC110 - the condition has no event
            await asyncio.sleep(0.005)


def state_of(pid: int) -> str:
    """R, S, T (stopped), Z; empty for no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]
    except OSError:
        return ""


def lives(pid: int) -> bool:
    return state_of(pid) not in {"", "Z", "X"}


def read(path: Path) -> str:
    """Its whole lines; empty while it is missing."""
    try:
        text = path.read_text()
    except FileNotFoundError:
        return ""
    return text if text.endswith("\n") else ""


def has_text(path: Path, text: str) -> bool:
    return read(path) == text


class Made:
    """Makes workloads of shell scripts, and knows how they ended."""

    def __init__(self) -> None:
        self.ends: list[int | None] = []
        self.all: list[Workload] = []

    def __call__(
        self, script: str, restart: Restart = Restart.NEVER, cgroup: Path | None = None
    ) -> Workload:
        argv = ["/bin/sh", "-c", script]
        own = None if cgroup is None else cgroup / "workload"
        workload = Workload(argv, Clock(), restart, self.ends.append, cgroup=own, mark=MARK)
        self.all.append(workload)
        return workload


@pytest.fixture
async def new() -> AsyncIterator[Made]:
    made = Made()
    yield made
    for workload in made.all:
        workload.kill()
        async with asyncio.timeout(LIMIT_S):
            await workload.stop()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Back-off in milliseconds; no run counts as a long one."""
    monkeypatch.setattr(workload_module, "FIRST_DELAY_S", 0.001)
    monkeypatch.setattr(workload_module, "MAX_DOUBLINGS", 1)


def pid_of(workload: Workload) -> int:
    assert workload.pgid is not None
    return workload.pgid


# --- start and stop ---------------------------------------------------------------------------


async def test_the_command_runs_from_start_to_stop_in_its_own_process_group(
    new: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OURS", "kept")
    seen = tmp_path / "seen"
    show = 'echo "$FAILOVER_EPOCH $OURS $(pwd) $(cat | wc -c)"'
    workload = new(f"({show}) >{seen}; exec sleep 1000")
    assert workload.pgid is None
    assert await workload.start({"FAILOVER_EPOCH": "7"}) is None
    pid = pid_of(workload)
    assert os.getpgid(pid) == pid
    await until(lambda: read(seen))
    assert read(seen).split() == ["7", "kept", str(Path.cwd()), "0"]
    assert lives(pid)
    await workload.stop()
    assert state_of(pid) == "", "it was not reaped"
    assert workload.pgid is None
    assert new.ends == [], "the end was reported as its own"


async def test_a_new_start_has_the_variables_of_the_new_tenure(new: Made, tmp_path: Path) -> None:
    seen = tmp_path / "seen"
    workload = new(f"echo $FAILOVER_EPOCH >>{seen}; exec sleep 1000")
    for text in ("1\n", "1\n2\n"):
        assert await workload.start({"FAILOVER_EPOCH": text.split()[-1]}) is None
        await until(partial(has_text, seen, text))
        await workload.stop()


async def test_stop_without_start_returns(new: Made) -> None:
    await new("exit 0").stop()


async def test_a_command_that_ignores_term_runs_until_kill(new: Made, tmp_path: Path) -> None:
    workload = new(IGNORING.format(tmp_path / "ready"))
    await workload.start({})
    await until(lambda: read(tmp_path / "ready"))
    pid = pid_of(workload)
    stopping = asyncio.create_task(workload.stop())
    await until(lambda: read(tmp_path / "ready.term"))
    assert not stopping.done()
    assert lives(pid)
    workload.kill()
    async with asyncio.timeout(LIMIT_S):
        await stopping
    assert state_of(pid) == ""


async def test_stop_waits_for_the_members_that_outlive_the_leader(
    new: Made, tmp_path: Path
) -> None:
    child = IGNORING.format(tmp_path / "child")
    workload = new(f'sh -c "{child.replace("$", chr(92) + "$")}" & exec sleep 1000')
    await workload.start({})
    await until(lambda: read(tmp_path / "child"))
    leader, child_pid = pid_of(workload), int(read(tmp_path / "child"))
    stopping = asyncio.create_task(workload.stop())
    await until(lambda: state_of(leader) == "Z")
    assert workload.pgid == leader, "its group is still to be killed by the guard"
    await until(lambda: read(tmp_path / "child.term"))
    assert not stopping.done()
    workload.kill()
    async with asyncio.timeout(LIMIT_S):
        await stopping
    assert not lives(child_pid)


async def test_two_stops_at_once_both_return(new: Made) -> None:
    workload = new("exec sleep 1000")
    await workload.start({})
    async with asyncio.timeout(LIMIT_S):
        await asyncio.gather(workload.stop(), workload.stop())
    assert workload.pgid is None


async def test_a_stop_right_after_the_start_leaves_no_process(new: Made) -> None:
    workload = new("exec sleep 1000")
    for _ in range(5):
        assert await workload.start({}) is None
        pid = pid_of(workload)
        await workload.stop()
        assert state_of(pid) == ""
    assert new.ends == []


async def until_another_was_restarted(new: Made, directory: Path) -> None:
    """Wait until another command was restarted twice: by then the one under test would have been, too."""
    witness = new(f"echo x >>{directory}/witness", Restart.ALWAYS)
    await witness.start({})
    await until(lambda: read(directory / "witness").count("x") >= 3)
    await witness.stop()


async def test_a_command_that_ends_while_it_is_stopped_is_not_restarted(
    new: Made, quick: None, tmp_path: Path
) -> None:
    workload = new(f"echo x >>{tmp_path}/runs", Restart.ALWAYS)
    await workload.start({})
    pid = pid_of(workload)
    while state_of(pid) != "Z":
        pass  # without a turn of the loop
    await workload.stop()
    await until_another_was_restarted(new, tmp_path)
    assert read(tmp_path / "runs") == "x\n"
    assert new.ends == []


@pytest.mark.parametrize("how", ["kill", "stop"])
async def test_kill_or_stop_during_the_backoff_cancels_the_restart(
    new: Made,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
    how: str,
) -> None:
    monkeypatch.setattr(workload_module, "FIRST_DELAY_S", 0.2)
    workload = new(f"echo x >>{tmp_path}/runs", Restart.ALWAYS)
    await workload.start({})
    await until(lambda: "workload restart scheduled" in caplog.text)
    if how == "kill":
        workload.kill()
    else:
        await workload.stop()
    await until_another_was_restarted(new, tmp_path)
    assert read(tmp_path / "runs") == "x\n"


async def test_kill_before_any_start_does_nothing(new: Made) -> None:
    workload = new("exec sleep 1000")
    workload.kill()
    assert workload.pgid is None
    assert await workload.start({}) is None
    assert lives(pid_of(workload))


async def test_a_group_that_may_not_be_signalled_is_logged(
    new: Made, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: int) -> None:
        raise PermissionError(1, "Operation not permitted")

    workload = new("exec sleep 1000")
    await workload.start({})
    with monkeypatch.context() as patch:
        patch.setattr(os, "killpg", refuse)
        workload.kill()
    assert "no permission to signal workload" in caplog.text


async def test_a_program_that_cannot_be_started_is_reported() -> None:
    workload = Workload(["/nowhere/x"], Clock(), Restart.ALWAYS, lambda _: None, mark=MARK)
    why = await workload.start({})
    assert why is not None
    assert why.startswith("/nowhere/x could not be started: ")
    assert "No such file" in why
    await workload.stop()


# --- its own end ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "status"),
    [
        ("exit 0", 0),
        ("exit 3", 3),
        ("kill -TERM $$", 128 + signal.SIGTERM),
        ("kill -37 $$", 128 + 37),  # a real-time signal, which has no name
    ],
)
async def test_the_exit_status_is_that_of_a_shell(new: Made, script: str, status: int) -> None:
    workload = new(script)
    await workload.start({})
    await until(lambda: new.ends)
    assert new.ends == [status]
    await workload.stop()


async def test_the_end_of_the_command_is_logged(
    new: Made, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    await new("kill -TERM $$").start({})
    await until(lambda: new.ends)
    fields = [record.__dict__["fields"] for record in caplog.records]
    assert fields[-1]["result"] == "SIGTERM"


async def test_processes_that_it_leaves_behind_are_killed(new: Made, tmp_path: Path) -> None:
    workload = new(f"sleep 1000 & echo $! >{tmp_path}/pid; exit 0")
    await workload.start({})
    await until(lambda: new.ends)
    await until(lambda: not lives(int(read(tmp_path / "pid"))))


@pytest.mark.parametrize(
    ("restart", "script", "ends"),
    [
        (Restart.NEVER, "exit 0", [0]),
        (Restart.NEVER, "exit 1", [1]),
        (Restart.ON_FAILURE, "exit 0", [0]),
    ],
)
async def test_an_end_that_the_policy_accepts_causes_no_restart(
    new: Made, quick: None, tmp_path: Path, *, restart: Restart, script: str, ends: list[int]
) -> None:
    workload = new(f"echo x >>{tmp_path}/runs; {script}", restart)
    await workload.start({})
    await until(lambda: new.ends)
    await until_another_was_restarted(new, tmp_path)
    assert (new.ends, read(tmp_path / "runs")) == (ends, "x\n")


@pytest.mark.parametrize("restart", [Restart.ON_FAILURE, Restart.ALWAYS])
async def test_a_command_is_not_restarted_after_too_many_failures(
    new: Made, quick: None, tmp_path: Path, restart: Restart
) -> None:
    workload = new(f"echo x >>{tmp_path}/runs; exit 1", restart)
    await workload.start({})
    await until(lambda: new.ends)
    assert new.ends == [None]
    await until_another_was_restarted(new, tmp_path)
    assert read(tmp_path / "runs") == GIVE_UP_AFTER * "x\n"


async def test_a_command_that_exits_with_0_is_always_restarted(
    new: Made, quick: None, tmp_path: Path
) -> None:
    """A failure now and then is not one of many in a row."""
    runs = tmp_path / "runs"
    script = f"echo x >>{runs}; test $(($(wc -l <{runs}) % 4)) != 0"
    workload = new(script, Restart.ALWAYS)
    await workload.start({})
    await until(lambda: len(read(runs)) >= 2 * 3 * GIVE_UP_AFTER)
    assert new.ends == []


async def test_the_restart_delay_doubles_up_to_the_longest(
    new: Made, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(workload_module, "FIRST_DELAY_S", 0.001)
    monkeypatch.setattr(workload_module, "LONGEST_DELAY_S", 0.006)
    clock = Clock()
    monkeypatch.setattr(clock, "boottime", lambda: 0.0)  # no run is a long one
    workload = Workload(["/bin/true"], clock, Restart.ALWAYS, new.ends.append, mark=MARK)
    new.all.append(workload)
    await workload.start({})
    await until(lambda: len(caplog.records) >= 5)
    delays = [record.__dict__["fields"]["after_s"] for record in caplog.records[:5]]
    assert delays == [0.001, 0.002, 0.004, 0.006, 0.006]


async def test_each_process_of_a_restarted_command_is_reported_at_once(
    new: Made, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The guard has to know what to kill. While an exec hangs, too, so it is reported before that."""
    monkeypatch.setattr(workload_module, "FIRST_DELAY_S", 0.001)
    groups: list[int | None] = []
    program = tmp_path / "program"
    program.write_text(f"#!/bin/sh\necho $$ >>{tmp_path}/runs\n")
    program.chmod(0o755)
    workload = Workload(
        [str(program)],
        Clock(),
        Restart.ALWAYS,
        new.ends.append,
        changed=lambda: groups.append(workload.pgid),
        mark=MARK,
    )
    assert await workload.start({}) is None
    await until(lambda: read(tmp_path / "runs").count("\n") >= 3)
    program.unlink()  # now its exec fails
    await until(lambda: new.ends)
    await workload.stop()
    runs = [int(pid) for pid in read(tmp_path / "runs").split()]
    reported = [group for group in groups if group is not None]
    assert reported[: len(runs)] == runs
    assert len(set(reported)) == len(runs) + GIVE_UP_AFTER, "also those whose exec failed"
    assert groups[1:4:2] == [None, None], "each one that is gone, too"
    assert groups[-1] is None


async def test_a_command_is_restarted_after_thousands_of_short_runs(
    new: Made, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(workload_module, "FIRST_DELAY_S", 1e-9)
    workload = new(f"echo x >>{tmp_path}/runs", Restart.ALWAYS)
    await workload.start({})
    # as after an hour of failures
    workload._short_runs = workload._failed_runs = 5000
    await until(lambda: read(tmp_path / "runs").count("x") >= 2)
    assert new.ends == []


async def test_a_long_run_resets_the_failure_count(
    new: Made, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(workload_module, "FIRST_DELAY_S", 0.0)
    monkeypatch.setattr(workload_module, "LONGEST_DELAY_S", 0.0)  # so that each run is a long one
    workload = new(f"echo x >>{tmp_path}/runs; exit 1", Restart.ALWAYS)
    await workload.start({})
    await until(lambda: read(tmp_path / "runs").count("x") > 2 * GIVE_UP_AFTER)
    assert new.ends == []


async def test_a_program_that_was_removed_is_not_restarted_for_ever(
    new: Made, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Starts that fail are counted from themselves, not from the last run that there was."""
    moment = [0.0]
    clock = Clock()
    monkeypatch.setattr(clock, "boottime", lambda: moment[0])
    monkeypatch.setattr(workload_module, "FIRST_DELAY_S", 0.001)
    program = tmp_path / "program"
    program.write_text(f"#!/bin/sh\nwhile ! test -e {tmp_path}/go; do sleep 0.01; done; exit 1\n")
    program.chmod(0o755)
    workload = Workload([str(program)], clock, Restart.ALWAYS, new.ends.append, mark=MARK)
    new.all.append(workload)
    assert await workload.start({}) is None
    moment[0] = 3600.0
    program.unlink()
    (tmp_path / "go").touch()
    await until(lambda: new.ends)
    assert new.ends == [None]


async def test_an_end_that_other_code_has_reaped_is_a_failure(
    new: Made, quick: None, caplog: pytest.LogCaptureFixture
) -> None:
    """An agent inherits an ignored SIGCHLD from a careless parent: then nobody can wait."""
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        caplog.set_level(logging.INFO)
        workload = new("exit 0")
        await workload.start({})
        await until(lambda: new.ends)
        assert new.ends == [255]
        assert workload.pgid is None, "its number may be a stranger's by now"
        async with asyncio.timeout(LIMIT_S):
            await workload.stop()
    finally:
        signal.signal(signal.SIGCHLD, before)
    assert "unknown" in str([record.__dict__.get("fields") for record in caplog.records])


# --- the agent's end --------------------------------------------------------------------------


def test_the_output_of_the_command_is_not_changed() -> None:
    """Log lines and results do not mix: stdout has the bytes of the command and nothing else."""
    script = r"printf '\377\000 as is'; echo to stderr >&2; exit 5"
    command = [sys.executable, "-c", AGENT, "wait", "/bin/sh", "-c", script]
    result = subprocess.run(command, capture_output=True, check=True, timeout=LIMIT_S)
    assert result.stdout == b"\xff\0 as is"
    assert b"to stderr\n" in result.stderr


async def test_the_command_dies_with_the_agent(tmp_path: Path) -> None:
    script = IGNORING.format(tmp_path / "pid")
    agent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", AGENT, "stay", "/bin/sh", "-c", script
    )
    await until(lambda: read(tmp_path / "pid"))
    pid = int(read(tmp_path / "pid"))
    assert lives(pid)
    agent.kill()
    await agent.wait()
    await until(lambda: not lives(pid))


# --- its cgroup -------------------------------------------------------------------------------


@pytest.fixture
def cgroup() -> Iterator[Path]:
    with new_cgroup() as folder:
        yield folder


DAEMON = "setsid sh -c 'echo $$ >{0}; exec sleep 1000' & "


async def test_a_daemon_that_has_left_the_group_is_stopped_with_the_command(
    new: Made, cgroup: Path, tmp_path: Path
) -> None:
    workload = new(DAEMON.format(tmp_path / "pid") + "exec sleep 1000", cgroup=cgroup)
    await workload.start({})
    await until(lambda: read(tmp_path / "pid"))
    daemon = int(read(tmp_path / "pid"))
    assert os.getpgid(daemon) != workload.pgid
    assert workload.cgroup is not None
    assert workload.cgroup.parent == cgroup
    folder = workload.cgroup
    async with asyncio.timeout(LIMIT_S):
        await workload.stop()
    assert not lives(daemon)
    assert not folder.exists()
    assert workload.cgroup is None


async def test_a_daemon_that_ignores_term_is_waited_for_and_killed(
    new: Made, cgroup: Path, tmp_path: Path
) -> None:
    (tmp_path / "daemon").write_text(IGNORING.format(tmp_path / "pid"))
    workload = new(f"setsid sh {tmp_path}/daemon & exec sleep 1000", cgroup=cgroup)
    await workload.start({})
    await until(lambda: read(tmp_path / "pid"))
    pid = int(read(tmp_path / "pid"))
    stopping = asyncio.create_task(workload.stop())
    await until(lambda: read(tmp_path / "pid.term"))
    assert not stopping.done()
    assert lives(pid)
    workload.kill()
    async with asyncio.timeout(LIMIT_S):
        await stopping
    assert not lives(pid)


async def test_a_daemon_does_not_outlive_a_command_that_ended_by_itself(
    new: Made, cgroup: Path, tmp_path: Path
) -> None:
    wait = f"while ! test -s {tmp_path}/pid; do sleep 0.01; done"
    await new(DAEMON.format(tmp_path / "pid") + wait, cgroup=cgroup).start({})
    await until(lambda: new.ends)
    await until(lambda: not lives(int(read(tmp_path / "pid"))))


async def test_the_command_runs_without_a_cgroup_that_accepts_no_process(
    new: Made, cgroup: Path
) -> None:
    threaded = cgroup / "threaded"
    threaded.mkdir()
    (threaded / "cgroup.type").write_text("threaded")  # its siblings take none from now on
    workload = new("exec sleep 1000", cgroup=cgroup)
    assert await workload.start({}) is None
    pid = pid_of(workload)
    await workload.stop()
    assert state_of(pid) == ""


async def test_the_command_runs_without_a_cgroup_that_cannot_be_created(
    new: Made, tmp_path: Path
) -> None:
    workload = new("exec sleep 1000", cgroup=tmp_path / "missing")
    assert await workload.start({}) is None
    assert workload.cgroup is None
    await workload.stop()


def test_our_own_cgroup_is_found_if_it_is_writable(
    monkeypatch: pytest.MonkeyPatch, cgroup: Path
) -> None:
    monkeypatch.setattr(process_tree, "CGROUP_ROOT", cgroup.parent)
    inside = cgroup / "ours"
    inside.mkdir()
    code = (
        "import os, sys; from pathlib import Path; from agent.ops import process_tree as w\n"
        f"w.CGROUP_ROOT = Path({str(cgroup.parent)!r})\n"
        f"Path({str(inside)!r}, 'cgroup.procs').write_text('0')\n"
        "print(w.own_cgroup())"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=LIMIT_S
    )
    assert result.stdout.strip() == str(inside)


def test_a_system_without_cgroup_version_2_has_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(process_tree, "CGROUP_ROOT", tmp_path)
    assert own_cgroup() is None


# --- small things -----------------------------------------------------------------------------


@pytest.mark.parametrize("program", ["sh", "/bin/sh"])
def test_a_program_that_can_be_started_is_accepted(program: str) -> None:
    check_workload([program, "-c", "exit 0"])


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        (
            "no-such-program",
            "command no-such-program is not in any directory on PATH; name",
        ),
        ("/nowhere/x", "command /nowhere/x is not a file; name a program that exists"),
        ("/etc", "command /etc is not a file; name"),
        ("x" * 5000, "is not in any directory on PATH"),
    ],
)
def test_a_program_that_does_not_exist_is_refused(program: str, reason: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_workload([program])
    assert caught.value.exit_code is ExitCode.HOOK_MISSING
    assert reason in str(caught.value)


@pytest.mark.parametrize("on_path", [False, True])
def test_a_program_that_may_not_be_executed_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, on_path: bool
) -> None:
    program = tmp_path / "plain"
    program.write_text("#!/bin/sh\n")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError) as caught:
        check_workload(["plain" if on_path else str(program)])
    assert caught.value.exit_code is ExitCode.HOOK_NOT_EXECUTABLE
    assert str(caught.value) == f"command {program} may not be executed; chmod +x {program}"
