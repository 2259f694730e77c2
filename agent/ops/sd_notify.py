"""What this process tells systemd, by its notification protocol (sd_notify(3), sd_watchdog_enabled(3)).

Owns the socket and the three variables that systemd sets. Knows nothing of what the states mean here.
Nothing in it raises, waits or matters: with no systemd it does nothing, and a message that cannot be
sent at once is dropped. (The C library waits instead, which a process with a lease cannot afford.)
"""

import os
import socket
import time
from collections.abc import Callable, MutableMapping

from agent.ops.logs import Log, escaped

STATUS_CHARS = 500
"""At most 2,000 bytes: systemd ignores a message above 4,096, and people read one line of it."""

LONGEST_EXTENSION_S = 86_400.0
"""A day: more than any budget, and what an endless or undefined time is cut to."""

NO_TIMEOUT_USEC = 2**64 - 1
"""What systemd calls infinity; a watchdog of that is none."""

log = Log(__name__)


class Notify:
    """The line to systemd. ``close`` it at the end; until then its methods may be called at any time.

    Args:
        environ: where NOTIFY_SOCKET, WATCHDOG_USEC and WATCHDOG_PID are read and *removed*, so that no
            child speaks in our name; None for this process's own environment.
        monotonic_ns: CLOCK_MONOTONIC, in nanoseconds.

    Attributes:
        watchdog_s: seconds, above 0, within which systemd wants each next ``watchdog()``: call it at
            least twice as often. None if it has no watchdog on this process.
    """

    def __init__(
        self,
        environ: MutableMapping[str, str] | None = None,
        monotonic_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        environ = os.environ if environ is None else environ
        address = os.fsencode(environ.pop("NOTIFY_SOCKET", ""))
        usec, pid = environ.pop("WATCHDOG_USEC", ""), environ.pop("WATCHDOG_PID", "")
        self.watchdog_s = _watchdog_s(usec) if pid in ("", str(os.getpid())) else None
        self._address = b"\0" + address[1:] if address.startswith(b"@") else address
        self._monotonic_ns = monotonic_ns
        self._socket: socket.socket | None = None
        self._status: str | None = None
        self._failing = False
        if self._address.startswith((b"/", b"\0")):
            try:
                self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
                self._socket.setblocking(False)
            except OSError as error:
                log.debug("systemd is not told", reason=error)
        elif address:
            log.debug("systemd is not told", reason="neither a path nor abstract", socket=address)

    def ready(self, status: str) -> None:
        """The start, or a reload, is complete; ``status`` as in ``status()``."""
        self._say(status, "READY=1")

    def status(self, text: str) -> None:
        """One line for ``systemctl status``; sent only if it is not what systemd has already.

        White space becomes single spaces, and what is longer than STATUS_CHARS is cut.
        """
        self._say(text)

    def reloading(self) -> None:
        """A reload begins; ``ready`` must follow, whether or not anything was changed by it."""
        self._send("RELOADING=1", f"MONOTONIC_USEC={self._monotonic_ns() // 1000}")

    def stopping(self) -> None:
        """The stop begins."""
        self._send("STOPPING=1")

    def watchdog(self) -> None:
        """The main loop turns. Nothing is sent if systemd has no watchdog on this process."""
        if self.watchdog_s is not None:
            self._send("WATCHDOG=1")

    def extend_timeout(self, seconds: float) -> None:
        """The start, reload or stop under way may take ``seconds`` more, counted from now."""
        seconds = max(0.0, min(LONGEST_EXTENSION_S, seconds))
        self._send(f"EXTEND_TIMEOUT_USEC={round(seconds * 1e6)}")

    def close(self) -> None:
        """Say no more. May be called twice."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _say(self, status: str, *states: str) -> None:
        status = escaped(" ".join(status.split()))[:STATUS_CHARS]
        if (states or status != self._status) and self._send(*states, f"STATUS={status}"):
            self._status = status

    def _send(self, *assignments: str) -> bool:
        if self._socket is None:
            return False
        try:
            self._socket.sendto("\n".join(assignments).encode(), self._address)
        except OSError as error:  # nobody there, or its queue is full
            if not self._failing:
                log.debug("systemd was not told", message=assignments[0], reason=error)
            self._failing = True
            return False
        self._failing = False
        return True


def _watchdog_s(usec: str) -> float | None:
    try:
        number = int(usec)
    except ValueError:
        return None
    return number / 1e6 if 0 < number < NO_TIMEOUT_USEC else None
