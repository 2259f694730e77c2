"""A storm of wrong passwords against a real coordinator: whoever is known notices nothing of it."""

import asyncio
import base64
import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from agent.coordinator.auth import hash_password

from .conftest import Process

pytestmark = pytest.mark.long

CONNECTIONS = 400
STORM_S = 4.0
P95_S = 0.5

STORM = """
import asyncio, base64, sys, time

async def one(host, port, number, end):
    count = 0
    while time.monotonic() < end:
        reader, writer = await asyncio.open_connection(host, port)
        try:
            while time.monotonic() < end:
                count += 1
                token = base64.b64encode(f"{sys.argv[4]}{number % 7 or str()}:{number}-{count}".encode()).decode()
                writer.write(f"GET /api/v1/clientfailover/groups HTTP/1.1\\r\\nHost: localhost\\r\\nAuthorization: Basic {token}\\r\\n\\r\\n".encode())
                head = await reader.readuntil(b"\\r\\n\\r\\n")
                length = next(line for line in head.lower().split(b"\\r\\n") if line.startswith(b"content-length"))
                await reader.readexactly(int(length.split(b":")[1]))
                answers[head[9:12].decode()] = answers.get(head[9:12].decode(), 0) + 1
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

async def main():
    end = time.monotonic() + float(sys.argv[3])
    await asyncio.gather(*(one("127.0.0.1", int(sys.argv[1]), n, end) for n in range(int(sys.argv[2]))))

answers = {}
asyncio.run(main())
print(answers)
"""


class Caller:
    """One connection of a user."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, user: str
    ) -> None:
        self._reader, self._writer = reader, writer
        token = base64.b64encode(f"{user}:{user}".encode()).decode()
        self._head = f"Host: localhost\r\nAuthorization: Basic {token}\r\n"

    async def post(self, path: str, body: object) -> tuple[int, float]:
        """The status, and the seconds until it was here."""
        content = json.dumps(body)
        head = f"POST /api/v1/clientfailover/{path} HTTP/1.1\r\n{self._head}"
        before = time.monotonic()
        self._writer.write(f"{head}Content-Length: {len(content)}\r\n\r\n{content}".encode())
        answer = await self._reader.readuntil(b"\r\n\r\n")
        took_s = time.monotonic() - before
        fields = dict(line.split(b": ", 1) for line in answer.lower().split(b"\r\n")[1:-2])
        await self._reader.readexactly(int(fields[b"content-length"]))
        return int(answer[9:12]), took_s


@asynccontextmanager
async def calling(port: int, user: str) -> AsyncIterator[Caller]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield Caller(reader, writer, user)
    finally:
        writer.close()


async def test_wrong_passwords_keep_no_known_agent_waiting(
    serve: Callable[..., Process], tmp_path: Path
) -> None:
    """All from one address. A right password that was never checked before gets in as well."""
    users = tmp_path / "users"
    users.write_text("".join(f"{name}:{hash_password(name)}\n" for name in ("known", "new")))
    users.chmod(0o600)
    port = int(serve("--users-file", str(users)).url.rpartition(":")[2])
    path = "groups/g/clientsessions/a/heartbeat"
    beat = {"FailoverScore": 100}
    async with calling(port, "known") as known, calling(port, "new") as new:
        assert (await known.post("groups", {"Id": "g", "FailoverTimeout": "00:00:02"}))[0] == 201
        assert (await known.post("groups/g/clientsessions", {"Id": "a"}))[0] == 201
        arguments = [str(port), str(CONNECTIONS), str(STORM_S), "known"]
        storm = await asyncio.create_subprocess_exec(
            sys.executable, "-c", STORM, *arguments, stdout=subprocess.PIPE
        )
        end = time.monotonic() + STORM_S
        times, statuses = [], Counter[int]()
        first_new = None
        while time.monotonic() < end:
            status, took_s = await known.post(path, beat)
            times.append(took_s)
            statuses[status] += 1
            if first_new != 201:
                group = {"Id": "h", "FailoverTimeout": "00:00:02"}
                first_new = (await new.post("groups", group))[0]
            await asyncio.sleep(0.1)
        output, _ = await storm.communicate()
    p95_s = sorted(times)[int(0.95 * len(times))]
    measured = f"{dict(statuses)}, p95 {p95_s:.3f} s; the storm had {output.decode()}"
    assert storm.returncode == 0
    assert "'429'" in output.decode(), "the storm was none"
    assert len(times) > 5
    assert set(statuses) == {200}, measured
    assert first_new == 201
    assert p95_s < P95_S, measured
