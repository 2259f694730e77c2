"""A follower before leaders that hang, lie, break off, or answer something else: real sockets, a leader of bytes."""

import asyncio
import contextlib
import gc
import re
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from agent.coordinator import forwarding, peer_connection, peers
from agent.coordinator.calls import Answer, Request
from agent.coordinator.forwarding import Forwarder, LeaderMoved
from agent.coordinator.spread import Leader
from agent.errors import Invalid, NotFound, NotLeading, RequestRefused, Unavailable
from agent.model import GroupKey
from tests.bad_server import Raw, Talk, make_certificate, served, until
from tests.this_process import descriptors

KEY = GroupKey("default", "default", "g")
TARGET = b"/api/v1/clientfailover/groups/g/clientsessions/a/heartbeat"
JSON = "Content-Type: application/json"
NUMBER = re.compile(rb"Failover-Forwarded: (\S+)\r\n", re.IGNORECASE)


async def end_of(reader: asyncio.StreamReader) -> None:
    """Wait until the follower has ended the connection, in order or by a reset."""
    with contextlib.suppress(ConnectionResetError):
        await reader.read()


@dataclass
class View:
    leaders: dict[int, Leader] = field(default_factory=dict)


class FakeLeadership:
    """One shard, whose leader the test names."""

    def __init__(self) -> None:
        self.member = "7"
        self.here = False
        self.view = View()
        self.changed = asyncio.Event()

    def lead(self, url: str) -> None:
        self.view.leaders[0] = Leader("8", url, 1)
        self.changed.set()

    async def leader_url(self, key: GroupKey) -> str | None:
        return None if self.here else self.view.leaders[0].url

    def leader_of(self, key: GroupKey) -> Leader | None:
        return self.view.leaders.get(0)

    async def wait_for_change(self, timeout_s: float | None) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self.changed.wait()
        self.changed.clear()


class Follower:
    """A forwarder, and the leader that it asks."""

    def __init__(self, forwarder: Forwarder, leadership: FakeLeadership) -> None:
        self.forwarder = forwarder
        self.leadership = leadership

    async def ask(
        self,
        url: str,
        method: str = "POST",
        body: bytes = b"{}",
        *,
        target: bytes = TARGET,
        headers: tuple[tuple[bytes, bytes], ...] = (),
        wait_s: float = 0.0,
    ) -> Answer:
        if not self.leadership.view.leaders:
            self.leadership.lead(url)
        request = Request(method, target, list(headers), body)
        return await self.forwarder.forward(KEY, url, request, wait_s=wait_s)

    async def refusal(self, url: str, **how: Any) -> RequestRefused:
        async with asyncio.timeout(10):
            with pytest.raises(RequestRefused) as refused:
                await self.ask(url, **how)
        return refused.value


@asynccontextmanager
async def a_follower(
    tls: ssl.SSLContext | None = None, *, encrypted: bool = False, connections: int = 40
) -> AsyncIterator[Follower]:
    leadership: Any = FakeLeadership()
    forwarder = Forwarder(
        leadership,
        tls or ssl.create_default_context(),
        encrypted=encrypted,
        connections_per_address=connections,
    )
    forwarder.start()
    try:
        yield Follower(forwarder, leadership)
    finally:
        await forwarder.aclose()


@pytest.fixture
async def follower(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Follower]:
    """Ten calls at a time, and 26 blocking reads."""
    monkeypatch.setattr(forwarding, "SWEEP_S", 0.05)
    async with a_follower() as one:
        yield one


@pytest.fixture
def one_second(monkeypatch: pytest.MonkeyPatch) -> None:
    """For each request."""
    monkeypatch.setattr(forwarding, "REQUEST_S", 1.0)


def url_of(raw: Raw, scheme: str = "http") -> str:
    return f"{scheme}://127.0.0.1:{raw.port}"


def number_in(request: bytes) -> str:
    found = NUMBER.search(request)
    assert found is not None
    return found[1].decode()


