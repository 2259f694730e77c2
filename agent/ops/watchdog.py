"""The kernel's watchdog device, which resets the host unless it is petted in time.

Owns the open device. By the kernel's Documentation/watchdog/watchdog-api.rst, opening starts the countdown,
any write restarts it, and only a "V" before the close stops it. So the host is reset if this process dies
while the watchdog is armed, which is intended.

Not promised: that ``disarm`` stops it. A kernel with CONFIG_WATCHDOG_NOWAYOUT, or a driver loaded with
nowayout=1, goes on counting and resets the host, unless another program opens the device in time.
Only one program at a time can open a device: systemd's RuntimeWatchdogSec= takes the first.
"""

import fcntl
import math
import os
import stat
import struct
from pathlib import Path

from agent.errors import ConfigError, ExitCode
from agent.ops.logs import Log

WDIOC_SETTIMEOUT = 0xC0045706
"""_IOWR('W', 6, int): the requested timeout in seconds in, the driver's out."""

LONGEST_TIMEOUT_S = 2**31 - 1
"""The largest int of the ioctl. Drivers refuse timeouts far shorter than that, and then keep their own."""

FLAGS = os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY

log = Log(__name__)


class WatchdogDevice:
    """One device. ``check`` first, then ``arm``, ``pet`` in time, ``disarm``; only ``check`` raises.

    An error is logged once, and again only after a call has succeeded.

    Args:
        path: the device, such as /dev/watchdog; for tests, a FIFO with a reader or an empty file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._device: int | None = None
        self._failing = False

    def check(self) -> None:
        """Check that ``arm`` can work. A device is not opened: that would start it.

        Raises:
            ConfigError: CONFIG_VALUE, it is missing, is neither a device nor a substitute, or is not
                writable for this process.
        """
        try:
            self._try()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(
                f"watchdog device {self.path} cannot be used ({reason}): it must be a character"
                f" device, such as /dev/watchdog, that is writable for uid {os.geteuid()}; load its"
                " driver (or softdog), grant access, or leave the watchdog out",
                exit_code=ExitCode.CONFIG_VALUE,
            ) from error

    def _try(self) -> None:
        found = self.path.stat()
        if stat.S_ISCHR(found.st_mode):
            if not os.access(self.path, os.W_OK, effective_ids=True):
                raise PermissionError("not writable")
        elif stat.S_ISREG(found.st_mode) and found.st_size:
            raise ValueError("it is a file with something in it")  # feeding it would overwrite that
        else:
            os.close(os.open(self.path, FLAGS))

    def arm(self, timeout_s: float) -> None:
        """Start the countdown; if it runs already, only set its timeout.

        Args:
            timeout_s: seconds, above 0, from the last ``pet`` to the reset; rounded up to whole seconds.
                A driver that refuses it keeps its own (often 60), which is logged.
        """
        if self._device is None:
            try:
                self._device = os.open(self.path, FLAGS)
            except OSError as error:
                self._failed("watchdog not armed", error)
                return
        asked_s = math.ceil(max(1, min(LONGEST_TIMEOUT_S, timeout_s)))
        try:
            answer = fcntl.ioctl(self._device, WDIOC_SETTIMEOUT, struct.pack("i", asked_s))
        except OSError as error:
            self._failed("watchdog armed with the driver's own timeout", error)
            return
        self._failing = False
        log.info("watchdog armed", path=self.path, timeout_s=struct.unpack("i", answer)[0])

    def pet(self) -> None:
        """Restart the countdown. Does nothing if it is not armed."""
        self._write(b"\0", "watchdog not petted")

    def disarm(self) -> None:
        """Stop the countdown, if the kernel allows it (see above), and close. May be called twice."""
        self._write(b"V", "watchdog not disarmed")
        device, self._device = self._device, None
        if device is None:
            return
        try:
            os.close(device)
        except OSError as error:
            self._failed("watchdog not closed", error)

    def _write(self, data: bytes, trouble: str) -> None:
        if self._device is None:
            return
        try:
            os.write(self._device, data)
        except OSError as error:
            self._failed(trouble, error)
        else:
            self._failing = False

    def _failed(self, message: str, error: OSError) -> None:
        if not self._failing:
            log.error(message, path=self.path, reason=error)
        self._failing = True
