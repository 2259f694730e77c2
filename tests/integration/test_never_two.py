"""Regression tests with real processes for faults that once made two members active."""

import contextlib
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from agent import proctree
from agent.daemon.main import PREVIOUS_GUARD_S
from agent.errors import ExitCode
from tests.hung import FORKS, freezer, limited_tasks

from .disks import Disk
from .faults import Fault
from .stage import PATIENCE_S, Agent, Coordinator, Stage, free_port, lives, until
from .workloads import (
    START,
    STOP,
    TIMING,
    by_exec,
    by_hooks,
    guard_of,
    output,
    start,
    until_written_after,
    writes,
)
from .writer import first_and_last, overlap_s, written

LONG = ("--failover-timeout=20", "--demote=1", "--margin=1")
"""A lease that does not end within a test: whoever takes over earlier was handed the role."""

QUICKLY_S = 6.0
"""Well under that lease, and room for a busy machine."""


def with_writer(stage: Stage, name: str, coordinator: Coordinator, *flags: str) -> Agent:
    """An agent whose hooks start and stop a writer, with a long lease."""
    pid_file = stage.directory / f"{name}.pid"
    begin = START.format(writer=" ".join(writes(stage, name)), pid_file=pid_file)
    end = STOP.format(pid_file=pid_file)
    return stage.run(name, coordinator, timing=LONG, flags=flags, primary=begin, secondary=end)


def writers(stage: Stage, agent: Agent) -> set[int]:
    return {line.pid for line in written(output(stage)) if line.host == agent.name}


def kill_with_guard(agent: Agent) -> None:
    """What an OOM killer or a person can do: agent and guard die together, the workload lives on."""
    guard = guard_of(agent)
    agent.send(signal.SIGSTOP)
    os.kill(guard, signal.SIGKILL)
    agent.end(signal.SIGKILL)


# -- what blocks ------------------------------------------------------------------------------------


def test_a_state_file_on_a_dead_disk_costs_no_role_and_delays_no_demotion(
    stage: Stage, coordinator: Coordinator
) -> None:
    """Fault 1: a write to a dead network file system never returns."""
    one, other, epoch, fault = pair_with_fault(stage, coordinator)
    fault.trigger("agent.drivers.statefile", "StateFile.write", hangs=True)
    time.sleep(2 * 3.0)  # two leases
    assert coordinator.status()["Primary"] == one.name
    assert coordinator.status()["Epoch"] == epoch
    assert one.end() == 0
    until_written_after(stage, epoch)
    assert other.end() == 0
    assert overlap_s(output(stage)) < 0


# -- what dies --------------------------------------------------------------------------------------


def pair_with_fault(
    stage: Stage, coordinator: Coordinator, *flags: str
) -> tuple[Agent, Agent, int, Fault]:
    fault = Fault(stage.directory)
    pid_file = stage.directory / "host-a.pid"
    hooks = {
        "primary": START.format(writer=" ".join(writes(stage, "host-a")), pid_file=pid_file),
        "secondary": STOP.format(pid_file=pid_file),
    }
    words = [f"--hook-{event}={stage.hook('host-a', event, body)}" for event, body in hooks.items()]
    one = start(stage, "host-a", coordinator, flags=[*words, *flags], **fault.variables)
    epoch = one.until_role("Primary")["epoch"]
    other = by_hooks(stage, "host-b", coordinator)
    other.until_said("joined")
    return one, other, epoch, fault


@pytest.mark.parametrize("guard", ["--guard", "--no-guard"])
def test_an_exception_in_the_loop_causes_a_demotion_before_the_lease_expires(
    stage: Stage, coordinator: Coordinator, guard: str
) -> None:
    """Fault 3: it called the guard off, and nothing demoted."""
    one, other, epoch, fault = pair_with_fault(stage, coordinator, guard)
    fault.trigger("agent.core.session", "Session.step")
    assert one.wait() == ExitCode.TASK_FAILED
    until_written_after(stage, epoch)
    assert not [pid for pid in writers(stage, one) if lives(pid)]
    assert overlap_s(output(stage)) < 0
    assert one.state["role"] == "Secondary"
    assert other.end() == 0


def check_task_failed_in_order(
    stage: Stage, coordinator: Coordinator, one: Agent, other: Agent, epoch: int
) -> None:
    """Check that the first agent has ended its tenure in order for a failed task, and the other one takes over."""
    assert one.wait() == ExitCode.TASK_FAILED, one.said()
    assert "task failed" in one.said()
    until_written_after(stage, epoch)
    assert coordinator.tenure(epoch)["WhyEnded"].startswith("the task")
    assert overlap_s(output(stage)) < 0
    assert other.end() == 0


