"""The source ``socket``: a Unix socket that the workload writes times to.

Owns the socket file and the connections. Knows nothing of what a line means.

The workload may own the directory while the agent is root: no link is followed, and only a socket of this user is
replaced, removed or changed.

The socket's mode decides who may write to it, and every writer is trusted. Only the last LINES_PER_READ lines of
one read are parsed, as they supersede earlier ones. A last line without a newline counts at the end of the stream.
Not promised: if two agents have the same path and start within a millisecond, the second may not be refused.
"""

import asyncio
import os
import re
import socket
import stat
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from agent import files
from agent.drivers.progress.kind import Receiver, Source, SourceKind
from agent.drivers.progress.times import Reason, Refused
from agent.errors import ConfigError, ExitCode
from agent.ops.blocking import BlockingThread, StuckError
from agent.schema.fields import Format
from agent.schema.kinds import DEFAULT_MAX_FUTURE_S, MaxFuture

LONGEST_SOCKET_PATH = 107
"""The longest path in bytes: an address has 108 with the closing NUL (unix(7))."""

LONGEST_LINE = 1024
"""The longest line in bytes. A time has under 40."""

LINES_PER_READ = 64
"""How many lines are parsed at a time: some 0.5 ms, by which a flood of lines can delay a heartbeat."""

MOST_CONNECTIONS = 32
"""The most connections, for a workload and its scripts. Each takes a few KiB and may stay silent for ever."""

BACKLOG = 32

FILE_S = 2.0
"""How long the socket's file may take to be made or removed, on a file system that may hang."""


def _check_path(path: Path) -> Path:
    if not path.is_absolute() or len(bytes(path)) > LONGEST_SOCKET_PATH:
        raise ValueError(f"must be an absolute path of at most {LONGEST_SOCKET_PATH} bytes")
    return path


def _parse_mode(value: object) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"0?[0-7]{3}", value):
        raise ValueError('must be permissions in octal and in quotes, like "0660"')
    return value


@dataclass(frozen=True, slots=True, kw_only=True)
class SocketProgress(SourceKind):
    """A Unix socket that the agent makes; each line, or datagram, is a time."""

    EXAMPLE: ClassVar[Mapping[str, Any]] = {
        "type": "socket",
        "path": "/run/failover-agent/progress.sock",
        "mode": "0660",
    }

    type: Literal["socket"] = "socket"
    max_future: MaxFuture = DEFAULT_MAX_FUTURE_S
    path: Annotated[Path, Format("PATH", "absolute path", check=_check_path)]
    """The socket. What a dead agent of the same user left there is replaced."""
    datagram: bool = False
    """A datagram socket, instead of a stream of lines."""
    mode: Annotated[str, Format("MODE", "permissions in octal, in quotes", parse=_parse_mode)] = (
        "0660"
    )
    """Its permissions; a process that may write to it is believed."""

    def open(self, receiver: Receiver) -> Source:
        return Listener(self, receiver)


