"""The client of the group API against servers that behave well, and in every bad way we know of."""

import asyncio
import contextlib
import datetime as dt
import errno
import gc
import json
import os
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from agent import __version__
from agent.drivers.rest import ClientCredentials, RestClient
from agent.drivers.rest.connections import LONGEST_ANSWER
from agent.drivers.rest.endpoints import BLOCKING_READ_CONNECTIONS
from agent.drivers.rest.exchange import LONGEST_RETRY_AFTER_S, retry_after_s
from agent.errors import ConfigError, ExitCode, ServerError
from agent.model import GroupConfig, Role, SessionConfig
from tests.bad_server import BASE, PATIENCE_S, Raw, Talk, answer, make_certificate, served, until

ENDPOINT = f"http://coordinator.test{BASE}"
BEAT = {"Role": 1, "Epoch": 7, "LeaseDuration": "00:00:02", "Revision": 3}
REFUSAL = {"OperationId": "1", "Error": "Not found", "Reason": "No such.", "Resolution": "Make it."}


@contextlib.asynccontextmanager
async def client_of(*endpoints: str, **options: Any) -> AsyncIterator[RestClient]:
    client = RestClient(endpoints or [ENDPOINT], **options)
    try:
        yield client
    finally:
        await client.aclose()


def mocked(handler: Callable[[httpx2.Request], httpx2.Response]) -> dict[str, Any]:
    return {"transport": httpx2.MockTransport(handler)}


@contextlib.contextmanager
def silent(address: str = "127.0.0.1", port: int = 0) -> Iterator[int]:
    """A port at which connections hang: its queue is full and nobody accepts."""
    with socket.socket() as listening:
        listening.bind((address, port))
        listening.listen(0)
        port = listening.getsockname()[1]
        with contextlib.ExitStack() as stack:
            for _ in range(4):
                waiting = stack.enter_context(socket.socket())
                waiting.setblocking(False)
                waiting.connect_ex((address, port))
            yield port


