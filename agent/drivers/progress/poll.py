"""The sources that are asked: a file, its modification time, a metric, a command.

Owns one reading of each. Knows nothing of when the next one is due, and of what is done with it.

What can block for ever (a file system that is gone) is done in a thread, one at a time; a second one
starts when the first has come back. These threads are daemons: the end of the process waits for none.
"""

import asyncio
import os
import re
import select
import shlex
import signal
import stat
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import httpx2
from prometheus_client.parser import text_string_to_metric_families

from agent.drivers.progress.times import (
    LONGEST_TEXT,
    Reason,
    Refused,
    from_seconds,
    last_line,
    read_text,
)
from agent.ops.blocking import BlockingThread, StuckError
from agent.ops.process import NO_TENURE, Popen, mark
from agent.settings.values import CommandProgress, FileProgress, FileTimeProgress, MetricProgress

INHERITED = ("PATH", "HOME", "LANG", "TZ")
"""The variables that a command has from the agent's own environment, as hooks have."""

LONGEST_OUTPUT = 4 * 1024
"""Bytes of each stream of a command that prints one line."""

LONGEST_PAGE = 4 * 1024 * 1024
"""Bytes of an exporter's page; a large node exporter's has a tenth."""

LONGEST_LINE = 64 * 1024
"""Bytes of one line of it."""

LONGEST_SAMPLE = 1024
MOST_SAMPLES = 64
"""Bytes and lines of the one metric: some milliseconds of parsing. One of the lines may fit."""

STOP_S = 0.5
"""How long a stop waits for a killed command to be gone."""

METRICS_TEXT = {"accept": "text/plain; version=0.0.4", "accept-encoding": "identity"}
"""One form, and not compressed: what is bounded is then what is read."""

T = TypeVar("T")


class Reader(Protocol):
    """One source."""

    async def read(self) -> datetime:
        """The time now. Raises Refused if there is none; takes little more than its limit."""

    async def close(self) -> None:
        """Leave nothing running or open."""


class _Apart(Generic[T]):
    """Does a blocking thing in a thread, one at a time."""

    def __init__(self, work: Callable[[], T], limit_s: float) -> None:
        self._work = work
        self._limit_s = limit_s
        self.pending: asyncio.Future[T | Exception] | None = None

    async def do(self) -> T:
        """What the work returns or raises. Raises Refused, TOO_SLOW, at the limit."""
        if self.pending is None or self.pending.done():
            loop = asyncio.get_running_loop()
            self.pending = loop.create_future()
            run = threading.Thread(target=self._run, args=(loop, self.pending), daemon=True)
            run.start()
        done, _ = await asyncio.wait([self.pending], timeout=self._limit_s)
        if not done:
            raise Refused(Reason.TOO_SLOW, f"no answer within {self._limit_s:g} s")
        outcome = self.pending.result()
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def _run(self, loop: asyncio.AbstractEventLoop, pending: asyncio.Future[T | Exception]) -> None:
        outcome: T | Exception
        try:
            outcome = self._work()
        except Exception as error:  # noqa: BLE001 - it is raised where it is waited for
            outcome = error
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(pending.set_result, outcome)


