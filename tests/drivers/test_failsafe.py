"""The driver of failsafe over real sockets: two members, and whoever is none."""

import asyncio
import contextlib
import json
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx2
import msgspec
import pytest

from agent.drivers.failsafe import listener
from agent.drivers.failsafe.access import FailsafeAccess, load_failsafe_access
from agent.drivers.failsafe.asker import Asker, AskError, Peer
from agent.drivers.failsafe.listener import LIMITS, Listener, Refusal, Vote
from agent.drivers.failsafe.messages import (
    MAC_HEADER,
    MAX_BODY_BYTES,
    PATH,
    Answer,
    Kind,
    Question,
    decode_answer,
    encode,
    is_authentic,
    sign,
)
from agent.errors import ConfigError, ExitCode
from agent.ops.clock import Clock
from agent.schema.addresses import Address
from agent.schema.settings import AgentSettings
from tests.bad_server import until
from tests.mosquitto import Authority

LIMIT_S = 30
KEY = b"a secret of the whole group"
OTHER_KEY = b"a secret of somebody else"


def access_by(*keys: bytes) -> FailsafeAccess:
    return FailsafeAccess(keys, None, ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))


@dataclass
class Voter:
    """Member b: a listener, and what its core was asked."""

    port: int = 0
    yes: bool = True
    asked: list[Question] = field(default_factory=list)
    listener: Listener | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def peer(self) -> Peer:
        return Peer("b", self.url)

    @property
    def connections(self) -> int:
        assert self.listener is not None
        # also those without a request, which show nothing else
        return len(self.listener._http._tasks)

    def vote(self, question: Question) -> Vote:
        self.asked.append(question)
        return Vote(yes=self.yes, why="nobody answers here, too")


@asynccontextmanager
async def voting(
    port: int, access: FailsafeAccess | None = None, scheme: str = "http", host: str = "127.0.0.1"
) -> AsyncIterator[Voter]:
    voter = Voter(port)
    made = Listener(
        "g",
        "b",
        f"{scheme}://{host}:{port}",
        access or access_by(KEY),
        vote=voter.vote,
        clock=Clock(),
    )
    voter.listener = made
    await made.start(Address("127.0.0.1", port))
    yield voter
    await made.stop()


@pytest.fixture
async def voter(unused_tcp_port: int) -> AsyncIterator[Voter]:
    async with voting(unused_tcp_port) as voter:
        yield voter


@pytest.fixture
def asker() -> Asker:
    return Asker("g", "a", "process-1", access_by(KEY))


async def ask(asker: Asker, peer: Peer, *, limit_s: float = LIMIT_S) -> Answer:
    return await asker.ask(peer, 7, rehearsal=False, limit_s=limit_s)


def question(voter: Voter, **changes: Any) -> Question:
    plain = Question(
        group="g", sender="a", to="b", url=voter.url, instance="i", epoch=7, nonce="n" * 32
    )
    return msgspec.structs.replace(plain, **changes)


async def post(
    voter: Voter,
    body: bytes,
    *,
    key: bytes = KEY,
    kind: Kind = Kind.QUESTION,
    mac: bytes | None = None,
) -> httpx2.Response:
    headers = {MAC_HEADER.encode(): sign([key], kind, body).encode() if mac is None else mac}
    async with httpx2.AsyncClient(timeout=LIMIT_S, trust_env=False) as client:
        return await client.post(f"{voter.url}{PATH}", content=body, headers=headers)


async def challenge_for(voter: Voter, asked: Question) -> str:
    answer = await post(voter, encode(asked))
    assert answer.status_code == 401
    return decode_answer(answer.content).challenge


# --- a question and its answer


@pytest.mark.parametrize("yes", [True, False])
async def test_a_question_is_answered_with_the_vote(
    asker: Asker, voter: Voter, *, yes: bool
) -> None:
    voter.yes = yes
    answer = await ask(asker, voter.peer)
    assert (answer.yes, answer.why) == (yes, "nobody answers here, too")
    (asked,) = voter.asked
    assert (asked.sender, asked.instance, asked.epoch) == ("a", "process-1", 7)


async def test_only_the_first_question_needs_a_second_request(asker: Asker, voter: Voter) -> None:
    assert voter.listener is not None
    for _ in range(3):
        await ask(asker, voter.peer)
    assert voter.listener.refused[Refusal.NO_CHALLENGE] == 1
    assert len({asked.nonce for asked in voter.asked}) == 3