def established(port: int) -> bool:
    """Whether a connection to the port has not been closed by the server yet: proc_net_tcp(5), state 1."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return any(row[2].endswith(f":{port:04X}") and row[3] == "01" for row in rows)


async def beat(client: RestClient, timeout_s: float = PATIENCE_S) -> Any:
    return await client.heartbeat(
        "g",
        "s",
        score=100,
        last_data=None,
        instance="i",
        seen_epoch=None,
        timeout_s=timeout_s,
    )


async def failure(client: RestClient, timeout_s: float = PATIENCE_S) -> ServerError:
    with pytest.raises(ServerError) as caught:
        await beat(client, timeout_s)
    message = str(caught.value)
    assert "\n" not in message
    assert any(f": {endpoint}/groups/g/" in message for endpoint in client.endpoints)
    return caught.value


async def raw_failure(talk: Callable[[Raw], Talk], timeout_s: float = PATIENCE_S) -> ServerError:
    async with served() as raw, client_of(raw.endpoint()) as client:
        raw.talk = talk(raw)
        return await failure(client, timeout_s)


# --- what is sent and read ------------------------------------------------------------------------


async def test_a_heartbeat_sends_what_is_known_and_reads_the_answer() -> None:
    async with served() as raw, client_of(raw.endpoint()) as client:
        raw.talk = raw.answers(BEAT)
        told = await client.heartbeat(
            "g 1",
            "s/2",
            score=50.0,
            last_data=dt.datetime(2026, 1, 2, 3, 4, 5, tzinfo=dt.UTC),
            instance="i",
            seen_epoch=6,
            timeout_s=PATIENCE_S,
        )
    assert (told.role, told.epoch, told.lease_s, told.revision) == (Role.PRIMARY, 7, 2.0, 3)
    head, body = raw.seen[0].split(b"\r\n\r\n")
    assert head.startswith(
        f"POST {BASE}/groups/g%201/clientsessions/s%2F2/heartbeat HTTP/1.1".encode()
    )
    assert f"user-agent: failover-agent/{__version__}".encode() in head.lower()
    assert b"\r\ncontent-type: application/json" in head.lower()
    assert json.loads(body) == {
        "FailoverScore": 50.0,
        "LastDataProcessedTime": "2026-01-02T03:04:05Z",
        "Instance": "i",
        "Epoch": 6,
    }


async def test_head_and_body_are_sent_together() -> None:
    """Two packets of a heartbeat are twice the work for the agent, the network and the coordinator."""
    received: list[bytes] = []

    class Server(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            assert isinstance(transport, asyncio.Transport)
            self.transport = transport

        def data_received(self, data: bytes) -> None:
            received.append(data)
            self.transport.write(answer(json.dumps(BEAT).encode()))

    listener = await asyncio.get_running_loop().create_server(Server, "127.0.0.1", 0)
    port = listener.sockets[0].getsockname()[1]
    async with client_of(f"http://127.0.0.1:{port}{BASE}") as client:
        await beat(client)
        await beat(client)
    listener.close()
    await listener.wait_closed()
    assert len(received) == 2
    assert all(data.startswith(b"POST ") and data.endswith(b'"i"}') for data in received), received


async def test_two_heartbeats_use_one_connection() -> None:
    async with served() as raw, client_of(raw.endpoint()) as client:
        raw.talk = raw.answers(BEAT)
        await beat(client)
        await beat(client)
    assert (raw.accepted, len(raw.seen)) == (1, 2)


async def test_a_plain_v1_heartbeat_answer_is_enough() -> None:
    async with client_of(
        **mocked(lambda _: httpx2.Response(200, json={"Role": "Secondary"}))
    ) as client:
        told = await beat(client)
    assert (told.role, told.epoch, told.lease_s) == (Role.SECONDARY, None, None)


async def test_a_wait_is_sent_only_together_with_a_revision_to_wait_for() -> None:
    asked = []

    def handler(request: httpx2.Request) -> httpx2.Response:
        asked.append(dict(request.url.params))
        return httpx2.Response(200, json={})

    async with client_of(**mocked(handler)) as client:
        status = await client.status("g", wait_s=5.0, timeout_s=PATIENCE_S)
        await client.status("g", after=4, wait_s=1.5, timeout_s=PATIENCE_S)
    assert asked == [{}, {"after": "4", "wait": "00:00:01.5000000"}]
    assert (status.primary, status.revision) == (None, None)


async def test_a_group_is_created_with_only_what_is_set() -> None:
    asked = []

    def handler(request: httpx2.Request) -> httpx2.Response:
        asked.append((request.method, request.url.path, json.loads(request.content)))
        return httpx2.Response(201, content=request.content)

    async with client_of(**mocked(handler)) as client:
        made = await client.ensure_group(GroupConfig("g", 20_000_000), timeout_s=PATIENCE_S)
    assert asked == [("POST", f"{BASE}/groups/", {"Id": "g", "FailoverTimeout": "00:00:02"})]
    assert made == GroupConfig("g", 20_000_000)


async def test_the_timeout_of_a_group_that_is_there_is_adopted() -> None:
    def handler(request: httpx2.Request) -> httpx2.Response:
        if request.method == "POST":
            return httpx2.Response(409, json=REFUSAL)
        return httpx2.Response(200, json={"Id": "g", "FailoverTimeout": "00:01:00"})

    async with client_of(**mocked(handler)) as client:
        there = await client.ensure_group(GroupConfig("g", 20_000_000), timeout_s=PATIENCE_S)
    assert there.lease_s == 60.0


async def test_making_and_reading_a_group_share_one_time_limit() -> None:
    limits = []

    async def handler(request: httpx2.Request) -> httpx2.Response:
        limits.append(request.extensions["timeout"]["read"])
        await asyncio.sleep(0.05)  # what the first request takes of the limit of both
        if request.method == "POST":
            return httpx2.Response(409, json=REFUSAL)
        return httpx2.Response(200, json={"Id": "g"})

    async with client_of(transport=httpx2.MockTransport(handler)) as client:
        await client.ensure_group(GroupConfig("g", 20_000_000), timeout_s=PATIENCE_S)
    assert limits[0] == PATIENCE_S
    assert 0 < limits[1] <= PATIENCE_S - 0.05


async def test_joining_and_release_and_leaving_send_what_the_api_names() -> None:
    asked = []

    def handler(request: httpx2.Request) -> httpx2.Response:
        body = json.loads(request.content) if request.content else None
        asked.append((request.method, request.url.path.removeprefix(f"{BASE}/groups/g/"), body))
        return httpx2.Response(201, json={"Id": "s"}) if len(asked) == 1 else httpx2.Response(204)

    async with client_of(**mocked(handler)) as client:
        assert await client.join("g", SessionConfig("s", "Name"), timeout_s=PATIENCE_S) is None
        await client.release(
            "g",
            "s",
            epoch=3,
            instance="i",
            reason="stopping",
            hold_off_s=2.0,
            timeout_s=PATIENCE_S,
        )
        await client.leave("g", "s", timeout_s=PATIENCE_S)
    released = {"Epoch": 3, "Instance": "i", "HoldOffPeriod": "00:00:02", "Reason": "stopping"}
    assert asked == [
        ("POST", "clientsessions", {"Id": "s", "Name": "Name"}),
        ("POST", "clientsessions/s/release", released),
        ("DELETE", "clientsessions/s", None),
    ]


async def test_leaving_succeeds_if_the_session_is_gone() -> None:
    async with client_of(**mocked(lambda _: httpx2.Response(404, json=REFUSAL))) as client:
        await client.leave("g", "s", timeout_s=PATIENCE_S)


async def test_leaving_fails_if_a_web_server_knows_no_such_page() -> None:
    async with client_of(**mocked(lambda _: httpx2.Response(404, html="<p>no"))) as client:
        with pytest.raises(ServerError) as caught:
            await client.leave("g", "s", timeout_s=PATIENCE_S)
    assert caught.value.exit_code is ExitCode.NOT_THE_API


def pages(total: int, *, counted: bool, obeys_skip: bool = True) -> tuple[list[int], Any]:
    asked: list[int] = []

    def handler(request: httpx2.Request) -> httpx2.Response:
        skip, count = (int(request.url.params[name]) for name in ("skip", "count"))
        asked.append(skip)
        first = skip if obeys_skip else 0
        body = [{"Id": f"g{n}"} for n in range(first, min(total, first + count))]
        headers = {"Total-Count": str(total)} if counted else {}
        return httpx2.Response(200, json=body, headers=headers)

    return asked, handler


@pytest.mark.parametrize(
    ("total", "counted", "obeys_skip", "skips"),
    [
        (0, True, True, [0]),
        (100, True, True, [0]),
        (250, True, True, [0, 100, 200]),
        (200, False, True, [0, 100, 200]),
        (100, False, False, [0, 100]),
    ],
)
async def test_groups_are_read_page_by_page_until_there_are_no_more(
    *, total: int, counted: bool, obeys_skip: bool, skips: list[int]
) -> None:
    asked, handler = pages(total, counted=counted, obeys_skip=obeys_skip)
    async with client_of(**mocked(handler)) as client:
        groups = await client.groups(timeout_s=PATIENCE_S)
    assert [group.id for group in groups] == [f"g{n}" for n in range(total)]
    assert asked == skips


async def test_version_sessions_and_history_are_read_and_a_group_is_deleted() -> None:
    answers: dict[str, Any] = {
        BASE: {"Version": "1.0"},
        f"{BASE}/groups/g/clientsessions": [{"Id": "s", "Role": 1}],
        f"{BASE}/groups/g/history": [
            {"Epoch": 1, "SessionId": "s", "Since": "2026-01-01T00:00:00Z", "WhyStarted": "sole"}
        ],
    }

    def handler(request: httpx2.Request) -> httpx2.Response:
        if request.method == "DELETE":
            return httpx2.Response(204)
        return httpx2.Response(200, json=answers[request.url.path])

    async with client_of(**mocked(handler)) as client:
        assert await client.version(timeout_s=PATIENCE_S) == "1.0"
        (session,) = await client.sessions("g", timeout_s=PATIENCE_S)
        (entry,) = await client.history("g", timeout_s=PATIENCE_S)
        await client.delete_group("g", timeout_s=PATIENCE_S)
    assert (session.record.config.id, session.role) == ("s", Role.PRIMARY)
    assert (entry.epoch, entry.why_started) == (1, "sole")


# --- servers that fail ----------------------------------------------------------------------------


async def test_a_refused_connection_is_unreachable() -> None:
    with socket.socket() as taken:  # bound but not listening
        taken.bind(("127.0.0.1", 0))
        async with client_of(f"http://127.0.0.1:{taken.getsockname()[1]}{BASE}") as client:
            error = await failure(client)
    assert error.exit_code is ExitCode.UNREACHABLE
    assert os.strerror(errno.ECONNREFUSED) in str(error)


@pytest.mark.parametrize(
    "words",
    [
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"-ERR unknown command\r\n",
        b"\x15\x03\x01\x00\x02",
        b"HTTP?\r\n\r\n",
    ],
)
async def test_a_server_that_speaks_something_else_is_not_http_at_once(words: bytes) -> None:
    error = await raw_failure(lambda raw: raw.says(words, then="wait"))
    assert error.exit_code is ExitCode.NOT_HTTP


@pytest.mark.parametrize(
    "page",
    [
        answer(b"<html>hello\nworld</html>", kind="text/html"),
        answer(b"[]"),
        answer(b"{}"),
        answer(b'"Role"'),
        answer(b'{"Role": 9}'),
        answer(b""),
        answer(b"\xff\xfe"),
        answer(b"[" * 100_000),
        answer(b"<html>go", "404 Not Found", "text/html"),
        answer(b'{"detail":"Not Found"}', "404 Not Found"),
        answer(b"", "404 Not Found"),
        answer(b"bad", "400 Bad Request", "text/plain"),
        answer(b"", "304 Not Modified"),
    ],
)
async def test_what_is_not_an_answer_of_the_api_is_not_the_api(page: bytes) -> None:
    error = await raw_failure(lambda raw: raw.says(page))
    assert (error.exit_code, error.status) == (ExitCode.NOT_THE_API, None)
    assert "clientfailover" in str(error)


@pytest.mark.parametrize("body", [{"hello": 1}, {"Name": "no id"}, {"Id": ""}])
async def test_a_group_without_an_id_is_not_the_api(body: Any) -> None:
    async with client_of(**mocked(lambda _: httpx2.Response(200, json=body))) as client:
        with pytest.raises(ServerError) as caught:
            await client.group("g", timeout_s=PATIENCE_S)
    assert caught.value.exit_code is ExitCode.NOT_THE_API


async def test_a_status_of_none_of_the_known_properties_is_not_the_api() -> None:
    async with client_of(**mocked(lambda _: httpx2.Response(200, json={"ok": True}))) as client:
        with pytest.raises(ServerError) as caught:
            await client.status("g", timeout_s=PATIENCE_S)
    assert caught.value.exit_code is ExitCode.NOT_THE_API


async def test_a_missing_session_of_a_real_api_has_status_404_and_its_reason() -> None:
    body = json.dumps(REFUSAL).encode()
    error = await raw_failure(lambda raw: raw.says(answer(body, "404 Not Found")))
    assert (error.exit_code, error.status) == (ExitCode.REFUSED, 404)
    assert "No such. Make it." in str(error)


async def test_an_operation_id_marks_an_empty_answer_as_the_apis() -> None:
    head = b"HTTP/1.1 404 Not Found\r\nOperation-Id: 1\r\nContent-Length: 0\r\n\r\n"
    assert (await raw_failure(lambda raw: raw.says(head))).status == 404


@pytest.mark.parametrize(
    "half",
    [
        b'HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\n{"Role": ',
        b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\n",
        b'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{"Rol\r\n',
        b'HTTP/1.1 200 OK\r\n\r\n{"Role": ',
        b'HTTP/1.1 404 Not Found\r\nContent-Length: 50\r\n\r\n{"Reason": ',
    ],
)
async def test_an_answer_that_ends_in_the_middle_is_half_a_body(half: bytes) -> None:
    error = await raw_failure(lambda raw: raw.says(half))
    assert error.exit_code is ExitCode.HALF_BODY


async def test_a_connection_that_is_reset_in_the_middle_is_half_a_body() -> None:
    def talk_of(raw: Raw) -> Talk:
        async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await raw.request(reader)
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\n{")
            await writer.drain()
            linger = b"\x01\x00\x00\x00\x00\x00\x00\x00"  # on, 0 s: close sends a reset
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            writer.transport.abort()

        return talk

    error = await raw_failure(talk_of)
    assert error.exit_code in {ExitCode.HALF_BODY, ExitCode.NO_ANSWER}  # a reset may drop the head


@pytest.mark.parametrize("first", [b"", b"HTTP/1.1 200 OK\r\nContent-"])
async def test_a_connection_closed_before_an_answer_is_no_answer(first: bytes) -> None:
    error = await raw_failure(lambda raw: raw.says(first))
    assert error.exit_code is ExitCode.NO_ANSWER
    assert "closed the connection" in str(error)


async def test_a_connection_closed_before_the_request_is_no_answer() -> None:
    async def talk(_reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
        return

    assert (await raw_failure(lambda _: talk)).exit_code is ExitCode.NO_ANSWER


@pytest.mark.parametrize("first", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\n{"])
async def test_a_server_that_falls_silent_is_no_answer_after_the_time_limit(first: bytes) -> None:
    error = await raw_failure(lambda raw: raw.says(first, then="wait"), timeout_s=0.1)
    assert error.exit_code is ExitCode.NO_ANSWER
    assert "0.1 s" in str(error)


async def test_a_slow_drip_is_cut_at_the_time_limit_of_the_whole_call() -> None:
    def talk_of(raw: Raw) -> Talk:
        async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await raw.request(reader)
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
            while not writer.is_closing():
                writer.write(b" ")
                await writer.drain()
                await asyncio.sleep(0.01)

        return talk

    async with asyncio.timeout(PATIENCE_S):
        error = await raw_failure(talk_of, timeout_s=0.2)
    assert error.exit_code is ExitCode.NO_ANSWER


@pytest.mark.parametrize(
    "head",
    [
        b"HTTP/1.1 200 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 999999999999\r\n\r\n",
        b"HTTP/1.1 401 Unauthorized\r\n\r\n",
    ],
)
async def test_an_endless_answer_is_cut_at_its_bound(head: bytes) -> None:
    sent = 0

    def talk_of(raw: Raw) -> Talk:
        async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal sent
            await raw.request(reader)
            writer.write(head)
            while True:
                writer.write(b"x" * 65536)
                await writer.drain()
                sent += 65536

        return talk

    error = await raw_failure(talk_of)
    assert (error.exit_code, error.status) == (ExitCode.NOT_THE_API, None)
    assert sent < LONGEST_ANSWER + 16 * 1024 * 1024  # what the kernel's buffers hold


async def test_a_compressed_answer_is_not_unpacked() -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 3\r\n\r\nxxx"
    assert (await raw_failure(lambda raw: raw.says(head))).exit_code is ExitCode.NOT_THE_API


@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_an_answer_that_came_before_its_request_does_not_count(
    scheme: str, server_tls: ssl.SSLContext, certificate: Path
) -> None:
    """R3: it may be of any age, and the lease is counted from the sending of the request."""
    tls = server_tls if scheme == "https" else None
    trusting = ssl.create_default_context(cafile=certificate)
    async with (
        served(tls=tls) as raw,
        client_of(raw.endpoint(scheme), verify=trusting) as client,
    ):

        async def answers_twice(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await raw.request(reader)
            for _ in range(2):
                writer.write(answer(json.dumps(BEAT).encode()))
            await reader.read()

        raw.talk = answers_twice
        assert (await beat(client)).role is Role.PRIMARY
        error = await failure(client)
        assert error.exit_code is ExitCode.NO_ANSWER
        assert "answers another request" in str(error)
        assert len(raw.seen) == 1
        assert (await beat(client)).role is Role.PRIMARY  # on another connection


async def test_the_answer_to_another_request_does_not_count() -> None:
    """R3: each request has a number, and what answers with another one is not believed, whatever it is."""
    async with served() as raw, client_of(raw.endpoint()) as client:
        numbers: list[bytes] = []

        async def answers_the_one_before(
            reader: asyncio.StreamReader, writer: asyncio.StreamWriter
        ) -> None:
            while True:
                lines = (await raw.request(reader)).split(b"\r\n")
                numbers.append(next(line for line in lines if line.startswith(b"failover-request")))
                head, body = answer(json.dumps(BEAT).encode()).split(b"\r\n\r\n")
                writer.write(head + b"\r\n" + numbers[-2:][0] + b"\r\n\r\n" + body)

        raw.talk = answers_the_one_before
        assert (await beat(client)).role is Role.PRIMARY
        error = await failure(client)
        assert (error.exit_code, error.status) == (ExitCode.NO_ANSWER, None)
        assert "answers another request" in str(error)
        await failure(client)
        assert raw.accepted == 2, "a connection is closed after such an answer"
        assert len(set(numbers)) == 3


async def test_a_number_that_is_repeated_twice_is_still_that_of_the_request() -> None:
    """By two servers on the way, or because a proxy has sent the header twice."""
    async with served() as raw, client_of(raw.endpoint()) as client:

        async def repeats(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            lines = (await raw.request(reader)).split(b"\r\n")
            number = next(line for line in lines if line.startswith(b"failover-request"))
            head, body = answer(json.dumps(BEAT).encode()).split(b"\r\n\r\n")
            writer.write(b"\r\n".join([head, number, number, b"", body]))

        raw.talk = repeats
        assert (await beat(client)).role is Role.PRIMARY


async def test_a_redirect_is_named_and_not_followed() -> None:
    head = b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:9/login\r\nContent-Length: 0\r\n\r\n"
    error = await raw_failure(lambda raw: raw.says(head))
    assert (error.exit_code, error.status) == (ExitCode.NOT_THE_API, None)
    assert "http://127.0.0.1:9/login" in str(error)


@pytest.mark.parametrize("status", [401, 403])
async def test_a_refused_caller_is_not_authorised(status: int) -> None:
    async with client_of(**mocked(lambda _: httpx2.Response(status, html="<p>no"))) as client:
        error = await failure(client)
    assert (error.exit_code, error.status) == (ExitCode.NOT_AUTHORISED, status)


@pytest.mark.parametrize("status", [500, 502, 503])
async def test_an_error_of_the_server_keeps_its_status_and_retry_after(
    status: int,
) -> None:
    def handler(_request: httpx2.Request) -> httpx2.Response:
        return httpx2.Response(status, html="<p>sorry", headers={"Retry-After": "3"})

    async with client_of(**mocked(handler)) as client:
        error = await failure(client)
    assert (error.exit_code, error.status, error.retry_after_s) == (ExitCode.REFUSED, status, 3.0)


DATE = "Sun, 22 Nov 2026 08:00:00 GMT"


@pytest.mark.parametrize(
    ("value", "date", "seconds"),
    [
        ("7", None, 7.0),
        ("0.25", None, 0.25),
        ("86400", None, LONGEST_RETRY_AFTER_S),
        ("Sun, 22 Nov 2026 08:00:09 GMT", DATE, 9.0),
        ("Sun, 22 Nov 2026 07:00:00 GMT", DATE, 0.0),
        ("Sun, 22 Nov 2099 08:00:09 GMT", DATE, LONGEST_RETRY_AFTER_S),
        ("Sun, 22 Nov 2099 08:00:09 GMT", None, LONGEST_RETRY_AFTER_S),
        ("soon", None, None),
        ("-5", None, None),
        ("inf", None, None),
        ("9" * 5000, None, None),
        ("Sun, 99 Nov 2026 08:00:00 GMT", DATE, None),
        ("", None, None),
        (None, None, None),
    ],
)
def test_retry_after_is_read_in_both_forms_and_bounded(
    value: str | None, date: str | None, seconds: float | None
) -> None:
    given = {"Retry-After": value, "Date": date}
    headers = httpx2.Headers({name: text for name, text in given.items() if text is not None})
    assert retry_after_s(headers) == seconds


@pytest.mark.parametrize(
    ("milliseconds", "seconds"),
    [("150", 0.15), ("0", 0.0), ("999999999", LONGEST_RETRY_AFTER_S), ("1.5", 1.0), ("x", 1.0)],
)
def test_retry_after_ms_is_preferred_to_whole_seconds(milliseconds: str, seconds: float) -> None:
    headers = httpx2.Headers({"Retry-After": "1", "Retry-After-Ms": milliseconds})
    assert retry_after_s(headers) == seconds


@pytest.mark.parametrize("value", ["2", "Sun, 22 Nov 2026 08:00:02 GMT"])
async def test_too_many_requests_carry_the_time_to_wait(value: str) -> None:
    head = f"HTTP/1.1 429 Slow\r\nDate: {DATE}\r\nRetry-After: {value}\r\nContent-Length: 0\r\n\r\n"
    error = await raw_failure(lambda raw: raw.says(head.encode()))
    assert (error.status, error.retry_after_s) == (429, 2.0)
    assert error.exit_code is ExitCode.NOT_THE_API
    assert "proxy" in str(error)


async def test_too_many_requests_of_the_api_itself_are_a_refusal() -> None:
    async with client_of(**mocked(lambda _: httpx2.Response(429, json=REFUSAL))) as client:
        error = await failure(client)
    assert (error.exit_code, error.status) == (ExitCode.REFUSED, 429)


async def test_a_servers_words_are_cut_and_kept_on_one_line() -> None:
    refusal = {"Reason": "a\r\n\x1b[31mb" + "c" * 10_000, "Resolution": "d"}
    async with client_of(**mocked(lambda _: httpx2.Response(400, json=refusal))) as client:
        error = await failure(client)
    assert "a [31mbccc" in str(error)
    assert len(str(error)) < 600


# --- TLS ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_certificate(tmp_path_factory.mktemp("tls"))


@pytest.fixture
def server_tls(certificate: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    return context


async def test_an_unknown_ca_is_unreachable_with_the_reason(server_tls: ssl.SSLContext) -> None:
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda *_: None)  # the server's view of the broken handshake
    async with served(tls=server_tls) as raw, client_of(raw.endpoint("https")) as client:
        raw.talk = raw.answers(BEAT)
        error = await failure(client)
    assert error.exit_code is ExitCode.UNREACHABLE
    assert "certificate is not trusted: self-signed certificate" in str(error)


def _speak_first(listening: socket.socket, tls: ssl.SSLContext, words: bytes) -> None:
    """Accept one connection, and send these words in one packet with the end of the handshake."""
    connection, _ = listening.accept()
    received, unsent = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = tls.wrap_bio(received, unsent, server_side=True)
    with connection:
        while True:
            try:
                server.do_handshake()
                break
            except ssl.SSLWantReadError:
                connection.sendall(unsent.read())
                received.write(connection.recv(65536))
        server.write(words)
        connection.sendall(unsent.read())
        connection.recv(65536)


@pytest.mark.parametrize(
    ("words", "exit_code", "status"),
    [
        (b"220 mail ESMTP\r\n", ExitCode.NOT_HTTP, None),
        (answer(b"{}", "503 Service Unavailable"), ExitCode.REFUSED, 503),
    ],
)
async def test_what_a_server_says_first_is_named_over_tls_1_2_too(
    words: bytes,
    exit_code: ExitCode,
    status: int | None,
    server_tls: ssl.SSLContext,
    certificate: Path,
) -> None:
    """With TLS 1.2 it can arrive with the handshake: another protocol, or a server that is full."""
    server_tls.maximum_version = ssl.TLSVersion.TLSv1_2
    trusting = ssl.create_default_context(cafile=certificate)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        speaking = asyncio.create_task(
            asyncio.to_thread(_speak_first, listening, server_tls, words)
        )
        endpoint = f"https://127.0.0.1:{listening.getsockname()[1]}{BASE}"
        async with client_of(endpoint, verify=trusting) as client:
            error = await failure(client)
        await speaking
    assert (error.exit_code, error.status) == (exit_code, status)


async def test_a_named_ca_is_trusted(server_tls: ssl.SSLContext, certificate: Path) -> None:
    trusting = ssl.create_default_context(cafile=certificate)
    async with (
        served(tls=server_tls) as raw,
        client_of(raw.endpoint("https"), verify=trusting) as client,
    ):
        raw.talk = raw.answers(BEAT)
        assert (await beat(client)).role is Role.PRIMARY


async def test_https_to_a_server_without_tls_is_unreachable() -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(answer(b"what?", "400 Bad Request"))

    async with served(talk) as raw, client_of(raw.endpoint("https")) as client:
        error = await failure(client)
    assert error.exit_code is ExitCode.UNREACHABLE
    assert "TLS failed" in str(error)


# --- time limits and connections ------------------------------------------------------------------


async def test_fifty_timeouts_in_a_row_leak_no_connection() -> None:
    async with served() as raw, client_of(raw.endpoint()) as client:
        raw.talk = raw.says(then="wait")
        for _ in range(50):
            assert (await failure(client, 0.01)).exit_code is ExitCode.NO_ANSWER
        raw.talk = raw.answers(BEAT)
        assert (await beat(client)).role is Role.PRIMARY


async def test_fifty_cancelled_heartbeats_leak_no_connection() -> None:
    async with served() as raw, client_of(raw.endpoint()) as client:
        raw.talk = raw.says(then="wait")
        for turns in range(50):
            task = asyncio.create_task(beat(client))
            for _ in range(turns):  # so that each is cancelled at another step
                await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        raw.talk = raw.answers(BEAT)
        assert (await beat(client)).role is Role.PRIMARY


async def test_hanging_blocking_reads_take_nothing_from_a_heartbeat() -> None:
    async with served() as raw, client_of(raw.endpoint()) as client:
        raw.talk = raw.says(then="wait")
        reads = [
            asyncio.create_task(
                client.status("g", after=1, wait_s=PATIENCE_S, timeout_s=PATIENCE_S)
            )
            for _ in range(20)
        ]
        await until(lambda: len(raw.seen) == BLOCKING_READ_CONNECTIONS)
        raw.talk = raw.answers(BEAT)
        assert (await beat(client)).role is Role.PRIMARY
        for read in reads:
            read.cancel()
        await asyncio.gather(*reads, return_exceptions=True)


async def test_a_connection_that_the_server_closed_while_idle_is_not_used_again() -> None:
    async with served() as raw, client_of(raw.endpoint()) as client:
        raw.talk = raw.says(answer(json.dumps(BEAT).encode()))
        for _ in range(5):
            await beat(client)
            await until(lambda: not established(raw.port))


# --- endpoints ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("endpoint", "problem"),
    [
        ("coordinator:8080/clientfailover", "http:// or https://"),
        ("ftp://host/clientfailover", "http:// or https://"),
        ("http:///clientfailover", "no host"),
        ("http://host:99999/clientfailover", "port 99999"),
        ("http://host:x/clientfailover", "no URL"),
        ("http://a..b/clientfailover", "no URL"),
        (f"http://{'a' * 70}/clientfailover", "no URL"),
        ("http://host", "does not end in /clientfailover"),
        ("http://host/api/v1/clientfailover/groups", "does not end in /clientfailover"),
        ("http://host/clientfailover?x=1", "query"),
        ("http://host/clientfailover#x", "fragment"),
        ("", "http:// or https://"),
    ],
)
def test_an_endpoint_of_the_wrong_form_is_refused_with_the_right_form(
    endpoint: str, problem: str
) -> None:
    with pytest.raises(ConfigError, match=problem) as caught:
        RestClient([endpoint])
    assert "such as http://127.0.0.1:8080/api/v1/clientfailover" in str(caught.value)


def test_an_endpoint_with_a_password_is_refused_without_repeating_it() -> None:
    with pytest.raises(ConfigError) as caught:
        RestClient(["http://user:hunter2@host/clientfailover"])
    assert "hunter2" not in str(caught.value)


def test_no_endpoint_at_all_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least one"):
        RestClient([])


async def test_case_and_a_slash_at_the_end_of_an_endpoint_do_not_matter() -> None:
    asked = []

    def handler(request: httpx2.Request) -> httpx2.Response:
        asked.append(request.url.path)
        return httpx2.Response(200, json={"Version": "1"})

    async with client_of("https://h/API/v1/ClientFailover/", **mocked(handler)) as client:
        await client.version(timeout_s=PATIENCE_S)
    assert asked == ["/API/v1/ClientFailover"]


@pytest.mark.parametrize("name", ["", ".", ".."])
async def test_an_id_that_would_change_the_path_is_refused(name: str) -> None:
    async with client_of() as client:
        with pytest.raises(ConfigError):
            await client.delete_group(name, timeout_s=PATIENCE_S)


A, B = (f"http://{host}.test{BASE}" for host in "ab")


@pytest.mark.parametrize(
    "bad",
    [
        httpx2.Response(503),
        httpx2.Response(200, html="<p>"),
        httpx2.Response(404, html="<p>"),
        httpx2.ConnectError("refused"),
        httpx2.ReadTimeout("late"),
        httpx2.RemoteProtocolError("Server disconnected without sending a response."),
    ],
)
async def test_an_endpoint_that_fails_gives_way_to_one_that_answers(bad: Any) -> None:
    asked = []

    def handler(request: httpx2.Request) -> httpx2.Response:
        asked.append((request.method, request.url.host))
        if request.url.host == "b.test":
            return httpx2.Response(200, json={} if request.method == "GET" else BEAT)
        if isinstance(bad, Exception):
            raise bad
        return httpx2.Response(bad.status_code, content=bad.content)

    async with client_of(A, B, **mocked(handler)) as client:
        await failure(client)
        await until(lambda: client.endpoint == B)
        await beat(client)
        await beat(client)
    assert asked == [("POST", "a.test"), ("GET", "b.test"), *[("POST", "b.test")] * 2]


async def test_an_endpoint_is_kept_while_no_other_one_answers() -> None:
    """Fault 18: entries that are dead must not be asked in turn with the one that worked."""
    asked = []

    def handler(request: httpx2.Request) -> httpx2.Response:
        asked.append((request.method, request.url.host))
        return httpx2.Response(500)

    async with client_of(A, B, **mocked(handler)) as client:
        for _ in range(3):
            await failure(client)
            await until(lambda: client.faults_of_others is not None)
        assert client.endpoint == A
        assert client.faults_of_others is not None
        assert "b.test" in client.faults_of_others
    assert [host for method, host in asked if method == "POST"] == ["a.test"] * 3


async def test_an_endpoint_that_is_slow_has_the_others_looked_at_beside_it() -> None:
    async def handler(request: httpx2.Request) -> httpx2.Response:
        if request.url.host == "a.test":
            await asyncio.sleep(PATIENCE_S)
        return httpx2.Response(200, json={} if request.method == "GET" else BEAT)

    async with client_of(A, B, transport=httpx2.MockTransport(handler)) as client:
        slow = asyncio.create_task(beat(client, 1.0))
        await until(lambda: client.endpoint == B)
        assert not slow.done()
        await beat(client)
        slow.cancel()
        await asyncio.wait([slow])


async def test_a_good_answer_ends_the_look_at_the_others() -> None:
    looked, ended = asyncio.Event(), asyncio.Event()

    async def handler(request: httpx2.Request) -> httpx2.Response:
        if request.url.host == "b.test":
            looked.set()
            try:
                await asyncio.sleep(PATIENCE_S)
            finally:
                ended.set()
        elif not looked.is_set():
            return httpx2.Response(500)
        return httpx2.Response(200, json=BEAT)

    async with client_of(A, B, transport=httpx2.MockTransport(handler)) as client:
        await failure(client)
        await looked.wait()
        await beat(client)
        async with asyncio.timeout(PATIENCE_S / 2):
            await ended.wait()
        assert (client.endpoint, client.faults_of_others) == (A, None)


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 429])
async def test_a_refusal_of_the_api_keeps_the_endpoint(status: int) -> None:
    asked = set()

    def handler(request: httpx2.Request) -> httpx2.Response:
        asked.add(request.url.host)
        return httpx2.Response(status, json=REFUSAL)

    async with client_of(A, B, **mocked(handler)) as client:
        await failure(client)
        await failure(client)
        assert (client.endpoint, asked) == (A, {"a.test"})


async def test_failed_status_reads_move_nothing() -> None:
    """A proxy may cut blocking reads; heartbeats find out whether the endpoint works."""
    asked = set()

    def handler(request: httpx2.Request) -> httpx2.Response:
        asked.add(request.url.host)
        return httpx2.Response(504)

    async with client_of(A, B, **mocked(handler)) as client:
        for _ in range(2):
            with pytest.raises(ServerError):
                await client.status("g", after=1, wait_s=1.0, timeout_s=PATIENCE_S)
        assert (client.endpoint, asked) == (A, {"a.test"})


async def test_a_late_failure_of_an_endpoint_that_was_left_moves_nothing() -> None:
    late = asyncio.Event()
    third = f"http://c.test{BASE}"

    async def handler(request: httpx2.Request) -> httpx2.Response:
        if request.method == "DELETE":
            await late.wait()
        if request.method == "GET" and request.url.host == "b.test":
            return httpx2.Response(200, json={})
        return httpx2.Response(500)

    async with client_of(A, B, third, transport=httpx2.MockTransport(handler)) as client:
        leaving = asyncio.create_task(client.leave("g", "s", timeout_s=PATIENCE_S))
        await asyncio.sleep(0)
        await failure(client)
        await until(lambda: client.endpoint == B)
        late.set()
        with pytest.raises(ServerError, match=r"a\.test"):
            await leaving
        assert client.endpoint == B


# --- another store --------------------------------------------------------------------------------


def stores(**of: str) -> Callable[[httpx2.Request], httpx2.Response]:
    """Each host answers from its own store; ``down`` answers nothing."""

    def handler(request: httpx2.Request) -> httpx2.Response:
        store = of[request.url.host.partition(".")[0]]
        if store == "down":
            raise httpx2.ConnectError("refused")
        body = {"StoreId": store} if request.method == "GET" else {**BEAT, "StoreId": store}
        return httpx2.Response(200, json=body)

    return handler


async def test_an_endpoint_of_another_store_does_not_take_over(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Fault 9: two coordinators that know nothing of each other make two primaries."""
    async with client_of(A, B, **mocked(stores(a="down", b="other"))) as client:
        client.store_id = "ours"
        for _ in range(3):
            await failure(client)
            await until(lambda: client.faults_of_others is not None)
        assert client.endpoint == A
    refused = [r for r in caplog.records if "another store refused" in r.message]
    assert len(refused) == 1


