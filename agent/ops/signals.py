"""Signal handlers: stop at SIGTERM and SIGINT, reload at SIGHUP, forward some, and ignore the others.

The handlers only set an event or call a callback. They are Python functions, never SIG_IGN: exec() resets
those to the default for child processes. To be used in the main thread.
"""

import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING

from agent.ops.logs import Log

if TYPE_CHECKING:
    import asyncio

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)

JOB_CONTROL = (signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU)
"""Signals that stop a process: a stopped agent loses its role, so Ctrl-Z would cause a takeover."""

FORWARDED = (
    *(signal.SIGUSR1, signal.SIGUSR2, signal.SIGQUIT, signal.SIGWINCH, signal.SIGALRM),
    *(signal.SIGVTALRM, signal.SIGPROF, signal.SIGIO, signal.SIGPWR),
    *range(signal.SIGRTMIN, signal.SIGRTMAX + 1),
)
"""Signals that a supervisor forwards to its command. SIGHUP has a setting of its own."""

IGNORED = (
    *(number for number in FORWARDED if number != signal.SIGWINCH),
    *(signal.SIGHUP, signal.SIGXCPU, signal.SIGSTKFLT, *JOB_CONTROL),
)
"""Ordinary signals that would kill or stop a process by default. Not in it: those of a fault (SIGSEGV,
SIGABRT, ...), SIGPIPE and SIGXFSZ, which Python ignores, and SIGKILL and SIGSTOP."""

Handler = Callable[[int, FrameType | None], None]

log = Log(__name__)


def signal_name(number: int) -> str:
    """Name of a signal, like SIGUSR1 or SIGRTMIN+3."""
    try:
        return signal.Signals(number).name
    except ValueError:  # most real-time signals have none
        return f"SIGRTMIN+{number - signal.SIGRTMIN}"


@contextmanager
def _handled(handlers: Mapping[int, Handler]) -> Iterator[None]:
    """Install handlers; restore the previous ones at the end."""
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, signal.SIG_DFL if old is None else old)


def _call_in_loop(act: Callable[[int], object]) -> Handler:
    """Build a handler that has the running loop call ``act`` with the signal's number."""
    import asyncio  # noqa: PLC0415 - signals are ignored before anything large is imported

    loop = asyncio.get_running_loop()

    def handle(number: int, _frame: FrameType | None) -> None:
        with suppress(RuntimeError):  # the loop is closed: the process exits
            loop.call_soon_threadsafe(act, number)

    return handle


@contextmanager
def ignored_signals() -> Iterator[None]:
    """Ignore every signal of ``IGNORED``; each is logged once. Enter it first, without a loop.

    ``stop_signals``, ``on_hangup`` and ``forwarded_signals`` may be entered inside it. A signal that the
    parent process ignored (nohup) stays ignored, except for SIGCHLD: the kernel would reap our children, and
    no hook would have a result. Afterwards no signal is blocked.
    """
    seen: set[int] = set()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())

    def ignore(number: int, _frame: FrameType | None) -> None:
        if number not in seen:
            seen.add(number)
            log.warning("signal ignored", signal=signal_name(number))

    kept = [number for number in IGNORED if signal.getsignal(number) is not signal.SIG_IGN]
    with _handled(dict.fromkeys(kept, ignore)):
        yield


@contextmanager
def forwarded_signals(send: Callable[[int], bool]) -> Iterator[None]:
    """Forward every signal of ``FORWARDED``. To be entered inside a running loop.

    Args:
        send: called in the loop; sends the signal to the command, and returns whether it runs.
    """

    def forward(number: int) -> None:
        if send(number):
            log.info("signal forwarded to the workload", signal=signal_name(number))
        elif number != signal.SIGWINCH:
            log.warning("signal ignored: the workload does not run", signal=signal_name(number))

    handle = _call_in_loop(forward)
    with _handled(dict.fromkeys(FORWARDED, handle)):
        yield


@contextmanager
def on_hangup(act: Callable[[], object]) -> Iterator[None]:
    """Have a running loop call ``act`` at each SIGHUP."""
    with _handled({signal.SIGHUP: _call_in_loop(lambda _: act())}):
        yield


@contextmanager
def stop_signals() -> Iterator["asyncio.Event"]:
    """An event that the first SIGTERM or SIGINT sets; further ones are only logged.

    A stop runs to its end: the agent may hold a lease (R5), and the stop has its own limits. To be entered
    in the main thread inside a running loop.
    """
    import asyncio  # noqa: PLC0415 - as in _call_in_loop

    stop = asyncio.Event()

    def stop_once(number: int) -> None:
        name = signal.Signals(number).name
        if stop.is_set():
            log.warning("already stopping", signal=name)
        else:
            log.info("stop requested", signal=name)
            stop.set()

    handle = _call_in_loop(stop_once)
    with _handled(dict.fromkeys(STOP_SIGNALS, handle)):
        yield stop