class FileReader:
    """A file's last line, its JSON, or its modification time."""

    def __init__(self, settings: FileProgress | FileTimeProgress) -> None:
        self._path = settings.path
        self._key = settings.key if isinstance(settings, FileProgress) else None
        work = self._content if isinstance(settings, FileProgress) else self._modified
        self._work = work
        self._limit_s = settings.limit
        self._lane = BlockingThread(f"progress {settings.path}")

    async def read(self) -> datetime:
        try:
            return await self._lane.run(self._work, timeout_s=self._limit_s)
        except TimeoutError as error:  # which is an OSError
            text = f"no answer within {self._limit_s:g} s"
            raise Refused(Reason.TOO_SLOW, text) from error
        except StuckError as error:
            raise Refused(Reason.TOO_SLOW, str(error)) from error
        except OSError as error:
            text = f"{self._path} cannot be read: {error.strerror or error}"
            raise Refused(Reason.UNREADABLE, text) from error

    async def close(self) -> None:
        """A thread that hangs is left alone."""

    def _modified(self) -> datetime:
        return from_seconds(self._path.stat().st_mtime)

    def _content(self) -> datetime:
        data, whole = _end_of(self._path)
        if not data.strip():
            raise Refused(Reason.NOT_A_TIME, f"{self._path} is empty")
        line = last_line(data)
        if not whole and len(line) == len(data.strip()):
            text = f"the last line of {self._path} has more than {LONGEST_TEXT} bytes"
            raise Refused(Reason.TOO_LONG, text)
        if self._key is None or not whole:
            return read_text(line, self._key)
        try:
            return read_text(data, self._key)
        except Refused as refused:
            with suppress(Refused):  # one object a line
                return read_text(line, self._key)
            raise refused from None


def _end_of(path: Path) -> tuple[bytes, bool]:
    """The last bytes, and whether they are all."""
    # a FIFO without a writer would hold the thread up
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise OSError("it is not a regular file")
        start = max(0, found.st_size - LONGEST_TEXT)
        file.seek(start)
        return file.read(LONGEST_TEXT), start == 0


class MetricReader:
    """The one sample of an exporter's page that fits."""

    def __init__(self, settings: MetricProgress) -> None:
        self._settings = settings
        self._client: httpx2.AsyncClient | None = None

    async def read(self) -> datetime:
        settings = self._settings
        try:
            async with asyncio.timeout(settings.limit):
                lines = await self._lines()
        except TimeoutError:
            text = f"{settings.url} did not answer within {settings.limit:g} s"
            raise Refused(Reason.TOO_SLOW, text) from None
        except httpx2.HTTPError as error:
            text = f"{settings.url} cannot be read: {str(error) or type(error).__name__}"
            raise Refused(Reason.UNREADABLE, text) from error
        fitting = self._fitting(lines)
        if len(fitting) != 1:
            labels = ", ".join(f'{key}="{value}"' for key, value in settings.labels.items())
            text = (
                f"{settings.url} has {len(fitting)} samples {settings.metric}{{{labels}}}, and must"
                " have one: name it by its labels"
            )
            raise Refused(Reason.UNREADABLE, text)
        return from_seconds(fitting[0])

    async def close(self) -> None:
        if self._client is not None:
            await self._client.aclose()

    async def _lines(self) -> list[str]:
        """The lines of the page that begin with the metric's name."""
        if self._client is None:
            tls = self._settings.url.lower().startswith("https:")  # its certificates take a while
            context = httpx2.create_ssl_context(verify=tls, trust_env=False)
            self._client = httpx2.AsyncClient(verify=context, trust_env=False, timeout=None)
        begins = re.compile(re.escape(self._settings.metric.encode()) + rb"[{\s]")
        found: list[str] = []
        rest, taken = b"", 0
        async with self._client.stream("GET", self._settings.url, headers=METRICS_TEXT) as response:
            if response.status_code != httpx2.codes.OK:
                text = f"{self._settings.url} answers {response.status_code}, right is 200"
                raise Refused(Reason.UNREADABLE, text)
            async for chunk in response.aiter_raw():
                *lines, rest = (rest + chunk).split(b"\n")
                found += [line.decode(errors="replace") for line in lines if begins.match(line)]
                taken += len(chunk)
                self._check_bounds(taken, len(rest), found)
        if begins.match(rest):
            found.append(rest.decode(errors="replace"))
            self._check_bounds(taken, 0, found)
        return found

    def _check_bounds(self, taken: int, rest: int, samples: list[str]) -> None:
        for count, most, what in (
            (taken, LONGEST_PAGE, "bytes"),
            (rest, LONGEST_LINE, "bytes in a line"),
            (len(samples), MOST_SAMPLES, f"samples {self._settings.metric}"),
            (max(map(len, samples), default=0), LONGEST_SAMPLE, "bytes in a sample"),
        ):
            if count > most:
                text = f"{self._settings.url} has more than {most} {what}"
                raise Refused(Reason.TOO_LONG, text)

    def _fitting(self, lines: list[str]) -> list[float]:
        """The values of those that have the name and the labels. Parsing a whole page takes long."""
        try:
            families = list(text_string_to_metric_families("\n".join(lines)))
        except (ValueError, IndexError, OverflowError) as error:
            text = f"{self._settings.url}: {self._settings.metric} cannot be read: {error}"
            raise Refused(Reason.NOT_A_TIME, text) from error
        wanted = self._settings.labels.items()
        return [
            sample.value
            for family in families
            for sample in family.samples
            if sample.name == self._settings.metric and wanted <= sample.labels.items()
        ]