async def test_an_endpoint_that_was_refused_is_passed_over() -> None:
    async with client_of(A, B, **mocked(stores(a="other", b="ours"))) as client:
        client.store_id = "ours"
        assert (await beat(client)).store_id == "other"
        error = client.refuse(A, "other")
        assert error.exit_code is ExitCode.OTHER_STORE
        assert "other" in str(error)
        assert "ours" in str(error)
        assert client.endpoint == B
        client.refuse(A, "other")
        assert client.endpoint == B


# --- names of hosts -------------------------------------------------------------------------------

NAMED = f"http://coordinator.test:{{port}}{BASE}"
Found = list[tuple[Any, Any, int, str, tuple[str, int]]]


class Resolver:
    """Stands in for the C library's resolver, which blocks its thread."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *addresses: str) -> None:
        self.addresses = addresses
        self.asked = 0
        self.error: OSError | None = None
        self.answers = threading.Event()
        self.answers.set()
        monkeypatch.setattr(socket, "getaddrinfo", self.resolve)

    def resolve(self, *_args: Any, **_options: Any) -> Found:
        self.asked += 1
        self.answers.wait()
        if self.error is not None:
            raise self.error
        return [
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0)) for address in self.addresses
        ]


UNKNOWN = socket.gaierror(socket.EAI_NONAME, "unknown to this resolver")


async def test_an_unknown_host_is_unreachable_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    Resolver(monkeypatch).error = UNKNOWN
    async with client_of(f"http://no.such.host{BASE}") as client:
        error = await failure(client)
    assert error.exit_code is ExitCode.UNREACHABLE
    assert "unknown to this resolver" in str(error)


async def test_the_next_address_is_tried_if_one_is_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    Resolver(monkeypatch, "127.0.0.99", "127.0.0.1")
    async with served() as raw, client_of(NAMED.format(port=raw.port)) as client:
        raw.talk = raw.says(answer(json.dumps(BEAT).encode()))  # a connection for each
        await beat(client)
        with socket.create_server(("127.0.0.99", raw.port)) as back:  # it is no longer dead
            back.setblocking(False)
            await beat(client)
            with pytest.raises(BlockingIOError):
                back.accept()  # the address that has worked was used


async def test_a_silent_address_is_passed_by(monkeypatch: pytest.MonkeyPatch) -> None:
    Resolver(monkeypatch, "127.0.0.2", "127.0.0.1")
    async with served() as raw, client_of(NAMED.format(port=raw.port)) as client:
        raw.talk = raw.answers(BEAT)
        with silent("127.0.0.2", raw.port):
            assert (await beat(client, 2.0)).role is Role.PRIMARY


@pytest.mark.parametrize("fault", [UNKNOWN, "slow"])
async def test_a_dns_outage_costs_nothing_once_the_addresses_are_known(
    monkeypatch: pytest.MonkeyPatch, fault: Any
) -> None:
    """Fault 1: a look-up that hangs must not hold up the heartbeats."""
    resolver = Resolver(monkeypatch, "127.0.0.1")
    async with served() as raw, client_of(NAMED.format(port=raw.port)) as client:
        raw.talk = raw.says(answer(json.dumps(BEAT).encode()))  # a connection for each
        await beat(client, 2.0)
        if fault == "slow":
            resolver.answers.clear()
        else:
            resolver.error = fault
        for _ in range(3):
            await beat(client, 2.0)
        assert resolver.asked == (2 if fault == "slow" else 4)
        resolver.answers.set()


async def test_a_look_up_that_hangs_delays_no_other_host(monkeypatch: pytest.MonkeyPatch) -> None:
    resolver = Resolver(monkeypatch)
    resolver.answers.clear()
    async with served() as raw, client_of(NAMED.format(port=1), raw.endpoint()) as client:
        raw.talk = raw.answers({"Version": "1"})
        assert "was not resolved within" in str(await failure_of_version(client, 0.2))
        await until(lambda: client.endpoint == raw.endpoint())
        assert await client.version(timeout_s=PATIENCE_S) == "1"
        resolver.answers.set()


async def test_at_most_one_thread_hangs_in_the_look_ups_of_a_host(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    resolver = Resolver(monkeypatch)
    resolver.answers.clear()
    async with client_of(NAMED.format(port=1)) as client:
        for _ in range(3):
            await failure_of_version(client, 0.05)
        assert resolver.asked == 1
        resolver.answers.set()


async def failure_of_version(client: RestClient, timeout_s: float) -> ServerError:
    with pytest.raises(ServerError) as caught:
        await client.version(timeout_s=timeout_s)
    return caught.value


def test_a_look_up_that_hangs_delays_no_exit() -> None:
    """Fault 1: asyncio waits at the exit for the threads of its shared executor."""
    script = f"""
