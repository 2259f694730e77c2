"""Never two on hosts on which something is used up at the moment of the demotion: tasks, descriptors, memory.

What is active here is a ``Service``: like one of systemd it is no process of the tenure, so that only a
demotion hook that succeeds makes it inactive. A script that starts one program needs a task for it.
"""

import contextlib
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from agent.errors import ExitCode
from tests.hung import FORKS, limited_tasks

from .stage import Agent, Coordinator, Gate, Stage, lives, until
from .workloads import guard_of, output, start, until_written_after, writes
from .writer import PERIOD_S, overlap_s, written

TIMING = ("--failover-timeout=8", "--demote=3", "--margin=1")
"""R = 4 s, and a D in which a demotion can be repeated on a busy machine."""

MOST_TASKS = 80

LACK_S = 1.0
"""For how long the guard has no descriptor: three pauses before a hook is repeated, and a third of D."""


class Service:
    """Notes each moment at which a host is active: as long as its file is there, whose text is the epoch."""

    def __init__(self, stage: Stage, name: str) -> None:
        self.file = stage.directory / f"{name}.active"
        self._name = name
        self._output = output(stage)
        self._stop = threading.Event()
        thread = threading.Thread(target=self._work)
        thread.start()
        stage.later(thread.join)
        stage.later(self._stop.set)

    @property
    def primary(self) -> str:
        """The body of a promotion hook that makes this service active."""
        return f'echo "$FAILOVER_EPOCH" >{self.file}.new; mv {self.file}.new {self.file}'

    @property
    def secondary(self) -> str:
        """The body of a demotion hook that makes it inactive, by another program."""
        return f"/bin/rm -f {self.file} || exit 1"

    def hook_flags(self, stage: Stage) -> list[str]:
        """The flags of an agent with these hooks and nothing else in them."""
        bodies = {"primary": self.primary, "secondary": self.secondary}
        return [
            f"--hook-{event}={stage.hook(self._name, event, bodies[event])}" for event in bodies
        ]

    def _work(self) -> None:
        with self._output.open("a") as lines:
            while not self._stop.wait(PERIOD_S):
                with contextlib.suppress(FileNotFoundError):
                    epoch = self.file.read_text().strip()
                    lines.write(f"{epoch} {self._name} {time.monotonic_ns()} 0\n")
                    lines.flush()


def with_service(
    stage: Stage, name: str, endpoint: Coordinator | str, *flags: str, more: str = ""
) -> Agent:
    """An agent whose hooks switch a service on and off; its promotion then does ``more``."""
    service = Service(stage, name)
    return stage.run(
        name,
        endpoint,
        timing=TIMING,
        flags=flags,
        primary=f"{service.primary}; {more}",
        secondary=service.secondary,
    )


@pytest.fixture
def forks(stage: Stage) -> str:
    """A command that uses up all tasks, in a session of its own."""
    program = stage.directory / "forks.py"
    program.write_text(FORKS)
    return f"{sys.executable} -S {program} >/dev/null 2>&1 </dev/null &"


@contextlib.contextmanager
def exhausted(
    stage: Stage, coordinator: Coordinator, forks: str, *flags: str
) -> Iterator[tuple[Agent, Agent, int, Gate]]:
    """A primary whose workload has used up all tasks, another member, the epoch, and the primary's way out."""
    with limited_tasks("exhausted", MOST_TASKS) as folder:
        gate = Gate(stage, coordinator.endpoint)
        one = with_service(stage, "host-a", gate.endpoint, *flags, more=forks)
        (folder / "cgroup.procs").write_text(str(one.popen.pid))
        epoch = one.until_role("Primary")["epoch"]
        other = with_service(stage, "host-b", coordinator)
        other.until_said("joined")
        current = folder / "pids.current"
        until(lambda: current.read_text().strip() == str(MOST_TASKS), "no more tasks")
        until(lambda: written(output(stage)), "the first line")
        yield one, other, epoch, gate
        until(lambda: not (folder / "cgroup.procs").read_text().strip(), "the end of the tenure")


@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP])
def test_a_demotion_hook_that_forks_succeeds_in_the_guard_of_an_agent_without_free_tasks(
    stage: Stage, coordinator: Coordinator, forks: str, fault: signal.Signals
) -> None:
    """It failed with "cannot fork", and was not repeated after the tasks had become free."""
    with exhausted(stage, coordinator, forks) as (one, other, epoch, _):
        one.send(fault)
        assert one.wait() == -signal.SIGKILL
        until_written_after(stage, epoch)
    assert overlap_s(output(stage)) < 0
    assert (one.state["role"], one.state["reason"]) == ("Secondary", "demoted by the guard")
    assert other.end() == 0


