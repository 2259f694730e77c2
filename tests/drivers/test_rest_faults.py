"""Every call of the API against every way in which a server can fail: a ServerError in time, or success.

The servers are real sockets. Whatever a server does, a call neither hangs nor raises anything else, and the
next call to a server that has recovered succeeds.
"""

import asyncio
import json
import socket
import ssl
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from agent.drivers.rest import RestClient
from agent.errors import ExitCode, ServerError
from agent.model import GroupConfig, SessionConfig
from tests.bad_server import PATIENCE_S, Raw, Talk, answer, make_certificate, served

LIMIT_S = 0.3
"""Of a call, and so of each silence."""

LATE_S = 2.0
"""How late a busy machine may be."""

CALLS: dict[str, Callable[[RestClient, float], Awaitable[Any]]] = {
    "ensure_group": lambda client, limit_s: client.ensure_group(
        GroupConfig("g", 20_000_000), timeout_s=limit_s
    ),
    "join": lambda client, limit_s: client.join("g", SessionConfig("s"), timeout_s=limit_s),
    "heartbeat": lambda client, limit_s: client.heartbeat(
        "g", "s", score=100, last_data=None, instance="i", seen_epoch=3, timeout_s=limit_s
    ),
    "status": lambda client, limit_s: client.status("g", timeout_s=limit_s),
    "blocking status": lambda client, limit_s: client.status(
        "g", after=3, wait_s=0.0, timeout_s=limit_s
    ),
    "release": lambda client, limit_s: client.release(
        "g", "s", epoch=3, instance="i", reason="stopping", timeout_s=limit_s
    ),
    "leave": lambda client, limit_s: client.leave("g", "s", timeout_s=limit_s),
}

GOOD = {"Id": "g", "Role": 0, "Revision": 3}
"""An answer that every call can read."""

PROBLEM = {"type": "about:blank", "title": "No luck", "status": 418, "detail": "Come again."}
BODIES = {
    "html": (b"<html>sorry</html>", "text/html"),
    "empty": (b"", "text/plain"),
    "problem": (json.dumps(PROBLEM).encode(), "application/problem+json; charset=utf-8"),
    "odd problem": (b'{"title": 1, "detail": [{}]}', "application/problem+json"),
    "broken problem": (b'{"title": ', "application/problem+json"),
    "ErrorResponse": (b'{"OperationId": "1", "Reason": "No.", "Resolution": "Wait."}', "text/json"),
    "odd ErrorResponse": (b'{"Error": {"a": [1]}, "Reason": 7}', "application/json"),
    "surrogates": (b'{"Reason": "\\ud800"}', "application/json"),
}
STATUSES = (
    "200 OK",
    "300 Multiple Choices",
    "400 Bad Request",
    "401 Unauthorized",
    "404 Not Found",
    "409 Conflict",
    "429 Too Many Requests",
    "500 Internal Server Error",
    "502 Bad Gateway",
    "503 Service Unavailable",
    "999 Whatever",
)