def written(request: bytes, body: bytes, status: str = "200 OK", *lines: str) -> bytes:
    """A good answer to a request."""
    head = (
        f"HTTP/1.1 {status}",
        f"Failover-Forwarded: {number_in(request)}",
        JSON,
        f"Content-Length: {len(body)}",
        *lines,
    )
    return "\r\n".join((*head, "", "")).encode() + body


Make = Callable[[bytes], bytes]


def leader_with(raw: Raw, make: Make = lambda request: written(request, b"{}")) -> Talk:
    """Answers each request with what ``make`` makes of it."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            writer.write(make(await raw.request(reader)))
            await writer.drain()

    return talk


@asynccontextmanager
async def a_leader(make: Make | None = None, tls: ssl.SSLContext | None = None) -> Any:
    raw = Raw()
    raw.talk = leader_with(raw, make) if make is not None else leader_with(raw)
    async with served(tls=tls, raw=raw):
        yield raw


# -- what is sent, and what is passed on ----------------------------------------------------------


async def test_a_request_is_passed_on_as_it_came_and_its_answer_too(follower: Follower) -> None:
    def make(request: bytes) -> bytes:
        return written(
            request,
            b'{"Role":1}',
            "429 Too Many Requests",
            "Retry-After: 2",
            "Retry-After-Ms: 1500",
            "WWW-Authenticate: Basic",
            "WWW-Authenticate: Bearer",
            "Operation-Id: 5",
            "Set-Cookie: a=b",
            "Connection: keep-alive",
        )

    async with a_leader(make) as raw:
        answer = await follower.ask(
            url_of(raw),
            body=b'{"FailoverScore": 1}',
            target=TARGET + b"?a=%20b",
            headers=(
                (b"authorization", b"Basic eDp5"),
                (b"authorization", b"Basic b3RoZXI="),
                (b"content-type", b"application/json"),
                (b"cookie", b"c=d"),
                (b"x-forwarded-for", b"10.0.0.1"),
                (b"failover-forwarded", b"forged"),
                (b"transfer-encoding", b"chunked"),
                (b"connection", b"close"),
                (b"host", b"elsewhere"),
            ),
        )
    head, _, body = raw.seen[0].partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    assert first == f"POST {TARGET.decode()}?a=%20b HTTP/1.1"
    assert [line for line in lines if not line.startswith("failover-forwarded")] == [
        f"Host: 127.0.0.1:{raw.port}",
        lines[1],
        "authorization: Basic eDp5",
        "content-type: application/json",
        "Content-Length: 20",
    ]
    assert lines[1].startswith("User-Agent: failover-agent/")
    assert body == b'{"FailoverScore": 1}'
    assert (answer.status, answer.body) == (429, b'{"Role":1}')
    assert answer.operation_id == "5"
    assert answer.headers == (
        (b"retry-after", b"2"),
        (b"retry-after-ms", b"1500"),
        (b"www-authenticate", b"Basic"),
        (b"www-authenticate", b"Bearer"),
    )


async def test_head_is_asked_as_get_since_its_answer_has_no_body_to_parse(
    follower: Follower,
) -> None:
    async with a_leader() as raw:
        for _ in range(2):
            assert (await follower.ask(url_of(raw), "HEAD", b"")).body == b"{}"
    assert raw.seen[1].startswith(b"GET ")
    assert b"content-length" not in raw.seen[1].lower()
    assert raw.accepted == 1


async def test_connections_are_kept_and_each_request_has_its_own_number(
    follower: Follower,
) -> None:
    async with a_leader() as raw:
        for _ in range(5):
            await follower.ask(url_of(raw))
        assert raw.accepted == 1
        assert len(set(map(number_in, raw.seen))) == 5


async def test_an_answer_in_chunks_and_one_without_content_are_answers(follower: Follower) -> None:
    def chunked(request: bytes) -> bytes:
        number = number_in(request)
        head = f"HTTP/1.1 200 OK\r\nFailover-Forwarded: {number}\r\nTransfer-Encoding: chunked\r\n"
        return head.encode() + b'\r\n3\r\n{"a\r\n4\r\n":1}\r\n0\r\n\r\n'

    async with a_leader(chunked) as raw:
        for _ in range(2):
            assert (await follower.ask(url_of(raw))).body == b'{"a":1}'
        assert raw.accepted == 1

    def empty(request: bytes) -> bytes:
        number = number_in(request)
        return f"HTTP/1.1 204 No Content\r\nFailover-Forwarded: {number}\r\n\r\n".encode()

    async with a_leader(empty) as raw:
        for _ in range(2):
            answer = await follower.ask(url_of(raw))
            assert (answer.status, answer.body) == (204, b"")
        assert raw.accepted == 1


@pytest.mark.parametrize(
    "target",
    [
        b"/groups/g HTTP/1.1\r\nX: y\r\n\r\nGET /",
        b"/groups/\xff",
        b"/groups/a b",
        b"groups",
        b"/groups/\0",
        b"http://elsewhere/groups",
        b"",
    ],
)
async def test_a_target_that_could_end_its_line_is_not_sent(
    follower: Follower, target: bytes
) -> None:
    async with a_leader() as raw:
        assert isinstance(await follower.refusal(url_of(raw), target=target), Invalid)
        assert not raw.seen


async def test_a_header_that_could_end_its_line_is_left_out(follower: Follower) -> None:
    async with a_leader() as raw:
        for value in (b"a\r\nX: y", b"a\nb", b"a\0b", b"a\rb"):
            await follower.ask(url_of(raw), headers=((b"authorization", value),))
        assert not any(b"authorization" in seen for seen in raw.seen)


# -- leaders that lie -----------------------------------------------------------------------------


def with_head(*lines: str, body: bytes = b"{}", status: str = "200 OK") -> Make:
    """An answer with the right number and these lines."""

    def make(request: bytes) -> bytes:
        head = (f"HTTP/1.1 {status}", f"Failover-Forwarded: {number_in(request)}", *lines, "", "")
        return "\r\n".join(head).encode() + body

    return make


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda _: b"nonsense\r\n\r\n", "not HTTP/1.1"),
        (lambda _: b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}", "not for this request"),
        (
            lambda _: b"HTTP/1.1 200 OK\r\nFailover-Forwarded: 1\r\nContent-Length: 2\r\n\r\n{}",
            "not for this request",
        ),
        (lambda r: written(r, b"{}") + written(r, b"{}"), "two answers"),
        (lambda r: written(r, b"{}") + b"x", "two answers"),
        (with_head("Content-Length: 2", "Content-Length: 3"), "not HTTP/1.1"),
        (
            with_head("Content-Length: 2", "Transfer-Encoding: chunked", body=b"0\r\n\r\n"),
            "not HTTP/1.1",
        ),
        (with_head("Content-Length: -1"), "not HTTP/1.1"),
        (with_head("Content-Length: 99999999999999999999999"), "not HTTP/1.1"),
        (with_head("Content-Length : 2"), "not HTTP/1.1"),
        (with_head("Transfer-Encoding: chunked", body=b"x\r\n"), "not HTTP/1.1"),
        (with_head("Transfer-Encoding: gzip"), "without its length"),
        (with_head(JSON), "without its length"),
        (with_head("Content-Length: 2", "Content-Type: text/html"), "(200) that is not JSON"),
        (
            with_head("Content-Length: 2", "Content-Type: text/html", status="502 Bad Gateway"),
            "(502) that is not JSON",
        ),
        (with_head(status="100 Continue"), "the status 100"),
        (with_head("Upgrade: x", "Connection: Upgrade", status="101 x"), "the status 101"),
        (with_head("Content-Length: 2", status="999 x"), "the status 999"),
        (with_head("Content-Length: 2", *["A: b"] * 200), "more than 100 headers"),
        (with_head("A: b\r\n c", "Content-Length: 2"), "not HTTP/1.1"),
        (with_head("A: b\0c", "Content-Length: 2"), "not HTTP/1.1"),
        (lambda _: b"HTTP/1.1 200 OK\r\nA: " + b"b" * 100_000, "head has more than"),
        (lambda _: b"HTTP/1.1 200 " + b"b" * 100_000, "head has more than"),
        (lambda _: b"HTTP/2 200 OK\r\n\r\n", "not HTTP/1.1"),
        (lambda _: b"\x16\x03\x01\x02\x00\x01", "not HTTP/1.1"),
    ],
)
async def test_an_invalid_answer_is_503_and_ends_the_connection(
    follower: Follower, make: Make, reason: str
) -> None:
    async with a_leader(make) as raw:
        refused = await follower.refusal(url_of(raw))
        assert isinstance(refused, Unavailable)
        assert reason in refused.reason
        assert url_of(raw) in refused.reason
        assert follower.forwarder.failed == 1
        raw.talk = leader_with(raw)
        assert (await follower.ask(url_of(raw))).status == 200
        assert raw.accepted == 2


async def test_bytes_that_follow_an_answer_end_the_connection(follower: Follower) -> None:
    """The next caller on it would get them as the answer."""
    raw = Raw()
    poison = b'HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n{"Role":2}'

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(written(await raw.request(reader), b"{}"))
        await writer.drain()
        await follower_got.wait()
        writer.write(poison)
        await end_of(reader)
        ended.set()

    follower_got, ended = asyncio.Event(), asyncio.Event()
    async with served(talk, raw=raw):
        assert (await follower.ask(url_of(raw))).body == b"{}"
        follower_got.set()
        await ended.wait()
        raw.talk = leader_with(raw)
        assert (await follower.ask(url_of(raw))).body == b"{}"
        assert raw.accepted == 2


async def test_answers_in_the_wrong_order_reach_nobody(follower: Follower) -> None:
    """A proxy, or a leader, that exchanges the answers of two connections."""
    raw, seen = Raw(), []
    both = asyncio.Event()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append(await raw.request(reader))
        mine = len(seen) - 1
        if len(seen) == 2:
            both.set()
        await both.wait()
        writer.write(written(seen[1 - mine], b"{}"))
        await end_of(reader)

    async with served(talk, raw=raw):
        refused = await asyncio.gather(*(follower.refusal(url_of(raw)) for _ in range(2)))
    assert all("not for this request" in one.reason for one in refused)


async def test_an_answer_that_is_too_long_is_not_kept(
    follower: Follower, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peer_connection, "MAX_ANSWER_BYTES", 100_000)
    async with a_leader(with_head("Content-Length: 200000", body=b"x" * 200_000)) as raw:
        assert "more than 100000 bytes" in (await follower.refusal(url_of(raw))).reason


@pytest.mark.parametrize("body", [b"1;" + b"a" * 400_000, b"0\r\nA: " + b"a" * 400_000])
async def test_chunks_and_trailers_without_end_are_not_kept(
    follower: Follower, monkeypatch: pytest.MonkeyPatch, body: bytes
) -> None:
    monkeypatch.setattr(peer_connection, "MAX_ANSWER_BYTES", 100_000)
    async with a_leader(with_head("Transfer-Encoding: chunked", body=body)) as raw:
        assert "more than 100000 bytes" in (await follower.refusal(url_of(raw))).reason


@pytest.mark.usefixtures("one_second")
async def test_unfinished_answers_have_a_bound_together(
    follower: Follower, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peer_connection, "MAX_UNFINISHED_BYTES", 150_000)
    part = with_head("Content-Length: 200000", body=b"x" * 60_000)
    async with a_leader(part) as raw:
        asked = [follower.refusal(url_of(raw)) for _ in range(5)]
        reasons = [one.reason for one in await asyncio.gather(*asked)]
        assert sum("of others were unfinished" in reason for reason in reasons) == 3
        assert sum("did not answer within" in reason for reason in reasons) == 2
        raw.talk = leader_with(raw)
        whole = with_head("Content-Length: 140000", JSON, body=b"x" * 140_000)
        raw.talk = leader_with(raw, whole)
        answers = [await follower.ask(url_of(raw)) for _ in range(3)]  # nothing stays counted
        assert [answer.status for answer in answers] == [200] * 3


# -- leaders that hang or die ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "parts",
    [(), (b"HTTP/1.1 200 OK\r\n",), (b"HTTP/1.1 200 OK\r\nContent-Le",)],
)
async def test_an_answer_that_breaks_off_is_503_and_the_request_is_sent_once(
    follower: Follower, parts: tuple[bytes, ...]
) -> None:
    raw = Raw()
    async with served(raw.says(*parts), raw=raw):
        refused = await follower.refusal(url_of(raw))
    assert "closed the connection before its answer was complete" in refused.reason
    assert len(raw.seen) == 1


async def test_a_request_that_was_given_up_does_not_arrive_later(follower: Follower) -> None:
    """The kernel would go on sending it, and a leader that was cut off would carry it out after a later one."""
    body = b"x" * 60_000
    with socket.socket() as leader:
        leader.setsockopt(
            socket.SOL_SOCKET, socket.SO_RCVBUF, 2048
        )  # the rest of the request waits here
        leader.bind(("127.0.0.1", 0))
        leader.listen()
        leader.settimeout(10)
        url = f"http://127.0.0.1:{leader.getsockname()[1]}"
        asking = asyncio.create_task(follower.ask(url, body=body))
        connection = await asyncio.to_thread(leader.accept)
        with connection[0] as accepted:
            accepted.settimeout(10)
            await asyncio.to_thread(accepted.recv, 1, socket.MSG_PEEK)
            asking.cancel()
            await asyncio.wait([asking])
            assert await asyncio.to_thread(everything_of, accepted) < len(body)


def everything_of(connection: socket.socket) -> int:
    """How many bytes arrive until the connection ends."""
    count = 0
    with contextlib.suppress(ConnectionResetError):
        while received := connection.recv(65536):
            count += len(received)
    return count


async def test_a_connection_that_the_leader_closed_meanwhile_is_not_used(
    follower: Follower,
) -> None:
    raw, closed = Raw(), asyncio.Event()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(written(await raw.request(reader), b"{}"))
        await writer.drain()
        await closed.wait()

    async with served(talk, raw=raw):
        before = descriptors()
        assert (await follower.ask(url_of(raw))).status == 200
        closed.set()
        await until(lambda: descriptors() == before)  # both ends are closed
        assert (await follower.ask(url_of(raw))).status == 200


async def test_connection_close_is_obeyed(follower: Follower) -> None:
    def make(request: bytes) -> bytes:
        return written(request, b"{}", "200 OK", "Connection: close")

    async with a_leader(make) as raw:
        for _ in range(3):
            assert (await follower.ask(url_of(raw))).status == 200
        assert raw.accepted == 3


@pytest.mark.usefixtures("one_second")
async def test_a_trickle_does_not_extend_the_deadline(follower: Follower) -> None:
    raw = Raw()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(written(await raw.request(reader), b"")[:-2] + b"A: ")
        while not writer.is_closing():
            writer.write(b"b")
            await writer.drain()
            await asyncio.sleep(0.02)

    async with served(talk, raw=raw):
        assert "did not answer within 1 s" in (await follower.refusal(url_of(raw))).reason


@pytest.mark.usefixtures("one_second")
async def test_a_late_answer_reaches_nobody(follower: Follower) -> None:
    raw = Raw()

    async def late(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = await raw.request(reader)
        await end_of(reader)
        ended.set()
        writer.write(written(request, b'{"Role":2}'))

    ended = asyncio.Event()
    async with served(late, raw=raw):
        await follower.refusal(url_of(raw))
        await ended.wait()
        raw.talk = leader_with(raw)
        assert (await follower.ask(url_of(raw))).body == b"{}"
        assert raw.accepted == 2


async def test_a_caller_that_hangs_up_ends_the_connection_of_its_read(follower: Follower) -> None:
    raw, ended = Raw(), asyncio.Event()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await raw.request(reader)
        await end_of(reader)
        ended.set()

    async with served(talk, raw=raw):
        read = asyncio.create_task(follower.ask(url_of(raw), "GET", b"", wait_s=60))
        await until(lambda: bool(raw.seen))
        read.cancel()
        async with asyncio.timeout(10):
            await ended.wait()


async def test_a_leader_on_which_nobody_listens_is_503(follower: Follower) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    refused = await follower.refusal(url)
    assert url in refused.reason
    assert "could not be connected to" in refused.reason


async def test_a_leader_that_accepts_nothing_is_given_up(
    follower: Follower, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "CONNECT_S", 0.5)
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        address = full.getsockname()
        with contextlib.ExitStack() as stack:
            for _ in range(2):
                one = stack.enter_context(socket.socket())
                one.setblocking(False)
                one.connect_ex(address)
            url = f"http://127.0.0.1:{address[1]}"
            assert "within 0.5 s" in (await follower.refusal(url)).reason


@pytest.mark.parametrize(
    "url", ["", "nonsense", "ftp://a", "http://", "http://a:99999", "http://u@a", "http://ä"]
)
async def test_an_invalid_url_of_a_peer_is_503(follower: Follower, url: str) -> None:
    assert "is not a URL of HTTP" in (await follower.refusal(url)).reason


# -- leaders that move ----------------------------------------------------------------------------


async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await end_of(reader)


async def test_a_request_ends_at_once_when_another_one_leads(follower: Follower) -> None:
    async with served(silent) as raw:
        asked = [
            asyncio.create_task(follower.refusal(url_of(raw), wait_s=wait_s))
            for wait_s in (0.0, 60.0, *[0.0] * 20)  # ten of them have no connection
        ]
        await until(lambda: raw.accepted == 11)
        follower.leadership.lead("http://127.0.0.1:1")
        assert {type(one) for one in await asyncio.gather(*asked)} == {LeaderMoved}
    assert follower.forwarder.failed == 0


async def nobody() -> Answer:
    raise NotFound("no", "no")


@pytest.mark.parametrize("led_here", [True, False])
async def test_a_deletion_that_the_former_leader_may_have_carried_out_has_succeeded(
    follower: Follower, *, led_here: bool
) -> None:
    """The new leader answers 404, which is success here. Other requests, and ones sent once only, get the 404."""

    def missing(request: bytes) -> bytes:
        return written(request, b'{"Error":"NotFound"}', "404 Not Found")

    async def status(method: str) -> int:
        asking = follower.forwarder.answer(
            KEY, Request(method, TARGET, [], b""), nobody, wait_s=0.0, forwarded=False
        )
        try:
            return (await asking).status
        except NotFound:
            return 404

    async with served(silent) as old, a_leader(missing) as new:
        then = None if led_here else url_of(new)
        for method, answered in (("DELETE", 204), ("POST", 404)):
            follower.leadership.lead(url_of(old))
            accepted = old.accepted
            asking = asyncio.create_task(status(method))
            await until(lambda: old.accepted > accepted)  # noqa: B023 - awaited here
            follower.leadership.lead(then or "http://here")
            follower.leadership.here = led_here
            assert await asking == answered
            assert await status(method) == 404, "asked nobody else"
            follower.leadership.here = False


async def test_the_refusal_of_a_former_leader_is_not_leading(follower: Follower) -> None:
    def make(request: bytes) -> bytes:
        return written(request, b'{"Error":"NotLeading"}', "503 Service Unavailable")

    async with a_leader(make) as raw:
        assert isinstance(await follower.refusal(url_of(raw)), NotLeading)


async def test_stop_ends_every_request(follower: Follower) -> None:
    async with served(silent) as raw:
        asked = [
            asyncio.create_task(follower.refusal(url_of(raw), wait_s=wait_s))
            for wait_s in (0.0, 60.0, *[0.0] * 20)
        ]
        await until(lambda: raw.accepted == 11)
        follower.forwarder.stop()
        reasons = {one.reason for one in await asyncio.gather(*asked)}
        assert reasons == {"The coordinator is stopping."}
        assert (await follower.refusal(url_of(raw))).reason == "The coordinator is stopping."


async def test_a_request_that_ends_as_it_gets_its_connection_is_not_sent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(peers, "QUEUED", 1)
    raw, go = Raw(), asyncio.Event()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = await raw.request(reader)
        await go.wait()
        writer.write(written(request, b"{}"))
        await raw.request(reader)

    async with served(talk, raw=raw), a_follower(connections=4) as follower:
        first = asyncio.create_task(follower.ask(url_of(raw)))
        await until(lambda: bool(raw.seen))
        second = asyncio.create_task(follower.refusal(url_of(raw)))
        third = asyncio.create_task(follower.refusal(url_of(raw)))
        assert "1 more are waiting" in (await third).reason  # so the second one waits by now
        release, released = peers.Pool.release, list[peers.Pool]()

        def release_and_stop(pool: peers.Pool, connection: peer_connection.PeerConnection) -> None:
            release(pool, connection)
            follower.forwarder.stop()
            released.append(pool)

        monkeypatch.setattr(peers.Pool, "release", release_and_stop)
        go.set()
        assert (await second).reason == "The coordinator is stopping."
        assert (await first).status == 200
        assert len(raw.seen) == 1
        assert released[0].take_idle() is not None, "the second request has given it back"


# -- bounds ---------------------------------------------------------------------------------------


async def test_requests_wait_for_a_connection_and_further_ones_are_refused(
    follower: Follower, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "QUEUED", 1)
    raw, go = Raw(), asyncio.Event()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            request = await raw.request(reader)
            await go.wait()
            writer.write(written(request, b"{}"))

    async with served(talk, raw=raw):
        asked = [asyncio.create_task(follower.ask(url_of(raw))) for _ in range(20)]
        await until(lambda: len(raw.seen) == 10)
        refused = await follower.refusal(url_of(raw))
        assert "has 10 requests in progress, and 10 more are waiting" in refused.reason
        go.set()
        assert {answer.status for answer in await asyncio.gather(*asked)} == {200}
        assert raw.accepted == 10


async def test_blocking_reads_leave_connections_for_heartbeats(follower: Follower) -> None:
    raw = Raw()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            request = await raw.request(reader)
            if request.startswith(b"GET"):
                await end_of(reader)
            writer.write(written(request, b"{}"))

    async with served(talk, raw=raw):
        reads = [
            asyncio.create_task(follower.ask(url_of(raw), "GET", b"", wait_s=60)) for _ in range(26)
        ]
        await until(lambda: len(raw.seen) == 26)
        refused = await follower.refusal(url_of(raw), method="GET", body=b"", wait_s=60)
        assert "has 26 requests in progress" in refused.reason
        assert (await follower.ask(url_of(raw))).status == 200
        for read in reads:
            read.cancel()


async def test_a_leader_that_hangs_delays_no_request_to_another_one(follower: Follower) -> None:
    async with served(silent) as hung, a_leader() as well:
        follower.leadership.lead(url_of(hung))
        asked = [asyncio.create_task(follower.refusal(url_of(hung))) for _ in range(50)]
        await until(lambda: hung.accepted == 10)
        answer = await follower.ask(url_of(well))
        assert answer.status == 200
        assert not any(task.done() for task in asked)
        follower.forwarder.stop()
        assert {type(one) for one in await asyncio.gather(*asked)} == {Unavailable}


async def test_idle_connections_are_closed(
    follower: Follower, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw, ended = Raw(), asyncio.Event()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(written(await raw.request(reader), b"{}"))
        assert await reader.read() == b""
        ended.set()

    async with served(talk, raw=raw):
        await follower.ask(url_of(raw))
        assert not ended.is_set()
        monkeypatch.setattr(peers, "KEEPALIVE_S", 0.0)
        await until(ended.is_set)


async def test_a_peer_is_forgotten_when_it_has_no_connection() -> None:
    known = peers.Peers(ssl.create_default_context(), encrypted=False, calls=1, blocking_reads=1)
    async with a_leader() as raw:
        _, calls, _ = known.to(url_of(raw))
        waiting = calls.wait()
        known.sweep()
        assert known.to(url_of(raw))[1] is calls
        connection = await waiting
        connection.close()
        known.sweep()
        assert known.to(url_of(raw))[1] is not calls
    await known.aclose()


async def test_failed_requests_leave_no_reference_cycle(follower: Follower) -> None:
    """It would stay until the next full collection, which the coordinator makes rare."""

    async def fail(url: str, wait_s: float = 0.0) -> None:
        with contextlib.suppress(RequestRefused):
            await follower.ask(url, wait_s=wait_s)

    gc.collect()
    gc.disable()
    try:
        async with a_leader(lambda _: b"x\r\n\r\n") as lying:
            for _ in range(3):
                await fail(url_of(lying))
        async with served(silent) as hung:
            follower.leadership.lead(url_of(hung))
            read = asyncio.create_task(fail(url_of(hung), 60))
            failing = [asyncio.create_task(fail(url_of(hung))) for _ in range(15)]
            await until(lambda: hung.accepted > 10)
            read.cancel()
            follower.leadership.lead("http://127.0.0.1:1")
            await asyncio.wait([read, *failing])
            del read, failing
        kinds = (peers.Exchange, peer_connection.PeerConnection)

        def left() -> list[object]:
            return [one for one in gc.get_objects() if isinstance(one, kinds)]

        await until(lambda: not left())
    finally:
        gc.enable()


async def test_an_old_connection_is_not_used_after_a_freeze(
    follower: Follower, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the sweep could close it."""
    async with a_leader() as raw:
        await follower.ask(url_of(raw))
        await follower.ask(url_of(raw))
        assert raw.accepted == 1
        monkeypatch.setattr(peers, "KEEPALIVE_S", 0.0)  # as if it had been idle for long
        await follower.ask(url_of(raw))
        assert raw.accepted == 2