@pytest.mark.parametrize("guard", ["--guard", "--no-guard"])
def test_an_agent_without_free_tasks_demotes_in_order(
    stage: Stage, coordinator: Coordinator, forks: str, guard: str
) -> None:
    """It could start no thread for the hook, and ended with 40 while its service was active."""
    with exhausted(stage, coordinator, forks, guard) as (one, other, epoch, _):
        assert one.end() == 0
        until_written_after(stage, epoch)
    assert overlap_s(output(stage)) < 0
    assert one.state["role"] == "Secondary"
    assert coordinator.tenure(epoch)["WhyEnded"] == "stopping"
    assert other.end() == 0


@pytest.mark.parametrize("guard", ["--guard", "--no-guard"])
def test_an_agent_without_free_tasks_that_is_cut_off_demotes_before_its_lease_expires(
    stage: Stage, coordinator: Coordinator, forks: str, guard: str
) -> None:
    with exhausted(stage, coordinator, forks, guard) as (one, other, epoch, gate):
        gate.close()
        until_written_after(stage, epoch)
        assert one.popen.poll() is None
        one.until_role("Secondary")
        assert one.end() == 0
    assert overlap_s(output(stage)) < 0
    assert other.end() == 0


def test_an_agent_that_starts_without_free_tasks_reports_it(stage: Stage) -> None:
    """Its reserved threads took the last tasks, so it ended with 40 and not one line."""
    with limited_tasks("starting", 4) as folder:
        enter = ["sh", "-c", f'echo $$ >{folder}/cgroup.procs; exec "$@"', "sh"]
        words = ["--group=line-7", f"--state-file={stage.directory}/state", "--hook-limit=1"]
        words += [
            f"--hook-{role}={stage.hook('host-a', role)}" for role in ("primary", "secondary")
        ]
        agent = stage.process("host-a", "run", *words, before=enter)
        assert agent.wait() == ExitCode.DEMOTION_FAILED
    assert agent.lines("too few threads can be started for a demotion")
    assert agent.lines("demotion failed")
    assert "Traceback" not in agent.said()


AT_TERM = """
import os, signal, sys
signal.signal(signal.SIGTERM, lambda *_: os.execv(sys.executable, [sys.executable, "-S", sys.argv[1]]))
while True:
    signal.pause()
"""


@pytest.mark.parametrize("fault", ["freeze", "cut"])
def test_a_workload_that_uses_up_all_tasks_when_it_is_stopped_keeps_no_service_active(
    stage: Stage, coordinator: Coordinator, fault: str
) -> None:
    """The guard looked for free tasks only before it stopped the workload, and had no time to repeat its hook."""
    forks = stage.directory / "forks.py"
    forks.write_text(FORKS)
    service, gate = Service(stage, "host-a"), Gate(stage, coordinator.endpoint)
    hooks = service.hook_flags(stage)
    command = [sys.executable, "-S", "-c", AT_TERM, str(forks)]
    with limited_tasks("exhausted", MOST_TASKS) as folder:
        one = start(stage, "host-a", gate.endpoint, timing=TIMING, flags=hooks, command=command)
        (folder / "cgroup.procs").write_text(str(one.popen.pid))
        epoch = one.until_role("Primary")["epoch"]
        other = with_service(stage, "host-b", coordinator)
        other.until_said("joined")
        one.send(signal.SIGSTOP) if fault == "freeze" else gate.close()
        until_written_after(stage, epoch)
        assert not service.file.exists()
        one.end(signal.SIGKILL)
    assert overlap_s(output(stage)) < 0
    assert other.end() == 0


# -- descriptors, and the sight of processes ------------------------------------------------------------


def with_both(
    stage: Stage,
    name: str,
    endpoint: Coordinator | str,
    *flags: str,
    before: Sequence[str] = (),
) -> Agent:
    """An agent with a service, and with a writer that has left the process group of its hook."""
    service = Service(stage, name)
    writer = f"setsid {' '.join(writes(stage, name))} >/dev/null 2>&1 </dev/null &"
    hooks = {"primary": f"{service.primary}; {writer}", "secondary": service.secondary}
    words = []
    for event, body in hooks.items():  # they write no other file: its size may be limited
        path = stage.directory / f"{name}-{event}"
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(0o700)
        words.append(f"--hook-{event}={path}")
    return start(stage, name, endpoint, timing=TIMING, flags=[*words, *flags], before=before)


def pair_in_mount_namespace(
    stage: Stage, coordinator: Coordinator, *flags: str
) -> tuple[Agent, Agent, int, Gate]:
    """Two agents, the primary first, which has mounts of its own; its epoch, and its way out."""
    gate = Gate(stage, coordinator.endpoint)
    one = with_both(stage, "host-a", gate.endpoint, *flags, before=own_mounts())
    epoch = one.until_role("Primary")["epoch"]
    other = with_both(stage, "host-b", coordinator)
    other.until_said("joined")
    until(lambda: {line.pid for line in written(output(stage))} - {0}, "the writer")
    return one, other, epoch, gate