def closes_with_reset(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    linger = b"\x01\x00\x00\x00\x00\x00\x00\x00"  # on, 0 s: close sends a reset
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    writer.transport.abort()
    assert reader is not None


async def resets_at_once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    closes_with_reset(reader, writer)


async def is_silent(reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
    await reader.read()


def resets_after(raw: Raw, first: bytes) -> Talk:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await raw.request(reader)
        writer.write(first)
        await writer.drain()
        closes_with_reset(reader, writer)

    return talk


def repeats(raw: Raw, first: bytes, part: bytes, every_s: float) -> Talk:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await raw.request(reader)
        writer.write(first)
        while not writer.is_closing():
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(every_s)

    return talk


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
WHOLE = json.dumps(GOOD).encode()
TALKS: dict[str, Callable[[Raw], Talk]] = {
    "reset at once": lambda _: resets_at_once,
    "silent": lambda _: is_silent,
    "reset after the request": lambda raw: resets_after(raw, b""),
    "reset in the head": lambda raw: resets_after(raw, b"HTTP/1.1 200 O"),
    "reset in the body": lambda raw: resets_after(raw, HEAD + b"Content-Length: 99\r\n\r\n{"),
    "closed after the request": lambda raw: raw.says(),
    "closed in the head": lambda raw: raw.says(b"HTTP/1.1 200 OK\r\nConte"),
    "closed in the body": lambda raw: raw.says(HEAD + b'Content-Length: 99\r\n\r\n{"Id"'),
    "silent in the head": lambda raw: raw.says(b"HTTP/1.1 200 OK\r\nConte", then="wait"),
    "silent in the body": lambda raw: raw.says(HEAD + b"Content-Length: 99\r\n\r\n{", then="wait"),
    "length too short": lambda raw: raw.says(HEAD + b"Content-Length: 5\r\n\r\n" + WHOLE),
    "length is no number": lambda raw: raw.says(HEAD + b"Content-Length: x\r\n\r\n" + WHOLE),
    "two lengths": lambda raw: raw.says(
        HEAD + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n" + WHOLE
    ),
    "length is negative": lambda raw: raw.says(HEAD + b"Content-Length: -1\r\n\r\n" + WHOLE),
    "chunks are garbage": lambda raw: raw.says(
        HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n" + WHOLE
    ),
    "chunks do not end": lambda raw: raw.says(HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\n{"),
    "header without a colon": lambda raw: raw.says(HEAD + b"nonsense\r\n\r\n" + WHOLE),
    "header of 1 MiB": lambda raw: raw.says(HEAD + b"A: " + b"a" * 2**20 + b"\r\n\r\n" + WHOLE),
    "header is not text": lambda raw: raw.says(HEAD + b"A: \xff\x00\r\n\r\n" + WHOLE),
    "garbage": lambda raw: raw.says(bytes(range(256)) * 8, then="wait"),
    "garbage like HTTP": lambda raw: raw.says(b"HTTP/1.1 abc\r\n\r\n", then="wait"),
    "HTTP/2": lambda raw: raw.says(b"\x00\x00\x12\x04\x00\x00\x00\x00\x00", then="wait"),
    "trickle of the head": lambda raw: repeats(raw, b"HTTP/1.1 200 OK\r\nA: ", b"a", 0.01),
    "trickle of the body": lambda raw: repeats(
        raw, HEAD + b"Content-Length: 999999\r\n\r\n", b" ", 0.01
    ),
    "endless continues": lambda raw: repeats(raw, b"", b"HTTP/1.1 100 Continue\r\n\r\n", 0.0),
    "switching protocols": lambda raw: raw.says(
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n", then="wait"
    ),
    "no content with content": lambda raw: raw.says(b"HTTP/1.1 204 No Content\r\n\r\n" + WHOLE),
    "two answers": lambda raw: raw.says((HEAD + b"Content-Length: 2\r\n\r\n{}") * 2),
    "redirect to itself": lambda raw: raw.says(
        b"HTTP/1.1 307 No\r\nLocation: "
        + raw.endpoint().encode()
        + b"\r\nContent-Length: 0\r\n\r\n"
    ),
    "a cookie of 1 KiB": lambda raw: raw.says(
        b"HTTP/1.1 503 No\r\nSet-Cookie: a=" + b"b" * 1024 + b"\r\nContent-Length: 0\r\n\r\n"
    ),
} | {
    f"{status} {name}": lambda raw, status=status, body=body: raw.says(
        answer(body[0], status, body[1])
    )
    for status in STATUSES
    for name, body in BODIES.items()
}


async def outcomes(client: RestClient) -> dict[str, ServerError | None]:
    """What each call ends by; no other exception, and none takes longer than its limit."""
    ended: dict[str, ServerError | None] = {}
    for name, call in CALLS.items():
        began = time.monotonic()
        try:
            await call(client, LIMIT_S)
        except ServerError as error:
            ended[name] = error
        else:
            ended[name] = None
        assert time.monotonic() - began < LIMIT_S + LATE_S, name
    messages = [str(error) for error in ended.values() if error is not None]
    assert all("\n" not in message and len(message) < 1000 for message in messages)
    return ended


@pytest.mark.parametrize("fault", TALKS)
async def test_a_call_to_a_server_that_misbehaves_ends_by_an_error_of_the_server(
    fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Fault 11: call x fault."""
    async with served() as raw:
        client = RestClient([raw.endpoint()])
        raw.talk = TALKS[fault](raw)
        ended = await outcomes(client)
        raw.talk = raw.answers(GOOD)
        for call in CALLS.values():
            await call(client, PATIENCE_S)
        await client.aclose()
    if fault not in {"no content with content", "two answers", "length too short"}:
        assert ended["heartbeat"] is not None
    assert "unexpected" not in caplog.text


async def test_a_refused_connection_ends_every_call() -> None:
    with socket.socket() as taken:  # bound but not listening
        taken.bind(("127.0.0.1", 0))
        client = RestClient([f"http://127.0.0.1:{taken.getsockname()[1]}/clientfailover"])
        ended = await outcomes(client)
        await client.aclose()
    assert {error.exit_code for error in ended.values() if error} == {ExitCode.UNREACHABLE}
    assert None not in ended.values()


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_a_server_that_wants_a_client_certificate_is_unreachable(
    version: ssl.TLSVersion, tmp_path: Path
) -> None:
    """Fault 11: with TLS 1.3 the alert comes behind the handshake, as ssl.SSLError on the first read."""
    asyncio.get_running_loop().set_exception_handler(lambda *_: None)  # the server's view
    certificate = make_certificate(tmp_path)
    wanting = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    wanting.load_cert_chain(certificate)
    wanting.load_verify_locations(certificate)
    wanting.verify_mode = ssl.CERT_REQUIRED
    wanting.maximum_version = version
    async with served(tls=wanting) as raw:
        raw.talk = raw.answers(GOOD)
        trusting = ssl.create_default_context(cafile=certificate)
        client = RestClient([raw.endpoint("https")], verify=trusting)
        ended = await outcomes(client)
        await client.aclose()
    assert None not in ended.values()
    codes = {error.exit_code for error in ended.values() if error}
    assert codes <= {ExitCode.UNREACHABLE, ExitCode.NO_ANSWER}  # the alert may get lost in a reset


async def test_an_exception_that_nobody_knows_of_is_an_error_of_the_server_and_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    client = RestClient(["http://127.0.0.1:9/clientfailover"])

    async def fails(*_args: Any, **_options: Any) -> None:
        raise ExceptionGroup("odd", [KeyError("odd")])

    monkeypatch.setattr(client._connections.call, "send", fails)
    with pytest.raises(ServerError, match="ExceptionGroup"):
        await CALLS["heartbeat"](client, LIMIT_S)
    await client.aclose()
    (record,) = caplog.records
    assert record.message == "request failed in an unexpected way"


async def test_cancellation_is_not_swallowed_wherever_a_call_is() -> None:
    async with served() as raw:
        client = RestClient([raw.endpoint()])
        for talk in (is_silent, TALKS["trickle of the body"](raw), TALKS["endless continues"](raw)):
            raw.talk = talk
            for name, call in CALLS.items():
                task = asyncio.ensure_future(call(client, PATIENCE_S))
                await asyncio.sleep(0.01)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                assert task.cancelled(), name
        raw.talk = raw.answers(GOOD)
        await CALLS["heartbeat"](client, PATIENCE_S)
        await client.aclose()


async def test_the_text_of_a_problem_is_in_the_error() -> None:
    async with served() as raw:
        client = RestClient([raw.endpoint()])
        raw.talk = TALKS["404 Not Found problem"](raw)
        with pytest.raises(ServerError, match=r"No luck: Come again\.") as caught:
            await CALLS["heartbeat"](client, PATIENCE_S)
        await client.aclose()
    assert caught.value.status == 404
