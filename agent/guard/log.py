"""The guard's log lines, on the agent's stderr and in the format of the agent's own (ops/logs.py).

Writing never blocks: what nobody reads is lost.
"""

import os
import select
import stat
import time

from agent.guard.processes import POLL_S, now

FLUSH_S = 0.2
"""How long the guard waits at its end until its lines are in the file."""

LINE_BYTES = 1000
"""Longest line of hook output; longer ones are split."""

VALUE_BYTES = 3000
"""Longest quoted value: with the other fields it fits into one write to a pipe, 4,096 bytes."""

INFO, WARNING, ERROR = 20, 30, 40
LEVELS = {INFO: ("INFO", 6), WARNING: ("WARNING", 4), ERROR: ("ERROR", 3)}
"""Name and syslog priority of each level."""


def write_stderr(data: bytes) -> None:
    """Write to stderr without blocking; drop the data if there is no room."""
    fd = 2
    try:
        # Opened anew: O_NONBLOCK on descriptor 2 would also apply to the agent and its parent.
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            fd = os.open("/proc/self/fd/2", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError:
        pass  # a socket cannot be opened; one that polls as writable has room for many lines
    try:
        poll = select.poll()
        poll.register(fd, select.POLLOUT)
        if poll.poll(0):
            os.write(fd, data[: select.PIPE_BUF])
    except OSError:
        pass
    if fd != 2:  # noqa: PLR2004 - stderr
        os.close(fd)


def quote(text: str) -> str:
    """A JSON string, cut to ``VALUE_BYTES``."""
    out = '"'
    for char in text:
        code = ord(char)
        if len(out) > VALUE_BYTES:
            break
        if char in '"\\':
            out += "\\" + char
        elif 32 <= code < 127:  # noqa: PLR2004 - printable ASCII
            out += char
        elif code < 0x10000:  # noqa: PLR2004 - one unit of UTF-16
            out += f"\\u{code:04x}"
        else:
            high, low = divmod(code - 0x10000, 0x400)
            out += f"\\u{0xD800 + high:04x}\\u{0xDC00 + low:04x}"
    return out + '"'


class LogWriter:
    """Formats and writes the guard's log lines.

    Attributes:
        min_level: lower levels are not shown.
        json: write one JSON object per line instead of text.
        common_fields: fields of every line.
    """

    def __init__(self) -> None:
        self.min_level = INFO
        self.json = False
        self.common_fields: list[tuple[str, str]] = []
        self.partial_line = b""
        try:
            status = os.fstat(2)
            stream = f"{status.st_dev}:{status.st_ino}"
        except OSError:
            stream = "closed"
        self.journal = os.environ.get("JOURNAL_STREAM") == stream
        self.pipe = self.writer_pid = 0

    def start_writer(self, close_fds: "list[int]") -> None:
        """If stderr is a file, fork a process that writes the lines: the file's disk may hang."""
        if self.pipe or not stat.S_ISREG(os.fstat(2).st_mode):
            return
        lines, pipe = os.pipe()
        self.writer_pid = os.fork()
        if not self.writer_pid:
            try:
                for fd in (pipe, *close_fds):
                    os.close(fd)
                while data := os.read(lines, select.PIPE_BUF):
                    os.write(2, data)
            finally:
                os._exit(0)
        os.close(lines)
        os.set_blocking(pipe, False)
        self.pipe = pipe

    def close(self) -> None:
        """Wait up to ``FLUSH_S`` until all lines are written."""
        if not self.pipe:
            return
        os.close(self.pipe)
        end_at = now() + FLUSH_S
        while os.waitpid(self.writer_pid, os.WNOHANG) == (0, 0) and now() < end_at:
            time.sleep(POLL_S)

    def write(self, data: bytes) -> None:
        """Write one line, to the writer process if there is one."""
        if not self.pipe:
            write_stderr(data)
            return
        try:
            os.write(self.pipe, data)
        except OSError:
            pass  # the pipe is full

    def log(self, level: int, message: str, *fields: "tuple[str, str | float | None]") -> None:
        """Log one event."""
        if level < self.min_level:
            return
        name, priority = LEVELS[level]
        seconds = time.time()
        at = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
        at += f".{int(seconds % 1 * 1000):03}Z"
        if self.json:
            header = [("time", at), ("level", name), ("logger", "agent.guard")]
            pairs = [
                f'"{key}": {self.format_value(value)}'
                for key, value in (*header, ("message", message), *self.common_fields, *fields)
            ]
            line = "{" + ", ".join(pairs) + "}"
        else:
            words = [
                f"{key}={self.format_value(value)}" for key, value in (*self.common_fields, *fields)
            ]
            line = " ".join(
                [name, message, *words] if self.journal else [at, name, message, *words]
            )
        self.write(f"{f'<{priority}>' if self.journal else ''}{line}\n".encode())

    def format_value(self, value: "str | float | None") -> str:
        """Format a field's value, as JSON or as text."""
        if not isinstance(value, str):
            return "null" if value is None else str(value)
        plain = value.isascii() and value.isprintable() and not any(c in value for c in ' "=\\')
        return value if plain and value and not self.json else quote(value)

    def log_hook_output(self, data: bytes, *, end: bool = False) -> None:
        """Log hook output line by line; at its ``end`` also a last line without a newline."""
        *lines, self.partial_line = (self.partial_line + data).split(b"\n")
        if end or len(self.partial_line) >= LINE_BYTES:
            lines.append(self.partial_line)
            self.partial_line = b""
        for line in lines:
            for at in range(0, len(line), LINE_BYTES):
                text = line[at : at + LINE_BYTES].decode(errors="replace")
                self.log(INFO, "hook output", ("hook", "secondary"), ("line", text))
