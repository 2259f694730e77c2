"""Signals: stop at SIGTERM and SIGINT, reload at SIGHUP, pass some on, and survive the others.

Decides nothing: callbacks and the event that is waited for do. All handlers are Python functions, never
SIG_IGN: exec() gives every child process its default dispositions back. To be used in the main thread.
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
"""They stop a process. A stopped agent loses its role, so that Ctrl-Z would be a failover."""

FORWARDED = (
    *(signal.SIGUSR1, signal.SIGUSR2, signal.SIGQUIT, signal.SIGWINCH, signal.SIGALRM),
    *(signal.SIGVTALRM, signal.SIGPROF, signal.SIGIO, signal.SIGPWR),
    *range(signal.SIGRTMIN, signal.SIGRTMAX + 1),
)
"""What a supervisor passes on to its command. SIGHUP has a setting of its own."""

IGNORED = (
    *(number for number in FORWARDED if number != signal.SIGWINCH),
    *(signal.SIGHUP, signal.SIGXCPU, signal.SIGSTKFLT, *JOB_CONTROL),
)
"""Ordinary signals whose default would kill or stop a process. Not in it: what says that the process is
broken (SIGSEGV, SIGABRT, ...), SIGPIPE and SIGXFSZ, which Python ignores, and what nobody can ignore."""

Handler = Callable[[int, FrameType | None], None]

log = Log(__name__)


def name_of(number: int) -> str:
    """A signal's name, like SIGUSR1 or SIGRTMIN+3."""
    try:
        return signal.Signals(number).name
    except ValueError:  # most real-time signals have none
        return f"SIGRTMIN+{number - signal.SIGRTMIN}"


@contextmanager
def _handled(handlers: Mapping[int, Handler]) -> Iterator[None]:
    """Install handlers, and the previous ones again at the end."""
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, signal.SIG_DFL if old is None else old)


def _in_loop(act: Callable[[int], object]) -> Handler:
    """A handler that has the running loop call ``act`` with the signal's number."""
    import asyncio  # noqa: PLC0415 - signals are ignored before anything large is imported

    loop = asyncio.get_running_loop()

    def handle(number: int, _frame: FrameType | None) -> None:
        with suppress(RuntimeError):  # the loop is closed: there is nothing left to act on
            loop.call_soon_threadsafe(act, number)

    return handle


@contextmanager
def ignored_signals() -> Iterator[None]:
    """Survive every signal of ``IGNORED``; each is logged once. Enter it first, without a loop.

    Others may be handled inside it: by ``stop_signals``, ``on_hangup``, ``forwarded_signals``. What the
    parent process has had ignored (nohup) stays so.
    """
    seen: set[int] = set()

    def ignore(number: int, _frame: FrameType | None) -> None:
        if number not in seen:
            seen.add(number)
            log.warning("signal ignored", signal=name_of(number))

    kept = [number for number in IGNORED if signal.getsignal(number) is not signal.SIG_IGN]
    with _handled(dict.fromkeys(kept, ignore)):
        yield


@contextmanager
def forwarded_signals(send: Callable[[int], bool]) -> Iterator[None]:
    """Pass every signal of ``FORWARDED`` on. To be entered inside a running loop.

    Args:
        send: gives a signal to the command, in the loop; whether there is one that got it.
    """

    def forward(number: int) -> None:
        if send(number):
            log.info("signal forwarded to the workload", signal=name_of(number))
        elif number != signal.SIGWINCH:
            log.warning("signal ignored: the workload does not run", signal=name_of(number))

    handle = _in_loop(forward)
    with _handled(dict.fromkeys(FORWARDED, handle)):
        yield


@contextmanager
def on_hangup(act: Callable[[], object]) -> Iterator[None]:
    """Have a running loop call ``act`` at each SIGHUP."""
    with _handled({signal.SIGHUP: _in_loop(lambda _: act())}):
        yield


@contextmanager
def stop_signals() -> Iterator["asyncio.Event"]:
    """An event that the first SIGTERM or SIGINT sets; further ones are logged and change nothing.

    A stop that was begun runs to its end: it may hold a lease (R5), and it has its own limits. To
    be entered in the main thread inside a running loop. The handlers of before are back on exit.
    """
    import asyncio  # noqa: PLC0415 - as in _in_loop

    stop = asyncio.Event()

    def stop_once(number: int) -> None:
        name = signal.Signals(number).name
        if stop.is_set():
            log.warning("already stopping", signal=name)
        else:
            log.info("stop asked for", signal=name)
            stop.set()

    handle = _in_loop(stop_once)
    with _handled(dict.fromkeys(STOP_SIGNALS, handle)):
        yield stop