import asyncio, socket, time
from agent.drivers.rest import RestClient
from agent.errors import ServerError
socket.getaddrinfo = lambda *_, **__: time.sleep(1000)
async def main():
    client = RestClient(["http://no.such.host{BASE}"])
    try:
        await client.version(timeout_s=0.2)
    except ServerError as error:
        print(error.exit_code)
    await client.aclose()
asyncio.run(main())
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, timeout=PATIENCE_S, check=True
    )
    assert done.stdout.split() in ([b"20"], [b"24"])  # 24 if the machine is busy


# --- credentials ----------------------------------------------------------------------------------

SECRET, IN_A_FORM = "hunter 2-%&", "hunter+2-%25%26"


class Identity:
    """A token server and an API that wants its newest token."""

    def __init__(self, life_s: Any = 100) -> None:
        self.now = 1000.0
        self.life_s = life_s
        self.issued = 0
        self.valid = {"t1"}
        self.forms: list[str] = []
        self.urls: list[str] = []
        self.beats = 0
        self.gate = asyncio.Event()
        self.gate.set()
        self.reply: httpx2.Response | None = None

    async def tokens(self, request: httpx2.Request) -> httpx2.Response:
        self.urls.append(str(request.url))
        if request.method == "GET":
            return self.reply or httpx2.Response(
                200, json={"token_endpoint": "https://id.test/token"}
            )
        await self.gate.wait()
        self.forms.append(request.content.decode())
        if self.reply is not None:
            return self.reply
        self.issued += 1
        return httpx2.Response(
            200, json={"access_token": f"t{self.issued}", "expires_in": self.life_s}
        )

    def api(self, request: httpx2.Request) -> httpx2.Response:
        self.beats += 1
        token = request.headers["authorization"].removeprefix("Bearer ")
        if token in self.valid:
            return httpx2.Response(200, json=BEAT)
        return httpx2.Response(401, json=REFUSAL)

    @contextlib.asynccontextmanager
    async def client(
        self, token_url: str | None = "https://id.test/token"
    ) -> AsyncIterator[RestClient]:
        auth = ClientCredentials(
            "me",
            SECRET,
            clock=lambda: self.now,
            token_url=token_url,
            transport=httpx2.MockTransport(self.tokens),
        )
        assert SECRET not in repr(auth)
        async with client_of(f"https://api.test{BASE}", auth=auth, **mocked(self.api)) as client:
            yield client


