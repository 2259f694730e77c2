"""No process of a tenure is left after its demotion, whatever its hooks have started. Real processes."""

import asyncio
import json
import os
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Sized
from pathlib import Path
from typing import Any

import pytest

from agent import proctree
from agent.core.effects import HookFacts
from agent.core.events import HookEnded
from agent.daemon import reload, role_runner, tenure_processes
from agent.daemon.role_runner import RoleRunner
from agent.daemon.telemetry import Stats
from agent.model import Role
from agent.ops import process, process_tree, reserve
from agent.ops.clock import Clock
from agent.schema.settings import AgentSettings
from tests.cgroups import new_cgroup

PATIENCE_S = 20.0

ESCAPE = "env -i setsid sh -c 'sleep 1000 & echo $! > {0}' &"
"""Leaves the process group, loses its parent and has no variable of ours."""


class Stage:
    """A role runner with shell hooks that write process ids into files."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.ends: list[HookEnded] = []
        self.number = 0
        self.instance = f"test-{os.getpid()}-{time.monotonic_ns()}"

    def open(self, **settings: Any) -> RoleRunner:
        self.settings = AgentSettings(hook_directory=self.directory, guard=False, **settings)
        self.role_runner = RoleRunner(
            self.settings,
            "host-a",
            self.directory / "state.json",
            Clock(),
            Stats(),
            instance=self.instance,
            on_ended=self.ends.append,
            on_groups_changed=lambda: None,
            on_workload_ended=lambda _: None,
        )
        return self.role_runner

    def hook(self, name: str, text: str) -> tuple[str, ...]:
        path = self.directory / name
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
        return (str(path),)

    def remove(self, hook: tuple[str, ...]) -> None:
        Path(hook[0]).unlink()

    def begin(self, role: Role, limit_s: float = 5.0) -> int:
        self.number += 1
        facts = HookFacts(role, Role.SECONDARY, 7, "test", None, None, limit_s)
        work = self.role_runner.start_run(self.number, facts, None)
        self.task = asyncio.get_running_loop().create_task(work)
        return self.number

    async def end(self) -> HookEnded:
        async with asyncio.timeout(PATIENCE_S):
            await self.task
        return self.ends[-1]

    async def run(self, role: Role) -> HookEnded:
        self.begin(role)
        return await self.end()

    async def pid(self, name: str) -> int:
        path = self.directory / name
        await until(lambda: path.exists() and path.read_text().endswith("\n"))
        return int(path.read_text())


@pytest.fixture
async def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Stage]:
    monkeypatch.setenv(proctree.MARK, "")
    prctl = process._prctl
    process.become_subreaper()
    one = Stage(tmp_path)
    yield one
    one.role_runner.kill_all()
    await one.role_runner.run_fence_command()
    one.role_runner.close()
    for path in tmp_path.glob("*.pid"):  # noqa: ASYNC240 - nothing else runs
        text = path.read_text().strip()
        if text and alive(int(text)):
            os.kill(int(text), signal.SIGKILL)
    assert prctl(process.PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0) == 0


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110 - processes cannot be awaited
            await asyncio.sleep(0.005)


async def until_longer(values: Sized, by: int) -> None:
    """Wait until a list has got more than ``by`` further values."""
    before = len(values)
    await until(lambda: len(values) > before + by)


def alive(pid: int) -> bool:
    stat = proctree.read(pid)
    return stat is not None and stat.state not in proctree.ENDED


def _root_only() -> None:
    if os.geteuid() != 0:
        pytest.skip("needs: root: run the tests as root")


# -- a promotion that is pre-empted -----------------------------------------------------------------


async def test_a_child_that_starts_the_workload_on_term_is_gone_before_the_run_has_ended(
    stage: Stage,
) -> None:
    """Fault 2: the shell died, the demotion hook ran, and then the child started the workload."""
    child = stage.directory / "child"
    child.write_text(
        "trap 'sleep 0.3; setsid sleep 1000 & echo $! > work.pid; exit' TERM\n"
        "echo $$ > child.pid\nwhile :; do sleep 0.02; done\n"
    )
    stage.open(hook_primary=stage.hook("p", f"sh {child} & wait"))
    number = stage.begin(Role.PRIMARY)
    pid = await stage.pid("child.pid")
    stage.role_runner.terminate(number)
    work = await stage.pid("work.pid")
    assert not stage.task.done(), "the run has ended though its workload lives"
    stage.role_runner.kill(number)
    assert not (await stage.end()).ok
    assert not alive(pid)
    assert not alive(work)
    assert (await stage.run(Role.SECONDARY)).ok


async def test_a_process_tree_that_ignores_term_is_killed(stage: Stage) -> None:
    child = stage.directory / "child"
    child.write_text("trap '' TERM; echo $$ > child.pid; while :; do sleep 0.02; done")
    hook = f"echo $$ > hook.pid; setsid sh {child} & wait"
    stage.open(hook_primary=stage.hook("p", hook))
    number = stage.begin(Role.PRIMARY)
    leader, pid = await stage.pid("hook.pid"), await stage.pid("child.pid")
    assert os.getsid(pid) == pid
    stage.role_runner.terminate(number)
    await until(lambda: not alive(leader))
    assert not stage.task.done(), "the run has ended although its child is alive"
    stage.role_runner.kill(number)
    assert not (await stage.end()).ok
    assert not alive(pid)


async def test_a_terminated_promotion_has_failed_even_if_it_exits_with_0(stage: Stage) -> None:
    """Its other processes got TERM, too."""
    text = "trap 'exit 0' TERM; echo $$ > p.pid; while :; do sleep 0.02; done"
    stage.open(hook_primary=stage.hook("p", text))
    number = stage.begin(Role.PRIMARY)
    await stage.pid("p.pid")
    stage.role_runner.terminate(number)
    ended = await stage.end()
    assert (ended.ok, ended.why) == (False, "terminated")


@pytest.mark.parametrize("end", [RoleRunner.terminate, RoleRunner.kill])
async def test_a_hook_that_hangs_at_its_start_blocks_nothing_and_can_be_killed(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, end: Callable[[RoleRunner, int], None]
) -> None:
    """Fault 1: a hook's path may be on a dead network file system."""
    hangs, release, returned = threading.Event(), threading.Event(), threading.Event()

    def recheck(*_: object) -> None:
        hangs.set()
        release.wait(PATIENCE_S)
        returned.set()

    monkeypatch.setattr("agent.drivers.hooks.spec.HookSpec.recheck", recheck)
    stage.open(hook_primary=stage.hook("p", "echo $$ > p.pid"), hook_secondary=("/bin/true",))
    number = stage.begin(Role.PRIMARY)
    await until(hangs.is_set)
    assert not stage.task.done()
    end(stage.role_runner, number)
    assert not (await stage.end()).ok
    release.set()
    await until(returned.is_set)
    assert (await stage.run(Role.SECONDARY)).ok  # a start would have come before this one
    assert not (stage.directory / "p.pid").exists(), "it was started after its end"


