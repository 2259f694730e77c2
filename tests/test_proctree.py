"""Processes of a tenure are found whatever became of their parents, and nothing escapes the killing."""

import errno
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from agent import proctree
from agent.ops import process_tree
from tests.hung import dead_disk, stuck_thread, without_pidfd

PATIENCE_S = 20.0

ForkPool = partial(ProcessPoolExecutor, mp_context=multiprocessing.get_context("fork"))


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


HEADLESS = """
import ctypes, os, platform, threading, time
def work():
    while True:
        time.sleep(0.01)
threading.Thread(target=work).start()
exit = {"x86_64": 60}.get(platform.machine(), 93)
open("%s", "w").write(str(os.getpid()))
ctypes.CDLL(None).syscall(exit, 0)
"""
"""The main thread ends, and the process goes on without it: the kernel shows it as a zombie."""


def until_headless(path: Path) -> int:
    pid = until_written(path)
    end_at = time.monotonic() + PATIENCE_S
    while "Z (zombie)" not in Path(f"/proc/{pid}/status").read_text():
        assert time.monotonic() < end_at
        time.sleep(0.01)
    return pid


def test_a_process_whose_main_thread_has_ended_is_found_and_killed(
    tmp_path: Path, mark: str, started: Callable[..., subprocess.Popen[bytes]]
) -> None:
    script = tmp_path / "headless.py"
    script.write_text(HEADLESS % (tmp_path / "pid"))
    shell = started(f"exec {sys.executable} -S -E {script}")
    pid = until_headless(tmp_path / "pid")
    root = proctree.identify(pid)
    assert root is not None
    assert proctree.lives(root)
    table = proctree.snapshot()
    assert proctree.with_mark(table, mark) == {root}
    assert proctree.related(table, [shell.pid], []) == {root}
    assert kill([], [root]) == set()
    assert not alive(pid)


def test_a_killed_process_with_a_thread_that_is_stuck_in_the_kernel_is_not_gone(
    tmp_path: Path, started: Callable[..., subprocess.Popen[bytes]]
) -> None:
    """Its main thread is a zombie at once; what the other one was writing may still be written."""
    with dead_disk(tmp_path / "disk") as disk:
        script = tmp_path / "stuck.py"
        script.write_text(
            "import os, threading, time\n"
            f"threading.Thread(target=os.stat, args=('{disk}/file',), daemon=True).start()\n"
            f"time.sleep(0.2)\nopen('{tmp_path}/pid', 'w').write(str(os.getpid()))\n"
            "time.sleep(1000)\n"
        )
        started(f"exec {sys.executable} -S -E {script}")
        pid = until_written(tmp_path / "pid")
        root = proctree.identify(pid)
        assert root is not None

        def find() -> set[proctree.Process]:
            return proctree.related(proctree.snapshot(), [], [root])

        assert proctree.kill_all(find, time.monotonic() + 1) == {root}
        assert "Z (zombie)" in Path(f"/proc/{pid}/status").read_text()
    end_at = time.monotonic() + PATIENCE_S
    while proctree.lives(root):
        assert time.monotonic() < end_at
        time.sleep(0.01)


def test_a_stuck_thread_is_seen_beside_a_main_thread_that_sleeps(
    started: Callable[..., subprocess.Popen[bytes]],
) -> None:
    with stuck_thread() as pid:
        stat = proctree.read(pid)
        assert stat is not None
        assert stat.state == ord("S")
        assert proctree.has_stuck_thread(pid)
    sleeper, end_at = started("exec sleep 1000").pid, time.monotonic() + PATIENCE_S
    while proctree.has_stuck_thread(sleeper):  # its start reads the disk
        assert time.monotonic() < end_at
    assert not proctree.has_stuck_thread(2**22 + 1)


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