async def test_basic_credentials_are_sent() -> None:
    seen = []

    def handler(request: httpx2.Request) -> httpx2.Response:
        seen.append(request.headers["authorization"])
        return httpx2.Response(200, json=BEAT)

    async with client_of(auth=httpx2.BasicAuth("u", "p"), **mocked(handler)) as client:
        await beat(client)
    assert seen == ["Basic dTpw"]


async def test_a_token_is_fetched_once_for_calls_that_come_together() -> None:
    identity = Identity()
    async with identity.client() as client:
        await asyncio.gather(*(beat(client) for _ in range(5)))
        await beat(client)
    assert (identity.issued, identity.beats) == (1, 6)
    assert identity.forms == [
        f"grant_type=client_credentials&client_id=me&client_secret={IN_A_FORM}"
    ]


async def test_the_token_url_is_discovered_at_the_endpoints_own_origin() -> None:
    identity = Identity()
    async with identity.client(token_url=None) as client:
        await beat(client)
    assert identity.urls == [
        "https://api.test/identity/.well-known/openid-configuration",
        "https://id.test/token",
    ]


async def test_an_origin_that_is_silent_delays_no_token_of_another_one() -> None:
    """Fault 18, for credentials: the token URL is discovered at the endpoint that is asked."""

    async def tokens(request: httpx2.Request) -> httpx2.Response:
        if request.url.host == "a.test":
            await asyncio.sleep(PATIENCE_S)
        if request.method == "GET":
            return httpx2.Response(200, json={"token_endpoint": "https://b.test/token"})
        return httpx2.Response(200, json={"access_token": "t"})

    def api(request: httpx2.Request) -> httpx2.Response:
        return httpx2.Response(200, json={} if request.method == "GET" else BEAT)

    transport = httpx2.MockTransport(tokens)
    auth = ClientCredentials("me", SECRET, clock=lambda: 0.0, transport=transport)
    endpoints = [f"https://{host}.test{BASE}" for host in "ab"]
    async with client_of(*endpoints, auth=auth, **mocked(api)) as client:
        assert (await failure_of_token(client, 0.4)).exit_code is ExitCode.NO_ANSWER
        assert client.endpoint == endpoints[1]
        await beat(client)