class CommandReader:
    """A command that prints the time, and that ``check_hook`` has passed.

    It runs as a hook does: no shell, its own process group, ``/`` as working directory, a clean
    environment; nothing on stdin. At its end or limit all of its group is killed.
    """

    def __init__(self, settings: CommandProgress) -> None:
        self._argv = settings.command
        self._limit_s = settings.limit
        self._stop = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        # its own limit comes first; the longer one is for a start that hangs
        self._apart = _Apart(self._run, settings.limit + STOP_S)

    async def read(self) -> datetime:
        try:
            return await self._apart.do()
        except OSError as error:
            text = f"{self._argv[0]} could not be started: {error}"
            raise Refused(Reason.UNREADABLE, text) from error

    async def close(self) -> None:
        os.eventfd_write(self._stop, 1)
        if self._apart.pending is not None:
            await asyncio.wait([self._apart.pending], timeout=STOP_S)
        if self._apart.pending is None or self._apart.pending.done():
            os.close(self._stop)

    def _run(self) -> datetime:
        process = Popen(
            self._argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            cwd="/",
            env={key: os.environ[key] for key in INHERITED if key in os.environ} | mark(NO_TENURE),
            start_new_session=True,
        )
        pidfd = os.pidfd_open(process.pid)
        try:
            output = self._follow(process, pidfd)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # a zombie at least: the number is its own
            for fd in (process.stdout, process.stderr):
                assert fd is not None  # noqa: S101 - both were asked for
                fd.close()
            process.wait()
            os.close(pidfd)
        if process.returncode != 0:
            said = last_line(output[1]).decode(errors="replace")
            text = f"{shlex.join(self._argv)} ended with {process.returncode}: {said or 'silence'}"
            raise Refused(Reason.UNREADABLE, text)
        return read_text(last_line(output[0]))

    def _follow(self, process: subprocess.Popen[bytes], pidfd: int) -> Sequence[bytes]:
        """Both streams, until the command's own end."""
        assert process.stdout is not None  # noqa: S101 - asked for
        assert process.stderr is not None  # noqa: S101 - asked for
        output = {process.stdout.fileno(): bytearray(), process.stderr.fileno(): bytearray()}
        waiting = select.poll()
        for fd in (*output, pidfd, self._stop):
            waiting.register(fd, select.POLLIN)
        ends_at = time.monotonic() + self._limit_s
        while True:
            left_s = ends_at - time.monotonic()
            ready = [fd for fd, _ in waiting.poll(max(0.0, left_s) * 1000)]
            for fd in output.keys() & ready:
                data = os.read(fd, LONGEST_OUTPUT)
                output[fd] += data
                if not data:
                    waiting.unregister(fd)
                if len(output[fd]) > LONGEST_OUTPUT:
                    text = f"{self._argv[0]} prints more than {LONGEST_OUTPUT} bytes"
                    raise Refused(Reason.TOO_LONG, text)
            if pidfd in ready and not output.keys() & ready:
                return [bytes(data) for data in output.values()]
            if self._stop in ready or left_s <= 0:
                text = f"{shlex.join(self._argv)} was killed after {self._limit_s:g} s"
                raise Refused(Reason.TOO_SLOW, text)