def own_mounts(*mounts: str) -> list[str]:
    """What starts a command in a mount namespace of its own, after these mounts."""
    trial = subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False)
    if trial.returncode:
        pytest.skip("needs: a mount namespace: run as root")
    return ["unshare", "--mount", "sh", "-c", "; ".join([*mounts, 'exec "$@"']), "sh"]


def hide_processes(agent: Agent) -> None:
    """Mount something over /proc, in the agent's mount namespace."""
    command = ["nsenter", f"--target={agent.popen.pid}", "--mount"]
    subprocess.run([*command, "mount", "-t", "tmpfs", "none", "/proc"], check=True)


def writer_lives(stage: Stage, agent: Agent) -> bool:
    pids = {line.pid for line in written(output(stage)) if line.host == agent.name} - {0}
    return any(map(lives, pids))


def used_descriptors(pid: int) -> int:
    return max(int(path.name) for path in Path(f"/proc/{pid}/fd").iterdir()) + 1


def lowest_free(pid: int) -> int:
    used = {int(path.name) for path in Path(f"/proc/{pid}/fd").iterdir()}
    return next(number for number in range(len(used) + 1) if number not in used)


def used_memory(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * resource.getpagesize()


@pytest.mark.parametrize(
    ("limited", "most"),
    [
        pytest.param(resource.RLIMIT_NOFILE, used_descriptors, id="descriptors"),
        pytest.param(resource.RLIMIT_FSIZE, lambda _: 10, id="size of files"),
        pytest.param(resource.RLIMIT_AS, used_memory, id="memory"),
    ],
)
def test_an_agent_at_a_limit_that_is_cut_off_demotes_before_its_lease_expires(
    stage: Stage, coordinator: Coordinator, limited: int, most: Callable[[int], int]
) -> None:
    """It could not start the hook, nor search for processes; or the start of a thread never returned."""
    one, other, epoch, gate = pair_in_mount_namespace(stage, coordinator, "--no-guard")
    pid = one.popen.pid
    resource.prlimit(pid, limited, (most(pid), resource.prlimit(pid, limited)[1]))
    gate.close()
    until_written_after(stage, epoch)
    assert overlap_s(output(stage)) < 0
    assert not writer_lives(stage, one)
    assert one.popen.poll() is None
    assert (one.end(), other.end()) == (0, 0)


@pytest.mark.parametrize("how", ["hooks", "exec"])
def test_a_guard_that_lacks_descriptors_for_a_while_goes_on_when_it_has_some(
    stage: Stage, coordinator: Coordinator, how: str
) -> None:
    """It gave up after a tenth of its time, and what was active stayed so: two were active for good."""
    if how == "hooks":
        one = with_both(stage, "host-a", coordinator)
    else:
        detached = ["sh", "-c", f"setsid {' '.join(writes(stage, 'host-a'))} & exec sleep 1000"]
        one = start(stage, "host-a", coordinator, timing=TIMING, command=detached)
    epoch = one.until_role("Primary")["epoch"]
    other = with_both(stage, "host-b", coordinator)
    other.until_said("joined")
    until(lambda: {line.pid for line in written(output(stage))} - {0}, "the writer")
    guard = guard_of(one)
    most = resource.prlimit(guard, resource.RLIMIT_NOFILE)
    resource.prlimit(guard, resource.RLIMIT_NOFILE, (lowest_free(guard), most[1]))
    assert one.end(signal.SIGKILL) == -signal.SIGKILL
    until(lambda: one.lines("Too many open files"), "a failure")
    time.sleep(LACK_S)
    resource.prlimit(guard, resource.RLIMIT_NOFILE, most)
    until_written_after(stage, epoch)
    assert overlap_s(output(stage)) < 0
    assert one.state["role"] == "Secondary"
    assert not writer_lives(stage, one)
    assert other.end() == 0


@pytest.mark.parametrize(
    ("guard", "fault"), [("--no-guard", signal.SIGTERM), ("--guard", signal.SIGKILL)]
)
def test_processes_are_found_even_if_proc_is_hidden_after_the_start(
    stage: Stage, coordinator: Coordinator, guard: str, fault: signal.Signals
) -> None:
    """The search found nothing, which was taken for the end of the tenure: two were active for good."""
    one, other, epoch, _ = pair_in_mount_namespace(stage, coordinator, guard)
    hide_processes(one)
    one.end(fault)
    until_written_after(stage, epoch)
    assert overlap_s(output(stage)) < 0
    assert not writer_lives(stage, one)
    assert other.end() == 0


def test_an_agent_that_cannot_see_processes_does_not_start(
    stage: Stage, coordinator: Coordinator
) -> None:
    hidden = own_mounts("mount -t tmpfs none /proc")
    one = with_both(stage, "host-a", coordinator, before=hidden)
    assert one.wait() == ExitCode.DEMOTION_FAILED
    assert "/proc is not mounted" in one.said()
    assert "role changed" not in one.said()