async def test_a_token_is_refreshed_ahead_of_its_end_without_delaying_a_call() -> None:
    identity = Identity(life_s="100")
    identity.valid = {"t1", "t2"}
    async with identity.client() as client:
        await beat(client)
        identity.now += 79.0
        await beat(client)
        assert identity.issued == 1
        identity.now += 2.0
        identity.gate.clear()
        await beat(client)  # answered although the token server is not
        identity.gate.set()
        await until(lambda: identity.issued == 2)
        identity.valid = {"t2"}
        await beat(client)
    assert (identity.issued, identity.beats) == (2, 4)


async def test_a_failed_refresh_ahead_is_forgiven_while_the_token_lives() -> None:
    identity = Identity()
    async with identity.client() as client:
        await beat(client)
        identity.reply = httpx2.Response(500)
        identity.now += 90.0
        await beat(client)
        await until(lambda: len(identity.forms) == 2)
        await beat(client)
        identity.now += 11.0
        assert (await failure_of_token(client)).exit_code is ExitCode.REFUSED
        gc.collect()  # an exception that nobody has seen would be reported here


async def test_a_refused_token_is_replaced_once_and_the_call_repeated() -> None:
    identity = Identity()
    async with identity.client() as client:
        await beat(client)
        identity.valid = {"t2"}
        await beat(client)
        assert (identity.issued, identity.beats) == (2, 3)
        identity.valid = set()
        error = await failure(client)
    assert (error.exit_code, error.status) == (ExitCode.NOT_AUTHORISED, 401)
    assert (identity.issued, identity.beats) == (3, 5)