TASKS = [
    ("agent.drivers.rest.client", "RestClient.heartbeat"),
    ("agent.drivers.rest.client", "RestClient.status"),
    ("agent.daemon.reload", "Reload._apply"),
]


@pytest.mark.parametrize(("module", "method"), TASKS)
def test_a_task_that_dies_ends_the_tenure_in_order_with_its_own_exit_code(
    stage: Stage, coordinator: Coordinator, module: str, method: str
) -> None:
    """Fault 3: such a task died unseen, and the agent went on without it."""
    one, other, epoch, fault = pair_with_fault(stage, coordinator)
    fault.trigger(module, method)
    if method.startswith("Reload"):
        one.send(signal.SIGHUP)
    check_task_failed_in_order(stage, coordinator, one, other, epoch)


TASKS_OF_DRIVERS = [
    ("agent.daemon.role_runner", "RoleRunner._track_processes_of"),
    ("agent.ops.process", "OrphanReaper.reap"),
    ("agent.drivers.checks.runner", "Checks._record"),
    ("agent.drivers.workload", "Workload._on_own_end"),
]


@pytest.mark.parametrize(("module", "method"), TASKS_OF_DRIVERS)
def test_a_task_that_a_driver_keeps_ends_the_tenure_in_order_if_it_dies(
    stage: Stage, coordinator: Coordinator, module: str, method: str
) -> None:
    """Its owner never awaits it, so it died unseen: the workload had ended, and its agent stayed Primary."""
    fault = Fault(stage.directory)
    orphans = ["/bin/sh", "-c", "setsid sleep 0.3 &"]
    check = {"name": "c", "type": "exec", "command": orphans, "interval": 0.5}
    flags = [f"--check={json.dumps([check])}"]
    command = writes(stage, "host-a")
    one = start(stage, "host-a", coordinator, flags=flags, command=command, **fault.variables)
    epoch = one.until_role("Primary")["epoch"]
    other = by_exec(stage, "host-b", coordinator)
    other.until_said("joined")
    until(partial(writers, stage, one), "the first line")
    fault.trigger(module, method)
    if method.startswith("Workload"):
        (pid,) = writers(stage, one)
        os.kill(pid, signal.SIGKILL)
    check_task_failed_in_order(stage, coordinator, one, other, epoch)


@pytest.mark.parametrize("method", ["RestClient.release", "RestClient.leave"])
def test_a_task_that_dies_during_the_stop_does_not_delay_the_exit(
    stage: Stage, coordinator: Coordinator, method: str
) -> None:
    one, other, epoch, fault = pair_with_fault(stage, coordinator)
    fault.trigger("agent.drivers.rest.client", method)
    assert one.end() == ExitCode.TASK_FAILED
    until_written_after(stage, epoch)
    assert overlap_s(output(stage)) < 0
    assert other.end() == 0


# -- a start that fails -----------------------------------------------------------------------------


