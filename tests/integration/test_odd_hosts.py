"""Never two on hosts that lack something else than resources: system calls, signals, a hook, time for the agent."""

import errno
import fcntl
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import click
import pytest

import agent
from agent.daemon.state_publisher import RETRY_S
from agent.drivers.statefile import StateFile
from agent.errors import ExitCode
from tests.hung import dead_disk, without_pidfd

from .stage import LOOK_S, PATIENCE_S, Agent, Coordinator, Gate, Stage, lives, until
from .test_exhausted import (
    TIMING,
    Service,
    pair_in_mount_namespace,
    with_both,
    with_service,
    writer_lives,
)
from .workloads import by_exec, guard_of, output, pair, start, until_written_after, writes
from .writer import overlap_s, written

IGNORES = "import os, signal as s, sys; s.signal(s.SIGCHLD, s.SIG_IGN); os.execv(sys.argv[1], sys.argv[1:])"
NO_CHILDREN = [sys.executable, "-S", "-c", IGNORES]
"""The prefix of a command that then runs with SIGCHLD ignored, as some programs start all their children."""


@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize(
    "before",
    [
        pytest.param(without_pidfd(errno.ENOSYS), id="no-pidfd"),
        pytest.param(without_pidfd(errno.EPERM), id="pidfd-refused"),
        pytest.param(NO_CHILDREN, id="sigchld-ignored"),
    ],
)
def test_an_agent_demotes_wherever_it_was_started(
    stage: Stage, coordinator: Coordinator, before: list[str], fault: signal.Signals
) -> None:
    """Nothing was killed without pidfds, and no hook had a result with SIGCHLD ignored."""
    one = with_both(stage, "host-a", coordinator, before=before)
    epoch = one.until_role("Primary")["epoch"]
    other = with_both(stage, "host-b", coordinator)
    other.until_said("joined")
    until(lambda: {line.pid for line in written(output(stage))} - {0}, "the writer")
    assert one.end(fault) == (0 if fault is signal.SIGTERM else -fault)
    until_written_after(stage, epoch)
    assert overlap_s(output(stage)) < 0
    until(lambda: coordinator.tenure(epoch).get("WhyEnded"), "the end of the tenure")
    assert coordinator.tenure(epoch)["WhyEnded"] in {"stopping", "demoted by the guard"}
    assert other.end() == 0


def test_an_agent_that_is_started_with_closed_files_is_a_member(
    stage: Stage, coordinator: Coordinator
) -> None:
    """It ended at once, without a line: the next file that it opened was its stderr."""
    command = ["sh", "-c", f"test -c /proc/self/fd/1 && exec {shlex.join(writes(stage, 'host-a'))}"]
    before = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh"]
    one = start(stage, "host-a", coordinator, command=command, before=before)
    epoch = one.until_role("Primary")["epoch"]
    other = by_exec(stage, "host-b", coordinator)
    other.until_said("joined")
    assert one.end(signal.SIGKILL) == -signal.SIGKILL
    until_written_after(stage, epoch)
    assert overlap_s(output(stage)) < 0
    assert other.end() == 0


def test_an_agent_that_freezes_in_its_own_demotion_is_demoted_before_its_lease_expires(
    stage: Stage, coordinator: Coordinator
) -> None:
    """The guard did not run the demotion hook: it waited for the one of the agent, which was never started."""
    gate = Gate(stage, coordinator.endpoint)
    hooks = Service(stage, "host-a").hook_flags(stage)
    deaf = [sys.executable, "-S", "-c", "import signal as s; s.signal(15, s.SIG_IGN); s.pause()"]
    one = start(stage, "host-a", gate.endpoint, timing=TIMING, flags=hooks, command=deaf)
    epoch = one.until_role("Primary")["epoch"]
    other = with_service(stage, "host-b", coordinator)
    other.until_said("joined")
    gate.close()
    one.until_role("Secondary")
    one.send(signal.SIGSTOP)
    until_written_after(stage, epoch)
    assert overlap_s(output(stage)) < 0
    assert one.wait() == -signal.SIGKILL
    assert other.end() == 0


