"""Notifications to systemd: readiness, status, watchdog (sd_notify(3), sd_watchdog_enabled(3)).

Owns the socket and the three variables that systemd sets. Nothing in it raises or blocks: without systemd
it does nothing, and a message that cannot be sent at once is dropped. (The C library waits instead, which a
process with a lease cannot afford.)
"""

import os
import socket
import time
from collections.abc import Callable, MutableMapping

from agent.ops.logs import Log, escaped

STATUS_CHARS = 500
"""At most 2,000 bytes: systemd ignores a message of more than 4,096, and shows one line of it."""

LONGEST_EXTENSION_S = 86_400.0
"""A day, which is longer than any budget: used in place of infinite times."""

NO_TIMEOUT_USEC = 2**64 - 1
"""systemd's value for infinity, which means no watchdog."""

log = Log(__name__)


class Notify:
    """Sends notifications to systemd until ``close``.

    Args:
        environ: NOTIFY_SOCKET, WATCHDOG_USEC and WATCHDOG_PID are read from it and *removed*, so that no
            child notifies in our name; None for this process's own environment.
        monotonic_ns: CLOCK_MONOTONIC, in nanoseconds.

    Attributes:
        watchdog_s: systemd's watchdog timeout in seconds, above 0; call ``watchdog()`` at least twice in
            it. None if systemd has no watchdog for this process.
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
        self._watchdog_at = 0
        self._failing = False
        if self._address.startswith((b"/", b"\0")):
            try:
                self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
                self._socket.setblocking(False)
            except OSError as error:
                log.debug("systemd notification unavailable", reason=error)
        elif address:
            reason = "neither a path nor an abstract socket"
            log.debug("systemd notification unavailable", reason=reason, socket=address)

    def ready(self, status: str) -> None:
        """Notify that the start, or a reload, is complete; ``status`` as in ``status()``."""
        self._send_status(status, "READY=1")

    def status(self, text: str) -> None:
        """Set the line that ``systemctl status`` shows; an unchanged one is not sent again.

        White space becomes single spaces; the text is cut to STATUS_CHARS.
        """
        self._send_status(text)

    def reloading(self) -> None:
        """Notify that a reload begins; ``ready`` must follow, whether or not it changed anything."""
        self._send("RELOADING=1", f"MONOTONIC_USEC={self._monotonic_ns() // 1000}")

    def stopping(self) -> None:
        """Notify that the stop begins."""
        self._send("STOPPING=1")

    def watchdog(self) -> None:
        """Reset systemd's watchdog, if it has one for this process and a quarter of its timeout has passed."""
        now = self._monotonic_ns()
        if self.watchdog_s is not None and now >= self._watchdog_at:
            self._watchdog_at = now + int(self.watchdog_s / 4 * 1e9)  # systemd's queue is short
            self._send("WATCHDOG=1")

    def extend_timeout(self, seconds: float) -> None:
        """Allow the current start, reload or stop ``seconds`` more, counted from now."""
        seconds = max(0.0, min(LONGEST_EXTENSION_S, seconds))
        self._send(f"EXTEND_TIMEOUT_USEC={round(seconds * 1e6)}")

    def close(self) -> None:
        """Close the socket. May be called twice."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _send_status(self, status: str, *states: str) -> None:
        status = escaped(" ".join(status.split()))[:STATUS_CHARS]
        if (states or status != self._status) and self._send(*states, f"STATUS={status}"):
            self._status = status

    def _send(self, *assignments: str) -> bool:
        if self._socket is None:
            return False
        try:
            self._socket.sendto("\n".join(assignments).encode(), self._address)
        except OSError as error:  # systemd is gone, or its queue is full
            if not self._failing:
                log.debug("systemd notification dropped", message=assignments[0], reason=error)
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
