"""The bounded server of an agent, over real sockets; the probe's tests cover its bounds."""

import asyncio
import contextlib
import gc
import json
import os
import socket
import ssl
from asyncio.sslproto import SSLProtocol
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from agent.ops.http_connection import Handler, Limits, Request, Response, error_response
from agent.ops.http_server import BACKLOG, HttpServer
from agent.ops.tls import server_context
from agent.schema.addresses import Address
from tests.mosquitto import Authority
from tests.this_process import descriptors, open_files

LIMITS = Limits(
    connections=3,
    request_s=1000,
    keep_alive_s=3,
    head_bytes=1024,
    headers=8,
    body_bytes=1024,
    request_bytes=4096,
    pipelined=1,
)
LIMIT_S = 30
REQUEST = b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"


HEAD = b"Host: localhost\r\n"
LAST = HEAD + b"Connection: close\r\n\r\n"


async def echo(request: Request) -> Response:
    """Answer with what was asked: the method, the path and the body."""
    asked = f"{request.method} {request.path} ".encode()
    return Response(200, asked + (b"too long" if request.body is None else request.body))


@asynccontextmanager
async def serving(
    handler: Handler = echo, **limits: float
) -> AsyncIterator[tuple[HttpServer, Address]]:
    server = HttpServer("test", replace(LIMITS, **limits))  # type: ignore[arg-type] # by name
    yield server, await server.start(handler, Address("127.0.0.1", 0))
    await server.stop()


async def ask(address: Address, *parts: bytes, half_close: bool = False) -> bytes:
    """Send the parts one after another; everything that is answered until the server closes."""
    reader, writer = await asyncio.open_connection(*address)
    for part in parts:
        writer.write(part)
        await writer.drain()
        await asyncio.sleep(0)
    if half_close:
        writer.write_eof()
    async with asyncio.timeout(LIMIT_S):
        answer = await reader.read()
    writer.close()
    return answer


def answers(received: bytes) -> list[tuple[int, bytes]]:
    """The status and the body of each answer; of one to HEAD, which has no body, the rest follows."""
    found = []
    for part in received.split(b"HTTP/1.1 ")[1:]:
        head, _, body = part.partition(b"\r\n\r\n")
        found.append((int(head.split()[0]), body))
    return found


@pytest.mark.parametrize(
    ("sent", "answered"),
    [
        (b"GET /a?b=c HTTP/1.1\r\n" + LAST, [(200, b"GET /a ")]),
        (b"GET http://localhost/%61 HTTP/1.1\r\n" + LAST, [(200, b"GET /a ")]),
        (b"GET /a HTTP/1.0\r\n\r\n", [(200, b"GET /a ")]),
        (b"GET /a HTTP/1.0\r\nConnection: keep-alive\r\n\r\n", [(200, b"GET /a ")]),
        (b"\r\nGET /a HTTP/1.1\r\n" + LAST, [(200, b"GET /a ")]),
        (b"POST /a HTTP/1.1\r\nContent-Length: 2\r\n" + LAST + b"xy", [(200, b"POST /a xy")]),
        (
            b"POST /a HTTP/1.1\r\nTransfer-Encoding: chunked\r\n"
            + LAST
            + b"1\r\nx\r\n1\r\ny\r\n0\r\nTrailer: z\r\n\r\n",
            [(200, b"POST /a xy")],
        ),
        (
            b"HEAD /a HTTP/1.1\r\n" + HEAD + b"\r\nGET /b HTTP/1.1\r\n" + LAST,
            [(200, b""), (200, b"GET /b ")],
        ),
        (
            b"GET /a HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n" + HEAD + b"\r\n",
            [(200, b"GET /a ")],
        ),
    ],
)
@pytest.mark.parametrize("bytewise", [False, True])
async def test_a_request_is_answered_however_it_is_sent(
    sent: bytes, answered: list[tuple[int, bytes]], *, bytewise: bool
) -> None:
    async with serving() as (_, address):
        parts = [bytes([byte]) for byte in sent] if bytewise else [sent]
        assert answers(await ask(address, *parts)) == answered


