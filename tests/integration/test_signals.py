"""Signals to real processes: ignored by the agent, its guard and the coordinator; forwarded by exec."""

import os
import signal
import time
from functools import partial
from pathlib import Path

import pytest

from agent.ops.signals import FORWARDED, IGNORED

from .stage import Coordinator, Stage, until
from .workloads import start

SENT = sorted({*IGNORED, *FORWARDED})
PASSED_ON = ("USR1", "USR2", "WINCH", "QUIT", "ALRM")


def handles(pid: int, number: int) -> bool:
    """Whether a process has a handler of its own, or ignores a signal."""
    masks = dict(
        line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
    )
    return any(int(masks[mask], 16) & (1 << (number - 1)) for mask in ("SigCgt", "SigIgn"))


def written(path: Path) -> bool:
    return path.exists() and "SigIgn" in path.read_text()


def children_of(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def send_all(pid: int) -> None:
    for number in SENT:
        os.kill(pid, number)


def test_agent_and_guard_ignore_every_ordinary_signal(
    stage: Stage, coordinator: Coordinator
) -> None:
    """Faults 21 and 23: SIGUSR1, SIGUSR2, SIGALRM and others killed the agent."""
    agent = stage.run("host-a", coordinator)
    epoch = agent.until_role("Primary")["epoch"]
    guards = children_of(agent.popen.pid)
    assert guards
    for _ in range(2):
        for pid in (agent.popen.pid, *guards):
            send_all(pid)
        agent.until_said("signal ignored signal=SIGRTMIN+1")
    for _ in range(2):  # a renewal sends the guard its deadline, and would find it dead
        renewed = agent.state["active_until_boottime_s"]
        until(lambda: agent.state["active_until_boottime_s"] > renewed, "a renewal")  # noqa: B023 - ends in its round
    assert children_of(agent.popen.pid) == guards
    assert len(agent.lines("guard ready")) == 1
    assert agent.until_role("Primary")["epoch"] == epoch
    assert len(agent.lines("signal ignored signal=SIGUSR1")) == 1
    assert agent.end() == 0


def test_signals_during_the_start_are_ignored(stage: Stage, coordinator: Coordinator) -> None:
    """Fault 21: also before there is an event loop, and before SIGHUP is a reload."""
    agent = stage.run("host-a", coordinator)
    until(lambda: handles(agent.popen.pid, signal.SIGUSR1), "the first handlers")
    while agent.state.get("role") != "Primary":
        assert agent.popen.poll() is None, agent.said()
        send_all(agent.popen.pid)
        time.sleep(0.01)
    assert agent.end() == 0


def test_hooks_and_the_workload_start_with_default_dispositions(
    stage: Stage, coordinator: Coordinator
) -> None:
    look = f"cat /proc/self/status > {stage.directory / 'hook'}"
    agent = start(
        stage,
        "host-a",
        coordinator,
        command=["/bin/sh", "-c", "cat /proc/self/status > workload; exec sleep 1000"],
        flags=[f"--hook-primary={stage.hook('host-a', 'primary', look)}"],
    )
    agent.until_role("Primary")
    for name in ("workload", "hook"):
        path = stage.directory / name
        until(partial(written, path), f"{path} to be written")
        masks = dict(line.split(":", 1) for line in path.read_text().splitlines())
        of_libc = 0b11 << 31  # 32 and 33, which the C library keeps for itself
        assert int(masks["SigIgn"], 16) & ~of_libc == 0
    assert agent.end() == 0


SCRIPT = (
    "".join(f"trap 'echo {name} >> signals' {name}; " for name in (*PASSED_ON, "HUP"))
    + "echo began >> signals; while :; do sleep 0.02; done"
)


@pytest.mark.parametrize("flags", [[], ["--workload-forward-hup"]])
def test_exec_forwards_signals_to_its_command(
    stage: Stage, coordinator: Coordinator, flags: list[str]
) -> None:
    """Fault 21: as supervisors do; SIGHUP, which reloads the agent, only by a setting."""
    signals = stage.directory / "signals"
    agent = start(stage, "host-a", coordinator, command=["/bin/bash", "-c", SCRIPT], flags=flags)
    epoch = agent.until_role("Primary")["epoch"]
    until(signals.exists, "the command to begin")
    right = ["began"]
    for name in ("HUP", *PASSED_ON):
        agent.send(signal.Signals[f"SIG{name}"])
        if name != "HUP" or flags:
            right.append(name)
            until(lambda: signals.read_text().split() == right, f"the command to get {name}")
    agent.until_said("configuration read again")
    assert agent.until_role("Primary")["epoch"] == epoch
    assert agent.end() == 0
    assert signals.read_text().split() == right


def test_exec_ignores_signals_while_its_command_does_not_run(
    stage: Stage, coordinator: Coordinator
) -> None:
    command = ["/bin/sh", "-c", "exec sleep 1000"]
    one = start(stage, "host-a", coordinator, command=command)
    one.until_role("Primary")
    other = start(stage, "host-b", coordinator, command=command)
    other.until_said("joined")
    other.send(signal.SIGUSR1)
    other.until_said("signal ignored: the workload does not run signal=SIGUSR1")
    assert other.end() == 0
    assert one.end() == 0


def test_the_coordinator_ignores_every_ordinary_signal(stage: Stage) -> None:
    """Faults 21 and 22: kill -HUP ended the coordinator, which systemd took for a clean end."""
    process = stage.process("coordinator", "serve", "--listen=127.0.0.1:0", "--store=memory")
    until(lambda: handles(process.popen.pid, signal.SIGUSR1), "the first handlers")
    while "coordinator listening" not in process.said():
        assert process.popen.poll() is None, process.said()
        send_all(process.popen.pid)
        time.sleep(0.01)
    after = len(process.said())
    send_all(process.popen.pid)
    process.until_said("configuration read again", after)
    assert process.end() == 0