SIGNALS_WITHOUT_PIDFD = """
import signal, subprocess
from agent import proctree
child = subprocess.Popen(["/bin/sleep", "1000"])
process = proctree.identify(child.pid)
print(proctree.send((child.pid, process[1] + 1), signal.SIGKILL), child.poll())
print(proctree.send(process, signal.SIGKILL), child.wait(), proctree.send(process, signal.SIGKILL))
"""


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EPERM])
def test_a_process_is_signalled_where_there_is_no_pidfd(number: int) -> None:
    """Nothing could be signalled there, so no demotion ever succeeded."""
    command = [*without_pidfd(number), sys.executable, "-c", SIGNALS_WITHOUT_PIDFD]
    result = subprocess.run(command, check=False, capture_output=True, text=True, timeout=30)
    assert result.stdout.split() == ["False", "None", "True", "-9", "False"], result.stderr


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


def test_what_was_stopped_is_killed_if_a_later_search_fails(
    started: Callable[..., subprocess.Popen[bytes]],
) -> None:
    """It stayed stopped for good, with whatever it held."""
    shell = started("exec sleep 1000")
    searches = 0

    def find() -> set[proctree.Process]:
        nonlocal searches
        searches += 1
        if searches > 1:
            raise OSError(errno.EMFILE, "Too many open files")
        return proctree.related(proctree.snapshot(), [shell.pid], [])

    with pytest.raises(OSError, match="Too many open files"):
        proctree.kill_all(find, time.monotonic() + PATIENCE_S)
    assert shell.wait(PATIENCE_S) == -signal.SIGKILL


# -- what cannot be read is not gone -----------------------------------------------------------------


def test_a_process_that_cannot_be_read_for_lack_of_descriptors_is_not_gone() -> None:
    """It was: with one descriptor too few a demotion succeeded while its workload was alive."""
    process = proctree.identify(os.getpid())
    assert process is not None
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1, before[1]))
    try:
        for search in (
            proctree.snapshot,
            lambda: proctree.lives(process),
            lambda: proctree.contents(1, "x"),
        ):
            with pytest.raises(OSError, match="Too many open files"):
                search()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


HIDDEN = """
import os, sys
names = {}
exec(sys.stdin.read(), names)
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
try:
    names["snapshot"]()
except OSError as error:
    print(error)
"""


@pytest.mark.parametrize("mode", ["hidepid=1", "hidepid=2", "subset=pid"])
def test_a_proc_that_hides_processes_is_an_error(mode: str) -> None:
    """What is hidden was taken for gone; ``subset=pid`` hides no process."""
    mount = f'mount -t proc -o {mode} proc /proc && exec "$@"'
    source = Path(proctree.__file__).read_text()
    command = ["unshare", "--mount", "sh", "-c", mount, "sh", sys.executable, "-S", "-c", HIDDEN]
    done = subprocess.run(command, input=source, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"needs: a mount of /proc with {mode}: run as root: {done.stderr}")
    assert done.stdout.strip() == ("" if mode == "subset=pid" else proctree.HIDDEN)


COVERED = """
import subprocess, sys
from agent import proctree
from agent.ops.process_tree import ProcessTree
proctree.open_proc()
with subprocess.Popen(["sleep", "1000"], env={proctree.MARK: "covered"}) as child:
    subprocess.run(["mount", "-t", "tmpfs", "none", "/proc"], check=True)
    searches = ProcessTree("covered", since=0).find, lambda: proctree.with_mark(proctree.snapshot(), "covered")
    print([pid == child.pid for search in searches for pid, _ in search()])
    child.kill()
"""


def test_a_mount_over_proc_hides_no_mark_from_those_who_have_opened_it() -> None:
    """An agent looked for marks by the path of /proc, and found none, nor a process that can be read, any more."""
    command = ["unshare", "--mount", sys.executable, "-c", COVERED]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"needs: a mount namespace: run as root: {done.stderr}")
    assert done.stdout.strip() == "[True, True]"


def look_often(_: int) -> None:
    """Read all processes again and again; fail if one is missing. In a thread, or in a process of its own."""
    for _ in range(40):
        assert {proctree.INIT, os.getppid(), os.getpid()} <= proctree.snapshot().keys()


@pytest.mark.parametrize("many", [ThreadPoolExecutor, ForkPool])
def test_searches_at_once_do_not_take_processes_from_each_other(many: Any) -> None:
    """They shared the position in the open /proc: on a small host whatever was running was missing."""
    proctree.open_proc()
    with many(4) as pool:
        assert list(pool.map(look_often, range(8))) == [None] * 8