async def test_a_late_refusal_of_an_old_token_does_not_drop_the_new_one() -> None:
    identity = Identity()
    both, first = asyncio.Event(), asyncio.Event()

    async def api(request: httpx2.Request) -> httpx2.Response:
        reply = identity.api(request)
        if identity.beats == 2:
            await both.wait()
        elif identity.beats == 3:
            both.set()
            await first.wait()
        return reply

    auth = ClientCredentials(
        "me",
        SECRET,
        clock=lambda: 0.0,
        token_url="https://id.test/token",
        transport=httpx2.MockTransport(identity.tokens),
    )
    async with client_of(auth=auth, transport=httpx2.MockTransport(api)) as client:
        await beat(client)
        identity.valid = {"t2"}
        early, late = asyncio.create_task(beat(client)), asyncio.create_task(beat(client))
        await early
        first.set()
        await late
    assert (identity.issued, identity.beats) == (2, 5)


async def test_an_endless_refusal_of_a_token_is_cut_at_its_bound() -> None:
    identity = Identity()
    auth = ClientCredentials(
        "me",
        SECRET,
        clock=lambda: 0.0,
        token_url="https://id.test/token",
        transport=httpx2.MockTransport(identity.tokens),
    )
    async with served() as raw, client_of(raw.endpoint(), auth=auth) as client:
        raw.talk = raw.says(b"HTTP/1.1 401 No\r\n\r\n", *[b"x" * 65536] * 1000)
        error = await failure(client)
    assert error.exit_code is ExitCode.NOT_THE_API


