"""R12 with real processes: frozen and killed agents with their guards, and lost guards."""

import os
import signal
from collections.abc import Callable
from dataclasses import replace

import pytest

from .stage import Agent, Coordinator, Stage, lives, until
from .workloads import (
    by_exec,
    by_hooks,
    demote_slacks_s,
    guard_of,
    output,
    pair,
    start,
    until_written_after,
)
from .writer import overlap_s, written

TRIES = 3
"""The bench (tests/bench/guarded.py) has fifty."""


@pytest.mark.parametrize("how", [by_hooks, by_exec])
def test_the_workload_of_a_frozen_agent_ends_before_the_next_primarys_starts(
    stage: Stage, coordinator: Coordinator, how: Callable[..., Agent]
) -> None:
    """All tries at once, in a group each."""
    tries = []
    for n in range(TRIES):
        (stage.directory / str(n)).mkdir()
        group = f"{stage.group}-{n}"
        one_try = stage.enter(Stage(stage.directory / str(n), group))
        tries.append((one_try, *pair(one_try, replace(coordinator, group=group), how)))
    for _, one, _, _ in tries:
        one.send(signal.SIGSTOP)
    for one_try, one, other, epoch in tries:
        until_written_after(one_try, epoch)
        assert one.wait() == -signal.SIGKILL
        assert one.state["reason"] == "demoted by the guard"
        slacks_s = demote_slacks_s(one)
        assert len(slacks_s) == 1
        assert min(slacks_s) > 0
        assert other.end() == 0
        assert overlap_s(output(one_try)) < 0


@pytest.mark.parametrize(
    ("number", "why"),
    [(signal.SIGSTOP, "the guard has not answered"), (signal.SIGKILL, "the guard has ended")],
    ids=["frozen", "killed"],
)
def test_an_agent_that_lost_its_guard_releases_the_role_and_is_fit_with_a_new_guard(
    stage: Stage, coordinator: Coordinator, number: signal.Signals, why: str
) -> None:
    one, other, epoch = pair(stage, coordinator)
    guard = guard_of(one)
    os.kill(guard, number)
    until_written_after(stage, epoch)
    assert coordinator.tenure(epoch)["WhyEnded"].startswith(f"unfit: {why}")
    assert not lives(guard)
    one.until_said("fit to be primary again")
    assert lives(guard_of(one))
    assert guard_of(one) != guard
    assert (one.end(), other.end()) == (0, 0)
    assert overlap_s(output(stage)) < 0
    assert min(demote_slacks_s(one)) > 0


def test_a_lost_guard_of_a_secondary_is_replaced_without_a_role_change(
    stage: Stage, coordinator: Coordinator
) -> None:
    one, other, epoch = pair(stage, coordinator)
    os.kill(guard_of(other), signal.SIGKILL)
    other.until_said("fit to be primary again")
    assert (one.state["role"], one.state["epoch"]) == ("Primary", epoch)


def test_a_thawed_host_stops_its_workload_which_wrote_only_with_the_old_epoch(
    stage: Stage, coordinator: Coordinator
) -> None:
    """Nothing local can do more (docs/guard.md): what is downstream refuses by the epoch."""
    one, other, epoch = pair(stage, coordinator)
    until(lambda: len({line.pid for line in written(output(stage))}) == 2, "both to write")
    workload = {line.pid for line in written(output(stage))}
    host = [one.popen.pid, guard_of(one), *workload]
    for pid in host:
        os.kill(pid, signal.SIGSTOP)
    newer = until_written_after(stage, epoch)
    for pid in reversed(host):
        os.kill(pid, signal.SIGCONT)
    until(lambda: not any(map(lives, workload)), "the workload to be ended")
    assert {line.epoch for line in written(output(stage)) if line.host == one.name} == {epoch}
    assert newer > epoch
    assert other.state["role"] == "Primary"


def test_a_promotion_with_too_much_output_succeeds_and_the_log_counts_the_rest(
    stage: Stage, coordinator: Coordinator
) -> None:
    hook = stage.hook("host-a", "primary", "head -c 3000000 /dev/zero | tr '\\0' 'x' | fold -w 100")
    agent = start(stage, "host-a", coordinator, flags=[f"--hook-primary={hook}"])
    agent.until_role("Primary")
    assert agent.lines("hook output cut", "output of a hook")
    assert len(agent.said()) < 400_000
    assert agent.end() == 0


def test_a_daemon_that_left_the_hooks_group_is_ended_by_the_demotion(
    stage: Stage, coordinator: Coordinator
) -> None:
    pid_file = stage.directory / "daemon.pid"
    daemon = f"setsid sh -c 'echo $$ > {pid_file}; exec sleep 1000' >/dev/null 2>&1 &"
    hooks = [
        f"--hook-primary={stage.hook('host-a', 'primary', daemon)}",
        f"--hook-secondary={stage.hook('host-a', 'secondary', f'[ ! -e {pid_file} ] || kill $(cat {pid_file})')}",
    ]
    agent = start(stage, "host-a", coordinator, flags=hooks)
    agent.until_role("Primary")
    until(lambda: pid_file.exists() and pid_file.read_text(), "the daemon")
    pid = int(pid_file.read_text())
    agent.send(signal.SIGKILL)
    agent.wait()
    until(lambda: not lives(pid), "the demotion hook, run by the guard, to stop it")
