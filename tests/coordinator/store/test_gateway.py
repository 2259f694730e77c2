"""Which member of etcd is asked, when one of them hangs."""

import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import ExitStack, asynccontextmanager

import pytest

from agent.coordinator.store.etcd_client import Etcd, EtcdUnknown, EtcdUnreachable
from agent.coordinator.store.etcd_gateway import Gateway, Login

ANSWER = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"
TIMEOUT_S = 0.2

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Coroutine[None, None, None]]


async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read()
    writer.close()


def a_member_of(cluster_id: str, path: str = "") -> Serve:
    """Answers as a member of an etcd cluster, by a stream at ``path``."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        header = b'{"header":{"cluster_id":"%b"}}' % cluster_id.encode()
        while asked := await reader.read(65536):
            body = b'{"result":%b}\n' % header if path and path.encode() in asked else header
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
        writer.close()

    return serve


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while await reader.read(65536):
        writer.write(ANSWER)
    writer.close()


@asynccontextmanager
async def members(*serves: Serve) -> AsyncIterator[list[str]]:
    """Servers on loopback; the connections to them have to be closed first."""
    serving: list[asyncio.Task[None]] = []

    def kept(serve: Serve) -> Callable[[asyncio.StreamReader, asyncio.StreamWriter], None]:
        return lambda *ends: serving.append(asyncio.create_task(serve(*ends)))

    servers = [await asyncio.start_server(kept(serve), "127.0.0.1", 0) for serve in serves]
    try:
        yield [f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}" for server in servers]
    finally:
        for server in servers:
            server.close()
        await asyncio.gather(*serving)


@pytest.mark.parametrize("together", [1, 2, 3, 4])
async def test_requests_that_time_out_together_leave_a_member_that_hangs_once(
    together: int,
) -> None:
    """Each of them used to leave whichever member was the current one, which led back to the one that hangs."""
    async with members(hang, answer, answer) as urls:
        gateway = Gateway(urls)
        try:
            posts = (gateway.post("/v3/kv/range", {}, TIMEOUT_S) for _ in range(together))
            outcomes = await asyncio.gather(*posts, return_exceptions=True)
            assert all(isinstance(outcome, EtcdUnknown) for outcome in outcomes)
            assert all(urls[0] in str(outcome) for outcome in outcomes)
            assert gateway.endpoint == urls[1]
            assert await gateway.post("/v3/kv/range", {}, 5.0) == {}
        finally:
            await gateway.aclose()


async def test_a_read_is_sent_again_before_its_answer_is_given_up() -> None:
    """So that a member that hangs delays no start of a coordinator, and no load of a shard, for long."""
    async with members(hang, a_member_of("1")) as urls:
        etcd = Etcd(Gateway(urls, leave_after_s=0.1), 1.5)
        try:
            async with asyncio.timeout(1.4):
                assert await etcd.get("/absent") is None
        finally:
            await etcd.aclose()


async def test_a_member_that_hangs_at_the_login_does_not_delay_a_login_elsewhere() -> None:
    """At the start of a coordinator, or when a token has expired."""

    async def login(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while asked := await reader.read(65536):
            body = b'{"token":"t"}' if b"/v3/auth/authenticate" in asked else b"{}"
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
        writer.close()

    async with members(hang, login) as urls:
        etcd = Etcd(Gateway(urls, login=Login("name", "password"), leave_after_s=0.1), 1.5)
        try:
            async with asyncio.timeout(1.4):
                assert await etcd.get("/absent") is None
        finally:
            await etcd.aclose()


@pytest.mark.parametrize("fails", ["first", "second"])
async def test_an_attempt_that_fails_decides_nothing_while_the_other_is_unanswered(
    fails: str,
) -> None:
    """The member that is asked next may be of another etcd cluster, and the one that hangs may be killed."""
    resent = asyncio.Event()

    async def first(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(65536)
        await resent.wait()
        if fails == "second":
            await asyncio.sleep(0.1)
            writer.write(ANSWER)
            await reader.read()
        writer.close()

    async def second(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(65536)
        resent.set()
        if fails == "first":
            await asyncio.sleep(0.1)
            writer.write(ANSWER)
            await reader.read()
        writer.close()

    async with members(first, second) as urls:
        etcd = Etcd(Gateway(urls, leave_after_s=0.1), 1.5)
        try:
            assert await etcd.get("/absent") is None
        finally:
            await etcd.aclose()


async def test_a_member_to_which_no_connection_comes_about_is_left_by_the_same_request() -> None:
    """As with a host that is off. Nothing was sent, so a change is safe with the next member, too."""
    with socket.socket() as full, ExitStack() as stack:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for _ in range(2):
            one = stack.enter_context(socket.socket())
            one.setblocking(False)
            one.connect_ex(full.getsockname())
        async with members(answer) as urls:
            lost = f"http://127.0.0.1:{full.getsockname()[1]}"
            gateway = Gateway([lost, *urls], leave_after_s=0.2)
            alone = Gateway([lost, lost], leave_after_s=0.2)
            try:
                assert await gateway.post("/v3/kv/txn", {}, 5.0) == {}
                with pytest.raises(
                    EtcdUnreachable, match=r"cannot be connected to: not within 0\.2 s"
                ):
                    await alone.post("/v3/kv/txn", {}, 5.0)
            finally:
                await gateway.aclose()
                await alone.aclose()


@pytest.mark.parametrize("code", [b'"NotFound"', b"[5]", b"null"])
async def test_an_error_of_another_service_is_named(code: bytes) -> None:
    """As when etcd_endpoint is the URL of something else that speaks JSON."""

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        body = b'{"code":%b,"message":"no such page"}' % code
        await reader.read(65536)
        writer.write(b"HTTP/1.1 404 No\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
        await hang(reader, writer)

    async with members(refuse) as urls:
        gateway = Gateway(urls)
        try:
            with pytest.raises(EtcdUnknown, match=f"etcd at {urls[0]} refuses: no such page"):
                await gateway.post("/v3/kv/range", {}, 5.0)
        finally:
            await gateway.aclose()


@pytest.mark.parametrize(
    "said",
    [
        b"HTTP/1.1 200 OK\r\n" + b"\xff" * 60_000 + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n" + b"[" * 100_000,
        b'HTTP/1.1 500 X\r\nContent-Length: 60014\r\n\r\n{"message":"' + b"x" * 60_000 + b'"}',
    ],
)
async def test_what_a_member_that_lies_says_is_short(said: bytes) -> None:
    """It is in the log, and in each answer with 503."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(65536)
        writer.write(said)
        writer.close()

    async with members(serve) as urls:
        gateway = Gateway(urls)
        with pytest.raises(EtcdUnknown) as caught:
            await gateway.post("/v3/kv/range", {}, 5.0)
        await gateway.aclose()
    assert len(str(caught.value)) <= 1200


