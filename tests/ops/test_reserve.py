"""Threads and descriptors that are set aside: in a process of its own, as they are of the whole process."""

import subprocess
import sys

import pytest

FULL = """
import _thread, os, resource, threading
from agent.ops import reserve

def refuse(*_):
    raise RuntimeError("can't start new thread")

def exhaust():
    global start
    start, _thread.start_new_thread = _thread.start_new_thread, refuse
"""
"""A process in which, after ``exhaust()``, no thread can be started.

The scripts wait for ``reserve._idle``: nothing else shows that a reserved thread has begun to wait for work.
"""


def run(script: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", FULL + script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_vital_work_runs_in_reserved_threads_again_and_again() -> None:
    assert (
        run("""
assert reserve.reserve_threads(2)
exhaust()
for n in range(10):
    while reserve._idle._value < 2:
        pass
    assert reserve.run_in_thread(lambda: n, vital=True).result(10) == n
print("done")
""")
        == "done"
    )


def test_vital_work_that_blocks_uses_up_no_reserved_thread_while_ordinary_ones_can_be_started() -> (
    None
):
    """Each hook on a dead disk took one for good, until a demotion had none left."""
    assert (
        run("""
reserve.reserve_threads(2)
release = threading.Event()
for _ in range(4):
    begun = threading.Event()
    reserve.run_in_thread(lambda: (begun.set(), release.wait()), vital=True)
    assert begun.wait(10)
exhaust()
while reserve._idle._value < 2:
    pass
print(reserve.run_in_thread(lambda: "done", vital=True).result(10))
""")
        == "done"
    )


def test_vital_work_is_done_once_if_a_started_thread_never_begins_or_begins_late() -> None:
    """One that has no memory ends before its first instruction."""
    assert (
        run("""
reserve.reserve_threads(1)
while reserve._idle._value < 1:
    pass
late = []
_thread.start_new_thread = lambda work, args: late.append(work)
done = []
reserve.run_in_thread(lambda: done.append(None), vital=True).result(10)
late[0]()
print(len(done))
""")
        == "1"
    )


@pytest.mark.parametrize(("vital", "reserved"), [(False, 2), (True, 0)])
def test_other_work_and_work_beyond_the_reserve_are_refused(*, vital: bool, reserved: int) -> None:
    assert (
        run(f"""
reserve.reserve_threads({reserved})
exhaust()
try:
    reserve.run_in_thread(print, vital={vital})
except BlockingIOError as error:
    print(error.strerror)
""")
        == "no thread can be started: can't start new thread"
    )


def test_tasks_are_scarce_if_so_many_cannot_be_started() -> None:
    assert run("""
print(reserve.tasks_are_scarce())
exhaust()
print(reserve.tasks_are_scarce(), reserve.reserve_threads())
""").split() == ["False", "True", "False"]


def test_the_tasks_that_were_tried_are_free_again_afterwards() -> None:
    """The hook that was to run next got EAGAIN, as they still counted."""
    assert (
        run("""
print({(reserve.tasks_are_scarce(), len(os.listdir("/proc/self/task"))) for _ in range(100)})
""")
        == "{(False, 1)}"
    )


def test_freed_descriptors_can_be_used_at_the_limit() -> None:
    assert (
        run("""
reserve.reserve_descriptors(3)
most = max(map(int, os.listdir("/proc/self/fd")))
resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
try:
    os.open("/dev/null", os.O_RDONLY)
except OSError:
    reserve.free_descriptors()
    print(len([os.open("/dev/null", os.O_RDONLY) for _ in range(3)]))
""")
        == "3"
    )


def test_a_process_without_memory_ends_with_its_own_status_while_a_thread_works() -> None:
    """Python ends such a thread by a library that was loaded only then: "libgcc_s.so.1 must be installed"."""
    assert (
        run("""
import resource, sys, time
reserve.reserve_threads(2)

def work():
    while True:
        time.sleep(0.0001)

reserve.run_in_thread(work, vital=False)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used, -1))
print("done")
""")
        == "done"
    )