@pytest.mark.usefixtures("one_second")
async def test_a_fault_of_the_watch_is_logged_and_deadlines_still_end_requests(
    follower: Follower, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sweep = peers.Peers.sweep

    def fail_once(_: peers.Peers) -> None:
        monkeypatch.setattr(peers.Peers, "sweep", sweep)
        raise ZeroDivisionError

    monkeypatch.setattr(peers.Peers, "sweep", fail_once)
    await until(lambda: "watching forwarded requests failed" in caplog.text)
    async with served(silent) as raw:
        assert "did not answer within 1 s" in (await follower.refusal(url_of(raw))).reason


# -- TLS ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_certificate(tmp_path_factory.mktemp("peer"))


@pytest.fixture
def leader_tls(pair: Path) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(pair)
    return context


async def test_a_leader_with_tls_is_verified(pair: Path, leader_tls: ssl.SSLContext) -> None:
    async with a_leader(tls=leader_tls) as raw:
        async with a_follower(ssl.create_default_context(cafile=pair), encrypted=True) as one:
            for _ in range(2):
                assert (await one.ask(url_of(raw, "https"))).status == 200
            assert raw.accepted == 1
        async with a_follower(encrypted=False) as one:
            refused = await one.refusal(url_of(raw, "https"))
            assert "CERTIFICATE_VERIFY_FAILED" in refused.reason
        async with a_follower(ssl.create_default_context(cafile=pair), encrypted=True) as one:
            refused = await one.refusal(f"https://localhost:{raw.port}")
            assert "CERTIFICATE_VERIFY_FAILED" in refused.reason
        assert len(raw.seen) == 2


async def test_a_leader_with_tls_that_breaks_off_is_503_and_leaves_its_place_to_the_next_request(
    pair: Path, leader_tls: ssl.SSLContext
) -> None:
    raw = Raw()
    async with (
        served(raw.says(), tls=leader_tls, raw=raw),
        a_follower(ssl.create_default_context(cafile=pair), connections=4) as one,
    ):
        for _ in range(3):  # it may have one connection
            refused = await one.refusal(url_of(raw, "https"))
            assert "closed the connection before its answer was complete" in refused.reason


async def test_credentials_are_not_sent_unencrypted_to_a_leader_that_asks_for_it() -> None:
    async with a_leader() as raw, a_follower(encrypted=True) as one:
        assert "is not https" in (await one.refusal(url_of(raw))).reason
        assert not raw.accepted
