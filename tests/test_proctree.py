"""Processes of a tenure are found whatever became of their parents, and nothing escapes the killing."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from agent import proctree

PATIENCE_S = 20.0


@pytest.fixture
def mark() -> str:
    return f"test-{os.getpid()}-{time.monotonic_ns()}"


@pytest.fixture
def started(mark: str) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Starts a shell in a session of its own; all of it is killed at the end."""
    shells = []

    def start(script: str) -> subprocess.Popen[bytes]:
        shell = subprocess.Popen(
            ["/bin/sh", "-c", script],
            start_new_session=True,
            env={"PATH": os.environ["PATH"], proctree.MARK: mark},
        )
        shells.append(shell)
        return shell

    yield start
    proctree.kill_all(
        lambda: proctree.with_mark(proctree.snapshot(), mark), time.monotonic() + PATIENCE_S
    )
    for shell in shells:
        shell.kill()
        shell.wait()


def until_written(path: Path) -> int:
    end_at = time.monotonic() + PATIENCE_S
    while not (path.exists() and path.read_text().strip()):
        assert time.monotonic() < end_at
        time.sleep(0.01)
    return int(path.read_text())


def kill(groups: list[int], roots: list[proctree.Process]) -> set[proctree.Process]:
    return proctree.kill_all(
        lambda: proctree.related(proctree.snapshot(), groups, roots), time.monotonic() + PATIENCE_S
    )


def alive(pid: int) -> bool:
    stat = proctree.read(pid)
    return stat is not None and stat.state not in proctree.ENDED


def test_a_child_that_left_the_group_is_found_by_its_parent(
    tmp_path: Path, started: Callable[..., subprocess.Popen[bytes]]
) -> None:
    shell = started(f"setsid sh -c 'echo $$ > {tmp_path}/pid; exec sleep 1000' & wait")
    child = until_written(tmp_path / "pid")
    assert os.getsid(child) == child
    root = proctree.identify(shell.pid)
    assert root is not None
    assert kill([], [root]) == set()
    assert not alive(child)
    assert not alive(shell.pid)


def test_an_orphan_that_left_the_group_is_found_by_its_mark(
    tmp_path: Path, mark: str, started: Callable[..., subprocess.Popen[bytes]]
) -> None:
    shell = started(f"setsid sh -c 'echo $$ > {tmp_path}/pid; exec sleep 1000' &")
    orphan = until_written(tmp_path / "pid")
    shell.wait()
    table = proctree.snapshot()
    assert orphan not in {pid for pid, _ in proctree.related(table, [shell.pid], [])}
    assert {pid for pid, _ in proctree.with_mark(table, mark)} == {orphan}
    assert proctree.with_mark(table, mark[:-1]) == set()
    proctree.kill_all(lambda: proctree.with_mark(proctree.snapshot(), mark), time.monotonic() + 9)
    assert not alive(orphan)


def test_a_process_group_is_found_whose_leader_has_ended(
    tmp_path: Path, started: Callable[..., subprocess.Popen[bytes]]
) -> None:
    shell = started(f"sh -c 'echo $$ > {tmp_path}/pid; exec sleep 1000' &")
    orphan = until_written(tmp_path / "pid")
    shell.wait()
    assert kill([shell.pid], []) == set()
    assert not alive(orphan)


def test_no_process_escapes_by_forking(
    mark: str, started: Callable[..., subprocess.Popen[bytes]]
) -> None:
    """Each process starts another one, which leaves the group, and ends."""
    fork = (
        "import os, time\n"
        "end = time.monotonic() + 30\n"
        "while time.monotonic() < end:\n"
        "    time.sleep(0.05)\n    if os.fork():\n        os._exit(0)\n"
        "    os.setsid()\n"
    )
    shell = started(f"exec {sys.executable} -S -E -c '{fork}'")
    shell.wait()

    def find() -> set[proctree.Process]:
        return proctree.with_mark(proctree.snapshot(), mark)

    end_at = time.monotonic() + PATIENCE_S
    while not find():  # one look may miss it
        assert time.monotonic() < end_at
    assert proctree.kill_all(find, time.monotonic() + PATIENCE_S) == set()
    assert not any(find() for _ in range(20))


def test_a_reused_process_id_is_not_signalled_by_send(
    started: Callable[..., subprocess.Popen[bytes]],
) -> None:
    shell = started("exec sleep 1000")
    process = proctree.identify(shell.pid)
    assert process is not None
    assert not proctree.send((process[0], process[1] + 1), signal.SIGKILL)
    assert alive(shell.pid)
    assert not kill([], [(process[0], process[1] + 1)])
    assert alive(shell.pid)
    assert proctree.send(process, signal.SIGKILL)


def test_this_process_and_its_ancestors_are_never_killed() -> None:
    table = proctree.snapshot()
    mine = {pid for pid, _ in proctree.related(table, [os.getpgid(0), os.getsid(0)], [])}
    assert not mine & {os.getpid(), os.getppid(), 1, 2}


def test_signalling_a_process_that_is_gone_is_no_error() -> None:
    assert proctree.read(2**22 + 1) is None
    assert proctree.identify(2**22 + 1) is None
    assert not proctree.send((2**22 + 1, 0), signal.SIGKILL)
    assert proctree.in_cgroup(proctree.snapshot(), "/no/such/directory") == set()


def test_processes_that_a_slow_search_finds_late_are_killed(
    mark: str, started: Callable[..., subprocess.Popen[bytes]]
) -> None:
    """A look may take longer than the stopping: a success needs several that find nothing."""
    shells = [started("exec sleep 1000") for _ in range(2)]
    looks = 0

    def find() -> set[proctree.Process]:
        nonlocal looks
        looks += 1
        time.sleep(proctree.STOP_S * 1.2)
        seen = shells[: 1 if looks == 1 else 2]
        table = proctree.snapshot()
        return proctree.related(table, [shell.pid for shell in seen], [])

    assert proctree.kill_all(find, time.monotonic() + PATIENCE_S) == set()
    assert not any(alive(shell.pid) for shell in shells)


def test_processes_found_after_the_deadline_are_killed_at_once(
    started: Callable[..., subprocess.Popen[bytes]],
) -> None:
    shell = started("exec sleep 1000")
    kill_by = time.monotonic() - 1.0
    proctree.kill_all(lambda: proctree.related(proctree.snapshot(), [shell.pid], []), kill_by)
    shell.wait(PATIENCE_S)
