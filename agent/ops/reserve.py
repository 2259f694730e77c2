"""Threads and descriptors that are set aside for a demotion at which the kernel gives no further ones.

A workload may use up every task that a cgroup (TasksMax), a user (RLIMIT_NPROC) or the machine has, and this
process its descriptors. Even then the agent has to find and kill processes, to write its state file, and to
run the demotion hook. Knows nothing of what they are used for.

Not promised: a process for the demotion hook. It can be forked once the killing has freed a task.
"""

import _thread
import concurrent.futures
import errno
import os
import queue
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

THREADS = 8
"""A demotion needs at most: one for each of the hook and its steps, four to search and to kill, the state
file; and one may be stuck in the kernel."""

DESCRIPTORS = 32
"""A demotion needs about 20: seven for a hook, the state file, and what several searches read at a time."""

FREE_TASKS = 8
"""How many tasks an ordinary demotion script uses at a time: a pipeline or two."""

BEGIN_S = 0.02
"""After this time a started thread counts as one that has no memory, and never begins."""

TASKS_END_S = 0.05
TASKS_POLL_S = 0.001
"""How long ended threads may count as tasks, which takes microseconds; and how often that is looked at."""

T = TypeVar("T")

_descriptors: list[int] = []
_idle = threading.Semaphore(0)
"""Counts the reserved threads that have no work. Global, like the limit that they are set aside from."""
_work: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()


def reserve_threads(count: int = THREADS) -> bool:
    """Start the threads; return whether all could be started. Call it once."""
    try:
        for _ in range(count):
            _thread.start_new_thread(_serve, ())
    except (RuntimeError, MemoryError):
        return False
    return True


def run_in_thread(work: Callable[[], T], *, vital: bool) -> concurrent.futures.Future[T]:
    """Run ``work`` in a thread that does not outlive the process; its result. It cannot be cancelled.

    Does not wait for the thread, as ``threading.Thread.start`` does: for ever, if the new thread has no memory.

    Args:
        work: may block for ever.
        vital: a demotion needs it: a reserved thread does it if an ordinary one cannot be started, or does
            not begin within ``BEGIN_S``.

    Raises:
        BlockingIOError: no thread is left.
    """
    result: concurrent.futures.Future[T] = concurrent.futures.Future()
    result.set_running_or_notify_cancel()
    claim, begun = threading.Lock(), threading.Event()

    def run() -> None:
        if not claim.acquire(blocking=False):
            return  # the other thread does it
        try:
            begun.set()
            result.set_result(work())
        except BaseException as error:  # noqa: BLE001 - raised again where it is awaited
            result.set_exception(error)

    def run_if_late() -> None:
        begun.wait(BEGIN_S)
        run()

    try:
        _thread.start_new_thread(run, ())
    except (RuntimeError, MemoryError) as error:
        if not (vital and _idle.acquire(blocking=False)):
            raise BlockingIOError(errno.EAGAIN, f"no thread can be started: {error}") from error
        _work.put(run)
    else:
        if vital and _idle.acquire(blocking=False):
            _work.put(run_if_late)
    return result


def reserve_descriptors(count: int = DESCRIPTORS) -> None:
    """Set descriptors aside, until ``free_descriptors``. Raises OSError if there are not as many."""
    while len(_descriptors) < count:
        _descriptors.append(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))


def free_descriptors() -> None:
    """Make the descriptors that were set aside available."""
    while _descriptors:
        os.close(_descriptors.pop())


def tasks_are_scarce(needed: int = FREE_TASKS) -> bool:
    """Whether the kernel does not start ``needed`` further tasks at the same time. A thread is a task.

    They have ended when this returns, unless that takes more than ``TASKS_END_S``.
    """
    end = threading.Event()
    tasks: list[int] = []
    started = 0

    def occupy_task() -> None:
        tasks.append(threading.get_native_id())
        end.wait()

    with suppress(RuntimeError, MemoryError):
        while started < needed:
            _thread.start_new_thread(occupy_task, ())
            started += 1
    end.set()
    end_at = time.monotonic() + TASKS_END_S
    while len(tasks) < started or any(Path(f"/proc/self/task/{task}").exists() for task in tasks):
        if time.monotonic() >= end_at:
            break
        time.sleep(TASKS_POLL_S)
    return started < needed


def _serve() -> None:
    while True:
        _idle.release()
        _work.get()()