async def test_a_rehearsal_reaches_the_callback_as_one(asker: Asker, voter: Voter) -> None:
    await asker.ask(voter.peer, 7, rehearsal=True, limit_s=LIMIT_S)
    assert voter.asked[0].rehearsal


async def test_a_restarted_member_is_asked_with_its_new_challenge(
    asker: Asker, unused_tcp_port: int
) -> None:
    for _ in range(2):
        async with voting(unused_tcp_port) as voter:
            assert (await ask(asker, voter.peer)).yes
            assert len(voter.asked) == 1


async def test_two_processes_that_ask_do_not_disturb_each_other(voter: Voter) -> None:
    assert voter.listener is not None
    askers = [Asker("g", "a", f"process-{n}", access_by(KEY)) for n in range(2)]
    for _ in range(3):
        for asker in askers:
            assert (await ask(asker, voter.peer)).yes
    assert voter.listener.refused[Refusal.NO_CHALLENGE] == 2


async def test_a_member_that_is_down_is_an_error_with_the_reason(
    asker: Asker, unused_tcp_port: int
) -> None:
    with pytest.raises(AskError, match=r"(?i)connect"):
        await ask(asker, Peer("b", f"http://127.0.0.1:{unused_tcp_port}"))


async def test_a_member_that_does_not_answer_is_waited_for_no_longer_than_the_limit(
    asker: Asker,
) -> None:
    ended = asyncio.Event()

    async def wait(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()
        ended.set()

    silent = await asyncio.start_server(wait, "127.0.0.1", 0)
    port = silent.sockets[0].getsockname()[1]
    with pytest.raises(AskError, match=r"no answer within 0\.1 s"):
        await ask(asker, Peer("b", f"http://127.0.0.1:{port}"), limit_s=0.1)
    await asyncio.wait_for(ended.wait(), LIMIT_S)
    silent.close()


async def test_the_last_good_address_is_used_while_the_name_server_is_away(
    asker: Asker, unused_tcp_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with voting(unused_tcp_port, host="localhost") as voter:
        peer = Peer("b", f"http://localhost:{unused_tcp_port}")
        assert (await ask(asker, peer)).yes

        def fails(*_: object, **__: object) -> list[Any]:
            raise OSError("the name server is behind the way that is cut")

        monkeypatch.setattr("agent.ops.names.socket.getaddrinfo", fails)
        for _ in range(2):
            assert (await ask(asker, peer)).yes
        assert len(voter.asked) == 3


# --- whoever is no member


async def test_without_the_secret_nothing_is_asked(voter: Voter) -> None:
    assert voter.listener is not None
    body = encode(question(voter))
    for mac in (b"", b"0" * 64, b"\xe9", b", ".join([b"0" * 64] * 50)):
        answer = await post(voter, body, mac=mac)
        assert (answer.status_code, MAC_HEADER in answer.headers) == (401, False)
        assert "challenge" not in answer.text.lower()
    assert (await post(voter, body, key=OTHER_KEY)).status_code == 401
    assert (await post(voter, body, kind=Kind.ANSWER)).status_code == 401
    assert (
        await post(voter, body + b" ", mac=sign([KEY], Kind.QUESTION, body).encode())
    ).status_code == 401
    assert voter.asked == []
    assert voter.listener.refused[Refusal.NOT_AUTHENTIC] == 7


async def test_a_member_with_another_secret_gets_an_error_that_names_it(voter: Voter) -> None:
    stranger = Asker("g", "a", "process-1", access_by(OTHER_KEY))
    with pytest.raises(AskError, match="not made with the secret of this group"):
        await ask(stranger, voter.peer)
    assert voter.asked == []


async def test_a_recorded_question_is_not_answered_again(voter: Voter) -> None:
    asked = question(voter)
    asked = msgspec.structs.replace(asked, challenge=await challenge_for(voter, asked))
    body = encode(asked)
    assert (await post(voter, body)).status_code == 200
    for _ in range(3):
        answer = await post(voter, body)
        assert (answer.status_code, decode_answer(answer.content).yes) == (401, False)
    assert len(voter.asked) == 1


async def test_a_recorded_question_does_not_change_the_challenge_of_its_sender(
    voter: Voter,
) -> None:
    first = question(voter)
    recorded = encode(first)
    challenge = await challenge_for(voter, first)
    for _ in range(3):
        await post(voter, recorded)
    answer = await post(voter, encode(question(voter, challenge=challenge)))
    assert answer.status_code == 200


@pytest.mark.parametrize(
    "changes",
    [
        {"group": "h"},
        {"to": "c"},
        {"url": "http://192.0.2.1:5480"},
        {"sender": "b"},
    ],
)
async def test_a_question_for_another_member_is_refused(
    voter: Voter, changes: dict[str, str]
) -> None:
    answer = await post(voter, encode(question(voter, **changes)))
    assert answer.status_code == 421
    assert "member b of group g" in answer.json()["error"]
    assert voter.asked == []


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{}",
        b"[]",
        b"{",
        b"\xff",
        b"[" * 4000,
        b'{"Further": ' + b"[" * 4000,
        b'{"Group": "\xff"}',
    ],
)
async def test_what_is_no_question_is_refused(
    voter: Voter, body: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    assert (await post(voter, body)).status_code == 400
    assert voter.asked == []
    assert "Traceback" not in caplog.text


@pytest.mark.parametrize("epoch", [-1, 2**53, 2**70])
async def test_an_epoch_that_no_coordinator_can_give_is_refused(voter: Voter, epoch: int) -> None:
    body = encode(question(voter)).replace(b'"Epoch":7', b'"Epoch":%d' % epoch)
    assert (await post(voter, body)).status_code == 400
    assert voter.asked == []


async def test_every_other_path_and_method_is_refused(voter: Voter) -> None:
    async with httpx2.AsyncClient(base_url=voter.url, timeout=LIMIT_S, trust_env=False) as client:
        assert (await client.get(PATH)).headers["allow"] == "POST"
        for path in ("/", "/status", "/metrics", f"{PATH}/", "/failsafe/v1/../v1/question/x"):
            assert (await client.post(path)).status_code == 404


async def test_a_body_that_is_too_long_is_not_read(voter: Voter) -> None:
    body = encode(question(voter, challenge="c" * MAX_BODY_BYTES))
    assert (await post(voter, body)).status_code == 413
    with pytest.raises(httpx2.HTTPError):
        await post(voter, b"x" * 10_000_000)
    assert voter.asked == []


def test_the_largest_ids_fit_into_a_message() -> None:
    wide = "\N{GRINNING FACE}" * 256
    largest = Question(
        group=wide,
        sender=wide,
        to=wide,
        url="u" * 256,
        instance="i" * 16,
        epoch=2**53 - 1,
        nonce="n" * 32,
        challenge="c" * 32,
    )
    answer = Answer(
        group=wide,
        sender=wide,
        to=wide,
        nonce="n" * 32,
        yes=True,
        why="w" * 200,
        challenge="c" * 32,
    )
    assert len(encode(largest)) <= MAX_BODY_BYTES
    assert len(encode(answer)) <= MAX_BODY_BYTES


async def test_a_slow_request_is_disconnected(
    unused_tcp_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listener, "LIMITS", replace(LIMITS, request_s=0.2))
    async with voting(unused_tcp_port):
        reader, writer = await asyncio.open_connection("127.0.0.1", unused_tcp_port)
        head = b"POST /failsafe/v1/question HTTP/1.1\r\nHost: h\r\nContent-Length: 99\r\n\r\n"
        writer.write(head + b"{")
        assert await asyncio.wait_for(reader.read(), LIMIT_S) == b""
        writer.close()


@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_200_connections_do_not_keep_a_member_from_being_asked(
    tmp_path: Path, unused_tcp_port: int, scheme: str
) -> None:
    """Each of them is opened again as soon as it is ended, and sends nothing, not even a handshake."""
    access = access_by(KEY) if scheme == "http" else access_with_tls(tmp_path, unused_tcp_port)
    asker = Asker("g", "a", "process-1", access)

    async def hold() -> None:
        loop = asyncio.get_running_loop()
        while True:
            with socket.socket() as held, contextlib.suppress(ConnectionError):
                held.setblocking(False)
                await loop.sock_connect(held, ("127.0.0.1", unused_tcp_port))
                await loop.sock_recv(held, 1)

    async with voting(unused_tcp_port, access, scheme) as voter, asyncio.TaskGroup() as held:
        assert voter.listener is not None
        holding = [held.create_task(hold()) for _ in range(200)]
        await until(lambda: voter.connections == LIMITS.connections)
        for _ in range(5):
            assert (await ask(asker, Peer("b", f"{scheme}://127.0.0.1:{unused_tcp_port}"))).yes
            assert voter.connections <= LIMITS.connections
        for task in holding:
            task.cancel()


async def test_refusals_are_logged_once_in_a_while(
    voter: Voter, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(20):
        await post(voter, b"{}", mac=b"")
    assert len(caplog.records) == 1


# --- answers that do not count


@asynccontextmanager
async def answering(make: Any) -> AsyncIterator[Peer]:
    """A member whose answers are made by a function of the question; it returns status, body and code."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(
            int(line.split(b":")[1]) for line in head.lower().split(b"\r\n") if b"length" in line
        )
        status, body, mac = make(msgspec.json.decode(await reader.readexactly(length)))
        writer.write(
            f"HTTP/1.1 {status} X\r\nContent-Length: {len(body)}\r\n{MAC_HEADER}: {mac}\r\n"
            "Connection: close\r\n\r\n".encode()
            + body
        )
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    yield Peer("b", f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    server.close()


def yes_to(asked: dict[str, Any], **changes: Any) -> bytes:
    answer = {"Group": "g", "From": "b", "To": "a", "Nonce": asked["Nonce"], "Yes": True}
    return json.dumps({**answer, **changes}).encode()


@pytest.mark.parametrize(
    "changes",
    [
        {"Group": "h"},
        {"From": "c"},
        {"To": "c"},
        {"Nonce": "of another question"},
        {"Yes": "yes"},
        {"Yes": 1},
    ],
)
async def test_an_answer_of_another_member_or_question_does_not_count(
    asker: Asker, changes: dict[str, Any]
) -> None:
    def make(asked: dict[str, Any]) -> tuple[int, bytes, str]:
        body = yes_to(asked, **changes)
        return 200, body, sign([KEY], Kind.ANSWER, body)

    async with answering(make) as peer:
        with pytest.raises(AskError, match=r"another member|cannot be read"):
            await ask(asker, peer)


@pytest.mark.parametrize("kind", ["no code", "wrong secret", "question", "other body"])
async def test_an_answer_without_its_code_does_not_count(asker: Asker, kind: str) -> None:
    def make(asked: dict[str, Any]) -> tuple[int, bytes, str]:
        body = yes_to(asked)
        macs = {
            "no code": "",
            "wrong secret": sign([OTHER_KEY], Kind.ANSWER, body),
            "question": sign([KEY], Kind.QUESTION, body),
            "other body": sign([KEY], Kind.ANSWER, body + b" "),
        }
        return 200, body, macs[kind]

    async with answering(make) as peer:
        with pytest.raises(AskError, match="answered 200: the answer is not made with the secret"):
            await ask(asker, peer)


async def test_a_recorded_answer_does_not_count(asker: Asker) -> None:
    recorded: list[bytes] = []

    def make(asked: dict[str, Any]) -> tuple[int, bytes, str]:
        recorded.append(yes_to(asked))
        return 200, recorded[0], sign([KEY], Kind.ANSWER, recorded[0])

    async with answering(make) as peer:
        assert (await ask(asker, peer)).yes
        with pytest.raises(AskError, match="another question"):
            await ask(asker, peer)


@pytest.mark.parametrize("status", [401, 204, 301, 500])
async def test_a_yes_with_another_status_does_not_count(asker: Asker, status: int) -> None:
    requests = []

    def make(asked: dict[str, Any]) -> tuple[int, bytes, str]:
        requests.append(asked)
        body = yes_to(asked, Challenge="c" * 32)
        return status, body, sign([KEY], Kind.ANSWER, body)

    async with answering(make) as peer:
        with pytest.raises(AskError):
            await ask(asker, peer)
    assert len(requests) <= 2


@pytest.mark.parametrize(
    "sent",
    [
        b"SSH-2.0-OpenSSH_9\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n{",
        b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 1\r\n\r\n1",
        b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 5000,
        b"\x00",
        b"",
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: Upgrade\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 6000\r\n\r\n" + b"[" * 6000,
    ],
)
async def test_an_answer_that_is_garbage_is_an_ask_error(asker: Asker, sent: bytes) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"}")
        writer.write(sent)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    with pytest.raises(AskError):
        await ask(asker, Peer("b", f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"))
    server.close()


@pytest.mark.parametrize(
    "url",
    [
        "http://b:99999",
        "http://b:port",
        "http://[::1",
        "https://:5480",
        f"http://{'b' * 64}:5480",
        "http://..:5480",
        "http://b",
    ],
)
async def test_a_url_that_cannot_be_used_is_an_error_with_the_reason(
    asker: Asker, url: str
) -> None:
    """Whoever may register a session sets its URL."""
    with pytest.raises(AskError, match=r"cannot be (asked|reached) \(.+\)"):
        await ask(asker, Peer("b", url))


# --- secrets and certificates


def test_codes_are_compared_by_kind_key_and_body() -> None:
    body = b"{}"
    both = sign([OTHER_KEY, KEY], Kind.ANSWER, body)
    assert is_authentic([KEY], Kind.ANSWER, body, both)
    assert is_authentic([OTHER_KEY], Kind.ANSWER, body, both)
    assert not is_authentic([b"third"], Kind.ANSWER, body, both)
    assert not is_authentic([], Kind.ANSWER, body, both)


async def test_a_secret_is_changed_member_by_member_in_any_order(
    asker: Asker, voter: Voter
) -> None:
    assert voter.listener is not None
    old, both, new = access_by(KEY), access_by(OTHER_KEY, KEY), access_by(OTHER_KEY)
    for first, second in ((old, both), (both, both), (both, new), (new, new)):
        for at_asker, at_voter in ((first, second), (second, first)):
            asker.use(at_asker)
            voter.listener.use(at_voter)
            assert (await ask(asker, voter.peer)).yes


def access_with_tls(directory: Path, port: int) -> FailsafeAccess:
    authority = Authority(directory)
    certificate, key = authority.issue("b")
    secret = directory / "secret"
    secret.write_bytes(KEY + b"\n")
    secret.chmod(0o600)
    settings = AgentSettings(
        failsafe_listen=Address("127.0.0.1", port),
        failsafe_secret_file=secret,
        failsafe_ca_file=authority.file,
        failsafe_certificate=certificate,
        failsafe_key=key,
    )
    assert settings.member_url == f"https://127.0.0.1:{port}"
    return load_failsafe_access(settings)


async def test_questions_are_asked_over_tls_with_the_groups_authority(
    tmp_path: Path, unused_tcp_port: int
) -> None:
    access = access_with_tls(tmp_path, unused_tcp_port)
    trusting, strange = Asker("g", "a", "p", access), Asker("g", "a", "p", access_by(KEY))
    async with voting(unused_tcp_port, access, scheme="https") as voter:
        peer = Peer("b", f"https://127.0.0.1:{unused_tcp_port}")
        assert (await ask(trusting, peer)).yes
        with pytest.raises(AskError, match=r"(?i)certificate"):
            await ask(strange, peer)
        assert len(voter.asked) == 1


@pytest.mark.parametrize(
    "content", [b"", b"too short", KEY + b"\n" + b"short", b"\n".join([KEY] * 3), b"\xff" * 20]
)
def test_a_secret_file_with_something_else_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "secret"
    path.write_bytes(content)
    settings = AgentSettings(failsafe_listen=Address("127.0.0.1", 5480), failsafe_secret_file=path)
    with pytest.raises(ConfigError) as caught:
        load_failsafe_access(settings)
    assert str(path) in str(caught.value)
    assert "too short" not in str(caught.value)


async def test_an_address_in_use_is_one_clear_error(voter: Voter) -> None:
    other = Listener("g", "c", voter.url, access_by(KEY), vote=voter.vote, clock=Clock())
    with pytest.raises(
        ConfigError, match=r"failsafe listener cannot use .*--failsafe-listen"
    ) as caught:
        await other.start(Address("127.0.0.1", voter.port))
    assert caught.value.exit_code == ExitCode.LISTEN
    assert "port 0" not in str(caught.value), "the other members would not know the port"


async def test_a_stopped_listener_answers_nobody(asker: Asker, unused_tcp_port: int) -> None:
    async with voting(unused_tcp_port) as voter:
        assert voter.listener is not None
        await voter.listener.stop()
        with pytest.raises(AskError):
            await ask(asker, voter.peer)
