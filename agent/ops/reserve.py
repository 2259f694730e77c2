"""Reserve threads and file descriptors for a demotion when the kernel provides no further ones.

A workload may use up all tasks that a cgroup (TasksMax), a user (RLIMIT_NPROC) or the machine allows, and this
process may use up its descriptors. Even then the agent has to find and kill processes, write its state file and
run the demotion hook. Knows nothing of how the threads and descriptors are used.

Not promised: a process for the demotion hook. It can be forked once a killed process has freed a task.
"""

import _thread
import concurrent.futures
import ctypes
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
"""The most that a demotion needs: the hook and each of its steps, four searches and killings, and the state file
need one each, and one may be stuck in the kernel."""

DESCRIPTORS = 32
"""A demotion needs about 20: seven for a hook, one for the state file, the rest for searches in parallel."""

FREE_TASKS = 8
"""How many tasks an ordinary demotion script uses at a time: a pipeline or two."""

BEGIN_S = 0.02
"""A started thread that does not run within this time is taken for one that never will: memory is lacking."""

TASKS_END_S = 0.05
TASKS_POLL_S = 0.001
"""How long to wait until ended threads no longer count as tasks, which takes microseconds, and how often to
check."""

T = TypeVar("T")

_descriptors: list[int] = []
_idle = threading.Semaphore(0)
"""Counts the reserved threads without work. Global, since the limit on tasks is global, too."""
_work: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()


def reserve_threads(count: int = THREADS) -> bool:
    """Start the reserved threads; return whether all could be started. Call it once.

    Also loads what glibc needs to end a thread that works when the process exits: without it, for want of memory
    or descriptors, it aborts the process.
    """
    with suppress(OSError):  # another C library needs none
        ctypes.CDLL("libgcc_s.so.1")
    try:
        for _ in range(count):
            _thread.start_new_thread(_serve, ())
    except (RuntimeError, MemoryError):
        return False
    return True


def run_in_thread(work: Callable[[], T], *, vital: bool) -> concurrent.futures.Future[T]:
    """Run ``work`` in a thread that ends with the process; return its future, which cannot be cancelled.

    Returns at once. ``threading.Thread.start`` waits until the thread runs: for ever, if memory is lacking.

    Args:
        work: may block for ever.
        vital: whether a demotion needs it. Then a reserved thread runs it if an ordinary thread cannot be
            started, or does not run within ``BEGIN_S``.

    Raises:
        BlockingIOError: no thread is left.
    """
    result: concurrent.futures.Future[T] = concurrent.futures.Future()
    result.set_running_or_notify_cancel()
    claim, begun = threading.Lock(), threading.Event()

    def run() -> None:
        if not claim.acquire(blocking=False):
            return  # the other thread runs it
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
    """Keep descriptors open until ``free_descriptors``. Raises OSError if the limit allows fewer."""
    while len(_descriptors) < count:
        _descriptors.append(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))


def free_descriptors() -> None:
    """Close the reserved descriptors, so that a demotion can use them."""
    while _descriptors:
        os.close(_descriptors.pop())


def tasks_are_scarce(needed: int = FREE_TASKS) -> bool:
    """Whether the kernel refuses ``needed`` further tasks at the same time. Tries it with threads.

    These threads have ended when this returns, unless that takes more than ``TASKS_END_S``.
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
