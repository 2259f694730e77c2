"""Raw connections to a real coordinator, for callers that HTTP clients cannot play."""

import json
import socket
import ssl
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

BASE = "/api/v1/clientfailover"
HEALTH = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"

TIMES = {"HEAD_S": 2.0, "BODY_S": 2.0, "IDLE_S": 3.0, "ANSWER_S": 2.0, "HANDSHAKE_S": 2.0}
"""Deadlines of a coordinator in a hurry."""

HURRIED = """
import sys
from agent.coordinator import connection, limits, listener, server
for module in (connection, limits, listener, server):
    for name, value in %r.items():
        if hasattr(module, name):
            setattr(module, name, value)
from agent.cli.main import main
raise SystemExit(main(sys.argv[1:]))
"""


def program(**constants: float) -> tuple[str, str]:
    """Arguments of Python for the whole program with other constants, to be a process of its own."""
    return "-c", HURRIED % (TIMES | {"SWEEP_S": 0.1, "CLOSE_S": 0.3} | constants,)


@dataclass
class Answer:
    """An answer as it came over the wire."""

    status: int
    headers: dict[str, str]
    body: bytes

    def error(self) -> dict[str, Any]:
        """The ErrorResponse that every refusal is."""
        assert self.headers["content-type"] == "application/json", self
        error: dict[str, Any] = json.loads(self.body)
        assert error["OperationId"] == self.headers["operation-id"]
        assert str(uuid.UUID(error["OperationId"])) == error["OperationId"]
        assert error["Error"]
        assert error["Reason"]
        assert error["Resolution"]
        return error


class Raw:
    """A connection on which bytes are sent as they are."""

    def __init__(self, url: str, *, source: str = "127.0.0.1", trust: Path | None = None) -> None:
        parts = urlsplit(url)
        assert parts.hostname is not None
        assert parts.port is not None
        place = (parts.hostname, parts.port)
        self.socket = socket.create_connection(place, 20, source_address=(source, 0))
        if trust is not None:
            context = ssl.create_default_context(cafile=trust)
            self.socket = context.wrap_socket(self.socket, server_hostname=parts.hostname)
        self.unread = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.socket.close()

    def send(self, data: bytes) -> Self:
        self.socket.sendall(data)
        return self

    def request(self, method: str, path: str, body: object = None, headers: str = "") -> Self:
        content = b"" if body is None else json.dumps(body).encode()
        head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\n{headers}Content-Length: {len(content)}\r\n\r\n"
        return self.send(head.encode() + content)

    def _until(self, enough: Callable[[bytes], bool]) -> None:
        while not enough(self.unread):
            more = self.socket.recv(65536)
            assert more, f"closed after {self.unread[:500]!r}"
            self.unread += more

    def answer(self, *, bodyless: bool = False) -> Answer:
        """The next answer."""
        self._until(lambda seen: b"\r\n\r\n" in seen)
        head, _, self.unread = self.unread.partition(b"\r\n\r\n")
        first, *lines = head.decode().split("\r\n")
        headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
        length = 0 if bodyless else int(headers.get("content-length", 0))
        self._until(lambda seen: len(seen) >= length)
        body, self.unread = self.unread[:length], self.unread[length:]
        return Answer(int(first.split()[1]), headers, body)

    def closed(self) -> bool:
        """Wait until the coordinator closes it, having sent nothing else."""
        try:
            return self.unread + self.socket.recv(65536) == b""
        except ConnectionResetError:
            return True


@contextmanager
def crowd(url: str, count: int = 1, *, trust: Path | None = None) -> Iterator[list[Raw]]:
    """Several connections, closed at the end."""
    with ExitStack() as stack:
        yield [stack.enter_context(Raw(url, trust=trust)) for _ in range(count)]


def ask(
    url: str, path: str = "/healthz", *, headers: str = "", trust: Path | None = None
) -> Answer:
    """One request on a connection of its own."""
    with Raw(url, trust=trust) as one:
        return one.request("GET", path, headers=headers).answer()


def resident(process: int) -> int:
    """Resident memory in bytes."""
    return _memory(process, "VmRSS:")


def peak(process: int) -> int:
    """The most resident memory since ``reset_peak``, in bytes."""
    return _memory(process, "VmHWM:")


def reset_peak(process: int) -> None:
    """Let the peak of the resident memory begin anew."""
    Path(f"/proc/{process}/clear_refs").write_text("5")


def _memory(process: int, key: str) -> int:
    status = Path(f"/proc/{process}/status").read_text()
    return int(status.split(key)[1].split()[0]) * 1024


def took_s(run: Callable[[], object]) -> float:
    began = time.monotonic()
    run()
    return time.monotonic() - began


def until(condition: Callable[[], object], limit_s: float = 20.0) -> None:
    """Wait until something is true."""
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, "it never was"
        time.sleep(0.02)


def connections(process: int) -> int:
    """Sockets that a process has open."""
    names = [_linked(name) for name in Path(f"/proc/{process}/fd").iterdir()]
    return sum(name.startswith("socket:") for name in names)


def _linked(name: Path) -> str:
    try:
        return str(name.readlink())
    except OSError:
        return ""
