"""A small HTTP proxy for tests: CONNECT, requests for a whole URL, and a password.

Owns its sockets. It resolves the names that it is given itself, so that a test sees who resolves. Knows
nothing of what goes through it.
"""

import asyncio
import base64
import contextlib
import ssl
from collections.abc import AsyncIterator, Mapping
from urllib.parse import urlsplit


class Proxy:
    """One proxy.

    Attributes:
        names: addresses of the names that it knows.
        login: user and password that it asks for, or "".
        asked: the first line of each request.
    """

    def __init__(self, names: Mapping[str, str] | None = None, login: str = "") -> None:
        self.names = dict(names or {})
        self.login = login
        self.asked: list[str] = []
        self.refuse = ""
        self.port = 0
        self._tasks: set[asyncio.Task[None]] = set()

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                await self._serve(reader, writer)
        except asyncio.CancelledError:
            pass  # the end of the test
        finally:
            self._tasks.discard(task)
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        first, *lines = head.decode().split("\r\n")
        self.asked.append(first)
        given = [line.partition(": ")[2] for line in lines if line.lower().startswith("proxy-auth")]
        wanted = f"Basic {base64.b64encode(self.login.encode()).decode()}"
        if self.refuse or (self.login and given != [wanted]):
            status = self.refuse or "407 Proxy Authentication Required"
            writer.write(f"HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n".encode())
            await writer.drain()
            return
        method, target, _ = first.split(" ")
        parts = urlsplit(f"//{target}" if method == "CONNECT" else target)
        host = parts.hostname or ""
        there = await asyncio.open_connection(self.names.get(host, host), parts.port or 80)
        ways: list[asyncio.Future[None]] = []
        try:
            await self._pass_on(reader, writer, there, (first, lines), ways)
        finally:
            for way in ways:
                way.cancel()
            there[1].transport.abort()

    async def _pass_on(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        there: tuple[asyncio.StreamReader, asyncio.StreamWriter],
        head: tuple[str, list[str]],
        ways: list[asyncio.Future[None]],
    ) -> None:
        first, lines = head
        method, target, version = first.split(" ")
        parts = urlsplit(target)
        if method == "CONNECT":
            writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
        else:
            kept = [line for line in lines if not line.lower().startswith("proxy-")]
            path = target.partition(f"//{parts.netloc}")[2]
            there[1].write("\r\n".join([f"{method} {path} {version}", *kept]).encode())
        ways += [
            asyncio.ensure_future(self._copy(reader, there[1])),
            asyncio.ensure_future(self._copy(there[0], writer)),
        ]
        await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)

    @staticmethod
    async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while part := await reader.read(65536):
                writer.write(part)
                await writer.drain()

    async def close(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)


@contextlib.asynccontextmanager
async def proxying(proxy: Proxy, tls: ssl.SSLContext | None = None) -> AsyncIterator[Proxy]:
    """Serve a proxy on loopback."""
    server = await asyncio.start_server(proxy.handle, "127.0.0.1", 0, ssl=tls)
    proxy.port = server.sockets[0].getsockname()[1]
    try:
        yield proxy
    finally:
        server.close()
        await proxy.close()