class Listener:
    """The socket. ``start`` it inside a running loop; ``stop`` it there too."""

    def __init__(self, settings: SocketProgress, receiver: Receiver) -> None:
        self._settings = settings
        self.receiver = receiver
        self.connections: set[asyncio.Transport] = set()
        self._lane = BlockingThread(f"progress socket {settings.path}")
        self._identity: tuple[int, int] | None = None
        self._directory: int | None = None
        """The directory in which the socket was created, even if its path has changed since."""
        self._abandoned = False
        """Whether the start was cancelled while its thread may still create the socket."""
        self._server: asyncio.Server | None = None
        self._datagrams: asyncio.DatagramTransport | None = None

    async def start(self) -> None:
        """Make the socket and listen.

        Raises:
            ConfigError: LISTEN, a process or another file has the path, or the socket cannot be made.
        """
        loop = asyncio.get_running_loop()
        try:
            listening = await self._lane.run(self._bind, timeout_s=FILE_S)
        except asyncio.CancelledError:
            self._abandoned = True
            raise
        except TimeoutError as error:  # a subclass of OSError
            self._abandoned = True
            raise self._error(f"no answer within {FILE_S:g} s") from error
        except (OSError, StuckError) as error:
            raise self._error(getattr(error, "strerror", None) or str(error)) from error
        if self._settings.datagram:
            self._datagrams, _ = await loop.create_datagram_endpoint(
                lambda: _Datagrams(self), sock=listening
            )
        else:
            self._server = await loop.create_unix_server(
                lambda: _Lines(self), sock=listening, backlog=BACKLOG
            )

    async def stop(self) -> None:
        """Stop listening, and remove the socket."""
        with suppress(OSError, StuckError):
            await self._lane.run(self._remove, timeout_s=FILE_S)
        if self._server is not None:
            self._server.close()
        if self._datagrams is not None:
            self._datagrams.abort()
        for connection in list(self.connections):
            connection.abort()

    def _error(self, reason: str) -> ConfigError:
        return ConfigError(
            f"progress: socket {self._settings.path} cannot be made ({reason}): name another path, in a"
            " directory that this user may write to",
            exit_code=ExitCode.LISTEN,
        )

    def _remove(self) -> None:
        if self._directory is None:
            return
        directory, self._directory = self._directory, None
        path = _pinned(directory, self._settings.path)
        try:
            found = path.lstat()
            if self._identity == (found.st_dev, found.st_ino):
                path.unlink()
        finally:
            os.close(directory)

    def _bind(self) -> socket.socket:
        mode = int(self._settings.mode, 8)
        kind = socket.SOCK_DGRAM if self._settings.datagram else socket.SOCK_STREAM
        self._directory = directory = files.open_directory(self._settings.path.parent)
        path = _pinned(directory, self._settings.path)
        listening = socket.socket(socket.AF_UNIX, kind)
        try:
            _remove_dead_socket(path, kind)
            os.fchmod(listening.fileno(), mode)  # bind applies the umask: the mode is never wider
            listening.bind(str(path))
            self._identity = _set_mode(path, mode)
        except OSError:
            listening.close()
            os.close(directory)
            self._directory = None
            raise
        if self._abandoned:
            listening.close()
            self._remove()
        else:
            listening.setblocking(False)
        return listening


def _pinned(directory: int, path: Path) -> Path:
    """The path by way of the directory's descriptor, so that nobody can redirect it."""
    return Path(f"/proc/self/fd/{directory}", path.name)


def _set_mode(path: Path, mode: int) -> tuple[int, int]:
    """Set the mode of a new socket, which the umask has restricted; return its device and inode.

    Raises:
        OSError: the path is not this socket any more.
    """
    made = _open_socket(path)
    try:
        Path(f"/proc/self/fd/{made}").chmod(mode)
        found = os.fstat(made)
        return found.st_dev, found.st_ino
    finally:
        os.close(made)


def _open_socket(path: Path) -> int:
    """A descriptor (O_PATH) of a socket of this user, so that a later replacement of the file has no effect.

    Raises:
        OSError: FileNotFoundError for nothing there; else it is something else, or somebody else's.
    """
    found = os.open(path, files.PART)
    status = os.fstat(found)
    if stat.S_ISSOCK(status.st_mode) and status.st_uid == os.geteuid():
        return found
    os.close(found)
    if stat.S_ISSOCK(status.st_mode):
        raise OSError(f"there is a socket of uid {status.st_uid}")
    raise OSError("there is a file that is not a socket")


def _remove_dead_socket(path: Path, kind: socket.SocketKind) -> None:
    """Remove a dead agent's socket.

    Raises:
        OSError: a process listens there, or it is something else, or somebody else's.
    """
    try:
        found = _open_socket(path)
    except FileNotFoundError:
        return
    try:
        with socket.socket(socket.AF_UNIX, kind) as asking:
            asking.setblocking(False)
            asking.connect(f"/proc/self/fd/{found}")
    except ConnectionRefusedError:
        path.unlink()
    except OSError as error:  # of another type, or too busy: alive
        raise OSError(f"a process listens there: {error.strerror}") from error
    else:
        raise OSError("a process listens there")
    finally:
        os.close(found)


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
            self._listener.receiver.refuse(Refused(Reason.UNREADABLE, text))
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
            self._listener.receiver.refuse(Refused(Reason.TOO_LONG, text))
        elif line.strip():
            self._listener.receiver.receive_text(line)


class _Datagrams(asyncio.DatagramProtocol):
    """Receives datagrams. The loop reads one in each iteration, so a flood delays nothing else."""

    def __init__(self, listener: Listener) -> None:
        self._listener = listener

    def datagram_received(self, data: bytes, addr: object) -> None:  # noqa: ARG002 - of the protocol
        if len(data) > LONGEST_LINE:
            text = f"a datagram of {len(data)} bytes has more than {LONGEST_LINE}"
            self._listener.receiver.refuse(Refused(Reason.TOO_LONG, text))
        else:
            self._listener.receiver.receive_text(data)
