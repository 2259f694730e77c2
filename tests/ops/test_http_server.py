"""The bounded server of an agent, over real sockets; the probe's tests cover its bounds."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from agent.ops.http_server import BACKLOG, HttpServer, Limits
from agent.schema.addresses import Address

LIMITS = Limits(
    connections=3,
    request_s=1000,
    keep_alive_s=3,
    head_bytes=1024,
    headers=8,
    request_bytes=4096,
    pipelined=1,
    newest_first=True,
)
LIMIT_S = 30
REQUEST = b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"


@asynccontextmanager
async def serving(limits: Limits = LIMITS) -> AsyncIterator[tuple[HttpServer, Address, list[Any]]]:
    transports: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        transports.extend(one.transport for one in server._state.connections)
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body"})

    server = HttpServer("test", limits)
    yield server, await server.start(app, Address("127.0.0.1", 0)), transports
    await server.stop()


async def test_a_new_connection_ends_the_oldest_one() -> None:
    async with serving() as (server, address, _):
        held = [await asyncio.open_connection(*address) for _ in range(3)]
        reader, writer = await asyncio.open_connection(*address)
        writer.write(REQUEST)
        assert (await asyncio.wait_for(reader.read(), LIMIT_S)).startswith(b"HTTP/1.1 204 ")
        assert await asyncio.wait_for(held[0][0].read(), LIMIT_S) == b""
        assert not held[1][0].at_eof()
        assert len(server._connections) <= 3
        for _, other in [*held, (reader, writer)]:
            other.close()


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


async def test_connections_that_come_at_once_are_accepted_one_by_one() -> None:
    """Else a flood keeps the event loop from everything else, and uses up the descriptors."""
    async with serving() as (_, address, _transports):
        await asyncio.sleep(0)
        held = [socket.create_connection(address) for _ in range(BACKLOG // 2)]
        before = descriptors()
        opened = []
        for _ in range(2 * len(held)):
            await asyncio.sleep(0)
            opened.append(descriptors() - before)
        for client in held:
            client.close()
    assert 0 < max(opened) <= 2 * LIMITS.connections


async def test_answers_are_sent_without_delay() -> None:
    async with serving() as (_, address, transports):
        reader, writer = await asyncio.open_connection(*address)
        writer.write(REQUEST)
        await asyncio.wait_for(reader.read(), LIMIT_S)
        (transport,) = transports
        sock = transport.get_extra_info("socket")
        assert sock.proto == socket.IPPROTO_TCP  # asyncio has set TCP_NODELAY
        writer.close()