def test_an_agent_that_dies_at_the_end_of_a_demotion_that_hangs_leaves_nothing_past_its_lease(
    stage: Stage, coordinator: Coordinator
) -> None:
    """Its guard ran the hook for half of D, and killed the writer only after that."""
    gate = Gate(stage, coordinator.endpoint)
    body = (
        f"cd {stage.directory}; test -e failed || exit 0; trap '' TERM; while :; do sleep 0.1; done"
    )
    flags = [f"--hook-secondary={stage.hook('host-a', 'hangs', body)}"]
    flags += ["--demote=5", "--margin=0.4"]  # half of D is far more than what is left of L
    one = with_both(stage, "host-a", gate.endpoint, *flags)
    epoch = one.until_role("Primary")["epoch"]
    other = with_both(stage, "host-b", coordinator)
    other.until_said("joined")
    until(lambda: {line.pid for line in written(output(stage))} - {0}, "the writer")
    (stage.directory / "failed").touch()
    gate.close()
    one.until_role("Secondary")
    (stage.directory / "host-a.active").unlink()  # its hook, which hangs, would do that
    time.sleep(5 - 0.3)
    assert one.end(signal.SIGKILL) == -signal.SIGKILL
    until_written_after(stage, epoch)
    assert overlap_s(output(stage)) < 0
    assert other.end() == 0


def test_a_member_whose_demotion_hook_is_gone_promotes_nothing(
    stage: Stage, coordinator: Coordinator
) -> None:
    """It was promoted, and could not be demoted any more, since that needs the hook."""
    one = with_service(stage, "host-a", coordinator)
    epoch = one.until_role("Primary")["epoch"]
    other = with_service(stage, "host-b", coordinator)
    other.until_said("joined")
    Path(stage.directory, "host-b-secondary").unlink()
    assert one.end() == 0
    assert other.wait() == ExitCode.DEMOTION_FAILED
    assert "promotion failed: hook secondary: " in other.said()
    assert {line.epoch for line in written(output(stage))} == {epoch}


def test_a_member_whose_hook_directory_is_gone_starts_no_workload(
    stage: Stage, coordinator: Coordinator
) -> None:
    """The command of exec needs none, so it was started; the demotion hook could not be, and two were active."""
    folder, service = stage.directory / "folder", Service(stage, "host-b")
    folder.mkdir()
    hook = stage.hook("host-b", "secondary", service.secondary)
    flags = [f"--hook-directory={folder}", f"--hook-secondary={hook}"]
    command = ["sh", "-c", f"{service.primary}; exec sleep 1000"]
    one = with_service(stage, "host-a", coordinator)
    epoch = one.until_role("Primary")["epoch"]
    other = start(stage, "host-b", coordinator, timing=TIMING, flags=flags, command=command)
    other.until_said("joined")
    folder.rmdir()
    assert one.end() == 0
    assert other.wait() == ExitCode.DEMOTION_FAILED
    assert f"promotion failed: hook_directory {folder} must be a directory" in other.said()
    assert {line.epoch for line in written(output(stage))} == {epoch}


def test_a_workload_that_moves_from_process_to_process_does_not_escape(
    stage: Stage, coordinator: Coordinator
) -> None:
    """Each search found only a process that had ended when it was read, so the tenure counted as gone."""
    program = stage.directory / "hopper.py"
    program.write_text(HOPPER)
    stage.later(program.unlink)
    hop = f"{sys.executable} -S {program} {output(stage)} >/dev/null 2>&1 </dev/null &"
    one = stage.run("host-a", coordinator, timing=TIMING, primary=hop)
    epoch = one.until_role("Primary")["epoch"]
    other = stage.run("host-b", coordinator, timing=TIMING, primary=hop)
    other.until_said("joined")
    until(lambda: written(output(stage)), "the first line")
    one.end()
    until_written_after(stage, epoch)
    assert overlap_s(output(stage)) < 0
    other.end()


HOPPER = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
file = os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
at = 0
while True:
    if os.fork():
        os._exit(0)
    if time.monotonic_ns() > at + 5_000_000:
        if not os.path.exists(sys.argv[0]):
            os._exit(0)
        at = time.monotonic_ns()
        os.write(file, f"{os.environ['FAILOVER_EPOCH']} host {at} {os.getpid()}\\n".encode())