async def test_nothing_is_answered_after_the_last_request() -> None:
    async with serving() as (_, address):
        request = b"GET /a HTTP/1.1\r\n" + LAST
        assert answers(await ask(address, request + request)) == [(200, b"GET /a ")]


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\r\n\r\n",
        b"GET /a\n\n",
        b"GET /\xff HTTP/1.1\r\n" + LAST,
        b"CONNECT a:443 HTTP/1.1\r\n" + LAST,
        b"POST /a HTTP/1.1\r\nContent-Length: -1\r\n" + LAST,
        b"POST /a HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n" + LAST,
        b"POST /a HTTP/1.1\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n" + LAST,
        b"POST /a HTTP/1.1\r\nTransfer-Encoding: gzip\r\n" + LAST,
        b"POST /a HTTP/1.1\r\nTransfer-Encoding: chunked\r\n" + LAST + b"oops\r\n",
    ],
)
async def test_what_is_not_http_is_refused_after_the_requests_before_it(
    sent: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving() as (_, address):
        first = b"GET /a HTTP/1.1\r\n" + HEAD + b"\r\n"
        assert [status for status, _ in answers(await ask(address, first + sent))] == [200, 400]
    assert caplog.records == []


async def test_a_long_body_is_dropped_and_the_connection_is_kept() -> None:
    post = b"POST /a HTTP/1.1\r\nContent-Length: %d\r\n"
    size = LIMITS.body_bytes + 1
    async with serving() as (_, address):
        kept = post % size + HEAD + b"\r\n" + b"x" * size
        last = post % (size - 1) + LAST + b"x" * (size - 1)
        found = answers(await ask(address, kept, last))
    assert found == [(200, b"POST /a too long"), (200, b"POST /a " + b"x" * (size - 1))]


async def test_a_request_above_its_bound_ends_the_connection() -> None:
    size = LIMITS.request_bytes
    async with serving() as (_, address):
        post = b"POST /a HTTP/1.1\r\nContent-Length: %d\r\n" % size + LAST + b"x" * size
        with contextlib.suppress(ConnectionError):
            assert await ask(address, post) == b""


@pytest.mark.parametrize("expect", [b"100-continue", b"100-Continue"])
async def test_a_client_that_asks_first_may_send_its_body(expect: bytes) -> None:
    async with serving() as (_, address):
        reader, writer = await asyncio.open_connection(*address)
        head = b"POST /a HTTP/1.1\r\nContent-Length: 2\r\nExpect: " + expect + b"\r\n" + LAST
        writer.write(head)
        async with asyncio.timeout(LIMIT_S):
            assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
            writer.write(b"xy")
            assert answers(await reader.read()) == [(200, b"POST /a xy")]
        writer.close()


async def test_http_1_0_gets_no_100() -> None:
    post = b"POST /a HTTP/1.0\r\nContent-Length: 2\r\nExpect: 100-continue\r\n"
    async with serving() as (_, address):
        received = await ask(address, post + HEAD + b"\r\n", b"xy")
    assert answers(received) == [(200, b"POST /a xy")]


async def test_an_error_may_quote_half_a_surrogate_pair() -> None:
    async def refuse(_: Request) -> Response:
        return error_response(400, "this is no name: \ud800")

    async with serving(refuse) as (_, address):
        ((status, body),) = answers(await ask(address, REQUEST))
    assert (status, json.loads(body)) == (400, {"error": "this is no name: \ud800"})


async def test_empty_lines_do_not_hold_a_connection() -> None:
    async with serving(request_s=0.2) as (_, address):
        _, writer = await asyncio.open_connection(*address)
        async with asyncio.timeout(LIMIT_S / 10):
            while not writer.transport.is_closing():  # the server has ended the connection
                writer.write(b"\r\n")
                await asyncio.sleep(0.05)
        writer.close()


async def test_a_client_that_sends_no_more_is_answered() -> None:
    async with serving() as (_, address):
        received = await ask(address, b"GET /a HTTP/1.1\r\n" + HEAD + b"\r\n", half_close=True)
        assert answers(received) == [(200, b"GET /a ")]


async def test_an_exception_is_500_and_the_connection_is_kept(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def fail(_: Request) -> Response:
        raise KeyError("a fault of ours")

    async with serving(fail) as (_, address):
        received = await ask(
            address, b"GET /a HTTP/1.1\r\n" + HEAD + b"\r\n", b"GET /b HTTP/1.1\r\n" + LAST
        )
        assert [status for status, _ in answers(received)] == [500, 500]
    assert [record.getMessage() for record in caplog.records] == ["request failed"] * 2
    assert "a fault of ours" in caplog.text


async def test_an_idle_connection_is_ended() -> None:
    async with serving(keep_alive_s=0.05) as (_, address):
        received = await ask(address, b"GET /a HTTP/1.1\r\n" + HEAD + b"\r\n")
        assert answers(received) == [(200, b"GET /a ")]


async def test_a_client_that_does_not_read_its_answer_is_disconnected() -> None:
    async def send_much(_: Request) -> Response:
        return Response(200, bytes(64 * 1024 * 1024))

    async with serving(send_much, request_s=0.1) as (_, address):
        before = descriptors()
        _, writer = await asyncio.open_connection(*address)
        writer.write(REQUEST)
        async with asyncio.timeout(LIMIT_S):
            while descriptors() < before + 2:  # noqa: ASYNC110 - both ends; it sets no event
                await asyncio.sleep(0.001)
            while descriptors() > before + 1:  # noqa: ASYNC110 - likewise
                await asyncio.sleep(0.001)
        writer.close()


@pytest.mark.parametrize("in_time", [False, True])
async def test_a_stop_waits_a_moment_for_answers(*, in_time: bool) -> None:
    handled, go_on = asyncio.Event(), asyncio.Event()

    async def wait(_: Request) -> Response:
        handled.set()
        await go_on.wait()
        return Response(200, b"fine")

    async with serving(wait) as (server, address):
        asked = asyncio.create_task(ask(address, b"GET /a HTTP/1.1\r\n" + HEAD + b"\r\n"))
        await asyncio.wait_for(handled.wait(), LIMIT_S)
        stopping = asyncio.create_task(server.stop())
        await asyncio.sleep(0)
        if in_time:
            go_on.set()
        await asyncio.wait_for(stopping, LIMIT_S)
        if in_time:
            assert answers(await asked) == [(200, b"fine")]
        else:
            with contextlib.suppress(ConnectionError):
                assert await asked == b""


async def test_a_new_connection_ends_the_oldest_one() -> None:
    async with serving() as (_, address):
        held = [await asyncio.open_connection(*address) for _ in range(3)]
        reader, writer = await asyncio.open_connection(*address)
        writer.write(REQUEST)
        assert (await asyncio.wait_for(reader.read(), LIMIT_S)).startswith(b"HTTP/1.1 200 ")
        assert await asyncio.wait_for(held[0][0].read(), LIMIT_S) == b""
        assert not held[1][0].at_eof()
        for _, other in [*held, (reader, writer)]:
            other.close()


def held_buffers() -> int:
    """How many connections with TLS have their buffers, of 256 KiB each."""
    return sum(isinstance(one, SSLProtocol) for one in gc.get_objects())


async def request_by_tls(address: Address, tls: ssl.SSLContext) -> None:
    reader, writer = await asyncio.open_connection(*address, ssl=tls)
    writer.write(REQUEST)
    await reader.read()
    writer.transport.abort()


async def close_at_once(address: Address, tls: ssl.SSLContext) -> None:
    _, writer = await asyncio.open_connection(*address, ssl=tls)
    writer.close()
    await writer.wait_closed()


async def reset(address: Address, tls: ssl.SSLContext) -> None:
    _, writer = await asyncio.open_connection(*address, ssl=tls)
    writer.transport.abort()


async def send_no_tls(address: Address, _: ssl.SSLContext) -> None:
    reader, writer = await asyncio.open_connection(*address)
    writer.write(REQUEST)
    await reader.read()
    writer.transport.abort()


async def be_replaced(address: Address, tls: ssl.SSLContext) -> None:
    held = [await asyncio.open_connection(*address, ssl=tls) for _ in range(4)]
    assert await held[0][0].read() == b""
    for _, writer in held:
        writer.transport.abort()


@pytest.mark.parametrize(
    "connect", [request_by_tls, close_at_once, reset, send_no_tls, be_replaced]
)
async def test_the_buffers_of_a_connection_are_freed_at_its_end(
    tmp_path: Path, connect: Callable[[Address, ssl.SSLContext], Awaitable[None]]
) -> None:
    """Else connections fill the memory until a garbage collection, which looks at objects and not at their size."""
    authority = Authority(tmp_path)
    trust = ssl.create_default_context(cafile=authority.file)
    async with serving() as (server, address):
        server.tls = server_context("tls", *authority.issue("member"))
        gc.collect()
        before, open_before = held_buffers(), descriptors()
        gc.disable()
        try:
            async with asyncio.timeout(LIMIT_S):
                for _ in range(4):
                    with contextlib.suppress(ConnectionError):
                        await connect(address, trust)
                while descriptors() > open_before:  # noqa: ASYNC110 - what is waited for sets no event
                    await asyncio.sleep(0.001)
                while held_buffers() > before:  # noqa: ASYNC110 - likewise
                    await asyncio.sleep(0.01)
        finally:
            gc.enable()


async def test_connections_that_come_at_once_are_accepted_one_by_one() -> None:
    """Else a flood keeps the event loop from everything else, and uses up the descriptors."""
    async with serving() as (_, address):
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
    delays: list[bool] = []

    async def handle(_: Request) -> Response:
        delays.append(sends_with_delay(client))
        return Response(200, b"")

    async with serving(handle) as (_, address):
        reader, writer = await asyncio.open_connection(*address)
        client = writer.get_extra_info("sockname")
        writer.write(REQUEST)
        await asyncio.wait_for(reader.read(), LIMIT_S)
        writer.close()
    assert delays == [False]


def sends_with_delay(client: tuple[str, int]) -> bool:
    """Whether the server's end of a client's connection waits for more before it sends (Nagle's algorithm)."""
    for number, target in open_files().items():
        if not target.startswith("socket:"):
            continue
        with socket.socket(fileno=os.dup(number)) as end, contextlib.suppress(OSError):
            if end.getpeername() == client:
                return not end.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    raise AssertionError(f"no connection of {client}")


async def test_a_client_that_comes_as_the_server_stops_is_no_failure() -> None:
    """sock_accept() failed in the loop then, which an agent takes for a failure of its own: exit code 38."""
    failures: list[dict[str, object]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, given: failures.append(given))
    async with serving() as (server, address):
        for _ in range(3):
            await asyncio.sleep(0)
        with socket.create_connection(address):
            await asyncio.create_task(server.stop())  # the loop finds both in one turn
    assert failures == []


async def test_others_run_between_two_requests_of_one_connection() -> None:
    """A few connections full of small requests held the loop of an agent for so long that it lost its role."""
    turns: list[int] = [0]
    seen: list[int] = []

    async def turn() -> None:
        while True:
            turns[0] += 1
            await asyncio.sleep(0)

    async def note(_request: Request) -> Response:
        seen.append(turns[0])
        return Response(204, b"")

    async with serving(note, pipelined=8, request_bytes=8192) as (_, address):
        turning = asyncio.create_task(turn())
        await ask(address, (b"GET /a HTTP/1.1\r\n" + HEAD + b"\r\n") * 7 + REQUEST)
        turning.cancel()
    assert len(seen) == 8
    assert len(set(seen)) == 8
