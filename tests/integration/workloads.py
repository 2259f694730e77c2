"""Agents with a workload that can be seen to live: by ``exec``, or started and stopped by hooks.

Owns how such agents are started on a stage, and where the writer (writer.py) writes. Knows nothing
of what is right.
"""

import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from . import writer
from .stage import Agent, Coordinator, Stage, until

TIMING = ("--failover-timeout=3", "--demote=1", "--margin=0.6")
"""L = 3 s, R = 1.4 s; half a margin, 0.3 s, is how late a busy machine may let the guard be."""

START = """{writer} >/dev/null 2>&1 </dev/null &
echo $! > {pid_file}"""
STOP = """[ -e {pid_file} ] || exit 0
pid=$(cat {pid_file})
kill -KILL $pid
while [ -e /proc/$pid ] && ! grep -q '^State:.[ZX]' /proc/$pid/status; do sleep 0.01; done
rm {pid_file}"""


def start(
    stage: Stage,
    name: str,
    coordinator: Coordinator | str,
    *,
    flags: Sequence[str] = (),
    command: Sequence[str] = (),
    timing: Sequence[str] = TIMING,
    before: Sequence[str] = (),
    **variables: str,
) -> Agent:
    """An agent with no hooks but those among ``flags``; by ``exec`` if it gets a command."""
    state_file = stage.directory / f"{name}.json"
    words = [
        "exec" if command else "run",
        f"--group={stage.group}",
        f"--session-id={name}",
        f"--state-file={state_file}",
        f"--endpoint={coordinator if isinstance(coordinator, str) else coordinator.endpoint}",
        *timing,
        *flags,
        *(["--", *command] if command else []),
    ]
    spawned = stage.spawn(name, *words, before=before, **variables)
    return stage.adopt(Agent(name, *spawned, state_file))


def output(stage: Stage) -> Path:
    """Where all writers of a stage write."""
    return stage.directory / "output"


def writes(stage: Stage, name: str, *traits: str) -> list[str]:
    """The command line of a writer."""
    return [sys.executable, "-S", "-E", writer.__file__, str(output(stage)), name, *traits]


def by_exec(stage: Stage, name: str, coordinator: Coordinator, *flags: str) -> Agent:
    """The writer, and a child of it, as the command of ``exec``."""
    return start(stage, name, coordinator, command=writes(stage, name, "child"), flags=flags)


def by_hooks(stage: Stage, name: str, coordinator: Coordinator, *flags: str) -> Agent:
    """The writer as hooks start and stop it."""
    pid_file = stage.directory / f"{name}.pid"
    begin = START.format(writer=" ".join(writes(stage, name)), pid_file=pid_file)
    end = STOP.format(pid_file=pid_file)
    return stage.run(name, coordinator, timing=TIMING, flags=flags, primary=begin, secondary=end)


def pair(
    stage: Stage, coordinator: Coordinator, how: Callable[..., Agent] = by_exec, *flags: str
) -> tuple[Agent, Agent, int]:
    """Two agents, the primary first, and its epoch; both have joined, and its writer writes."""
    agents = [how(stage, name, coordinator, *flags) for name in ("host-a", "host-b")]
    one = stage.until_primary(*agents, after_epoch=0)
    other = agents[agents[0] is one]
    other.until_said("joined")
    until(lambda: writer.written(output(stage)), "the first line")
    return one, other, one.state["epoch"]


def until_written_after(stage: Stage, epoch: int) -> int:
    """The epoch of the first writer after that one's, once it writes."""

    def found() -> int | None:
        return next((e for e in writer.first_and_last(output(stage)) if e > epoch), None)

    return until(found, f"a line after epoch {epoch}")


def guard_of(agent: Agent) -> int:
    """The process id of the agent's newest guard."""
    agent.until_said("guard ready pid=")
    return int(re.findall(r"guard ready pid=(\d+)", agent.said())[-1])


def demote_slacks_s(agent: Agent, margin_s: float = 0.6) -> list[float]:
    """What was left of L after each demotion of a tenure: by the agent, or by its guard.

    The guard's own limit is half a margin before L.
    """
    by_agent = re.findall(r" demoted .*demote_slack_s=(-?[\d.]+)", agent.said())
    by_guard = re.findall(r" demoted by the guard.* left_of_limit_s=(-?[\d.]+)", agent.said())
    return [float(s) for s in by_agent] + [float(s) + margin_s / 2 for s in by_guard]