"""
"""A workload whose process is another one all the time."""


REMOVED_UNDER: Mapping[str, Callable[[Agent, Gate], None]] = {
    "stop": lambda one, _: one.send(signal.SIGTERM),
    "cut": lambda _, gate: gate.close(),
    "freeze": lambda one, _: one.send(signal.SIGSTOP),
    "lost guard": lambda one, _: os.kill(guard_of(one), signal.SIGKILL),
}


@pytest.mark.parametrize("fault", REMOVED_UNDER)
def test_an_agent_whose_program_is_removed_meanwhile_demotes(
    stage: Stage, coordinator: Coordinator, fault: str
) -> None:
    """An upgrade removes it. So a demotion must not import a module that is not imported yet."""
    one, other, epoch, gate = pair_in_mount_namespace(stage, coordinator)
    enter = ["nsenter", f"--target={one.popen.pid}", "--mount"]
    programs = (
        Path(agent.__file__).parent,
        Path(os.__file__).parent,
        Path(click.__file__).parents[1],
    )
    for folder in programs:
        subprocess.run([*enter, "mount", "-t", "tmpfs", "none", str(folder)], check=True)
    REMOVED_UNDER[fault](one, gate)
    until_written_after(stage, epoch)
    assert overlap_s(output(stage)) < 0
    assert not one.lines("task failed", "agent failed", "Traceback")
    one.end(signal.SIGKILL)
    assert other.end() == 0


def test_a_demotion_hook_on_a_dead_disk_fails_the_promotion_at_once(
    stage: Stage, coordinator: Coordinator
) -> None:
    """The guard was to have it first, and until the limit of hooks nobody was active."""
    hooks, link = stage.directory / "hooks", stage.directory / "link"
    hooks.mkdir()
    link.symlink_to(hooks)
    service = Service(stage, "host-b")
    for event, body in (("primary", service.primary), ("secondary", service.secondary)):
        path = hooks / event
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(0o700)
    flags = [f"--hook-{event}={link / event}" for event in ("primary", "secondary")]
    one = with_service(stage, "host-a", coordinator)
    epoch = one.until_role("Primary")["epoch"]
    other = start(stage, "host-b", coordinator, timing=TIMING, flags=flags)
    other.until_said("joined")
    with dead_disk(stage.directory / "disk") as disk:
        link.with_name("new").symlink_to(disk)
        link.with_name("new").replace(link)
        assert one.end() == 0
        other.until_said("promotion failed: the demotion hook was not read within 1 s")
        other.until_said("demoted by the guard, agent killed")  # the hook cannot run there, either
    assert {line.epoch for line in written(output(stage))} == {epoch}


def test_a_second_agent_of_a_session_whose_lock_file_was_removed_does_not_start(
    stage: Stage, coordinator: Coordinator
) -> None:
    """It ended the workload of the first one, which was started again, and released its tenure."""
    one, other, epoch = pair(stage, coordinator)
    one.state_file.with_name(f"{one.state_file.name}.lock").unlink()
    second = by_exec(stage, one.name, coordinator)
    assert second.wait() == ExitCode.SESSION_IN_USE
    assert f"pid {one.popen.pid}:" in second.said()
    assert one.state["epoch"] == epoch
    assert one.end() == 0
    until_written_after(stage, epoch)
    assert overlap_s(output(stage)) < 0
    assert other.end() == 0


def test_an_agent_whose_session_another_one_has_claimed_stops(
    stage: Stage, coordinator: Coordinator
) -> None:
    """Its directory was moved, and both wrote the same state file from then on."""
    folder, next_folder = stage.directory / "run", stage.directory / "next"
    folder.mkdir()
    next_folder.mkdir()
    one = by_exec(stage, "host-a", coordinator, f"--state-file={folder / 'state.json'}")
    one.state_file = folder / "state.json"
    epoch = one.until_role("Primary")["epoch"]
    other = by_exec(stage, "host-b", coordinator)
    other.until_said("joined")
    second = StateFile(next_folder / "state.json")
    second.acquire()
    stage.later(second.close)
    folder.rename(stage.directory / "moved")
    next_folder.rename(folder)
    assert one.wait() == ExitCode.SESSION_IN_USE
    assert not one.state_file.exists()
    until_written_after(stage, epoch)
    assert overlap_s(output(stage)) < 0
    assert other.end() == 0


def claim(agent: Agent, pid: int) -> int:
    """Claim the state file of a live agent, as after the removal of its lock file, in the name of a process."""
    lock, new = (agent.state_file.with_name(agent.state_file.name + end) for end in (".lock", ".x"))
    descriptor = os.open(new, os.O_RDWR | os.O_CREAT, 0o644)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    os.write(descriptor, f"{pid}\n".encode())
    new.replace(lock)
    return descriptor


def test_an_agent_whose_claim_is_gone_stops_in_order_and_not_for_those_that_only_try_to_start(
    stage: Stage, coordinator: Coordinator
) -> None:
    """A supervisor that started a second agent again and again could have ended the first one."""
    one = stage.run("host-a", coordinator)
    epoch = one.until_role("Primary")["epoch"]
    tries = iter(range(100_000, 200_000))
    refusals = 5 * RETRY_S / LOOK_S  # in that time, several attempts to write the state file
    descriptors = [claim(one, next(tries))]
    one.until_said("state file cannot be written")
    while len(descriptors) < refusals:
        time.sleep(LOOK_S)
        descriptors.append(claim(one, next(tries)))
        os.close(descriptors[-2])
    assert one.popen.poll() is None
    assert one.wait() == ExitCode.SESSION_IN_USE
    os.close(descriptors[-1])
    assert coordinator.tenure(epoch)["WhyEnded"] == "another agent has claimed the session"
    stage.check_promise()


FAILS = """
import os, sys
from agent.core.session import Session
from agent.cli.main import main
step = Session.step

