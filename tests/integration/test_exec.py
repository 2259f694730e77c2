"""``failover-agent exec``: a command that runs only while this member is primary."""

import os
import signal
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

from .stage import Agent, Coordinator, Stage, lives, until
from .workloads import demote_slacks_s, output, pair, start, until_written_after, writes
from .writer import overlap_s, written

RUNS = "echo run >> {runs}; [ $(wc -l < {runs}) -lt 2 ] || exec sleep 1000; {end}"
"""A command that ends by itself the first time only."""


def pids_of(stage: Stage, agent: Agent) -> set[int]:
    return {line.pid for line in written(output(stage)) if line.host == agent.name}


def runs_of(stage: Stage) -> Path:
    return stage.directory / "runs"


def has_run_twice(runs: Path) -> bool:
    return runs.exists() and runs.read_text() == "run\n" * 2


def sh(text: str) -> list[str]:
    return ["/bin/sh", "-c", text]


def test_the_command_runs_on_the_primary_only_in_its_own_process_group(
    stage: Stage, coordinator: Coordinator
) -> None:
    one, other, epoch = pair(stage, coordinator)
    until(lambda: len(pids_of(stage, one)) == 2, "the command and its child to write")
    leader = min(pids_of(stage, one), key=lambda pid: pid != os.getpgid(pid))
    assert {os.getpgid(pid) for pid in pids_of(stage, one)} == {leader}
    assert leader not in (os.getpgid(one.popen.pid), one.popen.pid)
    assert other.end() == 0
    assert {(line.host, line.epoch) for line in written(output(stage))} == {(one.name, epoch)}


def test_the_command_gets_our_stdout_and_directory_and_the_variables_of_a_hook(
    stage: Stage, coordinator: Coordinator
) -> None:
    out = stage.directory / "stdout"
    agent = start(
        stage,
        "host-a",
        coordinator,
        command=sh("env > environment; pwd; printf 'no end of line'; exec sleep 1000"),
        before=("/bin/sh", "-c", f'exec "$@" > {out}', "sh"),
        OF_OURS="kept",
    )
    agent.until_role("Primary")
    until(lambda: "no end" in out.read_text(), "the command to write")
    assert agent.end() == 0
    assert out.read_text() == f"{stage.directory}\nno end of line"
    lines = (stage.directory / "environment").read_text().splitlines()
    given = dict(line.split("=", 1) for line in lines)
    assert given["OF_OURS"] == "kept"
    told = {key: given[f"FAILOVER_{key}"] for key in ("EVENT", "GROUP", "SESSION", "EPOCH")}
    right = {"EVENT": "primary", "GROUP": stage.group, "SESSION": "host-a", "EPOCH": "1"}
    assert told == right
    assert given["FAILOVER_NEW_ROLE"] == "Primary"
    assert given["FAILOVER_STATE_FILE"] == str(agent.state_file)


def test_after_a_sigkill_to_the_agent_its_command_ends_before_the_next_primarys_starts(
    stage: Stage, coordinator: Coordinator
) -> None:
    one, other, epoch = pair(stage, coordinator)
    until(lambda: len(pids_of(stage, one)) == 2, "the command and its child to write")
    one.end(signal.SIGKILL)
    until_written_after(stage, epoch)
    assert not [pid for pid in pids_of(stage, one) if lives(pid)]
    assert overlap_s(output(stage)) < 0
    assert other.end() == 0


def test_sigterm_ends_the_command_before_the_agent_exits_with_0(
    stage: Stage, coordinator: Coordinator
) -> None:
    ended = stage.directory / "ended"
    script = (
        f"trap 'sleep 0.2; touch {ended}; exit 5' TERM; echo $$ > pid; while :; do sleep 0.02; done"
    )
    agent = start(stage, "host-a", coordinator, command=sh(script))
    agent.until_role("Primary")
    until((stage.directory / "pid").exists, "the command to begin")
    assert agent.end() == 0
    assert ended.exists()
    assert agent.lines("workload ended pid=")
    assert 'result="exit 5"' in agent.lines("workload ended")[0]
    assert coordinator.tenure(1)["WhyEnded"] == "stopping"


def test_a_command_that_ignores_term_is_killed_within_the_budget(
    stage: Stage, coordinator: Coordinator
) -> None:
    agent = start(stage, "host-a", coordinator, command=writes(stage, "host-a", "child", "deaf"))
    agent.until_role("Primary")
    until(lambda: len(pids_of(stage, agent)) == 2, "the command and its child to write")
    began_at = time.monotonic()
    assert agent.end() == 0
    last_s = max(line.at_s for line in written(output(stage)))
    assert 0.3 < last_s - began_at < 2.4  # half of what is left of R + D, and by its end
    assert min(demote_slacks_s(agent)) > 0
    assert "result=SIGKILL" in agent.lines("workload ended")[0]


ENDS = [
    ("on-failure", "exit 0", 0),
    ("never", "exit 0", 0),
    ("never", "exit 3", 3),
    ("never", "kill -USR1 $$", 128 + signal.SIGUSR1),
    ("on-failure", "exit 3", None),
    ("on-failure", "kill -KILL $$", None),
    ("always", "exit 0", None),
    ("always", "exit 3", None),
]
"""How a command ends by itself under which policy; the agent's code, or None where it is started again."""