def test_only_groups_without_strangers_are_signalled_as_a_whole() -> None:
    """Not this process's own group, which killpg() takes 0 for, nor a group with a process of somebody else."""

    def stat(group: int, state: bytes = b"S") -> proctree.Stat:
        return proctree.Stat(1, [state, b"1", str(group).encode(), *[b"1"] * 17])

    table = {
        10: stat(10),
        11: stat(0),
        12: stat(12),
        13: stat(12),
        14: stat(14),
        15: stat(14, b"Z"),
    }
    found = {(pid, 1) for pid in (10, 11, 12, 14)}
    assert proctree.own_groups({7}, table, found) == {7, 10, 14}


SEARCHES = pytest.mark.parametrize("module", [proctree, process_tree])
"""The two searches by mark, of the guard and of the agent."""


def marked(module: Any, mark: str) -> set[int]:
    """What the search of this module finds by its mark."""
    if module is proctree:
        found = proctree.with_mark(proctree.snapshot(), mark)
    else:
        found = process_tree.ProcessTree(mark, since=0).find()
    return {pid for pid, _ in found}


@pytest.fixture
def is_found(
    mark: str, module: Any, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Callable[[str, Counter[str]], bool]], bool]:
    """Whether the search finds a marked process, some of whose files are empty at first, as within an exec.

    The function that it receives returns whether this file is empty; it has counted how often each was read.
    """

    def search(is_empty: Callable[[str, Counter[str]], bool]) -> bool:
        read, asked = proctree.contents, Counter[str]()
        with subprocess.Popen(["sleep", "1000"], env={proctree.MARK: mark}) as child:

            def read_some(thread: int, name: str) -> bytes:
                asked[name] += thread == child.pid
                return b"" if thread == child.pid and is_empty(name, asked) else read(thread, name)

            monkeypatch.setattr(proctree, "contents", read_some)
            found = marked(module, mark)
            child.kill()
        return found == {child.pid}

    return search


@SEARCHES
def test_a_process_within_an_exec_is_found_by_its_mark(is_found: Any) -> None:
    """It has no environment for a moment, longer on a busy machine: a demotion succeeded while it was alive."""
    assert is_found(lambda _, asked: asked["environ"] < 5)


@SEARCHES
def test_a_process_whose_exec_ends_between_two_looks_is_found_by_its_mark(is_found: Any) -> None:
    """It had no environment yet and then a command line, so it was taken for one that was started without any."""
    assert is_found(lambda name, asked: name == "environ" and asked[name] == 1)


@SEARCHES
def test_a_busy_machine_does_not_make_a_process_within_an_exec_one_without_environment(
    is_found: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All the time for further looks went by between two of them, and none was taken at any later search, either."""
    seconds = count()
    clock = SimpleNamespace(monotonic=lambda: float(next(seconds)), sleep=time.sleep)
    monkeypatch.setattr(proctree, "time", clock)
    assert is_found(lambda _, asked: asked["environ"] < 4)


@SEARCHES
def test_processes_that_never_have_an_environment_delay_a_search_once(
    mark: str, module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Anybody can have as many of them as the system allows."""
    read, sleep = proctree.contents, time.sleep
    pauses: list[float] = []

    def pause(pause_s: float) -> None:
        pauses.append(pause_s)
        sleep(pause_s)

    monkeypatch.setattr(time, "sleep", pause)
    monkeypatch.setattr(proctree, "_bare", set())
    with subprocess.Popen(["sleep", "1000"], env={proctree.MARK: mark}) as child:

        def read_of_child(thread: int, name: str) -> bytes:
            return b"" if thread != child.pid else read(thread, name)

        monkeypatch.setattr(proctree, "contents", read_of_child)
        found = marked(module, mark)
        child.kill()
    assert found == {child.pid}
    assert 0 < sum(pauses) <= proctree.EXEC_S
    init = proctree.identify(1)
    assert init in proctree._bare, "the next search would wait for it again"
    assert not proctree.ExecWait().is_needed(init, proctree.snapshot()[1])