def fail(*given):
    if os.path.exists("failed"):
        raise RuntimeError("a fault of ours")
    return step(*given)

Session.step = fail
sys.exit(main(sys.argv[4:]))
"""
"""The prefix of an agent whose loop fails once there is a file "failed"."""


@pytest.mark.parametrize("ends", [True, False])
def test_the_demotion_after_a_failed_loop_ends_before_systemds_watchdog_and_before_the_agent(
    stage: Stage, coordinator: Coordinator, *, ends: bool
) -> None:
    """Nothing answers the watchdog then, but after STOPPING=1 systemd does not wait for that."""
    body = f"cd {stage.directory}; test -e failed || exit 0; until test -e go; do sleep 0.01; done"
    hooks = {role: stage.hook("host-a", role, body) for role in ("primary", "secondary")}
    words = [f"--hook-{role}={path}" for role, path in hooks.items()]
    words += [f"--endpoint={coordinator.endpoint}", f"--group={stage.group}", "--no-guard"]
    words += ["--state-file=state", "--failover-timeout=10", "--demote=3", "--margin=1"]
    systemd = stage.enter(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
    systemd.bind(str(stage.directory / "notify"))
    systemd.settimeout(PATIENCE_S)
    variables = {"NOTIFY_SOCKET": str(stage.directory / "notify"), "WATCHDOG_USEC": "1000000"}
    before = [sys.executable, "-c", FAILS]
    agent = stage.process("host-a", "run", *words, before=before, **variables)
    agent.until_said("after=Primary")
    (stage.directory / "failed").touch()
    while b"STOPPING=1" not in systemd.recv(4096):
        pass
    if ends:
        (stage.directory / "go").touch()
    assert agent.wait() == (ExitCode.TASK_FAILED if ends else ExitCode.DEMOTION_FAILED)
    assert ends == (not agent.lines("demotion without the session failed"))
    (*_, line) = agent.lines("hook started hook=secondary")
    pid = int(line.partition("pid=")[2].split()[0])
    until(lambda: not lives(pid), "the end of the demotion hook")


FAILS_IN = """
import os, sys
from {module} import {owner}
from agent.cli.main import main
works = {owner}.{method}

def fail(*given, **named):
    if os.path.exists("failed"):
        raise RuntimeError("a fault of ours")
    return works(*given, **named)

{owner}.{method} = fail
sys.exit(main(sys.argv[4:]))
"""
"""The prefix of an agent of which one method fails once there is a file "failed"."""


@pytest.mark.parametrize(
    ("module", "owner", "method", "runs_hook"),
    [
        ("agent.daemon.state_publisher", "StatePublisher", "write", True),
        ("agent.daemon.guard_control", "GuardControl", "update", True),
        ("agent.daemon.payload", "Payloads", "build_role_payload", False),
    ],
)
def test_what_made_the_loop_fail_does_not_keep_the_tenure_alive(
    stage: Stage, coordinator: Coordinator, module: str, owner: str, method: str, *, runs_hook: bool
) -> None:
    """The demotion without the session raised the same exception, and the promotion's processes lived on."""
    fails = [sys.executable, "-c", FAILS_IN.format(module=module, owner=owner, method=method)]
    one = with_both(stage, "host-a", coordinator, "--no-guard", before=fails)
    one.until_role("Primary")
    until(lambda: {line.pid for line in written(output(stage))} - {0}, "the writer")
    (stage.directory / "failed").touch()
    one.send(signal.SIGTERM)
    assert one.wait() == (ExitCode.TASK_FAILED if runs_hook else ExitCode.DEMOTION_FAILED)
    assert not writer_lives(stage, one)
    _, *again = one.lines("hook ended hook=secondary")  # the first one is that of the start
    assert bool(again) == runs_hook
    assert one.lines("agent failed")


