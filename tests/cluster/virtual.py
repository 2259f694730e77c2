"""Virtual time, and processes that are frozen and killed as by SIGSTOP and SIGKILL.

A process is a context: every task and timer that is begun inside it belongs to it. While it is frozen none of them
takes a turn, and what has become due meanwhile runs when it goes on, in that order. After a kill none ever does: no
``finally`` runs, no answer is sent. Whatever has left the process before goes its way.
"""

import asyncio
import heapq
import selectors
from collections.abc import Callable, Coroutine
from contextvars import Context, ContextVar
from typing import Any

_PROCESS: ContextVar["Process | None"] = ContextVar("process", default=None)


class Process:
    """What runs in one context."""

    def __init__(self) -> None:
        self.runs = True
        self._parked: list[asyncio.Handle] = []
        self._tasks: list[asyncio.Task[Any]] = []

    def spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Start a task inside."""
        context = Context()
        context.run(_PROCESS.set, self)
        return asyncio.get_running_loop().create_task(work, context=context)

    def keep(self, task: asyncio.Task[Any]) -> None:
        """Keep a task from the garbage collector, which would run its ``finally``."""
        self._tasks.append(task)

    def park(self, turn: asyncio.Handle) -> None:
        """Keep a turn until the process goes on."""
        self._parked.append(turn)

    def pause(self) -> None:
        """Take no turn from now on."""
        self.runs = False

    def go_on(self) -> None:
        """Take the turns that have become due, and those to come."""
        self.runs = True
        parked, self._parked = self._parked, []
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        loop.resume(parked)


def outside(work: Callable[..., object], *arguments: Any, after_s: float) -> None:
    """Call something later, whatever becomes of the process that this is called in."""
    asyncio.get_running_loop().call_later(after_s, work, *arguments, context=Context())


def _run(turn: Any) -> None:
    process = turn._context.get(_PROCESS)
    if process is None or process.runs:
        asyncio.Handle._run(turn)
    else:
        process.park(turn)


class _Turn(asyncio.Handle):
    __slots__ = ()
    _run = _run


class _Timer(asyncio.TimerHandle):
    __slots__ = ()
    _run = _run


# An event loop on a virtual clock is made of asyncio's private parts: it has no public ones for this.


class _Selector(selectors.SelectSelector):
    """Jumps to the next timer instead of waiting for it."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        assert timeout is not None, "nothing is going to happen any more"
        self.now += max(0.0, timeout)
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop on a virtual clock."""

    _ready: Any
    _scheduled: Any

    def __init__(self) -> None:
        self._virtual = _Selector()
        super().__init__(self._virtual)

    def time(self) -> float:
        return self._virtual.now

    def create_task(self, coro: Any, **options: Any) -> asyncio.Task[Any]:
        task: asyncio.Task[Any] = super().create_task(coro, **options)
        context: Context | None = options.get("context")
        process = _PROCESS.get() if context is None else context.get(_PROCESS)
        if process is not None:
            process.keep(task)
        return task

    def resume(self, turns: list[asyncio.Handle]) -> None:
        """Take these turns next."""
        self._ready.extend(turn for turn in turns if not turn.cancelled())

    def _call_soon(self, callback: Any, args: Any, context: Context | None) -> asyncio.Handle:
        turn = _Turn(callback, args, self, context)
        self._ready.append(turn)
        return turn

    def call_at(  # type: ignore[override]
        self, when: float, callback: Any, *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        timer = _Timer(when, callback, args, self, context)
        heapq.heappush(self._scheduled, timer)
        timer._scheduled = True  # type: ignore[attr-defined]
        return timer


def run_virtually(main: Coroutine[Any, Any, None]) -> None:
    """Run to the end; no real time passes in waits."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        # Answers to processes that are dead by then are never read.
        runner.get_loop().set_exception_handler(lambda _loop, _context: None)
        runner.run(main)
