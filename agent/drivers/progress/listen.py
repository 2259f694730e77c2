"""The Unix socket that the workload writes times to.

Owns the socket file and the connections. Knows nothing of what a line means.

Whoever may write to the socket is believed: its mode decides. Of one read the last LINES_PER_READ
lines are looked at; those before are superseded by them. A last line that no newline ends counts at
the end of the stream. Not promised: that of two agents which are given one path, and start within a
millisecond of each other, the second is refused.
"""

import asyncio
import os
import socket
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from agent.drivers.progress.times import Reason, Refused
from agent.errors import ConfigError, ExitCode
from agent.settings.values import SocketProgress

LONGEST_LINE = 1024
"""Bytes. A time has under 40."""

LINES_PER_READ = 64
"""Some 0.5 ms; a flood of lines delays a heartbeat by no more than that."""

MOST_CONNECTIONS = 32
"""A workload and its scripts. Each costs a few KiB and may stay silent for ever."""

BACKLOG = 32


class Listener:
    """The socket. ``start`` it inside a running loop; ``stop`` it there too.

    Args:
        take: given a line or a datagram, as it came.
        refuse: given what is wrong with what cannot be one.
    """

    def __init__(
        self,
        settings: SocketProgress,
        take: Callable[[bytes], None],
        refuse: Callable[[Refused], None],
    ) -> None:
        self._settings = settings
        self.take = take
        self.refuse = refuse
        self.connections: set[asyncio.Transport] = set()
        self._identity: tuple[int, int] | None = None
        self._server: asyncio.Server | None = None
        self._datagrams: asyncio.DatagramTransport | None = None

    async def start(self) -> None:
        """Make the socket and listen.

        Raises:
            ConfigError: LISTEN, something alive or something else is there, or it cannot be made.
        """
        loop = asyncio.get_running_loop()
        listening = self._bind()
        if self._settings.datagram:
            self._datagrams, _ = await loop.create_datagram_endpoint(
                lambda: _Datagrams(self), sock=listening
            )
        else:
            self._server = await loop.create_unix_server(
                lambda: _Lines(self), sock=listening, backlog=BACKLOG
            )

    def stop(self) -> None:
        """Listen no more, and take the socket away. May be called twice, or without a start."""
        path = self._settings.path
        with suppress(OSError):
            if self._identity == _identity(path):
                path.unlink()
        if self._server is not None:
            self._server.close()
        if self._datagrams is not None:
            self._datagrams.abort()
        for connection in list(self.connections):
            connection.abort()

    def _bind(self) -> socket.socket:
        path, mode = self._settings.path, int(self._settings.mode, 8)
        kind = socket.SOCK_DGRAM if self._settings.datagram else socket.SOCK_STREAM
        listening = socket.socket(socket.AF_UNIX, kind)
        try:
            _clear(path, kind)
            os.fchmod(listening.fileno(), mode)  # on Linux bind goes by it: no moment with more
            listening.bind(str(path))
            path.chmod(mode)  # what the umask took away
            self._identity = _identity(path)
        except OSError as error:
            listening.close()
            raise ConfigError(
                f"progress: socket {path} cannot be made ({error.strerror or error}): name another"
                " path, in a directory that this user may write to",
                exit_code=ExitCode.LISTEN,
            ) from error
        listening.setblocking(False)
        return listening


def _clear(path: Path, kind: socket.SocketKind) -> None:
    """Take a dead agent's socket away.

    Raises:
        OSError: somebody listens there, or it is something else.
    """
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise OSError("there is something that is no socket")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, kind) as asking:
        asking.setblocking(False)
        try:
            asking.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
        except OSError as error:  # of another type, or too busy: alive
            raise OSError(f"a process listens there: {error.strerror}") from error
        else:
            raise OSError("a process listens there")


def _identity(path: Path) -> tuple[int, int]:
    found = path.lstat()
    return found.st_dev, found.st_ino


class _Lines(asyncio.Protocol):
    """One connection."""

    def __init__(self, listener: Listener) -> None:
        self._listener = listener
        self._transport: asyncio.Transport | None = None
        self._rest = b""
        self._skipping = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)  # noqa: S101 - of a stream
        connections = self._listener.connections
        if len(connections) >= MOST_CONNECTIONS:
            text = f"a connection above {MOST_CONNECTIONS} was closed: close those not in use"
            self._listener.refuse(Refused(Reason.UNREADABLE, text))
            transport.abort()
            return
        self._transport = transport
        connections.add(transport)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - of the protocol
        if self._transport is not None:
            self._listener.connections.discard(self._transport)

    def data_received(self, data: bytes) -> None:
        *lines, self._rest = (self._rest + data).split(b"\n")
        if self._skipping and lines:  # the end of the line that was too long
            del lines[0]
            self._skipping = False
        for line in lines[-LINES_PER_READ:]:
            self._line(line)
        if len(self._rest) > LONGEST_LINE:
            if not self._skipping:
                self._line(self._rest)
            self._skipping = True
            self._rest = b""

    def eof_received(self) -> None:
        if not self._skipping:
            self._line(self._rest)

    def _line(self, line: bytes) -> None:
        if len(line) > LONGEST_LINE:
            text = f"a line has more than {LONGEST_LINE} bytes"
            self._listener.refuse(Refused(Reason.TOO_LONG, text))
        elif line.strip():
            self._listener.take(line)


class _Datagrams(asyncio.DatagramProtocol):
    """The loop reads one a turn, so a flood delays nothing."""

    def __init__(self, listener: Listener) -> None:
        self._listener = listener

    def datagram_received(self, data: bytes, addr: object) -> None:  # noqa: ARG002 - of the protocol
        if len(data) > LONGEST_LINE:
            text = f"a datagram of {len(data)} bytes has more than {LONGEST_LINE}"
            self._listener.refuse(Refused(Reason.TOO_LONG, text))
        else:
            self._listener.take(data)