def test_a_promotion_has_ended_before_the_demotion_after_a_failed_loop(
    stage: Stage, coordinator: Coordinator
) -> None:
    """Both hooks ran at once, so what the promotion started last stayed active."""
    service = Service(stage, "host-a")
    body = f"touch promoting; until test -e go; do sleep 0.01; done; {service.primary}"
    demotes = f"{service.secondary}; touch go; sleep 0.5"
    hooks = {"primary": body, "secondary": f"test -e failed || exit 0; {demotes}"}
    words = [
        f"--hook-{event}={stage.hook('host-a', event, f'cd {stage.directory}; {hooks[event]}')}"
        for event in hooks
    ]
    fails = [sys.executable, "-c", FAILS]
    flags = [*words, "--no-guard"]
    one = start(stage, "host-a", coordinator, timing=TIMING, flags=flags, before=fails)
    until((stage.directory / "promoting").exists, "the promotion")
    (stage.directory / "failed").touch()
    assert one.wait() == ExitCode.TASK_FAILED
    assert not service.file.exists()


@pytest.mark.parametrize("early_s", [1.0, 0.1])
def test_the_demotion_after_a_failed_loop_ends_with_the_lease(
    stage: Stage, coordinator: Coordinator, early_s: float
) -> None:
    """It had all of its budget, or half, however little of the lease was left: the writer lived on past L."""
    body = f"cd {stage.directory}; test -e failed || exit 0; exec sleep 60"
    flags = [f"--hook-secondary={stage.hook('host-a', 'hangs', body)}", "--no-guard"]
    fails = [sys.executable, "-c", FAILS]
    one = with_both(stage, "host-a", coordinator, *flags, before=fails)
    epoch = one.until_role("Primary")["epoch"]
    other = with_both(stage, "host-b", coordinator)
    other.until_said("joined")
    until(lambda: {line.pid for line in written(output(stage))} - {0}, "the writer")
    one.send(signal.SIGSTOP)
    (stage.directory / "failed").touch()
    left_s = one.state["active_until_boottime_s"] - time.clock_gettime(time.CLOCK_BOOTTIME)
    time.sleep(left_s - early_s)
    one.send(signal.SIGCONT)
    (stage.directory / "host-a.active").unlink()  # its hook, which hangs, would do that
    until_written_after(stage, epoch)
    assert overlap_s(output(stage)) < 0
    assert one.wait() == ExitCode.DEMOTION_FAILED
    assert other.end() == 0


def test_the_demotion_after_a_failed_loop_that_is_late_kills_the_writer_first(
    stage: Stage, coordinator: Coordinator
) -> None:
    """It went on until the hook had used up all of its budget, though the lease was over."""
    body = f"cd {stage.directory}; test -e failed || exit 0; exec sleep 60"
    flags = [f"--hook-secondary={stage.hook('host-a', 'hangs', body)}", "--no-guard"]
    flags += ["--demote=4"]
    fails = [sys.executable, "-c", FAILS]
    one = with_both(stage, "host-a", coordinator, *flags, before=fails)
    one.until_role("Primary")
    until(lambda: writer_lives(stage, one), "the writer")
    one.send(signal.SIGSTOP)
    (stage.directory / "failed").touch()
    left_s = one.state["active_until_boottime_s"] - time.clock_gettime(time.CLOCK_BOOTTIME)
    time.sleep(left_s + 0.2)
    late_at = time.monotonic()
    one.send(signal.SIGCONT)
    until(lambda: not writer_lives(stage, one), "the end of the writer")
    assert time.monotonic() < late_at + 1.5
    assert one.wait() == ExitCode.DEMOTION_FAILED


@pytest.mark.parametrize("once", [True, False])
def test_a_demotion_after_a_failed_loop_is_repeated_and_then_fenced(
    stage: Stage, coordinator: Coordinator, *, once: bool
) -> None:
    """It was tried once, and no fence command ran, though nobody knew whether the host was inactive."""
    body = (
        f"cd {stage.directory}; test -e failed || exit 0; test -e tried && touch again; touch tried"
    )
    body += "; test -e again || exit 1" if once else "; exit 1"
    fence = stage.hook("host-a", "fence", f"touch {stage.directory}/fenced")
    flags = [f"--hook-secondary={stage.hook('host-a', 'fails', body)}", f"--fence-command={fence}"]
    fails = [sys.executable, "-c", FAILS]
    one = with_both(stage, "host-a", coordinator, *flags, "--no-guard", before=fails)
    one.until_role("Primary")
    (stage.directory / "failed").touch()
    assert one.wait() == (ExitCode.TASK_FAILED if once else ExitCode.DEMOTION_FAILED)
    assert (stage.directory / "again").exists()
    assert (stage.directory / "fenced").exists() != once
