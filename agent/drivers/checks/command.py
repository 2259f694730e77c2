"""The ``exec`` check: one command in its own process group, of which nothing outlives the run.

Owns its processes, their numbers and their output. Knows nothing of rise, fall and limits: whoever
runs it cancels it at the limit.

What the command gets: its argv, no shell; its own session and process group; ``/`` as working
directory; PATH, HOME, LANG and TZ of the agent; an empty stdin. Not promised: a process that leaves
the group (setsid) is not ended with it.
"""

import asyncio
import os
import signal
import subprocess
import threading
from contextlib import suppress

from agent.drivers.checks.aside import Failed
from agent.ops.logs import Log
from agent.settings.values import ExecCheck

INHERITED = ("PATH", "HOME", "LANG", "TZ")
"""As hooks have them."""

OUTPUT_BYTES = 4096
"""Of one run, into the debug log; the rest is read and thrown away."""

CHUNK_BYTES = 64 * 1024

GRACE_S = 0.5
"""From TERM to KILL: for a shell's trap. The check has failed already."""

DEATH_S = 1.0
"""How long a killed command is waited for. In an uninterruptible read it can take for ever; it is
left then, and no other is started beside it."""

log = Log(__name__)


class Command:
    """Runs an ``exec`` check. Call it, one call at a time."""

    def __init__(self, check: ExecCheck) -> None:
        self._check = check
        self._last: _Run | None = None

    async def __call__(self) -> None:
        """Return if the command exits with 0. Cancelled, it ends the group: TERM, then KILL.

        Raises:
            Failed: it could not be started, was not 0, or was killed.
        """
        if self._last is not None and not self._last.reaped:
            raise Failed("its last run was killed and has not ended (stuck in the kernel?)")
        self._last = run = _Run(self._check)
        try:
            result = await run.end()
        finally:
            output = await run.finish()
        if result is None:
            raise Failed("its end is not known: somebody else has waited for it")
        if result.si_code != os.CLD_EXITED:
            raise Failed(_with(f"killed by signal {result.si_status}", output))
        if result.si_status != 0:
            raise Failed(_with(f"exit {result.si_status}", output))


def _with(what: str, output: bytes) -> str:
    first = output.decode(errors="replace").strip().partition("\n")[0]
    return f"{what}: {first}" if first else what


class _Run:
    """One run. The ended leader stays a zombie until its group is dead: its number is no other's."""

    def __init__(self, check: ExecCheck) -> None:
        self._name = check.name
        self._loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[os.waitid_result | None] = self._loop.create_future()
        self._forget = threading.Event()
        self._kept = bytearray()
        argv = list(check.command)
        try:
            self._popen = subprocess.Popen(  # noqa: S603 - checked like a hook before the start
                argv,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                bufsize=0,
                cwd="/",
                env={key: os.environ[key] for key in INHERITED if key in os.environ},
                start_new_session=True,
            )
        except OSError as error:
            raise Failed(f"{argv[0]} cannot be started: {error.strerror}") from error
        assert self._popen.stdout is not None  # noqa: S101 - it was asked for
        self._pipe = self._popen.stdout
        try:
            threading.Thread(target=self._watch, daemon=True).start()
        except RuntimeError as error:
            self._signal(signal.SIGKILL)
            self._pipe.close()
            self._popen.wait()  # it was killed a moment ago
            raise Failed(f"no thread can be started: {error}") from error
        os.set_blocking(self._pipe.fileno(), False)
        self._loop.add_reader(self._pipe.fileno(), self._read)

    @property
    def reaped(self) -> bool:
        """Whether nothing is left of the command itself."""
        return self._popen.returncode is not None

    async def end(self) -> os.waitid_result | None:
        """How the command ended; None if somebody else knows. Cancelled: TERM, and GRACE_S."""
        try:
            return await asyncio.shield(self._ended)
        except asyncio.CancelledError:
            self._signal(signal.SIGTERM)
            await asyncio.wait([self._ended], timeout=GRACE_S)
            raise

    async def finish(self) -> bytes:
        """KILL what is left of the group, give its number back; the output's beginning."""
        self._signal(signal.SIGKILL)
        try:
            await asyncio.wait([self._ended], timeout=DEATH_S)
        finally:
            if not self._pipe.closed:
                self._read()
            self._close()
            if self._ended.done():
                self._popen.wait()  # a zombie, so this is immediate
            self._forget.set()
        text = self._kept.decode(errors="replace")
        log.debug("check output", check=self._name, output=text)
        return bytes(self._kept)

    def _signal(self, number: signal.Signals) -> None:
        if self._ended.done() and self._ended.result() is None:
            return  # reaped by somebody else: the number may be a stranger's
        assert self._popen.pid not in {0, 1, os.getpgrp()}  # noqa: S101 - our own mistake
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._popen.pid, number)

    def _watch(self) -> None:
        try:
            result = os.waitid(os.P_PID, self._popen.pid, os.WEXITED | os.WNOWAIT)
        except ChildProcessError:
            result = None
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(self._ended.set_result, result)
        self._forget.wait()
        self._popen.wait()

    def _read(self) -> None:
        try:
            data = os.read(self._pipe.fileno(), CHUNK_BYTES)
        except BlockingIOError:
            return
        self._kept += data[: OUTPUT_BYTES - len(self._kept)]
        if not data:
            self._close()

    def _close(self) -> None:
        if not self._pipe.closed:
            self._loop.remove_reader(self._pipe.fileno())
            self._pipe.close()