async def test_a_program_that_is_never_executed_is_killed(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading, writing = os.pipe()

    def hang(*_: int) -> int:
        return len(os.read(reading, 1))  # in the child, between fork and exec

    stage.open(hook_primary=stage.hook("p", "echo $$ > p.pid"))
    monkeypatch.setattr(process, "_prctl", hang)
    number = stage.begin(Role.PRIMARY)
    await until(lambda: stage.role_runner.running_groups)
    assert not stage.task.done()
    stage.role_runner.terminate(number)
    stage.role_runner.kill(number)
    assert not (await stage.end()).ok
    os.close(writing)
    os.close(reading)


async def test_the_guard_receives_the_process_of_a_hook_before_its_exec_is_done(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the agent dies while the exec hangs, the guard has to kill it: it would promote later."""
    reading, writing = os.pipe()
    stage.open(hook_primary=stage.hook("p", "exit 0"))
    sent: list[tuple[int, ...]] = []
    runner = stage.role_runner
    monkeypatch.setattr(runner, "_on_groups_changed", lambda: sent.append(runner.running_groups))
    monkeypatch.setattr(process, "_prctl", lambda *_: len(os.read(reading, 1)))
    stage.begin(Role.PRIMARY)
    await until(lambda: sent)
    assert not stage.task.done()
    assert sent[0] == runner.tenure_groups != ()
    os.write(writing, b"x")
    os.close(writing)
    assert (await stage.end()).ok
    os.close(reading)


# -- processes that a successful promotion leaves ---------------------------------------------------


@pytest.mark.parametrize(
    "helper",
    [
        "sleep 1000 >/dev/null 2>&1 & echo $! > left.pid",
        "setsid sh -c 'sleep 1000 & echo $! > left.pid' >/dev/null 2>&1 &",
        ESCAPE.format("left.pid").replace("&", ">/dev/null 2>&1 &", 1),
    ],
    ids=["group", "session", "no-variables"],
)
async def test_processes_of_a_promotion_are_killed_after_the_demotion_hook(
    stage: Stage, helper: str
) -> None:
    """Fault 2: the demotion hook may stop them in order; only the rest is killed."""
    stage.open(
        hook_primary=stage.hook("p", helper),
        hook_secondary=stage.hook("s", 'kill -0 "$(cat left.pid)" && echo x > alive'),
    )
    assert (await stage.run(Role.PRIMARY)).ok
    pid = await stage.pid("left.pid")
    await until(lambda: proctree.read(pid) is not None)
    ended = await stage.run(Role.SECONDARY)
    assert ended.ok, ended.why
    assert (stage.directory / "alive").exists(), "it was killed before the demotion hook"
    assert not alive(pid)
    assert not stage.role_runner.tenure_groups
    assert not stage.role_runner.tenure_roots


async def test_processes_of_a_pending_hook_are_killed_without_a_demotion_hook(
    stage: Stage,
) -> None:
    stage.open(hook_pending_primary=stage.hook("p", "sleep 1000 >&- 2>&- & echo $! > left.pid"))
    assert Role.SECONDARY in stage.role_runner.roles
    assert (await stage.run(Role.PENDING_PRIMARY)).ok
    pid = await stage.pid("left.pid")
    assert (await stage.run(Role.SECONDARY)).ok
    assert not alive(pid)


async def test_the_processes_of_another_user_are_killed(stage: Stage, tmp_path: Path) -> None:
    _root_only()
    for part in (tmp_path, *tmp_path.parents[:-1]):
        if not part.stat().st_mode & 0o001:
            part.chmod(part.stat().st_mode | 0o011)
    (tmp_path / "left.pid").touch()
    (tmp_path / "left.pid").chmod(0o666)
    text = "setsid sh -c 'sleep 1000 & echo $! > left.pid' >/dev/null 2>&1 &"
    stage.open(hook_primary=stage.hook("p", text), hook_user="nobody")
    ended = await stage.run(Role.PRIMARY)
    assert ended.ok, ended.why
    pid = await stage.pid("left.pid")
    assert (await stage.run(Role.SECONDARY)).ok
    assert not alive(pid)


async def test_the_demotion_fails_and_names_a_process_that_survives(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage.open(hook_primary=stage.hook("p", "sleep 1000 >&- 2>&- & echo $! > left.pid"))
    await stage.run(Role.PRIMARY)
    pid = await stage.pid("left.pid")
    with monkeypatch.context() as patch:  # as if it were in an uninterruptible call
        patch.setattr(proctree, "try_to_send", lambda *_: None)
        patch.setattr(proctree, "signal_groups", lambda *_: None)
        stage.begin(Role.SECONDARY, limit_s=0.3)
        ended = await stage.end()
    assert not ended.ok
    assert f"{pid} (state S)" in ended.why
    assert (await stage.run(Role.SECONDARY)).ok, "the next try has to find it again"
    assert not alive(pid)


async def test_an_unreadable_environment_delays_no_demotion(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading it blocks while its process is stuck in a page-in: any process of this host."""
    stage.open(hook_primary=stage.hook("p", "setsid sleep 1000 >&- 2>&- & echo $! > left.pid"))
    await stage.run(Role.PRIMARY)
    pid = await stage.pid("left.pid")
    contents, release = proctree.contents, threading.Event()
    stuck = process.Popen(["sleep", "1000"], start_new_session=True)

    def block(of: int, name: str) -> bytes:
        if of == stuck.pid:
            release.wait(PATIENCE_S)
        return contents(of, name)

    monkeypatch.setattr(proctree, "contents", block)
    started_at = time.monotonic()
    assert (await stage.run(Role.SECONDARY)).ok
    assert time.monotonic() - started_at < 5
    assert not alive(pid)
    release.set()
    stuck.kill()
    stuck.wait()


async def test_an_orphan_that_cannot_be_read_is_killed_with_the_tenure(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It counted as gone, and the role was released while it was alive."""
    stage.open(hook_primary=stage.hook("p", ESCAPE.format("bare.pid")))
    contents, release = proctree.contents, threading.Event()
    pid_file = stage.directory / "bare.pid"

    def block(of: int, name: str) -> bytes:
        if pid_file.exists() and pid_file.read_text().strip() == str(of):
            release.wait(PATIENCE_S)
        return contents(of, name)

    monkeypatch.setattr(proctree, "contents", block)
    await stage.run(Role.PRIMARY)
    pid = await stage.pid("bare.pid")
    assert (await stage.run(Role.SECONDARY)).ok
    assert not alive(pid)
    release.set()


# -- processes that are not killed ------------------------------------------------------------------


async def test_processes_of_a_demotion_hook_are_not_killed(stage: Stage) -> None:
    stage.open(
        hook_primary=stage.hook("p", "exit 0"),
        hook_secondary=stage.hook(
            "s",
            "[ ! -e plain.pid ] || exit 0\n"
            f"sleep 1000 >&- 2>&- & echo $! > plain.pid\n{ESCAPE.format('bare.pid')}",
        ),
    )
    await stage.run(Role.PRIMARY)
    assert (await stage.run(Role.SECONDARY)).ok
    pids = [await stage.pid("plain.pid"), await stage.pid("bare.pid")]
    helper = proctree.identify(pids[1])
    assert helper is not None
    # A tenure that begins in the same clock tick would adopt it. Only the tree reads the clock in ticks.
    await until(lambda: process_tree._now() > helper[1])
    await stage.run(Role.PRIMARY)
    assert (await stage.run(Role.SECONDARY)).ok
    assert all(map(alive, pids)), "a standby helper was killed with the tenure"


async def test_children_of_the_agent_and_of_notification_hooks_are_not_killed(stage: Stage) -> None:
    stage.open(
        hook_primary=stage.hook("p", "exit 0"),
        hook_lost=stage.hook("n", "setsid sleep 1000 >&- 2>&- & echo $! > notified.pid"),
    )
    before = process.Popen(["sleep", "1000"])
    await stage.run(Role.PRIMARY)
    during = process.Popen(["sleep", "1000"], env={})
    stage.role_runner.notifier.put("lost", {})
    pid = await stage.pid("notified.pid")
    try:
        assert (await stage.run(Role.SECONDARY)).ok
        assert alive(pid)
        assert (before.poll(), during.poll()) == (None, None)
    finally:
        for child in (before, during):
            child.kill()
            child.wait()


# -- a reload, and a previous agent -----------------------------------------------------------------


async def test_a_tenure_keeps_its_demotion_hook_over_a_reload(stage: Stage) -> None:
    """Fault 6: a reload removed the demotion hook of the tenure."""
    stage.open(
        hook_primary=stage.hook("p", "exit 0"),
        hook_secondary=stage.hook("s", "echo $KIND >> demoted"),
        hook_environment={"KIND": "first"},
    )
    await stage.run(Role.PRIMARY)
    other = AgentSettings(hook_directory=stage.directory)
    stage.role_runner.reconfigure(other, reload.read_hooks(other))
    assert Role.SECONDARY in stage.role_runner.roles
    facts = HookFacts(Role.PRIMARY, Role.SECONDARY, 7, "test", None, None, 5)
    assert (await stage.role_runner.build_guard_hook(facts)).commands
    assert (await stage.run(Role.SECONDARY)).ok
    assert (stage.directory / "demoted").read_text() == "first\n"
    assert stage.role_runner.roles == frozenset(), "the next tenure has the new settings"
    await stage.run(Role.PRIMARY)
    assert (await stage.run(Role.SECONDARY)).ok
    assert (stage.directory / "demoted").read_text() == "first\n"


async def test_the_first_demotion_keeps_the_hook_of_the_start_over_a_reload(stage: Stage) -> None:
    """A role of the previous agent was released though only another hook, or none, had run."""
    stage.open(hook_secondary=stage.hook("s", "echo first >> demoted"))
    stage.role_runner.leftover.follow()
    other = AgentSettings(hook_directory=stage.directory)
    stage.role_runner.reconfigure(other, reload.read_hooks(other))
    assert Role.SECONDARY in stage.role_runner.roles
    assert (await stage.run(Role.SECONDARY)).ok
    assert (stage.directory / "demoted").read_text() == "first\n"
    assert stage.role_runner.roles == frozenset(), "the first tenure has the new settings"


async def test_a_hook_that_a_reload_adds_is_used_if_the_start_had_none(stage: Stage) -> None:
    """No run ends the first demotion then, so the hook was left out once, and lacked in the state file."""
    stage.open()
    stage.role_runner.leftover.follow()
    hook = stage.hook("s", "echo second >> demoted")
    other = AgentSettings(hook_directory=stage.directory, hook_secondary=hook)
    stage.role_runner.reconfigure(other, reload.read_hooks(other))
    assert stage.role_runner.demotion_hook is not None
    assert (await stage.run(Role.SECONDARY)).ok
    assert (stage.directory / "demoted").read_text() == "second\n"


def left_by(stage: Stage, instance: str) -> process.Popen:
    """A process of a tenure of another agent of the member."""
    env = {proctree.MARK: f"{stage.role_runner.leftover.mark}.{instance}.3"}
    return process.Popen(["sleep", "1000"], env=env, start_new_session=True)


async def test_a_demotion_fails_without_a_script_of_its_directory_at_the_promotion(
    stage: Stage,
) -> None:
    """The script that stops the workload was removed; the others succeeded, and the role was released."""
    scripts = stage.directory / "secondary.d"
    scripts.mkdir(0o755)
    for name in ("10-other", "20-stop"):
        os.rename(stage.hook("s", "exit 0")[0], scripts / name)  # noqa: PTH104 - nothing else runs
    stage.open(hook_primary=stage.hook("p", "exit 0"), hook_secondary=(str(scripts),))
    assert (await stage.run(Role.PRIMARY)).ok
    (scripts / "20-stop").unlink()
    facts = HookFacts(Role.PRIMARY, Role.SECONDARY, 7, "test", None, None, 5)
    assert len((await stage.role_runner.build_guard_hook(facts)).commands) == 2
    ended = await stage.run(Role.SECONDARY)
    assert not ended.ok
    assert "20-stop" in ended.why


async def test_the_guard_has_every_script_that_belongs_to_the_tenure(stage: Stage) -> None:
    """One that was added after the guard's copy and before the promotion belonged to the tenure only."""
    scripts = stage.directory / "secondary.d"
    scripts.mkdir(0o755)
    os.rename(stage.hook("s", "exit 0")[0], scripts / "10-stop")  # noqa: PTH104 - nothing else runs
    stage.open(hook_primary=stage.hook("p", "exit 0"), hook_secondary=(str(scripts),))
    facts = HookFacts(Role.PRIMARY, Role.SECONDARY, 7, "test", None, None, 5)
    promotion = stage.role_runner.start_run(1, facts, None)
    sent = await stage.role_runner.build_guard_hook(facts)
    os.rename(stage.hook("s", "exit 0")[0], scripts / "20-late")  # noqa: PTH104 - as above
    assert await promotion
    assert stage.role_runner.demotion_hook is not None
    assert len(sent.commands) == len(stage.role_runner.demotion_hook.scripts) == 1
    assert (await stage.run(Role.SECONDARY)).ok


async def test_marked_processes_of_a_previous_agent_are_killed_without_its_state_file(
    stage: Stage,
) -> None:
    """They were found by its instance only, which the file has: when that was damaged or removed, they went on."""
    stage.open()
    stage.role_runner.leftover.follow()
    left = left_by(stage, "earlier")
    assert await stage.role_runner.leftover.kill() is None
    assert left.wait() == -signal.SIGKILL


async def test_the_first_demotion_fails_while_processes_of_any_previous_agent_are_alive(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage.open(hook_secondary=("/bin/true",))
    left = left_by(stage, "first")
    leftover = stage.role_runner.leftover
    leftover.follow()
    with monkeypatch.context() as patch:  # as if it were in an uninterruptible call
        patch.setattr(proctree, "try_to_send", lambda *_: None)
        patch.setattr(proctree, "signal_groups", lambda *_: None)
        assert await leftover.kill(0.1) is not None
        stage.begin(Role.SECONDARY, limit_s=0.3)
        assert not (await stage.end()).ok
    assert [pid for pid, _ in leftover.roots] == [left.pid]
    assert (await stage.run(Role.SECONDARY)).ok
    assert leftover.roots == ()
    assert left.wait() == -signal.SIGKILL


async def test_unmarked_processes_in_the_cgroup_of_a_previous_agent_are_killed(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    with new_cgroup() as folder:
        for module in (role_runner, tenure_processes):
            monkeypatch.setattr(module, "tenure_cgroup", lambda member: folder / member)
        stage.open(
            hook_primary=stage.hook("primary", ESCAPE.format(stage.directory / "one.pid")),
            hook_secondary=("/bin/true",),
        )
        assert (await stage.run(Role.PRIMARY)).ok
        pid = await stage.pid("one.pid")
        assert stage.role_runner.cgroup is not None
        inside = {
            pid for pid, _ in proctree.in_cgroup(proctree.snapshot(), str(stage.role_runner.cgroup))
        }
        assert pid in inside
        mark = stage.role_runner.process_mark
        later = process_tree.ProcessTree(mark, since=process_tree._now() + 10**6)
        assert pid not in {one for one, _ in later.find()}
        stage.role_runner.leftover.follow()
        assert await stage.role_runner.leftover.kill() is None
        assert not alive(pid)
        assert list(folder.iterdir()) == [] or not stage.role_runner.cgroup.exists()


# -- the workload of exec ---------------------------------------------------------------------------


async def test_a_workload_of_another_user_is_killed_with_its_children(
    stage: Stage,
) -> None:
    """Fault 2: ``su -c`` is another session, and what it leaves in the background an orphan."""
    _root_only()
    script = "setsid sleep 1000 & echo $! >&9; exec sleep 1001"
    inner = f"exec 9> {stage.directory}/one.pid; su -s /bin/sh -c '{script}' nobody"
    stage.open(workload=("/bin/sh", "-c", inner))
    assert (await stage.run(Role.PRIMARY)).ok
    pid = await stage.pid("one.pid")
    assert alive(pid)
    assert (await stage.run(Role.SECONDARY)).ok
    assert not alive(pid)


async def test_a_search_that_hangs_delays_a_demotion_by_a_share_of_its_budget(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A demotion waited 2 s for the search, which may be its whole budget."""
    limit_s, done = 4.0, stage.directory / "done"
    stage.open(
        hook_primary=stage.hook("p", "exit 0"), hook_secondary=stage.hook("s", f"touch {done}")
    )
    assert (await stage.run(Role.PRIMARY)).ok
    go_on, find = threading.Event(), process_tree.ProcessTree.find

    def find_late(tree: process_tree.ProcessTree) -> set[proctree.Process]:
        go_on.wait(PATIENCE_S)
        return find(tree)

    monkeypatch.setattr(process_tree.ProcessTree, "find", find_late)
    begun_at = time.monotonic()
    stage.begin(Role.SECONDARY, limit_s)
    await until(done.exists)
    took_s = time.monotonic() - begun_at
    go_on.set()
    assert (await stage.end()).ok
    assert took_s < process_tree.SEARCH_S


async def test_slow_searches_leave_a_demotion_hook_its_time_even_if_tasks_are_scarce(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The killing before the hook may use half of the time, and used all: its limit did not hold for a search."""
    limit_s, done = 4.0, stage.directory / "done"
    stage.open(
        hook_primary=stage.hook("p", "exit 0"),
        hook_secondary=stage.hook("s", f"touch {done}"),
    )
    assert (await stage.run(Role.PRIMARY)).ok
    find = process_tree.ProcessTree.find

    def find_slowly(tree: process_tree.ProcessTree) -> set[proctree.Process]:
        time.sleep(0.75 * limit_s)
        return find(tree)

    monkeypatch.setattr(process_tree.ProcessTree, "find", find_slowly)
    monkeypatch.setattr(reserve, "tasks_are_scarce", lambda: True)
    begun_at = time.monotonic()
    stage.begin(Role.SECONDARY, limit_s)
    await until(done.exists)
    took_s = time.monotonic() - begun_at
    await stage.end()
    assert took_s < 0.75 * limit_s


@pytest.mark.parametrize("workload", [(), ("sleep", "1000")], ids=["hooks", "exec"])
async def test_a_search_without_memory_keeps_neither_the_workload_nor_the_demotion_hook(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, workload: tuple[str, ...]
) -> None:
    """The first search raised MemoryError, so nothing was stopped before the budget was used up."""
    done = stage.directory / "done"
    role_runner = stage.open(
        hook_primary=stage.hook("p", "exit 0"),
        hook_secondary=stage.hook("s", f"touch {done}"),
        workload=workload,
    )
    assert (await stage.run(Role.PRIMARY)).ok
    pid = role_runner.workload and role_runner.workload.pgid

    def fail() -> dict[int, proctree.Stat]:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(proctree, "snapshot", fail)
        stage.begin(Role.SECONDARY, limit_s=1.0)
        ended = await stage.end()
    assert not ended.ok
    assert "cannot list the processes" in ended.why
    assert done.exists()
    assert not (pid and alive(pid))
    assert (await stage.run(Role.SECONDARY)).ok


@pytest.fixture
def searches(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> list[set[proctree.Process]]:
    """What each search for the processes of the tenure has found; the reaper works every 20 ms."""
    found: list[set[proctree.Process]] = []
    find = process_tree.ProcessTree.find

    def find_and_record(tree: process_tree.ProcessTree) -> set[proctree.Process]:
        result = find(tree)
        if tree.value == stage.role_runner.process_mark:
            found.append(result)
        return result

    monkeypatch.setattr(process_tree.ProcessTree, "find", find_and_record)
    monkeypatch.setattr(process, "REAP_S", 0.02)
    return found


async def test_processes_are_tracked_for_as_long_as_the_tenure_has_any(
    stage: Stage, searches: list[set[proctree.Process]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each search reads all of /proc, so an agent whose tenure has no processes does not repeat it for ever."""
    rounds: list[bool] = []
    has_zombies = process._has_zombies
    quiet: list[set[proctree.Process]] = [set()] * proctree.QUIET_SEARCHES

    def count_rounds() -> bool:  # the reaper calls it in each round
        rounds.append(has_zombies())
        return rounds[-1]

    monkeypatch.setattr(process, "_has_zombies", count_rounds)
    leave = "sleep 1000 & echo $! > {}.pid"
    stage.open(
        hook_pending_primary=stage.hook("w", leave.format("w")),
        hook_primary=stage.hook("p", leave.format("p")),
    )
    for role, name in ((Role.PENDING_PRIMARY, "w"), (Role.PRIMARY, "p")):
        assert (await stage.run(role)).ok
        pid, begun = await stage.pid(f"{name}.pid"), len(searches)
        await until_longer(searches, len(quiet))
        assert all(searches[begun + 1 :])
        os.kill(pid, signal.SIGKILL)
        await until(lambda: searches[-len(quiet) :] == quiet)
        last = len(searches)
        await until_longer(rounds, len(quiet))
        assert len(searches) == last


async def test_processes_are_tracked_while_a_workload_waits_for_its_restart(
    stage: Stage, searches: list[set[proctree.Process]]
) -> None:
    stage.open(workload=("/bin/false",), workload_restart="always")
    assert (await stage.run(Role.PRIMARY)).ok
    quiet: list[set[proctree.Process]] = [set()] * (2 * proctree.QUIET_SEARCHES)
    await until(lambda: searches[-len(quiet) :] == quiet)
    assert (await stage.run(Role.SECONDARY)).ok


async def test_a_promotion_fails_before_its_hook_if_the_demotion_hook_is_gone(stage: Stage) -> None:
    secondary = stage.hook("s", "exit 0")
    stage.open(hook_primary=stage.hook("p", "touch started"), hook_secondary=secondary)
    stage.remove(secondary)
    ended = await stage.run(Role.PRIMARY)
    assert not ended.ok
    assert ended.why.startswith(f"hook secondary: {secondary[0]} cannot be found")
    assert not (stage.directory / "started").exists()


# -- orphans ----------------------------------------------------------------------------------------

SUBREAPER = """
import asyncio, os, subprocess, sys
from agent.ops import process
process.REAP_S = 0.1

async def main():
    process.become_subreaper()
    orphans = process.OrphanReaper()
    child = process.Child(["/bin/sh", "-c", "sleep 0.1 & exit 3"], start_new_session=True)
    child.start()
    await child.wait()
    while True:  # until the orphan, sleep, has ended and is reaped
        states = dict(line.split() for line in subprocess.check_output(
            ["ps", "--ppid", str(os.getpid()), "-o", "comm=,stat="], text=True).splitlines())
        if "sleep" not in states:
            break
        await asyncio.sleep(0.05)
    for _ in range(3):  # further rounds of the reaper leave the command alone
        await asyncio.sleep(process.REAP_S)
    print(states["sh"][0])
    child.release()
    print((await child.wait()).code)

asyncio.run(main())
"""


async def test_orphans_are_reaped_and_zombies_of_our_own_children_are_not() -> None:
    agent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", SUBREAPER, stdout=asyncio.subprocess.PIPE
    )
    out, _ = await agent.communicate()
    assert out.decode().splitlines() == ["Z", "3"]


async def test_the_fence_command_receives_what_the_page_of_hooks_states(stage: Stage) -> None:
    seen = stage.directory / "seen"
    command = stage.hook("fence", f"(pwd; cat; env) >{seen}")
    runner = stage.open(fence_command=command, hook_limit=60.0, hook_environment={"UNIT": "x"})
    await runner.run_fence_command()
    directory, payload, *variables = seen.read_text().splitlines()
    assert directory == "/"
    facts = json.loads(payload)
    assert (facts["event"], facts["epoch"]) == ("fence", None)
    assert 0 < facts["deadline_ms"] <= 60_000
    assert {"FAILOVER_EVENT=fence", "FAILOVER_EPOCH="} <= set(variables)
    assert "UNIT=x" not in variables