async def test_cookies_of_a_member_are_not_kept() -> None:
    """They could fill the memory."""
    seen: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while asked := await reader.read(65536):
            seen.append(asked)
            writer.write(ANSWER.replace(b"\r\n", b"\r\nSet-Cookie: a=b\r\n", 1))
        writer.close()

    async with members(serve) as urls:
        gateway = Gateway(urls)
        for _ in range(3):
            await gateway.post("/v3/kv/range", {}, 5.0)
        await gateway.aclose()
    assert len(seen) == 3
    assert b"cookie" not in b"".join(seen).lower()


async def test_the_renewal_of_another_lease_renews_nothing() -> None:
    """A proxy before etcd that mixes answers up would let a coordinator lead for longer than its lease."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(65536):
            body = b'{"result":{"header":{"raft_term":"3"},"ID":"7","TTL":"3"}}'
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
        writer.close()

    async with members(serve) as urls:
        etcd = Etcd(Gateway(urls), 5.0)
        assert await etcd.keep_alive(7) == 3
        with pytest.raises(EtcdUnknown, match="another lease"):
            await etcd.keep_alive(8)
        await etcd.aclose()


async def left(gateway: Gateway, endpoint: str) -> None:
    async with asyncio.timeout(10.0):
        while gateway.endpoint == endpoint:  # noqa: ASYNC110 - nobody is notified of it
            await asyncio.sleep(0.01)


async def test_a_member_that_is_slow_is_left_before_its_answer_is_given_up() -> None:
    """The other members are asked while its answer may still come."""
    answered = asyncio.Event()

    async def slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(65536)
        await answered.wait()
        writer.write(ANSWER)
        await hang(reader, writer)

    async with members(slow, answer) as urls:
        gateway = Gateway(urls, leave_after_s=0.05)
        try:
            asking = asyncio.create_task(gateway.post("/v3/kv/range", {}, 10.0))
            await left(gateway, urls[0])
            assert await gateway.post("/v3/kv/range", {}, 10.0) == {}
            answered.set()
            assert await asking == {}
            assert gateway.endpoint == urls[1]
        finally:
            await gateway.aclose()


async def test_a_member_that_hangs_takes_up_its_own_connections_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Requests that wait for it must not keep those that are sent again from the other members."""
    monkeypatch.setattr("agent.coordinator.store.etcd_gateway.CONNECTIONS", 2)
    async with members(hang, answer) as urls:
        gateway = Gateway(urls, leave_after_s=0.3)
        waiting = [asyncio.create_task(gateway.post("/v3/kv/txn", {}, 30.0)) for _ in range(4)]
        try:
            await left(gateway, urls[0])
            assert await gateway.post("/v3/kv/txn", {}, 5.0) == {}
            assert gateway.endpoint == urls[1]
            assert not any(task.done() for task in waiting)
        finally:
            for task in waiting:
                task.cancel()
            await asyncio.wait(waiting)
            await gateway.aclose()