def test_a_start_that_fails_first_stops_the_previous_agents_workload(
    stage: Stage, coordinator: Coordinator
) -> None:
    """Fault 5: agent and guard were killed together, and the next start failed before its demotion."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        secret = stage.directory / "secret"
        secret.write_text("s3cret\n")
        secret.chmod(0o600)
        cases = [
            ([f"--probe-listen=127.0.0.1:{port}"], ExitCode.LISTEN),
            ([f"--ca-file={secret}"], ExitCode.CONFIG_VALUE),
        ]
        for flags, code in cases:
            one = by_hooks(stage, "host-a", coordinator)
            until(partial(writers, stage, one), "the first line")
            pids = writers(stage, one)
            kill_with_guard(one)
            assert any(map(lives, pids))
            again = by_hooks(stage, "host-a", coordinator, *flags)
            assert again.wait() == code, again.said()
            assert not any(map(lives, writers(stage, one))), again.said()
            until(lambda: coordinator.status().get("Primary") is None, "the lease to end")
            output(stage).unlink()


@pytest.mark.parametrize("how", ["read-only", "full", "directory"])
def test_a_start_that_cannot_write_its_state_stops_the_previous_agents_workload(
    stage: Stage, coordinator: Coordinator, how: str
) -> None:
    """It ended before its first demotion, and the workload of a killed agent went on beside the next primary."""
    with contextlib.ExitStack() as stack:
        disk = Disk(stack, stage.directory / "disk", "64k")
        flags = [f"--state-file={disk.path / 'state.json'}"]
        one = by_hooks(stage, "host-a", coordinator, *flags)
        until(partial(writers, stage, one), "the first line")
        kill_with_guard(one)
        assert any(map(lives, writers(stage, one)))
        if how == "full":
            disk.fill()
        elif how == "directory":
            (disk.path / "state.json").unlink()
            (disk.path / "state.json").mkdir()
        else:
            subprocess.run(["mount", "-o", "remount,ro", disk.path], check=True)
        again = by_hooks(stage, "host-a", coordinator, *flags)
        assert again.wait() == ExitCode.STATE_FILE, again.said()
        assert not any(map(lives, writers(stage, one))), again.said()


@pytest.mark.parametrize("left", [None, "", "{}", "another name of it"])
def test_what_a_killed_agent_has_left_is_ended_whatever_its_state_file_is(
    stage: Stage, coordinator: Coordinator, left: str | None
) -> None:
    """Its processes were known by that file only: removed, or damaged, the next agent joined beside them."""
    one = by_exec(stage, "host-a", coordinator)
    one.until_role("Primary")
    until(lambda: len(writers(stage, one)) > 1, "the child of the workload")
    kill_with_guard(one)
    assert any(map(lives, writers(stage, one)))
    flags = []
    if left is None:
        one.state_file.unlink()
    elif left.startswith("another"):
        (stage.directory / "other").symlink_to(stage.directory)
        flags = [f"--state-file={stage.directory / 'other' / one.state_file.name}"]
    else:
        one.state_file.write_text(left)
    again = by_exec(stage, "host-a", coordinator, *flags)
    again.until_said("joined")
    assert not any(map(lives, writers(stage, one)))
    assert again.end() == 0


def test_a_start_that_cannot_demote_logs_what_may_be_running_and_how_to_stop_it(
    stage: Stage, coordinator: Coordinator
) -> None:
    """It looked into the default directory only, and not at all after a usage error."""
    hook, config = stage.hook("host-a", "secondary"), stage.directory / "agent.toml"
    one = start(stage, "host-a", coordinator, flags=[f"--hook-secondary={hook}"])
    one.until_role("Primary")
    kill_with_guard(one)
    elsewhere, usual = (
        {"RUNTIME_DIRECTORY": "/no/such"},
        {"RUNTIME_DIRECTORY": str(stage.directory)},
    )
    state = f'state_file = "{one.state_file}"\n'
    variable = elsewhere | {"FAILOVER_AGENT_STATE_FILE": str(one.state_file)}
    flag, name = f"--state-file={one.state_file}", f"--config={config}"
    cases = [
        ([], "", usual, ExitCode.CONFIG_VALUE),  # no group
        (["--no-such-flag"], "", usual, ExitCode.USAGE),
        ([flag, "--group=g", "--hook-secondary=/no/such"], "", elsewhere, ExitCode.HOOK_MISSING),
        ([flag, name], "a = = 3", elsewhere, ExitCode.CONFIG_FILE),
        ([name], "no_such_key = 3", variable, ExitCode.CONFIG_UNKNOWN_KEY),
        ([name], f"{state}group = 3", elsewhere, ExitCode.CONFIG_VALUE),
    ]
    for flags, text, variables, code in cases:
        config.write_text(text)
        again = stage.process("host-a", "run", *flags, **variables)
        assert again.wait() == code, again.said()
        assert "its workload may still be active" in again.said()
        assert f"to stop it, run: {hook}" in again.said()
    asks = stage.process("host-b", "run", "--help", **usual)
    assert (asks.wait(), asks.said()) == (0, "")


def test_a_start_beside_a_frozen_guard_of_a_dead_agent_says_so(
    stage: Stage, coordinator: Coordinator
) -> None:
    """It named the dead agent as the one to stop, and no workload."""
    one = by_hooks(stage, "host-a", coordinator)
    one.until_role("Primary")
    guard = guard_of(one)
    os.kill(guard, signal.SIGSTOP)
    one.end(signal.SIGKILL)
    again = by_hooks(stage, "host-a", coordinator)
    code = again.popen.wait(PREVIOUS_GUARD_S + PATIENCE_S)
    os.kill(guard, signal.SIGCONT)
    assert code == ExitCode.SESSION_IN_USE
    assert (
        f"held by the guard of the agent with pid {one.popen.pid}, which has died" in again.said()
    )
    assert f"to stop it, run: {stage.directory / 'host-a-secondary'}" in again.said()
    until(lambda: not lives(guard), "the guard to demote")


# -- a reload ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_tenure_ends_by_the_demotion_hook_with_which_it_began(
    stage: Stage, coordinator: Coordinator, number: signal.Signals
) -> None:
    """Fault 6: a reload took the hook away, and the workload outlived the role."""
    file = stage.directory / "agent.toml"
    pid_file = stage.directory / "host-a.pid"
    begin = START.format(writer=" ".join(writes(stage, "host-a")), pid_file=pid_file)
    hooks = {
        "primary": stage.hook("host-a", "primary", begin),
        "secondary": stage.hook("host-a", "secondary", STOP.format(pid_file=pid_file)),
    }
    file.write_text("".join(f'hook_{event} = ["{path}"]\n' for event, path in hooks.items()))
    one = start(stage, "host-a", coordinator, flags=[f"--config={file}"])
    one.until_role("Primary")
    until(lambda: writers(stage, one), "the first line")
    file.write_text("")
    one.send(signal.SIGHUP)
    one.until_said("configuration read again")
    one.end(number)
    until(lambda: not any(map(lives, writers(stage, one))), "the workload to be stopped")
    stage.until_event("host-a", "end", "secondary")


# -- quickly one ------------------------------------------------------------------------------------


def took_over_s(stage: Stage, since_s: float, epoch: int) -> float:
    newer = until_written_after(stage, epoch)
    return first_and_last(output(stage))[newer][0] - since_s


def test_the_guard_of_a_killed_agent_releases_the_role(
    stage: Stage, coordinator: Coordinator
) -> None:
    """Fault 28: the group waited for the end of the lease, though the workload was gone at once."""
    one = with_writer(stage, "host-a", coordinator)
    epoch = one.until_role("Primary")["epoch"]
    other = with_writer(stage, "host-b", coordinator)
    other.until_said("joined")
    until(lambda: writers(stage, one), "the first line")
    killed_at = time.monotonic()
    one.end(signal.SIGKILL)
    assert took_over_s(stage, killed_at, epoch) < QUICKLY_S
    assert coordinator.tenure(epoch)["WhyEnded"] == "demoted by the guard"
    assert overlap_s(output(stage)) < 0
    assert other.end() == 0


def test_a_guard_whose_demotion_failed_keeps_the_lease(
    stage: Stage, coordinator: Coordinator
) -> None:
    one = stage.run(
        "host-a", coordinator, secondary='[ "$FAILOVER_OLD_ROLE" != Primary ] || exit 1'
    )
    epoch = one.until_role("Primary")["epoch"]
    other = stage.run("host-b", coordinator)
    other.until_said("joined")
    one.end(signal.SIGKILL)
    other.until_role("Primary", after_epoch=epoch)
    assert coordinator.tenure(epoch)["WhyEnded"] == "its lease ended without a heartbeat"


def test_a_restarted_agent_releases_the_role_of_a_killed_one_after_its_first_demotion(
    stage: Stage, coordinator: Coordinator
) -> None:
    """Fault 28: agent and guard killed together, and the agent is started again."""
    one = with_writer(stage, "host-a", coordinator)
    epoch = one.until_role("Primary")["epoch"]
    other = with_writer(stage, "host-b", coordinator)
    other.until_said("joined")
    until(lambda: writers(stage, one), "the first line")
    kill_with_guard(one)
    started_at = time.monotonic()
    again = with_writer(stage, "host-a", coordinator)
    assert took_over_s(stage, started_at, epoch) < QUICKLY_S
    assert overlap_s(output(stage)) < 0
    assert (again.end(), other.end()) == (0, 0)


# -- another store ----------------------------------------------------------------------------------


def test_two_coordinators_in_one_list_never_make_two_primaries(stage: Stage) -> None:
    """Fault 9: a member that was cut off from the first one became primary at the second."""
    first, second = stage.serve(), stage.serve(store="memory")
    one = with_writer(stage, "host-a", first)
    one.until_role("Primary")
    other = stage.run("host-b", first, second, timing=TIMING)
    other.until_said("joined")
    first.end(signal.SIGKILL)
    other.until_said("coordinator of another store refused")
    with contextlib.suppress(AssertionError):
        until(lambda: other.state.get("role") == "Primary", "a second primary", patience_s=5)
        pytest.fail("two coordinators made two primaries")
    other.end()
    again = stage.run("host-b", second, timing=TIMING, flags=["--startup-timeout=2"])
    assert again.wait() == ExitCode.OTHER_STORE
    assert "remove" in again.said()


def test_the_agent_of_a_relative_state_file_is_demoted_by_its_guard(
    stage: Stage, coordinator: Coordinator
) -> None:
    """Fault 14: the guard runs in /, where it could not write the file."""
    one = start(stage, "host-a", coordinator, flags=["--state-file=relative.json"])
    path = Path(stage.directory, "relative.json")
    until(lambda: path.exists() and '"Primary"' in path.read_text(), "it to be primary")
    one.end(signal.SIGKILL)
    until(lambda: "demoted by the guard" in path.read_text(), "the guard to write the file")


def test_an_agent_joins_after_its_working_directory_was_removed(stage: Stage) -> None:
    """Fault 14: it read its relative files at the start, and died when it made their paths absolute."""
    home = stage.directory / "home"
    home.mkdir()
    secret = home / "password"
    secret.touch(0o600)
    secret.write_text("a secret")
    port = free_port()
    flags = ["--username=agent", "--password-file=password", "--startup-timeout=0"]
    endpoint = f"http://127.0.0.1:{port}/api/v1/clientfailover"
    one = start(stage, "host-a", endpoint, flags=flags, before=("env", "-C", str(home)))
    one.until_said("join failed, retrying")
    shutil.rmtree(home)
    stage.serve(port=port)
    one.until_role("Primary")
    assert one.end() == 0


# -- last resorts -----------------------------------------------------------------------------------


def test_a_fence_command_has_its_whole_limit_and_the_agent_its_own_exit_code(
    stage: Stage, coordinator: Coordinator
) -> None:
    """Fault 12: the guard killed the agent in the middle of it: 137 instead of 40."""
    begun, done = stage.directory / "begun", stage.directory / "done"
    fence = stage.hook("host-a", "fence", f"sleep 3; touch {done}")
    hook = stage.hook("host-a", "secondary", f"[ ! -e {begun} ] || exit 7; touch {begun}")
    one = start(
        stage,
        "host-a",
        coordinator,
        flags=[f"--hook-secondary={hook}", f"--fence-command={fence}", "--hook-limit=10"],
    )
    one.until_role("Primary")
    assert one.end() == ExitCode.DEMOTION_FAILED
    assert done.exists()
    assert "fence command ended" in one.said()


def test_the_watchdog_device_is_disarmed_only_after_the_demotion(
    stage: Stage, coordinator: Coordinator
) -> None:
    """Fault 13: it was disarmed before the demotion hook had run."""
    device = stage.directory / "watchdog"
    os.mkfifo(device)
    reader = os.open(device, os.O_RDONLY | os.O_NONBLOCK)
    stage.later(partial(os.close, reader))
    stage.hook("host-a", "secondary")
    one = stage.run(
        "host-a",
        coordinator,
        timing=TIMING,
        flags=[f"--watchdog-device={device}"],
        secondary=f"dd if={device} iflag=nonblock of={stage.directory}/seen 2>/dev/null",
    )
    one.until_role("Primary")
    assert one.end() == 0
    with contextlib.suppress(BlockingIOError):
        rest = os.read(reader, 65536)
    assert b"V" not in (stage.directory / "seen").read_bytes()
    assert rest.endswith(b"V")


def test_no_restart_forgets_a_process_that_cannot_be_killed(
    stage: Stage, coordinator: Coordinator
) -> None:
    """At the second restart no record of it was left, so the agent joined while the old workload was alive."""
    flags = ("--hook-limit=1",)
    pid_file = stage.directory / "pid"
    begin = f"sleep 1000 >/dev/null 2>&1 </dev/null &\necho $! > {pid_file}"
    one = stage.run("host-a", coordinator, timing=TIMING, flags=flags, primary=begin)
    one.until_role("Primary")
    pid = int(pid_file.read_text())
    with freezer("leftover") as frozen:
        kill_with_guard(one)
        frozen.freeze(pid)
        for _ in range(2):
            one = stage.run("host-a", coordinator, timing=TIMING, flags=flags)
            assert one.wait() == ExitCode.DEMOTION_FAILED, one.said()
            assert lives(pid)
        frozen.thaw()
        until(lambda: not lives(pid), "the end of the process")
    one = stage.run("host-a", coordinator, timing=TIMING, flags=flags)
    one.until_role("Primary")
    assert one.end() == 0


@contextlib.contextmanager
def hanging_promotion(stage: Stage, coordinator: Coordinator) -> Iterator[tuple[Agent, int]]:
    """An agent that takes over, and its promotion hook, whose exec hangs until the end of this context."""
    other = stage.run("host-b", coordinator, timing=LONG)
    other.until_role("Primary")
    one = stage.run("host-a", coordinator, timing=LONG)
    one.until_said("joined")
    with held_file(stage.directory / "host-a-primary"):
        assert other.end() == 0
        yield one, until(partial(child_before_exec, one), "a hook that is not executed yet")


def test_a_promotion_hook_whose_exec_hangs_does_not_outlive_its_agent(
    stage: Stage, coordinator: Coordinator
) -> None:
    """The guard did not know it, released the role, and the hook promoted when its disk answered."""
    with hanging_promotion(stage, coordinator) as (one, child):
        one.end(signal.SIGKILL)
        other = stage.run("host-b", coordinator, timing=LONG)
        other.until_role("Primary")
        assert not lives(child)
    assert [event.which for event in stage.events("host-a") if event.what == "begin"][-1] == (
        "secondary"
    )
    stage.check_promise()
    assert other.end() == 0


def test_a_promotion_hook_whose_exec_hangs_does_not_outlive_the_next_start(
    stage: Stage, coordinator: Coordinator
) -> None:
    """Agent and guard were killed, and without a mark the next agent did not find the hook."""
    with hanging_promotion(stage, coordinator) as (one, child):
        until(lambda: child in [pid for pid, _ in one.state["processes"]], "its record")
        kill_with_guard(one)
        assert lives(child)
        again = stage.run("host-a", coordinator, timing=LONG, flags=["--hook-primary=/bin/true"])
        again.until_said("agent started")
        assert not lives(child)
    assert again.end() == 0
    assert "primary" not in [event.which for event in stage.events("host-a")]


@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP])
def test_a_workload_that_uses_up_all_tasks_does_not_prevent_the_demotion_hook(
    stage: Stage, coordinator: Coordinator, fault: signal.Signals
) -> None:
    """The guard could fork no hook, so what only the hook stops (an address, a service) went on."""
    program = stage.directory / "forks.py"
    program.write_text(FORKS)
    demoted = stage.directory / "demoted"
    hook = stage.directory / "demote"  # it forks nothing: a task may be free for it, and no other
    hook.write_text(f"#!/bin/sh\n: >{demoted}\n")
    hook.chmod(0o700)
    begin = f"rm -f {demoted}; {sys.executable} -S {program} >/dev/null 2>&1 </dev/null &"
    timing = ("--failover-timeout=12", "--demote=6", "--margin=1")  # for a slow reaper of orphans
    with limited_tasks("forks", 80) as folder:
        flags = [f"--hook-secondary={hook}"]
        one = stage.run("host-a", coordinator, timing=timing, primary=begin, flags=flags)
        (folder / "cgroup.procs").write_text(str(one.popen.pid))
        one.until_role("Primary")
        until(lambda: (folder / "pids.current").read_text().strip() == "80", "no more tasks")
        one.send(fault)
        assert one.wait() == -signal.SIGKILL
        until(demoted.exists, "the demotion hook")
        until(lambda: not (folder / "cgroup.procs").read_text().strip(), "the end of the tenure")


@contextlib.contextmanager
def held_file(path: Path) -> Iterator[None]:
    """Nobody can open or execute the file until the end: a lease on it, as a slow disk."""
    before = signal.signal(signal.SIGIO, lambda *_: None)
    with path.open() as file:
        fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        yield
    signal.signal(signal.SIGIO, before)


def child_before_exec(agent: Agent) -> int | None:
    """A child of the agent with a session of its own that has the agent's command line for a while."""

    def found() -> set[int]:
        table = proctree.snapshot()
        ours = Path(f"/proc/{agent.popen.pid}/cmdline").read_bytes()
        children = {p for p, stat in table.items() if stat.parent == agent.popen.pid}
        return {
            pid
            for pid in children
            if table[pid].session == pid and Path(f"/proc/{pid}/cmdline").read_bytes() == ours
        }

    before = found()
    time.sleep(0.1)
    return next(iter(before & found()), None)