def test_a_command_that_ends_is_restarted_or_its_exit_code_becomes_the_agents(
    stage: Stage, coordinator: Coordinator
) -> None:
    """All at once, in a group each."""
    cases = []
    for n, (restart, end, code) in enumerate(ENDS):
        runs = stage.directory / f"runs-{n}"
        group = replace(coordinator, group=f"{stage.group}-{n}")
        flags = [f"--group={group.group}", f"--workload-restart={restart}"]
        command = sh(RUNS.format(runs=runs, end=end))
        agent = start(stage, f"host-{n}", coordinator, command=command, flags=flags)
        cases.append((agent, group, runs, code))
    for agent, group, runs, code in cases:
        if code is None:
            until(partial(has_run_twice, runs), f"{agent.name} to start it again")
            assert agent.state["role"] == "Primary"
            assert agent.lines("workload restart scheduled")
            assert agent.end() == 0
        else:
            assert agent.wait() == code
            assert runs.read_text() == "run\n"
            assert agent.state["role"] == "Secondary"
        why = "stopping" if code is None else "the workload has ended"
        assert [entry["WhyEnded"] for entry in group.history()] == [why]


def test_children_of_an_ended_command_are_killed(stage: Stage, coordinator: Coordinator) -> None:
    script = " ".join(writes(stage, "host-a")) + f" & while [ ! -s {output(stage)} ]; do :; done"
    agent = start(stage, "host-a", coordinator, command=sh(script))
    assert agent.wait() == 0
    assert not [pid for pid in pids_of(stage, agent) if lives(pid)]


def test_a_command_that_cannot_be_started_is_a_failed_promotion(
    stage: Stage, coordinator: Coordinator
) -> None:
    program = stage.directory / "program"
    program.write_text("#!/no/such/interpreter\n")
    program.chmod(0o700)
    broken = start(stage, "host-a", coordinator, command=[str(program)], flags=["--cooldown=20"])
    broken.until_said("promotion failed")
    other = start(stage, "host-b", coordinator, command=["sleep", "1000"])
    other.until_role("Primary")
    assert f"{program} could not be started" in coordinator.tenure(1)["WhyEnded"]


def test_a_command_that_keeps_failing_causes_a_takeover_and_a_cooldown(
    stage: Stage, coordinator: Coordinator
) -> None:
    flags = ["--cooldown=20"]
    failing = start(stage, "host-a", coordinator, command=["false"], flags=flags)
    epoch = failing.until_role("Primary")["epoch"]
    other = start(stage, "host-b", coordinator, command=["sleep", "1000"])
    other.until_role("Primary", after_epoch=epoch)
    why = "unfit: the workload fails again and again"
    assert coordinator.tenure(epoch)["WhyEnded"] == why
    assert len(failing.lines("workload started")) == 5
    assert failing.popen.poll() is None
    other.end(signal.SIGKILL)
    until(lambda: coordinator.status().get("Primary") is None, "the other's lease to end")
    assert "PendingPrimary" not in coordinator.status()  # it still cools down


def test_the_hook_runs_before_the_command_starts_and_after_it_stops(
    stage: Stage, coordinator: Coordinator
) -> None:
    events = stage.events_file
    note = f'echo "host-a %s command {{}}" >> {events}'
    script = f"trap '{note % 'end'}; exit' TERM; {note % 'begin'}; while :; do sleep 0.02; done"
    hooks = [f"--hook-{event}={stage.hook('host-a', event)}" for event in ("primary", "secondary")]
    agent = start(stage, "host-a", coordinator, command=sh(script), flags=hooks)
    stage.until_event("host-a", "begin", "command")
    agent.until_role("Primary")
    assert agent.end() == 0
    assert [(e.what, e.which) for e in stage.events()] == [
        (what, which) for which in ("secondary", "primary") for what in ("begin", "end")
    ] + [
        ("begin", "command"),
        ("end", "command"),
        ("begin", "secondary"),
        ("end", "secondary"),
    ]


def test_a_stop_during_the_restart_backoff_cancels_the_restart(
    stage: Stage, coordinator: Coordinator
) -> None:
    runs = runs_of(stage)
    agent = start(stage, "host-a", coordinator, command=sh(f"echo run >> {runs}; exit 1"))
    agent.until_said("workload restart scheduled")
    assert agent.end() == 0
    assert runs.read_text() == "run\n" * len(agent.lines("workload started"))
    assert "Traceback" not in agent.said()


def test_a_failed_demotion_has_its_own_exit_code_also_after_the_command_has_ended(
    stage: Stage, coordinator: Coordinator
) -> None:
    begun = stage.directory / "begun"
    hook = stage.hook("host-a", "secondary", f"[ ! -e {begun} ] || exit 7; touch {begun}")
    flags = [f"--hook-secondary={hook}", "--workload-restart=never", "--hook-limit=1"]
    agent = start(stage, "host-a", coordinator, command=sh("exit 3"), flags=flags)
    assert agent.wait() == 40