async def test_a_member_that_a_sibling_has_left_is_not_asked_first() -> None:
    """Renewals find out that a member hangs; a standby's first request for a group is then sent elsewhere."""
    async with members(hang, answer) as urls:
        gateway = Gateway(urls, leave_after_s=0.05)
        renewing = gateway.sibling()
        try:
            with pytest.raises(EtcdUnknown):
                await renewing.post("/v3/lease/keepalive", {}, TIMEOUT_S)
            assert await gateway.post("/v3/kv/range", {}, 5.0) == {}
        finally:
            await gateway.aclose()
            await renewing.aclose()


async def test_a_member_of_another_etcd_cluster_is_left() -> None:
    """A restored member has the same keys at the same revisions. A client that has sent no request yet leaves it, too."""
    async with members(a_member_of("1"), a_member_of("2", "watch"), a_member_of("1")) as urls:
        gateway = Gateway(urls)
        await gateway.post("/v3/kv/range", {}, 5.0)
        sibling = gateway.sibling()
        try:
            for one in (gateway, sibling):
                watch = one.stream("/v3/watch", {})
                for foreign in (anext(watch), one.post("/v3/kv/txn", {}, 5.0)):
                    one._cluster.current = 1
                    with pytest.raises(
                        EtcdUnknown, match=f"{urls[1]} belongs to another etcd cluster"
                    ):
                        await foreign
                assert one.endpoint == urls[2]
                await one.post("/v3/kv/txn", {}, 5.0)
        finally:
            await gateway.aclose()
            await sibling.aclose()


async def test_an_outage_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    async with members(hang, hang, answer) as urls:
        gateway = Gateway(urls[:2])
        recovering = Gateway([urls[0], urls[2]])
        try:
            for _ in range(5):
                with pytest.raises(EtcdUnknown):
                    await gateway.post("/v3/kv/range", {}, 0.05)
            assert caplog.messages == ["etcd endpoint failed, using the next one"]
            for _ in range(2):
                with pytest.raises(EtcdUnknown):
                    await recovering.post("/v3/kv/range", {}, 0.05)
                await recovering.post("/v3/kv/range", {}, 5.0)
                recovering._cluster.current = 0
            assert len(caplog.messages) == 3
        finally:
            await gateway.aclose()
            await recovering.aclose()