async def failure_of_token(client: RestClient, timeout_s: float = PATIENCE_S) -> ServerError:
    with pytest.raises(ServerError) as caught:
        await beat(client, timeout_s)
    assert SECRET not in str(caught.value)
    return caught.value


@pytest.mark.parametrize(
    ("reply", "code", "words"),
    [
        (
            httpx2.Response(
                400, json={"error": "invalid_client", "error_description": f"bad {SECRET}"}
            ),
            ExitCode.NOT_AUTHORISED,
            "invalid_client: bad ***",
        ),
        (
            httpx2.Response(
                401, json={"error": "invalid_client", "error_description": f"got s={IN_A_FORM}&a=b"}
            ),
            ExitCode.NOT_AUTHORISED,
            "invalid_client: got s=***&a=b",
        ),
        (httpx2.Response(401, text=f"you sent {SECRET}"), ExitCode.NOT_AUTHORISED, "client id"),
        (httpx2.Response(500, text=f"you sent {SECRET}"), ExitCode.REFUSED, "500"),
        (httpx2.Response(200, html=f"<p>{SECRET}"), ExitCode.NOT_AUTHORISED, "access_token"),
        (httpx2.Response(200, json={"access_token": "a\nb"}), ExitCode.NOT_AUTHORISED, "usable"),
        (httpx2.Response(302, headers={"Location": "/x"}), ExitCode.NOT_THE_API, "redirects"),
    ],
)
async def test_a_refused_token_request_has_the_reason_but_not_the_secret(
    reply: httpx2.Response, code: ExitCode, words: str
) -> None:
    identity = Identity()
    identity.reply = reply
    async with identity.client() as client:
        error = await failure_of_token(client)
    assert error.exit_code is code
    assert words in str(error)
    assert "https://id.test/token" in str(error)
    assert identity.beats == 0


@pytest.mark.parametrize(
    "reply",
    [
        httpx2.Response(404),
        httpx2.Response(200, json={"token_endpoint": 1}),
        httpx2.Response(200, json={"token_endpoint": "http://id.test/token"}),
        httpx2.Response(200, json=[]),
    ],
)
async def test_a_discovery_without_a_safe_token_url_sends_no_secret(reply: httpx2.Response) -> None:
    identity = Identity()
    identity.reply = reply
    async with identity.client(token_url=None) as client:
        error = await failure_of_token(client)
    assert error.exit_code is ExitCode.NOT_AUTHORISED
    assert "set the token URL" in str(error)
    assert identity.forms == []


async def test_a_call_waits_for_a_token_no_longer_than_its_own_time_limit() -> None:
    identity = Identity()
    identity.gate.clear()
    async with identity.client() as client:
        assert (await failure_of_token(client, 0.05)).exit_code is ExitCode.NO_ANSWER
        identity.gate.set()
        await beat(client)
    assert len(identity.urls) == 1  # the fetch went on behind the call that had given up


async def test_closing_gives_up_a_fetch_that_is_under_way() -> None:
    identity = Identity()
    identity.gate.clear()
    async with identity.client() as client:
        await failure_of_token(client, 0.01)
    assert not [task for task in asyncio.all_tasks() if task.get_name() == "token"]


def test_a_token_url_of_the_wrong_form_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"token URL 'id\.test' does not begin with http"):
        ClientCredentials("me", SECRET, clock=lambda: 0.0, token_url="id.test")
